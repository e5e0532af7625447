"""Guidance on Gaussian data, where the guided score is that of a Gaussian again.

With one variance and means m (conditional) and m0 (null) the scores differ by a constant, so that
guiding with scale w is exactly to have data of mean m0 + w (m - m0).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import grids
from diffax import guidance
from diffax import predictions
from diffax import samplers
from diffax import schedules

VAR, STEPS, BATCH = 0.2, 8, 4
SAMPLERS = dict(ddim=samplers.ddim(), heun=samplers.heun(), dpmpp_2m=samplers.dpmpp_2m())
COND = {'mean': jnp.array([[1., 0.5], [-1., 0.], [0.3, 0.3], [2., -1.]])}
NULL = {'mean': jnp.full((BATCH, 2), 0.25)}
X = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 2)), jnp.float32)


def exact(x, level, cond):
  total = level.alpha**2 * VAR + level.sigma**2
  x0 = cond['mean'] + level.alpha * VAR / total * (x - level.alpha * cond['mean'])
  return predictions.invert(x0, x, level)


def guided_mean(scale):
  return {'mean': NULL['mean'] + scale * (COND['mean'] - NULL['mean'])}


class Counted:
  """`exact`, noting at run time the batch it is called with."""

  def __init__(self):
    self.batches = []

  def __call__(self, x, level, cond):
    jax.debug.callback(lambda batch: self.batches.append(int(batch)), x.shape[0])
    return exact(x, level, cond)


def sampled(name, denoise, steps=STEPS):
  schedule = schedules.linear()

  @jax.jit
  def run(rows):
    return samplers.sample(SAMPLERS[name], denoise, rows, X)

  rows = SAMPLERS[name].plan(schedule, grids.karras(schedule, steps))
  out = np.asarray(run(rows))
  jax.effects_barrier()
  return out, rows['level']


@pytest.mark.parametrize('name', SAMPLERS)
def test_cfg(name):
  """In every step, both branches in one call of twice the batch."""
  network = Counted()
  out, levels = sampled(name, guidance.cfg(network, COND, NULL, 3.))
  want, _ = sampled(name, guidance.condition(exact, guided_mean(3.)))
  np.testing.assert_allclose(out, want, atol=1e-4)
  assert network.batches == [2 * BATCH] * len(levels.t)


@pytest.mark.parametrize('name', SAMPLERS)
def test_last_step_is_guided(name):
  """A single step is the last one too, and says the guided x0 at pure noise: the guided mean."""
  out, _ = sampled(name, guidance.cfg(exact, COND, NULL, 3.), steps=1)
  np.testing.assert_allclose(out, guided_mean(3.)['mean'], atol=1e-5)


def test_scale_1_is_no_guidance():
  out, levels = sampled('ddim', guidance.cfg(exact, COND, NULL, 1.))
  want, _ = sampled('ddim', guidance.condition(exact, COND))
  np.testing.assert_array_equal(out, want)
  network = Counted()
  sampled('ddim', guidance.cfg(network, COND, NULL, 1.))
  assert network.batches == [BATCH] * len(levels.t)


@pytest.mark.parametrize('name', SAMPLERS)
def test_interval(name):
  """Inside guided, outside not, and there the null branch is not computed."""
  low, high = 0.1, 3.
  network = Counted()
  out, levels = sampled(name, guidance.cfg(network, COND, NULL, 3., low, high))
  nsr = np.asarray(levels.sigma) / np.maximum(np.asarray(levels.alpha), 1e-30)
  inside = (low <= nsr) & (nsr <= high)
  assert 0 < inside.sum() < len(inside)
  assert sorted(network.batches) == sorted(np.where(inside, 2 * BATCH, BATCH).tolist())
  def by_hand(x, level):
    acts = (low <= level.nsr) & (level.nsr <= high)
    mean = jnp.where(acts, guided_mean(3.)['mean'], COND['mean'])
    return exact(x, level, {'mean': mean})
  np.testing.assert_allclose(out, sampled(name, by_hand)[0], atol=1e-4)


@pytest.mark.parametrize('bounds', [(), (0.1, 3.), (0.5, np.inf)])
def test_a_level_and_a_scale_an_example(bounds):
  """Each example by its own noise level; sigma / alpha of the four is 0.05, 1, 4 and infinite."""
  level = schedules.linear()(jnp.array([0.05 / 1.05, 0.5, 0.8, 1.])[:, None])
  scale = jnp.array([3., 2., 4., 1.5])[:, None]
  low, high = bounds or (0., np.inf)
  told = jax.jit(guidance.cfg(exact, COND, NULL, scale, *bounds))(X, level)
  inside = np.array([low <= 0.05, low <= 1 <= high, low <= 4 <= high, high == np.inf])[:, None]
  want = exact(X, level, guided_mean(jnp.where(inside, scale, 1.)))
  for got, true in zip(told[:2], want):
    np.testing.assert_allclose(got, true, atol=1e-5, rtol=1e-5)
  plain = exact(X, level, COND)
  np.testing.assert_allclose(told.x0[~inside[:, 0]], plain.x0[~inside[:, 0]], rtol=1e-6)


@pytest.mark.parametrize('bounds', [(), (0.1, 3.)])
def test_a_plain_x0_and_a_log_variance(bounds):
  """What a denoiser says besides x0 and eps is the conditional branch's; a plain x0 is enough."""
  level = schedules.linear()(0.5)
  x, cond, null = X[:1], *jax.tree.map(lambda a: a[:1], (COND, NULL))
  want = exact(x, level, jax.tree.map(lambda a: a[:1], guided_mean(3.)))
  plain = lambda x, level, cond: exact(x, level, cond).x0
  learned = lambda x, level, cond: exact(x, level, cond)._replace(fraction=cond['mean'])
  for denoise in (plain, learned):
    told = jax.jit(guidance.cfg(denoise, cond, null, 3., *bounds))(x, level)
    np.testing.assert_allclose(told.x0, want.x0, atol=1e-5)
    np.testing.assert_allclose(told.eps, want.eps, atol=1e-5)
  np.testing.assert_array_equal(told.fraction, cond['mean'])


def test_a_network_in_bfloat16():
  """Both branches of the interval speak the network's dtype."""
  def denoise(x, level, cond):
    said = exact(x, level, cond)
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16), said)
  told = jax.jit(guidance.cfg(denoise, COND, NULL, 3., 0.1, 3.))(X, schedules.linear()(0.5))
  assert told.x0.dtype == told.eps.dtype == jnp.bfloat16


# --- scales ---------------------------------------------------------------------------------------


def test_scales_of_papers():
  """Each of these is eps of the condition, whatever the paper calls it."""
  no_guidance = dict(ho=0., imagen=1., autoguidance=1., pag=0.)
  assert {p: guidance.scale_of(p, number) for p, number in no_guidance.items()} == dict.fromkeys(
      no_guidance, 1.)
  assert guidance.scale_of('ho', 1.5) == guidance.scale_of('imagen', 2.5) == 2.5
  with pytest.raises(ValueError, match="'hoo' is none of ho, imagen"):
    guidance.scale_of('hoo', 1.)


@pytest.mark.parametrize('make', [guidance.linear_scale, guidance.cosine_scale])
def test_scales_of_the_level(make, x64):
  """They rise from 1 at noise, their mean over times is that of the constant, cfg follows them."""
  schedule = schedules.linear()
  scale = make(schedule, 3.)
  values = scale(schedule(jnp.linspace(1., 0., 10_001)))
  assert values[0] == 1 and abs(values[-1] - 5) < 1e-12 and (jnp.diff(values) > 0).all()
  assert abs(values.mean() - 3) < 1e-9
  level = schedule(0.4)
  told = guidance.cfg(exact, COND, NULL, scale)(X, level)
  want = exact(X, level, guided_mean(float(scale(level))))
  np.testing.assert_allclose(told.x0, want.x0, atol=1e-6)
  assert float(scale(level)) == pytest.approx(
      {guidance.linear_scale: 3.4, guidance.cosine_scale: 3 + 2 * np.cos(0.4 * np.pi)}[make])


def test_a_scale_of_another_shape_is_an_error():
  with pytest.raises(ValueError, match=r'scale of shape \(4,\).* of shape \(4, 1\)'):
    guidance.cfg(exact, COND, NULL, jnp.ones(BATCH))(X, schedules.linear()(0.5))


def test_vmap_and_grad_of_the_scale():
  """x0 is a line in the scale."""
  level = schedules.linear()(0.5)
  x0 = lambda scale: guidance.cfg(exact, COND, NULL, scale)(X, level).x0
  slope = (exact(X, level, COND).x0 - exact(X, level, NULL).x0).sum()
  np.testing.assert_allclose(jax.grad(lambda s: x0(s).sum())(2.), slope, rtol=1e-5)
  many = jax.vmap(x0)(jnp.array([1., 2., 5.]))
  for got, scale in zip(many, [1., 2., 5.]):
    np.testing.assert_allclose(got, exact(X, level, guided_mean(scale)).x0, atol=1e-5)


# --- several branches -----------------------------------------------------------------------------

OTHER = {'mean': jnp.array([[0., 2.], [1., 1.], [-0.5, 0.], [0.3, 0.7]])}


def asked(denoise, level, x=X):
  """What a guided network says at a level, under jit, and the batches it is asked in."""
  network = Counted()
  told = jax.jit(denoise(network))(x, level)
  jax.effects_barrier()
  return told, network.batches


def mean_of(*weighted):
  """The condition of mean null + sum_i w_i (mean_i - null)."""
  return {'mean': NULL['mean'] + sum(w * (c['mean'] - NULL['mean']) for w, c in weighted)}


@pytest.mark.parametrize('weights, branches', [
    ((2., 1.5), 3), ((3., -1.), 3), ((0.25, 0.75), 2), ((2., 0.), 2),
    ((jnp.array([1., 2., 0., 3.])[:, None], 1.5), 3),
    ((lambda level: 4 * level.t, 1.5), 3), ((lambda level: 1 - level.t, lambda level: level.t), 2)])
def test_weighted_prompts(weights, branches):
  """Of numbers the branches that count 0 are left out before, of functions when it is seen."""
  level = schedules.linear()(0.5)
  told, batches = asked(
      lambda network: guidance.compose(network, [COND, OTHER], NULL, weights), level)
  first, second = (w(level) if callable(w) else w for w in weights)
  want = exact(X, level, mean_of((first, COND), (second, OTHER)))
  np.testing.assert_allclose(told.x0, want.x0, atol=1e-5)
  np.testing.assert_allclose(told.eps, want.eps, atol=1e-5)
  assert batches == [branches * BATCH]


def test_lengths_must_agree():
  with pytest.raises(ValueError, match='2 conditions and 1 weights'):
    guidance.compose(exact, [COND, OTHER], NULL, [1.])
  with pytest.raises(ValueError, match='1 conditions and 2 scales'):
    guidance.guide(exact, COND, [NULL], [1., 2.])
  with pytest.raises(ValueError, match=r'keep of shape \(4, 3\)'):
    guidance.perturbed(exact, COND, NULL, jnp.ones((4, 3)), [1., 2.])
  with pytest.raises(ValueError, match='neither'):
    guidance.perturbed(exact, COND, NULL, jnp.ones(3), [1., 2.], 'layers')
  with pytest.raises(ValueError, match='outside'):
    guidance.cfg_pp(exact, COND, NULL, 7.5)


LAYERS = jnp.array([[0.3, 0.], [0., -0.5], [0.2, 0.2]])  # what each adds to the mean


class Layered(Counted):
  """A network of three layers, each of which cond[flag] [b 3] keeps or skips."""

  def __init__(self, flag):
    super().__init__()
    self.flag = flag

  def __call__(self, x, level, cond):
    return super().__call__(x, level, {'mean': cond['mean'] + cond[self.flag] @ LAYERS})


@pytest.mark.parametrize('scale, flag', [(1., 'keep'), (3., 'keep'), (1., 'attend')])
def test_perturbed(scale, flag):
  """Null and skipped layers in one batch; outside its interval the perturbed branch is left out."""
  keep, low, high = jnp.array([1., 0., 1.]), 0.5, 2.
  network = Layered(flag)
  denoise = jax.jit(guidance.perturbed(
      network, COND, NULL, keep, [scale, guidance.limited(4., low, high)], flag))
  whole = COND['mean'] + LAYERS.sum(0)[None]
  for t, inside in [(0.2, False), (0.5, True), (0.9, False)]:
    network.batches = []
    level = schedules.linear()(t)
    told = denoise(X, level)
    jax.effects_barrier()
    assert network.batches == [BATCH * ((scale != 1) + inside + 1)]
    mean = whole + (scale - 1) * (COND['mean'] - NULL['mean']) + 3. * inside * LAYERS[1][None]
    np.testing.assert_allclose(told.x0, exact(X, level, {'mean': mean}).x0, atol=1e-5)


def test_branches_stay_on_their_devices():
  """Over a mesh the branches of an example lie where the example lies: nothing is exchanged."""
  mesh = jax.make_mesh((4,), ('data',), devices=jax.devices()[:4],
                       axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  put = lambda tree: jax.device_put(tree, spread)
  run = jax.jit(lambda x, cond, null: guidance.cfg(exact, cond, null, 3.)(
      x, schedules.linear()(0.5)).x0, out_shardings=spread)
  args = put(X), put(COND), put(NULL)
  text = run.lower(*args).compile().as_text()
  for word in ('all-to-all', 'all-gather', 'collective-permute', 'all-reduce'):
    assert word not in text
  np.testing.assert_allclose(
      run(*args), exact(X, schedules.linear()(0.5), guided_mean(3.)).x0, atol=1e-5)


def test_distilled():
  """One branch, told the scale."""
  seen = []
  def network(x, level, cond):
    seen.append(cond['guidance'].shape)
    return exact(x, level, {'mean': cond['mean'] * cond['guidance'][:, None]})
  level = schedules.linear()(0.5)
  for scale in (3.5, jnp.full((BATCH, 1), 3.5), lambda level: 7 * level.t):
    told = guidance.distilled(network, COND, scale)(X, level)
    want = exact(X, level, {'mean': 3.5 * COND['mean']})
    np.testing.assert_allclose(told.x0, want.x0, atol=1e-5)
  assert seen == [(BATCH,)] * 3


# --- variants of cfg ------------------------------------------------------------------------------

WIDE = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, 3, 5)), jnp.float32)
FIELDS = {name: jnp.asarray(np.random.default_rng(seed).normal(size=(BATCH, 3, 5)), jnp.float32)
          for seed, name in enumerate(['good', 'bad'], 2)}


def field(x, level, cond):
  """Any x0 will do where no distribution is asked for."""
  return predictions.invert(cond['x0'], x, level)


GOOD, BAD = {'x0': FIELDS['good']}, {'x0': FIELDS['bad']}


def of_example(a):
  return np.asarray(a, float).reshape(BATCH, -1)


def same_x(told, level, x=WIDE):
  np.testing.assert_allclose(level.alpha * told.x0 + level.sigma * told.eps, x, atol=2e-5)


@pytest.mark.parametrize('of', ['v', 'eps'])
def test_rescale(of):
  """v, or eps, has the conditional one's deviation at phi = 1, that of cfg at 0, between them in
  between."""
  level = schedules.vp()(0.6)
  v = lambda told: of_example(
    told.eps if of == 'eps' else level.alpha * told.eps - level.sigma * told.x0)
  rescaled = jax.jit(lambda phi: guidance.rescale(field, GOOD, BAD, 6., phi, of)(WIDE, level))
  plain, guided = field(WIDE, level, GOOD), guidance.cfg(field, GOOD, BAD, 6.)(WIDE, level)
  assert (v(guided).std(1) > 1.1 * v(plain).std(1)).all()
  direction = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
  for phi in (0., 0.7, 1.):
    told = rescaled(phi)
    want = phi * v(plain).std(1) + (1 - phi) * v(guided).std(1)
    np.testing.assert_allclose(v(told).std(1), want, rtol=1e-5)
    np.testing.assert_allclose(direction(v(told)), direction(v(guided)), atol=1e-5)
    same_x(told, level)


def test_rescale_of_what():
  with pytest.raises(ValueError, match="of='x0' is none of v, eps"):
    guidance.rescale(field, GOOD, BAD, 6., of='x0')


def test_cfg_pp_by_hand(x64):
  """Chung et al. 2024, algorithm 2, in alphas: Tweedie, guided x0, the null branch's noise."""
  schedule = schedules.cosine()
  ts = grids.karras(schedule, STEPS)
  rows = SAMPLERS['ddim'].plan(schedule, ts)
  x = jnp.asarray(X, jnp.float64)
  cond, null = (np.asarray(c['mean'], float) for c in (COND, NULL))
  got = samplers.sample(
      SAMPLERS['ddim'], guidance.cfg_pp(exact, COND, NULL, 0.6), rows, x)
  want = np.array(x)
  for t, s in zip(np.array(ts[:-1]), np.array(ts[1:])):
    (a, b), (a_to, b_to) = ((np.cos(np.pi / 2 * u), np.sin(np.pi / 2 * u)) for u in (t, s))
    noise = [b * (want - a * m) / (a**2 * VAR + b**2) for m in (cond, null)]
    clean = [m + a * VAR * (want - a * m) / (a**2 * VAR + b**2) for m in (cond, null)]
    want = a_to * (clean[1] + 0.6 * (clean[0] - clean[1])) + b_to * noise[1]
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_cfg_pp_is_cfg_of_another_scale():
  """In one step of DDIM: of scale w alpha_s sigma_t / (alpha_s sigma_t - alpha_t sigma_s)."""
  schedule = schedules.cosine()
  ts = jnp.array([0.7, 0.6])
  t, s = schedule(0.7), schedule(0.6)
  scale = float(0.6 * s.alpha * t.sigma / (s.alpha * t.sigma - t.alpha * s.sigma))
  step = lambda denoise: samplers.sample(
      SAMPLERS['ddim'], denoise, SAMPLERS['ddim'].plan(schedule, ts), X)
  np.testing.assert_allclose(
      step(guidance.cfg_pp(exact, COND, NULL, 0.6)), step(guidance.cfg(exact, COND, NULL, scale)),
      atol=1e-5)
  null = guidance.cfg_pp(exact, COND, NULL, 0.)(X, t)
  np.testing.assert_allclose(null.x0, exact(X, t, NULL).x0, atol=1e-6)
  np.testing.assert_allclose(null.eps, exact(X, t, NULL).eps, atol=1e-6)
  whole = guidance.cfg_pp(exact, COND, NULL, 1.)(X, t)
  np.testing.assert_allclose(whole.x0, exact(X, t, COND).x0, atol=1e-6)


@pytest.mark.parametrize('name', ['linear', 'cosine'])
def test_cfg_zero(name):
  """What is pushed along, v_cond - s v_null, is what of v_cond is across v_null."""
  schedule = getattr(schedules, name)()
  level = schedule(0.3)
  slope = {'linear': (-1., 1.), 'cosine': (-np.pi / 2 * level.sigma, np.pi / 2 * level.alpha)}[name]
  v = lambda told: of_example(slope[0] * told.x0 + slope[1] * told.eps)
  told = guidance.cfg_zero(field, schedule, GOOD, BAD, 4.)(WIDE, level)
  good, bad = v(field(WIDE, level, GOOD)), v(field(WIDE, level, BAD))
  push = (v(told) - good) / 3
  assert np.abs((push * bad).sum(1)).max() < 1e-4 * (bad**2).sum(1).max()
  s = ((good - push) * bad).sum(1, keepdims=True) / (bad**2).sum(1, keepdims=True)
  np.testing.assert_allclose(good - push, s * bad, atol=1e-4)  # nothing but v_null is taken off
  for other in (s - 0.01, s + 0.01):
    assert (((good - other * bad)**2).sum(1) > (push**2).sum(1)).all()
  same_x(told, level)


def test_zero_init():
  """One step of 25 in which nothing moves; the second does."""
  schedule = schedules.linear()
  for steps, still in [(25, 1), (50, 2)]:
    rows = SAMPLERS['ddim'].plan(schedule, grids.uniform(schedule, steps))
    denoise = guidance.zero_init(guidance.condition(exact, COND), schedule)
    _, trace = jax.jit(lambda rows, denoise=denoise: samplers.sample(
        SAMPLERS['ddim'], denoise, rows, X, trace=1))(rows)
    moved = np.abs(np.asarray(trace) - np.asarray(X)[None]).max((1, 2))
    assert (moved[:still] < 1e-6).all() and (moved[still:] > 1e-3).all(), (steps, moved)


def told_twice(denoise, level, x=WIDE):
  """What a denoiser that remembers says the first time and the second, of other networks."""
  first, memory = denoise.apply(x, level, denoise.init(x))
  return first, denoise.apply(x, level, memory)[0]


def test_apg():
  level = schedules.linear()(0.5)
  plain = guidance.cfg(field, GOOD, BAD, 4.)(WIDE, level)
  apg = functools.partial(guidance.apg, field, GOOD, BAD, 4.)
  told = told_twice(apg(eta=1., norm=jnp.inf, momentum=0.), level)
  for one in told:  # without any of its three changes it is cfg
    np.testing.assert_allclose(one.x0, plain.x0, atol=1e-4)
    np.testing.assert_allclose(one.eps, plain.eps, atol=1e-4)
  good, change = of_example(GOOD['x0']), of_example(GOOD['x0'] - BAD['x0'])
  push = lambda told: of_example(told.x0) - good
  across, _ = told_twice(apg(eta=0., norm=jnp.inf, momentum=0.), level)
  assert np.abs((push(across) * good).sum(1)).max() < 1e-4
  shadow = (push(across) * change).sum(1)
  np.testing.assert_allclose(shadow, (push(across)**2).sum(1) / 3, rtol=1e-4)
  same_x(across, level)
  lengths = np.linalg.norm(change, axis=1)
  norm = float(np.median(lengths))
  cut, _ = told_twice(apg(eta=1., norm=norm, momentum=0.), level)
  np.testing.assert_allclose(
      np.linalg.norm(push(cut), axis=1), 3 * np.minimum(lengths, norm), rtol=1e-4)
  first, second = told_twice(apg(eta=1., norm=jnp.inf, momentum=-0.5), level)
  np.testing.assert_allclose(push(first), 3 * change, atol=1e-4)
  np.testing.assert_allclose(push(second), 1.5 * change, atol=1e-4)


def test_apg_is_sampled():
  """Its memory goes through the scan; where its scale is 1 the null branch is left out."""
  network = Counted()
  low, high = 0.1, 3.
  scale = guidance.limited(3., low, high)
  out, levels = sampled('ddim', guidance.apg(
      network, COND, NULL, scale, eta=1., norm=1e6, momentum=0.))
  want, _ = sampled('ddim', guidance.cfg(exact, COND, NULL, 3., low, high))
  np.testing.assert_allclose(out, want, atol=1e-4)
  inside = (low <= np.asarray(levels.nsr)) & (np.asarray(levels.nsr) <= high)
  assert sorted(network.batches) == sorted(np.where(inside, 2 * BATCH, BATCH).tolist())


# --- of bound denoisers ---------------------------------------------------------------------------


def counting(cond):
  """A denoiser of that condition which remembers how often it was asked, and tells as fraction."""
  def apply(x, level, asked):
    return exact(x, level, cond)._replace(fraction=jnp.full_like(x, asked)), asked + 1
  return samplers.Denoiser(lambda x: jnp.zeros(()), apply)


def test_autoguidance():
  """Away from a network that believes in another mean; the weak one is asked where it counts."""
  weak = Counted()
  out, levels = sampled('ddim', guidance.autoguide(
      guidance.condition(exact, COND), guidance.condition(weak, NULL), 3.))
  want, _ = sampled('ddim', guidance.condition(exact, guided_mean(3.)))
  np.testing.assert_allclose(out, want, atol=1e-4)
  assert weak.batches == [BATCH] * len(levels.t)
  weak.batches.clear()
  sampled('ddim', guidance.autoguide(
      guidance.condition(exact, COND), guidance.condition(weak, NULL), 1.))
  assert not weak.batches


def test_autoguidance_remembers_twice():
  """Each has its own memory, and the weak one's stays where it is not asked."""
  scale = guidance.limited(3., 0.5, 2.)
  denoise = guidance.autoguide(counting(COND), counting(NULL), scale)
  memory = denoise.init(X)
  for t, weak, mean in [(0.9, 0, 1.), (0.5, 1, 3.), (0.1, 1, 1.)]:
    level = schedules.linear()(t)
    said, memory = denoise.apply(X, level, memory)
    np.testing.assert_allclose(said.x0, exact(X, level, guided_mean(mean)).x0, atol=1e-5)
    assert memory[1] == weak
  assert memory[0] == 3 and (said.fraction == 2).all()  # the strong one's


def test_classifier():
  """Three Gaussian classes: with the gradient of log p(y | x_t) the mixture's is one class's."""
  means = jnp.array([[1., 0.], [-1., 0.5], [0., -2.]])
  schedule = schedules.vp()

  def logits(x, level):  # log p(x_t | class), up to a constant
    total = level.alpha**2 * VAR + level.sigma**2
    return -((x[:, None] - level.alpha * means[None])**2).sum(-1) / total / 2

  def mixture(x, level):
    share = jax.nn.softmax(logits(x, level))
    each = [exact(x, level, {'mean': jnp.broadcast_to(m, x.shape)}).x0 for m in means]
    return sum(share[:, i, None] * x0 for i, x0 in enumerate(each))

  label = jnp.array([0, 1, 2, 0])
  log_prob = lambda x, level: jax.nn.log_softmax(logits(x, level))[jnp.arange(BATCH), label]
  run = jax.jit(lambda x, level, scale: guidance.classifier(mixture, log_prob, scale)(x, level))
  for t in (0.05, 0.3, 0.7):
    level = schedule(t)
    none, told, twice = (run(X, level, scale) for scale in (0., 1., 2.))
    want = exact(X, level, {'mean': means[label]})
    np.testing.assert_allclose(told.x0, want.x0, atol=2e-4)
    np.testing.assert_allclose(told.eps, want.eps, atol=2e-4)
    np.testing.assert_allclose(twice.eps - none.eps, 2 * (told.eps - none.eps), atol=2e-4)
  noise = schedules.linear()(1.)  # alpha = 0
  told = run(X, noise, 1.)
  np.testing.assert_allclose(told.x0, mixture(X, noise), atol=1e-6)


def test_thresholds():
  level = schedules.linear()(0.5)
  ramp = jnp.linspace(-0.5, 2., 501)[None] * jnp.array([[1.], [0.25]])
  x = jnp.ones_like(ramp)
  denoise = lambda x, level: ramp
  told = guidance.threshold(denoise)(x, level)
  np.testing.assert_array_equal(told.x0, np.clip(ramp, -1, 1))
  same_x(told, level, x)
  # Of 1001 values from -2 to 2, the 0.99th quantile of |.| lies at 1.98; of the tenth of them
  # within the bound nothing is changed.
  ramp = jnp.linspace(-2., 2., 1001)[None] * jnp.array([[1.], [0.1]])
  x = jnp.ones_like(ramp)
  told = guidance.dynamic_threshold(denoise, 0.99)(x, level)
  np.testing.assert_allclose(told.x0[0], np.clip(ramp[0] / 1.98, -1, 1), atol=2e-5)
  np.testing.assert_allclose(told.x0[1], ramp[1], atol=1e-6)
  same_x(told, level, x)


# --- all of them ----------------------------------------------------------------------------------

LINEAR = schedules.linear()
PART = guidance.limited(3., 0.1, 3.)
KINDS = dict(
    cfg=lambda d: guidance.cfg(d, COND, NULL, 3., 0.1, 3.),
    compose=lambda d: guidance.compose(d, [COND, OTHER], NULL, [PART, 1.5]),
    perturbed=lambda d: guidance.perturbed(
        d, COND, NULL, jnp.array([1., 0.]), [3., PART]),
    distilled=lambda d: guidance.distilled(d, COND, 3.),
    rescale=lambda d: guidance.rescale(d, COND, NULL, PART),
    cfg_pp=lambda d: guidance.cfg_pp(d, COND, NULL, 0.5),
    cfg_zero=lambda d: guidance.cfg_zero(d, LINEAR, COND, NULL, PART),
    zero_init=lambda d: guidance.zero_init(guidance.condition(d, COND), LINEAR),
    apg=lambda d: guidance.apg(d, COND, NULL, PART),
    autoguide=lambda d: guidance.autoguide(
        guidance.condition(d, COND), guidance.condition(d, NULL), PART),
    classifier=lambda d: guidance.classifier(
        guidance.condition(d, COND), lambda x, level: -(x**2).sum(1)),
    threshold=lambda d: guidance.threshold(guidance.apg(d, COND, NULL, 3.)),
    dynamic=lambda d: guidance.dynamic_threshold(guidance.rescale(d, COND, NULL, 3.)))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float64'])
@pytest.mark.parametrize('kind', KINDS)
def test_dtype_and_fraction(kind, dtype, x64):
  """The network's dtype, at a level an example; the fraction is the conditional branch's."""
  def network(x, level, cond):
    said = exact(x, level, cond)._replace(fraction=cond['mean'])
    return jax.tree.map(lambda a: a.astype(dtype), said)
  denoise = samplers.lift(KINDS[kind](network))
  level = LINEAR(jnp.array([0.05, 0.5, 0.8, 1.], jnp.float32)[:, None])
  told, memory = jax.jit(denoise.apply)(X.astype(dtype), level, denoise.init(X.astype(dtype)))
  assert {a.dtype for a in told} == {jnp.dtype(dtype)}
  assert all(np.isfinite(np.asarray(a, float)).all() for a in told)
  np.testing.assert_array_equal(told.fraction, COND['mean'].astype(dtype))
  before = jax.eval_shape(denoise.init, X.astype(dtype))
  assert jax.tree.map(lambda a: a.dtype, memory) == jax.tree.map(lambda a: a.dtype, before)
