"""Softmax attention, by the program that suits the devices and the shape.

  y = softmax(q k^T / sqrt(d)) v       q [b n k d], k and v [b m k d], softmax in float32

  xla      any device and dtype; the scores [b k n m] are laid out whole
  chunked  the like, where they would not fit: those of some queries at a time, and again in the
           backward pass; Rabe & Staats 2021, "Self-attention Does Not Need O(n^2) Memory"
  cudnn    NVIDIA, float16 and bfloat16: blocks of the scores alone; Dao et al. 2022,
           "FlashAttention"
  splash   TPU, the like, of jax's own Pallas operations
  ring     any mesh whose `tokens` are split: each device keeps its own queries and passes keys and
           values on, so that none ever holds them all; Liu et al. 2023, "Ring Attention"
  tokamax  GPU or TPU, of the package of that name, where it is faster

`auto` looks at the devices that the program is compiled for, which are those of the mesh in force
and need not be this machine's.
"""

import contextlib
import contextvars
import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffax.models import layers

FORCED = contextvars.ContextVar('attention', default='auto')
LANES = 128  # tokens a block of a TPU
SPLASH_FROM = 1024  # keys from which on blocks of the scores beat the whole on a TPU
LARGEST = 2**30  # bytes of an example's scores that are laid out whole
CHUNK = 1024  # queries at a time where they are not
LOWEST = -1e30  # in place of -inf, whose differences are not numbers


@contextlib.contextmanager
def using(impl):
  """Within it, `attention` takes `impl` where its caller names none."""
  token = FORCED.set(impl)
  try:
    yield
  finally:
    FORCED.reset(token)


def attention(q, k, v, mask=None, impl=None, causal=False):
  """Attention of queries [b n k d] to keys and values [b m k d]: [b n k d] in the dtype of v.

  mask: [b m], which keys there are, 0 or 1; without any the result is 0. None: all of them. impl: a
  name of `IMPLS`, or 'auto'; None is what is in force, see `using`. causal: whether the i-th of n
  queries attends to the first i of n keys alone, by a name of `CAUSAL`.
  Raises ValueError for another name, and for shapes or dtypes that a program named cannot take.
  """
  impl = impl or FORCED.get()
  if impl == 'auto':
    impl = choose(q, k, causal)
  if impl not in IMPLS:
    raise ValueError(f"attention={impl!r} is none of auto, {', '.join(IMPLS)}")
  if causal and impl not in CAUSAL:
    raise ValueError(
      f"attention={impl!r} has no causal order, as a text encoder needs: take auto, "
      f"{' or '.join(CAUSAL)}"
    )
  program = functools.partial(IMPLS[impl], causal=True) if causal else IMPLS[impl]
  q, k, v = (layers.constrain(x, 'batch', 'tokens', 'heads', None) for x in (q, k, v))
  if mask is None:
    y = program(q, k, v, None)
  else:  # where there are no keys a softmax is not defined, nor is its gradient: all, then none
    mask = mask.astype(bool)
    some = jnp.logical_or.accumulate(mask, axis=1) if causal else mask.any(axis=1, keepdims=True)
    y = program(q, k, v, mask if causal else mask | ~some)
    y = jnp.where(some[:, :, None, None], y, 0)  # some: [b n] or [b 1]
  return layers.constrain(y, 'batch', 'tokens', 'heads', None)


def choose(q, k, causal=False):
  """The name of the program for queries [b n k d] and keys [b m k d], on the mesh in force."""
  platform = layers.platform()
  if causal:
    return 'cudnn' if platform == 'gpu' and _cudnn_takes(q, k) else 'xla'
  if _parts(q, k):
    return 'ring'
  if platform == 'gpu' and _cudnn_takes(q, k):
    return 'cudnn'
  if platform == 'tpu' and k.shape[1] >= SPLASH_FROM:
    return 'splash'
  (_, n, heads, _), m = q.shape, k.shape[1]
  return 'chunked' if 4 * heads * n * m > LARGEST else 'xla'


# --- one device at a time -------------------------------------------------------------------------


def _xla(q, k, v, mask, causal=False):
  mask = None if mask is None else mask[:, None, None]
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask, is_causal=causal, implementation='xla'
  )


def _chunked(q, k, v, mask):
  n, (b, _, *heads) = q.shape[1], q.shape
  q = jnp.pad(q, ((0, 0), (0, -n % CHUNK), (0, 0), (0, 0)))
  q = jnp.moveaxis(q.reshape(b, -1, CHUNK, *heads), 1, 0)
  y = jax.lax.map(jax.checkpoint(lambda q: _xla(q, k, v, mask)), q)
  return jnp.moveaxis(y, 0, 1).reshape(b, -1, *y.shape[-2:])[:, :n]


def _cudnn_takes(q, k):
  half = q.dtype in (jnp.bfloat16, jnp.float16) and q.dtype == k.dtype
  return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _cudnn(q, k, v, mask, causal=False):
  if not _cudnn_takes(q, k):
    raise ValueError(
      f"attention='cudnn' takes bfloat16 or float16 and heads of up to 128 channels, a multiple of "
      f"8; here are {q.dtype} and {q.shape[-1]}: set model.dtype, or attention='auto'"
    )
  n = q.shape[1]
  if mask is not None:  # its gradient then takes even numbers of tokens alone
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2)) + ((0, 0),) * (x.ndim - 2))
    q, k, v, mask = even(q), even(k), even(v), even(mask)[:, None, None]
  y = jax.nn.dot_product_attention(
    q, k, v, mask=mask, is_causal=causal, implementation='cudnn'
  )
  return y[:, :n]


def _splash(q, k, v, mask, interpret=False):
  """Each shard of examples and heads by a kernel of its own; tokens are padded to whole blocks."""
  n, m = q.shape[1], k.shape[1]
  whole = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)) + ((0, 0),) * (x.ndim - 2))
  if mask is None and (n % LANES or m % LANES):
    mask = jnp.ones(k.shape[:2], bool)
  q, k, v = whole(q * q.shape[-1] ** -0.5), whole(k), whole(v)
  there = None if mask is None else whole(mask)
  shard = functools.partial(_splash_shard, interpret=interpret)
  rows = layers.spec(q, 'batch', None, 'heads', None)
  heads = layers.spec(k[..., 0, 0], 'batch', None)
  y = sharded(shard, (rows,) * 3 + (heads,) * (there is not None), rows)(
    q, k, v, *([] if there is None else [there])
  )
  return y[:, :n]


def _splash_shard(q, k, v, mask=None, interpret=False):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  (_, n, heads, _), m = q.shape, k.shape[1]
  block = lambda length: next(b for b in (512, 256, LANES) if length % b == 0)
  sizes = kernels.BlockSizes(
    block_q=block(n), block_kv=block(m), block_kv_compute=block(m), block_q_dkv=block(n),
    block_kv_dkv=block(m), block_kv_dkv_compute=block(m), use_fused_bwd_kernel=True,
  )
  kernel = kernels.make_splash_mha(
    masks.MultiHeadMask([masks.FullMask((n, m))] * heads), block_sizes=sizes, head_shards=1,
    q_seq_shards=1, interpret=interpret,
  )
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [b k n d]
  if mask is None:
    y = jax.vmap(lambda q, k, v: kernel(q, k, v))(q, k, v)
  else:  # a query attends to keys of its own number; queries that are none are cut off behind
    ids = kernels.SegmentIds(jnp.ones((len(q), n), jnp.int32), mask.astype(jnp.int32))
    y = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, ids))(q, k, v, ids)
  return jnp.swapaxes(y, 1, 2).astype(v.dtype)


def _tokamax(q, k, v, mask):
  try:
    import tokamax
  except ImportError as error:
    raise ImportError("attention='tokamax' needs a package: pip install diffax[tokamax]") from error
  mask = None if mask is None else mask[:, None, None]
  rows = layers.spec(q, 'batch', None, 'heads', None)
  there = () if mask is None else (layers.spec(mask, 'batch', None, None, None),)
  call = lambda q, k, v, *mask: tokamax.dot_product_attention(q, k, v, mask=next(iter(mask), None))
  return sharded(call, (rows,) * 3 + there, rows)(q, k, v, *([] if mask is None else [mask]))


def sharded(function, given, out):
  """`function` on each device's own part, laid out by specs; without a mesh in force, itself."""
  if jax.sharding.get_abstract_mesh().empty:
    return function
  return jax.shard_map(function, in_specs=given, out_specs=out, check_vma=False)


# --- a ring of devices ----------------------------------------------------------------------------


def _parts(q, k):
  """The mesh axis over which the tokens of queries and keys are split, None where they are not."""
  return layers.spec(k, None, 'tokens', None, None)[1] if q.shape[1] == k.shape[1] else None


def _ring(q, k, v, mask):
  axis = _parts(q, k)
  if not axis:
    raise ValueError(
      f"attention='ring' needs tokens that are split: a mesh with sequence > 1 that divides the "
      f'{q.shape[1]} queries and as many keys; here are {k.shape[1]}'
    )
  rows = layers.spec(q, 'batch', 'tokens', 'heads', None)
  there = layers.spec(k[..., 0, 0], 'batch', 'tokens')
  mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
  size = jax.sharding.get_abstract_mesh().shape[axis]
  return sharded(functools.partial(_ring_shard, axis, size), (rows,) * 3 + (there,), rows)(
    q, k, v, mask
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring_shard(axis, size, q, k, v, mask):
  return _ring_forward(axis, size, q, k, v, mask)[0]


def _scores(q, k, mask):
  """[b k n m] in float32, `LOWEST` where there is no key."""
  scores = jnp.einsum('bnkd,bmkd->bknm', q, k, preferred_element_type=jnp.float32)
  return jnp.where(mask[:, None, None], scores * q.shape[-1] ** -0.5, LOWEST)


def _rows(x):
  """[b k n] -> [b n k 1]"""
  return jnp.swapaxes(x, 1, 2)[..., None]


def _ring_forward(axis, size, q, k, v, mask):
  """Sums over keys as they come by, each relative to the largest score so far; Rabe & Staats 2021.

  most, total: the largest score and the sum of exponents, [b k n]; y: the sum of values so weighed.
  """
  shift = [(i, (i + 1) % size) for i in range(size)]

  def step(carry, _):
    y, most, total, (k, v, mask) = carry
    scores = _scores(q, k, mask)
    more = jnp.maximum(most, scores.max(axis=-1))
    weights = jnp.where(mask[:, None, None], jnp.exp(scores - more[..., None]), 0)
    fade = jnp.exp(most - more)
    total = total * fade + weights.sum(axis=-1)
    seen = jnp.einsum('bknm,bmkd->bnkd', weights, v, preferred_element_type=jnp.float32)
    passed = jax.tree.map(lambda x: jax.lax.ppermute(x, axis, shift), (k, v, mask))
    return (y * _rows(fade) + seen, more, total, passed), None

  b, n, heads, _ = q.shape
  zeros = jnp.zeros((b, heads, n), jnp.float32)
  first = (jnp.zeros((b, n, heads, v.shape[-1]), jnp.float32), zeros + LOWEST, zeros, (k, v, mask))
  (y, most, total, _), _ = jax.lax.scan(step, first, None, length=size)
  y = (y / _rows(jnp.maximum(total, 1e-30))).astype(v.dtype)
  log_total = most + jnp.log(jnp.maximum(total, 1e-30))
  return y, (q, k, v, mask, y, log_total)


def _ring_backward(axis, size, kept, dy):
  """The same way round once more; the gradients of keys and values travel with them and are home
  behind the last step. Dao et al. 2022, app. B.2.
  """
  q, k, v, mask, y, log_total = kept
  shift = [(i, (i + 1) % size) for i in range(size)]
  scale, wide = q.shape[-1] ** -0.5, dy.astype(jnp.float32)
  own = jnp.swapaxes((wide * y.astype(jnp.float32)).sum(axis=-1), 1, 2)[..., None]  # [b k n 1]

  def step(carry, _):
    dq, travelling = carry
    k, v, mask, dk, dv = travelling
    weights = jnp.where(
      mask[:, None, None], jnp.exp(_scores(q, k, mask) - log_total[..., None]), 0
    )
    dv += jnp.einsum('bknm,bnkd->bmkd', weights, wide)
    dweights = jnp.einsum('bnkd,bmkd->bknm', wide, v.astype(jnp.float32))
    dscores = weights * (dweights - own) * scale
    dq += jnp.einsum('bknm,bmkd->bnkd', dscores, k.astype(jnp.float32))
    dk += jnp.einsum('bknm,bnkd->bmkd', dscores, q.astype(jnp.float32))
    passed = jax.tree.map(
      lambda x: jax.lax.ppermute(x, axis, shift), (k, v, mask, dk, dv)
    )
    return (dq, passed), None

  zero = lambda x: jnp.zeros(x.shape, jnp.float32)
  (dq, (_, _, _, dk, dv)), _ = jax.lax.scan(
    step, (zero(q), (k, v, mask, zero(k), zero(v))), None, length=size
  )
  none = np.zeros(mask.shape, jax.dtypes.float0)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), none


_ring_shard.defvjp(_ring_forward, _ring_backward)

IMPLS = {
  'xla': _xla, 'chunked': _chunked, 'cudnn': _cudnn, 'splash': _splash, 'ring': _ring,
  'tokamax': _tokamax,
}
CAUSAL = ('xla', 'cudnn')  # that have an order of tokens
