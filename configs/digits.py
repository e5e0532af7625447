"""UCI handwritten digits, 8x8, by class: a DiT learns to draw them in two minutes on a laptop.

  python -m diffax.main --config configs/digits.py --workdir runs/digits
  python -m diffax.main --workdir runs/digits --mode sample
  python experiments/digits/judge.py runs/digits/samples.npz

Two CPU cores, less than 2 GB. To reach, with the same 1000 samples: a classifier of real digits
recognises 98 of 100, and the other bounds of experiments/digits/README.md.
"""

from typing import Literal

from ml_collections import ConfigDict


def get_config(variant: Literal['full', 'smoke'] = 'full'):
  c = ConfigDict()
  c.seed = 0
  c.steps = 3_000
  c.batch_size = 64

  c.data = dict(name='digits', split='train')
  c.task = dict(name='generate', drop_cond=0.1)

  c.schedule = dict(name='ve', sigma_min=0.01, sigma_max=20.0)  # EDM: x_t = x0 + t eps
  c.prediction = dict(name='edm', sigma_data=0.7, time_scale=1000.0)
  c.loss = dict(
    time=dict(name='log_normal', mean=-0.6, std=1.2), weight=dict(name='edm', sigma_data=0.7)
  )
  c.model = dict(name='dit', patch=2, width=64, depth=4, heads=4, classes=10)

  c.optimizer = dict(name='adam', b2=0.99, clip=1.0)
  c.learning_rate = dict(
    name='warmup_cosine_decay_schedule',
    init_value=0.0, peak_value=8e-3, warmup_steps=100, decay_steps=3_000, end_value=0.0,
  )
  c.ema = (0.997,)

  c.log_every = 50
  c.save_every = 1_000
  sampler = dict(name='heun', steps=12, grid=dict(name='karras'))
  c.evals = dict(samples=dict(name='grid', every=1_000, sampler=sampler, guidance=1.125))
  c.sample = dict(count=1000, batch_size=250, sampler=sampler, guidance=1.125)

  if variant == 'smoke':
    c.steps, c.batch_size, c.log_every, c.save_every = 20, 32, 5, 10
    c.model.update(width=32, depth=2, heads=2)
    c.learning_rate.update(warmup_steps=5, decay_steps=20)
    c.evals.samples.update(every=10, rows=2, sampler=dict(name='heun', steps=4))
    c.sample.update(count=20, batch_size=10, sampler=dict(name='heun', steps=4))
  return c
