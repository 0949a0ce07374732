"""``tandem plan`` but for the compiler: meshes, depths, the least that must move, verdicts and exit codes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_models.abstract import abstract_weights
from loaders import CheckpointError, Stage, open_checkpoint
from loaders.config import config_from_json
from parity.cli import main
from parity.planning.chips import CHIPS, chip_of
from parity.planning.depths import Depths, depths_of, pattern
from parity.planning.extrapolating import joined
from parity.planning.meshes import Workload, default_mesh, held, specs_for, stored_bytes
from parity.planning.minimum import Minimum, heads_on_device, minimum_of, seen_by_prompt
from parity.planning.plan import Request, judged, plan, smallest
from parity.planning.subject import planned
from parity.zoo import make_checkpoint, zoo_config

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"
LOAD = Workload(rows=8, context=2048, prompt=1024, dtype="bfloat16")
ROOM = CHIPS["v5e"].usable_bytes


@pytest.fixture(scope="module")
def dense():
    return planned(str(CONFIGS / "qwen3-8b.json"), None).config


@pytest.fixture(scope="module")
def experts():
    """Qwen3-30B-A3B, of which four layers show all there is."""
    config = planned(str(CONFIGS / "qwen3-30b-a3b.json"), None).config
    return dataclasses.replace(config, num_hidden_layers=4, layer_types=config.layer_types[:4])


def test_the_least_of_a_dense_step_is_every_weight_but_the_embedding_and_the_cache(dense):
    least = minimum_of(dense, "decode", LOAD, {"tensor": 4})
    layer = 4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 12288
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    weights = (36 * layer + 151936 * 4096) // 4 + norms
    cache = 36 * 2 * 8 * 2048 * 8 * 128 // 4
    assert (least.weight_bytes, least.cache_bytes) == (2 * weights, 2 * cache)
    attended = 36 * 2 * 2 * 8 * 2048 * 32 * 128 // 4
    assert least.flops == 2 * 8 * (36 * layer + 151936 * 4096) // 4 + attended


@pytest.mark.parametrize(
    "sizes", [{"expert": 8, "tensor": 2}, {"expert": 16}, {"tensor": 8}, {"expert": 4, "tensor": 4}]
)
def test_a_device_is_charged_with_its_own_queries_and_the_keys_that_those_ask_for(experts, sizes):
    """Four heads of keys and values are cut by four devices at most, 32 of queries by all."""
    devices = math.prod(sizes.values())
    load = Workload(8, 32768, 8192, "bfloat16")
    queries, keys = 32 // devices, 1
    assert heads_on_device(sizes, 32, 4) == (queries, keys)
    assert minimum_of(experts, "decode", load, sizes).cache_bytes == 4 * 2 * 8 * 32768 * keys * 128 * 2
    longer, shorter = (
        minimum_of(experts, "decode", dataclasses.replace(load, context=context), sizes).flops
        for context in (32768, 16384)
    )
    assert longer - shorter == 4 * 2 * 2 * 8 * 16384 * queries * 128


def test_the_least_of_sparse_layers_is_the_chosen_experts_and_the_router(experts):
    least = minimum_of(experts, "prefill", LOAD, {})
    layer = 2048 * (32 + 2 * 4) * 128 + 32 * 128 * 2048 + 2048 * 128 + 8 * 3 * 2048 * 768
    attended = 4 * 2 * 2 * 8 * 1024 * (1025 / 2) * 32 * 128
    assert least.flops == 2 * 8 * (1024 * 4 * layer + 151936 * 2048) + attended


def test_heads_that_divide_nothing_are_on_every_device():
    assert heads_on_device({}, 32, 4) == (32, 4)
    assert heads_on_device({"tensor": 2}, 6, 3) == (3, 2)  # one group lies on both
    assert heads_on_device({"tensor": 4}, 6, 3) == (6, 3)


def test_of_layers_that_slide_a_step_reads_what_its_window_shows(dense):
    kinds = tuple("sliding_attention" if layer % 3 else "full_attention" for layer in range(36))
    slides = dataclasses.replace(dense, layer_types=kinds, sliding_window=512)
    of_a_slot = 2 * 8 * 8 * 128 * 2
    assert minimum_of(slides, "decode", LOAD, {}).cache_bytes == of_a_slot * (12 * 2048 + 24 * 512)
    assert minimum_of(slides, "prefill", LOAD, {}).cache_bytes == of_a_slot * 36 * 1024  # all of it is kept


@pytest.mark.parametrize("window", [1, 4, 37, 1024, 4096])
@pytest.mark.parametrize("tokens", [1, 16, 1024])
def test_a_prompt_sees_what_stands_before_it_in_the_window(window, tokens):
    distance = np.subtract.outer(np.arange(tokens), np.arange(tokens))
    seen = ((distance >= 0) & (distance < window)).sum() / tokens
    assert seen_by_prompt(tokens, min(window, tokens)) == pytest.approx(seen)


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ("Used 1.16T of 15.75G hbm", 1.16 * 2**40),
        ("Used 20.00G of 15.75G hbm", 20 * 2**30),
        ("Used 30.00P of 15.75G hbm", 30 * 2**50),
        ("HLO temporaries (1.50E)", 1.5 * 2**60),
        ("HLO temporaries (512B)", 512),
    ],
)
def test_how_much_is_missing_is_understood_whatever_its_unit(said, size):
    from parity.planning.compiling import exhausted_bytes

    assert exhausted_bytes(f"RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. {said}.") == int(size)
    assert exhausted_bytes("INTERNAL: something else") is None
    assert exhausted_bytes("Used 3.00Z of 15.75G hbm") is None


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu-compiler]'")
def test_a_vision_tower_that_no_text_program_takes_is_in_memory_all_the_same(tmp_path):
    config = zoo_config("qwen3_vl", hidden_size=256, intermediate_size=256)
    config["vision_config"] |= {"hidden_size": 768, "out_hidden_size": 256, "intermediate_size": 8192}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["--chip", "v5e", "--topology", "1x1", "--batch", "1", "--context", "64", "--prompt", "16"]
    assert main(["plan", str(tmp_path / "config.json"), *options, "--json", str(tmp_path / "plan.json")]) == 0
    for program in json.loads((tmp_path / "plan.json").read_text())["programs"].values():
        held = program["weight_bytes"] + program["cache_bytes"]
        assert held + program["temp_bytes"] <= program["peak_bytes"]


def test_of_experts_as_many_are_expected_as_so_many_choices_hit(experts):
    least = minimum_of(experts, "decode", LOAD, {"expert": 4})
    assert least.expert_bytes == 4 * 128 * 3 * 2048 * 768 * 2 // 4
    assert least.distinct_expert_bytes / least.expert_bytes == pytest.approx(51.6 / 128, rel=1e-3)


def test_rows_are_spread_where_heads_no_longer_can_be_and_experts_before_they_are_cut(dense, experts):
    assert default_mesh(dense, 4, LOAD, ROOM) == {"tensor": 4}
    assert default_mesh(dense, 16, LOAD, ROOM) == {"data": 2, "tensor": 8}
    assert default_mesh(experts, 4, LOAD, ROOM) == {"expert": 4}


@pytest.mark.parametrize(
    ("num_kv_heads", "devices", "mesh"),
    [
        (2, 4, {"expert": 2, "tensor": 2}),
        (4, 4, {"tensor": 4}),
        (1, 4, {"tensor": 4}),
        (8, 16, {"expert": 2, "tensor": 8}),
    ],
)
def test_of_one_row_keys_and_values_are_not_whole_on_every_device_where_some_axis_can_cut_them(
    num_kv_heads, devices, mesh
):
    config = odd_config(num_attention_heads=16, num_key_value_heads=num_kv_heads)
    load = dataclasses.replace(LOAD, rows=1, context=100_000)
    assert default_mesh(config, devices, load, ROOM) == mesh
    others = [{"tensor": devices}, {"expert": 2, "tensor": devices // 2}, {"expert": 4, "tensor": devices // 4}]
    assert sum(held(config, load, mesh)) == min(sum(held(config, load, sizes)) for sizes in others)


def test_what_devices_hold_is_cut_as_the_mesh_says(dense):
    (whole, cache), (part, cut) = held(dense, LOAD, {}), held(dense, LOAD, {"tensor": 4})
    assert whole / 4 < part < 1.001 * whole / 4
    assert cache / 4 < cut < 1.001 * cache / 4


def test_the_smallest_slice_has_room_for_weights_and_cache(dense):
    request = Request("qwen3-8b", dense, None, chip_of("v5e"), LOAD)
    assert smallest(request) == "2x2"
    assert smallest(dataclasses.replace(request, chip=chip_of("v5p"))) == "1x1x1"
    assert smallest(request, above=4) == "2x4"


GB = 10**9


@pytest.fixture
def compiling(dense, monkeypatch):
    """Plans of Qwen3-8B on v5e without a compiler, and the slices that were compiled: four devices hold 4.7 GB each."""

    def planning(named: str | None, temporaries: dict[str, int], config=dense, load=LOAD, mesh=None):
        asked = []

        def planned_on(request: Request, topology: str, sizes: dict[str, int] | None):
            asked.append(topology)
            devices, temp = request.chip.num_devices(topology), temporaries.get(topology, 0)
            mesh = default_mesh(request.config, devices, request.load, ROOM) if sizes is None else sizes
            peak = sum(held(request.config, request.load, mesh)) + temp
            program = {"temp_bytes": temp, "peak_bytes": peak}
            fits = peak <= request.chip.usable_bytes
            return {"topology": topology, "devices": devices, "mesh": mesh, "fits": fits, "programs": {"it": program}}

        monkeypatch.setattr("parity.planning.plan._planned", planned_on)
        return plan(Request("qwen3-8b", config, None, chip_of("v5e"), load), named, mesh), asked

    return planning


def test_where_no_slice_is_named_it_plans_the_smallest_that_fits_once_compiled(compiling):
    found, asked = compiling(None, {"2x2": 13 * GB})
    assert (found["topology"], found["fits"], found["suggestion"]["is_this"]) == ("2x4", True, True)
    assert asked == ["2x2", "2x4"]


def test_a_smaller_slice_than_the_one_named_is_compiled_if_its_temporaries_might_fit(compiling):
    found, asked = compiling("4x4", {"4x4": GB, "2x2": 2 * GB})
    assert (found["topology"], found["suggestion"]["topology"], found["suggestion"]["is_this"]) == ("4x4", "2x2", False)
    assert asked == ["4x4", "2x2"]
    found, asked = compiling("4x4", {"4x4": 13 * GB, "2x4": 13 * GB})
    assert (asked, found["suggestion"]["topology"]) == (["4x4", "2x4"], "2x4")


def test_temporaries_of_more_devices_say_nothing_of_fewer_that_divide_more(compiling):
    """Of 40 heads 16 devices cut none, and eight cut all."""
    document = json.loads((CONFIGS / "qwen3-8b.json").read_text()) | {"num_attention_heads": 40}
    config, _ = config_from_json(document)
    one_row = dataclasses.replace(LOAD, rows=1)
    found, asked = compiling("4x4", {"4x4": 13 * GB, "2x4": GB, "2x2": 20 * GB}, config, one_row, {"tensor": 16})
    assert (asked, found["suggestion"]["topology"]) == (["4x4", "2x2", "2x4"], "2x4")


def odd_config(**changes):
    document = json.loads((CONFIGS / "qwen3-8b.json").read_text())
    config, problems = config_from_json(document | {"num_hidden_layers": 4, "layer_types": None} | changes)
    assert not problems
    return config


def test_a_mesh_that_is_given_has_the_smallest_slice_of_its_devices(compiling):
    """Also where the mesh that would be chosen holds less, or more, on each: six query heads of three keys."""
    config = odd_config(num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=2**23)
    load = dataclasses.replace(LOAD, rows=1, context=5_000_000)
    found, asked = compiling(None, {}, config, load, {"tensor": 3})
    assert (asked, found["fits"], found["mesh"]) == (["2x2"], True, {"tensor": 3})
    found, asked = compiling(None, {}, config, load, {"fsdp": 2})
    assert (asked[0], found["fits"], found["suggestion"]) == ("2x2", False, None)
    with pytest.raises(ValueError, match="the mesh takes 512 devices, but v5e:16x16 has 256"):
        compiling(None, {}, config, load, {"data": 512})


def test_where_no_usual_cut_leaves_room_one_does_that_cuts_the_width(compiling):
    primes = {"num_attention_heads": 7, "num_key_value_heads": 7, "intermediate_size": 99991, "vocab_size": 151_937}
    config = odd_config(num_hidden_layers=8, **primes)
    found, _ = compiling(None, {}, config)
    assert (found["topology"], found["mesh"]) == ("2x2", {"fsdp": 4})


def test_narrow_parts_of_experts_are_better_than_none_that_fit():
    document = json.loads((CONFIGS / "qwen3-30b-a3b.json").read_text())
    odd = {"num_experts": 499, "hidden_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 16}
    config, problems = config_from_json(document | odd | {"num_key_value_heads": 8})
    assert not problems
    load = dataclasses.replace(LOAD, context=64, prompt=16)
    assert default_mesh(config, 4, load, ROOM) == {"tensor": 4}
    assert default_mesh(config, 4, load, 2 * ROOM) == {"data": 2, "tensor": 2}
    assert smallest(Request("odd", config, None, chip_of("v5e"), load)) == "2x2"


def test_of_codes_two_lie_in_a_byte_and_parts_are_narrow_sooner():
    """Qwen3-235B-A22B on sixteen: 384 elements of an expert are three registers in bfloat16, and 192 bytes of codes."""
    load, room = dataclasses.replace(LOAD, rows=8, context=8192), 15 * 10**9
    config = planned(str(CONFIGS / "qwen3-235b-a22b.json"), "nvfp4").config
    assert default_mesh(config, 16, load, room) == {"expert": 8, "tensor": 2}
    plain = planned(str(CONFIGS / "qwen3-235b-a22b.json"), None).config
    assert default_mesh(plain, 16, load, 60 * GB) == {"expert": 4, "tensor": 4}


def test_where_none_fits_none_is_suggested(compiling):
    slices = dict.fromkeys(chip_of("v5e").topologies, 20 * GB)
    found, _ = compiling("2x2", slices)
    assert (found["fits"], found["suggestion"]) == (False, None)


@pytest.mark.parametrize(
    ("kinds", "found"),
    [("aaaa", (0, 1)), ("aaabaaab", (0, 4)), ("daaaa", (1, 1)), ("aabaabaa", (0, 3)), ("abcd", (0, 4))],
)
def test_the_shortest_pattern_is_found(kinds, found):
    assert pattern(kinds) == found


def test_shallow_programs_have_the_layers_of_the_model_in_its_proportions(dense):
    hybrid = planned(str(CONFIGS / "qwen3.5-9b.json"), None).config
    assert depths_of(dense) == Depths(4, 16, count=36, period=1, typical=range(1, 8))
    assert depths_of(hybrid) == Depths(4, 16, count=32, period=4, typical=range(4, 8))
    assert depths_of(dense, is_exact=True).is_exact
    assert depths_of(dense, is_exact=True).deeper == 36


def test_layers_that_are_stored_otherwise_are_others(dense):
    """Else four that are small would stand for all."""
    stored = {spec.name: "F32" for spec in specs_for(dense, Stage()) if ".layers." in spec.name}
    last = {name: dtype for name, dtype in stored.items() if int(name.split(".")[2]) >= 30}
    assert depths_of(dense, stored) == depths_of(dense)
    assert depths_of(dense, last).is_exact


def program(size: int, count: int, temp: int, layers: tuple[int, ...] = ()) -> dict:
    """``layers``: bytes that each of them reads, in a program that reads ``size``."""
    figures = dict.fromkeys(("weight_bytes", "cache_bytes", "hbm_read_bytes"), size) | {"peak_bytes": size + temp}
    figures |= {"hbm_written_bytes": 0, "temp_bytes": temp, "lower_s": 1.0, "compile_s": 2.0}
    by_layer = {str(layer): moved(read, 2) for layer, read in enumerate(layers)}
    return figures | moved(size, count) | {"by_layer": by_layer}


def moved(read: int, sums: int) -> dict:
    return {
        "hbm_read_bytes": read,
        "hbm_written_bytes": 0,
        "collectives": {"all-reduce": {"count": sums, "bytes": read}},
    }


SIX = (100, 100, 100, 110, 500, 90)  # reads of layers: the last few are not like the others
DEPTHS = Depths(2, 6, count=36, period=1, typical=range(1, 4))


def test_figures_of_two_depths_make_those_of_the_whole():
    found = joined([program(200, 5, 70), program(600, 13, 50, SIX)], DEPTHS)
    assert found["temp_bytes"] == 50  # what layers share never shrinks
    assert found["peak_bytes"] == 36 * 100 + 50
    assert (found["lower_s"], found["compile_s"]) == (2.0, 4.0)


def test_missing_layers_move_what_typical_ones_do_however_unlike_the_last_are():
    found = joined([program(200, 5, 0), program(1000, 13, 0, SIX)], DEPTHS)
    assert found["hbm_read_bytes"] == 1000 + 30 * 310 / 3
    assert found["hbm_bytes_range"] == [1000 + 30 * 100, 1000 + 30 * 110]
    assert found["collectives"] == {"all-reduce": {"count": 73, "bytes": 1000 + 30 * 310 / 3}}
    assert "by_layer" not in found


def test_sixteen_layers_of_qwen3_8b_say_what_36_of_them_move(dense):
    """Figures of libtpu 0.0.42.1, decode on four v5e; all 36 layers compiled move 4,416,439,296 bytes."""
    reads = [113_301_504, *[113_285_120] * 5, 113_301_504, *[113_285_120] * 3, *[113_276_928] * 5, 424_445_952]
    writes = [*[20_480] * 11, *[8_404_992] * 4, 1_224_704]
    layers = {
        str(layer): moved(read, 2) | {"hbm_written_bytes": written}
        for layer, (read, written) in enumerate(zip(reads, writes, strict=True))
    }
    outside = {"hbm_read_bytes": sum(reads) + 120_320, "hbm_written_bytes": sum(writes) + 29_184}
    deeper = program(1, 33, 0) | outside | {"by_layer": layers}
    found = joined([program(1, 9, 0), deeper], depths_of(dense))
    assert found["hbm_read_bytes"] + found["hbm_written_bytes"] == pytest.approx(4_416_439_296, rel=0.01)
    low, high = found["hbm_bytes_range"]
    assert high - low < 0.001 * low
    assert found["collectives"]["all-reduce"]["count"] == 73


def test_logits_of_all_positions_are_told_from_a_table_as_wide_as_the_prompt_is_long():
    from parity.planning.compiling import full_vocabulary

    hlo = "bf16[37984,1024] f32[8,1024,151936] f32[8,1024,37984] f32[1024,151936] bf16[151936,1024] f32[8,1,151936]"
    every = ["f32[1024,151936]", "f32[8,1024,151936]", "f32[8,1024,37984]"]
    assert full_vocabulary(hlo, 151936, 1024, 1024, 4) == every
    assert full_vocabulary(hlo, 151936, 1024, 1, 4) == full_vocabulary(hlo, 151936, 1024, 512, 4) == []


def test_a_program_of_all_layers_is_what_it_is():
    depths = Depths(36, 36, count=36, period=1, typical=range(0))
    found = joined([program(600, 13, 50, SIX)], depths)
    assert (found["hbm_read_bytes"], found["hbm_bytes_range"]) == (600, None)


def test_a_program_too_large_to_compile_does_not_fit():
    found = joined([program(400, 9, 0), program(800, 17, 0) | {"out_of_memory_bytes": 9000}], DEPTHS)
    assert (found["peak_bytes"], found["needs_at_least_bytes"]) == (None, 9000)
    assert not judged(found, Minimum(1, 0, 0, 1, 1), CHIPS["v5e"], LOAD, "decode")["fits"]
    held = found["weight_bytes"] + found["cache_bytes"]
    early = joined([program(400, 9, 0), program(800, 17, 0) | {"out_of_memory_bytes": 30}], DEPTHS)
    assert early["needs_at_least_bytes"] == held > 30


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (1, False)])
def test_it_fits_up_to_what_a_program_may_use(spare, fits):
    chip = CHIPS["v5e"]
    found = program(1, 1, 1) | {
        "peak_bytes": chip.usable_bytes + spare,
        "hbm_read_bytes": 819e9,
        "hbm_written_bytes": 0,
    }
    verdict = judged(found, Minimum(819 * 10**8, 0, 0, 0, 1), chip, LOAD, "decode")
    assert verdict["fits"] is fits
    assert verdict["ratio"] == 10
    assert verdict["roofline"]["compiled"]["tokens_per_s"] == pytest.approx(8)
    assert verdict["roofline"]["minimum"]["tokens_per_s"] == pytest.approx(80)


@pytest.mark.parametrize(("dtype", "passes"), [("bfloat16", 1), ("float32", 6)])
def test_products_in_float32_take_as_many_passes_as_they_do(dtype, passes):
    chip, load = CHIPS["v5e"], dataclasses.replace(LOAD, dtype=dtype)
    found = program(1, 1, 1) | {"peak_bytes": 1, "hbm_read_bytes": 1, "hbm_written_bytes": 0}
    verdict = judged(found, Minimum(1, 0, 0, 0, int(chip.flops)), chip, load, "decode")
    assert verdict["roofline"]["minimum"]["seconds"] == pytest.approx(passes, rel=1e-6)


def test_quantised_on_request_as_loading_would(dense):
    config = planned(str(CONFIGS / "qwen3-8b.json"), "nvfp4").config
    assert config.quantization is not None
    assert len(config.quantization.table) == 36 * 7
    assert held(config, LOAD, {})[0] < 0.4 * held(dense, LOAD, {})[0]


def test_weights_are_stored_in_what_files_say(tmp_path):
    path = make_checkpoint("qwen3_5", tmp_path, dtype="BF16", num_hidden_layers=4)
    found = planned(str(path), None)
    assert (found.dtype, found.plain) == ("bfloat16", "BF16")
    own = {name: info.dtype for name, info in open_checkpoint(path).tensors.items() if info.dtype != "BF16"}
    assert set(found.stored.values()) == {"F32"}
    assert found.stored == {name: dtype for name, dtype in own.items() if not name.startswith("mtp.")}
    load = Workload(1, 64, 64, found.dtype, found.plain, found.stored)
    extra = sum(math.prod(spec.shape) * 2 for spec in specs_for(found.config, Stage()) if spec.name in found.stored)
    plain = Workload(1, 64, 64, found.dtype, found.plain)
    assert held(found.config, load, {})[0] == held(found.config, plain, {})[0] + extra
    assert stored_bytes(found.config, load)["F32"] == 2 * extra
    abstract = abstract_weights(found.config, None, jnp.bfloat16, stored=found.stored)
    assert held_bytes_of(abstract) == held(found.config, load, {})[0]


def held_bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"torch_dtype": "float32"}, ("float32", "F32")),
        ({"dtype": "float16"}, ("float32", "F16")),
        ({"dtype": "bfloat16"}, ("bfloat16", "BF16")),
        ({"torch_dtype": "torch.float16"}, ("float32", "F16")),
        ({}, ("bfloat16", "BF16")),
    ],
)
def test_of_a_config_alone_in_what_it_says(said, found, tmp_path, capsys):
    document = json.loads((CONFIGS / "qwen3-8b.json").read_text(encoding="utf-8"))
    del document["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(document | said), encoding="utf-8")
    subject = planned(str(tmp_path), None)
    assert (subject.dtype, subject.plain) == found
    assert main(["inspect", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"plain floats are counted as {found[1]}\n" in told
    assert f"{8190735360 * (4 if found[1] == 'F32' else 2):,} bytes from 399 tensors" in told


@pytest.mark.parametrize("word", ["float8_e4m3fn", "auto", 16])
def test_a_config_alone_that_says_another_dtype_is_refused(word, tmp_path):
    document = json.loads((CONFIGS / "qwen3-8b.json").read_text(encoding="utf-8")) | {"dtype": word}
    (tmp_path / "config.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"dtype is {word!r}, expected one of bfloat16, float16, float32"):
        planned(str(tmp_path), None)


def test_a_model_of_which_nothing_can_be_quantised_is_refused_as_loading_would(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(zoo_config("qwen3")), encoding="utf-8")
    with pytest.raises(CheckpointError, match="no linear layer has a multiple of 16 inputs: nothing to quantise"):
        planned(str(tmp_path), "nvfp4")
