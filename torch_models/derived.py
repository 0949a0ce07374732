"""Derived tensors: what layers compute from their weights and keep. Allocated once, written in place (laws 4 and 5).

A layer that keeps any has ``derive()``, which computes all of them anew from the weights it was loaded with. Loaders
write weights only.

A derived tensor as large as its source may take the source's storage: block scales in the order a kernel wants them
cost no second copy (15 GiB a rank of a large mixture of experts). The storage then holds derived bytes, and deriving
from them once more would corrupt them. ``torch_models.aliased_storage`` knows which of the two it holds, so that a
repeated, partial or failed update is refused, never derived.
"""

from __future__ import annotations

import logging
import time

import torch
from torch import nn

from torch_models.aliased_storage import (
    check_loaded,
    holds_derived,
    is_derived,
    is_lodger,
    lodger_of,
    mark_source,
    move_in,
)

log = logging.getLogger(__name__)

__all__ = [
    "alias_or_bind_derived_param",
    "allocate_derived",
    "copy_or_rebind_param",
    "derive",
    "holds_derived",
    "is_derived",
    "mark_source",
]


def allocate_derived(module: nn.Module, device: torch.device) -> None:
    """Give every derived tensor its storage, for life, and its first value."""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, torch.empty_like(buffer, device=device))
    derive(module)


def derive(module: nn.Module) -> None:
    """Compute everything derived anew; after any change of weights."""
    start, count = time.perf_counter(), 0
    for part in module.modules():
        if callable(compute := getattr(part, "derive", None)):
            compute()
            count += 1
    log.info("derive: %d modules in %.2f s", count, time.perf_counter() - start)


@torch.inference_mode(False)  # what is bound outlives the caller's mode, and must stay writable
@torch.no_grad()
def copy_or_rebind_param(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Make ``module.name`` hold ``value``: in place where shape and dtype are what they were, on whatever device.

    Then no pointer moves. Otherwise the parameter stays the object it is, with whatever attributes a loader gave it,
    but gets other storage: captured graphs of it must be dropped. Where there is none, one is made in place of whatever
    plain attribute was there. A buffer stays a buffer. New storage is contiguous and nobody else's. No gradient is
    asked for from then on. A scalar stays a scalar: shapes are never broadcast.

    Written by the name of a source, it is loaded; by that of a derived tensor which lodges in a source, it is derived,
    and one that no longer fits there moves out.

    Args:
        module: the layer.
        name: of a parameter, a buffer, or nothing yet.
        value: any tensor with values, or without if nothing that has some is there.
    Raises:
        ValueError: no parameter can be called so here, or there are no values to write. Nothing was written.
    """
    value = value.detach()
    held = module._parameters.get(name)
    held = module._buffers.get(name) if held is None else held
    if held is None:
        _check_free(module, name)
        _bind(module, name, nn.Parameter(_owned(value), requires_grad=False))
        return
    _check_values(name, held, value)
    if held.is_leaf:
        held.requires_grad_(False)
    if _fits(held, value):
        _write(held, value)
    elif name in module._buffers:
        module._buffers[name] = _owned(value)
    elif is_lodger(module, name) and len(_names_of(module, held)) > 1:
        _bind(module, name, nn.Parameter(_owned(value), requires_grad=False))
        return
    else:
        _rebind(module, held, _owned(value))
    if (lodger := lodger_of(module, name)) is None:
        return
    if is_lodger(module, name):
        lodger.moved_in(module.get_parameter(name))
    else:
        mark_source(module, name)


@torch.inference_mode(False)
@torch.no_grad()
def alias_or_bind_derived_param(
    module: nn.Module, source_name: str, derived_name: str, derived_value: torch.Tensor
) -> None:
    """Make ``module.derived_name`` hold ``derived_value``, in the storage of its source where shape and dtype allow.

    They do where the value has the source's dtype and its shape, or one that broadcasts to it, but for a single number:
    scalars keep their shape. Then both names are one parameter, and the source's bytes are gone from memory until they
    are loaded again: load all of it, then derive once. Whoever loads by ``copy_or_rebind_param``, or says
    ``mark_source``, is believed; else the bytes are looked at. Where it does not fit, the derived tensor is a parameter
    of its own, see ``copy_or_rebind_param``.

    Args:
        module: the layer.
        source_name: a parameter in the layout it was loaded in.
        derived_name: of the parameter to make.
        derived_value: computed from the source.
    Raises:
        RuntimeError: the source holds derived bytes still, all of them or some, and they would be derived again.
            Nothing was written.
        ValueError: as ``copy_or_rebind_param``.
    """
    source, value = getattr(module, source_name, None), derived_value.detach()
    filled = _filling(source, value) if isinstance(source, nn.Parameter) else None
    is_alias = module._parameters.get(derived_name) is source
    if not isinstance(source, nn.Parameter) or filled is None:
        if source is not None and is_alias and derived_name != source_name:
            del module._parameters[derived_name]  # the source stays what it is
        copy_or_rebind_param(module, derived_name, value)
        return
    if not is_alias:
        _check_free(module, derived_name)
    _check_values(source_name, source, value)
    if not source.is_meta:
        check_loaded(module, source_name, filled)
    source.requires_grad_(False)
    if not source.is_meta:
        _write(source, filled)
        move_in(module, source_name, derived_name)
    if not is_alias:
        _bind(module, derived_name, source)


def _filling(source: nn.Parameter, value: torch.Tensor) -> torch.Tensor | None:
    """The value as large as its source; None: it cannot be written there."""
    if value.dtype != source.dtype or source.is_meta and not value.is_meta or _overlaps_itself(source):
        return None
    if value.shape == source.shape:
        return value
    try:
        return value.expand(source.shape) if value.numel() > 1 else None
    except RuntimeError:  # torch's way to say that it does not broadcast
        return None


def _fits(held: torch.Tensor, value: torch.Tensor) -> bool:
    is_alike = (held.shape, held.dtype) == (value.shape, value.dtype)
    return is_alike and held.is_meta == value.is_meta and not _overlaps_itself(held)


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may share memory, as in an expanded tensor: it cannot be written to."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _owned(value: torch.Tensor) -> torch.Tensor:
    return value.clone(memory_format=torch.contiguous_format)


def _write(held: torch.Tensor, value: torch.Tensor) -> None:
    """In place; what is written may be a view of where it is written."""
    value = value.clone() if _share_storage(held, value) else value
    with torch.inference_mode(held.is_inference()):  # the only mode in which such a tensor can be written
        held.copy_(value)


def _rebind(module: nn.Module, held: torch.Tensor, value: torch.Tensor) -> None:
    """Other storage for a parameter, under all its names here."""
    if not held.is_meta or value.is_meta:
        held.data = value
        return
    made = nn.Parameter(value, requires_grad=False)  # torch exchanges no storage on the meta device
    vars(made).update(vars(held))
    for name in _names_of(module, held):
        module._parameters[name] = made


def _names_of(module: nn.Module, held: torch.Tensor) -> list[str]:
    return [name for name, param in module._parameters.items() if param is held]


def _bind(module: nn.Module, name: str, param: nn.Parameter) -> None:
    """Register a parameter under a name that is free, or that something else gives up."""
    vars(module).pop(name, None)
    if name in module._buffers:
        delattr(module, name)
    module._parameters.pop(name, None)
    module.register_parameter(name, param)


def _check_free(module: nn.Module, name: str) -> None:
    """Raises ValueError unless a parameter can be called so, in place of what is called so now."""
    owner = next((kind.__name__ for kind in type(module).__mro__ if name in vars(kind)), None)
    if owner is not None or name in module._modules or not name or "." in name:
        what = "a module" if name in module._modules else f"an attribute of class {owner}" if owner else "no plain name"
        raise ValueError(
            f"{name!r} is {what}, expected the name of a parameter. Call it otherwise. Nothing was written."
        )


def _check_values(name: str, held: torch.Tensor, value: torch.Tensor) -> None:
    if value.is_meta and not held.is_meta:
        raise ValueError(f"the value for {name} is on the meta device and has no bytes. Nothing was written.")


def _share_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
