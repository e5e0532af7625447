"""A grid of samples: what the model draws by now, the same noise every time."""

from diffax import images
from diffax import sample


def grid(
  run,
  path,
  sampler: dict,
  rows=10,
  columns=10,
  guidance=1.0,
  interval=(),
  ema='',
  labels='balanced',
  seed=0,
  batch_size=100,
):
  """One picture of rows x columns samples; settings as in a config's `sample` section."""
  settings = dict(
    sampler=sampler,
    guidance=guidance,
    interval=interval,
    ema=ema,
    labels=labels,
    seed=seed,
    batch_size=batch_size,
  )
  draw = sample.drawer(run, settings, path)

  def evaluate(state):
    pictures, _ = draw(state, rows * columns)
    yield path.rpartition('.')[2], images.grid(pictures, columns)

  return evaluate
