"""Emoji of 64 pixels by their captions, in pixel space: text to image with nothing to download.

  python -m diffax.main --config configs/emoji_text2image.py --workdir runs/emoji_text2image
  python -m diffax.main --workdir runs/emoji_text2image --mode sample --prompt "red heart"
"""

from typing import Literal

from ml_collections import ConfigDict


def get_config(variant: Literal['full', 'smoke'] = 'full'):
  c = ConfigDict()
  c.seed = 0
  c.steps = 8_000
  c.batch_size = 32

  c.data = dict(name='emoji', split='train')
  c.text = dict(name='learned', vocab=1024, length=32, width=256, depth=2, heads=4)
  c.task = dict(name='generate', drop_cond=0.1)
  c.schedule = dict(name='linear')
  c.prediction = dict(name='velocity')
  c.loss = dict(time=dict(name='logit_normal'), weight=dict(name='uniform'))

  c.model = dict(name='dit', patch=8, width=256, depth=6, heads=4, modulation='shared', text=256,
                 pooled=256)

  c.optimizer = dict(name='adamw', b2=0.99, weight_decay=0.01, clip=1.0)
  c.learning_rate = dict(
    name='warmup_cosine_decay_schedule', init_value=0.0, peak_value=8e-4, warmup_steps=300,
    decay_steps=c.steps, end_value=1e-5,
  )
  c.ema = (0.999,)
  c.log_every, c.save_every = 100, 1_000

  prompts = ('flag: Norway', 'red heart', 'woman mage: dark skin tone', 'grinning cat')
  c.evals = dict(
    prompts=dict(name='grid', every=1_000, rows=4, columns=8, prompts=prompts, guidance=4.0,
                 sampler=dict(name='dpmpp_2m', steps=25)),
  )
  c.sample = dict(count=32, guidance=4.0, sampler=dict(name='dpmpp_2m', steps=50))
  return c
