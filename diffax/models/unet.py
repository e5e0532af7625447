"""U-Nets of the family of DDPM, DDPM++, NCSN++ and ADM, by options, in any number of space axes.

Residual block (Ho et al. 2020, "DDPM", appendix B; as in BigGAN it may halve or double the sides):

  h <- conv(resample(silu(norm(x))));      e = linear(silu(embedding of time and class))
  h <- norm(h + e), or, adaptive, norm(h) (1 + scale) + shift with [scale, shift] = e
  x <- project(resample(x)) + conv(dropout(silu(h)))        the last conv is zero at the start

and attention behind it at chosen sides. An encoder has `blocks` of them a level, whose outputs are
what the `blocks + 1` of the decoder's level are shown, last first. What differs by paper:

            embedding  sides change by     shortcut   sum          attention in the decoder
  DDPM      added      a convolution       plain      x + h        all blocks of a level
  DDPM++    added      block, mean         projected  (x + h)/√2   the last of a level
  NCSN++    added      block, FIR filter   projected  (x + h)/√2   the last of a level
  ADM       adaptive   block, mean         plain      x + h        all blocks of a level

Sources: Ho et al. 2020; Song et al. 2021, "Score-Based Generative Modeling through SDEs", appendix
H; Dhariwal & Nichol 2021, sections 3 and 3.1; Karras et al. 2022, "EDM", table 7 (the settings).
Equal blocks in a row stand in one `nn.scan`, kernels `[n ...]`: depth costs no compile time but on
a CPU (`layers.unroll`).
"""

import itertools
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.models import attention as attentions
from diffax.models import layers


class Design(NamedTuple):
  """What `unet` was told, as the blocks read it; see there."""

  width: int
  multipliers: tuple
  blocks: int
  attention: tuple
  heads: int
  head_width: int
  decoder_attention: str
  middle_attention: bool
  adaptive: bool
  resample: str
  taps: tuple
  project: bool
  rescale: bool
  time: str
  endpoint: bool
  embedding: int
  progressive_in: str
  progressive_out: str
  classes: int
  text: int
  image: int
  mask: bool
  dropout: float
  groups: int
  eps: float
  remat: str
  dtype: Any


CHOICES = {
  'decoder_attention': ('all', 'last'),
  'resample': ('block', 'conv'),
  'time': ('sinusoidal', 'fourier'),
  'progressive_in': ('none', 'skip', 'residual'),
  'progressive_out': ('none', 'skip'),
}


def unet(
  width: int,
  multipliers: tuple = (1, 2, 2),
  blocks: int = 2,
  attention: tuple = (),
  heads: int = 1,
  head_width: int = 0,
  decoder_attention: str = 'all',
  middle_attention: bool = True,
  adaptive: bool = True,
  resample: str = 'block',
  taps: tuple = (1, 1),
  project: bool = False,
  rescale: bool = False,
  time: str = 'sinusoidal',
  endpoint: bool = False,
  embedding: int = 0,
  progressive_in: str = 'none',
  progressive_out: str = 'none',
  classes: int = 0,
  text: int = 0,
  image: int = 0,
  mask: bool = False,
  dropout: float = 0.0,
  groups: int = 32,
  eps: float = 1e-5,
  remat: str = 'dots_saveable',
  dtype: str = 'float32',
) -> nn.Module:
  """A U-Net of free size; the defaults are ADM's, of one head.

  width, multipliers: channels of the levels are width times each. blocks: residual blocks a level.
  attention: longest sides of feature maps that have it. heads, or head_width, which then sets them.
  decoder_attention: behind 'all' blocks of such a level in the decoder or its 'last' (Song et al.).
  middle_attention: between the two blocks in the middle.
  adaptive: scale and shift of the second norm by the embedding, else the embedding is added.
  resample: sides change within a 'block' or by a 'conv', strided, or behind repeated places.
  taps: FIR filter of that block and of the progressive parts, (1, 1) or (1, 3, 3, 1).
  project: whether shortcuts that change the sides are projected though the channels are the same.
  rescale: sums are multiplied by sqrt(1/2), which keeps their variance.
  time: 'sinusoidal', see `layers.sinusoids` for `endpoint`, or 'fourier', at 16 times normal
  frequencies, twice as many channels. embedding: its width, 0 for 4 width.
  progressive_in: the input, made smaller, joins each level, summed up to a 'skip' or, with its own
  convolutions, as a 'residual'. progressive_out: the output is the sum of all levels' ('skip').
  classes: labels in cond['label']; `classes` itself is the null label. text: channels of
  cond['text'] [b n text], attended to where attention is, with cond['text_mask'] [b n] if given.
  image, mask: channels of cond['image'], and whether there is a cond['mask'] of one, shown with x.
  dropout: rate in the blocks. groups: of the norms, of 4 channels at least each; eps: theirs.
  remat: what of a block is kept for the backward pass, see `layers.remat`. dtype: of convolutions,
  matrix products and what flows between blocks; parameters, norms and softmax stay in float32.
  Raises ValueError for a choice there is not and a filter that is not symmetric and even.
  """
  taps = tuple(taps)
  design = Design(
    width, tuple(multipliers), blocks, tuple(attention), heads, head_width, decoder_attention,
    middle_attention, adaptive, resample, taps, project, rescale, time, endpoint,
    embedding or 4 * width, progressive_in, progressive_out, classes, text, image, mask, dropout,
    groups, eps, remat, jnp.dtype(dtype),
  )
  for name, allowed in CHOICES.items():
    if getattr(design, name) not in allowed:
      raise ValueError(f'model.{name}={getattr(design, name)!r} is none of {", ".join(allowed)}')
  if len(taps) % 2 or taps != taps[::-1] or not sum(taps):
    raise ValueError(f'model.taps={taps}: a symmetric filter of even length, as (1, 1), is needed')
  if head_width and heads != 1:
    raise ValueError(f'model.heads={heads} and model.head_width={head_width}: say one of them')
  if resample == 'conv' and project:
    raise ValueError("model.project=True: with model.resample='conv' no shortcut changes sides")
  return UNet(design)


def ddpm(
  width: int = 128,
  multipliers: tuple = (1, 2, 2, 2),
  blocks: int = 2,
  attention: tuple = (16,),
  classes: int = 0,
  dropout: float = 0.1,
  remat: str = 'dots_saveable',
  dtype: str = 'float32',
) -> nn.Module:
  """DDPM, Ho et al. 2020, appendix B; the defaults are those of CIFAR-10. See `unet`."""
  return unet(
    width, multipliers, blocks, attention, adaptive=False, resample='conv', endpoint=True,
    classes=classes, dropout=dropout, eps=1e-6, remat=remat, dtype=dtype,
  )


def ddpmpp(
  width: int = 128,
  multipliers: tuple = (2, 2, 2),
  blocks: int = 4,
  attention: tuple = (16,),
  classes: int = 0,
  dropout: float = 0.13,
  remat: str = 'dots_saveable',
  dtype: str = 'float32',
) -> nn.Module:
  """DDPM++, Song et al. 2021; the defaults are EDM's for CIFAR-10, table 7. See `unet`."""
  return unet(
    width, multipliers, blocks, attention, decoder_attention='last', adaptive=False, project=True,
    rescale=True, endpoint=True, classes=classes, dropout=dropout, eps=1e-6, remat=remat,
    dtype=dtype,
  )


def ncsnpp(
  width: int = 128,
  multipliers: tuple = (2, 2, 2),
  blocks: int = 4,
  attention: tuple = (16,),
  progressive_in: str = 'residual',
  progressive_out: str = 'none',
  classes: int = 0,
  dropout: float = 0.13,
  remat: str = 'dots_saveable',
  dtype: str = 'float32',
) -> nn.Module:
  """NCSN++, Song et al. 2021; the defaults are EDM's for CIFAR-10, table 7. See `unet`.

  Song et al. have 'skip' for both progressive parts from 256 places a side on.
  """
  return unet(
    width, multipliers, blocks, attention, decoder_attention='last', adaptive=False,
    taps=(1, 3, 3, 1), project=True, rescale=True, time='fourier', progressive_in=progressive_in,
    progressive_out=progressive_out, classes=classes, dropout=dropout, eps=1e-6, remat=remat,
    dtype=dtype,
  )


def adm(
  width: int = 192,
  multipliers: tuple = (1, 2, 3, 4),
  blocks: int = 3,
  attention: tuple = (32, 16, 8),
  classes: int = 0,
  dropout: float = 0.1,
  remat: str = 'dots_saveable',
  dtype: str = 'float32',
) -> nn.Module:
  """ADM, Dhariwal & Nichol 2021, table 11; the defaults are those of ImageNet-64. See `unet`."""
  return unet(
    width, multipliers, blocks, attention, head_width=64, classes=classes, dropout=dropout,
    remat=remat, dtype=dtype,
  )


# --- parts ----------------------------------------------------------------------------------------

XAVIER, ZEROS = nn.initializers.xavier_uniform(), nn.initializers.zeros


def conv(design, space, channels, name, init=XAVIER, **options):
  """A convolution of 3 places in each of `space` axes."""
  return nn.Conv(
    channels, (3,) * space, dtype=design.dtype, kernel_init=init, name=name,
    conv_general_dilated=layers.conv, **options
  )


def dense(design, channels, name, init=XAVIER):
  return nn.Dense(
    channels, dtype=design.dtype, kernel_init=init, dot_general=layers.flat_dot, name=name
  )


def add(design, x, y):
  return (x + y) * (0.5**0.5 if design.rescale else 1)


class Norm(nn.Module):
  """Group norm, with `scale` and `shift` [b c] of an adaptive one, in the design's dtype."""

  design: Design

  @nn.compact
  def __call__(self, x, scale=0.0, shift=0.0):
    channels = x.shape[-1]
    own = self.param('scale', nn.initializers.ones, (channels,))
    bias = self.param('bias', ZEROS, (channels,))
    own, bias = jnp.atleast_2d(own) * (1 + scale), jnp.atleast_2d(bias) * (1 + scale) + shift
    groups = max(1, min(self.design.groups, channels // 4))
    y = layers.group_norm(x, own, bias, groups, self.design.eps)
    return y.astype(self.design.dtype)


class Attention(nn.Module):
  """Attention among the places of x [b *space c], or to `text` [b n d] with its `mask` [b n]."""

  design: Design

  @nn.compact
  def __call__(self, x, text=None, mask=None):
    design, channels = self.design, x.shape[-1]
    heads = channels // design.head_width if design.head_width else design.heads
    if channels % max(heads, 1) or channels % (design.head_width or 1):
      asked = 'head_width' if design.head_width else 'heads'
      raise ValueError(
        f'model.{asked}={getattr(design, asked)} does not divide the {channels} channels of a level'
      )
    tokens = einops.rearrange(Norm(design, name='norm')(x), 'b ... c -> b (...) c')
    if text is None:
      text = tokens
    else:  # Saharia et al. 2022, "Imagen", section 2.3.1: such a norm helps considerably
      text = nn.LayerNorm(name='text_norm')(text.astype(jnp.float32))
    q, k, v = (
      einops.rearrange(dense(design, channels, name)(y), 'b n (k d) -> b n k d', k=heads)
      for name, y in (('query', tokens), ('key', text), ('value', text))
    )
    y = einops.rearrange(attentions.attention(q, k, v, mask), 'b n k d -> b n (k d)')
    y = dense(design, channels, 'out', ZEROS)(y)
    return add(design, x, y.reshape(x.shape))


class Block(nn.Module):
  """One residual block, with attention where `attend`, for `nn.scan`.

  x: [b *space c]. told: `embedding` [b e], behind its silu, and `text`, `text_mask` where there
  are. layer: what this block alone is given, both optional: `keys` [b] for dropout, `skip`
  [b *space s], the encoder's output shown behind x. resample: '', 'down' or 'up'.
  Returns x [b *space out], and again what a decoder is to be shown, None from a decoder.
  """

  design: Design
  out: int
  attend: bool = False
  resample: str = ''

  @nn.compact
  def __call__(self, x, told, layer):
    design, space = self.design, x.ndim - 2
    change = {'': lambda x: x, 'down': layers.downsample, 'up': layers.upsample}[self.resample]
    if 'skip' in layer:
      x = jnp.concatenate([x, layer['skip']], axis=-1)
    h = nn.silu(Norm(design, name='norm_in')(x))
    if self.resample:
      h, x = change(h, design.taps), change(x, design.taps)
    h = conv(design, space, self.out, 'conv_in')(h)
    e = dense(design, (1 + design.adaptive) * self.out, 'embed')(told['embedding'])
    e = layers.constrain(e, 'batch', 'width')
    norm = Norm(design, name='norm_out')
    if design.adaptive:
      scale, shift = jnp.split(e.astype(jnp.float32), 2, axis=-1)
      h = norm(h, scale, shift)
    else:
      h = norm(h + jnp.expand_dims(e, range(1, 1 + space)))
    h = layers.dropout(nn.silu(h), layer.get('keys'), design.dropout)
    h = conv(design, space, self.out, 'conv_out', ZEROS)(h)
    if x.shape[-1] != self.out or self.resample and design.project:
      x = dense(design, self.out, 'shortcut')(x)
    x = add(design, x, h)
    if self.attend:
      x = Attention(design, name='attention')(x)
      if design.text:
        x = Attention(design, name='text_attention')(x, told['text'], told.get('text_mask'))
    x = layers.constrain(x, 'batch', 'height', *[None] * (space - 1), 'width')
    return x, None if 'skip' in layer else x


class Embedding(nn.Module):
  """silu of the embedding [b e] of times [b] and labels [b]."""

  design: Design

  @nn.compact
  def __call__(self, t, label=None):
    design = self.design
    if design.time == 'fourier':
      normal = nn.initializers.normal(16.0)  # Song et al. 2021, appendix H
      frequencies = self.param('frequencies', normal, (design.width,))
      waves = layers.fourier(t, jax.lax.stop_gradient(frequencies))
    else:
      waves = layers.sinusoids(t, design.width, endpoint=design.endpoint)
    e = layers.constrain(dense(design, design.embedding, 'time_in')(waves), 'batch', 'width')
    e = dense(design, design.embedding, 'time_out')(nn.silu(e)).astype(jnp.float32)
    if design.classes:
      rows, normal = design.classes + 1, nn.initializers.normal(1.0)
      e += nn.Embed(rows, design.embedding, embedding_init=normal, name='label')(label)
    return layers.constrain(nn.silu(e), 'batch', 'width')


# --- the net --------------------------------------------------------------------------------------


class Run(NamedTuple):
  """Blocks in a row that have one shape; count: how many; the rest: see `Block`."""

  name: str
  count: int
  out: int
  attend: bool = False
  resample: str = ''


def runs(prefix, shapes):
  """The runs of blocks whose shapes (in, skip, out, attend) are given in order."""
  found, first = [], 0
  for (_, _, out, attend), group in itertools.groupby(shapes):
    count = len(list(group))
    last = f'to{first + count - 1}' if count > 1 else ''
    found.append(Run(f'{prefix}_block{first}{last}', count, out, attend))
    first += count
  return found


def through(design, run, x, told, given):
  """x and the outputs to be shown of a run's blocks; given: a dict for each block, see `Block`."""
  block = layers.remat(Block, design.remat, prevent_cse=run.count == 1)
  fields = design, *run[2:]
  if run.count == 1:
    x, shown = block(*fields, name=run.name)(x, told, given[0])
    return x, [shown]
  stack = nn.scan(
    block,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    in_axes=(nn.broadcast, 0),
    length=run.count,
    unroll=layers.unroll(run.count),
  )
  given = jax.tree.map(lambda *leaves: jnp.stack(leaves), *given)
  x, shown = stack(*fields, name=run.name)(x, told, given)
  return x, [] if shown is None else list(shown)


class UNet(nn.Module):
  """The network; see `unet`.

  x: [b *space c], any number of space axes. t: [b], what the prediction's clock tells. cond: dict
  of `label` int [b], `text`, `text_mask`, `image`, `mask`, those that were declared. keys: [b] for
  dropout, given in training alone. per_layer: None. channels: how many to return, 0 for as many as
  x has. Returns float32 [b *space channels].
  Raises ValueError for sides that cannot be halved as often as there are levels, sides of
  `attention` that there are not, and a cond that is not what was declared.
  """

  design: Design
  channels: int = 0

  @nn.compact
  def __call__(self, x, t, cond, *, keys=None, per_layer=None):
    design, channels = self.design, self.channels or x.shape[-1]
    if per_layer is not None:
      raise ValueError(f'per_layer={sorted(per_layer)}: a U-Net takes nothing by layer; use a DiT')
    check(design, x.shape, cond)
    told = {k: cond[k] for k in ('text', 'text_mask') if k in cond}
    told['embedding'] = Embedding(design, name='embedding')(t, cond.get('label'))
    shown = [x.astype(jnp.float32), *(cond[k] for k in ('image', 'mask') if k in cond)]
    x = jnp.concatenate(shown, axis=-1).astype(design.dtype)

    numbers = itertools.count()

    def given(**layer):
      """What one block is given; the key of its dropout counts blocks, in the order of calls."""
      number = next(numbers)
      if keys is not None and design.dropout:
        layer['keys'] = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
      return layer

    x, skips = encode(design, x, told, given)
    for i in range(2):
      run = Run(f'middle_block{i}', 1, x.shape[-1], design.middle_attention and i == 0)
      x, _ = through(design, run, x, told, [given()])
    return decode(design, x, told, given, skips, channels).astype(jnp.float32)


def sides(design, shape):
  """The longest side of each level of the feature maps of x, [b *space c]."""
  return [max(shape[1:-1]) // 2**level for level in range(len(design.multipliers))]


def widths(design):
  return [int(design.width * m) for m in design.multipliers]


def check(design, shape, cond):
  """Raises ValueError where x and cond are not what the design can take."""
  factor, space = 2 ** (len(design.multipliers) - 1), shape[1:-1]
  if any(side % factor for side in space):
    raise ValueError(
      f'a grid of {space} does not divide by {factor}, halved at {len(design.multipliers) - 1} '
      f'levels: crop or pad it, or say fewer model.multipliers than {design.multipliers}'
    )
  layers.check_split(shape[1], 'height')
  there = sides(design, shape)
  if set(design.attention) - set(there):
    raise ValueError(f'model.attention={design.attention}, but the sides of levels are {there}')
  layers.check_cond(cond, shape[0], {
    'label': ('classes', design.classes, ()),
    'text': ('text', design.text, (None, design.text)),
    'text_mask': ('text', design.text, (None,)),
    'image': ('image', design.image, (*space, design.image)),
    'mask': ('mask', design.mask, (*space, 1)),
  }, optional=('text_mask',))


def encode(design, x, told, given):
  """The features of the last level, and all that the decoder is to be shown."""
  space, aux = x.ndim - 2, x
  levels = zip(widths(design), sides(design, x.shape))
  x = conv(design, space, design.width, 'conv_in')(x)
  skips = [x]
  for level, (channels, side) in enumerate(levels):
    if level:
      name = f'encoder{level - 1}_down'
      if design.resample == 'conv':
        halves = dict(strides=2, padding=[(0, 1)] * space)
        x = conv(design, space, x.shape[-1], name, **halves)(x)
      else:
        run = Run(name, 1, x.shape[-1], resample='down')
        x, _ = through(design, run, x, told, [given()])
      x, aux = join(design, x, aux, f'encoder{level}_input')
      skips.append(x)
    into, attend = x.shape[-1], side in design.attention
    shapes = [(channels if i else into, 0, channels, attend) for i in range(design.blocks)]
    for run in runs(f'encoder{level}', shapes):
      x, shown = through(design, run, x, told, [given() for _ in range(run.count)])
      skips += shown
  return x, skips


def join(design, x, aux, name):
  """x with the input joined to it, and the input made as small; Song et al. 2021, appendix H."""
  space = x.ndim - 2
  if design.progressive_in == 'skip':
    aux = layers.downsample(aux, design.taps)
    x += dense(design, x.shape[-1], name)(aux)
  if design.progressive_in == 'residual':  # filter and convolution in one, zeros beyond both
    reach = len(design.taps) // 2
    for axis in range(1, 1 + space):
      taps = [tap / sum(design.taps) for tap in design.taps]
      aux = layers.blur(aux, taps, reach, reach, axis)
    aux = conv(design, space, x.shape[-1], name, strides=2, padding='VALID')(aux)
    x = aux = add(design, x, aux)
  return x, aux


def decode(design, x, told, given, skips, channels):
  """The output [b *space channels] of the last level's features and what there is to be shown."""
  space, levels, out = x.ndim - 2, widths(design), None
  sizes = sides(design, skips[0].shape)
  for level in reversed(range(len(levels))):
    if level + 1 < len(levels):
      name = f'decoder{level + 1}_up'
      if design.resample == 'conv':
        x = conv(design, space, x.shape[-1], name)(layers.upsample(x))
      else:
        run = Run(name, 1, x.shape[-1], resample='up')
        x, _ = through(design, run, x, told, [given()])
    width, attend = levels[level], sizes[level] in design.attention
    every = design.decoder_attention == 'all'
    shown = [skips.pop() for _ in range(design.blocks + 1)]
    shapes = [
      (width if i else x.shape[-1], skip.shape[-1], width, attend and (every or i == design.blocks))
      for i, skip in enumerate(shown)
    ]
    for run in runs(f'decoder{level}', shapes):
      x, _ = through(design, run, x, told, [given(skip=shown.pop(0)) for _ in range(run.count)])
    if level == 0 or design.progressive_out == 'skip':
      y = nn.silu(Norm(design, name=f'decoder{level}_norm')(x))
      y = conv(design, space, channels, f'decoder{level}_out', ZEROS)(y)
      out = y if out is None else y + layers.upsample(out, design.taps)
  return out
