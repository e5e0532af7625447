"""Noise schedules: functions from time to noise level.

Everything rests on one line:

  x_t = alpha(t) x0 + sigma(t) eps,   eps ~ N(0, 1),

with t = 0 the data and t growing towards noise. A schedule is a function `t -> Level` together with
the range of times in which a network is trained and asked. Half the log signal-to-noise ratio,
lambda = log(alpha / sigma), falls in t; rates of change and the inverse t(lambda) follow from the
function itself (Kingma et al. 2021, "Variational Diffusion Models", sec. 3).
"""

from typing import NamedTuple
from collections.abc import Callable

import jax
from jax import Array
import jax.numpy as jnp


class Level(NamedTuple):
  """A noise level: time and the two coefficients of x_t = alpha x0 + sigma eps.

  The three arrays have one shape, which broadcasts against x: a scalar for all of a batch,
  `[b 1 1 1]` for a level an example, `[b f 1 1 1]` for a level a frame.
  """

  t: Array
  alpha: Array
  sigma: Array

  @property
  def lam(self):
    """Half log-SNR, log(alpha / sigma): +inf at clean data, -inf at pure noise."""
    return jnp.log(self.alpha) - jnp.log(self.sigma)

  @property
  def nsr(self):
    """Noise-to-signal ratio sigma / alpha: Karras's sigma for every schedule."""
    return self.sigma / self.alpha


class Schedule(NamedTuple):
  """A function from time to `Level`, and where it holds.

  level: t -> Level, for t of any shape.
  t_min, t_max: the smallest and the largest time a network is trained at or asked at. Level(0) is
    clean data; a sampler arrives there without asking.
  clock: Level -> the number a network is told as its time, unless its prediction says otherwise.
  t_end: where the inverse stops looking; more than t_max where the formula goes on beyond it.
  """

  level: Callable[[Array], Level]
  t_min: float
  t_max: float
  clock: Callable[[Level], Array] = lambda level: 1000. * level.t
  t_end: float = 1.

  def __call__(self, t):
    return self.level(jnp.asarray(t, jnp.result_type(float)) if not hasattr(t, 'dtype') else t)


def linear(t_min=1e-3) -> Schedule:
  """Straight lines from data to noise: alpha = 1 - t, sigma = t.

  Liu et al. 2022, "Flow Straight and Fast", eq. 1; Lipman et al. 2022, "Flow Matching", eq. 20.
  """
  return Schedule(lambda t: Level(t, 1 - t, t), t_min, 1.)


def cosine(t_min=1e-3) -> Schedule:
  """alpha = cos(pi t / 2), sigma = sin(pi t / 2).

  Nichol & Dhariwal 2021, eq. 17, without its offset, as in Salimans & Ho 2022, sec. 2. Written
  with sin(pi (1 - t) / 2), for in float32 cos(pi / 2) is -4e-8 and its logarithm NaN.
  """
  def level(t):
    return Level(t, jnp.sin(jnp.pi / 2 * (1 - t)), jnp.sin(jnp.pi / 2 * t))
  return Schedule(level, t_min, 1.)


def vp(beta_min=0.1, beta_max=20., t_min=1e-3) -> Schedule:
  """Variance preserving, with beta linear in t: DDPM in continuous time.

  Song et al. 2021, "Score-Based Generative Modeling through SDEs", eq. 33; t_min is its
  sampling epsilon (appendix C). At t = 1 a trace of data is left: alpha = 0.0066.
  """
  def level(t):
    log_alpha = -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min
    return Level(t, jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha)))
  return Schedule(level, t_min, 1.)


def ve(sigma_min=0.002, sigma_max=80.) -> Schedule:
  """Variance exploding as EDM writes it: time is the noise's standard deviation, alpha = 1.

  Karras et al. 2022, "Elucidating the Design Space", table 1, whose sigma range is the default.
  The network is told log(sigma) / 4.
  """
  def level(t):
    return Level(t, jnp.ones_like(t), t)
  return Schedule(level, sigma_min, sigma_max, log_clock, t_end=100 * sigma_max)


def log_clock(level):
  """log(sigma / alpha) / 4, the time of Karras et al. 2022, table 1 (c_noise)."""
  return -level.lam / 4


def rates(schedule, t):
  """d(alpha)/dt and d(sigma)/dt at `t`, of its shape, by forward differentiation."""
  _, d = jax.jvp(schedule, (t,), (jnp.ones_like(t),))
  return d.alpha, d.sigma


def inverse(schedule, lam, steps=60):
  """The time at which half the log-SNR is `lam`, of its shape; in [0, t_end].

  By bisection, for lambda only falls, then one Newton step from there, which leaves the value and
  gives it its derivative in `lam` and in what the schedule closes over (a learned schedule's
  parameters). A `lam` outside the schedule's range gives the end of the range.
  """
  def halve(_, bounds):
    low, high = bounds
    mid = (low + high) / 2
    early = schedule(mid).lam > lam
    return jnp.where(early, mid, low), jnp.where(early, high, mid)

  low, high = jnp.zeros_like(lam), jnp.full_like(lam, schedule.t_end)
  t = jax.lax.stop_gradient(sum(jax.lax.fori_loop(0, steps, halve, (low, high))) / 2)
  found, slope = jax.jvp(lambda t: schedule(t).lam, (t,), (jnp.ones_like(t),))
  newton = (lam - found) / jax.lax.stop_gradient(slope)
  small = jnp.abs(newton) < 1e-3 * t  # elsewhere lam is out of range, or infinite
  return t + jnp.where(small, newton, 0.)


def start(schedule, t, noise):
  """x at time `t` where nothing of the data is left: noise scaled to the level's sigma.

  For a variance-exploding schedule that is sigma_max times unit noise, not unit noise.
  """
  return schedule(t).sigma.astype(noise.dtype) * noise
