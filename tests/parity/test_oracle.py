"""The float64 oracle against transformers: as shipped in float32, and with its float32 islands widened to float64."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, modeling_rope_utils
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe

import loaders
from loaders.config import RopeParameters
from parity.oracle import oracle_forward
from parity.oracles import run as oracle_run
from parity.oracles.inputs import checked_inputs
from parity.oracles.rope import rotation

# head_dim != hidden / heads, heads / kv = 2 and 5, no two sizes alike, nothing a power of two but head_dim
DENSE = {
    "vocab_size": 101,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
ONE_KV = {"hidden_size": 44, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 12}
MOE = DENSE | {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True}
FULL, SLIDING = "full_attention", "sliding_attention"
# theta, trained length and betas place the ramp of 8 pairs: here over 2..6, in YARN_ALL from 6 to past the last pair
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096}
YARN_ALL = YARN | {"rope_theta": 1e2, "beta_fast": 16.0, "beta_slow": 0.1, "mscale": 1.3, "mscale_all_dim": 0.7}
YARN_ZEROS = YARN | {"beta_fast": 0.0, "beta_slow": 0.0, "mscale": 0.7, "mscale_all_dim": 0.0}
YARN_BELOW = YARN | {"original_max_position_embeddings": 64, "truncate": False}  # the ramp would start below 0
YARN_POINT = YARN | {"original_max_position_embeddings": 6, "factor": 0.5}  # the ramp starts and ends at 0


@dataclass(frozen=True)
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    inputs: str = "plain"  # or left, right, gaps
    dtype: torch.dtype = torch.float32

    @property
    def is_moe(self) -> bool:
        return "num_experts" in self.options


CASES = {
    "dense": Case(DENSE),
    "dense one kv head": Case(DENSE | ONE_KV),
    "dense tied": Case(DENSE | {"tie_word_embeddings": True}),
    "dense biased": Case(DENSE | {"attention_bias": True}, "right"),
    "dense large eps": Case(DENSE | {"rms_norm_eps": 1e-2}),
    "dense left padding": Case(DENSE, "left"),
    "dense right padding": Case(DENSE, "right"),
    "dense bfloat16": Case(DENSE, "left", torch.bfloat16),
    "dense float16": Case(DENSE, dtype=torch.float16),
    "dense float64": Case(DENSE, dtype=torch.float64),
    "mixed windows": Case(
        DENSE | {"use_sliding_window": True, "sliding_window": 5, "layer_types": [SLIDING, FULL, SLIDING, FULL]}, "left"
    ),
    "upper windows": Case(DENSE | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}, "right"),
    "position gaps": Case(DENSE, "gaps"),
    "linear": Case(DENSE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}, "gaps"),
    "dynamic beyond": Case(
        DENSE
        | {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.5},
        },
        "left",
    ),
    "dynamic within": Case(
        DENSE | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.5}}, "right"
    ),
    "yarn": Case(DENSE | {"rope_parameters": YARN}, "right"),
    "yarn all factors": Case(DENSE | {"rope_parameters": YARN_ALL}, "gaps"),
    "yarn attention factor": Case(DENSE | {"rope_parameters": YARN_ALL | {"attention_factor": 1.2}}),
    "yarn untruncated": Case(DENSE | {"rope_parameters": YARN | {"truncate": False}}, "left"),
    "yarn zeros": Case(DENSE | {"rope_parameters": YARN_ZEROS}),
    "yarn below": Case(DENSE | {"rope_parameters": YARN_BELOW}),
    "yarn point": Case(DENSE | {"rope_parameters": YARN_POINT}, "gaps"),
    "moe": Case(MOE),
    "moe one kv head tied": Case(MOE | ONE_KV | {"tie_word_embeddings": True}, "right"),
    "moe unnormalised top 3": Case(MOE | {"norm_topk_prob": False, "num_experts_per_tok": 3}, "left"),
    "moe every second layer": Case(MOE | {"decoder_sparse_step": 2}),
    "moe two dense layers": Case(MOE | {"mlp_only_layers": [0, 2], "attention_bias": True}, "right"),
    "moe windows": Case(MOE | {"use_sliding_window": True, "sliding_window": 5}, "left"),
    "moe bfloat16 yarn": Case(MOE | {"rope_parameters": YARN}, "right", torch.bfloat16),
}
B, T = 3, 29
PADDING = (1, 5, 17)  # per row; no row is full, so counting padding as positions shows in dynamic scaling


@dataclass(frozen=True)
class Run:
    case: Case
    checkpoint: loaders.Checkpoint
    state: dict[str, torch.Tensor]
    inputs: dict[str, np.ndarray]
    got: dict[str, np.ndarray]

    @property
    def is_real(self) -> np.ndarray:
        return self.inputs.get("attention_mask", np.ones((B, T), np.int64)) == 1


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(CASES[request.param], tmp_path_factory.mktemp("checkpoint"))


def make_run(case: Case, directory) -> Run:
    model = new_model(case).to(case.dtype)
    sensitise(model, np.random.default_rng(7))
    model.save_pretrained(directory)
    checkpoint, inputs = loaders.open_checkpoint(directory), make_inputs(case.inputs)
    return Run(case, checkpoint, model.state_dict(), inputs, oracle_forward(checkpoint, **inputs))


def new_model(case: Case, state: dict[str, torch.Tensor] | None = None, experts: str | None = None) -> torch.nn.Module:
    """A transformers model of the default dtype. Never by ``.to(dtype)``: that rounds the rotary frequencies too."""
    if case.is_moe:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**case.options, experts_implementation=experts))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**case.options))
    if state is not None:
        model.load_state_dict(state)
    return model.eval()


def sensitise(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Weights under which every mistake shows: random init lets swapped norms and dropped windows through."""
    for name, parameter in model.named_parameters():
        noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
        if "norm" in name:
            value = 1 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif "embed_tokens" in name:
            value = noise
            value[3] *= 1e-3  # a canary for eps
        else:  # the head's gain makes logits spread by about 3
            value = noise * (3.0 if "lm_head" in name else 1.5) / parameter.shape[-1] ** 0.5
        parameter.data.copy_(value)


def make_inputs(kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    inputs = {"input_ids": rng.integers(0, DENSE["vocab_size"], (B, T))}
    inputs["input_ids"][:, -2] = inputs["input_ids"][0, 6] = 3
    steps = np.arange(T)
    if kind == "left":
        inputs["attention_mask"] = np.stack([steps >= padding for padding in PADDING]).astype(np.int64)
    if kind == "right":
        inputs["attention_mask"] = np.stack([steps < T - padding for padding in PADDING]).astype(np.int64)
    if kind == "gaps":
        inputs["position_ids"] = np.cumsum(rng.integers(1, 9, (B, T)), axis=1)
    return inputs


def transformers_forward(
    model: torch.nn.Module, inputs: dict[str, np.ndarray], routing: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """What ``oracle_forward`` returns, from hooks: transformers' own last hidden state is post-norm."""
    mask_BT = inputs.get("attention_mask", np.ones((B, T), np.int64))
    positions_BT = inputs.get("position_ids", np.maximum(mask_BT.cumsum(1) - 1, 0))
    out: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(module, args, output):
            out[name] = output

        return hook

    def keep_routing(layer: int):
        def hook(module, args, output):
            logits, weights, experts = output
            if routing is not None:
                experts = torch.from_numpy(routing[f"routing.{layer}"]).reshape(B * T, -1)
                weights = logits.softmax(-1).gather(-1, experts)
                weights = weights / weights.sum(-1, keepdim=True) if module.norm_topk_prob else weights
            out[f"router_logits.{layer}"], out[f"routing.{layer}"] = (x.reshape(B, T, -1) for x in (logits, experts))
            return logits, weights, experts

        return hook

    with contextlib.ExitStack() as hooks, torch.no_grad():
        hooks.enter_context(model.model.embed_tokens.register_forward_hook(keep("hidden_states.0")))
        hooks.enter_context(model.model.norm.register_forward_hook(keep("final_hidden_state")))
        for number, layer in enumerate(model.model.layers, 1):
            hooks.enter_context(layer.register_forward_hook(keep(f"hidden_states.{number}")))
            if "Sparse" in type(layer.mlp).__name__:
                hooks.enter_context(layer.mlp.gate.register_forward_hook(keep_routing(number)))
        out["logits"] = model(
            input_ids=torch.from_numpy(inputs["input_ids"]),
            attention_mask=torch.from_numpy(mask_BT),
            position_ids=torch.from_numpy(positions_BT),
            use_cache=False,
        ).logits
    return {name: value.numpy() for name, value in out.items()}


class TorchInFloat64:
    """``torch`` for a module whose ``torch.float32`` is to mean float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def float32_islands_widened() -> Iterator[None]:
    """transformers computes norms, rotary tables, softmax and router in float32 whatever the model's dtype is.

    Its own code, with the dtype it names replaced, is a reference a billion times sharper than the float32 model.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (modeling_qwen3, modeling_qwen3_moe, modeling_rope_utils):
            patch.setattr(module, "torch", TorchInFloat64())
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def errors(run: Run, want: dict[str, np.ndarray]) -> dict[str, float]:
    assert sorted(run.got) == sorted(want)
    real_BT = run.is_real
    for name in want:
        if name.startswith("routing"):
            np.testing.assert_array_equal(run.got[name][real_BT], want[name][real_BT], err_msg=name)
    return {
        name: relative_error(run.got[name][real_BT], want[name][real_BT])
        for name in want
        if not name.startswith("routing")
    }


# transformers in float32: 5.6e-7 to 1.2e-6 measured, the worst tensor of each case (9 to 20 units of 2^-24)
FLOAT32_BOUND = 4e-6
# the same code in float64: 1.1e-15 to 1.9e-15 measured. The room is for other BLAS kernels; a slip in semantics that
# moves one token by 1e-12 is seen
FLOAT64_BOUND = 1e-14


def assert_close(run: Run, want: dict[str, np.ndarray], bound: float) -> None:
    found = errors(run, want)
    assert max(found.values()) <= bound, {name: error for name, error in found.items() if error > bound}


def test_agrees_with_transformers_as_shipped(run: Run) -> None:
    assert_close(run, transformers_forward(new_model(run.case, run.state), run.inputs), FLOAT32_BOUND)


def test_agrees_with_transformers_in_float64_throughout(run: Run) -> None:
    assert_close(run, float64_forward(run), FLOAT64_BOUND)


def float64_forward(run: Run, routing: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    with float32_islands_widened():
        # transformers' default for experts, grouped_mm, takes no float64
        return transformers_forward(new_model(run.case, run.state, experts="eager"), run.inputs, routing)


def test_everything_is_float64_and_finite_also_at_padding(run: Run) -> None:
    for name, value in run.got.items():
        assert value.dtype == (np.int32 if name.startswith("routing") else np.float64), name
        assert np.isfinite(value).all(), name


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(CASES["dense right padding"], tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module", params=[True, False], ids=["normalised", "unnormalised"])
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    options = MOE | {"norm_topk_prob": request.param, "mlp_only_layers": [1]}
    return make_run(Case(options, "right"), tmp_path_factory.mktemp("moe"))


def test_agrees_at_positions_far_beyond_training(dense: Run) -> None:
    far = {"input_ids": dense.inputs["input_ids"], "position_ids": np.arange(B * T).reshape(B, T) ** 2 * 5}  # to 36980
    run = dataclasses.replace(dense, inputs=far, got=oracle_forward(dense.checkpoint, **far))
    assert_close(run, float64_forward(run), 1e-11)  # an angle of 4e4 radians has an ulp of 7e-12


def test_a_row_of_a_padded_batch_is_as_if_alone(dense: Run) -> None:
    for row, padding in enumerate(PADDING):
        alone = oracle_forward(dense.checkpoint, dense.inputs["input_ids"][row : row + 1, : T - padding])
        for name in alone:
            assert relative_error(dense.got[name][row, : T - padding], alone[name][0]) <= FLOAT64_BOUND, name


def test_a_row_of_padding_alone_is_finite(dense: Run) -> None:
    got = oracle_forward(dense.checkpoint, dense.inputs["input_ids"], np.zeros((B, T), np.int64))
    assert all(np.isfinite(value).all() for value in got.values())


def test_a_head_widened_in_parts_gives_the_same_logits(dense: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle_run, "HEAD_ROWS", 7)
    got = oracle_forward(dense.checkpoint, **dense.inputs)
    assert relative_error(got["logits"], dense.got["logits"]) <= FLOAT64_BOUND


def routing_of(got: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in got.items() if name.startswith("routing.")}


def test_replaying_its_own_routing_changes_nothing(moe: Run) -> None:
    again = oracle_forward(moe.checkpoint, **moe.inputs, routing=routing_of(moe.got))
    assert sorted(again) == sorted(moe.got)
    for name in again:
        np.testing.assert_array_equal(again[name], moe.got[name], err_msg=name)


def test_replayed_experts_are_used_with_the_weights_of_the_softmax(moe: Run) -> None:
    rng = np.random.default_rng(5)
    choice_BTE = rng.permuted(np.broadcast_to(np.arange(5), (B, T, 5)), axis=-1)
    forced = dict.fromkeys(routing_of(moe.got), choice_BTE[..., :2])
    run = dataclasses.replace(moe, got=oracle_forward(moe.checkpoint, **moe.inputs, routing=forced))
    assert relative_error(run.got["logits"], moe.got["logits"]) > 0.1
    assert_close(run, float64_forward(run, forced), FLOAT64_BOUND)


def test_replay_of_one_token_in_one_layer_leaves_what_comes_before(moe: Run) -> None:
    experts_BTX = moe.got["routing.3"].copy()
    unused = (set(range(5)) - set(experts_BTX[1, 10])).pop()
    experts_BTX[1, 10, 1] = unused
    got = oracle_forward(moe.checkpoint, **moe.inputs, routing={"routing.3": experts_BTX})
    np.testing.assert_array_equal(got["hidden_states.2"], moe.got["hidden_states.2"])
    moved_BT = np.abs(got["hidden_states.3"] - moe.got["hidden_states.3"]).max(axis=-1) > 1e-3
    assert np.argwhere(moved_BT).tolist() == [[1, 10]]


def test_replayed_routing_at_padding_is_ignored(moe: Run) -> None:
    replay = {name: np.where(moe.is_real[..., None], value, -1) for name, value in routing_of(moe.got).items()}
    got = oracle_forward(moe.checkpoint, **moe.inputs, routing=replay)
    np.testing.assert_array_equal(got["logits"], moe.got["logits"])


@pytest.mark.parametrize(
    ("name", "experts", "message"),
    [
        ("routing.2", [0, 1], "no sparse layer"),
        ("routing.0", [0, 1], "no sparse layer"),
        ("routing.1", [0, 5], "outside 0 to 4"),
        ("routing.1", [-1, 0], "outside 0 to 4"),
        ("routing.1", [3, 3], "same expert twice"),
        ("routing.1", [0, 1, 2], "expected integers"),
        ("routing.1", [0.0, 1.0], "expected integers"),
    ],
)
def test_routing_that_cannot_be_replayed_is_refused(moe: Run, name: str, experts: list[int], message: str) -> None:
    routing = {name: np.broadcast_to(np.array(experts), (B, T, len(experts)))}
    with pytest.raises(ValueError, match=message):
        oracle_forward(moe.checkpoint, **moe.inputs, routing=routing)


def test_routing_for_a_dense_model_is_refused(dense: Run) -> None:
    with pytest.raises(ValueError, match="has no experts"):
        oracle_forward(dense.checkpoint, **dense.inputs, routing={"routing.1": np.zeros((B, T, 2), int)})


def test_of_equal_experts_the_lowest_index_wins(moe: Run, tmp_path) -> None:
    def double(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.mlp.gate.weight"][:] = 0  # all tie
        gate_ED = tensors["model.layers.2.mlp.gate.weight"]
        gate_ED[1] = gate_ED[3]

    got = oracle_forward(rewritten(moe.checkpoint, tmp_path, double), **moe.inputs)
    assert (got["routing.1"] == [0, 1]).all()
    three_BT = (got["routing.3"] == 3).any(-1)
    assert three_BT.any()
    assert (got["routing.3"][three_BT] == [1, 3]).all()


def rewritten(checkpoint: loaders.Checkpoint, directory, change) -> loaders.Checkpoint:
    """The checkpoint with its tensors changed in place by ``change``."""
    source = checkpoint.source.path
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    return loaders.open_checkpoint(directory)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), rf"{NORM}' is missing"),
        (lambda tensors: tensors.update({NORM: np.ones(1, np.float32)}), r"shape \(1,\), expected \(40,\)"),
        (lambda tensors: tensors.update({NORM: np.ones(40, np.int8)}), r"is I8; the oracle widens"),
    ],
)
def test_a_checkpoint_it_cannot_read_exactly_is_refused(dense: Run, tmp_path, change, message: str) -> None:
    checkpoint = rewritten(dense.checkpoint, tmp_path, change)
    with pytest.raises(loaders.CheckpointError, match=message):
        oracle_forward(checkpoint, **dense.inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": np.zeros(4, int)}, r"expected \[B, T\]"),
        ({"input_ids": np.zeros((2, 0), int)}, "at least one token"),
        ({"input_ids": np.zeros((2, 4))}, "expected integers"),
        ({"input_ids": np.full((2, 4), -1)}, "expected 0 to 100"),
        ({"input_ids": np.full((2, 4), 101)}, "expected 0 to 100"),
        ({"attention_mask": np.ones((1, 4), int)}, r"attention_mask is int64 \(1, 4\)"),
        ({"attention_mask": np.full((2, 4), 2)}, "other values than 0 and 1"),
        ({"position_ids": np.arange(4)}, r"position_ids is int64 \(4,\)"),
    ],
)
def test_inputs_that_would_wrap_or_broadcast_are_refused(dense: Run, inputs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oracle_forward(dense.checkpoint, **({"input_ids": np.zeros((2, 4), int)} | inputs))


def test_positions_count_real_tokens_from_zero(dense: Run) -> None:
    mask_BT = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    _, _, positions_BT = checked_inputs(dense.checkpoint.config, np.zeros((4, 5), int), mask_BT, None, {})
    assert positions_BT.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]


def test_default_frequencies_are_powers_of_theta() -> None:
    rope = RopeParameters(rope_type="default", rope_theta=100.0)
    cos_BTR, sin_BTR = rotation(rope, 4, 64, np.array([[0, 3]]))
    np.testing.assert_allclose(cos_BTR, [[[1, 1], [np.cos(3), np.cos(0.3)]]], rtol=1e-15)
    np.testing.assert_allclose(sin_BTR, [[[0, 0], [np.sin(3), np.sin(0.3)]]], rtol=1e-15)


def test_dynamic_scaling_starts_beyond_the_trained_length() -> None:
    plain, dynamic = (RopeParameters(rope_type=kind, rope_theta=1e4, factor=2.0) for kind in ("default", "dynamic"))
    for last, is_scaled in [(63, False), (64, True)]:
        positions_BT = np.array([[0, 1], [last, 1]])  # the batch's longest row decides for every row
        unscaled, cos = (rotation(rope, 16, 64, positions_BT)[0] for rope in (plain, dynamic))
        assert (cos[0, 1] != unscaled[0, 1]).any() == is_scaled


def test_it_needs_neither_torch_nor_jax() -> None:
    check = "import sys, parity.oracle; print(sorted({'torch', 'jax', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
