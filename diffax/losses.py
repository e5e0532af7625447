"""The training objective: weightings, distances, the loss they share, and bounds on the likelihood.

  L = E_t E_eps  w(t) || net(c_in x_t, c_noise) - (a x0 + b eps) ||^2

The times t come from a law of `times.py`. A *weighting* is a function `(prediction, level) -> w`
of the square of the network's own error, and multiplies the law, as in the papers. They state
theirs for the error in x0 or in the noise; `from_x0` and `from_eps` carry such a one over to any
prediction by the ratio of determinants. A *distance* stands in place of the square. Bounds on the
likelihood alone divide by the density of t: `vlb` in continuous time, `vlb_term` a step at a time.
"""

from typing import NamedTuple
from collections.abc import Callable

import einops
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from diffax import predictions
from diffax import schedules


Weighting = Callable[[predictions.Prediction, schedules.Level], Array]


class Distance(NamedTuple):
  """What an error costs: error [b ...] -> cost, an array that broadcasts against it.

  The mean of the cost over an example's values is the distance, so that a weight for each frame
  or token multiplies either.
  """

  cost: Callable[[Array], Array]

  def __call__(self, error):
    return self.cost(error)


# --- weightings: (prediction, level) -> weight of the network's own squared error -----------------


def uniform() -> Weighting:
  """Every error counts alike in the network's own space; Ho et al. 2020, eq. 14 for eps."""
  return lambda prediction, level: jnp.ones_like(level.t)


def from_x0(weight):
  """The weighting that counts the squared error in x0 by `weight(level)`.

  Salimans & Ho 2022, sec. 4, relates these weights.
  """
  def weigh(prediction, level):
    return weight(level) * (level.sigma / predictions.det(prediction, level))**2
  return weigh


def from_eps(weight):
  """The weighting that counts the squared error in the noise by `weight(level)`."""
  def weigh(prediction, level):
    return weight(level) * (level.alpha / predictions.det(prediction, level))**2
  return weigh


def _snr(level):
  return (level.alpha / level.sigma)**2


def snr() -> Weighting:
  """SNR on x0, which is 1 on the noise; Salimans & Ho 2022, sec. 4."""
  return from_eps(lambda level: jnp.ones_like(level.t))


def truncated_snr() -> Weighting:
  """max(SNR, 1) on x0; Salimans & Ho 2022, sec. 4."""
  return from_x0(lambda level: jnp.maximum(_snr(level), 1.))


def snr_plus_one() -> Weighting:
  """SNR + 1 on x0, which is 1 on v where variance is preserved; Salimans & Ho 2022, sec. 4."""
  return from_x0(lambda level: _snr(level) + 1)


def edm(sigma_data=0.5) -> Weighting:
  """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x0: 1 for the F prediction.

  Karras et al. 2022, eq. 8.
  """
  def weight(level):
    variance = level.sigma**2 + (sigma_data * level.alpha)**2
    return variance / (level.sigma * sigma_data)**2
  return from_x0(weight)


def min_snr(gamma=5.) -> Weighting:
  """min(SNR, gamma) on x0; Hang et al. 2023, "Efficient Diffusion Training via Min-SNR", eq. 9."""
  return from_x0(lambda level: jnp.minimum(_snr(level), gamma))


def soft_min_snr(gamma=4.) -> Weighting:
  """SNR gamma / (SNR + gamma) = 1 / (1 / SNR + 1 / gamma) on x0, for gamma 1 / sigma_data^2.

  Crowson et al. 2024, "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass
  Diffusion Transformers", sec. on the loss weighting.
  """
  return from_x0(lambda level: 1 / (level.nsr**2 + 1 / gamma))


def p2(gamma=1., k=1.) -> Weighting:
  """1 / (k + SNR)^gamma on the noise; Choi et al. 2022, "Perception Prioritized Training", sec. 3.
  """
  return from_eps(lambda level: (k + _snr(level))**-gamma)


def sigmoid(bias=2.) -> Weighting:
  """sigmoid(bias - log SNR) on the noise: falls from the ELBO's weight as detail becomes fine.

  Kingma & Gao 2023, "Understanding Diffusion Objectives as the ELBO", sec. 5; Hoogeboom et al.
  2024, "Simpler Diffusion (SiD2)", lowers the bias as resolution grows. Both state it relative to
  the ELBO, as an integral over the log-SNR: it is theirs under `times.log_uniform`.
  """
  return from_eps(lambda level: jax.nn.sigmoid(bias - 2 * level.lam))


def elbo() -> Weighting:
  """1/2 on the noise: under `times.log_uniform` the ELBO over the width of its log-SNR range.

  Kingma & Gao 2023, sec. 3. `vlb` is the bound itself, under other laws too.
  """
  return from_eps(lambda level: jnp.full_like(level.t, 0.5))


def effective_weight(schedule, law, prediction, weight, u: Array):
  """What a law and a weighting amount to: (log-SNR, w) at the law's quantiles `u` in (0, 1).

  w is the density of the log-SNR under the law times the weight of the squared error in the noise,
  so that a constant w is the ELBO and recipes compare whatever their schedule, law and prediction:
  L = integral of w |eps error|^2 over the log-SNR. Infinite where the law holds t at an end.
  Kingma & Gao 2023, sec. 3 and table 1 (there up to a factor).
  """
  level, slope = jax.jvp(lambda u: schedule(law(u)), (u,), (jnp.ones_like(u),))
  rate = 2 * (slope.sigma / level.sigma - slope.alpha / level.alpha)  # -d(log SNR)/du
  on_eps = weight(prediction, level) * (predictions.det(prediction, level) / level.alpha)**2
  return 2 * level.lam, on_eps / rate


def uncertainty(channels=128) -> schedules.Learned:
  """A learned log loss u(sigma): binds to (each [b], level) -> each / exp(u) + u, [b].

  u is linear in `channels` random Fourier features of c_noise = log(sigma / alpha) / 4, and 0 at
  the start, where the loss is as it was. At the optimum u is the log of the expected loss, so that
  every level counts alike. Karras et al. 2024, "Analyzing and Improving the Training Dynamics",
  eq. 14 and 21.
  """
  draw = np.random.default_rng(0)  # constants of the function, which no optimizer touches
  frequency, phase = draw.normal(size=channels), draw.uniform(size=channels)

  def init(key):
    del key
    return {'weight': jnp.zeros(channels)}

  def bind(params):
    def weigh(each, level):
      finite = jnp.clip(schedules.log_clock(level), -5., 5.)  # pure noise is one of its levels
      told = einops.reduce(finite, 'b ... -> b', 'mean')
      constant = lambda a: jnp.asarray(a, told.dtype)[None]
      angle = 2 * jnp.pi * (told[:, None] * constant(frequency) + constant(phase))  # [b channels]
      u = jnp.cos(angle) * (2 / channels)**0.5 @ params['weight']
      return each / jnp.exp(u) + u
    return weigh

  return schedules.Learned(init, bind)


# --- distances: error -> cost ---------------------------------------------------------------------


def squared() -> Distance:
  """The square of each value's error."""
  return Distance(jnp.square)


def absolute() -> Distance:
  """The size of each value's error."""
  return Distance(jnp.abs)


def huber(delta=1.) -> Distance:
  """error^2 / 2 up to `delta`, linear beyond, a value at a time; Huber 1964."""
  def cost(error):
    size = jnp.abs(error)
    inner = jnp.minimum(size, delta)
    return inner * (size - inner / 2)
  return Distance(cost)


def pseudo_huber(c=0.00054) -> Distance:
  """sqrt(|error|^2 + C^2) - C of the norm over an example of d values, where C = c sqrt(d).

  Song & Dhariwal 2023, "Improved Techniques for Training Consistency Models", eq. 8 and sec. 3.3.
  """
  if c <= 0:
    raise ValueError(f'c={c} must be above 0: at 0 the gradient of the norm has no limit')
  def cost(error):
    norm = einops.reduce(error**2, 'b ... -> b', 'sum')
    floor = c * (error.size / len(error))**0.5
    # norm / (sqrt + floor): the difference itself rounds to 0 for a small error
    each = norm / (jnp.sqrt(norm + floor**2) + floor)
    return each.reshape(len(error), *[1] * (error.ndim - 1))
  return Distance(cost)


def multiscale(smallest=32) -> Distance:
  """Mean squares of the error averaged down to s x s, over s, for s = h, h/2, ... `smallest`.

  error: [b h w c]; sides that are odd are halved no more. Hoogeboom et al. 2023, "simple
  diffusion", sec. 3.2: low resolutions count as much as the many pixels of high ones.
  """
  def cost(error):
    if error.ndim != 4:
      raise ValueError(f'multiscale wants images [b h w c], not an error of shape {error.shape}')
    total = 0.
    while True:
      height, width = error.shape[1:3]
      total += einops.reduce(error**2, 'b h w c -> b 1 1 1', 'mean') / height
      if height % 2 or width % 2 or height // 2 < smallest:
        return total
      error = einops.reduce(error, 'b (h i) (w j) c -> b h w c', 'mean', i=2, j=2)
  return Distance(cost)


# --- bounds on the likelihood ---------------------------------------------------------------------


def vlb(schedule, law) -> Callable[[Array], Weighting]:
  """The continuous-time bound, -1/2 d(SNR)/dt |x0 error|^2 over the law's density of t.

  Returns `u -> Weighting` for the numbers u [b] that the times law(u) are of: under it the mean of
  `diffusion_loss` is the bound's diffusion term, in nats a value, whatever schedule and law. The
  rest of the bound is `prior_term` and the decoder's (`vlb_term` at s = 0).

  Kingma et al. 2021, "Variational Diffusion Models", eq. 17 and appendix on low discrepancy.
  Raises ValueError, where it is called outside of jit, for a law whose density of t is not bounded
  from below and above on all of [t_min, t_max]: it would leave levels out, or its variance has no
  bound.
  """
  _check_density(schedule, law)
  def at(u):
    snr = lambda u: _snr(schedule(law(u)))
    _, slope = jax.jvp(snr, (u,), (jnp.ones_like(u),))  # d(SNR)/dt over the density of t
    return from_x0(lambda level: -slope.reshape(level.t.shape) / 2)
  return at


def _check_density(schedule, law):
  u = jnp.linspace(0., 1., 65)
  t, spread = jax.jit(lambda u: jax.jvp(law, (u,), (jnp.ones_like(u),)))(u)  # t, 1 / density
  if isinstance(t, jax.core.Tracer):
    return  # under jit there are no numbers to look at
  t, spread = np.asarray(t), np.asarray(spread)
  reached = np.allclose(t[[0, -1]], [schedule.t_min, schedule.t_max], rtol=1e-3, atol=0)
  if not (reached and np.isfinite(spread).all() and (spread > 0).all()):
    raise ValueError(
        f'a likelihood bound divides by the density of t, and this law has none or no bounded one '
        f'somewhere in [{schedule.t_min:g}, {schedule.t_max:g}] (dt/du is {spread.min():.3g} to '
        f'{spread.max():.3g}, t {t[0]:.3g} to {t[-1]:.3g}): use times.uniform, times.log_uniform '
        'or an importance law over one of them')


def normal_kl(mean, logvar, other_mean, other_logvar):
  """KL(N(mean, exp(logvar)) || N(other...)) in nats, value by value."""
  change = logvar - other_logvar
  return (jnp.expm1(change) - change + (mean - other_mean)**2 * jnp.exp(-other_logvar)) / 2


def discretized_log_likelihood(x0, mean, log_std, bins=256):
  """log of N(mean, exp(log_std)^2)'s mass in the bin of each value of x0, in nats.

  x0: values on the grid of `bins` equal steps over [-1, 1]; the outermost bins reach to infinity.
  Ho et al. 2020, eq. 13.
  """
  half = 1 / (bins - 1)
  x0 = jnp.asarray(x0, jnp.promote_types(jnp.result_type(x0), jnp.float32))  # bins need its digits
  scale = jnp.exp(-log_std)
  low, high = (x0 - half - mean) * scale, (x0 + half - mean) * scale
  flip = low + high > 0  # by the smaller tail, where the logarithm of the integral is exact
  low, high = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
  log_low, log_high = (jax.scipy.special.log_ndtr(z) for z in (low, high))
  # never 0, whose logarithm would spoil gradients also where it is not the answer
  inner = log_high + jnp.log(-jnp.expm1(jnp.minimum(log_low - log_high, -1e-7)))
  below = jax.scipy.special.log_ndtr((x0 + half - mean) * scale)
  above = jax.scipy.special.log_ndtr((mean - x0 + half) * scale)
  return jnp.where(x0 < -1 + half, below, jnp.where(x0 > 1 - half, above, inner))


def posterior(x0, x, t, s, fraction=0.):
  """Mean and log variance of q(x_s | x_t = x, x0), levels s < t; Ho et al. 2020, eq. 7.

  fraction: v of Nichol & Dhariwal 2021, eq. 15, from the posterior's own variance beta~ (0) to the
  forward step's beta (1). Where s is clean data beta~ is 0, and beta serves for both.
  """
  r = t.alpha * s.sigma / (s.alpha * t.sigma)
  clean = s.sigma == 0
  mean = r * s.sigma / t.sigma * x + s.alpha * (1 - r**2) * x0
  # beta is sigma_t^2 - (alpha_t sigma_s / alpha_s)^2, and beta~ = beta (sigma_s / sigma_t)^2
  large = jnp.log(t.sigma**2 * (1 - r**2))
  lower = 2 * jnp.log(jnp.where(clean, 1., s.sigma / t.sigma))
  return mean, large + (1 - fraction) * lower


def vlb_term(said, x0, x, t, s, bins=256):
  """One term of the discrete bound, [b] in nats a value: the step from level t to level s.

  said: the `Estimate` at x, of level t; where its `fraction` is None the variance is beta~, the
  best for one example. KL(q(x_s | x_t, x0) || p(x_s | x_t)), or where s is clean data
  -log p(x0 | x_t) of x0 in `bins` steps; Ho et al. 2020, eq. 5 and 13; Nichol & Dhariwal 2021,
  eq. 4 to 7. Over a grid from t_max to 0 the terms and `prior_term` sum to the bound.
  """
  true_mean, true_logvar = posterior(x0, x, t, s)
  mean, logvar = posterior(said.x0, x, t, s, 0. if said.fraction is None else said.fraction)
  kl = normal_kl(true_mean, true_logvar, mean, logvar)
  decoder = -discretized_log_likelihood(x0, mean, logvar / 2, bins)
  return einops.reduce(jnp.where(s.sigma == 0, decoder, kl), 'b ... -> b', 'mean')


def prior_term(x0, level):
  """KL(q(x_T | x0) || N(0, sigma_T^2)), [b] in nats a value: what is left of the data at the end.

  level: of t_max. The prior is what sampling begins from (`schedules.start`). L_T of Ho et al.
  2020, eq. 5.
  """
  logvar = 2 * jnp.log(level.sigma)
  kl = normal_kl(level.alpha * x0, logvar, 0., logvar)
  return einops.reduce(kl, 'b ... -> b', 'mean')


# --- the loss -------------------------------------------------------------------------------------


def diffusion_loss(predict, schedule, prediction, weight, x0: Array, eps: Array, t: Array,
                   distance=jnp.square, steps=1000):
  """Weighted distance of the network's output from its target, a number an example.

  predict: (x, level) -> the network's raw output, of x's shape; for a prediction of two outputs
    with twice the channels. x0, eps: data and unit noise, [b ...] alike; t: times, [b].
  distance: a `Distance`, or any error -> cost. steps: of the chain whose bound trains a learned
    variance (`hybrid`).
  Returns [b], float32 at the least: the mean over each example's values.
  """
  level = schedule(einops.rearrange(t, 'b -> b' + ' 1' * (x0.ndim - 1)))  # [b 1 ...]
  x = level.alpha * x0 + level.sigma * eps
  out = predict(x, level)
  out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
  answer, fraction = predictions.split(prediction, out)
  error = answer - predictions.target(prediction, x0, eps, level)
  each = einops.reduce(weight(prediction, level) * distance(error), 'b ... -> b', 'mean')
  if fraction is None:
    return each
  return each + hybrid(schedule, predictions.solve(prediction, out, x, level), x0, x, level, steps)


def hybrid(schedule, said, x0, x, level, steps=1000, scale=0.001):
  """What a learned variance adds to the loss, [b]: `scale` times the bound, its mean held fixed.

  said: the `Estimate` at x, of `level`; only its fraction has a gradient. The bound is that of a
  chain of `steps` equal steps of t, estimated by the one which ends at each example's level:
  unbiased under `times.uniform`. Nichol & Dhariwal 2021, eq. 16.
  """
  said = said._replace(x0=jax.lax.stop_gradient(said.x0))
  s = level.t - schedule.t_max / steps
  before = schedule(jnp.where(s < schedule.t_min, 0., s))
  return scale * steps * vlb_term(said, x0, x, level, before)
