"""Autoencoders: configs and names of diffusers' AutoencoderKL and VQModel, and of CompVis' files.

Three layouts of names are about: diffusers' (`stored`), that of its first months, which published
folders of Stable Diffusion 1 and 2 still have (`early`: other names in attention), and that of the
single files of CompVis, Stability AI and Black Forest Labs (`ldm`). `suited` says which a file has.
"""

import re

from diffax import build
from diffax.convert import tensors

IGNORED = (  # of training alone, in files that are not pruned
  r'(.*\.)?loss\..*',
  r'(.*\.)?model_ema\..*',
)

ENCODER, ENCODER_ATTENTION = 'DownEncoderBlock2D', 'AttnDownEncoderBlock2D'
DECODER, DECODER_ATTENTION = 'UpDecoderBlock2D', 'AttnUpDecoderBlock2D'
SAME = {  # ours: diffusers', and the default there
  'blocks': ('layers_per_block', 1),
  'channels': ('in_channels', 3),
  'groups': ('norm_num_groups', 32),
  'middle_attention': ('mid_block_add_attention', True),
  'scale': ('scaling_factor', 0.18215),
}
OWN = {
  'AutoencoderKL': {'latent': ('latent_channels', 4), 'quant_conv': ('use_quant_conv', True)},
  'VQModel': {'latent': ('latent_channels', 3), 'codes': ('num_vq_embeddings', 256)},
}
NAMES = {'AutoencoderKL': 'autoencoder_kl', 'VQModel': 'autoencoder_vq'}
FREE = ('sample_size', 'force_upcast', 'lookup_from_codebook')  # no part of the network
ONLY = {  # what must be so where it is said
  'act_fn': 'silu', 'norm_type': 'group', 'latents_mean': None, 'latents_std': None,
}  # fmt: skip


# --- configs --------------------------------------------------------------------------------------


def from_config(config):
  """diffusers' config.json, as a dict, -> our model's spec, as `build.build` takes it.

  Raises ValueError that names what the config says and we do not have.
  """
  kind = config.get('_class_name', 'AutoencoderKL')
  if kind not in OWN:
    raise ValueError(f'_class_name={kind!r} is none of {", ".join(OWN)}')
  taken = SAME | OWN[kind]
  spec = {'name': NAMES[kind]} | {k: config.get(*said) for k, said in taken.items()}
  widths = config.get('block_out_channels', [64])
  ratios = [w // widths[0] if w % widths[0] == 0 else w / widths[0] for w in widths]
  spec |= {'width': widths[0], 'multipliers': tuple(ratios)}
  spec['attention'] = _attention(config, len(widths))
  if kind == 'AutoencoderKL':
    spec['shift'] = config.get('shift_factor') or 0.0
  _check(config, kind, spec, {name for name, _ in taken.values()})
  return spec


def _attention(config, levels):
  """The levels that have attention; raises ValueError for other blocks, or others in the decoder.
  """
  down = config.get('down_block_types', [ENCODER] * levels)
  up = config.get('up_block_types', [DECODER] * levels)
  found = tuple(i for i, block in enumerate(down) if block == ENCODER_ATTENTION)
  want_down, want_up = _blocks(found, levels)
  if list(down) != want_down or list(up) != want_up:
    raise ValueError(
      f'down_block_types={list(down)}, up_block_types={list(up)}: with block_out_channels of '
      f'{levels} levels we have {ENCODER} and {ENCODER_ATTENTION}, and {DECODER} and '
      f'{DECODER_ATTENTION} at the same levels, last first'
    )
  return found


def _blocks(attention, levels):
  down = [ENCODER_ATTENTION if i in attention else ENCODER for i in range(levels)]
  up = [DECODER_ATTENTION if i in attention else DECODER for i in reversed(range(levels))]
  return down, up


def _check(config, kind, spec, taken):
  same = ONLY | {'out_channels': spec['channels']}
  if kind == 'AutoencoderKL':
    same['use_post_quant_conv'] = spec['quant_conv']
  else:
    same['vq_embed_dim'] = spec['latent']
  allowed = {'block_out_channels', 'down_block_types', 'up_block_types', 'shift_factor', *taken}
  for name, value in config.items():
    if name in same and value != same[name] and not (name == 'vq_embed_dim' and value is None):
      raise ValueError(f'{name}={value!r}: we have {same[name]!r} alone')
    if name not in (*allowed, *same, *FREE) and name[0] != '_':
      raise ValueError(f'{name}={value!r} is nothing that our {spec["name"]} knows')


def to_config(spec):
  """Our model's spec -> a config.json, as a dict, from which diffusers makes the same network.

  Raises ConfigError for a spec that is no autoencoder's.
  """
  kinds = {ours: theirs for theirs, ours in NAMES.items()}
  if spec.get('name') not in kinds:
    raise build.ConfigError(f'model.name={spec.get("name")!r} is none of {", ".join(kinds)}')
  model = build.build('diffax.models', spec, path='model')
  design, kind = model.design, kinds[spec['name']]
  down, up = _blocks(design.attention, len(design.multipliers))
  config = {name: getattr(design, ours) for ours, (name, _) in (SAME | OWN[kind]).items()}
  config |= {
    '_class_name': kind,
    'act_fn': 'silu',
    'out_channels': design.channels,
    'block_out_channels': [round(design.width * m) for m in design.multipliers],
    'down_block_types': down,
    'up_block_types': up,
  }
  if kind == 'VQModel':
    return config | {'vq_embed_dim': design.latent}
  return config | {'use_post_quant_conv': design.quant_conv, 'shift_factor': design.shift or None}


def weights(folder):
  """The `tensors.Weights` of an autoencoder in a folder of diffusers. Raises ConfigError."""
  try:
    spec = from_config(tensors.config_json(folder))
  except build.ConfigError:
    raise
  except ValueError as error:
    raise build.ConfigError(f'{folder}/config.json: {error}') from error
  files = tensors.find(folder)
  return tensors.Weights(spec, files, lambda model: suited(files.of, model), IGNORED)


# --- names ----------------------------------------------------------------------------------------

BLOCK = {'norm_in': 'norm1', 'conv_in': 'conv1', 'norm_out': 'norm2', 'conv_out': 'conv2'}
DIFFUSERS = BLOCK | {
  'shortcut': 'conv_shortcut', 'norm': 'group_norm',
  'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'out': 'to_out.0',
}  # fmt: skip
EARLY = DIFFUSERS | {'query': 'query', 'key': 'key', 'value': 'value', 'out': 'proj_attn'}
LDM = BLOCK | {
  'shortcut': 'nin_shortcut', 'norm': 'norm',
  'query': 'q', 'key': 'k', 'value': 'v', 'out': 'proj_out',
}  # fmt: skip
ATTENTION = ('query', 'key', 'value', 'out')
ONE_PLACE = ('shortcut', 'quant_conv', 'post_quant_conv')  # convolutions of one place, all over


def stored(model):
  """Where diffusers has the parameters of an autoencoder of ours: (path, shape) -> `Stored`."""
  levels = len(model.design.multipliers)
  return lambda path, shape: _diffusers(path, shape, levels, DIFFUSERS)


def early(model):
  """As `stored`, in files of before 2023, whose attention has `query`, ..., `proj_attn`."""
  levels = len(model.design.multipliers)
  return lambda path, shape: _diffusers(path, shape, levels, EARLY)


def ldm(model, prefix='first_stage_model.'):
  """As `stored`, in single files of the original repositories. prefix: of all names, '' in a file
  of the autoencoder alone.
  """
  del model  # levels are numbered as ours
  return lambda path, shape: _ldm(path, shape, prefix)


def suited(names, model, prefix='first_stage_model.'):
  """Of `stored`, `early` and `ldm` the one whose names a file has; prefix: as `ldm` is to have it.

  names: of the file's tensors. `stored` where it is none of the others.
  """
  if f'{prefix}encoder.norm_out.weight' in names:
    return ldm(model, prefix)
  if any(re.fullmatch(r'(en|de)coder\..*attentions\.\d+\.proj_attn\.weight', n) for n in names):
    return early(model)
  return stored(model)


def _diffusers(path, shape, levels, parts):
  if path == 'codebook':
    return tensors.Stored(('quantize.embedding.weight',))
  side, place, number, block, rest = _parse(path)
  stage = f'{side}.mid_block.'
  if place == 'level':
    stage = f'{side}.down_blocks.{number}.'
    if side == 'decoder':
      stage = f'{side}.up_blocks.{levels - 1 - number}.'
  if not place:
    module = {'norm': f'{side}.conv_norm_out'}.get(rest[0], '.'.join([*side.split(), rest[0]]))
  elif block is None:
    module = stage + {'down': 'downsamplers', 'up': 'upsamplers'}[rest[0]] + '.0.conv'
  elif rest[0] == 'attention':
    module = f'{stage}attentions.{block}.{parts[rest[1]]}'
  else:
    module = f'{stage}resnets.{block}.{parts[rest[0]]}'
  return _place(module, path, shape, rest)


def _ldm(path, shape, prefix):
  if path == 'codebook':
    return tensors.Stored((f'{prefix}quantize.embedding.weight',))
  side, place, number, block, rest = _parse(path)
  stage = f'{side}.mid.'
  if place == 'level':
    stage = f'{side}.{"down" if side == "encoder" else "up"}.{number}.'
  if not place:
    module = {'norm': f'{side}.norm_out'}.get(rest[0], '.'.join([*side.split(), rest[0]]))
  elif block is None:
    module = stage + {'down': 'downsample.conv', 'up': 'upsample.conv'}[rest[0]]
  else:
    kind = 'attn' if rest[0] == 'attention' else 'block'
    index = f'_{block + 1}' if place == 'middle' else f'.{block}'
    module = f'{stage}{kind}{index}.{LDM[rest[kind == "attn"]]}'
  made = _place(prefix + module, path, shape, rest)
  if rest[0] == 'attention' and rest[1] in ATTENTION and path.endswith('kernel'):
    return made._replace(pattern=tensors.DENSE_CONV)
  return made


def _parse(path):
  """(side, 'level', 'middle' or '', level, block, modules within) of a parameter's path.

  'decoder/level1_block0/attention/query/kernel' is ('decoder', 'level', 1, 0, ['attention',
  'query']), 'quant_conv/bias' ('', '', None, None, ['quant_conv']).
  """
  *modules, _ = path.split('/')
  side = modules.pop(0) if modules[0] in ('encoder', 'decoder') else ''
  found = re.fullmatch(r'(level|middle)(\d*)_(?:block(\d+)|(down|up))', modules[0])
  if not found:
    return side, '', None, None, modules
  place, number, block, change = found.groups()
  within = [change] if change else modules[1:]
  return side, place, int(number or 0), None if change else int(block), within


def _place(module, path, shape, rest):
  made = tensors.usual(module, path, shape)
  if rest[-1] in ONE_PLACE and path.endswith('kernel'):
    return made._replace(pattern=tensors.DENSE_CONV)
  return made
