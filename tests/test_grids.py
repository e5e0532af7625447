"""Grids against published tables, closed forms and the optimum of a bound that is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffax import grids
from diffax import schedules

SCHEDULES = [
  schedules.cosine(), schedules.ve(), schedules.linear(), schedules.vp(),
  schedules.laplace(), schedules.squared_cosine(),  # whose times near t_max rounding makes one
  schedules.zero_terminal_snr(schedules.scaled_linear())]
FALLING = {
  'uniform': grids.uniform,
  'quadratic': grids.quadratic,
  'beta': grids.beta,
  'karras': grids.karras,
  'log_snr': grids.log_snr,
  'polyexponential': functools.partial(grids.polyexponential, rho=2.),
  'leading': grids.leading,
  'trailing': grids.trailing,
  'linspace': grids.linspace,
  'ays': functools.partial(grids.ays, model='svd'),
}
TABLE = schedules.Schedule(lambda t: schedules.Level(t, 1 - t, t), 1e-3, 1.)


def indices(ts, train_steps=1000):
  """Of the times a network is asked at, and a check that clean data comes last."""
  assert ts[-1] == 0
  i = np.asarray(ts[:-1], float) * train_steps - 1
  np.testing.assert_allclose(i, np.round(i), atol=1e-3)
  return np.round(i).astype(int).tolist()


@pytest.mark.parametrize('name', FALLING)
def test_every_grid_on_every_schedule(name):
  """As many steps as asked for, falling to 0, finite, asked in [t_min, t_max], also in float32."""
  cases = [(s, n) for s in SCHEDULES[:2] for n in (1, 2, 3, 50, 1000)]
  cases += [(s, n) for s in SCHEDULES[2:] for n in (1, 1000)]
  run = jax.jit(lambda: [FALLING[name](*case) for case in cases])
  for (schedule, steps), ts in zip(cases, run()):
    assert ts.shape == (steps + 1,) and ts.dtype == jnp.float32
    assert np.isfinite(ts).all() and (np.diff(ts) < 0).all() and ts[-1] == 0
    assert ts[-2] >= np.float32(schedule.t_min) and ts[0] <= np.float32(schedule.t_max)
    if name != 'leading':  # whose flaw that is
      assert ts[0] == np.float32(schedule.t_max)


@pytest.mark.parametrize('steps', [1, 7, 20, 5000])
def test_equal_steps_in_time(steps):
  """u^p at equal steps of u; beyond 1/t_min steps down to t_min, and none below."""
  schedule = schedules.linear(t_min=1e-3)
  u = np.linspace(1, 0, steps + 1) if steps < 30 else np.append(np.linspace(1, 1e-3, steps), 0)
  np.testing.assert_allclose(grids.uniform(schedule, steps), u, rtol=1e-4)
  root = np.linspace(1, 0, steps + 1)
  if steps > 30:
    root = np.append(np.linspace(1, 1e-3**0.5, steps), 0)
  np.testing.assert_allclose(grids.quadratic(schedule, steps), root**2, rtol=1e-4)


@pytest.mark.parametrize('a, b', [(0.6, 0.6), (0.5, 0.5), (1., 1.), (2., 0.7)])
def test_beta_quantiles_are_scipys(a, b):
  schedule = schedules.linear(t_min=1e-6)
  ts = jax.jit(lambda: grids.beta(schedule, 12, a, b))()
  expected = scipy.stats.beta.ppf(np.arange(12, -1, -1) / 12, a, b)
  np.testing.assert_allclose(ts, expected, rtol=1e-4, atol=1e-6)


def test_beta_of_one_half_is_the_arcsine_law(x64):
  """Whose quantiles are sin^2(pi u / 2)."""
  ts = grids.beta(schedules.linear(t_min=1e-9), 25, 0.5, 0.5)
  np.testing.assert_allclose(ts, np.sin(np.pi / 2 * np.linspace(1, 0, 26))**2, atol=1e-12)


def test_karras_is_the_papers():
  """Karras et al. 2022, eq. 5, whose grid of 10 EDM states for sigma in [0.002, 80], rho = 7."""
  i = np.arange(10)
  sigmas = (80**(1 / 7) + i / 9 * (0.002**(1 / 7) - 80**(1 / 7)))**7
  np.testing.assert_allclose(grids.karras(schedules.ve(), 10), np.append(sigmas, 0), rtol=2e-5)


def test_polyexponential():
  """k-diffusion: log(sigma / sigma_min) falls as the power rho of equal steps; exponential is 1."""
  ts = grids.polyexponential(schedules.ve(0.01, 100.), 5, rho=2.)
  np.testing.assert_allclose(ts[:-1], 0.01 * 1e4**np.array([1, 9 / 16, 1 / 4, 1 / 16, 0]),
                             rtol=1e-5)
  ts = grids.log_snr(schedules.ve(0.01, 100.), 5)
  np.testing.assert_allclose(ts[:-1], [100, 10, 1, 0.1, 0.01], rtol=1e-5)


@pytest.mark.parametrize('grid, steps, expected', [
  (grids.leading, 10, [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]),
  (functools.partial(grids.leading, offset=1), 10, [901, 801, 701, 601, 501, 401, 301, 201, 101,
                                                    1]),
  (grids.trailing, 10, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
  (grids.linspace, 10, [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
  (grids.leading, 3, [666, 333, 0]),
  (grids.trailing, 3, [999, 666, 332]),
  (grids.linspace, 3, [999, 500, 0]),
  (grids.leading, 1, [0]),
  (grids.trailing, 1, [999]),
  (grids.linspace, 1, [999]),
])
def test_indices_of_a_table(grid, steps, expected):
  """Lin et al. 2023, table 2, and the timesteps Stable Diffusion's pipelines show."""
  assert indices(grid(TABLE, steps)) == expected


@pytest.mark.parametrize('grid, expected', [
  (functools.partial(grids.leading, offset=1), [801, 601, 401, 201, 1, 0]),
  (grids.trailing, [999, 799, 599, 399, 199, 0]),
  (functools.partial(grids.linspace, short=True), [999, 799, 599, 400, 200, 0]),
])
def test_ends_at_the_first_level(grid, expected):
  """Stable Diffusion's set_alpha_to_one=False: index 0 of the table in place of clean data."""
  ts = np.asarray(grid(TABLE, 5, clean=False), float)
  np.testing.assert_allclose(ts * 1000 - 1, expected, atol=1e-3)
  np.testing.assert_array_equal(ts[:-1], grid(TABLE, 5)[:-1])


def test_linspace_between_levels():
  """k-diffusion's `DiscreteSchedule.get_sigmas`, 5 of 1000 levels."""
  ts = np.asarray(grids.linspace(TABLE, 5, whole=False), float)
  np.testing.assert_allclose(ts[:-1] * 1000 - 1, [999, 749.25, 499.5, 249.75, 0], atol=1e-3)


@pytest.mark.parametrize('grid', [grids.leading, grids.trailing, grids.linspace])
def test_as_many_steps_as_the_table_has(grid):
  assert indices(grid(TABLE, 1000)) == list(range(999, -1, -1))
  assert indices(grid(TABLE, 4, train_steps=4), 4) == [3, 2, 1, 0]


def stable_diffusion():
  """sigma / alpha of indices 0 ... 999: beta from 0.00085 to 0.012, equal steps in its root."""
  betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000)**2
  kept = np.cumprod(1 - betas)
  return np.sqrt((1 - kept) / kept)


@pytest.mark.parametrize('model, at', [
  ('sd15', [999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0]),
  ('sdxl', [999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0])])
def test_ays_table_is_at_the_published_indices(model, at):
  """The paper's page gives both noise levels and indices, up to half an index the same."""
  sigma = stable_diffusion()
  np.testing.assert_allclose(grids.AYS[model], sigma[at], rtol=1.5e-2)
  schedule = schedules.ve(sigma[0], sigma[-1])
  found = np.interp(grids.ays(schedule, 10, model)[:-1], sigma, np.arange(1000))
  np.testing.assert_allclose(found, at[:-1], atol=0.7)


def test_ays_between_its_steps():
  """20 steps: the 10, and the geometric means between; a narrower schedule: within its range."""
  schedule = schedules.ve(0.002, 700.)
  ten, twenty = (grids.ays(schedule, n, 'svd')[:-1] for n in (10, 20))
  np.testing.assert_allclose(twenty[::2], ten, rtol=1e-4)
  np.testing.assert_allclose(twenty[1:-1:2], np.sqrt(ten[:-1] * ten[1:]), rtol=1e-4)
  np.testing.assert_allclose(twenty[-1], (0.034 * 0.002)**0.5, rtol=1e-4)
  narrow = grids.ays(schedules.ve(1., 20.), 10, 'svd')
  assert narrow[0] == 20 and narrow[-2] > 1 and (np.diff(narrow) < 0).all()


def test_explicit():
  ts = grids.explicit(schedules.linear(), 3, (1., 0.7, 0.2))
  np.testing.assert_array_equal(ts, np.float32([1., 0.7, 0.2, 0.]))
  np.testing.assert_array_equal(ts, grids.explicit(schedules.linear(), 3, (1., 0.7, 0.2, 0.)))


@pytest.mark.parametrize('steps, times, message', [
  (3, (1., 0.5), 'steps=3'),
  (2, (1., 0.5, 0.1), 'steps=2'),
  (3, (), 'steps=3'),
  (0, (), 'steps=0'),
  (3, (1., 0.5, 0.5), 'falls'),
  (2, (0.5, 1.), 'falls'),
  (2, (1.5, 0.5), 'asked at'),
  (2, (1., 1e-5), 'asked at'),
])
def test_explicit_refuses(steps, times, message):
  with pytest.raises(ValueError, match=message):
    grids.explicit(schedules.linear(), steps, times)


@pytest.mark.parametrize('grid', FALLING.values(), ids=FALLING)
def test_a_grid_has_steps(grid):
  for steps in (0, -1):
    with pytest.raises(ValueError, match=f'steps={steps}'):
      grid(schedules.linear(), steps)


@pytest.mark.parametrize('call, message', [
  (lambda s: grids.leading(s, 1001), 'train_steps=1000'),
  (lambda s: grids.trailing(s, 51, train_steps=50), 'train_steps=50'),
  (lambda s: grids.linspace(s, 2000), 'train_steps=1000'),
  (lambda s: grids.leading(s, 1000, offset=1), 'offset=1'),
  (lambda s: grids.leading(s, 1000, short=True), 'train_steps=1000'),
  (lambda s: grids.leading(s, 10, clean=False), 'offset=1'),
  (lambda s: grids.linspace(s, 10, clean=False), 'index 0'),
  (lambda s: grids.leading(s, 10, offset=100), '0 ... 99'),
  (lambda s: grids.leading(s, 10, offset=-1), 'offset=-1'),
  (lambda s: grids.leading(schedules.linear_table(steps=50), 10), 'train_steps'),
  (lambda s: grids.ays(s, 10, 'sd3'), 'sd15, sdxl, svd'),
  (lambda s: grids.beta(s, 10, a=0.), 'positive'),
])
def test_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(TABLE)


def test_reverse():
  """From t_min, rising, as many steps; a grid that asks at t_min does not ask twice."""
  schedule = schedules.linear(t_min=0.01)
  np.testing.assert_allclose(
      grids.reverse(schedule, grids.uniform(schedule, 4)), [0.01, 0.25, 0.5, 0.75, 1.], rtol=1e-6)
  np.testing.assert_allclose(grids.reverse(schedule, jnp.array([1., 0.])), [0.01, 1.], rtol=1e-6)
  ts = grids.log_snr(schedule, 10)
  rising = jax.jit(functools.partial(grids.reverse, schedule))(ts)
  assert rising.shape == ts.shape and (np.diff(rising) > 0).all()
  np.testing.assert_allclose(rising[2:], ts[::-1][2:])
  np.testing.assert_allclose(rising[:2], [0.01, (0.01 + ts[-3]) / 2], rtol=1e-6)


# --- a grid fitted to a model ---------------------------------------------------------------------


C = 0.5  # the data's standard deviation


def wiener(x, level):
  """E[x0 | x] of Gaussian data."""
  return level.alpha * C**2 / ((level.alpha * C)**2 + level.sigma**2) * x


def optimum(first, last, steps):
  """The sigmas at which the bound is least for Gaussian data.

  E|D(x_t, t)|^2 = c^2 (1 - p) with p = t^2 / (c^2 + t^2), and D is a martingale, so that a step
  costs c^2 int (p_i - p) dt / t^3. Where the derivative in t_i is 0, p_i^2 = p_{i-1} p_{i+1}: the
  optimum is equal steps in log(p).
  """
  p = np.geomspace(*(s**2 / (C**2 + s**2) for s in (first, last)), steps + 1)
  return C * np.sqrt(p / (1 - p))


@functools.partial(jax.jit, static_argnums=(0, 1))
def fitted(name, steps, key):
  schedule = schedules.ve(0.02, 20.) if name == 've' else getattr(schedules, name)(t_min=0.02)
  x0 = C * jax.random.normal(jax.random.fold_in(key, 1), (64, 256))
  ts = grids.align(wiener, schedule, grids.uniform(schedule, steps), x0, key)
  ends = schedule(jnp.array([schedule.t_max, schedule.t_min])).nsr
  return ts, schedule(ts).nsr, ends


@pytest.mark.parametrize('name, steps', [('ve', 5), ('cosine', 4)])
def test_align_finds_the_optimum_on_gaussian_data(name, steps):
  ts, sigmas, ends = fitted(name, steps, jax.random.key(0))
  assert ts.shape == (steps + 1,) and ts[-1] == 0 and (np.diff(ts) < 0).all()
  first = min(ends[0], 1e6)  # cosine begins at no signal at all, where p = 1
  expected = optimum(first, ends[1], steps)
  np.testing.assert_allclose(np.log(sigmas[1:-1]), np.log(expected[1:-1]), atol=0.05)


def test_the_optimum_is_one():
  """Of the bound itself, by quadrature: no inner time moved by 5% costs less."""
  def bound(sigmas):
    total = 0.
    for high, low in zip(sigmas[:-1], sigmas[1:]):
      s = np.geomspace(low, high, 4001)
      p = lambda s: s**2 / (C**2 + s**2)
      total += np.trapezoid(C**2 * (p(high) - p(s)) / s**3, s)
    return total
  best = optimum(20., 0.02, 5)
  for i in range(1, 5):
    for factor in (0.95, 1.05):
      moved = best * np.where(np.arange(6) == i, factor, 1.)
      assert bound(moved) > bound(best)
