"""The life of the weights of a torch model: load, swap, replace, reload, export, and the stages of a pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_checkpoints import (
    EMBED,
    HEAD,
    IDS,
    Make,
    assert_same_checkpoint,
    broken_copy,
    one_bit,
    random_table,
    tensors_of,
)
from torch_bits import bits

import torch_models
from loaders import CheckpointError, open_checkpoint
from loaders.reading.place import weight_loader
from torch_models.census import pointer_census
from torch_models.weights import parameters

# load


@pytest.mark.parametrize(("name", "num_files"), [("qwen3", 2), ("qwen3-bias", 2), ("qwen3-moe", 2), ("qwen3-tied", 2)])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_export_gives_back_the_checkpoint(make: Make, tmp_path: Path, name: str, num_files: int, dtype: str) -> None:
    source = make(name, dtype=dtype)
    assert len(tensors_of(source)) >= num_files
    assert_same_checkpoint(torch_models.load(source).export(tmp_path / "out"), source)


@pytest.mark.parametrize(
    ("stored", "asked", "computed"),
    [
        ("F32", None, "float32"),
        ("BF16", None, "bfloat16"),
        ("F16", None, "float32"),
        ("F32", "bfloat16", "bfloat16"),
        ("BF16", "float32", "float32"),
        ("F16", torch.bfloat16, "bfloat16"),
    ],
)
def test_dtype_is_what_is_computed_in_and_parameters_keep_their_own(
    make: Make, tmp_path: Path, stored: str, asked, computed: str
) -> None:
    source = make("qwen3", dtype=stored)
    model = torch_models.load(source, dtype=asked)
    kept = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[stored]
    assert model.dtype == getattr(torch, computed)
    assert {param.dtype for param in model.parameters()} == {getattr(torch, kept)}
    assert not any(param.requires_grad for param in model.parameters())
    assert_same_checkpoint(model.export(tmp_path / "out"), source)


def test_a_float32_checkpoint_computed_in_bfloat16_runs_in_bfloat16(make: Make) -> None:
    model = torch_models.load(make(num_hidden_layers=1), dtype="bfloat16")
    logits_BTV, taps = model.with_taps(IDS)
    assert logits_BTV.dtype == torch.float32
    assert {value.dtype for value in taps.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "not float32"])
def test_a_dtype_that_is_not_computed_in_is_refused(make: Make, dtype: str) -> None:
    with pytest.raises(ValueError, match=f"dtype {dtype} is not computed in, expected one of float32, bfloat16"):
        torch_models.load(make(), dtype=dtype)


def test_the_report_counts_what_was_loaded(make: Make) -> None:
    source = make()
    found = open_checkpoint(source)
    report = torch_models.load(source).report
    assert report.num_tensors == len(found.tensors) == sum(map(len, tensors_of(source).values()))
    assert report.num_bytes == sum(len(t[2]) for file in tensors_of(source).values() for t in file.values())
    assert (report.verified, report.left_out, report.other_stages) == ((), (), 0)
    parts = [torch_models.load(source, stage=(index, 2)).report for index in range(2)]
    assert sum(part.num_tensors for part in parts) == len(found.tensors)
    assert [part.other_stages for part in parts] == [len(found.tensors) - part.num_tensors for part in parts]
    experts = torch_models.load(make("qwen3-moe"))
    assert experts.report.num_tensors == len(open_checkpoint(make("qwen3-moe")).tensors)
    assert experts.report.num_tensors > len(list(experts.parameters()))  # experts are stacked


def test_a_redundant_tied_head_is_verified_and_exported_again(make: Make, tmp_path: Path) -> None:
    source = make("qwen3-tied", ship_tied_head=True)
    model = torch_models.load(source)
    assert model.report.verified == (HEAD,)
    assert HEAD not in parameters(model)
    assert_same_checkpoint(model.export(tmp_path / "a"), source)
    changed = model.set_embed_and_head(random_table(3)).export(tmp_path / "b")
    found = {name: value for file in tensors_of(changed).values() for name, value in file.items()}
    assert found[HEAD] == found[EMBED]
    assert found[EMBED][2] == random_table(3).tobytes()


def test_a_tied_head_that_differs_in_one_bit_is_refused(make: Make, tied: torch_models.Model, tmp_path: Path) -> None:
    source = broken_copy(make("qwen3-tied", ship_tied_head=True), tmp_path / "a", one_bit(HEAD))
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true, but 'lm_head.weight' differs"):
        torch_models.load(source)
    before, census = tied.digests(), pointer_census(tied)
    with pytest.raises(CheckpointError, match="differs"):
        tied.update_weights_from_disk(source)
    assert (tied.digests(), pointer_census(tied), tied.version) == (before, census, 1)
    tied(IDS)


def test_ids_by_position_are_a_type_error() -> None:
    param, weight = np.zeros((2, 3, 4), np.float32), np.ones((3, 4), np.float32)
    with pytest.raises(TypeError, match="positional"):
        weight_loader(param, weight, 1)
    weight_loader(param, weight, shard_id=1)
    assert param[:, 0, 0].tolist() == [0, 1]


# reload


def test_a_reload_changes_everything_and_moves_nothing(make: Make, tmp_path: Path) -> None:
    a, b = make(), make(seed=1)
    model = torch_models.load(a)
    before, digests, census = model(IDS), model.digests(), pointer_census(model)
    params = dict(model.named_parameters())
    assert model.update_weights_from_disk(b) is model
    assert (model.version, model.events[-1].kind) == (2, "reload")
    assert model.report.num_tensors == len(open_checkpoint(b).tensors)
    assert_same_checkpoint(model.export(tmp_path / "b"), b)
    assert bits(model(IDS)) == bits(torch_models.load(b)(IDS)) != bits(before)
    assert not {name for name, digest in model.digests().items() if digest == digests[name]}
    model.update_weights_from_disk(a)
    assert_same_checkpoint(model.export(tmp_path / "a"), a)
    assert (bits(model(IDS)), model.digests()) == (bits(before), digests)
    assert pointer_census(model) == census
    assert all(param is params[name] for name, param in model.named_parameters())


def test_a_reload_made_twice_is_the_reload_made_once(make: Make) -> None:
    model = torch_models.load(make("qwen3-moe")).update_weights_from_disk(make("qwen3-moe", seed=1))
    once = model.digests()
    model.update_weights_from_disk(make("qwen3-moe", seed=1))
    assert (model.version, model.digests()) == (3, once)
    assert once == torch_models.load(make("qwen3-moe", seed=1)).digests()


def test_a_reload_that_would_change_the_computation_is_refused_by_name(make: Make, dense: torch_models.Model) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    other = make(seed=1, rms_norm_eps=1e-5, rope_parameters=rope, attention_bias=True)
    before, census = dense.digests(), pointer_census(dense)
    with pytest.raises(CheckpointError) as caught:
        dense.update_weights_from_disk(other)
    for key in ("rms_norm_eps is 1e-05, expected 0.0003", "rope_parameters", "attention_bias is True, expected False"):
        assert f"config.json: {key}" in str(caught.value)
    assert "model.layers.2.self_attn.q_proj.bias' of" in str(caught.value)
    for refused in (make("qwen3-tied"), make("qwen3-moe"), make(vocab_size=212), make(dtype="BF16")):
        with pytest.raises(CheckpointError, match="as it is live"):
            dense.update_weights_from_disk(refused)
    assert (dense.digests(), pointer_census(dense), dense.version) == (before, census, 1)


def test_a_reload_may_say_otherwise_of_windows_that_no_layer_has(make: Make) -> None:
    words = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 4}
    model = torch_models.load(make("qwen3")).update_weights_from_disk(make("qwen3", seed=1, **words))
    assert model.digests() == torch_models.load(make("qwen3", seed=1)).digests()


def test_a_reload_may_change_how_generation_ends(make: Make, dense: torch_models.Model) -> None:
    dense.update_weights_from_disk(make(eos_token_id=[7, 9]))
    assert dense.checkpoint.eos_token_ids == (7, 9)


def test_a_broken_checkpoint_leaves_the_old_weights_serving(
    make: Make, dense: torch_models.Model, tmp_path: Path
) -> None:
    before = bits(dense(IDS))
    gone = ("model.norm.weight", "model.layers.1.mlp.up_proj.weight")

    def drop(tensors: dict[str, np.ndarray]) -> None:
        for name in gone:
            tensors.pop(name, None)

    source = broken_copy(make(seed=1), tmp_path / "gone", drop)
    with pytest.raises(CheckpointError) as caught:
        dense.update_weights_from_disk(source)
    assert all(name in str(caught.value) for name in gone)
    assert (bits(dense(IDS)), dense.version) == (before, 1)


def test_a_write_that_fails_half_way_makes_the_model_refuse_until_a_good_load(
    make: Make, dense: torch_models.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    norm = dense.get_parameter("model.norm.weight")
    real = torch.Tensor.copy_

    def faulty(self: torch.Tensor, value: torch.Tensor, **options: bool) -> torch.Tensor:
        if self is norm:
            raise RuntimeError("device fault")
        return real(self, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", faulty)
        with pytest.raises(RuntimeError, match="device fault"):
            dense.update_weights_from_disk(make(seed=1))
    assert dense.version == 1
    for call in (dense, dense.with_taps, dense.prefill, dense.generate):
        with pytest.raises(RuntimeError, match="refuses to run: an update of 36 parameters did not finish"):
            call(IDS)
    with pytest.raises(RuntimeError, match="refuses to run"):  # it would publish the mixture
        dense.set_embed_and_head(random_table(1), random_table(2))
    with pytest.raises(RuntimeError, match="refuses to run"):
        dense.export(tmp_path / "mixture")
    assert not (tmp_path / "mixture").exists()
    dense.update_weights_from_disk(make(seed=1))
    assert bits(dense(IDS)) == bits(torch_models.load(make(seed=1))(IDS))
