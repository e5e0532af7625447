"""Reads the program a compiler made: its loops, its collectives, what its kernels move.

XLA's own cost analysis counts the body of a loop once and says nothing for GPUs. The text of the
optimised program says it all: what stands in a loop is carried out as often as the loop runs, a
collective names the devices that take part, and each kernel reads its operands from memory and
writes its results there. Shardings are resolved: every figure is that of one device.

  program = hlo.parse(compiled.as_text())
  hlo.collectives(program, island)      # what crosses the network
  hlo.traffic(program)                  # what the kernels move through memory
"""

import math
import re
from typing import NamedTuple

import numpy as np

BITS = {
  'pred': 8, 's2': 2, 'u2': 2, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 's32': 32,
  'u32': 32, 's64': 64, 'u64': 64, 'f16': 16, 'bf16': 16, 'f32': 32, 'f64': 64, 'c64': 64,
  'c128': 128, 'f4e2m1fn': 4, 'token': 0, 'opaque': 0,
}  # the other floats are of 8 bits
KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute',
         'ragged-all-to-all', 'collective-broadcast')
FREE = {  # what names or passes on what is there already; what is `-done` was counted as it began
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call',
  'after-all', 'partition-id', 'replica-id', 'opt-barrier', 'add-dependency', 'domain',
}
SLICES = {'dynamic-slice', 'slice', 'gather'}
NOTHING = {'AllocateBuffer', 'AssumeGatherIndicesInBound', 'ConcatBitcast'}  # custom calls of a TPU


class Shape(NamedTuple):
  """An array's dtype, sizes and memory: 0 is a device's main memory, 1 a TPU's VMEM."""

  dtype: str
  sizes: tuple
  space: int = 0

  @property
  def bytes(self):
    return -(-math.prod(self.sizes) * BITS.get(self.dtype, 8) // 8)


class Instruction(NamedTuple):
  """shapes: of the arrays it makes. operands: names. calls: {attribute: computations' names}."""

  name: str
  shapes: tuple
  opcode: str
  operands: tuple
  calls: dict
  text: str
  root: bool

  @property
  def bytes(self):
    return sum(shape.bytes for shape in self.shapes)


class Program(NamedTuple):
  """computations: {name: {instruction's name: instruction}}, each in order. entry: a name."""

  computations: dict
  entry: str
  devices: int


# --- reading --------------------------------------------------------------------------------------

_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = (.*)$')
_END = re.compile(r'^\}(, execution_thread="[^"]*")?\s*$')
_SHAPE = re.compile(r'([a-z]\w*)\[([\d,<=? ]*)\](\{[^{}]*\})?')
_NAME = re.compile(r'%([\w.\-]+)')
_CALL = re.compile(
  r'\b(calls|body|condition|to_apply|true_computation|false_computation|called_computations|'
  r'branch_computations|async_execution_thread_calls)=(\{[^}]*\}|%[\w.\-]+)')


def parse(text):
  """The program of `compiled.as_text()`. Raises ValueError where it is not read whole."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if current is None:
      if line.endswith('{') and (head := _HEAD.match(line)):
        current, name = [], head[2]
        entry = name if head[1] else entry
      elif _LINE.match(line):
        raise ValueError(f'an instruction stands outside of all computations: {line[:200]}')
    elif _END.match(line):
      computations[name] = _computation(name, current)
      current = None
    elif _LINE.match(line):
      current.append(line)
    elif current:  # kernels of TPUs tell of themselves on lines of their own
      current[-1] += ' ' + line
  if entry is None or current is not None:
    raise ValueError(f'no whole program: of {len(computations)} computations none is the entry, or '
                     'the last has no end')
  head = text.partition('\n')[0]
  counts = [int(n) for n in re.findall(r'\b(?:replica_count|num_partitions)=(\d+)', head)]
  return Program(computations, entry, math.prod(counts))


def _computation(name, lines):
  made = {x.name: x for x in (_instruction(_LINE.match(line)) for line in lines)}
  if not any(x.root for x in made.values()):
    raise ValueError(f'computation {name} has no result: its {len(made)} instructions are not all')
  return made


def _instruction(found):
  root, name, rest = found.groups()
  made, rest = _split(rest)
  opcode, _, rest = rest.partition('(')
  operands, attributes = _closed(rest)
  calls = {kind: tuple(_NAME.findall(names)) for kind, names in _CALL.findall(attributes)}
  return Instruction(
    name, _shapes(made), opcode.strip(), tuple(_NAME.findall(operands)), calls, rest, bool(root))


def _split(text):
  """What an instruction makes, a shape or a tuple of them, and what follows."""
  if not text.startswith('('):
    made, _, rest = text.partition(' ')
    return made, rest
  inner, rest = _closed(text[1:])
  return inner, rest.lstrip()


def _closed(text):
  """What stands before the bracket that closes, and what behind."""
  depth = 1
  for place in re.finditer(r'[()]', text):
    depth += 1 if place[0] == '(' else -1
    if not depth:
      return text[: place.start()], text[place.end() :]
  return text, ''


def _shapes(text):
  def one(dtype, sizes, layout):
    space = re.search(r'S\((\d+)\)', layout)
    numbers = tuple(int(n.lstrip('<= ')) for n in sizes.split(',') if n.strip('<= ?'))
    return Shape(dtype, numbers, int(space[1]) if space else 0)

  return tuple(one(*found) for found in _SHAPE.findall(text))


def root_of(computation):
  """The instruction that makes a computation's result."""
  return next(x for x in computation.values() if x.root)


def fused(program, instruction):
  """The computation that a fusion carries out, None for what is no fusion."""
  names = instruction.calls.get('calls', ()) if instruction.opcode == 'fusion' else ()
  return program.computations[names[0]] if names else None


# --- how often ------------------------------------------------------------------------------------


def walk(program, inside=False):
  """(instruction, computation, times) of all that is carried out, loops as often as they run.

  inside: whether also what stands in fusions and reductions, which are one kernel each. Of branches
  all are taken for carried out: which is, the data tell.
  """
  def visit(name, times):
    computation = program.computations[name]
    for instruction in computation.values():
      yield instruction, computation, times
      for kind, names in instruction.calls.items():
        if not inside and (instruction.opcode == 'fusion' or kind == 'to_apply'
                           and instruction.opcode != 'call'):
          continue
        often = times * _trips(program, computation, instruction) if kind == 'body' else times
        for inner in names if kind != 'condition' else ():
          yield from visit(inner, often)

  return visit(program.entry, 1)


def _trips(program, computation, loop):
  """How often a loop runs: as the compiler says, else by its counter. Raises ValueError."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
  if known:
    return int(known[1])
  condition = program.computations[loop.calls['condition'][0]]
  test = root_of(condition)
  if fused(program, test):
    test = root_of(fused(program, test))
  direction = re.search(r'direction=(\w+)', test.text)
  end = next((n for n in map(_constant, condition.values()) if n is not None), None)
  place = next((_index(x) for x in condition.values() if x.opcode == 'get-tuple-element'), None)
  begin = _first(program, computation, loop, place)
  if end is None or begin is None or not direction or direction[1] not in ('LT', 'LE', 'NE'):
    raise ValueError(f'loop {loop.name}: how often it runs is not to be read from its program')
  return max(end - begin + (direction[1] == 'LE'), 0)


def _constant(instruction):
  """An integer constant's value, None for anything else."""
  whole = instruction.opcode == 'constant' and re.match(r'(-?\d+)\)', instruction.text)
  return int(whole[1]) if whole else None


def _index(instruction):
  return int(re.search(r'index=(\d+)', instruction.text)[1])


def _first(program, computation, loop, place):
  """What a loop's counter, element `place` of its tuple, begins with; None where it is not said."""
  made = computation.get(loop.operands[0])
  if place is None or made is None or made.opcode != 'tuple':
    return None
  value = computation.get(made.operands[place])
  while value and value.opcode in ('copy', 'bitcast', 'copy-done', 'copy-start'):
    value = computation.get(value.operands[0])
  if value and fused(program, value):
    value = root_of(fused(program, value))
  return _constant(value) if value else None


# --- the network ----------------------------------------------------------------------------------


BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


class Collective(NamedTuple):
  """kind: of `KINDS`. times: a step. near, far: bytes a device sends each time within its island of
  the fast network, and beyond it.
  """

  kind: str
  name: str
  times: int
  near: float
  far: float


def collectives(program, island):
  """The collectives of a program, [Collective].

  island: int [devices], on which fast network each is: a TPU's slice, a host of GPUs. Bytes are
  those of algorithms that send the least: rings, within islands first where a group has several
  (Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH"). What slices
  of TPUs have to tell each other stands in the program as `send` through their hosts.
  """
  found, begun = [], {}
  every = [x for computation in program.computations.values() for x in computation.values()]
  pieces = {id(inner) for x in every if (inner := fused(program, x))}
  for instruction, computation, times in walk(program, inside=True):
    kind = instruction.opcode.removesuffix('-start')
    hosts = instruction.opcode == 'send' and BETWEEN_SLICES.search(instruction.text)
    if hosts:
      kind = hosts[1].lower().replace('_', '-').replace('one-to-one', 'collective-permute')
      found.append(Collective(kind, instruction.name, times, 0.0, _between(instruction, kind)))
      continue
    if kind not in KINDS:
      continue
    channel = re.search(r'channel_id=(\d+)', instruction.text)
    if channel and id(computation) in pieces:  # a TPU carries one out in several, that all name it
      if begun.setdefault(channel[1], instruction.name) != instruction.name:
        continue
    near, far, kind = _sent(program, instruction, computation, kind, np.asarray(island))
    found.append(Collective(kind, instruction.name, times, near, far))
  return found


def _between(instruction, kind):
  """Bytes that a device sends to other slices, each time."""
  size = instruction.shapes[0].bytes
  said = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', instruction.text)
  ends = [[int(n) for n in part.split(':')] for part in said[1].split(',')] if said else [[0, 1]]
  slices = sum(end[-1] - end[0] + 1 for end in ends)
  if kind == 'all-gather':
    return float(size * (slices - 1))
  if kind == 'collective-permute':
    return float(size)
  return size * (2 if kind == 'all-reduce' else 1) * (slices - 1) / slices


def _sent(program, instruction, computation, kind, island):
  """(near, far) bytes that a device sends, and the kind as carried out."""
  sizes = [sum(s.bytes for s in computation[x].shapes) for x in instruction.operands
           if x in computation]
  moved, made = sum(sizes), sum(s.bytes for s in instruction.shapes if s.dtype != 'u32')
  if kind == 'collective-permute':
    pairs = re.search(r'source_target_pairs=\{(\{.*?\})\}', instruction.text)
    pairs = np.asarray([p.split(',') for p in re.findall(r'\{([\d,]+)\}', pairs[1])], int)
    far = island[pairs[:, 0]] != island[pairs[:, 1]]
    return moved * bool((~far).any()), moved * bool(far.any()), kind
  if kind == 'all-reduce' and _scatters(computation, instruction):
    kind = 'reduce-scatter'
  shares = [_shares(kind, island[group]) for group in _groups(instruction.text, program.devices)]
  near, far = (max(each) for each in zip(*shares))
  if kind in ('all-gather', 'all-to-all', 'ragged-all-to-all'):
    return moved * near, moved * far, kind
  return (moved or made) * near, (moved or made) * far, kind


def _shares(kind, islands):
  """(near, far): what a device of a group sends, over what it has, where it sends the most.

  islands: on which each of the group is. Of groups that lie unevenly, a device whose island has
  many of them sends the most near, one with few far.
  """
  counts, n = np.unique(islands, return_counts=True)[1], len(islands)
  if kind in ('all-to-all', 'ragged-all-to-all'):
    return (counts.max() - 1) / n, (n - counts.min()) / n
  near = 1 - 1 / counts.max()
  far = (1 - 1 / len(counts)) / counts.min()
  times = n if kind == 'all-gather' else 2 if kind == 'all-reduce' else 1
  return times * near, times * far


def _scatters(computation, instruction):
  """Whether of a TPU's fused all-reduce each device keeps its own slice alone."""
  users = [x for x in computation.values() if instruction.name in x.operands]
  return bool(users) and all(x.opcode == 'dynamic-slice' for x in users)


def _groups(text, devices):
  """The groups of devices that take part together, [int [n]]."""
  listed = re.search(r'replica_groups=\{(\{[\d,{} ]*\})?\}', text)
  if listed:
    found = re.findall(r'\{([\d,]+)\}', listed[1] or '') or [','.join(map(str, range(devices)))]
    return [np.array(group.split(','), int) for group in found]
  iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if iota:
    shape, reshaped, order = ([int(n) for n in x.split(',')] if x else None for x in iota.groups())
    numbers = np.arange(math.prod(shape)).reshape(reshaped)
    return list(numbers.transpose(order or range(numbers.ndim)).reshape(shape))
  mesh = re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? *\{([^}]*)\}", text)
  if mesh:
    return _of_mesh(*mesh.groups())
  if 'replica_groups=' in text:
    found = text[text.index('replica_groups=') :][:80]
    raise ValueError(f'devices that take part are written in a form that is not known: {found}')
  return [np.arange(devices)]


def _of_mesh(said, order, over):
  """The groups over axes named of a mesh, `'x'=4,'y'=2` over `'x'`; parts of an axis as
  `'x':(1)2`, which is the part of 2 behind one of 1. order: of its devices, `[2,4]T(1,0)` or a
  list; None for their own."""
  axes = {name: int(n) for name, n in re.findall(r"'?([\w.]+)'?=(\d+)", said)}
  numbers = np.arange(math.prod(axes.values()))
  turned = re.fullmatch(r'\[([\d,]+)\]T\(([\d,]+)\)?', order or '')
  if turned:
    shape, axis_order = ([int(n) for n in part.split(',')] for part in turned.groups())
    numbers = numbers.reshape(shape).transpose(axis_order).ravel()
  elif order:
    numbers = np.asarray([int(n) for n in re.findall(r'\d+', order)])
  numbers = numbers.reshape(list(axes.values()) or [1])
  apart = np.indices(numbers.shape)  # where each stands along axes, but for what a group is over
  for name, before, size in re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?", over):
    place, size = list(axes).index(name), int(size or axes[name])
    behind = axes[name] // (int(before or 1) * size)
    apart[place] -= np.indices(numbers.shape)[place] // behind % size * behind
  found = {}
  for device, *key in np.stack([numbers, *apart], -1).reshape(numbers.size, -1).tolist():
    found.setdefault(tuple(key), []).append(device)
  return [np.array(group) for group in found.values()]


# --- memory ---------------------------------------------------------------------------------------


class Kernel(NamedTuple):
  """times: a step. moved: bytes it reads from main memory and writes there, each time."""

  instruction: Instruction
  times: int
  moved: int


def kernels(program):
  """[Kernel]: all that is carried out and moves anything, in order."""
  found = []
  for instruction, computation, times in walk(program):
    if instruction.opcode in FREE or instruction.opcode.endswith(('-done', '-update')):
      continue
    if target(instruction) in NOTHING:
      continue
    found.append(Kernel(instruction, times, moved(program, computation, instruction)))
  return [kernel for kernel in found if kernel.moved]


def traffic(program):
  """Bytes that a step moves between a device's main memory and its kernels.

  Each kernel reads its operands once and writes its results once; of what it slices, and of what it
  updates in place, the slice alone. A cache may save some of it.
  """
  return sum(kernel.times * kernel.moved for kernel in kernels(program))


def target(instruction):
  """The program of another library that a custom call names, None for what is none."""
  found = re.search(r'custom_call_target="([^"]*)"', instruction.text)
  return found[1] if found and instruction.opcode == 'custom-call' else None


def moved(program, computation, instruction):
  """Bytes that a kernel reads from main memory and writes there."""
  inner = fused(program, instruction)
  operands = [computation[name] for name in instruction.operands if name in computation]
  if inner:
    read = sum(_read(program, inner, g, _main(o)) for g, o in zip(_given(inner), operands))
    return read + _written(inner, root_of(inner), instruction.shapes)
  opcode = instruction.opcode.removesuffix('-start')
  if opcode == 'dynamic-update-slice':
    return 2 * _main(operands[1])
  made = sum(s.bytes for s in instruction.shapes if not s.space)
  if opcode in ('copy', 'slice', 'dynamic-slice') and instruction.opcode.endswith('-start'):
    target, source = instruction.shapes[0], instruction.shapes[1]  # (copy, original, ...)
    size = min(target.bytes, source.bytes)
    return size * (not target.space) + size * (not source.space)
  if opcode in SLICES:
    return made + min(made, _main(operands[0]))
  if opcode in KINDS and instruction.opcode.endswith('-start'):
    return 2 * sum(_main(x) for x in operands)
  return made + sum(map(_main, operands))


def _main(instruction):
  """Bytes of what lies in main memory of an instruction's results."""
  return sum(shape.bytes for shape in instruction.shapes if not shape.space)


def _given(computation):
  """A computation's parameters, in order."""
  number = lambda x: int(re.match(r'(\d+)\)', x.text)[1])
  return sorted((x for x in computation.values() if x.opcode == 'parameter'), key=number)


def _users(computation, name):
  """(instruction, name) of who uses a value, whatever it is called on the way."""
  for x in computation.values():
    if name in x.operands:
      yield from _users(computation, x.name) if x.opcode == 'bitcast' else ((x, name),)


def _read(program, inner, parameter, size):
  """How much of an operand of `size` bytes a fusion reads; one may stand within another."""
  read = 0
  for user, name in _users(inner, parameter.name) if size else ():
    deeper = fused(program, user)
    if deeper:
      places = [i for i, operand in enumerate(user.operands) if operand == name]
      read += sum(_read(program, deeper, _given(deeper)[i], size) for i in places)
    elif user.opcode in SLICES and user.operands[0] == name:
      read += user.bytes
    elif user.opcode != 'dynamic-update-slice' or user.operands[0] != name:
      return size
  return min(size, read)


def _written(inner, root, shapes):
  """Bytes that a fusion writes, of what it updates in place the update alone."""
  while root.opcode == 'bitcast':
    root = inner[root.operands[0]]
  if root.opcode == 'tuple':
    return sum(_written(inner, inner[x], (s,)) for x, s in zip(root.operands, shapes))
  if root.opcode == 'dynamic-update-slice':
    return sum(s.bytes for s in inner[root.operands[1]].shapes) * (not shapes[0].space)
  return sum(s.bytes for s in shapes if not s.space)
