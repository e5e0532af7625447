"""A discriminator of patches, which tells real pictures from made ones place by place.

Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", section 3.2.2
and appendix 6.1.2 (C64-C128-C256-C512):

  convolutions of 4 by 4, the first `depth` of stride 2, each to twice the channels, at most 8 times
  width; leaky relu of 0.2; a norm in all but the first and the last, which has one channel

The norm is a group norm in place of their batch norm: with moments of the batch, what is a real
picture's would depend on the microbatch and the devices it came with.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from diffax.models import layers

LEAK, DEVIATION, EPS = 0.2, 0.02, 1e-5


def patch_gan(
  width: int = 64, depth: int = 3, groups: int = 32, dtype: str = 'float32'
) -> nn.Module:
  """The discriminator; 3 layers of stride 2 see patches of 70 pixels.

  width: channels of the first convolution. depth: how many have stride 2. groups: of the norms.
  dtype: of the convolutions. Raises ValueError for a depth below 1 and groups that do not divide.
  """
  if depth < 1:
    raise ValueError(f'depth={depth} is less than 1')
  if 2 * width % groups:
    raise ValueError(f'groups={groups} does not divide {2 * width} channels, twice the width')
  return PatchGAN(width, depth, groups, jnp.dtype(dtype))


class PatchGAN(nn.Module):
  """See `patch_gan`. x [b h w c] -> [b h' w' 1], float32: how real each patch is.

  h' is h / 2^depth - 2. Raises ValueError for images of which nothing is left.
  """

  width: int
  depth: int
  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    if min(x.shape[1:3]) < 3 * 2**self.depth:
      raise ValueError(
        f'discriminator.depth={self.depth}: of {x.shape[1]}x{x.shape[2]} pixels no patch is left; '
        f'sides must be {3 * 2**self.depth} at least'
      )
    for i in range(self.depth + 1):
      x = self._conv(self.width * min(2**i, 8), f'conv{i}', 2 if i < self.depth else 1, i == 0)(x)
      x = nn.leaky_relu(self._norm(x, f'norm{i}') if i else x, LEAK)
      x = layers.constrain(x, 'batch', 'height', None, 'width')
    return self._conv(1, 'out', 1, True)(x).astype(jnp.float32)

  def _conv(self, channels, name, stride, bias):
    return nn.Conv(
      channels, (4, 4), stride, padding=[(1, 1), (1, 1)], use_bias=bias, dtype=self.dtype,
      kernel_init=nn.initializers.normal(DEVIATION), conv_general_dilated=layers.conv, name=name,
    )

  def _norm(self, x, name):
    start = lambda key, shape: 1 + DEVIATION * nn.initializers.normal(1.0)(key, shape)
    scale = self.param(f'{name}_scale', start, x.shape[-1:])
    bias = self.param(f'{name}_bias', nn.initializers.zeros, x.shape[-1:])
    return layers.group_norm(x, scale, bias, self.groups, EPS).astype(self.dtype)
