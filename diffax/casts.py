"""Parameters that a loop casts in every turn, cast once before it.

A network that computes in bfloat16 casts its float32 parameters wherever it uses them. In a sampler
that is once a step: XLA leaves it in the loop, where it reads and writes more than the parameters
themselves. What is cast beforehand comes to the same numbers, to the bit.
"""

import jax
from jax.extend.core import jaxpr_as_fun, Var
import jax.numpy as jnp

PASSED_ON = (  # what they make of one array may be cast thereafter
  'slice', 'squeeze', 'reshape', 'transpose', 'dynamic_slice', 'broadcast_in_dim')
OTHER = 'other'


def once(function):
  """`function`, of a tree of parameters and more, such that its loops cast no parameter.

  Cast beforehand is a leaf of the first argument which loops (`lax.scan`, `lax.while_loop`) take
  whole, and of which nothing is asked but to be cast to one narrower dtype.
  """
  def wrapped(params, *args):
    traced, shape = jax.make_jaxpr(function, return_shape=True)(params, *args)
    leaves, tree = jax.tree.flatten(params)
    uses = [set() for _ in leaves]
    _look(traced.jaxpr, {x: {i} for i, x in enumerate(traced.jaxpr.invars[: len(leaves)])}, uses)
    wanted = [_narrower(x.dtype, each) for x, each in zip(leaves, uses)]
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


def _look(jaxpr, held, uses, looped=False):
  """Adds to uses[i], of a leaf i, (the dtype it is cast to or OTHER, whether in a loop).

  held: {variable of the program: the leaves it is made of}.
  """
  known = lambda x: held.get(x) if isinstance(x, Var) else None
  for equation in jaxpr.eqns:
    operands = {i: leaves for i, x in enumerate(equation.invars) if (leaves := known(x))}
    if not operands:
      continue
    if equation.primitive.name in PASSED_ON:
      held[equation.outvars[0]] = set().union(*operands.values())
    elif equation.primitive.name == 'convert_element_type':
      _add(uses, operands[0], equation.params['new_dtype'], looped)
    else:
      within, rest = _within(equation, operands)
      for program, inner, again in within:
        _look(program, inner, uses, looped or again)
      _add(uses, rest, OTHER, looped)
  for x in jaxpr.outvars:
    _add(uses, known(x) or (), OTHER, looped)


def _add(uses, leaves, to, looped):
  for leaf in leaves:
    uses[leaf].add((to, looped))


def _within(equation, operands):
  """([(program within, {its variable: leaves}, whether a loop takes them whole)], what goes to none
  of them whole). operands: {place: leaves}."""
  params, name, n = equation.params, equation.primitive.name, len(equation.invars)
  if name == 'scan':
    whole, body = params['num_consts'], params['jaxpr']
    rows = range(whole + params['num_carry'], n)  # behind what it carries
    programs = [(body, 0, range(whole), True), (body, 0, rows, False)]
  elif name == 'while':
    test = params['cond_nconsts']
    programs = [(params['body_jaxpr'], test, range(test, test + params['body_nconsts']), True)]
  elif name == 'cond':
    programs = [(branch, 1, range(1, n), False) for branch in params['branches']]
  else:
    program = params.get('jaxpr', params.get('call_jaxpr'))
    fits = program is not None and len(getattr(program, 'jaxpr', program).invars) == n
    programs = [(program, 0, range(n), False)] if fits else []
  found = []
  for program, first, places, again in programs:
    program = getattr(program, 'jaxpr', program)
    inner = {program.invars[i - first]: operands[i] for i in places if i in operands}
    found += [(program, inner, again)] if inner else []
  taken = {i for _, _, places, _ in programs for i in places}
  return found, set().union(*(leaves for i, leaves in operands.items() if i not in taken))
