"""Every sampler against data whose flow and moments are known in closed form (gaussians.py).

Schedule, grid, data, prediction, coefficients and noise are data of one program a sampler, its rows
filled up to one length, so that all cases of a sampler share it. `-m slow` runs the whole product
of samplers, schedules, grids, predictions and numbers of steps; otherwise a subset that holds each
pair of them.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import predictions
from diffax import samplers
from diffax import schedules
import gaussians
from sampler_cases import (
    BATCH, CASES, FLOWS, GAUSSIAN, GRIDS, MIXTURE, NOISY, POINT, PREDICTIONS, ROWS, SCHEDULES,
    STEPS, TABLES, allowed, calls, ends, interior, made, planned, times, walk)


# --- the flow -------------------------------------------------------------------------------------

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
    floor = 4e-4  # what the last step, of one call, leaves at t_min
    order = min(CASES[name].order, 2)
    assert slopes(errors) > order - 0.35 or errors[-1] < floor, (kind, grid, errors)
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
