"""The frameworks of our two backends, each on a device: load a model there, and bring what it says to NumPy.

Importing this imports neither framework; ``open_backend`` imports the one it is asked for. What runs, ours or not, is a
``parity.Backend``, see ``parity.backend``.
"""

from __future__ import annotations

import contextlib
import platform
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType
from typing import Any

import numpy as np

from parity.errors import DeviceNotFound

NAMES = ("jax", "torch")


@dataclass(frozen=True)
class Framework:
    """A framework on a device.

    Attributes:
        name: ``jax`` or ``torch``.
        module: ``jax_models`` or ``torch_models``.
        device: as the framework calls it.
        place: what ``load`` needs to put weights there.
    """

    name: str
    module: ModuleType
    device: str
    place: Any

    def load(
        self,
        uri: Any,
        *,
        dtype: str | None = None,
        stage: tuple[int, int] | None = None,
        mtp: bool = False,
        weight_only: bool = False,
    ) -> Any:
        """Our model of a checkpoint; see its ``load``. ``weight_only``: nothing beside weights is rounded."""
        options = {"dtype": dtype, "stage": stage, "mtp": mtp}
        options |= {"activation_quantization": False} if weight_only else {}
        with self.scope():
            return self.module.load(uri, **options, **({"device": self.place} if self.name == "torch" else {}))

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Where the model must be used so that it runs on this device."""
        if self.name == "torch":
            return contextlib.nullcontext()
        import jax

        return jax.default_device(self.place)

    def to_numpy(self, array: Any) -> np.ndarray:
        """The array on the host; bfloat16 widened to float32, exactly."""
        if self.name == "torch":
            array = array.detach().cpu()
            array = array.float() if array.dtype.is_floating_point else array
        host = np.asarray(array)
        return host if host.dtype.kind in "iub" else host.astype(np.float32)

    def versions(self) -> dict[str, str]:
        """Versions that a result depends on."""
        packages = ("torch",) if self.name == "torch" else ("jax", "jaxlib", "flax")
        return {"python": platform.python_version()} | {package: version(package) for package in packages}

    def precision(self, dtype: str) -> dict[str, Any]:
        """Precision flags in force. ``matmul`` means the same on both backends; the rest is the backend's own."""
        if self.name == "torch":
            import torch

            flags = {
                "torch.float32_matmul_precision": torch.get_float32_matmul_precision(),
                "torch.cuda.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
                "torch.allow_bf16_reduced_precision_reduction": (
                    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
                ),
            }
            is_full = flags["torch.float32_matmul_precision"] == "highest" and not flags["torch.cuda.allow_tf32"]
        else:
            import jax

            flags = {"jax_default_matmul_precision": jax.config.values["jax_default_matmul_precision"] or "default"}
            is_full = True  # jax_models asks for the highest precision itself when it computes in float32
        matmul = dtype if dtype != "float32" or is_full else "reduced"
        return {"matmul": matmul, **flags}


def open_backend(name: str, device: str | None = None) -> Framework:
    """The framework of the backend called ``name`` on ``device`` (default: cpu for torch, JAX's default).

    Raises:
        ValueError: no such backend.
        DeviceNotFound: the framework is not installed or has no such device.
    """
    if name not in NAMES:
        raise ValueError(f"backend {name!r} is unknown, expected one of {', '.join(NAMES)}")
    try:
        return _open_torch(device or "cpu") if name == "torch" else _open_jax(device)
    except ModuleNotFoundError as error:
        install = f"pip install '.[{name}]' in Tandem's own directory"
        raise DeviceNotFound(f"backend {name} needs the package {error.name}: {install}") from error


def _open_torch(device: str) -> Framework:
    import torch

    import torch_models
    from torch_models.load import usable_device

    try:
        place = usable_device(device)
    except ValueError as error:
        raise DeviceNotFound(str(error)) from error
    called = torch.cuda.get_device_name(place) if place.type == "cuda" else device
    return Framework("torch", torch_models, called, place)


def _open_jax(device: str | None) -> Framework:
    import jax

    import jax_models

    kind, separator, index = (device or "").partition(":")
    try:
        if not (index.isdecimal() and kind if separator else True):
            raise IndexError("expected a platform, or one and a number: cpu, tpu:1")
        found = jax.devices(kind or None)
        place = found[int(index or 0)]
    except (RuntimeError, IndexError) as error:
        raise DeviceNotFound(f"jax has no device {device!r}: {str(error).splitlines()[0]}") from error
    return Framework("jax", jax_models, str(place.device_kind), place)
