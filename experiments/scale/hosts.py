"""The same run by other numbers of hosts and devices, from the start and from another's checkpoint.

  python experiments/scale/hosts.py --out experiments/scale/results

Real processes on this machine, which talk by gloo (launch/local.py): the run of
experiments/faults/small.py, 24 steps of a DiT with dropout on the digits, parameters split over two
devices. Compared are the loss and the gradient's norm of every step and all parameters at the end
with those of one host with one device. Exit code 1 where they are further off than rounding goes.
"""

import argparse
import pathlib
import shutil
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / 'faults'), str(HERE.parents[1] / 'tests')]

import faults  # noqa: E402
import numpy as np  # noqa: E402
import run_diffax  # noqa: E402
import small  # noqa: E402

SHAPES = ((1, 2), (1, 8), (2, 1), (2, 4), (4, 2))
SAVED = (2, 4)  # by which the checkpoint is, that others go on from
ELASTIC = ((1, 8), (1, 4), (4, 2), (1, 1))
HALF = small.STEPS // 2
TOLERANCE = 1e-4


def train(workdir, hosts, devices, steps=small.STEPS):
  """Runs it to its end on so many hosts of so many devices; the step it went on from."""
  fsdp = min(hosts * devices, 2)
  options = dict(hosts=hosts, devices=devices)
  return faults.again(workdir, options, (f'mesh.fsdp={fsdp}', f'steps={steps}', 'watchdog=0'))


def differences(workdir, wanted):
  """The largest, relative: of losses, of gradients' norms, of parameters to their largest."""
  rows, others = faults.rows(workdir), faults.rows(wanted)
  if [row[0] for row in rows] != [row[0] for row in others]:
    raise faults.Failed(f'other steps were logged: {[row[0] for row in rows]}')
  off = np.abs(np.array(rows) / np.array(others) - 1).max(axis=0)
  last = lambda folder: {
    k: v for k, v in run_diffax.arrays(folder, small.STEPS).items() if k.startswith('params')
  }
  found, there = last(workdir), last(wanted)
  largest = max(np.abs(x).max() for x in there.values())
  return off[1], off[2], max(np.abs(found[k] - there[k]).max() for k in there) / largest


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--out', help='a folder for hosts.md')
  args = parser.parse_args()
  heads = ('saved by', 'hosts x devices', 'went on from', 'loss', "gradient's norm", 'parameters')
  lines = [f'| {" | ".join(heads)} |', '| --- ' * len(heads) + '|']
  worst = 0.0
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    one, half = folder / 'one', folder / 'half'
    train(one, 1, 1)
    train(half, *SAVED, HALF)
    for saved, shape in [*((None, s) for s in SHAPES), *((SAVED, s) for s in ELASTIC)]:
      workdir = folder / 'run'
      if saved:
        shutil.copytree(half, workdir)
      step = train(workdir, *shape)
      if step != (HALF if saved else 0):
        raise faults.Failed(f'{shape} went on from step {step}')
      off = differences(workdir, one)
      worst = max(worst, *off)
      name = '{} x {}'.format
      cells = (name(*saved) if saved else '', name(*shape), step or '', *map('{:.1e}'.format, off))
      lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
      print(lines[-1], flush=True)
      shutil.rmtree(workdir)
  if args.out:
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / 'hosts.md').write_text('\n'.join(lines) + f'\n\nThe largest: {worst:.1e}, relative.\n')
  return int(worst > TOLERANCE)


if __name__ == '__main__':
  sys.exit(main())
