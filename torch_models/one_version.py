"""A call reads weights of one version: another thread may change them in place meanwhile, and then it raises."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch_models.model import Model

Method = TypeVar("Method", bound=Callable[..., Any])


def unchanged(model: Model) -> Callable[[], None]:
    """What raises RuntimeError if weights or adapters are others than now, or being written."""
    before = model.version, model.adapter_changes

    def check() -> None:
        if (model.version, model.adapter_changes) != before or model.refusal is not None:
            raise RuntimeError(
                "another thread changed the weights or adapters while this call read them: its result would be of two"
                " versions. Call it again, and keep updates and calls apart, for PyTorch's weights change in place."
            )

    return check


def of_one_version(method: Method) -> Method:
    """A method that computes with a model's weights, which its class has as ``_model``."""

    @wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        check = unchanged(self._model)
        found = method(self, *args, **kwargs)
        check()
        return found

    return called  # pyright: ignore[reportReturnType]
