"""Derived tensors: what layers compute from their weights and keep. Allocated once, written in place (laws 4 and 5).

A layer that keeps any has ``derive()``, which computes all of them anew from the weights it was loaded with. Loaders
write weights only.

A derived tensor as large as its source may take the source's storage: block scales in the order a kernel wants them
cost no second copy (15 GiB a rank of a large mixture of experts). The storage then holds derived bytes, and deriving
from them once more would corrupt them. Which of the two it holds is written down, with a checksum, so that a repeated,
partial or failed update is refused, never derived.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from torch_models.storage import same_bits

_ROWS = 128  # checked together: what the finest interleaved layout keeps together
_PIECE = 1 << 20  # elements hashed at once


@dataclass(frozen=True)
class Lodger:
    """A derived tensor that lives in its source's storage, as it was left there."""

    is_outside_census = True

    name: str
    checksums: torch.Tensor  # int64, one for every 128 rows, on the host
    is_there: bool = True  # False: the source was loaded again, or so it was said


def allocate_derived(module: nn.Module, device: torch.device) -> None:
    """Give every derived tensor its storage, for life, and its first value."""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, torch.empty_like(buffer, device=device))
    derive(module)


def derive(module: nn.Module) -> None:
    """Compute everything derived anew; after any change of weights."""
    for part in module.modules():
        if callable(compute := getattr(part, "derive", None)):
            compute()


@torch.no_grad()
def copy_or_rebind_param(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Make ``module.name`` hold ``value``: in place where shape, dtype and device are what they were.

    Then no pointer moves, and a buffer stays a buffer. Otherwise the parameter stays the object it is, with whatever
    attributes a loader gave it, but gets other storage: captured graphs of it must be dropped. Where there is none, one
    is made. A scalar stays a scalar: shapes are never broadcast.

    Args:
        module: the layer.
        name: of a parameter, a buffer, or nothing yet.
        value: any tensor; copied where it shares storage with another of the module's.
    """
    value = value.detach()
    held = getattr(module, name, None)
    if isinstance(held, torch.Tensor) and _is_alike(held, value):
        # what is written may be a view of where it is written
        held.copy_(value.clone() if _share_storage(held, value) else value)
        return
    beside = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    value = value.clone() if any(_share_storage(value, other) for other in beside) else value
    if isinstance(held, nn.Parameter):
        held.data = value
        held.requires_grad_(False)
    elif name in module._buffers:
        setattr(module, name, value)
    else:
        if name in vars(module):
            delattr(module, name)
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


@torch.no_grad()
def alias_or_bind_derived_param(
    module: nn.Module, source_name: str, derived_name: str, derived_value: torch.Tensor
) -> None:
    """Make ``module.derived_name`` hold ``derived_value``, in the storage of its source where shape and dtype allow.

    Then both names are one parameter, and the source's bytes are gone from memory until they are loaded again: load all
    of it, then derive once. ``holds_derived`` says which bytes are there; whoever loads the source says so with
    ``mark_source``, and who does not is found out by the bytes themselves. Where shapes or dtypes differ (padding,
    scalars), the derived tensor is a parameter of its own, see ``copy_or_rebind_param``.

    Args:
        module: the layer.
        source_name: a parameter in the layout it was loaded in.
        derived_name: of the parameter to make.
        derived_value: computed from the source.
    Raises:
        RuntimeError: the source holds derived bytes still, all of them or some, and they would be derived again.
            Nothing was written.
    """
    source = getattr(module, source_name, None)
    value = derived_value.detach()
    if not isinstance(source, nn.Parameter) or not _is_alike(source, value):
        copy_or_rebind_param(module, derived_name, value)
        return
    if (stale := _stale_rows(module, source_name, source, value)) is not None:
        raise RuntimeError(
            f"{source_name} holds bytes of {derived_name} still, not what was loaded: {stale} of {len(_rows(source))}"
            f" rows would be derived twice. Load all of {source_name} first."
        )
    source.copy_(value.clone() if _share_storage(source, value) else value)
    _lodgers(module)[source_name] = Lodger(derived_name, _checksums(source))
    if getattr(module, derived_name, None) is not source:
        if derived_name in vars(module) or derived_name in module._parameters:
            delattr(module, derived_name)
        module.register_parameter(derived_name, source)


def holds_derived(module: nn.Module, source_name: str) -> bool:
    """Whether the storage of a source holds what was derived from it, as far as anybody said."""
    lodger = _lodgers(module).get(source_name)
    return lodger is not None and lodger.is_there


def is_derived(module: nn.Module, source_name: str) -> bool:
    """Likewise by the bytes: not one of them has changed since it was derived."""
    lodger = _lodgers(module).get(source_name)
    if lodger is None or not lodger.is_there:
        return False
    return torch.equal(_checksums(module.get_parameter(source_name)), lodger.checksums)


def mark_source(module: nn.Module, source_name: str) -> None:
    """Say that all of a source was loaded: its storage holds the checkpoint's bytes again.

    What was derived is remembered until it is derived anew, so that a part that was not loaded is seen then.
    """
    if (lodger := _lodgers(module).get(source_name)) is not None:
        _lodgers(module)[source_name] = replace(lodger, is_there=False)


def _lodgers(module: nn.Module) -> dict[str, Lodger]:
    return module.__dict__.setdefault("_lodgers", {})


def _stale_rows(module: nn.Module, name: str, source: torch.Tensor, value: torch.Tensor) -> int | None:
    """How many rows still hold derived bytes and would become others; None: none would."""
    lodger = _lodgers(module).get(name)
    if lodger is None:
        return None
    is_stale = _checksums(source) == lodger.checksums
    differs = torch.tensor([not same_bits(a, b) for a, b in zip(_pieces(source), _pieces(value), strict=True)])
    found = is_stale & differs
    if not found.any():
        return None
    sizes = torch.tensor([len(piece) for piece in _pieces(source)])
    return int(sizes[found].sum())


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(1, -1)


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _rows(tensor.detach()).split(_ROWS)


def _checksums(tensor: torch.Tensor) -> torch.Tensor:
    """One number for every 128 rows that tells the order of bytes too, as a swizzle is but another order."""
    found = []
    for piece in _pieces(tensor):
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for start, part in enumerate(piece.contiguous().view(torch.uint8).flatten().split(_PIECE)):
            place = torch.arange(start * _PIECE, start * _PIECE + len(part), device=tensor.device)
            total += ((part.long() + 1) * (place * 0x9E3779B1 % 0x7FFFFFFF + 1)).sum()
        found.append(total)
    return torch.stack(found).cpu()


def _is_alike(held: torch.Tensor, value: torch.Tensor) -> bool:
    return (held.shape, held.dtype, held.device) == (value.shape, value.dtype, value.device) and held.is_contiguous()


def _share_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
