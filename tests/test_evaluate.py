"""Evaluations: held-out loss of known size, samples in parts, inside training and alone."""

import json
import os
import signal

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_diffax

from diffax import checkpoint
from diffax import evaluate
from diffax import features
from diffax import main
from diffax import metrics
from diffax import references
from diffax import sample
from diffax import train
from diffax.build import ConfigError
from diffax.data import sources, transforms
from diffax.evals import Evaluation

CONFIG = """
import run_diffax

def get_config():
  c = run_diffax.get_config()
  c.evals = dict(quality=dict(
    name='quality', count=20, batch_size=8, features='test_evaluate.pixels',
    metrics=('frechet', 'memorisation'), sampler=dict(name='heun', steps=2)))
  return c
"""


@pytest.fixture
def config(tmp_path):
  """A config file whose evaluations are samples in this module's features."""
  file = tmp_path / 'config.py'
  file.write_text(CONFIG)
  return f'--config={file}'


def pixels(source, held_out, size, offset=0) -> features.Features:
  """A feature network in a line: the means of 2x2 pixels."""
  del source, held_out, size

  def extract(params, images):
    x = images.astype(jnp.float32).reshape(len(images), 4, 2, 4, 2) / 255
    return features.Outputs(x.mean((2, 4)).reshape(len(images), 16) + params, None, None)

  return features.Features(
    load=lambda: (jnp.float32(offset), {'name': 'pixels', 'offset': offset}),
    extract=extract, classes=0, gives=('pool',))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('DIFFAX_CACHE', str(tmp_path / 'cache'))


def entry(name, *overrides, devices=1, **fields):
  """(run, the evaluation `name` with these fields)."""
  run = run_diffax.setup(*overrides, count=devices)
  run.config['evals'] = run_diffax.configs.complete(
    {**run.config, 'evals': {'e': {'name': name, **fields}}})['evals']
  return run, evaluate.entries(run)['e']


def numbers(run, evaluation, state, folder):
  return dict(evaluate.carry_out('e', evaluation, state, 0, epath.Path(folder)))


# --- held-out loss --------------------------------------------------------------------------------


@pytest.mark.parametrize('schedule', ['ve', 'linear', 'cosine'])
def test_loss_of_a_network_that_knows_nothing(schedule, tmp_path):
  """EDM's untrained network knows the data's deviation alone: loss 1 at every level."""
  x0 = transforms.to_float(np.stack([r['image'] for r in sources.digits('test')]))
  deviation = float(np.sqrt(np.square(x0).mean()))
  run, held_out = entry(
    'validation', f'schedule={schedule}', 'prediction=edm', f'prediction.sigma_data={deviation}',
    devices=8, sigma_data=deviation, low=0.02, high=20.0)
  found = numbers(run, held_out, train.init(run), tmp_path)
  assert len(found) == 11 and 'e/loss' in found
  np.testing.assert_allclose(list(found.values()), 1.0, atol=0.05)


def test_loss_does_not_depend_on_batches(tmp_path):
  """Nor on the devices: each image has its own level and noise; of a bin, others have none."""
  state = None
  for size, devices in ((250, 1), (7, 1), (64, 8)):
    run, held_out = entry('validation', devices=devices, batch_size=size, low=0.1)
    state = state or jax.device_get(train.init(run))
    found = numbers(run, held_out, jax.tree.map(jnp.asarray, state), tmp_path)
    first = found if size == 250 else first  # noqa: F821
    np.testing.assert_allclose(list(found.values()), list(first.values()), rtol=1e-5)


# --- samples --------------------------------------------------------------------------------------


def test_quality_goes_on(tmp_path, monkeypatch):
  """Interrupted, it draws only what is left, and comes to the same numbers."""
  monkeypatch.setattr('diffax.evals.quality.PART', 8)
  fields = dict(count=20, batch_size=8, features='test_evaluate.pixels', metrics=('frechet',),
                sampler=dict(name='heun', steps=2))
  run, evaluation = entry('quality', **fields)
  state = train.init(run)
  whole = numbers(run, evaluation, state, tmp_path / 'a')
  assert list(whole) == ['e/frechet', 'e/frechet_real']
  assert 0 < whole['e/frechet_real'] < whole['e/frechet']
  assert not (tmp_path / 'a' / 'evals' / 'e-0').exists()

  calls = iter([False, True])
  workdir = epath.Path(tmp_path / 'b')
  assert evaluate.carry_out('e', evaluation, state, 0, workdir, lambda: next(calls)) is None
  parts = sorted((tmp_path / 'b' / 'evals' / 'e-0').iterdir())
  assert len(parts) == 2
  parts[1].write_bytes(parts[1].read_bytes()[:100])  # cut short: drawn again
  drawn = []
  drawer = sample.drawer

  def counting(*args):
    draw = drawer(*args)
    return lambda state, count, start: drawn.append(start) or draw(state, count, start)

  monkeypatch.setattr(sample, 'drawer', counting)
  _, evaluation = entry('quality', **fields)
  assert numbers(run, evaluation, state, tmp_path / 'b') == whole
  assert drawn == [8, 16]
  other = state.replace(ema=jax.tree.map(lambda x: x + 0.01, state.ema))
  calls = iter([True])
  evaluate.carry_out('e', evaluation, other, 0, workdir, lambda: next(calls))
  drawn.clear()
  numbers(run, evaluation, state, tmp_path / 'b')
  assert drawn == [0, 8, 16]  # of other parameters nothing is taken


def test_references(tmp_path, monkeypatch):
  """Computed once; one of other features or other data is refused, a damaged one made again."""
  fields = dict(count=8, batch_size=8, metrics=('frechet',), sampler=dict(name='heun', steps=2))
  spec = dict(name='test_evaluate.pixels', offset=0)
  file = tmp_path / 'real.npz'
  run, evaluation = entry('quality', features=spec, reference=str(file), **fields)
  evaluation.prepare()
  stored = [p.name for p in (tmp_path / 'cache' / 'references').iterdir()]
  assert len(stored) == 1 and stored[0].startswith('digits-test-pixels-') and file.exists()
  monkeypatch.setattr(references, '_compute', None)
  entry('quality', features=spec, reference=str(file), **fields)[1].prepare()
  with pytest.raises(ConfigError, match="features: .*'offset': 0.* there, .*'offset': 1"):
    entry('quality', features=spec | dict(offset=1), reference=str(file), **fields)[1].prepare()
  with pytest.raises(ConfigError, match='split: train there, all here.*cannot be compared'):
    entry('quality', 'data.split=all', features=spec, reference=str(file), **fields)[1].prepare()
  monkeypatch.undo()
  monkeypatch.setenv('DIFFAX_CACHE', str(tmp_path / 'cache'))
  before = file.read_bytes()
  file.write_bytes(before[:-1000])
  entry('quality', features=spec, reference=str(file), **fields)[1].prepare()
  found = dict(np.load(file))
  said = json.loads(str(found['description']))
  assert said['records']['count'] == 1438 == int(found['moments.count'])
  real = metrics.moments(found['pool'])
  np.testing.assert_allclose(found['moments.cov'], real.cov, atol=1e-9)


# --- inside training ------------------------------------------------------------------------------

SHORT = ('steps=6', 'save_every=3', 'log_every=1')


def counted(run, path, at=0) -> Evaluation:
  """An evaluation of three parts; at step `at` a SIGTERM comes in the second."""
  del run

  def evaluate(state, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(3):
      if (folder / str(i)).exists():
        continue
      if int(state.step) == at and i == 1 and not (folder.parent / 'killed').exists():
        (folder.parent / 'killed').write_text('')
        os.kill(os.getpid(), signal.SIGTERM)
      (folder / str(i)).write_text('')
      yield None
    yield path.split('.')[1], float(state.ema['0.995']['net']['patch_out']['bias'][0])

  return Evaluation(evaluate)


def rows(workdir):
  return [json.loads(line) for line in (workdir / 'evals.jsonl').read_text().splitlines()]


def test_interrupted_in_training(tmp_path):
  """A signal ends an evaluation; the step is saved, and the resumed run evaluates it after all."""
  with_evals = [*SHORT, 'evals.samples=test_evaluate.counted', 'evals.samples.every=2']
  run = run_diffax.setup(*with_evals, count=8)
  train.train(run, epath.Path(tmp_path / 'whole'))
  run = run_diffax.setup(*with_evals, 'evals.samples.at=4', count=8)
  for steps in ([3, 4], [3, 4, 6]):
    train.train(run, epath.Path(tmp_path / 'cut'))
    assert checkpoint.present(tmp_path / 'cut' / 'checkpoints') == steps
  assert rows(tmp_path / 'cut') == rows(tmp_path / 'whole')
  assert [row['step'] for row in rows(tmp_path / 'cut')] == [2, 4, 6]
  assert [p.name for p in (tmp_path / 'cut' / 'evals').iterdir()] == ['killed']


# --- averages of any width ------------------------------------------------------------------------


def test_averages_made_afterwards(tmp_path):
  """Of two widths kept at some steps, a third, as it would have been."""
  powers = "ema='power_0.05','power_0.1'"
  run = run_diffax.setup('steps=24', powers, 'keep.averages=2', 'save_every=8', count=8)
  train.train(run, epath.Path(tmp_path / 'two'))
  assert checkpoint.present(tmp_path / 'two' / 'averages') == list(range(2, 25, 2))
  third = run_diffax.setup('steps=24', "ema='power_0.07','power_0.12'", 'save_every=8', count=8)
  wanted = train.train(third, epath.Path(tmp_path / 'third'))
  for step in (16, 0):
    at, state = sample.restore(
      run, epath.Path(tmp_path / 'two'), step, ['power_0.07', 'power_0.12', 'power_0.05'])
    assert at == (step or 24)
    ema = wanted.ema if not step else checkpoint.read(
      tmp_path / 'third' / 'checkpoints', step, {'ema': third.like.ema})['ema']
    flat = {name: run_diffax.flat(tree) for name, tree in (state.ema | ema).items()}
    made = {name: run_diffax.flat(state.ema[name]) for name in ema}
    for name in ema:
      for key, value in flat[name].items():
        apart = np.abs(flat['power_0.05'][key] - flat['power_0.12'][key]).max()
        assert np.abs(made[name][key] - value).max() <= 0.05 * apart + 1e-7, (step, name, key)


# --- at the door ----------------------------------------------------------------------------------


def test_evaluate_at_the_door(config, tmp_path, capsys):
  """Training, then metrics.json of two checkpoints; an entry alone; the same numbers again."""
  command = [config, '--workdir', tmp_path / 'run', '--config.steps=6', '--config.save_every=3']
  run_diffax.door(*command)
  command = ['--workdir', tmp_path / 'run', '--mode', 'evaluate']
  run_diffax.door(*command)
  assert str(tmp_path / 'run' / 'metrics.json') in capsys.readouterr().out
  first = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
  run_diffax.door(*command, '--step', '3', '--evals', 'quality')
  second = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
  assert second['6'] == first['6'] and set(second) == {'3', '6'}
  found = second['3']['quality']
  assert found['settings']['count'] == 20 and found['quality/frechet'] > 0
  run_diffax.door('--workdir', tmp_path / 'run', '--mode', 'reference')
  assert 'quality: ready' in capsys.readouterr().out


@pytest.mark.parametrize('arguments, words', [
  (['--evals', 'qualty'], ['--evals=qualty', 'did you mean quality']),
  (['--config.evals.quality.metrics.a=frechett'], ['metrics.a', 'did you mean frechet']),
  (['--config.evals.quality.features=nothing'], ['features', 'nothing', 'classifier']),
  (['--config.evals.quality.count=1'], ['evals.quality.count=1', '2']),
  (['--config.evals.quality.split=valid'], ['evals.quality.split', 'valid', 'test']),
  (['--config.evals.quality.ema=power_0.07'], ['power_0.07', 'not kept', '0.995']),
  (['--config.evals.quality.metrics.a=class_accuracy'], ['class_accuracy', 'classifier']),
])
def test_mistakes(arguments, words, config, tmp_path, capsys):
  """One line each, before anything is drawn."""
  workdir = tmp_path / 'run'
  workdir.mkdir()
  with pytest.raises(SystemExit) as stopped:
    main.main(['diffax', config, '--workdir', str(workdir), '--mode', 'evaluate', *arguments])
  said = capsys.readouterr().err
  assert stopped.value.code == 2 and said.count('\n') == 1, said
  assert all(word in said for word in words), said
