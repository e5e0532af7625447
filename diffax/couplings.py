"""What a network is shown in training beside x0 and unit noise.

A *coupling* is a function `(keys, x0, eps) -> eps`: the noise that each example is trained with,
for keys [b], data and unit noise [b ...]. The target is made of the noise it returns. Input
perturbation and self-conditioning change what the network is shown alone: they are functions from
`predict`, (x, level) -> the raw output that `losses.diffusion_loss` asks, to another.
"""

from collections.abc import Callable

import einops
import jax
from jax import Array
import jax.numpy as jnp

from diffax import noises
from diffax import predictions
from diffax import samplers


Coupling = Callable[[Array, Array, Array], Array]


# --- couplings: (keys, x0, eps) -> eps ------------------------------------------------------------


def independent() -> Coupling:
  """Unit noise as it is drawn, whatever the data."""
  return lambda keys, x0, eps: eps


def optimal_transport() -> Coupling:
  """Pairs each x0 with the noise that makes the batch's sum of squared distances least.

  Exact, in O(b^3); call it on the whole batch, for a part of one is paired worse. Needs optax.
  Pooladian et al. 2023, "Multisample Flow Matching"; Tong et al. 2023, "Improving and Generalizing
  Flow-Based Generative Models with Minibatch Optimal Transport".
  """
  def couple(keys, x0, eps):
    import optax.assignment
    del keys
    wide = jnp.promote_types(x0.dtype, jnp.float32)
    flat = lambda a: einops.rearrange(a, 'b ... -> b (...)').astype(wide)
    # |x0 - eps|^2 = |x0|^2 + |eps|^2 - 2 x0 eps, whose squares pairing cannot change
    cost = -jnp.matmul(flat(x0), flat(eps).T, precision='highest')
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return eps[columns[jnp.argsort(rows)]]
  return couple


def offset(strength=0.1) -> Coupling:
  """eps plus `strength` times one unit normal for each example and channel, channels last.

  Not scaled back: the variance is 1 + strength^2. Guttenberg 2023, "Diffusion with Offset Noise".
  """
  def couple(keys, x0, eps):
    del x0
    shape = (*[1] * (eps.ndim - 2), eps.shape[-1])
    return eps + strength * noises.normal(keys, shape, eps.dtype)
  return couple


def pyramid(discount=0.9) -> Coupling:
  """eps [b h w c] plus noise of every halved resolution down to 1, discount^level of each.

  Scaled back to unit variance, in the mean over the places. Whitaker 2023, "Multi-Resolution Noise
  for Diffusion Model Training", which draws the factors between resolutions; here each is 2.
  """
  def couple(keys, x0, eps):
    del x0
    if eps.ndim != 4:
      raise ValueError(f'pyramid noise wants images [b h w c], not noise of shape {eps.shape}')
    total, variance, (height, width, channels) = eps, 1., eps.shape[1:]
    for level in range(1, min(height, width).bit_length()):
      tall, wide = _stretch(height, level, eps.dtype), _stretch(width, level, eps.dtype)
      folded = jax.vmap(jax.random.fold_in, (0, None))(keys, level)
      coarse = noises.normal(folded, (tall.shape[1], wide.shape[1], channels), eps.dtype)
      total += discount**level * jnp.einsum('hi,wj,bijc->bhwc', tall, wide, coarse)
      variance += discount**(2 * level) * jnp.sum(tall**2) * jnp.sum(wide**2) / (height * width)
    return total / jnp.sqrt(variance)
  return couple


def _stretch(size, level, dtype):
  """Linear interpolation to `size` from its size >> level, a matrix [size, size >> level]."""
  few = size >> level
  return jax.image.resize(jnp.eye(few, dtype=dtype), (size, few), 'linear')


# --- what the network is shown: predict -> predict ------------------------------------------------


def perturb(predict, keys, gamma=0.1):
  """Input perturbation: x is shown with noise eps + gamma xi, xi unit noise, and asked for eps.

  predict: (x, level) -> output; keys: [b]. Ning et al. 2023, "Input Perturbation Reduces Exposure
  Bias in Diffusion Models", algorithm 1.
  """
  def perturbed(x, level):
    return predict(x + level.sigma * gamma * noises.normal(keys, x.shape[1:], x.dtype), level)
  return perturbed


def self_condition(predict, prediction, keys, rate=0.5):
  """Shows the network its own x0 at the same x, without a gradient, for a `rate` of the examples.

  predict: (x, level, before) -> raw output, where `before`, of x's shape, is the estimate or, for
  the other examples, 0; keys: [b]. Returns (x, level) -> raw output. Chen et al. 2022, "Analog
  Bits", algorithm 1.
  """
  def conditioned(x, level):
    first = predict(x, level, jnp.zeros_like(x))
    x0 = jax.lax.stop_gradient(predictions.solve(prediction, first, x, level).x0)
    shown = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)
    shown = shown.reshape(len(x), *[1] * (x.ndim - 1))
    return predict(x, level, jnp.where(shown, x0, 0.).astype(x.dtype))
  return conditioned


def remember(denoise):
  """The self-conditioned denoiser for sampling: shown the x0 that it told last, at first 0.

  denoise: (x, level, before) -> x0 or `Estimate`. Returns a `samplers.Denoiser`. Chen et al. 2022,
  algorithm 2.
  """
  def apply(x, level, before):
    said = predictions.estimate(denoise(x, level, before), x, level)
    return said, said.x0.astype(x.dtype)
  return samplers.Denoiser(jnp.zeros_like, apply)
