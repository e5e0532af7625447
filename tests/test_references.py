"""Samplers and grids against those of k-diffusion and diffusers, recorded by golden/samplers.py.

The same start, levels, noise and exact network go into ours; what comes out is the same, in
float64 to 1e-10 of its largest value and in float32 to 1e-5. SAMPLERS are those that are the same
as they are. DIFFERS are those that are not: there ours is edited, in as few lines as say what
differs, until it is the same too; which is nearer to the closed form is in the table, and measured.
ABSENT have no counterpart. Programs of some milliseconds each, they run op by op, not compiled.
"""

import contextlib
import json
import pathlib
import re
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffax import grids
from diffax import predictions
from diffax import samplers
from diffax import schedules
from diffax import tableau
import gaussians

with np.load(pathlib.Path(__file__).with_name('golden') / 'samplers.npz') as file:
  RECORDED = dict(file)
INDEX = json.loads(str(RECORDED['index']))
NUMBER = {case['name']: number for number, case in enumerate(INDEX['cases'])}
TABLE = RECORDED['grid/betas scaled_linear']
CHURN = dict(s_churn=3., s_tmin=0.05, s_tmax=50., s_noise=1.003)
MIXTURE = gaussians.mixture()


def method(name):
  """A case's name without its grid, its number of steps and the values of the churn."""
  name = re.sub('s_churn.* s_noise [0-9.]+', 'churn', name)
  return re.sub(' on [a-z]+$' if name.startswith('k ') else ' [0-9]+$', '', name)


# --- edits: what makes ours theirs ----------------------------------------------------------------


def edited(sampler, edit):
  """The sampler with `edit(rows, steps) -> rows` after its plan."""
  def plan(schedule, ts, clean=True):
    return edit(sampler.plan(schedule, ts, clean), tableau.walk(schedule, ts))
  return sampler._replace(plan=plan)


def padded(rows):
  """Rows of several plans with as many weights each."""
  def fill(field):
    size = max(len(row[field]) for row in rows)
    return [row[field] + (0 * row[field][0],) * (size - len(row[field])) for row in rows]
  filled = {field: fill(field) for field in ('x0', 'eps', 'past', 'fix') if field in rows[0]}
  return [row | {field: of[k] for field, of in filled.items()} for k, row in enumerate(rows)]


def joined(*parts):
  """A sampler of several, (sampler, slice of the grid) each, the first remembering the most."""
  def plan(schedule, ts, clean=True):
    some = [(sampler, ts[part]) for sampler, part in parts if len(ts[part]) > 1]
    rows = padded([sampler.plan(schedule, ts, False) for sampler, ts in some])
    return jax.tree.map(lambda *a: np.concatenate(a), *rows)
  return parts[0][0]._replace(plan=plan)


def strided(sampler, stride, last):
  """Steps of `stride` of the grid's, then `last` on what is left of it, one step at the least."""
  def plan(schedule, ts, clean=True):
    whole = (len(ts) - 2) // stride * stride
    parts = (sampler, slice(0, whole + 1, stride)), (last, slice(whole, None))
    return joined(*parts).plan(schedule, ts, clean)
  return sampler._replace(plan=plan)


def mixed(members, orders, fixed=None):
  """Each step from the plan of its order: members[k] is of order k + 1, orders(n) the steps'.

  fixed(n): the orders of the correctors, each in the row after its step.
  """
  def plan(schedule, ts, clean=True):
    rows = padded([sampler.plan(schedule, ts, clean) for sampler in members])
    n = len(ts) - 1
    def choose(order):
      return lambda *a: np.stack(a)[np.array(order) - 1, np.arange(n)]
    out = jax.tree.map(choose(orders(n)), *rows)
    if 'fix' in out:
      late = [1, *(fixed or orders)(n)[:-1]]
      out['fix'] = jax.tree.map(choose(late), *[row['fix'] for row in rows])
    return out
  return members[-1]._replace(plan=plan)


def falling(top):
  """Orders that rise from 1 and fall to 1 again: UniPC's and SA-Solver's."""
  return lambda n: [min(top, i + 1, n - i) for i in range(n)]


def falling_below_15(top):
  """Orders that rise from 1, and fall to 1 again where there are fewer than 15 steps."""
  return lambda n: falling(top)(n) if n < 15 else [min(top, i + 1) for i in range(n)]


def halved(sampler, c=1., sign=1):
  """A third-order method on x0 (c = 1; 2 for the SDE) or noise (-1), half its second difference.

  The parabola's u^2 term is the divided difference d of three estimates, its integral
  int c e^(-c (h - u)) u^2 du = h^2 - 2 h / c + 2 (1 - e^(-c h)) / c^2; sign: of h^2 in the half.
  """
  field, scale = ('eps', 'sigma') if c < 0 else ('x0', 'alpha')
  def edit(rows, steps):
    h, a, b = steps.h, tableau.before(steps.h), tableau.before(steps.h, 2)
    three = (steps.age >= 2) & jnp.isfinite(h)
    h = jnp.where(three, h, 0.)
    whole = h**2 - 2 * h / c - 2 * jnp.expm1(-c * h) / c**2
    share = getattr(steps.s, scale) * (whole + (1 - sign) * h**2) / 2
    d = 1 / (a * (a + b)), -1 / (a * b), 1 / (b * (a + b))
    return rows | {field: tuple(w - share * one for w, one in zip(rows[field], d))}
  return edited(sampler, edit)


def midpoint_eps():
  """DPM-Solver-2 as a multistep method whose slope counts as at the middle of the step."""
  def edit(rows, steps):
    h = steps.h
    w = jnp.where(steps.age < 1, 0., steps.s.sigma * jnp.expm1(h) * h / tableau.before(h) / 2)
    return rows | dict(eps=(steps.s.sigma - w, w))
  return edited(samplers.deis(2, 'lam'), edit)


def midpoint_inside(sampler, c):
  """Single steps of order 3, on x0 (c = 1) or noise (-1), their second inner point (r = 2/3) found
  by the rule of the middle."""
  field, scale = ('eps', 'sigma') if c < 0 else ('x0', 'alpha')
  def edit(rows, steps):
    w = -jnp.expm1(-2 / 3 * c * steps.h) * getattr(rows['level'], scale)[2::3]
    one, two, three = rows[field]
    total = (one + two)[1::3]
    return rows | {field: (one.at[1::3].set(w), two.at[1::3].set(total - w), three)}
  return edited(sampler, edit)


def sa_of_order_2(tau):
  """SA-Solver of order 2 with c h^2 / 2 for the slope's weight, c h / 2 for the corrector's."""
  c = 1 + tau**2
  def edit(rows, steps):
    scale, h = c * steps.s.alpha * steps.h, steps.h
    past = jnp.where(steps.age < 1, 0., -scale * h / tableau.before(h) / 2)
    fix = tableau.before(scale / 2)
    return rows | dict(past=(sum(rows['past']) - past, past), fix=(fix, sum(rows['fix']) - fix))
  return edited(samplers.sa_solver(2, 1, tau, 0., jnp.inf), edit)


def sa(order, tau):
  """The library's: its corrector k is of order k, ours of order k + 1; see `sa_of_order_2`."""
  one = samplers.sa_solver(1, 1, tau, 0., jnp.inf)
  if order == 1:  # its corrector takes the new estimate for the whole step
    return edited(one, lambda rows, steps: rows | dict(
        fix=(sum(rows['fix']), jnp.zeros_like(rows['hold']))))
  members = [one, sa_of_order_2(tau), samplers.sa_solver(3, 2, tau, 0., jnp.inf)][:order]
  return mixed(members, falling(order), lambda n: [min(order, i + 2) for i in range(n)])


def churned_after():
  """Noise is added after the network was asked: what it says belongs to the level before."""
  def plan(schedule, ts, clean=True):
    steps = tableau.walk(schedule, ts)
    high = tableau.churned(schedule, ts, **CHURN)
    eps = steps.t.sigma + steps.s.sigma - high.t.sigma
    return tableau.rows(steps, steps.t, (steps.s.alpha,), (eps,), high.lift)
  return tableau.linear(plan)


def noise_at_the_end(sampler, small, large=None):
  """Noise of that deviation in the last step too: of 1e-10, or of sigma."""
  def edit(rows, steps):
    last = lambda name, size: rows[name].at[-1].set(size or steps.t.sigma[-1])
    return rows | dict(fresh=last('fresh', small)) | (
        dict(large=last('large', None)) if 'large' in rows else {})
  return edited(sampler, edit)


def no_data_at_first(rows, steps):
  """From alpha = 0 it steps as if x0 were 0."""
  return rows | dict(x0=(rows['x0'][0].at[0].set(0.), *rows['x0'][1:]))


# --- methods --------------------------------------------------------------------------------------


class Difference(NamedTuple):
  """Ours, theirs (ours edited), what differs, and which is nearer to the closed form.

  nearer: a word for each case, in the order of recording (three grids, or 10 and 20 steps): 'ours'
  or 'theirs' is nearer to the exact flow, or where noise is drawn to the exact variance of Gaussian
  data; 'equal' within 1e-6; 'same' where nothing differs.
  """

  ours: tableau.Sampler
  theirs: tableau.Sampler
  what: str
  nearer: str


SAMPLERS = {
  'k euler': samplers.euler(),
  'k euler churn': samplers.euler(**CHURN),
  'k euler_ancestral': samplers.euler_ancestral(),
  'k euler_ancestral eta 0.5': samplers.euler_ancestral(0.5),
  'k heun': samplers.heun(),
  'k heun churn': samplers.heun(**CHURN),
  'k dpm_2': samplers.dpm2(),
  'k dpm_2 churn': samplers.dpm2(**CHURN),
  'k dpm_2_ancestral': samplers.dpm2_ancestral(),
  'k dpm_fast n 10': joined(
    (samplers.dpm_solver(3), slice(4)), (samplers.dpm_solver(1), slice(3, 5))),
  'k dpm_fast n 11': joined(
    (samplers.dpm_solver(3), slice(4)), (samplers.dpm_solver(2), slice(3, 5))),
  'k dpm_fast n 12': joined(
    (samplers.dpm_solver(3), slice(4)), (samplers.dpm_solver(2), slice(3, 5)),
    (samplers.dpm_solver(1), slice(4, 6))),
  'k dpm_adaptive': samplers.dpm_solver(3),  # on the steps it accepted
  'k dpm_adaptive order 2 rtol 0.02': samplers.dpm_solver(2),
  'k dpmpp_2s_ancestral eta 0.0': samplers.dpmpp_2s(),
  'k dpmpp_2s_ancestral eta 1.0': samplers.dpmpp_2s(1.),
  'k dpmpp_sde eta 0.0': samplers.dpmpp_sde(0.),
  'k dpmpp_sde eta 1.0': samplers.dpmpp_sde(),
  'k dpmpp_2m': samplers.dpmpp_2m(),
  'k dpmpp_2m_sde eta 1.0 solver_type midpoint': samplers.dpmpp_2m_sde(),
  'k dpmpp_2m_sde eta 1.0 solver_type heun': samplers.dpmpp_2m_sde(1., 'heun'),
  'k dpmpp_2m_sde eta 0.0 solver_type heun': samplers.dpmpp_2m_sde(0., 'heun'),
  'd ddim eta 0.5': samplers.ddim(0.5),
  'd ddim eta 1.0': samplers.ddim(1.),
  'd ddim trailing': samplers.ddim(0.5),
  'k lms': samplers.lms(),
  'k lms order 2': samplers.lms(2),
  'd lms 2': samplers.lms(2),
  'd lms 4': samplers.lms(),
  'd pndm plms': samplers.plms(),
  'd pndm': samplers.pndm(),
  'd lcm': samplers.lcm(),
  'd tcd eta 0.0': samplers.tcd(0.),
  'd deis 1': samplers.deis(1, 'lam'),
  'd dpmsolver 1m midpoint': samplers.dpm_solver(1),
  'd dpmsolver 1s midpoint': samplers.dpm_solver(1),
  'd dpmsolver++ 2m heun': samplers.res_multistep(),
  'd sde-dpmsolver++ 1m midpoint': samplers.ddim(1.),
  'd sde-dpmsolver++ 2m heun': samplers.dpmpp_2m_sde(1., 'heun'),
  'd dpmsolver 2s midpoint exponential': strided(
    samplers.dpm_solver(2), 2, samplers.dpm_solver(1)),
  'd dpmsolver++ 2s midpoint exponential': strided(samplers.dpmpp_2s(), 2, samplers.ddim()),
  'd dpmsolver++ 2s heun exponential': strided(samplers.res(2), 2, samplers.ddim()),
  'd dpmsolver sde': samplers.dpmpp_sde(),
  'd unipc bh1 1 to sigma_min': samplers.unipc(1, 'bh1'),
  'd unipc bh2 1 to sigma_min': samplers.unipc(1),
  'd unipc bh2 1 to zero': samplers.unipc(1),
  'd unipc bh2 2 to zero': samplers.unipc(2),
  'd unipc bh2 2 flow': samplers.unipc(2),
  'd euler': samplers.euler(),
  'd euler karras': samplers.euler(),
  'd euler ancestral': samplers.euler_ancestral(),
  'd heun': samplers.heun(),
  'd dpm 2': samplers.dpm2(),
  'd dpm 2 ancestral': samplers.dpm2_ancestral(),
  'd edm euler': samplers.euler(),
  'd edm sde-dpmsolver++ 1m': samplers.ddim(1.),
  'd flow euler stochastic': samplers.consistency(),
  **dict.fromkeys((
    'd ddim eta 0.0', 'd ddim ending above 0', 'd ddim zero snr', 'd dpmsolver++ 1m midpoint',
    'd dpmsolver++ 1s midpoint', 'd edm dpmsolver++ 1m'), samplers.ddim()),
  **dict.fromkeys((
    'd dpmsolver++ 2m midpoint', 'd dpmsolver++ 2m karras', 'd dpmsolver++ 2m flow',
    'd edm dpmsolver++ 2m'), samplers.dpmpp_2m()),
  **dict.fromkeys((
    'd sde-dpmsolver++ 2m midpoint', 'd sde-dpmsolver++ 2m flow', 'd edm sde-dpmsolver++ 2m'),
    samplers.dpmpp_2m_sde()),
  **dict.fromkeys((
    'd flow euler shift 1.0', 'd flow euler shift 3.0', 'd flow euler dynamic shift'),
    samplers.flow_euler()),
  **dict.fromkeys(('d flow heun shift 1.0', 'd flow heun shift 3.0'), samplers.flow_heun()),
}

HALVED = "the parabola's u^2 term counts half: of order 2, where ours is of order 3"
SIGN = 'the same, and h^2 / 2 within it has the wrong sign: of order 1 even without noise'
MIDDLE = 'the second inner point is found by the rule of the middle'
SLOPE = "the slope's weight is that of the middle of the step, not the integral's"
FALLS = 'the last steps are of lower order, down to 1'
FALLS_SHORT = 'the last steps are of lower order where there are fewer than 15'
CORRECTOR = 'order 2 has c h^2 / 2 for an integral, corrector k is of order k, and orders fall'
NOISE = 'noise is added in the step to clean data too, of deviation 1e-10 where beta~ is 0'
INDICES = 'times are whole indices, (1 - gamma) s rounded down, and 0 is the first level'
NO_DATA = 'where alpha = 0 the first step takes x0 for 0, whatever the network says'
AFTER = 'noise is added after the network is asked: what it says belongs to the level before'


def third(one, two, three, c=1., sign=1):
  return mixed([one, two, halved(three, c, sign)], falling_below_15(3))


def deis(order):
  return samplers.deis(order, 'lam')


def deis_falling(order, nearer):
  return Difference(
      deis(order), mixed([deis(k + 1) for k in range(order)], falling_below_15(order)),
      FALLS_SHORT, nearer)


def unipc_falling(order, variant, nearer):
  rising = [samplers.unipc(k + 1, variant) for k in range(order)]
  return Difference(rising[-1], mixed(rising, falling(order)), FALLS, nearer)


def sa_modified(order, tau, nearer='theirs theirs'):
  ours = samplers.sa_solver(order, max(order - 1, 1), tau, 0., jnp.inf)
  return Difference(ours, sa(order, tau), CORRECTOR, nearer)


DIFFERS = {
  'k dpmpp_3m_sde eta 0.0': Difference(
    samplers.dpmpp_3m(), halved(samplers.dpmpp_3m()), HALVED, 'ours ours ours'),
  'k dpmpp_3m_sde eta 1.0': Difference(
    samplers.dpmpp_3m_sde(), halved(samplers.dpmpp_3m_sde(), 2.), HALVED, 'theirs theirs theirs'),
  'd dpmsolver++ 3m midpoint': Difference(
    samplers.dpmpp_3m(), third(samplers.ddim(), samplers.dpmpp_2m(), samplers.dpmpp_3m()),
    HALVED, 'theirs ours'),
  'd edm dpmsolver++ 3m': Difference(
    samplers.dpmpp_3m(), third(samplers.ddim(), samplers.dpmpp_2m(), samplers.dpmpp_3m()),
    HALVED, 'ours theirs'),
  'd sde-dpmsolver++ 3m midpoint': Difference(
    samplers.dpmpp_3m_sde(),
    third(samplers.ddim(1.), samplers.dpmpp_2m_sde(), samplers.dpmpp_3m_sde(), 2., -1),
    SIGN, 'ours ours'),
  'd dpmsolver 3m midpoint': Difference(
    deis(3), third(deis(1), midpoint_eps(), deis(3), -1.), HALVED, 'theirs theirs'),
  'd dpmsolver 2m midpoint': Difference(
    deis(2), mixed([deis(1), midpoint_eps()], falling_below_15(2)), SLOPE, 'theirs ours'),
  'd dpmsolver 3s midpoint exponential': Difference(
    joined((samplers.dpm_solver(3), slice(None, None, 3))),
    joined((midpoint_inside(samplers.dpm_solver(3), -1), slice(None, None, 3))), MIDDLE, 'ours'),
  'd dpmsolver++ 3s midpoint exponential': Difference(
    strided(samplers.dpmpp_3s(), 3, samplers.ddim()),
    strided(midpoint_inside(samplers.dpmpp_3s(), 1), 3, samplers.ddim()), MIDDLE, 'theirs ours'),
  'd dpmsolver 2m heun': deis_falling(2, 'theirs same'),
  'd deis 2': deis_falling(2, 'theirs same'),
  'd deis 3': deis_falling(3, 'theirs same'),
  'd unipc bh1 2 to sigma_min': unipc_falling(2, 'bh1', 'theirs theirs'),
  'd unipc bh1 3 to sigma_min': unipc_falling(3, 'bh1', 'theirs theirs'),
  'd unipc bh2 2 to sigma_min': unipc_falling(2, 'bh2', 'theirs theirs'),
  'd unipc bh2 3 to sigma_min': unipc_falling(3, 'bh2', 'theirs theirs'),
  'd unipc bh2 3 to zero': unipc_falling(3, 'bh2', 'theirs ours'),
  'd sa 1 tau 1.0': sa_modified(1, 1.),
  'd sa 2 tau 0.0': sa_modified(2, 0.),
  'd sa 2 tau 0.5': sa_modified(2, 0.5),
  'd sa 2 tau 1.0': sa_modified(2, 1.),
  'd sa 3 tau 1.0': sa_modified(3, 1.),
  'd ipndm': Difference(
    samplers.ipndm(), edited(samplers.ipndm(), no_data_at_first), NO_DATA, 'ours ours'),
  'd ddpm fixed_small': Difference(
    samplers.ddpm(), noise_at_the_end(samplers.ddpm(), 1e-10), NOISE, 'equal equal'),
  'd ddpm fixed_large': Difference(
    samplers.ddpm('large'), noise_at_the_end(samplers.ddpm('large'), None), NOISE, 'ours ours'),
  'd ddpm learned_range': Difference(
    samplers.ddpm('learned'), noise_at_the_end(samplers.ddpm('learned'), 1e-10), NOISE,
    'equal equal'),
  'd tcd eta 0.3': Difference(samplers.tcd(0.3), samplers.tcd(0.3), INDICES, 'theirs theirs'),
  'd tcd eta 1.0': Difference(samplers.tcd(1.), samplers.tcd(1.), INDICES, 'theirs theirs'),
  'd euler churn': Difference(samplers.euler(**CHURN), churned_after(), AFTER, 'theirs theirs'),
}

ABSENT = {
  'k dpm_fast n 12 eta 1.0': 'ancestral DPM-Solver of order 3',
  'k dpm_adaptive eta 1.0': 'ancestral DPM-Solver of order 3',
  **dict.fromkeys((
    'd sde-dpmsolver 1m midpoint', 'd sde-dpmsolver 2m midpoint', 'd sde-dpmsolver 2m heun'),
    'the reverse SDE in lambda, of the noise'),
  'd unipc bh2 2 of eps': 'UniPC of the noise',
  **{f'd dpmsolver{form} {kind}': "inner points are the grid's own, wherever they lie"
     for form in ('', '++') for kind in ('2s midpoint', '2s heun', '3s midpoint')},
  'd dpmsolver 2s heun exponential': 'the refined solver of the noise',
}
THEIRS = SAMPLERS | {name: difference.theirs for name, difference in DIFFERS.items()}
COMPARED = [name for name in NUMBER if method(name) in THEIRS]


# --- running ours as theirs was -------------------------------------------------------------------


def setting(name, indices, dtype):
  """The schedule, the times, and whether they end at clean data. indices: times are indices."""
  number = NUMBER[name]
  case = INDEX['cases'][number]
  alpha, sigma = RECORDED['levels'][number, :case['levels']].T
  kind, clean = case['kind'], bool(sigma[-1] == 0)
  if kind in ('k', 've', 'edm'):
    schedule, ts = schedules.ve(), sigma
  elif kind == 'flow':
    schedule, ts = schedules.linear(), sigma
  elif case['call'] in ('PNDMScheduler', 'LCMScheduler', 'TCDScheduler'):  # they go by time
    index = np.abs(TABLE[:, None]**0.5 - alpha).argmin(0)
    schedule, ts = schedules.scaled_linear(), np.where(alpha == 1, 0, (index + 1) / len(TABLE))
    if indices and case['call'] == 'TCDScheduler':
      schedule, ts = whole_indices(), index / len(TABLE)
  else:
    schedule, ts = schedules.trigflow(), np.arctan2(sigma, alpha)
  return schedule, np.asarray(ts, dtype), clean


def whole_indices():
  """The table as it is, t T rounded down to an index of 0 to T - 1."""
  def level(t):
    index = jnp.floor(t * len(TABLE) + 1e-3).astype(int)
    alpha, sigma = jnp.asarray(TABLE**0.5, t.dtype), jnp.asarray((1 - TABLE)**0.5, t.dtype)
    return schedules.Level(t, alpha[index], sigma[index])
  return schedules.Schedule(level, 0., 1.)


exact = jax.jit(lambda x, level: gaussians.estimate(MIXTURE, x, level))


def network(name):
  def denoise(x, level):
    with jax.disable_jit(False):
      said = exact(x, level)
    if 'learned' in name:
      return said._replace(fraction=(1 + jnp.tanh(x)) / 2)
    if 'lcm' in name:  # the boundary scalings are the network's: Luo et al. 2023, eq. 9
      time = 10 * (1000 * level.t - 1)
      return (0.25 * x + time * jnp.sqrt(time**2 + 0.25) * said.x0) / (time**2 + 0.25)
    return said
  return denoise


def noise(name, rows, dtype):
  """The recorded noise: a row's draw 0 is what was drawn after its call, draw 1 before it."""
  number = NUMBER[name]
  table = np.zeros((rows + 2, 2, *RECORDED['noise'].shape[1:]))
  draws = INDEX['cases'][number]['draws']
  for unit, call in zip(RECORDED['noise'], RECORDED['draw_call'][number, :draws].astype(int)):
    table[call - 1, 0] = table[call, 1] = unit
  table = jnp.asarray(table, dtype)
  return lambda keys, shape, dtype: lambda row, draw, span: table[row, draw]


def scan(body, carry, rows):
  """`jax.lax.scan` in Python, of which a row's number is no constant to compile for."""
  rows = jax.tree.map(np.asarray, rows)
  for row in range(len(jax.tree.leaves(rows)[0])):
    carry, _ = body(carry, jax.tree.map(lambda a: jnp.asarray(a[row]), rows))  # noqa: B023
  return carry, None


@pytest.fixture(scope='module', autouse=True)
def hasty():
  """Compile time is all there is to these programs of one operation."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@contextlib.contextmanager
def op_by_op():
  with jax.disable_jit(), mock.patch.object(jax.lax, 'scan', scan):
    yield


def run(name, sampler, dtype, indices=True):
  with op_by_op():
    schedule, ts, clean = setting(name, indices, dtype)
    rows = sampler.plan(schedule, ts, clean)
    calls = max(rows['level'].t.shape[0], INDEX['cases'][NUMBER[name]]['calls'])
    x = jnp.asarray(RECORDED['x'][NUMBER[name]], dtype)
    return np.asarray(samplers.sample(
      sampler, network(name), rows, x, noise=noise(name, calls, dtype)))


def relative(ours, theirs):
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


def exact_end(name):
  """Where the probability flow takes the start."""
  number = NUMBER[name]
  levels = RECORDED['levels'][number, :INDEX['cases'][number]['levels']]
  return gaussians.flow(MIXTURE, RECORDED['x'][number], levels[0], levels[-1])


def variance_error(name, sampler, indices, var=0.09):
  """How far the variance that comes of N(0, var) is from the exact one, relative to it.

  The denoiser being linear, an example is the part of one source of randomness: the first that of
  the start, each other that of one noise.
  """
  with op_by_op():
    schedule, ts, clean = setting(name, indices, jnp.float64)
    rows = sampler.plan(schedule, ts, clean)
    total = lambda level: level.alpha**2 * var + level.sigma**2
    def denoise(x, level):
      x0 = level.alpha * var / total(level) * x
      said = predictions.invert(x0, x, level)
      return said._replace(fraction=jnp.full_like(x, 0.5))
    count = rows['level'].t.shape[0]
    table = jnp.eye(1 + 2 * count)
    x = jnp.sqrt(total(schedule(ts[0]))) * table[0]
    out = samplers.sample(
      sampler, denoise, rows, x,
      noise=lambda keys, shape, dtype: lambda row, draw, span: table[1 + 2 * row + draw])
    end = total(schedule(ts[-1]))
  return abs(float((out**2).sum() / end) - 1)


def error(sampler, steps):
  """Where the flow from lambda = -3 to 3 is missed in equal steps, at its worst."""
  with op_by_op():
    ts = jnp.arctan(jnp.exp(-jnp.linspace(-3., 3., steps + 1)))
    rows = sampler.plan(schedules.trigflow(), ts, False)
    x = gaussians.quantiles()
    ends = [(np.cos(t), np.sin(t)) for t in np.asarray(ts)[[0, -1]]]
    out = samplers.sample(sampler, network('exact'), rows, jnp.asarray(x))
    return np.abs(out - gaussians.flow(MIXTURE, x, *ends)).max()


# --- the comparison -------------------------------------------------------------------------------


def test_every_recording_is_accounted_for():
  kinds = [set(SAMPLERS), set(DIFFERS), set(ABSENT)]
  assert set(map(method, NUMBER)) == set.union(*kinds)
  assert sum(map(len, kinds)) == len(set.union(*kinds))


@pytest.mark.parametrize('name', COMPARED)
def test_float64(name, x64):
  ours = run(name, THEIRS[method(name)], jnp.float64)
  assert relative(ours, RECORDED['out'][NUMBER[name]]) < 1e-10


@pytest.mark.parametrize('name', [n for n in COMPARED if 'adaptive' not in n])
def test_float32(name):
  """Not of dpm_adaptive, whose steps are others in float32."""
  ours = run(name, THEIRS[method(name)], jnp.float32)
  assert ours.dtype == np.float32
  assert relative(ours, RECORDED['out32'][NUMBER[name]]) < 1e-5


@pytest.mark.parametrize('name', [name for name in NUMBER if method(name) in DIFFERS])
def test_difference(name, x64):
  """It is there, and the one that is said to be nearer to the closed form is."""
  difference = DIFFERS[method(name)]
  alike = [other for other in NUMBER if method(other) == method(name)]
  nearer = dict(zip(alike, difference.nearer.split()))[name]
  ours, theirs = run(name, difference.ours, jnp.float64, False), RECORDED['out'][NUMBER[name]]
  if nearer == 'same':
    assert relative(ours, theirs) < 1e-12
    return
  assert relative(ours, theirs) > 1e-10
  if INDEX['cases'][NUMBER[name]]['draws'] and 'tau 0.0' not in name:
    errors = [variance_error(name, difference.ours, False),
              variance_error(name, difference.theirs, True)]
  else:
    errors = [np.abs(out - exact_end(name)).max() for out in (ours, theirs)]
  if nearer == 'equal':
    assert abs(errors[0] / errors[1] - 1) < 1e-6, errors
  else:
    assert nearer == ('ours' if errors[0] < errors[1] else 'theirs'), errors


ORDERS = {  # ours, theirs, their orders on the probability flow
  'dpmpp_3m': (samplers.dpmpp_3m(), halved(samplers.dpmpp_3m()), 3, 2),
  'dpmpp_3m, wrong sign': (samplers.dpmpp_3m(), halved(samplers.dpmpp_3m(), sign=-1), 3, 1),
  'deis 3': (deis(3), halved(deis(3), -1.), 3, 2),
  'deis 2': (deis(2), midpoint_eps(), 2, 2),
  'dpm_solver 3': (samplers.dpm_solver(3), midpoint_inside(samplers.dpm_solver(3), -1), 3, 3),
}


@pytest.mark.parametrize('name', ORDERS)
def test_order_of_what_differs(name, x64):
  *both, ours, theirs = ORDERS[name]
  for sampler, order in zip(both, (ours, theirs)):
    slope = np.log2(error(sampler, 36) / error(sampler, 72))
    assert order - 0.35 < slope < order + 0.35, slope


# --- grids ----------------------------------------------------------------------------------------


def nsr(schedule, grid, *steps):
  with op_by_op():
    return np.asarray(schedule(grid(schedule, *steps)).nsr)


def ratio(levels, recorded):
  """The largest relative difference; of 0 there is none but 0."""
  assert levels.shape == recorded.shape and levels[-1] == recorded[-1] == 0
  return np.abs(levels[:-1] / recorded[:-1] - 1).max()


@pytest.mark.parametrize('name, ends, grid', [
    ('karras', (0.002, 80.), grids.karras),
    ('karras rho 3', (0.03, 15.), lambda schedule, n: grids.karras(schedule, n, rho=3.)),
    ('exponential', (0.02, 20.), grids.log_snr),
    ('polyexponential', (0.02, 20.), lambda schedule, n: grids.polyexponential(schedule, n, 1.7)),
])
def test_grids_of_k_diffusion(name, ends, grid, x64):
  schedule = schedules.ve(*ends)
  assert ratio(nsr(schedule, grid, 10), RECORDED[f'grid/k {name}']) < 1e-12


GRIDS = {
  **dict.fromkeys(
    ('ddim leading', 'euler leading'), lambda schedule, n: grids.leading(schedule, n, offset=1)),
  **dict.fromkeys(('ddim trailing', 'euler trailing', 'dpm trailing'), grids.trailing),
  'ddim linspace': grids.linspace,
  **dict.fromkeys(('euler karras_sigmas', 'dpm karras_sigmas'), grids.karras),
  **dict.fromkeys(('euler exponential_sigmas', 'dpm exponential_sigmas', 'dpm lu'), grids.log_snr),
}


@pytest.mark.parametrize('steps', [10, 30])
@pytest.mark.parametrize('name', GRIDS)
def test_grids_of_diffusers(name, steps, x64):
  schedule = schedules.scaled_linear()
  levels = nsr(schedule, GRIDS[name], steps)
  assert ratio(levels, RECORDED[f'grid/d {name} {steps}'][:, 1]) < 1e-12


def at_indices(index):
  """sigma/alpha of the table's rows, and 0 after them; between rows linear, as diffusers has it."""
  return np.append(np.interp(index, np.arange(len(TABLE)), np.sqrt(1 / TABLE - 1)), 0)


def beta_in_sigma(steps):
  """Quantiles of Beta(0.6, 0.6) between the ends of sigma/alpha; ours are of t / t_max."""
  low, high = at_indices([0, 999])[:2]
  share = scipy.stats.beta.ppf(np.linspace(1, 0, steps), 0.6, 0.6)
  return np.append(low + (high - low) * share, 0)


@pytest.mark.parametrize('steps', [10, 30])
@pytest.mark.parametrize('name, ours, theirs', [
    # the index range is parted in steps + 1, of which the noisiest is left out
    ('dpm leading', lambda schedule, n: grids.leading(schedule, n, offset=1),
     lambda n: at_indices(1000 // (n + 1) * np.arange(n, 0, -1) + 1)),
    # its steps would end at index 0 in the last one
    ('dpm linspace', grids.linspace,
     lambda n: at_indices(np.round(np.linspace(0, 999, n + 1))[:0:-1])),
    # indices that are not whole are asked at, between the table's rows
    ('euler linspace', grids.linspace, lambda n: at_indices(np.linspace(999, 0, n))),
    ('dpm beta_sigmas', grids.beta, beta_in_sigma),
    ('euler beta_sigmas', grids.beta, beta_in_sigma),
])
def test_grids_that_differ(name, steps, ours, theirs, x64):
  schedule, recorded = schedules.scaled_linear(), RECORDED[f'grid/d {name} {steps}'][:, 1]
  assert ratio(theirs(steps), recorded) < 1e-9
  if (name, steps) != ('euler linspace', 10):  # whose indices are whole
    assert ratio(nsr(schedule, ours, steps), recorded) > 1e-3


def test_vp_of_k_diffusion_is_explicit(x64):
  """Equal steps in t, of which the last ends at t_min: `uniform` would go on to 0 in one more."""
  schedule = schedules.vp()
  levels = nsr(schedule, grids.explicit, 10, tuple(np.linspace(1, 1e-3, 10)))
  assert ratio(levels, RECORDED['grid/k vp']) < 1e-9


@pytest.mark.parametrize('name, schedule', [
    ('scaled_linear', schedules.scaled_linear()),
    ('linear', schedules.linear_table()),
    ('squaredcos_cap_v2', schedules.squared_cosine()),
    ('scaled_linear rescaled', schedules.zero_terminal_snr(schedules.scaled_linear())),
])
def test_tables(name, schedule, x64):
  alpha = np.asarray(schedule(jnp.arange(1, 1001) / 1000).alpha)
  np.testing.assert_allclose(alpha**2, RECORDED[f'grid/betas {name}'], rtol=1e-12, atol=1e-16)
