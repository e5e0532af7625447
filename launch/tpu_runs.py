"""Runs on the workers of a TPU VM: started, asked, ended and watched; what is kept of them here.

  rows = runs.survey(gcloud, tpu, 'run')
  print(runs.outcome(rows, count=4))

What one worker does is tpu_worker.py's; gcloud's commands are tpu_cloud.py's.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import time

import commands
import tpu_cloud as cloud

HERE = pathlib.Path(__file__).resolve().parent
WORKER = 'diffax-launch/worker.py'
PATIENCE = 10  # failures in a row after which a wait, or a watch of workers, gives up


# --- what is kept of a TPU, on this machine -------------------------------------------------------


def kept(name, ending='.json'):
  state = os.environ.get('XDG_STATE_HOME') or pathlib.Path.home() / '.local' / 'state'
  return pathlib.Path(state) / 'diffax' / 'tpu' / f'{name}{ending}'


def recall(name):
  """What was asked for from here: {'tpu': its settings, 'runs': {run: its job}, 'extras': pip's,
  'renewing': whether it was deleted to be made again}. Raises Refused.
  """
  path = kept(commands.name(name, 'name', 40))
  record = {'tpu': {}, 'runs': {}, 'extras': '', 'renewing': False}
  try:
    record |= json.loads(path.read_text()) if path.exists() else {}
    cloud.Tpu(**{'name': name, **record['tpu']})
  except (ValueError, TypeError) as error:
    raise commands.Refused(f'{path} is damaged, or of another version ({error}): what is kept of '
                           f'{name}; move it away and say --zone and what else it needs') from error
  return record


def keep(gcloud, tpu, **changed):
  """Writes it down, with what has changed of it, whole or not at all."""
  if gcloud.dry:
    return
  record = recall(tpu.name) | {'tpu': tpu._asdict()} | changed
  path = kept(tpu.name)
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_suffix('.new')
  new.write_text(json.dumps(record, indent=2) + '\n')
  os.replace(new, path)


# --- all workers at once --------------------------------------------------------------------------


def digest(archive):
  return hashlib.sha256(archive.read_bytes()).hexdigest() if archive.exists() else ''


@contextlib.contextmanager
def watching(gcloud, name):
  """No other process of this machine watches the TPU within. Raises Refused."""
  if gcloud.dry:
    yield
    return
  path = kept(name, '.lock')
  path.parent.mkdir(parents=True, exist_ok=True)
  with commands.alone(path, f'{name} is watched by another process already: two would undo each '
                      'other\'s work; end one'):
    yield


def install(gcloud, tpu, archive, extras):
  """A tree, on all workers. Raises Trouble."""
  sha256 = 'SHA256' if gcloud.dry else digest(archive)
  say(f'{tpu.name}: copying and installing, which takes minutes', gcloud)
  sources = [archive, HERE / 'tpu_worker.py']
  for node, done in zip(cloud.nodes(tpu), gcloud.each(
      [cloud.scp(tpu, sources, f'{node}:') for node in cloud.nodes(tpu)])):
    check(node, done)
  words = ['python3', 'tpu_worker.py', 'install', archive.name, '--sha256', sha256, '--extras',
           extras]
  for node, done in on_all(gcloud, tpu, words):
    check(node, done)


def check(node, done):
  """Raises Trouble where what was asked of a node failed."""
  if done.returncode:
    raise cloud.Trouble(f'{node}: {cloud.why(done.stderr)}')


def on_all(gcloud, tpu, words):
  """[(node, what came of `words` on all its workers)]"""
  names = cloud.nodes(tpu)
  return list(zip(names, gcloud.each([cloud.ssh(tpu, node, words) for node in names])))


def told(node, done):
  """Rows that workers told, a line of JSON each."""
  rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"worker": ')]
  bare = "can't open file" in done.stderr  # one at least has no worker.py
  return [{'node': node, **row} for row in rows] + [{'node': node, 'state': 'bare'}] * bare


def survey(gcloud, tpu, run):
  """(how a run stands on the workers that answer, why others do not)."""
  found = on_all(gcloud, tpu, ['python3', WORKER, 'status', run])
  silent = [f'{node}: {cloud.why(done.stderr)}' for node, done in found if done.returncode]
  return [row for node, done in found for row in told(node, done)], '; '.join(silent)


def begin(gcloud, tpu, run, job):
  """Starts a run on all workers, or on none; where this machine has set them up, of one tree.

  Raises Trouble.
  """
  tree = digest(kept(tpu.name, '.tar.gz'))
  words = ['python3', WORKER, 'start', run, '--tries', job['tries'], '--pause', job['pause'],
           *(['--tree', tree] if tree else []), '--', *job['words']]
  failed = [(node, done) for node, done in on_all(gcloud, tpu, words) if done.returncode]
  if failed:
    end(gcloud, tpu, run, 0, '--restart')  # the others would wait for those that are missing
    check(*failed[0])


def end(gcloud, tpu, run, grace, *words):
  """Ends a run on all workers; for good, or to be started again with the word --restart."""
  return on_all(gcloud, tpu, ['python3', WORKER, 'stop', run, '--grace', grace, *words])


def outcome(rows, count):
  """How a run stands as a whole, of how it stands on each of `count` workers.

  mistake, failed, lost and stopped by one is so for all; finished only where it ended on all of
  them: a signal to one host makes all save and end.
  """
  states = [row['state'] for row in rows]
  for state in ('bare', 'mistake', 'failed'):
    if state in states:
      return state
  if 'stopped' in states:
    return 'running' if 'running' in states else 'stopped'
  if {'lost', 'none', 'interrupted'} & set(states):
    return 'lost'
  if len(rows) < count:
    return 'silent'
  return 'running' if 'running' in states else 'finished'


def show(rows):
  for row in sorted(rows, key=lambda row: (row['node'], row.get('worker', 0))):
    tries = f', try {row["tries"]}' if row.get('tries') else ''
    said = 'not set up' if row['state'] == 'bare' else f'{row["state"]}{tries}: {row["last"]}'
    say(f'{row["node"]} worker {row.get("worker", "?")}: {said}')


# --- watching -------------------------------------------------------------------------------------


def patiently(gcloud, tpu, poll):
  """`look`, again where gcloud fails: a network may be away for a while. Raises Trouble."""
  for left in reversed(range(PATIENCE)):
    try:
      return cloud.look(gcloud, tpu)
    except cloud.Trouble as error:
      if not left:
        raise
      say(f'{error}; asking again')
      time.sleep(poll)


ENDS = {'finished': 0, 'failed': 1, 'absent': 1, 'not to be had': 1, 'mistake': 2, 'stopped': 3}


class Watch:
  """Keeps a run going until it has ended; the TPU is made again where it was preempted.

  lost: looks in a row at which the run was gone from a TPU that is ready; the first may be of
  machines that are about to go. faults: failures in a row of workers that should be there.
  """

  def __init__(self, gcloud, tpu, run, poll):
    self.gcloud, self.tpu, self.run, self.poll = gcloud, tpu, run, poll
    self.lost, self.faults = 0, 0

  def until_end(self):
    """The exit status, one of `ENDS`. Raises Trouble where no more looks are of use."""
    said = None
    while True:
      now = self.look()
      if now != said:
        say(f'{self.tpu.name}: run {self.run}: {now}', self.gcloud)
        said = now
      if self.gcloud.dry:
        return 0
      if now in ENDS:
        return self.finish(now)
      time.sleep(self.poll)

  def look(self):
    """How things stand, and what that calls for done. Raises Trouble.

    A cloud that does not answer, or has no room, is asked for as long as it takes; workers that it
    says are ready, `PATIENCE` times.
    """
    try:
      found, now = self.have()
    except cloud.Trouble as error:
      if error.lasting:
        raise
      return f'{error}; trying again'
    try:
      now = now or self.step(found)
    except cloud.Trouble as error:
      self.faults += 1
      if self.faults >= PATIENCE:
        raise
      return f'{error}; trying again'
    self.faults = 0
    self.lost = self.lost + 1 if now == 'lost' else 0
    return now

  def job(self):
    return recall(self.tpu.name)['runs'].get(self.run, {})

  def have(self):
    """(the State of the TPU, '' where it is ready); asked for again where it was taken away.

    That it was deleted for this is kept, for a watch that comes after this one. Raises Trouble.
    """
    found = cloud.look(self.gcloud, self.tpu)
    if found.kind == 'ready':
      return found, ''
    if self.job().get('stopped'):
      return found, 'stopped'
    if found.kind == 'gone':
      say(f'{self.tpu.name}: {found.said}; asking for it again')
      keep(self.gcloud, self.tpu, renewing=True)
      self.gcloud.do(cloud.delete(self.tpu))
    if found.kind == 'gone' or found.kind == 'absent' and recall(self.tpu.name)['renewing']:
      self.gcloud.do(cloud.create(self.tpu))
      keep(self.gcloud, self.tpu, renewing=False)
      return found, 'preempted'
    if found.kind == 'failed':
      say(f'{self.tpu.name}: {found.said}; delete it, and create it again')
      return found, 'not to be had'
    return found, 'absent' if found.kind == 'absent' else found.said  # deleted by intent, perhaps

  def step(self, found):
    """How the run stands on a TPU that is ready; started again where it is gone. Raises Trouble."""
    rows, why = survey(self.gcloud, self.tpu, self.run)
    now = outcome(rows, sum(found.workers.values()))
    if now == 'silent' and not self.gcloud.dry:
      raise cloud.Trouble(f'{self.tpu.name}: not all workers answer ({why or "no reason is told"})')
    if now in ('bare', 'lost') and self.job().get('stopped'):
      return 'stopped'
    if now == 'bare' or now == 'lost' and self.lost:
      self.restart(now == 'bare')
      return 'started again'
    return now

  def restart(self, bare):
    end(self.gcloud, self.tpu, self.run, 30, '--restart')
    if bare:
      record = recall(self.tpu.name)
      install(self.gcloud, self.tpu, kept(self.tpu.name, '.tar.gz'), record['extras'])
    begin(self.gcloud, self.tpu, self.run, self.job())

  def finish(self, now):
    """Says how it ended; no worker stays behind waiting for the others."""
    if now in ('mistake', 'failed'):
      end(self.gcloud, self.tpu, self.run, 30, '--restart')
      show(survey(self.gcloud, self.tpu, self.run)[0])
    return ENDS[now]


def say(text, gcloud=None):
  """Prints a line; not where nothing was done."""
  if not (gcloud and gcloud.dry):
    print(text, flush=True)
