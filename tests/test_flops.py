"""FLOPs counted by shapes: what is known on paper, and what devices can do."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest
import run_diffax

from diffax import chips
from diffax import config as configs
from diffax import flops
from diffax import train


def like(*shape):
  return jax.ShapeDtypeStruct(shape, 'float32')


def test_products_and_convolutions():
  assert flops.count(jnp.matmul, like(3, 5), like(5, 7)) == 2 * 3 * 5 * 7
  assert flops.count(jnp.matmul, like(4, 3, 5), like(4, 5, 7)) == 2 * 4 * 3 * 5 * 7
  conv = lambda x, k: jax.lax.conv_general_dilated(
    x, k, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  assert flops.count(conv, like(2, 8, 8, 3), like(3, 3, 3, 16)) == 2 * (2 * 4 * 4 * 16) * 27
  grouped = lambda x, k: jax.lax.conv_general_dilated(
    x, k, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=4)
  assert flops.count(grouped, like(1, 5, 5, 8), like(3, 3, 2, 8)) == 2 * (5 * 5 * 8) * 18
  assert flops.count(lambda x: jnp.exp(x).sum(), like(10)) == 0


def test_what_is_within():
  """Scans count their length, conditionals the dearer branch; jit and the like what they hold."""
  step = lambda x, _: (x @ x, None)
  one = 2 * 4**3
  assert flops.count(lambda x: jax.lax.scan(step, x, None, length=7)[0], like(4, 4)) == 7 * one
  assert flops.count(jax.checkpoint(jax.jit(lambda x: x @ x)), like(4, 4)) == one
  either = lambda x: jax.lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, x)
  assert flops.count(either, like(4, 4)) == 2 * one
  assert flops.count(jax.vmap(lambda x: x @ x), like(5, 4, 4)) == 5 * one
  own = jax.custom_vjp(lambda x: x @ x)
  own.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x,))
  assert flops.count(own, like(4, 4)) == one


def test_parts_of_a_mesh():
  """Each device's part counts as often as there are devices on the axes that are split."""
  mesh = jax.make_mesh((2, 4), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  for axes, spec in (({'a'}, P('a')), ({'a', 'b'}, P(('a', 'b')))):
    split = jax.shard_map(
      lambda x, w: x @ w, mesh=mesh, in_specs=(spec, P()), out_specs=spec, axis_names=axes)
    assert flops.count(split, like(16, 4), like(4, 4)) == 2 * 16 * 4 * 4


def test_space_that_is_split():
  """A U-Net's rows over two devices: of small pictures those that they lend each other count, too.
  """
  path = run_diffax.ROOT / 'configs' / 'fashion_mnist_unet.py:smoke'

  def counted(*words):
    config = configs.override(configs.load(path), [f'--config.{word}' for word in words])
    run = train.setup(config, jax.devices())
    traced, = train.traced_steps(run, 'xla').values()
    return sum(flops.of(traced.jaxpr).values()), train.model_flops(run)

  (rows, model), (both, same) = counted('mesh.data=8'), counted('mesh.data=4', 'mesh.sequence=2')
  assert rows <= both < 1.3 * rows and model == same <= both


def test_loops_that_data_end():
  loop = lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)
  with pytest.raises(ValueError, match='as often as the data say'):
    flops.count(loop, like(4, 4))
  assert not flops.count(lambda x: jax.lax.while_loop(jnp.any, jnp.sin, x), like(4))


def transformer(width, depth, tokens, mlp=4, patch=4, channels=1):
  """A DiT's forward pass of one example, on paper."""
  each = tokens * width**2 * (4 + 2 * mlp) + 2 * tokens**2 * width + 6 * width**2
  ends = tokens * width * 2 * patch * channels + (256 + width) * width + 2 * width**2
  return 2 * (depth * each + ends)


def test_of_a_training_step():
  """Three forward passes of the batch: no recomputation, whatever the policy and accumulation."""
  wanted = 3 * 32 * transformer(32, 2, 16)
  for overrides in ((), ('model.remat=nothing_saveable', 'accumulate=2')):
    assert train.model_flops(run_diffax.setup(*overrides)) == wanted
  doubled = train.model_flops(run_diffax.setup('task.self_condition=0.5'))
  assert doubled > 1.9 * wanted  # the estimate that it is shown is a pass of its own


@pytest.mark.parametrize('kind, wanted', [
  ('NVIDIA H200', 989e12), ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12),
  ('NVIDIA A100-SXM4-40GB', 312e12), ('TPU v5 lite', 197e12), ('TPU v5', 459e12),
  ('TPU v6 lite', 918e12), ('TPU v4', 275e12), ('cpu', None), ('NVIDIA T4', None),
])
def test_peaks(kind, wanted):
  assert chips.peak(kind) == wanted
