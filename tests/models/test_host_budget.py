"""``host_budget_bytes`` of load and reload: what is held on the host for a moment stays within it, or is refused."""

from __future__ import annotations

import re
import tracemalloc
from functools import partial
from importlib import import_module

import jax
import pytest
from lives import BACKENDS

from loaders import Checkpoint, open_checkpoint
from parity.lifecycle.staged_memory import counted
from parity.zoo import block_sizes, make_checkpoint

pytestmark = [pytest.mark.usefixtures("young_heap"), pytest.mark.parametrize("backend", BACKENDS)]

HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Tied, the redundant head in the files: it is read to be compared and has no place of its own."""
    root = tmp_path_factory.mktemp("budget")
    options = {"ship_tied_head": True, "num_hidden_layers": 2}
    return [make_checkpoint("qwen3-tied", root / str(seed), seed=seed, **options) for seed in range(2)]


def largest(path) -> int:
    """The head, and the embedding, are the largest tensors and parameters by far."""
    return max(info.num_bytes for info in open_checkpoint(path).tensors.values())


def donating(backend):
    return {"donate": True} if backend == "jax" else {}


def test_what_a_load_reads_beside_the_parameters_counts(backend, paths):
    load, size = import_module(f"{backend}_models").load, largest(paths[0])
    model = load(paths[0], host_budget_bytes=size)
    assert model.digests() == load(paths[0]).digests()
    with pytest.raises(ValueError, match=rf"host_budget_bytes={size - 1} is less than 1 of 1 .* {size} bytes \({HEAD}"):
        load(paths[0], host_budget_bytes=size - 1)
    for wrong in (0, -1, 1.5, True, "1"):
        with pytest.raises(ValueError, match="expected a positive number of bytes"):
            load(paths[0], host_budget_bytes=wrong)


def test_what_is_quantised_while_it_is_read_counts_as_it_is_in_the_files(backend, tmp_path, monkeypatch):
    """All the layers have codes that would fit, from matrices that do not; those of one scale are held at once."""
    load = import_module(f"{backend}_models").load
    path = make_checkpoint("qwen3", tmp_path / "it", **block_sizes("qwen3") | {"vocab_size": 97})
    tensors, layer = open_checkpoint(path).tensors, "model.layers.0"
    groups = [[f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")], ["mlp.gate_proj", "mlp.up_proj"]]
    size = max(sum(tensors[f"{layer}.{name}.weight"].num_bytes for name in group) for group in groups)
    assert size > max(info.num_bytes for name, info in tensors.items() if "_proj" in name)
    assert load(path, quantize="nvfp4", host_budget_bytes=size).digests() == load(path, quantize="nvfp4").digests()
    model = load(path, quantize="nvfp4")
    reloads = [partial(model.update_weights_from_disk, path, **options) for options in ({}, donating(backend))]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "stream", None)
        with pytest.raises(ValueError, match=rf"host_budget_bytes={size - 1} is less than .* {size} bytes .*_proj"):
            load(path, quantize="nvfp4", host_budget_bytes=size - 1)
        for reload in reloads:
            with pytest.raises(ValueError, match=rf"host_budget_bytes={size - 1} is less than .*_proj") as caught:
                reload(host_budget_bytes=size - 1)
    enough = int(re.findall(r"the largest (\d+) bytes", str(caught.value))[0])  # with what codes are put into
    assert size < enough < 2 * size
    assert reloads[-1](host_budget_bytes=enough).version == 2


def test_a_reload_stays_within_it(backend, paths):
    size = largest(paths[0])
    with counted() as memory:
        model = import_module(f"{backend}_models").load(paths[0])
        before = memory.start()
        model = model.update_weights_from_disk(paths[1], host_budget_bytes=size, **donating(backend))
        assert 0 < memory.most - before <= size * (1 if backend == "torch" else 2)
    assert model.version == 2


def test_too_small_a_one_is_refused_before_anything_is_read(backend, paths, monkeypatch):
    model = import_module(f"{backend}_models").load(paths[0])
    before = model.digests()

    def forbidden(*_, **__):
        raise AssertionError("something was read")

    monkeypatch.setattr(Checkpoint, "stream", forbidden)
    with pytest.raises(ValueError, match=r"host_budget_bytes=1000 is less than .* Give a larger budget"):
        model.update_weights_from_disk(paths[1], host_budget_bytes=1000, **donating(backend))
    monkeypatch.undo()
    assert (model.version, model.digests()) == (1, before)


def test_the_stream_is_told(backend, paths, monkeypatch):
    told = []
    real = Checkpoint.stream

    def watched(self, host_budget_bytes=None, **options):
        told.append(host_budget_bytes)
        return real(self, host_budget_bytes, **options)

    monkeypatch.setattr(Checkpoint, "stream", watched)
    import_module(f"{backend}_models").load(paths[0], host_budget_bytes=1 << 24)
    assert set(told) == {1 << 24}


@pytest.mark.parametrize("form", ["one by one", "transposed"])
def test_what_is_quantised_takes_no_more_than_it_may(backend, form, tmp_path, monkeypatch):
    """Measured: tracemalloc sees NumPy's memory, all of which is to come from there."""
    monkeypatch.setattr("loaders.reading.memory.LARGE_BYTES", 1 << 60)
    sizes = {"hidden_size": 1024, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 1, "vocab_size": 160}
    if form == "one by one":
        sizes |= {"intermediate_size": 6144}
        path = make_checkpoint("qwen3", tmp_path / "it", dtype="BF16", **sizes)
        size = 2 * 6144 * 1024 * 2  # gate and up
    else:
        sizes |= {"moe_intermediate_size": 1024, "num_experts": 4, "layer_types": ["full_attention"]}
        sizes |= {"shared_expert_intermediate_size": 32}
        path = make_checkpoint("qwen3_5-moe", tmp_path / "it", dtype="BF16", experts="fused transposed", **sizes)
        size = 4 * 2 * 1024 * 1024 * 2  # of gates and ups of all experts, and one expert more that is turned
        size += size // 4
    load = import_module(f"{backend}_models").load
    load(path, quantize="nvfp4")  # what is compiled and imported is there
    tracemalloc.start()
    try:
        model = load(path, quantize="nvfp4", host_budget_bytes=size)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    parameters = sum(held.nbytes for held in held_by(model))
    assert most - parameters <= size + (8 << 20)
    assert most - parameters > size // 2


def held_by(model):
    return model.parameters() if hasattr(model, "parameters") else jax.tree.leaves(model.weights)
