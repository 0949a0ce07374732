"""What Google Cloud Storage answers to its JSON API, as far as it is asked here, on loopback."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "ckpt"
_PAGE = 3  # names; the real one has a thousand


class Server:
    """One bucket, in a thread. ``asked`` has the path, the range and the answer's status of every request.

    While ``speaks`` is not set, the streamer gets no answer. It stays with the server it first met, so one that falls
    silent has to be the same. What ``refusal`` has a status for is refused, with ``refusal_headers``.
    """

    def __init__(self) -> None:
        self.objects: dict[str, tuple[int, bytes]] = {}  # key -> generation, bytes
        self.asked: list[tuple[str, str | None, int]] = []
        self.speaks = threading.Event()
        self.speaks.set()
        self.refusal: Callable[[str], int | None] = lambda path: None
        self.refusal_headers: dict[str, str] = {}
        self.breaks = 0  # so many answers with bytes of objects are half of them, and the connection is gone
        self.says_range = True  # and not of which bytes they are
        self._generation = 0
        server = self

        class Handler(_Handler):
            store = server

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # who asked may be gone
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def put(self, directory: Path, prefix: str) -> str:
        """Upload the files of a checkpoint; returns its address."""
        for file in directory.iterdir():
            self.put_object(f"{prefix}/{file.name}", file.read_bytes())
        return f"gs://{BUCKET}/{prefix}"

    def put_object(self, key: str, body: bytes) -> None:
        self._generation += 1
        self.objects[key] = self._generation, body

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    store: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the headers to be acknowledged

    def do_GET(self) -> None:  # noqa: N802
        if (status := self.store.refusal(self.path)) is not None:
            return self._refuse(status, "Refused.")
        url = urlsplit(self.path)
        params = {name: values[0] for name, values in parse_qs(url.query).items()}
        found = re.fullmatch(r"/storage/v1/b/([^/]+)/o(?:/(.+))?", url.path)
        if found is None or found[1] != BUCKET:
            return self._refuse(404, "The specified bucket does not exist.")
        if found[2] is None:
            return self._document(self._page(params))
        key = unquote(found[2])
        if key not in self.store.objects:
            return self._refuse(404, f"No such object: {key}")
        generation, body = self.store.objects[key]
        if params.get("ifGenerationMatch", str(generation)) != str(generation):
            return self._refuse(412, "At least one of the pre-conditions you specified did not hold.")
        if params.get("alt") == "media":
            if "ifGenerationMatch" not in params:  # the streamer's
                self.store.speaks.wait(60)
            return self._media(body, generation)
        return self._document({"name": key, "generation": str(generation), "size": str(len(body))})

    def _page(self, params: dict[str, str]) -> dict[str, Any]:
        prefix, first = params.get("prefix", ""), int(params.get("pageToken", "0"))
        under = sorted(key for key in self.store.objects if key.startswith(prefix))
        names = [key for key in under if params.get("delimiter", "\0") not in key[len(prefix) :]]
        page: dict[str, Any] = {"items": [{"name": name} for name in names[first : first + _PAGE]]}
        return page | ({"nextPageToken": str(first + _PAGE)} if names[first + _PAGE :] else {})

    def _media(self, body: bytes, generation: int) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(span[1]), int(span[2] or len(body) - 1)) if span else (0, len(body) - 1)
        if first >= len(body):
            return self._refuse(416, "The requested range cannot be satisfied.")
        last = min(last, len(body) - 1)
        headers = {"x-goog-generation": str(generation), "Content-Range": f"bytes {first}-{last}/{len(body)}"}
        if not self.store.says_range:
            del headers["Content-Range"]
        return self._answer(206 if span else 200, body[first : last + 1], "application/octet-stream", headers)

    def _document(self, document: dict[str, Any], status: int = 200) -> None:
        headers = self.store.refusal_headers if status >= 400 else {}
        self._answer(status, json.dumps(document).encode(), "application/json", headers)

    def _refuse(self, status: int, message: str) -> None:
        self._document({"error": {"code": status, "message": message}}, status)

    def _answer(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.store.asked.append((self.path, self.headers.get("Range"), status))
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.store.breaks and status == 206:
            self.store.breaks -= 1
            self.wfile.write(body[: len(body) // 2])
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
