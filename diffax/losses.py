"""The training objective: weightings, and the loss they share.

  L = E_t E_eps  w(t) || net(c_in x_t, c_noise) - (a x0 + b eps) ||^2

The times t come from a law of `times.py`. A *weighting* is a function `(prediction, level) -> w`
of the square of the network's own error. Papers state theirs for the error in x0; `from_x0`
carries such a one over to any prediction by the ratio of determinants.
"""

from collections.abc import Callable

import einops
from jax import Array
import jax.numpy as jnp

from diffax import predictions
from diffax import schedules


Weighting = Callable[[predictions.Prediction, schedules.Level], Array]


# --- weightings: (prediction, level) -> weight of the network's own squared error -----------------


def uniform() -> Weighting:
  """Every error counts alike in the network's own space; Ho et al. 2020, eq. 14 for eps."""
  return lambda prediction, level: jnp.ones_like(level.t)


def from_x0(weight):
  """The weighting that counts the squared error in x0 by `weight(level)`."""
  def weigh(prediction, level):
    return weight(level) * (level.sigma / predictions.det(prediction, level))**2
  return weigh


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
  return from_x0(lambda level: jnp.minimum((level.alpha / level.sigma)**2, gamma))


# --- the loss -------------------------------------------------------------------------------------


def diffusion_loss(predict, schedule, prediction, weight, x0: Array, eps: Array, t: Array):
  """Weighted squared error of the network's own target, a number an example.

  predict: (x, level) -> the network's raw output, of x's shape.
  x0, eps: data and unit noise, [b ...] alike; t: times, [b].
  Returns float32 [b]: the mean over each example's values.
  """
  level = schedule(einops.rearrange(t, 'b -> b' + ' 1' * (x0.ndim - 1)))  # [b 1 ...]
  out = predict(level.alpha * x0 + level.sigma * eps, level)
  error = out.astype(jnp.float32) - predictions.target(prediction, x0, eps, level)
  return einops.reduce(weight(prediction, level) * error**2, 'b ... -> b', 'mean')
