"""DiT and PixArt as published: diffusers' folders of both, and the names of the first DiT.

What diffusers calls `DiTTransformer2DModel` has class labels and a modulation a block, its
`PixArtTransformer2DModel` text and one modulation for all; older folders say `Transformer2DModel`,
and `norm_type` which of the two is meant. Peebles & Xie 2023; Chen et al. 2023, 2024.
"""

from diffax.build import build
from diffax.convert import tensors

IGNORED = (
  r'pos_embed(\.pos_embed)?',  # fixed
  r'caption_projection\.y_embedding',  # the text of no text, which the pipelines encode
)
KINDS = {'ada_norm_zero': 'dit', 'ada_norm_single': 'pixart'}
CLASSES = {'dit': 'DiTTransformer2DModel', 'pixart': 'PixArtTransformer2DModel'}
ALLOWED = {  # what a config may say that our networks are by themselves
  'activation_fn': ('gelu-approximate',),
  'attention_bias': (True,),
  'norm_elementwise_affine': (False,),
  'norm_eps': (1e-5, 1e-6),  # the networks were trained at 1e-6, which is ours
  'attention_type': (None, 'default'),
  'only_cross_attention': (None, False),
  'double_self_attention': (None, False),
  'use_linear_projection': (None, False),
  'num_vector_embeds': (None,),
}
KNOWN = (
  'num_attention_heads', 'attention_head_dim', 'in_channels', 'out_channels', 'num_layers',
  'dropout', 'cross_attention_dim', 'sample_size', 'patch_size', 'num_embeds_ada_norm', 'norm_type',
  'interpolation_scale', 'use_additional_conditions', 'caption_channels',
  'norm_num_groups', 'upcast_attention',  # no group norm is there; softmax is in float32 here
)


# --- configs --------------------------------------------------------------------------------------


def from_config(config):
  """The model spec of a diffusers config.json of a DiT or a PixArt: dict(name='dit', ...).

  Raises ValueError that names what it says that there is not here.
  """
  config = {k: v for k, v in config.items() if k[0] != '_'}
  kind = KINDS.get(config.get('norm_type'))
  if kind is None:
    raise ValueError(f'norm_type={config.get("norm_type")!r} is none of {", ".join(KINDS)}')
  for key, value in config.items():
    if key not in KNOWN and value not in ALLOWED.get(key, (None,)):
      allowed = ' or '.join(map(repr, ALLOWED.get(key, (None,))))
      raise ValueError(f'{key}={value!r} of a {kind} config is not {allowed}, all that is known')
  width = config['num_attention_heads'] * config['attention_head_dim']
  side, patch, text = (config.get(k) for k in ('sample_size', 'patch_size', 'caption_channels'))
  if side % patch:
    raise ValueError(f'sample_size={side} does not divide by patch_size={patch}')
  spec = dict(
    name='dit', patch=patch, width=width, depth=config['num_layers'],
    heads=config['num_attention_heads'], dropout=config.get('dropout', 0.0),
    channels=config.get('out_channels') or config['in_channels'], base=side // patch,
  )
  if kind == 'dit':
    if config.get('cross_attention_dim') or text:
      raise ValueError("a config with norm_type='ada_norm_zero' and text is of no published DiT")
    return spec | dict(classes=config['num_embeds_ada_norm'])
  if not text or config.get('cross_attention_dim') != width:
    raise ValueError(
      f'caption_channels={text}, cross_attention_dim={config.get("cross_attention_dim")}: the '
      f'first must be given, and the second be the {width} of the network'
    )
  # where it is not said, diffusers decides by the size, and so do the folders rely on
  sizes, scale = config.get('use_additional_conditions'), config.get('interpolation_scale')
  return spec | dict(
    modulation='shared', text=text, resolution=side == 128 if sizes is None else sizes,
    interpolation=float(max(side // 64, 1) if scale is None else scale),
  )


def to_config(spec, channels=4):
  """The config.json with which diffusers makes the network of a model spec.

  channels: of x, which a spec does not say. Raises ValueError where diffusers has no such network,
  or where the spec leaves out `base`, the side in patches.
  """
  model = build('diffax.models', spec, path='model')
  kind = _kind(model)
  if not model.base:
    raise ValueError(
      "model.base=0: diffusers' config says for what size a network is; set model.base to the side "
      'of its grid in patches, which changes no parameter'
    )
  config = dict(
    _class_name=CLASSES[kind], activation_fn='gelu-approximate', attention_bias=True,
    attention_head_dim=model.width // model.heads, dropout=model.dropout, in_channels=channels,
    norm_elementwise_affine=False, norm_eps=1e-6, norm_num_groups=32,
    norm_type={kind: norm for norm, kind in KINDS.items()}[kind], num_attention_heads=model.heads,
    num_embeds_ada_norm=model.classes or 1000, num_layers=model.depth,
    out_channels=model.channels or channels, patch_size=model.patch,
    sample_size=model.base * model.patch, upcast_attention=False,
  )
  if kind == 'dit':
    return config
  return config | dict(
    attention_type='default', caption_channels=model.text, cross_attention_dim=model.width,
    interpolation_scale=model.interpolation, use_additional_conditions=model.resolution,
  )


def _kind(model):
  """'dit' or 'pixart'. Raises ValueError for a network that is neither."""
  dit = model.modulation == 'block' and model.classes and not model.text and not model.resolution
  dit = dit and model.interpolation == 1
  pixart = model.modulation == 'shared' and model.text and not model.classes
  usual = model.positions == 'sincos' and not model.pooled and model.mlp_ratio == 4
  usual = usual and not (model.image or model.mask or model.noise_levels)
  if not usual or not (dit or pixart):
    raise ValueError(
      f'no published network has modulation={model.modulation!r}, classes={model.classes}, '
      f'text={model.text}, pooled={model.pooled}, resolution={model.resolution}, positions='
      f'{model.positions!r}, interpolation={model.interpolation}, mlp_ratio={model.mlp_ratio}, '
      f'image={model.image}, mask={model.mask}, noise_levels={model.noise_levels} '
      'together: a DiT has classes and block, a PixArt text and shared, both sincos and 4.0'
    )
  return 'dit' if dit else 'pixart'


# --- names ----------------------------------------------------------------------------------------

ATTENTION = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'out': 'to_out.0'}
BLOCK = {
  'modulation': 'norm1.linear', 'mlp_in': 'ff.net.0.proj', 'mlp_out': 'ff.net.2',
  **{ours: f'attn1.{theirs}' for ours, theirs in ATTENTION.items()},
  **{f'cross/{ours}': f'attn2.{theirs}' for ours, theirs in ATTENTION.items()},
}
TIME = {'time_in': 'timestep_embedder.linear_1', 'time_out': 'timestep_embedder.linear_2'}
COPIED = {**TIME, 'label': 'class_embedder.embedding_table'}  # in every block of a DiT
DIT = {'modulation': 'proj_out_1', 'patch_out': 'proj_out_2'}
PIXART = {
  **{ours: f'adaln_single.emb.{theirs}' for ours, theirs in TIME.items()},
  'resolution_in': 'adaln_single.emb.resolution_embedder.linear_1',
  'resolution_out': 'adaln_single.emb.resolution_embedder.linear_2',
  'aspect_in': 'adaln_single.emb.aspect_ratio_embedder.linear_1',
  'aspect_out': 'adaln_single.emb.aspect_ratio_embedder.linear_2',
  'modulation': 'adaln_single.linear',
  'text_in': 'caption_projection.linear_1', 'text_out': 'caption_projection.linear_2',
  'patch_out': 'proj_out',
}
FACEBOOK = {
  'time_in': 't_embedder.mlp.0', 'time_out': 't_embedder.mlp.2',
  'label': 'y_embedder.embedding_table',
  'modulation': 'final_layer.adaLN_modulation.1', 'patch_out': 'final_layer.linear',
}
FACEBOOK_BLOCK = {
  'modulation': 'adaLN_modulation.1', 'out': 'attn.proj', 'mlp_in': 'mlp.fc1', 'mlp_out': 'mlp.fc2',
  'query': 'attn.qkv', 'key': 'attn.qkv', 'value': 'attn.qkv',
}


def stored(model):
  """Where diffusers has the parameters of a DiT or a PixArt, see `tensors.Stored`.

  A DiT's embeddings of time and label stand there once a block: all are written, and of a file all
  must be equal. diffusers gives them time at 10000^(-i / 127), which is not what the networks were
  trained with (-i / 128, as ours). Raises ValueError for a network that is neither.
  """
  kind = _kind(model)
  blocks = [f'transformer_blocks.{i}' for i in range(model.depth)]

  def place(path, shape):
    module, _, leaf = path.rpartition('/')
    if leaf == 'table':
      names = [f'{block}.scale_shift_table' for block in blocks]
      stack = module == 'blocks'
      return tensors.Stored(tuple(names) if stack else ('scale_shift_table',), stack=stack)
    if module == 'patch_in':
      return _patches('pos_embed.proj', path, shape, model.patch)
    if module.startswith('blocks/'):
      inner = BLOCK[module.removeprefix('blocks/')]
      return tensors.usual('', path, shape, [f'{block}.{inner}' for block in blocks])
    if kind == 'pixart':
      return tensors.usual(PIXART[module], path, shape)
    if module in DIT:
      return tensors.usual(DIT[module], path, shape)
    name = tensors.usual(COPIED[module], path, shape)
    return name._replace(names=tuple(f'{block}.norm1.emb.{name.names[0]}' for block in blocks))

  return place


def facebook(model):
  """Where the state dict of the first DiT, as its authors publish it, has the parameters.

  Its table of positions (`pos_embed`) is fixed, and neither read nor written. Raises ValueError for
  a network that is none.
  """
  if _kind(model) != 'dit':
    raise ValueError('the names of the first DiT are of networks with classes alone')

  def place(path, shape):
    module = path.rpartition('/')[0]
    if module == 'patch_in':
      return _patches('x_embedder.proj', path, shape, model.patch)
    if not module.startswith('blocks/'):
      return tensors.usual(FACEBOOK[module], path, shape)
    inner = module.removeprefix('blocks/')
    names = [f'blocks.{i}.{FACEBOOK_BLOCK[inner]}' for i in range(model.depth)]
    found = tensors.usual('', path, shape, names)
    order = ('query', 'key', 'value')
    return found._replace(part=(order.index(inner), 3)) if inner in order else found

  return place


def _patches(module, path, shape, patch):
  """The first layer, [(p q c) d] here, a convolution there."""
  if not path.endswith('kernel'):
    return tensors.usual(module, path, shape)
  sizes = (('p', patch), ('q', patch), ('c', shape[0] // patch**2))
  return tensors.Stored((f'{module}.weight',), '(p q c) d -> d c p q', sizes)
