"""CIFAR-10, 32x32, by class: DiT-S/2 on straight flows.

  python -m diffax.main --config configs/cifar10_dit.py --workdir runs/cifar10_dit

One GPU; 400000 steps of 256, 3.7e18 FLOP: ten hours at 100 TFLOP/s. Not run here, and no paper has
this network on this data; Lipman et al. 2022, "Flow Matching", table 1, reach FID 6.35 without
classes by straight flows and a U-Net. Times are drawn by the logit-normal law of Esser et al. 2024.
"""

from typing import Literal

from ml_collections import ConfigDict


def get_config(variant: Literal['full', 'smoke'] = 'full'):
  c = ConfigDict()
  c.seed = 0
  c.steps = 400_000
  c.batch_size = 256

  c.data = dict(name='tfds', dataset='cifar10', split='train', flip=True, workers=4)
  c.task = dict(name='generate', drop_cond=0.1)

  c.schedule = dict(name='linear')  # x_t = (1 - t) x0 + t eps
  c.prediction = dict(name='velocity')
  c.loss = dict(time=dict(name='logit_normal'), weight=dict(name='uniform'))
  c.model = dict(name='dit_preset', preset='S/2', classes=10, dropout=0.1, dtype='bfloat16')

  c.optimizer = dict(name='adamw', b2=0.99, weight_decay=0.0, clip=1.0)
  c.learning_rate = dict(
    name='warmup_constant_schedule', init_value=0.0, peak_value=3e-4, warmup_steps=5_000
  )
  c.ema = (0.999, 0.9999)

  c.log_every = 100
  c.save_every = 5_000
  c.keep = dict(last=2, every=50_000)
  sampler = dict(name='heun', steps=25)
  c.evals = dict(
    samples=dict(name='grid', every=10_000, sampler=sampler, guidance=1.5),
    quality=dict(name='quality', every=50_000, count=10_000, batch_size=1_000, sampler=sampler),
    held_out=dict(name='validation', every=10_000),
  )
  c.sample = dict(count=50_000, batch_size=1_000, sampler=sampler)

  if variant == 'smoke':
    c.steps, c.batch_size, c.log_every, c.save_every = 4, 16, 2, 4
    c.data.update(workers=0, size=8)
    c.model = dict(name='dit', patch=4, width=32, depth=2, heads=2, classes=10)
    c.evals.samples.update(every=4, rows=1, batch_size=8, sampler=dict(name='heun', steps=2))
    c.evals.quality.every = c.evals.held_out.every = 0
    c.sample.update(count=4, batch_size=8, sampler=dict(name='heun', steps=2))
  return c
