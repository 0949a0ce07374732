"""Any torch module as a ``parity.Backend``: hooks take from it what a trace wants, under the trace's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import nn

from parity import trace_layout
from parity.backend import BackendInfo, Inputs
from parity.backends import open_backend
from torch_models.storage import host_view

_KNOWN = ("hidden_states.0", "routing.0", *trace_layout.AFTER_LAYERS, *trace_layout.MTP)  # 0: any number
INPUT = ":in"  # at the end of a tap: what the module was given, not what it returned
Pick = Callable[[Any, tuple[int, int]], torch.Tensor]  # (what a module returned, (B, T)) -> what a trace keeps of it


@dataclass(frozen=True, kw_only=True)
class TorchModule:
    """A torch module that runs as ``module(**inputs)``, observed without being changed.

    Attributes:
        module: in eval mode, on one device.
        taps: module path -> trace name, as in ``{"model.layers.0": "hidden_states.1", "model.norm:in": ...}``. A path
            takes what the module returns; ``:in`` after it takes what it is given, for models that add to the residual
            stream between two modules. Of several values the first tensor is taken.
        name: what reports call it.
        checkpoint: where its weights are from, for the reader.
        call: runs the module on tensors of its device and returns the logits [B, T, V]; default: ``module(**inputs)``
            and of its result ``logits``, or the first tensor.
        held: its weights as (checkpoint tensor name, tensor); default: its parameters by path, which is right where
            module paths are checkpoint names and nothing is stacked. ``lambda: None`` where they cannot be had.
        picks: trace name -> how to take it, where the first tensor is not it.
    Raises:
        ValueError: a tap names no module, two taps give one tensor, or one a name that is a trace's but for a letter.
    """

    module: nn.Module
    taps: Mapping[str, str] = field(default_factory=dict)
    name: str = "torch module"
    checkpoint: str = ""
    call: Callable[..., torch.Tensor] | None = None
    held: Callable[[], Mapping[str, torch.Tensor] | None] | None = None
    picks: Mapping[str, Pick] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {path for path, _ in self.module.named_modules(remove_duplicate=False)}
        unknown = sorted(tap for tap in self.taps if tap.removesuffix(INPUT) not in known)
        names = list(self.taps.values())
        twice = sorted({name for name in names if names.count(name) > 1})
        problems = [f"no module of {type(self.module).__name__} is called {', '.join(unknown)}"] if unknown else []
        problems += [f"two taps give {', '.join(twice)}"] if twice else []
        problems += [f"{name!r} is no tensor of a trace, {meant!r} is" for name in names if (meant := _meant(name))]
        if problems:
            raise ValueError(f"taps: {'; '.join(problems)}. Give module paths, as named_modules() has them.")

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating point parameter: what the module computes in. Without any, torch's default."""
        found = next((param.dtype for param in self.module.parameters() if param.is_floating_point()), None)
        return torch.get_default_dtype() if found is None else found

    @property
    def device(self) -> torch.device:
        """Of the first parameter. Without any, the CPU."""
        return next((param.device for param in self.module.parameters()), torch.device("cpu"))

    @property
    def info(self) -> BackendInfo:
        framework, dtype = open_backend("torch", str(self.device)), str(self.dtype).removeprefix("torch.")
        return BackendInfo(
            name=self.name,
            dtype=dtype,
            device=framework.device,
            versions=framework.versions(),
            precision=framework.precision(dtype),
            checkpoint=self.checkpoint,
        )

    @torch.no_grad()
    def run(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """What the module computes; floats narrower than float32 as float32.

        Raises:
            RuntimeError: a tapped module was not run, or was run more than once.
            ValueError: a module in it is at random: it is training.
        """
        if random := [path for path, module in self.module.named_modules() if _is_at_random(module)]:
            raise ValueError(f"{self.name} is in training mode, where {random[0]} is at random. Call its eval() first.")
        found: dict[str, list[np.ndarray]] = {name: [] for name in self.taps.values()}
        shape = np.shape(inputs["input_ids"])
        sizes = (shape[0], shape[1])
        with ExitStack() as hooks:
            for tap, name in self.taps.items():
                hooks.callback(self._hook(tap, name, found[name], sizes).remove)
            given = {name: torch.from_numpy(np.array(array)).to(self.device) for name, array in inputs.items()}
            out = self.module(**given) if self.call is None else self.call(**given)
        odd = {name: len(values) for name, values in found.items() if len(values) != 1}
        if odd:
            times = ", ".join(f"{name} {count} times" for name, count in odd.items())
            raise RuntimeError(f"one forward must pass every tap once, but passed {times}. Does a cache skip layers?")
        logits = _on_host(_first(getattr(out, "logits", out)))
        return {name: values[0] for name, values in found.items()} | {"logits": logits}

    def weights(self) -> Iterator[tuple[str, np.ndarray]] | None:
        """Its weights, by checkpoint name, in their own dtypes."""
        held = dict(self.module.named_parameters()) if self.held is None else self.held()
        return None if held is None else ((name, host_view(tensor.detach().cpu())) for name, tensor in held.items())

    def _hook(self, tap: str, name: str, into: list[np.ndarray], sizes: tuple[int, int]) -> Any:
        module, pick = self.module.get_submodule(tap.removesuffix(INPUT)), self.picks.get(name)

        def keep(value: Any) -> None:
            # a copy: the next layer may write to what it is given
            into.append(_on_host(_first(value) if pick is None else pick(value, sizes)))

        if tap.endswith(INPUT):
            return module.register_forward_pre_hook(
                lambda _, args, kwargs: keep((*args, *kwargs.values())), with_kwargs=True
            )
        return module.register_forward_hook(lambda _, args, out: keep(out))


def _meant(name: str) -> str | None:
    """The name of a trace's tensor that a misspelt one is near to; None of one that is right, or one's own."""
    number = re.search("[0-9]+", name)
    known = [one.replace("0", number[0] if number else "0") for one in _KNOWN]
    near = get_close_matches(name.lower(), known, n=1, cutoff=0.95)
    return near[0] if near and name not in known else None


def _is_at_random(module: nn.Module) -> bool:
    """Whether its result depends on chance, or on the rest of the batch, as that of one in training does."""
    is_batched = isinstance(module, nn.modules.batchnorm._BatchNorm)
    is_dropping = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    return module.training and (is_batched or is_dropping)


def _first(value: Any) -> torch.Tensor:
    """The first tensor of a result: a tensor, a sequence, a mapping or one of transformers' outputs."""
    if isinstance(value, torch.Tensor):
        return value
    values = (
        list(value.values()) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple | list) else []
    )
    for one in values:
        if isinstance(one, torch.Tensor):
            return one
    raise TypeError(f"a tap found {type(value).__name__}, expected a tensor or something that holds one")


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    wide = tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
    return wide.cpu().numpy().copy()
