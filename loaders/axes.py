"""Where parameters are cut on a mesh of devices: one table from axis letters to mesh axes, for both backends.

Stored layout never depends on the mesh. An axis whose whole units (heads, experts, rows) the mesh axes do not divide
stays whole on every device.

``data`` cuts rows alone, ``expert`` and ``tensor`` cut weights so that each device multiplies what it holds. ``fsdp``
cuts rows, and weights along the model's width: where they are multiplied they are gathered, or parts are summed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from loaders.spec import Dim, ParamSpec, dim_of

FSDP = "fsdp"
# Axis letter (docs/glossary.md) -> mesh axes it is cut by, together where they divide it; others stay whole.
# Whatever is no expert is cut by "expert" too: those devices would otherwise hold copies of it.
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "B": ("data", FSDP),
    "D": (FSDP,),
    "V": ("expert", "tensor"),
    "NH": ("expert", "tensor"),
    "N2H": ("expert", "tensor"),
    "KH": ("expert", "tensor"),
    "F": ("expert", "tensor"),
    "SF": ("expert", "tensor"),
    "QKV": ("expert", "tensor"),
    "LV": ("expert", "tensor"),
    "LN": ("expert", "tensor"),
    "M": ("tensor",),
    "E": ("expert",),
}
SHARING = {"NH": "KH", "N2H": "KH"}  # heads that share others, several in a row the same
DELTA_HEADS = ("QKV", "LV", "LN")  # of a gated delta net: keys, values, and what there is one of for each value head

Cut = str | tuple[str, ...] | None  # what cuts one axis
Sizes = Mapping[str, int]  # of a mesh: axis -> devices


def cut_of(sizes: Sizes, axes: tuple[str, ...], units: int) -> Cut:
    """Those of ``axes`` that cut ``units`` evenly: all that there are, else the one of most devices, or the last."""
    present = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
    alone = sorted(present, key=lambda axis: (-sizes[axis], -present.index(axis)))
    for choice in (present, *((axis,) for axis in alone)):
        if choice and units % math.prod(sizes[axis] for axis in choice) == 0:
            return choice[0] if len(choice) == 1 else choice
    return None


def axes_of(cut: Cut) -> tuple[str, ...]:
    """The mesh axes of a cut."""
    return (cut,) if isinstance(cut, str) else cut or ()


def param_cuts(spec: ParamSpec, dims: dict[str, Dim], sizes: Sizes) -> tuple[Cut, ...]:
    """What cuts every axis of one parameter.

    Where only some of the mesh axes cut heads of keys and values, those come first in the cut of query heads: a device
    then has the keys that its queries ask for, which would else be sent to it at every step.
    """
    return tuple(axis_cut(axis, axes, dims, sizes) for axis, axes in zip(spec.axes, wanted_axes(spec), strict=True))


def axis_cut(axis: str, axes: tuple[str, ...], dims: dict[str, Dim], sizes: Sizes) -> Cut:
    """What cuts one axis of a parameter, of those mesh axes that it may be cut by."""
    if not any(sizes.get(by, 1) > 1 for by in axes):
        return None
    dim, shared = dim_of(axis, dims), dims.get(SHARING.get(axis.partition("/")[0], ""))
    keys = cut_of(sizes, axes, shared.units or shared.size) if shared else None
    return _led_by(keys, sizes, axes, dim.units or dim.size)


def head_cuts(sizes: Sizes, num_heads: int, num_kv_heads: int) -> tuple[Cut, Cut]:
    """What cuts query heads, and heads of keys and values."""
    keys = cut_of(sizes, LOGICAL_AXES["KH"], num_kv_heads)
    return _led_by(keys, sizes, LOGICAL_AXES["NH"], num_heads), keys


def _led_by(keys: Cut, sizes: Sizes, axes: tuple[str, ...], units: int) -> Cut:
    """``cut_of`` with the axes of another cut outermost, where that divides these units too."""
    first = axes_of(keys)
    if units % math.prod(sizes[by] for by in first):
        return None  # heads that are not whole blocks of codes
    found = cut_of(sizes, (*first, *(by for by in axes if by not in first)), units)
    return found if axes_of(found)[: len(first)] == first else keys


def wanted_axes(spec: ParamSpec) -> list[tuple[str, ...]]:
    """The table's mesh axes for every axis. Routers are whole, for they must see all their scores; so are vectors."""
    is_router = spec.axes == ("E", "D")
    letters = [axis.partition("/")[0] for axis in spec.axes]  # codes and block scales are cut as their axis is
    whole = {"E", "D"} if is_router else {"D"} if len(letters) == 1 else set()
    return [() if letter in whole else LOGICAL_AXES.get(letter, ()) for letter in letters]


def gathered(cuts: Sequence[Cut]) -> tuple[Cut, ...]:
    """The cuts of a weight where it is multiplied: those along the model's width are undone before."""
    return tuple(tuple(by for by in axes_of(cut) if by != FSDP) or None for cut in cuts)


def replicated(params: Sequence[ParamSpec], dims: dict[str, Dim], sizes: Sizes) -> list[str]:
    """Parameters that every device holds whole although the table would cut them."""
    wanted = {spec.name: any(sizes.get(axis, 1) > 1 for axes in wanted_axes(spec) for axis in axes) for spec in params}
    return [spec.name for spec in params if wanted[spec.name] and not any(param_cuts(spec, dims, sizes))]
