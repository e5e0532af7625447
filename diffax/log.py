"""What a run says of itself: metrics.jsonl, TensorBoard events, a progress bar or plain lines."""

import collections
import json
import os
import sys
import time

from etils import epath
import numpy as np


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
  """Writes metrics and pictures of a run to its workdir, and its progress to the terminal."""

  def __init__(self, workdir, resumed_at, steps, batch_size):
    from tensorboardX import SummaryWriter

    self.workdir = epath.Path(workdir)
    (self.workdir / 'images').mkdir(parents=True, exist_ok=True)
    self.metrics = Metrics(self.workdir / 'metrics.jsonl', resumed_at)
    self.evals = Metrics(self.workdir / 'evals.jsonl', resumed_at)
    self.events = SummaryWriter(
      str(self.workdir / 'tensorboard'),
      purge_step=resumed_at + 1,
      filename_suffix=f'.{time.time_ns()}',  # else two starts in one second share a file
    )
    self.progress = Progress(resumed_at, steps, batch_size)
    self._pending = collections.deque()

  def push(self, step, metrics):
    """Takes device arrays to be written at the next push, so that no device waits for it.

    metrics: {name: scalar}, among them `bad`. Returns whether those written now were bad.
    """
    bad = self.settle()
    self._pending.append((step, metrics, time.perf_counter()))
    return bad

  def settle(self):
    """Waits for and writes what was pushed. Returns whether it was bad: not finite, not written."""
    while self._pending:
      step, metrics, pushed = self._pending.popleft()
      values = {name: value.item() for name, value in metrics.items()}
      if values.pop('bad'):
        return True
      rate = self.progress.show(step, values['loss'], pushed)
      images = rate * self.progress.batch_size
      self.write(step, values | {'steps_per_second': rate, 'images_per_second': images})
    return False

  def write(self, step, values):
    """A row of numbers at `step`."""
    self.metrics.write({'step': step} | values)
    for key, value in values.items():
      self.events.add_scalar(key, value, step)

  def evaluated(self, step, name, pairs):
    """What evaluation `name` found at `step`: a row of evals.jsonl, pictures in images/, events.

    pairs: (name, number or uint8 [h w c]); of a picture, the row holds the file.
    """
    from diffax import images

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
    """The names of the evaluations that were done at `step`."""
    return {row['eval'] for row in read_metrics(self.evals.path) if row['step'] == step}

  def curve(self):
    """images/loss.png, of all that was logged, if anything was."""
    from diffax import images

    self.flush()
    rows = read_metrics(self.metrics.path)
    steps, losses = [row['step'] for row in rows], [row['loss'] for row in rows]
    if not rows:  # a run shorter than log_every
      return
    images.curve(self.workdir / 'images' / 'loss.png', steps, losses, self.workdir.name)

  def flush(self):
    self.metrics.flush()
    self.events.flush()

  def close(self):
    self.progress.close()
    self.metrics.close()
    self.evals.close()
    self.events.close()


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
