"""From prompts to conditions: a tokenizer and an encoder, named in `config.text`.

A function `(source, ...) -> Text` gives what a task asks for:

  none      no text
  learned   a byte-level BPE of the data's own captions, and a small transformer that is trained
            along with the network: nothing to download

The null condition is data, the empty prompt, and a negative prompt is another.
"""

from typing import NamedTuple
from collections.abc import Callable

import jax.numpy as jnp

from diffax.data import tokenizers
from diffax.models import text as texts


class Text(NamedTuple):
  """How prompts become conditions.

  tokenize: [str, ...] -> {name: numpy [b ...]}, what a batch carries; pickles. encode: (groups of
  parameters, tokens) -> a part of {'text': [b n d], 'text_mask': [b n], 'pooled': [b d]}. init: key
  -> {group: parameters} that are trained along. frozen: {group: `tasks.Frozen`} of those that are
  not. channels, pooled: channels of 'text' and 'pooled', 0 for none. cut: prompt -> what of it is
  beyond the longest, '' for nothing. record: {file: text} that a run keeps, to be the same later.
  """

  tokenize: Callable | None = None
  encode: Callable | None = None
  init: Callable = lambda key: {}
  frozen: dict = {}
  channels: int = 0
  pooled: int = 0
  cut: Callable = lambda prompt: ''
  record: dict = {}


def none(source) -> Text:
  """No text."""
  del source
  return Text()


def learned(source, vocab=2048, length=32, width=256, depth=4, heads=4, tokenizer='') -> Text:
  """Trained with the network on the captions of `source`, which the tokenizer is made of.

  vocab: tokens at the most. length: tokens of a prompt at the most, with its ends. width, depth,
  heads: of the transformer, whose states are 'text' [b length width], the last one 'pooled'.
  tokenizer: a file of one, '' to make it of the captions; a run keeps its own. Raises ValueError
  where the data has no captions.
  """
  if getattr(source, 'captions', None) is None:
    raise ValueError(
      'text=learned: this data has no captions; take data=emoji, or data=captioned with '
      '--config.data.path=DIR, a folder with captions.jsonl'
    )
  if tokenizer:
    with open(tokenizer, encoding='utf-8') as file:
      tokenizer = tokenizers.from_json(file.read())
  else:
    tokenizer = tokenizers.bpe(source.captions, vocab, length)
  model = texts.clip_text(
    vocab=tokenizer.vocab, length=length, width=width, depth=depth, heads=heads, hidden=4 * width,
    activation='gelu', causal=False, end=tokenizer.end,
  )

  def init(key):
    tokens = jnp.zeros((1, length), jnp.int32)
    return {'text': model.init(key, tokens, jnp.ones_like(tokens))['params']}

  def encode(groups, tokens):
    said = model.apply({'params': groups['text']}, tokens['tokens'], tokens['tokens_mask'])
    return {**said, 'text_mask': tokens['tokens_mask']}

  def cut(prompt):
    return tokenizer.encode([prompt])[2][0]

  return Text(
    Tokenize(tokenizer), encode, init, channels=width, pooled=width, cut=cut,
    record={'tokenizer.json': tokenizer.to_json()},
  )


class Tokenize(NamedTuple):
  """A tokenizer as a function of prompts, which pickles."""

  tokenizer: tokenizers.Tokenizer

  def __call__(self, prompts):
    tokens, mask, _ = self.tokenizer.encode(list(prompts))
    return {'tokens': tokens, 'tokens_mask': mask}
