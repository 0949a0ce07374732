"""Experts on trial: every form, widths at which a shape fits both ways, a source at its worst, counts and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from loaders import CheckpointError, open_checkpoint
from loaders.digest import tensor_digest
from loaders.reading.filling import Filling
from loaders.reading.plan import plan_load
from loaders.spec import Form
from loaders.stage import Stage
from loaders.writing.writer import TensorType, write_checkpoint
from parity.lifecycle.lending import lent
from parity.mutants.bench import Bench, Subject, differences, load
from parity.zoo import make_checkpoint

# moe_intermediate_size at a hidden_size of 40: gate_up is square at 20
CASES: tuple[tuple[Form, int], ...] = (
    *(("fused", 24), ("fused transposed", 24), ("per expert", 24)),
    *(("fused", 20), ("fused transposed", 20)),
)
EXPERTS = "model.layers.1.mlp.experts."


def expert_forms(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Every form is loaded to the bits that the clean code has from experts one by one, from files and borrowed."""
    for form, width in CASES:
        path = _path(bench, subject, form, width)
        owed = bench.once(
            ("experts", subject, width, backend),
            lambda width=width: _parameters(load(backend, _path(bench, subject, "per expert", width))),
        )
        for way, source in (("", nullcontext()), (", borrowed", lent(width))):
            with source:
                model = load(backend, path)
            when = f"{form} of width {width}{way}"
            found = differences(when, owed, _parameters(model)) or differences(
                when, bench.on_disk(path), model.digests()
            )
            if found:
                return found
    return []


def expert_counts(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Missing and repeated experts are refused by number, every load counts anew, a rank takes its own."""
    return list(_counts(bench, subject))[:1]


def _counts(bench: Bench, subject: Subject) -> Iterator[str]:
    single, fused = (open_checkpoint(_path(bench, subject, form, 24)) for form in ("per expert", "fused"))
    up = f"{EXPERTS}3.up_proj.weight"
    cases = {
        "a missing expert": ({name: single for name in single.tensors if name != up}, "missing: expert 3, shard 1"),
        "a repeated expert": (dict.fromkeys(fused.tensors, fused) | {up: single}, "expert 3, shard 1"),
    }
    for what, (holders, says) in cases.items():
        path = bench.once((what, subject), lambda holders=holders: _write(bench, fused.config_document, holders))
        try:
            plan_load(open_checkpoint(path), Stage())
        except CheckpointError as error:
            if says not in str(error):
                yield f"{what} is refused without its number"
        else:
            yield f"{what} is accepted"
    plan = plan_load(single, Stage())
    filling = Filling(plan)
    for name in (None, up):
        tensors = [pair for pair in single.stream(names=plan.tensors) if pair[0] != name]
        try:
            for _ in filling.receive(iter(tensors)):
                pass
            filling.finish()
        except CheckpointError as error:
            if name is None or "never delivered: expert 3, shard 1" not in str(error):
                yield f"a load is refused: {error.problems[0]}"
        else:
            if name is not None:
                yield "a second load is complete before it began"
    yield from _rank(single.read(up))


def _rank(weight: np.ndarray) -> Iterator[str]:
    loader = import_module("loaders.reading.place").weight_loader
    param = np.zeros((2, *weight.shape), weight.dtype)
    filled = [loader(param, weight, expert_id=one, experts=range(3, 5), return_success=True) for one in (2, 4, 5)]
    if filled != [False, True, False] or param[0].any() or param[1].tobytes() != weight.tobytes():
        yield "a rank of experts 3 and 4 does not take expert 4 alone"


def _path(bench: Bench, subject: Subject, form: Form, width: int) -> Path:
    def make() -> Path:
        options: dict[str, Any] = {"experts": form, "draft_experts": form, "moe_intermediate_size": width}
        return make_checkpoint(
            subject.model, bench._new("experts", form, width), dtype="BF16", **options, **dict(subject.changes)
        )

    return bench.once(("experts", subject, form, width), make)


def _write(bench: Bench, document: dict[str, Any], holders: dict[str, Any]) -> Path:
    plan = {name: TensorType("BF16", holder.tensors[name].shape) for name, holder in holders.items()}
    plan = {name: TensorType(holders[name].tensors[name].dtype, one.shape) for name, one in plan.items()}
    return write_checkpoint(
        bench._new("counts"), plan, lambda name: holders[name].read(name), config=document, generation=None
    )


def _parameters(model: Any) -> dict[str, str]:
    """Digest of every parameter, whatever tensors it is exported as."""
    if model.__class__.__module__.startswith("torch_models"):
        view = import_module("torch_models.storage").host_view
        return {name: tensor_digest(view(param)) for name, param in model.named_parameters()}
    flat = import_module("jax_models.weights").flatten(model.weights)
    return {name: tensor_digest(np.asarray(param)) for name, param in flat.items()}
