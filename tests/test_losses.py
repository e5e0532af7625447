"""Weightings, distances, the loss and likelihood bounds, against what their papers say of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from diffax import losses
from diffax import predictions
from diffax import schedules
from diffax import times

SCHEDULES = ('linear', 'cosine', 'vp', 've')
PREDICTIONS = ('x0', 'eps', 'v', 'velocity', 'edm')


def make(name):
  return getattr(schedules, name)()


def levels(schedule, count=9):
  return schedule(jnp.geomspace(schedule.t_min, schedule.t_max, count + 2)[1:-1])


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


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_weightings_of_the_papers(schedule):
  """Each in the space of its paper: of x0, of the noise, of v where variance is preserved."""
  schedule = make(schedule)
  level = levels(schedule)
  snr = np.asarray((level.alpha / level.sigma)**2, float)
  weigh = lambda w, p: np.asarray(w(getattr(predictions, p)(schedule), level), float)
  same = lambda w, p, wanted: np.testing.assert_allclose(weigh(w, p), wanted, rtol=2e-5)
  same(losses.snr(), 'x0', snr)
  same(losses.snr(), 'eps', 1.)  # Salimans & Ho 2022, sec. 4: SNR is the plain loss of the noise
  same(losses.truncated_snr(), 'x0', np.where(snr < 1, 1, snr))
  same(losses.truncated_snr(), 'eps', np.where(snr < 1, 1 / snr, 1))
  same(losses.snr_plus_one(), 'x0', 1 + snr)
  same(losses.p2(), 'eps', 1 / (1 + snr))
  same(losses.p2(0.5, 2.), 'eps', 1 / np.sqrt(2 + snr))
  same(losses.soft_min_snr(4.), 'x0', 4 * snr / (4 + snr))
  same(losses.sigmoid(1.), 'eps', np.e / (np.e + snr))
  same(losses.elbo(), 'x0', snr / 2)
  if np.allclose(level.alpha**2 + level.sigma**2, 1):
    same(losses.snr_plus_one(), 'v', 1.)  # and SNR + 1 the plain loss of v
    same(losses.p2(), 'v', 1 / (1 + snr)**2 * snr)


def test_effective_weight(x64):
  """What recipes amount to, by hand or by Kingma & Gao 2023, table 1, with its constants."""
  linear, cosine, vp, ve = (make(name) for name in SCHEDULES)
  normal = lambda x, mean, std: scipy.stats.norm(mean, std).pdf(x)
  recipes = dict(
      edm=(ve, times.log_normal(ve), predictions.edm(ve), losses.edm(),
           lambda lam: normal(lam, 2.4, 2.4) * (np.exp(-lam) + 0.25) / 0.25),
      flow=(linear, times.uniform(linear), predictions.velocity(linear), losses.uniform(),
            lambda lam: np.exp(-lam / 2) / 2 / 0.999),
      sd3=(linear, times.logit_normal(linear), predictions.velocity(linear), losses.uniform(),
           lambda lam: normal(lam, 0., 2.) * (1 + np.exp(-lam / 2))**2),
      cosine=(cosine, times.uniform(cosine), predictions.eps(cosine), losses.uniform(),
              lambda lam: 1 / np.cosh(lam / 2) / (2 * np.pi) / 0.999),
      ddpm=(vp, times.uniform(vp), predictions.eps(vp), losses.uniform(), None),
      sid2=(cosine, times.log_uniform(cosine, -10., 8.), predictions.v(cosine), losses.sigmoid(-3.),
            lambda lam: scipy.special.expit(-3 - lam) / 18),
      bound=(ve, times.log_uniform(ve, -8., 8.), predictions.edm(ve), losses.elbo(),
             lambda lam: np.full(len(lam), 1 / 32)))
  u = np.linspace(0.02, 0.98, 13)
  found = jax.jit(lambda u: {
      name: losses.effective_weight(*recipe[:4], u) for name, recipe in recipes.items()})(u)
  for name, (lam, weight) in found.items():
    lam, wanted = np.asarray(lam), recipes[name][-1]
    assert (np.diff(lam) < 0).all()
    if name == 'ddpm':  # -d(log SNR)/dt = beta / sigma^2, where sigma^2 = sigmoid(-log SNR)
      wanted = scipy.special.expit(-lam) / (0.1 + 19.9 * (0.001 + 0.999 * u)) / 0.999
    else:
      wanted = wanted(lam)
    np.testing.assert_allclose(weight, wanted, rtol=1e-6, err_msg=name)


def test_uncertainty(x64):
  """Linear in features of which no two are alike; at u = log E[loss] the loss has its minimum."""
  learned = losses.uncertainty(16)
  schedule = schedules.ve()
  level = schedule(jnp.geomspace(0.01, 50., 5)[:, None, None])
  params = learned.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  each = jnp.exp(jnp.asarray(rng.normal(size=5)))
  np.testing.assert_allclose(learned.bind(params)(each, level), each, rtol=1e-6)  # begins as it was

  end = learned.bind({'weight': jnp.ones(16)})(each[:1], schedules.linear()(jnp.ones((1, 1))))
  assert np.isfinite(end).all()  # where log(sigma / alpha) is not

  total = lambda weight: learned.bind({'weight': weight})(each, level).sum()
  u = lambda weight: learned.bind({'weight': weight})(jnp.zeros(5), level)
  features = np.asarray(jax.jacobian(u)(jnp.zeros(16)))
  assert np.linalg.matrix_rank(features) == 5
  np.testing.assert_allclose((features**2).sum(1), 1., atol=0.7)
  best = np.linalg.lstsq(features, np.log(each))[0]
  np.testing.assert_allclose(jax.grad(total)(jnp.asarray(best)), 0., atol=1e-6)
  np.testing.assert_allclose(total(jnp.asarray(best)), (1 + np.log(each)).sum(), rtol=1e-6)
  for change in rng.normal(size=(5, 16)) * 0.1:
    assert total(jnp.asarray(best + change)) > total(jnp.asarray(best))


# --- distances ------------------------------------------------------------------------------------


def mean_cost(distance, error):
  cost = distance(error)
  assert cost.ndim == error.ndim
  return np.asarray(jnp.broadcast_to(cost, error.shape).mean(tuple(range(1, error.ndim))))


def test_huber():
  """The square's half and the absolute value at the same height and slope where they meet."""
  error = jnp.array([[-3., 0.5], [1., -1.]])
  np.testing.assert_allclose(losses.huber()(error), [[2.5, 0.125], [0.5, 0.5]])
  np.testing.assert_allclose(losses.huber(2.)(error)[0, 0], 2 * (3 - 1))
  slope = jax.vmap(jax.grad(losses.huber()))(jnp.array([-3., -1., -0.5, 0., 0.999, 1.001, 9.]))
  np.testing.assert_allclose(slope, [-1., -1., -0.5, 0., 0.999, 1., 1.], atol=1e-6)


def test_pseudo_huber():
  """Quadratic for errors far below C = c sqrt(d), the norm less C far above; C itself known."""
  direction = np.random.default_rng(0).normal(size=(4, 4, 4, 3)).astype(np.float32)
  direction /= np.sqrt((direction**2).sum((1, 2, 3), keepdims=True))
  c = 0.00054 * np.sqrt(48)
  size = np.array([1e-6, 1e-4, c * np.sqrt(3), 100.])
  cost = mean_cost(losses.pseudo_huber(), direction * size[:, None, None, None])
  np.testing.assert_allclose(cost, [1e-12 / 2 / c, 1e-8 / 2 / c, c, 100 - c], rtol=1e-3)
  flat = jax.grad(lambda e: losses.pseudo_huber()(e).sum())(jnp.zeros((1, 2, 2, 1)))
  np.testing.assert_array_equal(flat, 0.)
  with pytest.raises(ValueError, match='c=0'):
    losses.pseudo_huber(0)


def test_multiscale():
  """A flat error counts at every scale, over its size; a checkerboard's at the finest alone."""
  distance = losses.multiscale(4)
  flat, board = np.full((2, 16, 16, 3), 2.), np.indices((16, 16)).sum(0) % 2 * 2. - 1
  np.testing.assert_allclose(mean_cost(distance, jnp.asarray(flat)), 4 * (1/16 + 1/8 + 1/4))
  np.testing.assert_allclose(mean_cost(distance, jnp.asarray(board)[None, ..., None]), 1 / 16)
  blocks = np.kron(board[:8, :8], np.ones((2, 2)))
  np.testing.assert_allclose(
      mean_cost(distance, jnp.asarray(blocks)[None, ..., None]), 1 / 16 + 1 / 8)
  with pytest.raises(ValueError, match='images'):
    distance(jnp.zeros((2, 5)))


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


def test_a_distance_in_place_of_the_square():
  """The weight multiplies it: the square is the default, Huber half of it for small errors."""
  schedule = schedules.linear()
  x0, eps = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
  t, prediction = jnp.array([0.1, 0.5, 0.9]), predictions.v(schedule)
  predict = lambda x, level: 0.01 * x + predictions.target(prediction, x0, eps, level)
  loss = lambda *distance: losses.diffusion_loss(
      predict, schedule, prediction, losses.min_snr(), x0, eps, t, *distance)
  np.testing.assert_array_equal(loss(), loss(losses.squared()))
  np.testing.assert_allclose(loss(), 2 * loss(losses.huber()), rtol=1e-6)


# --- bounds on the likelihood ---------------------------------------------------------------------


STD = 0.6  # of Gaussian data whose denoiser is known


def corners(count):
  """x0 and eps [count 4] whose second moments are those of the data and of unit noise, exactly."""
  x0, eps = np.array([[1, 1, -1, -1], [1, -1, 1, -1]]) * np.array([[STD], [1.]])
  return np.tile(x0, (count, 1)), np.tile(eps, (count, 1))


def gaussian_x0(x, level):
  return level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2) * x


def mmse(level):
  return STD**2 * level.sigma**2 / (level.alpha**2 * STD**2 + level.sigma**2)


@pytest.mark.parametrize('name, law', [
    ('linear', 'uniform'), ('cosine', 'uniform'), ('vp', 'uniform'), ('linear', 'mode'),
    ('cosine', 'log_uniform'), ('ve', 'log_uniform'), ('ve', 'log_logistic')])
def test_continuous_bound(name, law, x64):
  """On Gaussian data log((1 + SNR std^2) at one end / at the other) / 2, by whatever law of t.

  That is the integral of std^2 / (1 + SNR std^2) / 2 over the SNR. An importance law over it too.
  """
  schedule, count = make(name), 20000
  prediction = predictions.v(schedule)
  wide = {'scale': 1.} if law == 'log_logistic' else {}  # for the even grid of u below
  quantile = getattr(times, law)(schedule, **wide)
  state = times.importance_init(10, 1)._replace(
      history=jnp.linspace(2., 0.5, 10)[:, None], count=jnp.ones(10, jnp.int32))
  place = times.importance_law(state)
  x0, eps = corners(count)

  def bound(law, u):
    def predict(x, level):
      said = predictions.invert(gaussian_x0(x, level), x, level)
      return predictions.target(prediction, said.x0, said.eps, level)
    return losses.diffusion_loss(
        predict, schedule, prediction, losses.vlb(schedule, law)(u), x0, eps, law(u)).mean()

  u = (jnp.arange(count) + 0.5) / count
  drawn = lambda u: quantile(place(u)[0])
  ends = schedule(quantile(jnp.array([0., 1.])))
  high, low = np.asarray((ends.alpha / ends.sigma)**2)
  exact = np.log((1 + high * STD**2) / (1 + low * STD**2)) / 2
  for value in jax.jit(lambda u: (bound(quantile, u), bound(drawn, u)))(u):
    np.testing.assert_allclose(value, exact, rtol=1e-4)


def test_a_bound_refuses_laws_without_a_density():
  """Tails cut off at the ends, levels left out, an importance law over such a one."""
  linear, ve = schedules.linear(), schedules.ve()
  state = times.importance_init()
  over = lambda law: lambda u: law(times.importance_law(state)(u)[0])
  for schedule, law in (
      (linear, times.log_normal(linear)), (linear, times.logit_normal(linear)),
      (ve, times.log_normal(ve)), (ve, times.log_uniform(ve, -3., 3.)),
      (linear, times.shifted(linear, times.uniform(linear), 3.)),
      (linear, over(times.logit_normal(linear)))):
    with pytest.raises(ValueError, match='density of t'):
      losses.vlb(schedule, law)
  for schedule, law in (
      (linear, times.uniform(linear)), (linear, times.log_uniform(linear)),
      (linear, times.cosmap(linear)), (ve, times.log_logistic(ve)),
      (linear, over(times.uniform(linear)))):
    losses.vlb(schedule, law)


def test_normal_kl(x64):
  """The integral of p log(p / q)."""
  x = np.linspace(-60., 60., 200001)
  for mean, std, other, wide in ((0., 1., 0., 1.), (0.3, 0.5, -1., 2.), (-1., 1.5, 0.5, 0.7)):
    p, q = scipy.stats.norm(mean, std), scipy.stats.norm(other, wide)
    exact = np.trapezoid(p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), x)
    found = losses.normal_kl(mean, 2 * np.log(std), other, 2 * np.log(wide))
    np.testing.assert_allclose(found, exact, atol=1e-8)


@pytest.mark.parametrize('std', [1e-5, 1e-3, 0.02, 1., 30.])
def test_discretized_likelihood(std):
  """The 256 bins sum to one; each is a difference of distribution functions; gradients finite."""
  bins = np.linspace(-1., 1., 256)
  mean = np.array([-7., -1.001, -0.31, 0.004, 0.9, 1.])
  arguments = np.broadcast_arrays(bins[None], mean[:, None], np.log(std))
  found = losses.discretized_log_likelihood(*(a.astype(np.float32) for a in arguments))
  # in float32 an edge of a bin lies 6e-8 off, which the narrowest feels
  off = 6e-8 / std + 3e-4 * (std > 1)
  np.testing.assert_allclose(np.exp(np.asarray(found, float)).sum(1), 1., atol=1e-4 + off)
  grads = jax.grad(lambda m, s: losses.discretized_log_likelihood(
      jnp.asarray(arguments[0], jnp.float32), m, s).sum(), (0, 1))(
          *(jnp.asarray(a, jnp.float32) for a in arguments[1:]))
  assert all(np.isfinite(g).all() for g in grads)

  rough = jnp.asarray(bins, jnp.bfloat16)  # whose digits are too few for the edges of a bin
  np.testing.assert_array_equal(*(
      losses.discretized_log_likelihood(x0, 0., np.log(std))
      for x0 in (rough, rough.astype(jnp.float32))))

  edges = np.concatenate([[-np.inf], (bins[1:] + bins[:-1]) / 2, [np.inf]])
  with jax.enable_x64(True):
    exact = losses.discretized_log_likelihood(*map(jnp.asarray, arguments))
  cdf = scipy.stats.norm(mean[:, None], std).cdf(edges[None])
  np.testing.assert_allclose(np.exp(exact), np.diff(cdf, axis=1), atol=1e-12)


def test_posterior_is_that_of_ddpm(x64):
  """Ho et al. 2020, eq. 7, in its own symbols, and beta at the other end of the learned range."""
  betas = np.linspace(1e-4, 0.02, 1000)
  bars = np.cumprod(1 - betas)
  at = lambda i: schedules.Level(i / 1000, np.sqrt(bars[i - 1]), np.sqrt(1 - bars[i - 1]))
  for i in (2, 500, 1000):
    beta, bar, before = betas[i - 1], bars[i - 1], bars[i - 2]
    mean, logvar = losses.posterior(0.7, -0.2, at(i), at(i - 1))
    paper = (np.sqrt(before) * beta * 0.7 - np.sqrt(1 - beta) * (1 - before) * 0.2) / (1 - bar)
    np.testing.assert_allclose(mean, paper, rtol=1e-10)
    np.testing.assert_allclose(np.exp(logvar), (1 - before) / (1 - bar) * beta, rtol=1e-9)
    np.testing.assert_allclose(
        np.exp(losses.posterior(0.7, -0.2, at(i), at(i - 1), 1.)[1]), beta, rtol=1e-9)


def gaussian_terms(schedule, ts, fraction=None, bins=256):
  """vlb_term of each step of the grid `ts` [n+1] under the exact denoiser, [n]."""
  x0, eps = corners(len(ts) - 1)
  t, s = schedule(ts[:-1, None]), schedule(ts[1:, None])
  x = t.alpha * x0 + t.sigma * eps
  said = predictions.invert(gaussian_x0(x, t), x, t)
  return losses.vlb_term(said._replace(fraction=fraction), x0, x, t, s, bins), t, s


@pytest.mark.parametrize('name', SCHEDULES)
def test_discrete_bound(name, x64):
  """A term is (SNR_s - SNR_t) / 2 times the squared error; many sum to the continuous bound."""
  schedule = make(name)
  ts = schedules.inverse(schedule, jnp.linspace(-2., 3., 2001))
  terms, t, s = jax.jit(lambda ts: gaussian_terms(schedule, ts))(ts)
  snr = lambda level: np.asarray((level.alpha / level.sigma)**2)[:, 0]
  np.testing.assert_allclose(terms, (snr(s) - snr(t)) / 2 * mmse(t)[:, 0], rtol=1e-6)
  exact = np.log((1 + np.exp(6.) * STD**2) / (1 + np.exp(-4.) * STD**2)) / 2
  np.testing.assert_allclose(terms.sum(), exact, rtol=3e-3)


def best_fraction(t, s):
  """Where the variance is the posterior's and what the mean does not know; t, s: levels [n 1]."""
  low, high = (np.asarray(losses.posterior(0., 0., t, s, v)[1]) for v in (0., 1.))
  unknown = (1 - (t.alpha * s.sigma / (t.sigma * s.alpha))**2)**2 * s.alpha**2 * mmse(t)
  return (np.log(np.exp(low) + unknown) - low) / (high - low)


def test_best_variance(x64):
  """There the bound is least in the fraction, at every step."""
  schedule, ts = schedules.cosine(), jnp.array([1., 0.7, 0.4, 0.2])
  gradient = jax.jit(jax.grad(lambda fraction: gaussian_terms(schedule, ts, fraction)[0].sum()))
  best = best_fraction(schedule(ts[:-1, None]), schedule(ts[1:, None]))
  np.testing.assert_allclose(gradient(best), 0., atol=1e-10)
  assert (gradient(best + 0.1) > 0).all() and (gradient(best - 0.1) < 0).all()


def test_whole_bound(x64):
  """With the best variances few steps reach the entropy of Gaussian data, for they leave no gap.

  In bins of 2 / 4095, of which the last step's deviation of 0.01 spans many.
  """
  schedule = schedules.cosine()
  ts = jnp.append(jnp.array([1., 0.6, 0.3]), jnp.array([2 / np.pi * np.arcsin(0.01), 0.]))
  best = np.zeros((4, 1))  # of the last step, from which no variance is learned, any
  best[:3] = best_fraction(schedule(ts[:-2, None]), schedule(ts[1:-1, None]))
  terms, _, _ = gaussian_terms(schedule, ts, best, bins=4096)
  x0, _ = corners(1)
  total = terms.sum() + losses.prior_term(x0, schedule(ts[:1, None]))[0]
  entropy = np.log(2 * np.pi * np.e * STD**2) / 2 - np.log(2 / 4095)
  np.testing.assert_allclose(total, entropy, atol=1e-4)
  fixed, _, _ = gaussian_terms(schedule, ts, np.zeros((4, 1)), bins=4096)
  assert fixed.sum() > total + 0.1


def test_prior_term():
  """KL(N(alpha x0, sigma^2) || N(0, sigma^2)) = SNR x0^2 / 2: 0 where no data is left."""
  x0 = np.array([[1., -0.5], [2., 0.]], np.float32)
  square = (x0**2).mean(1)
  ve, linear = schedules.ve(), schedules.linear()
  np.testing.assert_allclose(losses.prior_term(x0, ve(80.)), square / 2 / 6400, rtol=1e-5)
  np.testing.assert_array_equal(losses.prior_term(x0, linear(1.)), 0.)


def test_hybrid():
  """The plain loss trains the mean alone and the bound the variance alone; Nichol & Dhariwal."""
  schedule = schedules.cosine()
  plain = predictions.eps(schedule)
  both = predictions.learned_range(schedule, plain)
  x0, eps = np.random.default_rng(0).uniform(-1, 1, size=(2, 5, 6)).astype(np.float32)
  x0 = np.round((x0 + 1) * 127.5) / 127.5 - 1
  t = jnp.array([2e-3, 0.01, 0.3, 0.6, 0.99])  # the first is within a step of the data
  out = jnp.asarray(np.random.default_rng(1).normal(size=(5, 12)).astype(np.float32)) * 0.1

  def loss(out, prediction, steps=250, x0=x0):
    predict = lambda x, level: out
    return losses.diffusion_loss(
        predict, schedule, prediction, losses.uniform(), x0, eps, t, steps=steps)

  total = jax.jit(jax.value_and_grad(lambda out: loss(out, both).sum()))
  value, gradient = total(out)
  alone, wanted = jax.value_and_grad(lambda out: loss(out, plain).sum())(out[:, :6])
  np.testing.assert_allclose(gradient[:, :6], wanted, rtol=1e-5, atol=1e-7)
  assert np.isfinite(gradient).all() and (np.abs(gradient[1:, 6:]) > 0).all()

  rough = jax.grad(lambda out: loss(out, both, x0=jnp.asarray(x0, jnp.bfloat16)).sum())
  assert np.isfinite(rough(out.astype(jnp.bfloat16))).all()

  level = schedule(t[:, None])
  x = level.alpha * x0 + level.sigma * eps
  before = schedule(jnp.array([0., 0.006, 0.296, 0.596, 0.986])[:, None])
  said = predictions.solve(both, out, x, level)
  added = 0.001 * 250 * losses.vlb_term(said, x0, x, level, before)
  np.testing.assert_allclose(value - alone, added.sum(), rtol=1e-3)
