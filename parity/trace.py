"""A trace: what one backend computed on one batch, in one safetensors file that NumPy and safetensors can read.

Recorded where the hardware is, compared where the people are: neither JAX nor torch is needed to read one.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file

from parity import trace_layout
from parity.trace_layout import SCHEMA
from parity.whole_file import whole_file

DOCUMENT = "tandem"  # the key of the header's metadata that holds the JSON document
BF16 = "BF16"
READABLE = {"F64", "F32", "F16", "I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL", "C64"}  # by NumPy alone


@dataclass
class Trace:
    """Tensors and metadata of one run.

    Attributes:
        tensors: by name, see ``parity.trace_layout``: ``logits`` [B, T, V], ``hidden_states.0`` (embeddings),
            ``hidden_states.i`` (after decoder layer i, from 1), ``final_hidden_state``, all float32 [B, T, D] (an
            oracle may keep float64); ``generated_ids`` [B, N], ``input_ids`` and ``attention_mask`` [B, T] and, for
            sparse layers, ``routing.i`` [B, T, X], integers. Names not known here are kept and not compared.
            Optional ``generated_margins`` [B, N]: top-1 minus top-2 logit at each generated step, which lets a
            difference there be told from a tie.
        meta: the JSON document: schema, backend, dtype; optional versions, device, precision, weights, events,
            input_hash, checkpoint.
    """

    tensors: dict[str, np.ndarray]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        return self.meta["backend"]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        name = trace_layout.activations(self.tensors)[0]
        batch, length = self.tensors[name].shape[:2]
        return batch, length + (name in trace_layout.MTP)

    @property
    def mask(self) -> np.ndarray:
        """Booleans [B, T]: the positions that carry a meaning. No attention mask means all of them."""
        given = self.tensors.get("attention_mask")
        return np.ones(self.shape, bool) if given is None else given.astype(bool)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the trace, all of it or nothing, and return where. A link is followed; a pipe or a device written to.

        Raises:
            ValueError: it is not a trace; lists everything wrong.
            OSError: it cannot be written.
        """
        path = Path(path)
        _raise_if(path, trace_layout.find_problems(self.tensors, self.meta))
        document = json.dumps(self.meta, sort_keys=True, allow_nan=False)
        # safetensors writes the buffer as it lies in memory, so a transposed view has to be laid out first.
        tensors = {name: np.asarray(array, order="C") for name, array in self.tensors.items()}
        try:
            with whole_file(path) as whole:
                save_file(tensors, whole, {DOCUMENT: document})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read and check a trace.

        Raises:
            ValueError: the file is not a trace; lists everything wrong.
            OSError: the file cannot be read.
        """
        path = Path(path)
        check_is_file(path, "the one safetensors file that `tandem record` writes")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
                tensors = {name: file.get_tensor(name) for name, dtype in dtypes.items() if dtype in READABLE}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}. Was it copied whole?") from error
        if BF16 in dtypes.values():
            tensors |= _widen_bfloat16(path)
        unreadable = [
            f"tensor {name!r} has dtype {dtype}, which NumPy has no type for: store it as float32."
            for name, dtype in dtypes.items()
            if name not in tensors
        ]
        meta, problems = _parse(metadata.get(DOCUMENT))
        if not problems:
            problems = trace_layout.find_problems(tensors, meta)
        _raise_if(path, [*unreadable, *problems])
        return cls({name: tensors[name] for name in sorted(tensors)}, meta)


def make_meta(
    *,
    backend: str,
    dtype: str,
    input_hash: str,
    device: str = "",
    versions: dict[str, str] | None = None,
    precision: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
    events: list[Any] | None = None,
    checkpoint: str = "",
    weight_only: bool | None = None,
    kernels: dict[str, int] | None = None,
) -> dict[str, Any]:
    """The metadata document of a trace, as recorders write it.

    ``weights`` is ``{"digests": {name: hex}, "root": hex}`` as ``loaders.digest`` makes them. ``precision`` holds the
    flags in force: a key that two traces share must agree between them, so give shared meanings shared names
    (``matmul``) and spell the rest per backend; what only one declares is shown and not judged. Of a quantised model,
    and no other, there are ``weight_only`` (neither inputs nor the cache were rounded) and ``kernels`` (how many
    modules run which).
    """
    document = {"schema": SCHEMA, "backend": backend, "dtype": dtype, "device": device, "versions": versions or {}}
    document |= {"precision": precision or {}, "events": events or [], "input_hash": input_hash}
    optional = {"weights": weights, "weight_only": weight_only, "kernels": kernels}
    document |= {"checkpoint": checkpoint} | {key: value for key, value in optional.items() if value is not None}
    return document


def input_hash(input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **others: Any) -> str:
    """SHA-256 (hex) over the names, shapes and values of a model's inputs.

    Integers are hashed as int64 and floats as float64, so that the dtype a backend happened to pass does not matter.
    No attention mask hashes as all ones, which is what it means; other inputs that are None are left out. ``others``
    are multimodal tensors under their Hugging Face processor names.

    Raises:
        ValueError: an input that is neither integers nor floats.
    """
    ids = np.asarray(input_ids)
    mask = np.ones(ids.shape, np.int64) if attention_mask is None else attention_mask
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids, **others}
    digest = hashlib.sha256()
    for name in sorted(name for name, value in given.items() if value is not None):
        array = np.asarray(given[name])
        is_float = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
        if array.dtype.kind not in "iub" and not is_float:
            raise ValueError(f"input {name!r} has dtype {array.dtype}, expected integers or floats.")
        wide = array.astype("<f8" if is_float else "<i8")
        digest.update(f"{name}\0{wide.dtype.str}{list(wide.shape)}\0".encode())
        digest.update(wide.tobytes())
    return digest.hexdigest()


def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata document of a trace file, without reading a tensor.

    Raises:
        ValueError: the file is not a trace.
        OSError: the file cannot be read.
    """
    path = Path(path)
    check_is_file(path, "the one safetensors file that `tandem record` writes")
    try:
        with safe_open(path, framework="numpy") as file:
            meta, problems = _parse((file.metadata() or {}).get(DOCUMENT))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}. Was it copied whole?") from error
    _raise_if(path, problems or trace_layout.meta_problems(meta))
    return meta


def check_is_file(path: str | os.PathLike[str], expected: str) -> None:
    """Raises ValueError where there is something else by that name: safetensors would say "No such device"."""
    path = Path(path)
    if path.exists() and not path.is_file():
        found = "a directory" if path.is_dir() else "a pipe" if path.is_fifo() else "no regular file"
        raise ValueError(f"{path} is {found}, expected {expected}.")


def _parse(document: str | None) -> tuple[dict[str, Any], list[str]]:
    """The metadata document and what is wrong with it."""
    if document is None:
        return {}, [f"the header has no {DOCUMENT!r} document: this safetensors file is not a trace."]
    try:
        meta = json.loads(document)
    except (json.JSONDecodeError, RecursionError) as error:  # nested deeper than Python goes
        return {}, [f"the header's {DOCUMENT!r} document is not JSON: {error}."]
    return (meta, []) if isinstance(meta, dict) else ({}, [f"the header's {DOCUMENT!r} document is not an object."])


def _widen_bfloat16(path: Path) -> dict[str, np.ndarray]:
    """The bfloat16 tensors of a file as float32, exactly. NumPy has no bfloat16 and ml_dtypes is not to be needed."""
    stored = [(name, view) for name, view in deserialize(path.read_bytes()) if view["dtype"] == BF16]
    wide = {name: np.frombuffer(view["data"], "<u2").astype(np.uint32) << 16 for name, view in stored}
    return {name: wide[name].view(np.float32).reshape(view["shape"]) for name, view in stored}


def _raise_if(path: Path, problems: list[str]) -> None:
    if problems:
        lines = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise ValueError(f"{path} is not a usable trace: {len(problems)} problem(s).{lines}")
