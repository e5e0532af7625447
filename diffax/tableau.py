"""Tableaus: what the samplers' plans are made of.

A sampler is three pure functions, `Sampler`; nearly all have one step, that of a tableau,

  x' = sum_j a_j x0_j + sum_j b_j eps_j + fresh noise,

x0_j and eps_j being what the denoiser said j calls ago. x itself needs no memory, being alpha x0 +
sigma eps, as said. Multistep methods weigh the past, Runge-Kutta methods their stages: only the
weights, which are data, tell them apart. Here are that step, two variations on it, and the weights
of exponential integrators, for `samplers.py` and for samplers of one's own.
"""

from typing import Any, NamedTuple
from collections.abc import Callable

import einops
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from diffax import schedules
from diffax.schedules import Level


class Sampler(NamedTuple):
  plan: Callable[..., Any]
  init: Callable[[Array], Any]
  step: Callable[..., tuple[Array, Any]]


class Path(NamedTuple):
  """Steps from times t to times s, [n ...] each; where the next t is above s, x is noised again."""

  t: Array
  s: Array


# --- the tableau ----------------------------------------------------------------------------------


class Steps(NamedTuple):
  """The steps of a grid, [n ...] each.

  t, s: levels left and reached. age: how many steps before led here without a jump. keep, lift: x
  is made `keep x + lift noise` before a step; None where nothing is ever added.
  """

  t: Level
  s: Level
  age: Array
  keep: Any = None
  lift: Any = None

  @property
  def r(self):
    return shrink(self.t, self.s)

  @property
  def h(self):
    return self.s.lam - self.t.lam


class Past(NamedTuple):
  """What was said in the last calls, [b calls ...]: call n at place n modulo their number."""

  x0: Any
  eps: Any


def shrink(t, s):
  """Noise-to-signal at s over that at t, exp(-h) of the DPM-Solver papers; finite at both ends."""
  return (t.alpha * s.sigma) / (s.alpha * t.sigma)


def walk(schedule, ts):
  """The `Steps` of falling (or rising) times [n + 1 ...], or of a `Path`."""
  if not isinstance(ts, Path):
    t, s = schedule(ts[:-1]), schedule(ts[1:])
    age = jnp.zeros_like(t.t) + _column(jnp.arange(len(t.t)), t.t)
    return Steps(t, s, age)
  return _jumps(Steps(schedule(ts.t), schedule(ts.s), None))


def _column(a, like):
  """[n] as [n 1 ...], for per-example and per-frame levels."""
  return einops.rearrange(a, 'n -> n' + ' 1' * (like.ndim - 1))


def _jumps(steps):
  """Steps whose t lies above where the step before ended: x is noised up to it first."""
  t, s = steps.t, steps.s
  came = jax.tree.map(lambda a, b: jnp.concatenate([a[:1], b[:-1]]), t, s)
  jump = t.sigma * came.alpha > came.sigma * t.alpha
  keep = jnp.where(jump, t.alpha / came.alpha, 1.)
  lift = jnp.sqrt(jnp.where(jump, jnp.maximum(t.sigma**2 - (keep * came.sigma)**2, 0.), 0.))
  number = _column(jnp.arange(len(t.t)), t.t)
  last = jax.lax.cummax(jnp.where(jump, number, 0), axis=0)
  return Steps(t, s, number - last, keep, lift)


def churned(schedule, ts, s_churn, s_tmin, s_tmax, s_noise):
  """Steps that begin with more noise; Karras et al. 2022, algorithm 2."""
  steps = walk(schedule, ts)
  if not s_churn:
    return steps
  t = steps.t
  rise = jnp.where(
      (s_tmin <= t.nsr) & (t.nsr <= s_tmax) & (t.alpha > 0),  # pure noise needs no more of it
      min(s_churn / len(t.t), 2**0.5 - 1), 0.)
  lifted = schedule(schedules.inverse(schedule, t.lam - jnp.log1p(rise)))
  at = jax.tree.map(lambda high, low: jnp.where(rise > 0, high, low), lifted, t)
  keep = jnp.where(rise > 0, at.alpha / jnp.where(t.alpha == 0, 1., t.alpha), 1.)
  lift = jnp.sqrt(jnp.where(rise > 0, jnp.maximum(at.sigma**2 - (keep * t.sigma)**2, 0.), 0.))
  if steps.lift is not None:  # what a jump before left
    lift, keep = jnp.hypot(lift, keep * steps.lift), keep * steps.keep
  return steps._replace(t=at, keep=keep, lift=s_noise * lift)


def linear(plan, x0=1, eps=1):
  """A sampler of rows that weigh the last `x0` clean estimates and `eps` noises."""
  def numbered(schedule, ts, clean=True):
    rows = plan(schedule, ts, clean)
    return {**rows, 'number': jnp.arange(len(rows['level'].t))}

  def init(x):
    ring = lambda calls: jnp.zeros((len(x), calls, *x.shape[1:]), x.dtype) if calls > 1 else ()
    return Past(ring(x0), ring(eps))

  def step(denoise, x, memory, row, noise):
    x = lifted(x, row, noise)
    said = denoise(x, row['level'])
    x0s, x = _remember(memory.x0, said.x0, row['x0'], row['number'])
    epss, by_eps = _remember(memory.eps, said.eps, row['eps'], row['number'])
    x += by_eps
    if 'fresh' in row:
      x += _scaled(row['fresh'], noise, row['span'])
    return x, Past(x0s, epss)

  return Sampler(numbered, init, step)


def _remember(ring, said, weights, number):
  """The ring with what was said in its place, and its weighted sum; weights are newest first.

  Written in place: were the past moved along instead, each call would copy it.
  """
  calls = len(weights)
  if calls == 1:
    return ring, weights[0] * said
  ring = jax.lax.dynamic_update_index_in_dim(ring, said, number % calls, 1)
  placed = jnp.stack(weights)[(number - jnp.arange(calls)) % calls]
  return ring, sum(placed[j] * ring[:, j] for j in range(calls))


def _dot(weights, arrays):
  return sum(w * a for w, a in zip(weights, arrays))


def _scaled(scale, noise, span, draw=0):
  """Noise times its scale; none is drawn where that is zero."""
  like = jax.eval_shape(noise, span, draw)
  return jax.lax.cond(
      jnp.any(scale > 0), lambda: scale * noise(span, draw), lambda: jnp.zeros_like(like))


def lifted(x, row, noise):
  """x as a row's step begins with it."""
  if 'lift' in row:
    x = row['keep'] * x + _scaled(row['lift'], noise, row['span'], 1)
  return x


def rows(steps, level, x0, eps, fresh=None, to=None, first=True):
  """A row for each step. x0, eps: weights, newest first. to: the lambda that its noise leads to."""
  zero = jnp.zeros_like(steps.t.alpha)
  row = dict(level=level, x0=tuple(zero + w for w in x0), eps=tuple(zero + w for w in eps))
  if fresh is not None:
    row['fresh'] = zero + fresh
  if steps.lift is not None:
    row |= dict(keep=steps.keep, lift=steps.lift) if first else dict(keep=zero + 1., lift=zero)
  if 'fresh' in row or 'lift' in row:
    row['span'] = steps.t.lam, steps.s.lam if to is None else to
  return row


# --- exponential integrators ----------------------------------------------------------------------
#
# In lambda both forms of the flow are linear but for what the network says,
#   x_s = (sigma_s / sigma_t) x_t + alpha_s int_t^s e^(-(lam_s - lam)) x0 dlam
#   x_s = (alpha_s / alpha_t) x_t - sigma_s int_t^s e^(+(lam_s - lam)) eps dlam,
# one with c = 1, the other with c = -1; the reverse SDE of noise eta is the first with c = 1 + eta.

_POINTS, _SHARES = (np.array(a) / 2 for a in np.polynomial.legendre.leggauss(16))
_POINTS += 0.5


def exponential(c):
  """The kernel c exp(-c (h - u)), u the way in lambda from t."""
  c = jnp.asarray(c)
  c = c[None] if c.ndim else c
  return lambda u, h, lam: c * jnp.exp(-c * (h - u))


def in_lam(u, lam):
  """Polynomials in lambda."""
  del lam
  return u


def in_nsr(u, lam):
  """Polynomials in sigma / alpha, up to a factor."""
  del lam
  return jnp.exp(-u)


def _integrals(kernel, lam, h, nodes, place):
  """int_0^h kernel(u) L_j(u) du for the Lagrange polynomials L_j through `nodes`, in lambda from t.

  place: (way in lambda from t, lambda at t) -> coordinate in which they are polynomials. By Gauss's
  16 points: exact to rounding for any step between finite levels.
  """
  v, share = (_column(jnp.asarray(a, h.dtype), h[None]) for a in (_POINTS, _SHARES))
  lam, h = lam[None], h[None]
  u = v * h  # [16 n ...]
  y, ys = place(u, lam), [place(node[None], lam) for node in nodes]
  weight = share * h * kernel(u, h, lam)

  def integral(j):
    basis = weight
    for k, other in enumerate(ys):
      basis = basis * ((y - other) / (ys[j] - other)) if k != j else basis
    return basis.sum(0)

  return [integral(j) for j in range(len(nodes))]


def phi2(z):
  """z phi_2(-z) = 1 - (1 - e^-z) / z, without cancellation.

  Hochbruck & Ostermann 2010, "Exponential Integrators", on the phi functions.
  """
  v, share = (_column(jnp.asarray(a, z.dtype), z[None]) for a in (_POINTS, _SHARES))
  return (share * z[None] * v * jnp.exp(-z[None] * (1 - v))).sum(0)


def adams(steps, order, kernel, place=in_lam, along=lambda level: level.lam):
  """Weights of the last order - 1 calls less the present one, of the polynomial through all.

  along: the variable of integration. As many calls are used as lie where it is finite since the
  last jump; none where the step itself is infinite: there it is DDIM's. Hochbruck & Ostermann 2010,
  "Exponential Integrators", on multistep methods.
  """
  lam = along(steps.t)
  h = along(steps.s) - lam
  good = jnp.isfinite(h)
  h, at = jnp.where(good, h, 1.), jnp.where(good, lam, 0.)
  nodes, weights = [jnp.zeros_like(h)], [jnp.zeros_like(h)] * (order - 1)
  for j in range(1, order):
    u = before(lam, j) - lam
    good &= (steps.age >= j) & jnp.isfinite(u)
    nodes.append(jnp.where(good, u, -j * jnp.sign(h)))
    higher = _integrals(kernel, at, h, nodes, place)[1:]
    weights[:j] = [jnp.where(good, a, b) for a, b in zip(higher, weights)]
  return weights


def before(a, j=1):
  """What `a` [n ...] was j steps before; the first value where there was none."""
  return jnp.concatenate([a[:1]] * min(j, len(a)) + [a[:-j]])


def multistep(steps, past, eta=0.):
  """Rows of DDIM's step, the clean estimates before weighed by `past`; noise of the SDE `eta`."""
  t, s, r = steps.t, steps.s, steps.r
  fresh = s.sigma * jnp.sqrt(jnp.maximum(1 - r**(2 * eta), 0.)) if eta else None
  return rows(steps, t, (s.alpha - sum(past), *past), (s.sigma * r**eta,), fresh)


def multistep_eps(steps, past):
  """The same of noises, without noise."""
  return rows(steps, steps.t, (steps.s.alpha,), (steps.s.sigma - sum(past), *past))


# --- Runge-Kutta ----------------------------------------------------------------------------------


def runge_kutta(steps, asked, targets, x0, eps, clean, fresh=None):
  """Rows of methods with several calls a step.

  asked: levels of the calls after the first. targets: the level each row leads to, whose sigma is
  the noise that is kept. Row k is DDIM's step from the start to targets[k], corrected by what calls
  1 to k said less what the first said: x0[k - 1] and eps[k - 1] are their weights, None for none.
  The last step to clean data is DDIM's and has one call. Hochbruck & Ostermann 2010, "Exponential
  Integrators", where the weights are exponential.
  """
  size, stages = len(targets), []
  only = only_call(steps, clean)
  for k, (level, to) in enumerate(zip([steps.t, *asked], targets)):
    if k == 0:
      to = jax.tree.map(lambda a, b: jnp.where(only, a, b), targets[-1], to)
    weights = []
    for end, fixes in ((to.alpha, x0), (to.sigma, eps)):
      weight = [jnp.zeros_like(end)] * size
      weight[k] = end
      for j, fix in enumerate(fixes[k - 1] if k and fixes else (), 1):
        weight[k - j], weight[k] = weight[k - j] + fix, weight[k] - fix
      weights.append(weight)
    stages.append(rows(
        steps, level, *weights, fresh[k] if fresh else None, to.lam, first=k == 0))
  return weave(stages, clean)


def weave(stages, clean):
  """The rows of a step's calls one after the other; of the last to clean data only the first."""
  whole = jax.tree.map(
      lambda *rows: einops.rearrange(list(rows), 'stages n ... -> (n stages) ...'), *stages)
  return jax.tree.map(lambda a: a[:len(a) - (len(stages) - 1 if clean else 0)], whole)


def only_call(steps, clean):
  """Which steps have one call: the last one, where it leads to clean data."""
  number = _column(jnp.arange(len(steps.t.t)), steps.t.t)
  return (number == len(number) - 1) & clean


def between(schedule, steps, r, kept=None):
  """(level, h): a point r of the way in lambda and the way's length, taken for 2 where infinite.

  kept: the noise at s, where that is less than s's own (ancestral steps end below it).
  """
  low = steps.t.lam
  high = steps.s.lam if kept is None else jnp.log(steps.s.alpha) - jnp.log(kept)
  # From pure noise a point e^2 above s will do: farther out a schedule may have no times to tell.
  near = jnp.where(jnp.isfinite(high), high, jnp.where(jnp.isfinite(steps.s.lam), steps.s.lam, 0.))
  low = jnp.where(jnp.isfinite(low), low, near - 2)
  high = jnp.where(jnp.isfinite(high), high, low + 2 * jnp.sign(high))
  return schedule(schedules.inverse(schedule, low + r * (high - low))), high - low


def ancestral(t, s, eta):
  """(what is kept of s's noise, as a level; what is drawn); Song et al. 2020, "DDIM", eq. 16."""
  left = shrink(t, s)**2
  fresh = eta * s.sigma * jnp.sqrt(jnp.maximum(1 - left, 0.))
  kept = jnp.where(left < 1, 1 - eta**2 + eta**2 * left, 1.)  # 1 - fresh^2 would cancel
  return s._replace(sigma=s.sigma * jnp.sqrt(jnp.maximum(kept, 0.))), fresh


# --- pseudo numerical methods ---------------------------------------------------------------------


BASHFORTH = {  # newest first; Liu et al. 2022, "PNDM", eq. 9 and 12
    1: (1.,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def noise_rise(t, s):
  """How x_s changes with the noise of DDIM's step from t, x_t being given; 0 from alpha = 0."""
  ratio = s.alpha / jnp.where(t.alpha > 0, t.alpha, jnp.inf)
  return jnp.where(t.alpha > 0, s.sigma - ratio * t.sigma, 0.)


class PseudoMemory(NamedTuple):
  """What was said where the step began, a sum over its calls, and the noises of steps before."""

  x0: Array
  total: Array
  eps: tuple


def pseudo(table):
  """Samplers by DDIM's step with another noise, their rows told by a table.

  table(n, clean): rows (step, where asked, where to, whether the step's first call, and the weights
  of the noise said now, in the sum, of the sum, and of the first calls of steps, newest first).
  """
  def plan(schedule, ts, clean=True):
    steps = walk(schedule, ts)
    if steps.lift is not None:
      raise ValueError('pndm and plms take falling times, no path that rises again')
    told = table(len(steps.t.t), clean)
    index = np.array([row[0] for row in told])
    t, s = jax.tree.map(lambda a: a[index], (steps.t, steps.s))
    places = dict(t=t, s=s, mid=schedule((t.t + s.t) / 2))

    def at(which):
      chosen = [jax.tree.map(lambda a, k=k: a[k], places[row[which]]) for k, row in enumerate(told)]
      return jax.tree.map(lambda *a: jnp.stack(a), *chosen)

    def weights(values):
      return _column(jnp.asarray(values, t.t.dtype), t.t) + jnp.zeros_like(t.t)

    to = at(2)
    rise = noise_rise(t, to)
    past = [rise * weights([(*row[7], 0., 0., 0., 0.)[j] for row in told]) for j in range(4)]
    past[0] += to.sigma - rise
    _, _, _, first, now, add, total, _ = zip(*told)
    return dict(
        level=at(1), first=weights(first) > 0, add=weights(add), alpha=to.alpha,
        now=rise * weights(now), total=rise * weights(total), eps=tuple(past))

  def init(x):
    zero = jnp.zeros_like(x)
    return PseudoMemory(zero, zero, (zero,) * 4)

  def step(denoise, x, memory, row, noise):
    said, first = denoise(x, row['level']), row['first']
    pushed = PseudoMemory(said.x0, jnp.zeros_like(x), (said.eps, *memory.eps[:-1]))
    memory = jax.tree.map(lambda a, b: jnp.where(first, a, b), pushed, memory)
    memory = memory._replace(total=memory.total + row['add'] * said.eps)
    x = row['alpha'] * memory.x0 + row['now'] * said.eps + row['total'] * memory.total
    return x + _dot(row['eps'], memory.eps), memory

  return Sampler(plan, init, step)


# --- predictors with correctors -------------------------------------------------------------------


class CorrectedMemory(NamedTuple):
  """x as corrected last, the noise added since, and the clean estimates before, newest first."""

  x: Array
  drawn: Array
  x0: tuple


def corrected(plan, depth):
  """A sampler of `corrected_rows`, which remembers the last `depth` clean estimates."""
  def init(x):
    return CorrectedMemory(x, jnp.zeros_like(x), (jnp.zeros_like(x),) * (depth - 1))

  def step(denoise, x, memory, row, noise):
    x = lifted(x, row, noise)
    said = denoise(x, row['level']).x0
    x0s = (said, *memory.x0)
    fixed = row['again'] * memory.x + memory.drawn + _dot(row['fix'], x0s)
    base = jnp.where(row['begins'], x, fixed)
    x, drawn = row['hold'] * base + _dot(row['past'], x0s), memory.drawn
    if 'fresh' in row:
      drawn = _scaled(row['fresh'], noise, row['span'])
      x += drawn
    return x, CorrectedMemory(base, drawn, x0s[:depth - 1])

  return Sampler(plan, init, step)


def correct(steps, order, kernel):
  """Weights in a step's end of what is said there, then of the calls before its beginning, all less
  what was said at the beginning; of the polynomial through `order` + 1 of them."""
  lam, h = steps.t.lam, steps.h
  good = jnp.isfinite(h)
  h, at = jnp.where(good, h, 1.), jnp.where(good, lam, 0.)
  nodes, weights = [jnp.zeros_like(h), h], [jnp.zeros_like(h)] * order
  for j in range(order):
    if j:
      u = before(lam, j) - lam
      good &= (steps.age >= j) & jnp.isfinite(u)
      nodes.append(jnp.where(good, u, -j * jnp.sign(h)))
    higher = _integrals(kernel, at, h, nodes, in_lam)[1:]
    weights[:j + 1] = [jnp.where(good, a, b) for a, b in zip(higher, weights)]
  return weights


def corrected_rows(steps, past, fix, eta=None):
  """Rows that correct the step before by `fix` (empty: not), then take one with `past`.

  past: weights of the calls before, fix: those of `correct`. eta: noise of the SDE, None for none.
  """
  t, s, r = steps.t, steps.s, steps.r
  hold = s.sigma / t.sigma * (1. if eta is None else r**eta)
  plain = s.alpha - hold * t.alpha
  back = lambda a: before(jnp.zeros_like(hold) + a)
  begins = (steps.age < 1) if fix else jnp.ones_like(hold, bool)
  fix = (fix[0], plain - sum(fix), *fix[1:]) if fix else ()
  row = dict(
      level=t, hold=hold, past=(plain - sum(past), *past), begins=begins, again=back(hold),
      fix=tuple(map(back, fix)))
  if eta is not None:
    row['fresh'] = s.sigma * jnp.sqrt(jnp.maximum(1 - r**(2 * eta), 0.))
  if steps.lift is not None:
    row |= dict(keep=steps.keep, lift=steps.lift)
  return row | dict(span=(t.lam, s.lam))
