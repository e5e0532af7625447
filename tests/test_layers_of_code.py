"""Imports flow one way, and importing diffax does nothing but define."""

import ast
import pathlib
import subprocess
import sys

import pytest
import run_diffax

PACKAGE = run_diffax.ROOT / 'diffax'
LAYERS = {
  'mathematics': ('schedules', 'times', 'grids', 'predictions', 'losses', 'couplings', 'noises',
                  'tableau', 'samplers', 'solvers', 'guidance', 'inverse', 'likelihood', 'ema',
                  'metrics'),
  'models': ('models',),
  'data': ('data',),
  'machinery': ('build', 'config', 'sharding', 'hosts', 'checkpoint', 'optim', 'flops', 'log',
                'images', 'tiles', 'convert', 'chips', 'hlo', 'casts'),
  'tasks': ('tasks', 'conditions', 'edits', 'givens', 'latents', 'perceptual', 'texts'),
  'loops': ('train', 'sample', 'evaluate', 'features', 'references', 'replay', 'updates', 'evals',
            'encode', 'export', 'plan'),
  'doors': ('main',),
}
LOWER = ('mathematics', 'models', 'data', 'machinery')
MAY_IMPORT = {
  'mathematics': ('mathematics',),
  'models': ('models',),
  'data': ('data',),
  'machinery': LOWER,
  'tasks': (*LOWER, 'tasks'),
  'loops': (*LOWER, 'tasks', 'loops'),
  'doors': tuple(LAYERS),
}
OUTSIDE = {  # other packages, where it is not just any; optax and the like in functions alone
  'mathematics': {'jax', 'numpy', 'einops', 'optax', 'diffrax'},
  'models': {'jax', 'numpy', 'einops', 'flax', 'tokamax'},
}


def layer_of(name):
  found = [layer for layer, names in LAYERS.items() if name in names]
  assert found, f'diffax.{name} stands in no layer: add it to LAYERS'
  return found[0]


def imported(file):
  """('diffax' part or None, package) of every import of a file, inside functions too."""
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{file}: relative import'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    else:
      continue
    for name in names:
      package, _, rest = name.partition('.')
      yield (rest.partition('.')[0] if package == 'diffax' else None), package


FILES = sorted(p for p in PACKAGE.rglob('*.py') if p.parent != PACKAGE or p.stem != '__init__')


@pytest.mark.parametrize('file', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layers(file):
  layer = layer_of(file.relative_to(PACKAGE).parts[0].removesuffix('.py'))
  for part, package in imported(file):
    if package == 'diffax':
      if part:  # `import diffax` itself holds the version alone
        assert layer_of(part) in MAY_IMPORT[layer], f'{layer} imports diffax.{part}'
    elif layer in OUTSIDE and package not in sys.stdlib_module_names:
      assert package in OUTSIDE[layer], f'{layer} imports {package}'


def test_configs_import_little():
  for file in (run_diffax.ROOT / 'configs').glob('*.py'):
    assert {package for _, package in imported(file)} <= {'typing', 'ml_collections'}, file


def python(code):
  done = subprocess.run([sys.executable, '-c', code], env=run_diffax.environment(),
                        capture_output=True, text=True, cwd=pathlib.Path('/'))
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_importing_does_nothing():
  """No flag defined, no option of jax set, no device touched."""
  python('''
import importlib, pkgutil
from absl import flags
import jax, flax, optax, grain, orbax.checkpoint  # whose own flags and options are not ours
from jax._src import xla_bridge
options = dict(jax.config.values)
import diffax
for module in pkgutil.walk_packages(diffax.__path__, 'diffax.'):
  importlib.import_module(module.name)
ours = [m for m in flags.FLAGS.flags_by_module_dict() if 'diffax' in m]
assert not ours, ours
changed = {k for k, v in jax.config.values.items() if options.get(k, v) != v}
assert not changed, changed
assert not xla_bridge.backends_are_initialized()
''')


def test_mathematics_needs_little():
  """Samplers in a notebook: jax, numpy and einops are enough."""
  python('''
import sys
for name in ('flax', 'optax', 'orbax', 'grain', 'tensorflow_datasets', 'ml_collections', 'absl',
             'etils', 'PIL', 'matplotlib', 'sklearn', 'tensorboardX', 'tqdm'):
  sys.modules[name] = None
from diffax import couplings, ema, grids, guidance, inverse, likelihood, losses, metrics, noises
from diffax import predictions, samplers, schedules, solvers, tableau, times
''')
