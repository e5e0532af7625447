"""Inception v3 as the Fréchet inception distance knows it: the TensorFlow graph of December 2015.

Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", with the turns
that the graph published for FID (Heusel et al. 2017) takes: average pools count no padding, the
last block pools by the maximum, and there are 1008 logits. Names are those of pytorch-fid, whose
state dict `from_torch` reads; each batch norm is folded into the convolution before it:

  kernel <- kernel scale / sqrt(var + 0.001),  bias = shift - mean scale / sqrt(var + 0.001)
"""

from typing import NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax.models import layers

SIDE, LOGITS = 299, 1008
SPATIAL = 7  # channels that sFID looks at (Nash et al. 2021, and the evaluator of ADM)
EPSILON = 1e-3  # of the batch norms


class Conv(NamedTuple):
  """A convolution and relu; one of stride 1 keeps the grid, one of stride 2 pads nothing."""

  name: str
  features: int
  height: int = 1
  width: int = 1
  stride: int = 1


def _a(pool):
  return (
    (Conv('branch1x1', 64),),
    (Conv('branch5x5_1', 48), Conv('branch5x5_2', 64, 5, 5)),
    (
      Conv('branch3x3dbl_1', 64),
      Conv('branch3x3dbl_2', 96, 3, 3),
      Conv('branch3x3dbl_3', 96, 3, 3),
    ),
    ('average', Conv('branch_pool', pool)),
  )


def _c(width):
  return (
    (Conv('branch1x1', 192),),
    (
      Conv('branch7x7_1', width),
      Conv('branch7x7_2', width, 1, 7),
      Conv('branch7x7_3', 192, 7, 1),
    ),
    (
      Conv('branch7x7dbl_1', width),
      Conv('branch7x7dbl_2', width, 7, 1),
      Conv('branch7x7dbl_3', width, 1, 7),
      Conv('branch7x7dbl_4', width, 7, 1),
      Conv('branch7x7dbl_5', 192, 1, 7),
    ),
    ('average', Conv('branch_pool', 192)),
  )


def _e(pool):
  return (
    (Conv('branch1x1', 320),),
    (
      Conv('branch3x3_1', 384),
      (Conv('branch3x3_2a', 384, 1, 3), Conv('branch3x3_2b', 384, 3, 1)),
    ),
    (
      Conv('branch3x3dbl_1', 448),
      Conv('branch3x3dbl_2', 384, 3, 3),
      (Conv('branch3x3dbl_3a', 384, 1, 3), Conv('branch3x3dbl_3b', 384, 3, 1)),
    ),
    (pool, Conv('branch_pool', 192)),
  )


_B = (
  (Conv('branch3x3', 384, 3, 3, 2),),
  (
    Conv('branch3x3dbl_1', 64),
    Conv('branch3x3dbl_2', 96, 3, 3),
    Conv('branch3x3dbl_3', 96, 3, 3, 2),
  ),
  ('halve',),
)
_D = (
  (Conv('branch3x3_1', 192), Conv('branch3x3_2', 320, 3, 3, 2)),
  (
    Conv('branch7x7x3_1', 192),
    Conv('branch7x7x3_2', 192, 1, 7),
    Conv('branch7x7x3_3', 192, 7, 1),
    Conv('branch7x7x3_4', 192, 3, 3, 2),
  ),
  ('halve',),
)
MIXED = {  # in order; TensorFlow's `mixed`, `mixed_1`, ..., `mixed_10`
  'Mixed_5b': _a(32),
  'Mixed_5c': _a(64),
  'Mixed_5d': _a(64),
  'Mixed_6a': _B,
  'Mixed_6b': _c(128),
  'Mixed_6c': _c(160),
  'Mixed_6d': _c(160),
  'Mixed_6e': _c(192),
  'Mixed_7a': _D,
  'Mixed_7b': _e('average'),
  'Mixed_7c': _e('max'),
}


def _halve(x):
  return nn.max_pool(x, (3, 3), (2, 2), 'VALID')


POOLS = {
  'halve': _halve,
  'average': lambda x: nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False),
  'max': lambda x: nn.max_pool(x, (3, 3), padding='SAME'),
}


class Mixed(nn.Module):
  """Branches side by side, [b h w c] -> [b h' w' c']; in each its steps one after the other.

  A step is a pool by name, a `Conv`, or several of them side by side.
  """

  branches: tuple

  @nn.compact
  def __call__(self, x):
    outs = []
    for branch in self.branches:
      y = x
      for step in branch:
        if isinstance(step, str):
          y = POOLS[step](y)
        else:
          side_by_side = [step] if isinstance(step, Conv) else step
          y = jnp.concatenate([_conv(y, c) for c in side_by_side], axis=-1)
      outs.append(y)
    return jnp.concatenate(outs, axis=-1)


def _conv(x, conv, padding=None):
  """Called within a compact method: the submodule is that module's."""
  padding = padding or ('SAME' if conv.stride == 1 else 'VALID')
  kernel, strides = (conv.height, conv.width), (conv.stride, conv.stride)
  return nn.relu(nn.Conv(conv.features, kernel, strides, padding, name=conv.name)(x))


class Inception(nn.Module):
  """The network, [b 299 299 3] in [-1, 1] -> (pool [b 2048], spatial [b 2023], logits [b 1008]).

  pool: the last average pool. spatial: of the seventh mixed block the first 7 channels of the first
  branch, behind its relu (`mixed_6/conv` in TensorFlow), 17 17 7. logits: without a bias, as in the
  inception score (Salimans et al. 2016), whose code multiplies `pool` by the last matrix alone; so
  do ADM's evaluator and torch-fidelity (`logits_unbiased`).
  """

  @nn.compact
  def __call__(self, x):
    x = _conv(x, Conv('Conv2d_1a_3x3', 32, 3, 3, 2))  # [b 149 149 32]
    x = _conv(x, Conv('Conv2d_2a_3x3', 32, 3, 3), 'VALID')
    x = _halve(_conv(x, Conv('Conv2d_2b_3x3', 64, 3, 3)))  # [b 73 73 64]
    x = _conv(x, Conv('Conv2d_3b_1x1', 80))
    x = _halve(_conv(x, Conv('Conv2d_4a_3x3', 192, 3, 3), 'VALID'))  # [b 35 35 192]
    for name, branches in MIXED.items():
      x = layers.constrain(Mixed(branches, name=name)(x), 'batch', None, None, None)
      if name == 'Mixed_6d':
        spatial = einops.rearrange(x[..., :SPATIAL], 'b h w c -> b (h w c)')
    pool = einops.reduce(x, 'b h w c -> b c', 'mean')
    return pool, spatial, nn.Dense(LOGITS, use_bias=False, name='fc')(pool)


def prepare(images):
  """uint8 [b h w c], c of 1 or 3 -> float32 [b 299 299 3] in [-1, 1], as in pytorch-fid.

  Bilinear, pixels being areas (`align_corners=False`), without a filter against aliasing.
  """
  x = images.astype(jnp.float32) / 255
  x = jax.image.resize(x, (len(x), SIDE, SIDE, x.shape[-1]), 'linear', antialias=False)
  return 2 * jnp.broadcast_to(x, (*x.shape[:-1], 3)) - 1


def _shapes():
  """{('Mixed_5b', 'branch1x1'): shape of its kernel [h w in out]}; ('fc',): [in out]."""
  tree = jax.eval_shape(
    lambda: Inception().init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))['params']
  )
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {tuple(k.key for k in path[:-1]): a.shape for path, a in flat if path[-1].key == 'kernel'}


def expected():
  """({name: shape} of what pytorch-fid's state dict must hold, {name: shape} of what it may).

  May: how many batches the norms have seen, which nothing needs.
  """
  must, may = {'fc.bias': (LOGITS,)}, {}
  for path, shape in _shapes().items():
    name = '.'.join(path)
    if path == ('fc',):
      must['fc.weight'] = shape[::-1]
      continue
    height, width, into, out = shape
    must[f'{name}.conv.weight'] = (out, into, height, width)
    norm = ('weight', 'bias', 'running_mean', 'running_var')
    must |= {f'{name}.bn.{part}': (out,) for part in norm}
    may[f'{name}.bn.num_batches_tracked'] = ()
  return must, may


def from_torch(tensors):
  """Parameters of `Inception` from pytorch-fid's state dict {name: numpy array}; see `expected`.

  `fc.bias` is no part of them. float32; the norms are folded in float64.
  """
  params = {}
  for path in _shapes():
    name, at = '.'.join(path), params
    for key in path:
      at = at.setdefault(key, {})
    if path == ('fc',):
      at['kernel'] = np.float32(tensors['fc.weight'].T)
      continue
    scale, shift, mean, var = (
      np.float64(tensors[f'{name}.bn.{part}'])
      for part in ('weight', 'bias', 'running_mean', 'running_var')
    )
    scale = scale / np.sqrt(var + EPSILON)
    kernel = einops.rearrange(np.float64(tensors[f'{name}.conv.weight']), 'o i h w -> h w i o')
    at['kernel'] = np.float32(kernel * scale)
    at['bias'] = np.float32(shift - mean * scale)
  return params
