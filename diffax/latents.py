"""From pictures to latents and back: the space a network denoises in, named in `config.latent`.

  z = (encode(picture) - shift) / scale,   picture = decode(z scale + shift)

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models". Shift and scale
bring latents to about mean 0 and deviation 1, as schedules expect, and stand here alone: every
other module sees z. A function `(source, ...) -> Latent`:

  none         the pictures themselves
  autoencoder  a KL or VQ autoencoder of a folder of weights, frozen
"""

from typing import NamedTuple
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffax import noises
from diffax.build import build, ConfigError
from diffax.convert import tensors
from diffax.tasks import Frozen


class Latent(NamedTuple):
  """A space to denoise in. groups: {name: parameters}, `autoencoder` among them.

  moments: (groups, pictures [b h w c]) -> [b h w k], what is known of their z. draw: (moments,
  keys [b], or None for the mean) -> z [b h w c]. decode: (groups, z) -> pictures. shape: that of a
  picture -> that of its z. frozen: see `tasks.Task`. factor: pixels of a picture a side
  of a latent. channels: of z, 0 for those of the pictures.
  """

  moments: Callable = lambda groups, x: x
  draw: Callable = lambda moments, keys: moments
  decode: Callable = lambda groups, z: z
  shape: Callable = lambda shape: shape
  frozen: dict = {}
  factor: int = 1
  channels: int = 0


def none(source) -> Latent:
  """The pictures themselves."""
  del source
  return Latent()


def autoencoder(source, path: str, sample=True, dtype='float32') -> Latent:
  """The latents of an autoencoder in a folder as diffusers writes them, config.json and tensors.

  sample: whether training draws from the posterior or takes its mean; shift and scale are the
  folder's own. dtype: of its matrix products and convolutions. Raises ConfigError for a folder that
  holds none.
  """
  from diffax.convert import autoencoder as stored

  said = tensors.config_json(path)
  model = build('diffax.models', stored.from_config(said) | {'dtype': dtype}, path='latent')
  shift, scale = normalisation(said)
  files = tensors.find(path)
  if source.dtype == np.uint8 and source.shape[-1] != model.channels:
    raise ConfigError(
      f'config.latent.path={path} is of pictures of {model.channels} channels, and the data has '
      f'{source.shape[-1]}'
    )

  def apply(groups, x, method):
    return model.apply({'params': groups['autoencoder']}, x, method=method)

  def draw(moments, keys):
    mean = moments[..., : model.latent]
    if sample and keys is not None and moments.shape[-1] > model.latent:
      eps = noises.normal(keys, mean.shape[1:])
      mean += jnp.exp(jnp.clip(moments[..., model.latent :], -30, 20) / 2) * eps
    return (mean - shift) / scale

  def shape(of):
    if any(side and side % model.factor for side in of[:-1]):
      raise ConfigError(
        f'config.latent: pictures of {of[:-1]} do not divide by {model.factor}, pixels a latent'
      )
    return *(side // model.factor for side in of[:-1]), model.latent

  def like():
    x = jnp.zeros((1, 2 * model.factor, 2 * model.factor, model.channels))
    return jax.eval_shape(model.init, jax.random.key(0), x)['params']

  load = lambda like: tensors.load(files, like, stored.stored(model), stored.IGNORED)
  return Latent(
    moments=lambda groups, x: apply(groups, x, 'encode'), draw=draw,
    decode=lambda groups, z: apply(groups, z * scale + shift, 'decode'), shape=shape,
    frozen={'autoencoder': Frozen(like, load)}, factor=model.factor,
    channels=model.latent,
  )


def normalisation(said):
  """(shift, scale), numbers or [c], of an autoencoder's config.json as diffusers has it.

  Its scaling_factor is 1 / scale; where it says latents_mean and latents_std, a number a channel,
  those are meant beside it.
  """
  factor = said.get('scaling_factor') or 1.0
  if said.get('latents_mean') is not None and said.get('latents_std') is not None:
    mean, std = (np.asarray(said[f'latents_{k}'], np.float32) for k in ('mean', 'std'))
    return mean, std / np.float32(factor)
  return np.float32(said.get('shift_factor') or 0.0), np.float32(1 / factor)
