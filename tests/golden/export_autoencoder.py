"""What we save, read by diffusers: the same outputs? Run by hand, in two environments.

  python tests/golden/export_autoencoder.py write FOLDER     # ours: jax and diffax
  python tests/golden/export_autoencoder.py read FOLDER      # theirs: diffusers 0.42.1

`write` makes a folder of each model in the layout of diffusers, and beside it inputs and our
outputs; `read` loads it as a user would and prints the largest relative differences.
"""

import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]


def write(folder):
  """The models of golden/autoencoder.py, of drawn weights; one in diffusers' early names too."""
  from golden import autoencoder as golden
  import jax
  import jax.numpy as jnp

  from diffax import build
  from diffax.convert import autoencoder as convert
  from diffax.convert import tensors

  for name, layout in [(n, convert.stored) for n in golden.MODELS] + [('kl4', convert.early)]:
    spec = convert.from_config(golden.MODELS[name])
    model = build.build('diffax.models', spec, path='model')
    x, z = (jnp.float32(np.moveaxis(a, 1, -1)) for a in golden.inputs(name))
    params = model.init(jax.random.key(1), x)['params']
    out = dict(
      x=x, z=z,
      moments=jax.jit(lambda p, m=model, x=x: m.apply({'params': p}, x, method='encode'))(params),
      image=jax.jit(lambda p, m=model, z=z: m.apply({'params': p}, z, method='decode'))(params),
    )
    into = folder / (name if layout is convert.stored else f'{name}_early')
    into.mkdir(parents=True, exist_ok=True)
    tensors.save(into / 'diffusion_pytorch_model.safetensors', params, layout(model))
    (into / 'config.json').write_text(json.dumps(convert.to_config(spec), indent=2))
    np.savez(into / 'outputs.npz', **{k: np.moveaxis(v, -1, 1) for k, v in out.items()})


def read(folder):
  import diffusers
  import torch

  for path in sorted(folder.iterdir()):
    kind = json.loads((path / 'config.json').read_text())['_class_name']
    model = getattr(diffusers, kind).from_pretrained(path, low_cpu_mem_usage=False).eval()
    want = {k: torch.from_numpy(v) for k, v in np.load(path / 'outputs.npz').items()}
    with torch.no_grad():
      encoded = model.encode(want['x'])
      told = encoded.latent_dist.parameters if kind == 'AutoencoderKL' else encoded.latents
      got = dict(moments=told, image=model.decode(want['z']).sample)
    apart = {k: float((got[k] - want[k]).abs().max() / want[k].abs().max()) for k in got}
    print(path.name, {k: f'{error:.1e}' for k, error in apart.items()})


if __name__ == '__main__':
  {'write': write, 'read': read}[sys.argv[1]](pathlib.Path(sys.argv[2]))
