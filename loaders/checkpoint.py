"""A checkpoint: config, index, headers; all validated before a tensor byte is read."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loaders import dtypes
from loaders.config import config_from_json
from loaders.errors import CheckpointError, brief
from loaders.header import Header, TensorInfo, read_header
from loaders.memory import aligned_empty, as_bools, fill, is_swapped, pieces
from loaders.quantization_config import DOCUMENT as QUANTIZATION
from loaders.slices import Slice, box_of, sizes_of, stream_slices
from loaders.sources import Identity, OpenFile, Session, Source, is_plain, open_source
from loaders.spec import ModelConfig
from loaders.stream import Arrivals
from loaders.strict_json import BadJson, parse_object

CONFIG, SINGLE, INDEX, GENERATION = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
)
DEFAULT_BUDGET_BYTES = 128 << 20
AHEAD_BYTES = 4 << 20  # read ahead into destinations that were given


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Holds no file open; every read checks that its file is still the one that was opened.

    Attributes:
        config: what config.json describes, validated.
        tensors: name -> TensorInfo(dtype, shape, file, offsets), sorted by file and position.
        config_document: config.json as it was written.
        generation_document: generation_config.json as it was written; empty when there is none.
        quantization_document: hf_quant_config.json, likewise.
        metadata: file -> its safetensors metadata.
    """

    source: Source
    config: ModelConfig
    tensors: dict[str, TensorInfo]
    config_document: dict[str, Any]
    generation_document: dict[str, Any]
    quantization_document: dict[str, Any]
    metadata: dict[str, dict[str, str]]
    identities: dict[str, Identity] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end generation: generation_config.json's, else config.json's."""
        found = self.generation_document.get("eos_token_id")
        if found is None:
            return self.config.eos_token_id
        return tuple(found) if isinstance(found, list) else (found,)

    @property
    def pad_token_id(self) -> int | None:
        """What fills a row that has ended: generation_config.json's, else config.json's; None: neither says."""
        found = self.generation_document.get("pad_token_id")
        return self.config.pad_token_id if found is None else found

    def group_of(self, name: str) -> str:
        """What a tensor shares with those that are read at the cost of one; here every tensor is by itself."""
        return name

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """One tensor, in its own dtype and shape (packed sub-byte formats: as bytes).

        Args:
            name: checkpoint tensor name.
            out: array of that dtype and shape to read into, see ``stream``; by default memory of its own.
        Raises:
            KeyError: no such tensor.
            CheckpointError: the file is gone, changed since it was opened, or cannot be read.
        """
        info = self.tensors[name]
        out = self.destination(name, out)
        with self.open_file(info.file) as file:
            self._read_tensor(file, name, out)
        return out

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of one tensor, in memory of its own; little more than its bytes is read, see ``loaders.slices``.

        Args:
            name: checkpoint tensor name.
            index: a slice without a step for each axis, inside of the tensor's (packed sub-byte formats: of bytes).
        Raises:
            KeyError: no such tensor.
            ValueError: an index that is none.
            CheckpointError: as ``read``.
        """
        info = self.tensors[name]
        shape = dtypes.stored_shape(info.dtype, info.shape)
        box = box_of(index, shape)
        part = Slice(shape, box, aligned_empty(sizes_of(box), dtypes.to_numpy(info.dtype)))
        for _ in self.stream_slices({name}, lambda _: [part]):
            pass
        return part.out

    def stream_slices(
        self, names: Collection[str], wanted: Callable[[str], list[Slice]]
    ) -> Iterator[tuple[str, list[np.ndarray]]]:
        """Parts of tensors, each read straight to where it goes, in file order.

        Args:
            names: tensors, all of which are yielded, also those of which nothing is wanted.
            wanted: the parts of one and where they go, asked shortly before they are read.
        Yields:
            A tensor's name and its parts' destinations, in the order they were given.
        Raises:
            ValueError: a part that is no part of its tensor, or does not fit its destination.
            CheckpointError: as ``read``.
        """
        return stream_slices(self, names, wanted)

    def stream(
        self,
        host_budget_bytes: int | None = None,
        *,
        names: Iterable[str] | None = None,
        into: Callable[[str], np.ndarray | None] | None = None,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Tensors in file order, read ahead by a second thread; from a source that reads many files at once in the
        order in which they are complete.

        Each array is memory of its own, never reused, so it may be kept or handed to ``jax.device_put``. A file that
        changed is an error: file by file, of a source that reads many before the last tensor of the file is yielded.

        Args:
            host_budget_bytes: what this iterator may hold at any moment, the tensor just yielded included; default
                128 MiB, or the largest tensor. Memory given by ``into`` does not count, nor do pieces on their way from
                a source that reads many files at once: 64 MiB at most.
            names: only these tensors (default: all).
            into: where a tensor is to go, asked when it is about to be read, shortly before it is yielded. It is read
                straight there and that very array is yielded; None means memory of its own. A view whose last two axes
                are swapped (the tensor is stored transposed) is filled some rows at a time, through 8 MiB of staging.
        Raises:
            KeyError: no such tensor.
            ValueError: a tensor without destination is larger than the budget; said before anything is read, or with
                ``into`` when it is asked for.
            CheckpointError: as ``read``.
        """
        chosen = self.tensors.keys() if names is None else set(names)
        if unknown := chosen - self.tensors.keys():
            raise KeyError(min(unknown))
        wanted = [name for name in self.tensors if name in chosen]
        largest = max((self.tensors[name].num_bytes for name in wanted), default=0)
        budget = max(DEFAULT_BUDGET_BYTES, largest) if host_budget_bytes is None else host_budget_bytes
        if into is None:
            self._check_budget(wanted, budget)
        return self._stream(wanted, into, budget)

    def _check_budget(self, owned: list[str], budget: int) -> None:
        big = {name: size for name in owned if (size := self.tensors[name].num_bytes) > budget}
        if big:
            raise ValueError(
                f"host_budget_bytes={budget} is less than {len(big)} tensors need, the largest {max(big.values())}"
                f" bytes ({next(iter(big))}). Give a larger budget, or a destination for them (into=)."
            )

    def _stream(
        self, wanted: list[str], into: Callable[[str], np.ndarray | None] | None, budget: int
    ) -> Iterator[tuple[str, np.ndarray]]:
        if (session := self._session()) is not None:
            yield from Arrivals(self, session, wanted, into, budget)
            return
        ahead: deque[tuple[str, int, int, Future[np.ndarray]]] = deque()
        waiting = deque(wanted)
        held = given = 0  # bytes of our own, and of destinations that are not yielded yet
        current: OpenFile | None = None

        def read(name: str, out: np.ndarray | None) -> np.ndarray:  # only ever runs on the one worker thread
            nonlocal current
            info = self.tensors[name]
            if current is None or current.name != info.file:
                if current is not None:
                    current.close()
                current = None
                current = self.open_file(info.file)
            out = self.destination(name) if out is None else out
            self._read_tensor(current, name, out)
            return out

        with ThreadPoolExecutor(1, thread_name_prefix="tandem-read") as reader:
            try:
                while waiting or ahead:
                    while waiting and len(ahead) < 64:
                        size = self.tensors[waiting[0]].num_bytes
                        # a destination may be memory that is made when it is asked for: not for all at once
                        if ahead and (held + size > budget or (len(ahead) > 1 and given + size > AHEAD_BYTES)):
                            break
                        name = waiting.popleft()
                        out = into(name) if into else None
                        if out is None:
                            self._check_budget([name], budget)
                        else:
                            self.destination(name, out)
                        cost, lent = (size, 0) if out is None else (0, size)
                        held, given = held + cost, given + lent
                        ahead.append((name, cost, lent, reader.submit(read, name, out)))
                        del out
                    name, cost, lent, future = ahead.popleft()
                    yield name, future.result()
                    del future  # it holds the array just yielded, which no longer counts
                    held, given = held - cost, given - lent
            finally:
                for *_, future in ahead:
                    future.cancel()
                reader.shutdown(wait=True)
                if current is not None:
                    current.close()

    def _session(self) -> Session | None:
        try:
            return self.source.session()
        except OSError as error:
            raise CheckpointError(self.source, [f"it cannot be streamed: {error.strerror or error}"]) from error

    def destination(self, name: str, out: np.ndarray | None = None, budget: int | None = None) -> np.ndarray:
        """Memory that a tensor may be read into: ``out``, if it fits, or new memory of at most ``budget`` bytes.

        Raises:
            ValueError: ``out`` does not fit, or the tensor is larger than the budget.
        """
        info = self.tensors[name]
        expected = dtypes.stored_shape(info.dtype, info.shape), dtypes.to_numpy(info.dtype)
        if out is None:
            self._check_budget([name], info.num_bytes if budget is None else budget)
            return aligned_empty(*expected)
        is_odd = not (out.flags.writeable and (out.flags.c_contiguous or is_swapped(out)))
        if (out.shape, out.dtype) != expected or is_odd:
            raise ValueError(
                f"destination of {name!r} is {out.dtype} {out.shape}{' (read-only or strided)' if is_odd else ''},"
                f" expected writeable C-contiguous {expected[1]} {expected[0]}, or such with its last two axes swapped"
            )
        return out

    def open_file(self, name: str) -> OpenFile:
        """Open one of the files. Raises CheckpointError when it cannot be, or is another than it was."""
        try:
            file = self.source.open(name)
        except OSError as error:
            raise CheckpointError(self.source, [f"{name} cannot be opened: {error.strerror or error}"]) from error
        try:
            self.check_identity(file)
        except BaseException:
            file.close()
            raise
        return file

    def check_identity(self, file: OpenFile) -> None:
        """See that an open file is as it was. Raises CheckpointError when it is not, or cannot be asked."""
        try:
            found = file.identity()
        except OSError as error:
            raise CheckpointError(self.source, [f"{file.name} is gone: {error.strerror or error}"]) from error
        if found != self.identities[file.name]:
            problem = f"{file.name} changed since the checkpoint was opened. Open it again once it is complete."
            raise CheckpointError(self.source, [problem])

    def _read_tensor(self, file: OpenFile, name: str, out: np.ndarray) -> None:
        info = self.tensors[name]
        if info.num_bytes == 0:
            return
        try:
            if out.flags.c_contiguous:
                file.read_into(out.reshape(-1).view(np.uint8).data, info.offsets[0])
            else:
                _read_swapped(file, info.offsets[0], out)
        except OSError as error:
            where = f"tensor {name!r} of {file.name}"
            raise CheckpointError(self.source, [f"{where} cannot be read: {error.strerror or error}"]) from error
        if info.dtype == "BOOL":
            as_bools(out)
        self.check_identity(file)


def _read_swapped(file: OpenFile, start: int, out: np.ndarray) -> None:
    """Read a tensor some rows at a time into a view whose last two axes are swapped."""
    staging = np.empty(0, np.uint8)
    for position, piece in pieces(out):
        if staging.size < piece.nbytes:  # the first is the largest
            staging = aligned_empty((piece.nbytes,), np.dtype(np.uint8))
        file.read_into(staging[: piece.nbytes].data, start + position)
        fill(piece, staging[: piece.nbytes])


def open_checkpoint(uri: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face checkpoint: ``config.json`` with ``model.safetensors``, or with an index and its files.

    Only JSON and headers are read.

    Raises:
        CheckpointError: with every problem found in the directory, config.json, the index and all headers.
    """
    try:
        source = open_source(uri)
        present = source.names()
    except OSError as error:
        raise CheckpointError(uri, [f"cannot be opened: {error.strerror or error}"]) from error
    problems: list[str] = []
    config = None
    document = _read_json(source, CONFIG, problems)
    generation = _read_json(source, GENERATION, problems) if GENERATION in present else {}
    quantization = _read_json(source, QUANTIZATION, problems) if QUANTIZATION in present else None
    problems += _generation_problems(generation or {})
    index = _read_json(source, INDEX, problems) if INDEX in present else None
    weight_map = _weight_map(index, problems) if index is not None else None
    files = _files(present, weight_map, INDEX in present, problems)
    headers, identities = _read_headers(source, files, problems)
    tensors = _merge(headers, weight_map, complete=len(headers) == len(files), problems=problems)
    if document is not None:
        config, found = config_from_json(document, beside=quantization, found=tensors)
        problems = found + problems
    if problems or config is None or document is None:
        raise CheckpointError(source, problems)
    metadata = {name: header.metadata for name, header in headers.items()}
    return Checkpoint(source, config, tensors, document, generation or {}, quantization or {}, metadata, identities)


def _read_json(source: Source, name: str, problems: list[str]) -> dict[str, Any] | None:
    try:
        return parse_object(source.read_file(name))
    except BadJson as error:
        problems.append(f"{name} {error}")
    except OSError as error:
        problems.append(f"{name} cannot be read: {error.strerror or error}. Is this a Hugging Face checkpoint?")
    return None


def _generation_problems(generation: dict[str, Any]) -> list[str]:
    found = generation.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    problems = []
    if not all(type(token) is int for token in ids):
        problems.append(f"{GENERATION}: eos_token_id is {brief(found)}, expected an integer or a list of integers")
    pad = generation.get("pad_token_id")
    if pad is not None and type(pad) is not int:
        problems.append(f"{GENERATION}: pad_token_id is {brief(pad)}, expected an integer")
    return problems


def _weight_map(index: dict[str, Any], problems: list[str]) -> dict[str, str]:
    found = index.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        problems.append(f"{INDEX}: weight_map must map tensor names to file names")
        return {}
    outside = {file for file in found.values() if not is_plain(file)}
    problems += [
        f"{INDEX} names the file {brief(file)}, outside the checkpoint directory. Files are named without a path."
        for file in sorted(outside)
    ]
    return {tensor: file for tensor, file in found.items() if file not in outside}


def _files(present: list[str], weight_map: dict[str, str] | None, has_index: bool, problems: list[str]) -> list[str]:
    """The safetensors files to read; missing and extra ones become problems."""
    found = [name for name in present if name.endswith(".safetensors")]
    if has_index:
        named = set((weight_map or {}).values())
        problems += [f"{name} is named in {INDEX} but missing. Download it." for name in sorted(named - set(found))]
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


def _read_headers(
    source: Source, files: list[str], problems: list[str]
) -> tuple[dict[str, Header], dict[str, Identity]]:
    headers: dict[str, Header] = {}
    identities: dict[str, Identity] = {}
    for name in files:
        try:
            with source.open(name) as file:
                identities[name] = file.identity()
                header, found = read_header(file)
        except OSError as error:
            problems.append(f"{name} cannot be opened: {error.strerror or error}")
            continue
        problems += found
        if header is not None:
            headers[name] = header
    return headers, identities


def _merge(
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
