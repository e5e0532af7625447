"""Solvers of ordinary differential equations, each example of a batch with its own step size.

  dx/dt = f(x, t),

x any tree of arrays with a leading batch axis, t [b], f of x's structure, an example's derivative
of that example alone. A solver is an embedded Runge-Kutta tableau: its stages make one solution and
an estimate of its error, and the last stage is the first of the next step. `fixed` takes the steps
it is given, `adaptive` those that a tolerance allows.

Below them are the ways of sampling that own their loop: `sample_adaptive`, `sample_diffrax` (the
solvers of another library) and `sample_picard` (all steps at once, again and again).
"""

from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from diffax import noises
from diffax import predictions
from diffax import samplers
from diffax import schedules


class Tableau(NamedTuple):
  """order: of the solution. c [s]: times of the stages. a: their weights, row i of i entries, the
  last row the solution's. error [s]: the solution's weights less those of the lower order."""

  order: int
  c: tuple
  a: tuple
  error: tuple


BOGACKI_SHAMPINE = Tableau(  # Bogacki & Shampine 1989, "A 3(2) Pair of Runge-Kutta Formulas"
    3, (0, 1 / 2, 3 / 4, 1), ((), (1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    (2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8))

DORMAND_PRINCE = Tableau(  # Dormand & Prince 1980, "A Family of Embedded Runge-Kutta Formulae"
    5, (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    ((), (1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9),
     (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
     (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
     (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
    (35 / 384 - 5179 / 57600, 0, 500 / 1113 - 7571 / 16695, 125 / 192 - 393 / 640,
     -2187 / 6784 + 92097 / 339200, 11 / 84 - 187 / 2100, -1 / 40))


class Solution(NamedTuple):
  """x at t [b]; tries [b]: steps taken or rejected; done [b]: whether t is where it was to end."""

  x: Any
  t: Array
  tries: Array
  done: Array


def _like(values, leaf):
  """Numbers [b], to multiply the leaf [b ...] with."""
  return jnp.expand_dims(values, tuple(range(1, leaf.ndim))).astype(leaf.dtype)


def _weigh(weights, slopes, h):
  """h [b] times the weighted sum of trees."""
  def add(*leaves):
    return _like(h, leaves[0]) * sum(w * leaf for w, leaf in zip(weights, leaves) if w)
  return jax.tree.map(add, *slopes)


def step(tableau, f, x, t, h, slope):
  """One step of lengths h [b] from times t [b]; slope: f(x, t).

  Returns x after it, the estimate of its error, and f there.
  """
  slopes = [slope]
  for c, row in zip(tableau.c[1:], tableau.a[1:]):
    moved = jax.tree.map(jnp.add, x, _weigh(row, slopes, h))
    slopes.append(f(moved, t + c * h))
  return moved, _weigh(tableau.error, slopes, h), slopes[-1]


def fixed(f, x, ts, tableau=DORMAND_PRINCE):
  """x at ts[-1], from x at ts[0], in steps from each of the times ts [n + 1] to the next."""
  count = jax.tree.leaves(x)[0].shape[0]
  each = lambda t: jnp.broadcast_to(t, (count,))

  def advance(carry, span):
    t, s = map(each, span)
    moved, _, slope = step(tableau, f, *carry[:1], t, s - t, carry[1])
    return (moved, slope), None

  return jax.lax.scan(advance, (x, f(x, each(ts[0]))), (ts[:-1], ts[1:]))[0][0]


def _size(tree, scale):
  """Root mean square [b] of an example's values, each over its scale."""
  squares = jax.tree.map(
      lambda a, s: jnp.square(a / s).reshape(a.shape[0], -1).sum(1), tree, scale)
  count = sum(np.prod(a.shape[1:], dtype=int) for a in jax.tree.leaves(tree))
  return jnp.sqrt(sum(jax.tree.leaves(squares)) / count)


def _first(f, x, t, span, slope, scale, order):
  """Length [b] of the first step, from the slope and how it changes; Hairer et al. 1993, II.4."""
  over = lambda a, b: a / jnp.where(b > 0, b, 1e-30)
  speed = _size(slope, scale)
  h = jnp.minimum(0.01 * over(jnp.maximum(_size(x, scale), 1.), speed), jnp.abs(span))
  ahead = jnp.sign(span) * h
  moved = f(jax.tree.map(jnp.add, x, _weigh((1.,), [slope], ahead)), t + ahead)
  change = over(_size(jax.tree.map(jnp.subtract, moved, slope), scale), h)
  best = over(0.01, jnp.maximum(speed, change))**(1 / order)
  return jnp.sign(span) * jnp.minimum(jnp.minimum(100 * h, best), jnp.abs(span))


def adaptive(f, x, t0, t1, rtol=1e-5, atol=1e-5, max_steps=1000, tableau=DORMAND_PRINCE):
  """From x at t0 to t1 (scalars or [b], t1 on either side), with each example's steps its own.

  A step is taken where the root mean square of its error, over atol + rtol |x|, is at most 1 in
  that example; what another example does changes no bit of it. At most max_steps tries, of which
  each asks f once a stage less one, for all the batch until its last example is done. Returns a
  `Solution`: look at `done`. A `while_loop`: it has no reverse-mode derivative. Hairer, Norsett &
  Wanner 1993, "Solving Ordinary Differential Equations I", sec. II.4. Raises ValueError unless
  atol, rtol >= 0 and not both 0.
  """
  if min(rtol, atol) < 0 or rtol + atol == 0:
    raise ValueError(f'rtol={rtol}, atol={atol}: neither may be negative, nor both 0')
  first = jax.tree.leaves(x)[0]
  dtype = jnp.promote_types(first.dtype, jnp.float32)
  t0, t1 = (jnp.broadcast_to(jnp.asarray(t, dtype), first.shape[:1]) for t in (t0, t1))

  def scale(*trees):
    return jax.tree.map(
        lambda *a: atol + rtol * jnp.max(jnp.abs(jnp.stack(a)), 0), *trees)

  def attempt(carry):
    count, x, t, h, slope, tries = carry
    active = t != t1
    final = jnp.abs(h) >= jnp.abs(t1 - t)
    h = jnp.where(final, t1 - t, h)
    moved, error, after = step(tableau, f, x, t, h, slope)
    size = _size(error, scale(x, moved))
    size = jnp.where(jnp.isfinite(size), size, jnp.inf)
    good = active & (size <= 1)
    pick = lambda new, old: jnp.where(_like(good, new).astype(bool), new, old)
    x, slope = jax.tree.map(pick, (moved, after), (x, slope))
    t = jnp.where(good, jnp.where(final, t1, t + h), t)
    factor = jnp.clip(0.9 * size**(-1 / tableau.order), 0.2, 10.)
    return count + 1, x, t, jnp.where(active, h * factor, h), slope, tries + active

  def going(carry):
    return jnp.any(carry[2] != t1) & (carry[0] < max_steps)

  slope = f(x, t0)
  h = _first(f, x, t0, t1 - t0, slope, scale(x), tableau.order)
  start = 0, x, t0, h, slope, jnp.zeros(t0.shape, jnp.int32)
  _, x, t, _, _, tries = jax.lax.while_loop(going, attempt, start)
  return Solution(x, t, tries, t == t1)


# --- sampling -------------------------------------------------------------------------------------


def angle(level):
  """atan(sigma / alpha), in [0, pi / 2]: a time that all schedules share, finite at both ends."""
  return jnp.arctan2(level.sigma, level.alpha)


def level_at(schedule, phi):
  """The level at angles `phi`, of their shape, in [t_min, t_max]; and sqrt(alpha^2 + sigma^2)."""
  cos = jnp.maximum(jnp.cos(phi), 0.)  # of a rounded pi / 2 it is -4e-8
  t = schedules.inverse(schedule, jnp.log(cos) - jnp.log(jnp.sin(phi)))
  level = schedule(jnp.clip(t, schedule.t_min, schedule.t_max))
  return level, jnp.sqrt(level.alpha**2 + level.sigma**2)


def _flow(denoise, schedule, x):
  """The probability flow of z = x / sqrt(alpha^2 + sigma^2) by its angle: dz = eps cos - x0 sin.

  Song et al. 2020, "DDIM", eq. 14, in polar form. Returns where it begins and ends, (z, phi, phi),
  its field, and x0 as said at a z of the end.
  """
  if isinstance(denoise, samplers.Denoiser):
    raise ValueError('a denoiser that remembers has no flow: give a plain (x, level) -> x0')
  wide = jnp.promote_types(x.dtype, jnp.float32)

  def ask(z, phi):
    phi = jnp.expand_dims(phi, tuple(range(1, z.ndim)))  # [b 1 ...]
    level, norm = level_at(schedule, phi)
    noised = (norm * z).astype(x.dtype)
    said = predictions.estimate(denoise(noised, level), noised, level)
    return jax.tree.map(lambda a: a.astype(wide), said), level.alpha / norm, level.sigma / norm

  def field(z, phi):
    said, cos, sin = ask(z, phi)
    return cos * said.eps - sin * said.x0

  def finish(z, phi):
    return ask(z, phi)[0].x0.astype(x.dtype)

  ends = schedule(jnp.array([schedule.t_max, schedule.t_min]))
  first, last = angle(ends).astype(wide)
  norm = jnp.sqrt(ends.alpha[0]**2 + ends.sigma[0]**2)
  return (x.astype(wide) / norm, first, last), field, finish


def sample_adaptive(denoise, schedule, x, **control):
  """The probability flow from `x` [b ...] at t_max down, by steps that a tolerance allows.

  control: rtol, atol, max_steps, tableau of `adaptive`; each sample has an error and steps of its
  own, so `denoise` is shown levels [b 1 ...]. Ends with the x0 said at t_min. Returns (x0, the
  `Solution`, whose `done` says which samples came to their end). Song et al. 2021, "Score-Based
  Generative Modeling through SDEs", sec. 4.3 (by an embedded method). Raises ValueError for a
  denoiser with memory.
  """
  (z, first, last), field, finish = _flow(denoise, schedule, x)
  found = adaptive(field, z, first, last, **control)
  return finish(found.x, found.t), found


def sample_diffrax(denoise, schedule, x, solver=None, controller=None, steps=50, max_steps=4096):
  """The same flow by a solver of diffrax (the extra 'diffrax'), for all of the batch at once.

  solver: an ODE solver, diffrax.Tsit5() unless given; controller: its step sizes, `steps` equal
  ones in the angle unless given (then `steps` gives the first). Kidger 2021, "On Neural
  Differential Equations". Raises ImportError where diffrax is missing.
  """
  try:
    import diffrax
  except ImportError as error:
    raise ImportError("sample_diffrax needs diffrax: pip install 'diffax[diffrax]'") from error
  (z, first, last), field, finish = _flow(denoise, schedule, x)
  each = lambda phi: jnp.broadcast_to(phi, (x.shape[0],))
  found = diffrax.diffeqsolve(
      diffrax.ODETerm(lambda phi, z, args: field(z, each(phi))), solver or diffrax.Tsit5(),
      t0=first, t1=last, dt0=(last - first) / steps, y0=z, max_steps=max_steps,
      stepsize_controller=controller or diffrax.ConstantStepSize())
  return finish(found.ys[-1], each(last))


def sample_picard(
    sampler, denoise, rows, x, keys=None, *, window=8, tolerance=1e-3, noise=noises.independent):
  """Takes `window` steps of a sampler at once, by Picard's iteration, until they agree.

  Each iteration asks the network of all points of the window in one batch, and moves them by the
  sum of the steps before; those whose root mean square change is at most `tolerance` in every
  sample are settled, and the window moves on. With tolerance 0 it is `samplers.sample` up to
  rounding. For samplers and denoisers without memory (ddim, ddpm, euler); noise is that of
  `samplers.sample`. Returns (x, iterations). Shih et al. 2023, "Parallel Sampling of Diffusion
  Models", algorithm 1. Raises ValueError for a sampler or denoiser that remembers.
  """
  if jax.tree.leaves(sampler.init(x)) or isinstance(denoise, samplers.Denoiser):
    raise ValueError('sample_picard: steps are taken at once, so neither the sampler nor the '
                     'denoiser may remember: ddim, ddpm, euler, flow_euler, sde or consistency')
  count = jax.tree.leaves(rows)[0].shape[0]
  window = min(window, count)
  dtype, wide = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
  lacking = keys is None and noise in (noises.independent, noises.brownian)
  drawn = None if lacking else noise(keys, x.shape[1:], dtype)
  axes = tuple(range(2, x.ndim + 1))

  def move(x, row, number):
    def fresh(span, draw=0):
      if drawn is None:
        raise ValueError('this sampler draws noise: give keys=sample_keys(seed, index)')
      return drawn(number, draw, span).astype(wide)

    def ask(x, level):
      x = x.astype(dtype)
      said = predictions.estimate(denoise(x, level), x, level)
      return jax.tree.map(lambda a: a.astype(wide), said)

    return sampler.step(ask, x, sampler.init(x), row, fresh)[0] - x

  def iterate(carry):
    begin, path, tries = carry  # path: x at the window's `window + 1` ends
    at = jnp.minimum(begin + jnp.arange(window), count - 1)
    steps = jax.vmap(move)(path[:-1], jax.tree.map(lambda a: a[at], rows), at)
    live = begin + jnp.arange(window) < count
    steps = jnp.where(jnp.expand_dims(live, tuple(range(1, steps.ndim))), steps, 0.)
    moved = jnp.concatenate([path[:1], path[:1] + jnp.cumsum(steps, 0)])
    change = jnp.sqrt(jnp.square(moved - path).mean(axes)).max(1)[1:]  # [window]
    # The first step began at a settled point, so its end is right whatever it changed.
    settled = 1 + jnp.cumprod(change[1:] <= tolerance).sum() if window > 1 else jnp.int32(1)
    ahead = jnp.minimum(settled + jnp.arange(window + 1), window)
    return begin + settled, moved[ahead], tries + 1

  start = jnp.int32(0), jnp.broadcast_to(x.astype(wide), (window + 1, *x.shape)), jnp.int32(0)
  _, path, tries = jax.lax.while_loop(lambda carry: carry[0] < count, iterate, start)
  return path[0].astype(dtype), tries
