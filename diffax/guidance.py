"""Guidance: functions from denoisers to denoisers.

A conditional denoiser is `(x, level, cond) -> x0` or `-> Estimate`, with `cond` a dict of arrays of
one leading batch axis. Guidance binds the conditions and returns a plain `(x, level) -> Estimate`,
which any sampler takes.
"""

import jax
import jax.numpy as jnp

from diffax import predictions


def condition(denoise, cond):
  """No guidance: binds `cond`."""
  return lambda x, level: denoise(x, level, cond)


def cfg(denoise, cond, null, scale, low=0., high=jnp.inf):
  """Classifier-free guidance, null + scale (cond - null), both branches in one batch of 2b.

  Ho & Salimans 2022, eq. 6, in the convention in which scale 1 is no guidance. `low`, `high` bound
  the noise level sigma/alpha at which it acts (Kynkäänniemi et al. 2024, "Limited Interval",
  eq. 6), an example at a time where levels differ; with none inside, only the conditional branch is
  computed. `null` may hold a negative prompt.
  """
  def alone(x, level, scale):
    del scale
    return predictions.estimate(denoise(x, level, cond), x, level)

  def both(x, level, scale):
    twice = lambda a: jnp.concatenate([a, a]) if a.ndim else a  # a level may be one for all
    stacked = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
    xs, levels = twice(x), jax.tree.map(twice, level)
    said = predictions.estimate(denoise(xs, levels, stacked), xs, levels)
    good = jax.tree.map(lambda a: a[:len(x)], said)
    bad = jax.tree.map(lambda a: a[len(x):], said)
    push = lambda g, b: (g + (scale - 1) * (g - b)).astype(g.dtype)  # exactly g at scale 1
    return good._replace(x0=push(good.x0, bad.x0), eps=push(good.eps, bad.eps))

  def guided(x, level):
    if isinstance(scale, (int, float)) and scale == 1:
      return alone(x, level, scale)
    if low <= 0 and high == jnp.inf:
      return both(x, level, scale)
    acts = (low <= level.nsr) & (level.nsr <= high)
    return jax.lax.cond(jnp.any(acts), both, alone, x, level, jnp.where(acts, scale, 1.))

  return guided
