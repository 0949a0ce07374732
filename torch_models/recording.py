"""A recorded replay: what a CUDA graph does, on any device, without one.

While a program runs once, every operation is noted with the memory it read and wrote. Replaying runs the same
operations on the same memory. So a tensor that moved since gives stale output here just as it would on a GPU, and what
no graph could capture is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only


class CannotCapture(RuntimeError):
    """A program does what a graph cannot repeat; says which operation, and why not."""

    def __init__(self, operation: str, why: str) -> None:
        super().__init__(f"{operation} cannot be captured in a graph: {why}")


@dataclass(frozen=True, slots=True)
class _Operation:
    """One step of a replay. ``results`` is where its results go, empty where it writes them itself."""

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[torch.Tensor]


class Recording:
    """The operations of one run of ``program``, in order.

    Attributes:
        outside: tensors it read that no operation of it made: weights, caches, inputs, constants.
    Raises:
        CannotCapture: it reads tensors on the host, has shapes that depend on values, draws random numbers, or brings
            data from the host.
    """

    def __init__(self, program: Callable[[], object]) -> None:
        self._operations: list[_Operation] = []
        self._made: set[int] = set()
        self._outside: dict[Any, torch.Tensor] = {}
        with torch.inference_mode(False), torch.no_grad(), _NoHost(), _Recorder(self._note):
            program()
        self.outside = list(self._outside.values())

    def __len__(self) -> int:
        return len(self._operations)

    def replay(self) -> None:
        """Run it again, on the memory it was recorded with, whatever its tensors are called by now."""
        with torch.inference_mode(False), torch.no_grad():
            for operation in self._operations:
                found = operation.run(*operation.args, **operation.kwargs)
                if operation.results:
                    for place, value in zip(operation.results, _tensors(found), strict=True):
                        place.copy_(value)

    def _note(self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # aliases: a graph knows addresses, and a tensor object may be given other memory (param.data = ...)
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        given = _tensors((args, kwargs))
        _check_capturable(run, args, kwargs, given)
        for tensor in given:
            if _memory(tensor) not in self._made:
                self._outside.setdefault((_memory(tensor), tensor.storage_offset(), tensor.shape), tensor)
        found = run(*args, **kwargs)
        results = [tensor.detach() for tensor in _tensors(found)]
        read = {_memory(tensor) for tensor in given}
        # a view runs no kernel, and memory without values needs none
        is_view = torch.Tag.inplace_view in run.tags or all(_memory(tensor) in read for tensor in results)
        if run._schema.is_mutable:
            if torch.Tag.inplace_view not in run.tags:
                self._operations.append(_Operation(run, args, kwargs, []))
            return found
        if not is_view and not run._schema.name.startswith(("aten::empty", "aten::new_empty")):
            self._operations.append(_Operation(run, args, kwargs, results))
        self._made |= {_memory(tensor) for tensor in results} - read
        return found


def _memory(tensor: torch.Tensor) -> int:
    """Which storage it is, also of one without bytes."""
    return tensor.untyped_storage()._cdata


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, torch.Tensor)]


class _Recorder(TorchDispatchMode):
    def __init__(self, note: Callable[..., Any]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._note(func, args, kwargs or {})


def _check_capturable(run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[torch.Tensor]) -> None:
    """Raises CannotCapture."""
    name = run._schema.name
    if name == "aten::lift_fresh":
        raise CannotCapture("a tensor made of host data (torch.tensor, torch.from_numpy)", "a replay would keep it")
    if torch.Tag.data_dependent_output in run.tags:
        raise CannotCapture(name, "it brings a value to the host (item, bool, int), where a replay does not look")
    indices = next((arg for arg in args[1:2] if isinstance(arg, list | tuple)), None)
    if name.startswith("aten::index") and indices is not None:
        if any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(indices)):
            raise CannotCapture(f"{name} by a mask", "the shape of the result depends on values; use torch.where")
    elif torch.Tag.dynamic_output_shape in run.tags:
        raise CannotCapture(name, "the shape of the result depends on values")
    if torch.Tag.nondeterministic_seeded in run.tags and not _is_without_dropout(run, args, kwargs):
        raise CannotCapture(name, "a replay would draw the same random numbers again; sample outside the graph")
    devices = {tensor.device for tensor in given if tensor.ndim or tensor.device.type != "cpu"}
    if kwargs.get("device") is not None and given:
        devices.add(torch.device(kwargs["device"]))
    if len({device.type for device in devices}) > 1:
        raise CannotCapture(name, f"it copies between {' and '.join(sorted(map(str, devices)))}")


def _is_without_dropout(run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Attention counts as random because it could drop out."""
    for index, argument in enumerate(run._schema.arguments):
        if argument.name == "dropout_p":
            given = args[index] if index < len(args) else kwargs.get("dropout_p", argument.default_value)
            return given == 0
    return False


# a host tensor in a program of another device: on the CPU nothing else would tell
_FACTORIES = {torch.arange, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.linspace}
_TO_HOST = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}


class _NoHost(TorchFunctionMode):
    """Refuses what on a CPU never shows as an operation: reading a tensor, or making one without saying where."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TO_HOST:
            raise CannotCapture(
                f"Tensor.{func.__name__}()", "it brings values to the host, where a replay does not look"
            )
        if func in _FACTORIES and kwargs.get("device") is None and kwargs.get("out") is None:
            raise CannotCapture(f"torch.{func.__name__}() without device=", "it makes a tensor on the host")
        return func(*args, **kwargs)
