"""What networks share: layout by logical names, embeddings, patches, attention, dropout."""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def constrain(x, *names):
  """Lays `x` out by logical axis names ('batch', 'tokens', 'width', ... or None), a name an axis.

  What mesh axes a name means is said by the rules in force (`layout`); without a mesh in force
  nothing happens. Models name no mesh axis.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, nn.logical_to_mesh_axes(names))


layout = nn.logical_axis_rules  # a context: ((logical name, mesh axes), ...)


def sinusoids(t, width, longest=10_000.0):
  """[cos, sin] of t at width / 2 geometric frequencies from 1 to 1 / longest: [b] -> [b width].

  The time embedding of Ho et al. 2020 and DiT, for t about 0 to 1000. float32.
  """
  rate = np.exp(-np.log(longest) * np.arange(width // 2) / (width // 2)).astype(np.float32)
  wave = t.astype(jnp.float32)[:, None] * rate[None]
  return jnp.concatenate([jnp.cos(wave), jnp.sin(wave)], axis=-1)


def sincos_positions(shape, width, longest=10_000.0):
  """Fixed embedding [n width] of the places of an N-d grid; Peebles & Xie 2023, after ViT and MAE.

  Each axis has width / N channels, [sin, cos] of its coordinate, the last axis first.
  Raises ValueError where the width does not divide by twice the number of axes.
  """
  if width % (2 * len(shape)):
    raise ValueError(
      f'width={width} does not divide by {2 * len(shape)}: a sine and a cosine for '
      f'each of {len(shape)} axes'
    )
  half = width // len(shape) // 2
  rate = longest ** (-np.arange(half) / half)
  places = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing='ij'))
  waves = einops.rearrange(places[::-1], 'a ... -> (...) a 1') * rate
  waves = np.concatenate([np.sin(waves), np.cos(waves)], axis=-1)
  return einops.rearrange(waves, 'n a c -> n (a c)').astype(np.float32)


def _axes(n):
  """'(n0 p0) (n1 p1)', 'n0 n1' and 'p0 p1' for two axes: einops' names of places and of patches."""
  return (' '.join(f.format(i) for i in range(n)) for f in ('(n{0} p{0})', 'n{0}', 'p{0}'))


def patchify(x, patch):
  """[b *space c] -> tokens [b n (*patch c)], in any number of space axes, `patch` a side."""
  axes = range(x.ndim - 2)
  if any(side % patch for side in x.shape[1:-1]):
    raise ValueError(f'a grid of {x.shape[1:-1]} does not divide into patches of {patch}')
  split, places, inner = _axes(len(axes))
  sizes = {f'p{i}': patch for i in axes}
  return einops.rearrange(x, f'b {split} c -> b ({places}) ({inner} c)', **sizes)


def unpatchify(tokens, space, patch):
  """Undoes `patchify`: [b n (*patch c)] -> [b *space c]."""
  axes = range(len(space))
  split, places, inner = _axes(len(axes))
  sizes = {f'n{i}': side // patch for i, side in enumerate(space)} | {f'p{i}': patch for i in axes}
  return einops.rearrange(tokens, f'b ({places}) ({inner} c) -> b {split} c', **sizes)


def attention(q, k, v):
  """Softmax attention, [b n k d] each; the softmax in float32 whatever the dtype."""
  return jax.nn.dot_product_attention(q, k, v)


def flat_dot(x, kernel, dimensions, **options):
  """The product of a Dense layer, [... in] by [in out], over rows in one axis.

  The gradient of a kernel then sums over one axis, not two, which takes half the time on a CPU.
  """
  rows = x.reshape(-1, x.shape[-1])
  return jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options).reshape(
    *x.shape[:-1], -1
  )


def dropout(x, keys, rate):
  """Zeroes a share `rate` of x and scales the rest; [b ...] with a key an example, `keys` [b].

  Without keys (at test time) x stays. A key an example: the batch, its accumulation and its devices
  change nothing.
  """
  if keys is None or not rate:
    return x
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
