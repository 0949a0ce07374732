"""Mutants of the life of quantised weights: what is derived, what a reload leaves, what stays in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from parity.mutants import Mutant, Patch
from parity.mutants.bench import Subject
from parity.mutants.nvfp4_bench import ALIGNED, EXPERTS, W4A4
from parity.mutants.nvfp4_life import nvfp4_derived, nvfp4_life, nvfp4_memory
from parity.mutants.nvfp4_plants import Plant
from parity.mutants.plants import BOTH, of, wrapped

_TORCH = ("torch",)


def _once_only(method: str) -> Plant:
    """A latch: what was derived once is never derived again."""

    def derive(original: Any, self: Any) -> None:
        if not vars(self).get("is_derived"):
            original(self)
        self.is_derived = True

    return wrapped(f"layers.{method}.derive", derive)


def _latched(name: str) -> Plant:
    """Likewise for a single scalar."""

    def derive(original: Any, self: Any) -> None:
        original(self)
        kept = vars(self).setdefault("kept", float(getattr(self, name)))
        getattr(self, name).fill_(kept)

    return wrapped("layers.quantized:NVFP4Linear._derive_scalars", derive)


def _swizzled_once() -> list[Patch]:
    def alias(original: Any, module: Any, source: str, derived: str, value: Any) -> None:
        if getattr(module, derived, None) is None:
            original(module, source, derived, value)

    return wrapped("layers.quantized:alias_or_bind_derived_param", alias)()


def _source_deleted(derive: Any, self: Any) -> None:
    derive(self)
    delattr(self, "weight_scale_2")


def _rebound(derive: Any, self: Any) -> None:
    derive(self)
    self.alpha = self.alpha.clone()


def _derived_anew() -> list[Patch]:
    never, nowhere = (lambda original, *args: False), (lambda original, *args: None)
    return [
        *wrapped("layers.quantized:is_derived", never)(),
        *wrapped("derived:check_loaded", nowhere)(),
    ]


def _copied(alias: Any, module: Any, source: str, derived: str, value: Any) -> None:
    import_module("torch_models.derived").copy_or_rebind_param(module, derived, value)


def _with_an_axis(derive: Any, self: Any) -> None:
    derive(self)
    self.alpha = self.alpha.view(-1)


def _raw(stored: Any, model: Any, name: str) -> Any:
    return model.get_parameter(name).detach()


def _kept_at_reload(part: str) -> Plant:
    """A reload leaves parameters with ``part`` in their name as they are."""

    def make(original: Any, backend: str) -> Any:
        if backend == "torch":
            return lambda model, values, names, staging: original(
                model, ((n, v) for n, v in values if part not in n), [n for n in names if part not in n], staging
            )

        def published(self: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
            from flax import traverse_util

            old, new = (traverse_util.flatten_dict(tree, sep=".") for tree in (self.weights, weights))
            kept = {name: value for name, value in old.items() if part in name}
            return original(self, traverse_util.unflatten_dict(new | kept, sep="."), *args, **kwargs)

        return published

    return lambda: [Patch("model:Model.published", make, in_torch="weights:_commit")]


def _bfloat16_beside() -> list[Patch]:
    """Every load also leaves the weights in bfloat16 somewhere."""
    kept: list[Any] = []

    def make(original: Any, backend: str) -> Any:
        def read(*args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
            for name, value in original(*args, **kwargs):
                if str(value.dtype).endswith("uint8"):
                    kept.append(_expanded(backend, value))
                yield name, value

        return read

    return [Patch("reading:read_params", make)]


def _expanded(backend: str, codes: Any) -> Any:
    np_ = import_module("torch" if backend == "torch" else "jax.numpy")
    return np_.stack([codes, codes]) * np_.ones((), dtype=np_.bfloat16)


def _of(name: str, source: str, plant: Callable[[], Any], says: str, subject: Subject = W4A4, **more: Any) -> Mutant:
    given = {"detector": nvfp4_life, "backends": _TORCH} | more
    return of("reload", f"nvfp4_{name}", source, plant, says, subject, **given)


NVFP4_LIFE: list[Mutant] = [
    _of("nothing_derived_at_reload", "parity 64", wrapped("weights:derive", lambda d, m: None), "alpha is stale"),
    _of("alpha_latched", "law 4", _latched("alpha"), "alpha is derived once"),
    _of("input_scale_inv_latched", "law 4", _latched("input_scale_inv"), "input_scale_inv is derived once"),
    _of("experts_derived_once", "law 4", _once_only("quantized_experts:NVFP4Experts"), "g1 and g2 stale", EXPERTS),
    _of("layer_derived_once", "law 4", _once_only("quantized:NVFP4Linear"), "a latch: derived once", ALIGNED),
    _of("swizzled_once", "law 4", _swizzled_once, "the second load is left in the plain order", ALIGNED),
    _of(
        "source_deleted",
        "sglang 25107",
        wrapped("layers.quantized:NVFP4Linear.derive", _source_deleted),
        "what alpha was derived from is deleted, so that no load can follow",
        refusal=AttributeError,
    ),
    _of(
        "derived_storage_rebound",
        "parity 65",
        wrapped("layers.quantized:NVFP4Linear._derive_scalars", _rebound),
        "derived tensors move",
    ),
    _of(
        "nothing_remembered",
        "law 4",
        wrapped("aliased_storage:_hashed", lambda hashed, flat, run: hashed(flat, run) * 0),
        "all loads look as if nothing had been written",
        ALIGNED,
        detector=nvfp4_derived,
    ),
    _of(
        "interleaved_copied",
        "sglang 25190",
        wrapped("layers.quantized:alias_or_bind_derived_param", _copied),
        "swizzled scales are a second copy: right, and 15 GiB more",
        ALIGNED,
        detector=nvfp4_memory,
    ),
    _of(
        "alpha_gets_an_axis",
        "issue 4",
        wrapped("layers.quantized:NVFP4Linear._derive_scalars", _with_an_axis),
        "a scalar becomes [1]",
    ),
    _of("derived_bytes_exported", "law 4", wrapped("weights:stored", _raw), "derived bytes leave", ALIGNED),
    _of("derived_again", "law 4", _derived_anew, "derived bytes are derived from", ALIGNED, detector=nvfp4_derived),
    _of(
        "part_derived",
        "law 4",
        wrapped("derived:check_loaded", lambda check, *args: None),
        "a partial update is derived",
        ALIGNED,
        detector=nvfp4_derived,
    ),
    _of("global_scale_kept", "parity 63", _kept_at_reload("weight_scale_2"), "old global scales", backends=BOTH),
    _of("experts_scale_kept", "parity 63", _kept_at_reload("w13_weight_scale"), "old scales", EXPERTS, backends=BOTH),
    _of("block_scale_kept", "parity 63", _kept_at_reload(".weight_scale"), "old block scales", ALIGNED, backends=BOTH),
    _of(
        "bfloat16_beside",
        "parity 62",
        _bfloat16_beside,
        "codes are kept, and expanded weights beside them",
        detector=nvfp4_memory,
        backends=BOTH,
    ),
]
