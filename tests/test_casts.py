"""Parameters cast once before a loop: which, and to the same numbers."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import run_diffax

from diffax import casts
from diffax import config as configs
from diffax import sample
from diffax import samplers
from diffax import train

HALF = jnp.bfloat16
cast = lambda x: x.astype(HALF)


def loop(step, count=3):
  """x [2] after `count` turns of x <- step(params, x)."""
  def function(params, x):
    return jax.lax.scan(lambda x, _: (step(params, x), None), x, None, count)[0]
  return function


def inside(params, x):
  """Through a slice, a call, and a loop over layers."""
  w = jax.jit(cast)(params['w'][0])
  layer = lambda x, w: (x * cast(w).sum(), None)
  return jax.lax.scan(layer, x * w, params['layers'])[0]


def while_loop(params, x):
  return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x * cast(params['w'])[0], x)


def either(params, x):
  return jax.lax.cond(x.sum() > 0, lambda x: x * cast(params['w'])[0], lambda x: x, x)


FUNCTIONS = {  # and the leaves that are cast
  'inside': (loop(inside), {'w', 'layers'}),
  'while': (while_loop, {'w'}),
  'branches': (loop(either), {'w'}),
  'used as it is': (loop(lambda p, x: x * cast(p['w'])[0] + cast(p['w'].sum())), {}),
  'to two dtypes': (
    loop(lambda p, x: x * cast(p['w'])[0] * cast(p['w'].astype('float16').sum())), {}),
  'widened': (loop(lambda p, x: x * cast(p['half'].astype('float32').sum())), {}),
  'integers': (loop(lambda p, x: x * cast(p['count'])), {}),
  'joined': (  # to what stays float32
    loop(lambda p, x: x * cast(jax.lax.concatenate([p['w'][0], p['layers'][0] + 1], 0))[:2]), {}),
  'in no loop': (lambda p, x: x * cast(p['w'])[0], {}),
  'layer by layer': (
    lambda p, x: jax.lax.scan(lambda x, w: (x * cast(w)[0], None), x, p['layers'])[0], {}),
  'handed out': (lambda p, x: (loop(inside)(p, x), p['w'], p['layers']), {}),
  'carried': (
    lambda p, x: jax.lax.fori_loop(
      0, 3, lambda i, c: (c[0] * cast(c[1])[0], c[1] * 1.5), (x, p['w']))[0], {}),
}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_which(name):
  function, wanted = FUNCTIONS[name]
  rng, seen = np.random.default_rng(0), []
  params = {
    'w': rng.normal(size=(2, 2)).astype('f') + 2, 'layers': rng.normal(size=(3, 2)).astype('f'),
    'half': jnp.ones(2, HALF), 'count': np.int32(3)}
  def watched(params, x):
    seen.append({k for k, v in params.items() if v.dtype == HALF and k != 'half'})
    return function(params, x)
  x = jnp.ones(2, HALF)
  made = jax.jit(casts.once(watched))(params, x)
  assert seen[-1] == set(wanted)
  jax.tree.map(np.testing.assert_array_equal, made, jax.jit(function)(params, x))


UNET = dict(name='ddpmpp', classes=10, width=8, multipliers=[1], attention=[])


@pytest.mark.parametrize('model', [{}, UNET], ids=['dit', 'unet'])
def test_samples_are_the_same(model):
  """Of a network in bfloat16; its loop casts nothing of a kernel's shape any more."""
  config = run_diffax.get_config().to_dict()
  config['model'] = (model or config['model']) | dict(dtype='bfloat16')
  config['sample'] |= dict(batch_size=7)  # the size of no parameter
  run = train.setup(configs.complete(config), jax.devices()[:1])
  generate, (_, _, index, asked) = sample.program(run, run.config['sample'], 'sample')
  drawing, state = run.task.sample(run.config['sample'], 'sample'), train.init(run)

  def plainly(params, frozen, index, asked):
    keys = samplers.sample_keys(run.config['sample']['seed'], index)
    return drawing.draw(params, frozen, keys, asked)

  with run.layout():
    arguments = state.params, state.frozen, index, asked
    np.testing.assert_array_equal(generate(*arguments), jax.jit(plainly)(*arguments))
    kernels = [x.shape for x in jax.tree.leaves(state.params) if x.ndim > 1]
    shapes = {shape[i:] for shape in kernels for i in (0, 1)}  # of a layer, where they are stacked
    before, after = (_cast_in_loops(jax.make_jaxpr(f)(*arguments).jaxpr) & shapes
                     for f in (plainly, generate.__wrapped__))
  assert len(before) > 3 and not after, (before, after)


def _cast_in_loops(jaxpr, looped=False):
  """The shapes of all float32 numbers that loops cast to bfloat16."""
  found = set()
  for equation in jaxpr.eqns:
    again = looped or equation.primitive.name == 'scan'
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      found |= _cast_in_loops(inner, again)
    if equation.primitive.name == 'convert_element_type' and looped:
      x = equation.invars[0].aval
      if x.dtype == jnp.float32 and equation.params['new_dtype'] == HALF:
        found.add(x.shape)
  return found
