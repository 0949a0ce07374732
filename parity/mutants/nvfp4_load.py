"""What makes and names quantised weights on trial: the codec, quantise-on-load, quantisation documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from loaders import CheckpointError, nvfp4, open_checkpoint
from loaders.checkpoint import Checkpoint
from loaders.digest import digests
from parity.mutants.bench import Bench, Subject, differences
from parity.mutants.nvfp4_bench import quantised
from parity.zoo import block_sizes

_TWO = ("num_hidden_layers", 2)
PLAIN = Subject("qwen3", (_TWO, *block_sizes("qwen3").items()), "BF16")
PLAIN_EXPERTS = Subject("qwen3-moe", (_TWO, *block_sizes("qwen3-moe").items()), "BF16")
PATTERNS = ("model.layers.0.mlp.*", "model.layers.1.self_attn.[qkv]_proj")
EXCLUDING = quantised("qwen3", activations=False, unify=True, exclude=PATTERNS)
LINEAR = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",))
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nvfp4_codec(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Codes and block scales of a matrix with ties, a zero block and tiny blocks; by the definition, one by one."""
    weight, amax = _awkward(), 42.0  # a global scale of 1/64
    found = nvfp4.quantize(weight, amax=amax)
    packed, block, scale = slowly_quantised(weight, amax)
    pairs = (("global scale", found.global_scale, scale), ("block scales", found.block_scale, block))
    pairs = (*pairs, ("codes", found.packed, packed))
    return [f"{what} of a weight differ" for what, mine, owed in pairs if mine.tobytes() != owed.tobytes()][:1]


def nvfp4_on_load(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """A plain checkpoint, quantised as it is loaded and again at every reload: what the definition makes of it."""
    owed = [bench.once(("quantised", subject, seed), lambda seed=seed: _owed(bench, subject, seed)) for seed in (0, 1)]
    model = import_module(f"{backend}_models").load(bench.path(subject), dtype="bfloat16", quantize="nvfp4")
    found = differences("after load", owed[0], model.digests())
    found += _unnamed(model.checkpoint)
    for seed in (1, 0):
        if not found:
            model = model.update_weights_from_disk(bench.path(subject, seed))
            found = differences("after a reload", owed[seed], model.digests())
    return found


def nvfp4_documents(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """What documents mean: good ones, in several spellings, name what is quantised; bad ones are refused by name."""
    for what, path, refusal in bench.once(("documents", subject), lambda: list(_documents(bench, subject))):
        try:
            model = import_module(f"{backend}_models").load(path, dtype="float32")
        except CheckpointError as error:
            if refusal is None or refusal not in str(error):
                return [f"{what}: refused, {str(error).splitlines()[-1].strip()}"]
            continue
        if refusal is not None:
            return [f"{what}: loaded without a word"]
        quantization = model.config.quantization
        named = set() if quantization is None else set(quantization.table)
        scales = [name for name in model.checkpoint.tensors if name.endswith(".weight_scale")]
        owed = {name.removesuffix(".weight_scale") for name in scales}
        if named != owed:
            return [f"{what}: {sorted(named ^ owed)[0]} is taken for what it is not"]
    return []


def slowly_quantised(weight: np.ndarray, amax: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed codes, block scales and global scale by ModelOpt's definition: distances to all numbers, least wins."""
    scale = np.float32(amax) / np.float32(2688)
    blocks = weight.astype(np.float32).reshape(*weight.shape[:-1], -1, 16)
    most = np.abs(blocks).max(-1) / (np.float32(6) * scale)
    most = np.where(most == 0, np.float32(1), np.clip(most, np.float32(2**-9), np.float32(448)))
    block = most.astype(ml_dtypes.float8_e4m3fn)
    quotient = blocks / (block.astype(np.float32) * scale)[..., None]
    distance = np.abs(np.abs(quotient).astype(np.float64)[..., None] - MAGNITUDES)
    # of two at the same distance the even code
    codes = np.argmin(distance + np.where(np.arange(8) % 2, 1e-12, 0), axis=-1).astype(np.uint8)
    codes = (codes | np.where(quotient < 0, 8, 0).astype(np.uint8)).reshape(weight.shape)
    return codes[..., 0::2] | codes[..., 1::2] << 4, block, np.asarray(scale, np.float32)


def _awkward() -> np.ndarray:
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], np.float32)
    row = np.concatenate([ties, -ties, np.zeros(16, np.float32)]) / 64
    rng = np.random.default_rng(0)
    random = rng.standard_normal((20, 32)) * np.exp(2 * rng.standard_normal((20, 1)))
    return np.concatenate([[row, 1e-4 * row, 1.7 * row, 400 * row], np.clip(random, -42, 42)]).astype(np.float32)


def _owed(bench: Bench, subject: Subject, seed: int) -> dict[str, str]:
    """Digest of every tensor of the subject quantised: linear layers, with one scale for those multiplied together."""
    checkpoint = open_checkpoint(bench.path(subject, seed))
    groups = [sorted(group) for group in _groups(checkpoint)]
    parts: dict[str, np.ndarray] = {}
    for group in groups:
        read = {name: checkpoint.read(name) for name in group}
        amax = max(np.abs(weight.astype(np.float32)).max() for weight in read.values())
        for name, weight in read.items():
            packed, block, scale = slowly_quantised(weight, amax)
            parts |= {name: packed, f"{name}_scale": block, f"{name}_scale_2": scale.reshape(())}
    plain = [name for name in checkpoint.tensors if name not in parts]
    return digests([*parts.items(), *((name, checkpoint.read(name)) for name in plain)])


def _unnamed(checkpoint: Checkpoint) -> list[str]:
    """Matrices that are not quantised must be named in the document: other engines go by that."""
    ignored = set(checkpoint.config_document["quantization_config"]["ignore"])
    plain = {name for name, info in checkpoint.tensors.items() if len(info.shape) > 1 and info.dtype == "BF16"}
    wrong = sorted(ignored ^ {name.removesuffix(".weight") for name in plain})
    return [f"{wrong[0]} is quantised or said to be, not both"] if wrong else []


def _groups(checkpoint: Checkpoint) -> list[set[str]]:
    found: dict[tuple[str, int], set[str]] = {}
    for name in checkpoint.tensors:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        for index, leaves in enumerate(LINEAR):
            if leaf in leaves:
                found.setdefault((parent, index), set()).add(name)
    return list(found.values())


def _documents(bench: Bench, subject: Subject) -> Iterator[tuple[str, Path, str | None]]:
    """What it is, where it is, and a word that its refusal must have."""
    path, plain = bench.path(subject), bench.path(PLAIN)
    yield "patterns as exported", path, None
    fused = ["lm_head", "model.embed_tokens", "model.layers.0.mlp", "model.layers.1.self_attn.qkv_proj"]
    yield "a fused name", _rewritten(bench, path, ignored=fused), None
    both = [*fused[:2], r"re:model\.layers\.(0\.mlp\.(gate_up_proj|down_proj)|1\.self_attn\.qkv_proj)$"]
    yield "two fused names in one pattern", _rewritten(bench, path, ignored=both), None
    yield "NVFP4 whose groups name no input", _rewritten(bench, path, ignored=fused, quant_algo="NVFP4"), None
    every = {"ignored": ["*"], "like": path}
    yield "an algorithm nobody knows", _rewritten(bench, plain, quant_algo="NVFP4_SVD", **every), "NVFP4_SVD"
    yield "blocks of 32", _rewritten(bench, path, ignored=fused, group_size=32), "group_size"
    yield "a cache in INT8", _rewritten(bench, plain, kv_cache_scheme="INT8", **every), "INT8"


def _rewritten(bench: Bench, path: Path, *, ignored: list[str], like: Path | None = None, **changes: Any) -> Path:
    """The checkpoint with another ``quantization_config``, and no document beside it."""
    directory = bench._new("documents")
    directory.mkdir()
    for file in path.iterdir():
        if file.name not in ("config.json", "hf_quant_config.json"):
            (directory / file.name).hardlink_to(file)
    document = json.loads((path / "config.json").read_text())
    inside = json.loads(((like or path) / "config.json").read_text())["quantization_config"]
    group_size = changes.pop("group_size", None)
    if group_size is not None:
        inside["config_groups"]["group_0"]["weights"]["group_size"] = group_size
    document["quantization_config"] = inside | {"ignore": ignored} | changes
    (directory / "config.json").write_text(json.dumps(document))
    return directory
