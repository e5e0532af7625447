"""Likelihoods against the densities of Gaussians and mixtures; traces against matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import gaussians
from diffax import grids
from diffax import likelihood
from diffax import predictions
from diffax import samplers
from diffax import schedules

X = gaussians.quantiles(7, 1.5)
EXACT, SKETCH = likelihood.exact(), likelihood.hutch_pp(4)


def denoiser(data):
  """`gaussians.denoise` at a level an example."""
  def denoise(x, level):
    column = lambda a: jnp.broadcast_to(a, (x.shape[0], 1))[:, 0]
    one = lambda x, *level: gaussians.denoise(data, x[None], schedules.Level(*level))[0]
    return jax.vmap(one)(x, *map(column, level))
  return denoise


def log_density(data, x, blur):
  """log p(x) of the data with noise of standard deviation `blur`."""
  y = (np.asarray(x, float) @ data.axes)[..., None]
  var = data.var + blur**2
  parts = np.log(data.weight) - (y - data.mean)**2 / var / 2 - np.log(2 * np.pi * var) / 2
  return scipy.special.logsumexp(parts, axis=-1).sum(-1)


def keys_of(count):
  return samplers.sample_keys(0, np.arange(count))


# --- traces ---------------------------------------------------------------------------------------


def matrices(rank=None, size=12, batch=3):
  rng = np.random.default_rng(0)
  a = rng.normal(size=(batch, size, rank or size))
  b = rng.normal(size=(batch, rank or size, size))
  return jnp.asarray(a @ b / size, jnp.float32)


def curved(matrix):
  """x -> tanh(A x) for x [b 3 4], whose Jacobian is diag(1 - tanh^2) A."""
  def f(x):
    flat = x.reshape(x.shape[0], -1)
    return jnp.tanh(jnp.einsum('bij,bj->bi', matrix, flat)).reshape(x.shape)
  return f


def jacobian(matrix, x):
  steep = 1 - np.asarray(curved(matrix)(x)).reshape(x.shape[0], -1)**2
  return steep[..., None] * np.asarray(matrix)


@functools.partial(jax.jit, static_argnums=0)
def run(trace, matrix, x, keys):
  return trace(curved(matrix), x, keys)


INPUT = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 4)), jnp.float32)


@pytest.mark.parametrize('trace', [EXACT, likelihood.hutchinson(4), SKETCH])
def test_a_trace_says_what_the_function_says(trace):
  said, estimates = run(trace, matrices(), INPUT, keys_of(3))
  np.testing.assert_allclose(said, curved(matrices())(INPUT), rtol=1e-5, atol=1e-6)
  assert estimates.shape[0] == 3


def test_exact_trace():
  _, found = run(EXACT, matrices(), INPUT, keys_of(3))
  expected = np.trace(jacobian(matrices(), INPUT), axis1=1, axis2=2)
  np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_hutchinson_is_unbiased_and_as_wide_as_it_should_be():
  """Of probes of signs the variance is 2 sum_{i != j} of the symmetric part squared."""
  probes = 4000
  _, found = run(likelihood.hutchinson(probes), matrices(), INPUT, keys_of(3))
  assert found.shape == (3, probes)
  mean, error = likelihood.mean_and_error(found, axis=1)
  full = jacobian(matrices(), INPUT)
  assert (np.abs(mean - np.trace(full, axis1=1, axis2=2)) < 4 * error).all()
  symmetric = (full + full.swapaxes(1, 2)) / 2
  off = symmetric * (1 - np.eye(12))
  np.testing.assert_allclose(error, np.sqrt(2 * (off**2).sum((1, 2)) / probes), rtol=0.08)


@pytest.mark.parametrize('rank', [1, 4, 0])
def test_hutch_pp_is_exact_where_the_rank_is_no_more_than_its_probes(rank):
  matrix = matrices(rank) if rank else jnp.zeros((3, 12, 12))
  _, found = run(SKETCH, matrix, INPUT, keys_of(3))
  expected = np.trace(jacobian(matrix, INPUT), axis1=1, axis2=2)
  np.testing.assert_allclose(found, np.repeat(expected[:, None], 4, 1), atol=2e-5)


@pytest.mark.parametrize('probes', [4, 20])
def test_hutch_pp_is_exact_on_multiples_of_one(probes):
  """As a denoiser's Jacobian is where there is little noise; also with more probes than values."""
  trace = likelihood.hutch_pp(probes)
  _, found = run(trace, 0.7 * jnp.eye(12)[None] * jnp.ones((3, 1, 1)), 0. * INPUT, keys_of(3))
  np.testing.assert_allclose(found, 12 * 0.7, rtol=1e-5)


def test_hutch_pp_is_unbiased_and_narrower():
  """On a spectrum that falls, with the same number of derivatives."""
  rng = np.random.default_rng(0)
  axes = np.linalg.qr(rng.normal(size=(12, 12)))[0]
  matrix = jnp.asarray([axes @ np.diag(4.**-np.arange(12.)) @ axes.T] * 400, jnp.float32)
  f = lambda x: jnp.einsum('bij,bj->bi', matrix, x)
  x = jnp.zeros((400, 12))
  def estimate(trace):
    run = jax.jit(lambda keys: trace(f, x, keys)[1].mean(1))
    return np.asarray(run(keys_of(400)), float)
  found, plain = estimate(likelihood.hutch_pp(2)), estimate(likelihood.hutchinson(6))
  truth = (4.**-np.arange(12.)).sum()
  assert abs(found.mean() - truth) < 4 * found.std() / 20
  assert abs(plain.mean() - truth) < 4 * plain.std() / 20
  assert found.std() < plain.std() / 3


@pytest.mark.parametrize('trace', [likelihood.hutchinson(4), SKETCH])
def test_an_examples_probes_are_its_own(trace):
  matrix = matrices()
  _, together = run(trace, matrix, INPUT, keys_of(3))
  _, alone = run(trace, matrix[2:], INPUT[2:], keys_of(3)[2:])
  np.testing.assert_allclose(together[2:], alone, rtol=1e-4, atol=1e-5)


# --- the probability flow -------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def along(name, kind, ts, x, trace):
  schedule, data = make(name), getattr(gaussians, kind)()
  return likelihood.ode_log_likelihood(denoiser(data), schedule, x, ts, keys_of(x.shape[0]), trace)


def make(name):
  return schedules.ve(0.02, 500.) if name == 've' else getattr(schedules, name)(t_min=0.02)


def expected(name, kind):
  schedule = make(name)
  return log_density(getattr(gaussians, kind)(), X, float(schedule(schedule.t_min).nsr))


def padded(ts, length):
  """The grid with steps of no length before it, so that one program takes all."""
  return jnp.concatenate([jnp.full(length - len(ts), ts[0]), ts])


@pytest.mark.parametrize('kind', ['gaussian', 'mixture'])
def test_exact_likelihood_and_its_order(kind, x64):
  """To 1e-4 nats of the density of p_{t_min}; halving the steps divides the error by 2^5."""
  errors = []
  for steps in (8, 16, 32, 64):
    ts = padded(grids.uniform(make('cosine'), steps), 65)
    found = along('cosine', kind, ts, jnp.asarray(X), EXACT)
    assert found.shape == (7, 1)
    errors.append(np.abs(found[:, 0] - expected('cosine', kind)).max())
  assert errors[-1] < 1e-4
  orders = -np.diff(np.log2(errors))
  assert orders[-1] > 4.5, errors


@pytest.mark.parametrize('name, tolerance', [('linear', 1e-4), ('vp', 0.02), ('ve', 3e-3)])
def test_every_schedule_says_the_same(name, tolerance):
  """In float32. vp and ve keep a trace of the data at t_max, which the prior leaves out."""
  ts = grids.log_snr(make(name), 40)
  found = along(name, 'mixture', ts, jnp.asarray(X, jnp.float32), EXACT)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found[:, 0], expected(name, 'mixture'), rtol=1e-5, atol=tolerance)


def test_error_of_hutchinsons_likelihood_covers():
  """Each column is the likelihood by one probe: their mean is the exact one, within its error."""
  schedule, x = make('cosine'), jnp.asarray(np.random.default_rng(0).normal(size=(24, 2)) / 2)
  x = x.astype(jnp.float32)
  ts = grids.uniform(schedule, 24)
  exact = along('cosine', 'gaussian', ts, x, EXACT)[:, 0]
  found = along('cosine', 'gaussian', ts, x, likelihood.hutchinson(64))
  assert found.shape == (24, 64)
  mean, error = likelihood.mean_and_error(found, axis=1)
  z = (mean - exact) / error
  assert np.abs(z).max() < 4 and 0.6 < np.sqrt((z**2).mean()) < 1.5


def test_adaptive_likelihood_meets_its_tolerance(x64):
  schedule = make('cosine')
  errors = []
  for tolerance in (1e-4, 1e-7):
    run = jax.jit(lambda x, tolerance=tolerance: likelihood.adaptive_log_likelihood(
        denoiser(gaussians.mixture()), schedule, x, keys_of(7), likelihood.exact(),
        rtol=tolerance, atol=tolerance))
    errors.append(np.abs(run(jnp.asarray(X))[:, 0] - expected('cosine', 'mixture')).max())
    assert errors[-1] < 30 * tolerance
  assert errors[1] < errors[0] / 30


def test_a_stiff_example_changes_no_other():
  """Gaussian data of a width an example; the narrow one is stiff, and alone with it."""
  schedule = schedules.linear(t_min=1e-3)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)

  @functools.partial(jax.jit, static_argnums=1)
  def run(width, max_steps=300):
    var = width[:, None]**2
    def denoise(x, level):
      return level.alpha * var / (level.alpha**2 * var + level.sigma**2) * x
    return likelihood.adaptive_log_likelihood(
        denoise, schedule, x * width[:, None], keys_of(4), likelihood.exact(),
        rtol=1e-4, atol=1e-4, max_steps=max_steps)[:, 0]

  wide, narrow = jnp.array([0.5, 1., 0.8, 2.]), jnp.array([0.5, 0.002, 0.8, 2.])
  calm, stiff = run(wide), run(narrow)
  np.testing.assert_array_equal(calm[np.array([0, 2, 3])], stiff[np.array([0, 2, 3])])
  for found, width in ((calm, wide), (stiff, narrow)):
    blurred = np.sqrt(np.asarray(width)**2 + (1e-3 / (1 - 1e-3))**2)[:, None]
    z = x * width[:, None] / blurred
    truth = (-z**2 / 2 - np.log(blurred) - np.log(2 * np.pi) / 2).sum(1)
    np.testing.assert_allclose(found, truth, atol=5e-3)
  short = run(narrow, 12)
  assert np.isnan(short[1]) and np.isfinite(short[np.array([0, 2, 3])]).all()


@pytest.mark.parametrize('trace', [likelihood.hutchinson(2), likelihood.hutch_pp(2)])
def test_likelihood_of_images_and_a_low_dtype(trace):
  """[b h w c] in bfloat16: the network sees bfloat16, the flow stays in float32."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 2, 1)), jnp.bfloat16)
  schedule, seen = schedules.cosine(), []
  def denoise(x, level):
    seen.append((x.dtype, level.alpha.shape))
    return (level.alpha * x).astype(x.dtype)  # of unit Gaussian data
  run = jax.jit(lambda: likelihood.ode_log_likelihood(
      denoise, schedule, x, grids.uniform(schedule, 4), keys_of(2), trace))
  found = run()
  assert {d for d, _ in seen} == {jnp.dtype('bfloat16')} and {s for _, s in seen} == {(2, 1, 1, 1)}
  assert found.dtype == jnp.float32
  flat = np.asarray(x, float).reshape(2, 4)
  truth = (-flat**2 / 2 - np.log(2 * np.pi) / 2).sum(1)
  np.testing.assert_allclose(found, np.stack([truth] * 2, 1), atol=0.1)


# --- bounds ---------------------------------------------------------------------------------------


C = 0.5  # the data's standard deviation
COSINE = schedules.cosine(t_min=0.01)
EXAMPLES = 64


def gaussian_data():
  return C * jax.random.normal(jax.random.key(5), (EXAMPLES, 64))


def mse(level):
  """Of the best denoiser, a value."""
  return C**2 * level.sigma**2 / ((level.alpha * C)**2 + level.sigma**2)


def wiener(x, level):
  return level.alpha * C**2 / ((level.alpha * C)**2 + level.sigma**2) * x


def gap(bound, x0):
  """Mean and standard error of the bound less the exact -log p(x0), in nats a value."""
  nats = (x0**2 / C**2 / 2 + np.log(2 * np.pi * C**2) / 2).sum(1)
  return [float(v) / 64 for v in likelihood.mean_and_error(bound.total - nats)]


@functools.partial(jax.jit, static_argnums=(0, 2))
def discrete(denoise, ts, decoder):
  return likelihood.variational_bound(
      denoise, COSINE, gaussian_data(), ts, keys_of(EXAMPLES), decoder)


def test_gap_of_the_discrete_bound_closes_as_one_over_its_steps():
  """At a step h of lambda each term is the left end of an integral that falls: the gap is h / 2
  int -mse' d(SNR), which is h / 2 (log(1 + Q) - Q / (1 + Q)), Q = c^2 SNR at t_min."""
  gaps = []
  decoder = likelihood.gaussian()
  for steps in (65, 129):
    value, error = gap(discrete(wiener, grids.log_snr(COSINE, steps), decoder), gaussian_data())
    assert value > 4 * error
    gaps.append(value)
  level = COSINE(COSINE.t_min)
  q = C**2 / level.nsr**2
  h = (level.lam - grids.LAM_NOISE) / 128
  limit = h / 2 * (np.log1p(q) - q / (1 + q))
  np.testing.assert_allclose(gaps[1], limit, rtol=0.1)
  np.testing.assert_allclose(gaps[1] / gaps[0], 0.5, atol=0.06)


def test_bound_is_the_likelihood_where_the_reverse_is_exact():
  """A few steps are enough where each has the variance of p(x_s | x_t), learned as a fraction."""
  ts = grids.log_snr(COSINE, 7)
  t, s = COSINE(ts[:-1]), COSINE(ts[1:])
  kept = (t.alpha * s.sigma / (s.alpha * t.sigma))**2
  beta = t.sigma**2 * (1 - kept)
  tilde = beta * (s.sigma / t.sigma)**2
  var = tilde + (s.alpha * (1 - kept))**2 * mse(t)
  fractions = (jnp.log(var / tilde) / jnp.log(beta / tilde)).at[-1].set(0.)

  def denoise(x, level):
    fraction = fractions[jnp.argmin(jnp.abs(level.t - ts[:-1]))]
    x0 = wiener(x, level)
    return predictions.invert(x0, x, level)._replace(fraction=fraction * jnp.ones_like(x))

  value, error = gap(discrete(denoise, ts, likelihood.gaussian()), gaussian_data())
  assert abs(value) < 4 * error + 1e-4 and error < 0.02
  value, error = gap(discrete(wiener, ts, likelihood.gaussian()), gaussian_data())
  assert value > 1


def test_continuous_bound_is_the_likelihood_of_gaussian_data():
  run = jax.jit(lambda: likelihood.continuous_bound(
      wiener, COSINE, gaussian_data(), keys_of(EXAMPLES), likelihood.gaussian(), 64))
  bound = run()
  value, error = gap(bound, gaussian_data())
  assert abs(value) < 4 * error + 1e-3 and error < 0.02
  level = COSINE(COSINE.t_min)  # the information in x_{t_min}, of a Gaussian channel
  np.testing.assert_allclose(bound.diffusion.mean() / 64, np.log1p(C**2 / level.nsr**2) / 2,
                             rtol=0.02)
  np.testing.assert_allclose(bound.prior, 0., atol=1e-6)


def test_a_worse_denoiser_has_a_worse_bound():
  """By 1/2 SNR |offset|^2 where x0 is told that much off, whatever the grid: the sum telescopes."""
  x0 = gaussian_data()
  offset = 0.003
  truth = lambda x, level: x0 + offset
  level = COSINE(COSINE.t_min)
  for steps in (3, 10):
    bound = discrete(truth, grids.uniform(schedules.truncate(COSINE, 0.01, 1.), steps),
                     likelihood.gaussian())
    last = COSINE(1. / steps)
    np.testing.assert_allclose(bound.diffusion, 64 * offset**2 / last.nsr**2 / 2, rtol=1e-2)
  run = jax.jit(lambda: likelihood.continuous_bound(
      truth, COSINE, x0, keys_of(EXAMPLES), likelihood.gaussian(), 64))
  diffusion = run().diffusion
  np.testing.assert_allclose(diffusion.mean(), 64 * offset**2 / level.nsr**2 / 2, rtol=0.02)


@pytest.mark.parametrize('t_min, nats', [
  (5e-4, 0.), (0.1, np.log(2 * np.pi * np.sin(0.05 * np.pi)**2) / 2 - np.log(2 / 255))])
def test_bound_of_8_bit_data(t_min, nats):
  """Told x0 itself, at sigma of a fifth of half a bin nothing is lost; of many bins, all but the
  outermost cost the Gaussian's density times a bin's width."""
  x0 = jnp.array([[0., 100., 128., 200., 255.]] * 2) / 127.5 - 1
  schedule = schedules.cosine(t_min=t_min)

  @jax.jit
  def run(x0):
    return likelihood.variational_bound(
        lambda x, level: x0, schedule, x0, grids.log_snr(schedule, 4), keys_of(2),
        likelihood.eight_bit())

  bound = run(x0[:, 1:4])
  np.testing.assert_allclose(bound.diffusion, 0., atol=1e-3)
  np.testing.assert_allclose(bound.decoder, 3 * nats, atol=3e-3)
  np.testing.assert_allclose(bound.total, 3 * nats, atol=3e-3)


# --- as papers report it --------------------------------------------------------------------------


def test_uniform_8_bit_data_has_8_bits():
  images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3)), jnp.uint8)
  x, log_volume = likelihood.dequantise(images, keys_of(3))
  assert x.dtype == jnp.float32 and np.abs(x).max() <= 1 + 1 / 255
  log_density = -48 * np.log(2 + 2 / 255)  # of all x that can be
  bits = likelihood.bits_per_dim(-(log_density + log_volume), x)
  np.testing.assert_allclose(bits, [8.] * 3, rtol=1e-6)


def test_dequantisation_is_uniform_in_each_bin():
  images = jnp.full((50, 8, 8, 1), 77, jnp.uint8)
  x, log_volume = likelihood.dequantise(images, keys_of(50))
  noise = (np.asarray(x, float) + 1) * 127.5 - 77
  assert np.abs(noise).max() < 0.5001
  np.testing.assert_allclose([noise.mean(), noise.var()], [0., 1 / 12], atol=0.01)
  assert len(np.unique(noise[:, 0, 0, 0])) == 50
  alone, _ = likelihood.dequantise(images[7:8], keys_of(50)[7:8])
  np.testing.assert_array_equal(alone[0], x[7])
  # dx = dy / 127.5 in each of 64 values
  np.testing.assert_allclose(log_volume, np.log(1 / 127.5) * 64, rtol=1e-6)


def test_mean_and_error():
  mean, error = likelihood.mean_and_error(jnp.array([[1., 5.], [3., 5.], [5., 5.], [7., 5.]]))
  np.testing.assert_allclose(mean, [4., 5.])
  np.testing.assert_allclose(error, [np.sqrt(20 / 3) / 2, 0.], rtol=1e-6)


def test_refused():
  with pytest.raises(ValueError, match='float32'):
    likelihood.dequantise(jnp.zeros((2, 3)), keys_of(2))
  with pytest.raises(ValueError, match='1 value along axis 1'):
    likelihood.mean_and_error(jnp.zeros((5, 1)), axis=1)
