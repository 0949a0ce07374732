"""The figures of a whole model from those of two depths of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from parity.planning.depths import Depths

MOVED = ("hbm_read_bytes", "hbm_written_bytes")


def joined(found: list[dict[str, Any]], depths: Depths) -> dict[str, Any]:
    """The whole model. Times are what was really spent.

    What is held is a line through both depths; what is moved and sent is the deeper one's, and for every repetition
    that it lacks what the typical ones of it move on average. ``hbm_bytes_range``: with the least and the most of those
    instead of the average; null where nothing is missing.
    """
    first, last = found[0], found[-1]
    times = {name: round(sum(one[name] for one in found), 1) for name in ("lower_s", "compile_s")}
    if any("out_of_memory_bytes" in one for one in found):
        held = {name: _line(first[name], last[name], depths) for name in ("weight_bytes", "cache_bytes")}
        # the compiler may have given up before it had all of them
        needed = max(sum(held.values()), *(one.get("out_of_memory_bytes", 0) for one in found))
        return times | held | {"peak_bytes": None, "needs_at_least_bytes": needed}
    whole = {name: value for name, value in last.items() if name != "by_layer"} | times
    if depths.is_exact:
        return whole | {"hbm_bytes_range": None}
    names = [name for name in first if name.endswith("_bytes") and name not in MOVED]
    linear = {name: _line(first[name], last[name], depths) for name in names}
    # temporaries are shared by layers: they grow with depth or they do not, but never shrink
    lost = max(last["temp_bytes"] - linear["temp_bytes"], 0)
    linear["temp_bytes"] += lost
    linear["peak_bytes"] += lost
    return whole | linear | _moved(last, depths)


def _line(shallow: int, deeper: int, depths: Depths) -> int:
    return round(shallow + depths.weight * (deeper - shallow))


def _moved(deeper: dict[str, Any], depths: Depths) -> dict[str, Any]:
    """HBM traffic and collectives."""
    repetitions = [[deeper["by_layer"][str(layer)] for layer in layers] for layers in depths.repetitions]
    each = [{name: sum(one[name] for one in layers) for name in MOVED} for layers in repetitions]
    totals = [sum(one.values()) for one in each]
    compiled = sum(deeper[name] for name in MOVED)
    sent = {kind: dict(one) for kind, one in deeper["collectives"].items()}
    for kind, one in _sent(layer for layers in repetitions for layer in layers).items():
        mine = sent.setdefault(kind, {"count": 0, "bytes": 0})
        for key, value in one.items():
            mine[key] += round(depths.missing * value / len(repetitions))
    means = {name: sum(one[name] for one in each) / len(each) for name in MOVED}
    return {
        **{name: round(deeper[name] + depths.missing * mean) for name, mean in means.items()},
        "hbm_bytes_range": [compiled + depths.missing * bound for bound in (min(totals), max(totals))],
        "collectives": sent,
    }


def _sent(layers: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Collectives of some layers together."""
    total: dict[str, dict[str, int]] = {}
    for layer in layers:
        for kind, one in layer["collectives"].items():
            mine = total.setdefault(kind, {"count": 0, "bytes": 0})
            for key, value in one.items():
                mine[key] += value
    return total
