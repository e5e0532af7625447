"""How likely a model finds data: by its probability flow, and by bounds.

The flow carries the data's density to the prior's. In the variance-preserving coordinate z = x /
sqrt(alpha^2 + sigma^2), whose time is the angle phi = atan(sigma / alpha) whatever the schedule,

  dz/dphi = (cos(phi) z - x0) / sin(phi),
  log p(z_0) = log p(z_1) + int tr(d(dz/dphi)/dz) dphi,

smooth at both ends, also where alpha = 0 (Song et al. 2021, "Score-Based Generative Modeling
through SDEs", sec. 4.3 and appendix D.2; Grathwohl et al. 2019, "FFJORD"). z_1 is of the prior,
N(0, sin^2(phi)), what sampling begins from (`schedules.start`).

At t_min the data x stand as alpha x, the noise there left out: what is computed is the log density
of the model at t_min, of x + (sigma/alpha) eps with x the data, at the point x. Nats throughout;
`bits_per_dim` turns them into what papers report, `dequantise` makes densities of 8-bit images.
"""

import functools
import math
from typing import NamedTuple
from collections.abc import Callable

import jax
from jax import Array
import jax.numpy as jnp

from diffax import grids
from diffax import losses
from diffax import noises
from diffax import predictions
from diffax import schedules
from diffax import solvers


# --- traces of a Jacobian -------------------------------------------------------------------------


Trace = Callable[..., tuple[Array, Array]]  # (f, x [b ...], keys [b]) -> f(x), estimates [b k]


def _push(f, x, vectors):
  """f(x) and its derivatives along `vectors` [k b ...]."""
  along = lambda v: jax.jvp(f, (x,), (v,))
  return jax.vmap(along, out_axes=(None, 0))(vectors)


def _forms(f, x, vectors):
  """f(x), and v . J v for each of `vectors` [k b ...], [b k]."""
  said, pushed = _push(f, x, vectors)
  products = vectors * pushed.astype(vectors.dtype)
  return said, products.reshape(*products.shape[:2], -1).sum(-1).T


def _rademacher(keys, count, shape, dtype):
  """Signs [k b *shape], an example a key."""
  draw = lambda key: jax.random.rademacher(key, (count, *shape), dtype)
  return jax.vmap(draw, out_axes=1)(keys)


def exact() -> Trace:
  """The trace itself, k = 1: as many derivatives as x has values."""
  def trace(f, x, keys):
    del keys
    size = x[0].size
    basis = jnp.eye(size, dtype=x.dtype).reshape(size, 1, *x.shape[1:])
    said, forms = _forms(f, x, jnp.broadcast_to(basis, (size, *x.shape)))
    return said, forms.sum(1, keepdims=True)
  return trace


def hutchinson(probes=1) -> Trace:
  """v . J v for `probes` vectors v of signs, k = probes independent estimates, none biased.

  Hutchinson 1990, "A Stochastic Estimator of the Trace"; Grathwohl et al. 2019, "FFJORD".
  """
  def trace(f, x, keys):
    return _forms(f, x, _rademacher(keys, probes, x.shape[1:], x.dtype))
  return trace


def hutch_pp(probes=4) -> Trace:
  """Hutch++: exact on the range of `probes` directions, random vectors on the rest; k = probes.

  No estimate is biased, given the range they are independent, and where J's rank is at most
  `probes` they are exact. 3 probes derivatives. Meyer et al. 2021, "Hutch++: Optimal Stochastic
  Trace Estimation", algorithm 1. The vectors of the rest lie on a sphere there (Epperly et al.
  2024, "XTrace"), which is exact for multiples of 1 as well: J is one as sigma goes to 0.
  """
  def trace(f, x, keys):
    size, batch = x[0].size, x.shape[0]
    sketch = _rademacher(keys, probes, x.shape[1:], x.dtype)
    pushed = _push(f, x, sketch)[1].astype(x.dtype).reshape(probes, batch, size)
    span = jnp.linalg.qr(pushed.transpose(1, 2, 0))[0].transpose(2, 0, 1)  # [m b d], orthonormal
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, 1), (probes, size), x.dtype)
    rest = jax.vmap(draw, out_axes=1)(keys)
    for _ in range(2):  # twice, or what rounding leaves of a small rest is no longer orthogonal
      rest = rest - jnp.einsum('mbd,mbe,kbe->kbd', span, span, rest)
    left = size - len(span)
    length = jnp.linalg.norm(rest, axis=2, keepdims=True)
    rest = rest * (left**0.5 / length if left else 0.)
    vectors = jnp.concatenate([span, rest]).reshape(-1, *x.shape)
    said, forms = _forms(f, x, vectors)
    return said, forms[:, :len(span)].sum(1, keepdims=True) + forms[:, len(span):]
  return trace


# --- the probability flow -------------------------------------------------------------------------


def ode_log_likelihood(denoise, schedule, x, ts, keys, trace: Trace,
                       tableau=solvers.DORMAND_PRINCE):
  """log p(x) in nats, [b k], by steps of the probability flow along a grid; see the module's text.

  denoise: (x, level) -> x0 or Estimate, levels [b 1 ...]; that of one example asks that of no
  other. x: data [b ...]; ts: a grid of `grids.py`, which is walked from data to noise; keys: [b]
  (`samplers.sample_keys`). The k columns are the trace's estimates, each of a whole flow with the
  same probe: of `mean_and_error` over them. A step takes 6 calls, and the trace's derivatives with
  them. Song et al. 2021, eq. 39.
  """
  state, field, finish = _flow(denoise, schedule, x, keys, trace)
  phi = solvers.angle(schedule(grids.reverse(schedule, ts))).astype(state[0].dtype)
  return finish(solvers.fixed(field, state, phi, tableau), phi[-1])


def adaptive_log_likelihood(denoise, schedule, x, keys, trace: Trace, **control):
  """log p(x) in nats, [b k], as `ode_log_likelihood`, by steps that a tolerance allows.

  control: rtol, atol, max_steps, tableau of `solvers.adaptive`; each example has steps of its own.
  Where max_steps do not do, NaN. Song et al. 2021, appendix D.2.
  """
  state, field, finish = _flow(denoise, schedule, x, keys, trace)
  ends = solvers.angle(schedule(jnp.array([schedule.t_min, schedule.t_max]))).astype(state[0].dtype)
  found = solvers.adaptive(field, state, *ends, **control)
  return jnp.where(found.done[:, None], finish(found.x, ends[1]), jnp.nan)


def _ask(denoise, x, level, dtype):
  """What is said of x in `dtype`, as an `Estimate` in float32 at the least."""
  x = x.astype(dtype)
  said = predictions.estimate(denoise(x, level), x, level)
  return jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), said)


def _flow(denoise, schedule, x, keys, trace):
  """Where the flow of (z, log of the change of volume [b k]) begins, its field, and log p(x) of
  the state it ends in at an angle."""
  size, wide = x[0].size, jnp.promote_types(x.dtype, jnp.float32)
  first = jnp.cos(solvers.angle(schedule(schedule.t_min)))

  def field(state, phi):
    phi = jnp.expand_dims(phi, tuple(range(1, x.ndim)))  # [b 1 ...]
    level, norm = solvers.level_at(schedule, phi)
    x0_of = lambda z: _ask(denoise, norm * z, level, x.dtype).x0
    x0, divergence = trace(x0_of, state[0], keys)
    cos, sin = level.alpha / norm, level.sigma / norm
    flat = lambda a: a.reshape(-1, 1)
    return (cos * state[0] - x0) / sin, (size * flat(cos) - divergence) / flat(sin)

  def finish(state, phi):
    z, volume = state
    normal = jax.scipy.stats.norm.logpdf(z, scale=jnp.sin(phi)).reshape(z.shape[0], -1).sum(1)
    return normal[:, None] + volume + size * jnp.log(first)

  z = first.astype(wide) * x.astype(wide)
  columns = jax.eval_shape(lambda: trace(lambda z: z, z, keys)[1]).shape[1]
  return (z, jnp.zeros((x.shape[0], columns), wide)), field, finish


# --- bounds ---------------------------------------------------------------------------------------


Decoder = Callable[..., Array]  # (said, x0, x, level) -> -log p(x0 | x) in nats [b]


class Bound(NamedTuple):
  """-log p(x0) is `total` at most, in nats [b]: what the data keep at the noisy end, what the steps
  cost, what is lost at t_min. The noise is drawn once: the bound is the expectation."""

  prior: Array
  diffusion: Array
  decoder: Array

  @property
  def total(self):
    return self.prior + self.diffusion + self.decoder


def eight_bit(bins=256) -> Decoder:
  """Data in `bins` equal steps over [-1, 1], by a Gaussian's mass in each; Ho et al. 2020, eq. 13.

  The bound is then of probabilities, not of densities.
  """
  def decode(said, x0, x, level):
    return x0[0].size * losses.vlb_term(said, x0, x, level, _clean(level), bins)
  return decode


def gaussian() -> Decoder:
  """Continuous data: N(x0 as told, (sigma/alpha)^2), for small sigma the noise's own width."""
  def decode(said, x0, x, level):
    del x
    density = jax.scipy.stats.norm.logpdf(x0, said.x0, level.nsr)
    return -density.reshape(x0.shape[0], -1).sum(1)
  return decode


def _clean(level):
  zero = jnp.zeros_like(level.t)
  return schedules.Level(zero, jnp.ones_like(level.t), zero)


def variational_bound(denoise, schedule, x0, ts, keys, decoder: Decoder):
  """The bound of a chain of steps along the grid `ts` [n + 1], a `Bound` of x0 [b ...].

  denoise: (x, level) -> x0 or Estimate, whose `fraction`, where it is learned, says the variance of
  each step; else it is the posterior's. Every step is asked, with noise of its own: n calls. The
  last, to clean data, is the decoder's. keys: [b]. Ho et al. 2020, eq. 5; Nichol & Dhariwal 2021,
  eq. 4 to 7.
  """
  size, levels = x0[0].size, schedule(ts)
  at = lambda number: jax.tree.map(lambda a: a[number], levels)
  ask = functools.partial(_ask_noised, denoise, x0, keys)

  def add(total, number):
    said, x = ask(at(number), number)
    return total + losses.vlb_term(said, x0, x, at(number), at(number + 1)), None

  last = ts.shape[0] - 2
  start = jnp.zeros(x0.shape[0], jnp.promote_types(x0.dtype, levels.alpha.dtype))
  steps, _ = jax.lax.scan(add, start, jnp.arange(last))
  said, x = ask(at(last), last)
  prior = size * losses.prior_term(x0, at(0))
  return Bound(prior, size * steps, decoder(said, x0, x, at(last)))


def _ask_noised(denoise, x0, keys, level, number):
  """What is said of x0 [b ...] with noise of `level`, the draw `number` of each key; and of what x.
  """
  eps = noises.normal(noises.fold(keys, number), x0.shape[1:], x0.dtype)
  x = level.alpha * x0 + level.sigma * eps
  return _ask(denoise, x, level, x0.dtype), x


def continuous_bound(denoise, schedule, x0, keys, decoder: Decoder, draws=128):
  """The bound of infinitely many steps from t_max to t_min, a `Bound` of x0 [b ...].

  Kingma et al. 2021, "Variational Diffusion Models", eq. 15 to 18: 1/2 int |x0 - x0 as told|^2
  d(SNR), which is an expectation over g = log(1 + SNR) / 2, uniform: log-SNR where there is little
  noise, and finite where there is only noise. `draws` levels an example at equal distances from a
  random one (appendix on low discrepancy), one call each and one for the decoder. keys: [b].
  """
  g = lambda t: jnp.log1p((schedule(t).alpha / schedule(t).sigma)**2) / 2
  low, high = g(schedule.t_max), g(schedule.t_min)
  offset = jax.vmap(jax.random.uniform)(noises.fold(keys, draws + 1))
  ask = functools.partial(_ask_noised, denoise, x0, keys)

  def add(total, number):
    depth = low + (high - low) * (number + offset) / draws  # [b]
    depth = jnp.expand_dims(depth, tuple(range(1, x0.ndim)))
    t = schedules.inverse(schedule, jnp.log(jnp.expm1(2 * depth)) / 2)
    level = schedule(jnp.clip(t, schedule.t_min, schedule.t_max))
    error = x0 - ask(level, number)[0].x0
    weight = (high - low) * (1 + (level.alpha / level.sigma)**2)
    return total + (weight * error**2).reshape(x0.shape[0], -1).sum(1) / draws, None

  start = jnp.zeros(x0.shape[0], jnp.promote_types(x0.dtype, low.dtype))
  total, _ = jax.lax.scan(add, start, jnp.arange(draws))
  level = schedule(schedule.t_min)
  said, x = ask(level, draws)
  prior = x0[0].size * losses.prior_term(x0, schedule(schedule.t_max))
  return Bound(prior, total, decoder(said, x0, x, level))


# --- as papers report it --------------------------------------------------------------------------


def dequantise(images, keys):
  """8-bit images as continuous data: x [b ...] float32, uniform in each value's bin, and the log of
  the change of volume [b], to be added to log p(x).

  The bins are those about k / 127.5 - 1, so x is within 1 + 1/255 of 0. E[log p(x)] plus that is
  log P(images) at most: Theis et al. 2016, "A Note on the Evaluation of Generative Models".
  keys: [b]. Raises ValueError unless images are uint8.
  """
  if images.dtype != jnp.uint8:
    raise ValueError(f'images of {images.dtype}: dequantise takes the uint8 values 0 ... 255')
  noise = jax.vmap(functools.partial(jax.random.uniform, shape=images.shape[1:]))(keys)
  x = (images.astype(jnp.float32) + noise - 0.5) / 127.5 - 1
  return x, jnp.full(images.shape[0], -images[0].size * math.log(127.5))


def bits_per_dim(nats, x):
  """-log p in nats, of data x [b ...], as bits a value of an example.

  Theis et al. 2016, "A Note on the Evaluation of Generative Models", sec. 3.1.
  """
  return nats / (x[0].size * math.log(2))


def mean_and_error(values, axis=0):
  """The mean over examples (axis 0) or over a trace's estimates (axis 1), and its standard error.

  Raises ValueError for fewer than two values, which say nothing of their error.
  """
  count = values.shape[axis]
  if count < 2:
    raise ValueError(f'{count} value along axis {axis}: a standard error takes two at the least')
  return values.mean(axis), values.std(axis, ddof=1) / count**0.5
