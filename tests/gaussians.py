"""Data whose diffusion is known in closed form.

Along each of a set of orthonormal axes the data are an independent mixture of Gaussians, so that

  p_t = prod_i sum_k weight_ik N(alpha mean_ik, alpha^2 var_ik + sigma^2)    in those axes,

the denoiser is a posterior mean, and the probability flow, one-dimensional and monotone in every
axis, carries each quantile of p_t to the same quantile of p_s. For one component that is an affine
map: (x - alpha mean) / sqrt(alpha^2 var + sigma^2) does not change.
"""

from typing import NamedTuple

from jax import Array
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from diffax import predictions


class Mixture(NamedTuple):
  axes: Array  # [d d], columns orthonormal
  weight: Array  # [d k]
  mean: Array  # [d k]
  var: Array  # [d k]


ANGLE = 0.5
AXES = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])


def gaussian(mean=(0.7, -0.4), std=(0.5, 0.2)):
  """An anisotropic Gaussian of two components a axis that are the same, so that shapes agree."""
  twice = lambda values: np.repeat(np.array(values, float)[:, None], 2, axis=1)
  return Mixture(AXES, np.full((2, 2), 0.5), twice(mean), twice(std)**2)


def mixture():
  """Two clusters along the one axis, overlapping ones along the other."""
  return Mixture(
      AXES, np.array([[0.5, 0.5], [0.3, 0.7]]), np.array([[-1., 1.], [-0.4, 0.5]]),
      np.array([[0.16, 0.16], [0.09, 0.25]]))


def denoise(data, x, level):
  """E[x0 | x_t = x] of x [b 2], at one level for all."""
  lifted = lambda a: a[None].astype(x.dtype)  # [1 d k]
  y = (x @ data.axes.astype(x.dtype))[..., None]  # [b d 1]
  mean, var = lifted(data.mean), lifted(data.var)
  total = level.alpha**2 * var + level.sigma**2
  off = y - level.alpha * mean
  share = jax.nn.softmax(jnp.log(lifted(data.weight)) - off**2 / total / 2 - jnp.log(total) / 2, -1)
  x0 = (share * (mean + level.alpha * var / total * off)).sum(-1)  # [b d]
  return x0 @ data.axes.T.astype(x.dtype)


def estimate(data, x, level):
  """The exact x0 and eps at `x`, for sigma > 0."""
  x0 = denoise(data, x, level)
  return predictions.Estimate(x0, (x - level.alpha * x0) / level.sigma)


def moments(data, alpha, sigma):
  """Mean [d] and covariance [d d] of x_t."""
  mean = (data.weight * data.mean).sum(-1)
  var = (data.weight * (data.var + data.mean**2)).sum(-1) - mean**2
  cov = data.axes @ np.diag(alpha**2 * var + sigma**2) @ data.axes.T
  return alpha * data.axes @ mean, cov


def flow(data, x, start, end):
  """Where the probability flow takes `x` [b d] from (alpha, sigma) `start` to `end`; in float64."""
  (alpha, sigma), (alpha_to, sigma_to) = np.array(start, float), np.array(end, float)
  y = np.asarray(x, float) @ data.axes

  def tails(y, alpha, sigma):
    z = (y[..., None] - alpha * data.mean) / np.sqrt(alpha**2 * data.var + sigma**2)
    below, above = ((data.weight * scipy.special.ndtr(s * z)).sum(-1) for s in (1, -1))
    return below, above

  below, above = tails(y, alpha, sigma)
  reach = 40 * (1 + sigma_to + alpha_to)
  low, high = np.full_like(y, -reach), np.full_like(y, reach)
  for _ in range(100):
    mid = (low + high) / 2
    b, a = tails(mid, alpha_to, sigma_to)
    short = np.where(below < above, b < below, a > above)  # by the smaller, exact tail
    low, high = np.where(short, mid, low), np.where(short, high, mid)
  return (low + high) / 2 @ data.axes.T


def quantiles(count=7, reach=2.):
  """Points [count 2] spread over the plane, within `reach` of 0 in each coordinate."""
  along = np.linspace(-reach, reach, count)
  return np.stack([along, np.roll(along, count // 2)], axis=1)
