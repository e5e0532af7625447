"""What `--mode export` writes, diffusers loads, with the same output: by hand, in two environments.

  python tests/golden/export_pipeline.py write FOLDER    # ours: jax and diffax
  python tests/golden/export_pipeline.py read FOLDER     # theirs: torch, diffusers, transformers

Of runs with drawn weights: an autoencoder, and pipelines of latents with one and with two text
encoders, which draw pictures from the same noise.
"""

import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

PROMPTS = ['a photograph of an astronaut riding a horse', 'a cat, digital painting']
STEPS, GUIDANCE = 5, 4.0
CASES = {'ddim': dict(prediction='eps'), 'xl': dict(prediction='v')}


def noise(role, shape):
  return np.random.default_rng(len(role)).standard_normal(shape).astype(np.float32)


def write(folder):
  from golden import pipelines as golden
  import jax
  import test_export
  import test_pipelines

  from diffax import export
  from diffax import latents
  from diffax import noises
  from diffax import samplers
  from diffax import schedules

  run, _ = test_export.trained(folder / 'coder_run', test_export.coder_config('model.channels=3',
    'data.name=emoji'))
  print(export.export(run, folder / 'coder_run', 0, folder / 'coder'))
  latent = latents.autoencoder(run.source, str(folder / 'coder'))
  frozen = latent.frozen['autoencoder']
  groups = {'autoencoder': frozen.load(jax.eval_shape(frozen.like))}
  x = noise('pictures', (2, 8, 12, 3)).clip(-1, 1)
  z = latent.encode(groups, x, None)
  np.savez(folder / 'coder.npz', x=x, z=z, y=latent.decode(groups, z))

  noises.normal = lambda keys, shape, dtype=None: noise('start', (len(keys), *shape))
  schedules.start = lambda schedule, t, noise: noise  # diffusers' schedulers take unit noise
  for name, words in CASES.items():
    case = golden.CASES[name]
    there = test_pipelines.write(
      folder / f'{name}_parts', case['kind'], case['parts'], case['scheduler'])
    workdir = folder / f'{name}_run'
    run, _ = test_export.trained(workdir, test_export.latent_config(there, **words))
    print(export.export(run, workdir, 0, folder / name))
    run, state = test_export.read(
      folder / name, f'sample.prompts={tuple(PROMPTS)!r}', f'sample.guidance={GUIDANCE}',
      f'sample.sampler.steps={STEPS}')
    drawing = run.task.sample(run.config['sample'], 'sample')
    asked, keys = drawing.ask(np.arange(2)), samplers.sample_keys(0, np.arange(2))
    made = jax.jit(lambda p, f, a, d=drawing, k=keys: d.draw(p, f, k, a))(
      state.params, state.frozen, asked)
    np.savez(folder / f'{name}.npz', pictures=made)


def read(folder):
  import diffusers
  import torch

  first = lambda x: torch.from_numpy(np.asarray(x)).movedim(-1, 1)
  apart = lambda a, b: float((a - b).abs().max() / b.abs().max())
  torch.set_grad_enabled(False)
  model = diffusers.AutoencoderKL.from_pretrained(folder / 'coder')
  want = np.load(folder / 'coder.npz')
  mean = model.encode(first(want['x'])).latent_dist.mean
  z = (mean - model.config.shift_factor) * model.config.scaling_factor
  y = model.decode(z / model.config.scaling_factor + model.config.shift_factor).sample
  print('coder', {k: f'{apart(v, first(want[k])):.1e}' for k, v in dict(z=z, y=y).items()})
  for name in CASES:
    kind = json.loads((folder / name / 'model_index.json').read_text())['_class_name']
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / name)
    assert type(pipeline).__name__ == kind, pipeline
    pipeline.set_progress_bar_config(disable=True)
    made = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda *a, d=decode, m=made, **o: m.append(d(*a, **o)) or m[-1]
    side = pipeline.unet.config.sample_size
    pipeline(
      PROMPTS, latents=first(noise('start', (2, side, side, 4))), num_inference_steps=STEPS,
      guidance_scale=GUIDANCE)
    wanted = first(np.load(folder / f'{name}.npz')['pictures'])
    print(name, kind, f'{apart(made[0][0], wanted):.1e}, of {float(wanted.std()):.3f}')


if __name__ == '__main__':
  dict(write=write, read=read)[sys.argv[1]](pathlib.Path(sys.argv[2]).resolve())
