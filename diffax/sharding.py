"""Where arrays lie: one mesh, one table of rules for parameters, logical names for activations.

Mesh axes, slow to fast, for the last of them talk the most:

  data      splits the batch
  fsdp      splits the batch, and the parameters, which are gathered as they are used
            (Rajbhandari et al. 2020, "ZeRO", stage 3)
  sequence  splits the tokens of a transformer, the rows of a U-Net's maps
            (Liu et al. 2023, "Ring Attention")
  tensor    splits heads and hidden channels (Shoeybi et al. 2019, "Megatron-LM")

On several slices, which a slower network joins, `data` and then `fsdp` run over slices first.
"""

import contextlib
import functools
import math
import os
import re

from absl import logging
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from diffax.build import ConfigError
from diffax.models import attention as attentions
from diffax.models import layers

AXES = ('data', 'fsdp', 'sequence', 'tensor')
BATCH = ('data', 'fsdp')
ACTIVATIONS = (
  ('batch', BATCH),
  ('tokens', 'sequence'),
  ('height', 'sequence'),
  ('heads', 'tensor'),
  ('hidden', 'tensor'),
  ('width', None),
)
RULES = (  # of what a `columns` makes, its `rows` makes one sum again
  (r'(^|/)(query|key|value|mlp_in|mlp_gate|conv_in)/kernel$', 'columns'),
  (r'(^|/)(out|mlp_out|conv_out)/kernel$', 'rows'),
  (r'.*', 'fsdp'),
)
SMALLEST = 2**12  # elements; what is smaller stays whole on each device
OPTIONS = {  # of XLA, by platform; what they save: experiments/scaling, experiments/throughput
  # Products with gathered parameters stay whole. As a loop over the parts ("windowed einsum", Wang
  # et al. 2023, ASPLOS), which hides the gathering, they read and write activations for each part.
  'tpu': {'xla_jf_spmd_threshold_for_windowed_einsum_mib': 10**6},
  # cuBLASLt adds a bias, and takes GELU, within the product; each is a kernel beside Triton's. And
  # products of one operand stay apart: to merge those of all blocks gathers all parameters first.
  'gpu': {'xla_gpu_enable_triton_gemm': False, 'xla_gpu_dot_merger_threshold_mb': 0},
}


# --- the mesh -------------------------------------------------------------------------------------


def make_mesh(axes, devices=None):
  """A mesh of all devices, or of those given. axes: {'data': n, ...}; one -1 takes what is left.

  Raises ConfigError where there is no such axis or the sizes do not multiply to the devices.
  """
  devices = jax.devices() if devices is None else devices
  unknown = [name for name in axes if name not in AXES]
  if unknown:
    raise ConfigError(f'mesh={axes}: {unknown[0]!r} is none of {", ".join(AXES)}')
  sizes = {name: axes.get(name, 1) for name in AXES}
  free = [name for name, n in sizes.items() if n == -1]
  rest = math.prod(n for n in sizes.values() if n != -1)
  if len(free) == 1 and rest > 0:
    sizes[free[0]] = len(devices) // rest
  if len(free) > 1 or min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
    raise ConfigError(
      f'mesh={axes} does not fit {len(devices)} devices: sizes must multiply to {len(devices)}, '
      'and one may be -1'
    )
  return Mesh(_arranged(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(sizes, devices):
  """The devices [data fsdp sequence tensor], neighbours where axes talk the most."""
  from jax.experimental import mesh_utils

  slices = len({getattr(d, 'slice_index', None) for d in devices})
  outer = over_slices(sizes, slices)
  if slices > 1 and outer:
    inner = [n // outer[name] for name, n in sizes.items()]
    return mesh_utils.create_hybrid_device_mesh(
      inner, [outer[name] for name in sizes], devices, allow_split_physical_axes=True
    )
  if slices > 1:
    logging.warning(
      'mesh=%s on %d slices: data x fsdp does not divide by them, so that other axes cross the '
      'slow network between slices', sizes, slices,
    )
    return np.asarray(devices).reshape(tuple(sizes.values()))
  return mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices, allow_split_physical_axes=True
  )


def over_slices(sizes, slices):
  """{axis: parts over slices}, `data` before `fsdp`; None where the two do not divide by them."""
  outer = dict.fromkeys(sizes, 1)
  for name in BATCH:
    outer[name] = math.gcd(sizes[name], slices)
    slices //= outer[name]
  return outer if slices == 1 else None


@contextlib.contextmanager
def using(mesh, attention='auto'):
  """Within it, models lay out their activations on `mesh`. attention: see `models.attention`."""
  with jax.set_mesh(mesh), layers.layout(ACTIVATIONS), attentions.using(attention):
    yield


def jit(function, mesh, **options):
  """`jax.jit` of a program of networks on `mesh`, with what its compiler had better be told."""
  return jax.jit(function, compiler_options=compiler_options(mesh), **options)


def compiler_options(mesh):
  """XLA's options for programs of a mesh, {name: value}; flags in the environment win."""
  said = ' '.join(os.environ.get(name, '') for name in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS'))
  options = OPTIONS.get(mesh.devices.flat[0].platform, {})
  return {name: value for name, value in options.items()
          if f'--{name}=' not in said and _known(mesh, name, value)}


@functools.cache
def _known(mesh, name, value):
  """Whether this version of XLA has the option: they come and go."""
  number = jax.ShapeDtypeStruct((), 'float32', sharding=replicated(mesh))
  try:
    jax.jit(lambda x: x, compiler_options={name: value}).lower(number).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'No such compile option' not in str(error):
      raise
    logging.warning('this version of XLA has no option %s: it is left out', name)
    return False
  return True


def parts(mesh):
  """Into how many parts the batch is split."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


def whole(count, mesh):
  """`count`, made larger until it divides into the batch's parts."""
  return -(-count // parts(mesh)) * parts(mesh)


def batch(mesh):
  """The first axis over the axes of the batch."""
  return NamedSharding(mesh, P(BATCH))


def replicated(mesh):
  return NamedSharding(mesh, P())


def everywhere(mesh):
  """The first axis over all devices."""
  return NamedSharding(mesh, P(AXES))


def rows(mesh, count):
  """Which rows of a batch of `count` this host's devices hold: int [n], rising."""
  place = batch(mesh).addressable_devices_indices_map((count,))
  return np.unique(np.concatenate([np.arange(count)[index] for index in place.values()]))


def put(tree, sharding, held=None):
  """Host arrays -> global arrays [count ...]; transfers only start here.

  Each host gives the same whole arrays; or its rows of them alone, and `held`, the numbers of those
  rows, rising, and how many there are in all: (int [n], count).
  """
  def place(x):
    x = np.asarray(x)
    if held is None:
      return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    numbers, count = held
    pick = lambda index: x[np.searchsorted(numbers, np.arange(count)[index[0]])]
    return jax.make_array_from_callback((count, *x.shape[1:]), sharding, pick)

  return jax.tree.map(place, tree)


def fetch(tree):
  """Global arrays -> the whole of them as numpy, on every host. All hosts must call it together."""
  from jax.experimental import multihost_utils

  def get(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(get, tree)


def on_host(shardings):
  """The same places, in the memory of the hosts that the devices belong to."""
  return jax.tree.map(lambda place: place.with_memory_kind('pinned_host'), shardings)


def on_device(tree):
  """Arrays, or ShapeDtypeStructs, of `on_host` on their devices; others as they are."""
  def move(x):
    place = getattr(x, 'sharding', None)
    if place is None or place.memory_kind != 'pinned_host':
      return x
    place = place.with_memory_kind('device')
    like = isinstance(x, jax.ShapeDtypeStruct)
    return x.update(sharding=place) if like else jax.device_put(x, place)

  return jax.tree.map(move, tree)


# --- parameters -----------------------------------------------------------------------------------


def _longest(shape, n, free):
  """Of the axes `free`, the longest that divides into n parts, or None."""
  fits = [i for i in np.argsort(shape, kind='stable')[::-1] if i in free and shape[i] % n == 0]
  return fits[0] if fits else None


def _split(shape, mesh, axis=None):
  """The axis `axis` over `tensor`, and the longest of the others over `fsdp`, where they divide.

  What is small stays whole.
  """
  names = [None] * len(shape)
  if math.prod(shape) < SMALLEST:
    return P()
  if axis is not None and len(shape) >= -axis and mesh.shape['tensor'] > 1:
    if shape[axis] % mesh.shape['tensor'] == 0:
      names[axis] = 'tensor'
  free = [i for i, name in enumerate(names) if name is None]
  best = _longest(shape, mesh.shape['fsdp'], free) if mesh.shape['fsdp'] > 1 else None
  if best is not None:
    names[best] = 'fsdp'
  return P(*names) if any(names) else P()


KINDS = {
  'fsdp': lambda shape, mesh: _split(shape, mesh),
  'columns': lambda shape, mesh: _split(shape, mesh, -1),  # [... in out], out over `tensor`
  'rows': lambda shape, mesh: _split(shape, mesh, -2),  # in
}


def name(path):
  """A leaf's path as text, 'net/blocks/query/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def parameters(tree, mesh, rules=RULES):
  """A sharding for each parameter, by the first rule `(pattern, kind or axes)` its path matches.

  A kind is one of `KINDS`, which split what divides; axes are taken as they are. Raises ConfigError
  for a parameter no rule matches, a rule of one's own that matches nothing or does not fit the
  parameter's shape, and a mesh axis for parameters that splits none of them.
  """
  unused = {pattern for pattern, kind in rules if (pattern, kind) not in RULES}

  def leaf(path, x):
    path = name(path)
    found = next(((pattern, rule) for pattern, rule in rules if re.search(pattern, path)), None)
    if found is None:
      raise ConfigError(
        f"config.sharding: no rule matches parameter {path!r}; end the rules with ('.*', 'fsdp')"
      )
    unused.discard(found[0])
    if isinstance(found[1], str) and found[1] not in KINDS:
      raise ConfigError(
        f'config.sharding: {found[1]!r} of rule {found} is none of {", ".join(KINDS)}'
      )
    spec = KINDS[found[1]](x.shape, mesh) if isinstance(found[1], str) else P(*found[1])
    try:
      NamedSharding(mesh, spec).check_compatible_aval(x.shape)
      NamedSharding(mesh, spec).shard_shape(x.shape)
    except ValueError as error:
      raise ConfigError(
        f'config.sharding: rule {found} does not fit {path!r} of shape {x.shape}: {error}'
      ) from error
    return NamedSharding(mesh, spec)

  shardings = jax.tree_util.tree_map_with_path(leaf, tree)
  if unused:
    raise ConfigError(
      f'config.sharding: rules {sorted(unused)} match no parameter, or stand behind ones that '
      'match all they could'
    )
  _tensor_used(jax.tree.leaves(shardings), mesh)
  return shardings


def _tensor_used(shardings, mesh):
  """Raises ConfigError for an axis `tensor` that splits nothing."""
  used = {axis for s in shardings for axis in jax.tree.leaves(tuple(s.spec))}
  if mesh.shape['tensor'] > 1 and 'tensor' not in used:
    raise ConfigError(
      f'mesh.tensor={mesh.shape["tensor"]} splits no parameter, so that devices would only repeat '
      f'each other: sizes of this network do not divide by it, are smaller than {SMALLEST}, or '
      'config.sharding names it nowhere; take another mesh'
    )


def like(tree, params, shardings, mesh):
  """Shardings for what hangs off the parameters (optimizer state, averages).

  A leaf whose path ends in a parameter's path and whose shape is that parameter's lies as it does;
  any other (a factored moment, a counter) is split by `fsdp` as its own shape allows.
  """
  known = {
    name(path): (x.shape, s)
    for (path, x), s in zip(
      jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
    )
  }

  def leaf(path, x):
    parts = name(path).split('/')
    for i in range(len(parts)):
      shape, sharding = known.get('/'.join(parts[i:]), (None, None))
      if shape == x.shape:
        return sharding
    return NamedSharding(mesh, _split(x.shape, mesh))

  return jax.tree_util.tree_map_with_path(leaf, tree)
