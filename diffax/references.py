"""What a feature network tells of real images, computed once and kept with what it is of.

A file in the cache is named by its description: data, split, count, preprocessing and feature
network. Numbers of two different ones cannot be compared, which `read` sees to.
"""

import hashlib
import io
import json
import os
import re

from absl import logging
import jax
import numpy as np

from diffax import config as configs
from diffax import features
from diffax import hosts
from diffax import metrics
from diffax import sharding
from diffax.build import build, ConfigError
from diffax.data import pipeline

ROWS = 100_000  # images of which single features are kept; moments are of all
CHUNK = 1000  # images read at once
FIELDS = ('pool', 'spatial', 'logits', 'label')  # of a `metrics.Set`, a row an image
# What a config's `data` says beside the source.
OUTSIDE = tuple(configs.BESIDE)
PLACE = ('data_dir', 'path', 'split')  # where the source lies, and what is said by itself


def other(run, split, path):
  """The config's data of another split. Raises ConfigError."""
  data = {k: v for k, v in run.config['data'].items() if k not in OUTSIDE}
  if 'split' not in data:
    raise ConfigError(
      f'config.{path}.split={split!r}: data {data["name"]!r} has no splits; write one whose '
      'function takes `split`'
    )
  found = build('diffax.data.sources', {**data, 'split': split}, path=f'{path}.split')
  by = lambda source: [(getattr(source, 'made', None) or {}).get(k) for k in ('latent', 'text')]
  if by(found) != by(run.source):
    raise ConfigError(
      f'config.{path}.split={split!r}: its latents or embeddings were made by other weights than '
      'those of the data: encode it anew'
    )
  return found


def images(source, index, size):
  """(images [n h w c], labels int32 [n]) of the records `index`, scaled to a `size` that is not 0.
  """
  _, pictures, labels, _, _ = zip(*pipeline.read(source, size or None, 'raise', index.tolist()))
  return np.stack(pictures), np.asarray(labels, np.int32)


def first(found, count):
  """The first `count` rows of a `metrics.Set`, which stand for themselves alone."""
  return jax.tree.map(lambda x: x[:count], found._replace(moments=None, spatial_moments=None))


def embedder(network, params, mesh, batch_size):
  """A function (count, read) -> `metrics.Set` of `count` images, in batches of one size.

  read: int [n], numbers below `count` -> (images uint8 [n h w c], labels int32 [n]); a host reads
  those that its devices see.
  """
  size, place = sharding.whole(batch_size, mesh), sharding.batch(mesh)
  own, extract = sharding.rows(mesh, size), jax.jit(network.extract)

  def embed(count, read):
    parts = []
    with sharding.using(mesh):
      for i in range(0, count, size):
        batch = sharding.put(read(np.minimum(i + own, count - 1)), place, (own, size))
        parts.append(sharding.fetch((extract(params, batch[0]), batch[1])))
    outputs, label = jax.tree.map(lambda *xs: np.concatenate(xs)[:count], *parts)
    return metrics.Set(*outputs, label)

  return embed


def describe(run, source, split, identity):
  """What a reference is of, as plain data. identity: the feature network's."""
  data = run.config['data']
  size = data['size']
  return {
    'data': {k: v for k, v in data.items() if k not in (*OUTSIDE, *PLACE)},
    'split': split,
    'records': features.digest(source),
    'preprocessing': f'centre square resized to {size} as ADM does' if size else 'none',
    'features': identity,
  }


def name(description):
  """The file for a description."""
  data = description['data'].get('dataset', description['data']['name'])
  words = '-'.join([data, description['split'], description['features']['name']])
  digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
  return re.sub(r'[^\w-]', '_', words) + f'-{digest[:12]}.npz'


def of(run, source, split, embed, identity, file=None, keep=FIELDS):
  """The `metrics.Set` of a source: read from a file, or computed and written there.

  Moments are of every image, rows of at most `ROWS`, evenly spaced, and of what `keep` says. file:
  an epath, None for one in the cache. Raises ConfigError where the file is of something else.
  """
  description = describe(run, source, split, identity) | {'keep': list(keep)}
  file = file or configs.cache() / 'references' / name(description)
  found = read(file, description) if file.exists() else None
  if not hosts.every(found is not None):  # each host may have a cache of its own
    found = _compute(source, run.config['data']['size'], embed, keep)
    write(file, found, description)
  return found


def _compute(source, size, embed, keep):
  moments, kept, each = {}, [], -(-len(source) // ROWS)
  for start in range(0, len(source), CHUNK):
    index = np.arange(start, min(start + CHUNK, len(source)))
    rows = embed(len(index), lambda i, start=start: images(source, start + i, size))
    for key in (key for key in ('pool', 'spatial') if getattr(rows, key) is not None):
      more = metrics.moments(getattr(rows, key))
      moments[key] = metrics.merge(moments[key], more) if key in moments else more
    rows = metrics.Set(**{k: getattr(rows, k) if k in keep else None for k in FIELDS})
    kept.append(jax.tree.map(lambda x, wanted=index % each == 0: x[wanted], rows))
  rows = jax.tree.map(lambda *xs: np.concatenate(xs), *kept)
  return rows._replace(moments=moments['pool'], spatial_moments=moments.get('spatial'))


def write(file, found, description):
  """Writes a set with its description, whole or not at all."""
  leaves = jax.tree_util.tree_leaves_with_path(found._asdict())
  arrays = {jax.tree_util.keystr(p, simple=True, separator='.'): np.asarray(x) for p, x in leaves}
  data = io.BytesIO()
  np.savez(data, description=np.asarray(json.dumps(description, sort_keys=True)), **arrays)
  file.parent.mkdir(parents=True, exist_ok=True)
  scratch = file.parent / f'{file.name}.{jax.process_index()}-{os.getpid()}.new'
  scratch.write_bytes(data.getvalue())
  scratch.replace(file)


def read(file, description):
  """The set in a file; None where it is damaged. Raises ConfigError where it is of something else.
  """
  try:
    with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as held:
      arrays = dict(held)
    there = json.loads(str(arrays.pop('description')))
  except Exception as error:  # zip files break in many ways
    logging.warning('%s cannot be read (%s); it is computed again', file, type(error).__name__)
    return None
  if there != json.loads(json.dumps(description)):
    keys = [k for k in {**there, **description} if there.get(k) != description.get(k)]
    said = '; '.join(f'{k}: {there.get(k)} there, {description.get(k)} here' for k in keys)
    raise ConfigError(f'{file} is a reference of something else ({said}): numbers of the two '
                      'cannot be compared; name another file, or none for one of the cache')
  moments = {}
  for key in ('moments', 'spatial_moments'):
    fields = {k.split('.')[1]: arrays.pop(k) for k in list(arrays) if k.startswith(f'{key}.')}
    if fields:
      moments[key] = metrics.Moments(int(fields['count']), fields['mean'], fields['cov'])
  return metrics.Set(**arrays, **moments)
