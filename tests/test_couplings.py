"""Noise and pairing, input perturbation and self-conditioning, against what each should do."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from diffax import couplings
from diffax import grids
from diffax import losses
from diffax import predictions
from diffax import samplers
from diffax import schedules


def keys_of(count, seed=0):
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def pair(count, shape, seed=0):
  return np.random.default_rng(seed).normal(size=(2, count, *shape)).astype(np.float32)


def test_optimal_transport_is_exact():
  """The cost of scipy's assignment, with each noise once."""
  for count, shape in ((64, (2,)), (37, (4, 4, 3)), (1, (2,))):
    x0, eps = pair(count, shape)
    paired = np.asarray(jax.jit(couplings.optimal_transport())(keys_of(count), x0, eps))
    flat = lambda a: einops.rearrange(a.astype(float), 'b ... -> b (...)')
    cost = ((flat(x0)[:, None] - flat(eps)[None])**2).sum(-1)
    least = cost[scipy.optimize.linear_sum_assignment(cost)].sum()
    np.testing.assert_allclose(((flat(x0) - flat(paired))**2).sum(), least, rtol=1e-6)
    np.testing.assert_array_equal(
        np.sort(flat(paired), axis=0), np.sort(flat(eps), axis=0))


def test_optimal_transport_finds_a_permutation():
  """Of noise that lies right beside the data in another order, for lines cross nowhere."""
  x0, off = pair(50, (3,))
  order = np.random.default_rng(1).permutation(50)
  eps = (x0 + 1e-3 * off)[order]
  paired = couplings.optimal_transport()(None, x0, eps)
  np.testing.assert_allclose(paired, x0 + 1e-3 * off, atol=1e-6)


def test_offset():
  """Covariance strength^2 of any two places of a channel, none between channels; not scaled."""
  x0, eps = pair(20000, (2, 2, 3))
  noise = np.asarray(couplings.offset(0.5)(keys_of(20000), x0, eps))
  found = np.cov(einops.rearrange(noise, 'b h w c -> (h w c) b'))
  same = np.kron(np.ones((4, 4)), np.eye(3))  # places, channels
  np.testing.assert_allclose(found, np.eye(12) + 0.25 * same, atol=0.05)
  np.testing.assert_array_equal(couplings.independent()(keys_of(20000), x0, eps), eps)


def test_pyramid():
  """Of 2 x 2, eps + d times one number a channel, scaled back; of more, unit variance in the mean.

  And neighbours alike, the more the larger the discount; channels independent.
  """
  couple = jax.jit(lambda discount, eps: couplings.pyramid(discount)(keys_of(len(eps)), None, eps))
  _, eps = pair(20000, (2, 2, 1))
  found = np.cov(einops.rearrange(np.asarray(couple(0.5, eps)), 'b h w c -> (h w c) b'))
  np.testing.assert_allclose(found, (np.eye(4) + 0.25) / 1.25, atol=0.04)

  _, eps = pair(4000, (8, 8, 2))
  near = []
  for discount in (0., 0.5, 0.9):
    noise = np.asarray(couple(discount, eps))
    np.testing.assert_allclose((noise**2).mean(), 1., atol=0.03)
    np.testing.assert_allclose((noise[..., 0] * noise[..., 1]).mean(), 0., atol=0.03)
    near.append((noise[:, 1:] * noise[:, :-1]).mean())
  assert abs(near[0]) < 0.01 and near[0] + 0.1 < near[1] < near[2] - 0.1


def test_an_example_alone_has_the_noise_it_has_among_many():
  x0, eps = pair(6, (4, 4, 3))
  keys = keys_of(6)
  both = jax.jit(lambda *given: [couplings.offset()(*given), couplings.pyramid()(*given)])
  for many, alone in zip(both(keys, x0, eps), both(keys[4:5], x0[4:5], eps[4:5]), strict=True):
    np.testing.assert_allclose(alone, many[4:5], atol=1e-6)
    assert not np.allclose(many[0] - eps[0], many[1] - eps[1], atol=1e-2)


def test_perturb():
  """The network sees noise of variance 1 + gamma^2 and is asked for eps itself."""
  schedule = schedules.cosine()
  prediction = predictions.eps(schedule)
  x0, eps = pair(4, (5000,))
  t = jnp.array([0.1, 0.3, 0.6, 0.9])
  seen = []

  def predict(x, level):
    seen.append(np.asarray((x - level.alpha * x0) / level.sigma))
    return jnp.asarray(eps)  # the answer that the loss wants

  shown = couplings.perturb(predict, keys_of(4), gamma=0.5)
  loss = losses.diffusion_loss(shown, schedule, prediction, losses.uniform(), x0, eps, t)
  np.testing.assert_array_equal(loss, 0.)
  off = seen[0] - eps
  np.testing.assert_allclose(off.std(1), 0.5, rtol=0.05)
  np.testing.assert_allclose((off * eps).mean(1), 0., atol=0.03)


def test_self_condition():
  """What is shown is its own first estimate for the share of examples, 0 for the others."""
  schedule = schedules.cosine()
  prediction = predictions.v(schedule)
  x, _ = pair(400, (3,))
  level = schedule(jnp.full((400, 1), 0.4))

  def answer(weight, rate):
    predict = lambda x, level, before: weight * x + 10. * before
    return couplings.self_condition(predict, prediction, keys_of(400), rate)(x, level)

  first = predictions.solve(prediction, 0.3 * x, x, level).x0
  for rate in (0., 0.5, 1.):
    out = np.asarray(answer(0.3, rate))
    told = np.isclose(out, 0.3 * x + 10 * first, atol=1e-4).all(1)
    alone = np.isclose(out, 0.3 * x, atol=1e-6).all(1)
    assert (told ^ alone).all() and abs(told.mean() - rate) < 0.1
  slope = jax.jacfwd(lambda weight: answer(weight, 1.))(0.3)
  np.testing.assert_allclose(slope, x, rtol=1e-6)  # none through what is shown


def test_remember():
  """While sampling each call is shown the x0 of the call before, the first 0."""
  schedule = schedules.linear()
  ts = grids.uniform(schedule, 5)
  sampler = samplers.ddim()
  count = lambda x, level, before: before + 1.  # says how often it was asked
  rows = sampler.plan(schedule, ts)
  for dtype in (jnp.float32, jnp.bfloat16):
    x = samplers.sample(sampler, couplings.remember(count), rows, jnp.zeros((2, 3), dtype))
    assert x.dtype == dtype
    np.testing.assert_allclose(x.astype(float), 5.)  # the last x0 is where it arrives
