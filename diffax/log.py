"""What a run says of itself: metrics.jsonl, TensorBoard events, a progress bar or plain lines.

Beside what a step computes, a row holds how the run goes (`SPEED`), since the row before:

  steps_per_second, images_per_second
  teraflops_per_second    of the model, on all devices: three times the FLOPs of a forward pass
  mfu                     the same as a share of the devices' peak, where that is known
  input_wait              share of the time that the devices' host waited for data
  memory_gb               in use on the fullest device of the first host at its most; on a CPU, of
                          the process
"""

import collections
import io
import json
import os
import resource
import sys
import time

from etils import epath
import numpy as np


SPEED = ('steps_per_second', 'images_per_second', 'teraflops_per_second', 'mfu', 'input_wait',
         'memory_gb')


def memory():
  """Bytes in use at their most, of the fullest of this host's devices; on a CPU, of the process."""
  import jax

  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  most = max(each.get('peak_bytes_in_use', 0) for each in stats)
  unit = 1 if sys.platform == 'darwin' else 1024
  return most or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _local(path):
  return '://' not in str(path)


class Metrics:
  """`metrics.jsonl` and `evals.jsonl`: an object a line, none twice, also after a resume.

  A resumed run drops the lines beyond the step it goes on from, and a line that a kill cut short.
  On a bucket, which cannot be appended to, the whole file is written at each flush.
  """

  def __init__(self, path, resumed_at=0):
    self.path = epath.Path(path)
    kept = [row for row in read_metrics(self.path) if row['step'] <= resumed_at]
    self._text = ''.join(json.dumps(row) + '\n' for row in kept)
    if self.path.exists():
      scratch = self.path.parent / (self.path.name + '.new')
      scratch.write_text(self._text)
      scratch.replace(self.path)
    self._file = open(self.path, 'a') if _local(self.path) else None

  def write(self, row):
    line = json.dumps(row) + '\n'
    if self._file:
      self._file.write(line)
    else:
      self._text += line

  def flush(self):
    """Returns when every line is on disk."""
    if self._file:
      self._file.flush()
      os.fsync(self._file.fileno())
    else:
      self.path.write_text(self._text)

  def close(self):
    self.flush()
    if self._file:
      self._file.close()


def read_metrics(path):
  """The rows of a metrics.jsonl, [] where there is none; a last line cut short is left out."""
  path = epath.Path(path)
  rows = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      rows.append(json.loads(line))
    except ValueError:
      break
  return rows


class Log:
  """Writes metrics and pictures of a run to its workdir, and its progress to the terminal.

  flops: of a step, 0 where not known. peak: FLOP/s of all devices, None where not known. writes:
  whether this host does; one that does not takes the same calls, and says as well what was bad.
  """

  def __init__(self, workdir, resumed_at, steps, batch_size, flops=0, peak=None, writes=True):
    self.workdir, self.writes = epath.Path(workdir), writes
    self.flops, self.peak = flops, peak
    self.waited = 0.0  # seconds for data, in all
    self.progress = Progress(resumed_at, steps, batch_size, None if writes else Silent())
    self._pending, self._marked = collections.deque(), (time.perf_counter(), 0.0)
    if writes:
      self._open(resumed_at)

  def _open(self, resumed_at):
    from tensorboardX import SummaryWriter

    (self.workdir / 'images').mkdir(parents=True, exist_ok=True)
    self.metrics = Metrics(self.workdir / 'metrics.jsonl', resumed_at)
    self.evals = Metrics(self.workdir / 'evals.jsonl', resumed_at)
    self.events = SummaryWriter(
      str(self.workdir / 'tensorboard'),
      purge_step=resumed_at + 1,
      filename_suffix=f'.{time.time_ns()}',  # else two starts in one second share a file
    )

  def restart(self, step):
    """Time from here on: what came before (compiling, pictures) is not a step's."""
    self.progress.restart(step)
    self._marked = time.perf_counter(), self.waited

  def push(self, step, metrics):
    """Takes device arrays to be written at the next push, so that no device waits for it.

    metrics: {name: scalar}, among them `bad`. Returns whether those written now were bad.
    """
    bad = self.settle()
    self._pending.append((step, metrics, time.perf_counter(), self.waited))
    return bad

  def settle(self):
    """Waits for and writes what was pushed. Returns whether it was bad: not finite, not written."""
    while self._pending:
      step, metrics, *marked = self._pending.popleft()
      values = {name: value.item() for name, value in metrics.items()}
      if values.pop('bad'):
        return True
      self.write(step, values | self._speed(step, values['loss'], *marked))
    return False

  def _speed(self, step, loss, now, waited):
    rate = self.progress.show(step, loss, now)
    then, before = self._marked
    self._marked = now, waited
    speed = {
      'steps_per_second': rate,
      'images_per_second': rate * self.progress.batch_size,
      'input_wait': (waited - before) / max(now - then, 1e-9),
      'memory_gb': memory() / 1e9,
    }
    if self.flops:
      speed['teraflops_per_second'] = rate * self.flops / 1e12
    if self.flops and self.peak:
      speed['mfu'] = rate * self.flops / self.peak
    return speed

  def write(self, step, values):
    """A row of numbers at `step`."""
    if not self.writes:
      return
    self.metrics.write({'step': step} | values)
    for key, value in values.items():
      self.events.add_scalar(key, value, step)

  def evaluated(self, step, name, pairs):
    """What evaluation `name` found at `step`: a row of evals.jsonl, pictures in images/, events.

    pairs: (name, number or uint8 [h w c]); of a picture, the row holds the file.
    """
    from diffax import images

    if not self.writes:
      return
    row = {'step': step, 'eval': name}
    for key, value in pairs:
      if np.ndim(value) == 3:
        row[key] = f'images/{images.name(key, step)}'
        images.save(self.workdir / row[key], value)
        self.events.add_image(key, value, step, dataformats='HWC')
      else:
        row[key] = float(value)
        self.events.add_scalar(key, row[key], step)
    self.evals.write(row)
    self.evals.flush()

  def evaluations(self, step):
    """The names of the evaluations that were done at `step`, as far as this host wrote them."""
    rows = read_metrics(self.evals.path) if self.writes else []
    return sorted({row['eval'] for row in rows if row['step'] == step})

  def curve(self):
    """images/loss.png, of all that was logged, if anything was."""
    from diffax import images

    self.flush()
    rows = read_metrics(self.metrics.path) if self.writes else []
    steps, losses = [row['step'] for row in rows], [row['loss'] for row in rows]
    if not rows:  # a run shorter than log_every
      return
    images.curve(self.workdir / 'images' / 'loss.png', steps, losses, self.workdir.name)

  def flush(self):
    if self.writes:
      self.metrics.flush()
      self.events.flush()

  def close(self):
    self.progress.close()
    if self.writes:
      self.metrics.close()
      self.evals.close()
      self.events.close()


class Silent(io.StringIO):
  """The terminal of a host that does not speak."""

  def write(self, text):
    return len(text)


class Progress:
  """A bar on a terminal, plain lines elsewhere: loss, steps/s, images/s and time left."""

  def __init__(self, start, steps, batch_size, stream=None):
    stream = stream or sys.stderr
    self.steps, self.batch_size, self.stream = steps, batch_size, stream
    self.bar, self.mark = None, (start, time.perf_counter())
    if stream.isatty():
      from tqdm import tqdm

      form = '{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}  {elapsed}<{remaining}  {desc}'
      self.bar = tqdm(total=steps, initial=start, file=stream, bar_format=form, dynamic_ncols=True)

  def restart(self, step):
    """Time from here on: what came before (compiling, pictures) is not a step's."""
    self.mark = (step, time.perf_counter())

  def show(self, step, loss, now):
    """Reports `step`, of time `now`, and its loss; returns the steps a second since the last."""
    rate = (step - self.mark[0]) / max(now - self.mark[1], 1e-9)
    self.mark = (step, now)
    text = f'loss {loss:.4f}  {rate:.1f} steps/s  {rate * self.batch_size:.0f} images/s'
    if self.bar is not None:
      self.bar.n = step
      self.bar.set_description_str(text, refresh=True)
    else:
      left = (self.steps - step) / max(rate, 1e-9)
      left = (
        f'{left // 3600:.0f}h{left % 3600 // 60:02.0f}m'
        if left >= 3600
        else f'{left // 60:.0f}m{left % 60:02.0f}s'
      )
      print(f'step {step}/{self.steps}  {text}  {left} left', file=self.stream, flush=True)
    return rate

  def say(self, text):
    """A line of its own, above the bar."""
    if self.bar is not None:
      self.bar.write(text, file=self.stream)
    else:
      print(text, file=self.stream, flush=True)

  def close(self):
    if self.bar is not None:
      self.bar.close()
