"""Weights of Stable Diffusion's U-Nets: diffusers' `UNet2DConditionModel`, and single files.

The layout of diffusers is a folder of `config.json` and safetensors; that of CompVis' and
Stability's own repositories ("ldm", "sgm") is one file for all networks, where the U-Net's names
begin with `model.diffusion_model.`. Sources: the names and configs of the published files
(stable-diffusion-v1-5, stable-diffusion-2-1, stable-diffusion-xl-base-1.0 and -refiner-1.0,
stable-diffusion-x4-upscaler, instruct-pix2pix and the inpainting models).
"""

import re

from diffax.build import build
from diffax.convert import tensors
from diffax.models import latent_unet

IGNORED = ()
LDM_IGNORED = (r'(?!model\.diffusion_model\.).*',)  # the other networks of a single file

# --- configs --------------------------------------------------------------------------------------

DEFAULTS = dict(  # of diffusers, for what a config leaves out
  in_channels=4,
  out_channels=4,
  down_block_types=('CrossAttnDownBlock2D',) * 3 + ('DownBlock2D',),
  up_block_types=('UpBlock2D',) + ('CrossAttnUpBlock2D',) * 3,
  mid_block_type='UNetMidBlock2DCrossAttn',
  only_cross_attention=False,
  block_out_channels=(320, 640, 1280, 1280),
  layers_per_block=2,
  dropout=0.0,
  norm_num_groups=32,
  cross_attention_dim=1280,
  transformer_layers_per_block=1,
  attention_head_dim=8,
  use_linear_projection=False,
  addition_embed_type=None,
  addition_time_embed_dim=None,
  num_class_embeds=None,
  projection_class_embeddings_input_dim=None,
)
FIXED = dict(  # what released checkpoints all have; another value is another network
  center_input_sample=False,
  flip_sin_to_cos=True,
  freq_shift=0,
  downsample_padding=1,
  mid_block_scale_factor=1,
  act_fn='silu',
  norm_eps=1e-5,
  reverse_transformer_layers_per_block=None,
  encoder_hid_dim=None,
  encoder_hid_dim_type=None,
  num_attention_heads=None,
  dual_cross_attention=False,
  class_embed_type=None,
  resnet_time_scale_shift='default',
  resnet_skip_time_act=False,
  resnet_out_scale_factor=1.0,
  time_embedding_type='positional',
  time_embedding_dim=None,
  time_embedding_act_fn=None,
  timestep_post_act=None,
  time_cond_proj_dim=None,
  conv_in_kernel=3,
  conv_out_kernel=3,
  attention_type='default',
  class_embeddings_concat=False,
  mid_block_only_cross_attention=None,
  cross_attention_norm=None,
)
IDLE = {  # what changes nothing of the network: precision, and what was written beside an average
  'sample_size', 'upcast_attention', 'addition_embed_type_num_heads', 'decay', 'inv_gamma',
  'min_decay', 'optimization_step', 'power', 'update_after_step', 'use_ema_warmup',
}  # fmt: skip
REFINER = 1280 + 5 * latent_unet.SINUSOIDS  # channels of its pooled text and sizes
MIDDLES = {'UNetMidBlock2DCrossAttn': True, 'UNetMidBlock2D': False}


def from_config(config: dict) -> dict:
  """The model's spec, of the `config.json` of a UNet2DConditionModel.

  How many channels are shown behind the latent is told by in_channels - out_channels alone: 5 are a
  mask and an image, others an image. Of pooled text and sizes the sum alone is known: they are six
  numbers, but five where the sum is the refiner's or has no room for six.
  Raises ValueError for what we do not have.
  """
  said = {k: v for k, v in config.items() if k[0] != '_'}
  for name, value in said.items():
    if name not in DEFAULTS and name not in IDLE and (name not in FIXED or value != FIXED[name]):
      allowed = f'{FIXED[name]!r} alone' if name in FIXED else 'no such option'
      raise ValueError(f'config.json of a U-Net says {name}={value!r}; there is {allowed}')
  c = {k: said.get(k, v) for k, v in DEFAULTS.items()}
  channels = c['block_out_channels']
  levels = len(channels)
  attention, middle = _depths(c, levels)
  attends = [d > 0 for d in (*attention[:-1], attention[-1] or middle)]
  extra = c['in_channels'] - c['out_channels']
  if extra < 0:
    raise ValueError(
      f"config.json of a U-Net says in_channels={c['in_channels']} and "
      f"out_channels={c['out_channels']}; what is shown must begin with the latent"
    )
  flags = c['only_cross_attention']
  return dict(
    name='latent_unet',
    width=channels[0],
    multipliers=tuple(_ratio(n, channels[0]) for n in channels),
    blocks=_same(c, 'layers_per_block'),
    attention=attention,
    middle=middle,
    **_heads(c, attends),
    text=_same(c, 'cross_attention_dim'),
    text_only=tuple(flags) if isinstance(flags, (list, tuple)) and any(flags) else (),
    linear=bool(c['use_linear_projection']),
    **_added(c),
    noise_levels=c['num_class_embeds'] or 0,
    image=4 if extra == 5 else extra,
    mask=extra == 5,
    dropout=c['dropout'],
    groups=c['norm_num_groups'],
  )


def _ratio(n, width):
  return n // width if n % width == 0 else n / width


def _same(c, name):
  """The value of an option that diffusers can have by level, where all levels have one."""
  said = c[name] if isinstance(c[name], (list, tuple)) else [c[name]]
  if len(set(said)) != 1 or not isinstance(said[0], int):
    raise ValueError(f'config.json of a U-Net says {name}={c[name]!r}; we have one for all levels')
  return said[0]


def _depths(c, levels):
  """(depth of the transformers a level, depth of the middle's)."""
  blocks = {'CrossAttnDownBlock2D': True, 'DownBlock2D': False}
  up = [k.replace('Down', 'Up') for k in reversed(c['down_block_types'])]
  unknown = [k for k in c['down_block_types'] if k not in blocks]
  if unknown or up != list(c['up_block_types']) or len(up) != levels:
    raise ValueError(
      f"config.json of a U-Net says down_block_types={c['down_block_types']} and up_block_types="
      f"{c['up_block_types']}; each of {levels} must be one of {', '.join(blocks)}, and its like "
      'the other way round'
    )
  if c['mid_block_type'] not in MIDDLES:
    raise ValueError(
      f"config.json of a U-Net says mid_block_type={c['mid_block_type']!r}; it must be one of "
      f'{", ".join(MIDDLES)}'
    )
  said = c['transformer_layers_per_block']
  depths = [said] * levels if isinstance(said, int) else said
  if len(depths) != levels or not all(isinstance(d, int) for d in depths):
    raise ValueError(
      f'config.json of a U-Net says transformer_layers_per_block={said}; it must be a number, or '
      f'one for each of {levels} levels'
    )
  attention = tuple(d * blocks[kind] for d, kind in zip(depths, c['down_block_types']))
  return attention, depths[-1] * MIDDLES[c['mid_block_type']]


def _heads(c, attends):
  """attention_head_dim is, whatever its name says, the number of heads: one, or one a level."""
  said = c['attention_head_dim']
  if isinstance(said, int):
    return dict(heads=said)
  if len(set(said)) == 1:
    return dict(heads=said[0])
  widths = {n / k for n, k, a in zip(c['block_out_channels'], said, attends) if a}
  if len(widths) == 1:
    return dict(head_width=int(widths.pop()))
  raise ValueError(
    f'config.json of a U-Net says attention_head_dim={said}, numbers of heads that are neither '
    f"the same nor of one width, with block_out_channels={c['block_out_channels']}"
  )


def _added(c):
  kind, width = c['addition_embed_type'], c['addition_time_embed_dim']
  if kind is None:
    return dict(pooled=0, sizes=0)
  if kind != 'text_time' or width != latent_unet.SINUSOIDS:
    raise ValueError(
      f'config.json of a U-Net says addition_embed_type={kind!r} and addition_time_embed_dim='
      f"{width}; there is None, or 'text_time' with {latent_unet.SINUSOIDS}"
    )
  total = c['projection_class_embeddings_input_dim']
  sizes = 5 if total == REFINER or total <= 6 * latent_unet.SINUSOIDS else 6
  return dict(pooled=total - sizes * latent_unet.SINUSOIDS, sizes=sizes)


def to_config(spec: dict, channels: int = 4, side: int = 64) -> dict:
  """The `config.json` of a UNet2DConditionModel, of a model's spec.

  channels, side: of the latents, which a spec does not tell; diffusers' pipelines make images of
  that side where none is asked for. Raises ValueError for what diffusers has no words for.
  """
  design = build('diffax.models', spec, path='model').design
  levels, middle = design.levels, design.middle
  total = design.pooled + design.sizes * latent_unet.SINUSOIDS
  extra = design.image + design.mask
  attends = [level.depth > 0 for level in levels]
  heads = [level.heads for level in levels]
  flags = [level.text_only for level in levels]
  config = FIXED | dict(
    _class_name='UNet2DConditionModel',
    sample_size=side,
    in_channels=channels + extra,
    out_channels=channels,
    down_block_types=['CrossAttnDownBlock2D' if a else 'DownBlock2D' for a in attends],
    up_block_types=['CrossAttnUpBlock2D' if a else 'UpBlock2D' for a in reversed(attends)],
    mid_block_type={v: k for k, v in MIDDLES.items()}[middle.depth > 0],
    only_cross_attention=flags if any(flags) else False,
    block_out_channels=[level.channels for level in levels],
    layers_per_block=design.blocks,
    dropout=design.dropout,
    norm_num_groups=design.groups,
    cross_attention_dim=design.text,
    transformer_layers_per_block=_layers(levels, middle),
    attention_head_dim=heads[0] if len(set(heads)) == 1 else heads,
    use_linear_projection=design.linear,
    addition_embed_type='text_time' if total else None,
    addition_time_embed_dim=latent_unet.SINUSOIDS if total else None,
    num_class_embeds=design.noise_levels or None,
    projection_class_embeddings_input_dim=total or None,
  )
  again = build('diffax.models', from_config(config), path='model').design
  for name in ('image', 'mask', 'pooled', 'sizes'):
    if getattr(again, name) != getattr(design, name):
      raise ValueError(
        f'model.{name}={getattr(design, name)} would be read as {getattr(again, name)} from a '
        'config.json: diffusers has no such U-Net'
      )
  return config


def _layers(levels, middle):
  """transformer_layers_per_block: its last is the middle's, too."""
  depths = [level.depth for level in levels]
  if depths[-1] and middle.depth and depths[-1] != middle.depth:
    raise ValueError(
      f"model.middle={middle.depth} is not the last level's {depths[-1]}: diffusers has one number "
      'for both'
    )
  last = depths[-1] or middle.depth
  there = {d for d in (*depths, last) if d}
  if len(there) < 2:
    return max(there, default=1)
  return [d or 1 for d in depths[:-1]] + [last or 1]


# --- names ----------------------------------------------------------------------------------------

RESIDUAL = {  # ours: diffusers', ldm's
  'norm_in': ('norm1', 'in_layers.0'),
  'conv_in': ('conv1', 'in_layers.2'),
  'embed': ('time_emb_proj', 'emb_layers.1'),
  'norm_out': ('norm2', 'out_layers.0'),
  'conv_out': ('conv2', 'out_layers.3'),
  'shortcut': ('conv_shortcut', 'skip_connection'),
}
WHOLE = {
  'conv_in': ('conv_in', 'input_blocks.0.0'),
  'out_norm': ('conv_norm_out', 'out.0'),
  'out_conv': ('conv_out', 'out.2'),
  'embedding/time_in': ('time_embedding.linear_1', 'time_embed.0'),
  'embedding/time_out': ('time_embedding.linear_2', 'time_embed.2'),
  'embedding/added_in': ('add_embedding.linear_1', 'label_emb.0.0'),
  'embedding/added_out': ('add_embedding.linear_2', 'label_emb.0.2'),
  'embedding/noise_level': ('class_embedding', 'label_emb'),
}
TRANSFORMER = {  # in both the same
  'norm': 'norm',
  'project_in': 'proj_in',
  'project_out': 'proj_out',
  'attention_norm': 'norm1',
  'attention': 'attn1',
  'text_attention_norm': 'norm2',
  'text_attention': 'attn2',
  'mlp_norm': 'norm3',
  'mlp_in': 'ff.net.0.proj',
  'mlp_gate': 'ff.net.0.proj',
  'mlp_out': 'ff.net.2',
  'query': 'to_q',
  'key': 'to_k',
  'value': 'to_v',
  'out': 'to_out.0',
}


def stored(model):
  """(path, shape) -> `Stored` of the parameters of a latent U-Net, by diffusers' names."""
  return _stored(model.design, _diffusers, 0, '')


def ldm(model, prefix='model.diffusion_model.'):
  """The like of `stored` by the names of single files, which `LDM_IGNORED` goes with."""
  return _stored(model.design, _ldm, 1, prefix)


def _stored(design, stage, column, prefix):
  """stage: (design, side, level, kind, i) -> the file's module for a block or a change of sides.
  column: of the tables above.
  """
  def place(path, shape):
    module = path.rpartition('/')[0]
    if module in WHOLE:
      return tensors.usual(prefix + WHOLE[module][column], path, shape)
    first, *inner = module.split('/')
    side, level, kind, i = re.fullmatch(r'([a-z]+)(\d*)_([a-z]+)(\d*)', first).groups()
    base = prefix + stage(design, side, int(level or 0), kind, int(i or 0))
    if kind != 'attention':
      made = tensors.usual('.'.join([base, *(RESIDUAL[k][column] for k in inner)]), path, shape)
      one = inner == ['shortcut']  # a convolution of one place
    else:
      depth = shape[0] if inner[0] == 'blocks' else 0
      rest = '.'.join(TRANSFORMER[k] for k in inner if k != 'blocks')
      each = [f'{base}.transformer_blocks.{n}.{rest}' for n in range(depth)]
      made = tensors.usual(f'{base}.{rest}', path, shape, each)
      one = not design.linear and inner[0] in ('project_in', 'project_out')
      if inner[-1] in ('mlp_in', 'mlp_gate'):
        made = made._replace(part=(int(inner[-1] == 'mlp_gate'), 2))
    return made._replace(pattern=tensors.DENSE_CONV) if one and path.endswith('kernel') else made

  return place


def _diffusers(design, side, level, kind, i):
  stage = {
    'encoder': f'down_blocks.{level}',
    'middle': 'mid_block',
    'decoder': f'up_blocks.{len(design.levels) - 1 - level}',
  }[side]
  part = {
    'block': f'resnets.{i}',
    'attention': f'attentions.{i}',
    'down': 'downsamplers.0.conv',
    'up': 'upsamplers.0.conv',
  }[kind]
  return f'{stage}.{part}'


def _ldm(design, side, level, kind, i):
  """Blocks are numbered through; a change of sides is one of the encoder's, the decoder's last."""
  within, each = int(kind == 'attention'), design.blocks + 1
  if side == 'middle':
    return f'middle_block.{1 if within else 2 * i}'
  if side == 'encoder':
    if kind == 'down':
      return f'input_blocks.{(level + 1) * each}.0.op'
    return f'input_blocks.{1 + level * each + i}.{within}'
  first = (len(design.levels) - 1 - level) * each
  if kind == 'up':
    return f'output_blocks.{first + design.blocks}.{2 if design.levels[level].depth else 1}.conv'
  return f'output_blocks.{first + i}.{within}'
