"""Averages of parameters against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import ema

DECAYS = (0., 0.5, 0.99, 0.9999)


def test_names():
  assert ema.names([0.9999, 0.5, 0]) == ('0.9999', '0.5', '0')
  fine = 0.99999999
  assert [float(name) for name in ema.names([fine])] == [fine]
  for wrong in (1., -0.1, 1.5):
    with pytest.raises(ValueError, match='decay'):
      ema.names([wrong])


def test_starts_at_the_parameters():
  """As copies: a donated state may free the parameters' own buffers."""
  params = {'w': jnp.arange(3.)}
  averages = ema.init(params, DECAYS)
  assert list(averages) == list(ema.names(DECAYS))
  for tree in averages.values():
    np.testing.assert_array_equal(tree['w'], params['w'])
    assert tree['w'].unsafe_buffer_pointer() != params['w'].unsafe_buffer_pointer()


def test_constant_parameters():
  """From e_0 to constant p: e_n - p = (e_0 - p) prod d_i, and prod (1 + i) / (10 + i) telescopes.

  While the warm-up holds, prod over i < n is 9! n! / (n + 9)!: all of these for decay 0.9999.
  """
  start, end, n = jnp.array([1., -2.]), jnp.array([3., 5.]), 30
  update = jax.jit(lambda averages, count: ema.update(averages, {'w': end}, count))
  averages = ema.init({'w': start}, DECAYS)
  for count in range(n):
    averages = update(averages, count)
  warm = lambda n: np.prod([(i + 1) / (n + i + 1) for i in range(9)])
  left = {0.: 0., 0.5: warm(8) * 0.5**(n - 8), 0.99: warm(n), 0.9999: warm(n)}  # 1/2 at i = 8
  for name, decay in zip(ema.names(DECAYS), DECAYS):
    np.testing.assert_allclose(averages[name]['w'] - end, left[decay] * (start - end), atol=1e-6)


def test_long_average_is_exponential():
  """Far beyond the warm-up a ramp is followed at a distance of decay / (1 - decay)."""
  update = jax.jit(lambda averages, count: ema.update(averages, {'w': count + 0.}, count))
  def many(averages):
    return jax.lax.fori_loop(0, 3000, lambda i, a: update(a, jnp.float32(i)), averages)
  averages = jax.jit(many)(ema.init({'w': jnp.zeros(())}, [0.9, 0.99]))
  np.testing.assert_allclose(averages['0.9']['w'], 2999 - 9., rtol=1e-4)
  np.testing.assert_allclose(averages['0.99']['w'], 2999 - 99., rtol=1e-4)


# --- powers of time -------------------------------------------------------------------------------

POWERS = ('power_0.05', 'power_0.1')


def test_names_of_powers():
  assert ema.names(['power_0.050', 0.99, 'power_0.1']) == ('power_0.05', '0.99', 'power_0.1')
  assert ema.powers(['0.99', *POWERS]) == list(POWERS)
  assert ema.width('power_0.05') == 0.05 and ema.width('0.99') is None
  fine = 'power_0.123456789'
  assert ema.names([fine]) == (fine,)


@pytest.mark.parametrize('wrong, says', [
  ('power_0.3', r'width 0.3 is outside \(0, 0.2887\)'),
  ('power_0', 'width 0.0 is outside'),
  ('power_-0.1', 'width -0.1 is outside'),
  ('power_nan', 'width nan is outside'),
  ('power_wide', "'power_wide' tells no number"),
  ('0.99', "'0.99' is no average: say a number, as 0.999, or 'power_S'"),
  ('powers', "'powers' is no average"),
])
def test_names_that_are_none(wrong, says):
  with pytest.raises(ValueError, match=says):
    ema.names([wrong])


@pytest.mark.parametrize('width, gamma', [  # Karras et al. 2024, section 3: 'gamma = 6.94, 16.97'
  (0.10, 6.94), (0.05, 16.97)])
def test_gamma(width, gamma):
  assert ema.gamma(width) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize('width', [0.01, 0.05, 0.1, 0.2, 0.28])
def test_profile_is_as_wide_as_it_says(width):
  """Measured: it sums to 1, and its deviation over the length of the run is the width."""
  step = 20_000
  k = np.arange(1, step + 5)
  weight = ema.profile(k, step, width)
  assert weight.sum() == pytest.approx(1, abs=1e-12) and not weight[step:].any()
  mean = weight @ k
  assert (weight @ (k - mean)**2)**0.5 / step == pytest.approx(width, rel=1e-3)


def trajectory(steps, count=40):
  """Parameters [steps count] of a training run: a drift that slows, and a walk."""
  rng = np.random.default_rng(0)
  walk = np.cumsum(rng.standard_normal((steps, count)), axis=0) / steps**0.5
  return (np.log1p(np.arange(steps))[:, None] * rng.standard_normal(count) + walk)


def follow(path, averages, stops):
  """{(step, name): average} of `update` run along a trajectory, at each of the stops."""
  update = jax.jit(ema.update)
  tree, found = ema.init({'w': jnp.full(path.shape[1], 7.0)}, averages), {}
  for count, params in enumerate(np.float32(path)):
    tree = update(tree, {'w': params}, count)
    if count + 1 in stops:
      found |= {(count + 1, name): tree[name] for name in tree}
  return found


def truth(path, step, width):
  """The average by its weights, in float64."""
  return ema.profile(np.arange(1, len(path) + 1), step, width) @ path


def test_update_follows_the_profile():
  """The recursion against the sum over all parameters; what came before training is forgotten."""
  path = trajectory(300)
  found = follow(path, [*POWERS, 'power_0.25', 0.9], {1, 2, 30, 300})
  for (step, name), tree in found.items():
    if ema.width(name):
      want = truth(path, step, ema.width(name))
      np.testing.assert_allclose(tree['w'], want, atol=2e-5 * np.abs(path).max())
  np.testing.assert_allclose(found[1, 'power_0.05']['w'], path[0], atol=1e-6)  # not 7


def test_update_of_a_long_run():
  """After 2^20 updates float32 tells 1 - d to its last digits: here (gamma + 1) / t = 1.714e-5."""
  share = ema.update({'power_0.05': jnp.zeros(())}, jnp.ones(()), jnp.asarray(2**20 - 1))
  assert float(share['power_0.05']) == pytest.approx((ema.gamma(0.05) + 1) / 2**20, rel=2e-5)


@pytest.mark.parametrize('times, inside, anywhere', [(8, 0.08, 0.5), (16, 0.01, 0.15)])
def test_reconstruct(times, inside, anywhere):
  """Any width of an average from those of two widths stored `times` times, against the true one.

  Errors over how far the true one is from the last parameters: those would score 1.
  """
  steps = 2048
  path = trajectory(steps)
  found = follow(path, POWERS, [steps * i // times for i in range(1, times + 1)])
  stored = [(step, ema.width(name)) for step, name in found]
  k = np.arange(1, steps + 1)
  basis = np.stack([ema.profile(k, *one) for one in stored])
  for width in (0.04, 0.05, 0.07, 0.10, 0.13, 0.2, 0.25):
    x, true = ema.weights(stored, (steps, width)), truth(path, steps, width)
    made = ema.reconstruct(iter(found.values()), x)['w']
    assert made.dtype == np.float32
    error = np.linalg.norm(made - true) / np.linalg.norm(true - path[-1])
    assert error < (inside if 0.05 <= width <= 0.13 else anywhere), width
    if width in (0.05, 0.10):
      assert error < 1e-4
    if 0.05 <= width <= 0.13:
      assert np.corrcoef(x @ basis, ema.profile(k, steps, width))[0, 1] > 0.999


def test_stored_averages_are_themselves():
  stored = [(step, width) for step in (500, 1000, 1500) for width in (0.05, 0.1)]
  for i, one in enumerate(stored):
    np.testing.assert_allclose(ema.weights(stored, one), np.eye(6)[i], atol=1e-12)
  np.testing.assert_allclose(ema.weights(stored[:1], (500, 0.05)), [1])
  # one of two alike, or both by half
  np.testing.assert_allclose(sum(ema.weights(2 * stored[:1], (500, 0.05))), 1)


def test_weights_of_a_long_run():
  """Chunks add up: what they are made of is the same for a run ten times as long, finely stored."""
  curves = lambda steps: [(steps * i // 20, w) for i in range(1, 21) for w in (0.05, 0.1)]
  short, long = (ema.weights(curves(n), (n, 0.15)) for n in (20_000, 200_000))
  np.testing.assert_allclose(long, short, atol=2e-3 * np.abs(short).max())


@pytest.mark.parametrize('stored, target, says', [
  ([], (10, 0.1), 'no stored averages'),
  ([(10, 0.1)], (11, 0.1), 'at step 11 from those stored at steps 10 to 10'),
  ([(10, 0.1)], (0, 0.1), 'at step 0'),
  ([(0, 0.1), (10, 0.1)], (10, 0.1), 'steps 0 to 10'),
  ([(10, 0.1)], (10, 0.3), 'width 0.3 is outside'),
  ([(10, 0.0)], (10, 0.1), 'width 0.0 is outside'),
])
def test_weights_that_cannot_be(stored, target, says):
  with pytest.raises(ValueError, match=says):
    ema.weights(stored, target)


def test_reconstruct_sums_in_float64():
  """Coefficients of both signs cancel: float32 holds neither 1/4 nor 3 beside 2^30."""
  tree = lambda value: {'a': np.float32([value]), 'b': jnp.ones((), jnp.bfloat16)}
  made = ema.reconstruct([tree(1), tree(3), tree(1)], np.array([2.0**30 + 0.25, 1.0, -(2.0**30)]))
  np.testing.assert_array_equal(made['a'], [3.25])
  assert made['a'].dtype == np.float32 and made['b'].dtype == jnp.bfloat16 and made['b'].shape == ()
  for trees, coefficients in (([], []), ([tree(1)], [1.0, 2.0])):
    with pytest.raises(ValueError):
      ema.reconstruct(trees, coefficients)
