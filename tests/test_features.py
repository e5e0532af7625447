"""Feature networks: parity with the references, files of weights, the classifier and its cache."""

import json
import pathlib

from golden import features as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffax import features
from diffax.data import sources
from diffax.models import classifier
from diffax.models import dinov2
from diffax.models import inception



@pytest.fixture(scope='module')
def want():
  return np.load(pathlib.Path(golden.__file__).with_suffix('.npz'))


def drawn(shapes):
  return {name: np.float32(golden.draw(name, shape)) for name, shape in shapes.items()}


def saved(path, tensors):
  safetensors.numpy.save_file(tensors, path)
  return str(path)


def error(a, b):
  """Relative to the largest value."""
  return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


# --- inception ------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def inception_tensors():
  must, may = inception.expected()
  return drawn(must), {name: np.array(1) for name in may}


@pytest.fixture(scope='module')
def inception_file(tmp_path_factory, inception_tensors):
  must, may = inception_tensors
  return saved(tmp_path_factory.mktemp('inception') / 'inception.safetensors', must | may)


@pytest.fixture(scope='module')
def inception_features(inception_file):
  built = features.inception(None, None, 32, inception_file)
  return built, *built.load()


def test_inception_parity(inception_features, want):
  """From pixels to features, over the file; also that no logit has its bias."""
  built, params, identity = inception_features
  assert built.classes == 0 and identity['name'] == 'inception' and len(identity['sha256']) == 64
  for name in golden.INCEPTION:
    resized = inception.prepare(jnp.asarray(golden.images(name)))
    assert resized.shape == (2, 299, 299, 3)
    recorded = np.moveaxis(want[f'inception_{name}_resized'], 1, -1)
    np.testing.assert_allclose(resized[:, golden.LEVELS, golden.LEVELS], recorded, atol=3e-6)
    out = jax.jit(built.extract)(params, golden.images(name))
    assert {a.dtype for a in out} == {jnp.dtype('float32')}
    for field in out._fields:
      assert error(getattr(out, field), want[f'inception_{name}_{field}']) < 1e-5, (name, field)


def test_every_tensor_of_inception_matters(inception_features):
  """On images of 75 pixels a side, the fewest that leave the last grid a place."""
  _, params, _ = inception_features
  x = jax.random.normal(jax.random.key(0), (1, 75, 75, 3))

  def loss(params, x):
    return sum((out**2).sum() for out in inception.Inception().apply({'params': params}, x))

  slopes = jax.jit(jax.grad(loss))(params, x)
  flat, _ = jax.tree_util.tree_flatten_with_path(slopes)
  assert len(flat) == 2 * 94 + 1  # Szegedy et al. 2016: 94 convolutions, and the last matrix
  for path, slope in flat:
    assert np.abs(slope).max() > 0, path


# --- dinov2 ---------------------------------------------------------------------------------------


@pytest.fixture(scope='module', params=sorted(golden.HIDDEN))
def dinov2_case(request, tmp_path_factory):
  tensors = drawn(golden.dinov2_shapes(request.param))
  path = saved(tmp_path_factory.mktemp('dinov2') / 'model.safetensors', tensors)
  built = features.dinov2(None, None, 32, path)
  return request.param, tensors, built, *built.load()


def test_dinov2_parity(dinov2_case, want):
  """From pixels to features, over the file, with positions brought from 37 37 to 16 16."""
  kind, _, built, params, identity = dinov2_case
  assert identity['width'] == golden.DINOV2['width'] and built.classes == 0
  assert built.gives == ('pool', 'spatial')
  for name in golden.SIZES:
    images = golden.images(name)
    out = jax.jit(built.extract)(params, images)
    assert out.logits is None and out.spatial.shape == (2, 16 * 16 * 7)
    for field in ('pool', 'spatial'):
      assert error(getattr(out, field), want[f'dinov2_{kind}_{name}_{field}']) < 1e-5, (name, field)


def test_every_tensor_of_dinov2_matters(dinov2_case):
  kind, tensors, _, params, _ = dinov2_case
  network = dinov2.network({name: a.shape for name, a in tensors.items()})
  x = jax.random.normal(jax.random.key(0), (1, 28, 42, 3))  # 2 3 patches
  run = jax.jit(lambda p, x: jnp.concatenate(
    [a.ravel() for a in network.apply({'params': p}, x)]))
  plain = run(params, x)
  for name in tensors:
    noise = np.float32(0.3 * np.random.default_rng(0).standard_normal(tensors[name].shape))
    changed = dinov2.from_torch(network, tensors | {name: tensors[name] + noise})
    change = error(run(changed, x), plain)
    # a key's bias adds the same to a query's every score, which softmax cancels
    idle = name.endswith('key.bias') or name == 'embeddings.mask_token'
    assert change < 1e-5 if idle else change > 1e-3, (kind, name, change)


def test_dinov2_resizes_as_recorded(want):
  for name in golden.SIZES:
    resized = dinov2.resize(jnp.asarray(golden.images(name)), dinov2.SIDE)
    recorded = want[f'dinov2_{name}_resized'].reshape(2, 10, 10, -1)
    np.testing.assert_array_equal(resized[:, golden.LEVELS, golden.LEVELS], recorded)


@pytest.mark.parametrize('h,w', [(32, 32), (224, 224), (50, 224), (449, 448), (13, 600), (5, 1000)])
def test_resize_is_pil(h, w):
  from PIL import Image

  image = np.random.default_rng(h).integers(0, 256, (h, w, 3)).astype(np.uint8)
  expected = np.array(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(dinov2.resize(jnp.asarray(image)[None], 224)[0], expected)


# --- files of weights -----------------------------------------------------------------------------


def test_inception_file_errors(tmp_path):
  must, _ = inception.expected()
  zeros = {name: np.zeros(shape, np.float16) for name, shape in must.items()}
  zeros.pop('Mixed_5b.branch1x1.bn.bias')
  zeros.pop('fc.bias')
  zeros['fc.weight'] = np.zeros((1000, 2048), np.float16)
  zeros['AuxLogits.fc.bias'] = np.zeros(3, np.float16)
  path = saved(tmp_path / 'other.safetensors', zeros)
  with pytest.raises(ValueError) as raised:
    features.inception(None, None, 32, path)
  for part in (path, 'misses Mixed_5b.branch1x1.bn.bias, fc.bias;', 'known AuxLogits.fc.bias;',
               'misshapen fc.weight (1000, 2048) for (1008, 2048)'):
    assert part in str(raised.value)


def test_dinov2_file_errors(tmp_path):
  tensors = drawn(golden.dinov2_shapes('mlp'))
  name = 'encoder.layer.1.norm2.weight'
  cases = [
    ({k: v for k, v in tensors.items() if k != name}, f'misses {name}'),
    (tensors | {'classifier.weight': np.zeros(3)}, 'known classifier.weight'),
    (tensors | {name: np.zeros(3)}, rf'misshapen {name} \(3,\) for \(128,\)'),
    ({f'dinov2.{k}': v for k, v in tensors.items()}, 'no embeddings.patch_embeddings.*DINOv2'),
  ]
  for i, (wrong, message) in enumerate(cases):
    with pytest.raises(ValueError, match=message):
      features.dinov2(None, None, 32, saved(tmp_path / f'{i}.safetensors', wrong))


@pytest.mark.parametrize('network,remedy', [
  (features.inception, 'weights_only=True'), (features.dinov2, 'facebook/dinov2-large')])
def test_other_files_are_refused(tmp_path, network, remedy):
  for suffix in ('.pth', '.pt', '.bin', '.ckpt'):
    path = tmp_path / f'weights{suffix}'
    path.write_bytes(b'cos\nsystem\n.')
    with pytest.raises(ValueError, match=f'weights{suffix}.* is a pickle.*{remedy}'):
      network(None, None, 32, str(path))
  with pytest.raises(ValueError, match=f'no such file.*{remedy}'):
    network(None, None, 32, str(tmp_path / 'none.safetensors'))
  path = saved(tmp_path / 'cut.safetensors', {'a': np.zeros(1000)})
  pathlib.Path(path).write_bytes(pathlib.Path(path).read_bytes()[:-100])
  with pytest.raises(ValueError, match=f'no whole safetensors file.*{remedy}'):
    network(None, None, 32, path)


# --- the classifier -------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('DIFFAX_CACHE', str(tmp_path))
  return tmp_path


def digits(**options):
  train, test = (sources.digits(split) for split in ('train', 'test'))
  return features.classifier(train, test, 8, **options)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('DIFFAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    built = digits(steps=100)
    return built, *built.load()


def test_classifier_learns_digits(trained):
  """And tells the accuracy that it has: counted anew, from pixels."""
  built, params, identity = trained
  test = sources.digits('test')
  images = np.stack([record['image'] for record in test])
  out = jax.jit(built.extract)(params, images)
  labels = np.array([record['label'] for record in test])
  right = np.mean(np.asarray(out.logits).argmax(-1) == labels)
  assert right >= 0.95 and abs(right - identity['accuracy']) < 1e-6
  assert built.gives == out._fields and built.classes == 10 and out.logits.shape == (359, 10)
  assert out.pool.shape == (359, 128) and out.spatial.shape == (359, 4 * 4 * 28)
  assert {a.dtype for a in out} == {jnp.dtype('float32')}
  last = params['params']['logits']
  logits = out.pool @ last['kernel'] + last['bias'][None]
  np.testing.assert_allclose(out.logits, logits, atol=1e-4)


def test_extract_is_the_same_over_devices(trained):
  built, params, _ = trained
  images = np.stack([sources.digits('test')[i]['image'] for i in range(16)])
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  extract = jax.jit(built.extract)
  apart = extract(params, jax.device_put(images, rows))
  assert len(apart.pool.sharding.device_set) == 8
  for a, b in zip(apart, extract(params, images)):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_training_repeats_and_is_kept(cache, capsys):
  """Equal over two cache folders, bit by bit, and read rather than trained the second time."""
  options = dict(steps=2, widths=(4, 4, 8), seed=1)
  params, identity = digits(**options).load()
  said = capsys.readouterr().err
  assert 'held-out images right after 2 steps on 1438 images' in said
  again, same = digits(**options).load()
  assert 'held-out' not in capsys.readouterr().err and same == identity
  [path] = cache.iterdir()
  path.unlink()
  anew, _ = digits(**options).load()
  assert 'held-out' in capsys.readouterr().err
  for other in (again, anew):
    jax.tree.map(np.testing.assert_array_equal, params, other)


@pytest.fixture
def trainings(cache, monkeypatch):
  """How often a classifier was trained, with a stand-in for the training."""
  made = []

  def train(network, source, held_out, made_of):
    made.append(made_of)
    return {'params': {'a': {'kernel': np.arange(6.0).reshape(2, 3)}}}, 0.5

  monkeypatch.setattr(features, '_train', train)
  return made


def test_other_training_other_file(trainings, cache):
  train, test = (sources.digits(split) for split in ('train', 'test'))
  some = sources.Source(train.read, train.name_of, 1000, train.shape, 10)
  read = lambda i: (255 - train.read(i)[0], train.read(i)[1])
  other = sources.Source(read, train.name_of, len(train), train.shape, 10)
  kinds = [
    (train, test, 8, {}), (some, test, 8, {}), (other, test, 8, {}), (train, train, 8, {}),
    (train, test, 16, {}), (train, test, 8, dict(seed=1)), (train, test, 8, dict(steps=7)),
    (train, test, 8, dict(flip=True)), (train, test, 8, dict(widths=(4, 4, 4))),
    (train, test, 8, dict(rate=1e-3)),
  ]
  for n, (source, held_out, size, options) in enumerate(kinds, 1):
    for _ in range(2):
      features.classifier(source, held_out, size, **options).load()
    assert len(trainings) == n == len(list(cache.iterdir()))


@pytest.mark.parametrize('damage', ['cut', 'empty', 'changed', 'other', 'pickle'])
def test_damaged_cache_is_made_again(trainings, cache, caplog, damage):
  params, identity = digits().load()
  [path] = cache.iterdir()
  whole = path.read_bytes()
  if damage == 'cut':
    path.write_bytes(whole[: len(whole) // 2])
  elif damage == 'empty':
    path.write_bytes(b'')
  elif damage == 'other':
    np.savez(path, a=1)
  else:
    kernel = np.zeros((2, 3)) if damage == 'changed' else np.array([{}], object)
    np.savez(path, identity=json.dumps(identity), **{'params/a/kernel': kernel})
  again, same = digits().load()
  assert len(trainings) == 2 and same == identity
  assert path.name in caplog.text and 'damaged' in caplog.text
  digits().load()
  assert len(trainings) == 2 and len(list(cache.iterdir())) == 1
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_cut_short_nothing_is_kept(trainings, cache, monkeypatch):
  monkeypatch.setattr(features, '_train', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
  with pytest.raises(KeyboardInterrupt):
    digits().load()
  assert not list(cache.iterdir())


@pytest.mark.parametrize('side,channels,spatial', [
  (8, 1, 4 * 4 * 28), (28, 1, 7 * 7 * 28), (32, 3, 8 * 8 * 28), (27, 1, 7 * 7 * 28),
  (64, 3, 8 * 8 * 28)])
def test_classifier_takes_any_image(side, channels, spatial):
  network = classifier.Classifier(5, (6, 32, 16))
  x = classifier.prepare(jnp.zeros((2, side, side, channels), jnp.uint8))
  assert x.shape[1] == min(side, 32) and float(x.max()) == -1
  out = jax.eval_shape(lambda x: network.init_with_output(jax.random.key(0), x)[0], x)
  assert [a.shape for a in out] == [(2, 16), (2, spatial), (2, 5)]


def test_shifts_are_of_each_image_its_own():
  """Each comes out moved by up to a sixteenth, all moves happening, over its mirrored border."""
  image = np.random.default_rng(0).standard_normal((32, 32, 2)).astype(np.float32)
  out = np.asarray(features._shift(jnp.broadcast_to(image, (500, 32, 32, 2)), jax.random.key(0)))
  padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode='reflect')
  cuts = np.stack([padded[i:i + 32, j:j + 32] for i in range(5) for j in range(5)])
  which = [np.flatnonzero((cuts == one).all((1, 2, 3))) for one in out]
  assert {len(found) for found in which} == {1}
  assert {found[0] for found in which} == set(range(25))


def test_classifier_errors():
  plain = sources.digits()
  without = sources.Source(plain.read, plain.name_of, len(plain), plain.shape, 0)
  with pytest.raises(ValueError, match='without classes.*inception or dinov2'):
    features.classifier(without, without, 8)
  with pytest.raises(ValueError, match=r'widths=\(4, 8\)'):
    digits(widths=(4, 8))
  with pytest.raises(ValueError, match='steps=-1'):
    digits(steps=-1)
