"""Ids that transformers' `CLIPTokenizer` gives prompts, by CLIP's vocabulary, and a cut of it.

  pip install transformers==5.23.0; pip install --no-deps open_clip_torch==3.3.0
  python tests/golden/prompts.py        # writes prompts.npz and tokenizer/ beside itself

OpenCLIP (MIT licence) holds the vocabulary of OpenAI's CLIP (MIT licence), 49,408 tokens. The cut
in tests/golden/tokenizer/ has its bytes and the merges that these prompts take, in their order:
prompts then merge as they do by the whole. `whole` in the npz is the id of each of its tokens in
the whole vocabulary, so that what is compared are CLIP's own ids.
"""

import gzip
import json
import pathlib
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent
LENGTH, VOCAB = 77, 49408
START, END = '<|startoftext|>', '<|endoftext|>'

PROMPTS = [
  '', ' ', '\n\t ', 'a cat', 'A CAT', '  a   cat\n', 'a photo of a cat',
  'a photograph of an astronaut riding a horse', 'cat, dog; bird.', 'hello!', '!', '!!!',
  'wow !! what?!', "it's a dog's life", "they'll've we'd i'm you're", "IT'S",
  '1 12 123 4k 8k', 'f/1.8, 85mm', '½ ² ٣', 'naïve café', 'nai\u0308ve cafe\u0301',
  'ångström', 'ÜBER straße', 'İstanbul', 'ﬁnd', '猫', '日本の猫', '一只猫在睡觉', '고양이',
  'кошка на окне', 'γάτα', 'قطة', 'बिल्ली', '😀', '🐱🐶', '👨‍👩‍👧', '🇫🇷 flag', 'a 😀 face',
  '<b>bold</b> &amp; more', 'http://example.com/a_b?c=d', 'a-b_c',
  '(masterpiece:1.2), [best]', 'zero\u200bwidth', 'no\u00a0break \u3000space',
  'tab\tand\x00null', '“quotes” — dash…',
  END, f'a {START} b {END} c', '<|STARTOFTEXT|>', '</w>', 'antidisestablishmentarianism',
  'highly detailed, digital painting, artstation, concept art, sharp focus, illustration, ' * 6,
  '猫' * 60, '😀' * 25,
]


def token(content, normalized=True):
  return dict(
    content=content, lstrip=False, normalized=normalized, rstrip=False, single_word=False
  )


MAP = dict(bos_token=token(START), eos_token=token(END), unk_token=token(END), pad_token=END)
CONFIG = dict(MAP, add_prefix_space=False, do_lower_case=True, model_max_length=LENGTH,
              tokenizer_class='CLIPTokenizer')
DECODER = {'0': token('!', False), str(VOCAB - 2): token(START), str(VOCAB - 1): token(END, False)}
FOLDERS = {  # {file: what it says}, as in the folders of the families named
  'sd1': {'tokenizer_config.json': CONFIG, 'special_tokens_map.json': MAP},
  'sd2': {  # the map goes first
    'tokenizer_config.json': CONFIG, 'special_tokens_map.json': MAP | {'pad_token': '!'}},
  'sdxl2': {  # now the config does
    'tokenizer_config.json': CONFIG | {
      'bos_token': START, 'eos_token': END, 'unk_token': END, 'pad_token': '!',
      'added_tokens_decoder': DECODER},
    'special_tokens_map.json': MAP},
}


def folder(path, vocab, merges, files):
  """Writes a tokenizer's folder; ids in `added_tokens_decoder` are made those of `vocab`."""
  path = pathlib.Path(path)
  (path / 'vocab.json').write_text(json.dumps(vocab, ensure_ascii=False), encoding='utf-8')
  (path / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges, '']), encoding='utf-8')
  for name, said in files.items():
    if 'added_tokens_decoder' in said:
      tokens = said['added_tokens_decoder'].values()
      said = said | {'added_tokens_decoder': {vocab[t['content']]: t for t in tokens}}
    (path / name).write_text(json.dumps(said))
  return path


def bytes_of():
  """A letter for each byte, those that print for themselves first; Radford et al. 2019."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def vocabulary(merges):
  words = bytes_of()
  words = [*words, *(f'{w}</w>' for w in words), *(m.replace(' ', '') for m in merges), START, END]
  return {word: i for i, word in enumerate(words)}


def taken(word, ranks):
  """The merges that join a word."""
  parts, used = [*word[:-1], f'{word[-1]}</w>'], set()
  while True:
    pairs = [f'{a} {b}' for a, b in zip(parts, parts[1:])]
    best = min(pairs, key=lambda m: ranks.get(m, len(ranks)), default=None)
    if best not in ranks:
      return used
    used.add(best)
    joined = []
    for part in parts:
      if joined and f'{joined[-1]} {part}' == best:
        joined[-1] += part
      else:
        joined.append(part)
    parts = joined


def main():
  import importlib.util

  import transformers

  package = pathlib.Path(importlib.util.find_spec('open_clip').origin).parent
  lines = gzip.decompress((package / 'bpe_simple_vocab_16e6.txt.gz').read_bytes()).decode()
  merges = lines.split('\n')[1 : VOCAB - 512 - 2 + 1]
  vocab = vocabulary(merges)
  assert len(vocab) == VOCAB

  def ids(vocab, merges, files):
    with tempfile.TemporaryDirectory() as path:
      tokenizer = transformers.CLIPTokenizer.from_pretrained(folder(path, vocab, merges, files))
    found = tokenizer(
      PROMPTS, padding='max_length', truncation=True, max_length=LENGTH, return_tensors='np')
    return found, tokenizer.backend_tokenizer

  _, backend = ids(vocab, merges, FOLDERS['sd1'])
  ranks, used = {m: i for i, m in enumerate(merges)}, set()
  for prompt in PROMPTS:
    text = backend.normalizer.normalize_str(prompt)
    for word, _ in backend.pre_tokenizer.pre_tokenize_str(text):
      used |= taken(word, ranks)
  few = sorted(used, key=ranks.get)
  cut = vocabulary(few)
  folder(HERE / 'tokenizer', cut, few, {})
  whole = np.array([vocab[word] for word in cut], np.int32)
  outputs = {'whole': whole}
  for name, files in FOLDERS.items():
    found, _ = ids(vocab, merges, files)
    outputs[name] = found['input_ids'].astype(np.uint16)
    outputs[f'{name}_mask'] = found['attention_mask'].astype(np.uint8)
    assert (whole[ids(cut, few, files)[0]['input_ids']] == outputs[name]).all(), name
  versions = f'transformers {transformers.__version__}'
  np.savez_compressed(HERE / 'prompts.npz', versions=versions, **outputs)
  print(versions, len(PROMPTS), 'prompts', len(few), 'merges')


if __name__ == '__main__':
  main()
