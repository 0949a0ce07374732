"""The two helpers that give derived tensors their storage, on modules that they know nothing of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torch_models import alias_or_bind_derived_param, copy_or_rebind_param
from torch_models.derived import holds_derived
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


def with_source(value, requires_grad=False):
    module = nn.Module()
    module.source = nn.Parameter(value, requires_grad=requires_grad)
    return module


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


def test_what_broadcasts_to_its_source_fills_it():
    module = with_source(torch.zeros(4, 4))
    alias_or_bind_derived_param(module, "source", "derived", torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert module.derived is module.source
    assert module.derived.tolist() == [[1.0, 2.0, 3.0, 4.0]] * 4
    where = module.source.data_ptr()
    alias_or_bind_derived_param(module, "source", "derived", torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert module.source.data_ptr() == where


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_single_number_keeps_its_shape(shape):
    module = with_source(torch.ones(4, 4))
    alias_or_bind_derived_param(module, "source", "derived", torch.full(shape, 2.0))
    assert module.derived.shape == shape
    assert module.source.tolist() == torch.ones(4, 4).tolist()
    of_one = with_source(torch.ones(shape))
    alias_or_bind_derived_param(of_one, "source", "derived", torch.full(shape, 2.0))
    assert of_one.derived is of_one.source


def test_what_does_not_broadcast_is_bound():
    module = with_source(torch.ones(4, 4))
    alias_or_bind_derived_param(module, "source", "derived", torch.ones(4, 2))
    assert module.derived.shape == (4, 2)
    assert module.source.shape == (4, 4)


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


# what may be called as the derived tensor will be


def buffered(module):
    module.register_buffer("derived", torch.zeros(4))


def plain(module):
    module.derived = torch.zeros(4)


def empty(module):
    module.register_parameter("derived", None)


def another(module):
    module.derived = nn.Parameter(torch.zeros(7))


@pytest.mark.parametrize("occupy", [buffered, plain, empty, another])
def test_a_name_that_something_has_is_given_up(occupy):
    module = with_source(torch.ones(4))
    occupy(module)
    alias_or_bind_derived_param(module, "source", "derived", module.source * 2)
    assert module.derived is module.source
    assert module.source.tolist() == [2.0] * 4
    assert [*module.state_dict()] == ["source", "derived"]


class Crowded(nn.Module):
    derived = None

    def __init__(self):
        super().__init__()
        self.source = nn.Parameter(torch.ones(4))
        self.child = nn.Linear(2, 2)


@pytest.mark.parametrize("name", ["derived", "child", "", "a.b"])
def test_a_name_that_no_parameter_can_have_is_refused_before_anything_is_written(name):
    module = Crowded()
    for bind in (
        lambda: alias_or_bind_derived_param(module, "source", name, module.source * 2),
        lambda: alias_or_bind_derived_param(module, "source", name, torch.ones(9)),
        lambda: copy_or_rebind_param(module, name, torch.ones(4)),
    ):
        with pytest.raises(ValueError, match="expected the name of a parameter.* Nothing was written"):
            bind()
    assert module.source.tolist() == [1.0] * 4
    assert module.source.requires_grad
    assert not holds_derived(module, "source")


@pytest.mark.parametrize("other", [torch.ones(8), torch.ones(4, dtype=torch.float16), torch.tensor(3.0)])
def test_a_derived_tensor_of_another_form_moves_out_and_leaves_the_source_alone(other):
    for bind in (
        lambda module: alias_or_bind_derived_param(module, "source", "derived", other),
        lambda module: copy_or_rebind_param(module, "derived", other),
    ):
        module = with_source(torch.ones(4))
        source, where = module.source, module.source.data_ptr()
        alias_or_bind_derived_param(module, "source", "derived", module.source * 2)
        bind(module)
        assert module.source is source
        assert (source.shape, source.dtype, source.data_ptr()) == ((4,), torch.float32, where)
        assert bits(module.derived) == bits(other)
        with pytest.raises(RuntimeError, match="source holds bytes of derived still"):
            alias_or_bind_derived_param(module, "source", "derived", module.source * 2)
        copy_or_rebind_param(module, "source", torch.full((4,), 5.0))
        alias_or_bind_derived_param(module, "source", "derived", module.source * 2)
        assert module.derived is module.source
        assert module.derived.tolist() == [10.0] * 4


def transposed(step):
    return torch.full((4, 8), float(step)).t()


def expanded(step):
    return torch.tensor(float(step)).expand(8, 4)


def every_other(step):
    return torch.full((8, 8), float(step))[:, ::2]


@pytest.mark.parametrize("make", [transposed, expanded, every_other])
def test_how_a_value_lies_in_memory_moves_nothing(make):
    module = nn.Module()
    addresses = set()
    for step in range(4):
        copy_or_rebind_param(module, "derived", make(step))
        addresses.add((module.derived.data_ptr(), module.derived.stride()))
        assert module.derived.tolist() == [[float(step)] * 4] * 8
    assert len(addresses) == 1
    assert module.derived.is_contiguous()
    assert module.derived.untyped_storage().nbytes() == 8 * 4 * 4


def test_a_parameter_that_lies_transposed_is_written_in_place():
    module = with_source(torch.zeros(4, 8).t())
    where = module.source.data_ptr()
    copy_or_rebind_param(module, "source", torch.ones(8, 4))
    alias_or_bind_derived_param(module, "source", "derived", torch.full((8, 4), 2.0))
    assert module.derived is module.source
    assert (where, module.source.stride()) == (module.source.data_ptr(), (1, 8))
    assert module.source.tolist() == [[2.0] * 4] * 8


def test_a_parameter_whose_elements_share_memory_gets_storage_that_can_be_written():
    module = with_source(torch.zeros(1).expand(4))
    alias_or_bind_derived_param(module, "source", "derived", torch.arange(4.0))
    assert module.derived is not module.source
    copy_or_rebind_param(module, "source", torch.arange(4.0))
    assert module.source.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_what_is_bound_is_nobody_elses():
    value = torch.ones(4)
    module = nn.Module()
    module.child = nn.Linear(4, 4, bias=False)
    kept = module.child.weight.detach().clone()
    copy_or_rebind_param(module, "first", value)
    copy_or_rebind_param(module, "merged", module.child.weight)
    for name in ("first", "merged"):
        copy_or_rebind_param(module, name, torch.zeros_like(getattr(module, name)))
    module.register_buffer("held", torch.zeros(2))
    copy_or_rebind_param(module, "held", value)
    copy_or_rebind_param(module, "held", torch.zeros(4))
    assert value.tolist() == [1.0] * 4
    assert torch.equal(module.child.weight, kept)


def test_what_is_bound_in_inference_mode_can_be_updated_outside_of_it():
    module = with_source(torch.ones(4))
    with torch.inference_mode():
        copy_or_rebind_param(module, "alpha", module.source.sum())
        alias_or_bind_derived_param(module, "source", "derived", module.source * 2)
        module.made_there = nn.Parameter(torch.ones(4), requires_grad=False)
    where = module.alpha.data_ptr(), module.made_there.data_ptr()
    copy_or_rebind_param(module, "alpha", torch.tensor(7.0))
    copy_or_rebind_param(module, "made_there", torch.zeros(4))
    copy_or_rebind_param(module, "source", torch.full((4,), 3.0))
    alias_or_bind_derived_param(module, "source", "derived", module.source * 2)
    assert where == (module.alpha.data_ptr(), module.made_there.data_ptr())
    assert (float(module.alpha), module.made_there.tolist(), module.derived.tolist()) == (7.0, [0.0] * 4, [6.0] * 4)


@pytest.mark.parametrize("value", [torch.zeros(4), torch.zeros(5), torch.zeros(4, dtype=torch.uint8)])
def test_no_gradient_is_asked_for_any_more(value):
    module = with_source(torch.ones(4), requires_grad=True)
    copy_or_rebind_param(module, "source", value)
    assert not module.source.requires_grad
    module = with_source(torch.ones(4), requires_grad=True)
    alias_or_bind_derived_param(module, "source", "derived", module.source * 2)
    assert not module.derived.requires_grad
    assert module.derived.is_leaf


def test_what_has_no_bytes_yet_is_named_now_and_filled_later():
    module = with_source(torch.empty(4, device="meta"))
    module.source.weight_loader = "kept"
    alias_or_bind_derived_param(module, "source", "derived", module.source * 2)
    assert module.derived is module.source
    copy_or_rebind_param(module, "source", torch.ones(4))
    assert module.derived is module.source
    assert module.source.weight_loader == "kept"
    alias_or_bind_derived_param(module, "source", "derived", module.source * 2)
    assert module.source.tolist() == [2.0] * 4


def test_a_source_without_bytes_takes_no_lodger():
    module = with_source(torch.empty(4, device="meta"))
    alias_or_bind_derived_param(module, "source", "derived", module.source * 2)
    alias_or_bind_derived_param(module, "source", "derived", torch.ones(4))
    assert module.derived.tolist() == [1.0] * 4
    assert module.source.is_meta


def test_a_value_without_bytes_is_refused():
    module = with_source(torch.ones(4))
    nothing = torch.empty(4, device="meta")
    with pytest.raises(ValueError, match="has no bytes. Nothing was written"):
        copy_or_rebind_param(module, "source", nothing)
    with pytest.raises(ValueError, match="has no bytes. Nothing was written"):
        alias_or_bind_derived_param(module, "source", "derived", nothing)
    assert [*module._parameters] == ["source"]


@pytest.mark.gpu
def test_a_value_of_another_device_is_copied_there():
    module = with_source(torch.ones(4, device="cuda"))
    where = module.source.data_ptr()
    copy_or_rebind_param(module, "source", torch.zeros(4))
    alias_or_bind_derived_param(module, "source", "derived", torch.full((4,), 2.0))
    assert module.derived is module.source
    assert (module.source.data_ptr(), module.source.tolist()) == (where, [2.0] * 4)
