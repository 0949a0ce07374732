"""Bugs planted on purpose: a test suite is worth what it catches, so its catch is counted.

A mutant is one bug of the kind that ports and weight updates really have, put into our own code or weights for as long
as a ``with`` lasts. It is killed when its detector (``parity.mutants.bench``, ``parity.mutants.life``), which passes
the code as it is, finds something wrong. Mutants that compute the same are listed too, with the reason, and must
survive.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from parity.mutants.bench import Bench, Detector, Subject, decode, forward
from parity.mutants.detectors import axes, holes, mtp, speculative

Kind = Literal["attention", "moe", "head", "loader", "reload", "hybrid", "gemma", "draft", "graphs", "lora", "vision"]
Make = Callable[[Any, str], Any]  # (original, backend) -> what stands in its place

# what XLA programs are made from
_FAMILIES = ("qwen3", "qwen3_5", "qwen3_vl", "gemma3")
TRACED = (
    *("layers.", "programs:", "draft:", "cache:", "loaders.stage:"),
    *(f"{family}:" for family in _FAMILIES),
    *(f"loaders.{family}:{family.capitalize()}" for family in _FAMILIES),
)


@dataclass(frozen=True)
class Patch:
    """One attribute to replace: ``where`` is ``module:attribute.path`` inside the backend's package or ``loaders``.

    ``CALL`` in the path stands for the method that runs a module, ``KERNELS`` for the name its framework has there.
    ``in_torch`` is where it is in torch, when the twins differ.
    """

    where: str
    make: Make
    in_torch: str | None = None

    @property
    def is_traced(self) -> bool:
        """Whether it changes what a compiled program computes, and not only what surrounds it."""
        return self.where.startswith(TRACED)

    def on(self, backend: str) -> Any:
        """The patcher, not yet started."""
        where = self.in_torch if self.in_torch and backend == "torch" else self.where
        module, _, path = where.partition(":")
        owner: Any = import_module(module if module.startswith("loaders") else f"{backend}_models.{module}")
        call, kernels = ("forward", "F") if backend == "torch" else ("__call__", "jax")
        *parents, name = path.replace("CALL", call).replace("KERNELS", kernels).split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return patch.object(owner, name, self.make(getattr(owner, name), backend))


@dataclass(frozen=True)
class Mutant:
    """One planted bug.

    Attributes:
        name: unique.
        kind: which part of the project it is in.
        says: what the bug is.
        source: where it is from: ``parity N`` is a number of facts/parity.md, section 3; ``law N`` one of design.md.
        plant: makes the patches of a backend; makers run anew each time, so no state is left from the last.
        subject: the zoo model that shows it.
        detector: what has to notice.
        backends: where it is planted.
        refusal: the error with which our own code refuses it; None when it runs and is wrong.
        equivalent: why nobody could notice; such a mutant is not counted and must survive.
    """

    name: str
    kind: Kind
    says: str
    source: str
    plant: Callable[[], Sequence[Patch]]
    subject: Subject
    detector: Detector
    backends: tuple[str, ...] = ("torch",)
    refusal: type[Exception] | None = None
    equivalent: str | None = None

    @contextmanager
    def planted(self, backend: str) -> Iterator[None]:
        """The bug is there inside the block and gone after it, whatever happens.

        Compiled programs are kept per configuration. A bug that changes what they compute gets programs of its own;
        those of the clean code stay as they are.
        """
        patches = self.plant()
        with ExitStack() as stack:
            if backend == "jax" and any(one.is_traced for one in patches):
                # import_module, since the package has a function of that name
                loader, programs = import_module("jax_models.load"), import_module("jax_models.programs")
                stack.enter_context(patch.object(loader, "programs_for", lru_cache(programs.Programs)))
                if self.detector in (forward, decode, mtp, axes, holes, speculative):  # the ruler; others want bits
                    stack.enter_context(_hasty_compiler())
            for one in patches:
                stack.enter_context(one.on(backend))
            yield


@dataclass(frozen=True)
class MutantResult:
    """What became of one mutant on one backend.

    ``evidence``: the first finding, empty when it survived; of one that could not be tried (``is_broken``), why.
    """

    mutant: Mutant
    backend: str
    killed: bool
    evidence: str
    seconds: float
    is_broken: bool = False

    @property
    def is_as_expected(self) -> bool:
        return not self.is_broken and self.killed == (self.mutant.equivalent is None)


def all_mutants() -> dict[str, Mutant]:
    """Every mutant by name."""
    from parity.mutants.catalogue import MUTANTS  # the lists are made from the classes above

    return MUTANTS


def prepare(bench: Bench, mutant: Mutant, backend: str) -> list[str]:
    """What the mutant's detector finds in the clean code, once per bench; this makes all references."""
    key = (mutant.detector, mutant.subject, backend)
    if key not in bench.clean:
        bench.clean[key] = mutant.detector(bench, mutant.subject, backend)
    return bench.clean[key]


class FalseAlarm(AssertionError):
    """A detector finds fault with the clean code, so that it proves nothing."""


def try_mutant(bench: Bench, mutant: Mutant, backend: str) -> MutantResult:
    """Plant a mutant and see whether its detector notices.

    Raises:
        FalseAlarm: the detector finds fault with the clean code, so that it would prove nothing.
    """
    false_alarm = prepare(bench, mutant, backend)
    if false_alarm:
        raise FalseAlarm(f"clean {backend} on {mutant.subject}: {false_alarm}")
    started = time.perf_counter()
    with mutant.planted(backend):
        try:
            findings = mutant.detector(bench, mutant.subject, backend)
        except Exception as error:  # a planted bug may raise anything; what was not to be expected is raised again
            if mutant.refusal is None or not isinstance(error, mutant.refusal):
                raise
            findings = [f"refused with {type(error).__name__}: {str(error).splitlines()[-1].strip()}"]
    evidence = findings[0] if findings else ""
    return MutantResult(mutant, backend, bool(findings), evidence, time.perf_counter() - started)


def score(names: Sequence[str] | None = None, *, kind: Kind | None = None) -> list[MutantResult]:
    """Try mutants, each on every backend it is made for.

    Args:
        names: which; default: all.
        kind: only those of one kind.
    Raises:
        ValueError: a name that is no mutant's.
        FalseAlarm: a detector finds fault with the clean code, so that it proves nothing.
    """
    known = all_mutants()
    unknown = sorted(set(names or ()) - known.keys())
    if unknown:
        raise ValueError(f"no mutant is called {', '.join(unknown)}. `tandem mutate --list` names them.")
    chosen = [known[name] for name in names or known if kind in (None, known[name].kind)]
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory))
        return [_tried(bench, mutant, backend) for mutant in chosen for backend in mutant.backends]


def _tried(bench: Bench, mutant: Mutant, backend: str) -> MutantResult:
    """As ``try_mutant``; one that does not run as it should is a result too, and the others are tried all the same."""
    started = time.perf_counter()
    try:
        return try_mutant(bench, mutant, backend)
    except FalseAlarm:
        raise
    except Exception as error:  # noqa: BLE001 - it may be anything, and is told
        why = f"{type(error).__name__}: {str(error).splitlines()[-1] if str(error) else ''}"
        return MutantResult(mutant, backend, False, why, time.perf_counter() - started, is_broken=True)


@contextmanager
def _hasty_compiler() -> Iterator[None]:
    """Compile times matter here and run times do not; a planted bug is far above what optimising rounds differently."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
