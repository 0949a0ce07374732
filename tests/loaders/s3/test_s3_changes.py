"""Objects that are not there, or become others: pinned by ETag, one error, and never other weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from handmade import CONFIG
from s3_server import (
    BUCKET,
    Server,
    client,
    shortening_server,
)

from loaders import CheckpointError, open_checkpoint
from loaders.digest import digests
from loaders.sources import runai, s3
from loaders.writing.writer import TensorType, write_checkpoint
from parity.zoo import make_checkpoint


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("s3://ckpt/none", "there is no object under s3://ckpt/none/"),
        ("s3://no-such-bucket/none", "NoSuchBucket"),
        ("s3:///none", "it names no bucket"),
        ("s3://ckpt//models/moe", "a part of its prefix has no name"),
        ("s3://ckpt/models//a", "a part of its prefix has no name"),
    ],
)
def test_an_address_where_nothing_is_is_an_error(uri: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(uri)
    assert len(caught.value.problems) == 1


def test_an_index_that_cannot_be_read_is_the_only_problem(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody is told to remove the files that it would name."""
    real = s3.S3File.parts

    def parts(self: s3.S3File, position: int, count: int) -> Iterator[bytes]:
        if self.name.endswith(".index.json"):
            raise OSError("SlowDown")
        return real(self, position, count)

    monkeypatch.setattr(s3.S3File, "parts", parts)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(uri)
    (problem,) = caught.value.problems
    assert "index.json cannot be read: SlowDown" in problem


def test_missing_and_truncated_objects_are_one_error(server: Server, directory: Path) -> None:
    uri = server.put(directory, "bad")
    first, second = sorted(path.name for path in directory.glob("*.safetensors"))[:2]
    server.client.delete_object(Bucket=BUCKET, Key=f"bad/{first}")
    raw = (directory / second).read_bytes()
    server.client.put_object(Bucket=BUCKET, Key=f"bad/{second}", Body=raw[:-10])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(uri)
    assert any(f"{first} is named in" in problem and "missing" in problem for problem in caught.value.problems)
    assert any(f"{second}: the file has {len(raw) - 10} bytes" in problem for problem in caught.value.problems)


@pytest.mark.parametrize("how", ["replaced", "deleted", "truncated", "rewritten"])
def test_an_object_that_changed_since_opening_is_an_error_and_not_other_weights(
    server: Server, directory: Path, how: str
) -> None:
    uri = server.put(directory, f"changing-{how}")
    checkpoint = open_checkpoint(uri)
    name, info = next(iter(checkpoint.tensors.items()))
    key, raw = f"changing-{how}/{info.file}", (directory / info.file).read_bytes()
    if how == "deleted":
        server.client.delete_object(Bucket=BUCKET, Key=key)
    else:
        body = {"replaced": raw[:-9] + bytes(9), "truncated": raw[:-9], "rewritten": raw[:-1] + bytes([raw[-1] ^ 1])}
        server.client.put_object(Bucket=BUCKET, Key=key, Body=body[how])
    for attempt in (lambda: checkpoint.read(name), lambda: list(checkpoint.stream())):
        with pytest.raises(CheckpointError, match=r"changed since|there is no such object") as caught:
            attempt()
        assert len(caught.value.problems) == 1


def test_an_object_replaced_while_it_is_streamed_is_an_error(
    server: Server, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaders.stream.MOST_PIECES", 1)
    uri = server.put(directory, "racing")
    stream = open_checkpoint(uri).stream()
    next(stream)
    for file in directory.glob("*.safetensors"):
        raw = file.read_bytes()
        server.client.put_object(Bucket=BUCKET, Key=f"racing/{file.name}", Body=raw[:-4] + bytes(4))
    with pytest.raises(CheckpointError, match="changed since the checkpoint was opened"):
        list(stream)


def test_an_object_deleted_while_it_is_streamed_is_said_to_be_gone(
    server: Server, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streamer says only that it could not read it."""
    monkeypatch.setattr("loaders.stream.MOST_PIECES", 1)
    monkeypatch.setattr("loaders.stream.MOST_STRETCHES", 1)
    stream = open_checkpoint(server.put(directory, "vanishing")).stream()
    next(stream)
    for file in directory.glob("*.safetensors"):
        server.client.delete_object(Bucket=BUCKET, Key=f"vanishing/{file.name}")
    with pytest.raises(CheckpointError, match=r"cannot be read: .*; .* is gone: there is no such object") as caught:
        list(stream)
    assert len(caught.value.problems) == 1


def test_a_header_that_is_replaced_while_it_is_read_is_an_error(server: Server, directory: Path) -> None:
    server.put(directory, "pinned")
    file = s3.S3Prefix(f"{BUCKET}/pinned").open("config.json")
    server.client.put_object(Bucket=BUCKET, Key="pinned/config.json", Body=b"{}" + bytes(4096))
    with pytest.raises(OSError, match="it changed since it was opened"):
        file.read(0, 100)


def test_a_saved_model_finds_what_it_left_out_where_it_was(
    server: Server, tmp_path: Path, asked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It remembers what the files were, and no more of them."""
    import jax_models

    directory = make_checkpoint("qwen3_5-wrapped", tmp_path / "it", max_file_bytes=1 << 16)
    uri = server.put(directory, "towers")
    model = jax_models.load(uri, vision=False)
    model.save(tmp_path / "save")
    restored = jax_models.restore(tmp_path / "save")
    left_in = {restored.checkpoint.tensors[name].file for name in restored.report.left_out}
    assert len(restored.report.left_out) > len(left_in) > 1
    for one, times in ((restored, 3), (model, 2)):  # opening asks, too: a text cannot pin an object
        asked.clear()
        exported = one.export(tmp_path / f"out {times}")
        assert asked == {f"identity of {name}": times for name in left_in}
        assert digests(open_checkpoint(exported).stream()) == digests(open_checkpoint(directory).stream())
    asked.clear()
    sessions, is_current = [], s3.S3Prefix.is_current
    monkeypatch.setattr(s3.S3Prefix, "is_current", lambda self, it: sessions.append(it) or is_current(self, it))
    files = {path.name for path in directory.glob("*.safetensors")}
    assert {name for name, _ in restored.checkpoint.stream()} == open_checkpoint(directory).tensors.keys()
    assert asked == {f"identity of {name}": 3 for name in files}
    assert len(sessions) == 1
    file = restored.checkpoint.tensors[restored.report.left_out[0]].file
    body = (directory / file).read_bytes()
    server.client.put_object(Bucket=BUCKET, Key=f"towers/{file}", Body=body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="changed since the checkpoint was opened"):
        list(restored.checkpoint.stream())
    with pytest.raises(CheckpointError, match="changed since the checkpoint was opened"):
        restored.export(tmp_path / "again")


def test_json_that_is_replaced_is_noticed_at_the_end_of_a_load(server: Server, directory: Path) -> None:
    checkpoint = open_checkpoint(server.put(directory, "described"))
    checkpoint.documents.check()
    server.client.put_object(Bucket=BUCKET, Key="described/config.json", Body=b"{}")
    with pytest.raises(CheckpointError, match=r"config\.json changed since the checkpoint was opened"):
        checkpoint.documents.check()


@pytest.mark.parametrize("missing", [1, 3, 7, 8, 1000])
def test_an_answer_with_fewer_bytes_than_were_asked_for_is_an_error_and_not_other_weights(
    missing: int, uri: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the streamer it is a success: what was in memory before would stand for what did not come."""
    checkpoint, real = open_checkpoint(uri), runai.RunaiSession
    with shortening_server(server.url, missing) as url:
        monkeypatch.setattr(s3, "RunaiSession", lambda where, given: real(where, given | {"endpoint": url}))
        with pytest.raises(CheckpointError, match="cannot be read: fewer bytes came than the .* asked for"):
            list(checkpoint.stream())


@pytest.mark.parametrize("missing", [1, 2])
def test_so_it_is_where_a_tensor_is_shorter_than_a_mark(
    missing: int, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = np.array([1.5], ml_dtypes.bfloat16)
    path = write_checkpoint(tmp_path / "it", {"scale": TensorType.of(scale)}, lambda name: scale, config=CONFIG)
    checkpoint, real = open_checkpoint(server.put(path, "scale")), runai.RunaiSession
    with shortening_server(server.url, missing) as url:
        monkeypatch.setattr(s3, "RunaiSession", lambda where, given: real(where, given | {"endpoint": url}))
        with pytest.raises(CheckpointError, match="cannot be read"):
            list(checkpoint.stream())


def test_what_looks_as_if_too_little_came_is_asked_for_once_more(
    server: Server, tmp_path: Path, asked: Counter[str]
) -> None:
    """A file may have the byte that a mark ends in where one lies; this one has no other."""
    ones = np.full(1000, 0xFF, np.uint8)
    path = write_checkpoint(tmp_path / "it", {"ones": TensorType.of(ones)}, lambda name: ones, config=CONFIG)
    checkpoint = open_checkpoint(server.put(path, "ones"))
    asked.clear()
    ((_, found),) = checkpoint.stream()
    np.testing.assert_array_equal(found, ones)
    assert asked["bytes of model.safetensors"] == 1


def test_marks_lie_where_an_answer_may_end() -> None:
    """The streamer asks for what lies between multiples of 8 MiB of a file, or of what its environment says."""
    num_bytes = (5 << 20) + 3
    marks = runai._marks(num_bytes, (8 << 20) - 100)
    assert [stop for _, stop in marks] == [100 + (mib << 20) for mib in range(5)] + [num_bytes]
    assert {stop - start for start, stop in marks} == {runai.MARK_BYTES}
    assert runai._marks(7, 0) == [(0, 7)]
    assert runai._marks(9, (1 << 20) - 5) == [(0, 5), (5, 9)]  # none covers another


def test_a_failed_load_leaves_the_old_weights_serving(server: Server, directory: Path) -> None:
    import torch_models

    uri = server.put(directory, "half")
    model = torch_models.load(uri)
    before = model.digests()
    file = sorted(path.name for path in directory.glob("*.safetensors"))[-1]
    server.client.delete_object(Bucket=BUCKET, Key=f"half/{file}")
    with pytest.raises(CheckpointError):
        model.update_weights_from_disk(uri)
    assert (model.version, model.digests()) == (1, before)


def test_the_index_decides_which_objects_are_read(server: Server, directory: Path) -> None:
    uri = server.put(directory, "escaping")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "../moe/model.safetensors"
    key = "escaping/model.safetensors.index.json"
    client(server.url).put_object(Bucket=BUCKET, Key=key, Body=json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the checkpoint directory"):
        open_checkpoint(uri)
