"""Laws of t and draws of u, against what their papers say of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from diffax import schedules
from diffax import times

SCHEDULES = ('linear', 'cosine', 'vp', 've')
LAWS = ('uniform', 'log_uniform', 'log_normal', 'log_logistic', 'logit_normal', 'mode', 'cosmap')


def make(name):
  return getattr(schedules, name)()


# --- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', SCHEDULES)
def test_quantiles(name):
  """Each law is normal, logistic or uniform in its own space, the same one on every schedule."""
  schedule = make(name)
  t_min, t_max = schedule.t_min, schedule.t_max
  u = np.linspace(0.005, 0.995, 199)
  z = scipy.special.ndtri(u)
  laws = dict(
      uniform=times.uniform(schedule), log_normal=times.log_normal(schedule),
      log_uniform=times.log_uniform(schedule, -10., 7.),
      log_logistic=times.log_logistic(schedule, -0.7, 0.6),
      logit_normal=times.logit_normal(schedule, 0.5, 0.8))
  laws['shifted'] = times.shifted(schedule, laws['logit_normal'], 2.)
  t = jax.jit(lambda u: {k: law(u) for k, law in laws.items()})(jnp.asarray(u, jnp.float32))
  log_nsr = {k: -np.asarray(schedule(t[k]).lam, float) for k in t}
  t = {k: np.asarray(v, float) for k, v in t.items()}

  np.testing.assert_allclose(t['uniform'], t_min + u * (t_max - t_min), rtol=1e-6)

  inside = (t['log_normal'] > 1.001 * t_min) & (t['log_normal'] < 0.999 * t_max)
  assert inside.mean() > 0.98  # VP begins at sigma / alpha = 0.0105
  np.testing.assert_allclose(log_nsr['log_normal'][inside], (-1.2 + 1.2 * z)[inside], atol=2e-5)

  last = -2 * np.log(80.) if name == 've' else -10.  # VE ends at sigma = 80
  np.testing.assert_allclose(-2 * log_nsr['log_uniform'], 7 + (last - 7) * u, atol=1e-4)

  logistic = scipy.stats.logistic(-0.7, 0.6)
  ends = [-float(schedule(end).lam) for end in (t_min, t_max)]
  below, above = logistic.cdf(ends[0]), logistic.cdf(ends[1])
  found = (logistic.cdf(log_nsr['log_logistic']) - below) / (above - below)
  np.testing.assert_allclose(found, u, atol=2e-5)

  part = lambda k: scipy.special.logit(t[k] / t_max)
  np.testing.assert_allclose(part('logit_normal'), 0.5 + 0.8 * z, atol=1e-5)
  np.testing.assert_allclose(part('shifted'), 0.5 + 0.8 * z + np.log(2), atol=1e-5)


@pytest.mark.parametrize('name', SCHEDULES)
def test_laws_stay_in_range(name):
  """For every number a uniform generator gives, 0 among them: finite, rising, in [t_min, t_max]."""
  schedule = make(name)
  low, high = [0., 2.**-24, 1e-5], [1 - 1e-5, 1 - 2.**-24]
  u = np.concatenate([low, np.linspace(1e-4, 1 - 1e-4, 500), high])
  laws = {name: getattr(times, name)(schedule) for name in LAWS}
  laws['shifted'] = times.shifted(schedule, laws['uniform'])
  laws['shifted back'] = times.shifted(schedule, laws['uniform'], 0.1)
  for law, t in jax.jit(lambda u: {k: f(u) for k, f in laws.items()})(
      jnp.asarray(u, jnp.float32)).items():
    t = np.asarray(t)
    assert t.shape == u.shape and t.dtype == np.float32 and np.isfinite(t).all(), law
    # of levels a bisection apart, neighbours may swap in the last digit
    assert (np.diff(t) >= -1e-6 * t[1:]).all(), law
    assert np.float32(schedule.t_min) <= t.min() and t.max() <= np.float32(schedule.t_max), law
    assert t[100] < t[300] < t[400], law


def test_mode(x64):
  """Uniform at s = 0; symmetric; the second moment of its quantiles by hand; the middle's share."""
  schedule = schedules.linear(0.)
  u = (np.arange(20000) + 0.5) / 20000
  for s in (-1., 0., 1.29, 1.75):
    t = np.asarray(times.mode(schedule, s)(jnp.asarray(u)))
    np.testing.assert_allclose(t + t[::-1], 1., atol=1e-12)
    second = (1 + s)**2 / 12 - 2 * s * (1 + s) / np.pi**2 + s**2 / 8
    np.testing.assert_allclose(((t - 0.5)**2).mean(), second, rtol=1e-6, err_msg=str(s))
  middle = lambda s: np.mean(np.abs(np.asarray(times.mode(schedule, s)(jnp.asarray(u))) - .5) < .1)
  assert middle(-1.) < middle(0.) < middle(1.29) < middle(1.75)


def test_cosmap(x64):
  """Its distribution function is the integral of the density 2 / (pi - 2 pi t + 2 pi t^2)."""
  law = times.cosmap(schedules.linear(0.))
  density = lambda t: 2 / (np.pi - 2 * np.pi * t + 2 * np.pi * t**2)
  u = np.linspace(0., 1., 11)
  t = np.asarray(law(jnp.asarray(u)))
  below = [scipy.integrate.quad(density, 0., end)[0] for end in t]
  np.testing.assert_allclose(below, u, atol=1e-12)


def test_a_law_that_cannot_be_is_refused():
  schedule = schedules.linear()
  for build, says in (
      (lambda: times.mode(schedule, 2.), 's=2.0'),
      (lambda: times.log_uniform(schedule, 3., 3.), 'low=3.0'),
      (lambda: times.shifted(schedule, times.uniform(schedule), 0.), 'shift=0.0')):
    with pytest.raises(ValueError, match=says):
      build()


# --- draws ----------------------------------------------------------------------------------------


def test_independent_draws():
  """An example's number is its own whatever the batch; the numbers are uniform."""
  many = np.asarray(times.independent(jax.random.key(3), 4096))
  np.testing.assert_array_equal(times.independent(jax.random.key(3), 8), many[:8])
  assert scipy.stats.kstest(many, 'uniform').pvalue > 1e-3


def test_stratified_draws():
  """Each of n equal parts of [0, 1) holds one, and any one of them is uniform over the keys."""
  keys = jax.random.split(jax.random.key(0), 2000)
  u = np.asarray(jax.vmap(lambda key: times.stratified(key, 16))(keys))  # [keys 16]
  assert ((0 <= u) & (u < 1)).all()
  np.testing.assert_array_equal(np.sort(np.floor(u * 16), axis=1)[100], np.arange(16))
  gaps = np.diff(np.sort(u, axis=1), axis=1)
  np.testing.assert_allclose(gaps, 1 / 16, atol=1e-6)
  for place in (0, 7, 15):
    assert scipy.stats.kstest(u[:, place], 'uniform').pvalue > 1e-3


# --- importance -----------------------------------------------------------------------------------


def met(losses, bins=8, history=4, rounds=4):
  """A state that met `losses(u)` on an even grid, so often."""
  u = jnp.asarray((np.arange(bins * 4) + 0.5) / (bins * 4), jnp.float32)
  state = times.importance_init(bins, history)
  for _ in range(rounds):
    state = jax.jit(times.importance_update)(state, u, losses(u))
  return state


def test_importance_is_uniform_until_every_bin_is_full():
  u = jnp.linspace(0.01, 0.99, 9)
  state = times.importance_init(4, 2)
  half = times.importance_update(state, jnp.array([0.1, 0.1, 0.3, 0.3, 0.6, 0.6, 0.9]), jnp.ones(7))
  full = times.importance_update(half, jnp.array([0.9]), jnp.array([5.]))
  for met, even in ((state, True), (half, True), (full, False)):
    place, weight = times.importance_law(met)(u)
    assert np.allclose(place, u, atol=1e-6) == even
    assert np.allclose(weight, 1., atol=1e-6) == even


def test_importance_follows_the_root_mean_square():
  """p ~ sqrt(E[L^2]) over the last losses, less the floor; the weight is 1 over the density."""
  state = met(lambda u: jnp.where(u < 0.5, 1., 3.))
  place, weight = times.importance_law(state)(jnp.asarray((np.arange(4000) + 0.5) / 4000))
  share = 0.999 * 0.25 + 0.001 * 0.5
  wanted = np.where(place < 0.5, 0.5 / share, 0.5 / (1 - share))
  np.testing.assert_allclose((np.asarray(place) < 0.5).mean(), share, atol=1e-3)
  np.testing.assert_allclose(weight, wanted, rtol=1e-5)
  assert (np.diff(place) > 0).all() and 0 <= place[0] and place[-1] <= 1


def test_importance_keeps_the_mean_and_lessens_the_spread():
  loss = lambda u: 0.1 + jnp.exp(6 * u)
  u = jnp.asarray((np.arange(40000) + 0.5) / 40000)
  place, weight = times.importance_law(met(loss, bins=20))(u)
  exact = 0.1 + (np.exp(6) - 1) / 6
  np.testing.assert_allclose(np.mean(weight * loss(place)), exact, rtol=1e-4)
  assert np.std(weight * loss(place)) < 0.2 * np.std(loss(u))


def test_importance_forgets_the_old_and_no_order_matters():
  rng = np.random.default_rng(0)
  u, losses = rng.uniform(size=(2, 64)).astype(np.float32)
  update = jax.jit(times.importance_update)
  state = update(times.importance_init(4, 8), u, losses)
  order = rng.permutation(64)
  shuffled = update(times.importance_init(4, 8), u[order], losses[order])
  jax.tree.map(np.testing.assert_array_equal, state, shuffled)
  np.testing.assert_array_equal(state.count, np.histogram(u, 4, (0, 1))[0])
  assert np.isin(state.history, losses).all()  # 64 of them in 32 places
  new = jnp.full(1, 9.)
  for number in range(9):
    state = update(state, jnp.array([0.3]), new)
    assert (np.asarray(state.history) == 9).sum() == min(number + 1, 8)
  assert (state.history[1] == 9).all()
