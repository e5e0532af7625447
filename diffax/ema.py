"""Averages of parameters over a run: exponential ones, and powers of time whose width may be chosen
after training.

  ema <- d ema + (1 - d) params

A number is a decay: d = min(decay, (1 + n) / (10 + n)) after n updates, so that the average starts
at the parameters themselves and forgets them quickly.

'power_S' is a power function of time, as wide as S times the run however long that is:

  d = (1 - 1 / t)^(gamma + 1) at update t = 1, 2, ...   so that after update T those of update k
  weigh (k / T)^(gamma + 1) - ((k - 1) / T)^(gamma + 1),   about (gamma + 1) k^gamma / T^(gamma + 1)

Averages of two widths, stored now and then, span those of any width between and beyond at any time
up to the last: `weights` finds what combination comes nearest, `reconstruct` makes it.
Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", sec. 3 and
app. C.
"""

import jax
import jax.numpy as jnp
import numpy as np

POWER = 'power_'
WIDEST = 12**-0.5  # of the mean of all parameters, gamma = 0
CHUNK = 4096  # updates whose weights are held at once
NOTHING = 'ema: no stored averages to reconstruct one from; at least one is needed'
REMEDY = "or 'power_S' with a relative width S, as 'power_0.05'"


def gamma(relative):
  """The exponent for a relative width S in (0, 0.289): (g + 1) = S^2 (g + 2)^2 (g + 3).

  S is the standard deviation of the power's profile over the length of the run; algorithm 2.
  Raises ValueError for a width outside.
  """
  if not 0 < relative < WIDEST:
    raise ValueError(f'ema: relative width {relative} is outside (0, {WIDEST:.4f})')
  scale = relative**-2.0
  return float(np.roots([1, 7, 16 - scale, 12 - scale]).real.max())


def names(averages):
  """The names averages go by, as '0.999' or 'power_0.05'.

  Raises ValueError for a decay outside [0, 1), a width outside (0, 0.289), and other texts.
  """
  return tuple(map(_name, averages))


def _name(average):
  short = lambda number: f'{number:g}' if float(f'{number:g}') == number else repr(number)
  if not isinstance(average, str):
    if not 0 <= average < 1:
      raise ValueError(f'ema: decay {average!r} is outside [0, 1)')
    return short(average)
  if width(average) is None:
    raise ValueError(f'ema: {average!r} is no average: say a number, as 0.999, {REMEDY}')
  return POWER + short(width(average))


def width(name):
  """S of 'power_S', None of the name of a decay. Raises ValueError for an S outside (0, 0.289)."""
  if not name.startswith(POWER):
    return None
  try:
    found = float(name.removeprefix(POWER))
  except ValueError as error:
    raise ValueError(f'ema: {name!r} tells no number: say {REMEDY}') from error
  gamma(found)
  return found


def powers(names):
  """Those of the names that are powers', in order."""
  return [name for name in names if width(name) is not None]


def init(params, averages):
  """{name: a copy of params} for a list of averages."""
  return {name: jax.tree.map(jnp.copy, params) for name in names(averages)}


def update(ema, params, count):
  """The averages after update number `count` (0 for the first)."""
  def average(name, tree):
    share = _share(name, jnp.asarray(count, jnp.float32))
    return jax.tree.map(lambda e, p: e + share * (p - e), tree, params)
  return {name: average(name, tree) for name, tree in ema.items()}


def _share(name, count):
  """1 - d. For a power by its logarithm: 1 - 1 / t has few digits in float32 for a large t."""
  if width(name) is not None:
    return -jnp.expm1((gamma(width(name)) + 1) * jnp.log1p(-1 / (count + 1)))
  return 1 - jnp.minimum(float(name), (1. + count) / (10. + count))


# --- after training -------------------------------------------------------------------------------


def profile(k, step, relative):
  """What parameters of update `k` = 1, 2, ... weigh in a power average after update `step`.

  k, step: arrays that broadcast; relative: its width S. Float64, 0 beyond `step`; the sum over k is
  1.
  """
  power = gamma(relative) + 1
  k, step = np.asarray(k, np.float64), np.asarray(step, np.float64)
  with np.errstate(divide='ignore'):  # k = 1: nothing was before
    share = -np.expm1(power * np.log1p(-1 / k))
  left = np.exp(power * np.minimum(np.log(k) - np.log(step), 0))
  return np.where(k <= step, left * share, 0.)


def weights(stored, target):
  """What to multiply stored power averages with to come nearest to another: float64 [n].

  stored: [(step, relative width), ...]; target: (step, relative width), best at a step that is
  stored, for there its profile breaks off as theirs do. Least squares between the profiles, which
  knows no parameters; a stored average is itself. Algorithm 3, with sums over the updates in place
  of integrals. Raises ValueError for no stored one, a step below 1, a target beyond the last, and
  widths outside (0, 0.289).
  """
  if not len(stored):
    raise ValueError(NOTHING)
  first, last = (f(step for step, _ in stored) for f in (min, max))
  if first < 1 or not 1 <= target[0] <= last:
    raise ValueError(
      f'ema: cannot reconstruct the average at step {target[0]} from those stored at steps {first} '
      f'to {last}: steps begin at 1 and end with the last one stored'
    )
  products = _products([*stored, target])
  norm = np.sqrt(np.diag(products))  # from early to late they fall by orders of magnitude
  cosine = products / norm[:, None] / norm[None]
  answer, *_ = np.linalg.lstsq(cosine[:-1, :-1], cosine[:-1, -1], rcond=1e-14)
  return answer * norm[-1] / norm[:-1]


def _products(curves):
  """Sums over the updates of products of the profiles of [(step, width), ...]: [n n]."""
  steps, relative = (np.array(column) for column in zip(*curves))
  total = np.zeros((len(curves), len(curves)))
  for start in range(1, steps.max() + 1, CHUNK):
    k = np.arange(start, min(start + CHUNK, steps.max() + 1))
    live = np.flatnonzero(steps >= start)  # the rest weigh nothing from here on
    part = np.empty((len(live), len(k)))
    for one in np.unique(relative[live]):
      rows = relative[live] == one
      part[rows] = profile(k[None], steps[live][rows][:, None], one)
    total[np.ix_(live, live)] += part @ part.T
  return total


def reconstruct(trees, coefficients):
  """The sum of trees times their coefficients, in float64, in each leaf's own dtype: numpy arrays.

  trees: an iterable of as many, read one at a time. Raises ValueError for none, or another number.
  """
  total = None
  for tree, c in zip(trees, map(float, coefficients), strict=True):
    if total is None:
      kinds = jax.tree.map(lambda x: x.dtype, tree)
      total = jax.tree.map(lambda x: np.zeros(x.shape), tree)
    for sum_, x in zip(jax.tree.leaves(total), jax.tree.leaves(tree), strict=True):
      sum_ += c * np.asarray(x, np.float64)
  if total is None:
    raise ValueError(NOTHING)
  return jax.tree.map(lambda x, kind: x.astype(kind), total, kinds)
