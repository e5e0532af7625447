"""What happens to images between source and network: pure functions of numpy arrays [h w c]."""

import numpy as np


def resize(image, size):
  """Scales the shorter side to `size` and cuts the centre square, as the ADM data loader does.

  Halving by box filter while that leaves `size` pixels, then bicubic: bicubic alone would
  alias on large reductions, and FID is sensitive to which filter was used.

  Args:
    image: uint8 [h w c], c of 1 or 3.
    size: side of the result in pixels.

  Returns:
    uint8 [size size c].

  Raises:
    ValueError: the image is not uint8.

  Source: github.com/openai/guided-diffusion, image_datasets.py, `center_crop_arr`.
  """
  if image.dtype != np.uint8:  # a grey float would pass, as PIL's mode F
    raise ValueError(f'resize takes uint8 images, not {image.dtype}')
  h, w, c = image.shape
  if (h, w) == (size, size):
    return image
  from PIL import Image
  picture = Image.fromarray(image[:, :, 0] if c == 1 else image)
  while min(picture.size) >= 2 * size:
    picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
  scale = size / min(picture.size)
  new = [round(side * scale) for side in picture.size]
  picture = picture.resize(new, Image.Resampling.BICUBIC)
  left, top = [(side - size) // 2 for side in new]
  pixels = np.array(picture)[top:top + size, left:left + size]
  return pixels[:, :, None] if c == 1 else pixels


def flip(images, u):
  """Mirrors left to right the images whose number is below one half.

  Args:
    images: [b h w c].
    u: [b], uniform in [0, 1). Numbers rather than a generator, so that each example's
      coin is its own and does not depend on the batch that it is in.
  """
  out, mirrored = images.copy(), u < 0.5
  out[mirrored] = images[mirrored, :, ::-1]
  return out


def to_float(images):
  """uint8 0..255 -> float32 [-1, 1], x / 127.5 - 1."""
  if images.dtype != np.uint8:  # floats would be scaled a second time
    raise ValueError(f'to_float takes uint8 images, not {images.dtype}')
  out = images.astype(np.float32)
  out /= 127.5
  out -= 1
  return out


def to_uint8(images):
  """Floats [-1, 1] -> uint8 0..255, rounded and clipped; the inverse of `to_float`.

  Raises:
    ValueError: a value is NaN (the cast would make it a plausible black).
  """
  out = np.asarray(images, np.float32)
  if np.isnan(out).any():
    raise ValueError(f'{np.isnan(out).sum()} of {out.size} pixel values are NaN')
  return np.rint(np.clip((out + 1) * 127.5, 0, 255)).astype(np.uint8)
