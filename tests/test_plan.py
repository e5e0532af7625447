"""Plans against what is known on paper, against the program that runs, and their refusals."""

import importlib.util
import json
import math
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import pytest
import run_diffax

from diffax import chips
from diffax import hlo
from diffax import plan
from diffax import sharding
from diffax import train
from diffax.build import ConfigError
from diffax.models import layers

needs_libtpu = pytest.mark.skipif(
  not importlib.util.find_spec('libtpu'), reason='needs libtpu: pip install "diffax[tpu]"')
needs_cuda = pytest.mark.skipif(
  not any(importlib.util.find_spec(f'jax_cuda{v}_plugin') for v in (12, 13)),
  reason='needs the libraries of the CUDA plugin: pip install "diffax[cuda]"')


@pytest.fixture(scope='module')
def cpus():
  return chips.topology('cpu:8')


def made(topology, *overrides, what='train'):
  return plan.plan(run_diffax.config(*overrides), topology, what)


SHARDED = ('mesh.data=2', 'mesh.fsdp=4', 'model.width=128')


@pytest.fixture(scope='module')
def sharded(cpus):
  return made(cpus, *SHARDED)


def test_keys(sharded, cpus):
  """What scripts rely on, as plain data."""
  found = json.loads(json.dumps(sharded))
  assert {'flops_per_chip', 'hbm_bytes_per_chip', 'collectives', 'roofline_seconds', 'bound',
          'images_per_second', 'fits'} <= set(found)
  assert set(found['hbm_bytes_per_chip']) == {'state', 'whole', 'temp', 'peak', 'limit'}
  assert found['bound'] == max(found['seconds'], key=found['seconds'].get)
  assert found['roofline_seconds'] == found['seconds'][found['bound']]
  assert found['images_per_second'] == pytest.approx(32 / found['roofline_seconds'])
  assert found['fits'] and found['chips'] == 8
  text = plan.report(found)
  assert 'all-gather' in text and 'fits' in text and '--config.mesh.fsdp=4' in text


def test_memory(sharded):
  """The state is what lies on a device once it is made; the peak holds it and what is computed."""
  run = run_diffax.setup(*SHARDED, count=8)
  state = train.init(run)
  held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
  memory = sharded['hbm_bytes_per_chip']
  assert memory['state'] == held
  batch = 4 * sum(np.asarray(x).nbytes for x in next(train.batches(run, 0)).values())
  assert 0 <= memory['peak'] - held - memory['temp'] <= batch  # the old one's place is taken
  all_of_it = sum(x.nbytes for x in jax.tree.leaves(state))
  assert held < 0.3 * all_of_it  # split over four, but for what is small
  whole = [x for x in jax.tree.leaves(state) if x.is_fully_replicated]
  assert memory['whole'] == sum(x.nbytes for x in whole) > 0
  assert max(x.nbytes for x in whole) < 2**16


def test_scanned_and_unrolled(sharded, cpus):
  """The same figures whether blocks stand in a loop or are written out."""
  with mock.patch.object(layers, 'unroll_blocks', lambda length: length):
    unrolled = made(cpus, *SHARDED)
  assert unrolled['flops_per_chip'] == sharded['flops_per_chip']
  sent = lambda plan: sum(row['near_bytes'] for row in plan['collectives'].values())
  assert sent(sharded) == pytest.approx(sent(unrolled), rel=0.03)  # XLA joins some of them


def test_flops(sharded):
  """Of the model three passes forward; of the program what is computed again, too."""
  assert sharded['model_flops_per_chip'] == train.model_flops(
    run_diffax.setup(*SHARDED, count=8)) / 8
  one = chips.topology('cpu:1')
  found = made(one)
  assert found['model_flops_per_chip'] == train.model_flops(run_diffax.setup(count=1))
  kept = made(one, 'model.remat=none')
  again = made(one, 'model.remat=nothing_saveable')
  assert kept['flops_per_chip'] == pytest.approx(kept['model_flops_per_chip'], rel=0.02)
  assert 1.2 < again['flops_per_chip'] / kept['flops_per_chip'] < 4 / 3
  assert found['flops_per_chip'] < again['flops_per_chip']


def test_gradients_on_paper(cpus):
  """Data parallel: the gradients' sum alone; each device sends 7/8 of them twice."""
  found = made(cpus, 'mesh.data=8')
  size = 4 * found['parameters']
  sent = sum(row['near_bytes'] for row in found['collectives'].values())
  assert sent == pytest.approx(2 * 7 / 8 * size, rel=0.05)
  assert set(found['collectives']) <= {'all-reduce', 'all-gather'}


def test_sampling(cpus):
  """Twice the steps have twice the FLOPs, and guidance twice as many again."""
  each = lambda *overrides: made(
    cpus, 'sample.sampler.name=ddim', *overrides, what='sample')
  four = each('sample.sampler.steps=4')
  eight = each('sample.sampler.steps=8')
  guided = each('sample.sampler.steps=4', 'sample.guidance=2')
  assert eight['flops_per_chip'] == pytest.approx(2 * four['flops_per_chip'], rel=1e-3)
  assert guided['flops_per_chip'] == pytest.approx(2 * four['flops_per_chip'], rel=1e-3)
  assert four['images_per_second'] == pytest.approx(8 / four['roofline_seconds'])
  memory = four['hbm_bytes_per_chip']
  assert memory['state'] == 4 * four['parameters'] <= memory['peak']  # the average alone


def test_programs_that_are_not_understood(cpus):
  """Are told, and are no crash."""
  error = ValueError('loop x: how often it runs is not to be read')
  with mock.patch.object(hlo, 'collectives', side_effect=error):
    with pytest.raises(ConfigError, match='loop x: how often.*number of steps'):
      made(cpus)


def pretended(config, topology, what):
  """A plan by rules of thumb in place of the compiler: less is kept of more that is split."""
  del what
  parts, remat = config['mesh'].get('fsdp', 1), config['model']['remat']
  if config['mesh'].get('tensor', 1) > 1:
    raise ConfigError('3 heads do not divide by mesh.tensor=2')
  kept = dict(none=8, dots_saveable=4, nothing_saveable=1)[remat] / config['accumulate']
  peak, limit = 10 / parts + kept, topology.chip.memory
  speed = dict(none=4, dots_saveable=3, nothing_saveable=2)[remat] - parts / 100
  return dict(
    settings=plan._settings(config, sharding.make_mesh(config['mesh'], topology.devices)),
    hbm_bytes_per_chip=dict(peak=peak, limit=limit),
    fits=peak <= limit, images_per_second=speed, bound='compute')


def searched(cpus, memory, *overrides):
  topology = cpus._replace(chip=cpus.chip._replace(memory=memory))
  config, said = run_diffax.config(*overrides), []
  with mock.patch.object(plan, 'plan', pretended):
    return plan.search(config, topology, say=said.append), said


@pytest.mark.parametrize('memory, best', [
  (20, dict(fsdp=1, remat='none', accumulate=1)),  # all that is fastest fits
  (12, dict(fsdp=2, remat='none', accumulate=2)),  # in microbatches, not computed again
  (3, dict(fsdp=8, remat='none', accumulate=8)),
  (2, dict(fsdp=8, remat='dots_saveable', accumulate=8)),
  (1.4, dict(fsdp=8, remat='nothing_saveable', accumulate=8)),
])
def test_search(cpus, memory, best):
  """The fastest that fits is found, whatever of mesh, policy and microbatches it takes."""
  found, said = searched(cpus, memory)  # of the mesh that a config has by itself, data=-1
  first = found[0]['settings']
  assert found[0]['fits']
  assert best == dict(fsdp=first['mesh']['fsdp'], remat=first['model.remat'],
                      accumulate=first['accumulate'])
  fits = [each['images_per_second'] for each in found if each['fits']]
  assert fits == sorted(fits, reverse=True)
  assert [each['fits'] for each in found] == sorted((each['fits'] for each in found), reverse=True)
  assert len({plan.flags(each['settings']) for each in found}) == len(found)
  assert all(math.prod(each['settings']['mesh'].values()) == 8 for each in found)
  assert any('3 heads' in line for line in said)  # what cannot be is told, and left out
  assert plan.advice(found).splitlines()[-1] == f'the best: {plan.flags(first)}'


def test_search_in_vain(cpus):
  """Where nothing fits it says so, and names what is nearest."""
  found, _ = searched(cpus, 1)
  assert not any(each['fits'] for each in found)
  assert found[0]['hbm_bytes_per_chip']['peak'] == min(
    each['hbm_bytes_per_chip']['peak'] for each in found)
  assert 'none fits' in plan.advice(found)


def test_search_of_what_cannot_be(cpus):
  """The mistake is told, not that no mesh will do; and what is not planned before any is tried."""
  with pytest.raises(ConfigError, match='no mesh.*itself says: .*width=33'):
    plan.search(run_diffax.config('model.width=33'), cpus)
  said = []
  with pytest.raises(ConfigError, match='allowed: sample, train'):
    plan.search(run_diffax.config(), cpus, 'fly', said.append)
  assert not said


def test_meshes():
  """All of them multiply to the devices, islands are split by data alone, none comes twice."""
  for devices, islands in ((8, 1), (64, 2), (256, 1)):
    found = plan.meshes(devices, islands)
    assert all(math.prod(mesh.values()) == devices for mesh in found)
    assert len(set(map(str, found))) == len(found)
  assert dict(data=2, fsdp=32, sequence=1, tensor=1) in plan.meshes(64, 2)
  assert dict(data=2, fsdp=128, sequence=1, tensor=1) in plan.meshes(256, 1)


def test_refused_by_the_compiler(cpus):
  """A program larger than the chip is a plan that does not fit, not a crash."""
  error = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm')
  with mock.patch.object(jax.stages.Lowered, 'compile', side_effect=error):
    found = made(cpus)
  assert not found['fits'] and 'RESOURCE_EXHAUSTED' in found['refused']
  assert found['flops_per_chip'] and found['bound'] == 'compute'
  assert 'DOES NOT FIT' in plan.report(found)


@pytest.mark.parametrize('topology, words', [
  ('v5e', 'CHIP:SIZES'), ('v5e:', 'CHIP:SIZES'), ('v5x:4x4', 'v5'), ('h300:8', 'h200'),
  ('cpu:0', '1 and more'), ('cpu:2x2', 'cpu:N'), ('2*cpu:4', 'cpu:N'), ('cpu:1000', 'XLA_FLAGS'),
  ('cpu:99999999999', 'up to 1024'), ('h100:64', 'h100:HOSTSx8'), ('v5e:32x32', '2*v6e:16x16'),
  ('h100:2x2x2', 'HOSTSxGPUS'), ('v5e:4x4; rm -rf', 'CHIP:SIZES'),
])
def test_bad_topologies(topology, words):
  with pytest.raises(ConfigError, match='topology') as error:
    chips.topology(topology)
  assert words in str(error.value)


def test_door(tmp_path, capsys):
  """The command prints the table and writes plan.json; nothing else is made, no device asked."""
  config = f'{run_diffax.SMOKE}'
  run_diffax.door('--config', config, '--workdir', tmp_path / 'a', '--mode', 'plan', '--topology',
                  'cpu:8', '--config.mesh.data=8')
  printed = capsys.readouterr().out
  found = json.loads((tmp_path / 'a' / 'plan.json').read_text())
  assert 'images/s at most' in printed and found['topology'] == 'cpu:8'
  assert [path.name for path in (tmp_path / 'a').iterdir()] == ['plan.json']
  for words, arguments in (
    ('--topology', ('--mode', 'plan')), ('--topology', ('--mode', 'train', '--topology', 'cpu:8')),
    ('allowed: sample, train', ('--mode', 'plan', '--topology', 'none:8', '--plan.what=fly')),
  ):
    with pytest.raises(SystemExit):
      run_diffax.door('--config', config, '--workdir', tmp_path / 'b', *arguments)
    assert words in capsys.readouterr().err


def test_figures():
  """Each chip is found by what jax calls it, the longest name first."""
  assert chips.by_kind('TPU v5 lite') is chips.CHIPS['v5e']
  assert chips.by_kind('TPU v5p') is chips.CHIPS['v5p']
  assert chips.by_kind('NVIDIA H100 PCIe').half == 756e12
  assert chips.by_kind('abacus') is None and chips.peak('abacus') is None
  for chip in chips.CHIPS.values():
    assert chip.usable is None or chip.usable <= chip.memory
    assert chip.slow < chip.fast < chip.bandwidth < chip.half


@pytest.mark.parametrize('sizes, ports', [
  ((1, 1), 0), ((2, 2), 2), ((2, 4), 2), ((8, 16), 3), ((16, 16), 4), ((2, 2, 1), 2),
  ((2, 4, 4), 3), ((4, 4, 4), 6), ((4, 8, 8), 6)])
def test_links(sizes, ports):
  assert chips.links(sizes) == ports


# --- with the compilers of others -----------------------------------------------------------------

TINY = ('model.dtype=bfloat16', 'mesh.data=1', 'model.heads=2', 'model.width=128')


@needs_libtpu
@pytest.mark.slow
def test_tpus():
  found = made(chips.topology('v5e:2x2'), *TINY, 'mesh.fsdp=4')
  assert found['fits'] and found['hbm_bytes_per_chip']['limit'] == 15.75 * 2**30
  assert {'all-gather', 'reduce-scatter', 'all-reduce'} & set(found['collectives'])
  assert not any(row['far_bytes'] for row in found['collectives'].values())


@needs_libtpu
@pytest.mark.slow
def test_slices():
  """Between slices the gradients alone are sent, a quarter of them by each of four chips."""
  found = made(chips.topology('2*v5e:2x2'), *TINY, 'mesh.data=2', 'mesh.fsdp=4')
  assert found['islands'] == 2 and found['chips'] == 8
  far = sum(row['far_bytes'] for row in found['collectives'].values())
  split = found['parameters'] - found['hbm_bytes_per_chip']['whole'] / 16
  assert split / 2 <= far < 1.2 * split  # in bfloat16 a half, in float32 all of it


@needs_libtpu
@pytest.mark.slow
def test_splash_attention():
  """Its kernels tell of themselves on lines of their own, and nothing behind them is lost: each
  block's parameters are gathered for either pass, and its gradients added up.
  """
  found = made(chips.topology('v5e:2x2'), *TINY, 'mesh.fsdp=4', 'data.name=blank', 'data.size=64',
               'data.channels=4', 'data.classes=10', 'model.remat=nothing_saveable')
  split = found['parameters'] - found['hbm_bytes_per_chip']['whole'] / 16
  sent = {kind: row['near_bytes'] for kind, row in found['collectives'].items()}
  assert sent['all-gather'] >= 0.9 * 2 * 2 * split * 3 / 4
  assert sum(sent.values()) - sent['all-gather'] >= 0.9 * 2 * split * 3 / 4


@needs_libtpu
def test_products_stay_whole(monkeypatch):
  """With parameters that are gathered; flags of one's own win."""
  monkeypatch.delenv('LIBTPU_INIT_ARGS', raising=False)
  mesh = sharding.make_mesh({'fsdp': 8}, chips.topology('v5e:2x4').devices)
  like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(
    mesh, P('fsdp')))
  def sent(x, w):
    compiled = sharding.jit(lambda x, w: x @ w, mesh).trace(x, w).lower().compile()
    return {each.kind for each in hlo.collectives(hlo.parse(compiled.as_text()), np.zeros(8))}
  arrays = like(2**19, 1024), like(1024, 4096)
  assert sent(*arrays) == {'all-gather'}
  monkeypatch.setenv('LIBTPU_INIT_ARGS', '--xla_jf_spmd_threshold_for_windowed_einsum_mib=1')
  assert sharding.compiler_options(mesh) == {}
  assert 'collective-permute' in sent(*arrays)


@needs_libtpu
@pytest.mark.parametrize('name, count, islands', [
  ('v4:2x2x4', 16, 1), ('v5e:4x4', 16, 1), ('v5p:2x2x4', 16, 1), ('2*v6e:4x4', 32, 2),
  ('v5e:1x1', 1, 1)])
def test_slices_of_chips(name, count, islands):
  """A device is a chip, and of the kind that its figures are found by."""
  topology = chips.topology(name)
  assert len(topology.devices) == count
  assert len({chips.island(d) for d in topology.devices}) == islands
  chip = chips.by_kind(topology.devices[0].device_kind)
  assert topology.chip == chip._replace(fast=topology.chip.fast) and topology.chip.fast < chip.fast


@needs_libtpu
def test_no_such_slice():
  with pytest.raises(ConfigError, match='libtpu has no such slice'):
    chips.topology('v5e:3x5')


@needs_cuda
@pytest.mark.slow
def test_gpus(monkeypatch):
  """Attention by cuDNN, blocks written out, NVLink within a host and the network between two."""
  monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.9')
  topology = chips.topology('h200:2x2')
  found = made(topology, *TINY, 'mesh.data=2', 'mesh.fsdp=2')
  assert found['hbm_bytes_per_chip']['limit'] == int(0.9 * 139.7 * 2**30)
  assert found['islands'] == 2
  assert any(row['far_bytes'] for row in found['collectives'].values())
  run = train.setup(run_diffax.config(*TINY, 'mesh.data=2', 'mesh.fsdp=2'), list(topology.devices))
  text = train.compile_step(run).as_text()
  assert 'fmha' in text and ' while(' not in text
