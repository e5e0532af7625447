"""Text encoders: parity with the references, their files, the order and the mask of tokens."""

import functools
import json
import pathlib

from golden import text as golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from diffax import build
from diffax.convert import tensors
from diffax.convert import text as convert
from diffax.models import text

WANTED = np.load(pathlib.Path(golden.__file__).with_suffix('.npz'))
SAID = json.loads(str(WANTED['said']))


def network(**fields):
  return text.clip_text(**dict(
    vocab=golden.VOCAB, length=golden.LENGTH, width=golden.WIDTH, depth=golden.DEPTH,
    heads=golden.HEADS, hidden=golden.HIDDEN) | fields)


def of_config(case, **fields):
  return build.build('diffax.models', convert.from_config(SAID[case]['config']) | fields, path='x')


def shapes(model):
  tokens = jnp.zeros((1, model.length), int)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))['params']


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens, mask=None):
  return model.apply({'params': params}, tokens, mask)


@functools.cache
def fresh(model):
  init = lambda: model.init(jax.random.key(0), jnp.zeros((1, model.length), int))['params']
  return jax.jit(init)()


def put(path, names):
  """A file of the tensors {name: shape}, drawn from their names; its `Files`."""
  drawn = {name: golden.draw(name, tuple(shape)).astype('f4') for name, shape in names.items()}
  safetensors.numpy.save_file(drawn, path)
  return tensors.find(path)


def read(path, model, names, stored):
  return tensors.load(put(path, names), shapes(model), stored, convert.IGNORED)


def assert_close(found, wanted, tolerance=1e-5):
  assert found.shape == wanted.shape
  np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def differ(a, b):
  return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max())


# --- parity ---------------------------------------------------------------------------------------


def of_transformers(path, case, **fields):
  model, names = of_config(case, **fields), SAID[case]['names']
  place = convert.stored(model, convert.prefix_of(names))
  found = tensors.wanted(shapes(model), place)
  assert found == {name: tuple(shape) for name, shape in names.items()}  # all of them, no other
  return model, read(path, model, names, place)


@pytest.mark.parametrize('case', golden.CONFIGS)
def test_parity(case, tmp_path):
  model, params = of_transformers(tmp_path / 'model.safetensors', case)
  out = run(model, params, golden.tokens())
  assert_close(out['text'], WANTED[f'{case}_last'])
  assert_close(out['pooled'], WANTED[f'{case}_pooled'])


def test_parity_of_the_last_state_but_one(tmp_path):
  """What SDXL reads: not normed, while pooled is of the last state."""
  model, params = of_transformers(tmp_path / 'model.safetensors', 'sdxl', skip=1, norm=False)
  out = run(model, params, golden.tokens())
  assert_close(out['text'], WANTED['sdxl_penultimate'])
  assert_close(out['pooled'], WANTED['sdxl_pooled'])


def test_parity_with_a_mask(tmp_path):
  model, params = of_transformers(tmp_path / 'model.safetensors', 'sdxl')
  out = run(model, params, golden.tokens(), golden.mask())
  assert_close(out['text'], WANTED['masked_last'])
  assert_close(out['pooled'], WANTED['masked_pooled'])
  assert differ(WANTED['masked_pooled'], WANTED['sdxl_pooled']) > 0.01


def openclip(**fields):
  return network(activation='gelu', **fields)


def test_parity_with_openclip(tmp_path):
  model, names = openclip(projection=golden.PROJECTION), SAID['openclip']['names']
  place = convert.openclip(model, '')
  assert tensors.wanted(shapes(model), place) == {n: tuple(s) for n, s in names.items()}
  params = read(tmp_path / 'a.safetensors', model, names, place)
  out = run(model, params, golden.tokens())
  assert_close(out['text'], WANTED['openclip_last'])
  assert_close(out['pooled'], WANTED['openclip_pooled'])
  out = run(openclip(projection=golden.PROJECTION, skip=1), params, golden.tokens())
  assert_close(out['text'], WANTED['openclip_penultimate_normed'])


def test_sd2_leaves_out_the_last_layer(tmp_path):
  """Its single file has 24 layers and a projection, of which it reads 23 and none."""
  model = openclip(depth=23, width=8, heads=2, hidden=8)
  place = convert.openclip(model)
  deeper = openclip(depth=24, width=8, heads=2, hidden=8, projection=8)
  names = tensors.wanted(shapes(deeper), convert.openclip(deeper))
  assert 'cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight' in names
  names |= {'cond_stage_model.model.logit_scale': (1,)}
  params = read(tmp_path / 'a.safetensors', model, names, place)
  assert params['blocks']['query']['kernel'].shape == (23, 8, 8)
  del names['cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight']
  with pytest.raises(build.ConfigError, match='misses .*resblocks.23.attn.in_proj_weight'):
    read(tmp_path / 'b.safetensors', deeper, names, convert.openclip(deeper))


@pytest.mark.parametrize('preset, count', [
  ('SD1/ViT-L', 123_060_480), ('SDXL/ViT-L', 123_060_480), ('SD2/ViT-H', 340_387_840),
  ('SDXL/ViT-bigG', 694_659_840),
])
def test_preset_sizes(preset, count):
  """As transformers counts the released models."""
  model = text.clip_text_preset(preset)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes(model))) == count


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('place', [
  convert.stored, functools.partial(convert.stored, prefix=''),
  functools.partial(convert.stored, prefix='cond_stage_model.transformer.text_model.'),
  convert.openclip,
])
def test_round_trip(place, tmp_path):
  """Written and read again, bit for bit; and buffers of older files mean nothing."""
  model = network(projection=golden.PROJECTION)
  params = fresh(model)
  tensors.save(tmp_path / 'model.safetensors', params, place(model))
  held = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  held |= {'text_model.embeddings.position_ids': np.arange(12)[None], 'logit_scale': np.ones(())}
  safetensors.numpy.save_file(held, tmp_path / 'model.safetensors')
  files = tensors.find(tmp_path)
  again = tensors.load(files, shapes(model), place(model), convert.IGNORED)
  jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize('case', golden.CONFIGS)
def test_configs_there_and_back(case):
  """What we write says what transformers' own config says, in all that the network depends on."""
  config = SAID[case]['config']
  spec = convert.from_config(config)
  written = convert.to_config(spec)
  assert convert.from_config(written) == spec
  depends = set(convert.DEFAULTS) - ({'projection_dim'} if case != 'sdxl' else set())
  same = {name: config[name] for name in depends}
  assert {name: written[name] for name in depends} == same
  assert written['architectures'] == config['architectures']
  assert convert.prefix_of(SAID[case]['names']) == ('text_model.' if case == 'sdxl' else '')


def test_presets_are_exported_too():
  config = convert.to_config(dict(name='clip_text_preset', preset='SDXL/ViT-bigG'))
  assert config['projection_dim'] == 1280 and config['architectures'] == [convert.MODELS[1]]


@pytest.mark.parametrize('change, match', [
  (dict(architectures=['T5EncoderModel']), r"\['T5EncoderModel'\].*CLIPTextModel"),
  (dict(architectures=None), 'None.*CLIPTextModel'),
  (dict(hidden_act='relu'), "hidden_act='relu'.*quick_gelu"),
  (dict(layer_norm_eps=1e-6), 'layer_norm_eps=1e-06'),
  (dict(hidden_size='768'), "hidden_size='768'"),
  (dict(eos_token_id=[1, 2]), r'eos_token_id=\[1, 2\]'),
])
def test_configs_that_are_refused(change, match):
  with pytest.raises(ValueError, match=match):
    convert.from_config(SAID['sdxl']['config'] | change)


def test_what_transformers_has_not():
  spec = convert.from_config(SAID['sd1']['config'])
  with pytest.raises(ValueError, match='causal'):
    convert.to_config(spec | {'causal': False})
  with pytest.raises(ValueError, match='end=2'):
    convert.to_config(spec | {'end': 2})
  with pytest.raises(ValueError, match="name='dit'"):
    convert.to_config({'name': 'dit'})


# --- the net --------------------------------------------------------------------------------------


def test_gradient_reaches_every_tensor(tmp_path):
  """Text and pooled together depend on every leaf, in each layer by itself."""
  model, params = of_transformers(tmp_path / 'model.safetensors', 'sdxl', skip=1, norm=False)
  rng = np.random.default_rng(0)
  out = run(model, params, golden.tokens())
  weights = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype('f4'), out)

  def total(params):
    out = model.apply({'params': params}, golden.tokens())
    return sum((out[k] * weights[k]).sum() for k in out)

  grads = jax.jit(jax.grad(total))(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    for norm in np.linalg.norm(leaf.reshape(golden.DEPTH if 'blocks' in name else 1, -1), axis=1):
      if name == 'blocks/key/bias':  # adds the same to a query's every score: softmax cancels it
        assert norm < 1e-3
      else:
        assert norm > 1e-2, name


def test_causal():
  """A token changes what is at its place and behind it, nothing before; without an order, all."""
  tokens = jnp.asarray(golden.tokens())
  other = tokens.at[:, 6].set((tokens[:, 6] + 1) % golden.START)
  for causal in (True, False):
    model = network(causal=causal)
    a, b = (run(model, fresh(model), t)['text'] for t in (tokens, other))
    change = np.abs(a - b).max(axis=(0, 2))
    assert change[6:].min() > 1e-5
    assert change[:6].max() == 0 if causal else change[:6].min() > 1e-5


@pytest.mark.parametrize('causal', [True, False])
def test_mask_hides(causal):
  """Tokens that are none change nothing of those that are, and stand as if they were not there."""
  model = network(causal=causal, end=9)
  tokens = jnp.asarray(golden.tokens()).at[:, 5].set(9)
  mask = jnp.arange(golden.LENGTH)[None] < jnp.full((3, 1), 6)
  out = run(model, fresh(model), tokens, mask)
  other = run(model, fresh(model), tokens.at[:, 6:].set(17), mask)
  short = run(model, fresh(model), tokens[:, :6])
  np.testing.assert_array_equal(out['text'][:, :6], other['text'][:, :6])
  np.testing.assert_array_equal(out['pooled'], other['pooled'])
  assert_close(out['text'][:, :6], short['text'], 1e-5)
  assert_close(out['pooled'], short['pooled'], 1e-5)
  if not causal:
    assert differ(run(model, fresh(model), tokens)['text'][:, :6], short['text']) > 1e-4


def test_where_a_text_ends():
  tokens = jnp.array([[8, 3, 5, 5, 9], [5, 9, 9, 0, 0], [1, 2, 3, 4, 6]])
  np.testing.assert_array_equal(text.end_of(tokens, text.LARGEST), [4, 1, 4])
  np.testing.assert_array_equal(text.end_of(tokens, 5), [2, 0, 0])
  np.testing.assert_array_equal(text.end_of(tokens, 9), [4, 1, 0])


def test_remat_and_half_precision():
  """Recomputing changes no gradient; bfloat16 changes rounding, not the dtype of what comes out."""
  tokens = golden.tokens()

  def gradient(model):
    def total(params):
      out = model.apply({'params': params}, tokens)
      return (out['text'] ** 2).sum() + (out['pooled'] ** 3).sum()

    return jax.jit(jax.grad(total))(fresh(network(skip=1)))

  a, b = gradient(network(skip=1)), gradient(network(skip=1, remat='nothing_saveable'))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-4), a, b)
  a, b = (run(network(dtype=d), fresh(network()), tokens) for d in ('float32', 'bfloat16'))
  assert b['text'].dtype == b['pooled'].dtype == jnp.float32
  assert 1e-5 < differ(b['text'], a['text']) < 0.05


def test_learns_from_scratch():
  """The embedded encoder: pooled tells which token stood before the end, of texts not seen."""
  model = network(vocab=16, causal=False, width=32, depth=2, heads=2, hidden=64, end=15)
  head = 0.1 * jax.random.normal(jax.random.key(1), (32, 8))

  def draw(key):
    tokens = jax.random.randint(key, (64, 12), 0, 8)
    lengths = jax.random.randint(jax.random.fold_in(key, 1), (64, 1), 2, 11)
    places = jnp.arange(12)[None]
    label = jnp.take_along_axis(tokens, lengths - 1, axis=1)[:, 0]
    return jnp.where(places == lengths, 15, tokens), places <= lengths, label

  def loss(params, key):
    tokens, mask, label = draw(key)
    logits = model.apply({'params': params[0]}, tokens, mask)['pooled'] @ params[1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return losses.mean(), (logits.argmax(-1) == label).mean()

  adam = optax.adam(2e-3)

  @jax.jit
  def train(params):
    def step(carry, i):
      key = jax.random.fold_in(jax.random.key(2), i)
      grads, right = jax.grad(loss, has_aux=True)(carry[0], key)
      updates, state = adam.update(grads, carry[1])
      return (optax.apply_updates(carry[0], updates), state), right

    return jax.lax.scan(step, (params, adam.init(params)), jnp.arange(100))[1]

  right = train((fresh(model), head))
  assert right[:10].mean() < 0.3 and right[-20:].mean() > 0.95


def test_errors_name_the_value_and_the_remedy():
  with pytest.raises(ValueError, match='width=30.*heads=4'):
    network(width=30)
  with pytest.raises(ValueError, match="activation='relu'.*quick_gelu"):
    network(activation='relu')
  with pytest.raises(ValueError, match='skip=3.*0 to 2'):
    network(skip=3)
  with pytest.raises(ValueError, match='end=64.*vocab=64'):
    network(end=64)
  with pytest.raises(ValueError, match="'SD3'.*SD1/ViT-L"):
    text.clip_text_preset('SD3')
  with pytest.raises(ValueError, match='13 tokens.*length=12'):
    jax.eval_shape(lambda: network().init(jax.random.key(0), jnp.zeros((1, 13), int)))
  nan = run(network(), fresh(network()), jnp.full((1, 3), golden.VOCAB))['text']
  assert np.isnan(nan).all()
