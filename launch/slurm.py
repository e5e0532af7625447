"""Submits training to Slurm: a job that saves before its time is over, requeues itself and goes on.

  python launch/slurm.py submit --name digits --nodes 2 --gpus-per-node 8 --cpus-per-task 32 \\
    --time 24:00:00 -- python -m diffax.main --config configs/digits.py --workdir runs/digits
  python launch/slurm.py submit --dry-run ...       # prints the job's script, and submits nothing

The command runs on all nodes, as one process a node or one a GPU (`--per gpu`), in the folder it
was submitted from; the workdir, that folder and --folder lie on a disk that the nodes share.

--signal-seconds before the time limit, and when the job is preempted, all processes save and stop,
and the job requeues itself, to go on from that checkpoint by the same command. So it does where a
process was killed by a signal (no memory, a bad device), which ends the others, and where a node
fails: of these, --requeues is how many. It ends where the command has finished; where a status
tells of a mistake of the user's (2) or of trouble that would come again; and by `scancel
--signal=TERM JOB`, which saves first. Slurm waits two minutes each time.

Slurm keeps a job's script and environment, where administrators read them. So the environment goes
along (PATH and all that a site has set), but for variables named like secrets, which are told: put
those into a file that is read where they are needed, as by `--activate FILE`.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import commands

EARLY = 60  # seconds by which Slurm may send a job's signal before it is due
LONGEST = 65535  # seconds, of --signal
# What sbatch reads as it stands: no blank, quote, backslash, '#' or end of a line, nor '%', for
# which it puts something else.
PLAIN = re.compile(r'[\w.,:=@+/&|*()\[\]-]+', re.ASCII)
GPUS = re.compile(r'([A-Za-z][\w.-]*:)?(?P<count>[1-9][0-9]{0,2})', re.ASCII)
OPTION = re.compile(r'[a-z]+(-[a-z]+)*')
OURS = {  # what the script says or relies on, so that no --sbatch may
  'account', 'array', 'chdir', 'constraint', 'cpus-per-task', 'error', 'export', 'export-file',
  'get-user-env', 'gpu-bind', 'gpus-per-node', 'gpus-per-task', 'gres', 'help', 'input', 'job-name',
  'no-kill', 'no-requeue', 'nodes', 'ntasks', 'ntasks-per-gpu', 'ntasks-per-node', 'open-mode',
  'output', 'parsable', 'partition', 'qos', 'requeue', 'signal', 'test-only', 'time', 'tres-bind',
  'tres-per-task', 'version', 'wait', 'wrap'}
OTHERS = {'gpus'}  # whole names of options, though they begin some of those
WHERE = ('partition', 'account', 'qos', 'constraint')
KEPT = ('SLURM_CONF', 'SLURM_CLUSTERS')  # which cluster is meant

# srun's status is the highest of all processes', those among them that it stopped because one had
# failed: the statuses of those that ended by themselves, or were killed, are kept in files. One
# that has no handler yet for the signal by which it is told to stop (143) has nothing to save.
BODY = r"""
task='trap told=yes TERM
  failed=$1.$SLURM_PROCID
  shift
  "$@"
  status=$?
  if [ -n "$told" ] && [ "$status" = 143 ]; then exit 0; fi
  if [ "$status" != 0 ] && { [ -z "$told" ] || [ "$status" = 137 ]; }; then
    echo "$status" > "$failed"
  fi
  exit "$status"'
asked= ended= run= status=0

# Of several processes' statuses the one that tells of all: a mistake (2), else a kill, else an
# error; where one ends, others may abort (134) for its sake.
verdict() {
  local rank=0 best=0 each its
  for each; do
    case $each in 2) its=4 ;; 134) its=1 ;; 129 | 1[3-9]? | 2??) its=3 ;; *) its=2 ;; esac
    if [ "$its" -gt "$rank" ]; then rank=$its best=$each; fi
  done
  echo "$best"
}

patiently() {  # the controller may be busy
  for _ in 1 2 3 4 5; do
    "$@" && return
    sleep "${SLURM_PY_PAUSE:-10}"
  done
  return 1
}

say() { echo "slurm.py: $(date +%FT%T) $*"; }

stop() {
  [ -z "$asked" ] || return  # a second SIGTERM would end a process that is saving
  asked='Slurm wants the nodes back'
  say "$asked: the processes save and stop"
  [ -z "$run" ] || patiently scancel --signal=TERM "$SLURM_JOB_ID"  # the tasks, not this shell
}

# How often it was started again for another reason than that it had stopped in good order.
troubles() { echo $((${SLURM_RESTART_COUNT:-0} - $(cat "$orderly" 2> /dev/null || echo 0))); }

requeue() {
  say "$1; requeued, to go on from its last checkpoint"
  patiently scontrol requeue "$SLURM_JOB_ID"
  exit $?
}

give_up() {
  say "$1; not requeued: --requeues $requeues. The same command goes on from its last checkpoint"
  rm -f "$orderly"
  exit 1
}

trap stop USR1
trap ended=yes TERM  # the tasks are told by Slurm, and their end is waited for
cd "$home" || exit 1
if [ -n "$activate" ]; then . "$activate" || exit 1; fi
unset JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID  # Slurm tells who is who
export PYTHONUNBUFFERED=1

failed="$logs/$SLURM_JOB_NAME-$SLURM_JOB_ID.failed"
orderly="$logs/$SLURM_JOB_NAME-$SLURM_JOB_ID.orderly"
rm -f "$failed".*
[ "$(troubles)" -le "$requeues" ] || give_up "$(troubles) starts ended by trouble"
say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
if [ -z "$asked" ]; then
  srun --kill-on-bad-exit=1 --label ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    bash -c "$task" task "$failed" "${command[@]}" &
  run=$!
  while [ -n "$(jobs -rp)" ]; do wait "$run"; done  # a trap interrupts it
  wait "$run"
  status=$?
  if ls "$failed".* > /dev/null 2>&1; then
    status=$(verdict $(cat "$failed".*))
    rm "$failed".*
  fi
fi

case $(patiently scontrol show job --oneliner "$SLURM_JOB_ID") in
  *' JobState=CANCELLED '*) say "cancelled"; exit "$status" ;;
  *' PreemptTime=2'*) asked=${asked:-preempted} ;;  # the tasks were told by Slurm, and ended well
esac
if [ -n "$asked" ]; then
  echo $(($(cat "$orderly" 2> /dev/null || echo 0) + 1)) > "$orderly"
  requeue "$asked"
fi
if [ -n "$ended" ]; then say 'ended by Slurm'; exit "$status"; fi
if [ "$status" -ge 128 ]; then
  [ "$(troubles)" -lt "$requeues" ] || give_up "a process was killed (status $status)"
  requeue "a process was killed (status $status)"
fi
rm -f "$orderly"
say "the command ended with status $status"
exit "$status"
"""


def parser():
  made = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  made.add_argument('action', choices=('submit',))
  made.add_argument('--name', required=True, help='of the job, its log and its script')
  made.add_argument('--nodes', type=int, default=1)
  made.add_argument('--gpus-per-node', default='none', help='8, a100:8, or none')
  made.add_argument('--per', choices=('node', 'gpu'), default='node', help='what has a process')
  made.add_argument('--cpus-per-task', type=int, help="of each process; else the cluster's default")
  made.add_argument('--time', default='24:00:00', help='[DAYS-]HOURS:MINUTES:SECONDS, or minutes')
  made.add_argument('--partition')
  made.add_argument('--account')
  made.add_argument('--qos')
  made.add_argument('--constraint', help='features of the nodes')
  made.add_argument('--sbatch', action='append', default=[], metavar='NAME[=VALUE]',
                    help='another option of sbatch, as mem=200G or exclusive; may be repeated')
  made.add_argument('--signal-seconds', type=int, default=120,
                    help='before the time limit, to save in')
  made.add_argument('--requeues', type=int, default=20,
                    help='at most, after kills and failed nodes; its time and preemptions are free')
  made.add_argument('--folder', default='runs/slurm', help='of logs and scripts')
  made.add_argument('--activate', help='a virtual environment, or a file for the shell to read')
  made.add_argument('--dry-run', action='store_true', help='print the script alone')
  return made


def arguments(argv):
  """What was said, `command` being the words behind '--'. Raises commands.Refused."""
  cut = argv.index('--') if '--' in argv else len(argv)
  args = parser().parse_args(argv[:cut])
  args.command = argv[cut + 1 :]
  if not args.command:
    raise commands.Refused(
      'say what the nodes run, as -- python -m diffax.main --config ... --workdir ...')
  return args


# --- the script -----------------------------------------------------------------------------------


def script(args):
  """The job's script, whose words stand in variables at its top. Raises commands.Refused."""
  values = dict(
    home=commands.quoted([pathlib.Path.cwd()]),
    logs=commands.quoted([folder(args)]),
    activate=commands.quoted([activation(args.activate)]) if args.activate else '',
    requeues=bounded(args.requeues, '--requeues', 0, 10_000),
    command=f'({commands.quoted(args.command)})',
  )
  return '\n'.join([
    '#!/bin/bash',
    *(f'#SBATCH --{word}' for word in options(args)),
    '',
    *(f'readonly {name}={value}' for name, value in values.items()),
  ]) + '\n' + BODY


def options(args):
  """The words of the script's #SBATCH lines. Raises commands.Refused."""
  commands.name(args.name, '--name')
  gpus = gpus_per_node(args)
  words = [
    f'job-name={args.name}',
    f'output={plain(folder(args), "--folder")}/{args.name}-%j.log',
    f'nodes={bounded(args.nodes, "--nodes", 1, 100_000)}',
    f'ntasks-per-node={gpus if args.per == "gpu" else 1}',
    f'time={args.time}',
    f'signal=B:USR1@{ahead(args)}',
    'requeue', 'open-mode=append', 'export=ALL',
  ]
  if gpus:  # every task sees all of its node's, and jax takes its own: not --gpus-per-task
    words.append(f'gpus-per-node={args.gpus_per_node}')
  if args.cpus_per_task is not None:
    words.append(f'cpus-per-task={bounded(args.cpus_per_task, "--cpus-per-task", 1, 4096)}')
  for name in WHERE:
    if getattr(args, name) is not None:
      words.append(f'{name}={plain(getattr(args, name), "--" + name)}')
  return words + [further(word) for word in args.sbatch]


def further(word):
  """An option of sbatch that the launcher has none for. Raises commands.Refused."""
  name, equals, value = word.partition('=')
  if not OPTION.fullmatch(name):
    raise commands.Refused(f'--sbatch={word!r}: NAME or NAME=VALUE, as mem=200G or exclusive')
  begun = [ours for ours in sorted(OURS) if ours.startswith(name)]  # sbatch takes it for that
  if begun and name not in OTHERS:
    raise commands.Refused(f'--sbatch={name}: the launcher says {begun[0]} or relies on it; see '
                           '--help')
  commands.refuse_secrets([word])
  return f'{name}={plain(value, f"--sbatch={name}")}' if equals else name


def folder(args):
  return pathlib.Path.cwd() / args.folder


def activation(path):
  """The file to read for `path`, a virtual environment or a file. Raises commands.Refused."""
  found = pathlib.Path.cwd() / path
  found = found / 'bin' / 'activate' if found.is_dir() else found
  if not found.is_file():
    raise commands.Refused(f'--activate={path}: there is no {found}; name a virtual environment, '
                           'or a file for the shell to read')
  return found


def gpus_per_node(args):
  """How many a node has. Raises commands.Refused."""
  found = GPUS.fullmatch(args.gpus_per_node)
  if not found and args.gpus_per_node != 'none':
    raise commands.Refused(f'--gpus-per-node={args.gpus_per_node!r}: write 8, a100:8 or none')
  if not found and args.per == 'gpu':
    raise commands.Refused('--per gpu: say how many a node has, as --gpus-per-node 8')
  return int(found['count']) if found else 0


def bounded(number, what, least, most):
  if not least <= number <= most:
    raise commands.Refused(f'{what}={number}: {least} to {most}')
  return number


def plain(text, what):
  """`text`, where sbatch reads it as it stands. Raises commands.Refused."""
  if not PLAIN.fullmatch(str(text)):
    raise commands.Refused(f'{what}={str(text)!r}: letters, digits and the signs '
                           '. , : = @ + / & | * ( ) [ ] _ - alone, for sbatch reads others its way')
  return text


def ahead(args):
  """--signal-seconds, where --time leaves some before it. Raises commands.Refused."""
  bounded(args.signal_seconds, '--signal-seconds', 1, LONGEST)
  if duration(args.time) <= args.signal_seconds + EARLY:
    raise commands.Refused(
      f'--time={args.time} with --signal-seconds={args.signal_seconds}: nothing is left to train '
      f'in, for Slurm may send the signal {EARLY} s early; say more time')
  return args.signal_seconds


def duration(text):
  """Seconds of a time of Slurm's: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises commands.Refused."""
  days, dash, rest = text.rpartition('-')
  parts = rest.split(':')
  digits = all(re.fullmatch('[0-9]{1,6}', part) for part in (parts + [days] if dash else parts))
  if not digits or len(parts) > 3:
    raise commands.Refused(
      f'--time={text!r}: minutes, hours as 24:00:00, or days as 2-12:00:00')
  parts = [int(part) for part in parts]
  if dash or len(parts) == 3:
    hours, minutes, seconds = [*parts, 0, 0][:3]
  else:
    hours, (minutes, seconds) = 0, [*parts, 0][:2]
  return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


# --- its submission -------------------------------------------------------------------------------


def environment(env, args):
  """(what of `env` goes along with the job, names of the secrets that do not): by their names, or
  for a password in an address or a token's form.

  Nor do a job's variables, where this one is submitted from another, nor those that sbatch would
  believe more than the script; a default that the script leaves open, as $SBATCH_ACCOUNT, holds.
  """
  secrets = sorted(name for name, value in env.items() if commands.secret(name, value))
  kept = [*KEPT, *(f'SBATCH_{name.upper()}' for name in WHERE if getattr(args, name) is None)]
  left = [name for name in env if name.startswith(('SLURM_', 'SBATCH_')) and name not in kept]
  return {name: env[name] for name in env if name not in {*secrets, *left}}, secrets


def submit(args):
  """Submits the job, its script kept beside its log. Raises commands.Refused."""
  text = script(args)
  if args.dry_run:
    print(text, end='')
    return
  kept, secrets = environment(os.environ, args)
  try:
    folder(args).mkdir(parents=True, exist_ok=True)  # where there is none, Slurm ends jobs unheard
    with tempfile.NamedTemporaryFile(
      'w', dir=folder(args), prefix=f'{args.name}-', suffix='.sbatch', delete=False
    ) as file:
      file.write(text)
  except OSError as error:
    raise commands.Refused(
      f'--folder={args.folder} cannot be written ({error.strerror}); choose another') from error
  draft = pathlib.Path(file.name)
  try:
    job = accepted(draft, kept)
  except commands.Refused:
    draft.unlink()
    raise
  path = draft.rename(folder(args) / f'{args.name}-{job}.sbatch')
  for name in secrets:
    print(f'{name} looks like a secret and stays out of the job: Slurm would keep it')
  print(f'job {job}: {path}\nits log: {path.with_suffix(".log")}\n'
        f'to stop it, saving first: scancel --signal=TERM {job}; while it waits: scancel {job}')


def accepted(path, env):
  """The number of the job that sbatch makes of a script. Raises commands.Refused."""
  try:
    done = subprocess.run(['sbatch', '--parsable', str(path)], env=env, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL)
  except FileNotFoundError as error:
    raise commands.Refused(
      'there is no sbatch on PATH: submit where Slurm is, as from a login node') from error
  said = ' '.join(done.stderr.split())
  if done.returncode:
    raise commands.Refused(f'sbatch refused the job (status {done.returncode}): {said}')
  if said:
    print(said, file=sys.stderr)
  return done.stdout.split()[-1].partition(';')[0]


def main(argv=None):
  return commands.told(lambda: submit(arguments(sys.argv[1:] if argv is None else argv)))


if __name__ == '__main__':
  sys.exit(main())
