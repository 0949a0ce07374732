"""Another embedding and head in a live model, written into their storage: who shares it sees the change."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loaders.digest import tensor_digest
from loaders.events import Event
from loaders.host.embed_head import Halves, asked_halves
from torch_models.sleep import check_awake
from torch_models.storage import host_view, is_freed, of_host, same_bits
from torch_models.weights import write

if TYPE_CHECKING:
    from torch_models.model import Model

log = logging.getLogger(__name__)


def get_embed_and_head(model: Model) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Embedding and head, [V, D] as stored, codes of a quantised head; None for a half this stage lacks; tied: one.

    On a mesh each is a DTensor of the parameters' own memory.

    Raises:
        RuntimeError: the model sleeps.
    """
    check_awake(model)
    specs = model.specs
    embed = _live(model, specs.embedding) if specs.embedding else None
    return embed, _live(model, specs.head) if specs.head else None


def _live(model: Model, name: str) -> torch.Tensor:
    param = model.get_parameter(name)
    return param if model.parallel is None else model.parallel.as_dtensor(name, param)


def set_embed_and_head(model: Model, embed: Any = None, head: Any = None) -> Model:
    """Swap embedding and head by writing into their storage; who shares it sees the change.

    A half given as None is left alone; one this stage lacks is ignored and reported in the event. Setting the
    very parameter that is there publishes nothing. What ``get_embed_and_head`` gave is live: clone it to
    restore it later.

    Args:
        model: the model to change.
        embed: [V, D] in the stored dtype, a tensor of any device, or NumPy; on a mesh all of it, or a DTensor.
        head: likewise; in a tied model only the embedding itself or an equal tensor.
    Raises:
        ValueError: listing wrong shapes and dtypes, a head that a tied model cannot have, or one that is quantised;
            or an adapter is merged into the weights; or ranks hand over different values. Nothing was changed.
        RuntimeError: an update failed half-way; two good halves do not make the rest good.
    """
    names = model.specs.embedding, model.specs.head
    given = tuple(zip(names, (embed, head), strict=True))
    model.agreed("what is swapped", model.check_runnable, lambda _: ", ".join(_kind(model, *half) for half in given))
    if model.parallel is not None:
        # the memory of live parameters is copied before any of it is written
        embed, head = (_handed(model, *half) for half in given)

    def checked() -> tuple[Halves, tuple[str, ...], str]:
        asked, ignored = _checked_halves(model, embed, head)
        return asked, ignored, "" if model.mesh is None else _said(model, asked)

    asked, ignored, content = model.agreed("what is handed over", checked, lambda found: found[2])
    if model.config.tie_word_embeddings and "head" in asked:
        name, value = asked.pop("head")
        live = model.get_parameter(name)
        halves = value, asked.get("embed", (name, live))[1]
        _check_tied(*(_whole(model, name) if half is live else half for half in halves))
    for half in ignored:
        log.info("set_embed_and_head: %s ignored, stage %d of %d has none", half, model.stage.index, model.stage.count)
    changed = {name: value for name, value in asked.values() if value is not model.get_parameter(name)}
    if model.parallel is not None:
        changed = {name: model.parallel.part(name, value) for name, value in changed.items()}
    if not changed:
        if ignored:
            model.events = (*model.events, Event("swap", model.version, "nothing changed", ignored))
        return model
    # the halves may be handed over crosswise: nothing to be written may lie where something is written first
    staged = {
        name: value.clone() if _is_live(model, value) else value.to(model.device) for name, value in changed.items()
    }
    write(model, staged.items(), list(staged))
    model.publish(Event("swap", model.version + 1, " and ".join(asked), ignored, content))
    return model


def _checked_halves(model: Model, embed: Any, head: Any) -> tuple[Halves, tuple[str, ...]]:
    """Those that are asked for and fit, as tensors, and those that this stage lacks."""
    model.check_runnable()
    model.roster.check_unmerged("a swap")

    def misfits(half: str, name: str, value: Any) -> list[str]:
        return [] if value is model.get_parameter(name) else _misfits(half, value, _live(model, name))

    asked, ignored = asked_halves(model.specs, embed, head, live=model.get_parameter, misfits=misfits)
    tensors = {half: value if isinstance(value, torch.Tensor) else of_host(value) for half, (_, value) in asked.items()}
    return {half: (name, tensors[half]) for half, (name, _) in asked.items()}, ignored


def _kind(model: Model, name: str | None, value: Any) -> str:
    """Of a half, whether all ranks have to gather it."""
    assert model.parallel is not None
    if value is not None and _is_there(model, name, value):
        return "what is there"
    return "a DTensor" if model.parallel.gathers(value) else "none" if value is None else "all of a half"


def _said(model: Model, asked: Halves) -> str:
    """Of each half: that it is the live one, or what this rank has in it."""

    def content(name: str, value: torch.Tensor) -> str:
        is_live = value is model.get_parameter(name)
        return "as it is" if is_live else tensor_digest(host_view(value.cpu().contiguous()))[:16]

    return ", ".join(f"{half} {content(name, value)}" for half, (name, value) in asked.items())


def _handed(model: Model, name: str | None, value: Any) -> Any:
    """On a mesh all of a half; or the parameter itself, where it is that which was handed over."""
    assert model.parallel is not None
    if name is not None and _is_there(model, name, value):
        return model.get_parameter(name)
    return model.parallel.gathered(value)


def _is_there(model: Model, name: str | None, value: Any) -> bool:
    assert model.parallel is not None
    return name is not None and model.parallel.is_of(value, model.get_parameter(name))


def _whole(model: Model, name: str) -> torch.Tensor:
    param = model.get_parameter(name)
    return param if model.parallel is None else model.parallel.whole(name, param)


def _is_live(model: Model, value: torch.Tensor) -> bool:
    """Whether ``value`` lies in storage that a commit may write to (embedding and head handed over crosswise)."""
    specs = model.specs
    halves = [model.get_parameter(name) for name in (specs.embedding, specs.head) if name]
    storages = {half.untyped_storage().data_ptr() for half in halves}
    return value.untyped_storage().data_ptr() in storages


def _misfits(half: str, value: Any, live: torch.Tensor) -> list[str]:
    if not isinstance(value, torch.Tensor | np.ndarray):
        return [f"{half} is a {type(value).__name__}, expected a torch tensor or NumPy array"]
    found = str(value.dtype).removeprefix("torch.")
    expected = str(live.dtype).removeprefix("torch.")
    if isinstance(value, torch.Tensor) and (value.is_meta or value.layout != torch.strided):
        return [f"{half} has no plain storage ({value.device}, {value.layout}), expected a dense tensor with values"]
    if isinstance(value, torch.Tensor) and is_freed(value):
        return [f"{half} has no values: the model it is of sleeps. Wake that first"]
    if (tuple(value.shape), found) == (tuple(live.shape), expected):
        return []
    shapes = f"{found} {tuple(value.shape)}, expected {expected} {tuple(live.shape)}"
    return [f"{half} is {shapes} (vocab_size, hidden_size)"]


def _check_tied(head: torch.Tensor, embed: torch.Tensor) -> None:
    if head is embed or same_bits(head.cpu(), embed.cpu()):
        return
    raise ValueError("tie_word_embeddings is true: head must be the embedding or equal to it. Nothing was changed.")
