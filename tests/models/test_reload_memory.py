"""Memory of a reload: beside the weights that are there it holds the largest layer at most, in whatever order it reads.

Counted is all memory that bytes are read into, by the loaders' own allocations; what a step in between would keep by
mistake, a variable or a generator, counts as long as it is kept.
"""

from __future__ import annotations

import json
from importlib import import_module

import numpy as np
import pytest
from lives import BACKENDS
from safetensors.torch import load_file, save_file

from loaders import open_checkpoint
from parity.lifecycle.staged_memory import counted, largest_layer
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint

pytestmark = pytest.mark.usefixtures("young_heap")

SIZES = {**block_sizes("qwen3-moe", aligned=True), "num_hidden_layers": 5, "mlp_only_layers": []}


@pytest.fixture(scope="module")
def as_written(tmp_path_factory):
    root = tmp_path_factory.mktemp("as-written")
    return make_checkpoint("qwen3-moe", root / "A", quantization=ZooQuantization(unify=False), **SIZES)


def in_three_files(path, directory):
    """The same tensors layer by layer, cut where the bytes fall, as Hugging Face saves them."""
    directory.mkdir()
    tensors = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    names = sorted(tensors, key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")[2:3]])
    ends = np.cumsum([tensors[name].nbytes for name in names])
    files = [f"model-{int(end * 3 / (ends[-1] + 1)) + 1:05d}-of-00003.safetensors" for end in ends]
    for file in set(files):
        save_file(
            {name: tensors[name] for name, one in zip(names, files, strict=True) if one == file}, directory / file
        )
    index = {"metadata": {}, "weight_map": dict(zip(names, files, strict=True))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in path.glob("*.json"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def growth(backend, paths, **options):
    """The most that a reload of the last of ``paths`` holds beside the model loaded from the first."""
    with counted() as memory:
        model = import_module(f"{backend}_models").load(paths[0], **options)
        before = memory.start()
        model = model.update_weights_from_disk(paths[-1], **({"donate": True} if backend == "jax" else {}))
        assert model.version == 2
        return memory.most - before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow_unless("torch")
def test_a_reload_holds_the_largest_layer_at_most(backend, as_written, tmp_path):
    for path in (as_written, in_three_files(as_written, tmp_path / "three")):
        assert 0 < growth(backend, [as_written, path]) <= largest_layer(open_checkpoint(path))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow_unless("torch")
def test_so_does_one_that_quantises_while_it_reads(backend, as_written, tmp_path):
    """The matrices of one group, as they come, are part of it."""
    path = make_checkpoint("qwen3-moe", tmp_path / "plain", dtype="BF16", **SIZES)
    assert 0 < growth(backend, [path], quantize="nvfp4") <= largest_layer(open_checkpoint(as_written))
