"""Doing one training step again, to look at it: its examples, their noise levels and losses."""

from diffax import checkpoint
from diffax import sample
from diffax import train
from diffax.build import ConfigError


def state_before(run, workdir, step, show=print):
  """The state that training step `step` (from 1) began with.

  From the last checkpoint before it, and from there by training again, which is exact. Writes
  nothing.
  """
  if not 1 <= step <= run.config['steps']:
    raise ConfigError(f'--step={step}: the steps of this run are 1 to {run.config["steps"]}')
  folder, start, state = workdir / 'checkpoints', 0, None
  before = [s for s in checkpoint.present(folder) if s < step]
  while state is None and before:
    start = before.pop()
    try:
      found = checkpoint.read(folder, start, train.branches(run.like))
      state = run.like.replace(**found, frozen=sample.frozen(run))
    except Exception as error:  # of many kinds
      show(f'checkpoint {start} cannot be read ({type(error).__name__})')
      start = 0
  state = train.init(run) if state is None else state
  if start < step - 1:
    show(f'training again from step {start} to {step - 1}')
    step_fn = train.compile_step(run)
    batches = train.batches(run, start)
    for _ in range(start, step - 1):
      state, _ = step_fn(state, next(batches))
    batches.close()
  if int(state.step) != step - 1:
    raise ConfigError(
      f'--step={step}: the run went bad in step {int(state.step) + 1} and came no further'
    )
  return state


def replay(run, workdir, step, show=print):
  """Shows step `step`: an example a line, by falling loss, of each of the task's phases.

  Returns (batch, losses [b], info), of the first.
  """
  state = state_before(run, workdir, step, show)
  found = train.each_loss(run, state)
  _show(run, f'step {step}', *found, show)
  for i, phase in enumerate(run.task.phases[1:], 1):
    _show(run, f'step {step}, phase {phase.name}', *train.each_loss(run, state, i), show)
  return found


def _show(run, title, batch, losses, info, show):
  columns = {k: v for k, v in info.items() if k != 'noise'}
  noise = info.get('noise')
  show(f'{title}: mean loss {losses.mean():.6g} over {len(losses)} examples')
  show(
    f'{"example":>7}  {"loss":>10}  '
    + (f'{"noise":>9}  ' if noise is not None else '')
    + ''.join(f'{k:>8}  ' for k in columns)
    + 'record'
  )
  for i in sorted(
    range(len(losses)), key=lambda i: -losses[i] if losses[i] == losses[i] else -float('inf')
  ):
    rest = ''.join(f'{v[i]:>8.4f}  ' for v in columns.values())
    rest = (f'{noise[i]:>9.4g}  ' if noise is not None else '') + rest
    record = run.source.name_of(int(batch['index'][i]))
    show(f'{i:>7}  {losses[i]:>10.4g}  {rest}{record}')
