"""What is done with pictures of the user's, named in `config.sample.edit`: all of it is sampling.

An edit changes where the walk begins, what the network is told, or the denoiser:

  none             from noise
  image_to_image   from a picture with noise, the last part of the walk
  inpaint          a part of a picture anew; by the network where it was trained to (givens.masked),
                   else by holding the rest to what is known
  outpaint         beyond the edges of a picture, alike
  instruct         a picture as a text says, by a network trained to (givens.before)
  upscale          a larger picture, by a network trained to (givens.smaller, givens.noised)
  invert           from the noise that a picture comes of under another text
  interpolate      from one text and noise to another
  variations       from noise around that of one sample

Pictures and masks are files, or folders of them, which samples take in turn.
"""

import os
from typing import Any, NamedTuple
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffax import conditions
from diffax import guidance
from diffax import inverse
from diffax import noises
from diffax import samplers
from diffax import schedules
from diffax.build import ConfigError
from diffax.data import sources
from diffax.data import transforms


class Place(NamedTuple):
  """Where an edit takes place, in each trace anew.

  schedule, ts: the walk. keys [b], asked {name: [b ...]}: of the samples. shape: of x. encode:
  pictures [b h w c] -> their z. conds: {'cond', 'null', and names of an edit's own}, what is told.
  denoise: (x, level, cond) -> Estimate.
  """

  schedule: schedules.Schedule
  ts: Any
  keys: Any
  asked: dict
  shape: tuple
  encode: Callable
  conds: dict
  denoise: Callable


class Edit(NamedTuple):
  """An edit; what it leaves out is as without it.

  ask: (int [b], shape of pictures [h w c]) -> {name: numpy [b ...]}, for the givens and itself.
  prompts: prompts -> (those of the samples, {name: prompt}), others whose conditions it needs.
  begin: Place -> (ts, x). told: Place -> (cond, null). wrap: (Place, denoiser) -> denoiser. finish:
  (asked, pictures) -> pictures. guide: (Place, scale) -> denoiser, in place of the settings' own.
  trained: whether it is for a network with `config.given` alone; needs: what it asks of the user's
  pictures, () where it has none.
  """

  ask: Callable = lambda index, shape: {}
  prompts: Callable = lambda prompts: (prompts, {})
  begin: Callable = lambda place: (place.ts, _noise(place))
  told: Callable = lambda place: (place.conds['cond'], place.conds['null'])
  wrap: Callable = lambda place, denoise: denoise
  finish: Callable = lambda asked, pictures: pictures
  guide: Callable | None = None
  trained: bool = False
  needs: tuple = ()


def _noise(place):
  return samplers.initial(place.schedule, place.ts, place.keys, place.shape)


def none() -> Edit:
  """From noise."""
  return Edit()


def image_to_image(image: str, strength=0.8) -> Edit:
  """From a picture, noised to where the last `strength` of the walk begins; `inverse.sdedit`.

  image: a file or folder. strength: 0 for the picture itself, 1 for the whole walk. Raises
  ConfigError.
  """
  _share('strength', strength)
  files = _files(image, 'image')

  def begin(place):
    z = place.encode(place.asked['picture'])
    return inverse.sdedit(place.schedule, place.ts, strength, z, _unit(place))

  ask = lambda index, shape: {'picture': _pictures(files, index, shape)}
  return Edit(ask, begin=begin, needs=('picture',))


def _unit(place):
  """Unit noise of x's shape, that which sampling would have begun with."""
  return noises.normal(noises.fold(place.keys, 0), place.shape)


def inpaint(image: str, mask: str, strength=1.0, paste=True) -> Edit:
  """The part of a picture that a mask says is painted anew, the rest stays.

  image, mask: files, or folders of as many; white in the mask is painted. strength: below 1 from
  the picture's own, see `image_to_image`. paste: whether the result has the known pixels themselves
  rather than what an autoencoder makes of them. A network with given=masked is told both; any other
  is held to the known part before every call (`inverse.replacement`). Raises ConfigError.
  """
  _share('strength', strength)
  files, masks = _files(image, 'image'), _files(mask, 'mask')
  if len(masks) not in (1, len(files)):
    raise ConfigError(f'mask={mask}: {len(masks)} masks for {len(files)} pictures: one, or as many')

  def ask(index, shape):
    return _known(_pictures(files, index, shape), _masks(masks, files, index, shape))

  return _painted(ask, strength, paste)


def _known(picture, mask):
  return {'picture': picture, 'image': picture, 'mask': mask}


def _painted(ask, strength, paste):
  def begin(place):
    if strength == 1:
      return place.ts, _noise(place)
    z = place.encode(place.asked['picture'])
    return inverse.sdedit(place.schedule, place.ts, strength, z, _unit(place))

  def wrap(place, denoise):
    if 'mask' in place.conds['cond']:
      return denoise
    factor = place.asked['mask'].shape[1] // place.shape[0]
    known = conditions.smaller_mask(place.asked['mask'], factor) < 0.5
    z = place.encode(place.asked['picture'])
    operator = inverse.mask(known)
    return inverse.replacement(denoise, operator, operator.apply(z), _unit(place))

  def finish(asked, pictures):
    painted = asked['mask'] > 0.5
    return jnp.where(painted, pictures, asked['picture']) if paste else pictures

  return Edit(ask, begin=begin, wrap=wrap, finish=finish, needs=('image', 'mask'))


def outpaint(image: str, left=0, right=0, top=0, bottom=0, strength=1.0, paste=True) -> Edit:
  """Beyond the edges of a picture: so many pixels to each side of what is drawn are painted.

  The picture is brought to the size that is left; see `inpaint`. Raises ConfigError.
  """
  files, sides = _files(image, 'image'), (left, right, top, bottom)
  if min(sides) < 0 or not any(sides):
    raise ConfigError(f'outpaint: left, right, top, bottom = {sides}: pixels, one of them above 0')

  def ask(index, shape):
    h, w, c = shape
    if left + right >= w or top + bottom >= h:
      raise ConfigError(f'outpaint: {sides} leave nothing of {h} x {w} pixels for the picture')
    inner = _pictures(files, index, (h - top - bottom, w - left - right, c))
    pad = ((0, 0), (top, bottom), (left, right), (0, 0))
    mask = np.pad(np.zeros((*inner.shape[:-1], 1), np.float32), pad, constant_values=1)
    return _known(np.pad(inner, pad, mode='edge'), mask)

  return _painted(ask, strength, paste)


def instruct(image: str, image_guidance=1.5) -> Edit:
  """A picture changed as the prompt says, by a network that was trained to (given=before).

  image_guidance: the scale s_I of the picture's own guidance, beside the text's s_T, `guidance`:
  null + s_I (picture - null) + s_T (both - picture); Brooks et al. 2023, "InstructPix2Pix", eq. 3.
  Raises ConfigError.
  """
  files = _files(image, 'image')

  def guide(place, scale):
    cond, null = place.conds['cond'], place.conds['null']
    nothing = {**null, 'image': jnp.zeros_like(null['image'])}
    scales = [1 + scale - image_guidance, image_guidance]
    return guidance.guide(place.denoise, cond, [null, nothing], scales)

  return Edit(
    lambda index, shape: {'image': _pictures(files, index, shape)}, guide=guide, trained=True,
    needs=('image',))


def upscale(image: str, noise=0.0) -> Edit:
  """A larger picture, by a network that was trained to (given=smaller): a cascade's next stage.

  image: the small ones, of files or a run's samples/. noise: what is added to them, within what
  training added: a deviation for given=smaller, for given=noised a step of its table, as 20; Ho et
  al. 2021, "Cascaded Diffusion Models", sec. 4.2. Raises ConfigError.
  """
  files = _files(image, 'image')
  if noise < 0:
    raise ConfigError(f'upscale: noise={noise} is negative')

  def ask(index, shape):
    level = np.full(len(index), noise, np.float32)
    return {'image': _pictures(files, index, shape), 'noise': level}

  return Edit(ask, trained=True, needs=('image', 'noise'))


def invert(image: str, prompt='', strength=1.0) -> Edit:
  """The noise that a picture comes of under the text `prompt`, drawn under another.

  The flow is followed from the picture up by DDIM steps on the times of the walk, without guidance;
  Song et al. 2021, "Denoising Diffusion Implicit Models", sec. 4.3; Mokady et al. 2022, sec. 3.1.
  strength: how much of the walk, as for `image_to_image`. Raises ConfigError.
  """
  _share('strength', strength)
  files = _files(image, 'image')

  def begin(place):
    z = place.encode(place.asked['picture'])
    ts, _ = inverse.sdedit(place.schedule, place.ts, strength, z, z)
    up = jnp.maximum(ts[::-1], place.schedule.t_min)
    ddim, cond = samplers.ddim(0.0), place.conds['source']
    told = lambda x, level: place.denoise(x, level, cond)
    return ts, samplers.sample(ddim, told, ddim.plan(place.schedule, up), z)

  return Edit(
    lambda index, shape: {'picture': _pictures(files, index, shape)},
    lambda prompts: (prompts, {'source': prompt}), begin, needs=('picture',))


def interpolate(frames=8, seeds=(0, 1)) -> Edit:
  """From the first prompt and seed to the second in `frames` samples, evenly.

  Noise goes along the great circle, texts in a line; with one prompt the noise alone. Raises
  ConfigError.
  """
  if frames < 2 or len(seeds) != 2:
    raise ConfigError(f'interpolate: frames={frames}, seeds={seeds}: say 2 and more, and two seeds')

  def ask(index, shape):
    del shape
    return {'share': (index % frames / (frames - 1)).astype(np.float32)}

  def prompts(said):
    if len(said) > 2:
      raise ConfigError(f'interpolate: {len(said)} prompts; say one or two')
    return said[:1], {'other': said[-1]} if said else {}

  def begin(place):
    ends = [_seeded(place, seed) for seed in seeds]
    return place.ts, _started(place, slerp(*ends, _wide(place.asked['share'], ends[0])))

  def told(place):
    def between(a, b):
      if not jnp.issubdtype(a.dtype, jnp.floating):  # masks: what either has
        return jnp.maximum(a, b)
      return a + _wide(place.asked['share'], a) * (b - a)

    cond = place.conds['cond']
    return jax.tree.map(between, cond, place.conds.get('other', cond)), place.conds['null']

  return Edit(ask, prompts, begin, told)


def variations(seed=0, strength=0.2) -> Edit:
  """Samples around one, sample 0 of `seed`: its noise, turned by `strength` towards each's own.

  strength: 0 is that sample, 1 others. Raises ConfigError.
  """
  _share('strength', strength)

  def begin(place):
    return place.ts, _started(place, slerp(_seeded(place, seed), _unit(place), strength))

  return Edit(begin=begin)


def slerp(a, b, share):
  """From unit noise a to b [b ...] along the great circle of each example; share in [0, 1].

  Shoemake 1985; on a straight line the middle would be short of noise.
  """
  axes = tuple(range(1, a.ndim))
  norm = lambda x: jnp.sqrt((x * x).sum(axes, keepdims=True))
  cosine = (a * b).sum(axes, keepdims=True) / (norm(a) * norm(b))
  angle = jnp.arccos(jnp.clip(cosine, -1, 1))
  safe = jnp.where(jnp.sin(angle) < 1e-4, 1.0, angle)
  turned = (jnp.sin((1 - share) * safe) * a + jnp.sin(share * safe) * b) / jnp.sin(safe)
  return jnp.where(jnp.sin(angle) < 1e-4, (1 - share) * a + share * b, turned)


def _wide(share, x):
  return jnp.reshape(share, (-1, *[1] * (x.ndim - 1)))


def _seeded(place, seed):
  """The unit noise of sample 0 of `seed`, for each example."""
  keys = samplers.sample_keys(seed, jnp.zeros(place.keys.shape, jnp.int32))
  return noises.normal(noises.fold(keys, 0), place.shape)


def _started(place, noise):
  first = place.ts.t[0] if isinstance(place.ts, samplers.Path) else place.ts[0]
  return schedules.start(place.schedule, first, noise)


# --- files ----------------------------------------------------------------------------------------


def _share(name, value):
  if not 0 <= value <= 1:
    raise ConfigError(f'{name}={value} is outside [0, 1]')


def _files(path, what):
  """The picture files that a path names, itself or all of a folder. Raises ConfigError."""
  if os.path.isdir(path):
    names = sorted(os.listdir(path))
    found = [os.path.join(path, n) for n in names if n.lower().endswith(sources.SUFFIXES)]
  else:
    found = [path] if os.path.isfile(path) else []
  if not found:
    raise ConfigError(
      f'{what}={path!r}: no such picture, or folder with one; files end in '
      f'{", ".join(sources.SUFFIXES)}'
    )
  return found


def _read(file, channels):
  try:
    with open(file, 'rb') as opened:
      return sources.decode(opened.read(), channels)
  except Exception as error:  # of many kinds
    raise ConfigError(f'{file} cannot be read as a picture ({" ".join(str(error).split())})') \
      from error


def _pictures(files, index, shape):
  """float32 [b h w c] in [-1, 1] of files in turn, scaled to cover [h w] and cut at the centre."""
  h, w, c = shape
  chosen = [files[i % len(files)] for i in index]
  made = {file: transforms.cover(_read(file, c), h, w)[0] for file in set(chosen)}
  return transforms.to_float(np.stack([made[file] for file in chosen]))


def _masks(masks, files, index, shape):
  """float32 [b h w 1], 0 or 1, of masks that must be of their pictures' sizes. Raises ConfigError.
  """
  made = []
  for i in index:
    mask, file = masks[i % len(masks)], files[i % len(files)]
    pixels, of = _read(mask, 1), _read(file, 3).shape[:2]
    if pixels.shape[:2] != of:
      raise ConfigError(
        f'mask {mask} is {pixels.shape[1]} x {pixels.shape[0]} and picture {file} '
        f'{of[1]} x {of[0]}: make them of one size'
      )
    made.append(transforms.cover(pixels, *shape[:2])[0] > 127)
  return np.stack(made).astype(np.float32)
