"""diffax's side: the steps and samples that `python -m diffax.main` runs, on made-up data.

What `side.py` asks of a side: `describe`, `train`, `sample`, `product`, `peak`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffax import config as configs
from diffax import flops
from diffax import sample as sampling
from diffax import samplers
from diffax import sharding
from diffax import train as training
from diffax.build import build
from diffax.data import sources

CLASSES = 1000
CHANNELS = 4


# --- data without records, and configs ------------------------------------------------------------


def latents(side: int = 32):
  """A source with a shape, a length and no records: what compiling asks of one."""
  shape = (side, side, CHANNELS)
  return sources.Source(None, str, 2**20, shape, CLASSES, np.dtype('float32'))


def pictures(side: int = 32):
  """The like of CIFAR-10."""
  return sources.Source(None, str, 2**20, (side, side, 3), 10)


def plan(preset, batch, side, **model):
  """A config: linear schedule, velocity prediction, AdamW, one average, by itself all float32."""
  return dict(
    steps=1,
    batch_size=batch,
    data=dict(name='ours.latents', side=side),
    model=dict(name='dit_preset', preset=preset, classes=CLASSES, **model),
    optimizer=dict(name='adamw', weight_decay=0.01),
    learning_rate=1e-4,
    ema=0.9999,
  )


def setup_run(preset, batch, side, **model):
  """The `train.Run` of `plan`."""
  return training.setup(configs.complete(plan(preset, batch, side, **model)))


# --- what is timed --------------------------------------------------------------------------------


def running(run, batch):
  """(advance, facts) of a `train.Run`: `advance(steps)` trains on one batch, waits and returns the
  loss; its first call compiles the step.
  """
  place = sharding.batch(run.mesh)
  batch = jax.device_put(batch | {'index': np.arange(len(batch['image']), dtype='i4')}, place)
  state, step = training.init(run), None

  def advance(steps):
    nonlocal state, step
    step = step or training.compile_step(run)
    for _ in range(steps):
      state, metrics = step(state, batch)
    jax.block_until_ready(state)
    return float(metrics['loss'])

  return advance, facts(run)


def train(job):
  """As `running`, of a job of `table.py`, on the first device."""
  run = training.setup(job['config'], jax.devices()[:1])
  batch = {name: np.asarray(x) for name, x in job['batch'].items()}
  advance, told = running(run, batch)
  return advance, told | {'flops': training.model_flops(run)}


def sample(job):
  """(advance, facts): `advance(n)` draws the job's batch n times by `sample.drawer`, guided."""
  run = training.setup(job['config'], jax.devices()[:1])
  settings = run.config['sample']
  draw = sampling.drawer(run, settings, 'sample')
  place = jax.tree.map(lambda x: x.sharding, run.like.params)
  with run.layout():
    params = jax.jit(run.task.init, out_shardings=place)(jax.random.key(0))
  state = run.like.replace(params=params, frozen=sampling.frozen(run))

  def advance(times):
    for _ in range(times):
      drawn, _ = draw(state, settings['count'])
    return float(np.abs(drawn.astype('f4')).mean())

  return advance, facts(run) | {'flops': sampling_flops(run)}


def sampling_flops(run):
  """FLOPs of drawing the config's batch once."""
  settings = run.config['sample']
  drawing, index = run.task.sample(settings, 'sample'), np.arange(settings['count'], dtype='i4')

  def draw(params, asked):
    return drawing.draw(params, {}, samplers.sample_keys(0, index), asked)

  return flops.count(draw, run.like.params, drawing.ask(index))


def facts(run):
  """parameters, and forward_flops of one example."""
  model = build('diffax.models', run.config['model'], path='model')
  call = lambda net, x, t, label: model.apply({'params': net}, x, t, {'label': label})
  x = jax.ShapeDtypeStruct((1, *run.source.shape), 'float32')
  given = x, jax.ShapeDtypeStruct((1,), 'float32'), jax.ShapeDtypeStruct((1,), 'int32')
  return {
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(run.like.params)),
    'forward_flops': flops.count(call, run.like.params['net'], *given),
    'version': f'jax {jax.__version__}, {jax.devices()[0].platform}',
  }


# --- the device -----------------------------------------------------------------------------------


def describe():
  """What there is to compute with."""
  device = jax.devices()[0]
  return {'platform': device.platform, 'device': device.device_kind, 'jax': jax.__version__}


def product(rows, dtype='float32'):
  """`run(n=1)`: n products of two drawn matrices of so many rows, waited for."""
  a, b = jax.random.normal(jax.random.key(0), (2, rows, rows), dtype)
  multiply = jax.jit(jnp.matmul)

  def run(n=1):
    for _ in range(n):
      c = multiply(a, b)
    c.block_until_ready()

  return run


def peak():
  """Bytes of the device that were in use at most; None on a CPU."""
  return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
