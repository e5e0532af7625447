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
