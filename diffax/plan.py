"""What a run will need and how fast it can be, before there is a chip to run it on.

The program that would run is compiled ahead of time for a topology (`chips.topology`), and read:

  memory     the compiler's own account of a chip, against what the chip has
  compute    FLOPs of the traced program, loops as often as they run, recomputation and all
  network    the collectives of the compiled program, in bytes a chip sends (`hlo.collectives`)
  bandwidth  what its kernels move through main memory (`hlo.traffic`)

Roofline (Williams et al. 2009): the step takes at least the longest of what compute, memory and
network take by themselves, each at the maker's figure. A real step takes longer: products reach 50
to 80 % of the figure, and not all of the network's time is hidden behind them.
"""

import json
import math
import time
from typing import NamedTuple

import jax

from diffax import chips
from diffax import config as configs
from diffax import flops
from diffax import hlo
from diffax import sample
from diffax import sharding
from diffax import train
from diffax.build import ConfigError, near

WHAT = ('train', 'sample')
SHARES = (2, 4, 8)  # into how many parts a search splits tokens, heads and batches
POLICIES = ('none', 'dots_saveable', 'nothing_saveable')


class Program(NamedTuple):
  """traced: for its FLOPs, with attention as plain products. lowered: a function -> the program,
  lowered for the mesh. images: of a call. model: FLOPs of the model alone. held: shapes of what
  lies on the devices from call to call."""

  traced: jax.stages.Traced
  lowered: object
  images: int
  model: float
  held: object


def plan(config, topology, what='train'):
  """What the config's step comes to on a `chips.Topology`: a dict of plain data, see `report`.

  what: 'train', or 'sample': a batch of `config.sample`. Of buckets, the one that needs the most.
  A network that is trained every so many steps, as a critic's opponent, counts as if it were in
  each. Raises ConfigError where it cannot be built, or its data tell how long it takes.
  """
  known(what)
  run = train.setup(config, list(topology.devices))
  try:
    programs = _training(run) if what == 'train' else _sampling(run)
    found = [_planned(run, program, topology) for program in programs]
  except ValueError as error:  # of an adaptive sampler, and of a program of a form not known
    raise ConfigError(
      f'this program cannot be planned ({" ".join(str(error).split())}); plan a sampler with a '
      'number of steps, or another topology') from error
  worst = max(found, key=lambda each: each['hbm_bytes_per_chip']['peak'] or math.inf)
  about = dict(
    topology=topology.name, chips=len(topology.devices), what=what,
    islands=len(set(topology.islands(run.mesh))), settings=_settings(run.config, run.mesh),
    parameters=sum(x.size for x in jax.tree.leaves(run.like.params)), jax=jax.__version__,
  )
  return about | worst


def known(what):
  """Raises ConfigError where that is not planned."""
  if what not in WHAT:
    raise ConfigError(f'--plan.what={what!r}: {near(what, WHAT)}')


def _training(run):
  plain, traced = train.traced_steps(run, 'xla'), train.traced_steps(run)
  model = train.model_flops(run)
  size = run.config['batch_size']
  return [Program(plain[s], traced[s].lower, size, model, run.like) for s in traced]


def _sampling(run):
  generate, arguments = sample.program(run, run.config['sample'], 'sample')
  with sharding.using(run.mesh, 'xla'):  # anew: jit keeps what it traced with other attention
    traced = jax.jit(lambda *args: generate.__wrapped__(*args)).trace(*arguments)
  count = len(arguments[2])
  model = sum(flops.of(traced.jaxpr).values())
  return [Program(traced, lambda: generate.lower(*arguments), count, model, arguments[:2])]


def _planned(run, program, topology):
  began = time.perf_counter()
  try:
    with run.layout():
      compiled = program.lowered().compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return _without(program, topology, str(error), time.perf_counter() - began)
  seconds = time.perf_counter() - began
  text = hlo.parse(compiled.as_text())
  sent = hlo.collectives(text, topology.islands(run.mesh))
  memory = compiled.memory_analysis()
  size = lambda name: int(getattr(memory, f'{name}_size_in_bytes'))
  peak = sum(map(size, ('argument', 'output', 'temp', 'generated_code'))) - size('alias')
  return _bounded(
    program, topology, _held(program) | dict(temp=size('temp'), peak=peak), by_kind(sent),
    hlo.traffic(text)) | dict(compile_seconds=seconds)


def _without(program, topology, said, seconds):
  """What is known of a program that the compiler refused, for it is larger than the chip."""
  found = _bounded(program, topology, _held(program) | dict(temp=None, peak=None), {}, None)
  return found | dict(compile_seconds=seconds, refused=' '.join(said.split())[:500])


def by_kind(sent):
  """{kind: {count, near_bytes, far_bytes}} of collectives, a step."""
  kinds = {}
  for each in sent:
    row = kinds.setdefault(each.kind, dict(count=0, near_bytes=0, far_bytes=0))
    row['count'] += each.times
    row['near_bytes'] += round(each.times * each.near)
    row['far_bytes'] += round(each.times * each.far)
  return kinds


def _held(program):
  """Bytes a chip of what lies there from call to call, and how much of it lies on each one whole,
  for sizes that do not divide; what lies on the host is not counted."""
  found = dict(state=0, whole=0)
  for x in jax.tree.leaves(program.held):
    if x.sharding.memory_kind != 'pinned_host':
      part = x.sharding.shard_shape(x.shape)
      found['state'] += math.prod(part) * _width(x.dtype)
      found['whole'] += math.prod(part) * _width(x.dtype) * (part == x.shape)
  return found


def _width(dtype):
  return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def _bounded(program, topology, memory, kinds, traffic):
  """The figures of a program, and the bound on its speed."""
  chip, count = topology.chip, len(topology.devices)
  each = {dtype: n / count for dtype, n in flops.of(program.traced.jaxpr).items()}
  sent = {k: sum(row[f'{k}_bytes'] for row in kinds.values()) for k in ('near', 'far')}
  wide = lambda dtype: dtype in ('float32', 'float64')
  seconds = dict(
    compute=sum(n / (chip.single if wide(dtype) else chip.half) for dtype, n in each.items()),
    memory=(traffic or 0) / chip.bandwidth,
    network=max(sent['near'] / (chip.fast or math.inf), sent['far'] / (chip.slow or math.inf)),
  )
  bound = max(seconds, key=seconds.get)
  least, limit = seconds[bound], chip.usable or chip.memory
  half = chip.single if all(map(wide, each)) else chip.half
  return dict(
    flops_per_chip=sum(each.values()),
    model_flops_per_chip=program.model / count,
    hbm_bytes_per_chip=memory | dict(limit=int(limit)),
    traffic_bytes_per_chip=traffic,
    collectives=kinds,
    seconds=seconds,
    roofline_seconds=least,
    bound=bound,
    images_per_second=program.images / least,
    mfu_bound=program.model / count / least / half,
    fits=memory['peak'] is not None and memory['peak'] <= limit,
  )


# --- trying others --------------------------------------------------------------------------------


def search(config, topology, what='train', say=lambda *_: None):
  """[plan] of the config and of others beside it, the best first: what fits, by images/s.

  Tried are meshes, with the best of them and the one of the least memory the policies of `remat`,
  and microbatches of what does not fit and might be faster than what does; nothing that changes
  what is computed. say: is told each as it is tried. Raises ConfigError where there is none.
  """
  known(what)
  found, tried, refused = [], set(), []

  def attempt(changed):
    try:
      mesh = sharding.make_mesh(changed['mesh'], list(topology.devices))
      key = json.dumps(_settings(changed, mesh), sort_keys=True)
      if key in tried:
        return
      tried.add(key)
      found.append(plan(changed, topology, what))
    except ConfigError as error:  # sizes that do not divide
      refused.append(error)
      say(f'{flags(_settings(changed))}: {error}')
    else:
      say(summary(found[-1]))

  attempt(config)
  for mesh in meshes(len(topology.devices), len({*map(chips.island, topology.devices)})):
    attempt(configs.override(config, flags(dict(mesh=mesh)).split()))
  if not found:
    raise ConfigError(
      f'--plan.search: no mesh of {topology.name} takes this config, which itself says: '
      f'{refused[0]}')
  for base in (best(found), min(found, key=_peak)):
    for policy in POLICIES if what == 'train' and 'remat' in config['model'] else ():
      attempt(_with(config, base, {'model.remat': policy}))
  larger = [each for each in found if not each['fits']] if what == 'train' else []
  for base in sorted(larger, key=lambda each: (each['images_per_second'], -_peak(each)))[::-1]:
    for parts in SHARES:
      if best(found)['fits'] and best(found)['images_per_second'] >= base['images_per_second']:
        break
      attempt(_with(config, base, {'accumulate': parts * config['accumulate']}))
  return sorted(found, key=_rank, reverse=True)


def meshes(devices, islands):
  """Meshes worth a trial, {axis: parts}: each axis by itself, and with few parts beside fsdp.

  Among them fsdp over a half and a quarter of an island: widths are no powers of two, and what does
  not divide stays whole on every chip.
  """
  each = devices // islands
  parts = dict.fromkeys([devices, 1, *(each // n for n in (1, 2, 4) if each % n == 0), 8])
  found = [dict(data=devices // n, fsdp=n) for n in parts if devices % n == 0]
  for axis in ('tensor', 'sequence'):
    found += [{'data': 1, 'fsdp': devices // n, axis: n} for n in SHARES if devices % n == 0]
  return [{a: m.get(a, 1) for a in ('data', 'fsdp', 'sequence', 'tensor')} for m in found]


def _with(config, chosen, changed):
  return configs.override(config, flags(chosen['settings'] | changed).split())


def best(found):
  return max(found, key=_rank)


def _rank(plan):
  return plan['fits'], 0 if plan['fits'] else -_peak(plan), plan['images_per_second']


def _peak(plan):
  """Bytes at the peak; of a program that the compiler refused more than any."""
  peak = plan['hbm_bytes_per_chip']['peak']
  return math.inf if peak is None else peak


def _settings(config, mesh=None):
  """What a plan depends on beside the recipe, by its place in the config; the axes are the mesh's,
  where there is one, for a config may leave one open.
  """
  remat = config['model'].get('remat')
  axes = dict(mesh.shape) if mesh else config['mesh']
  return dict(mesh=axes, accumulate=config['accumulate']) | (
    {'model.remat': remat} if remat else {})


def flags(settings):
  """The settings as they are said on a command line."""
  flat = {f'mesh.{axis}': n for axis, n in settings.get('mesh', {}).items()}
  flat |= {k: v for k, v in settings.items() if k != 'mesh'}
  return ' '.join(f'--config.{k}={v}' for k, v in flat.items())


# --- telling --------------------------------------------------------------------------------------


def summary(plan):
  """A plan in a line."""
  memory = plan['hbm_bytes_per_chip']
  peak = 'refused' if memory['peak'] is None else scaled(memory['peak'], 'B')
  fits = 'fits' if plan['fits'] else 'does not fit'
  return (f'{flags(plan["settings"])}: {fits} ({peak} of {scaled(memory["limit"], "B")}), at most '
          f'{plan["images_per_second"]:.4g} images/s, bound by {plan["bound"]}')


def report(plan):
  """A plan as a table to print."""
  memory, seconds = plan['hbm_bytes_per_chip'], plan['seconds']
  islands = f', in {plan["islands"]} islands of a fast network' if plan['islands'] > 1 else ''
  rows = [
    ('program', f'{plan["what"]} on {plan["chips"]} chips ({plan["topology"]}){islands}'),
    ('settings', flags(plan['settings'])),
    ('parameters', scaled(plan['parameters'])),
    ('state a chip', scaled(memory['state'], 'B') + (
      f', {scaled(memory["whole"], "B")} of it whole on each' if plan['chips'] > 1 else '')),
    ('activations a chip', scaled(memory['temp'], 'B')),
    ('peak a chip', f'{scaled(memory["peak"], "B")} of {scaled(memory["limit"], "B")}: '
                    f'{"fits" if plan["fits"] else "DOES NOT FIT"}'),
    ('FLOPs a chip', f'{scaled(plan["flops_per_chip"])}, of the model '
                     f'{scaled(plan["model_flops_per_chip"])}'),
    ('memory traffic a chip', scaled(plan['traffic_bytes_per_chip'], 'B')),
  ]
  fast, slow = networks(plan['topology'])
  for kind, row in sorted(plan['collectives'].items()):
    far = f', {scaled(row["far_bytes"], "B")} over {slow}' if row['far_bytes'] else ''
    said = f'{row["count"]:,} times, {scaled(row["near_bytes"], "B")} over {fast}{far}'
    rows.append((kind, said))
  rows += [(f'{name} alone', f'{n * 1e3:,.3f} ms') for name, n in seconds.items()]
  rows += [
    ('step at least', f'{plan["roofline_seconds"] * 1e3:,.3f} ms, bound by {plan["bound"]}'),
    ('images/s at most', f'{plan["images_per_second"]:,.1f}'),
    ('MFU at most', f'{plan["mfu_bound"]:.1%}'),
    ('compiled in', f'{plan["compile_seconds"]:.1f} s'),
  ]
  if 'refused' in plan:
    rows.append(('the compiler', plan['refused']))
  wide = max(len(name) for name, _ in rows)
  return '\n'.join(f'{name:<{wide}}  {said}' for name, said in rows)


def scaled(n, unit=''):
  """A number in three digits with its prefix: 12300000 B is '12.3 MB'."""
  if n is None:
    return '-'
  power = min(max(int(math.log10(n) // 3), 0), 6) if n else 0
  return f'{n / 1000**power:.3g} {" kMGTPE"[power].strip()}{unit}'.rstrip()


def networks(topology):
  """What the fast and the slow network of a topology are called."""
  if topology.startswith('cpu'):
    return 'memory', 'memory'
  return ('NVLink', 'the network') if topology.startswith(chips.DESCRIBED) else ('ICI', 'DCN')


def advice(found):
  """What a search has found, the best first: a line each, and what to say on the command line."""
  chosen = found[0]
  lines = [f'{i + 1:>3}  {summary(each)}' for i, each in enumerate(found)]
  end = 'the best' if chosen['fits'] else 'none fits; the nearest, more chips or a smaller batch'
  return '\n'.join([*lines, '', f'{end}: {flags(chosen["settings"])}'])
