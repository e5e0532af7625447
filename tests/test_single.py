"""Single files: the same as a folder of the same weights, what they are told by, bad input."""


from golden import pipelines as golden
import jax
import numpy as np
import pytest
import run_diffax
import safetensors.numpy
import test_pipelines

from diffax import config as configs
from diffax import sample
from diffax import train
from diffax.build import build, ConfigError
from diffax.convert import autoencoder
from diffax.convert import dit
from diffax.convert import latent_unet
from diffax.convert import pipelines
from diffax.convert import single
from diffax.convert import tensors
from diffax.convert import text
from diffax.models import dit as dits

UNET = 'model.diffusion_model.'
BETAS = (  # what an unpruned file of CompVis has beside its networks
  'betas', 'alphas_cumprod', 'alphas_cumprod_prev', 'sqrt_one_minus_alphas_cumprod', 'logvar',
  'posterior_mean_coef1', 'posterior_log_variance_clipped', 'model_ema.decay',
  'model_ema.diffusion_modelinput_blocks00weight', 'first_stage_model.loss.logvar',
)


def kinds(monkeypatch, xl):
  """Stable Diffusion 1 or XL, as small as the folders of the tests of pipelines."""
  parts = golden.XL if xl else golden.SD
  spec = latent_unet.from_config(parts['unet'])
  vae = autoencoder.from_config(golden.VAE | dict(
    scaling_factor=parts['vae']['scaling_factor']))
  encoders = [text.from_config(parts[k]) for k in ('text_encoder', 'text_encoder_2') if k in parts]
  real = single.KINDS[2048 if xl else 768]
  own = dict(skip=1, norm=False) if xl else {}
  small = tuple(t._replace(spec=spec | own) for t, spec in zip(real.texts, encoders))
  kind = real._replace(
    model={k: v for k, v in spec.items() if k not in ('image', 'mask')}, autoencoder=vae,
    texts=small, size=16)
  monkeypatch.setattr(single, 'KINDS', {spec['text']: kind})


def folder(path, xl, **unet):
  parts = golden.XL if xl else golden.SD | dict(unet=golden.unet(**unet))
  kind = 'StableDiffusionXLPipeline' if xl else 'StableDiffusionPipeline'
  kind = 'StableDiffusionInpaintPipeline' if unet else kind
  return test_pipelines.write(path, kind, parts, golden.DDIM)


def released(path, *overrides):
  """(the complete config, the state to sample from)."""
  config = configs.override(pipelines.config(path), [f'--config.{o}' for o in overrides])
  run = train.setup(config, jax.devices()[:1])
  return run, sample.released(run, path)


def written(path, run, state, xl, before='text_model.'):
  """The single file of a state: each network by the names of the original repositories."""
  clip = ('conditioner.embedders.0.' if xl else 'cond_stage_model.') + f'transformer.{before}'
  frozen = state.frozen
  parts = [(state.params['net'], latent_unet.ldm(build('diffax.models', run.config['model'],
                                                       path='model')))]
  vae = build('diffax.models', autoencoder.from_config(golden.VAE), path='vae')
  parts += [(frozen['autoencoder'], autoencoder.ldm(vae))]
  encoder = lambda n: build('diffax.models', text.from_config(
    (golden.XL if xl else golden.SD)[f'text_encoder{n}']), path='text')
  parts += [(frozen['text'], text.stored(encoder(''), clip))]
  if xl:
    parts += [(frozen['text_2'], text.openclip(encoder('_2'), 'conditioner.embedders.1.model.'))]
  found = {name: np.zeros(3, np.float32) for name in BETAS}
  found[f'{clip}embeddings.position_ids'] = np.arange(77)[None]
  for params, stored in parts:
    tensors.save(path, params, stored)
    found |= safetensors.numpy.load_file(path)
  safetensors.numpy.save_file(found, path)
  return path


@pytest.fixture
def file(tmp_path, monkeypatch):
  """(xl, U-Net's options) -> (folder, file, tokenizer's folder) of the same weights."""
  def make(xl=False, before='text_model.', **unet):
    kinds(monkeypatch, xl)
    there = folder(tmp_path / 'folder', xl, **unet)
    prompt = 'sample.prompts=("a cat",)'
    path = written(tmp_path / 'model.safetensors', *released(there, prompt), xl, before)
    return there, path, there / 'tokenizer'

  return make


@pytest.mark.parametrize('xl, before, unet', [
  (False, 'text_model.', {}), (False, '', dict(in_channels=9)), (True, 'text_model.', {})])
def test_same_as_a_folder(file, xl, before, unet):
  """Config, parameters and tokens, bit for bit; so all that is sampled."""
  there, path, words = file(xl, before, **unet)
  prompt = 'sample.prompts=("a cat",)'
  mine, state = released(path, prompt, f'text.tokenizer={words}')
  wanted, theirs = released(there, prompt)
  for name in ('model', 'schedule', 'prediction', 'sample', 'given', 'data'):
    assert mine.config[name] == wanted.config[name], name
  assert mine.config['text']['zeros'] == xl
  for part in ('params', 'frozen'):
    run_diffax.assert_same(*(run_diffax.flat(getattr(s, part)) for s in (state, theirs)))
  tokens = [run.task.tokenize(['a cat', '']) for run in (mine, wanted)]
  run_diffax.assert_same(*tokens)
  drawn = [run.task.sample(run.config['sample'], 'sample') for run in (mine, wanted)]
  assert drawn[0].said(np.arange(1)) == ['a cat']


def test_at_the_door(file, tmp_path):
  there, path, words = file()
  more = ('--mode', 'sample', '--prompt', 'a cat', '--config.sample.sampler.steps=2')
  with run_diffax.devices(1):
    run_diffax.door('--weights', there, '--workdir', tmp_path / 'one', *more)
    run_diffax.door('--weights', path, '--workdir', tmp_path / 'two', *more,
                    f'--config.text.tokenizer={words}')
  one, two = (np.load(tmp_path / name / 'samples.npz')['arr_0'] for name in ('one', 'two'))
  np.testing.assert_array_equal(one, two)
  assert one.shape == (1, 16, 16, 3) and one.std() > 1


# --- what it is -----------------------------------------------------------------------------------


def header(width=768, channels=4, prefix='cond_stage_model.transformer.', **more):
  """Of a file, as much as it is told by."""
  to_k = f'{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight'
  shapes = {
    to_k: (320, width), f'{UNET}input_blocks.0.0.weight': (320, channels, 3, 3),
    f'{prefix}x': (1,), 'betas': (1000,)} | more
  return tensors.Files('x.safetensors', {k: ('x', s, 'F16') for k, s in shapes.items()})


@pytest.mark.parametrize('width, prefix, channels, name', [
  (768, 'cond_stage_model.transformer.', 4, 'Stable Diffusion 1'),
  (768, 'cond_stage_model.transformer.', 8, 'Stable Diffusion 1'),
  (1024, 'cond_stage_model.model.', 9, 'Stable Diffusion 2'),
  (2048, 'conditioner.embedders.1.model.', 4, 'Stable Diffusion XL'),
])
def test_kinds(width, prefix, channels, name, monkeypatch, caplog):
  found = header(width, channels, prefix)
  monkeypatch.setattr(tensors, 'find', lambda path: found)
  made = configs.override(single.config('x.safetensors'), ['--config.sample.prompts=("a",)'])
  assert single.kind(found)[0].name == name
  assert made['given']['name'] == {4: 'none', 8: 'before', 9: 'masked'}[channels]
  assert made['model']['image'] == {4: 0, 8: 4, 9: 4}[channels]
  assert made['data']['size'] == (1024 if width == 2048 else 512)
  assert made['text']['zeros'] == (width == 2048)
  told = '--config.prediction=v' in caplog.text
  assert told == (width == 1024) and made['prediction']['name'] == 'eps'
  texts = [build('diffax.models', part.spec, path='text') for part in single.KINDS[width].texts]
  unet = build('diffax.models', single.KINDS[width].model, path='model')
  assert sum(each.width for each in texts) == unet.design.text == width


@pytest.mark.parametrize('name, width, channels', [
  ('stable-diffusion-v1-5', 768, 4), ('stable-diffusion-2-1', 1024, 4),
  ('stable-diffusion-xl-base-1.0', 2048, 4), ('stable-diffusion-inpainting', 768, 9),
  ('instruct-pix2pix', 768, 8),
])
def test_networks_are_those_of_published_folders(name, width, channels):
  """So that training may begin with either; and the autoencoder is theirs."""
  _, unet, _ = test_pipelines.PUBLISHED[name]
  spec = single.KINDS[width].model | single.SHOWN[channels][0]
  options = lambda spec: pipelines._options(build('diffax.models', spec, path='model'))
  assert options(spec) == options(latent_unet.from_config(unet))
  vae = test_pipelines.SD_VAE | dict(scaling_factor=0.13025 if width == 2048 else 0.18215)
  designs = [build('diffax.models', s, path='vae').design for s in (
    single.KINDS[width].autoencoder, autoencoder.from_config(vae))]
  assert designs[0] == designs[1]


@pytest.mark.parametrize('found, words', [
  (header(1280), 'text of 1280 channels that sees 4: none of Stable Diffusion 1, '),
  (header(1024, 5, 'cond_stage_model.model.'), 'sees 5: none of .* which see 4, 8, 9'),
  (header(zzz=(1,), **{'model.other': (2,)}),
   'beside what is known of Stable Diffusion 1 zzz, model.other'),
  (header(prefix='conditioner.embedders.0.'), 'Stable Diffusion 1 conditioner.embedders.0.x'),
  ({'control_model.input_hint_block.0.weight': (1,)}, 'a ControlNet'),
  ({'lora_unet_down_blocks_0.lora_up.weight': (1,)}, 'a LoRA'),
  ({'model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight': (1,)}, 'Stable Diffusion 3'),
  ({'double_blocks.0.img_attn.norm.key_norm.scale': (1,)}, 'Flux'),
  ({'down_blocks.0.attentions.0.norm.bias': (1,)}, 'name the folder in which model_index.json'),
  ({'w': (1,)}, 'none that is known, with w; .* Stable Diffusion XL and DiT'),
  ({}, 'no tensor'),
])
def test_other_files(found, words):
  if isinstance(found, dict):
    found = tensors.Files('x.safetensors', {k: ('x', s, 'F16') for k, s in found.items()})
  with pytest.raises(ConfigError, match=words) as error:
    single.kind(found)
  assert '\n' not in str(error.value) and str(error.value).startswith('x.safetensors ')


# --- bad input ------------------------------------------------------------------------------------


def test_wrong_files(file, tmp_path, capfd):
  """Each with a line, and every tensor that is not as it should be in it."""
  there, path, words = file()
  given = f'--config.text.tokenizer={words}'

  def said(weights, *arguments):
    with pytest.raises(SystemExit) as end, run_diffax.devices(1):
      run_diffax.door('--weights', weights, '--workdir', tmp_path / 'out', '--mode', 'sample',
                      '--prompt', 'a', *arguments)
    line = capfd.readouterr().err
    assert end.value.code == 2 and line.startswith('error: ') and line.count('\n') == 1, line
    return line

  assert "config.text.tokenizer='':" in said(path) and 'vocab.json' in said(path)
  assert 'nowhere' in said(path, '--config.text.tokenizer=nowhere')
  assert 'has tokenizers of its own' in said(there, given)
  assert 'no such file' in said(tmp_path / 'none.safetensors', given)
  pickle = tmp_path / 'model.ckpt'
  pickle.write_bytes(b'')
  assert 'safetensors.torch.save_file' in said(pickle, given)

  whole = safetensors.numpy.load_file(path)
  norm = 'cond_stage_model.transformer.text_model.final_layer_norm.bias'
  conv = 'first_stage_model.decoder.conv_in.weight'
  for change, names in (
    (lambda t: t.pop(norm), [norm]),
    (lambda t: (t.pop(conv), t.pop(conv.replace('weight', 'bias'))), [conv, 'conv_in.bias']),
    (lambda t: t.update({f'{UNET}out.2.bias': np.zeros(5)}), [f'{UNET}out.2.bias (5,) for (4,)']),
    (lambda t: t.update({f'{UNET}more': np.zeros(5)}), [f'{UNET}more']),
    (lambda t: t.update({'first_stage_model.more': np.zeros(5)}), ['first_stage_model.more']),
    (lambda t: t.update({'cond_stage_model.transformer.text_model.more': np.zeros(5)}), ['more']),
  ):
    broken = dict(whole)
    change(broken)
    safetensors.numpy.save_file(broken, path)
    line = said(path, given)
    assert all(name in line for name in names), line


# --- DiT ------------------------------------------------------------------------------------------


def test_dit(tmp_path, monkeypatch):
  """A state dict of the first DiT is sampled as the folder of the same network."""
  monkeypatch.setitem(dits.PRESETS, 'tiny', (24, 2, 2))
  case = golden.CASES['dit']
  there = test_pipelines.write(tmp_path / 'folder', case['kind'], case['parts'], case['scheduler'])
  wanted, theirs = released(there)
  path = tmp_path / 'dit.safetensors'
  tensors.save(
    path, theirs.params['net'], dit.facebook(build('diffax.models', wanted.config['model'],
                                                   path='model')))
  whole = safetensors.numpy.load_file(path) | dict(pos_embed=np.zeros((1, 16, 24), np.float32))
  safetensors.numpy.save_file(whole, path)
  with pytest.raises(ConfigError, match='latent.path'):
    released(path)
  run, state = released(path, f'latent.path={there / "vae"}', 'data.size=16')
  for name in ('model', 'schedule', 'prediction', 'data'):
    assert run.config[name] == wanted.config[name], name
  for part in ('params', 'frozen'):
    run_diffax.assert_same(*(run_diffax.flat(getattr(s, part)) for s in (state, theirs)))
  assert run.config['sample']['sampler']['variance'] == 'learned'
  sample.drawer(run, run.config['sample'], 'sample')  # traced, which checks the whole

  del whole['pos_embed']
  safetensors.numpy.save_file(whole, path)
  with pytest.raises(ConfigError, match='misses pos_embed of a DiT'):
    pipelines.config(path)
  monkeypatch.delitem(dits.PRESETS, 'tiny')
  safetensors.numpy.save_file(whole | dict(pos_embed=np.zeros((1, 16, 24), np.float32)), path)
  with pytest.raises(ConfigError, match='width 24 and 2 blocks, none of the published S, B, L'):
    pipelines.config(path)
