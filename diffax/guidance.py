"""Guidance: functions from denoisers to denoisers.

A conditional denoiser is `(x, level, cond) -> x0` or `-> Estimate`, with `cond` a dict of arrays of
one leading batch axis. Guidance binds the conditions and returns a plain `(x, level) -> Estimate`,
which any sampler takes, and any other function of this module. Most of it is one line,

  guided = cond + sum_i (scale_i - 1) (cond - other_i),

the others being the null condition, a negative prompt, or the same network perturbed. All branches
are one batch. A scale is a number, an array (a scalar, or one an example, `[b 1 1 1]`), or a
function of the level; scale 1 is no guidance, and there the branch is not computed.
"""

from collections.abc import Callable

import einops
import jax
from jax import Array
import jax.numpy as jnp

from diffax import predictions
from diffax import samplers
from diffax import schedules

Scale = Callable[[schedules.Level], Array]

PAPERS = {  # what to add to a paper's number for null + scale (cond - null)
    'ho': 1.,  # Ho & Salimans 2022, eq. 6: (1 + w) cond - w null
    'imagen': 0.,  # Saharia et al. 2022, eq. 2: w cond + (1 - w) null; Stable Diffusion and DiT too
    'autoguidance': 0.,  # Karras et al. 2024: w good + (1 - w) bad
    'pag': 1.,  # Ahn et al. 2024: cond + s (cond - perturbed); skip-layer guidance too
}


# --- scales ---------------------------------------------------------------------------------------


def scale_of(paper, number):
  """A scale as `paper`, a name in PAPERS, counts it, in the convention in which 1 is no guidance.

  Raises ValueError for another name.
  """
  if paper not in PAPERS:
    raise ValueError(f'paper={paper!r} is none of {", ".join(PAPERS)}')
  return number + PAPERS[paper]


def limited(scale, low=0., high=jnp.inf) -> Scale:
  """`scale` where the noise level sigma/alpha is in [low, high], 1 elsewhere.

  Kynkäänniemi et al. 2024, "Limited Interval", eq. 6.
  """
  def inside(level):
    value = scale(level) if callable(scale) else scale
    return jnp.where((low <= level.nsr) & (level.nsr <= high), value, 1.)
  return inside


def linear_scale(schedule, scale) -> Scale:
  """From 1 at t_max up to 2 scale - 1 at data, in a line; its mean over times is `scale`.

  Wang et al. 2024, "Analysis of Classifier-Free Guidance Weight Schedulers", linear.
  """
  return lambda level: 1 + 2 * (scale - 1) * (1 - level.t / schedule.t_max)


def cosine_scale(schedule, scale) -> Scale:
  """From 1 at t_max up to 2 scale - 1 at data, as half a cosine; its mean over times is `scale`.

  Wang et al. 2024, "Analysis of Classifier-Free Guidance Weight Schedulers", cosine.
  """
  return lambda level: 1 + (scale - 1) * (1 + jnp.cos(jnp.pi * level.t / schedule.t_max))


def at(scale, level, x):
  """The value of `scale` at `level`; ValueError where its shape could be mistaken against x's."""
  value = scale(level) if callable(scale) else scale
  if jnp.ndim(value) not in (0, x.ndim):
    raise ValueError(
        f'a scale of shape {jnp.shape(value)} for x of shape {x.shape}: allowed are one for all, '
        f'of shape (), or one an example, of shape {(len(x), *[1] * (x.ndim - 1))}')
  return value


# --- estimates ------------------------------------------------------------------------------------


def wide(tree):
  """Its arrays in float32 at the least, for arithmetic."""
  return jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), tree)


def _like(said, other):
  return jax.tree.map(lambda a, b: a.astype(b.dtype), said, other)


def _over(a, b):
  """a / b, and 0 where b = 0."""
  return jnp.where(b == 0, 0., a / jnp.where(b == 0, 1., b))


def _dot(a, b):
  """The inner product of each example, [b 1 1 1]."""
  return (a * b).sum(tuple(range(1, a.ndim)), keepdims=True)


def with_x0(said, x0, level):
  """`said` with another x0, and the noise that with it makes the same x; in `said`'s dtype."""
  by = x0 - wide(said.x0)
  eps = wide(said.eps) - _over(level.alpha, level.sigma) * by
  return said._replace(x0=x0.astype(said.x0.dtype), eps=eps.astype(said.eps.dtype))


def moved(said, row, by, level):
  """`said` with `by` more of a x0 + b eps, for the `row` (a, b), at the same x; in its dtype.

  As it was where the row says nothing (predictions.det is 0). A change g of the score is
  row (0, 1), by -sigma g: x0 += sigma^2 / alpha g, eps -= sigma g.
  """
  a, b = row
  step = _over(by, level.alpha * b - level.sigma * a)
  x0, eps = wide(said.x0) - level.sigma * step, wide(said.eps) + level.alpha * step
  return said._replace(x0=x0.astype(said.x0.dtype), eps=eps.astype(said.eps.dtype))


def plainly(made, *inner):
  """The `samplers.Denoiser` `made`, as a plain function if none of the `inner` ones remembers."""
  if any(isinstance(denoise, samplers.Denoiser) for denoise in inner):
    return made
  return lambda x, level: made.apply(x, level, made.init(x))[0]


def then(denoise, change):
  """`change(said, level) -> Estimate` of all that `denoise` says; what it remembers is kept."""
  inner = samplers.lift(denoise)
  def apply(x, level, memory):
    said, memory = inner.apply(x, level, memory)
    return change(said, level), memory
  return plainly(samplers.Denoiser(inner.init, apply), denoise)


# --- branches of one batch ------------------------------------------------------------------------


def condition(denoise, cond):
  """No guidance: binds `cond`."""
  return lambda x, level: denoise(x, level, cond)


def distilled(denoise, cond, scale):
  """Guidance distilled into the network, told the scale as cond['guidance'] [b]; one branch.

  Meng et al. 2023, "On Distillation of Guided Diffusion Models", sec. 3.1. `scale` is what the
  network was trained with, in its convention.
  """
  def guided(x, level):
    told = jnp.broadcast_to(jnp.ravel(jnp.asarray(at(scale, level, x), jnp.float32)), len(x))
    return predictions.estimate(denoise(x, level, {**cond, 'guidance': told}), x, level)
  return guided


def _branches(denoise, conds, x, level):
  """What `denoise` says under each of k conditions, in one batch: k estimates.

  The branches of an example lie side by side, so that a batch spread over devices stays so.
  """
  k, b = len(conds), len(x)
  weave = lambda *branches: einops.rearrange(list(branches), 'k b ... -> (b k) ...')
  own = lambda a: a.ndim and len(a) == b  # a level may be one for all
  xs = weave(*[x] * k)
  levels = jax.tree.map(lambda a: weave(*[a] * k) if own(a) else a, level)
  said = predictions.estimate(denoise(xs, levels, jax.tree.map(weave, *conds)), xs, levels)
  apart = jax.tree.map(lambda a: einops.rearrange(a, '(b k) ... -> k b ...', k=k), said)
  return [jax.tree.map(lambda a, i=i: a[i], apart) for i in range(k)]


def _ask(denoise, conds, scales, rule, x, level):
  """`rule(said, pushes, level) -> Estimate, more`, with branches left out where they do nothing.

  said: an estimate for each of `conds`, in float32 at the least; pushes: scale - 1, for each but
  the first. Branches whose push is 0 for all examples are left out from the back, where it is a
  number before anything runs, else at run time; the first remains.
  """
  used = [(cond, at(scale, level, x) - 1) for cond, scale in zip(conds[1:], scales)]
  fixed = lambda push: isinstance(push, (int, float))
  used = [(cond, push) for cond, push in used if not (fixed(push) and push == 0)]
  pushes = [push for _, push in used]

  def asker(count):
    def run(x, level, pushes):
      said = _branches(denoise, [conds[0], *(cond for cond, _ in used[:count])], x, level)
      out, more = rule(wide(said), pushes[:count], level)
      return _like(out, said[0]), more
    return run

  least = max([i for i, push in enumerate(pushes, 1) if fixed(push)], default=0)
  if least == len(pushes):
    return asker(least)(x, level, pushes)
  needed = jnp.stack([i * jnp.any(jnp.asarray(push) != 0) for i, push in enumerate(pushes, 1)])
  askers = [asker(count) for count in range(least, len(pushes) + 1)]
  return jax.lax.switch(needed.max() - least, askers, x, level, pushes)


def _line(said, pushes, level):
  """cond + sum_i push_i (cond - other_i), exactly cond where the pushes are 0."""
  del level
  cond, *others = said
  push = lambda a, *rest: a + sum(p * (a - b) for p, b in zip(pushes, rest))
  x0 = push(cond.x0, *(other.x0 for other in others))
  return cond._replace(x0=x0, eps=push(cond.eps, *(other.eps for other in others))), ()


def guide(denoise, cond, others, scales):
  """cond + sum_i (scale_i - 1) (cond - other_i), away from several conditions at once.

  others: list of conditions, scales: one for each. Put those that act more rarely last: only from
  the back are branches left out at run time. Raises ValueError where the lengths differ.
  """
  if len(others) != len(scales):
    raise ValueError(f'{len(others)} conditions and {len(scales)} scales: give one scale to each')
  return lambda x, level: _ask(denoise, [cond, *others], scales, _line, x, level)[0]


def cfg(denoise, cond, null, scale, low=0., high=jnp.inf):
  """Classifier-free guidance, null + scale (cond - null), both branches in one batch of 2b.

  Ho & Salimans 2022, eq. 6, in the convention in which scale 1 is no guidance. `low`, `high` bound
  the noise level sigma/alpha at which it acts (see `limited`), an example at a time where levels
  differ; with none inside, only the conditional branch is computed. `null` may hold a negative
  prompt.
  """
  everywhere = (low <= 0 and high == jnp.inf) or (isinstance(scale, (int, float)) and scale == 1)
  return guide(denoise, cond, [null], [scale if everywhere else limited(scale, low, high)])


def compose(denoise, conds, null, weights):
  """Several prompts, null + sum_i w_i (cond_i - null), in one batch of k + 1.

  Liu et al. 2022, "Compositional Visual Generation with Composable Diffusion Models",
  conjunction. weights: a scale for each of the k `conds`; a negative one forbids its prompt. The
  fraction of the first is kept. Where the weights are numbers that sum to 1 the null branch is not
  computed. Raises ValueError where the lengths differ.
  """
  if len(conds) != len(weights):
    raise ValueError(f'{len(conds)} conditions and {len(weights)} weights: give one to each')

  def scale(of):
    """of(weights), a function of the level where one of them is."""
    if not any(callable(w) for w in weights):
      return of(weights)
    return lambda level: of([w(level) if callable(w) else w for w in weights])

  rest = [scale(lambda values, i=i: 1 - values[i]) for i in range(1, len(conds))]
  return guide(denoise, conds[0], [*conds[1:], null], [*rest, scale(sum)])


def perturbed(denoise, cond, null, keep, scales, flag='keep'):
  """Away from the null condition, and from the same network with layers switched off; one batch.

  flag: 'attend' puts the identity in place of attention (Ahn et al. 2024, "Self-Rectifying
  Diffusion Sampling with Perturbed-Attention Guidance"), 'keep' skips whole layers (skip-layer
  guidance, Stable Diffusion 3.5). keep: [depth], 0 for the layers of the perturbed branch that are
  switched off, 1 for the others; the network is told cond[flag] [b depth]. scales: of the null
  branch and of the perturbed one; 1 leaves a branch out. Raises ValueError for a `keep` of another
  shape or another flag.
  """
  if flag not in ('keep', 'attend'):
    raise ValueError(f"flag={flag!r} is neither 'keep' (skip layers) nor 'attend' (attention)")
  keep = jnp.asarray(keep, jnp.float32)
  if keep.ndim != 1:
    raise ValueError(f'keep of shape {keep.shape}: give one number a layer, of shape (depth,)')
  def guided(x, level):
    weak = jnp.broadcast_to(keep, (len(x), len(keep)))
    whole = lambda cond: {**cond, flag: jnp.ones_like(weak)}
    others = [whole(null), {**cond, flag: weak}]
    return guide(denoise, whole(cond), others, scales)(x, level)
  return guided


def rescale(denoise, cond, null, scale, phi=0.7, of='v'):
  """Classifier-free guidance brought back towards the deviation of the conditional branch.

  Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", sec. 3.4, whose
  network says v: of='v' brings back v, of='eps' the noise, as is usual with networks that say it.
  The standard deviation is over each example's values; phi in [0, 1] from none of it to all. Raises
  ValueError for another `of`.
  """
  rows = {'v': lambda level: (-level.sigma, level.alpha), 'eps': lambda level: (0., 1.)}
  if of not in rows:
    raise ValueError(f'rescale: of={of!r} is none of {", ".join(rows)}')
  def rule(said, pushes, level):
    guided, _ = _line(said, pushes, level)
    a, b = rows[of](level)
    target = lambda e: a * e.x0 + b * e.eps
    std = lambda x: jnp.std(x, tuple(range(1, x.ndim)), keepdims=True)
    factor = _over(std(target(said[0])), std(target(guided)))
    return moved(guided, (a, b), phi * (factor - 1) * target(guided), level), ()
  return lambda x, level: _ask(denoise, [cond, null], [scale], rule, x, level)[0]


def cfg_pp(denoise, cond, null, scale):
  """CFG++: x0 = null + scale (cond - null), renoised with the null branch's noise; scale in [0, 1].

  Chung et al. 2024, "CFG++: Manifold-constrained Classifier Free Guidance", algorithm 2. At scale 0
  the null condition alone, at 1 not the condition alone: the noise is the null's still. For
  samplers that go on from x0 and eps as said; the paper's step is `samplers.ddim`. Raises
  ValueError for a number outside [0, 1].
  """
  if isinstance(scale, (int, float)) and not 0 <= scale <= 1:
    raise ValueError(f'cfg_pp: scale={scale} is outside [0, 1]; a tenth of a scale of cfg is right')
  def guided(x, level):
    said = _branches(denoise, [cond, null], x, level)
    good, bad = wide(said)
    x0 = bad.x0 + at(scale, level, x) * (good.x0 - bad.x0)
    return _like(good._replace(x0=x0, eps=bad.eps), said[0])
  return guided


def cfg_zero(denoise, schedule, cond, null, scale):
  """CFG-Zero*: s v_null + scale (v_cond - s v_null), of the s that brings v_null nearest to v_cond.

  Fan et al. 2025, "CFG-Zero*", optimized scale: s = <v_cond, v_null> / |v_null|^2 of each example,
  for velocities dx_t/dt. The other half of the method is `zero_init`.
  """
  prediction = predictions.velocity(schedule)
  def rule(said, pushes, level):
    if not pushes:
      return said[0], ()
    row = prediction.row(level)
    good, bad = (row[0] * e.x0 + row[1] * e.eps for e in said)
    s = _over(_dot(good, bad), _dot(bad, bad))
    return moved(said[0], row, pushes[0] * (good - s * bad), level), ()
  return lambda x, level: _ask(denoise, [cond, null], [scale], rule, x, level)[0]


def zero_init(denoise, schedule, fraction=0.04):
  """Velocity 0 in the first `fraction` of times, t > (1 - fraction) t_max: x stays where it is.

  Fan et al. 2025, "CFG-Zero*", zero-init. Of a uniform grid of n steps that is the first
  fraction n, rounded up.
  """
  prediction = predictions.velocity(schedule)
  last = (1 - fraction) * schedule.t_max * (1 + 1e-6)  # so that rounding takes no step more
  def change(said, level):
    a, b = prediction.row(level)
    velocity = a * wide(said.x0) + b * wide(said.eps)
    return moved(said, (a, b), jnp.where(level.t > last, -velocity, 0.), level)
  return then(denoise, change)


def apg(denoise, cond, null, scale, eta=0., norm=15., momentum=-0.5):
  """Adaptive projected guidance: what is parallel to the conditional x0 counts `eta` times.

  Sadat et al. 2024, "Eliminating Oversaturation and Artifacts of High Guidance Scales":
  cond - null, to which `momentum` times the one before is added (a negative one looks away from
  it), is cut to the length `norm` (over all values of an example, so it goes with their number),
  split along cond and across, and added scale - 1 times. Defaults are those for Stable Diffusion
  XL. Remembers: a `samplers.Denoiser`.
  """
  def apply(x, level, before):
    def rule(said, pushes, level):
      if not pushes:
        return said[0], before
      x0 = said[0].x0
      push = x0 - said[1].x0 + momentum * before
      cut = push * jnp.minimum(1., _over(norm, jnp.sqrt(_dot(push, push))))
      along = _over(_dot(cut, x0), _dot(x0, x0)) * x0
      return with_x0(said[0], x0 + pushes[0] * (cut - along + eta * along), level), push
    return _ask(denoise, [cond, null], [scale], rule, x, level)
  return samplers.Denoiser(lambda x: wide(jnp.zeros_like(x)), apply)


# --- of bound denoisers ---------------------------------------------------------------------------


def autoguide(denoise, weak, scale):
  """weak + scale (denoise - weak), of two networks: guidance by a bad version of itself.

  Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself". Both are
  denoisers of (x, level), guided themselves or not, and may remember. The weak one is not asked
  where the scale is 1.
  """
  good, bad = samplers.lift(denoise), samplers.lift(weak)

  def apply(x, level, memory):
    ours, theirs = memory
    said, ours = good.apply(x, level, ours)
    push = at(scale, level, x) - 1
    def both(theirs):
      other, theirs = bad.apply(x, level, theirs)
      return _like(_line(wide([said, other]), [push], level)[0], said), theirs
    alone = lambda theirs: (said, theirs)
    if isinstance(push, (int, float)):
      out, theirs = (both if push else alone)(theirs)
    else:
      out, theirs = jax.lax.cond(jnp.any(push != 0), both, alone, theirs)
    return out, (ours, theirs)

  made = samplers.Denoiser(lambda x: (good.init(x), bad.init(x)), apply)
  return plainly(made, denoise, weak)


def classifier(denoise, log_prob, scale=1.):
  """Adds `scale` times the gradient of log p(y | x_t) to the score.

  Dhariwal & Nichol 2021, algorithm 2: eps - sigma scale grad log p. log_prob: (x, level) -> [b].
  Where alpha = 0 nothing of y is in x, and nothing is changed.
  """
  inner = samplers.lift(denoise)
  def apply(x, level, memory):
    said, memory = inner.apply(x, level, memory)
    slope = jax.grad(lambda x: log_prob(x, level).sum())(x)
    by = -level.sigma * at(scale, level, x) * wide(slope)
    return moved(said, (0., 1.), by, level), memory
  return plainly(samplers.Denoiser(inner.init, apply), denoise)


def threshold(denoise, bound=1.):
  """x0 cut to [-bound, bound], and the noise that goes with it; Saharia et al. 2022, sec. 2.3."""
  return then(denoise, lambda said, level: with_x0(
      said, jnp.clip(wide(said.x0), -bound, bound), level))


def dynamic_threshold(denoise, percentile=0.995, bound=1.):
  """x0 cut at that quantile q of its absolute values, at `bound` the least, and brought to `bound`.

  Saharia et al. 2022, "Photorealistic Text-to-Image Diffusion Models", sec. 2.3; q of
  each example. The noise goes with x0.
  """
  def change(said, level):
    x0 = wide(said.x0)
    q = jnp.quantile(jnp.abs(x0), percentile, axis=tuple(range(1, x0.ndim)), keepdims=True)
    q = jnp.maximum(q, bound)
    return with_x0(said, jnp.clip(x0, -q, q) * (bound / q), level)
  return then(denoise, change)


# --- sizes beyond training's ----------------------------------------------------------------------


def windows(denoise, side, overlap):
  """A conditional denoiser that sees x [b h w c] by windows of `side` places, and joins the parts.

  Windows overlap by `overlap` places at the least and are weighed less towards their edges; what
  cond has of x's size is cut alike. Bar-Tal et al. 2023, "MultiDiffusion", eq. 5. One after the
  other, so that memory is that of one window. Raises ValueError where side and overlap do not fit.
  """
  if not 0 <= overlap < side:
    raise ValueError(f'windows: overlap={overlap} is not within 0 and side={side}')

  def joined(x, level, cond):
    h, w = x.shape[1:3]
    if h <= side and w <= side:
      return predictions.estimate(denoise(x, level, cond), x, level)
    sides = min(side, h), min(side, w)
    rows, columns = (_starts(n, s, overlap) for n, s in zip((h, w), sides))
    places = jnp.asarray([(i, j) for i in rows for j in columns])
    ramp = lambda n: jnp.minimum(jnp.arange(n) + 1, jnp.arange(n)[::-1] + 1) / n
    weight = (ramp(sides[0])[:, None] * ramp(sides[1])[None])[None, :, :, None]
    cut = lambda a, at: jax.lax.dynamic_slice(
      a, (0, *at, 0), (len(a), *sides, a.shape[-1]))
    own = lambda a, at: cut(a, at) if a.ndim == 4 and a.shape[1:3] == (h, w) else a

    def one(total, at):
      part = cut(x, at)
      said = denoise(part, level, jax.tree.map(lambda a: own(a, at), cond))
      said = wide(predictions.estimate(said, part, level))
      add = lambda whole, more: jax.lax.dynamic_update_slice(
        whole, cut(whole, at) + weight * more, (0, *at, 0))
      return jax.tree.map(add, total, (said, jnp.ones_like(weight))), None

    shapes = jax.eval_shape(lambda: wide(predictions.estimate(
      denoise(cut(x, (0, 0)), level, jax.tree.map(lambda a: own(a, (0, 0)), cond)),
      cut(x, (0, 0)), level)))
    empty = jax.tree.map(lambda a: jnp.zeros((len(x), h, w, a.shape[-1]), a.dtype), shapes)
    (said, total), _ = jax.lax.scan(one, (empty, jnp.zeros((1, h, w, 1))), places)
    return jax.tree.map(lambda a: (a / total).astype(x.dtype), said)

  return joined


def _starts(length, side, overlap):
  """Where windows of `side` begin so that they cover `length`, evenly apart."""
  count = 1 if length <= side else -(-(length - overlap) // (side - overlap))
  return [round(i * (length - side) / max(count - 1, 1)) for i in range(count)]
