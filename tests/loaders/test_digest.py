"""Digests: what makes two weights equal, written out so that they stay comparable between versions."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from handmade import CONFIG

from loaders import open_checkpoint
from loaders.digest import digests, root_digest, tensor_digest
from loaders.writing.writer import TensorType, write_checkpoint

ONES = np.ones((2, 3), np.float32)


def test_a_digest_is_this_number_for_ever() -> None:
    # printf 'F32[2, 3]\x00\x00\x80\x3f...' | sha256sum, and so on
    assert tensor_digest(ONES) == "7593dbdaa273f7fe5f9f9a9efdb851b18aadb37ecd7379811d3dfc3a04f75880"
    scalar, empty = np.float32(1.0).reshape(()), np.zeros((0, 3), ml_dtypes.bfloat16)
    assert tensor_digest(scalar) == "12b0cb7e19ff333078425599375de5d3ab9893c270de5970ba07f46917807b0a"
    assert tensor_digest(empty) == "7601b3cabf6bc1cd8092d555d48bb84a78c0b2d6c0d3bb47d88ad965657b4f56"
    root = root_digest({"a": "1", "b": "2"})
    assert root == "1a04f75bd0704a1e3a5609aa6cef325ce65e2ccde2c36252d0e2fc2ddcb5762d"


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(np.ones((3, 2), np.float32), id="shape"),
        pytest.param(np.ones((2, 3, 1), np.float32), id="rank"),
        pytest.param(np.ones((2, 3), np.float32).view(np.int32), id="dtype, same bytes"),
        pytest.param(np.ones((2, 3), ml_dtypes.bfloat16), id="dtype, same values"),
        pytest.param(np.nextafter(ONES, np.float32(2)), id="last bit"),
    ],
)
def test_another_dtype_shape_or_bit_is_another_digest(other: np.ndarray) -> None:
    assert tensor_digest(other) != tensor_digest(ONES)


def test_zeros_of_either_sign_differ() -> None:
    zeros = np.zeros(3, np.float32)
    assert tensor_digest(zeros) != tensor_digest(-zeros)


def test_memory_order_and_place_do_not_matter() -> None:
    square = np.arange(12, dtype=ml_dtypes.bfloat16).reshape(3, 4)
    stack = np.stack([square * 0, square])
    expected = tensor_digest(square)
    assert tensor_digest(np.asfortranarray(square)) == expected
    assert tensor_digest(stack[1]) == expected
    assert tensor_digest(square.T.copy().T) == expected


def test_a_packed_format_is_named_with_its_logical_shape() -> None:
    packed = np.arange(6, dtype=np.uint8).reshape(2, 3)
    named = tensor_digest(packed, dtype="F4", shape=(2, 6))
    assert named != tensor_digest(packed)
    assert named != tensor_digest(packed, dtype="F4", shape=(4, 3))
    assert named == tensor_digest(packed, dtype="F4", shape=(np.int64(2), np.int64(6)))


def test_the_root_depends_on_every_name_and_digest_and_on_no_order() -> None:
    base = {"a": "1", "b": "2"}
    assert root_digest({"b": "2", "a": "1"}) == root_digest(base)
    for other in ({"a": "1"}, {"a": "2", "b": "1"}, {"a": "1", "c": "2"}, {"a": "1", "b": "2", "c": "3"}, {}):
        assert root_digest(other) != root_digest(base)


def test_how_a_checkpoint_is_cut_into_files_does_not_matter(tmp_path: Path) -> None:
    arrays = {name: np.full((4, 4), value, np.float32) for name, value in {"b": 1, "a": 2, "c": 3}.items()}
    plan = {name: TensorType.of(array) for name, array in arrays.items()}
    roots = set()
    for number, max_file_bytes in enumerate((64, 128, 1 << 20)):
        directory = write_checkpoint(
            tmp_path / str(number), plan, arrays.__getitem__, config=CONFIG, max_file_bytes=max_file_bytes
        )
        found = digests(open_checkpoint(directory).stream())
        assert list(found) == ["a", "b", "c"]
        roots.add(root_digest(found))
    assert roots == {root_digest(digests(arrays.items()))}
