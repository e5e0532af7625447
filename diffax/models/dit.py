"""DiT: a transformer over patches, conditioned through adaptive layer norm, and text by attention.

Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", fig. 3, block "adaLN-Zero":

  c = time(t) + label(y);  shift, scale, gate = linear(silu(c)), zero at the start
  x <- x + gate attention(norm(x) (1 + scale) + shift)
  x <- x + cross(x, text), where there is text
  x <- x + gate mlp(norm(x) (1 + scale) + shift)

Chen et al. 2023, "PixArt-alpha", sec. 2.3: `cross` is attention to the text, its last product zero
at the start; and "adaLN-single", one linear(silu(c)) for all blocks, to which each adds a table.

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
MODULATIONS = ('block', 'shared')
POSITIONS = ('sincos', 'learned', 'rotary')


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
  channels: int = 0,
  text: int = 0,
  pooled: int = 0,
  resolution: bool = False,
  modulation: str = 'block',
  positions: str = 'sincos',
  base: int = 0,
  interpolation: float = 1.0,
  image: int = 0,
  mask: bool = False,
  noise_levels: int = 0,
) -> nn.Module:
  """A DiT of free size.

  classes: number of labels in cond['label']; label `classes` itself is the null label; 0 for none.
  dropout: rate in the residual branches. remat: what of a block is kept for the backward pass, see
  `layers.remat`; products alone take a third of the memory of all, and less time on a CPU.
  dtype: of the matrix products; parameters, norms and softmax stay in float32.
  channels: of the output, 0 for as many as x has.
  text: channels of cond['text'], of which cond['text_mask'] says which tokens there are; 0 for
  none. pooled: channels of cond['pooled'], which is added to the time; 0 for none. resolution:
  whether height and width of the picture in pixels, cond['size'][:, 4:], are added to the time.
  modulation: 'block', a linear layer in each (adaLN-Zero), or 'shared', one for all (adaLN-single).
  positions: 'sincos' and 'rotary' (Su et al. 2021) are of any grid, 'learned' of one of up to
  `base` patches a side, of which a smaller one takes the middle. base, interpolation: stretch the
  coordinates of the first two, see `layers.coordinates`.
  image, mask: channels of cond['image'], and whether there is a cond['mask'] of one, shown with x.
  noise_levels: how many cond['noise_level'], int [b], may be; it is added to the time; 0 for none.
  Raises ValueError for a width that does not divide by the heads, or by 3 with `resolution`, and
  for names and sizes that there are not.
  """
  if width % heads:
    raise ValueError(f'model.width={width} does not divide by model.heads={heads}')
  if resolution and width % 3:
    raise ValueError(f'model.width={width} does not divide by 3, which model.resolution needs')
  for name, value, allowed in (
    ('modulation', modulation, MODULATIONS), ('positions', positions, POSITIONS)
  ):
    if value not in allowed:
      raise ValueError(f'model.{name}={value!r} is none of {", ".join(allowed)}')
  if positions == 'learned' and base < 1:
    raise ValueError(
      f"model.base={base}: model.positions='learned' needs the side of the largest grid in patches"
    )
  if base < 0 or interpolation <= 0:
    raise ValueError(
      f'model.base={base} and model.interpolation={interpolation}: the first must not be negative, '
      'the second must be positive'
    )
  return DiT(
    patch, width, depth, heads, classes, mlp_ratio, dropout, remat, jnp.dtype(dtype), channels,
    text, pooled, resolution, modulation, positions, base, interpolation, image, mask, noise_levels,
  )


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


def pixart(
  channels: int = 8,
  text: int = 4096,
  resolution: bool = False,
  base: int = 32,
  interpolation: float = 1.0,
  dropout: float = 0.0,
  remat: str = 'dots_saveable',
  dtype: str = 'float32',
) -> nn.Module:
  """PixArt-alpha's XL/2 (Chen et al. 2023, sec. 2.3), for latents of 512 pixels; see `dit`.

  channels: of the output; the released networks have eight for four of the latent, the second half
  a variance. text: channels of the text encoder, 4096 those of T5-XXL. The networks for 1024 pixels
  have base=64 and interpolation=2, and PixArt-alpha's resolution=True.
  """
  width, depth, heads = PRESETS['XL']
  return dit(
    2, width, depth, heads, dropout=dropout, remat=remat, dtype=dtype, channels=channels, text=text,
    resolution=resolution, modulation='shared', base=base, interpolation=interpolation,
  )


def modulate(x, shift, scale):
  return x * (1 + scale[:, None]) + shift[:, None]


def _dense(dtype, init):
  """(features, name, init) -> a Dense layer of that dtype."""
  return lambda features, name, init=init: layers.Dense(
    features, dtype=dtype, kernel_init=init, dot_general=layers.flat_dot, name=name
  )


class Cross(nn.Module):
  """Attention of x [b n d] to text [b m d] of which mask [b m] or None is there: [b n d].

  Zero at the start, and where there is no text.
  """

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x, text, mask):
    dense = _dense(self.dtype, nn.initializers.xavier_uniform())
    q, k, v = (
      einops.rearrange(dense(x.shape[-1], name)(y), 'b n (k d) -> b n k d', k=self.heads)
      for name, y in (('query', x), ('key', text), ('value', text))
    )
    y = einops.rearrange(attentions.attention(q, k, v, mask), 'b n k d -> b n (k d)')
    return dense(x.shape[-1], 'out', nn.initializers.zeros)(y)


class Block(nn.Module):
  """One block, `(x, c, layer, told) -> (x, None)`, for `nn.scan`.

  x: tokens [b n d]. c: condition [b d]; of a shared modulation what comes of it, [b 6d]. layer:
  what this layer alone is given, all optional: `keys` [b] for dropout, `add` [b n d] added to its
  output (control signals), `keep` scalar or [b] that scales what the block adds to x (0 skips it),
  `attend` alike, 0 for the identity in place of attention to itself. told: what all layers are
  given, all optional: `text` [b m d], `text_mask` [b m], `turns` of `layers.rotary`.
  """

  heads: int
  mlp_ratio: float
  dropout: float
  dtype: Any
  modulation: str = 'block'

  @nn.compact
  def __call__(self, x, c, layer, told=None):
    d, told = x.shape[-1], told or {}
    dense = _dense(self.dtype, nn.initializers.xavier_uniform())
    norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulation(c, d)
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
    if 'turns' in told:
      q, k = (layers.rotate(y, told['turns']) for y in (q, k))
    y = attentions.attention(q, k, v)
    if 'attend' in layer:
      attend = jnp.reshape(layer['attend'], (-1, 1, 1, 1)).astype(y.dtype)
      y = attend * y + (1 - attend) * v
    y = einops.rearrange(y, 'b n k d -> b n (k d)')
    x += branch(dense(d, 'out')(y), gate_a, 0)

    if 'text' in told:
      cross = Cross(self.heads, self.dtype, name='cross')
      x += branch(cross(x, told['text'], told.get('text_mask')), jnp.ones((1, 1)), 2)

    y = modulate(norm(x), shift_m, scale_m)
    y = layers.gelu(dense(int(self.mlp_ratio * d), 'mlp_in')(y))
    y = layers.constrain(y, 'batch', 'tokens', 'hidden')
    x += branch(dense(d, 'mlp_out')(y), gate_m, 1)
    if 'add' in layer:
      x += layer['add']
    return layers.constrain(x, 'batch', 'tokens', 'width'), None

  def _modulation(self, c, d):
    """Shift, scale and gate [b d] of attention, then those of the MLP."""
    if self.modulation == 'shared':
      table = self.param('table', nn.initializers.zeros, (6, d), jnp.float32)
      c += einops.rearrange(table, 'i d -> 1 (i d)')
    else:
      c = _dense(self.dtype, nn.initializers.zeros)(6 * d, 'modulation')(nn.silu(c))
    return jnp.split(layers.constrain(c.astype(jnp.float32), 'batch', 'width'), 6, axis=-1)


class DiT(nn.Module):
  """The network; see `dit` for its fields.

  x: [b *space c], any number of space axes. t: [b], about 0 to 1000. cond: dict, `label` int [b],
  `text` [b m text], `text_mask` [b m], `pooled` [b pooled], `size` [b 6], `image` [b *space image],
  `mask` [b *space 1], `noise_level` [b]. keys: [b] for dropout, given in training alone. per_layer:
  what blocks are given one by one, each with a leading axis `depth` (see `Block`). channels: how
  many to return, 0 for as many as x has.
  Returns float32 [b *space channels]. Raises ValueError where the grid does not divide into
  patches, or is larger than the table of learned positions.
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
  text: int = 0
  pooled: int = 0
  resolution: bool = False
  modulation: str = 'block'
  positions: str = 'sincos'
  base: int = 0
  interpolation: float = 1.0
  image: int = 0
  mask: bool = False
  noise_levels: int = 0

  @nn.compact
  def __call__(self, x, t, cond, *, keys=None, per_layer=None):
    space, channels = x.shape[1:-1], self.channels or x.shape[-1]
    dense = _dense(self.dtype, nn.initializers.normal(0.02))
    zeros = nn.initializers.zeros
    grid = [side // self.patch for side in space]

    beside = [cond[name] for name in ('mask', 'image') if getattr(self, name)]
    x = jnp.concatenate([x, *beside], axis=-1) if beside else x
    x = dense(self.width, 'patch_in', nn.initializers.xavier_uniform())(
      layers.patchify(x, self.patch)
    )
    layers.check_split(x.shape[1], 'tokens')
    x = x.astype(jnp.float32)
    if self.positions != 'rotary':
      x += self._places(grid)[None]
    x = layers.constrain(x, 'batch', 'tokens', 'width')
    c, told = self._condition(dense, t, cond), self._told(dense, grid, cond)
    each = c
    if self.modulation == 'shared':
      each = dense(6 * self.width, 'modulation', zeros)(nn.silu(c)).astype(jnp.float32)
      each = layers.constrain(each, 'batch', 'width')

    per_layer = dict(per_layer or {})
    if keys is not None and self.dropout:
      fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
      per_layer['keys'] = fold(keys, jnp.arange(self.depth))  # [depth b]
    unroll = layers.unroll_blocks(self.depth)
    stack = nn.scan(
      layers.remat(Block, self.remat, prevent_cse=unroll > 1),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(nn.broadcast, 0, nn.broadcast),
      length=self.depth,
      unroll=unroll,
    )(self.heads, self.mlp_ratio, self.dropout, self.dtype, self.modulation, name='blocks')
    x, _ = stack(x, each, per_layer, told)

    if self.modulation == 'shared':
      table = self.param('table', zeros, (2, self.width), jnp.float32)
      modulation = einops.rearrange(table, 'i d -> 1 (i d)') + jnp.tile(c, 2)
    else:
      modulation = dense(2 * self.width, 'modulation', zeros)(nn.silu(c))
    shift, scale = jnp.split(layers.constrain(modulation, 'batch', 'width'), 2, axis=-1)
    norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False)
    x = dense(self.patch ** len(space) * channels, 'patch_out', zeros)(
      modulate(norm(x), shift, scale)
    )
    return layers.unpatchify(x.astype(jnp.float32), space, self.patch)

  def _places(self, grid):
    """What the places of a grid add to its patches: [n d]."""
    if self.positions == 'sincos':
      return layers.sincos_positions(grid, self.width, base=self.base, scale=self.interpolation)
    if max(grid) > self.base:
      raise ValueError(
        f'a grid of {tuple(grid)} patches is larger than the {self.base} a side that there are '
        'learned positions of: raise model.base, or take model.positions=rotary'
      )
    normal = nn.initializers.normal(0.02)
    sides = (self.base,) * len(grid)
    table = self.param('positions', normal, (*sides, self.width), jnp.float32)
    starts = [(self.base - side) // 2 for side in grid]
    middle = jax.lax.dynamic_slice(table, (*starts, 0), (*grid, self.width))
    return einops.rearrange(middle, '... d -> (...) d')

  def _condition(self, dense, t, cond):
    """Time, label and what else is said once of an example: float32 [b d]."""
    def mlp(y, name, width=self.width):
      y = layers.constrain(dense(width, f'{name}_in')(y), 'batch', 'width')
      return dense(width, f'{name}_out')(nn.silu(y)).astype(jnp.float32)

    c = mlp(layers.sinusoids(t, 256), 'time')
    if self.classes:
      normal = nn.initializers.normal(0.02)
      c += nn.Embed(self.classes + 1, self.width, embedding_init=normal, name='label')(
        cond['label']
      )
    if self.pooled:
      c += mlp(cond['pooled'], 'pooled')
    if self.noise_levels:
      c += mlp(layers.sinusoids(cond['noise_level'], 256), 'noise_level')
    if self.resolution:  # Chen et al. 2023, app. A: each number by itself, a third of the channels
      h, w = cond['size'][:, 4].astype(jnp.float32), cond['size'][:, 5].astype(jnp.float32)
      sides = mlp(layers.sinusoids(jnp.concatenate([h, w]), 256), 'resolution', self.width // 3)
      sides = einops.rearrange(sides, '(i b) d -> b (i d)', i=2)
      ratio = mlp(layers.sinusoids(h / w, 256), 'aspect', self.width // 3)
      c += jnp.concatenate([sides, ratio], axis=-1)
    return layers.constrain(c, 'batch', 'width')  # else XLA splits it as it does the next kernel

  def _told(self, dense, grid, cond):
    """What all blocks are given beside the condition: see `Block`."""
    told = {}
    if self.positions == 'rotary':
      told['turns'] = layers.rotary(
        grid, self.width // self.heads, base=self.base, scale=self.interpolation
      )
    if self.text:
      y = layers.gelu(dense(self.width, 'text_in')(cond['text']))
      text = dense(self.width, 'text_out')(y)
      told['text'] = layers.constrain(text, 'batch', None, 'width')
      if 'text_mask' in cond:
        told['text_mask'] = cond['text_mask']
    return told
