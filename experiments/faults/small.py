"""The run that faults happen to: a small DiT on the digits, parameters split over the devices."""

import dataclasses
import functools
import os
import time

from diffax.data import sources
from ml_collections import ConfigDict

STEPS = 24


def get_config():
  return ConfigDict(dict(
    seed=0, steps=STEPS, batch_size=32, log_every=1, save_every=4, keep=dict(last=3),
    data=dict(name='small.digits'),
    model=dict(name='dit', patch=2, width=64, depth=2, heads=4, classes=10, dropout=0.1),
    optimizer=dict(name='adamw'), learning_rate=1e-3, ema=(0.99,),
    mesh=dict(data=-1, fsdp=2), watchdog=20.0,
  ))


def digits() -> sources.Source:
  """The digits, each as slow as $FAULTS_SLEEP says; on host $FAULTS_HANG from record 400 on, never.
  """
  source = sources.digits()
  return dataclasses.replace(source, read=functools.partial(_read, source.read))


def _read(read, i):
  time.sleep(float(os.environ.get('FAULTS_SLEEP', 0)))
  if os.environ.get('FAULTS_HANG') == os.environ.get('JAX_PROCESS_ID') and _count() > 400:
    time.sleep(3600)
  return read(i)


@functools.cache
def _counter():
  return [0]


def _count():
  _counter()[0] += 1
  return _counter()[0]
