"""Two programs that take turns: a worker answers a command a line, the referee asks."""

import os
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / 'throughput'))

import train_step  # noqa: E402 (of ../throughput, which imports neither jax nor torch)

ROWS = 2048  # of the matrices whose product says what the machine gives


def pin(threads):
  """Holds this process to so many processors: JAX takes a thread of each, when it first computes.
  """
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def serve(facts, advance, matmul, steps):
  """Says `facts`, then answers from stdin: `train` by so many steps, `matmul` by a product's time.

  advance: steps -> loss, when it is there. matmul: rows -> a function that multiplies and waits.
  """
  advance(2)  # compiles; fills caches
  train_step.answer(facts)
  product = matmul(ROWS)
  product()
  for command in sys.stdin:
    start, work = time.perf_counter(), time.process_time()
    if command == 'train\n':
      advance(steps)
    else:
      product()
    seconds, work = time.perf_counter() - start, time.process_time() - work
    train_step.answer({'seconds': seconds, 'cpu_seconds': work})


class Side(train_step.Side):
  """A worker that `command` starts, for so many threads, and what it said."""

  def __init__(self, command, threads):
    self.process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads)),
    )
    self.facts = self.hear()

  def end(self):
    self.process.stdin.close()
    self.process.wait()
