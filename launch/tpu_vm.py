"""Runs on Cloud TPU VMs, around gcloud: makes them, sets them up, keeps a command going on them.

  python launch/tpu_vm.py create tune --zone europe-west4-b --type v5litepod-16 \\
    --version v2-alpha-tpuv5-lite --spot
  python launch/tpu_vm.py setup tune
  python launch/tpu_vm.py run tune --watch -- \\
    python -m diffax.main --config configs/x.py --workdir gs://bucket/x
  python launch/tpu_vm.py status tune
  python launch/tpu_vm.py logs tune --worker 1 --follow
  python launch/tpu_vm.py logs tune --out logs/tune
  python launch/tpu_vm.py stop tune
  python launch/tpu_vm.py results tune --out results
  python launch/tpu_vm.py delete tune --yes

create   asks for a queued resource (or with --direct for a TPU VM at once) and waits for it
setup    copies the working tree to all workers, and installs it there
run      starts the command on every worker of every slice, in a tmux session named diffax-RUN;
         a worker starts it again, --tries times in all, where it ends by trouble, and not where it
         has ended (status 0) or was wrong (status 2). --watch stays and, after a preemption, makes
         the TPU again, sets it up with the same tree and starts the command, which goes on from
         its last checkpoint; without a command, or with the same one while it is under way, it
         goes on watching. It ends with 0 where the run has finished, 1 where it failed or the TPU
         is not to be had, 2 where it was wrong, 3 where it was stopped
stop     asks the run to save and end, and waits for that; a TPU that is being made again at the
         moment does not start it any more

What was created and started is kept in ~/.local/state/diffax/tpu (or below $XDG_STATE_HOME): later
commands need the name alone. For several workers gcloud wants its key in the ssh agent:
ssh-add ~/.ssh/google_compute_engine. --dry-run prints each command and runs none.
"""

import argparse
import contextlib
import math
import os
import pathlib
import re
import sys
import tarfile
import time

import commands
import tpu_cloud as cloud
import tpu_runs as runs

HERE = pathlib.Path(__file__).resolve().parent
PLACE = re.compile(r'(?!-)[-\w./]+', re.ASCII)  # scp of old hands a path to a shell
EXTRAS = re.compile(r'[a-z][-\w]*(,[a-z][-\w]*)*', re.ASCII)
REMEDIES = {'absent': 'create it first', 'waiting': 'wait for it with create',
            'going': 'wait for it with create'}
AGAIN = 'delete it and create it again; or, where it is stopped, `gcloud compute tpus tpu-vm start`'


def arguments(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False)
  parser.add_argument('what', choices=COMMANDS)
  parser.add_argument('name', help='of the TPU')
  parser.add_argument('--zone')
  parser.add_argument('--project', help="gcloud's own, unless given")
  parser.add_argument('--type', help='create: the accelerator, as v5litepod-16')
  parser.add_argument('--version', help='create: the runtime, as v2-alpha-tpuv5-lite')
  parser.add_argument('--slices', type=int, help='create: how many, 1 unless given')
  parser.add_argument('--label', dest='labels', action='append', help='create: key=value')
  parser.add_argument('--also', action='append', help='create: a further word, --also=--reserved')
  for flag, text in (('--spot', 'create: may be preempted'), ('--direct', 'create: no queue'),
                     ('--internal', 'addresses inside the network alone')):
    parser.add_argument(flag, action='store_true', default=None, help=text)
  parser.add_argument('--tree', default=str(HERE.parent), help='setup: the git checkout to copy')
  parser.add_argument('--extras', default='tpu,gcs', help='setup: what pip installs along')
  parser.add_argument('--run', default='run', help='the name of a run')
  parser.add_argument('--workdir', help="run: put behind the command, as its --workdir's value")
  parser.add_argument('--tries', type=int, default=5, help='run: how often it is started')
  parser.add_argument('--pause', type=float, default=60.0, help='run: seconds between them')
  parser.add_argument('--watch', action='store_true', help='run: stay, and renew after preemption')
  parser.add_argument('--poll', type=float, default=30.0, help='seconds between two looks')
  parser.add_argument('--worker', type=int, default=0, help='logs: of which worker')
  parser.add_argument('--slice', type=int, default=0, help='logs: of which slice')
  parser.add_argument('--lines', type=int, default=50, help='logs: the last ones')
  parser.add_argument('--follow', action='store_true', help='logs: go on printing')
  parser.add_argument('--out', help='logs, results: copy into this folder, of all workers')
  parser.add_argument('--grace', type=float, default=600.0, help='stop: seconds to save in')
  parser.add_argument('--yes', action='store_true', help='delete: really')
  parser.add_argument('--dry-run', action='store_true', help='print each command, run none')
  cut = argv.index('--') if '--' in argv else len(argv)
  args = parser.parse_args(argv[:cut])
  args.command = argv[cut + 1:]
  if args.command and args.what != 'run':
    parser.error(f'{args.what} takes no command behind --')
  least = args.pause, args.poll, args.grace, args.worker, args.slice
  if args.tries < 1 or not all(0 <= value < math.inf for value in least):
    parser.error('--tries is 1 and more; --pause, --poll, --grace, --worker and --slice 0 and more')
  return args


def settings(args):
  """The Tpu of a command line: what it says, else what is kept. Raises Refused."""
  fields = runs.recall(args.name)['tpu'] if args.what != 'create' else {}
  given = {field: getattr(args, field) for field in cloud.Tpu._fields}
  fields |= {field: value for field, value in given.items() if value is not None}
  for field in ('labels', 'also'):
    fields[field] = tuple(fields.get(field, ()))
  return cloud.checked(cloud.Tpu(**fields))


# --- create, setup, delete ------------------------------------------------------------------------


def create(gcloud, tpu, args):
  words = cloud.create(tpu)
  found = cloud.look(gcloud, tpu)
  if found.kind not in ('absent', 'waiting') and not gcloud.dry:
    raise commands.Refused(
      f'{tpu.name} is there already ({found.said}): go on with setup, or delete it first')
  other = cloud.differs(gcloud, tpu) if found.kind == 'waiting' else ''
  if other:
    raise commands.Refused(f'{tpu.name} is asked for already, with {other}: wait for it by the '
                           'options it was asked for with, or delete it first')
  runs.keep(gcloud, tpu, renewing=False)
  if found.kind != 'waiting':
    gcloud.do(words)
  wait(gcloud, tpu, args.poll)


def wait(gcloud, tpu, poll):
  """Until it is ready. Raises Trouble where it will not be."""
  said = None
  while True:
    found = runs.patiently(gcloud, tpu, poll)
    if found.said != said:
      runs.say(f'{tpu.name}: {found.said}', gcloud)
      said = found.said
    if found.kind == 'ready':
      return found
    if found.kind not in ('waiting', 'going'):
      raise cloud.Trouble(f'{tpu.name} is not to be had ({found.said}): {AGAIN}')
    time.sleep(poll)


def ready(gcloud, tpu):
  """The State of a TPU that is ready. Raises Trouble where it is not."""
  found = cloud.look(gcloud, tpu)
  if found.kind != 'ready':
    remedy = REMEDIES.get(found.kind, AGAIN)
    raise cloud.Trouble(f'{tpu.name} is not ready ({found.said}): {remedy}')
  return found


def setup(gcloud, tpu, args):
  new, names = runs.kept(tpu.name, '.new.tar.gz'), commands.files(args.tree)
  if not EXTRAS.fullmatch(args.extras):
    raise commands.Refused(f'--extras={args.extras!r}: names in setup.py, as tpu,gcs')
  if any(name.startswith('runs/') for name in names):
    raise commands.Refused(f'{args.tree} holds files in runs/, where on a worker runs write what '
                           'outlives the tree: put runs/ into .gitignore')
  ready(gcloud, tpu)
  if not gcloud.dry:
    new.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(new, mode='w:gz', dereference=True) as tar:
      for name in names:
        tar.add(pathlib.Path(args.tree) / name, name)
  runs.install(gcloud, tpu, new, args.extras)
  if not gcloud.dry:
    os.replace(new, runs.kept(tpu.name, '.tar.gz'))  # for the next VMs: the tree may change
    runs.keep(gcloud, tpu, extras=args.extras)
  runs.say(f'{tpu.name} is set up with {len(names)} files of {args.tree}', gcloud)


def delete(gcloud, tpu, args):
  if not args.yes and not gcloud.dry:
    raise commands.Refused(
      f'{tpu.name} and what its disks hold would be gone; copy results first, then add --yes')
  runs.keep(gcloud, tpu, renewing=False)  # a watch does not make it again
  gcloud.do(cloud.delete(tpu))
  runs.say(f'{tpu.name} is deleted', gcloud)


# --- runs -----------------------------------------------------------------------------------------


def run(gcloud, tpu, args):
  commands.name(args.run, '--run')
  if args.watch:
    cloud.create(tpu)  # refuses what could not be made again
  if not args.command and not (args.watch and args.run in runs.recall(args.name)['runs']):
    raise commands.Refused('say what to run, as -- python -m diffax.main --config ...')
  with runs.watching(gcloud, tpu.name) if args.watch else contextlib.nullcontext():
    if args.command:
      start(gcloud, tpu, args)
    if args.watch:
      return runs.Watch(gcloud, tpu, args.run, args.poll).until_end()
  return 0


def start(gcloud, tpu, args):
  words = command(args)
  found = ready(gcloud, tpu)
  (rows, why), count = runs.survey(gcloud, tpu, args.run), sum(found.workers.values())
  states, known = {row['state'] for row in rows}, runs.recall(tpu.name)['runs']
  if 'bare' in states:
    raise commands.Refused(f'{tpu.name} is not set up: python launch/tpu_vm.py setup {tpu.name}')
  if 'running' in states and args.watch and known.get(args.run, {}).get('words') == words:
    runs.say(f'{tpu.name}: run {args.run} is under way')
    return
  if 'running' in states:
    raise commands.Refused(
      f'run {args.run} is under way on {tpu.name}: look with status, end it with stop')
  if len(rows) < count and not gcloud.dry:
    raise cloud.Trouble(f'{len(rows)} of {count} workers of {tpu.name} answer ({why}): try again')
  place = workdir(words)
  if place.startswith('runs/') and (count > 1 or args.watch):
    raise commands.Refused(
      f'--workdir={place!r} is a folder of each worker\'s own, and goes with the machine: say '
      'gs://BUCKET/..., or the full path of a disk that all workers share')
  job = {'words': words, 'tries': args.tries, 'pause': args.pause, 'workdir': place}
  runs.begin(gcloud, tpu, args.run, job)
  runs.keep(gcloud, tpu, runs=known | {args.run: job})
  runs.say(f'{tpu.name}: run {args.run} is started; look with status and logs', gcloud)


def command(args):
  """The words that `run` starts. Raises Refused."""
  words = args.command
  if args.workdir:
    if workdir(words):
      raise commands.Refused('--workdir stands twice, before and behind --: once is enough')
    words = [*words, f'--workdir={args.workdir}']
  commands.quoted(words)
  place = workdir(words)
  if place and '://' not in place and not place.startswith(('/', 'runs/')):
    raise commands.Refused(
      f'--workdir={place!r} would go with the tree at the next setup: say gs://BUCKET/... or '
      'runs/..., or the full path of a disk that all workers share')
  return words


def workdir(words):
  """The --workdir in a command, '' where there is none."""
  found = ''
  for word, behind in zip(words, [*words[1:], '']):
    if word in ('--workdir', '-workdir'):
      found = behind
    elif word.startswith(('--workdir=', '-workdir=')):
      found = word.partition('=')[2]
  return found


def stop(gcloud, tpu, args):
  record, rows = runs.recall(tpu.name), []
  known = record['runs']
  if commands.name(args.run, '--run') in known:
    runs.keep(gcloud, tpu, runs=known | {args.run: known[args.run] | {'stopped': True}})
    found = cloud.look(gcloud, tpu)
    if found.kind in ('waiting', 'going', 'gone') or found.kind == 'absent' and record['renewing']:
      runs.say(f'{tpu.name}: {found.said}; run {args.run} is not started again')
      return
  ready(gcloud, tpu)
  for node, done in runs.end(gcloud, tpu, args.run, args.grace):
    runs.check(node, done)
    rows += runs.told(node, done)
  runs.show(rows)
  if any(row.get('killed') for row in rows):
    raise cloud.Trouble(f'it did not end within {args.grace:g} s and was killed')


def status(gcloud, tpu, args):
  commands.name(args.run, '--run')
  found = cloud.look(gcloud, tpu)
  about = [tpu.type, 'spot' * tpu.spot, f'{tpu.slices} slices' * (tpu.slices > 1), tpu.zone]
  runs.say(f'{tpu.name}: {found.said} ({", ".join(filter(None, about))})', gcloud)
  if found.kind != 'ready':
    return
  rows, why = runs.survey(gcloud, tpu, args.run)
  runs.show(rows)
  missing = sum(found.workers.values()) - len(rows)
  if missing > 0 and not gcloud.dry:
    runs.say(f'{missing} of {sum(found.workers.values())} workers do not answer: {why}')


# --- copying back ---------------------------------------------------------------------------------


def logs(gcloud, tpu, args):
  log = f'diffax-launch/logs/{commands.name(args.run, "--run")}/log'
  names = cloud.nodes(tpu)
  if args.slice >= len(names):
    raise commands.Refused(f'--slice={args.slice}: they count from 0 to {len(names) - 1}')
  found = ready(gcloud, tpu)
  if args.out:
    out = _new(gcloud, args.out)
    several = [(node, n) for node in names for n in range(found.workers[node])]
    copies = gcloud.each([cloud.scp(tpu, [f'{node}:{log}'], out / f'{node}-{n}.log', n)
                          for node, n in several])
    for (node, _), done in zip(several, copies):
      runs.check(node, done)
    runs.say(f'{len(several)} logs are in {out}', gcloud)
    return
  words = ['tail', '-n', args.lines, *(['-F'] if args.follow else []), log]
  done = gcloud.ask(cloud.ssh(tpu, names[args.slice], words, args.worker), shown=True)
  runs.check(names[args.slice], done)


def results(gcloud, tpu, args):
  if not args.out:
    raise commands.Refused('--out is missing: the folder to copy into')
  job = runs.recall(tpu.name)['runs'].get(args.run, {})
  place = args.workdir or job.get('workdir', '')
  if '://' in place:
    raise commands.Refused(
      f'{place} is no folder of the TPU\'s: '
      f'{commands.quoted(["gcloud", "storage", "cp", "-r", place, args.out])}')
  if not PLACE.fullmatch(place):
    raise commands.Refused(
      f'--workdir={place!r}: say where the run lives, in letters, digits, / . _ and -')
  ready(gcloud, tpu)
  out = _new(gcloud, args.out)
  there = place if place.startswith('/') else f'diffax-launch/{place}'
  node = cloud.nodes(tpu)[0]
  runs.check(node, gcloud.ask(cloud.scp(tpu, [f'{node}:{there}'], out, 0, recurse=True)))
  runs.say(f'{place} is in {out}', gcloud)


def _new(gcloud, out):
  """The folder `out`, made now. Raises Refused where it holds something."""
  out = pathlib.Path(out).absolute()  # of which scp takes nothing for an option or a host
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise commands.Refused(f'--out={out} holds something already: name a new folder')
  if not gcloud.dry:
    out.mkdir(parents=True, exist_ok=True)
  return out


# --- the command line -----------------------------------------------------------------------------


COMMANDS = {'create': create, 'setup': setup, 'run': run, 'status': status, 'logs': logs,
            'results': results, 'stop': stop, 'delete': delete}


def carry_out(args):
  gcloud = cloud.Gcloud(args.dry_run)
  try:
    return COMMANDS[args.what](gcloud, settings(args), args)
  except cloud.Trouble as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print(f'\nwhat was started goes on there; python launch/tpu_vm.py status {args.name} tells, '
          'stop and delete end it', file=sys.stderr)
    return 130


def main(argv=None):
  return commands.told(carry_out, arguments(sys.argv[1:] if argv is None else argv))


if __name__ == '__main__':
  sys.exit(main())
