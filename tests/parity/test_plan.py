"""``tandem plan`` but for the compiler: meshes, depths, the least that must move, verdicts and exit codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from parity.cli import main
from parity.planning.chips import CHIPS, chip_of
from parity.planning.depths import Depths, depths_of, pattern
from parity.planning.meshes import Load, default_mesh, held, parse_mesh
from parity.planning.minimum import Minimum, minimum_of
from parity.planning.plan import Request, joined, judged, smallest
from parity.planning.subject import config_to_plan

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"
LOAD = Load(rows=8, context=2048, prompt=1024, dtype="bfloat16")


@pytest.fixture(scope="module")
def dense():
    return config_to_plan(str(CONFIGS / "qwen3-8b.json"), None)


@pytest.fixture(scope="module")
def experts():
    """Qwen3-30B-A3B, of which four layers show all there is."""
    config = config_to_plan(str(CONFIGS / "qwen3-30b-a3b.json"), None)
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


def test_of_experts_as_many_are_expected_as_so_many_choices_hit(experts):
    least = minimum_of(experts, "decode", LOAD, {"expert": 4})
    assert least.expert_bytes == 4 * 128 * 3 * 2048 * 768 * 2 // 4
    assert least.distinct_expert_bytes / least.expert_bytes == pytest.approx(51.6 / 128, rel=1e-3)


def test_rows_are_spread_where_heads_no_longer_can_be_and_experts_before_they_are_cut(dense, experts):
    assert default_mesh(dense, 4, LOAD) == {"tensor": 4}
    assert default_mesh(dense, 16, LOAD) == {"data": 2, "tensor": 8}
    assert default_mesh(experts, 4, LOAD) == {"expert": 4}


def test_what_devices_hold_is_cut_as_the_mesh_says(dense):
    (whole, cache), (part, cut) = held(dense, LOAD, {}), held(dense, LOAD, {"tensor": 4})
    assert whole / 4 < part < 1.001 * whole / 4
    assert cache / 4 < cut < 1.001 * cache / 4


def test_the_smallest_slice_has_room_for_weights_and_cache(dense):
    request = Request("qwen3-8b", dense, None, chip_of("v5e"), LOAD)
    assert smallest(request) == "2x2"
    assert smallest(dataclasses.replace(request, chip=chip_of("v5p"))) == "1x1x1"
    assert smallest(request, above=4) == "2x4"


@pytest.mark.parametrize(
    ("kinds", "found"),
    [("aaaa", (0, 1)), ("aaabaaab", (0, 4)), ("daaaa", (1, 1)), ("aabaabaa", (0, 3)), ("abcd", (0, 4))],
)
def test_the_shortest_pattern_is_found(kinds, found):
    assert pattern(kinds) == found


def test_shallow_programs_have_the_layers_of_the_model_in_its_proportions(dense):
    hybrid = config_to_plan(str(CONFIGS / "qwen3.5-9b.json"), None)
    assert depths_of(dense) == Depths(4, 8, 8.0)
    assert depths_of(hybrid) == Depths(4, 8, 7.0)
    assert depths_of(dense, is_exact=True) == Depths(36, 36, 0.0)


def program(size: int, count: int, temp: int) -> dict:
    figures = dict.fromkeys(("weight_bytes", "cache_bytes", "peak_bytes", "hbm_read_bytes"), size)
    sent = {"all-reduce": {"count": count, "bytes": size}}
    return figures | {"temp_bytes": temp, "collectives": sent, "lower_s": 1.0, "compile_s": 2.0}


def test_figures_of_two_depths_make_those_of_the_whole():
    found = joined([program(400, 9, 70), program(800, 17, 50)], Depths(4, 8, 8.0))
    assert found["peak_bytes"] == 36 * 100
    assert found["collectives"] == {"all-reduce": {"count": 73, "bytes": 3600}}
    assert found["temp_bytes"] == 50  # what layers share never shrinks
    assert (found["lower_s"], found["compile_s"]) == (2.0, 4.0)


def test_a_program_too_large_to_compile_does_not_fit():
    found = joined([program(400, 9, 0), program(800, 17, 0) | {"out_of_memory_bytes": 9000}], Depths(4, 8, 8.0))
    assert (found["peak_bytes"], found["needs_at_least_bytes"]) == (None, 9000)
    assert not judged(found, Minimum(1, 0, 0, 1, 1), CHIPS["v5e"], LOAD, "decode")["fits"]


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


def test_quantised_on_request_as_loading_would(dense):
    config = config_to_plan(str(CONFIGS / "qwen3-8b.json"), "nvfp4")
    assert config.quantization is not None
    assert len(config.quantization.table) == 36 * 7
    assert held(config, LOAD, {})[0] < 0.4 * held(dense, LOAD, {})[0]


@pytest.mark.parametrize("text", ["model=4", "tensor", "tensor=0", "tensor=2,tensor=2"])
def test_a_mesh_that_is_not_understood_is_refused(text):
    with pytest.raises(ValueError, match="not understood"):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--chip", "v9"], "expected one of v5e"),
        (["--topology", "3x3"], "no topology '3x3'"),
        (["--batch", "0", "--context", "0"], "--batch is 0, expected at least 1; --context is 0"),
        (["--context", "64", "--prompt", "65"], "at most the 64 slots"),
    ],
)
def test_bad_options_are_refused_before_anything_is_compiled(options, said, capsys):
    assert main(["plan", str(CONFIGS / "qwen3-8b.json"), *options]) == 2
    assert said in capsys.readouterr().err


def test_without_the_compiler_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", str(CONFIGS / "qwen3-8b.json"), "--topology", "2x2"]) == 5
    assert "pip install '.[jax,tpu-compiler]'" in capsys.readouterr().err


def test_published_configs_are_json_that_loads():
    assert sorted(path.stem for path in CONFIGS.glob("*.json"))
    for path in CONFIGS.glob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["dtype"] == "bfloat16"
