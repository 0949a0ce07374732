"""Weight by weight: the same tensors on disk, in JAX, in torch and in a trace have one root, or this says where not.

Digests are taken one tensor at a time (``loaders.digest``), in the checkpoint's names and layout wherever the weights
live. Where both sides can be read, tensors that differ are held against each other in numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loaders import Checkpoint, Stage, open_checkpoint
from loaders.digest import digests, root_digest
from loaders.dtypes import from_numpy
from loaders.families import family_module
from loaders.reading.plan import specs_of
from parity.backends import NAMES, open_backend
from parity.trace import read_meta
from parity.weight_diff import TensorDiff, diff_tensors, find_accident, is_constant

Where = Literal["both", "a", "b"]


@dataclass(frozen=True)
class WeightSource:
    """Weights that can be told apart by digest.

    Attributes:
        label: what the user called it.
        digests: tensor name -> SHA-256; see ``loaders.digest``.
        read: one tensor by name; None of a trace, which holds digests alone.
        optional: whether a model may leave a tensor out, as the family declares (a draft, a vision tower).
        tied: redundant tensor -> the one that stands for it.
        is_files: everything that is there is in ``digests``, also what no model loads.
    """

    label: str
    digests: Mapping[str, str]
    read: Callable[[str], np.ndarray] | None = None
    optional: Callable[[str], bool] = lambda name: False
    tied: Mapping[str, str] = field(default_factory=dict)
    is_files: bool = False


@dataclass(frozen=True)
class WeightDifference:
    """One tensor that is not the same on both sides.

    Attributes:
        where: ``both``, or the only side that has it.
        types: dtype and shape on both sides where they are known, as ``F32 [4, 8]``.
        same_as: tensor of b with the very bits that a has under this name.
        diff: in numbers, where both can be read and are of one dtype and shape.
        accident: what turns b's into a's; see ``parity.weight_diff``.
    """

    name: str
    where: Where
    types: tuple[str, str] | None = None
    same_as: str | None = None
    diff: TensorDiff | None = None
    accident: str | None = None


@dataclass(frozen=True)
class WeightComparison:
    """Two sources of weights held against each other.

    Attributes:
        roots: over the tensors that were compared; equal exactly when ``differences`` is empty.
        counts: how many tensors each side was compared with.
        equal: tensors of one digest on both sides.
        left_out: on one side only and rightly so: declared by the family, or redundant and tied.
    """

    labels: tuple[str, str]
    roots: tuple[str, str]
    counts: tuple[int, int]
    equal: int
    differences: tuple[WeightDifference, ...]
    left_out: tuple[str, ...] = ()

    @property
    def is_comparable(self) -> bool:
        """Whether any tensor has one name on both sides: else they are weights of different models."""
        return self.equal > 0 or any(one.where == "both" for one in self.differences)

    @property
    def exit_code(self) -> int:
        """0 the same, 1 differs, 3 not comparable."""
        return 3 if not self.is_comparable else int(bool(self.differences))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "exit_code": self.exit_code}

    def to_text(self, *, everything: bool = False) -> str:
        """For a terminal; tensors of the layers in groups, unless everything is asked for."""
        from parity.weights_text import render

        return render(self, everything=everything)

    def __str__(self) -> str:
        return self.to_text()


def open_weights(given: str | os.PathLike[str], *, device: str | None = None) -> WeightSource:
    """Weights by what a user calls them.

    Args:
        given: a checkpoint (a directory, or any address that ``open_checkpoint`` takes), a trace file, or ``jax:`` or
            ``torch:`` before a checkpoint, which is then loaded there.
        device: where to load it.

    Raises:
        ValueError: neither a checkpoint nor a trace, or a trace without digests.
        DeviceNotFound: the backend is not installed, or has no such device.
    """
    text = os.fspath(given)
    kind, _, rest = text.partition(":")
    if kind in NAMES and rest:
        return _live(text, rest, kind, device)
    return _trace(text) if Path(text).is_file() else _files(text)


def compare_weights(a: WeightSource, b: WeightSource) -> WeightComparison:
    """Hold every tensor of two sources against each other; at most one of each is in memory at a time."""
    left_out = {name for pair in ((a, b), (b, a)) for name in _rightly_absent(*pair)}
    ours, theirs = ({n: d for n, d in side.digests.items() if n not in left_out} for side in (a, b))
    elsewhere: dict[str, str] = {}
    for name, digest in theirs.items():
        elsewhere.setdefault(digest, name)
    differences = []
    for name in sorted(ours.keys() | theirs.keys(), key=_in_order):
        if name in ours and name in theirs and ours[name] != theirs[name]:
            differences.append(_difference(a, b, name, elsewhere.get(ours[name])))
        elif (name in ours) != (name in theirs):
            same_as = elsewhere.get(ours[name]) if name in ours else None
            differences.append(WeightDifference(name, "a" if name in ours else "b", same_as=same_as))
    return WeightComparison(
        labels=(a.label, b.label),
        roots=(root_digest(ours), root_digest(theirs)),
        counts=(len(ours), len(theirs)),
        equal=sum(theirs.get(name) == digest for name, digest in ours.items()),
        differences=tuple(differences),
        left_out=tuple(sorted(left_out)),
    )


def _files(uri: str) -> WeightSource:
    checkpoint = open_checkpoint(uri)
    found = digests(checkpoint.stream())
    return WeightSource(uri, found, checkpoint.read, *_declared(checkpoint), is_files=True)


def weights_of(model: Any, label: str) -> WeightSource:
    """What a live model of ours holds as it stands now, in the checkpoint's names."""
    package = type(model).__module__.partition(".")[0]
    reader = import_module(f"{package}.weights").tensor_reader(model)
    return WeightSource(label, model.digests(), reader, *_declared(model.checkpoint))


def _live(label: str, uri: str, kind: str, device: str | None) -> WeightSource:
    backend = open_backend(kind, device)
    checkpoint = open_checkpoint(uri)
    has_draft = checkpoint.config.num_mtp_layers > 0 and any(name.startswith("mtp.") for name in checkpoint.tensors)
    return weights_of(backend.load(uri, mtp=has_draft), label)


def _trace(path: str) -> WeightSource:
    weights = read_meta(path).get("weights") or {}
    if not weights.get("digests"):
        raise ValueError(f"{path} records no digests of weights, so nothing can be said of them. Record it again.")
    found = dict(sorted(weights["digests"].items()))
    if weights.get("root") != root_digest(found):
        raise ValueError(
            f"{path} contradicts itself: its digests give the root {root_digest(found)[:16]}, and it records"
            f" {str(weights.get('root'))[:16]}. Was it edited?"
        )
    return WeightSource(path, found)


def _declared(checkpoint: Checkpoint) -> tuple[Callable[[str], bool], dict[str, str]]:
    """Which tensors a model may leave out, and which are redundant."""
    patterns = family_module(checkpoint.config.architecture).LEFT_OUT
    specs = specs_of(checkpoint.config, Stage(), checkpoint.tensors)
    tensors = {spec.name: spec.placements[0].tensor for spec in specs}
    return partial(_matches, patterns), {tied.tensor: tensors[tied.same_as] for tied in specs.tied}


def _matches(patterns: Any, name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in patterns)


def _rightly_absent(a: WeightSource, b: WeightSource) -> list[str]:
    """Tensors that a has and b need not have."""
    found = []
    for name in a.digests.keys() - b.digests.keys():
        stands_for = (a.tied or b.tied).get(name)
        is_redundant = stands_for is not None and a.digests.get(stands_for) == a.digests[name]
        is_declared = not (a.is_files and b.is_files) and (a.optional(name) or b.optional(name))
        if is_redundant or is_declared:
            found.append(name)
    return found


def _difference(a: WeightSource, b: WeightSource, name: str, same_as: str | None) -> WeightDifference:
    if a.read is None or b.read is None:
        return WeightDifference(name, "both", same_as=same_as)
    ours, theirs = a.read(name), b.read(name)
    same_as = None if is_constant(ours) else same_as
    types = (f"{from_numpy(ours.dtype)} {list(ours.shape)}", f"{from_numpy(theirs.dtype)} {list(theirs.shape)}")
    if types[0] != types[1]:
        return WeightDifference(name, "both", types, same_as, accident=find_accident(ours, theirs))
    diff = diff_tensors(ours, theirs)
    return WeightDifference(name, "both", types, same_as, diff, diff.accident if diff else None)


def _in_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts layer 2 before layer 10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))
