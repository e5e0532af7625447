"""The share of a training step that is not the device's: logging, batches, dispatch.

  python experiments/throughput/loop_share.py --config configs/digits.py

Times the compiled step alone, on one batch and waiting only at the end, in turns with the whole
training loop of `diffax.train` (batches read and transferred, metrics logged every 50 steps; no
checkpoint and no pictures). share = 1 - time of the step alone / time in the loop, by medians.
"""

import argparse
import json
import pathlib
import tempfile
import time

from etils import epath
import jax
import numpy as np

from diffax import config as configs
from diffax import log
from diffax import train


def alone(run, step_fn, steps):
  """Milliseconds of a compiled step with nothing around it."""
  state, data = train.init(run), train.batches(run, 0)
  batch = next(data)
  data.close()
  state, _ = step_fn(state, batch)
  jax.block_until_ready(state)
  start = time.perf_counter()
  for _ in range(steps):
    state, _ = step_fn(state, batch)
  jax.block_until_ready(state)
  return (time.perf_counter() - start) / steps * 1e3


def in_loop(run):
  """Milliseconds of a step of the training loop, by what it logged after its first line."""
  with tempfile.TemporaryDirectory() as workdir:
    train.train(run, epath.Path(workdir))
    rows = log.read_metrics(pathlib.Path(workdir) / 'metrics.jsonl')
  return float(np.median([1e3 / row['steps_per_second'] for row in rows[1:]]))


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--config', default='configs/digits.py')
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--turns', type=int, default=5)
  parser.add_argument('--out', default='')
  arguments = parser.parse_args()
  config = configs.override(
    configs.load(arguments.config) | {'evals': {}},
    [f'--config.steps={arguments.steps}', '--config.save_every=1000000'],
  )
  run = train.setup(config)
  step_fn = train.compile_step(run)
  pairs = [(alone(run, step_fn, arguments.steps), in_loop(run)) for _ in range(arguments.turns)]
  bare, loop = np.median(pairs, axis=0)
  shares = [1 - a / b for a, b in pairs]
  result = {
    'command': f'python experiments/throughput/loop_share.py --config {arguments.config} '
    f'--steps {arguments.steps} --turns {arguments.turns}',
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
    'step_alone_ms': round(float(bare), 2),
    'step_in_loop_ms': round(float(loop), 2),
    'share': round(1 - float(bare) / float(loop), 4),
    'share_of_each_turn': [round(share, 4) for share in shares],
  }
  print(json.dumps(result, indent=2))
  if arguments.out:
    pathlib.Path(arguments.out).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
