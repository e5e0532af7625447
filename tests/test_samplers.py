"""Samplers against data whose flow and moments are known in closed form (gaussians.py)."""

import functools
from typing import NamedTuple

from jax import Array
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import grids
from diffax import predictions
from diffax import samplers
from diffax import schedules
import gaussians

SCHEDULES = ('linear', 'cosine', 'vp', 've')
GRIDS = ('uniform', 'karras', 'log_snr', 'interior')
PREDICTIONS = ('x0', 'eps', 'v', 'velocity', 'edm')
SAMPLERS = dict(
    ddim=samplers.ddim(), half=samplers.ddim(0.5), ddpm=samplers.ddim(1.), heun=samplers.heun(),
    churn=samplers.heun(s_churn=4.), dpmpp_2m=samplers.dpmpp_2m(), sde=samplers.dpmpp_2m(1.))
ORDER = dict(ddim=1, heun=2, dpmpp_2m=2)
WEAK_ORDER = dict(half=1, ddpm=1, churn=2, sde=1)  # of the variance
GAUSSIAN, MIXTURE = gaussians.gaussian(), gaussians.mixture()
POINT = gaussians.gaussian(std=(0., 0.))
# Programs of a millisecond, compiled for a second: most of the tests' time is XLA's.
FAST = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


# --- programs: schedule, grid, data, prediction and noise are their data --------------------------


def schedule_of(which):
  """The schedule number `which`, a number that may be traced."""
  members = [getattr(schedules, name)() for name in SCHEDULES]
  ends = jnp.array([(s.t_min, s.t_max, s.t_end) for s in members])[which]
  level = lambda t: jax.lax.switch(which, [s.level for s in members], t)
  return schedules.Schedule(level, ends[0], ends[1], schedules.log_clock, ends[2])


def interior(schedule, steps):
  """Equal steps in lambda between two levels that have both data and noise."""
  return schedules.inverse(schedule, jnp.linspace(-3., 3., steps + 1))


@functools.partial(jax.jit, static_argnums=2, compiler_options=FAST)
def times(schedule, grid, steps):
  members = [grids.uniform, grids.karras, grids.log_snr, interior]
  return jax.lax.switch(grid, [lambda m=m: m(schedule_of(schedule), steps) for m in members])


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def plan(name, schedule, ts):
  """The rows, and the (alpha, sigma) at which sampling begins and ends."""
  schedule = schedule_of(schedule)
  return SAMPLERS[name].plan(schedule, ts), schedule(ts[0])[1:], schedule(ts[-1])[1:]


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def walk(name, rows, draws, x, data):
  """`samplers.sample` with its noise given, `draws` [rows *x]; by a network where levels tell."""
  def step(denoise, x, memory, row, noise):
    del noise
    return SAMPLERS[name].step(denoise, x, memory, row, lambda draw=0: row['draw'])
  def denoise(x, level):
    if not isinstance(level, Told):
      return gaussians.denoise(data, x, level)
    exact = gaussians.estimate(data, x, level)
    network = predictions.Prediction(lambda level: (level.a, level.b), None, None)
    out = predictions.target(network, exact.x0, exact.eps, level)
    return predictions.solve(network, out, x, level)
  sampler = SAMPLERS[name]._replace(step=step)
  return samplers.sample(sampler, denoise, {**rows, 'draw': draws}, x)


class Told(NamedTuple):
  """A `Level`, and what an exact network says there: a x0 + b eps."""

  t: Array
  alpha: Array
  sigma: Array
  a: Array
  b: Array


@functools.partial(jax.jit, compiler_options=FAST)
def tell(level, schedule, prediction):
  """The levels for a network of that prediction."""
  members = [getattr(predictions, name)(schedule_of(schedule)).row for name in PREDICTIONS]
  return Told(*level, *jax.lax.switch(prediction, members, level))


def setting(name, steps, schedule, grid):
  """Rows, first and last (alpha, sigma), and the schedule's number."""
  number = SCHEDULES.index(schedule)
  rows, first, last = plan(name, number, times(number, GRIDS.index(grid), steps))
  return rows, np.array(first), np.array(last), number


def calls(rows):
  return rows['level'].t.shape[0]


# --- the flow -------------------------------------------------------------------------------------


def flow(name, steps, schedule, grid, data):
  """Where sampling ends, and how far that is from the end of the exact probability flow."""
  rows, first, last, _ = setting(name, steps, schedule, grid)
  x = gaussians.quantiles() * np.sqrt((first**2).sum())
  out = np.asarray(walk(name, rows, np.zeros((calls(rows), *x.shape)), x, data))
  return out, np.abs(out - gaussians.flow(data, x, first, last)).max()


def slopes(errors):
  """Measured orders of convergence, for steps that double."""
  return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('name', ORDER)
def test_order(name, schedule, x64):
  for data in (GAUSSIAN, MIXTURE):
    errors = [flow(name, n, schedule, 'interior', data)[1] for n in (32, 64, 128)]
    assert (slopes(errors) > ORDER[name] - 0.15).all(), errors
    assert errors[-1] < {1: 2e-2, 2: 5e-4}[ORDER[name]]


@pytest.mark.parametrize('grid', GRIDS[:3])
@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('name', ORDER)
def test_order_from_noise_to_data(name, schedule, grid, x64):
  """Both ends included. Equal steps in t are not made for VP and VE: there the error only falls."""
  errors = [flow(name, n, schedule, grid, MIXTURE)[1] for n in (64, 128)]
  if grid == 'uniform':
    assert slopes(errors) > 0.8, errors
  else:
    assert slopes(errors) > ORDER[name] - 0.15, errors
    assert errors[-1] < {1: 4e-2, 2: 2.5e-3}[ORDER[name]]


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_heun_is_not_euler(schedule, x64):
  (euler, _), (heun, error) = (flow(n, 32, schedule, 'interior', MIXTURE) for n in ('ddim', 'heun'))
  assert np.abs(heun - euler).max() > 5 * error


# --- moments --------------------------------------------------------------------------------------


def moments(name, steps, schedule, grid, data=GAUSSIAN):
  """Mean and covariance of what is sampled, exactly, then the true ones; and the noise's share.

  On Gaussian data sampling is affine in x and in each noise: one walk from 0 without noise, one for
  each unit vector of x and of each noise give it all. On the interior grid x begins with the data's
  moments at that level, else as pure noise, as in practice.
  """
  rows, first, last, _ = setting(name, steps, schedule, grid)
  count = calls(rows)
  x = np.concatenate([np.zeros((1, 2)), np.eye(2), np.zeros((2 * count, 2))])
  draws = np.zeros((count, len(x), 2))
  for i in range(count):
    draws[i, 3 + 2 * i: 5 + 2 * i] = np.eye(2)
  out = np.asarray(walk(name, rows, draws, x, data), float)
  of_x, of_noise = np.split(out[1:] - out[0], [2])
  mean, cov = gaussians.moments(data, *first)
  if grid != 'interior':
    mean, cov = np.zeros(2), first[1]**2 * np.eye(2)
  share = of_noise.T @ of_noise
  return (out[0] + mean @ of_x, of_x.T @ cov @ of_x + share), gaussians.moments(data, *last), share


def errors_of(moments):
  got, true, _ = moments
  return [np.abs(a - b).max() for a, b in zip(got, true)]


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('name', WEAK_ORDER)
def test_moments(name, schedule, x64):
  runs = [moments(name, n, schedule, 'interior') for n in (64, 128)]
  mean, cov = np.transpose([errors_of(r) for r in runs])
  assert mean.max() < 1e-12  # each of these is exact in the mean
  assert slopes(cov) > WEAK_ORDER[name] - 0.15, cov
  assert cov[-1] < 0.01
  assert np.diag(runs[-1][2]).min() > 0.01  # fresh noise is really there


@pytest.mark.parametrize('grid', GRIDS[:3])
@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('name', WEAK_ORDER)
def test_moments_from_noise_to_data(name, schedule, grid, x64):
  """From pure noise: the mean lacks what the start lacks of the data, |m| alpha / sigma at most."""
  runs = [moments(name, n, schedule, grid) for n in (64, 128)]
  (_, before), (mean, cov) = (errors_of(r) for r in runs)
  assert mean < {'vp': 0.0066, 've': 1 / 80}.get(schedule, 1e-12)
  if (grid, schedule) == ('uniform', 've'):
    assert cov < before  # steps of 80 / n
  else:
    assert cov < before / 1.6 and cov < 0.025, (before, cov)


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('name', SAMPLERS)
def test_exact_for_one_point(name, schedule, x64):
  """Where the data are one point x0 and eps never change: no step may leave the marginals."""
  assert max(errors_of(moments(name, 64, schedule, 'interior', POINT))) < 1e-12


@pytest.mark.parametrize('name', ['ddpm', 'sde'])
def test_drawn_moments(name):
  """Drawn from keys: unit noise, anew for every step, so the moments of the affine recursion."""
  count, steps = 8192, 64
  schedule = schedules.linear()

  @jax.jit
  def draw(rows, ts, keys):
    x = samplers.initial(schedule, ts, keys, (2,))
    denoise = lambda x, level: gaussians.denoise(GAUSSIAN, x, level)
    return samplers.sample(SAMPLERS[name], denoise, rows, x, keys)

  ts = times(SCHEDULES.index('linear'), GRIDS.index('karras'), steps)
  rows = setting(name, steps, 'linear', 'karras')[0]
  x = np.asarray(draw(rows, ts, samplers.sample_keys(3, np.arange(count))))
  (mean, cov), _, _ = moments(name, steps, 'linear', 'karras')
  std = np.sqrt(np.diag(cov))
  assert (np.abs(x.mean(0) - mean) < 5 * std / count**0.5).all()
  assert (np.abs(np.cov(x.T) - cov) < 5 * np.outer(std, std) * (2 / count)**0.5).all()


# --- float32, the ends, and the predictions -------------------------------------------------------


def says_nothing(prediction, schedule):
  """Where a prediction cannot tell x0 from pure noise."""
  return prediction == 'eps' and schedule in ('linear', 'cosine')


@pytest.mark.parametrize('name', [name for name in SAMPLERS if name != 'half'])
def test_float32_and_predictions(name):
  """Finite at both ends for any number of steps, alike under all predictions, as in float64."""
  x = np.linspace(-1.5, 1.5, 10).reshape(5, 2)
  for n in (1, 2, 3, 50):
    for schedule in SCHEDULES:
      for grid in GRIDS[:3]:
        rows, first, _, number = setting(name, n, schedule, grid)
        assert calls(rows) == (2 * n - 1 if name in ('heun', 'churn') else n)
        assert (rows['level'].sigma > 0).all()  # nothing is asked at clean data
        assert all(np.isfinite(a).all() for key, a in rows.items() if key != 'level')
        draws = np.random.default_rng(0).normal(size=(calls(rows), *x.shape)).astype(np.float32)
        start = (first[1] * x).astype(np.float32)
        asked = [{**rows, 'level': tell(rows['level'], number, i)} for i in range(len(PREDICTIONS))]
        outs = [np.asarray(walk(name, rows, draws, start, MIXTURE)) for rows in asked]
        if n == 50:
          with jax.enable_x64(True):
            exact = setting(name, n, schedule, grid)[0]
            exact = walk(name, exact, draws.astype(float), start.astype(float), MIXTURE)
        for prediction, out in zip(PREDICTIONS, outs):
          case = n, schedule, grid, prediction
          assert out.dtype == np.float32 and np.isfinite(out).all(), case
          if not says_nothing(prediction, schedule):
            scale = np.abs(outs[0]).max()
            assert np.abs(out - outs[0]).max() < 2e-4 * scale, case
            if n == 50:
              assert np.abs(out - np.asarray(exact)).max() < 1e-4, case


@pytest.mark.parametrize('name', ['ddpm', 'churn', 'sde'])
def test_the_network_is_asked_once_a_row(name):
  asked = []
  def denoise(x, level):
    jax.debug.callback(lambda sigma: asked.append(float(sigma)), level.sigma)
    return gaussians.denoise(GAUSSIAN, x, level)
  rows = setting(name, 3, 'linear', 'karras')[0]
  keys = samplers.sample_keys(0, np.arange(2))
  samplers.sample(SAMPLERS[name], denoise, rows, jnp.ones((2, 2)), keys).block_until_ready()
  jax.effects_barrier()
  assert sorted(asked) == sorted(np.asarray(rows['level'].sigma).tolist())


# --- keys -----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def noise_of(keys, dtype=jnp.float32):
  """The noise of the start and of two rows, two draws each: [5 b 3]."""
  def drawn(rows, draw):
    step = lambda denoise, x, memory, row, noise: (noise(draw), memory)
    probe = samplers.Sampler(None, lambda x: (), step)
    x = jnp.zeros((len(keys), 3), dtype)
    return samplers.sample(probe, lambda x, t: x, jnp.zeros(rows), x, keys)
  start = samplers.initial(schedules.linear(), jnp.array([1., 0.]), keys, (3,), dtype)
  return jnp.stack([start, *(drawn(rows, draw) for rows in (1, 2) for draw in (0, 1))])


def test_noise_is_keyed_by_sample():
  of = lambda seed, index: np.asarray(noise_of(samplers.sample_keys(seed, np.array(index))))
  eight = of(0, range(8))
  np.testing.assert_array_equal(eight[:, 7:], of(0, [7]))
  np.testing.assert_array_equal(eight[:, 2:3], of(0, [2]))
  assert len(np.unique(eight)) == eight.size  # no number twice: not by row, draw or sample
  assert not np.isin(of(1, range(8)), eight).any()


@pytest.mark.parametrize('name', ['ddpm', 'churn', 'sde'])
def test_a_sample_is_the_same_alone(name, x64):
  """In float64, where two programs differ by rounding far less than other noise would make them."""
  ts = times(SCHEDULES.index('vp'), GRIDS.index('karras'), 3)
  rows = setting(name, 3, 'vp', 'karras')[0]
  @jax.jit
  def draw(rows, ts, keys):
    x = samplers.initial(schedules.vp(), ts, keys, (2,), jnp.float64)
    denoise = lambda x, level: gaussians.denoise(MIXTURE, x, level)
    return samplers.sample(SAMPLERS[name], denoise, rows, x, keys)
  eight = draw(rows, ts, samplers.sample_keys(0, np.arange(8)))
  alone = draw(rows, ts, samplers.sample_keys(0, np.array([7])))
  assert eight.dtype == np.float64
  np.testing.assert_allclose(eight[7:], alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize('schedule, std', [('linear', 1.), ('vp', 1.), ('ve', 80.)])
def test_start_has_the_schedules_scale(schedule, std):
  schedule = getattr(schedules, schedule)()
  keys = samplers.sample_keys(0, np.arange(4096))
  x = samplers.initial(schedule, jnp.array([schedule.t_max, 0.]), keys, (2,))
  assert abs(float(x.std()) / std - 1) < 5 / (2 * x.size)**0.5


def test_noise_without_keys_is_an_error():
  rows = setting('ddpm', 3, 'linear', 'karras')[0]
  with pytest.raises(ValueError, match='keys'):
    samplers.sample(SAMPLERS['ddpm'], lambda x, t: x, rows, jnp.zeros((1, 2)))


# --- what samplers take ---------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['ddpm', 'churn', 'sde'])
def test_bfloat16(name):
  """x, its noise and what the network sees are bfloat16; what lies between is float32."""
  def denoise(x, level):
    assert x.dtype == jnp.bfloat16
    return gaussians.estimate(MIXTURE, x.astype(jnp.float32), level)  # as `solve` gives it

  @jax.jit
  def draw(rows, keys):
    x = samplers.normal(keys, (2,), jnp.bfloat16)
    return samplers.sample(SAMPLERS[name], denoise, rows, x, keys)

  keys = samplers.sample_keys(0, np.arange(8))
  out = draw(setting(name, 3, 'linear', 'karras')[0], keys)
  assert out.dtype == jnp.bfloat16 and np.isfinite(np.asarray(out, np.float32)).all()
  assert noise_of(keys, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize('name', ORDER)
def test_a_denoiser_may_remember(name):
  """Its memory goes from call to call: here it says how often it was asked before."""
  def apply(x, level, asked):
    said = predictions.invert(jnp.full_like(x, asked), x, level)
    return said, asked + 1
  rows = setting(name, 3, 'linear', 'karras')[0]
  denoise = samplers.Denoiser(lambda x: jnp.zeros(()), apply)
  out = samplers.sample(SAMPLERS[name], denoise, rows, jnp.ones((1, 2)))
  np.testing.assert_allclose(out, calls(rows) - 1, rtol=1e-5)  # at clean data stands the last x0


NOTEBOOK = '''
import jax, jax.numpy as jnp
from diffax import grids, samplers, schedules
m, s2 = 0.7, 0.25
denoise = lambda x, t: m + t.alpha * s2 / (t.alpha**2 * s2 + t.sigma**2) * (x - t.alpha * m)
schedule = schedules.cosine()
x = jax.random.normal(jax.random.key(0), (1000,))
plan = samplers.dpmpp_2m().plan(schedule, grids.log_snr(schedule, 20))
x0 = samplers.sample(samplers.dpmpp_2m(), denoise, plan, x)
print(x0.mean(), x0.std())
'''


def test_notebook():
  """A toy example is ten lines; its flow ends at m + s x, for it begins at pure unit noise."""
  scope = {}
  assert len(NOTEBOOK.strip().splitlines()) <= 10
  exec(NOTEBOOK, scope)
  np.testing.assert_allclose(scope['x0'], 0.7 + 0.5 * scope['x'], atol=0.05)
