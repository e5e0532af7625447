"""Emoji of 64 pixels by their captions: text to image with nothing to download, on CPU cores.

  python -m diffax.main --config configs/emoji_text2image.py --workdir runs/emoji_text2image
  python -m diffax.main --workdir runs/emoji_text2image --mode sample --prompt "red heart"

`full` denoises pixels; `latent` the latents of an autoencoder of configs/emoji_autoencoder.py, as
`--mode export` wrote it into runs/emoji_autoencoder/export; `upscale` the latents of 64 pixels
beside a picture of 16, the second stage of a cascade. Two CPU cores train at 28 to 41 pictures a
second: `full` and `latent` take 70 to 90 minutes, `upscale` 20 to 30. What they reach is in
experiments/emoji_text2image. A folder of your own with captions.jsonl: --config.data=captioned
--config.data.path=DIR.

Kinds and colours, which a caption tells, fill large areas that show through noise of ten times the
data. So times are shifted to where they do not, for pixels more than for latents; beside a small
picture, which tells them, there is no need.
"""

from typing import Literal

from ml_collections import ConfigDict


def get_config(variant: Literal['full', 'latent', 'upscale', 'smoke'] = 'full'):
  c = ConfigDict()
  c.seed = 0
  c.steps = dict(latent=5_000, upscale=1_500).get(variant, 4_000)
  c.batch_size = 32

  unseen = ('flag: Norway', 'red heart', 'woman mage')
  c.data = dict(name='emoji', split='train', without=unseen)
  c.text = dict(name='learned', vocab=1024, length=32, width=256, depth=2, heads=4)
  c.task = dict(name='generate', drop_cond=0.1)
  c.schedule = dict(name='shift', of=dict(name='linear'), shift=3.0)
  c.prediction = dict(name='edm', sigma_data=0.6, time_scale=250.0)
  c.loss = dict(time=dict(name='uniform'), weight=dict(name='uniform'))
  c.model = dict(name='dit', patch=8, width=256, depth=6, heads=4, modulation='shared', text=256,
                 pooled=256)

  c.optimizer = dict(name='adamw', b2=0.99, weight_decay=0.01, clip=1.0)
  c.learning_rate = dict(
    name='warmup_cosine_decay_schedule', init_value=0.0, peak_value=8e-4, warmup_steps=300,
    decay_steps=c.steps, end_value=1e-5,
  )
  c.ema = (0.999,)
  c.log_every, c.save_every = 100, 1_000

  prompts = (*unseen[:2], 'woman mage: dark skin tone', 'thumbs down')
  sampler = dict(name='dpmpp_2m', steps=25)
  c.evals = dict(
    samples=dict(name='grid', every=1_000, rows=4, columns=8, prompts=prompts, guidance=4.0,
                 sampler=sampler),
  )
  c.sample = dict(count=32, guidance=4.0, sampler=sampler)

  if variant in ('latent', 'upscale'):
    c.latent = dict(name='autoencoder', path='runs/emoji_autoencoder/export')
    c.model.patch, c.prediction.sigma_data, c.schedule.shift = 2, 1.0, 2.0
  if variant == 'upscale':
    c.schedule, c.loss.time = dict(name='linear'), dict(name='logit_normal')
    c.given = dict(name='noised', factor=4, most=350)
    c.model.update(image=3, noise_levels=1000)
    c.evals.samples.update(prompts=(), guidance=1.5)
    c.sample.guidance = 1.5
  if variant == 'smoke':  # the digits, whose captions are 'zero' to 'nine'
    c.steps, c.batch_size, c.log_every, c.save_every = 4, 8, 2, 4
    c.data = dict(name='digits', split='train')
    c.text = dict(name='learned', vocab=300, length=8, width=16, depth=1, heads=2)
    c.model.update(patch=2, width=16, depth=1, heads=2, text=16, pooled=16)
    c.evals.samples.update(every=4, rows=1, columns=4, prompts=('seven', 'three'))
    c.evals.samples.sampler = c.sample.sampler = dict(name='ddim', steps=2)
    c.learning_rate.update(warmup_steps=1, decay_steps=4)
    c.sample.count = 4
  return c
