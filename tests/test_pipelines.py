"""Released folders whole: parity with diffusers' pipelines after each step, configs, bad input."""

import functools
import json
import pathlib
import types

from golden import pipelines as golden
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from diffax import conditions
from diffax import config as configs
from diffax import noises
from diffax import sample
from diffax import samplers
from diffax import schedules
from diffax import train
from diffax.build import build
from diffax.convert import autoencoder
from diffax.convert import dit
from diffax.convert import latent_unet
from diffax.convert import pipelines
from diffax.convert import tensors
from diffax.convert import text

HERE = pathlib.Path(golden.__file__)
WANT = np.load(HERE.with_suffix('.npz'))
FAST = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
FAMILIES = dict(
  unet=latent_unet, transformer=dit, vae=autoencoder, text_encoder=text, text_encoder_2=text)


# --- a folder, as diffusers lays it out -----------------------------------------------------------


def wanted(component, config):
  """{name: shape} of the tensors of a component, by its names in diffusers and transformers."""
  family = FAMILIES[component]
  model = build('diffax.models', family.from_config(config), path='model')
  if component == 'vae':
    args = jnp.zeros((1, 8, 8, 3)),
  elif family is text:
    args = jnp.zeros((1, model.length), jnp.int32),
  else:
    side = config['sample_size']
    named = types.SimpleNamespace(told=conditions.taken(model))
    cond = conditions.example(named, model, (side, side, 4))
    args = jnp.zeros((1, side, side, 4)), jnp.zeros(1), cond
  like = jax.eval_shape(lambda: model.init(jax.random.key(0), *args)['params'])
  return tensors.wanted(like, family.stored(model))


@functools.cache
def weights(component, config):
  return {
    name: golden.draw(component, name, shape).astype(np.float32)
    for name, shape in wanted(component, json.loads(config)).items()
  }


def put(path, said):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(said))


def write(path, kind, parts, scheduler, **index):
  """A folder of a pipeline of class `kind`, with drawn weights."""
  put(path / 'model_index.json', {'_class_name': kind} | {p: ['x', 'X'] for p in parts} | index)
  put(path / 'scheduler/scheduler_config.json', scheduler)
  for component, config in parts.items():
    put(path / component / 'config.json', config)
    file = path / component / 'diffusion_pytorch_model.safetensors'
    if component.startswith('text'):
      file = file.with_name('model.safetensors')
      number = component.removeprefix('text_encoder')
      for name in ('vocab.json', 'merges.txt'):
        (path / f'tokenizer{number}').mkdir(exist_ok=True)
        (path / f'tokenizer{number}' / name).write_bytes(
          (HERE.parent / 'tokenizer' / name).read_bytes())
      for name, said in golden.special(number).items():
        put(path / f'tokenizer{number}' / name, said)
    safetensors.numpy.save_file(weights(component, json.dumps(config)), file)
  return path


def rounded(schedule, of):
  """A prediction whose network is told whole indices, as diffusers' DPM-Solver++ with Karras'."""
  return of._replace(clock=lambda level: jnp.round(of.clock(level)))


# --- parity ---------------------------------------------------------------------------------------


OURS = {  # what is said beside prompts and steps
  'ddim': dict(guidance=7.5, negative=golden.NEGATIVE),
  'euler': dict(guidance=5.0),
  'karras': dict(guidance=4.0, negative=golden.NEGATIVE),
  'linspace': dict(guidance=4.0),
  'rescaled': dict(guidance=7.5, guide=dict(name='rescale', phi=0.7)),
  'rescaled_eps': dict(guidance=7.5, guide=dict(name='rescale', phi=0.5, of='eps')),
  'pndm': dict(guidance=7.5),
  'image': dict(guidance=7.5, edit=dict(name='image_to_image', strength=0.6)),
  'held': dict(guidance=3.0, edit=dict(name='inpaint', strength=0.8, paste=False)),
  'inpaint': dict(
    guidance=7.5, negative=golden.NEGATIVE, edit=dict(name='inpaint', strength=1.0, paste=False)),
  'inpaint_part': dict(guidance=7.5, edit=dict(name='inpaint', strength=0.6, paste=False)),
  'instruct': dict(guidance=7.5, edit=dict(name='instruct', image_guidance=1.5)),
  'xl': dict(guidance=5.0),
  'xl_negative': dict(guidance=5.0, negative=golden.NEGATIVE),
  'dit': dict(guidance=4.0, labels='207,3'),
}  # fmt: skip


def pictures(path):
  """Folders of the pictures and of their masks."""
  for name, drawn in (('pictures', golden.PICTURES), ('masks', golden.MASKS)):
    (path / name).mkdir()
    for i, pixels in enumerate(drawn):
      Image.fromarray(pixels).save(path / name / f'{i}.png')
  return {'image': str(path / 'pictures'), 'mask': str(path / 'masks')}


def config_of(path, name, batch_size=1):
  """The complete config of a case's folder, with what the case says."""
  made = pipelines.config(path / 'model', batch_size)
  made['model']['remat'] = 'none'  # takes a second to trace
  settings = dict(OURS[name])
  if 'edit' in settings:
    takes = ('image', 'mask') if settings['edit']['name'] == 'inpaint' else ('image',)
    files = pictures(path)
    settings['edit'] = settings['edit'] | {k: files[k] for k in takes}
  if name != 'dit':
    settings |= dict(prompts=tuple(golden.PROMPTS), size=(16, 24))
  if name == 'karras':
    made['prediction'] = dict(name='test_pipelines.rounded', of=made['prediction'])
  made['sample'] |= settings
  made['sample']['sampler'] = made['sample']['sampler'] | dict(steps=golden.STEPS)
  return configs.override(made, [])


def recorded_noise(monkeypatch, name):
  """Ours is drawn of keys: of key 0 where sampling begins, of others an encoder's."""
  drawn = {k: np.moveaxis(golden.noise(k, golden.sides(name)), 1, -1) for k in ('start', 'draw')}

  def normal(keys, shape, dtype=jnp.float32):
    role = 'draw' if keys[0] else 'start'
    assert drawn[role].shape == (len(keys), *shape)
    return jnp.asarray(drawn[role], dtype)

  monkeypatch.setattr(noises, 'fold', lambda keys, number: np.full(len(keys), number))
  monkeypatch.setattr(noises, 'normal', normal)
  if name != 'instruct':  # schedulers other than k-diffusion's begin with unit noise
    monkeypatch.setattr(schedules, 'start', lambda schedule, t, noise: noise)


def drawing(monkeypatch, path, name):
  """(params, frozen) -> (latents [steps b h w c], pictures), by the path that users take; and both
  of the folder."""
  case, kept = golden.CASES[name], []
  write(path / 'model', case['kind'], case['parts'], case['scheduler'])
  config = config_of(path, name)
  run = train.setup(config, jax.devices()[:1])
  state = sample.released(run, path / 'model')
  recorded_noise(monkeypatch, name)
  walk = samplers.sample

  def traced(*args, **options):
    x, rows = walk(*args, trace=1, **options)
    kept.append(rows)
    return x

  monkeypatch.setattr(samplers, 'sample', traced)
  drawn = run.task.sample(config['sample'], 'sample')
  index = np.arange(2)
  keys = samplers.sample_keys(0, index)

  @functools.partial(jax.jit, compiler_options=FAST)
  def draw(params, frozen, asked):
    picture = drawn.draw(params, frozen, keys, asked)
    return kept.pop(), picture

  asked = drawn.ask(index)
  return lambda params, frozen: draw(params, frozen, asked), state.params, state.frozen


def off(ours, theirs):
  """Of [... h w c] from [... c h w], relative to the largest."""
  ours = np.moveaxis(np.asarray(ours), -1, -3)
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize('name', golden.CASES)
def test_parity(name, monkeypatch, tmp_path):
  """With diffusers' pipelines, latents after each step and the picture."""
  draw, params, frozen = drawing(monkeypatch, tmp_path, name)
  latents, picture = draw(params, frozen)
  theirs = WANT[f'{name}_latents']
  assert len(latents) == len(theirs)
  found = [off(a, b) for a, b in zip(latents, theirs)] + [off(picture, WANT[f'{name}_picture'])]
  print(name, *found)
  assert max(found) < 1e-4, found
