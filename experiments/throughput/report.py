"""Tables and goals of what table.py measured; plain data in, Markdown out."""

import json
import statistics
from typing import NamedTuple

SIDES = ('diffax', 'torch', 'torch_compile')
SAME = 0.02  # of forward FLOPs, which the two count each by its own rules


class Goal(NamedTuple):
  """At least so much: of the measured matrix product where `over` is '', else times that side."""

  device: str
  dtype: str
  model: str
  what: str
  over: str
  least: float


GOALS = (
  Goal('H200', 'bfloat16', 'XL/2', 'train', '', 0.55),
  Goal('H200', 'bfloat16', 'XL/2', 'train', 'torch_compile', 1.2),
  Goal('H200', 'bfloat16', 'XL/2', 'sample', 'torch_compile', 1.2),
  Goal('cpu', 'float32', 'S/4', 'train', 'torch', 1.0),
)


# --- files ----------------------------------------------------------------------------------------


def read(path):
  """The runs of a file. Raises ValueError, naming it, where it holds none."""
  try:
    runs = json.loads(path.read_text())['runs']
    for run in runs:
      run['rows'], run['started'], run['device'], run['dtype'], run['platform']
    return runs
  except OSError as error:
    raise ValueError(f'{path}: {error.strerror}') from error
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path} is no result file of table.py ({error!r})') from error


def merge(tables):
  """The runs of several tables, oldest first. Raises ValueError for one that is there twice."""
  runs = sorted((run for table in tables for run in table), key=lambda run: run['started'])
  for before, run in zip(runs, runs[1:]):
    if (before['started'], before['command']) == (run['started'], run['command']):
      raise ValueError(f'the run of {run["started"]} is there twice: name each file once')
  return runs


# --- figures --------------------------------------------------------------------------------------


def spread(values):
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def rates(row):
  """Images a second of each window."""
  return [row['batch'] * row['window_calls'] / seconds for seconds in row['window_seconds']]


def product_rate(rows, side='diffax'):
  """FLOP/s of the matrix products in the processes of a side; None where there are none."""
  each = [
    2 * row['product_rows'] ** 3 / seconds
    for row in rows if row['side'] == side for seconds in row.get('product_seconds', ())
  ]
  return spread(each) if each else None


def cases(runs):
  """{(model, what, batch): [row of any repeat and side]} in the order measured; each row knows
  its `run`.
  """
  found = {}
  for number, run in enumerate(runs):
    for row in run['rows']:
      key = row['model'], row['what'], row['batch']
      found.setdefault(key, []).append({**row, 'run': number})
  return found


def figures(rows):
  """{side: figures} of a case: images, over (diffax over it), mfu, peak_bytes, compile_seconds,
  cpu_seconds of an image, errors; what was not measured is None.
  """
  done = [row for row in rows if 'error' not in row]
  flops = next((row['flops'] for row in done if 'flops' in row), None)
  found = {}
  for side in (side for side in SIDES if any(row['side'] == side for row in rows)):
    mine = [row for row in done if row['side'] == side]
    found[side] = dict(
      images=None, over=None, mfu=None, peak_bytes=None, compile_seconds=None, cpu_seconds=None,
      errors=sorted({row['error'] for row in rows if row['side'] == side and 'error' in row}),
    )
    if not mine:
      continue
    cold = [row['first_seconds'] - row['usual_seconds'] for row in mine if row['cold']]
    found[side] |= dict(
      images=spread([rate for row in mine for rate in rates(row)]),
      over=over(done, side), mfu=share(done, side, flops),
      peak_bytes=max(row['peak_bytes'] for row in mine),
      compile_seconds=max(cold) if cold and side != 'torch' else None,
      cpu_seconds=statistics.median(row['cpu_seconds'] / row['batch'] for row in mine),
    )
  return found


def over(done, side):
  """diffax's images a second over another side's, of the turns that have both; else None."""
  turns = {}
  for row in done:
    turn = turns.setdefault((row['run'], row['repeat']), {})
    turn[row['side']] = statistics.median(rates(row))
  both = [turn['diffax'] / turn[side] for turn in turns.values() if {'diffax', side} <= set(turn)]
  return spread(both) if both and side != 'diffax' else None


def share(done, side, flops):
  """Of the matrix product that diffax's processes of the same run measured; else of the side's."""
  each = []
  for number in {row['run'] for row in done}:
    here = [row for row in done if row['run'] == number]
    product = product_rate(here) or product_rate(here, side)
    if product and flops:
      each += [
        flops * rate / row['batch'] / product['median']
        for row in here if row['side'] == side for rate in rates(row)
      ]
  return spread(each) if each else None


def mismatches(runs):
  """Where the sides differ in what they compute: a line each."""
  lines = []
  for (model, what, batch), rows in cases(runs).items():
    for name, part in (('parameters', 0.0), ('forward_flops', SAME)):
      told = {row['side']: row[name] for row in rows if name in row}
      if told and max(told.values()) > (1 + part) * min(told.values()):
        lines.append(f'{model} {what} at {batch}: the sides differ in {name}: {told}')
  return lines


# --- Markdown -------------------------------------------------------------------------------------


def render(runs):
  """The tables of all devices and number formats, with commands and goals."""
  kinds = {}
  for run in runs:
    kinds.setdefault((run['device'], run['dtype'], run['threads']), []).append(run)
  return '\n\n'.join(section(*kind, found) for kind, found in kinds.items()) + '\n'


def section(device, dtype, threads, runs):
  cpu = runs[0]['platform'] == 'cpu'
  lines = [f'## {device}, {dtype}' + (f', {threads} threads' if cpu else ''), '']
  lines += sorted({f'{run["versions"]}; {run["machine"]}.' for run in runs}) + ['']
  lines += ['    ' + run['command'] + f'    # {run["started"]}, load {run["load"]:.1f}'
            + (f', {run["environment"]}' if run['environment'] else '') for run in runs]
  columns = ['model', 'what', 'batch', 'side', 'images/s', 'diffax over it', 'MFU', 'peak, GB',
             'compile, s'] + ['CPU s an image'] * cpu
  lines += ['', '| ' + ' | '.join(columns) + ' |', '|' + ' --- |' * len(columns)]
  for (model, what, batch), rows in cases(runs).items():
    for i, (side, told) in enumerate(figures(rows).items()):
      first = [model, what, str(batch)] if not i else ['', '', '']
      lines.append('| ' + ' | '.join([*first, side, *cells(told, cpu)]) + ' |')
  lines += ['', products(runs), '']
  left = sum(run.get('left_out', 0) for run in runs)
  lines += [f'{left} measurements were left out, for --minutes.', ''] * bool(left)
  lines += [f'**Not comparable**: {line}.' for line in mismatches(runs)]
  return '\n'.join([*lines, *goals(runs)]).rstrip()


def cells(told, cpu):
  percent = told['mfu'] and {k: 100 * v for k, v in told['mfu'].items()}
  if told['images'] is None:
    return [f'failed: {"; ".join(told["errors"])}', *[''] * (4 + cpu)]
  images = shown(told['images'])
  if told['errors']:
    images += f'; once failed: {"; ".join(told["errors"])}'
  compiled = told['compile_seconds']
  made = [
    images, shown(told['over']), shown(percent, ' %'), f'{told["peak_bytes"] / 1e9:.2f}',
    '' if compiled is None else number(compiled),
  ]
  return made + ([number(told['cpu_seconds'])] if cpu else [])


def products(runs):
  """A line on the matrix product of either library."""
  rows = [row for run in runs for row in run['rows']]
  sizes = sorted({row['product_rows'] for row in rows if 'product_rows' in row})
  found = {'jax': product_rate(rows), 'torch': product_rate(rows, 'torch'),
           'torch in the compiled side': product_rate(rows, 'torch_compile')}
  each = [f'{name} {shown({k: v / 1e12 for k, v in rate.items()})}'
          for name, rate in found.items() if rate]
  return (f'Matrix products of {" and ".join(map(str, sizes))} rows, TFLOP/s: '
          f'{"; ".join(each) or "none"}. MFU is of jax\'s.')


def goals(runs):
  """A line for each goal of the device and each batch that was measured."""
  run = runs[0]
  lines = []
  for goal in GOALS:
    here = goal.device in run['device'] or goal.device == run['platform']
    if not here or goal.dtype != run['dtype']:
      continue
    of = f'times {goal.over}' if goal.over else "of the measured matrix product"
    name = f'Goal, {goal.model} {goal.what}: at least {goal.least:g} {of}'
    met = [
      f'at batch {batch} {judged(figures(rows), goal)}'
      for (model, what, batch), rows in cases(runs).items() if (model, what) == goal[2:4]
    ]
    lines.append(f'- {name}: {"; ".join(met) or "not measured"}.')
  return lines


def judged(told, goal):
  side = goal.over or 'diffax'
  value = told.get(side) and told[side]['over' if goal.over else 'mfu']
  if not value:
    return 'not measured'
  return f'**{"met" if value["median"] >= goal.least else "missed"}**, {shown(value)}'


def shown(value, unit=''):
  if value is None:
    return ''
  return f'{number(value["median"])}{unit} ({number(value["min"])} to {number(value["max"])})'


def number(x):
  return f'{x:.0f}' if abs(x) >= 1000 else f'{x:.3g}'
