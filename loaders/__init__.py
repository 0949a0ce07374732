"""Checkpoints, bytes -> named arrays, and what is done on the host around a model. NumPy only."""

from loaders.checkpoint import Checkpoint
from loaders.errors import CheckpointError
from loaders.events import Event
from loaders.files.header import TensorInfo
from loaders.files.opening import open_checkpoint
from loaders.quantization.quantize import quantized
from loaders.reading.plan import LoadReport
from loaders.reading.slices import Slice
from loaders.stage import Stage

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Event",
    "LoadReport",
    "Slice",
    "Stage",
    "TensorInfo",
    "open_checkpoint",
    "quantized",
]
