"""``tandem plan`` of a mesh that is given, against arrays that lie on devices. Only slow tests compile."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from pathlib import Path

import jax
import pytest

import jax_models
from jax_models.weights import flatten
from parity.cli import main
from parity.planning.copies import copied_cache, copied_weights, uncut_rows
from parity.planning.meshes import PROGRAMS, Workload, held, mesh_shape, parse_mesh
from parity.planning.minimum import minimum_of
from parity.planning.subject import planned
from parity.zoo import make_checkpoint, zoo_config

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"
MODELS = {"dense": "qwen3", "experts": "qwen3-moe"}
# three heads of keys and values and five experts, which few of these axes divide
CHANGES = {"num_hidden_layers": 2, "vocab_size": 208}
SIX = {"num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 768, "vocab_size": 3072}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint, made once."""
    return functools.cache(
        lambda name: make_checkpoint(MODELS[name], tmp_path_factory.mktemp("checkpoint") / "it", **CHANGES)
    )


def placed(path: Path, mesh: str, rows: int):
    """Weights and an empty cache on devices of this process, as flat dictionaries."""
    shape = mesh_shape(parse_mesh(mesh))
    size = math.prod(shape.values())
    if len(jax.devices()) < size:
        pytest.skip(f"needs {size} devices, has {len(jax.devices())}; JAX_NUM_CPU_DEVICES=8 gives as many")
    model = jax_models.load(path, mesh=jax.make_mesh(tuple(shape.values()), tuple(shape), devices=jax.devices()[:size]))
    cache = model.programs.empty_cache(rows=rows, capacity=32)
    layers = {f"layers.{name}.{key}": leaf for name, parts in cache.layers.items() for key, leaf in parts.items()}
    return flatten(model.weights), layers | {name: getattr(cache, name) for name in ("key_mask", "position", "length")}


def asked(path: Path, rows: int) -> tuple:
    """Configuration and load of what ``placed`` places."""
    subject = planned(str(path), None)
    return subject.config, Workload(rows, 32, 16, subject.dtype, subject.plain, subject.stored)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mesh", ["fsdp=4", "data=2,fsdp=2,tensor=2", "expert=2,fsdp=2"])
def test_of_a_mesh_with_fsdp_devices_hold_what_a_model_that_is_loaded_has_there(name, mesh, checkpoint):
    path, rows = checkpoint(name), 8
    first = jax.devices()[0]
    here = [
        sum(part.data.nbytes for array in arrays.values() for part in array.addressable_shards if part.device == first)
        for arrays in placed(path, mesh, rows)
    ]
    assert list(held(*asked(path, rows), parse_mesh(mesh))) == here


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu-compiler]'")
def test_the_verb_compiles_for_a_mesh_with_fsdp(checkpoint, capsys):
    options = ["--topology", "2x2", "--mesh", "fsdp=2,tensor=2", "--context", "128", "--prompt", "32"]
    assert main(["plan", str(checkpoint("experts")), *options]) == 0
    shown = capsys.readouterr().out
    assert "mesh fsdp=2, tensor=2" in shown
    assert "all-gather" in shown


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu-compiler]'")
@pytest.mark.parametrize(("topology", "size", "devices"), [("4x8", 2, 32), ("2x4", 6, 8)])
def test_a_mesh_that_libtpu_puts_on_no_part_of_a_slice_is_refused_in_a_sentence(
    topology, size, devices, tmp_path, capsys
):
    """Of the first it says so; over the second it aborts."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(zoo_config("qwen3", hidden_size=256, head_dim=128, **SIX) | {"dtype": "bfloat16"}))
    options = ["--topology", topology, "--mesh", f"tensor={size}", "--context", "64", "--prompt", "8", "--batch", "2"]
    assert main(["plan", str(path), *options]) == 2
    said = capsys.readouterr().err
    assert f"libtpu compiles nothing for {size} of the {devices} devices of v5e:{topology}. Name a slice" in said
    assert "RET_CHECK" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("program", ["prefill", "decode"])
@pytest.mark.parametrize("config", ["qwen3-8b", "qwen3-30b-a3b"])
def test_weights_that_fsdp_cuts_are_read_in_parts_and_multiplied_as_often(program, config):
    config = planned(str(CONFIGS / f"{config}.json"), None).config
    load = Workload(rows=8, context=2048, prompt=1024, dtype="bfloat16")
    whole, parts, rows = (minimum_of(config, program, load, sizes) for sizes in ({}, {"fsdp": 4}, {"data": 4}))
    assert parts.flops == pytest.approx(whole.flops / 4, rel=1e-3)
    assert parts.flops == pytest.approx(rows.flops, rel=1e-3)
    assert parts.weight_bytes == pytest.approx(whole.weight_bytes / 4, rel=0.02)
    assert parts.cache_bytes == whole.cache_bytes / 4
    assert parts.distinct_expert_bytes == pytest.approx(whole.distinct_expert_bytes / 4)


def test_rows_that_fsdp_does_not_divide_are_all_multiplied_by_every_part():
    config = planned(str(CONFIGS / "qwen3-8b.json"), None).config
    load = Workload(rows=3, context=2048, prompt=1024, dtype="bfloat16")
    whole, parts = (minimum_of(config, "decode", load, sizes) for sizes in ({}, {"fsdp": 4}))
    assert parts.cache_bytes == whole.cache_bytes
    attended = 36 * 2 * 2 * 3 * 2048 * 32 * 128
    assert parts.flops - attended == pytest.approx((whole.flops - attended) / 4, rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("mesh", "rows"),
    [
        ("data=2", 8),
        ("data=3", 8),
        ("data=2,tensor=2", 8),
        ("expert=4,tensor=2", 2),
        ("data=2,fsdp=3", 8),
        ("fsdp=4", 8),
    ],
)
def test_what_lies_on_several_devices_is_what_does_so_of_a_model_that_is_loaded(name, mesh, rows, checkpoint):
    path, sizes = checkpoint(name), parse_mesh(mesh)
    config, load = asked(path, rows)
    for said, arrays in zip((copied_weights, copied_cache), placed(path, mesh, rows), strict=True):
        groups = said(config, load, sizes)
        found = {one["name"]: (group["copies"], one["bytes"]) for group in groups for one in group["tensors"]}
        assert found == {key: copies for key, array in arrays.items() if (copies := copies_of(array))[0] > 1}
        for group in groups:
            assert group["copies"] == math.prod(group["axes"].values())
            assert group["axes"].items() <= sizes.items()
            assert group["bytes"] == sum(one["bytes"] for one in group["tensors"])


def copies_of(array: jax.Array) -> tuple[int, int]:
    """How many devices have the same part of an array, and what all of these but one take."""
    shards = array.addressable_shards
    parts = {str(shard.index): shard.data.nbytes for shard in shards}
    return len(shards) // len(parts), sum(shard.data.nbytes for shard in shards) - sum(parts.values())


def traffic(read: int) -> dict:
    return {"hbm_read_bytes": read, "hbm_written_bytes": 0, "collectives": {}}


@pytest.fixture
def said(monkeypatch, capsys, tmp_path):
    """What the verb prints and writes, and what it would have compiled; every program takes the same temporaries."""

    def run(*options: str, temporaries: int = 0) -> tuple[str, dict, list]:
        asked = []

        def compiled(request, topology, sizes, depths):
            asked.append((topology, sizes))
            weights, cache = held(request.config, request.load, sizes)
            program = {"weight_bytes": weights, "cache_bytes": cache, "temp_bytes": temporaries}
            program |= {"peak_bytes": weights + cache + temporaries, "lower_s": 0.0, "compile_s": 0.0}
            program |= {**traffic(10**6), "by_layer": {str(layer): traffic(10**4) for layer in range(depths.deeper)}}
            return {"jax": "", "libtpu": ""} | dict.fromkeys(PROGRAMS, [program] * len({depths.shallow, depths.deeper}))

        monkeypatch.setattr("parity.planning.plan._compiled", compiled)
        monkeypatch.setattr("parity.planning.environment.check_installed", lambda: None)
        assert main(["plan", *options, "--json", str(tmp_path / "plan.json")]) in (0, 1)
        return capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text(encoding="utf-8")), asked

    return run


DENSE = str(CONFIGS / "qwen3-8b.json")
DENSE_BYTES = 16_381_470_720  # published: metadata.total_size of model.safetensors.index.json
VECTORS = 36 * (2 * 4096 + 2 * 128) + 4096


@pytest.mark.parametrize(
    ("mesh", "lines"),
    [
        ("data=4", ["every weight: 4 copies (data=4), 49.14 GB"]),
        (
            "data=2,tensor=2",
            [
                "every weight not named below: 2 copies (data=2), 16.38 GB",
                "145 x vector or scalar: 4 copies (data=2, tensor=2), 1.8 MB",
            ],
        ),
        ("tensor=4", ["145 x vector or scalar: 4 copies (tensor=4), 1.8 MB"]),
        (
            "tensor=16",
            [
                "36 x model.layers.*.self_attn.k_proj.weight, 36 x model.layers.*.self_attn.v_proj.weight,"
                " 145 x vector or scalar: 16 copies (tensor=16), 9.07 GB",
                "key, value of the cache: 16 copies (tensor=16), 144.96 GB",
            ],
        ),
    ],
)
def test_copies_are_said_in_a_line_for_each_number_of_them(mesh, lines, said):
    shown, found, _ = said(DENSE, "--topology", "4x4", "--mesh", mesh)
    title, *listed = shown[shown.index("on more than one device") :].splitlines()
    assert title == "on more than one device, and what all copies but one take on all devices:"
    assert [line.strip() for line in listed if line.startswith("  ")] == lines
    if mesh == "data=4":
        assert [group["bytes"] for group in found["copied_weights"]] == [3 * DENSE_BYTES]
    if mesh == "tensor=4":
        assert [group["bytes"] for group in found["copied_weights"]] == [3 * 2 * VECTORS]


def test_on_one_device_nothing_has_copies(said):
    shown, found, _ = said(DENSE, "--chip", "v5p", "--topology", "1x1x1")
    assert "on more than one device: nothing" in shown
    assert found["copied_weights"] == found["copied_cache"] == []


def test_rows_that_the_mesh_does_not_divide_are_said_to_be_whole(said):
    shown, found, _ = said(DENSE, "--topology", "4x4", "--mesh", "data=3", "--batch", "8")
    assert "a batch of 8 is not cut by data=3: 8 rows on each device; a batch of 6 or 9 would be" in shown
    assert found["uncut_rows"] == {"axes": {"data": 3}, "rows_per_device": 8, "dividing": [6, 9]}
    assert "key, value of the cache: 3 copies (data=3)" in shown
    shown, found, _ = said(DENSE, "--topology", "4x4", "--mesh", "data=3", "--batch", "9")
    assert found["uncut_rows"] is None
    assert "is not cut by" not in shown


@pytest.mark.parametrize(
    ("mesh", "rows", "found"),
    [
        ("data=2,fsdp=3", 8, {"axes": {"fsdp": 3}, "rows_per_device": 4, "dividing": [6, 12]}),
        ("fsdp=4", 1, {"axes": {"fsdp": 4}, "rows_per_device": 1, "dividing": [4]}),
        ("data=2,fsdp=2", 8, None),
        ("expert=3,tensor=5", 8, None),
    ],
)
def test_of_two_axes_for_rows_one_alone_may_cut_them(mesh, rows, found):
    assert uncut_rows(rows, parse_mesh(mesh)) == found


GB = 10**9


def test_if_it_does_not_fit_with_the_mesh_the_smallest_slice_that_fits_with_another_is_suggested(said):
    shown, found, asked = said(DENSE, "--topology", "4x4", "--mesh", "data=4")
    assert (found["fits"], found["topology"], found["mesh"]) == (False, "4x4", {"data": 4})
    assert found["suggestion"]["topology"] == "2x2"
    assert found["suggestion"]["mesh"] == {"tensor": 4}
    assert not found["suggestion"]["is_this"]
    said_so = (
        "it does not fit with this mesh; smallest slice that does with another: v5e:2x2, compiled with mesh tensor=4"
    )
    assert said_so in shown
    assert asked == [("4x4", {"data": 4}), ("2x2", {"tensor": 4})]


def test_so_it_is_where_the_slice_that_was_named_fits_with_another(said):
    _, found, asked = said(DENSE, "--topology", "2x2", "--mesh", "data=4")
    assert (found["fits"], found["suggestion"]["topology"], found["suggestion"]["mesh"]) == (
        False,
        "2x2",
        {"tensor": 4},
    )
    assert asked == [("2x2", {"data": 4}), ("2x2", {"tensor": 4})]


def test_the_mesh_that_would_have_been_chosen_is_compiled_once(said):
    _, found, asked = said(DENSE, "--topology", "2x2", "--mesh", "tensor=4", temporaries=12 * GB)
    assert (found["fits"], found["suggestion"]["topology"], found["suggestion"]["mesh"]) == (
        False,
        "2x4",
        {"tensor": 8},
    )
    assert asked == [("2x2", {"tensor": 4}), ("2x4", {"tensor": 8})]


def test_a_mesh_that_fits_has_nothing_else_compiled(said):
    shown, found, asked = said(DENSE, "--topology", "4x4", "--mesh", "tensor=8")
    assert (found["fits"], found["suggestion"], asked) == (True, None, [("4x4", {"tensor": 8})])
    assert "smallest slice" not in shown


def test_where_it_fits_with_no_mesh_that_is_said(said):
    shown, found, _ = said(DENSE, "--topology", "2x2", "--mesh", "data=4", temporaries=20 * GB)
    assert (found["fits"], found["suggestion"]) == (False, None)
    assert "it does not fit, nor on any slice of v5e with the mesh that leaves devices the least" in shown


def test_of_a_mesh_alone_the_smallest_slice_with_its_devices_is_planned(said, capsys):
    _, found, asked = said(DENSE, "--mesh", "tensor=8")
    assert (found["topology"], asked) == ("2x4", [("2x4", {"tensor": 8})])
    assert main(["plan", DENSE, "--mesh", "data=512"]) == 2
    assert "the mesh takes 512 devices, but v5e:16x16 has 256" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu-compiler]'")
@pytest.mark.parametrize("mesh", ["expert=4", "expert=2,tensor=2"])
def test_no_step_of_many_layers_copies_a_cache(mesh, tmp_path):
    """Of few layers XLA writes each cache behind the kernel that reads it by itself; of sixteen it wrote one before."""
    document = json.loads((CONFIGS / "qwen3-30b-a3b.json").read_text()) | {"num_hidden_layers": 16}
    (tmp_path / "config.json").write_text(json.dumps(document))
    options = ["--topology", "2x2", "--mesh", mesh, "--context", "8192", "--quant", "nvfp4", "--exact"]
    assert main(["plan", str(tmp_path), *options, "--json", str(tmp_path / "plan.json")]) == 0
    decode = json.loads((tmp_path / "plan.json").read_text())["programs"]["decode"]
    assert decode["ratio"] < 1.05
