"""What the walker says of programs whose traffic is known by hand. The texts are libtpu's, compiled for v5e."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity.hlo.module import parse_shape
from parity.hlo.traffic import traffic_of

TEXTS = Path(__file__).parent / "hlo"
BF16 = 2
SCALARS = 2**15  # of loop counters and slots, a tile each


def traffic(name: str):
    return traffic_of((TEXTS / f"{name}.hlo").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "read", "written"),
    [
        # the weight is copied to VMEM ahead of use: once, whatever XLA's own count says (348 MB)
        ("matmul", (512 * 4096 + 4096 * 8192) * BF16, 512 * 8192 * BF16),
        ("scan", (10 * 4096 * 4096 + 8 * 4096) * BF16, 8 * 4096 * BF16),
        ("while", (7 * 16384 * 16384 + 8 * 16384) * BF16, 8 * 16384 * BF16),
        # a row of each of eight sequences, in tiles of two; never the gigabyte that it is written into
        ("dus", 8 * 1024 * BF16, 8 * 2 * 1024 * BF16),
        ("gather", 64 * 4096 * BF16, 64 * 4096 * BF16),
        ("allreduce", (1024 * 8192 + 8 * 1024) * BF16, 8 * 8192 * BF16),  # a quarter of the rows of a weight
    ],
)
def test_bytes_are_those_counted_by_hand(name, read, written):
    found = traffic(name)
    assert read <= found.read_bytes <= read + max(SCALARS, read // 1000)
    assert found.unknown_loops == []
    assert written <= found.written_bytes <= written + SCALARS
    sent = {"all-reduce": {"count": 1, "bytes": 8 * 8192 * BF16}}
    assert found.collectives == (sent if name == "allreduce" else {})


@pytest.mark.parametrize("kind", ["all-gather", "all-reduce", "reduce-scatter"])
def test_what_a_sparse_core_sends_is_sent(kind):
    """As libtpu writes it for tpu7x: the collective is in a computation that is called, and not waited for."""
    found = traffic(f"sparsecore-{kind}")
    assert {name: one["count"] for name, one in found.collectives.items()} == {kind: 1}
    assert found.collectives[kind]["bytes"] == 8 * 1024 * 4096 * BF16
    assert found.unknown_loops == []


def test_a_loop_is_counted_as_often_as_its_condition_says():
    text = (TEXTS / "while.hlo").read_text(encoding="utf-8")
    once, often = traffic_of(text.replace("constant(7)", "constant(1)")), traffic_of(text)
    weight = 16384 * 16384 * BF16
    assert often.read_bytes - once.read_bytes == pytest.approx(6 * weight, rel=1e-3)


def test_a_loop_of_unknown_length_is_named_and_counted_once():
    text = (TEXTS / "while.hlo").read_text(encoding="utf-8")
    found = traffic_of(
        text.replace("direction=LT", "direction=NE").replace(
            "s32[]{:T(128)} constant(7)", "s32[]{:T(128)} parameter(9)"
        )
    )
    assert found.unknown_loops == ["while"]
    assert found.read_bytes < 1.01 * 16384 * 16384 * BF16


@pytest.mark.parametrize(
    ("shape", "size", "space"),
    [
        ("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048, 0),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048, 1),
        ("f32[3,100]{1,0:T(8,128)}", 8 * 128 * 4, 0),
        ("f32[3,100]{0,1:T(8,128)}", 104 * 128 * 4, 0),
        ("s32[]{:T(128)S(6)}", 512, 6),
        ("u8[4,64]{1,0}", 256, 0),
        ("s4[8,128]{1,0:T(8,128)(8,1)E(4)}", 512, 0),
        ("f8e4m3fn[16]", 16, 0),
    ],
)
def test_an_array_takes_whole_tiles(shape, size, space):
    array = parse_shape(shape)
    assert (array.bytes, array.space) == (size, space)


@pytest.mark.parametrize(("text", "said"), [("", "no ENTRY"), ("ENTRY %a () -> s32[] {\n  nonsense\n}", "line 2")])
def test_what_is_no_module_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        traffic_of(text)


SENT_BESIDE_OTHERS = """HloModule fused, is_scheduled=true

%begun (p.1: bf16[8,128], b.1: bf16[16,128]) -> (bf16[8,128], bf16[16,128]) {
  %p.1 = bf16[8,128]{1,0} parameter(0)
  %b.1 = bf16[16,128]{1,0} parameter(1)
  %gather.1 = bf16[16,128]{1,0} all-gather(%p.1), channel_id=5, dimensions={0}
  ROOT %both.1 = (bf16[8,128]{1,0}, bf16[16,128]{1,0}) tuple(%p.1, %gather.1)
}

%goes_on (p.2: bf16[8,128], b.2: bf16[16,128], x.2: bf16[4,128]) -> (bf16[4,128], bf16[16,128]) {
  %p.2 = bf16[8,128]{1,0} parameter(0)
  %b.2 = bf16[16,128]{1,0} parameter(1)
  %x.2 = bf16[4,128]{1,0} parameter(2)
  %gather.2 = bf16[16,128]{1,0} all-gather(%p.2), channel_id=5, dimensions={0}
  %work.2 = bf16[4,128]{1,0} negate(%x.2)
  ROOT %both.2 = (bf16[4,128]{1,0}, bf16[16,128]{1,0}) tuple(%work.2, %gather.2)
}

ENTRY %main (p: bf16[8,128], b: bf16[16,128], x: bf16[4,128]) -> (bf16[4,128], bf16[16,128]) {
  %p = bf16[8,128]{1,0} parameter(0)
  %b = bf16[16,128]{1,0} parameter(1)
  %x = bf16[4,128]{1,0} parameter(2)
  %first = (bf16[8,128]{1,0}, bf16[16,128]{1,0}) fusion(%p, %b), kind=kCustom, calls=%begun
  %given = bf16[8,128]{1,0} get-tuple-element(%first), index=0
  %made = bf16[16,128]{1,0} get-tuple-element(%first), index=1
  ROOT %second = (bf16[4,128]{1,0}, bf16[16,128]{1,0}) fusion(%given, %made, %x), kind=kCustom, calls=%goes_on
}
"""


def test_what_is_sent_beside_several_fusions_is_sent_once():
    """As libtpu writes what it gathers while other work goes on: once more in every fusion that it goes on beside."""
    found = traffic_of(SENT_BESIDE_OTHERS)
    assert found.collectives == {"all-gather": {"count": 1, "bytes": 16 * 128 * BF16}}
    assert found.read_bytes == (8 + 4) * 128 * BF16
    assert found.written_bytes == (16 + 4) * 128 * BF16


SUMMED_AND_CUT = """HloModule cut, is_scheduled=true

%all-reduce-scatter (p.1: f32[8,128]) -> f32[2,128] {
  %p.1 = f32[8,128]{1,0} parameter(0)
  %sum.1 = f32[8,128]{1,0} all-reduce(%p.1), channel_id=1, to_apply=%add
  %zero.1 = u32[] constant(0)
  ROOT %part.1 = f32[2,128]{1,0} dynamic-slice(%sum.1, %zero.1, %zero.1), dynamic_slice_sizes={2,128}
}

%all-reduce-scatter.1 (p.2: f32[8,128]) -> f32[2,128] {
  %p.2 = f32[8,128]{1,0} parameter(0)
  %sum.2 = f32[8,128]{1,0} all-reduce(%p.2), channel_id=1, to_apply=%add
  %zero.2 = u32[] constant(0)
  ROOT %part.2 = f32[2,128]{1,0} dynamic-slice(%sum.2, %zero.2, %zero.2), dynamic_slice_sizes={2,128}
}

ENTRY %main (p: f32[8,128], q: f32[8,128]) -> (f32[2,128], f32[2,128]) {
  %p = f32[8,128]{1,0} parameter(0)
  %q = f32[8,128]{1,0} parameter(1)
  %first = f32[2,128]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter
  %second = f32[2,128]{1,0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %both = (f32[2,128]{1,0}, f32[2,128]{1,0}) tuple(%first, %second)
}
"""


def test_sums_of_which_parts_are_kept_are_sent_each():
    """libtpu gives all of them one channel, as it does what goes on beside several fusions."""
    found = traffic_of(SUMMED_AND_CUT)
    assert found.collectives == {"all-reduce": {"count": 2, "bytes": 2 * 8 * 128 * 4}}


# two devices hold both heads of keys and values, and the queries of each ask for one
OF_SOME_HEADS = """HloModule held, is_scheduled=true

ENTRY %main (q: f32[8,1,8,128], k: bf16[8,2,1024,128], v: bf16[8,2,1024,128]) -> f32[8,1,8,128] {
  %q = f32[8,1,8,128]{3,2,1,0:T(8,128)} parameter(0)
  %k = bf16[8,2,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %v = bf16[8,2,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(2)
  ROOT %NAME.1 = f32[8,1,8,128]{3,2,1,0:T(8,128)} custom-call(%q, %k, %v), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"","cost_estimate":{"flops":"1","bytes_accessed":"STATED"}}}
}
"""


def test_of_a_cache_the_kernel_over_it_reads_what_it_says_and_any_other_all():
    one_head, queries = 8 * 1024 * 128 * BF16, 8 * 8 * 128 * 4
    stated = 2 * one_head + 2 * queries
    ours, other = (
        traffic_of(OF_SOME_HEADS.replace("NAME", name).replace("STATED", str(stated)))
        for name in ("attend_held", "somebody_elses")
    )
    assert (ours.read_bytes, ours.written_bytes) == (stated, queries)
    assert (other.read_bytes, other.written_bytes) == (4 * one_head + queries, queries)
    assert ours.heaviest["attend_held.1"] == stated + queries
    more = traffic_of(OF_SOME_HEADS.replace("NAME", "attend_held").replace("STATED", str(10**9)))
    assert more.read_bytes == other.read_bytes  # what lies in VMEM is stated, too


OTHER_TILES = """HloModule tiles, is_scheduled=true

%other_tiles (input: bf16[20,4096,4096]) -> bf16[20,4096,4096] {
  %input = bf16[20,4096,4096]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %copy = bf16[20,4096,4096]{2,1,0:T(8,128)(2,1)} copy(%input)
}

%layer (stack: bf16[20,4096,4096], index: s32[]) -> bf16[1,4096,4096] {
  %stack = bf16[20,4096,4096]{2,1,0:T(16,128)(2,1)} parameter(0)
  %index = s32[]{:T(128)S(6)} parameter(1)
  %viewed = bf16[20,4096,4096]{2,1,0:T(8,128)(2,1)} fusion(%stack), kind=kLoop, ALIASING calls=%other_tiles
  ROOT %slice = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)} dynamic-slice(%viewed, %index, %index, %index), dynamic_slice_sizes={1,4096,4096}
}

ENTRY %main (stack.0: bf16[20,4096,4096], index.0: s32[]) -> bf16[1,4096,4096] {
  %stack.0 = bf16[20,4096,4096]{2,1,0:T(16,128)(2,1)} parameter(0)
  %index.0 = s32[]{:T(128)S(6)} parameter(1)
  ROOT %one = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)} fusion(%stack.0, %index.0), kind=kLoop, calls=%layer
}
"""  # noqa: E501


@pytest.mark.parametrize("aliasing", ["output_to_operand_aliasing={{}: (0, {})},", ""])
def test_a_copy_that_is_its_operands_own_memory_is_sliced_and_not_read_whole(aliasing):
    """As libtpu writes a layer of a stack for tpu7x; a copy that says nothing of the kind is one."""
    found = traffic_of(OTHER_TILES.replace("ALIASING", aliasing))
    layers = 1 if aliasing else 20
    assert (found.read_bytes, found.written_bytes) == (layers * 4096 * 4096 * BF16, 4096 * 4096 * BF16)


COUNTED = """HloModule counted

ENTRY %main () -> (s32[67108864], s32[1024]) {
  %far = s32[67108864]{0:T(1024)} iota(), iota_dimension=0
  %near = s32[1024]{0:T(1024)S(1)} iota(), iota_dimension=0
  ROOT %both = (s32[67108864]{0:T(1024)}, s32[1024]{0:T(1024)S(1)}) tuple(%far, %near)
}
"""


def test_numbers_that_are_counted_into_hbm_are_written():
    found = traffic_of(COUNTED)
    assert (found.read_bytes, found.written_bytes) == (0, 4 * 67108864)
