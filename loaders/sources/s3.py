"""A checkpoint in S3, or on a server that speaks it.

Names, identities, JSON and headers come through boto3, which runai-model-streamer's S3 part brings with it; tensors
through the streamer. Where the server is and who asks is what boto3 finds: environment, profile, role. The streamer is
handed that, and looks for nothing itself.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from loaders.sources import objects
from loaders.sources.library import find_library, install
from loaders.sources.objects import ObjectFile, ObjectPrefix
from loaders.sources.runai import RunaiSession
from loaders.sources.source import Session, Unreachable

_GONE = ("404", "NoSuchKey", "NotFound")
_CHANGED = ("412", "PreconditionFailed")


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
        with _as_os_errors():
            found = self._prefix.client.head_object(**self._place)
        try:
            return ObjectIdentity(found["ETag"], found["ContentLength"], found["LastModified"])
        except KeyError as error:
            raise OSError(f"the server does not say its {error.args[0]}") from error

    def parts(self, position: int, count: int) -> Iterator[bytes]:
        span = f"bytes={position}-{position + count - 1}"
        with _as_os_errors():
            body = self._prefix.client.get_object(**self._place, Range=span, IfMatch=self.opened.etag)["Body"]
            yield from body.iter_chunks(1 << 20)


class S3Prefix(ObjectPrefix):
    """Objects in S3; see ``ObjectPrefix``.

    Raises:
        OSError: boto3 or the streamer is not installed, or the address has no bucket.
    """

    scheme = "s3"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._given: WeakKeyDictionary[Session, Any] = WeakKeyDictionary()  # credentials of sessions
        find_library(self.scheme)
        if importlib.util.find_spec("boto3") is None:
            raise OSError(f"boto3 is not installed. {install(self.scheme)}")

    def connect(self) -> Any:
        config = importlib.import_module("botocore.config").Config(
            connect_timeout=objects.CONNECT_S,
            read_timeout=objects.READ_S,
            max_pool_connections=objects.REQUESTS,
            retries={"mode": "standard", "total_max_attempts": objects.ATTEMPTS},
        )
        with _as_os_errors():
            return self._session.client("s3", config=config)

    @cached_property
    def _session(self) -> Any:
        return importlib.import_module("boto3").Session()

    def pages(self, start: str) -> Iterator[list[str]]:
        with _as_os_errors():
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=start, Delimiter="/"):
                yield [entry["Key"] for entry in page.get("Contents", ())]

    def open_object(self, name: str, known: ObjectIdentity | None) -> S3File:
        return S3File(self, name, known)

    def session(self, total_bytes: int) -> RunaiSession:
        with _as_os_errors():
            found = self._session.get_credentials()
            frozen = None if found is None else found.get_frozen_credentials()
        if frozen is None:
            raise OSError("no credentials were found for S3. Set up those that boto3 reads.")
        url = self.client.meta.endpoint_url
        given = {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "session_token": frozen.token,
            "region": self.client.meta.region_name,
            "endpoint": None if ".amazonaws.com" in url else url,
        }
        session = RunaiSession(str(self), {name: value for name, value in given.items() if value})
        self._given[session] = frozen
        return session

    def is_current(self, session: Session) -> bool:
        found = self._session.get_credentials()
        return found is None or self._given.get(session) == found.get_frozen_credentials()  # which renews them in time


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
    except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
        raise Unreachable(f"{type(error).__name__}: {error}") from error
    except (exceptions.BotoCoreError, http.HTTPError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
