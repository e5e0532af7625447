"""One measurement of one side, in this process alone; started by table.py.

  python side.py FOLDER       # FOLDER/job.json and config.json -> FOLDER/answer.json

After the first call, which compiles, and `WARM` more, windows of several steps or draws are timed,
then products of matrices. What a side is stands in `ours.py` and `theirs.py`.
"""

import importlib
import json
import os
import pathlib
import re
import sys
import time

SIDES = {'diffax': 'ours', 'torch': 'theirs', 'torch_compile': 'theirs'}
WARM = 2
WINDOWS = 5
PRODUCTS = 3


def seconds(function, *args):
  """(how long it took, what it returned)."""
  start = time.perf_counter()
  said = function(*args)
  return time.perf_counter() - start, said


def measure(side, job):
  """Times a job: a dict of figures, for a row of the table.

  first_seconds: of the first call; usual_seconds: of one call. window_seconds: of `window_calls`
  calls each; cpu_seconds of one call, of all threads. peak_bytes: of the device, on a CPU of this
  process.
  """
  advance, facts = getattr(side, job['what'])(job)
  first, _ = seconds(advance, 1)
  usual = seconds(advance, WARM)[0] / WARM
  windows = min(WINDOWS, max(2, int(job['seconds'] / usual)))
  calls = max(1, round(job['seconds'] / windows / usual))
  work, timed = time.process_time(), [seconds(advance, calls) for _ in range(windows)]
  work = time.process_time() - work
  value = timed[-1][1]
  if not abs(value) < float('inf'):
    raise SystemExit(f'the result is {value}, of which no time says anything')
  return facts | {
    'first_seconds': first,
    'usual_seconds': usual,
    'window_calls': calls,
    'window_seconds': [each for each, _ in timed],
    'cpu_seconds': work / windows / calls,
    'value': value,
    'peak_bytes': side.peak() or high_water(),
  }


def product_seconds(side, job):
  """Of one product each, of `PRODUCTS` windows."""
  run = side.product(job['rows'], job['dtype'])
  run()  # compiles
  usual, _ = seconds(run)
  count = max(1, round(min(job['seconds'], 1.0) / PRODUCTS / usual))
  return [seconds(run, count)[0] / count for _ in range(PRODUCTS)]


def high_water():
  """The most bytes this process had in memory: of itself, unlike ru_maxrss, which a child
  inherits.
  """
  text = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(r'VmHWM:\s+(\d+) kB', text)[1]) * 1024


def drawn(job):
  """The batch, which both sides learn from: images [b h w c] of unit deviation, labels [b]."""
  import numpy as np

  spec, rng = job['spec'], np.random.default_rng(0)
  shape = job['batch_size'], spec['size'], spec['size'], spec['channels']
  return {
    'image': rng.standard_normal(shape, 'f4'),
    'label': rng.integers(0, spec['classes'], job['batch_size'], 'i4'),
  }


def main(folder):
  job = json.loads((folder / 'job.json').read_text())
  if job['threads']:  # JAX takes a thread a processor
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job['threads']])
  side = importlib.import_module(SIDES[job['side']])
  answer = side.describe()
  if job['what'] != 'describe':
    if job['side'] == 'diffax':
      from diffax import config as configs

      job['config'] = configs.read(folder / 'config.json')
    answer |= measure(side, job | {'batch': drawn(job)})
    answer['product_seconds'] = product_seconds(side, job)
  (folder / 'answer.json').write_text(json.dumps(answer))


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
