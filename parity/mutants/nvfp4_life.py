"""The life of quantised weights on trial: reloads, what is derived from them, the memory they take."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from loaders import CheckpointError, open_checkpoint
from loaders.digest import tensor_digest
from parity.mutants.bench import Bench, Subject, differences
from parity.mutants.life import _reads_break
from parity.mutants.nvfp4_bench import ALIGNED, SWIZZLING, each_layer, load_quantised, output, rows_for

RESIDENT = 1.02  # of the checkpoint's bytes
_TALL = "model.layers.0.mlp.gate_proj"  # of several tiles of 128 rows


def nvfp4_life(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """A, a failed update, A again, B, A, B: digests, every layer's output and every derived tensor of a cold load."""
    options = SWIZZLING if subject is ALIGNED and backend == "torch" else {}
    finding = next(_Life(bench, subject, backend, options).steps(), None)
    return [finding] if finding else []


class _Life:
    def __init__(self, bench: Bench, subject: Subject, backend: str, options: dict[str, Any]) -> None:
        self.bench, self.backend = bench, backend
        self.a, self.b = (bench.path(subject, seed) for seed in (0, 1))
        self.rows = bench.once(("rows", subject), lambda: rows_for(open_checkpoint(self.a)))
        self.load = lambda path: import_module(f"{backend}_models").load(path, dtype="float32", **options)
        for path in (self.a, self.b):  # in the clean code
            self._cold(path)

    def steps(self) -> Iterator[str]:
        self.model = self.load(self.a)
        before = _addresses(self.backend, self.model)
        yield from self._is("after load", self.a)
        yield from self._failed(self.b)
        for when, path in (("reload of the same", self.a), ("reload", self.b), ("back", self.a), ("again", self.b)):
            try:
                self.model = self.model.update_weights_from_disk(path)
            except Exception as error:  # noqa: BLE001  (whatever a bug makes of a good checkpoint)
                yield f"{when}: a good checkpoint is refused with {type(error).__name__}: {str(error).splitlines()[0]}"
                return
            yield from self._is(when, path)
        if before != _addresses(self.backend, self.model):
            yield "a tensor moved: a captured graph would go on reading the old one"

    def _failed(self, path: Path) -> Iterator[str]:
        try:
            with _reads_break():
                self.model.update_weights_from_disk(path)
        except CheckpointError:
            yield from self._is("after a failed update", self.a)
        else:
            yield "an update of which half was read is accepted"

    def _is(self, when: str, path: Path) -> Iterator[str]:
        yield from differences(when, self.bench.on_disk(path), self.model.digests())
        state, outputs = self._cold(path)
        wrong = [name for name, digest in _state(self.backend, self.model).items() if state.get(name) != digest]
        if wrong:
            yield f"{when}, {wrong[0]} is not what a cold load derives"
        for name, array in each_layer(self.bench, self.model, self.backend, output, self.rows).items():
            if array.tobytes() != outputs[name].tobytes():
                yield f"{when}, {name} computes something else than after a cold load"

    def _cold(self, path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
        def make() -> tuple[dict[str, str], dict[str, np.ndarray]]:
            model = self.load(path)
            return _state(self.backend, model), each_layer(self.bench, model, self.backend, output, self.rows)

        return self.bench.once(("cold", path, self.backend), make)


def nvfp4_derived(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Scales that lodge in their source's storage: deriving twice is once, a part is refused, all of it is taken."""
    from torch_models.derived import alias_or_bind_derived_param, derive
    from torch_models.kernels.nvfp4_blackwell import swizzled
    from torch_models.storage import host_view

    model = load_quantised(bench, subject, backend, inputs=True, **SWIZZLING)
    before = bench.once(("derived", subject), lambda: _state(backend, model))
    layer = model.get_submodule(_TALL)
    loaded = open_checkpoint(bench.path(subject)).read(f"{_TALL}.weight_scale")

    def refilled(rows: int) -> None:
        host_view(layer.weight_scale)[:rows] = loaded[:rows]
        value = swizzled(layer.weight_scale)
        alias_or_bind_derived_param(layer, "weight_scale", "weight_scale_interleaved", value)

    def problem() -> str | None:
        wrong = [name for name, digest in _state(backend, model).items() if before[name] != digest]
        return f"{wrong[0]} is another" if wrong else None

    derive(model)
    if found := problem():
        return [f"derived twice, {found}"]
    for rows in (40, 128, 300):
        try:
            refilled(rows)
        except RuntimeError:
            continue
        return [f"{rows} rows are loaded, and the others are derived from derived bytes"]
    try:
        refilled(len(loaded))
    except RuntimeError as error:
        return [f"all rows are loaded, and yet: {error}"]
    found = problem()
    return [] if found is None else [f"after a whole load, {found}"]


def nvfp4_memory(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Bytes that stay after load, a run and a reload, against the checkpoint's."""
    owed = sum(info.num_bytes for info in open_checkpoint(bench.path(subject)).tensors.values())
    options = SWIZZLING if subject is ALIGNED else {}
    rows = bench.once(("rows", subject), lambda: rows_for(open_checkpoint(bench.path(subject))))
    before = _live_bytes(backend)
    model = load_quantised(bench, subject, backend, **options)
    for when in ("after load", "after a reload"):
        each_layer(bench, model, backend, output, rows)
        resident = _live_bytes(backend) - before
        if resident > RESIDENT * owed:
            return [f"{when}, {resident / owed:.2f} x the checkpoint's bytes are resident, at most {RESIDENT} may be"]
        model = model.update_weights_from_disk(bench.path(subject, 1))
    return []


def _state(backend: str, model: Any) -> dict[str, str]:
    """Digest of every tensor there is, derived ones too."""
    if backend == "jax":
        from jax_models.weights import flatten

        return {name: tensor_digest(np.asarray(array)) for name, array in flatten(model.weights).items()}
    from torch_models.storage import host_view

    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tensor_digest(host_view(tensor)) for name, tensor in tensors}


def _addresses(backend: str, model: Any) -> Any:
    return import_module("torch_models.census").pointer_census(model) if backend == "torch" else None


def _live_bytes(backend: str) -> int:
    gc.collect()
    if backend == "jax":
        import jax

        return sum(array.nbytes for array in jax.live_arrays())
    import torch

    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    storages = [one.untyped_storage() for one in tensors if one.device.type == "cpu" and one.layout is torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
