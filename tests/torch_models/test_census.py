"""The pointer census: what it finds, by which name, and that nothing moves unseen."""

from __future__ import annotations

import functools
import gc
import weakref
from collections import deque, namedtuple

import pytest
import torch
from torch import nn

from torch_models.census import Address, Watch, moved, pointer_census

Pair = namedtuple("Pair", "left right")


def tensor() -> torch.Tensor:
    return torch.zeros(3)


class Kernel:
    """As kernels are: a workspace here, a descriptor there."""

    shared = [torch.zeros(2)]

    def __init__(self) -> None:
        self.workspace = {"x": [1, None, tensor()]}
        self.name = "kernel"

    @property
    def secret(self) -> torch.Tensor:
        raise AssertionError("the census called a property")

    def run(self) -> None: ...


class Slotted:
    __slots__ = ("empty", "full")

    def __init__(self) -> None:
        self.full = tensor()


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensor())
        self.register_buffer("scale", tensor(), persistent=False)


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Part(), Part()])
        self.head = self.layers[0]  # tied: one module, two names


@pytest.fixture
def root() -> Root:
    return Root()


def test_parameters_and_buffers_stand_under_every_module_path(root: Root) -> None:
    want = {f"{path}.{leaf}" for path in ("layers.0", "layers.1", "head") for leaf in ("weight", "scale")}
    census = pointer_census(root)
    assert set(census) == want
    assert census["head.weight"] == census["layers.0.weight"] == Address.of(root.head.weight)


def hook_of(value: torch.Tensor):
    def hook(module, args):
        return value.sum() if args else None

    return hook


def with_default(x: torch.Tensor = tensor(), *, y: torch.Tensor = tensor()) -> None: ...  # noqa: B008


HIDING_PLACES = {
    "an attribute": (lambda p, t: setattr(p, "seen", t), "layers.1.seen"),
    "a list": (lambda p, t: setattr(p, "kept", [1, [t]]), "layers.1.kept[1][0]"),
    "a dictionary": (lambda p, t: setattr(p, "kept", {"a": {7: t}}), "layers.1.kept['a'][7]"),
    "a tuple": (lambda p, t: setattr(p, "kept", (0, Pair(1, t))), "layers.1.kept[1][1]"),
    "a set": (lambda p, t: setattr(p, "kept", {t}), "layers.1.kept{0}"),
    "a deque": (lambda p, t: setattr(p, "kept", deque([t])), "layers.1.kept[0]"),
    "a closure": (lambda p, t: setattr(p, "run", hook_of(t)), "layers.1.run.<closure value>"),
    "a hook": (lambda p, t: p.register_forward_pre_hook(hook_of(t)), "layers.1._forward_pre_hooks[ID].<closure value>"),
    "a partial": (lambda p, t: setattr(p, "run", functools.partial(print, t, end=[t])), "layers.1.run.args[0]"),
    "a keyword": (lambda p, t: setattr(p, "run", functools.partial(print, end=t)), "layers.1.run.keywords['end']"),
    "a tensor's method": (lambda p, t: setattr(p, "run", t.add), "layers.1.run.__self__"),
    "a tensor's attribute": (lambda p, t: setattr(p.weight, "scales", [t]), "layers.1.weight.scales[0]"),
    "a module in a list": (lambda p, t: setattr(p, "more", [nn.ParameterList([t])]), "layers.1.more[0].0"),
}


@pytest.mark.parametrize("place", HIDING_PLACES)
def test_a_tensor_is_found_wherever_it_hides(root: Root, place: str) -> None:
    hide, name = HIDING_PLACES[place]
    hidden = tensor()
    before = pointer_census(root)
    hide(root.layers[1], hidden)
    found = {key: address for key, address in pointer_census(root).items() if key not in before}
    keys = [key for key, address in found.items() if address.data_ptr == hidden.data_ptr()]
    assert name.replace("ID", str(next(iter(root.layers[1]._forward_pre_hooks), 0))) in keys


def test_a_kernel_object_is_walked_with_its_slots_methods_and_class() -> None:
    kernel, slotted = Kernel(), Slotted()
    kernel.parts = {"slotted": slotted, "run": Kernel().run, "function": with_default}
    census = pointer_census(kernel, "kernel")
    assert set(census) == {
        "kernel.workspace['x'][2]",
        "kernel.<class Kernel>.shared[0]",
        "kernel.parts['slotted'].full",
        "kernel.parts['run'].__self__.workspace['x'][2]",
        "kernel.parts['function'].<default 0>",
        "kernel.parts['function'].<default y>",
    }


def test_a_tensor_held_in_two_places_stands_under_both_names(root: Root) -> None:
    root.alias = root.layers[1].weight  # registered as a parameter: a second module path
    root.kept = [root.layers[1].weight]
    census = pointer_census(root)
    assert census["alias"] == census["kept[0]"] == census["layers.1.weight"]


def test_a_ring_of_references_ends(root: Root) -> None:
    ring: list = [root, tensor()]
    ring.append({"ring": ring, "back": root.layers[0]})
    root.ring = ring
    root.layers[0].model = [root]  # not registered, but there
    assert {name for name in pointer_census(root) if "ring" in name} == {"ring[1]"}


def test_a_module_that_contains_itself_ends(root: Root) -> None:
    root.layers[1].add_module("again", root)
    assert "layers.1.weight" in pointer_census(root)


def test_what_says_so_is_not_entered(root: Root) -> None:
    class Private:
        is_outside_census = True

        def __init__(self) -> None:
            self.tensor = tensor()

    before = pointer_census(root)
    root.private = Private()
    root.kept = [weakref.proxy(root)]
    assert pointer_census(root) == before


def test_tensors_without_storage_do_not_stop_it(root: Root) -> None:
    root.kept = [torch.empty(2, device="meta"), torch.zeros(2).to_sparse()]
    assert moved(pointer_census(root), pointer_census(root)) == []


# what moves


def rebind_buffer(root: Root) -> None:
    root.layers[1].scale = root.layers[1].scale + 1


def rebind_parameter(root: Root) -> None:
    root.layers[1].weight = nn.Parameter(tensor())


def rebind_data(root: Root) -> None:
    root.layers[1].weight.data = tensor()


def resize_storage(root: Root) -> None:
    root.layers[1].weight.untyped_storage().resize_(0)


def exchange_module(root: Root) -> None:
    root.layers[1] = Part()


def exchange_kernel(root: Root) -> None:
    root.kernel = Kernel()


def exchange_in_list(root: Root) -> None:
    root.kernel.workspace["x"][2] = tensor()


def shorten_list(root: Root) -> None:
    root.kernel.workspace["x"].pop()


def assign_in_closure(root: Root) -> None:
    root.assign(tensor())


def delete_buffer(root: Root) -> None:
    del root.layers[1].scale


KERNEL = ["kernel.workspace['x'][2]"]
MOVES = {
    rebind_buffer: ["layers.1.scale"],
    rebind_parameter: ["layers.1.weight"],
    rebind_data: ["layers.1.weight"],
    resize_storage: ["layers.1.weight"],
    exchange_module: ["layers.1.scale", "layers.1.weight"],
    exchange_kernel: KERNEL,
    exchange_in_list: KERNEL,
    shorten_list: KERNEL,
    assign_in_closure: ["assign.<closure held>", "read.<closure held>"],
    delete_buffer: ["layers.1.scale"],
}


def with_a_kernel_and_a_closure(root: Root) -> Root:
    held = tensor()

    def assign(value: torch.Tensor) -> None:
        nonlocal held
        held = value

    root.kernel, root.assign, root.read = Kernel(), assign, lambda: held
    return root


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_every_tensor_that_moved_is_named_by_the_census_and_by_the_watch(root: Root, move) -> None:
    with_a_kernel_and_a_closure(root)
    before, watch = pointer_census(root), Watch(root)
    old = [p.data for p in root.parameters()]  # alive, so that no new tensor can take its place
    assert watch.moved() == []
    move(root)
    assert moved(before, pointer_census(root)) == MOVES[move]
    assert watch.moved() == MOVES[move]
    assert watch.moved() == MOVES[move], "a second look forgot"
    del old


def test_writing_in_place_moves_nothing(root: Root) -> None:
    watch = Watch(with_a_kernel_and_a_closure(root))
    with torch.no_grad():
        root.layers[0].weight.copy_(torch.ones(3))
        root.layers[1].weight.data.fill_(2.0)
        root.kernel.workspace["x"][2] += 1
    assert watch.moved() == watch.moved_or_new() == []


def test_another_object_with_the_same_tensors_is_no_move(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(with_a_kernel_and_a_closure(root))
    root.kernel.workspace = {"x": list(root.kernel.workspace["x"])}
    assert watch.moved() == []
    with monkeypatch.context() as patch:
        patch.setattr("torch_models.census.pointer_census", lambda *_: pytest.fail("again a whole census"))
        assert watch.moved() == []
    root.kernel.workspace["x"][2] = tensor()
    assert watch.moved() == KERNEL, "it went on watching the old list"


def test_a_tensor_that_came_new_is_seen_by_the_whole_census(root: Root) -> None:
    watch = Watch(root)
    root.layers[1].lora = [tensor()]
    assert watch.moved_or_new() == ["layers.1.lora[0]"]


def test_a_watch_keeps_no_model_alive() -> None:
    root = Root()
    watch, gone = Watch(root), weakref.ref(root)
    gc.disable()
    try:
        del root
        assert gone() is None
    finally:
        gc.enable()
    assert watch.census
