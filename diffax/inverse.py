"""Inverse problems: samples of x0 given y = A x0 + noise, from a denoiser that knows nothing of y.

Each method is a function from denoisers to denoisers, `f(denoise, operator, y, ...)`, so that any
sampler takes the result and guidance goes inside it. They differ in what they change:

  replacement, repaint    x before the network sees it, and what is said of the known part
  ddnm                    x0: its part in the range of A^T becomes that of y
  dps, pigdm              the score: the gradient of log p(y | x_t), taken through the network

`sdedit` begins from an image; `steer` is a function from samplers to samplers, for any reward. A is
linear; x is `[b h w c]` where images are meant. y has the shape of `operator.apply(x)`, exactly:
ValueError otherwise, before anything runs.
"""

import functools
from typing import Any, NamedTuple
from collections.abc import Callable

import einops
import jax
from jax import Array
import jax.numpy as jnp

from diffax import guidance
from diffax import noises
from diffax import samplers

REPLACED, REDRAWN = 2**31 - 1, 2**31 - 1  # in place of a row's number, of a draw's


class Operator(NamedTuple):
  """A linear A. pinv(y, ridge) = A^T (A A^T + ridge)^-1 y, at ridge 0 the pseudo-inverse.

  apply: x -> A x. adjoint: y -> A^T y. ridge: a scalar, or `[b 1 1 1]`, one an example.
  """

  apply: Callable[[Array], Array]
  adjoint: Callable[[Array], Array]
  pinv: Callable[..., Array]


# --- operators ------------------------------------------------------------------------------------


def mask(known) -> Operator:
  """Keeps x where `known` is true and makes it 0 elsewhere (inpainting).

  known: bool, of x's rank, its axes x's or 1. Raises ValueError for another dtype or rank.
  """
  if known.dtype != bool:
    raise ValueError(f'a mask of {known.dtype}: give bool, true where x is known (mask > 0.5)')
  def keep(x):
    if known.ndim != x.ndim:
      raise ValueError(f'a mask of shape {known.shape} for x of shape {x.shape}: give it the same '
                       'number of axes, of length 1 where it is one for all')
    return jnp.where(known, x, 0)
  return Operator(keep, keep, lambda y, ridge=0.: keep(y) / (1 + ridge))


def blur(kernel) -> Operator:
  """Convolution with `kernel` over the space axes of x, which wrap around.

  kernel: centred at index size // 2; one axis for each of x's space axes, or one in all, which is
  applied along each. No axis is longer than the image: ValueError. The pseudo-inverse leaves out
  frequencies that the kernel keeps less of than the square root of the dtype's precision.
  """
  kernel = jnp.asarray(kernel)

  def spectrum(x):
    """The kernel's transform, of x's space axes with 1 on either side."""
    space = x.ndim - 2
    whole = kernel
    if kernel.ndim == 1:
      whole = functools.reduce(jnp.multiply.outer, [kernel] * space)
    if whole.ndim != space or any(k > n for k, n in zip(whole.shape, x.shape[1:-1])):
      raise ValueError(f'a kernel of shape {kernel.shape} for x of shape {x.shape}: give it one '
                       f'axis, or {space}, none longer than those of x')
    padded = jnp.pad(whole, [(0, n - k) for k, n in zip(whole.shape, x.shape[1:-1])])
    centred = jnp.roll(padded, [-(k // 2) for k in whole.shape], tuple(range(space)))
    return jnp.fft.fftn(centred)[None, ..., None]

  def filtered(x, of):
    axes = tuple(range(1, x.ndim - 1))
    passed = of(spectrum(x)) * jnp.fft.fftn(guidance.wide(x), axes=axes)
    return jnp.fft.ifftn(passed, axes=axes).real.astype(x.dtype)

  def pinv(y, ridge=0.):
    def of(k):
      power = jnp.abs(k)**2
      lost = (power <= jnp.finfo(power.dtype).eps * power.max()) & (ridge == 0)
      return jnp.where(lost, 0., k.conj() / jnp.where(lost, 1., power + ridge))
    return filtered(y, of)

  return Operator(lambda x: filtered(x, lambda k: k), lambda y: filtered(y, jnp.conj), pinv)


def downsample(factor) -> Operator:
  """The mean of each square of `factor` by `factor` pixels (super-resolution); A A^T = 1/factor^2.

  Raises ValueError where x's sides do not divide.
  """
  def apply(x):
    if x.shape[1] % factor or x.shape[2] % factor:
      raise ValueError(f'x of shape {x.shape} does not divide into squares of factor={factor}')
    return einops.reduce(x, 'b (h i) (w j) c -> b h w c', 'mean', i=factor, j=factor)
  def spread(y):
    return einops.repeat(y, 'b h w c -> b (h i) (w j) c', i=factor, j=factor)
  return Operator(
      apply, lambda y: spread(y) / factor**2,
      lambda y, ridge=0.: spread(y / (1 + ridge * factor**2)))


def grey(channels=3) -> Operator:
  """The mean of the channels, `[b h w 1]` (colouring); A A^T = 1/channels.

  Raises ValueError where x has another number of channels.
  """
  def apply(x):
    if x.shape[-1] != channels:
      raise ValueError(f'x of shape {x.shape} has {x.shape[-1]} channels: not channels={channels}')
    return x.mean(-1, keepdims=True)
  def spread(y):
    return einops.repeat(y, '... 1 -> ... c', c=channels)
  return Operator(
      apply, lambda y: spread(y) / channels, lambda y, ridge=0.: spread(y / (1 + ridge * channels)))


def _check(operator, y, x):
  shape = jax.eval_shape(operator.apply, x).shape
  if y.shape != shape:
    raise ValueError(f'y of shape {y.shape} for x of shape {x.shape}: the operator makes {shape}')


# --- methods --------------------------------------------------------------------------------------


def _held(operator, x, y, share=1.):
  """x with its part in the range of A^T become that of y; known pixels of a mask exactly."""
  return x - share * operator.pinv(operator.apply(x)) + share * operator.pinv(y)


def replacement(denoise, operator, y, noise):
  """What is known of x is y noised to the level, before every call; for y without noise.

  Song et al. 2021, "Score-Based Generative Modeling through SDEs", appendix I.2, with
  x - A^+ A x + A^+ (alpha y + sigma A noise). noise: unit noise of x's shape, one draw for all
  levels; or keys [b], for noise anew in every call, which needs memory: a `samplers.Denoiser`.
  Of the known part is said what was put there, y and the noise: the last step ends at y itself.
  """
  inner = samplers.lift(denoise)
  keyed = jnp.issubdtype(noise.dtype, jax.dtypes.prng_key)

  def apply(x, level, memory):
    _check(operator, y, x)
    memory, count = memory
    fold = jax.vmap(jax.random.fold_in, (0, None))
    eps = noise
    if keyed:
      eps = noises.normal(fold(fold(noise, REPLACED), count), x.shape[1:], guidance.wide(x).dtype)
    eps = operator.apply(eps)
    shown = _held(operator, guidance.wide(x), level.alpha * y + level.sigma * eps)
    said, memory = inner.apply(shown.astype(x.dtype), level, memory)
    held = lambda a, b: _held(operator, guidance.wide(a), b).astype(a.dtype)
    return said._replace(x0=held(said.x0, y), eps=held(said.eps, eps)), (memory, count + 1)

  made = samplers.Denoiser(lambda x: (inner.init(x), jnp.int32(0)), apply)
  return made if keyed else guidance.plainly(made, denoise)


def repaint(denoise, operator, y, keys):
  """RePaint: `replacement` with noise anew in every call, along times that rise again.

  Lugmayr et al. 2022, "RePaint", algorithm 1. The rest of the method is the walk: ancestral steps,
  `samplers.ddim(1.)`, on a `samplers.Path` that jumps back up. keys: [b].
  """
  return replacement(denoise, operator, y, keys)


def ddnm(denoise, operator, y, noise=0.):
  """x0 - share A^+ (A x0 - y): what is seen from y, the null space from the network; share 1.

  Wang et al. 2022, "Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model", eq. 13
  and, for y with noise of standard deviation `noise`, sec. 3.3 (DDNM+): share falls with the level
  below that of y, min(1, sigma / (alpha noise)).
  """
  def change(said, level):
    _check(operator, y, said.x0)
    share = jnp.minimum(1., level.nsr / noise) if noise else 1.
    return guidance.with_x0(said, _held(operator, guidance.wide(said.x0), y, share), level)
  return guidance.then(denoise, change)


def dps(denoise, operator, y, zeta):
  """Adds to the score -zeta times the gradient in x of |y - A x0(x)|^2, over |y - A x0(x)|.

  Chung et al. 2023, "Diffusion Posterior Sampling", eq. 16, with the residual's length in place of
  the unknown variance, as in its algorithm 1. There the gradient is subtracted after a step; here
  it is a change of score, which a step of their chain takes in beta_i / sqrt(1 - beta_i) times: for
  their 0.1 to 1 and 1000 steps, zeta is 10 to 100 and more. zeta: a scale as in `guidance`. Takes a
  gradient through the network in every call.
  """
  inner = samplers.lift(denoise)

  def apply(x, level, memory):
    _check(operator, y, x)
    def squares(x):
      said, after = inner.apply(x, level, memory)
      off = y - operator.apply(guidance.wide(said.x0))
      each = (off**2).sum(tuple(range(1, off.ndim)))
      return each.sum(), (each, said, after)
    slope, (each, said, after) = jax.grad(squares, has_aux=True)(x)
    length = jnp.sqrt(each)[(slice(None), *[None] * (x.ndim - 1))]  # [b 1 1 1]
    step = guidance.wide(slope) / jnp.maximum(length, jnp.finfo(length.dtype).tiny)
    by = level.sigma * guidance.at(zeta, level, x) * step
    return guidance.moved(said, (0., 1.), by, level), after

  return guidance.plainly(samplers.Denoiser(inner.init, apply), denoise)


def pigdm(denoise, operator, y, noise=0., std=1.):
  """Adds to the score (dx0/dx)^T A^T (r^2 A A^T + noise^2)^-1 (y - A x0).

  Song et al. 2023, "Pseudoinverse-Guided Diffusion Models", eq. 7 and 8: the posterior score where
  x0 given x_t has variance r^2, here std^2 sigma^2 / (alpha^2 std^2 + sigma^2), that of data
  N(., std^2), for which it is exact. noise: standard deviation of y's. Where alpha = 0 the network
  says nothing of x0 through x, and nothing is changed. Takes a vector-Jacobian product in every
  call.
  """
  inner = samplers.lift(denoise)

  def apply(x, level, memory):
    _check(operator, y, x)
    def clean(x):
      said, after = inner.apply(x, level, memory)
      return said.x0, (said, after)
    x0, pull, (said, after) = jax.vjp(clean, x, has_aux=True)
    r2 = std**2 * level.sigma**2 / (std**2 * level.alpha**2 + level.sigma**2)
    r2 = jnp.maximum(r2, 1e-12 * std**2)  # where sigma = 0, and the change with it
    back = operator.pinv(y - operator.apply(guidance.wide(x0)), noise**2 / r2) / r2
    score, = pull(back.astype(x0.dtype))
    return guidance.moved(said, (0., 1.), -level.sigma * guidance.wide(score), level), after

  return guidance.plainly(samplers.Denoiser(inner.init, apply), denoise)


# --- beginnings, and rewards ----------------------------------------------------------------------


def sdedit(schedule, ts, strength, x0, noise):
  """The last round(strength steps) steps of the grid `ts`, and x0 noised to where they begin.

  Meng et al. 2021, "SDEdit"; image to image. ts: a whole grid [steps + 1]. strength: in [0, 1], 0
  for x0 itself and no step, 1 for the whole grid. noise: unit noise of x0's shape. Returns
  (ts [count + 1], x), of x0's shape and dtype. Raises ValueError for another strength.
  """
  if not 0 <= strength <= 1:
    raise ValueError(f'strength={strength} is not in [0, 1]')
  steps = len(ts) - 1
  tail = ts[steps - round(strength * steps):]
  level = schedule(tail[0])
  x = level.alpha * guidance.wide(x0) + level.sigma * guidance.wide(noise)
  return tail, x.astype(x0.dtype)


class Steered(NamedTuple):
  """What the inner sampler remembers, and the rewards [b] when particles were last drawn."""

  inner: Any
  before: Array


def steer(sampler, reward, particles, strength=1., every=1):
  """A sampler whose groups of `particles` along the batch are drawn again by what they promise.

  Singhal et al. 2025, "Feynman-Kac Steering", sec. 3 (potential "difference"); Wu et al. 2023,
  "TDS". In every `every`-th row, counted back from the last, a group is drawn from itself by weight
  exp(strength (reward(x0) - reward before)), systematically, so that its members end as samples of
  the data tilted by exp(strength reward). reward: x0 as said [b ...] -> [b]. Copies part by the
  sampler's noise: it must be stochastic. Memory of the sampler goes with x, that of a denoiser does
  not. The batch must divide by `particles`: ValueError. Needs keys.
  """
  def plan(*args, **options):
    rows = sampler.plan(*args, **options)
    count = jax.tree.leaves(rows)[0].shape[0]
    return {**rows, 'draws': jnp.arange(count)[::-1] % every == 0}

  def init(x):
    if len(x) % particles:
      raise ValueError(f'a batch of {len(x)} does not divide into groups of particles={particles}')
    return Steered(sampler.init(x), jnp.zeros(len(x), x.dtype))

  def step(denoise, x, memory, row, noise):
    said = None
    def ask(x, level):
      nonlocal said
      said = denoise(x, level)
      return said
    rest = {name: value for name, value in row.items() if name != 'draws'}
    x, inner = sampler.step(ask, x, memory.inner, rest, noise)

    def redraw(x, memory):
      now = reward(said.x0).astype(memory.before.dtype)
      share = strength * (now - memory.before)
      places = _systematic(share, _uniform(noise, particles), particles)
      take = lambda a: a[places]
      return take(x), Steered(jax.tree.map(take, memory.inner), take(now))

    stay = lambda x, memory: (x, memory)
    return jax.lax.cond(row['draws'], redraw, stay, x, Steered(inner, memory.before))

  return sampler._replace(plan=plan, init=init, step=step)


def _uniform(noise, particles):
  """A number in (0, 1) for each group, from noise that no step of a sampler draws."""
  nowhere = jnp.zeros(())
  drawn = noise((nowhere, nowhere), REDRAWN)
  first = einops.rearrange(drawn, '(g k) ... -> g (k ...)', k=particles)[:, 0]
  return jax.scipy.special.ndtr(first)


def _systematic(logits, uniform, particles):
  """Which of the batch stands at each place: as often as its share of its group, up to rounding."""
  shares = jax.nn.softmax(einops.rearrange(logits, '(g k) -> g k', k=particles))
  marks = (uniform[:, None] + jnp.arange(particles)[None]) / particles
  chosen = jax.vmap(jnp.searchsorted)(jnp.cumsum(shares, 1), marks)
  chosen = jnp.minimum(chosen, particles - 1)  # the sum may end short of 1
  return einops.rearrange(
      chosen + particles * jnp.arange(len(chosen))[:, None], 'g k -> (g k)')
