"""Autoencoders: a network learns to write pictures as small latents and to read them again.

  L = d(x, y) + w_p p(x, y) + w_k k / n - w_a mean D(y),   y = decode(z),  z ~ encode(x)

of n values an example: d is the config's `loss.distance`, p a perceptual distance, k the KL
divergence of q(z | x) from N(0, 1) in nats, or in the place of w_k k / n the loss of a codebook;
D is a discriminator of patches, trained in a phase of its own by the hinge loss

  L_D = (relu(1 - D(x)) + relu(1 + D(y))) / 2

Esser et al. 2021, "Taming Transformers", section 3.1; Rombach et al. 2022, "High-Resolution Image
Synthesis with Latent Diffusion Models", appendix G. All is divided by n, where Rombach et al. sum,
so that w_k = 1e-6 is theirs. w_a is fixed, as in Yu et al. 2022, "Vector-Quantized Image Modeling
with Improved VQGAN", section 3.2: the adaptive one is a ratio of gradients of two losses, which is
one number for a batch and another for its microbatches.
"""

from functools import partial

import einops
import jax
import jax.numpy as jnp
import numpy as np

from diffax import noises
from diffax import perceptual as perceptuals
from diffax.build import build, ConfigError
from diffax.config import BESIDE, SHOWN
from diffax.data import pipeline
from diffax.data import transforms
from diffax.models import autoencoder as autoencoders
from diffax.tasks import Drawing, Phase, Task

LOOKS = dict(name='none', weight=1.0)
CRITIC = dict(name='patch_gan', weight=0.0, start=0)
ASKED = ('noise', 'prompts', 'negative', 'guidance', 'interval', 'labels', 'transforms', 'size')


def autoencode(
  config, source, kl=1e-6, commitment=0.25, perceptual=LOOKS, discriminator=CRITIC, split='test'
) -> Task:
  """Trains a model with `encode` and `decode` (autoencoder_kl, autoencoder_vq) on `source`.

  kl: w_k, where the latent is a Gaussian. commitment: of a codebook, see
  `models.autoencoder.codebook_loss`. perceptual: of `diffax.perceptual`, and its `weight` w_p.
  discriminator: a network of `diffax.models`, its `weight` w_a and the step from 0 at which it and
  its term `start`; without weight there is none. Its phase is called `disc`: an optimizer of its
  own stands in `config.phases.disc`. split: of the data, whose records in order are what "samples"
  are reconstructions of. Raises ConfigError.
  """
  for name, value in (
    ('kl', kl), ('commitment', commitment), ('perceptual.weight', perceptual['weight']),
    ('discriminator.weight', discriminator['weight']),
    ('discriminator.start', discriminator['start']),
  ):
    if value < 0:
      raise ConfigError(f'config.task.{name}={value} is negative; 0 is none')
  model, shape = _model(config, source)
  looks = build(
    'diffax.perceptual', perceptual, shape[-1], path='task.perceptual', skip=('weight',))
  critic = discriminator['weight'] > 0 and build(
    'diffax.models', discriminator, path='task.discriminator', skip=('weight', 'start'))

  def init(key):
    x = jnp.zeros((1, *shape))
    params = {'net': model.init(key, x)['params']}
    if critic:
      params['disc'] = critic.init(jax.random.fold_in(key, 1), x)['params']
    return params

  code = partial(_code, model, kl, commitment)
  loss = _loss(config, code, looks, critic)
  terms = ('distance', 'latent', *['perceptual'] * bool(looks.maps), *['fooled'] * bool(critic))
  phases = (
    Phase('net', ('net',), loss, terms=terms),
    Phase('disc', ('disc',), partial(_critic_loss, code, critic), start=discriminator['start'],
          terms=('real', 'made')),
  )
  sample = partial(_sample, config, source, split, code, shape)
  return Task(
    init, loss, sample, 0, phases=phases if critic else (),
    frozen={'perceptual': looks.frozen} if looks.maps else {},
    reconstruct=partial(_reconstruct, model, code, looks), terms=terms,
  )


def _model(config, source):
  """(the config's autoencoder, the shape [h w c] of a picture)."""
  model = build('diffax.models', config['model'], path='model')
  if not hasattr(model, 'encode'):
    raise ConfigError(
      f'config.model.name={config["model"]["name"]!r} has no latent: task=autoencode trains '
      'autoencoder_kl and autoencoder_vq'
    )
  size = config['data']['size']
  shape = (size, size, source.shape[-1]) if size else tuple(source.shape)
  if None in shape:
    raise ConfigError(
      f'data {config["data"]["name"]!r} has images of several sizes: say --config.data.size=N'
    )
  return model, shape


# --- training -------------------------------------------------------------------------------------


def _code(model, kl, commitment, params, x, keys=None):
  """(y [b h w c], cost [b] of the latent, what is known of it); without keys z is its mean.

  Known are `mean` [b h w z], and `variance`, or of a codebook `index` [b h w].
  """
  apply = lambda method, *args: model.apply({'params': params['net']}, *args, method=method)
  z = apply('encode', x)
  if hasattr(model, 'quantize'):
    _, index = apply('quantize', z)
    cost = autoencoders.codebook_loss(z, apply('lookup', index), commitment)
    return apply('decode', z), cost, {'mean': z, 'index': index}
  mean, logvar = autoencoders.posterior(z)
  variance = jnp.exp(logvar)
  nats = einops.reduce(mean**2 + variance - 1 - logvar, 'b h w z -> b', 'sum') / 2
  z = mean if keys is None else mean + jnp.sqrt(variance) * noises.normal(keys, mean.shape[1:])
  cost = kl * nats / np.prod(x.shape[1:])
  return apply('decode', z), cost, {'mean': mean, 'variance': variance}


def _loss(config, code, looks, critic):
  """The loss of the autoencoder, the task's first phase."""
  task = config['task']
  distance = build('diffax.losses', config['loss']['distance'], path='loss.distance')
  start, weight = task['discriminator']['start'], task['discriminator']['weight']

  def loss(params, state, batch, keys):
    x = batch['image']
    y, cost, _ = code(params, x, keys)
    off = jnp.broadcast_to(distance(y - x), x.shape).mean((1, 2, 3))
    total, info = off + cost, {'distance': off, 'latent': cost}
    if looks.maps:
      info['perceptual'] = _seen(looks, state.frozen, x, y)
      total += task['perceptual']['weight'] * info['perceptual']
    if critic:
      said = critic.apply({'params': params['disc']}, y).mean((1, 2, 3))
      info['fooled'] = said
      total -= jnp.where(state.step >= start, weight, 0.0) * said
    return total, info

  return loss


def _seen(looks, frozen, x, y):
  """How far apart x and y are to the perceptual network: [b]."""
  maps = partial(looks.maps, frozen['perceptual'])
  return perceptuals.distance(maps(x), maps(y))


def _critic_loss(code, critic, params, state, batch, keys):
  """The hinge loss of the discriminator: [b]."""
  x = batch['image']
  y, _, _ = code(params, x, keys)
  real, made = (critic.apply({'params': params['disc']}, picture) for picture in (x, y))
  wrong = lambda said: jax.nn.relu(1 + said).mean((1, 2, 3))
  return (wrong(-real) + wrong(made)) / 2, {
    'real': real.mean((1, 2, 3)), 'made': made.mean((1, 2, 3))}


# --- reconstruction -------------------------------------------------------------------------------


def _reconstruct(model, code, looks, params, frozen, x):
  """The task's `reconstruct`."""
  y, _, known = code(params, x)
  if looks.maps:
    known['perceptual'] = _seen(looks, frozen, x, y)
  if 'index' in known:
    index = einops.rearrange(known.pop('index'), 'b h w -> b (h w)')
    known['codes'] = jax.vmap(partial(jnp.bincount, length=model.design.codes))(index)
  return {'image': y, **known}


def _sample(config, source, split, code, shape, settings, path):
  """The task's `sample`: reconstructions of held-out records, in order."""
  for name in ASKED:
    if name in settings and settings[name] != SHOWN[name]:
      raise ConfigError(
        f'config.{path}.{name}={settings[name]!r}: task=autoencode draws nothing of its own; its '
        f'samples are reconstructions of the split {split!r}, in order'
      )
  held = _held_out(config, split) if split else source
  size = config['data']['size'] or None

  def ask(index):
    _, images, *_ = zip(*pipeline.read(held, size, 'raise', (index % len(held)).tolist()))
    images = np.stack(images)
    return {'image': transforms.to_float(images) if images.dtype == np.uint8 else images}

  def draw(params, frozen, keys, asked):
    del frozen, keys
    return code(params, asked['image'])[0]

  return Drawing(ask, draw)


def _held_out(config, split):
  data = {k: v for k, v in config['data'].items() if k not in BESIDE}
  if 'split' not in data:
    raise ConfigError(
      f"config.task.split={split!r}: data {data['name']!r} has no splits; say '' for its own "
      'records, in order'
    )
  return build('diffax.data.sources', {**data, 'split': split}, path='task.split')
