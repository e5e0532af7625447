"""Training and sampling, 50 steps with guidance, beside PyTorch eager and compiled, in one run.

  python experiments/throughput/table.py --out h200.json           # what the platform is for
  python experiments/throughput/table.py --models XL/2 --what train --batch 64 --out xl2.json
  python experiments/throughput/table.py --merge h200.json xl2.json --out all.json
  python experiments/throughput/table.py --smoke                   # a minute: does it work here?

On a GPU: DiT-S/2, B/2, L/2 and XL/2 at latents of 256 pixels and the U-Net of
configs/cifar10_edm.py, in bfloat16. On a CPU: DiT-S/4 and the small U-Net of its variant `cpu`, in
float32. `theirs.py` says what PyTorch's side is.

Every measurement has a process of its own, on one device; the sides take turns, --repeats times.
What fails is told in its row. FILE.json has all figures, FILE.md the table, with the goals; both
are written anew after every measurement. Images/s are the median (range) over windows of all
turns; `diffax over it` that over turns; MFU the model's FLOPs, by shapes, over the product of two
matrices that jax timed in the same processes; compile: the first call less a usual one, nothing
being cached. Any value of diffax's config is set by --config.PATH=VALUE.

PyTorch is optional (`pip install torch`), and may live elsewhere: --torch-python, or DIFFAX_TORCH.
Without it our side is measured alone.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import time

import cases
import report

from diffax.build import ConfigError

HERE = pathlib.Path(__file__).resolve().parent
ROWS = {'cpu': 2048}  # of the matrices, by platform
LARGE_ROWS = 8192
SMOKE = dict(batch=4, repeats=1, seconds=0.1)
TOLD = ('XLA_FLAGS', 'GLIBC_TUNABLES', 'PYTORCH_CUDA_ALLOC_CONF')  # of the environment
TROUBLE = ('Error', 'Exception', 'RESOURCE_EXHAUSTED', 'the result is')


# --- the command line -----------------------------------------------------------------------------


def arguments(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add('--models', nargs='+', metavar='MODEL', help=f'of {", ".join(cases.MODELS)}')
  add('--what', nargs='+', choices=cases.WHATS, default=cases.WHATS)
  add('--sides', nargs='+', choices=report.SIDES, help='all, where torch is there')
  add('--batch', type=int, help="of either; by itself the model's own, see cases.py")
  add('--repeats', type=int, default=3, help='turns')
  add('--seconds', type=float, default=10.0, help='timed in each process')
  add('--limit', type=float, default=900.0, help='seconds after which a process is ended')
  add('--minutes', type=float, default=float('inf'), help='after which nothing new is started')
  add('--platform', choices=('cpu', 'gpu'), help='by itself a GPU where jax sees one')
  add('--dtype', choices=('bfloat16', 'float32'), help='of a GPU bfloat16, of a CPU float32')
  add('--threads', type=int, default=0, help='of a CPU; 0 for all processors')
  python = os.environ.get('DIFFAX_TORCH') or sys.executable
  add('--torch-python', default=python, help='the python that has torch')
  add('--smoke', action='store_true', help='tiny models, once')
  add('--out', help='FILE.json, which must not be there yet, and FILE.md beside it')
  add('--merge', nargs='+', metavar='FILE', help='result files to make one table of')
  args, args.overrides = parser.parse_known_args(argv)
  if args.smoke:
    args.models = args.models or list(cases.SMOKE)
    changed = {k: v for k, v in SMOKE.items() if getattr(args, k) == parser.get_default(k)}
    vars(args).update(changed)
  check(args)
  return args


def check(args):
  """Raises ConfigError for what cannot be done."""
  wrong = [a for a in args.overrides if not a.startswith('--config.')]
  if wrong:
    raise ConfigError(f'what is {wrong[0]!r}? see --help')
  for model in args.models or ():
    if model not in cases.MODELS:
      raise ConfigError(f'--models={model}: none of {", ".join(cases.MODELS)}')
  for name in ('batch', 'repeats', 'seconds', 'limit', 'minutes'):
    value = getattr(args, name)
    if value is not None and not value > 0:
      raise ConfigError(f'--{name}={value} must be positive')
  there = len(os.sched_getaffinity(0))
  if not 0 <= args.threads <= there:
    raise ConfigError(f'--threads={args.threads}: 0 to {there}, the processors there are')
  if args.out:
    out = pathlib.Path(args.out)
    if out.suffix != '.json':
      raise ConfigError(f'--out={out}: a name that ends in .json is needed')
    for path in (out, out.with_suffix('.md')):
      if path.exists():
        raise ConfigError(f'--out={out}: {path} is there already; name another, then --merge both')
    out.parent.mkdir(parents=True, exist_ok=True)


def sides(args):
  """Those to measure. Raises ConfigError where one is asked for that is not there."""
  find = 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
  remedy = 'pip install torch there, or name another python: --torch-python, or DIFFAX_TORCH'
  wanted = args.sides or report.SIDES
  if wanted == ['diffax']:
    return wanted
  try:
    lacks = subprocess.run([args.torch_python, '-c', find]).returncode
  except OSError as error:
    raise ConfigError(f'--torch-python={args.torch_python}: {error.strerror}; {remedy}') from error
  if not lacks:
    return wanted
  if args.sides:
    raise ConfigError(f'--sides={args.sides}: {args.torch_python} has no torch; {remedy}')
  print(f'PyTorch is not installed, so diffax is measured alone; {remedy}')
  return ['diffax']


# --- processes ------------------------------------------------------------------------------------


def environment(args, caches):
  """Of the processes. caches: a new folder, so that compiling is timed once and then spared."""
  made = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(caches / 'jax'),
    'JAX_ENABLE_COMPILATION_CACHE': 'true',
    'TORCHINDUCTOR_CACHE_DIR': str(caches / 'torch'),
    'TRITON_CACHE_DIR': str(caches / 'triton'),
  }
  made.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.92')  # there is no other process
  if args.platform == 'cpu':
    made |= {'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': ''}
  if args.threads:
    made |= {name: str(args.threads) for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
  return made


def ask(args, job, config, caches):
  """What a process of side.py answers, or {'error': why not}."""
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / 'job.json').write_text(json.dumps(job))
    (folder / 'config.json').write_text(json.dumps(config))
    python = sys.executable if job['side'] == 'diffax' else args.torch_python
    with open(folder / 'log', 'w') as log:
      process = subprocess.Popen(
        [python, str(HERE / 'side.py'), str(folder)], stdin=subprocess.DEVNULL, stdout=log,
        stderr=log, env=environment(args, caches), start_new_session=True,
      )
      try:
        status = process.wait(args.limit)
      except subprocess.TimeoutExpired:
        status = f'ended after --limit={args.limit:g} seconds'
      finally:
        if process.poll() is None:
          os.killpg(process.pid, signal.SIGKILL)  # and what compiles for it
          process.wait()
    answer = folder / 'answer.json'
    if status == 0 and answer.exists():
      return json.loads(answer.read_text())
    return {'error': why(status, (folder / 'log').read_text(errors='replace'))}


def why(status, log):
  """One line on what a process ended with."""
  if isinstance(status, str):
    return status
  if status < 0:
    name = signal.Signals(-status).name
    return f'ended by {name}' + (', as where memory runs out' if name == 'SIGKILL' else '')
  lines = [line.strip() for line in log.splitlines() if line.strip()]
  said = [line for line in lines if any(word in line for word in TROUBLE)] or lines or ['silently']
  return ' '.join(said[-1].split())[:200].replace('|', '/')


# --- the measurements -----------------------------------------------------------------------------


def probe(args, names, caches):
  """{side: {'platform', 'device', version}} of diffax and torch. Raises ConfigError."""
  told = {}
  for side in [name for name in ('diffax', 'torch') if any(n.startswith(name) for n in names)]:
    job = {'side': side, 'what': 'describe', 'threads': args.threads}
    told[side] = ask(args, job, {}, caches)
    if 'error' in told[side]:
      raise ConfigError(f'{side} does not start here: {told[side]["error"]}')
  found = {side: said['platform'] for side, said in told.items()}
  if len(set(found.values())) > 1:
    raise ConfigError(
      f'the sides see different devices ({found}): install both for the same, or say --platform cpu'
    )
  if args.platform and args.platform not in found.values():
    raise ConfigError(f'--platform={args.platform}: what is seen here is {found}')
  return told


def header(args, argv, told):
  """What a run says beside its rows."""
  first = next(iter(told.values()))
  cpu = first['platform'] == 'cpu'
  versions = {lib: said[lib] for said in told.values() for lib in ('jax', 'torch') if lib in said}
  own = args.torch_python == sys.executable
  given = argv if own else [word.replace(args.torch_python, 'PYTHON') for word in argv]
  return {
    'command': ' '.join(['python experiments/throughput/table.py', *given]),
    'started': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'platform': first['platform'],
    'device': processor() if cpu else first['device'],
    'machine': f'{len(os.sched_getaffinity(0))} processors, {processor()}',
    'versions': ', '.join([*(f'{k} {v}' for k, v in versions.items()),
                           f'python {platform.python_version()}']),
    'dtype': args.dtype or ('float32' if cpu else 'bfloat16'),
    'threads': args.threads or len(os.sched_getaffinity(0)),
    'environment': ' '.join(f'{k}={os.environ[k]}' for k in TOLD if os.environ.get(k)),
    'load': os.getloadavg()[0],
  }


def processor():
  lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  return next((line.split(': ')[1] for line in lines if line.startswith('model name')), 'cpu')


def planned(args, head, names):
  """[(job, config)] in the order of measuring. Raises ConfigError for what a config cannot be."""
  jobs = []
  for model in args.models or cases.models(head['platform']):
    for what in args.what:
      count = args.batch or cases.batch(model, what, head['platform'])
      config = cases.config(model, count, head['dtype'], args.overrides)
      if config['batch_size'] != count:
        raise ConfigError('--config.batch_size: say --batch')
      job = {
        'model': model, 'what': what, 'batch_size': count, 'dtype': head['dtype'],
        'threads': args.threads, 'seconds': args.seconds, 'spec': cases.spec(config),
        'rows': 256 if args.smoke else ROWS.get(head['platform'], LARGE_ROWS),
      }
      for repeat in range(args.repeats):
        order = names if repeat % 2 == 0 else names[::-1]  # none always follows the same other
        jobs += [(job | {'side': side, 'repeat': repeat}, config) for side in order]
  return jobs


def row(job, said):
  """A row of the table's file."""
  kept = ('model', 'what', 'side', 'repeat')
  return {name: job[name] for name in kept} | {
    'batch': job['batch_size'], 'product_rows': job['rows'], 'cold': not job['repeat'],
    **{name: value for name, value in said.items() if name not in ('platform', 'device')},
  }


def measure(args, argv):
  """Measures all that is planned. Returns the run; a failure is in its row."""
  names, start = list(sides(args)), time.monotonic()
  with tempfile.TemporaryDirectory() as caches:
    caches = pathlib.Path(caches)
    head = header(args, argv, probe(args, names, caches))
    run, jobs = head | {'rows': []}, planned(args, head, names)
    for number, (job, config) in enumerate(jobs):
      if time.monotonic() - start > 60 * args.minutes:
        print(f'--minutes={args.minutes:g}: {len(jobs) - number} measurements are left out')
        run['left_out'] = len(jobs) - number
        break
      found = row(job, ask(args, job, config, caches))
      run['rows'].append(found)
      write(args.out, [run])
      rate = found.get('error') or f'{report.shown(report.spread(report.rates(found)))} images/s'
      print(f'{number + 1}/{len(jobs)} {job["model"]} {job["what"]} at {job["batch_size"]}, '
            f'{job["side"]}: {rate}', flush=True)
  return run


def write(out, runs):
  """FILE.json and FILE.md, each whole or not at all."""
  if not out:
    return
  out = pathlib.Path(out)
  made = {out: json.dumps({'runs': runs}, indent=1) + '\n', out.with_suffix('.md'):
          report.render(runs)}
  for path, text in made.items():
    scratch = path.with_name(path.name + '.new')
    scratch.write_text(text)
    scratch.replace(path)


def main(argv=None):
  """Runs a command line: 2 for a user's mistake, 1 where diffax failed or the sides differ."""
  argv = sys.argv[1:] if argv is None else argv
  try:
    args = arguments(argv)
    if args.merge:
      runs = report.merge([report.read(pathlib.Path(path)) for path in args.merge])
    else:
      runs = [measure(args, argv)]
  except (ConfigError, ValueError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  write(args.out, runs)
  print(report.render(runs))
  failed = [r for run in runs for r in run['rows'] if r['side'] == 'diffax' and 'error' in r]
  return 1 if failed or report.mismatches(runs) else 0


if __name__ == '__main__':
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a process under way ends, too
  sys.exit(main())
