"""Sampling from a trained state, any count on any batch size, over the mesh."""

from functools import partial
import io
import json

import jax
import numpy as np

from diffax import casts
from diffax import checkpoint
from diffax import ema
from diffax import hosts
from diffax import images
from diffax import samplers
from diffax import sharding
from diffax.build import ConfigError, near
from diffax.convert import pipelines
from diffax.data import transforms


def choose(state, name):
  """The parameters to sample with: an average by its name, '' for the last, 'none' for none."""
  name = name or last(state)
  if name == 'none':
    return state.params
  if name not in state.ema:
    raise ConfigError(f'ema={name!r} was not kept; {near(name, [*state.ema, "none"])}')
  return sharding.on_device(state.ema[name])


def last(state):
  """The average to sample with where none is named."""
  return (list(state.ema) or ['none'])[-1]


def drawer(run, settings, path, drawing=None):
  """A function `(state, count, start=0) -> (x [count h w c], asked)`, compiled once.

  It draws the samples `start`, `start + 1`, ...: uint8, or float32 where they are latents. asked:
  {name: [count ...]}, what was asked of each (`tasks.Drawing`). settings: a `sample` section or
  evaluation of the config, `path` its place; drawing: the task's of them, where it is at hand.
  Raises ConfigError.
  """
  drawing = drawing or run.task.sample(settings, path)
  whole = lambda count: sharding.whole(count, run.mesh)
  used = settings['ema'] or last(run.like)
  generate, _ = program(run, settings, path, drawing)
  pictures = run.source.dtype == np.uint8 or drawing.decoded
  finish = transforms.to_uint8 if pictures else np.asarray

  def samples(state, count, start=0):
    """In batches of one size, so of one program; what is drawn beyond `count` is left out."""
    params, parts, asks = choose(state, used), [], []
    size = whole(min(settings['batch_size'], count))
    with run.layout():
      for i in range(start, start + count, size):
        index = np.arange(i, i + size, dtype=np.int32)
        asks.append(drawing.ask(index))
        x = sharding.fetch(generate(params, state.frozen, index, asks[-1]))
        parts.append(finish(x))
    join = lambda *xs: np.concatenate(xs)[:count]
    return join(*parts), jax.tree.map(join, *asks)

  return samples


def program(run, settings, path, drawing=None):
  """(generate, arguments): the jitted function that draws a batch, and what it is called with.

  Its arguments: parameters, what is frozen, the samples' numbers, what is asked of each; they are
  shapes, or small arrays. See `drawer`. Raises ConfigError.
  """
  if settings['batch_size'] < 1:
    raise ConfigError(f'config.{path}.batch_size={settings["batch_size"]} is less than 1')
  like = _like(run.like, settings['ema'] or last(run.like))
  drawing = drawing or run.task.sample(settings, path)
  batch = sharding.batch(run.mesh)

  @partial(sharding.jit, mesh=run.mesh)
  def generate(params, frozen, index, asked):
    lay = lambda x: jax.lax.with_sharding_constraint(x, batch)
    index, asked = lay(index), jax.tree.map(lay, asked)
    keys = samplers.sample_keys(settings['seed'], index)
    draw = casts.once(lambda held, *args: drawing.draw(*held, *args))
    return draw((params, frozen), keys, asked)

  index = np.arange(sharding.whole(settings['batch_size'], run.mesh), dtype=np.int32)
  arguments = like, run.like.frozen, index, drawing.ask(index)
  try:  # what only a look at the whole can tell, before any of it is compiled
    with run.layout():
      jax.eval_shape(generate, *arguments)
  except ConfigError:
    raise
  except (ValueError, TypeError) as error:
    raise ConfigError(f'config.{path}: {" ".join(str(error).split())}') from error
  return generate, arguments


def frozen(run):
  """What the run's task reads and never trains, on the mesh: {name: parameters}."""
  return {name: each.load(run.like.frozen[name]) for name, each in run.task.frozen.items()}


# --- which parameters -----------------------------------------------------------------------------


def restore(run, workdir, step, names):
  """(step, state) of a checkpoint, or of the newest where `step` is 0, to sample by `names` with.

  names: averages, '' the last, 'none' the parameters themselves. A power-function average of a
  width that was not kept is made of those that were (Karras et al. 2024, section 3). Of the state
  only what is asked for is read. Raises ConfigError.
  """
  names = {name or last(run.like) for name in names}
  kept, made = names & set(run.like.ema), names - {*run.like.ema, 'none'}
  for name in made:
    _like(run.like, name)
  ends = ema.powers(run.like.ema) if made else []  # at the checkpoint's own step
  averages = {name: run.like.ema[name] for name in sorted(kept | set(ends))}
  wanted = ({'params': run.like.params} if 'none' in names else {}) | (
    {'ema': averages} if averages else {}
  )
  step, found = checkpoint.load(workdir / 'checkpoints', step, wanted)
  read = found.get('ema', {})
  found['ema'] = read | {name: _made(run, workdir, step, name, read) for name in made}
  found['frozen'] = frozen(run)
  checkpoint.same(workdir / 'checkpoints', step, {'frozen': found['frozen']})
  return step, run.like.replace(**found)


def _made(run, workdir, step, name, ends):
  """The average `name` at `step`, of the snapshots until then and the checkpoint's own."""
  folder, kept = workdir / 'averages', ema.powers(run.like.ema)
  steps = [s for s in checkpoint.present(folder) if s < step]
  stored = [(s, power) for s in steps for power in kept] + [(step, power) for power in kept]
  read = lambda s, power: checkpoint.read(folder, s, {power: run.like.ema[power]})[power]
  trees = (ends[power] if s == step else read(s, power) for s, power in stored)
  widths = [(s, ema.width(power)) for s, power in stored]
  made = ema.reconstruct(trees, ema.weights(widths, (step, ema.width(name))))
  return jax.device_put(made, jax.tree.map(lambda x: x.sharding, run.like.params))


def _like(like, name):
  """What parameters `name` look like. Raises ConfigError where they can neither be had nor made."""
  if name == 'none' or name in like.ema:
    return choose(like, name)
  try:
    if ema.width(name) and ema.powers(like.ema):
      return like.params
  except ValueError as error:
    raise ConfigError(f'ema={name!r}: {error}') from error
  return choose(like, name)


def released(run, weights):
  """The state to sample from of a released model (`convert.pipelines`)."""
  kept, rest = frozen(run), dict(run.like.params)  # the smaller first: misfits show soon
  net = pipelines.net(weights, run.config['model'], rest.pop('net'))
  params = {'net': net, **pipelines.groups(weights, rest)}
  return run.like.replace(params=params, frozen=kept)


def sample(run, workdir, step, weights=''):
  """Writes samples.npz (`arr_0` NHWC, `arr_1` labels) and a grid of the first hundred; of prompts,
  a picture each into samples/, and samples.jsonl that says which is of which.

  step: of which checkpoint; 0 for the newest. weights: in place of one, a released model.
  Returns the paths written. Raises ConfigError.
  """
  settings = run.config['sample']
  if settings['count'] < 1:
    raise ConfigError(f'config.sample.count={settings["count"]} is less than 1')
  drawing = run.task.sample(settings, 'sample')
  draw = drawer(run, settings, 'sample', drawing)
  if weights:
    state = released(run, weights)
  else:
    _, state = restore(run, workdir, step, [settings['ema']])
  pictures, asked = draw(state, settings['count'])
  said = drawing.said(np.arange(len(pictures)))
  written = [workdir / 'samples.npz', workdir / 'samples.png']
  written += [workdir / 'samples.jsonl'] if said else []
  if hosts.first():
    data = io.BytesIO()
    np.savez(data, pictures, asked.get('label', np.zeros(len(pictures), np.int32)))
    written[0].write_bytes(data.getvalue())
    images.save(written[1], images.grid(images.shown(pictures[:100])))
    if said:
      _tell(workdir, images.shown(pictures), said)
  return written


def _tell(workdir, pictures, said):
  """A file each picture, and the prompts."""
  (workdir / 'samples').mkdir(exist_ok=True)
  names = [f'samples/{i:05d}.png' for i in range(len(pictures))]
  for name, picture in zip(names, pictures):
    images.save(workdir / name, picture)
  lines = [json.dumps(dict(file=n, caption=c), ensure_ascii=False) for n, c in zip(names, said)]
  (workdir / 'samples.jsonl').write_text('\n'.join(lines) + '\n')
