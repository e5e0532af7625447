"""Text to image: from captions to conditions, in training, in sampling and at the door; latents."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import run_diffax

from diffax import build
from diffax import checkpoint
from diffax import sample
from diffax import samplers
from diffax import train
from diffax.build import ConfigError
from diffax.convert import autoencoder as stored
from diffax.convert import tensors
from diffax.data import sources

CAPTIONS = ('red square', 'green square', 'blue square', 'grey square')
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (127, 127, 127))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder of captioned pictures of 8 pixels."""
  path = tmp_path_factory.mktemp('captioned')
  lines = []
  for i, (caption, colour) in enumerate(zip(CAPTIONS * 2, COLOURS * 2)):
    Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(path / f'{i}.png')
    lines.append(json.dumps(dict(file=f'{i}.png', caption=caption)))
  (path / 'captions.jsonl').write_text('\n'.join(lines))
  return path


def text(folder, *more):
  """Overrides of a tiny run on the folder's captions."""
  return (
    'data=captioned', f'data.path={folder}', 'data.size=8', 'text=learned', 'text.vocab=300',
    'text.length=8', 'text.width=16', 'text.depth=1', 'text.heads=2', 'model.classes=0',
    'model.width=16', 'model.depth=1', 'model.text=16', 'model.pooled=16', 'batch_size=8', *more,
  )


def losses(run, params, caption=None):
  """Those of the first batch, all of whose captions may be told to be another."""
  batches = train.batches(run, 0)
  batch = next(batches)
  batches.close()
  if caption is not None:
    batch |= run.task.tokenize([caption] * 8)
  keys = train.example_keys(0, 0, 8)
  state = run.like.replace(params=params)
  return np.asarray(jax.jit(
    lambda params, batch: run.task.loss(params, state, batch, keys)[0]
  )(params, batch))


def lively(run):
  """Parameters none of which is zero, so that all that is told is heard."""
  leaves, tree = jax.tree.flatten(run.like.params)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  drawn = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
  return jax.tree.unflatten(tree, drawn)


# --- training -------------------------------------------------------------------------------------


def test_captions_reach_the_network(folder):
  """A condition that is always dropped is no condition, and any caption is then the empty one's."""
  told, deaf = (run_diffax.setup(*text(folder, f'task.drop_cond={p}')) for p in (0.0, 1.0))
  params = lively(told)
  own, red, empty = (losses(told, params, c) for c in (None, 'red square', ''))
  assert np.abs(own - red).max() > 1e-4 and np.abs(red - empty).max() > 1e-4
  dropped = losses(deaf, params)
  np.testing.assert_array_equal(dropped, losses(deaf, params, 'red square'))
  np.testing.assert_allclose(dropped, empty, rtol=1e-5)


def test_the_encoder_trains_along(folder):
  """Every parameter of the text encoder that is read moves in a few steps."""
  run = run_diffax.setup(*text(folder, 'learning_rate=1e-2'))
  begin = state = train.init(run)
  step = train.compile_step(run)
  batches = train.batches(run, 0)
  before = run_diffax.flat(begin.params['text'])
  for _ in range(3):
    state, _ = step(state, next(batches))
  batches.close()
  after = run_diffax.flat(state.params['text'])
  assert not state.bad
  still = [k for k in after if np.array_equal(before[k], after[k])]
  assert not still, still


@pytest.mark.parametrize('overrides, said', [
  (('model.text=8',), 'model.text=8.*gives 16 channels: say --config.model.text=16'),
  (('model.text=0',), 'is not told of it: say --config.model.text=16'),
  (('text.vocab=100',), 'vocab=100'),
  (('given=masked',), "config.given='masked' is there, and the model dit is not told"),
  (('data.path=nowhere',), 'no captions.jsonl'),
])
def test_wrong(folder, overrides, said):
  with pytest.raises(ConfigError, match=said) as error:
    run_diffax.setup(*text(folder), *overrides)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('overrides, said', [
  (('model.text=16',), "model.text=16.*config.text='none' gives 0 channels"),
  (('text=learned', 'model.text=256', 'data=blank', 'model.classes=0'), 'has no captions; take'),
  (('sample.negative=a',), "negative='a': this model takes no text"),
])
def test_wrong_without_text(overrides, said):
  with pytest.raises(ConfigError, match=said):
    run = run_diffax.setup(*overrides)
    sample.drawer(run, run.config['sample'], 'sample')


# --- sampling -------------------------------------------------------------------------------------


def drawn(run, params, *overrides):
  settings = run_diffax.config(
    *(f'sample.{o}' for o in ('sampler.name=ddim', 'sampler.steps=2', *overrides)))['sample']
  drawing = run.task.sample(settings, 'sample')
  keys = samplers.sample_keys(0, jnp.arange(4))
  asked = drawing.ask(np.arange(4))
  found = jax.jit(drawing.draw)(params, {}, keys, asked)
  return np.asarray(found), drawing.said(np.arange(4))


def test_prompts(folder):
  """In turn; a negative prompt stands for the null condition, and only where there is guidance."""
  run = run_diffax.setup(*text(folder))
  params = lively(run)
  one = "prompts=('red square', 'blue square')"
  plain, said = drawn(run, params, one)
  assert said == ['red square', 'blue square'] * 2
  other, _ = drawn(run, params, "prompts=('red square', 'grey square')")
  np.testing.assert_array_equal(plain[::2], other[::2])
  assert np.abs(plain[1::2] - other[1::2]).max() > 1e-4
  guided, _ = drawn(run, params, one, 'guidance=3.')
  negative, _ = drawn(run, params, one, 'guidance=3.', 'negative=green square')
  unheard, _ = drawn(run, params, one, 'negative=green square')
  assert np.abs(guided - plain).max() > 1e-4 and np.abs(guided - negative).max() > 1e-4
  np.testing.assert_allclose(unheard, plain, atol=1e-6)
  same, _ = drawn(run, params, "prompts=('red square',)", 'guidance=3.', 'negative=red square')
  alone, _ = drawn(run, params, "prompts=('red square',)")
  np.testing.assert_allclose(same, alone, atol=1e-4)  # away from itself is nowhere
  _, captions = drawn(run, params)
  assert captions == list(CAPTIONS)


def test_at_the_door(folder, tmp_path, capfd, caplog):
  """Prompts by flags and file, pictures with their prompts; what is cut is told; and mistakes."""
  workdir = tmp_path / 'run'
  words = [f'--config.{o}' for o in text(folder, 'steps=2', 'save_every=2', 'evals={}')]
  run_diffax.door('--config', run_diffax.SMOKE, '--workdir', workdir, *words)
  kept = (workdir / 'tokenizer.json').read_text()
  long = 'a very long prompt of far too many words'
  (tmp_path / 'prompts.txt').write_text(f'blue square\n\n {long}\n')
  capfd.readouterr()
  run_diffax.door(
    '--workdir', workdir, '--mode', 'sample', '--prompt', 'red square', '--prompts',
    tmp_path / 'prompts.txt', '--negative', 'grey', '--config.sample.guidance=2.')
  assert [r.getMessage() for r in caplog.records if 'too long' in r.getMessage()] == [
    f"the prompt is too long, 'y long prompt of far too many words' is cut off: {long!r}"]
  lines = [json.loads(x) for x in (workdir / 'samples.jsonl').read_text().splitlines()]
  assert [x['caption'] for x in lines] == ['red square', 'blue square', long]
  for line in lines:
    assert Image.open(workdir / line['file']).size == (8, 8)
  assert np.load(workdir / 'samples.npz')['arr_0'].shape == (3, 8, 8, 3)

  for arguments, wanted in (
    (['--mode=train', '--prompt=a'], '--prompt and --negative are for --mode sample'),
    (['--mode=sample', f'--prompts={tmp_path / "no.txt"}'], 'no text file'),
    (['--mode=sample', '--weights=nowhere', '--prompt=a'], '--weights=nowhere brings a config'),
  ):
    with pytest.raises(SystemExit):
      run_diffax.door('--workdir', workdir, *arguments)
    assert wanted in capfd.readouterr().err

  line = (folder / 'captions.jsonl').read_text()
  try:  # captions may change: the tokens stay those the run was begun with
    (folder / 'captions.jsonl').write_text(line.replace('square', 'zebra crossing'))
    run_diffax.door('--workdir', workdir, '--mode', 'sample', '--prompt', 'red square')
  finally:
    (folder / 'captions.jsonl').write_text(line)
  assert (workdir / 'tokenizer.json').read_text() == kept


# --- latents --------------------------------------------------------------------------------------

SPEC = dict(
  name='autoencoder_kl', channels=3, latent=2, width=8, multipliers=(1, 2), blocks=1, groups=4,
  scale=0.5, shift=0.25)


def autoencoder(path, seed):
  """Writes a tiny autoencoder of drawn weights; returns it and its parameters."""
  model = build.build('diffax.models', SPEC, path='model')
  like = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))['params'])
  leaves, tree = jax.tree.flatten(like)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  params = jax.tree.unflatten(
    tree, [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])
  path.mkdir()
  tensors.save(path / 'diffusion_pytorch_model.safetensors', params, stored.stored(model))
  (path / 'config.json').write_text(json.dumps(stored.to_config(SPEC)))
  return model, params


def test_latents(folder, tmp_path, capfd):
  """x0 is (z - shift) scale, samples are decoded; checkpoints know which autoencoder it was."""
  model, weights = autoencoder(tmp_path / 'vae', 1)
  words = (
    'data=captioned', f'data.path={folder}', 'data.size=8', 'latent=autoencoder',
    f'latent.path={tmp_path / "vae"}', 'latent.sample=false', 'model.classes=0', 'model.width=16',
    'model.depth=1', 'model.patch=2', 'batch_size=8', 'steps=2', 'save_every=1', 'evals={}')
  run = run_diffax.setup(*words)
  state = train.init(run)
  assert set(state.frozen) == {'autoencoder'}
  batches = train.batches(run, 0)
  batch = next(batches)
  batches.close()
  keys = train.example_keys(0, 0, 8)
  x0, _ = run.task.clean(state.params, state.frozen, batch, keys)
  moments = model.apply({'params': weights}, batch['image'], method='encode')
  np.testing.assert_allclose(x0, (moments[..., :2] - 0.25) * 0.5, atol=1e-5)
  pictures, _ = sample.drawer(run, run.config['sample'], 'sample')(state, 2)
  assert pictures.shape == (2, 8, 8, 3) and pictures.dtype == np.uint8

  ramps = np.stack(np.broadcast_arrays(*np.ogrid[0:240:10, 0:240:15], 99), -1).astype(np.uint8)
  Image.fromarray(ramps).save(tmp_path / 'ramps.png')
  edit = dict(name='image_to_image', image=str(tmp_path / 'ramps.png'), strength=0.0)
  large = {**run.config['sample'], 'size': (48, 32), 'edit': edit}
  tiled, whole = (sample.drawer(run, {**large, 'tile': tile}, 'sample')(state, 1)[0].astype(float)
                  for tile in (24, 0))  # to latents and back, by tiles and whole
  assert tiled.shape == whole.shape == (1, 48, 32, 3)
  assert 0 < np.abs(tiled - whole).mean() < 0.5 * whole.std()  # of drawn weights, by small tiles
  with pytest.raises(ConfigError, match='tile=6'):
    sample.drawer(run, {**large, 'tile': 6}, 'sample')

  command = ['--workdir', tmp_path / 'run', *(f'--config.{o}' for o in words)]
  run_diffax.door('--config', run_diffax.SMOKE, *command)
  assert not [k for k in run_diffax.arrays(tmp_path / 'run', 2) if 'autoencoder' in k]
  (tmp_path / 'vae').rename(tmp_path / 'old')
  autoencoder(tmp_path / 'vae', 2)
  with pytest.raises(SystemExit):
    run_diffax.door('--workdir', tmp_path / 'run', '--mode', 'sample')
  assert 'weights are not those' in capfd.readouterr().err
  with pytest.raises(SystemExit):  # to go on training, alike
    run_diffax.door('--config', run_diffax.SMOKE, *command, '--config.steps=3')
  assert 'weights are not those' in capfd.readouterr().err
  assert checkpoint.present(tmp_path / 'run' / 'checkpoints') == [1, 2]


# --- pictures that are given ----------------------------------------------------------------------


@pytest.mark.parametrize('given, words', [
  ('masked', ('model.image=3', 'model.mask=true')),
  ('smaller', ('model.image=4', 'given.factor=2')),
])
def test_given(folder, tmp_path, given, words):
  """Training makes them of its own pictures, sampling of the user's, else of the data's."""
  run = run_diffax.setup(*text(folder, f'given={given}', *words))
  params = lively(run)
  seen = losses(run, params)
  net = params['net']['patch_in']['kernel'].reshape(2, 2, -1, 16)  # the picture's rows of it
  deaf = {**params, 'net': {**params['net'], 'patch_in': {
    **params['net']['patch_in'], 'kernel': net.at[:, :, 3:].set(0).reshape(-1, 16)}}}
  assert np.isfinite(seen).all() and np.abs(seen - losses(run, deaf)).max() > 1e-4

  Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / 'a.png')
  Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / 'm.png')
  one = "prompts=('red square',)"
  if given == 'masked':
    edit = ('edit=inpaint', f'edit.image={tmp_path / "a.png"}', f'edit.mask={tmp_path / "m.png"}')
  else:
    edit = ('edit=upscale', f'edit.image={tmp_path / "a.png"}', 'edit.noise=0.1')
  mine, data = drawn(run, params, one, *edit)[0], drawn(run, params, one)[0]
  assert mine.shape == data.shape == (4, 8, 8, 3)
  assert np.abs(data[0] - data[1]).max() > 1e-4
  with pytest.raises(ConfigError, match='this network is told a picture'):  # and of another kind
    drawn(run, params, one, 'edit=image_to_image', f'edit.image={tmp_path / "a.png"}')
  if given == 'smaller':
    with pytest.raises(ConfigError, match='edit.noise=0.5: this network was trained to 0.3'):
      drawn(run, params, one, *edit[:2], 'edit.noise=0.5')
  if given == 'masked':  # what is not to be painted is the picture's
    np.testing.assert_allclose(mine[0][~np.eye(8, dtype=bool)], 200 / 127.5 - 1, atol=1e-6)


def test_noised_beside_latents(folder, tmp_path):
  """The upscaler's small picture has a pixel for each latent, and a network of its levels."""
  autoencoder(tmp_path / 'vae', 1)
  words = (
    'data=captioned', f'data.path={folder}', 'data.size=16', 'latent=autoencoder',
    f'latent.path={tmp_path / "vae"}', 'given=noised', 'given.factor=2', 'model=latent_unet',
    'model.width=8', 'model.multipliers=(1,)', 'model.attention=(0,)', 'model.middle=0',
    'model.text=0', 'model.groups=4', 'model.noise_levels=1000', 'model.image=3', 'batch_size=8',
    'evals={}')
  config = lambda *more: run_diffax.setup(*words, *more)
  run = config()
  batches = train.batches(run, 0)
  batch = next(batches)
  batches.close()
  frozen = sample.frozen(run)
  x0, cond = run.task.clean({}, frozen, batch, train.example_keys(0, 0, 8))
  assert x0.shape == (8, 8, 8, 2) and cond['image'].shape == (8, 8, 8, 3)
  assert 0 <= cond['noise_level'].min() < cond['noise_level'].max() <= 350
  for more, said in (
    ('given.factor=4', 'one for 4 of the data.*has one for 2'),
    ('model.noise_levels=0', "noise_levels=0 of latent_unet, but config.given='noised' tells"),
    ('model.noise_levels=100', 'tells levels up to 350'),
  ):
    with pytest.raises(ConfigError, match=said):
      config(more)


# --- captions -------------------------------------------------------------------------------------


@pytest.mark.parametrize('line, said', [
  ('{"file": "../secret.png", "caption": "a"}', 'leaves the folder'),
  ('{"file": "/etc/passwd", "caption": "a"}', 'leaves the folder'),
  ('{"file": "0.png"}', 'says no `caption`'),
  ('{"caption": "a"}', 'says neither `file` nor `index`'),
  ('{"file": 3, "caption": "a"}', '`file` is a path'),
  ('no json', 'line 1 is no JSON'),
  ('[' * 100_000, 'line 1 is no JSON'),
  ('', 'has no line'),
])
def test_wrong_captions(tmp_path, line, said):
  (tmp_path / 'captions.jsonl').write_text(line)
  with pytest.raises(ValueError, match=said) as error:
    sources.captioned(tmp_path)
  assert '\n' not in str(error.value) and len(str(error.value)) < 400


def test_packed_captions(tmp_path):
  """Rows of an array, of a split; and the errors of that."""
  images = np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)
  np.savez(tmp_path / 'images.npz', image=images)
  lines = [dict(index=i, caption=f'{i}', split='train' if i % 2 else 'test') for i in (3, 2, 1, 0)]
  write = lambda: (tmp_path / 'captions.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  write()
  source = sources.captioned(tmp_path, 'test')
  assert source.captions == ('2', '0') and len(source) == 2 and source.shape == (2, 2, 3)
  np.testing.assert_array_equal(source[0]['image'], images[2])
  assert len(sources.captioned(tmp_path, 'all')) == 4
  assert sources.captioned(tmp_path, 'all', without=('2',)).captions == ('3', '1', '0')
  with pytest.raises(ValueError, match="without='4': no caption in .* is this"):
    sources.captioned(tmp_path, without=('4',))
  with pytest.raises(ValueError, match="'trian'.*train"):
    sources.captioned(tmp_path, 'trian')
  lines[0]['index'] = 9
  write()
  with pytest.raises(ValueError, match='names index 9'):
    sources.captioned(tmp_path, 'train')


def test_a_picture_that_is_a_program(tmp_path, monkeypatch):
  """PostScript by the name of a PNG, which Pillow would hand to Ghostscript."""
  from PIL import EpsImagePlugin

  run = tmp_path / 'gs'
  run.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/ran\n')
  run.chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
  monkeypatch.setattr(EpsImagePlugin, 'gs_binary', None)  # looked for anew
  script = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n'
  (tmp_path / 'a.png').write_bytes(script)
  with Image.open(tmp_path / 'a.png') as image, pytest.raises(OSError):
    image.load()
  assert '-sOutputFile' in (tmp_path / 'ran').read_text()  # so it would be
  (tmp_path / 'ran').unlink()
  with pytest.raises(ValueError, match='not those of PNG'):
    sources.decode(script, 3)
  assert not (tmp_path / 'ran').exists()
  assert sources._file_size(str(tmp_path / 'a.png')) == (0, 0)


def test_a_picture_that_says_it_is_huge():
  """A decompression bomb is told from its header."""
  import io
  import struct
  import zlib

  data = io.BytesIO()
  Image.fromarray(np.zeros((1, 1), np.uint8)).save(data, 'PNG')
  png = bytearray(data.getvalue())
  png[16:24] = struct.pack('>II', 60_000, 60_000)
  png[29:33] = struct.pack('>I', zlib.crc32(bytes(png[12:29])))
  with pytest.raises(Exception, match='pixels|decompression bomb'):
    sources.decode(bytes(png), 3)
  png[16:24] = struct.pack('>II', 12_000, 9_000)
  png[29:33] = struct.pack('>I', zlib.crc32(bytes(png[12:29])))
  with pytest.raises(ValueError, match='12000 x 9000 are more than'):
    sources.decode(bytes(png), 3)
