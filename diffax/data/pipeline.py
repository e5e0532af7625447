"""From a source to batches: one endless shuffled order, of which the step is the whole state.

  order      records shuffled anew every epoch: example p of the run is record order(n, seed, p)
  step k     examples k B .. (k + 1) B - 1, across the ends of epochs, none dropped
  host       those rows of a step that its devices hold

Rows are chosen last, so any number of hosts sees the same global batches. Every random
choice is drawn from (seed, name of the operation, p): adding an operation, worker processes, or
restarting at a step changes nothing else. A batch is

  image  float32 [b h w c], in [-1, 1] where the source has pictures (uint8), else as it gives them
  label  int32 [b]
  index  int32 [b], the record's number in the source; `source.name_of` names it

and what `tokenize` makes of the captions, or what `carry` names of the records. Images of several
sizes may be trained at several shapes, `buckets`, a shape a batch, see `turn`; the batch then has

  size   int32 [b 6], height and width of the record, top and left of what was cut out of it once it
         was scaled, height and width of that (Podell et al. 2023, "SDXL", sec. 2.2)

grain supplies random access, threads and processes, over whole batches. The order is our own:
grain (0.2.18) shuffles record by record, at 25 microseconds each, and its four-round cipher leaves
neighbours correlated (0.09 over 60000 records), which would show in a folder sorted by class.
"""

import bisect
import collections
import functools
import hashlib
import operator
import signal
import sys
from typing import NamedTuple

from absl import logging
import numpy as np

from diffax.data import transforms

TRIES = 100  # records in a row that may be broken before `on_error='skip'` gives up


def order(length, seed, p, name='order'):
  """Which record is example p of the run: every `length` examples meet each record once.

  Args:
    length: number of records. One permutation, 8 bytes a record, is held for the epoch; a million
      records take about 0.2 s to shuffle.
    seed: any integer.
    p: int [b], places in the endless order.
    name: of the order; those of different names are unrelated.

  Returns:
    int64 [b] in 0 .. length - 1.
  """
  epochs, places = np.divmod(p, length)
  records = np.empty_like(places)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    permutation = _permutation if name == 'order' else _of_bucket
    records[here] = permutation(length, seed, int(epoch), name)[places[here]]
  return records


def _shuffled(length, seed, epoch, name):
  # sorted raw bits: numpy promises these for all versions, but not those of Generator.permutation
  bits = np.random.Philox(key=_seed_of(seed, f'{name} {epoch}')).random_raw(length)
  return np.argsort(bits, kind='stable')


# A batch may cross epochs, and evaluations read too; of buckets each has its own.
_permutation = functools.lru_cache(maxsize=4)(_shuffled)
_of_bucket = functools.lru_cache(maxsize=128)(_shuffled)


# --- buckets --------------------------------------------------------------------------------------


class Buckets(NamedTuple):
  """shapes: ((h, w), ...). members: of each the records, int [n], rising; none is empty."""

  shapes: tuple
  members: tuple


def buckets(source, shapes, on_error='raise'):
  """The `Buckets` of a source: each record is in that of the nearest logarithm of the aspect ratio.

  Looks at the header of each image file, once. The way of NovelAI's "aspect ratio bucketing" and of
  Podell et al. 2023, app. I. Buckets without a record are left out. on_error: 'skip' lets images
  without a readable header pass, for the readers to skip. Raises ValueError where shapes are no
  pairs of sides, two have one ratio, or the sizes of the images cannot be known.
  """
  if any(not isinstance(shape, (tuple, list)) or len(shape) != 2 for shape in shapes):
    raise ValueError(f'buckets={shapes} are no pairs (height, width), as ((64, 64), (80, 48))')
  for side in (side for shape in shapes for side in shape):
    _check_integers(**{'a side of buckets': (side, 1)})
  ratio = np.log([h / w for h, w in shapes])
  if len(set(ratio.tolist())) < len(shapes):
    raise ValueError(f'buckets={shapes}: two have one ratio of sides, and one would stay empty')
  sizes = _sizes(source)
  broken = np.flatnonzero(sizes.min(axis=1) < 1)
  if len(broken) and on_error == 'raise':
    raise ValueError(f'{source.name_of(int(broken[0]))} is no readable image: mend or remove it, '
                     'or pass over broken records with --config.data.on_error=skip')
  h, w = np.maximum(sizes, 1).T
  rising = np.argsort(ratio)
  between = (ratio[rising][1:] + ratio[rising][:-1]) / 2
  nearest = rising[np.searchsorted(between, np.log(h / w))]
  held = [j for j in range(len(shapes)) if (nearest == j).any()]
  return Buckets(tuple(tuple(shapes[j]) for j in held),
                 tuple(np.flatnonzero(nearest == j) for j in held))


def _sizes(source):
  """int [n 2], height and width of each record; 0 where it cannot be read."""
  if None not in source.shape:
    return np.tile(source.shape[:2], (len(source), 1))
  if getattr(source, 'sizes', None) is None:
    raise ValueError('buckets: the sizes of the images of this source are not known before they '
                     'are read: take image files (folder, captioned), or give size alone')
  return np.asarray(source.sizes())


def turn(counts, batch_size, seed, k):
  """(bucket, number): step k has batch `number`, from 0, of that bucket's own endless order.

  counts: how many records each bucket has. Of n records in batches of B a bucket has had
  floor(e n / B) batches by the end of e epochs: what fills no batch is carried to the next epoch,
  nothing is dropped, and after B epochs each record was seen B times. An epoch's batches are in
  shuffled order. A bucket of fewer than B records has its turn in some epochs only, and then
  records more than once in a batch.
  """
  done = lambda epoch: [epoch * n // batch_size for n in counts]
  last = (k + len(counts)) * batch_size // sum(counts) + 1  # the sum of done is within a batch each
  epoch = bisect.bisect_right(range(last + 1), k, key=lambda e: sum(done(e))) - 1
  before, after = done(epoch), done(epoch + 1)
  place = k - sum(before)
  turns = _turns(tuple(b - a for a, b in zip(before, after)), seed, epoch)
  bucket = int(turns[place])
  return bucket, before[bucket] + int((turns[:place] == bucket).sum())


@functools.lru_cache(maxsize=4)
def _turns(counts, seed, epoch):
  """The bucket of each batch of an epoch, which has `counts` of each."""
  turns = np.repeat(np.arange(len(counts)), counts)
  return turns[_shuffled(len(turns), seed, epoch, 'turns')]


# --- batches --------------------------------------------------------------------------------------


def steps(source, batch_size, *, seed, size=None, flip=False, on_error='raise', rows=None,
          tokenize=None, carry=(), shapes=()):
  """Every step's batch by random access: `steps(...)[k]` is what is wanted of step k.

  Args:
    source: see `diffax.data.sources`.
    batch_size: examples a step, over all hosts.
    seed: of the order and of the flips, any integer.
    size: side to which images are scaled and cropped; None leaves them as they are.
    flip: mirror each example with probability one half; of records with `mirrored`, take that.
    on_error: 'raise', or 'skip' to take the next good record in place of a broken one.
    rows: int [b], which of a step's examples 0 .. batch_size - 1 are made, all where None; a host
      makes those that its devices hold, see `diffax.sharding.rows`.
    tokenize: [str, ...] -> {name: [b ...]} of the records' captions; pickles.
    carry: names of what else is taken of the records.
    shapes: ((h, w), ...) of `buckets`, to one of which each batch is scaled and cropped, in place
      of `size`; () for none.

  Returns:
    A grain MapDataset of batches.

  Raises:
    ValueError: an argument is out of range; on access, a record is broken.
  """
  import grain
  _check_integers(seed=(seed, None), batch_size=(batch_size, 1))
  rows = np.arange(batch_size) if rows is None else np.asarray(rows)
  if not len(rows) or rows.min() < 0 or rows.max() >= batch_size:
    raise ValueError(f'rows {rows.tolist()} of a batch of {batch_size}: give one or more of 0 to '
                     f'{batch_size - 1}')
  if on_error not in ('raise', 'skip'):
    raise ValueError(f"on_error is 'raise' or 'skip', not {on_error!r}")
  if size is not None:
    _check_integers(size=(size, 1))
  if size is not None or shapes:
    if source.dtype != np.uint8:
      said = f'buckets={shapes}' if shapes else f'size={size}'
      raise ValueError(f'{said} scales pictures; records of {source.dtype} are taken as they are: '
                       f'leave out config.data.{said.split("=")[0]}, and store them at the size to '
                       'train at')
  elif None in source.shape:
    raise ValueError('the images of this source have no one size: '
                     'give size (--config.data.size=64)')
  if flip and getattr(source, 'mirrored', None) is False:
    raise ValueError('flip: this set holds no mirrored latents, and latents mirrored are not those '
                     'of mirrored pictures: encode it with --config.data.flip, or leave flip out')
  if not len(source):
    raise ValueError('the source has no records')
  pick = functools.partial(_pick, len(source), size)
  if shapes:
    pick = functools.partial(_pick_of_bucket, buckets(source, shapes, on_error))
  pick = functools.partial(pick, batch_size, seed, rows)
  coins = functools.partial(_coins, batch_size, seed, rows) if flip else None
  fetch = functools.partial(_fetch, pick, source, on_error, coins, tokenize, tuple(carry))
  return grain.MapDataset.range(sys.maxsize).map(fetch)


def batches(source, batch_size, *, seed, start_step=0, workers=0, **options):
  """Iterates over the batches of steps start_step, start_step + 1, ... without end.

  Starting late costs nothing. The next batches are made ahead, by a thread or by processes.

  Args:
    workers: processes that decode. They import the main script anew, which must therefore
      start from under `if __name__ == '__main__'`. `close()` of the iterator ends them.
    **options: and source, batch_size, seed: see `steps`.

  Returns:
    A grain DatasetIterator of dict(image, label, index).
  """
  _check_integers(start_step=(start_step, 0), workers=(workers, 0))
  return _iterator(steps(source, batch_size, seed=seed, **options)[start_step:], workers)


def ordered(source, records, *, size=None, on_error='raise', tokenize=None, workers=0):
  """Iterates once over the batches whose records are the rows of `records`, int [k b]; `batches`.
  """
  import grain
  pick = functools.partial(_pick_of_list, records, size)
  fetch = functools.partial(_fetch, pick, source, on_error, None, tokenize, ())
  return _iterator(grain.MapDataset.range(len(records)).map(fetch), workers)


def _iterator(ds, workers):
  """Of a grain MapDataset, made ahead by a thread or by processes."""
  import grain
  if not workers:
    # grain would by default hold 500 elements, which are batches here
    return iter(ds.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
  from absl import flags
  if not flags.FLAGS.is_parsed():  # a notebook or a test: grain's processes read absl flags
    flags.FLAGS.mark_as_parsed()
  ds = ds.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)
  return iter(ds.mp_prefetch(options, worker_init_fn=_deaf))


def _deaf(worker, workers):
  """Clusters and terminals tell a whole group of processes to stop: the main one then saves, and
  needs data until all hosts have agreed on a step.
  """
  del worker, workers
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)


def batch_at(source, step, batch_size, *, seed, **options):
  """The batch of one step, equal to what `batches` gives there: for replaying a training step."""
  _check_integers(step=(step, 0))
  return steps(source, batch_size, seed=seed, **options)[step]


def prefetch(iterator, place, size=2):
  """Yields `place(batch)` of each batch with `size` more already on their way to the devices.

  place: host arrays -> device arrays, at once; see `diffax.sharding.put`. No thread of its own:
  `batches` makes host batches in the background and transfers are asynchronous, so only dispatching
  is left. An error in batch k is raised at step k, after the batches before it. Closing the
  generator closes the iterator.
  """
  queue, error = collections.deque(), None
  try:
    while True:
      while error is None and len(queue) <= size:
        try:
          queue.append(place(next(iterator)))
        except Exception as e:  # StopIteration too
          error = e
      if not queue:
        break
      yield queue.popleft()
    if not isinstance(error, StopIteration):
      raise error
  finally:
    getattr(iterator, 'close', lambda: None)()


def _pick(length, size, batch_size, seed, rows, k):
  """(records int [b], size) of the given rows of step k."""
  return order(length, seed, k * batch_size + rows), size


def _pick_of_bucket(plan, batch_size, seed, rows, k):
  """The same of the bucket whose turn it is, with its shape."""
  counts = [len(members) for members in plan.members]
  j, number = turn(counts, batch_size, seed, k)
  p = number * batch_size + rows
  return plan.members[j][order(counts[j], seed, p, f'bucket {plan.shapes[j]}')], plan.shapes[j]


def _pick_of_list(records, size, k):
  """The same where they are listed."""
  return records[k], size


def _coins(batch_size, seed, rows, k):
  """[b], uniform in [0, 1): whether each of the given rows is mirrored."""
  return _uniform(seed, 'flip', k * batch_size + rows)


def _fetch(pick, source, on_error, coins, tokenize, carry, k):
  """The rows [b] that `pick` says of the batch of step k."""
  records, size = pick(k)
  index, images, labels, cuts, more = zip(*read(source, size, on_error, records.tolist()))
  images = np.stack(images)  # [b h w c]
  if coins and getattr(source, 'mirrored', None):
    other = np.stack([one['mirrored'] for one in more])
    images = np.where((coins(k) < 0.5)[:, None, None, None], other.astype(images.dtype), images)
  elif coins:
    images = transforms.flip(images, coins(k))
  if source.dtype == np.uint8:
    images = transforms.to_float(images)
  batch = dict(image=images, label=np.asarray(labels, np.int32), index=np.asarray(index, np.int32))
  if isinstance(size, tuple):
    batch['size'] = np.asarray(cuts, np.int32)
  batch |= {name: np.stack([one[name] for one in more]) for name in carry}
  return batch | tokenize([source.captions[i] for i in index]) if tokenize else batch


def read(source, size, on_error, records):
  """[(index, image, label, cut, more), ...] of records, at `size` if it is not None; see `steps`.

  size: a side, or (height, width). cut: the six numbers of `size` in a batch. more: {name: array},
  what else a record holds. A broken one is an error or another record is taken in its place, as
  `on_error` says.
  """
  try:  # at once where the source can
    found = source.__getitems__(records)
    return [(i, *_taken(source, record, size)) for i, record in zip(records, found)]
  except Exception:  # also where it cannot: then one by one, to know which is broken
    return [_read_one(source, size, on_error, i) for i in records]


def _read_one(source, size, on_error, record):
  """(index, image, label, cut, more) of a record, or of the next good one where so asked."""
  tries = min(TRIES, len(source)) if on_error == 'skip' else 1
  for i in range(record, record + tries):
    i %= len(source)
    try:
      return i, *_taken(source, source[i], size)
    except Exception as e:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
      broken = f'{source.name_of(i)} is broken ({type(e).__name__}: {" ".join(str(e).split())})'
      if on_error == 'raise':
        raise ValueError(f'{broken}: mend or remove it, or pass over broken records with '
                         '--config.data.on_error=skip') from e
      logging.warning('skipped: %s', broken)
  raise ValueError(f'{tries} records in a row are broken, the last: {broken}')


def _taken(source, record, size):
  """(image, label, cut, more) of a record; see `read`."""
  image, top, left = record['image'], 0, 0
  expected, (h, w, _) = tuple(source.shape), image.shape
  if size is not None:
    sides = size if isinstance(size, tuple) else (size, size)
    image, top, left = transforms.cover(image, *sides)
    expected = (*sides, source.shape[2])
  if image.shape != expected:  # np.stack would complain without saying which
    raise ValueError(f'shape {image.shape} where {expected} is expected')
  if image.dtype != source.dtype:  # it decides whether they are scaled
    raise ValueError(f'dtype {image.dtype} where the source says {source.dtype}')
  more = {name: x for name, x in record.items() if name not in ('image', 'label')}
  return image, record['label'], (h, w, top, left, *image.shape[:2]), more


def _uniform(seed, name, p):
  """float64 [b] in [0, 1) for the examples p, each from its own counter."""
  first, count = int(p.min()), int(np.ptp(p)) + 1
  bits = np.random.Philox(key=_seed_of(seed, name), counter=first).random_raw(4 * count)
  drawn = (bits[::4] >> np.uint64(11)) * 2.0**-53  # a counter gives four words; the first is used
  return drawn[p - first]


def _seed_of(seed, name):
  """A 32-bit seed for one operation: unrelated between names and between seeds."""
  return int.from_bytes(hashlib.sha256(f'{seed} {name}'.encode()).digest()[:4], 'little')


def _check_integers(**values):
  for name, (value, least) in values.items():
    try:
      ok = not isinstance(value, bool) and (least is None or operator.index(value) >= least)
      operator.index(value)
    except TypeError:
      ok = False
    if not ok:
      kind = 'an integer' if least is None else f'an integer of at least {least}'
      raise ValueError(f'{name} must be {kind}, not {value!r}')
