"""JobSets: they fit the schema, hosts find each other, failures are told apart, nothing slips in.

The schema is that of the package kubeflow-trainer-api, made of JobSet's own API.
"""

import copy
import json
import os
import re
import sys

from kubeflow_trainer_api import models
import pytest
import run_diffax
import yaml

from diffax import hosts

sys.path.insert(0, str(run_diffax.ROOT / 'launch'))

import k8s  # noqa: E402, of the folder above

RUN = ('--', 'python', '-m', 'diffax.main', '--config', 'configs/digits.py', '--workdir', 'gs://b/w')
TPU = ('--name=digits', '--image=pkg.dev/p/diffax:1', '--pool=tpu:v5e:4x4')
GPU = ('--name=digits', '--image=pkg.dev/p/diffax:1', '--pool=gpu:h100:8')
ALL = ('--namespace=team', '--label=kueue.x-k8s.io/queue-name=low', '--label=owner=me',
       '--env=RATE=1e-4', '--env=ANSWER=no', '--secret=HF_TOKEN=hugging-face/token',
       '--claim=data=/data', '--claim=runs.nfs=/mnt/runs', '--service-account=trainer',
       '--priority-class=high', '--restarts=3', '--grace=25', '--node-selector=disk=ssd')


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
  """The folder of a kubectl that notes what it is told, and says what `says` and `status` hold."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  program = folder / 'kubectl'
  program.write_text(f'''#!{sys.executable}
import json, pathlib, sys
here = pathlib.Path({str(folder)!r})
(here / 'told').write_text(json.dumps([sys.argv[1:], sys.stdin.read()]))
out, err, status = json.loads((here / 'answer').read_text())
print(out)
print(err, file=sys.stderr)
sys.exit(status)
''')
  program.chmod(0o755)
  answer(folder, 'jobset.jobset.x-k8s.io/digits created')
  monkeypatch.setenv('PATH', f'{folder}{os.pathsep}{os.environ["PATH"]}')
  return folder


def answer(folder, out='', err='', status=0):
  (folder / 'answer').write_text(json.dumps([out, err, status]))


def rendered(capsys, *options, run=RUN):
  """The JobSet of a command line."""
  assert k8s.main(['render', *options, *run]) == 0
  return json.loads(capsys.readouterr().out)


def refused(capsys, *options, run=RUN):
  """The one line with which a command line is refused; nothing else was said."""
  assert k8s.main(['render', *options, *run]) == 2
  said = capsys.readouterr()
  assert not said.out
  assert said.err.startswith('error: ') and said.err.count('\n') == 1, said.err
  return said.err


def job(tree):
  (found,) = tree['spec']['replicatedJobs']
  return found


def pod(tree):
  return job(tree)['template']['spec']['template']['spec']


def container(tree):
  (found,) = pod(tree)['containers']
  return found


def fits(tree):
  """Whether the schema has every field, of its type; the models drop what they do not know."""
  return models.JobsetV1alpha2JobSet.from_dict(copy.deepcopy(tree)).to_dict() == tree


# --- the schema -----------------------------------------------------------------------------------


@pytest.mark.parametrize('options', [
  TPU, (*TPU, '--slices=3', *ALL), GPU, (*GPU, '--nodes=4', *ALL),
  (*GPU[:2], '--pool=gpu:any:1', '--node-selector=gpu=mine'),
], ids=' '.join)
def test_schema(options, capsys):
  tree = rendered(capsys, *options)
  assert fits(tree)
  assert (tree['apiVersion'], tree['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  spec = job(tree)['template']['spec']
  # Rules of the API that its schema does not tell.
  assert spec['podFailurePolicy'] and spec['template']['spec']['restartPolicy'] == 'Never'
  named = {rule['onExitCodes']['containerName'] for rule in spec['podFailurePolicy']['rules']
           if 'onExitCodes' in rule}
  assert named == {container(tree)['name']}
  for rule in tree['spec']['failurePolicy']['rules']:
    assert re.fullmatch('[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?', rule['name'])
    assert rule['action'] in ('FailJobSet', 'RestartJobSetAndIgnoreMaxRestarts')
  volumes = [volume['name'] for volume in pod(tree)['volumes']]
  assert volumes == [mount['name'] for mount in container(tree)['volumeMounts']]
  assert len(set(volumes)) == len(volumes)


def test_schema_is_one():
  """That the test above can fail: a field that is unknown, missing or of another type."""
  tree = k8s.jobset(k8s.arguments(['render', *TPU, *RUN]))
  for change in (
    lambda t: pod(t).update(nodeSelectr={}),
    lambda t: t['spec']['failurePolicy']['rules'][0].update(onJobFailureMessages=[]),
    lambda t: t['spec']['network'].update(enableDNSHostname=True),
  ):
    changed = copy.deepcopy(tree)
    change(changed)
    assert not fits(changed)
  for change in (
    lambda t: job(t).update(replicas='one'),
    lambda t: container(t).update(command='python'),
    lambda t: t['spec']['failurePolicy']['rules'][0].update(onJobFailureReasons='any'),
  ):
    changed = copy.deepcopy(tree)
    change(changed)
    with pytest.raises(ValueError):
      fits(changed)


def test_all_options(capsys):
  tree = rendered(capsys, *GPU, '--nodes=2', *ALL)
  labels = {'kueue.x-k8s.io/queue-name': 'low', 'owner': 'me'}
  assert tree['metadata'] == {'name': 'digits', 'namespace': 'team', 'labels': labels}
  assert job(tree)['template']['spec']['template']['metadata']['labels'] == labels
  assert tree['spec']['failurePolicy']['maxRestarts'] == 3
  said = pod(tree)
  assert said['terminationGracePeriodSeconds'] == 25
  assert (said['serviceAccountName'], said['priorityClassName']) == ('trainer', 'high')
  assert said['nodeSelector'] == {
    'cloud.google.com/gke-accelerator': 'nvidia-h100-80gb', 'disk': 'ssd'}
  env = {each['name']: each for each in container(tree)['env']}
  assert env['RATE']['value'] == '1e-4' and env['ANSWER']['value'] == 'no'
  assert env['HF_TOKEN'] == {'name': 'HF_TOKEN', 'valueFrom': {
    'secretKeyRef': {'name': 'hugging-face', 'key': 'token'}}}
  paths = {each['name']: each['mountPath'] for each in container(tree)['volumeMounts']}
  places = {paths[each['name']]: each for each in said['volumes']}
  assert places['/dev/shm']['emptyDir'] == {'medium': 'Memory'}
  assert places['/data']['persistentVolumeClaim'] == {'claimName': 'data'}
  assert places['/mnt/runs']['persistentVolumeClaim'] == {'claimName': 'runs.nfs'}


def test_all_parsers_read_it_alike(capsys):
  """YAML has more words for numbers and truth than JSON; ours stand in quotes."""
  options = [f'--env=E{i}={value}' for i, value in enumerate(
    ['1e3', '0x1F', '0o17', '1_000', 'no', 'on', '~', 'null', '.inf', '2026-01-01', 'a: b', '# c',
     '- d', '&e', '*f', '!g', '"', "'", '\\', '{{h}}', 'ä 😀'])]
  assert k8s.main(['render', *TPU, *options, *RUN]) == 0
  text = capsys.readouterr().out
  assert yaml.safe_load(text) == json.loads(text)
  env = [each['value'] for each in container(json.loads(text))['env'] if each['name'][0] == 'E']
  assert env == [option.split('=', 2)[2] for option in options]


# --- pools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('pool, accelerator, hosts, chips', [
  ('v5e:1x1', 'tpu-v5-lite-podslice', 1, 1),
  ('v5e:2x2', 'tpu-v5-lite-podslice', 1, 4),
  ('v5e:2x4', 'tpu-v5-lite-podslice', 1, 8),
  ('v5e:2x4:4', 'tpu-v5-lite-podslice', 2, 4),
  ('v5e:4x4', 'tpu-v5-lite-podslice', 4, 4),
  ('v5e:16x16', 'tpu-v5-lite-podslice', 64, 4),
  ('v6e:2x4', 'tpu-v6e-slice', 1, 8),
  ('v6e:8x16', 'tpu-v6e-slice', 32, 4),
  ('v4:2x2x1', 'tpu-v4-podslice', 1, 4),
  ('v4:2x4x4', 'tpu-v4-podslice', 8, 4),
  ('v4:12x16x16', 'tpu-v4-podslice', 768, 4),
  ('v5p:2x2x4', 'tpu-v5p-slice', 4, 4),
  ('v5p:16x16x24', 'tpu-v5p-slice', 1536, 4),
])
def test_tpus(pool, accelerator, hosts, chips, capsys):
  """Rows of Google's tables: machines of a topology, and chips of each."""
  tree = rendered(capsys, *TPU[:2], f'--pool=tpu:{pool}')
  spec = job(tree)['template']['spec']
  assert spec['completions'] == spec['parallelism'] == hosts
  assert spec['completionMode'] == 'Indexed' and spec['backoffLimit'] == 0
  assert container(tree)['resources']['limits'] == {'google.com/tpu': chips}
  assert pod(tree)['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': accelerator,
    'cloud.google.com/gke-tpu-topology': pool.split(':')[1]}
  assert ('annotations' in tree['metadata']) == (hosts > 1)  # hosts of one may share a node pool


def test_slices(capsys):
  tree = rendered(capsys, *TPU, '--slices=3')
  assert job(tree)['replicas'] == 3
  assert tree['metadata']['annotations'] == {
    'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}


@pytest.mark.parametrize('options, words', [
  (['--pool=tpu:v5e:3x3'], ["'3x3'", '1x1, 2x2, 2x4', '16x16']),
  (['--pool=tpu:v4:4x4'], ["'4x4'", '2x2x1', '4096']),
  (['--pool=tpu:v5p:8x4x4'], ['A <= B <= C']),
  (['--pool=tpu:v5p:16x16x28'], ['6144']),
  (['--pool=tpu:v9:2x2'], ["'v9'", 'v4, v5e, v5p, v6e']),
  (['--pool=tpu:v5e:4x4:8'], ["'8'", 'offered are 4']),
  (['--pool=tpu:v5e:2x4:x'], ["'x'", '8, 4']),
  (['--pool=tpu:v5e:2x4', '--slices=2'], ['one host', 'larger']),
  (['--pool=tpu:v5e:4x4', '--slices=0'], ['--slices=0']),
  (['--pool=tpu:v5e:4x4', '--nodes=2'], ['--nodes=2', '--slices']),
  (['--pool=gpu:h100:8', '--nodes=0'], ['--nodes=0']),
  (['--pool=gpu:h100:8', '--nodes=99999999999'], ['--nodes=99999999999', '1,000,000']),
  (['--pool=tpu:v5e:4x4', '--node-selector=cloud.google.com/gke-tpu-topology=8x8'],
   ['gke-tpu-topology=8x8', '4x4', 'leave it out']),
  (['--pool=gpu:h100:8', '--memory=lots'], ["--memory='lots'", '200Gi']),
  (['--pool=gpu:h100:8', '--cpus=0'], ['--cpus=0']),
  (['--pool=gpu:h100:8', '--toleration=a=b c'], ['--toleration a', 'letters']),
  (['--pool=gpu:h100:8', '--slices=2'], ['--slices=2', '--nodes']),
  (['--pool=gpu:h100:0'], ["'0'"]),
  (['--pool=gpu:h100:-8'], ["'-8'"]),
  (['--pool=gpu:h100'], ['gpu:KIND']),
  (['--pool=gpu:rtx:8'], ["'rtx'", 'h100, ', 'gpu:any:N']),
  (['--pool=gpu:any:8'], ['--node-selector']),
  (['--pool=cpu:4'], ["'cpu:4'", 'tpu:v5e:4x4']),
  (['--pool=tpu:v5e:4x4\n'], ['\\n']),
])
def test_pools_that_are_refused(options, words, capsys):
  said = refused(capsys, *TPU[:2], *options)
  assert all(word in said for word in words), said


# --- hosts find each other ------------------------------------------------------------------------


def seen(tree, index):
  """The variables that a pod sees, as an indexed job sets them."""
  env = {each['name']: each['value'] for each in container(tree)['env'] if 'value' in each}
  return env | {'JOB_COMPLETION_INDEX': str(index), 'JAX_PLATFORMS': 'cuda'}


def test_gpu_nodes_find_each_other(capsys):
  tree = rendered(capsys, *GPU, '--nodes=4')
  network, job_name = tree['spec']['network'], job(tree)['name']
  assert network['enableDNSHostnames'] is True
  first = f'digits-{job_name}-0-0.{network["subdomain"]}'  # the pod's name, by JobSet's API
  for index in range(4):
    assert hosts.settings(seen(tree, index)) == dict(
      coordinator_address=f'{first}:8476', num_processes=4, process_id=index,
      cluster_detection_method='deactivate')


def test_one_node_and_tpus_need_no_address(capsys):
  assert hosts.settings(seen(rendered(capsys, *GPU), 0)) is None
  for options in (TPU, (*TPU, '--slices=2')):
    assert not any(name.startswith('JAX_') for name in seen(rendered(capsys, *options), 1)
                   if name != 'JAX_PLATFORMS')


# --- what becomes of a run ------------------------------------------------------------------------


def fate(tree, status, disrupted=False):
  """What JobSet does when a pod ended with `status`, as Kubernetes and JobSet read the policies.

  The messages are those of kubernetes/pkg/controller/job/pod_failure_policy.go; the set's rules are
  read as in jobset/pkg/controllers/failure_policy.go.
  """
  reason, message = 'BackoffLimitExceeded', 'Job has reached the specified backoff limit'
  for index, rule in enumerate(job(tree)['template']['spec']['podFailurePolicy']['rules']):
    assert rule['action'] == 'FailJob'
    by = None
    if 'onExitCodes' in rule:
      codes = rule['onExitCodes']
      assert codes['operator'] == 'In' and 0 not in codes['values']
      if status in codes['values']:
        by = f'Container main for pod ns/digits-0 failed with exit code {status}'
    elif disrupted and rule['onPodConditions'][0] == {'type': 'DisruptionTarget', 'status': 'True'}:
      by = 'Pod ns/digits-0 has condition DisruptionTarget'
    if by:
      reason, message = 'PodFailurePolicy', f'{by} matching FailJob rule at index {index}'
      break
  for rule in tree['spec']['failurePolicy']['rules']:
    fits = any(re.search(p, message) for p in rule['onJobFailureMessagePatterns'])
    if reason in rule['onJobFailureReasons'] and fits:
      return rule['action']
  return 'RestartJobSet'


def test_what_becomes_of_a_run(capsys):
  tree = rendered(capsys, *TPU)
  again = 'RestartJobSetAndIgnoreMaxRestarts'
  stopped = int(seen(tree, 0)['DIFFAX_STOP_STATUS'])
  assert stopped not in (0, 1, 2) and stopped < 128
  assert fate(tree, 2) == 'FailJobSet'
  assert fate(tree, stopped) == again  # whoever sent the signal
  assert fate(tree, 137, disrupted=True) == again  # an eviction that left no time
  for status in (1, 3, 20, 22, 137, 139, 143):
    assert fate(tree, status) == 'RestartJobSet', status
  assert tree['spec']['failurePolicy']['maxRestarts'] == 20
  assert pod(tree)['terminationGracePeriodSeconds'] == 300
  assert pod(tree)['shareProcessNamespace'] is True  # or a signal before training is not heard


def test_nodes_that_others_keep_from(capsys):
  """Spot nodes of GKE bring their taint; others' are said. All old pods end before the new ones."""
  tree = rendered(capsys, *TPU, '--node-selector=cloud.google.com/gke-spot=true',
                  '--toleration=team=vision')
  assert pod(tree)['tolerations'] == [
    {'key': 'google.com/tpu', 'operator': 'Exists', 'effect': 'NoSchedule'},
    {'key': 'team', 'operator': 'Equal', 'value': 'vision'},
    {'key': 'cloud.google.com/gke-spot', 'operator': 'Equal', 'value': 'true'}]
  assert fits(tree) and tree['spec']['failurePolicy']['restartStrategy'] == 'BlockingRecreate'
  assert len(pod(rendered(capsys, *TPU))['tolerations']) == 1


def test_what_a_host_needs(capsys):
  """Requested, so that no neighbour takes it; memory is a limit, too: 137 is counted."""
  tree = rendered(capsys, *TPU, '--cpus=96', '--memory=200Gi')
  assert fits(tree) and container(tree)['resources'] == {
    'limits': {'google.com/tpu': 4, 'memory': '200Gi'},
    'requests': {'cpu': '96', 'memory': '200Gi'}}
  assert 'requests' not in container(rendered(capsys, *TPU))['resources']


# --- nothing slips in, nothing leaks --------------------------------------------------------------


def expanded(text, env):
  """Kubernetes' expansion of a command's words, third_party/forked/golang/expansion."""
  return re.sub(r'\$(\$|\(([^)]*)\)|)', lambda m: (
    '$' if m[1] in ('$', '') else env.get(m[2], m[0])), text)


HOSTILE = ['$(HF_TOKEN)', '$$(HF_TOKEN)', '$', '$$', 'a$', '$(', '$(HF', '${HF_TOKEN}', '`id`',
           '; rm -rf /', '&&', '"', "'", '\\', '| sh', '{"a": 1}', '*', '~', '#', '- x', '', 'ä 😀']


def test_command_is_literal(capsys):
  words = ['python', '-m', 'diffax.main', *(f'--config.x={word}' for word in HOSTILE), *HOSTILE]
  tree = rendered(capsys, *TPU, '--env=A=$(HF_TOKEN) $$ $(B)', '--secret=HF_TOKEN=hf/token',
                  run=('--', *words))
  env = {'HF_TOKEN': 'hf_secret', 'B': 'b'}
  assert [expanded(word, env) for word in container(tree)['command']] == words
  assert expanded(seen(tree, 0)['A'], env) == '$(HF_TOKEN) $$ $(B)'
  assert 'args' not in container(tree)
  assert expanded('$(HF_TOKEN)', env) == 'hf_secret'  # which is what would have happened


@pytest.mark.parametrize('options', [
  ['--env=HF_TOKEN=hf_s3cr3t'],
  ['--env=WANDB_API_KEY=hf_s3cr3t'],
  ['--env=password=hf_s3cr3t'],
  ['--env=DB=postgres://me:hf_s3cr3t@host/db'],
  ['--env', 'hf_s3cr3t'],
  ['--env', '=hf_s3cr3t'],
  ['--label=api-key=hf_s3cr3t'],
  ['--node-selector=token=hf_s3cr3t'],
  ['--secret=HF_TOKEN=hf_s3cr3t'],
  ['--secret', 'hf_s3cr3t'],
  ['--', 'python', '--hf-token', 'hf_s3cr3t'],
  ['--', 'python', '--config.api_key=hf_s3cr3t'],
  ['--', 'env', 'HF_TOKEN=hf_s3cr3t', 'python'],
])
def test_secrets_are_refused_and_not_told(options, capsys):
  said = refused(capsys, *TPU, *options, run=() if options[0] == '--' else RUN)
  assert 's3cr3t' not in said


@pytest.mark.parametrize('options', [
  ['--name=Digits'],
  ['--name=digits\n  evil: true'],
  ['--name=-digits'],
  ['--name=digits.x'],
  ['--name=$(id)'],
  ['--name='],
  ['--namespace=a/b'],
  ['--namespace='],
  ['--image=bad image'],
  ['--image=-v'],
  ['--image=a:b:c'],
  ['--image=a\nb'],
  ['--image='],
  ['--label=a'],
  ['--label=a b=c'],
  ['--label=a=b c'],
  ['--label=a=' + 'x' * 64],
  ['--label=' + 'x' * 64 + '=a'],
  ['--label=a=b\n'],
  ['--label=-a=b'],
  ['--label=a/b/c=d'],
  ['--label=a=1', '--label=a=2'],
  ['--label=jobset.sigs.k8s.io/jobset-name=other'],
  ['--node-selector=a'],
  ['--node-selector=a=b,c=d'],
  ['--env=A-B=c'],
  ['--env=1A=c'],
  ['--env=A=b\nC'],
  ['--env=A=\x1b[2J'],
  ['--env=A=1', '--env=A=2'],
  ['--env=JAX_PROCESS_ID=0'],
  ['--env=DIFFAX_STOP_STATUS=0'],
  ['--secret=A-B=s/k'],
  ['--secret=A=S/k'],
  ['--secret=A=s/k/l'],
  ['--secret=A=s/'],
  ['--secret=A=s/k\n'],
  ['--secret=JAX_PROCESS_ID=s/k'],
  ['--env=A=1', '--secret=A=s/k'],
  ['--claim=data'],
  ['--claim=data=data'],
  ['--claim=data=/'],
  ['--claim=data=/a/../b'],
  ['--claim=data=/a:b'],
  ['--claim=Data=/a'],
  ['--claim=a=/x', '--claim=b=/x/'],
  ['--claim=a=/dev/shm'],
  ['--service-account=a b'],
  ['--priority-class=$(x)'],
  ['--restarts=-1'],
  ['--grace=0'],
  ['--', 'python', 'a\nb'],
  ['--'],
], ids=' '.join)
def test_what_is_refused(options, capsys):
  refused(capsys, *TPU, *options, run=() if options[0] == '--' else RUN)


@pytest.mark.parametrize('image', [
  'diffax', 'diffax:1.0', 'localhost:5000/diffax', 'us-docker.pkg.dev/my-project/repo/diffax:v1_2',
  'ghcr.io/a/b@sha256:' + 'a' * 64, 'a.b/c__d/e-f:x@sha256:' + '0' * 64])
def test_images(image, capsys):
  assert container(rendered(capsys, *TPU, f'--image={image}'))['image'] == image


@pytest.mark.parametrize('workdir, claims, good', [
  (['--workdir', 'runs/x'], [], False),
  (['--workdir=runs/x'], [], False),
  (['-workdir=/runs/x'], [], False),
  (['--workdir=/data/x'], [], False),
  (['--workdir=/data/x'], ['--claim=d=/data'], True),
  (['--workdir', '/data'], ['--claim=d=/data'], True),
  (['--workdir=/database/x'], ['--claim=d=/data'], False),
  (['--workdir=/data/../x'], ['--claim=d=/data'], False),
  (['--workdir=gs://b/x'], [], True),
  (['--workdir', 's3://b/x'], [], True),
])
def test_a_workdir_that_would_be_lost(workdir, claims, good, capsys):
  run = ('--', 'python', '-m', 'diffax.main', *workdir)
  if good:
    assert container(rendered(capsys, *TPU, *claims, run=run))['command'] == list(run[1:])
  else:
    assert '--claim' in refused(capsys, *TPU, *claims, run=run)


@pytest.mark.parametrize('options, replicas, hosts', [
  (TPU[1:], 1, 4), ((*TPU[1:], '--slices=100'), 100, 4), ((*GPU[1:], '--nodes=1000'), 1, 1000)])
def test_longest_name(options, replicas, hosts, capsys):
  """A pod's name, which Kubernetes ends with a hyphen and five letters, has 63 characters."""
  name = next(n for n in range(63, 0, -1)
              if k8s.main(['render', '--name', 'x' * n, *options, *RUN]) == 0)
  tree = json.loads(capsys.readouterr().out)
  longest = f'{"x" * name}-{job(tree)["name"]}-{replicas - 1}-{hosts - 1}-abcde'
  assert len(longest) == 63


# --- writing and submitting -----------------------------------------------------------------------


def test_out(tmp_path, capsys):
  path = tmp_path / 'a b.yaml'
  for name in ('one', 'two'):  # one of ours is written again
    assert k8s.main(['render', *TPU, f'--name={name}', '--out', str(path), *RUN]) == 0
    assert f"kubectl create -f '{path}'" in capsys.readouterr().out
    assert json.loads(path.read_text())['metadata']['name'] == name
  for text in ('kind: Secret\n', '{"kind": "Pod"}', '[1]', ''):
    path.write_text(text)
    assert str(path) in refused(capsys, *TPU, '--out', str(path))
    assert path.read_text() == text
  assert 'cannot be written' in refused(capsys, *TPU, '--out', str(tmp_path / 'no' / 'such'))


def test_submit(kubectl, capsys):
  tree = rendered(capsys, *TPU, '--namespace=team')
  assert k8s.main(['submit', *TPU, '--namespace=team', *RUN]) == 0
  words, text = json.loads((kubectl / 'told').read_text())
  assert words == ['create', '-f', '-']
  assert json.loads(text) == tree
  said = capsys.readouterr().out
  assert 'created' in said and 'kubectl delete jobset -n team digits' in said


def test_dry_run(kubectl, capsys):
  tree = rendered(capsys, *TPU)
  assert k8s.main(['submit', *TPU, '--dry-run', *RUN]) == 0
  said = capsys.readouterr()
  assert json.loads(said.out) == tree and 'kubectl create -f -' in said.err
  assert not (kubectl / 'told').exists()


@pytest.mark.parametrize('told, words', [
  (dict(err='Error from server (AlreadyExists): jobsets "digits" already exists', status=1),
   ['nothing was started', 'another --name', 'delete jobset']),
  (dict(err='error: no matches for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"', status=1),
   ['install JobSet', 'no matches']),
  (dict(err='strict decoding error: unknown field "spec.failurePolicy.rules"', status=1), ['0.10']),
  (dict(err='The connection to the server was refused', status=7), ['connection', 'refused']),
])
def test_what_kubectl_may_say(told, words, kubectl, capsys):
  answer(kubectl, **told)
  assert k8s.main(['submit', *TPU, *RUN]) == 1
  said = capsys.readouterr().err
  assert said.startswith('error: ') and said.count('\n') == 1
  assert all(word in said for word in words), said


def test_no_kubectl(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('PATH', str(tmp_path))
  assert k8s.main(['submit', *TPU, *RUN]) == 2
  assert 'install it' in capsys.readouterr().err


def test_mistakes_are_told_before_kubectl(kubectl, capsys):
  for options in (['--pool=tpu:v5e:3x3'], ['--env=HF_TOKEN=x'], ['--out=x.yaml']):
    assert k8s.main(['submit', *TPU, *options, *RUN]) == 2
    assert capsys.readouterr().err.startswith('error: ')
  assert not (kubectl / 'told').exists()
