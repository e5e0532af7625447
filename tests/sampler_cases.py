"""All samplers, schedules and grids, and one program a sampler, for the tests of sampling.

To add a sampler to the tests, add a line to CASES.
"""

import functools
from typing import NamedTuple
from unittest import mock

from jax import Array
import jax
import jax.numpy as jnp
import numpy as np

from diffax import grids
from diffax import predictions
from diffax import samplers
from diffax import schedules
import gaussians


class Case(NamedTuple):
  """A sampler and what is true of it.

  order: of convergence of its flow, None where it draws noise. weak: of its variance, None where
  it draws none. With neither it is made for networks that jump (consistency) or not linear.
  """

  sampler: samplers.Sampler
  order: float | None = None
  weak: float | None = None


ALL = np.inf
CASES = dict(
    ddim=Case(samplers.ddim(), order=1),
    ddim_half=Case(samplers.ddim(0.5), weak=1),
    ddpm=Case(samplers.ddpm(), weak=1),
    ddpm_large=Case(samplers.ddpm('large'), weak=1),
    ddpm_learned=Case(samplers.ddpm('learned'), weak=1),
    euler=Case(samplers.euler(), order=1),
    euler_churn=Case(samplers.euler(s_churn=4.), weak=1),
    euler_ancestral=Case(samplers.euler_ancestral(), weak=1),
    flow_euler=Case(samplers.flow_euler(), order=1),
    flow_heun=Case(samplers.flow_heun(), order=2),
    sde_sigma=Case(samplers.sde(), weak=1),
    sde_constant=Case(samplers.sde('constant'), weak=1),
    sde_decreasing=Case(samplers.sde('decreasing'), weak=1),
    sde_sbdm=Case(samplers.sde('sbdm'), weak=1),
    consistency=Case(samplers.consistency()),
    lcm=Case(samplers.lcm()),
    tcd=Case(samplers.tcd()),
    heun=Case(samplers.heun(), order=2),
    heun_churn=Case(samplers.heun(s_churn=4.), weak=2),
    dpm2=Case(samplers.dpm2(), order=2),
    dpm2_ancestral=Case(samplers.dpm2_ancestral(), weak=2),
    dpm_solver_1=Case(samplers.dpm_solver(1), order=1),
    dpm_solver_2=Case(samplers.dpm_solver(2), order=2),
    dpm_solver_3=Case(samplers.dpm_solver(3), order=3),
    dpmpp_2s=Case(samplers.dpmpp_2s(), order=2),
    dpmpp_2s_ancestral=Case(samplers.dpmpp_2s(1.), weak=2),
    dpmpp_3s=Case(samplers.dpmpp_3s(), order=3),
    dpmpp_sde=Case(samplers.dpmpp_sde(), weak=1),
    res_2=Case(samplers.res(2), order=2),
    res_3=Case(samplers.res(3), order=3),
    dpmpp_2m=Case(samplers.dpmpp_2m(), order=2),
    dpmpp_2m_sde=Case(samplers.dpmpp_2m_sde(), weak=2),
    dpmpp_2m_sde_heun=Case(samplers.dpmpp_2m_sde(solver='heun'), weak=2),
    dpmpp_3m=Case(samplers.dpmpp_3m(), order=2.5),
    dpmpp_3m_sde=Case(samplers.dpmpp_3m_sde(), weak=2),
    res_multistep=Case(samplers.res_multistep(), order=2),
    deis_2=Case(samplers.deis(2), order=2),
    deis_3=Case(samplers.deis(3), order=2.5),
    deis_lam=Case(samplers.deis(3, 'lam'), order=2.5),
    lms=Case(samplers.lms(), order=3),
    ipndm=Case(samplers.ipndm(), order=2),
    plms=Case(samplers.plms(), order=2),
    pndm=Case(samplers.pndm(), order=2),
    er_sde=Case(samplers.er_sde(), weak=2),
    unipc_1=Case(samplers.unipc(1), order=2),
    unipc_2=Case(samplers.unipc(2), order=3),
    unipc_3=Case(samplers.unipc(3), order=3),
    unipc_bh1=Case(samplers.unipc(2, 'bh1'), order=3),
    sa_solver=Case(samplers.sa_solver(low=0., high=ALL), weak=2),
    sa_predictor=Case(samplers.sa_solver(corrector=0, low=0., high=ALL), weak=2),
    predictor_corrector=Case(samplers.predictor_corrector()),
)
# Made for networks that jump to clean data: no number of steps makes the marginals right.
FLOWS = [name for name, case in CASES.items() if case.order]
NOISY = [name for name, case in CASES.items() if case.weak]
SCHEDULES = dict(
    linear=schedules.linear, cosine=schedules.cosine, vp=schedules.vp, ve=schedules.ve,
    cosine_interpolated=schedules.cosine_interpolated, trigflow=schedules.trigflow,
    sub_vp=schedules.sub_vp, exponential=schedules.exponential, sigmoid=schedules.sigmoid,
    laplace=schedules.laplace, linear_table=schedules.linear_table,
    scaled_linear=schedules.scaled_linear, squared_cosine=schedules.squared_cosine,
    learned=lambda: learned_schedule(),
    zero_terminal_snr=lambda: schedules.zero_terminal_snr(schedules.scaled_linear()),
    shift=lambda: schedules.shift(schedules.linear()),
    shift_snr=lambda: schedules.shift_snr(schedules.cosine()),
    truncate=lambda: schedules.truncate(schedules.vp(), 0.01, 0.9))
TABLES = ('linear_table', 'scaled_linear', 'squared_cosine', 'zero_terminal_snr')
GRIDS = dict(
    uniform=grids.uniform, quadratic=grids.quadratic, beta=grids.beta, karras=grids.karras,
    polyexponential=grids.polyexponential, log_snr=grids.log_snr, leading=grids.leading,
    trailing=grids.trailing, linspace=grids.linspace, ays=grids.ays)
PREDICTIONS = ('x0', 'eps', 'v', 'score', 'velocity', 'edm', 'trigflow')
STEPS = (1, 2, 3, 50)
GAUSSIAN, MIXTURE = gaussians.gaussian(), gaussians.mixture()
POINT = gaussians.gaussian(std=(0., 0.))


@functools.cache
def learned_parameters():
  return jax.tree.map(np.asarray, schedules.learned(width=8).init(jax.random.key(0)))


def learned_schedule():
  return schedules.learned(width=8).bind(jax.tree.map(jnp.asarray, learned_parameters()))


def allowed(schedule, grid, prediction):
  """Tables' grids want a table's times, and some velocities are refused (`predictions.check`)."""
  least = made(schedule).t_min / made(schedule).t_max
  if grid in ('leading', 'trailing', 'linspace') and least > 0.0011:
    return False
  return not (prediction == 'velocity' and schedule in ('sigmoid', 'laplace'))


# --- one program a sampler ------------------------------------------------------------------------


BATCH, ROWS = 608, 216  # of the programs in float64: noise of 2 x 2 x 150 rows, 3 x 72 rows


class Told(NamedTuple):
  """A `Level`, and what an exact network says there: a x0 + b eps."""

  t: Array
  alpha: Array
  sigma: Array
  a: Array
  b: Array


@functools.partial(jax.jit, static_argnums=0)
def program(name, rows, draws, x, data):
  """x [b 2] at the end of the rows that live; draws: the noise [rows 2 b 2] in place of keys."""
  sampler = CASES[name].sampler

  def step(denoise, x, memory, row, noise):
    stepped = sampler.step(denoise, x, memory, row, noise)
    return jax.tree.map(lambda a, b: jnp.where(row['live'], a, b), stepped, (x, memory))

  def denoise(x, level):
    exact = gaussians.estimate(data, x, level)
    network = predictions.Prediction(lambda level: (level.a, level.b), None, None)
    out = predictions.target(network, *exact[:2], level)
    said = predictions.solve(network, out, x, level)
    return said._replace(fraction=jnp.full_like(x, 0.3))

  given = lambda keys, shape, dtype: lambda number, draw, span: draws[number, draw]
  return samplers.sample(sampler._replace(step=step), denoise, rows, x, noise=given)


@functools.cache
def made(kind):
  return SCHEDULES[kind]()


@functools.cache
def compiled_inverse(schedule):
  return jax.jit(functools.partial(INVERSE, schedule))


INVERSE, LENGTH = schedules.inverse, 75


def quick_inverse(schedule, lam):
  """`schedules.inverse`, of one length and so of one program for all plans of a schedule."""
  if lam.ndim > 1:  # a plan's nodes
    return jnp.stack([quick_inverse(schedule, row) for row in lam])
  with jax.disable_jit(False):
    padded = np.concatenate([lam, np.zeros(-len(lam) % LENGTH, lam.dtype)])
    return compiled_inverse(schedule)(padded)[:len(lam)]


def eagerly(function, *args):
  """Plans and grids by operations that are each compiled once, whatever the sampler."""
  with jax.disable_jit(), mock.patch.object(schedules, 'inverse', quick_inverse):
    return function(*args)


def planned(name, schedule, ts, clean=True):
  return eagerly(CASES[name].sampler.plan, schedule, ts, clean)


@functools.cache
def times(grid, kind, steps, dtype='float32'):
  del dtype  # the mode it is called in
  return eagerly(GRIDS[grid], made(kind), steps)


def walk(name, schedule, rows, draws, x, data, filled, prediction='x0'):
  """`program` on rows filled up to `filled`."""
  count = len(rows['level'].t)
  with jax.disable_jit():
    row = getattr(predictions, prediction)(schedule).row(rows['level'])
  rows = jax.tree.map(np.asarray, {**rows, 'level': Told(*rows['level'], *row)})
  fill = lambda a: np.concatenate([a, np.repeat(a[:1], filled - len(a), 0)])
  rows = {**jax.tree.map(fill, rows), 'live': np.arange(filled) < count}
  draws = np.concatenate([draws, np.zeros((filled - len(draws), *draws.shape[1:]), draws.dtype)])
  return np.asarray(program(name, rows, draws, x, data))


def interior(schedule, steps):
  """Equal steps in lambda between two levels that have both data and noise."""
  return eagerly(lambda: schedules.inverse(schedule, jnp.linspace(-3., 3., steps + 1)))


def ends(schedule, ts):
  return [np.array(schedule(ts[i])[1:]) for i in (0, -1)]


def calls(rows):
  return len(rows['level'].t)
