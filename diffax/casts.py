"""Parameters that a loop casts in every turn, cast once before it.

A network that computes in bfloat16 casts its float32 parameters wherever it uses them. In a sampler
that is once a step: XLA leaves it in the loop, where it reads and writes more than the parameters
themselves. What is cast beforehand comes to the same numbers, to the bit.
"""

import jax
from jax.extend.core import jaxpr_as_fun
import jax.numpy as jnp

PASSED_ON = ('slice', 'squeeze', 'reshape', 'transpose', 'dynamic_slice', 'broadcast_in_dim',
             'concatenate')  # what they make may be cast thereafter
OTHER = 'other'


def once(function):
  """`function`, of a tree of parameters and more, such that its loops cast no parameter.

  Cast beforehand is a leaf of the first argument which loops (`lax.scan`, `lax.while_loop`) take
  whole, and of which nothing is asked but to be cast to one narrower dtype.
  """
  def wrapped(params, *args):
    traced, shape = jax.make_jaxpr(function, return_shape=True)(params, *args)
    leaves, tree = jax.tree.flatten(params)
    wanted = [_narrower(x.dtype, _uses(traced.jaxpr, i)) for i, x in enumerate(leaves)]
    if any(wanted):
      cast = [x.astype(dtype) if dtype else x for x, dtype in zip(leaves, wanted)]
      return function(tree.unflatten(cast), *args)
    out = jaxpr_as_fun(traced)(*leaves, *jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shape), out)

  return wrapped


def _narrower(dtype, uses):
  """The dtype to cast to, None where it is to stay."""
  wanted = {to for to, _ in uses}
  if len(wanted) != 1 or OTHER in wanted or not any(looped for _, looped in uses):
    return None
  to, = wanted
  floats = jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(to, jnp.floating)
  return to if floats and jnp.dtype(to).itemsize < jnp.dtype(dtype).itemsize else None


def _uses(jaxpr, place, looped=False):
  """{(dtype it is cast to or OTHER, whether in a loop)} of all uses of an argument of a program."""
  found, names = set(), {jaxpr.invars[place]}
  for equation in jaxpr.eqns:
    for i, x in enumerate(equation.invars):
      if isinstance(x, jax.extend.core.Literal) or x not in names:
        continue
      inner, again = _inner(equation, i)
      if equation.primitive.name == 'convert_element_type':
        found.add((equation.params['new_dtype'], looped))
      elif equation.primitive.name in PASSED_ON:
        names.add(equation.outvars[0])
      elif inner:
        found |= set().union(*(_uses(each, at, looped or again) for each, at in inner))
      else:
        found.add((OTHER, looped))
  if names & {x for x in jaxpr.outvars if not isinstance(x, jax.extend.core.Literal)}:
    found.add((OTHER, looped))
  return found


def _inner(equation, i):
  """([(program within, place)] that an equation's operand i goes to whole, whether in a loop)."""
  params, name = equation.params, equation.primitive.name
  if name == 'scan':
    whole = i < params['num_consts']
    carried = not whole and i < params['num_consts'] + params['num_carry']
    return ([] if carried else [(params['jaxpr'].jaxpr, i)]), whole
  if name == 'while':
    test, body = params['cond_nconsts'], params['body_nconsts']
    return ([(params['body_jaxpr'].jaxpr, i - test)] if test <= i < test + body else []), True
  if name == 'cond':
    return [(each.jaxpr, i - 1) for each in params['branches'] if i], False
  program = params.get('jaxpr', params.get('call_jaxpr'))
  program = getattr(program, 'jaxpr', program)
  fits = program is not None and len(program.invars) == len(equation.invars)
  return ([(program, i)] if fits else []), False
