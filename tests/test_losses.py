"""Laws of t, weightings and the loss, against what their papers say of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from diffax import losses
from diffax import predictions
from diffax import schedules
from diffax import times

SCHEDULES = ('linear', 'cosine', 'vp', 've')
PREDICTIONS = ('x0', 'eps', 'v', 'velocity', 'edm')
LAWS = ('uniform', 'log_normal', 'logit_normal')


def make(name):
  return getattr(schedules, name)()


def levels(schedule, count=9):
  return schedule(jnp.geomspace(schedule.t_min, schedule.t_max, count + 2)[1:-1])


# --- laws of t ------------------------------------------------------------------------------------


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_quantiles(schedule):
  """Each law is normal in its own space, the same one on every schedule; uniform in t."""
  schedule = make(schedule)
  u = np.linspace(0.005, 0.995, 199)
  z = scipy.special.ndtri(u)
  at = lambda law: np.asarray(jax.jit(law)(jnp.asarray(u, jnp.float32)), float)
  t_min, t_max = schedule.t_min, schedule.t_max

  np.testing.assert_allclose(at(times.uniform(schedule)), t_min + u * (t_max - t_min), rtol=1e-6)

  t = at(times.log_normal(schedule))
  inside = (t > 1.001 * t_min) & (t < 0.999 * t_max)
  assert inside.mean() > 0.98  # VP begins at sigma / alpha = 0.0105
  log_nsr = np.log(schedule(jnp.asarray(t)).nsr)
  np.testing.assert_allclose(log_nsr[inside], (-1.2 + 1.2 * z)[inside], atol=2e-5)

  t = at(times.logit_normal(schedule, 0.5, 0.8))
  np.testing.assert_allclose(scipy.special.logit(t / t_max), 0.5 + 0.8 * z, atol=1e-5)


@pytest.mark.parametrize('law', LAWS)
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_laws_stay_in_range(schedule, law):
  """For every number a uniform generator gives, 0 among them: finite, rising, in [t_min, t_max]."""
  schedule = make(schedule)
  low, high = [0., 2.**-24, 1e-5], [1 - 1e-5, 1 - 2.**-24]
  u = np.concatenate([low, np.linspace(1e-4, 1 - 1e-4, 500), high])
  t = np.asarray(jax.jit(getattr(times, law)(schedule))(jnp.asarray(u, jnp.float32)))
  assert t.shape == u.shape and t.dtype == np.float32 and np.isfinite(t).all()
  assert (np.diff(t) >= 0).all()
  assert np.float32(schedule.t_min) <= t[0] and t[-1] <= np.float32(schedule.t_max)
  assert t[100] < t[300] < t[400]


# --- weightings -----------------------------------------------------------------------------------


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_min_snr(schedule):
  """Hang et al. 2023, sec. 3.4: the weights of x0, of noise, and (variance preserving) of v."""
  schedule = make(schedule)
  level = levels(schedule)
  snr = np.asarray((level.alpha / level.sigma)**2, float)
  low = np.minimum(snr, 5.)
  weigh = lambda p: losses.min_snr()(getattr(predictions, p)(schedule), level)
  np.testing.assert_allclose(weigh('x0'), low, rtol=1e-5)
  np.testing.assert_allclose(weigh('eps'), low / snr, rtol=1e-5)
  if np.allclose(level.alpha**2 + level.sigma**2, 1):
    np.testing.assert_allclose(weigh('v'), low / (snr + 1), rtol=1e-5)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_edm(schedule):
  """Karras et al. 2022, table 1: lambda(sigma) c_out(sigma)^2 = 1."""
  schedule = make(schedule)
  level = levels(schedule)
  for data in (0.5, 1.):
    weight = losses.edm(data)
    np.testing.assert_allclose(weight(predictions.edm(schedule, data), level), 1., rtol=2e-5)
    if schedule.t_max == 80:
      sigma = np.asarray(level.sigma, float)
      paper = (sigma**2 + data**2) / (sigma * data)**2
      np.testing.assert_allclose(weight(predictions.x0(schedule), level), paper, rtol=1e-5)


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_uniform(prediction):
  level = levels(schedules.linear())
  weight = losses.uniform()(getattr(predictions, prediction)(schedules.linear()), level)
  np.testing.assert_array_equal(weight, np.ones(9))


# --- the loss -------------------------------------------------------------------------------------


def loss_of(schedule, prediction, weight, says, x0, eps, t, dtype=jnp.float32):
  """The loss of a network that stands for the denoiser `says(x) -> x0`."""
  prediction = getattr(predictions, prediction)(schedule)
  def predict(x, level):
    assert level.t.shape == (len(t),) + (1,) * (x.ndim - 1)
    told = predictions.invert(says(x), x, level)
    return predictions.target(prediction, told.x0, told.eps, level).astype(dtype)
  return losses.diffusion_loss(predict, schedule, prediction, weight, x0, eps, t)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_a_weighting_of_x0_is_one_loss_under_any_prediction(schedule):
  """The mean over an example's values of w |x0_hat - x0|^2, whatever the network's own space."""
  schedule = make(schedule)
  t = np.asarray(levels(schedule, 4).t)
  x0, eps = np.random.default_rng(0).normal(size=(2, 4, 3, 2)).astype(np.float32)
  level = schedule(t[:, None, None])
  x = level.alpha * x0 + level.sigma * eps
  nsr = np.asarray(level.nsr)
  ours = losses.from_x0(lambda level: 1 / (1 + level.nsr))
  for weight, w in ((losses.min_snr(), np.minimum(nsr**-2, 5.)), (ours, 1 / (1 + nsr))):
    error = w * (np.tanh(x) - x0)**2
    for prediction in PREDICTIONS:
      loss = jax.jit(partial(loss_of, schedule, prediction, weight, jnp.tanh))(x0, eps, t)
      assert loss.shape == (4,) and loss.dtype == jnp.float32
      np.testing.assert_allclose(loss, error.mean((1, 2)), rtol=2e-3, err_msg=prediction)


def test_loss_of_the_truth_is_zero():
  schedule, t = schedules.linear(), jnp.array([0.1, 0.5, 1.])
  x0, eps = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
  for prediction in PREDICTIONS[2:]:
    loss = loss_of(schedule, prediction, losses.uniform(), lambda x: x0, x0, eps, t)
    np.testing.assert_allclose(loss, 0., atol=1e-9)


def test_loss_is_float32():
  """Of a bfloat16 network too: its output is widened before anything is squared."""
  schedule, t = schedules.linear(), jnp.array([0.1, 0.5, 0.9])
  x0, eps = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
  args = schedule, 'v', losses.uniform(), jnp.tanh, x0, eps, t
  loss = loss_of(*args, dtype=jnp.bfloat16)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, loss_of(*args), rtol=2e-2)


def test_best_loss_on_gaussian_data():
  """E |x0 - E[x0 | x]|^2 = var sigma^2 / (alpha^2 var + sigma^2), the least there is."""
  schedule, var, count = schedules.cosine(), 0.25, 20000
  z, eps = np.random.default_rng(0).normal(size=(2, 3, count)).astype(np.float32)
  t = jnp.array([0.1, 0.3, 0.6])
  level = schedule(t)
  gain = (level.alpha * var / (level.alpha**2 * var + level.sigma**2))[:, None]
  weight = losses.from_x0(lambda level: jnp.ones_like(level.t))
  x0 = z * var**0.5
  loss = lambda scale: loss_of(schedule, 'v', weight, lambda x: scale * gain * x, x0, eps, t)
  best = var * level.sigma**2 / (level.alpha**2 * var + level.sigma**2)
  np.testing.assert_allclose(loss(1.), best, rtol=5 * (2 / count)**0.5)
  assert (loss(1.) < loss(1.2)).all() and (loss(1.) < loss(0.8)).all()
