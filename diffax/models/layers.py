"""What networks share: layout by logical names, embeddings, patches, attention, dropout."""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
import numpy as np


def constrain(x, *names):
  """Lays `x` out by logical axis names ('batch', 'tokens', 'width', ... or None), a name an axis.

  What mesh axes a name means is said by the rules in force (`layout`); without a mesh in force
  nothing happens. Models name no mesh axis.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(x, *names))


def spec(x, *names):
  """The mesh axes, a PartitionSpec, that logical names mean for the axes of `x`.

  A mesh axis that does not divide its axis of x is left out, as for the last of the maps of a
  U-Net, which are smaller than the first.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return P(*[None] * len(names))

  def fit(axes, size):
    kept = []
    for axis in (axes,) if isinstance(axes, str) else axes or ():
      if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0:
        kept, size = [*kept, axis], size // mesh.shape[axis]
    return tuple(kept) if len(kept) > 1 else kept[0] if kept else None

  return P(*map(fit, nn.logical_to_mesh_axes(names), x.shape))


def check_split(size, name):
  """Raises ValueError where the mesh axes that a logical name means do not divide `size`."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = None if mesh.empty else nn.logical_to_mesh_axes((name,))[0]
  for axis in (axes,) if isinstance(axes, str) else axes or ():
    if size % mesh.shape[axis]:
      raise ValueError(
        f'{size} {name} do not divide by mesh.{axis}={mesh.shape[axis]}, so that its devices would '
        'only repeat each other: take another mesh'
      )


def check_cond(cond, batch, declared, optional=()):
  """Raises ValueError where a model's cond is not what its options declare.

  declared: {name in cond: (option, its value, shape behind the batch's axis)}; an option of value 0
  declares nothing, and None in a shape is any size. optional: names that may be left out.
  """
  if set(cond) - set(declared):
    raise ValueError(f'cond has {sorted(cond)}; this model takes {", ".join(declared)}')
  for name, (option, said, shape) in declared.items():
    if name not in cond:
      if said and name not in optional:
        raise ValueError(f'model.{option}={said} needs cond[{name!r}], and cond has {sorted(cond)}')
      continue
    if not said:
      raise ValueError(f'cond[{name!r}] is given, but model.{option}={said}: say it there')
    found, want = jnp.shape(cond[name]), (batch, *shape)
    if len(found) != len(want) or any(w not in (None, f) for w, f in zip(want, found)):
      raise ValueError(f'cond[{name!r}] is {found}; with model.{option}={said} it must be {want}')


def platform():
  """'cpu', 'gpu' or 'tpu': of the mesh in force, which need not be of this machine's devices; of
  the default device where there is none, as in a notebook.
  """
  device = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
  return device.platform if device else jax.devices()[0].platform


layout = nn.logical_axis_rules  # a context: ((logical name, mesh axes), ...)


def sinusoids(t, width, longest=10_000.0, endpoint=False):
  """[cos, sin] of t at width / 2 geometric frequencies from 1 to 1 / longest: [b] -> [b width].

  The time embedding of Ho et al. 2020 and DiT, for t about 0 to 1000. endpoint: whether the last
  frequency is 1 / longest itself (Ho et al.) or would be the next (ADM, DiT). float32.
  """
  half = width // 2
  rate = np.exp(-np.log(longest) * np.arange(half) / (half - endpoint)).astype(np.float32)
  wave = t.astype(jnp.float32)[:, None] * rate[None]
  return jnp.concatenate([jnp.cos(wave), jnp.sin(wave)], axis=-1)


def fourier(t, frequencies):
  """[cos, sin] of 2 pi t times the frequencies: [b], [n] -> [b 2n], float32; Tancik et al. 2020."""
  turns = t.astype(jnp.float32)[:, None] * frequencies[None]
  wave = 2 * np.pi * (turns - jnp.round(turns))  # whole turns would cost digits of the angle
  return jnp.concatenate([jnp.cos(wave), jnp.sin(wave)], axis=-1)


def coordinates(shape, base=0, scale=1.0):
  """Places of an N-d grid, row by row, [n N]: 0, 1, ... along each axis.

  base: where it is not 0, an axis of n places has 0, base / n, ..., so that a grid of any shape
  covers what one of `base` a side does. scale: divides them. Chen et al. 2023, "PixArt-alpha",
  after Xie et al. 2023, "DiffFit", sec. 3.4: position interpolation.
  """
  axes = [np.arange(n) * (base / n if base else 1.0) / scale for n in shape]
  return einops.rearrange(np.stack(np.meshgrid(*axes, indexing='ij')), 'a ... -> (...) a')


def _waves(places, width, longest):
  """Coordinates [n N] at width / 2N geometric frequencies, the last axis first: [n N half]."""
  axes = places.shape[1]
  if width % (2 * axes):
    raise ValueError(
      f'width={width} does not divide by {2 * axes}: a sine and a cosine for each of {axes} axes'
    )
  half = width // axes // 2
  return places[:, ::-1, None] * longest ** (-np.arange(half) / half)


def sincos_positions(shape, width, longest=10_000.0, base=0, scale=1.0):
  """Fixed embedding [n width] of the places of an N-d grid; Peebles & Xie 2023, after ViT and MAE.

  Each axis has width / N channels, [sin, cos] of its coordinate, the last axis first. base, scale:
  of the coordinates, see `coordinates`.
  Raises ValueError where the width does not divide by twice the number of axes.
  """
  waves = _waves(coordinates(shape, base, scale), width, longest)
  waves = np.concatenate([np.sin(waves), np.cos(waves)], axis=-1)
  return einops.rearrange(waves, 'n a c -> n (a c)').astype(np.float32)


def rotary(shape, width, longest=10_000.0, base=0, scale=1.0):
  """How each place of an N-d grid turns the pairs of a head's channels: [2 n width / 2], cos, sin.

  Each axis has width / N channels, the last axis first, pair i of them the angle coordinate /
  longest^(i / pairs). Su et al. 2021, "RoFormer", eq. 15; on grids as in Li et al. 2024,
  "Hunyuan-DiT". base, scale, errors: as of `sincos_positions`. float32.
  """
  waves = _waves(coordinates(shape, base, scale), width, longest)
  angles = einops.rearrange(waves, 'n a c -> n (a c)')
  return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def rotate(x, turns):
  """Turns channels (2i, 2i + 1) of x [b n k d] by `rotary`'s [2 n d / 2]; in float32, then as x.

  The product of two places so turned knows of the difference of their coordinates alone.
  """
  cos, sin = turns[:, None, :, None]  # [1 n 1 d/2]
  a, b = jnp.moveaxis(einops.rearrange(x.astype(jnp.float32), '... (i p) -> ... i p', p=2), -1, 0)
  turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return einops.rearrange(turned, '... i p -> ... (i p)').astype(x.dtype)


def _axes(n):
  """'(n0 p0) (n1 p1)', 'n0 n1' and 'p0 p1' for two axes: einops' names of places and of patches."""
  return (' '.join(f.format(i) for i in range(n)) for f in ('(n{0} p{0})', 'n{0}', 'p{0}'))


def patchify(x, patch):
  """[b *space c] -> tokens [b n (*patch c)], in any number of space axes, `patch` a side."""
  axes = range(x.ndim - 2)
  if any(side % patch for side in x.shape[1:-1]):
    raise ValueError(f'a grid of {x.shape[1:-1]} does not divide into patches of {patch}')
  split, places, inner = _axes(len(axes))
  sizes = {f'p{i}': patch for i in axes}
  return einops.rearrange(x, f'b {split} c -> b ({places}) ({inner} c)', **sizes)


def unpatchify(tokens, space, patch):
  """Undoes `patchify`: [b n (*patch c)] -> [b *space c]."""
  axes = range(len(space))
  split, places, inner = _axes(len(axes))
  sizes = {f'n{i}': side // patch for i, side in enumerate(space)} | {f'p{i}': patch for i in axes}
  return einops.rearrange(tokens, f'b ({places}) ({inner} c) -> b {split} c', **sizes)


def unroll(length):
  """How many steps of a scan over convolutions to write out: on a CPU all, else one.

  Within a loop XLA for CPUs has no fast program for the gradients of a convolution (it brings the
  order of their axes into the one that has at the top level of a program alone): a hundred times
  the time.
  """
  return length if platform() == 'cpu' else 1


def unroll_blocks(length):
  """How many blocks of a scan to write out: on a GPU all, else one.

  Each step of a loop on a GPU copies its slices of the kernels and of what is kept for the backward
  pass, and nothing is fused or overlapped across its end. TPUs have loops for free.
  """
  return length if platform() == 'gpu' else 1


def when(flag, act, rest):
  """act() where `flag`, a traced bool, holds, else rest(): `lax.cond`. On a CPU both are computed.

  Within a branch, as within a loop, XLA for CPUs has no fast program for the gradients of a
  convolution (see `unroll`): forty times the time.
  """
  if platform() != 'cpu':
    return jax.lax.cond(flag, act, rest)
  return jax.tree.map(lambda x, y: jnp.where(flag, x, y), act(), rest())


def conv(x, kernel, strides, padding, lhs_dilation=None, rhs_dilation=None, dimension_numbers=None,
         feature_group_count=1, precision=None):
  """A convolution of [b h *space c], with kernel [*sides in out]: `lax.conv_general_dilated`.

  Where the rows h are split over devices, each takes those it needs of its neighbours' and none has
  more. XLA splits convolutions so by itself, but has the gradient of the kernel twice where another
  axis of the mesh only repeats the rows (jax 0.10.2).
  """
  options = dict(
    lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers or _channels_last(x.ndim),
    feature_group_count=feature_group_count, precision=precision,
  )
  rows = spec(x, None, 'height', *[None] * (x.ndim - 2))
  axis, side, stride = rows[1], kernel.shape[0], strides[0]
  if not axis:
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
  if padding in ('SAME', 'VALID'):
    padding = jax.lax.padtype_to_pads(x.shape[1:-1], kernel.shape[:-2], strides, padding)
  (low, high), *rest = padding
  parts = jax.sharding.get_abstract_mesh().shape[axis]
  own = x.shape[1] // parts
  if own % stride or low + high != side - stride or max(low, high) > own:
    whole = lambda x: constrain(x, 'batch', *[None] * (x.ndim - 1))
    return whole(jax.lax.conv_general_dilated(whole(x), kernel, strides, padding, **options))

  def local(x, kernel):
    up, down = [(i, i + 1) for i in range(parts - 1)], [(i + 1, i) for i in range(parts - 1)]
    above = [jax.lax.ppermute(x[:, own - low :], axis, up)] if low else []
    below = [jax.lax.ppermute(x[:, :high], axis, down)] if high else []
    x = jnp.concatenate([*above, x, *below], axis=1)  # zeros beyond the first and the last
    return jax.lax.conv_general_dilated(x, kernel, strides, [(0, 0), *rest], **options)

  return jax.shard_map(
    local, in_specs=(rows, P()), out_specs=rows, axis_names={axis}, check_vma=False
  )(x, kernel)


def _channels_last(rank):
  space = ''.join(chr(ord('0') + i) for i in range(rank - 2))
  return jax.lax.conv_dimension_numbers(
    (1,) * rank, (1,) * rank, (f'N{space}C', f'{space}IO', f'N{space}C')
  )


def flat_dot(x, kernel, dimensions, **options):
  """The product of a Dense layer, [... in] by [in out], on a CPU over rows in one axis.

  The gradient of a kernel then sums over one axis, not two, which takes half the time there. Tokens
  that are split over devices stay in an axis of their own.
  """
  split = x.ndim > 2 and spec(x, None, 'tokens', *[None] * (x.ndim - 2))[1]
  if split or platform() != 'cpu':
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **options)
  rows = x.reshape(-1, x.shape[-1])
  return jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options).reshape(
    *x.shape[:-1], -1
  )


POLICIES = ('none', 'dots_saveable', 'dots_with_no_batch_dims_saveable', 'nothing_saveable')


def remat(module, name, **options):
  """The module, of whose inner values the backward pass finds only what the policy `name` keeps.

  name: 'none' recomputes nothing; else a name of `jax.checkpoint_policies`: 'dots_saveable'
  recomputes all but products and convolutions, 'nothing_saveable' all from the module's input.
  Raises ValueError for another.
  """
  if name not in POLICIES:
    raise ValueError(f'model.remat={name!r} is none of {", ".join(POLICIES)}')
  return module if name == 'none' else nn.remat(module, policy=policy(name), **options)


def policy(name):
  """The function of `jax.checkpoint_policies`; `dots_saveable` keeps what is a product in all but
  its name, too: a `Dense` with its bias, and attention by one kernel.

  Where tokens are split it leaves out products within examples, the ring's blocks of scores, of
  which it is to keep none.
  """
  if name != 'dots_saveable':
    return getattr(jax.checkpoint_policies, name)
  mesh = jax.sharding.get_abstract_mesh()
  axis = None if mesh.empty else nn.logical_to_mesh_axes(('tokens',))[0]
  dots = _unbatched if axis and mesh.shape[axis] > 1 else jax.checkpoint_policies.dots_saveable
  products = jax.checkpoint_policies.save_only_these_names(PRODUCT)
  return lambda primitive, *args, **params: (
    primitive.name in KERNELS or products(primitive, *args, **params)
    or dots(primitive, *args, **params))


PRODUCT = 'product'  # what `Dense` calls its result
KERNELS = ('dot_product_attention_fwd_wrapper', 'dot_product_attention_fwd', 'pallas_call')


def _unbatched(primitive, *_, **params):
  if primitive is jax.lax.dot_general_p:
    _, (batched, _) = params['dimension_numbers']
    return not batched
  return primitive is jax.lax.conv_general_dilated_p


class Dense(nn.Dense):
  """Linen's, whose result with its bias is what a backward pass finds (`policy`).

  The product alone would else be kept, the bias added twice, and neither fused with the other. And
  the gradient of a bias is a sum over all tokens in the bias's own dtype: in bfloat16, as GPUs
  would take it, thousands of numbers come to two digits.
  """

  @nn.compact
  def __call__(self, x):
    shape = x.shape[-1], self.features
    kernel = self.param('kernel', self.kernel_init, shape, self.param_dtype)
    x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
    dot = self.dot_general or jax.lax.dot_general
    y = dot(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=self.precision)
    if self.use_bias:
      bias = self.param('bias', self.bias_init, shape[1:], self.param_dtype)
      y += jnp.broadcast_to(bias, y.shape).astype(y.dtype)
    return checkpoint_name(y, PRODUCT)


@jax.custom_jvp
def gelu(x):
  """GELU by tanh (Hendrycks & Gimpel 2016, section 2): x (1 + tanh u) / 2,
  u = sqrt(2 / pi) (x + 0.044715 x^3).

  Its derivative is written by s = (1 + tanh u) / 2. On a GPU, where XLA gives a tanh that is needed
  twice a kernel of its own, that is sigmoid(2 u); a CPU has tanh the quicker.
  """
  return nn.gelu(x, approximate=True)


@gelu.defjvp
def _gelu_slope(primals, tangents):
  (x,), (dx,) = primals, tangents
  y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  rate, cubic = 2 * np.sqrt(2 / np.pi).item(), 0.044715
  u = rate / 2 * (y + cubic * y**3)
  s = jax.nn.sigmoid(2 * u) if platform() == 'gpu' else (1 + jnp.tanh(u)) / 2
  slope = s + rate * y * s * (1 - s) * (1 + 3 * cubic * y**2)
  return (y * s).astype(x.dtype), slope.astype(x.dtype) * dx


def dropout(x, keys, rate):
  """Zeroes a share `rate` of x and scales the rest; [b ...] with a key an example, `keys` [b].

  Without keys (at test time) x stays. A key an example: the batch, its accumulation and its devices
  change nothing.
  """
  if keys is None or not rate:
    return x
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def group_moments(x, groups):
  """Means of the values and of their squares by group of channels: [b *space c] -> two of [b g].

  float32. Raises ValueError where the channels do not divide into the groups.
  """
  space = tuple(range(1, x.ndim - 1))
  if x.shape[-1] % groups:
    raise ValueError(f'{x.shape[-1]} channels do not divide into {groups} groups')
  x = x.astype(jnp.float32)
  return tuple(
    einops.reduce(m, 'b (g c) -> b g', 'mean', g=groups)
    for m in (x.mean(space), (x * x).mean(space))
  )


def group_norm(x, scale, shift, groups, eps, moments=None):
  """Group norm over channels and space, Wu & He 2018: [b *space c] -> float32, the same shape.

  scale, shift: of the channels, [c], or of each example's, [b c]: an adaptive norm costs no further
  pass over x. moments: of `group_moments`, where they are others than those of x itself. Raises
  ValueError where the channels do not divide into the groups.
  """
  space = tuple(range(1, x.ndim - 1))
  wide = lambda moment: jnp.expand_dims(moment, space)  # [b c] -> [b 1 1 c]
  mean, square = (  # of groups, [b c]
    jnp.repeat(m, x.shape[-1] // groups, axis=-1) for m in moments or group_moments(x, groups)
  )
  variance = jnp.maximum(square - mean * mean, 0)
  scale = jnp.atleast_2d(scale) * jax.lax.rsqrt(variance + eps)
  return x.astype(jnp.float32) * wide(scale) + wide(jnp.atleast_2d(shift) - mean * scale)


def blur(x, taps, before, after, axis, stride=1):
  """Correlates one axis with `taps` as they stand, zeros beyond the ends; every `stride`-th."""
  pad = [(before, after) if i == axis else (0, 0) for i in range(x.ndim)]
  x = jnp.pad(x, pad)
  end = x.shape[axis] - len(taps) + 1
  return sum(
    tap * jax.lax.slice_in_dim(x, k, k + end, stride, axis) for k, tap in enumerate(taps)
  )


def downsample(x, taps=(1, 1)):
  """Halves each space axis of [b *space c] behind a symmetric FIR filter of an even length.

  taps: before they are normalised; (1, 1) is the mean of pairs, (1, 3, 3, 1) that of StyleGAN2 and
  NCSN++. Beyond the edge are zeros. Karras et al. 2019, "Analyzing and Improving StyleGAN".
  """
  taps, reach = np.asarray(taps) / sum(taps), len(taps) // 2 - 1
  for axis in range(1, x.ndim - 1):
    x = blur(x, taps.tolist(), reach, reach, axis, 2)
  return x


def upsample(x, taps=(1, 1)):
  """Doubles each space axis of [b *space c], zeros put between, then filtered; see `downsample`.

  (1, 1) repeats each place. Even and odd places are computed each with their half of the taps.
  """
  taps, reach = 2 * np.asarray(taps) / sum(taps), len(taps) // 4
  for axis in range(1, x.ndim - 1):
    even, odd = (taps[1::2], taps[::2]) if len(taps) % 4 else (taps[::2], taps[1::2])
    back = len(even) - 1 - reach
    phases = [
      blur(x, even.tolist(), reach, back, axis),
      blur(x, odd.tolist(), back, reach, axis),
    ]
    x = jnp.stack(phases, axis + 1).reshape(
      *x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :]
    )
  return x
