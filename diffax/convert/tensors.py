"""Tensors in safetensors files: read onto the mesh one by one, every one accounted for; written.

Nothing here is unpickled: what a .bin, .ckpt or .pth file holds can run any code. Of a safetensors
file the header alone is read until it is known that all is there and of the right shape.
"""

import hashlib
import json
import os
import re
from typing import NamedTuple
from collections.abc import Callable

import einops
import jax
import ml_dtypes  # of jax; numpy then knows bfloat16
import numpy as np

from diffax import sharding
from diffax.build import ConfigError

PICKLES = ('.pth', '.pt', '.bin', '.ckpt', '.pkl', '.pickle', '.msgpack')
DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}
LARGEST_JSON = 2**26  # bytes of a file; an index of tensors has some hundred thousand
SHARD = 5 * 10**9  # bytes of a file, beyond which another is begun


class Stored(NamedTuple):
  """Where a parameter stands in a file.

  names: the tensor's name; of a stack [n ...] of layers one for each, and `stack`; several without
  a stack are copies, all written, and equal in a file. pattern: einops' from our layout (of a
  layer) to the file's, as 'i o -> o i'; '' where they are the same. sizes: ((name, n), ...) that
  the pattern needs. part: (i, n), the i-th of n equal parts of the tensor's first axis.
  """

  names: tuple
  pattern: str = ''
  sizes: tuple = ()
  part: tuple = (0, 1)
  stack: bool = False


class Files(NamedTuple):
  """Tensors there are. where: what the user named. of: {name: (file, shape, dtype)}."""

  where: str
  of: dict


class Weights(NamedTuple):
  """A network as it stands in files.

  spec: of the model, as `build` takes it. files: a `Files`. stored: model -> ((path, shape) ->
  `Stored`). ignored: patterns (`re.fullmatch`) of names in the files that mean nothing to it.
  """

  spec: dict
  files: Files
  stored: Callable
  ignored: tuple = ()


DENSE, CONV, DENSE_CONV = 'i o -> o i', 'h w i o -> o i h w', 'i o -> o i 1 1'
KINDS = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight', 'bias': 'bias'}


def usual(module, path, shape, layers=()):
  """`Stored` of the leaf `path` whose module the file calls `module`, as PyTorch's layers have it.

  Dense [i o] and convolutions [h w i o] are kernels there [o i ...]; scale and embedding are
  `weight` as they are. layers: of a stack [n ...], the module's name of each, in place of `module`.
  """
  leaf = path.rpartition('/')[2]
  rank = len(shape) - bool(layers)
  pattern = {2: DENSE, 4: CONV}[rank] if leaf == 'kernel' else ''
  modules = tuple(layers) or (module,)
  return Stored(tuple(f'{m}.{KINDS.get(leaf, leaf)}' for m in modules), pattern, stack=bool(layers))


# --- what there is --------------------------------------------------------------------------------


def find(where, stem=''):
  """The `Files` of a safetensors file, or of a folder that holds one or an index of several.

  stem: how the file in the folder is called, as 'model'; '' is whichever is there alone. Raises
  ConfigError, a line that says the remedy, for pickles, for what is not there, broken, or names a
  file outside the folder.
  """
  path = os.fspath(where)
  if path.lower().endswith(PICKLES):
    raise ConfigError(f'{path} is a pickle, which can run any code when it is read: {REMEDY}')
  if os.path.isdir(path):
    files = _in_folder(path, stem)
  elif os.path.isfile(path):
    files = [path]
  else:
    raise ConfigError(f'{path}: there is no such file or folder of weights')
  found = {}
  for file in files:
    for name, said in _header(file).items():
      if name in found:
        raise ConfigError(f'{path}: tensor {name!r} stands both in {found[name][0]} and in {file}')
      found[name] = said
  return Files(path, found)


REMEDY = (
  'take the .safetensors file published beside it, or make one where you trust the file: '
  "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'x.safetensors')"
)


def _in_folder(folder, stem):
  """The safetensors files that a folder's weights are in."""
  there = sorted(os.listdir(folder))
  indices = [n for n in there if n.endswith('.safetensors.index.json') and n.startswith(stem)]
  files = [n for n in there if n.endswith('.safetensors') and n.startswith(stem)]
  exact = [n for n in files if stem and n == f'{stem}.safetensors']
  if exact or len(files) == 1 and not indices:
    return [os.path.join(folder, (exact or files)[0])]
  if indices:  # the first has no variant in its name, as `.fp16`, where there is such
    return _of_index(folder, min(indices, key=len))
  plain = [n for n in files if n.count('.') == 1]
  if len(plain) == 1:  # beside variants of it
    return [os.path.join(folder, plain[0])]
  pickles = [n for n in there if n.lower().endswith(PICKLES)]
  if pickles and not files:
    raise ConfigError(
      f'{folder} holds its weights as a pickle alone ({pickles[0]}), which can run any code: '
      f'{REMEDY}'
    )
  raise ConfigError(
    f'{folder} holds {"several" if files else "no"} safetensors files'
    f'{f" {stem}*" if stem else ""}{": " + ", ".join(files) if files else ""}; there is: '
    f'{", ".join(there[:8]) or "nothing"}; name the file, or the folder that holds it'
  )


def _of_index(folder, index):
  try:
    names = sorted(set(json_object(os.path.join(folder, index))['weight_map'].values()))
    inside = [n for n in names if os.path.basename(n) == n and n.endswith('.safetensors')]
  except (KeyError, AttributeError, TypeError) as error:
    raise ConfigError(f'{folder}/{index} is no index of weights ({error}): get it again') from error
  outside = sorted(set(names) - set(inside))
  if outside:
    raise ConfigError(
      f'{folder}/{index} names {outside[0]!r}, which is no safetensors file of that folder: '
      'do not trust it'
    )
  return [os.path.join(folder, name) for name in names]


def _header(path):
  """{name: (file, shape, dtype)} of a safetensors file."""
  import safetensors

  try:
    with safetensors.safe_open(path, framework='np') as file:
      slices = {name: file.get_slice(name) for name in file.keys()}
      return {n: (path, tuple(s.get_shape()), str(s.get_dtype())) for n, s in slices.items()}
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise ConfigError(
      f'{path} is no whole safetensors file ({" ".join(str(error).split())}): get it again'
    ) from error


def config_json(folder):
  """What the config.json of a folder of weights says. Raises ConfigError."""
  return json_object(os.path.join(os.fspath(folder), 'config.json'))


def json_object(file):
  """What a JSON file holds, a dict. Raises ConfigError."""
  if not os.path.isfile(file):
    raise ConfigError(f'{file}: there is no such file; name a folder of released weights')
  if os.path.getsize(file) > LARGEST_JSON:
    raise ConfigError(f'{file} is larger than {LARGEST_JSON} bytes, so no config: do not trust it')
  try:
    with open(file, encoding='utf-8') as opened:
      said = json.load(opened)
  except (ValueError, RecursionError) as error:
    raise ConfigError(f'{file} is no JSON ({error}): get it again') from error
  if not isinstance(said, dict):
    raise ConfigError(f'{file} is no JSON object: get it again')
  return said


# --- reading --------------------------------------------------------------------------------------


def _flat(tree):
  return {sharding.name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def wanted(like, stored):
  """{name: shape} of the tensors that hold the parameters `like`, by `stored(path, shape)`."""
  found = {}
  for path, x in _flat(like).items():
    place = stored(path, x.shape)
    for name in place.names:
      shape = x.shape[1:] if place.stack else x.shape
      shape = _file_shape(shape, place)
      if found.setdefault(name, shape) != shape:
        raise ValueError(f'{name} is {found[name]} for one parameter, {shape} for {path}')
  return found


def _file_shape(shape, place):
  made = jax.eval_shape(
    lambda x: _there(x, place), jax.ShapeDtypeStruct(shape, np.float32)).shape
  return (made[0] * place.part[1], *made[1:]) if made else made


def _there(x, place):
  return einops.rearrange(x, place.pattern, **dict(place.sizes)) if place.pattern else x


def _here(x, place):
  if not place.pattern:
    return x
  there, here = reversed(place.pattern.split('->'))
  return einops.rearrange(x, f'{there} -> {here}', **dict(place.sizes))


def check(files, want, ignored=()):
  """Raises ConfigError that names every tensor missing, surplus, misshapen or of a wrong dtype.

  want: {name: shape}. ignored: patterns (`re.fullmatch`) of names that may be there besides.
  """
  extra = [n for n in files.of if n not in want and not any(re.fullmatch(p, n) for p in ignored)]
  both = [n for n in want if n in files.of]
  shapes = {n: files.of[n][1] for n in both if files.of[n][1] != tuple(want[n])}
  dtypes = {n: files.of[n][2] for n in both if files.of[n][2] not in DTYPES}
  said = [
    ('misses', sorted(want.keys() - files.of.keys())),
    ('has beside what is known', sorted(extra)),
    ('has misshapen', [f'{n} {shapes[n]} for {tuple(want[n])}' for n in sorted(shapes)]),
    ('has of a dtype that is none of ' + ' '.join(DTYPES), [f'{n} {dtypes[n]}' for n in dtypes]),
  ]
  if any(names for _, names in said):
    found = '; '.join(f'{what} {", ".join(names)}' for what, names in said if names)
    raise ConfigError(f'{files.where} {found}: is it of another network?')


def load(files, like, stored, ignored=()):
  """The parameters `like`, read tensor by tensor, each placed before the next is read.

  like: a tree of ShapeDtypeStructs, with shardings or without. stored: (path, shape) -> `Stored`.
  The memory of the host holds one parameter at a time. Raises ConfigError as `check` does, before
  anything is read, and where copies of a parameter differ.
  """
  import safetensors

  check(files, wanted(like, stored), ignored)
  opened = {}

  def tensor(name):
    file = files.of[name][0]
    if file not in opened:
      opened[file] = safetensors.safe_open(file, framework='np').__enter__()
    return opened[file]

  def part(name, place):
    i, n = place.part
    if n == 1:
      return _here(tensor(name).get_tensor(name), place)
    rows = files.of[name][1][0] // n
    return _here(tensor(name).get_slice(name)[i * rows : (i + 1) * rows], place)

  def leaf(path, x):
    place = stored(sharding.name(path), x.shape)
    if place.stack:
      value = np.stack([part(name, place).astype(x.dtype) for name in place.names])
    else:
      value = part(place.names[0], place).astype(x.dtype)
      for name in place.names[1:]:
        if not np.array_equal(part(name, place).astype(x.dtype), value):
          raise ConfigError(
            f'{files.where}: {place.names[0]} and {name} differ, and here they are one parameter'
          )
    where = getattr(x, 'sharding', None)
    return jax.device_put(value) if where is None else sharding.put(value, where)

  try:
    return jax.tree_util.tree_map_with_path(leaf, like)
  finally:
    for file in opened.values():
      file.__exit__(None, None, None)


def read(weights, model, like):
  """The parameters `like` of a model, of its `Weights`; see `load`."""
  return load(weights.files, like, weights.stored(model), weights.ignored)


def digest(files):
  """sha256 of the tensors' files, one after the other: what the weights are known by."""
  sha = hashlib.sha256()
  for path in sorted({file for file, _, _ in files.of.values()}):
    with open(path, 'rb') as file:
      sha.update(hashlib.file_digest(file, 'sha256').digest())
  return sha.hexdigest()


# --- writing --------------------------------------------------------------------------------------


def save(path, params, stored, dtype='F32'):
  """Writes parameters as `stored` says: a file `path`, or, beyond `SHARD` bytes, several behind an
  index, named as transformers and diffusers name them. dtype: a name of `DTYPES`.

  Each is fetched from the devices by itself. Returns the paths written.
  """
  parts, places, paths = {}, {}, _flat(params)
  for leaf, x in paths.items():
    place = stored(leaf, x.shape)
    for k, name in enumerate(place.names):
      row = k if place.stack else None
      parts.setdefault(name, {})[place.part[0]] = (leaf, row)
      places[name, place.part[0]] = place

  def tensor(name):
    made = []
    for i, (leaf, row) in sorted(parts[name].items()):
      x = sharding.fetch(paths[leaf] if row is None else paths[leaf][row])
      made.append(_there(np.asarray(x), places[name, i]))
    whole = np.concatenate(made) if len(made) > 1 else made[0]
    return np.asarray(whole.astype(DTYPES[dtype]), order='C')  # which leaves a scalar one

  return _write(os.fspath(path), parts, tensor)


def _write(path, names, tensor):
  shards, size = [{}], 0
  base = path.removesuffix('.safetensors')
  for name in names:
    value = tensor(name)
    if size and size + value.nbytes > SHARD:
      _shard(f'{base}.part{len(shards)}', shards[-1])
      shards[-1] = list(shards[-1])
      shards, size = [*shards, {}], 0
    shards[-1][name] = value
    size += value.nbytes
  if len(shards) == 1:
    _shard(path, shards[0])
    return [path]
  _shard(f'{base}.part{len(shards)}', shards[-1])
  final, index = [], {}
  for k, held in enumerate(shards, 1):
    final.append(f'{base}-{k:05d}-of-{len(shards):05d}.safetensors')
    os.replace(f'{base}.part{k}', final[-1])
    index |= dict.fromkeys(held, os.path.basename(final[-1]))
  with open(f'{path}.index.json', 'w', encoding='utf-8') as file:
    json.dump({'metadata': {}, 'weight_map': index}, file, indent=2, sort_keys=True)
  return [*final, f'{path}.index.json']


def _shard(path, tensors):
  import safetensors.numpy

  safetensors.numpy.save_file(tensors, f'{path}.new', metadata={'format': 'pt'})
  mask = os.umask(0)  # safetensors makes files that nobody else may read
  os.umask(mask)
  os.chmod(f'{path}.new', 0o666 & ~mask)
  os.replace(f'{path}.new', path)
