"""Config files: loading, overriding, completing and checking them, all before any device work.

A config is plain data. `SLOTS` says at which places of it a function is named and which module owns
it. `complete` fills in every parameter that a named function has and the file leaves out, so that
any of them can be overridden (`--config.model.dtype=bfloat16`) and `config.json` holds the whole
experiment.
"""

import copy
import importlib.util
import inspect
import json
import os
import re
import typing
from typing import NamedTuple

from absl import flags
from etils import epath
from ml_collections import config_dict
from ml_collections import config_flags

from diffax import build
from diffax import sharding
from diffax.build import ConfigError


class Slot(NamedTuple):
  """A place where a config names a function.

  path: a pattern for the place. owner: the module or package it is looked up in. returns: the names
  of types of which functions meant for the place say that they return one. given: the parameters
  the code provides, which those functions have. offered: parameters the code provides to a function
  that has them. extra: what else may stand there, with defaults. closed: only those which need
  nothing but what is provided.
  """

  path: str
  owner: str
  returns: tuple = ()
  given: tuple = ()
  offered: tuple = ()
  extra: dict = {}
  closed: bool = False


# What `data` says beside the arguments of its source.
BESIDE = dict(size=0, flip=False, workers=0, on_error='raise', buckets=())
SAMPLER = dict(steps=50, calls=0, grid=dict(name='uniform'))  # calls: network calls, for steps
SAMPLING = dict(
  sampler=dict(name='dpmpp_2m'),
  noise='independent',
  prompts=(),  # of a model that is told text, taken in turn; none: captions of the data
  negative='',
  aesthetic=(6.0, 2.5),  # scores to reach and to leave, of a network told them: SDXL's refiner
  edit=dict(name='none'),  # what is done with pictures of the user's
  size=(),  # (height, width) in pixels, where it is not that of training
  window=(),  # (side, overlap) of x: the network sees x by parts, for sizes beyond training's
  tile=0,  # pixels a side that an autoencoder sees at a time, 0 for all
  guidance=1.0,
  interval=(),
  guide=dict(name='cfg'),
  transforms={},  # of what is said, one after the other, by names of one's own
  ema='',
  seed=0,
)
SHOWN = dict(batch_size=64, labels='balanced', **SAMPLING)  # settings of a section that samples
DRAWN = r'(sample|evals\.\w+)\.'  # the sections that sample
PHASE = r'(phases\.\w+\.)?'  # of a phase, or of the first
RATE = PHASE + r'learning_rate'

# A place that ends in `(\.of)*` nests: an argument `of` is another function of the same kind.
SLOTS = (
  Slot(
    r'data', 'diffax.data.sources', ('Source',), extra=BESIDE,
  ),
  Slot(r'task', 'diffax.tasks', ('Task',), ('config', 'source')),
  Slot(
    r'task\.perceptual', 'diffax.perceptual', ('Perceptual',), ('channels',),
    extra=dict(weight=1.0),
  ),
  Slot(
    r'task\.discriminator', 'diffax.models', ('Module',), extra=dict(weight=0.0, start=0)
  ),
  Slot(r'schedule(\.of)*', 'diffax.schedules', ('Schedule', 'Learned')),
  Slot(r'prediction(\.of)*', 'diffax.predictions', ('Prediction',), ('schedule',)),
  Slot(r'loss\.time(\.of)*', 'diffax.times', given=('schedule',)),
  Slot(
    r'loss\.weight', 'diffax.losses', ('Callable',), offered=('schedule', 'law')
  ),
  Slot(r'loss\.distance', 'diffax.losses', ('Distance',)),
  Slot(r'loss\.coupling', 'diffax.couplings', ('Callable',)),
  Slot(r'loss\.draw', 'diffax.times', given=('key', 'count')),
  Slot(r'given', 'diffax.givens', ('Given',)),
  Slot(r'latent', 'diffax.latents', ('Latent',), ('source',)),
  Slot(r'text(\.of)*', 'diffax.texts', ('Text',), ('source',)),
  Slot(r'model', 'diffax.models', ('Module',)),
  Slot(
    PHASE + r'optimizer', 'optax', given=('learning_rate',), extra=dict(clip=0.0, unit_kernels='')
  ),
  Slot(RATE, 'optax.schedules'),
  Slot(r'evals\.\w+', 'diffax.evals', given=('run', 'path'), extra=dict(every=0)),
  Slot(r'evals\.\w+\.features', 'diffax.features', given=('source', 'held_out', 'size')),
  Slot(
    r'evals\.\w+\.metrics\.\w+', 'diffax.metrics', given=('fake', 'real'), offered=('held_out',)
  ),
  Slot(DRAWN + r'edit', 'diffax.edits', ('Edit',)),
  Slot(DRAWN + r'sampler', 'diffax.samplers', ('Sampler',), extra=SAMPLER),
  Slot(DRAWN + r'sampler(\.of)+', 'diffax.samplers', ('Sampler',)),
  Slot(DRAWN + r'sampler\.grid(\.of)*', 'diffax.grids', given=('schedule', 'steps')),
  Slot(
    DRAWN + r'guide', 'diffax.guidance', given=('denoise', 'cond', 'null'),
    offered=('schedule', 'scale', 'low', 'high'),
  ),
  Slot(
    DRAWN + r'transforms\.\w+', 'diffax.guidance', given=('denoise',), offered=('schedule',),
    closed=True,
  ),
)
OPEN = {  # where the names are one's own, and what may stand under each
  r'evals|evals\.\w+\.metrics|' + DRAWN + r'transforms': {},
  r'phases': dict(optimizer=None, learning_rate=None),  # None: as the first phase's
}

DEFAULTS = dict(
  seed=0,
  steps=int,  # a type: must be given
  batch_size=int,
  accumulate=1,  # microbatches a step
  data=dict(name='digits'),
  task=dict(name='generate'),
  schedule=dict(name='linear'),
  prediction=dict(name='velocity'),
  loss=dict(
    time=dict(name='uniform'),
    weight=dict(name='uniform'),
    distance=dict(name='squared'),
    coupling=dict(name='independent'),
    draw=dict(name='independent'),
    importance=0,  # bins of times, drawn by the losses met in them; 0 for none
    perturb=0.0,  # noise added to what the network is shown
    uncertainty=0,  # channels of a learned weight a noise level; 0 for none
  ),
  given=dict(name='none'),
  latent=dict(name='none'),
  text=dict(name='none'),
  model=dict,
  optimizer=dict(name='adamw'),
  learning_rate=dict(name='constant_schedule', value=1e-4),
  phases={},  # {name: dict(optimizer=..., learning_rate=...)} of a task's phases after the first
  ema=(0.9999,),
  ema_on_host=False,  # averages lie in the memory of the hosts, and visit the devices each step
  mesh=dict(data=-1, fsdp=1, sequence=1, tensor=1),
  sharding=sharding.RULES,
  attention='auto',
  log_every=50,
  save_every=1000,
  # checkpoints: the newest ones, and those at multiples of `every`; power-function averages: at
  # multiples of `averages`, for others to be made of; 0 is never
  keep=dict(last=3, every=0, averages=0),
  watchdog=45.0,  # seconds after which a host that stands still ends the run; 0 is never
  evals={},
  sample=dict(count=64, **SHOWN),
  # of --mode encode: records a device and a part at a time, and of which floats
  encode=dict(batch_size=8, part=8192, dtype='float16'),
)

# What a run may change and still be the same run: the rest decides the numbers it computes.
FREE = (
  'steps',
  'accumulate',
  'mesh',
  'sharding',
  'attention',
  'ema_on_host',
  'log_every',
  'save_every',
  'watchdog',
  'keep',
  'evals',
  'sample',
  'encode',
  'data.workers',
  'model.remat',
  'model.scale',  # of latents, as `--mode export` writes them
  'model.shift',
  'text.tokenizer',
  'text.of',  # of cached embeddings, that sampling may ask for others
)


def cache():
  """The folder of what is computed once: $DIFFAX_CACHE, else ~/.cache/diffax."""
  return epath.Path(os.environ.get('DIFFAX_CACHE') or '~/.cache/diffax').expanduser()


def load(path):
  """The config of `FILE[:variant]`, as a dict. Raises ConfigError, naming what exists."""
  file, _, variant = str(path).partition(':')
  place = epath.Path(file)
  if not place.exists():
    around = place.parent if place.parent.exists() else epath.Path('configs')
    names = [str(p) for p in around.glob('*.py')] if around.exists() else []
    raise ConfigError(f'--config={file}: no such file; {build.near(file, names)}')
  spec = importlib.util.spec_from_file_location(place.stem + '_config', file)
  if spec is None:
    raise ConfigError(f'--config={file}: not a Python file')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    get_config = module.get_config
  except Exception as error:
    raise _of_file(file, error) from error
  allowed = next(
    (typing.get_args(p.annotation) for p in inspect.signature(get_config).parameters.values()), ()
  )
  if variant and variant not in allowed:
    raise ConfigError(
      f'--config={path}: no variant {variant!r}; {build.near(variant, allowed)} (a config lists '
      "its variants as get_config(variant: Literal['full', ...] = 'full'))"
    )
  try:
    config = get_config(variant) if variant else get_config()
  except Exception as error:
    raise _of_file(file, error) from error
  return _plain(config.to_dict() if isinstance(config, config_dict.ConfigDict) else config)


def _of_file(file, error):
  return ConfigError(f'--config={file}: {type(error).__name__}: {" ".join(str(error).split())}')


def _plain(tree):
  if isinstance(tree, dict):
    return {k: _plain(v) for k, v in tree.items()}
  return tuple(map(_plain, tree)) if isinstance(tree, (list, tuple)) else tree


def _slot(path):
  return next((s for s in SLOTS if re.fullmatch(s.path, path)), None)


def _entry(path):
  """What may stand under each name at an open place; None elsewhere."""
  return next((entry for open_, entry in OPEN.items() if re.fullmatch(open_, path)), None)


def complete(config, awaited=()):
  """`config` with all defaults, every key, name and type checked. Raises ConfigError.

  awaited: paths that may be missing still.
  """
  config = copy.deepcopy(config)
  if isinstance(config.get('ema'), (int, float, str)):
    config['ema'] = (config['ema'],)
  return _complete(config, DEFAULTS, '', awaited)


def _spelled(value):
  """A name alone, or several, as the dict they are short for."""
  if isinstance(value, (tuple, list)):
    return {name: name for name in value}
  return dict(name=value) if isinstance(value, str) else value


def _complete(values, defaults, path, awaited):
  """Merges a level of the config with its defaults, which a slot's function adds to."""
  slot, entry = _slot(path), _entry(path)
  if slot or entry is not None:
    values = _spelled(values)
  if re.fullmatch(RATE, path) and isinstance(values, (int, float)):
    values = dict(name='constant_schedule', value=float(values))
  if slot:
    if not isinstance(values, dict):
      raise ConfigError(f'{path}={values!r}: give dict(name=..., ...) or a name')
    name = values.get('name', defaults.get('name') if isinstance(defaults, dict) else None)
    if not isinstance(name, str):
      raise ConfigError(f'{path}: says no name; {build.near("", _choices(slot))}')
    defaults = {
      **_signature(slot, name, path),
      **slot.extra,
      **(defaults if isinstance(defaults, dict) and defaults.get('name') == name else {}),
      'name': name,
    }
  elif not isinstance(values, dict):
    raise ConfigError(f'{path}={values!r}: give a dict with {", ".join(defaults)}')
  unknown = [k for k in values if k not in defaults and entry is None]
  if unknown:
    where = f'{path}.{unknown[0]}' if path else unknown[0]
    what = f' ({values["name"]} takes no such argument)' if slot and 'name' in values else ''
    raise ConfigError(f'config has no {where!r}{what}; {build.near(unknown[0], defaults)}')
  done = {}
  for key in {**defaults, **values}:
    where = f'{path}.{key}' if path else key
    default = defaults.get(key, entry)
    value = values.get(key, default)
    if isinstance(value, type) or value is inspect.Parameter.empty:
      if where in awaited:
        continue
      choices = f': {build.near("", _choices(_slot(where)))}' if _slot(where) else ''
      raise ConfigError(f'config says no {where!r}, which is needed{choices}')
    if value is None and key not in values:
      continue
    known = isinstance(default, dict) or default is dict
    if known or _slot(where) or _entry(where) is not None:
      value = _complete(value, default if isinstance(default, dict) else {}, where, awaited)
    elif key in values:
      value = _typed(value, default, where)
    done[key] = value
  return done


def _suits(slot):
  """Whether a function is meant for the place."""

  def suits(function):
    said = inspect.get_annotations(function).get('return')
    known = inspect.signature(function).parameters
    needed = {k for k, p in known.items() if p.default is inspect.Parameter.empty}
    return (
      set(slot.given) <= set(known)
      and (not slot.returns or getattr(said, '__name__', '') in slot.returns)
      and (not slot.closed or needed <= {*slot.given, *slot.offered})
    )

  return suits


def _choices(slot):
  return build.functions(slot.owner, _suits(slot))


def _parameters(slot, name, path):
  """{name: Parameter} of what a config may say to the function `name`."""
  function = build.find(slot.owner, name, path, _suits(slot))
  known = build.parameters(function, (*slot.given, *slot.offered))
  kinds = {p.kind for p in inspect.signature(function).parameters.values()}
  if slot.owner == 'diffax.evals' and inspect.Parameter.VAR_KEYWORD in kinds:
    only = inspect.Parameter.KEYWORD_ONLY  # an evaluation with **settings samples by them
    known = {k: inspect.Parameter(k, only, default=v) for k, v in SHOWN.items()} | known
  return known


def _signature(slot, name, path):
  """{parameter: default} of the function named; a type where there is no default."""

  def default(p):
    if p.default is not inspect.Parameter.empty:
      return p.default
    return p.annotation if p.annotation in (int, float, str, bool, tuple, dict) else p.empty

  known = _parameters(slot, name, path)
  return {k: default(p) for k, p in known.items() if _is_data(p.default)}


def _is_data(value):
  """Whether a parameter's default is data, None or missing: functions and dtypes stay unsaid."""
  kinds = (bool, int, float, str, tuple, list, dict)
  return value is None or value is inspect.Parameter.empty or isinstance(value, kinds)


def _typed(value, default, where):
  """`value`, of the default's type; an int will do for a float."""
  kind = default if isinstance(default, type) else type(default)
  if default is None or kind is inspect.Parameter.empty:
    return value
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  kinds = (tuple, list) if kind in (tuple, list) else kind
  if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
    raise ConfigError(
      f'config.{where}={value!r} is {type(value).__name__}; it must be {kind.__name__}'
    )
  return value


def override(config, arguments):
  """Applies `--config.a.b=value` arguments to a config from `load`; returns it complete.

  Names are applied first, for they decide which other arguments there are.
  """
  config, pairs = copy.deepcopy(config), []
  for argument in arguments:
    path, eq, text = argument.removeprefix('--config.').partition('=')
    if not eq:
      raise ConfigError(f'{argument}: write --config.{path}=VALUE')
    pairs.append((path, text))
  for path, text in pairs:
    if re.fullmatch(RATE, path) and _is_number(text):
      _put(config, path.split('.'), float(text))
    elif _slot(path) and not text.startswith('{'):
      path = f'{path}.name'
    if path.endswith('.name'):
      _rename(config, path.split('.')[:-1], text)
  full = complete(config, [path for path, _ in pairs])
  values = flags.FlagValues()
  for path, _ in pairs:
    _known(full, path)
  rest = [
    f'--config.{path}={text}'
    for path, text in pairs
    if not path.endswith('.name') and not (_slot(path) and not text.startswith('{'))
  ]
  config_flags.DEFINE_config_dict(
    'config',
    config_dict.ConfigDict(full, sort_keys=False),
    lock_config=False,
    accept_new_attributes=True,
    flag_values=values,
    sys_argv=['diffax', *rest],
  )
  try:
    values(['diffax', *rest])
  except flags.Error as error:
    raise ConfigError(' '.join(str(error).split())) from error
  return complete(_plain(values.config.to_dict()))


def _is_number(text):
  try:
    return float(text) is not None
  except ValueError:
    return False


def _put(config, path, value):
  """Sets the value at `path`, whose sections need not be there."""
  for key in path[:-1]:
    config[key] = config = _spelled(config.get(key, {}))
  config[path[-1]] = value


def _rename(config, path, name):
  """Sets the name at `path`; arguments that only the old function had go with it."""
  for key in path[:-1]:
    config[key] = config = _spelled(config.get(key, {}))
  old = _spelled(config.get(path[-1], {}))
  old = old if isinstance(old, dict) else {}
  if old.get('name') == name:
    return
  slot = _slot('.'.join(path))
  known = (
    {**_parameters(slot, name, '.'.join(path)), **slot.extra}
    if slot
    else old
  )
  config[path[-1]] = {'name': name} | {k: v for k, v in old.items() if k in known and k != 'name'}


def _known(full, path):
  """Raises ConfigError where an override's path leads nowhere."""
  at, sofar = full, []
  for key in path.split('.'):
    slot = _slot('.'.join(sofar))
    allowed = set(at) if isinstance(at, dict) else set()
    if slot and isinstance(at, dict):
      allowed |= set(
        _parameters(slot, at['name'], '.'.join(sofar))
      )
    if key not in allowed:
      raise ConfigError(
        f'--config.{path}: no {".".join([*sofar, key])!r} in the config; {build.near(key, allowed)}'
      )
    at, sofar = (at.get(key) if isinstance(at, dict) else None), [*sofar, key]


def save(config, path):
  """Writes the config as JSON, which knows no Infinity."""
  text = json.dumps(config, indent=2) + '\n'
  write(path, re.sub(r'(?m)^(\s*|.*": )(-?)Infinity(,?)$', r'\g<1>\g<2>1e999\3', text))


def write(path, text):
  """Writes a text file whole or not at all, so that a kill leaves no half of one."""
  scratch = path.parent / (path.name + '.new')
  scratch.write_text(text)
  scratch.replace(path)


def read(path):
  """A config that `save` wrote. Raises ConfigError where the file is damaged."""
  try:
    config = _plain(json.loads(path.read_text()))
  except ValueError as error:
    raise ConfigError(f'{path} is not readable JSON ({error})') from error
  remat = config.get('model', {}).get('remat')
  if isinstance(remat, bool):  # as it was spelled before it was the name of a policy
    config['model']['remat'] = 'nothing_saveable' if remat else 'dots_saveable'
  return config


def differences(old, new):
  """['model.width: 64 -> 96', ...]: how two configs differ in what a run may not change.

  What an old one does not say is as it was before it could be said.
  """
  flat = lambda tree, path='': (
    {path: tree}
    if not isinstance(tree, dict) or path in FREE
    else {
      k: v
      for key, value in tree.items()
      for k, v in flat(value, f'{path}.{key}'.strip('.')).items()
    }
  )
  old, new = flat(complete(old)), flat(new)
  return [
    f'{k}: {old.get(k)} -> {new.get(k)}'
    for k in sorted({**old, **new})
    if k not in FREE and old.get(k) != new.get(k)
  ]
