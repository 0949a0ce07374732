"""How often an S3 server is asked, how many questions at once, and with whose credentials."""

from __future__ import annotations

import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from s3_server import (
    Server,
    refusing_server,
)

from loaders import CheckpointError, open_checkpoint
from loaders.adapters.opening import open_adapter
from loaders.digest import digests
from loaders.sources import Unreachable, objects, s3
from parity.zoo import make_checkpoint
from parity.zoo.adapters import make_adapter


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
