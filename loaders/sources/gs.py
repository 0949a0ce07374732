"""A checkpoint in Google Cloud Storage, or on a server that speaks its JSON API.

Names, identities, JSON and headers come through requests, with the credentials that google-auth finds; tensors through
the streamer's GCS part, which finds the same ones by itself. ``CLOUD_STORAGE_EMULATOR_ENDPOINT`` leads both to another
server, and asks it without credentials: the streamer's client reads that and cannot be told, so it is read here too.
With ``https://storage.googleapis.com`` it is how public objects are read.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import quote

from loaders.sources import objects
from loaders.sources.library import find_library, install
from loaders.sources.objects import ObjectFile, ObjectPrefix, making_sense, natural, text
from loaders.sources.runai import RunaiSession
from loaders.sources.source import Unreachable

ENDPOINT, PUBLIC = "CLOUD_STORAGE_EMULATOR_ENDPOINT", "https://storage.googleapis.com"
SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"


class ObjectGeneration(NamedTuple):
    """What must not change between opening a checkpoint and reading it."""

    generation: int
    num_bytes: int


class GsFile(ObjectFile[ObjectGeneration]):
    """An object in Google Cloud Storage; see ``ObjectFile``."""

    def __init__(self, prefix: GsPrefix, name: str, known: ObjectGeneration | None) -> None:
        self._prefix = prefix
        self._path = f"o/{quote(prefix.key(name), safe='')}"
        super().__init__(name, prefix.address(name), known)

    def identify(self) -> ObjectGeneration:
        with self._prefix.get(self._path, fields="generation,size") as found, making_sense():
            document = found.json()
            return ObjectGeneration(natural(document["generation"]), natural(document["size"]))

    def parts(self, position: int, count: int) -> Iterator[bytes]:
        span = {"Range": f"bytes={position}-{position + count - 1}"}
        pinned = {"alt": "media", "ifGenerationMatch": str(self.opened.generation)}
        with making_sense(), self._prefix.get(self._path, span, **pinned) as found:
            objects.check_range(found.headers.get("Content-Range"), position)
            yield from found.iter_content(objects.PART_BYTES)


class GsPrefix(ObjectPrefix):
    """Objects in Google Cloud Storage; see ``ObjectPrefix``.

    Raises:
        OSError: the streamer, its GCS part or requests is not installed, or the address has no bucket.
    """

    scheme = "gs"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        find_library(self.scheme)
        if importlib.util.find_spec("requests") is None:
            raise OSError(f"requests is not installed. {install(self.scheme)}")
        self._endpoint = os.environ.get(ENDPOINT) or None

    def connect(self) -> Any:
        requests = importlib.import_module("requests")
        if self._endpoint is not None:
            client = requests.Session()
        else:
            try:
                auth = importlib.import_module("google.auth")
                transport = importlib.import_module("google.auth.transport.requests")
            except ImportError as error:
                raise OSError(f"google-auth is not installed. {install(self.scheme)}") from error
            client = transport.AuthorizedSession(_credentials(auth), refresh_timeout=objects.READ_S)
        retries = importlib.import_module("urllib3").Retry(
            objects.ATTEMPTS - 1, status_forcelist=objects.BUSY, raise_on_status=False, backoff_factor=0.05
        )
        for scheme in ("http://", "https://"):
            adapter = requests.adapters.HTTPAdapter(max_retries=retries, pool_maxsize=objects.REQUESTS)
            client.mount(scheme, adapter)
        client.headers["Accept-Encoding"] = "identity"  # ranges are of the bytes as they are stored
        return client

    @contextmanager
    def get(self, path: str, headers: dict[str, str] | None = None, **params: str) -> Iterator[Any]:
        """The answer to a request about the bucket, once it is known to be one.

        Raises:
            OSError: there is none in time, or the server refuses.
        """
        url = f"{(self._endpoint or PUBLIC).rstrip('/')}/storage/v1/b/{quote(self.bucket, safe='')}/{path}"
        times = (objects.CONNECT_S, objects.READ_S)
        with (
            _as_os_errors(),
            self.client.get(url, params=params, headers=headers, timeout=times, stream=True) as found,
        ):
            if found.status_code >= 400:
                known = {404: objects.GONE if path != "o" else f"there is no bucket {self.bucket!r}"}
                known |= {412: objects.CHANGED}
                says = known.get(found.status_code) or f"{found.status_code} {found.reason}: {_said(found)}"
                raise (Unreachable if found.status_code in objects.BUSY else OSError)(says)
            yield found

    def pages(self, start: str) -> Iterator[list[str]]:
        asked = {"prefix": start, "delimiter": "/", "fields": "items(name),nextPageToken"}
        while True:
            with self.get("o", None, **asked) as found, making_sense():
                page = found.json()
                names = [text(item["name"]) for item in page.get("items", ())]
                token = page.get("nextPageToken")
            yield names
            if not token:
                return
            asked["pageToken"] = token

    def open_object(self, name: str, known: ObjectGeneration | None) -> GsFile:
        return GsFile(self, name, known)

    def session(self, total_bytes: int) -> RunaiSession:
        return RunaiSession(str(self))


def _credentials(auth: Any) -> Any:
    try:
        return auth.default(scopes=[SCOPE])[0]
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # what it makes of JSON that is no object
        said = f"{type(error).__name__}: {error}"
        raise OSError(f"the file of credentials that google-auth finds makes no sense to it ({said})") from error


def _said(answer: Any) -> str:
    """What a server says of why it refuses; its own words, of which it may have many."""
    try:
        return str(answer.json()["error"]["message"])[:200]
    except (ValueError, LookupError, TypeError):
        return "it does not say why"


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """What requests and google-auth raise, in one line and as the exception that every source has."""
    requests = importlib.import_module("requests")
    kinds: list[type[Exception]] = [requests.RequestException]
    if importlib.util.find_spec("google") and importlib.util.find_spec("google.auth"):
        kinds.append(importlib.import_module("google.auth.exceptions").GoogleAuthError)
    try:
        yield
    except tuple(kinds) as error:
        says = f"{type(error).__name__}: {error}"
        if isinstance(error, requests.exceptions.ChunkedEncodingError):
            raise objects.Broken(says) from error
        gone = (requests.ConnectionError, requests.Timeout)
        raise (Unreachable if isinstance(error, gone) else OSError)(says) from error
