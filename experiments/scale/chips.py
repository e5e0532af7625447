"""Compiles training steps for chips that are not there: their memory, kernels and collectives.

  pip install "libtpu==0.0.42.*"                       # for TPUs; of jax's own extras, see there
  python experiments/scale/chips.py --chip v5e:4x4 --preset XL/2 --mesh fsdp=16
  python experiments/scale/chips.py --chip v5e:4x4 --slices 2 --mesh data=2,fsdp=16
  pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 nvidia-cudnn-cu12 \\
    nvidia-cublas-cu12 nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12
  python experiments/scale/chips.py --chip h200 --preset XL/2 --mesh fsdp=8
  python experiments/scale/chips.py --out experiments/scale/results    # a table of several

No device is needed, nor touched; what is printed is the compiler's account for one chip. GPU
topologies go through private interfaces of jax, which may move.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import sys
import time

os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # else libtpu looks for the machine it is on
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / 'throughput'))

import ours  # noqa: E402

from diffax import config  # noqa: E402
from diffax import train  # noqa: E402

HOPPER = '''
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: %d
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: %d
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "sm_90"
'''
GPUS = {'h100': HOPPER % (3.35e12, 80e9), 'h200': HOPPER % (4.8e12, 141e9)}  # vendor's data sheets
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
TABLE = (
  ('v5e:4x4', 1, 'XL/2', 'fsdp=16', 32, 256), ('v5e:4x4', 1, 'XL/2', 'fsdp=4,tensor=4', 32, 256),
  ('v5e:4x4', 1, 'XL/2', 'fsdp=4,sequence=4', 128, 32),
  ('v5e:4x4', 1, 'XL/2', 'fsdp=16', 128, 64), ('v5e:4x4', 2, 'XL/2', 'data=2,fsdp=16', 32, 256),
  ('h200', 1, 'XL/2', 'fsdp=8', 32, 256),
)


def devices_of(chip, slices):
  """Devices to compile for: `v5e:4x4` and the like, or 8 GPUs a host, `slices` of them."""
  from jax.experimental import topologies

  if chip not in GPUS:
    import libtpu

    os.environ['TPU_LIBRARY_PATH'] = str(pathlib.Path(libtpu.__file__).parent / 'libtpu.so')
    options = dict(num_slices=slices) if slices > 1 else {}
    return topologies.get_topology_desc(chip, platform='tpu', **options).devices
  from jax._src import xla_bridge
  import jax_plugins.xla_cuda12 as plugin

  if 'cuda' not in xla_bridge._backend_factories:  # its own start needs a driver; the library not
    try:
      xla_bridge.register_plugin('cuda', library_path=str(plugin._get_library_path()))
    except jax.errors.JaxRuntimeError as error:  # loaded already
      if 'ALREADY_EXISTS' not in str(error):
        raise
  return topologies.get_topology_desc(
    platform='cuda', topology_name=chip, topology=f'{slices}x1x8', target_config=GPUS[chip]
  ).devices


def measure(chip, slices, preset, mesh, side, batch):
  """What the compiler says of a training step of a DiT on latents of `side`, in bfloat16."""
  devices = devices_of(chip, slices)
  axes = dict(data=1) | {k: int(n) for k, n in (part.split('=') for part in mesh.split(','))}
  made = ours.plan(preset, batch, side, dtype='bfloat16') | dict(mesh=axes)
  run = train.setup(config.complete(made), devices)
  start = time.perf_counter()
  compiled = train.compile_step(run)
  seconds = time.perf_counter() - start
  memory, text = compiled.memory_analysis(), compiled.as_text()
  found = re.findall(rf' ({"|".join(COLLECTIVES)})(?:-start)?\(', text)
  counts = collections.Counter(found)
  target = r'custom_call_target="([^"]*(?:fmha|tpu_custom_call)[^"]*)"'
  kernels = sorted(set(re.findall(target, text)))
  gigabytes = lambda *names: sum(getattr(memory, f'{n}_size_in_bytes') for n in names) / 1e9
  return dict(
    chip=f'{slices} x {chip}' if slices > 1 else chip, devices=len(devices), preset=preset,
    mesh=mesh, latents=side, batch=batch, state_gb=gigabytes('argument'),
    temporary_gb=gigabytes('temp'), teraflops=train.model_flops(run) / 1e12,
    collectives=dict(counts), kernels=kernels, compile_seconds=seconds, jax=jax.__version__,
  )


def table(rows):
  lines = ['| chip | mesh | tokens | state, GB | temporaries, GB | TFLOP a step | collectives | '
           'attention | compiled in |', '| --- ' * 9 + '|']
  for row in rows:
    counts = ', '.join(f'{n} {name}' for name, n in row['collectives'].items())
    lines.append(
      f'| {row["chip"]} | {row["mesh"]} | {(row["latents"] // 2) ** 2} | {row["state_gb"]:.2f} | '
      f'{row["temporary_gb"]:.2f} | {row["teraflops"]:.0f} | {counts} | '
      f'{", ".join(row["kernels"]) or "xla"} | {row["compile_seconds"]:.0f} s |'
    )
  return '\n'.join(lines) + '\n'


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--chip', help='v4:2x2x1, v5e:4x4, v5p:2x2x2, v6e:4x4, ...; h100, h200')
  parser.add_argument('--slices', type=int, default=1)
  parser.add_argument('--preset', default='XL/2')
  parser.add_argument('--mesh', default='fsdp=16')
  parser.add_argument('--side', type=int, default=32, help='of the latents')
  parser.add_argument('--batch', type=int, default=256)
  parser.add_argument('--out', help='a folder for chips.md and chips.json')
  args = parser.parse_args()
  each = [(args.chip, args.slices, args.preset, args.mesh, args.side, args.batch)]
  rows = []
  for case in each if args.chip else TABLE:
    rows.append(measure(*case))
    print(json.dumps(rows[-1]), flush=True)
  if args.out:
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / 'chips.md').write_text(table(rows))
    (out / 'chips.json').write_text(json.dumps(rows, indent=1) + '\n')
  print(table(rows))


if __name__ == '__main__':
  main()
