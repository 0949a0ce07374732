"""Both backends against transformers, on checkpoints that transformers itself wrote.

float32: every hidden state and the logits. bfloat16: the ruler, with transformers in bfloat16 as the peer. Generation:
token for token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_oracle import DENSE, FULL, MOE, ONE_KV, SLIDING, YARN, YARN_ALL, relative_error, sensitise
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import jax_models
import loaders
import torch_models
from parity.oracle import oracle_forward
from parity.ruler import LIMITS

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.5}
MIXED = {"use_sliding_window": True, "sliding_window": 5, "layer_types": [SLIDING, FULL, SLIDING, FULL]}
TWO = {"num_hidden_layers": 2}  # where two layers show as much as four and compile in half the time
NO_HEAD_DIM = {key: value for key, value in MOE.items() if key != "head_dim"} | {"hidden_size": 48} | TWO


@dataclass(frozen=True)
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32  # of the files
    max_shard_size: str | None = None  # None: one file

    @property
    def is_moe(self) -> bool:
        return "num_experts" in self.options


CASES = {
    "dense": Case(DENSE, max_shard_size="40KB"),
    "dense tied biased one kv head bf16 files": Case(
        DENSE | ONE_KV | {"tie_word_embeddings": True, "attention_bias": True}, torch.bfloat16, "20KB"
    ),
    "dense as many kv heads fp16 files": Case(
        DENSE | TWO | {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10}, torch.float16
    ),
    "dense mixed windows biased": Case(DENSE | MIXED | {"attention_bias": True}, torch.bfloat16),
    "dense upper windows": Case(DENSE | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "dense linear": Case(DENSE | TWO | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "dense dynamic beyond": Case(DENSE | TWO | {"max_position_embeddings": 20, "rope_parameters": DYNAMIC}),
    "dense yarn": Case(DENSE | TWO | {"rope_parameters": YARN | {"truncate": False}}),
    "dense yarn all factors": Case(DENSE | TWO | {"rope_parameters": YARN_ALL}),
    "dense yarn attention factor": Case(DENSE | TWO | {"rope_parameters": YARN_ALL | {"attention_factor": 1.2}}),
    "moe": Case(MOE | TWO, max_shard_size="40KB"),
    "moe tied unnormalised top 3 one kv head": Case(
        MOE | ONE_KV | TWO | {"tie_word_embeddings": True, "norm_topk_prob": False, "num_experts_per_tok": 3},
        torch.float16,
    ),
    "moe every second layer yarn bf16 files": Case(
        MOE | TWO | {"decoder_sparse_step": 2, "rope_parameters": YARN}, torch.bfloat16
    ),
    "moe two dense layers biased": Case(MOE | {"mlp_only_layers": [0, 2], "attention_bias": True}),
    "moe windows": Case(MOE | TWO | {"use_sliding_window": True, "sliding_window": 5}, torch.bfloat16, "60KB"),
    "moe without head_dim dynamic": Case(NO_HEAD_DIM | {"max_position_embeddings": 20, "rope_parameters": DYNAMIC}),
}
B, T = 3, 29
PAD, FILL = 0, 7  # pad_token_id; what stands under padding, so that whoever looks at it is seen

Build = Callable[[str], Path]


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Directory of a case's checkpoint, written once."""

    @functools.cache
    def build(name: str) -> Path:
        case, directory = CASES[name], tmp_path_factory.mktemp("checkpoint")
        kind = (Qwen3MoeForCausalLM, Qwen3MoeConfig) if case.is_moe else (Qwen3ForCausalLM, Qwen3Config)
        model = kind[0](kind[1](**case.options, pad_token_id=PAD)).to(case.dtype)
        sensitise(model, np.random.default_rng(7))
        if model.config.tie_word_embeddings:  # else every token predicts itself, for ever
            model.model.embed_tokens.weight.data.mul_(0.25)
        options = {} if case.max_shard_size is None else {"max_shard_size": case.max_shard_size}
        model.save_pretrained(directory, **options)
        return directory

    return build


def inputs_of(kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    vocab = DENSE["vocab_size"]
    if kind == "one token":
        return {"input_ids": np.array([[vocab - 1]])}
    if kind == "long":  # more than any power of two or block size near by
        return {"input_ids": rng.integers(0, vocab, (2, 101))}
    inputs = {"input_ids": rng.integers(0, vocab, (B, T))}
    inputs["input_ids"][:, -12] = inputs["input_ids"][0, 6] = 3  # the canary for eps
    if kind == "padded":  # left, right, and both sides; no row is full, so counting padding as positions shows
        steps = np.arange(T)
        mask_BT = np.stack([steps >= 6, steps < T - 9, (steps >= 2) & (steps < T - 1)]).astype(np.int64)
        inputs["input_ids"] = np.where(mask_BT, inputs["input_ids"], FILL)
        inputs["attention_mask"] = mask_BT
    if kind == "far":  # a mask of ones, or transformers takes the gaps for the bounds of packed sequences
        inputs["position_ids"] = np.linspace([0, 5, 1000], [30_000, 777, 40_000], T).astype(np.int64).T
        inputs["attention_mask"] = np.ones((B, T), np.int64)
    return inputs


def reference_model(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """As transformers loads it. Never by ``.to(dtype)``: that rounds the rotary frequencies too."""
    is_moe = loaders.open_checkpoint(directory).config.architecture == "Qwen3MoeForCausalLM"
    kind = Qwen3MoeForCausalLM if is_moe else Qwen3ForCausalLM
    model = kind.from_pretrained(directory, dtype=dtype).eval()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    return model


def reference(directory: Path, inputs: dict[str, np.ndarray], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Logits and taps of transformers, named as ours; a new model each time, for "dynamic" remembers lengths."""
    model, out = reference_model(directory, dtype), {}

    def keep(name: str):
        def hook(module, args, output):
            value = output[2] if name.endswith("gate") else output  # of (logits, weights, experts)
            out[name] = value.float().numpy() if value.is_floating_point() else value.numpy()

        return hook

    for name, module in model.named_modules():
        if name in ("model.embed_tokens", "model.norm") or name.count(".") == 2 or name.endswith("mlp.gate"):
            module.register_forward_hook(keep(name))
    mask_BT = inputs.get("attention_mask", np.ones(inputs["input_ids"].shape, np.int64))
    positions_BT = inputs.get("position_ids", np.maximum(mask_BT.cumsum(1) - 1, 0))
    tensors = {
        "input_ids": torch.from_numpy(inputs["input_ids"]),
        "attention_mask": torch.from_numpy(mask_BT),
        "position_ids": torch.from_numpy(positions_BT),
    }
    with torch.no_grad():
        out["logits"] = model(**tensors, use_cache=False).logits.float().numpy()
    return {name: value.reshape(*mask_BT.shape, -1) for name, value in out.items()}


def ours(backend: str, directory: Path, inputs: dict[str, np.ndarray], dtype: str = "float32") -> dict[str, np.ndarray]:
    """Logits and taps of a backend, float32."""
    model = loaded(backend, directory, dtype)
    logits, taps = model.with_taps(**inputs)
    values = {"logits": logits, **taps}
    if backend == "torch":
        values = {name: v.float().numpy() if v.is_floating_point() else v.numpy() for name, v in values.items()}
    return {name: np.asarray(v, np.int64 if name.endswith("gate") else np.float32) for name, v in values.items()}


@functools.lru_cache(maxsize=8)
def loaded(backend: str, directory: Path, dtype: str = "float32") -> Any:
    return {"jax": jax_models, "torch": torch_models}[backend].load(directory, dtype=dtype)


def errors(got: dict[str, Any], want: dict[str, Any], is_real_BT: np.ndarray) -> dict[str, float]:
    """Relative error of everything but the choice of experts, which must be equal."""
    assert sorted(got) == sorted(want)
    for name in (name for name in want if name.endswith("gate")):
        np.testing.assert_array_equal(got[name][is_real_BT], want[name][is_real_BT], err_msg=name)
    return {
        name: relative_error(got[name][is_real_BT], want[name][is_real_BT])
        for name in want
        if not name.endswith("gate")
    }


def assert_agree(directory: Path, inputs: dict[str, np.ndarray]) -> None:
    is_real_BT = inputs.get("attention_mask", np.ones(inputs["input_ids"].shape)) == 1
    want = reference(directory, inputs)
    jax, torch_ = ours("jax", directory, inputs), ours("torch", directory, inputs)
    layers = loaders.open_checkpoint(directory).config.num_hidden_layers
    assert {"logits", "model.embed_tokens", "model.norm", *(f"model.layers.{i}" for i in range(layers))} <= set(want)
    found = {
        "jax": (errors(jax, want, is_real_BT), AGAINST_TRANSFORMERS),
        "torch": (errors(torch_, want, is_real_BT), AGAINST_TRANSFORMERS),
        "jax against torch": (errors(jax, torch_, is_real_BT), AGAINST_EACH_OTHER),
    }
    print({side: f"{max(by_name.values()):.1e}" for side, (by_name, _) in found.items()})  # pytest -rP shows it
    over = {side: {n: e for n, e in by_name.items() if e > bound} for side, (by_name, bound) in found.items()}
    assert not any(over.values()), over
    for value in (*jax.values(), *torch_.values()):
        assert np.isfinite(value).all()  # also at padding


AGAINST_TRANSFORMERS, AGAINST_EACH_OTHER = 2e-5, 1e-5


@pytest.mark.parametrize("kind", ["plain", "padded", "far"])
@pytest.mark.parametrize("name", CASES)
def test_every_hidden_state_agrees_in_float32(name: str, kind: str, checkpoint_of: Build) -> None:
    assert_agree(checkpoint_of(name), inputs_of(kind))


@pytest.mark.parametrize("kind", ["one token", "long"])
@pytest.mark.parametrize("name", ["dense mixed windows biased", "moe every second layer yarn bf16 files"])
def test_every_hidden_state_agrees_in_any_length(name: str, kind: str, checkpoint_of: Build) -> None:
    assert_agree(checkpoint_of(name), inputs_of(kind))


def test_the_cases_are_what_their_names_say(checkpoint_of: Build) -> None:
    for name, case in CASES.items():
        directory = checkpoint_of(name)
        assert (directory / "model.safetensors.index.json").exists() == (case.max_shard_size is not None), name
        found = loaders.open_checkpoint(directory)
        assert {info.dtype for info in found.tensors.values()} == {
            {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[case.dtype]
        }, name
        assert found.config.head_dim == (8 if "without" in name else case.options["head_dim"]), name
    files = list(checkpoint_of("moe").glob("*.safetensors"))
    assert len(files) > 3
    with safe_open(files[0], "np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers' writer, not ours


def test_a_mistake_in_a_norm_or_a_window_is_seen(checkpoint_of: Build) -> None:
    directory, inputs = checkpoint_of("dense mixed windows biased"), inputs_of("plain")
    want, real_BT = reference(directory, inputs), np.ones((B, T), bool)
    model = torch_models.load(directory, dtype="float32")

    def worst() -> float:
        logits, taps = model.with_taps(**inputs)
        got = {name: value.numpy() for name, value in {"logits": logits, **taps}.items()}
        return max(errors(got, want, real_BT).values())

    assert worst() <= AGAINST_TRANSFORMERS
    attention = model.model.layers["1"].self_attn
    attention.q_norm, attention.k_norm = attention.k_norm, attention.q_norm
    assert worst() > 100 * AGAINST_TRANSFORMERS
    attention.q_norm, attention.k_norm = attention.k_norm, attention.q_norm
    model.model.config = dataclasses.replace(model.config, sliding_window=6)
    assert worst() > 100 * AGAINST_TRANSFORMERS
    model.model.config = model.config
    assert worst() <= AGAINST_TRANSFORMERS
    model.model.layers["0"].input_layernorm.eps = 1e-5
    assert worst() > 3 * AGAINST_TRANSFORMERS


NEW_TOKENS = 16
GENERATED = [
    "dense mixed windows biased",
    "dense tied biased one kv head bf16 files",
    "dense dynamic beyond",
    "dense yarn all factors",
    "moe tied unnormalised top 3 one kv head",
]


def rows_of(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [row[mask == 1] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def transformers_greedy(directory: Path, rows: list[np.ndarray], eos: list[int] | None) -> list[list[int]]:
    """What transformers continues every row with, each alone; a row ends with its end token."""
    found = []
    for row in rows:
        model = reference_model(directory)
        model.generation_config.eos_token_id = eos
        model.generation_config.pad_token_id = PAD
        ids = torch.from_numpy(row[None])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append(out[0, len(row) :].tolist())
    return found


@functools.cache
def greedy(directory: Path) -> list[list[int]]:
    return transformers_greedy(directory, rows_of(inputs_of("padded")), None)


def tokens(backend: str, directory: Path, **inputs: Any) -> list[list[int]]:
    return np.asarray(loaded(backend, directory).generate(**inputs)).tolist()


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.slow_unless("*-torch", "moe tied unnormalised top 3 one kv head-jax")
def test_greedy_tokens_of_a_ragged_batch_are_transformers_rows_alone(
    name: str, backend: str, checkpoint_of: Build
) -> None:
    directory = checkpoint_of(name)
    want = greedy(directory)
    assert len({token for row in want for token in row}) >= 8, f"a constant continuation shows little: {want}"
    assert tokens(backend, directory, **inputs_of("padded"), ignore_eos=True) == want


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_greedy_tokens_of_a_ragged_batch_are_transformers_batch(backend: str, checkpoint_of: Build) -> None:
    directory = checkpoint_of(GENERATED[0])
    rows = rows_of(inputs_of("padded"))
    length = max(map(len, rows))
    left_BT = np.stack([np.pad(row, (length - len(row), 0), constant_values=FILL) for row in rows])
    mask_BT = np.stack([np.arange(length) >= length - len(row) for row in rows]).astype(np.int64)
    model = reference_model(directory)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    ids, mask = torch.from_numpy(left_BT), torch.from_numpy(mask_BT)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)[:, length:].tolist()
    assert tokens(backend, directory, **inputs_of("padded"), ignore_eos=True) == want


# in JAX another batch is another program, and of experts a slow one to compile
@pytest.mark.parametrize(
    ("backend", "name"), [("jax", GENERATED[0]), ("jax", GENERATED[2]), *(("torch", name) for name in GENERATED)]
)
def test_a_row_of_a_ragged_batch_is_as_if_alone(name: str, backend: str, checkpoint_of: Build) -> None:
    directory, rows = checkpoint_of(name), rows_of(inputs_of("padded"))
    batch = tokens(backend, directory, **inputs_of("padded"), ignore_eos=True)
    assert [tokens(backend, directory, input_ids=row[None], ignore_eos=True)[0] for row in rows] == batch


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_end_tokens_of_generation_config_end_a_row(backend: str, checkpoint_of: Build, tmp_path: Path) -> None:
    source = checkpoint_of(GENERATED[0])
    endless = greedy(source)
    eos = [endless[0][5], endless[1][9]]
    model = reference_model(source)
    model.generation_config.eos_token_id = eos
    model.config.eos_token_id = endless[2][2]  # generation_config.json decides, not config.json
    model.save_pretrained(tmp_path)
    want = transformers_greedy(tmp_path, rows_of(inputs_of("padded")), eos)
    assert len(want[0]) <= 6
    assert len(want[1]) <= 10
    longest = max(map(len, want))
    assert len({len(row) for row in want}) > 1
    padded = [row + [PAD] * (longest - len(row)) for row in want]
    assert tokens(backend, tmp_path, **inputs_of("padded")) == padded
    assert tokens(backend, tmp_path, **inputs_of("padded"), ignore_eos=True) == endless


TRACE_NAMES = {"model.embed_tokens": "hidden_states.0", "model.norm": "final_hidden_state", "logits": "logits"}


def oracle_errors(directory: Path, inputs: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> dict[str, float]:
    """Distance to the oracle under the very routing that ``got`` chose."""

    def number(name: str) -> int:
        return int(name.split(".")[2]) + 1

    gates = [name for name in got if name.endswith("gate")]
    routing = {f"routing.{number(name)}": got[name] for name in gates}
    want = oracle_forward(loaders.open_checkpoint(directory), **inputs, routing=routing)
    is_real_BT = inputs["attention_mask"] == 1
    return {
        name: relative_error(
            got[name][is_real_BT], want[TRACE_NAMES.get(name) or f"hidden_states.{number(name)}"][is_real_BT]
        )
        for name in got
        if name not in gates
    }


@functools.cache
def peer_errors(directory: Path) -> dict[str, float]:
    inputs = inputs_of("padded")
    return oracle_errors(directory, inputs, reference(directory, inputs, torch.bfloat16))


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.bfloat16])
@pytest.mark.slow_unless("*-torch", "moe every second layer yarn bf16 files-jax")
def test_bfloat16_is_as_near_the_oracle_as_transformers(name: str, backend: str, checkpoint_of: Build) -> None:
    directory, inputs = checkpoint_of(name), inputs_of("padded")
    limits = LIMITS["bfloat16"]
    found = oracle_errors(directory, inputs, ours(backend, directory, inputs, "bfloat16"))
    peer = peer_errors(directory)
    assert sorted(found) == sorted(peer)
    print(
        "largest ratio",
        max(found[n] / max(peer[n], limits.u) for n in found),
        "logits",
        found["logits"],
        peer["logits"],
    )
    assert found["model.embed_tokens"] == peer["model.embed_tokens"] == 0.0
    over = {n: (e, peer[n]) for n, e in found.items() if e > limits.k * max(peer[n], limits.u)}
    assert not over
    assert max(found.values()) <= limits.lid(CASES[name].options["num_hidden_layers"])
