"""Pictures for people: grids of samples, PNG files, a loss curve. Nothing here touches a device."""

import io

import einops
import numpy as np


def grid(images, columns=10, gap=1, smallest=64):
  """One picture of many: uint8 [n h w c] -> [H W 3 or 1], row by row; tiny images are enlarged.

  smallest: a side shorter than this is enlarged by a whole factor, each pixel a square.
  """
  n, h, w, c = images.shape
  rows = -(-n // columns)
  factor = max(1, -(-smallest // min(h, w)))
  images = einops.repeat(images, 'n h w c -> n (h i) (w j) c', i=factor, j=factor)
  blank = np.full((rows * columns - n, *images.shape[1:]), 255, np.uint8)
  images = np.pad(
    np.concatenate([images, blank]), [(0, 0), (gap, gap), (gap, gap), (0, 0)], constant_values=255
  )
  return einops.rearrange(images, '(r k) h w c -> (r h) (k w) c', k=columns)


def shown(x):
  """What can be looked at of x [n h w c]: uint8 with 1 or 3 channels.

  Floats, as latents are, are shown by their first three channels, each stretched over its range.
  """
  channels = 3 if x.shape[-1] >= 3 else 1
  x = x[..., :channels]
  if x.dtype == np.uint8:
    return x
  low, high = (f(x, axis=(0, 1, 2), keepdims=True) for f in (np.min, np.max))
  return np.rint(255 * (x - low) / np.maximum(high - low, 1e-12)).astype(np.uint8)


def name(key, step):
  """The file of a run's picture `key` ('samples') at `step`."""
  return f'{key.replace("/", "_")}_{step:07d}.png'


def save(path, image):
  """Writes uint8 [h w 1 or 3] as PNG, to a local path or a bucket."""
  from PIL import Image

  data = io.BytesIO()
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(data, 'PNG')
  path.write_bytes(data.getvalue())


def curve(path, steps, values, title):
  """Writes a plot of `values` over `steps`, as it is and smoothed."""
  from matplotlib.figure import Figure

  steps, values = np.asarray(steps), np.asarray(values)
  figure = Figure(figsize=(7, 4), layout='constrained')
  axes = figure.subplots()
  axes.plot(steps, values, color='tab:blue', alpha=0.3, linewidth=1)
  width = max(1, len(values) // 50)
  weights = np.ones(width)
  smooth = np.convolve(values, weights, 'same') / np.convolve(np.ones(len(values)), weights, 'same')
  axes.plot(steps, smooth, color='tab:blue')
  axes.set(xlabel='step', ylabel='loss', title=title)
  if len(values) and (values > 0).all():
    axes.set_yscale('log')
  axes.grid(alpha=0.3, which='both')
  data = io.BytesIO()
  figure.savefig(data, format='png', dpi=120)
  path.write_bytes(data.getvalue())
