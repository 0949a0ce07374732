"""Checkpoints on a real S3 server on loopback: what lies there is what is read, by range, and no more of it."""

from __future__ import annotations

import copy
import importlib
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from object_stores import assert_same_checkpoint
from s3_server import (
    Server,
)

from loaders import CheckpointError, open_checkpoint
from loaders.digest import digests
from loaders.reading.filling import Filling
from loaders.reading.plan import plan_load
from loaders.reading.regions import Box
from loaders.reading.shards import read_shards
from loaders.sources import runai, s3
from loaders.spec import ParamSpec
from loaders.stage import Stage
from parity.inspection import open_subject


def test_it_is_the_checkpoint_that_lies_there(uri: str, directory: Path) -> None:
    assert_same_checkpoint(uri, directory)


def test_opening_reads_json_and_headers_by_range_and_nothing_else(
    uri: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = s3.S3File.read_into

    def watched(self: s3.S3File, out: memoryview, position: int) -> None:
        read.append(len(out))
        real(self, out, position)

    monkeypatch.setattr(s3.S3File, "read_into", watched)
    checkpoint = open_checkpoint(uri)
    documents = sum(path.stat().st_size for path in directory.glob("*.json"))
    files = list(directory.glob("*.safetensors"))
    headers = sum(path.stat().st_size for path in files) - checkpoint.num_bytes
    assert sum(read) == documents + headers


def test_an_open_checkpoint_is_copied_and_goes_to_other_processes(uri: str) -> None:
    checkpoint = open_checkpoint(uri)
    expected = digests(checkpoint.stream())
    for other in (copy.deepcopy(checkpoint), pickle.loads(pickle.dumps(checkpoint))):
        assert digests(other.stream()) == expected


def test_asking_leaves_the_process_as_it_is(uri: str) -> None:
    """How others are started is the user's to say, once."""
    program = "import sys, multiprocessing; from loaders import open_checkpoint; open_checkpoint(sys.argv[1])"
    program += "; multiprocessing.set_start_method('spawn')"
    done = subprocess.run([sys.executable, "-c", program, uri], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_what_is_asked_for_is_streamed(uri: str, directory: Path) -> None:
    names = [name for name in open_checkpoint(directory).tensors if "norm" in name]
    assert {name for name, _ in open_checkpoint(uri).stream(names=names)} == set(names)


def halves(spec: ParamSpec) -> list[Box]:
    """Of every parameter half of the last axis that has one, as two quarters of it: columns, if it can be."""
    axis = max((axis for axis, size in enumerate(spec.shape) if size % 4 == 0), default=None)
    ends = [(0, size) for size in spec.shape]
    if axis is None:
        return [tuple(ends)]
    size = spec.shape[axis] // 4
    return [tuple(ends[:axis] + [(part * size, (part + 1) * size)] + ends[axis + 1 :]) for part in (2, 3)]


def parts_of(uri: Any) -> dict[str, dict[Box, bytes]]:
    plan = plan_load(open_checkpoint(uri), Stage(mtp=True)).within(None, staged=True, boxes_of=halves)
    filling = Filling(plan)
    found = {spec.name: shards for spec, shards in read_shards(filling)}
    filling.finish()
    return {name: {box: part.tobytes() for box, part in shards.items()} for name, shards in found.items()}


def test_what_devices_hold_comes_through_the_streamer_and_little_else(
    uri: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges of tensors, fused and transposed ones too: none is asked for by itself, and rows are not read for one."""
    opened, asked, headers, questions = open_checkpoint(uri), [0], [0], [0]
    submit, read_into, identity = runai.RunaiSession.submit, s3.S3File.read_into, s3.S3File.identity

    def counted(self: runai.RunaiSession, file: Any, position: int, pieces: Any) -> int:
        asked[0] += sum(piece.num_bytes for piece in pieces)
        return submit(self, file, position, pieces)

    def one_by_one(self: s3.S3File, out: memoryview, position: int) -> None:
        headers[0] += len(out)
        read_into(self, out, position)

    def questioned(self: s3.S3File) -> s3.ObjectIdentity:
        questions[0] += 1
        return identity(self)

    monkeypatch.setattr(runai.RunaiSession, "submit", counted)
    monkeypatch.setattr(s3.S3File, "read_into", one_by_one)
    monkeypatch.setattr(s3.S3File, "identity", questioned)
    found = parts_of(uri)
    assert found == parts_of(directory)
    num_bytes = sum(len(part) for parts in found.values() for part in parts.values())
    assert 0.4 < num_bytes / opened.num_bytes < 0.7
    assert num_bytes <= asked[0] < 1.1 * opened.num_bytes  # rows of this model are far shorter than a request is long
    files = list(directory.glob("*.safetensors"))
    documents = sum(path.stat().st_size for path in directory.glob("*.json"))
    assert headers[0] == documents + sum(path.stat().st_size for path in files) - opened.num_bytes
    assert questions[0] < len(opened.tensors)


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.slow_unless("jax")
def test_models_load_reload_and_export_from_it(backend: str, uri: str, directory: Path, tmp_path: Path) -> None:
    models = importlib.import_module(f"{backend}_models")
    model = models.load(uri, mtp=True)
    expected = digests(open_checkpoint(directory).stream())
    assert model.digests() == expected
    model = model.update_weights_from_disk(uri)
    assert (model.version, model.digests()) == (2, expected)
    exported = model.export(tmp_path / "again")
    for file in directory.glob("*.safetensors"):
        assert (exported / file.name).read_bytes() == file.read_bytes()


def test_a_bucket_may_be_the_checkpoint(server: Server, directory: Path) -> None:
    server.client.create_bucket(Bucket="whole")
    for file in directory.iterdir():
        server.client.put_object(Bucket="whole", Key=file.name, Body=file.read_bytes())
    assert digests(open_checkpoint("s3://whole").stream()) == digests(open_checkpoint(directory).stream())
    assert str(open_checkpoint("s3://whole/").source) == "s3://whole/"


# What is wrong with it


def test_an_address_that_went_through_a_path_is_told_from_a_directory() -> None:
    with pytest.raises(CheckpointError, match="Give it as text: 's3://bucket/prefix'"):
        open_checkpoint(Path("s3://bucket/prefix"))


# A server that goes away


def test_a_config_alone_may_lie_there(server: Server, directory: Path, tmp_path: Path) -> None:
    shutil.copy(directory / "config.json", tmp_path)
    address = server.put(tmp_path, "configs/only")
    expected = open_subject(str(tmp_path)).config
    for where in (address, f"{address}/", f"{address}/config.json"):
        found = open_subject(where)
        assert (found.config, found.checkpoint) == (expected, None)


def test_a_name_that_is_no_utf8_is_none_of_an_object() -> None:
    for scheme in ("s3", "gs"):
        with pytest.raises(CheckpointError, match="it is no UTF-8"):
            open_checkpoint(f"{scheme}://bucket/a\udc80")
