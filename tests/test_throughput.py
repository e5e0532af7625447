"""experiments/throughput/table.py: our side runs, sizes are those published, tables say what was
measured; where torch is, both sides are one network."""

import json
import os
import pathlib
import signal
import sys
import time
import types

import jax
import numpy as np
import pytest
import run_diffax

from diffax import chips
from diffax import noises
from diffax import samplers
from diffax import train
from diffax.build import ConfigError

EXPERIMENTS = run_diffax.ROOT / 'experiments'
sys.path.insert(0, str(EXPERIMENTS / 'throughput'))
import cases  # noqa: E402, after its folder is on the path
import ours  # noqa: E402
import program  # noqa: E402
import report  # noqa: E402
import side  # noqa: E402
import table  # noqa: E402

ALONE = ('--smoke', '--platform=cpu', '--sides', 'diffax', '--models', 'tiny')
SEEN = {'diffax': {'platform': 'cpu', 'device': 'cpu', 'jax': '1.2.3'}}


def setup(model, count=4):
  return train.setup(cases.config(model, count, 'float32'), jax.devices()[:1])


# --- our side -------------------------------------------------------------------------------------


def test_our_side_alone(tmp_path, monkeypatch, capfd):
  """A command from end to end: figures of either kind, files, and no file is written over."""
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', 'true')
  monkeypatch.setenv('PYTHONPATH', str(run_diffax.ROOT))
  out = tmp_path / 'folder' / 'a.json'
  assert table.main([*ALONE, f'--out={out}']) == 0
  printed = capfd.readouterr().out
  assert out.with_suffix('.md').read_text().strip() in printed
  run, = report.read(out)
  assert run['platform'] == 'cpu' and f'jax {jax.__version__}' in run['versions']
  learned, drew = run['rows']
  assert (learned['what'], drew['what']) == ('train', 'sample')
  size = sum(x.size for x in jax.tree.leaves(setup('tiny').like.params))
  for row in (learned, drew):
    assert row['parameters'] == size and row['cold'] and row['side'] == 'diffax'
    assert len(row['window_seconds']) >= 2 and min(row['window_seconds']) > 0
    assert row['first_seconds'] > row['usual_seconds']  # which compiles
    assert 50e6 < row['peak_bytes'] < 5e9
    assert len(row['product_seconds']) == side.PRODUCTS
  assert drew['flops'] == 2 * cases.STEPS * 4 * drew['forward_flops']
  assert 0.5 < learned['value'] < 4  # of noise of deviation 1 less data of 1, told as nothing: 2
  assert f'| tiny | train | 4 | diffax | {report.shown(report.spread(report.rates(learned)))}' in (
    printed)

  before = out.read_bytes()
  assert table.main([*ALONE, f'--out={out}']) == 2
  assert 'is there already' in capfd.readouterr().err and out.read_bytes() == before


@pytest.mark.parametrize('model, parameters, products', [
  ('S/2', 33.0e6, 6.06e9), ('B/2', 130.5e6, 23.01e9), ('L/2', 458e6, 80.71e9),
  ('XL/2', 675e6, 118.64e9), ('unet', 55.7e6, None),
])
def test_sizes_are_those_published(model, parameters, products):
  """Peebles & Xie 2023, tables 1 and 4, whose Gflops count a product and its sum once; Karras et
  al. 2022, table 7."""
  run = setup(model)
  told = ours.facts(run)
  assert told['parameters'] == pytest.approx(parameters, rel=0.01)
  if products:
    assert told['forward_flops'] / 2 == pytest.approx(products, rel=0.01)
  assert train.model_flops(run) == pytest.approx(3 * 4 * told['forward_flops'], rel=0.02)


@pytest.mark.parametrize('model', ['tiny', 'tiny:unet'])
def test_a_draw_is_fifty_guided_calls(model):
  run = setup(model, 2)
  assert ours.sampling_flops(run) == 50 * 2 * 2 * ours.facts(run)['forward_flops']


def test_every_model_has_a_batch():
  for platform in ('cpu', 'gpu'):
    for model in cases.models(platform):
      assert model in cases.MODELS
      assert cases.batch(model, 'train', platform) > cases.batch('tiny', 'train', platform)


def test_what_torch_is_told():
  """The sizes are of the config, also of one that is overridden, and plain data."""
  made = cases.spec(cases.config('tiny', 4, 'float32', ['--config.model.depth=3']))
  assert (made['kind'], made['depth'], made['patch'], made['size']) == ('dit', 3, 2, 8)
  assert made['classes'] == 1000 and made['optimizer'] == 'adamw' and made['ema'] == 0.9999
  made = json.loads(json.dumps(cases.spec(cases.config('unet', 4, 'bfloat16'))))
  assert (made['width'], made['multipliers'], made['blocks']) == (128, [2, 2, 2], 4)
  assert (made['classes'], made['dropout'], made['size']) == (10, 0.13, 32)
  assert (made['sigma_min'], made['sigma_max'], made['sigma_data']) == (0.002, 80.0, 0.5)


# --- one measurement ------------------------------------------------------------------------------


class Clocked:
  """A side of whose calls the first takes 10.5 s and each other 0.5 s, by a clock of its own."""

  def __init__(self, monkeypatch, value=2.0):
    self.now, self.calls, self.value = 0.0, 0, value
    monkeypatch.setattr(side.time, 'perf_counter', lambda: self.now)

  def train(self, job):
    def advance(n):
      self.now += 0.5 * n + (0 if self.calls else 10)
      self.calls += n
      return self.value
    return advance, {'parameters': 7}

  def peak(self):
    return 12


@pytest.mark.parametrize('budget, windows, calls', [(10.0, 5, 4), (1.6, 3, 1), (0.1, 2, 1)])
def test_windows(monkeypatch, budget, windows, calls):
  """Compiling is in none of them, and a window is of as many calls as the budget allows."""
  clocked = Clocked(monkeypatch)
  told = side.measure(clocked, {'what': 'train', 'seconds': budget})
  assert (told['first_seconds'], told['usual_seconds']) == (10.5, 0.5)
  assert told['window_calls'] == calls
  assert told['window_seconds'] == [0.5 * calls] * windows
  assert clocked.calls == 1 + side.WARM + windows * calls
  assert told['parameters'] == 7 and told['peak_bytes'] == 12


def test_nothing_is_said_of_a_nan(monkeypatch):
  with pytest.raises(SystemExit, match='the result is nan'):
    side.measure(Clocked(monkeypatch, float('nan')), {'what': 'train', 'seconds': 1.0})


def test_peak_is_of_this_process_alone():
  """A child's peak is not its parent's: 400 MB here are not seen there."""
  held = np.ones(50_000_000)
  assert side.high_water() > held.nbytes
  code = 'import sys; sys.path.insert(0, sys.argv[1]); import side; print(side.high_water())'
  path = str(EXPERIMENTS / 'throughput')
  read, write = os.pipe()
  process = os.posix_spawn(
    sys.executable, [sys.executable, '-c', code, path], os.environ,
    file_actions=[(os.POSIX_SPAWN_DUP2, write, 1)])
  os.waitpid(process, 0)
  assert 1e6 < int(os.read(read, 100)) < 2e8


# --- trouble --------------------------------------------------------------------------------------


@pytest.mark.parametrize('arguments, said', [
  (['--models', 'S/3'], 'S/3: none of S/2, S/4'),
  (['--batch=0'], '--batch=0 must be positive'),
  (['--seconds=nan'], '--seconds=nan must be positive'),
  (['--threads=9999'], '--threads=9999: 0 to'),
  (['--out=a.txt'], 'ends in .json'),
  (['--bogus'], "what is '--bogus'"),
  (['--sides', 'torch', '--torch-python=/nowhere/python'], 'No such file'),
  (['--merge', '/nowhere.json'], '/nowhere.json: No such file'),
])
def test_mistakes(arguments, said, capsys):
  assert table.main(arguments) == 2
  error = capsys.readouterr().err
  assert said in error and error.count('\n') == 1


def test_mistakes_in_a_config(monkeypatch, capsys):
  monkeypatch.setattr(table, 'probe', lambda *_: SEEN)
  monkeypatch.setattr(table, 'ask', lambda *_: pytest.fail('something was started'))
  assert table.main([*ALONE, '--config.model.widht=3']) == 2
  assert 'widht' in capsys.readouterr().err
  assert table.main([*ALONE, '--config.batch_size=9']) == 2
  assert 'say --batch' in capsys.readouterr().err


def test_without_torch(monkeypatch, capsys):
  """Our side alone, said; where torch was asked for, an error."""
  monkeypatch.setattr(table.subprocess, 'run', lambda command: type('', (), {'returncode': 1}))
  assert table.sides(table.arguments([])) == ['diffax']
  assert 'diffax is measured alone; pip install torch' in capsys.readouterr().out
  with pytest.raises(ConfigError, match='has no torch; pip install torch'):
    table.sides(table.arguments(['--sides', 'diffax', 'torch']))


def test_a_failure_is_in_its_row(tmp_path, monkeypatch, capsys):
  """One side's end is told and does not end the table; what was measured is there already."""
  out, seen = tmp_path / 'a.json', []

  def ask(args, job, config, caches):
    seen.append((job['side'], job['repeat']))
    if len(seen) > 1:
      assert len(report.read(out)[0]['rows']) == len(seen) - 1
    if job['side'] == 'torch':
      return {'error': 'OutOfMemoryError'}
    return row('diffax', [1.0], job['repeat'], model='tiny', batch=4)

  monkeypatch.setattr(table, 'sides', lambda args: ['diffax', 'torch'])
  monkeypatch.setattr(table, 'probe', lambda *_: SEEN)
  monkeypatch.setattr(table, 'ask', ask)
  assert table.main(['--models', 'tiny', '--what', 'train', '--repeats=2', f'--out={out}']) == 0
  assert seen == [('diffax', 0), ('torch', 0), ('torch', 1), ('diffax', 1)]
  assert '|  |  |  | torch | failed: OutOfMemoryError |' in capsys.readouterr().out
  monkeypatch.setattr(table, 'ask', lambda *_: {'error': 'gone'})
  assert table.main([*ALONE, '--what', 'train']) == 1


def test_a_process_is_ended_in_time(tmp_path):
  """By --limit, with what it started; and the reason is one line."""
  mark = tmp_path / 'pid'
  python = tmp_path / 'python'
  python.write_text(f'#!/bin/sh\nsleep 100 &\necho $! > {mark}\nwait\n')
  python.chmod(0o755)
  args = table.arguments(['--limit=1', f'--torch-python={python}'])
  said = table.ask(args, {'side': 'torch'}, {}, tmp_path)
  assert said == {'error': 'ended after --limit=1 seconds'}
  child = pathlib.Path(f'/proc/{mark.read_text().strip()}/stat')
  alive = lambda: child.exists() and child.read_text().split()[2] != 'Z'
  end = time.monotonic() + 30  # the signal is sent; that it has come may take a moment
  while alive() and time.monotonic() < end:
    time.sleep(0.01)
  assert not alive()


def test_why():
  log = 'Traceback\n  File x\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: a | b\n---\nsee x\n'
  assert table.why(1, log) == 'jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: a / b'
  assert table.why(1, 'only this\n') == 'only this'
  assert table.why(-signal.SIGKILL, '') == 'ended by SIGKILL, as where memory runs out'
  assert table.why(-signal.SIGSEGV, '') == 'ended by SIGSEGV'


# --- tables ---------------------------------------------------------------------------------------


def row(name, seconds, repeat=0, **more):
  """A row of batch 10: windows of 2 calls; 1e12 FLOP a call; products of 1000 rows in 1 ms."""
  return dict(
    model='XL/2', what='train', side=name, repeat=repeat, batch=10, product_rows=1000,
    cold=not repeat, parameters=5, forward_flops=100, first_seconds=60.0, usual_seconds=1.0,
    window_calls=2, window_seconds=seconds, cpu_seconds=4.0, peak_bytes=3e9,
    product_seconds=[1e-3 if name == 'diffax' else 2e-3],
  ) | ({'flops': 1e12} if name == 'diffax' else {}) | more


def ran(rows, started='2026-01-01', **more):
  return dict(
    command='python table.py', started=started, platform='gpu', device='NVIDIA H200',
    machine='16 processors', versions='jax 1', dtype='bfloat16', threads=16, environment='',
    load=0.5, rows=rows,
  ) | more


THREE = [
  row('diffax', [2.0, 1.0, 2.0]), row('torch', [4.0]), row('torch_compile', [2.5]),
  row('torch_compile', [2.0], 1), row('torch', [8.0], 1), row('diffax', [1.0], 1),
]


def test_figures():
  """Median and range over windows; ratios by turns; MFU by jax's product; compiling when cold."""
  told = report.figures(report.cases([ran(THREE)])['XL/2', 'train', 10])
  assert told['diffax']['images'] == {'median': 15.0, 'min': 10.0, 'max': 20.0}
  assert told['torch']['over'] == {'median': 5.0, 'min': 2.0, 'max': 8.0}
  assert told['torch_compile']['over'] == {'median': 1.625, 'min': 1.25, 'max': 2.0}
  assert told['diffax']['over'] is None
  share = told['torch_compile']['mfu']  # 2 calls of 1e12 in 2.5 and 2 s, of 2e9 / 1e-3 a second
  assert share == pytest.approx({'median': 0.45, 'min': 0.4, 'max': 0.5})
  assert told['torch_compile']['compile_seconds'] == 59 and told['torch']['compile_seconds'] is None
  assert told['torch']['peak_bytes'] == 3e9 and told['diffax']['cpu_seconds'] == 0.4


def test_goals_met_and_missed():
  text = report.render([ran(THREE)])
  assert 'Goal, XL/2 train: at least 0.55 of the measured matrix product: at batch 10 **met**' in (
    text)
  assert 'at least 1.2 times torch_compile: at batch 10 **met**, 1.62 (1.25 to 2).' in text
  assert '- Goal, XL/2 sample: at least 1.2 times torch_compile: not measured.' in text
  slow = [row('diffax', [2.0]), row('torch_compile', [2.2])]
  text = report.render([ran(slow)])
  assert 'product: at batch 10 **missed**, 0.5 (0.5 to 0.5).' in text
  assert 'torch_compile: at batch 10 **missed**, 1.1 (1.1 to 1.1).' in text
  text = report.render([ran([row('diffax', [1.0], model='S/4'), row('torch', [1.0], model='S/4')],
                            device='EPYC', platform='cpu', dtype='float32')])
  assert '- Goal, S/4 train: at least 1 times torch: at batch 10 **met**, 1 (1 to 1).' in text
  assert 'XL/2' not in text and 'float32, 16 threads' in text
  assert 'Goal' not in report.render([ran(THREE, dtype='float32')])


def test_a_batch_of_its_own_is_a_case_of_its_own():
  rows = [row('diffax', [2.0]), row('diffax', [1.0], batch=20)]
  lines = [line for line in report.render([ran(rows)]).splitlines() if '| diffax |' in line]
  assert [line.split(' | ')[2] for line in lines] == ['10', '20']


def test_sides_that_differ_are_not_compared_silently():
  rows = [row('diffax', [1.0]), row('torch', [1.0], parameters=6)]
  assert '**Not comparable**: XL/2 train at 10: the sides differ in parameters' in (
    report.render([ran(rows)]))
  for flops, told in ((101, 0), (103, 1)):
    rows = [row('diffax', [1.0]), row('torch', [1.0], forward_flops=flops)]
    assert len(report.mismatches([ran(rows)])) == told


def test_merge(tmp_path, capsys):
  """Turns of one run are not paired with those of another; a run counts once; devices apart."""
  slow = ran([row('diffax', [4.0], product_seconds=[2e-3])], '2026-01-02')
  cpu = ran([row('diffax', [1.0])], '2026-01-03', device='EPYC', platform='cpu', dtype='float32')
  files = [tmp_path / f'{name}.json' for name in 'abc']
  for file, run in zip(files, (slow, ran(THREE), cpu)):
    file.write_text(json.dumps({'runs': [run]}))
  out = tmp_path / 'all.json'
  assert table.main(['--merge', *map(str, files), f'--out={out}']) == 0
  runs = report.read(out)
  assert [run['started'] for run in runs] == ['2026-01-01', '2026-01-02', '2026-01-03']
  told = report.figures(report.cases(runs[:2])['XL/2', 'train', 10])
  assert told['diffax']['images'] == {'median': 10.0, 'min': 5.0, 'max': 20.0}
  assert told['torch']['over'] == {'median': 5.0, 'min': 2.0, 'max': 8.0}
  assert told['diffax']['mfu']['min'] == pytest.approx(0.5)  # 0.5e12 a second of 1e12, of its run
  text = out.with_suffix('.md').read_text()
  assert text.count('## ') == 2 and '## EPYC, float32, 16 threads' in text
  capsys.readouterr()
  assert table.main(['--merge', str(files[0]), str(files[0])]) == 2
  assert 'the run of 2026-01-02 is there twice' in capsys.readouterr().err
  files[0].write_text('{"runs": [3]}')
  assert table.main(['--merge', str(files[0])]) == 2
  assert 'is no result file of table.py' in capsys.readouterr().err


# --- beside torch, where it is --------------------------------------------------------------------


def drawn(shape, seed):
  return np.random.default_rng(seed).standard_normal(shape).astype('f4')


def dit_weights(tree):
  """diffax's parameters by the twin's names."""
  found = {}

  def take(name, layers):
    for kind, part in (('kernel', 'weight'), ('bias', 'bias')):
      found[f'{name}.{part}'] = np.concatenate([layer[kind].T for layer in layers])

  for name in ('patch_in', 'time_in', 'time_out', 'modulation', 'patch_out'):
    take(name, [tree[name]])
  found['label.weight'] = tree['label']['embedding']
  for i in range(len(tree['blocks']['out']['bias'])):
    block = jax.tree.map(lambda x: x[i], tree['blocks'])  # noqa: B023, used at once
    for name in ('modulation', 'out', 'mlp_in', 'mlp_out'):
      take(f'blocks.{i}.{name}', [block[name]])
    take(f'blocks.{i}.qkv', [block[name] for name in ('query', 'key', 'value')])
  return found


def pair(model):
  """(run, parameters of ours, spec, the twin with the same weights), all of them drawn."""
  torch = pytest.importorskip('torch')
  import theirs

  run = setup(model)
  spec = json.loads(json.dumps(cases.spec(run.config)))
  if model == 'tiny':
    net, seeds = theirs.DiT(spec), iter(range(1000))
    scale = lambda x: x.shape[-2] ** -0.5 if x.ndim > 1 else 0.1
    ours_tree = jax.tree.map(
      lambda x: scale(x) * drawn(x.shape, next(seeds)), run.like.params['net'])
    weights = dit_weights(ours_tree)
    net.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in weights.items()})
    return run, {'net': ours_tree}, spec, net
  sys.path.append(str(EXPERIMENTS / 'cifar10_edm'))
  import compare

  net = theirs.twin.UNet(spec)
  for i, p in enumerate(net.parameters()):
    p.data.copy_(torch.from_numpy(0.1 * drawn(tuple(p.shape), i)) + (p.ndim == 1))
  weights = {name: p.detach().numpy() for name, p in net.named_parameters()}
  return run, {'net': compare.to_diffax(weights, run.like.params['net'])}, spec, net


@pytest.mark.parametrize('model', ['tiny', 'tiny:unet'])
def test_the_twin_draws_the_same(model):
  """The same weights, noise and labels come to the same samples after 50 guided steps."""
  run, params, spec, net = pair(model)
  import theirs
  import torch

  settings = run.config['sample']
  drawing, index = run.task.sample(settings, 'sample'), np.arange(4, dtype='i4')
  keys, asked = samplers.sample_keys(0, index), drawing.ask(index)
  want = jax.jit(drawing.draw)(params, {}, keys, asked)
  noise = torch.from_numpy(np.array(noises.normal(noises.fold(keys, 0), run.source.shape)))
  label = torch.from_numpy(np.array(asked['label'])).long()
  label = torch.cat([label, torch.full_like(label, spec['classes'])])
  with torch.no_grad():
    if model == 'tiny':
      found = theirs.flow_draw(net, spec, noise, label)
    else:
      found = theirs.edm_draw(net.eval(), spec, noise.permute(0, 3, 1, 2), label)
      found = found.permute(0, 2, 3, 1)
  assert np.abs(np.asarray(want)).max() > 0.1
  np.testing.assert_allclose(found.numpy(), want, atol=2e-3 * np.abs(np.asarray(want)).max())
  assert theirs.facts(net, spec)['parameters'] == ours.facts(run)['parameters']
  ratio = theirs.facts(net, spec)['forward_flops'] / ours.facts(run)['forward_flops']
  assert abs(ratio - 1) < report.SAME


def test_the_twin_learns():
  """On one batch the loss of its steps falls; of the U-Net compare.py's `parity` says more."""
  pytest.importorskip('torch')
  import theirs

  spec = cases.spec(cases.config('tiny', 4, 'float32')) | {'learning_rate': 1e-2}
  job = {'spec': spec, 'side': 'torch', 'dtype': 'float32', 'threads': 1, 'batch_size': 4}
  advance, _ = theirs.train(job | {'batch': side.drawn(job)})
  first = np.mean([advance(1) for _ in range(5)])
  advance(60)
  assert np.mean([advance(1) for _ in range(5)]) < 0.9 * first


# --- a program, read ------------------------------------------------------------------------------

GPU = '''HloModule jit_step, is_scheduled=true, num_partitions=2

%turned (p: f32[1000,100]) -> bf16[100,1000] {
  %p = f32[1000,100]{1,0} parameter(0)
  %t = f32[100,1000]{1,0} transpose(%p), dimensions={1,0}
  ROOT %c = bf16[100,1000]{1,0} convert(%t)
}

%product (a: f32[1000,100], b: f32[100,10]) -> f32[1000,10] {
  %a = f32[1000,100]{1,0} parameter(0)
  %b = f32[100,10]{1,0} parameter(1)
  ROOT %d = f32[1000,10]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[1000,100], w: f32[100,10], v: bf16[500,1000]) -> bf16[100,1000] {
  %x = f32[1000,100]{1,0} parameter(0)
  %w = f32[100,10]{1,0} parameter(1)
  %v = bf16[500,1000]{1,0} parameter(2)
  %first = (bf16[500,1000]{1,0}, bf16[1000,1000]{1,0}) all-gather-start(%v), replica_groups={{0,1}}
  %y = f32[1000,10]{1,0} fusion(%x, %w), kind=kCustom, calls=%product
  %got = bf16[1000,1000]{1,0} all-gather-done(%first)
  %second = (bf16[500,1000]{1,0}, bf16[1000,1000]{1,0}) all-gather-start(%v), replica_groups={{0,1}}
  %again = bf16[1000,1000]{1,0} all-gather-done(%second)
  %z = bf16[100,1000]{1,0} fusion(%x), kind=kInput, calls=%turned, metadata={op_name="step/turn"}
  %s = (bf16[100,1000]{1,0}, s8[64]{0}) custom-call(%z, %again), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %out = bf16[100,1000]{1,0} custom-call(%s), custom_call_target="__cudnn$fmhaSoftmax"
}
'''  # noqa: E501, a line is an instruction


def test_reading():
  """Products by their dtype, what only moves, and the network that no kernel hides, on paper."""
  chip = chips.Chip((), half=1e9, single=5e8, bandwidth=1e12, fast=1e9, slow=1e9)
  topology = types.SimpleNamespace(chip=chip, islands=lambda mesh: np.zeros(2, int))
  found = program.reading(GPU, topology, None)
  assert found['fused_attention'] == {'__cudnn$fmhaSoftmax': 1}
  assert found['product_flops'] == {'f32': 2e6, 'bf16': 2e8}
  moved = 4 * 10**5 + 2 * 10**5
  assert found['moving'] == [
    dict(place='step/turn', does=['convert', 'transpose'], times=1, bytes=moved)]
  assert found['moving_bytes'] == moved < found['traffic_bytes']
  each = 1e6 / 1e9  # half of a matrix of 2 MB
  np.testing.assert_allclose(found['network_seconds'], 2 * each)
  np.testing.assert_allclose(found['network_alone_seconds'], each)  # a product hides the first
  np.testing.assert_allclose(found['kernel_seconds'], 0.2 + 4e-3, rtol=1e-4)
