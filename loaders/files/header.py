"""Strict reader of a safetensors header: every rule of the format, checked before a tensor byte is read.

Layout: 8 bytes little-endian header length, the header as UTF-8 JSON, then the tensors' bytes without gaps.
Stricter than the reference reader where that one is lenient (duplicate keys, control characters in names, zero-size
giants), because a name read here becomes an address and a shape becomes an allocation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from loaders import dtypes
from loaders.errors import brief
from loaders.files.strict_json import BadJson, parse_object
from loaders.sources import OpenFile

MAX_HEADER_BYTES = 32 << 20  # the format allows 100 MB; 32 MiB describe 200 000 tensors, and parsing costs memory
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**48  # also of the other axes of an empty tensor, whose size no file length bounds


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: ``offsets`` are absolute byte positions [start, end) in ``file``."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    offsets: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        return self.offsets[1] - self.offsets[0]


@dataclass(frozen=True, slots=True)
class Header:
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


class _Bad(ValueError):
    """Why a header is refused; becomes one problem of a CheckpointError."""


def read_header(file: OpenFile) -> tuple[Header | None, list[str]]:
    """Read and check the header of ``file``; return it, or None and the problems found (one sentence each).

    Raises:
        OSError: the file cannot be read.
    """
    file_bytes = file.opened.num_bytes
    try:
        raw = _header_bytes(file, file_bytes)
    except _Bad as error:
        return None, [f"{file.name}: {error}"]
    return parse_header(raw, file.name, file_bytes)


def parse_header(raw: bytes, file: str, file_bytes: int) -> tuple[Header | None, list[str]]:
    """Check the header ``raw`` of a file of ``file_bytes`` bytes; return it, or None and the problems found."""
    try:
        if not raw.startswith(b"{"):
            raise _Bad("the header does not start with '{'. The file is not safetensors.")
        entries = parse_object(raw)
        metadata = _metadata(entries.pop("__metadata__", {}))
    except BadJson as error:
        return None, [f"{file}: the header {error}"]
    except _Bad as error:
        return None, [f"{file}: {error}"]
    tensors, problems = _tensors(entries, file, 8 + len(raw), file_bytes)
    return (None, problems) if problems else (Header(tensors, metadata), [])


def _header_bytes(file: OpenFile, file_bytes: int) -> bytes:
    if file_bytes < 8:
        raise _Bad(f"the file has {file_bytes} bytes, a safetensors file at least 8. Was the download cut short?")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise _Bad(
            f"the header claims {length} bytes, but the file has {file_bytes} and the limit is {MAX_HEADER_BYTES}."
            " The file is truncated or not safetensors."
        )
    return file.read(8, length)


def _metadata(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise _Bad("__metadata__ must map strings to strings")
    return found


def _tensors(
    entries: dict[str, Any], file: str, data_start: int, file_bytes: int
) -> tuple[dict[str, TensorInfo], list[str]]:
    tensors: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for name, entry in entries.items():
        try:
            tensors[name] = _tensor(name, entry, file, data_start)
        except _Bad as error:
            problems.append(f"{file}: tensor {brief(name)} {error}")
    if problems:
        return tensors, problems
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offsets):
        start, end = info.offsets
        if start != position:
            what = "overlaps the tensor before it" if start < position else "leaves a hole before it"
            problems.append(
                f"{file}: tensor {name!r} {what}: starts at byte {start}, expected {position}. The file is damaged."
            )
        position = max(position, end)
    if position > file_bytes:
        problems.append(f"{file}: the file has {file_bytes} bytes, its header promises {position}. It is truncated.")
    elif position < file_bytes and not problems:
        problems.append(f"{file}: {file_bytes - position} bytes follow the last tensor. The file is damaged.")
    return tensors, problems


def _tensor(name: str, entry: Any, file: str, data_start: int) -> TensorInfo:
    if not name or not name.isprintable():
        raise _Bad("has a name that is empty or holds control characters, lone surrogates or other unprintable ones")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Bad("must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes.NAMES:
        raise _Bad(f"has unknown dtype {brief(dtype)}. Known: {', '.join(sorted(dtypes.NAMES))}")
    if not _integers(shape) or len(shape) > MAX_DIMENSIONS or math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        limits = f"at most {MAX_DIMENSIONS} integers, none negative, of product 2^48 or less"
        raise _Bad(f"has shape {brief(shape)}; expected {limits}")
    if not _integers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Bad(f"has data_offsets {brief(offsets)}; expected [start, end] with 0 <= start <= end")
    total_bits = math.prod(shape) * dtypes.bits(dtype)
    if total_bits % 8 or total_bits // 8 != offsets[1] - offsets[0]:
        raise _Bad(f"has {offsets[1] - offsets[0]} bytes, expected {total_bits / 8:g} from {dtype} {tuple(shape)}")
    if dtypes.stored_shape(dtype, tuple(shape)) != tuple(shape) and (shape[-1] * dtypes.bits(dtype)) % 8:
        raise _Bad(f"has packed dtype {dtype} and last axis {shape[-1]}, which does not fill whole bytes")
    return TensorInfo(dtype, tuple(shape), file, (data_start + offsets[0], data_start + offsets[1]))


def _integers(found: Any) -> bool:
    return isinstance(found, list) and all(type(size) is int and size >= 0 for size in found)
