"""Latent data sets: each record of a source through frozen encoders, once, into files.

  python -m diffax.main --config configs/x.py --mode encode --workdir DIR

The config's `data`, `latent` and, where it is frozen, `text` say what is encoded with what, and
`encode` how; `data.flip` stores the latents of mirrored pictures too. `sources.latents` reads DIR,
whose files `data.parts` tells of.

The work is dealt out in parts, and no host waits for another until all are done: each encodes parts
of its own on its own devices, and a part is written whole or not at all. The command that is given
again, on any number of hosts, makes what is missing. Devices see the same groups of records in one
compiled program however many they are, so that the bytes are the same.
"""

import collections
import hashlib
import json
import os
import time
from typing import Any, NamedTuple
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffax import features
from diffax import hosts
from diffax import latents
from diffax import references
from diffax import sharding
from diffax.build import build, ConfigError
from diffax.data import parts
from diffax.data import pipeline

DTYPES = ('float16', 'float32')
PACKAGES = ('diffax', 'jax', 'numpy', 'array_record')  # whose versions a set tells
AHEAD = 2  # batches that the host may run ahead of the devices


class Work(NamedTuple):
  """What a config's encoding comes to. plan: what the set is known by, plain data.

  encode: (frozen, pictures [b h w c], tokens) -> {name: [b ...]} of a record; say: (frozen, tokens)
  -> those of the texts alone. tokenize: None without texts. like: the frozen parameters, laid out.
  load: () -> them.
  """

  config: dict
  source: Any
  mesh: Any
  plan: dict
  encode: Callable
  say: Callable
  tokenize: Callable | None
  like: dict
  load: Callable

  def layout(self):
    """A context: encoders lay themselves out on the devices of this host."""
    return sharding.using(self.mesh, self.config['attention'])


def encode(config, folder, show=hosts.say):
  """Makes, or goes on with, the latent data set of a config in `folder`; see above.

  Raises ConfigError for what cannot be encoded, for a folder that holds something else, and for a
  record that is broken.
  """
  folder = os.fspath(folder)
  work = setup(config)
  _begin(folder, work.plan)
  missing = hosts.tell(_missing(folder, work.plan, show) if hosts.first() else None)
  count = parts.count(work.plan)
  if not missing and hosts.tell(_finished(folder)):
    show(f'{folder} is finished: {work.plan["count"]} records in {count} parts')
    return
  show(f'{len(missing)} of {count} parts are to be made, by {hosts.count()} hosts')
  frozen = work.load()
  if hosts.first() and work.tokenize:
    _write(folder, parts.NULL, parts.packed(_null(work, frozen)))
  watch = hosts.Watch(config['watchdog'])
  watch.at(0, 'compiling', patient=True)
  _make(work, frozen, folder, missing[jax.process_index() :: hosts.count()], watch, show)
  watch.at(parts.count(work.plan) * work.plan['part'], 'waiting for the others')
  hosts.wait()
  watch.close()
  if hosts.first():
    _finish(folder, work, show)
  hosts.wait()


# --- what is to be done ---------------------------------------------------------------------------


def setup(config) -> Work:
  """Builds and checks what a config's encoding needs; allocates nothing. Raises ConfigError."""
  data, how = config['data'], config['encode']
  for name in ('batch_size', 'part'):
    if how[name] < 1:
      raise ConfigError(f'config.encode.{name}={how[name]} is less than 1')
  if how['dtype'] not in DTYPES:
    raise ConfigError(f'config.encode.dtype={how["dtype"]!r} is none of {", ".join(DTYPES)}')
  source = build('diffax.data.sources', data, path='data', skip=references.OUTSIDE)
  shape = _shape(data, source)
  latent = build('diffax.latents', config['latent'], source, path='latent')
  if not latent.frozen:
    raise ConfigError(
      f'config.latent={config["latent"]["name"]!r}: there is nothing to encode with; say '
      '--config.latent=autoencoder --config.latent.path=DIR'
    )
  latent.shape(shape)  # raises where it does not divide
  text = build('diffax.texts', config['text'], source, path='text')
  text = text if text.frozen else None
  if text and source.captions is None:
    raise ConfigError(
      f'config.text={config["text"]["name"]!r}: this data has no captions to encode; say '
      '--config.text=none'
    )
  mesh = sharding.make_mesh(config['mesh'], jax.local_devices())
  groups = latent.frozen | (text.frozen if text else {})
  like = {name: jax.eval_shape(each.like) for name, each in groups.items()}
  places = sharding.parameters(like, mesh, config['sharding'])
  like = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like, places)
  function, say = _functions(latent, text, data['flip'], how['dtype'])
  work = Work(
    config, source, mesh, {}, function, say, text and text.tokenize, like,
    lambda: {name: each.load(like[name]) for name, each in groups.items()})
  return work._replace(plan=_plan(work, shape, latent, text))


def _shape(data, source):
  """[h w c] of the pictures that are encoded. Raises ConfigError."""
  if source.dtype != np.uint8:
    raise ConfigError(f'config.data={data["name"]!r} is of {source.dtype}, no pictures to encode')
  if data['buckets']:
    raise ConfigError('config.data.buckets: a set has latents of one shape; give data.size alone')
  size = data['size']
  shape = (size, size, source.shape[-1]) if size else tuple(source.shape)
  if None in shape:
    raise ConfigError(
      f'data {data["name"]!r} has images of several sizes: say --config.data.size=N'
    )
  return shape


def _functions(latent, text, mirrored, dtype):
  """`Work.encode` and `Work.say`."""
  def stored(arrays):
    floats = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return {name: floats(x) for name, x in arrays.items()}

  def say(frozen, tokens):
    return stored(text.encode(frozen, tokens)) if text else {}

  def encode(frozen, pictures, tokens):
    of = {'moments': latent.moments(frozen, pictures)}
    if mirrored:
      of['mirrored'] = latent.moments(frozen, pictures[:, :, ::-1])
    return stored(of) | say(frozen, tokens)

  return encode, say


def _plan(work, shape, latent, text):
  """What the set is of, on which its bytes depend, the same on all hosts. Raises ConfigError."""
  config, source = work.config, work.source
  data, how = config['data'], config['encode']
  pictures = jnp.zeros((1, *shape))
  with work.layout():
    made = jax.eval_shape(
      work.encode, work.like, pictures, work.tokenize(['']) if work.tokenize else {})
  captions = json.dumps(source.captions or [], ensure_ascii=False)
  outside = (*references.OUTSIDE, *references.PLACE)
  try:
    records = features.digest(source)
  except Exception as error:  # of many kinds
    said = ' '.join(str(error).split())
    raise ConfigError(f'config.data: a record is broken ({said}): mend or remove it') from error
  plan = dict(
    format=parts.FORMAT,
    count=len(source),
    part=how['part'],
    batch_size=how['batch_size'],
    classes=source.classes,
    captions=source.captions is not None,
    record=[[k, np.dtype(x.dtype).newbyteorder('<').str, x.shape[1:]] for k, x in made.items()],
    source=dict(
      data={k: v for k, v in data.items() if k not in outside}, split=data.get('split', ''),
      size=data['size'], records=records, captions=hashlib.sha256(captions.encode()).hexdigest()),
    latent=latent.identity(),
    text=text and text.identity(),
  )
  plan = json.loads(json.dumps(plan))
  if hosts.tell(plan) != plan:
    raise ConfigError(
      f'host {jax.process_index()} finds other data or weights than host 0: give all hosts the same'
    )
  return plan


# --- the folder -----------------------------------------------------------------------------------


def _begin(folder, plan):
  """Writes the plan, or finds that it is the folder's. Raises ConfigError, on all hosts."""
  trouble = hosts.tell(_open(folder, plan) if hosts.first() else None)
  if trouble:
    raise ConfigError(f'--workdir={folder}: {trouble}')
  if not hosts.every(os.path.exists(os.path.join(folder, parts.PLAN))):
    raise ConfigError(
      f'--workdir={folder} is not the same folder on all hosts: put it on a disk that they share'
    )


def _open(folder, plan):
  """What stands against making the set in this folder, '' for nothing; it then holds the plan."""
  if '://' in folder:
    return 'array_record files are written to disks; name a folder of one, and copy it then'
  file = os.path.join(folder, parts.PLAN)
  try:
    os.makedirs(folder, exist_ok=True)
    there = [entry.name for entry in os.scandir(folder) if entry.is_file()]
    if parts.PLAN not in there:
      if there:
        return f'it holds {there[0]}, which is of no latent data set; name a folder of its own'
      _write(folder, parts.PLAN, (json.dumps(plan, indent=2) + '\n').encode())
      return ''
    for name in there:
      if name.endswith('.new'):
        os.remove(os.path.join(folder, name))
    with open(file, encoding='utf-8') as opened:
      old = json.load(opened)
  except (OSError, ValueError) as error:
    return f'{" ".join(str(error).split())}; mend that, or choose another'
  changed = [k for k in plan if old.get(k) != plan[k]]
  said = '; '.join(f'{k}: {_short(old.get(k))} there, {_short(plan[k])} here' for k in changed)
  return said and f'it is a set of something else ({said}); choose another, or undo the change'


def _short(value):
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) < 80 else f'{text[:40]} .. {text[-30:]}'


def _write(folder, name, data):
  """A file whole or not at all."""
  path = os.path.join(folder, name)
  with open(f'{path}.new', 'wb') as file:
    file.write(data)
  os.replace(f'{path}.new', path)


def _missing(folder, plan, show):
  """The numbers of the parts that are not there, or damaged, or not as long as info.json says."""
  count, missing = parts.count(plan), []
  sizes = _sizes(folder)
  for k in range(count):
    path = os.path.join(folder, parts.name(k, count))
    if not os.path.exists(path):
      missing.append(k)
      continue
    try:
      said = parts.told(path)
      if (said.get('set'), said.get('part')) != (parts.identity(plan), k):
        raise ValueError(f'{path} is another part, or of another set')
      if sizes and os.path.getsize(path) != sizes[k]:
        raise ValueError(f'{path} is not as long as it was')
    except ValueError as error:
      show(f'{error}: it is made again')
      missing.append(k)
  return missing


def _sizes(folder):
  """Of the parts by info.json, None without a whole one."""
  try:
    with open(os.path.join(folder, parts.INFO), encoding='utf-8') as file:
      return json.load(file)['parts']
  except (OSError, ValueError, KeyError):
    return None


def _finished(folder):
  """Whether all that info.json names is there."""
  try:
    said = parts.info(folder)
    for name in said['files']:
      parts.whole(folder, said, name)
  except (ValueError, KeyError, TypeError):
    return False
  return True


# --- encoding -------------------------------------------------------------------------------------


def _make(work, frozen, folder, mine, watch, show):
  """Writes the parts `mine`, one after the other."""
  plan, count = work.plan, parts.count(work.plan)
  lists = {k: _groups(plan, k, sharding.whole(1, work.mesh) * plan['batch_size']) for k in mine}
  batches = _encoded(work, frozen, list(lists.values()), watch)
  for done, k in enumerate(mine, 1):
    begin, kept = time.perf_counter(), []
    first, end = parts.span(plan, k)
    rows = _rows(work, (next(batches) for _ in lists[k]), first, end, kept)
    tell = lambda k=k, kept=kept: _told(work, k, kept)
    parts.write(os.path.join(folder, parts.name(k, count)), rows, tell, jax.process_index())
    rate = (end - first) / (time.perf_counter() - begin)
    show(f'part {k}: {end - first} records, {rate:.0f} a second; part {done} of {len(mine)} here')


def _groups(plan, k, size):
  """The records of part k in batches of one size, int [n size]; the last record fills them up."""
  first, end = parts.span(plan, k)
  each = np.arange(-(-(end - first) // size) * size).reshape(-1, size)
  return np.minimum(first + each, end - 1)


def _encoded(work, frozen, lists, watch):
  """Yields (record numbers int [b], labels [b], {name: numpy [b ...]}) of batches, in order.

  The next ones are read and under way meanwhile. Raises ConfigError for a broken record.
  """
  if not lists:
    return
  data, batch = work.config['data'], sharding.batch(work.mesh)
  read = pipeline.ordered(
    work.source, np.concatenate(lists), size=data['size'] or None, on_error=data['on_error'],
    tokenize=work.tokenize, workers=data['workers'])
  encode, waiting = sharding.jit(work.encode, work.mesh), collections.deque()

  def place(found):
    index, label, image = (found.pop(name) for name in ('index', 'label', 'image'))
    return index, label, *sharding.put((image, found), batch)

  placed = pipeline.prefetch(read, place)
  try:
    for step in range(sum(len(each) for each in lists) + AHEAD):
      watch.at(step, 'data')
      found = next(placed, None)
      watch.at(step, 'encoding', patient=not step)  # the first compiles
      if found is not None:
        with work.layout():
          waiting.append((*found[:2], encode(frozen, *found[2:])))
      if waiting and (found is None or len(waiting) > AHEAD):
        yield sharding.fetch(waiting.popleft())
  except ValueError as error:  # a broken record, which the message names
    raise ConfigError(' '.join(str(error).split())) from error
  finally:
    placed.close()


def _rows(work, batches, first, end, kept):
  """Yields the bytes of the records first .. end - 1. kept: a list, to which what is to be told of
  each is added: (record that was read, mean, variance), of the z that are drawn of it, [z].
  """
  dtype, place = parts.layout(work.plan['record']), first
  for index, label, arrays in batches:
    rows = np.zeros(min(len(index), end - place), dtype)
    rows['index'], rows['label'] = np.arange(place, place + len(rows)), label[: len(rows)]
    for name, x in arrays.items():
      rows[name] = x[: len(rows)]
      if not np.isfinite(rows[name]).all():
        raise ConfigError(
          f'{name} of records {place} to {place + len(rows) - 1} is not finite as {x.dtype}: '
          'look at the weights, or say --config.encode.dtype=float32'
        )
    moments = rows['moments'].astype(np.float64)
    spread = latents.spread(work.plan['latent']['config'], moments)
    for i, row, mean, variance in zip(index, rows, *spread):  # [h w z]
      kept.append((int(i), mean.mean((0, 1)), mean.var((0, 1)) + variance.mean((0, 1))))
      yield row.tobytes()
    place += len(rows)


def _told(work, k, kept):
  """What the last record of part k says."""
  index, means, variances = zip(*kept)
  mean = np.mean(means, axis=0)
  captions = work.source.captions
  return {
    'set': parts.identity(work.plan), 'part': k, 'count': len(kept), 'mean': mean.tolist(),
    'variance': (np.mean(variances, axis=0) + np.var(means, axis=0)).tolist(),
    'captions': [captions[i] for i in index] if captions is not None else [],
  }


def _null(work, frozen):
  """{name: numpy [1 ...]} of the empty prompt."""
  tokens = work.tokenize([''] * sharding.whole(work.plan['batch_size'], work.mesh))
  with work.layout():
    said = jax.jit(work.say)(frozen, sharding.put(tokens, sharding.batch(work.mesh)))
  return {name: x[:1] for name, x in sharding.fetch(said).items()}


def _finish(folder, work, show):
  """Writes what is known when all parts are there, info.json last."""
  plan, count = work.plan, parts.count(work.plan)
  paths = [os.path.join(folder, parts.name(k, count)) for k in range(count)]
  told = [parts.told(path) for path in paths]
  small = [parts.NULL] if work.tokenize else []
  if plan['captions']:
    captions = [caption for part in told for caption in part['captions']]
    _write(folder, parts.CAPTIONS, json.dumps(captions, ensure_ascii=False).encode())
    small.append(parts.CAPTIONS)
  share = np.array([part['count'] for part in told]) / plan['count']  # of the records, [k]
  means, variances = (np.array([part[name] for part in told]) for name in ('mean', 'variance'))
  mean = share @ means
  variance = share @ (variances + (means - mean) ** 2)
  info = plan | {
    'latents': {
      'mean': mean.tolist(), 'std': np.sqrt(variance).tolist(), 'mean_of_all': float(mean.mean()),
      'std_of_all': float(np.sqrt(variance.mean() + mean.var())),
    },
    'parts': [os.path.getsize(path) for path in paths],
    'files': {name: _hash(os.path.join(folder, name)) for name in small},
    'versions': _versions(),
  }
  _write(folder, parts.INFO, (json.dumps(info, indent=2, ensure_ascii=False) + '\n').encode())
  show(f'{folder}: {plan["count"]} records in {count} parts; z has mean '
       f'{info["latents"]["mean_of_all"]:.3f} and deviation {info["latents"]["std_of_all"]:.3f}')


def _hash(path):
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _versions():
  from importlib import metadata

  return {name: metadata.version(name) for name in PACKAGES}
