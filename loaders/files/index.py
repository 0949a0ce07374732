"""Which files a checkpoint has, and which tensor is in which: the index against the headers."""

from __future__ import annotations

from typing import Any

from loaders.errors import brief
from loaders.files.header import Header, TensorInfo, read_header
from loaders.files.parallel import read_files
from loaders.sources import Identity, Source, is_plain

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_map(index: dict[str, Any], problems: list[str]) -> dict[str, str] | None:
    """Tensor name -> file name; None: it is none, which is a problem."""
    found = index.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        problems.append(f"{INDEX}: weight_map must map tensor names to file names")
        return None
    outside = {file for file in found.values() if not is_plain(file)}
    problems += [
        f"{INDEX} names the file {brief(file)}, outside the checkpoint directory. Files are named without a path."
        for file in sorted(outside)
    ]
    return {tensor: file for tensor, file in found.items() if file not in outside}


def safetensors_files(
    present: list[str], weight_map: dict[str, str] | None, has_index: bool, problems: list[str]
) -> list[str]:
    """The safetensors files to read; missing and extra ones become problems."""
    found = [name for name in present if name.endswith(".safetensors")]
    if has_index:
        if weight_map is None:
            return []  # which files are meant is not known, and why is a problem already
        named = set(weight_map.values())
        for name in sorted(named - set(found)):
            why = "is no .safetensors file. Is the index whole?" if name in present else "missing. Download it."
            problems.append(f"{name} is named in {INDEX} but {why}")
        problems += [
            f"{name} is in the directory but not in {INDEX}. Remove it, or write an index that covers it."
            for name in sorted(set(found) - named)
        ]
        return sorted(named & set(found))
    if SINGLE not in found:
        hint = f" {found[0]} is there: is {INDEX} missing?" if found else ""
        problems.append(f"neither {SINGLE} nor {INDEX} is in the directory.{hint}")
        return []
    problems += [f"{name} is in the directory beside {SINGLE}. Remove one." for name in found if name != SINGLE]
    return [SINGLE]


def read_headers(
    source: Source, files: list[str], problems: list[str]
) -> tuple[dict[str, Header], dict[str, Identity]]:
    """Headers and identities by file; what is wrong with them becomes problems.

    Raises:
        CheckpointError: the server does not answer any more.
    """
    headers, identities, found = read_files(
        source, files, read_header, lambda name, why: f"{name} cannot be opened: {why}"
    )
    problems += found
    return headers, identities


def merged(
    headers: dict[str, Header], weight_map: dict[str, str] | None, *, complete: bool, problems: list[str]
) -> dict[str, TensorInfo]:
    """All tensors by name, in file order; what index and headers disagree about becomes problems."""
    tensors: dict[str, TensorInfo] = {}
    for header in headers.values():
        for name, info in sorted(header.tensors.items(), key=lambda item: item[1].offsets):
            if name in tensors:
                problems.append(f"tensor {name!r} is in {tensors[name].file} and in {info.file}. Which one is meant?")
            tensors[name] = info
    if weight_map is None:
        return tensors
    for name, file in weight_map.items():
        if file in headers and name not in headers[file].tensors:
            problems.append(f"tensor {name!r} is not in {file}, where {INDEX} says it is")
    if complete:
        problems += [
            f"tensor {name!r} of {info.file} is not in {INDEX}"
            for name, info in tensors.items()
            if name not in weight_map
        ]
    return tensors
