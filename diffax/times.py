"""Laws of t: at which times a network is trained.

A law is a factory `schedule -> (u -> t)`: the quantile function that takes a number uniform in (0,
1) to a time in [t_min, t_max], of u's shape, and rises; so one law serves independent, stratified
and importance draws of u alike.
"""

from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from diffax import schedules


TAIL = 1e-7  # float32 knows no uniform number nearer to 1: quantiles stay finite


# --- laws: schedule -> (u -> t) -------------------------------------------------------------------


def _normal(u, mean, std):
  return mean + std * jax.scipy.special.ndtri(jnp.clip(u, TAIL, 1 - TAIL))


def _rounded(x, low, high):
  """`x` within [low, high], which only rounding left: its derivative goes on to the ends."""
  return x + jax.lax.stop_gradient(jnp.clip(x, low, high) - x)


def _spread(schedule, part):
  """The time at a `part` in [0, 1] of [t_min, t_max]."""
  low, high = schedule.t_min, schedule.t_max
  return _rounded(low + (high - low) * part, low, high)


def uniform(schedule):
  """t uniform in [t_min, t_max]; Song et al. 2021, eq. 7."""
  return lambda u: _spread(schedule, u)


def log_uniform(schedule, low=-20., high=20.):
  """log-SNR uniform between the schedule's ends, as far as they lie within [low, high].

  Kingma & Gao 2023, "Understanding Diffusion Objectives as the ELBO", whose range is the default.
  """
  if low >= high:
    raise ValueError(f'low={low} must be less than high={high}, both log-SNR')
  def law(u):
    clean, noisy = (2 * schedule(t).lam for t in (schedule.t_min, schedule.t_max))
    first, last = jnp.minimum(clean, high), jnp.maximum(noisy, low)
    t = schedules.inverse(schedule, (first + (last - first) * u) / 2)
    return _rounded(t, schedule.t_min, schedule.t_max)
  return law


def log_normal(schedule, mean=-1.2, std=1.2):
  """log(sigma / alpha) ~ N(mean, std); Karras et al. 2022, table 1 (P_mean, P_std)."""
  def law(u):
    t = schedules.inverse(schedule, -_normal(u, mean, std))
    return jnp.clip(t, schedule.t_min, schedule.t_max)
  return law


def log_logistic(schedule, mean=-0.6931, scale=0.5):
  """log(sigma / alpha) logistic, of location `mean`, within the schedule's ends.

  Crowson et al. 2024, "Hourglass Diffusion Transformers"; the location is log(sigma_data).
  """
  def law(u):
    below, above = (
        jax.nn.sigmoid(sign * (-schedule(t).lam - mean) / scale)
        for t, sign in ((schedule.t_min, 1), (schedule.t_max, -1)))  # mass outside the ends
    inside = 1 - below - above
    # by either tail: 1 - u keeps its digits where the level is high
    odds = jnp.log(below + inside * u) - jnp.log(jnp.maximum(above + inside * (1 - u), TAIL))
    t = schedules.inverse(schedule, -(mean + scale * odds))
    return _rounded(t, schedule.t_min, schedule.t_max)
  return law


def logit_normal(schedule, mean=0., std=1.):
  """logit(t / t_max) ~ N(mean, std); Esser et al. 2024, "Scaling Rectified Flow", eq. 19."""
  def law(u):
    t = schedule.t_max * jax.nn.sigmoid(_normal(u, mean, std))
    return jnp.clip(t, schedule.t_min, schedule.t_max)
  return law


def mode(schedule, s=1.29):
  """More of the middle of [t_min, t_max] for s > 0, more of its ends for s < 0.

  Esser et al. 2024, eq. 20, which falls in u and is symmetric: here of 1 - u. Raises ValueError
  for s outside [-1, 2 / (pi - 2)], where it is no quantile function.
  """
  if not -1 <= s <= 1.7519:
    raise ValueError(f's={s} is outside [-1, 1.7519], where the law would not rise in u')
  return lambda u: _spread(schedule, u - s * (jnp.sin(jnp.pi / 2 * u)**2 - u))


def cosmap(schedule):
  """Straight lines at the log-SNR of the cosine schedule: tan(pi u / 2) = t / (1 - t).

  Over [t_min, t_max]; Esser et al. 2024, eq. 21.
  """
  def law(u):
    data, noise = jnp.sin(jnp.pi / 2 * (1 - u)), jnp.sin(jnp.pi / 2 * u)
    return _spread(schedule, noise / (data + noise))
  return law


def shifted(schedule, of, shift=3.):
  """The law `of`, its t moved to shift t / (1 + (shift - 1) t), for t in units of t_max.

  Esser et al. 2024, eq. 23: the square root of the ratio of resolutions. of: u -> t, a law built.
  """
  if shift <= 0:
    raise ValueError(f'shift={shift} must be above 0; 1 shifts nothing')
  def law(u):
    t = of(u) / schedule.t_max
    return jnp.clip(
        schedule.t_max * shift * t / (1 + (shift - 1) * t), schedule.t_min, schedule.t_max)
  return law


# --- draws: (key, count) -> u, over the global batch ----------------------------------------------


def independent(key, count):
  """u [count], uniform in [0, 1): each example's of (key, its number) alone."""
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
  return jax.vmap(jax.random.uniform)(keys)


def stratified(key, count):
  """u [count] in [0, 1), evenly spaced from one random offset: each uniform, their mean steadier.

  Kingma et al. 2021, "Variational Diffusion Models", appendix on the low-discrepancy sampler.
  """
  return jnp.mod(jax.random.uniform(key) + jnp.arange(count) / count, 1.)


# --- importance: a law learned from the losses it met ---------------------------------------------


class Importance(NamedTuple):
  """The last losses of each bin of u. history: [bins n]; count: losses met, [bins] integers."""

  history: Array
  count: Array


def importance_init(bins=100, history=10):
  """No loss met yet; `history` losses are kept for each of `bins` equal bins of u in [0, 1).

  Nichol & Dhariwal 2021, sec. 3.3.
  """
  return Importance(jnp.zeros((bins, history)), jnp.zeros(bins, jnp.int32))


def importance_update(state, u, losses):
  """The state after a batch: losses [b] met at the places u [b], before any importance weight.

  The batch's order changes nothing: losses enter by rising u, each over the oldest of its bin.
  Nichol & Dhariwal 2021, sec. 3.3.
  """
  bins, kept = state.history.shape
  order = jnp.argsort(u)
  u, losses = u[order], losses[order]
  which = _bin(u, bins)
  met = jnp.zeros(bins, jnp.int32).at[which].add(1)
  rank = jnp.arange(len(u)) - (jnp.cumsum(met) - met)[which]
  slot = (state.count[which] + rank) % kept
  # of more than a bin keeps only the last are written, so that no two meet in a slot
  row = jnp.where(rank >= met[which] - kept, which, bins)
  history = state.history.at[row, slot].set(losses.astype(state.history.dtype), mode='drop')
  return Importance(history, state.count + met)


def importance_law(state, floor=0.001):
  """u -> (place, weight): a new u, drawn more where losses are large, and 1 / its density.

  p ~ sqrt(E[L^2]) of each bin, mixed with a share `floor` of uniform; uniform until every bin's
  history is full. Any law is asked at the place, law(place), and any loss there is multiplied by
  the weight, which leaves its expectation. Nichol & Dhariwal 2021, sec. 3.3 and eq. 18.
  """
  bins, kept = state.history.shape
  size = jnp.sqrt(jnp.mean(state.history**2, axis=1))
  total = jnp.sum(size)
  warm = jnp.all(state.count >= kept) & (total > 0)
  p = jnp.where(warm, (1 - floor) * size / jnp.where(warm, total, 1.) + floor / bins, 1 / bins)
  ends = jnp.cumsum(p)

  def law(u):
    which = jnp.minimum(jnp.searchsorted(ends, u, side='right'), bins - 1)
    into = _rounded((u - (ends - p)[which]) / p[which], 0., 1.)
    return (which + into) / bins, 1 / (p[which] * bins)

  return law


def _bin(u, bins):
  return jnp.clip((u * bins).astype(jnp.int32), 0, bins - 1)
