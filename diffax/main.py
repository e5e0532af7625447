"""The door: trains, samples, evaluates, replays, encodes or plans what a config describes.

  python -m diffax.main --config configs/digits.py --workdir runs/digits
  python -m diffax.main --config configs/digits.py:smoke --workdir runs/smoke --config.steps=10
  python -m diffax.main --workdir runs/digits --mode sample --config.sample.count=100
  python -m diffax.main --workdir runs/emoji --mode sample --prompt "red heart" --negative "face"
  python -m diffax.main --weights DIR --workdir out --mode sample --prompt "an astronaut on a horse"
  python -m diffax.main --weights model.safetensors --config.text.tokenizer=DIR --workdir out ...
  python -m diffax.main --weights DIR --config configs/mine.py --workdir runs/tuned
  python -m diffax.main --workdir runs/digits --mode export --out exported
  python -m diffax.main --workdir runs/digits --mode evaluate --evals quality
  python -m diffax.main --workdir runs/digits --mode reference
  python -m diffax.main --workdir runs/digits --mode replay --step 17
  python -m diffax.main --config configs/x.py --workdir plans/x --mode plan --topology v5e:16x16
  python -m diffax.main --config configs/x.py --mode encode --workdir data/x_latents

`reference` computes what evaluations need of the data alone, once, into the cache ($DIFFAX_CACHE,
or ~/.cache/diffax); `evaluate` and training do so themselves where it is not there. `encode` makes
a latent data set of the config's data in --workdir (`diffax.encode`). `plan` compiles the program
for chips that are not here (`diffax.chips`), says whether it fits and how fast it can be, and
writes plan.json; --plan.what=sample plans sampling, --plan.search tries other meshes and settings.

Where the environment tells of several hosts (`diffax.hosts.start`), each is started with the same
command. `--profile.start=100 --profile.steps=5` traces training steps for TensorBoard or Perfetto.

A run that a signal stops ends with status 0, or $DIFFAX_STOP_STATUS where that is set: a launcher
that starts anew what failed, and takes 0 for done, sets it.

Any value of the config, and any parameter of a function it names, is set by --config.PATH=VALUE.
Where a workdir has a config already, --config may be left out.
"""

import hashlib
import json
import os
import platform
import sys
import time

from absl import flags
from absl import logging
from etils import epath
import jax

from diffax import config as configs
from diffax import hosts
from diffax.build import ConfigError, near

MODES = ('train', 'sample', 'evaluate', 'export', 'reference', 'replay', 'encode', 'plan')
BEGINS = ('train', 'reference', 'encode', 'plan')  # where there may be no workdir yet
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def define_flags():
  """The flags, in a set of their own: importing diffax defines none."""
  values = flags.FlagValues()
  flags.DEFINE_string('config', '', 'FILE[:variant] of a config', flag_values=values)
  flags.DEFINE_string('workdir', None, 'folder or bucket of the run', flag_values=values)
  flags.DEFINE_string('mode', 'train', ', '.join(MODES), flag_values=values)
  flags.DEFINE_string('from', '', 'workdir whose weights a new run begins with', flag_values=values)
  flags.DEFINE_integer(
    'step',
    0,
    'sample, evaluate, export: of which checkpoint (0: the newest); replay: which step',
    lower_bound=0,
    flag_values=values,
  )
  flags.DEFINE_list('evals', [], 'evaluate: which of them, by name (all)', flag_values=values)
  flags.DEFINE_integer(
    'profile.start', 0, 'train: the first step to trace', lower_bound=0, flag_values=values
  )
  flags.DEFINE_integer(
    'profile.steps', 0, 'train: how many to trace, 0 for none', lower_bound=0, flag_values=values
  )
  flags.DEFINE_string(
    'weights', '', "sample: a released model, its folder in diffusers' layout or its single file; "
    'train: the same, or one network, that a new run begins with', flag_values=values
  )
  flags.DEFINE_string('out', '', 'export: the folder to be written', flag_values=values)
  flags.DEFINE_multi_string(
    'prompt', [], 'sample: what to draw; give it again for more', flag_values=values
  )
  flags.DEFINE_string('prompts', '', 'sample: a file of prompts, one a line', flag_values=values)
  flags.DEFINE_string('negative', '', 'sample: what not to draw', flag_values=values)
  flags.DEFINE_string(
    'topology', '', 'plan: the chips, as v5e:16x16, 2*v6e:16x16, h200:2x8 or cpu:8',
    flag_values=values
  )
  flags.DEFINE_string('plan.what', 'train', 'plan: train or sample', flag_values=values)
  flags.DEFINE_boolean(
    'plan.search', False, 'plan: try meshes, remat and microbatches', flag_values=values
  )
  flags.DEFINE_boolean('help', False, 'this text', flag_values=values)
  return values


def parse(argv):
  """(flags, overrides) of a command line. Raises ConfigError."""
  joined = []  # '--config.steps 5' and '-config.steps=5' are written as '--config.steps=5'
  for argument in argv[1:]:
    bare = joined and joined[-1].startswith('--config.') and '=' not in joined[-1]
    if bare and not argument.startswith('--'):
      joined[-1] += '=' + argument
    else:
      joined.append('-' + argument if argument.startswith('-config') else argument)
  joined = [a + '=true' if a.startswith('--config.') and '=' not in a else a for a in joined]
  values = define_flags()
  try:
    rest = values([argv[0], *[a for a in joined if not a.startswith('--config.')]])[1:]
  except flags.Error as error:
    raise ConfigError(
      f'{" ".join(str(error).split())}; flags: {", ".join(sorted(values))}'
    ) from error
  if rest:
    raise ConfigError(
      f'what is {rest[0]!r}? write --flag=value; flags: {", ".join(sorted(values))}'
    )
  if values.mode not in MODES:
    raise ConfigError(f'--mode={values.mode!r}: {near(values.mode, MODES)}')
  if not values.workdir and not values.help:
    raise ConfigError(
      '--workdir is missing: say where the run shall live, as --workdir runs/digits'
    )
  if bool(values.out) != (values.mode == 'export'):
    raise ConfigError(
      f'--out={values.out!r} with --mode {values.mode}: a folder to write is named of export alone')
  if bool(values.topology) != (values.mode == 'plan'):
    raise ConfigError(
      f'--topology={values.topology!r} with --mode {values.mode}: --mode plan needs one, as '
      'v5e:16x16 or h200:8, and no other does')
  if values.weights and getattr(values, 'from'):
    raise ConfigError('--weights and --from: a run begins with one of them')
  return values, [a for a in joined if a.startswith('--config.')]


def resolve(values, overrides, workdir):
  """The complete config: the file's, or without one the workdir's, with the overrides."""
  there = workdir / 'config.json'
  old = configs.read(there) if there.exists() else None
  if values.weights and values.mode != 'train':
    if values.config or old or values.mode != 'sample':
      raise ConfigError(
        f'--weights={values.weights} brings a config of its own, for --mode sample into a new '
        f'--workdir: leave out --config, and name a workdir that holds no run'
      )
    from diffax.convert import pipelines

    config = configs.override(pipelines.config(values.weights, jax.device_count()), overrides)
    if config['given']['name'] != 'none' and config['sample']['edit']['name'] == 'none':
      raise ConfigError(
        f'--weights={values.weights}: this network is told a picture: say --config.sample.edit='
        "inpaint, instruct or upscale, what it was trained to, and the edit's files, as "
        '--config.sample.edit.image=FILE'
      )
    return config
  if values.config:
    config = configs.override(configs.load(values.config), overrides)
  elif old:
    config = configs.override(old, overrides)
  else:
    raise ConfigError(
      f'--config is missing, and {workdir} has no config.json: say --config configs/digits.py'
    )
  changed = configs.differences(old, config) if old else []
  if changed:
    raise ConfigError(
      f'{workdir} holds a run of another config ({"; ".join(changed[:5])}): choose another '
      '--workdir, or undo the change; --from starts a new run from its weights'
    )
  return config


def asked(values, overrides):
  """The overrides, with what --prompt, --prompts and --negative come to before them.

  As many samples as prompts are drawn, unless `--config.sample.count` says how many. Raises
  ConfigError.
  """
  prompts = list(values.prompt)
  if values.prompts:
    try:
      lines = epath.Path(values.prompts).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
      raise ConfigError(f'--prompts={values.prompts}: no text file ({error})') from error
    prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
      raise ConfigError(f'--prompts={values.prompts} holds no prompt: write one a line')
  if (prompts or values.negative) and values.mode != 'sample':
    raise ConfigError(f'--prompt and --negative are for --mode sample, not {values.mode}')
  said = [f'--config.sample.prompts={tuple(prompts)!r}'] if prompts else []
  said += [f'--config.sample.count={len(prompts)}'] if prompts else []
  said += [f'--config.sample.negative={values.negative}'] if values.negative else []
  return said + overrides


def _setup(config, workdir):
  """The run of a config; a tokenizer that was made at its beginning is the one of its workdir."""
  from diffax import train

  kept = workdir / 'tokenizer.json'
  if kept.exists() and config['text'].get('tokenizer') == '':
    config = {**config, 'text': {**config['text'], 'tokenizer': str(kept)}}
  return train.setup(config)


def _writable(workdir):
  """Raises ConfigError where the workdir cannot be made or written."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / '.probe').write_text('')
    (workdir / '.probe').unlink()
  except OSError as error:
    raise ConfigError(
      f'--workdir={workdir} cannot be written ({error.strerror or error}); choose another'
    ) from error


def environment():
  """What this process runs on, for the record."""
  from importlib import metadata

  import diffax

  return {
    'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
    'command': sys.argv,
    'diffax': diffax.__version__,
    'python': platform.python_version(),
    'platform': platform.platform(),
    'versions': {name: metadata.version(name) for name in PACKAGES},
    'devices': [str(d) for d in jax.devices()],
    'device_kind': jax.devices()[0].device_kind,
    'hosts': jax.process_count(),
    'flags': {
      k: os.environ[k]
      for k in ('XLA_FLAGS', 'JAX_PLATFORMS', 'LIBTPU_INIT_ARGS')
      if k in os.environ
    },
  }


def _stop_status():
  """The exit status of a run that a signal stopped. Raises ConfigError."""
  said = os.environ.get('DIFFAX_STOP_STATUS', '0')
  if not said.isascii() or not said.isdigit() or int(said) > 255:
    raise ConfigError(f'DIFFAX_STOP_STATUS={said!r}: an exit status, 0 to 255')
  return int(said)


def _done(run, workdir, step, evals):
  """Whether a run that ended at `step` has nothing left to do; evals: {name: `Evaluation`}."""
  from diffax import evaluate, log

  rows = log.read_metrics(workdir / 'evals.jsonl')
  done = {row['eval'] for row in rows if row['step'] == step}
  due = {name for name in evaluate.due(run.config, step) if name in evals}
  return step == run.config['steps'] and due <= done


def _train(config, workdir, warm, profile, released):
  from diffax import checkpoint, train
  from diffax.convert import pipelines

  stop_status = _stop_status()
  source = epath.Path(warm) if warm else None
  run = _setup(config, workdir)
  evals = train.evaluations(run)  # whose mistakes, like any, are told before anything is written
  if source and not checkpoint.present(workdir / 'checkpoints'):
    checkpoint.weights_like(source / 'checkpoints', run.like)
  if released and not checkpoint.present(workdir / 'checkpoints'):
    pipelines.fits(released, config['model'], run.like.params['net'])
  hosts.wait()  # all have read what the first now writes
  if hosts.first():
    _writable(workdir)
    configs.save(config, workdir / 'config.json')
    for name, text in run.task.record.items():
      if not (workdir / name).exists():
        configs.write(workdir / name, text)
    record = workdir / 'environment.json'  # a list: one entry each time the run was started
    starts = json.loads(record.read_text()) if record.exists() else []
    configs.write(record, json.dumps([*starts, environment()], indent=2) + '\n')
  hosts.wait()
  if not hosts.every((workdir / 'config.json').exists()):
    raise ConfigError(
      f'--workdir={workdir} is not the same folder on all hosts: what the first writes there, '
      'another does not find; put it on a disk or bucket that they share'
    )
  state = train.train(run, workdir, source, profile, released)
  if stop_status and not hosts.tell(_done(run, workdir, int(state.step), evals)):
    sys.exit(stop_status)


def _plan(values, overrides):
  from diffax import chips, plan

  jax.config.update('jax_platforms', 'cpu')  # no accelerator is touched, though one may be there
  what, workdir = values['plan.what'].value, epath.Path(values.workdir)
  plan.known(what)
  config = resolve(values, asked(values, overrides), workdir)
  topology = chips.topology(values.topology)
  _writable(workdir)
  if values['plan.search'].value:
    found = plan.search(config, topology, what, lambda line: print(line, flush=True))
    made = found[0] | {'search': found}
    print(f'\n{plan.advice(found)}\n')
  else:
    made = plan.plan(config, topology, what)
  print(plan.report(made))
  configs.write(workdir / 'plan.json', json.dumps(made, indent=1) + '\n')


def _same(config):
  """Raises ConfigError on the hosts whose config is not that of the first."""
  found = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
  if hosts.tell(found) != found:
    raise ConfigError(
      f'host {jax.process_index()} was started with another config than host 0: give all of them '
      'the same file, flags and $DIFFAX_DATA'
    )


def _cache_programs():
  """Compiled programs are kept for the next start, unless the environment says where or not to."""
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str(configs.cache() / 'programs'))


def _run(argv):
  values, overrides = parse(argv)
  if values.help:
    print(__doc__, values.get_help(), sep='\n')
    return
  if values.mode == 'plan':
    _plan(values, overrides)
    return
  hosts.start()
  _cache_programs()
  workdir = epath.Path(values.workdir)
  if not values.weights and values.mode not in BEGINS and not workdir.exists():
    raise ConfigError(
      f'--workdir={workdir}: no such folder; --mode {values.mode} needs a trained run'
    )
  config = resolve(values, asked(values, overrides), workdir)
  _same(config)
  if values.mode == 'train':
    steps = values['profile.start'].value, values['profile.steps'].value
    _train(config, workdir, getattr(values, 'from'), steps, values.weights)
  elif values.mode == 'sample':
    from diffax import sample

    if values.weights:
      _writable(workdir)
    run = _setup(config, workdir)
    for path in sample.sample(run, workdir, values.step, values.weights):
      hosts.say(path)
  elif values.mode == 'export':
    from diffax import export

    run = _setup(config, workdir)
    hosts.say(export.export(run, workdir, values.step, values.out))
  elif values.mode in ('evaluate', 'reference'):
    from diffax import evaluate

    run = _setup(config, workdir)
    if values.mode == 'evaluate':
      hosts.say(evaluate.evaluate(run, workdir, values.step, values.evals))
    else:
      evaluate.prepare(run, values.evals)
  elif values.mode == 'encode':
    from diffax import encode

    encode.encode(config, workdir)
  else:
    from diffax import replay

    replay.replay(_setup(config, workdir), workdir, values.step, hosts.say)


def main(argv=None):
  """Runs a command line; a user's mistake ends it with one line and exit status 2, trouble that a
  new start may end with one and 1."""
  logging.set_verbosity(logging.WARNING)  # orbax tells every step of a save at INFO
  try:
    _run(argv or sys.argv)
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    hosts.leave(2)
  except BrokenPipeError:  # `... --mode replay --step 9 | head` has read enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except Exception as error:
    from diffax.train import BadStep, WorkerGone

    if not isinstance(error, (BadStep, WorkerGone, hosts.Apart)):
      hosts.fail()
      raise
    print(f'error: {error}', file=sys.stderr)
    hosts.leave(1)


if __name__ == '__main__':
  main()
