"""Generation: a network learns to denoise, samplers make data of noise; by class, text or neither.

Everything of noise and training that a config names is built from the parameters (`Process`), in
each trace anew: what is learned along with the network, a schedule or the weight of a noise level,
is then a group of parameters like the network.
"""

import bisect
from functools import partial
from typing import Any, NamedTuple
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
import numpy as np

from diffax import build as builds
from diffax import conditions
from diffax import couplings
from diffax import edits
from diffax import guidance
from diffax import latents
from diffax import losses
from diffax import noises
from diffax import predictions
from diffax import samplers
from diffax import schedules
from diffax import times
from diffax.build import build, ConfigError
from diffax.config import SAMPLING
from diffax.data import pipeline
from diffax.data import transforms
from diffax.models import layers
from diffax.tasks import Drawing, Task

TOGETHER, SHOWN, PERTURBED = 4, 5, 6  # what keys are folded with, beside the four they split into
TEXT, LATENT, GIVEN, EDIT = 7, 8, 9, 10
NOISES = {'independent': noises.independent, 'brownian': noises.brownian}


class Process(NamedTuple):
  """How data is noised and asked for. law: u -> t; weight: u -> the weighting of those times."""

  schedule: schedules.Schedule
  prediction: predictions.Prediction
  law: Callable
  weight: Callable


class Network(NamedTuple):
  """A network bound to data.

  init: key -> its parameters. predict: (params, prediction, x, level, cond, keys=None) -> its raw
  output. cond holds what the network is told, and for `predict` alone `before` [b h w c], shown
  behind x, and `keep` or `attend` [b depth], of each layer (see `guidance.perturbed`). told: what
  else there is in cond. space: of x.
  """

  init: Callable
  predict: Callable
  told: conditions.Conditions
  space: Any


def generate(config, source, drop_cond=0.1, self_condition=0.0) -> Task:
  """Trains on `source` by the config's schedule, prediction, loss and model.

  drop_cond: how often the condition is replaced by the null label, for classifier-free guidance
  (Ho & Salimans 2022, algorithm 1, p_uncond). self_condition: how often the network is shown its
  own estimate (Chen et al. 2022, "Analog Bits", whose rate is 0.5); 0 for a network without.
  """
  for name, rate in (('drop_cond', drop_cond), ('self_condition', self_condition)):
    if not 0 <= rate <= 1:
      raise ConfigError(f'config.task.{name}={rate} is outside [0, 1]')
  learned, process = _process(config)
  first = process({name: group.init(jax.random.key(0)) for name, group in learned.items()})
  try:
    predictions.check(first.prediction, first.schedule, config['prediction']['name'])
  except ValueError as error:
    raise ConfigError(f'config.prediction: {error}') from error
  network = _network(config, source, first.prediction.outputs, self_condition > 0)
  bins, text = config['loss']['importance'], network.told.text

  def init(key):
    groups = enumerate(learned.items(), 1)
    rest = {name: group.init(jax.random.fold_in(key, i)) for i, (name, group) in groups}
    rest |= text.init(jax.random.fold_in(key, TEXT))
    return {'net': network.init(key), **rest}

  def extra():
    return {'importance': times.importance_init(bins)} if bins else {}

  def update(extra, info):
    return {'importance': times.importance_update(extra['importance'], info['place'], info['met'])}

  loss = _loss(config, network, learned, process)
  clean = partial(_clean, network)
  denoiser = partial(_denoiser, network, process)
  sample = _sampling(network, denoiser, first, 'schedule' in learned, self_condition > 0)
  prepare = _prepare(config['loss'], network)
  update = update if bins else None
  if self_condition:
    denoiser = partial(_at_first, denoiser)
  return Task(
    init, loss, sample, network.told.classes, prepare, extra, update, denoiser,
    clean, text.frozen | network.space.latent.frozen, None if text.null else text.tokenize,
    text.record, carry=text.null,
  )


def _process(config):
  """({group: `Learned`} of what is trained beside the network, params -> `Process`)."""
  spec, learned = config['loss'], {}
  for name in ('importance', 'perturb', 'uncertainty'):
    if spec[name] < 0:
      raise ConfigError(f'config.loss.{name}={spec[name]} is negative; 0 is none')
  schedule = build('diffax.schedules', config['schedule'], path='schedule')
  if isinstance(schedule, schedules.Learned):
    learned['schedule'] = schedule
  if spec['uncertainty']:
    learned['weight'] = losses.uncertainty(spec['uncertainty'])
  # A weighting that asks for the law divides by its density: it is one for each draw u.
  of_u = builds.takes('diffax.losses', spec['weight'], 'law', 'loss.weight')

  def process(params):
    bound = schedule.bind(params['schedule']) if 'schedule' in learned else schedule
    prediction = build('diffax.predictions', config['prediction'], bound, path='prediction')
    law = build('diffax.times', spec['time'], bound, path='loss.time')
    offer = dict(schedule=bound, law=law)
    weight = build('diffax.losses', spec['weight'], path='loss.weight', offer=offer)
    return Process(bound, prediction, law, weight if of_u else lambda u: weight)

  return learned, process


class Space(NamedTuple):
  """Where a network denoises: x of `shape` [h w c], of which `latent` (`latents.Latent`) makes data
  of `pixels` [h w c]. encode: (groups of parameters, data, keys [b] or None) -> x0. records: int
  [b], numbers of samples -> pictures of the data in turn, float32 [b h w c]. decoded: whether
  pictures are drawn although the data is latents.
  """

  shape: tuple
  pixels: tuple
  latent: latents.Latent
  encode: Callable
  records: Callable | None = None
  decoded: bool = False


def _space(config, source):
  """The `Space` of the config's data. Raises ConfigError."""
  size = config['data']['size']
  shape = (size, size, source.shape[-1]) if size else tuple(source.shape)
  if None in shape:
    raise ConfigError(
      f'data {config["data"]["name"]!r} has images of several sizes: say --config.data.size=N'
    )
  latent = build('diffax.latents', config['latent'], source, path='latent')
  if source.dtype == np.uint8:
    for sides in config['data']['buckets']:
      latent.shape((*sides, shape[-1]))  # raises where they do not divide into latents
    return Space(latent.shape(shape), shape, latent, latent.encode, partial(_records, source, size))
  pixels = shape
  if latent.channels:  # what is stored is `moments`
    pixels = *(side * latent.factor for side in shape[:-1]), 3
    shape = *shape[:-1], latent.channels
  data = lambda groups, x, keys: latent.draw(x, keys)
  return Space(shape, pixels, latent, data, decoded=bool(latent.frozen))


def _records(source, size, index):
  read = pipeline.read(source, size or None, 'raise', (index % len(source)).tolist())
  return transforms.to_float(np.stack([picture for _, picture, *_ in read]))


def _told(config, source, model, space):
  """What the config's model is told beside x, as `conditions.Conditions`. Raises ConfigError."""
  classes = conditions.option(model, 'classes')
  if classes not in (0, source.classes):
    raise ConfigError(
      f'config.model.classes={classes}, but the data has {source.classes} classes: say '
      f'{source.classes}, or 0 to ignore them'
    )
  text = build('diffax.texts', config['text'], source, path='text')
  given = build('diffax.givens', config['given'], path='given')
  if given.show and source.dtype != np.uint8:
    raise ConfigError(
      f'config.given={config["given"]["name"]!r} is made of pictures, and this data is of latents'
    )
  pixels = given.scale if given.apart else 1  # of the data, for one of what is shown
  if given.show and not given.latent and space.latent.factor != pixels:
    raise ConfigError(
      f'config.given={config["given"]["name"]!r} is shown in pixels, beside what has one for '
      f'{pixels} of the data: config.latent={config["latent"]["name"]!r} has one for '
      f'{space.latent.factor}'
    )
  conditions.check(config, model, text, given, space.shape if given.latent else space.pixels)
  names = conditions.taken(model)
  captions = getattr(source, 'captions', None)
  return _in_space(conditions.Conditions(
    classes, text, captions, given, None, None, space.latent.factor, names, space.pixels,
    conditions.option(model, 'sizes') or 6), space.latent)


def _network(config, source, outputs, shows_before):
  """The config's model as a `Network` with `outputs` channels for each of the data's."""
  model, space = build('diffax.models', config['model'], path='model'), _space(config, source)
  told, shape = _told(config, source, model, space), space.shape
  if outputs > 1 or shows_before:
    if not hasattr(model, 'channels'):
      raise ConfigError(
        f'config.model.name={config["model"]["name"]!r} returns as many channels as it is shown: a '
        'learned variance and self-conditioning need one with a field `channels`, as dit'
      )
    model = model.clone(channels=outputs * shape[-1])

  def init(key):
    x = jnp.zeros((1, *shape[:-1], shape[-1] * (1 + shows_before)))
    return model.init(key, x, jnp.zeros(1), conditions.example(told, model, shape))['params']

  def predict(params, prediction, x, level, cond, keys=None):
    """It is told its input and time in the prediction's convention."""
    time = jnp.broadcast_to(prediction.clock(level), (len(x), *[1] * (x.ndim - 1)))
    time = einops.rearrange(time, 'b ' + '1 ' * (x.ndim - 1) + '-> b')
    shown, more = prediction.c_in(level) * x, {}
    if 'before' in cond:
      shown = jnp.concatenate([shown, cond['before']], axis=-1)
    flags = {k: cond[k] for k in ('keep', 'attend') if k in cond}
    for name, flag in flags.items():
      depth, said = getattr(model, 'depth', None), flag.shape[1]
      if depth not in (None, said):
        raise ValueError(f'keep has {said} numbers, and the model {depth} layers: give one to each')
      flags[name] = einops.rearrange(flag, 'b depth -> depth b')
    if flags:
      more['per_layer'] = flags
    cond = {k: v for k, v in cond.items() if k not in ('before', *flags)}
    return model.apply({'params': params['net']}, shown, time, cond, keys=keys, **more)

  return Network(init, predict, told, space)


# --- training -------------------------------------------------------------------------------------


def _split(keys):
  return jax.vmap(partial(jax.random.split, num=4))(keys)  # [b 4]: time, noise, condition, network


def _prepare(spec, network):
  """The task's `prepare`: what a batch draws together; None where each example draws alone."""
  coupling = build('diffax.couplings', spec['coupling'], path='loss.coupling')
  draws = spec['draw']['name'] != 'independent'
  couples = spec['coupling']['name'] != 'independent'

  def prepare(params, state, batch, keys):
    if draws:
      key = jax.random.fold_in(keys[0], TOGETHER)
      batch |= {'u': build('diffax.times', spec['draw'], key, len(keys), path='loss.draw')}
    if couples:  # in one piece, for examples are compared
      groups = {**state.frozen, **params}
      x0 = network.space.encode(groups, batch['image'], noises.fold(keys, LATENT))
      x0 = layers.constrain(x0, *[None] * x0.ndim)
      eps = noises.normal(_split(keys)[:, 1], x0.shape[1:])
      batch |= {'eps': coupling(noises.fold(keys, TOGETHER), x0, layers.constrain(
        eps, *[None] * eps.ndim))}
    return batch

  return prepare if draws or couples else None


def _clean(network, params, frozen, batch, keys, drop=None):
  """The task's `clean`. drop: bool [b], of which examples the network is not told the condition."""
  groups = {**frozen, **params}
  drop = jnp.zeros(len(batch['image']), bool) if drop is None else drop
  x0 = network.space.encode(groups, batch['image'], noises.fold(keys, LATENT))
  given = noises.fold(keys, GIVEN)
  return x0, conditions.training(network.told, groups, batch, given, drop)


def _loss(config, network, learned, process):
  """The task's `loss`."""
  spec, task = config['loss'], config['task']
  distance = build('diffax.losses', spec['distance'], path='loss.distance')

  def shown(params, prediction, cond, keys, network_keys):
    """(x, level) -> raw output, with what training shows the network beside x."""
    def ask(x, level, **more):
      return network.predict(params, prediction, x, level, {**cond, **more}, network_keys)

    if task['self_condition']:
      again = lambda x, level, before, ask=ask: ask(x, level, before=before)
      rate = task['self_condition']
      ask = couplings.self_condition(again, prediction, noises.fold(keys, SHOWN), rate)
    if spec['perturb']:
      ask = couplings.perturb(ask, noises.fold(keys, PERTURBED), spec['perturb'])
    return ask

  def loss(params, state, batch, keys):
    p, k = process(params), _split(keys)
    u = batch['u'] if 'u' in batch else jax.vmap(jax.random.uniform)(k[:, 0])
    if spec['importance']:
      u, share = times.importance_law(state.extra['importance'])(u)
    t = p.law(u)
    drop = jax.vmap(lambda key: jax.random.bernoulli(key, task['drop_cond']))(k[:, 2])
    x0, cond = _clean(network, params, state.frozen, batch, keys, drop)
    eps = batch['eps'] if 'eps' in batch else noises.normal(k[:, 1], x0.shape[1:])
    ask = shown(params, p.prediction, cond, keys, k[:, 3])
    each = losses.diffusion_loss(
      ask, p.schedule, p.prediction, p.weight(u), x0, eps, t, distance)
    level = p.schedule(t)
    info = {'t': t, 'noise': level.nsr}
    if spec['importance']:
      info |= {'place': u, 'met': each}
    if 'weight' in learned:
      each = learned['weight'].bind(params['weight'])(each, level)
    return each * share if spec['importance'] else each, info

  return loss


# --- sampling -------------------------------------------------------------------------------------


def _denoiser(network, process, params):
  """The task's `denoiser`, of a self-conditioned network with `before` in cond."""
  p = process(params)

  def denoise(x, level, cond):
    out = network.predict(params, p.prediction, x, level, cond)
    return predictions.solve(p.prediction, out, x, level)

  return p.schedule, denoise


def _at_first(denoiser, params):
  """The same for a network shown its estimate, which has none yet."""
  schedule, denoise = denoiser(params)
  return schedule, lambda x, level, cond: denoise(x, level, {**cond, 'before': jnp.zeros_like(x)})


def _sampling(network, denoiser, first, learned, remembers):
  """The task's `sample`. first: the `Process` to check by; learned: whether its schedule is."""

  def sample(settings, path):
    settings = {**SAMPLING, **settings}
    sampler, grid = _walk(settings['sampler'], first.schedule, f'{path}.sampler')
    ts = grid(first.schedule)
    guide = _guide(settings, path, network.told.any)
    if settings['noise'] not in NOISES:
      raise ConfigError(
        f'config.{path}.noise={settings["noise"]!r}; {builds.near(settings["noise"], NOISES)}')
    edit = build('diffax.edits', settings['edit'], path=f'{path}.edit')
    prompts, others = edit.prompts(tuple(settings['prompts']))
    ask = conditions.asking(network.told, settings, path, prompts, others)
    pixels, shape = _sizes(network, edit, settings, path)
    latent = _latent(network.space.latent, settings, path)
    told = _in_space(network.told, latent)
    small = (*(side // network.told.given.scale for side in pixels[:-1]), pixels[-1])

    def draw(params, frozen, keys, asked):
      schedule, denoise = denoiser(params)
      denoise = guidance.windows(denoise, *settings['window']) if settings['window'] else denoise
      groups, times = {**frozen, **params}, grid(schedule) if learned else ts
      of_edit = noises.fold(keys, EDIT)
      conds = conditions.sampling(
        told, groups, asked, of_edit, pixels[:-1], settings['aesthetic'])
      encode = lambda x: latent.encode(groups, x, of_edit)
      place = edits.Place(schedule, times, keys, asked, shape, encode, conds, denoise)
      guided = edit.wrap(place, _guided(place, edit, guide, settings, remembers and path))
      times, x = edit.begin(place)
      rows = sampler.plan(schedule, times)
      z = samplers.sample(sampler, guided, rows, x, keys, noise=NOISES[settings['noise']])
      return edit.finish(asked, latent.decode(groups, z))

    def asks(index):
      asked = ask(index) | edit.ask(index, small)
      given = network.told.given
      if given.train and not set(given.needs) <= set(asked):  # of the data's own, as in training
        asked['record'] = network.space.records(index)
      return asked

    said = partial(conditions.said, network.told, prompts)
    return Drawing(asks, draw, said, network.space.decoded)

  return sample


def _sizes(network, edit, settings, path):
  """([h w c] of pictures, of x) that are drawn. Raises ConfigError."""
  space, given, size = network.space, network.told.given, tuple(settings['size'])
  if len(size) not in (0, 2):
    raise ConfigError(f'config.{path}.size={size}: say (height, width) in pixels, () as trained')
  own = given.train and not edit.needs  # the data's own pictures, as in training
  if given.show and not own and not set(given.needs) <= set(edit.needs):
    raise ConfigError(
      f'config.{path}.edit={settings["edit"]["name"]!r}: this network is told a picture; name an '
      'edit that has one, as inpaint, instruct or upscale'
    )
  wanted = settings['edit'].get('noise', 0)
  if wanted > given.noise:
    raise ConfigError(
      f'config.{path}.edit.noise={wanted}: this network was trained to {given.noise} at the most')
  if edit.trained and not given.show:
    raise ConfigError(
      f'config.{path}.edit={settings["edit"]["name"]!r} is for a network that was trained to it '
      "(config.given); of others take image_to_image, inpaint or invert"
    )
  pixels = (*size, space.pixels[-1]) if size else space.pixels
  try:
    return pixels, space.latent.shape(pixels) if space.latent.channels else pixels
  except ConfigError as error:
    raise ConfigError(f'config.{path}.size={size}: {error}') from error


def _latent(latent, settings, path):
  """It, by tiles where the settings say so. Raises ConfigError."""
  tile, factor = settings['tile'], latent.factor
  if not tile:
    return latent
  if not latent.telling or tile < 4 * factor or tile % factor:
    raise ConfigError(
      f'config.{path}.tile={tile}: pixels a side that an autoencoder sees at a time, a multiple of '
      f'its factor {factor}, four at the least; 0 for all at once'
    )
  return latent.tiled(tile // factor)


def _in_space(told, latent):
  """What is told, with pictures of `latent`."""
  mean = lambda groups, x: latent.mean(latent.moments(groups, x))
  return told._replace(encode=latent.encode, mean=mean)


def _guided(place, edit, guide, settings, remembers):
  """The denoiser that an edit, or else the settings, make of the conditional one."""
  if edit.guide:
    return edit.guide(place, settings['guidance'])
  cond, null = edit.told(place)
  bound = partial(guide, place.denoise, place.schedule)
  return _remembering(bound, cond, null, remembers) if remembers else bound(cond, null)


def _walk(spec, schedule, path):
  """(sampler, schedule -> times) of a config's `sampler`. Raises ConfigError."""
  sampler = build('diffax.samplers', spec, path=path, skip=('steps', 'calls', 'grid'))
  steps, calls = spec['steps'], spec['calls']
  if steps < 1 or calls < 0:
    name, least = ('steps', 1) if steps < 1 else ('calls', 0)
    raise ConfigError(f'config.{path}.{name}={spec[name]} is less than {least}')

  def grid(schedule, steps):
    return build('diffax.grids', spec['grid'], schedule, steps, path=f'{path}.grid')

  def count(steps):
    try:
      rows = jax.eval_shape(lambda: sampler.plan(schedule, grid(schedule, steps)))
    except ConfigError:  # so few or so many steps the grid does not make
      return 0
    return rows['level'].t.shape[0]

  if calls:  # more steps make more calls, and none makes less than one
    steps = bisect.bisect_left(range(calls + 1), calls, lo=1, key=count)
    near = {n: count(n) for n in (steps - 1, steps) if n and count(n)}
    if not near:
      grid(schedule, calls)  # which says why
    if calls not in near.values():
      made = ' or '.join(f'{made} (steps={n})' for n, made in near.items())
      raise ConfigError(
        f'config.{path}.calls={calls}: no number of steps of {spec["name"]} makes that many; the '
        f'nearest is {made}'
      )
  return sampler, lambda schedule: grid(schedule, steps)


def _guide(settings, path, told):
  """(denoise, schedule, cond, null) -> denoiser, of the settings' guidance and transforms."""
  scale, bounds, spec = settings['guidance'], settings['interval'], settings['guide']
  if len(bounds) not in (0, 2):
    raise ConfigError(f'config.{path}.interval={bounds}: say (low, high), levels sigma / alpha')
  if scale != 1 and not told:
    raise ConfigError(
      f'config.{path}.guidance={scale}: this model takes no condition; only 1 is allowed'
    )
  scaled = builds.takes('diffax.guidance', spec, 'scale', f'{path}.guide')
  if not scaled and (scale != 1 or bounds):
    raise ConfigError(
      f'config.{path}.guidance={scale}, interval={bounds}: {spec["name"]} takes neither but scales '
      f'of its own; leave them at 1.0 and () and set those in {path}.guide'
    )
  if bounds and spec['name'] == 'cfg_pp':
    raise ConfigError(
      f'config.{path}.interval={bounds}: no scale of cfg_pp is no guidance; leave it at ()')
  if bounds and scale != 1:
    scale = guidance.limited(scale, *bounds)

  def guide(denoise, schedule, cond, null):
    offer = dict(denoise=denoise, schedule=schedule, cond=cond, null=null, scale=scale)
    made = build('diffax.guidance', spec, path=f'{path}.guide', offer=offer)
    for name, more in settings['transforms'].items():
      offer = dict(denoise=made, schedule=schedule)
      made = build('diffax.guidance', more, path=f'{path}.transforms.{name}', offer=offer)
    return made

  return guide


def _remembering(guide, cond, null, path):
  """The guided denoiser of a self-conditioned network, whose branches see one estimate before."""

  def denoise(x, level, before):
    made = guide({**cond, 'before': before}, {**null, 'before': before})
    if isinstance(made, samplers.Denoiser):
      raise ConfigError(
        f'config.{path}.guide: this guidance remembers, and a self-conditioned network does '
        'already: choose another, as cfg'
      )
    return made(x, level)

  return couplings.remember(denoise)
