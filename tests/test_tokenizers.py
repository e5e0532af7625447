"""Tokenizers: CLIP's ids as transformers gives them, and an encoding learned from captions."""

import json
import pathlib
import pickle
import subprocess
import sys
import unicodedata

from golden import prompts as golden
import numpy as np
import pytest
import run_diffax

from diffax.data import tokenizers

HERE = pathlib.Path(golden.__file__).parent
WANTED = np.load(HERE / 'prompts.npz')
CUT = json.loads((HERE / 'tokenizer' / 'vocab.json').read_text(encoding='utf-8'))
MERGES = (HERE / 'tokenizer' / 'merges.txt').read_text(encoding='utf-8').split('\n')[1:-1]
CAPTIONS = [
  unicodedata.name(chr(i)).lower() for i in range(0x1F300, 0x1F650) if unicodedata.name(chr(i), '')
]


def folder(path, name='sd1', **files):
  return golden.folder(path, CUT, MERGES, golden.FOLDERS[name] | files)


@pytest.fixture(scope='module')
def learned():
  return tokenizers.bpe(CAPTIONS, vocab=700, length=24)


@pytest.fixture(scope='module')
def sd1(tmp_path_factory):
  return tokenizers.clip(folder(tmp_path_factory.mktemp('sd1')))


# --- CLIP's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', golden.FOLDERS)
def test_parity(name, tmp_path):
  """CLIP's own ids of every prompt, padding and truncation as each family has them."""
  made = tokenizers.clip(folder(tmp_path, name))
  tokens, mask, _ = made.encode(golden.PROMPTS)
  np.testing.assert_array_equal(WANTED['whole'][tokens], WANTED[name])
  np.testing.assert_array_equal(mask, WANTED[f'{name}_mask'])
  assert tokens.dtype == mask.dtype == np.int32
  ids = [WANTED['whole'][i] for i in (made.start, made.end, made.pad)]
  assert ids == [49406, 49407, 49407 if name == 'sd1' else 0]
  assert (made.length, made.vocab) == (77, len(CUT))


@pytest.mark.parametrize('pairs', [False, True])
@pytest.mark.parametrize('name', golden.FOLDERS)
def test_one_file_for_all(name, pairs, tmp_path):
  """tokenizer.json alone, as newer folders have it, with merges in either of its two forms."""
  merges = [m.split(' ') if pairs else m for m in MERGES]
  model = {'type': 'BPE', 'vocab': CUT, 'merges': merges}
  tokens = golden.FOLDERS['sdxl2']['tokenizer_config.json']['added_tokens_decoder'].values()
  added = [t | {'id': CUT[t['content']], 'special': True} for t in tokens if name == 'sdxl2']
  (tmp_path / 'tokenizer.json').write_text(json.dumps({'model': model, 'added_tokens': added}))
  config = golden.FOLDERS[name]['tokenizer_config.json']
  config = {k: v for k, v in config.items() if k != 'added_tokens_decoder'}
  config |= {'pad_token': golden.END if name == 'sd1' else '!'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  tokens, mask, _ = tokenizers.clip(tmp_path).encode(golden.PROMPTS)
  np.testing.assert_array_equal(WANTED['whole'][tokens], WANTED[name])
  np.testing.assert_array_equal(mask, WANTED[f'{name}_mask'])


def test_a_folder_that_says_nothing_of_padding(tmp_path):
  made = tokenizers.clip(golden.folder(tmp_path, CUT, MERGES, {}))
  assert WANTED['whole'][made.pad] == 49407 and made.length == 77


def test_decode(sd1):
  texts = ['', 'a cat', 'A  photo of\na CAT!', '猫 😀', "it's naïve"]
  tokens, _, _ = sd1.encode(texts)
  assert sd1.decode(tokens) == ['', 'a cat', 'a photo of a cat !', '猫 😀', "it 's naïve"]


def test_what_is_cut_is_said(sd1):
  """In the words of whoever wrote it; where it all fits, nothing."""
  texts = ['a ' * 75, 'a ' * 75 + ' The  DOG, Cat', '']
  tokens, mask, cut = sd1.encode(texts)
  assert cut == ['', 'The  DOG, Cat', '']
  assert mask.sum(1).tolist() == [77, 77, 2]
  np.testing.assert_array_equal(tokens[0], tokens[1])


def test_links_are_followed(tmp_path):
  """As in the cache of Hugging Face, whose folders hold links to files elsewhere."""
  (tmp_path / 'blobs').mkdir(), (tmp_path / 'snapshot').mkdir()
  for file in folder(tmp_path / 'blobs').iterdir():
    (tmp_path / 'snapshot' / file.name).symlink_to(file)
  assert tokenizers.clip(tmp_path / 'snapshot') == tokenizers.clip(tmp_path / 'blobs')


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize('file, said, match', [
  ('vocab.json', '{"a": 0', 'vocab.json is no JSON.*get it again'),
  ('vocab.json', '[' * 100_000, 'vocab.json is no JSON'),
  ('vocab.json', '[1]', 'vocab.json holds no JSON object'),
  ('vocab.json', '{"a": 1}', 'not 0 to 0'),
  ('vocab.json', '{"a": [], "b": {}}', 'not 0 to 1'),
  ('vocab.json', '{"a": 0, "b": true}', 'not 0 to 1'),
  ('merges.txt', 'a b c\n', 'no pair of tokens'),
  ('merges.txt', 'zebra crossing\n', 'cannot be built'),
  ('merges.txt', b'\xff\xfe\xff', 'merges.txt is no text'),
  ('tokenizer_config.json', '{"pad_token": "<none>"}', '<none> are not in the vocabulary'),
  ('tokenizer_config.json', '{"pad_token": {"content": 3}}', 'is no token'),
  ('tokenizer_config.json', '{"pad_token": 3}', 'is no token'),
  ('tokenizer_config.json', '{"model_max_length": "77"}', "model_max_length='77'"),
  ('tokenizer_config.json', '{"model_max_length": -1}', 'model_max_length=-1'),
  ('tokenizer_config.json', '{"added_tokens_decoder": [1]}', 'is no token'),
  ('added_tokens.json', '{"<my-cat>": 514}', '<my-cat> are not in the vocabulary'),
  ('tokenizer.json', '{"model": {"type": "Unigram", "vocab": [["a", 0]]}}', 'no byte-pair'),
  ('tokenizer.json', '{"model": {"vocab": {"a": 0}, "merges": 3}}', 'no vocabulary'),
  ('tokenizer.json', '{"model": {"vocab": {"a": 0}, "merges": [3]}}', 'no pair|no vocabulary'),
  ('tokenizer.json', '{"model": 7}', 'no byte-pair'),
])
def test_broken_files(file, said, match, tmp_path):
  golden.folder(tmp_path, CUT, MERGES, {})
  (tmp_path / file).write_bytes(said if isinstance(said, bytes) else said.encode())
  with pytest.raises(ValueError, match=match) as error:
    tokenizers.clip(tmp_path)
  assert '\n' not in str(error.value) and len(str(error.value)) < 500


def test_folders_that_are_none(tmp_path):
  with pytest.raises(ValueError, match='there is nothing, and neither tokenizer.json'):
    tokenizers.clip(tmp_path / 'none')
  (tmp_path / 'model.safetensors').write_bytes(b'')
  with pytest.raises(ValueError, match='there is model.safetensors, and neither'):
    tokenizers.clip(tmp_path)


def test_files_too_large_are_not_read(tmp_path):
  golden.folder(tmp_path, CUT, MERGES, {})
  with open(tmp_path / 'vocab.json', 'wb') as file:
    file.truncate(2**40)
  with pytest.raises(ValueError, match='vocab.json is no file of at most'):
    tokenizers.clip(tmp_path)


def test_texts_come_in_a_list(sd1):
  for wrong in ('a cat', [b'a cat'], [None]):
    with pytest.raises(ValueError, match='no list of texts'):
      sd1.encode(wrong)


# --- learned --------------------------------------------------------------------------------------


def normal(text):
  """CLIP's normal form by Python's own means, of texts without white space but the space."""
  return ' '.join(unicodedata.normalize('NFC', text).split(' ')).strip(' ').lower()


def test_every_byte_and_letter_returns(learned):
  """Whatever the text, nothing is unknown: all bytes of UTF-8, letters of all planes."""
  space = {c for c in map(chr, range(0x3001)) if c.isspace()}
  letters = [chr(i) for i in [*range(0x3000), *range(0x3000, 0xD800, 64), *range(0x1F300, 0x1F700),
                              *range(0xE000, 0x110000, 4096)]]
  texts = [c for c in letters if c not in space and len(c.lower()) == 1]
  texts += [f'{a}{b}' for a, b in zip(texts, reversed(texts))]
  all_there_are = {*range(0x21, 0x41), *range(0x5B, 0xC0), *range(0xC2, 0xF5)}  # no upper case
  assert {b for text in texts for b in text.encode()} >= all_there_are
  tokens, mask, cut = learned.encode(texts)
  assert not any(cut) and tokens.max() < learned.vocab
  normalise = tokenizers._parsed(learned.model).normalizer.normalize_str
  assert learned.decode(tokens) == [normalise(text) for text in texts]
  plain = [text for text in texts if max(text) < '\u0250']
  assert [normalise(text) for text in plain] == [normal(text) for text in plain]


def test_captions_return(learned):
  tokens, mask, cut = learned.encode(CAPTIONS)
  assert not any(cut) and learned.decode(tokens) == CAPTIONS
  assert mask.sum(1).mean() - 2 < np.mean([len(c.encode()) for c in CAPTIONS]) / 2
  np.testing.assert_array_equal(tokens[:, 0], learned.start)
  ends = mask.sum(1) - 1
  np.testing.assert_array_equal(tokens[np.arange(len(tokens)), ends], learned.end)
  np.testing.assert_array_equal(tokens == learned.pad, mask == 0)
  assert tokens.argmax(axis=1).tolist() == ends.tolist()  # the end has the largest id


def test_words_are_the_same_wherever_they_stand(learned):
  tokens, mask, _ = learned.encode(['face', 'a FACE', '  Face\t'])
  assert tokens[1, mask[1].sum() - 2] == tokens[0, 1]
  np.testing.assert_array_equal(tokens[0], tokens[2])


def test_the_empty_text_and_other_oddities(learned):
  tokens, mask, cut = learned.encode(['', ' \n', '<|endoftext|>', '\ud83d', '\x00'])
  assert tokens[0].tolist() == [learned.start, learned.end] + [learned.pad] * 22
  np.testing.assert_array_equal(tokens[0], tokens[1])
  assert learned.end not in tokens[2, 1 : mask[2].sum() - 1]  # no text makes these tokens
  assert learned.decode(tokens) == ['', '', '<|endoftext|>', '?', '\x00']
  assert learned.encode([])[0].shape == (0, 24)


def test_cut_in_the_middle_of_a_letter(learned):
  tokens, mask, (cut,) = learned.encode(['猫' * 30])
  assert mask.all() and set(cut) == {'猫'} and 20 < len(cut) < 30
  assert learned.decode(tokens)[0].startswith('猫' * 7)


def test_no_order_of_captions_enters(learned):
  """Nor a process: another one, that reads them backwards, makes the same file."""
  code = '''
import sys
from diffax.data import tokenizers
captions = sys.stdin.buffer.read().decode().split('\\n')
print(tokenizers.bpe(captions, vocab=700, length=24).to_json(), end='')
'''
  for order in (CAPTIONS[::-1], sorted(CAPTIONS, key=lambda c: c[::-1])):
    done = subprocess.run(
      [sys.executable, '-c', code], input='\n'.join(order).encode(), capture_output=True,
      env=run_diffax.environment() | {'PYTHONUTF8': '1'}, timeout=120)
    assert done.stdout.decode() == learned.to_json(), done.stderr


def test_fewer_tokens_than_allowed():
  """No pair is seen twice: the bytes are all there is."""
  made = tokenizers.bpe(['ab'], vocab=700, length=8)
  assert made.vocab == 256 + 3 and made.end == 258
  with pytest.raises(ValueError, match='vocab=200.*at least 259'):
    tokenizers.bpe(['ab'], vocab=200)
  with pytest.raises(ValueError, match='length=2.*at least 3'):
    tokenizers.bpe(['ab'], length=2)
  with pytest.raises(ValueError, match='no captions'):
    tokenizers.bpe([])


# --- as data --------------------------------------------------------------------------------------


def test_goes_to_files_and_to_other_processes(learned, sd1):
  for made in (learned, sd1):
    assert tokenizers.from_json(made.to_json()) == made
    assert pickle.loads(pickle.dumps(made)) == made
    again = tokenizers.from_json(made.to_json()).encode(['a grinning cat 猫'])
    np.testing.assert_array_equal(again[0], made.encode(['a grinning cat 猫'])[0])


@pytest.mark.parametrize('change', [
  {'end': 10**6}, {'pad': -1}, {'length': '77'}, {'model': {}}, {'model': 'x'}, {'more': 1},
])
def test_files_of_others_are_refused(learned, change):
  said = json.loads(learned.to_json()) | change
  with pytest.raises(ValueError, match='no file of a tokenizer'):
    tokenizers.from_json(json.dumps(said))
  with pytest.raises(ValueError, match='no file of a tokenizer'):
    tokenizers.from_json('[' * 100_000)
