"""Qwen3-VL: the text is Qwen3's; what is shown enters through ``Run.embedded`` and ``Run.deepened``."""

from __future__ import annotations

from parity.oracles.qwen3 import forward

__all__ = ["forward"]
