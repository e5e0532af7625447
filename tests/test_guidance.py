"""Guidance on Gaussian data, where the guided score is that of a Gaussian again.

With one variance and means m (conditional) and m0 (null) the scores differ by a constant, so that
guiding with scale w is exactly to have data of mean m0 + w (m - m0).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import grids
from diffax import guidance
from diffax import predictions
from diffax import samplers
from diffax import schedules

VAR, STEPS, BATCH = 0.2, 8, 4
SAMPLERS = dict(ddim=samplers.ddim(), heun=samplers.heun(), dpmpp_2m=samplers.dpmpp_2m())
COND = {'mean': jnp.array([[1., 0.5], [-1., 0.], [0.3, 0.3], [2., -1.]])}
NULL = {'mean': jnp.full((BATCH, 2), 0.25)}
X = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 2)), jnp.float32)


def exact(x, level, cond):
  total = level.alpha**2 * VAR + level.sigma**2
  x0 = cond['mean'] + level.alpha * VAR / total * (x - level.alpha * cond['mean'])
  return predictions.invert(x0, x, level)


def guided_mean(scale):
  return {'mean': NULL['mean'] + scale * (COND['mean'] - NULL['mean'])}


class Counted:
  """`exact`, noting at run time the batch it is called with."""

  def __init__(self):
    self.batches = []

  def __call__(self, x, level, cond):
    jax.debug.callback(lambda batch: self.batches.append(int(batch)), x.shape[0])
    return exact(x, level, cond)


def sampled(name, denoise, steps=STEPS):
  schedule = schedules.linear()

  @jax.jit
  def run(rows):
    return samplers.sample(SAMPLERS[name], denoise, rows, X)

  rows = SAMPLERS[name].plan(schedule, grids.karras(schedule, steps))
  out = np.asarray(run(rows))
  jax.effects_barrier()
  return out, rows['level']


@pytest.mark.parametrize('name', SAMPLERS)
def test_cfg(name):
  """In every step, both branches in one call of twice the batch."""
  network = Counted()
  out, levels = sampled(name, guidance.cfg(network, COND, NULL, 3.))
  want, _ = sampled(name, guidance.condition(exact, guided_mean(3.)))
  np.testing.assert_allclose(out, want, atol=1e-4)
  assert network.batches == [2 * BATCH] * len(levels.t)


@pytest.mark.parametrize('name', SAMPLERS)
def test_last_step_is_guided(name):
  """A single step is the last one too, and says the guided x0 at pure noise: the guided mean."""
  out, _ = sampled(name, guidance.cfg(exact, COND, NULL, 3.), steps=1)
  np.testing.assert_allclose(out, guided_mean(3.)['mean'], atol=1e-5)


def test_scale_1_is_no_guidance():
  out, levels = sampled('ddim', guidance.cfg(exact, COND, NULL, 1.))
  want, _ = sampled('ddim', guidance.condition(exact, COND))
  np.testing.assert_array_equal(out, want)
  network = Counted()
  sampled('ddim', guidance.cfg(network, COND, NULL, 1.))
  assert network.batches == [BATCH] * len(levels.t)


@pytest.mark.parametrize('name', SAMPLERS)
def test_interval(name):
  """Inside guided, outside not, and there the null branch is not computed."""
  low, high = 0.1, 3.
  network = Counted()
  out, levels = sampled(name, guidance.cfg(network, COND, NULL, 3., low, high))
  nsr = np.asarray(levels.sigma) / np.maximum(np.asarray(levels.alpha), 1e-30)
  inside = (low <= nsr) & (nsr <= high)
  assert 0 < inside.sum() < len(inside)
  assert sorted(network.batches) == sorted(np.where(inside, 2 * BATCH, BATCH).tolist())
  def by_hand(x, level):
    acts = (low <= level.nsr) & (level.nsr <= high)
    mean = jnp.where(acts, guided_mean(3.)['mean'], COND['mean'])
    return exact(x, level, {'mean': mean})
  np.testing.assert_allclose(out, sampled(name, by_hand)[0], atol=1e-4)


@pytest.mark.parametrize('bounds', [(), (0.1, 3.), (0.5, np.inf)])
def test_a_level_and_a_scale_an_example(bounds):
  """Each example by its own noise level; sigma / alpha of the four is 0.05, 1, 4 and infinite."""
  level = schedules.linear()(jnp.array([0.05 / 1.05, 0.5, 0.8, 1.])[:, None])
  scale = jnp.array([3., 2., 4., 1.5])[:, None]
  low, high = bounds or (0., np.inf)
  told = jax.jit(guidance.cfg(exact, COND, NULL, scale, *bounds))(X, level)
  inside = np.array([low <= 0.05, low <= 1 <= high, low <= 4 <= high, high == np.inf])[:, None]
  want = exact(X, level, guided_mean(jnp.where(inside, scale, 1.)))
  for got, true in zip(told[:2], want):
    np.testing.assert_allclose(got, true, atol=1e-5, rtol=1e-5)
  plain = exact(X, level, COND)
  np.testing.assert_allclose(told.x0[~inside[:, 0]], plain.x0[~inside[:, 0]], rtol=1e-6)


@pytest.mark.parametrize('bounds', [(), (0.1, 3.)])
def test_a_plain_x0_and_a_log_variance(bounds):
  """What a denoiser says besides x0 and eps is the conditional branch's; a plain x0 is enough."""
  level = schedules.linear()(0.5)
  x, cond, null = X[:1], *jax.tree.map(lambda a: a[:1], (COND, NULL))
  want = exact(x, level, jax.tree.map(lambda a: a[:1], guided_mean(3.)))
  plain = lambda x, level, cond: exact(x, level, cond).x0
  learned = lambda x, level, cond: exact(x, level, cond)._replace(logvar=cond['mean'])
  for denoise in (plain, learned):
    told = jax.jit(guidance.cfg(denoise, cond, null, 3., *bounds))(x, level)
    np.testing.assert_allclose(told.x0, want.x0, atol=1e-5)
    np.testing.assert_allclose(told.eps, want.eps, atol=1e-5)
  np.testing.assert_array_equal(told.logvar, cond['mean'])


def test_a_network_in_bfloat16():
  """Both branches of the interval speak the network's dtype."""
  def denoise(x, level, cond):
    said = exact(x, level, cond)
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16), said)
  told = jax.jit(guidance.cfg(denoise, COND, NULL, 3., 0.1, 3.))(X, schedules.linear()(0.5))
  assert told.x0.dtype == told.eps.dtype == jnp.bfloat16
