"""What a model computes in is its own affair: ``torch.autocast`` around a call changes nothing.

What products in float32 are rounded to (``torch.set_float32_matmul_precision``) torch keeps for the process and not for
a call or a thread, so that is left as it is set; traces record it, and are not judged by the bounds of float32 then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


def in_own_precision(method: Method) -> Method:
    """A method of a model, a draft or a graph, without autocast, which rounds where weights and caches are not.

    Its class has the model as ``_model``.
    """

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        device = self._model.device.type
        if not torch.is_autocast_enabled(device):
            return method(self, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return method(self, *args, **kwargs)

    return run  # pyright: ignore[reportReturnType]
