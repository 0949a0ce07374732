"""Mutants of what a model computes: attention, MLP and experts, head. Most can be planted on either backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from loaders import CheckpointError
from parity.mutant_bench import Subject, decode, forward, loaded_bits
from parity.mutants import Kind, Mutant, Patch
from parity.zoo import ZOO

BOTH = ("torch", "jax")
_TWO = (("num_hidden_layers", 2),)
DENSE = Subject("qwen3", _TWO)
TIED = Subject("qwen3-tied", _TWO)
BIAS = Subject("qwen3-bias", _TWO)
SLIDING = Subject("qwen3-sliding", (*_TWO, ("layer_types", ("sliding_attention", "full_attention"))))
YARN = Subject("qwen3-yarn", _TWO)
DEEP = Subject("qwen3-deep")  # layer 10 sorts before layer 2 as text
MOE = Subject("qwen3-moe", _TWO)
MOE_RAW = Subject("qwen3-moe-nonorm", _TWO)
MANY = Subject("qwen3-moe", (*_TWO, ("num_experts", 12)))
SQUARE = Subject("qwen3", (*_TWO, ("hidden_size", 60)))  # o_proj is 60 x 60
HALF = Subject("qwen3", _TWO, "BF16")


class Instead:
    """A module with some of its names replaced."""

    def __init__(self, original: Any, **changes: Any) -> None:
        self.original = original
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def xp(backend: str) -> Any:
    """The array module; what is used here is spelled alike in both."""
    return import_module("torch" if backend == "torch" else "jax.numpy")


def wrapped(where: str, change: Callable[..., Any]) -> Callable[[], list[Patch]]:
    """``change(original, *arguments)`` stands in for the function at ``where``."""

    def make(original: Any, backend: str) -> Any:
        def mutant(*args: Any, **kwargs: Any) -> Any:
            return change(original, *args, **kwargs)

        return mutant

    return lambda: [Patch(where, make)]


def at_backend(where: str, change: Callable[..., Any]) -> Callable[[], list[Patch]]:
    """As ``wrapped``, with the backend's array module for a second argument."""
    return lambda: [
        Patch(where, lambda original, backend: lambda *args, **kw: change(original, xp(backend), *args, **kw))
    ]


def weights(edit: Callable[[dict[str, Any], Any], dict[str, Any]]) -> Callable[[], list[Patch]]:
    """Every load gives other weights: ``edit(parameters by name, array module)`` returns those that change."""

    def make(original: Any, backend: str) -> Any:
        def read(*args: Any, **kwargs: Any) -> Any:
            found, report = original(*args, **kwargs)
            if backend == "torch":
                return found | {name: w.clone().contiguous() for name, w in edit(found, xp(backend)).items()}, report
            from flax import traverse_util

            flat = traverse_util.flatten_dict(found, sep=".")
            return traverse_util.unflatten_dict(flat | edit(flat, xp(backend)), sep="."), report

        return read

    return lambda: [Patch("load:read_weights", make)]


def each(part: str, change: Callable[[Any, Any], Any]) -> Callable[[], list[Patch]]:
    """Change every parameter whose name holds ``part``."""
    return weights(lambda found, np_: {name: change(np_, w) for name, w in found.items() if part in name})


def exchanged(a: str, b: str) -> Callable[[], list[Patch]]:
    """Parameters with ``a`` in their name and those with ``b`` there change places."""
    names = lambda found: (
        {name: name.replace(a, b) for name in found if a in name}
        | {  # noqa: E731
            name: name.replace(b, a) for name in found if b in name
        }
    )
    return weights(lambda found, np_: {name: found[other] for name, other in names(found).items()})


def swapping(where: str, a: str, b: str) -> Callable[[], list[Patch]]:
    """While the module at ``where`` runs, its two submodules have changed places."""

    def change(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        first, second = getattr(self, a), getattr(self, b)
        setattr(self, a, second), setattr(self, b, first)
        try:
            return original(self, *args, **kwargs)
        finally:
            setattr(self, a, first), setattr(self, b, second)

    return wrapped(where, change)


def rms(np_: Any, x: Any, eps: float, axis: Any = -1) -> Any:
    return x * (np_.mean(x * x, axis=axis, keepdims=True) + eps) ** -0.5


def subclassed(original: Any, backend: str, call: Callable[..., Any]) -> Any:
    return type(f"Mutant{original.__name__}", (original,), {"forward" if backend == "torch" else "__call__": call})


def _full_width(original: Any, backend: str) -> Any:
    np_ = xp(backend)
    return subclassed(original, backend, lambda self, x: self.weight[...] * rms(np_, x, self.eps, (-2, -1)))


def _norm_after_rope() -> list[Patch]:
    waiting: list[Callable[[Any], Any]] = []  # q_norm, rotate, k_norm, rotate: each norm waits for the next rotation

    def late(original: Any, backend: str) -> Any:
        def call(self: Any, x: Any) -> Any:
            waiting.append(lambda rotated: self.weight[...] * rms(xp(backend), rotated, self.eps))
            return x

        return subclassed(original, backend, call)

    def rotate(original: Any, backend: str) -> Any:
        return lambda *args: waiting.pop()(original(*args))

    return [Patch("layers.attention:RMSNorm", late), Patch("layers.attention:rotate", rotate)]


def _interleaved(original: Any, np_: Any, x: Any, cos: Any, sin: Any) -> Any:
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos[:, :, None], sin[:, :, None]
    return np_.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def _bfloat16(x: Any) -> Any:
    return x.bfloat16().float()


def attending(change: Callable[..., tuple[Any, Any, Any, dict[str, Any], Any]]) -> Callable[[], list[Patch]]:
    """``change(array module, head axis, q, k, v)`` gives q, k, v, options of the kernel, and what its output becomes."""

    def make(original: Any, backend: str) -> Any:
        if backend == "torch":

            def sdpa(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
                q, k, v, options, after = change(xp("torch"), 1, q, k, v)
                return after(original.scaled_dot_product_attention(q, k, v, **kwargs | options))

            return Instead(original, scaled_dot_product_attention=sdpa)

        def attention(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
            q, k, v, options, after = change(xp("jax"), 2, q, k, v)
            return after(original.nn.dot_product_attention(q, k, v, **kwargs | options))

        return Instead(original, nn=Instead(original.nn, dot_product_attention=attention))

    return lambda: [Patch("layers.attention:KERNELS", make)]


def _same(x: Any) -> Any:
    return x


def _tiled(np_: Any, axis: int, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any, dict[str, Any], Any]:
    groups = q.shape[axis] // k.shape[axis]
    return q, np_.concatenate([k] * groups, axis), np_.concatenate([v] * groups, axis), {}, _same


def _hidden_scale(np_: Any, axis: int, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any, dict[str, Any], Any]:
    config = ZOO["qwen3"].config
    return q, k, v, {"scale": (config["hidden_size"] / config["num_attention_heads"]) ** -0.5}, _same


def _head_major(np_: Any, axis: int, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any, dict[str, Any], Any]:
    def mixed(out: Any) -> Any:  # [.., N, H] laid out as [.., H, N]
        out_BTNH = np_.swapaxes(out, 1, axis) if axis == 1 else out
        B, T, N, H = (out_BTNH := np_.swapaxes(out, 1, 2) if axis == 1 else out_BTNH).shape
        out_BTNH = np_.swapaxes(out_BTNH, 2, 3).reshape(B, T, N, H)
        return np_.swapaxes(out_BTNH, 1, 2) if axis == 1 else out_BTNH

    return q, k, v, {}, mixed


def _gelu(original: Any, backend: str) -> Any:
    if backend == "torch":
        return Instead(original, silu=original.gelu)
    return Instead(original, nn=Instead(original.nn, silu=original.nn.gelu))


def _sigmoid_router(original: Any, backend: str) -> Any:
    if backend == "torch":
        return Instead(original, softmax=lambda x, dim: x.sigmoid())
    return Instead(original, nn=Instead(original.nn, softmax=lambda x, axis: original.nn.sigmoid(x)))


def _later(original: Any, np_: Any, self: Any, *args: Any) -> Any:
    """One more position for a decoded token, and only there."""
    if np_.__name__ == "torch":
        ids_BT, positions_BT, cache = args
        return original(self, ids_BT, positions_BT + (1 if ids_BT.shape[1] == 1 else 0), cache)
    given, inputs, cache = args
    logits, cache = original(self, given, inputs, dataclasses.replace(cache, position=cache.position + 1))
    return logits, dataclasses.replace(cache, position=cache.position - 1)


def _decode_positions() -> list[Patch]:
    def make(original: Any, backend: str) -> Any:
        return lambda self, *args, **kw: _later(original, xp(backend), self, *args, *kw.values())

    where = {"torch": "model:Model._step", "jax": "programs:Programs._decode"}
    return [_PerBackend(where, make)]


class _PerBackend(Patch):
    """A patch whose place differs between the twins."""

    def __init__(self, where: dict[str, str], make: Any) -> None:
        object.__setattr__(self, "places", where)
        super().__init__(where["jax"], make)

    def on(self, backend: str) -> Any:
        return Patch(self.places[backend], self.make).on(backend)  # pyright: ignore[reportAttributeAccessIssue]


def _slot_before(original: Any, self: Any, x: Any, cos: Any, sin: Any, seen: Any, cache: Any, start: Any) -> Any:
    return original(self, x, cos, sin, seen, cache, start - 1 if cache is not None and x.shape[1] == 1 else start)


def _unshifted(original: Any, ids: Any, mask: Any, positions: Any, **kwargs: Any) -> Any:
    checked = original(ids, mask, positions, **kwargs)
    counted = np.broadcast_to(np.arange(checked.input_ids.shape[1], dtype=np.int32), checked.input_ids.shape)
    return dataclasses.replace(checked, position_ids=counted)


def _one_less(original: Any, np_: Any, self: Any, x: Any) -> Any:
    chosen, experts = original(self, x)
    first = chosen[..., :-1]
    return np_.concatenate([first / np_.sum(first, -1)[..., None], 0 * chosen[..., -1:]], -1), experts


def _normed(original: Any, np_: Any, self: Any, x: Any) -> Any:
    chosen, experts = original(self, x)
    return chosen / np_.sum(chosen, -1)[..., None], experts


def _not_normed(original: Any, self: Any, *args: Any) -> None:
    original(self, *args)
    self.norm_topk_prob = False


def _capacity(original: Any, np_: Any, self: Any, x: Any, chosen: Any, experts: Any) -> Any:
    E = self.down_proj.shape[0]
    one_hot_AE = (experts.reshape(-1, 1) == np_.arange(E)[None, :]).int()
    turn = (one_hot_AE.cumsum(0) * one_hot_AE).sum(-1).reshape(experts.shape)
    return original(self, x, chosen * (turn <= 1.1 * experts.numel() / E), experts)


def _no_final_norm(original: Any, backend: str) -> Any:
    def build(self: Any, *args: Any) -> None:
        original(self, *args)
        self.norm.__class__ = subclassed(type(self.norm), backend, lambda self, x: x)

    return build


def _last_layer_skipped(original: Any, backend: str) -> Any:
    def build(self: Any, config: Any, layer: int, *args: Any) -> None:
        original.__init__(self, config, layer, *args)
        self.is_skipped = layer == config.num_hidden_layers - 1

    def call(self: Any, x: Any, cos: Any, sin: Any, seen: Any, cache: Any, start: Any) -> Any:
        if not self.is_skipped:
            return getattr(original, "forward" if backend == "torch" else "__call__")(
                self, x, cos, sin, seen, cache, start
            )
        return x if backend == "torch" else (x, cache)

    mutant = subclassed(original, backend, call)
    mutant.__init__ = build
    return mutant


def _embedding_for_head(original: Any, self: Any, x: Any) -> Any:
    project = import_module(type(self).__module__).project
    return project(x, self.model.embed_tokens.weight[...])


def _untied(original: Any, *args: Any) -> Any:
    config, problems = original(*args)
    return dataclasses.replace(config, tie_word_embeddings=False), problems


def _as_text(found: dict[str, Any], np_: Any) -> dict[str, Any]:
    """Layers in the order in which their numbers sort as text."""
    layers = {name.split(".")[2] for name in found if name.startswith("model.layers.")}
    order = dict(zip(sorted(layers, key=int), sorted(layers), strict=True))
    names = {name: name.split(".") for name in found if name.startswith("model.layers.")}
    return {name: found[".".join([*parts[:2], order[parts[2]], *parts[3:]])] for name, parts in names.items()}


def _text_experts(np_: Any, w: Any) -> Any:
    return w[np_.asarray([int(name) for name in sorted(map(str, range(w.shape[0])))])]


def _expert_missing(np_: Any, w: Any) -> Any:
    return np_.concatenate([w[:2], 0 * w[2:3], w[3:]], 0)


def _shards_swapped(original: Any, backend: str) -> Any:
    turn = {0: 1, 1: 0, None: None}
    return tuple(dataclasses.replace(rule, shard_id=turn[rule.shard_id]) for rule in original)


def _through_float16(found: dict[str, Any], np_: Any) -> dict[str, Any]:
    to = (lambda w, dtype: w.to(dtype)) if np_.__name__ == "torch" else (lambda w, dtype: w.astype(dtype))
    return {name: to(to(w, np_.float16), np_.bfloat16) for name, w in found.items()}


def _of(
    kind: Kind,
    name: str,
    source: str,
    plant: Callable[[], Sequence[Patch]],
    says: str,
    subject: Subject = DENSE,
    **more: Any,
) -> Mutant:
    return Mutant(name, kind, says, source, plant, subject, **({"detector": forward} | more))


def _attention(*args: Any, **more: Any) -> Mutant:
    return _of("attention", *args, **more)


def _moe(*args: Any, **more: Any) -> Mutant:
    return _of("moe", *args, **({"subject": MOE} | more))


_RELATIVE = "rotary embedding is relative: only differences of positions reach a score"
_CALL = "layers.attention:Attention.CALL"
_NORM = "layers.norm:RMSNorm"
_ROUTER = "layers.moe:TopKRouter"
_EXPERTS = "layers.moe:Experts.CALL"
_WINDOW = "loaders.qwen3:Qwen3Config.window"
_ROPE = "qwen3:rotary_embedding"

CODE: list[Mutant] = [
    _attention(
        "qk_norm_swapped", "parity 1", swapping(_CALL, "q_norm", "k_norm"), "q_norm and k_norm swapped", backends=BOTH
    ),
    _attention(
        "q_norm_weight_dropped", "parity 2", each("q_norm", lambda np_, w: np_.ones_like(w)), "q_norm without weight"
    ),
    _attention(
        "k_norm_weight_dropped",
        "parity 2",
        each("k_norm", lambda np_, w: np_.ones_like(w)),
        "k_norm without weight",
        backends=("jax",),
    ),
    _attention(
        "norm_over_full_width",
        "parity 3",
        lambda: [Patch("layers.attention:RMSNorm", _full_width)],
        "q/k norm over all heads at once, as OLMo has it",
    ),
    _attention("norm_after_rope", "parity 4", _norm_after_rope, "q/k norm after the rotation", backends=BOTH),
    _attention(
        "norm_weight_plus_one",
        "parity 5",
        each("norm.weight", lambda np_, w: w + 1),
        "norm weight as 1 + w, as Gemma has it",
        backends=BOTH,
    ),
    _attention(
        "eps_too_large",
        "parity 6",
        wrapped(_NORM + ".__init__", lambda init, self, size, eps: init(self, size, eps=1e-5)),
        "rms_norm_eps 1e-5 for 1e-6; the tiny canary row shows it",
    ),
    _attention(
        "eps_zero",
        "parity 6",
        wrapped(_NORM + ".__init__", lambda init, self, size, eps: init(self, size, eps=0.0)),
        "rms_norm_eps left out",
        backends=BOTH,
    ),
    _attention(
        "block_norms_swapped",
        "parity 0.1",
        exchanged("input_layernorm", "post_attention_layernorm"),
        "input and post-attention norms swapped",
        backends=BOTH,
    ),
    _attention(
        "theta_wrong",
        "parity 7",
        wrapped(_ROPE, lambda rope, params, *args: rope(dataclasses.replace(params, rope_theta=1e4), *args)),
        "rope_theta 1e4 for 5e4",
        backends=BOTH,
    ),
    _attention(
        "rope_interleaved",
        "parity 8",
        at_backend("layers.attention:rotate", _interleaved),
        "even and odd dimensions paired, not halves",
        backends=BOTH,
    ),
    _attention(
        "rope_sign",
        "parity 9",
        wrapped("layers.attention:rotate", lambda rotate, x, cos, sin: rotate(x, cos, -sin)),
        "rotation the other way round",
    ),
    _attention(
        "rope_in_bfloat16",
        "parity 10",
        wrapped(_ROPE, lambda rope, *args: tuple(map(_bfloat16, rope(*args)))),
        "cos and sin rounded to bfloat16",
    ),
    _attention(
        "decode_position_plus_one",
        "parity 11",
        _decode_positions,
        "a decoded token one position too late",
        detector=decode,
        backends=BOTH,
    ),
    _attention(
        "positions_plus_one",
        "parity 11",
        wrapped(_ROPE, lambda rope, params, h, longest, positions, n: rope(params, h, longest, positions + 1, n)),
        "all positions one too late",
        equivalent=_RELATIVE,
    ),
    _attention(
        "left_pads_counted",
        "parity 12",
        wrapped("model:check_text", _unshifted),
        "positions counted over padding too",
        equivalent=_RELATIVE,
    ),
    _attention(
        "left_pads_counted_in_prefill",
        "parity 12",
        wrapped("model:check_text", _unshifted),
        "positions counted over padding in the whole prompt, over real tokens when decoding",
        detector=decode,
        equivalent="prefill moves rows to the end and counts positions itself, whatever check_text said",
    ),
    _attention(
        "yarn_factor_dropped",
        "parity 13",
        wrapped("layers.rotary:_yarn_attention_factor", lambda factor, rope: 1.0),
        "YaRN without its attention factor",
        subject=YARN,
        backends=BOTH,
    ),
    _attention(
        "yarn_not_interpolated",
        "parity 13",
        wrapped(
            "layers.rotary:_yarn_frequencies", lambda yarn, rope, h, period: (1 / period, yarn(rope, h, period)[1])
        ),
        "YaRN with the original frequencies",
        subject=YARN,
    ),
    _attention("kv_heads_tiled", "parity 14", attending(_tiled), "key/value heads tiled, not repeated", backends=BOTH),
    _attention(
        "scale_from_hidden",
        "parity 15",
        attending(_hidden_scale),
        "scores scaled by hidden_size / heads, not head_dim",
        backends=BOTH,
    ),
    _attention(
        "sees_next_token",
        "parity 16",
        wrapped("qwen3:visible", lambda visible, mask, start, *rest: visible(mask, start + 1, *rest)),
        "causal mask off by one",
        backends=BOTH,
    ),
    _attention(
        "window_plus_one",
        "parity 16",
        wrapped(_WINDOW, lambda window, self, i: n + 1 if (n := window(self, i)) else n),
        "sliding window one key too wide",
        subject=SLIDING,
        backends=BOTH,
    ),
    _attention(
        "window_minus_one",
        "parity 16",
        wrapped(_WINDOW, lambda window, self, i: n - 1 if (n := window(self, i)) else n),
        "sliding window without the query itself",
        subject=SLIDING,
    ),
    _attention(
        "window_always_on",
        "parity 17",
        wrapped(_WINDOW, lambda window, self, i: 24),
        "a window although use_sliding_window is false",
    ),
    _attention(
        "window_never_on",
        "parity 17",
        wrapped(_WINDOW, lambda window, self, i: None),
        "no window although layer_types asks for it",
        subject=SLIDING,
    ),
    _attention(
        "window_on_wrong_layers",
        "parity 17",
        wrapped(_WINDOW, lambda window, self, i: window(self, 1 - i)),
        "full and sliding layers exchanged",
        subject=SLIDING,
    ),
    _attention(
        "heads_interleaved_for_o_proj",
        "parity 18",
        attending(_head_major),
        "o_proj reads its input with heads inside",
        backends=BOTH,
    ),
    _attention(
        "cache_slot_before",
        "parity 20",
        wrapped(_CALL, _slot_before),
        "a decoded token overwrites the key before it",
        detector=decode,
        backends=("jax",),
    ),
    _attention(
        "padding_visible",
        "parity 21",
        at_backend("qwen3:visible", lambda visible, np_, mask, *rest: visible(np_.ones_like(mask), *rest)),
        "keys of padding are seen",
        backends=BOTH,
    ),
    _attention(
        "bias_dropped",
        "law 2",
        each("_proj.bias", lambda np_, w: 0 * w),
        "attention biases ignored",
        subject=BIAS,
        backends=BOTH,
    ),
    _moe(
        "gate_up_swapped",
        "parity 22",
        swapping("layers.mlp:MLP.CALL", "gate_proj", "up_proj"),
        "silu on up, not on gate",
        subject=DENSE,
        backends=BOTH,
    ),
    _moe(
        "gelu_for_silu",
        "parity 23",
        lambda: [Patch("layers.mlp:KERNELS", _gelu)],
        "gelu for silu in the dense MLP",
        subject=DENSE,
        backends=BOTH,
    ),
    _moe("gelu_in_experts", "parity 23", lambda: [Patch("layers.moe:KERNELS", _gelu)], "gelu for silu in the experts"),
    _moe(
        "expert_plus_one",
        "parity 24",
        wrapped(_EXPERTS, lambda run, self, x, w, e: run(self, x, w, (e + 1) % self.down_proj.shape[0])),
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
        wrapped(_ROUTER + ".__init__", _not_normed),
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
        backends=BOTH,
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
        "router_in_bfloat16",
        "parity 31",
        wrapped(_ROUTER + ".CALL", lambda run, self, x: run(self, _bfloat16(x))),
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
    _of(
        "head",
        "embedding_for_head",
        "parity 34",
        wrapped("qwen3:Qwen3ForCausalLM.head", _embedding_for_head),
        "an untied model reads its embedding for a head",
        backends=BOTH,
    ),
    _of(
        "head",
        "head_for_tied",
        "parity 34",
        wrapped("loaders.qwen3:config_from_json", _untied),
        "a tied model looks for a head of its own",
        TIED,
        refusal=CheckpointError,
        backends=BOTH,
    ),
    _of(
        "head",
        "head_rows_plus_one",
        "parity 35",
        at_backend("qwen3:Qwen3ForCausalLM.head", lambda head, np_, self, x: np_.roll(head(self, x), 1, -1)),
        "logits of the token before",
        backends=BOTH,
    ),
    _of(
        "head", "layers_swapped", "parity 37", exchanged("layers.0.", "layers.1."), "two layers swapped", backends=BOTH
    ),
    _of(
        "head",
        "layers_as_text",
        "parity 30",
        wrapped("loaders.stage:Stage.layers", lambda layers, self, n: sorted(layers(self, n), key=str)),
        "layers run in text order: 10 before 2",
        DEEP,
    ),
    _of(
        "head",
        "last_layer_skipped",
        "parity 38",
        lambda: [Patch("qwen3:DecoderLayer", _last_layer_skipped)],
        "the last layer is left out",
        backends=BOTH,
    ),
    _of(
        "head",
        "final_norm_dropped",
        "parity 39",
        lambda: [Patch("qwen3:Qwen3Model.__init__", _no_final_norm)],
        "no final norm",
        backends=BOTH,
    ),
    _of(
        "loader",
        "layers_loaded_as_text",
        "parity 30",
        weights(_as_text),
        "layers placed in text order: 10 before 2",
        DEEP,
        detector=loaded_bits,
        backends=BOTH,
    ),
    _of(
        "loader",
        "transpose_missed",
        "parity 36",
        each("o_proj", lambda np_, w: w.T),
        "a square weight loaded transposed",
        SQUARE,
        backends=BOTH,
    ),
    _of(
        "loader",
        "gate_up_shards_swapped",
        "parity 22",
        lambda: [Patch("loaders.qwen3:RULES", _shards_swapped)],
        "shard ids of gate and up swapped in the rule table",
        MOE,
        backends=BOTH,
    ),
    _of(
        "loader",
        "expert_not_loaded",
        "parity 29",
        each("experts.gate_up", _expert_missing),
        "one expert is not loaded",
        MOE,
        detector=loaded_bits,
        backends=BOTH,
    ),
    _of(
        "loader",
        "expert_not_loaded_seen_in_logits",
        "parity 29",
        each("experts.gate_up", _expert_missing),
        "one expert is not loaded",
        MOE,
    ),
    _of(
        "loader",
        "through_float16",
        "parity 42",
        weights(_through_float16),
        "bfloat16 weights pass through float16",
        HALF,
        detector=loaded_bits,
        backends=BOTH,
    ),
]
