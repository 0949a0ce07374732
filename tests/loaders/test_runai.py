"""runai-model-streamer reading local files: the hazards that were measured of it, each held off.

Its own Python package recycles buffers, rejects packed formats, mixes a replaced file with the old one and waits for
ever; none of that may reach a checkpoint that is read through it.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import CONFIG, entry, safetensors, write

from loaders import Checkpoint, CheckpointError, dtypes, open_checkpoint
from loaders.sources import runai
from loaders.writing.writer import TensorType, write_checkpoint
from parity.zoo import make_checkpoint

SIZE = 300 << 10
NAMES = [f"t{number:02}" for number in range(24)]


def content(name: str) -> np.ndarray:
    return np.random.default_rng(int(name[1:])).integers(0, 255, SIZE, np.uint8)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    files = {name: f"model-0000{1 + number % 3}-of-00003.safetensors" for number, name in enumerate(NAMES)}
    plan = {name: TensorType.of(content(name)) for name in NAMES}
    return write_checkpoint(tmp_path / "checkpoint", plan, content, config=CONFIG, files=files)


@pytest.fixture
def checkpoint(directory: Path) -> Checkpoint:
    return open_checkpoint(f"runai://{directory}")


def test_every_tensor_comes_with_its_bytes_and_may_be_kept(checkpoint: Checkpoint) -> None:
    kept = [*checkpoint.stream(SIZE), *checkpoint.stream()]  # more than its buffers could hold at once
    assert sorted(name for name, _ in kept) == sorted(NAMES * 2)
    assert all(array.tobytes() == content(name).tobytes() for name, array in kept)
    assert checkpoint.read("t07").tobytes() == content("t07").tobytes()


def test_it_is_what_the_plain_reader_gives_in_every_dtype(tmp_path: Path) -> None:
    """Those of less than a byte too, which its own Python package refuses."""
    tensors, data = {}, b""
    for number, dtype in enumerate(sorted(dtypes.NAMES)):
        raw = np.random.default_rng(number).integers(0, 255, 24 * dtypes.bits(dtype) // 8, np.uint8).tobytes()
        tensors[f"t{number:02}"] = entry(dtype, [3, 8], len(data), len(data) + len(raw))
        data += raw
    path = write(tmp_path, {"model.safetensors": safetensors(tensors, data)})
    plain = dict(open_checkpoint(path).stream())
    found = dict(open_checkpoint(f"runai://{path}").stream())
    assert {name: (x.dtype, x.shape, x.tobytes()) for name, x in found.items()} == {
        name: (x.dtype, x.shape, x.tobytes()) for name, x in plain.items()
    }


def test_a_tensor_larger_than_all_buffers_together_is_read(checkpoint: Checkpoint, monkeypatch: Any) -> None:
    monkeypatch.setattr("loaders.stream.WINDOW_BYTES", 16 << 10)
    monkeypatch.setattr("loaders.reading.memory.STAGING_BYTES", 8 << 10)
    monkeypatch.setattr(runai, "STAGING_BYTES", 8 << 10)
    assert all(array.tobytes() == content(name).tobytes() for name, array in checkpoint.stream())


def test_a_file_replaced_while_it_is_streamed_is_never_mixed_with_the_old_one(
    directory: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("loaders.reading.memory.STAGING_BYTES", SIZE)
    monkeypatch.setattr("loaders.stream.MOST_STRETCHES", 2)  # else all is asked for before it can be replaced
    checkpoint = open_checkpoint(f"runai://{directory}")
    stream = checkpoint.stream()
    found = [next(stream)]
    for path in directory.glob("*.safetensors"):
        other = path.with_suffix(".new")
        raw = path.read_bytes()
        other.write_bytes(raw[: -4 * SIZE] + bytes(4 * SIZE))
        other.replace(path)
    with pytest.raises(CheckpointError, match="changed since the checkpoint was opened"):
        found += stream  # files that were not open yet are others now
    assert all(array.tobytes() == content(name).tobytes() for name, array in found)


@pytest.mark.parametrize("how", ["truncated", "missing", "damaged", "a list", "without dtype", "deep"])
def test_files_that_cannot_be_read_are_one_error_before_anything_is_read(directory: Path, how: str) -> None:
    path = directory / "model-00002-of-00003.safetensors"
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, path.stat().st_size - 8)
    else:
        header = {"damaged": b"{{", "a list": b"[]", "without dtype": b'{"a":{}}', "deep": b'{"a":' + b"[" * 10**5}
        path.write_bytes(len(header[how]).to_bytes(8, "little") + header[how])
    with pytest.raises(CheckpointError, match=path.name):
        open_checkpoint(f"runai://{directory}")


def test_a_file_truncated_while_it_is_streamed_is_one_error_that_names_it(directory: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("loaders.stream.MOST_PIECES", 2)
    stream = open_checkpoint(f"runai://{directory}").stream()
    next(stream)
    for path in directory.glob("*.safetensors"):
        os.truncate(path, 4000)
    with pytest.raises(CheckpointError) as caught:
        list(stream)
    assert "model-0000" in str(caught.value)


def test_an_abandoned_iterator_is_done_at_once_and_leaves_nothing(checkpoint: Checkpoint) -> None:
    list(checkpoint.stream())  # what the library opens once for good
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()  # others of this process may end
    for _ in range(5):
        stream = checkpoint.stream()
        next(stream)
        started = time.monotonic()
        del stream
        gc.collect()
        assert time.monotonic() - started < 20  # its own deadline, of a silent server, is 30
    left = time.monotonic() + 10
    while (len(os.listdir("/proc/self/fd")) > files or threading.active_count() > threads) and time.monotonic() < left:
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= files
    assert threading.active_count() <= threads


class Interrupted:
    """The library, and an interrupt that is heard as the ``number``th call of a function returns."""

    def __init__(self, library: Any, function: str, number: int) -> None:
        self._library, self._at = library, (function, number)
        self.count = {"request": 0, "response": 0}

    def __getattr__(self, name: str) -> Any:
        found, kind = getattr(self._library, name), name.removeprefix("runai_file_streamer_")
        if kind not in self.count:
            return found

        def call(*given: Any) -> int:
            code = found(*given)
            if code != 16:  # nothing came yet
                self.count[kind] += 1
                if self._at == (kind, self.count[kind]):
                    signal.raise_signal(signal.SIGINT)
            return code

        return call


@pytest.fixture
def heard() -> Iterator[None]:
    """Interrupts are, also where this process was started in the background by a shell, which has them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("function", "number"), [("request", 1), ("request", 3), ("response", 1), ("response", 2)])
def test_an_interrupt_is_over_when_all_that_was_asked_for_is_answered(
    checkpoint: Checkpoint, function: str, number: int, monkeypatch: Any
) -> None:
    """Before, the library writes to memory that may be anybody's; and for more than that nobody may wait."""
    monkeypatch.setattr("loaders.reading.memory.STAGING_BYTES", SIZE)
    streamers = runai.streamers_of("runai")
    library = Interrupted(runai.library_of("runai"), function, number)
    monkeypatch.setattr(runai, "library_of", lambda _: library)
    with pytest.raises(KeyboardInterrupt):
        list(checkpoint.stream())
    until = time.monotonic() + 10
    while streamers._num_reading and time.monotonic() < until:
        time.sleep(0.01)
    assert not streamers._num_reading
    assert library.count["request"] == library.count["response"] > 0
    assert not [thread for thread in threading.enumerate() if thread.name == "tandem-runai-end"]


def test_reading_beside_an_open_stream_takes_one_more_streamer_and_no_more(
    directory: Path, checkpoint: Checkpoint
) -> None:
    stream = checkpoint.stream()
    next(stream)
    checkpoint.read("t00")
    more: list[tuple[int, int]] = []
    for _ in range(3):  # others of this process come and go, too; what is left behind is so each time
        threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for name in NAMES:
            assert checkpoint.read(name).tobytes() == content(name).tobytes()
        more.append((threading.active_count() - threads, len(os.listdir("/proc/self/fd")) - files))
    assert all(min(kind) <= 0 for kind in zip(*more, strict=True)), more
    # a streamer that is used again knows nothing of what it read before
    path = directory / checkpoint.tensors["t00"].file
    raw = path.read_bytes()
    other = path.with_suffix(".new")
    other.write_bytes(raw[:-8] + bytes(8))
    other.replace(path)
    replaced = open_checkpoint(f"runai://{directory}")
    last = max((info.offsets, name) for name, info in replaced.tensors.items() if info.file == path.name)[1]
    assert not replaced.read(last)[-8:].any()
    stream.close()
    assert not runai.streamers_of("runai")._idle


def test_streams_in_several_threads_do_not_disturb_each_other(checkpoint: Checkpoint) -> None:
    wrong: list[str] = []

    def run() -> None:
        wrong.extend(name for name, array in checkpoint.stream(SIZE) if array.tobytes() != content(name).tobytes())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_stream_that_brings_nothing_any_more_ends_at_its_deadline(checkpoint: Checkpoint, monkeypatch: Any) -> None:
    monkeypatch.setattr(runai, "DEADLINE_S", 0.3)
    monkeypatch.setattr(runai, "CLOSE_S", 0.1)
    monkeypatch.setattr(runai, "_SLICE_MS", 50)

    class Silent:
        def __init__(self, library: Any) -> None:
            self.library = library

        def __getattr__(self, name: str) -> Any:
            if name == "runai_file_streamer_response":
                return lambda *arguments: runai._TIMED_OUT
            return getattr(self.library, name)

    load = runai.library_of
    monkeypatch.setattr(runai, "library_of", lambda scheme: Silent(load(scheme)))
    with pytest.raises(CheckpointError, match=r"nothing has come from runai:///.* for 0.3 s. Is it still there"):
        list(checkpoint.stream())


def test_neither_torch_nor_its_own_package_is_imported(directory: Path) -> None:
    code = f"""
import sys
from loaders import open_checkpoint
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
assert len(dict(open_checkpoint({f"runai://{directory}"!r}).stream())) == {len(NAMES)}
print(*(name for name in sys.modules if name.partition(".")[0] in ("torch", "runai_model_streamer", "boto3")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_models_load_and_reload_through_it(backend: str, tmp_path: Path) -> None:
    import importlib

    models = importlib.import_module(f"{backend}_models")
    options = {"max_file_bytes": 1 << 16, "num_hidden_layers": 2}
    paths = [make_checkpoint("qwen3", tmp_path / str(seed), seed=seed, **options) for seed in range(2)]
    expected = [models.load(path).digests() for path in paths]
    model = models.load(f"runai://{paths[0]}")
    assert model.digests() == expected[0]
    model = model.update_weights_from_disk(f"runai://{paths[1]}")
    assert model.digests() == expected[1]
    assert model.update_weights_from_disk(paths[0]).digests() == expected[0]


# Not installed, or not as it has to be


@pytest.mark.parametrize("uri", ["runai://{directory}", "s3://bucket/prefix"])
def test_without_the_extra_one_error_names_it(directory: Path, monkeypatch: Any, uri: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(uri.format(directory=directory))
    (problem,) = caught.value.problems
    assert problem == (
        "cannot be opened: runai-model-streamer is not installed."
        " Install the extra: pip install '.[runai]' in Tandem's own directory"
    )


def test_another_version_is_refused(directory: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.18.2")
    with pytest.raises(CheckpointError, match=r"runai-model-streamer is 0.18.2, expected 0.17.\*"):
        open_checkpoint(f"runai://{directory}")


def test_a_package_without_its_s3_part_is_told_which_to_install(directory: Path, monkeypatch: Any) -> None:
    class Partial:
        def __init__(self, library: Any) -> None:
            self.library = library

        def __getattr__(self, name: str) -> Any:
            return (lambda *arguments: 12) if name.endswith("_request") else getattr(self.library, name)

    load = runai.library_of
    monkeypatch.setattr(runai, "library_of", lambda scheme: Partial(load(scheme)))
    with pytest.raises(CheckpointError, match=r"Error loading object storage plugin .* pip install '\.\[runai\]'"):
        list(open_checkpoint(f"runai://{directory}").stream())


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        open_checkpoint(f"runai://{tmp_path}/none")
