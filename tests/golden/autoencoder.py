"""Outputs of diffusers' AutoencoderKL and VQModel on weights that anyone can draw again, and names.

  pip install torch==2.13.0 diffusers transformers
  python tests/golden/autoencoder.py     # writes tests/golden/autoencoder.npz and .json

The models are narrow ones of Stable Diffusion's kind, of Stable Diffusion 3's and Flux's (16
channels, no quant_conv), and a VQ one with attention at a level, as VQ-GAN's. Weights are drawn by
numpy from the name of each tensor, so that the file holds outputs alone. The reference runs in
float64. The .json has {CompVis' name: diffusers' name}, by diffusers' own converter.
"""

import json
import pathlib
import zlib

import numpy as np


def config(widths, attention=(), **options):
  levels = range(len(widths))
  down = ['AttnDownEncoderBlock2D' if i in attention else 'DownEncoderBlock2D' for i in levels]
  up = ['AttnUpDecoderBlock2D' if i in attention else 'UpDecoderBlock2D' for i in levels][::-1]
  return dict(
    block_out_channels=list(widths), down_block_types=down, up_block_types=up, norm_num_groups=8,
    **options,
  )


KL4 = dict(_class_name='AutoencoderKL') | config((16, 32, 32), layers_per_block=2)
KL16 = dict(_class_name='AutoencoderKL') | config(
  (16, 32), layers_per_block=1, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
  scaling_factor=0.3611, shift_factor=0.1159,
)
VQ = dict(_class_name='VQModel') | config(
  (16, 32), attention=(1,), layers_per_block=1, num_vq_embeddings=32, scaling_factor=1.0,
)
MODELS = dict(kl4=KL4, kl16=KL16, vq=VQ)
SIDES = 16, 24  # of images
SHIPPED = config((8, 16, 32, 32), layers_per_block=2)  # Stable Diffusion's, a 16th as wide


def draw(name, shape):
  """Weights [out in ...] scaled to keep variance, norms about 1, biases of 0.1, codes of 1."""
  numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  if name == 'quantize.embedding.weight':
    return numbers
  if len(shape) == 1:
    return 0.1 * numbers + ('norm' in name and name.endswith('weight'))
  return numbers * np.prod(shape[1:]) ** -0.5


def inputs(name):
  """An image [b c h w] and a latent [b z h/f w/f], not that of the image."""
  rng = np.random.default_rng(len(name))
  factor = 2 ** (len(MODELS[name]['block_out_channels']) - 1)
  channels = MODELS[name].get('latent_channels', dict(vq=3).get(name, 4))
  x = rng.uniform(-1, 1, (2, 3, *SIDES))
  return x, rng.standard_normal((2, channels, *[side // factor for side in SIDES]))


def compvis(levels, blocks):
  """The names of CompVis' first stage, as `ldm.modules.diffusionmodules.model` lays it out."""
  block = ['norm1', 'conv1', 'norm2', 'conv2']
  middle = [f'mid.block_{i}.{part}' for i in (1, 2) for part in block]
  middle += [f'mid.attn_1.{part}' for part in ('norm', 'q', 'k', 'v', 'proj_out')]
  whole = ['conv_in', *middle, 'norm_out', 'conv_out']
  modules = ['quant_conv', 'post_quant_conv']
  for side, stage, change, count, none in (
    ('encoder', 'down', 'downsample', blocks, levels - 1),
    ('decoder', 'up', 'upsample', blocks + 1, 0),
  ):
    modules += [f'{side}.{part}' for part in whole]
    for i in range(levels):
      modules += [f'{side}.{stage}.{i}.block.{j}.{part}' for j in range(count) for part in block]
      modules += [f'{side}.{stage}.{i}.{change}.conv'] if i != none else []
  wider = 'encoder.down.1', 'encoder.down.2', 'decoder.up.1', 'decoder.up.0'
  modules += [f'{level}.block.0.nin_shortcut' for level in wider]
  return [f'{module}.{kind}' for module in modules for kind in ('weight', 'bias')]


def main():
  import diffusers
  from diffusers.loaders import single_file_utils
  import torch

  def reference(name):
    said = {k: v for k, v in MODELS[name].items() if k[0] != '_'}
    model = getattr(diffusers, MODELS[name]['_class_name'])(**said)
    for key, tensor in model.named_parameters():
      tensor.data = torch.from_numpy(draw(key, tensor.shape))
    x, z = map(torch.from_numpy, inputs(name))
    model = model.double().eval()
    with torch.no_grad():
      if name != 'vq':
        told = model.encode(x).latent_dist
        return dict(moments=told.parameters, logvar=told.logvar, image=model.decode(z).sample)
      quantized, loss, (*_, index) = model.quantize(z)
      model.quantize.legacy = False  # the published sign of the loss' two parts
      loss = model.quantize(z)[1]
      return dict(
        moments=model.encode(x).latents, image=model.decode(z).sample, quantized=quantized,
        index=index.reshape(z.shape[0], *z.shape[2:]), loss=loss,
      )

  def names():
    """Of tensors that hold their place in the list of names."""
    want = diffusers.AutoencoderKL(**SHIPPED).state_dict()
    given = compvis(4, 2)
    kinds = {k: torch.full((1,) * (4 if k.endswith('weight') else 1), i) for i, k in
             enumerate(given)}
    made = single_file_utils.convert_ldm_vae_checkpoint(
      {f'first_stage_model.{k}': v for k, v in kinds.items()}, SHIPPED)
    assert made.keys() == want.keys(), made.keys() ^ want.keys()
    return {given[int(v.flatten()[0])]: k for k, v in made.items()}

  outputs = {f'{name}/{k}': v for name in MODELS for k, v in reference(name).items()}
  outputs = {k: np.asarray(v, np.int32 if 'index' in k else np.float32) for k, v in outputs.items()}
  versions = f'diffusers {diffusers.__version__}, torch {torch.__version__}, numpy {np.__version__}'
  here = pathlib.Path(__file__)
  np.savez_compressed(here.with_suffix('.npz'), versions=versions, **outputs)
  here.with_suffix('.json').write_text(json.dumps(names(), indent=0) + '\n')
  print(versions, {name: (out.shape, out.std()) for name, out in outputs.items()})


if __name__ == '__main__':
  main()
