"""Tasks bind the mathematics to a network and to data. The training loop knows nothing else of
them.

A task is a function `(config, source, **its own settings) -> Task` in a file of its own in this
package; `config.task.name` names it.
"""

from typing import Any, NamedTuple
from collections.abc import Callable


class Task(NamedTuple):
  """What the loops ask of a task; pure functions.

  init: key -> params, a dict of groups of parameters ({'net': ...}). Reads no file; runs under jit.
  loss: (params, state, batch, keys) -> (losses [b], info). `params` alone is differentiated;
    `state` is the whole training state; keys [b], one an example. info: {name: [b]}, shown in
    replay, among it `t` and `noise` (sigma / alpha).
  sample: (settings, path) -> draw; checks the settings of a config's `sample` section or
    evaluation. draw: (params, keys [b], label int32 [b]) -> images float32 [b h w c] in [-1, 1].
  classes: number of labels, 0 where there are none.
  prepare: (params, state, batch, keys) -> batch, once a step on the whole batch, before it is split
    into microbatches; for what examples are drawn together.
  extra: () -> the first `State.extra`, arrays beside the parameters that a run carries on.
  update: (extra, info) -> extra, once a step, with the info of the whole batch.
  denoiser: params -> (schedule, (x, level, cond) -> Estimate); cond: dict with `label` int32 [b]
    where there are classes.
  """

  init: Callable[..., Any]
  loss: Callable[..., Any]
  sample: Callable[..., Any]
  classes: int
  prepare: Callable[..., Any] | None = None
  extra: Callable[..., Any] = dict
  update: Callable[..., Any] | None = None
  denoiser: Callable[..., Any] | None = None
