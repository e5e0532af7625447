"""The optimizer a config describes: any of optax's, with clipping and a mask of what decays."""

import re

import jax
import optax

from diffax import sharding
from diffax.build import build, ConfigError


def optimizer(config):
  """(optax transformation, learning rate as a function of the step) of a complete config.

  `optimizer.clip` > 0 clips the gradient's global norm first. A text as `optimizer.mask` is a
  pattern: parameters whose path it matches decay ('kernel' leaves biases and embeddings alone).
  """
  spec = dict(config['optimizer'])
  rate = build('optax.schedules', config['learning_rate'], path='learning_rate')
  if isinstance(spec.get('mask'), str):
    try:
      pattern = re.compile(spec['mask'])
    except re.error as error:
      raise ConfigError(f'config.optimizer.mask={spec["mask"]!r} is no pattern: {error}') from error
    spec['mask'] = lambda params: jax.tree_util.tree_map_with_path(
      lambda path, _: pattern.search(sharding.name(path)) is not None, params
    )
  tx = build('optax', spec, rate, path='optimizer', skip=('clip',))
  if not hasattr(tx, 'update'):
    raise ConfigError(
      f'config.optimizer.name={spec["name"]!r} is not an optimizer of optax; try adamw, adam, '
      'lion, sgd, adafactor'
    )
  if spec['clip'] < 0:
    raise ConfigError(f'config.optimizer.clip={spec["clip"]} is negative; 0 clips nothing')
  return (optax.chain(optax.clip_by_global_norm(spec['clip']), tx) if spec['clip'] else tx), rate
