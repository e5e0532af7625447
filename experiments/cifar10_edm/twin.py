"""The same network and objective in plain PyTorch, trained by a loop of its own; see compare.py.

A U-Net as Song et al. 2021, "Score-Based Generative Modeling through SDEs", appendix H, describe
DDPM++, at the sizes a JSON file gives, learns EDM's objective (Karras et al. 2022, table 1):

  D(x; sigma) = c_skip x + c_out F(c_in x; c_noise),    ln sigma ~ N(P_mean, P_std^2)
  loss = E lambda(sigma) |D(y + sigma eps) - y|^2,      lambda = (sigma^2 + d^2) / (sigma d)^2

Written as one would for speed in eager mode: channels last, the library's own attention with one
product for query, key and value, fused Adam, `_foreach` for the average. It does without the check
for numbers that are not finite, which diffax's step has. Needs torch and numpy, no diffax.
"""

import argparse
import json
import math
import pathlib
import time
import zlib

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F
import turns

LAST = torch.channels_last
DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


# --- the network ----------------------------------------------------------------------------------


def norm(spec, channels):
  return nn.GroupNorm(max(1, min(spec['groups'], channels // 4)), channels, spec['eps'])


def conv(into, out):
  return nn.Conv2d(into, out, 3, padding=1)


def rows(x):
  """[b c h w], channels last -> [b h w c]: the same memory."""
  return x.permute(0, 2, 3, 1)


def add(x, y):
  return (x + y).mul_(0.5**0.5)


class Attention(nn.Module):
  """One head of attention among the places of x [b c h w]."""

  def __init__(self, spec, channels):
    super().__init__()
    self.norm = norm(spec, channels)
    self.qkv = nn.Linear(channels, 3 * channels)
    self.out = nn.Linear(channels, channels)

  def forward(self, x):
    b, c, h, w = x.shape
    q, k, v = self.qkv(rows(self.norm(x)).reshape(b, 1, h * w, c)).chunk(3, -1)  # [b 1 n c]
    y = self.out(F.scaled_dot_product_attention(q, k, v))
    return add(x, y.view(b, h, w, c).permute(0, 3, 1, 2))


class Block(nn.Module):
  """A residual block; resample: '', 'down' or 'up'."""

  def __init__(self, spec, into, out, attend=False, resample=''):
    super().__init__()
    self.resample, self.dropout = resample, spec['dropout']
    self.norm_in, self.conv_in = norm(spec, into), conv(into, out)
    self.embed = nn.Linear(spec['embedding'], out)
    self.norm_out, self.conv_out = norm(spec, out), conv(out, out)
    self.shortcut = nn.Linear(into, out) if into != out or resample else None
    self.attention = Attention(spec, out) if attend else None

  def forward(self, x, e):
    h = F.silu(self.norm_in(x))
    if self.resample == 'down':
      h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
    if self.resample == 'up':
      h, x = (F.interpolate(y, scale_factor=2, mode='nearest') for y in (h, x))
    h = self.conv_in(h).add_(self.embed(e)[:, :, None, None])
    h = F.silu(self.norm_out(h))
    h = self.conv_out(F.dropout(h, self.dropout, self.training) if self.dropout else h)
    x = add(x if self.shortcut is None else self.shortcut(rows(x)).permute(0, 3, 1, 2), h)
    return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
  """F(x [b c h w]; t [b]) with labels [b], of which `classes` itself is the null label."""

  def __init__(self, spec):
    super().__init__()
    width, blocks, embedding = spec['width'], spec['blocks'], spec['embedding']
    widths = [int(width * m) for m in spec['multipliers']]
    attends = [spec['size'] // 2**level in spec['attention'] for level in range(len(widths))]
    rate = np.exp(-math.log(10_000.0) * np.arange(width // 2) / (width // 2 - 1))
    self.register_buffer('rate', torch.from_numpy(rate.astype('f4')), persistent=False)
    self.time_in, self.time_out = nn.Linear(width, embedding), nn.Linear(embedding, embedding)
    self.label = nn.Embedding(spec['classes'] + 1, embedding) if spec['classes'] else None
    self.conv_in = conv(spec['channels'], width)
    self.encoder, self.middle, self.decoder = (nn.ModuleDict() for _ in range(3))
    into, skips = width, [width]
    for level, out in enumerate(widths):
      if level:
        self.encoder[f'encoder{level - 1}_down'] = Block(spec, into, into, resample='down')
        skips.append(into)
      for i in range(blocks):
        self.encoder[f'encoder{level}_block{i}'] = Block(spec, into, out, attends[level])
        skips.append(into := out)
    for i in range(2):
      self.middle[f'middle_block{i}'] = Block(spec, into, into, attend=i == 0)
    for level, out in reversed(list(enumerate(widths))):
      if level + 1 < len(widths):
        self.decoder[f'decoder{level + 1}_up'] = Block(spec, into, into, resample='up')
      for i in range(blocks + 1):
        attend = attends[level] and i == blocks
        self.decoder[f'decoder{level}_block{i}'] = Block(spec, into + skips.pop(), out, attend)
        into = out
    self.norm, self.out = norm(spec, into), conv(into, spec['channels'])
    self.apply(start)
    nn.init.zeros_(self.out.weight)

  def forward(self, x, t, label):
    wave = t[:, None] * self.rate
    e = self.time_out(F.silu(self.time_in(torch.cat([wave.cos(), wave.sin()], -1))))
    e = F.silu(e if self.label is None else e + self.label(label))
    x = self.conv_in(x)
    skips = [x]
    for block in self.encoder.values():
      skips.append(x := block(x, e))
    for block in self.middle.values():
      x = block(x, e)
    for block in self.decoder.values():
      x = block(x if block.resample else torch.cat([x, skips.pop()], 1), e)
    return self.out(F.silu(self.norm(x)))


def start(module):
  """Glorot & Bengio's uniform weights, no biases; what a sum adds begins at zero."""
  if isinstance(module, (nn.Conv2d, nn.Linear)):
    nn.init.xavier_uniform_(module.weight)
    nn.init.zeros_(module.bias)
  if isinstance(module, Attention):
    for part in module.qkv.weight.data.chunk(3):  # three layers, for the range of their numbers
      nn.init.xavier_uniform_(part)
    nn.init.zeros_(module.out.weight)
  if isinstance(module, Block):
    nn.init.zeros_(module.conv_out.weight)


# --- the objective --------------------------------------------------------------------------------


def losses(net, spec, y, sigma, eps, label):
  """[b] of images y and noise eps, [b c h w], at levels sigma [b]."""
  d, s = spec['sigma_data'], sigma[:, None, None, None]
  variance = s**2 + d**2
  x = y + s * eps
  told = spec['time_scale'] * sigma.log() / 4
  out = net((x * variance.rsqrt()).contiguous(memory_format=LAST), told, label)
  x0 = d**2 / variance * x + s * d * variance.rsqrt() * out
  return (variance / (s * d) ** 2 * (x0 - y).square()).mean((1, 2, 3))


def draw(spec, images, label):
  """What a step is of: images [b c h w], sigma [b], noise, labels, of which some are dropped."""
  y, label = images.to(DEVICE).permute(0, 3, 1, 2), label.to(DEVICE)
  sigma = (spec['mean'] + spec['std'] * torch.randn(len(y), device=DEVICE)).exp()
  sigma = sigma.clamp(spec['sigma_min'], spec['sigma_max'])
  if spec['classes']:
    drop = torch.rand(len(y), device=DEVICE) < spec['drop_cond']
    label = torch.where(drop, spec['classes'], label)
  return y, sigma, torch.randn_like(y), label


def rate(spec, step):
  """The learning rate of the update after `step` others: a linear rise, then half a cosine."""
  r = spec['rate']
  if step < r['warmup_steps']:
    return r['init_value'] + (r['peak_value'] - r['init_value']) * step / r['warmup_steps']
  done = min((step - r['warmup_steps']) / (r['decay_steps'] - r['warmup_steps']), 1.0)
  return r['end_value'] + (r['peak_value'] - r['end_value']) * (1 + math.cos(math.pi * done)) / 2


def decay(spec, step):
  """Of the average, whose memory is short at first."""
  return min(spec['ema'], (1 + step) / (10 + step))


def trainer(spec, net=None):
  """(net, average, update, learn): `update(images [b h w c] in [-1, 1], label [b])` is a step, and
  `learn(images [b c h w], sigma, noise, label)` one whose draws are given; both return its loss.

  average: the averaged parameters, a list in the order of the net's. net: None for a new one.
  """
  torch.manual_seed(spec['seed'])
  net = net or UNet(spec).to(DEVICE, memory_format=LAST).train()
  params = list(net.parameters())
  average = [p.detach().clone() for p in params]
  adam = torch.optim.Adam(params, 0.0, (spec['b1'], spec['b2']), spec['adam_eps'], fused=True)
  count = 0

  def update(images, label):
    return learn(*draw(spec, images, label))

  def learn(y, sigma, eps, label):
    nonlocal count
    loss = losses(net, spec, y, sigma, eps, label).mean()
    adam.zero_grad(set_to_none=True)
    loss.backward()
    if spec['clip']:
      nn.utils.clip_grad_norm_(params, spec['clip'], foreach=True)
    adam.param_groups[0]['lr'] = rate(spec, count)
    adam.step()
    with torch.no_grad():
      torch._foreach_lerp_(average, params, 1 - decay(spec, count))
    count += 1
    return loss.detach()

  return net, average, update, learn


# --- the commands ---------------------------------------------------------------------------------


def batches(spec, data):
  """Endless batches of (images float [b h w c] in [-1, 1], label [b]), shuffled anew every epoch.

  data: a .npz of `image` uint8 [n h w c] and `label` [n]. Half of the images are mirrored.
  """
  with np.load(data) as held:
    image, label = (torch.from_numpy(held[name]) for name in ('image', 'label'))
  order = torch.empty(0, dtype=torch.long)
  while True:
    while len(order) < spec['batch_size']:
      order = torch.cat([order, torch.randperm(len(image))])
    chosen, order = order[: spec['batch_size']], order[spec['batch_size'] :]
    x = image[chosen]
    if spec['flip']:
      x = torch.where(torch.rand(len(x))[:, None, None, None] < 0.5, x.flip(2), x)
    yield x.float().div_(127.5).sub_(1), label[chosen].long()


def train(spec, data, out):
  """Trains for the spec's steps; writes log.jsonl and the averaged weights.npz into `out`."""
  net, average, update, _ = trainer(spec)
  source, total, mark = batches(spec, data), torch.zeros((), device=DEVICE), time.perf_counter()
  with open(out / 'log.jsonl', 'w') as log:
    for step in range(1, spec['steps'] + 1):
      total += update(*next(source))
      if step % spec['log_every'] == 0:
        now, loss = time.perf_counter(), total.item() / spec['log_every']
        pace = spec['log_every'] * spec['batch_size'] / (now - mark)
        total, mark = torch.zeros_like(total), now
        log.write(json.dumps({'step': step, 'loss': loss, 'images_per_second': pace}) + '\n')
        log.flush()
        print(f'twin {step}/{spec["steps"]}  loss {loss:.4f}  {pace:.0f} images/s', flush=True)
        if not math.isfinite(loss):
          raise SystemExit(f'the loss is {loss}: stopped at step {step}')
  names = [name for name, _ in net.named_parameters()]
  np.savez(out / 'weights.npz', **{name: p.cpu().numpy() for name, p in zip(names, average)})


def expect(spec, data, out):
  """Losses, and levels, of `steps` batches under the averaged weights in `out`, which stay; written
  to expected.npz.
  """
  net = UNet(spec).to(DEVICE, memory_format=LAST).train()
  with np.load(out / 'weights.npz') as held, torch.no_grad():
    for name, p in net.named_parameters():
      p.copy_(torch.from_numpy(held[name]))
  torch.manual_seed(spec['seed'] + 1)
  source, each, levels = batches(spec, data), [], []
  with torch.no_grad():
    for _ in range(spec['steps']):
      drawn = draw(spec, *next(source))
      each.append(losses(net, spec, *drawn).cpu())
      levels.append(drawn[1].cpu())
  np.savez(out / 'expected.npz', losses=torch.cat(each), sigma=torch.cat(levels))


def answers(spec, data, out):
  """Outputs, losses and gradients of weights drawn by numpy from their names, for given inputs.

  data: a .npz of x [b h w c], t and sigma [b], image and eps as x, label [b]. Written to `out`,
  beside the weights: `output`, `losses`, `gradient/NAME` of the mean loss, of the spec's steps
  `rates` and `decays`, of `updates` steps of training their losses, `course`, and how far the
  averaged parameters went, `moved/NAME`.
  """
  net = UNet(spec).to(memory_format=LAST).train()
  for name, p in net.named_parameters():
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(p.shape))
    flat = 0.1 * numbers + ('norm' in name and name.endswith('weight'))
    numbers = flat if p.ndim == 1 else numbers * np.prod(p.shape[1:]) ** -0.5
    p.data.copy_(torch.from_numpy(numbers))
  with np.load(data) as held:
    given = {name: torch.from_numpy(held[name]) for name in held.files}
  picture = lambda name: given[name].permute(0, 3, 1, 2)
  label = given['label'].long()
  with torch.no_grad():
    output = rows(net(picture('x'), given['t'], label))
  each = losses(net, spec, picture('image'), given['sigma'], picture('eps'), label)
  each.mean().backward()
  found = {name: p.detach() for name, p in net.named_parameters()}
  found |= {f'gradient/{name}': p.grad for name, p in net.named_parameters()}
  found = {name: x.clone() for name, x in found.items()}
  _, average, _, learn = trainer(spec, net)
  course = []
  for k in range(spec['updates']):  # the noise of another image each time
    eps = picture('eps').roll(k, 0)
    course.append(learn(picture('image'), given['sigma'].roll(k, 0), eps, label))
  for (name, _), p in zip(net.named_parameters(), average):
    found[f'moved/{name}'] = p - found[name]
  found['course'] = torch.stack(course)
  steps = range(spec['steps'])
  np.savez(
    out, output=output, losses=each.detach(), rates=[rate(spec, step) for step in steps],
    decays=[decay(spec, step) for step in steps], **found,
  )


def serve(spec, data, steps):
  """Trains on one batch, when asked to; see turns.py. data: as that of `batches`."""
  _, average, update, _ = trainer(spec)
  batch = next(batches(spec, data))

  def advance(count):
    for _ in range(count):
      loss = update(*batch)
    return loss.item()

  def matmul(n):
    a = torch.ones(n, n, device=DEVICE)
    return lambda: (a @ a)[0, 0].item()  # which waits for it

  facts = {
    'parameters': sum(p.numel() for p in average),
    'version': f'torch {torch.__version__}, {DEVICE}',
    'flop_an_image': flop(update, batch) / spec['batch_size'],
  }
  turns.serve(facts, advance, matmul, steps)


def flop(update, batch):
  """Of the products and convolutions of one step, forwards and backwards."""
  from torch.utils import flop_counter

  with flop_counter.FlopCounterMode(display=False) as counter:
    update(*batch)
  return counter.get_total_flops()


def main():
  parser = argparse.ArgumentParser(description='the twin, to be started by compare.py')
  parser.add_argument('command', choices=('train', 'answers', 'expect', 'serve'))
  parser.add_argument('--spec', type=pathlib.Path, required=True)
  parser.add_argument('--data', required=True)
  parser.add_argument('--out', type=pathlib.Path)
  parser.add_argument('--threads', type=int, required=True)
  parser.add_argument('--steps', type=int, help='serve: a turn')
  args = parser.parse_args()
  torch.set_num_threads(args.threads)
  spec = json.loads(args.spec.read_text())
  if args.command == 'serve':
    turns.pin(args.threads)
    serve(spec, args.data, args.steps)
  else:
    {'train': train, 'answers': answers, 'expect': expect}[args.command](spec, args.data, args.out)


if __name__ == '__main__':
  main()
