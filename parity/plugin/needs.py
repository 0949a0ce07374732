"""What a test says it needs, and why it cannot have it here: ``@pytest.mark.needs("cuda", sm=90)``."""

from __future__ import annotations

from importlib.util import find_spec

PACKAGES = ("jax", "torch", "transformers")
DEVICES = ("cuda", "tpu")


def lacking(name: str, *, sm: int | None = None, count: int = 1) -> str | None:
    """Why this machine does not have what is needed; None when it does.

    Args:
        name: a device (``cuda``, ``tpu``) or a package (``jax``, ``torch``, ``transformers``).
        sm: least compute capability of a CUDA device, as in ``sm_90``: 90 is Hopper, 100 Blackwell.
        count: so many devices.
    Raises:
        ValueError: nothing is called so, or ``sm`` or ``count`` make no sense for it.
    """
    if name not in (*DEVICES, *PACKAGES):
        raise ValueError(f"needs({name!r}): expected one of {', '.join((*DEVICES, *PACKAGES))}")
    if sm is not None and name != "cuda":
        raise ValueError(f"needs({name!r}, sm={sm}): compute capabilities are CUDA's")
    if name in PACKAGES:
        if count != 1:
            raise ValueError(f"needs({name!r}, count={count}): a package is not counted")
        return None if find_spec(name) else f"needs {name}, which is not installed: pip install {name}"
    return _cuda(sm, count) if name == "cuda" else _tpu(count)


def _cuda(sm: int | None, count: int) -> str | None:
    if not find_spec("torch"):
        return "needs CUDA, and torch to ask for it is not installed"
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < count:
        return f"needs {_devices(count, 'CUDA')}, torch {torch.__version__} sees {found}"
    if sm is None:
        return None
    have = [10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(found))]
    if sum(one >= sm for one in have) >= count:
        return None
    names = ", ".join(f"{torch.cuda.get_device_name(i)} is sm_{one}" for i, one in enumerate(have))
    return f"needs {_devices(count, 'CUDA')} of sm_{sm} or later: {names}"


def _tpu(count: int) -> str | None:
    if not find_spec("jax"):
        return "needs a TPU, and jax to ask for it is not installed"
    import jax

    try:
        found = len(jax.devices("tpu"))
    except RuntimeError:  # JAX's way to say that there is none
        found = 0
    return None if found >= count else f"needs {_devices(count, 'TPU')}, jax {jax.__version__} sees {found}"


def _devices(count: int, kind: str) -> str:
    return f"a {kind} device" if count == 1 else f"{count} {kind} devices"
