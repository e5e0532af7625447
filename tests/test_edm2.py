"""EDM2: magnitudes that stay, weights whose norm is nothing, sizes of the paper, training."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_diffax

from diffax import train
from diffax.models import edm2
from diffax.models import attention as attentions

BATCH, CLASSES = 4, 3
SIZES = dict(width=16, multipliers=(1, 2), blocks=2, attention=(4,), classes=CLASSES, head=8)


def network(**fields):
  return edm2.edm2(**SIZES | fields)


def examples(side=8):
  """x, t, cond of one batch; labels from 0 to the null label."""
  x = jax.random.normal(jax.random.key(1), (BATCH, side, side, 3))
  return x, jnp.linspace(-1.5, 1.0, BATCH), {'label': jnp.arange(BATCH)}


def keys():
  return jax.random.split(jax.random.key(2), BATCH)


@functools.partial(jax.jit, static_argnums=0)
def start(model, *args):
  return model.init(jax.random.key(0), *args)['params']


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, *args, **kwargs):
  return model.apply({'params': params}, *args, **kwargs)


def drawn(params):
  """The same tree with the gains drawn as well, between 0.5 and 1."""
  rng = np.random.default_rng(0)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.asarray(rng.uniform(0.5, 1, leaf.shape), jnp.float32)
    if path[-1].key == 'gain' else leaf, params)


@pytest.fixture(scope='module')
def fresh():
  return start(network(), *examples())


@pytest.fixture(scope='module')
def params(fresh):
  return drawn(fresh)


@pytest.fixture(scope='module')
def plain(params):
  return run(network(), params, *examples())


def magnitude(x, axis=None):
  return np.sqrt(np.mean(np.asarray(x, np.float64)**2, axis=axis))


def assert_close(a, b, rtol=1e-6):
  """Closeness relative to the largest value: rounding knows no small values of a large sum."""
  np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def differ(a, b):
  return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()


def normal(*shape):
  return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


# --- operations -----------------------------------------------------------------------------------


def test_operations_keep_magnitude():
  """Of normal values: of SiLU by quadrature, else to what chance leaves in 10^6 of them."""
  x, weight = np.polynomial.hermite_e.hermegauss(60)
  square = np.sum(weight * np.asarray(edm2.mp_silu(jnp.asarray(x)))**2) / weight.sum()
  assert square**0.5 == pytest.approx(1, abs=1e-3)  # the paper's constant has three digits
  a, b = normal(2, 1000, 1000)
  for t in (0.3, 0.5):
    assert magnitude(edm2.mp_sum(a, b, t)) == pytest.approx(1, abs=2e-3)
    assert magnitude(edm2.mp_cat(a, b[:, :100], t)) == pytest.approx(1, abs=4e-3)
  times = jnp.linspace(-1.5, 1.0, 100)
  assert magnitude(edm2.mp_fourier(times, 4000)) == pytest.approx(1, abs=0.02)
  np.testing.assert_allclose(magnitude(edm2.normalized(7 * a), -1), 1, rtol=1e-6)
  np.testing.assert_allclose(magnitude(edm2.normalized(7 * a, -2), -2), 1, rtol=1e-6)
  assert not edm2.normalized(0 * a).any()


def test_known_answers():
  one = jnp.ones(1)
  np.testing.assert_allclose(edm2.mp_sum(3 * one, 4 * one, 0.5), 7 / 2**0.5, rtol=1e-6)
  np.testing.assert_allclose(edm2.mp_sum(3 * one, 4 * one, 0.0), 3, rtol=1e-6)
  both = edm2.mp_cat(jnp.ones(1), jnp.ones(3))  # of the sum of squares, 4, a half each
  np.testing.assert_allclose(both, [2**0.5] + 3 * [(2 / 3)**0.5], rtol=1e-6)
  both = edm2.mp_cat(jnp.ones(2), jnp.ones(2), 0.25)  # 9 to 1
  np.testing.assert_allclose(both, 2 * [1.8**0.5] + 2 * [0.2**0.5], rtol=1e-6)
  x = jnp.arange(8.0).reshape(1, 2, 4, 1)
  np.testing.assert_array_equal(edm2.resampled(x, 'down')[0, 0, :, 0], [2.5, 4.5])
  np.testing.assert_array_equal(edm2.resampled(x, 'up')[0, 2, :, 0], [4, 4, 5, 5, 6, 6, 7, 7])
  np.testing.assert_array_equal(edm2.resampled(edm2.resampled(x, 'up'), 'down'), x)


def test_features_tell_times_apart():
  """Constants: the same in each call; each feature sees its own frequency."""
  times = jnp.asarray([0.3, 0.31])
  a, b = edm2.mp_fourier(times, 256)
  assert differ(a, b) > 0.01 and np.linalg.matrix_rank(edm2.mp_fourier(
    jnp.linspace(-1, 1, 50), 256), tol=1e-2) > 10
  np.testing.assert_array_equal(edm2.mp_fourier(times, 256), [a, b])


def test_filters():
  """A convolution by its sum, with each filter at norm 1."""
  x = normal(2, 4, 5, 3)
  layer = edm2.Filters(6, 3)
  kernel = np.asarray(5 * normal(27, 6))
  unit = (kernel / np.linalg.norm(kernel, axis=0)).reshape(3, 3, 3, 6)
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  want = sum(padded[:, i : i + 4, j : j + 5] @ unit[i, j] for i in range(3) for j in range(3))
  assert_close(layer.apply({'params': {'kernel': kernel}}, x), want, 1e-5)
  linear = edm2.Filters(6).apply({'params': {'kernel': kernel}}, normal(2, 27))
  assert_close(linear, np.asarray(normal(2, 27)) @ unit.reshape(27, 6), 1e-5)


@pytest.mark.parametrize('side', [1, 3])
def test_gradients_are_orthogonal_to_filters(side):
  x, answer = normal(2, 4, 5, 3), normal(2, 4, 5, 6)
  layer = edm2.Filters(6, side)
  kernel = normal(side**2 * 3, 6)
  grad = jax.grad(lambda k: jnp.sum(layer.apply({'params': {'kernel': k}}, x) * answer))(kernel)
  along = np.sum(grad * kernel, axis=0)
  assert np.abs(along / np.linalg.norm(grad, axis=0) / np.linalg.norm(kernel, axis=0)).max() < 1e-6


def test_cosine_attention(monkeypatch):
  """Scores within the root of the head's channels; the size of x changes nothing."""
  seen, plain_attention = [], attentions.attention

  def spy(q, k, v):
    seen.append((q, k, v))
    return plain_attention(q, k, v)

  monkeypatch.setattr(attentions, 'attention', spy)
  x, block = normal(2, 4, 3, 32), edm2.Attention(16, jnp.float32)
  weights = block.init(jax.random.key(0), x)
  seen.clear()
  out, scaled = (block.apply(weights, c * x) for c in (1, 1000.0))
  assert out.shape == x.shape
  assert_close(scaled, out, 1e-4)
  for q, k, v in seen:
    assert q.shape == (2, 12, 2, 16)
    for part in (q, k, v):
      np.testing.assert_allclose(magnitude(part, -1), 1, rtol=1e-5)
    scores = np.einsum('bqkd,bnkd->bkqn', q, k) / 4
    assert 1 < np.abs(scores).max() <= 4


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('preset, paper', [  # millions, Karras et al. 2024
  ('XS', 124.7), ('S', 280.2), ('M', 497.8), ('L', 777.5), ('XL', 1119.3), ('XXL', 1523.2)])
def test_preset_sizes(preset, paper):
  """On latents 64 x 64 x 4 with 1000 labels; beside the paper's ours has a row for the null label.

  There a network without labels is another one.
  """
  model = edm2.edm2_preset(preset, classes=1000)
  args = jnp.ones((1, 64, 64, 4)), jnp.ones(1), {'label': jnp.ones(1, int)}
  shapes = jax.eval_shape(lambda *args: model.init(jax.random.key(0), *args)['params'], *args)
  labels = shapes['embedding']['label']['kernel'].shape
  assert labels == (1001, 4 * edm2.PRESETS[preset])
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert round((count - labels[1]) / 1e6, 1) == paper


def test_plan():
  """Each output of the encoder is shown to the decoder once, the last first, at its own side."""
  encoder, decoder = network(multipliers=(1, 2, 3), attention=(4, 16)).specs((1, 16, 16, 3))
  assert [s.attend for s in encoder] == [True] * 2 + [False] * 4 + [True] * 2
  assert [s.features for s in encoder] == [16, 16, 16, 32, 32, 32, 48, 48]
  assert [s.skip for s in decoder if s.skip] == [48, 48, 32, 32, 32, 16, 16, 16, 16]
  assert [s.inputs for s in decoder] == [48] * 7 + [32] * 4 + [16] * 2
  attend = [s.attend for s in decoder]
  assert attend == [True, False] + 3 * [True] + 4 * [False] + [False] + 3 * [True]


# --- the network ----------------------------------------------------------------------------------


def test_starts_with_unit_filters_and_nothing(fresh):
  """Filters of unit variance, apart in each block; gains and the output are 0."""
  for name, leaf in run_diffax.flat(fresh).items():
    if name.endswith('gain'):
      assert not leaf.any()
    else:
      np.testing.assert_allclose(magnitude(leaf, -2), 1, rtol=1e-5)
  stack = fresh['encoder_0']['conv_in']['kernel']
  assert stack.shape == (2, 9 * 16, 16) and differ(stack[0], stack[1]) > 0.1
  np.testing.assert_array_equal(run(network(), fresh, *examples()), 0)


def edges(model, params, x, t, cond):
  """What passes between blocks, which are applied one by one, and the output."""
  emb = edm2.Embedding(model.width, model.width * max(model.multipliers), model.classes).apply(
    {'params': params['embedding']}, t, cond)
  first = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
  filters = lambda name, features, x: edm2.Filters(features, 3).apply({'params': params[name]}, x)
  seen = [filters('conv_in', model.width, first)]
  skips = [seen[-1]]
  for side, specs in zip(('encoder', 'decoder'), model.specs(x.shape)):
    for i, spec in enumerate(specs):
      first = max(j for j in range(i + 1) if f'{side}_{j}' in params)
      mine = params[f'{side}_{first}']
      if mine['gain'].ndim:
        mine = jax.tree.map(lambda leaf: leaf[i - first], mine)  # noqa: B023
      layer = {'skip': skips.pop()} if spec.skip else {}
      block = edm2.Block(spec, model.head, 0.0, model.dtype)
      seen.append(block.apply({'params': mine}, seen[-1], emb, layer)[0])
      skips += [seen[-1]] if side == 'encoder' else []
  return emb, seen, params['gain'] * filters('conv_out', x.shape[-1], seen[-1])


def test_scan_is_blocks_in_order(params, plain):
  _, _, out = jax.jit(functools.partial(edges, network()))(
    params, *examples())
  assert_close(plain, out, 1e-4)


def test_magnitudes_stay():
  """At the start, from unit noise in, at every edge.

  A little is lost at borders, beyond which there is 0, and by attention, a mean over places, in the
  decoder's first block.
  """
  model = network(width=32, blocks=1, attention=(), head=16)
  x, t, cond = examples(side=32)
  emb, seen, _ = jax.jit(functools.partial(edges, model))(
    start(model, x, t, cond), x, t, cond)
  found = np.array([magnitude(y) for y in seen])
  assert len(found) == 1 + 3 + 7
  assert 0.9 < magnitude(emb) < 1.1
  assert found.min() > 0.85 and found.max() < 1.03, found


def test_branch_keeps_magnitude():
  """What a block adds is as large as what it adds it to, away from the border."""
  x = edm2.normalized(normal(1, 24, 24, 64))
  block = edm2.Block(edm2.Spec(True, 64, 64), 64, 0.0, jnp.float32)
  init = lambda: block.init_with_output(jax.random.key(0), x, normal(1, 8), {})
  (out, _), _ = jax.jit(init)()
  branch = (0.58**0.5 * out - 0.7 * x) / 0.3
  assert magnitude(branch[:, 2:-2, 2:-2]) == pytest.approx(1, abs=0.06)


def test_norms_of_weights_are_nothing(params, plain):
  rng = np.random.default_rng(1)
  scaled = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf if path[-1].key == 'gain'
    else leaf * rng.uniform(1, 7, (*leaf.shape[:-2], 1, leaf.shape[-1])).astype(np.float32), params)
  assert_close(run(network(), scaled, *examples()), plain, 1e-4)


def projected(model):
  """params -> a random projection of the output."""
  x, t, cond = examples()
  answer = jax.random.normal(jax.random.key(5), x.shape)
  return lambda params: jnp.sum(model.apply({'params': params}, x, t, cond) * answer)


def test_every_tensor_matters(params):
  """Every kernel and every gain, in each block of a stack, has a gradient; none along filters."""
  grads = jax.jit(jax.grad(projected(network())))(params)
  kernels = run_diffax.flat(params)
  for name, leaf in run_diffax.flat(grads).items():
    gain = name.endswith('gain')
    for part in leaf if leaf.ndim > (0 if gain else 2) else [leaf]:
      assert np.linalg.norm(part) > 1e-3, name
    if not gain:
      along = np.abs(np.sum(leaf * kernels[name], -2)).max()
      norms = [np.linalg.norm(a, axis=-2).max() for a in (leaf, kernels[name])]
      assert along < 1e-4 * norms[0] * norms[1], name


@pytest.mark.parametrize('remat, count', [('none', 0), ('nothing_saveable', 11)])
def test_remat(params, remat, count):
  """In each of the runs of equal blocks, of one block or several."""
  assert sum(name.startswith(('encoder', 'decoder')) for name in params) == 11
  program = str(jax.make_jaxpr(jax.grad(projected(network(remat=remat))))(params))
  assert program.count('nothing_saveable') == count


def test_activations_are_clipped():
  spec = edm2.Spec(False, 8, 8)
  block = edm2.Block(spec, 8, 0.0, jnp.float32)
  x, emb = 1e4 * normal(1, 4, 4, 8), normal(1, 8)
  out, _ = block.apply(block.init(jax.random.key(0), x, emb, {}), x, emb, {})
  assert out.max() == 256 and out.min() == -256


def test_examples_are_apart(params, plain):
  """An example's output knows its own x, t and label, and no other's."""
  x, t, cond = examples()
  for change in (
    (x.at[0].add(1.0), t, cond),
    (x, t.at[0].add(0.5), cond),
    (x, t, {'label': cond['label'].at[0].set(2)}),
  ):
    out = run(network(), params, *change)
    assert differ(out[0], plain[0]) > 1e-3
    assert_close(out[1:], plain[1:])


def test_null_label(params, plain):
  """The null label is a row of its own after the classes."""
  kernel = params['embedding']['label']['kernel']
  assert kernel.shape == (CLASSES + 1, 32)
  # Filters run over labels: two rows exchanged are two labels exchanged.
  swapped = params | {'embedding': params['embedding'] | {
    'label': {'kernel': kernel[jnp.asarray([CLASSES, 1, 2, 0])]}}}
  x, t, cond = examples()
  out = run(network(), swapped, x, t, {'label': jnp.asarray([CLASSES, 1, 2, 0])})
  assert_close(out, plain, 1e-5)
  free = network(classes=0)
  shapes = jax.eval_shape(lambda: free.init(jax.random.key(0), x, t, {}))
  assert 'label' not in shapes['params']['embedding']


def test_bfloat16(params, plain):
  out = run(network(dtype='bfloat16'), params, *examples())
  assert out.dtype == jnp.float32
  error = float(jnp.linalg.norm(out - plain) / jnp.linalg.norm(plain))
  assert 1e-3 < error < 0.05  # 2^-9 an operation, of some twenty in a row; float32 would be less
  shapes = jax.eval_shape(lambda: network(dtype='bfloat16').init(jax.random.key(0), *examples()))
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}


def test_number_of_channels(params):
  shapes = lambda model: jax.eval_shape(
    lambda: model.apply({'params': model.init(jax.random.key(0), *examples())['params']},
                        *examples()))
  assert shapes(network().clone(channels=6)).shape == (BATCH, 8, 8, 6)


def test_dropout_is_keyed_by_example(params, plain):
  model = network(dropout=0.5)
  x, t, cond = examples()
  out = run(model, params, x, t, cond, keys=keys())
  some = jnp.array([3, 1, 0, 2])
  moved = run(model, params, x[some], t[some], {'label': cond['label'][some]}, keys=keys()[some])
  assert_close(moved, out[some], 1e-5)
  assert differ(out, plain) > 0.01
  assert_close(run(model, params, x, t, cond), plain)
  alike = jax.tree.map(lambda a: jnp.repeat(a[:1], BATCH, 0), (x, t, cond))
  same = run(model, params, *alike, keys=keys())
  assert all(differ(a, b) > 0.01 for a, b in itertools.combinations(same, 2))


def test_errors_say_the_value_and_what_is_allowed():
  shape = lambda model, *size: jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.ones(size), jnp.ones(1), {'label': jnp.ones(1, int)}))
  with pytest.raises(ValueError, match="'XXXL' is none of XS, S, M, L, XL, XXL"):
    edm2.edm2_preset('XXXL')
  with pytest.raises(ValueError, match='model.blocks: 0 is less than 1'):
    network(blocks=0)
  with pytest.raises(ValueError, match='model.multipliers: 0 is less'):
    network(multipliers=())
  with pytest.raises(ValueError, match=r'\(6, 8\) does not divide by 4'):
    shape(network(multipliers=(1, 2, 2)), 1, 6, 8, 3)
  with pytest.raises(ValueError, match='head=24 does not divide the 32 channels'):
    shape(network(head=24), 1, 8, 8, 3)
  with pytest.raises(ValueError, match=r'\[b h w c\].*\(1, 8, 3\)'):
    shape(network(), 1, 8, 3)
  with pytest.raises(ValueError, match=r"layer by layer.*\['keep'\]"):
    network().init(jax.random.key(0), *examples(), per_layer={'keep': jnp.ones(3)})


# --- training -------------------------------------------------------------------------------------


def test_trains_by_config():
  """On the digits, with the paper's rules: the loss falls, filters stay, every group learns."""
  made = run_diffax.setup(
    'schedule=ve', 'schedule.sigma_max=20.', 'prediction=edm', 'prediction.sigma_data=0.7',
    'loss.time=log_normal', 'loss.time.mean=-0.6', 'loss.time.std=1.2', 'loss.weight=edm',
    'loss.weight.sigma_data=0.7', 'loss.uncertainty=16',
    'model=edm2', 'model.width=16', 'model.multipliers=(1,)', 'model.blocks=1',
    'model.attention=()', 'model.head=16', 'model.dropout=0.1', 'model.classes=10',
    'optimizer=adam', 'optimizer.b2=0.99', 'optimizer.clip=0.', 'optimizer.unit_kernels=kernel$',
    'learning_rate=diffax.optim.inverse_sqrt', 'learning_rate.peak_value=0.02',
    'learning_rate.reference_steps=20', 'learning_rate.warmup_steps=3', 'log_every=1')
  state, step, met = train.init(made), train.compile_step(made), []
  begin = run_diffax.flat(state.params)
  batches = train.batches(made, 0)
  for _ in range(60):
    state, metrics = step(state, next(batches))
    met.append(float(metrics['loss']))
  batches.close()
  assert not state.bad and np.mean(met[-10:]) < 0.6 * np.mean(met[:3]), met
  for name, leaf in run_diffax.flat(state.params).items():
    assert np.abs(leaf - begin[name]).max() > 1e-3, name
    if name.endswith('kernel'):
      np.testing.assert_allclose(magnitude(leaf, -2), 1, rtol=1e-5)
