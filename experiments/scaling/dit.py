"""DiTs from XL/2 to 12 B, on latents of 256 and 512 pixels, to be planned.

  python -m diffax.main --config experiments/scaling/dit.py:xl2_256 --workdir plans/xl2 \
      --mode plan --topology v5e:16x16 --config.mesh.data=1 --config.mesh.fsdp=256

The recipe is DiT's (Peebles & Xie 2023): AdamW, an average, labels of 1000 classes, some dropped;
products in bfloat16. The data is a blank picture: what a plan asks of it are its sizes.
"""

from typing import Literal

from ml_collections import ConfigDict

SIZES = {  # width, depth, heads, batch; a block has 18 width^2 parameters
  'xl2': (1152, 28, 16, 2048),
  '3b': (2304, 32, 18, 2048),
  '12b': (4096, 40, 32, 2048),
}


def get_config(
  variant: Literal['xl2_256', 'xl2_512', '3b_256', '3b_512', '12b_256', '12b_512'] = 'xl2_256',
):
  size, pixels = variant.split('_')
  width, depth, heads, batch = SIZES[size]
  c = ConfigDict()
  c.seed = 0
  c.steps = 400_000
  c.batch_size = batch
  c.data = dict(name='blank', size=int(pixels) // 8, channels=4, classes=1000)
  c.task = dict(name='generate', drop_cond=0.1)
  c.schedule = dict(name='linear')
  c.prediction = dict(name='velocity')
  c.model = dict(
    name='dit', patch=2, width=width, depth=depth, heads=heads, classes=1000, dtype='bfloat16')
  c.optimizer = dict(name='adamw', weight_decay=0.0)
  c.learning_rate = 1e-4
  c.ema = (0.9999,)
  c.sample = dict(batch_size=256, guidance=4.0, sampler=dict(name='ddim', steps=50))
  return c
