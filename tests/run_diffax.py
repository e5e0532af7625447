"""Small runs of diffax for tests: configs, runs on some of the devices, and processes to kill."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import threading
import time
from unittest import mock

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np
import orbax.checkpoint as ocp

from diffax import config as configs
from diffax import log
from diffax import main
from diffax import sharding
from diffax import train
from diffax.data import sources

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMOKE = str(pathlib.Path(__file__).resolve())  # this file is the config, too


def get_config():
  """The digits in 20 steps of 32."""
  sampler = dict(name='heun', steps=4)
  return ConfigDict(dict(
    seed=0, steps=20, batch_size=32,
    data=dict(name='digits', split='train'),
    task=dict(name='generate', drop_cond=0.1),
    schedule=dict(name='linear'),
    prediction=dict(name='velocity'),
    loss=dict(time=dict(name='logit_normal'), weight=dict(name='uniform')),
    model=dict(name='dit', patch=2, width=32, depth=2, heads=2, classes=10),
    optimizer=dict(name='adamw', b2=0.99, weight_decay=0.001, clip=1.0),
    learning_rate=dict(name='warmup_cosine_decay_schedule', init_value=0.0, peak_value=3e-3,
                       warmup_steps=5, decay_steps=20, end_value=0.0),
    ema=(0.995,),
    log_every=5, save_every=10,
    evals=dict(samples=dict(name='grid', every=0, rows=2, columns=4, batch_size=8,
                            sampler=sampler)),
    sample=dict(count=8, batch_size=8, sampler=sampler),
  ))


def digits():
  """The digits, as slow as the environment says: the time there is to interrupt a run."""
  source = sources.digits()
  return dataclasses.replace(source, read=functools.partial(_slowly, source.read))


def _slowly(read, i):
  time.sleep(float(os.environ.get('DIFFAX_TEST_SLEEP', 0)))
  return read(i)


def digits_in_turn():
  """The same, one after the other: threads that read ahead do not make up for it."""
  source = sources.digits()
  return dataclasses.replace(source, read=functools.partial(_in_turn, source.read))


def _in_turn(read, i):
  with TURN:
    return _slowly(read, i)


TURN = threading.Lock()


def config(*overrides):
  """That config with overrides ('steps=3', ...), complete."""
  return configs.override(get_config().to_dict(), [f'--config.{o}' for o in overrides])


@contextlib.contextmanager
def devices(count):
  """Within it, meshes are made of the first `count` devices."""
  make = sharding.make_mesh
  first = lambda axes, devices=None: make(axes, jax.devices()[:count])
  with mock.patch.object(sharding, 'make_mesh', first):
    yield


def setup(*overrides, count=1):
  """A run of it on `count` devices."""
  return train.setup(config(*overrides), jax.devices()[:count])


def door(*arguments):
  """What the command line says, in this process; all 8 devices."""
  main.main(['diffax', *map(str, arguments)])


def arrays(workdir, step):
  """{path: numpy array} of all that the checkpoint at `step` holds."""
  folder = epath.Path(workdir).resolve() / 'checkpoints' / str(step) / 'default'
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.metadata(folder).item_metadata.tree
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arguments))
  return flat(tree)


def flat(tree):
  """{path: numpy array} of a tree."""
  return {sharding.name(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def numbers(workdir):
  """The rows of metrics.jsonl without how the run went."""
  rows = log.read_metrics(epath.Path(workdir) / 'metrics.jsonl')
  return [{k: v for k, v in row.items() if k not in log.SPEED} for row in rows]


def assert_same(found, wanted):
  """Equal bits in two dicts of arrays."""
  assert found.keys() == wanted.keys()
  for key in wanted:
    assert found[key].dtype == wanted[key].dtype, key
    np.testing.assert_array_equal(found[key], wanted[key], err_msg=key)


# --- processes ------------------------------------------------------------------------------------


def flags(count):
  """The tests' $XLA_FLAGS with another count of virtual devices."""
  kept = [f for f in os.environ.get('XLA_FLAGS', '').split() if 'device_count' not in f]
  return ' '.join([*kept, f'--xla_force_host_platform_device_count={count}'])


def environment(count=1, sleep=0.0):
  """The environment of a process with `count` virtual devices."""
  return os.environ | {
    'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')]),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': flags(count),
    'JAX_CPU_ENABLE_ASYNC_DISPATCH': 'false',
    'DIFFAX_TEST_SLEEP': str(sleep),
  }


class Process:
  """`python -m diffax.main` of its own, whose output goes to a file."""

  def __init__(self, workdir, *arguments, count=1, sleep=0.0, terminal=None):
    self.output = pathlib.Path(f'{workdir}.output')
    self.output.unlink(missing_ok=True)
    command = [sys.executable, '-m', 'diffax.main', '--workdir', str(workdir), *arguments]
    with open(self.output, 'w') as file:
      self.process = subprocess.Popen(
        command,
        env=environment(count, sleep),
        cwd=workdir.parent,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=terminal or file,
      )

  def text(self):
    return self.output.read_text()

  def until(self, condition, seconds=120):
    """True as soon as `condition()` holds, False where the process ends before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      if condition():
        return True
      if self.process.poll() is not None:
        return False
      time.sleep(0.002)
    self.process.kill()
    raise TimeoutError(self.text())

  def says(self, text):
    """Waits for a text; fails where the process ends without it."""
    assert self.until(lambda: text in self.text()), self.text()

  def send(self, number):
    """Sends a signal and returns the exit status."""
    self.process.send_signal(number)
    return self.end()

  def end(self, seconds=120):
    try:
      return self.process.wait(seconds)
    except subprocess.TimeoutExpired:
      self.process.kill()
      raise
