"""Every way a safetensors header can be wrong: facts/loaders.md, section 4."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import handmade
import numpy as np
import pytest
from handmade import entry, framed, safetensors
from safetensors.numpy import save

from loaders import TensorInfo
from loaders.files.header import Header, read_header
from loaders.sources.local import LocalFile


def read(path: Path) -> tuple[Header | None, list[str]]:
    with LocalFile(path) as file:
        return read_header(file)


def read_bytes(tmp_path: Path, raw: bytes) -> tuple[Header | None, list[str]]:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    return read(path)


FOUR = b"\1\2\3\4"
F32 = entry("F32", [1], 0, 4)

# what is wrong -> (file, what the one problem must say)
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "the file has 0 bytes"),
    "seven bytes": (b"\0" * 7, "the file has 7 bytes"),
    "header of length zero": (framed(b""), "does not start with '{'"),
    "header longer than the file": ((9).to_bytes(8, "little") + b"{}", "claims 9 bytes, but the file has 10"),
    "header of 2^63 bytes": ((1 << 63).to_bytes(8, "little") + b"{}", "claims 9223372036854775808 bytes"),
    "not JSON": (framed(b"{]"), "is not valid JSON"),
    "cut JSON": (framed(b'{"a":'), "is not valid JSON"),
    "JSON list": (framed(b"[]"), "does not start with '{'"),
    "leading space": (framed(b" {}"), "does not start with '{'"),
    "byte order mark": (framed(b"\xef\xbb\xbf{}"), "does not start with '{'"),
    "UTF-16": (framed("{}".encode("utf-16")), "does not start with '{'"),
    "invalid UTF-8": (framed(b'{"\xff": 1}'), "is not valid JSON"),
    "surrogates encoded raw": (framed(b'{"\xed\xa0\x80": 1}'), "is not valid JSON"),
    "two documents": (framed(b"{}{}"), "is not valid JSON"),
    "NaN": (safetensors('{"a": NaN}'), "holds NaN"),
    "number beyond floats": (safetensors('{"a": 1e999}'), "more than a float can hold"),
    "integer of 5000 digits": (safetensors('{"a": ' + "1" * 5000 + "}"), "an integer of 5000 digits"),
    "nested 40 deep": (safetensors('{"a": ' + "[" * 40 + "]" * 40 + "}"), "nested more than 32 levels"),
    "nested 100 000 deep": (safetensors('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"), "is not valid JSON"),
    "key twice, same range": (
        safetensors(f'{{"a": {json.dumps(F32)}, "a": {json.dumps(F32)}}}', FOUR),
        "names 'a' more than once",
    ),
    "key twice, other range": (
        safetensors(f'{{"a": {json.dumps(F32)}, "a": {json.dumps(entry("F32", [1], 4, 8))}}}', FOUR * 2),
        "names 'a' more than once",
    ),
    "metadata twice": (safetensors('{"__metadata__": {}, "__metadata__": {}}'), "names '__metadata__' more than once"),
    "metadata key twice": (safetensors('{"__metadata__": {"k": "1", "k": "2"}}'), "names 'k' more than once"),
    "metadata of numbers": (safetensors({"__metadata__": {"k": 1}}), "must map strings to strings"),
    "metadata null": (safetensors('{"__metadata__": null}'), "must map strings to strings"),
    "metadata list": (safetensors('{"__metadata__": []}'), "must map strings to strings"),
    "entry is null": (safetensors('{"a": null}'), "must have exactly dtype, shape and data_offsets"),
    "entry is a list": (safetensors('{"a": []}'), "must have exactly dtype, shape and data_offsets"),
    "field missing": (
        safetensors({"a": {"dtype": "F32", "shape": [1]}}),
        "must have exactly dtype, shape and data_offsets",
    ),
    "field too many": (safetensors({"a": F32 | {"x": 1}}, FOUR), "must have exactly dtype, shape and data_offsets"),
    "name empty": (safetensors({"": F32}, FOUR), "a name that is empty"),
    "name with NUL": (safetensors({"a\0b": F32}, FOUR), "control characters"),
    "name with newline": (safetensors({"a\nb": F32}, FOUR), "control characters"),
    "name with DEL": (safetensors({"a\x7fb": F32}, FOUR), "control characters"),
    "name with escape": (safetensors({"a\x1b[2Jb": F32}, FOUR), "control characters"),
    "name with C1 control": (safetensors({"a\x9bb": F32}, FOUR), "control characters"),
    "name written right to left": (safetensors({"a\u202eb": F32}, FOUR), "unprintable"),
    "name with lone surrogate": (safetensors('{"a\\ud800": ' + json.dumps(F32) + "}", FOUR), "lone surrogates"),
    "dtype unknown": (safetensors({"a": entry("F31", [1], 0, 4)}, FOUR), "has unknown dtype 'F31'. Known: BF16, BOOL,"),
    "dtype in lower case": (safetensors({"a": entry("f32", [1], 0, 4)}, FOUR), "has unknown dtype 'f32'"),
    "dtype null": (safetensors({"a": entry(None, [1], 0, 4)}, FOUR), "has unknown dtype None"),
    "dtype a list": (safetensors({"a": entry(["F32"], [1], 0, 4)}, FOUR), "has unknown dtype ['F32']"),
    "dtype an object": (safetensors({"a": entry({}, [1], 0, 4)}, FOUR), "has unknown dtype {}"),
    "shape negative": (safetensors({"a": entry("F32", [-1], 0, 4)}, FOUR), "has shape [-1]"),
    "shape negative twice": (safetensors({"a": entry("F32", [-1, -1], 0, 4)}, FOUR), "has shape [-1, -1]"),
    "shape float": (safetensors({"a": entry("F32", [1.0], 0, 4)}, FOUR), "has shape [1.0]"),
    "shape true": (safetensors({"a": entry("F32", [True], 0, 4)}, FOUR), "has shape [True]"),
    "shape of text": (safetensors({"a": entry("F32", ["1"], 0, 4)}, FOUR), "has shape ['1']"),
    "shape no list": (safetensors({"a": entry("F32", 1, 0, 4)}, FOUR), "has shape 1;"),
    "shape product wraps 2^64": (safetensors({"a": entry("F32", [1 << 32, 1 << 32], 0, 0)}), "has shape"),
    "shape product wraps to 4": (safetensors({"a": entry("U8", [(1 << 62) + 1, 4], 0, 4)}, FOUR), "has shape"),
    "shape of another size": (
        safetensors({"a": entry("F32", [2], 0, 4)}, FOUR),
        "has 4 bytes, expected 8 from F32 (2,)",
    ),
    "huge beside zero": (safetensors({"a": entry("F32", [0, 1 << 60], 0, 0)}), "has shape [0, 1152921504606846976]"),
    "two huge beside zero": (safetensors({"a": entry("F32", [0, 1 << 40, 1 << 40], 0, 0)}), "has shape"),
    "10 000 dimensions": (safetensors({"a": entry("F32", [1] * 10_000, 0, 4)}, FOUR), "expected at most 8 integers"),
    "offsets reversed": (safetensors({"a": entry("F32", [1], 4, 0)}, FOUR), "has data_offsets [4, 0]"),
    "offsets negative": (safetensors({"a": entry("F32", [1], -4, 0)}, FOUR), "has data_offsets [-4, 0]"),
    "offsets float": (safetensors({"a": entry("F32", [1], 0.0, 4.0)}, FOUR), "has data_offsets [0.0, 4.0]"),
    "offsets of three": (
        safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, FOUR),
        "has data_offsets [0, 4, 8]",
    ),
    "offsets beyond the file": (safetensors({"a": entry("F32", [2], 0, 8)}, FOUR), "It is truncated."),
    "file cut by one byte": (safetensors({"a": F32}, FOUR[:3]), "It is truncated."),
    "trailing bytes": (safetensors({"a": F32}, FOUR + b"\0"), "1 bytes follow the last tensor"),
    "hole at the start": (safetensors({"a": entry("F32", [1], 4, 8)}, FOUR * 2), "leaves a hole before it"),
    "hole in the middle": (
        safetensors({"a": F32, "b": entry("F32", [1], 8, 12)}, FOUR * 3),
        "tensor 'b' leaves a hole before it",
    ),
    "overlap, whole": (safetensors({"a": F32, "b": F32}, FOUR), "tensor 'b' overlaps the tensor before it"),
    "overlap, partial": (
        safetensors({"a": F32, "b": entry("F32", [1], 2, 6)}, b"123456"),
        "tensor 'b' overlaps the tensor before it",
    ),
    "F4 of half a byte": (safetensors({"a": entry("F4", [3], 0, 2)}, b"12"), "has 2 bytes, expected 1.5"),
    "F4 rows of half a byte": (safetensors({"a": entry("F4", [2, 3], 0, 3)}, b"123"), "last axis 3"),
    "F4 scalar": (safetensors({"a": entry("F4", [], 0, 1)}, b"1"), "has 1 bytes, expected 0.5"),
    "F6": (safetensors({"a": entry("F6_E2M3", [4, 4], 0, 12)}, FOUR * 3), "has unknown dtype 'F6_E2M3'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_header_is_refused_with_one_sentence_that_names_the_file(tmp_path: Path, case: str) -> None:
    raw, expected = REFUSED[case]
    header, problems = read_bytes(tmp_path, raw)
    assert header is None
    assert len(problems) == 1
    assert problems[0].startswith("model.safetensors: ")
    assert expected in problems[0]
    assert len(problems[0]) < 400


def test_a_padded_header_of_90_mb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((90_000_000).to_bytes(8, "little") + b"{}")
    with open(path, "r+b") as file:
        file.truncate(8 + 90_000_000)
    tracemalloc.start()
    header, problems = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert header is None
    assert problems == [
        "model.safetensors: the header claims 90000000 bytes, but the file has 90000008 and the limit is 33554432."
        " The file is truncated or not safetensors."
    ]
    assert peak < 1 << 20


def test_every_broken_tensor_of_a_file_is_reported(tmp_path: Path) -> None:
    raw = safetensors({"a": entry("F31", [1], 0, 4), "b": entry("F32", [-1], 0, 4), "c": entry("F32", [1], 0, 4)}, FOUR)
    _, problems = read_bytes(tmp_path, raw)
    assert [problem.split(" has ")[0] for problem in problems] == [
        "model.safetensors: tensor 'a'",
        "model.safetensors: tensor 'b'",
    ]


def test_a_hole_and_a_truncation_are_reported_together(tmp_path: Path) -> None:
    raw = safetensors({"a": F32, "b": entry("F32", [1], 8, 12)}, FOUR)
    _, problems = read_bytes(tmp_path, raw)
    assert len(problems) == 2
    assert "leaves a hole before it" in problems[0]
    assert "It is truncated." in problems[1]


def test_offsets_are_absolute_and_metadata_is_kept(tmp_path: Path) -> None:
    raw = save({"b": np.zeros((2, 3), np.float32), "a": np.zeros(2, np.int8)}, metadata={"format": "pt"})
    header, problems = read_bytes(tmp_path, raw)
    start = 8 + int.from_bytes(raw[:8], "little")
    assert problems == []
    assert header is not None
    assert header.metadata == {"format": "pt"}
    assert header.tensors == {
        "b": TensorInfo("F32", (2, 3), "model.safetensors", (start, start + 24)),
        "a": TensorInfo("I8", (2,), "model.safetensors", (start + 24, start + 26)),
    }


ACCEPTED: dict[str, tuple[bytes, dict[str, tuple[str, tuple[int, ...]]]]] = {
    "no tensors": (safetensors({}), {}),
    "padding after the header": (framed(b"{}      "), {}),
    "a name that looks like a path": (safetensors({"../../x": F32}, FOUR), {"../../x": ("F32", (1,))}),
    "a name in any script": (safetensors({"层.权重": F32}, FOUR), {"层.权重": ("F32", (1,))}),
    "scalar": (safetensors({"a": entry("F32", [], 0, 4)}, FOUR), {"a": ("F32", ())}),
    "empty tensor": (safetensors({"a": entry("F32", [0, 7], 0, 0)}), {"a": ("F32", (0, 7))}),
    "empty tensor between two": (
        safetensors({"a": F32, "b": entry("F32", [0], 4, 4), "c": entry("F32", [1], 4, 8)}, FOUR * 2),
        {"a": ("F32", (1,)), "b": ("F32", (0,)), "c": ("F32", (1,))},
    ),
    "misaligned": (
        safetensors({"a": entry("U8", [1], 0, 1), "b": entry("F32", [1], 1, 5)}, b"12345"),
        {"a": ("U8", (1,)), "b": ("F32", (1,))},
    ),
    "F4": (safetensors({"a": entry("F4", [3, 2], 0, 3)}, b"123"), {"a": ("F4", (3, 2))}),
    "eight dimensions": (safetensors({"a": entry("U8", [1] * 8, 0, 1)}, b"1"), {"a": ("U8", (1,) * 8)}),
    "one byte": (handmade.ONE_TENSOR, {"a": ("U8", (4,))}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_an_odd_but_lawful_header_is_read(tmp_path: Path, case: str) -> None:
    raw, expected = ACCEPTED[case]
    header, problems = read_bytes(tmp_path, raw)
    assert problems == []
    assert header is not None
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == expected
