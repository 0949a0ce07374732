"""The product of FP4 by FP4: the order of its scales, and what torch's scaled matmul is given."""

import numpy as np
import pytest
import torch

from tests.shape_suffixes import checked_shape_suffixes
from torch_models.kernels import nvfp4_blackwell as blackwell
from torch_models.kernels import nvfp4_reference as reference


def random_scale(*shape):
    return torch.from_numpy(np.random.default_rng(0).integers(1, 127, shape, np.uint8)).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("stack", [(), (3,), (2, 3)])
@pytest.mark.parametrize("shape", [(128, 4), (1, 1), (32, 3), (129, 4), (300, 9), (256, 64)])
def test_every_scale_is_at_its_place_and_comes_back(shape, stack):
    scale = random_scale(*stack, *shape)
    rows, columns = -(-shape[0] // 128) * 128, -(-shape[1] // 4) * 4
    expected = np.zeros((*stack, rows * columns), np.uint8)
    for m in range(shape[0]):
        for q in range(shape[1]):
            place = (m // 128) * (columns // 4) * 512 + (q // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + q % 4
            expected[..., place] = scale.view(torch.uint8).numpy()[..., m, q]
    swizzled = blackwell.swizzled(scale)
    assert swizzled.shape == (*stack, rows, columns)
    assert swizzled.dtype == scale.dtype
    assert swizzled.is_contiguous()
    np.testing.assert_array_equal(swizzled.view(torch.uint8).numpy().reshape(*stack, -1), expected)
    back = blackwell.unswizzled(swizzled, tuple(scale.shape))
    assert torch.equal(back.view(torch.uint8), scale.view(torch.uint8))


def test_swizzling_twice_is_not_the_way_back():
    scale = random_scale(256, 8)
    twice = blackwell.swizzled(blackwell.swizzled(scale))
    assert not torch.equal(twice.view(torch.uint8), scale.view(torch.uint8))


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [("cpu", (10, 0), False), ("cuda", (9, 0), False), ("cuda", (10, 0), True), ("cuda", (12, 0), True)],
)
def test_only_capability_10_and_later_multiply_fp4(device, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert blackwell.is_available(torch.device(device)) is expected


@pytest.fixture(params=["scaled_mm", "_scaled_mm"])
def given(request, monkeypatch):
    """What torch was asked for, answered by the reference; of the function that this torch has, or an older one."""
    calls = []

    def answer(a, b, scale_a, scale_b, out_dtype):
        calls.append((a, b, scale_a, scale_b))
        assert a.dtype == b.dtype == torch.float4_e2m1fn_x2
        assert a.is_contiguous()
        assert b.T.is_contiguous()
        assert out_dtype == torch.float32
        values = []
        for codes, scale in ((a, scale_a), (b.T, scale_b)):
            codes = codes.view(torch.uint8)
            rows, columns = -(-len(codes) // 128) * 128, -(-codes.shape[1] // 32) * 4
            assert scale.dtype == torch.float8_e4m3fn
            assert scale.shape == (rows * columns,)
            scale = blackwell.unswizzled(scale.view(rows, columns), (len(codes), codes.shape[1] // 8))
            values.append(reference.dequantized(codes, scale, torch.float32))
        return values[0] @ values[1].T

    def new(a, b, scale_a, recipe_a, scale_b, recipe_b, *, swizzle_a, swizzle_b, output_dtype):
        assert recipe_a == recipe_b == torch.nn.functional.ScalingType.BlockWise1x16
        assert swizzle_a == swizzle_b == torch.nn.functional.SwizzleType.SWIZZLE_32_4_4
        return answer(a, b, scale_a, scale_b, output_dtype)

    if request.param == "scaled_mm":
        monkeypatch.setattr(torch.nn.functional, "scaled_mm", new)
    else:
        monkeypatch.delattr(torch.nn.functional, "scaled_mm")
        monkeypatch.setattr(torch, "_scaled_mm", answer)
    return calls


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("shape", [(3, 32, 64), (1, 40, 48), (130, 129, 16)])
def test_torch_is_given_whole_tiles_and_the_result_is_cut(shape, per_row, given):
    num_tokens, num_rows, depth = shape
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((num_tokens, depth), np.float32))
    packed = torch.from_numpy(rng.integers(0, 256, (num_rows, depth // 2), np.uint8))
    scale, input_scale = random_scale(num_rows, depth // 16), torch.tensor(0.25)
    alpha = torch.linspace(0.1, 0.9, num_rows) if per_row else torch.tensor(0.5)
    codes, x_scale = reference.activation_codes(x, input_scale)
    swizzled = blackwell.swizzled(x_scale), blackwell.swizzled(scale)
    with checked_shape_suffixes("torch_models"):
        found = blackwell.matmul(reference.packed_codes(codes), swizzled[0], packed, swizzled[1], alpha)
    expected = reference.matmul(reference.quantized_activations(x, input_scale), packed, scale, alpha)
    torch.testing.assert_close(found, expected)
    ((a, b, *_),) = given
    assert a.shape[1] % 16 == b.shape[0] % 16 == b.shape[1] % 16 == 0
