"""A real S3 server on loopback, one that never answers, and ones that refuse, or answer too briefly or too slowly."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = "ckpt"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Server:
    """moto's, in a thread, with one bucket."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        self.client: Any = client(self.url)
        self.client.create_bucket(Bucket=BUCKET)

    def put(self, directory: Path, prefix: str) -> str:
        """Upload the files of a checkpoint; returns its address."""
        for file in directory.iterdir():
            self.client.put_object(Bucket=BUCKET, Key=f"{prefix}/{file.name}", Body=file.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def stop(self) -> None:
        self.client.close()
        self._server.stop()


def client(url: str) -> Any:
    import boto3

    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=url, **keys)


@contextmanager
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken: list[socket.socket] = []

        def accept() -> None:
            try:
                while True:
                    taken.append(listener.accept()[0])
            except OSError:  # the listener is closed
                pass

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        for connection in taken:
            connection.close()


@contextmanager
def _between(
    url: str,
    send: Callable[[BaseHTTPRequestHandler, bytes], None],
    refusal: Callable[[str], int | None] = lambda _: None,
    without: str = "",
    region: str = "",
) -> Iterator[str]:
    """The address of a server that asks the one at ``url``; objects go through ``send``, after their other headers.

    What ``refusal`` has a status for is refused: it is asked by method and path. What it redirects, it does to itself.
    A header ``without`` is not sent. What is signed for another ``region`` is refused, and told which it is.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if region and f"/{region}/s3/" not in self.headers.get("Authorization", ""):
                self.send_response(400)
                self.send_header("x-amz-bucket-region", region)
                told = f"<Error><Code>AuthorizationHeaderMalformed</Code><Region>{region}</Region></Error>".encode()
                says = told if self.command == "GET" else b""
                self.send_header("Content-Length", str(len(says)))
                self.end_headers()
                self.wfile.write(says)
                return
            if (status := refusal(f"{self.command} {self.path}")) is not None:
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", f"http://localhost:{server.server_port}{self.path}")
                says = b"<Error><Code>TemporaryRedirect</Code></Error>"
                body = says if status == 307 and self.command == "GET" else b""
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            with closing(http.client.HTTPConnection(url.removeprefix("http://"))) as behind:
                behind.request(self.command, self.path, headers=dict(self.headers.items()))
                found = behind.getresponse()
                body = found.read()
            self.send_response(found.status)
            for name, value in found.getheaders():
                if name.lower() not in ("content-length", "connection", without):
                    self.send_header(name, value)
            if self.command == "GET" and "list-type" not in self.path:
                send(self, body)
                return
            self.send_header("Content-Length", found.getheader("Content-Length") or str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # who asked may be gone
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def shortening_server(url: str, missing: int) -> AbstractContextManager[str]:
    """The address of a server that answers as the one at ``url`` does, but that the last bytes of objects are missing.

    And says that there are no more: to a client all is well that does not compare it with what it asked for.
    """

    def send(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        handler.send_header("Content-Length", str(len(body) - missing))
        handler.end_headers()
        handler.wfile.write(body[:-missing])

    return _between(url, send)


def refusing_server(
    url: str, refusal: Callable[[str], int | None] = lambda _: None, without: str = "", region: str = ""
) -> AbstractContextManager[str]:
    """Likewise, but what ``refusal`` has a status for, ``without`` a header, and what is for another ``region``."""

    def send(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return _between(url, send, refusal, without, region)


def breaking_server(url: str, times: int) -> AbstractContextManager[str]:
    """Likewise, but of the first answers about each object only half comes, and then the connection is gone."""
    asked: Counter[str] = Counter()

    def send(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        asked[handler.path] += 1
        is_broken = asked[handler.path] <= times
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2] if is_broken else body)
        if is_broken:
            handler.connection.shutdown(socket.SHUT_RDWR)

    return _between(url, send)


def dripping_server(url: str) -> AbstractContextManager[str]:
    """Likewise, but objects come a byte at a time, five of them a second."""

    def send(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        with suppress(OSError):  # nobody listens any more
            for byte in body:
                handler.wfile.write(bytes([byte]))
                time.sleep(0.2)

    return _between(url, send)
