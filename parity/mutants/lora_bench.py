"""Detectors of what adapters compute, and of what becomes of them; references are the oracle's and the files'."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from loaders import open_checkpoint
from loaders.adapters.opening import open_adapter
from loaders.adapters.sites import sites_of
from parity.mutants.bench import Bench, Subject, differences, load
from parity.oracle import oracle_forward
from parity.zoo import prompts
from parity.zoo.adapters import DENSE, EXPERTS, TABLES, make_adapter

BOUND, MERGED = 2e-5, 3e-2  # relative error of logits in float32, and after merged weights were rounded to bfloat16
_ROWS = ("a", None, "b")
# nothing is as the defaults would have it: alpha is not r, a rank and an alpha come from patterns, roots are taken
_OPTIONS: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"layers.1.self_attn.q_proj": 7},
    "alpha_pattern": {"o_proj": 2},
}


def adapter(bench: Bench, subject: Subject, kind: str) -> Path:
    """An adapter for the subject: ``a`` and ``b`` of everything, ``small`` of one module, ``layers`` without tables."""

    def make() -> Path:
        path = bench.path(subject)
        has_experts = any(site.kind == "experts" for site in sites_of(open_checkpoint(path).config).low_rank.values())
        everything: dict[str, Any] = {"targets": (*(DENSE[:4] if has_experts else DENSE), *TABLES), "whole": ("norm",)}
        chosen: dict[str, Any] = {"small": {"targets": ("q_proj",)}, "layers": {"targets": DENSE[:4]}}.get(
            kind, everything | _OPTIONS
        )
        experts: dict[str, Any] = {"parameters": EXPERTS} if has_experts and kind in "ab" else {}
        return make_adapter(path, bench._new("adapter", kind), seed=ord(kind[0]), **chosen, **experts)

    return bench.once(("adapter", subject, kind), make)


def adapted(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """A batch whose rows have one adapter, another one and none: every row is the oracle's with its own."""
    batch = _batch(bench, subject)
    model = load(backend, bench.path(subject))
    for name in "ab":
        model = model.attach_lora(adapter(bench, subject, name), name)
    found = np.asarray(model(**batch, adapter=_ROWS))
    for row, name in enumerate(_ROWS):
        wrong = _error(found, _expected(bench, subject, name), batch, row)
        if not wrong <= BOUND:
            return [f"the row of adapter {name} is {wrong:.1e} away from the oracle, at most {BOUND:.0e}"]
    return []


def adapter_life(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Attach, replace, take a slot over, reload under, merge and detach; the first thing that goes wrong."""
    for kind, seed in (("a", 0), ("b", 0), ("small", 0), ("small", 1), ("layers", 0)):
        _expected(bench, subject, kind, seed)  # made by clean code
    for seed in (0, 1):
        bench.on_disk(bench.path(subject, seed))
    finding = next(_life(bench, subject, backend), None)
    return [finding] if finding else []


def _life(bench: Bench, subject: Subject, backend: str) -> Iterator[str]:
    batch, paths = _batch(bench, subject), [bench.path(subject, seed) for seed in (0, 1)]

    def given(kind: str) -> Path:
        return adapter(bench, subject, kind)

    def says(model: Any, kind: str, when: str, seed: int = 0, bound: float = BOUND) -> Iterator[str]:
        found, expected = np.asarray(model(**batch)), _expected(bench, subject, kind, seed)
        wrong = max(_error(found, expected, batch, row) for row in range(len(_ROWS)))
        if not wrong <= bound:
            yield f"{when}, logits are {wrong:.1e} away from the oracle, at most {bound:.0e}"

    model = load(backend, paths[0], "float32")
    names, base = _names(model), np.asarray(model(**batch))
    model = model.attach_lora(given("a"))
    yield from says(model, "a", "attached")
    if _names(model) != names:
        yield "parameters have other names under an adapter"
    _, cache = model.prefill(**batch)
    model = model.attach_lora(given("b"))
    yield from says(model, "b", "replaced under the same name")
    try:
        model.decode(batch["input_ids"][:, -1], cache)
        yield "a cache of the adapter before was taken"
    except ValueError:
        pass
    model = model.attach_lora(given("layers"), "layers").detach_lora().attach_lora(given("small"), "small")
    yield from says(model, "small", "in a slot that another one had")
    model = model.update_weights_from_disk(paths[1])
    yield from differences("after a reload under adapters", bench.on_disk(paths[1]), model.digests())
    yield from says(model, "small", "after a reload under adapters", seed=1)
    model = model.update_weights_from_disk(paths[0]).merge_lora("small")
    yield from says(model, "small", "merged", bound=MERGED if subject.dtype == "BF16" else BOUND)
    model = model.unmerge_lora()
    yield from differences("after a merge was undone", bench.on_disk(paths[0]), model.digests())
    model = model.detach_lora("small").detach_lora("layers")
    if not np.array_equal(np.asarray(model(**batch)), base):
        yield "with all adapters gone, logits are not the base's"


def _names(model: Any) -> Any:
    """Names of the parameters: of torch's modules, or of the pytree."""
    if hasattr(model, "named_parameters"):
        return [name for name, _ in model.named_parameters()]
    import jax

    return jax.tree.structure(model.weights)


def _batch(bench: Bench, subject: Subject) -> dict[str, np.ndarray]:
    return prompts(open_checkpoint(bench.path(subject)).config, rows=len(_ROWS), tokens=24, padding="left")


def _expected(bench: Bench, subject: Subject, kind: str | None, seed: int = 0) -> np.ndarray:
    """The oracle's logits with an adapter; None: without."""

    def run() -> np.ndarray:
        checkpoint = open_checkpoint(bench.path(subject, seed))
        opened = None if kind is None else open_adapter(adapter(bench, subject, kind), checkpoint.config)
        given: dict[str, Any] = _batch(bench, subject)
        return oracle_forward(checkpoint, **given, adapter=opened)["logits"]

    return bench.once(("adapted oracle", subject, kind, seed), run)


def _error(found: np.ndarray, expected: np.ndarray, batch: dict[str, np.ndarray], row: int) -> float:
    real = batch["attention_mask"][row] == 1
    difference = found[row][real].astype(np.float64) - expected[row][real]
    return float(np.linalg.norm(difference) / np.linalg.norm(expected[row][real]))
