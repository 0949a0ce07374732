"""Parity: the proof that two backends compute what the checkpoint says, and the tools around it.

Importing it imports nothing else: ``tandem --help`` has to answer at once, and comparing traces needs neither JAX nor
torch. Public names load their module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.asserting import Oracle, assert_parity
    from parity.backend import Backend, BackendInfo, record_backend
    from parity.compare import compare
    from parity.comparison import Comparison
    from parity.events import EventResult
    from parity.lifecycle import run_lifecycle
    from parity.trace import Trace

# Public name -> the module that defines it. One line per name.
_PUBLIC = {
    "Backend": "parity.backend",
    "BackendInfo": "parity.backend",
    "Comparison": "parity.comparison",
    "EventResult": "parity.events",
    "Oracle": "parity.asserting",
    "Trace": "parity.trace",
    "assert_parity": "parity.asserting",
    "compare": "parity.compare",
    "record_backend": "parity.backend",
    "run_lifecycle": "parity.lifecycle",
}

__all__ = [
    "Backend",
    "BackendInfo",
    "Comparison",
    "EventResult",
    "Oracle",
    "Trace",
    "assert_parity",
    "compare",
    "record_backend",
    "run_lifecycle",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'parity' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
