"""Memory of large pictures tile by tile, and how far they are from the whole.

  python experiments/tiling/measure.py      # writes experiments/tiling/results.json

trains a small autoencoder of factor 8 on drawn pictures, then encodes and decodes others, each way
in a process of its own, whose largest resident memory it records. Two CPU cores; time in README.md.
"""

import argparse
import functools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent)]

from diffax import tiles  # noqa: E402
from diffax.models import autoencoder  # noqa: E402

MODEL = autoencoder.autoencoder_kl(8, (1, 2, 4, 4), 1, groups=4, remat='none')
TILE, OVERLAP = 512, 128
CASES = [  # how, side of the picture
  ('start', 1024), ('whole', 512), ('whole', 1024), ('tiles', 1024), ('shared', 1024),
  ('whole', 2048), ('tiles', 2048), ('shared', 2048),
]  # fmt: skip


def picture(side, seed, full=2048):
  """Noise of a falling spectrum with a flat disc and a calm sky, in [-1, 1]: [1 side side 3]."""
  rng = np.random.default_rng(seed)
  rate = np.fft.fftfreq(full) * full
  fall = np.float32(np.maximum(np.hypot(rate[:, None], rate[None, : full // 2 + 1]), 1) ** -1.2)
  noise = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal((full, full))) * fall) for _ in range(3)]
  x = np.stack(noise, -1)[:: full // side, :: full // side]
  x *= 0.4 / x.std()
  row, column = np.mgrid[0:side, 0:side] / side
  x[np.hypot(column - 0.3, row - 0.6) < 0.2] *= 0.2
  x[: side // 3] = 0.1 * x[: side // 3] + 0.5
  return np.float32(np.clip(x, -1, 1))[None]


def train(path, steps=300, batch=8, side=64):
  """Writes parameters trained on crops of pictures; prints the loss."""
  pictures = np.concatenate([picture(256, seed, 256) for seed in range(16)])
  params = MODEL.init(jax.random.key(0), jnp.zeros((1, side, side, 3)))['params']
  optimizer = optax.adam(2e-3)
  state = optimizer.init(params)

  def loss(params, x, key):
    mean, logvar = autoencoder.posterior(MODEL.apply({'params': params}, x, method='encode'))
    z = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
    y = MODEL.apply({'params': params}, z, method='decode')
    return jnp.mean((y - x) ** 2) + 1e-5 * jnp.mean(mean**2 + jnp.exp(logvar) - logvar)

  @jax.jit
  def step(params, state, x, key):
    value, grads = jax.value_and_grad(loss)(params, x, key)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  rng = np.random.default_rng(0)
  for i in range(steps):
    places = rng.integers(0, 256 - side, (batch, 2))
    x = np.stack([pictures[k, a : a + side, b : b + side]
                  for k, (a, b) in zip(rng.integers(16, size=batch), places)])
    params, state, value = step(params, state, x, jax.random.key(i))
    if i % 100 == 99:
      print(i + 1, float(value), flush=True)
  leaves = jax.tree.leaves(params)
  np.savez(path, **{str(i): leaf for i, leaf in enumerate(leaves)})


def run(how, side, folder):
  """One case, in this process: writes the latent and the picture, prints seconds and peak RSS."""
  key, x = jax.random.key(0), jnp.zeros((1, 64, 64, 3))
  like = jax.eval_shape(lambda: MODEL.init(key, x))['params']
  with np.load(folder / 'params.npz') as file:
    params = jax.tree.unflatten(jax.tree.structure(like), [file[str(i)] for i in range(
      len(file.files))])
  program = lambda method: functools.partial(jax.jit(lambda params, x, told: MODEL.apply(
    {'params': params, 'told': told.get('intermediates', {})}, x, method=method,
    mutable='intermediates')), params)
  encode, decode = program('encode'), program('decode')
  x, start = np.load(folder / f'picture{side}.npy'), time.time()
  if how == 'start':  # what jax, the picture and a program of one small tile take
    decode(np.asarray(encode(x[:, :64, :64], {})[0])[..., :4], {})
    through = lambda f, x, tile, overlap, scale: x
  elif how == 'whole':
    through = lambda f, x, tile, overlap, scale: np.asarray(f(x, {})[0])
  elif how == 'tiles':
    through = lambda f, x, *sizes: tiles.apply(lambda x: f(x, {})[0], x, *sizes)
  else:
    through = tiles.shared
  z = through(encode, x, TILE, OVERLAP, 1 / 8)[..., :4]
  y = through(decode, z, TILE // 8, OVERLAP // 8, 8)
  np.savez(folder / f'{how}{side}.npz', z=z, y=y)
  status = pathlib.Path('/proc/self/status').read_text()  # getrusage knows the parent's memory too
  peak = int(re.search(r'VmHWM:\s*(\d+) kB', status).group(1)) / 2**20
  print(json.dumps(dict(how=how, side=side, seconds=round(time.time() - start, 1),
                        peak_gib=round(peak, 2))))


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--case', nargs=3)
  said = parser.parse_args()
  if said.case:
    return run(said.case[0], int(said.case[1]), pathlib.Path(said.case[2]))
  results = []
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    train(folder / 'params.npz')
    for side in {side for _, side in CASES}:
      np.save(folder / f'picture{side}.npy', picture(side, 99))
    for how, side in CASES:
      command = [sys.executable, __file__, '--case', how, str(side), str(folder)]
      done = subprocess.run(command, check=True, capture_output=True, text=True)
      results.append(json.loads(done.stdout.splitlines()[-1]))
      whole = folder / f'whole{side}.npz'
      if how in ('tiles', 'shared') and whole.exists():
        got, want = np.load(folder / f'{how}{side}.npz'), np.load(whole)
        for k in ('z', 'y'):  # the decoder was given each way's own latent
          error = float(np.sqrt(np.mean((got[k] - want[k]) ** 2)) / want[k].std())
          results[-1][k] = float(f'{error:.2g}')
      print(results[-1], flush=True)
  (HERE / 'results.json').write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
  main()
