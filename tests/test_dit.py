"""DiT: parity with the reference, what every layer is given, and the parts it shares."""

import functools
import itertools
import pathlib

import flax.linen as nn
from golden import dit as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.models import dit
from diffax.models import attention as attentions
from diffax.models import layers

DEPTH, BATCH, CLASSES = 2, 8, 10
SPACE, CHANNELS = (4, 6), 3


def network(**fields):
  return dit.dit(**dict(dict(patch=2, width=32, depth=DEPTH, heads=2, classes=CLASSES), **fields))


def examples(space=SPACE):
  """x, t, cond of one batch; labels from 0 to the null label."""
  x = jax.random.normal(jax.random.key(1), (BATCH, *space, CHANNELS))
  return x, jnp.linspace(0.0, 999.0, BATCH), {'label': jnp.arange(BATCH) + CLASSES + 1 - BATCH}


def keys():
  return jax.random.split(jax.random.key(2), BATCH)


@functools.partial(jax.jit, static_argnums=0)
def start(model, *args):
  return model.init(jax.random.key(0), *args)['params']


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, *args, **kwargs):
  return model.apply({'params': params}, *args, **kwargs)


def shapes(model, *args):
  return jax.eval_shape(lambda *args: start(model, *args), *args)


def drawn(params):
  """The same tree with nothing at zero: kernels that keep variance, biases of 0.1."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    kind = path[-1].key
    scale = leaf.shape[-2] ** -0.5 if kind == 'kernel' else {'bias': 0.1, 'embedding': 1.0}[kind]
    return jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, params)


@pytest.fixture(scope='module')
def params():
  return drawn(shapes(network(), *examples()))


@pytest.fixture(scope='module')
def plain(params):
  return run(network(), params, *examples())


def assert_close(a, b, rtol=1e-6):
  """Closeness relative to the largest value: rounding knows no small values of a large sum."""
  np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def differ(a, b):
  return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()


# --- parity ---------------------------------------------------------------------------------------


def reference_params(channels, width, depth, patch, classes, **_):
  """The reference's weights, by its names and shapes, in our tree."""

  def dense(name, *shape):
    kernel, bias = golden.draw(f'{name}.weight', shape), golden.draw(f'{name}.bias', shape[:1])
    return {'kernel': kernel.T, 'bias': bias}

  def block(i):
    name, hidden = f'transformer_blocks.{i}', 4 * width
    return {
      'modulation': dense(f'{name}.norm1.linear', 6 * width, width),
      'query': dense(f'{name}.attn1.to_q', width, width),
      'key': dense(f'{name}.attn1.to_k', width, width),
      'value': dense(f'{name}.attn1.to_v', width, width),
      'out': dense(f'{name}.attn1.to_out.0', width, width),
      'mlp_in': dense(f'{name}.ff.net.0.proj', hidden, width),
      'mlp_out': dense(f'{name}.ff.net.2', width, hidden),
    }

  emb = 'transformer_blocks.0.norm1.emb'
  conv = golden.draw('pos_embed.proj.weight', (width, channels, patch, patch))
  labels = golden.draw(f'{emb}.class_embedder.embedding_table.weight', (classes + 1, width))
  tree = {
    'patch_in': {
      'kernel': conv.transpose(2, 3, 1, 0).reshape(-1, width),
      'bias': golden.draw('pos_embed.proj.bias', (width,)),
    },
    'time_in': dense(f'{emb}.timestep_embedder.linear_1', width, 256),
    'time_out': dense(f'{emb}.timestep_embedder.linear_2', width, width),
    'label': {'embedding': labels},
    'blocks': jax.tree.map(lambda *leaves: np.stack(leaves), *map(block, range(depth))),
    'modulation': dense('proj_out_1', 2 * width, width),
    'patch_out': dense('proj_out_2', patch**2 * channels, width),
  }
  return jax.tree.map(np.float32, tree)


@pytest.mark.parametrize('side', golden.SIDES)
def test_parity(side):
  model = dit.dit(**golden.SIZES)
  x, t, label = golden.inputs(side)
  args = jnp.float32(x.transpose(0, 2, 3, 1)), jnp.float32(t), {'label': jnp.asarray(label)}
  params = reference_params(golden.CHANNELS, **golden.SIZES)
  fresh = shapes(model, *args)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
  want = np.load(pathlib.Path(golden.__file__).with_suffix('.npz'))[f'side{side}']
  out = run(model, params, *args)
  assert_close(np.moveaxis(out, -1, 1), want, rtol=1e-5)


@pytest.mark.parametrize(
  'size,paper',
  [  # at patch 8, 4, 2: millions, Peebles & Xie 2023, table 4
    ('S', (33, 33, 33)),
    ('B', (131, 130, 130)),
    ('L', (459, 458, 458)),
    ('XL', (676, 675, 675)),
  ],
)
def test_preset_sizes(size, paper):
  width, _, _ = dit.PRESETS[size]
  for patch, millions in zip((8, 4, 2), paper):
    model = dit.dit_preset(f'{size}/{patch}', classes=1000)
    params = shapes(model, jnp.ones((1, 32, 32, 4)), jnp.ones(1), {'label': jnp.ones(1, int)})
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    variance = (width + 1) * patch**2 * 4  # the paper's net also says one
    assert round((count + variance) / 1e6) == millions


# --- the net --------------------------------------------------------------------------------------


def test_every_tensor_matters(params, plain):
  flat, tree = jax.tree_util.tree_flatten_with_path(params)
  for i, (path, leaf) in enumerate(flat):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    for layer in range(DEPTH) if name.startswith('blocks/') else [...]:
      leaves = [np.array(leaf) for _, leaf in flat]
      leaves[i][layer] += 0.1 * np.random.default_rng(i).standard_normal(leaf[layer].shape)
      change = differ(run(network(), jax.tree.unflatten(tree, leaves), *examples()), plain)
      if name == 'blocks/key/bias':  # adds to a query's every score the same, which softmax cancels
        assert change < 1e-5
      else:
        assert change > 1e-3, (name, layer, change)


@functools.partial(jax.jit, static_argnames='blocks')
def by_hand(params, x, t, cond, keep=1.0, blocks=DEPTH):
  """The net with its blocks applied one by one, and the rest of it written out."""
  model = network()

  def dense(name, x):
    return x @ params[name]['kernel'] + params[name]['bias'].reshape((1,) * (x.ndim - 1) + (-1,))

  space = x.shape[1:-1]
  positions = layers.sincos_positions([side // 2 for side in space], model.width)
  x = dense('patch_in', layers.patchify(x, 2)) + positions[None]
  c = dense('time_out', jax.nn.silu(dense('time_in', layers.sinusoids(t, 256))))
  c += params['label']['embedding'][cond['label']]
  block = dit.Block(model.heads, model.mlp_ratio, 0.0, model.dtype)
  for i in range(blocks):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], params['blocks'])
    x, _ = block.apply({'params': layer}, x, c, {'keep': jnp.asarray(keep)})
  shift, scale = jnp.split(dense('modulation', jax.nn.silu(c)), 2, axis=-1)
  x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
  return layers.unpatchify(dense('patch_out', dit.modulate(x, shift, scale)), space, 2)


def test_scan_is_blocks_in_order(params, plain):
  assert_close(plain, by_hand(params, *examples()), rtol=1e-5)
  assert differ(plain, by_hand(params, *examples(), blocks=DEPTH - 1)) > 0.01


def test_starts_at_identity():
  """adaLN-Zero: the output is 0 at the start, and so is what each block adds."""
  model, args = network(), examples()
  params = start(model, *args)
  np.testing.assert_array_equal(run(model, params, *args), 0)
  live = drawn(params) | {'blocks': params['blocks']}
  assert_close(run(model, live, *args), by_hand(live, *args, blocks=0), rtol=1e-5)


def test_initial_scales():
  """Weights of the blocks are Xavier's for one layer, each drawn anew: the stack does not enter."""
  params = start(network(width=64), *examples())
  for name, (into, out) in {'query': (64, 64), 'mlp_in': (64, 256), 'mlp_out': (256, 64)}.items():
    kernel = params['blocks'][name]['kernel']
    assert abs(kernel.std() / np.sqrt(2 / (into + out)) - 1) < 0.05
    assert differ(kernel[0], kernel[1]) > 0.1


@pytest.mark.parametrize('space', [(8,), (4, 6), (4, 2, 4)])
def test_space_axes(space):
  """In any number of axes; and every place of the input reaches every place of the output."""
  model, args = network(width=48), examples(space)
  params = drawn(shapes(model, *args))
  out = run(model, params, *args)
  assert out.shape == args[0].shape and out.dtype == jnp.float32
  corner = args[0].at[(slice(None), *[0] * len(space))].add(1.0)
  assert np.abs(run(model, params, corner, *args[1:]) - out).min(axis=(0, -1)).min() > 0


def test_examples_are_apart(params, plain):
  """An example's output knows its own x, t and label, and no other's."""
  x, t, cond = examples()
  for change in (
    (x.at[0].add(1.0), t, cond),
    (x, t.at[0].add(50.0), cond),
    (x, t, {'label': cond['label'].at[0].set(0)}),
  ):
    out = run(network(), params, *change)
    assert differ(out[0], plain[0]) > 1e-3
    np.testing.assert_array_equal(out[1:], plain[1:])


def test_noise_level():
  """An example is told by which step the picture beside it was noised."""
  model, (x, t, cond) = network(noise_levels=1000), examples()
  told = lambda levels: (x, t, {**cond, 'noise_level': levels})
  none = jnp.zeros(BATCH, jnp.int32)
  params = drawn(shapes(model, *told(none)))
  plain, out = (run(model, params, *told(levels)) for levels in (none, none.at[0].set(20)))
  assert differ(out[0], plain[0]) > 1e-3
  np.testing.assert_array_equal(out[1:], plain[1:])


def test_null_label(params):
  """The null label is a row of its own after the classes; without classes no label is asked for."""
  x, t, _ = examples()
  assert params['label']['embedding'].shape == (CLASSES + 1, 32)
  labels = lambda n: {'label': jnp.full(BATCH, n)}
  changed = params | {'label': {'embedding': params['label']['embedding'].at[CLASSES].add(1.0)}}
  other = run(network(), changed, x, t, labels(0))
  np.testing.assert_array_equal(other, run(network(), params, x, t, labels(0)))
  null = run(network(), params, x, t, labels(CLASSES))
  assert differ(run(network(), changed, x, t, labels(CLASSES)), null) > 1e-3
  free = network(classes=0)
  assert 'label' not in shapes(free, x, t, {})


def test_remat_changes_nothing(params):
  x, t, cond = examples()

  def compiled(remat):
    model = network(remat=remat)

    def loss(params):
      return jnp.mean(model.apply({'params': params}, x, t, cond) ** 2)

    return jax.jit(jax.value_and_grad(loss)).trace(params)

  plain, remat = compiled('dots_saveable'), compiled('nothing_saveable')
  assert 'nothing_saveable' in str(remat.jaxpr) and 'nothing_saveable' not in str(plain.jaxpr)
  (value, grads), (again, again_grads) = (f.lower().compile()(params) for f in (plain, remat))
  assert_close(again, value)
  for leaf in (grads, again_grads):
    assert np.abs(leaf['blocks']['key'].pop('bias')).max() < 1e-6  # 0 but for rounding
  jax.tree.map(lambda g, h: assert_close(h, g, 1e-5), grads, again_grads)


def test_bfloat16(params, plain):
  model = network(dtype='bfloat16')
  fresh = shapes(model, *examples())
  assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype('float32')}
  out = run(model, params, *examples())
  assert out.dtype == jnp.float32
  error = float(jnp.linalg.norm(out - plain) / jnp.linalg.norm(plain))
  assert 1e-4 < error < 0.03  # 2^-9 a product; more than rounding would be float32 all the way


# --- what each layer is given ---------------------------------------------------------------------


def test_keep_and_add(params, plain):
  args = examples()
  ones = jnp.ones(DEPTH)
  given = lambda **per_layer: run(network(), params, *args, per_layer=per_layer)
  assert_close(given(keep=0 * ones), by_hand(params, *args, blocks=0), 1e-5)
  assert_close(given(keep=ones.at[-1].set(0)), by_hand(params, *args, blocks=DEPTH - 1), 1e-5)
  assert_close(given(keep=0.5 * ones), by_hand(params, *args, keep=0.5), 1e-5)
  add = jnp.zeros((DEPTH, BATCH, 2 * 3, 32))
  signal = jax.random.normal(jax.random.key(3), (32,))
  assert_close(given(add=add), plain)
  for layer in range(DEPTH):
    out = given(add=add.at[layer, 2, 1].set(signal))
    assert differ(out[2], plain[2]) > 1e-3
    np.testing.assert_allclose(np.delete(out, 2, 0), np.delete(plain, 2, 0), atol=1e-5)


def test_attend(params, plain):
  """Without attention each token is alone: what one patch holds changes no other patch."""
  x, *rest = examples()
  attend = jnp.ones((DEPTH, BATCH)).at[:, 3].set(0)
  told = lambda x, attend: run(network(), params, x, *rest, per_layer={'attend': attend})
  assert_close(told(x, jnp.ones(DEPTH)), plain)
  out, moved = (told(x, attend) for x in (x, x.at[:, 0, 0].add(1.)))
  np.testing.assert_allclose(np.delete(out, 3, 0), np.delete(plain, 3, 0), atol=1e-5)
  apart = np.abs(np.asarray(moved - out)).max(-1)
  patch = apart[3, 0, 0]
  assert patch > 1e-3 and apart[3, -1, -1] < 1e-6 < apart[2, -1, -1]


def test_keep_an_example(params, plain):
  args = examples()
  keep = jnp.ones((DEPTH, BATCH)).at[:, 3].set(0)
  out = run(network(), params, *args, per_layer={'keep': keep})
  want = plain.at[3].set(by_hand(params, *args, blocks=0)[3])
  assert_close(out, want, 1e-5)


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_is_keyed_by_example(params, plain):
  model = network(dropout=0.5)
  x, t, cond = examples()
  out = run(model, params, x, t, cond, keys=keys())
  some = jnp.array([6, 1, 3, 7])
  few = run(model, params, x[some], t[some], {'label': cond['label'][some]}, keys=keys()[some])
  assert_close(few, out[some], 1e-5)
  assert differ(out, plain) > 0.01
  alike = jax.tree.map(lambda a: jnp.repeat(a[:1], BATCH, 0), (x, t, cond))
  same = run(model, params, *alike, keys=keys())
  assert all(differ(a, b) > 0.01 for a, b in itertools.combinations(same, 2))


def test_no_dropout_without_keys(params, plain):
  np.testing.assert_array_equal(run(network(dropout=0.5), params, *examples()), plain)
  np.testing.assert_array_equal(run(network(), params, *examples(), keys=keys()), plain)


def test_dropout_rate():
  x = jnp.ones((BATCH, 100, 50))
  out = layers.dropout(x, keys(), 0.2)
  share = np.asarray(out == 0).mean(axis=(1, 2))
  np.testing.assert_allclose(share, 0.2, atol=5 * np.sqrt(0.2 * 0.8 / 5000))
  np.testing.assert_allclose(out[out != 0], 1 / 0.8, rtol=1e-6)
  assert layers.dropout(x, None, 0.2) is x
  assert layers.dropout(x.astype(jnp.bfloat16), keys(), 0.2).dtype == jnp.bfloat16


def test_dropout_differs_between_layers(params):
  """Layers with equal parameters, of which one alone is kept: what differs is their dropout."""
  first = lambda p: jnp.broadcast_to(p[:1], p.shape)
  alike = params | {'blocks': jax.tree.map(first, params['blocks'])}
  only = lambda layer: {'keep': jnp.zeros(DEPTH).at[layer].set(1.0)}
  for given in ({}, {'keys': keys()}):
    outs = [
      run(network(dropout=0.5), alike, *examples(), per_layer=only(i), **given)
      for i in range(DEPTH)
    ]
    for a, b in itertools.combinations(outs, 2):
      assert differ(a, b) > 0.01 if given else differ(a, b) < 1e-5


def test_dropout_differs_between_branches():
  """A block whose branches add 1 each: under one mask for both no value would have one alone."""
  block = dit.Block(2, 4.0, 0.5, jnp.float32)
  x, c = jnp.zeros((BATCH, 6, 32)), jnp.zeros((BATCH, 32))
  params = jax.tree.map(jnp.zeros_like, shapes(block, x, c, {}))
  for name in ('modulation', 'out', 'mlp_out'):
    params[name]['bias'] += 1
  out, _ = run(block, params, x, c, {'keys': keys()})
  shares = [np.isclose(out, value).mean() for value in (0, 2, 4)]
  np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.07)


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'space,patch', [((6,), 3), ((4, 6), 2), ((2, 4, 6), 2), ((4, 4), 4), ((2, 3), 1)]
)
def test_patches(space, patch):
  x = np.random.default_rng(0).standard_normal((2, *space, 3)).astype(np.float32)
  tokens = layers.patchify(x, patch)
  places = [range(side // patch) for side in space]
  for n, place in enumerate(itertools.product(*places)):
    for inner in itertools.product(*[range(patch)] * len(space)):
      at = tuple(patch * i + j for i, j in zip(place, inner))
      column = int(np.ravel_multi_index(inner, [patch] * len(space))) * 3
      np.testing.assert_array_equal(tokens[:, n, column : column + 3], x[(slice(None), *at)])
  assert tokens.shape == (2, np.prod([len(p) for p in places]), patch ** len(space) * 3)
  np.testing.assert_array_equal(layers.unpatchify(tokens, space, patch), x)


def test_sincos_positions():
  """By place and channel; the last axis has the first channels, as in the reference."""
  width, shape = 16, (3, 5)
  table = layers.sincos_positions(shape, width).reshape(*shape, width)
  for h, w, i in itertools.product(range(3), range(5), range(4)):
    rate = 10_000.0 ** (-i / 4)
    want = [np.sin(w * rate), np.cos(w * rate), np.sin(h * rate), np.cos(h * rate)]
    np.testing.assert_allclose(table[h, w, i::4], want, atol=1e-6)
  assert layers.sincos_positions((2, 2, 2), 12).shape == (8, 12)


def test_dense():
  """Linen's, to the bit; in bfloat16 the bias's gradient is summed in float32."""
  x = jax.random.normal(jax.random.key(0), (4, 256, 8))
  ours = layers.Dense(16, dot_general=layers.flat_dot)
  params = ours.init(jax.random.key(1), x)
  plain = nn.Dense(16)
  jax.tree.map(np.testing.assert_array_equal, params, plain.init(jax.random.key(1), x))
  np.testing.assert_allclose(ours.apply(params, x), plain.apply(params, x), atol=1e-6)
  half = ours.clone(dtype=jnp.bfloat16)
  direction = jax.random.uniform(jax.random.key(2), (4, 256, 16), jnp.bfloat16)
  grad = jax.jit(jax.grad(lambda p: (half.apply(p, x) * direction).sum()))
  exact = direction.astype(float).sum((0, 1))
  found = grad(params)['params']['bias']
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, exact, rtol=1e-5)


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_gelu(platform, x64, monkeypatch):
  """That of Hendrycks & Gimpel 2016, and its derivatives, forwards, backwards and the second."""
  monkeypatch.setattr(layers, 'platform', lambda: platform)
  x = jnp.concatenate([jnp.linspace(-12.0, 12.0, 97), jnp.array([-1e4, 1e4])])
  plain = lambda x: x / 2 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  each = lambda f: jax.vmap(f)(x)
  ours, theirs = layers.gelu, plain
  np.testing.assert_allclose(ours(x), theirs(x), atol=1e-12)
  for _ in range(2):
    ours, theirs = jax.grad(ours), jax.grad(theirs)
    np.testing.assert_allclose(each(ours), each(theirs), atol=1e-12)
  primal, slope = jax.jvp(layers.gelu, (x,), (jnp.ones_like(x),))
  np.testing.assert_allclose(primal, plain(x), atol=1e-12)
  np.testing.assert_allclose(slope, each(jax.grad(plain)), atol=1e-12)
  half = x.astype(jnp.bfloat16)
  primal, slope = jax.jvp(layers.gelu, (half,), (jnp.ones_like(half),))
  assert primal.dtype == slope.dtype == jnp.bfloat16
  exact = half.astype(float)
  np.testing.assert_allclose(slope.astype(float), jax.vmap(jax.grad(plain))(exact), atol=2**-8)
  np.testing.assert_allclose(primal.astype(float), plain(exact), rtol=2**-8, atol=2**-8)


def test_attention():
  """Against the sum written out, with scores too large for a softmax taken as it stands."""
  q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 4, 8)).astype(np.float32)
  q *= 100
  scores = np.einsum('bqkd,bnkd->bkqn', q.astype(float), k) / np.sqrt(8)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  want = np.einsum('bkqn,bnkd->bqkd', weights, v)
  assert_close(attentions.attention(*map(jnp.asarray, (q, k, v))), want, 1e-5)


# --- errors ---------------------------------------------------------------------------------------


def test_errors_say_the_value_and_what_is_allowed():
  with pytest.raises(ValueError, match='width=30 .*heads=4'):
    dit.dit(patch=2, width=30, depth=1, heads=4)
  with pytest.raises(ValueError, match="'XXL/2' is none of S/2, S/4, S/8, B/2.*XL/8"):
    dit.dit_preset('XXL/2')
  with pytest.raises(ValueError, match="'S/3' is none of"):
    dit.dit_preset('S/3')
  with pytest.raises(ValueError, match=r'\(5, 4\).*patches of 2'):
    layers.patchify(jnp.ones((1, 5, 4, 3)), 2)
  with pytest.raises(ValueError, match='width=30 .*by 4'):
    layers.sincos_positions((2, 2), 30)
