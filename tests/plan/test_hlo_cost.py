"""Tests what compiled programs move: known amounts on eight devices, and texts from the TPU compiler."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sgpo_jax import sharding
from sgpo_jax.plan import gpus, hardware, hlo, hlo_cost
from sgpo_jax.plan.hlo_cost import Collective
from sgpo_jax.plan.phases import Scopes

ROWS, COLUMNS, LAYERS = 16, 32, 5
SCOPES = Scopes("rest", (("steps", "steps"),), (("steps/while$", 7.0),))


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile().as_text()


@pytest.fixture(scope="module")
def summed():
    """A sum over all eight devices of f32[16,32], in a scan of 5 inside a loop whose count is traced."""
    mesh = sharding.make_mesh(8, 1, 1)

    def local(x):
        return jax.lax.scan(lambda x, _: (jax.lax.psum(jnp.sin(x), "data"), None), x, None, length=LAYERS)[0]

    spec = P("data")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)

    def program(x, count):
        with jax.named_scope("steps"):
            return jax.lax.fori_loop(0, count, lambda _, x: sharded(x), x)

    x = jax.ShapeDtypeStruct((8 * ROWS, COLUMNS), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    return compiled(program, x, jax.ShapeDtypeStruct((), jnp.int32))


@pytest.mark.parametrize("stated", [True, False], ids=["with known_trip_count", "by the loop's condition"])
def test_all_reduces_in_loops(summed, stated):
    text = summed if stated else re.sub(r'"known_trip_count":\{[^}]*\},?', "", summed)
    assert stated == ("known_trip_count" in text)
    collectives = hlo_cost.collectives(hlo.parse(text), SCOPES)
    assert collectives == [Collective("all-reduce", "steps", 4 * ROWS * COLUMNS, 8, LAYERS * 7.0)]


def test_a_loop_of_which_nothing_is_known_is_refused(summed):
    with pytest.raises(ValueError, match=r"loop jit\(program\)/steps/while: neither the program nor Scopes.trips"):
        hlo_cost.collectives(hlo.parse(summed), Scopes("rest"))


def test_a_split_weight_is_gathered():
    mesh = sharding.make_mesh(1, 4, 2)
    x = jax.ShapeDtypeStruct((8, COLUMNS), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    w = jax.ShapeDtypeStruct((COLUMNS, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    collectives = hlo_cost.collectives(hlo.parse(compiled(jnp.dot, x, w)), Scopes("all"))
    assert collectives == [Collective("all-gather", "all", 4 * COLUMNS * 64, 4, 1.0)]


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-gather", 75), ("all-reduce", 150), ("reduce-scatter", 300), ("all-to-all", 75), ("collective-permute", 100)],
)
def test_bytes_sent_round_a_ring_of_four(kind, sent):
    # Of results of 100 bytes; those of a reduce-scatter come from operands of 400.
    assert Collective(kind, "", 100, 4, 1.0).sent == pytest.approx(sent)


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("replica_groups={}", 16),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=4], device_ids=([4,4]T(1,0)) {'axis_0','axis_1'}", 16),
        ("source_target_pairs={{0,1},{1,0}}", 2),
    ],
)
def test_how_many_take_part(groups, devices):
    (collective,) = hlo_cost.collectives(hlo.parse(one_sum(groups)), Scopes("all"))
    assert (collective.devices, collective.bytes, collective.times) == (devices, 16, 1.0)


def one_sum(groups):
    """A program of sixteen devices with one collective."""
    return f"""HloModule m, num_partitions=16

ENTRY %main (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %r = f32[4]{{0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add
}}
"""


@pytest.mark.parametrize(
    ("groups", "hosts", "network"),
    [
        # Within hosts of four; across two, one device of each; across all four, all of each.
        ("replica_groups=[4,4]<=[16]", 1, 0),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7},{8,12},{9,13},{10,14},{11,15}}", 2, 16),
        ("replica_groups=[1,16]<=[16]", 4, 2 * 16 * 15 / 16 / 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}", 1, 0),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_0'}", 4, 2 * 16 * 3 / 4),
        # The axes of the mesh are counted the other way round.
        ("replica_groups=mesh['axis_0'=4,'axis_1'=4], device_ids=([4,4]T(1,0)) {'axis_0'}", 1, 0),
        # Two devices of each of four hosts share what leaves a host.
        ("replica_groups=[2,8]<=[4,2,2]T(2,0,1)", 4, 2 * 16 * 7 / 8 / 2),
    ],
)
def test_what_leaves_a_host_of_four(groups, hosts, network):
    (collective,) = hlo_cost.collectives(hlo.parse(one_sum(groups)), Scopes("all"), per_host=4)
    assert (collective.hosts, collective.sent_to_hosts) == (hosts, pytest.approx(network))


def test_an_all_to_all_sends_to_every_host_alike():
    # 100 bytes for eight devices in four hosts: three quarters are for other hosts.
    assert Collective("all-to-all", "", 100, 8, 1.0, 4).sent_to_hosts == 75


def test_groups_in_an_unknown_notation_are_refused():
    with pytest.raises(ValueError, match="r: the groups of this collective are written in an unknown way: <<0,1>>"):
        hlo_cost.collectives(hlo.parse(one_sum("replica_groups=<<0,1>>")), Scopes("all"))


# A gather that starts before a product, runs beside it, and ends after it; and one that is plain. The compiler writes an
# all-gather in each of the three fusions, all with channel 1.
ASYNCHRONOUS = """HloModule jit_f, is_scheduled=true, num_partitions=4

%start (p: bf16[256,1024]) -> (bf16[256,1024], bf16[1024,1024], u32[]) {
  %p = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %g = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %c = (bf16[256,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (a: bf16[8,1024], w: bf16[1024,1024], p.1: bf16[256,1024], g.1: bf16[1024,1024]) -> (bf16[8,1024], bf16[256,1024], bf16[1024,1024]) {
  %a = bf16[8,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %p.1 = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(2)
  %g.1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(3)
  %piece = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %d = bf16[8,1024]{1,0:T(8,128)(2,1)} convolution(%a, %w), dim_labels=bf_io->bf
  ROOT %t = (bf16[8,1024]{1,0:T(8,128)(2,1)}, bf16[256,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}) tuple(%d, %p.1, %piece)
}

%done (p.2: bf16[256,1024], g.2: bf16[1024,1024]) -> bf16[1024,1024] {
  %p.2 = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %g.2 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %g.3 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %c.1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} custom-call(%p.2, %g.2, %g.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[8,1024], v: bf16[1024,1024], q: bf16[256,1024]) -> bf16[1024,1024] {
  %x = bf16[8,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %v = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %q = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(2)
  %s = (bf16[256,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%q), kind=kCustom, calls=%start
  %s.0 = bf16[256,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=0
  %s.1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %f = (bf16[8,1024]{1,0:T(8,128)(2,1)}, bf16[256,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}) fusion(%x, %v, %s.0, %s.1), kind=kOutput, calls=%async_collective_fusion.1
  %f.1 = bf16[256,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%f), index=1
  %f.2 = bf16[1024,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%f), index=2
  %e = bf16[1024,1024]{1,0:T(8,128)(2,1)} fusion(%f.1, %f.2), kind=kCustom, calls=%done
  ROOT %h = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
}
"""
WEIGHT = 2 * 1024 * 1024


def test_an_asynchronous_gather_counts_once():
    collectives = hlo_cost.collectives(hlo.parse(ASYNCHRONOUS), Scopes("all"))
    assert collectives == [Collective("all-gather", "all", WEIGHT, 4, 2.0)]


def test_an_asynchronous_gather_moves_its_bytes_where_it_starts():
    gathers = 2 * (WEIGHT / 4 + WEIGHT)
    product = WEIGHT + 2 * (2 * 8 * 1024)
    assert hlo_cost.hbm_bytes(hlo.parse(ASYNCHRONOUS), Scopes("all")) == {"all": gathers + product}


# A layer loop as the compiler writes it: a slice of stacked weights is copied to memory on the core, multiplied there, and
# a row is written into a cache in place.
LAYERS_LOOP = """HloModule jit_f, is_scheduled=true, num_partitions=4

%slice_fusion (s: bf16[3,1024,1024], l: s32[]) -> bf16[1,1024,1024] {
  %s = bf16[3,1024,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %l = s32[]{:T(128)} parameter(1)
  %z = s32[]{:T(128)} constant(0)
  ROOT %d = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} dynamic-slice(%s, %l, %z, %z), dynamic_slice_sizes={1,1024,1024}
}

%write_fusion (c: bf16[64,1024], r: bf16[1,1024], l.1: s32[]) -> bf16[64,1024] {
  %c = bf16[64,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %r = bf16[1,1024]{1,0:T(2,128)(2,1)} parameter(1)
  %l.1 = s32[]{:T(128)} parameter(2)
  %z.1 = s32[]{:T(128)} constant(0)
  ROOT %u = bf16[64,1024]{1,0:T(8,128)(2,1)} dynamic-update-slice(%c, %r, %l.1, %z.1)
}

%body (t: (s32[], bf16[8,1024], bf16[3,1024,1024], bf16[64,1024])) -> (s32[], bf16[8,1024], bf16[3,1024,1024], bf16[64,1024]) {
  %t = (s32[]{:T(128)}, bf16[8,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[3,1024,1024]{2,1,0:T(8,128)(2,1)}, bf16[64,1024]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  %x = bf16[8,1024]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%t), index=1
  %w = bf16[3,1024,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=2
  %k = bf16[64,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=3
  %v = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)S(1)} fusion(%w, %i), kind=kLoop, calls=%slice_fusion
  %y = bf16[8,1024]{1,0:T(8,128)(2,1)S(1)} convolution(%x, %v), dim_labels=bf_io->bf
  %m = bf16[1,1024]{1,0:T(2,128)(2,1)S(1)} custom-call(%k, %y), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/kernel"}
  %n = bf16[64,1024]{1,0:T(8,128)(2,1)} fusion(%k, %m, %i), kind=kLoop, calls=%write_fusion
  %one = s32[]{:T(128)S(6)} constant(1)
  %j = s32[]{:T(128)S(6)} add(%i, %one)
  ROOT %o = (s32[]{:T(128)}, bf16[8,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[3,1024,1024]{2,1,0:T(8,128)(2,1)}, bf16[64,1024]{1,0:T(8,128)(2,1)}) tuple(%j, %y, %w, %n)
}

%cond (t.1: (s32[], bf16[8,1024], bf16[3,1024,1024], bf16[64,1024])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, bf16[8,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[3,1024,1024]{2,1,0:T(8,128)(2,1)}, bf16[64,1024]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)S(6)} get-tuple-element(%t.1), index=0
  %three = s32[]{:T(128)S(6)} constant(3)
  ROOT %lt = pred[]{:T(512)S(6)} compare(%i.1, %three), direction=LT
}

ENTRY %main (x.1: bf16[8,1024], w.1: bf16[3,1024,1024], k.1: bf16[64,1024]) -> bf16[64,1024] {
  %x.1 = bf16[8,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %w.1 = bf16[3,1024,1024]{2,1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="weights"}
  %k.1 = bf16[64,1024]{1,0:T(8,128)(2,1)} parameter(2), metadata={op_name="cache"}
  %zero = s32[]{:T(128)S(6)} constant(0)
  %b = (s32[]{:T(128)}, bf16[8,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[3,1024,1024]{2,1,0:T(8,128)(2,1)}, bf16[64,1024]{1,0:T(8,128)(2,1)}) tuple(%zero, %x.1, %w.1, %k.1)
  %loop = (s32[]{:T(128)}, bf16[8,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[3,1024,1024]{2,1,0:T(8,128)(2,1)}, bf16[64,1024]{1,0:T(8,128)(2,1)}) while(%b), condition=%cond, body=%body, metadata={op_name="jit(f)/layers/while"}
  ROOT %g = bf16[64,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=3
}
"""


def test_a_loop_reads_each_slice_once_and_writes_in_place():
    # In each of three layers: one matrix, the whole cache by the kernel, and a row of it, of which only the write is HBM.
    scopes = Scopes("rest", (("kernel", "kernel"), ("layers", "layers")))
    row = 2 * 2 * 1024  # padded to two
    assert hlo_cost.hbm_bytes(hlo.parse(LAYERS_LOOP), scopes) == {
        "rest": 0.0, "layers": 3 * (WEIGHT + row), "kernel": 3 * (2 * 64 * 1024),
    }  # fmt: skip


def test_a_slice_of_what_has_another_tiling_where_it_lies_is_still_a_slice():
    # As the compiler writes it for a stack of int8 that a product reads.
    copy = """%tiles (a: bf16[3,1024,1024]) -> bf16[3,1024,1024] {
  %a = bf16[3,1024,1024]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %e = bf16[3,1024,1024]{2,1,0:T(8,128)(2,1)} copy(%a)
}

%slice_fusion"""
    tiled = """%q = bf16[3,1024,1024]{2,1,0:T(8,128)(2,1)} fusion(%s), kind=kLoop, ALIAS, calls=%tiles
  ROOT %d = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} dynamic-slice(%q, """
    text = LAYERS_LOOP.replace("%slice_fusion", copy, 1)
    text = text.replace("ROOT %d = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} dynamic-slice(%s, ", tiled)
    scopes = Scopes("all", reads=(("kernel", 0.0),))
    row = 2 * 2 * 1024
    for alias, stacked in (("output_to_operand_aliasing={{}: (0, {})}", 1), ("op=1", 3)):
        moved = hlo_cost.hbm_bytes(hlo.parse(text.replace("ALIAS", alias)), scopes)
        assert moved == {"all": 3 * (stacked * WEIGHT + row)}, "a copy that is made reads the whole stack"


def test_a_kernel_may_read_less_than_it_is_given():
    moved = hlo_cost.hbm_bytes(hlo.parse(LAYERS_LOOP), Scopes("all", reads=(("kernel", 100.0),)))
    assert moved == {"all": 3 * (WEIGHT + 2 * 2 * 1024 + 100)}


def test_a_kernel_may_read_one_entry_of_a_stack():
    moved = hlo_cost.hbm_bytes(hlo.parse(LAYERS_LOOP), Scopes("all", entries=(("kernel", 64),)))
    assert moved == {"all": 3 * (WEIGHT + 2 * 2 * 1024 + 2 * 1024)}  # a row of the cache


def test_the_largest_arrays():
    # Not what is in memory on the core, and not the slices there.
    assert hlo_cost.largest(hlo.parse(LAYERS_LOOP), 2) == [
        (3 * WEIGHT, "bf16[3,1024,1024]", "argument weights"),
        (2 * 64 * 1024, "bf16[64,1024]", "argument cache"),
    ]


@pytest.mark.parametrize(
    ("array", "size"),
    [
        ("f32[2,3]{1,0}", 24),
        ("f32[2,3]{1,0:T(8,128)}", 4 * 8 * 128),
        ("f32[2,3]{0,1:T(8,128)}", 4 * 128 * 8),
        ("f32[130,2]{0,1:T(2,128)}", 4 * 2 * 256),
        ("bf16[5,1,128]{2,0,1:T(8,128)(2,1)}", 2 * 8 * 128),
        ("s32[]{:T(128)}", 512),
        ("s32[]", 4),
        ("pred[100]{0:T(512)}", 512),
        ("s4[7]{0}", 4),
        ("f8e4m3fn[6]{0}", 6),
    ],
)
def test_bytes_with_the_padding_of_the_layout(array, size):
    text = f"HloModule m\n\nENTRY %main (p: f32[4]) -> f32[4] {{\n  ROOT %p = {array} parameter(0)\n}}\n"
    (parsed,) = hlo.parse(text).computations["main"].root.arrays
    assert parsed.bytes == size


# ---- GPUs

LAYERS_GPU, ROWS_GPU, SLOTS, WIDTH = 4, 8, 64, 512  # of a device: rows of a cache with SLOTS slots, of WIDTH numbers


def gpu_step(text):
    """What a step moves on each of two hosts with four H100: (collectives, bytes of HBM).

    In a scan over layers a weight is gathered over four devices, two of each host; a product is gathered over two of a
    host, and written into a slot of each row of the layer's cache.
    """
    module = hlo.parse(text)
    return hlo_cost.collectives(module, Scopes("all"), per_host=4), hlo_cost.hbm_bytes(module, Scopes("all"))


def test_hand_count_of_a_program_for_gpus():
    """The text is of jaxlib 0.10.2, without what does not matter here."""
    collectives, moved = gpu_step((Path(__file__).parent / "h100_2x4.hlo").read_text())
    weight, product = 2 * WIDTH * WIDTH // 2, 4 * ROWS_GPU * WIDTH
    gathers = [
        Collective("all-gather", "all", weight, 4, float(LAYERS_GPU), 2),
        Collective("all-gather", "all", product, 2, float(LAYERS_GPU), 1),
    ]
    assert collectives == gathers
    assert [gather.sent_to_hosts for gather in gathers] == [weight * 3 / 4 / 2, 0]
    row = 2 * ROWS_GPU * WIDTH
    layer = (
        2 * weight / 4  # the layer's part of the weight is copied out of the stack
        + weight / 4 + weight  # and gathered
        + weight + row + 8 * product / 2  # the product, whose eight parts are added up afterwards
        + 8 * product / 2 + product / 2
        + product / 2 + product  # gathered
        + product + 2 * row  # written as the next input and, in another layout, for the cache
        + 2 * row  # written into the cache in place: only the rows
    )  # fmt: skip
    around = 4 * row  # the first input, read and written in two layouts
    # The rest are counters and indices.
    assert LAYERS_GPU * layer + around <= moved["all"] <= LAYERS_GPU * layer + around + 1000


def test_the_scratch_memory_of_a_product_is_not_traffic():
    text = """HloModule m

ENTRY %main (x: bf16[64,64], y: bf16[64,64]) -> (bf16[64,64], s8[4096]) {
  %x = bf16[64,64]{1,0} parameter(0)
  %y = bf16[64,64]{1,0} parameter(1)
  ROOT %p = (bf16[64,64]{1,0}, s8[4096]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm"
}
"""
    assert hlo_cost.hbm_bytes(hlo.parse(text), Scopes("all")) == {"all": 3 * 2 * 64 * 64}
    assert hlo_cost.workspace(hlo.parse(text)) == 4096


def test_attention_of_cudnn_is_refused():
    text = """HloModule m

ENTRY %main (x: bf16[64,64]) -> bf16[64,64] {
  %x = bf16[64,64]{1,0} parameter(0)
  ROOT %p = bf16[64,64]{1,0} custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="layer/attend"}
}
"""
    with pytest.raises(ValueError, match="layer/attend: cuDNN's attention takes memory that is known only on a card"):
        hlo_cost.workspace(hlo.parse(text))


@pytest.fixture(scope="module")
def h100():
    """Eight absent H100 in two hosts."""
    if not any(importlib.util.find_spec(name) for name in gpus.PLUGINS):
        pytest.skip("needs XLA's compiler for GPUs: pip install -e '.[gpu-compiler]'")
    jax.config.update("jax_enable_compilation_cache", False)
    return hardware.topology("h100:2x4")[1]


def test_the_hand_count_holds_for_a_program_that_is_compiled_here(h100):
    mesh = sharding.make_mesh(1, 4, 2, devices=h100)

    def step(x, weights, cache, slots):
        def layer(carry, number):
            x, cache = carry
            x = jnp.dot(x, weights[number], preferred_element_type=jnp.float32)
            x = sharding.constrain(jnp.tanh(x).astype(jnp.bfloat16), "fsdp", None)
            return (x, cache.at[number, jnp.arange(len(x)), slots].set(x, mode="drop", unique_indices=True)), None

        return jax.lax.scan(layer, (x, cache), jnp.arange(LAYERS_GPU))[0]

    def on(*sizes, spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    rows = 4 * ROWS_GPU
    arguments = (
        on(rows, WIDTH, spec=P("fsdp")), on(LAYERS_GPU, WIDTH, WIDTH, spec=P(None, "fsdp", "tensor")),
        on(LAYERS_GPU, rows, SLOTS, WIDTH, spec=P(None, "fsdp")), on(rows, spec=P("fsdp"), dtype=jnp.int32),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        text = jax.jit(step, donate_argnums=2).lower(*arguments).compile().as_text()
    collectives, moved = gpu_step(text)
    weight = 2 * WIDTH * WIDTH // 2
    assert Collective("all-gather", "all", weight, 4, float(LAYERS_GPU), 2) in collectives
    # Far below one pass over the cache, 2 MiB a layer, and above reading the gathered weights.
    assert LAYERS_GPU * 2 * weight <= moved["all"] <= LAYERS_GPU * 8 * weight


def test_the_branches_of_a_choice_count_by_their_shares():
    def choose(flag, x):
        with jax.named_scope("choice"):
            return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x, x)

    module = hlo.parse(compiled(choose, jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((64, 64), np.float32)))
    moved = [
        hlo_cost.hbm_bytes(module, Scopes("all", branches=(("choice", shares),)))["all"] for shares in ((1, 0), (0, 1))
    ]
    both = hlo_cost.hbm_bytes(module, Scopes("all"))["all"]
    half = hlo_cost.hbm_bytes(module, Scopes("all", branches=(("choice", (0.5, 0.5)),)))["all"]
    assert moved[1] - moved[0] >= 4 * 64 * 64 * 4 and half == sum(moved) / 2 <= both
