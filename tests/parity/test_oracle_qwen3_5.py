"""The oracle of Qwen3.5 and of its draft against transformers, whose linear attention goes by chunks of 64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from reference import distances, float32_islands_widened, reference_forward, relative_error
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_layers import MtpModel

from loaders import Checkpoint, open_checkpoint
from loaders.config import RopeParameters
from parity.oracle import oracle_forward
from parity.oracles import qwen3_5
from parity.oracles.rope import rotation
from parity.zoo import make_checkpoint, prompts

NAMES = ("qwen3_5", "qwen3_5-tied", "qwen3_5-moe", "qwen3_5-wrapped", "qwen3_5-moe-wrapped")
BATCHES = ("left", "right", "full", "far", "three axes")
B, T = 3, 150  # two chunk boundaries, at 64 and 128
# transformers in float32: 2e-6 to 6e-6 measured, the worst tensor of each case; the norm after the recurrence divides
# by what the state says, which is small for some tokens
FLOAT32_BOUND = 2e-5
# the same code in float64: 4e-15 to 2e-14 measured
FLOAT64_BOUND = 1e-13


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    @cache
    def make(name: str, **options: Any) -> Checkpoint:
        return open_checkpoint(make_checkpoint(name, tmp_path_factory.mktemp(name) / "checkpoint", **options))

    return make


def batch(checkpoint: Checkpoint, kind: str) -> dict[str, np.ndarray]:
    padding = kind if kind in ("left", "right") else None
    inputs = prompts(checkpoint.config, rows=B, tokens=T, padding=padding)
    rng = np.random.default_rng(3)
    if kind == "far":
        inputs["position_ids"] = np.cumsum(rng.integers(1, 40, (B, T)), axis=1)
    if kind == "three axes":
        inputs["position_ids"] = rng.integers(0, 60, (3, B, T))
    return inputs


def theirs(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    is_wrapped = "vision_config" in checkpoint.config_document
    auto = AutoModelForImageTextToText if is_wrapped else AutoModelForCausalLM
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    path = str(checkpoint.source)
    model, report = auto.from_pretrained(path, dtype=dtype, output_loading_info=True, **experts)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


def reference(checkpoint: Checkpoint, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with float32_islands_widened("qwen3_5", "qwen3_5_moe"):
        return reference_forward(theirs(checkpoint, torch.float64), inputs)


@pytest.mark.slow_unless("qwen3_5-[!tw]*", "*-left")
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_transformers_in_float64_throughout(made: Callable[..., Checkpoint], name: str, kind: str) -> None:
    checkpoint = made(name)
    inputs = batch(checkpoint, kind)
    found = distances(oracle_forward(checkpoint, **inputs), reference(checkpoint, inputs), inputs)
    assert len(found) >= checkpoint.config.num_hidden_layers + 3
    assert max(found.values()) <= FLOAT64_BOUND, found


@pytest.mark.slow_unless("*-left", "*-three axes")
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_transformers_as_shipped(made: Callable[..., Checkpoint], name: str, kind: str) -> None:
    checkpoint = made(name)
    inputs = batch(checkpoint, kind)
    want = reference_forward(theirs(checkpoint, torch.float32), inputs)
    found = distances(oracle_forward(checkpoint, **inputs), want, inputs)
    assert max(found.values()) <= FLOAT32_BOUND, found


@pytest.fixture(scope="module")
def dense(made: Callable[..., Checkpoint]) -> Checkpoint:
    return made("qwen3_5")


def test_biases_are_added(made: Callable[..., Checkpoint]) -> None:
    biased = made("qwen3_5", attention_bias=True)
    inputs = batch(biased, "left")
    found = distances(oracle_forward(biased, **inputs), reference(biased, inputs), inputs)
    assert max(found.values()) <= FLOAT64_BOUND, found


@pytest.mark.parametrize("heads", [2, 10])  # the zoo has as many as attention has, six
def test_linear_attention_has_heads_of_its_own(made: Callable[..., Checkpoint], heads: int) -> None:
    other = made("qwen3_5", linear_num_value_heads=heads)
    inputs = batch(other, "right")
    found = distances(oracle_forward(other, **inputs), reference(other, inputs), inputs)
    assert max(found.values()) <= FLOAT64_BOUND, found


def test_f32_tensors_among_bfloat16_keep_their_values(made: Callable[..., Checkpoint]) -> None:
    checkpoint = made("qwen3_5", dtype="BF16")
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16", "F32"}
    inputs = batch(checkpoint, "left")
    found = distances(oracle_forward(checkpoint, **inputs), reference(checkpoint, inputs), inputs)
    assert max(found.values()) <= FLOAT64_BOUND, found


@pytest.mark.parametrize("form", ["fused", "per expert"])
def test_experts_are_the_same_model_in_either_form(made: Callable[..., Checkpoint], form: Any) -> None:
    usual = made("qwen3_5-moe")
    other = made("qwen3_5-moe", experts=form, draft_experts="per expert" if form == "fused" else "fused")
    assert set(usual.tensors) != set(other.tensors)
    inputs = batch(usual, "right")
    want, got = (oracle_forward(checkpoint, **inputs, mtp=True) for checkpoint in (usual, other))
    assert sorted(got) == sorted(want)
    assert all(relative_error(got[name], want[name]) <= FLOAT64_BOUND for name in want)


def test_tensors_may_carry_the_names_of_the_wrapper(made: Callable[..., Checkpoint], dense: Checkpoint) -> None:
    renamed = made("qwen3_5", text_path="model.language_model")
    assert "model.language_model.norm.weight" in renamed.tensors
    assert "model.norm.weight" not in renamed.tensors
    inputs = batch(dense, "right")
    want, got = (oracle_forward(checkpoint, **inputs) for checkpoint in (dense, renamed))
    assert all(np.array_equal(got[name], want[name]) for name in want)


def test_three_equal_axes_are_one_position(dense: Checkpoint) -> None:
    inputs = batch(dense, "far")
    want = oracle_forward(dense, **inputs)["logits"]
    got = oracle_forward(dense, **inputs | {"position_ids": np.stack([inputs["position_ids"]] * 3)})["logits"]
    np.testing.assert_array_equal(got, want)


def test_pairs_turn_by_time_height_and_width_in_turn_until_their_sections_end() -> None:
    rope = RopeParameters(rope_type="default", rope_theta=1e4, mrope_section=(3, 2, 1), mrope_interleaved=True)
    positions_3BT = np.array([100, 200, 300]).reshape(3, 1, 1)
    by_axis = [rotation(rope, 12, 64, positions)[0][0, 0] for positions in positions_3BT[:, None, :, 0]]
    want = [by_axis[axis][pair] for pair, axis in enumerate([0, 1, 2, 0, 1, 0])]  # width has one pair only
    assert rotation(rope, 12, 64, positions_3BT)[0][0, 0].tolist() == want


@pytest.mark.parametrize("shape", [(2, B, T), (3, B, T + 1), (T,), (1, 3, B, T)])
def test_positions_of_another_shape_are_refused(dense: Checkpoint, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="position_ids is int64"):
        oracle_forward(dense, np.zeros((B, T), int), position_ids=np.zeros(shape, int))


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5-moe"])
def test_a_row_of_a_padded_batch_is_as_if_alone(made: Callable[..., Checkpoint], name: str) -> None:
    checkpoint = made(name)
    for kind in ("left", "right"):
        inputs = batch(checkpoint, kind)
        got = oracle_forward(checkpoint, **inputs, mtp=True)
        for row, mask_T in enumerate(inputs["attention_mask"] == 1):
            alone = oracle_forward(checkpoint, inputs["input_ids"][row : row + 1, mask_T], mtp=True)
            for tensor, want in alone.items():
                is_real_T = mask_T[1:] & mask_T[:-1] if tensor.startswith("mtp.") else mask_T
                assert relative_error(got[tensor][row, is_real_T], want[0]) <= FLOAT64_BOUND, tensor


def test_padding_in_the_middle_leaves_the_state_as_it_is(dense: Checkpoint) -> None:
    """More of it than the convolution reaches back: only rotary positions could tell, and they count real tokens."""
    ids_BT = batch(dense, "full")["input_ids"][:, :40]
    apart = [np.insert(ids_BT, 20, np.full((gap, B), 7), axis=1) for gap in (5, 9)]
    masks = [np.insert(np.ones_like(ids_BT), 20, np.zeros((gap, B), int), axis=1) for gap in (5, 9)]
    near, far = (oracle_forward(dense, ids, mask) for ids, mask in zip(apart, masks, strict=True))
    assert relative_error(far["logits"][:, 29:], near["logits"][:, 25:]) <= FLOAT64_BOUND


def test_padding_in_the_middle_is_as_if_it_were_not_there_where_no_convolution_reaches_over_it(
    made: Callable[..., Checkpoint],
) -> None:
    checkpoint = made("qwen3_5", linear_conv_kernel_dim=1)
    ids_BT = batch(checkpoint, "full")["input_ids"][:, :40]
    gap = np.full((5, B), 7)
    apart = np.insert(ids_BT, 20, gap, axis=1), np.insert(np.ones_like(ids_BT), 20, 0 * gap, axis=1)
    got, want = (oracle_forward(checkpoint, *given)["logits"] for given in (apart, (ids_BT,)))
    assert relative_error(got[apart[1] == 1], want.reshape(-1, want.shape[-1])) <= FLOAT64_BOUND


def test_padding_neither_fades_the_state_nor_writes_what_the_convolution_still_holds(
    dense: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    recurrence = qwen3_5._recurrence

    def spied(q: np.ndarray, k: np.ndarray, v: np.ndarray, kept: np.ndarray, beta: np.ndarray) -> np.ndarray:
        seen.append((kept, beta))
        return recurrence(q, k, v, kept, beta)

    monkeypatch.setattr(qwen3_5, "_recurrence", spied)
    mask_BT = np.array([[0, 1, 1, 0, 0, 1, 0, 0]])
    oracle_forward(dense, np.arange(1, 9)[None], mask_BT)
    assert len(seen) == 3
    for kept_BTJ, beta_BTJ in seen:
        np.testing.assert_array_equal((kept_BTJ == 1).all(-1), mask_BT == 0)
        np.testing.assert_array_equal((beta_BTJ == 0).all(-1), mask_BT == 0)


@pytest.mark.parametrize("mask", [[[0] * 8], [[0, 0, 0, 1, 0, 0, 0, 0]]])
def test_rows_of_padding_are_finite(made: Callable[..., Checkpoint], mask: list[list[int]]) -> None:
    got = oracle_forward(made("qwen3_5-moe"), np.full((1, 8), 3), np.array(mask), mtp=True)
    assert all(np.isfinite(value).all() for value in got.values())


# The draft

# as published models end; transformers makes the draft's norms of the first class with such a name in the last layer,
# and in a linear one that is the gated norm
ENDS_FULL = ("linear_attention", "full_attention", "linear_attention", "full_attention")


def draft_reference(checkpoint: Checkpoint, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers' draft on the final hidden states of its own model; it knows no padding."""
    positions_BT = torch.from_numpy(inputs.get("position_ids", np.broadcast_to(np.arange(T), (B, T))).copy())
    found: dict[str, torch.Tensor] = {}
    with float32_islands_widened("qwen3_5", "qwen3_5_moe"), torch.no_grad():
        model = theirs(checkpoint, torch.float64)
        config = model.config.get_text_config()
        config.num_mtp_layers, config.mtp_layer_types = 1, ["full_attention"]
        draft = MtpModel.from_pretrained(model).eval()
        hidden_BTD = torch.from_numpy(reference_forward(model, inputs)["final_hidden_state"])
        if hasattr(draft.layers[0].mtp_block.mlp, "gate"):
            draft.layers[0].mtp_block.mlp.gate.register_forward_hook(
                lambda module, args, output: found.update(logits=output[0], experts=output[2])
            )
        # without a mask of ones it takes gaps between positions for the bounds of packed sequences
        masks, steps_BT = draft.create_masks_for_mtp_layer, torch.arange(T - 1).expand(B, -1)
        draft.create_masks_for_mtp_layer = lambda *args: masks(*args[:3], steps_BT)
        ids_BT = torch.from_numpy(inputs["input_ids"])[:, 1:]
        state_BTD = draft.forward_layer(0, hidden_BTD[:, :-1], positions_BT[:, 1:], None, input_ids=ids_BT)
        out = {"mtp.hidden_state": state_BTD, "mtp.logits": model.lm_head(state_BTD)}
    if found:
        out["mtp.router_logits.1"], out["mtp.routing.1"] = (
            found[name].reshape(B, T - 1, -1) for name in ("logits", "experts")
        )
    return {name: value.numpy() for name, value in out.items()}


@pytest.mark.parametrize("kind", ["full", "far"])
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5-tied", "qwen3_5-moe", "qwen3_5-wrapped"])
def test_the_draft_agrees_with_transformers(made: Callable[..., Checkpoint], name: str, kind: str) -> None:
    checkpoint = made(name, layer_types=ENDS_FULL)
    inputs = batch(checkpoint, kind)
    got, want = oracle_forward(checkpoint, **inputs, mtp=True), draft_reference(checkpoint, inputs)
    assert sorted(want) == sorted(key for key in got if key.startswith("mtp."))
    found = distances({key: got[key] for key in want}, want, {"input_ids": inputs["input_ids"][:, 1:]})
    assert max(found.values()) <= FLOAT64_BOUND, found


def test_the_draft_leaves_everything_else_alone(made: Callable[..., Checkpoint]) -> None:
    checkpoint = made("qwen3_5-moe-wrapped")
    inputs = batch(checkpoint, "left")
    plain, drafted = (oracle_forward(checkpoint, **inputs, mtp=mtp) for mtp in (False, True))
    assert {name for name in drafted if name not in plain} == {
        *("mtp.hidden_state", "mtp.logits", "mtp.routing.1", "mtp.router_logits.1")
    }
    assert all(np.array_equal(plain[name], drafted[name]) for name in plain)


def test_the_drafts_experts_are_replayed(made: Callable[..., Checkpoint]) -> None:
    checkpoint = made("qwen3_5-moe")
    inputs = batch(checkpoint, "left")
    usual = oracle_forward(checkpoint, **inputs, mtp=True)
    turned = {"mtp.routing.1": (usual["mtp.routing.1"] + 1) % 5}
    got = oracle_forward(checkpoint, **inputs, mtp=True, routing=turned)
    real_BT = inputs["attention_mask"][:, :-1] == 1
    np.testing.assert_array_equal(got["mtp.routing.1"][real_BT], turned["mtp.routing.1"][real_BT])
    assert relative_error(got["mtp.logits"], usual["mtp.logits"]) > 0.1
    np.testing.assert_array_equal(got["logits"], usual["logits"])
    with pytest.raises(ValueError, match="no sparse layer"):
        oracle_forward(checkpoint, **inputs, routing=turned)


def test_a_draft_that_is_not_there_is_refused(made: Callable[..., Checkpoint]) -> None:
    ids_BT = np.zeros((1, 4), int)
    with pytest.raises(ValueError, match="Gemma3ForCausalLM has 0 layers of it"):
        oracle_forward(made("gemma3"), ids_BT, mtp=True)
    with pytest.raises(ValueError, match="needs two tokens"):
        oracle_forward(made("qwen3_5"), ids_BT[:, :1], mtp=True)
