"""U-Nets: parity with the reference, published sizes, runs of blocks, conditions and errors."""

import functools
import itertools
import pathlib
import re

from golden import unet as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_diffax

from diffax import train
from diffax.models import attention as attentions
from diffax.models import layers
from diffax.models import unet

WANT = np.load(pathlib.Path(golden.__file__).with_suffix('.npz'))


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, *args, **kwargs):
  return model.apply({'params': params}, *args, **kwargs)


def shapes(model, *args, **kwargs):
  key = jax.random.key(0)
  return jax.eval_shape(lambda *args: model.init(key, *args, **kwargs), *args)['params']


def assert_close(a, b, rtol=1e-6):
  """Closeness relative to the largest value: rounding knows no small values of a large sum."""
  np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def differ(a, b):
  return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()


def paths(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


# --- parity ---------------------------------------------------------------------------------------

OURS = dict(
  ddpm=functools.partial(unet.ddpm, dropout=0.0),
  ncsnpp=functools.partial(unet.ncsnpp, dropout=0.0, progressive_in='skip', progressive_out='skip'),
  adm=functools.partial(unet.unet, head_width=16, classes=10),
)
ATTENTION = dict(ddpm=(8,), ncsnpp=(8,), adm=(8, 4))
RESAMPLED = dict(  # names of what changes sides, down and up
  ddpm=('downsamplers.0.conv', 'upsamplers.0.conv'),
  ncsnpp=('resnet_down', 'resnet_up'),
  adm=('downsamplers.0', 'upsamplers.0'),
)
PARTS = {
  'conv_in': 'conv1', 'conv_out': 'conv2', 'norm_in': 'norm1', 'norm_out': 'norm2',
  'embed': 'time_emb_proj', 'shortcut': 'conv_shortcut',
  'norm': 'group_norm', 'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'out': 'to_out.0',
}  # fmt: skip
WHOLE = {
  'conv_in': 'conv_in', 'decoder0_norm': 'conv_norm_out', 'decoder0_out': 'conv_out',
  'embedding/time_in': 'time_embedding.linear_1', 'embedding/time_out': 'time_embedding.linear_2',
  'embedding/label': 'class_embedding', 'embedding/frequencies': 'time_proj',
}  # fmt: skip


def reference_names(name, path):
  """What diffusers calls the tensors that stand in ours of that path: one each block of its run."""
  module, _, leaf = path.rpartition('/')
  kind = '.bias' if leaf == 'bias' else '.weight'
  if leaf == 'frequencies' or module in WHOLE:
    return [WHOLE[module if module in WHOLE else path] + kind]
  levels = len(golden.MODELS[name]['block_out_channels'])
  block, *inner = module.split('/')
  side, level, rest = re.fullmatch(r'(encoder|decoder|middle)(\d*)_(.+)', block).groups()
  part = '.'.join(['', PARTS[inner[-1]]] if inner else [])
  stage = {
    'encoder': f'down_blocks.{level}.',
    'decoder': f'up_blocks.{levels - 1 - int(level or 0)}.',
    'middle': 'mid_block.',
  }[side]
  if rest in ('input', 'norm', 'out'):
    stage = f'down_blocks.{int(level) - 1}.' if rest == 'input' else stage
    return [stage + ('skip_norm' if rest == 'norm' else 'skip_conv') + kind]
  if rest in ('down', 'up'):
    return [stage + RESAMPLED[name][rest == 'up'] + part + kind]
  first, last = re.fullmatch(r'block(\d+)(?:to(\d+))?', rest).groups()
  blocks = range(int(first), int(last or first) + 1)
  if 'attention' not in inner:
    return [f'{stage}resnets.{i}{part}{kind}' for i in blocks]
  alone = name == 'ncsnpp' and side == 'decoder'  # one for a level, behind the last block
  return [f'{stage}attentions.{0 if alone else i}{part}{kind}' for i in blocks]


def reference_tensor(key, shape, name):
  """A tensor of diffusers as one of ours of that shape."""
  if len(shape) == 1 or 'class_embedding' in key:
    return golden.draw(key, shape)
  if len(shape) == 4:  # h w in out
    return np.moveaxis(golden.draw(key, (shape[3], shape[2], *shape[:2])), (0, 1), (3, 2))
  wide = (1, 1) if 'shortcut' in key or 'skip_conv' in key else ()  # convolutions of one place
  kernel = golden.draw(key, (shape[1], shape[0], *wide)).reshape(shape[::-1]).T
  if key == 'time_embedding.linear_1.weight' and name != 'adm':  # [sin, cos], ours [cos, sin]
    kernel = np.roll(kernel, len(kernel) // 2, axis=0)
  return kernel


def reference_params(name, tree):
  """diffusers' weights in a tree of our shapes, and all names that were read."""
  read = []

  def fill(path, leaf):
    path = jax.tree_util.keystr(path, simple=True, separator='/')
    keys = reference_names(name, path)
    read.extend(keys)
    if 'to' in path.split('/')[0].split('block')[-1]:
      return np.stack([reference_tensor(key, leaf.shape[1:], name) for key in keys])
    return reference_tensor(keys[0], leaf.shape, name)

  params = jax.tree_util.tree_map_with_path(fill, tree)
  return jax.tree.map(np.float32, params), read


@functools.lru_cache
def reference(name):
  """(params, names read, f: params -> (output, gradient of a random projection of it))."""
  config = golden.MODELS[name]
  width, blocks = config['block_out_channels'][0], config['layers_per_block']
  multipliers = [c // width for c in config['block_out_channels']]
  model = OURS[name](width, multipliers, blocks, ATTENTION[name])
  groups = model.design.groups if name == 'ncsnpp' else golden.GROUPS
  model = model.clone(design=model.design._replace(groups=groups))
  x, t = golden.inputs(name)
  cond = {'label': jnp.asarray(golden.LABELS)} if name == 'adm' else {}
  args = jnp.float32(np.moveaxis(x, 1, -1)), jnp.float32(t), cond
  weights = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)

  def project(params):
    out = jnp.moveaxis(model.apply({'params': params}, *args), -1, 1)
    return jnp.sum(out * weights), out

  params, read = reference_params(name, shapes(model, *args))
  return params, read, jax.jit(jax.grad(project, has_aux=True))


@pytest.mark.parametrize('name', golden.MODELS)
def test_parity(name):
  params, read, f = reference(name)
  assert len(set(read)) == len(read)
  assert_close(f(params)[1], WANT[name], rtol=1e-5)


@pytest.mark.parametrize('name', golden.MODELS)
def test_every_tensor_matters(name):
  params, _, f = reference(name)
  grads, out = f(params)
  for path, grad in paths(grads).items():
    stacked = 'to' in path.split('/')[0].split('block')[-1]
    assert np.isfinite(grad).all()
    for g in grad if stacked else [grad]:
      largest = np.abs(g).max()
      if path.endswith('key/bias'):  # adds to a query's every score the same: softmax cancels it
        assert largest < 1e-3
      elif path == 'embedding/frequencies':  # never trained
        assert largest == 0
      else:
        assert largest > 1e-2, (path, largest)
  if name == 'ncsnpp':
    params['embedding']['frequencies'] += 0.01
    assert differ(f(params)[1], out) > 1e-3


@pytest.mark.parametrize('taps', [(1, 1), (1, 3, 3, 1)])
def test_resampling_parity(taps):
  n, x = len(taps), jnp.float32(np.moveaxis(golden.image(), 1, -1))
  want = {k: np.moveaxis(WANT[f'{k}{n}'], 1, -1) for k in ('down', 'up', 'down_conv')}
  assert_close(layers.downsample(x, taps), want['down'])
  assert_close(layers.upsample(x, taps), want['up'])
  kernel = np.moveaxis(golden.draw('Conv2d_0.weight', (6, 4, 3, 3)), (0, 1), (3, 2))
  params = {'encoder_input': {'kernel': kernel, 'bias': golden.draw('Conv2d_0.bias', (6,))}}
  design = unet.unet(8, taps=taps, progressive_in='residual', rescale=True).design

  class Join(unet.nn.Module):
    @unet.nn.compact
    def __call__(self, x, aux):
      return unet.join(design, x, aux, 'encoder_input')

  before = np.random.default_rng(0).standard_normal(want['down_conv'].shape).astype(np.float32)
  out, aux = Join().apply({'params': jax.tree.map(np.float32, params)}, before, x)
  assert_close(out, (before + want['down_conv']) / np.sqrt(2))  # what the next level starts with
  np.testing.assert_array_equal(aux, out)


SIZES = [  # millions; Ho et al. 2020 section 4; EDM, table 7; Dhariwal & Nichol, tables 4 and 11
  (unet.ddpm(), 32, 3, 35.7),
  (unet.ddpmpp(), 32, 3, 55.7),
  (unet.ncsnpp(), 32, 3, 56.4),
  (unet.adm(classes=1000), 64, 3, 295.9),  # EDM's, without a learned variance
  (unet.adm(256, (1, 1, 2, 3, 4), 2, classes=1000), 128, 6, 422),
  (unet.adm(256, (1, 1, 2, 2, 4, 4), 2, classes=1000), 256, 6, 554),
  (unet.adm(256, (0.5, 1, 1, 2, 2, 4, 4), 2, classes=1000), 512, 6, 559),
]


@pytest.mark.parametrize('model,side,channels,millions', SIZES)
def test_published_sizes(model, side, channels, millions):
  cond = {'label': jnp.ones(1, int)} if model.design.classes else {}
  tree = shapes(model.clone(channels=channels), jnp.ones((1, side, side, 3)), jnp.ones(1), cond)
  count = sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6
  assert round(count, 1 if isinstance(millions, float) else None) == millions


# --- the net --------------------------------------------------------------------------------------

BATCH, SIDE, CLASSES = 4, 8, 3
RICH = dict(
  width=8, multipliers=(1, 1), blocks=1, attention=(4,), heads=2, taps=(1, 3, 3, 1), project=True,
  rescale=True, time='fourier', progressive_in='residual', progressive_out='skip',
  classes=CLASSES, text=5, image=2, mask=True,
)  # fmt: skip
SMALL = dict(width=8, multipliers=(1,), blocks=2, attention=(8,))


def examples(**model):
  """x, t, cond of one batch, of what the options declare; labels up to the null label."""
  of = lambda seed, *shape: jax.random.normal(jax.random.key(seed), (BATCH, *shape))
  places = jnp.arange(6)[None]
  cond = {
    'classes': {'label': jnp.arange(BATCH) + CLASSES + 1 - BATCH},
    'text': {'text': of(3, 6, 5), 'text_mask': places < jnp.array([[6], [3], [1], [0]])},
    'image': {'image': of(4, SIDE, SIDE, 2)},
    'mask': {'mask': (of(5, SIDE, SIDE, 1) > 0).astype(jnp.float32)},
  }
  told = {k: v for option, given in cond.items() if model.get(option) for k, v in given.items()}
  return of(1, SIDE, SIDE, 3), jnp.linspace(-1.0, 1.0, BATCH), told


def keys():
  return jax.random.split(jax.random.key(2), BATCH)


def drawn(params):
  """The same tree with nothing at zero: kernels that keep variance, biases of 0.1."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    kind = path[-1].key
    scale = {'kernel': np.prod(leaf.shape[-4:-1]) ** -0.5, 'frequencies': 3.0}.get(kind, 0.3)
    return jnp.asarray(scale * rng.standard_normal(leaf.shape) + (kind == 'scale'), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, params)


@functools.lru_cache
def rich(**fields):
  """(model, params, arguments) of the net that has everything."""
  model = unet.unet(**dict(RICH, **fields))
  args = examples(**RICH)
  return model, drawn(shapes(model, *args)), args


@functools.lru_cache
def plain():
  model, params, args = rich()
  return run(model, params, *args)


def apart(params):
  """Params of runs as those of their blocks one by one."""
  found = {}
  for name, tree in params.items():
    prefix, _, span = name.partition('_block')
    first, to, last = span.partition('to')
    if not to:
      found[name] = tree
    for i, number in enumerate(range(int(first), int(last) + 1) if to else ()):
      found[f'{prefix}_block{number}'] = jax.tree.map(lambda leaf, i=i: leaf[i], tree)
  return found


def test_scan_is_blocks_in_order(monkeypatch):
  """Also of dropout, whose keys count blocks. The scan is a loop, as on an accelerator."""
  monkeypatch.setattr(layers, 'unroll', lambda length: 1)
  model, args = unet.unet(**SMALL, dropout=0.5), examples()
  params = drawn(shapes(model, *args))
  assert {'encoder0_block0to1', 'decoder0_block0to2'} <= params.keys()
  runs, want = unet.runs, run(model, params, *args, keys=keys())
  assert differ(want, run(model, params, *args)) > 0.01

  def one_by_one(prefix, shapes):
    found = [runs(prefix, [shape])[0] for shape in shapes]
    return [one._replace(name=f'{prefix}_block{i}') for i, one in enumerate(found)]

  monkeypatch.setattr(unet, 'runs', one_by_one)
  alone = jax.jit(lambda params: model.apply({'params': params}, *args, keys=keys()))
  assert_close(want, alone(apart(params)), rtol=1e-5)


def test_depth_is_scanned():
  """Four blocks a level are as many operations as three."""
  def operations(blocks):
    model, args = unet.unet(**dict(SMALL, multipliers=(1, 2), blocks=blocks)), examples()
    f = lambda params: model.apply({'params': params}, *args)
    return str(jax.make_jaxpr(f)(shapes(model, *args))).count('conv_general_dilated')

  assert operations(4) == operations(3) > 0


def test_conditions():
  """Each condition tells its example and no other; tokens that are masked tell nothing."""
  model, params, args = rich()
  x, t, cond = args
  change = lambda name, value: (x, t, {**cond, name: value})
  for changed in (
    (x.at[1].add(1.0), t, cond),
    (x, t.at[1].add(0.05), cond),
    change('label', cond['label'].at[1].set(0)),
    change('image', cond['image'].at[1].add(1.0)),
    change('mask', cond['mask'].at[1].set(1 - cond['mask'][1])),
    change('text', cond['text'].at[1, 2].set(cond['text'][1, 3])),
    change('text_mask', cond['text_mask'].at[1, 4].set(True)),
  ):
    out = run(model, params, *changed)
    assert differ(out[1], plain()[1]) > 1e-4
    np.testing.assert_array_equal(np.delete(out, 1, 0), np.delete(plain(), 1, 0))
  hidden = jnp.where(cond['text_mask'][..., None], cond['text'], 100.0)
  np.testing.assert_array_equal(run(model, params, *change('text', hidden)), plain())


def test_null_label():
  """The null label is a row of its own after the classes."""
  model, params, (x, t, cond) = rich()
  table = params['embedding']['label']['embedding']
  assert table.shape == (CLASSES + 1, 32) and cond['label'][-1] == CLASSES
  embedding = params['embedding'] | {'label': {'embedding': table.at[CLASSES].add(1.0)}}
  out = run(model, params | {'embedding': embedding}, x, t, cond)
  np.testing.assert_array_equal(out[:-1], plain()[:-1])
  assert differ(out[-1], plain()[-1]) > 1e-3


def test_dropout_is_keyed_by_example():
  model, params, args = rich(dropout=0.5)
  np.testing.assert_array_equal(run(model, params, *args), plain())
  out = run(model, params, *args, keys=keys())
  some = jnp.array([2, 0, 1, 3])  # as many, that no further program is compiled
  moved = jax.tree.map(lambda a: a[some], args)
  assert_close(run(model, params, *moved, keys=keys()[some]), out[some], 1e-5)
  alike = jax.tree.map(lambda a: jnp.repeat(a[:1], BATCH, 0), args)
  same = run(model, params, *alike, keys=keys())
  assert all(differ(a, b) > 0.01 for a, b in itertools.combinations(same, 2))


def test_dropout_differs_between_blocks():
  """Three blocks that add 1 each: under one mask for all no value would have one or two."""
  design = unet.unet(8, dropout=0.5, adaptive=False).design
  x, told = jnp.zeros((BATCH, SIDE, SIDE, 8)), {'embedding': jnp.zeros((BATCH, 32))}

  class Three(unet.nn.Module):
    @unet.nn.compact
    def __call__(self, x, told, keys):
      given = [{'keys': key} for key in keys]
      return unet.through(design, unet.Run('blocks', 3, 8), x, told, given)[0]

  every = jnp.stack([jax.random.split(jax.random.key(i), BATCH) for i in range(3)])
  params = jax.tree.map(jnp.zeros_like, shapes(Three(), x, told, every))
  params['blocks']['norm_out']['bias'] += 10.0  # which silu leaves
  params['blocks']['conv_out']['kernel'] = params['blocks']['conv_out']['kernel'].at[
    :, 1, 1].set(jnp.eye(8)[None])
  out = run(Three(), params, x, told, every)
  shares = [np.isclose(out, 20 * n, atol=0.1).mean() for n in range(4)]
  np.testing.assert_allclose(shares, [0.125, 0.375, 0.375, 0.125], atol=0.05)


@functools.lru_cache
def started():
  """(model, params as they start)."""
  model = unet.unet(32, (1,), 2)
  return model, jax.jit(model.init)(jax.random.key(0), *examples())['params']


def test_starts_at_zero():
  """The output is 0 at the start, and a block of as many channels is the identity."""
  model, params = started()
  np.testing.assert_array_equal(run(model, params, *examples()), 0)
  zero = {path for path, leaf in paths(params).items() if 'kernel' in path and not np.any(leaf)}
  last = ('conv_out/kernel', 'attention/out/kernel', 'decoder0_out/kernel')
  assert zero == {path for path in paths(params) if path.endswith(last)}
  block = unet.Block(model.design, 32, attend=True)
  x, told = jnp.ones((BATCH, 2, 2, 32)).at[:, 0].set(2.0), {'embedding': jnp.ones((BATCH, 128))}
  out, shown = block.apply({'params': params['middle_block0']}, x, told, {})
  np.testing.assert_array_equal(out, x)
  np.testing.assert_array_equal(shown, x)


def test_initial_scales():
  """Weights of a run are Xavier's of one block, each drawn anew: the stack does not enter."""
  kernel = started()[1]['encoder0_block0to1']['conv_in']['kernel']
  assert abs(kernel.std() / np.sqrt(2 / (9 * 64)) - 1) < 0.05
  assert differ(kernel[0], kernel[1]) > 0.1


def test_remat_changes_nothing():
  args = examples()

  def traced(remat):
    model = unet.unet(**dict(SMALL, blocks=1), remat=remat)
    loss = lambda params: jnp.mean(model.apply({'params': params}, *args) ** 2)
    return jax.jit(jax.value_and_grad(loss)).trace(drawn(shapes(model, *args)))

  params = drawn(shapes(unet.unet(**dict(SMALL, blocks=1)), *args))
  kept, remat = traced('dots_saveable'), traced('nothing_saveable')
  assert 'nothing_saveable' in str(remat.jaxpr) and 'nothing_saveable' not in str(kept.jaxpr)
  kept, remat = (f.lower().compile() for f in (kept, remat))
  assert ' while(' not in kept.as_text()  # where a convolution's gradients are slow on a CPU
  (value, grads), (again, again_grads) = kept(params), remat(params)
  assert_close(again, value)
  largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
  jax.tree.map(
    lambda g, h: np.testing.assert_allclose(g, h, rtol=0, atol=1e-5 * largest), grads, again_grads
  )
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_bfloat16():
  model, params, args = rich(dtype='bfloat16')
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes(model, *args))} == {jnp.dtype('float32')}
  out = run(model, params, *args)
  assert out.dtype == jnp.float32
  error = float(jnp.linalg.norm(out - plain()) / jnp.linalg.norm(plain()))
  assert 1e-3 < error < 0.05  # 2^-9 a product; more than rounding would be float32 all the way


@pytest.mark.parametrize('space', [(8,), (2, 4, 4)])
def test_space_axes(space):
  """In any number of axes; and every place of the input reaches every place of the output."""
  model = unet.unet(8, (1, 2), 1, (max(space),))
  x, t = jax.random.normal(jax.random.key(1), (2, *space, 3)), jnp.linspace(0.0, 9.0, 2)
  params = drawn(shapes(model, x, t, {}))
  out = run(model, params, x, t, {})
  assert out.shape == x.shape and out.dtype == jnp.float32
  corner = x.at[(slice(None), *[0] * len(space))].add(1.0)
  assert np.abs(run(model, params, corner, t, {}) - out).min(axis=(0, -1)).min() > 0


def test_other_channels():
  """`channels` is of the output; without attention in the middle there are none of its weights."""
  model = unet.unet(**dict(SMALL, attention=()), middle_attention=False).clone(channels=6)
  tree = shapes(model, *examples())
  assert tree['decoder0_out']['kernel'].shape == (3, 3, 8, 6)
  assert not any('attention' in path for path in paths(tree))


def test_trains_through_the_config():
  """On two devices, over which its parameters are split."""
  overrides = (
    'model.name=unet', 'model.width=16', 'model.multipliers=(1,)', 'model.blocks=1',
    'model.attention=(8,)', 'mesh.fsdp=2',
  )  # fmt: skip
  made = run_diffax.setup(*overrides, count=2)
  state, step, batches = train.init(made), train.compile_step(made), train.batches(made, 0)
  losses = []
  for batch in itertools.islice(batches, 20):
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
  batches.close()
  assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
  assert any('fsdp' in str(leaf.sharding.spec) for leaf in jax.tree.leaves(state.params['net']))


# --- parts ----------------------------------------------------------------------------------------


def test_group_norm():
  """Against the mean and variance of each group in float64, plain and adaptive."""
  rng = np.random.default_rng(0)
  x = 3 + 2 * rng.standard_normal((2, 4, 6, 8)).astype(np.float32)
  scale, shift = rng.standard_normal((2, 2, 8)).astype(np.float32)
  parts = x.astype(float).reshape(2, 24, 4, 2)
  z = (parts - parts.mean((1, 3), keepdims=True)) / parts.std((1, 3), keepdims=True)
  z = z.reshape(x.shape)
  norm = lambda *args: layers.group_norm(jnp.asarray(x), *args, 4, 1e-12)
  assert_close(norm(scale, shift), z * scale[:, None, None] + shift[:, None, None], 1e-5)
  assert_close(norm(scale[0], shift[0]), z * scale[0] + shift[0], 1e-5)
  half = layers.group_norm(jnp.ones((1, 2, 4), jnp.bfloat16), 1.0, 0.0, 2, 1e-5)
  assert half.dtype == jnp.float32 and not half.any()


def test_masked_attention():
  """As if what is masked were not there; where nothing is left, 0."""
  q, k, v = np.random.default_rng(0).standard_normal((3, 3, 5, 2, 4)).astype(np.float32)
  mask = jnp.arange(5)[None] < jnp.array([[3], [5], [0]])
  out = attentions.attention(*map(jnp.asarray, (q, k, v)), mask)
  assert_close(out[:1], attentions.attention(q[:1], k[:1, :3], v[:1, :3]))
  assert_close(out[1], attentions.attention(q, k, v)[1])
  np.testing.assert_array_equal(out[2], 0)


def test_time_embeddings():
  t = np.array([0.0, 0.25, 700.0])
  wave = t[:, None] * 10_000.0 ** -(np.arange(4) / 3)  # from 1 to 1 / 10,000 itself
  want = np.concatenate([np.cos(wave), np.sin(wave)], -1)
  np.testing.assert_allclose(layers.sinusoids(jnp.float32(t), 8, endpoint=True), want, atol=1e-4)
  frequencies = np.array([0.5, -3.0, 40.25])
  wave = 2 * np.pi * t[:, None] * frequencies
  want = np.concatenate([np.cos(wave), np.sin(wave)], -1)
  out = layers.fourier(jnp.float32(t), jnp.float32(frequencies))
  np.testing.assert_allclose(out, want, atol=2e-6)  # however many turns


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'options,message',
  [
    (dict(decoder_attention='none'), "decoder_attention='none' is none of all, last"),
    (dict(time='learned'), "time='learned' is none of sinusoidal, fourier"),
    (dict(resample='pool'), "resample='pool' is none of block, conv"),
    (dict(progressive_in='sum'), "progressive_in='sum' is none of none, skip, residual"),
    (dict(taps=(1, 2, 1)), r'taps=\(1, 2, 1\).*even'),
    (dict(taps=(1, 3)), r'taps=\(1, 3\).*symmetric'),
    (dict(heads=2, head_width=4), 'heads=2 and model.head_width=4'),
    (dict(resample='conv', project=True), 'project=True'),
  ],
)
def test_errors_when_built(options, message):
  with pytest.raises(ValueError, match=message):
    unet.unet(8, **options)


@pytest.mark.parametrize(
  'options,space,cond,message',
  [
    (dict(), (8, 6), {}, r'\(8, 6\) does not divide by 4'),
    (dict(attention=(16,)), (8, 8), {}, r'attention=\(16,\).*\[8, 4, 2\]'),
    (dict(width=10), (8, 8), {}, '30 channels do not divide into 7 groups'),
    (dict(heads=3), (8, 8), {}, 'heads=3 does not divide the 16'),
    (dict(head_width=5), (8, 8), {}, 'head_width=5 does not divide the 16'),
    (dict(classes=3), (8, 8), {}, r"classes=3 needs cond\['label'\]"),
    (dict(image=2), (8, 8), {}, r"image=2 needs cond\['image'\]"),
    (dict(image=2), (8, 8), {'image': (2, 8, 8, 3)}, r'\(2, 8, 8, 3\).*image=2.*\(2, 8, 8, 2\)'),
    (dict(mask=True), (8, 8), {'mask': (2, 4, 4, 1)}, r'\(2, 4, 4, 1\).*must be \(2, 8, 8, 1\)'),
    (dict(text=5), (8, 8), {'text': (2, 7, 4)}, r'\(2, 7, 4\).*text=5'),
    (dict(), (8, 8), {'image': (2, 8, 8, 2)}, r"cond\['image'\] is given, but model.image=0"),
    (dict(), (8, 8), {'pooled': (2, 8)}, "'pooled'.*takes label, text"),
  ],
)
def test_errors_when_called(options, space, cond, message):
  model = unet.unet(**dict(dict(width=8, multipliers=(1, 2, 2), blocks=1), **options))
  cond = {name: jnp.ones(shape) for name, shape in cond.items()}
  with pytest.raises(ValueError, match=message):
    shapes(model, jnp.ones((2, *space, 3)), jnp.ones(2), cond)


def test_nothing_by_layer():
  with pytest.raises(ValueError, match='keep.*DiT'):
    shapes(unet.unet(8), *examples(), per_layer={'keep': jnp.ones(3)})
