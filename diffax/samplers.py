"""Samplers, from noise to data.

A sampler is three pure functions, as in optax:

  plan(schedule, ts) -> rows       the grid as data, a row a network call: level and coefficients
  init(x) -> memory                what it remembers between calls
  step(denoise, x, memory, row, noise) -> x, memory

`sample` drives any of them with one `lax.scan`. Levels and coefficients are data, so a compiled
program serves every schedule and grid of a length. Control flow looks at a row's flags alone.

A denoiser is `(x, level) -> x0`, or `-> Estimate`, or, where it remembers, a `Denoiser`. Noise is
keyed by sample, so that sample 7 is the same alone and among a thousand.
"""

from typing import Any, NamedTuple
from collections.abc import Callable

import einops
import jax
from jax import Array
import jax.numpy as jnp

from diffax import predictions
from diffax import schedules


SAMPLING = 2**32 - 1  # in place of a training step, where keys are made


class Sampler(NamedTuple):
  plan: Callable[..., Any]
  init: Callable[[Array], Any]
  step: Callable[..., tuple[Array, Any]]


class Denoiser(NamedTuple):
  """A denoiser with memory (momentum, self-conditioning): init(x), apply(x, level, memory)."""

  init: Callable[[Array], Any]
  apply: Callable[..., tuple[predictions.Estimate, Any]]


def lift(denoise):
  """A `Denoiser` from a plain `(x, level) -> x0` or `-> Estimate`; one stays."""
  if isinstance(denoise, Denoiser):
    return denoise
  def apply(x, level, memory):
    return predictions.estimate(denoise(x, level), x, level), memory
  return Denoiser(lambda x: (), apply)


def sample_keys(seed, index):
  """A key for each sample: of (seed, sample index) alone. index: integers [b]. Returns keys [b].

  No key of a training step is among them: those are folded from steps, none of which is SAMPLING.
  """
  root = jax.random.fold_in(jax.random.key(seed), SAMPLING)
  return jax.vmap(jax.random.fold_in, (None, 0))(root, jnp.asarray(index))


def normal(keys, shape, dtype=jnp.float32):
  """Unit noise [b *shape], an example a key."""
  return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def initial(schedule, ts, keys, shape, dtype=jnp.float32):
  """Where sampling begins: noise of the level of ts[0], [b *shape] for keys [b]."""
  return schedules.start(schedule, ts[0], normal(_fold(keys, 0), shape, dtype))


def _fold(keys, number):
  return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def sample(sampler, denoise, rows, x, keys=None):
  """Walks `x` down the rows of `sampler.plan(schedule, ts)`; jit it, or call it as it is.

  x: the start [b ...], of the level of ts[0] (`initial`). keys: [b], from `sample_keys`; stochastic
  samplers need them. Returns x at ts[-1], of x's shape and dtype. Noise and what the denoiser is
  shown have that dtype too; the steps between are taken in float32 at the least.
  """
  denoise = lift(denoise)
  dtype, wide = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
  count = jax.tree.leaves(rows)[0].shape[0]

  def body(carry, inputs):
    x, memory, recall = carry
    number, row = inputs

    def noise(draw=0):
      if keys is None:
        raise ValueError('this sampler draws noise: say sample(..., keys=sample_keys(seed, index))')
      return normal(_fold(_fold(keys, number + 1), draw), x.shape[1:], dtype).astype(wide)

    def ask(x, level):
      nonlocal recall
      said, recall = denoise.apply(x.astype(dtype), level, recall)
      return jax.tree.map(lambda a: a.astype(wide), said)

    after, memory = sampler.step(ask, x, memory, row, noise)
    return (after.astype(wide), memory, recall), None

  start = x.astype(wide), sampler.init(x.astype(wide)), denoise.init(x)
  (x, _, _), _ = jax.lax.scan(body, start, (jnp.arange(count), rows))
  return x.astype(dtype)


def shrink(t, s):
  """Noise-to-signal at s over that at t, exp(-h) of the DPM-Solver papers; finite at both ends."""
  return (t.alpha * s.sigma) / (s.alpha * t.sigma)


def _pairs(schedule, ts):
  """The levels a step leaves and reaches, [n] each."""
  return schedule(ts[:-1]), schedule(ts[1:])


def _nothing(x):
  del x
  return ()


def ddim(eta=0.) -> Sampler:
  """DDIM: x0 as told, noise as told; eta in [0, 1] mixes fresh noise in. Order 1.

  Song et al. 2020, "Denoising Diffusion Implicit Models", eq. 12 and 16. eta=0 is Euler's method on
  the ODE (and on straight flows), eta=1 ancestral DDPM sampling.
  """
  def plan(schedule, ts):
    t, s = _pairs(schedule, ts)
    fresh = eta * s.sigma * jnp.sqrt(jnp.maximum(1 - shrink(t, s)**2, 0.))
    kept = jnp.sqrt(jnp.maximum(s.sigma**2 - fresh**2, 0.))
    return dict(level=t, alpha=s.alpha, kept=kept, fresh=fresh)

  def step(denoise, x, memory, row, noise):
    said = denoise(x, row['level'])
    x = row['alpha'] * said.x0 + row['kept'] * said.eps
    if eta:  # eta = 0 draws nothing
      x += row['fresh'] * noise()
    return x, memory

  return Sampler(plan, _nothing, step)


class HeunMemory(NamedTuple):
  """The point a step began at and what the denoiser said there."""

  x: Array
  x0: Array
  eps: Array


def heun(s_churn=0., s_tmin=0., s_tmax=jnp.inf, s_noise=1.) -> Sampler:
  """Heun's method with an Euler step last; `s_churn` > 0 adds noise first. Order 2.

  Karras et al. 2022, algorithms 1 and 2; s_tmin, s_tmax bound sigma/alpha, s_noise scales the
  noise.
  The trapezoid is taken of x0 d(alpha) + eps d(sigma) along the curve of levels: for alpha = 1
  that is Karras's, for straight flows Heun in t, and finite at both ends of any schedule. n steps
  make 2n - 1 rows, for each asks the network twice but the last.
  """
  def plan(schedule, ts):
    t, s = _pairs(schedule, ts)
    n = ts.shape[0] - 1
    rise = jnp.where((s_tmin <= t.nsr) & (t.nsr <= s_tmax), min(s_churn / n, 2**0.5 - 1), 0.)
    lifted = schedule(schedules.inverse(schedule, t.lam - jnp.log1p(rise)))
    churns = (rise > 0) & jnp.isfinite(t.lam)  # pure noise needs no more of it
    at = jax.tree.map(lambda high, low: jnp.where(churns, high, low), lifted, t)
    keep = jnp.where(churns, at.alpha / jnp.where(t.alpha == 0, 1., t.alpha), 1.)
    fresh = s_noise * jnp.sqrt(jnp.maximum(at.sigma**2 - (keep * t.sigma)**2, 0.))
    first = dict(level=at, keep=keep, fresh=jnp.where(churns, fresh, 0.))
    second = dict(level=s, keep=jnp.ones(n), fresh=jnp.zeros(n))
    both = dict(d_alpha=s.alpha - at.alpha, d_sigma=s.sigma - at.sigma)
    first, second = ({**r, **both, 'second': jnp.full(n, i)} for i, r in enumerate([first, second]))
    weave = lambda a, b: einops.rearrange([a, b], 'two n -> (n two)')[:-1]
    rows = jax.tree.map(weave, first, second)
    return {**rows, 'second': rows['second'] > 0}

  def init(x):
    return HeunMemory(x, jnp.zeros_like(x), jnp.zeros_like(x))

  def step(denoise, x, memory, row, noise):
    second = row['second']
    if s_churn:
      fresh = jax.lax.cond(row['fresh'] > 0, noise, lambda: jnp.zeros_like(x))
      x = row['keep'] * x + row['fresh'] * fresh
    said = denoise(x, row['level'])
    start = jnp.where(second, memory.x, x)
    x0 = jnp.where(second, (memory.x0 + said.x0) / 2, said.x0)
    eps = jnp.where(second, (memory.eps + said.eps) / 2, said.eps)
    after = start + row['d_alpha'] * x0 + row['d_sigma'] * eps
    return after, HeunMemory(start, said.x0, said.eps)

  return Sampler(plan, init, step)


def dpmpp_2m(eta=0.) -> Sampler:
  """DPM-Solver++(2M), or with eta=1 its SDE form: extrapolates x0 from the call before. Order 2.

  Lu et al. 2022, "DPM-Solver++", algorithm 2 and appendix (SDE, midpoint). First order where a
  neighbouring level is an end of infinite log-SNR.
  """
  def plan(schedule, ts):
    t, s = _pairs(schedule, ts)
    h = s.lam - t.lam
    before = jnp.concatenate([jnp.array([jnp.inf], h.dtype), h[:-1]])
    lean = jnp.where(jnp.isfinite(h) & jnp.isfinite(before), h / before / 2, 0.)
    r = shrink(t, s)
    keep = s.sigma / t.sigma * r**eta
    return dict(
        level=t,
        keep=keep,
        new=s.alpha - keep * t.alpha,  # alpha_s (1 - r^(1 + eta)), also where alpha_s = 0
        lean=lean,
        fresh=s.sigma * jnp.sqrt(jnp.maximum(1 - r**(2 * eta), 0.)))

  def step(denoise, x, memory, row, noise):
    x0 = denoise(x, row['level']).x0
    x = row['keep'] * x + row['new'] * (x0 + row['lean'] * (x0 - memory))
    if eta:
      x += row['fresh'] * noise()
    return x, x0

  return Sampler(plan, jnp.zeros_like, step)
