"""The U-Net of latent diffusion with text, as Stable Diffusion 1, 2, XL and their kin have it.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", sections 3.3
and E.2.1. Behind a residual block (Ho et al. 2020, as in `models.unet`) stands a transformer over
the places of its map:

  h <- conv(silu(norm(x))) + linear(silu(e));      x <- project(x) + conv(silu(norm(h)))
  z <- linear(norm(x)) as tokens;  in each of its `depth` blocks, with layer norms:
    z <- z + attention(norm(z));  z <- z + attention(norm(z), text)
    z <- z + linear(a gelu(g)),  [a, g] = linear(norm(z))           GEGLU, Shazeer 2020
  x <- x + linear(z)

e is the embedding of the time and of what is said of the image: in SDXL (Podell et al. 2023,
section 2.2) pooled text and sizes, in the upscaler the noise of the image it is shown. An encoder
has `blocks` of them a level, whose outputs are what the `blocks + 1` of the decoder's level are
shown, last first. The blocks of a transformer stand in one `nn.scan`, kernels `[depth in out]`.
"""

import itertools
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.models import attention as attentions
from diffax.models import layers

SINUSOIDS = 256  # channels of each number in cond['size']; Podell et al. 2023, section 2.2


class Level(NamedTuple):
  """Feature maps of one size, and the transformers there: depth 0 for none; see `latent_unet`."""

  channels: int
  depth: int
  heads: int
  text_only: bool


class Design(NamedTuple):
  """What `latent_unet` was told, as the blocks read it; see there."""

  width: int
  levels: tuple
  middle: Level
  blocks: int
  text: int
  linear: bool
  pooled: int
  sizes: int
  noise_levels: int
  image: int
  mask: bool
  dropout: float
  groups: int
  remat: str
  dtype: Any


def latent_unet(
  width: int = 320,
  multipliers: tuple = (1, 2, 4, 4),
  blocks: int = 2,
  attention: tuple = (1, 1, 1, 0),
  middle: int = 1,
  heads: int = 8,
  head_width: int = 0,
  text: int = 768,
  text_only: tuple = (),
  linear: bool = False,
  pooled: int = 0,
  sizes: int = 0,
  noise_levels: int = 0,
  image: int = 0,
  mask: bool = False,
  dropout: float = 0.0,
  groups: int = 32,
  remat: str = 'dots_saveable',
  dtype: str = 'float32',
) -> nn.Module:
  """A U-Net of free size; the defaults are those of Stable Diffusion 1.

  width, multipliers: channels of the levels are width times each. blocks: residual blocks a level.
  attention: depth of the transformers of each level, 0 for none. middle: of the one between the two
  blocks in the middle; 0 leaves but one block there.
  heads, or head_width, which then sets them. groups: of the group norms.
  text: channels of cond['text'] [b n text], with cond['text_mask'] [b n] if given. text_only: of
  each level, whether both attentions are to the text; () for none.
  linear: whether files have the transformers' projections as matrices, or convolutions of one
  place; the arithmetic is the same.
  pooled, sizes: channels of cond['pooled'] [b pooled] and how many numbers cond['size'] [b sizes]
  has. noise_levels: how many cond['noise_level'], int [b], may be.
  image, mask: channels of cond['image'], and whether there is a cond['mask'] of one; shown are x,
  mask, image, as released weights have them.
  dropout: rate in the residual blocks.
  remat: what of a block is kept for the backward pass, see `layers.remat`. dtype: of convolutions,
  matrix products and what flows between blocks; parameters, norms and softmax stay in float32.
  Raises ValueError where what is said of levels is not of as many, and heads do not divide.
  """
  if head_width and heads != 8:
    raise ValueError(f'model.heads={heads} and model.head_width={head_width}: say one of them')
  text_only = text_only or (False,) * len(multipliers)
  for name, said in (('attention', attention), ('text_only', text_only)):
    if len(said) != len(multipliers):
      raise ValueError(
        f'model.{name}={tuple(said)} has not one for each level of '
        f'model.multipliers={tuple(multipliers)}'
      )
  widths = [round(width * m) for m in multipliers]
  split = lambda channels: max(channels // head_width, 1) if head_width else heads
  levels = [Level(c, d, split(c), only) for c, d, only in zip(widths, attention, text_only)]
  middle = levels[-1]._replace(depth=middle, text_only=False)
  for level in (*levels, middle):
    if level.depth and level.channels % (head_width or max(heads, 1)):
      said = f'head_width={head_width}' if head_width else f'heads={heads}'
      raise ValueError(f'model.{said} does not divide the {level.channels} channels of a level')
  return LatentUNet(Design(
    width, tuple(levels), middle, blocks, text, linear, pooled, sizes, noise_levels, image, mask,
    dropout, groups, remat, jnp.dtype(dtype),
  ))


def sd1(
  image: int = 0,
  mask: bool = False,
  dropout: float = 0.0,
  remat: str = 'dots_saveable',
  dtype: str = 'float32',
) -> nn.Module:
  """Stable Diffusion 1.1 to 1.5; Rombach et al. 2022. See `latent_unet`.

  Its inpainting model has image=4 and mask, InstructPix2Pix (Brooks et al. 2022) image=4.
  """
  return latent_unet(image=image, mask=mask, dropout=dropout, remat=remat, dtype=dtype)


def sd2(
  image: int = 0,
  mask: bool = False,
  dropout: float = 0.0,
  remat: str = 'dots_saveable',
  dtype: str = 'float32',
) -> nn.Module:
  """Stable Diffusion 2.0 and 2.1. See `latent_unet`.

  Its inpainting model has image=4 and mask, that of depth maps image=1.
  """
  return latent_unet(
    head_width=64, text=1024, linear=True, image=image, mask=mask, dropout=dropout, remat=remat,
    dtype=dtype,
  )


def sdxl(
  image: int = 0,
  mask: bool = False,
  dropout: float = 0.0,
  remat: str = 'dots_saveable',
  dtype: str = 'float32',
) -> nn.Module:
  """Stable Diffusion XL, Podell et al. 2023, table 1; its inpainting model has image=4 and mask.

  cond['size']: height and width before it was made smaller, top and left of its crop, height and
  width asked for, in pixels. See `latent_unet`.
  """
  return latent_unet(
    multipliers=(1, 2, 4), attention=(0, 2, 10), middle=10, head_width=64, text=2048, linear=True,
    pooled=1280, sizes=6, image=image, mask=mask, dropout=dropout, remat=remat, dtype=dtype,
  )


def sdxl_refiner(
  dropout: float = 0.0, remat: str = 'dots_saveable', dtype: str = 'float32'
) -> nn.Module:
  """The refiner of Stable Diffusion XL, Podell et al. 2023, section 2.5.

  cond['size']: as `sdxl` has it, but for the last two an aesthetic score. See `latent_unet`.
  """
  return latent_unet(
    384, attention=(0, 4, 4, 0), middle=4, head_width=64, text=1280, linear=True, pooled=1280,
    sizes=5, dropout=dropout, remat=remat, dtype=dtype,
  )


def sd_upscaler(
  dropout: float = 0.0, remat: str = 'dots_saveable', dtype: str = 'float32'
) -> nn.Module:
  """Stable Diffusion's upscaler to four times the side. See `latent_unet`.

  cond['image'] is the small image with noise of cond['noise_level'], in pixels, each for a place of
  the latent.
  """
  return latent_unet(
    256, (1, 2, 2, 4), attention=(0, 1, 1, 1), text=1024,
    text_only=(True, True, True, False), linear=True, noise_levels=1000, image=3, dropout=dropout,
    remat=remat, dtype=dtype,
  )


# --- parts ----------------------------------------------------------------------------------------

UNIFORM = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # as PyTorch's layers start
ZEROS = nn.initializers.zeros


def conv(design, channels, name, init=UNIFORM, **options):
  """A convolution of 3 x 3 places."""
  return nn.Conv(
    channels, (3, 3), dtype=design.dtype, kernel_init=init, name=name,
    conv_general_dilated=layers.conv, **options
  )


def dense(design, channels, name, init=UNIFORM, **options):
  return layers.Dense(
    channels, dtype=design.dtype, kernel_init=init, dot_general=layers.flat_dot, name=name,
    **options
  )


class Norm(nn.Module):
  """Group norm, in the design's dtype."""

  design: Design
  eps: float = 1e-5

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
    bias = self.param('bias', ZEROS, x.shape[-1:])
    y = layers.group_norm(x, scale, bias, self.design.groups, self.eps)
    return y.astype(self.design.dtype)


class Residual(nn.Module):
  """A residual block, x [b h w c] -> [b h w out].

  embedding: [b e], behind its silu. keys: [b] for dropout, or None.
  """

  design: Design
  out: int

  @nn.compact
  def __call__(self, x, embedding, keys):
    design = self.design
    h = conv(design, self.out, 'conv_in')(nn.silu(Norm(design, name='norm_in')(x)))
    e = layers.constrain(dense(design, self.out, 'embed')(embedding), 'batch', 'width')
    h = nn.silu(Norm(design, name='norm_out')(h + e[:, None, None]))
    h = layers.dropout(h, keys, design.dropout)
    h = conv(design, self.out, 'conv_out', ZEROS)(h)
    if x.shape[-1] != self.out:
      x = dense(design, self.out, 'shortcut')(x)
    return layers.constrain(x + h, 'batch', 'height', None, 'width')


class Attention(nn.Module):
  """Attention of tokens x [b n c] to y [b m d] with its `mask` [b m], all of it where None."""

  design: Design
  heads: int

  @nn.compact
  def __call__(self, x, y, mask=None):
    channels = x.shape[-1]
    q, k, v = (
      einops.rearrange(
        dense(self.design, channels, name, use_bias=False)(of), 'b n (k d) -> b n k d', k=self.heads
      )
      for name, of in (('query', x), ('key', y), ('value', y))
    )
    y = einops.rearrange(attentions.attention(q, k, v, mask), 'b n k d -> b n (k d)')
    return dense(self.design, channels, 'out')(y)


class Block(nn.Module):
  """A block of a transformer, `(x [b n c], told) -> (x, None)`, for `nn.scan`.

  told: `text` [b m d] and `text_mask` [b m], where there is one.
  """

  design: Design
  level: Level

  @nn.compact
  def __call__(self, x, told):
    design, channels = self.design, x.shape[-1]
    norm = lambda name: nn.LayerNorm(1e-5, name=name)(x).astype(design.dtype)
    text = told['text'], told.get('text_mask')
    attend = lambda name: Attention(design, self.level.heads, name=name)
    y = norm('attention_norm')
    x += attend('attention')(y, *(text if self.level.text_only else (y,)))
    x += attend('text_attention')(norm('text_attention_norm'), *text)
    y = norm('mlp_norm')
    gate = nn.gelu(dense(design, 4 * channels, 'mlp_gate')(y), approximate=False)
    y = dense(design, 4 * channels, 'mlp_in')(y) * gate
    x += dense(design, channels, 'mlp_out')(layers.constrain(y, 'batch', 'tokens', 'hidden'))
    return layers.constrain(x, 'batch', 'tokens', 'width'), None


class Transformer(nn.Module):
  """What a transformer over its places adds to x [b h w c]; told: see `Block`."""

  design: Design
  level: Level

  @nn.compact
  def __call__(self, x, told):
    design, depth = self.design, self.level.depth
    y = Norm(design, 1e-6, name='norm')(x)
    y = einops.rearrange(y, 'b h w c -> b (h w) c')
    y = dense(design, x.shape[-1], 'project_in')(y)
    y = layers.constrain(y, 'batch', 'tokens', 'width')
    stack = nn.scan(
      layers.remat(Block, design.remat, prevent_cse=depth == 1),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=depth,
    )
    y, _ = stack(design, self.level, name='blocks')(y, told)
    y = dense(design, x.shape[-1], 'project_out', ZEROS)(y)
    return layers.constrain(x + y.reshape(x.shape), 'batch', 'height', None, 'width')


class Embedding(nn.Module):
  """silu of the embedding [b e] of times [b] and of what cond says of the image."""

  design: Design

  @nn.compact
  def __call__(self, t, cond):
    design, channels = self.design, 4 * self.design.width

    def embed(waves, name):
      e = layers.constrain(dense(design, channels, f'{name}_in')(waves), 'batch', 'width')
      return dense(design, channels, f'{name}_out')(nn.silu(e)).astype(jnp.float32)

    e = embed(layers.sinusoids(t, design.width), 'time')
    if design.noise_levels:
      rows = nn.Embed(
        design.noise_levels, channels, embedding_init=nn.initializers.normal(1.0),
        name='noise_level',
      )
      e += rows(cond['noise_level'])
    said = [cond['pooled'].astype(jnp.float32)] if design.pooled else []
    if design.sizes:
      waves = layers.sinusoids(cond['size'].reshape(-1), SINUSOIDS)
      said.append(einops.rearrange(waves, '(b n) c -> b (n c)', n=design.sizes))
    if said:
      e += embed(jnp.concatenate(said, axis=-1), 'added')
    return layers.constrain(nn.silu(e), 'batch', 'width')


# --- the net --------------------------------------------------------------------------------------


class LatentUNet(nn.Module):
  """The network; see `latent_unet`.

  x: [b h w c]. t: [b], about 0 to 1000. cond: dict of `text`, `text_mask`, `pooled`, `size`,
  `noise_level`, `image`, `mask`, those that were declared. keys: [b] for dropout, given in training
  alone. per_layer: None. channels: how many to return, 0 for as many as x has.
  Returns float32 [b h w channels].
  Raises ValueError for sides that cannot be halved as often as there are levels, and a cond that is
  not what was declared.
  """

  design: Design
  channels: int = 0

  @nn.compact
  def __call__(self, x, t, cond, *, keys=None, per_layer=None):
    design, channels = self.design, self.channels or x.shape[-1]
    if per_layer is not None:
      raise ValueError(f'per_layer={sorted(per_layer)}: a U-Net takes nothing by layer; use a DiT')
    check(design, x.shape, cond)
    told = {k: cond[k].astype(design.dtype if k == 'text' else bool)
            for k in ('text', 'text_mask') if k in cond}
    embedding = Embedding(design, name='embedding')(t, cond)
    residual = layers.remat(Residual, design.remat)
    numbers = itertools.count()

    def block(x, stage, i, level):
      """The i-th block of a stage; the key of its dropout counts blocks, in the order of calls."""
      number, own = next(numbers), None
      if keys is not None and design.dropout:
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
      x = residual(design, level.channels, name=f'{stage}_block{i}')(x, embedding, own)
      if level.depth:
        x = Transformer(design, level, name=f'{stage}_attention{i}')(x, told)
      return x

    shown = [x.astype(jnp.float32), *(cond[k] for k in ('mask', 'image') if k in cond)]
    x = conv(design, design.width, 'conv_in')(jnp.concatenate(shown, axis=-1).astype(design.dtype))
    x, skips = encode(design, x, block)
    x = block(x, 'middle', 0, design.middle)
    if design.middle.depth:
      x = block(x, 'middle', 1, design.middle._replace(depth=0))
    x = nn.silu(Norm(design, name='out_norm')(decode(design, x, skips, block)))
    return conv(design, channels, 'out_conv', ZEROS)(x).astype(jnp.float32)


def encode(design, x, block):
  """The features of the last level, and all that the decoder is to be shown."""
  skips = [x]
  for n, level in enumerate(design.levels):
    if n:  # of even sides: zeros beyond the first place alone are seen
      halves = dict(strides=2, padding=[(1, 0)] * 2)
      x = conv(design, x.shape[-1], f'encoder{n - 1}_down', **halves)(x)
      skips.append(x)
    for i in range(design.blocks):
      x = block(x, f'encoder{n}', i, level)
      skips.append(x)
  return x, skips


def decode(design, x, skips, block):
  """The features of the first level, of the last level's and what there is to be shown."""
  for n, level in reversed(list(enumerate(design.levels))):
    if n + 1 < len(design.levels):
      x = conv(design, x.shape[-1], f'decoder{n + 1}_up')(layers.upsample(x))
    for i in range(design.blocks + 1):
      x = block(jnp.concatenate([x, skips.pop()], axis=-1), f'decoder{n}', i, level)
  return x


def check(design, shape, cond):
  """Raises ValueError where x and cond are not what the design can take."""
  factor, space = 2 ** (len(design.levels) - 1), shape[1:-1]
  if len(space) != 2 or any(side % factor for side in space):
    raise ValueError(
      f'a grid of {space} is not [h w] that divide by {factor}, halved at {len(design.levels) - 1} '
      'levels: crop or pad it, or say fewer model.multipliers'
    )
  layers.check_split(shape[1], 'height')
  layers.check_cond(cond, shape[0], {
    'text': ('text', design.text, (None, design.text)),
    'text_mask': ('text', design.text, (None,)),
    'pooled': ('pooled', design.pooled, (design.pooled,)),
    'size': ('sizes', design.sizes, (design.sizes,)),
    'noise_level': ('noise_levels', design.noise_levels, ()),
    'image': ('image', design.image, (*space, design.image)),
    'mask': ('mask', design.mask, (*space, 1)),
  }, optional=('text_mask',))
