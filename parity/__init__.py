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
    from parity.bisect import bisect, local_errors
    from parity.bisection import Bisection
    from parity.compare import compare
    from parity.comparison.outcome import Comparison
    from parity.events import EventResult
    from parity.lifecycle.live_pairs import LivePair, live_pair, rerun
    from parity.lifecycle.run import run_lifecycle
    from parity.model_backend import ModelBackend
    from parity.trace import Trace

# Public name -> the module that defines it. A new one is added here, to __all__, and above for type checkers.
_PUBLIC = {
    "Backend": "parity.backend",
    "BackendInfo": "parity.backend",
    "Bisection": "parity.bisection",
    "Comparison": "parity.comparison.outcome",
    "EventResult": "parity.events",
    "LivePair": "parity.lifecycle.live_pairs",
    "ModelBackend": "parity.model_backend",
    "Oracle": "parity.asserting",
    "Trace": "parity.trace",
    "assert_parity": "parity.asserting",
    "bisect": "parity.bisect",
    "compare": "parity.compare",
    "live_pair": "parity.lifecycle.live_pairs",
    "local_errors": "parity.bisect",
    "record_backend": "parity.backend",
    "rerun": "parity.lifecycle.live_pairs",
    "run_lifecycle": "parity.lifecycle.run",
}

__all__ = [
    "Backend",
    "BackendInfo",
    "Bisection",
    "Comparison",
    "EventResult",
    "LivePair",
    "ModelBackend",
    "Oracle",
    "Trace",
    "assert_parity",
    "bisect",
    "compare",
    "live_pair",
    "local_errors",
    "record_backend",
    "rerun",
    "run_lifecycle",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'parity' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
