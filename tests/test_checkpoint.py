"""Checkpoints: which are kept, what is refused, and what another run may begin with."""

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import checkpoint
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
