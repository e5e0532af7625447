"""What a sampling call takes and gives: noise, times that rise again, traces, shards, frames.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import grids
from diffax import noises
from diffax import predictions
from diffax import samplers
from diffax import schedules
import gaussians
from sampler_cases import (
    BATCH, CASES, GAUSSIAN, MIXTURE, NOISY, ROWS, calls, eagerly, interior,
    made, planned, times, walk)


# --- noise ----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2))
def noise_of(keys, dtype=jnp.float32, noise=noises.independent):
  """The noise of the start and of two rows, two draws each: [5 b 3]."""
  spans = jnp.array([[-2., -1.], [-1., 0.5]])
  def drawn(rows, draw):
    step = lambda denoise, x, memory, row, noise: (noise(tuple(row['span']), draw), memory)
    probe = samplers.Sampler(None, lambda x: (), step)
    x = jnp.zeros((len(keys), 3), dtype)
    rows = dict(span=spans[:rows], level=schedules.linear()(jnp.full(rows, 0.5)))
    ask = lambda x, t: x
    return samplers.sample(probe, ask, rows, x, keys, noise=noise)
  start = samplers.initial(schedules.linear(), jnp.array([1., 0.]), keys, (3,), dtype)
  return jnp.stack([start, *(drawn(rows, draw) for rows in (1, 2) for draw in (0, 1))])


def test_noise_is_keyed_by_sample():
  of = lambda seed, index: np.asarray(noise_of(samplers.sample_keys(seed, np.array(index))))
  eight = of(0, range(8))
  np.testing.assert_array_equal(eight[:, 7:], of(0, [7]))
  np.testing.assert_array_equal(eight[:, 2:3], of(0, [2]))
  assert len(np.unique(eight)) == eight.size  # no number twice: not by row, draw or sample
  assert not np.isin(of(1, range(8)), eight).any()


def test_brownian_increments():
  """Of one path: unit variance over each span, independent over others, and they add up."""
  keys = samplers.sample_keys(0, np.arange(4096))
  cuts = [-3., -0.7, 0.4, 2.]

  @jax.jit
  def increments(keys):
    draw = noises.brownian(keys, (), jnp.float32)
    span = lambda a, b: tuple(map(jnp.float32, (a, b)))
    ends = draw(0, 0, span(-jnp.inf, 2.)), draw(0, 0, span(2., jnp.inf))
    return [draw(0, 0, span(a, b)) for a, b in zip(cuts[:-1], cuts[1:])], ends, draw(
        0, 0, span(cuts[0], cuts[-1]))

  parts, ends, whole = jax.tree.map(np.asarray, increments(keys))
  snr = np.exp(2 * np.array(cuts))
  sized = [part * (b - a)**0.5 for part, a, b in zip(parts, snr[:-1], snr[1:])]
  np.testing.assert_allclose(sum(sized), whole * (snr[-1] - snr[0])**0.5, atol=2e-4 * snr[-1]**0.5)
  every = np.stack([*parts, ends[1]])
  assert np.abs(np.cov(every) - np.eye(4)).max() < 5 * (2 / 4096)**0.5
  assert np.isfinite(ends).all()


@pytest.mark.parametrize('name', ['ddpm', 'dpmpp_2m_sde', 'dpmpp_sde', 'er_sde', 'sa_solver'])
def test_consistent_under_refinement(name):
  """On one Brownian path, finer and finer grids come to one sample; on fresh noise they do not."""
  schedule, sampler = made('linear'), CASES[name].sampler
  x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)), jnp.float32)
  keys = samplers.sample_keys(0, np.arange(64))

  @functools.partial(jax.jit, static_argnums=1)
  def run(rows, noise):
    denoise = lambda x, level: gaussians.estimate(GAUSSIAN, x, level)
    return samplers.sample(sampler, denoise, rows, x, keys, noise=noise)

  def ends(noise, counts):
    plans = [planned(name, schedule, interior(schedule, n), False) for n in counts]
    return [np.asarray(run(rows, noise)) for rows in plans]

  apart = lambda a, b: float(np.sqrt(np.square(a - b).mean()))
  coarse, middle, fine = ends(noises.brownian, (9, 36, 144))
  assert apart(middle, fine) < 0.4 * apart(coarse, fine)
  assert apart(middle, fine) < 0.06
  assert apart(*ends(noises.independent, (9, 36))) > 0.2


@pytest.mark.parametrize('name', NOISY)
def test_a_sample_is_the_same_alone(name, x64):
  """In float64, where two programs differ by rounding far less than other noise would make them."""
  rows = planned(name, made('vp'), times('karras', 'vp', 3, 'float64'))

  def draw(index):
    keys = samplers.sample_keys(0, np.array(index))
    x = samplers.initial(made('vp'), times('karras', 'vp', 3, 'float64'), keys, (2,), jnp.float64)
    run = functools.partial(keyed, name)
    return np.asarray(run(rows, x, keys))

  eight = draw(range(8))
  assert eight.dtype == np.float64
  np.testing.assert_allclose(eight[7:], draw([7]), atol=1e-12, rtol=0)


@functools.partial(jax.jit, static_argnums=0)
def keyed(name, rows, x, keys):
  def denoise(x, level):
    said = gaussians.estimate(MIXTURE, x, level)
    return said._replace(fraction=jnp.full_like(x, 0.3))
  return samplers.sample(CASES[name].sampler, denoise, rows, x, keys)


@pytest.mark.parametrize('kind, std', [('linear', 1.), ('vp', 1.), ('ve', 80.)])
def test_start_has_the_schedules_scale(kind, std):
  keys = samplers.sample_keys(0, np.arange(4096))
  x = samplers.initial(made(kind), jnp.array([made(kind).t_max, 0.]), keys, (2,))
  assert abs(float(x.std()) / std - 1) < 5 / (2 * x.size)**0.5


@pytest.mark.parametrize('noise', [noises.independent, noises.brownian])
def test_noise_without_keys_is_an_error(noise):
  rows = planned('ddpm', made('linear'), times('karras', 'linear', 3))
  with pytest.raises(ValueError, match='keys'):
    samplers.sample(CASES['ddpm'].sampler, lambda x, t: x, rows, jnp.zeros((1, 2)), noise=noise)


# --- times that rise again ------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['ddim', 'heun', 'dpmpp_2m', 'dpmpp_3m', 'unipc_3', 'sa_solver',
                                  'dpmpp_2s_ancestral', 'deis_3', 'dpm_solver_3', 'heun_churn'])
def test_restart(name, x64):
  """Noised up and brought down again: the marginals stay, and the noise of the jump is in them."""
  schedule = made('vp')
  path = eagerly(
      lambda ts: grids.restart(schedule, 24, ts, 0.1, 1., repeats=2, inner=12),
      times('log_snr', 'vp', 24, 'float64'))
  assert path.t.shape == (48,)
  jumps = np.flatnonzero(path.t[1:] > path.s[:-1])
  nsr = lambda t: np.asarray(schedule(t).nsr)
  assert len(jumps) == 2 and (nsr(path.s[jumps]) <= 0.1).all()
  np.testing.assert_allclose(nsr(path.t[jumps + 1]), 1., rtol=1e-6)
  rows = planned(name, schedule, path)
  if calls(rows) > 72:
    path = eagerly(lambda ts: grids.restart(schedule, 12, ts, 0.1, 1., repeats=2, inner=6),
                   times('log_snr', 'vp', 12, 'float64'))
  x, count = np.zeros((BATCH, 2)), calls(planned(name, schedule, path))
  x[1:3] = np.eye(2)
  draws = np.zeros((count, 2, BATCH, 2))
  for i, (call, draw) in enumerate(np.ndindex(count, 2)):
    draws[call, draw, 3 + 2 * i: 5 + 2 * i] = np.eye(2)
  rows = planned(name, schedule, path)
  out = walk(name, schedule, rows, draws, x, GAUSSIAN, ROWS)[:3 + 4 * count]
  of_x, of_noise = np.split(out[1:] - out[0], [2])
  mean, cov = gaussians.moments(GAUSSIAN, 1., 0.)
  got = of_x.T @ of_x * float(schedule(path.t[0]).sigma)**2 + of_noise.T @ of_noise
  assert np.abs(out[0] - mean).max() < 1e-2
  assert np.abs(got - cov).max() < {'ddim': 0.08}.get(name, 0.02), got
  assert np.diag(of_noise.T @ of_noise).min() > 0.02


def test_repaint_grid():
  ts = jnp.linspace(1., 0., 7)
  path = grids.repaint(schedules.linear(), 6, ts, jump=2, repeats=3)
  first = np.array([1., 5 / 6] * 3 + [4 / 6, 3 / 6] * 3 + [2 / 6, 1 / 6] * 3)
  np.testing.assert_allclose(path.t, first, rtol=1e-6)
  np.testing.assert_allclose(path.s, first - 1 / 6, atol=1e-6)


def test_grids_that_rise_say_what_they_take():
  ts = jnp.linspace(1., 0., 5)
  for wrong in (dict(low=0.), dict(low=2.), dict(repeats=0), dict(inner=0)):
    with pytest.raises(ValueError, match='restart'):
      grids.restart(schedules.linear(), 4, ts, **wrong)
  with pytest.raises(ValueError, match='repaint'):
    grids.repaint(schedules.linear(), 4, ts, jump=5)
  path = grids.repaint(schedules.linear(), 4, ts)
  with pytest.raises(ValueError, match='falling'):
    samplers.plms().plan(schedules.linear(), path)


# --- what a call takes and gives ------------------------------------------------------------------


def simple(name='ddpm', steps=5, **options):
  """One call on 8 samples of Gaussian data."""
  rows = planned(name, made('linear'), times('karras', 'linear', steps))
  keys = samplers.sample_keys(0, np.arange(8))
  x = noises.normal(keys, (2,))
  denoise = lambda x, level: gaussians.estimate(GAUSSIAN, x, level)
  return samplers.sample(CASES[name].sampler, denoise, rows, x, keys, **options)


def test_trace():
  """After every k-th row and the last, or what a function makes of each."""
  plain = simple()
  out, every = simple(trace=1)
  np.testing.assert_array_equal(out, plain)
  np.testing.assert_array_equal(every[-1], plain)
  assert every.shape == (5, 8, 2) and len(np.unique(every[:, 0, 0])) == 5
  _, second = simple(trace=2)
  np.testing.assert_array_equal(second, every[np.array([1, 3, 4])])
  _, seen = simple(trace=lambda seen: (seen.number, seen.level.sigma, seen.x, seen.x0))
  np.testing.assert_array_equal(seen[0], np.arange(5))
  assert (np.diff(seen[1]) < 0).all()
  np.testing.assert_array_equal(seen[2], every)
  np.testing.assert_array_equal(seen[3][-1], plain)  # the last step goes to x0


def test_progress():
  done = []
  jax.jit(lambda: simple(progress=lambda i, n: done.append((int(i), int(n)))))()
  jax.effects_barrier()
  assert sorted(done) == [(i, 5) for i in range(1, 6)]
  assert 'callback' not in str(jax.make_jaxpr(simple)())
  assert 'callback' in str(jax.make_jaxpr(lambda: simple(progress=print))())


@pytest.mark.parametrize('name', ['ddim', 'ddpm', 'heun', 'unipc_3', 'plms', 'sa_solver'])
def test_sharded(name):
  """Over eight devices each sample is the same, and no device waits for another."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  rows = planned(name, made('linear'), times('karras', 'linear', 3))
  keys = samplers.sample_keys(0, np.arange(16))
  x = noises.normal(keys, (2,))
  alone = keyed(name, rows, x, keys)
  compiled = keyed.lower(name, rows, *jax.device_put((x, keys), spread)).compile()
  shared = compiled(rows, *jax.device_put((x, keys), spread))
  assert shared.sharding.is_equivalent_to(spread, 2)
  np.testing.assert_allclose(shared, alone, atol=2e-4)
  assert not any(word in compiled.as_text() for word in ('all-gather', 'all-reduce', 'all-to-all'))


@pytest.mark.parametrize('name', ['ddpm', 'heun_churn', 'unipc_3', 'sde_sigma', 'plms'])
def test_a_level_a_frame(name):
  """Times [n + 1 1 f 1]: each frame goes down its own grid, as it would on its own."""
  schedule = made('cosine')
  grid = [times(g, 'cosine', 6) for g in ('karras', 'log_snr', 'uniform')]
  frames = jnp.stack(grid, 1)[:, None, :, None]  # [n+1 1 f 1]
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2)), jnp.float32)
  draws = jnp.asarray(np.random.default_rng(1).normal(size=(12, 2, 4, 3, 2)), jnp.float32)
  sampler = CASES[name].sampler

  def run(ts, x, draws):
    def denoise(x, level):
      total = level.alpha**2 * 0.3 + level.sigma**2
      return 0.4 + level.alpha * 0.3 / total * (x - level.alpha * 0.4)
    given = lambda keys, shape, dtype: lambda number, draw, span: draws[number, draw]
    rows = sampler.plan(schedule, ts)
    return samplers.sample(sampler, denoise, rows, x, noise=given)

  together = jax.jit(run)(frames, x, draws)
  single = jax.jit(run)
  for f, ts in enumerate(grid):
    np.testing.assert_allclose(
        together[:, f], single(ts, x[:, f], draws[:, :, :, f]), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('name', CASES)
def test_the_network_is_asked_as_often_as_said(name):
  """`calls` counts them; and it is asked at no level twice in one step but where a method does."""
  asked = []
  def denoise(x, level):
    asked.append(level.sigma)
    return gaussians.estimate(GAUSSIAN, x, level)._replace(fraction=x)
  sampler = CASES[name].sampler
  rows = planned(name, made('linear'), times('karras', 'linear', 4))
  with jax.disable_jit():
    samplers.sample(sampler, denoise, rows, jnp.ones((1, 2)), samplers.sample_keys(0, np.arange(1)))
  extra = {'heun': 3, 'flow_heun': 3, 'dpm2': 3, 'dpm_solver_2': 3, 'dpmpp_2s': 3, 'dpmpp_sde': 3,
           'res_2': 3, 'dpm_solver_3': 6, 'dpmpp_3s': 6, 'res_3': 6, 'plms': 1, 'pndm': 9,
           'predictor_corrector': 3, 'heun_churn': 3, 'dpm2_ancestral': 3, 'dpmpp_2s_ancestral': 3}
  assert len(asked) == samplers.calls(sampler, 4) == 4 + extra.get(name, 0)


@pytest.mark.parametrize('name', ['ddpm', 'heun_churn', 'unipc_3'])
def test_bfloat16(name):
  """x, its noise and what the network sees are bfloat16; what lies between is float32."""
  def denoise(x, level):
    assert x.dtype == jnp.bfloat16
    return gaussians.estimate(MIXTURE, x.astype(jnp.float32), level)  # as `solve` gives it

  rows = planned(name, made('linear'), times('karras', 'linear', 3))
  keys = samplers.sample_keys(0, np.arange(8))
  x = noises.normal(keys, (2,), jnp.bfloat16)
  out = samplers.sample(CASES[name].sampler, denoise, rows, x, keys)
  assert out.dtype == jnp.bfloat16 and np.isfinite(np.asarray(out, np.float32)).all()
  assert noise_of(keys, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize('name', ['ddim', 'heun', 'dpmpp_2m', 'unipc_3', 'plms'])
def test_a_denoiser_may_remember(name):
  """Its memory goes from call to call: here it says how often it was asked before."""
  def apply(x, level, asked):
    said = predictions.invert(jnp.full_like(x, asked), x, level)
    return said, asked + 1
  rows = planned(name, made('linear'), times('karras', 'linear', 3))
  denoise = samplers.Denoiser(lambda x: jnp.zeros(()), apply)
  _, said = samplers.sample(
      CASES[name].sampler, denoise, rows, jnp.ones((1, 2)), trace=lambda seen: seen.x0[0, 0])
  np.testing.assert_array_equal(said, np.arange(calls(rows)))


def test_options_are_checked():
  for make in (lambda: samplers.ddpm('huge'), lambda: samplers.sde('none'), lambda: samplers.res(4),
               lambda: samplers.dpm_solver(4), lambda: samplers.deis(5), lambda: samplers.lms(0),
               lambda: samplers.deis(2, 'x'), lambda: samplers.ipndm(5), lambda: samplers.tcd(2.),
               lambda: samplers.er_sde(4), lambda: samplers.unipc(4),
               lambda: samplers.unipc(2, 'b'), lambda: samplers.sa_solver(4),
               lambda: samplers.predictor_corrector(corrections=0),
               lambda: samplers.dpmpp_2m_sde(solver='euler')):
    with pytest.raises(ValueError, match='allowed|none of|neither|outside'):
      make()
  with pytest.raises(ValueError, match='learned_range'):
    rows = samplers.ddpm('learned').plan(schedules.linear(), jnp.linspace(1., 0., 4))
    samplers.sample(samplers.ddpm('learned'), lambda x, t: x, rows, jnp.ones((1, 2)))


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
