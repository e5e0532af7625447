"""Outputs of pytorch-fid's Inception v3 and transformers' DINOv2 on weights anyone can draw again.

  pip install torch torchvision pytorch-fid transformers safetensors
  python tests/golden/features.py            # writes tests/golden/features.npz

Weights are drawn by numpy from the name of each tensor, so that the file holds outputs alone; drawn
are all of them, also those that start at zero or one. The references run in float64: the difference
that `tests/test_features.py` finds is our rounding. DINOv2 is loaded from a file with the names of
those that Meta published, by transformers' own reader.
"""

import importlib.metadata
import pathlib
import zlib

import numpy as np

DINOV2 = dict(width=128, depth=2, patch=14, places=37)
HIDDEN = {'mlp': 512, 'swiglu': 344}
SIZES = {  # of images [h w c], two of each
  'small': (24, 20, 3),
  'grey': (28, 28, 1),
  'large': (340, 310, 3),
}
INCEPTION = ('small', 'grey')  # of which Inception's outputs are recorded
LEVELS = slice(None, None, 23)  # of the rows and columns of resized images, what is recorded


def draw(name, shape):
  """Kernels that keep variance behind a relu, variances near 1, scales near 1, shifts of 0.1."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  if name.endswith('running_var'):
    return rng.uniform(0.5, 2.0, shape)
  numbers = rng.standard_normal(shape)
  if name.endswith(('bn.weight', 'norm1.weight', 'norm2.weight', 'layernorm.weight', 'lambda1')):
    return 1 + 0.2 * numbers
  if len(shape) == 1:
    return 0.1 * numbers
  if 'cls_token' in name or 'position' in name:
    return numbers
  return numbers * (2 / np.prod(shape[1:])) ** 0.5


def images(name):
  """uint8 [2 h w c]: noise, a part of it smooth, so that every frequency is there."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  out = rng.integers(0, 256, (2, *SIZES[name]))
  rows = np.linspace(0, 255, out.shape[1]).astype(int)
  out[:, :, : out.shape[2] // 2] = rows[None, :, None, None]
  return out.astype(np.uint8)


def dinov2_shapes(kind):
  """{name: shape} of the tensors of a published file, of a small DINOv2; kind: of `HIDDEN`."""
  d, hidden = DINOV2['width'], HIDDEN[kind]
  tokens, patch = 1 + DINOV2['places'] ** 2, DINOV2['patch']
  first, last = {'mlp': ('fc1', 'fc2'), 'swiglu': ('weights_in', 'weights_out')}[kind]
  shapes = {
    'embeddings.cls_token': (1, 1, d),
    'embeddings.mask_token': (1, d),
    'embeddings.position_embeddings': (1, tokens, d),
    'embeddings.patch_embeddings.projection.weight': (d, 3, patch, patch),
    'embeddings.patch_embeddings.projection.bias': (d,),
    'layernorm.weight': (d,),
    'layernorm.bias': (d,),
  }
  for i in range(DINOV2['depth']):
    attention = [f'attention.attention.{name}' for name in ('query', 'key', 'value')]
    dense = {name: (d, d) for name in (*attention, 'attention.output.dense')}
    dense[f'mlp.{first}'] = (hidden * (2 if kind == 'swiglu' else 1), d)
    dense[f'mlp.{last}'] = (d, hidden)
    layer = {f'{name}.weight': shape for name, shape in dense.items()}
    layer |= {f'{name}.bias': shape[:1] for name, shape in dense.items()}
    layer |= {f'norm{n}.{part}': (d,) for n in (1, 2) for part in ('weight', 'bias')}
    layer |= {f'layer_scale{n}.lambda1': (d,) for n in (1, 2)}
    shapes |= {f'encoder.layer.{i}.{name}': shape for name, shape in layer.items()}
  return shapes


def main():
  import tempfile
  from unittest import mock

  from PIL import Image
  from pytorch_fid import inception
  import safetensors.numpy
  import torch
  import transformers

  torch.set_grad_enabled(False)
  outputs = {}
  # the module as pytorch-fid patches it, with our weights in place of those it would download
  with mock.patch.object(inception, 'load_state_dict_from_url'), mock.patch.object(
    torch.nn.Module, 'load_state_dict'):
    net = inception.fid_inception_v3()
  for name, tensor in net.state_dict().items():
    if tensor.dtype.is_floating_point:
      tensor.copy_(torch.from_numpy(draw(name, tensor.shape)))
  net = net.double().eval()
  with mock.patch.object(inception, 'fid_inception_v3', return_value=net):
    whole = inception.InceptionV3().eval()
  seen = {}
  net.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: seen.update(spatial=out))
  for name in INCEPTION:
    x = torch.from_numpy(np.float64(images(name)).repeat(3 // SIZES[name][-1], -1) / 255)
    x = x.permute(0, 3, 1, 2)
    resized = 2 * torch.nn.functional.interpolate(x, (299, 299), mode='bilinear') - 1
    pool, logits = whole(x)[0][:, :, 0, 0], net(resized)
    outputs[f'inception_{name}_resized'] = resized[:, :, LEVELS, LEVELS]
    outputs[f'inception_{name}_pool'] = pool
    outputs[f'inception_{name}_spatial'] = seen['spatial'][:, :7].permute(0, 2, 3, 1).flatten(1)
    outputs[f'inception_{name}_logits'] = logits - net.fc.bias  # as the inception score has them

  for name in SIZES:
    outputs[f'dinov2_{name}_resized'] = torch.stack([
      torch.from_numpy(np.array(Image.fromarray(image.squeeze()).resize(
        (224, 224), Image.Resampling.BICUBIC)))
      for image in images(name)])
  for kind in HIDDEN:
    config = transformers.Dinov2Config(
      hidden_size=DINOV2['width'], num_hidden_layers=DINOV2['depth'], num_attention_heads=2,
      image_size=DINOV2['places'] * DINOV2['patch'], patch_size=DINOV2['patch'],
      use_swiglu_ffn=kind == 'swiglu')
    with tempfile.TemporaryDirectory() as folder:
      config.save_pretrained(folder)
      tensors = {n: np.float32(draw(n, shape)) for n, shape in dinov2_shapes(kind).items()}
      safetensors.numpy.save_file(tensors, f'{folder}/model.safetensors', {'format': 'pt'})
      model, said = transformers.Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    model = model.double().eval()
    for name in SIZES:
      x = outputs[f'dinov2_{name}_resized'].double()
      x = x.unsqueeze(-1).repeat(1, 1, 1, 3) if x.ndim == 3 else x
      mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
      x = ((x / 255 - mean.double()) / std.double()).permute(0, 3, 1, 2)
      tokens = model(x).last_hidden_state
      outputs[f'dinov2_{kind}_{name}_pool'] = tokens[:, 0]
      outputs[f'dinov2_{kind}_{name}_spatial'] = tokens[:, 1:, :7].flatten(1)
  for name in SIZES:
    outputs[f'dinov2_{name}_resized'] = outputs[f'dinov2_{name}_resized'][:, LEVELS, LEVELS]

  saved = {name: out.numpy() for name, out in outputs.items()}
  saved = {k: v if v.dtype == np.uint8 else v.astype(np.float32) for k, v in saved.items()}
  packages = ('torch', 'torchvision', 'pytorch-fid', 'transformers', 'numpy', 'pillow')
  versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in packages)
  np.savez(pathlib.Path(__file__).with_suffix('.npz'), versions=versions, **saved)
  print(versions)
  for name, out in saved.items():
    print(name, out.shape, out.dtype, out.std())


if __name__ == '__main__':
  main()
