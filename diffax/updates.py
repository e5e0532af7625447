"""The updates that a training step is made of: the gradients of a task's phases, taken in order.

Each phase has a loss, groups of parameters and an optimizer; its gradient is by its own groups
alone, at what the phases before it have made of the others: a generator's, then its critic's. A
task without phases has one of all its parameters, without a name.
"""

from functools import partial
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import optax

from diffax import flops
from diffax.build import ConfigError
from diffax.models import layers
from diffax.tasks import Phase

FOLD = 2**31  # and a phase's number: what its keys are folded with, beyond what tasks fold with


class Found(NamedTuple):
  """What a phase found: its loss, its gradient's norm, info {name: [b]}, and 1 where it was due."""

  loss: Any
  norm: Any
  info: Any
  due: Any


def of(task):
  """A task's phases, or the one of a task without."""
  return task.phases or (Phase('', (), task.loss, terms=task.terms),)


def of_name(tree, phase):
  """What a phase has of {name: ...}; without a name, all."""
  return tree[phase.name] if phase.name else tree


def name(key, number, phase):
  """What a number of a phase is called: those of the first stand without its name."""
  return f'{key}_{phase.name}' if number else key


def _check(phases, params):
  names = [phase.name for phase in phases]
  for phase in phases:
    if not phase.name.isidentifier() or names.count(phase.name) > 1:
      raise ConfigError(f'phases {names} of the task: give each a name of its own, as disc')
    if phase.every < 1 or phase.start < 0:
      raise ConfigError(
        f'phase {phase.name!r} of the task: every={phase.every}, start={phase.start}; at least 1 '
        'and 0'
      )
  known = {group for phase in phases for group in phase.groups}
  if phases and known != set(params):
    raise ConfigError(
      f'phases of the task train {sorted(known)}, and its parameters are {sorted(params)}: name '
      'each group in a phase, and lay aside in State.frozen what is not trained'
    )


def init(phases, tx, params):
  """The optimizers' states: {phase: ...}, of a task without phases the only one's.

  Raises ConfigError for phases that are none, and parameters that would stand still unseen.
  """
  _check(phases, params)
  if not phases:
    return tx.init(params)
  return {phase.name: tx[phase.name].init(_own(phase, params)) for phase in phases}


def _own(phase, params):
  return {group: params[group] for group in phase.groups} if phase.name else params


def _whole(phase, params, own):
  return {**params, **own} if phase.name else own


def sums(phases):
  """The first sums of what is logged."""
  return {name(k, i, phase): jnp.zeros(()) for i, phase in enumerate(phases)
          for k in (*_logged(phase), 'steps')}


def _logged(phase):
  return ('loss', 'grad_norm', *phase.terms)


def summed(number, phase, found):
  """What a phase found, as it is summed."""
  values = {'loss': found.loss, 'grad_norm': found.norm, 'steps': found.due}
  values |= {term: found.info[term].mean() for term in phase.terms}
  return {name(key, number, phase): value for key, value in values.items()}


def metrics(phases, sums):
  """Means over the steps that are summed; 0 where a phase was not due in any of them."""
  def mean(key, i, phase):
    steps = sums[name('steps', i, phase)]
    return sums[name(key, i, phase)] / (steps if _always(phase) else jnp.maximum(steps, 1))

  parts = enumerate(phases)
  return {name(k, i, p): mean(k, i, p) for i, p in parts for k in _logged(p)}


def done(phase, step):
  """How many times a phase was carried out before `step`: what its learning rate goes by."""
  if _always(phase):
    return step
  return jnp.maximum(step - phase.start + phase.every - 1, 0) // phase.every


def _always(phase):
  return phase.every == 1 and phase.start == 0


def _keys(keys, number):
  """The keys [b] of a phase; the first has the step's own, whatever others there are."""
  return jax.vmap(lambda key: jax.random.fold_in(key, FOLD + number))(keys) if number else keys


def losses(number, phase, state, batch, keys):
  """(losses [b], info) of a phase, keys [b] those of the step."""
  return phase.loss(state.params, state, batch, _keys(keys, number))


def advance(number, phase, tx, config, told=False):
  """The function (state, batch, keys) -> (state, `Found`) that carries out a phase.

  tx: its optimizer. told: whether all of its info is wanted, or the terms alone that are logged. Of
  the state it changes its own groups and its optimizer's state; where it is not due, nothing.
  """
  count, micro = config['batch_size'], config['accumulate']

  def gradient(own, state, batch, keys):
    """((loss, info), gradient); of the info what is asked for."""
    def total(own):
      each, info = phase.loss(_whole(phase, state.params, own), state, batch, keys)
      return each.sum() / count, info if told else {term: info[term] for term in phase.terms}

    return jax.value_and_grad(total, has_aux=True)(own)

  def accumulate(own, state, batch, keys):
    """The same in `micro` passes; strided, so that each device's rows stay where they are."""
    parts = jax.tree.map(
      lambda x: einops.rearrange(x, '(b k) ... -> k b ...', k=micro), (batch, keys)
    )

    def add(total, part):
      (value, info), grads = gradient(own, state, *part)
      return jax.tree.map(jnp.add, total, (value, grads)), info

    zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, own)
    (value, grads), info = jax.lax.scan(add, zero, parts, unroll=layers.unroll(micro))
    info = jax.tree.map(lambda x: einops.rearrange(x, 'k b ... -> (b k) ...'), info)
    return (value, info), grads

  def act(state, batch, keys):
    own, opt = _own(phase, state.params), of_name(state.opt, phase)
    both = accumulate if micro > 1 else gradient
    (value, info), grads = both(own, state, batch, keys)
    norm = optax.tree.norm(grads)
    updates, opt = tx.update(grads, opt, own)
    due = 1.0 if _always(phase) else jnp.ones(())
    return optax.apply_updates(own, updates), opt, Found(value, norm, info, due)

  def carry_out(state, batch, keys):
    act_now = partial(act, state, batch, _keys(keys, number))
    if _always(phase):
      own, opt, found = act_now()
    else:
      nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(act_now)[2])
      rest = lambda: (_own(phase, state.params), of_name(state.opt, phase), nothing)
      due = (state.step >= phase.start) & ((state.step - phase.start) % phase.every == 0)
      own, opt, found = layers.when(due, act_now, rest)
    opt = {**state.opt, phase.name: opt} if phase.name else opt
    return state.replace(params=_whole(phase, state.params, own), opt=opt), found

  return carry_out


def flops_of(number, phase, state, batch, keys):
  """FLOPs of a step of a phase: three times those of its loss where all is differentiated, else
  those of its gradient; on the mean, where it is not due in every step."""
  if not phase.name:
    return 3 * flops.count(lambda *args: losses(number, phase, *args)[0], state, batch, keys)

  def total(own, state, batch, keys):
    state = state.replace(params=_whole(phase, state.params, own))
    return losses(number, phase, state, batch, keys)[0].sum()

  own = _own(phase, state.params)
  return flops.count(jax.grad(total), own, state, batch, keys) / phase.every
