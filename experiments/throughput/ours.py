"""diffax's side: the step that `python -m diffax.main` runs, of a DiT on made-up latents."""

from diffax import config
from diffax import sharding
from diffax import train
from diffax.data import sources
import jax
import jax.numpy as jnp
import numpy as np

CLASSES = 1000
CHANNELS = 4


def latents(side: int = 32):
  """A source with a shape, a length and no records: what compiling asks of one."""
  return sources.Source(None, str, 2**20, (side, side, CHANNELS), CLASSES)


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
  return train.setup(config.complete(plan(preset, batch, side, **model)))


def setup(preset, batch, threads):
  """`running` of a DiT; threads follow affinity."""
  del threads
  return running(setup_run(preset, len(batch['image']), batch['image'].shape[1]), batch)


def running(run, batch):
  """(advance, facts) of a `train.Run`: `advance(steps)` trains on one batch and waits."""
  batch = jax.device_put(
    batch | {'index': np.arange(len(batch['image']), dtype=np.int32)}, sharding.batch(run.mesh)
  )
  state, step = train.init(run), train.compile_step(run)
  facts = {
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    'version': f'jax {jax.__version__}, {jax.devices()[0].platform}',
  }

  def advance(steps):
    nonlocal state
    for _ in range(steps):
      state, metrics = step(state, batch)
    return float(metrics['loss'])

  return advance, facts


def matmul(n):
  """A function that multiplies two float32 matrices of n rows and waits."""
  a, product = jnp.ones((n, n)), jax.jit(jnp.matmul)
  return lambda: product(a, a).block_until_ready()
