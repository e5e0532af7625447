"""A Slurm cluster of two nodes on this one machine, for tests of `launch/slurm.py`.

  python tests/slurm_cluster.py start   # installs Slurm where this is root on Debian
  SLURM_CONF=$(python tests/slurm_cluster.py conf) sinfo
  python tests/slurm_cluster.py stop

Two slurmd with names and ports of their own are two nodes; all of it runs as the user who started
it. Files, sockets and ports are the cluster's own, so that it neither needs nor disturbs another
Slurm of the machine: whoever wants this one sets SLURM_CONF. GPUs are devices that no one computes
on, for what Slurm tells tasks of them. `start` exits with status 1 and says why where it cannot.
"""

import os
import pathlib
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

FOLDER = pathlib.Path(tempfile.gettempdir()) / f'diffax-slurm-{os.getuid()}'
CONF = FOLDER / 'slurm.conf'
PORTS = dict(slurmctld=17000, first=17001, second=17002)
# Addresses as names: whatever machine this is, tasks find the first node by its name.
NODES = dict(first='127.0.0.1', second='127.0.0.2')
PATH = os.pathsep.join([os.environ.get('PATH', ''), '/usr/sbin', '/sbin'])
PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'scontrol', 'scancel', 'sinfo')
PACKAGES = ('slurm-wlm', 'munge')
READY = 60.0  # seconds that nodes may take to be idle


class Unavailable(Exception):
  """Why there is no cluster."""


def configuration(user, host):
  """slurm.conf's text. Two partitions of the same nodes: jobs of `urgent` preempt those of `debug`.

  Timeouts are those of a machine that has other work to do.
  """
  nodes = [f'NodeName={NODES[n]} NodeHostname={host} NodeAddr={NODES[n]} Port={PORTS[n]} CPUs=2 '
           'RealMemory=1000 Gres=gpu:2 State=UNKNOWN' for n in NODES]
  return '\n'.join([
    'ClusterName=diffax_tests', f'SlurmctldHost={host}(127.0.0.1)',
    f'SlurmctldPort={PORTS["slurmctld"]}', f'SlurmUser={user}', f'SlurmdUser={user}',
    'AuthType=auth/munge', f'AuthInfo=socket={FOLDER}/munge.socket', 'CredType=cred/munge',
    f'StateSaveLocation={FOLDER}/state', f'SlurmdSpoolDir={FOLDER}/spool-%n',
    f'SlurmctldPidFile={FOLDER}/slurmctld.pid', f'SlurmdPidFile={FOLDER}/slurmd-%n.pid',
    f'SlurmctldLogFile={FOLDER}/slurmctld.log', f'SlurmdLogFile={FOLDER}/slurmd-%n.log',
    'ProctrackType=proctrack/pgid', 'TaskPlugin=task/none', 'SwitchType=switch/none',
    'JobAcctGatherType=jobacct_gather/none', 'MpiDefault=none', 'ReturnToService=2',
    'SelectType=select/cons_tres', 'SelectTypeParameters=CR_CPU', 'GresTypes=gpu',
    'SlurmdParameters=config_overrides', 'MessageTimeout=60', 'KillWait=10',
    'SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2',
    'PreemptType=preempt/partition_prio', 'PreemptMode=REQUEUE',
    *nodes,
    'PartitionName=debug Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60',
    'PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF', ''])


def environment():
  """This process's, in which Slurm's programs are found and speak to this cluster."""
  return os.environ | {'SLURM_CONF': str(CONF), 'PATH': PATH}


def _call(*command, **options):
  return subprocess.run(command, env=environment(), capture_output=True, text=True, **options)


def _user():
  return pwd.getpwuid(os.getuid()).pw_name


def _missing():
  return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


def available():
  """'' where the cluster runs, with both nodes to be had; else why not, and the remedy."""
  if _missing():
    return f'no {", ".join(_missing())} here: python tests/slurm_cluster.py start installs them'
  if not CONF.exists():
    return 'the cluster of the tests does not run: python tests/slurm_cluster.py start'
  found = _call('sinfo', '--noheader', '--Node', '--partition=debug', '--format=%N %t')
  if found.returncode:
    return f'sinfo: {found.stderr.strip()}'
  up = [line for line in found.stdout.splitlines() if line.split()[1] in ('idle', 'mix', 'alloc')]
  return '' if len(up) == len(NODES) else f'nodes are not up: {found.stdout.split()}'


def install():
  """The programs, by apt. Raises Unavailable."""
  if not _missing():
    return
  if os.getuid() or not shutil.which('apt-get'):
    raise Unavailable(f'no {", ".join(_missing())} here, and installing takes root and apt-get: '
                      f'install the packages {", ".join(PACKAGES)}')
  quiet = dict(DEBIAN_FRONTEND='noninteractive')
  for words in (['update'], ['install', '-y', '--no-install-recommends', *PACKAGES]):
    done = subprocess.run(['apt-get', '-q', *words], env=os.environ | quiet, capture_output=True,
                          text=True)
    if done.returncode:
      raise Unavailable(f'apt-get {" ".join(words)}: {done.stderr.strip()[-300:]}')
  if _missing():
    raise Unavailable(f'no {", ".join(_missing())} after apt-get install {" ".join(PACKAGES)}')


def _prepare():
  """The folder with a key and the configuration. Raises Unavailable where it is another's."""
  FOLDER.mkdir(mode=0o711, exist_ok=True)
  if FOLDER.is_symlink() or FOLDER.stat().st_uid != os.getuid():
    raise Unavailable(f'{FOLDER} belongs to someone else: set TMPDIR to another folder')
  FOLDER.chmod(0o711)  # munge wants its socket within reach of all
  for name in ('state', *(f'spool-{node}' for node in NODES.values())):
    (FOLDER / name).mkdir(mode=0o700, exist_ok=True)
  key = FOLDER / 'munge.key'
  key.unlink(missing_ok=True)
  key.touch(mode=0o600)
  key.write_bytes(os.urandom(128))
  (FOLDER / 'gres.conf').write_text(''.join(
    f'NodeName={node} Name=gpu File={file}\n'
    for node in NODES.values() for file in ('/dev/null', '/dev/zero')))
  CONF.write_text(configuration(_user(), socket.gethostname().partition('.')[0]))


def _daemon(*command):
  done = _call(*map(str, command), cwd=FOLDER, stdin=subprocess.DEVNULL)
  if done.returncode:
    raise Unavailable(f'{command[0]}: {(done.stderr or done.stdout).strip()[-300:]}')


def start():
  """A running cluster; returns at once where it runs. Raises Unavailable."""
  install()
  if not available():
    return
  stop()
  _prepare()
  _daemon('munged', f'--key-file={FOLDER}/munge.key', f'--socket={FOLDER}/munge.socket',
          f'--pid-file={FOLDER}/munged.pid', f'--log-file={FOLDER}/munged.log',
          f'--seed-file={FOLDER}/munged.seed')
  _daemon('slurmctld', '-c')
  for node in NODES.values():
    _daemon('slurmd', '-N', node)
  deadline = time.monotonic() + READY
  while available() and time.monotonic() < deadline:
    time.sleep(0.5)
  if available():
    why = available()
    stop()
    raise Unavailable(f'{why}; see the logs in {FOLDER}')


def stop():
  """Ends the cluster's processes, its jobs first; logs are left."""
  if CONF.exists() and not available():
    _call('scancel', f'--user={_user()}')
  for file in sorted(FOLDER.glob('*.pid'), reverse=True):  # slurmd, slurmctld, munged
    process = pathlib.Path('/proc') / file.read_text().strip()
    deadline = time.monotonic() + 20
    while _runs(process) and time.monotonic() < deadline:
      os.kill(int(process.name), signal.SIGTERM)
      time.sleep(0.2)
    file.unlink(missing_ok=True)
  CONF.unlink(missing_ok=True)


def _runs(process):
  """Whether a folder of /proc is a daemon of a cluster, not another process of that number."""
  try:
    name = (process / 'comm').read_text()
    return process.name.isdigit() and name.startswith(('slurmd', 'slurmctld', 'munged'))
  except OSError:
    return False


def main(argv):
  if argv[1:] not in (['start'], ['stop'], ['conf']):
    print(__doc__, file=sys.stderr)
    return 2
  if argv[1] == 'conf':
    print(CONF)
    return 0
  try:
    start() if argv[1] == 'start' else stop()
  except Unavailable as error:
    print(f'no Slurm cluster for the tests: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
