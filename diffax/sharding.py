"""Where arrays lie: one mesh, one table of rules for parameters, logical names for activations.

Mesh axes: `data` splits the batch; `fsdp` splits the batch and the parameters, which are gathered
as they are used (Rajbhandari et al. 2020, "ZeRO", stage 3).
"""

import contextlib
import re

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np

from diffax.build import ConfigError
from diffax.models import layers

BATCH = ('data', 'fsdp')
ACTIVATIONS = (('batch', BATCH), ('tokens', None), ('width', None))
SMALLEST = 2**12  # elements; what is smaller stays whole on each device


def make_mesh(axes):
  """A mesh of every device. axes: {'data': n, 'fsdp': n}; one -1 takes what is left.

  Raises ConfigError where the sizes do not multiply to the number of devices.
  """
  devices, sizes = jax.device_count(), dict(axes)
  free = [k for k, n in sizes.items() if n == -1]
  rest = int(np.prod([n for n in sizes.values() if n != -1]))
  if len(free) == 1 and rest > 0:
    sizes[free[0]] = devices // rest
  if len(free) > 1 or min(sizes.values()) < 1 or int(np.prod(list(sizes.values()))) != devices:
    raise ConfigError(
      f'mesh={axes} does not fit {devices} devices: sizes must multiply to {devices}, and one '
      'may be -1'
    )
  return jax.make_mesh(
    tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
  )


@contextlib.contextmanager
def using(mesh):
  """Within it, models lay out their activations on `mesh`."""
  with jax.set_mesh(mesh), layers.layout(ACTIVATIONS):
    yield


def batch(mesh):
  """The first axis over the whole mesh."""
  return NamedSharding(mesh, P(BATCH))


def replicated(mesh):
  return NamedSharding(mesh, P())


def fsdp(shape, mesh):
  """Splits the longest axis that divides evenly over `fsdp`; small arrays stay whole."""
  n = mesh.shape['fsdp']
  fits = [i for i in np.argsort(shape, kind='stable')[::-1] if shape[i] % n == 0]
  if n == 1 or np.prod(shape) < SMALLEST or not fits:
    return P()
  return P(*['fsdp' if i == fits[0] else None for i in range(len(shape))])


def name(path):
  """A leaf's path as text, 'net/blocks/query/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def parameters(tree, mesh, rules):
  """A sharding for each parameter, by the first rule `(pattern, 'fsdp' or axes)` its path matches.

  Raises ConfigError for a parameter no rule matches, a rule that matches nothing, or a rule that
  does not fit the parameter's shape.
  """
  unused = {pattern for pattern, _ in rules}

  def leaf(path, x):
    path = name(path)
    found = next(((pattern, rule) for pattern, rule in rules if re.search(pattern, path)), None)
    if found is None:
      raise ConfigError(
        f"config.sharding: no rule matches parameter {path!r}; end the rules with ('.*', 'fsdp')"
      )
    unused.discard(found[0])
    spec = fsdp(x.shape, mesh) if found[1] == 'fsdp' else P(*found[1])
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
  return shardings


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
    return NamedSharding(mesh, fsdp(x.shape, mesh))

  return jax.tree_util.tree_map_with_path(leaf, tree)
