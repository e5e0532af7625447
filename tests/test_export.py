"""What runs export is read again bit for bit; in whose words it is; training from it; bad input."""

import json
import os

from etils import epath
from golden import pipelines as golden
import jax
import numpy as np
import pytest
import run_diffax
import test_pipelines

from diffax import checkpoint
from diffax import config as configs
from diffax import export
from diffax import latents
from diffax import main
from diffax import sample
from diffax import train
from diffax.build import build, ConfigError
from diffax.convert import autoencoder
from diffax.convert import latent_unet
from diffax.convert import pipelines
from diffax.convert import tensors
from diffax.data import sources
from diffax.data import tokenizers


def trained(workdir, config):
  """A run's workdir with one checkpoint, of numbers drawn for every leaf. (run, state)."""
  run, rng = train.setup(config, jax.devices()[:1]), np.random.default_rng(0)

  def drawn(x):
    scale = max(int(np.prod(x.shape[:-1])), 1) ** -0.5
    return jax.device_put((scale * rng.standard_normal(x.shape)).astype(x.dtype), x.sharding)

  state = jax.tree.map(drawn, run.like.replace(frozen={})).replace(frozen=sample.frozen(run))
  workdir.mkdir()
  configs.save(config, epath.Path(workdir) / 'config.json')
  for name, text in run.task.record.items():
    (workdir / name).write_text(text)
  checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints')
  checkpoints.save(3, state)
  checkpoints.wait()
  checkpoints.close()
  return run, state


def exported(workdir, out, *more):
  with run_diffax.devices(1):
    run_diffax.door('--workdir', workdir, '--mode', 'export', '--out', out, *more)
  return out


def read(out, *overrides):
  """(run, state) of what `--weights` makes of a folder."""
  config = configs.override(pipelines.config(out), [f'--config.{o}' for o in overrides])
  run = train.setup(config, jax.devices()[:1])
  return run, sample.released(run, out)


def same(found, wanted):
  run_diffax.assert_same(run_diffax.flat(found), run_diffax.flat(wanted))


# --- autoencoders ---------------------------------------------------------------------------------

CODER = (
  'task.name=autoencode', 'model.name=autoencoder_kl', 'model.channels=1', 'model.latent=2',
  'model.width=8', 'model.multipliers=(1, 2)', 'model.blocks=1', 'model.groups=4', 'evals={}')


def coder_config(*more):
  config = {k: v for k, v in run_diffax.get_config().to_dict().items() if k not in (
    'model', 'task', 'sample', 'evals', 'prediction', 'schedule', 'loss')}
  return configs.override(config, [f'--config.{o}' for o in (*CODER, *more)])


@pytest.fixture(scope='module')
def coder(tmp_path_factory):
  """(workdir, run, state) of an autoencoder of the digits."""
  workdir = tmp_path_factory.mktemp('coder') / 'run'
  return workdir, *trained(workdir, coder_config())


def test_autoencoder(coder, tmp_path, capfd):
  """Its average, by diffusers' names; of the pictures it was trained on, z is standard."""
  workdir, run, state = coder
  out = exported(workdir, tmp_path / 'out')
  said = capfd.readouterr().out
  assert 'AutoencoderKL of diffusers' in said and 'measured on 1024' in said and 'step 3' in said
  config = json.loads((out / 'config.json').read_text())
  assert config['_class_name'] == 'AutoencoderKL' and config['latent_channels'] == 2

  source = sources.digits('train')
  latent = latents.autoencoder(source, str(out))
  frozen = latent.frozen['autoencoder']
  params = frozen.load(jax.eval_shape(frozen.like))
  same(params, state.ema['0.995']['net'])
  pictures = np.stack([source[i]['image'] for i in range(0, 1438, 3)]) / 127.5 - 1
  keys = jax.random.split(jax.random.key(0), len(pictures))
  z = latent.encode({'autoencoder': params}, pictures, keys)
  assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1) < 0.02


def test_a_scale_that_is_said(coder, tmp_path, capfd):
  """It is taken; the last parameters are written where they are asked for."""
  workdir, run, state = coder
  out = exported(
    workdir, tmp_path / 'out', '--config.model.scale=0.5', '--config.sample.ema=none', '--step=3')
  assert 'measured' not in capfd.readouterr().out
  config = json.loads((out / 'config.json').read_text())
  assert config['scaling_factor'] == 0.5 and config['shift_factor'] is None
  found = autoencoder.weights(out)
  model = build('diffax.models', found.spec, path='model')
  same(tensors.read(found, model, run.like.params['net']), state.params['net'])


  same(pipelines.net(out, run.config['model'], run.like.params['net']), state.params['net'])


# --- in diffusers' words --------------------------------------------------------------------------


def latent_config(folder, **more):
  """A run on the folder's text encoders and autoencoder."""
  made = pipelines.config(folder)
  made['sample'] |= dict(prompts=('a cat',))
  made |= dict(ema=(0.9,), prediction=dict(name='v')) | more
  return configs.override(made, [])


@pytest.fixture(scope='module')
def latent(tmp_path_factory):
  """(workdir, run, state) of a U-Net of latents with SDXL's two text encoders."""
  path = tmp_path_factory.mktemp('latent')
  case = golden.CASES['xl']
  there = test_pipelines.write(path / 'folder', case['kind'], case['parts'], case['scheduler'])
  return path / 'run', *trained(path / 'run', latent_config(there))


def test_a_pipeline_of_diffusers(latent, tmp_path, capfd):
  workdir, run, state = latent
  out = exported(workdir, tmp_path / 'out')
  assert 'StableDiffusionXLPipeline of diffusers' in capfd.readouterr().out
  again, found = read(out, 'sample.prompts=("a cat",)')
  same(found.params, state.ema['0.9'])
  same(found.frozen, state.frozen)
  run_diffax.assert_same(*(r.task.tokenize(['a cat', '']) for r in (again, run)))
  for name in ('model', 'schedule', 'prediction', 'data'):
    assert again.config[name] == run.config[name], name
  assert again.config['text']['zeros']
  index = json.loads((out / 'model_index.json').read_text())
  parts = {k for k, v in index.items() if isinstance(v, list)}
  assert parts == {p.name for p in out.iterdir() if p.is_dir()}


@pytest.mark.parametrize('words, said', [
  (dict(schedule='linear', prediction='velocity'), 'schedule=linear'),
  (dict(schedule=dict(name='squared_cosine', offset=0.1), prediction='v'), 'offset'),
  (dict(prediction='velocity'), 'prediction=velocity'),
  (dict(prediction='x0'), ''),
  (dict(schedule=dict(name='zero_terminal_snr', of='scaled_linear')), ''),
])
def test_schedules(latent, words, said, tmp_path):
  """Those of a table alone have a scheduler there; it is read as what was written."""
  _, run, _ = latent
  config = configs.override(run.config | words, [])
  if said:
    with pytest.raises(ValueError, match=said):
      export._scheduler(config)
    return
  test_pipelines.put(tmp_path / 'scheduler/scheduler_config.json', export._scheduler(config))
  assert configs.override({**config, **pipelines._process(str(tmp_path), {})}, []) == config


def test_dit(tmp_path, capfd):
  """With 1000 classes and a learned variance, a DiTPipeline; with fewer classes our own."""
  case = golden.CASES['dit']
  there = test_pipelines.write(tmp_path / 'folder', case['kind'], case['parts'], case['scheduler'])
  small = dict(
    name='dit', patch=2, width=24, depth=1, heads=2, classes=1000, remat='none', base=4)
  for classes, said in ((1000, 'DiTPipeline of diffusers'), (7, 'than 1000 classes')):
    made = pipelines.config(there) | dict(ema=(0.9,), model=small | dict(classes=classes))
    made['data'] |= dict(classes=classes)
    workdir = tmp_path / f'run{classes}'
    _, state = trained(workdir, configs.override(made, []))
    out = exported(workdir, tmp_path / f'out{classes}', '--config.sample.ema=none')
    assert said in capfd.readouterr().out
    run, found = read(out)
    same(found.params, state.params)
    same(found.frozen, state.frozen)
    assert run.config['prediction']['name'] == 'learned_range' and run.task.classes == classes


# --- in our own -----------------------------------------------------------------------------------

WORDS = (
  'text=learned', 'text.vocab=300', 'text.length=8', 'text.width=16', 'text.depth=1',
  'text.heads=2', 'model.text=16', 'model.pooled=16', 'model.width=16', 'model.depth=1',
  'model.remat=none', 'schedule=learned', 'schedule.width=8', 'evals={}',
  'sample.sampler.steps=2', 'sample.batch_size=1', 'sample.guidance=2.')


@pytest.fixture(scope='module')
def own(tmp_path_factory):
  """(workdir, run, state) of a DiT of pixels with a text encoder and a schedule of its own."""
  workdir = tmp_path_factory.mktemp('own') / 'run'
  config = run_diffax.config(*WORDS)
  return workdir, *trained(workdir, config)


def test_our_own_layout(own, tmp_path, capfd):
  """Written and read, it samples what the run samples."""
  workdir, run, state = own
  out = exported(workdir, tmp_path / 'out')
  said = capfd.readouterr().out
  assert "diffax's own layout" in said and said.count('\n') == 1
  modes = {file.stat().st_mode for file in out.rglob('*') if file.is_file()}
  assert len(modes) == 1, 'weights are for whoever may read the rest'
  again, found = read(out, 'sample.prompts=("a cat",)')
  same(found.params, state.ema['0.995'])
  assert set(found.params) == {'net', 'text', 'schedule'}
  run_diffax.assert_same(*(r.task.tokenize(['one two', '']) for r in (again, run)))
  more = ('--mode', 'sample', '--prompt', 'three', '--config.sample.labels=3')
  with run_diffax.devices(1):
    run_diffax.door('--workdir', workdir, *more)
    run_diffax.door('--weights', out, '--workdir', tmp_path / 'again', *more)
  one, two = (np.load(w / 'samples.npz')['arr_0'] for w in (workdir, tmp_path / 'again'))
  np.testing.assert_array_equal(one, two)
  assert one.shape == (1, 8, 8, 1) and one.std() > 1


def test_a_folder_names_nothing_of_others(own, tmp_path):
  """Neither a module to import nor a file to read."""
  workdir, _, _ = own
  out = exported(workdir, tmp_path / 'out')
  index = json.loads((out / 'model_index.json').read_text())
  for change, said in (
    (lambda c: c['model'].update(name='os.getcwd'), "'os.getcwd' is no name of diffax"),
    (lambda c: c['sample'].update(guide='os.getcwd'), "'os.getcwd'"),
    (lambda c: c['sample']['sampler'].update(grid=['os.getcwd']), "'os.getcwd'"),
    (lambda c: c['text'].update(more=dict(path='../x')), "'../x'"),
    (lambda c: c.update(data=dict(name='captioned', path='x')), 'no config as diffax writes it'),
    (lambda c: c.update(evals={}), 'no config as diffax writes it'),
    (lambda c: c.update(text='clip'), 'no config as diffax writes it'),
    (lambda c: c.clear(), 'no config as diffax writes it'),
  ):
    broken = json.loads(json.dumps(index))
    change(broken['config'])
    (out / 'model_index.json').write_text(json.dumps(broken))
    with pytest.raises(ConfigError) as error:
      pipelines.config(out)
    assert said in str(error.value) and '\n' not in str(error.value)


# --- training from it -----------------------------------------------------------------------------


def test_training_begins_with_it(own, tmp_path, capfd):
  """With the network alone: the text encoder is as it would be anew."""
  workdir, run, state = own
  out = exported(workdir, tmp_path / 'out')
  workdir = tmp_path / 'tuned'
  words = [f'--config.{w}' for w in WORDS]
  door = lambda *more: run_diffax.door(
    '--config', run_diffax.SMOKE, *words, '--workdir', workdir, '--weights', out, *more)
  for more, said in (
    (('--config.model.heads=4',), ['heads=2 there, 4 in config.model']),
    (('--config.model.width=32', '--config.model.heads=1'),
     ['width=16 there, 32', 'heads=2 there, 1']),
    (('--from', 'x'), ['--weights and --from']),
  ):
    with pytest.raises(SystemExit) as end:
      door(*more)
    line = capfd.readouterr().err
    assert end.value.code == 2 and line.count('\n') == 1 and all(s in line for s in said), line
    assert not workdir.exists()
  checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  _, begun, _ = train._begin(run, checkpoints, None, str(out))
  checkpoints.close()
  fresh = train.init(run)
  for params, anew in ((begun.params, fresh.params), (begun.ema['0.995'], fresh.ema['0.995'])):
    same(params['net'], state.ema['0.995']['net'])
    same(params['text'], anew['text'])
  assert int(begun.step) == 0
  with pytest.raises(ConfigError, match='network=.DiT. there, .UNet. in config.model'):
    pipelines.fits(out, dict(name='unet', width=16), run.like.params['net'])


def test_every_misfit_of_a_network_of_others(latent, tmp_path):
  workdir, run, state = latent
  out = exported(workdir, tmp_path / 'out')
  like = run.like.params['net']
  assert isinstance(run.config['model'], dict)
  with pytest.raises(ConfigError) as error:
    pipelines.fits(out, run.config['model'] | dict(text=41, linear=False), like)
  assert 'text=40 there, 41 in config.model' in str(error.value)
  assert 'linear=True there, False' in str(error.value)
  model = build('diffax.models', run.config['model'], path='model')
  file = out / 'unet' / export.WEIGHTS
  net = {**state.params['net'], 'conv_in': {'kernel': np.zeros((3, 3, 5, 16), np.float32)}}
  tensors.save(file, net, latent_unet.stored(model))
  with pytest.raises(ConfigError, match=r'misses conv_in.bias; has misshapen conv_in.weight'):
    pipelines.fits(out, run.config['model'], like)


# --- bad input ------------------------------------------------------------------------------------


def test_wrong(own, tmp_path, capfd, monkeypatch):
  workdir, _, _ = own

  def said(*arguments):
    with pytest.raises(SystemExit) as end, run_diffax.devices(1):
      run_diffax.door('--workdir', workdir, *arguments)
    line = capfd.readouterr().err
    assert end.value.code == 2 and line.startswith('error: ') and line.count('\n') == 1, line
    return line

  there = tmp_path / 'there'
  there.mkdir()
  assert 'is there already' in said('--mode=export', f'--out={there}')
  assert "--out=''" in said('--mode=export')
  assert 'of export alone' in said('--mode=sample', f'--out={there}')
  assert 'no folder of this machine' in said('--mode=export', '--out=gs://bucket/out')
  assert 'cannot be written' in said('--mode=export', '--out=/proc/nowhere/out')
  out = f'--out={tmp_path / "out"}'
  assert 'no checkpoint of step 9' in said('--mode=export', out, '--step=9')
  assert "ema='0.5' was not kept" in said('--mode=export', out, '--config.sample.ema=0.5')
  assert 'for --mode sample' in said('--mode=export', out, '--weights=x')

  def broken(*args, **options):
    raise OSError('no space left')

  monkeypatch.setattr(tensors, 'save', broken)
  with pytest.raises(OSError, match='no space'), run_diffax.devices(1):
    main._run(['diffax', '--workdir', str(workdir), '--mode=export', out])
  assert os.listdir(tmp_path) == ['there']  # nothing half written is left


def test_names_of_ones_own(own):
  """Which a folder cannot bring along."""
  _, run, _ = own
  mine = run._replace(config={**run.config, 'schedule': dict(name='mine.schedule')})
  with pytest.raises(ConfigError, match="'mine.schedule' is no name of diffax"):
    export._config(mine, mine.config, (8, 8, 1))


def test_tokenizer_files(tmp_path):
  """CLIP's, written again, is the same tokenizer."""
  for number in ('', '_2'):
    there = tmp_path / f'there{number}'
    there.mkdir()
    words = test_pipelines.HERE.parent / 'tokenizer'
    for name in ('vocab.json', 'merges.txt'):
      (there / name).write_bytes((words / name).read_bytes())
    for name, said in golden.special(number).items():
      test_pipelines.put(there / name, said)
    one = tokenizers.clip(there)
    export._texts(str(tmp_path / f'again{number}'), tokenizers.clip_files(one))
    assert tokenizers.clip(tmp_path / f'again{number}') == one
