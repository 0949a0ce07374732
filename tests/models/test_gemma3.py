"""Gemma 3 on both backends: against transformers, on checkpoints that it wrote, and through the life of its weights.

transformers' Gemma 3 ignores ``attn_logit_softcapping``; there the reference is its own eager attention, told the cap.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from safetensors.torch import load_file, save_file
from shape_suffixes import checked_shape_suffixes
from test_against_transformers import errors, loaded, ours, rows_of, tokens
from test_oracle import relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.gemma3 import modeling_gemma3

import jax_models
import loaders
import torch_models
from jax_models.layers import attention as jax_attention
from jax_models.layers import mlp as jax_mlp
from jax_models.sharding import MESH_AXES
from parity.ruler import LIMITS
from torch_models.layers import attention as torch_attention
from torch_models.layers import mlp as torch_mlp

FULL, SLIDING = "full_attention", "sliding_attention"
MODELS = {"jax": jax_models, "torch": torch_models}
# query_pre_attn_scalar is not head_dim, head_dim is not hidden / heads, the last layer is not global, and no two sizes
# agree; the window is smaller than any prompt
SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 42,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "query_pre_attn_scalar": 23,
    "max_position_embeddings": 512,
    "sliding_window": 7,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
    "pad_token_id": None,
}
TWO = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
LINEAR = {
    FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
CAPPED = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0}


@dataclass(frozen=True)
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32  # of the files
    max_shard_size: str = "1GB"


CASES = {
    "tied": Case(SMALL, max_shard_size="40KB"),
    "untied linear biased one kv head bf16 files": Case(
        SMALL
        | {"rope_parameters": LINEAR, "attention_bias": True, "tie_word_embeddings": False}
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 14},
        torch.bfloat16,
        "20KB",
    ),
    "tied final cap fp16 files": Case(SMALL | TWO | {"final_logit_softcapping": 4.0}, torch.float16),
    "capped": Case(SMALL | CAPPED),
}
B, T, NEW_TOKENS = 3, 103, 16
BOUND, EACH_OTHER = 2e-5, 1e-5

Build = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Directory of a checkpoint that transformers wrote, once for each name, seed and changes."""
    made: dict[str, Path] = {}

    def build(name: str, seed: int = 7, **changes: Any) -> Path:
        key = repr((name, seed, sorted(changes.items())))
        if key not in made:
            case, directory = CASES[name], tmp_path_factory.mktemp("checkpoint")
            model = Gemma3ForCausalLM(Gemma3TextConfig(**case.options | changes)).to(case.dtype)
            draw(model, np.random.default_rng(seed))
            model.save_pretrained(directory, max_shard_size=case.max_shard_size)
            made[key] = directory
        return made[key]

    return build


def draw(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Weights under which every mistake shows; norms are around zero, for they stand for 1 + w."""
    for name, parameter in model.named_parameters():
        noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
        if "norm" in name:
            value = 0.3 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        else:
            gain = {"lm_head.weight": 3.0, "model.embed_tokens.weight": 0.8}.get(name, 1.5)
            value = noise * gain / parameter.shape[-1] ** 0.5
            if "embed_tokens" in name:
                value[3] *= 1e-3  # a canary for eps
        parameter.data.copy_(value)


def inputs_of(kind: str) -> dict[str, np.ndarray]:
    ids_BT = np.random.default_rng(11).integers(0, SMALL["vocab_size"], (B, T))
    ids_BT[:, -12] = ids_BT[0, 6] = 3
    if kind == "plain":
        return {"input_ids": ids_BT}
    if kind == "padded":  # left, right, and both sides
        steps = np.arange(T)
        mask_BT = np.stack([steps >= 16, steps < T - 29, (steps >= 9) & (steps < T - 1)]).astype(np.int64)
        return {"input_ids": np.where(mask_BT, ids_BT, 7), "attention_mask": mask_BT}
    # a mask of ones, or transformers takes the gaps for the bounds of packed sequences
    positions_BT = np.linspace([0, 5, 1000], [30_000, 777, 40_000], T).astype(np.int64).T
    return {"input_ids": ids_BT, "attention_mask": np.ones((B, T), np.int64), "position_ids": positions_BT}


def reference_model(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """As transformers loads it; its own eager attention where the config has a cap it would ignore."""
    cap = loaders.open_checkpoint(directory).config.attn_logit_softcapping
    how = "sdpa" if cap is None else "eager"
    return Gemma3ForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=how).eval()


@pytest.fixture(autouse=True)
def honoured_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = modeling_gemma3.eager_attention_forward

    def capped(module, *args, **options):
        return eager(module, *args, **options, softcap=module.config.attn_logit_softcapping)

    monkeypatch.setattr(modeling_gemma3, "eager_attention_forward", capped)


def reference(directory: Path, inputs: dict[str, np.ndarray], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Logits and taps of transformers, named as ours."""
    model, out = reference_model(directory, dtype), {}

    def keep(name: str):
        def hook(module, args, output):
            out[name] = output.float().numpy()

        return hook

    for name, module in model.named_modules():
        if name in ("model.embed_tokens", "model.norm") or (name.startswith("model.layers.") and name.count(".") == 2):
            module.register_forward_hook(keep(name))
    mask_BT = inputs.get("attention_mask", np.ones(inputs["input_ids"].shape, np.int64))
    positions_BT = inputs.get("position_ids", np.maximum(mask_BT.cumsum(1) - 1, 0))
    given = {"input_ids": inputs["input_ids"], "attention_mask": mask_BT, "position_ids": positions_BT}
    with torch.no_grad():
        logits_BTV = model(**{name: torch.from_numpy(value) for name, value in given.items()}, use_cache=False).logits
    return {**out, "logits": logits_BTV.float().numpy()}


def real_of(inputs: dict[str, np.ndarray]) -> np.ndarray:
    return inputs.get("attention_mask", np.ones(inputs["input_ids"].shape)) == 1


# Against transformers


@pytest.mark.parametrize("kind", ["plain", "padded", "far"])
@pytest.mark.parametrize("name", CASES)
def test_every_hidden_state_agrees_in_float32(name: str, kind: str, checkpoint_of: Build) -> None:
    directory, inputs = checkpoint_of(name), inputs_of(kind)
    is_real_BT, want = real_of(inputs), reference(directory, inputs)
    layers = loaders.open_checkpoint(directory).config.num_hidden_layers
    expected = {"logits", "model.embed_tokens", "model.norm", *(f"model.layers.{i}" for i in range(layers))}
    assert set(want) == expected
    got = {backend: ours(backend, directory, inputs) for backend in MODELS}
    found = {
        "jax": (errors(got["jax"], want, is_real_BT), BOUND),
        "torch": (errors(got["torch"], want, is_real_BT), BOUND),
        "jax against torch": (errors(got["jax"], got["torch"], is_real_BT), EACH_OTHER),
    }
    print({side: f"{max(by_name.values()):.1e}" for side, (by_name, _) in found.items()})  # pytest -rP shows it
    over = {side: {n: e for n, e in by_name.items() if e > bound} for side, (by_name, bound) in found.items()}
    assert not any(over.values()), over
    assert all(np.isfinite(value).all() for side in got.values() for value in side.values())  # also at padding


def test_the_weights_show_every_mistake(checkpoint_of: Build) -> None:
    """What an implementer may get wrong moves some hidden state by far more than the bound."""
    directory, inputs = checkpoint_of("capped"), inputs_of("plain")
    want, is_real_BT = reference(directory, inputs), real_of(inputs)
    model = torch_models.load(directory)
    config, layer = model.config, model.model.layers["1"]

    def worst() -> float:
        logits, taps = model.with_taps(**inputs)
        got = {name: value.numpy() for name, value in {"logits": logits, **taps}.items()}
        return max(errors(got, want, is_real_BT).values())

    def with_config(**changes: Any) -> Callable[[], None]:
        def change() -> None:
            model.config = model.model.config = dataclasses.replace(config, **changes)

        return change

    def swapped(owner: Any, one: str, other: str) -> Callable[[], None]:
        def swap() -> None:
            first, second = getattr(owner, one), getattr(owner, other)
            setattr(owner, one, second)
            setattr(owner, other, first)

        return swap

    def assigned(owner: Any, **changes: Any) -> Callable[[], None]:
        return lambda: [setattr(owner, name, value) for name, value in changes.items()] and None

    attention, rope, first = layer.self_attn, config.full_attention_rope, model.model.layers["0"].input_layernorm
    norms = ("post_attention_layernorm", "pre_feedforward_layernorm")
    mistakes = [
        (swapped(attention, "q_norm", "k_norm"), swapped(attention, "q_norm", "k_norm")),
        (swapped(layer, *norms), swapped(layer, *norms)),
        (assigned(attention, scale=None), assigned(attention, scale=config.query_pre_attn_scalar**-0.5)),
        (assigned(attention, softcap=None), assigned(attention, softcap=config.attn_logit_softcapping)),
        (assigned(layer.mlp, activation=torch.nn.functional.silu), assigned(layer.mlp, activation=torch_mlp.gelu_tanh)),
        (assigned(model, embed_scale=1.0), assigned(model, embed_scale=config.hidden_size**0.5)),
        (with_config(sliding_window=6), with_config()),
        (with_config(sliding_attention_rope=rope), with_config()),
        (with_config(final_logit_softcapping=None), with_config()),
        (assigned(first, eps=1e-5), assigned(first, eps=config.rms_norm_eps)),
    ]
    assert worst() <= BOUND
    for number, (make, undo) in enumerate(mistakes):
        make()
        assert worst() > 3 * BOUND, number
        undo()
        assert worst() <= BOUND, number


@pytest.mark.parametrize("backend", MODELS)
@pytest.mark.parametrize("name", ["tied", "untied linear biased one kv head bf16 files"])
def test_bfloat16_is_as_near_float32_as_transformers(name: str, backend: str, checkpoint_of: Build) -> None:
    """The weights are float32 in one case: transformers rounds them, and √hidden_size, to what is computed in."""
    directory, inputs, limits = checkpoint_of(name), inputs_of("padded"), LIMITS["bfloat16"]
    is_real_BT, exact, peer = real_of(inputs), *bfloat16_references(directory)
    got = ours(backend, directory, inputs, "bfloat16")
    np.testing.assert_array_equal(got["model.embed_tokens"], peer["model.embed_tokens"])
    found, allowed = errors(got, exact, is_real_BT), errors(peer, exact, is_real_BT)
    print({n: f"{found[n]:.1e} of {allowed[n]:.1e}" for n in found})
    assert {n: (e, allowed[n]) for n, e in found.items() if e > limits.k * max(allowed[n], limits.u)} == {}


@functools.cache
def bfloat16_references(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs = inputs_of("padded")
    return reference(directory, inputs), reference(directory, inputs, torch.bfloat16)


@functools.cache
def greedy(directory: Path) -> list[list[int]]:
    """What transformers continues every row with, each alone."""
    found = []
    for row in rows_of(inputs_of("padded")):
        model = reference_model(directory)
        model.generation_config.eos_token_id = None
        ids = torch.from_numpy(row[None])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append(out[0, len(row) :].tolist())
    return found


@pytest.mark.parametrize("backend", MODELS)
@pytest.mark.parametrize("name", [name for name in CASES if "final" not in name])
@pytest.mark.slow_unless("*-torch", "tied-jax")
def test_greedy_tokens_of_a_ragged_batch_are_transformers_rows_alone(
    name: str, backend: str, checkpoint_of: Build
) -> None:
    directory = checkpoint_of(name)
    want = greedy(directory)
    assert [len(row) for row in want] == [NEW_TOKENS] * B
    assert len({token for row in want for token in row}) >= 8, f"a constant continuation shows little: {want}"
    assert tokens(backend, directory, **inputs_of("padded"), max_new_tokens=NEW_TOKENS, ignore_eos=True) == want


@pytest.mark.parametrize("backend", MODELS)
@pytest.mark.parametrize("name", ["tied", "capped"])
def test_decoding_step_by_step_is_the_forward_pass(name: str, backend: str, checkpoint_of: Build) -> None:
    model, ids_BT = loaded(backend, checkpoint_of(name)), inputs_of("plain")["input_ids"]
    whole_BTV = np.asarray(model(ids_BT))
    start = T - 20
    logits_BV, cache = model.prefill(ids_BT[:, :start], max_new_tokens=20)
    found = [np.asarray(logits_BV)]
    for step in range(start, T):
        logits_BV, cache = model.decode(ids_BT[:, step], cache)
        found.append(np.asarray(logits_BV))
    assert relative_error(np.stack(found, 1), whole_BTV[:, start - 1 :]) <= 2e-6


@pytest.mark.parametrize("backend", MODELS)
def test_a_published_config_is_the_same_model(backend: str, checkpoint_of: Build, tmp_path: Path) -> None:
    """The other spelling: base frequencies, rope_scaling and the pattern of the windows, as on the hub."""
    source = checkpoint_of("tied", rope_parameters=LINEAR)
    shutil.copytree(source, tmp_path / "hub")
    document = json.loads((source / "config.json").read_text())
    for key in ("rope_parameters", "layer_types", "dtype", "_sliding_window_pattern"):
        document.pop(key, None)
    document |= {
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
        "torch_dtype": "float32",
        "cache_implementation": "hybrid",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    (tmp_path / "hub" / "config.json").write_text(json.dumps(document))
    assert loaders.open_checkpoint(tmp_path / "hub").config == loaders.open_checkpoint(source).config
    inputs = inputs_of("plain")
    got = ours(backend, tmp_path / "hub", inputs)
    assert max(errors(got, reference(tmp_path / "hub", inputs), real_of(inputs)).values()) <= BOUND
    assert max(errors(got, ours(backend, source, inputs), real_of(inputs)).values()) == 0


# The formulas, layer by layer


def attended(backend: str, dtype: str, *arrays: np.ndarray, **options: Any) -> np.ndarray:
    """``attend`` of a backend, on arrays of which all but the mask are given in ``dtype``."""
    if backend == "torch":
        q, k, v = (torch.from_numpy(array).to(getattr(torch, dtype)) for array in arrays[:3])
        return torch_attention.attend(q, k, v, torch.from_numpy(arrays[3]), **options).double().numpy()
    q, k, v = (jnp.asarray(array, dtype) for array in arrays[:3])
    return np.asarray(jax_attention.attend(q, k, v, jnp.asarray(arrays[3]), **options), np.float64)


def plain_attention(q, k, v, visible, scale: float, softcap: float | None) -> np.ndarray:
    """The formula in float64, a query and a head at a time; NaN where a query sees nothing."""
    out = np.full(q.shape, np.nan)
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    for b, t, n in np.ndindex(q.shape[:3]):
        seen, group = visible[b, t], n // (q.shape[2] // k.shape[2])
        scores = k[b, seen, group] @ q[b, t, n] * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        if seen.any():
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, seen, group] / weights.sum()
    return out


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 2.0**-8)])
@pytest.mark.parametrize("softcap", [None, 9.0])
@pytest.mark.parametrize("scale", [None, 0.8])
@pytest.mark.parametrize("backend", MODELS)
def test_attention_is_the_formula(
    backend: str, scale: float | None, softcap: float | None, dtype: str, bound: float
) -> None:
    rng = np.random.default_rng(0)
    sizes = ((2, 5, 6, 10), (2, 17, 3, 10), (2, 17, 3, 10))
    # as bfloat16 has them, so that only what is computed differs; scores spread far into the cap
    q, k, v = (torch.from_numpy(2 * rng.standard_normal(size)).bfloat16().float().numpy() for size in sizes)
    visible_BTS = rng.random((2, 5, 17)) < 0.6
    visible_BTS[:, :, 3] = True
    want = plain_attention(q, k, v, visible_BTS, 10**-0.5 if scale is None else scale, softcap)
    assert relative_error(attended(backend, dtype, q, k, v, visible_BTS, scale=scale, softcap=softcap), want) <= bound
    if softcap is not None:
        uncapped = plain_attention(q, k, v, visible_BTS, 10**-0.5 if scale is None else scale, None)
        assert relative_error(uncapped, want) > 10 * bound


@pytest.mark.parametrize("backend", MODELS)
def test_a_query_that_sees_nothing_stays_finite_under_a_cap(backend: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 4, heads, 6)).astype(np.float32) for heads in (4, 2, 2))
    visible_BTS = np.tril(np.ones((1, 4, 4), bool))
    visible_BTS[0, 2] = False
    found = attended(backend, "float32", q, k, v, visible_BTS, scale=0.3, softcap=2.0)
    assert np.isfinite(found).all()
    others = [0, 1, 3]
    want = plain_attention(q, k, v, visible_BTS, 0.3, 2.0)
    assert relative_error(found[:, others], want[:, others]) <= 1e-6


@pytest.mark.parametrize("backend", MODELS)
def test_the_activation_is_rounded_once(backend: str) -> None:
    x = torch.linspace(-6, 6, 4001).bfloat16()
    exact = np.array([0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) for a in x.tolist()])
    if backend == "torch":
        found = torch_mlp.gelu_tanh(x).double().numpy()
    else:
        found = np.asarray(jax_mlp.gelu_tanh(jnp.asarray(x.float().numpy(), jnp.bfloat16)), np.float64)
    np.testing.assert_allclose(found, exact, rtol=2.0**-8, atol=1e-6)


# The life of the weights


@pytest.mark.parametrize("backend", MODELS)
def test_a_reload_is_a_cold_load_bit_for_bit_and_so_is_the_way_back(backend: str, checkpoint_of: Build) -> None:
    """Zero-centred norms included: nothing that was computed from an old weight is left."""
    a, b = checkpoint_of("capped"), checkpoint_of("capped", seed=8)
    inputs = inputs_of("padded")
    model = MODELS[backend].load(a)
    first, first_tokens = np.asarray(model(**inputs)), np.asarray(model.generate(**inputs, max_new_tokens=4))
    model = model.update_weights_from_disk(b)
    cold = MODELS[backend].load(b)
    assert model.digests() == cold.digests()
    np.testing.assert_array_equal(np.asarray(model(**inputs)), np.asarray(cold(**inputs)))
    assert not np.array_equal(np.asarray(model(**inputs)), first)
    model = model.update_weights_from_disk(a)
    np.testing.assert_array_equal(np.asarray(model(**inputs)), first)
    np.testing.assert_array_equal(np.asarray(model.generate(**inputs, max_new_tokens=4)), first_tokens)


def test_a_norm_whose_weight_is_written_by_others_is_not_stale(checkpoint_of: Build) -> None:
    """1 + w is kept in torch: a run computes it anew, whoever wrote w."""
    a, b = checkpoint_of("capped"), checkpoint_of("capped", seed=8)
    model, other, inputs = torch_models.load(a), torch_models.load(b), inputs_of("plain")
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    np.testing.assert_array_equal(model(**inputs).numpy(), other(**inputs).numpy())


@pytest.mark.parametrize("backend", MODELS)
def test_a_swapped_embedding_is_swapped_in_the_tied_head_too(
    backend: str, checkpoint_of: Build, tmp_path: Path
) -> None:
    source, inputs = checkpoint_of("capped"), inputs_of("padded")
    tensors = load_file(source / "model.safetensors")
    table_VD = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    shutil.copytree(source, tmp_path / "it")
    save_file(tensors | {"model.embed_tokens.weight": table_VD}, tmp_path / "it" / "model.safetensors")
    model = MODELS[backend].load(source).set_embed_and_head(table_VD.numpy())
    embed, head = model.get_embed_and_head()
    assert embed is head
    want = MODELS[backend].load(tmp_path / "it")
    assert model.digests() == want.digests()
    np.testing.assert_array_equal(np.asarray(model(**inputs)), np.asarray(want(**inputs)))


@pytest.mark.parametrize("backend", MODELS)
@pytest.mark.parametrize("name", CASES)
def test_export_gives_back_the_checkpoint(name: str, backend: str, checkpoint_of: Build, tmp_path: Path) -> None:
    source = checkpoint_of(name)
    exported = loaded(backend, source).export(tmp_path / "out")
    files = sorted(path.name for path in source.glob("*.safetensors"))
    assert sorted(path.name for path in exported.glob("*.safetensors")) == files
    for file in files:
        found, want = load_file(exported / file), load_file(source / file)
        assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in want.items()}
        for tensor in want:
            assert torch.equal(found[tensor].view(torch.uint8), want[tensor].view(torch.uint8)), tensor
    assert json.loads((exported / "config.json").read_text()) == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("backend", MODELS)
@pytest.mark.parametrize("name", ["tied", "untied linear biased one kv head bf16 files"])
def test_two_stages_are_the_whole(name: str, backend: str, checkpoint_of: Build) -> None:
    """The second begins with a global layer: which rotary embedding and window a layer has goes by its own number."""
    directory, inputs = checkpoint_of(name), inputs_of("padded")
    first, last = (MODELS[backend].load(directory, dtype="float32", stage=(index, 2)) for index in (0, 1))
    mask_BT = inputs["attention_mask"]
    found = np.asarray(last(hidden_states=first(**inputs), attention_mask=mask_BT))
    want = np.asarray(loaded(backend, directory)(**inputs))
    assert relative_error(found[mask_BT == 1], want[mask_BT == 1]) <= (0 if backend == "torch" else 1e-6)


EVEN = {"vocab_size": 208, "hidden_size": 40, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2)], ids=["data2-expert2-tensor2", "expert4-tensor2"])
@pytest.mark.parametrize("name", ["tied", "capped"])
@pytest.mark.usefixtures("eight_devices")
def test_a_model_on_a_mesh_is_the_same_model(
    name: str, sizes: tuple[int, ...], checkpoint_of: Build, tmp_path: Path
) -> None:
    directory = checkpoint_of(name, **EVEN | TWO)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(sizes), MESH_AXES)
    model, alone, inputs = jax_models.load(directory, mesh=mesh), loaded("jax", directory), inputs_of("padded")
    inputs = {key: np.concatenate([value, value[:1]]) for key, value in inputs.items()}  # 4 rows
    is_real_BT = real_of(inputs)
    assert relative_error(np.asarray(model(**inputs))[is_real_BT], np.asarray(alone(**inputs))[is_real_BT]) <= 2e-6
    options = {"max_new_tokens": 6, "ignore_eos": True}
    assert np.asarray(model.generate(**inputs, **options)).tolist() == tokens("jax", directory, **inputs, **options)
    assert model.digests() == alone.digests()
    attention = model.weights["model"]["layers"]["0"]["self_attn"]
    assert attention["q_proj"]["weight"].addressable_shards[0].data.shape == (80 // (sizes[1] * sizes[2]), 40)
    assert attention["q_norm"]["weight"].is_fully_replicated
    _, cache = model.prefill(**inputs)
    assert cache.arrays.layers["0"]["key"].addressable_shards[0].data.shape[1] == 1  # of four, cut by all or by expert


# What capturing a graph needs


class Recorded(TorchDispatchMode):
    """Names of the operations inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["tied", "capped"])
def test_a_decoding_step_reads_no_value_and_makes_no_tensor_on_the_host(name: str, checkpoint_of: Build) -> None:
    model = torch_models.load(checkpoint_of(name))
    _, cache = model.prefill(**inputs_of("padded"))
    ids_B1 = torch.ones(B, 1, dtype=torch.int64)
    with Recorded() as recorded:
        model.decode_step(ids_B1, cache)
    forbidden = {"_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal", "is_nonzero", "item"}
    assert {"mm", "addmm", "rsqrt", "tanh" if name == "capped" else "gelu"} & recorded.names
    assert recorded.names & forbidden == set()


@pytest.mark.parametrize("backend", MODELS)
def test_shape_suffixes_tell_the_truth(backend: str, checkpoint_of: Build) -> None:
    # sizes that no other test has traced
    model = MODELS[backend].load(checkpoint_of("capped", vocab_size=107))
    ids_BT = np.arange(33).reshape(3, 11)
    with checked_shape_suffixes("jax_models", "torch_models") as seen:
        model(ids_BT)
        model.generate(ids_BT, max_new_tokens=2)
    method = "__call__" if backend == "jax" else "forward"
    expected = {f"gemma3.DecoderLayer.{method}", "gemma3.Gemma3ForCausalLM.head", "layers.attention.attend"}
    assert {f"{backend}_models.{name}" for name in expected} <= seen
