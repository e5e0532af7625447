"""Generation: a network learns to denoise, samplers make data of noise; by class or without."""

from functools import partial

import einops
import jax
import jax.numpy as jnp

from diffax import guidance
from diffax import losses
from diffax import predictions
from diffax import samplers
from diffax.build import build, ConfigError
from diffax.tasks import Task


def generate(config, source, drop_cond=0.1) -> Task:
  """Trains on `source` by the config's schedule, prediction, loss and model.

  drop_cond: how often the condition is replaced by the null label, for classifier-free guidance
  (Ho & Salimans 2022, algorithm 1, p_uncond).
  """
  if not 0 <= drop_cond <= 1:
    raise ConfigError(f'config.task.drop_cond={drop_cond} is outside [0, 1]')
  schedule = build('diffax.schedules', config['schedule'], path='schedule')
  prediction = build('diffax.predictions', config['prediction'], schedule, path='prediction')
  try:
    predictions.check(prediction, schedule, config['prediction']['name'])
  except ValueError as error:
    raise ConfigError(f'config.prediction: {error}') from error
  law = build('diffax.times', config['loss']['time'], schedule, path='loss.time')
  weight = build('diffax.losses', config['loss']['weight'], path='loss.weight')
  model = build('diffax.models', config['model'], path='model')
  classes = config['model'].get('classes', 0)
  if classes not in (0, source.classes):
    raise ConfigError(
      f'config.model.classes={classes}, but the data has {source.classes} classes: say '
      f'{source.classes}, or 0 to ignore them'
    )
  size = config['data']['size']
  shape = (size, size, source.shape[-1]) if size else tuple(source.shape)
  if None in shape:
    raise ConfigError(
      f'data {config["data"]["name"]!r} has images of several sizes: say --config.data.size=N'
    )

  def predict(params, x, level, cond, keys=None):
    """The network's raw output; it is told its input and time in the prediction's convention."""
    times = jnp.broadcast_to(prediction.clock(level), (len(x), *[1] * (x.ndim - 1)))
    times = einops.rearrange(times, 'b ' + '1 ' * (x.ndim - 1) + '-> b')
    return model.apply(
      {'params': params['net']}, prediction.c_in(level) * x, times, cond, keys=keys
    )

  def init(key):
    cond = {'label': jnp.zeros(1, jnp.int32)} if classes else {}
    return {'net': model.init(key, jnp.zeros((1, *shape)), jnp.zeros(1), cond)['params']}

  def loss(params, state, batch, keys):
    del state
    k = jax.vmap(partial(jax.random.split, num=4))(keys)  # [b 4]: time, noise, condition, network
    t = law(jax.vmap(jax.random.uniform)(k[:, 0]))
    eps = samplers.normal(k[:, 1], shape)
    cond = {}
    if classes:
      dropped = jax.vmap(lambda key: jax.random.bernoulli(key, drop_cond))(k[:, 2])
      cond = {'label': jnp.where(dropped, classes, batch['label'])}
    bound = lambda x, level: predict(params, x, level, cond, k[:, 3])
    each = losses.diffusion_loss(bound, schedule, prediction, weight, batch['image'], eps, t)
    return each, {'t': t, 'noise': schedule(t).nsr}

  def sample(settings, path):
    spec = settings['sampler']
    if spec['steps'] < 1:
      raise ConfigError(f'config.{path}.sampler.steps={spec["steps"]} is less than 1')
    sampler = build('diffax.samplers', spec, path=f'{path}.sampler', skip=('steps', 'grid'))
    ts = build('diffax.grids', spec['grid'], schedule, spec['steps'], path=f'{path}.sampler.grid')
    scale, (low, high) = settings['guidance'], settings['interval'] or (0.0, jnp.inf)
    if scale != 1 and not classes:
      raise ConfigError(
        f'config.{path}.guidance={scale}: this model takes no condition; only 1 is allowed'
      )

    def draw(params, keys, label):
      def denoise(x, level, cond):
        return predictions.solve(prediction, predict(params, x, level, cond), x, level)

      cond = {'label': label} if classes else {}
      null = {'label': jnp.full_like(label, classes)} if classes else {}
      guided = guidance.cfg(denoise, cond, null, scale, low, high)
      x = samplers.initial(schedule, ts, keys, shape)
      return samplers.sample(sampler, guided, sampler.plan(schedule, ts), x, keys)

    return draw

  return Task(init, loss, sample, classes)
