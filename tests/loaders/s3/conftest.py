"""A real S3 server on loopback, and a checkpoint that lies there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import (
    ENVIRONMENT,
    Server,
)

from loaders.sources import s3
from parity.zoo import make_checkpoint


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        server = Server()
        yield server
        server.stop()


@pytest.fixture(autouse=True)
def environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts fused and transposed, one per expert in the draft; several files."""
    path = tmp_path_factory.mktemp("s3") / "c"
    forms: dict[str, Any] = {"experts": "fused transposed", "draft_experts": "per expert"}
    kinds = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    return make_checkpoint("qwen3_5-moe", path, dtype="BF16", max_file_bytes=1 << 17, **forms, **kinds)


@pytest.fixture(scope="module")
def uri(server: Server, directory: Path) -> str:
    return server.put(directory, "models/moe")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Requests that were made for objects, by what they ask for; those of the streamer's own are not seen."""
    asked: Counter[str] = Counter()
    identify, parts = s3.S3File.identify, s3.S3File.parts

    def identified(self: s3.S3File) -> s3.ObjectIdentity:
        asked[f"identity of {self.name}"] += 1
        return identify(self)

    def read(self: s3.S3File, position: int, count: int) -> Iterator[bytes]:
        asked[f"bytes of {self.name}"] += 1
        return iter(parts(self, position, count))

    monkeypatch.setattr(s3.S3File, "identify", identified)
    monkeypatch.setattr(s3.S3File, "parts", read)
    return asked
