"""TPU generations: what one device of each has, and the slices they come in.

A device is what JAX counts: a chip, but of tpu7x half of one. Sizes and rates are per device, from Google's public
specifications (cloud.google.com/tpu/docs: v5e, v5p, v6e, tpu7x), but v5p's HBM, which is 95 GB there and 96 to JAX and
libtpu.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One generation.

    Attributes:
        hbm_bytes: of a device.
        reserved_bytes: what the compiler leaves to the runtime; of what is left libtpu says so where it does not do.
        bandwidth: of HBM, bytes a second.
        flops: products and sums in bfloat16, a second.
        devices: of a chip.
        topologies: slices one may ask for, as chips along each axis, from small to large.
        host: the smallest slice that the compiler describes; a smaller one is cut out of it.
    """

    name: str
    hbm_bytes: int
    reserved_bytes: int
    bandwidth: float
    flops: float
    devices: int
    topologies: tuple[str, ...]
    host: str

    @property
    def usable_bytes(self) -> int:
        """What a program may take."""
        return self.hbm_bytes - self.reserved_bytes

    def num_devices(self, topology: str) -> int:
        """Of a slice.

        Raises:
            ValueError: it is no slice of this chip.
        """
        if topology not in self.topologies:
            raise ValueError(f"{self.name} has no topology {topology!r}, expected one of {', '.join(self.topologies)}")
        return self.devices * math.prod(int(size) for size in topology.split("x"))

    def no_part(self, topology: str, size: int, why: str) -> str:
        """What is said where libtpu refuses a mesh of ``size`` devices, which are part of a slice."""
        return (
            f"libtpu compiles nothing for {size} of the {self.num_devices(topology)} devices of {self.name}:{topology}."
            f" Name a slice of as many, or a mesh of all of them. It says: {why}"
        )


_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 16 * GIB, GIB // 4, 819e9, 197e12, 1, _PLANE, "2x2"),
        Chip("v5p", 96 * GIB, 27 * GIB // 100, 2765e9, 459e12, 1, _CUBE, "2x2x1"),
        Chip("v6e", 32 * GIB, 3 * GIB // 4, 1640e9, 918e12, 1, _PLANE, "2x2"),
        Chip("tpu7x", 96 * GIB, 5 * GIB // 4, 3690e9, 1153e12, 2, _CUBE, "2x2x1"),
    )
}


def chip_of(name: str) -> Chip:
    """By name.

    Raises:
        ValueError: there is no such chip.
    """
    if name not in CHIPS:
        raise ValueError(f"chip is {name!r}, expected one of {', '.join(CHIPS)}")
    return CHIPS[name]
