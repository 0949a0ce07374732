"""A checkpoint in S3, or on a server that speaks it.

Names, identities, JSON and headers come through boto3, which runai-model-streamer's S3 part brings with it; tensors
through the streamer. Where the server is and who asks is what boto3 finds: environment, profile, role. The streamer is
handed that, and looks for nothing itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from loaders.sources import objects
from loaders.sources.library import find_library, install
from loaders.sources.objects import ObjectFile, ObjectPrefix, making_sense, natural, text
from loaders.sources.runai import RunaiSession
from loaders.sources.source import Session, Unreachable

_GONE = ("404", "NoSuchKey", "NotFound")
_CHANGED = ("412", "PreconditionFailed")
_STYLE = "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"  # which the streamer reads when it first asks a server
_SIGNED_FOR = re.compile(r"/\d{8}/([^/]+)/s3/aws4_request")  # a region
_is_style_ours = False  # and not the user's


@dataclass(frozen=True, slots=True)
class ObjectIdentity:
    """What must not change between opening a checkpoint and reading it."""

    etag: str
    num_bytes: int
    modified: datetime


class S3File(ObjectFile[ObjectIdentity]):
    """An object in S3; see ``ObjectFile``."""

    def __init__(self, prefix: S3Prefix, name: str, known: ObjectIdentity | None) -> None:
        self._prefix = prefix
        self._place = {"Bucket": prefix.bucket, "Key": prefix.key(name)}
        super().__init__(name, prefix.address(name), known)

    def identify(self) -> ObjectIdentity:
        with making_sense(), _as_os_errors():
            found = self._prefix.client.head_object(**self._place)
            return ObjectIdentity(text(found["ETag"]), natural(found["ContentLength"]), found["LastModified"])

    def parts(self, position: int, count: int) -> Iterator[bytes]:
        span = f"bytes={position}-{position + count - 1}"
        with making_sense(), _as_os_errors():
            found = self._prefix.client.get_object(**self._place, Range=span, IfMatch=self.opened.etag)
            with closing(found["Body"]) as body:
                objects.check_range(found.get("ContentRange"), position)
                yield from body.iter_chunks(objects.PART_BYTES)


class S3Prefix(ObjectPrefix):
    """Objects in S3; see ``ObjectPrefix``.

    Raises:
        OSError: boto3 or the streamer is not installed, or the address has no bucket.
    """

    scheme = "s3"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._region: str | None = None  # that the last request was signed for
        find_library(self.scheme)
        if importlib.util.find_spec("boto3") is None:
            raise OSError(f"boto3 is not installed. {install(self.scheme)}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_session"}

    def connect(self) -> Any:
        config = importlib.import_module("botocore.config").Config(
            connect_timeout=objects.CONNECT_S,
            read_timeout=objects.READ_S,
            max_pool_connections=objects.REQUESTS,
            retries={"mode": "standard", "total_max_attempts": objects.ATTEMPTS},
            signature_version="s3v4",  # the streamer's own, which names the region
        )
        with _as_os_errors():
            try:
                client = self._session.client("s3", config=config)
            except ValueError as error:
                said = f"the endpoint that boto3 finds (AWS_ENDPOINT_URL, or of a profile) is no address: {error}"
                raise OSError(f"{said}. Expected one like https://host:port.") from error
        client.meta.events.register("before-send.s3", self._sent)
        return client

    def _sent(self, request: Any, **_: Any) -> None:
        """Take note of the region, which a server may have named that is not the one that is configured."""
        said = request.headers.get("Authorization", "")
        if found := _SIGNED_FOR.search(said if isinstance(said, str) else said.decode()):
            self._region = found[1]

    @cached_property
    def _session(self) -> Any:
        return importlib.import_module("boto3").Session()

    def pages(self, start: str) -> Iterator[list[str]]:
        pages = self.client.get_paginator("list_objects_v2")
        with making_sense(), _as_os_errors():
            for page in pages.paginate(Bucket=self.bucket, Prefix=start, Delimiter="/"):
                yield [entry["Key"] for entry in page.get("Contents", ())]

    def open_object(self, name: str, known: ObjectIdentity | None) -> S3File:
        return S3File(self, name, known)

    def session(self, total_bytes: int) -> RunaiSession:
        keys = self._keys()
        if not keys:
            raise OSError("no credentials were found for S3. Set up those that boto3 reads.")
        server = self._server()
        place = {"region": server.region} | ({} if server.endpoint is None else {"endpoint": server.endpoint})
        _set_style(is_virtual=server.is_virtual)
        return RunaiSession(str(self), keys | place)

    def is_current(self, session: Session) -> bool:
        return self._keys().items() <= cast("RunaiSession", session).credentials.items()  # this source has no others

    def _keys(self) -> dict[str, str]:
        """Credentials as the streamer calls them, which are renewed in time; none: none were found."""
        with _as_os_errors():
            if (found := self._session.get_credentials()) is None:
                return {}
            frozen = found.get_frozen_credentials()
        token = {"session_token": frozen.token} if frozen.token else {}
        return {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key} | token

    def _server(self) -> _Server:
        """Whom boto3 asks for this bucket: as a request says that it signs, and nobody sends.

        So all is in it that decides: endpoints of whatever kind, addressing styles, the region that a server named.
        """
        with _as_os_errors():
            signed = self.client.generate_presigned_url("get_object", Params={"Bucket": self.bucket, "Key": "k"})
        url = urlsplit(signed)
        found = _SIGNED_FOR.search(unquote(url.query))
        region = self._region or (found[1] if found else self.client.meta.region_name)
        is_virtual = not url.path.endswith(f"/{self.bucket}/k")
        host = url.netloc.removeprefix(f"{self.bucket}.") if is_virtual else url.netloc
        if host in ("s3.amazonaws.com", f"s3.{region}.amazonaws.com"):
            return _Server(None, region, is_virtual)
        path = "" if is_virtual else url.path.removesuffix(f"/{self.bucket}/k")
        return _Server(f"{url.scheme}://{host}{path}", region, is_virtual)


@dataclass(frozen=True, slots=True)
class _Server:
    """Where a bucket is: ``endpoint`` None at AWS's own, ``is_virtual``: as part of the host's name, not the path's."""

    endpoint: str | None
    region: str
    is_virtual: bool


def _set_style(*, is_virtual: bool) -> None:
    """Have the streamer address buckets so, unless the user has said how: there is no way but the environment.

    Virtual is what it does unasked: nothing is left in the environment then, which a child would take for the user's.
    """
    global _is_style_ours
    if _STYLE in os.environ and not _is_style_ours:
        return
    _is_style_ours = not is_virtual
    if is_virtual:
        os.environ.pop(_STYLE, None)
    else:
        os.environ[_STYLE] = "0"


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """What botocore raises, in one line and as the exception that every source has."""
    exceptions = importlib.import_module("botocore.exceptions")
    http = importlib.import_module("urllib3.exceptions")
    try:
        yield
    except exceptions.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _GONE:
            raise OSError(objects.GONE) from error
        if code in _CHANGED:
            raise OSError(objects.CHANGED) from error
        is_busy = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in objects.BUSY
        raise (Unreachable if is_busy else OSError)(str(error)) from error
    except RecursionError as error:  # botocore follows each from within the last
        raise OSError("the server redirects without end") from error
    except (exceptions.ResponseStreamingError, exceptions.IncompleteReadError) as error:
        raise objects.Broken(f"{type(error).__name__}: {error}") from error
    except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
        raise Unreachable(f"{type(error).__name__}: {error}") from error
    except (exceptions.BotoCoreError, http.HTTPError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
