"""NVFP4 in plain torch, against float64 NumPy and against what makes such checkpoints."""

import importlib
import warnings

import numpy as np
import pytest
import torch

from tests.shape_suffixes import checked_shape_suffixes
from torch_models.kernels import nvfp4_reference as nvfp4
from torch_models.recording import Recording

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def random_weight(*shape, seed=0):
    """Any code, and any scale but NaN; ``shape`` ends in N, K."""
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)
    scale = rng.integers(0, 127, (*shape[:-1], shape[-1] // 16), np.uint8)
    return torch.from_numpy(packed), torch.from_numpy(scale).view(torch.float8_e4m3fn)


def expected_weight(packed, scale):
    """float64, written another way: by a table, and one nibble at a time."""
    packed, scale = packed.numpy(), scale.double().numpy()
    weight = np.empty((*packed.shape[:-1], packed.shape[-1] * 2))
    weight[..., 0::2], weight[..., 1::2] = E2M1[packed % 16], E2M1[packed // 16]
    return weight * np.repeat(scale, 16, axis=-1)


def assert_sums_agree(found, x, weight, alpha):
    """Any order of float32 sums of K products errs by at most K roundings of the sum of magnitudes."""
    x = x.double().numpy()
    limit = (x.shape[1] + 2) * 2.0**-24 * (abs(x) @ abs(weight.T)) * alpha
    assert found.dtype == torch.float32
    assert (abs(found.double().numpy() - x @ weight.T * alpha) <= limit).all()


def modelopt_codes(x, input_scale):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("modelopt.torch.quantization.qtensor.nvfp4_tensor")
        quantized, scale, _ = module.NVFP4QTensor.quantize(x.clone(), 16, None, input_scale)
    return quantized._quantized_data, scale


def test_low_bits_are_the_even_element_and_a_scale_has_16_of_them():
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2], dtype=torch.uint8)
    scale = torch.tensor([[1.0, 2.0**-9]]).to(torch.float8_e4m3fn)
    ones = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert nvfp4.dequantized(packed, scale, torch.bfloat16).tolist() == [ones + [one * 2.0**-9 for one in ones]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 16), (40, 1024), (3, 5, 48), (2, 3, 4, 32)])
def test_a_weight_is_exact(shape, dtype):
    packed, scale = random_weight(*shape)
    weight = nvfp4.dequantized(packed, scale, dtype)
    assert weight.dtype == dtype
    np.testing.assert_array_equal(weight.double().numpy(), expected_weight(packed, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("piece", [1, 100, 1 << 24])
def test_a_product_is_float32_however_it_is_cut(piece, per_row, dtype, monkeypatch):
    monkeypatch.setattr(nvfp4, "PIECE", piece)
    packed, scale = random_weight(40, 48)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    alpha = torch.linspace(0.1, 0.9, 40) if per_row else torch.tensor(0.3)
    with checked_shape_suffixes("torch_models") as seen:
        found = nvfp4.matmul(x, packed, scale, alpha)
    assert_sums_agree(found, x, expected_weight(packed, scale), alpha.double().numpy())
    assert "torch_models.kernels.nvfp4_reference.matmul" in seen


@pytest.mark.parametrize("runs", [1, 2, 8])
@pytest.mark.parametrize("ask_host", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 19])
@pytest.mark.parametrize("piece", [1, 1000, 1 << 24])
def test_every_row_has_its_own_expert_and_each_run_its_alpha(rows, ask_host, runs, piece, monkeypatch):
    monkeypatch.setattr(nvfp4, "PIECE", piece)
    packed, scale = random_weight(5, 8, 32)
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.standard_normal((rows, 32), np.float32)).bfloat16()
    experts = torch.from_numpy(rng.choice([0, 1, 4], rows))  # two of five have no rows
    alpha = torch.from_numpy(rng.random((5, runs), np.float32))
    with checked_shape_suffixes("torch_models"):
        found = nvfp4.expert_matmul(x, packed, scale, alpha, experts, ask_host=ask_host)
    weight = expected_weight(packed, scale)
    for row, expert in enumerate(experts.tolist()):
        of_rows = np.repeat(alpha[expert].double().numpy(), 8 // runs)
        assert_sums_agree(found[row : row + 1], x[row : row + 1], weight[expert], of_rows)


def test_what_can_be_captured_gives_another_answer_for_other_weights():
    packed, scale = random_weight(5, 8, 32)
    x, alpha, experts = torch.ones(9, 32), torch.rand(5, 2), torch.arange(9) % 5

    def both():
        y = nvfp4.quantized_activations(x, alpha[0, 0])
        return nvfp4.matmul(y, packed[0], scale[0], alpha[0, 0]), nvfp4.expert_matmul(
            y, packed, scale, alpha, experts, ask_host=False
        )

    found = []
    recording = Recording(lambda: found.extend(both()))
    packed.copy_(random_weight(5, 8, 32, seed=3)[0])
    x.mul_(torch.linspace(-1, 1, 32))
    recording.replay()
    for replayed, eager in zip(found, both(), strict=True):
        assert torch.equal(replayed, eager)


# every threshold, and a hair to either side of it; all are over 1 with input_scale = 2^-4 and a block's amax 6 * 28
THRESHOLDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def hard_activations():
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(4)) * 3
    x[0] = 0
    x[1, :16] = -0.0
    x[2, :32] *= 1e-30  # scales at the floor, quotients that underflow
    x[3] *= 1e30  # scales at the ceiling
    x[4, 5] = torch.inf
    x[5, ::16], x[6, ::16] = 6 * 28, -6 * 28
    for row, hair in ((5, 1.0), (6, 1 + 2.0**-22), (7, 1 - 2.0**-22)):
        x[row, ::16] = 6 * 28
        x[row, 1:8], x[row, 8:15] = THRESHOLDS * 28 * hair, -THRESHOLDS * 28 * hair
    x[8, 1:16] = -1e-42  # whose quotients are -0: no sign
    x[8, 0] = 1e30
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("input_scale", [2.0**-4, 1.0, 0.0123, 1e-4, 1e-38, 3e38])
def test_activations_have_modelopts_codes_and_scales(input_scale, dtype):
    x, input_scale = hard_activations().to(dtype), torch.tensor(input_scale)
    packed, scale = modelopt_codes(x, input_scale)
    codes, ours = nvfp4.activation_codes(x, input_scale)
    assert torch.equal(ours.view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(nvfp4.packed_codes(codes), packed)
    values = nvfp4.quantized_activations(x, input_scale)
    assert values.dtype == dtype
    np.testing.assert_array_equal(values.double().numpy(), expected_weight(packed, scale))


def test_ties_go_to_the_even_code_on_both_sides():
    x = torch.zeros(1, 16)
    x[0, 0], x[0, 1:8], x[0, 8:15] = 6, THRESHOLDS, -THRESHOLDS
    codes, scale = nvfp4.activation_codes(x, torch.tensor(1.0))
    assert scale.tolist() == [[1.0]]
    assert codes.tolist() == [[7, 0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14, 0]]
