"""Every metric on sets whose answer is known: does each move the way it must?

  python experiments/metrics/known_answers.py --dataset fashion_mnist --features classifier
  python experiments/metrics/known_answers.py --dataset cifar10 --features inception \\
    --options '{"weights": "inception.safetensors"}'

prints, and writes to results/DATASET_FEATURES.json and .md, all metrics of `diffax/metrics.py` for
sets of `count` images each against `count` training images, the reference:

  train      other training images: the best there is, and what all below are compared with
  held out   images that were not trained on
  ...        training images, not of the reference, with something done to them; see `CASES`

`DRAWS` sets of training images tell how far a metric moves by chance. It has moved when it is
farther from their mean than MARGIN of their standard deviations, and stayed when it is not, or when
it moved by less than a tenth of what slight blur or pure noise does.
"""

import argparse
import json
import pathlib
import sys
import time

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from diffax import features as networks  # noqa: E402
from diffax import metrics  # noqa: E402
from diffax.data import sources  # noqa: E402

DRAWS, MARGIN, BATCH = 4, 3.0, 250
METRICS = (
  metrics.frechet, metrics.spatial_frechet, metrics.kernel, metrics.precision_recall,
  metrics.density_coverage, metrics.inception_score, metrics.class_accuracy, metrics.memorisation,
)
COLUMNS = (
  'frechet', 'spatial_frechet', 'kernel', 'precision', 'recall', 'density', 'coverage',
  'inception_score', 'class_accuracy', 'memorisation', 'copied',
)
WAY = {'+': 'up', '-': 'down', '=': 'as it is', '>': 'not down', '<': 'not up', '.': 'any'}
CASES = {  # what each column must do against `train`, in the order of COLUMNS
  'train': '= = = = = = = = = = =',
  'held out': '= = = = = = = = = = =',
  'noise alone': '+ + + - - - - - - + <',
  'noisy, 0.05': '+ + + < . < - < < > <',
  'noisy, 0.2': '+ + + - . - - - - + <',
  'blurred, 0.7': '+ + + < - < - < < > <',
  'blurred, 1.5': '+ + + - - - - - - + <',
  'half the classes': '+ + + = - = - - . = .',
  'the reference': '- - < + + + + = = - +',
  'one image': '+ + + . - . - - . . .',
  'labels shuffled': '= = = = = = = = - = =',
}


# --- images ---------------------------------------------------------------------------------------


def read(source, count):
  """(images uint8 [n h w c], labels [n]) of the first `count` records; TFDS has shuffled them."""
  records = [source[i] for i in range(min(count, len(source)))]
  return np.stack([r['image'] for r in records]), np.array([r['label'] for r in records])


def noisy(images, std, rng):
  """With Gaussian noise; std in shares of the range of pixels."""
  return to_pixels(images + 255 * std * rng.standard_normal(images.shape, np.float32))


def blurred(images, std):
  """Convolved with a Gaussian; std in pixels."""
  at = np.arange(-6, 7)
  window = np.exp(-0.5 * (at / std) ** 2)
  x = np.pad(images.astype(np.float32), ((0, 0), (6, 6), (6, 6), (0, 0)), mode='reflect')
  for axis in (1, 2):
    size = x.shape[axis] - 12
    x = sum(w * np.take(x, np.arange(i, i + size), axis) for i, w in enumerate(window))
  return to_pixels(x / window.sum() ** 2)


def to_pixels(x):
  return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def cases(train, held_out, count):
  """{case: (images, labels)}; train: DRAWS + 1 sets of `count` and more, the first the reference.
  """
  rng = np.random.default_rng(0)
  images, label = train
  part = lambda k: (images[k * count : (k + 1) * count], label[k * count : (k + 1) * count])
  other, classes = part(1), part(1)[1].max() + 1
  half = count + np.flatnonzero(label[count:] < classes / 2)[:count]
  if len(half) < count:
    raise ValueError(f'{len(half)} images of half the classes, {count} are needed: lower --count')
  found = {f'train {k}': part(k + 1) for k in range(DRAWS)} | {
    'held out': (held_out[0][:count], held_out[1][:count]),
    'noise alone': (rng.integers(0, 256, other[0].shape).astype(np.uint8), other[1]),
    'half the classes': (images[half], label[half]),
    'the reference': part(0),
    'one image': (np.repeat(other[0][:1], count, 0), np.repeat(other[1][:1], count)),
    'labels shuffled': (other[0], rng.permutation(other[1])),
  }
  for std in (0.05, 0.2):
    found[f'noisy, {std}'] = noisy(other[0], std, rng), other[1]
  for std in (0.7, 1.5):
    found[f'blurred, {std}'] = blurred(other[0], std), other[1]
  return found


def embedder(network):
  """A function: (images, labels) -> `metrics.Set`."""
  params, identity = network.load()
  extract = jax.jit(network.extract)

  def embed(images, label):
    pad = np.concatenate([images, np.repeat(images[-1:], -len(images) % BATCH, 0)])
    parts = [jax.device_get(extract(params, x)) for x in np.split(pad, len(pad) // BATCH)]
    rows = [None if parts[0][i] is None else np.concatenate([p[i] for p in parts])[: len(images)]
            for i in range(3)]
    return metrics.Set(*rows, label)

  return embed, identity


# --- metrics --------------------------------------------------------------------------------------


def measure(fake, real, held_out, classes):
  """{metric: value}, without those that these features do not tell."""
  found = {}
  for metric in METRICS:
    lacks = (metric is metrics.spatial_frechet and fake.spatial is None,
             metric is metrics.inception_score and fake.logits is None,
             metric is metrics.class_accuracy and not classes)
    if not any(lacks):
      more = dict(held_out=held_out) if metric is metrics.memorisation else {}
      found |= metric(fake, real, **more)
  return found


def judge(rows, std):
  """{case: {metric: (value, direction, whether it went there)}} of {case: {metric: value}}.

  The row `train` is the mean of draws, std: {metric: standard deviation of these}.
  """
  mean, strong = rows['train'], ('noise alone', 'blurred, 0.7')
  result = {}
  for case, directions in CASES.items():
    result[case] = {}
    for name, way in zip(COLUMNS, directions.split()):
      if name not in mean:
        continue
      margin, moved = MARGIN * std[name], rows[case][name] - mean[name]
      slight = max(margin, 0.1 * max(abs(rows[c][name] - mean[name]) for c in strong))
      right = {'+': moved > margin, '-': moved < -margin, '=': abs(moved) <= slight,
               '>': moved >= -margin, '<': moved <= margin, '.': True}
      result[case][name] = (rows[case][name], way, bool(right[way]))
  return result


def table(result, std):
  """Markdown: a value, an arrow for where it must go, and a check mark or WRONG."""
  names = list(result['train'])
  arrow = {'+': '↑', '-': '↓', '=': '=', '>': '≥', '<': '≤', '.': ''}
  show = lambda value: f'{value:.4g}' if abs(value) >= 1e-3 else f'{value:.1e}' if value else '0'
  lines = [['', *names], ['---'] * (len(names) + 1)]
  for case, row in result.items():
    told = lambda value, way, right: ' '.join(
      [show(value), arrow[way], ('✓' if right else '**WRONG**') if way != '.' else '']).strip()
    lines.append([case, *(told(*cell) if case != 'train' else show(cell[0])
                          for cell in row.values())])
    if case == 'train':
      lines.append(['± by chance', *(show(std[name]) for name in names)])
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--dataset', default='fashion_mnist', help='a prepared set of TFDS')
  parser.add_argument('--features', default='classifier', help='a function of diffax.features')
  parser.add_argument('--options', type=json.loads, default={}, help='its options, as JSON')
  parser.add_argument('--count', type=int, default=2500, help='images in each set')
  args = parser.parse_args()
  start = time.perf_counter()
  train, test = (sources.tfds(args.dataset, split) for split in ('train', 'test'))
  network = getattr(networks, args.features)(train, test, train.shape[0], **args.options)
  held_out = read(test, 2 * args.count)  # half to be measured, half to measure with
  made = cases(read(train, (DRAWS + 1) * args.count), held_out, args.count)
  embed, identity = embedder(network)
  known = embed(*(part[args.count :] for part in held_out))
  real, values = embed(*made['the reference']), {}
  for case, images in made.items():
    values[case] = measure(embed(*images), real, known, network.classes)
    print(f'{time.perf_counter() - start:6.0f} s  {case}', file=sys.stderr)
  draws = [values.pop(f'train {k}') for k in range(DRAWS)]
  values['train'] = {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]}
  std = {name: float(np.std([draw[name] for draw in draws], ddof=1)) for name in draws[0]}
  result = judge(values, std)
  text = table(result, std)
  print(text)
  file = pathlib.Path(__file__).parent / 'results' / f'{args.dataset}_{args.features}'
  file.parent.mkdir(exist_ok=True)
  file.with_suffix('.md').write_text(text + '\n')
  cells = {case: {name: dict(zip(('value', 'must', 'right'), (value, WAY[way], right)))
                  for name, (value, way, right) in row.items()} for case, row in result.items()}
  file.with_suffix('.json').write_text(json.dumps(
    dict(dataset=args.dataset, count=args.count, features=identity, by_chance=std, cases=cells),
    indent=1) + '\n')
  wrong = [f'{case}: {name}' for case, row in result.items()
           for name, (_, _, right) in row.items() if not right]
  print(f'WRONG: {"; ".join(wrong)}' if wrong else 'all move as they must')


if __name__ == '__main__':
  main()
