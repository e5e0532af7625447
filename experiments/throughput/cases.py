"""What is measured: the configs of diffax's side, and what PyTorch's side is told of each."""

import pathlib

import ours

from diffax import config as configs
from diffax.build import build
from diffax.models import dit

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 50
GUIDANCE = 1.5
WHATS = ('train', 'sample')
TRANSFORMERS = tuple(f'{size}/{patch}' for size in dit.PRESETS for patch in dit.PATCHES)
UNETS = {'unet': '', 'unet:cpu': ':cpu', 'tiny:unet': ':smoke'}  # of configs/cifar10_edm.py
MODELS = (*TRANSFORMERS, 'tiny', *UNETS)
SMOKE = ('tiny', 'tiny:unet')
DEFAULTS = {'cpu': ('S/4', 'unet:cpu')}  # by platform
ISSUED = ('S/2', 'B/2', 'L/2', 'XL/2', 'unet')  # elsewhere
LATENTS = 32  # a side: 256 pixels
BATCHES = {  # (training, sampling) by platform, else SMALL
  'cpu': dict.fromkeys(TRANSFORMERS, (16, 4)) | {'unet': (16, 4), 'unet:cpu': (64, 16)},
  'gpu': dict.fromkeys(TRANSFORMERS, (128, 64)) | {
    'S/2': (256, 64), 'B/2': (256, 64), 'unet': (256, 256), 'unet:cpu': (256, 256),
  },
}
SMALL = (4, 4)


def models(platform):
  """The names measured where none is said."""
  return DEFAULTS.get(platform, ISSUED)


def batch(model, what, platform):
  """Images a step or draw where none are said."""
  return BATCHES['cpu' if platform == 'cpu' else 'gpu'].get(model, SMALL)[WHATS.index(what)]


def config(model, count, dtype, overrides=()):
  """The complete config of a model of `MODELS` with a batch of `count`. Raises ConfigError."""
  if model in UNETS:
    made = configs.load(ROOT / 'configs' / f'cifar10_edm.py{UNETS[model]}')
    made['data'] = dict(name='ours.pictures', side=made['data'].get('size') or 32)
    made['model']['dtype'] = dtype
    grid = 'karras'
  elif model == 'tiny':
    made, grid = ours.plan('S/2', count, 8), 'uniform'
    size = dict(patch=2, width=32, depth=2, heads=2)
    made['model'] = dict(name='dit', classes=ours.CLASSES, dtype=dtype, **size)
  else:
    made, grid = ours.plan(model, count, LATENTS, dtype=dtype), 'uniform'
  made |= dict(steps=1, batch_size=count, evals={}, log_every=100)
  made['sample'] = dict(
    count=count, batch_size=count, ema='none', guidance=GUIDANCE,
    sampler=dict(name='ddim', steps=STEPS, grid=dict(name=grid)),
  )
  return configs.override(made, list(overrides))


def spec(made):
  """What PyTorch's side is to be, plain data, of a complete config."""
  model = build('diffax.models', made['model'], path='model')
  adam, task = made['optimizer'], made['task']
  told = {
    'size': made['data']['side'], 'drop_cond': task['drop_cond'], 'ema': float(made['ema'][-1]),
    'optimizer': adam['name'], 'b1': adam['b1'], 'b2': adam['b2'], 'adam_eps': adam['eps'],
    'clip': adam['clip'], 'weight_decay': adam.get('weight_decay', 0.0), 'learning_rate': 1e-4,
    'steps': made['sample']['sampler']['steps'], 'guidance': made['sample']['guidance'],
  }
  if isinstance(model, dit.DiT):
    sizes = ('patch', 'width', 'depth', 'heads', 'classes')
    return told | {'kind': 'dit', 'channels': ours.CHANNELS} | {k: getattr(model, k) for k in sizes}
  design, law, schedule = model.design, made['loss']['time'], made['schedule']
  sizes = ('width', 'multipliers', 'blocks', 'attention', 'embedding', 'classes', 'dropout',
           'groups', 'eps')
  return told | {'kind': 'unet', 'channels': 3} | {k: getattr(design, k) for k in sizes} | {
    'mean': law['mean'], 'std': law['std'],
    'sigma_min': schedule['sigma_min'], 'sigma_max': schedule['sigma_max'],
    'sigma_data': made['prediction']['sigma_data'], 'time_scale': made['prediction']['time_scale'],
  }
