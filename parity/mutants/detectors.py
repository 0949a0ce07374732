"""Detectors for what the ruler over layers cannot show: drafts, speculation, three axes, owed roundings, insides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from loaders import open_checkpoint
from parity.backend import HEAD
from parity.backends import open_backend
from parity.model_backend import ModelBackend
from parity.mutants.bench import PEER, Bench, Subject, as_trace, judge, load, other, record
from parity.oracle import oracle_forward
from parity.trace import Trace
from parity.zoo import prompts

PROMPT, NEW, DRAFTED = 24, 20, 3  # tokens of speculation: several rounds, and one compaction of the cache
ROUNDED = 0.02  # share of values whose correct rounding an ulp in float32 may tip


def mtp(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """What the draft says of every token but the first, under the three-way ruler."""
    batch = bench.batch(subject)
    peer = bench.once(("mtp", subject), lambda: _draft_trace(bench, subject, PEER))
    oracle = bench.once(("mtp oracle", subject), lambda: _draft_oracle(bench.path(subject), batch))
    return judge(_draft_trace(bench, subject, backend), peer, oracle)


def _draft_trace(bench: Bench, subject: Subject, backend: str) -> Trace:
    batch = bench.batch(subject)
    logits, hidden = load(backend, bench.path(subject)).mtp_forward(**batch)
    return as_trace(backend, batch, {"mtp.logits": np.asarray(logits), "mtp.hidden_state": np.asarray(hidden)})


def _draft_oracle(path: Any, batch: dict[str, Any]) -> Trace:
    found = oracle_forward(open_checkpoint(path), **batch, mtp=True)
    return as_trace("oracle64", batch, {name: found[name] for name in ("mtp.logits", "mtp.hidden_state")})


def axes(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Time, height and width that differ, as of images, under the three-way ruler."""
    batch = bench.batch(subject)
    rng = np.random.default_rng(0)
    return _forward_of(
        "axes", bench, subject, backend, {"position_ids": rng.integers(0, 90, (3, *batch["input_ids"].shape))}
    )


def holes(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Padding in the middle of rows, which no convolution and no state may see, under the three-way ruler."""
    mask_BT = bench.batch(subject)["attention_mask"].copy()
    mask_BT[:, 30:33] = 0
    return _forward_of("holes", bench, subject, backend, {"attention_mask": mask_BT})


def _forward_of(name: str, bench: Bench, subject: Subject, backend: str, changes: dict[str, np.ndarray]) -> list[str]:
    batch = bench.batch(subject) | changes

    def trace(backend: str) -> Trace:
        return record(backend, load(backend, bench.path(subject)), batch)

    def oracle() -> Trace:
        given: dict[str, Any] = batch
        return as_trace("oracle64", batch, oracle_forward(open_checkpoint(bench.path(subject)), **given))

    peer = bench.once((name, subject, "peer"), lambda: trace(PEER))
    return judge(trace(backend), peer, bench.once((name, subject), oracle))


def speculative(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Greedy tokens are the same with a draft as without; and it is taken as often as on the other backend.

    A draft that is wrong costs time only, so its worth is held against an independent implementation's.
    """
    config = open_checkpoint(bench.path(subject)).config
    batch = prompts(config, rows=4, tokens=PROMPT, padding="left", seed=3)

    def run(backend: str, *, drafts: bool) -> tuple[np.ndarray, Any]:
        model = load(backend, bench.path(subject))
        draft = model.draft if drafts else None
        options = {"max_new_tokens": NEW, "ignore_eos": True}
        guesses = {} if draft is None else {"draft": draft, "draft_tokens": DRAFTED}
        found = model.generate(**batch, **options, **guesses)
        return np.asarray(found), draft and draft.report

    plain, _ = bench.once(("plain", subject, backend), lambda: run(backend, drafts=False))
    _, worth = bench.once(("drafted", subject, other(backend)), lambda: run(other(backend), drafts=True))
    assert 0 < worth.accepted < worth.drafted, f"{worth}: nothing is refused, or nothing taken"
    tokens, report = run(backend, drafts=True)
    if tokens.shape != plain.shape or (tokens != plain).any():
        return ["with a draft, greedy tokens are others than without"]
    return [f"of the draft's tokens {report}, expected {worth}"] if report != worth else []


def rounding(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """In bfloat16: embeddings and final norm are rounded once, from weights and inputs that are known exactly."""
    checkpoint = open_checkpoint(bench.path(subject))
    config: Any = checkpoint.config
    text = config.text_paths[0]
    batch = bench.batch(subject)
    _, taps = load(backend, bench.path(subject), "bfloat16").with_taps(**batch)
    last = f"{text}.layers.{config.num_hidden_layers - 1}"
    seen = {name: _wide(taps[f"{text}.{name}" if "." not in name else name]) for name in ("embed_tokens", last, "norm")}
    is_real = batch["attention_mask"] == 1
    rows = checkpoint.read(f"{text}.embed_tokens.weight")[batch["input_ids"]]
    scale = np.asarray(config.hidden_size**0.5 if "Gemma" in config.architecture else 1.0, rows.dtype)
    x = seen[last]
    root = np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps)
    gamma = 1.0 + checkpoint.read(f"{text}.norm.weight").astype(np.float64)
    expected = {"embed_tokens": rows.astype(np.float64) * scale.astype(np.float64)}
    if backend == "torch":  # XLA norms the last layer's sum as it was before it was rounded, which no tap can show
        expected["norm"] = x / root * gamma
    for name, value in expected.items():
        rounded = value.astype(np.float32).astype(rows.dtype).astype(np.float64)
        wrong = float((rounded != seen[name])[is_real].mean())
        if wrong > ROUNDED:
            return [f"{name}: {wrong:.0%} of the values are not rounded once, at most {ROUNDED:.0%} may be"]
    return []


class Remembered:
    """What a live model says of a batch, asked once: a bug planted later in the code it runs does not reach it."""

    def __init__(self, live: ModelBackend, inputs: Mapping[str, np.ndarray]) -> None:
        self.name, self.dtype = f"clean {live.name}", live.dtype
        self.layers, self.operations = live.taps(inputs), live.taps(inputs, level="operations")

    def taps(
        self,
        inputs: Mapping[str, np.ndarray],
        *,
        level: str = "layers",
        within: str | None = None,
        inject: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """As ``ModelBackend.taps``, of the batch it was asked on; it cannot be fed."""
        assert inject is None, "what was asked once cannot go on from another value"
        if level == "layers":
            return self.layers
        inside = f"{within}."
        return {path: x for path, x in self.operations.items() if path == HEAD or f"{path}.".startswith(inside)}


def inside(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Every step of every layer judged alone, for what is too small for a layer to show."""
    # imported here: binding ``parity.bisect`` to the module of that name would shadow the public function
    from parity.bisect import bisect

    framework, batch, checkpoint = open_backend(backend), bench.batch(subject), open_checkpoint(bench.path(subject))

    def live() -> ModelBackend:
        return ModelBackend(load(backend, bench.path(subject)), framework)

    clean = bench.once(("inside", subject, backend), lambda: Remembered(live(), batch))
    found = bisect(clean, live(), batch, checkpoint=checkpoint, everywhere=True, crossed=False)
    return [found.summary] if found.exit_code else []


def _wide(tensor: Any) -> np.ndarray:
    """A tap in float64, whatever framework it is of."""
    return np.asarray(tensor.float() if hasattr(tensor, "float") else tensor.astype("float32")).astype(np.float64)
