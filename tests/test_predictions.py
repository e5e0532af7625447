"""Predictions against the papers' own formulas for their targets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import predictions
from diffax import schedules

SCHEDULES = ('linear', 'cosine', 'vp', 've')
PREDICTIONS = ('x0', 'eps', 'v', 'velocity', 'edm')


def make(prediction, schedule):
  return getattr(predictions, prediction)(schedule)


def karras(x, sigma, data=0.5):
  """c_skip, c_out, c_in, c_noise of Karras et al. 2022, table 1, last column."""
  c_skip = data**2 / (sigma**2 + data**2)
  c_out = sigma * data / np.sqrt(data**2 + sigma**2)
  return c_skip, c_out, 1 / np.sqrt(sigma**2 + data**2), np.log(sigma) / 4


def papers(schedule, x0, eps, t):
  """What each network is trained to say, in its paper's words; the velocity as a difference."""
  level = schedule(t)
  at = lambda t: schedule(t).alpha * x0 + schedule(t).sigma * eps
  x = at(t)
  c_skip, c_out, _, _ = karras(x / level.alpha, level.nsr)  # EDM knows alpha = 1 alone
  return x, dict(
      x0=x0, eps=eps, v=level.alpha * eps - level.sigma * x0,
      velocity=(at(t * (1 + 1e-5)) - at(t * (1 - 1e-5))) / (2e-5 * t),
      edm=(x0 - c_skip * x / level.alpha) / c_out)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_every_prediction_to_every_other(schedule, x64):
  """From the output of p at x to x0 and eps, from there to what q should have said."""
  schedule = getattr(schedules, schedule)()
  t = np.geomspace(schedule.t_min * 1.01, schedule.t_max * 0.99, 7)[:, None]  # [t 1]
  x0, eps = np.random.default_rng(0).normal(size=(2, 7, 3))
  x, said = papers(schedule, x0, eps, t)

  @jax.jit
  def convert(x, said):
    level = schedule(t)
    told = {p: predictions.solve(make(p, schedule), said[p], x, level) for p in PREDICTIONS}
    return told, {(p, q): predictions.target(make(q, schedule), told[p].x0, told[p].eps, level)
                  for p, q in itertools.product(PREDICTIONS, PREDICTIONS)}

  told, converted = convert(x, said)
  for p in PREDICTIONS:
    np.testing.assert_allclose(told[p].x0, x0, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(told[p].eps, eps, atol=1e-6, rtol=1e-6)
  for (p, q), out in converted.items():
    np.testing.assert_allclose(out, said[q], atol=1e-6, rtol=1e-6, err_msg=f'{p} to {q}')


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_ends(schedule):
  """At clean data and at pure noise, in float32: the truth where there is one to tell, else 0."""
  name, schedule = schedule, getattr(schedules, schedule)()
  x0, eps = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)

  @jax.jit
  def ends(t):
    level = schedule(t)
    x = level.alpha * x0 + level.sigma * eps
    def there_and_back(prediction):
      out = predictions.target(prediction, x0, eps, level)
      told = lambda out, x: predictions.solve(prediction, out, x, level)
      total = lambda out, x: sum(told(out, x)[i].sum() for i in (0, 1))
      return told(out, x), jax.grad(total, (0, 1))(out, x)
    return {p: there_and_back(make(p, schedule)) for p in PREDICTIONS}

  for t in (0., schedule.t_max):
    for p, (told, gradient) in ends(t).items():
      assert np.isfinite(gradient).all(), (p, t)
      silent_x0 = t and p == 'eps' and name in ('linear', 'cosine')
      silent_eps = not t and p == 'x0'
      rounding = 2e-7 * max(1., 80. if name == 've' and t else 1.) * 80
      np.testing.assert_allclose(told.x0, 0 * x0 if silent_x0 else x0, atol=rounding, err_msg=p)
      np.testing.assert_allclose(told.eps, 0 * eps if silent_eps else eps, atol=1e-5, err_msg=p)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_gradients(schedule):
  """Of what is told, in time too: a learned schedule and likelihoods go through `solve`."""
  schedule = getattr(schedules, schedule)()
  ts = jnp.geomspace(schedule.t_min, schedule.t_max * 0.999, 5)
  def total(t, out, x):
    told = [predictions.solve(make(p, schedule), out, x, schedule(t)) for p in PREDICTIONS]
    return sum((e.x0**2 + e.eps**2).sum() for e in told)
  gradients = jax.jit(jax.vmap(jax.grad(total, (0, 1, 2)), (0, None, None)))(
      ts, jnp.ones(3), jnp.linspace(-1., 1., 3))
  assert all(np.isfinite(g).all() for g in gradients)


def test_edm_is_karras():
  """D(x) = c_skip x + c_out F(c_in x, c_noise)."""
  schedule = schedules.ve()
  prediction = predictions.edm(schedule)
  sigma = np.geomspace(0.002, 80, 9)[:, None]
  x, out = np.random.default_rng(0).normal(size=(2, 9, 3)) * np.array([sigma, 1 + 0 * sigma])
  c_skip, c_out, c_in, c_noise = karras(x, sigma)
  level = schedule(jnp.asarray(sigma, jnp.float32))
  told = predictions.solve(prediction, out.astype(np.float32), x.astype(np.float32), level)
  np.testing.assert_allclose(told.x0, c_skip * x + c_out * out, atol=1e-5)
  np.testing.assert_allclose(prediction.c_in(level), c_in, rtol=1e-6)
  np.testing.assert_allclose(prediction.clock(level), c_noise, rtol=1e-5, atol=1e-6)


def test_what_a_network_is_told():
  """Unit variance in, for unit data; the time as 1000 t, as the schedule says, or as EDM does."""
  for name in SCHEDULES:
    schedule = getattr(schedules, name)()
    level = schedule(jnp.float32(0.3))
    variance = level.alpha**2 + level.sigma**2
    for p in ('x0', 'eps', 'v'):
      prediction = make(p, schedule)
      np.testing.assert_allclose(prediction.c_in(level)**2 * variance, 1., rtol=1e-6)
      time = np.log(0.3) / 4 if name == 've' else 300.
      np.testing.assert_allclose(prediction.clock(level), time, rtol=1e-6)
    assert make('velocity', schedule).c_in(level) == 1
    np.testing.assert_allclose(make('edm', schedule).clock(level), np.log(level.nsr) / 4, rtol=1e-5)


def test_check():
  """The noise says nothing of x0 where no data are left: on linear and cosine alone."""
  for name in SCHEDULES:
    schedule = getattr(schedules, name)()
    for p in PREDICTIONS:
      if p == 'eps' and name in ('linear', 'cosine'):
        with pytest.raises(ValueError, match="'eps'.*t=1"):
          predictions.check(make(p, schedule), schedule, p)
      else:
        predictions.check(make(p, schedule), schedule, p)


def test_invert():
  """What an x0 amounts to; clean data tell no noise. A plain x0 and an Estimate are taken alike."""
  x0, eps = jnp.array([[1., -2.], [0.5, 3.]]), jnp.array([[0.3, 0.1], [-1., 2.]])
  for t in (0., 0.4, 1.):
    level = schedules.linear()(t)
    x = level.alpha * x0 + level.sigma * eps
    told = predictions.invert(x0, x, level)
    np.testing.assert_allclose(told.eps, eps if t else 0 * eps, rtol=1e-6)
    assert predictions.estimate(told, x, level) is told
    np.testing.assert_array_equal(predictions.estimate(x0, x, level).eps, told.eps)
