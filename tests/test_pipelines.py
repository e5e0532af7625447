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
import run_diffax
import safetensors.numpy

from diffax import conditions
from diffax import config as configs
from diffax import grids
from diffax import noises
from diffax import sample
from diffax import samplers
from diffax import schedules
from diffax import train
from diffax.build import build, ConfigError
from diffax.convert import autoencoder
from diffax.convert import dit
from diffax.convert import latent_unet
from diffax.convert import pipelines
from diffax.convert import tensors
from diffax.convert import text

HERE = pathlib.Path(golden.__file__)
WANT = np.load(HERE.with_suffix('.npz'))
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
  if 'Upscale' in kind:
    put(path / 'low_res_scheduler/scheduler_config.json', golden.LOW)
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
  'karras': dict(guidance=4.0, negative=golden.NEGATIVE),
  'linspace': dict(guidance=4.0),
  'rescaled': dict(guidance=7.5, guide=dict(name='rescale', phi=0.7)),
  'rescaled_eps': dict(guidance=7.5, guide=dict(name='rescale', phi=0.5, of='eps')),
  'pndm': dict(guidance=7.5),
  'image': dict(guidance=7.5, edit=dict(name='image_to_image', strength=0.6)),
  'held': dict(guidance=3.0, edit=dict(name='inpaint', strength=0.8, paste=False)),
  'inpaint': dict(
    guidance=7.5, negative=golden.NEGATIVE, edit=dict(name='inpaint', strength=1.0, paste=False)),
  'instruct': dict(guidance=7.5, edit=dict(name='instruct', image_guidance=1.5)),
  'upscale': dict(
    guidance=9.0, negative=golden.NEGATIVE, edit=dict(name='upscale', noise=20)),
  'xl': dict(guidance=5.0),
  'xl_negative': dict(guidance=5.0, negative=golden.NEGATIVE),
  'refine': dict(guidance=5.0, edit=dict(name='image_to_image', strength=0.6)),
  'dit': dict(guidance=4.0, labels='207,3'),
}  # fmt: skip


def pictures(path, of=golden.PICTURES):
  """Folders of the pictures and of their masks."""
  for name, drawn in (('pictures', of), ('masks', golden.MASKS)):
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
    files = pictures(path, golden.SMALL if name == 'upscale' else golden.PICTURES)
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
  roles = ('start', 'draw', 'shown')
  drawn = {k: np.moveaxis(golden.noise(k, golden.sides(name)), 1, -1) for k in roles}

  def normal(keys, shape, dtype=jnp.float32):
    role = ('shown' if shape[-1] == 3 else 'draw') if keys[0] else 'start'
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
  write(path / 'model', case['kind'], case['parts'], case['scheduler'], **case['index'])
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

  @jax.jit
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
  """With diffusers' pipelines, latents after each step and the picture; the weights of every
  network change the latter."""
  draw, params, frozen = drawing(monkeypatch, tmp_path, name)
  latents, picture = draw(params, frozen)
  theirs = WANT[f'{name}_latents']
  assert len(latents) == len(theirs)
  found = [off(a, b) for a, b in zip(latents, theirs)] + [off(picture, WANT[f'{name}_picture'])]
  assert max(found) < 1e-5, found
  groups = {'net': params['net'], **frozen}
  assert len(groups) == len(golden.CASES[name]['parts'])
  for group in groups:
    other = {**groups, group: jax.tree.map(lambda x: 1.1 * x, groups[group])}
    _, moved = draw({'net': other.pop('net')}, other)
    assert np.abs(moved - picture).max() > 1e-2 * np.abs(picture).max(), group


# --- published folders ----------------------------------------------------------------------------


def sd_unet(**options):
  down = ['CrossAttnDownBlock2D'] * 3 + ['DownBlock2D']
  return dict(
    _class_name='UNet2DConditionModel', act_fn='silu', attention_head_dim=8,
    block_out_channels=[320, 640, 1280, 1280], center_input_sample=False, cross_attention_dim=768,
    down_block_types=down, up_block_types=[k.replace('Down', 'Up') for k in reversed(down)],
    downsample_padding=1, flip_sin_to_cos=True, freq_shift=0, in_channels=4, layers_per_block=2,
    mid_block_scale_factor=1, norm_eps=1e-5, norm_num_groups=32, out_channels=4, sample_size=64,
  ) | options


SD_VAE = dict(
  _class_name='AutoencoderKL', act_fn='silu', block_out_channels=[128, 256, 512, 512],
  down_block_types=['DownEncoderBlock2D'] * 4, in_channels=3, latent_channels=4,
  layers_per_block=2, norm_num_groups=32, out_channels=3, sample_size=512,
  up_block_types=['UpDecoderBlock2D'] * 4,
)
BETAS = dict(
  beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', num_train_timesteps=1000,
  set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, trained_betas=None,
  clip_sample=False,
)
PUBLISHED = {  # (class, U-Net, scheduler)
  'stable-diffusion-v1-5': (
    'StableDiffusionPipeline', sd_unet(), BETAS | dict(_class_name='PNDMScheduler')),
  'stable-diffusion-2-1': (
    'StableDiffusionPipeline', sd_unet(
      attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, sample_size=96,
      use_linear_projection=True, upcast_attention=True, dual_cross_attention=False,
      only_cross_attention=False, num_class_embeds=None),
    BETAS | dict(_class_name='DDIMScheduler', prediction_type='v_prediction')),
  'stable-diffusion-xl-base-1.0': (
    'StableDiffusionXLPipeline', sd_unet(
      attention_head_dim=[5, 10, 20], block_out_channels=[320, 640, 1280],
      cross_attention_dim=2048, down_block_types=['DownBlock2D'] + ['CrossAttnDownBlock2D'] * 2,
      up_block_types=['CrossAttnUpBlock2D'] * 2 + ['UpBlock2D'], sample_size=128,
      transformer_layers_per_block=[1, 2, 10], use_linear_projection=True, upcast_attention=None,
      addition_embed_type='text_time', addition_time_embed_dim=256,
      projection_class_embeddings_input_dim=2816),
    BETAS | dict(
      _class_name='EulerDiscreteScheduler', interpolation_type='linear', sample_max_value=1.0,
      prediction_type='epsilon', timestep_spacing='leading', use_karras_sigmas=False)),
  'stable-diffusion-inpainting': (
    'StableDiffusionInpaintPipeline', sd_unet(in_channels=9),
    BETAS | dict(_class_name='PNDMScheduler')),
  'instruct-pix2pix': (
    'StableDiffusionInstructPix2PixPipeline', sd_unet(in_channels=8),
    BETAS | dict(_class_name='EulerAncestralDiscreteScheduler', prediction_type='epsilon')),
}
TABLE = dict(name='scaled_linear', steps=1000, beta_min=0.00085, beta_max=0.012)
LEADING = dict(name='leading', offset=1, train_steps=1000)
FOUND = {  # (size in pixels, prediction, sampler, grid, given, zeros)
  'stable-diffusion-v1-5': (512, 'eps', 'plms', LEADING | dict(clean=False), None, False),
  'stable-diffusion-2-1': (768, 'v', 'ddim', LEADING | dict(clean=False), None, False),
  'stable-diffusion-xl-base-1.0': (1024, 'eps', 'euler', LEADING, None, True),
  'stable-diffusion-inpainting': (512, 'eps', 'plms', LEADING | dict(clean=False), 'masked', False),
  'instruct-pix2pix': (
    512, 'eps', 'euler_ancestral', dict(name='linspace', train_steps=1000, whole=False), 'before',
    False),
}  # fmt: skip


@pytest.mark.parametrize('name', PUBLISHED)
def test_config_of_published(name, tmp_path):
  kind, unet, scheduler = PUBLISHED[name]
  index = {'_class_name': kind, 'unet': ['diffusers', 'UNet2DConditionModel']}
  index |= {'text_encoder_2': ['x', 'X']} if 'xl' in name else {}
  put(tmp_path / 'model_index.json', index)
  put(tmp_path / 'scheduler/scheduler_config.json', scheduler)
  put(tmp_path / 'unet/config.json', unet)
  put(tmp_path / 'vae/config.json', SD_VAE)
  made = pipelines.config(tmp_path)
  size, prediction, sampler, grid, given, zeros = FOUND[name]
  assert made['data']['size'] == size and made['schedule'] == TABLE
  assert made['prediction'] == dict(name=prediction)
  assert made['sample']['sampler'] == dict(name=sampler, steps=50, grid=grid)
  assert made.get('given') == (given and dict(name=given)) and made['text']['zeros'] == zeros
  full = configs.override(made, ['--config.sample.prompts=("a cat",)'])
  assert full['model']['text'] == unet['cross_attention_dim']


def scheduled(tmp_path, pipeline='StableDiffusionXLPipeline', **said):
  put(tmp_path / 'scheduler/scheduler_config.json', said)
  return pipelines._sampler(str(tmp_path), pipeline)


@pytest.mark.parametrize('kind, said, sampler, grid', [
  # Each class has its own spacing where the file is silent.
  ('DDIM', dict(clip_sample=False), dict(name='ddim'), dict(name='leading', offset=0)),
  ('EulerDiscrete', {}, dict(name='euler'), dict(name='linspace', whole=False)),
  ('PNDM', dict(steps_offset=1), dict(name='pndm'), dict(name='leading', offset=1, clean=False)),
  ('PNDM', dict(skip_prk_steps=True, set_alpha_to_one=True), dict(name='plms'),
   dict(name='leading', offset=0)),
  ('DDPM', dict(variance_type='fixed_large', clip_sample=False),
   dict(name='ddpm', variance='large'), dict(name='leading', offset=0)),
  ('DPMSolverMultistep', dict(algorithm_type='sde-dpmsolver++'), dict(name='dpmpp_2m_sde'),
   dict(name='linspace', short=True)),
  ('DPMSolverMultistep', dict(use_karras_sigmas=True), dict(name='dpmpp_2m'), 'karras'),
  ('UniPCMultistep', dict(solver_order=3, timestep_spacing='leading', steps_offset=1),
   dict(name='unipc', order=3, variant='bh2'), dict(name='leading', offset=1, short=True)),
  ('EulerDiscrete', dict(timestep_spacing='trailing'), dict(name='euler'), dict(name='trailing')),
])  # fmt: skip
def test_samplers_of_schedulers(kind, said, sampler, grid, tmp_path):
  made = scheduled(tmp_path, _class_name=f'{kind}Scheduler', **said)
  grid = dict(name=grid) if grid == 'karras' else grid | dict(train_steps=1000)
  assert made == sampler | dict(steps=50, grid=grid)
  if grid['name'] != 'karras':  # which `test_grids` makes
    ts = build('diffax.grids', grid, schedules.scaled_linear(), 10, path='grid')
    assert ts.shape == (11,) and (np.diff(ts) < 0).all()


def test_old_folders_have_an_offset(tmp_path):
  """Which their pipelines' code makes 1, whatever they say."""
  made = scheduled(tmp_path, 'StableDiffusionPipeline', _class_name='PNDMScheduler', steps_offset=0)
  assert made['grid']['offset'] == 1


def test_steps_of_diffusers_multistep():
  """timesteps of DPMSolverMultistepScheduler, 10 steps, by spacing; UniPC's are the same."""
  index = lambda ts: np.round(np.asarray(ts[:-1]) * 1000 - 1).astype(int).tolist()
  schedule = schedules.scaled_linear()
  assert index(grids.linspace(schedule, 10, short=True)) == [
    999, 899, 799, 699, 599, 500, 400, 300, 200, 100]
  assert index(grids.leading(schedule, 10, offset=1, short=True)) == [
    901, 811, 721, 631, 541, 451, 361, 271, 181, 91]


@pytest.mark.parametrize('said, words', [
  (dict(_class_name='DEISMultistepScheduler'), 'DEISMultistepScheduler'),
  (dict(_class_name='DDIMScheduler'), 'clip_sample'),
  (dict(_class_name='DDIMScheduler', thresholding=True), 'thresholding'),
  (dict(_class_name='DDIMScheduler', trained_betas=[0.1]), 'trained_betas'),
  (dict(_class_name='EulerDiscreteScheduler', timestep_spacing='even'), 'timestep_spacing'),
  (dict(_class_name='EulerDiscreteScheduler', beta_schedule='sigmoid'), 'beta_schedule'),
  (dict(_class_name='EulerDiscreteScheduler', prediction_type='flow'), 'prediction_type'),
  (dict(_class_name='DPMSolverMultistepScheduler', algorithm_type='dpmsolver'), 'algorithm_type'),
])  # fmt: skip
def test_other_schedulers(said, words, tmp_path):
  with pytest.raises(ConfigError, match=words) as error:
    scheduled(tmp_path, **said)
  assert 'scheduler_config.json' in str(error.value) and '\n' not in str(error.value)


# --- bad input ------------------------------------------------------------------------------------


def folder_of(path, name):
  case = golden.CASES[name]
  return write(path, case['kind'], case['parts'], case['scheduler'], **case['index'])


@pytest.fixture
def folder(tmp_path):
  """A folder to break."""
  return folder_of(tmp_path / 'model', 'ddim')


@pytest.fixture
def painter(tmp_path):
  """The folder of a network that is told a picture."""
  return folder_of(tmp_path / 'painter', 'inpaint')


@pytest.fixture
def refused(tmp_path, capfd, monkeypatch):
  """(folder, arguments) -> the one line with which the door leaves, before anything is compiled."""
  def compile(*args, **kwargs):
    raise AssertionError('it was compiled before it was checked')

  def said(folder, *arguments):
    monkeypatch.setattr(sample, 'released', compile)
    with pytest.raises(SystemExit) as end, run_diffax.devices(1):
      run_diffax.door(
        '--weights', folder, '--workdir', tmp_path / 'run', '--mode', 'sample', *arguments)
    line = capfd.readouterr().err
    assert end.value.code == 2 and line.startswith('error: ') and line.count('\n') == 1, line
    return line

  return said


def remove(path):
  for file in path.iterdir():
    file.unlink()
  path.rmdir()


def rename(folder):
  file, = folder.glob('*.safetensors')
  file.rename(file.with_suffix('.bin'))


@pytest.mark.parametrize('change, words', [
  (lambda f: (f / 'model_index.json').unlink(), ['model_index.json', 'no such file']),
  (lambda f: put(f / 'model_index.json', {'_class_name': 'FluxPipeline'}),
   ['FluxPipeline', 'StableDiffusionPipeline']),
  (lambda f: (f / 'model_index.json').write_text('{'), ['model_index.json', 'no JSON']),
  (lambda f: put(f / 'model_index.json', {'_class_name': ['pipeline', 'Mine']}), ['Mine']),
  (lambda f: put(f / 'unet/config.json', {'_class_name': 'UNetSpatioTemporal'}),
   ['UNetSpatioTemporal', 'UNet2DConditionModel']),
  (lambda f: put(f / 'unet/config.json', golden.unet(in_channels=9, class_embed_type='x')),
   ['class_embed_type']),
  (lambda f: remove(f / 'unet'), ['neither unet/ nor transformer/']),
  (lambda f: remove(f / 'vae'), ['vae/config.json', 'no such file']),
  (lambda f: remove(f / 'scheduler'), ['scheduler_config.json', 'no such file']),
])  # fmt: skip
def test_wrong_folders(change, words, folder):
  change(folder)
  with pytest.raises(ConfigError) as error:
    pipelines.config(folder)
  assert all(word in str(error.value) for word in words) and '\n' not in str(error.value), error


@pytest.mark.parametrize('change, words', [
  (lambda f: remove(f / 'text_encoder'), ['text_encoder/']),
  (lambda f: remove(f / 'tokenizer'), ['tokenizer', 'vocab.json']),
  (lambda f: rename(f / 'text_encoder'), ['pickle', 'save_file']),
  (lambda f: rename(f / 'vae'), ['pickle', 'save_file']),
])  # fmt: skip
def test_missing_parts(change, words, folder, refused):
  change(folder)
  line = refused(folder, '--prompt', 'a cat')
  assert all(word in line for word in words), line


def test_wrong_tensors(folder):
  """Of the network: as a pickle alone, one missing, misshapen, of whole numbers, one beside."""
  made = pipelines.config(folder)
  model = build('diffax.models', made['model'], path='model')
  cond = conditions.example(types.SimpleNamespace(told=conditions.taken(model)), model, (8, 8, 4))
  x = jnp.zeros((1, 8, 8, 4))
  like = jax.eval_shape(lambda: model.init(jax.random.key(0), x, jnp.zeros(1), cond)['params'])
  file, = (folder / 'unet').glob('*.safetensors')
  whole, name = safetensors.numpy.load_file(file), 'conv_in.bias'

  def said(**changed):
    kept = {k: v for k, v in (whole | changed).items() if v is not None}
    safetensors.numpy.save_file(kept, file)
    with pytest.raises(ConfigError) as error:
      pipelines.net(folder, made['model'], like)
    assert '\n' not in str(error.value)
    return str(error.value)

  assert f'misses {name}' in said(**{name: None})
  assert f'misshapen {name} (3,)' in said(**{name: np.zeros(3, np.float32)})
  assert f'{name} I32' in said(**{name: np.zeros(16, np.int32)})
  assert 'beside what is known more' in said(more=np.zeros(3, np.float32))
  rename(folder / 'unet')
  with pytest.raises(ConfigError, match='pickle'):
    pipelines.net(folder, made['model'], like)


def test_pictures_at_the_door(painter, refused, tmp_path):
  """None for a network that is told one, broken ones, a mask of another size, a bomb."""
  files = pictures(tmp_path)
  image, mask = (f'{files[k]}/0.png' for k in ('image', 'mask'))
  paint = lambda image, mask: refused(
    painter, '--prompt', 'a cat', '--config.sample.edit=inpaint',
    f'--config.sample.edit.image={image}', f'--config.sample.edit.mask={mask}')
  assert 'is told a picture' in refused(painter, '--prompt', 'a cat')
  (tmp_path / 'broken.png').write_bytes(pathlib.Path(image).read_bytes()[:60])
  assert 'cannot be read' in paint(tmp_path / 'broken.png', mask)
  Image.fromarray(golden.MASKS[0, 1:]).save(tmp_path / 'small.png')
  assert 'make them of one size' in paint(image, tmp_path / 'small.png')
  Image.new('1', (20000, 20000)).save(tmp_path / 'bomb.png')
  assert (tmp_path / 'bomb.png').stat().st_size < 10**6
  assert 'pixels' in paint(tmp_path / 'bomb.png', mask)


def test_a_workdir_of_another_run(folder, refused, tmp_path):
  (tmp_path / 'run').mkdir()
  configs.save(run_diffax.config(), tmp_path / 'run' / 'config.json')
  line = refused(folder, '--prompt', 'a cat')
  assert '--weights' in line and 'holds no run' in line


def test_through_the_door(painter, tmp_path):
  """What a user types, and finds: a picture a prompt, known pixels among it as they were."""
  files = pictures(tmp_path)
  with run_diffax.devices(1):
    run_diffax.door(
      '--weights', painter, '--workdir', tmp_path / 'run', '--mode', 'sample', '--prompt', 'a cat',
      '--prompt', 'a dog', '--config.sample.size=(16, 24)', '--config.sample.sampler.steps=1',
      '--config.sample.edit=inpaint', f'--config.sample.edit.image={files["image"]}',
      f'--config.sample.edit.mask={files["mask"]}')
  lines = (tmp_path / 'run/samples.jsonl').read_text().splitlines()
  assert [json.loads(line)['caption'] for line in lines] == ['a cat', 'a dog']
  for line, given, mask in zip(lines, golden.PICTURES, golden.MASKS):
    made = np.asarray(Image.open(tmp_path / 'run' / json.loads(line)['file']))
    known = mask == 0
    assert np.array_equal(made[known], given[known])
    assert np.abs(made[~known].astype(int) - given[~known]).mean() > 10


def test_a_long_prompt(folder, caplog):
  made = pipelines.config(folder)
  text = build('diffax.texts', made['text'], None, path='text')
  told = conditions.Conditions(0, text, None, None, None, None, 1, ('text',), (8, 8, 3))
  conditions.asking(told, dict(labels='balanced', negative=''), 'sample', ['a ' * 75 + 'cat.'], {})
  said, = [r.getMessage() for r in caplog.records]
  assert "'cat.' is cut off" in said
