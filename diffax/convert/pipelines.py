"""Released models whole: from a folder or single file to a config, and its network's weights.

The folder's model_index.json names what it holds: a U-Net or transformer, an autoencoder, text
encoders with their tokenizers, a scheduler. Each becomes a part of a config as a user would write
it, which can be looked at and overridden like any other. What a folder leaves out has the default
of diffusers' class of that name.

Two things are ours: sampling begins with noise of the first level's sigma, where most of diffusers'
schedulers take unit noise (of 50 steps 0.3% more), and a network is told its time between two
levels of the table as it is, where some round it (Karras' levels by DPM-Solver++).

A folder that `diffax.export` wrote of what diffusers has no words for says "_class_name": "diffax":
its model_index.json holds a config, and its networks stand there by our own names.
"""

import dataclasses
import os

from diffax.build import build, ConfigError, near
from diffax.convert import autoencoder
from diffax.convert import dit
from diffax.convert import latent_unet
from diffax.convert import single
from diffax.convert import tensors

PIPELINES = (
  'StableDiffusionPipeline', 'StableDiffusionImg2ImgPipeline', 'StableDiffusionInpaintPipeline',
  'StableDiffusionInstructPix2PixPipeline', 'StableDiffusionXLPipeline',
  'StableDiffusionXLImg2ImgPipeline', 'StableDiffusionXLInpaintPipeline',
  'StableDiffusionUpscalePipeline', 'DiTPipeline',
)  # fmt: skip
OWN = 'diffax'  # as a _class_name
NAMED = ('task', 'schedule', 'prediction', 'given', 'latent', 'text', 'model', 'data')
SECTIONS = (*NAMED, 'sample')  # of a config, that a folder of our own holds
FAMILIES = {  # of the network's _class_name: the module that knows its files
  'UNet2DConditionModel': latent_unet,
  'DiTTransformer2DModel': dit,
  'Transformer2DModel': dit,
  'AutoencoderKL': autoencoder,
  'VQModel': autoencoder,
}
UPSCALER = 'StableDiffusionUpscalePipeline'
GIVENS = {'StableDiffusionInstructPix2PixPipeline': 'before', UPSCALER: 'noised'}
OFFSET = PIPELINES[:3]  # whose code takes 1 for a steps_offset of old folders
TABLES = {
  'scaled_linear': 'scaled_linear', 'linear': 'linear_table', 'squaredcos_cap_v2': 'squared_cosine',
}
PREDICTIONS = {'epsilon': 'eps', 'v_prediction': 'v', 'sample': 'x0'}
SAMPLERS = {
  'DDIMScheduler': 'ddim',
  'DDPMScheduler': 'ddpm',
  'PNDMScheduler': 'plms',
  'LMSDiscreteScheduler': 'lms',
  'EulerDiscreteScheduler': 'euler',
  'EulerAncestralDiscreteScheduler': 'euler_ancestral',
  'HeunDiscreteScheduler': 'heun',
  'KDPM2DiscreteScheduler': 'dpm2',
  'DPMSolverMultistepScheduler': 'dpmpp_2m',
  'UniPCMultistepScheduler': 'unipc',
}
SHORT = ('DPMSolverMultistepScheduler', 'UniPCMultistepScheduler')  # of one step more, less it
LEADING = ('DDIMScheduler', 'DDPMScheduler', 'PNDMScheduler')  # others: linspace
LEVEL = {'DDIMScheduler': True, 'PNDMScheduler': False}  # which heed set_alpha_to_one; its default
BETAS = dict(beta_start=1e-4, beta_end=0.02, beta_schedule='linear')
OTHER_BETAS = {
  kind: BETAS | dict(beta_start=0.00085, beta_end=0.012)
  for kind in ('HeunDiscreteScheduler', 'KDPM2DiscreteScheduler')
}
ONLY = {  # what must be so where a scheduler says it
  'trained_betas': (None,), 'thresholding': (False,), 'use_exponential_sigmas': (False, None),
  'use_beta_sigmas': (False, None), 'use_lu_lambdas': (False,), 'use_flow_sigmas': (False, None),
  'interpolation_type': ('linear',), 'timestep_type': ('discrete',), 'sigma_min': (None,),
  'sigma_max': (None,), 'algorithm_type': ('dpmsolver++', 'sde-dpmsolver++'),
  'solver_order': (2, 3), 'predict_x0': (True,), 'euler_at_final': (False,),
  'solver_type': ('midpoint', 'bh1', 'bh2'), 'final_sigmas_type': ('zero', 'sigma_min'),
  'timestep_spacing': ('leading', 'trailing', 'linspace'), 'beta_schedule': tuple(TABLES),
  'prediction_type': tuple(PREDICTIONS),
}  # fmt: skip


def config(path, batch_size=1):
  """The config, as a dict, that samples from the released model in a folder or single file.

  Its sampler is the one the folder names. Raises ConfigError, a line that names the file and what
  it says, for what there is not.
  """
  path = os.fspath(path)
  if not os.path.isdir(path):
    return single.config(path, batch_size)
  index = tensors.json_object(os.path.join(path, 'model_index.json'))
  kind = index.get('_class_name')
  if kind == OWN:
    return _own_config(path, index, batch_size)
  if kind not in PIPELINES:
    raise ConfigError(f'{path}/model_index.json: _class_name={kind!r}; {near(kind, PIPELINES)}')
  folder, said = _network(path)
  model = _spec(folder, said)
  try:
    factor = _factor(path)
  except ValueError as error:
    raise ConfigError(f'{path}: {error}') from error
  made = dict(
    steps=1, batch_size=batch_size, ema=(),
    data=dict(
      name='blank', size=(said.get('sample_size') or 64) * factor, classes=model.get('classes', 0)),
    model=model, latent=dict(name='autoencoder', path=os.path.join(path, 'vae')),
  )
  if model.get('text'):
    zeros = 'text_encoder_2' in index and index.get('force_zeros_for_empty_prompt', True)
    made['text'] = dict(name='clip', path=path, zeros=bool(zeros))
  if model.get('mask'):
    made['given'] = dict(name='masked')
  elif model.get('image'):
    if kind not in GIVENS:
      raise ConfigError(f'{path}/model_index.json: {kind} is shown a picture; there is '
                        f'{", ".join(GIVENS)}')
    made['given'] = _noised(path, index, factor) if kind == UPSCALER else dict(name=GIVENS[kind])
  made |= _process(path, said)
  guidance = 9.0 if kind == UPSCALER else 5.0 if 'text_encoder_2' in index else \
    7.5 if 'text' in made else 4.0
  made['sample'] = dict(
    count=1, batch_size=1, guidance=guidance, sampler=_sampler(path, kind))
  return made


def _network(path):
  """(folder, config.json) of a released network: of one of a model, or the folder itself."""
  for folder in ('unet', 'transformer', 'net', '.'):
    folder = os.path.normpath(os.path.join(path, folder))
    if os.path.isfile(os.path.join(folder, 'config.json')):
      said = tensors.config_json(folder)
      kind = said.get('_class_name')
      if kind not in FAMILIES and kind != OWN:
        raise ConfigError(
          f'{folder}/config.json: _class_name={kind!r}; {near(kind, FAMILIES)}')
      return folder, said
  raise ConfigError(f'{path} holds neither unet/ nor transformer/: name the folder of a released '
                    'model, in which model_index.json is')


def _spec(folder, said):
  """The spec of a network, of what its config.json says."""
  try:
    if said['_class_name'] != OWN:
      return FAMILIES[said['_class_name']].from_config(said)
    return ours(said['model'], f'{folder}/config.json')
  except ConfigError:
    raise
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f'{folder}/config.json: {" ".join(str(error).split())}') from error


def _factor(path):
  spec = autoencoder.from_config(tensors.config_json(os.path.join(path, 'vae')))
  return build('diffax.models', spec, path='latent').factor


def _own_config(path, index, batch_size):
  """The config in a folder that diffax wrote, with the parts of that folder in it."""
  where = os.path.join(path, 'model_index.json')
  said = index.get('config')
  if not isinstance(said, dict) or sorted(said) != sorted(SECTIONS) or not all(
    isinstance(said[k], dict) and isinstance(said[k].get('name'), str) for k in NAMED
  ) or said['data']['name'] != 'blank':
    raise ConfigError(f'{where} holds no config as diffax writes it: get it again')
  ours(said, where)
  made = {**said, 'steps': 1, 'batch_size': batch_size, 'ema': ()}
  if made['latent']['name'] != 'none':
    made['latent'] = {**made['latent'], 'path': os.path.join(path, 'vae')}
  if made['text']['name'] == 'clip':
    made['text'] = {**made['text'], 'path': path, 'tokenizer': ''}
  elif made['text']['name'] != 'none':
    made['text'] = {**made['text'], 'tokenizer': os.path.join(path, 'tokenizer', 'tokenizer.json')}
  return made


def ours(said, where):
  """`said` itself, a part of a config, where all that it names is diffax's: a folder is data, of
  which nothing is to be run. Raises ConfigError.
  """
  parts = [said]
  for part in parts:
    values = part.values() if isinstance(part, dict) else part
    parts += [x for x in values if isinstance(x, (dict, list, tuple))]
    foreign = [x for x in values if isinstance(x, str) and '.' in x]
    if foreign:
      raise ConfigError(
        f'{where}: {foreign[0]!r} is no name of diffax, and a folder of weights can bring none')
  return said


def _noised(path, index, factor):
  """The given of an upscaler, whose pictures are noised by a table of their own."""
  said, most = _scheduler(path, 'low_res_scheduler'), index.get('max_noise_level', 350)
  if said['beta_schedule'] == 'squaredcos_cap_v2' or said.get('rescale_betas_zero_snr'):
    raise ConfigError(
      f'{path}/low_res_scheduler/scheduler_config.json: beta_schedule={said["beta_schedule"]!r}, '
      'or a table rescaled; there is scaled_linear, linear'
    )
  return dict(
    name='noised', factor=factor, most=most, table=TABLES[said['beta_schedule']],
    steps=said['num_train_timesteps'], beta_min=said['beta_start'], beta_max=said['beta_end'])


def _scheduler(path, folder='scheduler'):
  """What the scheduler's file says, its class's betas and spacing among it. Raises ConfigError."""
  file = os.path.join(path, folder, 'scheduler_config.json')
  said = tensors.json_object(file)
  kind = said.get('_class_name')
  if kind not in SAMPLERS:
    raise ConfigError(f'{file}: _class_name={kind!r}; {near(kind, SAMPLERS)}')
  spacing = 'leading' if kind in LEADING else 'linspace'
  said = dict(num_train_timesteps=1000, timestep_spacing=spacing, prediction_type='epsilon') | \
    OTHER_BETAS.get(kind, BETAS) | said
  for name, allowed in ONLY.items():
    if name in said and said[name] not in allowed:
      raise ConfigError(f'{file}: {name}={said[name]!r}; there is {", ".join(map(str, allowed))}')
  return said


def _process(path, network):
  """The schedule and prediction that a scheduler's config tells. network: the network's config."""
  said = _scheduler(path)
  table = said['beta_schedule']
  schedule = dict(name=TABLES[table], steps=said['num_train_timesteps'])
  if table != 'squaredcos_cap_v2':
    schedule |= dict(beta_min=said['beta_start'], beta_max=said['beta_end'])
  if said.get('rescale_betas_zero_snr'):
    schedule = dict(name='zero_terminal_snr', of=schedule)
  prediction = dict(name=PREDICTIONS[said['prediction_type']])
  if network.get('out_channels') == 2 * network.get('in_channels', 0):
    prediction = dict(name='learned_range', of=prediction)
  return dict(schedule=schedule, prediction=prediction)


def _sampler(path, pipeline):
  """The sampler, with its grid and 50 steps, that a scheduler's config tells."""
  said = _scheduler(path)
  kind = said['_class_name']
  if kind in ('DDIMScheduler', 'DDPMScheduler') and pipeline not in OFFSET:
    if said.get('clip_sample', True):
      raise ConfigError(
        f'{path}/scheduler/scheduler_config.json: clip_sample=true, which is for pixels; for '
        'latents it must say false'
      )
  sampler = dict(name=SAMPLERS[kind])
  if kind == 'PNDMScheduler' and not said.get('skip_prk_steps'):
    sampler['name'] = 'pndm'
  if kind == 'DDPMScheduler' and said.get('variance_type') in ('fixed_large', 'learned_range'):
    sampler['variance'] = {'fixed_large': 'large', 'learned_range': 'learned'}[
      said['variance_type']]
  if kind == 'DPMSolverMultistepScheduler':
    noisy = said.get('algorithm_type') == 'sde-dpmsolver++'
    sampler['name'] = f'dpmpp_{said.get("solver_order", 2)}m' + '_sde' * noisy
  if kind == 'UniPCMultistepScheduler':
    variant = 'bh1' if said.get('solver_type') == 'bh1' else 'bh2'
    sampler |= dict(order=said.get('solver_order', 2), variant=variant)
  return sampler | dict(steps=50, grid=_grid(said, pipeline))


def _grid(said, pipeline):
  """The grid of a scheduler's config.

  Karras' levels are from one end of the table to the other, also where diffusers' of Euler's method
  are from the ends of the spacing.
  """
  kind, spacing = said['_class_name'], said['timestep_spacing']
  if said.get('use_karras_sigmas'):
    return dict(name='karras')
  grid = dict(name=spacing, train_steps=said['num_train_timesteps'])
  if spacing == 'leading':
    grid['offset'] = 1 if pipeline in OFFSET else said.get('steps_offset', 0)
  if spacing != 'trailing' and kind in SHORT:
    grid['short'] = True
  if spacing == 'linspace' and kind not in (*SHORT, *LEADING):
    grid['whole'] = False
  clean = said.get('final_sigmas_type') != 'sigma_min'
  clean = said.get('set_alpha_to_one', LEVEL[kind]) if kind in LEVEL else clean
  # Where the first level is asked itself, diffusers' last step stays there; ours goes on.
  first = spacing != 'trailing' and kind not in SHORT and not grid.get('offset')
  if not clean and not first:
    grid['clean'] = False
  return grid


def network(path):
  """The `tensors.Weights` of the network of a folder or single file. Raises ConfigError."""
  path = os.fspath(path)
  if not os.path.isdir(path):
    return single.network(path)
  folder, said = _network(path)
  spec, files = _spec(folder, said), tensors.find(folder)
  if said['_class_name'] == OWN:
    return tensors.Weights(spec, files, own)
  family = FAMILIES[said['_class_name']]
  if family is autoencoder:
    return autoencoder.weights(folder)
  return tensors.Weights(spec, files, family.stored, family.IGNORED)


def own(model):
  """Where the parameters of any network stand by our own names, see `tensors.Stored`."""
  del model
  return lambda path, shape: tensors.Stored((path.replace('/', '.'),))


FREE = ('parent', 'name', 'dropout', 'remat', 'dtype')  # of training and of the machine
FREE += ('channels', 'base', 'shift', 'scale')  # what a tensor's shape, or the config, tells


def _options(model):
  """{option: value} of a network: what it computes with its parameters."""
  said = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
  said |= said.pop('design')._asdict() if 'design' in said else {}
  return {'network': type(model).__name__, **{k: v for k, v in said.items() if k not in FREE}}


def fits(path, spec, like):
  """(`tensors.Weights`, model) of released weights for the config's model of `spec`, of which all
  is known to be there: parameters `like`. Raises ConfigError that names every option that is
  another and every tensor that is not as it should be; reads none.
  """
  found = network(path)
  here, there = (build('diffax.models', s, path='model') for s in (spec, found.spec))
  here_is, there_is = _options(here), _options(there)
  wrong = [f'{k}={there_is.get(k)!r} there, {here_is.get(k)!r} in config.model'
           for k in here_is if here_is[k] != there_is.get(k)]
  if wrong:
    raise ConfigError(f'{path} is of another network: {"; ".join(wrong)}')
  tensors.check(found.files, tensors.wanted(like, found.stored(here)), found.ignored)
  return found, here


def net(path, spec, like):
  """The network's parameters of released weights, laid out as `like`; spec: the config's model.

  Raises ConfigError as `fits`.
  """
  return tensors.read(*fits(path, spec, like), like)


def groups(path, like):
  """The other parameters {group: tree} of a folder that diffax wrote, as a text encoder's that was
  trained along. Raises ConfigError.
  """
  found = {}
  for name, tree in like.items():
    folder = os.path.join(os.fspath(path), group_folder(name))
    if not os.path.isdir(folder):
      raise ConfigError(f'{path} holds no {group_folder(name)}/, and the config has one to train')
    found[name] = tensors.load(tensors.find(folder), tree, own(None))
  return found


def group_folder(name):
  """How the folder of a group of parameters is called."""
  return {'text': 'text_encoder'}.get(name, name)
