"""A cloud in a folder, for tests of launch/tpu_vm.py: the executables that its commands find.

  install(cloud, folder)     puts `gcloud` into a folder that a test has first on PATH
  preempt(cloud, name)       kills all that runs on a TPU's workers and takes them away
  refuse(cloud, words, text) the next command that holds these words fails, and says the text

The folder holds calls.jsonl (each command line), queued/NAME.json and nodes/NODE.json, and
workers/NODE/N, a home of each worker, where commands are run as processes by bash. A queued
resource waits, is provisioned and becomes active, a step each time it is asked for. The workers of
a TPU find each other by variables. Flags are those of Google Cloud SDK 528; another one is an error
here as there. A worker's bin/ holds `hostname`, a `python3` that makes environments of itself and
keeps what pip is told, and, where `with_tmux` is not asked for, a `tmux` of this file's.
"""

import argparse
import fcntl
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

QUEUE = ['WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE']
GROUPS = {'queued-resources': 'queued', 'tpu-vm': 'nodes'}
WIDE = ['--zone', '--project', '--quiet', '--format']
FLAGS = {
  'queued-resources create': [
    '--accelerator-type', '--runtime-version', '--node-id', '--node-count', '--node-prefix',
    '--spot', '--internal-ips', '--labels', '--reserved', '--network'],
  'queued-resources describe': [],
  'queued-resources delete': ['--force'],
  'tpu-vm create': ['--accelerator-type', '--version', '--spot', '--internal-ips', '--labels'],
  'tpu-vm describe': [],
  'tpu-vm delete': [],
  'tpu-vm ssh': ['--worker', '--command', '--internal-ip', '--ssh-flag'],
  'tpu-vm scp': ['--worker', '--recurse', '--internal-ip', '--scp-flag'],
}
SWITCHES = ('--quiet', '--spot', '--internal-ips', '--internal-ip', '--force', '--recurse',
            '--reserved')
PYTHON = '''#!/bin/bash
# The real one, but for what would need a network.
case "$1 $2" in
  '-m venv') mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; exit ;;
  '-m pip') printf '%s\\n' "$*" >> "$HOME/pip.log"; [ ! -e "$HOME/no-pip" ]; exit ;;
esac
case "$0" in
  */venv/*) exec '{python}' "$@" ;;
esac
exec '{python}' -S "$@"  # what needs no packages starts at once
'''


# --- what tests do --------------------------------------------------------------------------------


def install(cloud, folder, workers=2, with_tmux=False, **variables):
  """The executable, in `folder`; its nodes have `workers` and `variables` in their environment."""
  for path in (cloud / 'queued', cloud / 'nodes', cloud / 'workers', folder):
    path.mkdir(parents=True, exist_ok=True)
  write(cloud / 'options.json', {'workers': workers, 'tmux': with_tmux, 'variables': variables})
  executable(folder / 'gcloud', f'#!/bin/bash\nexport FAKE_CLOUD={str(cloud)!r}\n'
             f'exec {sys.executable!r} -S {str(pathlib.Path(__file__).resolve())!r} gcloud "$@"\n')


def calls(cloud):
  path = cloud / 'calls.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def home(cloud, node, worker):
  return cloud / 'workers' / node / str(worker)


def refuse(cloud, words, text, times=1):
  write(cloud / 'refuse.json', {'words': words, 'text': text, 'times': times})


def preempt(cloud, name):
  """The machines go at once; the queued resource says so, and its nodes are gone."""
  for node in members(cloud, name):
    kill(cloud, node)
    path = cloud / 'nodes' / f'{node}.json'
    write(path, read(path) | {'state': 'PREEMPTED'})
  path = cloud / 'queued' / f'{name}.json'
  if path.exists():
    write(path, read(path) | {'state': 'SUSPENDED'})


def suspend(cloud, name, by):
  """The cloud or its USER has taken what a queued resource held."""
  path = cloud / 'queued' / f'{name}.json'
  write(path, read(path) | {'state': 'SUSPENDED', 'by': by})


def kill(cloud, node, number=signal.SIGKILL):
  """A signal to every process on a node's workers."""
  for n in range(read(cloud / 'nodes' / f'{node}.json').get('workers', 0)):
    for pid in processes(home(cloud, node, n)):
      try:
        os.kill(pid, number)
      except ProcessLookupError:
        pass


def processes(home):
  """Processes of a worker: those with its HOME."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/environ'):
    try:
      if f'HOME={home}'.encode() in path.read_bytes().split(b'\0'):
        found.append(int(path.parent.name))
    except OSError:  # ended just now, or another user's
      pass
  return [pid for pid in found if pid != os.getpid()]


def clear(cloud):
  """Ends what is left of all workers."""
  for path in (cloud / 'nodes').glob('*.json'):
    kill(cloud, path.stem)
    wipe(cloud, path.stem)


def wipe(cloud, node):
  for folder in (cloud / 'workers' / node).glob('*/tmux'):
    shutil.rmtree(folder.resolve(), ignore_errors=True)
  shutil.rmtree(cloud / 'workers' / node, ignore_errors=True)


# --- files ----------------------------------------------------------------------------------------


def read(path):
  return json.loads(path.read_text()) if path.exists() else {}


def write(path, value):
  new = path.with_name(f'{path.name}.{os.getpid()}')
  new.write_text(json.dumps(value))
  os.replace(new, path)


def executable(path, text):
  path.write_text(text)
  path.chmod(0o755)


class Refusal(Exception):
  pass


# --- gcloud ---------------------------------------------------------------------------------------


def gcloud(cloud, argv):
  if argv[:2] != ['compute', 'tpus'] or ' '.join(argv[2:4]) not in FLAGS:
    raise Refusal(f'Invalid choice: {argv}')
  group, verb = argv[2:4]
  parser = argparse.ArgumentParser(allow_abbrev=False)
  parser.add_argument('names', nargs='+')
  for flag in WIDE + FLAGS[f'{group} {verb}']:
    parser.add_argument(flag, action='store_true' if flag in SWITCHES else 'store')
  args = parser.parse_args(argv[4:])
  if not args.zone or not args.quiet:
    raise Refusal('a question would be asked')
  with open(cloud / 'lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with open(cloud / 'calls.jsonl', 'a') as file:
      file.write(json.dumps(['gcloud', *argv]) + '\n')
    refused(cloud, argv)
    if verb in ('create', 'describe', 'delete'):
      return VERBS[verb](cloud, group, args)
  return VERBS[verb](cloud, args)


def refused(cloud, argv):
  told = read(cloud / 'refuse.json')
  if told.get('times') and all(any(word in a for a in argv) for word in told['words']):
    write(cloud / 'refuse.json', told | {'times': told['times'] - 1})
    raise Refusal(told['text'])


def found(cloud, group, name):
  path = cloud / GROUPS[group] / f'{name}.json'
  if not path.exists():
    raise Refusal(f"NOT_FOUND: Resource 'projects/p/locations/z/{GROUPS[group]}/{name}' was not "
                  'found. This command is authenticated as me')
  return path


def create(cloud, group, args):
  name = args.names[0]
  path = cloud / GROUPS[group] / f'{name}.json'
  if path.exists():
    raise Refusal(f'ALREADY_EXISTS: {name}')
  if group == 'tpu-vm':
    return boot(cloud, name, f'localhost:{port()}', 0, read(cloud / 'options.json')['workers'])
  if not args.runtime_version or not args.accelerator_type:
    raise Refusal('argument --runtime-version --accelerator-type: must be specified')
  count = int(args.node_count or 1)
  names = [args.node_id] if args.node_id else [f'{args.node_prefix}-{i}' for i in range(count)]
  node = {'acceleratorType': args.accelerator_type, 'runtimeVersion': args.runtime_version}
  write(path, {'state': QUEUE[0], 'nodes': names, 'node': node})


def describe(cloud, group, args):
  path = found(cloud, group, args.names[0])
  told = read(path)
  if group == 'tpu-vm':
    print(json.dumps({'state': told['state'], 'networkEndpoints': [{}] * told['workers']}))
    return
  answer = {'state': {'state': told['state'], 'stateInitiator': told.get('by', 'SERVICE')},
            'tpu': {'nodeSpec': [{'node': told.get('node', {})}]}}
  if told['state'] == 'FAILED':
    answer['state']['failedData'] = {'error': {'message': told['message']}}
  print(json.dumps(answer))
  if told['state'] in QUEUE[:-1]:
    told['state'] = QUEUE[QUEUE.index(told['state']) + 1]
    if told['state'] == 'ACTIVE':
      workers = read(cloud / 'options.json')['workers']
      address = f'localhost:{port()}'
      for i, node in enumerate(told['nodes']):
        boot(cloud, node, address, i * workers, len(told['nodes']) * workers)
    write(path, told)


def port():
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    return listener.getsockname()[1]


def boot(cloud, node, address, first, hosts):
  """Workers with an empty home."""
  options = read(cloud / 'options.json')
  wipe(cloud, node)
  for n in range(options['workers']):
    place = home(cloud, node, n)
    (place / 'bin').mkdir(parents=True)
    (place / 'tmux').symlink_to(tempfile.mkdtemp(prefix='tpu-'))  # a socket's path is short
    executable(place / 'bin' / 'hostname', f'#!/bin/bash\necho t1v-n-0a1b2c3d-w-{n}\n')
    executable(place / 'bin' / 'python3', PYTHON.replace('{python}', sys.executable))
    if not options['tmux']:
      executable(place / 'bin' / 'tmux', f'#!/bin/bash\nexec {sys.executable!r} -S '
                 f'{str(pathlib.Path(__file__).resolve())!r} tmux "$@"\n')
    write(place / 'variables.json', {
      'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': str(hosts),
      'JAX_PROCESS_ID': str(first + n)} | options['variables'])
  write(cloud / 'nodes' / f'{node}.json', {'state': 'READY', 'workers': options['workers']})


def members(cloud, name):
  return read(cloud / 'queued' / f'{name}.json').get('nodes', [name])


def delete(cloud, group, args):
  path = found(cloud, group, args.names[0])
  if group == 'queued-resources' and not args.force and read(path)['state'] == 'ACTIVE':
    raise Refusal('FAILED_PRECONDITION: it has nodes')
  for node in members(cloud, args.names[0]):
    kill(cloud, node)
    (cloud / 'nodes' / f'{node}.json').unlink(missing_ok=True)
    wipe(cloud, node)
  path.unlink(missing_ok=True)


def chosen(cloud, node, worker):
  told = read(found(cloud, 'tpu-vm', node))
  if told['state'] != 'READY':
    raise Refusal(f'TPU is in state "{told["state"]}" and cannot be reached')
  if worker == 'all':
    return range(told['workers'])
  if int(worker or 0) >= told['workers']:
    raise Refusal(f'worker index {worker} is larger than the valid worker indexes')
  return [int(worker or 0)]


def ssh(cloud, args):
  node, = args.names
  several = [(n, subprocess.Popen(
    ['bash', '-c', ' '.join(args.command.split(' '))], cwd=home(cloud, node, n),
    env=environment(home(cloud, node, n)))) for n in chosen(cloud, node, args.worker)]
  status = 0
  for n, process in several:
    ended = process.wait()
    status = status or ended
    print(f'SSH: Attempting to connect to worker {n}...', file=sys.stderr)
    if ended and len(several) > 1:
      print(f'##### Command execution on worker {n} failed with exit status {ended}. Continuing.',
            file=sys.stderr)
  return status


def environment(place):
  # A machine starts afresh: of our own environment only what makes tests fast and finds programs.
  kept = ('PATH', 'LANG', 'DIFFAX_TEST_SLEEP', 'JAX_COMPILATION_CACHE_DIR')
  return {name: os.environ[name] for name in kept if name in os.environ} | {
    'HOME': str(place), 'PATH': f'{place / "bin"}:{os.environ["PATH"]}',
    'TMUX_TMPDIR': str((place / 'tmux').resolve())} | read(place / 'variables.json')


def scp(cloud, args):
  *sources, target = args.names
  if ':' in target:
    node, _, path = target.partition(':')
    for n in chosen(cloud, node, args.worker):
      for source in sources:
        shutil.copy(source, home(cloud, node, n) / path)
    return 0
  node, _, path = sources[0].partition(':')
  n, = chosen(cloud, node, args.worker)
  source, target = home(cloud, node, n) / path, pathlib.Path(target)
  if not source.exists():
    raise Refusal(f'scp: {path}: No such file or directory')
  if not args.recurse:
    shutil.copy(source, target)
  else:
    shutil.copytree(source, target / source.name if target.exists() else target)
  return 0


VERBS = {'create': create, 'describe': describe, 'delete': delete, 'ssh': ssh, 'scp': scp}


# --- tmux, where there is none --------------------------------------------------------------------


def tmux(argv):
  """new-session, list-sessions and kill-session, as the launcher asks for them."""
  folder = pathlib.Path(os.environ['TMUX_TMPDIR'])
  alive = {path.stem: int(path.read_text()) for path in folder.glob('*.pid')
           if running(int(path.read_text()))}
  if argv[0] == 'new-session':
    assert argv[1:3] == ['-d', '-s'], argv
    if argv[3] in alive:
      raise Refusal(f'duplicate session: {argv[3]}')
    process = subprocess.Popen(argv[4:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    (folder / f'{argv[3]}.pid').write_text(str(process.pid))
  elif argv[0] == 'list-sessions':
    assert argv[1:] == ['-F', '#{session_name}'], argv
    print('\n'.join(alive))
  elif argv[0] == 'kill-session':
    assert argv[1] == '-t' and argv[2][0] == '=', argv
    os.kill(alive[argv[2][1:]], signal.SIGHUP)
    time.sleep(0.2)
  else:
    raise Refusal(f'unknown command: {argv[0]}')
  return 0


def running(pid):
  try:
    state = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
  except OSError:
    return False
  return state != 'Z'


def main():
  called, *argv = sys.argv[1:]
  try:
    if called == 'tmux':
      return tmux(argv)
    return gcloud(pathlib.Path(os.environ['FAKE_CLOUD']), argv)
  except Refusal as error:
    group = f'(gcloud.{".".join(argv[:4])}) ' if called == 'gcloud' else ''
    print(f'ERROR: {group}{error}', file=sys.stderr)
    return 1


if __name__ == '__main__':
  sys.exit(main())
