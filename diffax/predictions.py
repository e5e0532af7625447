"""What a network predicts, and what it is told.

A prediction is a row (a, b): the network's target is `a x0 + b eps`. With x = alpha x0 + sigma eps
that makes two equations in two unknowns, so that every conversion between predictions is one 2x2
solve, and every re-weighting of a loss from one space to another one ratio of determinants:

  | alpha sigma | | x0  |   | x   |                det = alpha b - sigma a
  |   a     b   | | eps | = | out |,

With the row go the scale of the network's input (c_in) and the time it is told (c_noise), so that
a network never knows its convention. Every factory takes the schedule first.
"""

from typing import NamedTuple
from collections.abc import Callable

from jax import Array
import jax.numpy as jnp

from diffax import schedules


class Estimate(NamedTuple):
  """What a denoiser says of x: the clean data, the noise, where learned the log variance."""

  x0: Array
  eps: Array
  logvar: Array | None = None


class Prediction(NamedTuple):
  """row: Level -> (a, b); c_in: Level -> scale of the input; clock: Level -> the network's time."""

  row: Callable
  c_in: Callable
  clock: Callable


def unit_variance(level):
  """Scales x to unit variance where data and noise have it: 1 for variance-preserving schedules."""
  return 1 / jnp.sqrt(level.alpha**2 + level.sigma**2)


def x0(schedule) -> Prediction:
  """The clean data; Salimans & Ho 2022, sec. 4."""
  def row(level):
    return jnp.ones_like(level.t), jnp.zeros_like(level.t)
  return Prediction(row, unit_variance, schedule.clock)


def eps(schedule) -> Prediction:
  """The noise; Ho et al. 2020, eq. 14. Says nothing of x0 where alpha = 0."""
  def row(level):
    return jnp.zeros_like(level.t), jnp.ones_like(level.t)
  return Prediction(row, unit_variance, schedule.clock)


def v(schedule) -> Prediction:
  """alpha eps - sigma x0; Salimans & Ho 2022, appendix D."""
  def row(level):
    return -level.sigma, level.alpha
  return Prediction(row, unit_variance, schedule.clock)


def velocity(schedule) -> Prediction:
  """dx_t/dt = alpha' x0 + sigma' eps, which for straight lines is eps - x0; Lipman et al. 2022,
  eq. 9.

  Below t_min, where sigma' may grow without bound (VP), the row is that of t_min.
  """
  def row(level):
    return schedules.rates(schedule, jnp.maximum(level.t, schedule.t_min))
  return Prediction(row, lambda level: jnp.ones_like(level.t), schedule.clock)


def edm(schedule, sigma_data=0.5, time_scale=1.) -> Prediction:
  """The F of Karras et al. 2022, eq. 7 and table 1, for data of standard deviation `sigma_data`.

  x0 = c_skip x + c_out F(c_in x, c_noise), of unit variance in and out. For alpha other than 1 it
  is the same on x / alpha. time_scale multiplies c_noise = log(sigma) / 4, which lies within about
  -2 and 1: a network whose sinusoids were made for times up to 1000 wants 1000.
  """
  def scale(level):
    return jnp.sqrt(level.sigma**2 + (sigma_data * level.alpha)**2)
  def row(level):
    return level.sigma / (sigma_data * scale(level)), -sigma_data * level.alpha / scale(level)
  def clock(level):
    return time_scale * schedules.log_clock(level)
  return Prediction(row, lambda level: 1 / scale(level), clock)


def det(prediction, level):
  """alpha b - sigma a: a squared error of the target is (det / sigma)^2 times that of x0."""
  a, b = prediction.row(level)
  return level.alpha * b - level.sigma * a


def target(prediction, x0, eps, level):
  """What the network should say."""
  a, b = prediction.row(level)
  return a * x0 + b * eps


def solve(prediction, out, x, level):
  """x0 and eps from the network's output `out` at `x`, both of its shape; see the module's text.

  At the very ends the limit is taken: x0 = x / alpha where sigma = 0, eps = x / sigma where
  alpha = 0. What no limit gives (the noise in clean data, under x0 prediction) is 0.
  """
  a, b = prediction.row(level)
  d = level.alpha * b - level.sigma * a
  inverse = jnp.where(d == 0, 0., 1 / jnp.where(d == 0, 1., d))
  clean, noise = level.sigma == 0, level.alpha == 0
  x0 = inverse * (b * x - level.sigma * out)
  eps = inverse * (level.alpha * out - a * x)
  x0 = jnp.where(clean, x / jnp.where(noise, 1., level.alpha), x0)
  eps = jnp.where(noise, x / jnp.where(clean, 1., level.sigma), eps)
  return Estimate(x0, eps)


def invert(x0, x, level):
  """The estimate that an `x0` at `x` amounts to; its noise is 0 where there is none to tell."""
  sigma = jnp.where(level.sigma == 0, jnp.inf, level.sigma)
  return Estimate(x0, (x - level.alpha * x0) / sigma)


def estimate(said, x, level):
  """What a denoiser said at `x`, in full: an `Estimate` as it is, a plain x0 through `invert`."""
  return said if isinstance(said, Estimate) else invert(said, x, level)


def check(prediction, schedule, name=''):
  """Raises ValueError if x0 cannot be told from the output at the schedule's noisy end."""
  level = schedule(schedule.t_max)
  if abs(float(det(prediction, level))) < 1e-5:
    raise ValueError(
        f'prediction {name!r} says nothing of x0 at t={schedule.t_max:g}, where alpha='
        f'{float(level.alpha):.2g}: use v, velocity, x0 or edm, or a schedule that keeps signal')
