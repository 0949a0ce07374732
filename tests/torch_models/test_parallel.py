"""Ranks of a mesh are one model: each holds its part of the weights, and all say what one device says."""

from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch.distributed as dist
from several import error, run_several
from torch.distributed.device_mesh import init_device_mesh

import torch_models
from loaders import open_checkpoint
from loaders.checkpoint import NUM_SAMPLES, SAMPLE_BYTES
from parity.oracle import oracle_forward
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint, prompts
from parity.zoo.adapters import DENSE, EXPERTS, TABLES, make_adapter
from parity.zoo.draft import make_drafting_checkpoint
from parity.zoo.pictures import pictures
from torch_models.coordination import Coordinator

FINGERPRINT_BYTES = NUM_SAMPLES * SAMPLE_BYTES
PROGRAM = Path(__file__).with_name("one_rank.py")
EVEN = {"vocab_size": 208, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
EVEN_VL = EVEN | {"num_hidden_layers": 4, "num_experts": 4}
HYBRID = {"vocab_size": 208, "num_attention_heads": 8, "num_key_value_heads": 4}
HYBRID |= {"linear_num_key_heads": 4, "linear_num_value_heads": 8}  # of which a rank has several, each for several
CODES = block_sizes("qwen3") | EVEN | {"intermediate_size": 96}
EXPERT_CODES = block_sizes("qwen3-moe") | EVEN | {"num_experts": 4, "moe_intermediate_size": 96}
HYBRID_CODES = block_sizes("qwen3_5-moe") | HYBRID | {"num_experts": 4, "shared_expert_intermediate_size": 96}
THREE = {"num_attention_heads": 6, "num_key_value_heads": 3}
TWO = {"num_attention_heads": 8, "num_key_value_heads": 2}
BY_BOTH = {"expert": 2, "tensor": 2}
# zoo model and its sizes, axes of the mesh, most of the weights that a rank may hold, options of load
CASES: dict[str, tuple] = {
    "qwen3": ("qwen3", EVEN, {"tensor": 2}, 0.52),
    "tied": ("qwen3-tied", EVEN, {"tensor": 2}, 0.52),
    "experts apart": ("qwen3-moe", EVEN | {"num_experts": 4}, {"expert": 2}, 0.55),
    "experts and width apart": ("qwen3-moe", EVEN | {"num_experts": 4}, {"expert": 2, "tensor": 2}, 0.3),
    "axes the other way round": ("qwen3-moe", EVEN | {"num_experts": 4}, {"tensor": 2, "expert": 2}, 0.3),
    "gemma3": ("gemma3", {"vocab_size": 208, "num_attention_heads": 4, "num_key_value_heads": 2}, {"tensor": 2}, 0.55),
    "a tower that is whole": ("qwen3_vl-moe", EVEN_VL, {"expert": 2}, 0.9),
    "hybrid": ("qwen3_5", HYBRID, {"tensor": 2}, 0.52),
    "hybrid, its experts apart": ("qwen3_5-moe", HYBRID | {"num_experts": 4}, {"expert": 2}, 0.54),
    "hybrid, key heads too few for all": (
        "qwen3_5-moe",
        HYBRID | {"num_experts": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
        {"expert": 2, "tensor": 2},
        0.36,
    ),
    "hybrid of odd key heads": (
        "qwen3_5",
        HYBRID | {"linear_num_key_heads": 3, "linear_num_value_heads": 6},
        {"tensor": 2},
        0.7,
    ),
    "hybrid that sees": ("qwen3_5-moe-wrapped", HYBRID | {"num_experts": 4}, {"tensor": 2}, 0.8),
    "nothing divides": (
        "qwen3",
        {"num_hidden_layers": 2, "intermediate_size": 55, "num_attention_heads": 9},
        {"tensor": 2},
        1.0,
    ),
    # key heads whole on every rank: of six query heads three ask for two keys, two of them for one
    "keys too few": ("qwen3-bias", EVEN | THREE, {"tensor": 2}, 0.58),
    "half as many keys as ranks": ("qwen3", EVEN | TWO, {"tensor": 4}, 0.32),
    "keys cut by one axis of two": ("qwen3-moe", EVEN | TWO | {"num_experts": 4}, BY_BOTH, 0.3),
    "gemma3, keys too few": ("gemma3-capped", {"vocab_size": 208} | THREE, {"tensor": 2}, 0.6),
    "a tower, and keys too few": ("qwen3_vl-moe", EVEN_VL | THREE, {"expert": 2}, 0.85),
    "hybrid, keys too few": ("qwen3_5", HYBRID | THREE, {"tensor": 2}, 0.54),
    "hybrid, keys cut by one axis of two": ("qwen3_5-moe", HYBRID | TWO | {"num_experts": 4}, BY_BOTH, 0.29),
    "codes, keys too few": (
        "qwen3",
        CODES | THREE | {"quantization": ZooQuantization(fp8=("*.1.self_attn.*",), kv_cache=True, unify=False)},
        {"tensor": 2},
        0.6,
    ),
    "codes of a hybrid, keys too few": (
        "qwen3_5-moe",
        HYBRID_CODES | THREE | {"linear_value_head_dim": 16, "quantization": ZooQuantization(activations=False)},
        {"expert": 2},
        0.54,
    ),
    "quantised while read, keys cut by one axis of two": (
        "qwen3-moe",
        EXPERT_CODES | TWO,
        BY_BOTH,
        0.35,
        {"quantize": "nvfp4"},
    ),
    "codes": ("qwen3", CODES | {"quantization": ZooQuantization(activations=False)}, {"tensor": 2}, 0.52),
    "codes, 8 bits and rounded inputs": (
        "qwen3",
        CODES | {"quantization": ZooQuantization(fp8=("*.o_proj", "*.1.mlp.*"), kv_cache=True, head=True, unify=False)},
        {"tensor": 2},
        0.52,
    ),
    "codes in an order of a kernel's": (
        "qwen3",
        block_sizes("qwen3", aligned=True) | {"vocab_size": 208, "quantization": ZooQuantization(head=True)},
        {"tensor": 2},
        0.55,
        {"kernel": "reference-128x4"},
    ),
    "codes of experts": (
        "qwen3-moe",
        EXPERT_CODES | {"quantization": ZooQuantization(unify=False)},
        BY_BOTH,
        0.31,
    ),
    "codes of experts in other words": (
        "qwen3-moe",
        EXPERT_CODES | {"quantization": ZooQuantization(spelling="compressed-tensors", activations=False)},
        {"expert": 2},
        0.55,
    ),
    "codes of a hybrid": (
        "qwen3_5-moe",
        HYBRID_CODES | {"linear_value_head_dim": 16, "quantization": ZooQuantization(activations=False)},
        BY_BOTH,
        0.37,
    ),
    # 7 blocks, of which no rank has half; and 9 heads
    "codes in blocks that nothing divides": (
        "qwen3",
        block_sizes("qwen3") | {"vocab_size": 208, "quantization": ZooQuantization(activations=False)},
        {"tensor": 2},
        0.9,
    ),
    # of value heads of 8 two are a block, and so are heads of 24 two thirds
    "codes across heads": (
        "qwen3_5",
        block_sizes("qwen3_5") | HYBRID | {"head_dim": 24, "quantization": ZooQuantization(activations=False)},
        {"tensor": 2},
        0.9,
    ),
    "quantised while read": ("qwen3-moe", EXPERT_CODES, BY_BOTH, 0.31, {"quantize": "nvfp4"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_are_one_model(case, tmp_path):
    name, sizes, axes, most, *given = CASES[case]
    options = given[0] if given else {}
    paths = [make_checkpoint(name, tmp_path / f"checkpoint{seed}", seed=seed, **sizes) for seed in range(2)]
    bad = make_checkpoint(name, tmp_path / "bad", **sizes | {"rms_norm_eps": 0.5})
    one = torch_models.load(paths[0], **options)
    inputs = prompts(one.config, rows=4, tokens=24) if one.config.vision is None else pictures(one.config, tokens=48)
    job = {
        "axes": axes,
        "options": options,
        "checkpoints": [str(path) for path in paths],
        "bad": str(bad),
        "inputs": {key: value.tolist() for key, value in inputs.items()},
    }
    tap = job["tap"] = f"{one.config.text_paths[0]}.layers.0.mlp"
    count = math.prod(axes.values())
    found = run_several(PROGRAM, job, tmp_path, count)
    real = inputs["attention_mask"].astype(bool)
    tokens = one.generate(**inputs, max_new_tokens=4, ignore_eos=True).tolist()
    alone = one.generate(inputs["input_ids"][2:3], max_new_tokens=4, ignore_eos=True).tolist()
    stored = sum(info.num_bytes for info in open_checkpoint(paths[0]).tensors.values())
    around = (sum(file.stat().st_size for file in paths[0].iterdir()) - stored) / one.report.num_bytes  # headers
    around += FINGERPRINT_BYTES / one.report.num_bytes
    logits = {"logits": one(**inputs).numpy().copy()}
    digests = [one.digests(), one.update_weights_from_disk(paths[1]).digests()]
    logits["changed"] = one(**inputs).numpy()
    _, taps = one.with_taps(**inputs, level="modules")
    injected, _ = one.with_taps(**inputs, inject={tap.replace("layers.0", "layers.1"): taps[tap]})
    for each in found:
        assert each["held"] <= most
        assert each["read"] <= most + around or "quantize" in options  # scales are of whole matrices, which are read
        assert (each["tokens"], each["one by one"]) == (tokens, alone)
        assert [each["digests"], each["changed digests"]] == digests
        assert each["embed"]
        assert each["its own"] == [1, 1]  # what was handed over is what is there: nothing is published
        assert "expected" in each["a part of it"]
        assert "head must be the embedding" in each.get("an old head", "head must be the embedding")
        assert each["swapped"]
        assert each["moved"] == []
        assert each["still serving"]
        assert each["back"]
        assert each["slept"]
        assert "rms_norm_eps is 0.5" in each["bad on one"]
        assert "FileExistsError" in each["export again"]
        for what in ("graphs", "taps"):
            assert "is cut over a mesh" in each[what]
    assert found[0]["bad on one"].startswith(f"RuntimeError: {count - 1} of {count} ranks failed")
    with np.load(tmp_path / "logits.npz") as saved:
        for (key, expected), path in zip(logits.items(), paths, strict=True):
            exact = oracle_forward(open_checkpoint(path), **inputs)["logits"]
            rounding = error(expected[real], exact[real])  # up to 4e-6 with gated delta nets
            assert error(saved[key][real], expected[real]) < 2 * max(rounding, 1e-6)
        assert set(saved) == {*logits, "injected", *taps}
        for key, value in {"injected": injected, **taps}.items():
            assert error(saved[key][real], value.numpy()[real]) < 1e-5, key  # a part that is missing is not small
    exported = one.export(tmp_path / "alone")
    assert {file.name: file.read_bytes() for file in exported.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()
    }


ADAPTED_MOE = EVEN | {"num_experts": 4}
# zoo model and its sizes, axes of the mesh, what an adapter has beside an update of linear layers, of which all are cut
ADAPTED: dict[str, tuple] = {
    "dense": ("qwen3-bias", EVEN, {"tensor": 2}, {"targets": (*DENSE, *TABLES), "base_layer": True}),
    "tied": ("qwen3-tied", EVEN, {"tensor": 2}, {"targets": (*DENSE, "lm_head")}),
    "odd heads and a table of its own": (
        "qwen3",
        {"vocab_size": 208, "num_hidden_layers": 2, "num_attention_heads": 9},
        {"tensor": 2},
        {"whole": ("embed_tokens", "k_proj", "down_proj", "norm")},
    ),
    "keys too few": (
        "qwen3-bias",
        EVEN | THREE,
        {"tensor": 2},
        {"targets": (*DENSE, *TABLES), "base_layer": True},
    ),
    "a key that two ranks ask for, of its own": (
        "qwen3-moe",
        ADAPTED_MOE | TWO,
        {"tensor": 4},
        {"targets": ("q_proj", "v_proj", "o_proj"), "whole": ("k_proj",)},
    ),
    "experts": (
        "qwen3-moe",
        ADAPTED_MOE,
        BY_BOTH,
        {"targets": (*DENSE, "mlp.gate"), "parameters": EXPERTS, "whole": ("lm_head",)},
    ),
    "experts apart": ("qwen3-moe", ADAPTED_MOE, {"expert": 2}, {"parameters": EXPERTS[1:], "whole": ("mlp.gate",)}),
    "hybrid": (
        "qwen3_5-moe",
        HYBRID | {"num_experts": 4},
        {"tensor": 2},
        {"targets": "all-linear", "parameters": EXPERTS, "whole": ("conv1d",)},
    ),
    "over codes": (
        "qwen3-moe",
        EXPERT_CODES | {"quantization": ZooQuantization(activations=False, head=True)},
        BY_BOTH,
        {"targets": DENSE[:3], "parameters": EXPERTS, "whole": ("o_proj", "lm_head")},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ADAPTED)
def test_ranks_are_adapted_as_one_model(case, tmp_path):
    name, sizes, axes, changes = ADAPTED[case]
    paths = [make_checkpoint(name, tmp_path / f"checkpoint{seed}", seed=seed, **sizes) for seed in range(2)]
    adapters = [
        make_adapter(paths[0], tmp_path / "a", **changes),
        make_adapter(paths[0], tmp_path / "b", seed=1, rank=3),
        make_adapter(paths[0], tmp_path / "c", seed=2, rank=12, targets=DENSE[:1]),  # of more rank than there is room
    ]
    one = torch_models.load(paths[0])
    inputs = prompts(one.config, rows=4, tokens=24)
    job = {
        "axes": axes,
        "checkpoints": [str(path) for path in paths],
        "adapters": [str(adapter) for adapter in adapters],
        "inputs": {key: value.tolist() for key, value in inputs.items()},
    }
    found = run_several(PROGRAM.with_name("one_adapted_rank.py"), job, tmp_path, math.prod(axes.values()))
    real, rows = inputs["attention_mask"].astype(bool), ["a", None, "b", "a"]
    expected = {"base": one(**inputs).numpy().copy()}
    one.attach_lora(adapters[0], "a").attach_lora(adapters[1], "b")
    expected["mixed"] = one(**inputs, adapter=rows).numpy().copy()
    tokens = one.generate(**inputs, adapter=rows, max_new_tokens=4, ignore_eos=True).tolist()
    one.attach_lora(adapters[2], "b")
    expected["in its place"] = one(**inputs).numpy().copy()
    one.update_weights_from_disk(paths[1])
    expected["reloaded"] = one(**inputs, adapter=rows).numpy().copy()
    one.update_weights_from_disk(paths[0])
    is_merged = "quantization" not in sizes and "tied" not in name
    digests = [one.digests()]
    if is_merged:
        digests.append(one.merge_lora("a").digests())
        expected["merged"] = one(**inputs).numpy().copy()
        exported = one.export(tmp_path / "alone")
        assert {file.name: file.read_bytes() for file in exported.iterdir()} == {
            file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()
        }
    for each in found:
        assert each["tokens"] == tokens
        assert "/nowhere" in each["nowhere on one"]
        assert "the adapter that was found is not the same on all ranks" in each["different"]
        assert "out of memory" in each["no room on one"]
        assert "out of memory" in each["half written on one"]
        assert "what is asked for is not the same on all ranks: detach 'b', version 3" in each["other names"]
        assert each["still serving"]
        assert each["moved"] == []
        assert each["digests"] == digests
        assert "cannot be merged" in each["merge"] if not is_merged else each["merge"] == "none"
        assert each["detached"]
        assert each["slept"]
        assert ("out of memory" if is_merged else "cannot be merged") in each["merge failed on one"]
        assert each["untouched"]
    with np.load(tmp_path / "logits.npz") as saved:
        assert set(saved) == set(expected)
        for key, value in expected.items():
            assert error(saved[key][real], value[real]) < 1e-5, key
            assert key == "base" or error(value[real], expected["base"][real]) > 0.05, key


@pytest.mark.slow
@pytest.mark.parametrize(("name", "heads"), [("qwen3_5-tied", {}), ("qwen3_5-moe", {}), ("qwen3_5-tied", THREE)])
def test_ranks_draft_as_one_model(name, heads, tmp_path):
    sizes = HYBRID | ({"num_experts": 4} if "moe" in name else {}) | heads
    paths = [make_drafting_checkpoint(name, tmp_path / f"checkpoint{seed}", seed=seed, **sizes) for seed in range(2)]
    one, other = (torch_models.load(path, mtp=True) for path in paths)
    adapter = make_adapter(paths[0], tmp_path / "adapter", targets=(*DENSE, *TABLES))
    inputs = prompts(one.config, rows=3, tokens=24)
    job = {
        "axes": {"expert": 2},
        "checkpoints": [str(path) for path in paths],
        "adapter": str(adapter),
        "inputs": {key: value.tolist() for key, value in inputs.items()},
    }
    found = run_several(PROGRAM.with_name("one_drafting_rank.py"), job, tmp_path, 2)

    def generated(draft, **options):
        tokens = draft.target.generate(**inputs, max_new_tokens=12, ignore_eos=True, draft=draft, **options)
        return [tokens.tolist(), [draft.report.rounds, draft.report.accepted]]

    expected = {
        "greedy": generated(one.draft),
        "sampled": generated(one.draft, temperature=0.8, seed=3),
        "adapted": generated(one.attach_lora(adapter).draft),
        "detached": generated(one.detach_lora().draft),
        "of another": generated(other.draft.bind(one)),
        "updated": generated(other.draft),
        "digests": one.digests(),
    }
    assert expected["adapted"][0] != expected["greedy"][0]
    assert expected["greedy"][1][1] > 0  # a draft that is never right would not show what undoing does
    for each in found:
        assert {key: each[key] for key in expected} == expected
        assert each["held"] < 0.56
        assert each["bad input"].startswith("ValueError")
        for text in each["bound across"]:
            assert "the draft is cut over mesh" in text
    real = inputs["attention_mask"][:, 1:].astype(bool)
    exact = oracle_forward(open_checkpoint(paths[0]), **inputs, mtp=True)
    with np.load(tmp_path / "said.npz") as saved:
        for said, part, name in zip(saved.values(), one.mtp_forward(**inputs), ("logits", "hidden_state"), strict=True):
            alone = part.numpy()[real]
            rounding = error(alone, exact[f"mtp.{name}"][real])
            assert error(said[real], alone) < 2 * max(rounding, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["gloo", None])
def test_a_rank_that_fails_alone_is_an_error_of_all_within_seconds(backend, tmp_path):
    """``None``: that which torch takes for each kind of device, and calls by no name."""
    paths = [make_checkpoint("qwen3", tmp_path / str(seed), seed=seed, **EVEN) for seed in range(2)]
    job = {"checkpoints": [str(path) for path in paths], "input_ids": [[3, 14, 15, 92]] * 2, "backend": backend}
    found = run_several(PROGRAM.with_name("one_failing_rank.py"), job, tmp_path, 2)
    for each in found:
        assert "the ranks of mesh [1, 0] do not rise along 'tensor'" in each["falling ranks"]
        assert "/nowhere" in each["bad checkpoint"]
        assert [text.partition(":")[0] for text in each["bad input"]] == ["ValueError"] * 2
        assert each["still in step"]
        assert each["half an update"].startswith("RuntimeError: ")
        assert "the disk is gone" in each["half an update"]
        assert "the model refuses to run: an update of" in each["of two versions"]
        assert each["updated again"]
        assert "the device is gone" in each["half a swap"]
        assert "the model refuses to run: an update of" in each["of two tables"]
        assert each["brought back"]
        assert each["two calls"][0].startswith("ValueError: bad")
        assert each["two calls"][1] == "none"
        assert "out of memory" in each["in the middle"]
        assert each["seconds"] < 60
        assert all("The ranks are out of step: start them again." in text for text in each["out of step"])
    assert found[0]["in the middle"].startswith(
        "RuntimeError: rank 1 failed in the middle of a call: RuntimeError: out"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("interrupted", "rank 1 failed in the middle of a call: KeyboardInterrupt"),
        ("with its part done", "rank 1 failed in the middle of a call: RuntimeError: out of memory"),
        ("late", "ranks [1] did not come within 3 s. Did it fail earlier, or is it making another call? See its log."),
        ("killed", "a rank is gone"),
    ],
)
def test_who_waits_for_a_rank_that_does_not_do_its_part_is_told_why(how, why, tmp_path):
    paths = [make_checkpoint("qwen3", tmp_path / str(seed), seed=seed, **EVEN) for seed in range(2)]
    job = {"checkpoints": [str(path) for path in paths], "input_ids": [[3, 14, 15, 92]] * 2, "how": how}
    found = run_several(PROGRAM.with_name("one_lost_rank.py"), job, tmp_path, 2)
    is_done = how == "with its part done"  # the first call of the rank that waits is whole then
    assert (found[0]["told"][0] == "none") is is_done
    assert f"RuntimeError: {why}" in found[0]["told"][is_done]
    assert all("start them again" in text for text in found[0]["told"][1 + is_done :])
    if how != "killed":
        assert all("start them again" in text for text in found[1]["told"][1:])
    assert found[0]["seconds"] < 60


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """torch.distributed of one rank, which is enough to be refused."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "it"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_comes_while_one_looks_why_it_does_not_is_no_failure(alone):
    """It is done when it is asked again, and says so itself; where it failed, it says that."""
    late = RuntimeError("timed out")
    come = Mock(**{"is_completed.side_effect": [False, True], "wait.side_effect": [late, None]})
    Coordinator().finish(come, "cpu")
    gone = Mock(
        **{"is_completed.side_effect": [False, True], "wait.side_effect": [late, RuntimeError("closed by peer")]}
    )
    lost = Coordinator()
    with pytest.raises(RuntimeError, match="a rank is gone: closed by peer"):
        lost.finish(gone, "cpu")
    with pytest.raises(RuntimeError, match="out of step"), lost.call():
        pass


def test_a_mesh_of_one_rank_cuts_nothing(alone, tmp_path):
    path = make_checkpoint("qwen3", tmp_path / "it")
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tensor",))
    ours, plain = torch_models.load(path, mesh=mesh), torch_models.load(path)
    assert np.array_equal(ours([[3, 14, 15]]).numpy(), plain([[3, 14, 15]]).numpy())
    assert ours.digests() == plain.digests()


@pytest.mark.parametrize("names", [None, ("model",)])
def test_axes_without_meaning_are_a_value_error(alone, names, tmp_path):
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=names)
    with pytest.raises(ValueError, match="expected names among expert, tensor"):
        torch_models.load(make_checkpoint("qwen3", tmp_path / "it"), mesh=mesh)
