"""Opening a checkpoint directory: what is refused, and that everything wrong is said at once."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import CONFIG, ONE_TENSOR, RIGHT_MAP, TWO_FILES, A, B, entry, indexed, refusal, safetensors, tensor, write

from loaders import CheckpointError, dtypes, open_checkpoint
from loaders.files import opening
from loaders.files.index import read_headers

INDEX = "model.safetensors.index.json"

pytestmark = pytest.mark.usefixtures("no_hanging")


def test_a_single_file_opens(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, {"model.safetensors": ONE_TENSOR}))
    assert list(checkpoint.tensors) == ["a"]
    assert checkpoint.num_bytes == 4
    assert checkpoint.config_document == CONFIG
    assert checkpoint.generation_document == {}
    np.testing.assert_array_equal(checkpoint.read("a"), np.array([1, 2, 3, 4], np.uint8))


def test_tensors_of_several_files_are_in_file_order(tmp_path: Path) -> None:
    second = safetensors({"z": entry("U8", [1], 0, 1), "c": entry("U8", [1], 1, 2)}, b"zc")
    files = indexed({A: tensor("y"), B: second}, {"c": B, "y": A, "z": B})
    checkpoint = open_checkpoint(str(write(tmp_path, files)))
    assert [(name, info.file) for name, info in checkpoint.tensors.items()] == [("y", A), ("z", B), ("c", B)]


@pytest.mark.parametrize("address", ["it", "direct://it"])
def test_a_relative_path_is_that_of_the_directory_it_was_opened_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    write(tmp_path / "it", {"model.safetensors": ONE_TENSOR})
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint(address)
    (tmp_path / "elsewhere" / "it").mkdir(parents=True)  # which is not meant
    monkeypatch.chdir("elsewhere")
    assert [name for name, _ in checkpoint.stream()] == list(checkpoint.tensors)
    assert str(checkpoint.source) == address  # as the caller calls it


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_replaced_between_it_and_the_headers_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It would be the config of other tensors."""
    path = write(tmp_path / "it", indexed({A: ONE_TENSOR}, {"a": A}))
    assert open_checkpoint(path).documents.identities.keys() == {"config.json", INDEX}

    def late(*args: Any) -> Any:
        (path / "copy").write_bytes((path / name).read_bytes())
        (path / "copy").replace(path / name)
        return read_headers(*args)

    monkeypatch.setattr(opening, "read_headers", late)
    assert refusal(path) == [f"{name} changed since the checkpoint was opened. Open it again once it is complete."]


# what is wrong -> (files, the problems exactly)
BROKEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no config": (
        {"config.json": None, "model.safetensors": ONE_TENSOR},
        ["config.json cannot be read: No such file or directory. Is this a Hugging Face checkpoint?"],
    ),
    "config is a list": (
        {"config.json": [], "model.safetensors": ONE_TENSOR},
        ["config.json holds a JSON list, expected an object"],
    ),
    "config with a key twice": (
        {"config.json": b'{"vocab_size": 1, "vocab_size": 2}', "model.safetensors": ONE_TENSOR},
        ["config.json names 'vocab_size' more than once; which one is meant cannot be known"],
    ),
    "no tensors at all": (
        {},
        [f"neither model.safetensors nor {INDEX} is in the directory."],
    ),
    "pickled weights only": (
        {"pytorch_model.bin": b"\x80\x04."},
        [f"neither model.safetensors nor {INDEX} is in the directory."],
    ),
    "index missing": (
        TWO_FILES,
        [f"neither model.safetensors nor {INDEX} is in the directory. {A} is there: is {INDEX} missing?"],
    ),
    "a second file beside the single one": (
        {"model.safetensors": ONE_TENSOR, "other.safetensors": tensor("b")},
        ["other.safetensors is in the directory beside model.safetensors. Remove one."],
    ),
    "file of the index missing": (
        indexed({A: tensor("a")}, RIGHT_MAP),
        [f"{B} is named in {INDEX} but missing. Download it."],
    ),
    "a file of the index that is none": (
        indexed({A: tensor("a")}, {"a": A, "b": "config.json"}),
        [f"config.json is named in {INDEX} but is no .safetensors file. Is the index whole?"],
    ),
    "file not in the index": (
        indexed(TWO_FILES, {"a": A}),
        [f"{B} is in the directory but not in {INDEX}. Remove it, or write an index that covers it."],
    ),
    "tensor of the index not in its file": (
        indexed(TWO_FILES, {**RIGHT_MAP, "c": A}),
        [f"tensor 'c' is not in {A}, where {INDEX} says it is"],
    ),
    "tensor not in the index": (
        indexed({A: tensor("a"), B: tensor("b"), "c.safetensors": tensor("c")}, {**RIGHT_MAP, "d": "c.safetensors"}),
        [
            f"tensor 'd' is not in c.safetensors, where {INDEX} says it is",
            f"tensor 'c' of c.safetensors is not in {INDEX}",
        ],
    ),
    "index swaps two tensors": (
        indexed(TWO_FILES, {"a": B, "b": A}),
        [
            f"tensor 'a' is not in {B}, where {INDEX} says it is",
            f"tensor 'b' is not in {A}, where {INDEX} says it is",
        ],
    ),
    "one tensor in two files": (
        indexed({A: tensor("a"), B: tensor("a")}, {"a": A, "b": B}),
        [
            f"tensor 'a' is in {A} and in {B}. Which one is meant?",
            f"tensor 'b' is not in {B}, where {INDEX} says it is",
        ],
    ),
    "index leads to the parent": (
        indexed({A: tensor("a")}, {"a": A, "b": "../secret.safetensors"}),
        [
            f"{INDEX} names the file '../secret.safetensors', outside the checkpoint directory."
            " Files are named without a path."
        ],
    ),
    "index names an absolute path": (
        indexed({A: tensor("a")}, {"a": A, "b": "/etc/passwd"}),
        [f"{INDEX} names the file '/etc/passwd', outside the checkpoint directory. Files are named without a path."],
    ),
    "index names a file with NUL": (
        indexed({A: tensor("a")}, {"a": A, "b": "b\0.safetensors"}),
        [
            f"{INDEX} names the file 'b\\x00.safetensors', outside the checkpoint directory."
            " Files are named without a path."
        ],
    ),
    "index names a file by backslash": (
        indexed({A: tensor("a")}, {"a": A, "b": "..\\b.safetensors"}),
        [
            f"{INDEX} names the file '..\\\\b.safetensors', outside the checkpoint directory."
            " Files are named without a path."
        ],
    ),
    "index forges a line of the log": (
        indexed({A: tensor("a")}, {"a": A, "b": "b\nall is well"}),
        [
            f"{INDEX} names the file 'b\\nall is well', outside the checkpoint directory."
            " Files are named without a path."
        ],
    ),
    "index names no file": (
        indexed({A: tensor("a")}, {"a": A, "b": ""}),
        [f"{INDEX} names the file '', outside the checkpoint directory. Files are named without a path."],
    ),
    "index without weight_map": (
        {A: tensor("a"), INDEX: {}},
        [f"{INDEX}: weight_map must map tensor names to file names"],
    ),
    "index maps to numbers": (
        {INDEX: {"weight_map": {"a": 1}}},
        [f"{INDEX}: weight_map must map tensor names to file names"],
    ),
    "index names a tensor twice": (
        {A: tensor("a"), INDEX: f'{{"weight_map": {{"a": "{A}", "a": "{A}"}}}}'.encode()},
        [f"{INDEX} names 'a' more than once; which one is meant cannot be known"],
    ),
    "index beside a single file": (
        indexed({**TWO_FILES, "model.safetensors": ONE_TENSOR}, RIGHT_MAP),
        [
            f"model.safetensors is in the directory but not in {INDEX}. Remove it, or write an index that covers it.",
        ],
    ),
    "stop token is text": (
        {"model.safetensors": ONE_TENSOR, "generation_config.json": {"eos_token_id": ["</s>"]}},
        ["generation_config.json: eos_token_id is '</s>', expected an integer of 32 bits"],
    ),
    "generation config is not JSON": (
        {"model.safetensors": ONE_TENSOR, "generation_config.json": b"{"},
        [
            "generation_config.json is not valid JSON (Expecting property name enclosed in double quotes:"
            " line 1 column 2 (char 1)). The file is damaged."
        ],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_refused_with_these_sentences(tmp_path: Path, case: str) -> None:
    files, expected = BROKEN[case]
    assert refusal(write(tmp_path / "checkpoint", files)) == expected


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"[" * 100_000, id="nested 100 000 deep"),
        pytest.param(b'{"a":' * 100_000, id="objects 100 000 deep"),
        pytest.param(b'{"vocab_size": ' + b"9" * 5000 + b"}", id="integer of 5000 digits"),
        pytest.param(b'{"rms_norm_eps": NaN}', id="NaN"),
        pytest.param(b'{"rms_norm_eps": -Infinity}', id="infinity"),
        pytest.param(b'{"rms_norm_eps": 1e999}', id="float beyond floats"),
        pytest.param("{}".encode("utf-16"), id="UTF-16"),
        pytest.param(b"\xef\xbb\xbf{}", id="byte order mark"),
        pytest.param(b"\xff", id="not UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_json_that_breaks_parsers_is_one_problem_of_its_file(tmp_path: Path, name: str, raw: bytes) -> None:
    problems = refusal(write(tmp_path, {A: ONE_TENSOR, INDEX: {"weight_map": {"a": A}}, name: raw}))
    assert len([problem for problem in problems if problem.startswith(f"{name} ")]) == 1
    assert all(len(problem) < 400 for problem in problems)


def test_a_giant_json_file_is_refused_unread(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": ONE_TENSOR})
    with open(tmp_path / "config.json", "r+b") as file:
        file.truncate(1 << 40)
    assert refusal(tmp_path) == ["config.json cannot be read: it has 1099511627776 bytes, expected at most 67108864"]


def test_all_problems_of_a_checkpoint_are_in_one_error(tmp_path: Path) -> None:
    bad_header = safetensors({"c": entry("F31", [4], 0, 4), "d": entry("F32", [-1], 4, 8)}, b"12345678")
    files = indexed({A: tensor("a"), B: bad_header, "extra.safetensors": tensor("e")}, {"a": A, "b": A, "c": B})
    files |= {
        "config.json": {key: value for key, value in CONFIG.items() if key not in ("vocab_size", "head_dim")}
        | {"hidden_size": "eight", "new_option": 1, "layer_types": 3},
        "generation_config.json": {"eos_token_id": "two"},
    }
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write(tmp_path, files))
    assert caught.value.where == str(tmp_path)
    assert list(caught.value.problems) == [
        "config.json: vocab_size is missing. Is the file complete?",
        "config.json: hidden_size is 'eight', expected an integer",
        "config.json: layer_types is 3, expected a list, each a string",
        "config.json: option 'new_option' = 1 is not implemented. Remove it if no result depends on it.",
        "generation_config.json: eos_token_id is 'two', expected an integer of 32 bits",
        f"extra.safetensors is in the directory but not in {INDEX}. Remove it, or write an index that covers it.",
        f"{B}: tensor 'c' has unknown dtype 'F31'. Known: {', '.join(sorted(dtypes.NAMES))}",
        f"{B}: tensor 'd' has shape [-1]; expected at most 8 integers, none negative, of product 2^48 or less",
        f"tensor 'b' is not in {A}, where {INDEX} says it is",
    ]
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path}: 9 problems"
    assert lines[1] == "  1. config.json: vocab_size is missing. Is the file complete?"
    assert len(lines) == 10


def test_an_error_survives_pickling(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.problems, copy.where) == (str(caught.value), caught.value.problems, str(tmp_path))


def test_an_error_cannot_be_made_to_print_several_lines_or_escape_codes(tmp_path: Path) -> None:
    (problem,) = refusal(
        write(
            tmp_path,
            {
                "model.safetensors": ONE_TENSOR,
                "config.json": CONFIG | {"x\n  2. all is well\x1b[2J\ud800": "y" * 10**6},
            },
        )
    )
    assert problem.startswith(r"config.json: option 'x\n  2. all is well\x1b[2J\ud800' = 'yyy")
    assert len(problem) < 250
    problem.encode()


def test_file_names_that_are_not_text_can_be_reported(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": ONE_TENSOR})
    (tmp_path / os.fsdecode(b"\xff\n.safetensors")).write_bytes(ONE_TENSOR)
    assert refusal(tmp_path) == [r"\udcff\n.safetensors is in the directory beside model.safetensors. Remove one."]


@pytest.mark.parametrize("uri", ["az://bucket/model", "https://host/model", "file:///tmp"])
def test_a_scheme_without_a_source_is_refused(uri: str) -> None:
    with pytest.raises(CheckpointError, match=r"no source reads \w+:// \. Copy the checkpoint to a local directory"):
        open_checkpoint(uri)


@pytest.mark.parametrize("name", ["absent", "file", "nul\0"])
def test_what_is_not_a_directory_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(ONE_TENSOR)
    with pytest.raises(CheckpointError, match="is not a directory"):
        open_checkpoint(f"{tmp_path}/{name}")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_fifo_is_refused_and_does_not_hang(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"model.safetensors": ONE_TENSOR})
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    (problem,) = refusal(tmp_path)
    assert problem.startswith(f"{name} cannot be ")
    assert "it is not a regular file" in problem


def test_a_directory_named_like_a_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {})
    (tmp_path / "model.safetensors").mkdir()
    assert refusal(tmp_path) == ["model.safetensors cannot be opened: it is not a regular file"]


def test_an_error_lists_so_many_problems_and_keeps_all() -> None:
    error = CheckpointError("it", ["x" * 10**6, *(f"problem {number}" for number in range(999))])
    assert len(error.problems) == 1000
    assert len(error.problems[0]) < 2100
    lines = str(error).splitlines()
    assert lines[0] == "it: 1000 problems"
    assert lines[2] == "  2. problem 0"
    assert lines[-1] == "  and 800 more, which the exception's problems have"
    assert len(lines) == 202


def test_a_fingerprint_is_of_what_a_checkpoint_says_and_holds_wherever_it_lies(tmp_path: Path) -> None:
    def fingerprint(name: str, values: list[float], dtype: str = "float32", **config: object) -> str:
        raw = np.array(values, dtype)
        header = {"a": entry(dtypes.from_numpy(raw.dtype), [len(raw)], 0, raw.nbytes)}
        documents = {"model.safetensors": safetensors(header, raw.tobytes()), "config.json": CONFIG | config}
        return open_checkpoint(write(tmp_path / name, documents)).fingerprint()

    first = fingerprint("first", [1, 2, 3, 4])
    assert fingerprint("copy", [1, 2, 3, 4]) == first
    others = {
        fingerprint("values", [1, 2, 3, 5]),
        fingerprint("shape", [1, 2, 3]),
        fingerprint("dtype", [1, 2, 3, 4], "float16"),
        fingerprint("config", [1, 2, 3, 4], rms_norm_eps=0.5),
    }
    assert len(others | {first}) == 5


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("direct:///there/it", "'direct:///there/it' or 'direct://there/it'"),
        ("s3://bucket/it", "Give it as text: 's3://bucket/it'"),
    ],
)
def test_an_address_that_became_a_path_is_asked_for_as_text(address: str, told: str) -> None:
    with pytest.raises(CheckpointError, match="a path has one slash where an address has two") as caught:
        open_checkpoint(Path(address))
    assert told in str(caught.value)


@pytest.mark.parametrize("address", ["", "direct://", "runai://"])
def test_no_address_is_not_the_current_directory(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path / "it", {"model.safetensors": ONE_TENSOR}))
    with pytest.raises(CheckpointError, match="it names no directory"):
        open_checkpoint(address)
    assert list(open_checkpoint(".").tensors) == ["a"]


def test_a_path_may_be_any_that_python_knows(tmp_path: Path) -> None:
    directory = write(tmp_path / "it", {"model.safetensors": ONE_TENSOR})
    (entry,) = os.scandir(tmp_path)
    for path in (str(directory), directory, entry, os.fsencode(directory)):
        assert str(open_checkpoint(path).source) == str(directory)
    for wrong in (None, 3, ["it"]):
        with pytest.raises(CheckpointError, match="expected a path or an address"):
            open_checkpoint(wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [2, 3]}, {"eos_token_id": 7}, (2, 3)),
        ({"eos_token_id": 2}, {"eos_token_id": 7}, (2,)),
        ({}, {"eos_token_id": [7, 8]}, (7, 8)),
        (None, {"eos_token_id": 7}, (7,)),
        (None, {"eos_token_id": None}, ()),
        (None, {}, ()),
    ],
)
def test_stop_tokens_come_from_generation_config_then_config(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], expected: tuple[int, ...]
) -> None:
    files = {"model.safetensors": ONE_TENSOR, "config.json": CONFIG | config, "generation_config.json": generation}
    assert open_checkpoint(write(tmp_path, files)).eos_token_ids == expected
