"""Detectors of quantised weights: their bits, and every layer by itself; the models that show bugs there.

The norms of q and k cancel any factor on what they norm, so logits say nothing of a global scale there: layers are
held one by one against the checkpoint's own numbers, widened by the oracle. What quantised inputs should be comes from
the codec, in the clean code.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np

from loaders import open_checkpoint
from loaders.checkpoint import Checkpoint
from loaders.nvfp4 import decode, dequantize, quantize_activations
from loaders.quantization.schemes import Scheme
from parity.mutants import _hasty_compiler
from parity.mutants.bench import Bench, Subject, differences
from parity.oracles.quantized import widened
from parity.zoo import ZooQuantization, block_sizes

LAYER = 2e-6  # of float32: about 30 roundings; the least of the bugs is a thousand times that
UNROUNDED = {"nvfp4": 0.02, "fp8": 0.004}  # rounding inputs costs more than this, so less is suspiciously good
PROJECTIONS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
SWIZZLING: dict[str, Any] = {"kernel": "reference-128x4"}


def quantised(model: str, *, aligned: bool = False, **how: Any) -> Subject:
    """A zoo model of two layers in which every matrix has a global scale of its own, unless ``how`` says else."""
    given: dict[str, Any] = {"unify": False} | how
    quantization = ZooQuantization(**given)
    sizes = block_sizes(model, aligned=aligned)
    return Subject(model, (("num_hidden_layers", 2), *sizes.items(), ("quantization", quantization)))


W4A4 = quantised("qwen3")
ALIGNED = quantised("qwen3", aligned=True)
EXPERTS = quantised("qwen3-moe")
DIVIDING = quantised("qwen3", spelling="compressed-tensors")
DIVIDING_EXPERTS = quantised("qwen3-moe", spelling="compressed-tensors")
MIXED = quantised("qwen3", fp8=("*.o_proj", "*.down_proj"))
CACHED = quantised("qwen3", kv_cache=True, exclude=("*.self_attn.*",))


def load_quantised(
    bench: Bench, subject: Subject, backend: str, dtype: str = "float32", *, inputs: bool = False, **options: Any
) -> Any:
    """The subject's model, its inputs quantised as the checkpoint says or not at all."""
    asked = {"activation_quantization": None if inputs else False} | options
    return import_module(f"{backend}_models").load(bench.path(subject), dtype=dtype, **asked)


def nvfp4_weights(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Codes and scales are the files', and what they expand to is what the codec makes of them, bit for bit."""
    checkpoint = open_checkpoint(bench.path(subject))
    expected = bench.once(("expanded", subject), lambda: _expanded(checkpoint))
    model = load_quantised(bench, subject, backend)
    found = differences("after load", bench.on_disk(bench.path(subject)), model.digests())
    if found:
        return found
    weights = each_layer(bench, model, backend, _dequantised, {path: np.zeros(1) for path in expected})
    wrong = [path for path, owed in expected.items() if owed != weights[path].tobytes()]
    return [f"{wrong[0]}: expands to other bits"] if wrong else []


def nvfp4_layers(bench: Bench, subject: Subject, backend: str, **options: Any) -> list[str]:
    """Every quantised layer by itself, weights only: float32 inputs times the weight that the oracle reads."""
    return _layers(bench, subject, backend, inputs=False, **options)


def nvfp4_inputs(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Likewise with quantised inputs: the product of codes by codes, and no better than that."""
    return _layers(bench, subject, backend, inputs=True)


def nvfp4_swizzled(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Weights only, with block scales in the 128x4 order: digests, and every layer's output."""
    model = load_quantised(bench, subject, backend, **SWIZZLING)
    found = differences("after load", bench.on_disk(bench.path(subject)), model.digests())
    return found or nvfp4_layers(bench, subject, backend, **SWIZZLING)


def each_layer(
    bench: Bench, model: Any, backend: str, what: Callable[..., Any], given: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """``what(layer, path, input, array module)`` of every layer named in ``given``."""
    if backend == "torch":
        import torch

        with torch.no_grad():
            found = {p: what(model.get_submodule(p), p, torch.from_numpy(np.array(x)), torch) for p, x in given.items()}
        return {path: array.numpy() for path, array in found.items()}
    import jax
    import jax.numpy as jnp
    from flax import nnx

    programs = model.programs  # and not the model: what is kept below would keep its weights

    def run(weights: Any, given: dict[str, Any]) -> dict[str, Any]:
        root = nnx.merge(programs.graphdef, weights)
        with programs.precision():
            return {path: what(_at(root, path), path, x, jnp) for path, x in given.items()}

    # kept by the programs, of which a bug in what is traced has its own
    key = ("layers", what, id(programs))
    _, compiled = bench.once(key, lambda: (programs, jax.jit(run)))
    with _hasty_compiler():
        return {path: np.asarray(array) for path, array in compiled(model.weights, given).items()}


def output(layer: Any, path: str, x: Any, xp: Any) -> Any:
    """What a layer makes of rows; of experts, each row goes to one, by turns."""
    if not path.endswith(".experts"):
        return layer(x)
    experts = (xp.arange(len(x)) % len(layer.source("w2", "codes")))[None, :, None]
    return layer(x[None], xp.ones_like(x[None, :, :1]), experts)[0]


def _dequantised(layer: Any, path: str, _: Any, xp: Any) -> Any:
    if not path.endswith(".experts"):
        return layer.dequantized()
    return xp.concatenate([layer.dequantized(stack).reshape(-1) for stack in PROJECTIONS])


def schemes_of(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Path of every quantised layer -> its scheme."""
    quantization = checkpoint.config.quantization
    assert quantization is not None, f"{checkpoint.source} is not quantised"
    return quantization.table


def experts_of(checkpoint: Checkpoint, path: str) -> int:
    """How many experts a layer has, by the files."""
    return sum(name.startswith(f"{path}.") and name.endswith(".down_proj.weight_scale") for name in checkpoint.tensors)


def rows_for(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """An input for every quantised layer, of tokens of different sizes."""
    found = {}
    for path in schemes_of(checkpoint):
        K = widened_of(checkpoint, _matrix(path)).shape[1]
        rng = np.random.default_rng(list(path.encode()))
        found[path] = (rng.standard_normal((10, K)) * np.linspace(0.2, 2, 10)[:, None]).astype(np.float32)
    return found


def _matrix(path: str, expert: int = 0, projection: str = "gate_proj") -> str:
    return f"{path}.{expert}.{projection}" if path.endswith(".experts") else path


def widened_of(checkpoint: Checkpoint, module: str) -> np.ndarray:
    """A quantised weight in float64, read by the oracle."""
    found = widened(checkpoint, module)
    assert found is not None, f"{module} is not quantised"
    return found


def _layers(bench: Bench, subject: Subject, backend: str, *, inputs: bool, **options: Any) -> list[str]:
    checkpoint = open_checkpoint(bench.path(subject))
    given = bench.once(("rows", subject), lambda: rows_for(checkpoint))
    owed = bench.once(("outputs", subject, inputs), lambda: _outputs(checkpoint, given, inputs=inputs))
    plain = bench.once(("outputs", subject, False), lambda: _outputs(checkpoint, given, inputs=False))
    model = load_quantised(bench, subject, backend, inputs=inputs, **options)
    found = each_layer(bench, model, backend, output, given)
    for path, scheme in schemes_of(checkpoint).items():
        off, off_plain = _error(found[path], owed[path]), _error(found[path], plain[path])
        if inputs and off_plain < UNROUNDED[scheme.weights]:
            return [f"{path}: suspiciously good, off by {off_plain:.1g} from what unrounded inputs give"]
        if not off <= LAYER:
            return [f"{path}: off by {off:.1g} from what its codes give, at most {LAYER} may be"]
    return []


def _outputs(checkpoint: Checkpoint, given: dict[str, np.ndarray], *, inputs: bool) -> dict[str, np.ndarray]:
    found = {}
    for path, scheme in schemes_of(checkpoint).items():

        def product(x: np.ndarray, name: str, scheme: Scheme = scheme) -> np.ndarray:
            seen = _rounded(checkpoint, name, scheme, x) if inputs and scheme.activations else np.float64(x)
            return seen @ widened_of(checkpoint, name).T

        if not path.endswith(".experts"):
            found[path] = product(given[path], path)
            continue
        E = experts_of(checkpoint, path)
        found[path] = np.concatenate(
            [_expert(product, given[path][row : row + 1], path, row % E) for row in range(len(given[path]))]
        )
    return found


def _expert(product: Callable[..., np.ndarray], x: np.ndarray, path: str, expert: int) -> np.ndarray:
    gate, up = (product(x, _matrix(path, expert, name)) for name in PROJECTIONS["w13"])
    inner = (gate / (1 + np.exp(-gate)) * up).astype(np.float32)
    return product(inner, _matrix(path, expert, "down_proj"))


def _rounded(checkpoint: Checkpoint, name: str, scheme: Scheme, x: np.ndarray) -> np.ndarray:
    """Inputs as the product sees them, float64."""
    scale = checkpoint.read(f"{name}.{scheme.leaves['input']}").reshape(())
    scale = np.float32(1) / scale if scheme.divides else scale
    if scheme.weights == "fp8":
        return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    codes, block = quantize_activations(x, scale)
    numbers = decode(codes).astype(np.float64).reshape(*block.shape, -1) * block.astype(np.float64)[..., None]
    return numbers.reshape(x.shape) * float(scale)


def _expanded(checkpoint: Checkpoint) -> dict[str, bytes]:
    def one(name: str, scheme: Scheme) -> np.ndarray:
        parts = {role: checkpoint.read(f"{name}.{leaf}") for role, leaf in scheme.leaves.items()}
        if scheme.weights == "fp8":
            return parts["codes"].astype(np.float32) * parts["global"]
        return dequantize(parts["codes"], parts["block"], parts["global"].reshape(()), divide=scheme.divides)

    found = {}
    for path, scheme in schemes_of(checkpoint).items():
        names = [path]
        if path.endswith(".experts"):
            experts = range(experts_of(checkpoint, path))
            names = [_matrix(path, e, name) for stack in PROJECTIONS.values() for e in experts for name in stack]
        found[path] = b"".join(one(name, scheme).tobytes() for name in names)
    return found


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = module[name] if hasattr(module, "keys") else getattr(module, name)
    return module


def _error(found: np.ndarray, owed: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - owed) / np.linalg.norm(owed))
