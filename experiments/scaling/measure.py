"""A plan against a run: predicted peak memory and step time, and those of a process that trains.

  python experiments/scaling/measure.py --out experiments/scaling/results
  python experiments/scaling/measure.py --out ... --width 256 --batch 8    # another size

The plan is of `--topology cpu:1`, or of the GPU that is here; the run a fresh process that takes a
few steps of the same program. On a CPU its peak is the kernel's own account (VmHWM) above what the
process had before its state was made; on a GPU the allocator's.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
STEPS = 4


def described(args):
  """A DiT of 16 x 16 tokens with moments and an average: 16 bytes a parameter, and gradients."""
  from diffax import config

  return config.complete(dict(
    steps=STEPS, batch_size=args.batch, data=dict(name='blank', size=32, channels=4, classes=1000),
    model=dict(name='dit', patch=2, width=args.width, depth=args.depth, heads=args.width // 64,
               classes=1000, dtype=args.dtype),
    optimizer=dict(name='adamw'), learning_rate=1e-4, ema=(0.9999,),
  ))


def planned(args):
  from diffax import chips
  from diffax import plan

  return plan.plan(described(args), chips.topology(args.topology))


def ran(args):
  """The peak of memory and the times of steps, of this process."""
  import jax

  from diffax import train

  run = train.setup(described(args))
  step = train.compile_step(run)
  device = jax.devices()[0]
  if device.platform == 'cpu':
    before = status('VmRSS')
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
  state, batch = train.init(run), next(train.batches(run, 0))
  seconds = []
  for _ in range(STEPS):
    began = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    seconds.append(time.perf_counter() - began)
  if device.platform == 'cpu':
    peak = status('VmHWM') - before
  else:
    peak = device.memory_stats()['peak_bytes_in_use']
  return dict(device=device.device_kind, peak=peak, seconds=seconds)


def status(name):
  """A figure of this process, in bytes, as Linux has it."""
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f'{name}:')))


def main(argv=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--width', type=int, default=768)
  parser.add_argument('--depth', type=int, default=8)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--topology', default='cpu:1', help='what is here, as h200:1')
  parser.add_argument('--part', choices=('plan', 'run'), help='of one process alone')
  args = parser.parse_args(argv)
  if args.part:
    print(json.dumps((planned if args.part == 'plan' else ran)(args)))
    return
  words = [sys.executable, __file__, *(argv or sys.argv[1:]), '--part']
  part = lambda name: json.loads(subprocess.run(
    [*words, name], check=True, text=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
  plan, run = part('plan'), part('run')
  memory, seconds = plan['hbm_bytes_per_chip'], statistics.median(run['seconds'][1:])
  found = dict(
    command=' '.join(['python', 'experiments/scaling/measure.py', *(argv or sys.argv[1:])]),
    device=run['device'], topology=args.topology, parameters=plan['parameters'], jax=plan['jax'],
    state_bytes=memory['state'], predicted_peak_bytes=memory['peak'], peak_bytes=run['peak'],
    peak_ratio=memory['peak'] / run['peak'], bound=plan['bound'],
    predicted_seconds=plan['roofline_seconds'], seconds=run['seconds'],
    time_ratio=plan['roofline_seconds'] / seconds,
  )
  args.out.mkdir(parents=True, exist_ok=True)
  name = f'measured_{args.topology.replace(":", "_")}.json'
  (args.out / name).write_text(json.dumps(found, indent=1) + '\n')
  print(json.dumps(found, indent=1))


if __name__ == '__main__':
  main()
