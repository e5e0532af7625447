"""Checkpoints: which are kept, what is refused, what another run may begin with, and checksums."""

import shutil

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_diffax

from diffax import checkpoint
from diffax import sharding
from diffax import train
from diffax.build import ConfigError


def state(value, width=4):
  return {'params': {'net': {'w': jnp.full((width, 2), value)}}, 'ema': {'0.9': jnp.full(3, value)}}


def like(tree):
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return checkpoint.abstract(tree, jax.tree.map(lambda _: place, tree))


def fill(folder, steps, **keep):
  checkpoints = checkpoint.Checkpoints(folder, **keep)
  for step in steps:
    checkpoints.save(step, state(float(step)))
  checkpoints.wait()
  return checkpoints


@pytest.mark.parametrize('keep, kept', [
  (dict(last=3), [6, 7, 8]), (dict(last=1), [8]), (dict(last=2, every=3), [3, 6, 7, 8])])
def test_kept(keep, kept, tmp_path):
  """The last few, and those at multiples."""
  checkpoints = fill(tmp_path / 'c', range(1, 9), **keep)
  assert checkpoints.steps() == checkpoint.present(tmp_path / 'c') == kept
  checkpoints.close()


def test_wait(tmp_path):
  """A save is on disk after `wait`, whole: what was in the buffers when it was called."""
  checkpoints = checkpoint.Checkpoints(tmp_path / 'c')
  donate = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  now = state(1.0)
  checkpoints.save(1, now)
  now = donate(now)  # while it is being written
  checkpoints.wait()
  found = checkpoint.read(tmp_path / 'c', 1, like(state(0.0)))
  assert float(found['params']['net']['w'][0, 0]) == 1
  assert float(now['params']['net']['w'][0, 0]) == 2
  assert not list((tmp_path / 'c').glob('*tmp*'))
  checkpoints.close()


def test_relative_folder(tmp_path, monkeypatch):
  """As in the first command of the README."""
  monkeypatch.chdir(tmp_path)
  fill(epath.Path('c'), [1]).close()
  assert checkpoint.load(epath.Path('c'), 0, like(state(0.0)))[0] == 1


def test_buckets_stay_as_they_are():
  assert str(checkpoint._absolute('gs://bucket/run')) == 'gs://bucket/run'


def test_newest_unreadable(tmp_path, caplog):
  """It is named, set aside, and its step can be saved anew; reading alone moves nothing."""
  checkpoints = fill(tmp_path / 'c', [1, 2])
  (tmp_path / 'c' / '2' / 'default' / '_METADATA').write_bytes(b'')
  wanted = like(state(0.0))
  assert checkpoint.load(tmp_path / 'c', 0, wanted)[0] == 1
  assert checkpoint.present(tmp_path / 'c') == [1, 2]
  with pytest.raises(ConfigError, match='can be read'):
    checkpoint.load(tmp_path / 'c', 2, wanted)
  step, found = checkpoint.restore(checkpoints, wanted)
  assert step == 1 and float(found['params']['net']['w'][0, 0]) == 1
  assert 'checkpoint 2 cannot be read' in caplog.text
  assert (tmp_path / 'c' / 'unreadable-2').exists()
  checkpoints.save(2, state(5.0))
  checkpoints.wait()
  step, found = checkpoint.restore(checkpoints, wanted)
  assert step == 2 and float(found['params']['net']['w'][0, 0]) == 5
  checkpoints.close()


@pytest.mark.parametrize('lost', ['_METADATA', 'd'])
def test_weights_of_a_run_whose_newest_is_damaged(lost, tmp_path, caplog):
  """Of the one before it, which is said; where none can be read, that."""
  run, folder = run_diffax.setup(), tmp_path / 'c'
  first = train.init(run)
  saved = checkpoint.Checkpoints(folder)
  saved.save(1, first)
  saved.save(2, first.replace(params=jax.tree.map(lambda x: x + 1, first.params)))
  saved.wait()
  saved.close()
  spoil(folder / '2' / 'default' / lost)
  found = checkpoint.weights(folder, run.like)
  run_diffax.assert_same(run_diffax.flat(found['params']), run_diffax.flat(first.params))
  assert 'checkpoint 2 cannot be read' in caplog.text
  spoil(folder / '1' / 'default' / lost)
  with pytest.raises(ConfigError, match='no checkpoint in .* can be read'):
    checkpoint.weights(folder, run.like)


def spoil(path):
  """A file is cut, a folder's files are gone."""
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.write_bytes(b'')


def test_none(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path / 'c')
  assert checkpoint.restore(checkpoints, like(state(0.0))) == (0, None)
  checkpoints.close()
  with pytest.raises(ConfigError, match='train first'):
    checkpoint.load(tmp_path / 'c', 0, like(state(0.0)))
  with pytest.raises(ConfigError, match='no checkpoint of step 7.*there are: none'):
    checkpoint.load(tmp_path / 'nosuch', 7, like(state(0.0)))


def test_part(tmp_path):
  """Only what is asked for is read."""
  fill(tmp_path / 'c', [3]).close()
  step, found = checkpoint.load(tmp_path / 'c', 0, {'ema': like(state(0.0))['ema']})
  assert step == 3 and found.keys() == {'ema'}
  np.testing.assert_array_equal(found['ema']['0.9'], [3, 3, 3])


# --- checksums ------------------------------------------------------------------------------------


def some_arrays():
  rng = np.random.default_rng(0)
  return {
    'a': rng.standard_normal((8, 16, 4)).astype('f4'), 'b': jnp.arange(24, dtype=jnp.bfloat16),
    'c': np.array([True, False]), 'd': np.int32(7), 'e': rng.integers(0, 255, (3, 5), np.uint8),
  }


def test_same_on_any_mesh():
  wanted = checkpoint.checksums(some_arrays())
  assert set(wanted) == set('abcde') and len(set(wanted.values())) == 5
  for axes in (dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)):
    mesh = sharding.make_mesh(axes)
    for spec in (('fsdp',), (None, 'fsdp'), (('data', 'fsdp'), 'tensor')):
      place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
      laid = some_arrays() | {'a': jax.device_put(some_arrays()['a'], place)}
      assert checkpoint.checksums(laid) == wanted


@pytest.mark.parametrize('name', 'abcde')
def test_any_bit_shows(name):
  rng, wanted = np.random.default_rng(1), checkpoint.checksums(some_arrays())
  for _ in range(20):
    changed = {k: np.array(x) for k, x in some_arrays().items()}
    flat = changed[name].reshape(-1).view(np.uint8)
    if name == 'c':
      flat[rng.integers(len(flat))] ^= 1
    else:
      flat[rng.integers(len(flat))] ^= 1 << rng.integers(8)
    found = checkpoint.checksums(changed)
    assert [k for k in found if found[k] != wanted[k]] == [name]


def test_order_shows():
  a = some_arrays()['a']
  assert checkpoint.checksums([a]) != checkpoint.checksums([a[::-1]])
  assert checkpoint.checksums([np.zeros(3)]) != checkpoint.checksums([np.zeros(4)])


def test_other_numbers_in_whole_files(tmp_path):
  """A checkpoint that reads well, of arrays that are not those that were saved: set aside."""
  run = run_diffax.setup()
  state = train.init(run)
  saved = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  for step in (1, 2):
    saved.save(step, state)
  saved.wait()
  other = checkpoint.Checkpoints(tmp_path / 'other')
  other.save(2, state.replace(params=jax.tree.map(lambda x: x + 1e-6, state.params)))
  other.wait()
  newest = tmp_path / 'checkpoints' / '2' / 'default'
  shutil.rmtree(newest)
  shutil.copytree(tmp_path / 'other' / '2' / 'default', newest)
  step, found = checkpoint.restore(saved, train.branches(run.like))
  assert step == 1 and (tmp_path / 'checkpoints' / 'unreadable-2').exists()
  run_diffax.assert_same(
    run_diffax.flat(found['params']), run_diffax.flat(state.params))
  for each in (saved, other):
    each.close()


def test_older_checkpoints_are_read(tmp_path, caplog):
  """Of a version that wrote no checksums: said, and taken as they are."""
  run = run_diffax.setup()
  saved = checkpoint.Checkpoints(tmp_path)
  saved.save(1, train.init(run))
  saved.wait()
  shutil.rmtree(tmp_path / '1' / 'check')
  with caplog.at_level('WARNING', logger='absl'):
    step, _ = checkpoint.restore(saved, train.branches(run.like))
  assert step == 1 and 'not verified' in caplog.text
  saved.close()
