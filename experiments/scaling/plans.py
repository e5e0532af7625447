"""Plans of large runs on pods that are not here, and of weak scaling from 4 to 512 chips.

  python experiments/scaling/plans.py --out experiments/scaling/results             # all that lack
  python experiments/scaling/plans.py --out experiments/scaling/results --only xl2  # by their names
  python experiments/scaling/plans.py --out experiments/scaling/results --draw      # table and plot

Each is `python -m diffax.main --mode plan` of experiments/scaling/dit.py in a process of its own,
as its file in results/ says; one to five minutes of a core each. Needs the extras `tpu` and `cuda`.
"""

import argparse
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

import dit

HERE = pathlib.Path(__file__).resolve().parent
CONFIG = 'experiments/scaling/dit.py'
PODS = {  # topology: chips; v5p-512 counts the two cores of each of 256
  'v5e:16x16': 256, 'v5p:4x8x8': 256, '2*v6e:16x16': 512, 'h200:1x8': 8, 'h200:8x8': 64,
}
MODELS = {  # what is planned of each, beside the mesh
  'xl2_256': {}, 'xl2_512': {},
  '3b_256': {}, '3b_512': {},
  '12b_256': {'model.remat': 'nothing_saveable'}, '12b_512': {'model.remat': 'nothing_saveable'},
}
WEAK = {  # chips: topology; 16 images a chip
  4: 'v5e:2x2', 8: 'v5e:2x4', 16: 'v5e:4x4', 32: 'v5e:4x8', 64: 'v5e:8x8', 128: 'v5e:8x16',
  256: 'v5e:16x16', 512: '2*v5e:16x16',
}
EACH = 16
PARTS = 32  # of which XL/2's kernels are split into at most: libtpu sums up smaller ones
DRAWN = {'v5e:2x4': 8, 'h200:1x8': 8}  # 50 steps with guidance, 32 images a chip, on one host


def cases():
  """{name: (variant, topology, {setting: value})}; what begins with draw_ is sampling."""
  found = {}
  for variant, settings in MODELS.items():
    for topology, chips in PODS.items():
      islands = 2 if topology.startswith('2*') else chips // 8 if topology == 'h200:8x8' else 1
      mesh = split(variant, chips, islands)
      size = {'batch_size': 64 * chips} if topology.startswith('h200') else {}
      found[f'{variant}_{named(topology)}'] = variant, topology, mesh | settings | size
  for chips, topology in WEAK.items():
    mesh = {'mesh.data': max(1, chips // PARTS), 'mesh.fsdp': min(chips, PARTS)}
    found[f'weak_{chips:03d}'] = 'xl2_256', topology, mesh | {'batch_size': EACH * chips}
  for topology, chips in DRAWN.items():
    found[f'draw_xl2_256_{named(topology)}'] = 'xl2_256', topology, {
      'mesh.data': chips, 'sample.batch_size': 32 * chips}
  return found


def split(variant, chips, islands):
  """Parameters over all chips of an island, or as many as divide the width: what does not divide
  would lie on each chip whole."""
  width, *_ = dit.SIZES[variant.split('_')[0]]
  fsdp = math.gcd(width, chips // islands)
  return {'mesh.data': chips // fsdp, 'mesh.fsdp': fsdp}


def named(topology):
  return topology.replace('*', 'x').replace(':', '_')


def planned(name, variant, topology, settings, out):
  """Plans one; its plan.json, with the command, becomes OUT/NAME.json."""
  said = [f'--config.{key}={value}' for key, value in settings.items()]
  words = ['-m', 'diffax.main', '--mode', 'plan', '--config', f'{CONFIG}:{variant}', '--topology',
           topology, *said]
  words += ['--plan.what=sample'] if name.startswith('draw') else []
  with tempfile.TemporaryDirectory() as folder:
    done = subprocess.run(
      [sys.executable, *words, '--workdir', folder], cwd=HERE.parents[1], text=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'}, capture_output=True)
    if done.returncode:
      print(f'{name}: {done.stderr.strip().splitlines()[-1]}', flush=True)
      return False
    plan = json.loads((pathlib.Path(folder) / 'plan.json').read_text())
  command = shlex.join(['python', *words, '--workdir', f'plans/{name}'])
  (out / f'{name}.json').write_text(json.dumps({'command': command} | plan, indent=1) + '\n')
  print(f'{name}: {plan["images_per_second"]:.4g} images/s, bound by {plan["bound"]}', flush=True)
  return True


def table(plans):
  lines = ['| model | chips | mesh | peak of HBM, GB | TFLOP a chip | GB near, far | step at least '
           '| bound by | images/s at most | MFU at most |', '| --- ' * 10 + '|']
  for name, plan in plans.items():
    if name.startswith('weak'):
      continue
    memory, sent = plan['hbm_bytes_per_chip'], plan['collectives'].values()
    peak = f'{memory["peak"] / 1e9:.1f}' if memory['peak'] is not None else 'refused'
    mesh = ', '.join(f'{k} {n}' for k, n in plan['settings']['mesh'].items() if n > 1)
    near, far = (sum(row[f'{k}_bytes'] for row in sent) / 1e9 for k in ('near', 'far'))
    fits = '' if plan['fits'] else ', does not fit'
    model, pixels = name.removeprefix('draw_').split('_')[:2]
    what = f'{model}/{pixels}' + ', a draw' * name.startswith('draw')
    lines.append(
      f'| {what} | {plan["topology"]} | {mesh} | {peak} of '
      f'{memory["limit"] / 1e9:.1f}{fits} | {plan["flops_per_chip"] / 1e12:.1f} | {near:.2f}, '
      f'{far:.2f} | {plan["roofline_seconds"] * 1e3:.0f} ms | {plan["bound"]} | '
      f'{plan["images_per_second"]:.0f} | {plan["mfu_bound"]:.0%} |')
  return '\n'.join(lines) + '\n'


def draw(plans, path):
  """Weak scaling: images/s at most against the chips, beside that of four times as many."""
  from matplotlib.figure import Figure

  weak = {plan['chips']: plan for name, plan in plans.items() if name.startswith('weak')}
  chips = sorted(weak)
  figure = Figure(figsize=(7, 4.5), dpi=120, layout='constrained')
  axes = figure.subplots()
  bounds = lambda kind: [EACH * n / weak[n]['seconds'][kind] for n in chips]
  for kind in ('compute', 'memory', 'network'):
    axes.loglog(chips, bounds(kind), '--', label=f'{kind} alone')
  axes.loglog(chips, [weak[n]['images_per_second'] for n in chips], 'ko-', label='all')
  axes.set_xticks(chips, map(str, chips))
  axes.set(xlabel='chips (TPU v5e; 512 are two slices)', ylabel='images/s at most',
           title=f'DiT-XL/2, 256 pixels, fsdp over up to {PARTS}, {EACH} images a chip')
  axes.minorticks_off()
  axes.legend()
  axes.grid(alpha=0.3)
  figure.savefig(path)


def main(argv=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--only', default='', help='those whose name holds it')
  parser.add_argument('--draw', action='store_true', help='plan nothing')
  args = parser.parse_args(argv)
  args.out.mkdir(parents=True, exist_ok=True)
  failed = 0
  for name, case in cases().items():
    there = (args.out / f'{name}.json').exists()
    if args.only in name and not there and not args.draw:
      failed += not planned(name, *case, args.out)
  plans = {name: json.loads(path.read_text()) for name in cases()
           if (path := args.out / f'{name}.json').exists()}
  (args.out / 'table.md').write_text(table(plans))
  if any(name.startswith('weak') for name in plans):
    draw(plans, args.out / 'weak.png')
  return failed


if __name__ == '__main__':
  sys.exit(main())
