"""Many hosts, one run: how they find each other, what they agree on, and who of them stands still.

Every host runs the same program on the same data description; what one of them alone knows (a
signal, a file on its disk, a record that could not be read) must be agreed on before it decides
anything, or the hosts wait for each other for ever.
"""

import glob
import importlib.util
import itertools
import json
import os
import queue
import sys
import threading
import time
import traceback

import jax
import numpy as np

from diffax.build import ConfigError

EXPLICIT = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
BEAT = 5.0  # seconds between two looks of the watchdog
LATEST = 3600  # seconds that hosts wait for the last of them
LONGEST = 10  # times the longest step so far that one may take before it counts as standing still


class Apart(Exception):
  """The hosts of a run did not find each other: trouble that a new start may end."""


# --- finding each other ---------------------------------------------------------------------------


def start(env=None):
  """Joins the hosts of a run where the environment tells of several; once, before any device work.

  explicit     JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or in an
               indexed Kubernetes job JOB_COMPLETION_INDEX in place of the last
  TPU VM       by itself, one slice or several
  Slurm        by itself within `srun`, one task a node or one a GPU
  Open MPI     by itself within `mpirun`

  Raises ConfigError where what is said is incomplete, `Apart` where the hosts do not find each
  other.
  """
  if jax.distributed.is_initialized():
    return
  env = os.environ if env is None else env
  arguments = settings(env)
  if arguments is None:
    return
  # Our own handling of signals saves at one step on all hosts; jax's would take the signal away.
  jax.config.update('jax_enable_preemption_service', False)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(**arguments)
  except (RuntimeError, ValueError) as error:
    if 'coordinator_address' in str(error) and _on_tpu(env):  # of a notebook, and no cluster's
      return
    raise Apart(
      f'the hosts of this run did not find each other ({" ".join(str(error).split())[:300]}): '
      f'settings {arguments or "of the cluster"}; check that all were started, and that the first '
      'can be reached by the others'
    ) from error


def settings(env):
  """The arguments of `jax.distributed.initialize`, {} where jax finds them itself; None: one host.

  Raises ConfigError where explicit ones are incomplete.
  """
  said = {name: env[name] for name in EXPLICIT if env.get(name)}
  if said.get(EXPLICIT[0]) and env.get('JOB_COMPLETION_INDEX'):
    said.setdefault(EXPLICIT[2], env['JOB_COMPLETION_INDEX'])
  if said:
    return _explicit(said)
  if int(env.get('SLURM_NTASKS', 1)) > 1 and 'SLURM_PROCID' in env:
    return _slurm(env)
  if int(env.get('OMPI_COMM_WORLD_SIZE', 1)) > 1:
    return {}
  return {} if _on_tpu(env) else None


def _explicit(said):
  missing = [name for name in EXPLICIT if name not in said]
  if missing:
    raise ConfigError(
      f'of the settings of hosts {", ".join(said)} are there and {", ".join(missing)} missing: '
      'give all three, or none for a single host'
    )
  try:
    count, number = (int(said[name]) for name in EXPLICIT[1:])
  except ValueError as error:
    raise ConfigError(f'JAX_NUM_PROCESSES, JAX_PROCESS_ID: {error}') from error
  if not 0 <= number < count:
    raise ConfigError(f'JAX_PROCESS_ID={number}: hosts count from 0 to JAX_NUM_PROCESSES - 1 = '
                      f'{count - 1}')
  return dict(
    coordinator_address=said[EXPLICIT[0]], num_processes=count, process_id=number,
    cluster_detection_method='deactivate',
  )


def _slurm(env):
  """jax gives each task one device, which is wrong where a task has a node for itself: it then has
  those that Slurm tells of, and all there are where Slurm knows of none.
  """
  tasks = env.get('SLURM_STEP_TASKS_PER_NODE', env.get('SLURM_NTASKS_PER_NODE', ''))
  if tasks.partition('(')[0] != '1':  # '1(x4)': one on each of four nodes
    return {}
  devices = env.get('CUDA_VISIBLE_DEVICES', '')
  count = len(devices.split(',')) if devices else int(env.get('SLURM_GPUS_ON_NODE', 0))
  return dict(local_device_ids=list(range(count)))


def _on_tpu(env):
  """Whether this is a TPU VM, of which jax knows the others."""
  if env.get('JAX_PLATFORMS', 'tpu').split(',')[0] not in ('', 'tpu'):
    return False
  told = ('TPU_WORKER_HOSTNAMES', 'TPU_PROCESS_ADDRESSES', 'MEGASCALE_COORDINATOR_ADDRESS')
  there = [name for name in told if env.get(name)]
  there += [file for pattern in ('/dev/accel*', '/dev/vfio/*') for file in glob.glob(pattern)]
  return bool(there) and importlib.util.find_spec('libtpu') is not None


def leave(status):
  """Ends this process with an exit status that tells of a failure; one of several hosts at once:

  the usual way waits for the others, which wait for this one.
  """
  if jax.distributed.is_initialized():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


def fail():
  """Ends one of several hosts, in the midst of an exception, as an uncaught one does."""
  if jax.distributed.is_initialized():
    traceback.print_exc()
    leave(1)


def first():
  """Whether this host is the one that writes and speaks."""
  return jax.process_index() == 0


def count():
  return jax.process_count()


def say(*words, **options):
  """`print`, on the first host alone."""
  if first():
    print(*words, **options)


# --- agreeing; all hosts call these together, and each waits for the others -----------------------

_WAITS = itertools.count()  # numbers of waits, the same on all hosts


def every(flag):
  """Whether it is so on every host."""
  return bool(flag) if count() == 1 else bool(_gather(flag).all())


def some(flag):
  """Whether it is so on any host."""
  return bool(flag) if count() == 1 else bool(_gather(flag).any())


def _gather(flag):
  from jax.experimental import multihost_utils

  wait()
  return multihost_utils.process_allgather(np.asarray(bool(flag)))


def tell(value):
  """What the first host says, plain data, on all of them."""
  if count() == 1:
    return value
  from jax.experimental import multihost_utils

  wait()
  said = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
  room = np.zeros(size, np.uint8)
  room[: len(said)] = said[:size]
  return json.loads(multihost_utils.broadcast_one_to_all(room).tobytes())


def wait():
  """Returns when all hosts are here; no device takes part.

  Hosts may come here minutes apart, as from compiling, where collectives of CPUs wait for half a
  minute only.
  """
  if count() > 1:
    _client().wait_at_barrier(f'diffax/wait/{next(_WAITS)}', LATEST * 1000)


def _client():
  """Of jax's coordinator; private to jax, there is no public way to it."""
  from jax._src import distributed

  return distributed.global_state.client


# --- the watchdog ---------------------------------------------------------------------------------


class Watch:
  """Ends the run where a host stands still, having said which, in what step and at what.

  A host that stands still keeps all the others waiting, silently: one that is stopped, swaps, or
  waits for a disk that does not answer. Each host tells the others, every `BEAT` seconds and by a
  thread of its own, what it is at. One that tells nothing new for `limit` seconds hangs, whatever
  it was at; so does a run whose hosts stay in one step for so long, or `LONGEST` times the longest
  step so far, where that is longer. What takes its time (compiling, saving, evaluations) is told by
  `at(step, what, patient=True)`. Host 0 keeps what all tell: where nothing can be told nor heard
  for `limit` seconds, it is the one.

  No clock is compared with another host's. limit: seconds, 0 for no watchdog; with one host there
  is none.
  """

  def __init__(self, limit, store=None, end=os._exit, beat=BEAT):
    self.limit, self.end, self.beat = limit, end, beat
    self.store = store or (_Store() if limit and count() > 1 else None)
    self.now = {'step': 0, 'what': 'starting', 'patient': True}
    self.longest, self._entered = 0.0, time.monotonic()
    self._seen, self._closed = {}, threading.Event()
    self._answers, self._heard, self._last = queue.SimpleQueue(), time.monotonic(), {}
    if self.store:  # two threads, for one may wait for an answer for ever
      for target in (self._talk, self._watch):
        threading.Thread(target=target, daemon=True).start()

  def at(self, step, what, patient=False):
    """This host begins with `what` of step `step`."""
    now = time.monotonic()
    if not self.now['patient'] and step > self.now['step']:
      self.longest = max(self.longest, now - self._entered)
    if patient or step != self.now['step'] or self.now['patient']:
      self._entered = now
    self.now = {'step': step, 'what': what, 'patient': patient}

  def close(self):
    self._closed.set()

  def _talk(self):
    beats = 0
    while not self._closed.wait(self.beat):
      beats += 1
      found = self.store.exchange(dict(self.now, beat=beats, longest=self.longest))
      if found is not None:
        self._answers.put(found)

  def _watch(self):
    while not self._closed.wait(self.beat):
      hangs = None
      while not self._answers.empty():
        self._heard, self._last = time.monotonic(), self._answers.get()
        hangs = self.look(self._last)
      silent = time.monotonic() - self._heard
      if silent >= self.limit:
        hangs = self._name(0, self._last, 'tells nothing', silent)
      if hangs and not self._closed.is_set():
        print(f'error: {hangs}', file=sys.stderr, flush=True)
        self.end(1)

  def look(self, found):
    """What to say of {host: what it told}, None where all go on; called once a beat."""
    for host, told in found.items():
      beat, place = told['beat'], (told['step'], told['what'])
      old_beat, silent, old_place, still = self._seen.get(host, (None, 0, None, 0))
      silent = 0 if beat != old_beat else silent + 1
      still = 0 if place != old_place or told['patient'] else still + 1
      self._seen[host] = beat, silent, place, still
    longest = max(told['longest'] for told in found.values())
    silent = [h for h in found if self._seen[h][1] * self.beat >= self.limit]
    allowed = max(self.limit, LONGEST * longest)
    still = [h for h in found if self._seen[h][3] * self.beat >= allowed]
    if not silent and len(still) < len(found):
      return None
    # The others have come further, to where they wait for it: the last one is who hangs.
    host = min(silent or still, key=lambda h: (found[h]['step'], found[h]['what'] != 'data'))
    why, part = ('tells nothing', 1) if silent else ('stands still', 3)
    return self._name(host, found, why, self._seen[host][part] * self.beat)

  def _name(self, host, found, why, seconds):
    told = found.get(host, self.now)
    return (
      f'host {host} of {len(found) or count()} {why} since {seconds:.0f} s; its last step was '
      f'{told["step"]}, at {told["what"]}. The run ends here; the same command goes on from its '
      'last checkpoint'
    )


class _Store:
  """What hosts tell each other, in the key-value store of jax's coordinator."""

  def __init__(self):
    self.client, self.host = _client(), jax.process_index()

  def exchange(self, told):
    """Tells `told`; {host: what it told}, None where the store cannot be reached."""
    try:
      self.client.key_value_set(
        f'diffax/watch/{self.host}', json.dumps(told), allow_overwrite=True
      )
      rows = self.client.key_value_dir_get('diffax/watch/')
    except Exception:  # the coordinator is gone, and with it soon this process
      return None
    return {int(key.rpartition('/')[2]): json.loads(value) for key, value in rows}
