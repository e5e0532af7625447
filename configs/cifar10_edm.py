"""CIFAR-10, 32x32, by class: DDPM++ with EDM's preconditioning, of Karras et al. 2022.

  python -m diffax.main --config configs/cifar10_edm.py --workdir runs/cifar10_edm
  python -m diffax.main --config configs/cifar10_edm.py --workdir runs/u --config.model.classes=0
  python -m diffax.main --config configs/cifar10_edm.py:cpu --workdir runs/cifar10_cpu

`full`: 8 GPUs, 200 M images, 2.5e19 FLOP: nine hours at 100 TFLOP/s a GPU. To reach: FID 1.79 by
class, 1.97 without, by 18 steps of Heun (table 2, VP); the settings are those of table 7. Not run.
`cpu`: 80 minutes of one CPU core to a Fréchet distance of 3.1 (real images: 0.2) in features of a
classifier of its own: colours of the classes; experiments/cifar10_edm_cpu, and cifar10_edm.

What differs from the paper: its non-leaking augmentation, which the numbers above are with, is not
there yet; images are mirrored instead. Its average of weights begins with a shorter memory. FID
needs the weights of Inception (see `diffax.features.inception`), and 50000 samples:

  python -m diffax.main --workdir runs/cifar10_edm --mode evaluate --evals quality \\
    --config.evals.quality.features.name=inception --config.evals.quality.count=50000 \\
    --config.evals.quality.features.weights=inception.safetensors
"""

from typing import Literal

from ml_collections import ConfigDict


def get_config(variant: Literal['full', 'cpu', 'smoke'] = 'full'):
  c = ConfigDict()
  c.seed = 0
  c.steps = 390_625  # of 512: 200 M images
  c.batch_size = 512

  c.data = dict(name='tfds', dataset='cifar10', split='train', flip=True, workers=4)
  c.task = dict(name='generate', drop_cond=0.0)

  c.schedule = dict(name='edm')
  c.prediction = dict(name='edm')
  c.loss = dict(time=dict(name='log_normal'), weight=dict(name='edm'))
  c.model = dict(name='ddpmpp', classes=10)

  c.optimizer = dict(name='adam')
  c.learning_rate = dict(  # over 10 M images
    name='warmup_constant_schedule', init_value=0.0, peak_value=1e-3, warmup_steps=19_531
  )
  c.ema = (0.99929,)  # a half-life of 0.5 M images

  c.log_every = 100
  c.save_every = 5_000
  c.keep = dict(last=2, every=50_000)
  sampler = dict(name='heun', steps=18, grid=dict(name='karras'))
  c.evals = dict(
    samples=dict(name='grid', every=10_000, sampler=sampler),
    quality=dict(name='quality', every=50_000, count=10_000, batch_size=1_000, sampler=sampler),
    held_out=dict(name='validation', every=10_000),
  )
  c.sample = dict(count=50_000, batch_size=1_000, sampler=sampler)

  if variant != 'full':  # 0.34 GFLOP forward, three times as much a training image
    c.steps, c.batch_size, c.data.workers = 3_600, 64, 0
    c.task.drop_cond = 0.1
    c.prediction.time_scale = 1000.0
    c.model.update(width=16, multipliers=(1, 3, 4), blocks=1, attention=(8,), dropout=0.0)
    c.optimizer.update(b2=0.99, clip=1.0)
    c.learning_rate = dict(
      name='warmup_cosine_decay_schedule',
      init_value=0.0, peak_value=2e-3, warmup_steps=100, decay_steps=3_600, end_value=0.0,
    )
    c.ema, c.save_every, c.keep = (0.998,), 1_200, dict(last=2)
    c.evals.samples.update(every=1_200, guidance=1.5)
    c.evals.quality.update(every=3_600, count=1_000, batch_size=250)
    c.evals.held_out.update(every=1_200)
    c.sample.update(count=1_000, batch_size=250)
  if variant == 'smoke':
    c.steps, c.batch_size, c.log_every, c.save_every, c.data.size = 4, 16, 2, 4, 8
    c.model.update(width=8, multipliers=(1,), attention=())
    c.evals.samples.update(
      every=4, rows=1, batch_size=8, guidance=1.0, sampler=dict(name='heun', steps=2)
    )
    c.evals.quality.every = c.evals.held_out.every = 0
    c.sample.update(count=4, batch_size=8, sampler=dict(name='heun', steps=2))
  return c
