"""Outputs of diffusers' `UNet2DConditionModel` on weights that anyone can draw again.

  pip install torch==2.13.0 diffusers transformers
  python tests/golden/latent_unet.py            # writes tests/golden/latent_unet.npz

The models are those of Stable Diffusion 1, 2 and XL, of inpainting, InstructPix2Pix and the
upscaler, narrow and of fewer blocks. Weights are drawn by numpy from the name of each tensor, so
that the file holds outputs alone; drawn are all of them, also those that start at zero, for behind
zeros an error hides. The reference runs in float64, and is asked that each of its tensors moves the
output, so that none that is read wrong can hide. Of each model the file has besides the names and
shapes of its tensors, and, where `LDM` names it, what these are called in single files: names
as `openaimodel.UNetModel` gives them, carried over by diffusers' own converter.
"""

import itertools
import json
import pathlib
import zlib

import numpy as np

WITH, WITHOUT = 'CrossAttn{}Block2D', '{}Block2D'


def config(attends, channels, **options):
  kinds = [WITH if a else WITHOUT for a in attends]
  return dict(
    block_out_channels=channels,
    down_block_types=tuple(k.format('Down') for k in kinds),
    up_block_types=tuple(k.format('Up') for k in reversed(kinds)),
    norm_num_groups=8,
    layers_per_block=1,
    cross_attention_dim=24,
    attention_head_dim=4,
  ) | options


LINEAR = dict(use_linear_projection=True)
MODELS = dict(
  sd1=config((1, 0), (32, 64), layers_per_block=2),
  sd2=config((1, 0), (32, 64), attention_head_dim=(2, 4), **LINEAR),
  sdxl=config(
    (0, 1), (16, 32), attention_head_dim=(1, 2), transformer_layers_per_block=(1, 2),
    addition_embed_type='text_time', addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=20 + 6 * 256, **LINEAR,
  ),
  inpaint=config((1,), (16,), in_channels=9),
  instruct=config((1,), (16,), in_channels=8),
  upscaler=config(
    (0, 1), (16, 32), only_cross_attention=(True, True), num_class_embeds=1000, in_channels=7,
    **LINEAR,
  ),
)  # fmt: skip
LDM = ('sd1', 'sdxl', 'upscaler')
SPACE = (4, 6)
TOKENS = 5


def draw(name, shape):
  """Weights [out in ...] scaled to keep variance, norms about 1, biases of 0.1, the levels of 1."""
  numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  if name == 'class_embedding.weight':
    return numbers
  if len(shape) == 1:
    return 0.1 * numbers + ('norm' in name and name.endswith('weight'))
  return numbers * np.prod(shape[1:]) ** -0.5


def inputs(name):
  """All that the model is shown, by our names: maps [b c h w], t [b], text [b n d] and so on."""
  model = MODELS[name]
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  extra = model.get('in_channels', 4) - 4
  given = dict(x=rng.standard_normal((2, 4, *SPACE)), t=np.array([3.0, 917.0]))
  given['text'] = rng.standard_normal((2, TOKENS, model['cross_attention_dim']))
  if name in ('sd1', 'sdxl'):
    given['text_mask'] = np.array([[1] * TOKENS, [1, 1] + [0] * (TOKENS - 2)])
  if extra == 5:
    given['mask'] = (rng.standard_normal((2, 1, *SPACE)) > 0).astype(float)
  if extra:
    given['image'] = rng.standard_normal((2, extra - (extra == 5), *SPACE))
  if name == 'sdxl':
    given['pooled'] = rng.standard_normal((2, 20))
    given['size'] = np.array([[512.0, 384, 0, 16, 1024, 768], [64, 100, 7, 0, 256, 512]])
  if name == 'upscaler':
    given['noise_level'] = np.array([20, 349])
  return given


def ldm_names(model):
  """Names of a single file for a model of that config, some that there are not among them."""
  parts = ['in_layers.0', 'in_layers.2', 'emb_layers.1', 'out_layers.0', 'out_layers.3']
  residual = [f'{p}.{k}' for p in (*parts, 'skip_connection') for k in ('weight', 'bias')]
  depth = np.max(model.get('transformer_layers_per_block', 1))
  block = [f'attn{n}.to_{k}.weight' for n in (1, 2) for k in ('q', 'k', 'v', 'out.0')]
  block += [f'attn{n}.to_out.0.bias' for n in (1, 2)]
  block += [
    f'{m}.{k}' for m in ('norm1', 'norm2', 'norm3', 'ff.net.0.proj', 'ff.net.2')
    for k in ('weight', 'bias')
  ]
  transformer = [f'{m}.{k}' for m in ('norm', 'proj_in', 'proj_out') for k in ('weight', 'bias')]
  transformer += [f'transformer_blocks.{n}.{rest}' for n in range(depth) for rest in block]
  made = [
    f'{m}.{k}'
    for m in ('time_embed.0', 'time_embed.2', 'input_blocks.0.0', 'out.0', 'out.2')
    for k in ('weight', 'bias')
  ]
  if model.get('addition_embed_type'):
    made += [f'label_emb.0.{n}.{k}' for n in (0, 2) for k in ('weight', 'bias')]
  if model.get('num_class_embeds'):
    made += ['label_emb.weight']

  attends = ['Cross' in kind for kind in model['down_block_types']]
  count = itertools.count(1)
  for level, attend in enumerate(attends):
    for _ in range(model['layers_per_block']):
      n = next(count)
      made += [f'input_blocks.{n}.0.{k}' for k in residual]
      made += [f'input_blocks.{n}.1.{k}' for k in transformer] if attend else []
    if level + 1 < len(attends):
      n = next(count)
      made += [f'input_blocks.{n}.0.op.{k}' for k in ('weight', 'bias')]
  made += [f'middle_block.{n}.{k}' for n in (0, 2) for k in residual]
  made += [f'middle_block.1.{k}' for k in transformer]
  count = itertools.count()
  for level, attend in reversed(list(enumerate(attends))):
    for i in range(model['layers_per_block'] + 1):
      n = next(count)
      made += [f'output_blocks.{n}.0.{k}' for k in residual]
      made += [f'output_blocks.{n}.1.{k}' for k in transformer] if attend else []
      if level and i == model['layers_per_block']:
        made += [f'output_blocks.{n}.{1 + attend}.conv.{k}' for k in ('weight', 'bias')]
  return made


def main():
  import diffusers
  from diffusers.loaders import single_file_utils
  import torch

  def reference(model, name):
    for key, tensor in model.named_parameters():
      tensor.data = torch.from_numpy(draw(key, tensor.shape))
    given = {k: torch.from_numpy(v) for k, v in inputs(name).items()}
    shown = torch.cat([given[k] for k in ('x', 'mask', 'image') if k in given], dim=1)
    added = None
    if 'size' in given:
      added = dict(text_embeds=given['pooled'], time_ids=given['size'])
    out = model.double().eval()(
      shown, given['t'], given['text'], encoder_attention_mask=given.get('text_mask'),
      class_labels=given.get('noise_level'), added_cond_kwargs=added, return_dict=False,
    )[0]
    weights = np.random.default_rng(0).standard_normal(out.shape)
    torch.sum(out * torch.from_numpy(weights)).backward()
    for key, tensor in model.named_parameters():
      assert tensor.grad.abs().max() > 1e-2, key
    return out.detach()

  def pairs(model, name):
    """{diffusers' name: the single file's}."""
    prefix = 'model.diffusion_model.'
    file = {f'{prefix}{k}': f'{prefix}{k}' for k in ldm_names(MODELS[name])}
    made = single_file_utils.convert_ldm_unet_checkpoint(file, dict(model.config))
    found = {k: v for k, v in made.items() if k in model.state_dict()}
    assert found.keys() == model.state_dict().keys(), model.state_dict().keys() - found.keys()
    assert len(set(found.values())) == len(found)
    return found

  outputs = {}
  for name, options in MODELS.items():
    model = diffusers.UNet2DConditionModel(**options)
    outputs[name] = reference(model, name).numpy().astype(np.float32)
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    outputs[f'{name}_shapes'] = json.dumps(shapes)
    if name in LDM:
      outputs[f'{name}_ldm'] = json.dumps(pairs(model, name))
    print(name, outputs[name].shape, outputs[name].std(), len(shapes))
  versions = f'diffusers {diffusers.__version__}, torch {torch.__version__}, numpy {np.__version__}'
  np.savez_compressed(pathlib.Path(__file__).with_suffix('.npz'), versions=versions, **outputs)
  print(versions)


if __name__ == '__main__':
  main()
