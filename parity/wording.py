"""How numbers and places are said to people: the same in a terminal, on a page and in a notebook."""

from __future__ import annotations

import math

TOKEN_LIMIT = "a token's limit"  # wider than that of a module over all tokens: a share of one is none of the other
MOST = 1e9  # what is not finite is drawn as so many times its limit
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# What a reader is told a failure is: whose it is stands beside it, so a peer's bug is a bug. Machines get the kind.
CAUSES = {"peer is the outlier": "bug"}


def cause_word(cause: str | None) -> str:
    """The kind of a failure for a reader; empty without one."""
    return "" if cause is None else CAUSES.get(cause, cause)


def number(value: float | None) -> str:
    """An error in three digits; nothing where there is none."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "not finite"
    if 0.001 <= abs(value) < 1000:
        return f"{value:.3g}"
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits}×10{str(int(power)).translate(_SUPERSCRIPTS)}"


def times(factor: float) -> str:
    """A factor in three digits, without powers of ten."""
    if not math.isfinite(factor):
        return "infinitely many"
    if factor > MOST:
        return f"over {MOST:,.0f}"
    return f"{factor:.3g}" if factor < 1000 else f"{float(f'{factor:.3g}'):,.0f}"


def told_share(share: float, limit: str = "its limit") -> str:
    """How much of a limit is used, in words: percent below it, times above it. ``limit``: what it is called."""
    if not math.isfinite(share):
        return "not finite"
    return f"{share:.0%} of {limit}" if share <= 1 else f"{times(share)} times {limit}"


def share(value: float) -> str:
    """The same as short as a column allows: ``26%``, ``3.2x``."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.0%}" if value <= 1 else f"{times(value)}x"


def shown(size: float) -> str:
    """The size of a fault in percent, as short as it can be told."""
    return "no size" if size == float("inf") else f"{100 * size:.2g} %"


def printable(text: str) -> str:
    """A text on one line, with escapes for what could steer a terminal (``loaders.errors`` does so, and needs more)."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def joined(names: list[str], word: str = "and") -> str:
    """``a, b and c``."""
    return " ".join([", ".join(names[:-1]), word, names[-1]]) if len(names) > 1 else "".join(names)


def short_name(module: str) -> str:
    """A module's path where there is little room, as along an axis: ``layers.3``, ``embed_tokens``, ``lm_head``."""
    _, is_layer, layer = module.rpartition(".layers.")
    return f"layers.{layer}" if is_layer else module.rpartition(".")[2]
