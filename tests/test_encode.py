"""Latent data sets: what is in them, the same bytes come what may, training on them, refusals."""

import dataclasses
import json
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys

from etils import epath
from golden import autoencoder as golden
from golden import prompts
import jax
import numpy as np
import pytest
import run_diffax
import safetensors.numpy

from diffax import config as configs
from diffax import encode
from diffax import main
from diffax import sample
from diffax import texts
from diffax import train
from diffax.build import build, ConfigError
from diffax.convert import autoencoder as convert
from diffax.convert import tensors
from diffax.convert import text as convert_text
from diffax.data import parts
from diffax.data import pipeline
from diffax.data import sources

THIS = str(pathlib.Path(__file__).resolve())  # this file is the config, too
TOKENS = pathlib.Path(golden.__file__).parent / 'tokenizer'
SPEC = dict(name='autoencoder_kl', channels=1, width=4, multipliers=(1, 2), blocks=1, groups=2,
            latent=2, scale=0.7, shift=0.1, middle_attention=False)
COUNT, PART = 60, 8
WORDS = 'zero one two three four five six seven eight nine'.split()


def digits(split='train') -> sources.Source:
  """Some digits with captions, as slow as the environment says."""
  few = sources.digits(split)
  labels = [int(few[i]['label']) for i in range(COUNT)]
  captions = tuple(f'a {WORDS[label]} {i % 7}' for i, label in enumerate(labels))
  return dataclasses.replace(run_diffax.digits(), read=run_diffax.digits().read, length=COUNT,
                             captions=captions)


def bare() -> sources.Source:
  """The same without captions."""
  return dataclasses.replace(digits(), captions=None)


def get_config():
  c = run_diffax.get_config().to_dict()
  c |= dict(steps=3, batch_size=8, log_every=1, save_every=3, evals={})
  c['data'] = dict(name='test_encode.digits')
  c['encode'] = dict(batch_size=2, part=PART, dtype='float16')
  c['learning_rate'] = 1e-3
  return c


def config(*overrides):
  return configs.override(get_config(), [f'--config.{o}' for o in overrides])


def drawn(path, like, stored, seed=''):
  """Writes a file of weights drawn from their names."""
  names = tensors.wanted(like, stored)
  given = {k: np.float32(golden.draw(seed + k, shape)) for k, shape in names.items()}
  safetensors.numpy.save_file(given, path)


def autoencoder(folder, seed=''):
  folder.mkdir()
  model = build('diffax.models', SPEC, path='x')
  x = np.zeros((1, 8, 8, 1), np.float32)
  like = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  drawn(folder / 'model.safetensors', like, convert.stored(model), seed)
  (folder / 'config.json').write_text(json.dumps(convert.to_config(SPEC)))
  return folder


def encoders(folder, seed=''):
  """A folder with a tokenizer and a small CLIP."""
  for name in ('tokenizer', 'text_encoder'):
    (folder / name).mkdir(parents=True)
  vocab = json.loads((TOKENS / 'vocab.json').read_text(encoding='utf-8'))
  merges = (TOKENS / 'merges.txt').read_text(encoding='utf-8').split('\n')[1:-1]
  prompts.folder(folder / 'tokenizer', vocab, merges, prompts.FOLDERS['sd1'])
  spec = dict(name='clip_text', vocab=max(vocab.values()) + 1, length=77, width=8, depth=1, heads=2,
              hidden=16)
  model = build('diffax.models', spec, path='x')
  like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 77), np.int32))['params']
  drawn(folder / 'text_encoder' / 'model.safetensors', like, convert_text.stored(model), seed)
  config = convert_text.to_config(spec)
  (folder / 'text_encoder' / 'config.json').write_text(json.dumps(config))
  return folder


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  folder = tmp_path_factory.mktemp('weights')
  autoencoder(folder / 'vae')
  encoders(folder / 'clip')
  return folder


def options(weights):
  return (f'latent.path={weights}/vae', 'latent.name=autoencoder', 'text.name=clip',
          f'text.path={weights}/clip', 'data.flip=True')


def run(folder, *overrides, devices=1):
  """Encodes in this process; what it said."""
  said = []
  with run_diffax.devices(devices):
    encode.encode(config(*overrides), epath.Path(folder), said.append)
  return said


@pytest.fixture(scope='module')
def whole(weights, tmp_path_factory):
  """A set made in one go by one device."""
  folder = tmp_path_factory.mktemp('sets') / 'whole'
  run(folder, *options(weights))
  return folder


def files(folder):
  return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}


def assert_same(found, wanted):
  found, wanted = files(found), files(wanted)
  assert found.keys() == wanted.keys()
  assert not [name for name in wanted if found[name] != wanted[name]]


# --- what is in it --------------------------------------------------------------------------------


def close(found, wanted):
  """Up to the rounding of float16."""
  np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def test_records_are_encodings(whole, weights):
  source = pickle.loads(pickle.dumps(sources.latents(str(whole))))
  pictures = digits()
  assert (len(source), source.shape, source.classes) == (COUNT, (4, 4, 4), 10)
  assert source.captions == pictures.captions and source.dtype == np.float32
  model = build('diffax.models', SPEC, path='x')
  where = tensors.find(weights / 'vae')
  x = np.stack([pictures[i]['image'] for i in range(COUNT)]) / np.float32(127.5) - 1
  like = jax.eval_shape(model.init, jax.random.key(0), x[:1])['params']
  params = tensors.load(where, like, convert.stored(model))
  apply = jax.jit(lambda x: model.apply({'params': params}, x, method='encode'))
  records = source.__getitems__(list(range(COUNT)))
  close(np.stack([r['image'] for r in records]), apply(x))
  close(np.stack([r['mirrored'] for r in records]), apply(x[:, :, ::-1]))
  assert [r['label'] for r in records] == [pictures[i]['label'] for i in range(COUNT)]
  np.testing.assert_array_equal(source[17]['image'], records[17]['image'])
  again = source.__getitems__([5, 59, 5, 0])  # of several parts, one twice
  for i, record in zip([5, 59, 5, 0], again):
    np.testing.assert_array_equal(record['image'], records[i]['image'])


def test_texts_are_encodings(whole, weights):
  source = sources.latents(str(whole))
  text = texts.clip(source, f'{weights}/clip')
  like = {name: jax.eval_shape(each.like) for name, each in text.frozen.items()}
  frozen = {name: each.load(like[name]) for name, each in text.frozen.items()}
  say = jax.jit(lambda tokens: text.encode(frozen, tokens))
  wanted = say(text.tokenize([*source.captions, '']))
  null = texts.cached(source).null
  assert sorted(wanted) == sorted(null) == ['pooled', 'text']
  for name in wanted:
    assert null[name].dtype == source[3][name].dtype == np.float16
    close(np.stack([source[i][name] for i in range(COUNT)]), wanted[name][:-1])
    close(null[name], wanted[name][-1:])


def test_moments_of_the_set(whole):
  """As numpy has them of all that training can draw of it."""
  source, said = sources.latents(str(whole)), json.loads((whole / 'info.json').read_text())
  moments = np.stack([source[i]['image'] for i in range(COUNT)]).astype(float)
  mean = (moments[..., :2] - 0.1) * 0.7
  spread = np.exp(np.clip(moments[..., 2:], -30, 20) / 2) * 0.7
  found = said['latents']
  np.testing.assert_allclose(found['mean'], mean.mean((0, 1, 2)), rtol=1e-12)
  variance = mean.var((0, 1, 2)) + (spread**2).mean((0, 1, 2))
  np.testing.assert_allclose(found['std'], np.sqrt(variance), rtol=1e-12)
  np.testing.assert_allclose(found['mean_of_all'], mean.mean(), rtol=1e-12)
  np.testing.assert_allclose(found['std_of_all'], np.sqrt(mean.var() + (spread**2).mean()))
  noise = np.random.default_rng(0).standard_normal((1000, *mean.shape))
  np.testing.assert_allclose((mean + spread * noise).std(), found['std_of_all'], rtol=1e-3)
  assert said['latent']['sha256'] == sources.latents(str(whole)).made['latent']['sha256']


# --- the same bytes -------------------------------------------------------------------------------


def test_devices_change_no_byte(whole, weights, tmp_path):
  run(tmp_path / 'set', *options(weights), devices=3)
  assert_same(tmp_path / 'set', whole)


def flags(weights):
  return ['--mode=encode', f'--config={THIS}', *(f'--config.{o}' for o in options(weights))]


def there(folder):
  return len(list(folder.glob('part-*.array_record')))


def test_killed_and_gone_on_with_on_two_hosts(whole, weights, tmp_path):
  folder = tmp_path / 'set'
  process = run_diffax.Process(folder, *flags(weights), sleep=0.05)
  assert process.until(lambda: folder.exists() and there(folder) >= 2), process.text()
  assert process.send(signal.SIGKILL) == -signal.SIGKILL
  assert 2 <= there(folder) < -(-COUNT // PART) and not (folder / 'info.json').exists()
  with pytest.raises(ValueError, match='not finished: give the command of --mode encode again'):
    sources.latents(str(folder))
  kept = there(folder)
  command = [sys.executable, str(run_diffax.ROOT / 'launch' / 'local.py'), '--hosts=2', '--',
             sys.executable, '-m', 'diffax.main', f'--workdir={folder}', *flags(weights)]
  done = subprocess.run(command, env=run_diffax.environment(), capture_output=True, text=True,
                        cwd=tmp_path, timeout=200)
  assert done.returncode == 0, done.stdout[-2000:]
  assert f'{8 - kept} of 8 parts are to be made, by 2 hosts' in done.stdout
  assert_same(folder, whole)


def test_what_is_missing_or_damaged_is_made_again(whole, weights, tmp_path):
  folder = tmp_path / 'set'
  shutil.copytree(whole, folder)
  part = lambda k: folder / parts.name(k, 8)
  part(1).unlink()
  part(2).write_bytes(part(2).read_bytes()[:1000])
  shutil.copy(part(4), part(5))  # whole, and of other records
  (folder / 'null.npz').write_bytes(b'')
  said = '\n'.join(run(folder, *options(weights)))
  assert '3 of 8 parts are to be made' in said and f'{part(2)} is no whole part' in said
  assert_same(folder, whole)
  assert run(folder, *options(weights)) == [f'{folder} is finished: {COUNT} records in 8 parts']


# --- reading a set that is not right --------------------------------------------------------------


def flip(path, place):
  data = bytearray(path.read_bytes())
  data[place] ^= 1
  path.write_bytes(data)


def damage(folder, how):
  part, info = folder / parts.name(3, 8), folder / 'info.json'
  if how == 'missing':
    part.unlink()
  if how == 'short':
    part.write_bytes(part.read_bytes()[:-100])
  if how == 'caption':
    flip(folder / 'captions.json', 30)
  if how in ('count', 'format', 'no JSON'):
    said = json.loads(info.read_text())
    said |= dict(count=said['count'] + 100) if how == 'count' else dict(format=7)
    info.write_text(json.dumps(said)[: 50 if how == 'no JSON' else None])


@pytest.mark.parametrize('how, said', [
  ('missing', 'part-00003-of-00008.array_record is missing, of 8 parts'),
  ('short', 'part-00003-of-00008.array_record has .* bytes and was written with'),
  ('count', 'names 8 parts for 160 records, which are in 20'),
  ('caption', 'captions.json is not what was written'),
  ('format', 'is of format 7'),
  ('no JSON', 'info.json is no readable JSON'),
])  # fmt: skip
def test_sets_that_are_not_whole(how, said, whole, tmp_path):
  folder = tmp_path / 'set'
  shutil.copytree(whole, folder)
  damage(folder, how)
  with pytest.raises(ConfigError, match=said) as error:
    train.setup(config('data.name=latents', f'data.path={folder}'), jax.devices()[:1])
  assert '\n' not in str(error.value)


def test_damaged_records(whole, tmp_path):
  """A bit that fell over is found where it is read, and no other record suffers."""
  folder = tmp_path / 'set'
  shutil.copytree(whole, folder)
  part = folder / parts.name(3, 8)
  flip(part, part.read_bytes().index(parts.read(str(part), [2])[0]) + 100)
  other = folder / parts.name(5, 8)
  shutil.copy(folder / parts.name(6, 8), other)
  source, bad = sources.latents(str(folder)), []
  for i in range(COUNT):
    try:
      source[i]
    except ValueError as error:
      bad.append(i)
      assert str(part if i < 32 else other) in str(error) and '--mode encode' in str(error)
  assert bad == [26, *range(40, 48)]
  with pytest.raises(ValueError, match='is broken .*part-00005-of-00008.array_record'):
    pipeline.read(source, None, 'raise', [40])
  with pytest.raises(ValueError, match='nowhere'):
    sources.latents(str(tmp_path / 'nowhere'))
  with pytest.raises(ValueError, match='none of the latent data sets'):
    sources.latents(str(tmp_path))
  with pytest.raises(ValueError, match="no split .* is 'test'"):
    sources.latents(str(whole), 'test')


# --- training -------------------------------------------------------------------------------------


LATENTS = ('data.name=latents', 'model.patch=1')
TEXT = ('model.text=8', 'model.pooled=8', 'model.modulation=shared', 'model.depth=1')


@pytest.fixture
def quick():
  """Little optimization, for compiling is nearly all that a run of three steps takes."""
  jax.config.update('jax_disable_most_optimizations', True)
  with run_diffax.devices(1):
    yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def exact(weights, tmp_path_factory):
  """The set in float32."""
  folder = tmp_path_factory.mktemp('sets') / 'exact'
  run(folder, *options(weights), 'encode.dtype=float32')
  return folder


def first_losses(*overrides):
  """Of each example of the first step."""
  run = train.setup(config(*TEXT, 'model.patch=1', 'task.drop_cond=0.5', *overrides))
  state = train.init(run)
  # what begins as zero would hide what it is told
  draw = lambda x: 0.2 * jax.random.normal(jax.random.key(x.size), x.shape)
  state = state.replace(params=jax.tree.map(draw, state.params))
  return train.each_loss(run, state)[1]


def test_training_is_that_of_pictures(exact, weights, quick):
  """Encoded beforehand and on the way: the same draws, mirrored, with texts, null ones among them.
  """
  data = ('data.name=latents', f'data.path={exact}', 'data.flip=True')
  wanted = first_losses(*options(weights))
  found = first_losses(*data, *options(weights)[:2], 'text=cached')
  np.testing.assert_allclose(found, wanted, rtol=2e-5)
  bare = first_losses(*data, *options(weights)[2:4])  # without autoencoder; captions encoded anew
  np.testing.assert_allclose(bare, wanted, rtol=2e-5)


@pytest.fixture
def cached(exact, quick, tmp_path_factory):
  """The workdir of a run on it that loads no encoder at all."""
  workdir = tmp_path_factory.getbasetemp() / 'cached'
  more = (*LATENTS, *TEXT, f'data.path={exact}', 'data.flip=True', 'text=cached')
  more += ('evals.held.name=validation', 'evals.held.split=train', 'evals.held.every=3',
           'evals.held.count=8', 'evals.held.batch_size=8', 'evals.held.bins=1')
  if not workdir.exists():
    run_diffax.door('--config', THIS, '--workdir', workdir, *(f'--config.{o}' for o in more))
  return workdir


def sampled(workdir, *arguments):
  run_diffax.door('--workdir', workdir, '--mode=sample', '--config.sample.count=2',
                  '--config.sample.batch_size=2', '--config.sample.sampler.steps=2', *arguments)
  with np.load(pathlib.Path(workdir) / 'samples.npz') as held:
    return held['arr_0']


def test_samples_without_encoders(cached, capsys):
  """Captions of the data alone, and latents alone."""
  assert 0 < json.loads((cached / 'evals.jsonl').read_text())['held/loss'] < 100
  drawn = sampled(cached)
  assert drawn.shape == (2, 4, 4, 2) and drawn.dtype == np.float32
  said = sampled(cached, '--prompt', digits().captions[1], '--config.sample.guidance=2.0')
  assert not np.allclose(said[0], drawn[0])
  with pytest.raises(SystemExit):
    sampled(cached, '--prompt', 'a hundred')
  assert "'a hundred' is no caption of the data" in capsys.readouterr().err


def test_samples_of_any_prompt(cached, weights):
  """By the encoders, named afterwards; of a caption they say what was cached."""
  of = ('--config.text.of=clip', f'--config.text.of.path={weights}/clip')
  prompt = ('--prompt', digits().captions[1], '--config.sample.guidance=2.0')
  np.testing.assert_allclose(
    sampled(cached, *of, *prompt), sampled(cached, *prompt), rtol=1e-3, atol=1e-4)
  assert np.isfinite(sampled(cached, *of, '--prompt', 'a hundred')).all()


def test_samples_are_decoded(exact, weights, quick):
  """Where the autoencoder is named, pictures."""
  made = train.setup(config(*LATENTS, *options(weights)[:2], 'text=none', f'data.path={exact}'))
  draw = sample.drawer(made, made.config['sample'], 'sample')
  drawn, _ = draw(train.init(made), 2)
  assert drawn.shape == (2, 8, 8, 1) and drawn.dtype == np.uint8 and drawn.std() > 1


# --- refusals -------------------------------------------------------------------------------------


def test_wrong_weights(whole, weights, tmp_path):
  wrong = autoencoder(tmp_path / 'vae', 'other')
  data = (*LATENTS, f'data.path={whole}')
  with pytest.raises(ConfigError, match=f'{wrong} is another autoencoder .sha256 .* {whole} '):
    train.setup(config(*data, 'latent=autoencoder', f'latent.path={wrong}'))
  wrong = encoders(tmp_path / 'clip', 'other')
  with pytest.raises(ConfigError, match=f'other encoders or tokenizers than .* {whole}'):
    train.setup(config(*data, *TEXT, 'text=cached', 'text.of=clip', f'text.of.path={wrong}'))
  with pytest.raises(ConfigError, match='holds no embeddings'):
    train.setup(config(*TEXT, 'text=cached'))


def test_sets_without_mirrored(weights, tmp_path):
  run(tmp_path / 'set', *options(weights)[:2], 'encode.part=100')
  data = (*LATENTS, f'data.path={tmp_path}/set')
  train.setup(config(*data), jax.devices()[:1])
  with pytest.raises(ConfigError, match='flip: this set holds no mirrored latents'):
    train.setup(config(*data, 'data.flip=True'), jax.devices()[:1])
  with pytest.raises(ConfigError, match='holds no embeddings'):
    train.setup(config(*data, *TEXT, 'text=cached'), jax.devices()[:1])


@pytest.mark.parametrize('changes, said', [
  (['encode.dtype=float8'], "encode.dtype='float8' is none of float16, float32"),
  (['encode.part=0'], 'encode.part=0 is less than 1'),
  (['data=test_encode.bare'], 'this data has no captions to encode'),
  (['data.buckets=((8, 8), (4, 16))'], 'data.buckets'),
])  # fmt: skip
def test_what_cannot_be_encoded(changes, said, weights, tmp_path):
  with pytest.raises(ConfigError, match=said):
    run(tmp_path / 'set', *options(weights), *changes)
  assert not (tmp_path / 'set').exists()


def test_nothing_to_encode_with(tmp_path):
  with pytest.raises(ConfigError, match="config.latent='none': there is nothing to encode with"):
    run(tmp_path / 'set')


def test_folders_of_something_else(whole, weights, tmp_path, capsys):
  with pytest.raises(ConfigError, match='something else .record: .*<f2.* there, .*<f4.* here'):
    run(whole, *options(weights), 'encode.dtype=float32')
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(ConfigError, match='holds config.json, which is of no latent data set'):
    run(tmp_path, *options(weights))
  with pytest.raises(SystemExit):
    main.main(['diffax', '--mode=encode', '--workdir', str(tmp_path / 'new')])
  assert '--config is missing' in capsys.readouterr().err


def test_values_beyond_float16(weights, tmp_path):
  """Nothing is stored as infinity."""
  folder = tmp_path / 'vae'
  shutil.copytree(weights / 'vae', folder)
  held = safetensors.numpy.load_file(folder / 'model.safetensors')
  held['quant_conv.weight'] *= 1e6
  safetensors.numpy.save_file(held, folder / 'model.safetensors')
  with pytest.raises(ConfigError, match='moments of records 0 to 1 is not finite as float16'):
    run(tmp_path / 'set', 'latent=autoencoder', f'latent.path={folder}')
