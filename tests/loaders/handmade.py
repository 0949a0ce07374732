"""Checkpoints made by hand, byte by byte, so that they can be wrong in one way at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from loaders import CheckpointError, open_checkpoint

# the smallest config.json that is complete
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
MOE_CONFIG = {
    **CONFIG,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}


def entry(dtype: Any, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def framed(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file of this header, whatever it says."""
    return len(header).to_bytes(8, "little") + header + data


def safetensors(entries: dict[str, Any] | str, data: bytes = b"") -> bytes:
    """A safetensors file; give the header as text where a dict cannot say it (a key twice)."""
    return framed((entries if isinstance(entries, str) else json.dumps(entries)).encode(), data)


ONE_TENSOR = safetensors({"a": entry("U8", [4], 0, 4)}, b"\1\2\3\4")


def write(directory: Path, files: dict[str, Any]) -> Path:
    """Write each file: bytes as they are, everything else as JSON; config.json unless given (None: none)."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in ({"config.json": CONFIG} | files).items():
        if content is not None:
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            (directory / name).write_bytes(raw)
    return directory


def indexed(files: dict[str, bytes], weight_map: dict[str, str]) -> dict[str, Any]:
    return {**files, "model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map}}


def open_files() -> list[str]:
    """Of checkpoints, by this process: sockets of other tests' servers come and go."""
    return sorted(file.path for file in psutil.Process().open_files() if file.path.endswith(".safetensors"))


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def tensor(name: str) -> bytes:
    return safetensors({name: entry("U8", [4], 0, 4)}, b"\1\2\3\4")


TWO_FILES = {A: tensor("a"), B: tensor("b")}
RIGHT_MAP = {"a": A, "b": B}


def refusal(path: Path) -> list[str]:
    """The problems for which opening it is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return list(caught.value.problems)
