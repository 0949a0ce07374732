"""Which NVFP4 kernel runs: decided once, from the device and what was asked for, and never silently another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from torch_models.kernels import nvfp4_blackwell, nvfp4_reference, nvfp4_triton

NAMES = ("reference", "reference-128x4", "triton", "blackwell")


@dataclass(frozen=True)
class Kernel:
    """How the products of quantised layers are computed.

    Attributes:
        name: one of ``NAMES``.
        matmul: ``(x_UK, packed_NJ, scale_NQ, alpha) -> float32 [U, N]``, of weights with inputs as they are.
        expert_matmul: ``(x_AK, packed_ENJ, scale_ENQ, alpha_ES, experts_A, ask_host=) -> float32 [A, N]``.
        swizzles: block scales are wanted in the 128x4 order, and found where ``derive`` left them.
        is_native: inputs are multiplied as 4-bit codes, by the device's own instruction.
    """

    is_outside_census = True

    name: str
    matmul: Callable[..., torch.Tensor]
    expert_matmul: Callable[..., torch.Tensor]
    swizzles: bool = False
    is_native: bool = False


def choose(name: str | None, device: torch.device, *, activations: bool) -> Kernel:
    """The kernel of a model.

    Args:
        name: one of ``NAMES``; None: the device's best, which on a CPU is the exact reference.
        device: where the weights live.
        activations: inputs are quantised too: then a Blackwell multiplies 4-bit codes by 4-bit codes.
    Raises:
        ValueError: there is no such kernel, or the device cannot run it.
    """
    if name is None:
        name = _best(device, activations=activations)
    if name not in NAMES:
        raise ValueError(
            f"kernel {name!r} is unknown, expected one of {', '.join(NAMES)}, or None for the device's best"
        )
    if name == "triton" and not nvfp4_triton.is_available(device):
        raise ValueError(f"kernel 'triton' needs a CUDA device and triton, found {device}. Give kernel='reference'.")
    native = nvfp4_blackwell.is_available(device) and nvfp4_triton.is_available(device)  # experts run the latter's
    if name == "blackwell" and not (activations and native):
        needs = "a CUDA device of capability 10.0, triton, and a checkpoint with quantised inputs"
        raise ValueError(f"kernel 'blackwell' needs {needs}, found {device}. Give kernel=None.")
    reference = (nvfp4_reference.matmul, nvfp4_reference.expert_matmul)
    triton = (nvfp4_triton.matmul, nvfp4_triton.expert_matmul)
    return {
        "reference": lambda: Kernel("reference", *reference),
        "reference-128x4": lambda: Kernel("reference-128x4", *reference, swizzles=True),
        "triton": lambda: Kernel("triton", *triton),
        "blackwell": lambda: Kernel("blackwell", *triton, swizzles=True, is_native=True),
    }[name]()


def of_experts(kernel: Kernel) -> Kernel:
    """What experts run beside linear layers on ``kernel``.

    A Blackwell's own product multiplies one matrix of codes, and would ask the host which rows are whose: experts run
    Triton's there, with block scales as they were loaded, and ``Model.kernels`` says so.
    """
    return Kernel("triton", kernel.matmul, kernel.expert_matmul) if kernel.is_native else kernel


def _best(device: torch.device, *, activations: bool) -> str:
    if device.type == "cpu":
        return "reference"
    if activations and nvfp4_blackwell.is_available(device):
        return "blackwell"
    return "triton"  # refused where it cannot run: a slow reference on a GPU is something to ask for
