"""The tests' setting: eight virtual CPU devices, quick compiling, the folder of data."""

import atexit
import os
import pathlib
import shutil
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
# Programs of a millisecond, compiled for a minute: without LLVM's passes it is a half of that.
# Flags of $XLA_FLAGS come later and win: 3 and false are what users have.
QUICK = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
if QUICK not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{QUICK} {os.environ.get("XLA_FLAGS", "")}'.strip()
os.environ['XLA_FLAGS'] += ' --xla_force_host_platform_device_count=8'
# And each is compiled once, for all of pytest's workers and the processes that tests start.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='diffax-test-')
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

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
