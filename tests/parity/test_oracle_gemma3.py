"""The oracle of Gemma 3 against transformers, which ignores a cap on scores: its eager attention is told it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import distances, float32_islands_widened, reference_forward, relative_error
from transformers import Gemma3ForCausalLM
from transformers.models.gemma3 import modeling_gemma3

from loaders import Checkpoint, open_checkpoint
from parity.oracle import oracle_forward
from parity.oracles.pieces import attend, gelu_tanh
from parity.zoo import ZOO, make_checkpoint, prompts

B, T = 3, 96  # four windows
FULL, SLIDING = "full_attention", "sliding_attention"
ROPE = ZOO["gemma3"].config["rope_parameters"]
YARN = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# zoo name and what is changed in it
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("gemma3", {}),
    "capped": ("gemma3-capped", {}),
    "untied": ("gemma3", {"tie_word_embeddings": False}),
    "untied biased final cap": (
        "gemma3",
        {"tie_word_embeddings": False, "attention_bias": True, "final_logit_softcapping": 5.0},
    ),
    "cap of scores alone": ("gemma3", {"attn_logit_softcapping": 1.5}),
    "one kv head": ("gemma3", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 18}),
    "yarn": ("gemma3", {"rope_parameters": ROPE | {FULL: YARN}}),
    "bfloat16": ("gemma3", {"dtype": "BF16"}),
}
Make = Callable[[str], Checkpoint]
BATCHES = ("left", "right", "full", "far")
# transformers in float32: the worst tensor of each case
FLOAT32_BOUND = 2e-5
# the same code in float64
FLOAT64_BOUND = 3e-14


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    @cache
    def make(case: str) -> Checkpoint:
        name, options = CASES[case]
        return open_checkpoint(make_checkpoint(name, tmp_path_factory.mktemp(name) / "checkpoint", **options))

    return make


def batch(checkpoint: Checkpoint, kind: str) -> dict[str, Any]:
    padding = kind if kind in ("left", "right") else None
    inputs: dict[str, Any] = prompts(checkpoint.config, rows=B, tokens=T, padding=padding)
    if kind == "far":
        inputs["position_ids"] = np.cumsum(np.random.default_rng(3).integers(1, 40, (B, T)), axis=1)
    return inputs


def model_of(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    cls: Any = Gemma3ForCausalLM
    model, report = cls.from_pretrained(
        checkpoint.source.path, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


@pytest.fixture(autouse=True)
def honoured_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = modeling_gemma3.eager_attention_forward

    def capped(module: Any, *args: Any, **options: Any) -> Any:
        return eager(module, *args, **options, softcap=module.config.attn_logit_softcapping)

    monkeypatch.setattr(modeling_gemma3, "eager_attention_forward", capped)


def exactly(checkpoint: Checkpoint, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers in float64 throughout, but for the embedding's factor: that is the float32 it is declared as."""
    with float32_islands_widened("gemma3"):
        model = model_of(checkpoint, torch.float64)
        embedding = model.model.embed_tokens
        assert embedding.embed_scale.dtype == torch.float64
        embedding.embed_scale = torch.tensor(checkpoint.config.hidden_size**0.5, dtype=torch.float32).double()
        return reference_forward(model, inputs)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_transformers_in_float64_throughout(made: Make, case: str, kind: str) -> None:
    checkpoint = made(case)
    inputs = batch(checkpoint, kind)
    found = distances(oracle_forward(checkpoint, **inputs), exactly(checkpoint, inputs), inputs)
    assert len(found) == checkpoint.config.num_hidden_layers + 3
    assert max(found.values()) <= FLOAT64_BOUND, found


@pytest.mark.slow_unless("*-left")
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("case", [case for case in CASES if case != "bfloat16"])
def test_agrees_with_transformers_as_shipped(made: Make, case: str, kind: str) -> None:
    checkpoint = made(case)
    inputs = batch(checkpoint, kind)
    want = reference_forward(model_of(checkpoint, torch.float32), inputs)
    found = distances(oracle_forward(checkpoint, **inputs), want, inputs)
    assert max(found.values()) <= FLOAT32_BOUND, found


@pytest.mark.parametrize(
    ("case", "dtype", "factor"),
    [("tied", torch.float32, float(np.float32(42**0.5))), ("bfloat16", torch.bfloat16, 6.46875)],
)
def test_the_factor_of_the_embedding_is_rounded_by_whoever_computes_in_less(
    made: Make, case: str, dtype: torch.dtype, factor: float
) -> None:
    checkpoint = made(case)
    inputs = batch(checkpoint, "full")
    stored_BTD = checkpoint.read("model.embed_tokens.weight").astype(np.float64)[inputs["input_ids"]]
    got = oracle_forward(checkpoint, **inputs)["hidden_states.0"]
    np.testing.assert_array_equal(got, stored_BTD * np.float64(np.float32(42**0.5)))
    with torch.no_grad():
        theirs = model_of(checkpoint, dtype).model.embed_tokens(torch.from_numpy(inputs["input_ids"]))
    assert torch.equal(theirs, torch.from_numpy(stored_BTD * factor).to(dtype))
    assert relative_error(stored_BTD * factor, got) < 2.0**-9  # no more than one rounding to bfloat16 may do


@pytest.mark.parametrize(
    "other",
    [
        {"sliding_window": 25},
        {"layer_types": [SLIDING, FULL, SLIDING, SLIDING, SLIDING]},
        {"query_pre_attn_scalar": 10},
        {"rope_parameters": ROPE | {SLIDING: ROPE[FULL]}},
        {"rope_parameters": ROPE | {FULL: ROPE[SLIDING]}},
        {"attn_logit_softcapping": None},
        {"attn_logit_softcapping": 5.0},
        {"final_logit_softcapping": None},
        {"rms_norm_eps": 1e-5},
    ],
    ids=str,
)
def test_every_option_is_read(made: Make, tmp_path: Path, other: dict[str, Any]) -> None:
    checkpoint = made("capped")
    wrong = open_checkpoint(make_checkpoint("gemma3-capped", tmp_path / "other", **other))
    inputs = batch(checkpoint, "left")
    real_BT = inputs["attention_mask"] == 1
    want, got = (oracle_forward(each, **inputs)["logits"][real_BT] for each in (checkpoint, wrong))
    assert relative_error(got, want) > 1e-3


def test_a_row_of_a_padded_batch_is_as_if_alone(made: Make) -> None:
    checkpoint = made("capped")
    for kind in ("left", "right"):
        inputs = batch(checkpoint, kind)
        got = oracle_forward(checkpoint, **inputs)
        assert all(np.isfinite(value).all() for value in got.values())
        for row, mask_T in enumerate(inputs["attention_mask"] == 1):
            alone = oracle_forward(checkpoint, inputs["input_ids"][row : row + 1, mask_T])
            for tensor, want in alone.items():
                assert relative_error(got[tensor][row, mask_T], want[0]) <= FLOAT64_BOUND, tensor


def test_a_capped_score_is_bent_before_the_mask() -> None:
    """Two keys, one query: scores 3 and -1 under a cap of 2, a third key unseen."""
    q, k = np.ones((1, 1, 1, 2)), np.array([[1.5, 1.5], [-0.5, -0.5], [9.0, 9.0]]).reshape(1, 3, 1, 2)
    v = np.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]).reshape(1, 3, 1, 2)
    bent = np.exp([2 * math.tanh(1.5), 2 * math.tanh(-0.5)])
    got = attend(q, k, v, np.array([[[True, True, False]]]), scale=1.0, cap=2.0)
    np.testing.assert_allclose(got[0, 0], bent / bent.sum(), rtol=1e-15)


def test_gelu_is_the_tanh_approximation() -> None:
    x = np.linspace(-6, 6, 101)
    want = torch.nn.functional.gelu(torch.from_numpy(x), approximate="tanh").numpy()
    np.testing.assert_allclose(gelu_tanh(x), want, rtol=1e-13, atol=1e-15)
