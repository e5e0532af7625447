"""Training rules: kernels held at unit variance, and the inverse square root learning rate."""

import jax
from jax.sharding import NamedSharding, PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import run_diffax

from diffax import optim
from diffax.build import ConfigError


def optimizer(*overrides):
  return optim.optimizer(run_diffax.config('learning_rate=0.3', 'optimizer.clip=0.', *overrides))


def draw(*shape):
  return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


def tree():
  return {'net': {
    'one': {'kernel': draw(6, 4)}, 'stack': {'kernel': draw(3, 6, 4), 'gain': draw(3)},
    'bias': draw(4)}}


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'lion'])
def test_filters_keep_unit_variance(name):
  """Whatever the optimizer and however often; other parameters move as they do without."""
  tx, _ = optimizer(f'optimizer.name={name}', r'optimizer.unit_kernels=kernel$')
  plain, _ = optimizer(f'optimizer.name={name}')
  params, free = tree(), tree()
  state, other = tx.init(params), plain.init(free)
  for i in range(5):
    grads = jax.tree.map(lambda p: jnp.cos(p + i), tree())  # noqa: B023
    updates, state = tx.update(grads, state, params)
    theirs, other = plain.update(grads, other, free)
    params, free = (optax.apply_updates(p, u) for p, u in ((params, updates), (free, theirs)))
    for kernel in (params['net']['one']['kernel'], params['net']['stack']['kernel']):
      np.testing.assert_allclose(np.linalg.norm(kernel, axis=-2), 6**0.5, rtol=1e-6)
  for key in ('bias', 'stack'):
    found, wanted = (jax.tree.leaves(p['net'][key])[0] for p in (params, free))
    np.testing.assert_array_equal(found, wanted)


def test_filters_turn():
  """Gradient descent moves each filter towards where it goes without the rule, and 0 stays put."""
  tx, _ = optimizer('optimizer.name=sgd', 'optimizer.unit_kernels=one/kernel')
  params = tree()
  params['net']['one']['kernel'] = jnp.asarray([[2.0, 0.0], [0.0, 2.0]])  # filters of norm 2
  grads = jax.tree.map(jnp.zeros_like, params)
  grads['net']['one']['kernel'] = jnp.asarray([[0.0, 0.0], [-20 / 3, 0.0]])  # by 2 at a rate of 0.3
  updates, _ = tx.update(grads, tx.init(params), params)
  kernel = optax.apply_updates(params, updates)['net']['one']['kernel']
  np.testing.assert_allclose(kernel, [[1.0, 0.0], [1.0, 2**0.5]], rtol=1e-6)
  np.testing.assert_array_equal(updates['net']['stack']['kernel'], 0)  # not matched


def test_on_a_mesh():
  """Filters split over devices come out as whole ones do."""
  tx = optim.unit_kernels('kernel')
  params = {'kernel': draw(64, 5)}
  updates = {'kernel': 0.1 * draw(64, 5)[::-1]}
  whole, _ = tx.update(updates, tx.init(params), params)
  split = NamedSharding(jax.make_mesh((8,), ('fsdp',)), P('fsdp', None))
  parts, _ = jax.jit(lambda u, p: tx.update(u, tx.init(p), p), out_shardings=(
    {'kernel': split}, optax.EmptyState()))(*jax.device_put((updates, params), split))
  assert parts['kernel'].sharding == split
  np.testing.assert_allclose(parts['kernel'], whole['kernel'], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('pattern, says', [
  ('kernels', "'kernels' matches no parameter; their paths end in bias, gain, kernel"),
  ('gain', r"'net/stack/gain' of shape \(3,\), which is no kernel"),
  ('kernel(', 'unit_kernels=.*is no pattern'),
])
def test_patterns_that_cannot_be(pattern, says):
  with pytest.raises(ConfigError, match=says):
    optim.unit_kernels(pattern).init(tree())


def test_setup_says_so():
  """Before any device work, in the config's terms."""
  with pytest.raises(ConfigError, match="optimizer.unit_kernels='weights' matches no parameter"):
    run_diffax.setup('optimizer.unit_kernels=weights')


RATE = ('learning_rate.name=diffax.optim.inverse_sqrt', 'learning_rate.peak_value=0.5',
        'learning_rate.reference_steps=100')


@pytest.mark.parametrize('warmup, values', [
  (10, {0: 0, 5: 0.25, 10: 0.5, 100: 0.5, 400: 0.25, 10_000: 0.05}),
  (0, {0: 0.5, 100: 0.5, 400: 0.25}),
  (400, {200: 0.25 / 2**0.5, 400: 0.25, 1600: 0.125}),
])
def test_inverse_sqrt(warmup, values):
  config = run_diffax.config(*RATE, f'learning_rate.warmup_steps={warmup}')
  _, rate = optim.optimizer(config)
  for step, value in values.items():
    assert float(rate(step)) == pytest.approx(value, abs=1e-7)
    assert float(jax.jit(rate)(step)) == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize('wrong', ['reference_steps=0', 'warmup_steps=-1'])
def test_inverse_sqrt_errors(wrong):
  with pytest.raises(ConfigError, match=f'learning_rate.*{wrong} is less than'):
    optim.optimizer(run_diffax.config(*RATE, f'learning_rate.{wrong}'))
