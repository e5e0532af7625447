"""A sweep: one run for each combination of overrides, and a table of what they came to.

  python launch/sweep.py --workdir runs/sweep --grid config.learning_rate.peak_value=1e-4,3e-4 \\
    --grid config.seed=0,1 --jobs 2 --metric loss -- \\
    python -m diffax.main --config configs/digits.py
  python launch/sweep.py --workdir runs/sweep --list overrides.txt -- python -m diffax.main ...
  python launch/sweep.py --workdir /shared/sweep --grid config.seed=0,1 \\
    --via slurm --nodes 2 -- python -m diffax.main --config configs/digits.py
  python launch/sweep.py --workdir runs/sweep --table --metric quality.frechet

The values of a --grid are parted by commas outside of quotes and brackets; quotes around a whole
value are taken off: `--grid "config.ema=(0.99, 0.999),('power_0.05',)"` are two values, and so are
`--grid "config.sample.prompts='red, round',blue"`. Several grids are all combinations. A --list has
a line of overrides a run, quoted as in a shell; `#` begins a comment.

All configs are checked before anything starts. Each run has a workdir of its own, named by its
overrides, in --workdir, and a log beside it; `sweep.json` keeps which there are, `table.md` the
table. What is finished is not started again; what is not goes on where it stopped.

  --via local    here, --jobs at a time; a run that fails is told, and the others go on
  --via slurm    by `launch/slurm.py submit`, all at once
  --via k8s      by `launch/k8s.py submit`, all at once; --workdir is a bucket or in a --claim
  --via tpu_vm   by `launch/tpu_vm.py run --watch`, one after the other, for a TPU takes one run at
                 a time; its name stands first: --via tpu_vm my-tpu -- python ...

What stands between `--via X` and `--` is for that launcher. Slurm and Kubernetes take runs in and
carry them out later: `--table` tells how they are, of what lies in --workdir as this machine sees
it. A run that was handed over is not handed over again, unless --again says so (its job must have
ended: two at once would spoil its workdir); one that is under way on a TPU VM is watched again.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

from etils import epath

import commands
from commands import Refused
from diffax import log

VIA = {'slurm': 'submit', 'k8s': 'submit', 'tpu_vm': 'run'}  # the launcher's verb
KEY = re.compile(r'config(\.\w+)+', re.ASCII)
PLAIN = re.compile(r'[A-Za-z0-9._+-]+')  # values that a workdir's name holds as they are
LONGEST = 100  # characters of a workdir's name
CLOSES = {'(': ')', '[': ']', '{': '}'}


class Run(NamedTuple):
  """overrides: {'config.seed': '0', ...}, by key. workdir: path of the run's own."""

  name: str
  overrides: dict
  workdir: epath.Path

  def words(self):
    """What its command ends with."""
    return ['--workdir', str(self.workdir), *(f'--{k}={v}' for k, v in self.overrides.items())]


# --- what is asked for ----------------------------------------------------------------------------


def arguments(argv):
  """The options; `command` is behind the first `--`, `launcher` between `--via X` and it."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
  add = parser.add_argument
  add('--workdir', required=True, help='folder or bucket of the sweep')
  add('--grid', action='append', default=[], metavar='config.KEY=VALUE,VALUE')
  add('--list', metavar='FILE', help='a line of overrides a run')
  add('--jobs', type=int, default=1, help='local: runs at a time')
  add('--metric', nargs='+', default=[], help='columns of the table, sorted by the first')
  add('--highest', action='store_true', help='the highest first, not the lowest')
  add('--table', action='store_true', help='show the table, start nothing')
  add('--again', action='store_true', help='hand over again what was, and is not finished')
  add('--via', choices=('local', *VIA), default='local', help='what follows is for the launcher')
  at = argv.index('--') if '--' in argv else len(argv)
  argv, command = [w for word in argv[:at] for w in _parted(word)], argv[at + 1 :]
  end = argv.index('--via') + 2 if '--via' in argv else len(argv)
  if argv[end - 1 : end] == ['local']:
    end = len(argv)
  args = parser.parse_args(argv[:end])
  args.launcher, args.command = argv[end:], command
  return args


def _parted(word):
  """`--via=X` as two words, for what stands behind it is not ours."""
  return word.split('=', 1) if word.startswith('--via=') else [word]


def values(text):
  """['a', '(1, 2)'] of "a,(1, 2)": parted by commas outside of quotes and brackets.

  Quotes around a whole value are taken off. Raises Refused.
  """
  parts, closing, quote = [''], [], ''
  for c in text:
    if quote:
      quote = '' if c == quote else quote
    elif c in '\'"':
      quote = c
    elif c in CLOSES:
      closing.append(CLOSES[c])
    elif c in CLOSES.values():
      if not closing or closing.pop() != c:
        raise Refused(f'{text!r}: {c!r} closes what was not opened; write such a value in quotes')
    elif c == ',' and not closing:
      parts.append('')
      continue
    parts[-1] += c
  if quote or closing:
    raise Refused(f'{text!r}: {quote or closing[-1]!r} is missing at its end; a value that has one '
                  'alone stands in quotes of the other kind')
  return [_bare(part.strip(), text) for part in parts]


def _bare(part, text):
  if not part:
    raise Refused(f'{text!r}: an empty value; write it as \'\'')
  quoted = len(part) > 1 and part[0] in '\'"' and part.find(part[0], 1) == len(part) - 1
  return part[1:-1] if quoted else part


def override(word):
  """(key, rest) of `config.KEY=...`, with or without its dashes. Raises Refused."""
  key, equals, rest = word.removeprefix('--').partition('=')
  if not equals or not KEY.fullmatch(key):
    raise Refused(f'{word!r}: write config.KEY=VALUE, as config.learning_rate.peak_value=1e-4')
  return key, rest


def combinations(grids):
  """The overrides of each run of a grid."""
  axes = {}
  for word in grids:
    key, rest = override(word)
    if key in axes:
      raise Refused(f'--grid {key} is given twice: write its values in one')
    axes[key] = values(rest)
  return [dict(zip(axes, chosen)) for chosen in itertools.product(*axes.values())]


def listed(file):
  """The overrides of each run of a list."""
  try:
    lines = epath.Path(file).read_text().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise Refused(f'--list={file}: no text file ({error})') from error
  found = []
  for number, line in enumerate(lines, 1):
    try:
      pairs = [override(word) for word in shlex.split(line, comments=True)]
    except (ValueError, Refused) as error:
      raise Refused(f'{file}, line {number}: {error}') from error
    if len(dict(pairs)) < len(pairs):
      raise Refused(f'{file}, line {number}: a key is given twice')
    found += [dict(pairs)] if pairs else []
  return found


def runs(args):
  """The runs of --grid or --list. Raises Refused."""
  if bool(args.grid) == bool(args.list):
    raise Refused('say which runs by --grid config.KEY=VALUE,VALUE or --list FILE, one of them')
  asked = combinations(args.grid) if args.grid else listed(args.list)
  if not asked:
    raise Refused(f'--list={args.list} holds no run: write a line of overrides for each')
  root, found = epath.Path(args.workdir), {}
  for overrides in asked:
    overrides = dict(sorted(overrides.items()))
    name = named(overrides)
    if name in found:
      raise Refused(f'two runs have the same overrides, {name}: leave one out')
    found[name] = Run(name, overrides, root / name)
  return list(found.values())


def named(overrides):
  """A run's name, of its overrides alone, so that it is found again when the sweep has grown.

  Letters, digits and `._=,+-`, at most LONGEST; where that does not hold all there is, a part of
  a hash ends it.
  """
  text = ','.join(f'{key.removeprefix("config.")}={value}' for key, value in overrides.items())
  if len(text) <= LONGEST and all(map(PLAIN.fullmatch, overrides.values())):
    return text
  digest = _digest(json.dumps(overrides))
  return re.sub(r'[^A-Za-z0-9._=,+-]+', '-', text)[: LONGEST - len(digest) - 1] + '-' + digest


def _digest(text):
  return hashlib.sha256(text.encode()).hexdigest()[:8]


# --- checking -------------------------------------------------------------------------------------


def check(args, asked):
  """The complete config of each run, checked as its command will. Raises Refused."""
  from diffax import main
  from diffax.build import ConfigError

  command = args.command
  places = [i for i, word in enumerate(command) if word == 'diffax.main']
  if not places:
    raise Refused('the command must run diffax.main, as -- python -m diffax.main --config FILE')
  rest = command[places[-1] + 1 :]
  found = []
  for run in asked:
    commands.quoted([*command, *run.words()])  # for what it refuses
  commands.refuse_secrets(_told(args.launcher))
  for run in asked:
    try:
      flags, overrides = main.parse(['diffax', *rest, *run.words()])
      if flags.mode != 'train' or any(w.split('=')[0].lstrip('-') == 'workdir' for w in rest):
        raise ConfigError('a sweep trains, each run in a workdir of its own: leave out --mode and '
                          'the command\'s --workdir')
      found.append(main.resolve(flags, overrides, run.workdir))
    except ConfigError as error:
      raise Refused(f'run {run.name}: {error}') from error
  return found


def _told(words):
  """A launcher's options without what follows --secret, the name of one that is kept elsewhere."""
  return [word for before, word in zip(['', *words], words)
          if before != '--secret' and not word.startswith('--secret=')]


# --- what there is --------------------------------------------------------------------------------


def state(workdir, config=None):
  """(step, steps, finished) of a run; config: the one it shall have, else that of its workdir."""
  if config is None:
    config = _json(workdir / 'config.json')
  if not config:
    return 0, 0, False
  rows = log.read_metrics(workdir / 'metrics.jsonl')
  steps, folder = config['steps'], workdir / 'checkpoints'
  saved = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
  done = {r['eval'] for r in log.read_metrics(workdir / 'evals.jsonl') if r['step'] == steps}
  due = {name for name, spec in config['evals'].items() if spec.get('every')}
  step = max([row['step'] for row in rows] + saved, default=0)
  return step, steps, steps in saved and due <= done


def numbers(workdir):
  """{metric: value} of the last row of metrics.jsonl, and of each evaluation's in evals.jsonl."""
  rows = log.read_metrics(workdir / 'metrics.jsonl')
  found = {k: v for k, v in rows[-1].items() if k not in ('step', *log.SPEED)} if rows else {}
  for row in log.read_metrics(workdir / 'evals.jsonl'):
    found |= {f'{row["eval"]}.{k}': v for k, v in row.items() if k not in ('step', 'eval')}
  return {k: v for k, v in found.items() if isinstance(v, (int, float))}


def _json(path):
  """What a JSON file holds, {} where there is none. Raises Refused where it is damaged."""
  try:
    return json.loads(path.read_text()) if path.exists() else {}
  except ValueError as error:
    raise Refused(f'{path} is not readable JSON ({error})') from error


def _write(path, text):
  """Writes a file whole or not at all."""
  scratch = path.parent / (path.name + '.new')
  scratch.write_text(text)
  scratch.replace(path)


def known(root):
  """The runs that the sweep in `root` has had so far."""
  held = _json(root / 'sweep.json')
  return [Run(name, overrides, root / name) for name, overrides in held.get('runs', {}).items()]


def record(root, asked):
  """Adds runs to those that the sweep keeps. Raises Refused where it cannot be written."""
  try:
    root.mkdir(parents=True, exist_ok=True)
    kept = {run.name: run.overrides for run in [*known(root), *asked]}
    _write(root / 'sweep.json', json.dumps({'runs': kept}, indent=2) + '\n')
  except OSError as error:
    raise Refused(f'--workdir={root} cannot be written ({error.strerror or error}); choose '
                  'another') from error


# --- the table ------------------------------------------------------------------------------------


def table(asked, metrics=(), highest=False):
  """(lines of a markdown table of the runs, the names of all metrics there are).

  metrics: those to show, all where none is named; sorted by the first that is, runs without it
  last.
  """
  found = {run.name: numbers(run.workdir) for run in asked}
  names = sorted({name for each in found.values() for name in each})
  if metrics:
    asked = sorted(asked, key=lambda run: _rank(found[run.name].get(metrics[0]), highest))
  keys, shown = sorted({key for run in asked for key in run.overrides}), list(metrics or names)
  rows = [[key.removeprefix('config.') for key in keys] + ['state', *shown]]
  for run in asked:
    step, steps, finished = state(run.workdir)
    how = 'finished' if finished else f'step {step} of {steps}' if steps else 'not begun'
    cells = [run.overrides.get(key, '') for key in keys]
    rows.append(cells + [how] + [_number(found[run.name].get(name)) for name in shown])
  rows = [[cell.replace('\\', '\\\\').replace('|', '\\|') for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows)]
  rows.insert(1, ['-' * width for width in widths])
  lines = ['| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths)) + ' |' for row in rows]
  return lines, names


def _rank(value, highest):
  """What to sort a run by: those without a number last."""
  if value is None or value != value:
    return (1, 0.0)
  return (0, -value if highest else value)


def _number(value):
  return '' if value is None else f'{value:.6g}'


def show(args, asked):
  """Prints the table and keeps it as table.md; what to say of a metric that no run has."""
  lines, names = table(asked, args.metric, args.highest)
  print('\n'.join(lines), flush=True)
  try:
    _write(epath.Path(args.workdir) / 'table.md', '\n'.join(lines) + '\n')
  except OSError as error:  # a look at another's sweep
    print(f'note: table.md is not written ({error.strerror or error})', file=sys.stderr)
  missing = [name for name in args.metric if name not in names]
  if names and missing:
    return f'--metric {missing[0]}: no run has it; there are {", ".join(names)}'
  return ''


# --- here -----------------------------------------------------------------------------------------


class Stop:
  """Passes SIGTERM and Ctrl-C on to the runs of this machine; `number` is the last, 0 for none."""

  def __init__(self):
    self.number, self.running = 0, {}  # {process: (run, where in its log it begins)}
    numbers = (signal.SIGTERM, signal.SIGINT)
    self._before = {number: signal.signal(number, self._note) for number in numbers}

  def _note(self, number, frame):
    del frame
    self.number = number
    for process in self.running:
      self.send(process)

  def send(self, process):
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, self.number)

  def restore(self):
    for number, handler in self._before.items():
      signal.signal(number, handler)


def start(command, run, lock):
  """The process of a run, and where in its log it begins. lock: a file it holds open."""
  path = _log(run)
  begin = path.stat().st_size if path.exists() else 0
  with open(path, 'a') as file:
    process = subprocess.Popen(
      [*command, *run.words()],
      env=os.environ | {'PYTHONUNBUFFERED': '1'},
      stdin=subprocess.DEVNULL,
      stdout=file,
      stderr=subprocess.STDOUT,
      pass_fds=[lock.fileno()],
      start_new_session=True,  # a Ctrl-C reaches them through us alone, once
    )
  return process, begin


def _log(run):
  return pathlib.Path(f'{run.workdir}.log')


def ended(run, status, begin, finished):
  """Says how a run ended; whether it is finished."""
  with open(_log(run), 'rb') as file:
    file.seek(max(begin, file.seek(0, os.SEEK_END) - 65536))
    said = [line.strip() for line in file.read().decode(errors='replace').splitlines()]
  last = next((line for line in reversed(said) if line), 'it said nothing')
  if status:
    how = f'signal {signal.Signals(-status).name}' if status < 0 else f'status {status}'
    print(f'FAILED   {run.name}: {how}: {last} ({_log(run)})', flush=True)
  elif finished:
    print(f'finished {run.name}', flush=True)
  else:
    print(f'stopped  {run.name}: {last}', flush=True)
  return finished and not status


def locally(args, todo, configs):
  """Carries out runs, --jobs at a time; the exit status."""
  said = (f'another sweep, or what one has started, is at work in {args.workdir}: wait for it, or '
          'stop it')
  with commands.alone(epath.Path(args.workdir) / 'sweep.lock', said) as lock:  # runs hold it, too
    stop, waiting = Stop(), list(todo)
    try:
      bad = _carry_out(args, waiting, configs, stop, lock)
    finally:
      stop.restore()
  if stop.number:
    print(f'{signal.Signals(stop.number).name}: {len(waiting)} runs were not begun; the same '
          'command goes on from here', flush=True)
    return 128 + stop.number
  return int(bool(bad))


def _carry_out(args, waiting, configs, stop, lock):
  """Starts what waits until a signal comes, and sees all to their end; how many did not finish."""
  bad = 0
  while stop.running or (waiting and not stop.number):
    while waiting and len(stop.running) < args.jobs and not stop.number:
      run = waiting.pop(0)
      print(f'starting {run.name}', flush=True)
      process, begin = start(args.command, run, lock)
      stop.running[process] = run, begin
      if stop.number:  # it came while the process was not yet known
        stop.send(process)
    for process in [p for p in stop.running if p.poll() is not None]:
      run, begin = stop.running.pop(process)
      finished = state(run.workdir, configs[run.name])[2]
      bad += not ended(run, process.returncode, begin, finished)
    time.sleep(0.1)
  return bad


# --- through other launchers ----------------------------------------------------------------------


def job(args, run):
  """The words by which a launcher takes a run."""
  base = re.sub(r'[^a-z0-9]+', '-', epath.Path(args.workdir).name.lower()).strip('-')[:24]
  name = f'{base if base[:1].isalpha() else "sweep"}-{_digest(str(run.workdir))}'
  if args.via == 'tpu_vm':  # its words say which TPU; it stays until the run has ended
    options = [*args.launcher, '--run', name, '--watch']
  else:
    options = ['--name', name, *args.launcher]
  program = pathlib.Path(__file__).with_name(f'{args.via}.py')
  words = [sys.executable, str(program), VIA[args.via], *options, '--', *args.command]
  return [*words, *run.words()]


def through(args, todo):
  """Hands runs to a launcher, one after the other; 1 where it did not take one."""
  bad = 0
  for run in todo:
    mark = run.workdir.parent / f'{run.name}.submitted'
    if mark.exists() and not args.again and args.via != 'tpu_vm':
      print(f'{run.name}: handed over {mark.read_text().strip()}; --again does so again')
      continue
    print(f'{run.name}: {shlex.join(job(args, run)[1:])}', flush=True)
    status = subprocess.run(job(args, run), stdin=subprocess.DEVNULL).returncode
    if status:
      print(f'FAILED   {run.name}: {args.via}.py ended with status {status}', flush=True)
    elif args.via != 'tpu_vm':
      mark.write_text(time.strftime('at %Y-%m-%d %H:%M:%S\n'))
    bad += bool(status)
  return int(bool(bad))


def sweep(args):
  """Starts what is not finished, and shows the table; the exit status."""
  root = epath.Path(args.workdir)
  commands.one_line(args.workdir, '--workdir')
  if args.table:
    found = runs(args) if args.grid or args.list else known(root)
    if not root.exists() or not found:
      raise Refused(f'--workdir={root} holds no sweep')
    wrong = show(args, found)
    if wrong:
      raise Refused(wrong)
    return 0
  asked = runs(args)
  _fits(args)
  configs = {run.name: config for run, config in zip(asked, check(args, asked))}
  record(root, asked)
  todo = [run for run in asked if not state(run.workdir, configs[run.name])[2]]
  print(f'{len(asked)} runs in {root}, {len(asked) - len(todo)} finished before', flush=True)
  status = locally(args, todo, configs) if args.via == 'local' else through(args, todo)
  wrong = show(args, asked)
  if wrong:
    print(f'note: {wrong}', file=sys.stderr)
  return status


def _fits(args):
  """Raises Refused where options do not go together."""
  name = any(word.split('=')[0] in ('--name', '--run') for word in args.launcher)
  if args.jobs < 1:
    raise Refused(f'--jobs={args.jobs}: 1 and more')
  if args.via == 'local' and '://' in args.workdir:
    raise Refused(f'--workdir={args.workdir}: a sweep on this machine writes logs; name a folder')
  if args.via == 'local' and args.command and not shutil.which(args.command[0]):
    raise Refused(f'{args.command[0]!r} is no program that can be started')
  if args.via == 'tpu_vm' and '://' not in args.workdir and not args.workdir.startswith('/'):
    raise Refused(f'--workdir={args.workdir} would go with the TPU: name a bucket, gs://..., or '
                  'the full path of a disk that its workers and this machine share')
  if args.via == 'tpu_vm' and not args.launcher:
    raise Refused('--via tpu_vm: say behind it which TPU, as --via tpu_vm my-tpu --')
  if name:
    raise Refused(f'--via {args.via}: leave out --name and --run, each run has one of its own')


def main(argv=None):
  args = arguments(sys.argv[1:] if argv is None else argv)
  try:
    return commands.told(sweep, args)
  except KeyboardInterrupt:  # while another launcher was at work, which heard it as well
    return 128 + signal.SIGINT


if __name__ == '__main__':
  sys.exit(main())
