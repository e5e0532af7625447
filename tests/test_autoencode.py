"""Training autoencoders: losses by hand, LPIPS and patches against references, runs on digits."""

import pathlib
import runpy
import signal

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_diffax
from safetensors import numpy as safetensors

from diffax import checkpoint
from diffax import config as configs
from diffax import evaluate
from diffax import perceptual
from diffax import sample
from diffax import sharding
from diffax import train
from diffax.build import ConfigError
from diffax.convert import tensors
from diffax.evals import reconstruction
from diffax.models import autoencoder
from diffax.models import discriminator
from diffax.models import vgg

GOLDEN = pathlib.Path(__file__).parent / 'golden'
golden = runpy.run_path(str(GOLDEN / 'lpips.py'))
THIS = str(pathlib.Path(__file__).resolve())  # this file is a config, too


def get_config():
  """Digits as latents of 4x4x2, with random features and a discriminator from step 3 on."""
  return run_diffax.ConfigDict(dict(
    seed=0, steps=12, batch_size=32,
    data=dict(name='run_diffax.digits'),
    task=dict(
      name='autoencode', kl=1e-3, split='', perceptual=dict(name='random', widths=(4, 8)),
      discriminator=dict(
        name='patch_gan', width=4, depth=1, groups=4, weight=0.5, start=3)),
    loss=dict(distance=dict(name='squared')),
    model=dict(
      name='autoencoder_kl', width=8, multipliers=(1, 2), blocks=1, latent=2, groups=4,
      channels=1, remat='none', middle_attention=False),
    optimizer=dict(name='adam', clip=1.0), learning_rate=3e-3,
    phases=dict(disc=dict(optimizer=dict(name='adam', b1=0.5), learning_rate=1e-3)),
    ema=(0.99,), log_every=3, save_every=4, sample=dict(count=4, batch_size=8),
  ))


def config(*overrides):
  return configs.override(get_config().to_dict(), [f'--config.{o}' for o in overrides])


def setup(*overrides, count=1):
  return train.setup(config(*overrides), jax.devices()[:count])


@pytest.fixture(autouse=True, scope='module')
def quick():
  """Little optimization: compiling is nearly all that these tests take."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')  # of the processes, too
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


VQ = ('model.name=autoencoder_vq', 'model.codes=16')


def begin(run):
  return train.init(run)


def batch_of(run, count=4):
  records = [run.source[i] for i in range(count)]
  x = np.stack([r['image'] for r in records]).astype(np.float32) / 127.5 - 1
  keys = jax.vmap(jax.random.key)(jnp.arange(count))
  return {'image': jnp.asarray(x), 'label': jnp.zeros(count, jnp.int32)}, keys


# --- the losses -----------------------------------------------------------------------------------


def test_terms():
  """Each term by numpy from what the networks say, before and after the discriminator's start."""
  run = setup('data.name=digits')
  state, (batch, keys) = begin(run), batch_of(run)
  x, net = np.asarray(batch['image']), run.task
  model = autoencoder.autoencoder_kl(
    8, (1, 2), 1, 2, 1, groups=4, remat='none', middle_attention=False)
  apply = jax.jit(lambda method, v: model.apply({'params': state.params['net']}, v, method=method),
                  static_argnums=0)
  moments = np.asarray(apply('encode', x), np.float64)
  mean, logvar = moments[..., :2], moments[..., 2:]
  eps = np.stack([jax.random.normal(key, mean.shape[1:]) for key in keys])
  y = np.asarray(apply('decode', jnp.asarray(mean + np.exp(logvar / 2) * eps, jnp.float32)))
  nats = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum((1, 2, 3))
  critic = discriminator.patch_gan(4, 1, 4)
  patches = jax.jit(lambda v: critic.apply({'params': state.params['disc']}, v))
  maps = jax.jit(lambda v: perceptual.random(1, (4, 8)).maps(state.frozen['perceptual'], v))
  seen = sum(
    np.square(np.asarray(a) - b).mean((1, 2)).sum(-1) for a, b in zip(maps(x), maps(y)))
  plain = ((y - x)**2).mean((1, 2, 3)) + 1e-3 * nats / 64 + seen
  loss = jax.jit(lambda state: net.loss(state.params, state, batch, keys))
  for step, weight in (2, 0.0), (3, 0.5):
    losses, info = loss(state.replace(step=jnp.asarray(step)))
    wanted = plain - weight * np.asarray(patches(y)).mean((1, 2, 3))
    np.testing.assert_allclose(losses, wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(info['perceptual'], seen, rtol=1e-4)
  losses, _ = jax.jit(net.phases[1].loss)(state.params, state, batch, keys)
  hinge = (np.maximum(1 - patches(x), 0) + np.maximum(1 + patches(y), 0)).mean((1, 2, 3)) / 2
  np.testing.assert_allclose(losses, hinge, rtol=1e-4)
  assert min(nats.min(), seen.min(), hinge.min()) > 0.01  # none of it is nothing


def test_codebook():
  """The codebook moves to the latents by its loss alone, the encoder gets the decoder's gradient
  straight through; entries that nothing is near stay."""
  plain = ('data.name=digits', *VQ, 'task.perceptual=none', 'task.discriminator.weight=0.0',
           'phases={}')
  run = setup(*plain)
  assert set(run.like.params) == {'net'} and not run.task.phases and not run.like.frozen
  state, (batch, keys) = begin(run), batch_of(run)
  params = state.params

  def gradient(run):
    def total(params):
      losses, info = run.task.loss(params, state, batch, keys)
      return losses.sum(), info['latent']

    (_, latent), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return latent, grads['net']

  latent, grads = gradient(run)
  model = autoencoder.autoencoder_vq(
    8, (1, 2), 1, 2, 16, 1, groups=4, remat='none', middle_attention=False)
  encode = jax.jit(lambda x: model.apply({'params': params['net']}, x, method='encode'))
  z = np.asarray(encode(batch['image']))
  book = np.asarray(params['net']['codebook'])
  index = np.square(z[..., None, :] - book).sum(-1).argmin(-1)
  error = z - book[index]
  np.testing.assert_allclose(
    latent, 1.25 * np.square(error).mean((1, 2, 3)), rtol=1e-4)
  wanted = np.zeros_like(book)
  np.add.at(wanted, index, -2 * error / z[0].size)  # of the mean over an example's values
  np.testing.assert_allclose(grads['codebook'], wanted, rtol=1e-4, atol=1e-7)
  through = gradient(setup(*plain, 'task.commitment=0.0'))[1]['encoder']
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(through))  # from the decoder alone
  assert not np.allclose(through['conv_in']['kernel'], grads['encoder']['conv_in']['kernel'])


def test_own_gradients():
  """The discriminator's phase moves it alone; before its start nothing of it, and not even Adam."""
  run = setup('data.name=digits', 'task.discriminator.start=1')
  states, batches, step = [begin(run)], train.batches(run, 0), train.compile_step(run)
  for _ in range(2):
    copy = jax.tree.map(jnp.copy, states[-1])
    states.append(step(copy, next(batches))[0])
  batches.close()
  flat = [run_diffax.flat({'params': s.params['disc'], 'opt': s.opt['disc']}) for s in states]
  run_diffax.assert_same(flat[0], flat[1])
  assert all((flat[1][key] != flat[2][key]).any() for key in flat[1] if 'kernel' in key)
  assert {key.split('/')[0] for key in run_diffax.flat(states[0].opt)} == {'net', 'disc'}
  run_diffax.assert_same(
    run_diffax.flat(states[0].frozen), run_diffax.flat(states[2].frozen))


# --- LPIPS, patches, SSIM against references ------------------------------------------------------


def drawn(like, stored, path):
  """Parameters drawn by the reference's names, by way of a file."""
  file = path / 'weights.safetensors'
  wanted = tensors.wanted(like, stored)
  safetensors.save_file(
    {name: golden['draw'](name, shape).astype(np.float32) for name, shape in wanted.items()}, file)
  return tensors.load(tensors.find(file), like, stored), wanted


def close(found, wanted, bound=1e-5):
  assert np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max() < bound


def value_and_leaves(function, params):
  """What `function` makes of the parameters; each of them moves a projection of it."""
  def total(params):
    value = function(params)
    return value.sum(), value

  (_, value), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
  sizes = {sharding.name(path): float(jnp.linalg.norm(g))
           for path, g in jax.tree_util.tree_leaves_with_path(grads)}
  assert min(sizes.values()) > 1e-4 * max(sizes.values()), sizes
  return np.asarray(value)


def test_lpips(tmp_path):
  like = jax.eval_shape(vgg.LPIPS().init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))['params']
  _, wanted = drawn(like, perceptual.stored, tmp_path)
  assert len(wanted) == 2 * 13 + 5 and wanted['lin4.model.1.weight'] == (1, 512, 1, 1)
  assert {name for name in wanted if name.startswith('features.28')} == {
    'features.28.weight', 'features.28.bias'}
  looks = perceptual.lpips(3, str(tmp_path / 'weights.safetensors'))
  params = looks.frozen.load(looks.frozen.like())
  x, y = (jnp.asarray(v, jnp.float32) for v in golden['pictures']())

  def compared(params):
    maps, others = looks.maps(params, x), looks.maps(params, y)
    return jnp.stack([perceptual.distance([a], [b]) for a, b in zip(maps, others)])

  found = value_and_leaves(compared, params)
  with np.load(GOLDEN / 'lpips.npz') as known:
    close(found, known['layers'], 1e-4)
    close(found.sum(0), known['lpips'], 1e-4)

  stored = dict(safetensors.load_file(tmp_path / 'weights.safetensors'))
  stored['lin2.model.1.weight'] *= -1
  safetensors.save_file(stored, tmp_path / 'negative.safetensors')
  other = perceptual.lpips(3, str(tmp_path / 'negative.safetensors'))
  with pytest.raises(ConfigError, match='negative'):
    other.frozen.load(other.frozen.like())
  stored = {name: np.zeros(1, np.float32) for name in stored if name != 'features.5.bias'}
  safetensors.save_file(stored, tmp_path / 'short.safetensors')
  with pytest.raises(ConfigError, match='features.5.bias'):
    perceptual.lpips(3, str(tmp_path / 'short.safetensors'))
  with pytest.raises(ValueError, match='not 4'):
    perceptual.lpips(4, str(tmp_path / 'weights.safetensors'))


def test_black_maps():
  """A place where no channel says anything counts nothing, and has a gradient."""
  looks = vgg.LPIPS(((4, 1),))
  params = looks.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  params = jax.tree.map(jnp.zeros_like, params)
  far = lambda x: perceptual.distance(looks.apply(params, x), looks.apply(params, x + 1)).sum()
  value, gradient = jax.jit(jax.value_and_grad(far))(jnp.zeros((1, 16, 16, 3)))
  assert value == 0 and not gradient.any()


def test_grey_is_seen_as_grey():
  looks = vgg.LPIPS(((4, 1), (8, 1)))
  x = jax.random.uniform(jax.random.key(0), (1, 16, 16, 1))
  params = jax.jit(looks.init)(jax.random.key(1), x)
  apply = jax.jit(looks.apply)
  for a, b in zip(apply(params, x), apply(params, jnp.tile(x, (1, 1, 1, 3)))):
    np.testing.assert_array_equal(a, b)


def test_patches(tmp_path):
  model = discriminator.patch_gan(**golden['PATCHES'])
  x = jnp.asarray(golden['pictures']()[0], jnp.float32)
  like = jax.eval_shape(model.init, jax.random.key(0), x)['params']

  def stored(path, shape):
    if 'norm' in path:
      module, _, leaf = path.partition('_')
      return tensors.usual(module, leaf, shape)
    return tensors.usual(path.partition('/')[0], path, shape)

  params, _ = drawn(like, stored, tmp_path)
  found = value_and_leaves(lambda params: model.apply({'params': params}, x), params)
  with np.load(GOLDEN / 'lpips.npz') as known:
    close(found, known['patches'])


def test_patches_of_one_are_those_of_a_batch():
  """No moments of the batch: an example's are its own."""
  model = discriminator.patch_gan(4, 2, 4)
  x = jax.random.normal(jax.random.key(0), (4, 16, 16, 1))
  params, apply = jax.jit(model.init)(jax.random.key(1), x), jax.jit(model.apply)
  both = apply(params, x.at[1:].multiply(100.0))
  np.testing.assert_allclose(both[:1], apply(params, x[:1]), rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match='12 at least'):
    model.apply(params, x[:, :8, :8])


def test_ssim():
  a, b = ((jnp.asarray(v, jnp.float32) + 1) / 2 for v in golden['pictures']())
  with np.load(GOLDEN / 'lpips.npz') as known:
    np.testing.assert_allclose(reconstruction.ssim(a, b), known['ssim'], rtol=1e-4)


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(run, workdir, state) of 60 steps of a codebook's training, without a discriminator."""
  run = setup(
    'data.name=digits', 'data.split=train', 'task.split=test', *VQ, 'steps=60', 'save_every=60',
    'task.discriminator.weight=0.0', 'phases={}', 'ema=(0.9,)', 'learning_rate=0.01',
    'evals.back.name=reconstruction', 'evals.back.count=50', 'evals.back.batch_size=20')
  workdir = epath.Path(tmp_path_factory.mktemp('vq'))
  return run, workdir, train.train(run, workdir)


def test_learns(trained):
  """A tenth of what grey would be off, of records it was not trained on."""
  run, _, state = trained
  first = evaluate.entries(run)['back']
  found = dict(pair for pair in first.evaluate(state, None) if pair)
  held = run_diffax.sources.digits('test')
  x = np.stack([held[i]['image'] for i in range(50)]) / 255
  assert found['back/mse'] < 0.35 * np.square(x - x.mean()).mean()
  assert found['back/psnr'] > 13


def test_evaluation(trained):
  """Its numbers by numpy from the task's own reconstructions; the last batch is not whole."""
  run, _, state = trained
  found = dict(pair for pair in evaluate.entries(run)['back'].evaluate(state, None) if pair)
  held = run_diffax.sources.digits('test')
  x = np.stack([held[i]['image'] for i in range(50)])
  params = sample.choose(state, '')
  shown = jnp.asarray(x / 127.5 - 1, jnp.float32)
  made = jax.device_get(jax.jit(run.task.reconstruct)(params, state.frozen, shown))
  y = np.rint(np.clip((made['image'].astype(np.float64) + 1) * 127.5, 0, 255))
  mse = np.square((x - y) / 255).mean((1, 2, 3))
  assert found['back/mse'] == pytest.approx(mse.mean(), rel=1e-3)
  assert found['back/psnr'] == pytest.approx((10 * np.log10(1 / mse)).mean(), rel=1e-3)
  z = made['mean'].astype(np.float64)
  assert found['back/latent_std'] == pytest.approx(z.std(), rel=1e-3)
  for i in range(2):
    assert found[f'back/latent_mean_{i}'] == pytest.approx(z[..., i].mean(), rel=1e-3, abs=1e-4)
    assert found[f'back/latent_std_{i}'] == pytest.approx(z[..., i].std(), rel=1e-3)
  share = made['codes'].sum(0) / made['codes'].sum()
  assert made['codes'].sum() == 50 * 16
  assert found['back/codes_used'] == (share > 0).mean()
  entropy = -sum(p * np.log(p) for p in share if p)
  assert found['back/perplexity'] == pytest.approx(np.exp(entropy), rel=1e-4)
  assert found['back/perceptual'] == pytest.approx(made['perceptual'].mean(), rel=1e-3)
  assert 'back/ssim' not in found  # of 8 pixels a side
  assert found['back/pictures'].dtype == np.uint8


def test_samples_are_reconstructions(trained):
  run, workdir, state = trained
  draw = sample.drawer(run, run.config['sample'], 'sample')
  pictures, asked = draw(state, 3, start=5)
  held = run_diffax.sources.digits('test')
  x = jnp.stack([jnp.asarray(held[i]['image'], jnp.float32) / 127.5 - 1 for i in range(5, 8)])
  np.testing.assert_allclose(asked['image'], x, rtol=1e-6, atol=1e-6)
  wanted = jax.jit(run.task.reconstruct)(sample.choose(state, ''), state.frozen, x)['image']
  assert np.abs(pictures - (np.clip(wanted, -1, 1) + 1) * 127.5).max() < 0.51
  arrays, _ = sample.sample(run, workdir, 0)
  with np.load(arrays) as found:
    np.testing.assert_array_equal(found['arr_0'][3], draw(state, 1, start=3)[0][0])


def test_moments_of_a_gaussian():
  """Of draws, not of means: the variance within counts."""
  run = setup('data.name=digits', 'data.split=train', 'evals.back.name=reconstruction',
              'evals.back.count=8', 'evals.back.batch_size=8')
  state = begin(run)
  found = dict(pair for pair in evaluate.entries(run)['back'].evaluate(state, None) if pair)
  held = run_diffax.sources.digits('test')
  x = jnp.stack([jnp.asarray(held[i]['image'], jnp.float32) / 127.5 - 1 for i in range(8)])
  made = jax.device_get(
    jax.jit(run.task.reconstruct)(sample.choose(state, ''), state.frozen, x))
  eps = np.random.default_rng(0).standard_normal((4000, *made['mean'].shape))
  draws = made['mean'] + np.sqrt(made['variance']) * eps
  assert found['back/latent_std'] == pytest.approx(draws.std(), rel=5e-3)
  assert draws.std() > 1.1 * made['mean'].std()


@pytest.mark.slow  # of phases alike in test_phases
def test_accumulation_and_mesh():
  """Both phases over the whole batch: the same in parts, and on eight devices."""
  plain = ('data.name=digits', 'task.discriminator.start=0', 'optimizer.name=sgd',
           'phases.disc.optimizer=sgd', 'optimizer.clip=0.', 'learning_rate=0.1', 'log_every=1',
           'model.multipliers=(1,)', 'task.perceptual.widths=(4,)')

  def one(*overrides, count=1):
    run = setup(*plain, *overrides, count=count)
    batches = train.batches(run, 0)
    state, metrics = train.compile_step(run)(begin(run), next(batches))
    batches.close()
    return run_diffax.flat(state.params), metrics

  wanted, told = one()
  for found, metrics in (one('accumulate=2'), one('mesh.data=2', 'mesh.fsdp=4', count=8)):
    for key in wanted:
      np.testing.assert_allclose(found[key], wanted[key], rtol=1e-4, atol=2e-5, err_msg=key)
    terms = ('distance', 'latent', 'perceptual', 'fooled', 'real_disc', 'made_disc')
    for key in ('loss', 'grad_norm', 'loss_disc', 'grad_norm_disc', *terms):
      assert float(metrics[key]) == pytest.approx(float(told[key]), rel=1e-4), key


@pytest.mark.slow  # of phases alike in test_phases
def test_killed(tmp_path):
  """Killed between two checkpoints, the discriminator under way: the same bits at the end."""
  straight, workdir = tmp_path / 'straight', tmp_path / 'killed'
  arguments = f'--config={THIS}', '--config.model.multipliers=(1,)'
  start = lambda folder, sleep: run_diffax.Process(folder, *arguments, sleep=sleep)
  process = start(straight, 0)
  assert process.end() == 0, process.text()
  process = start(workdir, 0.003)
  process.says('step 9/12')
  assert process.until((workdir / 'checkpoints' / '4').exists)
  assert process.send(signal.SIGKILL) == -signal.SIGKILL
  assert checkpoint.present(workdir / 'checkpoints')[-1] in (4, 8)
  process = start(workdir, 0)
  assert process.end() == 0 and 'going on from the checkpoint' in process.text(), process.text()
  found = run_diffax.arrays(workdir, 12)
  run_diffax.assert_same(found, run_diffax.arrays(straight, 12))
  assert run_diffax.numbers(workdir) == run_diffax.numbers(straight)
  assert int(found['opt/disc/0/count']) == 9 and not any('frozen' in key for key in found)


@pytest.mark.parametrize('overrides, text', [
  (('task.kl=-1.0',), 'task.kl=-1.0'),
  (('task.discriminator.depth=2',), '12 at least'),
  (('task.discriminator.name=patch',), 'patch_gan'),
  (('task.perceptual.name=lpips', 'task.perceptual.weights=none.safetensors'), 'no such file'),
  (('model={"name":"dit","patch":2,"width":32,"depth":1,"heads":2}',), 'autoencoder_kl'),
])
def test_wrong(overrides, text):
  with pytest.raises(ConfigError, match=text):
    setup('data.name=digits', *overrides)


def test_wrong_samples():
  run = setup('data.name=digits')
  with pytest.raises(ConfigError, match='guidance=2.0.*draws nothing'):
    sample.drawer(run, run.config['sample'] | {'guidance': 2.0}, 'sample')
  run = setup('data.name=run_diffax.digits', 'task.split=test')
  with pytest.raises(ConfigError, match='has no splits'):
    sample.drawer(run, run.config['sample'], 'sample')


def test_reconstruction_of_a_task_without():
  run = run_diffax.setup('evals.back.name=reconstruction')
  with pytest.raises(ConfigError, match='task=autoencode'):
    evaluate.entries(run)
