"""Runs a recipe again, or its first part, and says where it leaves the curves stored of it.

  python experiments/reproduce.py configs/digits.py                  # the whole run
  python experiments/reproduce.py configs/digits.py --steps 1000     # its first 1000 steps
  python experiments/reproduce.py configs/digits.py --seed 1         # another honest run
  python experiments/reproduce.py --store configs/digits.py --workdir runs/digits

The exit code is 0 within the bands, 1 outside, 2 for a mistake. Curves are stored in
experiments/NAME/curves.json of a finished run; NAME is that of the config, with _VARIANT behind it
for another variant than `full`. A run that `--workdir` names and that is there already goes on, or
is only compared. reproduce.png in the workdir shows both.

What a rerun may differ by. The same seed on the same machine gives the same bits. On another, sums
are rounded otherwise, and training amplifies that until the parameters are as far apart as those
of another seed, though seen by the same images and noises. So the band is made for the widest
honest case, another seed, whose losses are drawn anew:

  window     the loss at n logged steps in a row has mean m, and about a straight line spread s
  band       |m' - m| <= q s sqrt(2 / n) + LAG d,   d: how far the line falls in the window

m' and m are two draws of the same law, whence sqrt(2 / n); an honest run may be ahead or behind by
LAG of a window; q is the Student quantile (n - 2 degrees) at which one window of all leaves its
band by chance in `FALSE_ALARMS` of reruns with another seed. With the same seed it is far rarer.
What parameters of another seed add to that is not known of one run. Six seeds of a small run on the
digits (400 steps, 10 windows) were compared each with each: the widest of 30 comparisons came to
0.69 of a band, while a tenth of the learning rate left it by 6 times and more and a wrong
sigma_data of the weighting by 9. What leaves the training loss as it is stays unseen: drawing the
levels around another mean (-1.2, not -0.6) came to 0.66 at most. Such changes are caught by
comparing the settings, which comes first. Metrics of an evaluation have bands of their own, see
`metric_band`.
"""

import argparse
import hashlib
import json
import pathlib
import sys

from diffax import config as configs
from diffax import log
from diffax import main as door
from diffax.build import ConfigError
from etils import epath
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
FALSE_ALARMS = 0.01  # of a whole run, for another seed
LAG = 0.2
WINDOWS = 10  # at most
LEAST = 8  # logged steps in a window
SHARES = ('class_accuracy', 'precision', 'recall', 'coverage', 'copied')
DRAWN = ('log_every', 'evals')  # what a run may change, but not a comparison


# --- what is stored -------------------------------------------------------------------------------


def windows(rows):
  """Means and bands of the loss by window: [dict(first, last, mean, band), ...]; see above.

  rows: of metrics.jsonl, whose `loss` is a mean since the row before. Raises ConfigError for fewer
  than 2 LEAST rows.
  """
  from scipy import stats

  if len(rows) < 2 * LEAST:
    raise ConfigError(
      f'{len(rows)} logged steps are too few to tell their spread: {2 * LEAST} are needed, of a '
      'longer run or a smaller log_every'
    )
  count = min(WINDOWS, len(rows) // LEAST)
  n = len(rows) // count
  q = stats.t.ppf(1 - FALSE_ALARMS / (2 * count), n - 2)
  found = []
  for part in (rows[i * n : (i + 1) * n] for i in range(count)):
    x, y = np.arange(n), np.array([row['loss'] for row in part])
    slope, start = np.polyfit(x, y, 1)
    spread = np.sqrt(np.sum((y - start - slope * x) ** 2) / (n - 2))
    band = q * spread * np.sqrt(2 / n) + LAG * abs(slope) * n
    first = part[0]['step'] - (part[1]['step'] - part[0]['step'])
    found.append(dict(first=first, last=part[-1]['step'], mean=float(y.mean()), band=float(band)))
  return found


def metric_band(name, row, count):
  """How far a metric of `count` images may lie from that of a stored evaluation, and of what.

  A part 0.1 + 4 / sqrt(count) of its size, or of its size for real images where that is larger:
  a tenth is what Fréchet distances of one recipe differ by between seeds (experiments/digits), the
  rest what another draw of so many images does. Shares have four binomial deviations more, and what
  has a deviation beside it (NAME_std) that as well. row: {name: value} of the evaluation.
  """
  relative, value = 0.1 + 4 / count**0.5, row[name]
  band = relative * max(abs(value), abs(row.get(f'{name}_real', 0)))
  if name.rpartition('/')[2].removesuffix('_real') in SHARES:
    band += 4 * (max(value * (1 - value), 0) / count) ** 0.5
  return dict(relative=relative, band=band + row.get(f'{name}_std', 0))


def metrics(rows, config):
  """[dict(step, name, value, count, relative, band), ...] of the rows of evals.jsonl."""
  found = []
  for row in rows:
    count = config['evals'].get(row.get('eval'), {}).get('count')
    numbers = {k: v for k, v in row.items() if isinstance(v, float) and not k.endswith('_std')}
    for name, value in numbers.items():
      if count:
        band = metric_band(name, row, count)
        found.append(dict(step=row['step'], name=name, value=value, count=count, **band))
  return found


def curves(workdir):
  """What is stored of a finished run. Raises ConfigError."""
  workdir = epath.Path(workdir)
  if not (workdir / 'config.json').exists():
    raise ConfigError(f'--workdir={workdir} holds no run: train one there first')
  config = configs.read(workdir / 'config.json')
  rows = log.read_metrics(workdir / 'metrics.jsonl')
  end = config['steps'] // config['log_every'] * config['log_every']
  if not rows or rows[-1]['step'] < end:
    at = rows[-1]['step'] if rows else 0
    raise ConfigError(
      f'--workdir={workdir} is at step {at} of {config["steps"]}: let it finish before it is stored'
    )
  file = workdir / 'environment.json'
  environment = json.loads(file.read_text())[-1] if file.exists() else {}
  return {
    'digest': digest(config),
    'environment': {k: v for k, v in environment.items() if k != 'command'},  # paths of a machine
    'false_alarms': FALSE_ALARMS,
    'loss': windows(rows),
    'rows': [[row['step'], row['loss']] for row in rows],
    'metrics': metrics(log.read_metrics(workdir / 'evals.jsonl'), config),
    'settings': config,
  }


def digest(config):
  """Of all that decides a run's numbers and at what steps they are told."""
  kept = {k: v for k, v in config.items() if k not in configs.FREE or k in DRAWN}
  return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def place(config):
  """Where the curves of FILE[:variant] are stored."""
  file, _, variant = config.partition(':')
  suffix = f'_{variant}' if variant not in ('', 'full') else ''
  return HERE / (pathlib.Path(file).stem + suffix) / 'curves.json'


def read(config):
  """The stored curves of FILE[:variant]. Raises ConfigError."""
  path = place(config)
  if not path.exists():
    known = sorted(p.parent.name for p in HERE.glob('*/curves.json'))
    raise ConfigError(
      f'{config} has no stored curves ({path} is not there; there are those of '
      f'{", ".join(known) or "nothing"}): train it and store them, with --store {config} --workdir '
      'RUN'
    )
  stored = json.loads(path.read_text())
  stored['settings'] = configs._plain(stored['settings'])
  return stored


def differing(stored, config, seed=False):
  """['model.width: 64 -> 96', ...]: where settings differ from stored ones and may not.

  seed: whether that may differ.
  """
  found = configs.differences(stored, config)
  old = configs.complete(stored)
  if old['log_every'] != config['log_every']:
    found.append(f'log_every: {old["log_every"]} -> {config["log_every"]}')
  for name, spec in old['evals'].items():
    new = config['evals'].get(name, {})
    keys = [k for k in spec if spec[k] != new.get(k)]
    found += [f'evals.{name}.{k}: {spec[k]} -> {new.get(k)}' for k in keys]
  return [line for line in found if not (seed and line.startswith('seed: '))]


# --- the comparison -------------------------------------------------------------------------------


def compare(stored, rows, evals):
  """[dict(what, stored, new, band, ratio), ...] of all that both runs have; ratio > 1 is outside.

  rows, evals: of metrics.jsonl and evals.jsonl. Raises ConfigError where there is nothing.
  """
  found, losses = [], {row['step']: row['loss'] for row in rows}
  for window in stored['loss']:
    steps = [s for s, _ in stored['rows'] if window['first'] < s <= window['last']]
    if all(s in losses for s in steps):
      new = float(np.mean([losses[s] for s in steps]))
      what = f'loss, steps {window["first"] + 1} to {window["last"]}'
      found.append(_beside(what, window['mean'], new, window['band']))
  if not found:
    raise ConfigError(
      f'no window of the stored loss is reached: the first ends at step {stored["loss"][0]["last"]}'
    )
  measured = {(row['step'], name): value for row in evals for name, value in row.items()}
  for metric in stored['metrics']:
    new = measured.get((metric['step'], metric['name']))
    if new is not None:
      what = f'{metric["name"]}, step {metric["step"]}, {metric["count"]} images'
      found.append(_beside(what, metric['value'], new, metric['band']))
  return found


def _beside(what, old, new, band):
  gap = abs(new - old)
  ratio = gap / band if band else float(gap > 0) * 2
  ratio = ratio if np.isfinite(ratio) else np.inf  # of a NaN, too
  return dict(what=what, stored=old, new=new, band=band, ratio=float(ratio))


def report(found, same):
  """Prints the comparison; returns how many are outside."""
  width = max(len(row['what']) for row in found)
  print(f'{"":{width}}    stored       new      band')
  for row in found:
    mark = '' if row['ratio'] <= 1 else '   OUTSIDE'
    numbers = ''.join(f'{row[k]:10.4g}' for k in ('stored', 'new', 'band'))
    print(f'{row["what"]:{width}}{numbers}{mark}')
  outside = sum(row['ratio'] > 1 for row in found)
  if same:
    print('every logged loss is the very same number')
  print(f'{outside} of {len(found)} outside their bands' if outside else 'within all bands')
  return outside


def plot(path, stored, rows, title):
  """A picture of the stored loss with its bands, and of the new one on it."""
  import io
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4), layout='constrained')
  axes = figure.add_subplot()
  axes.plot(*zip(*stored['rows']), color='0.6', lw=1, label='stored')
  axes.plot([r['step'] for r in rows], [r['loss'] for r in rows], color='C0', lw=1, label='new')
  for i, window in enumerate(stored['loss']):
    span, (mean, band) = (window['first'], window['last']), (window['mean'], window['band'])
    label = 'band of the mean' if i == 0 else None
    axes.fill_between(span, mean - band, mean + band, color='C1', alpha=0.25, lw=0, label=label)
    new = [r['loss'] for r in rows if window['first'] < r['step'] <= window['last']]
    if new:
      axes.hlines(np.mean(new), *span, color='C0', lw=2)
  axes.set(title=title, xlabel='step', ylabel='loss')
  axes.legend(frameon=False)
  data = io.BytesIO()
  figure.savefig(data, format='png', dpi=100)
  path.write_bytes(data.getvalue())


# --- the commands ---------------------------------------------------------------------------------


def store(config, workdir):
  """Writes the curves of a finished run of FILE[:variant]; returns where. Raises ConfigError."""
  found = curves(workdir)
  changed = differing(found['settings'], configs.complete(configs.load(config)))
  if changed:
    raise ConfigError(
      f'--workdir={workdir} holds a run of other settings than {config} ({"; ".join(changed[:5])})'
    )
  path = place(config)
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(found, indent=1) + '\n')
  return path


def reproduce(config, workdir, steps=0, seed=None):
  """Runs FILE[:variant] in `workdir` up to `steps`, 0 for all, and compares; how many are outside.
  """
  stored = read(config)
  settings = configs.complete(configs.load(config))
  changed = differing(stored['settings'], settings)
  if changed or digest(stored['settings']) != stored['digest']:
    why = '; '.join(changed[:5]) or 'the file was edited: its digest is that of other settings'
    raise ConfigError(
      f'{config} is not what its stored curves are of ({why}): undo the change, or train it and '
      f'store it anew, with --store {config}'
    )
  last = stored['settings']['steps']
  steps = steps or last
  if not stored['loss'][0]['last'] <= steps <= last:
    raise ConfigError(
      f'--steps={steps}: {stored["loss"][0]["last"]}, the end of the first window, to {last}'
    )
  workdir = epath.Path(workdir or f'runs/reproduce_{place(config).parent.name}')
  more = [f'--config.steps={steps}'] + ([f'--config.seed={seed}'] if seed is not None else [])
  door.main(['diffax', '--config', config, '--workdir', str(workdir), *more])
  rows = log.read_metrics(workdir / 'metrics.jsonl')
  where = {k: stored['environment'].get(k, '?') for k in ('device_kind', 'platform', 'time')}
  print(f'stored {where["time"]} on {where["device_kind"]}, {where["platform"]}')
  losses = dict(stored['rows'])
  same = all(losses.get(row['step']) == row['loss'] for row in rows)
  outside = report(compare(stored, rows, log.read_metrics(workdir / 'evals.jsonl')), same)
  plot(workdir / 'reproduce.png', stored, rows, config)
  print(workdir / 'reproduce.png')
  return outside


def main(argv=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('config', help='FILE[:variant]')
  parser.add_argument('--store', action='store_true', help='store the curves of --workdir')
  parser.add_argument('--workdir', default='', help='of the run (runs/reproduce_NAME)')
  parser.add_argument('--steps', type=int, default=0, help='how many, 0 for all')
  parser.add_argument('--seed', type=int, help="another than the recipe's")
  args = parser.parse_args(argv)
  try:
    if not args.store:
      return int(reproduce(args.config, args.workdir, args.steps, args.seed) > 0)
    if not args.workdir:
      raise ConfigError('--store needs --workdir, of the finished run')
    print(store(args.config, args.workdir))
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
