"""How much there is to compute: FLOPs of a function by its shapes.

A product of [n k] and [k m] is 2 n k m, a convolution likewise; the rest is not counted, as is the
custom for the share of a device's peak that a model uses (Chowdhery et al. 2022, "PaLM", app. B).
Counted is what the function says, not what a compiler makes of it: a scanned body as often as it
runs; recomputation in a backward pass not at all in a function's own count, and as it is asked for
in that of its derivative.
"""

import collections
import math

import jax

from diffax.models import attention as attentions


def count(function, *args):
  """FLOPs of one call, of arrays or ShapeDtypeStructs; nothing is computed.

  Attention is counted as the products that it is, by whatever program it would run.
  """
  with attentions.using('xla'):
    return sum(of(jax.make_jaxpr(function)(*args).jaxpr).values())


def of(jaxpr):
  """{dtype: FLOPs} of a traced program, by the dtype of what is multiplied.

  Raises ValueError where the data tell how often products are taken, as an adaptive solver's do.
  """
  found = collections.Counter()
  for equation in jaxpr.eqns:
    for dtype, flops in _equation(equation).items():
      found[dtype] += flops
  return found


def _equation(equation):
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    left = equation.invars[0].aval.shape
    return _product(equation, math.prod(left[i] for i in contracted))
  if name == 'conv_general_dilated':
    kernel, numbers = equation.invars[1].aval.shape, params['dimension_numbers']
    return _product(equation, math.prod(kernel) // kernel[numbers.rhs_spec[0]])
  inner = [of(program) for program in _inner(params)]
  if name == 'cond':
    branches = [of(branch.jaxpr) for branch in params['branches']]
    return max(branches, key=lambda branch: sum(branch.values()))
  times = params['length'] if name == 'scan' else _parts(params) if name == 'shard_map' else 1
  if name == 'while' and any(any(each.values()) for each in inner):
    raise ValueError('products stand in a loop that runs as often as the data say')
  return collections.Counter(
    {dtype: times * sum(each[dtype] for each in inner) for dtype in set().union(*inner)})


def _parts(params):
  """On how many devices each carries out the program of its own part."""
  names = [n for n in ('newly_manual_axes', 'manual_axes') if n in params]  # by jax's version
  axes = params[names[0]] if names else params['mesh'].axis_names
  return math.prod(params['mesh'].shape[axis] for axis in axes)


def _product(equation, each):
  """Of every number of the result the sum of `each` products."""
  dtype = equation.invars[0].aval.dtype.name
  return {dtype: 2 * math.prod(equation.outvars[0].aval.shape) * each}


def _inner(params):
  """The programs an equation calls forwards: those of derivatives are not made yet."""
  for value in params.values():
    inner = getattr(value, 'jaxpr', value)
    if hasattr(inner, 'eqns'):
      yield inner
