"""VGG16 (Simonyan & Zisserman 2015) up to its last convolution, as LPIPS looks at it.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric": the
maps behind the last relu of each of the five blocks, each place's channels brought to length 1,

  d(x, y) = sum_l mean_places sum_c  w_lc (f_lc(x) - f_lc(y))^2

with weights w that people's judgements gave.
"""

from collections.abc import Sequence
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax.models import layers

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions
SMALLEST = 2 ** (len(BLOCKS) - 1)  # pixels a side, of which the last block has one place
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet, in [-1, 1]


class LPIPS(nn.Module):
  """x [b h w 3] in [-1, 1], or [b h w 1] -> the maps [b h w c] of each block, weighted.

  `distance` of two pictures' maps is LPIPS. The parameters `block0_conv0` ... are VGG16's,
  `weight0` ... [c] the weights. Raises ValueError for sides below 16.
  """

  blocks: Sequence = BLOCKS

  @nn.compact
  def __call__(self, x):
    if min(x.shape[1:3]) < SMALLEST:
      raise ValueError(
        f'lpips: pictures of {x.shape[1]}x{x.shape[2]} pixels; sides must be {SMALLEST} at least'
      )
    wide = lambda values: np.asarray(values, np.float32)[None, None, None]
    x = (jnp.broadcast_to(x, (*x.shape[:-1], 3)) - wide(MEAN)) / wide(DEVIATION)
    maps = []
    for i, (channels, count) in enumerate(self.blocks):
      x = pool(x) if i else x
      for j in range(count):
        conv = nn.Conv(
          channels, (3, 3), name=f'block{i}_conv{j}', conv_general_dilated=layers.conv)
        x = layers.constrain(nn.relu(conv(x)), 'batch', 'height', None, 'width')
      weight = self.param(f'weight{i}', nn.initializers.ones, (channels,))
      maps.append(unit(x) * jnp.sqrt(weight)[None, None, None])
    return maps


def unit(x):
  """Channels of each place brought to length 1; where all are 0 they stay, and have a gradient."""
  square = (x * x).sum(-1, keepdims=True)
  return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def pool(x):
  """The largest of two by two, [b h w c] -> [b h/2 w/2 c]; an odd last row or column is dropped.

  Written out: XLA's gradient of a max pool is slow on a CPU.
  """
  rows, columns = (side - side % 2 for side in x.shape[1:3])
  corners = [x[:, i:rows:2, j:columns:2] for i in range(2) for j in range(2)]
  return functools.reduce(jnp.maximum, corners)
