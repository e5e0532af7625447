"""Aspect-ratio buckets: which record goes where, the order over epochs, and training on them."""

import itertools

import jax
import numpy as np
from PIL import Image
import pytest
import run_diffax

from diffax import train
from diffax.build import ConfigError
from diffax.data import pipeline
from diffax.data import sources
from diffax.data import transforms

SHAPES = ((8, 8), (12, 6), (6, 12))  # height, width
COUNTS = {(20, 20): 7, (31, 16): 5, (16, 32): 3, (10, 60): 2}  # of files


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Pictures of several sizes, the number of each in its red channel."""
  path = tmp_path_factory.mktemp('pictures') / 'train'
  path.mkdir()
  sizes = [size for size, count in COUNTS.items() for _ in range(count)]
  for i, (h, w) in enumerate(sizes):
    Image.fromarray(np.full((h, w, 3), 10 * i, np.uint8)).save(path / f'{i:02d}.png')
  return path.parent


@pytest.fixture(scope='module')
def source(folder):
  return sources.folder(str(folder))


def batch(source, step, size=4, **options):
  return pipeline.batch_at(source, step, size, **(dict(seed=3, shapes=SHAPES) | options))


# --- which record goes where ----------------------------------------------------------------------


def test_nearest_ratio(source):
  plan = pipeline.buckets(source, SHAPES)
  assert plan.shapes == SHAPES
  assert [m.tolist() for m in plan.members] == [
    list(range(7)), list(range(7, 12)), list(range(12, 17))]
  some = pipeline.buckets(source, ((8, 8), (10, 9), (6, 12), (12, 6)))
  assert some.shapes == ((8, 8), (6, 12), (12, 6))  # no picture is nearest to 10:9


@pytest.mark.parametrize('h,w,nearest', [
  (10, 10, (8, 8)), (100, 1, (12, 6)), (1, 100, (6, 12)),
  (1415, 1000, (12, 6)), (1413, 1000, (8, 8)),  # the border is where the logarithms halve: sqrt(2)
  (1000, 1415, (6, 12)), (1000, 1413, (8, 8)),
])
def test_border_of_buckets(h, w, nearest):
  held = sources.Source(None, None, 1, (None, None, 3), 0, sizes=lambda: np.array([[h, w]]))
  assert pipeline.buckets(held, SHAPES).shapes == (nearest,)


def test_images_of_one_size_have_one_bucket():
  assert pipeline.buckets(sources.digits(), SHAPES).shapes == ((8, 8),)


def test_sizes_are_read_from_headers_once(folder, monkeypatch):
  opened = []
  files = sources.folder(str(folder))
  sources._file_sizes.cache_clear()
  load = Image.open
  monkeypatch.setattr(Image, 'open', lambda file, **told: opened.append(file) or load(file, **told))
  monkeypatch.setattr(Image.Image, 'load', None)  # no pixel is decoded
  monkeypatch.setattr('PIL.ImageFile.ImageFile.load', None)
  for _ in range(2):
    sizes = files.sizes()
  assert len(opened) == len(files)
  assert sizes.tolist() == [list(size) for size, count in COUNTS.items() for _ in range(count)]


def test_captioned_files_have_sizes(folder, tmp_path):
  (tmp_path / 'a.png').write_bytes((folder / 'train' / '08.png').read_bytes())
  (tmp_path / 'captions.jsonl').write_text('{"file": "a.png", "caption": "a tall one"}\n')
  assert sources.captioned(str(tmp_path), 'all').sizes().tolist() == [[31, 16]]


# --- the cut --------------------------------------------------------------------------------------


@pytest.mark.parametrize('h,w,height,width,top,left', [
  (16, 16, 8, 4, 0, 2), (16, 32, 8, 8, 0, 4), (48, 16, 8, 8, 8, 0), (10, 30, 20, 40, 0, 10),
  (8, 4, 8, 4, 0, 0),
])
def test_cover(h, w, height, width, top, left):
  """A ramp is a ramp, as steep both ways, and its middle stays in the middle."""
  across = np.arange(w)[None] / w + np.zeros((h, 1))
  down = np.arange(h)[:, None] / h + np.zeros((1, w))
  image = np.rint(np.stack([200 * across, 200 * down, 0 * down], -1)).astype(np.uint8)
  cut, *place = transforms.cover(image, height, width)
  assert cut.shape == (height, width, 3) and place == [top, left]
  scale = max(height / h, width / w)  # as much of the picture as there is
  inner = cut[2:-2, 1:-1].astype(float) if min(h, w) > 8 else cut.astype(float)
  steep = np.diff(inner[:, :, 0], axis=1).mean(), np.diff(inner[:, :, 1], axis=0).mean()
  np.testing.assert_allclose(steep, (200 / w / scale, 200 / h / scale), rtol=0.1)
  middle = cut.astype(float).mean((0, 1))[:2]
  np.testing.assert_allclose(middle, (100 - 100 / w, 100 - 100 / h), atol=1.5)


def test_batch_has_one_shape_and_says_the_cut(source):
  """Each row its own record, at its bucket's shape, with the six numbers of it."""
  sizes, seen = source.sizes(), set()
  for step in range(12):
    made = batch(source, step)
    h, w = made['image'].shape[1:3]
    seen.add((h, w))
    assert made['image'].dtype == np.float32 and made['size'].dtype == np.int32
    for image, index, cut in zip(made['image'], made['index'], made['size']):
      np.testing.assert_allclose((image + 1) * 127.5, 10 * index, atol=1e-3)
      (a, b), scale = sizes[index], max(h / sizes[index][0], w / sizes[index][1])
      assert cut[[0, 1, 4, 5]].tolist() == [a, b, h, w]
      np.testing.assert_allclose(cut[2:4], (scale * np.array([a, b]) - (h, w)) / 2, atol=1.0)
      assert (h, w) == min(SHAPES, key=lambda s, a=a, b=b: abs(np.log(s[0] / s[1] * b / a)))
  assert seen == set(SHAPES)


def test_without_buckets_there_is_no_size():
  assert set(pipeline.batch_at(sources.digits(), 0, 4, seed=0)) == {'image', 'label', 'index'}


# --- the order ------------------------------------------------------------------------------------


def walk(counts, size, seed, steps):
  return [pipeline.turn(counts, size, seed, k) for k in range(steps)]


@pytest.mark.parametrize('counts,size', [
  ((7, 5, 5), 4), ((1, 2, 30), 8), ((100,), 7), ((3, 1), 16), ((64, 32), 8)])
def test_batches_of_a_bucket_follow_one_another(counts, size):
  """Of each bucket batch 0, 1, 2, ...; in the whole as many as its share of records."""
  steps = 3 * sum(counts)  # 3 size epochs
  found = walk(counts, size, 0, steps)
  for j, n in enumerate(counts):
    assert [number for bucket, number in found if bucket == j] == list(range(3 * n))
  for epoch in range(3 * size):  # whole batches by each epoch's end
    end = sum(epoch * n // size for n in counts)
    for j, n in enumerate(counts):
      assert sum(bucket == j for bucket, _ in found[:end]) == epoch * n // size


@pytest.mark.parametrize('size', [1, 4, 6, 24])
def test_no_record_is_lost(source, size):
  """By the end of `size` epochs every record was seen `size` times, at batches of any size; by the
  end of each, none more than once too often, nor behind by more than what fills no batch."""
  n = len(source)
  members = pipeline.buckets(source, SHAPES).members
  pick = pipeline._pick_of_bucket
  plan, rows = pipeline.buckets(source, SHAPES), np.arange(size)
  seen, step = np.zeros(n, int), 0
  for epoch in range(1, 2 * size + 1):
    end = sum(epoch * len(m) // size for m in members)
    for k in range(step, end):
      np.add.at(seen, pick(plan, size, 3, rows, k)[0], 1)
    step = end
    for m in members:
      assert seen[m].max() - seen[m].min() <= 1 and seen[m].max() <= epoch
      assert seen[m].sum() > epoch * len(m) - size
    if epoch % size == 0:
      assert step == epoch * n // size and set(seen.tolist()) == {epoch}


def test_order_is_shuffled_by_seed_and_epoch():
  counts, size = (64, 48, 32), 2
  epoch = sum(counts) // size
  found = [bucket for bucket, _ in walk(counts, size, 0, 2 * epoch)]
  other = [bucket for bucket, _ in walk(counts, size, 1, epoch)]
  runs = sum(a != b for a, b in itertools.pairwise(found[:epoch]))
  assert runs > 25 and found[:epoch] != found[epoch:] and found[:epoch] != other
  plan = pipeline.Buckets(((8, 8), (6, 12)), (np.arange(50), 50 + np.arange(50)))
  rows, by_bucket = np.arange(50), {0: [], 1: []}
  for k in range(6):
    records, shape = pipeline._pick_of_bucket(plan, 50, 0, rows, k)
    by_bucket[plan.shapes.index(shape)].append(records % 50)
  orders = [*by_bucket[0], *by_bucket[1]]
  for a, b in itertools.combinations(orders, 2):
    assert (a == b).sum() < 10  # one is expected by chance


def same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])


def test_hosts_and_restarts_see_the_same(source):
  options = dict(seed=3, shapes=SHAPES, flip=True)
  whole = pipeline.batches(source, 4, start_step=0, **options)
  found = list(itertools.islice(whole, 7))
  whole.close()
  later = pipeline.batches(source, 4, start_step=5, **options)
  for k in (5, 6):
    same(next(later), found[k])
  later.close()
  for k in (2, 6):
    parts = [batch(source, k, flip=True, rows=rows) for rows in ([0, 3], [1, 2])]
    for name, value in found[k].items():
      np.testing.assert_array_equal(parts[0][name], value[[0, 3]])
      np.testing.assert_array_equal(parts[1][name], value[[1, 2]])
  assert any((batch(source, k, seed=4)['index'] != found[k]['index']).any() for k in range(3))


@pytest.mark.slow
def test_worker_processes_change_nothing(source):
  made = pipeline.batches(source, 4, seed=3, shapes=SHAPES, workers=1)
  for k in range(3):
    same(next(made), batch(source, k))
  made.close()


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize('shapes,words', [
  (((8, 8), (16, 16)), 'one ratio'), ((8, 8), r'no pairs \(height, width\)'),
  (((8, 8, 3),), 'no pairs'), (((8, 0),), 'at least 1, not 0'), (((8.5, 8),), 'not 8.5')])
def test_bad_shapes(source, shapes, words):
  with pytest.raises(ValueError, match=words):
    pipeline.steps(source, 4, seed=0, shapes=shapes)


def test_sources_without_sizes():
  unknown = sources.Source(None, str, 3, (None, None, 3), 0)
  with pytest.raises(ValueError, match='not known before.*folder'):
    pipeline.steps(unknown, 4, seed=0, shapes=SHAPES)
  floats = sources.Source(None, str, 3, (8, 8, 4), 0, np.dtype(np.float32))
  with pytest.raises(ValueError, match=r'buckets=.*float32.*leave out config\.data\.buckets'):
    pipeline.steps(floats, 4, seed=0, shapes=SHAPES)


def test_broken_pictures(folder, tmp_path):
  for i in range(3):
    (tmp_path / f'{i}.png').write_bytes((folder / 'train' / f'0{i}.png').read_bytes())
  (tmp_path / '1.png').write_text('no picture')
  held = sources.folder(str(tmp_path))
  with pytest.raises(ValueError, match=r'1\.png is no readable image.*on_error=skip'):
    pipeline.steps(held, 3, seed=0, shapes=SHAPES)
  made = batch(held, 0, 3, on_error='skip')
  assert sorted(made['index'].tolist()) == [0, 2, 2]


# --- training -------------------------------------------------------------------------------------


def run(folder, *more):
  return run_diffax.setup(
    'data.name=folder', f'data.path={folder}', 'data.size=8', f'data.buckets={SHAPES}',
    'model.classes=0', 'model.width=16', 'model.depth=1', 'task.drop_cond=0.0', 'batch_size=8',
    'ema=()', *more, count=2)


def test_training_takes_every_shape(folder):
  """A program a shape; a step made again from the state before it is the same; the mean of the
  losses is that of the examples one by one."""
  made = run(folder)
  assert set(train.batch_shapes(made)) == {(8, *shape, 3) for shape in SHAPES}
  assert sum(train.batch_shapes(made).values()) == pytest.approx(1.0)
  state, step, batches = train.init(made), train.compile_step(made), train.batches(made, 0)
  shapes, before = set(), None
  for k in range(6):
    data = next(batches)
    shapes.add(data['image'].shape)
    if k == 4:
      before = jax.device_get(state)
      _, losses, _ = train.each_loss(made, state)
    state, metrics = step(state, data)
    if k == 4:
      after = jax.device_get(state)
      sums = float(after.sums['loss'] - before.sums['loss'])
      assert sums == pytest.approx(losses.mean(), rel=1e-3)
    assert np.isfinite(float(metrics['loss'])) and not bool(metrics['bad'])
  batches.close()
  assert len(shapes) == 3 and int(state.step) == 6
  place = jax.tree.map(lambda x: x.sharding, made.like)
  batches = train.batches(made, 4)
  again, _ = step(jax.device_put(before, place), next(batches))
  batches.close()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), after)


def test_configs_that_cannot_be(folder):
  with pytest.raises(ConfigError, match=r'data\.buckets: at 9 x 9: .*patches of 2'):
    run_diffax.setup(
      'data.name=folder', f'data.path={folder}', 'data.size=8', 'data.buckets=((9, 9), (12, 6))',
      'model.classes=0', 'batch_size=8')
  with pytest.raises(ConfigError, match='one ratio'):
    run(folder, 'data.buckets=((8, 8), (4, 4))')
