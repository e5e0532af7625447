"""The training step and its loop: trouble, optimizers, warm starts, signals."""

import gzip
import json
import os
import shutil
import signal

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import run_diffax

from diffax import checkpoint
from diffax import optim
from diffax import sample
from diffax import samplers
from diffax import sharding
from diffax import train
from diffax.evals import Evaluation
from diffax.build import ConfigError

# --- the step, on a toy: loss |w - label|^2 of each example ---------------------------------------


def toy_loss(params, state, batch, keys):
  del state, keys
  return (params['w'].sum() - batch['label'])**2, {}


def toy(loss=toy_loss, log_every=1, tx=None, w=(0.0, 0.0)):
  """(jitted step of batches of 4, state)."""
  tx = tx or optax.adam(0.1)
  params = {'w': jnp.asarray(w)}
  config = dict(seed=0, batch_size=4, accumulate=1, log_every=log_every)
  state = train.State(
    step=jnp.zeros((), jnp.int32), params=params, ema={'0.5': params}, opt=tx.init(params),
    sums={'loss': jnp.zeros(()), 'grad_norm': jnp.zeros(()), 'steps': jnp.zeros(())},
    bad=jnp.zeros((), bool))
  return jax.jit(train.make_step(loss, tx, lambda step: 0.1, config)), state


def batch(*labels):
  return {'label': jnp.asarray(labels, jnp.float32), 'index': jnp.arange(4)}


GOOD = batch(1, 2, 3, 4)


def sqrt_of_zero(params, state, batch, keys):
  """Finite where label is 0, with a gradient that is not."""
  return jnp.sqrt(jnp.abs(params['w'].sum() * batch['label'])), {}


@pytest.mark.parametrize('loss, bad', [
  (toy_loss, batch(1, jnp.nan, 3, 4)),
  (toy_loss, batch(1, jnp.inf, 3, 4)),
  (sqrt_of_zero, batch(1, 0, 3, 4)),
], ids=['nan', 'inf', 'gradient alone'])
def test_not_finite(loss, bad):
  """The state stands still, bit for bit, and is flagged from then on."""
  step, state = toy(loss, w=(0.5, 0.25))
  before, metrics = step(state, GOOD)
  assert not metrics['bad'] and before.step == 1
  assert not np.array_equal(before.params['w'], state.params['w'])
  after, metrics = step(before, bad)
  if loss is sqrt_of_zero:
    assert np.isfinite(metrics['loss']) and not np.isfinite(metrics['grad_norm'])
  for now in (after, step(after, GOOD)[0]):  # sticky
    assert now.bad
    run_diffax.assert_same(
      run_diffax.flat(now.replace(bad=0)), run_diffax.flat(before.replace(bad=0)))
  assert step(after, GOOD)[1]['bad']


def test_carried_on():
  """What a task carries on sees each step's whole batch once, in order, and no bad step's."""
  def loss(params, state, batch, keys):
    losses, _ = toy_loss(params, state, batch, keys)
    return losses + batch['more'], {'seen': batch['label']}

  def prepare(params, state, batch, keys):
    return {**batch, 'more': state.extra['last'].sum() + jnp.zeros(4)}

  def carry(extra, info):
    return {'last': info['seen'], 'count': extra['count'] + 1}

  _, state = toy(tx=optax.sgd(0.1))
  state = state.replace(extra={'last': jnp.zeros(4), 'count': jnp.zeros((), jnp.int32)})
  for micro in 1, 2:
    config = dict(seed=0, batch_size=4, accumulate=micro, log_every=1)
    step = jax.jit(train.make_step(
      loss, optax.sgd(0.1), lambda step: 0.1, config, prepare, carry))
    one, _ = step(state, GOOD)
    np.testing.assert_array_equal(one.extra['last'], GOOD['label'])
    two, metrics = step(one, batch(0, 0, 0, 0))
    assert float(metrics['loss']) == pytest.approx(1 + 10)  # w sums to 1 by now
    bad, _ = step(two, batch(1, jnp.nan, 3, 4))
    assert bad.bad and int(bad.extra['count']) == 2
    np.testing.assert_array_equal(bad.extra['last'], np.zeros(4))


def test_known_step():
  """Loss, gradient norm, descent and average, by hand."""
  step, state = toy(tx=optax.sgd(0.1), w=(0.0, 0.0))
  state, metrics = step(state, GOOD)
  assert float(metrics['loss']) == pytest.approx(7.5)  # mean of 1, 4, 9, 16
  assert float(metrics['grad_norm']) == pytest.approx(np.hypot(5, 5))
  np.testing.assert_allclose(state.params['w'], [0.5, 0.5], rtol=1e-6)
  np.testing.assert_allclose(state.ema['0.5']['w'], [0.45, 0.45], rtol=1e-6)  # d = 1 / 10 at first


@pytest.mark.parametrize('changes', [{0: 3}, {0: 3, 10: 7}, {0: 4, 6: 5}])
def test_logged_means(changes):
  """A logged number is the mean of the steps since the last, also where the interval changed."""
  step, state = toy()
  losses = []
  for label in range(14):
    state, metrics = step(state, batch(label, 0, 0, 0))
    losses.append(float(metrics['loss']))
  state, since = toy()[1], 0
  for label in range(14):
    if label in changes:
      every = changes[label]
      step = toy(log_every=every)[0]
    state, metrics = step(state, batch(label, 0, 0, 0))
    if (label + 1) % every == 0:
      assert float(metrics['loss']) == pytest.approx(np.mean(losses[since:label + 1]), rel=1e-5)
      since = label + 1


# --- optimizers -----------------------------------------------------------------------------------


def optimizer(*overrides):
  return optim.optimizer(run_diffax.config(*overrides))


PARAMS = {'net': {'kernel': jnp.full((4, 4), 2.0), 'bias': jnp.full(4, 2.0)}}
PLAIN = ('learning_rate=0.5', 'optimizer.clip=0.')


def test_clip():
  """The global norm is brought to `clip`, and left where it is smaller."""
  grads = jax.tree.map(jnp.ones_like, PARAMS)  # of norm sqrt(20)
  for clip, factor in (1.0, 1 / 20**0.5), (9.0, 1.0), (0.0, 1.0):
    tx, _ = optimizer('optimizer.name=sgd', 'learning_rate=0.5', f'optimizer.clip={clip}')
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    for leaf in jax.tree.leaves(updates):
      np.testing.assert_allclose(leaf, -0.5 * factor, rtol=1e-6)


def test_decay_mask():
  """Only what the pattern matches decays: by rate x decay of itself, where gradients are 0."""
  tx, _ = optimizer(*PLAIN, 'optimizer.weight_decay=0.1', 'optimizer.mask=kernel$')
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
  np.testing.assert_allclose(updates['net']['kernel'], -0.5 * 0.1 * 2, rtol=1e-6)
  np.testing.assert_array_equal(updates['net']['bias'], np.zeros(4))


@pytest.mark.parametrize('overrides, direct', [
  (('adamw', 'b2=0.9', 'weight_decay=0.'), lambda: optax.adamw(0.5, b2=0.9, weight_decay=0.0)),
  (('lion', 'b1=0.8', 'weight_decay=0.'), lambda: optax.lion(0.5, b1=0.8, weight_decay=0.0)),
  (('sgd', 'momentum=0.9', 'nesterov=true'), lambda: optax.sgd(0.5, 0.9, nesterov=True)),
  (('rmsprop', 'decay=0.8'), lambda: optax.rmsprop(0.5, decay=0.8)),
  (('adafactor', 'min_dim_size_to_factor=2'),
   lambda: optax.adafactor(0.5, min_dim_size_to_factor=2)),
])
def test_any_optimizer(overrides, direct):
  """By name, with any of its parameters: the same as when it is called."""
  name, *rest = overrides
  ours, _ = optimizer(*PLAIN, f'optimizer.name={name}', *(f'optimizer.{o}' for o in rest))
  theirs = direct()
  a, b = PARAMS, PARAMS
  x, y = ours.init(a), theirs.init(b)
  for scale in (1.0, -2.0, 0.5):
    grads = jax.tree.map(lambda p: scale * p * jnp.arange(1.0, 5.0).reshape(  # noqa: B023
      (1,) * (p.ndim - 1) + (4,)), PARAMS)
    u, x = ours.update(grads, x, a)
    v, y = theirs.update(grads, y, b)
    a, b = optax.apply_updates(a, u), optax.apply_updates(b, v)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('overrides, values', [
  (('learning_rate=0.5',), {0: 0.5, 99: 0.5}),
  (('learning_rate.name=linear_schedule', 'learning_rate.init_value=1.',
    'learning_rate.end_value=0.', 'learning_rate.transition_steps=10'), {0: 1.0, 5: 0.5, 20: 0.0}),
  (('learning_rate.name=cosine_decay_schedule', 'learning_rate.init_value=2.',
    'learning_rate.decay_steps=10'), {0: 2.0, 5: 1.0, 10: 0.0}),
])
def test_rates(overrides, values):
  _, rate = optimizer(*overrides)
  for step, value in values.items():
    assert float(rate(step)) == pytest.approx(value, abs=1e-6)


def test_not_an_optimizer():
  with pytest.raises(ConfigError, match='global_norm'):
    optimizer('optimizer.name=global_norm')


def test_factored_optimizer_on_fsdp():
  """Adafactor's rows and columns have no parameter's shape; a step runs, and all is laid out."""
  run = run_diffax.setup(
    'optimizer.name=adafactor', 'optimizer.min_dim_size_to_factor=32', 'learning_rate=0.01',
    'mesh.fsdp=8', 'mesh.data=1', count=8)
  shapes = {sharding.name(path): x.shape for path, x in
            jax.tree_util.tree_leaves_with_path(run.like.opt)}
  assert {(2, 32), (2, 128)} <= set(shapes.values())  # of a kernel [2 32 128]
  state = train.init(run)
  ones = jax.tree.map(jnp.ones_like, state.params)
  places = jax.tree.map(lambda x: x.sharding, (run.like.params, run.like.opt))
  updates, opt = jax.jit(run.tx.update, out_shardings=places)(ones, state.opt, state.params)
  assert all(np.isfinite(u).all() and u.any() for u in run_diffax.flat(updates).values())
  kernel = [x for path, x in jax.tree_util.tree_leaves_with_path(opt)
            if 'v_col' in sharding.name(path) and x.shape == (2, 128)]
  assert kernel and all(np.asarray(x).any() for x in kernel)


# --- the loop -------------------------------------------------------------------------------------

SHORT = ('steps=6', 'save_every=3', 'log_every=1', 'loss.importance=2')


def interrupt(run, path):
  """An evaluation in the midst of which a SIGTERM comes."""
  del run, path

  def evaluate(state, folder):
    del folder
    if int(state.step) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    yield None

  return Evaluation(evaluate)


def test_signal_during_evaluation(tmp_path, capsys):
  """It ends the evaluation, the step is saved; the handlers are as they were."""
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  run = run_diffax.setup(
    *SHORT, 'evals.samples=test_train.interrupt', 'evals.samples.every=2', 'save_every=99', count=8)
  train.train(run, epath.Path(tmp_path))
  assert 'SIGTERM: stopped at step 2' in capsys.readouterr().err
  assert checkpoint.present(tmp_path / 'checkpoints') == [2]
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.fixture(scope='module')
def first(tmp_path_factory):
  """A run of 6 steps; (workdir, its last state)."""
  workdir = tmp_path_factory.mktemp('first')
  return workdir, run_diffax.flat(
    train.train(run_diffax.setup(*SHORT, count=8), epath.Path(workdir)))


def test_warm_start(first, tmp_path):
  """Parameters and averages of the other run, a fresh optimizer, step 0; its own folder stays."""
  workdir, end = first
  run = run_diffax.setup(*SHORT, count=8)
  checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  step, state, how = train._begin(run, checkpoints, epath.Path(workdir))
  checkpoints.close()
  fresh, found = run_diffax.flat(train.init(run)), run_diffax.flat(state)
  assert step == 0 and str(workdir) in how
  run_diffax.assert_same(found, {
    k: end[k] if k.split('/')[0] in ('params', 'ema') else fresh[k] for k in fresh})
  assert checkpoint.present(workdir / 'checkpoints') == [3, 6]


def test_warm_start_with_other_averages(first, tmp_path):
  """They begin at the parameters, in buffers of their own."""
  workdir, end = first
  run = run_diffax.setup(*SHORT, 'ema=0.5,0.9', count=8)
  checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  _, state, _ = train._begin(run, checkpoints, epath.Path(workdir))
  checkpoints.close()
  wanted = {k: v for k, v in end.items() if k.startswith('params/')}
  for name in ('0.5', '0.9'):
    found = run_diffax.flat(state.ema[name])
    run_diffax.assert_same({f'params/{k}': v for k, v in found.items()}, wanted)
  pointers = lambda tree: {
    s.data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) for s in x.addressable_shards}
  assert not pointers(state.params) & pointers(state.ema)


def test_resumed_run_keeps_its_own(first, tmp_path, capsys):
  """`--from` is where a run begins, not where it goes on: the same command may be given again."""
  workdir, _ = first
  command = [f'--config={run_diffax.SMOKE}', '--workdir', tmp_path / 'run', '--from', workdir,
             *(f'--config.{o}' for o in SHORT)]
  run_diffax.door(*command[:-3], '--config.steps=3', *command[-2:])
  assert f'beginning with the weights of {workdir}' in capsys.readouterr().err
  run_diffax.door(*command)
  assert 'going on from the checkpoint of step 3' in capsys.readouterr().err


def test_done_already(first, capsys):
  """The same command on a run that is done does nothing, and compiles nothing."""
  workdir, end = first
  run = run_diffax.setup(*SHORT, count=8)
  run_diffax.assert_same(run_diffax.flat(train.train(run, epath.Path(workdir))), end)
  assert [row['step'] for row in run_diffax.numbers(workdir)] == [1, 2, 3, 4, 5, 6]


def test_pictures(tmp_path):
  """Evaluations draw at their steps and at the last."""
  run = run_diffax.setup(*SHORT, 'steps=5', 'evals.samples.every=2', count=8)
  train.train(run, epath.Path(tmp_path))
  names = sorted(p.name for p in (tmp_path / 'images').iterdir())
  assert names == ['loss.png', *(f'samples_000000{s}.png' for s in (2, 4, 5))]


@pytest.mark.parametrize('count', [pytest.param(1, marks=pytest.mark.slow), 4])
def test_averages_on_the_host(count, tmp_path):
  """They lie in its memory, bit for bit what they were on the devices; saved, gone on with, and
  sampled from."""
  mesh = f'mesh.fsdp={count}', 'mesh.data=1', 'steps=3', 'save_every=2'
  wanted = train.train(run_diffax.setup(*mesh, count=count), epath.Path(tmp_path / 'a'))
  run = run_diffax.setup(*mesh, 'ema_on_host=true', count=count)
  state = train.train(run, epath.Path(tmp_path / 'b'))
  shutil.rmtree(tmp_path / 'b' / 'checkpoints' / '3')
  again = train.train(run, epath.Path(tmp_path / 'b'))
  for found in (state, again):
    kinds = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
    assert kinds(found.ema) == {'pinned_host'} and kinds(found.params) == {'device'}
    run_diffax.assert_same(run_diffax.flat(found), run_diffax.flat(wanted))
  pictures = []
  for each, folder in ((run, 'b'), (run_diffax.setup(*mesh, count=count), 'a')):
    file, *_ = sample.sample(each, epath.Path(tmp_path / folder), 0)
    pictures.append(dict(np.load(file)))
  run_diffax.assert_same(*pictures)


def test_profile(tmp_path, capsys):
  """A trace of the steps asked for, in the formats that TensorBoard and Perfetto open."""
  run = run_diffax.setup(*SHORT, 'evals.samples.every=0')
  train.train(run, epath.Path(tmp_path), profile=(2, 3))
  assert f'traced steps 2 to 4 into {tmp_path}/profile' in capsys.readouterr().err
  assert len(list(tmp_path.glob('profile/plugins/profile/*/*.xplane.pb'))) == 1
  (trace,) = tmp_path.glob('profile/plugins/profile/*/*.trace.json.gz')
  with gzip.open(trace) as file:
    assert len(json.load(file)['traceEvents']) > 10


def test_sampling_and_training_share_no_key():
  """Sample i is not drawn with the noise that example 0 of step i was trained with."""
  index = jnp.arange(8)
  trained = [train.example_keys(0, step, 8) for step in range(8)]
  trained = {tuple(k) for keys in trained for k in np.asarray(jax.random.key_data(keys))}
  keys = samplers.sample_keys(0, index)
  folded = [jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in range(8)]
  drawn = {tuple(k) for ks in [keys, *folded] for k in np.asarray(jax.random.key_data(ks))}
  assert not trained & drawn
  assert len(drawn) == 8 * 9
