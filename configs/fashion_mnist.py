"""Fashion-MNIST, 28x28 grey, by class: DiT-S/2 on straight flows, for one GPU.

  python -m diffax.main --config configs/fashion_mnist.py --workdir runs/fashion_mnist
  python -m diffax.main --config configs/fashion_mnist.py:smoke --workdir runs/smoke

The data is the TFDS set `fashion_mnist`, prepared under $DIFFAX_DATA/tfds. The full run was not
made yet: no number to reach stands here until one is.
"""

from typing import Literal

from ml_collections import ConfigDict


def get_config(variant: Literal['full', 'smoke'] = 'full'):
  c = ConfigDict()
  c.seed = 0
  c.steps = 50_000
  c.batch_size = 256

  c.data = dict(name='tfds', dataset='fashion_mnist', split='train', flip=True, workers=4)
  c.task = dict(name='generate', drop_cond=0.1)

  c.schedule = dict(name='linear')  # x_t = (1 - t) x0 + t eps
  c.prediction = dict(name='velocity')
  c.loss = dict(time=dict(name='logit_normal'), weight=dict(name='uniform'))
  c.model = dict(name='dit_preset', preset='S/2', classes=10, dtype='bfloat16')

  c.optimizer = dict(name='adamw', b2=0.99, weight_decay=0.0, clip=1.0)
  c.learning_rate = dict(
    name='warmup_constant_schedule', init_value=0.0, peak_value=3e-4, warmup_steps=1_000
  )
  c.ema = (0.999, 0.9999)

  c.log_every = 100
  c.save_every = 5_000
  c.keep = dict(last=2, every=25_000)
  sampler = dict(name='heun', steps=25)
  c.evals = dict(samples=dict(name='grid', every=5_000, sampler=sampler, guidance=1.5))
  c.sample = dict(count=1_000, batch_size=250, sampler=sampler, guidance=1.5)

  if variant == 'smoke':
    c.steps, c.batch_size, c.log_every, c.save_every = 10, 16, 5, 5
    c.data.workers = 0
    c.model = dict(name='dit', patch=4, width=32, depth=2, heads=2, classes=10)
    c.learning_rate.warmup_steps = 5
    c.evals.samples.update(every=5, rows=1, batch_size=10, sampler=dict(name='heun', steps=4))
    c.sample.update(count=4, batch_size=4, sampler=dict(name='heun', steps=4))
  return c
