"""Writing checkpoints: what the safetensors library reads back, byte for byte, all or nothing, one tensor in memory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import signal
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from handmade import CONFIG
from safetensors.torch import save_file

from loaders import dtypes, open_checkpoint
from loaders.writing import new_directory
from loaders.writing.directory_lock import Claim
from loaders.writing.writer import TensorType, write_checkpoint

INDEX = "model.safetensors.index.json"
ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(5, dtype=np.int8),
    "c": np.arange(4).astype(ml_dtypes.bfloat16),
    "d": np.float64(1.5).reshape(()),
    "e": np.zeros((0, 7), np.float16),
}


def plan_of(arrays: dict[str, np.ndarray]) -> dict[str, TensorType]:
    return {name: TensorType.of(array) for name, array in arrays.items()}


def written(directory: Path, arrays: dict[str, np.ndarray] = ARRAYS, **options: Any) -> Path:
    return write_checkpoint(directory, plan_of(arrays), arrays.__getitem__, **({"config": CONFIG} | options))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_copied_file_must_have_a_plain_name(tmp_path: Path) -> None:
    for name in ("../x", "a/b", ""):
        with pytest.raises(ValueError, match="expected a plain name"):
            written(tmp_path / "w", copied={name: b""})
    assert not (tmp_path / "w").exists()
    with pytest.raises(FileExistsError):
        written(tmp_path / "w", copied={"config.json": b""})
    assert not (tmp_path / "w").exists()


def test_a_written_checkpoint_opens_with_the_same_tensors_and_documents(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "checkpoint"
    assert written(directory, generation={"eos_token_id": 2}) == directory
    assert sorted(contents(directory)) == ["config.json", "generation_config.json", "model.safetensors"]
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config_document == CONFIG
    assert checkpoint.generation_document == {"eos_token_id": 2}
    assert checkpoint.metadata == {"model.safetensors": {"format": "pt"}}
    assert list(checkpoint.tensors) == ["d", "b", "c", "e", "a"]  # wider dtypes first: everything is aligned
    for name, array in ARRAYS.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert checkpoint.tensors[name].offsets[0] % array.itemsize == 0


def test_the_file_is_exactly_these_bytes(tmp_path: Path) -> None:
    written(
        tmp_path / "checkpoint", {"w": np.array([1, -1], np.float16)}, metadata={"model.safetensors": {"by": "tandem"}}
    )
    assert contents(tmp_path / "checkpoint")["model.safetensors"] == (
        b"\x68\0\0\0\0\0\0\0"
        b'{"__metadata__":{"format":"pt","by":"tandem"},'
        b'"w":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}     '
        b"\x00\x3c\x00\xbc"
    )


@pytest.mark.parametrize("dtype", sorted(dtypes.NAMES))
def test_every_dtype_is_written_and_read_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    array = np.arange(48, dtype=np.uint8).reshape(2, 24) % (2 if dtype == "BOOL" else 255)
    array = array.view(dtypes.to_numpy(dtype))
    shape = (2, 48) if dtype == "F4" else array.shape
    write_checkpoint(tmp_path / "checkpoint", {"w": TensorType(dtype, shape)}, lambda _: array, config=CONFIG)
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    assert (checkpoint.tensors["w"].dtype, checkpoint.tensors["w"].shape) == (dtype, shape)
    assert checkpoint.read("w").tobytes() == array.tobytes()


TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    arrays = {name: np.ones((3, 5), dtypes.to_numpy(name)) for name in TORCH}
    written(tmp_path / "checkpoint", arrays)
    with safetensors.safe_open(tmp_path / "checkpoint" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(TORCH)
        assert file.metadata() == {"format": "pt"}
        for name, dtype in TORCH.items():
            found = file.get_tensor(name)
            assert (found.dtype, tuple(found.shape)) == (dtype, (3, 5))
            assert found.contiguous().view(torch.uint8).numpy().tobytes() == arrays[name].tobytes()


def test_files_of_the_library_come_out_byte_for_byte(tmp_path: Path) -> None:
    mixed = {name: torch.ones(3, 5).to(dtype) for name, dtype in TORCH.items()}
    unicode = {"层.weight": torch.arange(7), "层.bias": torch.zeros(0)}
    save_file(mixed, tmp_path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(unicode, tmp_path / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    file_of = dict.fromkeys(mixed, "model-00001-of-00002.safetensors")
    file_of |= dict.fromkeys(unicode, "model-00002-of-00002.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": file_of}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    source = open_checkpoint(tmp_path)
    write_checkpoint(
        tmp_path / "copy",
        source.tensors,
        source.read,
        config=source.config_document,
        files={name: info.file for name, info in source.tensors.items()},
    )
    copy = contents(tmp_path / "copy")
    for name in set(file_of.values()):
        assert copy[name] == (tmp_path / name).read_bytes()
    assert json.loads(copy[INDEX])["weight_map"] == file_of
    assert open_checkpoint(tmp_path / "copy").tensors == source.tensors


def test_files_are_filled_in_order_up_to_the_limit(tmp_path: Path) -> None:
    arrays = {name: np.full(size, size, np.uint8) for name, size in zip("abcdef", (4, 4, 4, 9, 1, 7), strict=True)}
    written(tmp_path / "checkpoint", arrays, max_file_bytes=8)
    index = json.loads(contents(tmp_path / "checkpoint")[INDEX])
    names = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert index == {
        "metadata": {"total_size": 29},
        "weight_map": {"a": names[0], "b": names[0], "c": names[1], "d": names[2], "e": names[3], "f": names[3]},
    }
    assert {name: found.tobytes() for name, found in open_checkpoint(tmp_path / "checkpoint").stream()} == {
        name: array.tobytes() for name, array in arrays.items()
    }


@pytest.mark.parametrize(
    "files", [{"a": "x.safetensors", "b": "x.safetensors"}, {"a": "x.safetensors", "b": "w.safetensors"}]
)
def test_other_file_names_get_an_index(tmp_path: Path, files: dict[str, str]) -> None:
    arrays = {name: ARRAYS[name] for name in "ab"}
    written(tmp_path / "checkpoint", arrays, files=files)
    assert {name: info.file for name, info in open_checkpoint(tmp_path / "checkpoint").tensors.items()} == files


def test_everything_a_checkpoint_cannot_hold_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    plan = {
        "good": TensorType("F32", (2,)),
        "": TensorType("F32", (2,)),
        "new\nline": TensorType("F32", (2,)),
        "dtype": TensorType("F31", (2,)),
        "negative": TensorType("F32", (-1,)),
        "dimensions": TensorType("U8", (1,) * 9),
        "half": TensorType("F4", (3,)),
    }
    with pytest.raises(ValueError, match="this checkpoint cannot be written") as caught:
        write_checkpoint(tmp_path / "checkpoint", plan, lambda _: np.zeros(2, np.float32), config=CONFIG)
    lines = {line.strip().split(" has ")[0] for line in str(caught.value).splitlines()[1:]}
    assert lines == {f"model.safetensors: tensor {name!r}" for name in plan if name != "good"}
    assert list(tmp_path.iterdir()) == []


def test_a_layout_must_cover_the_plan_exactly(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written") as caught:
        written(tmp_path / "c", {"a": ARRAYS["a"], "b": ARRAYS["b"]}, files={"a": "../a.safetensors", "x": "model.bin"})
    assert str(caught.value).splitlines()[1:] == [
        "  files names no file for tensor 'b'",
        "  files names tensor 'x', which is not planned",
        "  files names the file '../a.safetensors', expected a plain name that ends in .safetensors",
        "  files names the file 'model.bin', expected a plain name that ends in .safetensors",
    ]
    assert list(tmp_path.iterdir()) == []


def test_metadata_must_be_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="__metadata__ must map strings to strings"):
        written(tmp_path / "checkpoint", metadata={"model.safetensors": {"step": 3}})


@pytest.mark.parametrize("metadata", [{"step": "3"}, {"step": {}}, {"model.safetensors": "3"}], ids=str)
def test_metadata_of_no_file_is_refused(tmp_path: Path, metadata: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="which is not written, or is no mapping"):
        written(tmp_path / "checkpoint", metadata=metadata)


def fail(_: str) -> np.ndarray:
    raise RuntimeError("the device is gone")


def interrupted(_: str) -> np.ndarray:
    raise KeyboardInterrupt


def of_another_shape(name: str) -> np.ndarray:
    return ARRAYS[name].reshape(-1, 1)


def of_another_dtype(name: str) -> np.ndarray:
    return ARRAYS[name].astype(np.float32 if name != "b" else np.int32)


@pytest.mark.parametrize(
    ("late", "error", "says"),
    [
        (fail, RuntimeError, "the device is gone"),
        (interrupted, KeyboardInterrupt, "^$"),
        (of_another_shape, ValueError, r"tensor 'b' is float32 \(6, 1\), expected float32 \(2, 3\) as planned"),
        (of_another_dtype, ValueError, r"tensor 'b' is int32 \(2, 3\), expected float32 \(2, 3\) as planned"),
    ],
)
def test_a_failure_half_way_leaves_nothing_behind(
    tmp_path: Path, late: Callable[[str], np.ndarray], error: type[BaseException], says: str
) -> None:
    def read(name: str) -> np.ndarray:
        return ARRAYS[name] if name == "d" else late(name)  # d is written first, b next

    for directory in (tmp_path / "new" / "parents" / "checkpoint", tmp_path / "empty"):
        if directory.name == "empty":
            directory.mkdir()
        with pytest.raises(error, match=says):
            write_checkpoint(directory, plan_of(ARRAYS), read, config=CONFIG)
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


def test_a_config_that_is_not_json_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        written(tmp_path / "checkpoint", config=CONFIG | {"rms_norm_eps": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["notes.txt", ".hidden"])
def test_a_directory_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / name).write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"checkpoint is not empty\. Write to a new directory, or remove it first\."
    ):
        write_checkpoint(tmp_path / "checkpoint", plan_of(ARRAYS), fail, config=CONFIG)  # said before reading
    assert contents(tmp_path / "checkpoint") == {name: b"mine"}
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint"]


@pytest.mark.parametrize("address", ["s3://b/out", "gs://b/out", "file:///out", "s3:/b/out", Path("gs://b/out")])
def test_an_address_is_no_directory_to_write(address, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is an address, and nothing is written to \w+://"):
        write_checkpoint(address, plan_of(ARRAYS), fail, config=CONFIG)  # said before reading
    assert list(tmp_path.iterdir()) == []
    written("./s3:/b/out")  # a directory may be called so
    assert (tmp_path / "s3:/b/out/config.json").is_file()


def test_a_file_in_the_way_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_text("mine")
    with pytest.raises(FileExistsError, match="checkpoint is a file, expected a directory that is new or empty"):
        written(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint").read_text() == "mine"


def test_a_directory_that_fills_while_writing_is_left_alone(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"

    def read(name: str) -> np.ndarray:
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text("theirs")
        return ARRAYS[name]

    with pytest.raises(FileExistsError, match="is not empty"):
        write_checkpoint(directory, plan_of(ARRAYS), read, config=CONFIG)
    assert contents(directory) == {"config.json": b"theirs"}
    assert list(tmp_path.iterdir()) == [directory]


def test_what_a_killed_writer_left_is_removed_by_the_next_and_what_one_writes_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what another host writes, whose lock need not be known here, or somebody else to another name."""
    names = [new_directory._partial_name(tmp_path / "checkpoint", mark) for mark in ("01234567", "fedcba98")]
    others = [".checkpoint.mine.partial", new_directory._partial_name(tmp_path / "checkpoint2", "01234567")]
    with monkeypatch.context() as patch:
        patch.setattr(platform, "node", lambda: "another")
        others.append(new_directory._partial_name(tmp_path / "checkpoint", "01234567"))
    for name in (names[0], *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(8))
    at_work = Claim(tmp_path / "checkpoint", tmp_path / names[1])
    at_work.take()
    written(tmp_path / "checkpoint")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", names[1], *others}
    at_work.release()


def test_a_writer_whose_new_directory_is_looked_at_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever tidies up holds its lock for a moment, between its making and its own lock; the writer was refused."""
    real, busy = fcntl.flock, [True, True]

    def flock(descriptor: int, how: int) -> None:
        if busy and how & fcntl.LOCK_NB:
            busy.pop()
            raise BlockingIOError
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    written(tmp_path / "checkpoint")
    assert not busy
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_parent_that_is_a_file_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file is a file, expected a directory to make"):
        written(tmp_path / "file" / "checkpoint")


def test_a_writer_that_was_killed_is_followed_by_one_that_leaves_nothing_of_it(tmp_path: Path) -> None:
    program = """if True:
        import os, signal, sys
        import numpy as np
        from loaders.writing.writer import TensorType, write_checkpoint

        def read(name):
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))

        write_checkpoint(sys.argv[1], {"a": TensorType("F32", (2,))}, read, config={})
    """
    for name in ("SIGTERM", "SIGKILL"):
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "checkpoint"), name], check=False)
        assert done.returncode == -getattr(signal, name)
        assert [path.name[:12] for path in tmp_path.iterdir()] == [".checkpoint."]
    written(tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_where_a_file_system_is_mounted_nothing_is_written_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "mounted")
    (tmp_path / "mounted").mkdir()
    with pytest.raises(FileExistsError, match="mounted is a mount point and cannot be replaced"):
        write_checkpoint(tmp_path / "mounted", plan_of(ARRAYS), fail, config=CONFIG)  # said before reading
    written(tmp_path / "mounted" / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["mounted"]


def test_where_nothing_may_be_made_is_said_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for directory in (tmp_path / "checkpoint", tmp_path / "new" / "checkpoint"):
        with pytest.raises(PermissionError, match=f"{tmp_path} may not be written by this user"):
            write_checkpoint(directory, plan_of(ARRAYS), fail, config=CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_may_be_written_and_not_read_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def opened(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", opened)
    written(tmp_path / "checkpoint")
    assert open_checkpoint(tmp_path / "checkpoint").tensors.keys() == ARRAYS.keys()


def test_nothing_has_the_final_name_until_all_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "checkpoint"
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def rename(source: Any, target: Any, **options: Any) -> None:
        assert not directory.exists()
        events.append("rename")
        real_rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    written(directory, max_file_bytes=16)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert sorted(before[:-1]) == sorted(contents(directory))
    assert before[-1].startswith(".checkpoint.")
    assert after == [tmp_path.name]


def test_the_directory_has_the_mode_of_any_new_directory(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    directory = written(tmp_path / "checkpoint")
    assert stat.S_IMODE(directory.stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


def test_an_empty_directory_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w").chmod(0o2770)
    assert stat.S_IMODE(written(tmp_path / "w").stat().st_mode) == 0o2770


def test_the_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="is the working directory and cannot be replaced"):
        written(Path())
    assert list(Path().iterdir()) == []
    assert open_checkpoint(written(Path("w"))).tensors


def test_a_long_name_is_a_name(tmp_path: Path) -> None:
    assert open_checkpoint(written(tmp_path / ("w" * 250))).tensors


def test_half_of_a_pair_is_written_as_it_was_read(tmp_path: Path) -> None:
    odd = {"_name_or_path": "\ud800"}
    first = written(tmp_path / "a", config=CONFIG | odd, metadata={"model.safetensors": odd})
    checkpoint = open_checkpoint(first)
    assert checkpoint.config_document["_name_or_path"] == "\ud800"
    said = {"config": checkpoint.config_document, "metadata": checkpoint.metadata}
    again = write_checkpoint(tmp_path / "b", checkpoint.tensors, checkpoint.read, **said)
    assert contents(again) == contents(first)


def test_a_disk_that_is_full_is_said_to_be_whose(tmp_path: Path) -> None:
    def full(name: str) -> np.ndarray:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=str(tmp_path / "w")):
        write_checkpoint(tmp_path / "w", plan_of(ARRAYS), full, config=CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_an_empty_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    written(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert "config.json" in contents(tmp_path / "disk")


def test_arrays_in_any_memory_order_are_written_in_c_order(tmp_path: Path) -> None:
    square = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {"transposed": square.T, "strided": square[:, ::2], "reversed": square[::-1]}
    checkpoint = open_checkpoint(written(tmp_path / "checkpoint", arrays))
    for name, array in arrays.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_one_tensor_is_in_memory_at_a_time_and_each_is_asked_for_once(tmp_path: Path) -> None:
    plan = {f"layer.{number}": TensorType("BF16", (1 << 19,)) for number in range(24)}  # 1 MiB each
    asked: list[str] = []

    def read(name: str) -> np.ndarray:
        asked.append(name)
        return np.full(1 << 19, int(name.split(".")[1]), ml_dtypes.bfloat16)

    tracemalloc.start()
    write_checkpoint(tmp_path / "checkpoint", plan, read, config=CONFIG, max_file_bytes=10 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert asked == list(plan)
    assert peak < 1.5 * (1 << 20)
    assert open_checkpoint(tmp_path / "checkpoint").num_bytes == 24 << 20
