"""Grids: the times a sampler visits, from pure noise down to clean data.

A grid is a function `(schedule, steps) -> times [steps + 1]`, falling from t_max to 0. Its last
time is clean data, at which no network is asked. One name is one grid in every sampler.
"""

import jax.numpy as jnp

from diffax import schedules

LAM_NOISE = -6.  # where alpha = 0, lambda is -inf: there a grid in log-SNR begins at e^6 noise


def uniform(schedule, steps):
  """Equal steps in t, t_max down to 0."""
  return jnp.linspace(schedule.t_max, 0., steps + 1)


def _descend(schedule, steps, space, back):
  """t_max, then `steps - 1` times equally far apart in `space(lam)` down to t_min, then 0."""
  ends = schedule(jnp.array([schedule.t_max, schedule.t_min])).lam
  first, last = space(jnp.maximum(ends, LAM_NOISE))
  lam = back(first + (last - first) * jnp.linspace(0., 1., steps))
  t = schedules.inverse(schedule, lam)
  return jnp.concatenate([jnp.array([schedule.t_max]), t[1:], jnp.zeros(1)])


def karras(schedule, steps, rho=7.):
  """Equal steps in (sigma/alpha)^(1/rho), from t_max to t_min; then 0.

  Karras et al. 2022, eq. 5.
  """
  return _descend(schedule, steps, lambda lam: jnp.exp(-lam / rho), lambda y: -rho * jnp.log(y))


def log_snr(schedule, steps):
  """Equal steps in lambda, from t_max to t_min; then 0. Lu et al. 2022, "DPM-Solver", sec. 3.3."""
  return _descend(schedule, steps, lambda lam: lam, lambda lam: lam)
