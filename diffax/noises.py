"""Noise, keyed by example: what an example draws does not depend on the others of its batch."""

import jax
import jax.numpy as jnp


def normal(keys, shape, dtype=jnp.float32):
  """Unit noise [b *shape], an example a key."""
  return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def fold(keys, number):
  """Keys [b] of what is numbered `number`."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def independent(keys, shape, dtype):
  """Noise anew for every row: `(row number, draw, span) -> unit noise [b *shape]`."""
  def draw(number, draw, span):
    del span
    return normal(fold(fold(keys, number + 1), draw), shape, dtype)
  return draw


def brownian(keys, shape, dtype, reach=15., depth=15):
  """Noise of one Brownian path a sample: any grid, and any finer one, sees the same.

  The path is W(SNR), whose increment over a step is what the reverse SDE adds in it; it is divided
  by its standard deviation. Evaluated by bridges halving log-SNR within +-reach, `depth` times (Li
  et al. 2020, "Scalable Gradients", algorithm 3): one number in lambda for all of a batch.
  """
  def snr(lam):
    return jnp.exp(2 * lam)

  def path(lam):
    def halve(_, carry):
      node, low, high, w_low, w_high = carry
      mid = (low + high) / 2
      share = (snr(mid) - snr(low)) / (snr(high) - snr(low))
      bridge = jnp.sqrt(share * (snr(high) - snr(mid)))
      w_mid = w_low + share * (w_high - w_low) + bridge * normal(fold(keys, node), shape)
      up = (lam >= mid).astype(jnp.int32)
      pick = lambda a, b: jnp.where(up, a, b)
      ends = pick(mid, low), pick(high, mid), pick(w_mid, w_low), pick(w_high, w_mid)
      return 2 * node + up, *ends

    ends = jnp.float32(-reach), jnp.float32(reach)
    w_end = jnp.exp(ends[1]) * normal(fold(keys, 0), shape)
    carry = jnp.int32(1), *ends, jnp.zeros_like(w_end), w_end
    _, low, high, w_low, w_high = jax.lax.fori_loop(0, depth, halve, carry)
    return w_low + (snr(lam) - snr(low)) / (snr(high) - snr(low)) * (w_high - w_low)

  def draw(number, draw, span):
    del number, draw
    a, b = (jnp.clip(lam.astype(jnp.float32), -reach, reach) for lam in span)
    std = jnp.sqrt(jnp.maximum(jnp.abs(snr(b) - snr(a)), 1e-30))
    return ((path(b) - path(a)) / std).astype(dtype)

  return draw
