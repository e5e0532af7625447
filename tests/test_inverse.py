"""Inverse problems on Gaussian data, where the posterior of x0 given y is a Gaussian known in full.

For x0 ~ N(0, s^2) and y = A x0 + n, n ~ N(0, o^2), it has covariance (1 / s^2 + A^T A / o^2)^-1 and
mean that times A^T y / o^2; given x_t = x too, x / sigma^2 is one measurement more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from diffax import grids
from diffax import inverse
from diffax import noises
from diffax import predictions
from diffax import samplers
from diffax import schedules

RANDOM = np.random.default_rng(0)
STD = 0.7


def gaussian(x, level, std=STD):
  """E[x0 | x_t = x] for x0 ~ N(0, std^2)."""
  return level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2) * x


def draw(*shape):
  return jnp.asarray(RANDOM.normal(size=shape))


# --- operators ------------------------------------------------------------------------------------

SHAPE = (2, 8, 6, 3)
KNOWN = RANDOM.random((1, 8, 6, 1)) < 0.5
KERNEL = np.array([[0.1, 0.3, 0.], [0.05, 0.4, 0.1], [0., 0.05, 0.], [0.1, 0., -0.1]])
OPERATORS = dict(
    mask=lambda: inverse.mask(KNOWN), blur=lambda: inverse.blur(KERNEL),
    separable=lambda: inverse.blur(np.array([0.25, 0.5, 0.25])),  # kills the highest frequency
    downsample=lambda: inverse.downsample(2), grey=lambda: inverse.grey())


@pytest.mark.parametrize('name', OPERATORS)
def test_operator(name, x64):
  """The adjoint's identity, those of the pseudo-inverse, and the normal equations of a ridge."""
  x = draw(*SHAPE)
  ridge = jnp.array([0.3, 2.]).reshape(2, 1, 1, 1)

  @jax.jit
  def run(x, y, ridge):
    operator = OPERATORS[name]()
    a, back = operator.apply, operator.pinv
    z = back(y, ridge)
    return dict(
        forth=a(x), back=operator.adjoint(y), again=a(back(a(x))), solved=back(y),
        solved_again=back(a(back(y))), normal=operator.adjoint(a(z) - y) + ridge * z)

  made = jax.eval_shape(lambda x: OPERATORS[name]().apply(x), x)
  y = draw(*made.shape)
  out = run(x, y, ridge)
  np.testing.assert_allclose((out['forth'] * y).sum(), (x * out['back']).sum(), rtol=1e-10)
  np.testing.assert_allclose(out['again'], out['forth'], atol=1e-10)
  np.testing.assert_allclose(out['solved_again'], out['solved'], atol=1e-10)
  np.testing.assert_allclose(out['normal'], 0., atol=1e-10)


def test_operators_known(x64):
  x = draw(*SHAPE)
  kernel = KERNEL[:3]
  want = np.stack([[scipy.ndimage.convolve(np.asarray(x[b, :, :, c]), kernel, mode='wrap')
                    for c in range(3)] for b in range(2)])
  np.testing.assert_allclose(inverse.blur(kernel).apply(x), np.moveaxis(want, 1, -1), atol=1e-12)
  point = inverse.blur(KERNEL).apply(jnp.zeros((1, 8, 6, 1)).at[0, 4, 3, 0].set(1.))
  np.testing.assert_allclose(point[0, 2:6, 2:5, 0], KERNEL, atol=1e-12)  # 4 // 2, 3 // 2 on it
  line = np.array([0.2, 0.5, 0.3])
  np.testing.assert_allclose(
      inverse.blur(line).apply(x), inverse.blur(np.outer(line, line)).apply(x), atol=1e-12)
  small = inverse.downsample(2).apply(x)
  np.testing.assert_allclose(small[1, 2, 1, 0], x[1, 4:6, 2:4, 0].mean(), rtol=1e-12)
  np.testing.assert_allclose(
      inverse.grey().apply(x)[0, 3, 2, 0], (x[0, 3, 2, 0] + x[0, 3, 2, 1] + x[0, 3, 2, 2]) / 3)
  np.testing.assert_array_equal(inverse.mask(KNOWN).apply(x), np.where(KNOWN, x, 0))


def test_bad_shapes_are_errors():
  x = jnp.zeros(SHAPE)
  with pytest.raises(ValueError, match='mask of float32: give bool'):
    inverse.mask(jnp.ones((1, 8, 6, 1)))
  with pytest.raises(ValueError, match='same number of axes'):
    inverse.mask(KNOWN[0]).apply(x)
  with pytest.raises(ValueError, match=r'kernel of shape \(7, 7\)'):
    inverse.blur(np.ones((7, 7))).apply(x)
  with pytest.raises(ValueError, match='factor=4'):
    inverse.downsample(4).apply(x)
  with pytest.raises(ValueError, match='not channels=4'):
    inverse.grey(4).apply(x)
  level = schedules.linear()(0.5)
  for method in (inverse.ddnm, functools.partial(inverse.dps, zeta=1.), inverse.pigdm,
                 functools.partial(inverse.replacement, noise=x)):
    with pytest.raises(ValueError, match=r'y of shape \(1, 4, 3, 3\)'):
      method(gaussian, inverse.downsample(2), y=jnp.zeros((1, 4, 3, 3)))(x, level)


# --- the posterior --------------------------------------------------------------------------------

MATRIX = np.array([[1., 0.5, -0.3], [0.2, -1., 0.8]])
NOISE = 0.3


def dense(matrix):
  """An operator of one's own."""
  matrix = jnp.asarray(matrix)
  def pinv(y, ridge=0.):
    return jnp.linalg.solve(matrix @ matrix.T + ridge * jnp.eye(len(matrix)), y.T).T @ matrix
  return inverse.Operator(lambda x: x @ matrix.T, lambda y: y @ matrix, pinv)


def posterior(y, alpha=0., sigma=1., x=0.):
  """Mean [b 3] and covariance [3 3] of x0 given y, and given x_t = x where alpha > 0."""
  cov = np.linalg.inv(np.eye(3) * (1 / STD**2 + alpha**2 / sigma**2) + MATRIX.T @ MATRIX / NOISE**2)
  return (y @ MATRIX / NOISE**2 + alpha / sigma**2 * x) @ cov, cov


@pytest.mark.parametrize('schedule', ['linear', 've'])
def test_pigdm_is_the_posterior_mean(schedule, x64):
  schedule = getattr(schedules, schedule)()
  x, y = draw(4, 3), draw(4, 2)
  denoise = jax.jit(inverse.pigdm(gaussian, dense(MATRIX), y, NOISE, STD))
  for t in (0.05, 0.5, 0.95):
    level = schedule(t)
    told = denoise(x, level)
    alpha, sigma = float(level.alpha), float(level.sigma)
    want, _ = posterior(np.asarray(y), alpha, sigma, np.asarray(x))
    np.testing.assert_allclose(told.x0, want, atol=1e-10)
    np.testing.assert_allclose(alpha * told.x0 + sigma * told.eps, x, atol=1e-10)


def test_pigdm_samples_the_posterior(x64):
  """Sampling is affine in x: a walk from 0 and one from each unit vector give both moments."""
  schedule, sampler = schedules.ve(), samplers.heun()
  y = jnp.array([[0.8, -0.5]])

  @jax.jit
  def run(rows, x):
    denoise = inverse.pigdm(gaussian, dense(MATRIX), jnp.broadcast_to(y, (4, 2)), NOISE, STD)
    return samplers.sample(sampler, denoise, rows, x)

  first = schedule(schedule.t_max)
  mean, cov = posterior(np.asarray(y))
  errors = []
  for steps in (64, 128):
    rows = sampler.plan(schedule, grids.karras(schedule, steps))
    out = np.asarray(run(rows, jnp.asarray(np.concatenate([np.zeros((1, 3)), np.eye(3)]))))
    of_x = out[1:] - out[0]
    got = of_x.T @ (cov + float(first.sigma)**2 * np.eye(3)) @ of_x
    errors.append((np.abs(out[0] + mean[0] @ of_x - mean[0]).max(), np.abs(got - cov).max()))
  (mean_error, coarse), (_, fine) = errors
  assert mean_error < 1e-12 and fine < 1e-3 and coarse > 3.5 * fine, errors  # of order 2


def test_pigdm_without_noise(x64):
  """Known pixels are y, others as without it; at alpha = 0 the network's word stands."""
  x = draw(*SHAPE)
  operator = inverse.mask(KNOWN)
  y = operator.apply(draw(*SHAPE))
  denoise = jax.jit(inverse.pigdm(gaussian, operator, y, 0., STD))
  level = schedules.linear()(0.4)
  np.testing.assert_allclose(
      denoise(x, level).x0, np.where(KNOWN, y, gaussian(x, level)), atol=1e-12)
  np.testing.assert_allclose(denoise(x, schedules.linear()(1.)).x0, 0., atol=1e-12)


def test_dps(x64):
  """For a denoiser c x the gradient is -2 c A^T (y - c A x), by hand."""
  x, y = draw(4, 3), draw(4, 2)
  level = schedules.vp()(0.4)
  told = jax.jit(inverse.dps(gaussian, dense(MATRIX), y, 0.8))(x, level)
  x0 = np.asarray(gaussian(x, level))
  c = float(gaussian(1., level))
  off = np.asarray(y) - x0 @ MATRIX.T
  score = 0.8 * 2 * c * off @ MATRIX / np.linalg.norm(off, axis=1, keepdims=True)
  np.testing.assert_allclose(
      told.x0, x0 + float(level.sigma)**2 / float(level.alpha) * score, atol=1e-10)
  np.testing.assert_allclose(level.alpha * told.x0 + level.sigma * told.eps, x, atol=1e-10)


def test_dps_comes_near_y():
  """What is sampled agrees with y far better than what is sampled without it."""
  schedule, sampler = schedules.vp(), samplers.ddim()
  operator = inverse.downsample(2)
  y = operator.apply(jnp.asarray(STD * draw(64, 4, 4, 3), jnp.float32))
  keys = samplers.sample_keys(0, np.arange(64))
  rows = sampler.plan(schedule, grids.uniform(schedule, 50))

  @jax.jit
  def run(rows, zeta):
    x = noises.normal(keys, (4, 4, 3))
    return samplers.sample(sampler, inverse.dps(gaussian, operator, y, zeta), rows, x)

  off = lambda zeta: float(jnp.abs(operator.apply(run(rows, zeta)) - y).mean())
  assert off(30.) < 0.1 * off(0.)


# --- what is known stays --------------------------------------------------------------------------

WALKS = dict(ddim=samplers.ddim(), ddpm=samplers.ddim(1.), heun=samplers.heun(),
             dpmpp_2m=samplers.dpmpp_2m())
PAIRS = [('fixed', 'ddim'), ('fixed', 'dpmpp_2m'), ('fresh', 'ddpm'), ('fresh', 'heun'),
         ('ddnm', 'dpmpp_2m'), ('ddnm', 'ddpm')]


def walked(name, method, steps=8):
  """Samples for an operator's y, and y; `method`: (denoise, operator, y) -> denoiser."""
  operator = OPERATORS[name]()
  schedule = schedules.linear()
  keys = samplers.sample_keys(0, np.arange(SHAPE[0]))
  y = operator.apply(jnp.asarray(draw(*SHAPE), jnp.float32))

  def run(sampler):
    ts = grids.karras(schedule, steps)
    rows = sampler.plan(schedule, ts)
    x = samplers.initial(schedule, ts, keys, SHAPE[1:])
    return jax.jit(lambda rows, x: samplers.sample(
        sampler, method(gaussian, operator, y), rows, x, keys))(rows, x)

  return run, operator, y


METHODS = dict(
    fixed=lambda denoise, operator, y: inverse.replacement(denoise, operator, y, SHAPE_NOISE),
    fresh=lambda denoise, operator, y: inverse.repaint(
        denoise, operator, y, samplers.sample_keys(1, np.arange(SHAPE[0]))),
    ddnm=inverse.ddnm)
SHAPE_NOISE = jnp.asarray(draw(*SHAPE), jnp.float32)


@pytest.mark.parametrize('method, sampler', PAIRS)
def test_known_pixels_are_exact(method, sampler):
  run, operator, y = walked('mask', METHODS[method])
  out = run(WALKS[sampler])
  np.testing.assert_array_equal(operator.apply(out), y)
  assert np.asarray(out)[np.broadcast_to(~KNOWN, SHAPE)].std() > 0.2


@pytest.mark.parametrize('name', [name for name in OPERATORS if name != 'mask'])
def test_what_is_measured_is_y(name):
  run, operator, y = walked(name, inverse.ddnm)
  np.testing.assert_allclose(operator.apply(run(WALKS['ddpm'])), y, atol=2e-4)


def shown(method, level, x, calls=2):
  """What the network is shown and the denoiser says, call for call."""
  seen = []
  def network(x, level):
    seen.append(np.asarray(x))
    return gaussian(x, level)
  denoise = samplers.lift(method(network))
  memory, said = denoise.init(x), []
  for _ in range(calls):
    told, memory = denoise.apply(x, level, memory)
    said.append(told)
  return seen, said


def test_replacement_shows_noised_y():
  operator = inverse.mask(KNOWN)
  x, y = jnp.asarray(draw(*SHAPE), jnp.float32), operator.apply(SHAPE_NOISE**2)
  level = schedules.vp()(0.3)
  seen, said = shown(
      lambda d: inverse.replacement(d, operator, y, SHAPE_NOISE), level, x)
  want = np.where(KNOWN, level.alpha * y + level.sigma * SHAPE_NOISE, x)
  for one, told in zip(seen, said):
    np.testing.assert_allclose(one, want, atol=1e-6)
    np.testing.assert_allclose(level.alpha * told.x0 + level.sigma * told.eps, want, atol=1e-5)
  keys = samplers.sample_keys(0, np.arange(2))
  first, second = shown(lambda d: inverse.repaint(d, operator, y, keys), level, x)[0]
  there = np.broadcast_to(KNOWN, SHAPE)
  np.testing.assert_array_equal(first[~there], x[~there])
  assert (first[there] != second[there]).all()
  noise = (np.stack([first, second]) - np.asarray(level.alpha * y)) / float(level.sigma)
  assert abs(noise[:, there].std() - 1) < 5 / np.sqrt(2 * noise[:, there].size)


def test_repaint_finds_the_condition():
  """x = (a, b) of correlation 0.9, a seen to be 1.5: b ~ N(1.35, 0.19), once steps are repeated.

  Without repeats its mean is about 0.9, for what was drawn of b before is never taken back.
  """
  rho, count, times = 0.9, 1024, 20
  axes = jnp.array([[1., 1.], [1., -1.]]) / jnp.sqrt(2.)
  var = jnp.array([[1 + rho, 1 - rho]])  # along them
  schedule, sampler = schedules.cosine(), samplers.ddpm('large')
  keys = samplers.sample_keys(0, np.arange(count))
  y = jnp.broadcast_to(jnp.array([[1.5, 0.]]), (count, 2))

  def denoise(x, level):
    return (level.alpha * var / (level.alpha**2 * var + level.sigma**2) * (x @ axes)) @ axes

  @jax.jit
  def run(rows, x):
    known = inverse.mask(np.array([[True, False]]))
    return samplers.sample(sampler, inverse.repaint(denoise, known, y, keys), rows, x, keys)

  ts = grids.uniform(schedule, 40)
  path = samplers.Path(jnp.repeat(ts[:-1], times), jnp.repeat(ts[1:], times))
  out = run(sampler.plan(schedule, path), samplers.initial(schedule, path, keys, (2,)))
  assert abs(float(out[:, 1].mean()) - 1.35) < 0.06
  assert abs(float(out[:, 1].var()) - 0.19) < 0.04


def test_ddnm(x64):
  """The null space is the network's; under noise the share of y falls with the level."""
  operator, level = inverse.downsample(2), schedules.linear()(0.2)  # sigma / alpha = 0.25
  x, y = draw(*SHAPE), draw(2, 4, 3, 3)
  x0 = gaussian(x, level)
  told = inverse.ddnm(gaussian, operator, y)(x, level)
  half = inverse.ddnm(gaussian, operator, y, 0.5)(x, level)
  clear = inverse.ddnm(gaussian, operator, y, 0.1)(x, level)
  np.testing.assert_allclose(operator.apply(told.x0), y, atol=1e-12)
  null = lambda x: x - np.kron(operator.apply(x).transpose(0, 3, 1, 2), np.ones((2, 2))).transpose(
      0, 2, 3, 1)
  np.testing.assert_allclose(null(told.x0), null(x0), atol=1e-12)
  np.testing.assert_allclose(half.x0, (told.x0 + x0) / 2, atol=1e-12)
  np.testing.assert_allclose(clear.x0, told.x0, atol=1e-12)
  np.testing.assert_allclose(level.alpha * told.x0 + level.sigma * told.eps, x, atol=1e-12)


# --- what they are made of ------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32', 'float64'])
@pytest.mark.parametrize('method', ['replacement', 'repaint', 'ddnm', 'dps', 'pigdm'])
def test_dtype_memory_and_levels(method, dtype, x64):
  """The network's dtype and memory are kept, at a level an example."""
  operator, x = inverse.downsample(2), draw(*SHAPE).astype(dtype)
  def apply(x, level, asked):
    said = predictions.invert(gaussian(x, level), x, level)._replace(fraction=x)
    return jax.tree.map(lambda a: a.astype(dtype), said), asked + 1
  counting = samplers.Denoiser(lambda x: jnp.int32(0), apply)
  more = dict(replacement=(draw(*SHAPE),), repaint=(samplers.sample_keys(0, np.arange(2)),),
              dps=(2.,))
  denoise = getattr(inverse, method)(
      counting, operator, draw(2, 4, 3, 3).astype(dtype), *more.get(method, ()))
  level = schedules.linear()(jnp.array([0.3, 1.], jnp.float32).reshape(2, 1, 1, 1))
  @jax.jit
  def twice(x):
    _, memory = denoise.apply(x, level, denoise.init(x))
    return denoise.apply(x, level, memory)
  told, memory = twice(x)
  assert {a.dtype for a in told} == {jnp.dtype(dtype)}
  assert all(np.isfinite(np.asarray(a, float)).all() for a in told)
  assert jax.tree.leaves(memory)[0] == 2


# --- sdedit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('strength, count', [(0., 0), (0.1, 1), (0.25, 2), (0.3, 3), (1., 10)])
def test_sdedit(strength, count):
  schedule, sampler = schedules.linear(), samplers.ddim()
  ts = grids.uniform(schedule, 10)
  x0, noise = (jnp.asarray(draw(2, 3), jnp.float32) for _ in range(2))
  tail, x = inverse.sdedit(schedule, ts, strength, x0, noise)
  assert len(tail) == count + 1
  np.testing.assert_array_equal(tail, ts[10 - count:])
  t = count / 10  # of a uniform grid
  np.testing.assert_allclose(x, (1 - t) * x0 + t * noise, atol=1e-6)
  if strength == 0:
    np.testing.assert_array_equal(x, x0)
  if strength == 1:
    np.testing.assert_array_equal(x, noise)
  out = samplers.sample(sampler, lambda x, level: x0, sampler.plan(schedule, tail), x)
  np.testing.assert_allclose(out, x0, atol=1e-6)


def test_sdedit_strength():
  with pytest.raises(ValueError, match='strength=1.2'):
    inverse.sdedit(schedules.linear(), jnp.linspace(1., 0., 5), 1.2, jnp.zeros(2), jnp.zeros(2))


# --- steering -------------------------------------------------------------------------------------


def steered(sampler, x, keys, steps):
  schedule = schedules.linear()
  rows = sampler.plan(schedule, grids.karras(schedule, steps))
  return jax.jit(lambda rows, x: samplers.sample(sampler, gaussian, rows, x, keys))(rows, x)


@pytest.mark.parametrize('every', [1, 7])
def test_steering_tilts(every):
  """N(0, s^2) tilted by exp(x_0 - x_1) is N(s^2 (1, -1), s^2), to 0.05."""
  count = 16384
  keys = samplers.sample_keys(0, np.arange(count))
  x = noises.normal(samplers.sample_keys(1, np.arange(count)), (2,))
  reward = lambda x0: x0[:, 0] - x0[:, 1]
  sampler = inverse.steer(samplers.dpmpp_2m(1.), reward, count, every=every)
  out = np.asarray(steered(sampler, x, keys, 60))
  shift = STD**2
  np.testing.assert_allclose(out.mean(0), [shift, -shift], atol=0.05)
  np.testing.assert_allclose(out.std(0), STD, atol=0.05)


def test_steering_by_nothing():
  """Equal weights draw everyone once: the sampler as it was, its memory too."""
  x = jnp.asarray(draw(8, 2), jnp.float32)
  keys = samplers.sample_keys(0, np.arange(8))
  inner = samplers.dpmpp_2m(1.)
  flat = inverse.steer(inner, lambda x0: 0 * x0[:, 0], 4)
  np.testing.assert_allclose(steered(flat, x, keys, 6), steered(inner, x, keys, 6), atol=1e-6)


def test_steering_draws_within_groups():
  """Each is there as often as its share of the group, up to rounding, with its memory."""
  groups, particles = 3, 64
  number = jnp.arange(groups * particles, dtype=jnp.float32)
  weight = np.random.default_rng(2).random((groups, particles)).astype(np.float32)
  inner = samplers.Sampler(
      lambda schedule, ts: dict(level=schedule(ts[:-1])), lambda x: x,
      lambda denoise, x, memory, row, noise: (denoise(x, row['level']).x0, memory))
  reward = lambda x0: jnp.log(jnp.asarray(weight.ravel()))[x0.astype(jnp.int32)[:, 0]]
  sampler = inverse.steer(inner, reward, particles)
  rows = sampler.plan(schedules.linear(), jnp.array([1., 0.]))
  told = {}
  def step(*args):
    x, memory = sampler.step(*args)
    jax.debug.callback(lambda inner, before: told.update(inner=inner, before=before), *memory)
    return x, memory
  out = samplers.sample(
      sampler._replace(step=step), lambda x, level: x, rows, number[:, None],
      samplers.sample_keys(0, np.arange(len(number))))
  jax.effects_barrier()
  drawn = np.asarray(out[:, 0], int).reshape(groups, particles)
  assert (drawn // particles == np.arange(groups)[:, None]).all()
  counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
  want = particles * weight / weight.sum(1, keepdims=True)
  assert (np.abs(counts - want) < 1 + 1e-3).all() and (counts != 1).any()
  np.testing.assert_array_equal(told['inner'], out)
  np.testing.assert_allclose(told['before'], np.log(weight.ravel())[drawn.ravel()], rtol=1e-6)


def test_steering_rows_and_groups():
  sampler = inverse.steer(samplers.ddim(), lambda x0: x0[:, 0], 4, every=3)
  rows = sampler.plan(schedules.linear(), jnp.linspace(1., 0., 9))
  assert np.flatnonzero(rows['draws']).tolist() == [1, 4, 7]
  with pytest.raises(ValueError, match='particles=4'):
    sampler.init(jnp.zeros((6, 2)))
