"""One training step of every network on every mesh: how far it is from that on one device.

  python experiments/scale/meshes.py --out experiments/scale/results

Eight virtual devices of this CPU; dropout and dropped labels on, so that their keys are tested too;
parameters drawn by numpy. Exit code 1 where a loss or a gradient's norm is off by more than 1e-5.
"""

import argparse
import os
import pathlib
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (  # without the optimisations that take a CPU's compiler so long
  '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / 'tests'))

import jax  # noqa: E402

import test_mesh  # noqa: E402

TOLERANCE = 1e-5


def summary(rows):
  """Of rows (network, mesh, accumulated, loss, norm): the worst by mesh and network."""
  models = list(dict.fromkeys(row[0] for row in rows))
  lines = [f'| mesh | {" | ".join(models)} |', '| --- ' * (1 + len(models)) + '|']
  for mesh in dict.fromkeys(row[1] for row in rows):
    worst = [max(max(r[3:]) for r in rows if r[:2] == (model, mesh)) for model in models]
    lines.append(f'| {mesh} | {" | ".join(map("{:.1e}".format, worst))} |')
  return lines


def table(rows):
  lines = ['| network | mesh | accumulated | loss | norm of the gradient |', '| --- ' * 5 + '|']
  return lines + ['| {} | {} | {} | {:.1e} | {:.1e} |'.format(*row) for row in rows]


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--out', help='a folder for meshes.md')
  args = parser.parse_args()
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  rows = []
  for model, mesh, micro in test_mesh.ALL:
    if mesh == 'one device' and micro == 1:
      continue
    _, found = test_mesh.one_step(test_mesh.build(mesh, micro, model=model))
    wanted = test_mesh.alone(model)[1]
    off = [abs(float(found[k]) / float(wanted[k]) - 1) for k in ('loss', 'grad_norm')]
    rows.append((model, mesh, micro, *off))
    print(table(rows)[-1], flush=True)
    jax.clear_caches()
  worst = max(max(row[3:]) for row in rows)
  said = f'The largest: {worst:.1e}; relative, on jax {jax.__version__}.'
  print('\n'.join([*summary(rows), '', said]))
  if args.out:
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = [*summary(rows), '', said, '', *table(rows), '']
    (out / 'meshes.md').write_text('\n'.join(lines))
  return int(worst > TOLERANCE)


if __name__ == '__main__':
  sys.exit(main())
