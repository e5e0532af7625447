"""The recipe beside the same network trained by a plain PyTorch loop: twin.py, of the same config.

  python -m diffax.main --config configs/cifar10_edm.py:cpu --workdir runs/cifar10_cpu
  python experiments/cifar10_edm/compare.py parity
  python experiments/cifar10_edm/compare.py train --workdir runs/cifar10_cpu
  python experiments/cifar10_edm/compare.py expect --workdir runs/cifar10_cpu
  python experiments/cifar10_edm/compare.py judge --workdir runs/cifar10_cpu
  python experiments/cifar10_edm/compare.py speed --out speed.json

parity  The two are one network and one training: on weights drawn by numpy, outputs, losses and
        gradients agree, so do the learning rates and decays of every step, and on the same draws
        the losses of fifty steps and where they lead. Exit code 1 where they do not.
train   Trains the twin on as many images as the newest checkpoint of the workdir has seen, or as
        one of --step will have, into WORKDIR/twin.
expect  Both draw batches, levels and noise as in training and tell the mean loss of the twin's
        weights, which stay: what differs in data or draws would show. Exit code 1 beyond 4 sigma.
judge   Puts the twin's averaged weights in diffax's place and carries out the config's evaluations
        on both, with the same code, seeds and counts; writes results.json, table.md, loss.png and
        samples.png to --out (WORKDIR/comparison).
speed   Training steps of both on one batch, turn by turn, beside a product of matrices in each.

PyTorch may live in another environment: --torch-python PATH, or DIFFAX_TORCH. Where a command takes
--config, any of its values is set by --config.PATH=VALUE, as in `diffax.main`.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile

import turns

from diffax import checkpoint
from diffax import config as configs
from diffax import evaluate
from diffax import images
from diffax import log
from diffax import references
from diffax import sample
from diffax import train
from diffax.build import build, ConfigError
from diffax.models import unet
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
RECIPE = HERE.parents[1] / 'configs' / 'cifar10_edm.py'
NAMES = ('diffax', 'torch')
TOLERANCE = {
  'output': 1e-5, 'losses': 1e-5, 'gradient': 1e-3, 'rates': 1e-5, 'decays': 1e-5, 'course': 1e-3,
  'moved': 1e-2,
}
UPDATES = 50  # steps of training that parity compares

# What the twin is: of a config that says otherwise, it would be another network or objective.
DESIGN = dict(
  heads=1, head_width=0, decoder_attention='last', middle_attention=True, adaptive=False,
  resample='block', taps=(1, 1), project=True, rescale=True, time='sinusoidal', endpoint=True,
  progressive_in='none', progressive_out='none', text=0, image=0, mask=False, remat='dots_saveable',
  dtype=jnp.dtype('float32'),
)
PARTS = {
  'task.name': 'generate', 'task.self_condition': 0.0, 'accumulate': 1, 'schedule.name': 'edm',
  'prediction.name': 'edm', 'loss.time.name': 'log_normal', 'loss.weight.name': 'edm',
  'loss.distance.name': 'squared', 'loss.coupling.name': 'independent',
  'loss.draw.name': 'independent', 'loss.importance': 0, 'loss.perturb': 0.0,
  'loss.uncertainty': 0, 'data.size': 0, 'optimizer.name': 'adam', 'optimizer.unit_kernels': '',
  'optimizer.eps_root': 0.0, 'optimizer.nesterov': False,
  'learning_rate.name': 'warmup_cosine_decay_schedule', 'learning_rate.exponent': 1.0,
}


# --- one source of truth --------------------------------------------------------------------------


def spec(run, steps):
  """What the twin is to be, plain data, of a `train.Run`. Raises ConfigError for what it is not."""
  config = run.config
  for path, want in PARTS.items():
    found = config
    for key in path.split('.'):
      found = found[key]
    if found != want:
      raise ConfigError(f'config.{path}={found!r}: the twin is written for {want!r} alone')
  design = build('diffax.models', config['model'], path='model').design
  if not isinstance(design, unet.Design):
    raise ConfigError(f'config.model.name={config["model"]["name"]!r}: the twin is a ddpmpp')
  for name, want in DESIGN.items():
    if getattr(design, name) != want:
      raise ConfigError(f'config.model: {name}={getattr(design, name)!r}, the twin has {want!r}')
  average = sample.last(run.like)
  if average == 'none' or average.startswith('power'):
    raise ConfigError(f'config.ema={config["ema"]}: the twin keeps one average, of a decay')
  if config['loss']['weight']['sigma_data'] != config['prediction']['sigma_data']:
    raise ConfigError('config.loss.weight.sigma_data is not that of config.prediction')
  adam, law, schedule = config['optimizer'], config['loss']['time'], config['schedule']
  sizes = ('width', 'multipliers', 'blocks', 'attention', 'embedding', 'classes', 'dropout',
           'groups', 'eps')
  return {
    **{name: getattr(design, name) for name in sizes},
    'size': run.source.shape[0], 'channels': run.source.shape[-1],
    'mean': law['mean'], 'std': law['std'],
    'sigma_min': schedule['sigma_min'], 'sigma_max': schedule['sigma_max'],
    'sigma_data': config['prediction']['sigma_data'],
    'time_scale': config['prediction']['time_scale'],
    'drop_cond': config['task']['drop_cond'], 'flip': config['data']['flip'],
    'b1': adam['b1'], 'b2': adam['b2'], 'adam_eps': adam['eps'], 'clip': adam['clip'],
    'rate': {k: v for k, v in config['learning_rate'].items() if k not in ('name', 'exponent')},
    'ema': float(average), 'seed': config['seed'], 'batch_size': config['batch_size'],
    'log_every': config['log_every'], 'steps': steps,
  }


def to_diffax(weights, like):
  """The twin's weights by name as the tree of parameters `like`, whose blocks in a row are stacked.

  Raises ValueError where one is missing, left over or of another shape.
  """
  used = set()

  def tensor(name):
    used.add(name)
    if name not in weights:
      raise ValueError(f'the twin has no {name}')
    return weights[name]

  def leaf(path, wanted):
    *modules, kind = [key.key for key in path]
    row = re.fullmatch(r'(.*_block)(\d+)to(\d+)', modules[0])
    if row:
      numbers = range(int(row[2]), int(row[3]) + 1)
      blocks = [[f'{row[1]}{i}', *modules[1:]] for i in numbers]
      found = np.stack([one(tensor, modules, kind) for modules in blocks])
    else:
      found = one(tensor, modules, kind)
    if found.shape != wanted.shape:
      raise ValueError(f'{"/".join(modules)}: {found.shape} of the twin for {wanted.shape}')
    return found

  tree = jax.tree_util.tree_map_with_path(leaf, like)
  if set(weights) - used:
    raise ValueError(f'left over of the twin: {", ".join(sorted(set(weights) - used))}')
  return tree


def one(tensor, modules, kind):
  """The twin's tensor for a leaf of diffax's; modules: its path, kind: its own name."""
  first, last = modules[0], modules[-1]
  if first == 'embedding':
    name = last
  elif first in ('decoder0_norm', 'decoder0_out'):
    name = first.removeprefix('decoder0_')
  elif first == 'conv_in':
    name = first
  else:
    part = re.match(r'encoder|middle|decoder', first)[0]
    name = '.'.join([part, *modules])
  if last in ('query', 'key', 'value'):
    name = name.removesuffix(last) + 'qkv'
  found = tensor(f'{name}.{"bias" if kind == "bias" else "weight"}')
  if last in ('query', 'key', 'value'):
    found = np.split(found, 3)[('query', 'key', 'value').index(last)]
  if kind == 'kernel':  # [out in ...] -> [... in out]
    found = np.moveaxis(found, (0, 1), (-1, -2))
  return found


# --- the other program ----------------------------------------------------------------------------


def check_torch(path):
  """Raises ConfigError where `path` is no python that has torch."""
  remedy = 'pip install torch there, or name another: --torch-python PATH, or DIFFAX_TORCH'
  find = 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
  try:
    lacks = subprocess.run([path, '-c', find]).returncode
  except OSError as error:
    raise ConfigError(f'--torch-python={path}: {error.strerror}; {remedy}') from error
  if lacks:
    raise ConfigError(f'--torch-python={path} has no torch: {remedy}')


def twin(args, command, spec_file, data, *more):
  """The command line of a command of twin.py."""
  return [
    args.torch_python, str(HERE / 'twin.py'), command, f'--spec={spec_file}', f'--data={data}',
    f'--threads={args.threads}', *more,
  ]


def call(command):
  """Runs it. Raises ConfigError where it fails, having said why itself."""
  status = subprocess.run(command).returncode
  if status:
    raise ConfigError(f'twin.py ended with status {status}; its error is above')


def save(file, **arrays):
  """Writes a .npz, whole or not at all."""
  scratch = file.parent / f'{file.name}.new'
  with scratch.open('wb') as out:
    np.savez(out, **arrays)
  scratch.replace(file)
  return file


def of_config(args):
  """The `train.Run` of --config with its overrides."""
  return train.setup(configs.override(configs.load(args.config), args.overrides))


def of_workdir(args):
  """(run, --step or that of the newest checkpoint, workdir) of --workdir. Raises ConfigError."""
  workdir = epath.Path(args.workdir)
  if not (workdir / 'config.json').exists():
    raise ConfigError(
      f'--workdir={workdir} holds no run: train one there with python -m diffax.main '
      '--config configs/cifar10_edm.py:cpu --workdir'
    )
  config = configs.override(configs.read(workdir / 'config.json'), args.overrides)
  steps = checkpoint.present(workdir / 'checkpoints')
  if not args.step and not steps:
    raise ConfigError(f'--workdir={workdir} has no checkpoint yet: train it first, or say --step')
  return train.setup(config), args.step or steps[-1], workdir


# --- parity ---------------------------------------------------------------------------------------


def parity(args):
  """The largest differences of the two on the same weights and draws; see the module's text."""
  run = of_config(args)
  made = spec(run, run.config['steps']) | {'updates': UPDATES}
  if made['dropout']:
    raise ConfigError('parity is of networks without chance: say --config.model.dropout=0')
  given = draws(run, made, 4)
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / 'spec.json').write_text(json.dumps(made))
    files = folder / 'spec.json', save(folder / 'given.npz', **given)
    call(twin(args, 'answers', *files, f'--out={folder / "twin.npz"}'))
    with np.load(folder / 'twin.npz') as held:
      theirs = dict(held)
  trees = {
    part: {k.removeprefix(f'{part}/'): theirs.pop(k) for k in list(theirs) if k.startswith(part)}
    for part in ('gradient', 'moved')
  }
  rest = {k: theirs.pop(k) for k in ('output', 'losses', 'rates', 'decays', 'course')}
  like = run.like.params['net']
  ours = answers(run, given, jax.tree.map(jnp.asarray, to_diffax(theirs, like)))
  rest |= {part: to_diffax(tree, like) for part, tree in trees.items()}
  found = {name: difference(ours[name], rest[name]) for name in TOLERANCE if name != 'moved'}
  found['moved'] = apart(ours['moved'], rest['moved'])
  size = sum(leaf.size for leaf in jax.tree.leaves(like))
  print(f'{size} parameters on either side; largest difference in parts of the largest value:')
  for name, gap in found.items():
    print(f'  {name:10} {gap:.1e}   of at most {TOLERANCE[name]:.0e}')
  return int(any(not gap <= TOLERANCE[name] for name, gap in found.items()))


def draws(run, made, count):
  """Inputs of both, float32, from seed 0: images, noise and its levels, times and labels."""
  rng = np.random.default_rng(0)
  shape = (count, *run.source.shape)
  u = rng.uniform(size=count).astype('f4')
  schedule = build('diffax.schedules', run.config['schedule'], path='schedule')
  law = build('diffax.times', run.config['loss']['time'], schedule, path='loss.time')
  return {
    'x': rng.standard_normal(shape).astype('f4'),
    'image': rng.uniform(-1, 1, shape).astype('f4'),
    'eps': rng.standard_normal(shape).astype('f4'),
    'u': u,
    'sigma': np.asarray(schedule(law(u)).nsr, 'f4'),
    't': np.linspace(-300, 200, count, dtype='f4'),  # clock of the levels that count, in 1000ths
    'label': np.arange(made['classes'] + 1)[-count:].astype('i4'),  # the null label, too
  }


def answers(run, given, net):
  """What the twin's `answers` writes, of diffax."""
  task = dict(run.config['task'], drop_cond=0.0)
  loss = build('diffax.tasks', task, {**run.config, 'task': task}, run.source, path='task').loss
  model = build('diffax.models', run.config['model'], path='model')
  keys = train.example_keys(0, 0, len(given['x']))
  batch = {name: given[name] for name in ('image', 'eps', 'u', 'label')}
  told = {'label': given['label']} if run.config['model']['classes'] else {}
  output = jax.jit(lambda net: model.apply({'params': net}, given['x'], given['t'], told))(net)

  def mean(params):
    each, _ = loss(params, run.like, batch, keys)
    return each.mean(), each

  (_, each), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))({'net': net})
  course, moved = trained(run, loss, batch, net)
  steps = np.arange(run.config['steps'])
  decay = float(sample.last(run.like))
  return {
    'output': output, 'losses': each, 'gradient': gradient['net'],
    'rates': jax.vmap(run.rate)(steps), 'decays': np.minimum(decay, (1 + steps) / (10 + steps)),
    'course': course, 'moved': moved,
  }


def trained(run, loss, batch, net):
  """Losses of `UPDATES` steps as the loop takes them, and how far the average went from `net`."""
  config = run.config | {'batch_size': len(batch['image']), 'log_every': 1, 'accumulate': 1}
  step, params = jax.jit(train.make_step(loss, run.tx, run.rate, config)), {'net': net}
  state = train.init(run)
  state = state.replace(params=params, ema={sample.last(run.like): params})
  course = []
  for k in range(UPDATES):  # the noise of another image each time
    rolled = {name: np.roll(batch[name], k, 0) for name in ('eps', 'u')}
    state, metrics = step(state, batch | rolled)
    course.append(float(metrics['loss']))
  return np.array(course), jax.tree.map(lambda x, y: x - y, sample.choose(state, '')['net'], net)


def apart(ours, theirs):
  """The length of the difference in parts of the length of the whole, all leaves as one vector."""
  length = lambda tree: sum(float((np.asarray(x) ** 2).sum()) for x in jax.tree.leaves(tree)) ** 0.5
  return length(jax.tree.map(lambda x, y: np.asarray(x) - y, ours, theirs)) / length(theirs)


def difference(ours, theirs):
  """The largest |ours - theirs| of a leaf in parts of its largest value.

  Or of 1e-4 of the largest of all: the gradient of a key's bias is 0 but for rounding.
  """
  least = 1e-4 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
  gap = lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), least)
  return float(max(jax.tree.leaves(jax.tree.map(gap, ours, theirs))))


# --- training and judging -------------------------------------------------------------------------


def train_twin(args):
  """Trains the twin beside a run; see the module's text."""
  run, step, workdir = of_workdir(args)
  made = spec(run, step)
  out = workdir / 'twin'
  out.mkdir(parents=True, exist_ok=True)
  (out / 'spec.json').write_text(json.dumps(made, indent=2) + '\n')
  data = out / 'images.npz'
  if not data.exists():
    image, label = references.images(run.source, np.arange(len(run.source)), 0)
    save(data, image=image, label=label)
  call(twin(args, 'train', out / 'spec.json', data, f'--out={out}'))
  print(out / 'weights.npz')


def expect(args):
  """The mean loss of one network, the twin's, as each side draws its batches and noise."""
  run, step, workdir = of_workdir(args)
  out, seed, count = workdir / 'twin', run.config['seed'] + 1, args.batches
  with tempfile.TemporaryDirectory() as folder:
    told = epath.Path(folder) / 'spec.json'
    configs.write(told, json.dumps(spec(run, count)))
    call(twin(args, 'expect', told, out / 'images.npz', f'--out={out}'))
  with np.load(out / 'expected.npz') as held:
    theirs = held['losses'], held['sigma']
  run = run._replace(config=run.config | {'seed': seed})
  with np.load(out / 'weights.npz') as held:
    params = {'net': to_diffax(dict(held), run.like.params['net'])}
  losses = jax.jit(lambda batch, keys: run.task.loss(params, run.like, batch, keys))
  data, found = train.batches(run, 0), []
  for k in range(count):
    batch = {name: x for name, x in next(data).items() if name != 'index'}
    each, info = losses(batch, train.example_keys(seed, k, run.config['batch_size']))
    found.append(np.stack([each, info['noise']]))
  data.close()
  return told_apart(dict(zip(NAMES, (np.concatenate(found, 1), theirs))))


def told_apart(drawn, bins=100):
  """Prints means of each side's (losses, levels); 1 where they are further apart than chance goes.

  What a loss owes to its level is taken out, the mean of both sides' losses of like levels, else it
  would be most of the chance.
  """
  loss, sigma = (np.concatenate([drawn[side][i] for side in NAMES]) for i in (0, 1))
  edges = np.quantile(sigma, np.linspace(0, 1, bins + 1)[1:-1])
  where = np.searchsorted(edges, sigma)
  typical = np.bincount(where, loss) / np.bincount(where)
  rest = np.split((loss - typical[where]).astype('f8'), [len(drawn[NAMES[0]][0])])
  spread = np.hypot(*(x.std() / len(x) ** 0.5 for x in rest))
  for side in NAMES:
    each, level = drawn[side]
    print(f'{side:8} loss {each.mean():.5f}, of {len(each)} images at levels of '
          f'{np.log(level).mean():.4f}, {np.log(level).std():.4f} (mean and deviation of the log)')
  gap = rest[0].mean() - rest[1].mean()
  print(f'at like levels {gap / loss.mean():+.2%}, {abs(gap) / spread:.1f} standard errors')
  return int(abs(gap) > 4 * spread)


def judge(args):
  """Both by the same evaluations; see the module's text."""
  run, step, workdir = of_workdir(args)
  weights = workdir / 'twin' / 'weights.npz'
  if not weights.exists():
    raise ConfigError(f'{weights} is not there: train the twin with compare.py train --workdir')
  made = json.loads((workdir / 'twin' / 'spec.json').read_text())
  want = json.loads(json.dumps(spec(run, step)))
  changed = [k for k in want if want[k] != made.get(k)]
  if changed:
    why = '; '.join(f'{k}: {made.get(k)} -> {want[k]}' for k in changed)
    raise ConfigError(f'{workdir / "twin"} was trained as another ({why}): train it again')
  used = sample.last(run.like)
  _, state = sample.restore(run, workdir, step, [used])
  with np.load(weights) as held:
    net = to_diffax(dict(held), run.like.params['net'])
  place = jax.tree.map(lambda x: x.sharding, run.like.ema[used])
  other = state.replace(ema={used: jax.device_put({'net': net}, place)})
  states = {'diffax': state, 'torch': other}
  found, pictures = evaluated(run, states, step, workdir / 'comparison', args.evals)
  results = {
    'command': ' '.join(['python', 'experiments/cifar10_edm/compare.py', *sys.argv[1:]]),
    'step': step,
    'images': step * run.config['batch_size'],
    'training': histories(workdir),
    'metrics': found,
    'config': run.config,
  }
  out = epath.Path(args.out or workdir / 'comparison')
  write(out, results, pictures)


def evaluated(run, states, step, scratch, names):
  """({metric: {side: value}}, {name: picture, one beside the other}) of the evaluations named."""
  found, pictures = {}, {}
  for name, evaluation in evaluate.entries(run, names).items():
    if run.config['evals'][name].get('ema'):
      raise ConfigError(f'config.evals.{name}.ema: the twin has the last average alone; leave it')
    for side in NAMES:
      print(f'{name} of {side}', flush=True)
      folder = scratch / side
      for key, value in evaluate.carry_out(name, evaluation, states[side], step, folder):
        kept = pictures if np.ndim(value) == 3 else found
        kept.setdefault(key, {})[side] = value if np.ndim(value) == 3 else float(value)
  return found, {key: beside(*(both[side] for side in NAMES)) for key, both in pictures.items()}


def beside(left, right, gap=24):
  """Two pictures [h w c], white between them."""
  return np.concatenate([left, np.full((len(left), gap, left.shape[-1]), 255, np.uint8), right], 1)


def histories(workdir):
  """{side: steps, losses and the median rate} of what the two programs logged."""
  files = {'diffax': workdir / 'metrics.jsonl', 'torch': workdir / 'twin' / 'log.jsonl'}
  rows = {side: log.read_metrics(file) for side, file in files.items()}
  return {
    side: {
      'images_per_second': statistics.median(row['images_per_second'] for row in told),
      'step': [row['step'] for row in told],
      'loss': [row['loss'] for row in told],
    }
    for side, told in rows.items() if told
  }


def write(out, results, pictures):
  """results.json, table.md, loss.png and the pictures, into `out`."""
  out.mkdir(parents=True, exist_ok=True)
  configs.write(out / 'results.json', json.dumps(results, indent=1) + '\n')
  configs.write(out / 'table.md', table(results))
  loss_plot(out / 'loss.png', results)
  for key, picture in pictures.items():
    images.save(out / f'{key.replace("/", "_")}.png', picture)
  print((out / 'table.md').read_text(), *sorted(out.glob('*.*')), sep='\n')


def table(results):
  """Markdown: a metric a row, both sides and their ratio, and that of real images where known."""
  metrics = results['metrics']
  lines = [
    f'{results["images"]} images seen by either; the averaged weights, the same evaluations.', '',
    '| | diffax | PyTorch | ratio | held-out images |', '| --- | --- | --- | --- | --- |',
  ]
  for key, value in metrics.items():
    if key.endswith('_real') and key.removesuffix('_real') in metrics:
      continue
    ours, theirs = (value[side] for side in NAMES)
    real = metrics.get(f'{key}_real', {}).get('diffax')
    ratio = f'{ours / theirs:.3f}' if theirs else ''
    real = '' if real is None else f'{real:.4g}'
    lines.append(f'| {key} | {ours:.4g} | {theirs:.4g} | {ratio} | {real} |')
  return '\n'.join(lines) + '\n'


def loss_plot(path, results):
  """Left the loss in training, right the held-out loss by noise level, of both."""
  import io
  from matplotlib.figure import Figure

  levels = {key: re.fullmatch(r'\w+/loss_([\d.e+-]+)', key) for key in results['metrics']}
  levels = {key: float(found[1]) for key, found in levels.items() if found}
  figure = Figure(figsize=(9, 3.6), layout='constrained')
  left, right = figure.subplots(1, 2)
  for side, style in zip(NAMES, ('-', '--')):
    told = results['training'].get(side)
    if told:
      left.plot(told['step'], told['loss'], style, lw=1, label=side)
    values = [results['metrics'][key][side] for key in levels]
    right.plot(list(levels.values()), values, style, marker='o', ms=4, label=side)
  left.set(xlabel='step', ylabel='loss in training', yscale='log')
  right.set(xlabel='noise level sigma', ylabel='held-out loss', xscale='log')
  for axes in (left, right):
    axes.grid(alpha=0.3, which='both')
    axes.legend(frameon=False)
  data = io.BytesIO()
  figure.savefig(data, format='png', dpi=120)
  path.write_bytes(data.getvalue())


# --- speed ----------------------------------------------------------------------------------------


def ours(args):
  """diffax's side of `speed`: the step as the training loop compiles it, on one batch."""
  turns.pin(args.threads)
  sys.path.insert(0, str(HERE.parent / 'throughput'))
  import ours as program

  with np.load(args.data) as held:
    image, label = held['image'], held['label']
  batch = {'image': (image / 127.5 - 1).astype('f4'), 'label': label.astype('i4')}
  advance, facts = program.running(of_config(args), batch)
  turns.serve(facts, advance, program.product, args.steps)


def speed(args):
  """Turn by turn; see the module's text."""
  run = of_config(args)
  made = spec(run, run.config['steps'])
  rng, count = np.random.default_rng(0), made['batch_size']
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / 'spec.json').write_text(json.dumps(made))
    image = rng.integers(0, 256, (count, *run.source.shape), np.uint8)
    label = rng.integers(0, max(made['classes'], 1), count)
    data = save(folder / 'batch.npz', image=image, label=label)
    more = [f'--data={data}', f'--steps={args.steps}', f'--threads={args.threads}']
    own = [sys.executable, str(HERE / 'compare.py'), 'ours', *more, f'--config={args.config}']
    commands = {
      'diffax': [*own, *args.overrides],
      'torch': twin(args, 'serve', folder / 'spec.json', data, f'--steps={args.steps}'),
    }
    sides = {name: turns.Side(command, args.threads) for name, command in commands.items()}
  counts = {name: side.facts['parameters'] for name, side in sides.items()}
  if len(set(counts.values())) > 1:
    raise ConfigError(f'the two nets differ in size: {counts}')
  told = {name: {'train': [], 'matmul': []} for name in NAMES}
  for turn in range(args.turns):
    for name in NAMES if turn % 2 else NAMES[::-1]:  # neither always follows the other
      for what in ('train', 'matmul'):
        told[name][what].append(sides[name].ask(what))
  for side in sides.values():
    side.end()
  report(args, run, {name: side.facts for name, side in sides.items()}, told)


def report(args, run, facts, told):
  """Prints the figures of `speed`, and writes them to --out."""
  count, gigaflop = run.config['batch_size'] * args.steps, facts['torch']['flop_an_image'] / 1e9
  result = {
    'command': ' '.join(['python', 'experiments/cifar10_edm/compare.py', *sys.argv[1:]]),
    'model': run.config['model'],
    'parameters': facts['torch']['parameters'],
    'gigaflop_an_image': gigaflop,
    'batch': run.config['batch_size'], 'threads': args.threads, 'turns': args.turns,
    'steps_a_turn': args.steps, 'load': os.getloadavg()[0],
    'machine': f'{turns.processor()}, python {platform.python_version()}',
  }
  print(f'{result["parameters"]} parameters, {gigaflop:.2f} GFLOP an image; batch '
        f'{result["batch"]}, {args.threads} threads; median (range) of {args.turns} turns')
  for name in NAMES:
    rates = [count / turn['seconds'] for turn in told[name]['train']]
    products = [2 * turns.ROWS**3 / turn['seconds'] / 1e9 for turn in told[name]['matmul']]
    shares = [rate * gigaflop / product for rate, product in zip(rates, products)]
    row = result[name] = {
      'version': facts[name]['version'],
      'images_a_second': turns.spread(rates),
      'cpu_seconds_an_image': turns.spread(
        [turn['cpu_seconds'] / count for turn in told[name]['train']]
      ),
      'matmul_gflops': turns.spread(products),
      'share_of_matmul': turns.spread(shares),
    }
    shown = [f'{key} {v["median"]:.4g} ({v["min"]:.4g} to {v["max"]:.4g})'
             for key, v in row.items() if key != 'version']
    print(f'{name:7} {"; ".join(shown)}')
  rates = ([turn['seconds'] for turn in told[name]['train']] for name in NAMES)
  result['ratio_diffax_to_torch'] = turns.spread([b / a for a, b in zip(*rates)])
  print('diffax / torch by turns: {median:.2f} ({min:.2f} to {max:.2f})'.format(
    **result['ratio_diffax_to_torch']))
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(result, indent=2) + '\n')


# --- the door -------------------------------------------------------------------------------------


COMMANDS = dict(
  parity=parity, train=train_twin, expect=expect, judge=judge, speed=speed, ours=ours,
)


def arguments(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
  )
  parser.add_argument('command', choices=COMMANDS)
  parser.add_argument('--config', default=f'{RECIPE}:cpu', help='parity, speed: FILE[:variant]')
  parser.add_argument('--workdir', help='train, expect, judge: of our run')
  parser.add_argument('--step', type=int, default=0, help='train, judge: of our run (newest)')
  python = os.environ.get('DIFFAX_TORCH') or sys.executable
  parser.add_argument('--torch-python', default=python, help='the python that has torch')
  parser.add_argument('--threads', type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument('--evals', nargs='*', default=(), help='judge: which of the config (all)')
  parser.add_argument('--batches', type=int, default=400, help='expect')
  parser.add_argument('--turns', type=int, default=11, help='speed')
  parser.add_argument('--steps', type=int, default=3, help='speed: a turn')
  parser.add_argument('--out', help='judge: a folder; speed: a json file')
  parser.add_argument('--data', help=argparse.SUPPRESS)
  args, args.overrides = parser.parse_known_args(argv)
  wrong = [a for a in args.overrides if not a.startswith('--config.')]
  if wrong:
    raise ConfigError(f'what is {wrong[0]!r}? see --help')
  if args.command in ('train', 'judge') and not args.workdir:
    raise ConfigError(f'{args.command} needs --workdir: that of a run of {RECIPE.name}')
  if not 1 <= args.threads <= len(os.sched_getaffinity(0)):
    raise ConfigError(f'--threads={args.threads}: 1 to {len(os.sched_getaffinity(0))} processors')
  if args.command in ('parity', 'train', 'speed'):
    check_torch(args.torch_python)
  return args


def main(argv=None):
  """Runs a command line; a user's mistake ends it with one line and exit status 2."""
  try:
    args = arguments(argv)
    return COMMANDS[args.command](args)
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2


if __name__ == '__main__':
  sys.exit(main())
