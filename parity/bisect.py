"""Which step is to blame: every step of two backends judged alone, from a layer down to one operation.

What a layer is handed may be wrong already, so its output says little about it. Here each step goes on from what its
own backend handed it: the float64 oracle is given everything a backend computed and says, step by step, what that
backend should have made of it. So all local errors of a backend come from one run, and a culprit stands alone, with its
owner. Besides, each backend is fed the other's values; where there is no oracle, that alone has to do.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from loaders import Checkpoint
from loaders.adapters.updates import Adapter
from parity.backend import HEAD, Tapped
from parity.bisection import Bisection, Step
from parity.errors import NotComparable
from parity.local import Judge, Said, distance
from parity.oracle import oracle_forward
from parity.oracles.taps import Taps
from parity.record import default_inputs
from parity.record_oracle import ANGLE_ROUNDING, SHAKE

Values = Mapping[str, np.ndarray]


class Reference:
    """The float64 oracle of a checkpoint on one batch, run from values it is handed.

    Args:
        checkpoint: whose stored weights to compute with.
        inputs: ``input_ids`` [B, T], optional ``attention_mask``, ``position_ids``, images and videos.
        adapter: of every row.
    """

    def __init__(self, checkpoint: Checkpoint, inputs: Values, adapter: Adapter | None = None) -> None:
        self.checkpoint, self.inputs, self.adapter = checkpoint, inputs, adapter

    def run(self, given: Values, only: str | None) -> Said:
        """What every step makes of ``given``.

        ``only``: the decoder layer that is asked about; None: all of them.
        """
        taken = [Taps(given, only), Taps(given, only, SHAKE), Taps(given, only)]
        for taps, shake_angles in zip(taken, (0.0, 0.0, ANGLE_ROUNDING), strict=True):
            inputs: dict[str, Any] = dict(self.inputs)
            oracle_forward(self.checkpoint, **inputs, adapter=self.adapter, taps=taps, shake_angles=shake_angles)
        return Said(*(taps.found for taps in taken))

    def check_finite(self) -> None:
        """See that it can judge anybody.

        Raises:
            NotComparable: what it computes by itself is not finite.
        """
        taps, inputs = Taps(), dict[str, Any](self.inputs)
        with np.errstate(all="ignore"):
            oracle_forward(self.checkpoint, **inputs, adapter=self.adapter, taps=taps)
        mask = _mask(self.inputs)
        if bad := next((path for path, value in taps.found.items() if not np.isfinite(value[mask]).all()), None):
            raise NotComparable(
                f"the oracle is not finite at {bad}, so it cannot judge anybody. Do weights of {self.checkpoint.source}"
                " hold NaN or infinity?"
            )


def local_errors(
    a: Tapped,
    b: Tapped,
    inputs: Values,
    paths: Sequence[str],
    *,
    found: tuple[Values, Values],
    given: Sequence[str] = (),
    layer: str | None = None,
    reference: Reference | None = None,
    crossed: bool = False,
) -> list[Step]:
    """What each of ``paths`` is off, given what the steps before it are said to have computed.

    Args:
        a: one model.
        b: the other.
        inputs: of both.
        paths: the steps to judge, in order of execution.
        found: of a and b, what they computed, by path: of ``paths``, ``given`` and all decoder layers.
        given: other steps that go on from what was computed.
        layer: path of the decoder layer the steps are in; None: they are layers.
        reference: the oracle; None: only the distance of the two can be judged, and not whose an error is.
        crossed: also feed each model the other's values, with a reference too.
    """
    judge = Judge(a.dtype, _mask(inputs))
    alone = [{path: side[path] for path in {*paths, *given, *_layers(side)} if path != HEAD} for side in found]
    crosses: list[Values | None] = [None, None]
    if crossed or reference is None:  # the first fed with what the second computed, and back
        level = "layers" if layer is None else "operations"
        for index, (model, values) in enumerate(((a, alone[1]), (b, alone[0]))):
            crosses[index] = model.taps(inputs, level=level, within=layer, inject=values)
    with np.errstate(all="ignore"):  # a backend may have said anything
        said = None if reference is None else [reference.run(values, layer) for values in alone]
    return [judge.step(path, found, crosses, said) for path in paths]


def bisect(
    a: Tapped,
    b: Tapped,
    inputs: Values | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    adapter: Adapter | None = None,
    layer: int | None = None,
    everywhere: bool = False,
    crossed: bool = True,
) -> Bisection:
    """Judge every layer of two models alone, then the modules of the worst, then what the worst of those does.

    Args:
        a: one model: ``parity.ModelBackend(model, framework)``, or anything that is ``parity.backend.Tapped``.
        b: the other.
        inputs: of both; None: ``default_inputs`` of the checkpoint.
        checkpoint: what the oracle reads; None: there is no oracle, and whose an error is stays unknown.
        adapter: that both models run with, for the oracle.
        layer: look into this decoder layer, whatever the layers say, down to its operations.
        everywhere: when no layer stands out, look into one after the other, up to the first where a step does: a layer
            may hide what is wrong of a part of it among its own rounding.
        crossed: also feed each layer of one model what the other computed before it.
    Raises:
        ValueError: neither inputs nor a checkpoint, a layer that is none, or models that cannot be compared; of inputs
            without a real token, or of weights that are not finite, ``parity.errors.NotComparable``.
    """
    if inputs is None:
        if checkpoint is None:
            raise ValueError("bisect needs inputs, or a checkpoint to make some for")
        inputs = default_inputs(checkpoint)
    if (mask := inputs.get("attention_mask")) is not None and not np.any(mask):
        raise NotComparable("attention_mask is 0 everywhere: no position carries a meaning. Give tokens that are real.")
    if a.dtype != b.dtype:
        raise ValueError(f"{a.name} computes in {a.dtype} and {b.name} in {b.dtype}: load both with one dtype")
    notes: list[str] = []
    looks = (dict(a.taps(inputs)), dict(b.taps(inputs)))
    paths = _common(looks, (a.name, b.name), notes)
    layers = [path for path in paths if _number(path) is not None]
    reference = None if checkpoint is None else Reference(checkpoint, inputs, adapter)
    common: dict[str, Any] = {"reference": reference}
    steps = local_errors(a, b, inputs, paths, found=looks, crossed=crossed, **common)
    if reference is not None and any(math.inf in (step.local_a, step.local_b) for step in steps):
        reference.check_finite()
    tables = [("the model", tuple(steps))]
    node = _chosen(steps, layers, layer)
    look = _Look((a, b), inputs, looks, reference, notes, crossed)
    if node in layers:
        tables += look.into(node, thorough=layer is not None)
    elif node is None and everywhere:
        for path in layers:
            found = look.into(path, thorough=True)
            tables += found
            if any(step.blame is not None for _, table in found for step in table):
                break
    return Bisection(
        names=(a.name, b.name),
        dtype=a.dtype,
        has_oracle=reference is not None,
        tables=tuple(tables),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Look:
    """Looking into layers of two models; ``looks`` is what the models said of their layers."""

    sides: tuple[Tapped, Tapped]
    inputs: Values
    looks: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
    reference: Reference | None
    notes: list[str]
    crossed: bool

    def into(self, top: str, *, thorough: bool = False) -> list[tuple[str, tuple[Step, ...]]]:
        """The modules of decoder layer ``top``, then what the first wrong one of them does.

        ``thorough``: what modules do that are not wrong, too, until something is.
        """
        a, b = self.sides
        deep = tuple(dict(side.taps(self.inputs, level="operations", within=top)) for side in self.sides)
        for model, first, second in zip(self.sides, self.looks, deep, strict=True):
            if not np.array_equal(first[HEAD], second[HEAD], equal_nan=True):
                off = distance(second[HEAD], first[HEAD], _mask(self.inputs))
                self.notes.append(f"observer effect: looking into {top} moved {model.name}'s logits by {off:.1g}.")
        merged = (self.looks[0] | deep[0], self.looks[1] | deep[1])
        below = _common((deep[0], deep[1]), (a.name, b.name), self.notes)
        tables: list[tuple[str, tuple[Step, ...]]] = []
        given: list[str] = []
        nodes = deque([top])
        while nodes:
            node = nodes.popleft()
            if not (inside := _children(node, below, merged[0])):
                continue
            common: dict[str, Any] = {"found": merged, "given": given, "layer": top, "reference": self.reference}
            steps = local_errors(a, b, self.inputs, [*inside, node], crossed=self.crossed, **common)
            tables.append((node, tuple(steps)))
            given += inside
            worse = next((step.path for step in steps if step.blame is not None), None)
            if worse is not None:
                is_whole = worse != node and merged[0][worse].dtype.kind == "f"  # a choice has no parts
                nodes = deque([worse] if is_whole else [])
            elif thorough:
                nodes.extend(inside)
        return tables


def _mask(inputs: Values) -> np.ndarray:
    mask = inputs.get("attention_mask")
    return np.ones(np.shape(inputs["input_ids"]), bool) if mask is None else np.asarray(mask).astype(bool)


def _number(path: str) -> int | None:
    """Which decoder layer a path is the output of; None: of none."""
    owner, _, last = path.rpartition(".")
    return int(last) if owner.endswith("layers") and last.isdigit() else None


def _layers(found: Values) -> list[str]:
    """What of a run to hand in whatever is in question: what enters each layer, and the experts chosen."""
    return [
        path
        for path, value in found.items()
        if _number(path) is not None or value.dtype.kind != "f" or path.endswith("embed_tokens")
    ]


def _common(found: tuple[Values, Values], names: tuple[str, str], notes: list[str]) -> list[str]:
    """The paths that both have, in the order of the first; what one lacks is noted."""
    for own, other, name in ((found[0], found[1], names[1]), (found[1], found[0], names[0])):
        if lacking := [path for path in own if path not in other]:
            notes.append(f"{name} has no tap {', '.join(lacking)}.")
    paths = [path for path in found[0] if path in found[1]]
    if wrong := [path for path in paths if found[0][path].shape != found[1][path].shape]:
        shapes = "; ".join(f"{path} {found[0][path].shape} and {found[1][path].shape}" for path in wrong)
        raise ValueError(f"{names[0]} and {names[1]} differ in shape: {shapes}. Are they of one checkpoint and batch?")
    return paths


def _chosen(steps: Sequence[Step], layers: Sequence[str], layer: int | None) -> str | None:
    """The step to look into: the one asked for, else the one furthest over its limit; None: none is over it."""
    if layer is not None:
        asked = next((path for path in layers if _number(path) == layer), None)
        if asked is None:
            raise ValueError(f"there is no decoder layer {layer}, expected one of {[_number(path) for path in layers]}")
        return asked
    wrong = [step for step in steps if step.blame is not None]
    if not wrong:
        return None
    worst = max(wrong, key=lambda step: step.used).path
    return next((path for path in layers if worst.startswith(f"{path}.")), worst)  # a router is part of its layer


def _children(node: str | None, paths: Sequence[str], found: Values) -> list[str]:
    """The steps that make up a step: those below it with no other step between. What a router chose counts as none."""
    if node is None:
        return []
    below = [path for path in paths if path.startswith(f"{node}.")]
    nodes = [path for path in below if found[path].dtype.kind == "f"]
    is_between: Callable[[str], bool] = lambda path: any(path.startswith(f"{other}.") for other in nodes)  # noqa: E731
    return [path for path in below if not is_between(path)]


class _Callable(ModuleType):
    """Importing this module binds it as ``parity.bisect``, over the function of that name: so it can be called too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Bisection:
        return bisect(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
__all__ = ["Reference", "bisect", "local_errors"]
