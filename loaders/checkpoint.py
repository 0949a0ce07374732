"""An opened checkpoint: what it says of itself, and its tensors, streamed whole, in slices or in regions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from loaders import dtypes
from loaders.errors import CheckpointError, reason
from loaders.files.header import TensorInfo
from loaders.files.parallel import PinnedFiles
from loaders.reading.memory import aligned_empty, check_budget
from loaders.reading.regions import Region, check_region
from loaders.reading.slices import Slice, in_parts
from loaders.sources import Source, Unreachable
from loaders.spec import ModelConfig
from loaders.stream import Arrivals, Begun, Result

DEFAULT_BUDGET_BYTES = 128 << 20
NUM_SAMPLES, SAMPLE_BYTES = 16, 256  # of a fingerprint


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """An opened checkpoint. Holds no file open; every read checks that its file is still the one that was opened.

    Attributes:
        config: what config.json describes, validated.
        tensors: name -> TensorInfo(dtype, shape, file, offsets), sorted by file and position.
        config_document: config.json as it was written.
        generation_document: generation_config.json as it was written; empty when there is none.
        quantization_document: hf_quant_config.json, likewise.
        metadata: file -> its safetensors metadata.
        files: of the tensors, as they were when their headers were read.
        documents: JSON, as it was when it was read: beside other tensors it may mean another model.
    """

    config: ModelConfig
    tensors: dict[str, TensorInfo]
    config_document: dict[str, Any]
    generation_document: dict[str, Any]
    quantization_document: dict[str, Any]
    metadata: dict[str, dict[str, str]]
    files: PinnedFiles
    documents: PinnedFiles

    def __repr__(self) -> str:
        what = f"{self.config.architecture}, {len(self.tensors)} tensors, {self.num_bytes / 1e9:.3g} GB"
        return f"{type(self).__name__}({str(self.source)!r}, {what})"

    @property
    def source(self) -> Source:
        """Where it lies."""
        return self.files.source

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

    def endings(self, *, ignore_eos: bool = False) -> tuple[np.ndarray, int]:
        """Tokens that end a row, int64 [n], with ``ignore_eos`` none; and what fills one that has ended.

        That is the pad token, else the first of them, else 0.
        """
        ends = np.array([] if ignore_eos else self.eos_token_ids, np.int64)
        pad = self.pad_token_id
        return ends, pad if pad is not None else (int(ends[0]) if len(ends) else 0)

    def group_of(self, name: str) -> str:
        """What a tensor shares with those that are read at the cost of one; here every tensor is by itself."""
        return name

    def passing(self, names: Iterable[str]) -> dict[str, int]:
        """Tensors that reading these into place has on the host for a moment, and their bytes; here there are none."""
        return {}

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """One tensor, in its own dtype and shape (packed sub-byte formats: as bytes).

        Args:
            name: checkpoint tensor name.
            out: array of that dtype and shape to read into, see ``stream``; by default memory of its own.
        Raises:
            KeyError: no such tensor.
            CheckpointError: the file is gone, changed since it was opened, or cannot be read.
        """
        return self.read_slice(name, (), out)

    def read_slice(self, name: str, index: tuple[int | slice, ...], out: np.ndarray | None = None) -> np.ndarray:
        """``read(name)[index]``, and of the file little more than that.

        Args:
            name: checkpoint tensor name.
            index: integers, and slices of step 1; see ``loaders.reading.slices.Slice``.
            out: array of the part's shape to read into; by default memory of its own.
        Raises:
            KeyError, IndexError: no such tensor, or no such part of it.
            ValueError: an index of another kind.
            CheckpointError: as ``read``.
        """
        part = Slice(name, index)
        ((_, found),) = self.stream_slices([part], into=None if out is None else lambda _: out)
        return found

    def stream(
        self,
        host_budget_bytes: int | None = None,
        *,
        names: Iterable[str] | None = None,
        lots: Iterable[Collection[str]] | None = None,
        into: Callable[[str], np.ndarray | None] | None = None,
    ) -> Generator[tuple[str, np.ndarray]]:
        """Tensors in file order, read ahead by a few threads; from object storage in the order in which they arrive.

        Each array is memory of its own, never reused, so it may be kept or handed to ``jax.device_put``. A file that
        changed is an error before a tensor of it is yielded; in object storage, where asking is dear, before the last
        of all is.

        Args:
            host_budget_bytes: what this iterator may hold at any moment, the tensor just yielded included, and 2 kB of
                Python's objects for each; default 128 MiB, or the largest tensor. Memory given by ``into`` does not
                count, nor does what is on its way: past the page cache 8 MiB for each of four threads; from object
                storage 64 MiB at most, beside what the store's client keeps for itself (of S3's up to 130 MiB were
                seen, and 25 that stay).
            names: only these tensors (default: all).
            lots: these, lot by lot: nothing of one is begun, or asked for a destination, before the last was yielded.
            into: where a tensor is to go, asked when it is about to be read, shortly before it is yielded. It is read
                straight there and that very array is yielded; None means memory of its own. A strided view (the tensor
                is stored transposed) is filled some rows at a time, through 8 MiB of staging for each thread.
        Raises:
            KeyError: no such tensor.
            ValueError: a tensor without destination is larger than the budget; said before anything is read, or with
                ``into`` when it is asked for. Or ``names`` is one name, or given beside ``lots``.
            CheckpointError: as ``read``.
        """
        wanted = self._whole(self.lots_of(names, lots))
        given = None if into is None else lambda part: into(part.name)
        check_budget(host_budget_bytes)
        return _named(self._stream(wanted, given, host_budget_bytes))

    def stream_slices(
        self,
        slices: Iterable[Slice],
        host_budget_bytes: int | None = None,
        *,
        into: Callable[[Slice], np.ndarray | None] | None = None,
    ) -> Iterator[tuple[Slice, np.ndarray]]:
        """Parts of tensors, as ``stream`` has whole ones: of a file little more is read than what they are.

        Args:
            slices: what is wanted, see ``loaders.Slice``; also several parts of one tensor, ``slices`` has such.
            host_budget_bytes: as ``stream``.
            into: likewise.
        Raises:
            KeyError, IndexError: no such tensor, or no such part of it; said before anything is read.
            ValueError, CheckpointError: as ``stream``.
        """
        order, slices = self._order, list(slices)
        self._check_known({one.name for one in slices if one.name not in order})
        found = sorted(
            (order[one.name], one.bounds(self.stored_shape(one.name)), at, one) for at, one in enumerate(slices)
        )
        check_budget(host_budget_bytes)
        return self._stream([[one for *_, one in found]], into, host_budget_bytes)

    def stream_regions(
        self,
        lots: Iterable[Collection[str]],
        wanted: Callable[[str], list[Region]],
        host_budget_bytes: int | None = None,
    ) -> Iterator[tuple[str, list[np.ndarray]]]:
        """Regions of tensors, as ``stream`` has whole ones: rows that several of them lie in are read once.

        Args:
            lots: tensors, as for ``stream``; all are yielded, those of which nothing is wanted as soon as that is
                known.
            wanted: the regions of one and where they go, asked shortly before they are read.
            host_budget_bytes: of destinations filled or waited for, the tensor just yielded included, unless one alone
                takes more; None: they do not count.
        Yields:
            A tensor's name and its regions' destinations, in the order they were given.
        Raises:
            ValueError: a region that is no part of its tensor, or does not fit its destination.
            CheckpointError: as ``read``.
        """
        check_budget(host_budget_bytes)
        num_bytes = 0 if host_budget_bytes is None else 1

        def begin(part: Slice) -> Begun[tuple[str, list[np.ndarray]]]:
            regions = self.regions(part.name, wanted)
            arrays = [region.out for region in regions]
            return Begun((part.name, arrays), regions, num_bytes * sum(array.nbytes for array in arrays))

        return self._arrivals(self._whole(lots), begin, host_budget_bytes or DEFAULT_BUDGET_BYTES)

    def regions(self, name: str, wanted: Callable[[str], list[Region]]) -> list[Region]:
        """What is wanted of a tensor. Raises ValueError: a region that is no part of it, or fits no destination."""
        found = wanted(name)
        for part in found:
            check_region(part, name, self.stored_shape(name), dtypes.to_numpy(self.tensors[name].dtype))
        return found

    def fingerprint(self) -> str:
        """What tells this checkpoint from others, wherever a copy of it lies: all that it says, and samples of weights.

        For processes that have to load the same one. Two whose samples are equal may still differ. Raises
        CheckpointError as ``read``.
        """
        documents = (self.config_document, self.generation_document, self.quantization_document)
        found = hashlib.sha256(json.dumps(documents, sort_keys=True).encode())
        for name in sorted(self.tensors):
            found.update(f"{name} {self.tensors[name].dtype} {self.tensors[name].shape}\n".encode())
        names = sorted(name for name, info in self.tensors.items() if info.num_bytes)
        chosen = names[:: -(-len(names) // NUM_SAMPLES)] if names else []
        try:
            for sample in self.source.in_parallel(self._sample, chosen):
                found.update(sample)
        except Unreachable as error:
            raise CheckpointError(self.source, [str(error)]) from error
        except OSError as error:
            raise CheckpointError(self.source, [f"it cannot be opened: {reason(error)}"]) from error
        return found.hexdigest()[:16]

    def _sample(self, name: str) -> bytes:
        info = self.tensors[name]
        with self.files.open(info.file) as file:
            try:
                return file.read(info.offsets[0], min(info.num_bytes, SAMPLE_BYTES))
            except Unreachable as error:
                raise Unreachable(f"tensor {name!r} of {info.file} cannot be read: {error}") from error
            except OSError as error:
                problem = f"tensor {name!r} of {info.file} cannot be read: {reason(error)}"
                raise CheckpointError(self.source, [problem]) from error

    def slices(self, most_bytes: int, names: Iterable[str] | None = None) -> Iterator[Slice]:
        """Tensors (default: all), whole or in rows, so that each part has at most ``most_bytes``.

        For ``stream_slices``, of tensors that are larger than memory.
        """
        for name in self.tensors if names is None else _several(names):
            itemsize = dtypes.to_numpy(self.tensors[name].dtype).itemsize
            yield from in_parts(name, self.stored_shape(name), itemsize, most_bytes)

    def names_of(self, names: Iterable[str] | None) -> Collection[str]:
        """Those that are asked for, by default all. Raises KeyError: no such tensor; ValueError: it is one name."""
        chosen = self.tensors.keys() if names is None else set(_several(names))
        self._check_known(chosen - self.tensors.keys())
        return chosen

    def _check_known(self, unknown: Collection[str]) -> None:
        """Raises KeyError: some of what was asked for is not there."""
        if unknown:
            raise KeyError(f"{self.source} has no tensor {min(unknown)!r}")

    def lots_of(self, names: Iterable[str] | None, lots: Iterable[Collection[str]] | None) -> Iterable[Collection[str]]:
        """What is asked for, by default all in one lot. Raises as ``names_of``; ValueError: both are given."""
        if lots is None:
            return [self.names_of(names)]
        if names is not None:
            raise ValueError("names and lots are given, expected one of them")
        return map(self.names_of, lots)

    def _whole(self, lots: Iterable[Collection[str]]) -> list[list[Slice]]:
        """Tensors by name, each lot in file order. Raises KeyError: no such tensor."""
        return [[Slice(name) for name in sorted(lot, key=self._order.__getitem__)] for lot in lots]

    @cached_property
    def _order(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.tensors)}

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor as it is read: packed sub-byte formats as bytes."""
        info = self.tensors[name]
        return dtypes.stored_shape(info.dtype, info.shape)

    def num_bytes_of(self, part: Slice) -> int:
        """Of a part of a tensor, or of all of it."""
        info = self.tensors[part.name]
        if not part.index:
            return info.num_bytes
        return math.prod(part.shape(self.stored_shape(part.name))) * dtypes.to_numpy(info.dtype).itemsize

    def _check_budget(self, owned: list[Slice], budget: int) -> None:
        big = {part.name: size for part in owned if (size := self.num_bytes_of(part)) > budget}
        if big:
            largest = max(big, key=big.__getitem__)
            raise ValueError(
                f"host_budget_bytes={budget} is less than {len(big)} tensors need, the largest {big[largest]}"
                f" bytes ({largest}). Give a larger budget or a destination for them (into=), or read them in"
                " parts (stream_slices)."
            )

    def _stream(
        self, lots: list[list[Slice]], into: Callable[[Slice], np.ndarray | None] | None, budget: int | None
    ) -> Iterator[tuple[Slice, np.ndarray]]:
        if budget is None:
            budget = max([DEFAULT_BUDGET_BYTES, *(self.num_bytes_of(part) for lot in lots for part in lot)])
        if into is None:
            self._check_budget([part for lot in lots for part in lot], budget)

        def begin(part: Slice) -> Begun[tuple[Slice, np.ndarray]]:
            given = into(part) if into else None
            out = self.destination(part, given, budget)
            region = part.region(self.stored_shape(part.name), out)
            return Begun((part, out), [region], out.nbytes if given is None else 0)

        return self._arrivals(lots, begin, budget)

    def _arrivals(
        self, lots: list[list[Slice]], begin: Callable[[Slice], Begun[Result]], budget: int
    ) -> Iterator[Result]:
        yield from Arrivals(self.files, self.tensors, lots, begin, self.num_bytes_of, budget)

    def destination(self, wanted: str | Slice, out: np.ndarray | None = None, budget: int | None = None) -> np.ndarray:
        """Memory that a tensor, or a part of it, may be read into: ``out``, or new memory of at most ``budget`` bytes.

        Raises:
            ValueError: ``out`` does not fit, or what is wanted is larger than the budget.
        """
        part = Slice(wanted) if isinstance(wanted, str) else wanted
        shape, dtype = self.stored_shape(part.name), dtypes.to_numpy(self.tensors[part.name].dtype)
        expected = part.shape(shape), dtype
        if out is None:
            if budget is not None:
                self._check_budget([part], budget)
            return aligned_empty(*expected)
        if not isinstance(out, np.ndarray):
            found = f"destination of {part.name!r} is a {type(out).__name__}"
            raise ValueError(f"{found}, expected a writeable NumPy array, {dtype} {expected[0]}")
        if (out.shape, out.dtype) != expected or not out.flags.writeable:
            raise ValueError(
                f"destination of {part.name!r} is {out.dtype} {out.shape}{' (read-only)' * (not out.flags.writeable)},"
                f" expected writeable {dtype} {expected[0]}"
            )
        return out


def _several(names: Iterable[str]) -> Iterable[str]:
    if isinstance(names, str):  # whose letters would be names
        raise ValueError(f"names={names!r} is one name, expected several: [{names!r}]")
    return names


def _named(parts: Iterator[tuple[Slice, np.ndarray]]) -> Generator[tuple[str, np.ndarray]]:
    for part, array in parts:
        yield part.name, array
        del array  # nobody holds it while the next one is read
