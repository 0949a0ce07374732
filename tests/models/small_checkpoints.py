"""Small checkpoints for tests of the life of weights: made once, changed, and held against each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parity.zoo import make_checkpoint

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
V, D, LAYERS = 211, 40, 3
IDS = np.random.default_rng(0).integers(0, V, (2, 8))

Make = Callable[..., Path]


def maker(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A checkpoint of several files; made once, however often it is asked for."""
    made: dict[str, Path] = {}

    def build(name: str = "qwen3", seed: int = 0, **options) -> Path:
        key = repr((name, seed, sorted(options.items())))
        if key not in made:
            directory = tmp_path_factory.mktemp("checkpoint") / "a"
            sizes = {"num_hidden_layers": LAYERS, "max_file_bytes": 60_000}
            made[key] = make_checkpoint(name, directory, seed=seed, **(sizes | options))
        return made[key]

    return build


def random_table(seed: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(V, D)).astype(dtype)


def tensors_of(directory: Path) -> dict[str, dict[str, tuple]]:
    """File -> tensor -> dtype, shape, bytes; read by the safetensors library."""
    return {
        path.name: {name: (str(t.dtype), t.shape, t.tobytes()) for name, t in load_file(path).items()}
        for path in sorted(directory.glob("*.safetensors"))
    }


def assert_same_checkpoint(exported: Path, source: Path) -> None:
    want = tensors_of(source)
    assert tensors_of(exported) == want
    for path in source.glob("*.safetensors"):
        assert (exported / path.name).read_bytes() == path.read_bytes(), path.name
    for name in ("config.json", "generation_config.json"):
        assert json.loads((exported / name).read_text()) == json.loads((source / name).read_text())
    index = "model.safetensors.index.json"
    assert (exported / index).exists() == (source / index).exists() == (len(want) > 1)
    if len(want) > 1:
        assert json.loads((exported / index).read_text()) == json.loads((source / index).read_text())


def broken_copy(source: Path, directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """The checkpoint with each file's tensors passed through ``change``."""
    directory.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, directory / path.name)
        else:
            (directory / path.name).write_bytes(path.read_bytes())
    return directory


def one_bit(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        if name in tensors:
            tensors[name].view(np.uint8).reshape(-1)[-1] ^= 1

    return change


def bits(value) -> bytes:
    return np.asarray(value).tobytes()
