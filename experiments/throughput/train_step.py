"""Training images a second and peak memory: diffax against the same step in PyTorch, in one run.

  python experiments/throughput/train_step.py            # DiT-S/4 at 32x32x4, batch 16, this CPU

Each side lives in its own process, so that its peak memory is its own, with the same processors and
as many threads; the two take turns, so that what else the machine does falls on both. Printed are
the median and the range over turns. The seconds of processor time are what can be trusted on a
machine that does other things, with `--threads 1`, where no thread waits spinning for another.

PyTorch is optional (`pip install torch`); without it our side runs alone.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
SIDES = {'diffax': 'ours', 'torch': 'twin'}


def arguments():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--preset', default='S/4')
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--side', type=int, default=32, help='of the input, which has 4 channels')
  parser.add_argument('--threads', type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument('--turns', type=int, default=15)
  parser.add_argument('--steps', type=int, default=2, help='a turn')
  parser.add_argument('--keep-memory', type=int, default=0, help='1: both keep what they freed')
  parser.add_argument('--out', help='a json file for the figures')
  parser.add_argument('--worker', choices=SIDES, help=argparse.SUPPRESS)
  return parser.parse_args()


# --- one side, in a process of its own: a command a line in, an answer a line out -----------------


def keep_memory():
  """Has glibc keep freed memory for the next step, which else the kernel hands out anew, zeroed."""
  libc = ctypes.CDLL(None)
  for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # one arena, no mmap, no trimming
    if not libc.mallopt(option, value):
      raise SystemExit('--keep-memory needs glibc')


def worker(args):
  if args.keep_memory:
    keep_memory()
  import numpy as np

  side = __import__(SIDES[args.worker])
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.standard_normal((args.batch, args.side, args.side, 4)).astype('f4'),
    'label': rng.integers(0, 1000, args.batch).astype('i4'),
  }
  advance, facts = side.setup(args.preset, batch, args.threads)
  for _ in range(2):  # compiles; fills caches
    advance(1)
  answer(facts)
  product = None
  for command in sys.stdin:
    start, work = time.perf_counter(), time.process_time()
    if command == 'train\n':
      loss = advance(args.steps)
      cpu = time.process_time() - work
      answer({'seconds': time.perf_counter() - start, 'cpu_seconds': cpu, 'loss': loss})
    elif command == 'memory\n':
      answer({'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})
    elif command == 'matmul\n':
      if product is None:
        product = side.matmul(2048)
        product()
        start = time.perf_counter()
      for _ in range(4):
        product()
      answer({'seconds': (time.perf_counter() - start) / 4})


def answer(facts):
  print(json.dumps(facts), file=sys.__stdout__, flush=True)


# --- the referee ----------------------------------------------------------------------------------


class Side:
  """A worker and what it said."""

  def __init__(self, name, args):
    given = [
      f'--{key.replace("_", "-")}={getattr(args, key)}'
      for key in ('preset', 'batch', 'side', 'threads', 'steps', 'keep_memory')
    ]
    cpus = sorted(os.sched_getaffinity(0))[: args.threads]
    threads = {name: str(args.threads) for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
    self.process = subprocess.Popen(
      [sys.executable, str(HERE / 'train_step.py'), f'--worker={name}', *given],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=dict(os.environ, **threads),
      preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )  # JAX takes a thread a processor
    self.facts = self.hear()

  def hear(self):
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f'a side ended with status {self.process.wait()}; its error is above')
    return json.loads(line)

  def ask(self, command):
    self.process.stdin.write(command + '\n')
    self.process.stdin.flush()
    return self.hear()


def spread(values):
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def main(args):
  names = list(SIDES)
  if importlib.util.find_spec('torch') is None:
    print('PyTorch is not installed here, so our side runs alone: pip install torch to compare')
    names.remove('torch')
  sides = {name: Side(name, args) for name in names}
  counts = {name: side.facts['parameters'] for name, side in sides.items()}
  if len(set(counts.values())) > 1:
    raise SystemExit(f'the two nets differ in size: {counts}')

  turns, work = ({name: [] for name in names} for _ in range(2))
  for turn in range(args.turns):
    for name in names if turn % 2 else names[::-1]:  # neither always follows the other
      done = sides[name].ask('train')
      turns[name].append(args.batch * args.steps / done['seconds'])
      work[name].append(done['cpu_seconds'] / args.batch / args.steps)
  peaks = {name: side.ask('memory')['peak_mb'] for name, side in sides.items()}
  products = {name: [] for name in names}
  for _ in range(5):
    for name in names:
      products[name].append(2 * 2048**3 / sides[name].ask('matmul')['seconds'] / 1e9)

  result = {
    'command': ' '.join(['python', 'experiments/throughput/train_step.py', *sys.argv[1:]]),
    'net': f'DiT-{args.preset}, {counts[names[0]]} parameters, float32, AdamW and one average',
    'batch': args.batch,
    'side': args.side,
    'threads': args.threads,
    'steps_a_turn': args.steps,
    'turns': args.turns,
    'machine': f'{processor()}, python {platform.python_version()}',
    'load': os.getloadavg()[0],
    'keep_memory': bool(args.keep_memory),
  }
  for name in names:
    result[name] = {
      'version': sides[name].facts['version'],
      'images_a_second': spread(turns[name]),
      'cpu_seconds_an_image': spread(work[name]),
      'peak_mb': peaks[name],
      'matmul_gflops': spread(products[name]),
    }
  if len(names) == 2:
    ratios = [a / b for a, b in zip(turns['diffax'], turns['torch'])]
    result['ratio_diffax_to_torch'] = spread(ratios)
  report(result, names)
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(result, indent=2) + '\n')


def processor():
  lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  return next(line.split(': ')[1] for line in lines if line.startswith('model name'))


def report(result, names):
  print(f'{result["net"]}; batch {result["batch"]}, {result["threads"]} threads')
  print('side    images/s (min..max)   CPU s an image (min..max)   peak MB   matmul GFLOP/s')
  for name in names:
    s, m, peak = (result[name][key] for key in ('images_a_second', 'matmul_gflops', 'peak_mb'))
    w = result[name]['cpu_seconds_an_image']
    print(
      f'{name:7} {s["median"]:6.2f} ({s["min"]:.2f}..{s["max"]:.2f})'
      f'   {w["median"]:10.3f} ({w["min"]:.3f}..{w["max"]:.3f})'
      f'   {peak:12.0f}   {m["median"]:6.0f} ({m["min"]:.0f}..{m["max"]:.0f})'
    )
  if len(names) == 2:
    r = result['ratio_diffax_to_torch']
    print(f'diffax / torch by turns: {r["median"]:.2f} ({r["min"]:.2f}..{r["max"]:.2f})')


if __name__ == '__main__':
  args = arguments()
  worker(args) if args.worker else main(args)
