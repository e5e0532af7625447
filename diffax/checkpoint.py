"""Checkpoints: written beside the training, whole or not at all, read onto today's mesh.

Orbax writes into a folder of another name and renames it when all is there, so an interrupted save
leaves no checkpoint. A checkpoint that is there and cannot be read (a truncated file) is reported,
set aside, and the one before it is used.
"""

from absl import logging
from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

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
    """Starts to write `state`; returns when the arrays are copied off the device."""
    self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

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
    (self.folder / str(step)).rename(aside)
    self._manager.reload()  # which would else refuse to save that step
    return aside


def read(folder, step, like):
  """What `like` asks for of the checkpoint at `step`: a tree, or a dict of some of its branches.

  like: ShapeDtypeStructs with shardings. Raises what orbax, tensorstore and the file system raise.
  """
  arguments = ocp.checkpoint_utils.construct_restore_args(like)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    return reader.restore(
      _absolute(folder) / str(step) / 'default',
      args=ocp.args.PyTreeRestore(
        item=like, restore_args=arguments, partial_restore=isinstance(like, dict)
      ),
    )


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
  for step in checkpoints.steps()[::-1]:
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
  there = present(folder)
  if not there or (step and step not in there):
    raise ConfigError(
      f'no checkpoint{f" of step {step}" if step else ""} in {folder}; there are: '
      f'{", ".join(map(str, there)) or "none (train first)"}'
    )
  for at in [step] if step else reversed(there):
    try:
      return at, read(folder, at, like)
    except Exception as error:  # of many kinds
      logging.warning('checkpoint %d cannot be read (%s)', at, _reason(error))
  raise ConfigError(f'no checkpoint in {folder} can be read')


def weights_like(folder, like):
  """(step, what to read) of another run's newest checkpoint: its parameters, and its averages if
  it kept the same. Reads no array.

  like: the state they are for. Raises ConfigError that names what is missing, surplus or misshapen.
  """
  there = present(folder)
  if not there:
    raise ConfigError(f'--from: no checkpoint in {folder}')
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.metadata(_absolute(folder) / str(there[-1]) / 'default').item_metadata.tree
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
  return there[-1], {'params': like.params} | ({'ema': like.ema} if same else {})


def weights(folder, like):
  """What `weights_like` names, read."""
  return read(folder, *weights_like(folder, like))


def abstract(tree, shardings):
  """ShapeDtypeStructs of `tree`, laid out by `shardings`."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s), tree, shardings
  )
