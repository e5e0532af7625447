"""Exponential moving averages of parameters, several decays at a time.

  ema <- d ema + (1 - d) params,   d = min(decay, (1 + n) / (10 + n)) after n updates,

so that the average starts at the parameters themselves and forgets them quickly.
"""

import jax
import jax.numpy as jnp


def names(decays):
  """The names averages go by, as '0.999'. Raises ValueError for a decay outside [0, 1)."""
  for decay in decays:
    if not 0 <= decay < 1:
      raise ValueError(f'ema: decay {decay!r} is outside [0, 1)')
  return tuple(f'{decay:g}' if float(f'{decay:g}') == decay else repr(decay) for decay in decays)


def init(params, decays):
  """{name: a copy of params} for a list of decays."""
  return {name: jax.tree.map(jnp.copy, params) for name in names(decays)}


def update(ema, params, count):
  """The averages after update number `count` (0 for the first)."""
  def average(decay, tree):
    d = jnp.minimum(decay, (1. + count) / (10. + count))
    return jax.tree.map(lambda e, p: e + (1 - d) * (p - e), tree, params)
  return {name: average(float(name), tree) for name, tree in ema.items()}
