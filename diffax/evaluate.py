"""Evaluations by name: what a config's `evals` are, one carried out, all of them on their own."""

import json

from diffax import config as configs
from diffax import hosts
from diffax import sample
from diffax.build import build, ConfigError, near
from diffax.evals import Evaluation


def entries(run, names=()):
  """{name: `evals.Evaluation`} of the config's entries, or of those named. Raises ConfigError."""
  specs = run.config['evals']
  for name in names:
    if name not in specs:
      raise ConfigError(f'--evals={name}: the config has no such evaluation; {near(name, specs)}')
  made = {}
  for name in names or specs:
    path = f'evals.{name}'
    made[name] = build('diffax.evals', specs[name], run, path, path=path, skip=('every',))
    if not isinstance(made[name], Evaluation):
      raise ConfigError(
        f'config.{path}: {specs[name]["name"]} returns {type(made[name]).__name__}, not a '
        '`diffax.evals.Evaluation`'
      )
  return made


def carry_out(name, evaluation, state, step, workdir, stopped=lambda: False):
  """[(name, value), ...] of one evaluation; None where `stopped()` said so in the midst of it.

  What it leaves in `workdir/evals/NAME-STEP` is used when it is done again, and removed at its end.
  """
  folder, found = workdir / 'evals' / f'{name}-{step}', []
  pairs = evaluation.evaluate(state, folder)
  for pair in pairs:
    found += [pair] if pair is not None else []
    if stopped():
      pairs.close()
      return None
  hosts.wait()
  if hosts.first() and folder.exists():
    folder.rmtree()
  return found


def due(config, step):
  """The names of the entries to be carried out at a training step, the last one among them."""
  every = {name: spec['every'] for name, spec in config['evals'].items()}
  last = step == config['steps']
  return [name for name, n in every.items() if n and step and (last or step % n == 0)]


def prepare(run, names=(), show=hosts.say):
  """Computes what the evaluations need of the data alone, into the cache."""
  for name, evaluation in entries(run, names).items():
    evaluation.prepare()
    show(f'{name}: ready')


def evaluate(run, workdir, step, names=(), show=hosts.say):
  """Carries out the config's evaluations, or those named, on a checkpoint; 0 is the newest.

  Adds to metrics.json in the workdir, {step: {entry: {name: value, ..., settings}}}, after each,
  and writes pictures to images/. When interrupted, the same command goes on. Raises ConfigError.
  """
  from diffax import images

  made = entries(run, names)
  if not made:
    raise ConfigError("the config's `evals` is empty: there is nothing to evaluate")
  averages = {name: run.config['evals'][name].get('ema', '') for name in made}
  step, state = sample.restore(run, workdir, step, averages.values())
  file = workdir / 'metrics.json'
  (workdir / 'images').mkdir(parents=True, exist_ok=True)
  for name, evaluation in made.items():
    show(f'{name}, step {step}')
    row = {'settings': run.config['evals'][name]}
    for key, value in carry_out(name, evaluation, state, step, workdir):
      if getattr(value, 'ndim', 0) == 3:
        picture = f'images/{images.name(key, step)}'
        if hosts.first():
          images.save(workdir / picture, value)
        value = picture
      row[key] = value if isinstance(value, str) else float(value)
      show(f'  {key:40} {value if isinstance(value, str) else format(value, ".5g")}')
    if hosts.first():
      results = json.loads(file.read_text()) if file.exists() else {}
      results.setdefault(str(step), {})[name] = row
      configs.write(file, json.dumps(results, indent=2) + '\n')
  return file
