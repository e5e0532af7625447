"""Noise schedules: functions from time to noise level.

Everything rests on one line:

  x_t = alpha(t) x0 + sigma(t) eps,   eps ~ N(0, 1),

with t = 0 the data and t growing towards noise. A schedule is a function `t -> Level` together with
the range of times in which a network is trained and asked. Half the log signal-to-noise ratio,
lambda = log(alpha / sigma), falls in t; rates of change and the inverse t(lambda) follow from the
function itself (Kingma et al. 2021, "Variational Diffusion Models", sec. 3).

First come formulas in continuous time, then tables of betas, then functions from schedules to
schedules (their argument `of`).
"""

from typing import Any, NamedTuple
from collections.abc import Callable

import einops
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np


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

  level: t -> Level, for t of any shape. (This is what `jax.jit` takes: a tuple it cannot hold.)
  t_min, t_max: the smallest and the largest time a network is trained at or asked at. Level(0) is
    clean data; a sampler arrives there without asking.
  clock: Level -> the number a network is told as its time, unless its prediction says otherwise.
  t_end: where the inverse stops looking; more than t_max where the formula goes on beyond it.
  own: t -> the noise level's own time, where a shift has moved it: the clock and a velocity are in
    that time, so that a network of the schedule without the shift understands them.
  """

  level: Callable[[Array], Level]
  t_min: float
  t_max: float
  clock: Callable[[Level], Array] = lambda level: 1000. * level.t
  t_end: float = 1.
  own: Callable[[Array], Array] = lambda t: t

  def __call__(self, t):
    wide = jnp.promote_types(jnp.asarray(t).dtype, jnp.float32)
    return self.level(jnp.asarray(t, wide if hasattr(t, 'dtype') else jnp.result_type(float)))


class Learned(NamedTuple):
  """Something with parameters of its own: a schedule, a weighting, whatever is trained along.

  init: key -> params, a tree of arrays.
  bind: params -> the plain thing (a `Schedule`, ...), differentiable in `params`.
  """

  init: Callable[[Array], Any]
  bind: Callable[[Any], Any]


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


def cosine_interpolated(size=512, low=32, high=256, t_min=1e-3) -> Schedule:
  """The cosine schedule shifted for images of `size` pixels a side, more near data than near noise.

  log SNR = that of cosine + 2 (1 - t) log(low / size) + 2 t log(high / size). Hoogeboom et al.
  2023, "simple diffusion", sec. 3.1. The plain shift is `shift_snr` of cosine. Raises ValueError
  for sizes that are not positive, and for high / low over e^pi, where log SNR would rise.
  """
  if not (min(size, low, high) > 0 and high < np.exp(np.pi) * low):
    raise ValueError(
        f'cosine_interpolated(size={size}, low={low}, high={high}): sizes are positive, and high /'
        f' low is under e^pi = 23.1, or log SNR rises with t: take a low nearer to high')
  def level(t):
    shift = (1 - t) * np.log(low / size) + t * np.log(high / size)
    return _preserving(
        t, jnp.exp(shift) * jnp.sin(jnp.pi / 2 * (1 - t)), jnp.sin(jnp.pi / 2 * t))
  return Schedule(level, t_min, 1.)


def trigflow(t_min=4e-3) -> Schedule:
  """alpha = cos(t), sigma = sin(t), for angles t up to pi / 2.

  Lu & Song 2024, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", sec. 3,
  for data of unit variance; `predictions.trigflow` knows of others. t_min is that of EDM's 0.002.
  """
  def level(t):
    return Level(t, jnp.sin(jnp.pi / 2 - t), jnp.sin(t))
  return Schedule(level, t_min, np.pi / 2, t_end=np.pi / 2)


def vp(beta_min=0.1, beta_max=20., t_min=1e-3) -> Schedule:
  """Variance preserving, with beta linear in t: DDPM in continuous time.

  Song et al. 2021, "Score-Based Generative Modeling through SDEs", eq. 33; t_min is its
  sampling epsilon (appendix C). At t = 1 a trace of data is left: alpha = 0.0066.
  """
  def level(t):
    log_alpha = -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min
    return Level(t, jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha)))
  return Schedule(level, t_min, 1.)


def sub_vp(beta_min=0.1, beta_max=20., t_min=1e-3) -> Schedule:
  """alpha of `vp`, sigma the square of its sigma: less noise than variance preserving.

  Song et al. 2021, appendix C (sub-VP), with beta linear in t.
  """
  def level(t):
    level = vp(beta_min, beta_max).level(t)
    return level._replace(sigma=level.sigma**2)
  return Schedule(level, t_min, 1.)


def ve(sigma_min=0.002, sigma_max=80.) -> Schedule:
  """Variance exploding as EDM writes it: time is the noise's standard deviation, alpha = 1.

  Karras et al. 2022, "Elucidating the Design Space", table 1, whose sigma range is the default.
  The network is told log(sigma) / 4.
  """
  def level(t):
    return Level(t, jnp.ones_like(t), t)
  return Schedule(level, sigma_min, sigma_max, log_clock, t_end=100 * sigma_max)


def edm(sigma_min=0.002, sigma_max=80.) -> Schedule:
  """`ve` by the name of the paper that it is from; Karras et al. 2022, table 1."""
  return ve(sigma_min, sigma_max)


def exponential(sigma_min=0.01, sigma_max=50., t_min=1e-5) -> Schedule:
  """Variance exploding as Song et al. write it: sigma = sigma_min (sigma_max / sigma_min)^t.

  Song et al. 2021, appendix C, with alpha = 1. There sigma jumps to 0 at t = 0; here it falls to 0
  in a straight line below t_min. The network is told log(sigma) / 4.
  """
  def level(t):
    sigma = sigma_min * jnp.exp(t * np.log(sigma_max / sigma_min))
    return Level(t, jnp.ones_like(t), sigma * jnp.where(t < t_min, t / t_min, 1.))
  return Schedule(level, t_min, 1., log_clock)


def sigmoid(start=-3., end=3., tau=1., t_min=1e-3) -> Schedule:
  """alpha^2 falls from 1 to 0 as a sigmoid of (start + (end - start) t) / tau does.

  Jabri et al. 2022, "Scalable Adaptive Computation" (RIN); Chen 2023, "On the Importance of Noise
  Scheduling", algorithm 1, unclipped. A difference of sigmoids is a sinh over two cosh, of which
  the SNR keeps  sinh(w (1 - t)) cosh(start / 2 tau) / (sinh(w t) cosh(end / 2 tau)),
  w = (end - start) / 2 tau: exact at both ends. Raises ValueError unless start < end and tau > 0.
  """
  if not (start < end and tau > 0):
    raise ValueError(f'sigmoid(start={start}, end={end}, tau={tau}): start < end and tau > 0')
  width = (end - start) / tau / 2
  def level(t):
    signal = jnp.sinh(width * (1 - t)) * np.cosh(start / tau / 2)
    noise = jnp.sinh(width * t) * np.cosh(end / tau / 2)
    return _preserving(t, jnp.sqrt(signal), jnp.sqrt(noise))
  return Schedule(level, t_min, 1.)


def laplace(mu=0., b=0.5, t_min=1e-3) -> Schedule:
  """Log SNR of Laplace's distribution, centre `mu` and width `b`, for uniform t.

  log SNR = mu - b sgn(1/2 - t) log(1 - 2 |t - 1/2|), variance preserving. Hang et al. 2024,
  "Improved Noise Schedule for Diffusion Training", table 1. The SNR is e^mu (q / p)^b, with
  p = min(2 t, 1) and q = min(2 (1 - t), 1). Raises ValueError unless b > 0.
  """
  if not b > 0:
    raise ValueError(f'laplace(b={b}): the width is positive')
  def level(t):
    p, q = jnp.minimum(2 * t, 1.), jnp.minimum(2 * (1 - t), 1.)
    return _preserving(t, np.exp(mu / 2) * q**(b / 2), p**(b / 2))
  return Schedule(level, t_min, 1.)


def learned(gamma_min=-13.3, gamma_max=5., width=1024, t_min=1e-3) -> Learned:
  """A monotone network for gamma = -log SNR, ends learned too; variance preserving.

  gamma~(u) = l1(u) + l3(sigmoid(l2(l1(u)))), of positive weights, made to run from gamma_min at
  t_min to gamma_max at t = 1: Kingma et al. 2021, appendix H. Below t_min sigma / alpha falls to 0
  in a straight line. The biases of l1 and l3, which l2's and the ends make up for, are left out.
  The network that denoises is told 1000 times gamma's place between its ends. Raises ValueError
  unless gamma_min < gamma_max, where they start.
  """
  if not gamma_min < gamma_max:
    raise ValueError(f'learned(gamma_min={gamma_min}, gamma_max={gamma_max}): the first is smaller')

  def init(key):
    scale, bias = jax.random.normal(key, (2, width))
    return dict(
        l1=jnp.zeros(()), l2=scale, bias=bias, l3=jnp.full(width, -np.log(width)),
        gamma_min=jnp.asarray(gamma_min, float), gamma_max=jnp.asarray(gamma_max, float))

  def bind(params):
    l1, l2, l3 = (jnp.exp(params[name]) for name in ('l1', 'l2', 'l3'))
    low, high = params['gamma_min'], params['gamma_max']

    def rise(u):  # gamma~(u) - gamma~(0), as one sum of small differences
      from_zero = jax.nn.sigmoid(l2 * l1 * u + params['bias']) - jax.nn.sigmoid(params['bias'])
      return l1 * u + (l3 * from_zero).sum()

    def level(t):
      u = jnp.where(t < t_min, 0., (t - t_min) / (1 - t_min))
      gamma = low + (high - low) * jnp.vectorize(rise)(u) / rise(jnp.ones((), t.dtype))
      fade = jnp.where(t < t_min, t / t_min, 1.)
      return _preserving(t, jnp.exp(-gamma / 4), fade * jnp.exp(gamma / 4))

    def clock(level):
      return 1000. * jnp.clip((-2 * level.lam - low) / (high - low), 0., 1.)

    return Schedule(level, t_min, 1., clock)

  return Learned(init, bind)


# --- tables ---------------------------------------------------------------------------------------


def alphas_cumprod(table) -> Schedule:
  """Any table of alpha^2 (`alphas_cumprod`), as of T steps of DDPM; variance preserving.

  Row i of 0 .. T-1 stands at t = (i + 1) / T, of which the network is told the index, T t - 1, and
  clean data at t = 0. In between, atan(sigma / alpha) is linear in t: monotone, and finite at both
  ends, so a last row of 0 (no signal) is welcome. Ho et al. 2020, eq. 4. Raises ValueError for a
  table that does not fall within 1 > alpha^2 >= 0.
  """
  table = np.asarray(table, np.float64)
  falls = table.ndim == 1 and table.size and np.all(np.diff(table) < 0)
  if not (falls and table[0] < 1 and table[-1] >= 0):
    raise ValueError(
        f'alphas_cumprod: {table} does not fall from below 1 to 0 or above: it wants the cumulative'
        ' products of 1 - beta, the least noise first; a table of betas goes to `betas`')
  with np.errstate(divide='ignore'):
    return _table(np.log(table))


def betas(table) -> Schedule:
  """Any table of DDPM's betas, the variances added a step; see `alphas_cumprod`.

  Raises ValueError for a beta outside of 0 < beta <= 1, or 1 before the last. Ho et al. 2020, eq.
  4.
  """
  table = np.asarray(table, np.float64)
  listed = table.ndim == 1 and table.size and (table > 0).all()
  if not (listed and (table[:-1] < 1).all() and table[-1] <= 1):
    raise ValueError(f'betas: {table} is not a list of numbers in (0, 1), of which the last may be'
                     ' 1; a table of products of 1 - beta goes to `alphas_cumprod`')
  with np.errstate(divide='ignore'):
    return _table(np.cumsum(np.log1p(-table)))


def linear_table(beta_min=1e-4, beta_max=0.02, steps=1000) -> Schedule:
  """DDPM's table: betas linear in the index. Ho et al. 2020, sec. 4."""
  return betas(np.linspace(beta_min, beta_max, steps))


def scaled_linear(beta_min=0.00085, beta_max=0.012, steps=1000) -> Schedule:
  """Stable Diffusion's table: betas whose roots are linear in the index.

  Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", whose
  released models have these ends.
  """
  return betas(np.linspace(beta_min**0.5, beta_max**0.5, steps)**2)


def squared_cosine(offset=0.008, beta_limit=0.999, steps=1000) -> Schedule:
  """alpha^2 = cos^2 of (t + offset) / (1 + offset) pi / 2, as a table of betas up to a limit.

  Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", eq. 17.
  """
  square = np.cos((np.arange(steps + 1) / steps + offset) / (1 + offset) * np.pi / 2)**2
  return betas(np.minimum(1 - square[1:] / square[:-1], beta_limit))


def _table(log_square):
  """The schedule through alpha = exp(log_square / 2), a float64 table; see `alphas_cumprod`."""
  steps = len(log_square)
  alpha = np.append(1., np.exp(log_square / 2))
  sigma = np.append(0., np.sqrt(-np.expm1(log_square)))
  # Each angle from the axis it vanishes at, so that neither sine is a rounded difference.
  to_signal, to_noise = np.arctan2(alpha, sigma), np.arctan2(sigma, alpha)

  def place(t):
    """T t, a whole number where t is one of the table's times but for rounding."""
    place = steps * t
    whole = jnp.round(place)
    near = (jnp.abs(place - whole) < 4 * steps * jnp.finfo(place.dtype).eps) & (whole > 0)
    return place + jax.lax.stop_gradient(jnp.where(near, whole - place, 0.))

  def level(t):
    row = place(t)
    low = jnp.clip(jnp.floor(row), 0, steps - 1).astype(jnp.int32)
    part = row - low
    between = lambda angles: (1 - part) * angles[low] + part * angles[low + 1]
    alpha, sigma = (jnp.sin(between(jnp.asarray(a, t.dtype))) for a in (to_signal, to_noise))
    return Level(t, alpha, sigma)

  return Schedule(level, 1 / steps, 1., lambda level: place(level.t) - 1)


# --- schedules of schedules -----------------------------------------------------------------------


def shift_snr(of: Schedule, factor=0.25) -> Schedule:
  """The SNR times `factor`, at every time; alpha^2 + sigma^2 stays, so also variance preserving.

  Hoogeboom et al. 2023, sec. 3.1: (64 / size)^2 for images of `size` pixels a side. It is also the
  square of the scale b of the data in Chen 2023, sec. 2.3. For straight lines `shift` with
  factor^-0.5 is the same SNR, and straight. Raises ValueError unless factor > 0.
  """
  if not factor > 0:
    raise ValueError(f'shift_snr(factor={factor}): what the SNR is multiplied by is positive')
  def level(t):
    was = of.level(t)
    norm = _norm(was)
    now = _preserving(t, factor**0.5 * was.alpha, was.sigma)
    return Level(t, norm * now.alpha, norm * now.sigma)
  return of._replace(level=level)


def zero_terminal_snr(of: Schedule) -> Schedule:
  """alpha shifted to 0 at t_max, and scaled so that at t_min it is as before.

  Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1. For
  tables t_min is the first row; below it nothing changes. Of a schedule that preserves no variance
  this is done to alpha / sqrt(alpha^2 + sigma^2), and the root stays what it was: straight lines,
  which end in noise, are left alone. The noise is then no prediction to make: x0, v or edm are.
  """
  def level(t):
    share = lambda level: level.alpha / _norm(level)
    first, last = share(of(of.t_min)), share(of(of.t_max))
    was = of.level(t)
    norm, alpha, sigma = _norm(was), share(was), was.sigma / _norm(was)
    left = jnp.where(t < of.t_min, alpha, (alpha - last) * first / (first - last))
    lost = jnp.where(t < of.t_min, 0., last * (first - alpha) / (first - last))
    over = jnp.where((t >= of.t_max) | (left < 0), left, 0.)  # by rounding; the slope is right
    left = left - jax.lax.stop_gradient(over)
    return Level(t, norm * left, norm * jnp.sqrt(sigma**2 + lost * (alpha + left)))
  return of._replace(level=level, t_end=of.t_max)


def shift(of: Schedule, shift=3.) -> Schedule:
  """Time moved towards noise: at t stands what stood at  shift t / (1 + (shift - 1) t).

  Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 23, where shift = 3; t is in units
  of t_max. For straight lines that divides the SNR by shift^2. The network's times, and the
  velocity, stay those of `of` (1000 sigma for straight lines). The laws of t and the grids have
  shifts too: take one of them, not both. Raises ValueError unless shift > 0.
  """
  if not shift > 0:
    raise ValueError(f'shift(shift={shift}): more than 1 towards noise, less towards data, over 0')
  moved = lambda t: shift_time(t, shift, of.t_max)
  def level(t):
    return of.level(moved(t))._replace(t=t)
  def clock(level):
    return of.clock(level._replace(t=moved(level.t)))
  first = shift_time(of.t_min, 1 / shift, of.t_max)
  return Schedule(level, first, of.t_max, clock, of.t_max, lambda t: of.own(moved(t)))


def shift_resolution(of: Schedule, size=1024, base=256) -> Schedule:
  """`shift` by sqrt(m / n), m and n the pixels of images `size` and `base` a side.

  Esser et al. 2024, eq. 23: noise that hides as much at `size` as `of` does at `base`.
  """
  return shift(of, size / base)


def shift_tokens(of: Schedule, tokens=4096, low=(256, 0.5), high=(4096, 1.15)) -> Schedule:
  """`shift` by e^mu, with mu linear in the number of tokens through the two pairs (tokens, mu).

  e^mu / (e^mu + (1 / t - 1)), Black Forest Labs 2024, "FLUX.1", the released sampler.
  """
  (few, least), (many, most) = low, high
  mu = least + (most - least) * (tokens - few) / (many - few)
  return shift(of, float(np.exp(mu)))


def truncate(of: Schedule, t_min, t_max) -> Schedule:
  """The same schedule, in which a network is trained and asked within [t_min, t_max] alone.

  Raises ValueError unless 0 < t_min < t_max <= the t_max of `of`. Song et al. 2021, appendix C, for
  why: the score grows without bound at data.
  """
  if not 0 < t_min < t_max <= of.t_max:
    raise ValueError(f'truncate(t_min={t_min}, t_max={t_max}): 0 < t_min < t_max <= {of.t_max:g}')
  return of._replace(t_min=t_min, t_max=t_max)


# --- of any schedule ------------------------------------------------------------------------------


def shift_time(t, shift, t_max=1.):
  """The time that `shift` moves t to, of t's shape; undone by 1 / shift. Esser et al. 2024, eq. 23.

  0 and t_max stay, exactly.
  """
  u = t / t_max
  return t_max * (shift * u / (shift * u + (1 - u)))


def log_clock(level):
  """log(sigma / alpha) / 4, the time of Karras et al. 2022, table 1 (c_noise).

  Held within +-5, e^20 in noise to signal: also a network at pure noise is told a number.
  """
  return jnp.clip(-level.lam / 4, -5., 5.)


def _norm(level):
  return jnp.sqrt(level.alpha**2 + level.sigma**2)


def _preserving(t, signal, noise):
  """The variance-preserving level where alpha / sigma = signal / noise."""
  norm = jnp.sqrt(signal**2 + noise**2)
  return Level(t, signal / norm, noise / norm)


def rates(schedule, t):
  """d(alpha)/dt and d(sigma)/dt at `t`, of its shape, by forward differentiation.

  The conditional velocity of Lipman et al. 2022, eq. 15, is made of them.
  """
  _, d = jax.jvp(schedule, (t,), (jnp.ones_like(t),))
  return d.alpha, d.sigma


def inverse(schedule, lam):
  """The time at which half the log-SNR is `lam`, of its shape; in [0, t_end].

  By search, for lambda only falls, in ever smaller 64ths, then two Newton steps from there, which
  leave the value and give it its first derivative and its second, in `lam` and in what the schedule
  closes over (a learned schedule's parameters). A `lam` outside the schedule's range gives the end
  of the range, which does not move with it. The t_lambda of Lu et al. 2022, "DPM-Solver", sec. 3.2.
  """
  def newton(t):
    found, slope = jax.jvp(lambda t: schedule(t).lam, (t,), (jnp.ones_like(t),))
    return t + (lam - found) / slope

  # Written out, not a loop: outside of jit a loop is compiled anew for every schedule.
  parts, bits = 64, 8 * lam.dtype.itemsize
  place = einops.rearrange(
      jnp.arange(1, parts, dtype=lam.dtype) / parts, 'n -> n' + ' 1' * lam.ndim)
  low, width = jnp.zeros_like(lam), jnp.full_like(lam, schedule.t_end)
  for _ in range(bits // 6 + 5):
    early = schedule(low[None] + place * width[None]).lam > lam[None]
    low, width = low + width * (early.sum(0) / parts).astype(lam.dtype), width / parts
  t = jax.lax.stop_gradient(low + width / 2)
  inside = jnp.abs(lam - schedule(t).lam) < 1e-2 * (1 + jnp.abs(lam))
  lam = jnp.where(inside, lam, 0.)  # out of range slopes may be infinite, and gradients NaN
  near = jnp.where(inside, t, schedule.t_end / 2)
  return jnp.where(inside, newton(newton(near)), t)


def start(schedule, t, noise):
  """x at time `t` where nothing of the data is left: noise scaled to the level's sigma.

  For a variance-exploding schedule that is sigma_max times unit noise, not unit noise. Karras et
  al. 2022, algorithm 1, line 2.
  """
  return schedule(t).sigma.astype(noise.dtype) * noise
