"""The door: a user's mistake is one line and status 2, before anything compiles; sample, replay."""

import json
import os
import pathlib
import shlex
import shutil

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import run_diffax

from diffax import checkpoint
from diffax import main
from diffax import replay
from diffax import train

CONFIG = f'--config={run_diffax.SMOKE}'
STEPS = ('--config.steps=12', '--config.save_every=5', '--config.log_every=1')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The workdir of a run of 12 steps on 8 devices, each logged; checkpoints of 5, 10 and 12."""
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  run_diffax.door(CONFIG, '--workdir', workdir, *STEPS)
  return workdir


@pytest.fixture
def no_compiling(monkeypatch):
  """Fails a test in which a program is compiled for the devices."""
  def compile(*args, **kwargs):
    raise AssertionError('it was compiled before it was checked')
  monkeypatch.setattr(train, 'compile_step', compile)
  monkeypatch.setattr(train, 'init', compile)
  monkeypatch.setattr(train, 'each_loss', compile)


def mistake(capfd, *arguments):
  """The one line that a command ends with."""
  with pytest.raises(SystemExit) as end:
    run_diffax.door(*arguments)
  assert end.value.code == 2
  said = capfd.readouterr().err
  assert said.startswith('error: ') and said.count('\n') == 1 and said.endswith('\n'), said
  return said


@pytest.mark.parametrize('arguments, said', [
  ([CONFIG + ':smokey'], ["'smokey'", 'allowed']),
  (['--config=configs/nosuch.py'], ['nosuch.py', 'no such file']),
  ([CONFIG, '--config.stepz=3'], ['stepz', 'did you mean steps']),
  ([CONFIG, '--config.schedule=cosin'], ['cosin', 'did you mean cosine', 'linear']),
  ([CONFIG, '--config.sample.sampler.name=hune'], ['hune', 'did you mean heun']),
  ([CONFIG, '--config.optimizer.name=adamm'], ['adamm', 'did you mean', 'adamw']),
  ([CONFIG, '--config.optimizer.name=global_norm'], ['global_norm']),
  ([CONFIG, '--config.model.name=dti'], ['dti', 'did you mean dit']),
  ([CONFIG, '--config.data.name=digitz'], ['digitz', 'did you mean digits']),
  ([CONFIG, '--config.data.split=trian'], ['trian', 'did you mean train', 'test']),
  ([CONFIG, '--config.task.name=generat'], ['generat', 'did you mean generate']),
  ([CONFIG, '--config.loss.weight=unifrom'], ['unifrom', 'did you mean uniform']),
  ([CONFIG, '--config.loss.time=logitnormal'], ['logitnormal', 'did you mean logit_normal']),
  ([CONFIG, '--config.evals.samples.name=gird'], ['gird', 'did you mean grid']),
  ([CONFIG, '--config.steps=many'], ['steps', 'many']),
  ([CONFIG, '--config.steps=0'], ['steps=0']),
  ([CONFIG, '--config.log_every=0'], ['log_every=0']),
  ([CONFIG, '--config.keep.last=0'], ['keep.last=0']),
  ([CONFIG, '--config.data.workers=-1'], ['workers=-1']),
  ([CONFIG, '--config.data.on_error=skp'], ['skp', 'skip']),
  ([CONFIG, '--config.data.size=-3'], ['size', '-3']),
  ([CONFIG, '--config.batch_size=20'], ['batch_size=20', '8 devices', '16 would']),
  ([CONFIG, '--config.accumulate=3'], ['batch_size=32', 'accumulate=3', '24 would']),
  ([CONFIG, '--config.evals.samples.batch_size=0'], ['samples.batch_size=0']),
  ([CONFIG, '--config.mesh.fsdp=3'], ['fsdp', '8 devices']),
  ([CONFIG, '--config.prediction=eps'], ["'eps'", 't=1', 'velocity']),
  ([CONFIG, '--config.ema=1.'], ['ema', '1.0', '[0, 1)']),
  ([CONFIG, '--config.ema=0.9,-0.5'], ['-0.5', '[0, 1)']),
  ([CONFIG, '--config.model.classes=7'], ['classes=7', '10 classes']),
  ([CONFIG, '--config.model.heads=5'], ['width=32', 'heads=5']),
  ([CONFIG, '--config.model.patch=3'], ['model', 'patches of 3']),
  ([CONFIG, '--config.model.dtype=float33'], ['float33']),
  ([CONFIG, '--config.optimizer.clip=-1.'], ['clip=-1', 'negative']),
  ([CONFIG, '--config.optimizer.mask=('], ['mask', 'pattern']),
  ([CONFIG, '--config.learning_rate.decay_steps=3'], ['learning_rate']),
  ([CONFIG, '--config.task.drop_cond=2.'], ['drop_cond=2.0', '[0, 1]']),
  ([CONFIG, '--config.evals.samples.sampler.steps=0'], ['steps=0']),
  ([CONFIG, '--config.evals.samples.ema=0.5'], ["'0.5'", '0.995']),
  ([CONFIG, '--config.evals.samples.labels=10'], ["'10'", '0 to 9']),
  ([CONFIG, '--config.evals.samples.labels=a'], ["'a'", 'balanced']),
  ([CONFIG, '--config.schedule=shift'], ['schedule.of', 'needed', 'cosine']),
  ([CONFIG, '--config.loss.weight=vlb'], ['loss.weight', 'density', 'times.uniform']),
  ([CONFIG, '--config.evals.samples.sampler.calls=8'], ['samples.sampler.calls=8', '7', '9']),
  ([CONFIG, '--config.evals.samples.sampler.name=ddpm',
    '--config.evals.samples.sampler.variance=learned'], ['evals.samples', 'learned_range']),
  ([CONFIG, '--mode=smaple'], ['smaple', 'did you mean sample', 'replay']),
  ([CONFIG, '--wrokdir=x'], ['wrokdir', 'workdir']),
  ([CONFIG, 'x'], ["'x'", '--flag=value']),
  ([CONFIG, '--step=-1'], ['step', '-1']),
  ([CONFIG, '--step=x'], ['step', 'x']),
  ([], ['--config', 'config.json']),
])
def test_mistake(arguments, said, tmp_path, capfd, no_compiling):
  found = mistake(capfd, '--workdir', tmp_path / 'run', *arguments)
  for part in said:
    assert part in found, found
  assert not (tmp_path / 'run').exists()  # nothing was begun


def test_no_workdir(capfd, no_compiling):
  assert '--workdir is missing' in mistake(capfd, CONFIG)


def test_workdir_that_cannot_be_written(tmp_path, capfd, no_compiling):
  (tmp_path / 'file').write_text('')
  found = mistake(capfd, CONFIG, '--workdir', tmp_path / 'file' / 'run')
  assert f'--workdir={tmp_path}/file/run cannot be written' in found


@pytest.mark.parametrize('override, said', [
  ('model.width=64', 'model.width: 32 -> 64'), ('seed=1', 'seed: 0 -> 1'),
  ('loss.time=uniform', 'logit_normal -> uniform')])
def test_workdir_of_another_config(override, said, trained, capfd, no_compiling):
  for named in ([CONFIG, *STEPS], []):  # with the file, and going on without it
    found = mistake(capfd, '--workdir', trained, *named, f'--config.{override}')
    assert said in found and '--from' in found


def test_damaged_config(tmp_path, capfd, no_compiling):
  (tmp_path / 'config.json').write_text('{"steps": ')
  for named in ([CONFIG], [], ['--mode=sample']):
    found = mistake(capfd, '--workdir', tmp_path, *named)
    assert 'config.json is not readable JSON' in found


@pytest.mark.parametrize('arguments, said', [
  (['--mode=sample', '--step=7'], ['step 7', '5, 10, 12']),
  (['--mode=sample', '--config.sample.batch_size=0'], ['batch_size=0']),
  (['--mode=sample', '--config.sample.count=0'], ['count=0']),
  (['--mode=sample', '--config.sample.labels=0,10'], ["'0,10'", '0 to 9']),
  (['--mode=sample', '--config.sample.ema=0.5'], ["'0.5'", '0.995', 'none']),
  (['--mode=sample', '--config.sample.sampler.steps=0'], ['steps=0']),
  (['--mode=sample', '--config.sample.sampler.name=nosuch'], ['nosuch', 'heun']),
  (['--mode=replay'], ['--step=0', '1 to 12']),
  (['--mode=replay', '--step=13'], ['--step=13', '12']),
])
def test_mistake_with_a_run(arguments, said, trained, capfd, no_compiling):
  found = mistake(capfd, '--workdir', trained, *arguments)
  for part in said:
    assert part in found, found


def test_nothing_trained(tmp_path, capfd, no_compiling):
  for mode in ('sample', 'replay'):
    found = mistake(capfd, CONFIG, '--workdir', tmp_path / 'run', '--mode', mode, '--step=1')
    assert 'no such folder' in found
  found = mistake(capfd, CONFIG, '--workdir', tmp_path, '--mode=sample')
  assert 'train first' in found


def test_from_that_does_not_fit(trained, tmp_path, capfd, no_compiling):
  for warm in (tmp_path, tmp_path / 'nosuch'):
    assert 'no checkpoint' in mistake(
      capfd, CONFIG, '--workdir', tmp_path / 'run', '--from', warm)
  found = mistake(
    capfd, CONFIG, '--workdir', tmp_path / 'run', '--from', trained, '--config.model.width=64')
  assert 'parameters do not fit' in found
  assert 'net/blocks/key/bias: (2, 32) there, (2, 64) here' in found
  assert not (tmp_path / 'run').exists()  # a corrected command may use it


def test_help(capsys):
  run_diffax.door('--help')
  assert '--workdir' in capsys.readouterr().out


def test_spellings():
  """--flag value, --flag=value, and -config as well."""
  for argv in (['--workdir', 'a', '--config', 'c', '--config.steps', '5'],
               ['--workdir=a', '-config=c', '-config.steps=5']):
    values, overrides = main.parse(['diffax', *argv])
    assert (values.workdir, values.config, overrides) == ('a', 'c', ['--config.steps=5'])


def test_compiled_programs_are_kept(tmp_path, monkeypatch):
  """In the cache's folder, unless the environment names another."""
  there = jax.config.jax_compilation_cache_dir
  try:
    monkeypatch.setenv('DIFFAX_CACHE', str(tmp_path))
    main._cache_programs()
    assert jax.config.jax_compilation_cache_dir == there  # $JAX_COMPILATION_CACHE_DIR of the tests
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
    main._cache_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'programs')
  finally:
    jax.config.update('jax_compilation_cache_dir', there)


def test_what_a_run_leaves(trained):
  assert {p.name for p in trained.iterdir()} == {
    'checkpoints', 'config.json', 'environment.json', 'evals.jsonl', 'images', 'metrics.jsonl',
    'tensorboard'}
  started = json.loads((trained / 'environment.json').read_text())
  assert started[0]['versions']['jax'] == jax.__version__ and len(started[0]['devices']) == 8
  assert (trained / 'images' / 'loss.png').exists()
  config = json.loads((trained / 'config.json').read_text())
  assert config['steps'] == 12 and config['model']['dtype'] == 'float32'
  assert checkpoint.present(trained / 'checkpoints') == [5, 10, 12]


# --- replay ---------------------------------------------------------------------------------------


def files(folder):
  return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b'')
          for p in pathlib.Path(folder).rglob('*')}


@pytest.mark.parametrize('step', [1, 6, 9, 12])
def test_replay(step, trained, capsys):
  """The mean of what is shown is the loss that was logged; the first step, one right behind a
  checkpoint, one in between and the last. Nothing in the workdir changes."""
  before = files(trained)
  run_diffax.door('--workdir', trained, '--mode=replay', '--step', step)
  lines = capsys.readouterr().out.splitlines()
  assert files(trained) == before
  assert ('training again' in lines[0]) == (step not in (1, 6))
  names, *rows = lines[-33:]
  assert {'example', 'loss', 'noise', 't', 'record'} <= set(names.split())
  rows = [row.split(maxsplit=4) for row in rows]
  logged = {row['step']: row['loss'] for row in run_diffax.numbers(trained)}[step]
  losses = [float(row[1]) for row in rows]
  assert sorted(int(row[0]) for row in rows) == list(range(32))
  assert losses == sorted(losses, reverse=True)
  assert np.mean(losses) == pytest.approx(logged, rel=1e-3)  # four digits are shown
  assert all(float(r[2]) == pytest.approx(float(r[3]) / (1 - float(r[3])), rel=2e-2, abs=1e-3)
             for r in rows)  # sigma / alpha of the linear schedule
  assert all(row[4].startswith('digits/train record ') for row in rows)

  config = json.loads((trained / 'config.json').read_text())
  run = train.setup(main.configs._plain(config))
  _, exact, _ = replay.replay(run, epath.Path(trained), step, show=lambda _: None)
  assert exact.mean() == pytest.approx(logged, rel=1e-6)


# --- sampling -------------------------------------------------------------------------------------


@pytest.fixture
def sampled(trained, tmp_path, capsys):
  """A function of overrides of `sample`: images and labels drawn, from a copy of the run."""
  workdir = tmp_path / 'run'
  workdir.mkdir()
  shutil.copy(trained / 'config.json', workdir)
  os.symlink(trained / 'checkpoints', workdir / 'checkpoints')

  def draw(*arguments):
    extra = [a if a.startswith('--') else f'--config.sample.{a}' for a in arguments]
    run_diffax.door('--workdir', workdir, '--mode=sample', *extra)
    assert capsys.readouterr().out.split() == [
      str(workdir / 'samples.npz'), str(workdir / 'samples.png')]
    with np.load(workdir / 'samples.npz') as file:
      assert set(file) == {'arr_0', 'arr_1'}
      return file['arr_0'], file['arr_1']

  draw.workdir = workdir
  return draw


def near(a, b):
  """The same pictures, but for a grey level of rounding."""
  return a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1


def test_sample(sampled):
  images, labels = sampled('count=20')
  assert images.dtype == np.uint8 and images.shape == (20, 8, 8, 1)
  np.testing.assert_array_equal(labels, np.arange(20) % 10)
  assert Image.open(sampled.workdir / 'samples.png').size[0] >= 10 * 32

  few, _ = sampled('count=7')
  more, _ = sampled('count=19', 'batch_size=16')  # a full batch, and what is left
  more = more[:7]
  assert near(few, images[:7]) and near(more, images[:7])  # sample k is sample k

  other, _ = sampled('count=7', 'seed=1')
  assert not near(other, few)
  again, _ = sampled('count=7')
  np.testing.assert_array_equal(again, few)


def test_sample_labels(sampled):
  images, labels = sampled('count=8', 'labels=3')
  np.testing.assert_array_equal(labels, [3] * 8)
  _, labels = sampled('count=5', 'labels=0,1')
  np.testing.assert_array_equal(labels, [0, 1, 0, 1, 0])


def test_sample_of_which_weights(sampled, trained):
  """The last average unless another, or none, is asked for; the newest checkpoint or that named."""
  default, _ = sampled()
  named, _ = sampled('ema=0.995')
  none, _ = sampled('ema=none')
  early, _ = sampled('--step=5')
  newest, _ = sampled('--step=12')
  np.testing.assert_array_equal(default, named)
  np.testing.assert_array_equal(default, newest)
  assert not near(default, none) and not near(default, early)

  run = run_diffax.setup(count=8)  # the same by hand
  _, found = checkpoint.load(trained / 'checkpoints', 5, {'ema': run.like.ema})
  from diffax import sample
  with run_diffax.devices(8):
    pictures, _ = sample.drawer(run, run.config['sample'], 'sample')(
      run.like.replace(ema=found['ema']), 8)
  assert near(pictures, early)


def test_sample_overrides(sampled):
  """Another sampler, more steps, guidance: each is heeded, with the same noise."""
  default, _ = sampled()
  for override in ('sampler.name=ddim', 'sampler.steps=2', 'sampler.grid=karras', 'guidance=4.'):
    assert not np.array_equal(sampled(override)[0], default), override
  nowhere, _ = sampled('guidance=4.', 'interval=1000.,2000.')  # levels the grid never visits
  assert near(nowhere, default)


# --- a step that is not finite --------------------------------------------------------------------


def spoiled(threshold: float):
  """A weighting that is NaN at large times, as a user's own may be."""
  return lambda prediction, level: jnp.where(level.t > threshold, jnp.nan, 1.0)


def test_not_finite(tmp_path, capfd):
  """Status 1, what and where, and a command that shows it again; nothing of it is kept."""
  run = run_diffax.setup(count=8)
  empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), run.like.params)
  first = {'image': np.zeros((32, 8, 8, 1)), 'label': np.zeros(32, int)}
  drawn = jax.jit(lambda step: run.task.loss(
    empty, run.like, first, train.example_keys(0, step, 32))[1]['t'])
  times = [np.asarray(drawn(step)) for step in range(20)]
  assert len(np.unique(times)) > 600  # each step draws anew
  highest = [t.max() for t in times]
  bad = next(s for s in range(7, 20) if highest[s] > max(highest[:s]))  # steps counted from 0
  threshold = float(np.float32((highest[bad] + max(highest[:bad])) / 2))
  rows = np.flatnonzero(times[bad] > threshold)

  workdir = tmp_path / 'run'
  command = [CONFIG, '--workdir', workdir, '--config.loss.weight=test_main.spoiled',
             f'--config.loss.weight.threshold={threshold!r}', '--config.save_every=1',
             '--config.keep.last=99']
  with pytest.raises(SystemExit) as end:
    run_diffax.door(*command)
  assert end.value.code == 1
  said = capfd.readouterr().err
  assert f'error: step {bad + 1}: {len(rows)} of 32 losses are not finite' in said
  for row in rows:
    t = times[bad][row]
    assert f'example {row}: digits/train record ' in said
    assert f'noise {t / (1 - t):.3g}'[:9] in said and f't={t:.4g}' in said
  assert checkpoint.present(workdir / 'checkpoints') == list(range(1, bad + 1))
  assert [r['step'] for r in run_diffax.numbers(workdir)] == [s for s in (5, 10, 15) if s <= bad]

  hint = shlex.split(said.partition('look again: ')[2].splitlines()[0])
  assert hint[:3] == ['python', '-m', 'diffax.main']
  run_diffax.door(*hint[3:])
  shown = capfd.readouterr().out.splitlines()[-32:]
  assert {int(line.split()[0]) for line in shown if line.split()[1] == 'nan'} == set(rows)


@pytest.mark.parametrize('step, rows, asked, status', [
  (12, [('grid', 12)], '75', None),
  (12, [('grid', 12)], None, None),
  (7, [('grid', 5)], None, None),
  (7, [('grid', 5)], '75', 75),
  (12, [('grid', 5)], '75', 75),  # a signal came during the last evaluation
  (12, [], '75', 75),
])
def test_stop_status(step, rows, asked, status, tmp_path, monkeypatch):
  """A run that is not done says so by its exit status, where the environment asks for one."""
  def stand_in(run, workdir, *others):
    text = ''.join(json.dumps(dict(step=at, eval=name)) + '\n' for name, at in rows)
    (workdir / 'evals.jsonl').write_text(text)
    return run.like.replace(step=jnp.asarray(step))

  monkeypatch.setattr(train, 'train', stand_in)
  if asked:
    monkeypatch.setenv('DIFFAX_STOP_STATUS', asked)
  command = (CONFIG, '--workdir', tmp_path / 'run', *STEPS, '--config.evals.grid=grid',
             '--config.evals.grid.every=5')
  if status is None:
    run_diffax.door(*command)
  else:
    with pytest.raises(SystemExit) as end:
      run_diffax.door(*command)
    assert end.value.code == status


@pytest.mark.parametrize('asked', ['no', '-1', '256', '²'])
def test_stop_status_that_is_none(asked, tmp_path, monkeypatch, capfd, no_compiling):
  monkeypatch.setenv('DIFFAX_STOP_STATUS', asked)
  assert asked in mistake(capfd, CONFIG, '--workdir', tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
