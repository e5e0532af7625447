"""A grid of samples: what the model draws by now, the same noise every time."""

from diffax import images
from diffax import sample


def grid(run, path, rows=10, columns=10, **settings):
  """One picture of rows x columns samples; settings: those of a config's `sample` section."""
  draw = sample.drawer(run, settings, path)

  def evaluate(state):
    pictures, _ = draw(state, rows * columns)
    yield path.rpartition('.')[2], images.grid(pictures, columns)

  return evaluate
