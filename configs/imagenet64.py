"""ImageNet, 64x64, by class: EDM2-S of Karras et al. 2024.

  python -m diffax.main --config configs/imagenet64.py --workdir runs/imagenet64

32 GPUs; 524288 steps of 2048, a thousand M images, 6.5e20 FLOP: two and a half days at 100 TFLOP/s
a GPU; where memory is short, `--config.accumulate=2`. To reach: FID 1.58 by 32 steps of Heun,
without guidance (table 3), at the best width of the average. The settings are those of table 6.
Not run here.

The data is the TFDS set `imagenet_resized/64x64`, prepared under $DIFFAX_DATA/tfds; it was reduced
by another filter than the paper's, which FID sees. FID needs the weights of Inception (see
`diffax.features.inception`), and a width of one's own choice, as power_0.075 here:

  python -m diffax.main --workdir runs/imagenet64 --mode evaluate --evals quality \\
    --config.evals.quality.features.name=inception --config.evals.quality.count=50000 \\
    --config.evals.quality.features.weights=inception.safetensors \\
    --config.evals.quality.ema=power_0.075
"""

from typing import Literal

from ml_collections import ConfigDict


def get_config(variant: Literal['full', 'smoke'] = 'full'):
  c = ConfigDict()
  c.seed = 0
  c.steps = 524_288
  c.batch_size = 2048

  c.data = dict(
    name='tfds', dataset='imagenet_resized/64x64', split='train', flip=True, workers=16
  )
  c.task = dict(name='generate', drop_cond=0.0)

  c.schedule = dict(name='edm')
  c.prediction = dict(name='edm')
  c.loss = dict(
    time=dict(name='log_normal', mean=-0.8, std=1.6), weight=dict(name='edm'), uncertainty=128
  )
  c.model = dict(name='edm2_preset', preset='S', classes=1000, dtype='bfloat16')

  c.optimizer = dict(name='adam', b2=0.99, unit_kernels='kernel$')
  c.learning_rate = dict(  # rises over 10 M images
    name='diffax.optim.inverse_sqrt', peak_value=0.01, reference_steps=35_000, warmup_steps=4_883
  )
  c.ema = ('power_0.05', 'power_0.1')

  c.log_every = 100
  c.save_every = 2_048
  c.keep = dict(last=2, averages=4_096)  # every 8 M images
  sampler = dict(name='heun', steps=32, grid=dict(name='karras'))
  c.evals = dict(
    samples=dict(name='grid', every=8_192, sampler=sampler),
    quality=dict(
      name='quality', every=65_536, count=10_000, split='validation', batch_size=1_024,
      sampler=sampler,
    ),
    held_out=dict(name='validation', every=8_192, split='validation', count=5_000),
  )
  c.sample = dict(count=50_000, batch_size=1_024, sampler=sampler)

  if variant == 'smoke':  # on digits, for which nothing is to be prepared
    c.steps, c.batch_size, c.log_every, c.save_every = 4, 16, 2, 4
    c.data = dict(name='digits', split='train')
    c.model = dict(
      name='edm2', width=16, multipliers=(1,), blocks=1, attention=(), head=16, classes=10
    )
    c.keep.averages = 2
    c.evals.samples.update(every=4, rows=1, batch_size=8, sampler=dict(name='heun', steps=2))
    c.evals.quality.update(every=0, split='test')
    c.evals.held_out.update(every=0, split='test')
    c.sample.update(count=4, batch_size=8, sampler=dict(name='heun', steps=2))
  return c
