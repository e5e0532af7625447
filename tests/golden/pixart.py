"""Outputs of diffusers' `PixArtTransformer2DModel`, and of its rotary embeddings; names of tensors.

  pip install torch==2.13.0 diffusers transformers
  python tests/golden/pixart.py         # writes tests/golden/pixart.npz

Weights are drawn by numpy from the name of each tensor, also those that start at zero. The
reference runs in float64, on grids that are square and not, of the size it was made for and not.
"""

import pathlib
import zlib

import numpy as np

# PixArt-alpha's as it is for 1024 pixels, and without sizes as for 512.
CONFIG = dict(
  num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
  cross_attention_dim=48, sample_size=16, patch_size=2, num_embeds_ada_norm=1000,
  norm_type='ada_norm_single', caption_channels=20, interpolation_scale=2,
  use_additional_conditions=True, norm_elementwise_affine=False, norm_eps=1e-6,
  activation_fn='gelu-approximate', attention_bias=True,
)
PLAIN = CONFIG | dict(use_additional_conditions=False, interpolation_scale=1)
CASES = {'sizes': (CONFIG, (8, 12)), 'plain': (PLAIN, (8, 12)), 'square': (PLAIN, (16, 16))}
DIT = dict(  # the sizes of `dit.py` beside this
  num_attention_heads=4, attention_head_dim=16, in_channels=4, num_layers=3, sample_size=8,
  patch_size=2, num_embeds_ada_norm=10,
)
ROTARY = (3, 5)  # a grid, of heads of 16 channels


def draw(name, shape):
  """Weights [out in ...] scaled to keep variance, biases and tables of 0.1."""
  numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  small = len(shape) == 1 or name.endswith('table')
  return numbers * (0.1 if small else np.prod(shape[1:]) ** -0.5)


def inputs(side):
  """x [b c h w], t [b], text [b n d], its mask [b n] and height and width in pixels [b 2]."""
  rng = np.random.default_rng(side[0] * side[1])
  mask = np.arange(7) < np.array([7, 3, 1, 5])[:, None]
  return (
    rng.standard_normal((4, CONFIG['in_channels'], *side)), np.array([0.0, 3.25, 417.5, 999.0]),
    rng.standard_normal((4, 7, CONFIG['caption_channels'])), mask.astype(np.int32),
    np.array([[64, 96], [1024, 1024], [512, 2048], [96, 64]], np.float32),
  )


def rotated():
  """What is turned: [b k n d]."""
  return np.random.default_rng(0).standard_normal((2, 3, ROTARY[0] * ROTARY[1], 16))


def main():
  import diffusers
  from diffusers.models import embeddings
  import torch

  outputs = {}
  for name, (config, side) in CASES.items():
    model = diffusers.PixArtTransformer2DModel(**config)
    for key, tensor in model.named_parameters():
      tensor.data = torch.from_numpy(draw(key, tensor.shape))
    x, t, text, mask, size = map(torch.from_numpy, inputs(side))
    with torch.no_grad():
      out = model.double().eval()(
        x, text, t, {'resolution': size, 'aspect_ratio': size[:, :1] / size[:, 1:]},
        encoder_attention_mask=mask, return_dict=False,
      )[0]
    outputs[name] = out.numpy().astype(np.float32)
    outputs[f'names_{name}'] = _names(model)
  outputs['names_dit'] = _names(diffusers.DiTTransformer2DModel(**DIT))
  turns = embeddings.get_2d_rotary_pos_embed(16, ((0, 0), ROTARY), ROTARY)
  turned = embeddings.apply_rotary_emb(torch.from_numpy(rotated()), turns)
  outputs['rotary'] = turned.numpy().astype(np.float32)
  versions = f'diffusers {diffusers.__version__}, torch {torch.__version__}, numpy {np.__version__}'
  np.savez(pathlib.Path(__file__).with_suffix('.npz'), versions=versions, **outputs)
  print(versions, {name: out.shape for name, out in outputs.items()})


def _names(model):
  return np.array([f'{k} {tuple(v.shape)}' for k, v in model.state_dict().items()])


if __name__ == '__main__':
  main()
