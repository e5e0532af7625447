"""How well an autoencoder gives back pictures it was not trained on, and what its latents are like.

Pictures are compared as they are saved, in 256 steps, at values from 0 to 1:

  psnr = -10 log10 mse,   of each picture, in dB
  ssim   Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural
         Similarity", eq. 13, with their window: a Gaussian of deviation 1.5 in 11 by 11 pixels

A diffusion model should see latents of mean 0 and deviation 1: 1 / `latent_std` is the scale that
Rombach et al. 2022, appendix D.1, choose so; with a number a channel and means it is both.
"""

import einops
import jax
import jax.numpy as jnp
import numpy as np

from diffax import images
from diffax import references
from diffax import sample
from diffax import sharding
from diffax.build import ConfigError
from diffax.data import transforms
from diffax.evals import Evaluation
from diffax.models import layers

WINDOW, DEVIATION = 11, 1.5
STABLE = 0.01**2, 0.03**2
CLOSEST = 1e-10  # mean squared error of equal pictures: 100 dB


def reconstruction(
  run, path, count=1000, split='test', ema='', batch_size=100, columns=10
) -> Evaluation:
  """Means over `count` records of a split, in order; and a picture of the first two rows of
  `columns`, each above what is made of it.

  mse, psnr, ssim (of sides of 11 pixels and more), perceptual (where the task has such a loss);
  latent_mean and latent_std in all and of each channel, of draws from q(z | x) where that is a
  Gaussian; of a codebook codes_used, the share of its entries, and perplexity, exp of the entropy
  of how often each is. Raises ConfigError.
  """
  entry = path.rpartition('.')[2]
  for name, value in ('count', count), ('batch_size', batch_size), ('columns', columns):
    if value < 1:
      raise ConfigError(f'config.{path}.{name}={value} is less than 1')
  if run.task.reconstruct is None:
    raise ConfigError(
      f'config.{path}: the task {run.config["task"]["name"]!r} has no autoencoder: leave it out, '
      'or take task=autoencode'
    )
  source, used = references.other(run, split, path), ema or sample.last(run.like)
  count, pixels = min(count, len(source)), source.dtype == np.uint8
  size, place = sharding.whole(min(batch_size, count), run.mesh), sharding.batch(run.mesh)
  own = sharding.rows(run.mesh, size)

  @jax.jit
  def measure(params, frozen, x):
    made = run.task.reconstruct(params, frozen, x)
    found = {'picture': made['image'], **_compared(x, made['image'], pixels)}
    found |= {k: made[k] for k in ('perceptual', 'codes') if k in made}
    moment = lambda z: einops.reduce(z, 'b h w c -> b c', 'mean')
    square = made['mean'] ** 2 + made.get('variance', 0.0)
    return found | {'first': moment(made['mean']), 'second': moment(square)}

  def evaluate(state, folder):
    del folder
    params, kept, shown = sample.choose(state, used), [], []
    for start in range(0, count, size):
      index = np.arange(start, start + size) % count
      real, _ = references.images(source, index[own], run.config['data']['size'])
      x = sharding.put(transforms.to_float(real) if pixels else real, place, (own, size))
      with run.layout():
        found = sharding.fetch(measure(params, state.frozen, x))
      picture = found.pop('picture')
      if start < 2 * columns:
        shown.append((sharding.fetch(x), picture))
      kept.append(found)
      yield None
    each = jax.tree.map(lambda *xs: np.concatenate(xs)[:count].astype(np.float64), *kept)
    for name, value in _summary(each).items():
      yield f'{entry}/{name}', value
    real, made = (np.concatenate(xs)[: min(count, 2 * columns)] for xs in zip(*shown))
    yield f'{entry}/pictures', _beside(real, made, columns, pixels)

  return Evaluation(evaluate)


def _summary(each):
  """{name: number} of what was measured of each picture, [n ...]."""
  found = {k: each[k].mean() for k in ('mse', 'psnr', 'ssim', 'perceptual') if k in each}
  mean, square = each['first'].mean(0), each['second'].mean(0)
  found |= {
    'latent_mean': mean.mean(),
    'latent_std': np.sqrt(square.mean() - mean.mean() ** 2),
  }
  for i, (m, s) in enumerate(zip(mean, np.sqrt(square - mean**2))):
    found |= {f'latent_mean_{i}': m, f'latent_std_{i}': s}
  if 'codes' in each:
    share = each['codes'].sum(0) / each['codes'].sum()
    there = share[share > 0]
    found['codes_used'] = len(there) / len(share)
    found['perplexity'] = np.exp(-(there * np.log(there)).sum())
  return found


def _beside(real, made, columns, pixels):
  """One picture: rows of real ones, each above the row of what was made of them."""
  finish = transforms.to_uint8 if pixels else np.asarray
  rows = []
  for start in range(0, len(real), columns):
    rows += [finish(real[start : start + columns]), finish(made[start : start + columns])]
  wide = max(map(len, rows))
  rows = [np.concatenate([row, row[:1].repeat(wide - len(row), 0)]) for row in rows]
  return images.grid(images.shown(np.concatenate(rows)), wide)


def _compared(x, y, pixels):
  """{mse, psnr, ssim: [b]} of pictures [b h w c] in [-1, 1]."""
  a, b = (jnp.clip((v + 1) / 2, 0, 1) if pixels else (v + 1) / 2 for v in (x, y))
  a, b = (jnp.round(v * 255) / 255 if pixels else v for v in (a, b))
  mse = jnp.square(a - b).mean((1, 2, 3))
  found = {'mse': mse, 'psnr': -10 * jnp.log10(jnp.maximum(mse, CLOSEST))}
  return found | ({'ssim': ssim(a, b)} if min(x.shape[1:3]) >= WINDOW else {})


def ssim(a, b):
  """Structural similarity [b] of pictures [b h w c] of values from 0 to 1, of sides >= 11."""
  places = np.arange(WINDOW) - WINDOW // 2
  taps = np.exp(-(places**2) / (2 * DEVIATION**2))
  taps = (taps / taps.sum()).tolist()

  def local(x):  # where the window lies within the picture
    for axis in (1, 2):
      x = layers.blur(x, taps, 0, 0, axis)
    return x

  mean_a, mean_b = local(a), local(b)
  var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
  both = local(a * b) - mean_a * mean_b
  one, two = STABLE
  light = (2 * mean_a * mean_b + one) / (mean_a**2 + mean_b**2 + one)
  return (light * (2 * both + two) / (var_a + var_b + two)).mean((1, 2, 3))
