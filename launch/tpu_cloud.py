"""gcloud's commands for Cloud TPU VMs as lists of words, and what their answers say.

  import tpu_cloud as cloud
  gcloud, tpu = cloud.Gcloud(), cloud.Tpu('tune', zone='europe-west4-b')
  print(cloud.look(gcloud, tpu).said)

A TPU is a queued resource with one node, or `slices` of them named NAME-0, NAME-1, ...; `direct`
makes it a node without a queue. A node has one or more workers, which are machines with chips.
Source: `gcloud compute tpus queued-resources|tpu-vm COMMAND --help`, and the TPU API v2.
"""

import concurrent.futures
import json
import re
import subprocess
from typing import NamedTuple

import commands

QUEUED = ('gcloud', 'compute', 'tpus', 'queued-resources')
VM = ('gcloud', 'compute', 'tpus', 'tpu-vm')
VERSION = re.compile(r'[a-z0-9]([-._a-z0-9]*[a-z0-9])?')  # v2-alpha-tpuv5-lite, tpu-vm-tf-2.17.1
PROJECT = re.compile(r'([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]')  # old ones have a domain
LABEL = re.compile(r'([a-z][-_a-z0-9]{0,62})=([-_a-z0-9]{0,63})')
AT_ONCE = 8  # gcloud's processes side by side
# A machine that is taken away says no goodbye: ssh would wait for it for hours.
SSH = ('-oConnectTimeout=20', '-oServerAliveInterval=15', '-oServerAliveCountMax=4')
LASTING = ('INVALID_ARGUMENT', 'PERMISSION_DENIED')  # asked again, it will be said again


class Trouble(Exception):
  """gcloud or a worker failed; what it said, on one line."""

  @property
  def lasting(self):
    """Whether it is no use to try again."""
    return any(word in str(self) for word in LASTING)


class Tpu(NamedTuple):
  """What was asked for. labels: words 'key=value'; also: words that `create` gets as they are."""
  name: str
  zone: str = ''
  project: str = ''
  type: str = ''
  version: str = ''
  slices: int = 1
  spot: bool = False
  direct: bool = False
  internal: bool = False
  labels: tuple = ()
  also: tuple = ()


class State(NamedTuple):
  """kind: absent, waiting, ready, going, gone or failed; said: the cloud's words; node: workers."""
  kind: str
  said: str
  workers: dict


def checked(tpu):
  """`tpu`, where every word of it is one that gcloud takes for what it is. Raises Refused."""
  commands.name(tpu.name, 'name', 40)  # of a node's name the cloud makes further ones
  if not tpu.zone:
    raise commands.Refused('--zone is missing: say where, as --zone europe-west4-b')
  commands.name(tpu.zone, '--zone')
  if tpu.project and not PROJECT.fullmatch(tpu.project):
    raise commands.Refused(f'--project={tpu.project!r}: a project\'s id, as my-project-7')
  if tpu.type:
    commands.name(tpu.type, '--type')
  if tpu.version and not VERSION.fullmatch(tpu.version):
    raise commands.Refused(f'--version={tpu.version!r}: a runtime version, as v2-alpha-tpuv5-lite')
  if tpu.slices < 1 or tpu.slices > 1 and tpu.direct:
    raise commands.Refused(f'--slices={tpu.slices}: 1 and more, and 1 with --direct')
  for label in tpu.labels:
    if not LABEL.fullmatch(label):
      raise commands.Refused(
        f'--label={label!r}: key=value, each of lower-case letters, digits, - and _')
  commands.refuse_secrets([*tpu.labels, *tpu.also])
  return tpu


# --- commands, as words ---------------------------------------------------------------------------


def nodes(tpu):
  """The names of its nodes, one a slice."""
  return [tpu.name] if tpu.slices == 1 else [f'{tpu.name}-{i}' for i in range(tpu.slices)]


def _where(tpu):
  project = [f'--project={tpu.project}'] if tpu.project else []
  return [f'--zone={tpu.zone}', *project, '--quiet']


def create(tpu):
  for option, value in (('--type', tpu.type), ('--version', tpu.version)):
    if not value:
      raise commands.Refused(
        f'{option} is missing: say --type v5litepod-16 --version v2-alpha-tpuv5-lite or the like')
  group, version = (VM, '--version') if tpu.direct else (QUEUED, '--runtime-version')
  words = [*group, 'create', tpu.name, *_where(tpu), f'--accelerator-type={tpu.type}',
           f'{version}={tpu.version}']
  if tpu.slices > 1:
    words += [f'--node-count={tpu.slices}', f'--node-prefix={tpu.name}']
  elif not tpu.direct:
    words += [f'--node-id={tpu.name}']
  words += ['--spot'] if tpu.spot else []
  words += ['--internal-ips'] if tpu.internal else []
  words += [f'--labels={",".join(tpu.labels)}'] if tpu.labels else []
  commands.quoted([*words, *tpu.also])  # for what it refuses
  return [*words, *tpu.also]


def delete(tpu):
  """Of the nodes along with the queued resource; returns when they are gone."""
  if tpu.direct:
    return [*VM, 'delete', tpu.name, *_where(tpu)]
  return [*QUEUED, 'delete', tpu.name, *_where(tpu), '--force']


def describe(tpu, node=''):
  """Of the queued resource, or of a node."""
  return [*(VM if node else QUEUED), 'describe', node or tpu.name, *_where(tpu), '--format=json']


def ssh(tpu, node, words, worker='all'):
  """`words` on workers of a node, through the shell there."""
  inside = ['--internal-ip'] if tpu.internal else []
  return [*VM, 'ssh', node, *_where(tpu), *inside, f'--worker={worker}',
          *(f'--ssh-flag={flag}' for flag in SSH), f'--command={commands.quoted(words)}']


def scp(tpu, sources, target, worker='all', recurse=False):
  """Copies files to workers (target NODE:PATH), or from one (source NODE:PATH)."""
  inside = ['--internal-ip'] if tpu.internal else []
  return [*VM, 'scp', *map(str, sources), str(target), *_where(tpu), *inside,
          f'--worker={worker}', *(f'--scp-flag={flag}' for flag in SSH),
          *(['--recurse'] if recurse else [])]


# --- carrying them out ----------------------------------------------------------------------------


class Gcloud:
  """Carries out commands; with `dry` prints each, as a shell takes it, and runs none."""

  def __init__(self, dry=False):
    self.dry = dry

  def ask(self, words, shown=False):
    """What came of it: returncode, stdout, stderr. Raises Refused where there is no gcloud.

    shown: what it prints goes to our own output.
    """
    line = commands.quoted(words)
    if self.dry:
      print(line)
      return subprocess.CompletedProcess(words, 0, '', '')
    try:
      return subprocess.run(
        words, stdin=subprocess.DEVNULL, stdout=None if shown else subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, errors='replace')
    except FileNotFoundError:
      raise commands.Refused(
        'gcloud is not on PATH: install the Google Cloud CLI (https://cloud.google.com/sdk/docs/'
        'install), then gcloud auth login') from None

  def do(self, words):
    """What it printed. Raises Trouble where it failed."""
    return held(self.ask(words)).stdout

  def each(self, several):
    """`ask` of several commands, side by side."""
    if self.dry:
      return [self.ask(words) for words in several]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
      return list(pool.map(self.ask, several))


def held(done):
  """`done`, where it succeeded. Raises Trouble."""
  if done.returncode:
    what = ' '.join(done.args[:5])
    raise Trouble(f'{what} ended with status {done.returncode}: {why(done.stderr)}')
  return done


def why(text):
  """What a failed command says of its failure, on one line."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  errors = [line for line in lines if line.lower().startswith(('error', '#####'))]
  return ' '.join(errors or lines[-3:])[:1000] or 'it said nothing'


# --- what is there --------------------------------------------------------------------------------

GOING = ('SUSPENDING', 'DELETING')
GONE = ('SUSPENDED', 'PREEMPTED', 'TERMINATED')
FAILED = ('FAILED', 'STOPPED', 'STOPPING', 'HIDDEN', 'HIDING')


def look(gcloud, tpu):
  """The State of a TPU. Raises Trouble.

  A queued resource stays ACTIVE for a while when a node of it is gone, so nodes are asked too. One
  that its owner has deleted is not there, which the resource then tells: SUSPENDED by a user.
  """
  said = 'READY'
  if not tpu.direct:
    found = _described(gcloud, describe(tpu))
    if found is None:
      return State('absent', 'no such queued resource', {})
    state = found.get('state', {})
    said = state.get('state', 'UNKNOWN')
    if said != 'ACTIVE':
      return _not_active(said, state)
  workers, kinds = {}, []
  for node in nodes(tpu):
    found = _described(gcloud, describe(tpu, node))
    if found is None:
      return State('absent' if tpu.direct else 'going', f'{node} is not there', {})
    workers[node] = len(found.get('networkEndpoints', [])) or 1
    kinds.append(_kind(found.get('state', 'UNKNOWN')))
    if kinds[-1] != 'ready':
      said = f'{node} is {found.get("state", "UNKNOWN")}'
  worst = next(k for k in ('failed', 'gone', 'going', 'waiting', 'ready') if k in kinds)
  return State(worst, said, workers)


def differs(gcloud, tpu):
  """What a queued resource was asked for with where `tpu` says otherwise, else ''. Raises Trouble.
  """
  found = _described(gcloud, describe(tpu)) or {}
  specs = found.get('tpu', {}).get('nodeSpec', [])
  node = specs[0].get('node', {}) if specs else {}
  asked = ((node.get('acceleratorType'), tpu.type), (node.get('runtimeVersion'), tpu.version))
  return ', '.join(told for told, wanted in asked if told and told != wanted)


def _not_active(said, state):
  reason = state.get('failedData', {}).get('error', {}).get('message', '')
  kind = _kind(said)
  if kind == 'gone' and state.get('stateInitiator') == 'USER':
    kind, reason = 'failed', 'a user has deleted what it held'
  return State(kind, f'{said}: {reason}' if reason else said, {})


def _kind(said):
  """Of a state of a queued resource or node; what is neither good nor bad is waited for."""
  kinds = {'READY': 'ready'} | dict.fromkeys(GOING, 'going') | dict.fromkeys(GONE, 'gone')
  return (kinds | dict.fromkeys(FAILED, 'failed')).get(said, 'waiting')


def _described(gcloud, words):
  """What `describe` answers, None where there is no such thing. Raises Trouble."""
  done = gcloud.ask(words)
  if gcloud.dry:
    node = {'state': 'READY', 'networkEndpoints': [{}]}
    return node if 'tpu-vm' in words else {'state': {'state': 'ACTIVE'}}
  if done.returncode and 'NOT_FOUND' in done.stderr:
    return None
  held(done)
  try:
    return json.loads(done.stdout)
  except ValueError as error:
    raise Trouble(f'{" ".join(words[:6])} answered no JSON: {done.stdout[:200]!r}') from error
