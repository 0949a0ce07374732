"""A checkpoint of seven tensors in two files, to be streamed, and changed meanwhile."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
from handmade import CONFIG

from loaders import Checkpoint, open_checkpoint
from loaders.writing.writer import TensorType, write_checkpoint

KIB = 1024
# names out of alphabetical order, sizes out of order, several dtypes
SIZES = {"f": 40, "b": 8, "e": 64, "a": 24, "d": 1, "c": 56, "g": 16}  # KiB
FILE_OF = {"f": "2", "b": "2", "e": "2", "a": "1", "d": "1", "c": "1", "g": "1"}


def content(name: str) -> np.ndarray:
    rng = np.random.default_rng(ord(name))
    dtype = ml_dtypes.bfloat16 if name in "bd" else np.float32
    return rng.integers(0, 255, SIZES[name] * KIB, np.uint8).view(dtype)


def seven_tensors(directory: Path) -> Checkpoint:
    """Written there, in two files."""
    files = {name: f"model-0000{file}-of-00002.safetensors" for name, file in FILE_OF.items()}
    plan = {name: TensorType.of(content(name)) for name in SIZES}
    write_checkpoint(directory, plan, content, config=CONFIG, files=files)
    return open_checkpoint(directory)


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tandem-read")]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)
