"""Checkpoints: written beside the training, whole or not at all, read onto today's mesh.

Orbax writes into a folder of another name and renames it when all is there, so an interrupted save
leaves no checkpoint. Beside the arrays stand their checksums, of what was in the devices' memory: a
disk that loses or changes bits is found out. A checkpoint that is there and cannot be read, or is
not what was written, is reported, set aside, and the one before it is used.
"""

import json

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from diffax import hosts
from diffax import sharding
from diffax.build import ConfigError


def _absolute(folder):
  """Orbax asks for absolute paths; a bucket's is one already, and `resolve` would spoil it."""
  path = epath.Path(folder)
  return path if '://' in str(folder) else path.resolve()


class Checkpoints:
  """The checkpoints of a run, by step, in `folder`.

  last: how many of the newest are kept. every: those at multiples of it are kept too; 0 for none.
  """

  def __init__(self, folder, last=3, every=0):
    self.folder = _absolute(folder)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=last,
      keep_period=every or None,
      cleanup_tmp_directories=True,
      enable_async_checkpointing=True,
    )
    self._manager = ocp.CheckpointManager(self.folder, options=options)

  def steps(self):
    """The steps there are, newest last."""
    self._manager.reload()
    return sorted(self._manager.all_steps())

  def save(self, step, state):
    """Starts to write `state`; returns when the arrays are copied off the device.

    Of its branch `frozen`, which it was given, the checksums alone.
    """
    sums = checksums(state)
    if getattr(state, 'frozen', None):
      state = state.replace(frozen={})
    arguments = ocp.args.Composite(
      default=ocp.args.StandardSave(state), check=ocp.args.JsonSave(sums)
    )
    self._manager.save(step, args=arguments, force=True)

  def wait(self):
    """Returns when all saves are on disk."""
    self._manager.wait_until_finished()

  def close(self):
    self._manager.close()

  def set_aside(self, step):
    """Renames an unreadable checkpoint: it is kept for a look, and its step is free again."""
    aside, n = self.folder / f'unreadable-{step}', 1
    while aside.exists():
      aside, n = self.folder / f'unreadable-{step}.{n}', n + 1
    hosts.wait()  # all have found the name before it is taken
    if hosts.first():
      (self.folder / str(step)).rename(aside)
    hosts.wait()
    self._manager.reload()  # which would else refuse to save that step
    return aside


# --- checksums ------------------------------------------------------------------------------------


def checksums(tree):
  """{path: 32 bits} of the arrays of a tree; the same on any mesh and any number of hosts.

  A sum, modulo 2^32, over the elements of their bits and places, mixed (Appleby's finalizer of
  MurmurHash3, which is one to one): a change of one element always shows, any other but once in
  2^32 times.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  sums = sharding.fetch(_checksums([x for _, x in leaves]))
  return {sharding.name(path): int(sum_) for (path, _), sum_ in zip(leaves, sums, strict=True)}


@jax.jit
def _checksums(arrays):
  return jnp.stack([_checksum(x) for x in arrays]) if arrays else jnp.zeros(0, jnp.uint32)


def _checksum(x):
  x, size = jax.device_put(x, jax.memory.Space.Device), x.dtype.itemsize  # some lie on the host
  if x.dtype == bool:
    bits = x.astype(jnp.uint32)
  elif size < 4:
    bits = jax.lax.bitcast_convert_type(x, f'uint{8 * size}').astype(jnp.uint32)
  else:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)  # of 8 bytes, two in an axis of their own
  v = bits + np.uint32(0x9E3779B9) * _place(bits.shape)
  v = (v ^ (v >> 16)) * np.uint32(0x85EBCA6B)
  v = (v ^ (v >> 13)) * np.uint32(0xC2B2AE35)
  return jnp.sum(v ^ (v >> 16), dtype=jnp.uint32)


def _place(shape):
  """The number of each element, modulo 2^32; axis by axis, so that none must be whole anywhere."""
  place, stride = jnp.zeros(shape, jnp.uint32), 1
  for axis in reversed(range(len(shape))):
    number = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    place += number * np.uint32(stride % 2**32)
    stride *= shape[axis]
  return place


def _written(folder, step):
  """{path: checksum} that a checkpoint holds, None where it holds none."""
  file = _absolute(folder) / str(step) / 'check' / 'metadata'
  if not file.exists():
    logging.warning('checkpoint %d is of a version without checksums: not verified', step)
    return None
  return json.loads(file.read_text())


def _changed(written, tree):
  """The paths of arrays that are not those whose checksums were written."""
  sums = {} if written is None else checksums(tree)
  return [path for path, sum_ in sums.items() if written.get(path) != sum_]


def same(folder, step, tree):
  """Raises ConfigError where arrays that a run is given are not those it had at `step`.

  tree: {branch: {name: parameters}}. Names that it had none of then may be anything: of an encoder
  that is there to sample from a run trained on what it said.
  """
  written = _written(folder, step) if jax.tree.leaves(tree) else None
  name = lambda path: path.split('/')[:2]
  had = [name(path) for path in written or ()]
  changed = [path for path in _changed(written, tree) if name(path) in had]
  if changed:
    raise ConfigError(
      f'{len(changed)} weights are not those that the checkpoint of step {step} in {folder} was '
      f'trained with, among them {", ".join(changed[:3])}: name the files it was trained with, or '
      'begin another run'
    )


def _verify(folder, step, tree):
  """Raises ValueError where arrays read are not those that were written."""
  changed = _changed(_written(folder, step), tree)
  if changed:
    raise ValueError(
      f'{len(changed)} arrays are not what was written, among them {", ".join(changed[:3])}'
    )


def read(folder, step, like):
  """What `like` asks for of the checkpoint at `step`: a tree, or a dict of some of its branches.

  like: ShapeDtypeStructs with shardings. Raises what orbax, tensorstore and the file system raise,
  and ValueError where the arrays are not what was written; on all hosts where it is so on any.
  """
  arguments, found, failure = ocp.checkpoint_utils.construct_restore_args(like), None, None
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      found = reader.restore(
        _absolute(folder) / str(step) / 'default',
        args=ocp.args.PyTreeRestore(
          item=like, restore_args=arguments, partial_restore=isinstance(like, dict)
        ),
      )
  except Exception as error:  # of many kinds
    failure = error
  if not hosts.every(failure is None):
    raise failure or ValueError('another host cannot read its part')
  _verify(folder, step, found)
  return found


def present(folder):
  """The steps of the finished checkpoints in `folder`, newest last; it need not exist."""
  folder = epath.Path(folder)
  return (
    sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []
  )


def _reason(error):
  return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


def restore(checkpoints, like):
  """(step, state) of the newest checkpoint that can be read, or (0, None) where there is none.

  Newer ones that cannot be read are named in the log and set aside. Raises ConfigError where there
  are checkpoints and none can be read: to begin anew is then not for this code to decide.
  """
  unread = []
  for step in hosts.tell(checkpoints.steps())[::-1]:
    try:
      state = read(checkpoints.folder, step, like)
    except Exception as error:  # of many kinds
      unread.append((step, _reason(error)))
      continue
    for bad, reason in unread:
      aside = checkpoints.set_aside(bad)
      logging.warning(
        'checkpoint %d cannot be read (%s); set aside as %s, going on from %d',
        *(bad, reason, aside, step),
      )
    return step, state
  if unread:
    raise ConfigError(
      f'none of the checkpoints {[step for step, _ in unread]} in {checkpoints.folder} can be read '
      f'({unread[0][1]}): mend them, or choose another --workdir'
    )
  return 0, None


def load(folder, step, like):
  """(step, branches) of the checkpoint at `step`, or of the newest that can be read where it is 0.

  Reads only, and only what the dict `like` asks for. Raises ConfigError where there is none.
  """
  there = hosts.tell(present(folder))
  if not there or (step and step not in there):
    raise ConfigError(
      f'no checkpoint{f" of step {step}" if step else ""} in {folder}; there are: '
      f'{", ".join(map(str, there)) or "none (train first)"}'
    )
  found = _first_that_reads([step] if step else there[::-1], lambda at: read(folder, at, like))
  if not found:
    raise ConfigError(f'no checkpoint in {folder} can be read')
  return found


def _first_that_reads(steps, attempt):
  """(step, what `attempt` makes of it) of the first where it succeeds; None where it does nowhere.

  What cannot be read is named in the log.
  """
  for step in steps:
    try:
      return step, attempt(step)
    except Exception as error:  # of many kinds
      logging.warning('checkpoint %d cannot be read (%s)', step, _reason(error))
  return None


def weights_like(folder, like):
  """What to read of another run's newest checkpoint, a dict of branches: its parameters, and its
  averages if it kept the same. Reads no array.

  like: the state they are for. Raises ConfigError that names what is missing, surplus or misshapen.
  """
  there = present(folder)
  if not there:
    raise ConfigError(f'--from: no checkpoint in {folder}')
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    arrays = lambda step: reader.metadata(_absolute(folder) / str(step) / 'default')
    found = _first_that_reads(there[::-1], lambda step: arrays(step).item_metadata.tree)
  if not found:
    raise ConfigError(f'--from: no checkpoint in {folder} can be read; begin with another run')
  tree = found[1]
  flat = lambda tree: {
    jax.tree_util.keystr(p, simple=True, separator='/'): tuple(x.shape)
    for p, x in jax.tree_util.tree_leaves_with_path(tree)
  }
  has, wants = flat(tree['params']), flat(like.params)
  wrong = [
    f'{k}: {has.get(k, "missing")} there, {wants.get(k, "none")} here'
    for k in sorted({**has, **wants})
    if has.get(k) != wants.get(k)
  ]
  if wrong:
    raise ConfigError(
      f'--from={folder}: {len(wrong)} parameters do not fit: {"; ".join(wrong[:5])}'
    )
  same = sorted(tree['ema']) == sorted(like.ema)
  return {'params': like.params} | ({'ema': like.ema} if same else {})


def weights(folder, like):
  """What `weights_like` names, of the newest checkpoint that can be read."""
  return load(folder, 0, weights_like(folder, like))[1]


def abstract(tree, shardings):
  """ShapeDtypeStructs of `tree`, laid out by `shardings`."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s), tree, shardings
  )
