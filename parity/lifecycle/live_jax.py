"""A live JAX model seen from outside: what may not move, what compiles, how to poison it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_models.weights import flatten
from parity.backends import Framework
from parity.lifecycle.live_bench import STEPS

COMPILED = "/jax/core/compile/backend_compile_duration"  # recorded for every program, from the disk cache or not


@dataclass(frozen=True)
class JaxLive:
    """What the laws need to know of JAX; see ``parity.lifecycle.live_bench.LiveBackend``."""

    backend: Framework
    poison_publishes: bool = True
    keeps_old: bool = True
    captures: bool = False
    stages_repeat: bool = False  # they are other programs, whose sums XLA may order otherwise

    def fixed(self, model: Any) -> dict[str, Any]:
        """Everything compiled programs depend on: equal before and after means that none becomes invalid."""
        facts: dict[str, Any] = {
            name: (leaf.shape, str(leaf.dtype), leaf.sharding, leaf.weak_type)
            for name, leaf in flatten(model.weights).items()
        }
        return facts | {"programs": id(model.programs), "structure": jax.tree.structure(model.weights)}

    def compiled(self, model: Any) -> dict[str, int]:
        """Programs compiled so far: the model's, by its caches, and by JAX's own count all of this process."""
        programs = model.programs
        by_name = {name: vars(programs)[name] for name in ("forward", "forward_with_taps", "prefill", "decode")}
        by_name |= {f"draft.{name}": value for name, value in vars(programs.draft).items() if not name.startswith("_")}
        return {name: jitted._cache_size() for name, jitted in by_name.items()} | {"process": len(_compilations())}

    def not_shared(self, old: Any, new: Any, changed: set[str]) -> list[str]:
        """Parameters that a swap copied although it did not change them."""
        before, after = flatten(old.weights), flatten(new.weights)
        return [name for name in before if name not in changed and before[name] is not after[name]]

    def poison(self, model: Any) -> Any:
        """Every bit of every parameter set: what the next load does not write will scream.

        That is NaN in every float, and -6 in codes.
        """

        def poisoned(leaf: jax.Array) -> jax.Array:
            screaming = np.full((*leaf.shape, leaf.dtype.itemsize), 255, np.uint8)
            return jax.device_put(screaming.view(leaf.dtype)[..., 0], leaf.sharding)

        return model.replace(weights=jax.tree.map(poisoned, model.weights))

    def stepped(self, model: Any, prompt: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Logits of a prompt and of the steps after it, each from its best token."""
        logits, cache = model.prefill(**prompt, max_new_tokens=STEPS)
        found = [np.asarray(logits)]
        for _ in range(STEPS):
            logits, cache = model.decode(found[-1].argmax(-1), cache)
            found.append(np.asarray(logits))
        return found

    def replayed(self, model: Any, prompt: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The same programs, which no update of weights compiles again."""
        return self.stepped(model, prompt)


@functools.cache
def _compilations() -> list[str]:
    """One entry for every compilation of this process since the first call."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **facts: str | int) -> None:
        if event == COMPILED:
            seen.append(str(facts.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen


def live(backend: Framework) -> JaxLive:
    return JaxLive(backend)
