"""Emoji of 64 pixels as latents of 16x16x4: an autoencoder for latent diffusion, on one CPU core.

  python -m diffax.main --config configs/emoji_autoencoder.py --workdir runs/emoji_autoencoder
  python -m diffax.main --config configs/emoji_autoencoder.py:vq --workdir runs/emoji_vq

`full`: a KL autoencoder of 0.7 M parameters, 0.74 GFLOP forward; 2000 steps of 32 pictures, 50
minutes of one quiet CPU core at 21 pictures a second; PSNR 26.9 and SSIM 0.88 on the 438 held-out
pictures (experiments/emoji_text2image). `vq`: a codebook of 1024 in its place, not run. The
perceptual loss is that of random features, for nothing is to be downloaded; with a file of LPIPS
(see `diffax.perceptual.lpips`) and a discriminator of patches, on a GPU:

  --config.task.perceptual.name=lpips --config.task.perceptual.weights=lpips.safetensors
  --config.task.discriminator.weight=0.1 --config.task.discriminator.start=1000

`--mode export --out DIR` writes what is trained as a folder for `latent=dict(name='autoencoder',
path=DIR)`, with the scale that a diffusion model should see its latents at.
"""

from typing import Literal

from ml_collections import ConfigDict


def get_config(variant: Literal['full', 'vq', 'smoke'] = 'full'):
  c = ConfigDict()
  c.seed = 0
  c.steps = 2_000
  c.batch_size = 32

  c.data = dict(name='emoji', split='train', flip=True)
  c.task = dict(
    name='autoencode', kl=1e-6,
    perceptual=dict(name='random', widths=(16, 32, 64), weight=0.1),
    discriminator=dict(name='patch_gan', width=32, depth=2, weight=0.0, start=1_000),
  )
  c.loss = dict(distance=dict(name='absolute'))
  c.model = dict(
    name='autoencoder_kl', width=16, multipliers=(1, 2, 4), blocks=1, latent=4, groups=8,
    remat='none',
  )
  if variant == 'vq':
    c.model = dict(
      name='autoencoder_vq', width=16, multipliers=(1, 2, 4), blocks=1, latent=4, codes=1024,
      groups=8, remat='none',
    )

  c.optimizer = dict(name='adam', b1=0.9, b2=0.99, clip=1.0)
  c.learning_rate = dict(
    name='warmup_cosine_decay_schedule', init_value=0.0, peak_value=2e-3, warmup_steps=100,
    decay_steps=2_000, end_value=1e-5,
  )
  c.ema = (0.998,)
  c.log_every, c.save_every = 50, 500

  c.evals = dict(
    samples=dict(name='grid', every=1_000, rows=4, columns=10, batch_size=40),
    reconstruction=dict(name='reconstruction', every=500, count=438, batch_size=73),
  )
  c.sample = dict(count=100, batch_size=50)

  if variant == 'smoke':
    c.steps, c.batch_size, c.log_every, c.save_every = 4, 16, 2, 4
    c.data = dict(name='digits', split='train')
    c.model.update(width=8, multipliers=(1, 2), latent=2, groups=4, channels=1)
    c.task.perceptual.widths = (4, 8)
    c.task.discriminator = dict(
      name='patch_gan', width=4, depth=1, groups=4, weight=0.1, start=2)
    c.phases = dict(disc=dict(optimizer=dict(name='adam', b1=0.5), learning_rate=1e-3))
    c.learning_rate.update(warmup_steps=1, decay_steps=4)
    c.evals.samples.update(every=4, rows=1, batch_size=8)
    c.evals.reconstruction.update(every=4, count=20, batch_size=10)
    c.sample.update(count=4, batch_size=8)
  return c
