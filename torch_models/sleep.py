"""Sleep and wake: the weights' memory given back for a while, their parameters kept.

While a model sleeps its storages are empty and the host holds a copy. Every parameter and buffer stays the object it
is, and tensors that share storage go on sharing it. No version is published: the weights do not change. Of a model on
the CPU nothing is saved, but everything goes the same way.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from loaders.reading.memory import ALIGNMENT, aligned_empty
from torch_models.census import tensors_of
from torch_models.staging import page_locked, pieces
from torch_models.storage import is_freed, parameters_of

if TYPE_CHECKING:
    from torch_models.model import Model


class HostCopy(NamedTuple):
    """What a model was before it fell asleep.

    Attributes:
        parts: every storage, and its bytes on the host, uint8.
        memory: that those of a device lie in.
        moves: tensors, and what each becomes in its storage, where that takes the place of another.
    """

    parts: list[tuple[torch.UntypedStorage, torch.Tensor]]
    memory: np.ndarray
    moves: list[tuple[torch.Tensor, torch.Tensor]]


@torch.inference_mode(False)
@torch.no_grad()
def sleep(model: Model) -> Model:
    """Free the storage of every parameter and buffer, with a copy on the host. Calling it again does nothing.

    Adapters stay where they are: they are small. All graphs are dropped, and every cache computed before is refused by
    ``decode`` from now on. Until ``wake`` the model refuses to run, to change and to be exported. On a mesh all ranks
    call this, and sleep, or none does.

    Raises:
        RuntimeError: an update failed half-way; a mixture of two versions is not kept. Or it failed on another rank.
    """

    def prepared() -> HostCopy | None:
        return _prepared(model) if model.asleep is None else None

    asleep = model.agreed("who falls asleep", prepared, lambda found: "slept before" if found is None else "the model")
    if asleep is None:
        return model
    model.graphs.drop(reason="the model was put to sleep")
    model.asleep = asleep  # from here on it refuses to run, wherever this ends; and all that is to come wake does again
    _touch(model)
    _move(asleep)
    for storage, _ in asleep.parts:
        storage.resize_(0)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # for whoever shares the device
    return model


@torch.inference_mode(False)
@torch.no_grad()
def wake(model: Model) -> Model:
    """Give every storage its memory and its bytes back, and compare them. Calling it again does nothing.

    The addresses may be others than before, so graphs are captured anew when next asked for.

    Raises:
        RuntimeError: bytes differ from what was put to sleep. The model sleeps on; so it does when memory runs out.
    """
    asleep = model.asleep

    def brought_back() -> None:
        if asleep is None:
            return
        wrong = 0
        _move(asleep)
        with page_locked(asleep.memory, model.device):
            for storage, copy in asleep.parts:
                storage.resize_(copy.numel())
                _bytes(storage).copy_(copy)
                wrong += not _holds(storage, copy)
        if wrong:
            raise RuntimeError(f"{wrong} of {len(asleep.parts)} storages woke with other bytes. The model sleeps on.")

    model.agreed("who wakes", brought_back, lambda _: "was awake" if asleep is None else "the model")
    if asleep is None:
        return model
    _touch(model)
    model.asleep = None
    return model


def check_awake(model: Model) -> None:
    """Raises RuntimeError while the model, or one that shares parameters with it, sleeps."""
    # an empty storage is read without a check, by address: on a CPU that ends the process
    if model.asleep is not None or any(is_freed(param) for param in parameters_of(model)):
        raise RuntimeError("the model sleeps, or one that it shares parameters with: call wake() first.")


def _storages(model: Model) -> list[torch.UntypedStorage]:
    """Every storage once, however many tensors share it."""
    tensors = [*parameters_of(model), *model.buffers()]
    return list({tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}.values())


def _prepared(model: Model) -> HostCopy:
    """All that falling asleep takes, before anything is changed.

    Storages whose memory NumPy has seen torch does not resize: their tensors get others, without the bytes.
    """
    model.check_runnable()
    storages = _storages(model)
    copies, memory = _copied(storages, model.device)
    fresh = {
        storage._cdata: torch.empty(storage.nbytes(), dtype=torch.uint8, device=storage.device).untyped_storage()
        for storage in storages
        if not storage.resizable()
    }
    moves: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _, tensor in tensors_of(model) if fresh else ():
        if tensor.layout is torch.strided and (other := fresh.get(tensor.untyped_storage()._cdata)) is not None:
            place = tensor.storage_offset(), tensor.size(), tensor.stride()
            moves.append((tensor, torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(other, *place)))
    owned = [fresh.get(storage._cdata, storage) for storage in storages]
    return HostCopy(list(zip(owned, copies, strict=True)), memory, moves)


def _move(asleep: HostCopy) -> None:
    for tensor, moved in asleep.moves:
        tensor.data = moved


def _copied(storages: list[torch.UntypedStorage], device: torch.device) -> tuple[list[torch.Tensor], np.ndarray]:
    """Their bytes on the host, the very same where one is there and stays; and the memory those of a device are in.

    It is one, because pages are locked and provided at once much faster than storage by storage.
    """
    held = [_bytes(storage) for storage in storages]
    if device.type == "cpu":
        pairs = zip(storages, held, strict=True)
        return [part.to("cpu", copy=storage.resizable()) for storage, part in pairs], np.empty(0, np.uint8)
    starts = [0, *accumulate(-(-part.numel() // ALIGNMENT) * ALIGNMENT for part in held)]
    memory = aligned_empty((starts[-1],), np.dtype(np.uint8))
    copies = [torch.from_numpy(memory)[start : start + part.numel()] for start, part in zip(starts, held, strict=False)]
    with page_locked(memory, device):
        for copy, part in zip(copies, held, strict=True):
            copy.copy_(part)
    return copies, memory


def _holds(storage: torch.UntypedStorage, copy: torch.Tensor) -> bool:
    parts = zip(pieces(_bytes(storage)), pieces(copy), strict=True)
    return all(torch.equal(held, part.to(held.device)) for held, part in parts)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _touch(model: Model) -> None:
    """Make the stamp another one, for every model that shares these parameters."""
    for param in parameters_of(model):
        torch.autograd.graph.increment_version(param)
