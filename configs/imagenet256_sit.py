"""ImageNet, 256x256, by class, in the latents of an autoencoder: SiT-XL/2 of Ma et al. 2024.

  python -m diffax.main --config configs/imagenet256_sit.py --mode encode \\
    --workdir data/imagenet256_latents/train --config.data=folder --config.data.size=256 \\
    --config.data.flip --config.data.path=/data/imagenet/train        # and validation/ alike
  python -m diffax.main --config configs/imagenet256_sit.py --workdir runs/sit_xl2

64 GPUs or TPU chips; 7 M steps of 256, 1.3e21 FLOP: two and a half days at 100 TFLOP/s a chip. To
reach: FID 2.06 with guidance 1.5, by 250 steps of Euler-Maruyama on the SDE with w = sigma, from
50000 samples (abstract and the table of state of the art). Not run here.

data/sd_vae is Stable Diffusion's autoencoder in diffusers' layout (sd-vae-ft-ema), by which the
first command makes the latents that the second draws from.

What differs from the paper: guidance acts on all channels where the paper's code guides three, and
the last step, to clean data, is as long as the others and not 0.04.
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

  c.schedule = dict(name='linear')  # x_t = (1 - t) x0 + t eps
  c.prediction = dict(name='velocity')
  c.loss = dict(time=dict(name='uniform'), weight=dict(name='uniform'))
  c.model = dict(name='dit_preset', preset='XL/2', classes=1000, dtype='bfloat16')

  c.optimizer = dict(name='adamw', weight_decay=0.0)
  c.learning_rate = 1e-4
  c.ema = (0.9999,)

  c.log_every = 100
  c.save_every = 10_000
  c.keep = dict(last=2, every=500_000)
  sampler = dict(name='sde', diffusion='sigma', steps=250)
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
