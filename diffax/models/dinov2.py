"""DINOv2: a vision transformer trained without labels, whose features are close to what people see.

Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision"; Stein et al. 2023,
"Exposing flaws of generative model evaluation metrics", measure Fréchet distances between its class
tokens. Blocks, with a learned scale for each channel of a branch (Touvron et al. 2021, LayerScale):

  x <- x + scale1 attention(norm1(x));  x <- x + scale2 mlp(norm2(x))

Names of tensors are those of Hugging Face's files, facebook/dinov2-{small,base,large,giant}.
"""

import re

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax.models import attention as attentions
from diffax.models import layers

SIDE, HEAD = 224, 64  # pixels a side; width of a head in all four sizes
SPATIAL = 7  # channels of the patch tokens
BITS = 22  # of PIL's weights behind the point
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in [0, 1]


class Block(nn.Module):
  """One block, `(x [b n d], None) -> (x, None)`, for `nn.scan`. swiglu: the gated mlp of giant."""

  hidden: int
  swiglu: bool

  @nn.compact
  def __call__(self, x, _):
    d = x.shape[-1]
    norm = lambda name: nn.LayerNorm(1e-6, use_fast_variance=False, name=name)
    scale = lambda name: self.param(name, nn.initializers.ones, (d,))[None, None]
    y = norm('norm1')(x)
    q, k, v = (
      einops.rearrange(nn.Dense(d, name=name)(y), 'b n (k d) -> b n k d', d=HEAD)
      for name in ('query', 'key', 'value')
    )
    y = einops.rearrange(attentions.attention(q, k, v), 'b n k d -> b n (k d)')
    x += scale('scale1') * nn.Dense(d, name='out')(y)
    y = nn.Dense(self.hidden * (1 + self.swiglu), name='mlp_in')(norm('norm2')(x))
    if self.swiglu:
      gate, y = jnp.split(y, 2, axis=-1)
      y = nn.silu(gate) * y
    else:
      y = nn.gelu(y, approximate=False)
    x += scale('scale2') * nn.Dense(d, name='mlp_out')(y)
    return layers.constrain(x, 'batch', 'tokens', 'width'), None


class Dinov2(nn.Module):
  """The network, [b h w 3] normalised -> (class token [b d], patch tokens [b n d]), both normed.

  places: side of the square grid that positions were learned on; they are interpolated to others.
  """

  width: int
  depth: int
  hidden: int
  swiglu: bool
  patch: int
  places: int

  @nn.compact
  def __call__(self, x):
    grid = [side // self.patch for side in x.shape[1:3]]
    x = nn.Dense(self.width, name='patch_in')(layers.patchify(x, self.patch))  # [b n d]
    normal = nn.initializers.normal(0.02)
    first = self.param('class', normal, (1, 1, self.width))
    positions = self.param('positions', normal, (1, 1 + self.places**2, self.width))
    x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, self.width)), x], axis=1)
    x += _interpolate(positions, self.places, grid)
    stack = nn.scan(
      Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=self.depth
    )
    x, _ = stack(self.hidden, self.swiglu, name='blocks')(x, None)
    x = nn.LayerNorm(1e-6, use_fast_variance=False, name='norm')(x)
    return x[:, 0], x[:, 1:]


def _interpolate(positions, side, grid):
  """Positions [1 (1 + side^2) d], the class token's first, of another grid."""
  if list(grid) == [side, side]:
    return positions
  table = einops.rearrange(positions[:, 1:], '1 (h w) d -> h w d', h=side)
  rows, columns = (_cubic(side, n) for n in grid)
  table = jnp.einsum('hwd,yh,xw->yxd', table, rows, columns)
  return jnp.concatenate([positions[:, :1], einops.rearrange(table, 'h w d -> 1 (h w) d')], axis=1)


def _cubic(old, new):
  """Matrix [new old] of cubic interpolation between pixels as areas, edges repeated outwards.

  With a = -3/4, torch's choice, and no filter against aliasing.
  """
  places = (np.arange(new) + 0.5) * old / new - 0.5
  matrix = np.zeros((new, old))
  for tap in range(-1, 3):
    at = np.floor(places) + tap
    columns = np.clip(at, 0, old - 1).astype(int)
    np.add.at(matrix, (np.arange(new), columns), _keys(places - at, -0.75))
  return matrix.astype(np.float32)


def _keys(s, a):
  """The cubic convolution kernel of Keys 1981, of distances s in pixels; a: its slope at 1."""
  s = np.abs(s)
  near = ((a + 2) * s - (a + 3)) * s * s + 1
  far = ((a * s - 5 * a) * s + 8 * a) * s - 4 * a
  return np.where(s <= 1, near, np.where(s < 2, far, 0))


def prepare(images):
  """uint8 [b h w c], c of 1 or 3 -> float32 [b 224 224 3] less ImageNet's mean, by its deviation.

  Resized as PIL does, as in the code of Stein et al. 2023.
  """
  x = resize(images, SIDE).astype(jnp.float32) / 255
  x = jnp.broadcast_to(x, (*x.shape[:-1], 3))
  centre, scale = (jnp.reshape(jnp.array(v), (1, 1, 1, 3)) for v in (MEAN, DEVIATION))
  return (x - centre) / scale


def resize(images, side):
  """PIL's bicubic resize to the last bit, uint8 [b h w c] -> int32 [b side side c] in 0..255.

  Keys 1981 with a = -1/2, stretched where it shrinks, its parts beyond an edge left out; along a
  row first, and each axis rounded. Weights are multiples of 2^-22.
  """
  x = images.astype(jnp.int32)
  for axis, product in ((2, 'nw,bhwc->bhnc'), (1, 'nh,bhwc->bnwc')):
    old = x.shape[axis]
    if old != side:
      stretch = max(old / side, 1)
      centres = (np.arange(side) + 0.5) * (old / side)
      weights = _keys((np.arange(old)[None] + 0.5 - centres[:, None]) / stretch, -0.5)
      weights = np.rint(weights / weights.sum(1, keepdims=True) * 2**BITS).astype(np.int32)
      x = jnp.einsum(product, weights, x)
      x = jnp.clip((x + 2 ** (BITS - 1)) >> BITS, 0, 255)
  return x


DENSE = {  # of a block, ours: theirs
  'query': 'attention.attention.query',
  'key': 'attention.attention.key',
  'value': 'attention.attention.value',
  'out': 'attention.output.dense',
}
MLP = {False: ('mlp.fc1', 'mlp.fc2'), True: ('mlp.weights_in', 'mlp.weights_out')}
PATCHES = 'embeddings.patch_embeddings.projection'


def network(shapes):
  """The `Dinov2` that tensors of these shapes {name: shape} are of.

  Raises ValueError where they are of none, naming what is missing.
  """
  numbers = [re.match(r'encoder\.layer\.(\d+)\.', name) for name in shapes]
  depth = 1 + max((int(m[1]) for m in numbers if m), default=-1)
  swiglu = 'encoder.layer.0.mlp.weights_out.weight' in shapes
  needed = {
    f'{PATCHES}.weight': 4,
    'embeddings.position_embeddings': 3,
    f'encoder.layer.0.{MLP[swiglu][1]}.weight': 2,
  }
  missing = [name for name, rank in needed.items() if len(shapes.get(name, ())) != rank]
  if missing:
    raise ValueError(f'no {", ".join(missing)}: these are not the tensors of a DINOv2')
  width, _, patch, _ = shapes[f'{PATCHES}.weight']
  places = round((shapes['embeddings.position_embeddings'][1] - 1) ** 0.5)
  if width % HEAD:
    raise ValueError(f'width {width} does not divide into heads of {HEAD}')
  hidden = shapes[f'encoder.layer.0.{MLP[swiglu][1]}.weight'][1]
  return Dinov2(width, depth, hidden, swiglu, patch, places)


def expected(model):
  """({name: shape} of what the file of a `Dinov2` must hold, {name: shape} of what it may).

  May: the token that training puts in place of hidden patches.
  """
  d, must = model.width, {}

  def dense(name, into, out):
    return {f'{name}.weight': (out, into), f'{name}.bias': (out,)}

  def norm(name):
    return {f'{name}.weight': (d,), f'{name}.bias': (d,)}

  must['embeddings.cls_token'] = (1, 1, d)
  must['embeddings.position_embeddings'] = (1, 1 + model.places**2, d)
  must |= {f'{PATCHES}.weight': (d, 3, model.patch, model.patch), f'{PATCHES}.bias': (d,)}
  for i in range(model.depth):
    layer, (mlp_in, mlp_out) = f'encoder.layer.{i}', MLP[model.swiglu]
    must |= norm(f'{layer}.norm1') | norm(f'{layer}.norm2')
    for name in DENSE.values():
      must |= dense(f'{layer}.{name}', d, d)
    must |= dense(f'{layer}.{mlp_in}', d, model.hidden * (1 + model.swiglu))
    must |= dense(f'{layer}.{mlp_out}', model.hidden, d)
    must |= {f'{layer}.layer_scale{n}.lambda1': (d,) for n in (1, 2)}
  return must | norm('layernorm'), {'embeddings.mask_token': (1, d)}


def from_torch(model, tensors):
  """Parameters of `model` from tensors {name: numpy array} as `expected` tells; float32."""
  names = {**DENSE, **dict(zip(('mlp_in', 'mlp_out'), MLP[model.swiglu]))}

  def dense(name):
    return {'kernel': tensors[f'{name}.weight'].T, 'bias': tensors[f'{name}.bias']}

  def norm(name):
    return {'scale': tensors[f'{name}.weight'], 'bias': tensors[f'{name}.bias']}

  def block(i):
    layer = f'encoder.layer.{i}'
    scales = {f'scale{n}': tensors[f'{layer}.layer_scale{n}.lambda1'] for n in (1, 2)}
    norms = {name: norm(f'{layer}.{name}') for name in ('norm1', 'norm2')}
    return {ours: dense(f'{layer}.{theirs}') for ours, theirs in names.items()} | scales | norms

  patches = einops.rearrange(tensors[f'{PATCHES}.weight'], 'o c h w -> (h w c) o')
  params = {
    'patch_in': {'kernel': patches, 'bias': tensors[f'{PATCHES}.bias']},
    'class': tensors['embeddings.cls_token'],
    'positions': tensors['embeddings.position_embeddings'],
    'blocks': jax.tree.map(lambda *leaves: np.stack(leaves), *map(block, range(model.depth))),
    'norm': norm('layernorm'),
  }
  return jax.tree.map(np.float32, params)
