"""Schedules against the equations they are said to solve; the inverse; the grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffax import grids
from diffax import schedules

LEARNED = schedules.learned(width=64)
MEMBERS = dict(
    linear=schedules.linear(), cosine=schedules.cosine(), vp=schedules.vp(), ve=schedules.ve(),
    cosine_interpolated=schedules.cosine_interpolated(), trigflow=schedules.trigflow(),
    sub_vp=schedules.sub_vp(), exponential=schedules.exponential(), sigmoid=schedules.sigmoid(),
    laplace=schedules.laplace(), linear_table=schedules.linear_table(),
    scaled_linear=schedules.scaled_linear(), squared_cosine=schedules.squared_cosine(),
    short_table=schedules.alphas_cumprod((0.99, 0.9, 0.5, 0.2, 0.)),
    learned=LEARNED.bind(LEARNED.init(jax.random.key(0))),
    shift_snr=schedules.shift_snr(schedules.cosine()),
    shift_snr_of_linear=schedules.shift_snr(schedules.linear(), 9.),
    zero_snr_of_table=schedules.zero_terminal_snr(schedules.scaled_linear()),
    zero_snr_of_vp=schedules.zero_terminal_snr(schedules.vp()),
    zero_snr_of_ve=schedules.zero_terminal_snr(schedules.ve()),
    shift=schedules.shift(schedules.linear()), shift_of_ve=schedules.shift(schedules.ve(), 0.5),
    shift_of_table=schedules.shift(schedules.scaled_linear()),
    shift_tokens=schedules.shift_tokens(schedules.linear()),
    truncate=schedules.truncate(schedules.linear(), 0.001, 0.98))
NOT_PRESERVING = (
    'linear', 've', 'sub_vp', 'exponential', 'shift_snr_of_linear', 'zero_snr_of_ve', 'shift',
    'shift_of_ve', 'shift_tokens', 'truncate')
SOME = ('linear', 'cosine', 'vp', 've', 'zero_snr_of_table', 'learned', 'laplace')
WITH_GRIDS = ('linear', 'cosine', 'vp', 've')


def inner_times(schedule, count=9):
  """Times between t_min and t_max, both ends out."""
  return np.geomspace(schedule.t_min, schedule.t_max, count + 2)[1:-1]


def slope(function, t):
  return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]


# --- every schedule -------------------------------------------------------------------------------


@pytest.mark.parametrize('name', MEMBERS)
def test_level(name):
  """From clean data to noise: finite, alpha >= 0 and falling, sigma rising, lambda falling; for t
  of any shape, a time a frame."""
  schedule = MEMBERS[name]
  level = schedule(jnp.linspace(0., schedule.t_max, 1001).reshape(7, 143, 1, 1))
  for part in level:
    assert part.shape == (7, 143, 1, 1) and part.dtype == jnp.float32 and jnp.isfinite(part).all()
  level = jax.tree.map(jnp.ravel, level)
  np.testing.assert_allclose([level.alpha[0], level.sigma[0]], [1, 0], rtol=2e-7)
  assert (level.alpha >= 0).all() and (level.sigma >= 0).all()
  assert (np.diff(level.alpha) < 2e-7).all() and (np.diff(level.sigma) > -1e-6).all()
  assert (np.diff(level.lam) < 0).all() and level.lam[0] == jnp.inf
  np.testing.assert_allclose(np.exp(-level.lam[1:-1]), level.nsr[1:-1], rtol=1e-5)
  if name not in NOT_PRESERVING:
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1., rtol=1e-6)
  assert 0 < schedule.t_min < 0.01 * schedule.t_max or name == 'short_table'
  assert jnp.isfinite(schedule.clock(jax.tree.map(lambda part: part[1:], level))).all()


@pytest.mark.parametrize('name', MEMBERS)
def test_float32(name):
  """Lambda is as near to that of float64 as the rounding of t and of its own value let it be, to
  within a millionth of the noisy end."""
  schedule = MEMBERS[name]
  t = schedule.t_max * np.append(1 - 2.**-np.arange(1, 21), np.geomspace(1e-3, 0.4, 20))
  t = t.astype(np.float32)
  lam = np.asarray(jax.jit(lambda t: schedule(t).lam)(t))
  with jax.enable_x64(True):
    exact, rate = map(np.asarray, jax.jit(
        lambda t: (schedule(t).lam, slope(lambda t: schedule(t).lam, t)))(np.float64(t)))
  rounding = 2.**-23 * (2 + np.abs(exact) + np.abs(rate) * t)
  assert lam.dtype == np.float32 and exact.dtype == np.float64
  assert (np.abs(lam - exact) <= 4 * rounding).all(), (np.abs(lam - exact) / rounding).max()


@pytest.mark.parametrize('name', MEMBERS)
def test_rates_and_inverse(name, x64):
  """Rates against differences; t(lambda(t)) = t, and its derivatives by those of lambda:
  t' = 1 / lambda', t'' = -lambda'' / lambda'^3."""
  schedule = MEMBERS[name]
  lam = lambda t: schedule(t).lam
  inverse = lambda lam: schedules.inverse(schedule, lam)
  first = lambda lam: slope(inverse, lam)

  def all_of(t):
    rate, bend = jax.jvp(lambda t: slope(lam, t), (t,), (jnp.ones_like(t),))
    given = jnp.stack(schedules.rates(schedule, t))
    finite = [(schedule(t * 1.00001)[i] - schedule(t * 0.99999)[i]) / (2e-5 * t) for i in (1, 2)]
    back = jnp.stack([inverse(lam(t)), *jax.jvp(first, (lam(t),), (jnp.ones_like(t),))])
    return given, jnp.stack(finite), back, jnp.stack([t, 1 / rate, -bend / rate**3])

  given, finite, back, expected = jax.jit(all_of)(jnp.asarray(inner_times(schedule)))
  np.testing.assert_allclose(given, finite, rtol=1e-6, atol=1e-8)
  np.testing.assert_allclose(back[0], expected[0], rtol=1e-11)
  np.testing.assert_allclose(back[1], expected[1], rtol=1e-7)
  np.testing.assert_allclose(back[2], expected[2], rtol=1e-6, atol=1e-9)


# --- their papers ---------------------------------------------------------------------------------


def test_noise_at_the_end():
  """What is left of the data: nothing on linear and cosine; the papers' amounts elsewhere."""
  ends = {name: schedule(schedule.t_max) for name, schedule in MEMBERS.items()}
  for name in ('linear', 'cosine', 'sigmoid', 'laplace', 'trigflow', 'short_table', 'shift',
               'shift_tokens', 'zero_snr_of_table', 'zero_snr_of_vp'):
    assert ends[name].alpha == 0 and abs(ends[name].sigma - 1) < 1e-6, name
  integral = (0.1 + 20) / 2  # of beta over [0, 1]
  np.testing.assert_allclose(ends['vp'].alpha, np.exp(-integral / 2), rtol=1e-6)
  np.testing.assert_allclose(
      ends['sub_vp'][1:], [np.exp(-integral / 2), 1 - np.exp(-integral)], rtol=1e-6)
  assert ends['ve'][1:] == (1, 80)
  np.testing.assert_allclose(ends['exponential'].sigma, 50., rtol=1e-6)


def test_cosine_angle(x64):
  """x_t turns from data to noise: alpha^2 + sigma^2 = 1, sigma / alpha = tan(pi t / 2)."""
  t = np.linspace(0.01, 0.99, 50)
  for level in (schedules.cosine()(t), schedules.trigflow()(t * np.pi / 2)):
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1., rtol=1e-14)
    np.testing.assert_allclose(level.nsr, np.tan(np.pi * t / 2), rtol=1e-12)


@pytest.mark.parametrize('name', ['vp', 'sub_vp', 'exponential'])
def test_sdes(name, x64):
  """dx = -beta x / 2 dt + g dw: the mean decays at beta / 2, the variance at beta, and g^2 is
  added; g^2 as in Song et al. 2021, appendix B."""
  schedule = MEMBERS[name]
  t = jnp.linspace(0.01, 1., 50)
  level, (d_alpha, d_sigma) = jax.jit(lambda t: (schedule(t), schedules.rates(schedule, t)))(t)
  beta = 0. * t if name == 'exponential' else 0.1 + t * (20 - 0.1)
  added = dict(
      vp=beta, sub_vp=beta * (1 - np.exp(-2 * (0.1 * t + 19.9 * t**2 / 2))),
      exponential=(0.01 * 5000**t)**2 * 2 * np.log(5000))[name]
  np.testing.assert_allclose(d_alpha, -beta * level.alpha / 2, rtol=1e-12)
  np.testing.assert_allclose(
      2 * level.sigma * d_sigma, added - beta * level.sigma**2, rtol=1e-10, atol=1e-12)


def test_sigmoid_is_chens(x64):
  """gamma(t) of Chen 2023, algorithm 1, whose three settings differ in start, end and tau."""
  t = np.linspace(0.01, 0.99, 40)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  for start, end, tau in ((-3., 3., 1.), (0., 3., 0.3), (-3., 3., 0.1)):
    first, now, last = (sigmoid((start + t * (end - start)) / tau) for t in (0., t, 1.))
    level = schedules.sigmoid(start, end, tau)(t)
    np.testing.assert_allclose(level.alpha**2, (last - now) / (last - first), rtol=1e-9, atol=1e-15)


def test_laplace_distribution(x64):
  """log SNR, twice lambda, at uniform times is distributed by Laplace's law."""
  t = np.linspace(0.001, 0.999, 77)
  for mu, b in ((0., 0.5), (-1., 2.)):
    lam = schedules.laplace(mu, b)(t).lam
    np.testing.assert_allclose(scipy.stats.laplace.sf(2 * lam, mu, b), t, rtol=1e-10)


def test_interpolated_cosine(x64):
  """Between the cosine schedules shifted by each size: low near data, high near noise."""
  t = np.array([1e-6, 0.5, 1 - 1e-6])
  log_snr = 2 * schedules.cosine_interpolated(256, 32, 64)(t).lam - 2 * schedules.cosine()(t).lam
  np.testing.assert_allclose(log_snr, 2 * np.log([1 / 8, (1 / 8 / 4)**0.5, 1 / 4]), atol=1e-5)


# --- learned --------------------------------------------------------------------------------------


def test_learned_is_monotone_between_its_ends():
  """Whatever the parameters are: at the start, and far from it."""
  def all_of(size, t):
    params = jax.tree.map(lambda p: p + size * jnp.sin(5 * p), LEARNED.init(jax.random.key(1)))
    schedule = LEARNED.bind(params)
    ends = jnp.stack([params['gamma_min'], params['gamma_max']])
    return schedule(t).lam, schedule.clock(schedule(t)), ends
  t = jnp.linspace(1e-3, 1., 300)
  lam, clock, ends = jax.jit(jax.vmap(all_of, (0, None)))(jnp.array([0., 1., 3.]), t)
  assert (np.diff(lam) < 0).all() and (np.diff(clock) > 0).all()
  assert np.ptp(ends[:, 0]) > 1
  np.testing.assert_allclose(-2 * lam[:, np.array([0, -1])], ends, rtol=1e-5)
  np.testing.assert_allclose(clock[:, np.array([0, -1])], [[0, 1000]] * 3, atol=2e-3)


def test_learned_gradients():
  """Of a level, in every parameter, also at both ends; at t = 0, clean data, they are 0."""
  params = LEARNED.init(jax.random.key(0))
  def total(params, t):
    level = LEARNED.bind(params)(t)
    return level.alpha + 2 * level.sigma
  gradients = jax.jit(
      jax.vmap(jax.grad(total), (None, 0)))(params, jnp.array([0., 1e-3, 0.5, 1.]))
  for name, gradient in gradients.items():
    assert jnp.isfinite(gradient).all() and (jnp.abs(gradient[0]) < 1e-6).all()
    assert (jnp.abs(gradient[2]) > 0).all(), name
  assert gradients['gamma_min'][1] != 0 and gradients['gamma_max'][3] != 0
  assert (jnp.abs(gradients['l2'][3]) < 1e-6).all()  # where gamma is the end itself


def test_learned_inverse(x64):
  """The time of a lambda moves with the parameters: against differences, and to second order."""
  params = LEARNED.init(jax.random.key(0))
  along = jax.tree.map(lambda p: jnp.sin(jnp.arange(p.size) + 1.).reshape(p.shape), params)
  lam = jnp.linspace(-2., 6., 5)
  def times(step):
    return schedules.inverse(
        LEARNED.bind(jax.tree.map(lambda p, d: p + step * d, params, along)), lam)
  def both(step):
    return jnp.stack([times(step), *jax.jvp(lambda step: slope(times, step), (step,), (1.,))])
  before, now, after = jax.jit(jax.vmap(both))(jnp.array([-1e-4, 0., 1e-4]))
  np.testing.assert_allclose(now[1:], (after - before)[:2] / 2e-4, rtol=1e-5)


# --- tables ---------------------------------------------------------------------------------------


def test_tables_of_the_papers():
  """alphas_cumprod of DDPM and Stable Diffusion, and its sigmas, as they are quoted; of Nichol &
  Dhariwal the last row, where a beta of 0.999 stands in for 1."""
  last = {name: MEMBERS[name](1.) for name in ('linear_table', 'scaled_linear', 'squared_cosine')}
  np.testing.assert_allclose(last['linear_table'].alpha**2, 4.04e-5, rtol=2e-3)
  np.testing.assert_allclose(last['scaled_linear'].alpha**2, 0.00466, rtol=1e-3)
  np.testing.assert_allclose(last['scaled_linear'].nsr, 14.6146, rtol=1e-5)
  first = MEMBERS['scaled_linear'](0.001)
  np.testing.assert_allclose([first.sigma**2, first.nsr], [0.00085, 0.0292], rtol=2e-3)
  angle = lambda t: (t + 0.008) / 1.008 * np.pi / 2
  square = (np.cos(angle(0.999)) / np.cos(angle(0.)))**2
  np.testing.assert_allclose(last['squared_cosine'].alpha**2, 0.001 * square, rtol=1e-5)


def test_levels_at_a_tables_times_are_its_rows():
  """To float32's precision, also where lambda is steep; and the network hears whole numbers."""
  betas = np.linspace(1e-4, 0.02, 1000)
  angle = (np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2
  steep = np.minimum(1 - (np.cos(angle[1:]) / np.cos(angle[:-1]))**2, 0.999)
  for table, schedule in ((betas, MEMBERS['linear_table']), (steep, MEMBERS['squared_cosine'])):
    square = np.cumprod(1 - table)
    for t in (np.float32(np.arange(1, 1001) / 1000), jnp.linspace(1., 0., 1001)[-2::-1]):
      level = schedule(t)
      np.testing.assert_allclose(level.alpha, np.sqrt(square), rtol=1e-6)
      np.testing.assert_allclose(level.sigma, np.sqrt(1 - square), rtol=1e-6)
      np.testing.assert_array_equal(schedule.clock(level), np.arange(1000))
    np.testing.assert_allclose(schedule.clock(schedule(0.5005)), 499.5, rtol=1e-6)
  assert schedules.betas((0.1, 1.))(1.).alpha == 0
  rows = schedules.alphas_cumprod(np.cumprod(1 - betas))(t)
  np.testing.assert_allclose(rows.lam, MEMBERS['linear_table'](t).lam, rtol=1e-5, atol=1e-6)


def test_zero_terminal_snr(x64):
  """Lin et al. 2023: no signal in the last row, the first as it was, in between a straight line of
  the old alphas; clean data stay, and so does what ends in noise or preserves no variance."""
  old, new = MEMBERS['scaled_linear'], MEMBERS['zero_snr_of_table']
  before, after = jax.jit(lambda t: (old(t), new(t)))(np.append(np.arange(1001) / 1000, 0.0004))
  np.testing.assert_allclose(
      [after.alpha[1000], after.alpha[1], after.alpha[0]], [0., before.alpha[1], 1.], rtol=1e-14)
  straight = np.diff(after.alpha[1:-1]) / np.diff(before.alpha[1:-1])
  np.testing.assert_allclose(straight, straight[0], rtol=1e-8)
  np.testing.assert_allclose(after.sigma[-1], before.sigma[-1], rtol=1e-14)
  linear, ve = schedules.zero_terminal_snr(schedules.linear()), MEMBERS['zero_snr_of_ve']
  t = np.append(0., np.geomspace(0.002, 1., 11))
  linear, ve = jax.jit(lambda t: (linear(t), ve(80 * t)))(t)
  np.testing.assert_allclose(linear[1:], [1 - t, t], atol=1e-15)
  np.testing.assert_allclose(ve.alpha**2 + ve.sigma**2, 1 + (80 * t)**2, rtol=1e-12)
  assert ve.alpha[-1] == 0


# --- shifts ---------------------------------------------------------------------------------------


def test_shift():
  """On straight lines: 3/4 of noise at t = 1/2 (SD3), SNR over shift^2, a shift of a shift is the
  product. The network hears 1000 sigma, once shifted; the ends stay."""
  linear, t = schedules.linear(), jnp.linspace(0., 1., 41)
  sd3 = schedules.shift(linear, 3.)
  np.testing.assert_allclose(sd3(0.5)[1:], [0.25, 0.75], rtol=1e-6)
  inside = t[1:-1]
  np.testing.assert_allclose(sd3(inside).lam, linear(inside).lam - np.log(3.), atol=1e-5)
  for a, b in ((2., 1.5), (4., 0.5)):
    twice, once = schedules.shift(schedules.shift(linear, a), b), schedules.shift(linear, a * b)
    for schedule in (twice, once):
      level = schedule(t)
      np.testing.assert_allclose(schedule.clock(level), 1000 * level.sigma, rtol=1e-6)
      np.testing.assert_allclose(schedule.own(t), level.sigma, rtol=1e-6)
      np.testing.assert_array_equal(level.t, t)
    np.testing.assert_allclose(twice(t)[1:], once(t)[1:], atol=3e-7)
    np.testing.assert_allclose(twice(twice.t_min).sigma, linear.t_min, rtol=1e-5)
  np.testing.assert_allclose(schedules.shift_time(schedules.shift_time(t, 5.), 0.2), t, atol=2e-7)
  table = MEMBERS['shift_of_table']
  np.testing.assert_allclose(table.clock(table(0.5)), 749., rtol=1e-6)


def test_shift_by_size():
  """SD3's sqrt(m / n); Flux's mu, 0.5 at 256 tokens and 1.15 at 4096."""
  linear = schedules.linear()
  odds = lambda schedule: schedule(0.5).nsr
  np.testing.assert_allclose(odds(schedules.shift_resolution(linear, 1024, 256)), 4., rtol=1e-6)
  for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
    np.testing.assert_allclose(
        odds(schedules.shift_tokens(linear, tokens)), np.exp(mu), rtol=1e-6)


@pytest.mark.parametrize('name', ['cosine', 'linear', 've', 'scaled_linear'])
def test_shift_snr(name):
  """log SNR moves by log(factor) everywhere; alpha^2 + sigma^2 does not."""
  old = MEMBERS[name]
  for factor in (0.25, 16.):
    new = schedules.shift_snr(old, factor)
    t = jnp.asarray(inner_times(old), jnp.float32)
    np.testing.assert_allclose(new(t).lam, old(t).lam + np.log(factor) / 2, atol=1e-5)
    norm = lambda level: level.alpha**2 + level.sigma**2
    np.testing.assert_allclose(norm(new(t)), norm(old(t)), rtol=1e-6)
    np.testing.assert_allclose(new(0.)[1:], [1., 0.], rtol=2e-7)


def test_truncate():
  part = MEMBERS['truncate']
  assert (part.t_min, part.t_max) == (0.001, 0.98)
  np.testing.assert_array_equal(part(0.5), schedules.linear()(0.5))


@pytest.mark.parametrize('build', [
    lambda: schedules.shift(schedules.linear(), 0.),
    lambda: schedules.shift_snr(schedules.linear(), -1.),
    lambda: schedules.truncate(schedules.linear(), 0.5, 0.4),
    lambda: schedules.truncate(schedules.linear(), 0.1, 1.1),
    lambda: schedules.alphas_cumprod((0.1, 0.2)),
    lambda: schedules.alphas_cumprod((1., 0.2)),
    lambda: schedules.alphas_cumprod(()),
    lambda: schedules.betas((0.1, 1.2)),
    lambda: schedules.betas((1., 0.2)),
    lambda: schedules.betas((0., 0.2)),
    lambda: schedules.cosine_interpolated(256, 1, 256),
    lambda: schedules.sigmoid(3., -3.),
    lambda: schedules.laplace(b=0.),
    lambda: schedules.learned(5., -13.3),
])
def test_bad_options(build):
  with pytest.raises(ValueError, match=r'\(|:'):
    build()


# --- inverse --------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', SOME)
def test_inverse_float32(name):
  """As near as float32 tells: lambda is rounded, and moves t by that over |lambda'|; the times next
  to a table's row are all that row's."""
  schedule = MEMBERS[name]
  t = np.concatenate([inner_times(schedule, 60), schedule.t_max * np.linspace(0.1, 0.999, 60)])
  t = jnp.asarray(t, jnp.float32)

  def there_and_back(t):
    lam, slope = jax.jvp(lambda t: schedule(t).lam, (t,), (jnp.ones_like(t),))
    return lam, slope, schedules.inverse(schedule, lam)

  lam, slope, back = map(np.asarray, jax.jit(there_and_back)(t))
  rounding = 2.**-23 * ((np.abs(lam) + 2) / np.abs(slope) + 2 * ('table' in name))
  assert (np.abs(back - t) <= 3 * rounding + 2.**-23 * t).all()


@pytest.mark.parametrize('name', SOME)
def test_inverse_out_of_range(name):
  """The end of the range, whose gradient is 0 and no NaN, also where a slope is infinite."""
  schedule = MEMBERS[name]
  lam = jnp.array([jnp.inf, 60., -60., -jnp.inf])
  inverse = lambda lam: schedules.inverse(schedule, lam)
  t, gradient = jax.jit(lambda lam: (inverse(lam), jax.grad(lambda l: inverse(l).sum())(lam)))(lam)
  assert jnp.isfinite(t).all() and (jnp.abs(gradient) < 1e-12).all()
  np.testing.assert_allclose(t[:2], 0., atol=1e-12)
  np.testing.assert_allclose(t[2:], schedule.t_end, rtol=1e-6)


def test_inverse_gradient_in_the_schedule(x64):
  """A learned schedule: the time at a fixed lambda, by vp's beta_max."""
  lam = jnp.linspace(-4., 3., 8)
  times = lambda beta: schedules.inverse(schedules.vp(beta_max=beta), lam)
  def all_of(beta):
    return times(beta), slope(times, beta), jax.grad(lambda beta: times(beta).sum())(beta)
  times, slopes, backward = jax.jit(jax.vmap(all_of))(jnp.array([19.999, 20., 20.001]))
  np.testing.assert_allclose(slopes[1], (times[2] - times[0]) / 0.002, rtol=1e-6)
  np.testing.assert_allclose(backward[1], slopes[1].sum(), rtol=1e-10)


# --- grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', WITH_GRIDS)
@pytest.mark.parametrize('grid', ['uniform', 'karras', 'log_snr'])
def test_grid(grid, name):
  """From t_max to 0, falling, the network asked in [t_min, t_max]; equal steps in its own space."""
  schedule = MEMBERS[name]
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
