"""UCI handwritten digits, 8x8, by class: a DiT learns to draw them in two minutes on a laptop.

  python -m diffax.main --config configs/digits.py --workdir runs/digits
  python -m diffax.main --workdir runs/digits --mode sample
"""

from typing import Literal

from ml_collections import ConfigDict


def get_config(variant: Literal['full', 'smoke'] = 'full'):
  c = ConfigDict()
  c.seed = 0
  c.steps = 2_000
  c.batch_size = 256

  c.data = dict(name='digits', split='train')
  c.task = dict(name='generate', drop_cond=0.1)

  c.schedule = dict(name='linear')  # x_t = (1 - t) x0 + t eps
  c.prediction = dict(name='velocity')
  c.loss = dict(time=dict(name='logit_normal'), weight=dict(name='uniform'))
  c.model = dict(name='dit', patch=2, width=96, depth=4, heads=4, classes=10)

  c.optimizer = dict(name='adamw', b2=0.99, weight_decay=0., clip=1.)
  c.learning_rate = dict(name='warmup_cosine_decay_schedule', init_value=0., peak_value=3e-3,
                         warmup_steps=200, decay_steps=2_000, end_value=0.)
  c.ema = (0.995,)

  c.log_every = 50
  c.save_every = 500
  sampler = dict(name='heun', steps=20)
  c.evals = dict(samples=dict(name='grid', every=500, sampler=sampler, guidance=1.))
  c.sample = dict(count=1000, batch_size=250, sampler=sampler, guidance=1.)

  if variant == 'smoke':
    c.steps, c.batch_size, c.log_every, c.save_every = 20, 32, 5, 10
    c.model.update(width=32, depth=2, heads=2)
    c.learning_rate.update(warmup_steps=5, decay_steps=20)
    c.evals.samples.update(every=10, rows=2, sampler=dict(name='heun', steps=4))
    c.sample.update(count=20, batch_size=10, sampler=dict(name='heun', steps=4))
  return c
