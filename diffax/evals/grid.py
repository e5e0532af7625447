"""A grid of samples: what the model draws by now, the same noise every time."""

from diffax import images
from diffax import sample
from diffax.evals import Evaluation


def grid(run, path, rows=10, columns=10, **settings) -> Evaluation:
  """One picture of rows x columns samples; settings: those of a config's `sample` section."""
  draw = sample.drawer(run, settings, path)

  def evaluate(state, folder):
    del folder
    pictures, _ = draw(state, rows * columns)
    yield path.rpartition('.')[2], images.grid(images.shown(pictures), columns)

  return Evaluation(evaluate)
