"""How parameters are cut over a mesh: query heads lie where the keys are that they ask for."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace

import pytest

from loaders.axes import axes_of, cut_of, param_cuts
from loaders.spec import Dim

HEAD_DIM = 16
MESHES = [{"expert": expert, "tensor": tensor} for expert, tensor in product((1, 2, 4, 8), repeat=2)]
HEADS = [(64, 4), (32, 2), (32, 8), (16, 16), (12, 4)]


def dims_of(heads: int, shared: int) -> dict[str, Dim]:
    sizes = {"NH": heads, "N2H": heads, "KH": shared}
    dims = {letter: Dim(count * HEAD_DIM, letter, units=count) for letter, count in sizes.items()}
    return dims | {"D": Dim(64, "hidden_size")}


def held(cut, units: int, sizes: dict[str, int], place: dict[str, int]) -> range:
    """The units that a device has; the first axis of a cut is the outermost."""
    index, count = 0, 1
    for axis in axes_of(cut):
        index, count = index * sizes[axis] + place[axis], count * sizes[axis]
    return range(index * units // count, (index + 1) * units // count)


@pytest.mark.parametrize("letter", ["NH", "N2H", "NH/2", "NH/16"])
@pytest.mark.parametrize(("heads", "shared"), HEADS)
def test_a_device_has_the_keys_that_its_queries_ask_for(letter, heads, shared):
    dims = dims_of(heads, shared)
    for sizes in MESHES:
        (_, queries) = param_cuts(SimpleNamespace(axes=("D", letter)), dims, sizes)
        (keys, _) = param_cuts(SimpleNamespace(axes=("KH", "D")), dims, sizes)
        for place in ({"expert": e, "tensor": t} for e, t in product(*(range(size) for size in sizes.values()))):
            asked = {head * shared // heads for head in held(queries, heads, sizes, place)}
            assert asked <= set(held(keys, shared, sizes, place)), (sizes, place)


def test_query_heads_are_cut_as_far_as_they_divide():
    for sizes in MESHES:
        (cut, _) = param_cuts(SimpleNamespace(axes=("NH", "D")), dims_of(64, 4), sizes)
        assert math.prod(sizes[axis] for axis in axes_of(cut)) == math.prod(sizes.values())


def test_heads_that_are_no_whole_blocks_are_cut_nowhere_in_codes():
    dims = dims_of(4, 2) | {letter: Dim(24 * count, letter, units=count) for letter, count in (("NH", 4), ("KH", 2))}
    for letter, expected in {"NH": "tensor", "NH/2": None, "NH/16": None}.items():
        assert param_cuts(SimpleNamespace(axes=("D", letter)), dims, {"tensor": 2}) == (None, expected)


def test_scales_of_experts_are_cut_as_the_experts_and_routers_are_not():
    dims = {"E": Dim(4, "num_experts"), "D": Dim(64, "hidden_size")}
    for axes in (("E",), ("E", "1"), ("E", "2"), ("E", "2", "1")):
        cuts = param_cuts(SimpleNamespace(axes=axes), dims, {"expert": 2})
        assert cuts == ("expert", *(None for _ in axes[1:]))
    assert param_cuts(SimpleNamespace(axes=("E", "D")), dims, {"expert": 2}) == (None, None)


def test_what_nothing_divides_stays_whole():
    assert cut_of({"expert": 4, "tensor": 8}, ("expert", "tensor"), 6) is None
    assert cut_of({"expert": 2, "tensor": 8}, ("expert", "tensor"), 6) == "expert"
    assert cut_of({"expert": 4, "tensor": 2}, ("expert", "tensor"), 4) == "expert"  # of most devices
    assert cut_of({"expert": 2, "tensor": 2}, ("expert", "tensor"), 2) == "tensor"
