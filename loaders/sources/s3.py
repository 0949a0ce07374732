"""A checkpoint in S3, or on a server that speaks it.

Names, identities, JSON and headers come through boto3, which runai-model-streamer's S3 part brings with it; tensors
through the streamer. Where the server is and who asks is what boto3 finds: environment, profile, role. The streamer is
handed that, and looks for nothing itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from types import TracebackType
from typing import Any

from loaders import memory
from loaders.sources.local import is_plain
from loaders.sources.runai import DEADLINE_S, INSTALL, RunaiSession, find_library
from loaders.sources.source import small_file

CONNECT_S, READ_S, ATTEMPTS = 5, 15, 2  # a server that is gone is given up within a minute
_GONE = ("404", "NoSuchKey", "NotFound")
_CHANGED = ("412", "PreconditionFailed")


@dataclass(frozen=True, slots=True)
class ObjectIdentity:
    """What must not change between opening a checkpoint and reading it."""

    etag: str
    num_bytes: int
    modified: datetime


class S3File:
    """One object, as it was when it was opened: a part of another one is never read."""

    is_cheap_to_identify = False  # a request

    def __init__(self, prefix: S3Prefix, name: str) -> None:
        self.name = name
        self._prefix = prefix
        self._place = {"Bucket": prefix.bucket, "Key": prefix.key(name)}
        self._pinned = self.identity()

    @property
    def address(self) -> str:
        return f"s3://{self._place['Bucket']}/{self._place['Key']}"

    def close(self) -> None:
        pass

    def __enter__(self) -> S3File:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def identity(self) -> ObjectIdentity:
        with _as_os_errors():
            found = self._prefix.client.head_object(**self._place)
        return ObjectIdentity(found["ETag"], found["ContentLength"], found["LastModified"])

    def read_into(self, out: memoryview, position: int) -> None:
        if not len(out):
            return
        allowed_s = max(DEADLINE_S, len(out) / 1e6)  # slower than 1 MB/s is as good as gone
        until = time.monotonic() + allowed_s
        span = f"bytes={position}-{position + len(out) - 1}"
        with _as_os_errors():
            body = self._prefix.client.get_object(**self._place, Range=span, IfMatch=self._pinned.etag)["Body"]
            done = 0
            for part in body.iter_chunks(1 << 20):
                out[done : done + len(part)] = part
                done += len(part)
                if time.monotonic() > until:
                    raise OSError(f"{done} of {len(out)} bytes came in {allowed_s:.0f} s. Is the server in trouble?")
        if done != len(out):
            raise OSError(f"{done} bytes came from byte {position} on, expected {len(out)}: truncated")

    def read(self, position: int, count: int) -> bytes:
        out = bytearray(count)
        self.read_into(memoryview(out), position)
        return bytes(out)


class S3Prefix:
    """The objects right under ``bucket/prefix``, by the rest of their key.

    Raises:
        OSError: boto3 or the streamer is not installed, or the address has no bucket.
    """

    gap_bytes = 1 << 20  # a request takes as long as a megabyte does

    def __init__(self, path: str) -> None:
        self.bucket, _, prefix = path.partition("/")
        self.prefix = prefix.strip("/")
        if not self.bucket:
            raise OSError("it names no bucket, expected s3://bucket/prefix")
        find_library()
        if importlib.util.find_spec("boto3") is None:
            raise OSError(f"boto3 is not installed. {INSTALL}")

    @property
    def stretch_bytes(self) -> int:
        return memory.STAGING_BYTES  # all of it is lent memory

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    @cached_property
    def client(self) -> Any:
        config = importlib.import_module("botocore.config").Config(
            connect_timeout=CONNECT_S, read_timeout=READ_S, retries={"total_max_attempts": ATTEMPTS}
        )
        with _as_os_errors():
            return self._session.client("s3", config=config)

    @cached_property
    def _session(self) -> Any:
        return importlib.import_module("boto3").Session()

    def names(self) -> list[str]:
        start = self.key("")
        found: list[str] = []
        with _as_os_errors():
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=start, Delimiter="/"):
                found += [entry["Key"][len(start) :] for entry in page.get("Contents", ())]
        names = sorted(name for name in found if name)
        if not names:
            raise OSError(f"there is no object under {self}/")
        return names

    def open(self, name: str) -> S3File:
        """Open the object called ``name``.

        Raises:
            OSError: there is none, it cannot be asked for, or the name leads out of the checkpoint.
        """
        if not is_plain(name):
            raise OSError("it is not a plain file name inside the checkpoint")
        return S3File(self, name)

    def read_file(self, name: str) -> bytes:
        with self.open(name) as file:
            return small_file(file)

    def session(self) -> RunaiSession:
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
        return RunaiSession(str(self), {name: value for name, value in given.items() if value})


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
            raise OSError("there is no such object") from error
        if code in _CHANGED:
            raise OSError("it changed since it was opened") from error
        raise OSError(str(error)) from error
    except (exceptions.BotoCoreError, exceptions.HTTPClientError, http.HTTPError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
