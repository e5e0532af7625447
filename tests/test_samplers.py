"""Every sampler against data whose flow and moments are known in closed form (gaussians.py).

Schedule, grid, data, prediction, coefficients and noise are data of one program a sampler, its rows
filled up to one length, so that all cases of a sampler share it. `-m slow` runs the whole product
of samplers, schedules, grids, predictions and numbers of steps; otherwise a subset that holds each
pair of them.
"""

import functools
import itertools
from typing import NamedTuple
from unittest import mock

from jax import Array
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import grids
from diffax import predictions
from diffax import samplers
from diffax import schedules
import gaussians


class Case(NamedTuple):
  """A sampler and what is true of it.

  order: of convergence of its flow, None where it draws noise. weak: of its variance, None where
  it draws none. With neither it is made for networks that jump (consistency) or not linear.
  """

  sampler: samplers.Sampler
  order: float | None = None
  weak: float | None = None


ALL = np.inf
CASES = dict(
    ddim=Case(samplers.ddim(), order=1),
    ddim_half=Case(samplers.ddim(0.5), weak=1),
    ddpm=Case(samplers.ddpm(), weak=1),
    ddpm_large=Case(samplers.ddpm('large'), weak=1),
    ddpm_learned=Case(samplers.ddpm('learned'), weak=1),
    euler=Case(samplers.euler(), order=1),
    euler_churn=Case(samplers.euler(s_churn=4.), weak=1),
    euler_ancestral=Case(samplers.euler_ancestral(), weak=1),
    flow_euler=Case(samplers.flow_euler(), order=1),
    flow_heun=Case(samplers.flow_heun(), order=2),
    sde_sigma=Case(samplers.sde(), weak=1),
    sde_constant=Case(samplers.sde('constant'), weak=1),
    sde_decreasing=Case(samplers.sde('decreasing'), weak=1),
    sde_sbdm=Case(samplers.sde('sbdm'), weak=1),
    consistency=Case(samplers.consistency()),
    lcm=Case(samplers.lcm()),
    tcd=Case(samplers.tcd()),
    heun=Case(samplers.heun(), order=2),
    heun_churn=Case(samplers.heun(s_churn=4.), weak=2),
    dpm2=Case(samplers.dpm2(), order=2),
    dpm2_ancestral=Case(samplers.dpm2_ancestral(), weak=2),
    dpm_solver_1=Case(samplers.dpm_solver(1), order=1),
    dpm_solver_2=Case(samplers.dpm_solver(2), order=2),
    dpm_solver_3=Case(samplers.dpm_solver(3), order=3),
    dpmpp_2s=Case(samplers.dpmpp_2s(), order=2),
    dpmpp_2s_ancestral=Case(samplers.dpmpp_2s(1.), weak=2),
    dpmpp_3s=Case(samplers.dpmpp_3s(), order=3),
    dpmpp_sde=Case(samplers.dpmpp_sde(), weak=1),
    res_2=Case(samplers.res(2), order=2),
    res_3=Case(samplers.res(3), order=3),
    dpmpp_2m=Case(samplers.dpmpp_2m(), order=2),
    dpmpp_2m_sde=Case(samplers.dpmpp_2m_sde(), weak=2),
    dpmpp_2m_sde_heun=Case(samplers.dpmpp_2m_sde(solver='heun'), weak=2),
    dpmpp_3m=Case(samplers.dpmpp_3m(), order=2.5),
    dpmpp_3m_sde=Case(samplers.dpmpp_3m_sde(), weak=2),
    res_multistep=Case(samplers.res_multistep(), order=2),
    deis_2=Case(samplers.deis(2), order=2),
    deis_3=Case(samplers.deis(3), order=2.5),
    deis_lam=Case(samplers.deis(3, 'lam'), order=2.5),
    lms=Case(samplers.lms(), order=3),
    ipndm=Case(samplers.ipndm(), order=2),
    plms=Case(samplers.plms(), order=2),
    pndm=Case(samplers.pndm(), order=2),
    er_sde=Case(samplers.er_sde(), weak=2),
    unipc_1=Case(samplers.unipc(1), order=2),
    unipc_2=Case(samplers.unipc(2), order=3),
    unipc_3=Case(samplers.unipc(3), order=3),
    unipc_bh1=Case(samplers.unipc(2, 'bh1'), order=3),
    sa_solver=Case(samplers.sa_solver(low=0., high=ALL), weak=2),
    sa_predictor=Case(samplers.sa_solver(corrector=0, low=0., high=ALL), weak=2),
    predictor_corrector=Case(samplers.predictor_corrector()),
)
# Made for networks that jump to clean data: no number of steps makes the marginals right.
FLOWS = [name for name, case in CASES.items() if case.order]
NOISY = [name for name, case in CASES.items() if case.weak]
SCHEDULES = dict(
    linear=schedules.linear, cosine=schedules.cosine, vp=schedules.vp, ve=schedules.ve,
    cosine_interpolated=schedules.cosine_interpolated, trigflow=schedules.trigflow,
    sub_vp=schedules.sub_vp, exponential=schedules.exponential, sigmoid=schedules.sigmoid,
    laplace=schedules.laplace, linear_table=schedules.linear_table,
    scaled_linear=schedules.scaled_linear, squared_cosine=schedules.squared_cosine,
    learned=lambda: learned_schedule(),
    zero_terminal_snr=lambda: schedules.zero_terminal_snr(schedules.scaled_linear()),
    shift=lambda: schedules.shift(schedules.linear()),
    shift_snr=lambda: schedules.shift_snr(schedules.cosine()),
    truncate=lambda: schedules.truncate(schedules.vp(), 0.01, 0.9))
TABLES = ('linear_table', 'scaled_linear', 'squared_cosine', 'zero_terminal_snr')
GRIDS = dict(
    uniform=grids.uniform, quadratic=grids.quadratic, beta=grids.beta, karras=grids.karras,
    polyexponential=grids.polyexponential, log_snr=grids.log_snr, leading=grids.leading,
    trailing=grids.trailing, linspace=grids.linspace, ays=grids.ays)
PREDICTIONS = ('x0', 'eps', 'v', 'score', 'velocity', 'edm', 'trigflow')
STEPS = (1, 2, 3, 50)
GAUSSIAN, MIXTURE = gaussians.gaussian(), gaussians.mixture()
POINT = gaussians.gaussian(std=(0., 0.))
# Programs of a millisecond, compiled for a second: most of the tests' time is XLA's.
FAST = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


@functools.cache
def learned_parameters():
  return jax.tree.map(np.asarray, schedules.learned(width=8).init(jax.random.key(0)))


def learned_schedule():
  return schedules.learned(width=8).bind(jax.tree.map(jnp.asarray, learned_parameters()))


def allowed(schedule, grid, prediction):
  """Tables' grids want a table's times, and some velocities are refused (`predictions.check`)."""
  least = made(schedule).t_min / made(schedule).t_max
  if grid in ('leading', 'trailing', 'linspace') and least > 0.0011:
    return False
  return not (prediction == 'velocity' and schedule in ('sigmoid', 'laplace'))


# --- one program a sampler ------------------------------------------------------------------------


class Told(NamedTuple):
  """A `Level`, and what an exact network says there: a x0 + b eps."""

  t: Array
  alpha: Array
  sigma: Array
  a: Array
  b: Array


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def program(name, rows, draws, x, data):
  """x [b 2] at the end of the rows that live; draws: the noise [rows 2 b 2] in place of keys."""
  sampler = CASES[name].sampler

  def step(denoise, x, memory, row, noise):
    stepped = sampler.step(denoise, x, memory, row, noise)
    return jax.tree.map(lambda a, b: jnp.where(row['live'], a, b), stepped, (x, memory))

  def denoise(x, level):
    exact = gaussians.estimate(data, x, level)
    network = predictions.Prediction(lambda level: (level.a, level.b), None, None)
    out = predictions.target(network, *exact[:2], level)
    said = predictions.solve(network, out, x, level)
    return said._replace(fraction=jnp.full_like(x, 0.3))

  given = lambda keys, shape, dtype: lambda number, draw, span: draws[number, draw]
  return samplers.sample(sampler._replace(step=step), denoise, rows, x, noise=given)


@functools.cache
def made(kind):
  return SCHEDULES[kind]()


@functools.cache
def compiled_inverse(schedule):
  return jax.jit(functools.partial(INVERSE, schedule), compiler_options=FAST)


INVERSE, LENGTH = schedules.inverse, 75


def quick_inverse(schedule, lam):
  """`schedules.inverse`, of one length and so of one program for all plans of a schedule."""
  if lam.ndim > 1:  # a plan's nodes
    return jnp.stack([quick_inverse(schedule, row) for row in lam])
  with jax.disable_jit(False):
    padded = np.concatenate([lam, np.zeros(LENGTH - len(lam), lam.dtype)])
    return compiled_inverse(schedule)(padded)[:len(lam)]


def eagerly(function, *args):
  """Plans and grids by operations that are each compiled once, whatever the sampler."""
  with jax.disable_jit(), mock.patch.object(schedules, 'inverse', quick_inverse):
    return function(*args)


def planned(name, schedule, ts, clean=True):
  return eagerly(CASES[name].sampler.plan, schedule, ts, clean)


@functools.cache
def times(grid, kind, steps, dtype='float32'):
  del dtype  # the mode it is called in
  return eagerly(GRIDS[grid], made(kind), steps)


def walk(name, schedule, rows, draws, x, data, filled, prediction='x0'):
  """`program` on rows filled up to `filled`."""
  count = len(rows['level'].t)
  with jax.disable_jit():
    row = getattr(predictions, prediction)(schedule).row(rows['level'])
  rows = jax.tree.map(np.asarray, {**rows, 'level': Told(*rows['level'], *row)})
  fill = lambda a: np.concatenate([a, np.repeat(a[:1], filled - len(a), 0)])
  rows = {**jax.tree.map(fill, rows), 'live': np.arange(filled) < count}
  draws = np.concatenate([draws, np.zeros((filled - len(draws), *draws.shape[1:]), draws.dtype)])
  return np.asarray(program(name, rows, draws, x, data))


def interior(schedule, steps):
  """Equal steps in lambda between two levels that have both data and noise."""
  return eagerly(lambda: schedules.inverse(schedule, jnp.linspace(-3., 3., steps + 1)))


def ends(schedule, ts):
  return [np.array(schedule(ts[i])[1:]) for i in (0, -1)]


def calls(rows):
  return len(rows['level'].t)


# --- the flow -------------------------------------------------------------------------------------

BATCH, ROWS = 608, 216  # of the programs in float64: noise of 2 x 2 x 150 rows, 3 x 72 rows


def flow(name, steps, schedule, ts, data, clean=True):
  """Where sampling ends, and how far that is from the end of the exact probability flow."""
  rows = planned(name, schedule, ts, clean)
  first, last = ends(schedule, ts)
  x = gaussians.quantiles() * np.sqrt((first**2).sum())
  padded = np.concatenate([x, np.zeros((BATCH - len(x), 2))])
  draws = np.zeros((calls(rows), 2, BATCH, 2))
  out = walk(name, schedule, rows, draws, padded, data, ROWS)[:len(x)]
  return out, np.abs(out - gaussians.flow(data, x, first, last)).max()


def slopes(errors):
  """Measured orders of convergence, for steps that double."""
  return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))


@pytest.mark.parametrize('name', FLOWS)
def test_order(name, x64):
  """The declared order, on a grid of equal steps in log-SNR, on three kinds of schedule."""
  order = CASES[name].order
  for kind in ('linear', 'vp', 've'):
    if name.startswith('flow') and kind == 've':
      continue  # straight lines in t are not made for t = sigma over four decades
    schedule = made(kind)
    errors = [
        flow(name, n, schedule, interior(schedule, n), MIXTURE, clean=False)[1] for n in (36, 72)]
    assert slopes(errors) > order - 0.2, (kind, errors)
    assert errors[-1] < {1: 4e-2, 2: 5e-3}.get(order, 1e-3), (kind, errors)


@pytest.mark.parametrize('name', FLOWS)
def test_order_from_noise_to_data(name, x64):
  """Both ends included, as in practice; less what the last step, of one call, leaves at t_min."""
  for kind, grid in (('linear', 'log_snr'), ('linear', 'karras'), ('vp', 'karras')):
    schedule = made(kind)
    errors = [
        flow(name, n, schedule, times(grid, kind, n, 'float64'), MIXTURE)[1] for n in (36, 72)]
    assert slopes(errors) > min(CASES[name].order, 2) - 0.35, (kind, grid, errors)
    assert errors[-1] < {1: 0.1}.get(CASES[name].order, 0.02), (kind, grid, errors)


@pytest.mark.parametrize('name', FLOWS)
def test_inversion(name, x64):
  """Up to noise and down again is where it began; up is the exact flow from t_min."""
  schedule = schedules.cosine(t_min=0.02)
  up = schedules.inverse(schedule, jnp.linspace(3., -3., 73))
  x = gaussians.quantiles()
  padded = np.concatenate([x, np.zeros((BATCH - len(x), 2))])
  first, last = ends(schedule, up)
  still = np.zeros((1, 2, BATCH, 2))
  noised = walk(name, schedule, planned(name, schedule, up, False), still, padded, MIXTURE, ROWS)
  rows = planned(name, schedule, up[::-1], False)
  back = walk(name, schedule, rows, still, noised, MIXTURE, ROWS)[:len(x)]
  bound = {1: 0.1, 2: 1e-2}.get(CASES[name].order, 1e-3)
  assert np.abs(noised[:len(x)] - gaussians.flow(MIXTURE, x, first, last)).max() < bound
  assert np.abs(back - x).max() < bound


def test_heun_is_not_euler(x64):
  schedule = schedules.linear()
  ts = interior(schedule, 36)
  (euler, _), (heun, error) = (
      flow(n, 36, schedule, ts, MIXTURE, clean=False) for n in ('ddim', 'heun'))
  assert np.abs(heun - euler).max() > 5 * error


# --- moments --------------------------------------------------------------------------------------


def moments(name, schedule, ts, clean=True, data=GAUSSIAN):
  """Mean and covariance of what is sampled, exactly, then the true ones; and the noise's share.

  On Gaussian data sampling is affine in x and in each noise: one walk from 0 without noise, one for
  each unit vector of x and of each noise give it all. x begins with the data's moments at the first
  level, or, where that leads to clean data, as pure noise, as in practice.
  """
  rows = planned(name, schedule, ts, clean)
  first, last = ends(schedule, ts)
  count = calls(rows)
  x = np.concatenate([np.zeros((1, 2)), np.eye(2), np.zeros((BATCH - 3, 2))])
  draws = np.zeros((count, 2, BATCH, 2))
  for i, (call, draw) in enumerate(np.ndindex(count, 2)):
    draws[call, draw, 3 + 2 * i: 5 + 2 * i] = np.eye(2)
  out = walk(name, schedule, rows, draws, x, data, ROWS)[:3 + 4 * count]
  of_x, of_noise = np.split(out[1:] - out[0], [2])
  mean, cov = gaussians.moments(data, *first)
  if clean:
    mean, cov = np.zeros(2), first[1]**2 * np.eye(2)
  share = of_noise.T @ of_noise
  return (out[0] + mean @ of_x, of_x.T @ cov @ of_x + share), gaussians.moments(data, *last), share


def errors_of(moments):
  got, true, _ = moments
  return [np.abs(a - b).max() for a, b in zip(got, true)]


@pytest.mark.parametrize('name', NOISY)
def test_moments(name, x64):
  """The variance meets the declared rate; the mean is exact, but where steps are in t."""
  for kind in ('linear', 'vp', 've'):
    if name.startswith('sde') and kind == 've':
      continue  # explicit steps in t are not stable over four decades
    schedule = made(kind)
    runs = [moments(name, schedule, interior(schedule, n), False) for n in (36, 72)]
    mean, cov = np.transpose([errors_of(r) for r in runs])
    assert mean.max() < (1e-2 if name.startswith('sde') else 1e-12), (kind, mean)
    assert slopes(cov) > CASES[name].weak - 0.25, (kind, cov)
    assert cov[-1] < {1: 0.03, 2: 4e-3}[CASES[name].weak], (kind, cov)
    assert np.diag(runs[-1][2]).min() > 0.01  # fresh noise is really there


@pytest.mark.parametrize('name', NOISY)
def test_moments_from_noise_to_data(name, x64):
  """From pure noise: the mean lacks what the start lacks of the data, |m| alpha / sigma at most."""
  for kind, grid in (('linear', 'karras'), ('cosine', 'log_snr'), ('vp', 'log_snr')):
    schedule = made(kind)
    mean, cov = errors_of(moments(name, schedule, times(grid, kind, 72, 'float64')))
    assert mean < (2e-2 if name.startswith('sde') or kind == 'vp' else 1e-12), (kind, grid, mean)
    assert cov < 0.05, (kind, grid, cov)


@pytest.mark.parametrize('name', [n for n in FLOWS + NOISY if n[:4] not in ('flow', 'sde_')])
def test_exact_for_one_point(name, x64):
  """Where the data are one point x0 and eps never change: no step may leave the marginals."""
  for kind in ('linear', 'vp'):
    schedule = made(kind)
    found = moments(name, schedule, interior(schedule, 36), False, POINT)
    assert max(errors_of(found)) < (3e-2 if name in ('ddpm_large', 'ddpm_learned') else 1e-12), kind


def drawn(name, steps, count=8192):
  """Samples of Gaussian data, drawn from keys."""
  schedule, sampler = made('linear'), CASES[name].sampler

  @jax.jit
  def draw(rows, ts, keys):
    x = samplers.initial(schedule, ts, keys, (2,))
    denoise = lambda x, level: gaussians.estimate(GAUSSIAN, x, level)
    return samplers.sample(sampler, denoise, rows, x, keys)

  ts = times('karras', 'linear', steps)
  keys = samplers.sample_keys(3, np.arange(count))
  return np.asarray(draw(planned(name, schedule, ts), ts, keys)), schedule, ts


@pytest.mark.parametrize('name', ['ddpm', 'dpmpp_2m_sde'])
def test_drawn_moments(name):
  """Drawn from keys: unit noise, anew for every step, so the moments of the affine recursion."""
  x, _, _ = drawn(name, 36)
  with jax.enable_x64(True):
    ts = times('karras', 'linear', 36, 'float64')
    (mean, cov), _, _ = moments(name, made('linear'), ts)
  std = np.sqrt(np.diag(cov))
  assert (np.abs(x.mean(0) - mean) < 5 * std / len(x)**0.5).all()
  assert (np.abs(np.cov(x.T) - cov) < 5 * np.outer(std, std) * (2 / len(x))**0.5).all()


@pytest.mark.parametrize('kind', ['linear', 'vp', 've'])
def test_predictor_corrector_moments(kind, x64):
  """Langevin steps hold the marginals they are taken at, up to their own bias of snr squared."""
  schedule = made(kind)
  mean, cov = errors_of(moments('predictor_corrector', schedule, interior(schedule, 72), False))
  assert mean < 1e-12 and cov < 0.16**2


def test_consistency(x64):
  """Where the clean data are known at once, each jump makes the exact marginal."""
  for name in ('consistency', 'lcm', 'tcd'):
    schedule = schedules.linear()
    jump = moments(name, schedule, interior(schedule, 4), False, POINT)
    assert max(errors_of(jump)) < 1e-12


# --- every pair: float32, both ends, all predictions ----------------------------------------------


def product():
  return itertools.product(CASES, SCHEDULES, GRIDS, PREDICTIONS, STEPS)


def pairwise():
  """A subset of `product` in which every two of the five choices meet; greedy, of fixed seed."""
  sets = [list(choice) for choice in (CASES, SCHEDULES, GRIDS, PREDICTIONS, STEPS)]
  rng = np.random.default_rng(0)
  open_pairs = {(i, a, j, b) for i, j in itertools.combinations(range(5), 2)
                for a in sets[i] for b in sets[j]}
  pairs_of = lambda case: {
      (i, case[i], j, case[j]) for i, j in itertools.combinations(range(5), 2)}
  while open_pairs:
    i, a, j, b = min(open_pairs, key=str)
    tries = []
    for _ in range(12):
      case = [values[rng.integers(len(values))] for values in sets]
      case[i], case[j] = a, b
      if allowed(*case[1:4]) or (i, j) in ((1, 2), (1, 3)):
        tries.append(tuple(case))
    best = max(tries, key=lambda case: len(pairs_of(case) & open_pairs))
    open_pairs -= pairs_of(best)
    yield best


X = np.linspace(-1.5, 1.5, 10).reshape(5, 2)


def both_precisions(name, schedule, grid, prediction, steps):
  """x at the end in float32, whether the first call said x0 at all, and what float64 needs."""
  told_by = getattr(predictions, prediction)(made(schedule))
  ts = times(grid, schedule, steps)
  rows = planned(name, made(schedule), ts)
  assert calls(rows) == samplers.calls(CASES[name].sampler, steps)
  level = rows['level']
  assert (level.sigma > 0).all()  # nothing is asked at clean data
  assert all(np.isfinite(a).all() for k, a in rows.items() if k not in ('level', 'span')
             for a in jax.tree.leaves(a))
  draws = np.random.default_rng(0).normal(size=(calls(rows), 2, *X.shape)).astype(np.float32)
  start = (float(level.sigma[0]) * X).astype(np.float32)
  out = walk(name, made(schedule), rows, draws, start, MIXTURE, 150, prediction)
  first = jax.tree.map(lambda a: a[0], level)
  size = np.hypot(*told_by.row(first)) * np.hypot(first.alpha, first.sigma)
  told = abs(predictions.det(told_by, first)) > 2e-3 * size
  return out, told, (ts, start, draws)


def check(name, schedule, grid, prediction, steps):
  case = name, schedule, grid, prediction, steps
  if not allowed(schedule, grid, prediction):
    return
  out, told, (ts, start, draws) = both_precisions(*case)
  assert out.dtype == np.float32 and np.isfinite(out).all(), case
  in_t = name.startswith(('sde', 'flow')) and schedule in TABLES
  if not told or steps < 3 or in_t:
    return  # eps at pure noise says nothing of x0; a table's rates depend on which side of a row
  with jax.enable_x64(True):
    ts = jnp.minimum(np.asarray(ts, np.float64), made(schedule).t_max)
    rows = planned(name, made(schedule), ts)
    full = np.zeros((calls(rows), 2, BATCH, 2)), np.zeros((BATCH, 2))
    full[0][:, :, :len(X)], full[1][:len(X)] = draws, start
    exact = walk(name, made(schedule), rows, *full, MIXTURE, ROWS)[:len(X)]
  scale = max(np.abs(exact).max(), 1.)
  if scale > 100 * np.abs(start).max():
    return  # a few explicit steps in t on a steep schedule: not stable, and no float64 is it
  assert np.abs(out - exact).max() < 1e-3 * scale, (case, out, exact)


def test_each_pair():
  for case in pairwise():
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_all(name):
  """The full product; `python -m pytest -m slow tests/test_samplers.py`."""
  for case in product():
    if case[0] == name:
      check(*case)
