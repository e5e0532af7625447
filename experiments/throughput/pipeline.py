"""Images a second a core of reading data: diffax's pipeline against torch's DataLoader, in one run.

  python experiments/throughput/pipeline.py
  python experiments/throughput/pipeline.py --torch-python ~/torch/bin/python   # torch lives there

Both read the same array_record files of TFDS at random, parse the same examples, decode with the
same PIL, mirror half of the images, scale to float32 in [-1, 1] and make batches of 256, in 0, 1
and 2 worker processes. Three sides, each in a process of its own, take turns:

  diffax        diffax.data.pipeline.batches
  torch         DataLoader over a Dataset with `__getitem__`, the customary one
  torch_many    the same with `__getitems__`, which reads the records of a batch at once

Printed are the median and the range over turns of images a second, by the clock and by the seconds
of processor time that the process and its workers took; the latter can be trusted on a machine that
does other things. Before a turn is timed, what a side had made ahead is taken away. Linux alone.
"""

import argparse
import glob
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
SIDES = ('diffax', 'torch', 'torch_many')
DATASETS = {'fashion_mnist': 1, 'cifar10': 3}  # channels
BATCH = 256
AHEAD = 8  # batches, more than either side makes ahead


def arguments():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--turns', type=int, default=11)
  parser.add_argument('--batches', type=int, default=40, help='a turn')
  parser.add_argument('--workers', type=int, nargs='*', default=[0, 1, 2])
  parser.add_argument('--datasets', nargs='*', default=list(DATASETS), choices=list(DATASETS))
  parser.add_argument('--torch-python', default=sys.executable, help='the python that has torch')
  parser.add_argument('--out', default=HERE / 'results' / 'pipeline.json')
  parser.add_argument('--side', choices=SIDES, help=argparse.SUPPRESS)
  return parser.parse_args()


# --- the two sides: endless iterators of batches --------------------------------------------------


def diffax_batches(dataset, workers):
  from diffax.data import pipeline
  from diffax.data import sources

  return pipeline.batches(sources.tfds(dataset), BATCH, seed=0, flip=True, workers=workers)


class Images:
  """A map-style Dataset for torch: (float32 [c h w] in [-1, 1], label)."""

  def __init__(self, files, channels):
    from array_record.python import array_record_data_source

    self.records = array_record_data_source.ArrayRecordDataSource(files)
    self.mode = {1: 'L', 3: 'RGB'}[channels]

  def __len__(self):
    return len(self.records)

  def __getitem__(self, i):
    return self.example(self.records[i])

  def example(self, data):
    import numpy as np
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2
    import torch

    record = tf_example_pb2.Example.FromString(data).features.feature
    picture = Image.open(io.BytesIO(record['image'].bytes_list.value[0]))
    pixels = np.array(picture if picture.mode == self.mode else picture.convert(self.mode))
    x = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None])
    x = x.permute(2, 0, 1).float().div_(127.5).sub_(1)  # [c h w]
    if torch.rand(()) < 0.5:
      x = x.flip(-1)
    return x, record['label'].int64_list.value[0]


class ManyImages(Images):
  """The same, a batch's records read at once."""

  def __getitems__(self, indices):
    return [self.example(data) for data in self.records.__getitems__(indices)]


def torch_batches(dataset, workers, kind):
  import torch

  torch.set_num_threads(1)  # else threads spin for tensors too small to share
  root = os.path.join(os.environ.get('DIFFAX_DATA') or '../shared/data', 'tfds', dataset)
  files = sorted(glob.glob(f'{root}/*/{dataset}-train.array_record*'))
  if not files:
    raise SystemExit(f'no {dataset} in {root}: set DIFFAX_DATA to the folder that holds tfds/')
  loader = torch.utils.data.DataLoader(
    kind(files, DATASETS[dataset]),
    batch_size=BATCH,
    shuffle=True,
    drop_last=True,
    num_workers=workers,
    persistent_workers=workers > 0,
    multiprocessing_context='spawn' if workers else None,  # array_record's readers die in a fork
  )
  while True:
    yield from loader


def iterator(side, dataset, workers):
  if side == 'diffax':
    return diffax_batches(dataset, workers)
  return torch_batches(dataset, workers, {'torch': Images, 'torch_many': ManyImages}[side])


def cpu_seconds(pid):
  """Seconds of processor time of a process and of those it started that live."""
  seconds, parents = {}, {}
  for stat in glob.glob('/proc/[0-9]*/stat'):
    try:
      fields = pathlib.Path(stat).read_text().rpartition(')')[2].split()
    except OSError:  # it ended meanwhile
      continue
    number = int(stat.split('/')[2])
    parents[number] = int(fields[1])
    seconds[number] = (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
  family = {pid}
  while more := {child for child, parent in parents.items() if parent in family} - family:
    family |= more
  return sum(seconds[number] for number in family)


def worker(args):
  """A side: a command a line in, an answer a line out."""
  batches = iterator(args.side, args.datasets[0], args.workers[0])
  package = args.side.partition('_')[0] if args.side != 'diffax' else 'grain'
  first = next(batches)
  images = first['image'] if args.side == 'diffax' else first[0]
  assert len(images) == BATCH and str(images.dtype).endswith('float32')
  answer({'version': f'{package} {importlib.metadata.version(package)}'})
  for _ in sys.stdin:
    for _ in range(AHEAD):
      next(batches)
    start, work = time.perf_counter(), cpu_seconds(os.getpid())
    for _ in range(args.batches):
      next(batches)
    seconds, cpu = time.perf_counter() - start, cpu_seconds(os.getpid()) - work
    answer({'seconds': seconds, 'cpu_seconds': cpu})
  getattr(batches, 'close', lambda: None)()  # ends its workers


def answer(facts):
  print(json.dumps(facts), file=sys.__stdout__, flush=True)


# --- the referee ----------------------------------------------------------------------------------


class Side:
  """A worker and what it said."""

  def __init__(self, name, dataset, workers, args):
    given = [f'--side={name}', '--datasets', dataset, '--workers', str(workers)]
    python = sys.executable if name == 'diffax' else args.torch_python
    self.process = subprocess.Popen(
      [python, str(HERE / 'pipeline.py'), *given, f'--batches={args.batches}'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.facts = self.hear()

  def hear(self):
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f'a side ended with status {self.process.wait()}; its error is above')
    return json.loads(line)

  def turn(self):
    self.process.stdin.write('turn\n')
    self.process.stdin.flush()
    told = self.hear()
    time.sleep(0.3)  # until what it still makes ahead is made, not in another's turn
    return told

  def end(self):
    self.process.stdin.close()
    self.process.wait()


def spread(values):
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def compare(dataset, workers, names, args):
  """Images a second by the clock and by processor time of each side, and the ratios to torch's."""
  sides = {name: Side(name, dataset, workers, args) for name in names}
  rates, core = ({name: [] for name in names} for _ in range(2))
  for turn in range(args.turns):
    for name in names[turn % len(names):] + names[: turn % len(names)]:
      told = sides[name].turn()
      rates[name].append(BATCH * args.batches / told['seconds'])
      core[name].append(BATCH * args.batches / told['cpu_seconds'])
  for side in sides.values():
    side.end()
  found = {'dataset': dataset, 'workers': workers, 'load': os.getloadavg()[0]}
  for name in names:
    found[name] = {
      'version': sides[name].facts['version'],
      'images_a_second': spread(rates[name]),
      'images_a_cpu_second': spread(core[name]),
    }
    if name != 'diffax':
      found[f'ratio_diffax_to_{name}'] = {
        'images_a_second': spread([a / b for a, b in zip(rates['diffax'], rates[name])]),
        'images_a_cpu_second': spread([a / b for a, b in zip(core['diffax'], core[name])]),
      }
  return found


def has_torch(python):
  find = 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
  return subprocess.run([python, '-c', find]).returncode == 0


def main(args):
  names = list(SIDES)
  if not has_torch(args.torch_python):
    print('PyTorch is not installed here, so our side runs alone: pip install torch to compare')
    names = names[:1]
  given = ['PYTHON' if word == args.torch_python else word for word in sys.argv[1:]]
  lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  processor = next(line.split(': ')[1] for line in lines if line.startswith('model name'))
  result = {
    'command': ' '.join(['python', 'experiments/throughput/pipeline.py', *given]),
    'machine': f'{processor}, python {platform.python_version()}',
    'processors': len(os.sched_getaffinity(0)),
    'batch': BATCH,
    'batches_a_turn': args.batches,
    'turns': args.turns,
    'runs': [],
  }
  print('data           workers  side        images/s (min..max)    a CPU second (min..max)')
  for dataset in args.datasets:
    for workers in args.workers:
      found = compare(dataset, workers, names, args)
      result['runs'].append(found)
      for name in names:
        s, c = (found[name][key] for key in ('images_a_second', 'images_a_cpu_second'))
        print(f'{dataset:14} {workers:7}  {name:10}'
              f' {s["median"]:7.0f} ({s["min"]:.0f}..{s["max"]:.0f})'
              f' {c["median"]:11.0f} ({c["min"]:.0f}..{c["max"]:.0f})', flush=True)
      for name in names[1:]:
        ratio = found[f'ratio_diffax_to_{name}']
        s, c = (ratio[key]['median'] for key in ('images_a_second', 'images_a_cpu_second'))
        print(f'{"":22}  diffax / {name}: {s:.2f} by the clock, {c:.2f} by processor time')
  pathlib.Path(args.out).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  arguments_given = arguments()
  worker(arguments_given) if arguments_given.side else main(arguments_given)
