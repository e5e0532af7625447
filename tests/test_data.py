"""Data: the order, the slices of hosts, sources, transforms and broken records."""

import itertools
import os
import pathlib
import pickle

import jax
import numpy as np
from PIL import Image
import pytest

from diffax import sharding
from diffax.data import pipeline
from diffax.data import sources
from diffax.data import transforms


def same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name])


def take(count, *args, **kwargs):
  """The first batches, as one dict of arrays each."""
  iterator = pipeline.batches(*args, **kwargs)
  found = list(itertools.islice(iterator, count))
  iterator.close()
  return found


def indices(count, *args, **kwargs):
  return np.concatenate([batch['index'] for batch in take(count, *args, **kwargs)])


@pytest.fixture(scope='module')
def digits():
  return sources.digits()


@pytest.fixture
def tree(tmp_path):
  """train/{cat,dog}, test/cat with grey level 10 k in image k of a class; returns tmp_path."""
  for name, count in (('train/cat', 5), ('train/dog', 4), ('test/cat', 2)):
    (tmp_path / name).mkdir(parents=True)
    for k in range(count):
      pixels = np.full((12, 16, 3), 10 * k + 100 * name.endswith('dog'), np.uint8)
      Image.fromarray(pixels).save(tmp_path / name / f'{k}.png')
  (tmp_path / 'train' / 'cat' / 'notes.txt').write_text('not an image')
  return tmp_path


def truncate(path):
  noise = np.random.default_rng(0).integers(256, size=(12, 16, 3), dtype=np.uint8)
  Image.fromarray(noise).save(path)
  path.write_bytes(path.read_bytes()[:300])


# order


def test_each_epoch_visits_each_record_once():
  for epoch in range(3):
    seen = pipeline.order(1000, 3, epoch * 1000 + np.arange(1000))
    np.testing.assert_array_equal(np.sort(seen), np.arange(1000))


def test_order_differs_between_epochs_and_seeds_also_neighbouring_ones():
  orders = [pipeline.order(1000, seed, epoch * 1000 + np.arange(1000))
            for seed in range(3) for epoch in range(3)]
  for a, b in itertools.combinations(orders, 2):
    assert (a == b).sum() < 10  # one is expected by chance


def test_neighbours_in_the_order_are_independent():
  n = 60000
  first, second = (pipeline.order(n, 0, epoch * n + np.arange(n)) for epoch in range(2))
  for a, b in ((first[1:], first[:-1]), (first, second), (first, np.arange(n))):
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)


def test_batches_cross_the_ends_of_epochs(digits):
  n = len(digits)
  seen = indices(30, digits, 100, seed=0)  # 1438 records: ends inside batches 14 and 28
  np.testing.assert_array_equal(seen, pipeline.order(n, 0, np.arange(3000)))
  np.testing.assert_array_equal(np.sort(seen[:n]), np.arange(n))
  np.testing.assert_array_equal(np.sort(seen[n:2 * n]), np.arange(n))


def test_batch_larger_than_the_source(tree):
  source = sources.folder(tree)
  batch = pipeline.batch_at(source, 0, 20, seed=0, size=8)
  counts = np.bincount(batch['index'], minlength=9)
  assert counts.sum() == 20 and set(counts) <= {2, 3}


def test_repeats_from_seed_and_step(digits):
  options = dict(seed=5, flip=True)
  batches = take(20, digits, 100, **options)
  same(batches[7], take(1, digits, 100, start_step=7, **options)[0])
  same(batches[16], pipeline.batch_at(digits, 16, 100, **options))
  far = take(1, digits, 100, start_step=10**9, **options)[0]
  same(far, pipeline.batch_at(digits, 10**9, 100, **options))


def test_examples_do_not_depend_on_batch_size(digits):
  big = pipeline.batch_at(digits, 1, 60, seed=0, flip=True)
  small = take(3, digits, 20, seed=0, flip=True, start_step=3)
  same(big, {name: np.concatenate([b[name] for b in small]) for name in big})


@pytest.mark.parametrize('rows', [np.arange(25, 50), [7], [0, 1, 40, 41, 99], np.arange(100)])
def test_rows_are_those_of_the_global_batch(digits, rows):
  """Of a host whose devices hold them; on some machines they are not next to each other."""
  whole = take(16, digits, 100, seed=1, flip=True)
  for batch, part in zip(whole, take(16, digits, 100, seed=1, flip=True, rows=rows)):
    same({name: batch[name][rows] for name in batch}, part)


def test_flip_mirrors_half_and_changes_nothing_else(digits):
  mirrored = 0
  options = dict(batch_size=100, seed=0)
  for plain, flipped in zip(take(14, digits, **options), take(14, digits, flip=True, **options)):
    np.testing.assert_array_equal(plain['index'], flipped['index'])
    for a, b in zip(plain['image'], flipped['image']):
      assert (a == b).all() or (a[:, ::-1] == b).all()
      mirrored += not (a == b).all()
  assert abs(mirrored - 700) < 5 * np.sqrt(1400) / 2


def test_epochs_flip_anew(digits):
  coins = pipeline._uniform(0, 'flip', np.arange(2000)) < 0.5
  assert 0.4 < np.mean(coins[:1000] == coins[1000:]) < 0.6
  np.testing.assert_array_equal(coins[7:9], pipeline._uniform(0, 'flip', np.arange(7, 9)) < 0.5)


def test_worker_processes_change_nothing(digits):
  options = dict(seed=2, flip=True, size=6, start_step=13)
  for a, b in zip(take(4, digits, 32, **options), take(4, digits, 32, workers=2, **options)):
    same(a, b)


def test_values_of_a_batch(digits):
  batch = pipeline.batch_at(digits, 0, 16, seed=0)
  assert batch['image'].dtype == np.float32 and batch['label'].dtype == np.int32
  assert batch['image'].min() == -1 and batch['image'].max() == 1
  for image, label, i in zip(batch['image'], batch['label'], batch['index']):
    np.testing.assert_array_equal(transforms.to_uint8(image), digits[i]['image'])
    assert label == digits[i]['label']


@pytest.mark.parametrize('arguments, words', [
  (dict(batch_size=10, rows=[9, 10]), ['[9, 10]', 'batch of 10', '0 to 9']),
  (dict(batch_size=10, rows=[-1]), ['[-1]', '0 to 9']),
  (dict(batch_size=10, rows=[]), ['[]', 'one or more']),
  (dict(batch_size=0), ['batch_size', '0']),
  (dict(batch_size=2.5), ['batch_size', '2.5']),
  (dict(batch_size=8, seed=0.5), ['seed', '0.5']),
  (dict(batch_size=8, on_error='skp'), ["'skp'", "'raise' or 'skip'"]),
  (dict(batch_size=8, start_step=-1), ['start_step', '-1']),
  (dict(batch_size=8, workers=-1), ['workers', '-1']),
  (dict(batch_size=8, size=0), ['size', '0']),
])
def test_bad_arguments_say_value_and_remedy(digits, arguments, words):
  with pytest.raises(ValueError) as e:
    pipeline.batches(digits, **dict(dict(seed=0), **arguments))
  assert all(word in str(e.value) for word in words) and '\n' not in str(e.value)


# onto devices


def test_prefetch_hands_over_every_batch_sharded(digits):
  split = sharding.batch(sharding.make_mesh({'data': 4, 'fsdp': -1}))
  held = np.arange(64), 64
  host = take(5, digits, 64, seed=0)
  place = lambda batch: sharding.put(batch, split, held)
  device = pipeline.prefetch(pipeline.batches(digits, 64, seed=0), place)
  for a, b in zip(host, device):
    assert all(b[name].sharding == split for name in b)
    same(a, jax.tree.map(np.asarray, b))
  device.close()


def test_prefetch_raises_in_place_and_closes():
  class Batches:
    count, closed = 0, False

    def __next__(self):
      self.count += 1
      if self.count == 4:
        raise ValueError('broken')
      return dict(label=np.full(2, self.count))

    def close(self):
      self.closed = True

  batches = Batches()
  device = pipeline.prefetch(batches, jax.device_put)
  assert [int(next(device)['label'][0]) for _ in range(3)] == [1, 2, 3]
  with pytest.raises(ValueError, match='broken'):
    next(device)
  assert batches.closed


# broken records


def test_broken_image_is_named_with_the_remedy(tree):
  broken = tree / 'train' / 'cat' / '3.png'
  truncate(broken)
  with pytest.raises(ValueError) as e:
    take(1, sources.folder(tree), 9, seed=0, size=8)
  for word in (str(broken), 'truncated', '--config.data.on_error=skip'):
    assert word in str(e.value)


def test_broken_image_is_named_by_worker_processes(tree):
  broken = tree / 'train' / 'cat' / '3.png'
  broken.write_text('no image')
  with pytest.raises(ValueError, match='3.png is broken'):
    take(1, sources.folder(tree), 9, seed=0, size=8, workers=1)


def test_broken_image_is_skipped_for_the_next_good_one(tree, caplog):
  options = dict(seed=0, size=8)
  whole = take(3, sources.folder(tree), 6, **options)
  truncate(tree / 'train' / 'cat' / '3.png')
  (tree / 'train' / 'cat' / '4.png').write_bytes(b'')
  source = sources.folder(tree)
  with caplog.at_level('WARNING', logger='absl'):
    mended = take(3, source, 6, on_error='skip', **options)
  assert str(tree / 'train' / 'cat' / '3.png') in caplog.text
  for a, b in zip(whole, mended):
    np.testing.assert_array_equal(b['index'], np.where(np.isin(a['index'], (3, 4)), 5, a['index']))
    np.testing.assert_array_equal(b['label'], [source[i]['label'] for i in b['index']])
  same(mended[1], pipeline.batch_at(source, 1, 6, on_error='skip', **options))


def test_gives_up_where_all_are_broken(tree):
  for path in tree.glob('train/*/*.png'):
    path.write_bytes(b'')
  with pytest.raises(ValueError, match='9 records in a row are broken'):
    take(1, sources.folder(tree), 2, seed=0, size=8, on_error='skip')


def test_image_of_another_shape_is_named(tree):
  source = sources.Source(read=lambda i: (np.zeros((8, 7 + i, 3), np.uint8), 0),
                          name_of=lambda i: f'odd {i}', length=2, shape=(8, 7, 3), classes=0)
  with pytest.raises(ValueError, match='odd 1 is broken'):
    pipeline.batch_at(source, 0, 2, seed=0)


# sources


def test_digits_values_and_splits():
  train, test, whole = (sources.digits(split) for split in ('train', 'test', 'all'))
  assert (len(train), len(test), len(whole)) == (1438, 359, 1797)
  assert train.shape == (8, 8, 1) and train.classes == 10
  first = whole[0]['image']  # the well-known 0 of scikit-learn: rows of 0..16
  levels = np.array([0, 0, 5, 13, 9, 1, 0, 0])
  np.testing.assert_array_equal(first[0, :, 0], np.rint(levels * 255 / 16))
  assert first.dtype == np.uint8 and whole[0]['label'] == 0
  for i in (0, 5, 17):
    same(test[i], whole[5 * i + 4])
  same(train[4], whole[5])
  parts = sorted([r['image'].tobytes() for r in train] + [r['image'].tobytes() for r in test])
  assert parts == sorted(r['image'].tobytes() for r in whole)
  assert test.name_of(3) == 'digits/test record 3'


def test_folder_reads_splits_classes_and_names(tree):
  source = sources.folder(tree)
  assert len(source) == 9 and source.classes == 2 and source.shape == (None, None, 3)
  assert [int(r['label']) for r in source] == [0] * 5 + [1] * 4
  assert [r['image'][0, 0, 0] for r in source] == [0, 10, 20, 30, 40, 100, 110, 120, 130]
  assert source.name_of(6) == str(tree / 'train' / 'dog' / '1.png')
  assert source[0]['image'].shape == (12, 16, 3)
  assert len(sources.folder(tree, split='test')) == 2
  same(pickle.loads(pickle.dumps(source))[6], source[6])


def test_folder_without_split_or_classes(tree):
  assert sources.folder(tree / 'train').classes == 2
  flat = sources.folder(tree / 'train' / 'dog', channels=1)
  assert flat.classes == 0 and len(flat) == 4
  assert flat[1]['image'].shape == (12, 16, 1) and flat[1]['image'].max() == 110
  assert flat[1]['label'] == 0


def test_folder_images_are_brought_to_the_channels_asked_for(tmp_path):
  grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
  Image.fromarray(grey).save(tmp_path / 'a.png')
  Image.fromarray(np.stack([grey] * 3 + [grey], -1)).save(tmp_path / 'b.png')
  Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / 'c.png')
  source = sources.folder(tmp_path)
  for i in range(2):
    np.testing.assert_array_equal(source[i]['image'], np.stack([grey] * 3, -1))
  with pytest.raises(ValueError, match='8 bits'):  # PIL would clip it to white
    source[2]


def test_size_is_asked_for_where_images_differ(tree):
  with pytest.raises(ValueError, match='config.data.size'):
    pipeline.batches(sources.folder(tree), 4, seed=0)


@pytest.mark.parametrize('make, words', [
  (lambda t: sources.digits('trian'), ["'trian'", 'all, test, train', 'mean train?']),
  (lambda t: sources.folder(t / 'no'), ['no', '--config.data.path']),
  (lambda t: sources.folder(t, 'tets'), ["'tets'", 'test, train', 'mean test?']),
  (lambda t: sources.folder(t / 'test', 'val'), ["'val'", 'cat']),
  (lambda t: sources.folder(t, channels=4), ['4', '1, 3']),
  (lambda t: sources.tfds('mnist', data_dir=t / 'no'), ['DIFFAX_DATA', '--config.data.data_dir']),
  (lambda t: sources.tfds('mnist', data_dir=t), ["'mnist'", 'none', 'download_and_prepare']),
])
def test_bad_sources_say_value_what_is_there_and_remedy(tree, make, words):
  with pytest.raises(ValueError) as e:
    make(tree)
  assert all(word in str(e.value) for word in words) and '\n' not in str(e.value)


def test_a_folder_of_other_splits_is_not_taken_for_classes(tree):
  (tree / 'train').rename(tree / 'training')
  with pytest.raises(ValueError, match="'train': there is test, training; did you mean training"):
    sources.folder(tree)


def prepared(dataset, split='train'):
  path = pathlib.Path(os.environ.get('DIFFAX_DATA') or '../shared/data', 'tfds', dataset)
  if not path.exists():
    pytest.skip(f'no {path}: set DIFFAX_DATA to the folder that holds tfds/')
  return sources.tfds(dataset, split=split)


@pytest.mark.parametrize('dataset, count, shape', [
  ('fashion_mnist', 60000, (28, 28, 1)), ('cifar10', 50000, (32, 32, 3))])
def test_tfds_sets(dataset, count, shape):
  source = prepared(dataset)
  assert len(source) == count and source.shape == shape and source.classes == 10
  assert len(prepared(dataset, 'test')) == 10000
  assert source.name_of(17) == f'{dataset}/train record 17'
  record = source[17]
  assert record.keys() == {'image', 'label'}
  assert record['image'].shape == shape and record['image'].dtype == np.uint8
  same(pickle.loads(pickle.dumps(source))[17], record)
  batch = take(1, source, 64, seed=0, size=16)[0]
  assert batch['image'].shape == (64, 16, 16, shape[2])
  assert len(set(batch['label'].tolist())) > 5


def test_tfds_values_are_those_of_the_set():
  source = prepared('fashion_mnist', 'test')
  labels = np.bincount([int(source[i]['label']) for i in range(1000)], minlength=10)
  assert labels.min() > 60  # 100 each are expected
  pixels = np.mean([source[i]['image'].mean() / 255 for i in range(1000)])
  assert abs(pixels - 0.286) < 0.02  # the published mean


def test_tfds_parts_of_a_split():
  part, whole = prepared('cifar10', 'train[10:20]'), prepared('cifar10')
  assert len(part) == 10
  same(part[3], whole[13])


@pytest.mark.parametrize('dataset, split, words', [
  ('cifa10', 'train', ["'cifa10'", 'fashion_mnist', 'mean cifar10?', 'download_and_prepare']),
  ('cifar10:9.9.9', 'train', ["'cifar10:9.9.9'", 'cifar10:3.0.2']),
  ('cifar10', 'tets', ["'tets'", 'test, train', 'mean test?']),
  ('cifar10', 'train[:1x]', ["'train[:1x]'"]),
])
def test_tfds_errors(dataset, split, words):
  prepared('cifar10')
  with pytest.raises(ValueError) as e:
    sources.tfds(dataset, split=split)
  assert all(word in str(e.value) for word in words) and '\n' not in str(e.value)


def test_records_read_at_once_are_those_read_alone():
  source = prepared('cifar10')
  places = [49999, 3, 17, 3]
  for a, i in zip(source.__getitems__(places), places):
    same(a, source[i])


def test_records_read_at_once_are_mended_one_by_one(tree):
  def read_many(places):
    if 4 in places:
      raise OSError('a hole')
    return [(np.full((8, 8, 3), i, np.uint8), i) for i in places]

  source = sources.Source(lambda i: read_many([i])[0], lambda i: f'record {i}', 9, (8, 8, 3), 9,
                          read_many=read_many)
  with pytest.raises(ValueError, match=r'record 4 is broken \(OSError: a hole\)'):
    pipeline.batch_at(source, 0, 9, seed=0)
  batch = pipeline.batch_at(source, 0, 9, seed=0, on_error='skip')
  np.testing.assert_array_equal(np.sort(batch['index']), [0, 1, 2, 3, 5, 5, 6, 7, 8])
  np.testing.assert_array_equal(batch['label'], batch['index'])


# arrays

LATENTS = np.random.default_rng(0).standard_normal((6, 4, 3, 2)).astype(np.float16)


def stored(path, records=LATENTS, file='latents.npy'):
  path.mkdir(parents=True, exist_ok=True)
  np.save(path / file, records)


def test_latents_reach_the_batch_as_they_are_but_mirrored(tmp_path):
  latents = LATENTS
  stored(tmp_path / 'train')
  stored(tmp_path / 'train', np.array([0, 1, 4, 1, 0, 2]), 'labels.npy')
  source = sources.arrays(tmp_path)
  assert (len(source), source.shape, source.classes) == (6, (4, 3, 2), 5)
  assert source.dtype == np.float32 and source[2]['image'].dtype == np.float32
  same(source[2], dict(image=latents[2].astype(np.float32), label=np.int32(4)))
  batch = pipeline.batch_at(source, 0, 6, seed=0)
  np.testing.assert_array_equal(batch['image'], latents[batch['index']])
  assert batch['image'].dtype == np.float32
  flipped = pipeline.batch_at(source, 0, 6, seed=0, flip=True)['image']
  mirrored = [(a == b[:, ::-1]).all() for a, b in zip(flipped, batch['image'])]
  assert 0 < sum(mirrored) < 6
  for a, b, m in zip(flipped, batch['image'], mirrored):
    np.testing.assert_array_equal(a, b[:, ::-1] if m else b)


def test_images_of_an_array_are_scaled_and_resized(tmp_path):
  images = np.random.default_rng(0).integers(256, size=(5, 8, 8, 3), dtype=np.uint8)
  stored(tmp_path, images, file='images.npy')
  source = sources.arrays(tmp_path)  # the folder itself is the split 'train'
  assert source.classes == 0 and source.dtype == np.uint8 and source[3]['label'] == 0
  batch = pipeline.batch_at(source, 0, 5, seed=0)
  np.testing.assert_array_equal(transforms.to_uint8(batch['image']), images[batch['index']])
  assert pipeline.batch_at(source, 0, 5, seed=0, size=4)['image'].shape == (5, 4, 4, 3)


def test_an_array_is_mapped_also_in_worker_processes(tmp_path):
  stored(tmp_path / 'train', np.zeros((64, 32, 32, 4), np.float32))
  stored(tmp_path / 'test', np.ones((9, 32, 32, 4), np.float32))
  source = sources.arrays(tmp_path)
  assert len(pickle.dumps(source)) < 2000  # of a megabyte: not the map's contents
  same(pickle.loads(pickle.dumps(source))[63], source[63])
  same(take(1, source, 8, seed=0, workers=1)[0], pipeline.batch_at(source, 0, 8, seed=0))
  assert sources.arrays(tmp_path, 'test')[8]['image'].min() == 1


def test_an_array_written_anew_is_opened_anew(tmp_path):
  stored(tmp_path, np.zeros((6, 4, 3, 2), np.float32))
  assert sources.arrays(tmp_path)[0]['image'].max() == 0
  os.utime(tmp_path / 'latents.npy', ns=(1, 1))  # as if long ago
  assert sources.arrays(tmp_path)[0]['image'].max() == 0
  (tmp_path / 'latents.npy').unlink()
  stored(tmp_path, np.ones((7, 4, 3, 2), np.float32))
  assert len(sources.arrays(tmp_path)) == 7 and sources.arrays(tmp_path)[6]['image'].min() == 1


def test_floats_are_not_resized(tmp_path):
  stored(tmp_path)
  with pytest.raises(ValueError, match='size=2 scales pictures.*float32.*config.data.size'):
    pipeline.batches(sources.arrays(tmp_path), 2, seed=0, size=2)
  with pytest.raises(ValueError, match='uint8 images, not float32'):
    transforms.resize(np.zeros((4, 4, 1), np.float32), 4)


def test_a_record_of_another_dtype_is_named():
  source = sources.Source(read=lambda i: (np.zeros((8, 8, 3), np.float32), 0),
                          name_of=lambda i: f'odd {i}', length=1, shape=(8, 8, 3), classes=0)
  with pytest.raises(ValueError, match='odd 0 is broken.*float32 where the source says uint8'):
    pipeline.batch_at(source, 0, 1, seed=0)


@pytest.mark.parametrize('files, words', [
  ({'other.npy': np.zeros(3)}, ['holds no array', 'images.npy or latents.npy']),
  ({'latents.npy': np.zeros(3), 'images.npy': np.zeros(3)}, ['images.npy and latents.npy']),
  ({'latents.npy': np.zeros((3, 4), np.float32)}, ['float32 [3, 4]', '[n h w c]']),
  ({'latents.npy': np.zeros((3, 4, 4, 1))}, ['float64', 'float16 or float32']),
  ({'images.npy': np.zeros((3, 4, 4, 1), np.float32)}, ['is float32', 'must be uint8']),
  ({'latents.npy': LATENTS, 'labels.npy': np.zeros(5, int)}, ['labels.npy', '[5]', '[6]']),
  ({'latents.npy': LATENTS, 'labels.npy': np.zeros(6)}, ['labels.npy', 'float64', 'integers']),
  ({'latents.npy': LATENTS, 'labels.npy': np.arange(6) - 1}, ['label -1', 'from 0']),
  ({'latents.npy': np.array([{}] * 3)}, ['no readable array', 'np.save']),  # it would be unpickled
])
def test_bad_arrays_say_value_and_remedy(tmp_path, files, words):
  for name, array in files.items():
    np.save(tmp_path / name, array)
  with pytest.raises(ValueError) as e:
    sources.arrays(tmp_path)
  assert all(word in str(e.value) for word in words) and '\n' not in str(e.value), str(e.value)


def test_an_array_that_is_none_or_not_there(tmp_path):
  with pytest.raises(ValueError, match='no folder .*--config.data.path'):
    sources.arrays(tmp_path / 'no')
  (tmp_path / 'latents.npy').write_bytes(b'no array')
  with pytest.raises(ValueError, match='no readable array'):
    sources.arrays(tmp_path)


def test_a_missing_split_of_arrays_lists_those_there(tmp_path):
  stored(tmp_path / 'test')
  with pytest.raises(ValueError, match="'tets': there is test; did you mean test"):
    sources.arrays(tmp_path, 'tets')


# transforms


def test_float_round_trip_of_all_values():
  values = np.arange(256, dtype=np.uint8)
  floats = transforms.to_float(values)
  assert floats.dtype == np.float32 and floats[0] == -1 and floats[255] == 1
  np.testing.assert_array_equal(transforms.to_uint8(floats), values)


def test_to_uint8_rounds_clips_and_refuses_nan():
  np.testing.assert_array_equal(
    transforms.to_uint8(np.array([-9, -1, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1, 9, np.inf])),
    [0, 0, 0, 1, 255, 255, 255])
  with pytest.raises(ValueError, match='1 of 2'):
    transforms.to_uint8(np.array([0, np.nan]))


def test_to_float_refuses_floats():
  with pytest.raises(ValueError, match='float32'):
    transforms.to_float(np.zeros(3, np.float32))


@pytest.mark.parametrize('shape', [(100, 75, 3), (20, 33, 1), (7, 7, 3)])
def test_resize_keeps_a_constant(shape):
  out = transforms.resize(np.full(shape, 37, np.uint8), 24)
  np.testing.assert_array_equal(out, np.full((24, 24, shape[2]), 37, np.uint8))


def test_resize_of_a_ramp_is_a_ramp():
  for side, step in ((128, 4), (96, 3)):  # by boxes alone; by a box and the cubic
    ramp = np.broadcast_to(np.arange(side, dtype=np.uint8)[:, None, None] * 2, (side, 160, 3))
    out = transforms.resize(np.ascontiguousarray(ramp), 32)[4:-4].astype(float)
    centres = step * (np.arange(4, 28) + 0.5) - 0.5  # of the new pixels, in old ones
    np.testing.assert_allclose(out, np.broadcast_to(2 * centres[:, None, None], out.shape), atol=1)


def test_resize_removes_what_the_grid_cannot_hold():
  stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))[:, :, None]
  assert abs(transforms.resize(stripes, 16).astype(float) - 127.5).max() <= 1


def test_resize_cuts_the_centre():
  image = np.zeros((24, 72, 3), np.uint8)
  image[:, 24:48] = 255
  assert (transforms.resize(image, 24) == 255).all()
  assert (transforms.resize(np.ascontiguousarray(image.transpose(1, 0, 2)), 24) == 255).all()


def test_flip_by_numbers():
  images = np.arange(12).reshape(2, 1, 3, 2)
  out = transforms.flip(images, np.array([0.9, 0.1]))
  np.testing.assert_array_equal(out[0], images[0])
  np.testing.assert_array_equal(out[1], [[[10, 11], [8, 9], [6, 7]]])
