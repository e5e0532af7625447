"""How far samples are from data, told by the features that a network has of both.

A metric is a function `(fake, real, **options) -> {name: float}` of two `Set`s, the features of the
samples and of the training images, and of `held_out`, images that were not trained on, where it
asks for memorisation. With N(mu, C) the Gaussians of the features, k(x, y) a kernel and B(x) the
ball around x that reaches its k-th nearest neighbour in its own set:

  frechet           |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2)          both at once, in numbers
  kernel            E k(x, x') + E k(y, y') - 2 E k(x, y)                the same without bias
  precision_recall  share of samples in a B(real), of images in a B(fake)  quality, variety
  density_coverage  the same, less moved by outliers
  inception_score   exp E KL(p(label | x) | p(label))                    needs no images
  class_accuracy    share of samples that are of the class asked for
  memorisation      distance to the nearest training image over that of held-out images

Sums are in float64 on the host. Searches for neighbours run in float32 on the default device, which
there only rules pairs out: what a rounding error could turn is computed again, see `nearest`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Moments(NamedTuple):
  """What the Fréchet distance knows of a set: float64, the covariance over count - 1."""

  count: int
  mean: np.ndarray  # [d]
  cov: np.ndarray  # [d d], 0 for one row


class Set(NamedTuple):
  """Features of n images, a row each; moments, where given, stand for more images than the rows."""

  pool: np.ndarray  # [n d]
  spatial: np.ndarray | None = None  # [n s]
  logits: np.ndarray | None = None  # [n k]
  label: np.ndarray | None = None  # int [n], the class asked for
  moments: Moments | None = None  # of pool
  spatial_moments: Moments | None = None


REMEDY = {
  'pool': 'extract features of the images first',
  'spatial': 'choose features that keep a spatial map, as inception',
  'logits': 'choose features that classify, as classifier or inception',
  'label': 'judge samples of a data set with classes, drawn with labels of these logits',
}


def _checked(name, part, rows):
  """The array `rows`; ValueError where it is not there or not finite."""
  if rows is None:
    raise ValueError(f'{name}.{part} is None, and this metric needs it: {REMEDY[part]}')
  bad = len(rows) - int(np.isfinite(rows).reshape(len(rows), -1).all(1).sum())
  if bad:
    raise ValueError(f'{name}.{part}: {bad} of {len(rows)} rows are not finite; samples or '
                     'features are broken, leave out this checkpoint or mend the network')
  return np.asarray(rows)


def _enough(name, count, least):
  if count < least:
    raise ValueError(f'{name} has {count} rows, this metric needs {least} or more: '
                     'raise the count of images or lower the option that asks for them')


def _pools(**sets):
  """The pooled features [n d] of (set, least number of rows) by name; widths must agree."""
  rows = []
  for name, (one, least) in sets.items():
    _enough(name, len(one.pool), least)
    rows.append(_checked(name, 'pool', one.pool))
  widths = {name: one.shape[1] for name, one in zip(sets, rows)}
  if len(set(widths.values())) > 1:
    raise ValueError(f'features of widths {widths}: extract all with one network')
  return rows


# --- moments --------------------------------------------------------------------------------------


def moments(rows) -> Moments:
  """Count, mean [d] and covariance [d d] of rows [n d], in float64 about their own mean.

  Raises:
    ValueError: there is no row.
  """
  _enough('moments: the set', len(rows), 1)
  rows = np.array(rows, np.float64)
  mean = rows.mean(0)
  rows -= mean
  return Moments(len(rows), mean, rows.T @ rows / max(len(rows) - 1, 1))


def merge(a, b) -> Moments:
  """The moments of two sets together; Chan, Golub & LeVeque 1979, eq. 2.1.

  `functools.reduce(merge, map(moments, batches))` goes through any number of images. Squares are
  about the means, so that no digits are lost where the mean is large.
  """
  count, step = a.count + b.count, b.mean - a.mean
  square = (a.count - 1) * a.cov + (b.count - 1) * b.cov  # about the own means
  square += a.count * b.count / count * np.outer(step, step)
  return Moments(count, a.mean + b.count / count * step, square / (count - 1))


# --- distances of distributions -------------------------------------------------------------------


def _factor(cov):
  """F [d r] with F F^T = cov, r its rank: what rounding makes of zero eigenvalues is left out."""
  values, vectors = np.linalg.eigh(cov)
  keep = values > len(cov) * np.finfo(np.float64).eps * values[-1]
  return vectors[:, keep] * np.sqrt(values[keep])


def distance(a, b):
  """The Fréchet distance, squared, of the Gaussians of two `Moments`: a float.

  tr (A B)^1/2 is the sum of the singular values of F^T G where A = F F^T and B = G G^T. These are
  exact to rounding also where the covariances are singular, as with fewer rows than columns; the
  root of the product A B would keep half the digits of small ones. Dowson & Landau 1982, eq. 4.
  """
  product = _factor(a.cov).T @ _factor(b.cov)  # [r s]
  cross = np.linalg.svd(product, compute_uv=False).sum() if product.size else 0.0
  far = np.sum((a.mean - b.mean) ** 2)
  return max(float(far + np.trace(a.cov) + np.trace(b.cov) - 2 * cross), 0.0)


def _frechet(part, given, fake, real):
  both = []
  for name, one in (('fake', fake), ('real', real)):
    found = getattr(one, given)
    if found is None:
      rows = _checked(name, part, getattr(one, part))
      found = moments(rows)
    elif not (np.isfinite(found.mean).all() and np.isfinite(found.cov).all()):
      raise ValueError(f'{name}.{given} are not finite: compute them again from finite features')
    _enough(name, found.count, 2)
    both.append(found)
  widths = [len(one.mean) for one in both]
  if widths[0] != widths[1]:
    raise ValueError(f'{part} features of widths {widths}: extract all with one network')
  return distance(*both)


def frechet(fake, real):
  """The Fréchet distance of pooled features, FID with Inception's; Heusel et al. 2017, eq. 6.

  It is biased upwards by about one over the counts: compare at equal counts only.

  Returns: {'frechet'}, 0 or more. Raises: ValueError for fewer than 2 images.
  """
  return {'frechet': _frechet('pool', 'moments', fake, real)}


def spatial_frechet(fake, real):
  """The same of features that keep their place, sFID with Inception's; Nash et al. 2021, sec. 4.1.

  Returns: {'spatial_frechet'}, 0 or more. Raises: ValueError for sets without `spatial`.
  """
  return {'spatial_frechet': _frechet('spatial', 'spatial_moments', fake, real)}


def _mmd(x, y):
  """The unbiased squared maximum mean discrepancy with (x.y / d + 1)^3, of as many rows each."""
  count, d = x.shape

  def cube(a, b):
    k = a @ b.T / d + 1
    return k * k * k  # a power of numpy's takes longer than the product of matrices

  own = sum(k.sum() - k.trace() for k in (cube(x, x), cube(y, y)))
  return own / (count * (count - 1)) - 2 * cube(x, y).mean()


def kernel(fake, real, subsets=100, size=1000, seed=0):
  """The kernel distance of pooled features, KID with Inception's; Binkowski et al. 2018, sec. 4.

  A mean over `subsets` draws of `size` rows from either set (all where it has fewer, and then the
  draws of equal sets are all the same). Unbiased, so that it may be negative.

  Returns: {'kernel', 'kernel_std'}, the mean and the standard deviation over the draws. Raises:
    ValueError for fewer than 2 images or no subsets.
  """
  if subsets < 1 or size < 2:
    raise ValueError(f'kernel: {subsets} subsets of {size} rows; one of 2 is the least')
  x, y = _pools(fake=(fake, 2), real=(real, 2))
  rng, size = np.random.default_rng(seed), min(size, len(x), len(y))
  draw = lambda rows: rows[rng.choice(len(rows), size, replace=False)].astype(np.float64)
  values = [_mmd(draw(x), draw(y)) for _ in range(subsets)]
  return {'kernel': float(np.mean(values)), 'kernel_std': float(np.std(values))}


# --- neighbours -----------------------------------------------------------------------------------
#
# |x|^2 + |y|^2 - 2 x.y in float32 is fast and wrong by up to SLACK (|x|^2 + |y|^2), all of a small
# distance far from the origin. So rows are centred; the device tells bounds of the squared
# distance alone; and pairs whose bounds leave a question are computed again, as differences in
# float64. Results are those of float64 throughout, ties included; what is close to call costs time.

BLOCK = 2**24  # pairs on the device at once, 64 MB in float32
PAIRS = 2**22  # values on the host at once, 32 MB in float64
SPARE = 8  # candidates beyond the k asked for


def _bounds(x, y):
  """Lowest and highest squared distances of rows [b d], [m d] that rounding allows, both [b m].

  In any order of summation a dot product of d values in float32 is wrong by less than
  d 2^-24 |x| |y| (Higham 2002, sec. 3.1), and so are the squares; 8 for the few other roundings.
  """
  slack = 2 * (x.shape[1] + 8) * 2.0**-24
  square = lambda rows: jnp.sum(rows * rows, axis=1)
  total = square(x)[:, None] + square(y)[None]
  dots = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
  return (1 - slack) * total - 2 * dots, (1 + slack) * total - 2 * dots


def _candidates(x, y, count):
  """The rows of y that may be nearest to each of x: lowest squared distances, indices [b count]."""
  low, index = jax.lax.top_k(-_bounds(x, y)[0], count)
  return -low, index


def _inside(x, y, square):
  """How many balls of y surely hold each of x [b], and which pairs are too close to call [b m]."""
  low, high = _bounds(x, y)
  sure = high <= square[None]
  return jnp.sum(sure, axis=1), (low <= square[None]) & ~sure


_candidates_jit = jax.jit(_candidates, static_argnums=2)
_inside_jit = jax.jit(_inside)


def _exact(x, y, i, j):
  """Squared distances of the pairs x[i], y[j], in float64 and by differences."""
  out, step = np.empty(len(i)), max(PAIRS // x.shape[1], 1)
  for at in range(0, len(i), step):
    part = slice(at, at + step)
    out[part] = np.square(np.subtract(x[i[part]], y[j[part]], dtype=np.float64)).sum(1)
  return out


def _by_block(function, x, y, *args):
  """Yields (where a block of x begins, `function(block, y, *args)`), both centred on y's mean."""
  centre = y.mean(0, dtype=np.float64)
  centred = lambda rows: (rows - centre.astype(rows.dtype)).astype(np.float32)
  size, on_device = min(max(BLOCK // len(y), 1), len(x)), jax.device_put(centred(y))
  for at in range(0, len(x), size):
    rows = centred(x[at : at + size])
    padded = np.pad(rows, ((0, size - len(rows)), (0, 0)))  # one shape, one program
    outputs = function(padded, on_device, *args)
    yield at, [np.asarray(output)[: len(rows)] for output in outputs]


def nearest(x, y, k):
  """Squared distances float64 [n k] of rows of x [n d] to their k nearest in y [m d], rising.

  The device names k + SPARE candidates, those of the lowest bounds. Where the k-th of their exact
  distances is no more than the last bound, no other row can be nearer; else all are computed.

  Raises:
    ValueError: y has fewer than k rows.
  """
  _enough('nearest: y', len(y), k)
  count, out = min(k + SPARE, len(y)), np.empty((len(x), k))
  for at, (low, index) in _by_block(_candidates_jit, x, y, count):
    rows = at + np.arange(len(low))
    square = _exact(x, y, np.repeat(rows, count), index.ravel()).reshape(-1, count)
    square = np.sort(square, axis=1)[:, :k]  # [b k]
    last = square[:, -1]
    open_ = (last > low[:, -1]) & (last > 0) & (count < len(y))  # 0 cannot be undercut
    for row in np.flatnonzero(open_):
      every = _exact(x, y, np.full(len(y), rows[row]), np.arange(len(y)))
      square[row] = np.sort(np.partition(every, k - 1)[:k])
    out[rows] = square
  return out


def within(x, y, square):
  """How many balls around rows of y [m d], of squared radius `square` [m], hold each row of x: [n].

  Balls are closed. Exact as `nearest` is: radii of the one meet distances of the other bit by bit.
  """
  out = np.empty(len(x), np.int64)
  for at, (sure, close) in _by_block(_inside_jit, x, y, square.astype(np.float32)):
    i, j = np.nonzero(close)
    hold = _exact(x, y, at + i, j) <= square[j]
    out[at : at + len(sure)] = sure + np.bincount(i[hold], minlength=len(sure))
  return out


def _reach(rows, k):
  """The squared distance of each row to its k-th nearest other row: [n]."""
  return nearest(rows, rows, k + 1)[:, -1]  # it is itself its nearest


def _drawn(rows, most):
  """At most `most` of the rows, drawn with a seed."""
  if len(rows) <= most:
    return rows
  return rows[np.random.default_rng(0).choice(len(rows), most, replace=False)]


def _balls(fake, real, k, most):
  if k < 1:
    raise ValueError(f'k = {k} neighbours: 1 is the least')
  _enough(f'a set of at most {most}', most, k + 1)
  return [_drawn(rows, most) for rows in _pools(fake=(fake, k + 1), real=(real, k + 1))]


def precision_recall(fake, real, k=3, most=10_000):
  """Share of samples among the images and of images among the samples; Kynkäänniemi et al. 2019.

  Among means (eq. 1) within the closed ball of one or more that reaches its k-th nearest
  neighbour. Both move with the counts: compare at equal ones. `most` rows a side are used.

  Returns: {'precision', 'recall'} in 0..1. Raises: ValueError for fewer than k + 1 images.
  """
  x, y = _balls(fake, real, k, most)
  return {'precision': float(np.mean(within(x, y, _reach(y, k)) > 0)),
          'recall': float(np.mean(within(y, x, _reach(x, k)) > 0))}


def density_coverage(fake, real, k=5, most=10_000):
  """Balls of images that a sample is in, over k; share of balls with a sample; Naeem et al. 2020.

  Eq. 4 and 5, with closed balls. An outlier among the images adds one ball to the density, where
  for `precision_recall` its large ball may hold all. `most` rows a side are used.

  Returns: {'density', 'coverage'}: 1 is expected for equal distributions, density may exceed it;
    coverage in 0..1, expected 1 - 2^-k. Raises: ValueError for fewer than k + 1 images.
  """
  x, y = _balls(fake, real, k, most)
  square = _reach(y, k)
  return {'density': float(within(x, y, square).mean() / k),
          'coverage': float(np.mean(nearest(y, x, 1)[:, 0] <= square))}


def memorisation(fake, real, held_out):
  """How much nearer samples are to training images than held-out images are; real: all of training.

  As in Carlini et al. 2023, sec. 4.2, a sample is a copy when it is unusually near; the unit is
  what images of the same distribution do that were not trained on. `real` must have a row for every
  training image. Some classes lie closer together than others: samples that are more of those raise
  `copied` without being copies.

  Returns: {'memorisation', 'copied'}: the median distance to the nearest training image over that
    of held-out images, 1 for honest samples, less where training images come back; and the share
    of samples at most as far from one as the nearest hundredth of held-out images, 0.01 for honest
    ones. Raises: ValueError for fewer than 100 held-out images, or held-out ones that were trained.
  """
  x, y, z = _pools(fake=(fake, 1), real=(real, 1), held_out=(held_out, 100))
  near, usual = (np.sqrt(nearest(rows, y, 1)[:, 0]) for rows in (x, z))
  if not np.median(usual):
    raise ValueError('memorisation: half the held-out images are training images: pass real = the '
                     'images that were trained on, held_out = a split that was not')
  # Weibull's quantile of n draws holds a further draw with chance 0.01 exactly
  limit = np.quantile(usual, 0.01, method='weibull')
  return {'memorisation': float(np.median(near) / np.median(usual)),
          'copied': float(np.mean(near <= limit))}


# --- classes --------------------------------------------------------------------------------------


def inception_score(fake, real, splits=10):
  """exp of the mean KL(p(label | x) | p(label)) of the logits; Salimans et al. 2016, sec. 4.

  `real` is not looked at: one good image a class, repeated, has the best score. p(label) is the
  mean of a split; rows are dealt to the splits in a drawn order, for samples may come by class.

  Returns: {'inception_score', 'inception_score_std'}, mean and standard deviation over the splits,
    from 1 to the number of classes. Raises: ValueError for no logits or fewer images than splits.
  """
  del real
  logits = _checked('fake', 'logits', fake.logits).astype(np.float64)
  _enough('fake', len(logits), splits)
  log_p = logits - logits.max(1, keepdims=True)
  log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
  scores = []
  order, ends = np.random.default_rng(0).permutation(len(log_p)), np.arange(splits + 1)
  for part in np.split(order, ends[1:-1] * len(log_p) // splits):
    p = np.exp(log_p[part])
    log_mean = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))  # 0 log 0 is 0
    scores.append(np.exp((p * (log_p[part] - log_mean)).sum(1).mean()))
  return {'inception_score': float(np.mean(scores)), 'inception_score_std': float(np.std(scores))}


def class_accuracy(fake, real):
  """Share of samples whose arg max logit is the label they were asked for.

  The classifier is one of real images: GAN-test of Shmelkov et al. 2018, sec. 3.2.

  Returns: {'class_accuracy'} in 0..1. Raises: ValueError without logits or labels, or for labels
    that the logits do not know.
  """
  del real
  logits, label = (_checked('fake', part, getattr(fake, part)) for part in ('logits', 'label'))
  _enough('fake', len(logits), 1)
  if label.min() < 0 or label.max() >= logits.shape[1]:
    raise ValueError(f'class_accuracy: labels {label.min()}..{label.max()} but {logits.shape[1]} '
                     f'logits: {REMEDY["label"]}')
  return {'class_accuracy': float(np.mean(logits.argmax(1) == label))}
