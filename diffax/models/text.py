"""Text encoders: tokens to what cross-attention reads, and one vector for the whole of a text.

CLIP's transformer, Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision", sec. 2.4, with learned positions, a causal order and norms first:

  x <- x + attention(norm(x));  x <- x + mlp(norm(x))
  text = x, or norm(x);  pooled = projection(norm(x at the end-of-text token))

Stable Diffusion 1.x reads the last state of OpenAI's ViT-L behind the norm, 2.x that of OpenCLIP's
ViT-H less its last layer; SDXL reads the last state but one of ViT-L and of OpenCLIP's ViT-bigG as
they are, and the pooled vector of the latter; Podell et al. 2023, sec. 2.1.

The same network without an order of its tokens, small, learns from captions with its denoiser.
"""

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffax.models import attention as attentions
from diffax.models import layers

LARGEST = -1  # in place of an end-of-text token: the largest id of a text is taken for it
ACTIVATIONS = {
  'gelu': lambda x: nn.gelu(x, approximate=False),
  'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),  # Hendrycks & Gimpel 2016, sec. 2
}
_L = dict(width=768, depth=12, heads=12, hidden=3072)
PRESETS = {  # what each family reads; the last layer of SD2's ViT-H is left out of its files
  'SD1/ViT-L': _L,
  'SD2/ViT-H': dict(width=1024, depth=23, heads=16, hidden=4096, activation='gelu'),
  'SDXL/ViT-L': dict(_L, skip=1, norm=False),
  'SDXL/ViT-bigG': dict(width=1280, depth=32, heads=20, hidden=5120, activation='gelu',
                        projection=1280, skip=1, norm=False),
}


def clip_text(
  vocab: int,
  length: int,
  width: int,
  depth: int,
  heads: int,
  hidden: int,
  activation: str = 'quick_gelu',
  projection: int = 0,
  skip: int = 0,
  norm: bool = True,
  causal: bool = True,
  end: int = LARGEST,
  remat: str = 'none',
  dtype: str = 'float32',
) -> nn.Module:
  """A text encoder of free size; see `ClipText`.

  vocab: number of tokens there are; length: of a text, at most; hidden: width of the mlp.
  activation: of the mlp, 'gelu' or 'quick_gelu'. projection: width of `pooled`, 0 for none.
  skip: how many layers before the end `text` is taken; norm: whether behind the last norm.
  causal: whether a token sees those before it alone. end: id of the token where `pooled` is taken,
  where it stands first; -1 takes the largest id of a text for it, as OpenAI's code does. remat,
  dtype: as of `dit`.
  Raises ValueError for a width that does not divide by the heads, an activation there is not, and a
  skip that leaves no layer.
  """
  if width % heads:
    raise ValueError(f'width={width} does not divide by heads={heads}')
  if activation not in ACTIVATIONS:
    raise ValueError(f'activation={activation!r} is none of {", ".join(ACTIVATIONS)}')
  if not 0 <= skip < depth:
    raise ValueError(f'skip={skip} is not within 0 to {depth - 1}, of depth={depth} layers')
  if end != LARGEST and not 0 <= end < vocab:
    raise ValueError(f'end={end} is no token of vocab={vocab}: 0 to {vocab - 1}, or {LARGEST}')
  return ClipText(
    vocab, length, width, depth, heads, hidden, activation, projection, skip, norm, causal, end,
    remat, jnp.dtype(dtype),
  )


def clip_text_preset(preset: str, remat: str = 'none', dtype: str = 'float32') -> nn.Module:
  """The text encoder of a family of Stable Diffusion, a name of `PRESETS`; see `clip_text`."""
  if preset not in PRESETS:
    raise ValueError(f'preset={preset!r} is none of {", ".join(PRESETS)}')
  return clip_text(vocab=49408, length=77, remat=remat, dtype=dtype, **PRESETS[preset])


class Block(nn.Module):
  """One block, `((x, text), mask, here) -> ((x, text), None)`, for `nn.scan`.

  x: [b n d]. text: what a layer before the end leaves, [b n d]; None where the last is read. here:
  whether this is that layer. mask: [b n] or None. spread: standard deviation of the kernels that
  write to x, at the start.
  """

  heads: int
  hidden: int
  activation: str
  causal: bool
  spread: float
  dtype: Any

  @nn.compact
  def __call__(self, carry, mask, here):
    x, text = carry
    d = x.shape[-1]
    normal = nn.initializers.normal
    dense = lambda features, name, spread=0.02: nn.Dense(
      features, dtype=self.dtype, kernel_init=normal(spread), dot_general=layers.flat_dot, name=name
    )
    norm = lambda name: nn.LayerNorm(1e-5, use_fast_variance=False, name=name)

    y = norm('norm1')(x)
    q, k, v = (
      einops.rearrange(dense(d, name)(y), 'b n (k d) -> b n k d', k=self.heads)
      for name in ('query', 'key', 'value')
    )
    y = attentions.attention(q, k, v, mask, causal=self.causal)
    y = einops.rearrange(y, 'b n k d -> b n (k d)')
    x += dense(d, 'out', self.spread)(y).astype(jnp.float32)

    y = ACTIVATIONS[self.activation](dense(self.hidden, 'mlp_in')(norm('norm2')(x)))
    y = layers.constrain(y, 'batch', 'tokens', 'hidden')
    x += dense(d, 'mlp_out', self.spread)(y).astype(jnp.float32)
    x = layers.constrain(x, 'batch', 'tokens', 'width')
    return (x, None if text is None else jnp.where(here, x, text)), None


class ClipText(nn.Module):
  """The network; see `clip_text` for its fields.

  tokens: int [b n], n up to `length`. mask: [b n], which of them are more than padding, 0 or 1;
  None: all, as the released models were trained. Returns dict(text=[b n d], pooled=[b d]), float32,
  pooled [b projection] where there is one. An id beyond the vocabulary gives NaN.
  """

  vocab: int
  length: int
  width: int
  depth: int
  heads: int
  hidden: int
  activation: str
  projection: int
  skip: int
  norm: bool
  causal: bool
  end: int
  remat: str
  dtype: Any

  @nn.compact
  def __call__(self, tokens, mask=None):
    n = tokens.shape[1]
    if n > self.length:
      raise ValueError(f'{n} tokens do not fit the length={self.length} of the text encoder')
    normal = nn.initializers.normal
    x = nn.Embed(self.vocab, self.width, embedding_init=normal(0.02), name='token')(tokens)
    x += self.param('positions', normal(0.02), (self.length, self.width))[None, :n]
    x = layers.constrain(x, 'batch', 'tokens', 'width')

    stack = nn.scan(
      layers.remat(Block, self.remat, prevent_cse=False),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(nn.broadcast, 0),
      length=self.depth,
    )
    spread = 0.02 * (2 * self.depth) ** -0.5  # x grows by as much at any depth; Radford et al. 2019
    here = np.arange(self.depth) == self.depth - 1 - self.skip
    (x, text), _ = stack(
      self.heads, self.hidden, self.activation, self.causal, spread, self.dtype, name='blocks'
    )((x, x if self.skip else None), mask, jnp.asarray(here))

    norm = nn.LayerNorm(1e-5, use_fast_variance=False, name='norm')
    text = x if text is None else text
    pooled = norm(jax.vmap(lambda x, at: x[at])(x, end_of(tokens, self.end)))  # [b d]
    if self.projection:
      pooled = nn.Dense(
        self.projection, use_bias=False, dtype=self.dtype,
        kernel_init=normal(self.width**-0.5), name='projection',
      )(pooled)
    text = norm(text) if self.norm else text
    return dict(text=text.astype(jnp.float32), pooled=pooled.astype(jnp.float32))


def end_of(tokens, end):
  """Where `end` stands first in each of the texts [b n], 0 where it does not: int [b].

  -1 in its place: where the largest id stands.
  """
  return jnp.argmax(tokens if end == LARGEST else tokens == end, axis=-1)
