"""Checkpoints on a real S3 server on loopback: read by range, pinned by ETag, and given up within a deadline."""

from __future__ import annotations

import copy
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_stores import Refusal, assert_same_checkpoint, ends_within
from s3_server import (
    BUCKET,
    ENVIRONMENT,
    Server,
    breaking_server,
    client,
    dripping_server,
    refusing_server,
    shortening_server,
    silent_server,
)

from loaders import CheckpointError, open_checkpoint
from loaders.adapters import open_adapter
from loaders.digest import digests
from loaders.dtypes import to_numpy
from loaders.filling import Filling
from loaders.plan import plan_load
from loaders.regions import Box, Region, sizes_of
from loaders.shards import read_shards
from loaders.sources import Unreachable, objects, runai, s3
from loaders.spec import ParamSpec
from loaders.stage import Stage
from parity.inspection import open_subject
from parity.zoo import make_checkpoint
from parity.zoo_adapters import make_adapter


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        server = Server()
        yield server
        server.stop()


@pytest.fixture(autouse=True)
def environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts fused and transposed, one per expert in the draft; several files."""
    path = tmp_path_factory.mktemp("s3") / "c"
    forms: dict[str, Any] = {"experts": "fused transposed", "draft_experts": "per expert"}
    kinds = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    return make_checkpoint("qwen3_5-moe", path, dtype="BF16", max_file_bytes=1 << 17, **forms, **kinds)


@pytest.fixture(scope="module")
def uri(server: Server, directory: Path) -> str:
    return server.put(directory, "models/moe")


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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Requests that were made for objects, by what they ask for; those of the streamer's own are not seen."""
    asked: Counter[str] = Counter()
    identify, parts = s3.S3File.identify, s3.S3File.parts

    def identified(self: s3.S3File) -> s3.ObjectIdentity:
        asked[f"identity of {self.name}"] += 1
        return identify(self)

    def read(self: s3.S3File, position: int, count: int) -> Iterator[bytes]:
        asked[f"bytes of {self.name}"] += 1
        return iter(parts(self, position, count))

    monkeypatch.setattr(s3.S3File, "identify", identified)
    monkeypatch.setattr(s3.S3File, "parts", read)
    return asked


def test_a_file_is_asked_about_once_to_open_it_and_twice_to_read_it(
    uri: str, directory: Path, asked: Counter[str]
) -> None:
    """However many lots it is read in: a request takes as long as megabytes do."""
    files = {path.name for path in directory.glob("*.safetensors")}
    documents = {path.name for path in directory.glob("*.json")}
    checkpoint = open_checkpoint(uri)
    opened = {f"identity of {name}": 2 for name in documents} | {f"bytes of {name}": 1 for name in documents}
    opened |= {f"identity of {name}": 1 for name in files} | {f"bytes of {name}": 2 for name in files}
    assert asked == opened
    asked.clear()
    lots = [{name} for name in checkpoint.tensors]
    assert [name for name, _ in checkpoint.stream(lots=lots)] == list(checkpoint.tensors)
    assert asked == {f"identity of {name}": 2 for name in files}


def test_a_reload_asks_no_more_often_for_being_read_parameter_by_parameter(uri: str, asked: Counter[str]) -> None:
    import torch_models

    model = torch_models.load(uri)
    loaded = Counter(asked)
    asked.clear()
    model.update_weights_from_disk(uri)
    again = {name: 2 if name.startswith("identity of model-") else 0 for name in loaded}
    assert asked == {name: loaded[name] + more for name, more in again.items()}  # read twice, opened once


def test_objects_are_asked_about_at_once(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits until another is asked for, too."""
    meet, identify = threading.Barrier(2), s3.S3File.identify

    def met(self: s3.S3File) -> s3.ObjectIdentity:
        if self.name.endswith(".safetensors"):
            meet.wait(20)
        return identify(self)

    monkeypatch.setattr(s3.S3File, "identify", met)
    checkpoint = open_checkpoint(uri)
    assert len(checkpoint.files.identities) == 2
    list(checkpoint.stream())
    assert not meet.broken


class Busy:
    """Gives up whoever asks while so many others do, for whom it waits; ``asked`` counts all."""

    def __init__(self, most: int, waits_s: float = 0.01) -> None:
        self.most, self.now, self.asked, self.lock = most, 0, 0, threading.Lock()
        self.waits_s, self.is_met = waits_s, threading.Event()

    def __call__(self, name: str) -> str:
        with self.lock:
            self.now, self.asked = self.now + 1, self.asked + 1
            refused = self.now > self.most
        if refused:
            self.is_met.set()
        self.is_met.wait(self.waits_s)
        with self.lock:
            self.now -= 1
        if refused:
            raise Unreachable("503 SlowDown")
        return name.upper()


@pytest.mark.parametrize("most", [1, 2, 5, 100])
def test_a_server_that_gives_up_some_is_asked_one_by_one(uri: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another client, once the connections of this one are closed: the server may have no more."""
    source, names = s3.S3Prefix(uri.removeprefix("s3://")), [f"n{number}" for number in range(40)]
    before, closed = source.client, []
    monkeypatch.setattr(before, "close", lambda: closed.append(before))
    is_given_up = most < objects.REQUESTS
    busy = Busy(most, waits_s=10 if is_given_up else 0.01)
    assert list(source.in_parallel(busy, names)) == [name.upper() for name in names]
    assert (len(closed), source.client is before) == (int(is_given_up), not is_given_up)
    patient = Busy(1 if is_given_up else 100)
    assert list(source.in_parallel(patient, names)) == [name.upper() for name in names]
    assert patient.asked == 40


def test_a_server_that_answers_nobody_is_not_asked_again(uri: str) -> None:
    source, silent = s3.S3Prefix(uri.removeprefix("s3://")), Busy(0)
    with pytest.raises(Unreachable):
        list(source.in_parallel(silent, [f"n{number}" for number in range(40)]))
    assert silent.asked <= 2 * objects.REQUESTS


def test_what_asks_is_not_shared_with_a_forked_child(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that share connections get each other's answers."""
    source = s3.S3Prefix(uri.removeprefix("s3://"))
    before = source.client
    assert source.client is before
    monkeypatch.setattr("loaders.sources.objects.os.getpid", lambda: -1)
    assert source.client is not before


def test_where_credentials_are_renewed_the_next_lot_is_read_with_those(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials: list[str] = []
    real, answers = s3.RunaiSession, iter([True, False, True] + [False] * 100)
    monkeypatch.setattr(s3, "RunaiSession", lambda where, given: credentials.append(where) or real(where, given))
    checkpoint = open_checkpoint(uri)
    lots = [{name} for name in list(checkpoint.tensors)[:4]]
    monkeypatch.setattr(s3.S3Prefix, "is_current", lambda self, session: next(answers))
    found = dict(checkpoint.stream(lots=lots))
    assert len(credentials) == 3
    assert digests(found.items()) == digests(checkpoint.stream(names=found))


def test_a_session_is_current_as_long_as_its_credentials_are(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = s3.S3Prefix(uri.removeprefix("s3://"))
    session, other = source.session(1), s3.S3Prefix(uri.removeprefix("s3://"))
    assert source.is_current(session)
    monkeypatch.setattr(source, "_session", other._session)
    assert source.is_current(session)  # which are the same
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "renewed")
    monkeypatch.setattr(source, "_session", s3.S3Prefix(uri.removeprefix("s3://"))._session)
    assert not source.is_current(session)
    session.close()


def test_credentials_that_cannot_be_renewed_are_an_error_of_the_checkpoint(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import CredentialRetrievalError

    def fails(_: Any) -> Any:
        raise CredentialRetrievalError(provider="sso", error_msg="token has expired")

    checkpoint = open_checkpoint(uri)
    first, *names = checkpoint.tensors
    stream = checkpoint.stream(lots=[{first}, set(names)])
    next(stream)
    monkeypatch.setattr("boto3.Session.get_credentials", fails)
    with pytest.raises(CheckpointError, match="cannot be read further: CredentialRetrievalError: .*token has expired"):
        list(stream)


def test_a_server_under_a_name_is_streamed_from_as_boto3_asks_it(
    uri: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streamer by itself would ask bucket.localhost."""
    expected = digests(open_checkpoint(uri).stream())
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.replace("127.0.0.1", "localhost"))
    assert digests(open_checkpoint(uri).stream()) == expected


def test_a_bucket_of_another_region_is_streamed_from_there(
    uri: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """boto3 goes where it is told that the bucket is, and the streamer has to be told."""
    expected = digests(open_checkpoint(uri).stream())
    with refusing_server(server.url, region="eu-west-1") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert digests(open_checkpoint(uri).stream()) == expected


@pytest.mark.parametrize(
    ("setting", "bucket", "endpoint", "is_virtual"),
    [
        ({}, "ckpt", None, True),
        ({}, "with.dots", None, False),
        ({"AWS_DEFAULT_REGION": "eu-west-1"}, "ckpt", None, True),
        ({"AWS_ENDPOINT_URL": "http://minio:9000"}, "ckpt", "http://minio:9000", False),
        ({"AWS_ENDPOINT_URL_S3": "http://gate:9000/s3/"}, "ckpt", "http://gate:9000/s3", False),
        (
            {"AWS_ENDPOINT_URL": "http://ckpt.lab:9000"},
            "ckpt",
            "http://ckpt.lab:9000",
            False,
        ),  # called as the bucket is
        (
            {"AWS_ENDPOINT_URL_S3": "https://bucket.vpce-1a.s3.us-east-1.vpce.amazonaws.com"},
            *("ckpt", "https://bucket.vpce-1a.s3.us-east-1.vpce.amazonaws.com", False),
        ),
        ({"AWS_USE_FIPS_ENDPOINT": "true"}, "ckpt", "https://s3-fips.us-east-1.amazonaws.com", True),
        ({"AWS_USE_DUALSTACK_ENDPOINT": "true"}, "ckpt", "https://s3.dualstack.us-east-1.amazonaws.com", True),
        (
            {"AWS_ENDPOINT_URL": "http://minio.amazonaws.com.lab.internal"},
            *("ckpt", "http://minio.amazonaws.com.lab.internal", False),
        ),
    ],
    ids=lambda given: str(given) if isinstance(given, dict) else "",
)
def test_the_streamer_is_told_whom_boto3_asks(
    setting: dict[str, str], bucket: str, endpoint: str | None, is_virtual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that is of AWS, but not what everybody asks."""
    given: list[dict[str, str]] = []

    class Session:
        def __init__(self, where: str, credentials: dict[str, str]) -> None:
            given.append(credentials)

    monkeypatch.setattr(s3, "RunaiSession", Session)
    monkeypatch.setattr(s3, "_is_style_ours", False)
    monkeypatch.delenv("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    s3.S3Prefix(f"{bucket}/a").session(1)
    region = setting.get("AWS_DEFAULT_REGION", "us-east-1")
    assert (given[0].get("endpoint"), given[0]["region"]) == (endpoint, region)
    assert os.environ.get("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING") == (None if is_virtual else "0")


def test_how_the_user_has_buckets_addressed_stays(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_is_style_ours", False)
    monkeypatch.setenv("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "1")
    s3.S3Prefix(uri.removeprefix("s3://")).session(1).close()
    assert os.environ["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] == "1"


def test_a_style_that_was_set_is_set_again_where_somebody_removed_it(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digests(open_checkpoint(uri).stream())
    monkeypatch.delenv("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING")
    assert digests(open_checkpoint(uri).stream()) == expected
    assert os.environ["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] == "0"


def test_an_open_checkpoint_is_copied_and_goes_to_other_processes(uri: str) -> None:
    checkpoint = open_checkpoint(uri)
    expected = digests(checkpoint.stream())
    for other in (copy.deepcopy(checkpoint), pickle.loads(pickle.dumps(checkpoint))):
        assert digests(other.stream()) == expected


def test_a_server_that_falls_silent_is_not_asked_for_the_rest(uri: str) -> None:
    asked: list[str] = []

    def work(name: str) -> str:
        asked.append(name)
        if name == "0":
            return name
        time.sleep(0.2)
        raise Unreachable("nothing came")

    source = s3.S3Prefix(uri.removeprefix("s3://"))
    with pytest.raises(Unreachable):
        list(source.in_parallel(work, [str(number) for number in range(64)]))
    assert len(asked) <= objects.REQUESTS + 2  # then one, alone


def test_asking_leaves_the_process_as_it_is(uri: str) -> None:
    """How others are started is the user's to say, once."""
    program = "import sys, multiprocessing; from loaders import open_checkpoint; open_checkpoint(sys.argv[1])"
    program += "; multiprocessing.set_start_method('spawn')"
    done = subprocess.run([sys.executable, "-c", program, uri], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_adapter_is_read_in_few_requests(server: Server, tmp_path: Path, asked: Counter[str]) -> None:
    """It may have hundreds of tensors of some kilobytes."""
    base = make_checkpoint("qwen3", tmp_path / "base")
    config = open_checkpoint(base).config
    adapter = make_adapter(base, tmp_path / "adapter")
    expected = open_adapter(adapter, config)
    assert len(expected.low_rank) > 2
    asked.clear()
    found = open_adapter(server.put(adapter, "adapter"), config)
    assert found.digest == expected.digest
    bytes_of = {"adapter_config.json": 1, "adapter_model.safetensors": 3}  # length of the header, header, all of it
    assert asked == {f"bytes of {name}": count for name, count in bytes_of.items()} | {
        f"identity of {name}": 2 for name in bytes_of
    }


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
    filling = Filling(plan_load(open_checkpoint(uri), Stage(mtp=True)))
    found = {spec.name: shards for spec, shards in read_shards(filling, halves)}
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


@pytest.mark.parametrize("missing", [8, 1000])
def test_an_answer_with_fewer_bytes_than_were_asked_for_is_an_error_and_not_other_weights(
    missing: int, uri: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the streamer it is a success: what was in memory before would stand for what did not come."""
    checkpoint, real = open_checkpoint(uri), runai.RunaiSession
    with shortening_server(server.url, missing) as url:
        monkeypatch.setattr(s3, "RunaiSession", lambda where, given: real(where, given | {"endpoint": url}))
        with pytest.raises(CheckpointError, match="cannot be read: fewer bytes came than the .* asked for"):
            list(checkpoint.stream())


def test_marks_lie_where_an_answer_may_end() -> None:
    """The streamer asks for what lies between multiples of 8 MiB of a file, or of what its environment says."""
    buffer = np.zeros((5 << 20) + 3, np.uint8)
    for mark in runai._marks(buffer, (8 << 20) - 100):
        assert mark.size == runai.MARK_BYTES
        mark[...] = 1
    ends = np.flatnonzero(np.diff(np.append(buffer, 0).astype(np.int8)) < 0) + 1
    assert ends.tolist() == [100 + (mib << 20) for mib in range(5)] + [buffer.size]
    assert runai._marks(buffer[:7], 0) == []


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


def test_an_address_that_went_through_a_path_is_told_from_a_directory() -> None:
    with pytest.raises(CheckpointError, match="Give it as text: 's3://bucket/prefix'"):
        open_checkpoint(Path("s3://bucket/prefix"))


# A server that goes away


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "Could not connect" in ends_within(20, lambda: open_checkpoint("s3://ckpt/x"))


@pytest.mark.usefixtures("impatient")
def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent_server() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert "ReadTimeout" in ends_within(20, lambda: open_checkpoint("s3://ckpt/x"))


@pytest.mark.parametrize("where", ["list-type", "/config.json", "/model-00001-"])
def test_opening_is_as_patient_with_a_busy_server_as_streaming_is(
    uri: str, server: Server, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    refusal = Refusal(where, 503, times=4)
    with refusing_server(server.url, refusal) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert open_checkpoint(uri).tensors
    assert refusal.asked
    assert min(refusal.asked.values()) >= 5


@pytest.mark.parametrize(("status", "says"), [(403, "Forbidden"), (404, "there is no such object")])
def test_what_will_not_go_away_is_asked_for_once_and_said_as_it_is(
    uri: str, server: Server, monkeypatch: pytest.MonkeyPatch, status: int, says: str
) -> None:
    refusal = Refusal("/config.json", status, times=9)
    with refusing_server(server.url, refusal) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        said = ends_within(20, lambda: open_checkpoint(uri))
    assert said.startswith("config.json cannot be read: ")
    assert said.endswith(says)  # and not that this may be no checkpoint
    assert list(refusal.asked.values()) == [1]


def test_a_server_that_redirects_without_end_is_an_error(
    uri: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refusing_server(server.url, Refusal("", 307, times=10_000)) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert "redirects without end" in ends_within(30, lambda: open_checkpoint(uri))


def test_a_server_that_says_no_etag_is_an_error(uri: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing_server(server.url, without="etag") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(uri)
    assert {problem.partition(": ")[2] for problem in caught.value.problems} >= {"the server does not say its ETag"}


@pytest.mark.usefixtures("impatient")
def test_a_server_that_stays_busy_is_given_up_at_the_first_files(
    uri: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = Refusal("HEAD", 503, times=9)
    with refusing_server(server.url, refusal) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert "503" in ends_within(20, lambda: open_checkpoint(uri))
    assert max(refusal.asked.values()) == objects.ATTEMPTS
    assert not any("safetensors" in path.partition("?")[0] and "index" not in path for path in refusal.asked)


def test_no_request_takes_longer_than_the_deadline_whatever_the_client_would(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "DEADLINE_S", 1.0)
    with silent_server() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert "an answer did not come in 1 s. Is the server in trouble?" in ends_within(
            5, lambda: open_checkpoint(uri)
        )


def test_the_rest_is_asked_for_where_a_connection_breaks(
    uri: str, server: Server, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By boto3, to which an answered request is over; that it breaks each time is one to tell of."""
    with breaking_server(server.url, times=3) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert open_checkpoint(uri).tensors == open_checkpoint(directory).tensors
    with breaking_server(server.url, times=100) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert "IncompleteRead" in ends_within(20, lambda: open_checkpoint(uri))


def test_an_answer_without_its_range_is_an_error(uri: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing_server(server.url, without="content-range") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(CheckpointError, match="it answers with Content-Range None"):
            open_checkpoint(uri)


@pytest.mark.usefixtures("impatient")
def test_a_server_of_which_a_byte_comes_now_and_then_is_given_up_once(
    uri: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a client that is no timeout; and the next file would take as long."""
    monkeypatch.setattr(objects, "DEADLINE_S", 1.0)
    with dripping_server(server.url) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert "did not come in 1 s. Is the server in trouble?" in ends_within(20, lambda: open_checkpoint(uri))


@pytest.mark.usefixtures("impatient")
def test_a_server_that_falls_silent_half_way_is_given_up(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The streamer's own client would wait on; what it still writes to is never used again."""
    checkpoint = open_checkpoint(uri)
    name, info = max(checkpoint.tensors.items(), key=lambda item: item[1].num_bytes)
    box = (*((0, size) for size in info.shape[:-1]), (0, 2))

    def columns() -> list[Any]:
        part = Region(info.shape, box, np.empty(sizes_of(box), to_numpy(info.dtype)))
        return list(checkpoint.stream_regions([{name}], lambda _: [part]))

    with silent_server() as url:
        real = runai.RunaiSession

        def elsewhere(where: str, credentials: dict[str, str]) -> runai.RunaiSession:
            return real(where, credentials | {"endpoint": url})

        monkeypatch.setattr(s3, "RunaiSession", elsewhere)
        for attempt in (lambda: list(checkpoint.stream()), columns):
            assert ends_within(10, attempt) == f"nothing has come from {uri} for 1 s. Is it still there?"
        ending = [thread for thread in threading.enumerate() if thread.name == "tandem-runai-end"]
        assert all(thread.daemon for thread in ending)  # no interpreter waits for it


GIVES_UP = """
import sys
from loaders import CheckpointError, open_checkpoint
from loaders.sources import Unreachable, objects, runai, s3

uri, silent = sys.argv[1:]
runai.DEADLINE_S, runai.CLOSE_S, real = 1.0, 0.2, runai.RunaiSession
s3.RunaiSession = lambda where, credentials: real(where, credentials | {"endpoint": silent})
try:
    list(open_checkpoint(uri).stream())
except CheckpointError as error:
    print(error)
    sys.exit(7)
"""


def test_a_process_that_gave_up_a_silent_server_ends_with_its_own_status(uri: str) -> None:
    """And neither crashes nor hangs because of the thread that still waits."""
    with silent_server() as url:
        ended = subprocess.run([sys.executable, "-c", GIVES_UP, uri, url], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (7, "")
    assert "Is it still there?" in ended.stdout


@pytest.mark.usefixtures("impatient")
def test_a_server_that_vanishes_half_way_is_one_error(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    checkpoint = open_checkpoint(server.put(directory, "x"))
    server.stop()
    problem = ends_within(20, lambda: list(checkpoint.stream()))
    assert "Could not connect" in problem or "Connection" in problem


def test_wrong_credentials_are_not_printed(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(CheckpointError, match="redential"):
        open_checkpoint(uri)


def test_the_index_decides_which_objects_are_read(server: Server, directory: Path) -> None:
    uri = server.put(directory, "escaping")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "../moe/model.safetensors"
    key = "escaping/model.safetensors.index.json"
    client(server.url).put_object(Bucket=BUCKET, Key=key, Body=json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the checkpoint directory"):
        open_checkpoint(uri)


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
