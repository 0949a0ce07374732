"""Servers that are gone, silent, busy or slow: given up within a deadline, with one error."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_stores import Refusal, ends_within
from s3_server import (
    Server,
    breaking_server,
    dripping_server,
    refusing_server,
    silent_server,
)

from loaders import CheckpointError, open_checkpoint
from loaders.dtypes import to_numpy
from loaders.reading.regions import Region, sizes_of
from loaders.sources import Unreachable, objects, runai, s3


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


def test_what_the_server_says_of_an_object_that_it_gives_no_more_is_told(
    uri: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the streamer comes that it failed, and nothing else; of the object's identity that it is what it was."""
    refuses: list[str] = []

    def refusal(path: str) -> int | None:
        return 403 if refuses and path.startswith("GET") and ".safetensors" in path else None

    with refusing_server(server.url, refusal) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        checkpoint = open_checkpoint(uri)
        refuses.append("from now on")
        problem = ends_within(40, lambda: list(checkpoint.stream()))
    assert "cannot be read: " in problem
    assert "; asked for a byte of it the server says: " in problem
    assert "403" in problem
