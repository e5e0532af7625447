"""Recipes: every smoke variant trains and samples through the door, every other one is sound."""

import json
import pathlib
import re
import typing

import jax
import numpy as np
import pytest
import run_diffax

from diffax import config as configs
from diffax import evaluate
from diffax import main
from diffax import train
from diffax.build import build
from diffax.convert import autoencoder as stored
from diffax.convert import tensors
from diffax.data import sources

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / 'configs').glob('*.py'))
SHAPES = {  # of what may not be here, by data set
  'fashion_mnist': (28, 28, 1, 10),
  'cifar10': (32, 32, 3, 10),
  'celeb_a': (218, 178, 3, 0),
  'imagenet_resized/64x64': (64, 64, 3, 1000),
  'latents': (256, 256, 3, 1000),  # the pictures that they are of
  'emoji': (64, 64, 3, 0),
}


def variants(path):
  """The variants that a config lists."""
  found = {}
  exec(compile(path.read_text(), path, 'exec'), found)
  return typing.get_args(typing.get_type_hints(found['get_config'])['variant'])


REAL = [f'{path}:{variant}' for path in CONFIGS for variant in variants(path)[:-1]]


def blank(of: str, split='train') -> sources.Source:
  """A source of the shape of `of`, of nothing but zeros: what setting up a run asks of one."""
  *shape, classes = SHAPES[of]
  read = lambda i: (np.zeros(shape, np.uint8), 0)
  captions = ('a', 'b') if of == 'emoji' else None
  return sources.Source(read, str, 2**20, tuple(shape), classes, np.uint8, captions=captions)


def autoencoder(folder):
  """A folder of the autoencoder that configs/emoji_autoencoder.py trains, of zeros."""
  spec = configs.load(run_diffax.ROOT / 'configs' / 'emoji_autoencoder.py')['model']
  model = build('diffax.models', spec, path='model')
  like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), like['params'])
  tensors.save(folder / 'diffusion_pytorch_model.safetensors', params, stored.stored(model))
  (folder / 'config.json').write_text(json.dumps(stored.to_config(spec)))
  return str(folder)


@pytest.fixture
def quick():
  """One device and little optimization, for compiling is nearly all that a smoke run takes."""
  jax.config.update('jax_disable_most_optimizations', True)
  with run_diffax.devices(1):
    yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_smoke(path, tmp_path, request, quick):
  if configs.load(f'{path}:smoke')['data']['name'] == 'tfds':
    request.getfixturevalue('data_dir')
  command = ['diffax', '--config', f'{path}:smoke', '--workdir', str(tmp_path)]
  main.main(command)
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert rows and all(np.isfinite(row['loss']) for row in rows)
  assert (tmp_path / 'images' / 'loss.png').exists()
  shown = [json.loads(line) for line in (tmp_path / 'evals.jsonl').read_text().splitlines()]
  pictures = [row['samples'] for row in shown if 'samples' in row]
  assert pictures and all((tmp_path / name).exists() for name in pictures)
  main.main(
    [*command, '--mode', 'sample', '--config.sample.count=9', '--config.sample.batch_size=8']
  )
  with np.load(tmp_path / 'samples.npz') as found:
    images, labels = found['arr_0'], found['arr_1']
  assert images.dtype == np.uint8 and images.shape[0] == len(labels) == 9
  assert images.ndim == 4


@pytest.mark.parametrize('path', REAL, ids=lambda path: pathlib.Path(path).name)
def test_the_real_thing_sets_up(path, tmp_path):
  """All of a recipe that needs no records: its network, optimizer, evaluations and sampling."""
  config = configs.complete(configs.load(path))
  data = config['data']
  kept = {k: data[k] for k in ('size', 'flip', 'workers', 'on_error')}
  if data['name'] != 'digits':
    config['data'] = dict(name='test_configs.blank', of=data.get('dataset', data['name']), **kept)
    config['data']['split'] = data['split']
  if config['latent']['name'] == 'autoencoder':
    config['latent']['path'] = autoencoder(tmp_path)
  run = train.setup(configs.complete(config))
  assert set(evaluate.entries(run)) == set(config['evals'])
  assert config['evals']['samples']['every']
  assert run.task.sample(config['sample'], 'sample')


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_docstring_holds_the_command_and_a_number_or_that_there_is_none(path):
  text = path.read_text().partition('"""')[2].partition('"""')[0]
  assert f'python -m diffax.main --config configs/{path.name}' in text
  runs = re.findall(r'experiments/\w+', text)
  assert all((run_diffax.ROOT / run / 'README.md').exists() for run in runs)
  assert runs or any(words in text for words in ('To reach', 'ot run here', 'was not\nmade yet'))
  assert 'GPU' in text or 'CPU' in text  # the hardware


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_form(path):
  assert variants(path)[0] == 'full' and variants(path)[-1] == 'smoke'
  lines = [line for line in path.read_text().splitlines() if line.startswith(('import', 'from'))]
  assert lines == ['from typing import Literal', 'from ml_collections import ConfigDict']
  assert len(path.read_text().splitlines()) <= 80


def test_an_evaluation_can_be_added_from_the_command_line():
  """As the docstring of configs/celeba64.py has it."""
  config = configs.override(
    configs.load(CONFIGS[0].parent / 'celeba64.py'),
    ['--config.evals.quality.name=quality', '--config.evals.quality.count=50000',
     '--config.evals.quality.features.name=inception',
     '--config.evals.quality.features.weights=inception.safetensors'])
  assert config['evals']['quality']['features']['weights'] == 'inception.safetensors'
  assert config['evals']['quality']['count'] == 50_000
