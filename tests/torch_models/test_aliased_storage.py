"""Storage that holds a source and what is derived from it in turn: which of them is there, and what is refused then."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from torch_models import alias_or_bind_derived_param, copy_or_rebind_param
from torch_models.aliased_storage import remembered_bytes
from torch_models.derived import holds_derived, is_derived, mark_source
from torch_models.kernels.nvfp4_blackwell import swizzled


def scales(*shape, seed=0):
    """Positive e4m3 values, no two rows alike."""
    found = torch.randint(1, 126, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return found.view(torch.float8_e4m3fn)


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()


def layer_of(value):
    module = nn.Module()
    module.scale = nn.Parameter(value.clone(), requires_grad=False)
    return module


def turned(value):
    """Another order: of scales as a kernel wants them, of anything else back to front."""
    if value.dtype == torch.float8_e4m3fn and value.ndim == 2:
        return swizzled(value)
    return value.view(torch.uint8).flip(0).view(value.dtype)


def derive(module, value=None):
    alias_or_bind_derived_param(module, "scale", "derived", turned(module.scale) if value is None else value)


def part_written(module, new, part):
    """As a loader does that knows nothing of derived tensors."""
    module.scale.data.view(torch.uint8)[part] = new.view(torch.uint8)[part]


@pytest.fixture
def layer():
    return layer_of(scales(256, 8))


def test_loading_again_and_deriving_again_is_what_a_cold_load_derives(layer):
    where = layer.scale.data_ptr()
    for seed in (1, 2, 1, 1, 0):
        layer.scale.data.copy_(scales(256, 8, seed=seed))
        mark_source(layer, "scale")
        derive(layer)
        assert bits(layer.derived) == bits(swizzled(scales(256, 8, seed=seed)))
        assert layer.derived.data_ptr() == where


def test_a_load_that_does_not_say_so_is_seen_in_the_bytes(layer):
    for seed in (7, 8, 7):
        derive(layer)
        assert holds_derived(layer, "scale")
        layer.scale.data.copy_(scales(256, 8, seed=seed))
        assert not holds_derived(layer, "scale")


def test_deriving_twice_is_refused_and_nothing_is_written(layer):
    derive(layer)
    before = bits(layer.scale)
    with pytest.raises(RuntimeError, match="scale holds bytes of derived still.* Load all of scale first"):
        derive(layer)
    assert bits(layer.scale) == before


def test_binding_what_is_there_again_changes_nothing(layer):
    value = swizzled(layer.scale)
    for _ in range(3):
        derive(layer, value)
    assert bits(layer.derived) == bits(value)


def test_scales_that_a_swizzle_does_not_change_are_no_cause_for_alarm():
    layer = layer_of(torch.ones(256, 8).to(torch.float8_e4m3fn))
    for _ in range(2):
        derive(layer)
    assert bits(layer.scale) == bits(torch.ones(256, 8).to(torch.float8_e4m3fn))


ALL = slice(None)


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((256, 8), slice(0, 128)),
        ((256, 8), slice(128, 256)),
        ((256, 8), slice(0, 200)),
        ((256, 8), (ALL, slice(0, 4))),
        ((128, 8), slice(0, 64)),
        ((128, 8), slice(0, 1)),
        ((128, 8), slice(0, 126)),
        ((8, 16, 8), slice(0, 1)),
        ((8, 2, 128, 8), (ALL, slice(0, 1))),
        ((1024, 256), slice(0, 1023)),
        ((1024, 256), (ALL, slice(0, 255))),
        ((1024, 256), (ALL, slice(128, 256))),
        ((64,), slice(0, 32)),
    ],
)
def test_a_source_that_was_loaded_in_part_is_refused_and_nothing_is_written(shape, part):
    layer = layer_of(scales(*shape))
    derive(layer)
    part_written(layer, scales(*shape, seed=5), part)
    before = bits(layer.scale)
    with pytest.raises(RuntimeError, match="pieces would be derived twice"):
        derive(layer)
    with pytest.raises(RuntimeError, match="pieces are as they were"):
        holds_derived(layer, "scale")
    assert bits(layer.scale) == before


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_numbers_are_watched_one_by_one(count):
    layer = layer_of(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    derive(layer, layer.scale + 1)
    layer.scale.data[:count] = torch.tensor([10.0, 20.0, 30.0])[:count]
    before = layer.scale.tolist()
    with pytest.raises(RuntimeError, match="Nothing was written"):
        derive(layer, layer.scale + 1)
    assert layer.scale.tolist() == before


def test_whoever_says_that_all_was_loaded_is_believed_though_bytes_are_the_same():
    """The new source is what was derived from the old one."""
    for say in (
        lambda layer: (layer.scale.data.fill_(2.0), mark_source(layer, "scale")),
        lambda layer: copy_or_rebind_param(layer, "scale", torch.full((4,), 2.0)),
    ):
        layer = layer_of(torch.ones(4))
        derive(layer, layer.scale * 2)
        say(layer)
        assert not holds_derived(layer, "scale")
        derive(layer, layer.scale * 2)
        assert layer.derived.tolist() == [4.0] * 4


def test_a_derived_tensor_written_by_its_name_is_derived_still():
    layer = layer_of(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    derive(layer, layer.scale * 2)
    copy_or_rebind_param(layer, "derived", torch.tensor([7.0, 8.0, 9.0, 10.0]))
    assert is_derived(layer, "scale")
    with pytest.raises(RuntimeError, match="holds bytes of derived still"):
        derive(layer, layer.scale * 2)


def test_modules_that_share_a_source_share_what_it_holds():
    first, second = layer_of(torch.tensor([1.0, 2.0, 3.0])), nn.Module()
    second.scale = first.scale
    derive(first, first.scale * 2)
    assert holds_derived(second, "scale")
    with pytest.raises(RuntimeError, match="holds bytes of derived still"):
        derive(second, second.scale * 2)
    derive(second, first.scale.clone())  # the same: another name for it
    assert second.derived is first.derived
    second.scale.data.copy_(torch.tensor([4.0, 5.0, 6.0]))
    mark_source(second, "scale")
    derive(first, first.scale * 2)
    assert second.derived.tolist() == [8.0, 10.0, 12.0]


def test_a_source_under_two_names_is_derived_once():
    layer = layer_of(torch.tensor([1.0, 2.0, 3.0]))
    layer.again = layer.scale
    derive(layer, layer.scale * 2)
    with pytest.raises(RuntimeError, match="again holds bytes of derived still"):
        alias_or_bind_derived_param(layer, "again", "other", layer.again * 2)


def test_who_lodges_there_is_named_and_not_who_comes():
    layer = layer_of(torch.tensor([1.0, 2.0, 3.0]))
    other = layer.scale * 3
    derive(layer, layer.scale * 2)
    with pytest.raises(RuntimeError, match="scale holds bytes of derived still"):
        alias_or_bind_derived_param(layer, "scale", "other", other)


def test_another_parameter_in_the_place_of_a_source_is_another_source():
    for value in (torch.randn(500, 4), torch.full((300, 4), 2.0)):
        layer = layer_of(torch.ones(300, 4))
        derive(layer, layer.scale * 2)
        layer.scale = nn.Parameter(value.clone())
        derive(layer, layer.scale * 2)
        assert layer.derived is layer.scale
        assert torch.equal(layer.derived, value * 2)


def test_a_cast_loads_nothing():
    layer = layer_of(torch.tensor([1.0, 2.0, 3.0]))
    derive(layer, layer.scale * 2)
    layer.double()
    with pytest.raises(RuntimeError, match="they were only cast to torch.float64"):
        derive(layer, layer.scale * 2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_what_a_storage_holds_goes_with_a_copy_of_the_layer(copied):
    layer = layer_of(torch.randn(8, 4))  # torch cannot pickle FP8
    derive(layer)
    other = copied(layer)
    assert other.derived is other.scale
    assert holds_derived(other, "scale")
    with pytest.raises(RuntimeError, match="derived twice"):
        derive(other)
    mark_source(other, "scale")
    assert holds_derived(layer, "scale")


@pytest.mark.parametrize("shape", [(4, 4), (128, 8), (384, 8), (4096, 256), (8, 2, 768, 128)])
def test_what_is_remembered_is_little(shape):
    layer = layer_of(torch.randint(0, 256, shape, dtype=torch.uint8))
    derive(layer)
    found, size = remembered_bytes(layer), layer.scale.nbytes
    assert 0 < found <= max(size / 16, 640)
