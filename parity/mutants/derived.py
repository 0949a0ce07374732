"""Mutants of derived tensors' storage: both helpers on modules that know nothing of them, and a reload's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from loaders import open_checkpoint
from parity.lifecycle.staged_memory import counted, largest_layer
from parity.mutants import Mutant, Patch
from parity.mutants.bench import Bench, Subject
from parity.mutants.nvfp4_bench import ALIGNED
from parity.mutants.plants import BOTH, of, wrapped
from parity.zoo import ZooQuantization, block_sizes

_SIZES = {**block_sizes("qwen3-moe", aligned=True), "num_hidden_layers": 5, "mlp_only_layers": ()}
# experts of all layers lie one behind the other in its file
DEEP_EXPERTS = Subject("qwen3-moe", (*_SIZES.items(), ("quantization", ZooQuantization(unify=False))))


def derived_helpers(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Every order of events that storage has to survive; the first thing that goes wrong."""
    for scenario in (_partial, _shared, _bound_in_inference_mode, _transposed, _of_the_caller, _other_form):
        finding = next(scenario(import_module("torch_models.derived")), None)
        if finding is not None:
            return [finding]
    return []


def reload_memory(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """What a reload holds beside the weights that are there."""
    first, second = bench.path(subject), bench.path(subject, 1)
    with counted() as memory:
        model = import_module(f"{backend}_models").load(first)
        before = memory.start()
        model.update_weights_from_disk(second, **({"donate": True} if backend == "jax" else {}))
        ratio = (memory.most - before) / largest_layer(open_checkpoint(second))
    return (
        [] if ratio <= 1 else [f"a reload holds {ratio:.2f} x the largest layer beside the weights, at most 1 may be"]
    )


def _layer(*values: float, shape: tuple[int, ...] = (-1,)) -> Any:
    import torch

    module = torch.nn.Module()
    module.source = torch.nn.Parameter(torch.tensor(values).view(shape), requires_grad=False)
    return module


def _is_refused(derive: Callable[[], None]) -> bool:
    try:
        derive()
    except RuntimeError:
        return True
    return False


def _partial(derived: Any) -> Iterator[str]:
    """Rows, and columns, of a source of one tile."""
    for part in ((slice(0, 40), slice(None)), (slice(None), slice(0, 3))):
        module = _layer(*map(float, range(1, 513)), shape=(64, 8))
        derived.alias_or_bind_derived_param(module, "source", "derived", module.source.flip(0) * 2)
        module.source.data[part] = -1.0
        again = module.source.flip(0) * 2
        if not _is_refused(lambda m=module, v=again: derived.alias_or_bind_derived_param(m, "source", "derived", v)):
            yield "a part of a tile was loaded, and the rest is derived from derived bytes"


def _shared(derived: Any) -> Iterator[str]:
    first, second = _layer(1.0, 2.0, 3.0), _layer(0.0)
    second.source = first.source
    derived.alias_or_bind_derived_param(first, "source", "derived", first.source * 2)
    again = second.source * 2
    if not _is_refused(lambda: derived.alias_or_bind_derived_param(second, "source", "derived", again)):
        yield "two modules share a source, and it is derived once by each"


def _bound_in_inference_mode(derived: Any) -> Iterator[str]:
    import torch

    module = _layer(1.0, 2.0)
    with torch.inference_mode():
        derived.copy_or_rebind_param(module, "alpha", module.source.sum())
    if module.alpha.is_inference():
        yield "what is bound in inference mode can never be written again by anybody else"


def _transposed(derived: Any) -> Iterator[str]:
    module, addresses = _layer(*map(float, range(8)), shape=(2, 4)), set()
    for _ in range(2):
        derived.copy_or_rebind_param(module, "turned", module.source.t())
        addresses.add(module.turned.data_ptr())
    if len(addresses) > 1:
        yield "a derived tensor moves whenever its value is not contiguous"


def _of_the_caller(derived: Any) -> Iterator[str]:
    module, child = _layer(0.0), _layer(1.0, 2.0)
    derived.copy_or_rebind_param(module, "merged", child.source)
    module.merged.zero_()
    if child.source.tolist() != [1.0, 2.0]:
        yield "what is bound is another module's, and written over there"


def _other_form(derived: Any) -> Iterator[str]:
    module = _layer(1.0, 2.0)
    derived.alias_or_bind_derived_param(module, "source", "derived", module.source * 2)
    derived.copy_or_rebind_param(module, "derived", module.source.new_ones(5))
    if module.source.shape != (2,):
        yield "a derived tensor of another shape takes its source along"


def _coarse(original: Any, tensor: Any) -> Any:
    flat = tensor.detach().contiguous().view(-1).view(import_module("torch").uint8)
    return (import_module("torch_models.aliased_storage")._hashed(flat, max(1, len(flat))),)


def _per_module(original: Any, module: Any, name: str) -> Any:
    lodgings = vars(module).get("_lodgings")
    return None if lodgings is None else lodgings.of_source.get(name, (None, None))[1]


def _in_the_callers_mode() -> list[Patch]:
    return [Patch("derived:copy_or_rebind_param", lambda original, backend: original.__wrapped__)]


def _strides_kept() -> list[Patch]:
    return [
        *wrapped("derived:_fits", lambda fits, held, value: held.is_contiguous() and fits(held, value))(),
        *wrapped("derived:_owned", lambda owned, value: value.clone())(),
    ]


def _taken_along(original: Any, module: Any, held: Any) -> list[str]:
    return [next(name for name, param in module._parameters.items() if param is held)]


def _all_at_once(original: Any, plan: Any, into: Any) -> Any:
    return plan.checkpoint.stream(names=plan.tensors, into=into)


def _of(name: str, source: str, plant: Callable[[], Any], says: str, subject: Subject = ALIGNED, **more: Any) -> Mutant:
    given: dict[str, Any] = {"detector": derived_helpers} | more
    return of("reload", f"derived_{name}", source, plant, says, subject, **given)


DERIVED: list[Mutant] = [
    _of(
        "part_of_a_tile",
        "law 4",
        wrapped("aliased_storage:_hashes", _coarse),
        "any byte that changes counts as a whole load",
    ),
    _of(
        "per_module",
        "law 10",
        wrapped("aliased_storage:lodger_of", _per_module),
        "each of two modules derives what they share",
    ),
    _of("in_inference_mode", "law 5", _in_the_callers_mode, "bound in the mode of whoever calls"),
    _of("moves_with_strides", "law 5", _strides_kept, "a transposed value moves the pointer at every update"),
    _of("of_the_caller", "law 5", wrapped("derived:_owned", lambda owned, value: value), "bound without a copy"),
    _of("source_taken_along", "law 4", wrapped("derived:_names_of", _taken_along), "the source gets the derived form"),
    _of(
        "all_begun_at_once",
        "issue 4",
        wrapped("loaders.reading.whole:stream_parameters", _all_at_once),
        "a reload reads in the order of the file, and holds all parameters that it began",
        DEEP_EXPERTS,
        detector=reload_memory,
        backends=BOTH,
    ),
]
