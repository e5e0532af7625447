"""Sampling from a trained state, any count on any batch size, over the mesh."""

import io

import jax
import jax.numpy as jnp
import numpy as np

from diffax import checkpoint
from diffax import images
from diffax import samplers
from diffax import sharding
from diffax.build import ConfigError, near
from diffax.data import transforms


def choose(state, name):
  """The parameters to sample with: an average by its name, '' for the last, 'none' for none."""
  name = name or _last(state)
  if name == 'none':
    return state.params
  if name not in state.ema:
    raise ConfigError(f'ema={name!r} was not kept; {near(name, [*state.ema, "none"])}')
  return state.ema[name]


def _last(state):
  return (list(state.ema) or ['none'])[-1]


def labels(wanted, index, classes):
  """A label for each sample index: 'balanced', or labels to take in turn, as '3' or '0,1,7'."""
  if wanted == 'balanced':
    return index % max(classes, 1)
  try:
    chosen = [int(label) for label in wanted.split(',')]
  except ValueError:
    chosen = [-1]
  if not classes or min(chosen) < 0 or max(chosen) >= classes:
    raise ConfigError(
      f"labels={wanted!r}: 'balanced', or labels of 0 to {classes - 1} with commas between"
      if classes
      else f"labels={wanted!r}: this model knows no labels; only 'balanced' is allowed"
    )
  return np.asarray(chosen)[index % len(chosen)]


def drawer(run, settings, path):
  """A function `(state, count) -> (uint8 [count h w c], labels int [count])`, compiled once.

  settings: a `sample` section or evaluation of the config, `path` its place. Raises ConfigError.
  """
  if settings['batch_size'] < 1:
    raise ConfigError(f'config.{path}.batch_size={settings["batch_size"]} is less than 1')
  whole = lambda n: -(-n // run.mesh.size) * run.mesh.size  # as many for each device
  labels(settings['labels'], np.arange(1), run.task.classes)
  choose(run.like, settings['ema'])
  draw = run.task.sample(settings, path)
  batch = sharding.batch(run.mesh)

  @jax.jit
  def generate(params, index, label):
    index, label = (jax.lax.with_sharding_constraint(a, batch) for a in (index, label))
    return draw(params, samplers.sample_keys(settings['seed'], index), label)

  try:  # what only a look at the whole can tell, before any of it is compiled
    number = jax.ShapeDtypeStruct((whole(settings['batch_size']),), jnp.int32)
    with sharding.using(run.mesh):
      jax.eval_shape(generate, choose(run.like, settings['ema']), number, number)
  except ConfigError:
    raise
  except (ValueError, TypeError) as error:
    raise ConfigError(f'config.{path}: {" ".join(str(error).split())}') from error

  def samples(state, count):
    """In batches of one size, so of one program; what is drawn beyond `count` is left out."""
    params, parts = choose(state, settings['ema']), []
    size = whole(min(settings['batch_size'], count))
    index = np.arange(-(-count // size) * size)
    label = labels(settings['labels'], index, run.task.classes)
    with sharding.using(run.mesh):
      for i in range(0, count, size):
        x = generate(
          params, jnp.asarray(index[i : i + size]), jnp.asarray(label[i : i + size], jnp.int32)
        )
        parts.append(transforms.to_uint8(np.asarray(x)))
    return np.concatenate(parts)[:count], label[:count]

  return samples


def sample(run, workdir, step):
  """Writes samples.npz (`arr_0` uint8 NHWC, `arr_1` labels) and a grid of the first hundred.

  step: of which checkpoint; 0 for the newest. Returns the paths written. Raises ConfigError.
  """
  settings = run.config['sample']
  if settings['count'] < 1:
    raise ConfigError(f'config.sample.count={settings["count"]} is less than 1')
  draw = drawer(run, settings, 'sample')
  used = settings['ema'] or _last(run.like)
  wanted = {'params': run.like.params} if used == 'none' else {'ema': {used: run.like.ema[used]}}
  _, found = checkpoint.load(workdir / 'checkpoints', step, wanted)
  pictures, label = draw(run.like.replace(**found), settings['count'])
  data = io.BytesIO()
  np.savez(data, pictures, label)
  (workdir / 'samples.npz').write_bytes(data.getvalue())
  shown = pictures[:100]
  images.save(workdir / 'samples.png', images.grid(shown))
  return workdir / 'samples.npz', workdir / 'samples.png'
