"""What a run says: metrics.jsonl, TensorBoard events that its own reader reads, progress."""

import io
import json
import os
import pty
import termios
import time

from etils import epath
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from diffax import images
from diffax import log as logs


def run(workdir, start, stop, wrong=0.0):
  """A log of steps start + 1 .. stop, with loss 1 / step and a picture every fifth."""
  log = logs.Log(workdir, start, 100, 32)
  for step in range(start + 1, stop + 1):
    metrics = dict(loss=1 / step + wrong, grad_norm=2.0, bad=False)
    assert not log.push(step, {k: jnp.asarray(v) for k, v in metrics.items()})
    if step % 5 == 0:
      log.evaluated(step, 'samples', [('samples', np.full((8, 6, 3), step, np.uint8))])
  assert not log.settle()
  return log


def test_resumed_metrics(tmp_path):
  """Each step once, though the first process came further and was killed in the midst of a line."""
  log = run(epath.Path(tmp_path), 0, 12, wrong=1.0)
  log.flush()
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 13, "los')
  run(epath.Path(tmp_path), 10, 20).close()
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row['step'] for row in rows] == list(range(1, 21))
  assert [round(row['loss'] - 1 / row['step']) for row in rows] == [1] * 10 + [0] * 10
  assert {'steps_per_second', 'images_per_second'} <= rows[0].keys()


def test_bad_is_told_and_not_written(tmp_path):
  log = logs.Log(epath.Path(tmp_path), 0, 100, 32)
  bad = dict(loss=jnp.asarray(jnp.nan), bad=jnp.asarray(True))
  assert not log.push(1, bad)  # not looked at yet: no device is waited for
  assert log.settle()
  log.close()
  assert logs.read_metrics(epath.Path(tmp_path) / 'metrics.jsonl') == []


def test_tensorboard(tmp_path):
  """Stock TensorBoard reads scalars and pictures, and no step twice after a resume."""
  reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
  run(epath.Path(tmp_path), 0, 12, wrong=1.0).close()
  run(epath.Path(tmp_path), 10, 20).close()
  events = reader.EventAccumulator(
    str(tmp_path / 'tensorboard'), size_guidance={reader.SCALARS: 0, reader.IMAGES: 0})
  events.Reload()
  assert {'loss', 'grad_norm', 'steps_per_second'} <= set(events.Tags()['scalars'])
  scalars = events.Scalars('loss')
  assert [e.step for e in scalars] == list(range(1, 21))
  wanted = [1 / s + (s <= 10) for s in range(1, 21)]
  np.testing.assert_allclose([e.value for e in scalars], wanted, rtol=1e-6)
  pictures = events.Images('samples')
  assert [(e.step, e.width, e.height) for e in pictures] == [(s, 6, 8) for s in (5, 10, 15, 20)]
  decoded = np.asarray(Image.open(io.BytesIO(pictures[-1].encoded_image_string)))
  np.testing.assert_array_equal(decoded, np.full((8, 6, 3), 20))
  np.testing.assert_array_equal(
    np.asarray(Image.open(tmp_path / 'images' / 'samples_0000020.png')), decoded)


def test_no_curve_of_nothing(tmp_path):
  """A run shorter than `log_every` ends well."""
  log = run(epath.Path(tmp_path), 0, 0)
  log.curve()
  log.close()
  assert not (tmp_path / 'images' / 'loss.png').exists()


def test_curve(tmp_path):
  log = run(epath.Path(tmp_path), 0, 12)
  log.curve()
  log.close()
  assert np.asarray(Image.open(tmp_path / 'images' / 'loss.png')).std() > 1


def test_progress(tmp_path):
  """A bar on a terminal, lines elsewhere."""
  plain = io.StringIO()
  progress = logs.Progress(0, 1000, 32, plain)
  progress.show(10, 0.25, time.perf_counter() + 1)
  progress.close()
  assert plain.getvalue().startswith('step 10/1000  loss 0.2500  ')
  assert all(part in plain.getvalue() for part in (' steps/s', ' images/s', ' left\n'))

  ours, theirs = pty.openpty()
  termios.tcsetwinsize(ours, (24, 100))
  with open(theirs, 'w') as terminal:
    progress = logs.Progress(0, 1000, 32, terminal)
    progress.show(10, 0.25, time.perf_counter() + 1)
    progress.close()
    text = ''
    while 'images/s' not in text:  # the terminal hands on what it has by then
      text += os.read(ours, 65536).decode()
  os.close(ours)
  assert all(part in text for part in ('%|', '10/1000', 'loss 0.2500', 'steps/s', 'images/s'))


def test_rate(monkeypatch):
  """Steps a second since the last report, without what was done between (`restart`)."""
  now = iter([0.0, 10.0])
  monkeypatch.setattr(logs.time, 'perf_counter', lambda: next(now))
  progress = logs.Progress(0, 100, 32, io.StringIO())
  assert progress.show(10, 1.0, now=2.0) == 5
  progress.restart(10)
  assert progress.show(14, 1.0, now=11.0) == 4


def test_speed(tmp_path, monkeypatch):
  """What a row says of how the run goes; time between `restart` and a push is a step's."""
  now = [0.0]
  monkeypatch.setattr(logs.time, 'perf_counter', lambda: now[0])
  log = logs.Log(epath.Path(tmp_path), 0, 100, 32, flops=3e12, peak=60e12)
  now[0] = 50.0
  log.restart(0)  # compiling took so long
  for step, at, waited in ((10, 52.0, 0.5), (20, 54.0, 1.5)):
    now[0], log.waited = at, waited
    log.push(step, dict(loss=jnp.asarray(1.0), bad=jnp.asarray(False)))
  log.settle()
  log.close()
  first, second = logs.read_metrics(epath.Path(tmp_path) / 'metrics.jsonl')
  wanted = dict(steps_per_second=5.0, images_per_second=160.0, teraflops_per_second=15.0, mfu=0.25)
  for row, share in ((first, 0.25), (second, 0.5)):
    assert row['input_wait'] == share and 0.05 < row['memory_gb'] < 100
    assert {k: row[k] for k in wanted} == wanted
  assert set(logs.SPEED) < first.keys()


def test_grid():
  """Row by row, blank where nothing is left, each pixel a square."""
  pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
  found = images.grid(pictures, columns=3, gap=1, smallest=8)
  assert found.shape == (2 * 10, 3 * 10, 1)
  centres = found[5::10, 5::10, 0]
  np.testing.assert_array_equal(centres, [[0, 1, 2], [3, 4, 255]])
  assert (found[1:9, 11:19] == 1).all()
