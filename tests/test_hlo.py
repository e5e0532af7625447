"""What is read from a compiled program, against what is known on paper."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from diffax import hlo

N, PARTS = 1024, 8


@pytest.fixture(scope='module')
def mesh():
  return jax.make_mesh((PARTS,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))


def compiled(function, mesh, *specs, out=None):
  """The program of a function each device carries out on its part of float32 [N ...]."""
  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=specs, out_specs=out or P(), check_vma=False)
  like = [jax.ShapeDtypeStruct((N,), 'float32', sharding=NamedSharding(mesh, s)) for s in specs]
  return hlo.parse(jax.jit(mapped).lower(*like).compile().as_text())


def total(program, island=(0,) * PARTS):
  """{kind: (times, bytes near, bytes far)}."""
  found = {}
  for each in hlo.collectives(program, island):
    times, near, far = found.get(each.kind, (0, 0, 0))
    found[each.kind] = (
      times + each.times, near + each.times * each.near, far + each.times * each.far)
  return found


ISLANDS = np.arange(PARTS) // 4


@pytest.mark.parametrize('function, spec, out, kind, near, far', [
  (lambda x: jax.lax.psum(x, 'x'), P(), P(), 'all-reduce', 2 * N * 4 * 3 / 4, 2 * N * 4 / 4 / 2),
  (lambda x: jax.lax.all_gather(x, 'x', tiled=True), P('x'), P(), 'all-gather', N * 4 * 3 / 4,
   N * 4 / 4 / 2),
  (lambda x: jax.lax.psum_scatter(x, 'x', tiled=True), P(), P('x'), 'reduce-scatter',
   N * 4 * 3 / 4, N * 4 / 4 / 2),
  (lambda x: jax.lax.all_to_all(x, 'x', 0, 0, tiled=True), P('x'), P('x'), 'all-to-all',
   N // PARTS * 4 * 3 / 8, N // PARTS * 4 * 4 / 8),
], ids=lambda x: x if isinstance(x, str) and '-' in x else '')
def test_bytes(mesh, function, spec, out, kind, near, far):
  """What the best algorithm sends, in one island and in two of four devices."""
  program = compiled(function, mesh, spec, out=out)
  times, within, beyond = total(program, ISLANDS)[kind]
  assert (times, within, beyond) == (1, near, far)
  _, one, none = total(program)[kind]
  assert none == 0
  if kind == 'all-to-all':  # each keeps an eighth
    assert one == near + far
  else:
    assert one == near * (7 / 8) / (3 / 4)


def test_permutation(mesh):
  """A ring sends all it has to the next, of two islands also over the slow network."""
  ring = lambda x: jax.lax.ppermute(x, 'x', [(i, (i + 1) % PARTS) for i in range(PARTS)])
  program = compiled(ring, mesh, P('x'), out=P('x'))
  assert total(program) == {'collective-permute': (1, N // PARTS * 4, 0)}
  assert total(program, ISLANDS) == {'collective-permute': (1, N // PARTS * 4, N // PARTS * 4)}
  inside = lambda x: jax.lax.ppermute(x, 'x', [(0, 1), (1, 0), (4, 5), (5, 4)])
  program = compiled(inside, mesh, P('x'), out=P('x'))
  assert total(program, ISLANDS)['collective-permute'][2] == 0


@pytest.mark.parametrize('unroll', [1, 2, 6])
def test_loops(mesh, unroll):
  """What stands in a loop counts as often as it runs, written out or not, in loops of loops too."""
  def inner(x, _):
    return jnp.sin(jax.lax.psum(x, 'x')), None

  def outer(x, _):
    return jnp.cos(jax.lax.scan(inner, x, None, length=6, unroll=unroll)[0]), None

  program = compiled(lambda x: jax.lax.scan(outer, x, None, length=3)[0], mesh, P())
  assert total(program)['all-reduce'][0] == 18
  once = compiled(lambda x: inner(x, None)[0], mesh, P())
  assert total(program)['all-reduce'][1] == 18 * total(once)['all-reduce'][1]


def test_groups_of_some(mesh):
  """A collective over one axis of two takes part in groups of four."""
  both = jax.make_mesh((2, 4), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  near = compiled(lambda x: jax.lax.psum(x, 'b'), both, P())
  far = compiled(lambda x: jax.lax.psum(x, 'a'), both, P())
  assert total(near, ISLANDS)['all-reduce'][1:] == (2 * N * 4 * 3 / 4, 0)
  assert total(far, ISLANDS)['all-reduce'][1:] == (0, 2 * N * 4 / 2)


@pytest.mark.parametrize('said, wanted', [
  ('replica_groups={{0,2,4,6},{1,3,5,7}}', [0, 2, 4, 6]),
  ('replica_groups={}', list(range(8))),
  ('replica_groups=[2,4]<=[8]', [0, 1, 2, 3]),
  ('replica_groups=[4,2]<=[2,4]T(1,0)', [0, 4]),
  ("replica_groups=mesh['x'=4,'y'=2] {'x'}", [0, 2, 4, 6]),
  ("replica_groups=mesh['x'=4,'y'=2] {'y'}", [0, 1]),
  ("replica_groups=mesh['x'=4,'y'=2] {'x','y'}", list(range(8))),
  ("replica_groups=mesh['x'=8] {'x':(1)2}", [0, 4]),
  ("replica_groups=mesh['x'=8] {'x':(2)4}", [0, 1, 2, 3]),
  ("replica_groups=mesh['x'=4,'y'=1,'z'=2], device_ids=([2,4]T(1,0)) {'x'}", [0, 1, 2, 3]),
  ("replica_groups=mesh['x'=4,'y'=1,'z'=2], device_ids=([2,4]T(1,0)) {'z'}", [0, 4]),
  ("replica_groups=mesh['x'=2,'y'=4], device_ids=([7,6,5,4,3,2,1,0]) {'y'}", [4, 5, 6, 7]),
  ('channel_id=3', list(range(8))),
])
def test_forms_of_groups(said, wanted):
  found = hlo._groups(f'%x), channel_id=1, {said}, dimensions={{0}}', 8)
  assert sorted(found[0]) == wanted
  assert sorted(np.concatenate(found)) == list(range(8)) and len({*map(len, found)}) == 1


def test_a_form_that_is_not_known():
  """It is not taken for all devices."""
  with pytest.raises(ValueError, match='not known: replica_groups=of some'):
    hlo._groups('%x), replica_groups=of some kind', 8)


UNEVEN = '''HloModule jit_step, num_partitions=12

ENTRY %main (v: f32[1024]) -> f32[1024] {
  %v = f32[1024]{0} parameter(0)
  ROOT %r = f32[1024]{0} KIND(%v), replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11}}
}
'''


@pytest.mark.parametrize('kind, near, far', [
  ('all-reduce', 2 * 4096 * 3 / 4, 2 * 4096 / 2 / 2),
  ('all-to-all', 4096 * 3 / 4, 4096 * 2 / 4),
])
def test_groups_that_lie_unevenly(kind, near, far):
  """Twelve devices on two hosts of six: the group in the middle alone is on both."""
  program = hlo.parse(UNEVEN.replace('KIND', kind))
  assert total(program, np.arange(12) // 6) == {kind: (1, near, far)}
  assert total(program, np.arange(12) // 4)[kind] == (1, near, 0)


TPU = '''HloModule jit_step, is_scheduled=true, num_partitions=4

%body (p: (s32[], f32[8,128], f32[5,8,128])) -> (s32[], f32[8,128], f32[5,8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}, f32[5,8,128]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %x = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %rows = f32[5,8,128]{2,1,0} get-tuple-element(%p), index=2
  %row = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%rows, %i), dynamic_slice_sizes={1,8,128}
  %kernel = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0:S(1)}) custom-call(%x), metadata={KERNEL={
"xprof_metadata":"{\\"block_q\\": 512, \\"q_layout\\": 1}"
}}, metadata={op_name="attention"}, custom_call_target="tpu_custom_call"
  %begun = (f32[8,128]{1,0}, s32[2]{0:S(4)}) fusion(%x), calls=%start
  %piece = (f32[8,128]{1,0}, f32[32,128]{1,0}) fusion(%begun), kind=kOutput, calls=%carry
  ROOT %t = (s32[], f32[8,128]{1,0:S(1)}, f32[5,8,128]) tuple(%next, %x, %rows)
}

%start (a: f32[8,128]) -> (f32[8,128]) {
  %a = f32[8,128]{1,0} parameter(0)
  %all-gather.1 = f32[32,128]{1,0} all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4]
  ROOT %c = (f32[8,128]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%carry (b: f32[8,128]) -> (f32[8,128], f32[32,128]) {
  %b = f32[8,128]{1,0} parameter(0)
  %all-gather.2 = f32[32,128]{1,0} all-gather(%b), channel_id=7, replica_groups=[1,4]<=[4]
  ROOT %u = (f32[8,128], f32[32,128]) tuple(%b, %all-gather.2)
}

%condition (q: (s32[], f32[8,128], f32[5,8,128])) -> pred[] {
  %end = s32[]{:T(128)} constant(5)
  %q = (s32[]{:T(128)}, f32[8,128], f32[5,8,128]) parameter(0)
  %k = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%k, %end), direction=LT
}

%add (c: f32[], d: f32[]) -> f32[] {
  %c = f32[] parameter(0)
  %d = f32[] parameter(1)
  ROOT %e = f32[] add(%c, %d)
}

%scatter (g: f32[64,128], n: s32[]) -> f32[16,128] {
  %g = f32[64,128]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %all-reduce.3 = f32[64,128]{1,0} all-reduce(%g), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = f32[16,128]{1,0} dynamic-slice(%all-reduce.3, %n), dynamic_slice_sizes={16,128}
}

ENTRY %main (w: f32[5,8,128], v: f32[64,128]) -> f32[16,128] {
  %w = f32[5,8,128]{2,1,0} parameter(0)
  %v = f32[64,128]{1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %copied = s32[]{:T(128)} copy(%zero)
  %first = f32[8,128]{1,0:T(8,128)S(1)} broadcast(%zero)
  %in = (s32[], f32[8,128]{1,0:S(1)}, f32[5,8,128]) tuple(%copied, %first, %w)
  %loop = (s32[], f32[8,128]{1,0:S(1)}, f32[5,8,128]) while(%in), condition=%condition, body=%body
  ROOT %out = f32[16,128]{1,0} fusion(%v, %zero), kind=kCustom, calls=%scatter
}
'''


@pytest.mark.parametrize('change, words', [
  (lambda text: text.replace('  ROOT %out', '}\n  ROOT %out'), 'no result'),
  (lambda text: text.replace('  ROOT %own', '  %own'), 'no result'),
  (lambda text: text.replace('%carry (b: f32[8,128]) ->', 'carry ='), 'outside of all'),
  (lambda text: text.rstrip().removesuffix('}'), 'no whole program'),
  (lambda text: text.replace('ENTRY ', ''), 'no whole program'),
])
def test_programs_that_are_not_read_whole(change, words):
  """Nothing is left out without a word."""
  assert hlo.parse(TPU)
  with pytest.raises(ValueError, match=words):
    hlo.parse(change(TPU))


def test_programs_of_tpus():
  """A loop by its counter, collectives in pieces once, fused all-reduces of which a slice is kept,
  and memory of one's own, that is none of the traffic."""
  program = hlo.parse(TPU)
  assert program.devices == 4
  assert total(program, (0,) * 4) == {
    'all-gather': (5, 5 * 32 * 128 * 4 * 3 / 4, 0), 'reduce-scatter': (1, 64 * 128 * 4 * 3 / 4, 0)}
  kernels = {k.instruction.name: (k.times, k.moved) for k in hlo.kernels(program)}
  assert kernels['row'] == (5, 2 * 8 * 128 * 4)  # a slice of the rows, not all of them
  assert kernels['first'] == (1, 4)  # read: a number; written: into VMEM


SEND = '''HloModule slices, num_partitions=8

ENTRY %main (g: bf16[16,128]) -> token[] {
  %g = bf16[16,128]{1,0} parameter(0)
  %t = token[] after-all()
  %s = (bf16[16,128]{1,0}, u32[], token[]) send(%g, %t), channel_id=7, is_host_transfer=true, KIND
  ROOT %d = token[] send-done(%s), channel_id=7, is_host_transfer=true
}
'''


@pytest.mark.parametrize('kind, slices, wanted', [
  ('ALL_REDUCE', '{1,2}', ('all-reduce', 4096)), ('ALL_REDUCE', '{1:4}', ('all-reduce', 6144)),
  ('REDUCE_SCATTER', '{1:4}', ('reduce-scatter', 3072)),
  ('ALL_GATHER', '{1:2,5:6}', ('all-gather', 3 * 4096)),
  ('ONE_TO_ONE', '{1,2}', ('collective-permute', 4096)),
])
def test_between_slices(kind, slices, wanted):
  """As libtpu 0.0.42 writes what goes through the hosts."""
  said = (f'frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",'
          f'_xla_megascale_target="{slices}x{{0:3}}",_xla_megascale_transfer_type="{kind}"}}')
  found = total(hlo.parse(SEND.replace('KIND', said)))
  assert found == {wanted[0]: (1, 0, wanted[1])}
  assert total(hlo.parse(SEND.replace(', KIND', ''))) == {}  # what a host reads or prints


def test_memory(mesh):
  """A kernel reads its operands and writes its result; what it slices or updates, that alone."""
  x = jax.ShapeDtypeStruct((N,), 'float32')
  program = lambda f, *args, **options: hlo.parse(
    jax.jit(f, **options).lower(*args).compile().as_text())
  assert hlo.traffic(program(lambda x, y: x + y * 2, x, x)) == 3 * N * 4
  rows, i = jax.ShapeDtypeStruct((64, N), 'float32'), jax.ShapeDtypeStruct((), 'int32')
  sliced = hlo.traffic(program(lambda rows, i: jnp.sin(rows[i]), rows, i))
  assert 2 * N * 4 <= sliced < 3 * N * 4
  update = lambda rows, i, x: jax.lax.dynamic_update_index_in_dim(rows, x * 2, i, 0)
  updated = hlo.traffic(program(update, rows, i, x, donate_argnums=0))
  assert 2 * N * 4 <= updated < 3 * N * 4
  scanned = lambda x: jax.lax.scan(lambda x, _: (jnp.sin(x), x), x, None, length=64)[1]
  moved = hlo.traffic(program(scanned, x))
  assert 64 * 2 * N * 4 < moved < 64 * 8 * N * 4  # no step touches the other rows


def test_no_program():
  with pytest.raises(ValueError, match='entry'):
    hlo.parse('HloModule nothing\n')
  endless = TPU.replace('direction=LT', 'direction=GT')
  with pytest.raises(ValueError, match='loop loop'):
    hlo.collectives(hlo.parse(endless), (0,) * 4)
