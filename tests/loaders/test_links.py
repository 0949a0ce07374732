"""Links in a checkpoint directory: those that stay in it are followed, as in Hugging Face's cache, others refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from handmade import CONFIG, ONE_TENSOR, RIGHT_MAP, A, B, indexed, refusal, write

from loaders import open_checkpoint

pytestmark = pytest.mark.usefixtures("no_hanging")


def outside(tmp_path: Path, checkpoint: Path) -> Path:
    (tmp_path / "secret").write_bytes(ONE_TENSOR)
    return tmp_path / "secret"


def outside_by_relative_path(tmp_path: Path, checkpoint: Path) -> Path:
    outside(tmp_path, checkpoint)
    return Path("../../secret")


def outside_by_two_steps(tmp_path: Path, checkpoint: Path) -> Path:
    (checkpoint / "step").symlink_to(outside(tmp_path, checkpoint))
    return checkpoint / "step"


def blobs_without_snapshots(tmp_path: Path, checkpoint: Path) -> Path:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(ONE_TENSOR)
    return tmp_path / "blobs" / "abc"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("target", [outside, outside_by_relative_path, outside_by_two_steps, blobs_without_snapshots])
def test_a_link_that_leaves_the_directory_is_refused(
    tmp_path: Path, name: str, target: Callable[[Path, Path], Path]
) -> None:
    checkpoint = write(tmp_path / "releases" / "checkpoint", {"model.safetensors": ONE_TENSOR})
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to(target(tmp_path, checkpoint))
    (problem,) = refusal(checkpoint)
    assert problem.startswith(f"{name} cannot be ")
    assert "outside the checkpoint directory" in problem


def test_a_link_that_stays_inside_is_followed(tmp_path: Path) -> None:
    write(tmp_path, {"weights": ONE_TENSOR})
    (tmp_path / "model.safetensors").symlink_to("weights")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_links_in_a_circle_and_links_to_nothing_are_refused(tmp_path: Path) -> None:
    write(tmp_path, indexed({}, RIGHT_MAP))
    (tmp_path / A).symlink_to(B)
    (tmp_path / B).symlink_to(A)
    assert refusal(tmp_path) == [
        f"{A} cannot be opened: Too many levels of symbolic links",
        f"{B} cannot be opened: Too many levels of symbolic links",
    ]
    (tmp_path / A).unlink()
    (tmp_path / A).symlink_to("gone")
    assert refusal(tmp_path)[0] == f"{A} cannot be opened: No such file or directory"


def hugging_face_cache(tmp_path: Path) -> Path:
    repository = tmp_path / "models--Qwen--Qwen3-0.6B"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name, content in {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": ONE_TENSOR}.items():
        (repository / "blobs" / f"hash-of-{name}").write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/hash-of-{name}")
    return snapshot


def test_the_hugging_face_cache_opens(tmp_path: Path) -> None:
    snapshot = hugging_face_cache(tmp_path)
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.tensors["a"].file == "model.safetensors"
    np.testing.assert_array_equal(checkpoint.read("a"), [1, 2, 3, 4])
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    assert list(open_checkpoint(link).tensors) == ["a"]


def test_a_subdirectory_of_the_hugging_face_cache_opens(tmp_path: Path) -> None:
    below = hugging_face_cache(tmp_path) / "text" / "model"
    below.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (below / name).symlink_to(f"../../../../blobs/hash-of-{name}")
    assert list(open_checkpoint(below).tensors) == ["a"]


def test_another_repository_of_the_cache_is_outside(tmp_path: Path) -> None:
    snapshot = hugging_face_cache(tmp_path)
    other = tmp_path / "models--other" / "blobs"
    other.mkdir(parents=True)
    (other / "abc").write_bytes(ONE_TENSOR)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "abc")
    (problem,) = refusal(snapshot)
    assert "outside the checkpoint directory" in problem
