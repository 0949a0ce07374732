"""Ways to plant a bug in quantised weights, and what the bugs of the format do to numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np

from parity.mutants import Mutant, Patch
from parity.mutants.bench import Subject
from parity.mutants.nvfp4_bench import W4A4, nvfp4_layers
from parity.mutants.plants import BOTH, bfloat16, of, wrapped, xp

Edit = Callable[[np.ndarray], np.ndarray]
Edits = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
Plant = Callable[[], list[Any]]


@dataclass(frozen=True)
class Traced(Patch):
    """A patch of a kernel: compiled programs contain it, whatever file it is in."""

    @property
    def is_traced(self) -> bool:
        return True


def loaded(edit: Edits) -> Plant:
    """Every load and reload hands over other parameters: ``edit`` gets all, by name, and returns those that change."""

    def make(original: Any, backend: str) -> Any:
        def read(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("staging", None)  # all are held at once here
            found = dict(original(*args, **kwargs))
            if backend == "torch":
                from torch_models.storage import host_view

                found = {name: value.clone() for name, value in found.items()}
                hosts = {name: host_view(value) for name, value in found.items()}
                for name, array in edit({name: host.copy() for name, host in hosts.items()}).items():
                    hosts[name][...] = array
                return iter(found.items())
            import jax

            changed = edit({name: np.array(value) for name, value in found.items()})
            placed = {name: jax.device_put(np.array(x), found[name].sharding) for name, x in changed.items()}
            return iter((found | placed).items())

        return read

    return lambda: [Patch("reading:read_params", make)]


def on_leaf(leaf: str, edit: Edit, part: str = "") -> Plant:
    """``edit`` every parameter whose name ends with ``leaf`` and has ``part`` in it; ``weight`` means codes."""

    def change(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [name for name in found if name.endswith(leaf) and part in name]
        chosen = [name for name in names if leaf != "weight" or found[name].dtype == np.uint8]
        return {name: edit(found[name]) for name in chosen}

    return loaded(change)


def products(change: Callable[[Any, Any, Any], tuple[Any, Any]]) -> Plant:
    """Where layers multiply, and nowhere else: ``change(array module, codes, scales)`` gives what is multiplied."""

    def make(original: Any, backend: str) -> Any:
        np_ = xp(backend)
        return lambda x, codes, scale, *more, **kw: original(x, *change(np_, codes, scale), *more, **kw)

    reference = "kernels.nvfp4_reference"
    return lambda: [
        Traced("layers.products:nvfp4_matmul", make, f"{reference}:matmul"),
        Traced("layers.quantized_experts:nvfp4_grouped_matmul", make, f"{reference}:expert_matmul"),
    ]


def of_layers(name: str, change: Callable[..., Any]) -> Plant:
    """``change(original, *arguments)`` for a function of that name wherever quantised layers call it."""
    found = [wrapped(f"layers.{where}:{name}", change) for where in ("quantized", "quantized_experts")]
    return lambda: [patch for plant in found for patch in plant()]


def rounding_inputs(change: Callable[..., Any]) -> Plant:
    """``change(original, array module, x, scale)`` for the rounding of inputs."""

    def make(original: Any, backend: str) -> Any:
        return lambda x, scale: change(original, xp(backend), x, scale)

    names = ("quantized", "quantized_experts")
    return lambda: [Patch(f"layers.{name}:quantized_activations", make) for name in names]


def codes_of_inputs(bounds: tuple[float, ...]) -> Plant:
    """The code of an input is how many of ``bounds`` it reaches."""

    def make(original: Any, backend: str) -> Any:
        np_ = xp(backend)

        def codes(quotient: Any, *is_negative: Any) -> Any:
            count = (np_.abs(quotient)[..., None] >= np_.asarray(bounds)).sum(-1) + 8 * (quotient < 0)
            return count.byte() if backend == "torch" else count.astype(np.uint8)

        return codes

    return lambda: [Traced("kernels.activations:_nearest_codes", make, "kernels.nvfp4_reference:_nearest_codes")]


def cache_rounding(change: Callable[..., Any]) -> Plant:
    """``change(round, attention, turn, x, scale)`` for the rounding of keys (turn 0) and values (1)."""
    now: dict[str, Any] = {}

    def attention(call: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        now.update(attention=self, turn=-1)
        return call(self, *args, **kwargs)

    def kept(round_: Any, x: Any, scale: Any) -> Any:
        now["turn"] += 1
        return change(round_, now["attention"], now["turn"], x, scale)

    places = (("Attention.CALL", attention), ("fp8_kept", kept))
    return lambda: [patch for name, one in places for patch in wrapped(f"layers.attention:{name}", one)()]


def other_scale(round_: Any, attention: Any, turn: int, x: Any, scale: Any) -> Any:
    return round_(x, (attention.k_proj.k_scale if turn else attention.v_proj.v_scale)[...])


def before_rotation() -> list[Any]:
    """Keys are rounded, then rotated. They are rotated second, after the queries."""
    now: dict[str, Any] = {}

    def attention(call: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        now.update(attention=self, turn=0)
        return call(self, *args, **kwargs)

    def rotated(original: Any, backend: str) -> Any:
        round_ = import_module(f"{backend}_models.layers.fp8").fp8_kept

        def rotate(x: Any, *angles: Any) -> Any:
            now["turn"] += 1
            is_key = now["turn"] == 2 and now["attention"].kv_cache
            return original(round_(x, now["attention"].k_proj.k_scale[...]) if is_key else x, *angles)

        return rotate

    def kept(round_: Any, x: Any, scale: Any) -> Any:
        now["turn"] += 1
        return x if now["turn"] == 3 else round_(x, scale)

    where = "layers.attention"
    turned, rounded = wrapped(f"{where}:Attention.CALL", attention)(), wrapped(f"{where}:fp8_kept", kept)()
    return [*turned, Patch(f"{where}:rotate", rotated), *rounded]


def in_nibbles(np_: Any, codes: Any, scale: Any) -> tuple[Any, Any]:
    return codes << 4 | codes >> 4, scale


def of_the_neighbour(np_: Any, codes: Any, scale: Any) -> tuple[Any, Any]:
    if np_.__name__ == "torch":  # which cannot roll e4m3
        return codes, np_.roll(scale.view(np_.uint8), 1, -1).view(scale.dtype)
    return codes, np_.roll(scale, 1, -1)


def as_e5m2(scale: np.ndarray) -> np.ndarray:
    read = scale.view(np.uint8).view(ml_dtypes.float8_e5m2).astype(np.float32)
    return np.clip(read, 0, 448).astype(scale.dtype)


def every_other(scale: np.ndarray) -> np.ndarray:
    """One scale for 32: that of the even block."""
    return scale[..., 0::2].repeat(2, axis=-1)[..., : scale.shape[-1]]


def shared(names: tuple[str, ...], choose: Callable[[list[np.ndarray]], np.ndarray]) -> Plant:
    """Matrices that engines multiply as one get one global scale."""

    def edit(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        leaves = [f"{name}.weight_scale_2" for name in names]
        heads = [name.removesuffix(leaves[0]) for name in found if name.endswith(leaves[0])]
        groups = [[head + leaf for leaf in leaves] for head in heads]
        return {name: choose([found[one] for one in group]) for group in groups for name in group}

    return loaded(edit)


def turned_halves(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gate where up is: codes and scales."""
    return {name: np.flip(value, 1) for name, value in found.items() if ".w13_" in name}


def through_bfloat16(project: Any, self: Any, x: Any) -> Any:
    return (x.float() if hasattr(x, "float") else x) @ bfloat16(self.dequantized()).T


def with_plain_scales(round_: Any, np_: Any, x: Any, scale: Any) -> Any:
    """Inputs rounded to e2m1 under block scales that are not rounded to e4m3."""
    blocks = x.reshape((*x.shape[:-1], -1, 16))
    most = np_.amax(np_.abs(blocks), -1)
    block = np_.where(most == 0, np_.ones_like(most), most / (6 * scale))
    quotient = blocks / (block * scale)[..., None]
    numbers = np_.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = numbers[np_.argmin(np_.abs(np_.abs(quotient)[..., None] - numbers), -1)]
    return (np_.sign(quotient) * nearest * block[..., None]).reshape(x.shape)


def quantised_mutant(
    name: str,
    source: str,
    plant: Callable[[], Any],
    says: str,
    subject: Subject = W4A4,
    detector: Any = nvfp4_layers,
    backends: tuple[str, ...] = BOTH,
    **more: Any,
) -> Mutant:
    return of("loader", f"nvfp4_{name}", source, plant, says, subject, detector=detector, backends=backends, **more)
