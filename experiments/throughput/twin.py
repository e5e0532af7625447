"""The same training step in plain PyTorch: DiT after Peebles & Xie 2023, fig. 3, AdamW, an average.

Written as one would for speed in eager mode: one product for query, key and value, the library's
own attention, fused AdamW, `_foreach` for the average. It does without the norm of the gradient and
the check for numbers that are not finite, which diffax's step has.
"""

import math

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

PRESETS = {'S': (384, 12, 6), 'B': (768, 12, 12), 'L': (1024, 24, 16), 'XL': (1152, 28, 16)}


def sinusoids(t, width):
  rate = torch.exp(-math.log(10_000.0) * torch.arange(width // 2) / (width // 2))
  wave = t[:, None] * rate
  return torch.cat([wave.cos(), wave.sin()], -1)


def positions(side, width):
  """Fixed sines and cosines of the column, then of the row, [n width]."""
  rate = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
  row, column = np.divmod(np.arange(side * side), side)
  waves = [f(np.outer(place, rate)) for place in (column, row) for f in (np.sin, np.cos)]
  return torch.from_numpy(np.concatenate(waves, -1)).float()


def modulate(x, shift, scale):
  return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.modulation = nn.Linear(width, 6 * width)
    self.qkv = nn.Linear(width, 3 * width)
    self.out = nn.Linear(width, width)
    self.mlp_in = nn.Linear(width, 4 * width)
    self.mlp_out = nn.Linear(4 * width, width)

  def forward(self, x, c):
    b, n, d = x.shape
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, -1)
    y = modulate(F.layer_norm(x, (d,), eps=1e-6), shift_a, scale_a)
    q, k, v = self.qkv(y).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
    x = x + gate_a[:, None] * self.out(y)
    y = modulate(F.layer_norm(x, (d,), eps=1e-6), shift_m, scale_m)
    return x + gate_m[:, None] * self.mlp_out(F.gelu(self.mlp_in(y), approximate='tanh'))


class DiT(nn.Module):
  def __init__(self, preset, side, channels, classes):
    super().__init__()
    size, patch = preset.split('/')
    width, depth, heads = PRESETS[size]
    self.patch = int(patch)
    self.patch_in = nn.Linear(self.patch**2 * channels, width)
    self.time_in, self.time_out = nn.Linear(256, width), nn.Linear(width, width)
    self.label = nn.Embedding(classes + 1, width)
    self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
    self.modulation = nn.Linear(width, 2 * width)
    self.patch_out = nn.Linear(width, self.patch**2 * channels)
    self.register_buffer('places', positions(side // self.patch, width))
    for layer in (*[block.modulation for block in self.blocks], self.modulation, self.patch_out):
      nn.init.zeros_(layer.weight)
      nn.init.zeros_(layer.bias)

  def forward(self, x, t, label):  # x: [b h w c]
    b, h, w, channels = x.shape
    p = self.patch
    x = x.view(b, h // p, p, w // p, p, channels).transpose(2, 3).reshape(b, -1, p * p * channels)
    x = self.patch_in(x) + self.places
    c = F.silu(self.time_out(F.silu(self.time_in(sinusoids(t, 256)))) + self.label(label))
    for block in self.blocks:
      x = block(x, c)
    shift, scale = self.modulation(c).chunk(2, -1)
    x = self.patch_out(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale))
    return x.view(b, h // p, w // p, p, p, channels).transpose(2, 3).reshape(b, h, w, channels)


def setup(preset, batch, threads, classes=1000):
  """As `ours.setup`."""
  torch.set_num_threads(threads)
  torch.manual_seed(0)
  x0, label = torch.from_numpy(batch['image']), torch.from_numpy(batch['label']).long()
  model = DiT(preset, x0.shape[1], x0.shape[-1], classes)
  params = list(model.parameters())
  average = [p.detach().clone() for p in params]
  tx = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.01, fused=True)
  count = 0

  def advance(steps):
    nonlocal count
    for _ in range(steps):
      t, eps = torch.rand(len(x0)), torch.randn_like(x0)
      s = t[:, None, None, None]
      given = torch.where(torch.rand(len(x0)) < 0.1, classes, label)  # for guidance
      error = model((1 - s) * x0 + s * eps, 1000 * t, given) - (eps - x0)
      loss = error.square().mean()
      tx.zero_grad(set_to_none=True)
      loss.backward()
      tx.step()
      decay = min(0.9999, (1 + count) / (10 + count))
      torch._foreach_lerp_(average, [p.detach() for p in params], 1 - decay)
      count += 1
    return loss.item()

  facts = {'parameters': sum(p.numel() for p in params), 'version': f'torch {torch.__version__}'}
  return advance, facts


def matmul(n):
  a = torch.ones(n, n)
  return lambda: a @ a
