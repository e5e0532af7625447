"""Generation as configs name it: what trains along, what a batch draws together, what samples."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_diffax

from diffax import noises
from diffax import sample
from diffax import samplers
from diffax import schedules
from diffax import sharding
from diffax import train
from diffax.build import ConfigError

TINY = ('model=test_generate.tiny', 'learning_rate=0.01', 'optimizer.name=sgd', 'optimizer.clip=0.',
        'ema=(0.5,)')
DIT = ('model.patch=4', 'model.depth=1', 'learning_rate=0.01')


def tiny(classes: int = 0) -> nn.Module:
  """A network that compiles at once: a matrix between channels, turned by time and by label."""
  return Tiny(classes)


class Tiny(nn.Module):
  classes: int
  channels: int = 0

  @nn.compact
  def __call__(self, x, t, cond, *, keys=None, per_layer=None):
    del keys
    channels = self.channels or x.shape[-1]
    dense = lambda name: nn.Dense(channels, kernel_init=nn.initializers.normal(0.3), name=name)(x)
    keep = per_layer['keep'].mean(0) if per_layer else jnp.ones(len(x))  # of two layers
    label = cond.get('label', jnp.zeros(len(x), int))
    told = nn.Embed(self.classes + 1, 1, name='label')(label)[:, 0]
    wave = (keep * (1 + told) * jnp.cos(0.003 * t))[:, None, None, None]
    return wave * jnp.tanh(dense('moved')) + dense('still')


@pytest.fixture(scope='module')
def plain():
  return run_diffax.setup(*TINY)


@pytest.fixture(scope='module')
def state(plain):
  """The first state of every run whose network is as that of `plain`."""
  return train.init(plain)


def one_loss(run, state):
  """(batch, losses, info) of the first step."""
  batches = train.batches(run, 0)
  batch = next(batches)
  batches.close()

  def losses(state, batch):
    keys = train.example_keys(0, state.step, 32)
    return run.task.loss(state.params, state, train._prepared(
      run.task.prepare, state, batch, keys), keys)

  return batch, *jax.jit(losses)(state, batch)


def steps(run, count=3):
  """The states before and after `count` steps, and the losses."""
  task = run.task
  step = jax.jit(train.make_step(task.loss, run.tx, run.rate, run.config | {'log_every': 1},
                                 task.prepare, task.update))
  begin = state = train.init(run)
  batches, losses = train.batches(run, 0), []
  with sharding.using(run.mesh):
    for _ in range(count):
      state, metrics = step(state, next(batches))
      losses.append(float(metrics['loss']))
  batches.close()
  assert np.isfinite(losses).all() and not state.bad
  return begin, state, losses


# --- training -------------------------------------------------------------------------------------

VLB = ('loss.time=uniform', 'loss.weight=vlb')


@pytest.mark.parametrize('overrides, groups', [
  (('schedule=learned', 'schedule.width=8', 'prediction=v', *VLB), {'schedule'}),
  (('schedule.name=shift', 'schedule.of.name=learned', 'schedule.of.width=8', 'prediction=v'),
   {'schedule'}),
  (('loss.uncertainty=8', 'loss.coupling=pyramid', 'loss.perturb=0.1'), {'weight'}),
], ids=lambda value: value[0] if isinstance(value, tuple) else '')
def test_what_trains_along(overrides, groups):
  """Every group of parameters moves, and so do its averages."""
  begin, end, _ = steps(run_diffax.setup(*TINY, *overrides))
  assert set(begin.params) == {'net', *groups} == set(end.ema['0.5'])
  for group in end.params:
    before, after = run_diffax.flat(begin.params[group]), run_diffax.flat(end.params[group])
    averages = run_diffax.flat(end.ema['0.5'][group])
    moved = [key for key in after if not np.array_equal(before[key], after[key])]
    assert moved and all(not np.array_equal(before[key], averages[key]) for key in moved), group


def test_nested():
  """A schedule, a law and a prediction of others, as their closed forms say."""
  run = run_diffax.setup(
    *TINY, 'schedule.name=shift', 'schedule.of.name=shift', 'schedule.of.of=linear',
    'schedule.shift=1.5', 'schedule.of.shift=2.', 'loss.time.name=shifted',
    'loss.time.of=uniform', 'loss.draw=stratified', 'prediction.name=learned_range',
    'prediction.of=v')
  _, _, info = one_loss(run, train.init(run))
  t = np.asarray(info['t'], np.float64)
  np.testing.assert_allclose(info['noise'], 3 * t / (1 - t), rtol=1e-4)  # shifted by 2, then 1.5
  plain = np.sort(t / (3 - 2 * t))  # the law's own shift undone: equal steps
  np.testing.assert_allclose(np.diff(plain), 1 / 32, rtol=5e-3)


def test_distance(state):
  """The one named stands in place of the square; some are its multiples."""
  def of(*overrides):
    return np.asarray(one_loss(run_diffax.setup(*TINY, *overrides), state)[1], np.float64)

  squared = of()
  np.testing.assert_allclose(of('loss.distance=huber', 'loss.distance.delta=1e6'), squared / 2,
                             rtol=1e-4)
  np.testing.assert_allclose(of('loss.distance=multiscale', 'loss.distance.smallest=8'),
                             squared / 8, rtol=1e-5)
  np.testing.assert_allclose(of('loss.distance=pseudo_huber', 'loss.distance.c=1e-6'),
                             (64 * squared)**0.5, rtol=1e-4)


def test_vlb(state):
  """On straight lines -1/2 dSNR/dt sigma^2 = (1 - t) / t to the velocity's error, over the law's
  density."""
  law = ('loss.time=uniform', 'loss.draw=stratified')
  _, flat, info = one_loss(run_diffax.setup(*TINY, *law), state)
  _, bound, _ = one_loss(run_diffax.setup(*TINY, *law, 'loss.weight=vlb'), state)
  t = info['t']
  np.testing.assert_allclose(bound, flat * (1 - t) / t * (1 - 1e-3), rtol=2e-4)


def test_perturb_and_offset(plain, state):
  """Each changes the loss, and neither does where it is 0."""
  wanted = one_loss(plain, state)[1]
  nothing = ('loss.coupling=offset', 'loss.coupling.strength=0.')
  found = one_loss(run_diffax.setup(*TINY, *nothing), state)[1]
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  for overrides in (('loss.coupling=offset',), ('loss.perturb=0.5',)):
    found = one_loss(run_diffax.setup(*TINY, *overrides), state)[1]
    assert np.abs(found - wanted).min() > 0, overrides


def test_uncertainty(plain, state):
  """Where its parameters are 0 the loss is as it was, elsewhere not."""
  run = run_diffax.setup(*TINY, 'loss.uncertainty=4')
  wanted = one_loss(plain, state)[1]
  weigh = lambda value: state.replace(
    params={**state.params, 'weight': {'weight': jnp.full(4, value)}})
  np.testing.assert_array_equal(one_loss(run, weigh(0.0))[1], wanted)
  assert not np.allclose(one_loss(run, weigh(1.0))[1], wanted)


TOGETHER = ('loss.coupling=optimal_transport', 'loss.draw=stratified', 'loss.importance=3')


def test_drawn_together():
  """What a whole batch draws, and what is carried on, is the same in microbatches on a mesh."""
  alone = steps(run_diffax.setup(*TINY, *TOGETHER))[1]
  spread = steps(run_diffax.setup(*TINY, *TOGETHER, 'accumulate=4', 'mesh.data=2', 'mesh.fsdp=4',
                                  count=8))[1]
  found, wanted = (run_diffax.flat((s.params, s.extra)) for s in (spread, alone))
  assert found.keys() == wanted.keys()
  for key in wanted:
    np.testing.assert_allclose(found[key], wanted[key], rtol=1e-4, atol=1e-6, err_msg=key)
  counts = np.asarray(alone.extra['importance'].count)
  assert counts.sum() == 3 * 32 and (alone.extra['importance'].history > 0).all()
  batch = {'image': jax.random.normal(jax.random.key(0), (32, 8, 8, 1))}
  run = run_diffax.setup(*TINY, *TOGETHER)
  prepared = jax.jit(lambda batch: run.task.prepare(
    alone.params, alone, batch, train.example_keys(0, 0, 32)))(batch)
  np.testing.assert_allclose(np.diff(np.sort(prepared['u'])), 1 / 32, atol=1e-6)
  noise = noises.normal(jax.vmap(lambda key: jax.random.split(key, 4)[1])(
    train.example_keys(0, 0, 32)), (8, 8, 1))
  costs = [float(jnp.sum((batch['image'] - eps)**2)) for eps in (prepared['eps'], noise)]
  assert costs[0] < 0.95 * costs[1]
  np.testing.assert_allclose(  # the same noise, in another order
    np.sort(prepared['eps'].ravel()), np.sort(noise.ravel()), rtol=1e-5)


def test_importance(state):
  """Times of large loss come more often, and the mean loss stays what it was."""
  run = run_diffax.setup(*TINY, 'loss.importance=2', 'loss.time=uniform', 'loss.draw=stratified')
  state = state.replace(extra=run.task.extra())
  _, _, info = one_loss(run, state)
  assert 14 <= (info['t'] > 0.5).sum() <= 18
  history = jnp.stack([jnp.full(10, 1.0), jnp.full(10, 3.0)])
  met = state.extra['importance']._replace(history=history, count=jnp.full(2, 10))
  _, each, info = one_loss(run, state.replace(extra={'importance': met}))
  late = info['t'] > 0.5005
  assert 23 <= late.sum() <= 25  # three of four
  np.testing.assert_allclose(each[late] / info['met'][late], 2 / 3, rtol=2e-3)
  np.testing.assert_allclose(each[~late] / info['met'][~late], 2, rtol=2e-3)


# --- networks of other channels -------------------------------------------------------------------


def drawn(run, params, *overrides):
  """Eight samples of a run's network by a config's `sample` section, ten labels in turn."""
  settings = run_diffax.config(*TINY, *(f'sample.{o}' for o in ('seed=3', *overrides)))['sample']
  drawing = run.task.sample(settings, 'sample')
  keys = samplers.sample_keys(3, jnp.arange(8))
  pictures = jax.jit(drawing.draw)(params, {}, keys, drawing.ask(np.arange(8)))
  assert pictures.shape == (8, 8, 8, 1) and np.isfinite(pictures).all()
  return np.asarray(pictures)


def test_sampling_with_a_learned_schedule():
  """The grid and the steps are those of the schedule as it was learned."""
  run = run_diffax.setup(*TINY, 'schedule=learned', 'schedule.width=8', 'prediction=v')
  params, options = train.init(run).params, ('sampler.steps=3', 'sampler.grid=karras')
  learned = {**params['schedule'], 'gamma_max': params['schedule']['gamma_max'] - 2}
  here, there = (drawn(run, p, *options) for p in (params, {**params, 'schedule': learned}))
  assert np.abs(here - there).max() > 1e-2


VARIANCE = ('prediction.name=learned_range', 'prediction.of=v', 'schedule=cosine')
DDPM = ('sampler.name=ddpm', 'sampler.steps=4')


def test_learned_variance(plain, state):
  """The bound alone trains the variance's half of the network; DDPM samples with it."""
  run = run_diffax.setup(*TINY, *VARIANCE, 'learning_rate=1.')
  begin, end, _ = steps(run)
  before, after = (s.params['net']['still']['kernel'] for s in (begin, end))
  assert before.shape == (1, 2) and (before != after).all()
  learned = drawn(run, end.params, *DDPM, 'sampler.variance=learned')
  assert np.abs(learned - drawn(run, end.params, *DDPM)).max() > 1e-3
  with pytest.raises(ValueError, match='learned_range'):
    drawn(plain, state.params, *DDPM, 'sampler.variance=learned')


def test_dit_of_other_channels():
  """A DiT with a learned variance that sees its own estimate trains and samples."""
  run = run_diffax.setup(*DIT, *VARIANCE, 'task.self_condition=0.5')
  _, end, _ = steps(run)
  net = end.params['net']
  assert net['patch_in']['kernel'].shape == (16 * 2, 32)
  assert net['patch_out']['kernel'].shape == (32, 16 * 2)
  perturbed = ('guide.name=perturbed', 'guide.keep=(0.,)', 'guide.scales=(1.5, 2.)')
  drawn(run, end.params, *DDPM, 'sampler.variance=learned', *perturbed)
  with pytest.raises(ValueError, match='keep has 2 numbers, and the model 1 layers'):
    drawn(run, end.params, *DDPM, *perturbed, 'guide.keep=(0., 1.)')


def test_self_condition(plain):
  """Where the network does not look at it, it samples as one without; where it does, not."""
  run = run_diffax.setup(*TINY, 'task.self_condition=0.9')
  ignore = lambda kernel: kernel.at[1].set(0.0)
  net = train.init(run).params['net']
  for name in ('moved', 'still'):
    net[name]['kernel'] = ignore(net[name]['kernel'])
  without = {**net, **{name: {**net[name], 'kernel': net[name]['kernel'][:1]}
                       for name in ('moved', 'still')}}
  seen, options = train.init(run).params, ('sampler.name=ddim', 'sampler.steps=3', 'guidance=2.')
  wanted = drawn(plain, {'net': without}, *options)
  np.testing.assert_allclose(drawn(run, {'net': net}, *options), wanted, atol=1e-5)
  assert np.abs(drawn(run, seen, *options) - wanted).max() > 1e-2
  with pytest.raises(ConfigError, match='sample.guide.*remembers'):
    drawn(run, seen, *options, 'guide=apg')
  losses = [one_loss(r, train.init(r).replace(params=p))[1]
            for r, p in ((run, seen), (plain, {'net': {**seen['net'], **without}}))]
  assert np.abs(losses[0] - losses[1]).max() > 1e-3


# --- sampling -------------------------------------------------------------------------------------


QUICK = ('sampler.name=ddim', 'sampler.steps=3')


@pytest.fixture(scope='module')
def draw(plain, state):
  return lambda *overrides: drawn(plain, state.params, *overrides)


@pytest.fixture(scope='module')
def guided(draw):
  """Classifier-free guidance of scale 3."""
  return draw(*QUICK, 'guidance=3.')


@pytest.mark.parametrize('overrides', [
  ('guidance=3.', 'guide=rescale', 'guide.phi=0.'),
  ('guidance=3.', 'guide=apg', 'guide.eta=1.', 'guide.norm=inf', 'guide.momentum=0.'),
  ('guide=perturbed', 'guide.keep=(1., 1.)', 'guide.scales=(3., 5.)'),
  ('guidance=3.', 'interval=0.,1e999'),
  ('guidance=3.', 'transforms.cut=threshold', 'transforms.cut.bound=1e6'),
], ids=lambda overrides: overrides[1])
def test_guidance_that_is_cfg(overrides, draw, guided):
  np.testing.assert_allclose(draw(*QUICK, *overrides), guided, atol=2e-4)


@pytest.mark.parametrize('overrides', [
  ('guidance=3.', 'guide=rescale'), ('guidance=3.', 'guide=cfg_zero'),
  ('guidance=0.6', 'guide=cfg_pp'), ('guidance=3.', 'guide=apg', 'guide.norm=1.'),
  ('guide=perturbed', 'guide.keep=(0., 1.)', 'guide.scales=(3., 5.)'),
], ids=lambda overrides: overrides[1])
def test_guidance_that_is_not(overrides, draw, guided):
  assert np.abs(draw(*QUICK, *overrides) - guided).max() > 1e-2


def test_transforms(draw):
  """One after the other: none leaves the bound, and where the velocity is 0 x stays."""
  cut = draw(*QUICK, 'guidance=3.', 'transforms.hard=threshold', 'transforms.hard.bound=.1')
  assert np.abs(cut).max() == pytest.approx(0.1, rel=1e-5)
  still = draw(*QUICK, 'transforms.a=dynamic_threshold', 'transforms.b=zero_init',
               'transforms.b.fraction=1.')
  start = samplers.initial(
    schedules.linear(), jnp.ones(2), samplers.sample_keys(3, jnp.arange(8)), (8, 8, 1))
  np.testing.assert_allclose(still, start, atol=1e-5)


def test_calls(plain, draw):
  """As many network calls as asked for, else what there is near."""
  heun = ('sampler.name=heun', 'guidance=1.')
  np.testing.assert_array_equal(
    draw(*heun, 'sampler.calls=5'), draw(*heun, 'sampler.steps=3'))
  with pytest.raises(ConfigError, match=r'calls=6.*heun.*5 \(steps=3\) or 7 \(steps=4\)'):
    draw(*heun, 'sampler.calls=6')
  with pytest.raises(ConfigError, match=r'calls=10.*nearest is 17 \(steps=2\)'):
    draw('sampler=ddim', 'sampler.grid.name=restart', 'sampler.grid.of=karras', 'sampler.calls=10')
  with pytest.raises(ConfigError, match='steps=1500: a table of train_steps=1000'):
    draw('sampler=ddim', 'sampler.grid=trailing', 'sampler.calls=1500')
  for name in ('ddim', 'plms', 'pndm', 'dpmpp_3s'):
    calls = samplers.calls(getattr(samplers, name)(), 7)
    settings = run_diffax.config(f'sample.sampler={name}', f'sample.sampler.calls={calls}')
    plain.task.sample(settings['sample'], 'sample')


def test_brownian(draw):
  """Another noise, unit still."""
  options = ('sampler.name=ddim', 'sampler.eta=1.', 'sampler.steps=3')
  one, other = draw(*options), draw(*options, 'noise=brownian')
  assert np.abs(one - other).max() > 1e-2
  assert np.std(other) == pytest.approx(np.std(one), rel=0.2)


@pytest.mark.parametrize('overrides, said', [
  (('sample.noise=brown',), "noise='brown'; did you mean brownian"),
  (('sample.sampler.calls=-1',), 'calls=-1 is less than 0'),
  (('sample.interval=(1.,)',), 'interval.*low, high'),
  (('sample.guide=perturbed', 'sample.guide.keep=(1., 1.)', 'sample.guide.scales=(1., 2.)',
    'sample.guidance=2.'), 'guidance=2.0.*scales of its own'),
  (('sample.guide=perturbed', 'sample.guide.keep=(1., 1.)', 'sample.guide.scales=(1.,)'),
   'config.sample.*2 conditions and 1 scales'),
  (('sample.sampler=ddpm', 'sample.sampler.variance=learned'), 'config.sample.*learned_range'),
  (('sample.transforms.a=zero_init', 'sample.sampler.grid=explicit',
    'sample.sampler.grid.times=(0.5,)'), '1 times for steps=4'),
  (('sample.guidance=2.', 'model.classes=0'), 'takes no condition'),
])
def test_wrong_sampling(overrides, said):
  """Said before anything is compiled."""
  run = run_diffax.setup(*TINY, *overrides)
  with pytest.raises(ConfigError, match=said):
    sample.drawer(run, run.config['sample'], 'sample')


@pytest.mark.parametrize('overrides, said', [
  (('task.self_condition=2.',), 'self_condition=2.0 is outside'),
  (('loss.importance=-1',), 'importance=-1 is negative'),
  (('loss.perturb=-1.',), 'perturb=-1.0 is negative'),
  (('loss.uncertainty=-1',), 'uncertainty=-1 is negative'),
  (('loss.distance=pseudo_huber', 'loss.distance.c=0.'), 'loss.distance: c=0'),
  (('loss.weight=vlb', 'loss.time=logit_normal'), 'loss.weight: a likelihood bound'),
  (('schedule.name=shift', 'schedule.of=linear', 'schedule.shift=-1.'), 'schedule: shift'),
  (('schedule.name=shift', 'schedule.of.name=shift', 'schedule.of.of=linear',
    'schedule.of.shift=-1.'), 'schedule.of: shift'),
  (('loss.time.name=shifted', 'loss.time.of.name=mode', 'loss.time.of.s=9.'), 'loss.time.of: s=9'),
  (('schedule=learned', 'schedule.gamma_min=9.'), 'schedule: learned'),
  (('schedule.name=truncate', 'schedule.of=learned', 'schedule.t_min=0.1', 'schedule.t_max=2.'),
   'schedule: truncate'),
  (('task.self_condition=0.5', 'model=test_generate.fixed'), 'as many channels'),
])
def test_wrong_training(overrides, said):
  with pytest.raises(ConfigError, match=said):
    run_diffax.setup(*TINY, *overrides)


def fixed(classes: int = 0) -> nn.Module:
  """A network that returns what it is given."""
  del classes
  return nn.Dropout(0.0)
