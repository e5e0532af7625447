"""Pictures a network is shown beside x, named in `config.given`: for inpainting, super-resolution.

A function `-> Given` says how training makes them of its own pictures, and how sampling makes them
of the user's (`diffax.edits`). Both are of pixels, [b h w c] in [-1, 1]; where the network denoises
latents, `image` is encoded and `mask` made as small.

  none        no picture
  masked      a picture with a part hidden, and where that is: inpainting
  smaller     a smaller picture, with noise: one stage of a cascade
  noised      a smaller picture as a table of steps noises it, a pixel a latent: SD's upscaler
  before      the picture to be changed: instruction editing
"""

from typing import NamedTuple
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp

from diffax import noises
from diffax import schedules


class Given(NamedTuple):
  """train: (pictures, keys [b]) -> shown; show: (asked, keys [b]) -> shown; None for none.

  shown: `image` [b h w c], and where there is one `mask` [b h w 1], 1 where it is to be painted.
  needs: what of the user's pictures `asked` must hold. latent: whether `image` is encoded; mean: by
  the mean of its latents before they are scaled. extra: channels of `image` beside the picture's.
  scale: how much smaller the user's picture is. apart: whether it is shown as small as it is, a
  pixel for each of x. noise: the most that training adds. drop: how often training shows zeros in
  its place, for guidance by it.
  """

  train: Callable | None = None
  show: Callable | None = None
  needs: tuple = ('image',)
  latent: bool = True
  mean: bool = False
  extra: int = 0
  scale: int = 1
  apart: bool = False
  noise: float = 0.0
  drop: float = 0.0


def none() -> Given:
  """No picture."""
  return Given()


def masked(least=0.2, most=0.9, drop=0.1) -> Given:
  """A picture whose hidden part is grey, and its mask: `image` and `mask`; for inpainting.

  Training hides a rectangle around a place uniform in the picture, as long as a share of each side
  uniform in [least, most], cut by the edges, or all of it with rate `drop`; Rombach et al. 2022,
  sec. 4.5. Raises ValueError for shares outside (0, 1].
  """
  if not 0 < least <= most <= 1:
    raise ValueError(f'masked: least={least}, most={most}: say 0 < least <= most <= 1')

  def shown(pictures, mask):
    return {'image': jnp.where(mask > 0.5, 0.0, pictures), 'mask': mask}

  def rectangle(key, side):
    """[h] bool along one side: a stretch around a place within it."""
    length, place = jax.random.uniform(key, (2,))
    half = (least + (most - least) * length) * side / 2
    return jnp.abs(jnp.arange(side) + 0.5 - place * side) <= half

  def train(pictures, keys):
    def one(key):
      rows, columns, whole = jax.random.split(key, 3)
      down, across = rectangle(rows, pictures.shape[1]), rectangle(columns, pictures.shape[2])
      return down[:, None] & across[None] | jax.random.bernoulli(whole, drop)

    mask = jax.vmap(one)(keys).astype(pictures.dtype)[..., None]
    return shown(pictures, mask)

  show = lambda asked, keys: shown(asked['image'], asked['mask'])
  return Given(train, show, ('image', 'mask'))


def smaller(factor=4, noise=0.3, drop=0.0) -> Given:
  """A picture of a `factor`-th of the sides, with noise, brought back to size: `image` of c + 1
  channels, the last of which is the level of the noise everywhere.

  Ho et al. 2021, "Cascaded Diffusion Models", sec. 4.2: noise of deviation uniform in [0, noise] is
  added in training, so that the network mends what the stage before it made; sampling adds what the
  edit says. Raises ValueError for other numbers.
  """
  if factor < 2 or not 0 <= noise <= 2:
    raise ValueError(f'smaller: factor={factor}, noise={noise}: say 2 and more, and [0, 2]')

  def shown(small, level, keys):
    level = level[:, None, None, None]
    large = enlarge(small + level * noises.normal(keys, small.shape[1:]), factor)
    plane = jnp.broadcast_to(level, (*large.shape[:-1], 1))
    return {'image': jnp.concatenate([large, plane], axis=-1)}

  def train(pictures, keys):
    draws = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
    level = noise * jax.vmap(jax.random.uniform)(draws[:, 0])
    return shown(shrink(pictures, factor), level, draws[:, 1])

  show = lambda asked, keys: shown(asked['image'], asked['noise'], keys)
  return Given(
    train, show, ('image', 'noise'), extra=1, scale=factor, latent=False, noise=noise, drop=drop)


def noised(
  factor=4, most=350, table='scaled_linear', beta_min=1e-4, beta_max=0.02, steps=1000, drop=0.0,
) -> Given:
  """A picture of a `factor`-th of the sides, noised as a table's step does: `image`, each pixel
  beside the latent of its place, and `noise_level`, int [b], the step.

  Stable Diffusion's upscaler; Rombach et al. 2022, sec. 4.4, with the noise of Ho et al. 2021, sec.
  4.2. table: scaled_linear or linear_table of `diffax.schedules`, with its betas and steps.
  Training draws a step uniform in [0, most], sampling takes the edit's. Raises ValueError for other
  numbers.
  """
  if factor < 2 or not 0 <= most < steps:
    raise ValueError(f'noised: factor={factor}, most={most}: say 2 and more, and [0, {steps})')
  tables = {f.__name__: f for f in (schedules.scaled_linear, schedules.linear_table)}
  if table not in tables:
    raise ValueError(f'noised: table={table!r}: say {" or ".join(tables)}')
  schedule = tables[table](beta_min, beta_max, steps)

  def shown(small, step, keys):
    level = schedule(((step + 1) / steps)[:, None, None, None])
    noise = noises.normal(keys, small.shape[1:])
    return {'image': level.alpha * small + level.sigma * noise, 'noise_level': step}

  def train(pictures, keys):
    draws = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
    step = jax.vmap(lambda key: jax.random.randint(key, (), 0, most + 1))(draws[:, 0])
    return shown(shrink(pictures, factor), step, draws[:, 1])

  def show(asked, keys):
    return shown(asked['image'], jnp.round(asked['noise']).astype(jnp.int32), keys)

  return Given(
    train, show, ('image', 'noise'), scale=factor, latent=False, apart=True, noise=most, drop=drop)


def shrink(x, factor):
  """[b h f w f c] -> [b h w c], the mean of each square."""
  return einops.reduce(x, 'b (h i) (w j) c -> b h w c', 'mean', i=factor, j=factor)


def enlarge(x, factor):
  """[b h w c] -> [b h f w f c], bilinearly."""
  b, h, w, c = x.shape
  return jax.image.resize(x, (b, h * factor, w * factor, c), 'bilinear')


def before(drop=0.05) -> Given:
  """The picture that an instruction is to change: `image`, its latents as they are encoded.

  Brooks et al. 2023, "InstructPix2Pix", sec. 3.2.1, where training shows zeros at the rate `drop`,
  apart from the text. For sampling with released weights: no source here has pairs to train on.
  """
  return Given(None, lambda asked, keys: {'image': asked['image']}, mean=True, drop=drop)
