"""Outputs of transformers' and OpenCLIP's text encoders on weights that anyone can draw again.

  pip install torch==2.13.0 transformers==5.23.0 open_clip_torch==3.3.0
  python tests/golden/text.py           # writes tests/golden/text.npz

Weights are drawn by numpy from the name of each tensor. The references run in float64: the
difference that `tests/test_text.py` finds is our rounding. Beside outputs the file holds each
reference's config and the names and shapes of its tensors, as JSON.
"""

import json
import pathlib
import zlib

import numpy as np

VOCAB, LENGTH, WIDTH, DEPTH, HEADS, HIDDEN, PROJECTION = 64, 12, 32, 3, 4, 80, 24
START, END = VOCAB - 2, VOCAB - 1
CONFIGS = {  # {case: (class, what its config says)}
  'sd1': ('CLIPTextModel', dict(hidden_act='quick_gelu', eos_token_id=2)),
  'sd2': ('CLIPTextModel', dict(hidden_act='gelu', eos_token_id=2)),
  'end': ('CLIPTextModel', dict(hidden_act='gelu', eos_token_id=9)),
  'sdxl': ('CLIPTextModelWithProjection', dict(hidden_act='gelu', eos_token_id=2)),
}


def draw(name, shape):
  """Kernels that keep variance, embeddings of 1/2, norms' scales about 1, biases of 0.1."""
  numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  if len(shape) == 1:
    norm = 'norm' in name or 'ln_' in name
    return 0.1 * numbers + (norm and name.endswith('weight'))
  if 'embedding' in name:
    return numbers / 2
  return numbers * (shape[0] if name == 'text_projection' else shape[1]) ** -0.5


def tokens():
  """[b n]: padded with the end, padded with 0, and two ends of id 9 below the largest id."""
  rows = np.random.default_rng(0).integers(10, START, (3, LENGTH))
  rows[:, 0] = START
  rows[0, 5:], rows[1, 8], rows[1, 9:] = END, END, 0
  rows[2, 4:7], rows[2, -1] = (9, 50, 9), END
  rows[:2, 3] = 9
  return rows.astype(np.int32)


def mask():
  """[b n]: the first so many tokens of each row, and not the third."""
  places = np.arange(LENGTH)
  return ((places < np.array([[6], [9], [12]])) & (places != 2)).astype(np.int32)


def main():
  import torch
  import transformers

  outputs, said = {}, {}

  def put(model):
    for name, tensor in model.named_parameters():
      tensor.data = torch.from_numpy(draw(name, tuple(tensor.shape)))
    return model.double().eval(), {n: list(p.shape) for n, p in model.named_parameters()}

  def run(model, **given):
    with torch.no_grad():
      out = model(torch.from_numpy(tokens()).long(), output_hidden_states=True, **given)
    assert len(out.hidden_states) == DEPTH + 1
    pooled = out.text_embeds if hasattr(out, 'text_embeds') else out.pooler_output
    return dict(last=out.last_hidden_state, penultimate=out.hidden_states[-2], pooled=pooled)

  for case, (kind, fields) in CONFIGS.items():
    config = transformers.CLIPTextConfig(
      vocab_size=VOCAB, max_position_embeddings=LENGTH, hidden_size=WIDTH, bos_token_id=START,
      num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=HIDDEN,
      projection_dim=PROJECTION, architectures=[kind], **fields)
    model, names = put(getattr(transformers, kind)(config))
    said[case] = dict(config=config.to_dict(), names=names)
    for kind, out in run(model).items():
      outputs[f'{case}_{kind}'] = out
    if case == 'sdxl':
      for kind, out in run(model, attention_mask=torch.from_numpy(mask())).items():
        outputs[f'masked_{kind}'] = out

  openclip, names = put(openclip_model())
  said['openclip'] = dict(names=names)
  outputs |= {f'openclip_{k}': v for k, v in openclip_outputs(openclip).items()}
  versions = f'transformers {transformers.__version__}, torch {torch.__version__}'
  outputs = {k: np.asarray(v, np.float32) for k, v in outputs.items()}
  path = pathlib.Path(__file__).with_suffix('.npz')
  np.savez_compressed(path, versions=versions, said=json.dumps(said), **outputs)
  print(versions, {name: (out.shape, out.std()) for name, out in outputs.items()})


def openclip_model():
  from open_clip.transformer import TextTransformer

  return TextTransformer(
    context_length=LENGTH, vocab_size=VOCAB, width=WIDTH, heads=HEADS, layers=DEPTH,
    mlp_ratio=HIDDEN / WIDTH, output_dim=PROJECTION, pool_type='argmax', output_tokens=True)


def openclip_outputs(model):
  """pooled, and the last state but one, behind the last norm as SD 2.x takes it."""
  import torch

  given = torch.from_numpy(tokens()).long()
  with torch.no_grad():
    pooled, last = model(given)
    model.transformer.resblocks = model.transformer.resblocks[:-1]
    return dict(pooled=pooled, last=last, penultimate_normed=model(given)[1])


if __name__ == '__main__':
  main()
