"""What a notebook shows of a model or a checkpoint: a line, and never its weights."""

from __future__ import annotations

import numpy as np
import pytest

import jax_models
import torch_models
from loaders import CheckpointError, open_checkpoint
from loaders.quantization.quantize import quantized
from parity.zoo import block_sizes, make_checkpoint
from parity.zoo.adapters import make_adapter


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("repr") / "a", dtype="BF16", **block_sizes("qwen3"))


def test_a_checkpoint_says_where_it_is_and_what(directory):
    checkpoint = open_checkpoint(directory)
    said = f"Qwen3ForCausalLM, {len(checkpoint.tensors)} tensors, "
    assert repr(checkpoint).startswith(f"Checkpoint({str(directory)!r}, {said}")
    assert repr(quantized(checkpoint)).startswith(f"QuantizedCheckpoint({str(directory)!r}, Qwen3ForCausalLM, ")
    with pytest.raises(CheckpointError, match="it is a Checkpoint, expected a path or an address") as caught:
        torch_models.load(checkpoint)
    assert len(str(caught.value)) < 400


def test_a_jax_model_says_its_version_also_when_its_weights_were_given_up(directory, tmp_path):
    model = jax_models.load(directory)
    _, cache = model.prefill([[1, 2]], max_new_tokens=2)
    after = model.update_weights_from_disk(directory, donate=True)
    assert "Qwen3ForCausalLM, version 2, 47 weights of " in repr(after)
    assert "version 1" in repr(model)
    adapter = make_adapter(directory, tmp_path / "adapter")
    for asked in (
        lambda: model([[1, 2]]),
        lambda: model.generate([[1, 2]]),
        lambda: model.decode([3], cache),
        lambda: model.attach_lora(adapter),
        lambda: model.set_embed_and_head(np.zeros((2, 2), np.float32)),
        model.get_embed_and_head,
        model.digests,
        lambda: model.export(tmp_path / "export"),
        lambda: model.save(tmp_path / "save"),
    ):
        with pytest.raises(RuntimeError, match=r"47 of 47 weights of version 1 were given up to an update"):
            asked()
    assert len(repr(after)) < 120
