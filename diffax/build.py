"""From a name in a config to the function it names, with its arguments checked.

A name is a public function of the module that owns the idea (`schedule.name='cosine'` is
`diffax.schedules.cosine`); a dotted name reaches a module of the user's own. There is no registry:
to add a schedule, write a function.
"""

import difflib
import importlib
import inspect
import pkgutil


class ConfigError(ValueError):
  """Something the user wrote cannot be; the message is one line that says what and the remedy."""


def near(name, allowed):
  """', did you mean X?' and what is allowed, for the end of a message."""
  allowed = sorted(map(str, allowed))
  close = difflib.get_close_matches(str(name), allowed, 3, 0.5)
  hint = f'did you mean {" or ".join(close)}? ' if close else ''
  return f'{hint}allowed: {", ".join(allowed) or "nothing"}'


def functions(owner, suits=lambda function: True):
  """{name: function} of the public functions of a module, or of all modules of a package.

  suits: function -> whether it is meant for a place, so that a module's other functions are not
  taken for what a config may name there.
  """
  module = importlib.import_module(owner)
  if owner.split('.')[0] == 'optax':  # optax gathers its functions from private modules
    found = {k: f for k, f in vars(module).items() if inspect.isfunction(f)}
    return {k: f for k, f in found.items() if k[0] != '_' and suits(f)}
  modules = [module]
  if hasattr(module, '__path__'):
    modules = [
      importlib.import_module(f'{owner}.{m.name}') for m in pkgutil.iter_modules(module.__path__)
    ]
  return {
    k: f
    for m in modules
    for k, f in vars(m).items()
    if inspect.isfunction(f) and f.__module__ == m.__name__ and k[0] != '_' and suits(f)
  }


def find(owner, name, path, suits=lambda function: True):
  """The function `name` of `owner`, or of the user's module where `name` is dotted.

  path: where in the config the name stands, for messages. suits: see `functions`; it is not asked
  of the user's own. Raises ConfigError.
  """
  if '.' in name:
    owner, name = name.rsplit('.', 1)
    try:
      importlib.import_module(owner)
    except ImportError as error:
      raise ConfigError(
        f'{path}.name={owner}.{name}: cannot import {owner} ({error}); is it on PYTHONPATH?'
      ) from error
    suits = lambda function: True
  choices = functions(owner, suits)
  if name not in choices:
    raise ConfigError(f'{path}.name={name!r} is no function of {owner}; {near(name, choices)}')
  return choices[name]


def parameters(function, given=()):
  """{name: Parameter} of what a config may say to `function`; `given` are what the code gives."""
  kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
  all_of_them = inspect.signature(function).parameters
  return {k: p for k, p in all_of_them.items() if k not in given and p.kind not in kinds}


def takes(owner, spec, parameter, path):
  """Whether the function that `spec['name']` names has that parameter."""
  return parameter in parameters(find(owner, spec['name'], path))


def build(owner, spec, *args, path, skip=(), offer=None):
  """Calls the function that `spec['name']` names with `args` and the rest of `spec`, less `skip`.

  What stands under `of` is of the same owner and is built first, with the same `args`; where that
  has parameters (`schedules.Learned`), so has what is made of it. offer: arguments for those
  functions that take them. A ValueError or TypeError (an unknown dtype) of the function becomes a
  ConfigError that says where in the config it arose.
  """
  kwargs = {k: v for k, v in spec.items() if k != 'name' and k not in skip}
  function = find(owner, spec['name'], path)
  kwargs |= {k: v for k, v in (offer or {}).items() if k in parameters(function)}
  if not isinstance(kwargs.get('of'), dict):
    return _call(function, args, kwargs, spec['name'], path)
  of = build(owner, kwargs.pop('of'), *args, path=f'{path}.of')
  outer = lambda of: _call(function, args, {**kwargs, 'of': of}, spec['name'], path)
  if hasattr(of, 'bind'):
    return of._replace(bind=lambda params: outer(of.bind(params)))
  return outer(of)


def _call(function, args, kwargs, name, path):
  try:
    inspect.signature(function).bind(*args, **kwargs)
  except TypeError as error:
    raise ConfigError(f'{path}: {name}: {error}') from error
  try:
    return function(*args, **kwargs)
  except ConfigError:
    raise
  except (ValueError, TypeError) as error:
    raise ConfigError(f'{path}: {error}') from error
