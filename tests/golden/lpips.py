"""Outputs of the lpips package and of a PatchGAN on weights that anyone can draw again.

  pip install torch==2.13.0 torchvision==0.28.0 lpips==0.1.4 scikit-image==0.26.0
  python tests/golden/lpips.py            # writes tests/golden/lpips.npz

Weights are drawn by numpy from the name of each tensor, inputs from a seed, so that the file holds
outputs alone. The references run in float64. The PatchGAN is that of Isola et al. 2017 in torch's
own layers, with GroupNorm where they have BatchNorm2d; SSIM is scikit-image's.
"""

import math
import pathlib
import zlib

import numpy as np

SIDE = 37  # odd: pools drop a row
PATCHES = dict(width=8, depth=2, groups=4)


def draw(name, shape):
  """Weights [out in ...] that keep variance; biases of 0.1, norms about 1; LPIPS's are positive."""
  numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  if name.startswith('lin'):
    return np.abs(numbers)
  if len(shape) == 1:
    return 0.1 * numbers + ('norm' in name and name.endswith('weight'))
  return numbers * math.sqrt(2 / np.prod(shape[1:]))


def pictures():
  """Two batches [2 37 37 3] in [-1, 1]; the second is the first, somewhat changed."""
  draw = np.random.default_rng(0)
  x = draw.uniform(-1, 1, (2, SIDE, SIDE, 3))
  return x, np.clip(x + 0.2 * draw.standard_normal(x.shape), -1, 1)


def main():
  import lpips
  import skimage
  from skimage.metrics import structural_similarity
  import torch
  from torch import nn

  x, y = (torch.from_numpy(v).permute(0, 3, 1, 2) for v in pictures())
  network = lpips.LPIPS(net='vgg', pretrained=False, pnet_rand=True, verbose=False).double()
  for key, tensor in network.named_parameters():
    key = 'features.' + key.split('.', 2)[2] if key.startswith('net.') else key
    if not key.startswith('lins.'):
      tensor.data = torch.from_numpy(draw(key, tensor.shape))
  with torch.no_grad():
    whole, parts = network(x, y, retPerLayer=True)

  def patches(width, depth, groups):
    made = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for i in range(1, depth + 1):
      channels = width * min(2**i, 8)
      stride = 2 if i < depth else 1
      made += [
        nn.Conv2d(width * min(2 ** (i - 1), 8), channels, 4, stride, 1, bias=False),
        nn.GroupNorm(groups, channels), nn.LeakyReLU(0.2),
      ]
    return nn.Sequential(*made, nn.Conv2d(channels, 1, 4, 1, 1)).double()

  critic = patches(**PATCHES)
  names = {0: 'conv0', len(critic) - 1: 'out'}
  names |= {2 + 3 * i + j: f'{("conv", "norm")[j]}{i + 1}' for i in range(2) for j in range(2)}
  for key, tensor in critic.named_parameters():
    number, leaf = key.split('.')
    tensor.data = torch.from_numpy(draw(f'{names[int(number)]}.{leaf}', tensor.shape))
  with torch.no_grad():
    real = critic(x)

  a, b = ((v + 1) / 2 for v in pictures())
  likeness = [
    structural_similarity(
      one, other, channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5,
      use_sample_covariance=False)
    for one, other in zip(a, b)
  ]
  versions = (
    f'lpips 0.1.4, torch {torch.__version__}, skimage {skimage.__version__}, '
    f'numpy {np.__version__}')
  np.savez_compressed(
    pathlib.Path(__file__).with_suffix('.npz'), versions=versions,
    lpips=whole[:, 0, 0, 0].numpy(), layers=np.stack([p[:, 0, 0, 0].numpy() for p in parts]),
    patches=real.permute(0, 2, 3, 1).numpy(), ssim=np.asarray(likeness))
  print(versions, whole.flatten(), real.shape, likeness)


if __name__ == '__main__':
  main()
