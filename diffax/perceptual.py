"""Perceptual losses: distances between pictures in the maps of a fixed network.

  d(x, y) = sum_l mean_places sum_c (f_lc(x) - f_lc(y))^2

A function `(channels, ...) -> Perceptual`, named in `config.task.perceptual`:

  none     no such loss
  lpips    VGG16 and the weights of LPIPS, from a file of yours
  random   a few convolutions of random weights: nothing to download, and better than none
"""

from typing import NamedTuple
from collections.abc import Callable

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax import sharding
from diffax.build import ConfigError
from diffax.convert import tensors
from diffax.models import layers
from diffax.models import vgg
from diffax.tasks import Frozen


class Perceptual(NamedTuple):
  """maps: (parameters, x [b h w c] in [-1, 1]) -> [map [b h' w' c'], ...], None for no such loss.

  frozen: its parameters, see `tasks.Frozen`.
  """

  maps: Callable | None = None
  frozen: Frozen | None = None


def distance(maps, others):
  """[b] between the maps of pictures and those of others."""
  each = [einops.reduce((x - y) ** 2, 'b h w c -> b c', 'mean').sum(-1)
          for x, y in zip(maps, others, strict=True)]
  return sum(each)


def none(channels) -> Perceptual:
  """No perceptual loss."""
  del channels
  return Perceptual()


IGNORED = (r'classifier\.\d+\.(weight|bias)',)


def lpips(channels, weights: str) -> Perceptual:
  """LPIPS with VGG16 (Zhang et al. 2018), version 0.1, equal to the lpips package's.

  weights: a safetensors file with torchvision's `features.N.weight` and `.bias` of VGG16 and the
  package's `linL.model.1.weight`, made by

    import lpips, torchvision; from safetensors.torch import save_file
    vgg = torchvision.models.vgg16(weights='IMAGENET1K_V1').features.state_dict(prefix='features.')
    lin = {k: v for k, v in lpips.LPIPS(net='vgg').state_dict().items() if k[:3] + k[4] == 'lin.'}
    save_file(vgg | lin, 'lpips.safetensors')

  Grey pictures are seen as grey ones of three channels. Raises ValueError for other channels,
  ConfigError for a file that lacks something or whose weights are negative, which measure nothing.
  """
  if channels not in (1, 3):
    raise ValueError(f'lpips looks at pictures of 1 or 3 channels, not {channels}')
  model, files = vgg.LPIPS(), tensors.find(weights)
  like = lambda: _like(model, vgg.SMALLEST, 3)
  tensors.check(files, tensors.wanted(like(), stored), IGNORED)

  def load(like):
    params = tensors.load(files, like, stored, IGNORED)
    if any(bool((x < 0).any()) for name, x in params.items() if name.startswith('weight')):
      raise ConfigError(f'{weights}: LPIPS has weights that are negative; get it again')
    return params

  return Perceptual(lambda params, x: model.apply({'params': params}, x), Frozen(like, load))


def _like(model, side, channels):
  x = jnp.zeros((1, side, side, channels))
  return jax.eval_shape(model.init, jax.random.key(0), x)['params']


def stored(path, shape):
  """Where a parameter of `vgg.LPIPS` stands: `tensors.Stored`."""
  first = path.partition('/')[0]
  if first.startswith('weight'):
    name = f'lin{first.removeprefix("weight")}.model.1.weight'
    return tensors.Stored((name,), 'c -> 1 c 1 1')
  block, conv = (int(part[-1]) for part in first.split('_'))
  # torchvision numbers a convolution, its relu, and the pool behind a block
  number = sum(2 * count + 1 for _, count in vgg.BLOCKS[:block]) + 2 * conv
  return tensors.usual(f'features.{number}', path, shape)


def random(channels, widths: tuple = (32, 64, 128), seed=0) -> Perceptual:
  """Maps of convolutions of random weights, each behind a relu and half as fine as the one before.

  He et al. 2016, "A Powerful Generative Model Using Random Weights for the Deep Image
  Representation": what such maps tell of a picture is its texture and edges. widths: channels of
  the maps. seed: of the weights. Raises ValueError for no widths.
  """
  if not widths:
    raise ValueError(f'random: widths={widths}: say the channels of one map at least')
  model = Random(tuple(widths))
  side = 2 ** len(widths)
  like = lambda: _like(model, side, channels)

  def load(like):
    draw = lambda: model.init(jax.random.key(seed), jnp.zeros((1, side, side, channels)))['params']
    return jax.tree.map(
      lambda x, to: sharding.put(x, to.sharding) if to.sharding else x, jax.jit(draw)(), like)

  return Perceptual(lambda params, x: model.apply({'params': params}, x), Frozen(like, load))


class Random(nn.Module):
  """The network of `random`: x [b h w c] -> maps."""

  widths: tuple

  @nn.compact
  def __call__(self, x):
    maps = []
    for i, width in enumerate(self.widths):
      x = layers.downsample(x) if i and min(x.shape[1:3]) > 1 else x
      start = nn.initializers.he_normal()
      x = nn.Conv(
        width, (3, 3), kernel_init=start, name=f'conv{i}', conv_general_dilated=layers.conv)(x)
      x = nn.relu(layers.constrain(x, 'batch', 'height', None, 'width'))
      maps.append(vgg.unit(x))
    return maps
