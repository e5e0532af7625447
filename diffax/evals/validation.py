"""Held-out loss by noise level: how well the network denoises images it was not trained on.

  loss(sigma) = lambda(sigma) |D(x) - x0|^2,   lambda = (sigma^2 + d^2) / (sigma d)^2

at levels sigma / alpha, for data of standard deviation d: Karras et al. 2022, table 1. Of whatever
schedule, prediction and weighting a network was trained with, its losses compare by it, and a
network that knows no more than the data's mean and deviation has 1 at each level.
"""

import jax.numpy as jnp
import numpy as np

from diffax import noises
from diffax import references
from diffax import sample
from diffax import samplers
from diffax import schedules
from diffax import sharding
from diffax.build import ConfigError
from diffax.data import transforms
from diffax.evals import Evaluation

GOLDEN = 0.6180339887498949  # multiples of it fill [0, 1) evenly, any number of them


def validation(
  run, path, count=1000, split='test', bins=10, low=0.01, high=50.0, sigma_data=0.5, ema='',
  seed=0, batch_size=250,
) -> Evaluation:
  """The mean over `count` images of a split in each of `bins` bins of noise level, and over all.

  low, high: where the levels sigma / alpha begin and end; bins are as wide as each other in their
  logarithm, and each image is seen once in each, at the schedule's nearest level where it does not
  reach so far. The noise is the same every time. sigma_data: d.
  """
  entry = path.rpartition('.')[2]
  for name, value, least in (('count', count, 1), ('bins', bins, 1), ('batch_size', batch_size, 1)):
    if value < least:
      raise ConfigError(f'config.{path}.{name}={value} is less than {least}')
  if not 0 < low < high:
    raise ConfigError(f'config.{path}: low={low}, high={high}: levels with 0 < low < high')
  if run.task.denoiser is None:
    raise ConfigError(f'config.{path}: the task {run.config["task"]["name"]!r} has no denoiser')
  source = references.other(run, split, path)
  count = min(count, len(source))
  used = ema or sample.last(run.like)
  edges = np.geomspace(low, high, bins + 1)
  size, place = sharding.whole(min(batch_size, count), run.mesh), sharding.batch(run.mesh)
  own = sharding.rows(run.mesh, size)

  def losses(params, frozen, batch, j):
    """[b] of the images batch['index'] in bin j, each at a level of its own."""
    schedule, denoise = run.task.denoiser(params)
    index = batch['index']
    keys = noises.fold(samplers.sample_keys(seed, index), j)
    x0, cond = run.task.clean(params, frozen, batch, keys)
    eps = noises.normal(keys, x0.shape[1:])
    at = (j + (index + 1) * GOLDEN % 1) / bins
    nsr = low * (high / low) ** at  # [b]
    t = jnp.clip(schedules.inverse(schedule, -jnp.log(nsr)), schedule.t_min, schedule.t_max)
    level = schedule(t.reshape(-1, *[1] * (x0.ndim - 1)))  # [b 1 1 1]
    x = level.alpha * x0 + level.sigma * eps
    error = jnp.square(denoise(x, level, cond).x0 - x0).mean(tuple(range(1, x0.ndim)))
    nsr = level.nsr.reshape(-1)
    return error * (nsr**2 + sigma_data**2) / (nsr * sigma_data) ** 2

  losses = sharding.jit(losses, run.mesh)

  def evaluate(state, folder):
    del folder
    params = sample.choose(state, used)
    total = np.zeros(bins)
    for start in range(0, count, size):
      index = np.arange(start, start + size)
      seen = (index % count)[own]
      images, label = references.images(source, seen, run.config['data']['size'])
      x0 = transforms.to_float(images) if images.dtype == np.uint8 else images
      batch = dict(image=x0, label=label, index=index[own].astype(np.int32))
      if run.task.tokenize:
        batch |= run.task.tokenize([source.captions[i] for i in seen])
      if run.task.carry:
        records = source.__getitems__(seen.tolist())
        batch |= {name: np.stack([one[name] for one in records]) for name in run.task.carry}
      batch = sharding.put(batch, place, (own, size))
      with run.layout():
        for j in range(bins):
          each = sharding.fetch(losses(params, state.frozen, batch, np.int32(j)))
          total[j] += each[index < count].sum(dtype=np.float64)
      yield None
    means = total / count
    yield f'{entry}/loss', means.mean()
    for j, mean in enumerate(means):
      yield f'{entry}/loss_{np.sqrt(edges[j] * edges[j + 1]):.3g}', mean

  return Evaluation(evaluate)
