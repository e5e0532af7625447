"""Solvers against equations that have solutions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import grids
from diffax import samplers
from diffax import schedules
from diffax import solvers
import gaussians

MIXTURE = gaussians.mixture()
TABLEAUS = {'bogacki_shampine': solvers.BOGACKI_SHAMPINE, 'dormand_prince': solvers.DORMAND_PRINCE}


def spring(x, t):
  """u'' = -u with a force that depends on time; of a dict of two shapes, [b 2] and [b]."""
  return {'u': x['v'] * jnp.ones_like(x['u']), 'v': -x['u'][:, :1] + t[:, None]}


def position(t):
  """From u = 1, v = 0 at 0: t + cos(t) - sin(t)."""
  return t + np.cos(t) - np.sin(t)


START = {'u': np.ones((3, 2)), 'v': np.zeros((3, 1))}


@pytest.mark.parametrize('name', TABLEAUS)
def test_order(name, x64):
  """Of both solutions: halving the steps divides the error by 2^order."""
  tableau = TABLEAUS[name]
  start = jax.tree.map(jnp.asarray, START)
  run = jax.jit(functools.partial(solvers.fixed, spring, tableau=tableau))
  errors = [abs(run(start, jnp.linspace(0., 2., n + 1))['u'][0, 0] - position(2.))
            for n in (16, 32)]
  assert abs(np.log2(errors[0] / errors[1]) - tableau.order) < 0.35

  def local(h):
    _, error, _ = solvers.step(
        tableau, spring, start, jnp.zeros(3), jnp.full(3, h), spring(start, jnp.zeros(3)))
    return abs(error['u'][0, 0])
  assert abs(np.log2(local(0.1) / local(0.05)) - tableau.order) < 0.35  # one less, in one step


@pytest.mark.parametrize('name', TABLEAUS)
def test_adaptive_meets_its_tolerance(name, x64):
  """Forwards and backwards, each example to a time of its own."""
  start = jax.tree.map(jnp.asarray, START)
  ends = np.array([5., 0.3, -4.])
  for tolerance in (1e-4, 1e-8):
    run = functools.partial(
        solvers.adaptive, spring, rtol=tolerance, atol=tolerance, tableau=TABLEAUS[name])
    found = jax.jit(run)(start, 0., jnp.array(ends))
    assert found.done.all() and (found.t == ends).all()
    error = np.abs(found.x['u'] - position(ends)[:, None]).max()
    assert 1e-3 * tolerance < error < 30 * tolerance
    assert found.tries[1] < found.tries[0] < 1000


def decay(rates):
  return lambda x, t: -rates[:, None] * x


@functools.partial(jax.jit, static_argnums=2)
def fall(rates, x, max_steps=1000):
  return solvers.adaptive(decay(rates), x, 0., 1., 1e-4, 1e-4, max_steps)


def test_a_stiff_example_is_alone_with_it():
  """It takes many more steps; no bit of another example changes, nor its number of steps."""
  x = jnp.stack([jnp.arange(1., 5.)] * 3)
  calm = fall(jnp.array([1., 2., 3.]), x)
  stiff = fall(jnp.array([1., 2000., 3.]), x)
  np.testing.assert_allclose(calm.x, np.exp(-np.array([[1.], [2.], [3.]])) * x, rtol=1e-3)
  for a, b in zip(jax.tree.leaves(calm), jax.tree.leaves(stiff)):
    np.testing.assert_array_equal(a[::2], b[::2])
  np.testing.assert_allclose(stiff.x[1], 0., atol=1e-2)
  assert stiff.tries[1] > 10 * calm.tries[1]


def test_what_is_not_done_says_so():
  found = fall(jnp.array([1., 2000., 3.]), jnp.ones((3, 4)), 30)
  np.testing.assert_array_equal(found.done, [True, False, True])
  assert found.t[1] < 1 and found.tries[1] == 30 and np.isfinite(found.x).all()


def test_where_nothing_moves():
  """A slope of 0 is one step; a span of 0 none."""
  run = jax.jit(lambda t1: solvers.adaptive(lambda x, t: 0. * x, jnp.ones((2, 3)), 0., t1))
  found = run(jnp.array([1., 0.]))
  np.testing.assert_array_equal(found.tries, [1, 0])
  assert found.done.all() and (found.x == 1).all()


@pytest.mark.parametrize('tolerance', [dict(rtol=-1e-3), dict(rtol=0., atol=0.)])
def test_refused(tolerance):
  with pytest.raises(ValueError, match='rtol='):
    solvers.adaptive(lambda x, t: x, jnp.ones((2, 3)), 0., 1., **tolerance)


# --- sampling -------------------------------------------------------------------------------------


def mixture_denoiser(x, level):
  """The exact one, each example at a level of its own."""
  one = lambda x, *level: gaussians.denoise(MIXTURE, x[None], schedules.Level(*level))[0]
  return jax.vmap(one)(x, *(jnp.broadcast_to(a, (len(x), 1))[:, 0] for a in level))


def exact(schedule, x):
  """Where the flow from t_max is at clean data."""
  first = np.array(schedule(schedule.t_max)[1:])
  return gaussians.flow(MIXTURE, np.asarray(x), first, (1., 0.))


@pytest.mark.parametrize('kind', ['linear', 'cosine', 'vp', 've'])
def test_sample_adaptive(kind, x64):
  """On the exact flow within the tolerance, from noise to data, on any schedule."""
  schedule = getattr(schedules, kind)(1e-5) if kind != 'vp' else schedules.vp(t_min=1e-6)
  x = gaussians.quantiles() * float(schedule(schedule.t_max).sigma)
  run = jax.jit(lambda x: solvers.sample_adaptive(
      mixture_denoiser, schedule, x, rtol=1e-6, atol=1e-6))
  out, found = run(x)
  assert found.done.all() and len(np.unique(found.tries)) > 1  # each sample in steps of its own
  assert np.abs(out - exact(schedule, x)).max() < 1e-4


def test_sample_diffrax(x64):
  diffrax = pytest.importorskip('diffrax')
  schedule = schedules.cosine(1e-5)
  x = gaussians.quantiles()
  control = diffrax.PIDController(rtol=1e-7, atol=1e-7)
  for options in (dict(), dict(solver=diffrax.Dopri5(), controller=control),
                  dict(solver=diffrax.Heun(), steps=400)):
    out = jax.jit(lambda x, o=options: solvers.sample_diffrax(
        mixture_denoiser, schedule, x, **o))(x)
    assert np.abs(out - exact(schedule, x)).max() < 1e-3, options


@pytest.mark.parametrize('name', ['ddim', 'ddpm'])
def test_sample_picard(name):
  """As the sampler one step after the other, in fewer rounds; asked of a whole window at once."""
  schedule, sampler = schedules.linear(), getattr(samplers, name)()
  keys = samplers.sample_keys(0, np.arange(4))
  ts = grids.uniform(schedule, 30)
  rows = sampler.plan(schedule, ts)
  x = samplers.initial(schedule, ts, keys, (2,))
  denoise = lambda x, level: gaussians.denoise(MIXTURE, x, level)
  plain = jax.jit(lambda: samplers.sample(sampler, denoise, rows, x, keys))()
  for window, tolerance, near, wanted in (
      (30, 1e-6, 2e-5, range(19)), (8, 1e-6, 2e-5, range(23)), (8, 1e-3, 3e-2, range(19)),
      (8, 0., 2e-5, range(31)), (1, 0., 2e-5, range(30, 31))):
    out, rounds = jax.jit(lambda w=window, tol=tolerance: solvers.sample_picard(
        sampler, denoise, rows, x, keys, window=w, tolerance=tol))()
    assert np.abs(out - plain).max() < near, (window, tolerance)
    assert rounds in wanted, (window, tolerance)
  _, quick = jax.jit(lambda: solvers.sample_picard(
      sampler, denoise, rows, x, keys, window=15, tolerance=1e-2))()
  assert quick <= 15


def test_what_remembers_is_refused():
  schedule, x = schedules.linear(), jnp.zeros((1, 2))
  memory = samplers.Denoiser(lambda x: (), lambda x, level, m: (x, m))
  rows = samplers.dpmpp_2m().plan(schedule, grids.uniform(schedule, 3))
  with pytest.raises(ValueError, match='remember'):
    solvers.sample_picard(samplers.dpmpp_2m(), lambda x, t: x, rows, x)
  with pytest.raises(ValueError, match='remember'):
    solvers.sample_picard(samplers.ddim(), memory, rows, x)
  with pytest.raises(ValueError, match='remember'):
    solvers.sample_adaptive(memory, schedule, x)
