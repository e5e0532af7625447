"""CIFAR-10, 32x32, by class: the network of EDM2 at the size of DDPM++.

  python -m diffax.main --config configs/cifar10_edm2.py --workdir runs/cifar10_edm2

8 GPUs, 200 M images, 2.5e19 FLOP: nine hours at 100 TFLOP/s a GPU. Not run here, and Karras et al.
2024 have no CIFAR-10: what to compare with is configs/cifar10_edm.py, of as many FLOP an image.

From the paper: magnitudes kept by every layer, kernels held at unit variance, a learned uncertainty
that weighs the noise levels, a rate that falls as 1 / sqrt(step), and power-function averages. Of
the two kept any other width is made after training, as with

  python -m diffax.main --workdir runs/cifar10_edm2 --mode evaluate --evals quality \\
    --config.evals.quality.ema=power_0.13

Scaled by us: three levels (1, 2, 2) of width 192, dropout as in EDM, and the step from which the
rate falls, the same share of a run of this length.
"""

from typing import Literal

from ml_collections import ConfigDict


def get_config(variant: Literal['full', 'smoke'] = 'full'):
  c = ConfigDict()
  c.seed = 0
  c.steps = 390_625  # of 512: 200 M images
  c.batch_size = 512

  c.data = dict(name='tfds', dataset='cifar10', split='train', flip=True, workers=4)
  c.task = dict(name='generate', drop_cond=0.0)

  c.schedule = dict(name='edm')
  c.prediction = dict(name='edm')
  c.loss = dict(time=dict(name='log_normal'), weight=dict(name='edm'), uncertainty=128)
  c.model = dict(
    name='edm2', width=192, multipliers=(1, 2, 2), attention=(16, 8), classes=10, dropout=0.13,
    dtype='bfloat16',
  )

  c.optimizer = dict(name='adam', b2=0.99, unit_kernels='kernel$')
  c.learning_rate = dict(  # rises over 10 M images
    name='diffax.optim.inverse_sqrt', peak_value=0.01, reference_steps=26_000, warmup_steps=19_531
  )
  c.ema = ('power_0.05', 'power_0.1')

  c.log_every = 100
  c.save_every = 5_000
  c.keep = dict(last=2, averages=16_384)  # every 8 M images
  sampler = dict(name='heun', steps=18, grid=dict(name='karras'))
  c.evals = dict(
    samples=dict(name='grid', every=10_000, sampler=sampler),
    quality=dict(name='quality', every=50_000, count=10_000, batch_size=1_000, sampler=sampler),
    held_out=dict(name='validation', every=10_000),
  )
  c.sample = dict(count=50_000, batch_size=1_000, sampler=sampler)

  if variant == 'smoke':
    c.steps, c.batch_size, c.log_every, c.save_every = 4, 16, 2, 4
    c.data.update(workers=0, size=8)
    c.keep.averages = 2
    c.model.update(width=16, multipliers=(1,), blocks=1, attention=(), head=16, dtype='float32')
    c.evals.samples.update(every=4, rows=1, batch_size=8, sampler=dict(name='heun', steps=2))
    c.evals.quality.every = c.evals.held_out.every = 0
    c.sample.update(count=4, batch_size=8, sampler=dict(name='heun', steps=2))
  return c
