"""The way from the host to a device: page-locked memory, copies that nobody waits for, and what was copied remembered.

A copy from memory that the system may move goes through a buffer of the driver's, page by page: on one H200 at a sixth
of what the bus carries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType

import numpy as np
import torch
from torch.nn import functional as F

from loaders.reading.memory import thread_count
from loaders.reading.scratch import Staging

PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device
PAGE_BYTES = 4096
PROVIDED_BYTES = 64 << 20  # by a thread at a time
COMPARED_BYTES = 16 << 20  # at a time on a device, which may have little room left
BLOCK = 256, 512  # words of 8 bytes that are added up, 1 MiB; of less as many rows as it takes
# splitmix64's, as int64
GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15

Holds = Callable[[torch.Tensor], bool]  # whether a tensor of the device holds what another one held


class DeviceStaging(Staging):
    """Memory that parameters are read into on their way to ``device``, the same for one reading after the other.

    On the CPU it is plain memory, and everything is done at once. A context manager: at its end all copies have been
    made, and the memory is let go of.

    Args:
        device: where parameters go.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._exits = ExitStack()
        self._memory = np.empty(0, np.uint8)

    def __enter__(self) -> DeviceStaging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.let_go()

    def empty(self, num_bytes: int) -> np.ndarray:
        self.settle()
        if num_bytes > self._memory.nbytes:
            self.let_go()
            memory = super().empty(num_bytes)
            self._exits.enter_context(page_locked(memory, self.device))
            self._memory = memory
        return self._memory[:num_bytes]

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def let_go(self) -> None:
        """Give the memory back, once nobody reads it any more. What is read from now on gets other memory."""
        try:
            self.settle()
        finally:
            self._exits.close()
            self._memory = np.empty(0, np.uint8)

    def placed(self, value: torch.Tensor) -> torch.Tensor:
        """A copy on the device; on the CPU what was given."""
        if self.device.type == "cpu":
            return value
        placed = torch.empty_like(value, device=self.device)
        self.send(value, placed)
        return placed

    def send(self, value: torch.Tensor, to: torch.Tensor) -> None:
        """Copy a value; one in page-locked memory is copied by the device, in its own time."""
        # of other memory nobody says when it has been read, and it may be gone by then
        to.copy_(value, non_blocking=to.device == self.device and self._is_locked(value))

    def remembered(self, value: torch.Tensor) -> Holds:
        """What tells whether a tensor of the device holds the bytes of ``value``.

        CUDA gets ``value`` a second time for this, piece by piece, and adds it up by itself: neither the host nor
        anybody waits. So its bytes are those that its memory has when the device comes to it, as they are of the copy:
        that memory is not written before is for ``settle`` to see to, and cannot be told from this.
        """
        sums = _sums(value, self.device, is_lasting=self._is_locked(value))
        return lambda held: torch.equal(_sums(held, self.device), sums)

    def _is_locked(self, value: torch.Tensor) -> bool:
        return self.device.type == "cuda" and value.device.type == "cpu" and value.is_pinned()


@contextmanager
def page_locked(memory: np.ndarray, device: torch.device) -> Iterator[None]:
    """Lock memory for as long as this lasts, so that a CUDA device reads it by itself; where it cannot be, nothing is.

    It costs 25 ms a GiB; what torch allocates page-locked takes 20 times that. What the system has not provided yet it
    does now, for several threads at once.
    """
    if device.type != "cuda" or not memory.nbytes:
        yield
        return
    provide(memory)
    runtime, address = torch.cuda.cudart(), memory.ctypes.data
    assert runtime is not None, "it is there with CUDA"
    with torch.cuda.device(device):
        is_locked = int(runtime.cudaHostRegister(address, memory.nbytes, PORTABLE)) == 0
        if not is_locked:
            with suppress(RuntimeError):  # the next call takes the error along, which is not its own
                torch.zeros(1, device=device)
    try:
        yield
    finally:
        if is_locked:
            with torch.cuda.device(device):
                runtime.cudaHostUnregister(address)


def provide(memory: np.ndarray) -> None:
    """Have the system provide all pages of new memory, uint8, whose bytes stay what they are."""
    starts = range(0, memory.nbytes, PROVIDED_BYTES)
    if len(starts) < 2:
        return
    parts = (memory[start : start + PROVIDED_BYTES : PAGE_BYTES] for start in starts)
    with ThreadPoolExecutor(thread_count()) as pool:
        for _ in pool.map(lambda pages: np.bitwise_or(pages, 0, out=pages), parts):
            pass


def pieces(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Flat bytes in parts that a device looks at one after the other."""
    return flat.split(COMPARED_BYTES)


def _sums(tensor: torch.Tensor, device: torch.device, *, is_lasting: bool = False) -> torch.Tensor:
    """One number, int64, of every MiB of a tensor: of its sums along rows and along columns, so that what lies
    elsewhere is seen too, each mixed with its place.

    Args:
        tensor: with values.
        device: where they are added up.
        is_lasting: whether ``tensor`` is in page-locked memory that is there until the device has read it.
    """
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if not flat.numel():
        return torch.empty(0, dtype=torch.int64, device=device)
    rows = min(BLOCK[0], -(-flat.numel() // (8 * BLOCK[1])))
    places = GOLDEN * torch.arange(1, 1 + rows + BLOCK[1], device=device)
    found = []
    for piece in pieces(flat):
        held = piece.to(device, non_blocking=is_lasting)
        if more := -held.numel() % (8 * rows * BLOCK[1]):
            held = F.pad(held, (0, more))
        elif held.data_ptr() % 8 or held.storage_offset() % 8:
            held = held.clone()
        words = held.view(torch.int64).view(-1, rows, BLOCK[1])
        sums = torch.cat([words.sum(dim=1), words.sum(dim=2)], dim=1) + places
        del held, words  # before the next piece comes
        for by, factor in ((30, FIRST), (27, SECOND), (31, 1)):
            sums = (sums ^ (sums >> by & (1 << 64 - by) - 1)) * factor  # without the sign that int64 shifts in
        found.append(sums.sum(dim=1))
    return torch.cat(found)
