"""One run, any mesh: losses, gradients and updates are the same; every example has its own key."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest
import run_diffax

from diffax import sharding
from diffax import train
from diffax.build import ConfigError

# Dropout and dropped conditions, so that their keys are tested too; sgd, for Adam scales rounding.
OVERRIDES = ('model.dropout=0.2', 'task.drop_cond=0.5', 'optimizer.name=sgd', 'optimizer.clip=0.',
             'learning_rate.name=constant_schedule', 'learning_rate.value=0.5', 'ema=()')
MESHES = {'1': (1, 1, 1), 'data 8': (8, 8, 1), 'fsdp 8': (8, 1, 8), '2x4': (8, 2, 4)}
FEW = [('data 8', 2), ('fsdp 8', 1), ('2x4', 4)]
SPLIT = PartitionSpec(None, None, 'fsdp')
ALL = [(mesh, micro) for mesh in MESHES for micro in (1, 2, 4)]


def build(mesh, micro=1, *more):
  count, data, fsdp = MESHES[mesh]
  return run_diffax.setup(
    *OVERRIDES, f'accumulate={micro}', f'mesh.data={data}', f'mesh.fsdp={fsdp}', *more, count=count)


def begin(run):
  """A state whose parameters are far from the zeros a DiT begins with."""
  def noise(path, x):
    seed = sum(map(ord, sharding.name(path)))
    return 0.1 * np.random.default_rng(seed).standard_normal(x.shape).astype(x.dtype)
  params = jax.tree_util.tree_map_with_path(noise, run.like.params)
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), run.like).replace(params=params)
  return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, run.like)


def one_step(run):
  batches = train.batches(run, 0)
  state, metrics = train.compile_step(run)(begin(run), next(batches))
  batches.close()
  return state, metrics


@pytest.fixture(scope='module')
def alone():
  """The step on one device."""
  return one_step(build('1'))


def check(mesh, micro, alone):
  state, metrics = one_step(build(mesh, micro))
  for name in ('loss', 'grad_norm'):
    assert float(metrics[name]) == pytest.approx(float(alone[1][name]), rel=1e-5), name
  found, wanted = run_diffax.flat(state.params), run_diffax.flat(alone[0].params)
  for key in wanted:
    np.testing.assert_allclose(found[key], wanted[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize('mesh, micro', FEW)
def test_step(mesh, micro, alone):
  check(mesh, micro, alone)


@pytest.mark.slow
@pytest.mark.parametrize('mesh, micro', [pair for pair in ALL if pair not in FEW])
def test_every_step(mesh, micro, alone):
  check(mesh, micro, alone)


def test_times_and_noise():
  """Bit for bit the same on all meshes; dropout and dropped labels are on, and matter."""
  run = build('1')
  _, losses, info = train.each_loss(run, begin(run))
  assert len(set(info['t'].tolist())) == len(losses)  # each its own
  run = build('2x4')
  batch, other, there = train.each_loss(run, begin(run))
  np.testing.assert_allclose(other, losses, rtol=1e-4)
  for mesh in ('data 8', 'fsdp 8', '2x4'):
    run = build(mesh)
    draw = jax.jit(lambda state, batch: run.task.loss(  # noqa: B023
      state.params, state, batch, train.example_keys(0, state.step, 32))[1])
    with sharding.using(run.mesh):
      drawn = jax.device_get(draw(begin(run), batch))
    for name in ('t', 'noise'):
      np.testing.assert_array_equal(drawn[name], info[name])
      np.testing.assert_array_equal(there[name], info[name])
  for without in ('model.dropout=0.0', 'task.drop_cond=0.0'):
    run = build('1', 1, without)
    _, other, _ = train.each_loss(run, begin(run))
    assert np.abs(other - losses).max() > 1e-3, without


@pytest.mark.parametrize('mesh', MESHES)
def test_keys(mesh):
  """Whole numbers drawn by key, times the example's label, sum exactly: so keys and examples are
  paired alike under any accumulation, in every step."""
  def loss(params, state, batch, keys):
    drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, 1000))(keys)
    return (drawn * batch['label']).astype(jnp.float32) + 0 * params.sum(), {}

  def sums(mesh, micro):
    run = build(mesh, micro)
    tx = run.tx
    place = sharding.replicated(run.mesh)
    params = jax.device_put(jnp.zeros(3), place)
    state = train.State(
      step=jnp.zeros((), jnp.int32), params=params, ema={}, opt=tx.init(params),
      sums={k: jnp.zeros(()) for k in run.like.sums}, bad=jnp.zeros((), bool))
    state = jax.tree.map(lambda x: jax.device_put(x, place), state)
    step = jax.jit(train.make_step(loss, tx, run.rate, run.config | {'log_every': 1}))
    batches, found = train.batches(run, 0), []
    with sharding.using(run.mesh):
      for _ in range(3):
        state, metrics = step(state, next(batches))
        found.append(float(metrics['loss']) * 32)
    batches.close()
    return found

  wanted = sums('1', 1)
  assert len(set(wanted)) == 3
  for micro in (1, 2, 4):
    assert sums(mesh, micro) == wanted


def test_parameters_are_split():
  for mesh, parts in ('fsdp 8', 8), ('2x4', 4), ('data 8', 1):
    like = build(mesh).like
    kernel = like.params['net']['blocks']['mlp_in']['kernel']
    assert np.prod(kernel.sharding.shard_shape(kernel.shape)) == kernel.size // parts
    bias = like.params['net']['time_in']['bias']
    assert bias.sharding.shard_shape(bias.shape) == bias.shape  # small ones stay whole


def test_state_lies_like_the_parameters():
  """Moments and averages lie as their parameters do; rules by path are obeyed."""
  run = run_diffax.setup('mesh.fsdp=8', 'mesh.data=1', "sharding=(('mlp_in/kernel', (None, None,"
                         " 'fsdp')), ('mlp_out/kernel', ()), ('.*', 'fsdp'))", count=8)
  specs = {k: v.sharding.spec for k, v in _flat(run.like).items()}
  for part in ('params/', 'ema/0.995/'):
    assert specs[f'{part}net/blocks/mlp_in/kernel'] == SPLIT
    assert specs[f'{part}net/blocks/mlp_out/kernel'] == PartitionSpec()
  moments = [v for k, v in specs.items() if k.startswith('opt/') and 'mlp_in/kernel' in k]
  assert moments == [SPLIT] * 2


def _flat(tree):
  return {sharding.name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize('rules, said', [
  ("(('kernel', 'fsdp'),)", 'no rule matches'),
  ("(('nosuch', 'fsdp'), ('.*', 'fsdp'))", 'nosuch'),
  ("(('time_in/bias', ('data', 'fsdp')), ('.*', 'fsdp'))", 'does not fit'),
])
def test_rules_that_are_wrong(rules, said):
  with pytest.raises(ConfigError, match=said):
    run_diffax.setup(f'sharding={rules}', count=8)


@pytest.mark.parametrize('axes', [
  dict(data=3, fsdp=1), dict(data=-1, fsdp=-1), dict(data=-1, fsdp=16), dict(data=0, fsdp=8),
  dict(data=-1, fsdp=3)])
def test_mesh_that_does_not_fit(axes):
  with pytest.raises(ConfigError, match='8 devices'):
    sharding.make_mesh(axes)
