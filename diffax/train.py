"""Training: one loop for every task, to be read from top to bottom.

The state is arrays alone. A step is a pure function of the state and its batch: all randomness is
keyed by (seed, step, global example index), so that a run is the same when it is interrupted, and
the same up to rounding at any accumulation and on any mesh.
"""

import collections
import signal
import time
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from diffax import checkpoint
from diffax import chips
from diffax import config as configs
from diffax import ema
from diffax import evaluate
from diffax import hosts
from diffax import log as logs
from diffax import optim
from diffax import sample
from diffax import sharding
from diffax import updates
from diffax.build import build, ConfigError
from diffax.convert import pipelines
from diffax.data import pipeline
from diffax.models import layers
from diffax.tasks import Phase

IN_FLIGHT = 4  # steps the host may run ahead of the devices


@flax.struct.dataclass
class State:
  """All that a run is, between two steps.

  step: updates made. params: a dict of groups. ema: {decay: params}. opt: the optimizer's.
  sums: metrics summed since the last step that was logged. bad: a loss or gradient was not finite;
  the state has stood still since. extra: what the task carries on beside the parameters. frozen:
  {name: parameters} that are read and never trained, see `tasks.Frozen`.
  """

  step: jax.Array
  params: Any
  ema: Any
  opt: Any
  sums: Any
  bad: jax.Array
  extra: Any = flax.struct.field(default_factory=dict)
  frozen: Any = flax.struct.field(default_factory=dict)


class Run(NamedTuple):
  """What a config comes to: see `setup`. tx, rate: of a task with phases, {phase: ...}."""

  config: dict
  source: Any
  task: Any
  tx: Any
  rate: Any
  mesh: Any
  like: State  # shapes and shardings of the state

  def layout(self):
    """A context: models lay themselves out on this run's mesh, see `sharding.using`."""
    return sharding.using(self.mesh, self.config['attention'])


def setup(config, devices=None):
  """Builds and checks everything a config names; allocates nothing. Raises ConfigError.

  devices: of the mesh, None for all; they may be of a topology that is compiled for and not there.
  """
  source = build('diffax.data.sources', config['data'], path='data', skip=tuple(configs.BESIDE))
  task = build('diffax.tasks', config['task'], config, source, path='task')
  tx, rate = optim.optimizers(config, [phase.name for phase in task.phases])
  for key in ('steps', 'batch_size', 'accumulate', 'log_every', 'save_every'):
    if config[key] < 1:
      raise ConfigError(f'config.{key}={config[key]} is less than 1')
  if config['keep']['last'] < 1:
    raise ConfigError(f'config.keep.last={config["keep"]["last"]} is less than 1')
  if config['keep']['averages'] < 0:
    raise ConfigError(f'config.keep.averages={config["keep"]["averages"]} is negative; 0 is never')
  if config['data']['workers'] < 0:
    raise ConfigError(f'config.data.workers={config["data"]["workers"]} is less than 0')
  mesh = sharding.make_mesh(config['mesh'], devices)
  try:
    averaged = ema.names(config['ema'])
    pipeline.steps(source, **_data_options(config, task))
  except ValueError as error:
    raise ConfigError(f'config: {error}') from error
  if config['keep']['averages'] and not ema.powers(averaged):
    raise ConfigError(
      f"config.keep.averages={config['keep']['averages']} keeps power-function averages, and ema="
      f"{config['ema']} has none: add two, as 'power_0.05' and 'power_0.1'"
    )
  parts = config['accumulate'] * sharding.parts(mesh)
  if config['batch_size'] % parts:
    near = max(config['batch_size'] // parts, 1) * parts
    raise ConfigError(
      f'config.batch_size={config["batch_size"]} does not divide by accumulate='
      f'{config["accumulate"]} times mesh.data={mesh.shape["data"]} times mesh.fsdp='
      f'{mesh.shape["fsdp"]} of {mesh.size} devices; {near} would'
    )
  try:
    with sharding.using(mesh, config['attention']):
      shapes = jax.eval_shape(lambda: _init(config, task, tx))
      frozen = {name: jax.eval_shape(each.like) for name, each in task.frozen.items()}
      shapes = shapes.replace(frozen=frozen)
  except ConfigError:
    raise
  except ValueError as error:  # such as sizes that do not divide, which the network says
    raise ConfigError(f'config.model: {" ".join(str(error).split())}') from error
  place = sharding.parameters(shapes.params | shapes.frozen, mesh, config['sharding'])
  kept, place = ({k: place[k] for k in part} for part in (shapes.frozen, shapes.params))
  whole = sharding.replicated(mesh)
  averages = sharding.like(shapes.ema, shapes.params, place, mesh)
  averages = sharding.on_host(averages) if config['ema_on_host'] else averages
  places = State(
    step=whole,
    params=place,
    frozen=kept,
    bad=whole,
    sums=jax.tree.map(lambda _: whole, shapes.sums),
    extra=jax.tree.map(lambda _: whole, shapes.extra),
    ema=averages,
    opt=sharding.like(shapes.opt, shapes.params, place, mesh),
  )
  run = Run(config, source, task, tx, rate, mesh, checkpoint.abstract(shapes, places))
  if config['data']['buckets']:
    _check_buckets(run)
  return run


def _check_buckets(run):
  """Raises ConfigError for a bucket whose shape the network does not take."""
  for shape in batch_shapes(run):
    try:
      with run.layout():
        _flops(run, shape)
    except ValueError as error:
      raise ConfigError(
        f'config.data.buckets: at {shape[1]} x {shape[2]}: {" ".join(str(error).split())}'
      ) from error


def _init(config, task, tx):
  params = task.init(jax.random.key(config['seed']))
  return State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema=ema.init(params, config['ema']),
    opt=updates.init(task.phases, tx, params),
    sums=updates.sums(updates.of(task)),
    bad=jnp.zeros((), bool),
    extra=task.extra(),
  )


def init(run):
  """The state before the first step, made in place on the mesh, and what is frozen."""
  place = jax.tree.map(lambda x: x.sharding, run.like.replace(frozen={}))
  with run.layout():
    made = jax.jit(lambda: _init(run.config, run.task, run.tx), out_shardings=place)()
  return made.replace(frozen=sample.frozen(run))


def example_keys(seed, step, count):
  """A key for each example of a step's global batch: [count]."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


def make_step(loss, tx, rate, config, prepare=None, carry=None, phases=()):
  """The update `(state, batch) -> (state, metrics)`, a pure function to be jitted.

  loss, prepare, carry: a task's `loss`, `prepare` and `update`; phases: its phases (`updates.of`),
  of which those with a name have tx and rate in {phase: ...}. metrics: means since the last logged
  step, the learning rate, and `bad`. Where a loss or gradient is not finite, the state stays as it
  was but for the flag `bad`.
  """
  count, parts = config['batch_size'], tuple(enumerate(phases or (Phase('', (), loss),)))
  pick = updates.of_name
  advance = [updates.advance(i, phase, pick(tx, phase), config, bool(carry)) for i, phase in parts]

  def chosen(old, new, sums, extra, bad):
    """The next state; where `bad`, the old one."""
    # Averages are taken of the chosen parameters, else XLA keeps one more copy of those.
    choose = lambda new, old: jax.tree.map(lambda new, old: jnp.where(bad, old, new), new, old)
    averages = old.ema
    if config.get('ema_on_host'):
      averages = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), averages)
    params = choose(new.params, old.params)
    return State(
      step=choose(old.step + 1, old.step),
      params=params,
      ema=choose(ema.update(averages, params, old.step), averages),
      opt=choose(new.opt, old.opt),
      sums=choose(sums, old.sums),
      bad=bad,
      extra=choose(extra, old.extra),
      frozen=old.frozen,
    )

  def step(state, batch):
    keys = example_keys(config['seed'], state.step, count)
    batch = {k: v for k, v in batch.items() if k != 'index'}
    batch = _prepared(prepare, state, batch, keys)
    new, this, info, bad = state, {}, {}, state.bad
    for (i, phase), carry_out in zip(parts, advance):
      new, found = carry_out(new, batch, keys)
      this |= updates.summed(i, phase, found)
      info |= {phase.name: found.info} if i else found.info
      bad |= ~(jnp.isfinite(found.loss) & jnp.isfinite(found.norm))
    logged = state.step % config['log_every'] == 0
    sums = jax.tree.map(lambda s, x: jnp.where(logged, 0.0, s) + x, state.sums, this)
    metrics = updates.metrics([phase for _, phase in parts], sums) | {'bad': bad}
    for i, phase in parts:
      now = jnp.asarray(pick(rate, phase)(updates.done(phase, state.step)), jnp.float32)
      metrics[updates.name('learning_rate', i, phase)] = now
    extra = carry(state.extra, info) if carry else state.extra
    return chosen(state, new, sums, extra, bad), metrics

  return step


def _prepared(prepare, state, batch, keys):
  """The whole batch as the task wants it, each example where it lay."""
  if not prepare:
    return batch
  batch = prepare(state.params, state, batch, keys)
  return jax.tree.map(lambda x: layers.constrain(x, 'batch', *[None] * (x.ndim - 1)), batch)


def traced_steps(run, attention=''):
  """{shape [b h w c] of a batch: the donated step, traced for arrays laid out as `run.like`}.

  attention: a program of `models.attention` in place of the config's.
  """
  place = jax.tree.map(lambda x: x.sharding, run.like)
  task = run.task
  step = make_step(
    task.loss, run.tx, run.rate, run.config, task.prepare, task.update, updates.of(task))
  traced = {}
  with sharding.using(run.mesh, attention or run.config['attention']):
    out = place, sharding.replicated(run.mesh)
    jitted = sharding.jit(step, run.mesh, out_shardings=out, donate_argnums=0)
    for shape in batch_shapes(run):
      like = _batch_like(run, shape)
      batch = checkpoint.abstract(like, jax.tree.map(lambda _: sharding.batch(run.mesh), like))
      traced[shape] = jitted.trace(run.like, batch)
  return traced


def compile_step(run):
  """The donated step, compiled ahead of time.

  Of buckets there is a program for each, all made before the first step: one compiled in between
  would keep all hosts waiting, which looks like a fault, and would find out late that memory does
  not reach.
  """
  traced = traced_steps(run)
  with run.layout():
    programs = {shape: each.lower().compile() for shape, each in traced.items()}
  if len(programs) == 1:
    return next(iter(programs.values()))
  return lambda state, batch: programs[batch['image'].shape](state, batch)


def batch_shapes(run):
  """{shape [b h w c] of a batch: what share of the batches has it}; one without buckets."""
  data, b, c = run.config['data'], run.config['batch_size'], run.source.shape[-1]
  if not data['buckets']:
    return {(b, *((data['size'],) * 2 if data['size'] else run.source.shape[:2]), c): 1}
  plan = pipeline.buckets(run.source, data['buckets'], data['on_error'])
  share = [len(members) / len(run.source) for members in plan.members]
  return {(b, *sides, c): each for sides, each in zip(plan.shapes, share)}


def _batch_like(run, shape):
  """What a batch of a shape looks like."""
  def batch():
    b = shape[0]
    tokens = run.task.tokenize([''] * b) if run.task.tokenize else {}
    tokens |= {k: jnp.zeros((b, *x.shape[1:]), x.dtype) for k, x in run.task.carry.items()}
    size = {'size': jnp.zeros((b, 6), jnp.int32)} if run.config['data']['buckets'] else {}
    label, index = jnp.zeros((2, b), jnp.int32)
    return {'image': jnp.zeros(shape), 'label': label, 'index': index, **tokens, **size}

  return jax.eval_shape(batch)


def _data_options(config, task):
  data = config['data']
  return dict(
    tokenize=task.tokenize,
    carry=tuple(task.carry),
    batch_size=config['batch_size'],
    seed=config['seed'],
    size=data['size'] or None,
    flip=data['flip'],
    on_error=data['on_error'],
    shapes=data['buckets'],
  )


def _placed(run):
  """({rows}, place) of this host: options of `pipeline.batches`, and host batch -> global batch."""
  count = run.config['batch_size']
  rows = sharding.rows(run.mesh, count)
  place = lambda batch: sharding.put(batch, sharding.batch(run.mesh), (rows, count))
  return dict(rows=rows), place


def batches(run, start):
  """Global batches of the steps after `start`, on their way to the devices before they are asked
  for."""
  own, place = _placed(run)
  options = _data_options(run.config, run.task) | own
  workers = run.config['data']['workers']
  host = pipeline.batches(run.source, start_step=start, workers=workers, **options)
  return pipeline.prefetch(host, place)


# --- trouble --------------------------------------------------------------------------------------


class BadStep(Exception):
  """A loss or a gradient was not finite."""


class WorkerGone(Exception):
  """A process that makes batches has died, of want of memory perhaps: a new start may do."""


def each_loss(run, state, number=0):
  """Does the step after `state` again without the update: (batch, losses [b], info {name: [b]}).

  number: of the phase whose losses they are, behind the updates of those before it.
  """
  step, task, config = int(state.step), run.task, run.config
  own, place = _placed(run)
  batch = place(pipeline.batch_at(run.source, step, **_data_options(config, task), **own))
  parts = updates.of(task)

  def losses(state, batch):
    keys = example_keys(config['seed'], state.step, config['batch_size'])
    batch = _prepared(task.prepare, state, batch, keys)
    for i, phase in enumerate(parts[:number]):
      state, _ = updates.advance(i, phase, run.tx[phase.name], config)(state, batch, keys)
    return updates.losses(number, parts[number], state, batch, keys)

  with run.layout():
    return sharding.fetch((batch, *jax.jit(losses)(state, batch)))


def _explain(run, state, workdir):
  """What to tell of a bad step. The state has stood still since, so it can be done again here."""
  step, finite = int(state.step) + 1, lambda loss: abs(loss) < float('inf')
  for i, phase in enumerate(updates.of(run.task)):
    batch, losses, info = each_loss(run, state, i)
    bad = [i for i in range(len(losses)) if not finite(losses[i])]
    of = f' of phase {phase.name}' if phase.name else ''
    if bad:
      break
  what = (
    f'{len(bad)} of {len(losses)} losses{of} are not finite'
    if bad
    else 'all losses are finite, the gradient is not'
  )
  show = bad[:8] or sorted(range(len(losses)), key=lambda i: -losses[i])[:4]
  rows = [
    f'  example {i}: {run.source.name_of(int(batch["index"][i]))}, {_said(info, i)}'
    f'loss {losses[i]:.4g}'
    for i in show
  ]
  return '\n'.join(
    [
      f'step {step}: {what}. The parameters are those before it; no checkpoint was written of it.',
      *rows,
      f'look again: python -m diffax.main --workdir {workdir} --mode replay --step {step}',
    ]
  )


def _said(info, i):
  """Of an example of a denoiser, at what noise it was."""
  return f'noise {info["noise"][i]:.4g} (t={info["t"][i]:.4g}), ' if 'noise' in info else ''


# --- the loop -------------------------------------------------------------------------------------


def branches(like):
  """{name: branch} of a state's arrays in a checkpoint: without the frozen, and without the empty
  ones, which older checkpoints lack."""
  return {
    name: branch
    for name, branch in vars(like).items()
    if name != 'frozen' and jax.tree.leaves(branch)
  }


def _begin(run, checkpoints, warm=None, released=''):
  """(step, state, how): from the newest checkpoint here, else another run's weights or a released
  network's, else anew.
  """
  step, found = checkpoint.restore(checkpoints, branches(run.like))
  if found is not None:
    frozen = sample.frozen(run)
    checkpoint.same(checkpoints.folder, step, {'frozen': frozen})
    found['frozen'] = frozen
    return step, run.like.replace(**found), f'going on from the checkpoint of step {step}'
  state = init(run)
  if warm:
    weights = checkpoint.weights(warm / 'checkpoints', run.like)
    place = jax.tree.map(lambda x: x.sharding, run.like.ema)
    copies = {name: jax.tree.map(jnp.copy, weights['params']) for name in state.ema}
    averages = weights.get('ema', jax.device_put(copies, place))
    state = state.replace(params=weights['params'], ema=averages)
    return 0, state, f'beginning with the weights of {warm}'
  if released:
    net = pipelines.net(released, run.config['model'], run.like.params['net'])
    averages = {
      name: {**average, 'net': jax.device_put(
        jax.tree.map(jnp.copy, net), jax.tree.map(lambda x: x.sharding, average['net']))}
      for name, average in state.ema.items()
    }
    state = state.replace(params={**state.params, 'net': net}, ema=averages)
    return 0, state, f'beginning with the network of {released}'
  return 0, state, 'beginning anew'


def train(run, workdir, warm=None, profile=None, released=''):
  """Trains until `config.steps`, from where the workdir left off. Returns the last state.

  warm: a workdir whose weights a new run begins with; released: a folder or single file, the
  weights of whose network it does (`convert.pipelines`). profile: steps to trace, (first, how
  many). SIGTERM and SIGINT, on any host, save and stop. Raises BadStep at the first look after a
  loss or gradient that was not finite.
  """
  config, keep = run.config, run.config['keep']
  evals = evaluations(run)
  checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', keep['last'], keep['every'])
  averages = checkpoint.Checkpoints(workdir / 'averages', None) if keep['averages'] else None
  start, state, how = _begin(run, checkpoints, warm, released)
  log = logs.Log(
    workdir, start, config['steps'], config['batch_size'], model_flops(run), _peak(run.mesh),
    hosts.first(),
  )
  size = sum(x.size for x in jax.tree.leaves(state.params)) / 1e6
  where = f'{run.mesh.size} devices' + (f' of {hosts.count()} hosts' if hosts.count() > 1 else '')
  log.progress.say(f'{size:.2f} M parameters on {where}, {how}')
  if config['data']['buckets']:
    said = [f'{h} x {w} for {share:.0%}' for (_, h, w, _), share in batch_shapes(run).items()]
    log.progress.say(f'{len(said)} buckets: {", ".join(said)} of the records')
  trace = _Trace(workdir / 'profile', start, profile)
  out = _Out(log, checkpoints, averages, evals, hosts.Watch(config['watchdog']), trace)
  data, stop = batches(run, start), _Stop(run.mesh)
  try:
    state = _loop(run, state, start, data, out, stop)
    out.watch.at(config['steps'], 'saving', patient=True)
    checkpoints.wait()
    if int(state.step) == config['steps']:
      log.curve()
  except _Bad as bad:
    raise BadStep(_explain(run, bad.args[0], workdir)) from None
  finally:
    stop.restore()
    trace.close()
    data.close()
    checkpoints.close()
    if averages:
      averages.close()
    log.close()
    out.watch.close()
  return state


def model_flops(run):
  """FLOPs of a training step, of all its phases; of buckets the mean."""
  return sum(share * _flops(run, shape) for shape, share in batch_shapes(run).items())


def _flops(run, shape):
  batch = _batch_like(run, shape)
  keys = jax.eval_shape(lambda: example_keys(0, 0, run.config['batch_size']))
  parts = enumerate(updates.of(run.task))
  return sum(updates.flops_of(i, phase, run.like, batch, keys) for i, phase in parts)


def _peak(mesh):
  """FLOP/s of all devices of a mesh in bfloat16, None where it is not known."""
  each = chips.peak(mesh.devices.flat[0].device_kind)
  return each and each * mesh.size


class _Out(NamedTuple):
  """Where a run's results go. averages: None where none are kept; evals: {name: `Evaluation`}."""

  log: Any
  checkpoints: Any
  averages: Any
  evals: dict
  watch: Any
  trace: Any


class _Trace:
  """Traces some steps for a profiler to show. steps: (first, how many), None for none."""

  def __init__(self, folder, start, steps):
    first, count = steps or (0, 0)
    self.folder, self.running = folder, False
    self.first = max(first, start + 1) if count else 0
    self.last = self.first + count - 1

  def before(self, step):
    if step == self.first:
      jax.profiler.start_trace(str(self.folder))
      self.running = True

  def after(self, step, log, waits):
    """waits: what the step computed, to be there before the trace ends."""
    if self.running and step == self.last:
      jax.block_until_ready(waits)
      self.close()
      log.progress.say(
        f'traced steps {self.first} to {step} into {self.folder}: tensorboard --logdir '
        f'{self.folder} (pip install tensorboard-plugin-profile), or the .json.gz in it at '
        'https://ui.perfetto.dev'
      )

  def close(self):
    if self.running:
      self.running = False
      jax.profiler.stop_trace()


def _loop(run, state, start, data, out, stop):
  """Steps until the end or a signal. Raises _Bad with the state."""
  config, log, watch, in_flight = run.config, out.log, out.watch, collections.deque()
  watch.at(start, 'compiling', patient=True)
  step_fn = compile_step(run) if start < config['steps'] else None
  hosts.wait()
  _evaluate(state, start, run, out, stop)  # what an interrupted run had no time for
  log.restart(start)
  for step in range(start + 1, config['steps'] + 1):
    watch.at(step, 'data')
    batch = _next(data, step, log)
    watch.at(step, 'the step')
    out.trace.before(step)
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      state, metrics = step_fn(state, batch)
    in_flight.append((metrics['loss'], stop.share()))
    if len(in_flight) > IN_FLIGHT:
      loss, shared = in_flight.popleft()
      loss.block_until_ready()
      stop.heard(shared)
    out.trace.after(step, log, state)
    if step % config['log_every'] == 0 and log.push(step, metrics):
      raise _Bad(state)
    saved = step == config['steps'] or step % config['save_every'] == 0
    if saved:
      _save(state, step, out)
    if out.averages and step % config['keep']['averages'] == 0:
      _keep(state, step, out)
    if not stop.agreed:
      _evaluate(state, step, run, out, stop)
    if stop.agreed:
      if not saved:
        _save(state, step, out)
      log.progress.say(f'{stop.agreed}: stopped at step {step}; the same command goes on from it')
      break
  return state


def _next(data, step, log):
  """The next batch; how long it was waited for is noted. Raises ConfigError for a broken record,
  WorkerGone.
  """
  began = time.perf_counter()
  try:
    return next(data)
  except ValueError as error:  # a broken record, which the message names
    raise ConfigError(f'step {step}: {" ".join(str(error).split())}') from error
  except RuntimeError as error:
    raise WorkerGone(
      f'step {step}: a data worker is gone ({" ".join(str(error).split())[:200]}); where memory is '
      'short, take fewer config.data.workers; the same command goes on from the last checkpoint'
    ) from error
  finally:
    log.waited += time.perf_counter() - began


def _settle(state, log):
  """Waits for what is under way. Raises _Bad where it was not finite."""
  if log.settle() or bool(state.bad):
    raise _Bad(state)


def _save(state, step, out):
  out.watch.at(step, 'saving', patient=True)
  _settle(state, out.log)
  out.log.flush()  # so that no checkpoint is newer than what is written of it
  out.checkpoints.save(step, state)


def _keep(state, step, out):
  """Keeps the power-function averages, of which any other width is made later (`sample.restore`).

  A step that is there is not written again: a run that goes on comes to the same.
  """
  out.watch.at(step, 'saving', patient=True)
  _settle(state, out.log)
  if step not in hosts.tell(out.averages.steps()):
    out.averages.save(step, {name: state.ema[name] for name in ema.powers(state.ema)})


def _evaluate(state, step, run, out, stop):
  """Carries out what is due at `step` and not done yet. A signal ends it; a resume does the rest.
  """
  due = [name for name in evaluate.due(run.config, step) if name in out.evals]
  if not due:
    return
  out.watch.at(step, 'evaluating', patient=True)
  _settle(state, out.log)
  done = hosts.tell(out.log.evaluations(step))
  for name in (name for name in due if name not in done):
    found = evaluate.carry_out(
      name, out.evals[name], state, step, out.log.workdir, stop.ask
    )
    if found is None:
      return
    out.log.evaluated(step, name, found)
  out.log.restart(step)


def evaluations(run):
  """{name: `Evaluation`} of the config's entries. Raises ConfigError."""
  for spec in run.config['evals'].values():
    if spec['every'] and spec.get('ema', '') not in ('', 'none'):
      sample.choose(run.like, spec['ema'])  # averages of other widths are made of a finished run
  return evaluate.entries(run)


class _Bad(Exception):
  """Carries the state, which has stood still since the bad step."""


class _Stop:
  """Notes a SIGTERM or SIGINT for the loop to see; a second one ends the process as ever.

  signal: what came here. agreed: what all hosts know of, and act on at the same step: each sends
  what it has heard along with every step (`share`), and learns what all had heard when that step is
  done (`heard`), so that no host waits for another. A single host knows at once.
  """

  def __init__(self, mesh):
    self.signal = self.agreed = ''
    self._mesh, self._before = mesh, {}
    self._place = sharding.everywhere(mesh)
    self._any = jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._note)

  def _note(self, number, frame):
    del frame
    self.signal = signal.Signals(number).name
    if hosts.count() == 1:
      self.agreed = self.signal
    self.restore()

  def share(self):
    """What this host has heard, on its way to all of them."""
    if hosts.count() == 1:
      return None
    flag = np.asarray([bool(self.signal)])
    size = (self._mesh.size,)
    return self._any(jax.make_array_from_callback(size, self._place, lambda index: flag))

  def heard(self, shared):
    """Takes what `share` gave, of a step that is done."""
    if shared is not None and bool(shared):
      self.agreed = self.signal or 'a signal on another host'

  def ask(self):
    """Whether to stop, now; all hosts call it together."""
    if not self.agreed and hosts.some(self.signal):
      self.agreed = self.signal or 'a signal on another host'
    return bool(self.agreed)

  def restore(self):
    for number, handler in self._before.items():
      signal.signal(number, handler)
