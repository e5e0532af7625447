"""Fashion-MNIST, 28x28 grey, by class: a U-Net with EDM's preconditioning.

  python -m diffax.main --config configs/fashion_mnist_unet.py --workdir runs/fashion_mnist_unet
  python -m diffax.main --config configs/fashion_mnist_unet.py:cpu --workdir runs/fashion_mnist_cpu

`full`: one GPU; 1.5e17 FLOP, half an hour at 100 TFLOP/s; not run. `cpu`: one CPU core, some 70
minutes of training, to a Fréchet distance of 1.5 (real images: 0.2) in the features of a classifier
of its own, and clothes that look like clothes: experiments/fashion_mnist_unet_cpu. Its U-Net is
narrow at 28x28 and has most of its channels at 14x14 and 7x7.

The data is the TFDS set `fashion_mnist`, prepared under $DIFFAX_DATA/tfds. What is measured, every
so often and at the end: a grid, the distances and shares of `quality` by a classifier trained on
the data, and the held-out loss by noise level.
"""

from typing import Literal

from ml_collections import ConfigDict


def get_config(variant: Literal['full', 'cpu', 'smoke'] = 'full'):
  c = ConfigDict()
  c.seed = 0
  c.steps = 50_000
  c.batch_size = 256

  c.data = dict(name='tfds', dataset='fashion_mnist', split='train', flip=True, workers=2)
  c.task = dict(name='generate', drop_cond=0.1)

  c.schedule = dict(name='edm')
  c.prediction = dict(name='edm', sigma_data=0.7, time_scale=1000.0)  # pixels' deviation is 0.706
  c.loss = dict(
    time=dict(name='log_normal', mean=-0.8, std=1.2), weight=dict(name='edm', sigma_data=0.7)
  )
  c.model = dict(
    name='unet', width=64, multipliers=(1, 2, 4), attention=(14, 7), head_width=64, classes=10,
    dropout=0.1, dtype='bfloat16',
  )

  c.optimizer = dict(name='adam', b2=0.99, clip=1.0)
  c.learning_rate = dict(
    name='warmup_cosine_decay_schedule',
    init_value=0.0, peak_value=1e-3, warmup_steps=1_000, decay_steps=50_000, end_value=0.0,
  )
  c.ema = (0.999, 0.9999)

  c.log_every = 100
  c.save_every = 5_000
  sampler = dict(name='heun', steps=18, grid=dict(name='karras'))
  c.evals = dict(
    samples=dict(name='grid', every=5_000, sampler=sampler),
    quality=dict(name='quality', every=25_000, count=10_000, batch_size=500, sampler=sampler),
    held_out=dict(name='validation', every=5_000, sigma_data=0.7),
  )
  c.sample = dict(count=1_000, batch_size=250, sampler=sampler)

  if variant != 'full':  # 0.20 GFLOP forward, three times as much a training image
    c.steps, c.batch_size, c.data.workers = 5_000, 64, 0
    c.model = dict(
      name='unet', width=16, multipliers=(1, 3, 4), blocks=1, attention=(7,), resample='conv',
      classes=10,
    )
    c.learning_rate.update(peak_value=2e-3, warmup_steps=100, decay_steps=5_000)
    c.ema, c.save_every = (0.998,), 1_000
    c.evals.samples.update(every=1_000, guidance=1.5)
    c.evals.quality.update(every=5_000, count=1_000, batch_size=250)
    c.evals.held_out.update(every=2_500)
  if variant == 'smoke':
    c.steps, c.batch_size, c.log_every, c.save_every, c.data.size = 4, 16, 2, 4, 8
    c.model.update(width=8, multipliers=(1, 2), attention=())
    c.evals.samples.update(
      every=4, rows=1, batch_size=8, guidance=1.0, sampler=dict(name='heun', steps=2)
    )
    c.evals.quality.every = c.evals.held_out.every = 0
    c.sample.update(count=4, batch_size=8, sampler=dict(name='heun', steps=2))
  return c
