"""Networks that turn images into features, for comparing sets of them: named in `evals.*.features`.

A function `(source, held_out, size, ...) -> Features` gives what an evaluation asks for:

  inception    of FID, sFID and the inception score; weights from a file of yours
  dinov2       of FD-DINOv2, nearest to what people see; weights from a file of yours
  classifier   trained here on the data itself: nothing to download, and any kind of image

Distances between features of different networks, weights or resizings do not compare, hence the
`identity` that statistics are stored with. Weights are safetensors; nothing is unpickled.
"""

import hashlib
import io
import json
import os
import time
import uuid
from collections.abc import Callable
from functools import lru_cache
from functools import partial
from typing import NamedTuple
import zipfile
import zlib

from absl import logging
from flax import traverse_util
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import optax

from diffax import config
from diffax import hosts
from diffax import log
from diffax.data import pipeline
from diffax.data import sources
from diffax.data import transforms
from diffax.models import classifier as classifiers
from diffax.models import dinov2 as dinov2s
from diffax.models import inception as inceptions

PICKLES = ('.pth', '.pt', '.bin', '.ckpt', '.pkl')


class Outputs(NamedTuple):
  """Features of images, float32: pool [b d], spatial [b s], logits [b k] or None."""

  pool: jax.Array
  spatial: jax.Array
  logits: jax.Array | None


class Features(NamedTuple):
  """A feature network.

  load: () -> (params, identity), where identity is plain data that says what the features are of.
  extract: (params, images uint8 [b h w c]) -> `Outputs`, pure. classes: how many logits are classes
  of the source's labels, 0 where they are of others. gives: the fields of `Outputs` that are there.
  """

  load: Callable
  extract: Callable
  classes: int
  gives: tuple = Outputs._fields


# --- published networks ---------------------------------------------------------------------------


def inception(source, held_out, size, weights: str) -> Features:
  """The Inception v3 of FID (Heusel et al. 2017), equal to pytorch-fid's.

  pool [b 2048] is that of FID, spatial [b 2023] that of sFID, logits [b 1008] those of the
  inception score, without the bias that its code leaves out too (see `diffax.models.inception`).
  Images of any size, grey or RGB, are brought to 299 pixels a side bilinearly, without a filter.

  weights: a safetensors file of pytorch-fid's state dict. From the published file,
  github.com/mseitzer/pytorch-fid/releases, pt_inception-2015-12-05-6726825d.pth, it is made by

    import torch; from safetensors.torch import save_file
    save_file(torch.load(PATH_OF_PTH, weights_only=True), 'inception.safetensors')

  Raises ValueError for a file of another kind, or with tensors missing, surplus or misshapen.
  """
  del source, held_out, size
  remedy = "save_file(torch.load(PATH, weights_only=True), 'inception.safetensors')"
  must, may = inceptions.expected()
  shapes = _shapes(weights, remedy)
  _check(weights, shapes, must, may)

  def load():
    tensors, digest = _read(weights, must)
    preprocessing = 'bilinear to 299, pixels as areas, no filter; [-1, 1]'
    identity = dict(name='inception', sha256=digest, preprocessing=preprocessing)
    return inceptions.from_torch(tensors), identity

  def extract(params, images):
    with jax.default_matmul_precision('highest'):
      x = inceptions.prepare(images)
      return Outputs(*inceptions.Inception().apply({'params': params}, x))

  return Features(load, extract, 0)


def dinov2(source, held_out, size, weights: str) -> Features:
  """DINOv2 (Oquab et al. 2023), for the Fréchet distance of Stein et al. 2023.

  pool [b d] is the class token behind the last norm, spatial [b 1792] the first 7 channels of the
  16 16 patch tokens; there are no logits. Images of any size, grey or RGB, are brought to 224
  pixels a side bicubically, as PIL does.

  weights: model.safetensors of huggingface.co/facebook/dinov2-large (Stein et al. measure with this
  one), -small, -base or -giant; which it is, its tensors say.

  Raises ValueError for a file of another kind, or with tensors missing, surplus or misshapen.
  """
  del source, held_out, size
  shapes = _shapes(weights, 'download model.safetensors of huggingface.co/facebook/dinov2-large')
  try:
    network = dinov2s.network(shapes)
  except ValueError as error:
    raise ValueError(f'weights={weights!r}: {error}') from error
  must, may = dinov2s.expected(network)
  _check(weights, shapes, must, may)

  def load():
    tensors, digest = _read(weights, must)
    preprocessing = f'bicubic to {dinov2s.SIDE} as PIL, ImageNet mean and deviation'
    identity = dict(
      name='dinov2', width=network.width, depth=network.depth, sha256=digest,
      preprocessing=preprocessing)
    return dinov2s.from_torch(network, tensors), identity

  def extract(params, images):
    with jax.default_matmul_precision('highest'):
      first, tokens = network.apply({'params': params}, dinov2s.prepare(images))
    spatial = tokens[..., : dinov2s.SPATIAL]  # [b n 7]
    return Outputs(first, jnp.reshape(spatial, (len(spatial), -1)), None)

  return Features(load, extract, 0, ('pool', 'spatial'))


def _shapes(path, remedy):
  """{name: shape} of a safetensors file, of which the header alone is read."""
  import safetensors

  if str(path).endswith(PICKLES):
    raise ValueError(f'weights={path!r} is a pickle, which can run any code: {remedy}')
  if not os.path.isfile(path):
    raise ValueError(f'weights={path!r}: there is no such file; {remedy}')
  try:
    with safetensors.safe_open(path, framework='np') as file:
      return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'weights={path!r} is no whole safetensors file ({error}): {remedy}') from error


def _check(path, shapes, must, may):
  """Raises ValueError that names every tensor missing, surplus or misshapen."""
  allowed = must | may
  wrong = {name: shapes[name] for name in shapes.keys() & allowed if shapes[name] != allowed[name]}
  said = [
    ('misses', sorted(must.keys() - shapes.keys())),
    ('has beside what is known', sorted(shapes.keys() - allowed.keys())),
    ('has misshapen', [f'{n} {wrong[n]} for {allowed[n]}' for n in sorted(wrong)]),
  ]
  if any(names for _, names in said):
    found = '; '.join(f'{what} {", ".join(names)}' for what, names in said if names)
    raise ValueError(f'weights={path!r} {found}: is it the file of another network?')


def _read(path, names):
  """({name: array} of a safetensors file, sha256 of the file)."""
  import safetensors

  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  with safetensors.safe_open(path, framework='np') as file:
    return {name: file.get_tensor(name) for name in names}, digest


# --- the classifier -------------------------------------------------------------------------------

BATCH, SMOOTHING, DECAY = 128, 0.1, 0.05
PASSES, FEWEST = 20, 200  # of the data, and the fewest steps
MOST = {1: 1000, 3: 2000}  # steps by channels: photographs are the harder
KEPT = 2**30  # bytes of decoded images held while training
TESTED = 10_000  # images of the held-out set at the most
RECIPE = 1  # raised with whatever of the training or the network changes, so that none is mistaken


def classifier(
  source, held_out, size, seed=0, steps=0, rate=4e-3, widths=(), flip=None
) -> Features:
  """A small network trained on the labels of `source`, its accuracy measured on `held_out`.

  pool [b widths[2]] is the mean before the logits, spatial at most 1792 numbers of a middle map,
  logits [b classes]. Trained once, with shifted and mirrored images, and kept in the cache folder
  ($DIFFAX_CACHE, else ~/.cache/diffax) under a key of the data and of all that is said here. Images
  of more than 32 pixels a side are shrunk to 32: finer detail it does not judge.

  steps: of 128 images; 0 is twenty passes over the data, but at least 200 steps and at most 1000
  for grey images, 2000 for others. rate: the highest learning rate. widths: of the three stages; ()
  is (48, 128, 256), and half of that for images of less than 16 pixels a side. flip: whether images
  may be mirrored; None is where they have colours, for grey ones are often signs.

  Raises ValueError where the source has no classes, and for steps or widths that cannot be.
  """
  if source.classes < 2:
    raise ValueError(
      f'features=classifier: {source.name_of(0)} is of a set without classes to learn; take '
      'inception or dinov2 with weights, or data with classes'
    )
  if not widths:
    widths = (24, 64, 128) if _side(source, size) < classifiers.COARSE else (48, 128, 256)
  if len(widths) != 3 or min(widths) < 1:
    raise ValueError(f'widths={widths}: say three, as (48, 128, 256), or () for those that suit')
  if steps < 0:
    raise ValueError(f'steps={steps} is negative; 0 is as many as the data wants')
  channels = source.shape[-1]
  steps = steps or min(MOST[channels], max(FEWEST, PASSES * len(source) // BATCH))
  flip = channels == 3 if flip is None else flip
  made = dict(
    recipe=RECIPE, size=size, classes=source.classes, seed=seed, steps=steps, rate=rate,
    widths=list(widths), flip=bool(flip))
  network = classifiers.Classifier(source.classes, tuple(widths))

  def load():
    return _cached(dict(made, train=digest(source), test=digest(held_out)),
                   lambda: _train(network, source, held_out, made))

  def extract(params, images):
    with jax.default_matmul_precision('highest'):
      return Outputs(*network.apply(params, classifiers.prepare(images)))

  return Features(load, extract, source.classes)


def _side(source, size):
  """The shorter side of images; of several sizes, which must be scaled, infinity."""
  return size or min(side or np.inf for side in source.shape[:2])


def digest(source):
  """What tells a set: its length and a hash of 32 of its records."""
  records = [source[int(i)] for i in np.linspace(0, len(source) - 1, 32).astype(int)]
  hashed = hashlib.sha256()
  for record in records:
    hashed.update(f'{record["image"].shape} {record["label"]} '.encode())
    hashed.update(np.ascontiguousarray(record['image']).tobytes())
  return dict(count=len(source), sha256=hashed.hexdigest())


def _cached(key, train):
  """(params, identity) of the cache file of `key`, made by `train` where there is no whole one."""
  name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
  folder = config.cache()
  path = folder / f'classifier-{name}.npz'
  found = None
  try:
    if path.exists():
      found = _restore(path.read_bytes())
  except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    logging.warning('%s is damaged (%s): the classifier is trained anew', path, error)
  if hosts.every(found is not None):  # each host may have a cache of its own
    return found
  params, accuracy = train()
  flat = traverse_util.flatten_dict(params, sep='/')
  identity = dict(name='classifier', accuracy=accuracy, sha256=_sha256(flat), **key)
  buffer = io.BytesIO()
  np.savez(buffer, identity=json.dumps(identity), **flat)
  folder.mkdir(parents=True, exist_ok=True)
  scratch = folder / f'{path.name}.{uuid.uuid4().hex}'  # a name of its own: others may write too
  scratch.write_bytes(buffer.getvalue())
  scratch.replace(path)
  return params, identity


def _restore(data):
  """(params, identity) of a cache file's bytes; raises where they are not whole."""
  with np.load(io.BytesIO(data), allow_pickle=False) as file:
    flat = {name: file[name] for name in file.files}
  identity = json.loads(flat.pop('identity').item())
  if _sha256(flat) != identity['sha256']:
    raise ValueError('its weights are not those of its hash')
  return traverse_util.unflatten_dict(flat, sep='/'), identity


def _sha256(flat):
  hashed = hashlib.sha256()
  for name in sorted(flat):
    hashed.update(f'{name} {flat[name].shape} '.encode() + flat[name].tobytes())
  return hashed.hexdigest()


def _train(network, source, held_out, made):
  """(variables of the network as numpy, share of held-out images whose class it finds)."""
  start, steps, data = time.perf_counter(), made['steps'], _kept(source, made['size'])
  rate = optax.cosine_onecycle_schedule(steps, made['rate'], pct_start=0.2)
  tx = optax.adamw(rate, b2=0.99, weight_decay=DECAY)
  step = _step(network, tx, jax.random.key(made['seed']))
  batches = pipeline.batches(
    data, BATCH, seed=made['seed'], flip=made['flip'], on_error='skip')
  shape = classifiers.shrink(jnp.zeros((1, *data.shape))).shape
  variables = jax.jit(network.init)(jax.random.key(made['seed']), jnp.zeros(shape))
  state = dict(variables, opt=tx.init(variables['params']))
  progress = log.Progress(0, steps, BATCH, None if hosts.first() else log.Silent())
  for k in range(steps):
    batch = next(batches)
    state, loss = step(state, k, batch['image'], batch['label'])
    if k == 0 or (k + 1) % max(1, steps // 10) == 0:
      loss = float(loss)
      progress.show(k + 1, loss, time.perf_counter())
  batches.close()
  state.pop('opt')
  accuracy, count = _accuracy(network, state, _kept(held_out, made['size']))
  if hosts.count() > 1:  # one answer everywhere, for hosts' sums may round differently
    state, accuracy = multihost_utils.broadcast_one_to_all((state, accuracy))
  progress.say(
    f'classifier: {accuracy:.2%} of {count} held-out images right after {steps} steps on '
    f'{len(source)} images, {time.perf_counter() - start:.0f} s')
  progress.close()
  return jax.tree.map(np.asarray, state), float(accuracy)


def _step(network, tx, key):
  """(state, k, images float [b h w c], label [b]) -> (state, loss), compiled."""

  @partial(jax.jit, donate_argnums=0)
  def step(state, k, images, label):
    x = _shift(classifiers.shrink(images), jax.random.fold_in(key, k))
    target = optax.smooth_labels(jax.nn.one_hot(label, network.classes), SMOOTHING)

    def loss(params):
      variables = {'params': params, 'batch_stats': state['batch_stats']}
      (_, _, logits), new = network.apply(variables, x, train=True, mutable='batch_stats')
      return optax.softmax_cross_entropy(logits, target).mean(), new['batch_stats']

    (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(state['params'])
    updates, opt = tx.update(gradient, state['opt'], state['params'])
    params = optax.apply_updates(state['params'], updates)
    return dict(params=params, batch_stats=stats, opt=opt), value

  return step


def _shift(x, key):
  """Moves each image by up to a sixteenth of its side, at least 1, mirrored at its borders."""
  b, h, w, c = x.shape
  most = max(1, min(h, w) // 16)
  padded = jnp.pad(x, ((0, 0), (most, most), (most, most), (0, 0)), mode='reflect')
  moves = jax.random.randint(key, (b, 2), 0, 2 * most + 1)
  cut = lambda image, move: jax.lax.dynamic_slice(image, (move[0], move[1], 0), (h, w, c))
  return jax.vmap(cut)(padded, moves)


def _accuracy(network, variables, data, batch_size=500):
  """(share of images whose largest logit is their label's, number of images), each once."""
  count, right = min(len(data), TESTED), 0
  batches = pipeline.steps(data, batch_size, seed=0, on_error='skip')
  guess = jax.jit(lambda v, x: network.apply(v, classifiers.shrink(x))[2].argmax(-1))
  for k in range(-(-count // batch_size)):
    rows, batch = min(batch_size, count - k * batch_size), batches[k]
    guessed = np.asarray(guess(variables, batch['image']))
    right += (guessed == batch['label'])[:rows].sum()  # the rest are records of the next round
  return right / count, count


def _kept(source, size):
  """The source at `size`, with records kept as they are decoded, up to a gibibyte of them."""
  shape = (size, size, source.shape[-1]) if size else tuple(source.shape)

  def read(i):
    record = source[i]
    return transforms.resize(record['image'], size) if size else record['image'], record['label']

  if None not in shape:  # else the pipeline says what to do
    read = lru_cache(max(1, KEPT // int(np.prod(shape))))(read)
  return sources.Source(read, source.name_of, len(source), shape, source.classes)
