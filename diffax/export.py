"""What a run trained, written as a folder that others read: `--mode export --out DIR`.

Of task=autoencode the folder is the autoencoder, as diffusers has it: what `config.latent.path` of
another run names. Its scale and shift are measured, so that z = (encode(x) - shift) scale has mean
0 and deviation 1 over training pictures, unless config.model says others than their defaults.

Of task=generate it is a pipeline of diffusers where there is one for all that the run is made of:
network, autoencoder, text encoders with their tokenizers, and DDIM on the run's table of levels.
What diffusers has no words for (a schedule without a table, a text encoder that was trained along,
other networks) is written as diffax's own: "_class_name": "diffax", by our own names. Either is
read by `--weights DIR`, and gives the same parameters bit for bit; weights are float32.
"""

import contextlib
import dataclasses
import os
import shutil

from etils import epath
import jax
import numpy as np

from diffax import config as configs
from diffax import latents
from diffax import sample
from diffax import texts
from diffax.build import build, ConfigError, find, parameters
from diffax.convert import autoencoder
from diffax.convert import dit
from diffax.convert import latent_unet
from diffax.convert import pipelines
from diffax.convert import tensors
from diffax.convert import text
from diffax.data import pipeline
from diffax.data import tokenizers
from diffax.data import transforms
from diffax.models import autoencoder as autoencoders
from diffax.models import dit as dits
from diffax.models import latent_unet as unets

WEIGHTS = 'diffusion_pytorch_model.safetensors'
MEASURED, BATCH = 1024, 32  # training pictures by whose latents the scale is measured
TRAINING = ('weight',)  # groups of parameters that sampling does not read
SAMPLE = (
  'guidance', 'guide', 'interval', 'sampler', 'noise', 'transforms', 'window', 'labels')
SCHEDULES = {ours: theirs for theirs, ours in pipelines.TABLES.items()}
PREDICTIONS = {ours: theirs for theirs, ours in pipelines.PREDICTIONS.items()}
KINDS = {  # by whether there are two text encoders, and by config.given
  (False, 'none'): 'StableDiffusion',
  (False, 'masked'): 'StableDiffusionInpaint',
  (False, 'before'): 'StableDiffusionInstructPix2Pix',
  (True, 'none'): 'StableDiffusionXL',
  (True, 'masked'): 'StableDiffusionXLInpaint',
}


def export(run, workdir, step, out):
  """Writes a run's checkpoint as the folder `out`, whole or not at all; returns a line of what it
  is.

  step: of which checkpoint, 0 for the newest; of its averages the one config.sample.ema says.
  Raises ConfigError.
  """
  kinds = {'generate': _generate, 'autoencode': _autoencode}
  name = run.config['task']['name']
  if name not in kinds:
    raise ConfigError(f'--mode export: task={name!r} is none of {", ".join(kinds)}')
  if jax.process_count() > 1:
    raise ConfigError('--mode export runs on one host, which reads a checkpoint of any number')
  with _whole(out) as folder:
    average = run.config['sample']['ema']
    step, state = sample.restore(run, workdir, step, [average])
    said = kinds[name](run, sample.choose(state, average), state.frozen, folder)
  return f'{out}: step {step}, ema {average or sample.last(run.like)}: {said}'


@contextlib.contextmanager
def _whole(out):
  """A new folder beside `out`, which takes its name when all is there. Raises ConfigError."""
  path = os.path.abspath(os.fspath(out))
  if '://' in os.fspath(out) or os.path.lexists(path):
    raise ConfigError(f'--out={out} is there already, or no folder of this machine: name a new one')
  folder = os.path.join(os.path.dirname(path), f'.{os.path.basename(path)}.{os.getpid()}')
  try:
    os.makedirs(folder)
  except OSError as error:
    raise ConfigError(f'--out={out} cannot be written ({error.strerror or error})') from error
  try:
    yield folder
    os.rename(folder, path)
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise


def _write(folder, name, said):
  """A JSON file; of numbers, which JSON has no infinite of, as `config.save`."""
  os.makedirs(folder, exist_ok=True)
  configs.save(said, epath.Path(folder) / name)


# --- autoencoders ---------------------------------------------------------------------------------


def _autoencode(run, params, frozen, folder):
  del frozen
  spec, measured = dict(run.config['model']), ''
  model = build('diffax.models', spec, path='model')
  default = parameters(find('diffax.models', spec['name'], 'model'))
  of = [k for k in ('scale', 'shift') if k in default]
  if all(spec.get(k, default[k].default) == default[k].default for k in of):
    mean, deviation, count = spread(run, model, params)
    spec |= {k: v for k, v in dict(scale=1 / deviation, shift=mean).items() if k in of}
    measured = f', measured on {count} training pictures'
  said = autoencoder.to_config(spec)
  _write(folder, 'config.json', said)
  tensors.save(os.path.join(folder, WEIGHTS), params['net'], autoencoder.stored(model))
  told = ', '.join(f'{k} {spec[k]:.6g}' for k in of)
  return f'{said["_class_name"]} of diffusers, {told} of its latents{measured}'


def spread(run, model, params, count=MEASURED, batch=BATCH):
  """(mean, deviation, number of pictures) of what an autoencoder's `encode` draws, over `count`
  records of the training data, evenly spaced; the variance of each posterior is part of it.
  """
  count = min(count, len(run.source))
  batch = min(batch, count)
  count -= count % batch
  records = (np.arange(count) * len(run.source) // count).reshape(-1, batch)

  @jax.jit
  def sums(params, x):
    z = model.apply({'params': params}, x, method='encode')
    if hasattr(model, 'quantize'):
      return z.mean(), (z**2).mean()
    mean, logvar = autoencoders.posterior(z)
    return mean.mean(), (mean**2 + jax.numpy.exp(logvar)).mean()

  found, size = [], run.config['data']['size'] or None
  for these in records.tolist():
    read = pipeline.read(run.source, size, run.config['data']['on_error'], these)
    x = np.stack([picture for _, picture, *_ in read])
    x = transforms.to_float(x) if x.dtype == np.uint8 else x
    with run.layout():
      found.append(np.asarray(sums(params['net'], x), float))
  first, second = np.mean(found, axis=0)
  return float(first), float(np.sqrt(second - first**2)), count


# --- what samples are drawn by --------------------------------------------------------------------


def _generate(run, params, frozen, folder):
  config = {**run.config, 'text': _asked(run.config['text'])}
  latent = config['latent']
  vae = latents.weights(latent['path']) if latent['name'] == 'autoencoder' else None
  model = vae and build('diffax.models', vae.spec, path='latent')
  pixels = _pixels(run, model)
  try:
    factor, channels = (model.factor, model.latent) if vae else (1, pixels[-1])
    network, why = _network(config, channels, [side // factor for side in pixels[:-1]]), ''
  except ValueError as error:
    network, why = None, str(error)
  _write_network(config, network, params['net'], folder)
  if vae:
    _write(os.path.join(folder, 'vae'), 'config.json', autoencoder.to_config(vae.spec))
    file = os.path.join(folder, 'vae', WEIGHTS)
    tensors.save(file, frozen['autoencoder'], autoencoder.stored(model))
  encoders = _write_text(run, config['text'], params, frozen, folder)
  try:
    if why:
      raise ValueError(why)
    index, scheduler = _index(config, vae, network, encoders), _scheduler(config)
  except ValueError as error:
    _write(folder, 'model_index.json', dict(
      _class_name=pipelines.OWN, config=_config(run, config, pixels)))
    return f"diffax's own layout, for diffusers has none of this ({error}); read by --weights"
  _write(folder, 'model_index.json', index)
  _write(os.path.join(folder, 'scheduler'), 'scheduler_config.json', scheduler)
  return f'{index["_class_name"]} of diffusers, with DDIM; also read by --weights'


def _asked(text):
  """The `text` of a config by whose encoders prompts are heard; of cached ones, those they are of.
  """
  if text['name'] != 'cached':
    return text
  if not text.get('of'):
    raise ConfigError(
      'config.text=cached: a folder is to hold the encoders, too: say --config.text.of=clip '
      '--config.text.of.path=DIR')
  return text['of']


def _pixels(run, model):
  """[h w c] of the run's pictures. model: of the autoencoder, or None."""
  size, shape = run.config['data']['size'], run.source.shape
  h, w, c = (size, size, shape[-1]) if size else shape
  if run.source.dtype == np.uint8:
    return h, w, c
  if model is None:
    raise ConfigError('--mode export: samples of this run are latents or numbers, no pictures')
  return h * model.factor, w * model.factor, model.design.channels


def _network(config, channels, sides):
  """(folder, config.json, stored) of the network, as diffusers has it, for x of `channels` and
  `sides`. Raises ValueError.
  """
  model = build('diffax.models', config['model'], path='model')
  learned = config['prediction']['name'] == 'learned_range'
  if config['task'].get('self_condition'):
    raise ValueError('a network that is shown its own estimate')
  if isinstance(model, unets.LatentUNet) and not learned:
    said = latent_unet.to_config(config['model'], channels, min(sides))
    return 'unet', said, latent_unet.stored(model)
  if isinstance(model, dits.DiT) and len({*sides}) == 1:
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    spec = {k: v for k, v in fields.items() if k not in ('parent', 'name')}
    spec |= dict(
      name='dit', dtype=model.dtype.name, channels=channels * (1 + learned),
      base=model.base or sides[0] // model.patch)
    return 'transformer', dit.to_config(spec, channels), dit.stored(model)
  raise ValueError(f'model={config["model"]["name"]}')


def _write_network(config, network, params, folder):
  name, said, stored = network or (
    'net', dict(_class_name=pipelines.OWN, model=config['model']), pipelines.own(None))
  _write(os.path.join(folder, name), 'config.json', said)
  tensors.save(os.path.join(folder, name, WEIGHTS), params, stored)


def _write_text(run, spec, params, frozen, folder):
  """Text encoders and tokenizers, and whatever else was trained along; {name: class in
  transformers} of the first. spec: of the text.
  """
  made, found = {}, texts.weights(spec['path']) if spec['name'] == 'clip' else {}
  named = dict(build('diffax.texts', spec, run.source, path='text').tokenize.of) if found else {}
  for number, weights in found.items():
    into = os.path.join(folder, f'text_encoder{number}')
    said = text.to_config(weights.spec)
    _write(into, 'config.json', said)
    model = build('diffax.models', weights.spec, path='text')
    tensors.save(
      os.path.join(into, 'model.safetensors'), frozen[f'text{number}'], text.stored(model))
    made[f'text_encoder{number}'] = said['architectures'][0]
    _texts(os.path.join(folder, f'tokenizer{number}'),
           tokenizers.clip_files(named[f'tokens{number}']))
  if run.task.record:
    _texts(os.path.join(folder, 'tokenizer'), run.task.record)
  for group in params.keys() - {'net', *TRAINING}:
    into = os.path.join(folder, pipelines.group_folder(group))
    _write(into, 'config.json', dict(_class_name=pipelines.OWN))
    tensors.save(os.path.join(into, WEIGHTS), params[group], pipelines.own(None))
  return made


def _texts(folder, files):
  os.makedirs(folder, exist_ok=True)
  for name, said in files.items():
    with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
      file.write(said)


# --- the index ------------------------------------------------------------------------------------


def _config(run, config, pixels):
  """What an index of our own holds; paths are those of its folder."""
  h, w, channels = pixels
  made = {k: dict(config[k]) for k in pipelines.NAMED}
  made['data'] = dict(name='blank', size=max(h, w), channels=channels, classes=run.task.classes)
  for name, keys in (('latent', ('path',)), ('text', ('path', 'tokenizer'))):
    made[name] |= {k: '' for k in keys if k in made[name]}
  made['sample'] = {k: config['sample'][k] for k in SAMPLE} | dict(count=1, batch_size=1)
  if h != w:
    made['sample']['size'] = (h, w)
  return pipelines.ours(made, 'config')


def _index(config, vae, network, encoders):
  """The model_index.json of a pipeline of diffusers. Raises ValueError where there is none."""
  folder, said, _ = network
  given, named, zeros = config['given']['name'], config['text']['name'], False
  if vae is None or vae.spec['name'] != 'autoencoder_kl' or vae.spec.get('shift'):
    raise ValueError('latents of a codebook, with a shift, or none')
  index = {folder: ['diffusers', said['_class_name']], 'vae': ['diffusers', 'AutoencoderKL']}
  if folder == 'transformer':
    if named != 'none' or given != 'none' or said['num_embeds_ada_norm'] != 1000:
      raise ValueError('a DiT of other conditions than 1000 classes')
    kind = 'DiT'
  else:
    zeros, two = config['text'].get('zeros', False), 'text_encoder_2' in encoders
    pooled = said['addition_embed_type'] is not None
    if named != 'clip' or 'text_encoder' not in encoders or pooled != two or zeros > two:
      raise ValueError(f'a U-Net with text={named}, {len(encoders)} encoders')
    if (two, given) not in KINDS:
      raise ValueError(f'given={given}, {len(encoders)} encoders')
    kind = KINDS[two, given]
    index |= {name: ['transformers', kind_of] for name, kind_of in encoders.items()}
    index |= {name.replace('text_encoder', 'tokenizer'): ['transformers', 'CLIPTokenizer']
              for name in encoders}
    index |= dict(force_zeros_for_empty_prompt=zeros) if two else dict(
      safety_checker=[None, None], feature_extractor=[None, None], requires_safety_checker=False)
  return dict(
    _class_name=f'{kind}Pipeline', scheduler=['diffusers', 'DDIMScheduler'], **index)


def _scheduler(config):
  """The scheduler_config.json of the run's table of levels. Raises ValueError where it has none."""
  schedule, prediction = config['schedule'], config['prediction']
  ends = schedule['name'] == 'zero_terminal_snr'
  schedule = schedule['of'] if ends else schedule
  prediction = prediction['of'] if prediction['name'] == 'learned_range' else prediction
  name = schedule['name']
  if name not in SCHEDULES or prediction['name'] not in PREDICTIONS:
    raise ValueError(f'schedule={name}, prediction={prediction["name"]}')
  betas = {}
  if 'beta_min' in schedule:
    betas = dict(beta_start=schedule['beta_min'], beta_end=schedule['beta_max'])
  elif (schedule['offset'], schedule['beta_limit']) != (0.008, 0.999):
    raise ValueError(f'schedule={schedule}')
  return dict(
    _class_name='DDIMScheduler', beta_schedule=SCHEDULES[name], **betas, clip_sample=False,
    num_train_timesteps=schedule['steps'], prediction_type=PREDICTIONS[prediction['name']],
    rescale_betas_zero_snr=ends, set_alpha_to_one=False, steps_offset=1,
    timestep_spacing='trailing' if ends else 'leading', trained_betas=None)
