"""Attention: every program for it gives what the formula says, and each is chosen where it fits."""

import collections
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import sharding
from diffax.build import ConfigError
from diffax.models import attention as attentions
from diffax.models import layers

MESHES = {
  'sequence 4': dict(sequence=4), 'data 2, sequence 2': dict(data=2, sequence=2),
  'fsdp 2, sequence 2, tensor 2': dict(fsdp=2, sequence=2, tensor=2),
}


def inputs(b=2, n=24, m=24, heads=2, d=8, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape).astype('f4')
  return draw(b, n, heads, d), 2 * draw(b, m, heads, d), draw(b, m, heads, d)


def masks(b, m):
  """Some keys missing; of the last example all but one; of the first, where there are more, all."""
  mask = np.random.default_rng(1).uniform(size=(b, m)) < 0.6
  mask[-1] = np.arange(m) == m - 1
  if b > 2:
    mask[0] = False
  return mask


def formula(q, k, v, mask=None, causal=False):
  """Softmax of every query by itself, in float64."""
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  for i, n, head in np.ndindex(q.shape[:3]):
    there = np.ones(k.shape[1], bool) if mask is None else mask[i]
    there = there & (np.arange(k.shape[1]) <= n) if causal else there
    keys, values = k[i, there, head].astype('f8'), v[i, there, head].astype('f8')
    if len(keys):
      scores = keys @ q[i, n, head] / q.shape[-1] ** 0.5
      weights = np.exp(scores - scores.max())
      out[i, n, head] = weights @ values / weights.sum()
  return out


def mesh_of(name):
  axes = MESHES[name]
  return sharding.make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])


def both(q, k, v, mask, impl, mesh=None):
  """Outputs, and the gradients of a weighed sum of them."""
  weight = np.random.default_rng(2).standard_normal(q.shape).astype('f4')

  def total(q, k, v):
    y = attentions.attention(q, k, v, mask, impl)
    return (y.astype('f4') * weight).sum(), y

  run = jax.jit(lambda q, k, v: jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v))
  if mesh is None:
    return run(q, k, v)
  with sharding.using(mesh):
    return run(q, k, v)


def close(found, wanted, tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), found, wanted)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('impl', ['xla', 'auto'])
def test_formula(impl, masked):
  q, k, v = inputs(3, 7, 5)
  mask = masks(3, 5) if masked else None
  y = attentions.attention(q, k, v, mask, impl)
  np.testing.assert_allclose(y, formula(q, k, v, mask), 1e-5, 1e-6)


@pytest.mark.parametrize('masked', [False, True])
def test_causal(masked):
  """A query sees the keys up to its own; where none of them is there, it gets 0 and no NaN."""
  q, k, v = inputs(3, 7, 7)
  mask = masks(3, 7) if masked else None
  weight = np.random.default_rng(2).standard_normal(q.shape).astype('f4')
  call = lambda q, k, v: attentions.attention(q, k, v, mask, causal=True)
  np.testing.assert_allclose(call(q, k, v), formula(q, k, v, mask, True), 1e-5, 1e-6)
  grads = jax.grad(lambda *qkv: (call(*qkv) * weight).sum(), (0, 1, 2))(q, k, v)
  assert all(np.isfinite(grad).all() for grad in grads)
  with sharding.using(mesh_of('sequence 4')):  # whose ring has no order of tokens
    q, k, v = inputs(4)
    np.testing.assert_allclose(
      jax.jit(lambda q, k, v: attentions.attention(q, k, v, causal=True))(q, k, v),
      formula(q, k, v, None, True), 1e-5, 1e-5)


@pytest.mark.parametrize('causal', [False, True])
def test_cudnn_is_given_even_numbers_of_tokens(causal):
  """With a mask its gradient takes no others (jax 0.10); here another program in its place."""
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(3, 7, 7 if causal else 5))
  mask, seen, program = masks(3, k.shape[1]), [], jax.nn.dot_product_attention

  def stand_in(q, k, v, implementation, **options):
    seen.append((implementation, q.shape[1] % 2, k.shape[1] % 2, options['mask'].shape[-1] % 2))
    return program(q, k, v, implementation='xla', **options)

  with mock.patch.object(jax.nn, 'dot_product_attention', stand_in):
    y = attentions.attention(q, k, v, mask, 'cudnn', causal)
  assert seen == [('cudnn', 0, 0, 0)]
  wanted = formula(*(np.asarray(x, 'f4') for x in (q, k, v)), mask, causal)
  np.testing.assert_allclose(y.astype('f4'), wanted, 0.03, 0.03)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('tokens', [24, 17])
def test_chunked(tokens, masked):
  """Values and gradients of a few queries at a time, also where they are no whole chunks."""
  q, k, v = inputs(3, tokens, 24)
  mask = masks(3, 24) if masked else None
  with mock.patch.object(attentions, 'CHUNK', 8):
    found = both(q, k, v, mask, 'chunked')
  close(found, both(q, k, v, mask, 'xla'), 2e-5)


def test_chunks_hold_but_their_own_scores():
  """What training needs of memory grows with the tokens, not with their square."""
  def temporaries(n, impl):
    x = jax.ShapeDtypeStruct((1, n, 1, 16), 'float32')
    loss = lambda q, k, v: attentions.attention(q, k, v, impl=impl).sum()
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(8192, 'chunked') < 2.5 * temporaries(4096, 'chunked')
  assert temporaries(8192, 'chunked') < temporaries(8192, 'xla') / 3


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('mesh', MESHES)
def test_ring(mesh, masked):
  """Values and gradients of keys that travel are those of keys that stay."""
  q, k, v = inputs(4)
  mask = masks(4, 24) if masked else None
  close(both(q, k, v, mask, 'ring', mesh_of(mesh)), both(q, k, v, mask, 'xla'), 2e-5)


def test_ring_passes_on_what_it_holds():
  """No device ever has all keys: the program passes blocks on, and gathers nothing."""
  mesh = mesh_of('sequence 4')
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'sequence'))
  q, k, v = (jax.device_put(x, place) for x in inputs())
  with sharding.using(mesh):
    program = jax.jit(attentions.attention).lower(q, k, v).compile().as_text()
  assert 'collective-permute' in program and 'all-gather' not in program


@pytest.mark.parametrize('remat', [False, True])
def test_ring_keeps_no_scores_for_the_gradient(remat):
  mesh = mesh_of('sequence 4')
  q, k, v = inputs(1, 512, 512)
  with sharding.using(mesh):
    f = lambda q, k, v: attentions.attention(q, k, v, impl='ring').sum()
    f = jax.checkpoint(f, policy=layers.policy('dots_saveable')) if remat else f
    program = str(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(q, k, v))
  assert '128,128]' in program  # a block of scores is all there is at once
  assert '4,1,2,128,128]' not in program and '512,512]' not in program


def test_large_scores_stay_finite():
  q, k, v = inputs(2)
  q *= 40  # scores up to some 300, of which float32 has no exponential
  grads, y = both(q, k, v, None, 'ring', mesh_of('sequence 4'))
  assert all(np.isfinite(x).all() for x in (*grads, y))
  np.testing.assert_allclose(y, formula(q, k, v), 1e-4, 1e-4)


@pytest.mark.parametrize('n, m, masked', [(128, 256, False), (100, 77, False), (130, 128, True)])
def test_splash(n, m, masked):
  """The TPU's kernel, run step by step on this CPU; tokens are padded to its blocks."""
  q, k, v = inputs(2, n, m, 2, 64)
  mask = masks(2, m) if masked else None
  interpreted = lambda *args: attentions._splash(*args, interpret=True)
  with mock.patch.dict(attentions.IMPLS, splash=interpreted):
    found = both(q, k, v, mask, 'splash')
  close(found, both(q, k, v, mask, 'xla'), 2e-4)


@pytest.mark.parametrize('masked', [False, True])
def test_tokamax(masked):
  """Its program for this CPU, where the package is: values and gradients."""
  pytest.importorskip('tokamax', reason='pip install diffax[tokamax]')
  q, k, v = inputs()
  mask = masks(2, 24) if masked else None
  close(both(q, k, v, mask, 'tokamax'), both(q, k, v, mask, 'xla'), 2e-5)


def test_half_precision():
  q, k, v = (x.astype(jnp.bfloat16) for x in inputs())
  wanted = formula(*(np.asarray(x, 'f4') for x in (q, k, v)))
  for impl, mesh in (('xla', None), ('ring', mesh_of('sequence 4'))):
    _, y = both(q, k, v, None, impl, mesh)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype('f4'), wanted, 0.03, 0.03)


@pytest.mark.parametrize('platform, dtype, keys, d, wanted', [
  ('cpu', 'float32', 4096, 64, 'xla'), ('cpu', 'bfloat16', 4096, 64, 'xla'),
  ('cpu', 'float32', 2**14, 64, 'chunked'), ('gpu', 'bfloat16', 2**14, 512, 'chunked'),
  ('gpu', 'bfloat16', 2**14, 64, 'cudnn'), ('tpu', 'bfloat16', 2**14, 64, 'splash'),
  ('gpu', 'bfloat16', 256, 64, 'cudnn'), ('gpu', 'float16', 256, 72, 'cudnn'),
  ('gpu', 'float32', 256, 64, 'xla'), ('gpu', 'bfloat16', 256, 30, 'xla'),
  ('gpu', 'bfloat16', 256, 256, 'xla'),
  ('tpu', 'bfloat16', 256, 64, 'xla'), ('tpu', 'bfloat16', 4096, 64, 'splash'),
])
def test_chosen_by_devices_and_shape(platform, dtype, keys, d, wanted):
  like = jax.ShapeDtypeStruct((1, keys, 2, d), dtype)
  with mock.patch.object(layers, 'platform', lambda: platform):
    assert attentions.choose(like, like) == wanted


def test_chosen_for_an_order_of_tokens():
  half, single = (jax.ShapeDtypeStruct((1, 4096, 2, 64), d) for d in ('bfloat16', 'float32'))
  for platform, like, wanted in (
    ('gpu', half, 'cudnn'), ('gpu', single, 'xla'), ('tpu', half, 'xla'), ('cpu', half, 'xla')
  ):
    with mock.patch.object(layers, 'platform', lambda platform=platform: platform):
      assert attentions.choose(like, like, causal=True) == wanted


def test_devices_are_those_of_the_mesh_in_force():
  device = types.SimpleNamespace(platform='tpu')
  mesh = types.SimpleNamespace(abstract_device=device)
  assert layers.platform() == 'cpu'
  with mock.patch.object(jax.sharding, 'get_abstract_mesh', lambda: mesh):
    assert layers.platform() == 'tpu'


def test_chosen_by_the_mesh():
  like = lambda n: jax.ShapeDtypeStruct((4, n, 2, 8), 'float32')
  with sharding.using(mesh_of('sequence 4')):
    assert attentions.choose(like(24), like(24)) == 'ring'
    assert attentions.choose(like(24), like(77)) == 'xla'  # a text's keys are not the queries' own
    assert attentions.choose(like(22), like(22)) == 'xla'


def test_forced_by_the_config_or_by_name():
  q, k, v = inputs()
  seen = []
  spy = lambda *args: seen.append(True) or args[2]
  with mock.patch.dict(attentions.IMPLS, spy=spy):
    with attentions.using('spy'):
      attentions.attention(q, k, v)
      attentions.attention(q, k, v, impl='xla')
    attentions.attention(q, k, v)
  assert len(seen) == 1


def test_errors_name_the_value_and_the_remedy():
  q, k, v = inputs()
  with pytest.raises(ValueError, match="'flash' is none of auto, xla, chunked, cudnn, splash"):
    attentions.attention(q, k, v, impl='flash')
  with pytest.raises(ValueError, match='sequence > 1'):
    attentions.attention(q, k, v, impl='ring')
  with pytest.raises(ValueError, match="float32.*model.dtype"):
    attentions.attention(q, k, v, impl='cudnn')
  with pytest.raises(ValueError, match="'ring' has no causal order.*auto, xla or cudnn"):
    attentions.attention(q, k, v, impl='ring', causal=True)


def carried_out(function, *args):
  """{primitive: how often it stands in a traced program}, within others too."""
  found = collections.Counter()

  def look(jaxpr):
    for equation in jaxpr.eqns:
      found[equation.primitive.name] += 1
      for value in jax.tree.leaves(list(equation.params.values())):
        inner = getattr(value, 'jaxpr', value)
        if hasattr(inner, 'eqns') and equation.primitive.name != 'pallas_call':
          look(inner)

  look(jax.make_jaxpr(function)(*args).jaxpr)
  return found


def test_kept_for_the_backward_pass():
  """`dots_saveable` keeps what a kernel for attention made, and a product with its bias."""
  q, k, v = inputs(n=128, m=128)
  attend = lambda q: attentions._splash(q, k, v, None).sum()
  x, dense = jnp.ones((4, 8)), layers.Dense(8)
  params = dense.init(jax.random.key(0), x)
  bent = lambda params: jnp.sin(jnp.tanh(dense.apply(params, x))).sum()

  def count(function, at, name, policy=None):
    kept = jax.checkpoint(function, policy=layers.policy(policy)) if policy else function
    return carried_out(jax.grad(kept), at)[name]

  for case in ((attend, q, 'pallas_call'), (bent, params, 'add')):
    assert count(*case, 'dots_saveable') == count(*case) < count(*case, 'nothing_saveable'), case


# --- convolutions of maps whose rows are split ----------------------------------------------------


@pytest.mark.parametrize('strides, padding', [
  ((1, 1), 'SAME'), ((2, 2), [(0, 1), (0, 1)]), ((1, 1), 'VALID'), ((2, 2), 'SAME'),
])
@pytest.mark.parametrize('axes', [
  dict(sequence=4), dict(sequence=2, tensor=2), dict(fsdp=2, sequence=2, tensor=2),
])
def test_convolution(axes, strides, padding):
  """Values and both gradients; XLA's own splitting has the kernel's twice on the second mesh."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((4, 8, 6, 16)).astype('f4')
  kernel = 0.1 * rng.standard_normal((3, 3, 16, 32)).astype('f4')

  def total(x, kernel):
    x = layers.constrain(x, 'batch', 'height', None, 'width')
    y = layers.conv(x, kernel, strides, padding)
    y = layers.constrain(y, 'batch', 'height', None, 'width')
    weight = np.random.default_rng(1).standard_normal(y.shape).astype('f4')
    return (y * weight).sum(), y

  run = lambda: jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, kernel)
  wanted = run()
  size = int(np.prod(list(axes.values())))
  with sharding.using(sharding.make_mesh(axes, jax.devices()[:size])):
    found = jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, kernel)
  close(found, wanted, 2e-5)


# --- meshes ---------------------------------------------------------------------------------------


def slices(count, each):
  """Made-up devices of several TPU slices."""
  coords = [(i, 0, 0) for i in range(each)]
  return [
    types.SimpleNamespace(
      id=s * each + i, slice_index=s, process_index=s, platform='cpu', device_kind='cpu',
      coords=coords[i], core_on_chip=0)
    for s in range(count) for i in range(each)
  ]


@pytest.mark.parametrize('sizes, count, wanted', [
  ((8, 1, 1, 1), 2, (2, 1, 1, 1)), ((1, 8, 1, 1), 2, (1, 2, 1, 1)), ((2, 8, 1, 1), 4, (2, 2, 1, 1)),
  ((4, 2, 1, 1), 8, (4, 2, 1, 1)), ((8, 1, 1, 1), 1, (1, 1, 1, 1)), ((1, 1, 8, 1), 2, None),
  ((3, 1, 1, 2), 2, None),
])
def test_which_axes_run_over_slices(sizes, count, wanted):
  sizes = dict(zip(sharding.AXES, sizes))
  found = sharding.over_slices(sizes, count)
  assert found == (wanted and dict(zip(sharding.AXES, wanted)))


def test_slices_are_neighbours_in_no_other_axis():
  devices = slices(2, 4)
  found = sharding._arranged(dict(data=2, fsdp=2, sequence=1, tensor=2), devices)
  assert found.shape == (2, 2, 1, 2)
  for data in range(2):
    assert {d.slice_index for d in found[data].flat} == {data}


def test_unknown_axis():
  with pytest.raises(ConfigError, match="'model' is none of data, fsdp, sequence, tensor"):
    sharding.make_mesh(dict(model=2))
