"""U-Nets of latent diffusion: parity, names in files, published sizes and configs, conditions."""

import functools
import json
import pathlib

from golden import latent_unet as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffax import sharding
from diffax.build import build
from diffax.convert import latent_unet as convert
from diffax.convert import tensors
from diffax.models import latent_unet

WANT = np.load(pathlib.Path(golden.__file__).with_suffix('.npz'))


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, *args, **kwargs):
  return model.apply({'params': params}, *args, **kwargs)


def shapes(model, x, t, cond):
  start = lambda *args: model.init(jax.random.key(0), *args)['params']
  return jax.eval_shape(start, x, t, cond)


def assert_close(a, b, rtol=1e-6):
  """Closeness relative to the largest value: rounding knows no small values of a large sum."""
  np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def differ(a, b):
  return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()


# --- parity ---------------------------------------------------------------------------------------


@functools.cache
def network(name):
  spec = convert.from_config(golden.MODELS[name]) | dict(remat='none')
  return build('diffax.models', spec, path='model')


@functools.cache
def arguments(name):
  """x, t, cond as the reference was shown them."""
  given = {}
  for k, v in golden.inputs(name).items():
    v = np.moveaxis(v, 1, -1) if v.ndim == 4 else v
    given[k] = jnp.asarray(v, jnp.int32 if k in ('text_mask', 'noise_level') else jnp.float32)
  return given.pop('x'), given.pop('t'), given


@functools.cache
def like(name):
  return shapes(network(name), *arguments(name))


def drawn_file(path, want):
  """A file of the tensors `want`, drawn as the reference drew them."""
  drawn = {k: np.ascontiguousarray(golden.draw(k, v), np.float32) for k, v in want.items()}
  safetensors.numpy.save_file(drawn, path)
  return tensors.find(path)


@pytest.fixture(scope='module')
def read(tmp_path_factory):
  """name -> parameters with the reference's weights, through a file of its names."""
  folder = tmp_path_factory.mktemp('weights')

  @functools.cache
  def params(name):
    want = json.loads(str(WANT[f'{name}_shapes']))
    files = drawn_file(folder / f'{name}.safetensors', want)
    return tensors.load(files, like(name), convert.stored(network(name)), convert.IGNORED)

  return params


@pytest.mark.parametrize('name', golden.MODELS)
def test_parity(name, read):
  """With outputs that each tensor moves; see `golden`."""
  out = run(network(name), read(name), *arguments(name))
  assert_close(np.moveaxis(out, -1, 1), WANT[name], rtol=1e-5)


@pytest.mark.parametrize('name', golden.MODELS)
def test_names_of_diffusers(name):
  want = json.loads(str(WANT[f'{name}_shapes']))
  assert tensors.wanted(like(name), convert.stored(network(name))) == {
    k: tuple(v) for k, v in want.items()
  }


@pytest.mark.parametrize('name', golden.LDM)
def test_names_of_single_files(name):
  """Each parameter by the name that diffusers' converter takes for the one of `stored`."""
  pairs = json.loads(str(WANT[f'{name}_ldm']))
  theirs, ours = convert.stored(network(name)), convert.ldm(network(name))
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(like(name)):
    a, b = (stored(sharding.name(path), leaf.shape) for stored in (theirs, ours))
    assert a._replace(names=b.names) == b
    found |= dict(zip(a.names, b.names, strict=True))
  assert found == pairs
  assert convert.ldm(network(name), '')('conv_in/bias', (16,)).names == ('input_blocks.0.0.bias',)


@pytest.mark.parametrize('name', golden.LDM)
@pytest.mark.parametrize('stored', [convert.stored, convert.ldm])
def test_round_trip(name, stored, read, tmp_path):
  params, stored = read(name), stored(network(name))
  path = tmp_path / 'weights.safetensors'
  tensors.save(path, params, stored)
  again = tensors.load(tensors.find(path), like(name), stored)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_other_networks_of_a_single_file_are_left(read, tmp_path):
  stored = convert.ldm(network('instruct'))
  path = tmp_path / 'all.safetensors'
  tensors.save(path, read('instruct'), stored)
  file = safetensors.numpy.load_file(path)
  others = ('first_stage_model.encoder.conv_in.weight', 'alphas_cumprod', 'model_ema.decay')
  safetensors.numpy.save_file(file | dict.fromkeys(others, np.ones(3, np.float32)), path)
  tensors.load(tensors.find(path), like('instruct'), stored, convert.LDM_IGNORED)
  safetensors.numpy.save_file(file | {'model.diffusion_model.x': np.ones(3, np.float32)}, path)
  with pytest.raises(ValueError, match=r'beside what is known model\.diffusion_model\.x'):
    tensors.load(tensors.find(path), like('instruct'), stored, convert.LDM_IGNORED)


# --- published models -----------------------------------------------------------------------------

CROSS, PLAIN = 'CrossAttn{}Block2D', '{}Block2D'


def released(kinds, **said):
  """A published config.json; kinds: of its levels."""
  return dict(
    _class_name='UNet2DConditionModel', act_fn='silu', center_input_sample=False,
    down_block_types=[k.format('Down') for k in kinds], downsample_padding=1,
    flip_sin_to_cos=True, freq_shift=0, in_channels=4, layers_per_block=2,
    mid_block_scale_factor=1, norm_eps=1e-05, norm_num_groups=32, out_channels=4, sample_size=64,
    up_block_types=[k.format('Up') for k in reversed(kinds)],
  ) | said


LATER = dict(  # keys that later versions of diffusers wrote
  class_embed_type=None, conv_in_kernel=3, conv_out_kernel=3, dual_cross_attention=False,
  mid_block_type='UNetMidBlock2DCrossAttn', num_class_embeds=None, only_cross_attention=False,
  projection_class_embeddings_input_dim=None, resnet_time_scale_shift='default',
  time_cond_proj_dim=None, time_embedding_type='positional', timestep_post_act=None,
  upcast_attention=True, use_linear_projection=True,
)
XL = LATER | dict(
  addition_embed_type='text_time', addition_embed_type_num_heads=64, addition_time_embed_dim=256,
  class_embeddings_concat=False, cross_attention_norm=None, encoder_hid_dim=None,
  encoder_hid_dim_type=None, mid_block_only_cross_attention=None, num_attention_heads=None,
  resnet_out_scale_factor=1.0, resnet_skip_time_act=False, time_embedding_act_fn=None,
  time_embedding_dim=None, upcast_attention=None, sample_size=128,
)
SD1 = released(
  (CROSS, CROSS, CROSS, PLAIN), _diffusers_version='0.6.0', attention_head_dim=8,
  block_out_channels=[320, 640, 1280, 1280], cross_attention_dim=768,
)
SD2 = SD1 | LATER | dict(
  attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, sample_size=96,
)
SDXL = released((PLAIN, CROSS, CROSS), **XL) | dict(
  attention_head_dim=[5, 10, 20], block_out_channels=[320, 640, 1280], cross_attention_dim=2048,
  projection_class_embeddings_input_dim=2816, transformer_layers_per_block=[1, 2, 10],
)
REFINER = released((PLAIN, CROSS, CROSS, PLAIN), **XL) | dict(
  attention_head_dim=[6, 12, 24, 24], block_out_channels=[384, 768, 1536, 1536],
  cross_attention_dim=1280, projection_class_embeddings_input_dim=2560,
  transformer_layers_per_block=4,
)
UPSCALER = released((PLAIN, CROSS, CROSS, CROSS), **LATER) | dict(
  attention_head_dim=8, block_out_channels=[256, 512, 512, 1024], cross_attention_dim=1024,
  in_channels=7, num_class_embeds=1000, only_cross_attention=[True, True, True, False],
  sample_size=128,
)
INPAINT = dict(image=4, mask=True)
PUBLISHED = [  # config, preset, and parameters as diffusers counts them
  (SD1, latent_unet.sd1(), 859_520_964),
  (SD1 | dict(in_channels=9), latent_unet.sd1(**INPAINT), 859_535_364),
  (SD1 | dict(in_channels=8), latent_unet.sd1(image=4), 859_532_484),  # InstructPix2Pix
  (SD2, latent_unet.sd2(), 865_910_724),
  (SD2 | dict(in_channels=9), latent_unet.sd2(**INPAINT), 865_925_124),
  (SD2 | dict(in_channels=5), latent_unet.sd2(image=1), 865_913_604),  # of depth maps
  (SDXL, latent_unet.sdxl(), 2_567_463_684),
  (SDXL | dict(in_channels=9), latent_unet.sdxl(**INPAINT), 2_567_478_084),
  (REFINER, latent_unet.sdxl_refiner(), 2_259_526_660),
  (UPSCALER, latent_unet.sd_upscaler(), 473_398_020),
]
UNSAID = {'sample_size', 'upcast_attention', 'addition_embed_type_num_heads', '_diffusers_version'}


def conditions(design, space, batch=1):
  """All that the design declares, of ones."""
  ones = lambda *shape: jnp.ones((batch, *shape))
  told = dict(
    text=(design.text, ones(3, design.text)),
    pooled=(design.pooled, ones(design.pooled)),
    size=(design.sizes, ones(design.sizes)),
    noise_level=(design.noise_levels, jnp.ones(batch, int)),
    image=(design.image, ones(*space, design.image)),
    mask=(design.mask, ones(*space, 1)),
  )
  return {k: v for k, (declared, v) in told.items() if declared}


@pytest.mark.parametrize('config,model,_', PUBLISHED)
def test_published_configs(config, model, _):
  """A config is a preset; and what is written of it is the same to diffusers."""
  spec = convert.from_config(config)
  assert build('diffax.models', spec, path='model') == model
  made = convert.to_config(spec, side=config['sample_size'])
  assert made['sample_size'] == config['sample_size']
  assert {k: made[k] for k in config if k not in UNSAID} == {
    k: v for k, v in config.items() if k not in UNSAID
  }
  defaults = convert.DEFAULTS | convert.FIXED
  for k in made.keys() - config.keys():
    assert made[k] == defaults[k], k
  assert convert.from_config(json.loads(json.dumps(made))) == spec


@pytest.mark.parametrize('_,model,count', PUBLISHED[::3] + PUBLISHED[1:2] + PUBLISHED[8:9])
def test_published_sizes(_, model, count):
  x = jnp.ones((1, 8, 8, 4))
  tree = shapes(model, x, jnp.ones(1), conditions(model.design, (8, 8)))
  assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == count


def test_a_preset_is_written():
  assert convert.to_config(dict(name='sdxl', **INPAINT), side=128)['in_channels'] == 9
  assert convert.to_config(dict(name='sd1'), channels=16)['out_channels'] == 16


# --- the net --------------------------------------------------------------------------------------

SMALL = dict(
  width=16, multipliers=(1,), blocks=1, attention=(2,), middle=0, heads=2, text=6, pooled=5,
  sizes=2, noise_levels=7, image=3, mask=True, groups=4,
)  # fmt: skip
BATCH, SIDE = 4, 8


def small(**options):
  return latent_unet.latent_unet(**SMALL | options)


def examples():
  of = lambda seed, *shape: np.random.default_rng(seed).standard_normal((BATCH, *shape), np.float32)
  cond = dict(
    text=of(1, 4, 6), text_mask=np.int32(np.arange(4)[None] < np.array([[4], [2], [1], [0]])),
    pooled=of(2, 5), size=100 * of(3, 2), noise_level=np.arange(BATCH, dtype=np.int32),
    image=of(4, SIDE, SIDE, 3), mask=np.float32(of(5, SIDE, SIDE, 1) > 0),
  )  # fmt: skip
  shown = of(6, SIDE, SIDE, 4), np.linspace(0.0, 999.0, BATCH, dtype=np.float32), cond
  return jax.tree.map(jnp.asarray, shown)


def drawn(model):
  """Nothing is at zero: kernels that keep variance, biases of 0.1, norms about 1."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    kind = path[-1].key
    fan = np.prod(leaf.shape[:-1]) if leaf.shape[:2] == (3, 3) else leaf.shape[-2:][0]
    scale = {'kernel': fan**-0.5, 'embedding': 1.0}.get(kind, 0.1)
    return np.float32(scale * rng.standard_normal(leaf.shape) + (kind == 'scale'))

  return jax.tree_util.tree_map_with_path(draw, shapes(model, *examples()))


@pytest.fixture(scope='module')
def params():
  return drawn(small())


@pytest.fixture(scope='module')
def plain(params):
  return run(small(), params, *examples())


def test_every_condition_matters(params, plain):
  """Each changes its own example alone; text that is masked changes none."""
  x, t, cond = examples()
  assert plain.shape == x.shape and plain.dtype == jnp.float32
  for name, value in cond.items():
    other = 1 - value[0] if name in ('mask', 'text_mask') else 6 - value[0]
    changed = np.array(value)
    changed[0] = other
    out = run(small(), params, x, t, cond | {name: jnp.asarray(changed)})
    assert differ(out[0], plain[0]) > 1e-3, name
    assert_close(out[1:], plain[1:], 1e-5)
  hidden = jnp.where(cond['text_mask'][..., None] > 0, cond['text'], 9.0)
  assert_close(run(small(), params, x, t, cond | {'text': hidden}), plain)


def test_dropout_is_keyed_by_example(params, plain):
  """Another key changes its own example alone; without keys nothing is dropped."""
  keys = jax.random.split(jax.random.key(2), BATCH)
  model = small(dropout=0.5)
  out = run(model, params, *examples(), keys=keys)
  assert min(differ(a, b) for a, b in zip(out, plain)) > 0.01
  other = run(model, params, *examples(), keys=keys.at[0].set(keys[1]))
  assert differ(other[0], out[0]) > 0.01
  assert_close(other[1:], out[1:], 1e-5)
  traced = [jax.make_jaxpr(functools.partial(m.apply, {'params': params}))(*examples())
            for m in (model, small())]
  assert str(traced[0]) == str(traced[1])


def test_dropout_differs_between_blocks(params, monkeypatch):
  model, found = small(dropout=0.5, remat='none'), []
  monkeypatch.setattr(latent_unet.layers, 'dropout', lambda x, keys, _: found.append(keys) or x)

  @jax.jit
  def told(keys):
    model.apply({'params': params}, *examples(), keys=keys)
    return jnp.stack([jax.random.key_data(k) for k in found])  # [blocks examples words]

  seen = told(jax.random.split(jax.random.key(2), BATCH))
  assert len(seen) == 4 and len(np.unique(seen.reshape(4 * BATCH, -1), axis=0)) == 4 * BATCH


def test_gradients_reach_every_tensor(params):
  model, args = small(), examples()
  loss = lambda params: jnp.mean((model.apply({'params': params}, *args) - 1) ** 2)
  grads = jax.jit(jax.grad(loss))(params)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(grad).all()
    for g in grad if 'blocks' in sharding.name(path).split('/') else [grad]:  # each layer's
      assert np.abs(g).max() > 1e-5, path


def test_bfloat16(params, plain):
  out = run(small(dtype='bfloat16'), params, *examples())
  assert out.dtype == jnp.float32
  error = float(jnp.linalg.norm(out - plain) / jnp.linalg.norm(plain))
  assert 1e-3 < error < 0.05  # 2^-9 a product; more than rounding would be float32 all the way


def test_starts_at_zero():
  """What is last in a block, a transformer and the network; no other kernel is zero."""
  model = small(blocks=0, attention=(1,))
  tree = jax.jit(model.init)(jax.random.key(0), *examples())['params']
  kernels = {
    sharding.name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if path[-1].key == 'kernel'
  }
  ends = ('block0/conv_out', 'project_out', 'out_conv')
  for path, leaf in kernels.items():
    assert leaf.any() != path.removesuffix('/kernel').endswith(ends), path


def test_any_mesh():
  """The same on eight devices, over which parameters, rows and heads are split."""
  model = small(multipliers=(1, 2), blocks=0, attention=(0, 1), middle=0)
  params = drawn(model)
  mesh = sharding.make_mesh(dict(fsdp=2, sequence=2, tensor=2))
  places = sharding.parameters(params, mesh)
  used = {axis for s in jax.tree.leaves(places) for axis in jax.tree.leaves(tuple(s.spec))}
  assert used == {'fsdp', 'tensor'}
  gate = places['decoder1_attention0']['blocks']['mlp_gate']['kernel']
  assert gate.spec == jax.sharding.PartitionSpec(None, 'fsdp', 'tensor')
  split = jax.tree.map(jax.device_put, params, places)
  args = jax.device_put(examples(), sharding.batch(mesh))
  with sharding.using(mesh):
    out = jax.jit(lambda params, *args: model.apply({'params': params}, *args))(split, *args)
  assert_close(out, run(model, params, *examples()), 1e-5)


def test_middle_without_attention():
  """One block alone, as diffusers' UNetMidBlock2D is; the config says so."""
  tree = shapes(small(), *examples())
  assert {k for k in tree if k.startswith('middle')} == {'middle_block0'}
  spec = dict(name='latent_unet', width=64, multipliers=(1, 2), attention=(0, 1), middle=0)
  config = convert.to_config(spec)
  assert config['mid_block_type'] == 'UNetMidBlock2D'
  assert convert.from_config(config)['middle'] == 0


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'options,message',
  [
    (dict(heads=2, head_width=8), 'heads=2 and model.head_width=8: say one'),
    (dict(heads=3), 'heads=3 does not divide the 16'),
    (dict(heads=8, head_width=5), 'head_width=5 does not divide the 16'),
    (dict(attention=(1, 0)), r'attention=\(1, 0\) has not one for each .*\(1,\)'),
    (dict(text_only=(True, False)), r'text_only=\(True, False\) has not one for each'),
  ],
)
def test_errors_when_built(options, message):
  with pytest.raises(ValueError, match=message):
    small(**options)


@pytest.mark.parametrize(
  'change,message',
  [
    (dict(text=(BATCH, 4, 7)), r"cond\['text'\] is \(4, 4, 7\).*model.text=6"),
    (dict(pooled=None), r"pooled=5 needs cond\['pooled'\]"),
    (dict(size=(BATCH, 6)), r'\(4, 6\); with model.sizes=2'),
    (dict(mask=(BATCH, 4, 4, 1)), r'\(4, 4, 4, 1\).*\(4, 8, 8, 1\)'),
    (dict(label=(BATCH,)), "'label'.*takes text, text_mask, pooled"),
    (dict(x=(BATCH, 8, 4)), r'\(8,\) is not \[h w\]'),
  ],
)
def test_errors_when_called(change, message):
  x, t, cond = examples()
  cond = {k: v for k, v in (cond | change).items() if v is not None and k != 'x'}
  cond = {k: jnp.ones(v) if isinstance(v, tuple) else v for k, v in cond.items()}
  x = jnp.ones(change['x']) if 'x' in change else x
  with pytest.raises(ValueError, match=message):
    shapes(small(), x, t, cond)


def test_sides_that_cannot_be_halved():
  x, t, cond = examples()
  with pytest.raises(ValueError, match=r'\(7, 8\) is not .*divide by 2, halved at 1'):
    shapes(small(multipliers=(1, 2), attention=(0, 1)), x[:, 1:], t, cond)


def test_nothing_by_layer():
  x, t, cond = examples()
  with pytest.raises(ValueError, match='keep.*DiT'):
    small().init(jax.random.key(0), x, t, cond, per_layer={'keep': jnp.ones(3)})


@pytest.mark.parametrize(
  'said,message',
  [
    (dict(class_embed_type='projection'), "class_embed_type='projection'; there is None alone"),
    (dict(encoder_hid_dim=9), 'encoder_hid_dim=9'),
    (dict(some_new_option=1), 'some_new_option=1; there is no such option'),
    (dict(down_block_types=['DownBlock2D'] * 4), 'down_block_types'),
    (dict(down_block_types=['SimpleCrossAttnDownBlock2D'] * 4), 'each of 4 must be one of'),
    (dict(mid_block_type=None), 'mid_block_type=None'),
    (dict(transformer_layers_per_block=[1, 2]), r'transformer_layers_per_block=\[1, 2\]'),
    (dict(transformer_layers_per_block=[[1, 1]] * 4), r'transformer_layers_per_block=\[\[1'),
    (dict(attention_head_dim=[5, 10, 8, 8]), r'attention_head_dim=\[5, 10, 8, 8\]'),
    (dict(layers_per_block=[1, 2, 2, 2]), r'layers_per_block=\[1, 2, 2, 2\]'),
    (dict(addition_embed_type='image'), "addition_embed_type='image'"),
    (dict(in_channels=3), 'in_channels=3 and out_channels=4'),
  ],
)
def test_configs_of_other_networks(said, message):
  with pytest.raises(ValueError, match=message):
    convert.from_config(SD1 | said)


@pytest.mark.parametrize(
  'spec,message',
  [
    (dict(attention=(1, 2), middle=1), "middle=1 is not the last level's 2"),
    (dict(mask=True), 'image=0 would be read as 1'),
    (dict(pooled=9), 'pooled=9 would be read'),
  ],
)
def test_networks_that_diffusers_has_not(spec, message):
  spec = dict(name='latent_unet', multipliers=(1, 2), attention=(1, 1)) | spec
  with pytest.raises(ValueError, match=message):
    convert.to_config(spec)
