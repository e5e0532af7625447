"""A run on a Kubernetes cluster: a JobSet for a pool of TPUs or GPUs, written or submitted.

  python launch/k8s.py submit --name digits --image IMAGE --pool tpu:v5e:4x4 --slices 2 -- \\
    python -m diffax.main --config configs/digits.py --workdir gs://BUCKET/digits
  python launch/k8s.py render --name digits --image IMAGE --pool gpu:h100:8 --nodes 4 \\
    --claim data=/data --secret HF_TOKEN=hugging-face/token --out digits.yaml -- \\
    python -m diffax.main --config configs/digits.py --workdir /data/runs/digits

One pod a host, each with the same command, which is run as it stands: no shell, no expansion of
$(NAME). The image holds diffax and what the command names. The cluster needs JobSet 0.10 or later
(https://jobset.sigs.k8s.io) and Kubernetes 1.31 or later. The hosts of a TPU slice, and the slices,
find each other by what GKE tells them; those of a GPU pool by the name of the first.

How a pod ends decides what becomes of the run:

  all with status 0              it is done
  one with status 2              a mistake of the user's: it fails at once, and is not started again
  SIGTERM, eviction, preemption  all pods start again, and this is not counted
  anything else                  all pods start again, --restarts times

A run that is told to stop saves within --grace seconds. Machines that are sold as Spot leave a pod
some 15 of them: what is saved by `config.save_every` is what such a run goes on from.

What is written is JSON, which is YAML that every parser reads alike: others take 1e-4 for a word,
or `no` for False.
"""

import argparse
import json
import math
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from typing import NamedTuple

import commands
from commands import Refused

PORT = 8476  # jax's own choice for a coordinator
STOPPED = 75  # exit status of a run that a signal stopped; sysexits.h: try again
MISTAKE = 2
CONTAINER = 'main'
LONGEST = 63  # characters of a pod's name
MOST = 1_000_000
SPOT = {'cloud.google.com/gke-spot': 'true'}  # a label of nodes, and their taint
MEMORY = re.compile(r'[1-9][0-9]{0,8}(Mi|Gi|Ti|M|G|T)')

# Chips a host by topology, the usual machine first, and GKE's name of the accelerator; the tables
# of https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and, for how far the three
# axes of v4 and v5p go, https://cloud.google.com/tpu/docs/supported-tpu-configurations.
FLAT = {'1x1': (1,), '2x2': (4,), '2x4': (8, 4), '4x4': (4,), '4x8': (4,), '8x8': (4,),
        '8x16': (4,), '16x16': (4,)}
SMALL = {'2x2x1': (4,), '2x2x2': (4,), '2x2x4': (4,), '2x4x4': (4,)}
ACCELERATORS = {'v4': 'tpu-v4-podslice', 'v5e': 'tpu-v5-lite-podslice', 'v5p': 'tpu-v5p-slice',
                'v6e': 'tpu-v6e-slice'}
LARGEST = {'v4': 4096, 'v5p': 6144}  # chips of a slice whose topology has three axes

# https://cloud.google.com/kubernetes-engine/docs/how-to/gpus, accelerator types
GPUS = {'a100': 'nvidia-tesla-a100', 'a100-80gb': 'nvidia-a100-80gb', 'b200': 'nvidia-b200',
        'h100': 'nvidia-h100-80gb', 'h100-mega': 'nvidia-h100-mega-80gb',
        'h200': 'nvidia-h200-141gb', 'l4': 'nvidia-l4', 't4': 'nvidia-tesla-t4',
        'v100': 'nvidia-tesla-v100'}

WORD = r'[a-z0-9]([-a-z0-9]*[a-z0-9])?'
DOMAIN = re.compile(rf'{WORD}(\.{WORD})*')  # RFC 1123, what Kubernetes calls a subdomain
QUALIFIED = r'[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?'
LABEL_KEY = re.compile(rf'({WORD}(\.{WORD})*/)?{QUALIFIED}')
LABEL = re.compile(rf'({QUALIFIED})?')
ENV = re.compile(r'[A-Za-z_][A-Za-z0-9_]*')
REFERENCE = re.compile(rf'(?P<secret>{WORD}(\.{WORD})*)/(?P<key>[-._A-Za-z0-9]+)')
IMAGE = re.compile(  # https://pkg.go.dev/github.com/distribution/reference
  r'([A-Za-z0-9][-A-Za-z0-9.]*(:[0-9]+)?/)?'
  r'[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*'
  r'(:[A-Za-z0-9_][-A-Za-z0-9_.]{0,127})?(@sha256:[0-9a-f]{64})?')
OURS = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID', 'JOB_COMPLETION_INDEX',
        'DIFFAX_STOP_STATUS', 'PYTHONUNBUFFERED')
REMEDIES = {  # what kubectl says, and what to do
  'no matches for kind "JobSet"': 'install JobSet in the cluster: '
                                  'https://jobset.sigs.k8s.io/docs/installation',
  'unknown field': 'the JobSet of the cluster is older than 0.10: update it',
  'already exists': 'a run of this name is there, and nothing was started: choose another --name, '
                    'or look by `kubectl get jobset`, and end it by `kubectl delete jobset NAME`',
}


class Pool(NamedTuple):
  """What a run asks of a cluster.

  job: its name in the set. replicas: jobs, a slice each. hosts: pods of a job. resource: what a
  host has `count` of. selector: labels of its nodes.
  """

  job: str
  replicas: int
  hosts: int
  resource: str
  count: int
  selector: dict


# --- what is asked for ----------------------------------------------------------------------------


def arguments(argv):
  """The options, with all behind the first `--` as `command`. Exits with status 2."""
  at = argv.index('--') if '--' in argv else len(argv)
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
  add = parser.add_argument
  add('verb', choices=('render', 'submit'))
  add('--name', required=True, help='of the JobSet')
  add('--image', required=True)
  add('--pool', required=True,
      help='tpu:GENERATION:TOPOLOGY[:CHIPS A HOST] or gpu:KIND:GPUS A NODE')
  add('--slices', type=int, help='TPU slices (1)')
  add('--nodes', type=int, help='GPU nodes (1)')
  add('--node-selector', action='append', default=[], metavar='K=V', help='further labels of nodes')
  add('--toleration', action='append', default=[], metavar='K=V',
      help='further taints of nodes; that of GKE\'s Spot nodes comes with their label')
  add('--cpus', type=int, help='processors that a host needs')
  add('--memory', help='memory that a host needs, as 200Gi; a pod that takes more is killed')
  add('--namespace')
  add('--label', action='append', default=[], metavar='K=V', help='of the JobSet and its pods')
  add('--env', action='append', default=[], metavar='K=V')
  add('--secret', action='append', default=[], metavar='ENV=SECRET/KEY',
      help='a variable, of a secret of the cluster')
  add('--claim', action='append', default=[], metavar='CLAIM=/PATH',
      help='a persistent volume claim, and where it is mounted')
  add('--service-account')
  add('--priority-class')
  add('--restarts', type=int, default=20, help='after failures; preemptions do not count')
  add('--grace', type=int, default=300, help='seconds that a pod has to save in')
  add('--out', help='render: the file to be written (standard output)')
  add('--dry-run', action='store_true', help='submit: show what would be done')
  args = parser.parse_args(argv[:at])
  args.command = argv[at + 1 :]
  return args


def checked(text, pattern, what, allowed, most=253):
  """`text`, where it is what Kubernetes takes. Raises Refused."""
  if not pattern.fullmatch(text) or len(text) > most:
    raise Refused(f'{what}={text!r}: {allowed}')
  return text


def domain(text, what):
  return checked(text, DOMAIN, what, 'lower-case letters, digits, hyphens and dots')


def at_least(number, least, what):
  if not least <= number <= MOST:
    raise Refused(f'{what}={number}: {least} and more, up to {MOST:,}')
  return number


def pairs(words, what, form):
  """[(name, value), ...] of words `name=value`, each name once; a message tells no value."""
  found = {}
  for word in words:
    name, equals, value = word.partition('=')
    if not equals or not name:  # not said what it was: perhaps a secret
      raise Refused(f'{what}: write {what} {form}')
    if name in found:
      raise Refused(f'{what} {name!r} is given twice')
    found[name] = value
  return found.items()


def labels(words, what):
  """{key: value} of labels. Raises Refused."""
  commands.refuse_secrets(words)
  found = {}
  for key, value in pairs(words, what, 'KEY=VALUE'):
    checked(key, LABEL_KEY, what, "a label's key is letters, digits, -, _ and ., at most 63 of "
            'them, behind a domain and a slash where it has one', 317)
    found[key] = checked(value, LABEL, f'{what} {key}', 'letters, digits, -, _ and ., at most 63 '
                         'of them, letters or digits at the ends')
    if 'jobset.sigs.k8s.io' in key.partition('/')[0]:
      raise Refused(f'{what} {key}: such labels are those of the JobSet controller')
  return found


# --- pools ----------------------------------------------------------------------------------------


def pool(args):
  """What --pool, --slices, --nodes and --node-selector come to. Raises Refused."""
  form = 'write tpu:GENERATION:TOPOLOGY, as tpu:v5e:4x4, or gpu:KIND:GPUS A NODE, as gpu:h100:8'
  kind, *rest = commands.one_line(args.pool, '--pool').split(':')
  if kind == 'tpu' and len(rest) in (2, 3):
    if args.nodes is not None:
      raise Refused(f'--nodes={args.nodes}: the topology says the hosts; --slices is how many')
    found = tpus(*rest, slices=at_least(1 if args.slices is None else args.slices, 1, '--slices'))
  elif kind == 'gpu' and len(rest) == 2:
    if args.slices is not None:
      raise Refused(f'--slices={args.slices}: slices are of TPUs; say --nodes')
    found = gpus(*rest, nodes=at_least(1 if args.nodes is None else args.nodes, 1, '--nodes'))
  else:
    raise Refused(f'--pool={args.pool!r}: {form}')
  selector = labels(args.node_selector, '--node-selector')
  for key in selector.keys() & found.selector.keys():
    raise Refused(f'--node-selector {key}={selector[key]}: by --pool={args.pool} it is '
                  f'{found.selector[key]}; leave it out')
  if not found.selector and not selector:
    raise Refused(f'--pool={args.pool}: say by --node-selector KEY=VALUE which nodes have them')
  return found._replace(selector=found.selector | selector)


def tpus(generation, topology, chips='', slices=1):
  """A pool of TPU slices on GKE. Raises Refused, naming what is offered."""
  if generation not in ACCELERATORS:
    raise Refused(f'TPU {generation!r}: offered are {", ".join(ACCELERATORS)}')
  machines = topologies(generation).get(topology)
  if machines is None:
    raise Refused(f'topology {topology!r} of TPU {generation}: offered are {offered(generation)}')
  if chips and chips not in map(str, machines):
    raise Refused(f'{chips!r} chips a host of {generation} {topology}: offered are '
                  f'{", ".join(map(str, machines))}')
  count = int(chips or machines[0])
  hosts = math.prod(map(int, topology.split('x'))) // count
  if slices > 1 and hosts == 1:
    raise Refused(f'--slices={slices} of {generation} {topology}, which is one host: GKE joins '
                  'slices of several hosts only; take a larger topology')
  selector = {'cloud.google.com/gke-tpu-accelerator': ACCELERATORS[generation],
              'cloud.google.com/gke-tpu-topology': topology}
  return Pool('slice', slices, hosts, 'google.com/tpu', count, selector)


def topologies(generation):
  """{topology: chips that a host may have} of a generation."""
  most = LARGEST.get(generation, 0) // 64  # in cubes of 4x4x4
  if not most:
    return FLAT
  cubes = [(a, b, c) for a in range(1, most + 1) for b in range(a, most // a + 1)
           for c in range(b, most // (a * b) + 1)]
  return SMALL | {f'{4 * a}x{4 * b}x{4 * c}': (4,) for a, b, c in cubes}


def offered(generation):
  if generation not in LARGEST:
    return ', '.join(FLAT)
  return (f'{", ".join(SMALL)}, and AxBxC of multiples of 4, A <= B <= C, of at most '
          f'{LARGEST[generation]} chips, as 4x4x8')


def gpus(kind, count, nodes=1):
  """A pool of GPU nodes; kind 'any' names no label of GKE's. Raises Refused."""
  if kind not in (*GPUS, 'any'):
    raise Refused(f'GPU {kind!r}: GKE offers {", ".join(GPUS)}; elsewhere write gpu:any:N and say '
                  'by --node-selector KEY=VALUE which nodes')
  if not re.fullmatch(r'[1-9][0-9]?', count):
    raise Refused(f'{count!r} GPUs a node: a number, 1 to 99')
  selector = {} if kind == 'any' else {'cloud.google.com/gke-accelerator': GPUS[kind]}
  return Pool('nodes', 1, nodes, 'nvidia.com/gpu', int(count), selector)


# --- the JobSet -----------------------------------------------------------------------------------


def jobset(args):
  """The JobSet of the options, plain data. Raises Refused."""
  asked = pool(args)
  tail = f'-{asked.job}-{asked.replicas - 1}-{asked.hosts - 1}-12345'
  commands.name(args.name, '--name', LONGEST - len(tail))  # of which the pods' names are made
  label = labels(args.label, '--label')
  metadata = {'name': args.name}
  if args.namespace is not None:
    metadata['namespace'] = checked(args.namespace, re.compile(WORD), '--namespace',
                                    'lower-case letters, digits and hyphens', 63)
  if label:
    metadata['labels'] = label
  if asked.resource == 'google.com/tpu' and asked.hosts > 1:  # a node pool is a slice
    metadata['annotations'] = {
      'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}
  job = {
    'parallelism': asked.hosts,
    'completions': asked.hosts,
    'completionMode': 'Indexed',
    'backoffLimit': 0,  # one pod alone cannot rejoin the others: they start again together
    'podFailurePolicy': {'rules': pod_rules()},
    'template': {'metadata': {'labels': label}, 'spec': pod(args, asked)},
  }
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': metadata,
    'spec': {
      'network': {'enableDNSHostnames': True, 'subdomain': args.name},
      'failurePolicy': {  # all old pods end before the first new one, which others would meet
        'maxRestarts': at_least(args.restarts, 0, '--restarts'), 'rules': set_rules(),
        'restartStrategy': 'BlockingRecreate'},
      'replicatedJobs': [
        {'name': asked.job, 'replicas': asked.replicas, 'template': {'spec': job}}],
    },
  }


def pod_rules():
  """What makes a job fail with words that `set_rules` tells apart; the first that fits counts."""
  status = lambda number: {
    'action': 'FailJob',
    'onExitCodes': {'containerName': CONTAINER, 'operator': 'In', 'values': [number]}}
  disrupted = {'action': 'FailJob', 'onPodConditions': [
    {'type': 'DisruptionTarget', 'status': 'True'}]}
  return [status(MISTAKE), status(STOPPED), disrupted]


def set_rules():
  """What becomes of the set where a job failed by one of `pod_rules`; else it counts as a restart.

  The patterns are of messages that Kubernetes' job controller makes: `Container main for pod
  NAMESPACE/POD failed with exit code 2 matching FailJob rule at index 0`, `Pod NAMESPACE/POD has
  condition DisruptionTarget matching FailJob rule at index 2`.
  """
  rule = lambda name, action, *patterns: {
    'name': name, 'action': action, 'onJobFailureReasons': ['PodFailurePolicy'],
    'onJobFailureMessagePatterns': list(patterns)}
  return [
    rule('mistake', 'FailJobSet', rf'failed with exit code {MISTAKE} matching'),
    rule('stopped', 'RestartJobSetAndIgnoreMaxRestarts',
         rf'failed with exit code {STOPPED} matching', 'has condition DisruptionTarget matching'),
  ]


def pod(args, asked):
  """The pod of a host."""
  claims = mounts(args.claim)
  container = {
    'name': CONTAINER,
    'image': checked(args.image, IMAGE, '--image', 'as us-docker.pkg.dev/PROJECT/diffax:TAG', 512),
    'command': command(args.command, claims.values()),
    'env': environment(args, asked),
    'resources': resources(args, asked),
    'volumeMounts': [{'name': 'shm', 'mountPath': '/dev/shm'}] + [
      {'name': f'claim-{i}', 'mountPath': path} for i, path in enumerate(claims.values())],
  }
  spec = {
    'restartPolicy': 'Never',  # which a podFailurePolicy asks for
    'terminationGracePeriodSeconds': at_least(args.grace, 1, '--grace'),
    # A process that is a container's first is deaf to SIGTERM until it has a handler: a pod that
    # still compiles would hold up the next start for all of the grace period.
    'shareProcessNamespace': True,
    'nodeSelector': asked.selector,
    'tolerations': tolerations(args, asked),
    'containers': [container],
    # Data workers and NCCL share memory there; 64 MB is what a container has by itself.
    'volumes': [{'name': 'shm', 'emptyDir': {'medium': 'Memory'}}] + [
      {'name': f'claim-{i}', 'persistentVolumeClaim': {'claimName': claim}}
      for i, claim in enumerate(claims)],
  }
  if args.service_account is not None:
    spec['serviceAccountName'] = domain(args.service_account, '--service-account')
  if args.priority_class is not None:
    spec['priorityClassName'] = domain(args.priority_class, '--priority-class')
  return spec


def resources(args, asked):
  """What a host is given. Raises Refused."""
  limits, requests = {asked.resource: asked.count}, {}
  if args.cpus is not None:
    requests['cpu'] = str(at_least(args.cpus, 1, '--cpus'))
  if args.memory is not None:
    requests['memory'] = limits['memory'] = checked(
      args.memory, MEMORY, '--memory', 'a number and Mi, Gi or Ti, as 200Gi')
  return {'limits': limits} | ({'requests': requests} if requests else {})


def tolerations(args, asked):
  """Of taints that keep other pods from such nodes. Raises Refused."""
  taints = labels(args.toleration, '--toleration')
  taints |= {k: v for k, v in SPOT.items() if asked.selector.get(k) == v}
  return [{'key': asked.resource, 'operator': 'Exists', 'effect': 'NoSchedule'}] + [
    {'key': key, 'operator': 'Equal', 'value': value} for key, value in taints.items()]


def mounts(words):
  """{claim: path}. Raises Refused."""
  found = {}
  for claim, path in pairs(words, '--claim', 'CLAIM=/PATH'):
    commands.one_line(path, f'--claim {claim}')
    parts = pathlib.PurePosixPath(path).parts
    if parts[:1] != ('/',) or len(parts) < 2 or '..' in parts or ':' in path:
      raise Refused(f'--claim {claim}={path!r}: an absolute path, without .. and colons')
    if str(pathlib.PurePosixPath(path)) in (*found.values(), '/dev/shm'):
      raise Refused(f'--claim {claim}={path!r}: something else is there already')
    found[domain(claim, '--claim')] = str(pathlib.PurePosixPath(path))
  return found


def literal(text):
  """`text` so written that Kubernetes, which puts in the value of $(NAME), leaves it as it is.

  Else an override could carry a secret of the environment into the workdir.
  """
  return text.replace('$', '$$')


def command(words, claims):
  """The container's command. Raises Refused where it tells a secret, or its workdir would be lost.
  """
  if not words:
    raise Refused('say what each host runs, as -- python -m diffax.main --config ...')
  commands.quoted(words)  # for what it refuses
  for word, behind in zip(words, [*words[1:], '']):
    flag, equals, value = word.partition('=')
    if flag not in ('--workdir', '-workdir'):
      continue
    path = value if equals else behind
    inside = any(pathlib.PurePosixPath(path).is_relative_to(claim) for claim in claims)
    if '://' not in path and (not inside or '..' in path.split('/')):
      raise Refused(f'--workdir={path!r} would lie in the container and end with it: name a bucket '
                    '(gs://...), or a path in a volume by --claim CLAIM=/PATH')
  return [literal(word) for word in words]


def environment(args, asked):
  """The container's variables. Raises Refused."""
  found = {'PYTHONUNBUFFERED': {'value': '1'}, 'DIFFAX_STOP_STATUS': {'value': str(STOPPED)}}
  if asked.resource == 'nvidia.com/gpu' and asked.hosts > 1:
    first = f'{args.name}-{asked.job}-0-0.{args.name}:{PORT}'
    found['JAX_COORDINATOR_ADDRESS'] = {'value': first}
    found['JAX_NUM_PROCESSES'] = {'value': str(asked.hosts)}
  said = {}
  for name, value in pairs(args.env, '--env', 'NAME=VALUE'):
    if commands.secret(name, value):
      raise Refused(f'--env {name} looks like a secret, which whoever may see the JobSet would '
                    f'read: make it one of the cluster, and say --secret {name}=SECRET/KEY')
    said[name] = {'value': literal(commands.one_line(value, f'--env {name}'))}
  for name, value in pairs(args.secret, '--secret', 'ENV=SECRET/KEY'):
    reference = REFERENCE.fullmatch(value)
    if not reference or max(map(len, reference.group('secret', 'key'))) > 253:
      raise Refused(f'--secret {name}: write ENV=SECRET/KEY, the name of a secret of the cluster '
                    'and one of its keys, not its value')
    if name in said:
      raise Refused(f'{name} is given by --env and --secret')
    said[name] = {'valueFrom': {'secretKeyRef': {
      'name': reference['secret'], 'key': reference['key']}}}
  for name in said:
    if not ENV.fullmatch(name) or name in OURS:
      raise Refused(f'the variable {name!r}: letters, digits and underscores, and none of '
                    f'{", ".join(OURS)}, which are set here')
  return [{'name': name, **value} for name, value in (found | said).items()]


# --- writing and submitting -----------------------------------------------------------------------


def written(tree):
  return json.dumps(tree, indent=2, ensure_ascii=False) + '\n'


def render(args):
  """Writes the JobSet. Raises Refused where a file that is none would be lost."""
  if args.dry_run:
    raise Refused('--dry-run: render submits nothing anyway; leave it out')
  text = written(jobset(args))
  if not args.out:
    print(text, end='')
    return
  path = pathlib.Path(args.out)
  if path.exists() and not _is_ours(path):
    raise Refused(f'--out={path} is there and is no JobSet that was written here: choose another')
  try:
    path.write_text(text)
  except OSError as error:
    raise Refused(f'--out={path} cannot be written ({error.strerror}): choose another') from error
  print(f'wrote {path}; kubectl create -f {shlex.quote(str(path))} starts it')


def _is_ours(path):
  try:
    return json.loads(path.read_text())['kind'] == 'JobSet'
  except (OSError, ValueError, KeyError, TypeError):
    return False


def submit(args):
  """Hands the JobSet to kubectl; 1 where that fails, as where one of the name is there: it is not
  changed, for `apply` would give a queued run another's words.
  """
  if args.out:
    raise Refused('--out is of render; submit writes no file')
  text, line = written(jobset(args)), ['kubectl', 'create', '-f', '-']
  if args.dry_run:
    print(text, end='')
    print(f'not done: {shlex.join(line)}', file=sys.stderr)
    return 0
  if not shutil.which(line[0]):
    raise Refused('kubectl is not found: install it (https://kubernetes.io/docs/tasks/tools), or '
                  'render to a file and create it elsewhere')
  done = subprocess.run(line, input=text, capture_output=True, text=True, errors='replace')
  print(done.stdout, end='')
  if done.returncode:
    remedy = next((r for said, r in REMEDIES.items() if said in done.stderr), '')
    print(f'error: kubectl: {" ".join(done.stderr.split())}' + (remedy and f'; {remedy}'),
          file=sys.stderr)
    return 1
  space = f' -n {args.namespace}' if args.namespace else ''
  print(f'its state:  kubectl get jobset{space} {args.name}\n'
        f'first host: kubectl logs{space} -f -l jobset.sigs.k8s.io/jobset-name={args.name},'
        'jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0\n'
        f'save, stop: kubectl delete jobset{space} {args.name}')
  return 0


def main(argv=None):
  args = arguments(sys.argv[1:] if argv is None else argv)
  return commands.told({'render': render, 'submit': submit}[args.verb], args)


if __name__ == '__main__':
  sys.exit(main())
