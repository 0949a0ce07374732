"""Checkpoints of ModelOpt and compressed-tensors on both backends: every bit of the weights, and what they compute."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from exporter_libs import modelopt
from nvfp4_cases import KINDS, WRITERS, Exports

from loaders import nvfp4, open_checkpoint
from loaders.digest import digests
from loaders.reading.plan import plan_load
from loaders.stage import Stage
from parity.backends import NAMES, open_backend
from parity.compare import compare
from parity.comparison.text import render
from parity.oracle import oracle_forward
from parity.record import record
from parity.record_oracle import record_oracle
from parity.zoo import prompts

CASES = [("qwen3", writer) for writer in WRITERS]
CASES += [("qwen3_5_moe", writer) for writer in WRITERS[::2]]
SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "qwen3"]
# between the two: experts without linear attention, and the reverse
SLOW = [
    pytest.param(kind, writer, marks=pytest.mark.slow) for kind in ("qwen3_moe", "qwen3_5") for writer in WRITERS[::2]
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return Exports(tmp_path_factory.mktemp("nvfp4"))


def error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def module_at(model, backend, path):
    """The quantised layer at ``path``."""
    if backend == "torch":
        return model.get_submodule(path)
    from flax import nnx

    found = nnx.merge(model.programs.graphdef, model.weights)
    for name in path.split("."):
        found = found[name] if isinstance(found, nnx.Dict) else getattr(found, name)
    return found


def to_numpy(array):
    return array.detach().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def in_backend(backend, array):
    if backend == "torch":
        bf16 = array.dtype == ml_dtypes.bfloat16
        return torch.from_numpy(array.view(np.int16) if bf16 else array).view(torch.bfloat16 if bf16 else torch.float32)
    import jax.numpy as jnp

    return jnp.asarray(array)


@pytest.mark.parametrize(("kind", "writer"), [*CASES, *SLOW])
def test_weights_only_both_backends_compute_what_the_codes_say(kind, writer, exports):
    """Float32 within 2e-5 of the oracle on the same codes, by the norm of every tensor; bfloat16 by the ruler."""
    path = exports(kind, writer)
    checkpoint = open_checkpoint(path)
    inputs = prompts(checkpoint.config, rows=3, tokens=24, padding="left")
    oracle = oracle_forward(checkpoint, **inputs)
    is_real = inputs["attention_mask"].astype(bool)
    assert oracle["logits"][is_real].std() > 2  # the model is sensitive
    for name in NAMES:
        trace = record(path, open_backend(name), inputs, dtype="float32", weight_only=True)
        for tensor in ("hidden_states.1", "hidden_states.2", "logits"):
            assert error(trace.tensors[tensor][is_real], oracle[tensor][is_real]) <= 2e-5, (name, tensor)


@pytest.mark.parametrize("kind", ["qwen3", *SLOW_KINDS])
def test_weights_only_in_bfloat16_both_backends_pass_the_ruler(kind, exports):
    path = exports(kind, "modelopt w4a4")
    checkpoint = open_checkpoint(path)
    inputs = prompts(checkpoint.config, rows=2, tokens=24, padding="right")
    jax, torch_ = (record(path, open_backend(name), inputs, dtype="bfloat16", weight_only=True) for name in NAMES)
    found = compare(jax, torch_, oracle=record_oracle(checkpoint, inputs, like=jax))
    assert found.verdict == "PASS", render(found)


@pytest.mark.parametrize("writer", WRITERS[::2])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_5_moe"])
def test_codes_scales_and_dequantised_weights_are_the_same_bits_on_disk_in_jax_and_in_torch(kind, writer, exports):
    checkpoint = open_checkpoint(exports(kind, writer))
    on_disk = digests(checkpoint.stream(names=plan_load(checkpoint, Stage()).tensors))
    for backend in NAMES:
        model = open_backend(backend).load(exports(kind, writer))
        assert model.digests() == on_disk
        for path, scheme in checkpoint.config.quantization.schemes:
            layer = module_at(model, backend, path)
            if not path.endswith(".experts"):
                expected = dequantised(checkpoint, spelled(checkpoint, path), scheme)
                assert expected.tobytes() == to_numpy(layer.dequantized()).tobytes(), path
                continue
            for stack, projections in (("w13", ("gate_proj", "up_proj")), ("w2", ("down_proj",))):
                found = to_numpy(layer.dequantized(stack))
                found = found.reshape(len(found), len(projections), -1)
                for expert in range(len(found)):
                    for half, projection in enumerate(projections):
                        prefix = f"{spelled(checkpoint, path)}.{expert}.{projection}"
                        expected = dequantised(checkpoint, prefix, scheme)
                        assert expected.tobytes() == found[expert, half].tobytes(), prefix


def dequantised(checkpoint, module, scheme):
    """By the codec, which is checked against the exporters."""
    parts = {role: checkpoint.read(f"{module}.{leaf}") for role, leaf in scheme.leaves.items()}
    return nvfp4.dequantize(parts["codes"], parts["block"], parts["global"].reshape(()), divide=scheme.divides)


def spelled(checkpoint, path):
    """The checkpoint's own name of a module."""
    ours = checkpoint.config.text_paths[0]
    theirs = next(text for text in checkpoint.config.text_paths if f"{text}.embed_tokens.weight" in checkpoint.tensors)
    return theirs + path.removeprefix(ours) if path.startswith(f"{ours}.") else path


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("backend", NAMES)
def test_activation_codes_are_those_of_modelopt(backend, dtype):
    """Compiled as a model is: a compiler may turn divisions into products, and 1.2 % of the codes would be others."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 80)) * np.exp(rng.standard_normal((64, 1)) * 3)
    x[0], x[1, ::2], x[2, 3] = 0, -0.0, 3e4
    x = x.astype(dtype)
    for scale in np.float32([0.0021, 1 / 448 / 6, 0.37, 3e-5, 1 / 5616.1895, 0.0137]):
        packed, block, _ = modelopt(x, scale=np.asarray(scale))
        codes, found = codes_of(backend, x, scale)
        assert block.tobytes() == found.tobytes()
        assert packed.tobytes() == nvfp4.pack(codes).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("backend", NAMES)
def test_activation_codes_are_modelopts_where_quotients_are_denormal_zero_or_nan(backend, dtype):
    """XLA makes 0 of a denormal quotient, and its sign is lost; of an input scale of 0 come infinities and NaN."""
    rng = np.random.default_rng(0)
    x = rng.choice([-1.0, 1.0], (64, 80)) * rng.uniform(1.2e-38, 3e-37, (64, 80))
    x[0], x[1, ::2], x[2, 3], x[3] = 0, -0.0, 3e4, rng.standard_normal(80)
    x = x.astype(dtype)
    for scale in np.float32([0.0021, 1.0, 3.3, 1e5, 1e10, 0.0]):
        packed, block, _ = modelopt(x, scale=np.asarray(scale))
        codes, found = codes_of(backend, x, scale)
        assert block.tobytes() == found.tobytes()
        assert packed.tobytes() == nvfp4.pack(codes).tobytes()


def codes_of(backend, x, scale):
    if backend == "torch":
        from torch_models.kernels.nvfp4_reference import activation_codes

        codes, block = activation_codes(in_backend("torch", x), torch.tensor(scale))
        return codes.numpy(), block.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    import jax

    from jax_models.kernels.activations import activation_codes

    return tuple(map(np.asarray, jax.jit(activation_codes)(in_backend("jax", x), scale)))


@pytest.mark.parametrize("writer", ["modelopt w4a4", "compressed-tensors w4a4"])
@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.slow_unless("torch-*", "jax-modelopt w4a4")
def test_with_quantised_inputs_every_layer_computes_the_product_of_codes(backend, writer, exports):
    """One linear layer at a time, as whole networks are chaotic: a code that flips moves everything behind it."""
    checkpoint = open_checkpoint(exports("qwen3", writer))
    for dtype, limit in (("float32", 4 * 2**-24), ("bfloat16", 2 * 2**-9)):
        model = open_backend(backend).load(exports("qwen3", writer), dtype=dtype)
        assert model.quantizes_inputs
        for path, scheme in checkpoint.config.quantization.schemes:
            layer = module_at(model, backend, path)
            weight = dequantised(checkpoint, path, scheme)
            input_scale = checkpoint.read(f"{path}.{scheme.leaves['input']}")
            input_scale = 1 / input_scale if scheme.divides else input_scale
            x = np.random.default_rng(len(path)).standard_normal((7, weight.shape[1])).astype(np.float32)
            x = x.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else x
            codes, block = nvfp4.quantize_activations(x, input_scale.reshape(()))
            rounded = nvfp4.decode(codes).reshape(*block.shape, 16) * block.astype(np.float64)[..., None]
            rounded = rounded.reshape(x.shape) * float(input_scale.reshape(()))
            expected = rounded @ weight.astype(np.float64).T
            y = layer(in_backend(backend, x))
            found = to_numpy(y.float() if backend == "torch" else y.astype("float32"))
            assert error(found, expected) <= limit, path
            plain = x.astype(np.float64) @ weight.astype(np.float64).T
            assert error(found, plain) > 0.02, f"{path}: suspiciously good, its inputs were not quantised"


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_5_moe"])
@pytest.mark.slow_unless("qwen3")
def test_with_quantised_inputs_both_backends_agree_until_a_code_flips(kind, exports):
    """Not gated on in general; in float32 on one machine the first layers see the same codes."""
    path = exports(kind, "modelopt w4a4")
    inputs = prompts(open_checkpoint(path).config, rows=2, tokens=12, padding=None)
    jax, torch_ = (record(path, open_backend(name), inputs, dtype="float32") for name in NAMES)
    assert error(jax.tensors["hidden_states.1"], torch_.tensors["hidden_states.1"]) < 2e-2
    weights_only = record(path, open_backend("torch"), inputs, dtype="float32", weight_only=True)
    assert error(torch_.tensors["logits"], weights_only.tensors["logits"]) > 2e-2


def test_activation_quantization_is_what_was_asked_for(exports):
    for backend in map(open_backend, NAMES):
        load = backend.module.load
        assert load(exports("qwen3", "modelopt w4a4")).quantizes_inputs
        assert load(exports("qwen3", "modelopt w4a4"), activation_quantization=True).quantizes_inputs
        assert not load(exports("qwen3", "modelopt w4a4"), activation_quantization=False).quantizes_inputs
        assert not load(exports("qwen3", "modelopt w4a16")).quantizes_inputs
        with pytest.raises(ValueError, match="the checkpoint has no scales for inputs"):
            load(exports("qwen3", "modelopt w4a16"), activation_quantization=True)


def test_the_kernel_that_runs_is_reported_for_every_quantised_module(exports):
    path = exports("qwen3_5_moe", "modelopt w4a16")
    quantized = open_checkpoint(path).config.quantization.table
    for backend in map(open_backend, NAMES):
        assert backend.load(path).kernels == dict.fromkeys(quantized, "reference")
        assert backend.load(exports.plain("qwen3_5_moe")).kernels == {}


def test_a_kernel_that_the_device_cannot_run_is_refused(exports):
    import torch_models

    for name, reason in (("triton", "needs a CUDA device"), ("blackwell", "capability 10.0"), ("fast", "unknown")):
        with pytest.raises(ValueError, match=reason):
            torch_models.load(exports("qwen3", "modelopt w4a4"), kernel=name)
    with pytest.raises(ValueError, match="without NVFP4 layers"):
        torch_models.load(exports.plain("qwen3"), kernel="reference")
