"""DiT with text, positions of any grid, and the published networks' names, sizes and outputs."""

import functools
import json
import pathlib

from golden import dit as golden_dit
from golden import pixart as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffax import sharding
from diffax.build import build, ConfigError
from diffax.convert import dit as convert
from diffax.convert import tensors
from diffax.models import dit
from diffax.models import layers

RECORDED = np.load(pathlib.Path(golden.__file__).with_suffix('.npz'))
DEPTH, BATCH, WIDTH = 2, 4, 48


def network(**fields):
  sizes = dict(patch=2, width=WIDTH, depth=DEPTH, heads=4, text=20)
  return dit.dit(**(sizes | fields))


def examples(space=(8, 12), **cond):
  """x, t, cond of the golden inputs, channels last, and what else is said."""
  x, t, text, mask, size = golden.inputs(space)
  size = np.concatenate([np.full((BATCH, 4), 7.0), size], axis=1)
  told = {'text': jnp.float32(text), 'text_mask': jnp.asarray(mask), 'size': jnp.float32(size)}
  return jnp.float32(np.moveaxis(x, 1, -1)), jnp.float32(t), told | cond


def shapes(model, *args):
  return jax.eval_shape(lambda *args: model.init(jax.random.key(0), *args)['params'], *args)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, *args, **kwargs):
  return model.apply({'params': params}, *args, **kwargs)


def drawn(like):
  """Nothing at zero: kernels that keep variance, the rest of 0.1."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    scale = leaf.shape[-2] ** -0.5 if path[-1].key == 'kernel' else 0.1
    return jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, like)


def carried(model, args, stored, draw, folder):
  """(parameters, their names): drawn by the file's names, written to a file, and read from it."""
  like = shapes(model, *args)
  want = tensors.wanted(like, stored)
  file = folder / 'model.safetensors'
  safetensors.numpy.save_file({k: np.float32(draw(k, v)) for k, v in want.items()}, file)
  return tensors.load(tensors.find(file), like, stored, convert.IGNORED), want


def assert_close(a, b, rtol=1e-5):
  np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def differ(a, b):
  return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()


def every_tensor_matters(model, params, *args):
  """Each layer's part of each parameter has a gradient, but for biases that softmax cancels."""
  def projected(params):
    out = model.apply({'params': params}, *args)
    return jnp.sum(out * jax.random.normal(jax.random.key(5), out.shape))

  gradient = jax.jit(jax.grad(projected))(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    name = sharding.name(path)
    for layer in range(DEPTH) if name.startswith('blocks/') else [...]:
      size = np.linalg.norm(leaf[layer])
      assert (size < 1e-2) if cancels(model, name) else (size > 1e-2), (name, layer, size)


def cancels(model, name):
  """A bias of keys adds to a query's every score the same, but where it is turned by place."""
  return name.endswith('key/bias') and ('cross' in name or model.positions != 'rotary')


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('case', golden.CASES)
def test_pixart_parity(case, tmp_path):
  config, side = golden.CASES[case]
  model, args = build('diffax.models', convert.from_config(config), path='model'), examples(side)
  params, want = carried(model, args, convert.stored(model), golden.draw, tmp_path)
  assert {f'{k} {v}' for k, v in want.items()} == set(RECORDED[f'names_{case}'].tolist())
  out = run(model, params, *args)
  assert_close(np.moveaxis(out, -1, 1), RECORDED[case])
  if case == 'sizes':
    every_tensor_matters(model, params, *args)
    files = tensors.find(tmp_path / 'model.safetensors')
    tensors.save(tmp_path / 'again.safetensors', params, convert.stored(model))
    again = tensors.find(tmp_path / 'again.safetensors')
    assert again.of.keys() == files.of.keys()
    read = safetensors.numpy.load_file
    for (name, a), b in zip(sorted(read(tmp_path / 'model.safetensors').items()),
                            dict(sorted(read(tmp_path / 'again.safetensors').items())).values()):
      np.testing.assert_array_equal(a, b, err_msg=name)


def dit_case():
  """The reference's network without text, and one batch."""
  model = dit.dit(**golden_dit.SIZES, channels=golden_dit.CHANNELS)
  x, t, label = golden_dit.inputs(8)
  return model, (jnp.float32(np.moveaxis(x, 1, -1)), jnp.float32(t), {'label': jnp.asarray(label)})


def test_dit_parity_and_copies(tmp_path):
  """Embeddings that the file has once a block are read, written, and must agree."""
  model, args = dit_case()
  stored = convert.stored(model)
  params, want = carried(model, args, stored, golden_dit.draw, tmp_path)
  assert {f'{k} {v}' for k, v in want.items()} == set(RECORDED['names_dit'].tolist())
  golden_outputs = np.load(pathlib.Path(golden_dit.__file__).with_suffix('.npz'))
  assert_close(np.moveaxis(run(model, params, *args), -1, 1), golden_outputs['side8'])
  tensors.save(tmp_path / 'again.safetensors', params, stored)
  file, again = (
    safetensors.numpy.load_file(tmp_path / f'{name}.safetensors') for name in ('model', 'again')
  )
  assert file.keys() == again.keys()
  for name in file:
    np.testing.assert_array_equal(file[name], again[name], err_msg=name)
  other = 'transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias'
  file[other] = file[other] + 1
  safetensors.numpy.save_file(file, tmp_path / 'other.safetensors')
  with pytest.raises(ConfigError, match=r'blocks\.0\.norm1.*blocks\.2\.norm1.*differ'):
    tensors.load(tensors.find(tmp_path / 'other.safetensors'), shapes(model, *args), stored)


def test_facebook_names(tmp_path):
  """The same tensors under their first names, of which one merges query, key and value."""
  model, args = dit_case()
  params, want = carried(model, args, convert.stored(model), golden_dit.draw, tmp_path)
  there = {k: np.float32(golden_dit.draw(k, v)) for k, v in want.items()}
  file = {'pos_embed': np.zeros((1, 16, 64), np.float32)}
  for kind in ('weight', 'bias'):
    emb = f'transformer_blocks.0.norm1.emb.timestep_embedder.linear_%d.{kind}'
    file[f't_embedder.mlp.0.{kind}'] = there[emb % 1]
    file[f't_embedder.mlp.2.{kind}'] = there[emb % 2]
    file[f'x_embedder.proj.{kind}'] = there[f'pos_embed.proj.{kind}']
    file[f'final_layer.adaLN_modulation.1.{kind}'] = there[f'proj_out_1.{kind}']
    file[f'final_layer.linear.{kind}'] = there[f'proj_out_2.{kind}']
    for i in range(3):
      block = f'transformer_blocks.{i}'
      qkv = [there[f'{block}.attn1.to_{name}.{kind}'] for name in 'qkv']
      file[f'blocks.{i}.attn.qkv.{kind}'] = np.concatenate(qkv)
      file[f'blocks.{i}.attn.proj.{kind}'] = there[f'{block}.attn1.to_out.0.{kind}']
      file[f'blocks.{i}.mlp.fc1.{kind}'] = there[f'{block}.ff.net.0.proj.{kind}']
      file[f'blocks.{i}.mlp.fc2.{kind}'] = there[f'{block}.ff.net.2.{kind}']
      file[f'blocks.{i}.adaLN_modulation.1.{kind}'] = there[f'{block}.norm1.linear.{kind}']
  file['y_embedder.embedding_table.weight'] = there[
    'transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight']
  safetensors.numpy.save_file(file, tmp_path / 'first.safetensors')
  stored = convert.facebook(model)
  first = tensors.find(tmp_path / 'first.safetensors')
  found = tensors.load(first, shapes(model, *args), stored, convert.IGNORED)
  jax.tree.map(np.testing.assert_array_equal, found, params)
  tensors.save(tmp_path / 'again.safetensors', found, stored)
  again = safetensors.numpy.load_file(tmp_path / 'again.safetensors')
  assert again.keys() == file.keys() - {'pos_embed'}
  for name in again:
    np.testing.assert_array_equal(again[name], file[name], err_msg=name)


# --- published sizes ------------------------------------------------------------------------------


def count(want):
  return sum(int(np.prod(shape)) for shape in want.values())


def test_published_counts():
  """Parameters as the reference implementations count them on the same settings."""
  x = jnp.ones((1, 64, 64, 4))
  cond = {'text': jnp.ones((1, 120, 4096)), 'size': jnp.ones((1, 6)), 'label': jnp.ones(1, int)}
  wanted = lambda model, names: tensors.wanted(
    shapes(model, x[:, :32, :32], jnp.ones(1), cond), names(model))
  small = dit.pixart()
  large = dit.pixart(resolution=True, base=64, interpolation=2.0)
  assert count(wanted(small, convert.stored)) == 610_856_096  # PixArt-XL-2-512x512
  assert count(wanted(large, convert.stored)) == 611_349_152  # PixArt-XL-2-1024-MS
  xl = dit.dit(2, 1152, 28, 16, classes=1000, channels=8, base=16)
  first = wanted(xl, convert.facebook)
  assert first['blocks.27.attn.qkv.weight'] == (3456, 1152)
  assert first['x_embedder.proj.weight'] == (1152, 4, 2, 2)
  assert first['y_embedder.embedding_table.weight'] == (1001, 1152)
  assert first['final_layer.linear.weight'] == (32, 1152)
  # DiT-XL/2 at 256 pixels; its table of positions counts as a parameter there
  assert count(first) + 16 * 16 * 1152 == 675_129_632
  assert count(wanted(xl, convert.stored)) == 749_826_464  # with copies


def test_configs():
  """What folders say, and back; older ones say it in more words."""
  released = dict(
    golden.CONFIG, _class_name='Transformer2DModel', _diffusers_version='0.22', sample_size=128,
    interpolation_scale=None, use_additional_conditions=None, double_self_attention=False,
    only_cross_attention=False, num_vector_embeds=None, dropout=0.0, norm_num_groups=32,
    upcast_attention=False, use_linear_projection=False, attention_type='default',
  )
  spec = convert.from_config(released)
  assert spec == dict(
    name='dit', patch=2, width=48, depth=2, heads=4, dropout=0.0, channels=8, base=64,
    modulation='shared', text=20, resolution=True, interpolation=2.0)
  again = convert.to_config(spec)
  assert again['_class_name'] == 'PixArtTransformer2DModel'
  assert convert.from_config(again) == spec
  for key in golden.CONFIG:
    if released[key] is not None:
      assert again[key] == released[key], key
  assert convert.from_config(released | {'sample_size': 64})['resolution'] is False
  assert convert.from_config(golden.PLAIN | {'interpolation_scale': None})['interpolation'] == 1
  xl = dict(
    name='dit', patch=2, width=1152, depth=28, heads=16, dropout=0.0, channels=8, base=16,
    classes=1000)
  written = json.loads(json.dumps(convert.to_config(xl)))
  assert written['sample_size'] == 32 and written['_class_name'] == 'DiTTransformer2DModel'
  assert convert.from_config(written) == xl
  preset = convert.to_config(dict(name='pixart'))
  assert preset['caption_channels'] == 4096 and preset['sample_size'] == 64


@pytest.mark.parametrize('change,said', [
  (dict(norm_type='ada_norm'), "norm_type='ada_norm' is none of"),
  (dict(activation_fn='geglu'), "activation_fn='geglu'.*'gelu-approximate'"),
  (dict(caption_channels=None), 'caption_channels=None'),
  (dict(cross_attention_dim=64), 'cross_attention_dim=64.*48'),
  (dict(qk_norm='rms'), "qk_norm='rms'"),
  (dict(sample_size=33), 'sample_size=33'),
])
def test_configs_that_are_not_ours(change, said):
  with pytest.raises(ValueError, match=said):
    convert.from_config(golden.CONFIG | change)


def test_networks_that_no_file_has():
  for fields in (dict(positions='rotary'), dict(pooled=8), dict(modulation='block'),
                 dict(mlp_ratio=2.0), dict(classes=3)):
    with pytest.raises(ValueError, match='no published network'):
      convert.stored(network(**(dict(modulation='shared') | fields)))
  with pytest.raises(ValueError, match='classes alone'):
    convert.facebook(network(modulation='shared'))
  with pytest.raises(ValueError, match=r'model\.base=0'):
    convert.to_config(dict(name='dit_preset', preset='S/2', classes=10))


# --- text -----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def params():
  return drawn(shapes(network(), *examples()))


def test_masked_text_is_not_there(params):
  """Tokens that the mask leaves out may hold anything; an example without any has no text."""
  x, t, cond = examples()
  plain = run(network(), params, x, t, cond)
  there = cond['text_mask'][..., None]
  other = cond | {'text': jnp.where(there, cond['text'], 100.0)}
  np.testing.assert_array_equal(run(network(), params, x, t, other), plain)
  moved = run(network(), params, x, t, cond | {'text': cond['text'].at[1, 2].add(1.0)})
  assert differ(moved[1], plain[1]) > 1e-4
  np.testing.assert_array_equal(np.delete(moved, 1, 0), np.delete(plain, 1, 0))
  none = cond | {'text_mask': cond['text_mask'].at[2].set(0)}
  silent = params | {'blocks': params['blocks'] | {
    'cross': params['blocks']['cross'] | {'out': {
      'kernel': jnp.zeros((DEPTH, WIDTH, WIDTH)),
      'bias': params['blocks']['cross']['out']['bias']}}}}
  assert_close(run(network(), params, x, t, none)[2], run(network(), silent, x, t, cond)[2])
  whole = {k: v for k, v in cond.items() if k != 'text_mask'}
  ones = cond | {'text_mask': jnp.ones_like(cond['text_mask'])}
  assert_close(run(network(), params, x, t, whole), run(network(), params, x, t, ones), 1e-6)


@pytest.mark.parametrize('modulation', dit.MODULATIONS)
def test_starts_at_identity(modulation):
  """At the start no block adds anything, text or none, whatever lies at the end."""
  model, args = network(modulation=modulation), examples()
  params = jax.jit(lambda: model.init(jax.random.key(0), *args)['params'])()
  np.testing.assert_array_equal(run(model, params, *args), 0)
  live = drawn(params)
  zero = {'blocks': params['blocks']} | (
    {'modulation': params['modulation']} if modulation == 'shared' else {})
  out = run(model, live | zero, *args)
  skipped = run(model, live, *args, per_layer={'keep': jnp.zeros(DEPTH)})
  assert_close(out, skipped, 1e-6)
  assert differ(run(model, live, *args), skipped) > 0.01


def test_flags_and_dropout_with_text(params):
  """Each layer skipped alone; dropout by example, in the branch of the text too."""
  args = examples()
  plain = run(network(), params, *args)
  keep = lambda *flags: run(network(), params, *args, per_layer={'keep': jnp.asarray(flags)})
  assert_close(keep(1.0, 1.0), plain, 1e-6)
  assert differ(keep(0.0, 1.0), plain) > 1e-3 and differ(keep(1.0, 0.0), keep(0.0, 1.0)) > 1e-3
  block = dit.Block(2, 4.0, 0.5, jnp.float32)
  x, c, keys = jnp.zeros((8, 6, 32)), jnp.zeros((8, 32)), jax.random.split(jax.random.key(2), 8)
  told = {'text': jnp.ones((8, 3, 32))}
  zeros = jax.tree.map(jnp.zeros_like, shapes(block, x, c, {}, told))
  zeros['cross']['out']['bias'] += 1
  out, _ = run(block, zeros, x, c, {'keys': keys}, told)
  assert set(np.unique(out).tolist()) == {0.0, 2.0}
  assert abs(np.mean(np.asarray(out) == 0) - 0.5) < 0.07 and differ(out[0], out[1]) > 0.5


# --- positions ------------------------------------------------------------------------------------


def test_rotary_as_recorded():
  turns = layers.rotary(golden.ROTARY, 16)
  x = jnp.float32(np.moveaxis(golden.rotated(), 1, 2))  # [b n k d]
  assert_close(np.moveaxis(layers.rotate(x, turns), 2, 1), RECORDED['rotary'], 1e-6)
  assert layers.rotate(x.astype(jnp.bfloat16), turns).dtype == jnp.bfloat16


def test_rotary_knows_differences_alone():
  """One query and one key at all places: their product is a function of the way between them."""
  shape = (4, 6)
  q, k = np.random.default_rng(1).standard_normal((2, 1, 1, 1, 8)).astype(np.float32)
  turns = layers.rotary(shape, 8)
  q, k = (layers.rotate(jnp.broadcast_to(x, (1, 24, 1, 8)), turns)[0, :, 0] for x in (q, k))
  scores, seen = np.asarray(q @ k.T), {}
  places = np.stack(np.unravel_index(np.arange(24), shape), axis=1)
  for i, a in enumerate(places):
    for j, b in enumerate(places):
      seen.setdefault(tuple(b - a), []).append(scores[i, j])
  assert len(seen) == 7 * 11
  for way, found in seen.items():
    np.testing.assert_allclose(found, found[0], atol=1e-5, err_msg=str(way))
  means = [np.mean(found) for found in seen.values()]
  assert np.std(means) > 0.1 and len(set(np.round(means, 4))) == len(means)
  np.testing.assert_allclose(np.linalg.norm(q, axis=1), np.linalg.norm(q[0]), rtol=1e-6)


def test_coordinates():
  """Stretched, a grid of any shape covers the same; else neighbours are one apart."""
  np.testing.assert_array_equal(
    layers.coordinates((2, 3)), [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])
  found = layers.coordinates((2, 4), base=8, scale=2.0)
  np.testing.assert_allclose(found[:, 0], np.repeat([0.0, 2.0], 4))
  np.testing.assert_allclose(found[:, 1], np.tile([0.0, 1.0, 2.0, 3.0], 2))
  assert layers.sincos_positions((8, 8), 16, base=8).tolist() == layers.sincos_positions(
    (8, 8), 16).tolist()


@pytest.mark.parametrize('positions', dit.POSITIONS)
def test_positions_of_any_grid(positions):
  """One set of parameters for all aspect ratios; a place that moves changes the output."""
  model = network(positions=positions, base=8 if positions == 'learned' else 0, text=0)
  params = drawn(shapes(model, *examples((16, 16))))
  for space in ((4, 16), (16, 4), (6, 10)):
    assert jax.tree.map(jnp.shape, shapes(model, *examples(space))) == jax.tree.map(
      jnp.shape, params)
    x, t, _ = examples(space)
    out = run(model, params, x, t, {})
    assert out.shape == x.shape
  moved = run(model, params, jnp.roll(x, 2, axis=1), t, {})
  assert differ(jnp.roll(moved, -2, axis=1), out) > 1e-3


def test_learned_positions():
  """A smaller grid takes the middle of the table; a larger one is told so."""
  model, args = network(positions='learned', base=8, text=0), examples((4, 12))
  params = drawn(shapes(model, *args))
  table = params['positions']
  assert table.shape == (8, 8, WIDTH)
  out = run(model, params, *args)
  inside = np.zeros((8, 8, 1), bool)
  inside[3:5, 1:7] = True
  noise = np.random.default_rng(1).standard_normal(table.shape)
  for change, least, most in ((~inside, 0, 0), (inside, 1e-3, np.inf)):
    other = params | {'positions': table + jnp.float32(change * noise)}
    assert least <= differ(run(model, other, *args), out) <= most
  with pytest.raises(ValueError, match=r'\(2, 9\) patches.*8 a side.*model\.base'):
    shapes(model, *examples((4, 18)))


# --- the rest -------------------------------------------------------------------------------------


def test_pooled_text_and_bfloat16():
  model = network(pooled=5, positions='rotary', modulation='shared')
  args = examples(pooled=jnp.ones((BATCH, 5)))
  params = drawn(shapes(model, *args))
  every_tensor_matters(model, params, *args)
  plain = run(model, params, *args)
  half = network(pooled=5, positions='rotary', modulation='shared', dtype='bfloat16')
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes(half, *args))} == {jnp.dtype('float32')}
  out = run(half, params, *args)
  assert out.dtype == jnp.float32
  assert 1e-4 < float(jnp.linalg.norm(out - plain) / jnp.linalg.norm(plain)) < 0.05


def test_mesh():
  """Loss and gradient of a network with all of it, split and whole."""
  axes = dict(fsdp=2, sequence=2, tensor=2)
  model = network(positions='rotary', modulation='shared', resolution=True, remat='none')
  args = examples()
  params = drawn(shapes(model, *args))

  def loss(params, *args):
    return jnp.mean(model.apply({'params': params}, *args) ** 2)

  want, gradient = jax.jit(jax.value_and_grad(loss))(params, *args)
  mesh = sharding.make_mesh(axes)
  places = sharding.parameters(params, mesh, sharding.RULES)
  assert 'tensor' in places['blocks']['cross']['query']['kernel'].spec
  split, rows = jax.device_put(params, places), jax.device_put(args, sharding.batch(mesh))
  with sharding.using(mesh):
    found, other = jax.jit(jax.value_and_grad(loss))(split, *rows)
  assert_close(found, want)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(other), jax.tree.leaves(gradient)):
    if not cancels(model, sharding.name(path)):  # 0 but for rounding
      assert_close(a, b, 1e-4)


@pytest.mark.parametrize('fields,said', [
  (dict(positions='fixed'), "positions='fixed' is none of sincos, learned, rotary"),
  (dict(modulation='none'), "modulation='none' is none of block, shared"),
  (dict(positions='learned'), r'model\.base=0.*largest grid'),
  (dict(interpolation=0.0), r'interpolation=0\.0'),
  (dict(resolution=True, width=32), 'width=32 does not divide by 3'),
])
def test_bad_options(fields, said):
  with pytest.raises(ValueError, match=said):
    network(**fields)


def test_rotary_needs_channels():
  with pytest.raises(ValueError, match='width=6 does not divide by 4'):
    shapes(network(width=24, positions='rotary'), *examples())
