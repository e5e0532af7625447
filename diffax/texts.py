"""From prompts to conditions: a tokenizer and an encoder, named in `config.text`.

A function `(source, ...) -> Text` gives what a task asks for:

  none      no text
  learned   a byte-level BPE of the data's own captions, and a small transformer that is trained
            along with the network: nothing to download
  clip      the encoders of a released model, one or two, frozen
  cached    what frozen encoders said of the captions of a latent data set

The null condition is data, the empty prompt, and a negative prompt is another.
"""

import hashlib
import os
from typing import Any, NamedTuple
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffax.build import build, ConfigError
from diffax.convert import single
from diffax.convert import tensors
from diffax.convert import text as stored
from diffax.data import parts
from diffax.data import tokenizers
from diffax.models import attention as attentions
from diffax.models import text as texts
from diffax.tasks import Frozen


class Text(NamedTuple):
  """How prompts become conditions.

  tokenize: [str, ...] -> {name: numpy [b ...]}, what a batch carries; pickles. encode: (groups of
  parameters, tokens) -> a part of {'text': [b n d], 'text_mask': [b n], 'pooled': [b d]}. init: key
  -> {group: parameters} that are trained along. frozen: {group: `tasks.Frozen`} of those that are
  not. channels, pooled: channels of 'text' and 'pooled', 0 for none. cut: prompt -> what of it is
  beyond the longest, '' for nothing. record: {file: text} that a run keeps, to be the same later.
  null: {name: numpy [1 ...]}, where batches carry such arrays of the records in place of tokens,
  those of the empty prompt; `encode` takes either. identity: () -> plain data that says what
  conditions are by; it reads files.
  """

  tokenize: Callable | None = None
  encode: Callable | None = None
  init: Callable = lambda key: {}
  frozen: dict = {}
  channels: int = 0
  pooled: int = 0
  cut: Callable = lambda prompt: ''
  record: dict = {}
  null: dict = {}
  identity: Callable = dict


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
  if getattr(source, 'captions', None) is None and not tokenizer:
    raise ValueError(
      'text=learned: this data has no captions; take data=emoji, or data=captioned with '
      '--config.data.path=DIR, a folder with captions.jsonl'
    )
  if tokenizer:
    with open(tokenizer, encoding='utf-8') as file:
      tokenizer = tokenizers.from_json(file.read())
  else:
    tokenizer = tokenizers.bpe(source.captions, vocab, length)
  length = tokenizer.length
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
    Tokenize((('tokens', tokenizer),)), encode, init, channels=width, pooled=width, cut=cut,
    record={'tokenizer.json': tokenizer.to_json()},
  )


def clip(source, path: str, zeros=False, dtype='float32', tokenizer='') -> Text:
  """CLIP's text encoders of a released model, frozen: Stable Diffusion's.

  path: a folder in diffusers' layout: those of tokenizer/ and text_encoder/, and of tokenizer_2/
  and text_encoder_2/ where they are; or a single file (`convert.single`), which holds no
  vocabulary: tokenizer is then a folder with CLIP's. With the second, as in SDXL (Podell et al.
  2023, sec. 2.1), 'text' is of both side by side, the last states but one, and 'pooled' of the
  second. zeros: whether the null condition, which is the empty prompt, is zeros in place of what is
  said of it, as SDXL was trained. dtype: of matrix products. Raises ConfigError.
  """
  del source
  found = weights(path)
  there = list(found)
  named = {
    f'text{n}': _clip(found[n], _tokenizer(path, n, tokenizer), '_2' in there, dtype)
    for n in there
  }

  def encode(groups, tokens):
    with attentions.using('auto'):  # few tokens, in causal order: not what a program is forced for
      said = [
        named[f'text{n}'].model.apply({'params': groups[f'text{n}']}, tokens[f'tokens{n}'])
        for n in there
      ]
    out = {'text': jnp.concatenate([one['text'] for one in said], axis=-1)}
    out |= {'pooled': said[-1]['pooled']}
    full = lambda x: jnp.reshape(~tokens['tokens_empty'], (-1, *[1] * (x.ndim - 1)))
    return jax.tree.map(lambda x: jnp.where(full(x), x, 0), out) if zeros else out

  last = named[f'text{there[-1]}'].model
  return Text(
    Tokenize(tuple((f'tokens{n}', named[f'text{n}'].tokenizer) for n in there)), encode,
    frozen={name: each.frozen for name, each in named.items()},
    channels=sum(each.model.width for each in named.values()),
    pooled=last.projection or last.width,
    cut=lambda prompt: next(iter(named.values())).tokenizer.encode([prompt])[2][0],
    identity=lambda: {
      'name': 'clip', 'zeros': zeros, 'dtype': dtype,
      'encoders': [each.identity() for each in named.values()]},
  )


def cached(source, of=None) -> Text:
  """Embeddings that `source`, a latent data set, holds of its captions; nothing is encoded.

  of: the text they were made by, whose encoders sampling then asks of any prompt. Without one there
  are none to load, and only captions of the data can be sampled. Raises ConfigError where the data
  holds no embeddings, or those of another text.
  """
  made = getattr(source, 'made', None)
  if made is None or not made['text']:
    raise ConfigError(
      'config.text=cached: this data holds no embeddings; encode it (--mode encode) with frozen '
      'encoders, as --config.text=clip, and take data=latents'
    )
  if of is not None and _without_dtype(of.identity()) != _without_dtype(made['text']):
    raise ConfigError(
      f'config.text.of: other encoders or tokenizers than those that made the embeddings of '
      f'{made["path"]}: name those, or encode anew'
    )
  null = parts.null(made['path'], made)

  def encode(groups, tokens):
    if null.keys() - tokens.keys():
      return of.encode(groups, tokens)
    floats = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return {name: floats(tokens[name]) for name in null}

  size = lambda name: null[name].shape[-1] if name in null else 0
  known = dict(channels=size('text'), pooled=size('pooled'), null=null, encode=encode)
  if of is not None:
    return of._replace(**known)
  number = {caption: i for i, caption in enumerate(source.captions)}

  def look(prompts):
    unknown = [prompt for prompt in prompts if prompt and prompt not in number]
    if unknown:
      raise ConfigError(
        f'config.text=cached: {unknown[0]!r} is no caption of the data; for other prompts name the '
        'encoders, as --config.text.of=clip --config.text.of.path=DIR'
      )
    asked = [source[number[p]] if p else {k: x[0] for k, x in null.items()} for p in prompts]
    return {name: np.stack([one[name] for one in asked]) for name in null}

  return Text(look, **known)


def _without_dtype(identity):
  return {k: v for k, v in identity.items() if k != 'dtype'}


def weights(path):
  """{'' or '_2': `tensors.Weights`} of the text encoders of a folder or single file.

  Raises ConfigError for one that holds none.
  """
  if not os.path.isdir(path):
    return single.texts(path)
  there = [n for n in ('', '_2') if os.path.isdir(os.path.join(path, f'text_encoder{n}'))]
  if not there:
    raise ConfigError(
      f'config.text.path={path}: no text_encoder/ there; name the folder of a released model'
    )
  return {n: stored.weights(os.path.join(path, f'text_encoder{n}')) for n in there}


def _tokenizer(path, number, folder):
  """The tokenizer of an encoder: of the model's own folder, for a single file's of `folder`."""
  whole = os.path.isdir(path)
  if whole == bool(folder):
    raise ConfigError(
      f'config.text.tokenizer={folder!r}: {path} ' + (
        'has tokenizers of its own: leave it out' if whole else
        "holds no vocabulary: name a folder with CLIP's, as the tokenizer/ of any Stable Diffusion "
        '(vocab.json, merges.txt, tokenizer_config.json)')
    )
  try:
    if whole:
      return tokenizers.clip(os.path.join(path, f'tokenizer{number}'))
    return single.padded(tokenizers.clip(folder), path, number)
  except ValueError as error:
    raise ConfigError(f'config.text: {error}') from error


class Encoder(NamedTuple):
  """One text encoder, frozen."""

  tokenizer: tokenizers.Tokenizer
  model: Any
  frozen: Frozen
  identity: Callable


def _clip(found, tokenizer, several, dtype):
  """The `Encoder` of its `tensors.Weights`."""
  spec = found.spec | {'dtype': dtype} | ({'skip': 1, 'norm': False} if several else {})
  model = build('diffax.models', spec, path='text')

  def like():
    tokens = jnp.zeros((1, model.length), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)['params']

  def identity():
    words = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
    config = stored.to_config(found.spec)
    return {'config': config, 'sha256': tensors.digest(found.files), 'tokenizer': words}

  load = lambda like: tensors.read(found, model, like)
  return Encoder(tokenizer, model, Frozen(like, load), identity)


class Tokenize(NamedTuple):
  """Tokenizers as a function of prompts, which pickles.

  of: ((name, tokenizer), ...). Gives NAME and NAME_mask [b n], and `tokens_empty` bool [b].
  """

  of: tuple

  def __call__(self, prompts):
    found = {'tokens_empty': np.asarray([prompt == '' for prompt in prompts])}
    for name, tokenizer in self.of:
      found[name], found[f'{name}_mask'], _ = tokenizer.encode(list(prompts))
    return found
