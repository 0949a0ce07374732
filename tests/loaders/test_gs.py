"""Checkpoints in Google Cloud Storage, on loopback: read by range, pinned by generation, given up within a deadline."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gs_server import BUCKET, Server
from object_stores import Refusal, assert_same_checkpoint, ends_within
from s3_server import silent_server

from loaders import CheckpointError, open_checkpoint
from loaders.digest import digests
from loaders.sources import gs, library, objects, runai
from parity.zoo import make_checkpoint


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gs.ENDPOINT, server.url)
    monkeypatch.setattr(server, "refusal", lambda path: None)
    server.asked.clear()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3-moe", tmp_path_factory.mktemp("gs") / "c", dtype="BF16", max_file_bytes=1 << 16)


@pytest.fixture(scope="module")
def uri(server: Server, directory: Path) -> str:
    return server.put(directory, "models/a moe")


def test_it_is_the_checkpoint_that_lies_there(uri: str, directory: Path) -> None:
    assert_same_checkpoint(uri, directory)


def test_opening_reads_json_and_headers_by_range_and_nothing_else(uri: str, server: Server, directory: Path) -> None:
    checkpoint = open_checkpoint(uri)
    spans = [span.removeprefix("bytes=").split("-") for path, span, _ in server.asked if "alt=media" in path and span]
    assert len(spans) == sum("alt=media" in path for path, _, _ in server.asked)
    documents = sum(path.stat().st_size for path in directory.glob("*.json"))
    headers = sum(path.stat().st_size for path in directory.glob("*.safetensors")) - checkpoint.num_bytes
    assert sum(int(last) - int(first) + 1 for first, last in spans) == documents + headers


def test_tensors_come_through_the_streamer_in_few_requests(uri: str, server: Server) -> None:
    checkpoint = open_checkpoint(uri)
    server.asked.clear()
    assert sum(array.nbytes for _, array in checkpoint.stream()) == checkpoint.num_bytes
    through_it = [path for path, span, _ in server.asked if span is not None]
    assert not any("ifGenerationMatch" in path for path in through_it)
    assert 0 < len(through_it) < len(checkpoint.tensors) / 4


def test_a_model_loads_and_reloads_from_it(uri: str, directory: Path) -> None:
    import torch_models

    model = torch_models.load(uri)
    model = model.update_weights_from_disk(uri)
    assert (model.version, model.digests()) == (2, digests(open_checkpoint(directory).stream()))


# What is wrong with it


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        (f"gs://{BUCKET}/none", f"there is no object under gs://{BUCKET}/none/"),
        ("gs://no-such-bucket/none", "there is no bucket 'no-such-bucket'"),
        ("gs:///none", "it names no bucket, expected gs://bucket/prefix"),
        (f"gs://{BUCKET}/models//a", "a part of its prefix has no name"),
        (Path("gs://bucket/prefix"), "Give it as text: 'gs://bucket/prefix'"),
    ],
)
def test_an_address_where_nothing_is_is_an_error(uri: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(uri)
    assert len(caught.value.problems) == 1


def test_missing_and_truncated_objects_are_one_error(server: Server, directory: Path) -> None:
    uri = server.put(directory, "bad")
    first, second = sorted(path.name for path in directory.glob("*.safetensors"))[:2]
    del server.objects[f"bad/{first}"]
    raw = (directory / second).read_bytes()
    server.put_object(f"bad/{second}", raw[:-10])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(uri)
    assert any(f"{first} is named in" in problem and "missing" in problem for problem in caught.value.problems)
    assert any(f"{second}: the file has {len(raw) - 10} bytes" in problem for problem in caught.value.problems)


@pytest.mark.parametrize("how", ["replaced", "deleted", "truncated", "written again"])
def test_an_object_that_changed_since_opening_is_an_error_and_not_other_weights(
    server: Server, directory: Path, how: str
) -> None:
    uri = server.put(directory, how)
    checkpoint = open_checkpoint(uri)
    name, info = next(iter(checkpoint.tensors.items()))
    key, raw = f"{how}/{info.file}", (directory / info.file).read_bytes()
    if how == "deleted":
        del server.objects[key]
    else:
        server.put_object(key, {"replaced": raw[:-9] + bytes(9), "truncated": raw[:-9], "written again": raw}[how])
    for attempt in (lambda: checkpoint.read(name), lambda: list(checkpoint.stream())):
        with pytest.raises(CheckpointError, match=r"changed since|there is no such object") as caught:
            attempt()
        assert len(caught.value.problems) == 1


def test_an_object_replaced_while_it_is_streamed_is_an_error(
    server: Server, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaders.stream.MOST_PIECES", 1)
    stream = open_checkpoint(server.put(directory, "racing")).stream()
    next(stream)
    for file in directory.glob("*.safetensors"):
        server.put_object(f"racing/{file.name}", file.read_bytes()[:-4] + bytes(4))
    with pytest.raises(CheckpointError, match="changed since the checkpoint was opened"):
        list(stream)


def test_json_that_is_replaced_is_noticed_at_the_end_of_a_load(server: Server, directory: Path) -> None:
    checkpoint = open_checkpoint(server.put(directory, "described"))
    checkpoint.documents.check()
    server.put_object("described/config.json", (directory / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"config\.json changed since the checkpoint was opened"):
        checkpoint.documents.check()


def test_a_header_that_is_replaced_while_it_is_read_is_an_error(server: Server, directory: Path) -> None:
    server.put(directory, "pinned")
    file = gs.GsPrefix(f"{BUCKET}/pinned").open("config.json")
    server.put_object("pinned/config.json", b"{}" + bytes(4096))
    with pytest.raises(OSError, match="it changed since it was opened"):
        file.read(0, 100)


def test_without_the_streamers_part_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.PARTS, "gs", (library.PARTS["gs"][0], "libnone.so"))
    with pytest.raises(CheckpointError, match=r"runai-model-streamer-gcs is not installed\. .*'\.\[gs\]'"):
        open_checkpoint("gs://ckpt/x")


def test_without_credentials_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gs.ENDPOINT)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent")
    with pytest.raises(CheckpointError, match="DefaultCredentialsError"):
        open_checkpoint("gs://ckpt/x")


def test_without_google_auth_a_public_bucket_is_read_and_a_private_one_says_what_to_install(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("google.auth")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "google.auth", None)  # what import finds of a package that is not there
    real = gs.importlib.util.find_spec
    monkeypatch.setattr(gs.importlib.util, "find_spec", lambda name: None if name == "google.auth" else real(name))
    assert open_checkpoint(uri).tensors
    monkeypatch.delenv(gs.ENDPOINT)
    with pytest.raises(CheckpointError, match="google-auth is not installed"):
        open_checkpoint(uri)


# A server that goes away


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gs.ENDPOINT, "http://127.0.0.1:9")
    assert "ConnectionError" in ends_within(20, lambda: open_checkpoint("gs://ckpt/x"))


@pytest.mark.usefixtures("impatient")
def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent_server() as url:
        monkeypatch.setenv(gs.ENDPOINT, url)
        assert "timed out" in ends_within(20, lambda: open_checkpoint("gs://ckpt/x"))


@pytest.mark.usefixtures("impatient")
def test_a_server_that_falls_silent_half_way_is_given_up(
    uri: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streamer's own client would try for a quarter of an hour."""
    checkpoint = open_checkpoint(uri)
    real = runai.RunaiSession.submit

    def silenced(*args: Any) -> int:
        server.speaks.clear()
        return real(*args)

    monkeypatch.setattr(runai.RunaiSession, "submit", silenced)
    try:
        said = ends_within(10, lambda: list(checkpoint.stream()))
    finally:
        server.speaks.set()
    assert said == f"nothing has come from {uri} for 1 s. Is it still there?"


@pytest.mark.parametrize("status", [429, 503])
def test_opening_is_as_patient_with_a_busy_server_as_streaming_is(uri: str, server: Server, status: int) -> None:
    for where in ("delimiter=", "%2Fconfig.json", "%2Fmodel-00001-"):
        server.refusal = Refusal(where, status, times=4)
        assert open_checkpoint(uri).tensors
        assert server.refusal.asked
        assert min(server.refusal.asked.values()) >= 5


def test_what_will_not_go_away_is_asked_for_once_and_said_as_it_is(uri: str, server: Server) -> None:
    for status, says in ((403, "403 Forbidden: Refused."), (404, "there is no such object")):
        server.refusal = Refusal("%2Fconfig.json", status, times=9)
        said = ends_within(20, lambda: open_checkpoint(uri))
        assert said == f"config.json cannot be read: {says}"  # and not that this may be no checkpoint
        assert list(server.refusal.asked.values()) == [1]


@pytest.mark.usefixtures("impatient")
def test_a_server_that_stays_busy_is_given_up_at_the_first_files(uri: str, server: Server) -> None:
    server.refusal = Refusal("fields=generation", 503, times=9)
    said = ends_within(20, lambda: open_checkpoint(uri))
    assert re.fullmatch(r"\S+\.json cannot be read: 503 Service Unavailable: Refused\.", said)  # asked at once
    assert max(server.refusal.asked.values()) == objects.ATTEMPTS
    assert not any("safetensors" in path.partition("?")[0] and "index" not in path for path in server.refusal.asked)


def test_a_server_that_asks_for_a_long_pause_is_given_up_in_time(
    uri: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "DEADLINE_S", 1.0)
    monkeypatch.setattr(server, "refusal_headers", {"Retry-After": "20"})
    for where in ("delimiter=", "fields=generation", "alt=media"):
        server.refusal = Refusal(where, 503, times=1)
        assert "did not come in 1 s. Is the server in trouble?" in ends_within(20, lambda: open_checkpoint(uri))


def test_an_answer_that_is_cut_or_too_long_is_an_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put_object("odd/x", bytes(1000))
    file = gs.GsPrefix(f"{BUCKET}/odd").open("x")
    for given, says in (([bytes(10)], "10 bytes came from byte 5 on, expected 20"), ([bytes(21)], "more came than")):
        monkeypatch.setattr(gs.GsFile, "parts", lambda *_, given=given: iter(given))
        with pytest.raises(OSError, match=says):
            file.read(5, 20)


def test_the_rest_is_asked_for_where_a_connection_breaks(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    body = bytes(range(256)) * 4000
    server.put_object("odd/y", body)
    file = gs.GsPrefix(f"{BUCKET}/odd").open("y")
    monkeypatch.setattr(server, "breaks", 3)
    assert file.read(5, 10**6) == body[5 : 10**6 + 5]
    spans = [span for path, span, _ in server.asked if "odd%2Fy" in path and span]
    starts = [int(span.removeprefix("bytes=").removesuffix("-1000004")) for span in spans]
    assert (starts[0], len(set(starts))) == (5, 4)
    assert starts == sorted(starts)  # what came is not asked for again
    monkeypatch.setattr(server, "breaks", 100)
    with pytest.raises(objects.Broken, match="Connection broken"):
        file.read(5, 10**6)
    assert server.breaks == 100 - objects.ATTEMPTS


def test_an_answer_of_other_bytes_than_were_asked_for_is_an_error(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put_object("odd/z", bytes(1000))
    file = gs.GsPrefix(f"{BUCKET}/odd").open("z")
    monkeypatch.setattr(server, "says_range", False)
    with pytest.raises(OSError, match="asked from byte 5 on, it answers with Content-Range None"):
        file.read(5, 20)
    assert file.read(0, 1000) == bytes(1000)  # to all of it an answer without a range is one
