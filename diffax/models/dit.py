"""DiT: a transformer over patches, conditioned through adaptive layer norm.

Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", fig. 3, block "adaLN-Zero":

  c = time(t) + label(y);  shift, scale, gate = linear(silu(c)), zero at the start
  x <- x + gate attention(norm(x) (1 + scale) + shift)
  x <- x + gate mlp(norm(x) (1 + scale) + shift)

Blocks stand in one `nn.scan`: each kernel is `[depth in out]`, and compile time is that of one
block.
"""

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.models import attention as attentions
from diffax.models import layers

PRESETS = {  # width, depth, heads; Peebles & Xie 2023, table 1
  'S': (384, 12, 6),
  'B': (768, 12, 12),
  'L': (1024, 24, 16),
  'XL': (1152, 28, 16),
}
PATCHES = (2, 4, 8)


def dit(
  patch: int,
  width: int,
  depth: int,
  heads: int,
  classes: int = 0,
  mlp_ratio: float = 4.0,
  dropout: float = 0.0,
  remat: str = 'dots_saveable',
  dtype: str = 'float32',
) -> nn.Module:
  """A DiT of free size.

  classes: number of labels in cond['label']; label `classes` itself is the null label; 0 for none.
  dropout: rate in the residual branches. remat: what of a block is kept for the backward pass, see
  `layers.remat`; products alone take a third of the memory of all, and less time on a CPU.
  dtype: of the matrix products; parameters, norms and softmax stay in float32.
  Raises ValueError for a width that does not divide by the heads.
  """
  if width % heads:
    raise ValueError(f'model.width={width} does not divide by model.heads={heads}')
  return DiT(patch, width, depth, heads, classes, mlp_ratio, dropout, remat, jnp.dtype(dtype))


def dit_preset(
  preset: str,
  classes: int = 0,
  dropout: float = 0.0,
  remat: str = 'dots_saveable',
  dtype: str = 'float32',
) -> nn.Module:
  """A DiT by the paper's name, 'S', 'B', 'L' or 'XL' at patch 2, 4 or 8, as 'XL/2'; see `dit`."""
  allowed = [f'{size}/{patch}' for size in PRESETS for patch in PATCHES]
  if preset not in allowed:
    raise ValueError(f'model.preset={preset!r} is none of {", ".join(allowed)}')
  size, patch = preset.split('/')
  width, depth, heads = PRESETS[size]
  return dit(int(patch), width, depth, heads, classes, 4.0, dropout, remat, dtype)


def modulate(x, shift, scale):
  return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
  """One block, `(x, c, layer) -> (x, None)`, for `nn.scan`.

  x: tokens [b n d]. c: condition [b d]. layer: what this layer alone is given, all optional:
  `keys` [b] for dropout, `add` [b n d] added to its output (control signals), `keep` scalar or [b]
  that scales what the block adds to x (0 skips it), `attend` alike, 0 for the identity in place of
  attention.
  """

  heads: int
  mlp_ratio: float
  dropout: float
  dtype: Any

  @nn.compact
  def __call__(self, x, c, layer):
    d = x.shape[-1]
    xavier = nn.initializers.xavier_uniform()
    dense = lambda features, name, init=xavier: nn.Dense(
      features, dtype=self.dtype, kernel_init=init, dot_general=layers.flat_dot, name=name
    )
    norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False)
    modulation = dense(6 * d, 'modulation', nn.initializers.zeros)(nn.silu(c))
    modulation = layers.constrain(modulation.astype(jnp.float32), 'batch', 'width')
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
    keys = layer.get('keys')
    keep = layer.get('keep', jnp.ones(()))
    keep = keep[:, None, None] if keep.ndim else keep

    def branch(y, gate, number):
      fold = jax.vmap(jax.random.fold_in, (0, None))
      y = layers.dropout(y, None if keys is None else fold(keys, number), self.dropout)
      return keep * gate[:, None] * y.astype(jnp.float32)

    y = modulate(norm(x), shift_a, scale_a)
    q, k, v = (
      einops.rearrange(dense(d, name)(y), 'b n (k d) -> b n k d', k=self.heads)
      for name in ('query', 'key', 'value')
    )
    y = attentions.attention(q, k, v)
    if 'attend' in layer:
      attend = jnp.reshape(layer['attend'], (-1, 1, 1, 1)).astype(y.dtype)
      y = attend * y + (1 - attend) * v
    y = einops.rearrange(y, 'b n k d -> b n (k d)')
    x += branch(dense(d, 'out')(y), gate_a, 0)

    y = modulate(norm(x), shift_m, scale_m)
    y = nn.gelu(dense(int(self.mlp_ratio * d), 'mlp_in')(y), approximate=True)
    y = layers.constrain(y, 'batch', 'tokens', 'hidden')
    x += branch(dense(d, 'mlp_out')(y), gate_m, 1)
    if 'add' in layer:
      x += layer['add']
    return layers.constrain(x, 'batch', 'tokens', 'width'), None


class DiT(nn.Module):
  """The network; see `dit` for its fields.

  x: [b *space c], any number of space axes. t: [b], about 0 to 1000. cond: dict, `label` int [b].
  keys: [b] for dropout, given in training alone. per_layer: what blocks are given one by one, each
  with a leading axis `depth` (see `Block`). channels: how many to return, 0 for as many as x has.
  Returns float32 [b *space channels].
  """

  patch: int
  width: int
  depth: int
  heads: int
  classes: int
  mlp_ratio: float
  dropout: float
  remat: str
  dtype: Any
  channels: int = 0

  @nn.compact
  def __call__(self, x, t, cond, *, keys=None, per_layer=None):
    space, channels = x.shape[1:-1], self.channels or x.shape[-1]
    normal = nn.initializers.normal(0.02)
    dense = lambda features, name, init=normal: nn.Dense(
      features, dtype=self.dtype, kernel_init=init, dot_general=layers.flat_dot, name=name
    )

    x = dense(self.width, 'patch_in', nn.initializers.xavier_uniform())(
      layers.patchify(x, self.patch)
    )
    layers.check_split(x.shape[1], 'tokens')
    places = layers.sincos_positions([side // self.patch for side in space], self.width)
    x = layers.constrain(x.astype(jnp.float32) + places[None], 'batch', 'tokens', 'width')

    c = layers.constrain(dense(self.width, 'time_in')(layers.sinusoids(t, 256)), 'batch', 'width')
    c = dense(self.width, 'time_out')(nn.silu(c)).astype(jnp.float32)
    if self.classes:
      c += nn.Embed(self.classes + 1, self.width, embedding_init=normal, name='label')(
        cond['label']
      )
    c = layers.constrain(c, 'batch', 'width')  # else XLA splits it as it does the next kernel

    per_layer = dict(per_layer or {})
    if keys is not None and self.dropout:
      fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
      per_layer['keys'] = fold(keys, jnp.arange(self.depth))  # [depth b]
    stack = nn.scan(
      layers.remat(Block, self.remat, prevent_cse=False),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(nn.broadcast, 0),
      length=self.depth,
    )
    x, _ = stack(self.heads, self.mlp_ratio, self.dropout, self.dtype, name='blocks')(
      x, c, per_layer
    )

    zeros = nn.initializers.zeros
    modulation = dense(2 * self.width, 'modulation', zeros)(nn.silu(c))
    shift, scale = jnp.split(layers.constrain(modulation, 'batch', 'width'), 2, axis=-1)
    norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False)
    x = dense(self.patch ** len(space) * channels, 'patch_out', zeros)(
      modulate(norm(x), shift, scale)
    )
    return layers.unpatchify(x.astype(jnp.float32), space, self.patch)
