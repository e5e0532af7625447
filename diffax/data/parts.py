"""The files of a latent data set: records of one layout in parts, each whole or not there.

  part-00003-of-00157.array_record   records 3 n .. 4 n - 1 in order, and one that tells of them
  captions.json                      a caption of each record, where there are any
  null.npz                           the empty prompt's embedding, where texts are embedded
  plan.json                          what is made of what, written first
  info.json                          that and all that is known at the end: it is there, the set too

A record is the bytes of a numpy structure: its number, its label, and arrays of one shape each.
array_record keeps a checksum beside each. Nothing is pickled.
"""

import functools
import hashlib
import io
import json
import os

import numpy as np

INFO, PLAN, CAPTIONS, NULL = 'info.json', 'plan.json', 'captions.json', 'null.npz'
FORMAT = 1  # raised with the layout of the files
ROW = (('index', '<i8', ()), ('label', '<i4', ()))  # of every record, before its arrays
WRITING = 'group_size:1,uncompressed'  # read by random access; floats hardly compress
READING = 'readahead_buffer_size:0,max_parallelism:0'
OPEN = 512  # parts that a process holds open


def layout(fields):
  """The numpy structure of a record. fields: ((name, dtype, shape), ...) of its arrays."""
  return np.dtype([(name, dtype, tuple(shape)) for name, dtype, shape in (*ROW, *fields)])


def name(k, count):
  """The file of part k of `count`."""
  return f'part-{k:05d}-of-{count:05d}.array_record'


def count(plan):
  """How many parts a set has."""
  return -(-plan['count'] // plan['part'])


def span(plan, k):
  """(first, last + 1) of the records of part k."""
  return k * plan['part'], min((k + 1) * plan['part'], plan['count'])


def identity(plan):
  """What the parts of a set are known by."""
  return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


# --- writing --------------------------------------------------------------------------------------


def write(path, records, tell, mark):
  """Writes a part, whole or not at all: bytes of `records`, then what `tell()` says, as JSON.

  mark: of this writer, for the name of the file until it is whole.
  """
  from array_record.python import array_record_module

  scratch = f'{path}.{mark}.new'
  writer = array_record_module.ArrayRecordWriter(scratch, WRITING)
  for record in records:
    writer.write(record)
  writer.write(json.dumps(tell(), ensure_ascii=False, sort_keys=True).encode())
  writer.close()
  os.replace(scratch, path)


def packed(arrays):
  """npz bytes of {name: array}, the same each time."""
  data = io.BytesIO()
  np.savez(data, **arrays)
  return data.getvalue()


# --- reading --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=OPEN)
def _opened(path, stamp):
  del stamp
  from array_record.python import array_record_module

  return array_record_module.ArrayRecordReader(path, READING)


def read(path, places):
  """[bytes, ...] of the records at these places of a part; raises where they are damaged."""
  return _opened(path, os.stat(path).st_mtime_ns).read([int(place) for place in places])


def told(path):
  """What the last record of a part says, a dict. Raises ValueError where it is not whole."""
  try:
    there = _opened(path, os.stat(path).st_mtime_ns).num_records()
    said = json.loads(read(path, [there - 1])[0])
    if not isinstance(said, dict):
      raise ValueError('its last record is no JSON object')
    return said
  except Exception as error:  # of many kinds
    raise ValueError(f'{path} is no whole part ({" ".join(str(error).split())})') from error


def rows(folder, plan, dtype, indices):
  """[numpy structure, ...] of records by number, each part read once.

  Raises ValueError that names the file where one is missing, damaged or of another set.
  """
  indices, found = np.asarray(indices, np.int64), {}
  for k in np.unique(indices // plan['part']):
    path = os.path.join(folder, name(k, count(plan)))
    mine = np.unique(indices[indices // plan['part'] == k])
    try:
      held = read(path, mine - k * plan['part'])
    except Exception as error:  # of many kinds
      raise ValueError(f'{path} is damaged ({" ".join(str(error).split())}): {REMEDY}') from error
    for i, data in zip(mine.tolist(), held):
      row = np.frombuffer(data, dtype)[0] if len(data) == dtype.itemsize else None
      if row is None or row['index'] != i:
        raise ValueError(f'{path} does not hold record {i} where it should be: {REMEDY}')
      found[i] = row
  return [found[i] for i in indices.tolist()]


REMEDY = 'remove it and give the command of --mode encode again, which makes what is missing'


def info(folder):
  """What info.json says, the files it names being there. Raises ValueError, a line."""
  file = os.path.join(folder, INFO)
  if not os.path.exists(file):
    begun = os.path.exists(os.path.join(folder, PLAN))
    raise ValueError(
      f'{folder} is {"not finished: give the command of --mode encode again" if begun else "none"}'
      f' of the latent data sets that --mode encode makes: it has no {INFO}'
    )
  said = _json(file)
  if said.get('format') != FORMAT:
    raise ValueError(f'{file} is of format {said.get("format")}, and this diffax reads {FORMAT}')
  sizes = said['parts']
  if len(sizes) != count(said):
    raise ValueError(f'{file} names {len(sizes)} parts for {said["count"]} records, which are in '
                     f'{count(said)}: it was changed')
  there = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
  for k, size in enumerate(sizes):
    part = name(k, count(said))
    if part not in there:
      raise ValueError(f'{os.path.join(folder, part)} is missing, of {len(sizes)} parts: '
                       'give the command of --mode encode again, which makes it')
    if there[part] != size:
      raise ValueError(f'{os.path.join(folder, part)} has {there[part]} bytes and was written with '
                       f'{size}: {REMEDY}')
  return said


def whole(folder, said, file):
  """The bytes of a file whose hash info.json says. Raises ValueError."""
  path = os.path.join(folder, file)
  try:
    with open(path, 'rb') as opened:
      data = opened.read()
  except OSError as error:
    raise ValueError(f'{path} cannot be read ({error.strerror}): {REMEDY}') from error
  if hashlib.sha256(data).hexdigest() != said['files'][file]:
    raise ValueError(f'{path} is not what was written: {REMEDY}')
  return data


def null(folder, said):
  """{name: [1 ...]}, the embedding of the empty prompt. Raises ValueError."""
  with np.load(io.BytesIO(whole(folder, said, NULL)), allow_pickle=False) as held:
    return dict(held)


def _json(file):
  try:
    with open(file, encoding='utf-8') as opened:
      said = json.load(opened)
    if not isinstance(said, dict):
      raise ValueError('no object')
    return said
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f'{file} is no readable JSON ({" ".join(str(error).split())})') from error
