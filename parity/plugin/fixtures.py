"""What the fixtures of the pytest plugin hand to a test. Nothing here is a fixture itself, or imports a framework."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parity.asserting import Judge, Oracle, Runs, hold
from parity.assertion_text import failure
from parity.backend import Backend, record_backend
from parity.comparison.outcome import Comparison
from parity.events import EventResult
from parity.plugin.names import file_name
from parity.trace import Trace

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
KINDS = ("cpu", "cuda", "gpu", "mps", "rocm", "tpu", "xpu")  # of devices, in words of JAX or torch


class TinyModels:
    """``tiny_model``: a checkpoint of the zoo by name, made once in a session and the same in every one."""

    def __init__(self, directory: Callable[[str], Path]) -> None:
        self._directory = directory
        self._made: dict[tuple[str, str], Path] = {}
        self._oracles: dict[Path, Oracle] = {}

    def __call__(self, name: str, **options: Any) -> Path:
        """Directory of the checkpoint; options are those of ``parity.zoo.make_checkpoint``.

        Tests share it: whoever wants to write to it makes a copy.

        Raises:
            ValueError: the zoo has no such model; lists those it has.
        """
        from parity.zoo import ZOO, make_checkpoint

        if name not in ZOO:
            raise ValueError(f"the zoo has no {name!r}, expected one of {', '.join(ZOO)}")
        key = (name, repr(sorted(options.items())))
        if key not in self._made:
            self._made[key] = make_checkpoint(name, self._directory(name) / "checkpoint", **options)
        return self._made[key]

    def oracle(self, checkpoint: Path) -> Oracle:
        """The oracle of a checkpoint, which all tests share."""
        if checkpoint not in self._oracles:
            self._oracles[checkpoint] = Oracle(checkpoint)
        return self._oracles[checkpoint]


@dataclass(frozen=True)
class ParityMark:
    """The arguments of ``@pytest.mark.parity``.

    Attributes:
        model: a checkpoint of the zoo.
        a: ``jax``, ``torch`` or ``transformers``, with a device after a colon where it is not the default one.
        b: the peer, likewise.
        dtype: of the checkpoint: ``float32``, ``bfloat16``, ``float16``.
        seed: of its weights.
    """

    model: str = "qwen3"
    a: str = "jax"
    b: str = "torch"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"parity(dtype={self.dtype!r}): expected one of {', '.join(DTYPES)}")
        for spelled in (self.a, self.b):
            kind = spelled.partition(":")[2].partition(":")[0]
            if kind and kind not in KINDS:  # a typo would be a device that is not here, and skip the test
                raise ValueError(f"parity({spelled!r}): {kind!r} is no kind of device, expected {', '.join(KINDS)}")


@dataclass(frozen=True)
class BackendPair:
    """``backend_pair``: two backends of one checkpoint, loaded for this test alone. Unpacks into ``a, b``.

    Attributes:
        a: ours. b: the peer.
        checkpoint: directory.
        inputs: what a comparison of the two runs by default.
    """

    a: Backend
    b: Backend
    checkpoint: Path
    inputs: Mapping[str, np.ndarray]

    def __iter__(self) -> Iterator[Backend]:
        return iter((self.a, self.b))

    @classmethod
    def load(cls, mark: ParityMark, checkpoint: Path) -> BackendPair:
        """Raises ``DeviceNotFound`` where one of them cannot be had."""
        from loaders import open_checkpoint
        from parity.record import default_inputs

        inputs = default_inputs(open_checkpoint(checkpoint))
        return cls(_backend(mark.a, checkpoint), _backend(mark.b, checkpoint), checkpoint, inputs)


def _backend(spelled: str, checkpoint: Path) -> Backend:
    from parity.backends import open_backend
    from parity.model_backend import ModelBackend

    name, _, device = spelled.partition(":")
    if name == "transformers":
        from parity.foreign.transformers import TransformersModel

        return TransformersModel.load(checkpoint, device=device or "cpu")
    framework = open_backend(name, device or None)
    return ModelBackend(framework.load(checkpoint), framework)


class Ruler:
    """``ruler``: measures and does not judge, for tests that want the numbers, or the bug to be found."""

    def __call__(self, a: Runs, b: Runs, oracle: Judge | None = None, **options: Any) -> Comparison:
        """The comparison, whatever its verdict; arguments as for ``assert_parity``."""
        held, _ = hold(a, b, oracle, is_asserted=False, **options)
        return held.comparison

    def limits(self, dtype: str) -> Any:
        """What errors are held against in a dtype; see ``parity.ruler.Limits``."""
        from parity.ruler import LIMITS

        return LIMITS[dtype]


class Golden:
    """``golden``: a trace that was recorded once, looked at and kept beside the tests.

    Attributes:
        directory: where this test file's are.
        written: those that this run wrote.
    """

    def __init__(self, directory: Path, test: str, command: str, *, updates: bool) -> None:
        self.directory = directory
        self.written: list[Path] = []
        self._test, self._command, self._updates = test, command, updates

    def path(self, name: str | None = None) -> Path:
        """The file of one golden, named as the test with its class, and by ``name`` where it has several."""
        return self.directory / f"{file_name(self._test if name is None else f'{self._test}@{name}')}.trace"

    def __call__(
        self,
        run: Runs,
        name: str | None = None,
        *,
        oracle: Judge | None = None,
        inputs: Mapping[str, np.ndarray] | None = None,
    ) -> Comparison:
        """Hold ``run`` against the golden, or with ``--parity-update`` write it.

        Args:
            run: a backend to run, a trace, or a trace file.
            name: of the golden, where a test has several.
            oracle: as for ``assert_parity``.
            inputs: what a backend is run on.
        Raises:
            AssertionError: there is no golden, it cannot be read, it is of other inputs or weights, what was computed
                differs from it, or this test has already written it; says which, and what to do.
        """
        __tracebackhide__ = True
        path = self.path(name)
        found = _recorded(run, inputs)
        if self._updates:
            self._write(path, found)
            return hold(found, found, title=f"golden {path.name}, as written")[0].comparison
        if not path.exists():
            raise AssertionError(
                f"there is no golden at {path}. Have it written, look at it, and commit it:\n  {self._command}"
            )
        try:
            kept = Trace.load(path)
        except ValueError as error:
            raise AssertionError(f"{error}\nHave it written anew: {self._command}") from None
        kept.meta["backend"] = f"golden ({kept.backend})"
        held, reproduce = hold(found, kept, oracle, inputs=inputs, title=f"golden {path.name}")
        verdict = held.comparison.verdict
        if verdict == "PASS":
            return held.comparison
        why = "is of other inputs, weights or arithmetic, so nothing can be said" if verdict == "INVALID" else "differs"
        told = failure(held.comparison, reproduce)
        raise AssertionError(f"{told}\ngolden     {path} {why}. If the change is meant: {self._command}")

    def _write(self, path: Path, trace: Trace) -> None:
        if path in self.written:
            raise AssertionError(f"this test has already written {path}: give each of its goldens a name")
        path.parent.mkdir(parents=True, exist_ok=True)
        trace.save(path)
        self.written.append(path)


def _recorded(run: Runs, inputs: Mapping[str, np.ndarray] | None) -> Trace:
    if isinstance(run, Trace):
        return run
    if isinstance(run, str | os.PathLike):
        return Trace.load(run)
    if inputs is None:
        from loaders import open_checkpoint
        from parity.record import default_inputs

        inputs = default_inputs(open_checkpoint(run.info.checkpoint))
    return record_backend(run, inputs)


class Lifecycle:
    """``lifecycle``: take models through every event in the life of a weight, and fail with those that broke a law."""

    def __init__(self, scratch: Path, told: Callable[[Sequence[EventResult]], None]) -> None:
        self._scratch, self._told = scratch, told

    def __call__(self, checkpoint_a: Any, checkpoint_b: Any, **options: Any) -> list[EventResult]:
        """Our models, from A to B and back; options are those of ``parity.run_lifecycle``."""
        from parity.lifecycle.run import run_lifecycle

        return self._checked(run_lifecycle(checkpoint_a, checkpoint_b, scratch=self._scratch, **options))

    def foreign(self, model: Any, a: Any, b: Any, **options: Any) -> list[EventResult]:
        """Anybody's torch module; arguments as for ``parity.foreign.lifecycle.foreign_lifecycle``."""
        from parity.foreign.lifecycle import foreign_lifecycle

        return self._checked(foreign_lifecycle(model, a, b, **options))

    def _checked(self, results: list[EventResult]) -> list[EventResult]:
        __tracebackhide__ = True
        self._told(results)
        failed = [result for result in results if result.verdict == "fail"]
        if failed:
            lines = [f"  {result.event} ({result.backend}): {result.detail}" for result in failed]
            passed = sum(result.verdict == "pass" for result in results)
            raise AssertionError(
                "\n".join([f"lifecycle: {len(failed)} of {len(results)} events break a law, {passed} pass", *lines])
            )
        return results
