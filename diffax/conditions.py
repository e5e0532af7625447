"""What a network is told beside x and its noise level: labels and text, in training and sampling.

In training a condition is now and then replaced by the null condition, for classifier-free guidance
(Ho & Salimans 2022, algorithm 1); in sampling guidance compares the two, and a negative prompt
takes the null's place.
"""

from typing import NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from diffax.build import ConfigError


class Conditions(NamedTuple):
  """classes: of labels, 0 for none. text: a `texts.Text`. captions: of the data, None for none."""

  classes: int
  text: tuple
  captions: tuple | None

  @property
  def any(self):
    return bool(self.classes or self.text.encode)


def example(conditions):
  """What a network is shown to be made for: cond of one example."""
  cond = {'label': jnp.zeros(1, jnp.int32)} if conditions.classes else {}
  text = conditions.text
  if text.channels:
    cond |= {'text': jnp.zeros((1, 1, text.channels)), 'text_mask': jnp.ones((1, 1), jnp.int32)}
  if text.pooled:
    cond |= {'pooled': jnp.zeros((1, text.pooled))}
  return cond


def training(conditions, groups, batch, drop):
  """cond [b ...] of a batch; where `drop` [b] is true, the null condition.

  groups: {name: parameters} that a text encoder may find its own in.
  """
  cond = {}
  if conditions.classes:
    cond['label'] = jnp.where(drop, conditions.classes, batch['label'])
  if conditions.text.encode:
    null = conditions.text.tokenize([''])
    tokens = {k: jnp.where(_wide(drop, batch[k]), null[k], batch[k]) for k in null}
    cond |= conditions.text.encode(groups, tokens)
  return cond


def _wide(flag, x):
  return jnp.reshape(flag, (-1, *[1] * (x.ndim - 1)))


def asking(conditions, settings, path):
  """The function int [b] -> {name: numpy [b ...]} of what is asked of samples by their numbers.

  settings: a `sample` section; its labels, or prompts, are taken in turn. Raises ConfigError.
  """
  labels(settings['labels'], np.arange(1), conditions.classes)
  text, prompts = conditions.text, tuple(settings['prompts'])
  if not text.encode and (prompts or settings['negative']):
    raise ConfigError(
      f'config.{path}: prompts={prompts}, negative={settings["negative"]!r}: this model takes no '
      'text; train one with --config.text.name=learned and data with captions'
    )
  if text.encode and not prompts and not conditions.captions:
    raise ConfigError(
      f'config.{path}.prompts=(): the data has no captions to take in turn; say --prompt "..."'
    )
  for prompt in {*prompts, settings['negative']}:
    if text.encode and text.cut(prompt):
      logging.warning('the prompt is too long, %r is cut off: %r', text.cut(prompt), prompt)

  def ask(index):
    asked = {'label': labels(settings['labels'], index, conditions.classes).astype(np.int32)}
    asked = asked if conditions.classes else {}
    if text.encode:
      asked |= text.tokenize(said(conditions, prompts, index))
      null = text.tokenize([settings['negative']] * len(index))
      asked |= {f'null_{k}': v for k, v in null.items()}
    return asked

  return ask


def said(conditions, prompts, index):
  """The prompt of each sample: `prompts` in turn, else captions of the data, [] where no text is.
  """
  if not conditions.text.encode:
    return []
  among = prompts or conditions.captions
  return [among[i % len(among)] for i in index]


def sampling(conditions, groups, asked):
  """(cond, null), each [b ...], of what `asking` gave."""
  cond, null = {}, {}
  if conditions.classes:
    cond['label'] = asked['label']
    null['label'] = jnp.full_like(asked['label'], conditions.classes)
  if conditions.text.encode:
    names = [k.removeprefix('null_') for k in asked if k.startswith('null_')]
    both = {k: jnp.concatenate([asked[k], asked[f'null_{k}']]) for k in names}
    encoded = conditions.text.encode(groups, both)
    half = len(asked[names[0]])
    cond |= jax.tree.map(lambda x: x[:half], encoded)
    null |= jax.tree.map(lambda x: x[half:], encoded)
  return cond, null


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
