"""A plan for people."""

from __future__ import annotations

from collections import Counter
from typing import Any


def plan_text(found: dict[str, Any]) -> str:
    """A headline, a table with a column for each program, what lies on more than one device, and the suggestion."""
    quant = f", {found['quant']}" if found["quant"] else ""
    stored = ", ".join(f"{_gb(size)} of {name}" for name, size in found["stored"].items())
    lines = [
        f"{found['subject']}: {found['architecture']}, {found['layers']} layers{quant}; {stored}; computed in"
        f" {found['dtype']}",
        f"{found['chip']}:{found['topology']}, {found['devices']} devices of {_gb(found['hbm_bytes'])}"
        f" ({_gb(found['usable_bytes'])} for a program), mesh {_mesh(found['mesh'])}",
        f"batch {found['rows']}, context {found['context']}; prefill reads {found['prompt']} tokens a row",
    ]
    if depths := found["extrapolated_from_layers"]:
        lines.append(f"extrapolated from programs of {depths[0]} and {depths[1]} layers; --exact compiles all of them")
    programs = found["programs"]
    rows = [("per device", *programs)]
    rows += [(label, *(_cell(programs[name], key) for name in programs)) for label, key in _ROWS]
    kinds = sorted({kind for one in programs.values() for kind in one.get("collectives", ())})
    rows += [(f"{kind}, a step", *(_sent(one, kind) for one in programs.values())) for kind in kinds]
    rows += [(label, *(_roof(one, which) for one in programs.values())) for label, which in _ROOFS]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["", *(_row(row, widths) for row in rows), ""]
    lines += _remarks(found)
    return "\n".join(lines)


_ROWS = (
    ("weights", "weight_bytes"),
    ("cache", "cache_bytes"),
    ("temporaries, and room lost between them", "temp_bytes"),
    ("in all", "peak_bytes"),
    ("fits", "fits"),
    ("HBM traffic, a step", "hbm_bytes"),
    ("least that must move", "minimum"),
    ("traffic over least", "ratio"),
    ("compile time", "compile_s"),
)
_SMALLEST = "smallest slice that fits"
_ROOFS = (("roofline, as compiled", "compiled"), ("roofline, least", "minimum"))


def _cell(program: dict[str, Any], key: str) -> str:
    value = program.get(key)
    if key == "minimum":
        least = program["minimum"]
        distinct = least["expert_bytes"] and f" ({_gb(least['distinct_bytes'])} for the experts expected)"
        return _gb(least["bytes"]) + (distinct or "")
    if key == "peak_bytes" and value is None:
        return f"{_gb(program['needs_at_least_bytes'])} or more"
    if value is None:
        return "-"
    if key == "hbm_bytes" and (bounds := program["hbm_bytes_range"]) and _gb(bounds[0]) != _gb(bounds[1]):
        return f"{_gb(value)} ({_gb(bounds[0])} to {_gb(bounds[1])})"
    if key == "fits":
        return "yes" if value else "NO"
    if key == "ratio":
        return f"{value:.3f}"
    return f"{value} s" if key == "compile_s" else _gb(value)


def _sent(program: dict[str, Any], kind: str) -> str:
    found = program.get("collectives", {}).get(kind)
    return f"{found['count']}, {found['bytes'] / 1e6:.2f} MB" if found else "-"


def _roof(program: dict[str, Any], which: str) -> str:
    if "roofline" not in program:
        return "-"
    found = program["roofline"][which]
    return f"{found['tokens_per_s']:,.0f} tokens/s ({found['seconds'] * 1e3:.2f} ms)"


def _row(row: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
    )


def _remarks(found: dict[str, Any]) -> list[str]:
    lines = _uncut(found) + _copied(found)
    if loops := [loop for one in found["programs"].values() for loop in one.get("unknown_loops", ())]:
        lines.append(f"loops whose length only a run knows, counted once: {', '.join(loops)}")
    lines.append("rooflines know HBM and multipliers alone: the time of collectives is in none of them")
    lines.append("as compiled, a kernel counts with all it is given, also where it skips experts or blocks of a cache")
    suggestion = found["suggestion"]
    if suggestion is not None:
        said = (
            "this one"
            if suggestion["is_this"]
            else f"{found['chip']}:{suggestion['topology']}, compiled with mesh {_mesh(suggestion['mesh'])}"
        )
        is_other = found["is_mesh_given"] and suggestion["mesh"] != found["mesh"]
        which = "it does not fit with this mesh; smallest slice that does with another" if is_other else _SMALLEST
        lines.append(f"{which}: {said}")
    elif not found["fits"]:
        other = "slice" if found["is_mesh_given"] else "other slice"
        mesh = " with the mesh that leaves devices the least" if found["is_mesh_given"] else ""
        lines.append(f"it does not fit, nor on any {other} of {found['chip']}{mesh}")
    return lines


def _uncut(found: dict[str, Any]) -> list[str]:
    """Of a batch that the mesh does not divide."""
    if (uncut := found["uncut_rows"]) is None:
        return []
    dividing = " or ".join(str(batch) for batch in uncut["dividing"])
    return [
        f"a batch of {found['rows']} is not cut by {_mesh(uncut['axes'])}: {uncut['rows_per_device']} rows on each"
        f" device; a batch of {dividing} would be"
    ]


def _copied(found: dict[str, Any]) -> list[str]:
    """A line for each number of copies, of weights and of the cache."""
    lines, groups = [], found["copied_weights"]
    is_all = sum(len(group["tensors"]) for group in groups) == found["parameters"]
    for group in groups:
        if is_all and all(group["axes"].keys() <= other["axes"].keys() for other in groups):
            lines.insert(0, (f"every weight{' not named below' if len(groups) > 1 else ''}", group))
        else:
            lines.append((_kinds(group), group))
    for group in found["copied_cache"]:
        parts = [one["name"].rpartition(".") for one in group["tensors"]]
        if kinds := dict.fromkeys(name for layer, _, name in parts if layer):  # the rest of it is small
            lines.append((f"{', '.join(kinds)} of the cache", group))
    said = [
        f"  {what}: {group['copies']} copies ({_mesh(group['axes'])}), {_gb(group['bytes'])}" for what, group in lines
    ]
    if not said:
        return ["on more than one device: nothing"]
    return ["on more than one device, and what all copies but one take on all devices:", *said]


def _kinds(group: dict[str, Any]) -> str:
    """Most bytes first: names that differ in numbers alone, of a vision tower and of other vectors but how many."""
    count, size = Counter[str](), Counter[str]()
    for tensor in group["tensors"]:
        count[_kind(tensor)] += 1
        size[_kind(tensor)] += tensor["bytes"]
    return ", ".join(f"{count[kind]} x {kind}" if count[kind] > 1 else kind for kind, _ in size.most_common())


def _kind(tensor: dict[str, Any]) -> str:
    if tensor["is_visual"]:
        return "tensor of the vision tower"
    if len(tensor["shape"]) < 2:
        return "vector or scalar"
    return ".".join("*" if part.isdigit() else part for part in tensor["name"].split("."))


def _mesh(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items()) or "one device"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
