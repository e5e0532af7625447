"""Released models whole: from a folder in diffusers' layout to a config, and its network's weights.

The folder's model_index.json names what it holds: a U-Net or transformer, an autoencoder, text
encoders with their tokenizers, a scheduler. Each becomes a part of a config as a user would write
it, which can be looked at and overridden like any other. What a folder leaves out has the default
of diffusers' class of that name.

Two things are ours: sampling begins with noise of the first level's sigma, where most of diffusers'
schedulers take unit noise (of 50 steps 0.3% more), and a network is told its time between two
levels of the table as it is, where some round it (Karras' levels by DPM-Solver++).
"""

import os

from diffax.build import build, ConfigError, near
from diffax.convert import autoencoder
from diffax.convert import dit
from diffax.convert import latent_unet
from diffax.convert import tensors

PIPELINES = (
  'StableDiffusionPipeline', 'StableDiffusionImg2ImgPipeline', 'StableDiffusionInpaintPipeline',
  'StableDiffusionInstructPix2PixPipeline', 'StableDiffusionXLPipeline',
  'StableDiffusionXLImg2ImgPipeline', 'StableDiffusionXLInpaintPipeline', 'DiTPipeline',
)  # fmt: skip
FAMILIES = {  # of the network's _class_name: the module that knows its files
  'UNet2DConditionModel': latent_unet,
  'DiTTransformer2DModel': dit,
  'Transformer2DModel': dit,
}
GIVENS = {'StableDiffusionInstructPix2PixPipeline': 'before'}
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
  """The config, as a dict, that samples from the released model in a folder.

  Its sampler is the one the folder names. Raises ConfigError, a line that names the file and what
  it says, for what there is not.
  """
  path = os.fspath(path)
  index = tensors.json_object(os.path.join(path, 'model_index.json'))
  kind = index.get('_class_name')
  if kind not in PIPELINES:
    raise ConfigError(f'{path}/model_index.json: _class_name={kind!r}; {near(kind, PIPELINES)}')
  if index.get('requires_aesthetics_score'):
    raise ConfigError(
      f'{path}/model_index.json: requires_aesthetics_score: a network that is told how good a '
      'picture is, as the refiner, is not sampled from; take the base model'
    )
  family, _, said = _network(path)
  try:
    model = family.from_config(said)
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
    made['given'] = dict(name=GIVENS[kind])
  made |= _process(path, said)
  guidance = 5.0 if 'text_encoder_2' in index else 7.5 if 'text' in made else 4.0
  made['sample'] = dict(
    count=1, batch_size=1, guidance=guidance, sampler=_sampler(path, kind))
  return made


def _network(path):
  """(module of the family, folder, config.json) of a released model's network."""
  for folder in ('unet', 'transformer'):
    if os.path.isdir(os.path.join(path, folder)):
      said = tensors.config_json(os.path.join(path, folder))
      kind = said.get('_class_name')
      if kind not in FAMILIES:
        raise ConfigError(
          f'{path}/{folder}/config.json: _class_name={kind!r}; {near(kind, FAMILIES)}')
      return FAMILIES[kind], folder, said
  raise ConfigError(f'{path} holds neither unet/ nor transformer/: name the folder of a released '
                    'model, in which model_index.json is')


def _factor(path):
  spec = autoencoder.from_config(tensors.config_json(os.path.join(path, 'vae')))
  return build('diffax.models', spec, path='latent').factor


def _scheduler(path):
  """What the scheduler's file says, its class's betas and spacing among it. Raises ConfigError."""
  file = os.path.join(path, 'scheduler', 'scheduler_config.json')
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


def net(path, spec, like):
  """The network's parameters of a released folder, laid out as `like`; spec: the config's model.

  Raises ConfigError that names every tensor that is not as it should be.
  """
  family, folder, _ = _network(path)
  model = build('diffax.models', spec, path='model')
  files = tensors.find(os.path.join(path, folder))
  return tensors.load(files, like, family.stored(model), family.IGNORED)
