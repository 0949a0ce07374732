"""Stores that answer, with what makes no sense: one error, in time, and nothing else."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from object_stores import ends_within
from s3_server import ENVIRONMENT

from loaders import CheckpointError, open_checkpoint
from loaders.sources import gs, objects

Answer = Callable[[str], tuple[dict[str, str], bytes]]
NONSENSE = r"the server('s answer makes no sense \(| does not say its)"
HEAD = {"ETag": '"x"', "Last-Modified": "Tue, 01 Dec 2026 15:00:00 GMT", "Content-Length": "2"}


@contextmanager
def answering(listing: Answer, about: Answer) -> Iterator[str]:
    """The address of a server of either kind: to a listing it answers one thing, to a question about an object another.

    Each is given the path, and returns headers and body.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            is_listing = "list-type" in self.path or "delimiter=" in self.path
            headers, body = (listing if is_listing else about)(self.path)
            self.send_response(200)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.handle_error = True, lambda *_: None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def xml(*keys: str, more: str = "") -> bytes:
    contents = "".join(f"<Contents><Key>{key}</Key></Contents>" for key in keys)
    return f"<ListBucketResult>{more}{contents}</ListBucketResult>".encode()


def always(body: object, **headers: str) -> Answer:
    found = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda path: ({name.replace("_", "-"): value for name, value in headers.items()}, found)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def said(environment: pytest.MonkeyPatch, scheme: str, listing: Answer, about: Answer) -> list[str]:
    with answering(listing, about) as url:
        environment.setenv("AWS_ENDPOINT_URL", url)
        environment.setenv(gs.ENDPOINT, url)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(f"{scheme}://b/m")
    return caught.value.problems


@pytest.mark.parametrize(
    ("scheme", "listing"),
    [
        ("s3", b"<ListBucketResult><Contents><Size>1</Size></Contents></ListBucketResult>"),
        ("s3", xml("m/config.json", more="<MaxKeys>abc</MaxKeys>")),
        *(("gs", one) for one in ([], "x", None, {"items": None}, {"items": 5}, {"items": [{}]}, {"items": ["a"]})),
        ("gs", {"items": [{"name": 5}]}),
        ("gs", {"items": [{"name": ["m/config.json"]}]}),
        ("gs", b"<html>"),
        ("gs", b"[" * 100_000),
    ],
)
def test_a_listing_that_is_none(environment: pytest.MonkeyPatch, scheme: str, listing: object) -> None:
    (problem,) = said(environment, scheme, always(listing, Content_Type="application/xml"), always({}, **HEAD))
    assert re.match(f"cannot be opened: {NONSENSE}", problem)


@pytest.mark.parametrize(
    ("scheme", "about"),
    [
        ("s3", {"Last-Modified": "yesterday"}),
        ("s3", {"Content-Length": "abc"}),
        ("s3", {"Content-Length": "-5"}),
        *(("gs", one) for one in ([], {}, {"generation": "x", "size": "2"}, {"generation": "1", "size": "-2"})),
        ("gs", {"generation": "1", "size": True}),
        ("gs", b'{"generation": 1, "size": 1e999}'),
        ("gs", b'{"generation": 1, "size": ' + b"9" * 5000 + b"}"),
        ("gs", b"<html>"),
    ],
)
def test_what_is_said_of_an_object_is_nothing_that_can_be(
    environment: pytest.MonkeyPatch, scheme: str, about: Any
) -> None:
    listing = xml("m/config.json") if scheme == "s3" else {"items": [{"name": "m/config.json"}]}
    answer = always(b"{}", **(HEAD | about)) if scheme == "s3" else always(about)
    problem = said(environment, scheme, always(listing), answer)[0]
    assert re.match(rf"config\.json cannot be read: {NONSENSE}", problem)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_listing_without_an_end_is_given_up(environment: pytest.MonkeyPatch, scheme: str) -> None:
    page = itertools.count()

    def listing(path: str) -> tuple[dict[str, str], bytes]:
        number = next(page)
        more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{number}</NextContinuationToken>"
        item = {"items": [{"name": f"m/{number}"}], "nextPageToken": str(number)}
        return {}, xml(f"m/{number}", more=more) if scheme == "s3" else json.dumps(item).encode()

    environment.setattr(objects, "LISTING_S", 0.5)
    with answering(listing, always({})) as url:
        environment.setenv("AWS_ENDPOINT_URL", url)
        environment.setenv(gs.ENDPOINT, url)
        problem = ends_within(20, lambda: open_checkpoint(f"{scheme}://b/m"))
    assert "names there is no end to what lies under" in problem


@pytest.mark.parametrize("token", [None, ""])
def test_no_token_is_the_last_page(environment: pytest.MonkeyPatch, token: object) -> None:
    listing = always({"items": [{"name": "m/config.json"}], "nextPageToken": token})
    problems = said(environment, "gs", listing, always({"generation": "1", "size": "-1"}))
    assert problems[0].startswith("config.json cannot be read")


@pytest.mark.parametrize("endpoint", ["not-a-url", "http://", "http://[::1"])
def test_an_endpoint_that_is_no_address(environment: pytest.MonkeyPatch, endpoint: str) -> None:
    environment.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(CheckpointError, match="AWS_ENDPOINT_URL, or of a profile"):
        open_checkpoint("s3://b/m")


@pytest.mark.parametrize("credentials", ["[]", "3", '"x"', "{}", "{"])
def test_credentials_that_make_no_sense(environment: pytest.MonkeyPatch, tmp_path: Any, credentials: str) -> None:
    (tmp_path / "keys.json").write_text(credentials)
    environment.delenv(gs.ENDPOINT, raising=False)
    environment.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "keys.json"))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("gs://b/m")
    assert len(caught.value.problems) == 1
