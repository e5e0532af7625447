"""What happens to images between source and network: pure functions of numpy arrays [h w c]."""

import numpy as np


def resize(image, size):
  """Scales the shorter side to `size` and cuts the centre square: uint8 [size size c]; `cover`."""
  return cover(image, size, size)[0]


def cover(image, height, width):
  """Scales an image until it just covers height by width, and cuts those out of the centre.

  As the ADM data loader does for squares. Halving by box filter while that leaves as many pixels,
  then bicubic: bicubic alone would alias on large reductions, and FID is sensitive to which filter
  was used.

  Args:
    image: uint8 [h w c], c of 1 or 3.
    height, width: of the result in pixels.

  Returns:
    (uint8 [height width c], top, left), in pixels of the scaled image.

  Raises:
    ValueError: the image is not uint8.

  Source: github.com/openai/guided-diffusion, image_datasets.py, `center_crop_arr`.
  """
  if image.dtype != np.uint8:  # a grey float would pass, as PIL's mode F
    raise ValueError(f'resize takes uint8 images, not {image.dtype}')
  h, w, c = image.shape
  if (h, w) == (height, width):
    return image, 0, 0
  from PIL import Image
  picture = Image.fromarray(image[:, :, 0] if c == 1 else image)
  while picture.width >= 2 * width and picture.height >= 2 * height:
    picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
  scale = max(width / picture.width, height / picture.height)
  new = [round(side * scale) for side in picture.size]
  picture = picture.resize(new, Image.Resampling.BICUBIC)
  left, top = (new[0] - width) // 2, (new[1] - height) // 2
  pixels = np.array(picture)[top:top + height, left:left + width]
  return (pixels[:, :, None] if c == 1 else pixels), top, left


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
