"""How much there is to compute: FLOPs of a function by its shapes, and what devices can do.

A product of [n k] and [k m] is 2 n k m, a convolution likewise; the rest is not counted, as is the
custom for the share of a device's peak that a model uses (Chowdhery et al. 2022, "PaLM", app. B).
Counted is what the function says, not what a compiler makes of it: a scanned body as often as it
runs, recomputation in a backward pass not at all.
"""

import math

import jax

from diffax.models import attention as attentions

# FLOP/s of a device in bfloat16, dense, by the vendors' data sheets.
PEAKS = {
  'TPU v2': 45e12, 'TPU v3': 123e12, 'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5e': 197e12,
  'TPU v5': 459e12, 'TPU v5p': 459e12, 'TPU v6 lite': 918e12, 'TPU v6e': 918e12, 'TPU7x': 2307e12,
  'NVIDIA V100': 125e12, 'NVIDIA A100': 312e12, 'NVIDIA A10': 125e12, 'NVIDIA L4': 121e12,
  'NVIDIA L40S': 362e12, 'NVIDIA H100 PCIe': 756e12, 'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12,
  'NVIDIA GH200': 989e12, 'NVIDIA B200': 2250e12, 'NVIDIA GB200': 2500e12,
}


def peak(kind):
  """FLOP/s of a device by its `device_kind`, None where it is not known; longest names first."""
  names = sorted(PEAKS, key=len, reverse=True)
  return next((PEAKS[name] for name in names if kind.startswith(name)), None)


def count(function, *args):
  """FLOPs of one call, of arrays or ShapeDtypeStructs; nothing is computed.

  Attention is counted as the products that it is, by whatever program it would run.
  """
  with attentions.using('xla'):
    return _of(jax.make_jaxpr(function)(*args).jaxpr)


def _of(jaxpr):
  return sum(map(_equation, jaxpr.eqns))


def _equation(equation):
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
  if name == 'conv_general_dilated':
    kernel, numbers = equation.invars[1].aval.shape, params['dimension_numbers']
    each = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    return 2 * math.prod(equation.outvars[0].aval.shape) * each
  if name == 'cond':
    return max(_of(branch.jaxpr) for branch in params['branches'])
  times = params['length'] if name == 'scan' else 1
  return times * sum(_of(inner) for inner in _inner(params))


def _inner(params):
  """The programs an equation calls forwards: those of derivatives are not made yet."""
  for value in params.values():
    inner = getattr(value, 'jaxpr', value)
    if hasattr(inner, 'eqns'):
      yield inner
