"""Every sampler against the number of network calls, on an exact denoiser and on a trained one.

  python -m diffax.main --config configs/digits.py --workdir runs/digits   # trains the network
  python experiments/samplers/measure.py --workdir runs/digits

writes results/*.json, results/digits.npz, results/table.md and the pictures beside this file; with
`--parts mixture`, `digits`, `guidance` or `pictures` only those. Two CPU cores; time in README.md.

Network calls are counted by `samplers.calls`. A sampler of several calls a step takes the most
steps that fit into a number of calls.
"""

import argparse
import functools
import json
import pathlib
import sys
import time

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'experiments' / 'digits'), str(HERE)]

from diffax import build  # noqa: E402
from diffax import checkpoint  # noqa: E402
from diffax import config as configs  # noqa: E402
from diffax import grids  # noqa: E402
from diffax import guidance  # noqa: E402
from diffax import noises  # noqa: E402
from diffax import predictions  # noqa: E402
from diffax import samplers  # noqa: E402
from diffax import schedules  # noqa: E402
from diffax import train  # noqa: E402
from diffax.data import transforms  # noqa: E402
import gaussians  # noqa: E402
import judge  # noqa: E402
import pictures  # noqa: E402

FAMILIES = {  # family: {label: (function, options)}
  'Runge-Kutta': dict(
    ddim=('ddim', {}), flow_euler=('flow_euler', {}), heun=('heun', {}),
    flow_heun=('flow_heun', {}), dpm2=('dpm2', {}),
    dpm_solver_2=('dpm_solver', dict(order=2)), dpm_solver_3=('dpm_solver', dict(order=3)),
    dpmpp_2s=('dpmpp_2s', {}), dpmpp_3s=('dpmpp_3s', {}),
    res_2=('res', dict(order=2)), res_3=('res', dict(order=3))),
  'multistep': dict(
    dpmpp_2m=('dpmpp_2m', {}), dpmpp_3m=('dpmpp_3m', {}), res_multistep=('res_multistep', {}),
    deis_2=('deis', dict(order=2)), deis_3=('deis', dict(order=3)),
    deis_3_lam=('deis', dict(order=3, place='lam')), lms=('lms', {}), ipndm=('ipndm', {}),
    plms=('plms', {}), pndm=('pndm', {})),
  'corrector': dict(
    unipc_1=('unipc', dict(order=1)), unipc_2=('unipc', dict(order=2)),
    unipc_3=('unipc', dict(order=3)), unipc_2_bh1=('unipc', dict(order=2, variant='bh1'))),
  'noise, order 1': dict(
    ddpm=('ddpm', {}), ddpm_large=('ddpm', dict(variance='large')),
    ddim_half=('ddim', dict(eta=0.5)), euler_churn=('euler', dict(s_churn=4.)),
    sde_sigma=('sde', {}), sde_constant=('sde', dict(diffusion='constant')),
    sde_decreasing=('sde', dict(diffusion='decreasing')),
    sde_sbdm=('sde', dict(diffusion='sbdm')), predictor_corrector=('predictor_corrector', {})),
  'noise, higher order': dict(
    heun_churn=('heun', dict(s_churn=4.)), dpm2_ancestral=('dpm2_ancestral', {}),
    dpmpp_2s_ancestral=('dpmpp_2s', dict(eta=1.)), dpmpp_sde=('dpmpp_sde', {}),
    dpmpp_2m_sde=('dpmpp_2m_sde', {}), dpmpp_2m_sde_heun=('dpmpp_2m_sde', dict(solver='heun')),
    dpmpp_3m_sde=('dpmpp_3m_sde', {}), er_sde=('er_sde', {}), sa_solver=('sa_solver', {})),
  'jumps': dict(consistency=('consistency', {}), tcd=('tcd', {})),
}
NOISELESS = ('Runge-Kutta', 'multistep', 'corrector')
SAME = {  # functions that are, here, one of the above
  'euler_ancestral': 'ddpm', 'lcm': 'consistency'}

BUDGETS = (2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100, 200)
SHOWN = (5, 10, 20, 50)  # in tables and for samplers that are not drawn
SETTINGS = {  # schedule and grid of the Gaussian mixture
  'vp, log_snr': (schedules.vp, grids.log_snr), 'vp, karras': (schedules.vp, grids.karras),
  'linear, log_snr': (schedules.linear, grids.log_snr),
  'linear, karras': (schedules.linear, grids.karras),
  'linear, uniform': (schedules.linear, grids.uniform)}
STARTS, DRAWS = 2048, 2**16  # points of the mixture: followed by flows, drawn with noise
NOISY_SETTINGS = ('vp, log_snr', 'linear, log_snr', 'linear, uniform')

DIGITS = {  # {how often to ask: samplers}; all others at SHOWN but the last
  (2, 3, 4, 5, 7, 10, 20, 50, 200): (
    'ddim', 'heun', 'dpmpp_2m', 'ddpm', 'dpmpp_2m_sde', 'sa_solver'),
  (2, 3, 4, 5, 7, 10, 20, 50): ('dpm2', 'deis_3', 'unipc_2', 'euler_churn', 'consistency')}
PICTURED = (
  'ddim', 'heun', 'dpmpp_2m', 'deis_3', 'unipc_2', 'ddpm', 'dpmpp_2m_sde', 'sa_solver',
  'consistency')
REFERENCE = ('dpmpp_3m', 200)  # the flow of the digits' network, by how many calls
COUNT, BATCH, SEED = 1000, 250, 0
STRIP = (3, 8, 5, 2, 4)  # which of the 1000 samples a cell of the picture shows


def all_samplers():
  """{label: (family, Sampler)}; raises ValueError where samplers.py has one that is not here."""
  listed = [spec for family in FAMILIES.values() for spec in family.values()]
  suits = lambda f: getattr(f.__annotations__.get('return'), '__name__', '') == 'Sampler'
  left = set(build.functions('diffax.samplers', suits)) - {name for name, _ in listed} - set(SAME)
  if left:
    raise ValueError(f'not measured: {", ".join(sorted(left))}; put them into FAMILIES or SAME')
  make = lambda name, options: getattr(samplers, name)(**options)
  return {k: (family, make(*spec)) for family, some in FAMILIES.items() for k, spec in some.items()}


def steps_within(sampler, budget):
  """(steps, calls): the most steps that make `budget` calls or fewer; None for fewer than 2."""
  least, most = 1, budget
  if samplers.calls(sampler, budget) <= budget:
    least = budget
  while least < most:
    middle = (least + most + 1) // 2
    least, most = (
      (middle, most) if samplers.calls(sampler, middle) <= budget else (least, middle - 1))
  calls = samplers.calls(sampler, least)
  return (least, calls) if 2 <= calls <= budget else None


@functools.cache
def runs(sampler, budgets):
  """{calls: steps} of the budgets, each number of calls once."""
  found = [steps_within(sampler, budget) for budget in budgets]
  return {calls: steps for steps, calls in filter(None, found)}


def stepper(sampler, denoise, noise):
  """`samplers.sample` as a function compiled for a single row: one program for every length.

  denoise: told -> a denoiser; noise: (keys, x) -> (number, draw, span) -> unit noise. Returns
  walk(rows, x, keys, told) -> x.
  """
  @jax.jit
  def step(x, memory, recall, number, row, keys, told):
    ask_with, drawn = samplers.lift(denoise(told)), noise(keys, x)

    def ask(x, level):
      nonlocal recall
      said, recall = ask_with.apply(x, level, recall)
      return said

    fresh = lambda span, draw=0: drawn(number, draw, span)
    x, memory = sampler.step(ask, x, memory, row, fresh)
    return x, memory, recall

  def walk(rows, x, keys, told=()):
    rows = jax.device_get(rows)
    memory, recall = sampler.init(x), samplers.lift(denoise(told)).init(x)
    for i in range(len(rows['level'].t)):
      row = jax.tree.map(lambda a, i=i: a[i], rows)
      x, memory, recall = step(x, memory, recall, np.int32(i), row, keys, told)
    return x

  return walk


# --- the Gaussian mixture -------------------------------------------------------------------------


def noised(data, schedule, count, dtype):
  """Exact points [count 2] of the noisiest level, and that level."""
  rng = np.random.default_rng(0)
  level = jax.tree.map(float, schedule(jnp.asarray(schedule.t_max)))
  return (level.alpha * drawn_exactly(data, count, rng)
          + level.sigma * rng.standard_normal((count, 2))).astype(dtype), level


def drawn_exactly(data, count, rng):
  which = (rng.random((count, 2)) > data.weight[:, 0]).astype(int)
  pick = lambda a: a[[0, 1], which]
  y = pick(data.mean) + np.sqrt(pick(data.var)) * rng.standard_normal((count, 2))
  return y @ data.axes.T


def wasserstein(data, count):
  """x -> its Wasserstein-2 distance from the data, the root of the mean over the two axes.

  The axes are independent and each one's quantiles known, so nothing is estimated but by x.
  """
  z = scipy.special.ndtri((np.arange(count) + 0.5) / count)
  exact = gaussians.flow(data, np.stack([z, z], 1) @ data.axes.T, (0., 1.), (1., 0.)) @ data.axes
  along = lambda x: np.sort(np.asarray(x, float) @ data.axes, axis=0)
  return lambda x: float(np.sqrt(np.mean((along(x) - exact)**2)))


@functools.cache
def times(setting, steps, wide):
  """The times of a grid, computed once for all samplers."""
  schedule, grid = SETTINGS[setting]
  with jax.enable_x64(wide):
    return jax.jit(lambda: grid(schedule(), steps))()


@functools.cache
def flowed(setting):
  """Points of the noisiest level and where the exact flow takes them, float64 [STARTS 2]."""
  data, schedule = gaussians.mixture(), SETTINGS[setting][0]()
  with jax.enable_x64(True):
    x, level = noised(data, schedule, STARTS, np.float64)
  return x, gaussians.flow(data, x, (level.alpha, level.sigma), (1., 0.))


def flow_errors(walk, sampler, setting):
  """{calls: root mean square distance to the exact flow}; in float64."""
  x, exact = flowed(setting)
  schedule, out = SETTINGS[setting][0](), {}
  for calls, steps in runs(sampler, BUDGETS).items():
    with jax.enable_x64(True):
      end = walk(sampler.plan(schedule, times(setting, steps, True)), x, jax.random.key(0))
    out[calls] = float(np.sqrt(np.mean(np.sum((np.asarray(end) - exact)**2, axis=1))))
  return out


def law_errors(walk, sampler, setting, data, distance):
  """{calls: distance of the samples from the data}; in float32."""
  schedule, out = SETTINGS[setting][0](), {}
  x, _ = noised(data, schedule, DRAWS, np.float32)
  for calls, steps in runs(sampler, BUDGETS).items():
    rows = sampler.plan(schedule, times(setting, steps, False))
    out[calls] = distance(walk(rows, x, jax.random.key(2)))
  return out


def mixture():
  """Errors of all samplers on tests/gaussians.py's mixture; see README.md."""
  data, begun = gaussians.mixture(), time.time()
  denoise = lambda told: lambda x, level: gaussians.denoise(data, x, level)
  noise = lambda key, x: lambda number, draw, span: jax.random.normal(
    jax.random.fold_in(jax.random.fold_in(key, number), draw), x.shape, x.dtype)
  distance, rng = wasserstein(data, DRAWS), np.random.default_rng(1)
  floor = [distance(drawn_exactly(data, DRAWS, rng)) for _ in range(20)]
  out = {name: {} for name in SETTINGS}
  for label, (family, sampler) in all_samplers().items():
    walk = stepper(sampler, denoise, noise)
    for setting, found in out.items():
      found[label] = entry = dict(family=family)
      if family in NOISELESS:
        errors = flow_errors(walk, sampler, setting)
        entry |= dict(calls=list(errors), flow=list(errors.values()))
      if setting in NOISY_SETTINGS and (family not in NOISELESS or label in pictures.BESIDE):
        errors = law_errors(walk, sampler, setting, data, distance)
        entry |= dict(calls=list(errors), law=list(errors.values()))
    print(f'{label:22}{time.time() - begun:7.0f} s', flush=True)
  return dict(floor=float(np.mean(floor)), seconds=time.time() - begun, settings=out)


# --- the digits -----------------------------------------------------------------------------------


def network(workdir):
  """(schedule, shape, denoise, weak): the trained network of the config's average.

  denoise: params -> (x, level, cond) -> Estimate. weak: the same average of the first checkpoint.
  """
  workdir = epath.Path(workdir)
  config = configs.complete(configs.read(workdir / 'config.json'))
  run = train.setup(config)
  folder, average = workdir / 'checkpoints', list(run.like.ema)[-1]
  load = lambda step: checkpoint.load(folder, step, {'ema': run.like.ema})[1]['ema'][average]
  schedule = build.build('diffax.schedules', config['schedule'], path='schedule')
  prediction = build.build('diffax.predictions', config['prediction'], schedule, path='prediction')
  model = build.build('diffax.models', config['model'], path='model')

  def denoise(params):
    def ask(x, level, cond):
      t = jnp.broadcast_to(prediction.clock(level), len(x))
      out = model.apply({'params': params['net']}, prediction.c_in(level) * x, t, cond)
      return predictions.solve(prediction, out, x, level)
    return ask

  return schedule, tuple(run.source.shape), denoise, load(0), load(checkpoint.present(folder)[0])


def drawing(schedule, shape, sampler, denoise):
  """steps, more -> samples float32 [COUNT h w c], of the same noise each time, ten classes in turn.

  denoise: {'label': [b], **more} -> a denoiser. Karras's grid, as the config's.
  """
  walk = stepper(sampler, denoise, lambda keys, x: noises.independent(keys, x.shape[1:], x.dtype))
  batches = np.arange(COUNT).reshape(-1, BATCH)

  def draw(steps, **more):
    ts, parts = jax.jit(lambda: grids.karras(schedule, steps))(), []
    rows = sampler.plan(schedule, ts)
    for index in batches:
      keys = samplers.sample_keys(SEED, index)
      x = samplers.initial(schedule, ts, keys, shape)
      parts.append(np.asarray(walk(rows, x, keys, {'label': jnp.asarray(index % 10), **more})))
    return np.concatenate(parts)

  return draw


def judging():
  """(images -> {accuracy, frechet, recall}, the same of real digits); see digits/judge.py."""
  (seen, seen_label), (held, held_label) = judge.real_digits()
  seen, held = judge.flatten(seen), judge.flatten(held)
  real = np.concatenate([seen, held])
  svm = judge.SVC(C=10).fit(seen, seen_label)
  rng = np.random.default_rng(0)
  draws = [seen[rng.permutation(len(seen))[:COUNT]] for _ in range(judge.DRAWS)]
  recall = np.mean([judge.inside(held, d) for d in draws])
  halves = []
  for _ in range(20):
    a, b, c, d = np.split(real[rng.permutation(len(real))[:len(real) // 4 * 4]], 4)
    halves.append(judge.frechet(np.concatenate([a, b]), np.concatenate([c, d])))
  spread = [float(q / np.mean(halves)) for q in np.quantile(halves, [0.05, 0.95])]

  def verdict(x, covered=False):
    x = judge.flatten(transforms.to_uint8(x))
    said = dict(
      accuracy=float(svm.score(x, np.arange(len(x)) % 10)),
      frechet=float(judge.frechet_ratio(x, real)))
    return said | ({'recall': float(judge.inside(held, x) / recall)} if covered else {})

  return verdict, dict(accuracy=float(svm.score(held, held_label)), frechet=spread)


def digits(workdir):
  """Fréchet ratio and accuracy of all samplers on the trained network, without guidance."""
  begun = time.time()
  schedule, shape, denoise, params, _ = network(workdir)
  bound = lambda told: lambda x, level: denoise(params)(x, level, told)
  verdict, real = judging()
  known, out, strips = all_samplers(), {}, {}
  label, calls = REFERENCE
  exact = drawing(schedule, shape, known[label][1], bound)(calls)
  for label, (family, sampler) in known.items():
    draw = drawing(schedule, shape, sampler, bound)
    budgets = next((often for often, some in DIGITS.items() if label in some), SHOWN[:-1])
    out[label] = found = dict(family=family, calls=[], accuracy=[], frechet=[], flow=[])
    for calls, steps in runs(sampler, budgets).items():
      x = draw(steps)
      off = float(np.sqrt(np.mean((x - exact)**2))) if family in NOISELESS else None
      for key, value in dict(calls=calls, flow=off, **verdict(x)).items():
        found[key].append(value)
      budget = next(n for n in budgets if n >= calls)
      if label in PICTURED and budget in SHOWN:
        strips[f'{label} {budget}'] = transforms.to_uint8(x[list(STRIP)])
    print(f'{label:22}{time.time() - begun:7.0f} s', flush=True)
  np.savez_compressed(HERE / 'results' / 'digits.npz', **strips)
  return dict(real=real, seconds=time.time() - begun, samplers=out)


# --- guidance -------------------------------------------------------------------------------------

GUIDED = dict(sampler='dpmpp_2m', steps=15)  # cfg_pp: ddim, for it needs one that goes on as said
SCALES = (1.125, 1.25, 1.5, 2., 3., 5., 8.)
INTERVAL = (0.3, 2.)  # of sigma
APG_NORM = 0.5  # 15 for 65536 values of a latent, by the square root of their number: 64 here


def guidances(denoise, params, weak, schedule):
  """{name: (sampler, scales, told -> denoiser)}."""
  ask, bad = denoise(params), denoise(weak)

  def of(make):
    def bound(told):
      null = {'label': jnp.full_like(told['label'], 10)}
      return make({'label': told['label']}, null, told['scale'])
    return bound

  with_label = lambda net, cond: lambda x, level: net(x, level, cond)
  main = GUIDED['sampler']
  return {
    'cfg': (main, (0., 0.5, 1., *SCALES), of(lambda *a: guidance.cfg(ask, *a))),
    'interval': (main, SCALES, of(lambda *a: guidance.cfg(ask, *a, *INTERVAL))),
    'cfg_zero': (main, SCALES, of(lambda *a: guidance.cfg_zero(ask, schedule, *a))),
    'rescale': (main, SCALES, of(lambda *a: guidance.rescale(ask, *a))),
    'apg': (main, SCALES, of(lambda *a: guidance.apg(ask, *a, norm=APG_NORM))),
    'autoguide': (main, SCALES, of(lambda cond, null, scale: guidance.autoguide(
      with_label(ask, cond), with_label(bad, cond), scale))),
    'cfg_pp': ('ddim', (0., 0.1, 0.2, 0.4, 0.7, 1.), of(lambda *a: guidance.cfg_pp(ask, *a)))}


def guided(workdir):
  """Accuracy, recall and Fréchet ratio against the scale of several guidances."""
  begun = time.time()
  schedule, shape, denoise, params, weak = network(workdir)
  verdict, real = judging()
  known, out = all_samplers(), {}
  for name, (sampler, scales, bound) in guidances(denoise, params, weak, schedule).items():
    draw = drawing(schedule, shape, known[sampler][1], bound)
    out[name] = found = dict(sampler=sampler, scale=[], accuracy=[], frechet=[], recall=[])
    for scale in scales:
      x = draw(GUIDED['steps'], scale=jnp.float32(scale))
      for key, value in dict(scale=scale, **verdict(x, covered=True)).items():
        found[key].append(value)
    print(f'{name:22}{time.time() - begun:7.0f} s', flush=True)
  return dict(real=real, seconds=time.time() - begun, guidances=out)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--workdir', default='runs/digits', help='a run of configs/digits.py')
  names = ('mixture', 'digits', 'guidance', 'pictures')
  parser.add_argument('--parts', default=','.join(names), help='of ' + ', '.join(names))
  values = parser.parse_args()
  parts = values.parts.split(',')
  if set(parts) - set(names):
    parser.error(f'--parts={values.parts}: allowed are {", ".join(names)}, with commas between')
  does = dict(
    mixture=mixture, digits=lambda: digits(values.workdir), guidance=lambda: guided(values.workdir))
  for part in parts:
    if part in does:
      short = lambda digits: float(f'{float(digits):.5g}')
      result = json.loads(json.dumps(does[part]()), parse_float=short)
      (HERE / 'results' / f'{part}.json').write_text(json.dumps(result) + '\n')
  pictures.draw(HERE, SHOWN)


if __name__ == '__main__':
  main()
