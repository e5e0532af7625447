"""From pictures to latents and back: the space a network denoises in, named in `config.latent`.

  z = (encode(picture) - shift) scale,   picture = decode(z / scale + shift)

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models". Shift and scale
bring latents to about mean 0 and deviation 1, as schedules expect; they are the autoencoder's own
and are used here alone: every other module sees z. A function `(source, ...) -> Latent`:

  none         the pictures themselves; of a latent data set its latents, and samples stay such
  autoencoder  a KL or VQ autoencoder of released or exported weights, frozen
"""

from functools import partial
import os
from typing import NamedTuple
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffax import noises
from diffax import tiles
from diffax.build import build, ConfigError
from diffax.convert import autoencoder as stored
from diffax.convert import single
from diffax.convert import tensors
from diffax.models import autoencoder as autoencoders
from diffax.tasks import Frozen


class Latent(NamedTuple):
  """A space to denoise in. groups: {name: parameters}, `autoencoder` among them.

  moments: (groups, pictures [b h w c]) -> [b h w k], what is known of their z. draw: (moments,
  keys [b], or None for the mean) -> z [b h w c]. mean: moments -> that mean before shift and scale.
  decode: (groups, z) -> pictures. telling: {'moments' and 'decode': (groups, x, told) -> (the like,
  tells)}, for tiles. shape: that of a picture -> that of its z. frozen: see `tasks.Task`. factor:
  pixels of a picture a side of a latent. channels: of z, 0 for those of the pictures. identity: ()
  -> plain data that says what moments are by; it reads files.
  """

  moments: Callable = lambda groups, x: x
  draw: Callable = lambda moments, keys: moments
  mean: Callable = lambda moments: moments
  decode: Callable = lambda groups, z: z
  telling: dict = {}
  shape: Callable = lambda shape: shape
  frozen: dict = {}
  factor: int = 1
  channels: int = 0
  identity: Callable = dict

  def encode(self, groups, pictures, keys):
    """The z of pictures, drawn by keys [b] or, with None, the mean."""
    return self.draw(self.moments(groups, pictures), keys)

  def tiled(self, side):
    """The same by tiles of `side` latents that share a quarter, see `tiles.traced`."""
    def by_tiles(name, unit, scale):
      return lambda groups, x: tiles.traced(
        partial(self.telling[name], groups), x, side * unit, side // 4 * unit, scale)

    moments = by_tiles('moments', self.factor, 1 / self.factor)
    return self._replace(moments=moments, decode=by_tiles('decode', 1, self.factor))


def none(source) -> Latent:
  """The pictures themselves; of `sources.latents` draws of them, which are not decoded."""
  made = getattr(source, 'made', None)
  if made is None:
    return Latent()
  model = build('diffax.models', stored.from_config(made['latent']['config']), path='latent')
  return Latent(
    moments=_unknown, draw=partial(_draw, model, True),
    shape=lambda of: (*of[:-1], model.latent), channels=model.latent,
  )


def _unknown(groups, x):
  raise ConfigError(
    "config.latent='none': pictures cannot become latents without the autoencoder; say "
    '--config.latent=autoencoder --config.latent.path=DIR, the one of the data'
  )


def autoencoder(source, path: str, sample=True, dtype='float32') -> Latent:
  """The latents of an autoencoder.

  path: a folder of it in diffusers' layout, config.json and tensors, or the single file of a whole
  model (`convert.single`). sample: whether training draws from the posterior or takes its mean.
  dtype: of its matrix products and convolutions. Raises ConfigError for what holds none, and for
  one that did not make the latents of a latent data set.
  """
  found = weights(path)
  model = build('diffax.models', found.spec | {'dtype': dtype}, path='latent')
  channels = model.design.channels
  if source.dtype == np.uint8 and source.shape[-1] != channels:
    raise ConfigError(
      f'config.latent.path={path} is of pictures of {channels} channels, and the data has '
      f'{source.shape[-1]}'
    )

  identity = lambda: {
    'config': stored.to_config(found.spec), 'sha256': tensors.digest(found.files), 'dtype': dtype}
  _same(source, path, identity)

  def apply(method, groups, x):
    return model.apply({'params': groups['autoencoder']}, x, method=method)

  def telling(method, groups, x, told):
    given = {'params': groups['autoencoder'], 'told': told.get('intermediates', {})}
    return model.apply(given, x, method=method, mutable='intermediates')

  bare = lambda z: z / model.scale + model.shift

  def shape(of):
    if any(side and side % model.factor for side in of[:-1]):
      raise ConfigError(
        f'config.latent: pictures of {of[:-1]} do not divide by {model.factor}, pixels a latent'
      )
    return *(side // model.factor for side in of[:-1]), model.latent

  def like():
    x = jnp.zeros((1, 2 * model.factor, 2 * model.factor, channels))
    return jax.eval_shape(model.init, jax.random.key(0), x)['params']

  return Latent(
    moments=partial(apply, 'encode'), draw=partial(_draw, model, sample),
    mean=partial(_mean, model), decode=lambda groups, z: apply('decode', groups, bare(z)),
    telling=dict(
      moments=partial(telling, 'encode'),
      decode=lambda groups, z, told: telling('decode', groups, bare(z), told)),
    shape=shape,
    frozen={'autoencoder': Frozen(
      like, lambda like: tensors.read(found, model, like))},
    factor=model.factor, channels=model.latent, identity=identity,
  )


def weights(path):
  """The `tensors.Weights` of the autoencoder of a folder or single file. Raises ConfigError."""
  return stored.weights(path) if os.path.isdir(path) else single.autoencoder(path)


def _mean(model, moments):
  codes = moments.shape[-1] == model.latent  # of a codebook
  return moments if codes else autoencoders.posterior(moments)[0]


def _draw(model, sample, moments, keys):
  """z of what an autoencoder knows of it; see `Latent`."""
  z = _mean(model, moments)
  if sample and keys is not None and z.shape != moments.shape:
    std = jnp.exp(autoencoders.posterior(moments)[1] / 2)
    z += std * noises.normal(keys, z.shape[1:])
  return (z - model.shift) * model.scale


def spread(config, moments):
  """(mean, variance) [.. z] of the z that is drawn of moments [.. k], numpy in their precision.

  config: of the autoencoder, as its `identity` says.
  """
  spec = stored.from_config(config)
  model = build('diffax.models', spec, path='latent')
  mean, logvar = moments[..., : model.latent], moments[..., model.latent :]
  variance = np.exp(np.clip(logvar, *autoencoders.LOGVAR)) if logvar.shape[-1] else 0 * mean
  return (mean - model.shift) * model.scale, variance * model.scale**2


def _same(source, path, identity):
  """Raises ConfigError where latents were made by another autoencoder than the one in `path`."""
  made = getattr(source, 'made', None)
  if made is None:
    return
  there, here = made['latent']['sha256'], identity()['sha256']
  if there != here:
    raise ConfigError(
      f'config.latent.path={path} is another autoencoder (sha256 {here[:12]}) than the one that '
      f'made {made["path"]} ({there[:12]}): name the folder of that one, or encode anew'
    )
