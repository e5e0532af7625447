"""launch/slurm.py: its script's words, how it ends, and jobs on a cluster where there is one.

The cluster is `tests/slurm_cluster.py start`'s; without it the tests that need one are skipped.
"""

import importlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
import run_diffax
import slurm_cluster

from diffax import hosts

LAUNCHER = run_diffax.ROOT / 'launch' / 'slurm.py'
sys.path.append(str(LAUNCHER.parent))
slurm = importlib.import_module('slurm')
SOME = ('--name=some', '--folder=logs')
PATIENCE = 900  # seconds, with a machine that has other work to do
HOSTILE = ['python', '-m', 'x', "it's", '$(touch oops)', '`touch oops`', '; touch oops', 'a  b',
           '*', '"', '\\', '--', '#', '${HOME}', '--config.sample.prompts=("a", "b")', 'Tromsø']


def launch(*arguments, cwd, command=('true',), env=None):
  """What `launch/slurm.py submit` did: status, output."""
  words = [sys.executable, str(LAUNCHER), 'submit', *arguments, *(['--'] if command else [])]
  return subprocess.run(
    [*words, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def rendered(tmp_path, *arguments, command=('true',)):
  done = launch(*SOME, '--dry-run', *arguments, cwd=tmp_path, command=command)
  assert done.returncode == 0, done.stderr
  return done.stdout


def options(text):
  """{option: value} of a script's #SBATCH lines, '' for one without."""
  lines = [line.removeprefix('#SBATCH --') for line in text.splitlines() if '#SBATCH' in line]
  return {name: value for name, _, value in (line.partition('=') for line in lines)}


def executable(folder, name, text):
  folder.mkdir(exist_ok=True)
  (folder / name).write_text('#!/bin/bash\n' + text)
  (folder / name).chmod(0o755)


# --- the script -----------------------------------------------------------------------------------


def test_options_of_cpus(tmp_path):
  found = options(rendered(tmp_path, '--nodes=3', '--time=2-0', '--signal-seconds=300'))
  assert found == {
    'job-name': 'some', 'output': f'{tmp_path}/logs/some-%j.log', 'nodes': '3', 'time': '2-0',
    'ntasks-per-node': '1', 'signal': 'B:USR1@300', 'requeue': '', 'open-mode': 'append',
    'export': 'ALL'}
  assert not (tmp_path / 'logs').exists()


@pytest.mark.parametrize('per, tasks', [('node', '1'), ('gpu', '8')])
def test_options_of_gpus(per, tasks, tmp_path):
  """No option binds a GPU to a process: jax takes the one of its own number among all."""
  found = options(rendered(
    tmp_path, '--nodes=2', '--gpus-per-node=a100:8', f'--per={per}', '--cpus-per-task=12',
    '--partition=long,short', '--account=a.b', '--qos=high', '--constraint=[rack1|rack2]&ib',
    '--sbatch=exclude=n[3-4]', '--sbatch=exclusive'))
  assert found['gpus-per-node'] == 'a100:8' and found['ntasks-per-node'] == tasks
  assert not found.keys() & {'gpus-per-task', 'ntasks-per-gpu', 'gpu-bind'}
  wanted = {'cpus-per-task': '12', 'partition': 'long,short', 'account': 'a.b', 'qos': 'high',
            'constraint': '[rack1|rack2]&ib', 'exclude': 'n[3-4]', 'exclusive': ''}
  assert found.items() >= wanted.items()


def test_words_of_the_command(tmp_path):
  """The shell of the job has the very words, and does nothing else with them."""
  folder = tmp_path / "a 'folder'"
  folder.mkdir()
  (folder / 'venv').write_text('')
  logs = f'{tmp_path}/R&D(1)|*[a]'
  text = launch('--name=some', f'--folder={logs}', '--dry-run', '--activate=venv', cwd=folder,
                command=HOSTILE).stdout
  head = text[: text.index(slurm.BODY)]
  line = next(line for line in head.splitlines() if line.startswith('readonly command='))
  assert shlex.split(line.removeprefix('readonly command=(').removesuffix(')')) == HOSTILE
  done = subprocess.run(
    ['bash', '-c', head + 'printf "%s\\0" "$home" "$activate" "$logs" "${command[@]}"'],
    cwd=tmp_path, capture_output=True, text=True)
  assert done.stdout.split('\0')[:-1] == [str(folder), str(folder / 'venv'), logs, *HOSTILE]
  assert not done.stderr and not list(tmp_path.rglob('oops'))


@pytest.mark.parametrize('arguments, words', [
  (['--name=Some'], ["--name='Some'", 'lower-case']),
  (['--name=a\n#SBATCH --wrap=x'], ['--name=', 'lower-case']),
  (['--partition=gpu\n#SBATCH --wrap=x'], ['--partition=', 'letters']),
  (['--account=a b'], ["--account='a b'", 'letters']),
  (['--qos='], ["--qos=''", 'letters']),
  (['--constraint=a"b'], ['--constraint=', 'letters']),
  (['--folder=my logs'], ['--folder=', 'my logs', 'letters']),
  (['--folder=100%'], ['--folder=', '100%', 'letters']),
  (['--nodes=0'], ['--nodes=0', '1 to']),
  (['--cpus-per-task=0'], ['--cpus-per-task=0', '1 to']),
  (['--requeues=-1'], ['--requeues=-1', '0 to']),
  (['--gpus-per-node=0'], ["--gpus-per-node='0'", 'a100:8']),
  (['--gpus-per-node=8 --wrap=x'], ['--gpus-per-node=', 'a100:8']),
  (['--per=gpu'], ['--per gpu', '--gpus-per-node 8']),
  (['--time=soon'], ["--time='soon'", '24:00:00']),
  (['--time=1:00\n#SBATCH --wrap=x'], ['--time=', '24:00:00']),
  (['--time=3'], ['--time=3', '--signal-seconds=120', 'say more time']),
  (['--signal-seconds=0'], ['--signal-seconds=0', '1 to 65535']),
  (['--sbatch=mem=1 2'], ["--sbatch=mem='1 2'", 'letters']),
  (['--sbatch=--mem=1'], ["--sbatch='--mem=1'", 'mem=200G']),
  (['--sbatch=gpus-per-task=1'], ['--sbatch=gpus-per-task', 'relies']),
  (['--sbatch=signal=B:TERM@3'], ['--sbatch=signal', 'relies']),
  (['--sbatch=sig=B:TERM@3'], ['--sbatch=sig', 'signal', 'relies']),  # which sbatch takes for it
  (['--sbatch=no-requeu'], ['--sbatch=no-requeu', 'relies']),
  (['--activate=nowhere'], ['--activate=nowhere', 'virtual environment']),
])
def test_refused(arguments, words, tmp_path, monkeypatch, capsys):
  """One line that names what was said; sbatch is not called, nothing is written."""
  executable(tmp_path / 'bin', 'sbatch', f'touch {tmp_path}/called\n')
  monkeypatch.setenv('PATH', f'{tmp_path}/bin', prepend=os.pathsep)
  monkeypatch.chdir(tmp_path)
  assert slurm.main(['submit', *SOME, *arguments, '--', 'true']) == 2
  said = capsys.readouterr()
  assert said.err.startswith('error: ') and said.err.count('\n') == 1 and not said.out
  assert all(word in said.err for word in words), said.err
  assert [path.name for path in tmp_path.iterdir()] == ['bin']


@pytest.mark.parametrize('command, word', [
  ([], 'what the nodes run'),
  (['python', 'a\nb'], 'one line'),
  (['python', '--token=hunter2'], 'looks like a secret'),
  (['env', 'HF_TOKEN=hunter2', 'python'], 'looks like a secret'),
])
def test_refused_commands(command, word, tmp_path):
  done = launch(*SOME, '--dry-run', cwd=tmp_path, command=command)
  assert done.returncode == 2 and not done.stdout
  assert word in done.stderr and 'hunter2' not in done.stderr


@pytest.mark.parametrize('text, seconds', [
  ('5', 300), ('5:30', 330), ('1:00:00', 3600), ('2-1', 176400), ('2-1:30', 178200),
  ('1-00:00:09', 86409)])
def test_duration(text, seconds):
  """As sbatch's manual has them."""
  assert slurm.duration(text) == seconds


# --- how the script ends, with a stand-in for Slurm -----------------------------------------------

SRUN = """
set -m  # the task has a process group, as slurmstepd gives it
echo "$*" > srun
while [ "$1" != bash ]; do shift; done
(until [ -s group ]; do sleep 0.01; done; exec "$@") &  # what the task says comes after
echo $! > group
wait $!
status=$?
exit "${SRUN_STATUS:-$status}"
"""
SCANCEL = """
echo "scancel $*" >> calls
kill -TERM -- -"$(cat group)"
"""
SCONTROL = """
if [ "$1" = show ]; then echo "JobId=7 $FACTS Requeue=1"; else echo "scontrol $*" >> calls; fi
"""
RUNNING = 'JobState=RUNNING PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=None'
PREEMPTED = RUNNING.replace('None', '2026-01-01T00:01:00')
REQUEUE = 'scontrol requeue 7'
SAVES = ['bash', '-c', 'trap "sleep 0.5; echo saved; exit 0" TERM; echo here; sleep 60 & wait']


class Script:
  """A job's script as Slurm runs it in `folder`, where Slurm's programs note their calls."""

  def __init__(self, folder, command, *arguments, facts=RUNNING, **env):
    for name, text in dict(srun=SRUN, scancel=SCANCEL, scontrol=SCONTROL).items():
      executable(folder / 'bin', name, text)
    (folder / 'logs').mkdir(exist_ok=True)
    self.folder = folder
    env = dict(PATH=f'{folder}/bin:{os.environ["PATH"]}', SLURM_JOB_ID='7', SLURM_JOB_NAME='some',
               SLURM_JOB_NODELIST='n1', FACTS=facts, **env)
    self.process = subprocess.Popen(
      ['bash', '-c', rendered(folder, *arguments, command=command)], env=env, cwd=folder,
      text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

  def says(self, text):
    for line in self.process.stdout:
      if text in line:
        return
    raise AssertionError(f'ended without {text!r}')

  def end(self):
    """(exit status, what scancel and scontrol were told, the rest of what was printed)."""
    said = self.process.communicate(timeout=60)[0]
    calls = self.folder / 'calls'
    left = [path.name for path in (self.folder / 'logs').iterdir()]
    assert left == ['some-7.orderly'] * ('the nodes back' in said or 'preempted;' in said), left
    return self.process.returncode, calls.read_text().splitlines() if calls.exists() else [], said


@pytest.mark.parametrize('command, srun, status, requeued, word', [
  ('exit 0', None, 0, False, 'ended with status 0'),
  ('exit 2', None, 2, False, 'ended with status 2'),
  ('exit 1', None, 1, False, 'ended with status 1'),
  ('exit 2', '137', 2, False, 'ended with status 2'),  # srun killed others that stood still
  ('exit 1', '143', 1, False, 'ended with status 1'),
  ('kill -KILL $$', None, 0, True, 'was killed (status 137)'),
  ('exit 0', '137', 0, True, 'was killed (status 137)'),  # and so was the shell that keeps it
  ('exit 134', None, 0, True, 'was killed (status 134)'),
])
def test_endings(command, srun, status, requeued, word, tmp_path):
  env = {} if srun is None else dict(SRUN_STATUS=srun)
  found, calls, said = Script(tmp_path, ['bash', '-c', command], **env).end()
  assert (found, calls) == (status, [REQUEUE] if requeued else []), said
  assert word in said


@pytest.mark.parametrize('restarts, status', [('1', 0), ('2', 1)])
def test_requeues_are_bounded(restarts, status, tmp_path):
  script = Script(tmp_path, ['bash', '-c', 'kill -KILL $$'], '--requeues=2',
                  SLURM_RESTART_COUNT=restarts)
  found, calls, said = script.end()
  assert (found, calls) == (status, [] if status else [REQUEUE]), said
  assert f'start {int(restarts) + 1}' in said and ('not requeued: --requeues 2' in said) == status


def test_starts_that_failing_nodes_ended(tmp_path):
  """Slurm starts those again by itself; they are bounded, too."""
  found, calls, said = Script(tmp_path, ['true'], '--requeues=2', SLURM_RESTART_COUNT='3').end()
  assert (found, calls) == (1, []) and '3 starts ended by trouble; not requeued' in said


def test_stops_in_good_order_are_not_counted(tmp_path):
  """A run of many days is one of many starts."""
  (tmp_path / 'logs').mkdir()
  (tmp_path / 'logs' / 'some-7.orderly').write_text('30\n')
  script = Script(tmp_path, SAVES, '--requeues=2', SLURM_RESTART_COUNT='32')
  script.says('here')
  script.process.send_signal(signal.SIGUSR1)
  status, calls, said = script.end()
  assert (status, calls) == (0, ['scancel --signal=TERM 7', REQUEUE]), said
  assert (tmp_path / 'logs' / 'some-7.orderly').read_text() == '31\n'


@pytest.mark.parametrize('statuses, wanted', [
  ('1 137', '137'), ('137 1', '137'),  # killed, and the other missed it
  ('1 134', '1'), ('134 1', '1'),  # an error, for which another aborted
  ('137 2', '2'), ('2 1', '2'), ('134', '134'), ('134 139', '139'), ('1 3', '1'),
])
def test_verdict(statuses, wanted):
  """Whichever process ended first, and on whichever node."""
  function = slurm.BODY[slurm.BODY.index('verdict() {') : slurm.BODY.index('patiently() {')]
  said = subprocess.run(['bash', '-c', f'{function}\nverdict {statuses}'], capture_output=True,
                        text=True, check=True)
  assert said.stdout.strip() == wanted


def test_stop_of_what_has_no_handler_yet(tmp_path):
  """It has nothing to save: a stop that was wanted is no kill."""
  script = Script(tmp_path, ['bash', '-c', 'echo here; exec sleep 60'])
  script.says('here')
  os.killpg(int((tmp_path / 'group').read_text()), signal.SIGTERM)
  status, calls, said = script.end()
  assert (status, calls) == (0, []), said


def test_a_controller_that_is_busy(tmp_path):
  """Slurm's programs are asked again."""
  script = Script(tmp_path, SAVES, SLURM_PY_PAUSE='0.1')
  scancel = tmp_path / 'bin' / 'scancel'
  scancel.write_text(scancel.read_text().replace(
    'echo', '[ -e tried ] || { touch tried; exit 1; }\necho', 1))
  script.says('here')
  script.process.send_signal(signal.SIGUSR1)
  status, calls, said = script.end()
  assert (tmp_path / 'tried').exists()
  assert (status, calls) == (0, ['scancel --signal=TERM 7', REQUEUE]), said


@pytest.mark.parametrize('signals', [1, 2])
def test_signal_ahead_of_the_limit(signals, tmp_path):
  """It reaches the processes once, however often it comes: a second one would end the saving."""
  script = Script(tmp_path, SAVES)
  script.says('here')
  for _ in range(signals):
    script.process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
  status, calls, said = script.end()
  assert (status, calls) == (0, ['scancel --signal=TERM 7', REQUEUE]), said
  assert said.index('saved') < said.index('requeued')


@pytest.mark.parametrize('facts, requeued', [
  (PREEMPTED, True),
  (RUNNING, False),  # `scancel --signal=TERM`: a stop that is wanted
  (PREEMPTED.replace('RUNNING', 'CANCELLED'), False),
])
def test_processes_that_slurm_stops(facts, requeued, tmp_path):
  """They end well, as those do that have finished; only Slurm knows why."""
  script = Script(tmp_path, SAVES, facts=facts)
  script.says('here')
  os.killpg(int((tmp_path / 'group').read_text()), signal.SIGTERM)
  status, calls, said = script.end()
  assert (status, calls) == (0, [REQUEUE] if requeued else []), said


def test_shell_that_slurm_stops(tmp_path):
  """It waits for the processes, which Slurm has told, too, and leaves the rest to Slurm."""
  script = Script(tmp_path, SAVES)
  script.says('here')
  script.process.send_signal(signal.SIGTERM)
  time.sleep(0.3)
  assert script.process.poll() is None
  os.killpg(int((tmp_path / 'group').read_text()), signal.SIGTERM)
  status, calls, said = script.end()
  assert (status, calls) == (0, []) and 'ended by Slurm' in said


def test_what_processes_are_told(tmp_path):
  """What is activated, and nothing of another run's hosts."""
  (tmp_path / 'venv' / 'bin').mkdir(parents=True)
  (tmp_path / 'venv' / 'bin' / 'activate').write_text('export MINE=yes JAX_PROCESS_ID=3\n')
  script = Script(tmp_path, ['env'], '--activate=venv', '--cpus-per-task=3',
                  JAX_COORDINATOR_ADDRESS='a:1', JAX_NUM_PROCESSES='2', SLURM_CPUS_PER_TASK='3')
  status, _, said = script.end()
  assert status == 0 and 'MINE=yes' in said and 'PYTHONUNBUFFERED=1' in said
  assert not [name for name in hosts.EXPLICIT if name in said]
  assert '--kill-on-bad-exit=1 --label --cpus-per-task=3 bash' in (tmp_path / 'srun').read_text()


# --- its submission -------------------------------------------------------------------------------


def submission(tmp_path, sbatch, *arguments, command=('true',), **env):
  """What a submission did with a stand-in for sbatch."""
  executable(tmp_path / 'bin', 'sbatch', sbatch)
  env = os.environ | {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}'} | env
  return launch(*SOME, *arguments, cwd=tmp_path, env=env, command=command)


def test_submission(tmp_path):
  """The script is what a dry run prints, and is kept; secrets and other jobs' settings are not."""
  sbatch = f'env > {tmp_path}/env; cp "$2" {tmp_path}/given; echo "$1 $#" > {tmp_path}/words\n'
  wanted = rendered(tmp_path, '--qos=high', command=HOSTILE)
  done = submission(
    tmp_path, sbatch + 'echo "welcome"; echo "123;here"; echo "advice" >&2\n', '--qos=high',
    command=HOSTILE, HF_TOKEN='hunter2', DB='postgres://me:hunter2@host', SLURM_JOB_ID='5',
    SBATCH_TIMELIMIT='1', SBATCH_QOS='low', SLURM_CONF='there', SBATCH_ACCOUNT='mine', OTHER='kept')
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'words').read_text() == '--parsable 2\n'
  assert (tmp_path / 'given').read_text() == wanted
  assert [path.name for path in (tmp_path / 'logs').iterdir()] == ['some-123.sbatch']
  assert (tmp_path / 'logs' / 'some-123.sbatch').read_text() == wanted
  env = (tmp_path / 'env').read_text().splitlines()
  assert {'OTHER=kept', 'SLURM_CONF=there', 'SBATCH_ACCOUNT=mine'} <= set(env)
  left = ('HF_TOKEN=', 'DB=', 'SLURM_JOB_ID=', 'SBATCH_TIMELIMIT=', 'SBATCH_QOS=')
  assert not [line for line in env if line.startswith(left)]
  assert 'job 123' in done.stdout and f'{tmp_path}/logs/some-123.log' in done.stdout
  assert 'HF_TOKEN looks like a secret' in done.stdout and 'hunter2' not in done.stdout
  assert done.stderr == 'advice\n'


def test_submission_that_sbatch_refuses(tmp_path):
  done = submission(tmp_path, 'echo "sbatch: error: invalid partition: nope" >&2; exit 1\n')
  assert done.returncode == 2 and not done.stdout
  assert 'sbatch: error: invalid partition: nope' in done.stderr and done.stderr.count('\n') == 1
  assert not list((tmp_path / 'logs').iterdir())


def test_submission_without_slurm(tmp_path):
  done = launch(*SOME, cwd=tmp_path, env=os.environ | {'PATH': str(tmp_path)})
  assert done.returncode == 2 and 'no sbatch on PATH' in done.stderr
  assert not list((tmp_path / 'logs').iterdir())


def test_submission_into_a_folder_that_cannot_be(tmp_path):
  (tmp_path / 'logs').write_text('mine')
  done = submission(tmp_path, 'echo 1\n')
  assert done.returncode == 2 and '--folder=logs cannot be written' in done.stderr
  assert (tmp_path / 'logs').read_text() == 'mine'


# --- on two nodes ---------------------------------------------------------------------------------

CONFIG = (f'--config={run_diffax.SMOKE}', '--config.data.name=run_diffax.digits',
          '--config.mesh.fsdp=2', '--config.log_every=1', '--config.save_every=5',
          '--config.model.dropout=0.1')
TOY = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))
starts = folder / f'starts-{sys.argv[2]}'
starts.write_text((starts.read_text() if starts.exists() else '') + 'x')
print('here', flush=True)
time.sleep(600 if len(starts.read_text()) == 1 else 0)
"""


@pytest.fixture(scope='module')
def cluster():
  """The environment in which Slurm's programs speak to the cluster of the tests."""
  why = slurm_cluster.available()
  if why:
    pytest.skip(why)
  return slurm_cluster.environment()


class Job:
  """A job on the cluster, cancelled where the test leaves it."""

  def __init__(self, env, folder, command, *arguments):
    self.env, self.folder = env, folder
    done = launch(*SOME, '--nodes=2', *arguments, cwd=folder, command=command, env=env)
    assert done.returncode == 0, done.stderr
    self.number = done.stdout.split()[1].rstrip(':')
    self.log = folder / 'logs' / f'some-{self.number}.log'

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.call('scancel', self.number, check=False)
    self.until(lambda: self.facts()['JobState'] not in ('RUNNING', 'COMPLETING', 'PENDING'))

  def call(self, *words, check=True):
    done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 or not check, done.stderr
    return done.stdout

  def text(self):
    return self.log.read_text(errors='replace') if self.log.exists() else ''

  def facts(self):
    """What scontrol tells of it, by name."""
    words = self.call('scontrol', 'show', 'job', '--oneliner', self.number).split()
    return dict(word.split('=', 1) for word in words if '=' in word)

  def until(self, condition):
    end = time.monotonic() + PATIENCE
    while not condition():
      assert time.monotonic() < end, f'{self.facts()}\n{self.text()}'
      time.sleep(0.3)

  def says(self, text, times=1):
    self.until(lambda: self.text().count(text) >= times)

  def start_again(self, restarts):
    """Waits until it is requeued, and spares the test the two minutes that Slurm lets pass."""
    waits = lambda facts: facts['JobState'] == 'PENDING' and facts['Restarts'] == str(restarts)
    self.until(lambda: waits(self.facts()))
    self.call('scontrol', 'update', f'JobId={self.number}', 'StartTime=now')

  def end(self):
    """(state, exit status, number of starts after the first), once it is over."""
    self.until(lambda: self.facts()['JobState'] not in ('RUNNING', 'COMPLETING', 'PENDING'))
    facts = self.facts()
    return facts['JobState'], int(facts['ExitCode'].split(':')[0]), int(facts['Restarts'])

  def processes(self):
    """{number of the task: process} of its Pythons."""
    found = {}
    for folder in pathlib.Path('/proc').glob('[0-9]*'):
      try:
        env = dict(word.split('=', 1) for word in (folder / 'environ').read_text().split('\0')
                   if '=' in word)
        if (env.get('SLURM_JOB_ID') == self.number and 'SLURM_PROCID' in env
            and 'python' in (folder / 'comm').read_text()):
          found[int(env['SLURM_PROCID'])] = int(folder.name)
      except (OSError, UnicodeDecodeError):
        pass
    return found


def training(env, folder, *arguments, sleep=0.0):
  """A job that trains into `folder`/run on two nodes, a device each."""
  command = ['python', '-m', 'diffax.main', f'--workdir={folder}/run', *CONFIG, *arguments]
  path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), env['PATH']])
  env = env | run_diffax.environment(1, sleep) | {'PATH': path, 'SLURM_CONF': env['SLURM_CONF']}
  return Job(env, folder, command)


def toy(env, folder, *arguments):
  """A job of processes that wait to be stopped, the first time they are started."""
  (folder / 'toy.py').write_text(TOY)
  command = ['bash', '-c', f'exec {sys.executable} toy.py . "$SLURM_PROCID"']
  return Job(env, folder, command, *arguments)


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """The numbers of one process with two devices."""
  workdir = tmp_path_factory.mktemp('one') / 'run'
  process = run_diffax.Process(workdir, *CONFIG, count=2)
  assert process.end(PATIENCE) == 0, process.text()
  return run_diffax.numbers(workdir)


def assert_same_numbers(workdir, wanted):
  rows = run_diffax.numbers(workdir)
  assert [row['step'] for row in rows] == list(range(1, 21))
  for row, other in zip(rows, wanted, strict=True):
    assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.slow  # the interrupted training is compared with the same process
def test_two_nodes_are_as_one_process(cluster, one, tmp_path):
  with training(cluster, tmp_path) as job:
    assert job.end() == ('COMPLETED', 0, 0), job.text()
  assert '0: step 20/20' in job.text() and '2 devices of 2 hosts' in job.text()
  assert_same_numbers(tmp_path / 'run', one)
  assert len(json.loads((tmp_path / 'run' / 'environment.json').read_text())) == 1


def test_training_that_is_interrupted(cluster, one, tmp_path):
  """By the signal ahead of the limit, and by the end of one process: as if nothing had been."""
  with training(cluster, tmp_path, sleep=0.02) as job:
    job.says('step 2/20')
    job.call('scancel', '--signal=USR1', '--batch', job.number)
    job.start_again(1)
    assert 'stopped at step' in job.text() and 'requeued' in job.text()
    job.says('going on from the checkpoint of step')
    job.until(lambda: 1 in job.processes())
    os.kill(job.processes()[1], signal.SIGKILL)
    job.start_again(2)
    assert 'a process was killed (status 137); requeued' in job.text()
    assert not job.processes()
    assert job.end() == ('COMPLETED', 0, 2), job.text()
  assert_same_numbers(tmp_path / 'run', one)


def test_mistake_is_not_requeued(cluster, tmp_path):
  with training(cluster, tmp_path, '--config.stepz=3') as job:
    assert job.end() == ('FAILED', 2, 0), job.text()
  assert 'stepz' in job.text() and 'the command ended with status 2' in job.text()
  assert not (tmp_path / 'run').exists()


def test_preemption(cluster, tmp_path):
  """Slurm stops the processes, which end well; the job starts again when the other one is done."""
  with toy(cluster, tmp_path, '--partition=debug') as job:
    job.says('here', 2)
    (tmp_path / 'urgent').mkdir()
    with Job(cluster, tmp_path / 'urgent', ['true'], '--partition=urgent',
             '--sbatch=exclusive') as urgent:
      job.start_again(1)
      assert urgent.end() == ('COMPLETED', 0, 0)
    assert job.end() == ('COMPLETED', 0, 1), job.text()
  assert job.text().count('saved') == 2 and 'preempted; requeued' in job.text()


def test_stop_that_is_wanted(cluster, tmp_path):
  with toy(cluster, tmp_path) as job:
    job.says('here', 2)
    job.call('scancel', '--signal=TERM', job.number)
    assert job.end() == ('COMPLETED', 0, 0), job.text()
  assert job.text().count('saved') == 2 and 'requeued' not in job.text()


@pytest.mark.parametrize('per, wanted', [
  ('node', [dict(local_device_ids=[0, 1])] * 2),  # both of its node
  ('gpu', [{}] * 4),  # jax takes the one of its SLURM_LOCALID
])
def test_gpus(per, wanted, cluster, tmp_path):
  """What Slurm tells the processes, and what diffax makes of it; all see all GPUs of their node."""
  with Job(cluster, tmp_path, ['env'], '--gpus-per-node=2', f'--per={per}') as job:
    assert job.end() == ('COMPLETED', 0, 0), job.text()
  said = {}
  for line in job.text().splitlines():
    task, mark, word = line.partition(': ')
    if mark and task.isdigit() and '=' in word:
      said.setdefault(int(task), {}).update([word.split('=', 1)])
  said = [said[task] for task in sorted(said)]
  assert [hosts.settings(env | {'JAX_PLATFORMS': 'cuda'}) for env in said] == wanted
  assert [env['CUDA_VISIBLE_DEVICES'] for env in said] == ['0,1'] * len(wanted)
  assert [env['SLURM_LOCALID'] for env in said] == ['0', '0'] if per == 'node' else ['0', '1'] * 2
