"""Mutants of the MLP and the experts, the layers' order, and the head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import import_module
from typing import Any

from loaders import CheckpointError
from parity.mutants import Mutant, Patch
from parity.mutants.plants import (
    BOTH,
    DEEP,
    DENSE,
    MANY,
    MOE,
    MOE_RAW,
    TIED,
    Instead,
    at_backend,
    bfloat16,
    each,
    exchanged,
    of,
    subclassed,
    swapping,
    wrapped,
)

_ROUTER = "layers.moe:TopKRouter"
_EXPERTS = "layers.moe:Experts.CALL"


def _with_gelu(build: Any, backend: str) -> Any:
    kernels = import_module("torch.nn.functional" if backend == "torch" else "jax.nn")
    return lambda self, *args, **kw: build(self, *args, **kw | {"activation": kernels.gelu})


def _gelu(original: Any, backend: str) -> Any:
    if backend == "torch":
        return Instead(original, silu=original.gelu)
    return Instead(original, nn=Instead(original.nn, silu=original.nn.gelu))


def _sigmoid_router(original: Any, backend: str) -> Any:
    if backend == "torch":
        return Instead(original, softmax=lambda x, dim: x.sigmoid())
    return Instead(original, nn=Instead(original.nn, softmax=lambda x, axis: original.nn.sigmoid(x)))


def _one_less(original: Any, np_: Any, self: Any, x: Any) -> Any:
    chosen, experts = original(self, x)
    first = chosen[..., :-1]
    return np_.concatenate([first / np_.sum(first, -1)[..., None], 0 * chosen[..., -1:]], -1), experts


def _louder(row: int) -> Callable[[Any, Any], Any]:
    def change(np_: Any, w: Any) -> Any:
        factors = np_.ones(len(w))
        factors[row] = 1.01
        return w * factors.reshape(-1, *(1,) * (w.ndim - 1))

    return change


def _normed(original: Any, np_: Any, self: Any, x: Any) -> Any:
    chosen, experts = original(self, x)
    return chosen / np_.sum(chosen, -1)[..., None], experts


def not_normed(original: Any, self: Any, *args: Any, **options: Any) -> None:
    original(self, *args, **options)
    self.norm_topk_prob = False


def _capacity(original: Any, np_: Any, self: Any, x: Any, chosen: Any, experts: Any, **updates: Any) -> Any:
    E = self.down_proj.shape[0]
    one_hot_AE = (experts.reshape(-1, 1) == np_.arange(E)[None, :]).int()
    turn = (one_hot_AE.cumsum(0) * one_hot_AE).sum(-1).reshape(experts.shape)
    return original(self, x, chosen * (turn <= 1.1 * experts.numel() / E), experts, **updates)


def _text_experts(np_: Any, w: Any) -> Any:
    return w[np_.asarray([int(name) for name in sorted(map(str, range(w.shape[0])))])]


def no_final_norm(original: Any, backend: str) -> Any:
    def build(self: Any, *args: Any) -> None:
        original(self, *args)
        self.norm.__class__ = subclassed(type(self.norm), backend, lambda self, x: x)

    return build


def _last_layer_skipped(original: Any, backend: str) -> Any:
    def build(self: Any, config: Any, layer: int, *args: Any) -> None:
        original.__init__(self, config, layer, *args)
        self.is_skipped = layer == config.num_hidden_layers - 1

    def call(self: Any, x: Any, step: Any, cache: Any = None) -> Any:
        if not self.is_skipped:
            return getattr(original, "forward" if backend == "torch" else "__call__")(self, x, step, cache)
        return x if backend == "torch" else (x, cache)

    mutant = subclassed(original, backend, call)
    mutant.__init__ = build
    return mutant


def _embedding_for_head(original: Any, self: Any, x: Any) -> Any:
    return self.model.embed_tokens.project(x)


def _untied(original: Any, *args: Any) -> Any:
    config, problems = original(*args)
    return dataclasses.replace(config, tie_word_embeddings=False), problems


def _moe(*args: Any, **more: Any) -> Mutant:
    return of("moe", *args, **({"subject": MOE} | more))


MOE_AND_HEAD: list[Mutant] = [
    _moe(
        "gate_up_swapped",
        "parity 22",
        swapping("layers.mlp:MLP.CALL", "gate_proj", "up_proj"),
        "silu on up, not on gate",
        subject=DENSE,
        backends=("torch",),
    ),
    _moe(
        "gelu_for_silu",
        "parity 23",
        lambda: [Patch("layers.mlp:MLP.__init__", _with_gelu)],
        "gelu for silu in the dense MLP",
        subject=DENSE,
        backends=("torch",),
    ),
    _moe("gelu_in_experts", "parity 23", lambda: [Patch("layers.moe:KERNELS", _gelu)], "gelu for silu in the experts"),
    _moe(
        "one_channel_louder",
        "planted",
        each("up_proj.weight", _louder(7)),
        "one row of the dense MLP's up projection one percent too large",
        subject=DENSE,
        backends=("torch",),
    ),
    _moe(
        "one_expert_louder",
        "planted",
        each("experts.down_proj", _louder(3)),
        "what one expert of five says, one percent too large",
        backends=("torch",),
    ),
    _moe(
        "expert_plus_one",
        "parity 24",
        wrapped(
            _EXPERTS,
            lambda run, self, x, w, e, *more, **other: run(self, x, w, (e + 1) % len(self.down_proj), *more, **other),
        ),
        "every token goes to the expert after its own",
        backends=BOTH,
    ),
    _moe(
        "top_k_minus_one",
        "parity 25",
        at_backend(_ROUTER + ".CALL", _one_less),
        "the last chosen expert is not heard",
        backends=BOTH,
    ),
    _moe(
        "norm_topk_prob_ignored",
        "parity 26",
        wrapped(_ROUTER + ".__init__", not_normed),
        "chosen weights do not sum to one",
        backends=BOTH,
    ),
    _moe(
        "top_k_weights_permuted",
        "parity 27",
        at_backend(
            _ROUTER + ".CALL", lambda run, np_, self, x: (np_.flip((found := run(self, x))[0], (-1,)), found[1])
        ),
        "weights in the reverse order of their experts",
    ),
    _moe(
        "softmax_after_top_k",
        "parity 28",
        at_backend(_ROUTER + ".CALL", _normed),
        "softmax over the chosen experts only",
        subject=MOE_RAW,
        backends=("torch",),
    ),
    _moe(
        "softmax_after_top_k_normed",
        "parity 28",
        at_backend(_ROUTER + ".CALL", _normed),
        "softmax over the chosen experts only",
        equivalent="with norm_topk_prob the chosen weights are normalised anyway",
    ),
    _moe(
        "sigmoid_router",
        "parity 28",
        lambda: [Patch("layers.moe:KERNELS", _sigmoid_router)],
        "sigmoid for softmax in the router, as DeepSeek has it",
    ),
    _moe(
        "experts_as_text",
        "parity 30",
        each(".experts.", _text_experts),
        "experts stacked in text order: 10 before 2",
        subject=MANY,
    ),
    _moe(
        "router_inbfloat16",
        "parity 31",
        wrapped(_ROUTER + ".CALL", lambda run, self, x: run(self, bfloat16(x))),
        "router input rounded to bfloat16",
    ),
    _moe(
        "dense_layer_as_moe",
        "parity 32",
        wrapped("loaders.qwen3:Qwen3MoeConfig.is_sparse", lambda sparse, self, i: True),
        "mlp_only_layers ignored",
        refusal=CheckpointError,
        backends=BOTH,
    ),
    _moe(
        "sparse_step_off_by_one",
        "parity 32",
        wrapped("loaders.qwen3:Qwen3MoeConfig.is_sparse", lambda sparse, self, i: i % self.decoder_sparse_step == 0),
        "decoder_sparse_step counted from the wrong layer",
        subject=MOE_RAW,
        refusal=CheckpointError,
    ),
    _moe(
        "capacity_drop", "parity 33", at_backend(_EXPERTS, _capacity), "tokens beyond an expert's capacity are dropped"
    ),
    of(
        "head",
        "embedding_for_head",
        "parity 34",
        wrapped("qwen3:Qwen3ForCausalLM.head", _embedding_for_head),
        "an untied model reads its embedding for a head",
        backends=BOTH,
    ),
    of(
        "head",
        "head_for_tied",
        "parity 34",
        wrapped("loaders.qwen3:config_from_json", _untied),
        "a tied model looks for a head of its own",
        TIED,
        refusal=CheckpointError,
        backends=BOTH,
    ),
    of(
        "head",
        "head_rows_plus_one",
        "parity 35",
        at_backend("qwen3:Qwen3ForCausalLM.head", lambda head, np_, self, x: np_.roll(head(self, x), 1, -1)),
        "logits of the token before",
        backends=("torch",),
    ),
    of("head", "layers_swapped", "parity 37", exchanged("layers.0.", "layers.1."), "two layers swapped", backends=BOTH),
    of(
        "head",
        "layers_as_text",
        "parity 30",
        wrapped("loaders.stage:Stage.layers", lambda layers, self, n: sorted(layers(self, n), key=str)),
        "layers run in text order: 10 before 2",
        DEEP,
    ),
    of(
        "head",
        "last_layer_skipped",
        "parity 38",
        lambda: [Patch("qwen3:DecoderLayer", _last_layer_skipped)],
        "the last layer is left out",
        backends=BOTH,
    ),
    of(
        "head",
        "final_norm_dropped",
        "parity 39",
        lambda: [Patch("layers.decoder:Decoder.__init__", no_final_norm)],
        "no final norm",
        backends=BOTH,
    ),
]
