"""How good samples are: distances and shares in the space of a feature network, beside real images.

Every number of the samples stands beside that of as many held-out real images, NAME_real: what
samples as good as new data would have. Distances of finite sets depend on their counts, so that
they say nothing alone.
"""

import hashlib
import json

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from diffax import build as builds
from diffax import hosts
from diffax import references
from diffax import sample
from diffax.build import build, ConfigError
from diffax.evals import Evaluation

STANDARD = (
  'frechet', 'spatial_frechet', 'kernel', 'precision_recall', 'density_coverage',
  'inception_score', 'class_accuracy', 'memorisation',
)
EMBEDDED = dict(name='classifier')
PART = 1000  # samples after which an interrupted evaluation need not draw them again


def quality(
  run, path, count=10_000, split='test', features=EMBEDDED, metrics=STANDARD, reference='',
  **settings,
) -> Evaluation:
  """Metrics of `count` samples against the data of training.

  split: of the held-out images. features: a feature network of `diffax.features`. metrics: of
  `diffax.metrics`; of the standard ones, those that need what network or data do not tell are left
  out. reference: a file for what is known of the training data, '' for one in the cache; one of
  other data, preprocessing or features is an error. settings: those of a config's `sample` section.
  """
  entry = path.rpartition('.')[2]
  if count < 2:
    raise ConfigError(f'config.{path}.count={count}: distances need 2 samples and more')
  if run.source.dtype != np.uint8:
    raise ConfigError(f'config.{path}: the data is {run.source.dtype}; feature networks see pixels')
  size, held_out = run.config['data']['size'], references.other(run, split, path)
  draw = sample.drawer(run, settings, path)
  network = build('diffax.features', features, run.source, held_out, size, path=f'{path}.features')
  wanted = _wanted(metrics, network, run.task.classes, f'{path}.metrics')
  known = {}  # what is computed once: of the network, and of real images

  def measure(spec, fake):
    offer = dict(fake=fake, real=known['real'], held_out=known['held_out'])
    return build('diffax.metrics', spec, path=f'{path}.metrics', offer=offer)

  def prepare():
    if 'embed' in known:
      return
    params, identity = network.load()
    embed = references.embedder(network, params, run.mesh, settings['batch_size'])
    file = epath.Path(reference) if reference else None
    part = run.config['data'].get('split', 'train')
    known['real'] = references.of(run, run.source, part, embed, identity, file, ('pool', 'label'))
    known['held_out'] = references.of(run, held_out, split, embed, identity)
    same = references.first(known['held_out'], count)
    new = [spec for spec in wanted if not builds.takes('diffax.metrics', spec, 'held_out', path)]
    known['of_real'] = {k: v for spec in new for k, v in measure(spec, same).items()}
    known.update(embed=embed, identity=identity)

  def evaluate(state, folder):
    prepare()
    kept, part = [], max(PART, settings['batch_size'])
    digest = _digest(run, state, settings, known['identity'])
    for start in range(0, count, part):
      file = folder / f'{digest}-{start:08d}.npz'
      found = references.read(file, {}) if file.exists() else None
      if not hosts.every(found is not None):
        pictures, asked = draw(state, min(part, count), start)
        label = asked.get('label', np.zeros(len(pictures), np.int32))
        found = known['embed'](len(pictures), lambda i, x=pictures, y=label: (x[i], y[i]))
        found = found if run.task.classes else found._replace(label=None)
        if hosts.first():
          references.write(file, found, {})
      kept.append(found)
      yield None
    fake = references.first(jax.tree.map(lambda *xs: np.concatenate(xs), *kept), count)
    for spec in wanted:
      for name, value in measure(spec, fake).items():
        yield f'{entry}/{name}', value
        if name in known['of_real']:
          yield f'{entry}/{name}_real', known['of_real'][name]

  return Evaluation(evaluate, prepare)


def _wanted(metrics, network, classes, path):
  """The metrics' specs. Raises ConfigError where one needs what is not there."""
  lacks = {
    'spatial_frechet': 'spatial' not in network.gives,
    'inception_score': 'logits' not in network.gives,
    'class_accuracy': not classes or network.classes != classes,
  }
  wanted = [spec for spec in metrics.values() if not lacks.get(spec['name'])]
  if len(wanted) < len(metrics) and tuple(metrics) != STANDARD:
    left = [spec['name'] for spec in metrics.values() if lacks.get(spec['name'])]
    raise ConfigError(
      f'config.{path}: {left[0]} needs what this feature network does not tell of this data; leave '
      'it out, or take another network (features=classifier knows the classes)'
    )
  return wanted


def _digest(run, state, settings, identity):
  """A name for samples: of their settings, the feature network and the very parameters."""
  params = sample.choose(state, settings['ema'] or sample.last(run.like))
  sums = jax.jit(lambda tree: jnp.stack([jnp.abs(x).sum() for x in jax.tree.leaves(tree)]))
  text = json.dumps([settings, identity], sort_keys=True)
  return hashlib.sha256(text.encode() + np.asarray(sums(params)).tobytes()).hexdigest()[:12]
