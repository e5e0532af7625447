"""A run that is interrupted ends with the bits of one that is not; on one device and on eight."""

import os
import pty
import shutil
import signal
import termios

from etils import epath
import numpy as np
import pytest
import run_diffax

from diffax import checkpoint
from diffax import train

STEPS = 20
# Averages of three steps are logged, checkpoints fall between them: sums are carried over.
# So are the losses that times are drawn by.
OVERRIDES = ('data.name=run_diffax.digits', 'log_every=3', 'save_every=5', 'model.dropout=0.1',
             'loss.importance=3', 'loss.draw=stratified')
ARGUMENTS = (
  f'--config={run_diffax.SMOKE}', *(f'--config.{o}' for o in OVERRIDES))
MESH = {1: (), 8: ('--config.mesh.data=2', '--config.mesh.fsdp=4')}
SLOW = 0.002  # seconds a record, 64 ms a step


def start(workdir, count, sleep=SLOW, **options):
  return run_diffax.Process(
    workdir, *ARGUMENTS, *MESH[count], count=count, sleep=sleep, **options)


def finish(workdir, count):
  process = start(workdir, count, sleep=0)
  assert process.end() == 0, process.text()
  return process.text()


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """A function: the workdir of a run of 20 steps on so many devices, not interrupted."""
  done = {}

  def run(count):
    if count not in done:
      done[count] = tmp_path_factory.mktemp('straight') / f'on{count}'
      finish(done[count], count)
    return done[count]

  return run


def assert_same_end(workdir, straight):
  """Parameters, averages, optimizer, sums and all that was logged: equal bits."""
  run_diffax.assert_same(
    run_diffax.arrays(workdir, STEPS), run_diffax.arrays(straight, STEPS))
  assert run_diffax.numbers(workdir) == run_diffax.numbers(straight)
  assert [row['step'] for row in run_diffax.numbers(workdir)] == list(range(3, STEPS, 3))


def kill_while_saving(workdir, count):
  """Kills a run that has an unfinished checkpoint on disk; the process is stopped for the look."""
  unfinished = lambda: list(workdir.glob('checkpoints/*.orbax-checkpoint-tmp'))
  for _ in range(5):
    process = start(workdir, count)
    while process.until(unfinished):
      process.process.send_signal(signal.SIGSTOP)
      if unfinished():
        process.send(signal.SIGKILL)
        return
      process.process.send_signal(signal.SIGCONT)
    shutil.rmtree(workdir)  # it came to its end: too quick to be caught
  pytest.fail('no unfinished checkpoint was ever seen')


@pytest.mark.parametrize('count', [pytest.param(1, marks=pytest.mark.slow), 8])
def test_kill(count, straight, tmp_path):
  workdir = tmp_path / 'run'
  if count == 1:  # before the first step
    process = start(workdir, count)
    process.says('beginning anew')
    assert process.send(signal.SIGKILL) == -signal.SIGKILL
  kill_while_saving(workdir, count)
  assert list(workdir.glob('checkpoints/*.orbax-checkpoint-tmp'))
  assert not (workdir / 'checkpoints' / str(STEPS)).exists()
  process = start(workdir, count)  # between two checkpoints, after some lines of metrics
  process.says('step 12/20')
  assert process.until((workdir / 'checkpoints' / '10').exists)  # it is written beside the steps
  assert process.send(signal.SIGKILL) == -signal.SIGKILL
  newest = checkpoint.present(workdir / 'checkpoints')[-1]
  assert newest in (10, 15)
  assert f'going on from the checkpoint of step {newest}' in finish(workdir, count)
  assert not list(workdir.glob('checkpoints/*tmp*'))
  assert_same_end(workdir, straight(count))


def test_signals(straight, tmp_path, monkeypatch):
  """SIGTERM, then Ctrl-C on a terminal: each saves at once, says so and ends with status 0, or as
  the environment asks.
  """
  workdir = tmp_path / 'run'
  monkeypatch.setenv('DIFFAX_STOP_STATUS', '75')
  process = start(workdir, 1)
  process.says('step 6/20')
  assert process.send(signal.SIGTERM) == 75, process.text()
  monkeypatch.delenv('DIFFAX_STOP_STATUS')
  stopped = checkpoint.present(workdir / 'checkpoints')[-1]
  assert 6 <= stopped < STEPS
  assert f'SIGTERM: stopped at step {stopped}' in process.text()

  ours, theirs = pty.openpty()
  termios.tcsetwinsize(ours, (24, 100))
  process = start(workdir, 1, terminal=theirs)
  os.close(theirs)
  screen = Screen(ours)
  assert process.until(lambda: '15/20' in screen.read()), screen.text
  assert process.send(signal.SIGINT) == 0, screen.read()
  stopped = checkpoint.present(workdir / 'checkpoints')[-1]
  assert 15 <= stopped
  assert f'SIGINT: stopped at step {stopped}' in screen.read()
  for part in ('%|', '15/20', 'loss ', ' steps/s', ' images/s'):  # a bar
    assert part in screen.text
  assert 'step 15/20' not in screen.text  # not the plain lines
  os.close(ours)

  finish(workdir, 1)
  assert_same_end(workdir, straight(1))


class Screen:
  """What a process wrote to a terminal."""

  def __init__(self, descriptor):
    os.set_blocking(descriptor, False)
    self.descriptor, self.text = descriptor, ''

  def read(self):
    try:
      while data := os.read(self.descriptor, 65536):
        self.text += data.decode(errors='replace')
    except OSError:  # nothing more now, or the other end is closed
      pass
    return self.text


def test_fewer_devices(straight, tmp_path):
  """From 8 devices onto 4: what is restored has the same bits, what follows the same values."""
  workdir = tmp_path / 'run'
  shutil.copytree(straight(8), workdir)
  for step in (15, 20):
    shutil.rmtree(workdir / 'checkpoints' / str(step))
  run = run_diffax.setup(*OVERRIDES, 'mesh.fsdp=2', count=4)
  restored = checkpoint.read(workdir / 'checkpoints', 10, run.like)
  run_diffax.assert_same(run_diffax.flat(restored), run_diffax.arrays(straight(8), 10))
  kernel = restored.params['net']['blocks']['mlp_in']['kernel']
  assert len(kernel.sharding.device_set) == 4
  assert kernel.addressable_shards[0].data.size == kernel.size // 2

  end = run_diffax.flat(train.train(run, epath.Path(workdir)))
  wanted = run_diffax.arrays(straight(8), STEPS)
  for key in wanted:
    if 'key/bias' in key:  # softmax knows no such shift: a gradient of rounding, which Adam scales
      continue
    np.testing.assert_allclose(end[key], wanted[key], rtol=1e-3, atol=1e-5, err_msg=key)
  for row, other in zip(run_diffax.numbers(workdir), run_diffax.numbers(straight(8)), strict=True):
    assert row == pytest.approx(other, rel=1e-5)


def large_files(folder):
  files = [p for p in folder.rglob('*') if p.is_file()]
  return sorted(p for p in files if p.stat().st_size > 4096)


def test_truncated_files(straight, tmp_path):
  """Whichever file of the newest checkpoint is cut, no wrong number is ever read."""
  run = run_diffax.setup(*OVERRIDES, 'mesh.data=2', 'mesh.fsdp=4', count=8)
  wanted = {step: run_diffax.arrays(straight(8), step) for step in (15, 20)}
  newest = straight(8) / 'checkpoints' / '20'
  files = [*large_files(newest), newest / 'default' / '_METADATA', newest / '_CHECKPOINT_METADATA',
           newest / 'default' / 'manifest.ocdbt']
  set_aside = 0
  for number, file in enumerate(files):
    workdir = tmp_path / str(number)
    shutil.copytree(straight(8) / 'checkpoints', workdir / 'checkpoints')
    damaged = workdir / 'checkpoints' / '20' / file.relative_to(newest)
    damaged.write_bytes(damaged.read_bytes()[:damaged.stat().st_size // 2 * (file in files[:-3])])
    checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints')
    step, state = checkpoint.restore(checkpoints, run.like)
    checkpoints.close()
    run_diffax.assert_same(run_diffax.flat(state), wanted[step])
    set_aside += step == 15
    assert (workdir / 'checkpoints' / 'unreadable-20').exists() == (step == 15), file
  assert set_aside >= 2, 'no damage was ever noticed'


@pytest.mark.parametrize('damage', ['cut in half', 'no metadata'])
def test_truncated_checkpoint(damage, straight, tmp_path, caplog, capfd):
  """Through the door: said, set aside, done again from the one before, to the same bits."""
  workdir = tmp_path / 'run'
  shutil.copytree(straight(8), workdir)
  newest = workdir / 'checkpoints' / '20'
  if damage == 'no metadata':
    (newest / 'default' / '_METADATA').write_bytes(b'')
  else:
    for file in large_files(newest):
      os.truncate(file, file.stat().st_size // 2)
  run_diffax.door('--workdir', workdir, *ARGUMENTS, *MESH[8])
  assert 'checkpoint 20 cannot be read' in caplog.text
  assert 'going on from the checkpoint of step 15' in capfd.readouterr().err
  assert (workdir / 'checkpoints' / 'unreadable-20').exists()
  assert_same_end(workdir, straight(8))


def test_plain_lines(straight):
  """Where there is no terminal, a line a report."""
  text = straight(1).with_name('on1.output').read_text()
  line = next(line for line in text.splitlines() if line.startswith('step 18/20'))
  assert all(part in line for part in ('loss ', ' steps/s', ' images/s', ' left'))
  assert '%|' not in text and '\r' not in text
