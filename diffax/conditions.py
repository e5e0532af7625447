"""What a network is told beside x and its noise level: labels and text, in training and sampling.

In training a condition is now and then replaced by the null condition, for classifier-free guidance
(Ho & Salimans 2022, algorithm 1); in sampling guidance compares the two, and a negative prompt
takes the null's place.
"""

from typing import NamedTuple
from collections.abc import Callable

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from diffax.build import ConfigError


class Conditions(NamedTuple):
  """classes: of labels, 0 for none. text: a `texts.Text`. captions: of the data, None for none.
  given: a `givens.Given`. encode: (groups, pictures, keys) -> z; mean: (groups, pictures) -> the
  mean of what is encoded, before shift and scale. factor: pixels a side of what x has one of. told:
  names in cond that the network takes. pixels: [h w c] of the pictures. sizes: how many numbers
  cond['size'] has; five are for a network told of an aesthetic score in place of the last two.
  """

  classes: int
  text: tuple
  captions: tuple | None
  given: tuple
  encode: Callable
  mean: Callable
  factor: int
  told: tuple
  pixels: tuple
  sizes: int = 6

  @property
  def any(self):
    return bool(self.told)


SCORED = 5  # numbers in cond['size'], the last a score; Podell et al. 2023, "SDXL", sec. 2.5
TOLD = {  # of names in cond, the options of a network by which it takes them
  'label': ('classes',), 'text': ('text',), 'text_mask': ('text',), 'pooled': ('pooled',),
  'size': ('sizes', 'resolution'), 'image': ('image',), 'mask': ('mask',),
  'noise_level': ('noise_levels',),
}  # fmt: skip


def option(model, name):
  """What a Linen module says of an option of its, 0 where it has none of that name."""
  return getattr(model, name, None) or getattr(getattr(model, 'design', None), name, None) or 0


def taken(model):
  """The names in cond that a network takes."""
  return tuple(k for k, options in TOLD.items() if any(option(model, o) for o in options))


def check(config, model, text, given, shape):
  """Raises ConfigError where a network takes other conditions than the config gives."""
  name = config['model']['name']
  extra = shape[-1] * bool(given.show) + given.extra
  for field, has, of in (
    ('text', text.channels, 'text'), ('pooled', text.pooled, 'text'), ('image', extra, 'given'),
  ):
    wants, said = option(model, field), config[of]['name']
    if wants and wants != has:
      raise ConfigError(
        f'config.model.{field}={wants} of {name}, but config.{of}={said!r} gives {has} channels: '
        f'say --config.model.{field}={has}, or another --config.{of}'
      )
    if has and not wants and field != 'pooled':
      raise ConfigError(
        f'config.{of}={said!r} is there, and the model {name} is not told of it: say '
        f'--config.model.{field}={has}, with a model that has this option'
      )
  levels = option(model, 'noise_levels')
  if bool(levels) != given.apart or given.noise > levels > 0:
    raise ConfigError(
      f'config.model.noise_levels={levels} of {name}, but config.given={config["given"]["name"]!r} '
      f'tells {f"levels up to {given.noise}" if given.apart else "none"}: say --config.given=noised'
    )


def example(conditions, model, shape):
  """What a network is shown to be made for: cond of one example, beside x of `shape` [h w c]."""
  size = lambda field: option(model, field)
  cond = {
    'label': jnp.zeros(1, jnp.int32),
    'text': jnp.zeros((1, 1, size('text'))),
    'text_mask': jnp.ones((1, 1), jnp.int32),
    'pooled': jnp.zeros((1, size('pooled'))),
    'size': jnp.ones((1, int(size('sizes')) or 6)),
    'image': jnp.zeros((1, *shape[:-1], size('image'))),
    'mask': jnp.zeros((1, *shape[:-1], 1)),
    'noise_level': jnp.zeros(1, jnp.int32),
  }
  return {name: cond[name] for name in conditions.told}


def _taken(conditions, cond):
  return {name: x for name, x in cond.items() if name in conditions.told}


def training(conditions, groups, batch, keys, drop):
  """cond [b ...] of a batch; where `drop` [b] is true, the null condition.

  groups: {name: parameters} that a text encoder may find its own in. keys: [b], for what is given.
  """
  cond, text, given = {}, conditions.text, conditions.given
  if conditions.sizes == SCORED:
    raise ConfigError(
      'config.model.sizes=5 is of a network told aesthetic scores, as the refiner of Stable '
      'Diffusion XL, of which no data here tells any: it samples, and trains not'
    )
  size = _size(*conditions.pixels[:2])
  cond['size'] = batch.get('size', jnp.broadcast_to(size, (len(drop), 6)))
  if conditions.classes:
    cond['label'] = jnp.where(drop, conditions.classes, batch['label'])
  if text.encode:
    null = text.null or text.tokenize([''])
    tokens = {k: jnp.where(_wide(drop, batch[k]), null[k], batch[k]) for k in null}
    cond |= text.encode(groups, tokens)
  if given.train:
    draw, hide = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 2))(keys), 1, 0)
    shown = _shown(conditions, groups, given.train(batch['image'], draw), draw)
    hidden = jax.vmap(lambda key: jax.random.bernoulli(key, given.drop))(hide)
    cond |= shown | {'image': jnp.where(_wide(hidden, shown['image']), 0, shown['image'])}
  return _taken(conditions, cond)


def _size(h, w):
  """The six numbers of a picture neither scaled nor cut; Podell et al. 2023, "SDXL", sec. 2.2."""
  return jnp.asarray([h, w, 0, 0, h, w], jnp.int32)


def _shown(conditions, groups, shown, keys):
  """What is given, in the space that the network denoises in."""
  if conditions.given.latent:
    z = conditions.mean(groups, shown['image']) if conditions.given.mean \
      else conditions.encode(groups, shown['image'], keys)
    shown = {**shown, 'image': z}
  if 'mask' in shown:
    shown = {**shown, 'mask': smaller_mask(shown['mask'], conditions.factor)}
  return shown


def smaller_mask(mask, factor):
  """[b H W 1] -> [b h w 1], of each square of `factor` pixels its first, as diffusers' has it."""
  return mask[:, ::factor, ::factor]


def _wide(flag, x):
  return jnp.reshape(flag, (-1, *[1] * (x.ndim - 1)))


def asking(conditions, settings, path, prompts, others):
  """The function int [b] -> {name: numpy [b ...]} of what is asked of samples by their numbers.

  settings: a `sample` section; its labels, and `prompts`, are taken in turn. others: {name: prompt}
  of which an edit needs the conditions. Raises ConfigError.
  """
  labels(settings['labels'], np.arange(1), conditions.classes)
  text = conditions.text
  if not text.encode and (prompts or settings['negative']):
    raise ConfigError(
      f'config.{path}: prompts={prompts}, negative={settings["negative"]!r}: this model takes no '
      'text; train one with --config.text.name=learned and data with captions'
    )
  if text.encode and not prompts and not conditions.captions:
    raise ConfigError(
      f'config.{path}.prompts=(): the data has no captions to take in turn; say --prompt "..."'
    )
  others = {'null': settings['negative'], **others} if text.encode else {}
  for prompt in {*prompts, *others.values()}:
    if text.encode and text.cut(prompt):
      logging.warning('the prompt is too long, %r is cut off: %r', text.cut(prompt), prompt)

  def ask(index):
    asked = {}
    if conditions.classes:
      asked['label'] = labels(settings['labels'], index, conditions.classes).astype(np.int32)
    if text.encode:
      asked['tokens'] = text.tokenize(said(conditions, prompts, index))
    asked |= {f'tokens_{k}': text.tokenize([v] * len(index)) for k, v in others.items()}
    return asked

  return ask


def said(conditions, prompts, index):
  """The prompt of each sample: `prompts` in turn, else captions of the data, [] where no text is.
  """
  if not conditions.text.encode:
    return []
  among = prompts or conditions.captions
  return [among[i % len(among)] for i in index]


def sampling(conditions, groups, asked, keys, size, aesthetic):
  """{'cond': cond, 'null': cond, ...}, each [b ...], of what `asking` and an edit's `ask` gave.

  keys: [b], for what is given. size: (h, w) of the pictures that are drawn. aesthetic: (score of
  cond, of null), for networks told one.
  """
  found, b = {'cond': {}, 'null': {}}, len(keys)
  if conditions.classes:
    found['cond']['label'] = asked['label']
    found['null']['label'] = jnp.full_like(asked['label'], conditions.classes)
  if conditions.text.encode:
    names = [k for k in asked if k.startswith('tokens')]
    both = jax.tree.map(lambda *xs: jnp.concatenate(xs), *(asked[k] for k in names))
    encoded = conditions.text.encode(groups, both)
    for i, name in enumerate(names):
      part = jax.tree.map(lambda x, i=i: x[i * b : (i + 1) * b], encoded)
      name = name.partition('_')[2] or 'cond'
      found[name] = found.get(name, {}) | part
  shared = {}
  for name, cond in found.items():
    said = _size(*size)
    if conditions.sizes == SCORED:
      said = jnp.append(said[:4].astype(jnp.float32), aesthetic[name == 'null'])
    cond['size'] = jnp.broadcast_to(said, (b, len(said)))
  if conditions.given.show:
    record = asked.get('record')  # of the data, where the user gives no picture
    given = conditions.given
    shown = given.show(asked, keys) if record is None else given.train(record, keys)
    shared |= _shown(conditions, groups, shown, keys)
  return {name: _taken(conditions, cond | shared) for name, cond in found.items()}


def labels(wanted, index, classes):
  """A label for each sample index: 'balanced', or labels to take in turn, as '3' or '0,1,7'."""
  if wanted == 'balanced':
    return index % max(classes, 1)
  try:
    chosen = [int(label) for label in wanted.split(',')]
  except ValueError:
    chosen = [-1]
  if not classes or min(chosen) < 0 or max(chosen) >= classes:
    raise ConfigError(
      f"labels={wanted!r}: 'balanced', or labels of 0 to {classes - 1} with commas between"
      if classes
      else f"labels={wanted!r}: this model knows no labels; only 'balanced' is allowed"
    )
  return np.asarray(chosen)[index % len(chosen)]
