"""Predictions against the papers' own formulas for their targets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import predictions
from diffax import schedules
from test_schedules import MEMBERS

SCHEDULES = ('linear', 'cosine', 'vp', 've')
ENDS = (*SCHEDULES, 'trigflow', 'zero_snr_of_table', 'shift')
PREDICTIONS = ('x0', 'eps', 'score', 'v', 'velocity', 'edm', 'trigflow')
NO_X0 = ('eps', 'score')  # without signal


def make(prediction, schedule):
  return getattr(predictions, prediction)(schedule)


def karras(x, sigma, data=0.5):
  """c_skip, c_out, c_in, c_noise of Karras et al. 2022, table 1, last column."""
  c_skip = data**2 / (sigma**2 + data**2)
  c_out = sigma * data / np.sqrt(data**2 + sigma**2)
  return c_skip, c_out, 1 / np.sqrt(sigma**2 + data**2), np.log(sigma) / 4


def trigflow(level, x0, x, data=0.5):
  """F where cos(t) x - sin(t) data F is x0, x scaled to the data's deviation: Lu & Song 2024."""
  angle = np.arctan2(level.sigma, data * level.alpha)
  x = data * x / np.sqrt(data**2 * level.alpha**2 + level.sigma**2)
  return (np.cos(angle) * x - x0) / (data * np.sin(angle))


def papers(levels, own, x0, eps):
  """What each network is trained to say, in its paper's words; the velocity as a difference."""
  before, level, after = levels
  at = lambda level: level.alpha * x0 + level.sigma * eps
  x, passed = at(level), own[1] - own[0]
  c_skip, c_out, _, _ = karras(x / level.alpha, level.nsr)  # EDM knows alpha = 1 alone
  return x, dict(
      x0=x0, eps=eps, score=-eps / level.sigma, v=level.alpha * eps - level.sigma * x0,
      velocity=(at(after) - at(before)) / passed, edm=(x0 - c_skip * x / level.alpha) / c_out,
      trigflow=trigflow(level, x0, x))


@jax.jit  # the rows are its data: one program for all schedules
def convert(level, rows, x, said, error):
  made = {
      p: predictions.Prediction(lambda _, row=row: row, None, None) for p, row in rows.items()}
  told = {p: predictions.solve(made[p], said[p], x, level) for p in made}
  wrong = {p: predictions.solve(made[p], said[p] + error, x, level).x0 for p in made}
  ratio = {p: predictions.det(made[p], level) / level.sigma for p in made}
  return told, wrong, ratio, {
      (p, q): predictions.convert(made[p], made[q], said[p], x, level)
      for p, q in itertools.product(made, made)}


@pytest.mark.parametrize('name', MEMBERS)
def test_every_prediction_to_every_other(name, x64):
  """From the output of p at x to x0 and eps, and to what q should have said; the squared error of
  p is (det / sigma)^2 times that of x0."""
  schedule = MEMBERS[name]
  t = np.geomspace(schedule.t_min * 1.01, schedule.t_max * 0.9903, 7)[:, None]  # no table's time
  x0, eps, error = np.random.default_rng(0).normal(size=(3, 7, 3))
  def rows(t):
    near = [t * (1 - 1e-5), t, t * (1 + 1e-5)]
    return [schedule(s) for s in near], [schedule.own(s) for s in (near[0], near[2])], {
        p: make(p, schedule).row(schedule(t)) for p in PREDICTIONS}
  levels, own, rows = jax.tree.map(np.asarray, jax.jit(rows)(t))
  x, said = papers(levels, own, x0, eps)
  told, wrong, ratio, converted = convert(levels[1], rows, x, said, error)
  for p in PREDICTIONS:
    np.testing.assert_allclose(told[p].x0, x0, rtol=1e-6, atol=1e-6, err_msg=p)
    np.testing.assert_allclose(told[p].eps, eps, rtol=1e-6, atol=1e-6, err_msg=p)
    np.testing.assert_allclose((wrong[p] - told[p].x0)**2 * ratio[p]**2, error**2, rtol=1e-5)
  for (p, q), out in converted.items():
    scale = np.abs(said[q]).max()
    np.testing.assert_allclose(out, said[q], atol=1e-6 * scale, rtol=1e-6, err_msg=f'{p} to {q}')


@pytest.mark.parametrize('name', ENDS)
def test_ends(name):
  """At clean data and at pure noise, in float32: the truth where there is one to tell, else 0."""
  schedule = MEMBERS[name]
  x0, eps = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)

  def ends(t):
    level = schedule(t)
    x = level.alpha * x0 + level.sigma * eps
    def there_and_back(prediction):
      out = predictions.target(prediction, x0, eps, level)
      told = lambda out, x: predictions.solve(prediction, out, x, level)
      total = lambda out, x: sum(told(out, x)[i].sum() for i in (0, 1))
      return told(out, x), jax.grad(total, (0, 1))(out, x)
    return {p: there_and_back(make(p, schedule)) for p in PREDICTIONS}

  for t in (jnp.zeros(()), jnp.asarray(schedule.t_max, float)):
    for p, (told, gradient) in jax.jit(ends)(t).items():
      assert np.isfinite(gradient).all(), (p, t)
      silent_x0 = t and p in NO_X0 and name not in ('vp', 've')
      silent_eps = not t and p == 'x0'
      rounding = 2e-7 * max(1., 80. if name == 've' and t else 1.) * 80
      np.testing.assert_allclose(told.x0, 0 * x0 if silent_x0 else x0, atol=rounding, err_msg=p)
      np.testing.assert_allclose(told.eps, 0 * eps if silent_eps else eps, atol=1e-5, err_msg=p)


@pytest.mark.parametrize('name', ENDS)
def test_gradients(name):
  """Of what is told, in time too: a learned schedule and likelihoods go through `solve`."""
  schedule = MEMBERS[name]
  ts = jnp.geomspace(schedule.t_min, schedule.t_max * 0.999, 5)
  def total(t, out, x):
    told = [predictions.solve(make(p, schedule), out, x, schedule(t)) for p in PREDICTIONS]
    return sum((e.x0**2 + e.eps**2).sum() for e in told)
  gradients = jax.jit(jax.vmap(jax.grad(total, (0, 1, 2)), (0, None, None)))(
      ts, jnp.ones(3), jnp.linspace(-1., 1., 3))
  assert all(np.isfinite(g).all() for g in gradients)


def test_edm_is_karras():
  """D(x) = c_skip x + c_out F(c_in x, c_noise)."""
  schedule = schedules.ve()
  prediction = predictions.edm(schedule)
  sigma = np.geomspace(0.002, 80, 9)[:, None]
  x, out = np.random.default_rng(0).normal(size=(2, 9, 3)) * np.array([sigma, 1 + 0 * sigma])
  c_skip, c_out, c_in, c_noise = karras(x, sigma)
  level = schedule(jnp.asarray(sigma, jnp.float32))
  told = predictions.solve(prediction, out.astype(np.float32), x.astype(np.float32), level)
  np.testing.assert_allclose(told.x0, c_skip * x + c_out * out, atol=1e-5)
  np.testing.assert_allclose(prediction.c_in(level), c_in, rtol=1e-6)
  np.testing.assert_allclose(prediction.clock(level), c_noise, rtol=1e-5, atol=1e-6)


def test_what_a_network_is_told():
  """Unit variance in, for unit data; the time as 1000 t, as the schedule says, or as EDM does."""
  for name in SCHEDULES:
    schedule = getattr(schedules, name)()
    level = schedule(jnp.float32(0.3))
    variance = level.alpha**2 + level.sigma**2
    for p in ('x0', 'eps', 'v'):
      prediction = make(p, schedule)
      np.testing.assert_allclose(prediction.c_in(level)**2 * variance, 1., rtol=1e-6)
      time = np.log(0.3) / 4 if name == 've' else 300.
      np.testing.assert_allclose(prediction.clock(level), time, rtol=1e-6)
    assert make('velocity', schedule).c_in(level) == 1
    np.testing.assert_allclose(make('edm', schedule).clock(level), np.log(level.nsr) / 4, rtol=1e-5)


def test_trigflow_is_its_papers():
  """On its own schedule, for data of deviation 1, F is v and is told the angle; elsewhere that of
  the same ratio of noise to data, pi / 2 in pure noise."""
  schedule = schedules.trigflow()
  level = schedule(jnp.linspace(0.1, 1.5, 7))
  prediction = predictions.trigflow(schedule, sigma_data=1.)
  np.testing.assert_allclose(prediction.clock(level), level.t, rtol=1e-6)
  np.testing.assert_allclose(
      prediction.row(level), predictions.v(schedule).row(level), rtol=1e-5, atol=1e-7)
  linear = predictions.trigflow(schedules.linear(), sigma_data=0.5, time_scale=10.)
  np.testing.assert_allclose(
      linear.clock(schedules.linear()(jnp.array([1 / 3, 1.]))), [5 * np.pi / 2, 5 * np.pi],
      rtol=1e-6)


def test_a_shift_leaves_network_and_target_as_they_were():
  """Of shifted straight lines: eps - x0, told 1000 sigma, as without the shift at that sigma."""
  linear = schedules.linear()
  shifted = schedules.shift(schedules.shift(linear, 2.), 1.5)
  level = shifted(jnp.linspace(0.01, 1., 9))
  prediction = predictions.velocity(shifted)
  np.testing.assert_allclose(prediction.row(level), [[-1.] * 9, [1.] * 9], rtol=1e-5)
  np.testing.assert_allclose(prediction.clock(level), 1000 * level.sigma, rtol=1e-6)
  same = linear(level.sigma)
  np.testing.assert_allclose(
      predictions.velocity(linear).clock(same), prediction.clock(level), rtol=1e-6)
  table = MEMBERS['scaled_linear']
  told = predictions.eps(schedules.shift(table)).clock(schedules.shift(table)(0.5))
  np.testing.assert_allclose(told, 749., rtol=1e-6)


@pytest.mark.parametrize('of', ['eps', 'v', 'x0'])
def test_learned_range(of):
  """The first half of the channels is solved as ever; -1, 0, 1 in the second are 0, 1/2, 1."""
  schedule = MEMBERS['linear_table']
  plain = make(of, schedule)
  prediction = predictions.learned_range(schedule, plain)
  assert (plain.outputs, prediction.outputs) == (1, 2)
  x, out = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)
  said = np.broadcast_to(np.float32([-1., 0., 1.]), out.shape)
  both, level = jnp.concatenate([out, said], -1), schedule(0.4)
  first, fraction = predictions.split(prediction, both)
  np.testing.assert_array_equal(first, out)
  told, alone = (predictions.solve(p, o, x, level) for p, o in ((prediction, both), (plain, out)))
  np.testing.assert_array_equal(told.x0, alone.x0)
  np.testing.assert_array_equal(told.eps, alone.eps)
  for got in (fraction, told.fraction):
    np.testing.assert_array_equal(got, np.broadcast_to([0., 0.5, 1.], out.shape))
  assert alone.fraction is None and predictions.split(plain, out)[1] is None
  np.testing.assert_allclose(
      predictions.convert(prediction, plain, both, x, level), out, rtol=1e-3, atol=1e-4)
  for wrong, said in ((plain, both), (prediction, out)):
    with pytest.raises(ValueError, match=r'\(4, 5, 3\).*channels'):
      predictions.solve(wrong, said, x, level)


def test_check():
  """The noise and the score say nothing of x0 where no data are left; a velocity has no target
  where a schedule ends in a root; all else is well, also where little is left."""
  for name, schedule in MEMBERS.items():
    silent = float(schedule(schedule.t_max).alpha) == 0
    for p in PREDICTIONS:
      prediction = predictions.learned_range(schedule, make(p, schedule))
      if p in NO_X0 and silent:
        with pytest.raises(ValueError, match=f"'{p}'.*nothing of x0 at t=.*alpha=0:.*use v"):
          predictions.check(prediction, schedule, p)
      elif p == 'velocity' and name in ('sigmoid', 'laplace'):
        with pytest.raises(ValueError, match="'velocity' has no finite target at t=1"):
          predictions.check(prediction, schedule, p)
        part = schedules.truncate(schedule, schedule.t_min, 0.999)
        predictions.check(make(p, part), part, p)
      else:
        predictions.check(prediction, schedule, p)


def test_invert():
  """What an x0 amounts to; clean data tell no noise. A plain x0 and an Estimate are taken alike."""
  x0, eps = jnp.array([[1., -2.], [0.5, 3.]]), jnp.array([[0.3, 0.1], [-1., 2.]])
  for t in (0., 0.4, 1.):
    level = schedules.linear()(t)
    x = level.alpha * x0 + level.sigma * eps
    told = predictions.invert(x0, x, level)
    np.testing.assert_allclose(told.eps, eps if t else 0 * eps, rtol=1e-6)
    assert predictions.estimate(told, x, level) is told
    np.testing.assert_array_equal(predictions.estimate(x0, x, level).eps, told.eps)
