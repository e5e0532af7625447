"""PyTorch's side: the same networks, objectives and samplers, after the papers alone.

DiT with adaLN-Zero after Peebles & Xie 2023, fig. 3; the U-Net is `../cifar10_edm/twin.py`. Written
as is customary for speed: one product for query, key and value, `scaled_dot_product_attention`,
fused Adam, `_foreach` for the average, channels last for convolutions, cudnn.benchmark, TF32 where
something stays in float32. bfloat16 is autocast over float32 parameters. The side torch_compile has
network and objective, or the network of a sampler, in `torch.compile`, its mode the default, its
shapes static. It does without the check for numbers that are not finite, which
diffax's step has, and without the gradient's norm. Needs torch and numpy, no diffax.

What `side.py` asks of a side: `describe`, `train`, `sample`, `product`, `peak`.
"""

import math
import pathlib
import sys

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / 'cifar10_edm'))

import twin  # noqa: E402, after its folder is on the path

DEVICE = twin.DEVICE


# --- DiT ------------------------------------------------------------------------------------------


def sinusoids(t, width):
  rate = torch.exp(-math.log(10_000.0) * torch.arange(width // 2, device=t.device) / (width // 2))
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
  """Of a spec: patch, width, depth, heads, classes, size, channels. x: [b h w c]."""

  def __init__(self, spec):
    super().__init__()
    width, self.patch, channels = spec['width'], spec['patch'], spec['channels']
    self.patch_in = nn.Linear(self.patch**2 * channels, width)
    self.time_in, self.time_out = nn.Linear(256, width), nn.Linear(width, width)
    self.label = nn.Embedding(spec['classes'] + 1, width)
    self.blocks = nn.ModuleList(Block(width, spec['heads']) for _ in range(spec['depth']))
    self.modulation = nn.Linear(width, 2 * width)
    self.patch_out = nn.Linear(width, self.patch**2 * channels)
    self.register_buffer('places', positions(spec['size'] // self.patch, width), persistent=False)
    for layer in (*[block.modulation for block in self.blocks], self.modulation, self.patch_out):
      nn.init.zeros_(layer.weight)
      nn.init.zeros_(layer.bias)

  def forward(self, x, t, label):
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


# --- objectives -----------------------------------------------------------------------------------


def flow_loss(net, spec, x0, label):
  """Velocity on straight lines, times uniform; Lipman et al. 2022, eq. 23."""
  t, eps = torch.rand(len(x0), device=x0.device), torch.randn_like(x0)
  s = t[:, None, None, None]
  given = torch.where(torch.rand_like(t) < spec['drop_cond'], spec['classes'], label)
  out = net((1 - s) * x0 + s * eps, 1000 * t, given)
  return (out.float() - (eps - x0)).square().mean()


def edm_loss(net, spec, image, label):
  """Karras et al. 2022, table 1."""
  return twin.losses(net, spec, *twin.draw(spec, image, label)).mean()


def train(job):
  """(advance, facts) of a job of `table.py`: `advance(steps)` trains on one batch, waits and
  returns the loss.
  """
  spec, net = start(job)
  net.train()
  told, params = facts(net, spec), list(net.parameters())
  image, label = (torch.from_numpy(np.asarray(job['batch'][k])).to(DEVICE) for k in BATCH)
  label, average, adam = label.long(), [p.detach().clone() for p in params], optimizer(spec, params)
  loss_of = flow_loss if spec['kind'] == 'dit' else edm_loss
  objective, count = compiled(job, lambda *given: loss_of(net, spec, *given)), 0

  def advance(steps):
    nonlocal count
    for _ in range(steps):
      with autocast(job):
        loss = objective(image, label)
      adam.zero_grad(set_to_none=True)
      loss.backward()
      if spec['clip']:
        nn.utils.clip_grad_norm_(params, spec['clip'], foreach=True)
      adam.step()
      with torch.no_grad():
        torch._foreach_lerp_(average, params, 1 - twin.decay(spec, count))
      count += 1
    return loss.item()  # which waits

  return advance, told


BATCH = 'image', 'label'


def optimizer(spec, params):
  named = {'adam': torch.optim.Adam, 'adamw': torch.optim.AdamW}[spec['optimizer']]
  options = dict(betas=(spec['b1'], spec['b2']), eps=spec['adam_eps'], fused=True)
  return named(params, spec['learning_rate'], weight_decay=spec['weight_decay'], **options)


# --- samplers -------------------------------------------------------------------------------------


def flow_draw(net, spec, x, label):
  """x [b h w c] of noise -> data, by Euler's method in t, which is DDIM on straight lines."""
  times = torch.linspace(1, 0, spec['steps'] + 1).tolist()
  for t, s in zip(times, times[1:]):
    told = torch.full((2 * len(x),), 1000 * t, device=x.device)
    x = x + (s - t) * guided(net(torch.cat([x, x]), told, label).float(), spec)
  return x


def edm_draw(net, spec, x, label):
  """x [b c h w] of noise -> data, by Euler's method in sigma; Karras et al. 2022, eq. 5, alg. 1."""
  d = spec['sigma_data']
  ends = (spec[name] ** (1 / 7) for name in ('sigma_max', 'sigma_min'))
  sigmas = [*(torch.linspace(*ends, spec['steps'], dtype=torch.float64) ** 7).tolist(), 0.0]
  x = sigmas[0] * x
  for s, r in zip(sigmas, sigmas[1:]):
    root = (s * s + d * d) ** 0.5
    shown = (torch.cat([x, x]) / root).contiguous(memory_format=twin.LAST)
    told = torch.full((2 * len(x),), spec['time_scale'] * math.log(s) / 4, device=x.device)
    out = guided(net(shown, told, label).float(), spec)
    x0 = (d / root) ** 2 * x + s * d / root * out
    x = x0 + r / s * (x - x0)
  return x


def guided(out, spec):
  """Ho & Salimans 2022, eq. 6, of both halves of a batch."""
  good, bad = out.chunk(2)
  return bad + spec['guidance'] * (good - bad)


def sample(job):
  """(advance, facts): `advance(n)` draws the job's batch n times, guided, onto the host."""
  spec, net = start(job)
  net.eval()
  told, label = facts(net, spec), torch.from_numpy(np.asarray(job['batch']['label']))
  label = torch.cat([label, torch.full_like(label, spec['classes'])]).long().to(DEVICE)
  shape = spec['size'], spec['size'], spec['channels']
  draw = flow_draw
  if spec['kind'] != 'dit':
    shape, draw = (shape[-1], *shape[:-1]), edm_draw
  net = compiled(job, net)

  def advance(times):
    for _ in range(times):
      with torch.no_grad(), autocast(job):  # which casts each weight once a batch
        x = draw(net, spec, torch.randn(len(label) // 2, *shape, device=DEVICE), label).cpu()
    return x.abs().mean().item()

  return advance, told


# --- both -----------------------------------------------------------------------------------------


def start(job):
  """(spec, network) of a job."""
  torch.manual_seed(0)
  torch.set_float32_matmul_precision('high')
  torch.backends.cudnn.benchmark = True
  if job['threads']:
    torch.set_num_threads(job['threads'])
  spec = job['spec']
  if spec['kind'] == 'dit':
    return spec, DiT(spec).to(DEVICE)
  return spec, twin.UNet(spec).to(DEVICE, memory_format=twin.LAST)


def compiled(job, function):
  return torch.compile(function, dynamic=False) if job['side'] == 'torch_compile' else function


def autocast(job):
  return torch.autocast(DEVICE.type, torch.bfloat16, enabled=job['dtype'] == 'bfloat16')


def facts(net, spec):
  """parameters, and forward_flops of one example."""
  shape = spec['size'], spec['size'], spec['channels']
  x = torch.zeros(1, *(shape if spec['kind'] == 'dit' else (shape[-1], *shape[:-1])), device=DEVICE)
  counter = FlopCounterMode(display=False)
  with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
    net(x, torch.ones(1, device=DEVICE), torch.zeros(1, dtype=torch.long, device=DEVICE))
  size = sum(p.numel() for p in net.parameters())
  return {'parameters': size, 'forward_flops': counter.get_total_flops(),
          'version': f'torch {torch.__version__}, {DEVICE.type}'}


def describe():
  """What there is to compute with."""
  there = DEVICE.type == 'cuda'
  return {
    'platform': 'gpu' if there else 'cpu', 'torch': torch.__version__,
    'device': torch.cuda.get_device_name() if there else 'cpu',
  }


def product(rows, dtype='float32'):
  """`run(n=1)`: n products of two drawn matrices of so many rows, waited for."""
  a, b = torch.randn(2, rows, rows, device=DEVICE).to(getattr(torch, dtype))
  out = torch.empty_like(a)

  def run(n=1):
    for _ in range(n):
      torch.mm(a, b, out=out)
    out[0, 0].item()  # which waits

  return run


def peak():
  """Bytes of the device that were allocated at most; None on a CPU."""
  return torch.cuda.max_memory_allocated() if DEVICE.type == 'cuda' else None
