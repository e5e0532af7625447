"""Laws of t: at which times a network is trained.

A law is a factory `schedule -> (u -> t)`: the quantile function that takes a number uniform in (0,
1) to a time in [t_min, t_max], of u's shape; so one law serves independent and stratified draws.
"""

import jax
import jax.numpy as jnp

from diffax import schedules


def _normal(u, mean, std):
  tail = 1e-7  # float32 knows no uniform number nearer to 1: quantiles stay finite
  return mean + std * jax.scipy.special.ndtri(jnp.clip(u, tail, 1 - tail))


def uniform(schedule):
  """t uniform in [t_min, t_max]; Song et al. 2021, eq. 7."""
  low, high = schedule.t_min, schedule.t_max
  return lambda u: low + (high - low) * u


def log_normal(schedule, mean=-1.2, std=1.2):
  """log(sigma / alpha) ~ N(mean, std); Karras et al. 2022, table 1 (P_mean, P_std)."""
  def law(u):
    t = schedules.inverse(schedule, -_normal(u, mean, std))
    return jnp.clip(t, schedule.t_min, schedule.t_max)
  return law


def logit_normal(schedule, mean=0., std=1.):
  """logit(t / t_max) ~ N(mean, std); Esser et al. 2024, "Scaling Rectified Flow", eq. 19."""
  def law(u):
    t = schedule.t_max * jax.nn.sigmoid(_normal(u, mean, std))
    return jnp.clip(t, schedule.t_min, schedule.t_max)
  return law
