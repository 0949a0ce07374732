"""``tandem plan`` of a mesh that is given, against arrays that lie on devices. Only slow tests compile."""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path

import jax
import pytest

import jax_models
from jax_models.weights import flatten
from parity.cli import main
from parity.planning.meshes import Load, held, mesh_shape, parse_mesh
from parity.planning.minimum import minimum_of
from parity.planning.subject import planned
from parity.zoo import make_checkpoint

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"
MODELS = {"dense": "qwen3", "experts": "qwen3-moe"}
# three heads of keys and values and five experts, which few of these axes divide
CHANGES = {"num_hidden_layers": 2, "vocab_size": 208}


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
    return subject.config, Load(rows, 32, 16, subject.dtype, subject.plain, subject.stored)


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


@pytest.mark.parametrize("program", ["prefill", "decode"])
@pytest.mark.parametrize("config", ["qwen3-8b", "qwen3-30b-a3b"])
def test_weights_that_fsdp_cuts_are_read_in_parts_and_multiplied_as_often(program, config):
    config = planned(str(CONFIGS / f"{config}.json"), None).config
    load = Load(rows=8, context=2048, prompt=1024, dtype="bfloat16")
    whole, parts, rows = (minimum_of(config, program, load, sizes) for sizes in ({}, {"fsdp": 4}, {"data": 4}))
    assert parts.flops == pytest.approx(whole.flops / 4, rel=1e-3)
    assert parts.flops == pytest.approx(rows.flops, rel=1e-3)
    assert parts.weight_bytes == pytest.approx(whole.weight_bytes / 4, rel=0.02)
    assert parts.cache_bytes == whole.cache_bytes / 4
    assert parts.distinct_expert_bytes == pytest.approx(whole.distinct_expert_bytes / 4)


def test_rows_that_fsdp_does_not_divide_are_all_multiplied_by_every_part():
    config = planned(str(CONFIGS / "qwen3-8b.json"), None).config
    load = Load(rows=3, context=2048, prompt=1024, dtype="bfloat16")
    whole, parts = (minimum_of(config, "decode", load, sizes) for sizes in ({}, {"fsdp": 4}))
    assert parts.cache_bytes == whole.cache_bytes
    attended = 36 * 2 * 2 * 3 * 2048 * 32 * 128
    assert parts.flops - attended == pytest.approx((whole.flops - attended) / 4, rel=1e-3)
