"""Autoencoders of latent diffusion: images to small maps of features and back.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1 and
appendix G, after Esser et al. 2021, "Taming Transformers" (VQ-GAN):

  block      x <- project(x) + conv(silu(norm(conv(silu(norm(x))))))
  encoder    conv, levels of `blocks` blocks with a strided convolution between, middle, norm, conv
  decoder    conv, middle, levels of `blocks` + 1 blocks with repeated places and a convolution
             between, norm, conv;  the middle is a block, attention among all places, a block

`autoencoder_kl` has a Gaussian between them, q(z | x) = N(mean, exp(logvar)), `autoencoder_vq` the
nearest entry of a codebook, whose gradient is passed straight through (van den Oord et al. 2017,
"Neural Discrete Representation Learning", section 3.2):

  i = argmin_j |z - e_j|^2,  zq = z + stop_gradient(e_i - z)

A diffusion model sees (z - shift) scale, of about unit variance.

Levels are numbered by the halvings of their map, 0 is that of the image. Where `intermediates` is
mutable, norms tell the moments of their groups there and attention its keys and values, and where
the collection `told` is given they take those of it for their own: so the tiles of a picture share
what was told of the whole (`diffax.tiles.shared`).
"""

from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.models import attention as attentions
from diffax.models import layers

EPS = 1e-6  # of the norms
LOGVAR = -30.0, 20.0  # where the log variance is clipped, as Rombach et al.'s code does


class Design(NamedTuple):
  """What `autoencoder_kl` or `autoencoder_vq` was told, as the blocks read it; see there."""

  width: int
  multipliers: tuple
  blocks: int
  latent: int
  channels: int
  codes: int
  quant_conv: bool
  attention: tuple
  middle_attention: bool
  groups: int
  scale: float
  shift: float
  remat: str
  dtype: Any


def autoencoder_kl(
  width: int = 128,
  multipliers: tuple = (1, 2, 4, 4),
  blocks: int = 2,
  latent: int = 4,
  channels: int = 3,
  quant_conv: bool = True,
  attention: tuple = (),
  middle_attention: bool = True,
  groups: int = 32,
  scale: float = 0.18215,
  shift: float = 0.0,
  remat: str = 'dots_saveable',
  dtype: str = 'float32',
) -> nn.Module:
  """An autoencoder with a Gaussian of `latent` channels; the defaults are Stable Diffusion's.

  width, multipliers: channels of the levels are width times each; the sides of the latent are those
  of the image over 2 ** (levels - 1). blocks: residual blocks a level of the encoder; the decoder
  has one more. channels: of images. quant_conv: whether a linear map stands on either side of the
  latent (Stable Diffusion 3 and Flux, of 16 channels, have none). attention: levels with attention
  behind each block. middle_attention: within the middle. groups: of the norms. scale, shift: what
  a diffusion model sees is (z - shift) scale. remat: what of a block is kept for the backward pass,
  see `layers.remat`. dtype: of convolutions, products and what flows between blocks; parameters,
  norms, softmax and what `encode` and `decode` return are float32.
  Raises ValueError for widths that do not divide into the groups and for levels there are not.
  """
  return AutoencoderKL(_design(
    width, tuple(multipliers), blocks, latent, channels, 0, quant_conv, tuple(attention),
    middle_attention, groups, scale, shift, remat, jnp.dtype(dtype),
  ))


def autoencoder_vq(
  width: int = 128,
  multipliers: tuple = (1, 2, 4),
  blocks: int = 2,
  latent: int = 3,
  codes: int = 8192,
  channels: int = 3,
  attention: tuple = (),
  middle_attention: bool = True,
  groups: int = 32,
  scale: float = 1.0,
  remat: str = 'dots_saveable',
  dtype: str = 'float32',
) -> nn.Module:
  """An autoencoder with a codebook [codes latent]; the defaults are LDM-4's, Rombach et al. 2022,
  table 8. See `autoencoder_kl`.
  """
  if codes < 1:
    raise ValueError(f'model.codes={codes}: a codebook has one entry at the least')
  return AutoencoderVQ(_design(
    width, tuple(multipliers), blocks, latent, channels, codes, True, tuple(attention),
    middle_attention, groups, scale, 0.0, remat, jnp.dtype(dtype),
  ))


def _design(*fields):
  design = Design(*fields)
  if any(w % design.groups for w in widths(design)):
    raise ValueError(
      f'model.groups={design.groups} does not divide all widths {widths(design)}: set '
      'model.width, model.multipliers or model.groups'
    )
  if set(design.attention) - set(range(len(design.multipliers))):
    raise ValueError(
      f'model.attention={design.attention}: levels are 0 to {len(design.multipliers) - 1}'
    )
  return design


def widths(design):
  """The channels of each level."""
  return [round(design.width * m) for m in design.multipliers]


# --- functions of what they return ----------------------------------------------------------------


def posterior(moments):
  """Mean and log variance, each [b h w z], of `AutoencoderKL.encode`'s [b h w 2z]."""
  mean, logvar = jnp.split(moments, 2, axis=-1)
  return mean, jnp.clip(logvar, *LOGVAR)


def codebook_loss(z, entry, commitment=0.25):
  """What moves codebook and encoder to one another, [b]: |sg(z) - e|^2 + commitment |z - sg(e)|^2.

  z: what `AutoencoderVQ.encode` returned, [b h w c]; entry: `lookup` of its indices, which carries
  the gradient of the codebook. Means over an example's values. van den Oord et al. 2017, eq. 3.
  """
  held = jax.lax.stop_gradient
  error = (held(z) - entry) ** 2 + commitment * (z - held(entry)) ** 2
  return einops.reduce(error, 'b h w c -> b', 'mean')


# --- parts ----------------------------------------------------------------------------------------


def conv(design, channels, name, **options):
  """A convolution of 3 by 3 places."""
  return nn.Conv(
    channels, (3, 3), dtype=design.dtype, name=name, conv_general_dilated=layers.conv, **options
  )


def dense(design, channels, name=None):
  return nn.Dense(channels, dtype=design.dtype, dot_general=layers.flat_dot, name=name)


def told(module, name, own):
  """`own`, which is told to whoever asks, or what is told in its place."""
  module.sow('intermediates', name, own, init_fn=lambda: None, reduce_fn=lambda _, new: new)
  return module.get_variable('told', name, own)


class Norm(nn.Module):
  """Group norm in float32, in the design's dtype; of the moments `told` where there are such."""

  design: Design

  @nn.compact
  def __call__(self, x):
    design = self.design
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
    bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
    moments = told(self, 'groups', layers.group_moments(x, design.groups))
    return layers.group_norm(x, scale, bias, design.groups, EPS, moments).astype(design.dtype)


class Attention(nn.Module):
  """Attention among all places of x [b h w c], of one head, or to keys and values `told`."""

  design: Design

  @nn.compact
  def __call__(self, x):
    design, (height, width, channels) = self.design, x.shape[1:]
    tokens = einops.rearrange(Norm(design, name='norm')(x), 'b h w c -> b (h w) c')
    q, k, v = (
      einops.rearrange(dense(design, channels, name)(tokens), 'b n c -> b n 1 c')
      for name in ('query', 'key', 'value')
    )
    k, v = told(self, 'keys_values', (k, v))
    y = einops.rearrange(attentions.attention(q, k, v), 'b n 1 c -> b n c')
    y = dense(design, channels, 'out')(y)
    return x + einops.rearrange(y, 'b (h w) c -> b h w c', h=height, w=width)


class Block(nn.Module):
  """One residual block to `out` channels, with attention behind it where `attend`."""

  design: Design
  out: int
  attend: bool = False

  @nn.compact
  def __call__(self, x):
    design = self.design
    h = conv(design, self.out, 'conv_in')(nn.silu(Norm(design, name='norm_in')(x)))
    h = conv(design, self.out, 'conv_out')(nn.silu(Norm(design, name='norm_out')(h)))
    if x.shape[-1] != self.out:
      x = dense(design, self.out, 'shortcut')(x)
    x += h
    if self.attend:
      x = Attention(design, name='attention')(x)
    return layers.constrain(x, 'batch', 'height', None, 'width')


def level(design, number, count, x):
  """`count` blocks of the level `number`."""
  attend = number in design.attention
  for i in range(count):
    block = layers.remat(Block, design.remat)
    x = block(design, widths(design)[number], attend, name=f'level{number}_block{i}')(x)
  return x


def middle(design, x):
  for i, attend in enumerate((design.middle_attention, False)):
    x = layers.remat(Block, design.remat)(design, x.shape[-1], attend, name=f'middle_block{i}')(x)
  return x


def head(design, x, channels):
  x = nn.silu(Norm(design, name='norm')(x))
  return conv(design, channels, 'conv_out')(x).astype(jnp.float32)


class Encoder(nn.Module):
  """x [b h w c] -> [b h/f w/f out]."""

  design: Design
  out: int

  @nn.compact
  def __call__(self, x):
    design, last = self.design, len(self.design.multipliers) - 1
    x = conv(design, design.width, 'conv_in')(x.astype(design.dtype))
    for number in range(last + 1):
      x = level(design, number, design.blocks, x)
      if number < last:  # places beyond the last are zeros, before the first there are none
        halves = dict(strides=2, padding=[(0, 1), (0, 1)])
        x = conv(design, x.shape[-1], f'level{number}_down', **halves)(x)
    return head(design, middle(design, x), self.out)


class Decoder(nn.Module):
  """z [b h w c] -> [b h*f w*f channels]."""

  design: Design

  @nn.compact
  def __call__(self, z):
    design = self.design
    x = conv(design, widths(design)[-1], 'conv_in')(z.astype(design.dtype))
    x = middle(design, x)
    for number in reversed(range(len(design.multipliers))):
      x = level(design, number, design.blocks + 1, x)
      if number:
        x = conv(design, x.shape[-1], f'level{number}_up')(layers.upsample(x))
    return head(design, x, design.channels)


# --- the networks ---------------------------------------------------------------------------------


class AutoencoderKL(nn.Module):
  """See `autoencoder_kl`. `__call__`: x [b h w c] -> the same, decoded from the mean."""

  design: Design

  @property
  def latent(self):
    """Channels of z."""
    return self.design.latent

  @property
  def factor(self):
    """How many places a side of x come to one of z."""
    return 2 ** (len(self.design.multipliers) - 1)

  @property
  def scale(self):
    """A diffusion model sees (z - shift) scale."""
    return self.design.scale

  @property
  def shift(self):
    return self.design.shift

  def setup(self):
    design = self.design
    out = design.latent if design.codes else 2 * design.latent
    self.encoder, self.decoder = Encoder(design, out), Decoder(design)
    if design.quant_conv:
      self.quant_conv, self.post_quant_conv = dense(design, out), dense(design, design.latent)

  def encode(self, x):
    """x [b h w c] in [-1, 1] -> moments [b h/f w/f 2z], see `posterior`; of a codebook z itself.

    Raises ValueError for sides that do not divide by the factor, other channels, and integers.
    """
    _check('an image', x, self.design.channels)
    if any(side % self.factor for side in x.shape[1:3]):
      raise ValueError(
        f'an image of {x.shape[1]}x{x.shape[2]} does not divide by {self.factor}, the factor of '
        'the autoencoder: crop or pad it'
      )
    z = self.encoder(x)
    return self.quant_conv(z).astype(jnp.float32) if self.design.quant_conv else z

  def decode(self, z):
    """z [b h w z] -> x [b h*f w*f c], about [-1, 1]. Raises ValueError for other channels."""
    _check('a latent', z, self.design.latent)
    return self.decoder(self.post_quant_conv(z) if self.design.quant_conv else z)

  def __call__(self, x):
    return self.decode(posterior(self.encode(x))[0])


class AutoencoderVQ(AutoencoderKL):
  """See `autoencoder_vq`. `encode` returns z [b h w z] before, `decode` takes it before or behind
  `quantize`, which leaves entries of the codebook as they are.
  """

  def setup(self):
    super().setup()
    size = self.design.codes, self.design.latent
    edge = 1 / size[0]
    start = lambda key, shape: jax.random.uniform(key, shape, minval=-edge, maxval=edge)
    self.codebook = self.param('codebook', start, size)

  def quantize(self, z):
    """z [b h w z] -> the nearest entries, with z's gradient, and their indices, int [b h w].

    Raises ValueError for other channels.
    """
    _check('a latent', z, self.design.latent)
    z, book = z.astype(jnp.float32), self.codebook
    product = jnp.einsum('bhwc,nc->bhwn', z, book, precision='highest')  # a near tie is decided
    index = jnp.argmin((book * book).sum(-1)[None, None, None] - 2 * product, axis=-1)
    return z + jax.lax.stop_gradient(self.lookup(index) - z), index

  def lookup(self, index):
    """The entries of the codebook, [b h w z], of indices [b h w]."""
    return self.codebook[index]

  def decode(self, z):
    """z [b h w z] -> x [b h*f w*f c] of the nearest entries. Raises ValueError as `quantize`."""
    return super().decode(self.quantize(z)[0])

  def __call__(self, x):
    return self.decode(self.encode(x))


def _check(what, x, channels):
  if x.ndim != 4 or x.shape[-1] != channels or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f'{what} of this autoencoder is [b h w {channels}] of floats, images in [-1, 1]; here is '
      f'{x.dtype} {x.shape}'
    )
