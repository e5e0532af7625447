"""Schedules against the equations they are said to solve; the inverse; the grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import grids
from diffax import schedules

NAMES = ('linear', 'cosine', 'vp', 've')


def make(name):
  return getattr(schedules, name)()


def inner_times(schedule, count=9):
  """Times between t_min and t_max, both ends out."""
  return np.geomspace(schedule.t_min, schedule.t_max, count + 2)[1:-1]


# --- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', NAMES)
def test_level(name):
  """From clean data to noise: finite, alpha >= 0 and falling, sigma rising, lambda falling."""
  schedule = make(name)
  level = jax.jit(schedule.level)(jnp.linspace(0., schedule.t_max, 1001))
  for part in level:
    assert part.shape == (1001,) and part.dtype == jnp.float32 and jnp.isfinite(part).all()
  assert (level.alpha[0], level.sigma[0]) == (1, 0)
  assert (level.alpha >= 0).all() and (np.diff(level.alpha) <= 0).all()
  assert (np.diff(level.sigma) > -1e-6).all()
  assert (np.diff(level.lam) < 0).all() and level.lam[0] == jnp.inf
  np.testing.assert_allclose(np.exp(-level.lam[1:-1]), level.nsr[1:-1], rtol=1e-5)
  assert 0 < schedule.t_min < 0.01 * schedule.t_max


def test_noise_at_the_end():
  """What is left of the data: nothing on linear and cosine; the papers' amounts on VP and VE."""
  ends = {name: make(name)(make(name).t_max) for name in NAMES}
  assert ends['linear'][1:] == ends['cosine'][1:] == (0, 1)
  integral = (0.1 + 20) / 2  # of beta over [0, 1]
  np.testing.assert_allclose(ends['vp'].alpha, np.exp(-integral / 2), rtol=1e-6)
  assert ends['ve'][1:] == (1, 80)


def test_cosine_angle(x64):
  """x_t turns from data to noise: alpha^2 + sigma^2 = 1, sigma / alpha = tan(pi t / 2)."""
  t = np.linspace(0.01, 0.99, 50)
  level = schedules.cosine()(t)
  np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1., rtol=1e-14)
  np.testing.assert_allclose(level.nsr, np.tan(np.pi * t / 2), rtol=1e-12)


def test_vp_solves_its_sde(x64):
  """dx = -beta x / 2 dt + sqrt(beta) dw, so that the mean decays and variance 1 is kept."""
  t = jnp.linspace(0.01, 1., 50)
  beta = 0.1 + t * (20 - 0.1)
  level, (d_alpha, d_sigma) = schedules.vp()(t), schedules.rates(schedules.vp(), t)
  np.testing.assert_allclose(d_alpha, -beta * level.alpha / 2, rtol=1e-12)
  np.testing.assert_allclose(2 * level.sigma * d_sigma, beta * (1 - level.sigma**2), rtol=1e-10)


@pytest.mark.parametrize('name', NAMES)
def test_rates(name, x64):
  schedule = make(name)
  t = inner_times(schedule)
  step = 1e-5 * t
  before, after = schedule(t - step), schedule(t + step)
  d_alpha, d_sigma = schedules.rates(schedule, jnp.asarray(t))
  for got, a, b in ((d_alpha, after.alpha, before.alpha), (d_sigma, after.sigma, before.sigma)):
    np.testing.assert_allclose(got, (a - b) / (2 * step), rtol=1e-6, atol=1e-8)


# --- inverse --------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', NAMES)
def test_inverse_float32(name):
  """As near as float32 tells: lambda is rounded, and moves t by that over |lambda'|."""
  schedule = make(name)
  t = np.concatenate([inner_times(schedule, 60), schedule.t_max * np.linspace(0.1, 0.999, 60)])
  t = jnp.asarray(t, jnp.float32)

  @jax.jit
  def there_and_back(t):
    lam, slope = jax.jvp(lambda t: schedule(t).lam, (t,), (jnp.ones_like(t),))
    return lam, slope, schedules.inverse(schedule, lam)

  lam, slope, back = map(np.asarray, there_and_back(t))
  rounding = 2.**-23 * (np.abs(lam) + 2) / np.abs(slope)
  assert (np.abs(back - t) <= 3 * rounding + 2.**-23 * t).all()


@pytest.mark.parametrize('name', NAMES)
def test_inverse_out_of_range(name):
  schedule = make(name)
  t = schedules.inverse(schedule, jnp.array([jnp.inf, 60., -60., -jnp.inf]))
  assert jnp.isfinite(t).all()
  np.testing.assert_allclose(t[:2], 0., atol=1e-12)
  np.testing.assert_allclose(t[2:], schedule.t_end, rtol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_inverse_gradient_in_lam(name, x64):
  """Against finite differences of the inverse itself, whose value is tested on its own."""
  schedule = make(name)
  t = jnp.asarray(inner_times(schedule))
  inverse = jax.jit(lambda lam: schedules.inverse(schedule, lam))
  lam = schedule(t).lam
  np.testing.assert_allclose(inverse(lam), t, rtol=1e-12)
  _, slope = jax.jvp(inverse, (lam,), (jnp.ones_like(lam),))
  backward = jax.grad(lambda lam: inverse(lam).sum())(lam)
  finite = (inverse(lam + 1e-5) - inverse(lam - 1e-5)) / 2e-5
  np.testing.assert_allclose(slope, finite, rtol=1e-6)
  np.testing.assert_allclose(backward, slope, rtol=1e-12)


def test_inverse_gradient_in_the_schedule(x64):
  """A learned schedule: the time at a fixed lambda, by vp's beta_max."""
  lam = jnp.linspace(-4., 3., 8)
  times = jax.jit(lambda beta: schedules.inverse(schedules.vp(beta_max=beta), lam))
  _, slope = jax.jvp(times, (20.,), (1.,))
  np.testing.assert_allclose(slope, (times(20.001) - times(19.999)) / 0.002, rtol=1e-6)
  backward = jax.grad(lambda beta: times(beta).sum())(20.)
  np.testing.assert_allclose(backward, slope.sum(), rtol=1e-10)


# --- grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('grid', ['uniform', 'karras', 'log_snr'])
def test_grid(grid, name):
  """From t_max to 0, falling, the network asked in [t_min, t_max]; equal steps in its own space."""
  schedule = make(name)
  space = dict(
      uniform=lambda level: level.t, karras=lambda level: level.nsr**(1 / 7),
      log_snr=lambda level: level.lam)[grid]
  for steps in (1, 20):
    ts = jax.jit(getattr(grids, grid), static_argnums=(0, 1))(schedule, steps)
    assert ts.shape == (steps + 1,) and ts.dtype == jnp.float32
    assert ts[0] == np.float32(schedule.t_max) and ts[-1] == 0 and (np.diff(ts) < 0).all()
    assert ts[-2] > 0.999 * schedule.t_min
  lengths = np.diff(space(schedule(ts[1:-1])))
  np.testing.assert_allclose(lengths, lengths.mean(), rtol=2e-3)
  if grid != 'uniform':
    np.testing.assert_allclose(ts[-2], schedule.t_min, rtol=1e-5)


def test_karras_grid_is_the_papers():
  """Karras et al. 2022, eq. 5, for N = 18, sigma in [0.002, 80], rho = 7."""
  i = np.arange(18)
  sigmas = (80**(1 / 7) + i / 17 * (0.002**(1 / 7) - 80**(1 / 7)))**7
  ts = jax.jit(grids.karras, static_argnums=(0, 1))(schedules.ve(), 18)
  np.testing.assert_allclose(ts, np.append(sigmas, 0.), rtol=2e-5)
