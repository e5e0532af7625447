"""Tasks bind the mathematics to a network and to data. The training loop knows nothing else of
them.

A task is a function `(config, source, **its own settings) -> Task` in a file of its own in this
package; `config.task.name` names it.
"""

from typing import Any, NamedTuple
from collections.abc import Callable


class Frozen(NamedTuple):
  """Parameters that a run reads and never trains: of an autoencoder, a text encoder, a teacher.

  like: () -> a tree of what looks like them; reads no array. load: a tree of ShapeDtypeStructs with
  shardings -> the arrays, in buffers of their own. Checkpoints hold their checksums alone.
  """

  like: Callable[..., Any]
  load: Callable[..., Any]


class Drawing(NamedTuple):
  """How samples are drawn.

  ask: int [b], numbers of samples -> {name: numpy [b ...]}, what is asked of each; `label` among it
  where there are classes. draw: (params, frozen, keys [b], asked) -> images float32 [b h w c] in
  [-1, 1], or of the data's own range where it is floats; pure. said: int [b] -> [prompt, ...], []
  where there are none. decoded: whether they are images although the data is latents.
  """

  ask: Callable[..., Any]
  draw: Callable[..., Any]
  said: Callable[..., Any] = lambda index: []
  decoded: bool = False


class Phase(NamedTuple):
  """A part of a training step with a loss and an optimizer of its own.

  name: by which `config.phases` gives it an optimizer and a learning rate; those of the first phase
  are the config's. groups: names of the groups of parameters it trains. loss: as `Task.loss`; it
  sees the parameters as the phases before it have left them. every, start: it is due in the steps
  start, start + every, ..., from 0; else its parameters and its optimizer stay as they are, so
  that its learning rate goes by the updates it made. terms: names in the loss's info whose means
  are logged beside it.
  """

  name: str
  groups: tuple
  loss: Callable[..., Any]
  every: int = 1
  start: int = 0
  terms: tuple = ()


class Task(NamedTuple):
  """What the loops ask of a task; pure functions.

  init: key -> params, a dict of groups of parameters ({'net': ...}). Reads no file; runs under jit.
  loss: (params, state, batch, keys) -> (losses [b], info). `params` alone is differentiated;
    `state` is the whole training state; keys [b], one an example. info: {name: [b]}, shown in
    replay, of a denoiser among it `t` and `noise` (sigma / alpha).
  sample: (settings, path) -> `Drawing`; checks the settings of a config's `sample` section or
    evaluation.
  classes: number of labels, 0 where there are none.
  prepare: (params, state, batch, keys) -> batch, once a step on the whole batch, before it is split
    into microbatches; for what examples are drawn together.
  extra: () -> the first `State.extra`, arrays beside the parameters that a run carries on.
  update: (extra, info) -> extra, once a step, with the info of the whole batch; with phases that of
    the first, and {name: info} of the others in it, zeros where one was not due.
  denoiser: params -> (schedule, (x, level, cond) -> Estimate).
  clean: (params, frozen, batch, keys [b]) -> (x0, cond): what the examples of a batch are to the
    denoiser, undisturbed.
  frozen: {name: `Frozen`} of what is read and never trained; their arrays lie in `State.frozen`.
  tokenize: [str, ...] -> {name: numpy [b ...]} of captions, which batches then carry; it pickles.
  record: {file: text} that a run keeps in its workdir.
  reconstruct: (params, frozen, x [b h w c]) -> {name: [b ...]}, what an autoencoder makes of
    pictures: `image` [b h w c], and of its latent `mean` [b h w z], its `variance` or how often
    each of its `codes` [b n] stands in it; `perceptual` [b], how far off the picture looks.
  carry: {name: numpy [1 ...]}, what batches carry of the records beside image and label, and what
    it looks like.
  phases: `Phase`s, carried out in order within each step; `loss` is then that of the first. Keys of
    later ones are others than the first's. `prepare` comes before them all. Without any, all
    parameters are trained by `loss`.
  terms: of `loss` where there are no phases, as `Phase.terms`.
  """

  init: Callable[..., Any]
  loss: Callable[..., Any]
  sample: Callable[..., Any]
  classes: int
  prepare: Callable[..., Any] | None = None
  extra: Callable[..., Any] = dict
  update: Callable[..., Any] | None = None
  denoiser: Callable[..., Any] | None = None
  clean: Callable[..., Any] | None = None
  frozen: dict = {}
  tokenize: Callable[..., Any] | None = None
  record: dict = {}
  reconstruct: Callable[..., Any] | None = None
  carry: dict = {}
  phases: tuple[Phase, ...] = ()
  terms: tuple = ()
