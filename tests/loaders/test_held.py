"""What processes of a mesh hold: together everything, and of gated delta nets value heads with their key heads."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from loaders import open_checkpoint
from loaders.reading.held import Held, in_blocks
from loaders.reading.plan import plan_load
from loaders.stage import Stage
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint

MESHES = [{"tensor": 2}, {"expert": 2}, {"expert": 2, "tensor": 2}, {"expert": 2, "tensor": 4}]
CODES = [
    ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 24}),
    ("qwen3-moe", {"num_experts": 4, "intermediate_size": 96, "moe_intermediate_size": 96}),
    ("qwen3_5", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 24}),
    ("qwen3_5-moe", {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_value_head_dim": 16}),
]
HEADS = [(2, 6), (4, 4), (4, 8), (3, 6), (8, 16)]


def at(box):
    return tuple(slice(*ends) for ends in box)


def places(sizes):
    return [dict(zip(sizes, place, strict=True)) for place in product(*map(range, sizes.values()))]


@pytest.fixture(scope="module", params=HEADS, ids=str)
def plan(request, tmp_path_factory):
    keys, values = request.param
    sizes = {"linear_num_key_heads": keys, "linear_num_value_heads": values}
    return plan_load(
        open_checkpoint(make_checkpoint("qwen3_5-moe", tmp_path_factory.mktemp("it") / "it", **sizes)), Stage()
    )


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_value_is_held_as_often_as_all_others_of_its_parameter(sizes, plan):
    dims = plan.checkpoint.config.dims()
    for spec in plan.specs:
        times = np.zeros(spec.shape, int)
        for place in places(sizes):
            for box in Held(sizes, place, dims).boxes(spec):
                times[at(box)] += 1
        assert times.min() == times.max(), spec.name


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_value_heads_lie_with_their_key_heads(sizes, plan):
    config = plan.checkpoint.config
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    key_of = np.repeat(np.arange(keys), config.linear_key_head_dim)
    head_of = np.concatenate([key_of, key_of, np.repeat(np.arange(values), config.linear_value_head_dim)])
    kind_of = np.repeat(["q", "k", "v"], [config.key_dim, config.key_dim, config.value_dim])
    specs = {spec.name.partition("linear_attn.")[2]: spec for spec in plan.specs if ".layers.0." in spec.name}
    expected = math.gcd(keys, math.prod(sizes.values()))
    held = [Held(sizes, place, config.dims()) for place in places(sizes)]
    for one in held:
        channels = np.concatenate([np.arange(*box[0]) for box in one.boxes(specs["in_proj_qkv.weight"])])
        assert [box[0] for box in one.boxes(specs["conv1d.weight"])] == [
            box[0] for box in one.boxes(specs["in_proj_qkv.weight"])
        ]
        kinds, counts = np.unique(kind_of[channels], return_counts=True)
        assert dict(zip(kinds, counts, strict=True)) == dict(zip("qkv", one.segments("QKV"), strict=True))
        heads = {kind: list(dict.fromkeys(head_of[channels][kind_of[channels] == kind])) for kind in "qkv"}
        ((first, last),) = one.boxes(specs["A_log"])[0]
        assert heads["v"] == list(range(first, last))
        assert heads["q"] == heads["k"] == list(dict.fromkeys(head * keys // values for head in heads["v"]))
        assert one.boxes(specs["out_proj.weight"])[0][1] == (
            first * config.linear_value_head_dim,
            last * config.linear_value_head_dim,
        )
        assert one.shape(("B", "LN", "P", "Y"), (1, values, 5, 7)) == (1, last - first, 5, 7)
        assert one.shape(("B", "W", "QKV"), (1, 3, len(head_of))) == (1, 3, len(channels))
        assert len(heads["k"]) * expected == keys


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize(("name", "changes"), CODES)
def test_codes_are_cut_between_blocks_and_what_layers_hand_on_as_they_take_it(name, changes, sizes, tmp_path):
    changes = block_sizes(name) | changes | {"quantization": ZooQuantization(activations=False)}
    plan = plan_load(open_checkpoint(make_checkpoint(name, tmp_path / "it", **changes)), Stage())
    for place in places(sizes):
        held = Held(sizes, place, plan.checkpoint.config.dims(), in_blocks(plan.specs))
        parts: dict[str, set[tuple[int, ...]]] = {}
        for spec in plan.specs:
            for axis, size, cut, ends in zip(spec.axes, spec.shape, held.cuts(spec), held.boxes(spec)[0], strict=True):
                letter, _, parts_of = axis.partition("/")
                if cut is not None and letter not in ("QKV", "E", "V"):
                    of_all = (end * int(parts_of or 1) for end in ends)  # the elements that codes or scales are of
                    parts.setdefault(letter, set()).add(tuple(of_all))
                assert parts_of != "2" or all(end % 8 == 0 or end == size for end in ends), spec.name
        assert {letter: len(found) for letter, found in parts.items()} == dict.fromkeys(parts, 1)
        parts |= {"NH": {(one[0] // 2, one[1] // 2) for one in parts["N2H"]} | parts["NH"]} if "N2H" in parts else {}
        assert ("KH" in parts) == ("NH" in parts)
        whole = {axis for spec in plan.specs for axis, cut in zip(spec.axes, held.cuts(spec), strict=True) if not cut}
        assert not {axis.partition("/")[0] for axis in whole if "/" in axis} & set(parts)  # one whole, the other not


@pytest.mark.parametrize("sizes", [*MESHES, {"tensor": 4}, {"expert": 4, "tensor": 2}, {"tensor": 3}], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(6, 3), (8, 2), (8, 4), (16, 2), (12, 4), (9, 3), (8, 1)])
def test_query_heads_have_the_keys_they_ask_for_and_no_others_are_kept(queries, keys, sizes, tmp_path):
    changes = {"num_attention_heads": queries, "num_key_value_heads": keys, "num_hidden_layers": 1}
    plan = plan_load(open_checkpoint(make_checkpoint("qwen3", tmp_path / "it", **changes)), Stage())
    config, specs = plan.checkpoint.config, {spec.name.rpartition("attn.")[2]: spec for spec in plan.specs}
    size = config.dims()["H"].size
    for place in places(sizes):
        held = Held(sizes, place, config.dims(), in_blocks(plan.specs))
        own, there = (
            [head // size for head in range(*held.boxes(specs[f"{name}_proj.weight"])[0][0])[::size]] for name in "qk"
        )
        asked = held.asked()
        kept = there[asked.heads]
        assert np.repeat(kept, asked.queries).tolist() == [head // (queries // keys) for head in own]
        assert asked.is_even == (len(own) % len(kept) == 0 and set(asked.queries) == {len(own) // len(kept)})
        assert held.shape(("B", "KH", "S", "H"), (2, keys, 7, size)) == (2, len(kept), 7, size)
