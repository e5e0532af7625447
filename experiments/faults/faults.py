"""What becomes of a run that something happens to: each fault for real, on real processes.

  python experiments/faults/faults.py                       # all of them, a table
  python experiments/faults/faults.py kill truncated --times 5
  python experiments/faults/faults.py --hosts 2 --devices 2 --out experiments/faults/results

A run of several hosts on this machine is disturbed, started again with the same command, and must
end with the very numbers of a run that nothing happened to: every array of its last checkpoint and
every logged loss. Lost are the steps between the last checkpoint that was finished and the fault,
which are done again. A fault that the run should notice must be named in what it prints.
"""

import argparse
import json
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / 'launch')]

import local  # noqa: E402
import small  # noqa: E402

SLOW = 0.01  # seconds a record: the time there is to do something
PATIENCE = 240  # seconds a run may take


class Failed(Exception):
  """A run did not stand a fault."""


class Cluster:
  """`python -m diffax.main` on several hosts; what they print goes to a file."""

  def __init__(self, workdir, hosts=2, devices=2, overrides=(), env=(), of_host=None):
    self.workdir, self.output = workdir, pathlib.Path(f'{workdir}.output')
    self.file = open(self.output, 'a')
    self.begin = self.output.stat().st_size
    command = [sys.executable, '-m', 'diffax.main', f'--config={HERE / "small.py"}']
    command += [f'--workdir={workdir}', *(f'--config.{o}' for o in overrides)]
    args = argparse.Namespace(hosts=hosts, devices=devices, command=command)
    before = dict(os.environ)
    os.environ.update({
      'PYTHONPATH': os.pathsep.join([str(ROOT), str(HERE)]),
      'DIFFAX_CACHE': str(workdir.parent / 'cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_CPU_ENABLE_ASYNC_DISPATCH': 'false',
      **dict(env),
    })
    try:
      self.processes, self.threads = local.start(args, self.file, of_host)
    finally:
      os.environ.clear()
      os.environ.update(before)

  def text(self):
    self.file.flush()
    return self.output.read_text()[self.begin :]

  def tail(self):
    """The end of it, without what a stack of C++ looks like."""
    lines = [line for line in self.text().splitlines() if not re.match(r'\[\d+\]\s+@ ', line)]
    return '\n'.join(lines)[-4000:]

  def until(self, condition, seconds=PATIENCE):
    """True as soon as the condition holds, False where all have ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      if condition():
        return True
      if all(process.poll() is not None for process in self.processes):
        return bool(condition())
      time.sleep(0.005)
    self.kill()
    raise Failed(f'nothing came of it in {seconds} s:\n{self.tail()}')

  def reaches(self, step):
    if not self.until(lambda: self.step() >= step):
      raise Failed(f'it ended before step {step}:\n{self.tail()}')

  def step(self):
    """The last step that was told."""
    told = re.findall(r'^\[0\] step (\d+)/', self.text(), re.M)
    return int(told[-1]) if told else 0

  def end(self, grace=5.0):
    """The exit status, as `launch/local.py` gives it."""
    deadline = time.monotonic() + PATIENCE
    states = lambda: [p.poll() for p in self.processes]
    while None in states() and not any(states()):
      if time.monotonic() > deadline:
        self.kill()
        raise Failed(f'it does not end:\n{self.tail()}')
      time.sleep(0.05)
    status = local.wait(self.processes, grace, self.file)
    for thread in self.threads:
      thread.join(5)
    return status

  def kill(self):
    local.send(self.processes, signal.SIGKILL)


def finished(workdir):
  """The steps of the checkpoints that were finished."""
  return sorted(int(p.name) for p in (workdir / 'checkpoints').glob('*') if p.name.isdigit())


def unfinished(workdir):
  return list((workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp*'))


def rows(workdir):
  """The numbers that were logged: [(step, loss, gradient's norm)]."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [(row['step'], row['loss'], row['grad_norm']) for row in map(json.loads, lines)]


def again(workdir, options, overrides=()):
  """Starts it again with the same command, to its end; the step it went on from."""
  overrides = *options.get('overrides', ()), *overrides
  run = Cluster(workdir, **options | dict(overrides=overrides))
  if run.end():
    raise Failed(f'started again, it failed:\n{run.tail()}')
  found = re.search(r'going on from the checkpoint of step (\d+)', run.text())
  return int(found[1]) if found else 0


# --- faults: functions (workdir, options, chance) -> {at, kept, ...} ------------------------------


def _ended(run, workdir, at, status):
  if not status:
    raise Failed(f'the run ended well, as if nothing had been:\n{run.tail()}')
  return dict(at=max(at, run.step()), kept=(finished(workdir) or [0])[-1])


def kill(workdir, options, chance):
  """SIGKILL of a host at a random step"""
  run, at = Cluster(workdir, env={'FAULTS_SLEEP': str(SLOW)}, **options), chance.randint(1, 20)
  run.reaches(at)
  run.processes[chance.randrange(len(run.processes))].kill()
  return _ended(run, workdir, at, run.end())


def kill_saving(workdir, options, chance):
  """SIGKILL of a host during a save, of which it leaves an unfinished checkpoint"""
  for _ in range(10):
    run = Cluster(workdir, env={'FAULTS_SLEEP': str(SLOW)}, **options)
    host = chance.randrange(len(run.processes))
    while run.until(lambda: unfinished(workdir)):
      local.send(run.processes, signal.SIGSTOP)
      left = unfinished(workdir)
      if left:
        at = run.step()
        run.processes[host].kill()
        local.send(run.processes, signal.SIGCONT)
        found = _ended(run, workdir, at, run.end())
        if not unfinished(workdir):
          break  # the others finished it: it does not count
        return found
      local.send(run.processes, signal.SIGCONT)
    run.kill()
    run.end()
    shutil.rmtree(workdir)
  raise Failed('no unfinished checkpoint was ever seen')


def preempt(workdir, options, chance):
  """SIGTERM to all hosts, as a preemption sends"""
  run, at = Cluster(workdir, env={'FAULTS_SLEEP': str(SLOW)}, **options), chance.randint(1, 18)
  run.reaches(at)
  local.send(run.processes, signal.SIGTERM)
  return _stopped(run, workdir, at)


def preempt_one(workdir, options, chance):
  """SIGTERM to one host alone"""
  run, at = Cluster(workdir, env={'FAULTS_SLEEP': str(SLOW)}, **options), chance.randint(1, 18)
  run.reaches(at)
  run.processes[-1].send_signal(signal.SIGTERM)
  return _stopped(run, workdir, at)


def _stopped(run, workdir, at):
  if run.end():
    raise Failed(f'it did not end well:\n{run.tail()}')
  found = re.search(r'stopped at step (\d+)', run.text())
  if not found or finished(workdir)[-1] != int(found[1]):
    raise Failed(f'no checkpoint of the step it stopped at:\n{run.tail()}')
  return dict(at=int(found[1]), kept=int(found[1]), said=found[0])


def full_disk(workdir, options, chance):
  """A disk that is full when a checkpoint is written"""
  del chance
  workdir.mkdir(parents=True)
  if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=6m', 'tmpfs', str(workdir)]).returncode:
    raise Failed('not tried: making a small disk takes the right to mount one')
  try:
    run = Cluster(workdir, env={'FAULTS_SLEEP': str(SLOW)}, **options)
    status, text = run.end(), run.text()
    if 'No space left' not in text and 'ENOSPC' not in text:
      raise Failed(f'a full disk is not named:\n{run.tail()}')
    found = _ended(run, workdir, run.step(), status)
    subprocess.run(['mount', '-o', 'remount,size=200m', str(workdir)], check=True)
    found['from'] = again(workdir, options)
    found['rows'], found['arrays'] = rows(workdir), arrays(workdir)
    return found | dict(said='No space left')
  finally:
    subprocess.run(['umount', '-l', str(workdir)])


def damage(change):
  """A fault: every shard of the newest checkpoint of a run is changed, one at a time by chance"""

  def fault(workdir, options, chance):
    run = Cluster(workdir, env={'FAULTS_SLEEP': str(SLOW)}, **options)
    run.reaches(17)
    local.send(run.processes, signal.SIGTERM)
    at = _stopped(run, workdir, 17)['at']
    newest = workdir / 'checkpoints' / str(at) / 'default'
    shards = [p for p in newest.rglob('*') if p.is_file() and p.parent.name == 'd']
    change(max(shards, key=lambda p: (p.stat().st_size, chance.random())), chance)
    run = Cluster(workdir, **options)
    if run.end():
      raise Failed(f'it did not go on:\n{run.tail()}')
    said = re.search(r'checkpoint \d+ cannot be read \([^\n]*?\)', run.text())
    if not said:
      raise Failed(f'nothing was noticed:\n{run.tail()}')
    kept = int(re.search(r'going on from the checkpoint of step (\d+)', run.text())[1])
    return dict(at=at, kept=kept, said=said[0][:90], **{'from': kept})

  fault.__doc__ = change.__doc__
  return fault


def _missing(file, chance):
  """A missing shard of the newest checkpoint"""
  del chance
  file.unlink()


def _truncated(file, chance):
  """A shard of the newest checkpoint cut short"""
  os.truncate(file, chance.randrange(file.stat().st_size))


def _flipped(file, chance):
  """One flipped bit in a shard of the newest checkpoint"""
  data = bytearray(file.read_bytes())
  data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
  file.write_bytes(data)


def hang(workdir, options, chance):
  """A host that stands still (SIGSTOP)"""
  run, at = Cluster(workdir, env={'FAULTS_SLEEP': str(SLOW)}, **options), chance.randint(2, 18)
  run.reaches(at)
  host = chance.randrange(len(run.processes))
  run.processes[host].send_signal(signal.SIGSTOP)
  return _noticed(run, workdir, at, host)


def hang_data(workdir, options, chance):
  """A host whose data does not come"""
  del chance
  host = len(range(options.get('hosts', 2))) - 1
  run = Cluster(workdir, env={'FAULTS_SLEEP': str(SLOW), 'FAULTS_HANG': str(host)}, **options)
  run.reaches(2)
  return _noticed(run, workdir, None, host)


def _noticed(run, workdir, at, host):
  began = time.monotonic()
  status = run.end()
  seconds = time.monotonic() - began
  found = re.search(rf'host {host} of \d+ [^\n]*last step was (\d+)[^\n]*', run.text())
  if not found:
    raise Failed(f'host {host} is not named:\n{run.tail()}')
  said = f'{found[0].split(". ")[0]} (after {seconds:.0f} s)'
  if seconds > 60:
    raise Failed(f'only {said}')
  return _ended(run, workdir, at or int(found[1]), status) | dict(said=said)


def data_worker(workdir, options, chance):
  """A worker process of the data that is killed"""
  run = Cluster(
    workdir, overrides=['data.workers=1'], env={'FAULTS_SLEEP': str(SLOW)}, **options)
  at = chance.randint(2, 12)
  run.reaches(at)
  host = run.processes[chance.randrange(len(run.processes))].pid
  workers = [pid for pid in children(host) if 'resource_tracker' not in command(pid)]
  if not workers:
    raise Failed('no worker was found')
  os.kill(workers[-1], signal.SIGKILL)
  found = _ended(run, workdir, at, run.end())
  said = re.search(r'step \d+: a data worker is gone', run.text())
  if not said:
    raise Failed(f'the worker is not named:\n{run.tail()}')
  return found | dict(said=said[0])


def children(pid):
  text = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True)
  return [int(word) for word in text.stdout.split()]


def command(pid):
  return pathlib.Path(f'/proc/{pid}/cmdline').read_text()


def clocks(workdir, options, chance):
  """Clocks that disagree by hours, on either side of a restart"""
  def of_host(host):
    shift = (-1) ** host * chance.uniform(3600, 86400)
    path = os.pathsep.join([str(HERE / 'clock'), os.environ['PYTHONPATH']])
    return {'FAULTS_CLOCK': f'{shift:.0f}', 'PYTHONPATH': path}

  run = Cluster(workdir, env={'FAULTS_SLEEP': str(SLOW)}, of_host=of_host, **options)
  run.reaches(10)
  local.send(run.processes, signal.SIGTERM)
  found = _stopped(run, workdir, 10)
  run = Cluster(workdir, of_host=of_host, **options)
  if run.end():
    raise Failed(f'it failed:\n{run.tail()}')
  return found | {'from': found['kept'], 'said': ''}


FAULTS = dict(
  kill=kill, kill_saving=kill_saving, preempt=preempt, preempt_one=preempt_one,
  full_disk=full_disk, missing=damage(_missing), truncated=damage(_truncated),
  flipped=damage(_flipped), hang=hang, hang_data=hang_data, data_worker=data_worker, clocks=clocks,
)


# --- one after the other --------------------------------------------------------------------------


def arrays(workdir):
  """{path: checksum} of the last checkpoint, which was verified when it was read."""
  file = workdir / 'checkpoints' / str(small.STEPS) / 'check' / 'metadata'
  return json.loads(file.read_text())


def straight(folder, options):
  """The numbers of a run that nothing happens to."""
  workdir = folder / 'straight'
  again(workdir, options)
  return dict(rows=rows(workdir), arrays=arrays(workdir))


def attempt(name, folder, options, wanted, seed):
  """One fault, and what was lost. Raises Failed."""
  chance, workdir = random.Random(f'{name} {seed}'), folder / f'{name}-{seed}'
  found = FAULTS[name](workdir, options, chance)
  if 'from' not in found:
    found['from'] = again(workdir, options)
  if found['from'] != found['kept']:
    raise Failed(f'it went on from {found["from"]}, where {found["kept"]} was finished')
  for part, function in dict(rows=rows, arrays=arrays).items():
    if found.pop(part, None) is None and function(workdir) != wanted[part]:
      raise Failed(f'{part} differ from those of a run that nothing happened to')
  shutil.rmtree(workdir, ignore_errors=True)
  return found | dict(lost=found['at'] - found['kept'])


def table(results):
  lines = ['| fault | times | stood | steps done again, at most | said |',
           '| --- | --- | --- | --- | --- |']
  for name, tries in results.items():
    good = [t for t in tries if 'failed' not in t]
    lost = max((t['lost'] for t in good), default='')
    said = next((t['said'] for t in good if t.get('said')), '')
    what = FAULTS[name].__doc__.strip()
    lines.append(f'| {what} | {len(tries)} | {len(good)} | {lost} | {said} |')
  return '\n'.join(lines) + '\n'


def main(argv=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('faults', nargs='*', help=f'{", ".join(FAULTS)} (all)')
  parser.add_argument('--times', type=int, default=3)
  parser.add_argument('--hosts', type=int, default=2)
  parser.add_argument('--devices', type=int, default=2)
  parser.add_argument('--out', help='a folder for table.md and results.json')
  args = parser.parse_args(argv)
  unknown = [name for name in args.faults if name not in FAULTS]
  if unknown:
    parser.error(f'{unknown[0]!r} is none of {", ".join(FAULTS)}')
  options, results = dict(hosts=args.hosts, devices=args.devices), {}
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    wanted = straight(folder, options)
    for name in args.faults or FAULTS:
      for seed in range(args.times):
        try:
          found = attempt(name, folder, options, wanted, seed)
        except Failed as error:
          found = dict(failed=str(error))
        results.setdefault(name, []).append(found)
        print(name, seed, found, flush=True)
  text = table(results)
  print(text)
  if args.out:
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / 'table.md').write_text(text)
    facts = dict(command=' '.join(['python', *sys.argv]), machine=platform.processor(), **options)
    (out / 'results.json').write_text(json.dumps(facts | dict(results=results), indent=1) + '\n')
  return int(any('failed' in each for tries in results.values() for each in tries))


if __name__ == '__main__':
  sys.exit(main())
