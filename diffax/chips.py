"""What accelerators can do, by their makers' figures, and topologies of them that are not here.

A topology is compiled for like the devices of this machine, with none of them at hand:

  v5e:16x16     256 chips of a TPU v5e; v4:4x4x4, v5p:8x8x8, v6e:16x16 alike
  2*v6e:16x16   two slices of them, which a slower network joins
  h100:8        a host of 8 GPUs; h200:2x8: two hosts
  cpu:8         virtual devices of this machine

TPUs need libtpu (the extra `tpu`), GPUs the libraries of jax's CUDA plugin (the extra `cuda`).
"""

import contextlib
import logging
import math
import os
import pathlib
import re
import time
from typing import NamedTuple

import jax
import numpy as np

from diffax.build import ConfigError, near


class Chip(NamedTuple):
  """A chip's figures.

  kinds: how its `device_kind` may begin. half, single: FLOP/s of dense products in bfloat16 and of
  float32 arrays as jax multiplies them by default (TPUs by one pass of bfloat16, GPUs by TF32).
  memory: bytes of HBM; usable: those a program may have; bandwidth: bytes/s of it. fast, slow:
  bytes/s one way of a chip's share of the network within its island (ICI by all `ports`, NVLink)
  and beyond. None: not known.
  """

  kinds: tuple
  half: float
  single: float | None = None
  memory: float | None = None
  usable: float | None = None
  bandwidth: float | None = None
  fast: float | None = None
  slow: float | None = None
  ports: int | None = None


GiB = 2**30
# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} of 2026 (peak compute, HBM, its bandwidth, a
# half of the bidirectional inter-chip interconnect, ports); `usable` is what libtpu 0.0.42 allows;
# `slow` is of jax-ml.github.io/scaling-book/tpus. GPUs: data sheets of A100, H100 and H200 (SXM;
# NVLink one way, TF32 without sparsity), but for memory what CUDA tells of such a card, for the
# sheets' 80 and 141 GB are rounded; `slow` a network card of 400 Gbit/s a GPU, as in DGX H100;
# A100: 200.
CHIPS = {
  'v4': Chip(('TPU v4',), 275e12, 275e12, 32 * GiB, 30.75 * GiB, 1228e9, 300e9, 6.25e9, 6),
  'v5e': Chip(('TPU v5 lite', 'TPU v5e'), 197e12, 197e12, 16 * GiB, 15.75 * GiB, 819e9, 200e9,
              3.125e9, 4),
  'v5p': Chip(('TPU v5p', 'TPU v5'), 459e12, 459e12, 95.74 * GiB, 95.74 * GiB, 2765e9, 600e9,
              6.25e9, 6),
  'v6e': Chip(('TPU v6 lite', 'TPU v6e'), 918e12, 918e12, 32 * GiB, 31.25 * GiB, 1638e9, 400e9,
              12.5e9, 4),
  'h100': Chip(('NVIDIA H100',), 989e12, 494e12, 79.1 * GiB, None, 3.35e12, 450e9, 50e9),
  'h200': Chip(('NVIDIA H200', 'NVIDIA GH200'), 989e12, 494e12, 139.7 * GiB, None, 4.8e12, 450e9,
               50e9),
  'a100': Chip(('NVIDIA A100',), 312e12, 156e12, 79.1 * GiB, None, 2.04e12, 300e9, 25e9),
}
OTHERS = (  # whose FLOP/s alone are used
  Chip(('TPU v2',), 45e12), Chip(('TPU v3',), 123e12), Chip(('TPU7x',), 2307e12),
  Chip(('NVIDIA V100',), 125e12), Chip(('NVIDIA A10',), 125e12), Chip(('NVIDIA L4',), 121e12),
  Chip(('NVIDIA L40S',), 362e12), Chip(('NVIDIA H100 PCIe',), 756e12),
  Chip(('NVIDIA B200',), 2250e12), Chip(('NVIDIA GB200',), 2500e12),
)
DESCRIBED = ('h100', 'h200')  # to the compiler, by HOPPER
LARGEST = {  # chips of a slice, by the pages named; GPUs that NVLink joins; processes of a machine
  'v4': 4096, 'v5e': 256, 'v5p': 6144, 'v6e': 256, 'h100': 8, 'h200': 8, 'cpu': 1024}


class Topology(NamedTuple):
  """Devices to compile for, and the figures of one."""

  name: str
  chip: Chip
  devices: tuple

  def islands(self, mesh):
    """Which fast network each device of a mesh is on: int [devices], in the mesh's order."""
    return np.array([island(device) for device in mesh.devices.flat])


def island(device):
  """Which fast network a device is on: a TPU's slice; of GPUs the host, for NVLink joins those."""
  if device.platform == 'tpu':
    return getattr(device, 'slice_index', None) or 0
  return device.process_index


def peak(kind):
  """FLOP/s of a device in bfloat16 by its `device_kind`, None where it is not known."""
  chip = by_kind(kind)
  return chip and chip.half


def by_kind(kind):
  """The chip of a `device_kind`, None where it is not known; the longest name that fits."""
  fits = [(len(k), chip) for chip in (*CHIPS.values(), *OTHERS) for k in chip.kinds
          if kind.startswith(k)]
  return max(fits, key=lambda fit: fit[0])[1] if fits else None


# --- topologies -----------------------------------------------------------------------------------

_FORM = re.compile(r'(?:(\d+)\*)?([a-z]+\d*[a-z]*):(\d+(?:x\d+)*)')


def topology(text):
  """A `Topology` by its name, as above. Raises ConfigError.

  No accelerator is needed nor touched.
  """
  found = _FORM.fullmatch(text)
  if not found:
    raise ConfigError(
      f'--topology={text!r}: write CHIP:SIZES, as v5e:16x16, 2*v6e:16x16, h200:2x8 or cpu:8')
  slices, name, sizes = int(found[1] or 1), found[2], tuple(map(int, found[3].split('x')))
  known = {'cpu': _cpus} | dict.fromkeys(DESCRIBED, _gpus)
  known |= {n: _tpus for n in CHIPS if n.startswith('v')}
  if name not in known:
    raise ConfigError(f'--topology={text!r}: {near(name, known)}')
  if min(slices, *sizes) < 1:
    raise ConfigError(f'--topology={text!r}: sizes are 1 and more')
  most, each = LARGEST[name], sizes[-1] if name in DESCRIBED else math.prod(sizes)
  if each > most:
    remedies = {'cpu': '', **dict.fromkeys(DESCRIBED, f'; several hosts are {name}:HOSTSx{most}')}
    remedy = remedies.get(name, '; several slices are N*CHIP:SIZES, as 2*v6e:16x16')
    raise ConfigError(f'--topology={text!r}: {each}, where {name} goes up to {most}{remedy}')
  chip, devices = known[name](text, name, slices, sizes)
  return Topology(text, chip, tuple(devices))


def _tpus(text, name, slices, sizes):
  from jax.experimental import topologies

  try:
    import libtpu
  except ImportError as error:
    raise ConfigError(
      f'--topology={text}: compiling for TPUs needs libtpu: pip install "diffax[tpu]"') from error
  options = dict(num_slices=slices) if slices > 1 else {}
  if math.prod(sizes) == 1:  # of a host whose other chips are others'
    options['chips_per_host_bounds'] = [1, 1, 1]
  if name == 'v4':  # its two cores are one device, as they are to jax on a real one
    options['chip_config_name'] = 'megacore'
  library = str(pathlib.Path(libtpu.__file__).parent / 'libtpu.so')
  try:
    with _variables(TPU_LIBRARY_PATH=library, TPU_ACCELERATOR_TYPE=KINDS[name], **NOWHERE):
      made = topologies.get_topology_desc(f'{name}:{"x".join(map(str, sizes))}', 'tpu', **options)
  except Exception as error:  # of several kinds, all of libtpu
    raise ConfigError(
      f'--topology={text}: libtpu has no such slice ({" ".join(str(error).split())[:200]}); v4 and '
      'v5p have three sizes, as 4x4x8, v5e and v6e two, as 8x16') from error
  chip = CHIPS[name]
  return chip._replace(fast=chip.fast * max(links(sizes), 1) / chip.ports), made.devices


def links(sizes):
  """By how many ports the chips of a slice send, at least one of them, where all send alike.

  Two along an axis that closes to a ring, else one, for at its ends there is no other: v5e and v6e
  close axes of 16, v4 and v5p all, in slices of cubes of 4 (jax-ml.github.io/scaling-book/tpus).
  """
  closed = lambda n: n == 16 if len(sizes) == 2 else all(m % 4 == 0 for m in sizes)
  return sum(2 if closed(n) else 1 for n in sizes if n > 1)


KINDS = {'v4': 'v4-8', 'v5e': 'v5litepod-4', 'v5p': 'v5p-8', 'v6e': 'v6e-4'}
NOWHERE = dict(  # libtpu is on no TPU VM, and holds no chip: two plans may be made at a time
  TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost', ALLOW_MULTIPLE_LIBTPU_LOAD='1')


@contextlib.contextmanager
def _variables(**values):
  """Within it, variables of the environment that are not set have these values."""
  added = {name: value for name, value in values.items() if name not in os.environ}
  os.environ.update(added)
  try:
    yield
  finally:
    for name in added:
      del os.environ[name]


HOPPER = '''
gpu_device_info {{
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
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory:.0f}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "sm_90"
'''


def _gpus(text, name, slices, sizes):
  """Through private interfaces of jax, for there are no others: expect them to move."""
  from jax._src import xla_bridge
  from jax.experimental import topologies

  hosts, each = (sizes if len(sizes) == 2 else (1, *sizes))[:2]
  if len(sizes) > 2 or slices > 1:
    raise ConfigError(f'--topology={text}: GPUs are {name}:GPUS or {name}:HOSTSxGPUS')
  plugin = _cuda_plugin(text)
  log = logging.getLogger(xla_bridge.__name__)
  log.disabled, before = True, log.disabled  # it would tell that the plugin found no driver
  jax.devices('cpu')  # jax looks for plugins now
  log.disabled = before
  if 'cuda' not in xla_bridge._backend_factories:  # its own start needs a driver; the library not
    try:
      xla_bridge.register_plugin('cuda', library_path=str(plugin._get_library_path()))
    except jax.errors.JaxRuntimeError as error:  # loaded already
      if 'ALREADY_EXISTS' not in str(error):
        raise
  chip = CHIPS[name]
  config = HOPPER.format(bandwidth=chip.bandwidth, memory=chip.memory)
  made = topologies.get_topology_desc(
    platform='cuda', topology_name=name, topology=f'{hosts}x1x{each}', target_config=config)
  return chip._replace(usable=chip.memory * _preallocated()), made.devices


def _cuda_plugin(text):
  for version in (13, 12):
    with contextlib.suppress(ImportError):
      return __import__(f'jax_plugins.xla_cuda{version}', fromlist=['xla_cuda'])
  raise ConfigError(
    f'--topology={text}: compiling for GPUs needs the libraries of jax\'s CUDA plugin: pip install '
    '"diffax[cuda]"; no GPU nor driver is needed')


def _preallocated():
  """The share of a GPU's memory that jax takes for its arrays."""
  return float(os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', 0.75))


# --- this machine ---------------------------------------------------------------------------------


def _cpus(text, name, slices, sizes):
  from jax._src import xla_bridge

  count = math.prod(sizes)
  if slices > 1 or len(sizes) > 1:
    raise ConfigError(f'--topology={text}: virtual devices of this machine are cpu:N')
  if not xla_bridge.backends_are_initialized() and 'device_count' not in os.environ.get(
      'XLA_FLAGS', ''):
    jax.config.update('jax_num_cpu_devices', count)
  devices = jax.devices('cpu')
  if len(devices) < count:
    raise ConfigError(
      f'--topology={text}: jax was started with {len(devices)} CPU devices; set XLA_FLAGS='
      f'--xla_force_host_platform_device_count={count}')
  rate, bandwidth = measured()
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / count
  share = Chip(
    ('cpu',), rate / count, rate / count, memory, memory, bandwidth / count, bandwidth / count)
  return share, devices[:count]


def measured(size=1024, seconds=0.2):
  """(FLOP/s of float32 products, bytes/s of copies) of this machine, the best of a few."""
  a = np.random.default_rng(0).standard_normal((size, size), np.float32)
  b, large = a.copy(), np.zeros(2**24, np.float32)
  to = np.empty_like(large)

  def best(work):
    took, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(took) < 5:  # the first takes its memory, too
      began = time.perf_counter()
      work()
      took.append(time.perf_counter() - began)
    return min(took)

  return 2 * size**3 / best(lambda: a @ b), 2 * large.nbytes / best(lambda: np.copyto(to, large))
