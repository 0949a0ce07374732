"""What a model computes in is its own affair: ``torch.autocast`` around a call changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


def in_own_precision(method: Method) -> Method:
    """A method of a model, a draft or a graph, without autocast, which rounds where weights and caches are not."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = getattr(self, "source", None) or self._model
        if not torch.is_autocast_enabled(model.device.type):
            return method(self, *args, **kwargs)
        with torch.autocast(model.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return run  # pyright: ignore[reportReturnType]
