"""Released models whole: from a folder in diffusers' layout to a config, and its network's weights.

The folder's model_index.json names what it holds: a U-Net or transformer, an autoencoder, text
encoders with their tokenizers, a scheduler. Each becomes a part of a config as a user would write
it, which can be looked at and overridden like any other.
"""

import os

from diffax.build import build, ConfigError, near
from diffax.convert import autoencoder
from diffax.convert import dit
from diffax.convert import latent_unet
from diffax.convert import tensors

FAMILIES = {  # of the network's _class_name: the module that knows its files, the folder it is in
  'UNet2DConditionModel': (latent_unet, 'unet'),
  'DiTTransformer2DModel': (dit, 'transformer'),
}
GIVENS = {'StableDiffusionInstructPix2PixPipeline': 'before'}
TABLES = {
  'scaled_linear': 'scaled_linear', 'linear': 'linear_table', 'squaredcos_cap_v2': 'squared_cosine',
}
PREDICTIONS = {'epsilon': 'eps', 'v_prediction': 'v', 'sample': 'x0'}
SAMPLERS = {
  'DDIMScheduler': dict(name='ddim'),
  'DDPMScheduler': dict(name='ddpm'),
  'PNDMScheduler': dict(name='plms'),
  'LMSDiscreteScheduler': dict(name='lms'),
  'EulerDiscreteScheduler': dict(name='euler'),
  'EulerAncestralDiscreteScheduler': dict(name='euler_ancestral'),
  'HeunDiscreteScheduler': dict(name='heun'),
  'KDPM2DiscreteScheduler': dict(name='dpm2'),
  'DPMSolverMultistepScheduler': dict(name='dpmpp_2m'),
  'UniPCMultistepScheduler': dict(name='unipc'),
  'LCMScheduler': dict(name='lcm'),
}


def config(path, batch_size=1):
  """The config, as a dict, that samples from the released model in a folder.

  Its sampler is the one the folder names. Raises ConfigError, a line that names the file and what
  it says, for what there is not.
  """
  path = os.fspath(path)
  index = tensors.json_object(os.path.join(path, 'model_index.json'))
  family, folder, said = _network(path)
  try:
    model = family.from_config(said)
    factor = _factor(path)
  except ValueError as error:
    raise ConfigError(f'{path}: {error}') from error
  made = dict(
    steps=1, batch_size=batch_size, ema=(),
    data=dict(name='blank', size=said.get('sample_size', 64) * factor),
    model=model, latent=dict(name='autoencoder', path=os.path.join(path, 'vae')),
  )
  if os.path.isdir(os.path.join(path, 'text_encoder')):
    zeros = 'text_encoder_2' in index and index.get('force_zeros_for_empty_prompt', True)
    made['text'] = dict(name='clip', path=path, zeros=bool(zeros))
  if model.get('mask'):
    made['given'] = dict(name='masked')
  elif model.get('image'):
    kind = index.get('_class_name')
    if kind not in GIVENS:
      raise ConfigError(f'{path}/model_index.json: {kind} is shown a picture; there is '
                        f'{", ".join(GIVENS)}')
    made['given'] = dict(name=GIVENS[kind])
  made |= _process(path, model)
  made['sample'] = dict(
    count=1, batch_size=1, guidance=7.5 if 'text' in made else 4.0, sampler=_sampler(path))
  return made


def _network(path):
  """(module of the family, folder, config.json) of a released model's network."""
  for folder in ('unet', 'transformer'):
    if os.path.isdir(os.path.join(path, folder)):
      said = tensors.config_json(os.path.join(path, folder))
      kind = said.get('_class_name')
      if kind not in FAMILIES:
        raise ConfigError(f'{path}/{folder}/config.json: {kind!r}; {near(kind, FAMILIES)}')
      return FAMILIES[kind][0], folder, said
  raise ConfigError(f'{path} holds neither unet/ nor transformer/: name the folder of a released '
                    'model, in which model_index.json is')


def _factor(path):
  spec = autoencoder.from_config(tensors.config_json(os.path.join(path, 'vae')))
  return build('diffax.models', spec, path='latent').factor


def _scheduler(path):
  return tensors.json_object(os.path.join(path, 'scheduler', 'scheduler_config.json'))


def _process(path, model):
  """The schedule and prediction that a scheduler's config tells."""
  said, where = _scheduler(path), f'{path}/scheduler/scheduler_config.json'
  table, kind = said.get('beta_schedule', 'linear'), said.get('prediction_type', 'epsilon')
  if table not in TABLES:
    raise ConfigError(f'{where}: beta_schedule={table!r}; {near(table, TABLES)}')
  if kind not in PREDICTIONS:
    raise ConfigError(f'{where}: prediction_type={kind!r}; {near(kind, PREDICTIONS)}')
  schedule = dict(name=TABLES[table], steps=said.get('num_train_timesteps', 1000))
  if table != 'squaredcos_cap_v2':
    schedule |= dict(beta_min=said.get('beta_start', 1e-4), beta_max=said.get('beta_end', 0.02))
  if said.get('rescale_betas_zero_snr'):
    schedule = dict(name='zero_terminal_snr', of=schedule)
  prediction = dict(name=PREDICTIONS[kind])
  if model.get('classes') and said.get('variance_type') == 'learned_range' or model.get('channels'):
    prediction = dict(name='learned_range', of=prediction)
  return dict(schedule=schedule, prediction=prediction)


def _sampler(path):
  """The sampler, with its grid and 50 steps, that a scheduler's config tells."""
  said, where = _scheduler(path), f'{path}/scheduler/scheduler_config.json'
  kind = said.get('_class_name')
  if kind not in SAMPLERS:
    raise ConfigError(f'{where}: {kind!r}; {near(kind, SAMPLERS)}')
  spacing, steps = said.get('timestep_spacing', 'leading'), said.get('num_train_timesteps', 1000)
  if said.get('use_karras_sigmas'):
    grid = dict(name='karras')
  elif spacing == 'leading':
    grid = dict(name='leading', offset=said.get('steps_offset', 0), train_steps=steps)
  elif spacing in ('trailing', 'linspace'):
    grid = dict(name=spacing, train_steps=steps)
  else:
    raise ConfigError(
      f'{where}: timestep_spacing={spacing!r}; there is leading, trailing, linspace')
  return SAMPLERS[kind] | dict(steps=50, grid=grid)


def net(path, spec, like):
  """The network's parameters of a released folder, laid out as `like`; spec: the config's model.

  Raises ConfigError that names every tensor that is not as it should be.
  """
  family, folder, _ = _network(path)
  model = build('diffax.models', spec, path='model')
  files = tensors.find(os.path.join(path, folder))
  return tensors.load(files, like, family.stored(model), family.IGNORED)
