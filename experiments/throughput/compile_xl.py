"""Compiles the whole training step of DiT-XL/2 at 32x32x4 ahead of time, allocating nothing of it.

  python experiments/throughput/compile_xl.py

Prints the seconds of tracing, lowering and compiling, and XLA's own analysis of memory.
"""

import argparse
import json
import os
import pathlib
import resource
import sys
import time

from diffax import checkpoint
from diffax import sharding
from diffax import train
import jax

import ours


def measure(preset, batch, remat):
  start = time.perf_counter()
  run = ours.setup_run(preset, batch, 32, remat=remat)  # shapes alone
  step = train.make_step(run.task.loss, run.tx, run.rate, run.config)
  place = sharding.batch(run.mesh)
  like = {
    'image': jax.ShapeDtypeStruct((batch, 32, 32, ours.CHANNELS), 'float32'),
    'label': jax.ShapeDtypeStruct((batch,), 'int32'),
    'index': jax.ShapeDtypeStruct((batch,), 'int32'),
  }
  like = checkpoint.abstract(like, {name: place for name in like})
  times = {'setup': time.perf_counter() - start}

  def timed(name, f, *args):
    start = time.perf_counter()
    out = f(*args)
    times[name] = time.perf_counter() - start
    return out

  with sharding.using(run.mesh):
    traced = timed('trace', jax.jit(step, donate_argnums=0).trace, run.like, like)
    lowered = timed('lower', traced.lower)
    compiled = timed('compile', lowered.compile)
  memory = compiled.memory_analysis()
  bytes_of = ('argument', 'output', 'alias', 'temp', 'generated_code')
  return {
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(run.like.params)),
    'seconds': times | {'in_all': sum(times.values())},
    'gigabytes': {k: getattr(memory, f'{k}_size_in_bytes') / 1e9 for k in bytes_of},
    'peak_process_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--preset', default='XL/2')
  parser.add_argument('--batch', type=int, default=256)
  parser.add_argument('--remat', default='dots_saveable', help='see diffax.models.layers.remat')
  parser.add_argument('--out', help='a json file for the figures')
  args = parser.parse_args()
  result = {
    'command': ' '.join(['python', 'experiments/throughput/compile_xl.py', *sys.argv[1:]]),
    'version': f'jax {jax.__version__}, {jax.devices()[0].platform}',
    'processors': len(os.sched_getaffinity(0)),
    'load': os.getloadavg()[0],
    **measure(args.preset, args.batch, args.remat),
  }
  print(json.dumps(result, indent=2))
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
