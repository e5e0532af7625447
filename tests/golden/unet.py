"""Outputs of diffusers' `UNet2DModel` and its FIR layers on weights that anyone can draw again.

  pip install torch==2.13.0 diffusers transformers
  python tests/golden/unet.py            # writes tests/golden/unet.npz

The models are those of google/ddpm-cifar10-32, google/ncsnpp-celebahq-256 (of fewer levels and
blocks) and ADM, narrow and for a smaller side. Weights are drawn by numpy from the name of each
tensor, so that the file holds outputs alone; drawn are all of them, also those that start at zero,
for behind zeros an error hides. The reference runs in float64: what `tests/test_unet.py` finds is
our rounding.
"""

import math
import pathlib
import zlib

import numpy as np

GROUPS = 8
DDPM = dict(
  layers_per_block=2,
  sample_size=16,
  block_out_channels=(32, 64, 64, 64),
  down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D'),
  up_block_types=('UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
  downsample_padding=0,
  flip_sin_to_cos=False,
  freq_shift=1,
  attention_head_dim=None,
  norm_eps=1e-6,
)
NCSNPP = dict(
  layers_per_block=1,
  sample_size=16,
  block_out_channels=(32, 64, 64),
  down_block_types=('SkipDownBlock2D', 'AttnSkipDownBlock2D', 'SkipDownBlock2D'),
  up_block_types=('SkipUpBlock2D', 'AttnSkipUpBlock2D', 'SkipUpBlock2D'),
  time_embedding_type='fourier',
  mid_block_scale_factor=math.sqrt(2),
  attention_head_dim=None,
  norm_eps=1e-6,
)
ADM = dict(
  layers_per_block=2,
  sample_size=16,
  block_out_channels=(32, 64, 96),
  down_block_types=('ResnetDownsampleBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D'),
  up_block_types=('AttnUpBlock2D', 'AttnUpBlock2D', 'ResnetUpsampleBlock2D'),
  downsample_type='resnet',
  upsample_type='resnet',
  resnet_time_scale_shift='scale_shift',
  attention_head_dim=16,
  num_class_embeds=11,
  attn_norm_num_groups=GROUPS,
)
MODELS = dict(ddpm=DDPM, ncsnpp=NCSNPP, adm=ADM)
LABELS = np.array([4, 10])  # the last is the null label


def draw(name, shape):
  """Weights [out in ...] scaled to keep variance, norms about 1, biases of 0.1, the labels of 1."""
  numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  if name == 'time_proj.weight':  # in 64ths: times a level of noise it has no rounding in float32
    return np.round(16 * 64 * numbers) / 64
  if name == 'class_embedding.weight':
    return numbers
  if len(shape) == 1:
    return 0.1 * numbers + ('norm' in name and name.endswith('weight'))
  return numbers * np.prod(shape[1:]) ** -0.5


def inputs(name):
  """Noisy x [b c h w] and t: 0 to 1000, of ncsnpp the logarithm of the level of noise."""
  side = MODELS[name]['sample_size']
  x = np.random.default_rng(side).standard_normal((2, 3, side, side))
  return x, np.array([-2.5, 3.0] if name == 'ncsnpp' else [3.25, 999.0])


def image():
  """What the FIR layers are shown, [b c h w]."""
  return np.random.default_rng(5).standard_normal((2, 4, 8, 12))


def main():
  import diffusers
  from diffusers.models import downsampling
  from diffusers.models import upsampling
  import torch

  def reference(name):
    groups = None if name == 'ncsnpp' else GROUPS
    model = diffusers.UNet2DModel(norm_num_groups=groups, act_fn='silu', **MODELS[name])
    for key, tensor in model.named_parameters():
      tensor.data = torch.from_numpy(draw(key, tensor.shape))
    for module in model.modules():
      if isinstance(module, torch.nn.GroupNorm):
        # diffusers has 32 groups in some places, which is right from 128 channels on and in
        # published models all the same as min(32, channels // 4), but nothing for a narrow one.
        module.num_groups = min(GROUPS if groups else 32, module.num_channels // 4)
    x, t = map(torch.from_numpy, inputs(name))
    given = dict(class_labels=torch.from_numpy(LABELS)) if name == 'adm' else {}
    with torch.no_grad():
      if name != 'ncsnpp':
        return model.double().eval()(x, t, return_dict=False, **given)[0]
      # diffusers asks for the level of noise and takes the logarithm, and divides the output by it,
      # which Song et al. do outside the network, after it.
      sigma = t.exp()
      return model.double().eval()(x, sigma, return_dict=False)[0] * sigma[:, None, None, None]

  def resampling(taps):
    layer = downsampling.FirDownsample2D(4, 6, use_conv=True, fir_kernel=taps).double()
    for key, tensor in layer.named_parameters():
      tensor.data = torch.from_numpy(draw(key, tensor.shape))
    x = torch.from_numpy(image())
    return dict(
      down=downsampling.downsample_2d(x, taps), up=upsampling.upsample_2d(x, taps),
      down_conv=layer(x).detach(),
    )

  outputs = {name: reference(name) for name in MODELS}
  for taps in ((1, 1), (1, 3, 3, 1)):
    outputs |= {f'{name}{len(taps)}': y for name, y in resampling(taps).items()}
  outputs = {name: y.numpy().astype(np.float32) for name, y in outputs.items()}
  versions = f'diffusers {diffusers.__version__}, torch {torch.__version__}, numpy {np.__version__}'
  np.savez_compressed(pathlib.Path(__file__).with_suffix('.npz'), versions=versions, **outputs)
  print(versions, {name: (out.shape, out.std()) for name, out in outputs.items()})


if __name__ == '__main__':
  main()
