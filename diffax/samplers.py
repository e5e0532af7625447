"""Samplers, from noise to data.

A sampler is three pure functions, as in optax:

  plan(schedule, ts, clean=True) -> rows   the grid as data, a row a network call
  init(x) -> memory                        what it remembers between calls
  step(denoise, x, memory, row, noise) -> x, memory

`sample` drives any of them with one `lax.scan`. Levels and coefficients are data, so a compiled
program serves every schedule and grid of a length. Nearly all share one step, that of a tableau,
and differ in `plan` alone; `tableau.py` holds what plans are made of.

ts: falling times [n + 1 ...] of a grid, a `Path` where they rise again between steps, or rising
ones (for ODE methods: from data to noise, beginning at t_min). clean: ts ends at clean data; then
methods of several stages take their last step with one call.

A denoiser is `(x, level) -> x0`, or `-> Estimate`, or, where it remembers, a `Denoiser`. Noise is
keyed by sample, so that sample 7 is the same alone and among a thousand.
"""

from typing import Any, NamedTuple
from collections.abc import Callable

import jax
from jax import Array
import jax.numpy as jnp

from diffax import noises
from diffax import predictions
from diffax import schedules
from diffax import tableau
from diffax.schedules import Level
from diffax.tableau import Path, Sampler


SAMPLING = 2**32 - 1  # in place of a training step, where keys are made


class Denoiser(NamedTuple):
  """A denoiser with memory (momentum, self-conditioning): init(x), apply(x, level, memory)."""

  init: Callable[[Array], Any]
  apply: Callable[..., tuple[predictions.Estimate, Any]]


class Seen(NamedTuple):
  """What a trace is shown after each row: its number, the level asked at, x after, x0 as said."""

  number: Array
  level: Level
  x: Array
  x0: Array


def lift(denoise):
  """A `Denoiser` from a plain `(x, level) -> x0` or `-> Estimate`; one stays."""
  if isinstance(denoise, Denoiser):
    return denoise
  def apply(x, level, memory):
    return predictions.estimate(denoise(x, level), x, level), memory
  return Denoiser(lambda x: (), apply)


def calls(sampler, steps):
  """How many network calls `steps` steps down to clean data take."""
  rows = jax.eval_shape(lambda ts: sampler.plan(schedules.linear(), ts), jnp.zeros(steps + 1))
  return rows['level'].t.shape[0]


# --- noise ----------------------------------------------------------------------------------------


def sample_keys(seed, index):
  """A key for each sample: of (seed, sample index) alone. index: integers [b]. Returns keys [b].

  No key of a training step is among them: those are folded from steps, none of which is SAMPLING.
  """
  root = jax.random.fold_in(jax.random.key(seed), SAMPLING)
  return jax.vmap(jax.random.fold_in, (None, 0))(root, jnp.asarray(index))


def initial(schedule, ts, keys, shape, dtype=jnp.float32):
  """Where sampling begins: noise of the level of ts[0], [b *shape] for keys [b]."""
  first = ts.t[0] if isinstance(ts, Path) else ts[0]
  return schedules.start(schedule, first, noises.normal(noises.fold(keys, 0), shape, dtype))


# --- the driver -----------------------------------------------------------------------------------


def sample(
    sampler, denoise, rows, x, keys=None, *, noise=noises.independent, trace=None, progress=None):
  """Walks `x` down the rows of `sampler.plan(schedule, ts)`; jit it, or call it as it is.

  x: the start [b ...], of the level of ts[0] (`initial`). keys: [b], from `sample_keys`; stochastic
  samplers need them. noise: `noises.independent` or `noises.brownian`, or a function like them.
  trace: k, to return x after every k-th row and the last too, or a function of `Seen`, to return
  its results stacked.
  progress: called on the host with (rows done, rows in all). Returns x at the end of ts, of x's
  shape and dtype; with a trace (x, traced). Noise and what the denoiser is shown have x's dtype
  too; the steps between are taken in float32 at the least.
  """
  denoise = lift(denoise)
  dtype, wide = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
  count = jax.tree.leaves(rows)[0].shape[0]
  lacking = keys is None and noise in (noises.independent, noises.brownian)
  drawn = None if lacking else noise(keys, x.shape[1:], dtype)

  def body(carry, inputs):
    x, memory, recall, kept = carry
    number, row = inputs
    told = None

    def fresh(span, draw=0):
      if drawn is None:
        raise ValueError('this sampler draws noise: say sample(..., keys=sample_keys(seed, index))')
      return drawn(number, draw, span).astype(wide)

    def ask(x, level):
      nonlocal recall, told
      said, recall = denoise.apply(x.astype(dtype), level, recall)
      told = jax.tree.map(lambda a: a.astype(wide), said)
      return told

    x, memory = sampler.step(ask, x, memory, row, fresh)
    x, seen = x.astype(wide), None
    if callable(trace):
      seen = trace(Seen(number, row['level'], x.astype(dtype), told.x0.astype(dtype)))
    elif trace:
      kept = kept.at[number // trace].set(x.astype(dtype))
    if progress:
      jax.debug.callback(progress, number + 1, count)
    return (x, memory, recall, kept), seen

  x = x.astype(wide)
  kept = jnp.zeros((-(-count // trace), *x.shape), dtype) if isinstance(trace, int) else ()
  start = x, sampler.init(x), denoise.init(x.astype(dtype)), kept
  (x, _, _, kept), seen = jax.lax.scan(body, start, (jnp.arange(count), rows))
  x = x.astype(dtype)
  return x if trace is None else (x, seen if callable(trace) else kept)


# --- one step, one call ---------------------------------------------------------------------------


def ddim(eta=0.) -> Sampler:
  """DDIM: x0 as said, noise as said; eta in [0, 1] mixes fresh noise in. Order 1.

  Song et al. 2020, "Denoising Diffusion Implicit Models", eq. 12 and 16. eta=0 is Euler's method on
  the ODE in sigma / alpha (and on straight flows in t), eta=1 ancestral DDPM sampling.
  """
  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    kept, fresh = tableau.ancestral(steps.t, steps.s, eta)
    return tableau.rows(steps, steps.t, (kept.alpha,), (kept.sigma,), fresh if eta else None)
  return tableau.linear(plan)


def ddpm(variance='small') -> Sampler:
  """Ancestral sampling; variance 'small', 'large', or 'learned' by the network's own fraction.

  Ho et al. 2020, eq. 7 and sec. 3.2: beta~ of the posterior, or beta, the forward step's; Nichol &
  Dhariwal 2021, eq. 15: between the two. No noise in the last step. Raises ValueError.
  """
  if variance not in ('small', 'large', 'learned'):
    raise ValueError(f"ddpm: variance={variance!r} is none of 'small', 'large', 'learned'")

  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    t, s = steps.t, steps.s
    kept, small = s.sigma * steps.r, s.sigma * jnp.sqrt(jnp.maximum(1 - steps.r**2, 0.))
    large = jnp.sqrt(jnp.maximum(t.sigma**2 - (t.alpha / s.alpha * s.sigma)**2, 0.))
    large = jnp.where(s.sigma == 0, 0., large)
    row = tableau.rows(steps, t, (s.alpha,), (kept,), large if variance == 'large' else small)
    return {**row, 'large': large} if variance == 'learned' else row

  def learned(denoise, x, memory, row, noise):
    x = tableau.lifted(x, row, noise)
    said = denoise(x, row['level'])
    if said.fraction is None:
      raise ValueError("ddpm: variance='learned' needs a network that says it: prediction "
                       "'learned_range'")
    some = row['fresh'] > 0
    ratio = jnp.where(some, row['large'], 1.) / jnp.where(some, row['fresh'], 1.)
    x = row['x0'][0] * said.x0 + row['eps'][0] * said.eps
    return x + row['fresh'] * ratio**said.fraction * noise(row['span']), memory

  sampler = tableau.linear(plan)
  return sampler._replace(step=learned) if variance == 'learned' else sampler


def euler(s_churn=0., s_tmin=0., s_tmax=jnp.inf, s_noise=1.) -> Sampler:
  """Euler's method in sigma / alpha, that is DDIM; `s_churn` > 0 adds noise before steps. Order 1.

  Karras et al. 2022, algorithm 2 without its correction; options as in `heun`.
  """
  def plan(schedule, ts, clean=True):
    steps = tableau.churned(schedule, ts, s_churn, s_tmin, s_tmax, s_noise)
    return tableau.rows(steps, steps.t, (steps.s.alpha,), (steps.s.sigma,))
  return tableau.linear(plan)


def euler_ancestral(eta=1.) -> Sampler:
  """Euler down to less noise than s has, then as much as lacks: DDIM of the same eta.

  Crowson 2022, k-diffusion, `sample_euler_ancestral`; Song et al. 2020, eq. 16.
  """
  return ddim(eta)


def flow_euler() -> Sampler:
  """Euler's method in t on the velocity; on straight lines DDIM. Order 1.

  Lipman et al. 2022, "Flow Matching", eq. 1; Liu et al. 2022, "Flow Straight and Fast", eq. 1.
  """
  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    x0, eps = _moved(schedule, steps)
    return tableau.rows(steps, steps.t, (steps.t.alpha + x0,), (steps.t.sigma + eps,))
  return tableau.linear(plan)


def _moved(schedule, steps, at=None):
  """alpha' (s - t), sigma' (s - t), of rates at t or `at`; the step's change if one is infinite."""
  t, s = steps.t, steps.s
  rates = schedules.rates(schedule, t.t if at is None else at)
  moved = [(s.t - t.t) * rate for rate in rates]
  whole = s.alpha - t.alpha, s.sigma - t.sigma
  finite = jnp.isfinite(moved[0]) & jnp.isfinite(moved[1])
  return [jnp.where(finite, a, b) for a, b in zip(moved, whole)]


def sde(diffusion='sigma', scale=1.) -> Sampler:
  """Euler-Maruyama on the reverse SDE, its diffusion coefficient w(t) free to choose. Weak order 1.

  Ma et al. 2024, "SiT", eq. 6 and sec. 2.3: dx = (velocity - w/2 score) dt + sqrt(w) dW; w is
  `scale` times sigma ('sigma'), 1 ('constant'), 1 - t / t_max ('decreasing'), or the forward
  process's own, 2 sigma^2 |dlambda/dt| ('sbdm'). The last step to clean data is DDIM's. Raises
  ValueError for another name.
  """
  laws = dict(
      sigma=lambda level, rise, dt, t_max: level.sigma * jnp.abs(dt),
      constant=lambda level, rise, dt, t_max: jnp.abs(dt),
      decreasing=lambda level, rise, dt, t_max: (1 - level.t / t_max) * jnp.abs(dt),
      sbdm=lambda level, rise, dt, t_max: 2 * level.sigma**2 * jnp.abs(rise))
  if diffusion not in laws:
    raise ValueError(f'sde: diffusion={diffusion!r} is none of {", ".join(laws)}')

  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    t, s = steps.t, steps.s
    x0, eps = _moved(schedule, steps)
    rise = x0 / jnp.where(t.alpha == 0, jnp.inf, t.alpha) - eps / t.sigma  # of lambda
    w = scale * laws[diffusion](t, rise, s.t - t.t, schedule.t_max)
    to_data = s.sigma == 0
    x0 = jnp.where(to_data, s.alpha, t.alpha + x0)
    eps = jnp.where(to_data, 0., t.sigma + eps - w / (2 * t.sigma))
    return tableau.rows(steps, t, (x0,), (eps,), jnp.where(to_data, 0., jnp.sqrt(w)))
  return tableau.linear(plan)


def consistency() -> Sampler:
  """Clean data at once, then fresh noise of the next level. For consistency models.

  Song et al. 2023, "Consistency Models", algorithm 1.
  """
  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    return tableau.rows(steps, steps.t, (steps.s.alpha,), (0.,), steps.s.sigma)
  return tableau.linear(plan)


def lcm() -> Sampler:
  """Latent consistency models sample as `consistency` does; Luo et al. 2023, "LCM", algorithm 3.

  The boundary scalings c_skip and c_out are the network's own; its grid is `trailing` or a skipping
  `leading` one.
  """
  return consistency()


def tcd(gamma=0.3) -> Sampler:
  """Strategic stochastic sampling: to time (1 - gamma) s by the network, then noised up to s.

  Zheng et al. 2024, "Trajectory Consistency Distillation", algorithm 4 (whose gamma is ours): 0 is
  DDIM, 1 `consistency`. Raises ValueError for a gamma outside [0, 1].
  """
  if not 0 <= gamma <= 1:
    raise ValueError(f'tcd: gamma={gamma} is outside [0, 1]')

  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    s, low = steps.s, schedule((1 - gamma) * steps.s.t)
    kept = s.alpha / low.alpha * low.sigma
    fresh = jnp.sqrt(jnp.maximum(s.sigma**2 - kept**2, 0.))
    return tableau.rows(steps, steps.t, (s.alpha,), (kept,), fresh if gamma else None)
  return tableau.linear(plan)


# --- several calls a step -------------------------------------------------------------------------


def heun(s_churn=0., s_tmin=0., s_tmax=jnp.inf, s_noise=1.) -> Sampler:
  """Heun's method with an Euler step last; `s_churn` > 0 adds noise before steps. Order 2.

  Karras et al. 2022, algorithms 1 and 2; s_tmin, s_tmax bound sigma/alpha, s_noise scales the
  noise. The trapezoid is taken of x0 d(alpha) + eps d(sigma) along the curve of levels: for
  alpha = 1 that is Karras's, for straight flows Heun in t, and finite at both ends of any schedule.
  n steps make 2n - 1 calls.
  """
  def plan(schedule, ts, clean=True):
    steps = tableau.churned(schedule, ts, s_churn, s_tmin, s_tmax, s_noise)
    t, s = steps.t, steps.s
    halves = (s.alpha - t.alpha) / 2, (s.sigma - t.sigma) / 2
    return tableau.runge_kutta(steps, [s], [s, s], [halves[:1]], [halves[1:]], clean)
  return tableau.linear(plan, 2, 2)


def flow_heun() -> Sampler:
  """Heun's method in t on the velocity, with a DDIM step last; on straight lines `heun`. Order 2.

  Any text on the method; for flows Lipman et al. 2022, "Flow Matching", on solvers. 2n - 1 calls.
  """
  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    t, s = steps.t, steps.s
    begin = _moved(schedule, steps)
    end = _moved(schedule, steps, jnp.where(s.t > 0, s.t, schedule.t_min))
    to = Level(s.t, *(a + (b + c) / 2 for a, b, c in zip(t[1:], begin, end)))
    to = jax.tree.map(lambda a, b: jnp.where(tableau.only_call(steps, clean), a, b), s, to)
    predicted = Level(s.t, t.alpha + begin[0], t.sigma + begin[1])
    return tableau.runge_kutta(
        steps, [s], [predicted, to], [(end[0] / 2,)], [(end[1] / 2,)], clean)
  return tableau.linear(plan, 2, 2)


def dpm2(s_churn=0., s_tmin=0., s_tmax=jnp.inf, s_noise=1.) -> Sampler:
  """The midpoint rule, its middle the geometric mean of noise levels; Euler last. Order 2.

  Crowson 2022, k-diffusion, `sample_dpm_2`, after Karras et al. 2022, algorithm 2 (whose churn are
  the options) and Lu et al. 2022, "DPM-Solver". 2n - 1 calls.
  """
  def plan(schedule, ts, clean=True):
    steps = tableau.churned(schedule, ts, s_churn, s_tmin, s_tmax, s_noise)
    return _midpoint(schedule, steps, steps.s, None, clean)
  return tableau.linear(plan, 2, 2)


def dpm2_ancestral(eta=1.) -> Sampler:
  """`dpm2` down to less noise than s has, then as much as lacks. 2n - 1 calls.

  Crowson 2022, k-diffusion, `sample_dpm_2_ancestral`.
  """
  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    return _midpoint(schedule, steps, *tableau.ancestral(steps.t, steps.s, eta), clean)
  return tableau.linear(plan, 2, 2)


def _midpoint(schedule, steps, to, fresh, clean):
  mid, _ = tableau.between(schedule, steps, 0.5, to.sigma)
  whole = to.alpha - steps.t.alpha, to.sigma - steps.t.sigma
  drawn = None if fresh is None else [jnp.where(tableau.only_call(steps, clean), fresh, 0.), fresh]
  return tableau.runge_kutta(steps, [mid], [mid, to], [whole[:1]], [whole[1:]], clean, drawn)


def dpm_solver(order=2) -> Sampler:
  """DPM-Solver of order 1, 2 or 3, single step: exponential Runge-Kutta on the noise.

  Lu et al. 2022, "DPM-Solver", algorithms 1 (r1 = 1/2) and 2 (r1 = 1/3, r2 = 2/3). `order` calls a
  step, one in the last. A step from alpha = 0 is of order 1. Raises ValueError.
  """
  if order not in (1, 2, 3):
    raise ValueError(f'dpm_solver: order={order} is none of 1, 2, 3')

  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    if order == 1:
      return tableau.multistep(steps, ())
    scale = lambda level: jnp.where(jnp.isfinite(steps.h), level.sigma, 0.)
    return _dpm_solver(schedule, steps, order, -1., scale, lambda fixes: (None, fixes), clean)
  return tableau.linear(plan, order, order)


def dpmpp_2s(eta=0.) -> Sampler:
  """DPM-Solver++(2S), and with eta > 0 its ancestral form. Order 2; 2n - 1 calls.

  Lu et al. 2022, "DPM-Solver++", algorithm 1 (r = 1/2); k-diffusion's `sample_dpmpp_2s_ancestral`.
  """
  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    to, fresh = tableau.ancestral(steps.t, steps.s, eta)
    mid, _ = tableau.between(schedule, steps, 0.5, to.sigma)
    whole = to.alpha * (1 - tableau.shrink(steps.t, to))
    drawn = [jnp.where(tableau.only_call(steps, clean), fresh, 0.), fresh] if eta else None
    return tableau.runge_kutta(steps, [mid], [mid, to], [(whole,)], None, clean, drawn)
  return tableau.linear(plan, 2, 2)


def dpmpp_3s() -> Sampler:
  """DPM-Solver++(3S): exponential Runge-Kutta on x0. Order 3; 3n - 2 calls.

  Lu et al. 2022, "DPM-Solver++", sec. 4 and appendix B (r1 = 1/3, r2 = 2/3).
  """
  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    return _dpm_solver(
        schedule, steps, 3, 1., lambda level: level.alpha, lambda fixes: (fixes, None), clean)
  return tableau.linear(plan, 3, 3)


def _dpm_solver(schedule, steps, order, c, scale, form, clean):
  """Single-step DPM-Solvers: c = -1 on the noise, c = 1 on x0 (++)."""
  s = steps.s
  if order == 2:
    mid, h = tableau.between(schedule, steps, 0.5)
    return tableau.runge_kutta(
        steps, [mid], [mid, s], *form([(-jnp.expm1(-c * h) * scale(s),)]), clean)
  (one, h), (two, _) = (tableau.between(schedule, steps, r) for r in (1 / 3, 2 / 3))
  to_two = 2 * tableau.phi2(2 / 3 * c * h) * scale(two)
  to_end = 1.5 * tableau.phi2(c * h) * scale(s)
  return tableau.runge_kutta(
      steps, [one, two], [one, two, s], *form([(to_two,), (0., to_end)]), clean)


def dpmpp_sde(eta=1.) -> Sampler:
  """DPM-Solver++(SDE): two ancestral steps of the reverse SDE, one to the middle. 2n - 1 calls.

  Crowson 2022, k-diffusion, `sample_dpmpp_sde` (r = 1/2), after Lu et al. 2022, "DPM-Solver++".
  """
  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    mid, _ = tableau.between(schedule, steps, 0.5)
    to_mid, fresh_mid = tableau.ancestral(steps.t, mid, eta)
    to, fresh = tableau.ancestral(steps.t, steps.s, eta)
    drawn = [jnp.where(tableau.only_call(steps, clean), fresh, fresh_mid), fresh]
    whole = to.alpha * (1 - tableau.shrink(steps.t, to))
    return tableau.runge_kutta(
        steps, [mid], [to_mid, to], [(whole,)], None, clean, drawn if eta else None)
  return tableau.linear(plan, 2, 2)


def res(order=2) -> Sampler:
  """Refined exponential solver, single step, of order 2 (c2 = 1/2) or 3 (c2 = 1/2, c3 = 1).

  Zhang et al. 2023, "Improved Order Analysis and Design of Exponential Integrator for Diffusion
  Models Sampling", table 2, after Hochbruck & Ostermann 2005, eq. 5.8 and 5.9: unlike DPM-Solver++
  it meets all stiff order conditions. `order` calls a step, one in the last. Raises ValueError.
  """
  if order not in (2, 3):
    raise ValueError(f'res: order={order} is neither 2 nor 3')

  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    s = steps.s
    mid, h = tableau.between(schedule, steps, 0.5)
    if order == 2:
      fixes = [(2 * tableau.phi2(h) * s.alpha,)]
      return tableau.runge_kutta(steps, [mid], [mid, s], fixes, None, clean)
    share = 4.  # gamma of eq. 5.9: 2 (gamma c2 + c3) = 3 (gamma c2^2 + c3^2)
    to_three = (share * tableau.phi2(h / 2) + 2 * tableau.phi2(h)) * s.alpha
    to_end = tableau.phi2(h) / (share / 2 + 1) * s.alpha
    fixes = [(to_three,), (share * to_end, to_end)]
    return tableau.runge_kutta(steps, [mid, s], [mid, s, s], fixes, None, clean)
  return tableau.linear(plan, order, order)


# --- multistep methods: one call a step, and the calls before -------------------------------------


def dpmpp_2m(eta=0.) -> Sampler:
  """DPM-Solver++(2M), or with eta=1 its SDE form: extrapolates x0 from the call before. Order 2.

  Lu et al. 2022, "DPM-Solver++", algorithm 2 and appendix (SDE, midpoint). First order where a
  neighbouring level is an end of infinite log-SNR.
  """
  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    h, before = steps.h, tableau.before(steps.h)
    good = (steps.age >= 1) & jnp.isfinite(h) & jnp.isfinite(before)
    lean = jnp.where(good, h, 0.) / jnp.where(good, 2 * before, 1.)
    return tableau.multistep(steps, (-lean * steps.s.alpha * (1 - steps.r**(1 + eta)),), eta)
  return tableau.linear(plan, 2)


def dpmpp_2m_sde(eta=1., solver='midpoint') -> Sampler:
  """DPM-Solver++(2M) on the reverse SDE of noise `eta`; solver 'midpoint' or 'heun'. Weak order 1.

  Crowson 2022, k-diffusion, `sample_dpmpp_2m_sde`; Lu et al. 2022, "DPM-Solver++", appendix. 'heun'
  integrates the line through both estimates exactly. Raises ValueError for another solver.
  """
  if solver not in ('midpoint', 'heun'):
    raise ValueError(f"dpmpp_2m_sde: solver={solver!r} is neither 'midpoint' nor 'heun'")
  return dpmpp_2m(eta) if solver == 'midpoint' else _exact(2, eta)


def dpmpp_3m(eta=0.) -> Sampler:
  """DPM-Solver++(3M): the parabola through three x0, integrated exactly. Order 3.

  Lu et al. 2022, "DPM-Solver++", sec. 4, with Newton's second difference counted whole, which makes
  the order 3 that the published multistep code's halved one loses.
  """
  return _exact(3, eta)


def dpmpp_3m_sde(eta=1.) -> Sampler:
  """`dpmpp_3m` on the reverse SDE; after Crowson 2023, k-diffusion, `sample_dpmpp_3m_sde`."""
  return _exact(3, eta)


def res_multistep() -> Sampler:
  """The multistep refined exponential solver: the line through two x0, integrated exactly. Order 2.

  Zhang et al. 2023, "Improved Order Analysis", sec. 4 (multistep).
  """
  return _exact(2, 0.)


def _exact(order, eta):
  """Exponential Adams-Bashforth on x0 in lambda."""
  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    past = tableau.adams(steps, order, tableau.exponential(1 + eta))
    return tableau.multistep(steps, tuple(steps.s.alpha * w for w in past), eta)
  return tableau.linear(plan, order)


def deis(order=3, place='t') -> Sampler:
  """DEIS: Adams-Bashforth on the noise, exact for its exponential weight. Order `order`.

  Zhang & Chen 2022, "Fast Sampling with Exponential Integrator", eq. 14: polynomials in t ('t',
  tAB-DEIS) or in log(sigma / alpha) ('lam'); in sigma / alpha they are `lms`. Raises ValueError.
  """
  if place not in ('t', 'lam') or order not in (1, 2, 3, 4):
    raise ValueError(f'deis: place={place!r}, order={order}; allowed: t, lam; 1 to 4')

  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    in_t = lambda u, lam: schedules.inverse(schedule, u + lam)
    where = in_t if place == 't' else tableau.in_lam
    past = tableau.adams(steps, order, tableau.exponential(-1.), where)
    return tableau.multistep_eps(steps, tuple(steps.s.sigma * w for w in past))
  return tableau.linear(plan, 1, order)


def lms(order=4) -> Sampler:
  """Linear multistep on the noise, in sigma / alpha, down to 0. Order `order`, 1 to 4.

  Crowson 2022, k-diffusion, `sample_lms`; Zhang & Chen 2022, "DEIS", rhoAB. Raises ValueError.
  """
  if order not in (1, 2, 3, 4):
    raise ValueError(f'lms: order={order}; allowed: 1 to 4')

  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    past = tableau.adams(
        steps, order, lambda u, h, at: jnp.ones_like(u), along=lambda level: level.nsr)
    return tableau.multistep_eps(steps, tuple(steps.s.alpha * w for w in past))
  return tableau.linear(plan, 1, order)


def ipndm(order=4) -> Sampler:
  """Improved PNDM: Adams-Bashforth weights of equal steps, whatever the grid; then DDIM's step.

  Zhang & Chen 2022, "DEIS", sec. 3.3 (iPNDM), with lower orders at the start; Liu et al. 2022,
  "PNDM", eq. 12. Of order `order` only where steps are equal in log-SNR. Raises ValueError.
  """
  if order not in (1, 2, 3, 4):
    raise ValueError(f'ipndm: order={order} is none of 1, 2, 3, 4')

  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    past = [jnp.zeros_like(steps.h)] * (order - 1)
    for q in range(2, order + 1):
      use = steps.age >= q - 1
      past = [jnp.where(use, w, b) for w, b in zip(tableau.BASHFORTH[q][1:] + (0.,) * order, past)]
    rise = tableau.noise_rise(steps.t, steps.s)
    return tableau.multistep_eps(steps, tuple(rise * w for w in past))
  return tableau.linear(plan, 1, order)


def plms() -> Sampler:
  """Pseudo linear multistep (PLMS): DDIM's step with Adams-Bashforth's noise; n + 1 calls.

  Liu et al. 2022, "PNDM", eq. 12; the first step is an improved Euler one, as in latent diffusion
  (Rombach et al. 2022). For grids of equal steps.
  """
  def table(n, clean):
    begin = [(0, 't', 's', True, 0., 0., 0., (1.,))]
    if n > 1 or not clean:
      begin.append((0, 's', 's', False, 0.5, 0., 0., (0.5,)))
    return begin + [_bashforth(i) for i in range(1, n)]
  return tableau.pseudo(table)


def pndm() -> Sampler:
  """PNDM: three steps by pseudo Runge-Kutta of four calls, then `plms`'s; n + 9 calls.

  Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", eq. 12 and 13 and
  algorithm 2. For grids of equal steps; the step to clean data has one call.
  """
  def table(n, clean):
    q = min(3, n - 1 if clean else n)
    stages = lambda i: [
        (i, 't', 'mid', True, 0., 1 / 6, 0., (1.,)), (i, 'mid', 'mid', False, 1., 1 / 3, 0., ()),
        (i, 'mid', 's', False, 1., 1 / 3, 0., ()), (i, 's', 's', False, 1 / 6, 0., 1., ())]
    return sum(map(stages, range(q)), []) + [_bashforth(i) for i in range(q, n)]
  return tableau.pseudo(table)


def _bashforth(i):
  return i, 't', 's', True, 0., 0., 0., tableau.BASHFORTH[min(i + 1, 4)]


def er_sde(order=3) -> Sampler:
  """Extended reverse-time SDE: x0 as a polynomial in sigma / alpha, noise as ER-SDE 5 has it.

  Cui et al. 2023, "Elucidating the Solution Space of Extended Reverse-Time SDE", eq. 15, table 1:
  phi(x) = x (exp(x^0.3) + 10), exact for a polynomial through `order` estimates. Weak order 1.
  Raises ValueError.
  """
  if order not in (1, 2, 3):
    raise ValueError(f'er_sde: order={order} is none of 1, 2, 3')

  def log_phi(lam):
    lam = jnp.clip(lam, -12., 30.)  # beyond, one term is all, and its exponent is past float32
    return -lam + jnp.logaddexp(jnp.exp(-0.3 * lam), jnp.log(10.))

  def kernel(u, h, lam):
    value, slope = jax.jvp(log_phi, (lam + u,), (jnp.ones_like(lam + u),))
    return -slope * jnp.exp(log_phi(lam + h) - value)

  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    t, s = steps.t, steps.s
    kept = s.alpha * jnp.exp(log_phi(s.lam) - log_phi(t.lam) - jnp.maximum(t.lam, -12.))
    kept = jnp.minimum(kept, s.sigma)
    past = tuple(s.alpha * w for w in tableau.adams(steps, order, kernel, tableau.in_nsr))
    fresh = jnp.sqrt(s.sigma**2 - kept**2)
    return tableau.rows(steps, t, (s.alpha - sum(past), *past), (kept,), fresh)
  return tableau.linear(plan, order)


# --- predictors with correctors -------------------------------------------------------------------


def unipc(order=3, variant='bh2') -> Sampler:
  """UniPC: DPM-Solver++'s multistep, each x corrected by what is said at it. n calls.

  Zhao et al. 2023, "UniPC", algorithms 1 to 3 and eq. 9, B(h) = h ('bh1') or e^h - 1 ('bh2'). Order
  `order` + 1 where steps are small, for the corrector adds one. Raises ValueError.
  """
  if order not in (1, 2, 3) or variant not in ('bh1', 'bh2'):
    raise ValueError(f'unipc: order={order}, variant={variant!r}; allowed: 1, 2, 3; bh1, bh2')

  def halves(steps):  # B(h) / 2, which the paper takes where one weight is left to choose
    return steps.h / 2 if variant == 'bh1' else -jnp.expm1(-steps.h) / 2

  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    kernel, scale = tableau.exponential(1.), steps.s.alpha
    good = jnp.isfinite(steps.h)
    past = tableau.adams(steps, order, kernel)
    if order >= 2:  # the second order's weight is B / 2 of the slope
      ratio = tableau.before(steps.h)
      two = (steps.age >= 1) & good & jnp.isfinite(ratio)
      two &= (steps.age < 2) | (order == 2)
      share = -jnp.where(two, halves(steps) * steps.h, 0.) / jnp.where(two, ratio, 1.)
      past = [jnp.where(two, share if j == 0 else 0., w) for j, w in enumerate(past)]
    fix = tableau.correct(steps, order, kernel)
    one = good & ((steps.age < 1) | (order == 1) | ~jnp.isfinite(tableau.before(steps.h)))
    fix = [jnp.where(one, jnp.where(good, halves(steps), 0.) if j == 0 else 0., w)
           for j, w in enumerate(fix)]
    return tableau.corrected_rows(steps, [scale * w for w in past], [scale * w for w in fix])

  return tableau.corrected(plan, order + 1)


def sa_solver(predictor=3, corrector=3, tau=1., low=0.05, high=1.) -> Sampler:
  """Stochastic Adams: predictor and corrector on the reverse SDE of noise tau, n calls.

  Xue et al. 2023, "SA-Solver", eq. 14 and 17, algorithm 1; tau acts where sigma / alpha lies in
  [low, high] (appendix E), elsewhere the ODE. predictor, corrector: how many clean estimates each
  weighs, the corrector besides the newest; 0 for none. Raises ValueError.
  """
  if predictor not in (1, 2, 3) or corrector not in (0, 1, 2, 3):
    raise ValueError(f'sa_solver: predictor={predictor}, corrector={corrector}; allowed: 1 to 3, '
                     'and corrector=0 for none')

  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    acts = (steps.t.nsr <= high) & (steps.t.nsr >= low)
    eta = jnp.where(acts, tau**2, 0.) if tau else None
    kernel, scale = tableau.exponential(1. + (eta if tau else 0.)), steps.s.alpha
    past = [scale * w for w in tableau.adams(steps, predictor, kernel)]
    fix = [scale * w for w in tableau.correct(steps, corrector, kernel)] if corrector else ()
    return tableau.corrected_rows(steps, past, fix, eta)

  return tableau.corrected(plan, max(predictor, corrector) + 1)


def predictor_corrector(snr=0.16, corrections=1) -> Sampler:
  """Ancestral steps, with Langevin steps of signal-to-noise ratio `snr` at each level between.

  Song et al. 2021, "Score-Based Generative Modeling through SDEs", algorithms 1, 4 and 5: steps of
  e = 2 (snr |z| / |score|)^2. The norms are what they are on average, sqrt(d) and sqrt(d) / sigma,
  where the paper takes a batch's mean: a sample depends on no other one. n + corrections (n - 1)
  calls. Raises ValueError.
  """
  if corrections < 1 or not 0 < snr < 1:
    raise ValueError(
        f'predictor_corrector: snr={snr}, corrections={corrections}; allowed: 0 < snr < 1, and one '
        'correction or more (with none it is ddpm)')

  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    t = steps.t
    kept, fresh = tableau.ancestral(t, steps.s, 1.)
    langevin = tableau.rows(
        steps, t, (t.alpha,), (t.sigma * (1 - 2 * snr**2),), 2 * snr * t.sigma)
    predict = tableau.rows(steps, t, (kept.alpha,), (kept.sigma,), fresh, first=False)
    rows = tableau.weave([langevin] * corrections + [predict], False)
    return jax.tree.map(lambda a: a[corrections:], rows)  # at pure noise nothing is to correct

  return tableau.linear(plan)
