"""Where mutants are tried: checkpoints, the oracle and clean runs, made once, and the detectors that hold code to them.

A detector runs the code as it stands (so with whatever bug is planted) and returns what it found wrong; nothing for
correct code. References never come from the code on trial: the oracle and the files are independent of it, clean runs
are made before a bug is planted.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from loaders import open_checkpoint
from loaders.checkpoint import Checkpoint
from loaders.digest import digests
from loaders.writing.writer import TensorType, write_checkpoint
from parity.comparison.outcome import Comparison
from parity.model_backend import trace_names
from parity.oracle import oracle_forward
from parity.trace import Trace, input_hash, make_meta
from parity.zoo import make_checkpoint, prompts
from parity.zoo.draft import make_drafting_checkpoint

BACKENDS = ("torch", "jax")
PEER = "torch"  # whose clean run any trial is held against: it compiles nothing
STEPS = 6  # tokens decoded one by one; the rest of the prompt is prefilled
QUIET = 0.08  # of a drafting checkpoint: about every other guess is right
TOKENS = 96  # shorter prompts are blind to rotary bugs


@dataclass(frozen=True)
class Subject:
    """A zoo model to try a mutant on.

    Attributes:
        model: its name.
        changes: config overrides, as pairs so that it can be a key.
        dtype: of what is stored.
        is_drafting: with a draft that is often right (``parity.zoo.draft``).
    """

    model: str
    changes: tuple[tuple[str, Any], ...] = ()
    dtype: str = "F32"
    is_drafting: bool = False

    def __str__(self) -> str:
        return ", ".join([self.model, *(f"{key}={value}" for key, value in self.changes)])


class Bench:
    """References for every subject, in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clean: dict[Any, list[str]] = {}  # what each detector found in the clean code
        self.kept: dict[Any, Any] = {}  # what detectors made from the clean code and go on using
        for name in (
            "path",
            "batch",
            "oracle",
            "clean_trace",
            "clean_logits",
            "on_disk",
            "renamed",
            "swapped",
            "short",
        ):
            setattr(self, name, lru_cache(maxsize=None)(getattr(self, name)))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when ``key`` was first asked for: in the clean code, as detectors run there first."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def path(self, subject: Subject, seed: int = 0) -> Path:
        """The subject's checkpoint. Another seed is other weights of the same config."""
        directory = self._new("seed", seed)
        make = partial(make_drafting_checkpoint, quiet=QUIET) if subject.is_drafting else make_checkpoint
        return make(
            subject.model, directory, seed=seed, dtype=subject.dtype, max_file_bytes=1 << 17, **dict(subject.changes)
        )

    def batch(self, subject: Subject) -> dict[str, np.ndarray]:
        """Two full rows, one padded on the right and one on the left, every canary in each."""
        config = open_checkpoint(self.path(subject)).config
        sides = [
            prompts(config, rows=2, tokens=TOKENS, padding=side, seed=i) for i, side in enumerate(("right", "left"))
        ]
        return {name: np.concatenate([side[name] for side in sides]) for name in sides[0]}

    def short(self, subject: Subject) -> dict[str, np.ndarray]:
        """Enough to see that weights are others, at the price of a few tokens."""
        return prompts(open_checkpoint(self.path(subject)).config, rows=2, tokens=24, padding="left")

    def oracle(self, subject: Subject) -> Trace:
        """float64 and free to choose its experts: in float32 nothing but an exact tie flips."""
        batch: dict[str, Any] = self.batch(subject)
        return as_trace("oracle64", batch, oracle_forward(open_checkpoint(self.path(subject)), **batch))

    def clean_trace(self, subject: Subject, backend: str) -> Trace:
        return record(backend, load(backend, self.path(subject)), self.batch(subject))

    def clean_logits(self, path: Path, subject: Subject, backend: str) -> tuple[np.ndarray, ...]:
        return logits(load(backend, path), self.short(subject))

    def on_disk(self, path: Path) -> dict[str, str]:
        """Digest of every tensor, straight from the files."""
        checkpoint = open_checkpoint(path)
        return digests((name, checkpoint.read(name)) for name in checkpoint.tensors)

    def renamed(self, subject: Subject) -> Path:
        """The checkpoint of seed 1 with one tensor under a wrong name: to be refused."""
        wrong = {"model.layers.1.self_attn.v_proj.weight": "model.layers.1.self_attn.value_proj.weight"}
        checkpoint = open_checkpoint(self.path(subject, 1))
        tensors = {wrong.get(name, name): checkpoint.read(name) for name in checkpoint.tensors}
        return self._write(checkpoint, tensors, "renamed")

    def swapped(self, subject: Subject) -> Path:
        """The checkpoint of seed 0 with the embedding and head of seed 1."""
        checkpoint, other = (open_checkpoint(self.path(subject, seed)) for seed in (0, 1))
        halves = ("model.embed_tokens.weight", "lm_head.weight")
        tensors = {name: (other if name in halves else checkpoint).read(name) for name in checkpoint.tensors}
        return self._write(checkpoint, tensors, "swapped")

    def _write(self, checkpoint: Checkpoint, tensors: dict[str, np.ndarray], what: str) -> Path:
        plan = {name: TensorType("F32", array.shape) for name, array in tensors.items()}
        return write_checkpoint(
            self._new(what), plan, tensors.__getitem__, config=checkpoint.config_document, generation=None
        )

    def _new(self, *what: object) -> Path:
        return self.directory / "-".join(map(str, (len(list(self.directory.iterdir())), *what)))


def load(backend: str, path: Path, dtype: str = "float32") -> Any:
    """The whole checkpoint, its draft with it."""
    has_draft = open_checkpoint(path).config.num_mtp_layers > 0
    return importlib.import_module(f"{backend}_models").load(path, dtype=dtype, mtp=has_draft)


def logits(model: Any, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """The model's, and those of its draft if it has one."""
    found = [model.with_taps(**batch)[0]] + ([model.mtp_forward(**batch)[0]] if model.stage.has_draft else [])
    return tuple(np.asarray(x).copy() for x in found)


def record(backend: str, model: Any, batch: dict[str, np.ndarray]) -> Trace:
    """Run a model with its taps on."""
    out, taps = model.with_taps(**batch)
    names = trace_names(model.checkpoint)
    tensors = {"logits": out} | {names[path]: value for path, value in taps.items() if path in names}
    return as_trace(backend, batch, {name: np.asarray(tensor) for name, tensor in tensors.items()})


def as_trace(backend: str, batch: dict[str, np.ndarray], tensors: dict[str, np.ndarray]) -> Trace:
    kept = {name: array for name, array in tensors.items() if not name.startswith(("router_logits", "mtp.router"))}
    kept |= {name: array for name, array in batch.items() if name != "position_ids"}
    dtype = "float64" if backend == "oracle64" else "float32"
    return Trace(kept, make_meta(backend=backend, dtype=dtype, input_hash=input_hash(**batch)))


Detector = Callable[[Bench, Subject, str], "list[str]"]


def forward(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """The whole prompt at once, under the three-way ruler."""
    trace = record(backend, load(backend, bench.path(subject)), bench.batch(subject))
    return judge(trace, bench.clean_trace(subject, PEER), bench.oracle(subject))


def decode(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Prefill, then token by token through the cache, held against the same positions of the whole prompt."""
    batch = _ending_together(bench.batch(subject))
    model = load(backend, bench.path(subject))
    prompt = {name: array[:, :-STEPS] for name, array in batch.items()}
    step, cache = model.prefill(**prompt, max_new_tokens=STEPS)
    found = [np.asarray(step).copy()]
    for token_B in batch["input_ids"][:, -STEPS:].T:
        step, cache = model.decode(token_B, cache)
        found.append(np.asarray(step).copy())
    last = {name: array[:, -STEPS - 1 :] for name, array in batch.items()}
    mine = as_trace(backend, last, {"logits": np.stack(found, axis=1)})
    references = []
    for trace in (bench.clean_trace(subject, PEER), bench.oracle(subject)):
        ended = {name: trace.tensors[name][_left_padded(bench.batch(subject))] for name in trace.tensors}
        tail = {name: array[:, -STEPS - 1 :] for name, array in ended.items() if name not in batch}
        references.append(as_trace(trace.backend, last, tail))
    return judge(mine, *references)


def loaded_bits(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """What was loaded is what the files hold, bit for bit, and so is what is exported again."""
    model = load(backend, bench.path(subject))
    expected = bench.on_disk(bench.path(subject))
    found = differences("after load", expected, model.digests())
    if not found:
        exported = model.export(bench._new("exported"))
        found = differences("after export", expected, bench.on_disk(exported))
    return found


def other(backend: str) -> str:
    return "jax" if backend == "torch" else "torch"


def differences(when: str, expected: dict[str, str], found: dict[str, str]) -> list[str]:
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return [f"{when}, {len(wrong)} tensor(s) differ from what they should be, first {wrong[0]}"] if wrong else []


def judge(mine: Trace, peer: Trace, oracle: Trace) -> list[str]:
    """What the three-way ruler holds against ``mine``."""
    # imported here: binding ``parity.compare`` to the module of that name would shadow the public function
    from parity.compare import compare

    found: Comparison = compare(mine, peer, oracle)
    if found.verdict in ("INVALID", "SKIP"):
        raise AssertionError(f"the detector could not judge: {found.summary}")
    wrong = [row for row in found.rows if row.cause in ("bug", "both wrong") and row.blame != "b"]
    if wrong:
        e_a, lid = wrong[0].e_a or 0.0, wrong[0].lid
        return [f"{wrong[0].cause} at {wrong[0].name}: error {e_a:.2g}, no correct run exceeds {lid:.2g}"]
    # what stays under the lid may be rounding: correct runs of 12 layers are up to 4.4x apart at single tokens
    return [found.summary] if found.cause in ("bug", "router flip") and found.whose != "b" else []


def _left_padded(batch: dict[str, np.ndarray]) -> np.ndarray:
    return batch["attention_mask"][:, -1] == 1


def _ending_together(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows without padding on the right: they can be continued token by token as they stand."""
    return {name: array[_left_padded(batch)] for name, array in batch.items()}
