"""NVFP4 in Triton without a GPU: interpreted, against float64, and compiled for the devices it is meant for.

Both run in a process of their own: whether Triton interprets is settled once, when it is imported.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from torch_models.kernels import nvfp4_triton

# U, N, K: one row and few and many, odd numbers of all, K with one block, with less than a tile, and with several
SHAPES = [
    *[(1, 1, 16), (1, 40, 48), (1, 128, 64), (1, 128, 1040), (1, 200, 256), (1, 1, 2064)],
    *[(3, 1, 16), (3, 40, 48), (3, 200, 1040), (8, 128, 64), (8, 40, 1040), (8, 1, 4112)],
    *[(17, 40, 48), (17, 128, 256), (17, 200, 64), (70, 1, 16), (70, 200, 48), (130, 40, 144)],
]
# E, A, N, K, S: as vectors, as tiles, with one expert, with more rows than a tile, with an alpha for every row
EXPERTS = [(8, 3, 40, 48, 2), (8, 9, 40, 64, 1), (8, 100, 48, 64, 2), (5, 40, 200, 64, 200), (1, 3, 8, 16, 1)]
EXPERTS += [(4, 300, 24, 1040, 2), (6, 1, 8, 16, 8)]

INTERPRETED = """
import json, sys
import numpy as np, torch
import triton.language as tl
from triton.runtime import interpreter
from torch_models.kernels import nvfp4_triton

# NumPy has no bfloat16: the interpreter holds its bits as integers, and multiplies those
builder = interpreter.InterpreterBuilder
multiply, dot = builder.create_fmul, builder.create_dot

def widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

def create_fmul(self, a, b):
    product = multiply(self, widened(a), widened(b))
    return self.cast_impl(product, tl.bfloat16) if a.dtype.scalar == tl.bfloat16 else product

builder.create_fmul = create_fmul
builder.create_dot = lambda self, a, b, *others: dot(self, widened(a), widened(b), *others)

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
rng = np.random.default_rng(0)

def random_weight(*shape):
    packed = torch.from_numpy(rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8))
    scale = rng.integers(0, 127, (*shape[:-1], shape[-1] // 16), np.uint8)
    scale = torch.from_numpy(scale).view(torch.float8_e4m3fn)
    codes = np.stack((packed.numpy() % 16, packed.numpy() // 16), -1).reshape(shape)
    return packed, scale, E2M1[codes] * np.repeat(scale.double().numpy(), 16, axis=-1)

def excess(found, x, weight_AN, alpha):
    # of the error over what any order of float32 sums allows: K + 2 roundings of the sum of magnitudes
    x = x.double().numpy()[:, None]
    limit = (x.shape[-1] + 2) * 2.0**-24 * (abs(x) * abs(weight_AN)).sum(-1) * alpha
    return float((abs(found.double().numpy() - (x * weight_AN).sum(-1) * alpha) / limit).max())

shapes, experts_of = json.loads(sys.argv[1])
found = {}
for dtype in (torch.bfloat16, torch.float32):
    for i, (u, n, k) in enumerate(shapes):
        packed, scale, weight = random_weight(n, k)
        x = torch.from_numpy(rng.standard_normal((u, k), np.float32)).to(dtype)
        alpha = torch.from_numpy(rng.random(n, np.float32) + 0.1) if i % 2 else torch.tensor(0.3)
        y = nvfp4_triton.matmul(x, packed, scale, alpha)
        assert y.shape == (u, n) and y.dtype == torch.float32
        found[f"{dtype} {(u, n, k)}"] = excess(y, x, weight[None], alpha.double().numpy())
    for e, a, n, k, s in experts_of:
        packed, scale, weight = random_weight(e, n, k)
        x = torch.from_numpy(rng.standard_normal((a, k), np.float32)).to(dtype)
        alpha = torch.from_numpy(rng.random((e, s), np.float32) + 0.1)
        experts = torch.from_numpy(rng.choice([i for i in range(e) if i == 0 or i % 3], a))  # every third has none
        y = nvfp4_triton.expert_matmul(x, packed, scale, alpha, experts, ask_host=False)
        assert y.shape == (a, n) and y.dtype == torch.float32
        of_rows = np.repeat(alpha[experts].double().numpy(), n // s, axis=1)
        found[f"{dtype} experts {(e, a, n, k, s)}"] = excess(y, x, weight[experts.numpy()], of_rows)
packed, scale, _ = random_weight(4, 16)
scale.view(torch.uint8)[1] = 127
for u in (1, 2):
    nan = nvfp4_triton.matmul(torch.ones(u, 16), packed, scale, torch.tensor(1.0)).isnan().any(0).tolist()
    assert nan == [False, True, False, False], nan
print(json.dumps(found))
"""

COMPILED = """
import json, os, re, subprocess, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from torch_models.kernels import nvfp4_triton

def compiled(kernel, types, constants, arch, **options):
    names = kernel.arg_names
    types = {name: types.get(name, "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name in ("N", "K")]
    source = ASTSource(
        kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},  # as a launch finds them at these shapes
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

COMMON = dict(x_ptr="*bf16", scale_ptr="*u8", alpha_ptr="*fp32", N="i32", K="i32", runs="i32")
VECTOR = dict(COMMON, words_ptr="*i32", experts_ptr="*i64", out_ptr="*fp32")
TILE = dict(COMMON, packed_ptr="*u8", ends_ptr="*i64", order_ptr="*i64", parts_ptr="*fp32", A="i32", num_experts="i32")
SUM = dict(parts_ptr="*fp32", alpha_ptr="*fp32", out_ptr="*fp32", A="i32", N="i32", runs="i32")
tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
arch, found = int(sys.argv[1]), {}

def note(name, kernel):
    path = os.path.join(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
    with open(path, "wb") as file:
        file.write(kernel.asm["cubin"])
    stack = 0
    if os.path.exists(tools):
        usage = subprocess.run([tools, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        stack = int(re.search("STACK:([0-9]+)", usage)[1])
    found[name] = [len(kernel.asm["cubin"]), f"sm_{arch}" in kernel.asm["ptx"], stack, "ftz" in kernel.asm["ptx"]]

for has_experts in (False, True):
    constants = dict(HAS_EXPERTS=has_experts, COLUMNS=8, BLOCKS=128)
    note(f"vector {has_experts}", compiled(nvfp4_triton._vector_kernel, VECTOR, constants, arch, num_warps=4))
for rows, num_rows, depth, dtype in json.loads(sys.argv[2]):
    x = torch.empty(rows, depth, dtype=getattr(torch, dtype), device="meta")
    tiling = nvfp4_triton._tiling(x, num_rows, rows=rows, may_split=True)
    sizes = dict(ROWS=tiling.rows, COLUMNS=tiling.columns, DEPTH=tiling.depth, SPLITS=tiling.splits)
    types = dict(TILE, x_ptr="*bf16" if dtype == "bfloat16" else "*fp32")
    for grouped in {False, rows == 16}:
        constants = dict(sizes, GROUPED=grouped, EXPERTS=128 if grouped else 1)
        options = dict(num_warps=tiling.num_warps, num_stages=tiling.num_stages)
        kernel = compiled(nvfp4_triton._tile_kernel, types, constants, arch, **options)
        note(f"tile {rows} {num_rows} {depth} {dtype} {grouped}", kernel)
note("sum", compiled(nvfp4_triton._sum_kernel, SUM, dict(SPLITS=4, COLUMNS=256), arch, num_warps=4))
print(json.dumps(found))
"""
# rows, N and K of Qwen3-8B: k and v, q and o, gate and up, down
QWEN3_8B = [(8, 1024, 4096, "bfloat16"), (16, 4096, 4096, "bfloat16"), (32, 4096, 4096, "bfloat16")]
QWEN3_8B += [(64, 12288, 4096, "bfloat16"), (2048, 4096, 12288, "bfloat16"), (8, 4096, 4096, "float32")]


def run(script, *arguments, **environment):
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.slow
def test_interpreted_kernels_err_by_no_more_than_the_order_of_float32_sums():
    found = run(INTERPRETED, json.dumps([SHAPES, EXPERTS]), TRITON_INTERPRET="1")
    assert len(found) == 2 * (len(SHAPES) + len(EXPERTS))
    assert {name: error for name, error in found.items() if not error <= 1} == {}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_kernels_compile_for_a_device_and_keep_to_its_registers(arch, tmp_path):
    found = run(COMPILED, str(arch), json.dumps(QWEN3_8B), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert len(found) == 2 + len(QWEN3_8B) + 1 + 1
    for name, (num_bytes, is_for_it, stack_bytes, flushes_subnormals) in found.items():
        assert num_bytes > 0, name
        assert is_for_it, name
        assert stack_bytes <= 32, name  # 8 to 32 where tiles are grouped, before their loop; otherwise none
        assert not flushes_subnormals, name  # e2m1's codes 1 and 9 pass through subnormals


@pytest.mark.parametrize(
    ("device", "capability", "expected"), [("cpu", (9, 0), False), ("cuda", (7, 5), False), ("cuda", (8, 0), True)]
)
def test_kernels_run_on_cuda_devices_with_bfloat16_tensor_cores(device, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert nvfp4_triton.is_available(torch.device(device)) is expected


def test_without_triton_the_module_imports_and_there_are_no_kernels():
    script = "import json, sys, torch\nsys.modules['triton'] = None\nfrom torch_models.kernels import nvfp4_triton\n"
    script += "torch.cuda.get_device_capability = lambda device: (9, 0)\n"
    assert run(script + "print(json.dumps(nvfp4_triton.is_available(torch.device('cuda'))))") is False
