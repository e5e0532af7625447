"""Grids: the times a sampler visits, from noise down to clean data.

A grid is a function `(schedule, steps, **options) -> times [steps + 1]`, falling. A network is
asked at the first `steps` of them, in [t_min, t_max]; the last is 0, clean data, at which none is
asked, unless a table's grid is told to end at its first level. One name is one grid in every
sampler, and as many steps are made as were asked for.

Three families: equal steps in a function of t (`uniform`, `quadratic`, `beta`), equal steps in a
function of the noise (`log_snr` or `exponential`, `polyexponential`, `karras`),
and the indices of a model trained on a table of levels (`leading`, `trailing`, `linspace`). `ays`
is a published table, `explicit` a list of one's own, `align` fits a grid to a model. All raise
ValueError where `steps` is less than 1.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffax import predictions
from diffax import schedules
from diffax import tableau

LAM_NOISE = -6.  # where alpha = 0, lambda is -inf: there a grid in log-SNR begins at e^6 noise


def _check(steps):
  if steps < 1:
    raise ValueError(f'steps={steps}: a grid has one step at least')


# --- equal steps in a function of t ---------------------------------------------------------------


def _in_time(schedule, steps, forth, back):
  """Equal steps in forth(t / t_max), a map of [0, 1] onto itself, down to 0.

  Where the last time asked would fall below t_min it is t_min, and the steps before are equal.
  """
  _check(steps)
  least = jnp.asarray(schedule.t_min / schedule.t_max, jnp.result_type(float))
  last = jnp.maximum(forth(least), 1 / steps)
  t = schedule.t_max * back(jnp.linspace(jnp.ones_like(last), last, steps))
  return _close(schedule, t)


def _close(schedule, t):
  """Times [steps] as a grid: t_max for the first, none below t_min, then clean data.

  Times that rounding made one are moved to the next lower numbers there are, for a step of no
  length would be a division by 0: the bits of positive numbers are integers of the same order.
  """
  t = jnp.concatenate([jnp.array([schedule.t_max], t.dtype), jnp.maximum(t[1:], schedule.t_min)])
  bits = t.view(f'int{8 * t.dtype.itemsize}')
  place = jnp.arange(len(t), dtype=bits.dtype)
  t = (jax.lax.cummin(bits + place) - place).view(t.dtype)
  return jnp.append(t, jnp.zeros(1, t.dtype))


def uniform(schedule, steps):
  """Equal steps in t, t_max down to 0; the last time asked is t_min at least.

  Ho et al. 2020, algorithm 2, in continuous time.
  """
  return _in_time(schedule, steps, lambda t: t, lambda y: y)


def quadratic(schedule, steps):
  """Equal steps in sqrt(t), t_max down to 0; the last time asked is t_min at least.

  Song et al. 2020, "Denoising Diffusion Implicit Models", appendix D.2.
  """
  return _in_time(schedule, steps, jnp.sqrt, jnp.square)


def beta(schedule, steps, a=0.6, b=0.6):
  """Equal steps in the distribution function of Beta(a, b) on t / t_max: dense at both ends.

  The last time asked is t_min at least. Lee et al. 2024, "Beta Sampling is All You Need".
  Raises ValueError unless a, b > 0.
  """
  if a <= 0 or b <= 0:
    raise ValueError(f'a={a}, b={b}: the parameters of a Beta distribution are positive')
  share = lambda t: jax.scipy.special.betainc(a, b, t)

  def quantile(y):
    def halve(_, bounds):
      low, high = bounds
      mid = (low + high) / 2
      early = share(mid) < y
      return jnp.where(early, mid, low), jnp.where(early, high, mid)
    return sum(jax.lax.fori_loop(0, 60, halve, (jnp.zeros_like(y), jnp.ones_like(y)))) / 2

  return _in_time(schedule, steps, share, quantile)


# --- equal steps in a function of the noise -------------------------------------------------------


def _ends(schedule, steps):
  """lambda at t_max and at t_min. Where it is infinite at t_max, LAM_NOISE, or what it is so near
  to t_max that times could hardly be told apart, if that is more."""
  _check(steps)
  near = 1 - 64 * jnp.finfo(jnp.result_type(float)).eps
  lam = schedule(jnp.array([schedule.t_max, near * schedule.t_max, schedule.t_min])).lam
  return jnp.where(jnp.isfinite(lam[0]), lam[0], jnp.maximum(lam[1], LAM_NOISE)), lam[2]


def karras(schedule, steps, rho=7.):
  """Equal steps in (sigma/alpha)^(1/rho), from t_max to t_min; then 0.

  Karras et al. 2022, eq. 5.
  """
  first, last = _ends(schedule, steps)
  y = jnp.linspace(jnp.exp(-first / rho), jnp.exp(-last / rho), steps)
  return _close(schedule, schedules.inverse(schedule, -rho * jnp.log(y)))


def polyexponential(schedule, steps, rho=1.):
  """Equal steps in log(sigma/sigma_min)^(1/rho), from t_max to t_min; then 0; sigma over alpha.

  The `polyexponential` of k-diffusion; rho = 1 is `log_snr`, more crowds the steps at t_min.
  """
  first, last = _ends(schedule, steps)
  lam = last + (first - last) * jnp.linspace(1., 0., steps)**rho
  return _close(schedule, schedules.inverse(schedule, lam))


def log_snr(schedule, steps):
  """Equal steps in lambda, from t_max to t_min; then 0.

  Lu et al. 2022, "DPM-Solver", sec. 3.3.
  """
  return polyexponential(schedule, steps)


def exponential(schedule, steps):
  """`log_snr` by k-diffusion's name: sigma falls by a constant factor."""
  return log_snr(schedule, steps)


# --- indices of a table ---------------------------------------------------------------------------


def _at(schedule, steps, indices, train_steps, clean=True):
  """The times of `indices() [steps]`, called once `steps` is known to be good; then clean data, or
  the first level of the table."""
  _check(steps)
  if steps > train_steps:
    raise ValueError(f'steps={steps}: a table of train_steps={train_steps} levels has no more')
  found = indices()
  if not clean and found[-1] == 0:
    raise ValueError('clean=False ends at index 0 of the table, and the last index asked is 0 '
                     'already: ask later ones, as leading with offset=1, or say clean=True')
  t = schedule.t_max * (np.append(found, -1 if clean else 0) + 1) / train_steps
  if t[-2] < schedule.t_min * (1 - 1e-6):
    raise ValueError(
        f'index {found[-1]:.0f} of train_steps={train_steps} lies at t={t[-2]:.3g}, below '
        f't_min={schedule.t_min:g}: train_steps is the number of levels of the schedule\'s table; '
        'without one, use uniform')
  return jnp.asarray(t, jnp.result_type(float))


def leading(schedule, steps, offset=0, train_steps=1000, clean=True, short=False):
  """The first index of each of `steps` equal parts of a table, `offset` later; then clean data.

  Index i of 0 ... train_steps - 1 lies at t = (i + 1) / train_steps t_max. A part is
  train_steps // steps long, so where that leaves a rest, the noisiest indices go unasked; even
  where it does not, sampling begins below t_max. Song et al. 2020, appendix D.2 ("linear"); Lin et
  al. 2023, "Common Diffusion Noise Schedules", table 2. Stable Diffusion's offset is 1, and its
  last step by DDIM or PLMS ends at index 0 in place of clean data: clean=False. short: of one part
  more, the last of which is not asked, as diffusers' multistep solvers have it. Raises ValueError
  where steps > train_steps, where the offset leaves the table, where t_min is not in it, and for
  clean=False where index 0 is asked.
  """
  def indices():
    part = train_steps // (steps + short)
    found = (part * np.arange(steps + short)[::-1] + offset)[:steps]
    if found[0] >= train_steps or offset < 0:
      raise ValueError(
          f'offset={offset}: with {steps} steps of {train_steps} it is one of 0 ... '
          f'{train_steps - 1 - part * (steps + short - 1)}')
    return found
  return _at(schedule, steps + short, indices, train_steps, clean)


def trailing(schedule, steps, train_steps=1000, clean=True):
  """The last index of each of `steps` equal parts of a table, from t_max; then clean data.

  Index i of 0 ... train_steps - 1 lies at t = (i + 1) / train_steps t_max. Where parts are not
  whole, their ends are rounded, halves to even. Lin et al. 2023, "Common Diffusion Noise
  Schedules", table 2. clean: as of `leading`. Raises ValueError where steps > train_steps, and for
  clean=False where index 0 is asked.
  """
  def indices():
    return np.round(train_steps * np.arange(steps, 0, -1) / steps) - 1
  return _at(schedule, steps, indices, train_steps, clean)


def linspace(schedule, steps, train_steps=1000, clean=True, short=False, whole=True):
  """Indices of a table from its last to its first, equally far apart; then clean data.

  Index i of 0 ... train_steps - 1 lies at t = (i + 1) / train_steps t_max. Those that are not whole
  are rounded, halves to even, or, with whole=False, asked at between two levels, as k-diffusion
  does; a single step asks at the noisiest. Nichol & Dhariwal 2021, sec. 4; Lin et al. 2023, "Common
  Diffusion Noise Schedules", table 2. clean, short: as of `leading`; with `short` the first of the
  table is not asked. Raises ValueError where steps > train_steps, and for clean=False where index 0
  is asked.
  """
  def indices():
    found = np.linspace(train_steps - 1, 0, steps + short)[:steps]
    return np.round(found) if whole else found
  return _at(schedule, steps + short, indices, train_steps, clean)


# --- given and fitted -----------------------------------------------------------------------------


AYS = {  # sigma / alpha after each of 10 steps, as published; the last stands for clean data
  'sd15': (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
  'sdxl': (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
  'svd': (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def ays(schedule, steps, model='sd15'):
  """A published table of noise levels fitted to a model: 'sd15', 'sdxl' or 'svd'; from t_max to 0.

  Sabour et al. 2024, "Align Your Steps": 10 steps, of which others are made by interpolating
  log(sigma/alpha) linearly, as the authors do. What of the table lies outside the schedule's
  range is left out. Raises ValueError for an unknown model.
  """
  if model not in AYS:
    raise ValueError(f'model={model!r}: there is a table of {", ".join(AYS)}; or use explicit(...)')
  first, last = _ends(schedule, steps)
  table = -jnp.log(jnp.array(AYS[model]))
  place = jnp.arange(len(table), dtype=table.dtype)

  def walk(end):  # lambda at each time asked, where the last step ends at the table's `end`
    begin = jnp.interp(first, table, place)
    return jnp.interp(jnp.linspace(begin, end, steps + 1)[:-1], place, table)

  lam = walk(place[-1])
  lam = jnp.where(lam[-1] <= last, lam, walk(jnp.interp(last, table, place)))
  return _close(schedule, schedules.inverse(schedule, lam))


def explicit(schedule, steps, times=()):
  """The list `times` itself: `steps` times to ask at, with or without the 0 after them.

  Raises ValueError where they are not falling, not within [t_min, t_max] or not `steps`.
  """
  t = np.array(times, float)
  if t.shape == (steps + 1,) and t[-1] == 0:
    t = t[:-1]
  if t.ndim != 1 or len(t) != steps or not steps:
    raise ValueError(f'{len(times)} times for steps={steps}: give the {steps} times to ask at, '
                     'and if you like a last 0')
  if not (np.diff(t) < 0).all():
    raise ValueError(f'times={times}: a grid falls, from noise to data')
  if t[0] > schedule.t_max * (1 + 1e-6) or t[-1] < schedule.t_min * (1 - 1e-6):
    raise ValueError(f'times={times}: a network is asked at times in '
                     f'[{schedule.t_min:g}, {schedule.t_max:g}]')
  return jnp.asarray(np.append(t, 0.), jnp.result_type(float))


def reverse(schedule, ts):
  """The rising grid of an inversion, from data to noise, of the falling `ts` [n + 1].

  It begins at t_min in place of 0, for at clean data no noise can be told. Where `ts` asks at t_min
  itself, that time moves halfway to the next, so that n steps stay n steps.
  """
  rising = ts[::-1].at[0].set(schedule.t_min)
  if ts.shape[0] < 3:
    return rising
  halfway = (rising[0] + rising[2]) / 2
  return rising.at[1].set(jnp.where(rising[1] <= rising[0] * (1 + 1e-5), halfway, rising[1]))


def restart(schedule, steps, of, low=0.05, high=1., repeats=3, inner=5) -> tableau.Path:
  """The grid `of` [steps + 1], with the noise between two levels gone through again and again.

  At the first time of `of` where sigma / alpha is `low` or less (or at the last it asks at), x is
  noised up to `high` and brought down in `inner` steps of equal length in lambda, `repeats` times:
  repeats * inner steps more. Xu et al. 2023, "Restart Sampling", algorithm 1. Raises ValueError.
  """
  if not 0 < low < high or repeats < 1 or inner < 1 or steps < 2:
    raise ValueError(f'restart: low={low}, high={high}, repeats={repeats}, inner={inner}, steps='
                     f'{steps}; allowed: 0 < low < high, repeats and inner from 1, steps from 2')
  place = jnp.clip((schedule(of[:-1]).nsr > low).sum(), 1, steps - 1)
  down = schedule(of[place]).lam
  top = jnp.maximum(jnp.minimum(-jnp.log(high), down - 1), schedule(of[0]).lam)
  lam = jnp.linspace(top, down, inner + 1)
  again = schedules.inverse(schedule, lam).at[-1].set(of[place])
  number = jnp.arange(steps + repeats * inner)
  extra = (number >= place) & (number < place + repeats * inner)
  main = jnp.where(number < place, number, number - repeats * inner)
  turn = (number - place) % inner
  pick = lambda end: jnp.where(extra, again[turn + end], of[jnp.clip(main, 0, steps - 1) + end])
  return tableau.Path(pick(0), pick(1))


def repaint(schedule, steps, of, jump=1, repeats=10) -> tableau.Path:
  """The grid `of` [steps + 1], every `jump` steps of it gone through `repeats` times.

  x is noised up again between. For `inverse.repaint`: Lugmayr et al. 2022, "RePaint", algorithm 1
  and sec. 4.2 (their j and r). Raises ValueError.
  """
  if not 1 <= jump <= steps or repeats < 1:
    raise ValueError(f'repaint: jump={jump}, repeats={repeats}; allowed: 1 to {steps}, 1 or more')
  parts = [np.tile(np.arange(i, min(i + jump, steps)), repeats) for i in range(0, steps, jump)]
  number = np.concatenate(parts)
  return tableau.Path(of[number], of[number + 1])


def _frozen_error(denoise, schedule, x0, key, t, s):
  """What it costs to keep the x0 told at `t` down to `s`: one step's part of the bound of `align`.

  With q = (alpha/sigma)^2 the weight is flat, dsigma / sigma^3 = -dq / 2: times are drawn uniform
  in q, an example from each of b equal parts.
  """
  keys = jax.random.split(key, 3)
  ask = lambda x, level: predictions.estimate(denoise(x, level), x, level).x0
  u = (jnp.arange(x0.shape[0]) + jax.random.uniform(keys[0])) / x0.shape[0]
  high = schedule(t)
  q_high, q_low = ((level.alpha / level.sigma)**2 for level in (high, schedule(s)))
  q = jnp.expand_dims(q_high + (q_low - q_high) * u, tuple(range(1, x0.ndim)))  # [b 1 ...]
  level = schedule(schedules.inverse(schedule, jnp.log(q) / 2))
  x = level.alpha * x0 + level.sigma * jax.random.normal(keys[1], x0.shape, x0.dtype)
  keep = high.alpha / level.alpha
  fresh = jnp.sqrt(jnp.maximum(high.sigma**2 - (keep * level.sigma)**2, 0.))
  noisier = keep * x + fresh * jax.random.normal(keys[2], x0.shape, x0.dtype)
  error = jnp.square(ask(x, level) - ask(noisier, high)).sum() / x0.shape[0]
  return (q_low - q_high) / 2 * error


def _settle(denoise, schedule, x0, lam, key, sweeps, candidates):
  """Moves each inner one of the levels `lam` [n + 1] to where its two steps cost least, in turn."""
  offsets = jnp.linspace(-1., 1., candidates)

  def time(lam, i):
    return jnp.where(i == 0, schedule.t_max, schedules.inverse(schedule, lam))

  def move(lam, at):
    sweep, i = at
    reach = 0.9 * 0.75**sweep  # from nearly as far as the neighbours to nearby
    gap = jnp.where(offsets < 0, lam[i] - lam[i - 1], lam[i + 1] - lam[i])
    tries = lam[i] + reach * offsets * gap
    one, two = jax.random.split(jax.random.fold_in(key, i))

    def cost(middle):
      t = time(middle, i)
      return (_frozen_error(denoise, schedule, x0, one, time(lam[i - 1], i - 1), t)
              + _frozen_error(denoise, schedule, x0, two, t, time(lam[i + 1], i + 1)))

    return lam.at[i].set(tries[jnp.argmin(jax.lax.map(cost, tries))]), None

  grid = jnp.meshgrid(jnp.arange(sweeps), jnp.arange(1, lam.shape[0] - 1), indexing='ij')
  return jax.lax.scan(move, lam, tuple(g.ravel() for g in grid))[0]


def align(denoise, schedule, ts, x0, key, sweeps=10, candidates=11):
  """A grid of as many steps as `ts` [n + 1], fitted to a model and its data; it begins at t_max.

  Sabour et al. 2024, "Align Your Steps": each step of a stochastic solver keeps the x0 told at its
  beginning, which costs, in divergence between paths, at most (with sigma over alpha)

    sum_i  int_{sigma_{i+1}}^{sigma_i}  E || D(x_sigma, sigma) - D(x_{sigma_i}, sigma_i) ||^2
                                        dsigma / sigma^3 .

  It is estimated on `x0` [b ...], examples of data, with the noise of `key` the same for all that
  is compared, and lowered one time after another (`sweeps` times `candidates` places for each),
  first on a grid of two steps, then on ever finer ones between whose times the coarser are
  interpolated. denoise: (x, level) -> x0 or Estimate, levels scalar or [b 1 ...]. It is asked
  about 8 b n sweeps candidates times. The last integral ends at t_min, in whose place the grid
  has 0.
  """
  steps = ts.shape[0] - 1
  first, last = _ends(schedule, steps)
  lam = schedule(jnp.clip(ts, schedule.t_min, schedule.t_max)).lam
  lam = jnp.maximum(lam, first).at[0].set(first).at[-1].set(last)
  counts = [steps]
  while counts[-1] > 2:
    counts.append(-(-counts[-1] // 2))
  for number, count in enumerate(counts[::-1]):
    lam = jnp.interp(
        jnp.linspace(0., 1., count + 1), jnp.linspace(0., 1., lam.shape[0]), lam)
    if count > 1:
      lam = _settle(denoise, schedule, x0, lam, jax.random.fold_in(key, number), sweeps, candidates)
  return _close(schedule, schedules.inverse(schedule, lam[:-1]))
