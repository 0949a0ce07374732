"""Reading one tensor: every dtype of the format, as the bytes that lie in the file."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from handmade import entry, safetensors, write

from loaders import Checkpoint, dtypes, open_checkpoint

BYTES = bytes(range(48))


EVERY_DTYPE = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F4": np.uint8,
}


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_every_dtype_reads_as_the_bytes_of_the_file(tmp_path: Path, dtype: str) -> None:
    numpy_dtype = np.dtype(EVERY_DTYPE[dtype])
    columns = 48 if dtype == "F4" else 24 // numpy_dtype.itemsize
    raw = BYTES if dtype != "BOOL" else b"\0\1" * 24
    # one byte before it, so that nothing is aligned in the file
    file = safetensors({"first": entry("U8", [1], 0, 1), "a": entry(dtype, [2, columns], 1, 49)}, b"x" + raw)
    checkpoint = open_checkpoint(write(tmp_path, {"model.safetensors": file}))
    found = checkpoint.read("a")
    assert checkpoint.tensors["a"].shape == (2, columns)
    assert (found.dtype, found.shape) == (numpy_dtype, (2, 24 // numpy_dtype.itemsize))
    assert found.tobytes() == raw
    assert found.ctypes.data % 64 == 0
    assert found.flags.writeable


def test_the_dtype_table_is_what_is_read() -> None:
    assert set(EVERY_DTYPE) == dtypes.NAMES
    for name, numpy_dtype in EVERY_DTYPE.items():
        assert dtypes.to_numpy(name) == np.dtype(numpy_dtype)
        if name != "F4":
            assert dtypes.from_numpy(np.dtype(numpy_dtype)) == name
    with pytest.raises(ValueError, match="safetensors has no name for dtype >f4"):
        dtypes.from_numpy(np.dtype(">f4"))


def test_true_is_true_whatever_byte_says_so(tmp_path: Path) -> None:
    file = safetensors({"a": entry("BOOL", [4], 0, 4)}, b"\0\1\2\xff")
    found = open_checkpoint(write(tmp_path, {"model.safetensors": file})).read("a")
    assert found.tobytes() == b"\0\1\1\1"


def test_nan_and_infinity_read_bit_for_bit(tmp_path: Path) -> None:
    raw = np.array([0x7FC00001, 0xFF800000, 0x80000000], np.uint32).tobytes()
    file = safetensors({"a": entry("F32", [3], 0, 12)}, raw)
    assert open_checkpoint(write(tmp_path, {"model.safetensors": file})).read("a").tobytes() == raw


@pytest.mark.parametrize("shape", [[], [0], [3, 0, 1 << 40]])
def test_scalars_and_empty_tensors_read(tmp_path: Path, shape: list[int]) -> None:
    size = 0 if 0 in shape else 4
    file = safetensors({"a": entry("F32", shape, 0, size)}, b"\0\0\x80\x3f"[:size])
    found = open_checkpoint(write(tmp_path, {"model.safetensors": file})).read("a")
    assert (found.shape, found.dtype) == (tuple(shape), np.float32)
    assert found.tolist() == (1.0 if not shape else np.zeros(shape).tolist())


@pytest.fixture
def floats(tmp_path: Path) -> Checkpoint:
    file = safetensors({"a": entry("F32", [2, 3], 0, 24)}, np.arange(6, dtype=np.float32).tobytes())
    return open_checkpoint(write(tmp_path, {"model.safetensors": file}))


def test_a_tensor_reads_into_memory_that_is_given(floats: Checkpoint) -> None:
    stack = np.full((4, 2, 3), -1, np.float32)
    found = floats.read("a", out=stack[2])
    assert np.shares_memory(found, stack)
    np.testing.assert_array_equal(stack[2], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(stack[[0, 1, 3]], np.full((3, 2, 3), -1))


def test_a_tensor_that_is_stored_transposed_reads_into_memory_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    file = safetensors({"a": entry("F32", [2, 5, 3], 0, stored.nbytes)}, stored.tobytes())
    checkpoint = open_checkpoint(write(tmp_path, {"model.safetensors": file}))
    for staging_bytes in (1, 24, 36, 1 << 20):  # a row at a time at least, all rows of a matrix at most
        monkeypatch.setattr("loaders.reading.memory.STAGING_BYTES", staging_bytes)
        memory = np.full((2, 3, 5), -1, np.float32)
        found = checkpoint.read("a", out=memory.swapaxes(1, 2))
        assert np.shares_memory(found, memory)
        np.testing.assert_array_equal(memory, stored.transpose(0, 2, 1))
        memory[...] = -1
        ((_, streamed),) = checkpoint.stream(into=lambda name, memory=memory: memory.swapaxes(1, 2))
        assert np.shares_memory(streamed, memory)
        np.testing.assert_array_equal(memory, stored.transpose(0, 2, 1))


@pytest.mark.parametrize(
    "out",
    [
        pytest.param(np.zeros((3, 2), np.float32), id="other shape"),
        pytest.param(np.zeros((6,), np.float32), id="flat"),
        pytest.param(np.zeros((2, 3), np.int32), id="other dtype"),
        pytest.param(np.broadcast_to(np.float32(0), (2, 3)), id="read-only broadcast"),
        pytest.param(np.frombuffer(bytes(24), np.float32).reshape(2, 3), id="read-only"),
    ],
)
def test_memory_that_does_not_fit_is_refused(floats: Checkpoint, out: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"destination of 'a' is .*, expected writeable float32 \(2, 3\)"):
        floats.read("a", out=out)


@pytest.mark.parametrize(
    "out", [np.zeros((2, 6), np.float32)[:, ::2], np.zeros((3, 4), np.float32)[:, ::2].T, np.zeros((3, 2), "f4").T]
)
def test_memory_may_be_strided(floats: Checkpoint, out: np.ndarray) -> None:
    assert floats.read("a", out=out) is out
    np.testing.assert_array_equal(out, floats.read("a"))


def test_an_unknown_name_is_a_key_error(floats: Checkpoint) -> None:
    with pytest.raises(KeyError, match="'b'"):
        floats.read("b")
