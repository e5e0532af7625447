"""Several losses and optimizers in one step: a game whose iterates are known, and runs of one."""

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import run_diffax

from diffax import config as configs
from diffax import optim
from diffax import replay
from diffax import train
from diffax import updates
from diffax.build import ConfigError
from diffax.models import layers
from diffax.tasks import Phase, Task

# --- the step, on a game of two numbers -----------------------------------------------------------
#
#   x descends x^2 / 2 + x y + x m,   y ascends x y - y^2 / 4,   m the mean label


def for_x(params, state, batch, keys):
  x, y = params['x'], params['y']
  return x**2 / 2 + x * y + x * batch['label'], {'seen': batch['label']}


def for_y(params, state, batch, keys):
  x, y = params['x'], params['y']
  return y**2 / 4 - x * y + 0 * batch['label'], {'seen': batch['label'] + x}


RATES, MOMENTUM = {'one': 0.1, 'two': 0.3}, 0.5
LABELS = jnp.asarray([1.0, 2.0, 3.0, 6.0])
BATCH = {'label': LABELS, 'index': jnp.arange(4)}


def game(first=(1, 0), second=(1, 0), losses=(for_x, for_y), carry=None, log_every=1):
  """(step, state) of phases `one` on x and `two` on y. first, second: their (every, start)."""
  phases = (Phase('one', ('x',), losses[0], *first),
            Phase('two', ('y',), losses[1], *second, terms=('seen',)))
  tx = {'one': optax.sgd(RATES['one']), 'two': optax.sgd(RATES['two'], momentum=MOMENTUM)}
  rate = {name: optax.linear_schedule(value, 0.0, 10) for name, value in RATES.items()}
  params = {'x': jnp.asarray(1.0), 'y': jnp.asarray(2.0)}
  config = dict(seed=0, batch_size=4, accumulate=1, log_every=log_every)
  state = train.State(
    step=jnp.zeros((), jnp.int32), params=params, ema={'0.5': params},
    opt=updates.init(phases, tx, params), sums=updates.sums(phases), bad=jnp.zeros((), bool),
    extra={'seen': jnp.zeros(4), 'other': jnp.zeros(4)} if carry else {})
  return jax.jit(train.make_step(None, tx, rate, config, None, carry, phases)), state


def by_hand(steps, first, second):
  """[(x, y, average of x, average of y), ...] after each step, in float64."""
  x, y, velocity, mean_x, mean_y, rows = 1.0, 2.0, 0.0, 1.0, 2.0, []
  for n in range(steps):
    if n >= first[1] and (n - first[1]) % first[0] == 0:
      x -= 0.1 * (x + y + 3.0)
    if n >= second[1] and (n - second[1]) % second[0] == 0:
      velocity = (y / 2 - x) + 0.5 * velocity  # at the new x
      y -= 0.3 * velocity
    share = 1 - min(0.5, (1 + n) / (10 + n))
    mean_x, mean_y = mean_x + share * (x - mean_x), mean_y + share * (y - mean_y)
    rows.append((x, y, mean_x, mean_y))
  return rows


DUE = [((1, 0), (1, 0)), ((1, 0), (2, 3)), ((3, 1), (1, 2)), ((2, 0), (2, 1))]


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
@pytest.mark.parametrize('first, second', DUE)
def test_iterates(first, second, platform, monkeypatch):
  """Each at what the other made of it; who is not due stands still, and its momentum with it.

  Where a branch is as fast as the rest of a program, the phase that is not due is one not taken.
  """
  monkeypatch.setattr(layers, 'platform', lambda: platform)
  step, state = game(first, second)
  conditional = first != (1, 0), second != (1, 0)
  text = str(jax.make_jaxpr(step)(state, BATCH))
  assert text.count('cond[') == (sum(conditional) if platform == 'gpu' else 0)
  for n, wanted in enumerate(by_hand(8, first, second)):
    before, (state, metrics) = state, step(state, BATCH)
    found = [*state.params.values(), *state.ema['0.5'].values()]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert not metrics['bad'] and int(state.step) == n + 1
    for name, group, (every, start) in ('one', 'x', first), ('two', 'y', second):
      if n < start or (n - start) % every:
        run_diffax.assert_same(
          run_diffax.flat((state.params[group], state.opt[name])),
          run_diffax.flat((before.params[group], before.opt[name])))


def test_metrics():
  """Means over the steps in which a phase was due, 0 for none; rates by a phase's own updates."""
  step, state = game((1, 0), (2, 3), log_every=3)
  rows = []
  for _ in range(6):
    before, (state, metrics) = state, step(state, BATCH)
    rows.append((*map(float, (before.params['x'], before.params['y'], state.params['x'])), metrics))
  loss_x = [x**2 / 2 + x * y + 3 * x for x, y, _, _ in rows]
  norm_x = [abs(x + y + 3) for x, y, _, _ in rows]
  loss_y = [y**2 / 4 - x * y for _, y, x, _ in rows]
  norm_y = [abs(y / 2 - x) for _, y, x, _ in rows]
  first, second = rows[2][3], rows[5][3]
  assert float(first['loss']) == pytest.approx(np.mean(loss_x[:3]), rel=1e-5)
  assert first['loss_two'] == first['grad_norm_two'] == 0
  assert float(second['loss']) == pytest.approx(np.mean(loss_x[3:]), rel=1e-5)
  assert float(second['grad_norm']) == pytest.approx(np.mean(norm_x[3:]), rel=1e-5)
  assert float(second['loss_two']) == pytest.approx((loss_y[3] + loss_y[5]) / 2, rel=1e-5)
  assert float(second['grad_norm_two']) == pytest.approx((norm_y[3] + norm_y[5]) / 2, rel=1e-5)
  seen = [3 + x for _, _, x, _ in rows]  # the mean label, and what the first phase made of x
  assert first['seen_two'] == 0 and 'seen' not in second
  assert float(second['seen_two']) == pytest.approx((seen[3] + seen[5]) / 2, rel=1e-5)
  rates = [(float(m['learning_rate']), float(m['learning_rate_two'])) for *_, m in rows]
  np.testing.assert_allclose([a for a, _ in rates], 0.1 * (1 - np.arange(6) / 10), rtol=1e-6)
  np.testing.assert_allclose(  # due in steps 3 and 5: what the optimizer itself counts
    [b for _, b in rates], 0.3 * (1 - np.array([0, 0, 0, 0, 1, 1]) / 10), rtol=1e-6)


@pytest.mark.parametrize('place', [0, 1])
def test_not_finite(place):
  """Whichever phase it is: the whole step stands still, bit for bit, and from then on."""
  def bad(params, state, batch, keys):
    losses, info = (for_x, for_y)[place](params, state, batch, keys)
    return jnp.where(state.step == 2, jnp.nan, losses), info

  losses = [for_x, for_y]
  losses[place] = bad
  step, state = game(losses=losses)
  for _ in range(2):
    state, metrics = step(state, BATCH)
    assert not metrics['bad']
  for _ in range(2):
    after, metrics = step(state, BATCH)
    assert metrics['bad'] and after.bad
    run_diffax.assert_same(
      run_diffax.flat(after.replace(bad=0)), run_diffax.flat(state.replace(bad=0)))


def test_info():
  """`update` sees the first phase's info, and the others' by their names; zeros where not due."""
  def carry(extra, info):
    return {'seen': info['seen'], 'other': info['two']['seen']}

  step, state = game((1, 0), (2, 0), carry=carry)
  state, _ = step(state, BATCH)
  np.testing.assert_array_equal(state.extra['seen'], LABELS)
  np.testing.assert_allclose(state.extra['other'], LABELS + state.params['x'], rtol=1e-6)
  state, _ = step(state, BATCH)
  np.testing.assert_array_equal(state.extra['other'], np.zeros(4))


def test_keys():
  """The first phase draws what it draws alone, bit for bit; the second draws other numbers."""
  drawn = lambda keys: jax.vmap(jax.random.normal)(keys)

  def loss(group):
    return lambda params, state, batch, keys: (params[group] * drawn(keys), {})

  phases = Phase('one', ('x',), loss('x')), Phase('two', ('y',), loss('y'))
  config = dict(seed=0, batch_size=4, accumulate=1, log_every=1)

  def after(phases):
    params = {group: jnp.zeros(()) for phase in phases for group in phase.groups}
    tx, rate = {p.name: optax.sgd(1.0) for p in phases}, {p.name: lambda n: 1.0 for p in phases}
    state = train.State(
      step=jnp.zeros((), jnp.int32), params=params, ema={}, opt=updates.init(phases, tx, params),
      sums=updates.sums(phases), bad=jnp.zeros((), bool))
    return jax.jit(train.make_step(None, tx, rate, config, phases=phases))(state, BATCH)[0].params

  both, alone = after(phases), after(phases[:1])
  assert both['x'] == alone['x'] == -np.mean(drawn(train.example_keys(0, 0, 4)))
  assert both['y'] not in (0, both['x'])


# --- runs, through config and loop ----------------------------------------------------------------

WIDTH = 64


def twins(config, source, every=1, start=0, groups=('net', 'critic'), spoil=-1) -> Task:
  """A line of pixels learned beside noise, and a critic that learns how far off it is."""
  del config
  pixels = int(np.prod(source.shape))

  def init(key):
    return {'net': {'kernel': jnp.zeros((pixels, WIDTH))}, 'critic': {'kernel': jnp.zeros(WIDTH)}}

  def error(params, batch, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, (pixels,)))(keys)
    x = batch['image'].reshape(len(noise), -1)
    return (x + 0.1 * noise) @ params['net']['kernel'] - x[:, :WIDTH]

  def loss(params, state, batch, keys):
    return jnp.square(error(params, batch, keys)).mean(-1), {}

  def critic(params, state, batch, keys):
    off = jnp.square(error(params, batch, keys))
    off = jnp.where(batch['label'][:, None] == jnp.where(state.step == spoil, 3, -1), jnp.nan, off)
    return jnp.square(off - params['critic']['kernel'][None]).mean(-1), {'off': off.mean(-1)}

  phases = (Phase('net', ('net',), loss), Phase('critic', groups[1:], critic, every, start))
  return Task(init, loss, None, 0, phases=phases)


GAME = (
  'task.name=test_phases.twins', 'evals={}', 'model.width=32', 'ema=(0.9,)', 'log_every=3',
  'optimizer.clip=0.', 'learning_rate=0.1', 'optimizer.name=sgd',
  'phases.critic.optimizer=adam', 'phases.critic.learning_rate=0.01', 'steps=8', 'save_every=4',
)


def setup(*overrides, count=1):
  return run_diffax.setup(*GAME, *overrides, count=count)


def assert_close(state, metrics, wanted, told):
  found, wanted = run_diffax.flat(state.params), run_diffax.flat(wanted.params)
  for key in wanted:
    assert np.abs(wanted[key]).max() > 0, key
    np.testing.assert_allclose(found[key], wanted[key], rtol=1e-4, atol=1e-6, err_msg=key)
  for key in told:
    assert float(metrics[key]) == pytest.approx(float(told[key]), rel=1e-5), key


def test_accumulation_and_mesh():
  """Two steps, each phase's gradient of the whole batch: the same in four parts, on 8 devices."""
  def two_steps(*overrides, count=1):
    # a plain gradient for the critic as well: Adam's first steps are signs, and scale rounding
    run = setup('phases.critic.optimizer=sgd', 'log_every=2', *overrides, count=count)
    state, batches, step = train.init(run), train.batches(run, 0), train.compile_step(run)
    for _ in range(2):
      state, metrics = step(state, next(batches))
    batches.close()
    return state, metrics

  wanted = two_steps()
  assert {'loss', 'grad_norm', 'loss_critic', 'grad_norm_critic'} < set(wanted[1])
  assert_close(*two_steps('accumulate=4'), *wanted)
  assert_close(*two_steps('mesh.data=2', 'mesh.fsdp=4', count=8), *wanted)
  assert_close(*two_steps('accumulate=2', 'mesh.fsdp=8', 'mesh.data=1', count=8), *wanted)


def test_goes_on(tmp_path):
  """Stopped between two checkpoints' worth of steps: the same bits, of both optimizers."""
  task = 'task.every=2', 'task.start=1'
  straight, other = epath.Path(tmp_path / 'straight'), epath.Path(tmp_path / 'other')
  train.train(setup(*task), straight)
  train.train(setup(*task, 'steps=4'), other)
  train.train(setup(*task), other)
  found = run_diffax.arrays(other, 8)
  run_diffax.assert_same(found, run_diffax.arrays(straight, 8))
  assert run_diffax.numbers(other) == run_diffax.numbers(straight)
  assert int(found['opt/critic/0/count']) == 4  # of Adam; the steps 1, 3, 5, 7
  assert {'opt/critic/0/mu/critic/kernel', 'params/net/kernel'} < found.keys()
  assert not any(key.startswith('opt/critic') and 'net' in key for key in found)
  assert {'loss_critic', 'learning_rate_critic'} < run_diffax.numbers(other)[0].keys()


def test_layout_of_optimizer_state():
  """On fsdp an optimizer's moments lie as the parameters that they are of."""
  like = setup('mesh.fsdp=8', 'mesh.data=1', 'optimizer.name=adam', count=8).like
  kernel, moment = like.params['net']['kernel'], like.opt['net'][0].mu['net']['kernel']
  assert 'fsdp' in kernel.sharding.spec and moment.sharding == kernel.sharding


def test_replay_and_trouble(tmp_path):
  """Each phase is shown behind the ones before it, and the one that went bad is named."""
  run = setup('task.spoil=2')
  workdir = epath.Path(tmp_path)
  with pytest.raises(train.BadStep) as error:
    train.train(run, workdir)
  labels = [run.source[i]['label'] for i in train.pipeline.order(len(run.source), 0,
                                                               np.arange(64, 96))]
  text = str(error.value)
  assert f'step 3: {labels.count(3)} of 32 losses of phase critic are not finite' in text
  assert 'digits/train record' in text

  run, lines = setup(), []
  batch, losses, info = replay.replay(run, workdir, 2, lines.append)
  assert f'step 2: mean loss {losses.mean():.6g} over 32 examples' in lines
  state = replay.state_before(run, workdir, 2, lambda text: None)
  step = train.compile_step(setup('log_every=1'))
  place = jax.tree.map(lambda x: x.sharding, run.like)
  _, metrics = step(jax.device_put(state, place), {k: jnp.asarray(v) for k, v in batch.items()})
  assert losses.mean() == pytest.approx(float(metrics['loss']), rel=1e-5)
  line = next(line for line in lines if line.startswith('step 2, phase critic: mean loss'))
  mean = float(line.split('mean loss ')[1].split()[0])
  assert mean == pytest.approx(float(metrics['loss_critic']), rel=1e-5)
  assert any('off' in line for line in lines)


def test_flops():
  """Forward and back where it is trained, forward alone where it only serves; each as often."""
  run = setup('task.every=2')
  product = 2 * 32 * WIDTH * 64  # of the batch's pixels [32 64] with the kernel [64 64]
  assert train.model_flops(run) == 2 * product + product / 2  # no gradient is asked of the pixels


# --- configs --------------------------------------------------------------------------------------


def test_optimizers_of_a_config():
  """The config's own is the first phase's; another has what it is given, else the same."""
  config = run_diffax.config(
    'learning_rate=0.5', 'optimizer.name=sgd', 'optimizer.clip=0.',
    'phases.two.learning_rate=0.25', 'phases.three.optimizer.name=sgd',
    'phases.three.optimizer.momentum=0.9')
  assert config['phases'] == {
    'two': {'learning_rate': {'name': 'constant_schedule', 'value': 0.25}},
    'three': {'optimizer': config['phases']['three']['optimizer']}}
  tx, rate = optim.optimizers(config, ['one', 'two', 'three'])
  assert [float(rate[name](0)) for name in ('one', 'two', 'three')] == [0.5, 0.25, 0.5]
  params = {'w': jnp.ones(())}
  for name, wanted in ('one', [-0.5, -0.5]), ('two', [-0.25, -0.25]), ('three', [-0.5, -0.95]):
    opt, moves = tx[name].init(params), []
    for _ in range(2):
      move, opt = tx[name].update(params, opt, params)
      moves.append(float(move['w']))
    np.testing.assert_allclose(moves, wanted, rtol=1e-6)


def test_sections():
  """Said in a file, on the command line and again; a run may not change them."""
  said = run_diffax.get_config().to_dict() | {
    'phases': {'critic': {'learning_rate': 0.5, 'optimizer': 'sgd'}}}
  config = configs.complete(said)
  assert config['phases']['critic']['optimizer']['name'] == 'sgd'
  assert config['phases']['critic']['optimizer']['clip'] == 0.0
  assert configs.complete(config) == config
  again = configs.override(config, ['--config.phases.critic.learning_rate.value=0.25'])
  assert configs.differences(config, again) == ['phases.critic.learning_rate.value: 0.5 -> 0.25']
  older = {k: v for k, v in run_diffax.config().items() if k != 'phases'}
  assert configs.differences(older, run_diffax.config()) == []


@pytest.mark.parametrize('overrides, text', [
  (('phases.crtic.optimizer=sgd',), "'critic'|did you mean critic"),
  (('phases.net.optimizer=sgd',), "first, 'net', is config.optimizer"),
  (('task.every=0',), 'every=0'),
  (('task.groups=("net","other")',), r"\['net', 'other'\].*\['critic', 'net'\]"),
  (('phases.critic.optimizer=global_norm',), 'global_norm'),
  (('phases.critic.optimizer.clip=-1.',), r'phases.critic.optimizer.clip=-1'),
])
def test_wrong(overrides, text):
  with pytest.raises(ConfigError, match=text):
    setup(*overrides)


def test_phases_of_a_task_without():
  with pytest.raises(ConfigError, match="task 'generate' has no phases"):
    run_diffax.setup('phases.disc.learning_rate=0.1')


def test_unknown_key_of_a_phase():
  with pytest.raises(ConfigError, match='phases.critic.learningrate'):
    run_diffax.config('phases.critic.learningrate=0.1')
