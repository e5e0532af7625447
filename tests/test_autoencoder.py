"""Autoencoders: parity with the reference, names in files, configs, codebooks and bad input."""

import functools
import json
import pathlib

from golden import autoencoder as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffax import build
from diffax.convert import autoencoder as convert
from diffax.convert import tensors
from diffax.models import autoencoder

HERE = pathlib.Path(golden.__file__)
WANT = np.load(HERE.with_suffix('.npz'))
NAMES = json.loads(HERE.with_suffix('.json').read_text())  # {CompVis': diffusers'}
SMALL = dict(width=8, multipliers=(1, 2), blocks=1, groups=4)


def made(config):
  return build.build('diffax.models', convert.from_config(config), path='model')


def shapes(model, channels=3, side=16):
  x = jnp.zeros((1, side, side, channels))
  return jax.eval_shape(lambda: model.init(jax.random.key(0), x))['params']


def paths(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def drawn(path, like, stored, draw=golden.draw):
  """The parameters `like`, read from a file `path` of the reference's weights by name."""
  given = {k: draw(k, shape) for k, shape in tensors.wanted(like, stored).items()}
  safetensors.numpy.save_file({k: np.float32(v) for k, v in given.items()}, path)
  return tensors.load(tensors.find(path), like, stored, convert.IGNORED)


def last(x):
  """[b c h w] of the reference as [b h w c]."""
  return jnp.float32(np.moveaxis(x, 1, -1))


def assert_close(a, b, rtol=1e-6):
  np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


# --- parity ---------------------------------------------------------------------------------------


@functools.lru_cache
def reference(name, folder):
  """(model, params, what it returns by name, gradients of random projections of all that)."""
  model = made(golden.MODELS[name])
  params = drawn(folder / f'{name}.safetensors', shapes(model), convert.stored(model))
  x, z = map(last, golden.inputs(name))
  rng = np.random.default_rng(0)

  def run(params):
    call = lambda method, *args: model.apply({'params': params}, *args, method=method)
    out = {'moments': call('encode', x), 'image': call('decode', z)}
    if name == 'vq':
      out['quantized'], out['index'] = call('quantize', z)
      out['entry'] = call('lookup', out['index'])
    return out

  weights = {k: jnp.float32(rng.standard_normal(v.shape)) for k, v in jax.eval_shape(
    run, params).items()}

  def project(params):
    out = run(params)
    return sum(jnp.sum(out[k] * weights[k]) for k in out if k != 'index'), out

  grads, out = jax.jit(jax.grad(project, has_aux=True))(params)
  return model, params, out, grads


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('weights')


@pytest.mark.parametrize('name', golden.MODELS)
def test_parity(name, folder):
  out = reference(name, folder)[2]
  for key in ('moments', 'image'):
    assert out[key].dtype == jnp.float32
    assert_close(out[key], last(WANT[f'{name}/{key}']), 1e-5)
  if name == 'vq':
    np.testing.assert_array_equal(out['index'], WANT['vq/index'])
    assert_close(out['quantized'], last(WANT['vq/quantized']))
    each = autoencoder.codebook_loss(last(golden.inputs('vq')[1]), out['entry'])
    np.testing.assert_allclose(each.mean(), WANT['vq/loss'], rtol=1e-5)
  else:
    mean, logvar = autoencoder.posterior(out['moments'])
    assert_close(logvar, last(WANT[f'{name}/logvar']), 1e-5)
    np.testing.assert_array_equal(mean, out['moments'][..., : mean.shape[-1]])


@pytest.mark.parametrize('name', golden.MODELS)
def test_every_tensor_matters(name, folder):
  for path, grad in paths(reference(name, folder)[3]).items():
    largest = np.abs(grad).max()
    if path.endswith('key/bias'):  # adds to a query's every score the same: softmax cancels it
      assert largest < 1e-3
    else:
      assert np.isfinite(grad).all() and largest > 1e-2, (path, largest)


@pytest.mark.parametrize('name', golden.MODELS)
def test_round_trip(name, folder):
  model, params, *_ = reference(name, folder)
  for layout in (convert.stored, convert.early, convert.ldm):
    file = folder / 'again.safetensors'
    tensors.save(file, params, layout(model))
    files = tensors.find(file)
    assert convert.suited(files.of, model)(
      'encoder/middle_block0/attention/query/kernel', (8, 8)
    ) == layout(model)('encoder/middle_block0/attention/query/kernel', (8, 8))
    again = tensors.load(files, params, convert.suited(files.of, model))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_half_precision(folder):
  """Of bfloat16 what comes out is float32 and near, and the parameters stay as they are."""
  model, params, want, _ = reference('kl16', folder)
  half = model.clone(design=model.design._replace(dtype=jnp.dtype('bfloat16'), remat='none'))
  out = jax.jit(lambda p, z: half.apply({'params': p}, z, method='decode'))(
    params, last(golden.inputs('kl16')[1]))
  assert out.dtype == jnp.float32
  assert 1e-4 < np.abs(out - want['image']).max() / np.abs(want['image']).max() < 0.05
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes(half))} == {jnp.dtype('float32')}


def test_logvar_is_clipped():
  mean, logvar = autoencoder.posterior(jnp.array([[[[3.0, -1.0, -99.0, 99.0]]]]))
  np.testing.assert_array_equal(mean[0, 0, 0], [3, -1])
  np.testing.assert_array_equal(logvar[0, 0, 0], [-30, 20])


# --- codebooks ------------------------------------------------------------------------------------


def test_nearest_entry_and_straight_gradient():
  """By hand: entries on a line, z between them; the gradient of zq is that of z."""
  model = autoencoder.autoencoder_vq(**SMALL, latent=2, codes=4)
  book = jnp.array([[-2.0, 0.0], [0.0, 0.0], [1.0, 0.0], [5.0, 0.0]])
  z = jnp.array([[-1.9, 0.3], [-0.6, 0.0], [0.4, 0.2], [0.6, 5.0], [2.9, 0.0], [3.1, 0.0]])
  z = z[None, None]
  quantize = lambda z: model.apply({'params': {'codebook': book}}, z, method='quantize')
  zq, index = quantize(z)
  np.testing.assert_array_equal(index, [[[0, 1, 1, 2, 2, 3]]])
  assert_close(zq, book[index])
  np.testing.assert_array_equal(quantize(book[None, None])[1], [[[0, 1, 2, 3]]])
  weights = jnp.arange(12.0).reshape(z.shape)
  np.testing.assert_array_equal(jax.grad(lambda z: jnp.sum(quantize(z)[0] * weights))(z), weights)


def test_codebook_loss_moves_both():
  """Each of the two by its own part, the encoder's `commitment` times as much."""
  z, entry = jnp.full((1, 1, 1, 2), 3.0), jnp.full((1, 1, 1, 2), 1.0)
  loss = lambda z, entry: autoencoder.codebook_loss(z, entry, 0.5)[0]
  np.testing.assert_allclose(loss(z, entry), 6.0)
  to_z, to_entry = jax.grad(loss, (0, 1))(z, entry)
  np.testing.assert_allclose(to_z, np.full(z.shape, 1.0))  # 0.5 * 2 * (3 - 1) / 2 values
  np.testing.assert_allclose(to_entry, np.full(z.shape, -2.0))


# --- names and configs ----------------------------------------------------------------------------


def test_names_of_single_files():
  """Each tensor of ours has the pair of names that diffusers' own converter makes of one."""
  model = made(golden.SHIPPED)
  theirs, single = convert.stored(model), convert.ldm(model)
  like = paths(shapes(model))
  name = lambda layout, path: layout(path, like[path].shape).names[0]
  pairs = {name(single, p).removeprefix('first_stage_model.'): name(theirs, p) for p in like}
  assert pairs == NAMES
  wanted = tensors.wanted(shapes(model), single)
  assert wanted['first_stage_model.encoder.mid.attn_1.q.weight'] == (32, 32, 1, 1)
  assert wanted['first_stage_model.decoder.up.1.block.0.nin_shortcut.weight'] == (16, 32, 1, 1)
  bare = tensors.wanted(shapes(model), convert.ldm(model, ''))
  assert set(bare) == set(NAMES)
  assert convert.suited(bare, model, '')('quant_conv/bias', (8,)).names == ('quant_conv.bias',)


def test_names_of_early_folders():
  model = made(golden.SHIPPED)
  now, then = (tensors.wanted(shapes(model), f(model)) for f in (convert.stored, convert.early))
  pairs = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
  renamed = {
    functools.reduce(lambda n, pair: n.replace(f'.{pair[0]}.', f'.{pair[1]}.'), pairs.items(), n): s
    for n, s in now.items()
  }
  assert renamed == then and len(set(now) ^ set(then)) == 2 * 16


def test_training_leftovers_are_ignored(tmp_path):
  model = made(golden.KL16)
  names = tensors.wanted(shapes(model), convert.ldm(model, ''))
  extra = {'loss.logvar': (), 'loss.discriminator.main.0.weight': (4,), 'model_ema.decay': ()}
  file = tmp_path / 'vae.safetensors'
  safetensors.numpy.save_file({k: np.zeros(s, np.float32) for k, s in (names | extra).items()},
                              file)
  tensors.check(tensors.find(file), names, convert.IGNORED)
  with pytest.raises(build.ConfigError, match='loss.logvar'):
    tensors.check(tensors.find(file), names)


BLOCKS = dict(
  act_fn='silu', block_out_channels=[128, 256, 512, 512],
  down_block_types=['DownEncoderBlock2D'] * 4, in_channels=3, layers_per_block=2,
  norm_num_groups=32, out_channels=3,
  up_block_types=['UpDecoderBlock2D'] * 4, _class_name='AutoencoderKL',
)  # fmt: skip
LATE = BLOCKS | dict(
  force_upcast=True, latent_channels=16, latents_mean=None, latents_std=None, sample_size=1024,
  use_post_quant_conv=False, use_quant_conv=False,
)  # fmt: skip
PUBLISHED = {  # config.json, and how many parameters there are
  'sd15': (BLOCKS | dict(_diffusers_version='0.6.0', latent_channels=4, sample_size=512),
           dict(latent=4, scale=0.18215), 83_653_863),
  'sdxl': (BLOCKS | dict(_diffusers_version='0.20.0.dev0', _name_or_path='../sdxl-vae/',
                         force_upcast=True, latent_channels=4, sample_size=1024,
                         scaling_factor=0.13025),
           dict(latent=4, scale=0.13025), 83_653_863),
  'sd3': (LATE | dict(_diffusers_version='0.29.0.dev0', scaling_factor=1.5305, shift_factor=0.0609),
          dict(latent=16, scale=1.5305, shift=0.0609), 83_819_683),
  'flux': (LATE | dict(_diffusers_version='0.30.0.dev0', mid_block_add_attention=True,
                       scaling_factor=0.3611, shift_factor=0.1159),
           dict(latent=16, scale=0.3611, shift=0.1159), 83_819_683),
}  # fmt: skip


@pytest.mark.parametrize('name', PUBLISHED)
def test_published(name):
  config, want, count = PUBLISHED[name]
  spec = convert.from_config(config)
  assert want.items() <= spec.items() and spec['multipliers'] == (1, 2, 4, 4)
  model = made(config)
  assert (model.latent, model.factor) == (want['latent'], 8)
  assert (model.scale, model.shift) == (want['scale'], want.get('shift', 0.0))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes(model))) == count
  # back again: what is the network's stands there again
  same = convert.to_config(spec)
  kept = {k: v for k, v in config.items() if k in same}
  assert kept == {k: same[k] for k in kept} and convert.from_config(same) == spec


@pytest.mark.parametrize('name', golden.MODELS)
def test_config_round_trip(name):
  config = golden.MODELS[name]
  made = convert.to_config(convert.from_config(config))
  assert config.items() <= made.items()
  json.dumps(made)


def test_defaults_are_published():
  spec = convert.from_config(PUBLISHED['sd15'][0])
  assert autoencoder.autoencoder_kl() == build.build('diffax.models', spec, path='model')


@pytest.mark.parametrize('change,said', [
  (dict(act_fn='relu'), 'relu'),
  (dict(norm_type='spatial'), 'spatial'),
  (dict(latents_mean=[0.0] * 4), 'latents_mean'),
  (dict(out_channels=4), 'out_channels'),
  (dict(use_post_quant_conv=False), 'use_post_quant_conv'),
  (dict(down_block_types=['DownBlock2D'] * 4), 'DownBlock2D'),
  (dict(up_block_types=['AttnUpDecoderBlock2D'] * 4), 'AttnUpDecoderBlock2D'),
  (dict(temporal=True), 'temporal'),
  (dict(_class_name='AutoencoderDC'), 'AutoencoderDC'),
])  # fmt: skip
def test_configs_that_are_none_of_ours(change, said):
  with pytest.raises(ValueError, match=said):
    convert.from_config(PUBLISHED['sd15'][0] | change)


def test_config_of_another_model():
  with pytest.raises(build.ConfigError, match='dit'):
    convert.to_config(dict(name='dit', width=8))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize('options,said', [
  (dict(groups=3), 'groups'), (dict(attention=(2,)), 'levels are 0 to 1'),
  (dict(remat='all'), 'remat'),
])  # fmt: skip
def test_bad_options(options, said):
  with pytest.raises(ValueError, match=said):
    shapes(autoencoder.autoencoder_kl(**SMALL | options))


def test_bad_codes():
  with pytest.raises(ValueError, match='codes=0'):
    autoencoder.autoencoder_vq(codes=0)


def test_bad_images():
  model = autoencoder.autoencoder_kl(**SMALL | dict(multipliers=(1, 1, 1)))
  init = lambda x: jax.eval_shape(model.init, jax.random.key(0), x)
  with pytest.raises(ValueError, match='18x16 does not divide by 4.*crop or pad'):
    init(jnp.zeros((1, 18, 16, 3)))
  with pytest.raises(ValueError, match=r'\[b h w 3\]'):
    init(jnp.zeros((1, 16, 16, 4)))
  with pytest.raises(ValueError, match='uint8'):
    init(jnp.zeros((1, 16, 16, 3), jnp.uint8))
  with pytest.raises(ValueError, match=r'\[b h w 4\]'):
    z = jnp.zeros((1, 4, 4, 3))
    jax.eval_shape(lambda: model.init(jax.random.key(0), z, method='decode'))


def test_other_images():
  """Gray ones, and one level alone, of factor 1."""
  model = autoencoder.autoencoder_kl(**SMALL | dict(multipliers=(1,)), channels=1, latent=2)
  x = jnp.zeros((2, 6, 10, 1))
  out = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), x)[0])
  assert model.factor == 1 and out.shape == x.shape
