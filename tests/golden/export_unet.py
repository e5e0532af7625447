"""What diffax writes, diffusers loads, with the same output: checked by hand, in two processes.

  python tests/golden/export_unet.py write FOLDER     # where diffax is installed
  python tests/golden/export_unet.py check FOLDER     # where torch and diffusers are

For each model a folder of `config.json` and `diffusion_pytorch_model.safetensors`, as diffusers'
`from_pretrained` takes it, and ours of its inputs and outputs.
"""

import json
import pathlib
import sys

import numpy as np

XL = dict(head_width=8, linear=True, pooled=11, sizes=6, text=24)
SPECS = dict(
  sd1=dict(width=32, multipliers=(1, 2), attention=(1, 0), heads=4, text=24),
  sdxl=dict(width=16, multipliers=(1, 2, 4), blocks=1, attention=(0, 1, 2), middle=2, **XL),
  upscaler=dict(
    width=16, multipliers=(1, 2), blocks=1, attention=(0, 1), heads=4, text=24, linear=True,
    text_only=(True, True), noise_levels=50, image=3,
  ),
  inpaint=dict(
    width=16, multipliers=(1, 2), attention=(1, 1), middle=0, text=24, image=4, mask=True,
  ),
)  # fmt: skip


def inputs(spec):
  rng = np.random.default_rng(0)
  given = dict(x=rng.standard_normal((2, 8, 12, 4)), t=np.array([3.0, 500.0]))
  given['text'] = rng.standard_normal((2, 5, spec['text']))
  if 'pooled' in spec:
    given |= dict(pooled=rng.standard_normal((2, 11)), size=rng.uniform(0, 600, (2, 6)))
  if 'noise_levels' in spec:
    given['noise_level'] = np.array([7, 49])
  if 'image' in spec:
    given['image'] = rng.standard_normal((2, 8, 12, spec['image']))
  if 'mask' in spec:
    given['mask'] = (rng.standard_normal((2, 8, 12, 1)) > 0).astype(float)
  return {k: v if k == 'noise_level' else v.astype(np.float32) for k, v in given.items()}


def write(folder):
  import jax

  from diffax.build import build
  from diffax.convert import latent_unet
  from diffax.convert import tensors

  for name, spec in SPECS.items():
    spec = dict(name='latent_unet', groups=8) | spec
    model, cond = build('diffax.models', spec, path='model'), inputs(spec)
    x, t = cond.pop('x'), cond.pop('t')
    rng = np.random.default_rng(1)
    params = jax.tree.map(
      lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32),  # noqa: B023
      jax.eval_shape(lambda *args: model.init(jax.random.key(0), *args), x, t, cond)['params'],  # noqa: B023
    )
    out = jax.jit(model.apply)({'params': params}, x, t, cond)
    where = folder / name
    where.mkdir(parents=True, exist_ok=True)
    (where / 'config.json').write_text(json.dumps(latent_unet.to_config(spec), indent=2))
    tensors.save(
      where / 'diffusion_pytorch_model.safetensors', params, latent_unet.stored(model)
    )
    np.savez(where / 'ours.npz', out=np.asarray(out), x=x, t=t, **cond)
    print(name, out.shape, float(out.std()))


def check(folder):
  import diffusers
  import torch

  for name in SPECS:
    model, said = diffusers.UNet2DConditionModel.from_pretrained(
      folder / name, output_loading_info=True
    )
    assert not any(said.values()), said
    ours = np.load(folder / name / 'ours.npz')
    given = {k: torch.from_numpy(ours[k]) for k in ours}
    first = lambda x: x.movedim(-1, 1)
    shown = torch.cat([first(given[k]) for k in ('x', 'mask', 'image') if k in given], dim=1)
    added = dict(text_embeds=given['pooled'], time_ids=given['size']) if 'size' in given else None
    with torch.no_grad():
      out = model.eval()(
        shown, given['t'], given['text'], class_labels=given.get('noise_level'),
        added_cond_kwargs=added, return_dict=False,
      )[0]
    want = first(given['out'])
    print(name, f'relative error {float((out - want).abs().max() / want.abs().max()):.1e}')


if __name__ == '__main__':
  dict(write=write, check=check)[sys.argv[1]](pathlib.Path(sys.argv[2]))
