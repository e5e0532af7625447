"""Outputs of diffusers' `DiTTransformer2DModel` on weights that anyone can draw again.

  pip install torch==2.13.0 diffusers transformers
  python tests/golden/dit.py            # writes tests/golden/dit.npz

Weights are drawn by numpy from the name of each tensor, so that the file holds outputs alone; drawn
are all of them, also those that start at zero, for behind zeros an error hides. The reference runs
in float64: the difference that `tests/test_dit.py` finds is our rounding. Its grids are square, for
the reference takes the side of its output from the root of the number of tokens.
"""

import pathlib
import re
import zlib

import numpy as np

SIZES = dict(patch=2, width=64, depth=3, heads=4, classes=10)
SIDES = (8, 12)
CHANNELS = 4


def draw(name, shape):
  """Weights [out in ...] scaled to keep variance, biases of 0.1, the table of labels of 1."""
  # one embedding for all blocks, see `main`
  name = re.sub(r'blocks\.\d+\.norm1\.emb\.', 'emb.', name)
  numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  if name.endswith('embedding_table.weight'):
    return numbers
  return numbers * (0.1 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5)


def inputs(side):
  """Noisy x [b c h w], t in 0..1000 and labels, of which the last is the null label."""
  x = np.random.default_rng(side).standard_normal((4, CHANNELS, side, side))
  return x, np.array([0.0, 3.25, 417.5, 999.0]), np.array([0, 7, 9, SIZES['classes']])


def main():
  import diffusers
  import torch

  def reference(side):
    model = diffusers.DiTTransformer2DModel(
      num_attention_heads=SIZES['heads'],
      attention_head_dim=SIZES['width'] // SIZES['heads'],
      in_channels=CHANNELS,
      num_layers=SIZES['depth'],
      sample_size=side,
      patch_size=SIZES['patch'],
      num_embeds_ada_norm=SIZES['classes'],
    )
    for name, tensor in model.named_parameters():
      tensor.data = torch.from_numpy(draw(name, tensor.shape))
    for block in model.transformer_blocks:
      # DiT has one embedding of time and label for all blocks, and its frequencies are
      # 10000^(-i / half) for i < half, as those of ADM before it; diffusers has a copy a block and
      # divides by half - 1, which is another function of t.
      block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model.double().eval()

  outputs = {}
  for side in SIDES:
    with torch.no_grad():
      out = reference(side)(*map(torch.from_numpy, inputs(side)), return_dict=False)[0]
    outputs[f'side{side}'] = out.numpy().astype(np.float32)
  versions = f'diffusers {diffusers.__version__}, torch {torch.__version__}, numpy {np.__version__}'
  np.savez(pathlib.Path(__file__).with_suffix('.npz'), versions=versions, **outputs)
  print(versions, {name: (out.shape, out.std()) for name, out in outputs.items()})


if __name__ == '__main__':
  main()
