"""Tiles: equal to the whole where a map is local, near it for autoencoders, one program for all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import tiles
from diffax.models import autoencoder

MAPS = {  # kernel, strides, padding and repeats of convolutions in a row; scale
  'same': ([(3, 1, (1, 1), 1), (3, 1, (1, 1), 1)], 1),
  'encode': ([(3, 1, (1, 1), 1), (3, 2, (0, 1), 1), (3, 2, (0, 1), 1)], 1 / 4),
  'decode': ([(3, 1, (1, 1), 1), (3, 1, (1, 1), 2), (3, 1, (1, 1), 2)], 4),
}


def local(name):
  """A stack of convolutions with biases and relu, which see few places: [b h w 2] -> the same."""
  rng = np.random.default_rng(0)
  draw = lambda side: jnp.float32(rng.standard_normal((side, side, 2, 2)) / side)
  kernels = [draw(side) for side, *_ in MAPS[name][0]]

  @jax.jit
  def f(x):
    for kernel, (_, stride, pad, repeats) in zip(kernels, MAPS[name][0]):
      x = jnp.repeat(jnp.repeat(x, repeats, 1), repeats, 2)
      x = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (pad, pad), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
      x = jax.nn.relu(x + 0.5)
    return x

  return f


def picture(height, width, channels=2, batch=2):
  return np.random.default_rng(1).standard_normal((batch, height, width, channels)).astype(
    np.float32)


@pytest.mark.parametrize('name', MAPS)
@pytest.mark.parametrize('sides', [(96, 76), (40, 32), (32, 100)])
def test_local_maps_are_equal(name, sides):
  """Everywhere, at any number of tiles, also where they are shifted to end with the picture."""
  f, x = local(name), picture(*sides)
  got = tiles.apply(f, x, 32, 16, MAPS[name][1])
  want = f(x)
  assert got.shape == want.shape and got.dtype == np.float32
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_what_reaches_beyond_shows():
  """An overlap that is too small for what the map sees is not equal: the test above can fail."""
  f, x = local('same'), picture(96, 64)
  assert np.abs(tiles.apply(f, x, 32, 0) - f(x)).max() > 0.1


def test_smaller_pictures():
  """Equal to the whole but for what sees beyond its right and lower edges."""
  f, x = local('decode'), picture(20, 24)
  got, want = tiles.apply(f, x, 32, 16, 4), f(x)
  assert got.shape == want.shape == (2, 80, 96, 2)
  np.testing.assert_allclose(got[:, :68, :84], want[:, :68, :84], rtol=0, atol=1e-5)
  one = tiles.apply(f, x[:, :1, :1], 32, 16, 4)
  assert one.shape == (2, 4, 4, 2) and np.isfinite(one).all()


@pytest.mark.parametrize('side,tile,overlap,unit', [
  (512, 512, 64, 8), (520, 512, 64, 8), (2048, 512, 128, 8), (1000, 96, 64, 8), (97, 32, 0, 1),
  (61, 7, 5, 1), (64, 32, 0, 1),
])  # fmt: skip
def test_weights_sum_to_one(side, tile, overlap, unit):
  """And lie within [0, 1], and tiles begin on the grid, overlap enough and end with the side."""
  starts = tiles.places(side, tile, overlap, unit)
  assert starts[0] == 0 and starts[-1] + tile == side
  assert all(start % unit == 0 for start in starts)
  assert all(0 < b - a <= tile - overlap for a, b in zip(starts, starts[1:]))
  assert len(starts) - 1 < (side - tile) / (tile - overlap) + 1  # no more of them than needed
  total = np.zeros(side)
  for start, weights in zip(starts, tiles.blend(starts, tile)):
    assert weights.min() >= 0 and weights.max() <= 1
    total[start : start + tile] += weights
  np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_fade_is_linear():
  """Two tiles that share 8 places: 2 that are not used on either side, a ramp over 4."""
  left, right = tiles.blend([0, 8], 16)
  np.testing.assert_allclose(left, [1] * 10 + [0.875, 0.625, 0.375, 0.125, 0, 0])
  np.testing.assert_allclose(right, left[::-1])


def test_bad_input():
  f, x = local('encode'), picture(64, 64)
  with pytest.raises(ValueError, match='overlap=32'):
    tiles.apply(f, x, 32, 32, 1 / 4)
  with pytest.raises(ValueError, match='tile=34 does not divide by the factor 4'):
    tiles.apply(f, x, 34, 8, 1 / 4)
  with pytest.raises(ValueError, match='the width=62'):
    tiles.apply(f, x[:, :, :62], 32, 8, 1 / 4)
  with pytest.raises(ValueError, match='64, 64, 2'):
    tiles.apply(f, x[0], 32, 8, 1 / 4)
  with pytest.raises(ValueError, match='overlap=32'):
    tiles.shared(f, x, 32, 32, 1 / 4)


# --- an autoencoder -------------------------------------------------------------------------------


@functools.lru_cache
def network():
  """(model, params) of a small one with attention in the middle, nothing at zero."""
  model = autoencoder.autoencoder_kl(8, (1, 2), 1, groups=4)
  like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))['params']
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    kind = path[-1].key
    scale = np.prod(leaf.shape[:-1]) ** -0.5 if kind == 'kernel' else 0.1
    return jnp.float32(scale * rng.standard_normal(leaf.shape) + (kind == 'scale'))

  return model, jax.tree_util.tree_map_with_path(draw, like)


@functools.lru_cache
def program(method):
  model, params = network()
  f = jax.jit(lambda params, x, told: model.apply(
    {'params': params, 'told': told.get('intermediates', {})}, x, method=method,
    mutable='intermediates'))
  return functools.partial(f, params)


def smooth(side, channels=3):
  """A picture of a gradient, slow waves and a disc, in [-1, 1]: [1 side side c]."""
  y, x = np.mgrid[0:side, 0:side] / side
  waves = [0.4 * np.sin(7 * x + 5 * y + i) + 0.3 * np.cos(9 * y - 4 * x * i) for i in
           range(channels)]
  disc = np.hypot(x - 0.6, y - 0.4) < 0.2
  return np.float32(np.stack(waves, -1) + 0.3 * x[..., None] * disc[..., None])[None]


def apart(a, b):
  """Root mean square of the difference, in parts of b's deviation."""
  return float(np.sqrt(np.mean((a - b) ** 2)) / np.std(b))


@pytest.mark.parametrize('method,x,tile,scale', [
  ('encode', smooth(128), 64, 1 / 2), ('decode', smooth(64, 4), 32, 2),
])  # fmt: skip
def test_autoencoder_is_near_the_whole(method, x, tile, scale):
  """Of drawn weights, whose attention is all but a mean, to half a deviation tile by tile; what a
  thumbnail tells takes more than half of that away.
  """
  f = program(method)
  want = np.asarray(f(x, {})[0])
  alone = apart(tiles.apply(lambda x: f(x, {})[0], x, tile, tile // 4, scale), want)
  by_host = tiles.shared(f, x, tile, tile // 4, scale)
  shared = apart(by_host, want)
  traced = jax.jit(functools.partial(tiles.traced, f, tile=tile, overlap=tile // 4, scale=scale))
  np.testing.assert_allclose(traced(x), by_host, rtol=0, atol=1e-5 * np.abs(want).max())
  low = x[:, : tile // 2, : tile // 2 + 8]  # smaller than a tile, mirrored
  np.testing.assert_allclose(
    traced(low), tiles.shared(f, low, tile, tile // 4, scale), rtol=0,
    atol=1e-5 * np.abs(want).max())
  assert 0.05 < alone < 1.0
  assert shared < 0.35 and shared < alone / 2


def test_told_of_the_whole():
  """Told the norms' moments and attention's keys and values of the whole itself, tiles are near it
  but for what they see of zeros beyond their edges, through a quarter of the overlap.
  """
  f, x = program('decode'), smooth(64, 4)
  want, told = f(x, {})
  got = tiles.apply(lambda x: f(x, told)[0], x, 48, 32, 2)
  assert apart(got, np.asarray(want)) < 1e-3
  again, _ = f(x, told)
  np.testing.assert_allclose(again, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_one_program_for_all():
  """Whatever the picture: each call is of one shape, so that memory is that of one tile."""
  memory = {}
  for side in (512, 2048):
    seen = set()

    def record(x, seen=seen):
      seen.add(x.shape)
      return np.zeros((1, x.shape[1] // 2, x.shape[2] // 2, 8), np.float32)

    tiles.apply(record, np.broadcast_to(np.float32(0), (1, side, side - 8, 3)), 64, 16, 1 / 2)
    (shape,) = seen
    memory[side] = used(shape)
  assert memory[512] == memory[2048]
  assert used((1, 128, 128, 3)) > 3 * memory[512]  # which the whole picture would need and more


def test_memory_of_a_traced_loop():
  """Beyond the picture and what becomes of it, that of a tile, however large the picture."""
  f = program('encode')

  def temporaries(side):
    loop = jax.jit(functools.partial(tiles.traced, f, tile=64, overlap=16, scale=1 / 2))
    shape = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    said = loop.lower(shape).compile().memory_analysis()
    made = (side // 2) ** 2 * 8 * 4  # the loop's own copy of its result
    return said.temp_size_in_bytes - made

  assert temporaries(1024) < 1.1 * temporaries(256)


@functools.lru_cache
def used(shape):
  """Bytes of temporaries, arguments and output of the encoder's program."""
  model, params = network()
  f = jax.jit(lambda params, x: model.apply({'params': params}, x, method='encode'))
  said = f.lower(params, jax.ShapeDtypeStruct(shape, np.float32)).compile().memory_analysis()
  return said.temp_size_in_bytes + said.argument_size_in_bytes + said.output_size_in_bytes
