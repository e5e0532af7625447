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
import jax
import jax.numpy as jnp

from diffax import schedules


class Estimate(NamedTuple):
  """What a denoiser says of x: the clean data, the noise, and what it learned of its variance.

  fraction: v of Nichol & Dhariwal 2021, eq. 15: the log variance of a step is v log(beta) +
    (1 - v) log(beta~), v near [0, 1]; None where the variance is not learned.
  """

  x0: Array
  eps: Array
  fraction: Array | None = None


class Prediction(NamedTuple):
  """row: Level -> (a, b); c_in: Level -> scale of the input; clock: Level -> the network's time.

  outputs: channels that the network gives for each of x: 2 where it says its variance too, so that
    the target stands against the first of `split(prediction, out)`.
  """

  row: Callable
  c_in: Callable
  clock: Callable
  outputs: int = 1


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


def score(schedule) -> Prediction:
  """The gradient of log p(x_t | x0), -eps / sigma; Song et al. 2021, eq. 7.

  Below t_min, where it grows without bound, the row is that of t_min. Says nothing of x0 where
  alpha = 0.
  """
  def row(level):
    sigma = jnp.maximum(level.sigma, schedule(schedule.t_min).sigma)
    return jnp.zeros_like(level.t), -1 / sigma
  return Prediction(row, unit_variance, schedule.clock)


def velocity(schedule) -> Prediction:
  """dx_t/dt = alpha' x0 + sigma' eps, which for straight lines is eps - x0; Lipman et al. 2022,
  eq. 9.

  t is the level's own time: it is eps - x0 also for straight lines that are shifted. Below t_min,
  where sigma' may grow without bound (VP), the row is that of t_min.
  """
  def row(level):
    t = jnp.maximum(level.t, schedule.t_min)
    _, speed = jax.jvp(schedule.own, (t,), (jnp.ones_like(t),))
    return tuple(rate / speed for rate in schedules.rates(schedule, t))
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


def trigflow(schedule, sigma_data=0.5, time_scale=1.) -> Prediction:
  """The F of Lu & Song 2024, sec. 3, for data of standard deviation `sigma_data`.

  x0 = cos(t) x - sin(t) sigma_data F(x / sigma_data, t), where x has the data's deviation at every
  angle t = atan(sigma / (alpha sigma_data)), which is what the network is told, times time_scale.
  For any other schedule it is the same on x scaled to that deviation; so F is minus that of `edm`.
  """
  of_edm = edm(schedule, sigma_data)
  def row(level):
    a, b = of_edm.row(level)
    return -a, -b
  def clock(level):
    return time_scale * jnp.arctan2(level.sigma, sigma_data * level.alpha)
  return Prediction(row, of_edm.c_in, clock)


def learned_range(schedule, of: Prediction) -> Prediction:
  """As `of`, and as many channels again for the variance; Nichol & Dhariwal 2021, eq. 15.

  The second half of the network's channels, within about [-1, 1], says which fraction of the way
  from log(beta~) to log(beta) the log variance of a step lies, as (1 + out) / 2.
  """
  return of._replace(outputs=2)


def det(prediction, level):
  """alpha b - sigma a: a squared error of the target is (det / sigma)^2 times that of x0.

  Salimans & Ho 2022, sec. 4, for the weights it stands for.
  """
  a, b = prediction.row(level)
  return level.alpha * b - level.sigma * a


def target(prediction, x0, eps, level):
  """What the network should say."""
  a, b = prediction.row(level)
  return a * x0 + b * eps


def split(prediction, out):
  """A network's output as (what is compared to the target, the fraction of the variance or None).

  out [... outputs * c] gives [... c] twice. A loss of the first half alone leaves the second
  untrained; a bound on the likelihood trains it, on the first without its gradient (Nichol &
  Dhariwal 2021, eq. 16).
  """
  if prediction.outputs == 1:
    return out, None
  out, fraction = jnp.split(out, 2, axis=-1)
  return out, (fraction + 1) / 2


def solve(prediction, out, x, level):
  """x0 and eps from the network's output `out` at `x`, both of its shape; see the module's text.

  `out` has prediction.outputs channels for each of x's; the second half of 2 is the estimate's
  fraction. Raises ValueError for another number. At the very ends the limit is taken: x0 =
  x / alpha where sigma = 0, eps = x / sigma where alpha = 0. What no limit gives (the noise in
  clean data, under x0 prediction) is 0.
  """
  if out.shape[-1:] != tuple(prediction.outputs * n for n in x.shape[-1:]):
    raise ValueError(
        f'the network said {out.shape} of x {x.shape}: the prediction takes {prediction.outputs} '
        'channels for each of x; give the model that many (2 is `learned_range`)')
  out, fraction = split(prediction, out)
  a, b = prediction.row(level)
  d = level.alpha * b - level.sigma * a
  inverse = jnp.where(d == 0, 0., 1 / jnp.where(d == 0, 1., d))
  clean, noise = level.sigma == 0, level.alpha == 0
  x0 = inverse * (b * x - level.sigma * out)
  eps = inverse * (level.alpha * out - a * x)
  x0 = jnp.where(clean, x / jnp.where(noise, 1., level.alpha), x0)
  eps = jnp.where(noise, x / jnp.where(clean, 1., level.sigma), eps)
  return Estimate(x0, eps, fraction)


def convert(prediction, other, out, x, level):
  """What a network of the prediction `other` would have said where one of `prediction` said `out`.

  Without the fraction of a learned variance. Salimans & Ho 2022, appendix D, has the cases of v.
  """
  told = solve(prediction, out, x, level)
  return target(other, told.x0, told.eps, level)


def invert(x0, x, level):
  """The estimate that an `x0` at `x` amounts to; its noise is 0 where there is none to tell."""
  sigma = jnp.where(level.sigma == 0, jnp.inf, level.sigma)
  return Estimate(x0, (x - level.alpha * x0) / sigma)


def estimate(said, x, level):
  """What a denoiser said at `x`, in full: an `Estimate` as it is, a plain x0 through `invert`."""
  return said if isinstance(said, Estimate) else invert(said, x, level)


def check(prediction, schedule, name=''):
  """Raises ValueError if x0 cannot be told from the output at the schedule's noisy end.

  That is where (a, b) is parallel to (alpha, sigma), as for eps and score where no signal is left,
  or not finite, as the velocity is where a schedule ends in a root.
  """
  level = schedule(schedule.t_max)
  row = jnp.stack(prediction.row(level))
  where = f'at t={schedule.t_max:g}, where alpha={float(level.alpha):.2g}'
  if not jnp.isfinite(row).all():
    raise ValueError(
        f'prediction {name!r} has no finite target {where}: use v, x0 or edm, or truncate the '
        'schedule before its end')
  sine = det(prediction, level) * unit_variance(level) / jnp.linalg.norm(row)
  if abs(float(sine)) < 1e-5:
    raise ValueError(
        f'prediction {name!r} says nothing of x0 {where}: use v, velocity, x0 or edm, or a '
        'schedule that keeps signal')
