"""The optimizer a config describes: any of optax's, with clipping, a mask of what decays, and
kernels held at unit variance."""

import re

import jax
import jax.numpy as jnp
import optax

from diffax import sharding
from diffax.build import build, ConfigError, near


def optimizers(config, phases):
  """({phase: transformation}, {phase: learning rate}) for names of phases; for none, `optimizer`'s.

  Raises ConfigError for an optimizer of a phase that is not there.
  """
  known = phases[1:]
  for name in config['phases']:
    if name not in known:
      raise ConfigError(
        f'config.phases.{name}: {_phases(config["task"]["name"], phases)}; {near(name, known)}'
      )
  if not phases:
    return optimizer(config)
  made = {name: optimizer(config, name) for name in phases}
  return tuple({name: each[i] for name, each in made.items()} for i in range(2))


def _phases(task, phases):
  if not phases:
    return f'the task {task!r} has no phases'
  return (
    f'no phase of the task {task!r} that has an optimizer of its own; that of its first, '
    f'{phases[0]!r}, is config.optimizer'
  )


def optimizer(config, phase=''):
  """(optax transformation, learning rate as a function of the step) of a complete config.

  phase: of whose section of `config.phases`, where that says one, else the config's own.

  `optimizer.clip` > 0 clips the gradient's global norm first. A text as `optimizer.mask` is a
  pattern: parameters whose path it matches decay ('kernel' leaves biases and embeddings alone).
  `optimizer.unit_kernels` is one, too: see `unit_kernels`.
  """
  said = config['phases'].get(phase, {})
  place = lambda key: f'phases.{phase}.{key}' if key in said else key
  part = {key: said.get(key, config[key]) for key in ('optimizer', 'learning_rate')}
  spec, path = dict(part['optimizer']), place('optimizer')
  rate = build('optax.schedules', part['learning_rate'], path=place('learning_rate'))
  if isinstance(spec.get('mask'), str):
    decays = _matcher(spec['mask'], f'{path}.mask')
    spec['mask'] = lambda params: jax.tree_util.tree_map_with_path(
      lambda path, _: decays(path), params
    )
  tx = build('optax', spec, rate, path=path, skip=('clip', 'unit_kernels'))
  if not hasattr(tx, 'update'):
    raise ConfigError(
      f'config.{path}.name={spec["name"]!r} is not an optimizer of optax; try adamw, adam, '
      'lion, sgd, adafactor'
    )
  if spec['clip'] < 0:
    raise ConfigError(f'config.{path}.clip={spec["clip"]} is negative; 0 clips nothing')
  before = [optax.clip_by_global_norm(spec['clip'])] if spec['clip'] else []
  after = [unit_kernels(spec['unit_kernels'])] if spec['unit_kernels'] else []
  return (optax.chain(*before, tx, *after) if before or after else tx), rate


def _matcher(pattern, key):
  """A function of a parameter's path: whether the pattern matches it. Raises ConfigError."""
  try:
    compiled = re.compile(pattern)
  except re.error as error:
    raise ConfigError(f'config.{key}={pattern!r} is no pattern: {error}') from error
  return lambda path: compiled.search(sharding.name(path)) is not None


def unit_kernels(pattern):
  """Forced weight normalisation: an optax transformation that stands last in a chain.

  After each update the kernels whose path the pattern matches, [... in out], have filters [in] of
  unit variance (norm sqrt(in)). For networks that divide by a filter's norm themselves
  (`models.edm2`): the update then turns a filter and never lengthens it, at an angle that the
  learning rate alone decides. Karras et al. 2024, "Analyzing and Improving the Training Dynamics",
  eq. 66 and algorithm 1. Raises ConfigError for no pattern; at `init`, for one that matches nothing
  or what is no kernel.
  """
  matches = _matcher(pattern, 'optimizer.unit_kernels')

  def init(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {sharding.name(path): leaf.shape for path, leaf in leaves if matches(path)}
    if not found:
      known = sorted({sharding.name(path[-1:]) for path, _ in leaves})
      raise ConfigError(
        f'config.optimizer.unit_kernels={pattern!r} matches no parameter; their paths end in '
        f'{", ".join(known)}'
      )
    flat = [path for path, shape in found.items() if len(shape) < 2]
    if flat:
      raise ConfigError(
        f'config.optimizer.unit_kernels={pattern!r} matches {flat[0]!r} of shape '
        f'{found[flat[0]]}, which is no kernel [in out]'
      )
    return optax.EmptyState()

  def update(updates, state, params):
    def change(path, update, param):
      if not matches(path):
        return update
      moved = param + update
      return moved * jax.lax.rsqrt(jnp.mean(moved**2, axis=-2, keepdims=True)) - param

    return jax.tree_util.tree_map_with_path(change, updates, params), state

  return optax.GradientTransformation(init, update)


def inverse_sqrt(peak_value: float, reference_steps: int = 70_000, warmup_steps: int = 0):
  """A learning rate constant up to `reference_steps` and falling as 1 / sqrt(step) from there.

  Over the first `warmup_steps` it rises from 0. Unlike cosine it knows no last step, and suits
  kernels held at unit variance, whose updates nothing else makes smaller. In a config:
  `learning_rate=dict(name='diffax.optim.inverse_sqrt', peak_value=0.01)`. Raises ValueError for
  fewer reference steps than 1 or warm-up steps than 0. Karras et al. 2024, "Analyzing and Improving
  the Training Dynamics", eq. 67; there steps are of 2048 images, and the first 10 M warm up.
  """
  for name, steps, least in (('reference', reference_steps, 1), ('warmup', warmup_steps, 0)):
    if steps < least:
      raise ValueError(f'inverse_sqrt: {name}_steps={steps} is less than {least}')

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    fall = jax.lax.rsqrt(jnp.maximum(step / reference_steps, 1.0))
    rise = jnp.minimum(step / warmup_steps, 1.0) if warmup_steps else 1.0
    return peak_value * fall * rise

  return rate
