"""Every config's smoke variant trains and samples through the door."""

import json
import pathlib

import numpy as np
import pytest

from diffax import main

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / 'configs').glob('*.py'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_smoke(path, tmp_path, request):
  if "name='tfds'" in path.read_text():
    request.getfixturevalue('data_dir')
  command = ['diffax', '--config', f'{path}:smoke', '--workdir', str(tmp_path)]
  main.main(command)
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert rows and all(np.isfinite(row['loss']) for row in rows)
  assert (tmp_path / 'images' / 'loss.png').exists()
  main.main(
    [*command, '--mode', 'sample', '--config.sample.count=5', '--config.sample.batch_size=8']
  )
  with np.load(tmp_path / 'samples.npz') as found:
    images, labels = found['arr_0'], found['arr_1']
  assert images.dtype == np.uint8 and images.shape[0] == len(labels) == 5
  assert images.ndim == 4


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_docstring_holds_the_command(path):
  text = path.read_text().partition('"""')[2].partition('"""')[0]
  assert f'python -m diffax.main --config configs/{path.name}' in text
