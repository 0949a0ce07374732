"""Another embedding and head: a new model that shares every other buffer with the old one, which stays as it was."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Sharding

from jax_models.processes import content_of, nth_change, placed, processes_of, to_host
from jax_models.weights import flatten, unflatten
from loaders.events import Event
from loaders.host.embed_head import Halves, asked_halves

if TYPE_CHECKING:
    from jax_models.model import Model

log = logging.getLogger(__name__)


def get_embed_and_head(model: Model) -> tuple[jax.Array | None, jax.Array | None]:
    """Embedding and head, [V, D] as stored, codes of a quantised head; None for a half this stage lacks; tied: one.

    Raises:
        RuntimeError: the model's weights were given up.
    """
    model.check_runnable()
    specs = model.specs
    flat = flatten(model.weights)
    return flat[specs.embedding] if specs.embedding else None, flat[specs.head] if specs.head else None


def set_embed_and_head(model: Model, embed: Any = None, head: Any = None) -> Model:
    """Swap embedding and head. Every other buffer is shared with the old model, which stays as it was.

    A half given as None is left alone; one this stage lacks is ignored and reported in the event. Setting the
    very array that is there publishes nothing. A JAX array that lies where the model's own does is shared, not
    copied: do not donate it afterwards.

    Args:
        model: the model to start from.
        embed: [V, D] in the stored dtype, JAX or NumPy (copied).
        head: likewise; in a tied model only the embedding itself or an equal array.
    Raises:
        ValueError: listing wrong shapes and dtypes, a head that a tied model cannot have, or one that is quantised;
            or an adapter is merged into the weights; or processes hand over different values.
    """
    flat = flatten(model.weights)

    def checked() -> tuple[Halves, tuple[str, ...], str]:
        asked, ignored = _checked_halves(model, embed, head)
        return asked, ignored, "" if len(processes_of(model.mesh)) == 1 else _said(asked, flat)

    asked, ignored, content = model.agreed("what is swapped", checked, lambda found: found[2])
    content = f"{content} {nth_change(model.mesh)}".strip()
    if model.config.tie_word_embeddings and "head" in asked:
        _check_tied(head, asked["embed"][1] if "embed" in asked else flat[asked["head"][0]])
        asked = {"embed": asked["embed"]} if "embed" in asked else {}
    changed = {name: value for name, value in asked.values() if value is not flat[name]}
    for half in ignored:
        log.info("set_embed_and_head: %s ignored, stage %d of %d has none", half, model.stage.index, model.stage.count)
    if not changed:
        event = Event("swap", model.version, "nothing changed", ignored)
        return dataclasses.replace(model, events=(*model.events, event)) if ignored else model
    for name, value in changed.items():
        sharding = flat[name].sharding
        if _lies_as(value, sharding):
            # a weakly typed array is another type to jit: naming the dtype makes it a strong one
            flat[name] = jax.device_put(jnp.asarray(value, value.dtype), sharding)
        elif isinstance(value, jax.Array) and not value.is_fully_addressable:
            flat[name] = jnp.copy(jax.device_put(value, sharding))
        else:
            # NumPy's, copied, for its owner may write to it; or one that lies otherwise, of which device_put would
            # share some shards (so the copy above, too): were those given up, nobody but XLA would notice
            flat[name] = placed(np.array(value), sharding)
    return model.published(unflatten(flat), "swap", " and ".join(asked), ignored, content)


def _lies_as(value: Any, sharding: Sharding) -> bool:
    """Whether it is a JAX array in the same places, or one that has none yet."""
    if isinstance(value, Tracer):
        return True
    return isinstance(value, jax.Array) and value.sharding.is_equivalent_to(sharding, value.ndim)


def _checked_halves(model: Model, embed: Any, head: Any) -> tuple[Halves, tuple[str, ...]]:
    """Those that are asked for and fit, and those that this stage lacks."""
    model.check_runnable()
    model.roster.check_unmerged("a swap")
    flat = flatten(model.weights)
    known = {"live": flat.__getitem__, "misfits": lambda half, name, value: _misfits(half, value, flat[name])}
    return asked_halves(model.specs, embed, head, **known)


def _said(asked: Halves, flat: Mapping[str, jax.Array]) -> str:
    """Of each half: that it is the live one, or an array of all processes, or what this one has in it."""
    return ", ".join(
        f"{half} {'as it is' if value is flat[name] else content_of(value)}" for half, (name, value) in asked.items()
    )


def _misfits(half: str, value: Any, live: jax.Array) -> list[str]:
    if not isinstance(value, jax.Array | np.ndarray):
        return [f"{half} is a {type(value).__name__}, expected a JAX or NumPy array"]
    if isinstance(value, jax.Array) and not isinstance(value, Tracer) and value.is_deleted():
        return [f"{half} was given up: its memory was donated"]
    if (value.shape, value.dtype) == (live.shape, live.dtype):
        return []
    return [f"{half} is {value.dtype} {value.shape}, expected {live.dtype} {live.shape} (vocab_size, hidden_size)"]


def _check_tied(head: Any, embed: Any) -> None:
    if head is embed or np.array_equal(_bits(head), _bits(embed)):  # in this order on all processes
        return
    raise ValueError("tie_word_embeddings is true: head must be the embedding or equal to it. Nothing was changed.")


def _bits(value: Any) -> np.ndarray:
    return np.ascontiguousarray(to_host(value) if isinstance(value, jax.Array) else value).view(np.uint8)
