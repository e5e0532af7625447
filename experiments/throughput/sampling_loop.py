"""Milliseconds of a 50-step sampling loop with next to no network: diffax against diffusers.

  pip install torch diffusers                        # optional: without them ours runs alone
  python experiments/throughput/sampling_loop.py

What a sampler itself costs, on this CPU: the network is 0.9 x. Our loop is compiled, with the plan
made outside and its rows an argument; diffusers' is its scheduler called as its pipelines do, with
`set_timesteps` outside. The two take turns in one process, so that what else the machine does falls
on both; printed are the median and the range over turns. Then, for the sampler that takes longest,
the seconds to trace, lower and compile its loop, for a few numbers of steps.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import sys
import time

from diffax import grids
from diffax import samplers
from diffax import schedules
import jax
import jax.numpy as jnp
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
STEPS = 50
COMPILED_STEPS = 10, 50, 1000
SHAPES = {(1, 32, 32, 4): 0.1, (4, 64, 64, 4): 0.25}  # of ours, and the most of their time allowed
COMPILE_SECONDS = 5.

# name -> our factory and its options, diffusers' scheduler and its options. A network says x0
# where the scheduler knows that, else eps; either way it is one product.
SAMPLERS = {
  'ddim': ('ddim', {}, 'DDIM', dict(prediction_type='sample', clip_sample=False)),
  'ddpm': ('ddpm', {}, 'DDPM', dict(prediction_type='sample', clip_sample=False)),
  'euler': ('euler', {}, 'EulerDiscrete', dict(prediction_type='sample')),
  'euler_ancestral': ('euler_ancestral', {}, 'EulerAncestralDiscrete', {}),
  'heun': ('heun', {}, 'HeunDiscrete', {}),
  'dpmpp_2m': ('dpmpp_2m', {}, 'DPMSolverMultistep', dict(prediction_type='sample')),
  'dpmpp_2m sde': ('dpmpp_2m', dict(eta=1.), 'DPMSolverMultistep', dict(
    prediction_type='sample', algorithm_type='sde-dpmsolver++')),
  'unipc': ('unipc', {}, 'UniPCMultistep', dict(prediction_type='sample')),
}


def loop(sampler):
  """(rows, x, keys) -> x, to be compiled."""
  def run(rows, x, keys):
    return samplers.sample(sampler, lambda x, level: 0.9 * x, rows, x, keys)
  return run


def plan(sampler, steps):
  schedule = schedules.vp()
  return sampler.plan(schedule, grids.uniform(schedule, steps))


def ours(sampler, shape):
  """() -> nothing, after one whole loop."""
  keys = samplers.sample_keys(0, jnp.arange(shape[0]))
  x = jnp.asarray(np.random.default_rng(0).standard_normal(shape, 'f4'))
  inputs = plan(sampler, STEPS), x, keys
  run = jax.jit(loop(sampler))
  return lambda: run(*inputs).block_until_ready()


def theirs(name, options, shape):
  """The same of diffusers; their axes are b c h w."""
  import diffusers
  import torch

  scheduler = getattr(diffusers, name + 'Scheduler')(**options)
  b, h, w, c = shape
  start = torch.from_numpy(np.random.default_rng(0).standard_normal((b, c, h, w), 'f4'))

  def run():
    x = start * scheduler.init_noise_sigma
    with torch.inference_mode():
      for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t)
        x = scheduler.step(0.9 * shown, t, x).prev_sample
    return x

  return run, lambda: scheduler.set_timesteps(STEPS)


def seconds(run):
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def spread(values):
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def compare(name, shape, turns, with_theirs):
  """Milliseconds a loop of either side, and their ratio, over turns."""
  factory, options, scheduler, given = SAMPLERS[name]
  run = ours(getattr(samplers, factory)(**options), shape)
  run()  # compiles
  mine, other = [], []
  if with_theirs:
    other_run, prepare = theirs(scheduler, given, shape)
    prepare()
    other_run()
  for turn in range(turns):
    sides = [(run, mine)]
    if with_theirs:
      prepare()
      sides.append((other_run, other))
    for f, times in sides if turn % 2 else sides[::-1]:  # neither always follows the other
      times.append(1e3 * seconds(f))
  result = {'diffax_ms': spread(mine)}
  if with_theirs:
    result |= {
      'diffusers_ms': spread(other), 'ratio': spread([a / b for a, b in zip(mine, other)])}
  return result


def compile_seconds(name, steps):
  """Tracing, lowering and compiling the loop of a sampler; and making its plan, once compiled."""
  factory, options, *_ = SAMPLERS[name]
  sampler = getattr(samplers, factory)(**options)
  shape = next(iter(SHAPES))
  rows = jax.block_until_ready(plan(sampler, steps))
  x, keys = jnp.zeros(shape), samplers.sample_keys(0, jnp.arange(shape[0]))
  return {
    'loop': seconds(lambda: jax.jit(loop(sampler)).lower(rows, x, keys).compile()),
    'plan': seconds(lambda: jax.block_until_ready(plan(sampler, steps)))}


def machine():
  lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  name = next(line.split(': ')[1] for line in lines if line.startswith('model name'))
  found = [p for p in ('jax', 'torch', 'diffusers') if importlib.util.find_spec(p)]
  return {
    'command': ' '.join(['python', 'experiments/throughput/sampling_loop.py', *sys.argv[1:]]),
    'machine': f'{name}, python {platform.python_version()}',
    'processors': len(os.sched_getaffinity(0)),
    'load': os.getloadavg()[0],
    'versions': {p: importlib.metadata.version(p) for p in found},
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--turns', type=int, default=21)
  parser.add_argument('--only', nargs='*', choices=SAMPLERS, help='these samplers alone')
  parser.add_argument('--out', default=HERE / 'results' / 'sampling_loop_cpu.json')
  args = parser.parse_args()
  here = machine()
  with_theirs = {'torch', 'diffusers'} <= set(here['versions'])
  if not with_theirs:
    print('ours alone: pip install torch diffusers to compare')
  names = [n for n in args.only or SAMPLERS if hasattr(samplers, SAMPLERS[n][0])]

  result = {**here, 'steps': STEPS, 'turns': args.turns, 'loops': []}
  print('sampler          b h w c       diffax ms (min..max)      diffusers ms (min..max)    ratio')
  for shape, goal in SHAPES.items():
    for name in names:
      found = compare(name, shape, args.turns, with_theirs)
      result['loops'].append({'sampler': name, 'shape': shape, 'goal': goal, **found})
      report(name, shape, goal, found)

  slowest = max(names, key=lambda name: compile_seconds(name, STEPS)['loop'])
  result['compile'] = {
    'sampler': slowest, 'goal': COMPILE_SECONDS,
    'seconds': {steps: compile_seconds(slowest, steps) for steps in COMPILED_STEPS}}
  for steps, took in result['compile']['seconds'].items():
    print(f'{slowest}, {steps} steps: {took["loop"]:.2f} s to compile (goal {COMPILE_SECONDS:g}), '
          f'{took["plan"]:.3f} s a plan')
  pathlib.Path(args.out).write_text(json.dumps(result, indent=2) + '\n')


def report(name, shape, goal, found):
  side = lambda s: f'{s["median"]:8.2f} ({s["min"]:.2f}..{s["max"]:.2f})'
  line = f'{name:16} {" ".join(map(str, shape)):11} {side(found["diffax_ms"]):26}'
  if 'ratio' in found:
    ratio = found['ratio']['median']
    verdict = 'met' if ratio <= goal else 'MISSED'
    line += f'{side(found["diffusers_ms"]):26} {ratio:.3f} (goal {goal:g}: {verdict})'
  print(line, flush=True)


if __name__ == '__main__':
  main()
