"""Text encoders of ours, written as files, give the same in transformers: by hand, it needs both.

  pip install torch transformers, beside what diffax needs
  python tests/golden/export_text.py
  # or in two environments: `... write DIR` where diffax is, then `... read DIR` where torch is
"""

import json
import pathlib
import sys
import tempfile

import numpy as np

SIZES = dict(vocab=64, length=12, width=32, depth=3, heads=4, hidden=80)
CASES = {  # {folder: (fields, prefix of names)}
  'plain': (dict(), 'text_model.'),
  'bare': (dict(end=9), ''),  # as transformers 5 writes it itself
  'projected': (dict(activation='gelu', projection=24), 'text_model.'),
}


def tokens():
  rows = np.random.default_rng(0).integers(10, 62, (4, 12))
  rows[:, 7:9] = [9, 63]
  return rows


def moved(x):
  """Off its start, where biases are 0: the same for all of a shape will do."""
  return np.asarray(x + 0.3 * np.random.default_rng(x.size).standard_normal(x.shape), np.float32)


def write(folder):
  import jax

  from diffax.convert import tensors
  from diffax.convert import text as convert
  from diffax.models import text

  for case, (fields, prefix) in CASES.items():
    spec = dict(SIZES, **fields)
    model = text.clip_text(**spec)
    params = model.init(jax.random.key(0), tokens())['params']
    params = jax.tree.map(moved, params)
    path = pathlib.Path(folder) / case
    path.mkdir(parents=True, exist_ok=True)
    tensors.save(path / 'model.safetensors', params, convert.stored(model, prefix))
    config = convert.to_config({'name': 'clip_text', **spec})
    (path / 'config.json').write_text(json.dumps(config, indent=2))
    np.savez(path / 'outputs.npz', **model.apply({'params': params}, tokens()))


def read(folder):
  import torch
  import transformers

  for case in CASES:
    path = pathlib.Path(folder) / case
    kind = json.loads((path / 'config.json').read_text())['architectures'][0]
    model, said = getattr(transformers, kind).from_pretrained(path, output_loading_info=True)
    assert not any(said.values()), said
    with torch.no_grad():
      out = model(torch.from_numpy(tokens()))
    pooled = out.text_embeds if 'projected' in case else out.pooler_output
    for name, found in (('text', out.last_hidden_state), ('pooled', pooled)):
      wanted = np.load(path / 'outputs.npz')[name]
      error = np.abs(found.numpy() - wanted).max() / np.abs(wanted).max()
      assert error < 1e-5, (case, name, error)
      print(f'{case}: {name} {wanted.shape}, relative difference {error:.1e}')


if __name__ == '__main__':
  steps = {'write': [write], 'read': [read]}.get(''.join(sys.argv[1:2]), [write, read])
  with tempfile.TemporaryDirectory() as made:
    for step in steps:
      step(sys.argv[2] if len(sys.argv) > 2 else made)
