"""CelebA, 64x64, without classes: a U-Net of ADM's kind on DDPM's table of noise.

  python -m diffax.main --config configs/celeba64.py --workdir runs/celeba64

8 GPUs; 500000 steps of 128, 1.4e19 FLOP: five hours at 100 TFLOP/s a GPU. Not run here. To compare
with: FID 3.51 by 1000 steps and 6.53 by 100 (Song et al. 2021, "DDIM", table 1, eta 0), of DDPM's
network and the centre 140 pixels of each image; here it is the centre square of 178.

The data is the TFDS set `celeb_a`, prepared under $DIFFAX_DATA/tfds. It has no classes to train a
classifier on, so FID needs the weights of Inception (see `diffax.features.inception`):

  python -m diffax.main --workdir runs/celeba64 --mode evaluate --evals quality \\
    --config.evals.quality.name=quality --config.evals.quality.count=50000 \\
    --config.evals.quality.features.name=inception \\
    --config.evals.quality.features.weights=inception.safetensors
"""

from typing import Literal

from ml_collections import ConfigDict


def get_config(variant: Literal['full', 'smoke'] = 'full'):
  c = ConfigDict()
  c.seed = 0
  c.steps = 500_000
  c.batch_size = 128

  c.data = dict(
    name='tfds', dataset='celeb_a', split='train', size=64, flip=True, workers=8
  )
  c.task = dict(name='generate')

  c.schedule = dict(name='linear_table')
  c.prediction = dict(name='eps')
  c.loss = dict(time=dict(name='uniform'), weight=dict(name='uniform'))
  c.model = dict(
    name='adm', width=128, blocks=2, attention=(16, 8), dropout=0.1, dtype='bfloat16'
  )

  c.optimizer = dict(name='adam', clip=1.0)
  c.learning_rate = dict(
    name='warmup_constant_schedule', init_value=0.0, peak_value=1e-4, warmup_steps=5_000
  )
  c.ema = (0.9999,)

  c.log_every = 100
  c.save_every = 5_000
  c.keep = dict(last=2, every=50_000)
  sampler = dict(name='ddim', steps=100)
  c.evals = dict(
    samples=dict(name='grid', every=10_000, sampler=sampler),
    held_out=dict(name='validation', every=10_000),
  )
  c.sample = dict(count=50_000, batch_size=500, sampler=sampler)

  if variant == 'smoke':  # on digits, for which nothing is to be prepared
    c.steps, c.batch_size, c.log_every, c.save_every = 4, 16, 2, 4
    c.data = dict(name='digits', split='train')
    c.model = dict(name='unet', width=8, multipliers=(1,), blocks=1)
    c.evals.samples.update(every=4, rows=1, batch_size=8, sampler=dict(name='ddim', steps=2))
    c.evals.held_out.every = 0
    c.sample.update(count=4, batch_size=8, sampler=dict(name='ddim', steps=2))
  return c
