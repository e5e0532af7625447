"""Large pictures through a network tile by tile, blended where tiles overlap.

  y[p] = sum_k w_k[p] f(x_k)[p - start_k],   sum_k w_k = 1

All tiles have one shape, so that one program serves all, and what a device holds does not grow with
the picture: pictures stay in numpy. Tiles lie evenly from edge to edge, their starts on multiples
of the factor, so that strided convolutions see the places that they would see in the whole. Of an
overlap the outer quarter on either side, which the zeros beyond a tile's edge have reached, is not
used; over the half between, one tile fades into the next.

What differs from the picture as a whole, beside places that see farther than that quarter:

  group norms        see their tile: one of flat sky gains contrast
  attention          sees its tile alone, where in the whole it is among all places
  a smaller picture  is mirrored up to one tile: its right and lower edges are none to the network

Of the first two `shared` leaves little: one call more, of a thumbnail, whose moments, keys and
values serve all tiles (measured in experiments/tiling). The usual way fades over all of an overlap
and leaves each tile to itself.
"""

import fractions
import itertools

import jax
import jax.numpy as jnp
import numpy as np


def apply(function, x, tile, overlap, scale=1):
  """`function` of a picture x [b h w c], tile by tile: [b h*scale w*scale c'], numpy.

  function: [b tile tile c] -> [b tile*scale tile*scale c'], jitted by the caller, called with that
  one shape alone. tile, overlap: sides in places of x. scale: how many places a side come of one, 8
  of a decoder, 1/8 of an encoder.
  Raises ValueError for an overlap that is no part of the tile, and for sides, tiles and overlaps
  that do not divide by an encoder's factor.
  """
  x, ratio = np.asarray(x), fractions.Fraction(scale).limit_denominator(1024)
  unit = ratio.denominator
  _check(x, tile, overlap, unit)
  sides = x.shape[1:3]
  rows, columns = (places(max(side, tile), tile, overlap, unit) for side in sides)
  down, across = (blend(starts, tile, ratio) for starts in (rows, columns))
  y, whole = None, [int(max(side, tile) * ratio) for side in sides]
  for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
    out = np.asarray(function(_cut(x, row, column, tile)))
    if y is None:
      y = np.zeros((len(x), *whole, out.shape[-1]), np.float32)
    top, left, side = int(row * ratio), int(column * ratio), int(tile * ratio)
    weight = (down[i][:, None] * across[j][None])[None, ..., None]
    y[:, top : top + side, left : left + side] += weight * out
  return y[:, : int(sides[0] * ratio), : int(sides[1] * ratio)]


def shared(function, x, tile, overlap, scale=1):
  """As `apply`, but all tiles go by what a thumbnail of the picture told, not each by its own.

  function: (tile, told) -> (out, tells), told a tree as `tells`, or {} for the thumbnail. For those
  of `models.autoencoder`:

    decode = jax.jit(lambda params, z, told: model.apply(
      {'params': params, 'told': told.get('intermediates', {})}, z, method='decode',
      mutable='intermediates'))
    tiles.shared(functools.partial(decode, params), z, tile=64, overlap=16, scale=8)

  The thumbnail is of one tile's shape, places of the picture as they are: means would take contrast
  from it, which the norms are to see. Raises ValueError as `apply`.
  """
  x = np.asarray(x)
  _check(x, tile, overlap, fractions.Fraction(scale).limit_denominator(1024).denominator)
  told = function(_thumbnail(x, tile), {})[1]
  return apply(lambda cut: function(cut, told)[0], x, tile, overlap, scale)


def traced(function, x, tile, overlap, scale=1):
  """As `shared`, within a jitted function: tiles are a loop of its program, in whose memory the
  picture lies as a whole, and of what the network makes of it no more than a tile's.
  """
  ratio = fractions.Fraction(scale).limit_denominator(1024)
  _check(x, tile, overlap, ratio.denominator)
  sides = x.shape[1:3]
  told = function(_thumbnail(x, tile), {})[1]
  x = _mirrored(x, tile)
  starts = [places(side, tile, overlap, ratio.denominator) for side in x.shape[1:3]]
  fades = [np.stack(blend(axis, tile, ratio)) for axis in starts]
  cut = lambda row, column: function(
    jax.lax.dynamic_slice(x, (0, row, column, 0), (len(x), tile, tile, x.shape[-1])), told)[0]
  like = jax.eval_shape(cut, 0, 0)

  def add(y, of):
    (row, column), (top, left), (down, across) = of
    weight = (down[:, None] * across[None])[None, ..., None]
    place = (0, top, left, 0)
    old = jax.lax.dynamic_slice(y, place, like.shape)
    return jax.lax.dynamic_update_slice(y, old + weight * cut(row, column), place), None

  corners = np.asarray(list(itertools.product(*starts)))
  pairs = np.asarray(list(itertools.product(*map(range, map(len, starts)))))
  of = corners, corners * ratio.numerator // ratio.denominator, tuple(
    fade[i] for fade, i in zip(fades, pairs.T))
  whole = (int(side * ratio) for side in x.shape[1:3])
  y, _ = jax.lax.scan(add, jnp.zeros((len(x), *whole, like.shape[-1]), like.dtype), of)
  return y[:, : int(sides[0] * ratio), : int(sides[1] * ratio)]


def _thumbnail(x, tile):
  """A tile of places of the whole picture, evenly."""
  rows, columns = (
    ((np.arange(min(tile, side)) + 0.5) * max(side / tile, 1)).astype(int) for side in x.shape[1:3]
  )
  return _cut(x[:, rows][:, :, columns], 0, 0, tile)


def places(side, tile, overlap, unit=1):
  """Where tiles begin along a side: as few as overlap so far, evenly, on multiples of `unit`."""
  count = 1 + -(-(side - tile) // (tile - overlap))
  room = (side - tile) // unit
  return [unit * (k * room // max(count - 1, 1)) for k in range(count)]


def blend(starts, tile, ratio=1):
  """Each tile's weights along a side, [tile * ratio] each: at every place they sum to 1.

  starts: of the tiles, rising. Between two the weight falls and rises over the inner half of what
  they share.
  """
  starts, side = [int(s * ratio) for s in starts], int(tile * ratio)
  places = np.arange(starts[-1] + side) + 0.5

  def passed(before, after):
    """0 where the tile that began before alone counts, 1 where the next one does."""
    width = before + side - after
    margin = width // 4
    return np.clip((places - after - margin) / max(width - 2 * margin, 1e-9), 0, 1)

  rises = [np.ones(len(places)), *map(passed, starts, starts[1:]), np.zeros(len(places))]
  weights = [a - b for a, b in itertools.pairwise(rises)]
  return [w[s : s + side].astype(np.float32) for s, w in zip(starts, weights)]


def _cut(x, row, column, tile):
  """The tile at a place, mirrored beyond the end of a picture that is smaller."""
  return _mirrored(x[:, row : row + tile, column : column + tile], tile)


def _mirrored(x, least):
  missing = [(0, max(least - side, 0)) for side in x.shape[1:3]]
  pad = jnp.pad if isinstance(x, jax.Array) else np.pad
  return pad(x, [(0, 0), *missing, (0, 0)], 'symmetric') if np.any(missing) else x


def _check(x, tile, overlap, unit):
  if x.ndim != 4 or not x.size:
    raise ValueError(f'a picture is [b h w c]; here is {x.shape}')
  if not 0 <= overlap < tile:
    raise ValueError(f'overlap={overlap} must be from 0 to less than tile={tile}')
  for name, side in (
    ('the height', x.shape[1]), ('the width', x.shape[2]), ('tile', tile), ('overlap', overlap)
  ):
    if side % unit:
      raise ValueError(f'{name}={side} does not divide by the factor {unit}: choose or pad it so')
