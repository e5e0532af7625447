"""Several hosts: how they find each other, that two are as one, and who is named when one hangs."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import run_diffax

from diffax import checkpoint
from diffax import hosts
from diffax import main
from diffax.build import ConfigError


def module(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  made = importlib.util.module_from_spec(spec)
  sys.modules[path.stem] = made
  spec.loader.exec_module(made)
  return made


local = module(run_diffax.ROOT / 'launch' / 'local.py')
THREE = dict(JAX_COORDINATOR_ADDRESS='a:1', JAX_NUM_PROCESSES='4', JAX_PROCESS_ID='3')
GIVEN = dict(coordinator_address='a:1', num_processes=4, process_id=3,
             cluster_detection_method='deactivate')
SLURM = dict(SLURM_JOB_ID='7', SLURM_NTASKS='4', SLURM_PROCID='1')


# --- finding each other ---------------------------------------------------------------------------


@pytest.mark.parametrize('env, wanted', [
  ({}, None),
  (THREE, GIVEN),
  (dict(THREE, JAX_PROCESS_ID='', JOB_COMPLETION_INDEX='3'), GIVEN),  # an indexed Kubernetes job
  (dict(JOB_COMPLETION_INDEX='0'), None),
  (dict(SLURM, SLURM_NTASKS='1'), None),
  (SLURM, {}),
  (dict(SLURM, SLURM_STEP_TASKS_PER_NODE='8(x2)'), {}),  # a task a GPU, as jax takes it
  (dict(SLURM, SLURM_STEP_TASKS_PER_NODE='16(x2)'), {}),
  (dict(SLURM, SLURM_STEP_TASKS_PER_NODE='1(x4)', CUDA_VISIBLE_DEVICES='0,1,2'),
   dict(local_device_ids=[0, 1, 2])),
  (dict(SLURM, SLURM_NTASKS_PER_NODE='1', SLURM_GPUS_ON_NODE='8'),
   dict(local_device_ids=list(range(8)))),
  (dict(SLURM, SLURM_NTASKS_PER_NODE='1'), dict(local_device_ids=[])),  # for jax all there are
  (dict(OMPI_COMM_WORLD_SIZE='2'), {}),
  (dict(OMPI_COMM_WORLD_SIZE='1'), None),
])
def test_settings(env, wanted):
  assert hosts.settings(dict(env, JAX_PLATFORMS='cpu')) == wanted


@pytest.mark.parametrize('env, words', [
  (dict(THREE, JAX_PROCESS_ID=''), ['JAX_PROCESS_ID missing']),
  (dict(JAX_NUM_PROCESSES='2'), ['JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID missing']),
  (dict(THREE, JAX_PROCESS_ID='4'), ['JAX_PROCESS_ID=4', '0 to', '3']),
  (dict(THREE, JAX_NUM_PROCESSES='two'), ["'two'"]),
])
def test_settings_that_are_incomplete(env, words):
  with pytest.raises(ConfigError) as error:
    hosts.settings(env)
  assert all(word in str(error.value) for word in words), error.value


def test_start(monkeypatch):
  """A TPU that no cluster knows of is a single host's; hosts that miss each other are an error."""
  monkeypatch.setattr(hosts.jax.config, 'update', lambda *args: None)
  monkeypatch.setattr(hosts, '_on_tpu', lambda env: not env)
  said = ['coordinator_address should be defined.', 'Timed out: 1 of 4 tasks']

  def initialize(**arguments):
    raise ValueError(said[bool(arguments)])

  monkeypatch.setattr(hosts.jax.distributed, 'initialize', initialize)
  hosts.start({})
  with pytest.raises(hosts.Apart, match='did not find each other .Timed out: 1 of 4.*a:1'):
    hosts.start(THREE)
  monkeypatch.setattr(hosts, 'settings', lambda env: GIVEN)
  with pytest.raises(SystemExit) as ended:  # trouble, after which a launcher tries again
    main.main(['diffax', '--workdir=unused'])
  assert ended.value.code == 1


# --- the watchdog ---------------------------------------------------------------------------------


def watch(told, limit=45.0, beat=5.0):
  """What the watchdog says first, and after what seconds. told: beat number -> {host: place}."""
  dog = hosts.Watch(limit, store=None, beat=beat)
  for n in range(1000):
    said = dog.look(told(n))
    if said:
      return said, n * beat
  return None, None


def at(step, what='the step', beat=0, patient=False, longest=1.0):
  return dict(step=step, what=what, beat=beat, patient=patient, longest=longest)


def test_silent_host_is_named():
  """It tells nothing more; the other comes a few steps further and then waits for it."""
  said, seconds = watch(lambda n: {0: at(min(n, 24), beat=n), 1: at(min(n, 20), beat=min(n, 20))})
  assert said.startswith('host 1 of 2 tells nothing since 45 s; its last step was 20')
  assert seconds - 100 <= 60


def test_host_that_waits_for_data_is_named():
  place = lambda n: at(20, 'data', n) if n >= 20 else at(n, beat=n)
  wait = lambda n: at(min(n, 20), beat=n)
  said, seconds = watch(lambda n: {0: place(n), 1: wait(n), 2: wait(n)})
  assert said.startswith('host 0 of 3 stands still since 45 s; its last step was 20, at data')
  assert seconds - 100 <= 60


def test_slow_runs_are_left_alone():
  """Steps longer than the limit, where steps are so; compiling, saving and evaluating."""
  assert watch(lambda n: {0: at(n // 12, beat=n, longest=60.0)}) == (None, None)
  assert watch(lambda n: {0: at(3, 'saving', n, True), 1: at(3, 'saving', n, True)}) == (None, None)
  assert watch(lambda n: {0: at(3, 'evaluating', n, True), 1: at(3, beat=n)}) == (None, None)


def test_watch_ends_the_process(capfd):
  """Its own thread, a store in between, and `at`."""
  class Store:
    told = {1: at(5, beat=0)}

    def exchange(self, own):
      return {0: own, **self.told}

  ended = []
  dog = hosts.Watch(0.2, store=Store(), end=ended.append, beat=0.02)
  for step in range(200):
    dog.at(step, 'the step')
    time.sleep(0.01)
    if ended:
      break
  dog.close()
  assert ended[0] == 1
  assert 'host 1 of 2 tells nothing' in capfd.readouterr().err


def test_first_host_that_keeps_what_is_told(capfd):
  """Where it hangs nothing can be heard: it is named all the same."""
  class Store:
    def exchange(self, own):
      if own['beat'] > 5:
        time.sleep(60)
      return {0: at(7, beat=own['beat']), 1: own}

  ended = []
  dog = hosts.Watch(0.2, store=Store(), end=lambda status: ended.append(status), beat=0.02)
  dog.at(8, 'the step')
  start = time.monotonic()
  while not ended and time.monotonic() < start + 10:
    time.sleep(0.01)
  dog.close()
  assert ended[0] == 1 and time.monotonic() < start + 2
  said = capfd.readouterr().err
  assert 'host 0 of 2 tells nothing since 0 s; its last step was 7' in said


# --- several processes ----------------------------------------------------------------------------


def launch(workdir, hosts, devices, *arguments, status=0):
  """What `launch/local.py` prints of a run, to its end."""
  command = [sys.executable, str(run_diffax.ROOT / 'launch' / 'local.py'), f'--hosts={hosts}',
             f'--devices={devices}', '--', sys.executable, '-m', 'diffax.main',
             f'--workdir={workdir}', *arguments]
  done = subprocess.run(command, env=run_diffax.environment(), capture_output=True, text=True,
                        cwd=workdir.parent, timeout=300)
  assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
  return done.stdout


MORE = ('--config.mesh.fsdp=2', '--config.log_every=1', '--config.model.dropout=0.1',
        '--config.evals.samples.every=20', '--config.evals.held.name=validation',
        '--config.evals.held.every=10', '--config.evals.held.count=32',
        '--config.evals.held.bins=2', '--config.evals.held.batch_size=32')
CONFIG = (f'--config={run_diffax.SMOKE}', *MORE)


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """(workdir of a run of two hosts of two devices each, what was printed)."""
  workdir = tmp_path_factory.mktemp('hosts') / 'two'
  return workdir, launch(workdir, 2, 2, *CONFIG)


def close(found, wanted):
  for key in wanted:
    if 'key/bias' not in key:  # softmax knows no such shift: a gradient of rounding
      np.testing.assert_allclose(found[key], wanted[key], rtol=1e-3, atol=1e-5, err_msg=key)


def test_two_hosts_are_as_one(two, tmp_path):
  """Losses, parameters and evaluations of the same global batches; the mesh is the same."""
  one = tmp_path / 'one'
  launch(one, 1, 4, *CONFIG)
  rows, wanted = run_diffax.numbers(two[0]), run_diffax.numbers(one)
  assert [row['step'] for row in rows] == list(range(1, 21))
  for row, other in zip(rows, wanted, strict=True):
    assert row == pytest.approx(other, rel=1e-5)
  close(run_diffax.arrays(two[0], 20), run_diffax.arrays(one, 20))
  read = lambda folder: [json.loads(line) for line in open(folder / 'evals.jsonl')]
  for row, other in zip(read(two[0]), read(one), strict=True):
    for key in row.keys() | other.keys():
      text = isinstance(other[key], str)
      assert row[key] == (other[key] if text else pytest.approx(other[key], rel=1e-4)), key
  assert (two[0] / 'images' / 'samples_0000020.png').exists()


def test_only_the_first_host_speaks(two):
  said = [line for line in two[1].splitlines() if line.startswith('[1]')]
  assert not [line for line in said if 'step' in line], said
  assert '[0] step 20/20' in two[1] and '4 devices of 2 hosts' in two[1]


@pytest.mark.parametrize('shape', [(1, 2), (1, 4)])
def test_elastic(shape, two, tmp_path):
  """Saved by 2 x 2, gone on with on other hosts and devices: the same batches, the same numbers."""
  workdir = tmp_path / 'run'
  shutil.copytree(two[0], workdir)
  shutil.rmtree(workdir / 'checkpoints' / '20')
  text = launch(workdir, *shape, *CONFIG)
  assert 'going on from the checkpoint of step 10' in text
  for row, other in zip(run_diffax.numbers(workdir), run_diffax.numbers(two[0]), strict=True):
    assert row == pytest.approx(other, rel=1e-5)
  close(run_diffax.arrays(workdir, 20), run_diffax.arrays(two[0], 20))


def test_sampling_on_two_hosts(two, tmp_path):
  """The samples of one host, drawn by two."""
  launch(two[0], 2, 2, '--mode=sample', '--config.sample.count=8')
  with np.load(two[0] / 'samples.npz') as held:
    found = held['arr_0']
  launch(two[0], 1, 4, '--mode=sample', '--config.sample.count=8')
  with np.load(two[0] / 'samples.npz') as held:
    assert np.abs(found.astype(int) - held['arr_0']).max() <= 1


@pytest.mark.parametrize('differing, said', [
  ('--config.seed=', 'host 1 was started with another config than host 0'),
  ('--workdir=other', 'is not the same folder on all hosts'),
])
def test_hosts_that_disagree(differing, said, tmp_path):
  """Two hosts that were told different things say so and end."""
  code = ('import os, sys; from diffax import main; main.main(["diffax", "--workdir", sys.argv[1], '
          f'"--config={run_diffax.SMOKE}", "{differing}" + os.environ["JAX_PROCESS_ID"]])')
  command = [sys.executable, str(run_diffax.ROOT / 'launch' / 'local.py'), '--devices=1', '--',
             sys.executable, '-c', code, str(tmp_path / 'run')]
  done = subprocess.run(command, env=run_diffax.environment(), capture_output=True, text=True,
                        timeout=120, cwd=tmp_path)
  assert done.returncode == 2
  assert said in done.stdout


def test_launcher_stops_all_when_one_dies(tmp_path):
  code = ('import os, sys, time\nhost = os.environ["JAX_PROCESS_ID"]\nprint("here", flush=True)\n'
          'time.sleep(0.5)\nsys.exit(3) if host == "1" else time.sleep(60)')
  start = time.monotonic()
  command = [sys.executable, str(run_diffax.ROOT / 'launch' / 'local.py'), '--hosts', '3', '--',
             sys.executable, '-c', code]
  done = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert done.returncode == 3 and time.monotonic() - start < 20
  assert 'host 1 ended with status 3; stopping the others' in done.stdout
  assert sorted(line for line in done.stdout.splitlines() if 'here' in line) == [
    '[0] here', '[1] here', '[2] here']


def test_a_stop_that_reaches_data_workers(tmp_path):
  """As a cluster's does: the hosts need batches until they have agreed on a step to save at."""
  command = [sys.executable, str(run_diffax.ROOT / 'launch' / 'local.py'), '--hosts=2', '--',
             sys.executable, '-m', 'diffax.main', f'--workdir={tmp_path / "run"}',
             f'--config={run_diffax.SMOKE}', '--config.data.name=run_diffax.digits',
             '--config.data.workers=1', '--config.log_every=1', '--config.mesh.fsdp=2']
  text = tmp_path / 'text'
  with open(text, 'w') as out:
    process = subprocess.Popen(command, stdout=out, stderr=out, env=run_diffax.environment(1, 0.02))
  while 'step 2/20' not in text.read_text():
    assert process.poll() is None, text.read_text()
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  assert process.wait(120) == 0, text.read_text()
  stopped, = checkpoint.present(tmp_path / 'run' / 'checkpoints')
  assert f'SIGTERM: stopped at step {stopped}' in text.read_text()


def test_a_reader_that_goes():
  """`... | head` has read enough: the hosts go on, and nothing waits for ever."""
  code = 'for i in range(20000): print("a line of some length, so that a pipe is full", i)'
  command = [sys.executable, str(run_diffax.ROOT / 'launch' / 'local.py'), '--hosts=1', '--']
  process = subprocess.Popen([*command, sys.executable, '-c', code], stdout=subprocess.PIPE)
  assert process.stdout.readline().startswith(b'[0] a line')
  process.stdout.close()
  assert process.wait(60) == 0
  done = subprocess.run([*command, 'no-such-program'], capture_output=True, text=True)
  assert done.returncode == 2 and "'no-such-program' is no program" in done.stderr


# --- faults, a part of experiments/faults ---------------------------------------------------------


@pytest.fixture(scope='module')
def faults():
  return module(run_diffax.ROOT / 'experiments' / 'faults' / 'faults.py')


@pytest.fixture(scope='module')
def calm(faults, tmp_path_factory):
  """(folder, options, the numbers of a run that nothing happens to)."""
  folder, options = tmp_path_factory.mktemp('faults'), dict(hosts=2, devices=2)
  return folder, options, faults.straight(folder, options)


def test_fault(faults, calm):
  """A host that hangs; tests of preemption, of encoding and of Slurm kill some."""
  folder, options, wanted = calm
  soon = options | dict(overrides=['watchdog=20'])
  found = faults.attempt('hang', folder, soon, wanted, 0)
  assert found['lost'] <= 8


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('name', [
  'kill', 'kill_saving', 'preempt', 'preempt_one', 'flipped', 'full_disk', 'missing', 'truncated',
  'hang_data', 'data_worker', 'clocks'])
def test_every_fault(name, seed, faults, calm):
  folder, options, wanted = calm
  faults.attempt(name, folder, options, wanted, seed)
