"""Metrics: closed forms, what libraries answer on the same sets, and input that must not pass."""

import functools
import pathlib

from golden import metrics as golden
import numpy as np
import pytest

from diffax import metrics

Set = metrics.Set


@pytest.fixture(scope='module')
def recorded():
  with np.load(pathlib.Path(golden.__file__).with_suffix('.npz')) as file:
    return dict(file)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def pools(*rows):
  return [Set(np.asarray(r, np.float32)) for r in rows]


def rotation(d):
  return np.linalg.qr(normal(d, d, seed=9).astype(np.float64))[0]


# --- what libraries answer ------------------------------------------------------------------------


@pytest.mark.parametrize('library', ('scipy', 'pytorch_fid', 'cleanfid', 'torch_fidelity'))
@pytest.mark.parametrize('case', golden.CASES)
def test_frechet_of_libraries(recorded, case, library):
  """Theirs take the root of a product of covariances, which halves the digits of small ones.

  `wide` and `clusters` have such; what the distance is there says the next test.
  """
  x, y = golden.sets(case)
  scale = x.var(0, dtype=np.float64).sum() + y.var(0, dtype=np.float64).sum()
  got = metrics.frechet(Set(x), Set(y))['frechet']
  rounding = 1e-7 if case in ('wide', 'clusters') else 1e-13
  assert abs(got - recorded[f'{case}/frechet/{library}']) < rounding * scale
  again = metrics.spatial_frechet(Set(x[:2], spatial=x), Set(y[:2], spatial=y))
  assert again == {'spatial_frechet': got}


@pytest.mark.parametrize('case', golden.CASES)
def test_frechet_without_covariances(case):
  """With X and Y the centred rows, tr (C1 C2)^1/2 is the sum of the singular values of X Y^T."""
  fake, real = golden.sets(case)
  x, y = (rows - rows.mean(0) for rows in (fake.astype(float), real.astype(float)))
  far = fake.mean(0, dtype=float) - real.mean(0, dtype=float)
  cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
  count, squares = len(x) - 1, (x**2).sum() + (y**2).sum()
  got = metrics.frechet(Set(fake), Set(real))['frechet']
  assert abs(got - far @ far - (squares - 2 * cross) / count) < 1e-13 * squares / count


@pytest.mark.parametrize('library', ('sklearn', 'torch_fidelity', 'cleanfid'))
@pytest.mark.parametrize('case', golden.CASES)
def test_kernel_of_libraries(recorded, case, library):
  """One subset of all rows; in `far` kernels of 1e18 leave their sums nine digits."""
  x, y = golden.sets(case)
  got = metrics.kernel(Set(x), Set(y), subsets=1, size=len(x))['kernel']
  np.testing.assert_allclose(got, recorded[f'{case}/kernel/{library}'],
                             rtol=1e-8 if case == 'far' else 1e-10)


@pytest.mark.parametrize('k', golden.NEIGHBOURS)
@pytest.mark.parametrize('case', golden.CASES)
def test_neighbours_of_libraries(recorded, case, k):
  """Shares are equal, row by row.

  Save where rows repeat: there distances are radii, and the balls of prdc are open, so that it
  leaves out even rows that lie on an image. torch-fidelity's are closed as ours.
  """
  fake, real = map(Set, golden.sets(case))
  ours = metrics.precision_recall(fake, real, k) | metrics.density_coverage(fake, real, k)
  both = [ours['precision'], ours['recall']]
  np.testing.assert_allclose(both, recorded[f'{case}/prc/{k}'], rtol=1e-6)  # a mean in float32
  prdc = recorded[f'{case}/prdc/{k}']
  if case == 'duplicated':
    assert (np.array(list(ours.values())) >= prdc).all() and ours['recall'] > prdc[1]
  else:
    np.testing.assert_allclose(list(ours.values()), prdc, rtol=1e-12)


@pytest.mark.parametrize('case', golden.CASES)
def test_nearest_of_sklearn(recorded, case):
  got = metrics.nearest(*golden.sets(case), 6)
  np.testing.assert_allclose(np.sqrt(got), recorded[f'{case}/nearest'], rtol=1e-12)


@pytest.mark.parametrize('splits', (1, golden.SPLITS))
def test_inception_score_of_torch_fidelity(recorded, splits):
  rows, _ = golden.logits()
  got = metrics.inception_score(Set(rows, logits=rows), None, splits)
  np.testing.assert_allclose(
    list(got.values()), recorded[f'inception_score/{splits}'], rtol=1e-12, atol=1e-14)


# --- moments and the Fréchet distance -------------------------------------------------------------


def test_moments_about_the_mean():
  """Rows that are multiples of 2^-10 can be moved by 2^20 exactly: the covariance stays."""
  rows = np.round(normal(100, 5).astype(float) * 1024) / 1024
  near, far = metrics.moments(rows), metrics.moments(rows + 2.0**20)
  np.testing.assert_allclose(far.cov, near.cov, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(near.cov, np.cov(rows, rowvar=False), rtol=1e-12)
  np.testing.assert_allclose(far.mean - 2.0**20, near.mean, atol=1e-9)


@pytest.mark.parametrize('offset', (0.0, 2.0**20))
def test_merge_is_the_moments_of_all(offset):
  rows = np.round(normal(300, 5).astype(float) * 1024) / 1024 + offset
  whole = metrics.moments(rows)
  for cuts in ((1, 2, 4, 150), range(1, 300)):
    got = functools.reduce(metrics.merge, map(metrics.moments, np.split(rows, list(cuts))))
    assert got.count == 300
    np.testing.assert_allclose(got.mean, whole.mean, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(got.cov, whole.cov, rtol=0, atol=1e-8 if offset else 1e-13)


def gaussian(mean, cov):
  return metrics.Moments(1000, np.array(mean, float), np.array(cov, float))


def test_distance_of_gaussians():
  """Shared axes: (sqrt a - sqrt b)^2 each. Two dimensions: (tr M^1/2)^2 = tr M + 2 det M^1/2."""
  q, a, b = rotation(4), np.array([4.0, 1.0, 9.0, 0.0]), np.array([1.0, 1.0, 4.0, 0.25])
  one, two = gaussian([0] * 4, q * a @ q.T), gaussian([1, 0, 2, 0], q * b @ q.T)
  assert metrics.distance(one, two) == pytest.approx(5 + 1 + 1 + 0.25, rel=1e-12)

  a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
  root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
  got = metrics.distance(gaussian([0, 0], a), gaussian([0, 3], b))
  assert got == pytest.approx(9 + 3 + 4 - 2 * root, rel=1e-12)


def test_distance_of_singular_gaussians():
  """cov u u^T and v v^T: |u|^2 + |v|^2 - 2 |u.v|; none at all: the means alone."""
  u, v = normal(2, 30).astype(np.float64)
  zero = np.zeros(30)
  got = metrics.distance(gaussian(zero, np.outer(u, u)), gaussian(zero, np.outer(v, v)))
  assert got == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-12)
  flat = np.zeros((30, 30))
  got = metrics.distance(gaussian(zero, flat), gaussian(zero + 1, np.outer(v, v)))
  assert got == pytest.approx(30 + v @ v, rel=1e-12)


@pytest.mark.parametrize('count', (20, 200))
def test_frechet_of_a_set_to_itself(count):
  """0 to rounding, also with fewer rows than columns."""
  rows = normal(count, 64) + 100
  assert metrics.frechet(Set(rows), Set(rows[::-1]))['frechet'] < 1e-11
  moved = metrics.frechet(Set(rows), Set(rows + np.float32(0.5)))['frechet']
  assert moved == pytest.approx(64 / 4, rel=1e-6)  # the sum is rounded to float32


@pytest.mark.parametrize('count', (20, 200))
def test_frechet_of_rotated_sets(count):
  q, x, y = rotation(64), normal(count, 64).astype(float), normal(count, 64, seed=1).astype(float)
  plain, turned = (metrics.frechet(Set(a), Set(b)) for a, b in ((x, y), (x @ q, y @ q)))
  assert turned['frechet'] == pytest.approx(plain['frechet'], rel=1e-12)


def test_frechet_takes_given_moments():
  rows, other = normal(50, 3), normal(40, 3, seed=1)
  given = Set(rows[:1], spatial=rows[:1], moments=metrics.moments(rows),
              spatial_moments=metrics.moments(rows))
  want = metrics.frechet(Set(rows), Set(other))['frechet']
  assert metrics.frechet(given, Set(other)) == {'frechet': want}
  assert metrics.spatial_frechet(given, Set(other, spatial=other)) == {'spatial_frechet': want}


# --- the kernel distance --------------------------------------------------------------------------


def test_kernel_of_points():
  """Of 0 and 1 in one dimension: k(0, 0) + k(1, 1) - 2 k(0, 1) = 1 + 8 - 2."""
  fake, real = pools(np.zeros((7, 1)), np.ones((9, 1)))
  assert metrics.kernel(fake, real) == {'kernel': 7.0, 'kernel_std': 0.0}


def test_kernel_is_unbiased():
  """The mean of 400 pairs of ten rows is 0 in 4 standard errors; with the diagonal it is not."""
  values, biased = [], []
  for x, y in normal(400, 2, 10, 4):
    values.append(metrics.kernel(*pools(x, y), subsets=1)['kernel'])
    biased.append(values[-1] + 2 / 10 * (1 + 3 * 4 / 4))  # about E k(x, x) / 10 for either set
  error = np.std(values) / 400**0.5
  assert abs(np.mean(values)) < 4 * error
  assert np.mean(biased) > 4 * error


def test_kernel_draws():
  """Seeded; the spread over subsets is that of sets so small; draws do not repeat a row."""
  fake, real = pools(normal(300, 8), normal(300, 8, seed=1) + 0.5)
  one, same, other = (metrics.kernel(fake, real, 30, 50, seed=s) for s in (0, 0, 1))
  whole = metrics.kernel(fake, real, 1, 300)['kernel']
  assert one == same != other
  for got in (one, other):
    assert abs(got['kernel'] - whole) < 4 * got['kernel_std'] / 30**0.5
  all_alike = metrics.kernel(fake, real, 3, 10_000)
  assert all_alike['kernel'] == pytest.approx(whole, rel=1e-12)
  assert all_alike['kernel_std'] < 1e-12


# --- neighbours -----------------------------------------------------------------------------------


@pytest.mark.parametrize('block', (1, 7 * 60, 10**9))
@pytest.mark.parametrize('spare', (0, 8))
def test_blocks_and_candidates_change_nothing(monkeypatch, block, spare):
  x, y = normal(50, 3), normal(60, 3, seed=1)
  square = ((x[:, None].astype(float) - y[None]) ** 2).sum(-1)
  radius = np.full(60, 0.7)
  monkeypatch.setattr(metrics, 'BLOCK', block)
  monkeypatch.setattr(metrics, 'SPARE', spare)
  np.testing.assert_allclose(metrics.nearest(x, y, 4), np.sort(square, 1)[:, :4], rtol=1e-12)
  np.testing.assert_array_equal(metrics.within(x, y, radius), (square <= radius).sum(1))


def test_close_pairs_far_from_the_origin():
  """Where |x|^2 + |y|^2 - 2xy in float32 has no digit left, distances have all of theirs."""
  x, y = golden.sets('clusters')
  x64, y64 = x.astype(float), y.astype(float)
  square = ((x64[:, None] - y64[None]) ** 2).sum(-1)
  centred = x - y.mean(0), y - y.mean(0)
  naive = (centred[0]**2).sum(1)[:, None] + (centred[1]**2).sum(1)[None] - (
    2 * centred[0] @ centred[1].T)
  assert np.abs(naive - square).max() > 100 * np.median(square.min(1))
  np.testing.assert_allclose(metrics.nearest(x, y, 3), np.sort(square, 1)[:, :3], rtol=1e-12)
  radius = np.sort(square, 0)[2]  # every third distance is a radius: ties everywhere
  np.testing.assert_array_equal(metrics.within(x, y, metrics.nearest(y, x, 3)[:, -1]),
                                (square <= radius * (1 + 1e-12)).sum(1))


def test_bounds_hold():
  """Exact squared distances lie between the bounds, which are as close as float32 is."""
  for case in golden.CASES:
    x, y = golden.sets(case)
    low, high = metrics._bounds(x, y)
    x, y = x.astype(float), y.astype(float)
    square = ((x[:, None] - y[None]) ** 2).sum(-1)
    assert (low <= square).all() and (square <= high).all()
    total = (x**2).sum(1)[:, None] + (y**2).sum(1)[None]
    assert ((high - low) <= 1e-4 * total).all()


def test_precision_recall_on_a_line():
  """Images 0..5, k = 1: balls of radius 1, closed. Samples at 0, 6, 6.5, 20: two are inside.

  The samples' balls reach 6, 0.5, 0.5 and 13.5: [-6, 6], [5.5, 6.5], [6, 7], [6.5, 33.5].
  """
  fake, real = pools([[0], [6], [6.5], [20]], np.arange(6)[:, None])
  assert metrics.precision_recall(fake, real, k=1) == {'precision': 0.5, 'recall': 1.0}
  # 0 is in the balls of 0 and 1, 6 in that of 5; a ball counts once: of six, those of 0, 1 and 5
  assert metrics.density_coverage(fake, real, k=1) == {'density': 3 / 4, 'coverage': 3 / 6}


def test_equal_and_disjoint_sets():
  rows = normal(80, 6)
  same, apart = pools(rows, rows[::-1]), pools(rows, rows + 100)
  assert metrics.precision_recall(*same) == {'precision': 1.0, 'recall': 1.0}
  assert metrics.precision_recall(*apart) == {'precision': 0.0, 'recall': 0.0}
  assert metrics.density_coverage(*apart) == {'density': 0.0, 'coverage': 0.0}
  assert metrics.density_coverage(*same)['coverage'] == 1.0


def test_a_dropped_mode():
  """One of two distant modes is missing: half the images, none of the samples."""
  modes = normal(2, 100, 4) + np.array([0, 50], np.float32)[:, None, None]
  fake, real = pools(np.repeat(modes[0], 2, 0), np.concatenate(modes))
  assert metrics.precision_recall(fake, real) == {'precision': 1.0, 'recall': 0.5}
  got = metrics.density_coverage(fake, real)
  assert got['coverage'] == 0.5
  # each ball of five neighbours holds itself and them, each twice: 2 * 100 * 6 of 200 samples
  assert got['density'] == pytest.approx(6 / 5, rel=1e-12)


def test_fresh_draws_have_density_one():
  """Naeem et al. 2020, sec. 3.3: density 1 and coverage 1 - 2^-k are expected, here in 5 %."""
  fake, real = pools(normal(1500, 4), normal(1500, 4, seed=1))
  got = metrics.density_coverage(fake, real, k=3)
  assert got['density'] == pytest.approx(1, abs=0.05)
  assert got['coverage'] == pytest.approx(1 - 2**-3, abs=0.03)
  # an outlier among the images is a ball that holds all: a whole precision, 1 / k of a density
  real = Set(np.concatenate([real.pool, np.full((1, 4), 1000, np.float32)]))
  lost = Set(fake.pool + 20)
  assert metrics.precision_recall(lost, real)['precision'] == 1.0
  assert metrics.density_coverage(lost, real)['density'] == pytest.approx(1 / 5)


def test_most_is_a_cap():
  """A cap draws rows of either side, the same every time, and leaves smaller sets alone."""
  fake, real = pools(normal(90, 4), normal(60, 4, seed=1))
  for metric in (metrics.precision_recall, metrics.density_coverage):
    whole, capped = metric(fake, real, most=90), metric(fake, real, most=30)
    assert whole == metric(fake, real) and capped == metric(fake, real, most=30) != whole


def test_memorisation():
  """Copies are at 0, fresh draws at 1, the middle of the training images' cloud nearer than new."""
  train, held_out, fresh = pools(*normal(3, 3000, 5))
  measure = lambda rows: metrics.memorisation(Set(rows), train, held_out)
  assert measure(train.pool[5:105]) == {'memorisation': 0.0, 'copied': 1.0}
  honest = measure(fresh.pool)
  assert honest['memorisation'] == pytest.approx(1, abs=0.03)
  assert 0.004 < honest['copied'] < 0.016  # 0.01 of 3000 and of 3000: 3 standard deviations
  mixed = measure(np.concatenate([fresh.pool[:900], train.pool[:100]]))
  assert mixed['copied'] == pytest.approx(0.1 + 0.9 * 0.01, abs=0.006)
  assert measure(fresh.pool + 10)['memorisation'] > 3


# --- classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize('splits', (1, 5))
def test_inception_score(splits):
  score = lambda rows: metrics.inception_score(Set(rows, logits=rows), None, splits)
  assert score(np.full((50, 7), 3.0))['inception_score'] == pytest.approx(1, rel=1e-12)
  confident = 1000 * np.eye(7)[np.repeat(np.arange(7), 100)]  # class by class, far below exp(-745)
  got = score(confident)['inception_score']
  # a split of 140 misses balance by about (7 - 1) / 2 / 140 in the exponent
  assert got == pytest.approx(7, rel=1e-12 if splits == 1 else 0.05) and got <= 7 * (1 + 1e-12)
  assert score(confident[:100])['inception_score'] == pytest.approx(1, rel=1e-12)
  # shares 3/4 and 1/4 of two classes: exp of their entropy
  unequal = score(np.repeat(confident[[0, -1]], (75, 25), 0)) if splits == 1 else None
  if unequal:
    assert unequal['inception_score'] == pytest.approx(0.75**-0.75 * 0.25**-0.25, rel=1e-12)


def test_class_accuracy():
  logits = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0]]
  fake = Set(logits, logits=logits, label=np.array([0, 1, 2, 0, 0]))
  assert metrics.class_accuracy(fake, None) == {'class_accuracy': 0.8}


# --- what must not pass ---------------------------------------------------------------------------

GOOD = Set(normal(120, 4), normal(120, 6), normal(120, 3), np.arange(120) % 3)
BAD = GOOD._replace(pool=np.where(np.arange(120)[:, None] % 40 == 0, np.nan, GOOD.pool),
                    logits=np.where(np.arange(120)[:, None] < 7, np.inf, GOOD.logits))
PAIRS = (metrics.frechet, metrics.kernel, metrics.precision_recall, metrics.density_coverage)
TRAINED = functools.partial(metrics.memorisation, held_out=GOOD)


def first(count):
  return Set(*[part[:count] for part in GOOD[:4]])


@pytest.mark.parametrize('metric, fake, real, words', [
  *[(m, BAD, GOOD, 'fake.pool: 3 of 120 rows') for m in (*PAIRS, TRAINED)],
  *[(m, GOOD, BAD, 'real.pool: 3 of 120 rows') for m in (*PAIRS, TRAINED)],
  *[(m, Set(normal(120, 5)), GOOD, 'widths') for m in (*PAIRS, TRAINED)],
  *[(m, GOOD, first(1), 'real has 1 rows') for m in PAIRS],
  (metrics.precision_recall, first(3), GOOD, 'fake has 3 rows, this metric needs 4'),
  (metrics.density_coverage, GOOD, first(5), 'real has 5 rows, this metric needs 6'),
  (functools.partial(metrics.precision_recall, k=0), GOOD, GOOD, 'k = 0'),
  (functools.partial(metrics.precision_recall, most=3), GOOD, GOOD, 'at most 3'),
  (functools.partial(metrics.kernel, subsets=0), GOOD, GOOD, '0 subsets'),
  (metrics.spatial_frechet, Set(GOOD.pool), GOOD, 'fake.spatial is None.*inception'),
  (metrics.spatial_frechet, GOOD, Set(GOOD.pool), 'real.spatial is None'),
  (metrics.spatial_frechet, GOOD, GOOD._replace(spatial=GOOD.pool), 'spatial features of widths'),
  (metrics.frechet, GOOD, GOOD._replace(
    moments=gaussian([0] * 4, np.full((4, 4), np.nan))), 'real.moments are not finite'),
  (functools.partial(metrics.memorisation, held_out=first(99)), GOOD, GOOD, 'held_out has 99'),
  (TRAINED, GOOD, GOOD, 'a split that was not'),
  (metrics.inception_score, Set(GOOD.pool), GOOD, 'fake.logits is None.*classif'),
  (metrics.inception_score, BAD, GOOD, 'fake.logits: 7 of 120 rows'),
  (metrics.inception_score, first(9), GOOD, 'fake has 9 rows, this metric needs 10'),
  (metrics.class_accuracy, GOOD._replace(logits=None), GOOD, 'fake.logits is None'),
  (metrics.class_accuracy, GOOD._replace(label=None), GOOD, 'fake.label is None.*labels'),
  (metrics.class_accuracy, GOOD._replace(label=GOOD.label + 1), GOOD, 'labels 1..3 but 3 logits'),
])
def test_what_must_not_pass(metric, fake, real, words):
  with pytest.raises(ValueError, match=words):
    metric(fake, real)


def test_answers_are_plain():
  """A config names them, a log writes them: names that do not meet, numbers of Python."""
  held_out = Set(normal(120, 4, seed=3))
  answers = [m(GOOD, GOOD) for m in (
    *PAIRS, metrics.spatial_frechet, metrics.inception_score, metrics.class_accuracy)]
  answers.append(metrics.memorisation(GOOD, GOOD, held_out))
  names = [name for answer in answers for name in answer]
  assert len(set(names)) == len(names)
  assert {type(value) for answer in answers for value in answer.values()} == {float}


def test_moments_of_nothing():
  with pytest.raises(ValueError, match='0 rows'):
    metrics.moments(np.zeros((0, 3)))
