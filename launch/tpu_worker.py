"""What runs on a worker of a TPU: installs a tree, keeps a command going in tmux, stops it, tells.

  python3 tpu_worker.py install ARCHIVE --sha256 HEX --extras tpu,gcs
  python3 diffax-launch/worker.py start RUN --tries 5 --pause 60 -- python -m diffax.main ...
  python3 diffax-launch/worker.py status RUN
  python3 diffax-launch/worker.py stop RUN --grace 600

It is copied there and called by tpu_vm.py, with the worker's own Python (3.8 or later) and nothing
beside it. Below ~/diffax-launch: `tree` leads to the newest of `trees`, `venv` is what runs use,
`runs` is the `runs` of every tree, and logs/RUN holds job.json, state.json and the log.

A run is a tmux session that starts the command, and again where it ends by trouble: with a status
other than 0 (done) and 2 (a mistake of the user's). A line of JSON tells how it stands: running,
ended, mistake, failed (no tries left), stopped (by `stop`), interrupted (by another signal),
lost (the machine went down with it) or none.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

HOME = pathlib.Path.home()
BASE = HOME / 'diffax-launch'
VENV = BASE / 'venv'
DONE, MISTAKE = 0, 2


class Refusal(Exception):
  pass


# --- runs, as this machine knows them -------------------------------------------------------------


def folder(run):
  return BASE / 'logs' / run


def write(path, value):
  """JSON, of which a reader sees all or nothing."""
  new = path.with_name(path.name + '.new')
  new.write_text(json.dumps(value))
  os.replace(new, path)


def read(path):
  return json.loads(path.read_text()) if path.exists() else {}


def session(run):
  return 'diffax-' + run


def tmux(*words):
  return subprocess.run(['tmux', *words], capture_output=True, text=True)


def live():
  """Names of the runs that are under way: in tmux, saving after their session was killed, or left
  behind by a loop that was.
  """
  names = tmux('list-sessions', '-F', '#{session_name}').stdout.split()
  found = {name[len('diffax-'):] for name in names if name.startswith('diffax-')}
  for path in (BASE / 'logs').glob('*/state.json'):
    state = read(path)
    if state.get('state') == 'running' and (loops(state.get('loop', 0)) or alive(state)):
      found.add(path.parent.name)
  return sorted(found)


def born(pid):
  """When a process began, in the kernel's ticks; None where it has ended."""
  try:
    told = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
  except OSError:
    return None
  return None if told[0] == 'Z' else int(told[19])


def alive(state):
  """Whether the command of a run is, for its number may be another's since."""
  return 'born' in state and born(state['pid']) == state['born']


def loops(pid):
  """Whether a process is a run's Loop; its number may be another's since."""
  try:
    return b'loop' in pathlib.Path(f'/proc/{pid}/cmdline').read_bytes().split(b'\0')
  except OSError:
    return False


def number():
  """Of this worker: its host name ends in -w-NUMBER."""
  host = subprocess.run(['hostname'], stdout=subprocess.PIPE, text=True).stdout
  found = re.search(r'-w-(\d+)$', host.strip())
  return int(found.group(1)) if found else 0


def tell(run, **more):
  """Prints how a run stands, on one line that other workers' lines do not cut."""
  under_way = run in live()  # looked at first: a run that ends just now has written how
  state = read(folder(run) / 'state.json')
  if under_way:
    state['state'] = 'running'
  elif state.get('state') == 'running':
    state['state'] = 'lost'
  log = folder(run) / 'log'
  lines = tail(log, 1) if log.exists() else ['']
  shown = {'worker': number(), 'state': 'none', 'last': lines[-1][:200], **state, **more}
  sys.stdout.write(json.dumps(shown) + '\n')
  sys.stdout.flush()


def tail(path, count):
  with open(path, 'rb') as file:
    file.seek(max(0, path.stat().st_size - 20000))
    text = file.read().decode('utf-8', 'replace')
  return re.split(r'[\r\n]+', text.strip())[-count:]


# --- installing -----------------------------------------------------------------------------------


def install(archive, sha256, extras):
  if live():
    raise Refusal(f'run {live()[0]} is under way here: stop it before another tree is set up')
  if not shutil.which('tmux'):
    raise Refusal('tmux is missing here: sudo apt-get install -y tmux')
  archive = HOME / archive
  if hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
    raise Refusal(f'{archive.name} did not arrive whole')
  for name in ('trees', 'logs', 'runs'):
    (BASE / name).mkdir(parents=True, exist_ok=True)
  tree = BASE / 'trees' / sha256[:16]
  if not tree.exists():
    unpack(archive, tree)
  os.utime(tree)
  environment(tree, extras)
  swap(tree)
  os.replace(pathlib.Path(__file__).resolve(), BASE / 'worker.py')
  archive.unlink()
  for old in sorted((BASE / 'trees').iterdir(), key=lambda path: path.stat().st_mtime)[:-3]:
    if old != tree:
      shutil.rmtree(old)


def unpack(archive, tree):
  """Into a new folder that takes its name when it is complete."""
  new = tree.with_name(tree.name + '.new')
  shutil.rmtree(new, ignore_errors=True)
  new.mkdir()
  subprocess.run(['tar', '-xzf', str(archive), '-C', str(new)], check=True)
  if not (new / 'runs').exists():
    (new / 'runs').symlink_to(BASE / 'runs')  # what is written there outlives this tree
  os.replace(new, tree)


def swap(tree):
  new = BASE / 'tree.new'
  if new.is_symlink():
    new.unlink()
  new.symlink_to(tree)
  os.replace(new, BASE / 'tree')


def environment(tree, extras):
  """A virtual environment with what the tree needs; where Python is older than 3.11, uv's."""
  python = VENV / 'bin' / 'python'
  if not python.exists():
    check = 'import sys; sys.exit(sys.version_info < (3, 11))'
    if logged(['python3', '-c', check]) or logged(['python3', '-m', 'venv', str(VENV)]):
      shutil.rmtree(VENV, ignore_errors=True)
      must(['python3', '-m', 'pip', 'install', '--user', 'uv'])
      must(['python3', '-m', 'uv', 'venv', '--seed', '--python', '3.12', str(VENV)])
  must([str(python), '-m', 'pip', 'install', '-e', f'{tree}[{extras}]'])


def logged(words):
  """The exit status of a command whose output goes to logs/install.log."""
  with open(BASE / 'logs' / 'install.log', 'ab') as out:
    return subprocess.run(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out).returncode


def must(words):
  status = logged(words)
  if status:
    said = ' '.join(tail(BASE / 'logs' / 'install.log', 3))
    raise Refusal(f'{" ".join(words)} ended with status {status}: {said}')


# --- running --------------------------------------------------------------------------------------


def start(run, tries, pause, tree, words):
  if live():
    raise Refusal(f'run {live()[0]} is under way here')
  if not (BASE / 'tree').exists():
    raise Refusal('nothing is set up here')
  if tree and (BASE / 'tree').resolve().name != tree[:16]:
    raise Refusal('another tree is set up here than was last on all workers: set it up again')
  folder(run).mkdir(parents=True, exist_ok=True)
  if (folder(run) / 'stop').exists():
    (folder(run) / 'stop').unlink()
  write(folder(run) / 'job.json', {'words': words, 'tries': tries, 'pause': pause})
  write(folder(run) / 'state.json', {'state': 'running', 'tries': 0})
  done = tmux('new-session', '-d', '-s', session(run), sys.executable, str(BASE / 'worker.py'),
              'loop', run)
  if done.returncode:
    write(folder(run) / 'state.json', {'state': 'none'})
    raise Refusal(f'tmux: {done.stderr.strip()}')


class Loop:
  """Starts the command, and again after trouble; a signal ends that.

  SIGUSR1 is `stop`'s, and SIGHUP alone that of a killed tmux session: both are passed on as
  SIGTERM. A machine that goes down sends SIGTERM to the command itself, for which a second one
  would mean not to save.
  """

  def __init__(self, run):
    self.folder, self.child, self.signalled = folder(run), None, {}
    self.job = read(self.folder / 'job.json')
    self.tree = (BASE / 'tree').resolve()  # a later setup is not for this run
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
      signal.signal(number, self.note)

  def note(self, number, frame):
    self.signalled.setdefault(number, time.monotonic())

  def send(self, number):
    kill(os.killpg, self.child.pid, number)

  def due(self):
    """Whether the command is to be told to end."""
    hung_up = self.signalled.get(signal.SIGHUP)
    alone = hung_up and signal.SIGTERM not in self.signalled and time.monotonic() > hung_up + 2
    return bool(alone) or signal.SIGUSR1 in self.signalled

  def once(self, tries):
    """The exit status of one go."""
    variables = dict(os.environ, VIRTUAL_ENV=str(VENV), PYTHONUNBUFFERED='1',
                     PATH=f'{VENV / "bin"}:{os.environ["PATH"]}')
    with open(self.folder / 'log', 'ab') as out:
      try:
        self.child = subprocess.Popen(
          self.job['words'], cwd=str(self.tree), env=variables, stdin=subprocess.DEVNULL,
          stdout=out, stderr=out, start_new_session=True,
          preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
      except OSError as error:
        self.say(f'error: {error}')
        return MISTAKE
    write(self.folder / 'state.json', {
      'state': 'running', 'tries': tries, 'loop': os.getpid(), 'pid': self.child.pid,
      'born': born(self.child.pid)})
    told = False
    while self.child.poll() is None:
      if self.due() and not told:
        self.send(signal.SIGTERM)
        told = True
      time.sleep(0.1)
    self.send(signal.SIGKILL)  # what is left of its group would keep the chips
    return self.child.returncode

  def say(self, text):
    line = f'--- {time.strftime("%Y-%m-%dT%H:%M:%S%z")} {text}\n'
    with open(self.folder / 'log', 'a') as out:
      out.write(line)
    try:
      print(line, end='', flush=True)
    except OSError:  # a killed session has no terminal
      pass

  def rest(self):
    end = time.monotonic() + self.job['pause']
    while time.monotonic() < end and not self.signalled:
      time.sleep(0.1)

  def run(self):
    print(f'the output is in {self.folder / "log"}', flush=True)
    for tries in range(1, self.job['tries'] + 1):
      self.say(f'starts, try {tries} of {self.job["tries"]}')
      status = self.once(tries)
      state = {DONE: 'ended', MISTAKE: 'mistake'}.get(status, 'failed')
      self.say(f'ended with status {status}')
      if state == 'failed' and tries < self.job['tries'] and not self.signalled:
        self.rest()
      elif not self.signalled:
        break
      if self.signalled:
        state = 'stopped' if (self.folder / 'stop').exists() else 'interrupted'
        break
    write(self.folder / 'state.json', {'state': state, 'status': status, 'tries': tries})


def kill(how, pid, number):
  try:
    how(pid, number)
  except ProcessLookupError:
    pass


def stop(run, grace, restart):
  """Asks the run to save and end, waits for it, and ends it where it does not."""
  if run not in live():
    return {}
  if not restart:
    (folder(run) / 'stop').write_text('')
  end, asked = time.monotonic() + grace, None
  while run in live() and time.monotonic() < end:
    state = read(folder(run) / 'state.json')  # without a loop yet where it has only begun
    loop = state['loop'] if loops(state.get('loop', 0)) else 0
    told = (os.kill, loop, signal.SIGUSR1) if loop else None
    if not loop and alive(state):  # nobody is left to hand it on
      told = os.killpg, state['pid'], signal.SIGTERM
    if told and told != asked:
      kill(*told)
      asked = told
    time.sleep(0.2)
  state, how = read(folder(run) / 'state.json'), 'interrupted' if restart else 'stopped'
  if run not in live():
    if state.get('state') == 'running':
      write(folder(run) / 'state.json', state | {'state': how})
    return {}
  tmux('kill-session', '-t', '=' + session(run))
  if 'pid' in state:
    kill(os.killpg, state['pid'], signal.SIGKILL)
    kill(os.kill, state['loop'], signal.SIGKILL)
  write(folder(run) / 'state.json', {'state': how, 'status': -9})
  return {'killed': True}


# --- the command line -----------------------------------------------------------------------------


def arguments(argv):
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('what', choices=('install', 'start', 'loop', 'status', 'stop'))
  parser.add_argument('name')
  parser.add_argument('--sha256', default='')
  parser.add_argument('--extras', default='tpu')
  parser.add_argument('--tries', type=int, default=1)
  parser.add_argument('--pause', type=float, default=0)
  parser.add_argument('--tree', default='', help='start: the sha256 of what is set up')
  parser.add_argument('--grace', type=float, default=0)
  parser.add_argument('--restart', action='store_true', help='stop: but not for good')
  cut = argv.index('--') if '--' in argv else len(argv)
  return parser.parse_args(argv[:cut]), argv[cut + 1:]


def main(argv=None):
  args, words = arguments(sys.argv[1:] if argv is None else argv)
  more = {}
  try:
    if args.what == 'install':
      install(args.name, args.sha256, args.extras)
      return 0
    if args.what == 'loop':
      Loop(args.name).run()
      return 0
    if args.what == 'start':
      start(args.name, args.tries, args.pause, args.tree, words)
    if args.what == 'stop':
      more = stop(args.name, args.grace, args.restart)
  except Refusal as error:
    print(f'error: worker {number()}: {error}', file=sys.stderr)
    return 3
  tell(args.name, **more)
  return 0


if __name__ == '__main__':
  sys.exit(main())
