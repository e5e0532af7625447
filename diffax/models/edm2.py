"""EDM2: a U-Net without biases or norms to learn, whose every layer keeps the magnitude of things.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
configuration G. The magnitude of x is the root of the mean of x^2, and is 1 at every edge:

  filter    w / |w|, whatever the norm of the stored w            eq. 47
  encoder   x <- normalized(x)                                    eq. 30
  branch    y = filter(mp_silu(filter(mp_silu(x)) c)),  c = 1 + gain filter(emb)
  block     x <- mp_sum(x, y, 0.3), then mp_sum(x, attention(x), 0.3) where it attends
  decoder   x <- mp_cat(x, skip)                                  eq. 103

Every normalised kernel is stored as a matrix `[side side in, out]`, or `[n, side side in, out]`
where `nn.scan` runs n equal blocks, so that forced weight normalisation (`optimizer.unit_kernels`)
is one rule for them all: filters of unit variance along axis -2.
"""

import itertools
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax.models import attention as attentions
from diffax.models import layers

PRESETS = {'XS': 128, 'S': 192, 'M': 256, 'L': 320, 'XL': 384, 'XXL': 448}  # widths
RESIDUAL, EMBEDDING = 0.3, 0.5  # the second one's part in a sum; app. B.7
LIMIT = 256.0  # of activations, for half precision; app. B


def edm2(
  width: int,
  multipliers: tuple = (1, 2, 3, 4),
  blocks: int = 3,
  attention: tuple = (16, 8),
  classes: int = 0,
  dropout: float = 0.0,
  head: int = 64,
  remat: str = 'none',
  dtype: str = 'float32',
) -> nn.Module:
  """An EDM2 network of free size; the defaults are the paper's.

  width: channels of a level of multiplier 1. multipliers: one a level, each at half the side of
  that before. blocks: of a level in the encoder; the decoder has one more. attention: heights at
  which blocks attend; the first block of the decoder always does. classes: number of labels in
  cond['label']; label `classes` itself is the null label; 0 for none. dropout: rate in the residual
  branches. head: channels of an attention head. remat: what of a block is kept for the backward
  pass, see `layers.remat`. dtype: of activations, convolutions and products; parameters, norms and
  softmax are float32.
  Raises ValueError for sizes below 1; the network itself where sides or heads do not divide.
  """
  least = min(multipliers, default=0)
  for name, size in dict(width=width, blocks=blocks, head=head, multipliers=least).items():
    if size < 1:
      raise ValueError(f'model.{name}: {size} is less than 1')
  return EDM2(
    width, tuple(multipliers), blocks, tuple(attention), classes, dropout, head, remat,
    jnp.dtype(dtype),
  )


def edm2_preset(
  preset: str, classes: int = 0, dropout: float = 0.0, remat: str = 'none', dtype: str = 'float32'
) -> nn.Module:
  """An EDM2 network by the paper's name, 'XS' to 'XXL'; see `edm2`.

  The paper's have a dropout of 0.1 from M on. Raises ValueError for another name.
  """
  if preset not in PRESETS:
    raise ValueError(f'model.preset={preset!r} is none of {", ".join(PRESETS)}')
  return edm2(PRESETS[preset], classes=classes, dropout=dropout, remat=remat, dtype=dtype)


# --- operations -----------------------------------------------------------------------------------


def normalized(x, axis=-1):
  """x at magnitude 1 along `axis`: [...] -> [...], reckoned in float32.

  Along channels it is pixel norm, eq. 30; along a kernel's axis -2, of forced weight normalisation,
  eq. 66. What is smaller than 1e-4 stays smaller than 1.
  """
  wide = x.astype(jnp.float32)
  square = jnp.mean(wide**2, axis=axis, keepdims=True)
  return (wide * jax.lax.rsqrt(square + 1e-8)).astype(x.dtype)


def mp_silu(x):
  """SiLU over the magnitude that it gives normal x: eq. 81."""
  return nn.silu(x) / 0.596


def mp_sum(a, b, t):
  """(1 - t) a + t b over the magnitude of that for independent a and b: eq. 88."""
  return ((1 - t) * a + t * b) / ((1 - t) ** 2 + t**2) ** 0.5


def mp_cat(a, b, t=0.5):
  """[a, b] along channels, in which b has part t: eq. 103.

  [... m], [... n] -> [... m + n] of magnitude 1, of which the two have (1 - t)^2 to t^2 of the sum
  of squares, however many channels each brings.
  """
  m, n = a.shape[-1], b.shape[-1]
  scale = ((m + n) / ((1 - t) ** 2 + t**2)) ** 0.5
  return jnp.concatenate([scale * (1 - t) / m**0.5 * a, scale * t / n**0.5 * b], axis=-1)


def mp_fourier(t, width):
  """Random features sqrt(2) cos(2 pi (f t + phase)) of times near 1: [b] -> [b width], eq. 75.

  f is normal, phase uniform; both are constants of the function, which no optimizer touches.
  """
  draw = np.random.default_rng(0)
  frequency, phase = draw.normal(size=width), draw.uniform(size=width)
  constant = lambda a: jnp.asarray(a, jnp.float32)[None]
  angle = t.astype(jnp.float32)[:, None] * constant(frequency) + constant(phase)
  return 2**0.5 * jnp.cos(2 * jnp.pi * angle)


def resampled(x, way):
  """[b h w c] at half the side ('down', means of 2 x 2), twice ('up', repeated), or as is."""
  if way == 'down':
    return einops.reduce(x, 'b (h i) (w j) c -> b h w c', 'mean', i=2, j=2)
  if way == 'up':
    return einops.repeat(x, 'b h w c -> b (h i) (w j) c', i=2, j=2)
  return x


def _unit(key, shape):
  return normalized(jax.random.normal(key, shape), axis=-2)


# --- layers ---------------------------------------------------------------------------------------


class Filters(nn.Module):
  """A convolution of `side` by `side`, or for side 1 a linear layer on any x [... c]; eq. 47.

  Each output is the product with a filter of norm 1, whatever the norm of the stored one, so that
  gradients are orthogonal to it. No bias.
  """

  features: int
  side: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    fan_in = self.side**2 * x.shape[-1]
    kernel = self.param('kernel', _unit, (fan_in, self.features))
    kernel = (normalized(kernel, axis=-2) / fan_in**0.5).astype(self.dtype)
    if self.side == 1:
      return layers.flat_dot(x.astype(self.dtype), kernel, None)
    window = einops.rearrange(kernel, '(h w i) o -> h w i o', h=self.side, w=self.side)
    return layers.conv(x.astype(self.dtype), window, (1, 1), 'SAME')


class Embedding(nn.Module):
  """mp_silu of the sum of what time and label say: t [b], cond -> [b features], float32.

  A label's row is the product of the kernel with a one-hot vector of magnitude 1.
  """

  width: int
  features: int
  classes: int

  @nn.compact
  def __call__(self, t, cond):
    emb = Filters(self.features, name='noise')(mp_fourier(t, self.width))
    if self.classes:
      emb = mp_sum(emb, Label(self.classes, self.features, name='label')(cond['label']), EMBEDDING)
    return mp_silu(emb)


class Label(nn.Module):
  """Rows [b features] of labels [b], the last of them the null label."""

  classes: int
  features: int

  @nn.compact
  def __call__(self, label):
    kernel = self.param('kernel', _unit, (self.classes + 1, self.features))
    return normalized(kernel, axis=-2)[label]


class Attention(nn.Module):
  """Attention by cosines over all places of [b h w c]: the branch alone; eq. 34.

  Queries, keys and values have magnitude 1 a head, so that scores stay within the root of `head`.
  """

  head: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    features, height = x.shape[-1], x.shape[1]
    q, k, v = (
      normalized(
        einops.rearrange(
          Filters(features, 1, self.dtype, name=name)(x), 'b h w (k d) -> b (h w) k d', d=self.head
        )
      )
      for name in ('query', 'key', 'value')
    )
    y = einops.rearrange(attentions.attention(q, k, v), 'b (h w) k d -> b h w (k d)', h=height)
    return Filters(features, 1, self.dtype, name='out')(y)


class Spec(NamedTuple):
  """What a block is; blocks of one Spec have parameters of one shape.

  encodes: whether it is the encoder's. inputs, skip: channels it is given, by the block before and
  from the encoder. resample: '', 'down' or 'up', before all else.
  """

  encodes: bool
  inputs: int
  features: int
  attend: bool = False
  skip: int = 0
  resample: str = ''


def plan(widths, blocks, sides, attention):
  """The encoder's and the decoder's Specs, in order; app. B, after Dhariwal & Nichol's ADM.

  widths, sides: channels and height of each level. The encoder's outputs, and before them its
  first convolution's, are the decoder's skips, last first.
  """
  encoder, decoder, inputs = [], [], widths[0]
  attends = [side in attention for side in sides]
  for level, features in enumerate(widths):
    if level:
      encoder.append(Spec(True, inputs, inputs, resample='down'))
    for _ in range(blocks):
      encoder.append(Spec(True, inputs, features, attends[level]))
      inputs = features
  skips = [widths[0], *(spec.features for spec in encoder)]
  for level, features in reversed(list(enumerate(widths))):
    if level == len(widths) - 1:
      decoder += [Spec(False, inputs, inputs, True), Spec(False, inputs, inputs)]
    else:
      decoder.append(Spec(False, inputs, inputs, resample='up'))
    for _ in range(blocks + 1):
      decoder.append(Spec(False, inputs, features, attends[level], skips.pop()))
      inputs = features
  return encoder, decoder


class Block(nn.Module):
  """One block, `(x, emb, layer) -> (x, x)`, in the decoder `(x, None)`, for `nn.scan`.

  x: [b h w inputs]. emb: [b e]. layer: what this block alone is given, `skip` [b h w c] in the
  decoder and `keys` [b] for dropout.
  """

  spec: Spec
  head: int
  dropout: float
  dtype: Any

  @nn.compact
  def __call__(self, x, emb, layer):
    spec = self.spec
    filters = lambda name, side=3: Filters(spec.features, side, self.dtype, name=name)
    if spec.skip:
      x = mp_cat(x, layer['skip'])
    x = resampled(x, spec.resample)
    match = filters('skip', 1) if x.shape[-1] != spec.features else lambda x: x
    if spec.encodes:
      x = normalized(match(x))

    gain = self.param('gain', nn.initializers.zeros, ())
    c = gain * filters('embedding', 1)(emb).astype(jnp.float32) + 1
    c = layers.constrain(c, 'batch', 'width')
    y = filters('conv_in')(mp_silu(x))
    y = mp_silu(y * c.astype(self.dtype)[:, None, None])
    y = filters('conv_out')(layers.dropout(y, layer.get('keys'), self.dropout))

    x = mp_sum(x if spec.encodes else match(x), y, RESIDUAL)
    if spec.attend:
      x = mp_sum(x, Attention(self.head, self.dtype, name='attention')(x), RESIDUAL)
    x = jnp.clip(x, -LIMIT, LIMIT)
    x = layers.constrain(x, 'batch', 'height', None, 'width')
    return x, x if spec.encodes else None


# --- the network ----------------------------------------------------------------------------------


class EDM2(nn.Module):
  """The network; see `edm2` for its fields.

  x: [b h w c] of magnitude 1. t: [b], log(sigma) / 4, about -2 to 1: the time of EDM's
  preconditioning, not scaled. cond: dict, `label` int [b]. keys: [b] for dropout, given in training
  alone. per_layer: None. channels: how many to return, 0 for as many as x has. Returns float32
  [b h w channels].
  Raises ValueError for sides that the levels do not halve, or heads that do not divide.
  """

  width: int
  multipliers: tuple
  blocks: int
  attention: tuple
  classes: int
  dropout: float
  head: int
  remat: str
  dtype: Any
  channels: int = 0

  def specs(self, shape):
    """`plan` for inputs of a shape [b h w c]."""
    if len(shape) != 4:
      raise ValueError(f'edm2 wants images [b h w c], not an input of shape {shape}')
    parts = 2 ** (len(self.multipliers) - 1)
    if shape[1] % parts or shape[2] % parts:
      raise ValueError(
        f'a grid of {shape[1:3]} does not divide by {parts}, to be halved from level to level of '
        f'model.multipliers={self.multipliers}'
      )
    layers.check_split(shape[1], 'height')
    widths = [self.width * m for m in self.multipliers]
    sides = [shape[1] // 2**level for level in range(len(widths))]
    encoder, decoder = plan(widths, self.blocks, sides, self.attention)
    for spec in encoder + decoder:
      if spec.attend and spec.features % self.head:
        raise ValueError(
          f'model.head={self.head} does not divide the {spec.features} channels of a block that '
          'attends'
        )
    return encoder, decoder

  @nn.compact
  def __call__(self, x, t, cond, *, keys=None, per_layer=None):
    if per_layer:
      raise ValueError(f'edm2 takes nothing layer by layer, but is given {sorted(per_layer)}')
    channels = self.channels or x.shape[-1]
    encoder, decoder = self.specs(x.shape)
    emb = Embedding(self.width, self.width * max(self.multipliers), self.classes, name='embedding')
    walk = self._walk(layers.constrain(emb(t, cond), 'batch', 'width'), keys)

    x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)  # in place of every bias
    x = Filters(encoder[0].inputs, 3, self.dtype, name='conv_in')(x)
    x, outs = walk('encoder', encoder, x, 0)
    x, _ = walk('decoder', decoder, x, len(encoder), outs)

    gain = self.param('gain', nn.initializers.zeros, ())
    return gain * Filters(channels, 3, self.dtype, name='conv_out')(x).astype(jnp.float32)

  def _walk(self, emb, keys):
    """(name, specs, x, number of the first, skips) -> (x, [x, then the blocks' outputs])."""

    def layer(spec, first, count, skips):
      """What blocks from number `first` on are given, each with a leading axis."""
      given = {}
      if spec.skip:
        given['skip'] = jnp.stack([skips.pop() for _ in range(count)])
      if keys is not None and self.dropout:
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
        given['keys'] = fold(keys, first + jnp.arange(count))  # [count b]
      return given

    def walk(name, specs, x, start, skips=()):
      outs = [x]
      for spec, run in itertools.groupby(enumerate(specs), key=lambda pair: pair[1]):
        first, *rest = (i for i, _ in run)
        count = 1 + len(rest)
        given = layer(spec, start + first, count, skips)
        block = layers.remat(Block, self.remat, prevent_cse=count == 1)
        fields = dict(head=self.head, dropout=self.dropout, dtype=self.dtype)
        if count == 1:
          given = jax.tree.map(lambda leaf: leaf[0], given)
          x, out = block(spec, **fields, name=f'{name}_{first}')(x, emb, given)
          outs.append(out)
          continue
        stack = nn.scan(
          block,
          variable_axes={'params': 0},
          split_rngs={'params': True},
          in_axes=(nn.broadcast, 0),
          length=count,
          unroll=layers.unroll(count),
        )
        x, out = stack(spec, **fields, name=f'{name}_{first}')(x, emb, given)
        outs += [None] * count if out is None else list(out)
      return x, outs

    return walk
