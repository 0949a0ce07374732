"""A model under observation: every change goes through here, and after each it is held against a cold load.

What the model must hold is tracked tensor by tensor ("this one from A, that one from B"); see
``parity.lifecycle.live_bench``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loaders import open_checkpoint
from loaders.digest import digests, root_digest
from parity.lifecycle.faults import Fault, broken_checkpoint
from parity.lifecycle.live_bench import HALVES, Bench, Witness

POISON = "NaN"  # where a tensor comes from that came from no checkpoint


class LawBroken(AssertionError):
    """A law of live weights does not hold; says all that is wrong."""


class LiveModel:
    """A loaded model, what it must hold now, and at which version. ``check`` says whether it does.

    Attributes:
        model: to be used from now on.
        base: letter of the checkpoint it was last loaded from.
        holds: tensor -> letter of the checkpoint its value is from.
        version: what the version rules say it must be.
    """

    def __init__(self, bench: Bench, letter: str) -> None:
        self.bench, self.live = bench, bench.live
        self.model = bench.load(bench.path(letter))
        self.base, self.holds = letter, dict.fromkeys(bench.tensors[letter], letter)
        self.version = 1
        self._fixed = self.live.fixed(self.model)
        self._witness()  # compiles everything once; from here on nothing may
        self.check()

    @property
    def is_poisoned(self) -> bool:
        return POISON in self.holds.values()

    @property
    def root(self) -> str:
        return root_digest(self.model.digests())

    def reload(self, letter: str) -> None:
        self.change(letter, lambda model: model.update_weights_from_disk(self.bench.path(letter)))

    def change(self, letter: str, make: Callable[[Any], Any], *, versions: int = 1) -> None:
        """Any change that leaves nothing but the weights of one checkpoint and publishes so many versions."""
        old = self._before()
        self.model = make(self.model)
        self.base, self.holds = letter, dict.fromkeys(self.bench.tensors[letter], letter)
        self.version += versions
        self._after(old)

    def swap(self, letter: str, halves: tuple[str, ...] = HALVES, values: Mapping[str, Any] | None = None) -> None:
        """Take embedding, head or both from another checkpoint; ``values``: as arrays of a model, else NumPy."""
        halves = tuple(half for half in halves if half in self.bench.halves)
        given = {half: (values or {}).get(half, self.bench.half(half, letter)) for half in halves}
        given = {half: value for half, value in given.items() if value is not None}
        if not given:
            return
        old = self._before()
        self.model = self.model.set_embed_and_head(**given)
        changed = {tensor for half in given for tensor in self.bench.tensors_of_half(half, self.base)}
        self.holds.update(dict.fromkeys(changed, letter))
        self.version += 1
        lost = self.live.not_shared(old, self.model, changed) if self.live.keeps_old else []
        self._after(old)
        expect(not lost, f"a swap copied parameters that it did not change: {some(lost)}")

    def rebase(self) -> None:
        """Take present addresses for those to keep: somebody has bound parameters of two models on purpose."""
        self._fixed = self.live.fixed(self.model)

    def poison(self) -> None:
        """Every parameter NaN, and nothing but NaN may come out."""
        old = self._before()
        self.model = self.live.poison(self.model)
        self.holds = dict.fromkeys(self.holds, POISON)
        self.version += self.live.poison_publishes
        self._after(old)

    def broken_reload(self, letter: str, *faults: Fault) -> str:
        """A reload that must be refused, name every fault, and change nothing. Returns the error's text."""
        old, before = self._before(), self.model.digests()
        with broken_checkpoint(self.bench.checkpoints[letter], self.bench.scratch, *faults) as (directory, told):
            try:
                self.model.update_weights_from_disk(directory)
            except ValueError as error:
                text = str(error)
            else:
                raise LawBroken("a broken checkpoint was accepted")
        expect(self.model.digests() == before, "a refused reload changed weights")
        self._after(old)
        silent = [name for name in told if name not in text]
        expect(not silent, f"the error does not name {some(silent)}; it says: {text}")
        return text

    def export(self) -> None:
        """Exported tensors are what the model holds, and what it left out, in the layout of its checkpoint."""
        old = self._before()
        with tempfile.TemporaryDirectory(prefix="export-", dir=self.bench.scratch) as directory:
            with self.live.backend.scope():
                exported = open_checkpoint(self.model.export(Path(directory) / "checkpoint"))
            on_disk = digests(exported.stream())
        source = self.bench.checkpoints[self.base]
        held = self.model.digests() | digests(source.stream(names=self.bench.left_out[self.base]))
        original = source.tensors
        expect(on_disk == held, f"exported tensors differ from the model's: {some(differing(on_disk, held))}")
        strayed = [name for name, info in exported.tensors.items() if info.file != original[name].file]
        expect(not strayed, f"exported into other files than they came from: {some(strayed)}")
        self._after(old)

    def generate(self) -> None:
        """Greedy tokens are those of a cold load."""
        old = self._before()
        tokens = self.bench.tokens(self.model)
        if not self.is_poisoned:
            expect(same_bits(tokens, self._witness().tokens), "generated tokens differ from a cold load's")
        self._after(old)

    def speculate(self) -> None:
        """Greedy tokens with the draft are those of a cold load without."""
        tokens = self.bench.tokens(self.model, self.model.draft)
        expect(same_bits(tokens, self._witness().tokens), "a draft changes the tokens")
        self.check()

    def replay(self) -> None:
        """Decoding by programs or graphs from before is a cold load's, bit for bit."""
        with self.live.backend.scope():
            steps = self.live.replayed(self.model, self.bench.prompt)
        wrong = [i for i, pair in enumerate(zip(steps, self._witness().steps, strict=True)) if not same_bits(*pair)]
        expect(not wrong, f"replayed logits differ from a cold load's at steps {wrong}")
        self.check()

    def nap(self) -> None:
        """Sleep, in which nothing runs, and wake with the same weights, wherever they are now."""
        self.model.sleep().sleep()
        try:
            self.model(**self.bench.prompt)
        except RuntimeError as error:
            expect("wake" in str(error), f"the error does not say what to do: {error}")
        else:
            raise LawBroken("a model that sleeps was run")
        self.model.wake().wake()
        self.rebase()
        self.check()

    def check(self) -> None:
        """Everything that must hold at any moment. Raises LawBroken with all that does not."""
        wrong = self._wrong_weights()
        if self.model.version != self.version:
            wrong.append(f"version is {self.model.version}, expected {self.version}")
        wrong += self._wrong_logits()
        changed = differing(self._fixed, self.live.fixed(self.model))
        wrong += [f"moved or changed shape, dtype or sharding: {some(changed)}"] if changed else []
        expect(not wrong, "; ".join(wrong))

    def _before(self) -> Any:
        """The model a change starts from; what it computes and what is compiled is noted."""
        self._compiled = self.live.compiled(self.model)
        self._old = (self.model.digests(), self.bench.logits(self.model)) if self.live.keeps_old else None
        return self.model

    def _after(self, old: Any) -> None:
        """What a change may not have done: compile (nor may a cold load of the same config), or touch the old model."""
        self.check()
        compiled = differing(self._compiled, self.live.compiled(self.model))
        expect(not compiled, f"something was compiled: {some(compiled)}")
        if self._old is not None and old is not self.model:
            is_kept = old.digests() == self._old[0] and same_bits(self.bench.logits(old), self._old[1])
            expect(is_kept, "the model from before the change is not what it was")
            expect(old.version != self.model.version, "two models that differ have one version")

    def _witness(self) -> Witness:
        return self.bench.witness(self.base, self.holds)

    def _wrong_weights(self) -> list[str]:
        found = self.model.digests()
        if not self.is_poisoned:
            wrong = differing(found, self._witness().digests)
            return [f"weights differ from a cold load's: {some(wrong)}"] if wrong else []
        clean = {
            letter: self.bench.witness(letter, dict.fromkeys(names, letter)).digests
            for letter, names in self.bench.tensors.items()
        }
        wrong = [
            name
            for name, letter in self.holds.items()
            if (letter == POISON) == (found.get(name) in [values.get(name) for values in clean.values()])
            or (letter != POISON and found.get(name) != clean[letter][name])
        ]
        return [f"weights are not what poison and swaps left: {some(wrong)}"] if wrong else []

    def _wrong_logits(self) -> list[str]:
        logits = self.bench.logits(self.model)
        if self.is_poisoned:
            is_nan = np.isnan(logits).all()
            return [] if is_nan else ["poisoned weights give numbers: something is not read from them"]
        drafted, cold = self.bench.drafted(self.model), self._witness()
        wrong = [] if same_bits(logits, cold.logits) else ["logits differ from a cold load's"]
        is_same = drafted is None or cold.drafted is None or same_bits(drafted, cold.drafted)
        return wrong + ([] if is_same else ["the draft's logits differ from a cold load's"])


def expect(condition: bool, text: str) -> None:
    """Raises LawBroken with ``text`` unless ``condition``."""
    if not condition:
        raise LawBroken(text)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Keys that are not in both with equal values."""
    return sorted(key for key in a.keys() | b.keys() if key not in a or key not in b or a[key] != b[key])


def some(names: list[str]) -> str:
    """A list of names, cut."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
