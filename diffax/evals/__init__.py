"""Evaluations: named entries of a config's `evals`, run inside training every so many steps, and on
their own by `--mode evaluate`.

An evaluation is a function `(run, path, **its settings) -> Evaluation` in a file of its own in this
package; one with `**settings` draws samples by those. All it can find wrong it says before anything
is computed.
"""

from typing import NamedTuple
from collections.abc import Callable


class Evaluation(NamedTuple):
  """What the loops ask of an evaluation.

  evaluate: (state, folder) -> iterator of `(name, value)`: a number, or a picture, uint8 [h w c];
    of None at places where it may be interrupted. The names begin with the entry's own. folder: an
    epath, not made yet, for what an interrupted evaluation need not do again; it is removed at the
    end.
  prepare: () -> None; computes what comes of the data alone, once, into the cache.
  """

  evaluate: Callable
  prepare: Callable = lambda: None
