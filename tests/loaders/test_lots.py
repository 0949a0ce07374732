"""What is read in one lot: parts that belong together, in file order, and no more than the largest of them is."""

from __future__ import annotations

import numpy as np
import pytest

from loaders import open_checkpoint
from loaders.quantization.quantize import quantized
from loaders.reading.lots import Unit, lots_of, stream_parameters
from loaders.reading.plan import plan_load
from loaders.stage import Stage
from parity.zoo import block_sizes, make_checkpoint


def one_by_one(names):
    return [Unit({name}, {name}) for name in names]


def test_lots_are_in_file_order_and_no_larger_than_the_largest_part():
    found = {"a": 3, "b": 1, "c": 10, "d": 5, "e": 5, "f": 1}
    assert list(lots_of(one_by_one("fedcba"), found)) == [{"a", "b"}, {"c"}, {"d", "e"}, {"f"}]


def test_parts_that_share_a_key_are_one():
    parts = [Unit({"a"}, {"x"}), Unit({"c"}, {"y"}), Unit({"b"}, {"z"}), Unit({"d"}, {"x", "y"})]
    assert list(lots_of(parts, {"a": 1, "b": 3, "c": 1, "d": 1})) == [{"a", "c", "d"}, {"b"}]


def test_of_nothing_there_are_no_lots():
    assert list(lots_of([], {})) == []


def in_flight(plan):
    """The most bytes of parameters that are begun and not complete, while a plan is read."""
    sizes = {
        spec.name: sum(plan.checkpoint.tensors[s.tensor].num_bytes for s in spec.placements) for spec in plan.specs
    }
    missing = {spec.name: len(spec.placements) for spec in plan.specs}
    begun: set[str] = set()
    most = 0

    def into(name):
        nonlocal most
        if name in plan.targets:
            begun.add(plan.targets[name][0].name)
        most = max(most, sum(sizes[one] for one in begun))

    seen = []
    for name, _ in stream_parameters(plan, into):
        seen.append(name)
        spec, _ = plan.targets[name]
        missing[spec.name] -= 1
        if not missing[spec.name]:
            begun.discard(spec.name)
    assert sorted(seen) == sorted(plan.tensors)
    return most, max(sizes.values())


@pytest.mark.parametrize("method", [None, "nvfp4"])
def test_parameters_that_are_begun_are_no_larger_than_the_largest(method, tmp_path):
    """However the file is sorted: here the experts' tensors of all layers lie one behind the other."""
    sizes = {**block_sizes("qwen3-moe"), "num_hidden_layers": 4, "mlp_only_layers": [], "dtype": "BF16"}
    checkpoint = open_checkpoint(make_checkpoint("qwen3-moe", tmp_path, **sizes))
    checkpoint = quantized(checkpoint) if method else checkpoint
    most, largest = in_flight(plan_load(checkpoint, Stage()))
    of_experts = sum(info.num_bytes for name, info in checkpoint.tensors.items() if "layers.0.mlp.experts" in name)
    assert most <= (max(largest, of_experts) if method else largest)


def test_a_quantised_tensor_is_read_with_its_group_and_a_plain_one_alone(tmp_path):
    sizes = {**block_sizes("qwen3"), "num_hidden_layers": 1, "dtype": "BF16"}
    plain = open_checkpoint(make_checkpoint("qwen3", tmp_path, **sizes))
    view, up = quantized(plain), "model.layers.0.mlp.up_proj.weight"
    assert plain.group_of(up) == up
    assert view.group_of(up) == view.group_of(f"{up}_scale") == view.group_of(up.replace("up_proj", "gate_proj"))
    assert view.group_of("model.norm.weight") == "model.norm.weight"
    out = np.empty(view.tensors[up].shape, np.uint8)
    found = dict(view.stream(names=[up], into={up: out}.get))
    assert found[up] is out
    assert out.tobytes() == view.read(up).tobytes()
