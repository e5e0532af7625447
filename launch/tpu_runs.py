"""Runs on the workers of a TPU VM: started, asked, ended and watched; what is kept of them here.

  rows = runs.survey(gcloud, tpu, 'run')
  print(runs.outcome(rows, count=4))

What one worker does is tpu_worker.py's; gcloud's commands are tpu_cloud.py's.
"""

import hashlib
import json
import os
import pathlib
import time

import commands
import tpu_cloud as cloud

HERE = pathlib.Path(__file__).resolve().parent
WORKER = 'diffax-launch/worker.py'
PATIENCE = 10  # failures in a row after which a wait or watch gives up


# --- what is kept of a TPU, on this machine -------------------------------------------------------


def kept(name, ending='.json'):
  state = os.environ.get('XDG_STATE_HOME') or pathlib.Path.home() / '.local' / 'state'
  return pathlib.Path(state) / 'diffax' / 'tpu' / f'{name}{ending}'


def recall(name):
  """{'tpu': its settings, 'runs': {run: its job}, 'extras': pip's}, as far as used from here."""
  path = kept(commands.name(name, 'name', 40))
  return json.loads(path.read_text()) if path.exists() else {'tpu': {}, 'runs': {}, 'extras': ''}


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


def install(gcloud, tpu):
  """The kept tree, on all workers. Raises Trouble."""
  archive = kept(tpu.name, '.tar.gz')
  digest = 'SHA256' if gcloud.dry else hashlib.sha256(archive.read_bytes()).hexdigest()
  say(f'{tpu.name}: copying and installing, which takes minutes', gcloud)
  sources = [archive, HERE / 'tpu_worker.py']
  for node, done in zip(cloud.nodes(tpu), gcloud.each(
      [cloud.scp(tpu, sources, f'{node}:') for node in cloud.nodes(tpu)])):
    check(node, done)
  words = ['python3', 'tpu_worker.py', 'install', archive.name, '--sha256', digest, '--extras',
           recall(tpu.name)['extras']]
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
  """How a run stands on the workers that answer."""
  found = on_all(gcloud, tpu, ['python3', WORKER, 'status', run])
  return [row for node, done in found for row in told(node, done)]


def begin(gcloud, tpu, run, job):
  """Starts a run on all workers, or on none. Raises Trouble."""
  words = ['python3', WORKER, 'start', run, '--tries', job['tries'], '--pause', job['pause'], '--',
           *job['words']]
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


ENDS = {'finished': 0, 'stopped': 0, 'mistake': 2, 'failed': 1, 'absent': 1, 'not to be had': 1}


class Watch:
  """Keeps a run going until it has ended; the TPU is made again where it was preempted.

  lost: looks in a row at which the run was gone from a TPU that is ready; the first may be of
  machines that are about to go. faults: failures in a row. renewing: the TPU was deleted here.
  """

  def __init__(self, gcloud, tpu, run, poll):
    self.gcloud, self.tpu, self.run, self.poll = gcloud, tpu, run, poll
    self.job = recall(tpu.name)['runs'].get(run, {})
    self.lost, self.faults, self.renewing = 0, 0, False

  def until_end(self):
    """The exit status. Raises Trouble where the TPU is not to be had."""
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
    """One step, which may fail a few times in a row. Raises Trouble."""
    try:
      now = self.step()
      if now == 'silent':
        raise cloud.Trouble(f'{self.tpu.name}: not all workers answer')
    except cloud.Trouble as error:
      self.faults += 1
      if self.faults >= PATIENCE:
        raise
      return f'{error}; trying again'
    self.faults = 0
    self.lost = self.lost + 1 if now == 'lost' else 0
    return now

  def step(self):
    """How things stand, and what that calls for done. Raises Trouble."""
    found = cloud.look(self.gcloud, self.tpu)
    if found.kind == 'gone':
      say(f'{self.tpu.name}: {found.said}; asking for it again')
      self.renewing = True
      self.gcloud.do(cloud.delete(self.tpu))
    if found.kind == 'gone' or found.kind == 'absent' and self.renewing:
      self.gcloud.do(cloud.create(self.tpu))
      self.renewing = False
      return 'preempted'
    if found.kind in ('absent', 'failed'):  # deleted by intent, perhaps: not made again
      return 'absent' if found.kind == 'absent' else 'not to be had'
    if found.kind != 'ready':
      return found.said
    now = outcome(survey(self.gcloud, self.tpu, self.run), sum(found.workers.values()))
    if now == 'bare' or now == 'lost' and self.lost:
      self.restart(now == 'bare')
      return 'started again'
    return now

  def restart(self, bare):
    end(self.gcloud, self.tpu, self.run, 30, '--restart')
    if bare:
      install(self.gcloud, self.tpu)
    begin(self.gcloud, self.tpu, self.run, self.job)

  def finish(self, now):
    """Says how it ended; no worker stays behind waiting for the others."""
    if now in ('mistake', 'failed'):
      end(self.gcloud, self.tpu, self.run, 30, '--restart')
      show(survey(self.gcloud, self.tpu, self.run))
    return ENDS[now]


def say(text, gcloud=None):
  """Prints a line; not where nothing was done."""
  if not (gcloud and gcloud.dry):
    print(text, flush=True)
