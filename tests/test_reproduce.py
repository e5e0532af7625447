"""Reproduction: an honest rerun stays within the stored bands, a wrong one leaves them."""

import json
import pathlib
import shutil
import sys

from etils import epath
import jax
import numpy as np
import pytest
import run_diffax

from diffax import config as configs
from diffax import log
from diffax import train

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'experiments'))
import reproduce  # noqa: E402, after its folder is on the path

CONFIG = '''"""A tiny run on the digits."""

from ml_collections import ConfigDict


def get_config():
  return ConfigDict(dict(
    seed=0, steps=240, batch_size=32, log_every=3, save_every=1000,
    schedule=dict(name='ve', sigma_min=0.01, sigma_max=20.0),
    prediction=dict(name='edm', sigma_data=0.7, time_scale=1000.0),
    loss=dict(time=dict(name='log_normal', mean=-0.6, std=1.2),
              weight=dict(name='edm', sigma_data=0.7)),
    model=dict(name='dit', patch=2, width=16, depth=1, heads=1, classes=10),
    optimizer=dict(name='adam', clip=1.0), learning_rate=4e-3, ema=(0.9,),
    evals=dict(held_out=dict(name='validation', every=240, count=64, bins=2, batch_size=64)),
  ))
'''


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
  """(config file, workdir of its run, folder of its curves), with `reproduce` looking there."""
  jax.config.update('jax_disable_most_optimizations', True)  # compiling is most of the time
  root = tmp_path_factory.mktemp('reproduce')
  config, here = root / 'tiny.py', reproduce.HERE
  config.write_text(CONFIG)
  reproduce.HERE = root / 'experiments'
  reproduce.HERE.mkdir()
  run_diffax.door('--config', config, '--workdir', root / 'run')
  assert reproduce.main(['--store', str(config), '--workdir', str(root / 'run')]) == 0
  yield str(config), root / 'run', reproduce.HERE
  reproduce.HERE = here
  jax.config.update('jax_disable_most_optimizations', False)


def rerun(config, workdir, *overrides):
  """The rows of a run with overrides, which `reproduce` itself would refuse."""
  settings = configs.override(configs.load(config), [f'--config.{o}' for o in overrides])
  settings['evals'] = {}
  workdir.mkdir()
  train.train(train.setup(settings), epath.Path(workdir))
  return log.read_metrics(workdir / 'metrics.jsonl')


def worst(config, rows):
  """The largest distance of a window in bands."""
  return max(row['ratio'] for row in reproduce.compare(reproduce.read(config), rows, []))


# the bands


def test_windows_of_a_known_curve():
  rows = [dict(step=10 * (i + 1), loss=5.0 - 0.01 * i) for i in range(80)]
  found = reproduce.windows(rows)
  assert [w['first'] for w in found] == list(range(0, 800, 80))
  assert [w['last'] for w in found] == list(range(80, 801, 80))
  for i, window in enumerate(found):
    np.testing.assert_allclose(window['mean'], 5 - 0.01 * (8 * i + 3.5))
    np.testing.assert_allclose(window['band'], reproduce.LAG * 0.01 * 8)  # a line has no spread


def test_false_alarms_are_as_rare_as_is_said():
  rng, alarms, count = np.random.default_rng(0), 0, 1500
  for _ in range(count):
    old, new = 1 + 0.1 * rng.standard_normal((2, 80))
    line = [dict(step=i, loss=y) for i, y in enumerate(old)]
    found = reproduce.windows(line)
    means = new.reshape(len(found), -1).mean(1)
    # without the allowance for a lag, which only widens: the drift of noise is its own
    bands = [w['band'] - _lag(part) for w, part in zip(found, old.reshape(len(found), -1))]
    alarms += any(abs(w['mean'] - m) > b for w, m, b in zip(found, means, bands))
  rate, expected = alarms / count, reproduce.FALSE_ALARMS
  assert abs(rate - expected) < 4 * (expected / count) ** 0.5


def _lag(part):
  return reproduce.LAG * abs(np.polyfit(np.arange(len(part)), part, 1)[0]) * len(part)


def test_too_few_rows_are_said():
  with pytest.raises(reproduce.ConfigError, match='3 logged steps are too few.*16 are needed'):
    reproduce.windows([dict(step=i, loss=1.0) for i in range(3)])


@pytest.mark.parametrize('name, row, count, band', [
  ('quality/frechet', {'quality/frechet': 20.0}, 1600, 0.2 * 20),
  ('quality/kernel', {'quality/kernel': 1.0, 'quality/kernel_std': 0.5}, 1600, 0.2 + 0.5),
  ('quality/frechet', {'quality/frechet': 1.0, 'quality/frechet_real': 3.0}, 1600, 0.2 * 3),
  ('quality/recall', {'quality/recall': 0.5}, 1600, 0.1 + 4 * 0.5 / 40),
])
def test_metric_bands(name, row, count, band):
  np.testing.assert_allclose(reproduce.metric_band(name, row, count)['band'], band)


# runs


def test_the_same_run_is_the_same(stored, tmp_path, capsys):
  config, run, _ = stored
  shutil.copytree(run, tmp_path / 'again')  # finished, so that it is only compared
  assert reproduce.main([config, '--workdir', str(tmp_path / 'again')]) == 0
  said = capsys.readouterr().out
  assert 'the very same number' in said and 'within all bands' in said
  assert 'held_out/loss, step 240, 64 images' in said
  assert (tmp_path / 'again' / 'reproduce.png').read_bytes()[:4] == b'\x89PNG'


def test_a_first_part_of_another_seed_is_within(stored, tmp_path, capsys):
  config, *_ = stored
  command = [config, '--workdir', str(tmp_path / 'run'), '--steps', '72', '--seed', '1']
  assert reproduce.main(command) == 0
  said = capsys.readouterr().out
  assert 'steps 49 to 72' in said and 'steps 73' not in said
  assert 'the very same number' not in said


def test_another_seed_is_within(stored, tmp_path):
  config, *_ = stored
  assert worst(config, rerun(config, tmp_path / 'run', 'seed=2')) < 1


@pytest.mark.parametrize('override', ['learning_rate.value=4e-4', 'loss.weight.sigma_data=0.5'])
def test_a_wrong_run_is_outside(stored, tmp_path, override):
  config, *_ = stored
  assert worst(config, rerun(config, tmp_path / 'run', override)) > 1


def test_what_is_outside_ends_with_1(stored, tmp_path, capsys):
  config, run, _ = stored
  shutil.copytree(run, tmp_path / 'run')
  file = tmp_path / 'run' / 'metrics.jsonl'
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  rows = [row | {'loss': row['loss'] * (2 if row['step'] > 216 else 1)} for row in rows]
  file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  assert reproduce.main([config, '--workdir', str(tmp_path / 'run')]) == 1
  said = capsys.readouterr().out
  assert said.count('OUTSIDE') == 1 and '1 of 13 outside' in said
  assert next(line for line in said.splitlines() if 'OUTSIDE' in line).startswith('loss, steps 217')


# mistakes


def mistake(capsys, *arguments):
  assert reproduce.main([str(a) for a in arguments]) == 2
  said = capsys.readouterr().err
  assert said.startswith('error: ') and said.count('\n') == 1
  return said


def test_a_config_without_curves(stored, tmp_path, capsys):
  shutil.copy(stored[0], tmp_path / 'other.py')
  said = mistake(capsys, tmp_path / 'other.py')
  assert 'no stored curves' in said and 'those of tiny' in said and '--store' in said


def test_changed_settings_are_named(stored, tmp_path, capsys):
  config, *_ = stored
  text = CONFIG.replace('width=16', 'width=32').replace('log_every=3', 'log_every=6')
  (tmp_path / 'tiny.py').write_text(text.replace('count=64', 'count=32'))
  said = mistake(capsys, tmp_path / 'tiny.py')
  assert 'model.width: 16 -> 32' in said and 'log_every: 3 -> 6' in said
  assert 'evals.held_out.count: 64 -> 32' in said
  said = mistake(capsys, '--store', tmp_path / 'tiny.py', '--workdir', stored[1])
  assert 'model.width: 16 -> 32' in said


def test_edited_curves_are_seen(stored, capsys):
  config, _, here = stored
  file = here / 'tiny' / 'curves.json'
  text = file.read_text()
  try:
    file.write_text(text.replace('"digest": "', '"digest": "0'))
    assert 'edited' in mistake(capsys, config)
  finally:
    file.write_text(text)


def test_steps_out_of_reach(stored, tmp_path, capsys):
  config, *_ = stored
  assert '24, the end of the first window, to 240' in mistake(capsys, config, '--steps', 10)
  assert '--steps=241' in mistake(capsys, config, '--steps', 241)


def test_an_unfinished_run_is_not_stored(stored, tmp_path, capsys):
  config, run, _ = stored
  shutil.copytree(run, tmp_path / 'run')
  file = tmp_path / 'run' / 'metrics.jsonl'
  file.write_text(''.join(line + '\n' for line in file.read_text().splitlines()[:50]))
  assert 'step 150 of 240' in mistake(capsys, '--store', config, '--workdir', tmp_path / 'run')
  assert 'holds no run' in mistake(capsys, '--store', config, '--workdir', tmp_path / 'none')
  assert '--workdir' in mistake(capsys, '--store', config)
