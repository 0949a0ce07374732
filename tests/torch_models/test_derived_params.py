"""The two helpers that give derived tensors their storage, and what they refuse: deriving from derived bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from torch_models import alias_or_bind_derived_param, copy_or_rebind_param
from torch_models.derived import holds_derived, mark_source
from torch_models.kernels.nvfp4_blackwell import swizzled


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()


def scales(rows, columns, seed=0):
    """Positive e4m3 values, no two rows alike."""
    found = torch.randint(1, 126, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return found.view(torch.float8_e4m3fn)


@pytest.fixture
def layer():
    module = nn.Module()
    module.weight_scale = nn.Parameter(scales(256, 8), requires_grad=False)
    return module


def load(module, value):
    module.weight_scale.data.copy_(value)


def derive(module):
    alias_or_bind_derived_param(module, "weight_scale", "weight_scale_interleaved", swizzled(module.weight_scale))


def test_a_derived_tensor_as_large_as_its_source_is_the_source(layer):
    source, expected = layer.weight_scale, swizzled(layer.weight_scale)
    where = source.data_ptr()
    derive(layer)
    assert layer.weight_scale_interleaved is layer.weight_scale is source
    assert source.data_ptr() == where
    assert bits(source) == bits(expected)
    assert holds_derived(layer, "weight_scale")
    assert [name for name, _ in layer.named_parameters()] == ["weight_scale"]  # the loader's name stays


def test_loading_again_and_deriving_again_is_what_a_cold_load_derives(layer):
    where = layer.weight_scale.data_ptr()
    for seed in (1, 2, 1, 1, 0):
        load(layer, scales(256, 8, seed))
        mark_source(layer, "weight_scale")
        derive(layer)
        assert bits(layer.weight_scale_interleaved) == bits(swizzled(scales(256, 8, seed)))
        assert layer.weight_scale_interleaved.data_ptr() == where


def test_a_load_that_does_not_say_so_is_seen_in_the_bytes(layer):
    derive(layer)
    load(layer, scales(256, 8, 7))
    derive(layer)
    assert bits(layer.weight_scale_interleaved) == bits(swizzled(scales(256, 8, 7)))


def test_deriving_twice_is_refused_and_nothing_is_written(layer):
    derive(layer)
    before = bits(layer.weight_scale)
    with pytest.raises(RuntimeError, match="weight_scale holds bytes of weight_scale_interleaved still.*256 of 256"):
        derive(layer)
    assert bits(layer.weight_scale) == before


def test_binding_what_is_there_again_changes_nothing(layer):
    value = swizzled(layer.weight_scale)
    for _ in range(3):
        alias_or_bind_derived_param(layer, "weight_scale", "weight_scale_interleaved", value)
    assert bits(layer.weight_scale_interleaved) == bits(value)


@pytest.mark.parametrize("half", [slice(0, 128), slice(128, 256)])
def test_a_source_that_was_loaded_in_part_is_refused(layer, half):
    derive(layer)
    layer.weight_scale.data[half] = scales(256, 8, 5)[half]
    before = bits(layer.weight_scale)
    with pytest.raises(RuntimeError, match="128 of 256 rows would be derived twice. Load all of weight_scale first"):
        derive(layer)
    assert bits(layer.weight_scale) == before


def test_scales_that_a_swizzle_does_not_change_are_no_cause_for_alarm(layer):
    load(layer, torch.ones(256, 8).to(torch.float8_e4m3fn))
    for _ in range(2):
        derive(layer)
    assert bits(layer.weight_scale) == bits(torch.ones(256, 8).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("shape", [(250, 8), (256, 6)], ids=["rows", "columns"])
def test_a_padded_derived_tensor_has_storage_of_its_own_and_keeps_it(shape):
    module = nn.Module()
    module.weight_scale = nn.Parameter(scales(*shape), requires_grad=False)
    derive(module)
    where = module.weight_scale_interleaved.data_ptr()
    assert where != module.weight_scale.data_ptr()
    assert not holds_derived(module, "weight_scale")
    for seed in (3, 3, 4):
        load(module, scales(*shape, seed))
        derive(module)
        assert bits(module.weight_scale) == bits(scales(*shape, seed))
        assert bits(module.weight_scale_interleaved) == bits(swizzled(scales(*shape, seed)))
        assert module.weight_scale_interleaved.data_ptr() == where


def test_a_scalar_is_never_broadcast_into_its_source():
    module = nn.Module()
    module.weight_scale_2 = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]), requires_grad=False)
    alias_or_bind_derived_param(module, "weight_scale_2", "alpha", module.weight_scale_2.max())
    assert module.alpha.shape == ()
    assert module.weight_scale_2.tolist() == [1.0, 2.0, 3.0]


def test_another_dtype_is_bound_and_not_cast():
    module = nn.Module()
    module.weight_scale = nn.Parameter(scales(4, 4), requires_grad=False)
    alias_or_bind_derived_param(module, "weight_scale", "wide", module.weight_scale.float() + 1)
    assert module.wide.dtype == torch.float32
    assert bits(module.weight_scale) == bits(scales(4, 4))


def test_without_a_source_parameter_the_derived_tensor_is_bound():
    module = nn.Module()
    alias_or_bind_derived_param(module, "missing", "alpha", torch.tensor(2.0))
    assert float(module.alpha) == 2.0


def test_copying_keeps_object_storage_and_attributes():
    module = nn.Module()
    copy_or_rebind_param(module, "alpha", torch.tensor(2.0))
    param = module.alpha
    param.weight_loader = "kept"
    where = param.data_ptr()
    copy_or_rebind_param(module, "alpha", torch.tensor(-0.0))
    assert module.alpha is param
    assert (param.data_ptr(), param.weight_loader, param.requires_grad) == (where, "kept", False)
    assert bits(param) == bits(torch.tensor(-0.0))


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones((), dtype=torch.bfloat16)], ids=["shape", "dtype"])
def test_another_shape_or_dtype_gets_other_storage_in_the_same_parameter(value):
    module = nn.Module()
    module.alpha = nn.Parameter(torch.tensor(2.0), requires_grad=False)
    param = module.alpha
    param.weight_loader = "kept"
    copy_or_rebind_param(module, "alpha", value)
    assert module.alpha is param
    assert param.weight_loader == "kept"
    assert (param.shape, param.dtype) == (value.shape, value.dtype)


def test_a_buffer_is_written_in_place_and_stays_a_buffer():
    module = nn.Module()
    module.register_buffer("alpha", torch.zeros(2))
    where = module.alpha.data_ptr()
    copy_or_rebind_param(module, "alpha", torch.ones(2))
    assert module.alpha.data_ptr() == where
    assert dict(module.named_buffers())["alpha"].tolist() == [1.0, 1.0]


def test_a_view_of_the_target_is_copied_before_it_is_written_over():
    module = nn.Module()
    module.weight = nn.Parameter(torch.arange(16.0).view(4, 4), requires_grad=False)
    expected = module.weight.t().clone()
    copy_or_rebind_param(module, "weight", module.weight.t())
    assert torch.equal(module.weight, expected)


def test_a_view_of_another_parameter_is_not_aliased_by_accident():
    module = nn.Module()
    module.weight = nn.Parameter(torch.arange(4.0), requires_grad=False)
    copy_or_rebind_param(module, "first", module.weight[:2])
    module.weight.data.zero_()
    assert module.first.tolist() == [0.0, 1.0]


def test_what_a_storage_holds_goes_with_a_copy_of_the_layer(layer):
    derive(layer)
    other = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="derived twice"):
        derive(other)


@pytest.mark.parametrize("is_said", [True, False], ids=["said", "unsaid"])
def test_half_a_load_is_seen_whether_or_not_it_is_said_to_be_all(layer, is_said):
    derive(layer)
    layer.weight_scale.data[:128] = scales(256, 8, 5)[:128]
    if is_said:
        mark_source(layer, "weight_scale")
    with pytest.raises(RuntimeError, match="128 of 256 rows"):
        derive(layer)
