"""Configs: overrides reach every parameter, what is wrong is said, what is written reads back."""

import math
import re

from etils import epath
import numpy as np
import pytest
import run_diffax

from diffax import build
from diffax import config as configs
from diffax import grids
from diffax import schedules
from diffax.build import ConfigError


def get(config, path):
  for key in path.split('.'):
    config = config[key]
  return config


def ramp(low: float, high=2.0, flag=False):
  """A user's own weighting, for the tests."""
  return lambda prediction, level: low + high * level.t


@pytest.mark.parametrize('override, wanted', [
  ('model.dtype=bfloat16', 'bfloat16'),
  ('model.remat=none', 'none'),
  ('data.flip=True', True),
  ('data.flip=false', False),
  ('optimizer.b2=0.95', 0.95),
  ('optimizer.weight_decay=0', 0.0),
  ('optimizer.mask=kernel', 'kernel'),
  ('loss.time.std=1.2', 1.2),
  ('loss.weight.gamma=3.', 3.0),
  ('ema=0.99', (0.99,)),
  ('ema=0.99,0.999', (0.99, 0.999)),
  ('ema=()', ()),
  ('mesh.fsdp=4', 4),
  ('learning_rate=0.01', dict(name='constant_schedule', value=0.01)),
  ('evals.samples.sampler.s_churn=1.', 1.0),
  ('sample.labels=3', '3'),
  ('sample.labels=0,1', '0,1'),
  ('sample.interval=0.1,2.', (0.1, 2.0)),
])
def test_value(override, wanted):
  before = ['loss.weight=min_snr'] if 'gamma' in override else []
  found = get(run_diffax.config(*before, override), override.partition('=')[0])
  assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize('override, path, name, gone', [
  ('loss.time=uniform', 'loss.time', 'uniform', 'std'),
  ('loss.time.name=uniform', 'loss.time', 'uniform', 'std'),
  ('optimizer.name=lion', 'optimizer', 'lion', 'eps'),
  ('evals.samples.sampler.name=ddim', 'evals.samples.sampler', 'ddim', 's_churn'),
  ('sample.sampler=dpmpp_2m', 'sample.sampler', 'dpmpp_2m', 's_churn'),
  ('model.name=dit_preset', 'model', 'dit_preset', 'width'),
])
def test_name(override, path, name, gone):
  """A new name brings its own parameters; those it shares stay, those it does not go."""
  more = ['model.preset=S/2'] if 'preset' in override else []
  old, new = get(run_diffax.config(), path), get(run_diffax.config(override, *more), path)
  assert new['name'] == name and gone in old and gone not in new
  for key in ('steps', 'clip', 'weight_decay', 'classes'):
    if key in new:
      assert new[key] == old[key]


def test_name_with_its_parameters():
  """In any order, for names are looked at first."""
  for order in (1, -1):
    overrides = ['evals.samples.sampler.name=ddim', 'evals.samples.sampler.eta=1.'][::order]
    sampler = run_diffax.config(*overrides)['evals']['samples']['sampler']
    assert (sampler['name'], sampler['eta'], sampler['steps']) == ('ddim', 1.0, 4)


def test_dotted_name():
  """A function of the user's own, with its parameters checked like any other's."""
  config = run_diffax.config('loss.weight=test_config.ramp', 'loss.weight.low=0.5')
  wanted = dict(name='test_config.ramp', low=0.5, high=2.0, flag=False)
  assert config['loss']['weight'] == wanted
  for overrides, said in [
    (['loss.weight=test_config.ramp'], 'low'),
    (['loss.weight=test_config.rmap'], 'mean ramp'),
    (['loss.weight=nosuchmodule.ramp'], 'PYTHONPATH'),
    (['loss.weight=test_config.ramp', 'loss.weight.low=x'], 'low'),
  ]:
    with pytest.raises(ConfigError, match=said):
      run_diffax.config(*overrides)


NESTED = ('schedule.name=shift', 'schedule.of.name=shift_snr', 'schedule.of.of.name=cosine')


@pytest.mark.parametrize('order', [1, -1])
def test_nested(order):
  """What stands under `of` has a name and parameters of its own, at any depth, in any order."""
  more = ('schedule.of.factor=0.5', 'schedule.of.of.t_min=0.01', 'schedule.shift=2')
  config = run_diffax.config(*(*NESTED, *more)[::order])
  linear = dict(name='shift_snr', factor=0.5, of=dict(name='cosine', t_min=0.01))
  assert config['schedule'] == dict(name='shift', shift=2.0, of=linear)
  again = configs.override(config, ['--config.schedule.of.of=vp', '--config.schedule.of=shift'])
  assert again['schedule']['of'] == dict(
    name='shift', shift=3.0, of=dict(name='vp', beta_min=0.1, beta_max=20.0, t_min=0.01))
  assert configs.override(config, ['--config.schedule=linear'])['schedule'] == dict(
    name='linear', t_min=1e-3)


def later(schedule, steps, of):
  """A grid of a grid, for the tests: without its first time."""
  del schedule, steps
  return of[1:]


def test_nested_elsewhere():
  config = run_diffax.config(
    'prediction.name=learned_range', 'prediction.of=v', 'loss.time.name=shifted',
    'loss.time.of=log_normal', 'loss.time.of.std=2.', 'sample.sampler.grid=test_config.later',
    'sample.sampler.grid.of=karras')
  assert config['prediction'] == dict(name='learned_range', of=dict(name='v'))
  assert config['loss']['time']['of'] == dict(name='log_normal', mean=-1.2, std=2.0)
  grid = config['sample']['sampler']['grid']
  assert grid == dict(name='test_config.later', of=dict(name='karras', rho=7.0))
  schedule = schedules.linear()
  found = build.build('diffax.grids', grid, schedule, 5, path='grid')
  np.testing.assert_array_equal(found, grids.karras(schedule, 5)[1:])


@pytest.mark.parametrize('overrides, said', [
  (['schedule=shift'], "no 'schedule.of', which is needed: allowed: .*cosine.*linear"),
  (['schedule.name=shift', 'schedule.of=shift'], "no 'schedule.of.of', which is needed"),
  (['schedule.of=cosine'], 'linear takes no such argument'),
  ([*NESTED, 'schedule.of.of=cosin'], "schedule.of.of.name='cosin'.*did you mean cosine"),
  ([*NESTED, 'schedule.of.of.tmin=1.'], 'schedule.of.of.tmin.*did you mean t_min'),
  ([*NESTED, 'schedule.of.of=v'], 'allowed'),  # a prediction
  (['prediction=learned_range'], "no 'prediction.of', which is needed: allowed: .*velocity"),
  (['loss.time=shifted'], "no 'loss.time.of', which is needed: allowed: .*logit_normal"),
  (['loss.weight=effective_weight'], 'allowed: .*vlb'),
  (['loss.distance=hubr'], 'did you mean huber'),
  (['loss.coupling=remember'], 'allowed: independent, offset, optimal_transport, pyramid'),
  (['loss.draw=uniform'], 'allowed: independent, stratified'),
  (['sample.guide=compose'], 'allowed: .*cfg_zero.*perturbed'),
  (['sample.guide=perturbed'], "no 'sample.guide.keep', which is needed"),
  (['sample.guide.low=1.'], 'low'),  # the interval says it
  (['sample.transforms.cut=cfg'], 'allowed: dynamic_threshold, threshold, zero_init'),
  (['sample.transforms.cut=threshold', 'sample.transforms.cut.bond=1.'], 'did you mean bound'),
])
def test_wrong_of_a_kind(overrides, said):
  """What is allowed at a place is said, and no more is."""
  with pytest.raises(ConfigError, match=said) as error:
    run_diffax.config(*overrides)
  assert '\n' not in str(error.value)


def test_older_config():
  """What it could not say yet is as it was then."""
  config, old = run_diffax.config(), run_diffax.config()
  for key in ('distance', 'draw', 'importance'):
    del old['loss'][key]
  assert configs.differences(old, config) == []
  assert configs.differences(old, run_diffax.config('loss.draw=stratified')) == [
    'loss.draw.name: independent -> stratified']


@pytest.mark.parametrize('override, said', [
  ('stepz=3', 'did you mean steps'),
  ('model.widht=3', 'did you mean width'),
  ('evals.sample.every=3', 'did you mean samples'),
  ('evals.samples.sampler.eta=1.', 'eta'),  # heun has none
  ('schedule.name=cosin', 'did you mean cosine'),
  ('sample.sampler.name=dpmpp2m', 'did you mean dpmpp_2m'),
  ('sample.sampler.grid.name=karas', 'did you mean karras'),
  ('model.name=dit_preset', "no 'model.preset', which is needed"),
  ('optimizer.name=adamm', 'did you mean .*adam'),
  ('model.name=ditt', 'did you mean dit'),
  ('data.name=digit', 'did you mean digits'),
  ('schedule.name=Level', 'allowed'),  # no function of its module
  ('schedule.name=jnp', 'allowed'),
  ('schedule.name=_x', 'allowed'),
  ('steps=many', "steps.*many"),
  ('steps=1.5', 'steps'),
  ('data.flip=3', 'flip'),
  ('model.width=wide', 'width'),
  ('steps', 'VALUE'),
])
def test_wrong(override, said):
  """What was said, what is allowed, what is near; all on one line."""
  with pytest.raises(ConfigError, match=said) as error:
    run_diffax.config(override)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('text, said', [
  ('c.stepz = 3', 'did you mean steps'),
  ('c.model.widht = 3', 'dit takes no such argument.*did you mean width'),
  ("c.steps = '3'", "cannot be casted"),  # ml_collections says it
  ('c.batch_size = True', 'batch_size=True'),
  ('del c.steps', "says no 'steps'"),
  ('del c.model.width', 'width'),
  ('del c.model.name', 'model.*allowed: adm, .*ddpm, ddpmpp, dit'),
  ('c.model = 3', 'model'),
  ('c.mesh.pipeline = 3', 'pipeline'),
  ('syntax error', 'SyntaxError'),
])
def test_wrong_file(text, said, tmp_path):
  place = tmp_path / 'recipe.py'
  place.write_text(f"""from ml_collections import ConfigDict
def get_config():
  c = ConfigDict(dict(steps=3, batch_size=8, mesh=dict()))
  c.model = dict(name='dit', patch=2, width=32, depth=1, heads=2)
  {text}
  return c
""")
  with pytest.raises(ConfigError, match=said) as error:
    configs.complete(configs.load(place))
  assert '\n' not in str(error.value)


def test_variants():
  file = str(run_diffax.ROOT / 'configs' / 'digits.py')
  assert configs.load(file) == configs.load(f'{file}:full') != configs.load(f'{file}:smoke')
  with pytest.raises(ConfigError, match='did you mean smoke.*full'):
    configs.load(f'{file}:smokey')
  with pytest.raises(ConfigError, match=r'did you mean .*digits\.py'):
    configs.load(file.replace('digits', 'digit'))


def test_complete_is_idempotent():
  config = run_diffax.config()
  assert configs.complete(config) == config
  assert configs.override(config, []) == config


def test_override_leaves_its_input():
  """The config of a workdir is compared with what overrides make of it."""
  config, wanted = run_diffax.config(), run_diffax.config()
  configs.override(config, ['--config.loss.time=uniform', '--config.learning_rate=1.'])
  assert config == wanted


def test_no_default_is_shared():
  """Changing one config changes no other."""
  one, wanted = run_diffax.config(), run_diffax.config()
  one['sample']['sampler']['grid']['name'] = one['keep']['last'] = 'changed'
  assert run_diffax.config() == wanted != one


def test_round_trip(tmp_path):
  """Infinities too, and texts that look like them; in JSON that any reader takes."""
  config = run_diffax.config('sample.sampler.s_tmax=inf', 'loss.time.mean=-inf')
  config['data']['split'] = 'Infinity, or so: "x": Infinity'
  path = epath.Path(tmp_path / 'config.json')
  configs.save(config, path)
  found = configs.read(path)
  assert found == config
  assert math.isinf(found['sample']['sampler']['s_tmax']) and found['loss']['time']['mean'] < 0
  bare = re.sub(r'"(\\.|[^"\\])*"', '', path.read_text())
  assert 'Infinity' not in bare and 'NaN' not in bare
  assert configs.differences(found, config) == []


@pytest.mark.parametrize('override', [
  'steps=99', 'accumulate=2', 'mesh.fsdp=4', 'log_every=2', 'save_every=3', 'keep.last=9',
  'evals.samples.every=7', 'sample.count=3', 'sample.sampler=ddim', 'data.workers=1',
  'model.remat=none', 'attention=xla', 'ema_on_host=true', 'watchdog=9'])
def test_free(override):
  """What a run may change and go on."""
  assert configs.differences(run_diffax.config(), run_diffax.config(override)) == []


@pytest.mark.parametrize('override', [
  'seed=1', 'batch_size=64', 'model.width=64', 'model.dropout=0.1', 'optimizer.b1=0.8',
  'optimizer.name=lion', 'ema=0.5', 'loss.time=uniform', 'schedule=cosine', 'data.split=test',
  'learning_rate.peak_value=1.', 'task.drop_cond=0.'])
def test_not_free(override):
  """What decides the numbers; the difference is named."""
  found = configs.differences(run_diffax.config(), run_diffax.config(override))
  assert any(f.startswith(override.partition('=')[0]) and ' -> ' in f for f in found)


def test_functions_of_a_module():
  """Only public functions of that very module: not what it imports."""
  found = build.functions('diffax.grids')
  assert {'uniform', 'karras', 'log_snr'} <= found.keys()
  assert all(f.__module__ == 'diffax.grids' and name[0] != '_' for name, f in found.items())
  assert 'near' not in build.functions('diffax.tasks') and 'generate' in build.functions(
    'diffax.tasks')
