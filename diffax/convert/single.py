"""Single files as authors publish them: the whole of a Stable Diffusion in one, and the first DiT.

One safetensors file holds U-Net, autoencoder and text encoders of Stable Diffusion 1, 2 or XL, by
the names of CompVis' and Stability AI's repositories, and no config: which model it is is told by
names and shapes alone. What they do not tell:

  the vocabulary of the text encoders: `config.text.tokenizer` names a folder that holds it
  eps or v: of Stable Diffusion 2 there are both in files of one form. It is eps, unless
  --config.prediction=v is said, as for those of 768 pixels (with --config.data.size=768)
  the autoencoder of a DiT: `config.latent.path` names a folder that holds it

The sampler is that of the repositories: DDIM of Stable Diffusion (its `ddim.py`: every n-th index
of the table, one later, and from the last to the table's first), the network's own variance of DiT.
"""

import dataclasses
import re
from typing import NamedTuple

from absl import logging

from diffax.build import ConfigError
from diffax.convert import autoencoder as autoencoders
from diffax.convert import dit
from diffax.convert import latent_unet
from diffax.convert import tensors
from diffax.convert import text
from diffax.models import dit as dits
from diffax.models import text as encoders

UNET, AUTOENCODER = 'model.diffusion_model.', 'first_stage_model.'
OTHER = (  # buffers of the schedule, copies of training
  r'betas|logvar|scale_factor|denoiser\.sigmas|(.*_)?alphas_cumprod(_prev)?|posterior_.*',
  r'model_ema\..*',
)


class Text(NamedTuple):
  """A text encoder in a file. prefix: of all its names. openclip: whose names; its padding is id 0.
  spec: of its model.
  """

  prefix: str
  openclip: bool
  spec: dict


class Kind(NamedTuple):
  """A family of models. model, autoencoder: specs. texts: of `Text`. size: of pictures, in pixels.
  note: what its users are to be told.
  """

  name: str
  model: dict
  autoencoder: dict
  texts: tuple
  size: int
  note: str = ''


def _text(prefix, openclip, preset):
  return Text(prefix, openclip, dict(
    name='clip_text', vocab=49408, length=77, **encoders.PRESETS[preset]))


VAE = dict(name='autoencoder_kl')
KINDS = {  # by channels of the text that the U-Net is told
  768: Kind(
    'Stable Diffusion 1', dict(name='sd1'), VAE,
    (_text('cond_stage_model.transformer.', False, 'SD1/ViT-L'),), 512),
  1024: Kind(
    'Stable Diffusion 2', dict(name='sd2'), VAE,
    (_text('cond_stage_model.model.', True, 'SD2/ViT-H'),), 512,
    'taken to predict eps; where it predicts v, as those for 768 pixels, say --config.prediction=v'
  ),
  2048: Kind(
    'Stable Diffusion XL', dict(name='sdxl'), VAE | dict(scale=0.13025),
    (_text('conditioner.embedders.0.transformer.', False, 'SDXL/ViT-L'),
     _text('conditioner.embedders.1.model.', True, 'SDXL/ViT-bigG')), 1024),
}
SHOWN = {  # by channels that the U-Net sees: (what beside x, config.given)
  4: ({}, 'none'),
  8: (dict(image=4), 'before'),  # InstructPix2Pix
  9: (dict(image=4, mask=True), 'masked'),  # inpainting
}
NONE_OF_OURS = {  # patterns of names that tell what a file is instead
  r'control_model\..*|.*controlnet.*': 'a ControlNet',
  r'.*lora[_.].*': 'a LoRA, which changes another file',
  r'(.*\.)?joint_blocks\..*': 'Stable Diffusion 3',
  r'(.*\.)?double_blocks\..*': 'Flux',
  r'(down_blocks|transformer_blocks|text_model)\..*':
    "one network of a folder in diffusers' layout: name the folder in which model_index.json is",
}
PATCHES, LABELS = 'x_embedder.proj.weight', 'y_embedder.embedding_table.weight'  # of DiT


def kind(files):
  """(`Kind`, channels that the U-Net sees) of a single file.

  Raises ConfigError that says what it is instead, or what in it is not known.
  """
  told = next((n for n in files.of if re.fullmatch(rf'{UNET}.*\.attn2\.to_k\.weight', n)), None)
  first = f'{UNET}input_blocks.0.0.weight'
  if told is None or first not in files.of:
    what = next((said for p, said in NONE_OF_OURS.items() for n in files.of if re.fullmatch(p, n)),
                f'none that is known, with {", ".join(list(files.of)[:3]) or "no tensor"}')
    raise ConfigError(f'{files.where} is {what}; single files there are of {_names()}')
  width, channels = files.of[told][1][1], files.of[first][1][1]
  if width not in KINDS or channels not in SHOWN:
    raise ConfigError(
      f'{files.where} is a U-Net told of text of {width} channels that sees {channels}: none of '
      f'{_names()}, which see {", ".join(map(str, SHOWN))}'
    )
  found = KINDS[width]
  prefixes = (UNET, AUTOENCODER, *(part.prefix for part in found.texts))
  unknown = [n for n in files.of if not n.startswith(prefixes) and not any(
    re.fullmatch(p, n) for p in OTHER)]
  if unknown:
    raise ConfigError(
      f'{files.where} has beside what is known of {found.name} {", ".join(unknown)}: is it of '
      'another model?'
    )
  return found, channels


def _names():
  return ', '.join(each.name for each in KINDS.values()) + ' and DiT'


def _beside(prefix):
  """The pattern of all names that do not begin so: those of the other networks."""
  return rf'(?!{re.escape(prefix)}).*'


# --- the parts ------------------------------------------------------------------------------------


def network(path):
  """The `tensors.Weights` of the network of a single file. Raises ConfigError."""
  files = tensors.find(path)
  if PATCHES in files.of:
    return tensors.Weights(_dit(files), files, dit.facebook, dit.IGNORED)
  found, channels = kind(files)
  spec = found.model | SHOWN[channels][0]
  return tensors.Weights(spec, files, latent_unet.ldm, latent_unet.LDM_IGNORED)


def autoencoder(path):
  """The like of the autoencoder."""
  files = tensors.find(path)
  found, _ = kind(files)
  ignored = (_beside(AUTOENCODER), *autoencoders.IGNORED)
  return tensors.Weights(found.autoencoder, files, autoencoders.ldm, ignored)


def texts(path):
  """{'' or '_2': the like of a text encoder}."""
  files = tensors.find(path)
  found, _ = kind(files)
  made = {}
  for number, part in zip(('', '_2'), found.texts):
    within = [n.removeprefix(part.prefix) for n in files.of if n.startswith(part.prefix)]
    names = text.openclip if part.openclip else text.stored
    prefix = part.prefix if part.openclip else part.prefix + text.prefix_of(within)
    made[number] = tensors.Weights(
      part.spec, files, lambda model, names=names, prefix=prefix: names(model, prefix),
      (_beside(part.prefix), *text.IGNORED))
  return made


def padded(tokenizer, path, number):
  """A tokenizer as the encoder `number` of a single file needs it: OpenCLIP's pads with id 0,
  OpenAI's with the end of the text, and all have one vocabulary.
  """
  part = kind(tensors.find(path))[0].texts[bool(number)]
  return dataclasses.replace(tokenizer, pad=0 if part.openclip else tokenizer.end)


def _dit(files):
  """The spec of the DiT of a state dict; heads are told by no shape, but by the paper's sizes."""
  needed = (PATCHES, LABELS, 'pos_embed', 'final_layer.linear.weight')
  missing = [name for name in needed if name not in files.of]
  if missing:
    raise ConfigError(f'{files.where} misses {", ".join(missing)} of a DiT')
  patches, labels, places, last = (files.of[name][1] for name in needed)
  numbers = [re.match(r'blocks\.(\d+)\.', name) for name in files.of]
  width, patch, depth = patches[0], patches[-1], 1 + max(int(m[1]) for m in numbers if m)
  heads = {(w, d): h for w, d, h in dits.PRESETS.values()}.get((width, depth))
  if heads is None:
    raise ConfigError(
      f'{files.where} is a DiT of width {width} and {depth} blocks, none of the published '
      f'{", ".join(dits.PRESETS)}, so that its heads are not known'
    )
  return dict(
    name='dit', patch=patch, width=width, depth=depth, heads=heads, classes=labels[0] - 1,
    channels=last[0] // patch**2, base=round(places[1] ** 0.5))


# --- configs --------------------------------------------------------------------------------------


def config(path, batch_size=1):
  """The config, as a dict, that samples from a single file. Raises ConfigError."""
  files = tensors.find(path)
  if PATCHES in files.of:
    return _of_dit(files, batch_size)
  found, channels = kind(files)
  if found.note:
    logging.warning('%s is of %s: %s', path, found.name, found.note)
  grid = dict(name='leading', train_steps=1000, offset=1, clean=False)
  return dict(
    steps=1, batch_size=batch_size, ema=(), data=dict(name='blank', size=found.size),
    model=found.model | SHOWN[channels][0], latent=dict(name='autoencoder', path=path),
    text=dict(name='clip', path=path, zeros=len(found.texts) > 1),
    given=dict(name=SHOWN[channels][1]),
    schedule=dict(name='scaled_linear', beta_min=0.00085, beta_max=0.012, steps=1000),
    prediction=dict(name='eps'),
    sample=dict(
      count=1, batch_size=1, guidance=5.0 if len(found.texts) > 1 else 7.5,
      sampler=dict(name='ddim', steps=50, grid=grid)),
  )


def _of_dit(files, batch_size):
  """DiT's: Peebles & Xie 2023, section 4; its autoencoder is of factor 8."""
  spec = _dit(files)
  learned = spec['channels'] == 2 * files.of[PATCHES][1][1]
  prediction = dict(name='eps')
  sampler = dict(name='ddpm', steps=250, grid=dict(name='linspace', train_steps=1000))
  return dict(
    steps=1, batch_size=batch_size, ema=(),
    data=dict(name='blank', size=spec['base'] * spec['patch'] * 8, classes=spec['classes']),
    model=spec, latent=dict(name='autoencoder'),
    schedule=dict(name='linear_table', beta_min=1e-4, beta_max=0.02, steps=1000),
    prediction=dict(name='learned_range', of=prediction) if learned else prediction,
    sample=dict(
      count=1, batch_size=1, guidance=4.0,
      sampler=sampler | (dict(variance='learned') if learned else {})),
  )
