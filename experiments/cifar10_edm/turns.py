"""Two programs that take turns: a worker answers a command a line, the referee asks."""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

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
  answer(facts)
  product = matmul(ROWS)
  product()
  for command in sys.stdin:
    start, work = time.perf_counter(), time.process_time()
    if command == 'train\n':
      advance(steps)
    else:
      product()
    seconds, work = time.perf_counter() - start, time.process_time() - work
    answer({'seconds': seconds, 'cpu_seconds': work})


def answer(facts):
  print(json.dumps(facts), file=sys.__stdout__, flush=True)


def spread(values):
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def processor():
  """What this machine computes with, by name."""
  lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  return next(line.split(': ')[1] for line in lines if line.startswith('model name'))


class Side:
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

  def hear(self):
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f'a side ended with status {self.process.wait()}; its error is above')
    return json.loads(line)

  def ask(self, command):
    self.process.stdin.write(command + '\n')
    self.process.stdin.flush()
    return self.hear()

  def end(self):
    self.process.stdin.close()
    self.process.wait()
