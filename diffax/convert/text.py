"""CLIP's text encoders in files of others: transformers' folders, single-file checkpoints."""

from diffax import build
from diffax.convert import tensors
from diffax.convert.tensors import Stored
from diffax.models import text

MODELS = ('CLIPTextModel', 'CLIPTextModelWithProjection')
DEFAULTS = dict(  # transformers' CLIPTextConfig, where a file does not say
  vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
  num_attention_heads=8, max_position_embeddings=77, hidden_act='quick_gelu', layer_norm_eps=1e-5,
  projection_dim=512, eos_token_id=49407,
)
LEGACY = 2  # an eos_token_id that stands for the largest id of a text; transformers before 4.31
PREFIX = 'text_model.'
IGNORED = (  # buffers; what training alone needed; layers behind the last that is read
  r'(.*\.)?position_ids', r'(.*\.)?attn_mask', r'(.*\.)?logit_scale', r'(.*\.)?text_projection',
  r'(.*\.)?transformer\.resblocks\.23\..*',  # of SD 2.x; of a deeper encoder it is asked for
)
BLOCK = {  # of a block, ours: transformers'
  'norm1': 'layer_norm1', 'query': 'self_attn.q_proj', 'key': 'self_attn.k_proj',
  'value': 'self_attn.v_proj', 'out': 'self_attn.out_proj', 'norm2': 'layer_norm2',
  'mlp_in': 'mlp.fc1', 'mlp_out': 'mlp.fc2',
}
REST = {
  'token': 'embeddings.token_embedding', 'positions': 'embeddings.position_embedding',
  'norm': 'final_layer_norm',
}
OPENCLIP = {
  'norm1': 'ln_1', 'query': 'attn.in_proj_', 'key': 'attn.in_proj_', 'value': 'attn.in_proj_',
  'out': 'attn.out_proj', 'norm2': 'ln_2', 'mlp_in': 'mlp.c_fc', 'mlp_out': 'mlp.c_proj',
  'token': 'token_embedding', 'norm': 'ln_final',
}


def from_config(config):
  """The spec of `text.clip_text` that a config.json of transformers' CLIPTextModel or
  CLIPTextModelWithProjection tells.

  `text` is then the last state behind the norm: which layer a pipeline reads stands in its code, so
  that its `skip` and `norm` are set by who knows the pipeline. Raises ValueError, naming what the
  config says that there is not.
  """
  said = {**DEFAULTS, **config}
  made = [name for name in config.get('architectures') or () if name in MODELS]
  if len(made) != 1:
    raise ValueError(
      f'config.json is of architectures={config.get("architectures")!r}: '
      f'allowed is one of {", ".join(MODELS)}'
    )
  whole = [k for k in DEFAULTS if k not in ('hidden_act', 'layer_norm_eps')]
  for name in whole:
    if type(said[name]) is not int or said[name] < 0:
      raise ValueError(f'config.json says {name}={said[name]!r}, which is no whole number')
  if said['hidden_act'] not in text.ACTIVATIONS:
    raise ValueError(
      f'config.json says hidden_act={said["hidden_act"]!r}: '
      f'allowed is one of {", ".join(text.ACTIVATIONS)}'
    )
  if said['layer_norm_eps'] != DEFAULTS['layer_norm_eps']:
    raise ValueError(
      f'config.json says layer_norm_eps={said["layer_norm_eps"]!r}: '
      f'allowed is {DEFAULTS["layer_norm_eps"]}'
    )
  return dict(
    name='clip_text', vocab=said['vocab_size'], length=said['max_position_embeddings'],
    width=said['hidden_size'], depth=said['num_hidden_layers'],
    heads=said['num_attention_heads'], hidden=said['intermediate_size'],
    activation=said['hidden_act'], projection=said['projection_dim'] * (made[0] == MODELS[1]),
    end=text.LARGEST if said['eos_token_id'] == LEGACY else said['eos_token_id'],
  )


def to_config(spec):
  """The config.json that transformers loads what `spec` builds with; undoes `from_config`.

  Raises ValueError for an encoder without a causal order, which transformers' has not, and for an
  end-of-text token of id 2, which means something else there.
  """
  fields = {k: v for k, v in spec.items() if k != 'name'}
  makers = {'clip_text': text.clip_text, 'clip_text_preset': text.clip_text_preset}
  if spec['name'] not in makers:
    raise ValueError(f'name={spec["name"]!r} is none of {", ".join(makers)}')
  model = makers[spec['name']](**fields)
  if not model.causal:
    raise ValueError("causal=False: transformers' CLIPTextModel always has a causal order")
  if model.end == LEGACY:
    raise ValueError(f'end={LEGACY} means the largest id of a text to transformers: take another')
  return dict(
    architectures=[MODELS[bool(model.projection)]], model_type='clip_text_model',
    vocab_size=model.vocab, max_position_embeddings=model.length, hidden_size=model.width,
    num_hidden_layers=model.depth, num_attention_heads=model.heads, intermediate_size=model.hidden,
    hidden_act=model.activation, layer_norm_eps=DEFAULTS['layer_norm_eps'],
    projection_dim=model.projection or model.width, attention_dropout=0.0, bos_token_id=0,
    pad_token_id=1, eos_token_id=LEGACY if model.end == text.LARGEST else model.end,
  )


def weights(folder):
  """The `tensors.Weights` of an encoder in a folder of transformers. Raises ConfigError."""
  try:
    spec = from_config(tensors.config_json(folder))
  except build.ConfigError:
    raise
  except ValueError as error:
    raise build.ConfigError(f'{folder}: {error}') from error
  files = tensors.find(folder)
  prefix = prefix_of(files.of)
  return tensors.Weights(spec, files, lambda model: stored(model, prefix), IGNORED)


def prefix_of(names):
  """What stands before the names of a CLIPTextModel in a file: '' or 'text_model.', by version."""
  return PREFIX if any(name.startswith(PREFIX) for name in names) else ''


def stored(model, prefix=PREFIX):
  """(path, shape) -> `Stored` of transformers' names, as they stand in diffusers' folders.

  prefix: of all but the projection: '' in what transformers 5 writes of a CLIPTextModel;
  'cond_stage_model.transformer.text_model.' in single files of SD 1.x,
  'conditioner.embedders.0.transformer.text_model.' in those of SDXL.
  """

  def place(path, shape):
    first, _, rest = path.partition('/')
    if first == 'blocks':
      name = BLOCK[rest.partition('/')[0]]
      modules = [f'{prefix}encoder.layers.{i}.{name}' for i in range(model.depth)]
      return tensors.usual('', path, shape, modules)
    if first == 'projection':
      return tensors.usual('text_projection', path, shape)
    if first == 'positions':
      return Stored((f'{prefix}{REST[first]}.weight',))
    return tensors.usual(f'{prefix}{REST[first]}', path, shape)

  return place


def openclip(model, prefix='cond_stage_model.model.'):
  """(path, shape) -> `Stored` of OpenCLIP's names, as they stand in single-file checkpoints.

  prefix: 'cond_stage_model.model.' of SD 2.x, 'conditioner.embedders.1.model.' of SDXL, '' of
  OpenCLIP itself. Query, key and value are thirds of a tensor; the projection is [in out] there as
  here.
  """

  def place(path, shape):
    first, _, rest = path.partition('/')
    if first == 'blocks':
      part = rest.partition('/')[0]
      modules = [
        f'{prefix}transformer.resblocks.{i}.{OPENCLIP[part]}' for i in range(model.depth)
      ]
      found = tensors.usual('', path, shape, modules)
      if part not in ('query', 'key', 'value'):
        return found
      third = ('query', 'key', 'value').index(part)
      names = tuple(name.replace('in_proj_.', 'in_proj_') for name in found.names)
      return found._replace(names=names, part=(third, 3))
    if first == 'positions':
      return Stored((f'{prefix}positional_embedding',))
    if first == 'projection':
      return Stored((f'{prefix}text_projection',))
    return tensors.usual(f'{prefix}{OPENCLIP[first]}', path, shape)

  return place
