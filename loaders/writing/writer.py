"""Write a Hugging Face checkpoint: config.json and safetensors files, one tensor in memory at a time, all or nothing.

The format is written here because the safetensors library (``serialize_file``, 0.8) wants the addresses of all tensors
of a file at once, that is a whole file in memory. A header is held to the rules of ``loaders.files.header`` before
anything is written. A file that the library wrote comes out byte for byte when it is written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loaders import dtypes
from loaders.errors import brief
from loaders.files.header import MAX_HEADER_BYTES, parse_header
from loaders.files.index import INDEX, SINGLE
from loaders.files.opening import CONFIG, GENERATION
from loaders.quantization.documents import DOCUMENT as QUANTIZATION
from loaders.sources import is_plain
from loaders.writing.new_directory import filled, new_directory

DEFAULT_FILE_BYTES = 5 << 30
FORMAT = {"format": "pt"}


class PlannedTensor(Protocol):
    """What must be known of a tensor before it is written. ``TensorInfo`` will do, and ``TensorType``."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class TensorType:
    """safetensors dtype and logical shape of a tensor that is still to be written."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: np.ndarray) -> TensorType:
        return cls(dtypes.from_numpy(array.dtype), array.shape)


@dataclass(frozen=True, slots=True)
class _File:
    """One file to be: its tensors in the order they lie there, and its header."""

    name: str
    tensors: tuple[str, ...]
    header: bytes


def write_checkpoint(
    directory: str | os.PathLike[str],
    plan: Mapping[str, PlannedTensor],
    read: Callable[[str], np.ndarray],
    *,
    config: dict[str, Any],
    generation: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
    copied: Mapping[str, bytes] | None = None,
    files: Mapping[str, str] | None = None,
    metadata: Mapping[str, Mapping[str, str]] | None = None,
    max_file_bytes: int = DEFAULT_FILE_BYTES,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write ``directory``: config.json, and one safetensors file, or several with their index.

    A checkpoint is copied by ``write_checkpoint(to, ckpt.tensors, ckpt.read, config=ckpt.config_document)``. Everything
    is written beside ``directory`` first and renamed once it is on the disk: what exists under that name is complete.
    What a writer of it that was killed on this host left there is removed.

    Args:
        directory: a new or empty directory; its parents are made.
        plan: tensor name -> dtype and shape. A file's tensors lie in this order, those of wider dtypes first.
        read: gives a planned tensor as NumPy holds it (packed formats as bytes); called once for each, in file order.
        config: config.json.
        generation: generation_config.json; None or empty for no such file.
        quantization: hf_quant_config.json, likewise.
        copied: name -> bytes of files to lie beside them, such as a tokenizer's.
        files: tensor name -> file name, to repeat the layout of another checkpoint; default: files of at most
            ``max_file_bytes`` of tensors, filled in the plan's order.
        metadata: file name -> its safetensors metadata, beside ``{"format": "pt"}``, which transformers insists on.
        max_file_bytes: see ``files``; a larger tensor has a file to itself.
        check: called when everything was read; what it raises leaves nothing behind.
    Returns:
        The directory.
    Raises:
        FileExistsError, NotADirectoryError, PermissionError: ``directory`` is none that can be written, see
            ``new_directory``. It is left as it is.
        ValueError: listing all that a checkpoint cannot hold, before anything is written; an address for a directory;
            or ``read`` gave something else than planned. Nothing is left behind.
    """
    target = new_directory(directory)
    if odd := [name for name in copied or {} if not is_plain(name)]:
        raise ValueError(_listed([f"copied names the file {name!r}, expected a plain name" for name in odd]))
    layout = _given_layout(plan, files) if files is not None else _filled_layout(plan, max_file_bytes)
    if problems := [
        f"metadata is of {name!r}, which is not written, or is no mapping: {brief(found)}"
        for name, found in (metadata or {}).items()
        if name not in layout or not isinstance(found, Mapping)
    ]:
        raise ValueError(_listed(problems))
    planned = _headers(plan, layout, metadata or {})
    with filled(target) as partial:
        beside = {GENERATION: generation, QUANTIZATION: quantization}
        _write_documents(partial, {CONFIG: config} | {name: one for name, one in beside.items() if one}, planned, plan)
        for name, content in (copied or {}).items():
            _write_file(partial, name, content)
        for file in planned:
            _write_tensors(partial / file.name, file, plan, read)
        check()
    return Path(directory)


def writing_order(plan: Mapping[str, PlannedTensor], files: Mapping[str, str]) -> list[str]:
    """Tensors in the order in which ``write_checkpoint(..., files=files)`` asks for them.

    Raises:
        ValueError: as it does, before anything is written.
    """
    return [name for file in _headers(plan, _given_layout(plan, files), {}) for name in file.tensors]


def _given_layout(plan: Mapping[str, PlannedTensor], files: Mapping[str, str]) -> dict[str, list[str]]:
    problems = [f"files names no file for tensor {name!r}" for name in plan if name not in files]
    problems += [f"files names tensor {name!r}, which is not planned" for name in files if name not in plan]
    problems += [
        f"files names the file {name!r}, expected a plain name that ends in .safetensors"
        for name in sorted(set(files.values()))
        if not is_plain(name) or not name.endswith(".safetensors")
    ]
    if problems:
        raise ValueError(_listed(problems))
    layout: dict[str, list[str]] = {}
    for name in plan:
        layout.setdefault(files[name], []).append(name)
    return dict(sorted(layout.items()))


def _filled_layout(plan: Mapping[str, PlannedTensor], max_file_bytes: int) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    used = 0
    for name, tensor in plan.items():
        num_bytes = _num_bytes(tensor)
        if groups[-1] and used + num_bytes > max_file_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += num_bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{number:05}-of-{count:05}.safetensors": group for number, group in enumerate(groups, 1)}


def _num_bytes(tensor: PlannedTensor) -> int:
    """Zero for a dtype there is no name for: its header will be refused, with all the others."""
    if tensor.dtype not in dtypes.NAMES:
        return 0
    elements = 1
    for size in tensor.shape:
        elements *= int(size)
    return elements * dtypes.bits(tensor.dtype) // 8


def _headers(
    plan: Mapping[str, PlannedTensor], layout: Mapping[str, Iterable[str]], metadata: Mapping[str, Mapping[str, str]]
) -> list[_File]:
    files: list[_File] = []
    problems: list[str] = []
    for file, names in layout.items():
        # wider dtypes first, as the library does: then every tensor starts at a multiple of its item size
        ordered = tuple(sorted(names, key=lambda name: -_item_bytes(plan[name])))
        entries: dict[str, Any] = {"__metadata__": FORMAT | dict(metadata.get(file, {}))}
        position = 0
        for name in ordered:
            tensor = plan[name]
            end = position + _num_bytes(tensor)
            shape = [int(size) for size in tensor.shape]
            entries[name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [position, end]}
            position = end
        raw = _json(entries, separators=(",", ":"))
        raw += b" " * (-len(raw) % 8)
        if len(raw) > MAX_HEADER_BYTES:
            limit = f"at most {MAX_HEADER_BYTES}. Use more files"
            problems.append(f"{file}: its header has {len(raw)} bytes, expected {limit}.")
        problems += parse_header(raw, file, 8 + len(raw) + position)[1]
        files.append(_File(file, ordered, len(raw).to_bytes(8, "little") + raw))
    if problems:
        raise ValueError(_listed(problems))
    return files


def _item_bytes(tensor: PlannedTensor) -> int:
    return dtypes.to_numpy(tensor.dtype).itemsize if tensor.dtype in dtypes.NAMES else 0


def _write_documents(
    directory: Path,
    documents: dict[str, Any],
    files: list[_File],
    plan: Mapping[str, PlannedTensor],
) -> None:
    if [file.name for file in files] != [SINGLE]:
        weight_map = {name: file.name for file in files for name in file.tensors}
        total_size = sum(_num_bytes(tensor) for tensor in plan.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        documents = documents | {INDEX: index}
    for name, document in documents.items():
        _write_file(directory, name, _json(document, indent=2, allow_nan=False) + b"\n")


def _json(document: Any, **how: Any) -> bytes:
    """A document in UTF-8; with escapes where it holds half of a pair, which a file may and UTF-8 may not."""
    try:
        return json.dumps(document, ensure_ascii=False, **how).encode()
    except UnicodeEncodeError:
        return json.dumps(document, ensure_ascii=True, **how).encode()


def _write_file(directory: Path, name: str, content: bytes) -> None:
    with open(directory / name, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write_tensors(
    path: Path, planned: _File, plan: Mapping[str, PlannedTensor], read: Callable[[str], np.ndarray]
) -> None:
    with open(path, "xb") as file:
        file.write(planned.header)
        for name in planned.tensors:
            file.write(_checked(name, plan[name], read(name)).data)
        file.flush()
        os.fsync(file.fileno())


def _checked(name: str, tensor: PlannedTensor, array: np.ndarray) -> np.ndarray:
    """The bytes of ``array``, which must be what was planned."""
    dtype, shape = dtypes.to_numpy(tensor.dtype), dtypes.stored_shape(tensor.dtype, tuple(tensor.shape))
    if (array.dtype, array.shape) != (dtype, shape):
        raise ValueError(f"tensor {name!r} is {array.dtype} {array.shape}, expected {dtype} {shape} as planned")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _listed(problems: list[str]) -> str:
    return "this checkpoint cannot be written:" + "".join(f"\n  {problem}" for problem in problems)
