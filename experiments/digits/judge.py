"""Judges generated digits against the UCI digits (8x8 pixels, 1797 of them) they were learned from.

  python experiments/digits/judge.py runs/digits/samples.npz

The file holds `arr_0`, uint8 [n 8 8 1], and `arr_1`, the n labels the samples were asked for, as
many of each class; the bounds are meant for n = 1000. Image i of `sklearn.datasets.load_digits` is
held out when i % 5 == 4 (359 digits); the other 1438 are all that training may see. Distances are
Euclidean, between pixels scaled to 0..1. The same samples must meet four bounds; the exit code is 1
when they miss one.

  accuracy   Share of samples that a support vector machine, trained on the real train digits, takes
             for their label; `real_accuracy` is its share on the held-out digits.
  frechet    Fréchet distance of samples to a random half of the real digits, over that of the other
             half to it, at equal counts (the distance of finite sets is biased upwards, alike in
             both); a ratio of means over `HALVINGS` halvings. Samples as good as new real digits
             have 1; copies of real digits, which are in the halves themselves, have less.
  recall     Share of held-out digits inside the samples' manifold: the union of the balls around
             each sample that reach its third nearest other sample (Kynkäänniemi et al. 2019,
             section 2, k = 3). Real data does not reach 1 either, so it is divided by the recall of
             the same held-out digits by equally many train digits, a mean over `DRAWS` draws.
             `recall_plain` and `recall_real` are the two shares.
  precision  Share of samples inside the manifold of those train draws; `recall_real` is the share
             of held-out digits there. It has no bound.
  distance   Median distance of samples to their nearest train digit, over that of held-out digits.
             Below 1, samples lie closer to what was trained on than new digits do: memorised.

Real digits have 17 grey levels, samples 256, which moves a pixel by at most 1/32. Rows that end
in `_17` are of the samples rounded to the 17 levels: they show whether that matters.
"""

import sys

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits
from sklearn.svm import SVC

HALVINGS = 10
DRAWS = 10
NEIGHBOURS = 3


def real_digits():
  """(train images, train labels), (held-out images, held-out labels); images uint8 [n 8 8 1]."""
  digits = load_digits()
  images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
  held_out = np.arange(len(images)) % 5 == 4
  return [(images[i], digits.target[i]) for i in (~held_out, held_out)]


def flatten(images):
  return images.reshape(len(images), 64) / 255.  # [n 64]


def frechet(x, y):
  """|mean difference|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), A and B the covariances."""
  a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
  values, vectors = np.linalg.eigh(a)
  root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
  cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
  return np.sum((x.mean(0) - y.mean(0))**2) + np.trace(a) + np.trace(b) - 2 * cross


def frechet_ratio(x, real, seed=0):
  rng = np.random.default_rng(seed)
  n = min(len(x), len(real) // 2)
  fake, same = [], []
  for _ in range(HALVINGS):
    a, b = np.split(real[rng.permutation(len(real))[:2 * n]], 2)
    fake.append(frechet(x[rng.permutation(len(x))[:n]], a))
    same.append(frechet(b, a))
  return np.mean(fake) / np.mean(same)


def inside(queries, points):
  """Share of `queries` in the k-NN manifold of `points`."""
  radius = np.sort(cdist(points, points), axis=1)[:, NEIGHBOURS]  # column 0 is the point itself
  return np.mean(np.any(cdist(queries, points) <= radius, axis=1))


def nearest(x, train):
  return np.median(cdist(x, train).min(axis=1))


def judge(images, labels, seed=0):
  """A dict of the numbers above, by name.

  images: uint8 [n 8 8 1]; labels: int [n], as many of each of the ten classes, 4 or more.
  """
  if images.shape[1:] != (8, 8, 1) or images.dtype != np.uint8:
    raise ValueError(f'images are uint8 [n 8 8 1], not {images.dtype} {images.shape}')
  counts = np.bincount(labels, minlength=10)
  if len(labels) != len(images) or len(counts) != 10 or len(set(counts)) != 1:
    raise ValueError(f'{len(images)} images need labels, as many of each class, not {counts}')
  (train, train_label), (test, test_label) = real_digits()
  x, train, test = flatten(images), flatten(train), flatten(test)
  snapped = np.round(x * 16) / 16
  if len(x) > len(train):
    raise ValueError(f'{len(x)} samples need as many train digits beside them, not {len(train)}')
  rng = np.random.default_rng(seed)
  draws = [train[rng.permutation(len(train))[:len(x)]] for _ in range(DRAWS)]
  svm = SVC(C=10).fit(train, train_label)
  recall, recall_real = inside(test, x), np.mean([inside(test, d) for d in draws])
  limit = nearest(test, train)
  return {
    'accuracy': svm.score(x, labels), 'real_accuracy': svm.score(test, test_label),
    'frechet': frechet_ratio(x, np.concatenate([train, test]), seed),
    'recall': recall / recall_real, 'recall_plain': recall, 'recall_real': recall_real,
    'recall_17': inside(test, snapped) / recall_real,
    'precision': np.mean([inside(x, d) for d in draws]),
    'distance': nearest(x, train) / limit, 'distance_17': nearest(snapped, train) / limit,
  }


BOUNDS = {  # name: (lowest, highest)
  'accuracy': (0.98, None), 'frechet': (None, 1.6), 'recall': (0.9, None), 'distance': (1., None),
}


def missed(result):
  """Names of the bounds that `result` misses; a NaN misses."""
  low = lambda name, least: least is not None and not result[name] >= least
  high = lambda name, most: most is not None and not result[name] <= most
  return [k for k, (least, most) in BOUNDS.items() if low(k, least) or high(k, most)]


def table(result):
  wrong = missed(result)
  lines = [f'{"":16}{"value":>8}  bound']
  for name, value in result.items():
    least, most = BOUNDS.get(name, (None, None))
    bound = f'>= {least}' if least is not None else f'<= {most}' if most is not None else ''
    lines.append(f'{name:16}{value:8.4f}  {bound}{"   MISSED" if name in wrong else ""}'.rstrip())
  return '\n'.join(lines)


def main(path):
  with np.load(path) as samples:
    result = judge(samples['arr_0'], samples['arr_1'])
  print(table(result))
  return 1 if missed(result) else 0


if __name__ == '__main__':
  if len(sys.argv) != 2:
    sys.exit('usage: python experiments/digits/judge.py SAMPLES.npz')
  sys.exit(main(sys.argv[1]))
