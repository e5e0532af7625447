"""Edits: what sampling does with pictures, on Gaussian data, whose flow is known in full."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import run_diffax

from diffax import edits
from diffax import givens
from diffax import grids
from diffax import guidance
from diffax import noises
from diffax import sample
from diffax import samplers
from diffax import schedules
from diffax.build import ConfigError

RANDOM = np.random.default_rng(0)
STD = 0.6
SHAPE = (8, 8, 3)
SCHEDULE = schedules.cosine()


def gaussian(x, level, cond=None):
  """E[x0 | x_t = x] for x0 ~ N(0, STD^2)."""
  return level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2) * x


def place(asked, ts, seed=0, denoise=gaussian, shape=SHAPE, conds=None):
  asked = {k: jnp.asarray(v) for k, v in asked.items()}
  b = len(next(iter(asked.values()))) if asked else 4
  keys = samplers.sample_keys(seed, jnp.arange(b))
  conds = conds or {'cond': {}, 'null': {}, 'source': {}}
  return edits.Place(SCHEDULE, ts, keys, asked, shape, lambda x: x, conds, denoise)


def walk(edit, here, denoise=gaussian):
  """Where an edit's walk ends, by DDIM."""
  ts, x = edit.begin(here)
  sampler = samplers.ddim(0.0)
  denoise = edit.wrap(here, denoise)
  return np.asarray(samplers.sample(
    sampler, denoise, sampler.plan(SCHEDULE, ts), x, here.keys))


@pytest.fixture
def picture(tmp_path):
  """A file of a smooth picture, and its pixels in [-1, 1]."""
  rows, columns = np.mgrid[:8, :8] / 7
  pixels = np.stack([rows, columns, 1 - rows * columns], axis=-1)
  pixels = np.rint(255 * pixels).astype(np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'picture.png')
  return str(tmp_path / 'picture.png'), pixels / 127.5 - 1


@pytest.fixture
def mask(tmp_path):
  """A file whose left half is to be painted."""
  pixels = np.zeros((8, 8), np.uint8)
  pixels[:, :4] = 255
  Image.fromarray(pixels).save(tmp_path / 'mask.png')
  return str(tmp_path / 'mask.png'), pixels[..., None] > 0


# --- where the walk begins ------------------------------------------------------------------------


def test_image_to_image(picture):
  """At strength 0 the picture; else it is noised to where the rest of the walk begins."""
  file, pixels = picture
  ts = grids.uniform(SCHEDULE, 10)
  nothing = edits.image_to_image(file, 0.0)
  np.testing.assert_allclose(
    walk(nothing, place(nothing.ask(np.arange(2), SHAPE), ts)), [pixels] * 2, atol=1e-6)
  half = edits.image_to_image(file, 0.5)
  asked = half.ask(np.arange(400), SHAPE)
  times, x = half.begin(place(asked, ts))
  assert len(times) == 6
  level = SCHEDULE(times[0])
  np.testing.assert_allclose(x.mean(0), level.alpha * pixels, atol=5 * level.sigma / 400**0.5)
  spread = np.hypot(level.sigma, (level.alpha * pixels).std())
  np.testing.assert_allclose(x.std(), spread, rtol=0.02)


def test_invert(picture):
  """The noise that a picture is found to come of leads back to it, the nearer the finer the walk.

  Its size is that which the flow of Gaussian data has: x / sqrt(alpha^2 s^2 + sigma^2) stays.
  """
  file, pixels = picture
  edit, errors = edits.invert(file), []
  for steps in (25, 50, 100):
    ts = grids.uniform(SCHEDULE, steps)
    here = place(edit.ask(np.arange(1), SHAPE), ts)
    _, x = edit.begin(here)
    errors.append(np.abs(walk(edit, here) - pixels).max())
  level = SCHEDULE(ts[0])
  np.testing.assert_allclose(x[0], pixels / STD * np.hypot(level.alpha * STD, level.sigma),
                             atol=0.05)
  assert errors[2] < 0.03 and errors[0] / errors[2] > 2.5  # of order 1


def test_invert_reads_its_own_text(picture):
  """Up under the text of the picture, down under the other."""
  file, pixels = picture
  edit = edits.invert(file, prompt='a')
  assert edit.prompts(('b',)) == (('b',), {'source': 'a'})
  asked_for = []

  def denoise(x, level, cond):
    asked_for.append(cond['name'])
    return gaussian(x, level)

  conds = {'cond': {'name': 'b'}, 'null': {}, 'source': {'name': 'a'}}
  edit.begin(place(edit.ask(np.arange(1), SHAPE), grids.uniform(SCHEDULE, 3), conds=conds,
                   denoise=denoise))
  assert set(asked_for) == {'a'}


def test_slerp():
  """Length stays, ends are ends, and angles are even."""
  a, b = (jnp.asarray(RANDOM.standard_normal((3, 4, 4, 2)), jnp.float32) for _ in range(2))
  b *= jnp.sqrt((a**2).sum((1, 2, 3), keepdims=True) / (b**2).sum((1, 2, 3), keepdims=True))
  norm = lambda x: np.sqrt((np.asarray(x, np.float64)**2).sum((1, 2, 3)))
  at = [np.asarray(edits.slerp(a, b, share), np.float64) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
  np.testing.assert_allclose(at[0], a, atol=1e-5)
  np.testing.assert_allclose(at[-1], b, atol=1e-5)
  for x in at:
    np.testing.assert_allclose(norm(x), norm(a), rtol=1e-5)
  angles = [np.arccos((x * y).sum((1, 2, 3)) / norm(x) / norm(y)) for x, y in zip(at, at[1:])]
  np.testing.assert_allclose(angles, np.broadcast_to(angles[0], (4, 3)), rtol=1e-3)
  np.testing.assert_allclose(edits.slerp(a, a, 0.3), a, atol=1e-5)


def test_variations():
  """Strength 0 is one sample for all, 1 each's own."""
  ts = grids.uniform(SCHEDULE, 4)
  none = edits.none()
  own = walk(none, place({}, ts))
  other = walk(none, place({}, ts, seed=7))
  same = walk(edits.variations(seed=7, strength=0.0), place({}, ts))
  np.testing.assert_allclose(same, np.broadcast_to(other[:1], same.shape), atol=1e-5)
  np.testing.assert_allclose(walk(edits.variations(7, 1.0), place({}, ts)), own, atol=1e-5)
  near = walk(edits.variations(7, 0.2), place({}, ts))
  assert 0 < np.abs(near - other[:1]).max() and np.ptp(near, axis=0).max() > 0


def test_interpolate():
  """The first and last are the samples of the two seeds; conditions go in a line."""
  edit, ts = edits.interpolate(frames=4, seeds=(3, 5)), grids.uniform(SCHEDULE, 4)
  asked = edit.ask(np.arange(4), SHAPE)
  np.testing.assert_allclose(asked['share'], [0, 1 / 3, 2 / 3, 1])
  found = walk(edit, place(asked, ts))
  for seed, x in ((3, found[0]), (5, found[-1])):
    np.testing.assert_allclose(x, walk(edits.none(), place({}, ts, seed=seed))[0], atol=1e-5)
  cond = lambda value, mask: {
    'text': jnp.full((4, 2, 3), value), 'text_mask': jnp.asarray([mask] * 4)}
  conds = {'cond': cond(1.0, [1, 0]), 'other': cond(4.0, [1, 1]), 'null': {}}
  told, _ = edit.told(place(asked, ts, conds=conds))
  np.testing.assert_allclose(told['text'][:, 0, 0], [1, 2, 3, 4], rtol=1e-6)
  assert (told['text_mask'] == 1).all()
  assert edit.prompts(('a', 'b')) == (('a',), {'other': 'b'})
  with pytest.raises(ConfigError, match='3 prompts'):
    edit.prompts(('a', 'b', 'c'))


# --- parts of a picture ---------------------------------------------------------------------------


def test_inpaint(picture, mask):
  """What is known stays to the bit, the rest is drawn as if alone: pixels are independent here."""
  (file, _), (holes, painted) = picture, mask
  ts, edit = grids.uniform(SCHEDULE, 6), edits.inpaint(file, holes)
  asked = edit.ask(np.arange(4), SHAPE)
  here = place(asked, ts)
  found = np.asarray(edit.finish(here.asked, walk(edit, here)))
  known = ~painted[..., 0]
  np.testing.assert_array_equal(found[:, known], asked['picture'][:, known])
  alone = walk(edits.none(), place({}, ts))
  np.testing.assert_allclose(found[:, ~known], alone[:, ~known], atol=1e-6)
  kept = walk(edits.inpaint(file, holes, paste=False), here)
  np.testing.assert_allclose(kept[:, known], asked['picture'][:, known], atol=1e-6)


def test_inpaint_of_a_trained_network(picture, mask):
  """A network that is told the mask is not held to anything."""
  (file, _), (holes, _) = picture, mask
  edit = edits.inpaint(file, holes)
  told = {'mask': jnp.zeros((1, 8, 8, 1))}
  here = place(edit.ask(np.arange(1), SHAPE), None, conds={'cond': told, 'null': {}})
  assert edit.wrap(here, gaussian) is gaussian


def test_outpaint(picture):
  """So many pixels to each side are painted, and the rest is the picture, made smaller."""
  file, _ = picture
  edit = edits.outpaint(file, left=2, top=1, bottom=3)
  asked = edit.ask(np.arange(2), SHAPE)
  assert asked['mask'].shape == (2, 8, 8, 1)
  np.testing.assert_array_equal(asked['mask'][0, 1:5, 2:], 0)
  assert asked['mask'][0].sum() == 64 - 4 * 6
  with pytest.raises(ConfigError, match='leave nothing'):
    edits.outpaint(file, left=4, right=4).ask(np.arange(1), SHAPE)


def test_instruct():
  """null + s_I (picture - null) + s_T (both - picture): Brooks et al. 2023, eq. 3."""
  picture = jnp.full((2, 8, 8, 3), 0.5)
  cond = {'image': picture, 'text': jnp.full((2, 1), 3.0)}
  null = {'image': picture, 'text': jnp.zeros((2, 1))}

  def denoise(x, level, cond):
    return 0 * x + 10 * cond['image'].mean((1, 2, 3))[:, None, None, None] \
      + cond['text'][:, :, None, None]

  made = edits.Edit
  edit = edits.instruct(__file__, image_guidance=1.5)
  assert isinstance(edit, made) and edit.trained
  here = place({'share': np.zeros(2)}, None, denoise=denoise, conds={'cond': cond, 'null': null})
  guided = edit.guide(here, 7.5)
  x, level = jnp.zeros((2, 8, 8, 3)), SCHEDULE(jnp.asarray(0.5))
  both, seen, nothing = 5 + 3, 5, 0
  np.testing.assert_allclose(
    guided(x, level).x0, nothing + 1.5 * (seen - nothing) + 7.5 * (both - seen), rtol=1e-5)


# --- what is given --------------------------------------------------------------------------------


def test_masked():
  """The hidden part is grey, whole pictures as often as asked, shares as asked."""
  pictures = jnp.ones((2000, 16, 16, 1))
  keys = samplers.sample_keys(0, jnp.arange(2000))
  shown = givens.masked(0.25, 0.5, drop=0.2).train(pictures, keys)
  mask = np.asarray(shown['mask'])
  assert set(np.unique(mask)) == {0, 1}
  np.testing.assert_array_equal(shown['image'], 1 - mask)
  whole = mask.all((1, 2, 3))
  assert 0.17 < whole.mean() < 0.23
  sides = np.asarray([m.any(0).sum() for m in mask[~whole][..., 0]])
  assert sides.max() <= 9 and sides.min() >= 2  # a stretch of 4 to 8, cut at an edge to its half


def test_smaller():
  """Without noise the mean of squares, brought back; the last channel tells the noise."""
  pictures = jnp.asarray(RANDOM.uniform(-1, 1, (64, 8, 8, 3)), jnp.float32)
  keys = samplers.sample_keys(0, jnp.arange(64))
  plain = givens.smaller(4, noise=0.0).train(pictures, keys)['image']
  means = np.asarray(pictures).reshape(64, 2, 4, 2, 4, 3).mean((2, 4))
  np.testing.assert_allclose(plain[..., :3], givens.enlarge(jnp.asarray(means), 4), atol=1e-5)
  assert plain.shape == (64, 8, 8, 4) and not plain[..., 3].any()
  noisy = givens.smaller(4, noise=0.5).train(pictures, keys)['image']
  level = np.asarray(noisy[:, 0, 0, 3])
  assert 0 <= level.min() < 0.1 and 0.4 < level.max() <= 0.5
  asked = {'image': jnp.asarray(means), 'noise': jnp.full(64, 0.25)}
  shown = givens.smaller(4, noise=0.5).show(asked, keys)['image']
  np.testing.assert_allclose(shown[..., 3], 0.25)


def test_noised():
  """The mean of squares as the table's step noises it, any step of them in training."""
  betas = np.linspace(1e-2, 0.2, 50)
  level = np.cumprod(1 - betas)  # the share of the picture's variance at each step
  given = givens.noised(4, most=30, table='linear_table', beta_min=1e-2, beta_max=0.2, steps=50)
  keys = samplers.sample_keys(0, jnp.arange(4000))
  shown = given.train(jnp.full((4000, 8, 8, 1), 0.5), keys)
  step, image = np.asarray(shown['noise_level']), np.asarray(shown['image'])
  assert image.shape == (4000, 2, 2, 1) and set(step) == set(range(31))
  for i in (0, 15, 30):
    found = image[step == i]
    assert abs(found.mean() - 0.5 * level[i] ** 0.5) < 5 * (1 - level[i]) ** 0.5 * found.size**-0.5
    assert abs(found.var() / (1 - level[i]) - 1) < 5 * (2 / found.size) ** 0.5
  small = jnp.asarray(RANDOM.uniform(-1, 1, (64, 2, 2, 3)), jnp.float32)
  shown = given.show({'image': small, 'noise': jnp.full(64, 30.0)}, keys[:64])
  assert (shown['noise_level'] == 30).all() and shown['noise_level'].dtype == jnp.int32
  noise = noises.normal(keys[:64], (2, 2, 3))
  want = level[30] ** 0.5 * small + (1 - level[30]) ** 0.5 * noise
  np.testing.assert_allclose(shown['image'], want, atol=1e-5)
  with pytest.raises(ValueError, match=r'most=50: say 2 and more, and \[0, 50\)'):
    givens.noised(most=50, steps=50)


def test_windows(x64):
  """Of a denoiser that looks at single places the whole and its windows are one."""
  x = jnp.asarray(RANDOM.standard_normal((2, 13, 9, 3)))
  extra = jnp.asarray(RANDOM.standard_normal((2, 13, 9, 1)))
  level = SCHEDULE(jnp.asarray(0.4))
  seen = []

  def denoise(x, level, cond):
    seen.append(x.shape)
    return gaussian(x, level) * cond['image'] + cond['text'][:, None, None]

  cond = {'image': extra, 'text': jnp.asarray(RANDOM.standard_normal((2, 3)))}
  said = guidance.windows(denoise, 6, 2)(x, level, cond)
  whole = guidance.windows(denoise, 16, 2)(x, level, cond)
  np.testing.assert_allclose(said.x0, whole.x0, atol=1e-12)
  np.testing.assert_allclose(said.eps, whole.eps, atol=1e-12)
  assert (2, 6, 6, 3) in seen and (2, 13, 9, 3) in seen
  with pytest.raises(ValueError, match='overlap=6'):
    guidance.windows(denoise, 6, 6)


# --- by a run -------------------------------------------------------------------------------------

TINY = ('model.depth=1', 'model.width=16')


def drawn(run, *overrides):
  settings = run_diffax.config(*TINY, *(f'sample.{o}' for o in overrides))['sample']
  drawing = run.task.sample({**settings, 'sampler': {**settings['sampler'], 'steps': 3}}, 'sample')
  params = jax.tree.map(
    lambda x: 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), run.like.params)
  keys = samplers.sample_keys(0, jnp.arange(2))
  return np.asarray(jax.jit(drawing.draw)(
    params, {}, keys, drawing.ask(np.arange(2))))


def test_in_a_run(picture, mask):
  """As a user names them in a config; sizes other than training's by windows."""
  run = run_diffax.setup(*TINY)
  file, holes = picture[0], mask[0]
  painted = drawn(run, 'edit=inpaint', f'edit.image={file}', f'edit.mask={holes}')
  plain = drawn(run)
  assert painted.shape == plain.shape == (2, 8, 8, 1)
  assert np.array_equal(painted[0, :, 4:], painted[1, :, 4:])
  assert np.abs(painted[0, :, :4] - painted[1, :, :4]).max() > 1e-3
  large = drawn(run, 'size=(16, 12)', 'window=(8, 4)')
  assert large.shape == (2, 16, 12, 1) and np.isfinite(large).all()


@pytest.mark.parametrize('overrides, said', [
  (('edit=image_to_image', 'edit.image=nowhere.png'), "image='nowhere.png': no such picture"),
  (('edit=image_to_image', 'edit.image={file}', 'edit.strength=1.5'), 'strength=1.5 is outside'),
  (('edit=inpaint', 'edit.image={file}', 'edit.mask={other}'), 'make them of one size'),
  (('edit=inpaint', 'edit.image={file}', 'edit.mask={broken}'), 'cannot be read as a picture'),
  (('edit=instruct', 'edit.image={file}'), 'for a network that was trained'),
  (('edit=upscale', 'edit.image={file}'), 'for a network that was trained'),
  (('size=(16,)',), r'size=\(16,\): say \(height, width\)'),
  (('window=(4, 4)',), 'overlap=4'),
  (('edit=interpolate', 'edit.frames=1'), 'frames=1'),
])
def test_wrong(overrides, said, picture, tmp_path):
  """Said in one line, before anything is compiled."""
  names = dict(file=picture[0], other=str(tmp_path / 'other.png'), broken=str(tmp_path / 'b.png'))
  Image.fromarray(np.zeros((4, 8), np.uint8)).save(names['other'])
  (tmp_path / 'b.png').write_bytes(b'no picture')
  run = run_diffax.setup(*TINY)
  settings = run_diffax.config(
    *TINY, *(f'sample.{o.format(**names)}' for o in overrides))['sample']
  with pytest.raises(ConfigError, match=said) as error:
    sample.drawer(run, settings, 'sample')
  assert '\n' not in str(error.value)
