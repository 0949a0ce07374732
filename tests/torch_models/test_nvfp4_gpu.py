"""NVFP4 kernels on the device itself, against the reference there. Run by make test-gpu."""

import numpy as np
import pytest
import torch

from torch_models.kernels import nvfp4_blackwell, nvfp4_reference, nvfp4_triton

pytestmark = pytest.mark.gpu

SHAPES = [(1, 4096, 4096), (1, 200, 1040), (3, 40, 48), (8, 1024, 4096), (16, 1, 16), (17, 200, 1040)]
SHAPES += [(70, 12288, 4096), (300, 4096, 12288)]


def random_weight(*shape, seed=0):
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)
    scale = rng.integers(0, 127, (*shape[:-1], shape[-1] // 16), np.uint8)
    return torch.from_numpy(packed).cuda(), torch.from_numpy(scale).view(torch.float8_e4m3fn).cuda()


def random_rows(*shape, dtype=torch.bfloat16, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32)).cuda().to(dtype)


def exact(x, packed, scale, alpha):
    """The product in float64; alpha [] or one of every row of the weight."""
    weight = nvfp4_reference.dequantized(packed, scale, torch.float32).double()
    return (x.double()[..., None, :] @ weight.mT)[..., 0, :] * alpha.double()


def assert_near(found, expected, *, depth=0):
    """Of float32 sums, whose errors grow as the root of K, to 2^-24 * 110 at K = 12288.

    ``depth``: K, where tensor cores add up. Those of Hopper cut off what they cannot hold, always towards zero: such
    errors grow as K itself (measured on an H200: 1.3e-5 at 12288).
    """
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= (2e-6 + 2e-9 * depth) * expected.norm()


def captured(program):
    """A CUDA graph of it, and what it writes."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        program()  # compiles, which a capture cannot
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = program()
    return graph, out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_the_references_and_repeats(shape, dtype):
    rows, num_rows, depth = shape
    packed, scale = random_weight(num_rows, depth)
    x = random_rows(rows, depth, dtype=dtype)
    for alpha in (torch.tensor(0.3, device="cuda"), torch.linspace(0.1, 0.9, num_rows, device="cuda")):
        found = nvfp4_triton.matmul(x, packed, scale, alpha)
        assert_near(found, exact(x, packed, scale, alpha), depth=depth if dtype == torch.bfloat16 and rows > 1 else 0)
        assert_near(nvfp4_reference.matmul(x, packed, scale, alpha), exact(x, packed, scale, alpha))
        assert torch.equal(found, nvfp4_triton.matmul(x, packed, scale, alpha))


def test_every_pair_of_codes_with_every_scale_is_exact():
    packed = torch.arange(256, dtype=torch.uint8, device="cuda")[:, None].expand(256, 8).repeat(127, 1)
    scale = torch.arange(127, dtype=torch.uint8, device="cuda").repeat_interleave(256)[:, None]
    scale, one = scale.view(torch.float8_e4m3fn), torch.tensor(1.0, device="cuda")
    for rows in (1, 16):
        x = torch.eye(16, device="cuda", dtype=torch.bfloat16)
        found = torch.cat([nvfp4_triton.matmul(part, packed, scale, one) for part in x.split(rows)])
        assert torch.equal(found, nvfp4_reference.dequantized(packed, scale, torch.float32).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 8, 64, 65, 256, 2000])
def test_experts_are_the_references(rows, dtype):
    packed, scale = random_weight(128, 96, 256)
    experts = torch.from_numpy(np.random.default_rng(2).choice(np.arange(0, 128, 3), rows)).cuda()
    x, alpha = random_rows(rows, 256, dtype=dtype), torch.rand(128, 2, device="cuda")
    found = nvfp4_triton.expert_matmul(x, packed, scale, alpha, experts)
    assert_near(found, nvfp4_reference.expert_matmul(x, packed, scale, alpha, experts))


@pytest.mark.parametrize("kernels", [nvfp4_reference, nvfp4_triton])
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_a_graph_replays_with_weights_rows_and_experts_that_were_overwritten(rows, kernels):
    packed, scale = random_weight(16, 96, 256)
    x, alpha = random_rows(rows, 256), torch.rand(16, 2, device="cuda")
    experts = torch.arange(rows, device="cuda") % 16

    def program():
        of_one = kernels.matmul(x, packed[3], scale[3], alpha[3, 0])
        return of_one, kernels.expert_matmul(x, packed, scale, alpha, experts, ask_host=False)

    graph, replayed = captured(program)
    for seed in (5, 6):
        for old, new in zip((packed, scale), random_weight(16, 96, 256, seed=seed), strict=True):
            old.copy_(new)
        x.copy_(random_rows(rows, 256, seed=seed))
        experts.copy_(torch.from_numpy(np.random.default_rng(seed).integers(0, 16, rows)).cuda())
        alpha.mul_(1.5)
        graph.replay()
        for found, eager in zip(replayed, program(), strict=True):
            assert torch.equal(found, eager)


@pytest.mark.parametrize("shape", [(1, 4096, 4096), (8, 1024, 4096), (300, 4096, 1024), (3, 40, 48)])
def test_the_devices_own_fp4_product_is_the_references(shape):
    if not nvfp4_blackwell.is_available(torch.device("cuda")):
        pytest.skip("the device does not multiply FP4")
    rows, num_rows, depth = shape
    packed, scale = random_weight(num_rows, depth)
    x, alpha, input_scale = random_rows(rows, depth), torch.rand(num_rows, device="cuda"), torch.tensor(0.01).cuda()
    codes, x_scale = nvfp4_reference.activation_codes(x, input_scale)
    swizzled = nvfp4_blackwell.swizzled(x_scale), nvfp4_blackwell.swizzled(scale)

    def program():
        return nvfp4_blackwell.matmul(nvfp4_reference.packed_codes(codes), swizzled[0], packed, swizzled[1], alpha)

    values = nvfp4_reference.quantized_activations(x.float(), input_scale)
    assert_near(program(), nvfp4_reference.matmul(values, packed, scale, alpha))
    graph, found = captured(program)
    graph.replay()
    assert torch.equal(found, program())
