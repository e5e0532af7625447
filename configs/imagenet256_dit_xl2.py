"""ImageNet, 256x256, by class, in the latents of an autoencoder: DiT-XL/2 of Peebles & Xie 2023.

  python -m diffax.main --config configs/imagenet256_dit_xl2.py --mode encode \\
    --workdir data/imagenet256_latents/train --config.data=folder --config.data.size=256 \\
    --config.data.flip --config.data.path=/data/imagenet/train        # and validation/ alike
  python -m diffax.main --config configs/imagenet256_dit_xl2.py --workdir runs/dit_xl2

64 GPUs or TPU chips; 7 M steps of 256, 1.3e21 FLOP: two and a half days at 100 TFLOP/s a chip. To
reach: FID 2.27 with guidance 1.5 and 250 steps, from 50000 samples (table 2). Not run here.

data/sd_vae is Stable Diffusion's autoencoder in diffusers' layout (sd-vae-ft-ema), by which the
first command makes the latents that the second draws from.

What differs from the paper: times are drawn from the whole of [0, 1] and not only from the 1000
places of the table, and guidance acts on all channels where the paper's code guides three.
"""

from typing import Literal

from ml_collections import ConfigDict


def get_config(variant: Literal['full', 'smoke'] = 'full'):
  c = ConfigDict()
  c.seed = 0
  c.steps = 7_000_000
  c.batch_size = 256

  c.data = dict(
    name='latents', path='data/imagenet256_latents', split='train', flip=True, workers=4
  )
  c.latent = dict(name='autoencoder', path='data/sd_vae')
  c.task = dict(name='generate', drop_cond=0.1)

  c.schedule = dict(name='linear_table')
  c.prediction = dict(name='learned_range', of=dict(name='eps'))
  c.loss = dict(time=dict(name='uniform'), weight=dict(name='uniform'))  # and 0.001 of the bound
  c.model = dict(name='dit_preset', preset='XL/2', classes=1000, dtype='bfloat16')

  c.optimizer = dict(name='adamw', weight_decay=0.0)
  c.learning_rate = 1e-4
  c.ema = (0.9999,)

  c.log_every = 100
  c.save_every = 10_000
  c.keep = dict(last=2, every=500_000)
  sampler = dict(name='ddpm', variance='learned', steps=250, grid=dict(name='linspace'))
  c.evals = dict(
    samples=dict(name='grid', every=50_000, sampler=sampler, guidance=4.0),
    held_out=dict(name='validation', every=10_000, split='validation', sigma_data=1.0),
  )
  c.sample = dict(count=50_000, batch_size=512, sampler=sampler, guidance=1.5)

  if variant == 'smoke':  # on digits, for which nothing is to be encoded
    c.steps, c.batch_size, c.log_every, c.save_every = 4, 16, 2, 4
    c.data, c.latent = dict(name='digits', split='train'), dict(name='none')
    c.model = dict(name='dit', patch=4, width=32, depth=2, heads=2, classes=10)
    c.evals.samples.update(every=4, rows=1, batch_size=8)
    c.evals.held_out.update(every=0, split='test')
    c.evals.samples.sampler.steps = c.sample.sampler.steps = 2
    c.sample.update(count=4, batch_size=8)
  return c
