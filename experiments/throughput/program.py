"""Reads the program that is compiled for GPUs that are not here: what of a step is not needed.

  python experiments/throughput/program.py --out experiments/throughput/results/program_h200.json
  python experiments/throughput/program.py --topology h200:1x8 --models XL/2 --what train

Compiles the training step, and the sampler, as `table.py` measures them, and tells of each: which
attention is fused; in what numbers products are taken; what kernels only move, copy or transpose;
and how much of the collectives no kernel hides. Needs the extra `cuda`; no GPU, no driver.

A kernel is given the longer of its products at the chip's peak and its bytes at the chip's
bandwidth, one after the other, with the network beside them: a bound that is nearer than the
longest of three sums, and still no measurement. The compiler had no GPU to try its choices on:
one that has may take other kernels for products, and add biases within them.
"""

import argparse
import collections
import json
import math
import pathlib
import re
import shlex
import sys

import jax

import cases

from diffax import chips
from diffax import hlo
from diffax import sample
from diffax import train

MOVES = {'bitcast', 'broadcast', 'concatenate', 'constant', 'convert', 'copy', 'get-tuple-element',
         'iota', 'pad', 'parameter', 'reshape', 'reverse', 'slice', 'transpose', 'tuple'}
SHARED = re.compile(r'lhs_contracting_dim(?:ension)?s(?:=\{|":\[)([\d,"]*)')  # dot's, cuBLASLt's
PREPARED = {'parameter', 'bitcast', 'constant', 'broadcast', 'iota', 'tuple', 'get-tuple-element'}


def inside(program, instruction):
  """(instruction, its computation) of all that a kernel carries out."""
  inner = hlo.fused(program, instruction)
  for x in inner.values() if inner else ():
    yield x, inner
    yield from inside(program, x)


def products(program):
  """{instruction's name: [(dtype, FLOPs)]} of the products in each kernel; cuDNN's convolutions and
  attention count nothing."""
  found = collections.defaultdict(list)
  for instruction, computation, _ in hlo.walk(program):
    for x, within in (*inside(program, instruction), (instruction, computation)):
      over = SHARED.search(x.text) if x.opcode in ('dot', 'custom-call') else None
      if over:
        left = within[x.operands[0]].shapes[0]
        shared = math.prod(left.sizes[int(i)] for i in re.findall(r'\d+', over[1]))
        found[instruction.name].append((left.dtype, 2 * math.prod(x.shapes[0].sizes) * shared))
      elif '__cudnn$conv' in x.text and x.opcode == 'custom-call':
        found[instruction.name].append((within[x.operands[0]].shapes[0].dtype, 0))
  return found


def moves(program):
  """[(what it is for, how, times, bytes in all)] of kernels that compute nothing, by bytes."""
  found = collections.defaultdict(lambda: [0, 0])
  for instruction, times, moved in hlo.kernels(program):
    does = {x.opcode for x, _ in inside(program, instruction)} or {instruction.opcode}
    if does <= MOVES and does - PREPARED:
      place = re.search(r'op_name="([^"]*)"', instruction.text)
      row = found[place[1] if place else 'no place is told', tuple(sorted(does - PREPARED))]
      row[0], row[1] = row[0] + times, row[1] + times * moved
  return sorted(((*key, *row) for key, row in found.items()), key=lambda each: -each[3])


def timeline(program, chip, sent):
  """(seconds of kernels, of collectives, of those that no kernel hides), each at its least.

  sent: `hlo.collectives`. Kernels run one after the other, collectives too, beside each other.
  """
  rate = lambda dtype: chip.single if dtype == 'f32' else chip.half
  takes = {name: sum(n / rate(dtype) for dtype, n in each)
           for name, each in products(program).items()}
  kernels = {k.instruction.name: k.moved for k in hlo.kernels(program)}
  wires = {c.name: c.near / chip.fast + c.far / chip.slow for c in sent}
  clocks = collections.defaultdict(lambda: dict(kernel=0.0, wire=0.0, ends={}))
  work = wire = waited = 0.0
  for x, computation, times in hlo.walk(program):
    clock, wait = clocks[id(computation)], 0.0  # a loop's body has its own
    if x.name in wires:
      clock['wire'] = max(clock['wire'], clock['kernel']) + wires[x.name]
      clock['ends'][x.name] = clock['wire']
      wire += times * wires[x.name]
      if not x.opcode.endswith('-start'):  # nothing goes on beside it
        wait = clock['wire'] - clock['kernel']
    elif x.opcode.endswith('-done'):
      wait = max(0.0, clock['ends'].get(x.operands[0], 0.0) - clock['kernel'])
    else:
      each = max(takes.get(x.name, 0.0), kernels.get(x.name, 0) / chip.bandwidth)
      clock['kernel'] += each
      work += times * each
    clock['kernel'] += wait
    waited += times * wait
  return work, wire, waited


def reading(text, topology, mesh):
  """What the module's docstring says, of a program's text: plain data."""
  program = hlo.parse(text)
  targets, numbers = collections.Counter(), collections.Counter()
  of = products(program)
  for x, _, times in hlo.walk(program):
    targets[hlo.target(x) or ''] += times
    for dtype, n in of.get(x.name, ()):
      numbers[dtype] += times * n
  moving, traffic = moves(program), hlo.traffic(program)
  sent = hlo.collectives(program, topology.islands(mesh))
  work, wire, waited = timeline(program, topology.chip, sent)
  fused = {name: n for name, n in targets.items() if 'fmha' in name}
  return dict(
    fused_attention=fused, product_flops=dict(numbers), traffic_bytes=traffic,
    moving_bytes=sum(size for *_, size in moving),
    moving=[dict(place=place, does=list(does), times=times, bytes=size)
            for place, does, times, size in moving[:8]],
    kernel_seconds=work, network_seconds=wire, network_alone_seconds=waited)


def compiled(model, what, batch, topology, overrides):
  """(the run, its program's text)."""
  run = train.setup(
    cases.config(model, batch, 'bfloat16', overrides), list(topology.devices))
  if what == 'train':
    return run, train.compile_step(run).as_text()
  generate, arguments = sample.program(run, run.config['sample'], 'sample')
  with run.layout():
    return run, generate.lower(*arguments).compile().as_text()


def told(row):
  """A reading in a few lines."""
  flops, moved = row['product_flops'], row['moving_bytes'] / row['traffic_bytes']
  fused = ', '.join(f'{n} {name}' for name, n in row['fused_attention'].items()) or 'none'
  seconds = row['kernel_seconds'] + row['network_alone_seconds']
  network = row['network_seconds']
  lines = [
    f'{row["model"]}, {row["what"]}, {row["batch"]} images on {row["topology"]}',
    f'  attention  {fused}',
    '  products   ' + ', '.join(f'{n / 1e12:.4g} TFLOP in {dtype}' for dtype, n in flops.items()),
    f'  moving     {moved:.1%} of {row["traffic_bytes"] / 1e9:.4g} GB in kernels that only move',
    *(f'             {m["bytes"] / row["traffic_bytes"]:.2%} {", ".join(m["does"])}, {m["times"]} '
      f'times: {m["place"]}' for m in row['moving'][:4]),
  ]
  if network:
    alone = row['network_alone_seconds']
    lines.append(
      f'  network    {network * 1e3:.2f} ms, {alone * 1e3:.2f} of them beside no kernel')
  return '\n'.join([*lines, f'  at least   {seconds * 1e3:.1f} ms, kernel by kernel'])


def main(argv=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--topology', default='h200:1')
  parser.add_argument('--models', nargs='+', default=['XL/2', 'unet'], choices=cases.MODELS)
  parser.add_argument('--what', nargs='+', default=list(cases.WHATS), choices=cases.WHATS)
  parser.add_argument('--batch', type=int, help='images a chip; else as table.py has')
  parser.add_argument('--out', type=pathlib.Path)
  args, overrides = parser.parse_known_args(argv)
  topology, rows = chips.topology(args.topology), []
  count = len(topology.devices)
  mesh = [f'--config.mesh.fsdp={count}', '--config.mesh.data=1'] if count > 1 else []
  for model in args.models:
    for what in args.what:
      batch = count * (args.batch or cases.batch(model, what, 'gpu'))
      run, text = compiled(model, what, batch, topology, [*mesh, *overrides])
      about = dict(model=model, what=what, batch=batch, topology=topology.name)
      rows.append(about | reading(text, topology, run.mesh))
      print(told(rows[-1]), flush=True)
  if args.out:
    command = shlex.join(['python', 'experiments/throughput/program.py', *(argv or sys.argv[1:])])
    made = dict(command=command, jax=jax.__version__, rows=rows)
    args.out.write_text(json.dumps(made, indent=1) + '\n')


if __name__ == '__main__':
  main()
