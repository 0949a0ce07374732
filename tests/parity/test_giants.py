"""What ``tandem plan`` says of Qwen3-235B-A22B and Qwen3.5-397B-A17B, against numbers worked out by hand and published.

Nothing is compiled but in the slow test. ``benchmarks/results/2026-11-28-giants.md`` says where sizes come from.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

from loaders import Stage
from loaders.reading.plan import specs_of
from parity.cli import main
from parity.planning.chips import CHIPS
from parity.planning.depths import depths_of
from parity.planning.meshes import Workload, default_mesh, held, stored_bytes
from parity.planning.minimum import minimum_of
from parity.planning.plan import Request, smallest
from parity.planning.subject import planned

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"
QWEN3, QWEN3_5 = str(CONFIGS / "qwen3-235b-a22b.json"), str(CONFIGS / "qwen3.5-397b-a17b.json")
LOAD = Workload(rows=8, context=8192, prompt=1024, dtype="bfloat16")
MASK = 8 * 8192 + 8 * 4 + 4  # of the cache, a byte a slot, and positions and the length

# published: metadata.total_size of model.safetensors.index.json, and what its headers hold
QWEN3_BYTES = 470_187_269_120
QWEN3_5_TEXT_BYTES = 792_692_717_952
QWEN3_5_DRAFT, QWEN3_5_TOWER = 6_595_568_128, 456_010_480  # parameters
WRAPPER = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "tie_word_embeddings": False,
    "vision_config": {
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "in_channels": 3,
        "intermediate_size": 4304,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
# by hand; every product is layers, experts and sizes in the order of docs/glossary.md
ATTENTION = 4096 * 128 * (64 + 4 + 4) + 64 * 128 * 4096
QWEN3_EXPERTS = 94 * 128 * 3 * 4096 * 1536
QWEN3_KEYS = 94 * 2 * 4096 * 128 * 4
QWEN3_WHOLE = 94 * (2 * 4096 + 2 * 128 + 128 * 4096) + 4096  # norms and routers
QWEN3_ALL = 2 * 151_936 * 4096 + 94 * ATTENTION + QWEN3_EXPERTS + QWEN3_WHOLE
# of eight devices as expert=4, tensor=2: keys and values have but four heads
QWEN3_EIGHTH = 2 * ((QWEN3_ALL - QWEN3_WHOLE - QWEN3_KEYS) // 8 + QWEN3_KEYS // 4 + QWEN3_WHOLE)

GATED = 15 * (4096 * 256 * 2 * 32 + 32 * 256 * 4096)  # queries with their gates, and the way back
KEYS = 15 * 2 * 4096 * 256 * 2
CHANNELS, VALUES = (2 * 16 + 64) * 128, 64 * 128
DELTA = 45 * (4096 * (CHANNELS + VALUES) + VALUES * 4096)
DELTA_SMALL = 45 * (2 * 64 * 4096 + CHANNELS * 4 + 2 * 64)  # a and b, convolution, dt_bias and A_log
SHARED = 60 * 3 * 4096 * 1024
QWEN3_5_EXPERTS = 60 * 512 * 3 * 4096 * 1024
QWEN3_5_WHOLE = 60 * (2 * 4096 + 512 * 4096 + 4096) + 15 * 2 * 256 + 45 * 128 + 4096
QWEN3_5_ALL = 2 * 248_320 * 4096 + GATED + KEYS + DELTA + DELTA_SMALL + SHARED + QWEN3_5_EXPERTS + QWEN3_5_WHOLE


@pytest.fixture(scope="module")
def qwen3():
    return planned(QWEN3, None).config


@pytest.fixture(scope="module")
def qwen3_5():
    return planned(QWEN3_5, None).config


def test_weights_are_as_many_bytes_as_the_published_checkpoint_has(qwen3):
    assert 2 * QWEN3_ALL == QWEN3_BYTES
    assert stored_bytes(qwen3, LOAD) == {"BF16": QWEN3_BYTES}
    assert held(qwen3, LOAD, {})[0] == QWEN3_BYTES


def test_so_they_are_of_the_hybrid_but_for_what_it_keeps_in_float32(qwen3_5):
    assert stored_bytes(qwen3_5, LOAD) == {"BF16": 2 * QWEN3_5_ALL}
    assert 2 * QWEN3_5_ALL + 2 * 45 * (64 + 128) == QWEN3_5_TEXT_BYTES  # A_log and the gated norm, which no config says
    draft = sum(math.prod(spec.shape) for spec in specs_of(qwen3_5, Stage(mtp=True)) if spec.name.startswith("mtp."))
    assert draft == QWEN3_5_DRAFT


def test_in_its_wrapper_the_tower_for_images_is_held_too(tmp_path):
    text = json.loads(Path(QWEN3_5).read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(WRAPPER | {"text_config": text}), encoding="utf-8")
    stored = stored_bytes(planned(str(tmp_path), None).config, LOAD)
    assert stored == {"BF16": 2 * (QWEN3_5_ALL + QWEN3_5_TOWER)}


def test_caches_are_keys_and_values_of_all_slots_and_states_of_every_row(qwen3, qwen3_5):
    assert held(qwen3, LOAD, {})[1] == 94 * 2 * 8 * 4 * 8192 * 128 * 2 + MASK
    states = 45 * 8 * (64 * 128 * 128 * 4 + 3 * CHANNELS * 2)
    assert held(qwen3_5, LOAD, {})[1] == 15 * 2 * 8 * 2 * 8192 * 256 * 2 + states + MASK


def test_a_device_holds_its_share_the_heads_it_can_and_whole_norms_and_routers(qwen3, qwen3_5):
    mesh = {"expert": 4, "tensor": 2}
    assert default_mesh(qwen3, 8, LOAD, 96 << 30) == mesh
    weights, cache = held(qwen3, LOAD, mesh)
    assert weights == QWEN3_EIGHTH
    assert cache == 94 * 2 * 8 * 8192 * 128 * 2 + MASK  # one of four heads
    mesh = {"expert": 8, "tensor": 2}
    assert default_mesh(qwen3_5, 16, LOAD, 96 << 30) == mesh
    cut = QWEN3_5_ALL - QWEN3_5_WHOLE - KEYS
    assert held(qwen3_5, LOAD, mesh)[0] == 2 * (cut // 16 + KEYS // 2 + QWEN3_5_WHOLE)


def test_a_decode_step_reads_at_least_all_but_the_embedding_and_the_cache(qwen3, qwen3_5):
    mesh = {"expert": 2, "tensor": 4}
    least = minimum_of(qwen3, "decode", LOAD, mesh)
    assert least.weight_bytes == held(qwen3, LOAD, mesh)[0] - 2 * 151_936 * 4096 // 8
    assert least.cache_bytes == held(qwen3, LOAD, mesh)[1] - MASK
    assert least.expert_bytes == 2 * QWEN3_EXPERTS // 8
    assert least.distinct_expert_bytes / least.expert_bytes == pytest.approx(1 - (1 - 8 / 128) ** 8)
    states = 45 * 8 * (64 * 128 * 128 * 4 + 3 * CHANNELS * 2)  # read and written
    assert minimum_of(qwen3_5, "decode", LOAD, {}).cache_bytes == held(qwen3_5, LOAD, {})[1] - MASK + states


@pytest.mark.parametrize(
    ("path", "all_of_it", "quantised", "scalars"),
    [
        (QWEN3, QWEN3_ALL, 94 * ATTENTION + QWEN3_EXPERTS, 94 * (4 + 3 * 128)),
        pytest.param(
            QWEN3_5,
            QWEN3_5_ALL,
            GATED + KEYS + DELTA + SHARED + QWEN3_5_EXPERTS,
            15 * 4 + 45 * 3 + 60 * 3 * (1 + 512),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["qwen3", "qwen3_5"],
)
def test_in_nvfp4_two_codes_are_a_byte_and_16_of_them_have_a_scale(path, all_of_it, quantised, scalars):
    assert stored_bytes(planned(path, "nvfp4").config, LOAD) == {
        "U8": quantised // 2,
        "F8_E4M3": quantised // 16,
        "BF16": 2 * (all_of_it - quantised),
        "F32": 4 * scalars,
    }


def test_the_smallest_slice_is_looked_for_by_what_devices_hold(qwen3):
    assert smallest(Request("", qwen3, None, CHIPS["v5p"], LOAD)) == "2x2x2"
    assert smallest(Request("", qwen3, None, CHIPS["v5p"], LOAD), above=8) == "2x2x4"


def test_a_few_layers_in_the_models_proportions_stand_for_all(qwen3, qwen3_5):
    assert (depths_of(qwen3).shallow, depths_of(qwen3).deeper, depths_of(qwen3).missing) == (4, 16, 78)
    assert (depths_of(qwen3_5).shallow, depths_of(qwen3_5).deeper, depths_of(qwen3_5).missing) == (4, 16, 11)
    assert [qwen3_5.has_linear_attention(layer) for layer in range(8)] == [True, True, True, False] * 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu-compiler]'")
def test_the_verb_plans_235_billion_parameters(tmp_path, capsys):
    """Over a short prompt, which compiles in a third of the time that one of 1024 takes."""
    options = ["--chip", "v5p", "--topology", "2x2x2", "--batch", "8", "--context", "8192", "--prompt", "128"]
    assert main(["plan", QWEN3, *options, "--json", str(tmp_path / "plan.json")]) == 0
    assert "smallest slice that fits: this one" in capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    decode, prefill = found["programs"]["decode"], found["programs"]["prefill"]
    held_here = decode["weight_bytes"] + decode["cache_bytes"]
    for program in (decode, prefill):
        assert program["weight_bytes"] == QWEN3_EIGHTH
        assert held_here + program["temp_bytes"] <= program["peak_bytes"] < CHIPS["v5p"].usable_bytes
        # two sums a layer and the embedding's; keys and values stay where they are
        assert {kind: one["count"] for kind, one in program["collectives"].items()} == {"all-reduce": 2 * 94 + 1}
    assert 1 <= decode["ratio"] < 1.03
