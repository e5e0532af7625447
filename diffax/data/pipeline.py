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

and what `tokenize` makes of the captions, where there is one

grain supplies random access, threads and processes, over whole batches. The order is our own:
grain (0.2.18) shuffles record by record, at 25 microseconds each, and its four-round cipher leaves
neighbours correlated (0.09 over 60000 records), which would show in a folder sorted by class.
"""

import collections
import functools
import hashlib
import operator
import sys

from absl import logging
import numpy as np

from diffax.data import transforms

TRIES = 100  # records in a row that may be broken before `on_error='skip'` gives up


def order(length, seed, p):
  """Which record is example p of the run: every `length` examples meet each record once.

  Args:
    length: number of records. One permutation, 8 bytes a record, is held for the epoch; a million
      records take about 0.2 s to shuffle.
    seed: any integer.
    p: int [b], places in the endless order.

  Returns:
    int64 [b] in 0 .. length - 1.
  """
  epochs, places = np.divmod(p, length)
  records = np.empty_like(places)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    records[here] = _permutation(length, seed, int(epoch))[places[here]]
  return records


@functools.lru_cache(maxsize=4)  # a batch may cross epochs, and evaluations read too
def _permutation(length, seed, epoch):
  # sorted raw bits: numpy promises these for all versions, but not those of Generator.permutation
  bits = np.random.Philox(key=_seed_of(seed, f'order {epoch}')).random_raw(length)
  return np.argsort(bits, kind='stable')


def steps(source, batch_size, *, seed, size=None, flip=False, on_error='raise', rows=None,
          tokenize=None):
  """Every step's batch by random access: `steps(...)[k]` is what is wanted of step k.

  Args:
    source: see `diffax.data.sources`.
    batch_size: examples a step, over all hosts.
    seed: of the order and of the flips, any integer.
    size: side to which images are scaled and cropped; None leaves them as they are.
    flip: mirror each example with probability one half.
    on_error: 'raise', or 'skip' to take the next good record in place of a broken one.
    rows: int [b], which of a step's examples 0 .. batch_size - 1 are made, all where None; a host
      makes those that its devices hold, see `diffax.sharding.rows`.
    tokenize: [str, ...] -> {name: [b ...]} of the records' captions; pickles.

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
    if source.dtype != np.uint8:
      raise ValueError(f'size={size} scales pictures; records of {source.dtype} are taken as they '
                       'are: leave out config.data.size, and store them at the size to train at')
  elif None in source.shape:
    raise ValueError('the images of this source have no one size: '
                     'give size (--config.data.size=64)')
  if not len(source):
    raise ValueError('the source has no records')
  reader = functools.partial(read, source, size, on_error)
  fetch = functools.partial(_fetch, reader, source, batch_size, rows, seed, flip, tokenize)
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
  import grain
  _check_integers(start_step=(start_step, 0), workers=(workers, 0))
  ds = steps(source, batch_size, seed=seed, **options)[start_step:]
  if not workers:
    # grain would by default hold 500 elements, which are batches here
    return iter(ds.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
  from absl import flags
  if not flags.FLAGS.is_parsed():  # a notebook or a test: grain's processes read absl flags
    flags.FLAGS.mark_as_parsed()
  ds = ds.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  return iter(ds.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)))


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


def _fetch(read, source, batch_size, rows, seed, flip, tokenize, k):
  """The given rows [b] of the batch of step k."""
  p = k * batch_size + rows
  index, images, labels = zip(*read(order(len(source), seed, p).tolist()))
  images = np.stack(images)  # [b h w c]
  if flip:
    images = transforms.flip(images, _uniform(seed, 'flip', p))
  if source.dtype == np.uint8:
    images = transforms.to_float(images)
  batch = dict(image=images, label=np.asarray(labels, np.int32), index=np.asarray(index, np.int32))
  return batch | tokenize([source.captions[i] for i in index]) if tokenize else batch


def read(source, size, on_error, records):
  """[(index, image, label), ...] of records, at `size` if it is not None; see `steps`.

  A broken one is an error or another record is taken in its place, as `on_error` says.
  """
  try:  # at once where the source can
    found = source.__getitems__(records)
    return [(i, *_image_and_label(source, record, size)) for i, record in zip(records, found)]
  except Exception:  # also where it cannot: then one by one, to know which is broken
    return [_read_one(source, size, on_error, i) for i in records]


def _read_one(source, size, on_error, record):
  """(index, image, label) of a record, or of the next good one where that is asked for."""
  tries = min(TRIES, len(source)) if on_error == 'skip' else 1
  for i in range(record, record + tries):
    i %= len(source)
    try:
      return i, *_image_and_label(source, source[i], size)
    except Exception as e:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
      broken = f'{source.name_of(i)} is broken ({type(e).__name__}: {" ".join(str(e).split())})'
      if on_error == 'raise':
        raise ValueError(f'{broken}: mend or remove it, or pass over broken records with '
                         '--config.data.on_error=skip') from e
      logging.warning('skipped: %s', broken)
  raise ValueError(f'{tries} records in a row are broken, the last: {broken}')


def _image_and_label(source, record, size):
  image = record['image']
  if size is not None:
    image = transforms.resize(image, size)
    expected = (size, size, source.shape[2])
  else:
    expected = tuple(source.shape)
  if image.shape != expected:  # np.stack would complain without saying which
    raise ValueError(f'shape {image.shape} where {expected} is expected')
  if image.dtype != source.dtype:  # it decides whether they are scaled
    raise ValueError(f'dtype {image.dtype} where the source says {source.dtype}')
  return image, record['label']


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
