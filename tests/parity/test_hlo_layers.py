"""Whose layer a program's traffic is, of a program whose answer is known by hand."""

from __future__ import annotations

import re

from parity.hlo.layers import OUTSIDE, traffic_by_layer

BLOCK = "bf16[128,128]{1,0:T(8,128)(2,1)}"
SIZE = 128 * 128 * 2
# two layers, each a weight and a cache: the second weight is fetched ahead of the first product, the second cache is
# updated in VMEM and written back, the head is no layer's
TEXT = f"""HloModule jit__decode, is_scheduled=true

ENTRY %main (p.0: bf16[128,128], p.1: bf16[128,128]) -> bf16[128,128] {{
  %ids = {BLOCK} parameter(0), metadata={{op_name="inputs"}}
  %w0 = {BLOCK} parameter(1), metadata={{op_name="weights[\\'model\\'][\\'layers\\'][\\'0\\'][\\'weight\\']"}}
  %w1 = {BLOCK} parameter(2), metadata={{op_name="weights[\\'model\\'][\\'layers\\'][\\'1\\'][\\'weight\\']"}}
  %kept = {BLOCK} parameter(3), metadata={{op_name="cache.layers[\\'1\\'][\\'key\\']"}}
  %head = {BLOCK} parameter(4), metadata={{op_name="weights[\\'lm_head\\'][\\'weight\\']"}}
  %ahead = ({BLOCK[:-1]}S(1)}}, {BLOCK}, u32[]{{:S(2)}}) copy-start(%w1)
  %x = {BLOCK} add(%ids, %ids)
  %first = {BLOCK} add(%x, %w0)
  %there = {BLOCK[:-1]}S(1)}} copy-done(%ahead)
  %second = {BLOCK} add(%first, %there)
  %changed = {BLOCK[:-1]}S(1)}} add(%second, %kept)
  %back = ({BLOCK}, {BLOCK[:-1]}S(1)}}, u32[]{{:S(2)}}) copy-start(%changed)
  %all-reduce = {BLOCK} all-reduce(%second), to_apply=%add
  ROOT %out = {BLOCK} add(%all-reduce, %head)
}}
"""


def layer_of(source: str) -> int | None:
    found = re.search(r"layers'?\]?\['(\d+)'\]", source)
    return int(found[1]) if found else None


def test_what_needs_a_layer_is_its_own_wherever_it_runs():
    found = traffic_by_layer(TEXT, layer_of)
    assert sorted(found) == [OUTSIDE, 0, 1]
    moved = {layer: (one.read_bytes // SIZE, one.written_bytes // SIZE) for layer, one in found.items()}
    assert moved[OUTSIDE] == (2, 1)  # both operands of x
    assert moved[0] == (2, 1)
    # fetched, added to the first, added to the cache, written back, summed, and the head behind it
    assert moved[1] == (1 + 1 + 2 + 0 + 1 + 2, 0 + 1 + 0 + 1 + 1 + 1)
    assert found[1].collectives == {"all-reduce": {"count": 1, "bytes": SIZE}}
    assert not found[0].collectives
