"""What the samplers of k-diffusion and diffusers make of data known in closed form.

  pip install torch==2.13.0 diffusers==0.42.1 scipy torchsde torchdiffeq tqdm
  pip install --no-deps k-diffusion==0.1.1.post1
  python tests/golden/samplers.py            # writes tests/golden/samplers.npz

Both are called as they come, with the exact denoiser of the mixture of `tests/gaussians.py` for a
network and with noise drawn here. A row of the arrays is a case; what is shorter than the longest
case is filled up with NaN. With b = 4 points of the plane:

  noise      [128 b 2]        unit noise; every case takes noise[0], noise[1], ... in turn
  x          [cases b 2]      the start, of the level levels[:, 0]
  levels     [cases n 2]      (alpha, sigma) of x between steps, from x to `out`
  asked      [cases calls 2]  (alpha, sigma) of each question to the network
  times      [cases calls]    what diffusers calls those levels; none for k-diffusion
  draw_call  [cases draws]    how many questions were asked before each draw of noise
  draw_span  [cases draws 2]  sigma/alpha from and to, where the library tells its noise sampler;
                              for k-diffusion's churn the sigma before and after
  out        [cases b 2]      the result in float64
  out32      [cases b 2]      the result in float32, as the library comes

`index` is a JSON string: `versions`; `cases`, a list of name, library, call, options, kind, levels,
calls and draws (counts), in the order of the rows; `failed`, name -> why; `grids`, name -> what was
called. Each grid is an array `grid/NAME`: k-diffusion's sigmas [n]; diffusers' [n 2] of time and
sigma/alpha, the time of its last NaN; and alphas_cumprod [1000] where NAME begins with betas.

`kind` is what x and the network's output are. 'alphas': x of level (sqrt(ac), sqrt(1 - ac)), ac of
alphas_cumprod; the output is eps, or v where the options say so. 'vp': the same, from a table of
sigma/alpha. 've': alpha = 1; the network is shown x scaled to variance preserving and says eps.
'edm': alpha = 1 and the scheduler's preconditioning. 'flow': straight lines, the output eps - x0.
'ipndm': alpha^2 + sigma^2 = 1, v. 'k': alpha = 1, the output x0.

float64 is float64 throughout: where diffusers says float32 (its tables, some of its steps), the
name is bound to float64 during that run. A learned range is shown v = tanh(x), of [-1, 1].
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import pathlib
import sys
import types
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

POINTS, DRAWS = 4, 128
NOISE = np.random.default_rng(0).standard_normal((DRAWS, POINTS, 2))
START = np.random.default_rng(1).standard_normal((POINTS, 2))

# The mixture of tests/gaussians.py.
ANGLE = 0.5
AXES = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])
WEIGHT = np.array([[0.5, 0.5], [0.3, 0.7]])
MEAN = np.array([[-1., 1.], [-0.4, 0.5]])
VAR = np.array([[0.16, 0.16], [0.09, 0.25]])


def network(x, alpha, sigma):
  """E[x0 | x] and the noise, at a tensor x [b 2] and of its dtype; in float64, not to add to its
  rounding."""
  value = x.detach().double().numpy()
  total = alpha**2 * VAR + sigma**2
  off = (value @ AXES)[..., None] - alpha * MEAN
  logit = np.log(WEIGHT) - off**2 / total / 2 - np.log(total) / 2
  share = np.exp(logit - logit.max(-1, keepdims=True))
  share /= share.sum(-1, keepdims=True)
  x0 = (share * (MEAN + alpha * VAR / total * off)).sum(-1) @ AXES.T
  eps = (value - alpha * x0) / sigma
  return torch.from_numpy(x0).to(x.dtype), torch.from_numpy(eps).to(x.dtype)


class Run(NamedTuple):
  """What one run asked and drew, filled as it goes, and what came of it."""

  x: np.ndarray
  asked: list
  times: list
  draw_call: list
  draw_span: list
  levels: list
  out: np.ndarray


def ask(run, known, alpha, sigma, time=np.nan):
  """Notes a question. Returns its level; in float32 that of the same question in float64."""
  level = known[len(run.asked)] if known else (float(alpha), float(sigma))
  run.asked.append(level)
  run.times.append(float(time))
  return level


def draw(run, dtype, span=(np.nan, np.nan)):
  run.draw_call.append(len(run.asked))
  run.draw_span.append([float(s) for s in span])
  return torch.from_numpy(NOISE[len(run.draw_call) - 1]).to(dtype)


@contextlib.contextmanager
def precision(dtype, *modules):
  """`dtype` is torch's default; float64 is also what `modules` know as float32."""
  with contextlib.ExitStack() as stack:
    torch.set_default_dtype(dtype)
    stack.callback(torch.set_default_dtype, torch.float32)
    if dtype == torch.float64:
      for module, (name, library) in itertools.product(modules, [('torch', torch), ('np', np)]):
        wide = types.SimpleNamespace(**{**vars(library), 'float32': library.float64})
        stack.enter_context(mock.patch.object(module, name, wide, create=True))
    yield


# k-diffusion: name, options.
CHURN = dict(s_churn=3., s_tmin=0.05, s_tmax=50., s_noise=1.003)
K_CASES = [
  ('euler', {}), ('euler', CHURN), ('euler_ancestral', {}), ('euler_ancestral', dict(eta=0.5)),
  ('heun', {}), ('heun', CHURN), ('dpm_2', {}), ('dpm_2', CHURN), ('dpm_2_ancestral', {}),
  ('lms', {}), ('lms', dict(order=2)),
  ('dpm_fast', dict(n=10)), ('dpm_fast', dict(n=11)), ('dpm_fast', dict(n=12)),
  ('dpm_fast', dict(n=12, eta=1.)),
  ('dpm_adaptive', {}), ('dpm_adaptive', dict(order=2, rtol=0.02)), ('dpm_adaptive', dict(eta=1.)),
  ('dpmpp_2s_ancestral', dict(eta=0.)), ('dpmpp_2s_ancestral', dict(eta=1.)),
  ('dpmpp_sde', dict(eta=0.)), ('dpmpp_sde', dict(eta=1.)),
  ('dpmpp_2m', {}),
  ('dpmpp_2m_sde', dict(eta=1., solver_type='midpoint')),
  ('dpmpp_2m_sde', dict(eta=1., solver_type='heun')),
  ('dpmpp_2m_sde', dict(eta=0., solver_type='heun')),
  ('dpmpp_3m_sde', dict(eta=0.)), ('dpmpp_3m_sde', dict(eta=1.)),
]
K_CHAINS = 'karras', 'exponential', 'interior'
K_GRIDS = {
  'karras': ('get_sigmas_karras', dict(n=10, sigma_min=0.002, sigma_max=80.)),
  'karras rho 3': ('get_sigmas_karras', dict(n=10, sigma_min=0.03, sigma_max=15., rho=3.)),
  'exponential': ('get_sigmas_exponential', dict(n=10, sigma_min=0.02, sigma_max=20.)),
  'polyexponential': (
    'get_sigmas_polyexponential', dict(n=10, sigma_min=0.02, sigma_max=20., rho=1.7)),
  'vp': ('get_sigmas_vp', dict(n=10)),
  'interior': ('get_sigmas_karras', dict(n=11, sigma_min=0.05, sigma_max=40.)),  # less its 0
}


def k_module():
  """k_diffusion.sampling alone, for the package imports far more than that needs."""
  package, utils = types.ModuleType('k_diffusion'), types.ModuleType('k_diffusion.utils')
  package.__path__ = importlib.util.find_spec('k_diffusion').submodule_search_locations
  package.utils = utils
  utils.append_dims = lambda x, ndim: x.reshape(x.shape + (1,) * (ndim - x.ndim))
  sys.modules.update({'k_diffusion': package, 'k_diffusion.utils': utils})
  return importlib.import_module('k_diffusion.sampling')


def k_grid(module, name):
  call, options = K_GRIDS[name]
  with precision(torch.float64):
    sigmas = getattr(module, call)(**options).numpy()
  return sigmas[:-1] if name == 'interior' else sigmas


def k_run(module, name, options, sigmas, dtype):
  """One sampler on one grid; dpm_fast and dpm_adaptive on its range, with their own steps."""
  run = Run(sigmas[0] * START, [], [], [], [], [(1., s) for s in sigmas], np.zeros_like(START))
  def model(x, sigma):
    return network(x, *ask(run, (), 1., sigma[0]))[0]

  spans = []
  given = dict(options, disable=True)
  where = dict(sigmas=torch.from_numpy(sigmas).to(dtype))
  own_steps = name in ('dpm_fast', 'dpm_adaptive')
  if own_steps:
    where = dict(sigma_min=float(sigmas[sigmas > 0][-1]), sigma_max=float(sigmas[0]))
    visited = [where['sigma_max']]
  if own_steps or 'ancestral' in name or 'sde' in name:
    given['noise_sampler'] = lambda s, t: draw(run, dtype, (s, t))
  if 's_churn' in options:
    given['callback'] = lambda info: spans.append((float(info['sigma']), float(info['sigma_hat'])))
  with precision(dtype), mock.patch.object(torch, 'randn_like', lambda x: draw(run, dtype)):
    x = torch.from_numpy(run.x).to(dtype)
    out = getattr(module, 'sample_' + name)(model, x, **where, **given)
  if 's_churn' in options:
    run.draw_span[:] = spans
  if own_steps:  # a draw, of weight 0 where there is no noise, ends each of their steps
    visited += [t for _, t in run.draw_span]
    run.levels[:] = [(1., t) for t in visited]
  return run._replace(out=out.numpy())


# diffusers: name, class, kind, options, options of set_timesteps, options of step.
SD = dict(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012)
OFFSET = dict(SD, timestep_spacing='leading', steps_offset=1)
FLOW = dict(prediction_type='flow_prediction', use_flow_sigmas=True)
EDM = dict(sigma_min=0.002, sigma_max=80., sigma_data=0.5)


def d_cases(n):
  """(name, class, kind, options, options of set_timesteps, options of step) at n steps."""
  def case(name, of, kind, options=(), steps=(), step=()):
    steps = dict(num_inference_steps=n, **dict(steps))
    return f'{name} {n}', of + 'Scheduler', kind, dict(options), steps, dict(step)

  no_clip = dict(OFFSET, clip_sample=False)
  for eta in 0., 0.5, 1.:
    yield case(f'ddim eta {eta}', 'DDIM', 'alphas', no_clip, step=dict(eta=eta))
  yield case('ddim ending above 0', 'DDIM', 'alphas', dict(no_clip, set_alpha_to_one=False))
  yield case('ddim trailing', 'DDIM', 'alphas',
             dict(SD, clip_sample=False, timestep_spacing='trailing'), step=dict(eta=0.5))
  yield case('ddim zero snr', 'DDIM', 'alphas', dict(
    SD, clip_sample=False, timestep_spacing='trailing', rescale_betas_zero_snr=True,
    prediction_type='v_prediction'))
  for variance in 'fixed_small', 'fixed_large', 'learned_range':
    yield case(f'ddpm {variance}', 'DDPM', 'alphas', dict(no_clip, variance_type=variance))
  yield case('pndm plms', 'PNDM', 'alphas', dict(OFFSET, skip_prk_steps=True))
  yield case('pndm', 'PNDM', 'alphas', dict(OFFSET, skip_prk_steps=False))
  yield case('ipndm', 'IPNDM', 'ipndm')
  yield case('lcm', 'LCM', 'alphas', SD)
  for eta in 0., 0.3, 1.:
    yield case(f'tcd eta {eta}', 'TCD', 'alphas', SD, step=dict(eta=eta))

  for order in 1, 2, 3:
    yield case(f'deis {order}', 'DEISMultistep', 'vp', dict(SD, solver_order=order))
  for algorithm, order in itertools.product(
      ['dpmsolver', 'dpmsolver++', 'sde-dpmsolver', 'sde-dpmsolver++'], [1, 2, 3]):
    for solver in ['midpoint', 'heun'] if order == 2 else ['midpoint']:
      end = 'zero' if algorithm.endswith('++') else 'sigma_min'
      options = dict(SD, algorithm_type=algorithm, solver_order=order, solver_type=solver,
                     final_sigmas_type=end)
      yield case(f'{algorithm} {order}m {solver}', 'DPMSolverMultistep', 'vp', options)
  yield case('dpmsolver++ 2m karras', 'DPMSolverMultistep', 'vp', dict(SD, use_karras_sigmas=True))
  yield case('dpmsolver++ 2m flow', 'DPMSolverMultistep', 'flow', dict(FLOW, flow_shift=3.))
  yield case('sde-dpmsolver++ 2m flow', 'DPMSolverMultistep', 'flow', dict(
    FLOW, flow_shift=3., algorithm_type='sde-dpmsolver++'))
  for algorithm, order in itertools.product(['dpmsolver', 'dpmsolver++'], [1, 2, 3]):
    for solver in ['midpoint', 'heun'] if order == 2 else ['midpoint']:
      end = 'zero' if algorithm.endswith('++') else 'sigma_min'
      options = dict(SD, algorithm_type=algorithm, solver_order=order, solver_type=solver,
                     final_sigmas_type=end, lower_order_final=True)
      yield case(f'{algorithm} {order}s {solver}', 'DPMSolverSinglestep', 'vp', options)
  # On equal steps in log-SNR the grid's own points are the papers' inner points.
  for algorithm, (order, solver) in itertools.product(
      ['dpmsolver', 'dpmsolver++'], [(2, 'midpoint'), (2, 'heun'), (3, 'midpoint')]):
    end = 'zero' if algorithm.endswith('++') else 'sigma_min'
    if (n, order, end) == (20, 3, 'sigma_min'):  # its last step, of no length, is of order 2
      continue
    options = dict(SD, algorithm_type=algorithm, solver_order=order, solver_type=solver,
                   final_sigmas_type=end, lower_order_final=True, use_exponential_sigmas=True)
    yield case(f'{algorithm} {order}s {solver} exponential', 'DPMSolverSinglestep', 'vp', options)
  yield case('dpmsolver sde', 'DPMSolverSDE', 've', SD)
  for kind, order in itertools.product(['bh1', 'bh2'], [1, 2, 3]):
    for end in 'zero', 'sigma_min':
      options = dict(SD, solver_type=kind, solver_order=order, final_sigmas_type=end)
      yield case(f'unipc {kind} {order} to {end}', 'UniPCMultistep', 'vp', options)
  yield case('unipc bh2 2 of eps', 'UniPCMultistep', 'vp',
             dict(SD, predict_x0=False, final_sigmas_type='sigma_min'))
  yield case('unipc bh2 2 flow', 'UniPCMultistep', 'flow', dict(FLOW, flow_shift=3.))
  for order, tau in [(1, 1.), (2, 0.), (2, 0.5), (2, 1.), (3, 1.)]:
    options = dict(SD, predictor_order=order, corrector_order=order)
    yield case(f'sa {order} tau {tau}', 'SASolver', 'vp', dict(options, tau=tau))

  yield case('euler', 'EulerDiscrete', 've', SD)
  yield case('euler karras', 'EulerDiscrete', 've', dict(SD, use_karras_sigmas=True))
  yield case('euler churn', 'EulerDiscrete', 've', SD, step=CHURN)
  yield case('euler ancestral', 'EulerAncestralDiscrete', 've', SD)
  yield case('heun', 'HeunDiscrete', 've', SD)
  yield case('dpm 2', 'KDPM2Discrete', 've', SD)
  yield case('dpm 2 ancestral', 'KDPM2AncestralDiscrete', 've', SD)
  for order in 2, 4:
    yield case(f'lms {order}', 'LMSDiscrete', 've', SD, step=dict(order=order))
  yield case('edm euler', 'EDMEuler', 'edm', EDM)
  for algorithm, order in itertools.product(['dpmsolver++', 'sde-dpmsolver++'], [1, 2, 3]):
    options = dict(EDM, algorithm_type=algorithm, solver_order=order)
    yield case(f'edm {algorithm} {order}m', 'EDMDPMSolverMultistep', 'edm', options)
  for shift in 1., 3.:
    yield case(f'flow euler shift {shift}', 'FlowMatchEulerDiscrete', 'flow', dict(shift=shift))
    yield case(f'flow heun shift {shift}', 'FlowMatchHeunDiscrete', 'flow', dict(shift=shift))
  yield case('flow euler dynamic shift', 'FlowMatchEulerDiscrete', 'flow',
             dict(use_dynamic_shifting=True), steps=dict(mu=0.8))
  yield case('flow euler stochastic', 'FlowMatchEulerDiscrete', 'flow',
             dict(stochastic_sampling=True))


def coefficients(kind, s):
  """alpha and sigma of a table's entry s."""
  if kind == 'vp':
    return 1 / np.sqrt(1 + s**2), s / np.sqrt(1 + s**2)
  return (1 - s, s) if kind == 'flow' else (1., s)


def d_levels(scheduler, kind):
  """The levels between steps, from the start to the end of them all."""
  name = type(scheduler).__name__
  if kind == 'ipndm':
    return [(float(a), float(s)) for a, s in zip(scheduler.alphas, scheduler.betas)]
  if kind == 'alphas':
    times = scheduler.timesteps
    if name == 'PNDMScheduler':  # the rest are between steps
      times = scheduler._timesteps[::-1].copy()
    cumprod = scheduler.alphas_cumprod
    last = {'LCMScheduler': 1., 'TCDScheduler': cumprod[0]}.get(
      name, getattr(scheduler, 'final_alpha_cumprod', 1.))
    chain = [float(cumprod[int(t)]) for t in times] + [float(last)]
    return [(a**0.5, (1 - a)**0.5) for a in chain]
  chain = [s for s, _ in itertools.groupby(scheduler.sigmas.tolist())]
  return [coefficients(kind, s) for s in chain]


def d_level(scheduler, kind, t, i, x):
  """The level of the i-th question, asked at x and time t, and what the network is shown."""
  shown = x
  if kind in ('ve', 'edm'):
    shown = scheduler.scale_model_input(x, t)
  if kind == 'alphas':
    a = float(scheduler.alphas_cumprod[int(t)])
    return (a**0.5, (1 - a)**0.5), shown
  if kind == 'ipndm':
    return (float(scheduler.alphas[i]), float(scheduler.betas[i])), shown
  if kind == 've':  # between the table's entries too, it scales by 1 / sqrt(sigma^2 + 1)
    scale = float(scheduler.scale_model_input(torch.ones(()), t))
    return (1., (scale**-2 - 1)**0.5), shown
  return coefficients(kind, float(scheduler.sigmas[i])), shown


def d_say(scheduler, kind, shown, x, level):
  """The network's output, as the scheduler wants it."""
  alpha, sigma = level
  if kind == 've':  # what is shown is of variance 1
    return network(shown, 1 / (1 + sigma**2)**0.5, sigma / (1 + sigma**2)**0.5)[1]
  x0, eps = network(x, alpha, sigma)
  if kind == 'edm':
    of = lambda x, out: scheduler.precondition_outputs(x, out, torch.tensor(sigma))
    zero, one = torch.zeros(()), torch.ones(())
    return (x0 - of(one, zero).to(x.dtype) * x) / of(zero, one).to(x.dtype)
  if kind == 'flow':
    return eps - x0
  if kind == 'ipndm' or scheduler.config.get('prediction_type') == 'v_prediction':
    return alpha * eps - sigma * x0
  if scheduler.config.get('variance_type') == 'learned_range':
    return torch.cat([eps, torch.tanh(shown)], 1)
  return eps


def d_run(of, kind, options, steps, step, dtype, known=()):
  """One scheduler, from its constructor to the end of its times."""
  import diffusers
  of = getattr(diffusers, of)
  module = sys.modules[of.__module__]
  run = Run(np.array(START), [], [], [], [], [], np.zeros_like(START))
  noise = mock.patch.object(
    module, 'randn_tensor', lambda *args, **kwargs: draw(run, dtype), create=True)
  with precision(dtype, module), noise:
    scheduler = of(**{k: v for k, v in options.items() if k != 'tau'})
    scheduler.set_timesteps(**steps)
    if 'tau' in options:
      scheduler.tau_func = lambda t: options['tau']
    if hasattr(scheduler, 'noise_sampler'):
      scheduler.noise_sampler = lambda s, t: draw(run, dtype, (s, t))
    run = run._replace(
      x=START * float(getattr(scheduler, 'init_noise_sigma', 1.)), levels=d_levels(scheduler, kind))
    x = torch.from_numpy(run.x).to(dtype)
    for i, t in enumerate(scheduler.timesteps):
      level, shown = d_level(scheduler, kind, t, i, x)
      level = ask(run, known, *level, t)
      x = scheduler.step(d_say(scheduler, kind, shown, x, level), t, x, **step).prev_sample
  assert x.dtype == dtype, x.dtype
  return run._replace(out=x.numpy())


D_GRIDS = {
  **{f'{name} {spacing} {n}': (of, dict(OFFSET, timestep_spacing=spacing), n)
     for name, of in [('dpm', 'DPMSolverMultistep'), ('euler', 'EulerDiscrete'), ('ddim', 'DDIM')]
     for spacing in ('leading', 'trailing', 'linspace') for n in (10, 30)},
  **{f'{name} {rule} {n}': (of, {**SD, f'use_{rule}': True}, n)
     for name, of in [('dpm', 'DPMSolverMultistep'), ('euler', 'EulerDiscrete')]
     for rule in ('karras_sigmas', 'exponential_sigmas', 'beta_sigmas') for n in (10, 30)},
  **{f'dpm lu {n}': ('DPMSolverMultistep', dict(SD, use_lu_lambdas=True), n) for n in (10, 30)},
}
BETAS = {
  'scaled_linear': SD,
  'linear': dict(beta_schedule='linear', beta_start=0.0001, beta_end=0.02),
  'squaredcos_cap_v2': dict(beta_schedule='squaredcos_cap_v2'),
  'scaled_linear rescaled': dict(SD, rescale_betas_zero_snr=True),
}


def d_grid(of, options, n):
  """[n + 1 2]: the scheduler's times and its sigma/alpha, of float64."""
  import diffusers
  of = getattr(diffusers, of + 'Scheduler')
  with precision(torch.float64, sys.modules[of.__module__]):
    scheduler = of(**options)
    scheduler.set_timesteps(n)
    if hasattr(scheduler, 'sigmas'):
      nsr = scheduler.sigmas.numpy()
    else:
      ac = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps]
      ac = np.array([*ac, float(scheduler.final_alpha_cumprod)])
      nsr = np.sqrt((1 - ac) / ac)
    return np.stack([np.append(scheduler.timesteps.numpy(), np.nan), nsr], 1)


def d_betas(options):
  import diffusers
  of = diffusers.DDIMScheduler
  with precision(torch.float64, sys.modules[of.__module__]):
    return of(**options).alphas_cumprod.numpy()


def jobs(module):
  """name, library, call, options, kind and `(dtype, known) -> Run` of every case."""
  for (name, options), grid in itertools.product(K_CASES, K_CHAINS):
    label = ' '.join([name, *(f'{k} {v}' for k, v in options.items()), 'on', grid])
    def run(dtype, known=(), name=name, options=options, grid=grid):
      return k_run(module, name, options, k_grid(module, grid), dtype)
    yield 'k ' + label, 'k-diffusion', 'sample_' + name, {**options, 'grid': grid}, 'k', run
  for name, of, kind, options, steps, step in [*d_cases(10), *d_cases(20)]:
    def run(dtype, known=(), of=of, kind=kind, options=options, steps=steps, step=step):
      return d_run(of, kind, options, steps, step, dtype, known)
    yield 'd ' + name, 'diffusers', of, {**options, **steps, **step}, kind, run


def stack(rows):
  """Arrays of differing length to one, filled up with NaN."""
  rows = [np.array(row, float) for row in rows]
  width = max(len(row) for row in rows)
  tail = next(row.shape[1:] for row in rows if len(row))
  full = np.full((len(rows), width, *tail), np.nan)
  for place, row in zip(full, rows):
    place[:len(row)] = row.reshape(-1, *tail)
  return full


def main():
  module = k_module()
  runs, outs32, cases, failed = [], [], [], {}
  for name, library, call, options, kind, job in jobs(module):
    try:
      run = job(torch.float64)
      assert np.isfinite(run.out).all(), 'not finite'
    except Exception as problem:  # one that fails must not stop the rest
      failed[name] = f'{type(problem).__name__}: {problem}'
      continue
    try:
      out32 = job(torch.float32, run.asked).out
    except Exception as problem:
      failed[name + ' in float32'] = f'{type(problem).__name__}: {problem}'
      out32 = np.full_like(START, np.nan)
    runs.append(run)
    outs32.append(out32)
    cases.append(dict(
      name=name, library=library, call=call, options=options, kind=kind, levels=len(run.levels),
      calls=len(run.asked), draws=len(run.draw_call)))

  grids = {f'grid/k {name}': (K_GRIDS[name], k_grid(module, name)) for name in K_GRIDS}
  grids |= {f'grid/d {name}': (call, d_grid(*call)) for name, call in D_GRIDS.items()}
  grids |= {f'grid/betas {name}': (call, d_betas(call)) for name, call in BETAS.items()}
  packages = 'torch', 'diffusers', 'k-diffusion', 'numpy', 'scipy'
  index = dict(
    versions={name: importlib.metadata.version(name) for name in packages}, cases=cases,
    failed=failed, grids={name: call for name, (call, _) in grids.items()})
  fields = 'levels', 'asked', 'times', 'draw_call', 'draw_span'
  path = pathlib.Path(__file__).with_suffix('.npz')
  np.savez_compressed(
    path, index=json.dumps(index), noise=NOISE, x=np.stack([run.x for run in runs]),
    out=np.stack([run.out for run in runs]), out32=np.stack(outs32).astype(np.float32),
    **{name: stack([getattr(run, name) for run in runs]) for name in fields},
    **{name: grid for name, (_, grid) in grids.items()})
  print(f'{len(cases)} cases, {path.stat().st_size / 1000:.0f} kB')
  for name, why in failed.items():
    print(f'not recorded: {name}: {why}')


if __name__ == '__main__':
  main()
