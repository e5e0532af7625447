"""launch/tpu_vm.py against a cloud in a folder: made, set up, run, preempted, resumed, deleted."""

import contextlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import fake_gcloud
import pytest
import run_diffax

from diffax import checkpoint

LAUNCH = run_diffax.ROOT / 'launch'
sys.path.insert(0, str(LAUNCH))  # its files import each other, as scripts do

import tpu_runs  # noqa: E402
import tpu_vm  # noqa: E402

MADE = ('--zone=europe-west4-b', '--type=v5litepod-8', '--version=v2-alpha-tpuv5-lite')


class Place:
  """A cloud, and the launcher's command line with it."""

  def __init__(self, folder, **options):
    self.cloud, self.folder = folder / 'cloud', folder
    fake_gcloud.install(self.cloud, folder / 'bin', **options)
    self.env = os.environ | {
      'PATH': f'{folder / "bin"}:{os.environ["PATH"]}', 'XDG_STATE_HOME': str(folder / 'state')}

  def __call__(self, *words, status=0):
    """What it prints, errors included; in this process, where another takes long to start."""
    out = io.StringIO()
    with (mock.patch.dict(os.environ, self.env), contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(out)):
      found = tpu_vm.main(self.words(*words)[2:])
    assert found == status, out.getvalue()
    return out.getvalue()

  def words(self, *words):
    """For a process of its own."""
    words = [str(word) for word in words]
    cut = words.index('--') if '--' in words else len(words)
    return [sys.executable, str(LAUNCH / 'tpu_vm.py'), *words[:cut], '--poll=0.2', *words[cut:]]

  def verbs(self):
    """The commands that gcloud was given: 'create', 'ssh', ..."""
    return [call[4] for call in fake_gcloud.calls(self.cloud)]

  def home(self, node='tune', worker=0):
    return fake_gcloud.home(self.cloud, node, worker)

  def log(self, run='run', **which):
    path = self.home(**which) / 'diffax-launch' / 'logs' / run / 'log'
    return path.read_text() if path.exists() else ''

  def states(self, run='run'):
    """How a run stands on the workers."""
    lines = self('status', 'tune', f'--run={run}').splitlines()[1:]
    return [line.partition(': ')[2].partition(':')[0] for line in lines]


def until(condition, seconds=300):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'it did not come'
    time.sleep(0.05)


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
  """A small git checkout."""
  folder = tmp_path_factory.mktemp('tree')
  (folder / 'sub').mkdir()
  (folder / 'setup.py').write_text('')
  (folder / 'sub' / 'a file.txt').write_text('one')
  (folder / '.gitignore').write_text('ignored\n')
  (folder / 'ignored').write_text('not to be copied')
  subprocess.run(['git', 'init', '-q', str(folder)], check=True)
  return folder


@pytest.fixture
def place(tmp_path):
  made = Place(tmp_path)
  yield made
  fake_gcloud.clear(made.cloud)


@pytest.fixture(scope='module')
def shared(tmp_path_factory, tree):
  """One that is set up, for tests that leave it so."""
  made = Place(tmp_path_factory.mktemp('shared'))
  made('create', 'tune', *MADE)
  made('setup', 'tune', f'--tree={tree}')
  yield made
  fake_gcloud.clear(made.cloud)


# --- create, setup, delete ------------------------------------------------------------------------


def test_create_waits_and_delete_ends(place):
  said = place('create', 'tune', *MADE, '--spot', '--project=my-project', '--label=team=a')
  order = [said.index(state) for state in ('WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE')]
  assert order == sorted(order)
  call, = [call for call in fake_gcloud.calls(place.cloud) if call[4] == 'create']
  assert {'--spot', '--node-id=tune', '--labels=team=a', '--project=my-project',
          '--accelerator-type=v5litepod-8', '--runtime-version=v2-alpha-tpuv5-lite'} < set(call)
  assert 'there already (ACTIVE)' in place('create', 'tune', *MADE, status=2)
  assert 'add --yes' in place('delete', 'tune', status=2)
  assert place.home().exists()
  place('delete', 'tune', '--yes')
  assert not place.home().exists()
  assert 'create it first' in place('setup', 'tune', status=1)


def test_slices_and_direct(place):
  """Nodes are named after their number; a TPU without a queue is a node."""
  place('create', 'tune', *MADE, '--slices=2')
  assert place.home('tune-1', 1).exists() and not place.home('tune').exists()
  place('create', 'now', *MADE, '--direct')
  assert place.home('now', 1).exists() and not (place.cloud / 'queued' / 'now.json').exists()
  assert 'now: READY' in place('status', 'now')
  place('delete', 'now', '--yes')
  assert 'tune: ACTIVE (v5litepod-8, 2 slices, europe-west4-b)' in place('status', 'tune')
  place('create', 'one', *MADE, '--slices=2', '--direct', status=2)


def test_create_tells_why_not(place):
  """gcloud's words, on one line; a request that failed; one that waits is waited for."""
  fake_gcloud.refuse(place.cloud, ['create'], 'RESOURCE_EXHAUSTED: Quota limit\n  exceeded')
  said = place('create', 'tune', *MADE, status=1)
  assert 'RESOURCE_EXHAUSTED: Quota limit' in said and said.count('\n') == 1
  fake_gcloud.write(place.cloud / 'queued' / 'tune.json',
                    {'state': 'FAILED', 'message': 'no such type here', 'nodes': ['tune']})
  assert 'FAILED: no such type here' in place('status', 'tune')
  assert 'there already (FAILED' in place('create', 'tune', *MADE, status=2)
  fake_gcloud.write(place.cloud / 'queued' / 'tune.json',
                    {'state': 'PROVISIONING', 'nodes': ['tune']})
  assert 'ACTIVE' in place('create', 'tune', *MADE)
  assert place.verbs().count('create') == 1
  fake_gcloud.write(place.cloud / 'queued' / 'large.json', {
    'state': 'WAITING_FOR_RESOURCES', 'nodes': ['large'],
    'node': {'acceleratorType': 'v5litepod-256', 'runtimeVersion': MADE[-1].partition('=')[2]}})
  assert 'already, with v5litepod-256' in place('create', 'large', *MADE, status=2)


def test_gcloud_is_missing(place):
  place.env['PATH'] = '/nowhere'
  said = place('status', 'tune', '--zone=europe-west4-b', status=2)
  assert 'cloud.google.com/sdk' in said and said.count('\n') == 1


def test_ctrl_c_leaves_it_running(place):
  fake_gcloud.write(place.cloud / 'queued' / 'tune.json', {'state': 'CREATING', 'nodes': ['tune']})
  process = subprocess.Popen(place.words('create', 'tune', *MADE), env=place.env, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             # a shell's background jobs, and all they start, are deaf to it
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
  assert 'CREATING' in process.stdout.readline()
  process.send_signal(signal.SIGINT)
  _, said = process.communicate(timeout=60)
  assert process.returncode == 130 and 'tpu_vm.py status tune' in said
  assert (place.cloud / 'queued' / 'tune.json').exists()


def test_setup(shared, tree):
  """On each worker: what git knows and nothing else, installed; a new tree is swapped in."""
  for n in range(2):
    base = shared.home(worker=n) / 'diffax-launch'
    files = {str(p.relative_to(base / 'tree')) for p in (base / 'tree').rglob('*')}
    assert files == {'.gitignore', 'setup.py', 'sub', 'sub/a file.txt', 'runs'}
    assert (base / 'tree' / 'runs').resolve() == base / 'runs'
    pip = (shared.home(worker=n) / 'pip.log').read_text()
    assert f'install -e {(base / "tree").resolve()}[tpu,gcs]' in pip
  before = (base / 'tree').resolve()
  (base / 'runs' / 'kept').write_text('kept')
  (tree / 'sub' / 'a file.txt').write_text('two')
  shared('setup', 'tune', f'--tree={tree}')
  assert (base / 'tree' / 'sub' / 'a file.txt').read_text() == 'two'
  assert (base / 'tree' / 'runs' / 'kept').read_text() == 'kept'
  assert (before / 'sub' / 'a file.txt').read_text() == 'one'


def test_setup_that_fails(place, tree):
  """Everywhere, it changes nothing; somewhere, nothing runs until all workers have one tree."""
  place('create', 'tune', *MADE)
  place('setup', 'tune', f'--tree={tree}')
  old = (place.home() / 'diffax-launch' / 'tree').resolve()
  (tree / 'new.txt').write_text('new')
  for n in range(2):
    (place.home(worker=n) / 'no-pip').touch()
  said = place('setup', 'tune', f'--tree={tree}', status=1)
  assert 'tune: ' in said and '-m pip install' in said
  assert (place.home() / 'diffax-launch' / 'tree').resolve() == old
  place('run', 'tune', '--', 'true')
  until(lambda: place.states() == ['ended, try 1'] * 2)
  (place.home() / 'no-pip').unlink()
  place('setup', 'tune', f'--tree={tree}', status=1)
  assert 'worker 0: another tree is set up' in place('run', 'tune', '--', 'true', status=1)
  (place.home(worker=1) / 'no-pip').unlink()
  place('setup', 'tune', f'--tree={tree}')
  place('run', 'tune', '--', 'true')
  assert 'no git checkout' in place('setup', 'tune', f'--tree={place.folder}', status=2)


def test_trees_that_are_refused(place, tree, tmp_path):
  place('create', 'tune', *MADE)
  other = tmp_path / 'other'
  shutil.copytree(tree, other)
  (other / 'runs').mkdir()
  (other / 'runs' / 'a').write_text('')
  assert '.gitignore' in place('setup', 'tune', f'--tree={other}', status=2)
  assert '--extras' in place('setup', 'tune', f'--tree={tree}', '--extras=tpu;id', status=2)
  said = place('setup', 'tune', f'--tree={tree}', '--extras=tpu', '--dry-run')
  assert '--extras tpu' in said and 'ssh' not in place.verbs()


def test_damaged_record(place):
  kept = place.folder / 'state' / 'diffax' / 'tpu' / 'tune.json'
  kept.parent.mkdir(parents=True)
  for text in ('{', '{"tpu": {"colour": "red"}}'):
    kept.write_text(text)
    said = place('status', 'tune', '--zone=z-1', status=2)
    assert str(kept) in said and said.count('\n') == 1


def test_old_python(place, tree):
  """Where the machine's is too old, uv brings one."""
  place('create', 'tune', *MADE)
  for n in range(2):
    wrapper = place.home(worker=n) / 'bin' / 'python3'
    text = wrapper.read_text().replace(
      "esac\n", "  '-c import') exit 1 ;;\n  '-m uv') printf '%s\\n' \"$*\" >> \"$HOME/uv.log\"\n"
      "    mkdir -p \"${@: -1}/bin\" && cp \"$0\" \"${@: -1}/bin/python\"; exit ;;\nesac\n")
    wrapper.write_text(text.replace('case "$1 $2"', 'case "$1 ${2%% *}"'))
  place('setup', 'tune', f'--tree={tree}')
  assert 'install --user uv' in (place.home() / 'pip.log').read_text()
  assert '--python 3.12' in (place.home() / 'uv.log').read_text()


# --- nothing is run, nothing slips through --------------------------------------------------------


@pytest.mark.parametrize('words', [
  ['create', 'tune', *MADE, '--spot', '--slices=2'],
  ['setup', 'tune', '--zone=z-1'],
  ['run', 'tune', *MADE, '--watch', '--', 'python', '-m', 'diffax.main', "a'b c"],
  ['status', 'tune', '--zone=z-1'],
  ['logs', 'tune', '--zone=z-1', '--worker=1'],
  ['logs', 'tune', '--zone=z-1', '--out=new'],
  ['results', 'tune', '--zone=z-1', '--out=new', '--workdir=runs/a'],
  ['stop', 'tune', '--zone=z-1'],
  ['delete', 'tune', '--zone=z-1'],
])
def test_dry_run(words, place):
  """Prints what would be run, so that a shell takes it for the same; and runs none."""
  cut = words.index('--') if '--' in words else len(words)
  said = place(*words[:cut], '--dry-run', *words[cut:])
  for line in said.splitlines():
    found = shlex.split(line)
    assert found[:3] == ['gcloud', 'compute', 'tpus'], line
  doing = {'create': 'create', 'delete': 'delete', 'results': 'scp', 'setup': 'scp'}
  assert f' {doing.get(words[0], "ssh" if "--out=new" not in words else "scp")} ' in said
  if words[0] == 'run':
    remote = [w for line in said.splitlines() for w in shlex.split(line) if '--command=' in w]
    started, = [line for line in map(shlex.split, remote) if 'start' in line]
    assert started[-1] == "a'b c"
  assert not fake_gcloud.calls(place.cloud)
  assert not (place.folder / 'state').exists() and not (place.folder / 'new').exists()


@pytest.mark.parametrize('words, said', [
  (['create', 'a;id', *MADE], 'lower-case'),
  (['create', '$(id)', *MADE], 'lower-case'),
  (['create', 'tune', *MADE, '--zone=a b'], '--zone'),
  (['create', 'tune', *MADE, '--project=a`id`'], '--project'),
  (['create', 'tune', *MADE, '--version=v2 --spot'], '--version'),
  (['create', 'tune', *MADE, '--label=a=b,c=d'], '--label'),
  (['create', 'tune', *MADE, '--label=api_key=hunter2'], 'secret'),
  (['create', 'tune', '--zone=z-1'], '--type is missing'),
  (['create', 'tune'], '--zone is missing'),
  (['run', 'tune', '--zone=z-1', '--run=a b', '--', 'true'], '--run'),
  (['run', 'tune', '--zone=z-1', '--run=../x', '--', 'true'], '--run'),
  (['run', 'tune', '--zone=z-1', '--', 'python', '--config.hf_token=hunter2'], 'secret'),
  (['run', 'tune', '--zone=z-1', '--', 'env', 'WANDB_API_KEY=hunter2', 'python'], 'secret'),
  (['run', 'tune', '--zone=z-1', '--', 'echo', 'two\nlines'], 'one line'),
  (['run', 'tune', '--zone=z-1'], 'say what to run'),
  (['run', 'tune', '--zone=z-1', '--watch', '--', 'true'], '--type is missing'),
  (['run', 'tune', '--zone=z-1', '--workdir=a', '--', 'x', '--workdir', 'b'], 'twice'),
  (['run', 'tune', '--zone=z-1', '--', 'x', '--workdir', 'here'], 'runs/...'),
  (['logs', 'tune', '--zone=z-1', '--slice=1'], '--slice'),
  (['results', 'tune', '--zone=z-1', '--out=new', '--workdir=$(id)'], '--workdir'),
  (['results', 'tune', '--zone=z-1', '--out=new', '--workdir=gs://b/r'],
   'gcloud storage cp -r gs://b/r new'),
])
def test_refused(words, said, place):
  """One line, before gcloud is asked anything; a secret's value is told nobody."""
  found = place(*words, status=2)
  assert said in found and found.count('\n') == 1 and 'hunter2' not in found
  assert not fake_gcloud.calls(place.cloud) and not (place.folder / 'state').exists()


HOSTILE = ['$(touch x)', '`id`', "it's", 'a  b', '"', '\\', ';', '&&', '*', '~', '', '-', '#',
           '$HOME', '{a,b}', '!', '|', 'ä€', '%s', '--config.a=(1, 2)', "--config.b='x'"]


def test_words_arrive_as_they_are(shared):
  """Each word of the command line is one word of the process, on every worker."""
  shared('run', 'tune', '--run=words', '--', 'printf', '<%s>\\n', *HOSTILE)
  until(lambda: shared.states('words') == ['ended, try 1'] * 2)
  for n in range(2):
    lines = shared.log('words', worker=n).splitlines()
    assert [line for line in lines if line.startswith('<')] == [f'<{word}>' for word in HOSTILE]


# --- runs -----------------------------------------------------------------------------------------

WAITS = """
import os, signal, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: {hears})
print('waits', flush=True)
while not asked:
  time.sleep(0.05)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
{saves}
print('saved', flush=True)
"""


def waits(hears='asked.append(1)', saves='time.sleep(1)'):
  """Python, on one line, that waits for SIGTERM, takes its time to save, and dies of a second."""
  return f'exec({WAITS.format(hears=hears, saves=saves)!r})'


TRIES = 'n=$(cat n 2>/dev/null); echo x >> n; [ $(wc -l < n) -ge 3 ] || exit 7; echo done'


def end_session(home, name):
  """By hand, on a worker."""
  subprocess.run(['tmux', 'kill-session', '-t', f'={name}'], check=True,
                 env=fake_gcloud.environment(home))


@pytest.mark.parametrize('with_tmux', [False, pytest.param(True, marks=pytest.mark.skipif(
  not shutil.which('tmux'), reason='tmux is not installed'))])
def test_run(with_tmux, tmp_path, tree):
  """Started again after trouble; not twice at once; not after a mistake; stopped; copied."""
  place = Place(tmp_path, with_tmux=with_tmux)
  try:
    place('create', 'tune', *MADE)
    assert 'not set up' in place('run', 'tune', '--', 'true', status=2)
    place('setup', 'tune', f'--tree={tree}')
    again = ['--tries=3', '--pause=0.1', '--']
    place('run', 'tune', '--run=a', *again, 'bash', '-c', TRIES)
    until(lambda: place.states('a') == ['ended, try 3'] * 2)
    assert place.log('a').count('ended with status 7') == 2 and 'done\n' in place.log('a')
    place('run', 'tune', '--run=b', *again, 'bash', '-c', 'echo a mistake; exit 2')
    until(lambda: place.states('b') == ['mistake, try 1'] * 2)
    place('run', 'tune', '--run=c', *again, 'false')
    until(lambda: place.states('c') == ['failed, try 3'] * 2)
    place('run', 'tune', *again, 'python', '-c', waits())
    until(lambda: 'waits' in place.log() and 'waits' in place.log(worker=1))
    assert 'run run is under way' in place('run', 'tune', '--', 'true', status=2)
    assert 'run run is under way' in place('run', 'tune', '--run=d', '--', 'true', status=1)
    assert 'run run is under way' in place('setup', 'tune', f'--tree={tree}', status=1)
    shown = subprocess.run(place.words('logs', 'tune', '--worker=1', '--lines=1'), env=place.env,
                           stdout=subprocess.PIPE, text=True, check=True).stdout
    assert shown == 'waits\n'
    place('stop', 'tune', '--grace=60')
    assert place.states() == ['stopped, try 1'] * 2
    assert place.log().count('saved') == 1 and 'status 0' in place.log()
    slow = waits(saves='while not os.path.exists("go"): time.sleep(0.05)')
    place('run', 'tune', '--run=e', *again, 'python', '-c', slow)
    until(lambda: 'waits' in place.log('e') and 'waits' in place.log('e', worker=1))
    end_session(place.home(), 'diffax-e')
    time.sleep(3)
    assert place.states('e') == ['running, try 1'] * 2  # it is saving
    (place.home() / 'diffax-launch' / 'tree' / 'go').write_text('')
    until(lambda: place.states('e') == ['interrupted, try 1', 'running, try 1'])
    assert 'saved' in place.log('e')
    place('logs', 'tune', f'--out={tmp_path / "logs"}')
    assert (tmp_path / 'logs' / 'tune-1.log').read_text() == place.log(worker=1)
    assert 'something already' in place('logs', 'tune', f'--out={tmp_path / "logs"}', status=2)
  finally:
    fake_gcloud.clear(place.cloud)




def test_stop_of_a_run_that_does_not_end(shared):
  """It is killed, and that is said."""
  shared('run', 'tune', '--run=deaf', '--', 'python', '-c', waits(hears='None'))
  until(lambda: all('waits' in shared.log('deaf', worker=n) for n in range(2)))
  assert 'was killed' in shared('stop', 'tune', '--run=deaf', '--grace=0.5', status=1)
  assert [s.partition(',')[0] for s in shared.states('deaf')] == ['stopped'] * 2
  until(lambda: not any(fake_gcloud.processes(shared.home(worker=n)) for n in range(2)), 20)


def test_a_loop_that_was_killed(shared):
  """What it had started goes on, keeps others from starting, and is stopped."""
  shared('run', 'tune', '--run=orphan', '--', 'python', '-c', waits())
  until(lambda: all('waits' in shared.log('orphan', worker=n) for n in range(2)))
  folder = shared.home() / 'diffax-launch' / 'logs' / 'orphan'
  os.kill(fake_gcloud.read(folder / 'state.json')['loop'], signal.SIGKILL)
  time.sleep(0.3)
  assert shared.states('orphan') == ['running, try 1'] * 2
  assert 'run orphan is under way' in shared('run', 'tune', '--run=next', '--', 'true', status=1)
  shared('stop', 'tune', '--run=orphan', '--grace=60')
  assert shared.states('orphan') == ['stopped, try 1'] * 2
  assert all('saved' in shared.log('orphan', worker=n) for n in range(2))


def test_slices(place, tree):
  """Both are set up, run and stopped; a log is one slice's."""
  place('create', 'tune', *MADE, '--slices=2')
  place('setup', 'tune', f'--tree={tree}')
  place('run', 'tune', '--', 'python', '-c', waits())
  homes = [place.home(f'tune-{i}', n) for i in range(2) for n in range(2)]
  logs = [home / 'diffax-launch' / 'logs' / 'run' / 'log' for home in homes]
  until(lambda: all(log.exists() and 'waits' in log.read_text() for log in logs))
  assert place.states() == ['running, try 1'] * 4
  place('stop', 'tune', '--grace=60')
  assert all('saved' in log.read_text() for log in logs)
  place('logs', 'tune', '--out', place.folder / 'logs')
  assert sorted(path.name for path in (place.folder / 'logs').iterdir()) == [
    'tune-0-0.log', 'tune-0-1.log', 'tune-1-0.log', 'tune-1-1.log']


def test_workers_that_do_not_answer(shared):
  """Why is told; and ssh does not wait for a machine that is gone."""
  said = 'SSH Key is not present in the SSH agent. Please run ssh-add'
  for words in (['status', 'tune'], ['run', 'tune', '--run=mute', '--', 'true']):
    fake_gcloud.refuse(shared.cloud, ['worker.py status'], said)
    assert said in shared(*words, status=int(words[0] == 'run'))
  sent = [call for call in fake_gcloud.calls(shared.cloud) if call[4] in ('ssh', 'scp')]
  assert all(any('-oServerAliveInterval=15' in word for word in call) for call in sent)


def test_all_workers_or_none(place, tree):
  """Where one cannot start, the others do not wait for it."""
  place('create', 'tune', *MADE)
  place('setup', 'tune', f'--tree={tree}')
  (place.home(worker=1) / 'diffax-launch' / 'tree').unlink()
  said = place('run', 'tune', '--', 'python', '-c', waits(), status=1)
  assert 'worker 1: nothing is set up here' in said
  assert 'running' not in ' '.join(place.states())


def test_machines_that_go_down_save_first(shared):
  """All there get SIGTERM and SIGHUP: the command the one once, and it is no end of the run."""
  shared('run', 'tune', '--run=down', '--', 'python', '-c', waits())
  until(lambda: all('waits' in shared.log('down', worker=n) for n in range(2)))
  fake_gcloud.kill(shared.cloud, 'tune', signal.SIGTERM)
  fake_gcloud.kill(shared.cloud, 'tune', signal.SIGHUP)
  until(lambda: shared.states('down') == ['interrupted, try 1'] * 2)
  assert all('saved' in shared.log('down', worker=n) for n in range(2))


def test_results(shared, tmp_path):
  """A workdir on the first worker is copied; one that hosts cannot share is refused."""
  said = shared('run', 'tune', '--', 'true', '--workdir=runs/r', status=2)
  assert "'runs/r' is a folder of each worker's own" in said
  folder = shared.home() / 'diffax-launch' / 'runs' / 'r'
  folder.mkdir()
  (folder / 'metrics.jsonl').write_text('{}\n')
  shared('results', 'tune', f'--out={tmp_path / "out"}', '--workdir=runs/r')
  assert (tmp_path / 'out' / 'r' / 'metrics.jsonl').read_text() == '{}\n'


@pytest.mark.parametrize('states, wanted', [
  (['ended', 'ended'], 'finished'),
  (['ended'], 'silent'),
  (['running', 'ended'], 'running'),
  (['ended', 'interrupted'], 'lost'),  # one slice preempted, the others saved with it
  (['running', 'lost'], 'lost'),
  (['running', 'none'], 'lost'),
  (['ended', 'stopped'], 'stopped'),
  (['running', 'stopped'], 'running'),
  (['running', 'mistake'], 'mistake'),
  (['running', 'failed'], 'failed'),
  (['running', 'bare'], 'bare'),
])
def test_outcome(states, wanted):
  assert tpu_runs.outcome([{'state': state} for state in states], 2) == wanted


# --- watching -------------------------------------------------------------------------------------


class Watching:
  """`run --watch`, or the command of `words`, in the background."""

  def __init__(self, place, *words):
    self.place, self.text = place, place.folder / 'watch'
    with open(self.text, 'w') as out:
      self.process = subprocess.Popen(place.words(*words), env=place.env, stdout=out, stderr=out)

  def says(self, text):
    until(lambda: text in self.text.read_text() or self.process.poll() is not None)
    assert text in self.text.read_text(), self.text.read_text()

  def ends(self, status):
    assert self.process.wait(600) == status, self.text.read_text()
    return self.text.read_text()


ONCE = 'f={0}/$JAX_PROCESS_ID; if [ -e $f ]; then echo second; else touch $f; sleep 600; fi'


@pytest.fixture
def watched(place, tree, tmp_path):
  """A run under a watch: the first time it is started it does not end, the second time it does."""
  place('create', 'tune', *MADE, '--spot')
  place('setup', 'tune', f'--tree={tree}')
  watching = Watching(place, 'run', 'tune', '--watch', '--', 'bash', '-c', ONCE.format(tmp_path))
  until(lambda: (tmp_path / '0').exists() and (tmp_path / '1').exists())
  watching.says('run run: running')
  yield watching
  watching.process.kill()


def test_watch_renews_after_preemption(watched, tree):
  """With the tree of then, though it has changed since; a quota that is full for a while."""
  place = watched.place
  (tree / 'sub' / 'a file.txt').write_text('changed meanwhile')
  fake_gcloud.refuse(place.cloud, ['create'], 'RESOURCE_EXHAUSTED: later', times=12)
  fake_gcloud.preempt(place.cloud, 'tune')
  said = watched.ends(0)
  for words in ('SUSPENDED; asking for it again', 'RESOURCE_EXHAUSTED: later; trying again',
                'PROVISIONING', 'started again', 'finished'):
    assert words in said
  assert place.verbs().count('delete') == 1 and place.verbs().count('create') == 14
  first, *_, last = [call for call in fake_gcloud.calls(place.cloud) if call[4] == 'create']
  assert first == last
  assert 'second' in place.log() and 'second' in place.log(worker=1)
  kept = place.home() / 'diffax-launch' / 'tree' / 'sub' / 'a file.txt'
  assert kept.read_text() != 'changed meanwhile'


def test_watch_starts_again_what_a_machine_lost(watched):
  """One that was rebooted; the other is ended with it. Once more where starting fails."""
  place = watched.place
  fake_gcloud.refuse(place.cloud, ['worker.py start'], 'ssh: connection refused')
  for pid in fake_gcloud.processes(place.home(worker=1)):
    os.kill(pid, signal.SIGKILL)
  said = watched.ends(0)
  assert 'connection refused; trying again' in said and 'lost' in said and 'started again' in said
  assert place.log().count('second') == 1 and place.log(worker=1).count('second') == 1
  assert place.verbs().count('create') == 1


def test_watch_ends_where_the_user_ended_it(watched):
  """A TPU that was deleted is not made again, nor a stopped run started."""
  place = watched.place
  place('stop', 'tune', '--grace=60')
  assert 'stopped' in watched.ends(3)
  again = Watching(place, 'run', 'tune', '--watch')
  again.ends(3)
  place('run', 'tune', '--', 'sleep', '600')
  again = Watching(place, 'run', 'tune', '--watch')
  again.says('running')
  place('delete', 'tune', '--yes')
  assert 'absent' in again.ends(1)
  assert place.verbs().count('create') == 1


def test_watch_takes_up_what_another_left(watched, tmp_path):
  """In the midst of renewing, whichever node was taken; the same command goes on watching."""
  place, words = watched.place, ['bash', '-c', ONCE.format(tmp_path)]
  assert 'by another process' in place('run', 'tune', '--watch', status=2)
  fake_gcloud.refuse(place.cloud, ['create'], 'RESOURCE_EXHAUSTED: later', times=1000)
  path = place.cloud / 'nodes' / 'tune.json'
  fake_gcloud.kill(place.cloud, 'tune')
  fake_gcloud.write(path, fake_gcloud.read(path) | {'state': 'PREEMPTED'})  # its resource ACTIVE
  watched.says('RESOURCE_EXHAUSTED')
  watched.process.kill()
  watched.process.wait()
  fake_gcloud.refuse(place.cloud, ['create'], '', times=0)
  again = Watching(place, 'run', 'tune', '--watch')
  again.says('PROVISIONING')
  assert 'finished' in again.ends(0)
  place('run', 'tune', '--', 'sleep', '600')
  again = Watching(place, 'run', 'tune', '--watch', '--', 'sleep', '600')
  again.says('run run: running')
  assert 'is under way' in again.text.read_text()
  place('stop', 'tune', '--grace=60')
  again.ends(3)
  place('run', 'tune', '--watch', '--', *words)  # the files of the first time are there


def test_stopped_while_its_machines_are_away(watched):
  place = watched.place
  fake_gcloud.refuse(place.cloud, ['create'], 'RESOURCE_EXHAUSTED: later', times=1000)
  fake_gcloud.preempt(place.cloud, 'tune')
  watched.says('RESOURCE_EXHAUSTED')
  assert 'not ready' in place('stop', 'tune', '--run=other', status=1)
  assert 'is not started again' in place('stop', 'tune')
  assert 'stopped' in watched.ends(3)


def test_watch_does_not_make_again_what_its_user_deleted(watched):
  fake_gcloud.suspend(watched.place.cloud, 'tune', 'USER')
  said = watched.ends(1)
  assert 'a user has deleted' in said and 'not to be had' in said
  assert watched.place.verbs().count('delete') == 0


def test_watch_tells_a_mistake(shared):
  """With the last line of the one that made it; nobody waits for it."""
  mistake = 'if [ $JAX_PROCESS_ID = 1 ]; then echo error: no such thing; exit 2; fi; sleep 600'
  watching = Watching(shared, 'run', 'tune', '--run=wrong', '--watch', '--', 'bash', '-c', mistake)
  assert 'worker 1: mistake' in watching.ends(2)
  assert 'running' not in shared.states('wrong')


# --- a training run -------------------------------------------------------------------------------

ENV = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': run_diffax.flags(1),
       'JAX_CPU_ENABLE_ASYNC_DISPATCH': 'false', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
STEPS = 40
TRAIN = ('python', '-m', 'diffax.main', '--config=tests/run_diffax.py', '--config.log_every=1',
         f'--config.steps={STEPS}',
         '--config.data.name=run_diffax.digits_in_turn', '--config.model.dropout=0.1')


@pytest.fixture(scope='module')
def calm(tmp_path_factory):
  """The workdir of the same run by two hosts, which nothing happens to."""
  workdir = tmp_path_factory.mktemp('calm') / 'run'
  command = [sys.executable, str(LAUNCH / 'local.py'), '--hosts=2', '--devices=1', '--',
             sys.executable, *TRAIN[1:], f'--workdir={workdir}']
  done = subprocess.run(command, env=run_diffax.environment(), capture_output=True, text=True,
                        cwd=run_diffax.ROOT, timeout=600)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return workdir


def same(workdir, wanted):
  assert [row['step'] for row in run_diffax.numbers(workdir)] == list(range(1, STEPS + 1))
  assert run_diffax.numbers(workdir) == run_diffax.numbers(wanted)
  run_diffax.assert_same(run_diffax.arrays(workdir, STEPS), run_diffax.arrays(wanted, STEPS))


@pytest.mark.slow  # three minutes; the watch without JAX is tested above
def test_training_is_preempted_and_resumed(calm, tmp_path):
  """Two hosts, killed between checkpoints: made again they end with the bits of an undisturbed run.

  Stopped by hand before that, it goes on from where it saved.
  """
  workdir, slow = tmp_path / 'run', dict(ENV, DIFFAX_TEST_SLEEP='0.1', PYTHONPATH='tests')
  place = Place(tmp_path, with_tmux=bool(shutil.which('tmux')), **slow)
  steps = lambda: len(run_diffax.numbers(workdir)) if (workdir / 'metrics.jsonl').exists() else 0
  start = ['run', 'tune', f'--workdir={workdir}', '--watch', '--', *TRAIN]
  try:
    place('create', 'tune', *MADE, '--spot')
    place('setup', 'tune')
    watching = Watching(place, *start)
    until(lambda: steps() >= 3 or watching.process.poll() is not None, 600)
    place('stop', 'tune')
    assert 'stopped' in watching.ends(3) and steps() < STEPS - 15
    assert f'stopped at step {steps()}; the same command goes on' in place.log()
    stopped = steps()
    watching = Watching(place, *start)
    until(lambda: steps() >= stopped + 2 or watching.process.poll() is not None, 600)
    fake_gcloud.preempt(place.cloud, 'tune')
    newest = checkpoint.present(workdir / 'checkpoints')[-1]
    assert stopped <= newest <= steps() < STEPS
    assert 'started again' in watching.ends(0)
    assert f'going on from the checkpoint of step {newest}' in place.log()
  finally:
    fake_gcloud.clear(place.cloud)
  same(workdir, calm)
