"""A small convolutional network that learns an image set in minutes, for its features.

Most work is done on coarse grids by wide convolutions, which is what a CPU is fast at; an image of
32 pixels a side passes through 16, 8 and 4, one of 28 through 14, 7 and 3, one of 8 through 8, 4
and 2:

  pixels in squares of two -> 3x3 -> pool -> 3x3, residual 3x3 -> pool -> 3x3 -> mean -> logits

each convolution with batch norm (Ioffe & Szegedy 2015) and relu.
"""

from collections.abc import Sequence
import functools

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.models import layers

LARGEST = 32  # pixels a side that the network looks at
COARSE = 16  # from this side on, pixels are taken in squares of two
SPATIAL = 28  # channels of the middle map: at 8 8 they are 1792 numbers


class Classifier(nn.Module):
  """The network, [b h w c] in [-1, 1] -> (pool [b widths[2]], spatial [b s], logits [b classes]).

  spatial: the first 28 channels of the middle map. train: norms use the batch, and their running
  averages, the collection 'batch_stats', are updated.
  """

  classes: int
  widths: Sequence[int]

  @nn.compact
  def __call__(self, x, train=False):
    def unit(x, conv):
      norm = nn.BatchNorm(not train, momentum=0.9)
      return layers.constrain(nn.relu(norm(conv(x))), 'batch', None, None, None)

    conv = lambda width: nn.Conv(width, (3, 3), use_bias=False)
    fine, middle, coarse = self.widths
    x = unit(_neighbours(_squares(x)), nn.Dense(fine, use_bias=False, dot_general=layers.flat_dot))
    x = unit(_pool(x), conv(middle))
    x += unit(x, conv(middle))
    spatial = einops.rearrange(x[..., :SPATIAL], 'b h w c -> b (h w c)')
    x = unit(_pool(x), conv(coarse))
    features = einops.reduce(x, 'b h w c -> b c', 'mean')
    return features, spatial, nn.Dense(self.classes, name='logits')(features)


def _squares(x):
  """Fine grids in squares of two pixels, [b h w c] -> [b h/2 w/2 4c]; odd sides are padded."""
  if min(x.shape[1:3]) < COARSE:
    return x
  x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
  return einops.rearrange(x, 'b (h p) (w q) c -> b h w (p q c)', p=2, q=2)


def _neighbours(x):
  """Each place with its eight neighbours, [b h w c] -> [b h w 9c].

  A convolution as a matrix product: over few channels and a fine grid, XLA's gradient of a
  convolution's kernel takes three times as long on a CPU.
  """
  height, width = x.shape[1:3]
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifts = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
  return jnp.concatenate(shifts, axis=-1)


def _pool(x):
  """The largest of two by two, [b h w c] -> [b h/2 w/2 c]; an odd last row or column is dropped.

  Written out, for XLA's gradient of a max pool takes ninety times as long on a CPU.
  """
  rows, columns = (side - side % 2 for side in x.shape[1:3])
  corners = [x[:, i:rows:2, j:columns:2] for i in range(2) for j in range(2)]
  return functools.reduce(jnp.maximum, corners)


def prepare(images):
  """uint8 [b h w c] -> what the network looks at, float32 in [-1, 1]."""
  return shrink(images.astype(jnp.float32) / 127.5 - 1)


def shrink(x):
  """Brings [b h w c] to 32 pixels a side where there are more, linearly and filtered."""
  height, width = (min(side, LARGEST) for side in x.shape[1:3])
  if (height, width) == x.shape[1:3]:
    return x
  return jax.image.resize(x, (len(x), height, width, x.shape[-1]), 'linear')
