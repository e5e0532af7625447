"""The table and the pictures of results/*.json, for `measure.py`."""

import io
import json

import einops
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
import numpy as np

COLOURS = {  # a family: its hues
  'Runge-Kutta': ('#e6b422', '#e2711d', '#6b2a00'),
  'multistep': ('#2ec4c6', '#2b7bd6', '#12204f'),
  'corrector': ('#ee82c4', '#a6308f', '#3d0f52'),
  'noise, order 1': ('#a8c93a', '#2f9e5b', '#093d33'),
  'noise, higher order': ('#f6a55f', '#d9363e', '#5c0a2b'),
  'jumps': ('#a58be0', '#5b3fa8', '#3b1e78')}
TITLES = {
  'Runge-Kutta': 'DDIM and Runge-Kutta', 'multistep': 'multistep',
  'corrector': 'predictor-corrector', 'noise, order 1': 'with noise, order 1',
  'noise, higher order': 'with noise, of higher order', 'jumps': 'made for networks that jump'}
BESIDE = ('ddim', 'dpmpp_2m', 'unipc_3')  # flows shown beside the samplers that draw noise
FEW = {  # curves of the other pictures
  'ddim': '#8c510a', 'heun': '#e8a33d', 'dpm2': '#c9a227', 'dpmpp_2m': '#1f78b4',
  'deis_3': '#74b9e7', 'unipc_2': '#a6308f', 'unipc_3': '#a6308f', 'ddpm': '#1b7837',
  'euler_churn': '#7ccb7f', 'dpmpp_2m_sde': '#b2182b', 'sa_solver': '#ef8a62',
  'consistency': '#7b5fc0'}
TICKS = (2, 5, 10, 20, 50, 200)
GREY = '#dddddd'


def draw(here, shown):
  """Writes all that there are results for. here: the folder; shown: numbers of calls of tables."""
  found = {}
  for part in ('mixture', 'digits', 'guidance'):
    file = here / 'results' / f'{part}.json'
    if file.exists():
      found[part] = json.loads(file.read_text())
  if 'mixture' in found:
    mixture(found['mixture'], here / 'mixture.png')
    by_grid(found['mixture'], here / 'grids.png')
  if 'digits' in found:
    digits(found['digits'], here / 'digits.png')
    with np.load(here / 'results' / 'digits.npz') as cells:
      strips(dict(cells), shown, here / 'strips.png')
  if 'guidance' in found:
    guidance(found['guidance'], here / 'guidance.png')
  if len(found) == 3:
    (here / 'results' / 'table.md').write_text(table(found, shown))


def shades(family, count):
  """`count` colours of a family."""
  stops = [[int(c[i:i + 2], 16) / 255 for c in COLOURS[family]] for i in (1, 3, 5)]
  places = np.linspace(0, 2, count)
  return np.stack([np.interp(places, range(3), stop) for stop in stops], axis=1)


def spread(heights, gap):
  """Heights moved little, to lie `gap` apart within 0 and 1, in the same order."""
  order = np.argsort(heights, kind='stable')
  moved = np.asarray(heights, float)[order]
  for _ in range(2000):
    near = np.maximum(gap - np.diff(moved), 0)
    moved[:-1] -= near / 2
    moved[1:] += near / 2
    moved = np.clip(moved, 0, 1)
    if near.max(initial=0) < 1e-3:
      break
  out = np.empty_like(moved)
  out[order] = moved
  return out


def name_lines(axes, ends, size=7.2):
  """Names right of the last points of curves. ends: (name, x, y, colour), after limits are set."""
  points = axes.get_window_extent()
  into = axes.transData + axes.transAxes.inverted()
  places = [into.transform((x, y)) for _, x, y, _ in ends]
  gap = size * 1.22 / 72 * axes.figure.dpi / points.height
  heights = spread([np.clip(y, 0, 1) for _, y in places], gap)
  for (name, _, _, colour), (x, y), height in zip(ends, places, heights):
    axes.plot([x, 1.02, 1.05], [np.clip(y, 0, 1), height, height], color=colour, linewidth=0.6,
              transform=axes.transAxes, clip_on=False)
    axes.text(1.06, height, name, color=colour, fontsize=size, va='center',
              transform=axes.transAxes)


def tidy(axes, xlabel='network calls', ticks=TICKS):
  axes.set_xscale('log')
  axes.set_xticks(ticks, [f'{t:g}' for t in ticks])
  axes.xaxis.set_minor_locator(NullLocator())
  axes.set_xlabel(xlabel)
  axes.grid(color='#eeeeee', linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
  axes.patch.set_visible(False)  # names of the panel to the left may reach in


def save(figure, path):
  """As PNG of 256 colours, a third of the bytes."""
  from PIL import Image

  data = io.BytesIO()
  figure.savefig(data, dpi=figure.dpi, facecolor='white')
  picture = Image.open(data).convert('RGB')
  picture = picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
  picture.save(path, optimize=True)


def panels(rows, columns, width, height, **kwargs):
  import matplotlib
  matplotlib.rcParams.update({'font.size': 8.5, 'font.family': 'DejaVu Sans'})
  figure = Figure(figsize=(width, height), dpi=120)
  return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


# --- the mixture ----------------------------------------------------------------------------------


def mixture(result, path, setting='vp, log_snr'):
  """A panel a family, its curves named, all others of the row grey behind."""
  known = result['settings'][setting]
  figure, grid = panels(2, 3, 11, 8.6, sharey='row')
  figure.subplots_adjust(0.06, 0.06, 0.89, 0.92, wspace=0.61, hspace=0.3)
  figure.suptitle(f'A Gaussian mixture, whose denoiser is exact (schedule and grid: {setting})')
  for axes, (family, title) in zip(grid.flat, TITLES.items()):
    key = 'flow' if axes in grid[0] else 'law'
    own = {k: v for k, v in known.items() if v['family'] == family}
    for v in known.values():
      if key in v:
        axes.plot(v['calls'][-len(v[key]):], v[key], color=GREY, linewidth=0.8)
    ends = []
    for (name, v), colour in zip(own.items(), shades(family, len(own))):
      axes.plot(v['calls'], v[key], color=colour, linewidth=1.4, marker='o', markersize=2.2)
      ends.append((name, v['calls'][-1], v[key][-1], colour))
    axes.set(title=title, yscale='log', xlim=(1.9, 210),
             ylim=(6e-6, 2) if key == 'flow' else (2.5e-3, 2))
    axes.title.set_fontweight('bold')
    tidy(axes)
    if key == 'law':
      axes.axhspan(1e-9, result['floor'], color='#e6e6e6')
      axes.text(2.1, result['floor'] * 0.93, 'exact samples, as many', fontsize=7, va='top',
                color='#777777')
      if family == 'jumps':
        for name in BESIDE:
          v = known[name]
          axes.plot(v['calls'], v['law'], color=FEW[name], linewidth=1.2, linestyle='--')
          ends.append((name, v['calls'][-1], v['law'][-1], FEW[name]))
    name_lines(axes, ends)
  grid[0, 0].set_ylabel('distance to the exact flow, root mean square')
  grid[1, 0].set_ylabel('Wasserstein-2 distance of the samples')
  save(figure, path)


def by_grid(result, path):
  """The same few samplers on every schedule and grid."""
  figure, grid = panels(1, len(result['settings']), 11, 3.3, sharey=True)
  figure.subplots_adjust(0.06, 0.15, 0.91, 0.88, wspace=0.12)
  for axes, (setting, known) in zip(grid[0], result['settings'].items()):
    ends = []
    for name in ('ddim', 'heun', 'dpmpp_2m', 'deis_3', 'unipc_3'):
      v = known[name]
      calls = v['calls'][-len(v['flow']):]
      axes.plot(calls, v['flow'], color=FEW[name], linewidth=1.4, marker='o', markersize=2.2)
      ends.append((name, calls[-1], v['flow'][-1], FEW[name]))
    axes.set(title=setting, yscale='log', xlim=(1.9, 210), ylim=(3e-6, 2))
    tidy(axes, ticks=(2, 5, 20, 50, 200))
  name_lines(grid[0, -1], ends)
  grid[0, 0].set_ylabel('distance to the exact flow')
  save(figure, path)


# --- the digits -----------------------------------------------------------------------------------


def digits(result, path):
  """Fréchet ratio and share of digits recognised, of the samplers measured at most numbers."""
  known = {k: v for k, v in result['samplers'].items() if len(v['calls']) > 5}
  figure, grid = panels(1, 2, 11, 4.6)
  figure.subplots_adjust(0.045, 0.11, 0.99, 0.92, wspace=0.13)
  at_five = lambda v: np.interp(5, v['calls'], v['frechet'])
  order = sorted(known, key=lambda name: -at_five(known[name]))
  for axes, key in zip(grid[0], ('frechet', 'accuracy')):
    for name in order:
      v = known[name]
      values = np.array(v[key]) * (100 if key == 'accuracy' else 1)
      style = '-' if v['flow'][0] is not None else (0, (4, 1.5))
      axes.plot(v['calls'], values, color=FEW[name], linewidth=1.6, linestyle=style, marker='o',
                markersize=2.8, label=name)
    axes.set_xlim(1.9, 210)
    tidy(axes, ticks=(2, 3, 5, 10, 20, 50, 200))
  frechet, accuracy = grid[0]
  frechet.set(yscale='log', ylim=(0.8, 60), title='Fréchet distance, over that of real digits')
  frechet.set_yticks((1, 2, 5, 10, 20, 50), ('1', '2', '5', '10', '20', '50'))
  frechet.yaxis.set_minor_formatter(NullFormatter())
  frechet.axhspan(*result['real']['frechet'], color='#e4e4e4', zorder=0)
  frechet.text(2.1, 0.88, 'real against real', fontsize=8, va='center', color='#666666')
  frechet.legend(frameon=False, labelcolor='linecolor', title='in order at 5 calls; - - with noise',
                 title_fontsize=8, fontsize=8.5, handlelength=2.6, labelspacing=0.25)
  real = 100 * result['real']['accuracy']
  accuracy.set(ylim=(90, 100.5), title='digits recognised as the class asked for, %')
  accuracy.axhline(real, color='#bbbbbb', linewidth=1, zorder=0)
  accuracy.text(205, real + 0.05, 'real digits', fontsize=8, ha='right', va='bottom',
                color='#666666')
  save(figure, path)


def strips(cells, shown, path):
  """The same five digits: a row a sampler, a column a number of calls."""
  rows = list(dict.fromkeys(name.split()[0] for name in cells))
  figure, grid = panels(len(rows), len(shown), 11, 0.56 * len(rows) + 0.35)
  figure.subplots_adjust(0.115, 0.005, 0.998, 1 - 0.3 / figure.get_figheight(), 0.1, 0.06)
  for i, name in enumerate(rows):
    for j, calls in enumerate(shown):
      axes = grid[i, j]
      if f'{name} {calls}' in cells:
        cell = np.pad(cells[f'{name} {calls}'][..., 0].astype(float), [(0, 0), (0, 0), (0, 1)],
                      constant_values=np.nan)  # white between
        axes.imshow(einops.rearrange(cell, 'n h w -> h (n w)')[:, :-1], cmap='gray', vmin=0,
                    vmax=255, interpolation='nearest', aspect='equal')
      axes.set_axis_off()
      if i == 0:
        axes.set_title(f'{calls} calls', fontsize=10, pad=4)
      if j == 0:
        axes.text(-0.03, 0.5, name, transform=axes.transAxes, ha='right', va='center', fontsize=9)
  save(figure, path)


# --- guidance -------------------------------------------------------------------------------------

HUES = {
  'cfg': '#222222', 'interval': '#1f78b4', 'cfg_zero': '#1b7837', 'rescale': '#7b5fc0',
  'apg': '#e2711d', 'autoguide': '#b2182b'}


def guidance(result, path):
  """Accuracy, recall and Fréchet ratio against the scale; cfg_pp counts another, see the table."""
  known = {k: v for k, v in result['guidances'].items() if k in HUES}
  none = known['cfg']['scale'].index(1.)
  figure, grid = panels(1, 3, 11, 4)
  figure.subplots_adjust(0.045, 0.13, 0.93, 0.9, wspace=0.42)
  limits = dict(accuracy=(93, 100.4), recall=(0, 104), frechet=(0.8, 22))
  titles = dict(accuracy='recognised, %', recall='recall, % of that of real digits',
                frechet='Fréchet distance, over that of real')
  for axes, key in zip(grid[0], limits):
    axes.set(xlim=(0.97, 8.2), ylim=limits[key], title=titles[key])
    if key == 'frechet':
      axes.set_yscale('log')
      axes.set_yticks((1, 2, 5, 10, 20), ('1', '2', '5', '10', '20'))
      axes.yaxis.set_minor_formatter(NullFormatter())
      axes.axhspan(*result['real']['frechet'], color='#e4e4e4', zorder=0)
    tidy(axes, 'guidance scale; 1 is none', (1, 1.5, 2, 3, 5, 8))
    ends = []
    for name, v in known.items():
      scale, value = ([known['cfg'][k][none], *v[k][v['scale'].index(1.125):]]
                      for k in ('scale', key))
      value = np.array(value) * (1 if key == 'frechet' else 100)
      axes.plot(scale, value, color=HUES[name], marker='o', markersize=2.8, linewidth=1.4)
      ends.append((name, scale[-1], value[-1], HUES[name]))
    name_lines(axes, ends, 8)
  save(figure, path)


# --- the table ------------------------------------------------------------------------------------


def at(found, key, budget, form):
  """The value at the most calls that fit into `budget`, '-' where even that is less than half."""
  calls = found['calls'][-len(found[key]):]
  fits = [i for i, n in enumerate(calls) if budget / 2 < n <= budget]
  return form(found[key][fits[-1]]) if fits else '-'


def small(value):
  return f'{value:.1e}'.replace('e-0', 'e-') if value < 0.01 else f'{value:.2g}'


def table(found, shown, setting='vp, log_snr'):
  """README.md's tables."""
  exact, real = found['mixture']['settings'], found['digits']['samplers']
  joined = lambda v, key, form: ' / '.join(at(v, key, n, form) for n in shown)
  calls = ' / '.join(map(str, shown))
  lines = [
    f'Samplers at {calls} network calls. Mixture ({setting}): distance to the exact flow, for '
    'samplers that draw noise the Wasserstein-2 distance of what they draw (exact samples: '
    f'{small(found["mixture"]["floor"])}).', '',
    '| sampler | mixture | digits, Fréchet ratio | digits recognised, % |', '|---|---|---|---|']
  for family in TITLES:
    lines.append(f'| **{TITLES[family]}** | | | |')
    for name, v in exact[setting].items():
      if v['family'] == family:
        key = 'law' if 'flow' not in v else 'flow'
        lines.append(
          f'| {name} | {joined(v, key, small)} | {joined(real[name], "frechet", "{:.2f}".format)} '
          f'| {joined(real[name], "accuracy", lambda a: f"{100 * a:.1f}")} |')
  lines += ['', 'Distance to the exact flow of the mixture at 20 calls, by schedule and grid.', '',
            f'| sampler | {" | ".join(exact)} |', '|---' * (len(exact) + 1) + '|']
  for name, v in exact[setting].items():
    if 'flow' in v:
      row = [at(known[name], 'flow', 20, small) for known in exact.values()]
      lines.append(f'| {name} | {" | ".join(row)} |')
  lines += ['', 'Guidance of the digits.', '',
            '| guidance | scale | recognised, % | recall ratio | Fréchet ratio |',
            '|---|---|---|---|---|']
  for name, v in found['guidance']['guidances'].items():
    for scale, a, r, f in zip(v['scale'], v['accuracy'], v['recall'], v['frechet']):
      lines.append(f'| {name} | {scale:g} | {100 * a:.1f} | {r:.2f} | {f:.2f} |')
  return '\n'.join(lines) + '\n'
