"""Pictures a network is shown beside x, named in `config.given`: for inpainting, super-resolution.

A function `-> Given` says how training makes them of its own pictures, and how sampling makes them
of the user's (`diffax.edits`). Both are of pixels, [b h w c] in [-1, 1]; where the network denoises
latents, `image` is encoded and `mask` made as small.

  none        no picture
  masked      a picture with a part hidden, and where that is: inpainting
  smaller     a smaller picture, with noise: one stage of a cascade
  before      the picture to be changed: instruction editing
"""

from typing import NamedTuple
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp

from diffax import noises


class Given(NamedTuple):
  """train: (pictures, keys [b]) -> shown; show: (asked, keys [b]) -> shown; None for none.

  shown: `image` [b h w c], and where there is one `mask` [b h w 1], 1 where it is to be painted.
  needs: what of the user's pictures `asked` must hold. latent: whether `image` is encoded; mean: by
  the mean of its latents before they are scaled. extra: channels of `image` beside the picture's.
  scale: how much smaller the user's picture is. drop: how often training shows zeros in its place,
  for guidance by it.
  """

  train: Callable | None = None
  show: Callable | None = None
  needs: tuple = ('image',)
  latent: bool = True
  mean: bool = False
  extra: int = 0
  scale: int = 1
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
    small = einops.reduce(
      pictures, 'b (h i) (w j) c -> b h w c', 'mean', i=factor, j=factor)
    return shown(small, level, draws[:, 1])

  show = lambda asked, keys: shown(asked['image'], asked['noise'], keys)
  return Given(train, show, ('image', 'noise'), extra=1, scale=factor, latent=False, drop=drop)


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
