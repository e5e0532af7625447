"""One run, any mesh: losses, gradients and updates are the same; every example has its own key."""

import functools
import types

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
OVERRIDES = ('task.drop_cond=0.5', 'optimizer.name=sgd', 'optimizer.clip=0.',
             'learning_rate.name=constant_schedule', 'learning_rate.value=0.5', 'ema=()')
MODELS = {
  'dit': ('model.width=64', 'model.heads=4'),
  'unet': (
    'model.name=unet', 'model.width=16', 'model.multipliers=(1, 2)', 'model.blocks=2',
    'model.attention=(4,)', 'model.heads=1', 'model.head_width=8', 'model.classes=10',
  ),
  'edm2': (
    'model.name=edm2', 'model.width=16', 'model.multipliers=(1, 2)', 'model.blocks=2',
    'model.attention=(4,)', 'model.head=8', 'model.classes=10',
  ),
}
MESHES = {
  'one device': {}, 'data 8': dict(data=8), 'fsdp 8': dict(fsdp=8),
  'data 2, fsdp 4': dict(data=2, fsdp=4),
  'sequence 4': dict(sequence=4), 'tensor 4': dict(tensor=4),
  'fsdp 2, tensor 4': dict(fsdp=2, tensor=4), 'data 2, sequence 4': dict(data=2, sequence=4),
  'fsdp 2, sequence 2, tensor 2': dict(fsdp=2, sequence=2, tensor=2),
}
MICRO = {'dit': (1, 2, 4), 'unet': (1, 2), 'edm2': (1, 2)}
ALL = [(model, mesh, micro) for model in MODELS for mesh in MESHES for micro in MICRO[model]]
FEW = [
  ('dit', 'data 8', 2), ('dit', 'fsdp 8', 1), ('dit', 'data 2, fsdp 4', 4),
  ('dit', 'data 2, sequence 4', 1), ('dit', 'tensor 4', 1),
  ('dit', 'fsdp 2, sequence 2, tensor 2', 2), ('unet', 'fsdp 2, sequence 2, tensor 2', 1),
]
SPLIT = PartitionSpec(None, None, 'fsdp')


def build(mesh, micro=1, *more, model='dit'):
  axes = dict.fromkeys(sharding.AXES, 1) | MESHES[mesh]
  sizes = [f'mesh.{axis}={n}' for axis, n in axes.items()]
  return run_diffax.setup(
    *OVERRIDES, f'accumulate={micro}', *sizes, *MODELS[model], 'model.dropout=0.2', *more,
    count=int(np.prod(list(axes.values()))))


def begin(run):
  """A state whose parameters are far from the zeros a network begins with."""
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


@functools.cache
def alone(model):
  """The step on one device."""
  return one_step(build('one device', model=model))


def check(model, mesh, micro):
  state, metrics = one_step(build(mesh, micro, model=model))
  for name in ('loss', 'grad_norm'):
    assert float(metrics[name]) == pytest.approx(float(alone(model)[1][name]), rel=1e-5), name
  found, wanted = run_diffax.flat(state.params), run_diffax.flat(alone(model)[0].params)
  for key in wanted:
    np.testing.assert_allclose(found[key], wanted[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize('model, mesh, micro', FEW)
def test_step(model, mesh, micro):
  check(model, mesh, micro)


@pytest.mark.slow
@pytest.mark.parametrize('model, mesh, micro', [each for each in ALL if each not in FEW])
def test_every_step(model, mesh, micro):
  check(model, mesh, micro)


def test_times_and_noise():
  """Bit for bit the same on all meshes; dropout and dropped labels are on, and matter."""
  run = build('one device')
  _, losses, info = train.each_loss(run, begin(run))
  assert len(set(info['t'].tolist())) == len(losses)  # each its own
  run = build('data 2, fsdp 4')
  batch, other, there = train.each_loss(run, begin(run))
  np.testing.assert_allclose(other, losses, rtol=1e-4)
  for mesh in ('data 8', 'fsdp 8', 'data 2, fsdp 4'):
    run = build(mesh)
    draw = jax.jit(lambda state, batch: run.task.loss(  # noqa: B023
      state.params, state, batch, train.example_keys(0, state.step, 32))[1])
    with sharding.using(run.mesh):
      drawn = jax.device_get(draw(begin(run), batch))
    for name in ('t', 'noise'):
      np.testing.assert_array_equal(drawn[name], info[name])
      np.testing.assert_array_equal(there[name], info[name])
  for without in ('model.dropout=0.0', 'task.drop_cond=0.0'):
    run = build('one device', 1, without)
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

  wanted = sums('one device', 1)
  assert len(set(wanted)) == 3
  for micro in (1, 2, 4):
    assert sums(mesh, micro) == wanted


def test_parameters_are_split():
  for mesh, parts in ('fsdp 8', 8), ('data 2, fsdp 4', 4), ('data 8', 1):
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


@pytest.mark.parametrize('platform, variable', [('gpu', 'XLA_FLAGS'), ('tpu', 'LIBTPU_INIT_ARGS')])
def test_options_of_the_compiler(platform, variable, monkeypatch):
  """Those of the platform; what the environment says of one, wins."""
  cpus = sharding.make_mesh({'data': -1})  # by now XLA has read its flags
  monkeypatch.setenv('XLA_FLAGS', '')
  monkeypatch.delenv('LIBTPU_INIT_ARGS', raising=False)
  monkeypatch.setattr(sharding, '_known', lambda *_: True)
  mesh = types.SimpleNamespace(devices=np.array([[types.SimpleNamespace(platform=platform)]]))
  options = sharding.compiler_options(mesh)
  assert options == sharding.OPTIONS[platform] and options
  first, *rest = options
  monkeypatch.setenv(variable, f'--{rest[0] if rest else "other"}2=1 --{first}=7')
  assert list(sharding.compiler_options(mesh)) == rest
  assert sharding.compiler_options(cpus) == {}


def test_options_reach_the_compiler(tmp_path, monkeypatch):
  """Those that it has: of another version's there is a word, and the program."""
  mesh, said = sharding.make_mesh({'data': -1}), []
  options = {'xla_dump_to': str(tmp_path), 'xla_cpu_no_such_option': 1}
  monkeypatch.setattr(sharding, 'OPTIONS', {'cpu': options})
  monkeypatch.setattr(sharding.logging, 'warning', lambda form, *args: said.append(form % args))
  jax.clear_caches()  # a program that is there already is not written
  def answer(x):
    return x + 41
  with jax.set_mesh(mesh):
    assert sharding.jit(answer, mesh)(jnp.ones(8))[0] == 42
  assert any('answer' in path.name for path in tmp_path.iterdir())
  assert said == ['this version of XLA has no option xla_cpu_no_such_option: it is left out']
