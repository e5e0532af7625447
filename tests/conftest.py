"""The tests' setting: eight virtual CPU devices, no broadcasting of ranks, the folder of data."""

import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8').strip()

import jax  # noqa: E402, after the flags it reads
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Eight devices on few cores: a loop that never waits can deadlock a collective.
jax.config.update('jax_cpu_enable_async_dispatch', False)

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def data_dir():
  """The folder of datasets; a test that needs it is skipped, visibly, where there is none."""
  path = pathlib.Path(os.environ.get('DIFFAX_DATA', ROOT.parent / 'shared' / 'data'))
  if not path.is_dir():
    pytest.skip(f'no data at {path}: set DIFFAX_DATA to the folder of datasets')
  return path


@pytest.fixture(scope='module', autouse=True)
def forget():
  """Compiled programs go with their file's tests, else they come to gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture
def x64():
  """Float64 for one test, where an order of convergence or a derivative is measured."""
  with jax.enable_x64(True):
    yield
