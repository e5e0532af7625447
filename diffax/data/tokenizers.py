"""From text to tokens: byte-pair encodings, read from a released model's folder or learned here.

A word is a sequence of bytes, of which the pair seen most often is joined again and again; Sennrich
et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", alg. 1, over bytes as in
Radford et al. 2019, so that there is no text without tokens. A row of tokens is

  start, of the text, end, pad, pad, ...

The empty text is a text as any other: it is the null condition of guidance. The work is done by the
package `tokenizers`; files are JSON and text, and nothing in them is run.
"""

import dataclasses
import functools
import json
import os

import numpy as np

LARGEST = 2**26  # bytes of a file; CLIP's are below four million
START, END = '<|startoftext|>', '<|endoftext|>'  # CLIP's
SPECIAL = ('bos_token', 'eos_token', 'unk_token', 'pad_token')
CONFIG, MAP, ADDED = 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json'
CLIP_WORDS = (  # Radford et al. 2021: github.com/openai/CLIP, simple_tokenizer.py
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """What turns text into rows of `length` tokens and back; data alone, so that it pickles.

  model: JSON of the package's own, without the three tokens that stand around a text. vocab: how
  many tokens there are, these three too. start, end, pad: their ids; of released models pad may be
  end, or a token that texts have as well.
  """

  model: str = dataclasses.field(repr=False)
  length: int
  vocab: int
  start: int
  end: int
  pad: int

  def encode(self, texts):
    """[text, ...] -> (tokens int32 [b length], mask int32 [b length], cut).

    mask: 0 where there is padding. cut: what of each text did not fit, '' where nothing: whoever
    wrote it is to be told. Raises ValueError for what is no list of texts.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
      raise ValueError(f'texts={texts!r:.80} is no list of texts')
    model, room = _parsed(self.model), self.length - 2
    tokens = np.full((len(texts), self.length), self.pad, np.int32)
    mask, cut = np.zeros_like(tokens), []
    for i, text in enumerate(texts):
      text = text.encode('utf-8', 'replace').decode()  # halves of characters are none
      found = model.encode(text, add_special_tokens=False)
      row = [self.start, *found.ids[:room], self.end]
      tokens[i, : len(row)], mask[i, : len(row)] = row, 1
      cut.append(text[found.offsets[room][0] :].strip(' ') if len(found.ids) > room else '')
    return tokens, mask, cut

  def decode(self, tokens):
    """[b n] -> [text, ...], up to the first `end` of each; as it was normalised, in lower case."""
    model, texts = _parsed(self.model), []
    for row in np.asarray(tokens).tolist():
      row = row[: row.index(self.end)] if self.end in row else row
      text = model.decode([i for i in row if i != self.start], skip_special_tokens=False)
      texts.append(text.replace(model.model.end_of_word_suffix or ' ', ' ').strip(' '))
    return texts

  def to_json(self):
    """The whole of it as text, for a file; `from_json` undoes it."""
    return _dumps(dataclasses.asdict(self) | {'model': json.loads(self.model)})


def from_json(text) -> Tokenizer:
  """Undoes `Tokenizer.to_json`. Raises ValueError for another text."""
  fields = [field.name for field in dataclasses.fields(Tokenizer)]
  try:
    said = json.loads(text)
    if sorted(said) != sorted(fields):
      raise ValueError(f'it says {", ".join(sorted(said))}, not {", ".join(sorted(fields))}')
    sizes = [said[k] for k in ('length', 'vocab', 'start', 'end', 'pad')]
    if not all(type(n) is int and n >= 0 for n in sizes) or max(sizes[2:]) >= sizes[1]:
      raise ValueError(f'length, vocab, start, end, pad = {sizes} cannot be')
    made = Tokenizer(**said | {'model': _dumps(said['model'])})
    _parsed(made.model)
    return made
  except (ValueError, TypeError, RecursionError) as error:
    raise ValueError(f'this is no file of a tokenizer ({_line(error)}): write it again') from error


def _dumps(value):
  return json.dumps(value, ensure_ascii=False, separators=(',', ':'))


def _line(error):
  return ' '.join(str(error).split())[:200]


@functools.lru_cache(maxsize=8)
def _parsed(model):
  """The package's object; it is made anew in each process, once."""
  import tokenizers

  try:
    return tokenizers.Tokenizer.from_str(model)
  except Exception as error:  # the package raises no other
    raise ValueError(f'the tokenizer cannot be built ({_line(error)})') from error


# --- learned from captions ------------------------------------------------------------------------


def bpe(captions, vocab=2048, length=32) -> Tokenizer:
  """A byte-level encoding learned from the captions of a data set, in whatever order they are.

  captions: any iterable of texts. vocab: tokens at most; there are fewer where no pair of bytes is
  seen twice. length: of a row. Case, runs of white space and forms of accents are evened out, as by
  CLIP. Raises ValueError for a vocab that does not hold all bytes, a length without room for a word
  and captions that are none.
  """
  import tokenizers
  from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

  alphabet = pre_tokenizers.ByteLevel.alphabet()
  if vocab < len(alphabet) + 3 or length < 3:
    raise ValueError(
      f'vocab={vocab}, length={length}: there are {len(alphabet)} bytes and three tokens around a '
      f'text, so that vocab is at least {len(alphabet) + 3}, length at least 3'
    )
  captions = [text.encode('utf-8', 'replace').decode() for text in captions]
  if not captions:
    raise ValueError('there are no captions to learn a vocabulary from')
  model = tokenizers.Tokenizer(models.BPE())
  model.normalizer = normalizers.Sequence([*_evened(), normalizers.Strip()])
  # a word behind a space and one that begins the text are the same word
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
  model.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab - 3, min_frequency=2, initial_alphabet=alphabet, show_progress=False
  )
  model.train_from_iterator(captions, trainer)
  size = model.get_vocab_size()
  pad, start, end = range(size, size + 3)  # the end has the largest id, as CLIP's
  return Tokenizer(_dumps(json.loads(model.to_str())), length, size + 3, start, end, pad)


def _evened():
  """CLIP's normal form: accents and letters as one, white space as a space, lower case."""
  from tokenizers import Regex, normalizers

  return [normalizers.NFC(), normalizers.Replace(Regex(r'\s+'), ' '), normalizers.Lowercase()]


# --- CLIP's ---------------------------------------------------------------------------------------


def clip(path) -> Tokenizer:
  """CLIP's, from the tokenizer's folder of a released model: equal to transformers' CLIPTokenizer.

  path: holds tokenizer.json, or vocab.json and merges.txt, and what says the padding. Raises
  ValueError, a line that names the file, for one that is missing, broken, too large, or of another
  kind of tokenizer.
  """
  import tokenizers
  from tokenizers import Regex, decoders, models, pre_tokenizers

  path = os.fspath(path)
  vocab, merges = _vocabulary(path)
  special, added, length = _special(path)
  missing = sorted({token['content'] for token in added} - vocab.keys())
  if missing:
    raise ValueError(f'{path}: tokens {", ".join(missing)} are not in the vocabulary')
  try:
    model = tokenizers.Tokenizer(models.BPE(
      vocab, merges, unk_token=special['unk_token'], continuing_subword_prefix='',
      end_of_word_suffix='</w>',
    ))
    model.add_tokens([tokenizers.AddedToken(**token) for token in added])
  except Exception as error:  # the package raises no other
    raise ValueError(f'{path}: the tokenizer cannot be built ({_line(error)})') from error
  model.normalizer = tokenizers.normalizers.Sequence(_evened())
  model.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(CLIP_WORDS), behavior='removed', invert=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
  ])
  model.decoder = decoders.ByteLevel()
  start, end, pad = (vocab[special[k]] for k in ('bos_token', 'eos_token', 'pad_token'))
  return Tokenizer(_dumps(json.loads(model.to_str())), length, len(vocab), start, end, pad)


def clip_files(tokenizer):
  """{file: text} of a folder that `clip`, and transformers' CLIPTokenizer, make the same of."""
  model = json.loads(tokenizer.model)
  vocab, merges = model['model']['vocab'], model['model']['merges']
  tokens = {i: token for token, i in vocab.items()}
  of = dict(bos_token=tokenizer.start, eos_token=tokenizer.end, pad_token=tokenizer.pad)
  special = {k: tokens[i] for k, i in of.items()} | dict(unk_token=model['model']['unk_token'])
  added = {str(t['id']): {k: v for k, v in t.items() if k != 'id'} for t in model['added_tokens']}
  config = dict(
    special, added_tokens_decoder=added, do_lower_case=True, model_max_length=tokenizer.length,
    tokenizer_class='CLIPTokenizer')
  lines = ['#version: 0.2', *(' '.join(pair) for pair in merges)]
  return {
    'vocab.json': _dumps(vocab), 'merges.txt': '\n'.join(lines) + '\n', CONFIG: _dumps(config),
    MAP: _dumps(special),
  }


def _vocabulary(path):
  """({token: id}, [(left, right), ...]) of a folder."""
  there = sorted(os.listdir(path)) if os.path.isdir(path) else []
  if 'tokenizer.json' in there:
    name = 'tokenizer.json'
    model = _json(path, name).get('model')
    if not isinstance(model, dict) or model.get('type') not in (None, 'BPE'):
      raise ValueError(f"{path}/{name} is no byte-pair encoding, as CLIP's is")
    vocab, merges = model.get('vocab'), model.get('merges')
  elif 'vocab.json' in there and 'merges.txt' in there:
    name = 'vocab.json, merges.txt'
    vocab = _json(path, 'vocab.json')
    merges = [m for m in _read(path, 'merges.txt').split('\n') if m and m[:8] != '#version']
  else:
    what = ', '.join(there[:8]) or 'nothing'
    raise ValueError(
      f"{path} is no folder of a CLIP tokenizer: there is {what}, and neither tokenizer.json nor "
      'vocab.json with merges.txt; name the folder that holds them'
    )
  if not isinstance(vocab, dict) or not isinstance(merges, list):
    raise ValueError(f'{path}/{name} holds no vocabulary with its merges')
  ids = [i for i in vocab.values() if type(i) is int]
  if sorted(ids) != list(range(len(vocab))):
    raise ValueError(f'{path}/{name}: ids of the vocabulary are not 0 to {len(vocab) - 1}')
  pairs = [m.split(' ') if isinstance(m, str) else m for m in merges]
  for m in pairs:
    if not isinstance(m, list) or len(m) != 2 or not all(isinstance(part, str) for part in m):
      raise ValueError(f'{path}/{name}: {m!r:.80} is no pair of tokens to merge')
  return vocab, [tuple(m) for m in pairs]


def _special(path):
  """({'pad_token': content, ...}, [AddedToken's arguments, ...], length), as transformers reads it.

  special_tokens_map.json goes before tokenizer_config.json, but for a folder that was written when
  the latter had begun to hold all (`added_tokens_decoder`).
  """
  config = _json(path, CONFIG, {})
  said, added = dict(config), config.get('added_tokens_decoder')
  if added is None:
    said |= _json(path, MAP, {})
    added = {token: dict(content=token) for token in _json(path, ADDED, {})}
    more = _json(path, 'tokenizer.json', {}).get('added_tokens', [])
    added |= {str(i): token for i, token in enumerate(more if isinstance(more, list) else [more])}
  default = dict.fromkeys(SPECIAL, END) | {'bos_token': START}
  named = [_token(path, said.get(k) or default[k]) for k in SPECIAL]
  rest = [_token(path, token) for token in (added.values() if isinstance(added, dict) else [added])]
  known = {token['content'] for token in rest}
  for token in named:
    if token['content'] not in known:
      rest, known = [*rest, token], known | {token['content']}
  length = said.get('model_max_length', 77)
  if type(length) not in (int, float) or length < 3:
    raise ValueError(f'{path}/{CONFIG} says model_max_length={length!r}: it is 77 of CLIP')
  contents = {k: token['content'] for k, token in zip(SPECIAL, named)}
  return contents, rest, int(length) if length < 10**6 else 77  # some files say 10^30 for none


def _token(path, said):
  """Arguments of `tokenizers.AddedToken` from a string or a dict."""
  said = dict(content=said) if isinstance(said, str) else said
  if not isinstance(said, dict) or not isinstance(said.get('content'), str) or not said['content']:
    raise ValueError(f'{path}: {said!r:.80} is no token')
  flags = ('special', 'single_word', 'lstrip', 'rstrip', 'normalized')
  given = {k: bool(said[k]) for k in flags if k in said}
  return dict(content=said['content'], special=True) | given


def _json(path, name, default=None):
  """The dict that a file of a folder holds; `default`, where there is one, without the file."""
  if default is not None and not os.path.exists(os.path.join(path, name)):
    return default
  text = _read(path, name)
  try:
    said = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}/{name} is no JSON ({_line(error)}): get it again') from error
  if not isinstance(said, dict):
    raise ValueError(f'{path}/{name} holds no JSON object: get it again')
  return said


def _read(path, name):
  file = os.path.join(path, name)
  if not os.path.isfile(file) or os.path.getsize(file) > LARGEST:
    raise ValueError(f'{file} is no file of at most {LARGEST} bytes, so of no tokenizer')
  try:
    with open(file, encoding='utf-8') as opened:
      return opened.read()
  except ValueError as error:
    raise ValueError(f'{file} is no text ({_line(error)}): get it again') from error
