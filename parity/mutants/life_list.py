"""Mutants of the life of a weight: load, swap, reload, caches, export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from loaders import open_checkpoint
from loaders.events import Event
from loaders.writing.export import export_checkpoint
from parity.mutants import Mutant, Patch
from parity.mutants.bench import Subject
from parity.mutants.life import life
from parity.mutants.plants import BOTH, DENSE, TIED, Instead, wrapped

Pairs = Iterable[tuple[str, Any]]
_SKIPPED = "model.layers.1.self_attn.v_proj.weight"
_UPDATE = "weights:update_weights_from_disk"
_JAX = ("jax",)


def _skip_in_place(commit: Any, model: Any, values: Pairs, names: list[str], *staging: Any) -> None:
    commit(model, ((name, value) for name, value in values if name != _SKIPPED), names, *staging)


def _skip_in_tree(published: Any, self: Any, weights: Any, kind: str, *args: Any, **kwargs: Any) -> Any:
    from flax import traverse_util

    if kind == "reload":
        old, new = (traverse_util.flatten_dict(tree, sep=".") for tree in (self.weights, weights))
        weights = traverse_util.unflatten_dict(new | {_SKIPPED: old[_SKIPPED]}, sep=".")
    return published(self, weights, kind, *args, **kwargs)


def _copy_only(commit: Any, model: Any, values: Pairs, names: list[str], *staging: Any) -> None:
    for name, value in values:
        model.get_parameter(name).data.copy_(value)


def _rebind(commit: Any, model: Any, values: Pairs, names: list[str], *staging: Any) -> None:
    for name, value in values:
        model.get_parameter(name).data = value


def _forgiving(commit: Any, model: Any, values: Pairs, names: list[str], *staging: Any) -> None:
    try:
        commit(model, values, names, *staging)
    except RuntimeError:
        model.refusal = None
        raise


def _write_as_it_reads(update: Any, model: Any, uri: Any, **options: Any) -> Any:
    from torch_models.storage import NAMES, host_view

    plan_module = import_module("loaders.reading.plan")
    live = {name: NAMES[param.dtype] for name, param in model.named_parameters()}
    plan = plan_module.plan_reload(open_checkpoint(uri), model.config, model.stage, live)
    for tensor, array in plan.checkpoint.stream(names=plan.tensors):
        spec, placement = plan.targets[tensor]
        host_view(model.get_parameter(spec.name))[placement.index] = array
    model.checkpoint = plan.checkpoint
    model.publish(Event("reload", model.version + 1, str(uri)))
    return model


def _publish_first(update: Any, model: Any, uri: Any, **options: Any) -> Any:
    model.publish(Event("reload", model.version + 1, str(uri)))
    return update(model, uri, **options)


def _lenient(plan_reload: Any, checkpoint: Any, config: Any, stage: Any, live: Any) -> Any:
    plan = import_module("loaders.reading.plan")._match(checkpoint, config, stage)[0]
    held = {spec.name for spec, _ in plan.targets.values()}  # whoever counts what arrived would miss the others
    params = tuple(spec for spec in plan.specs.params if spec.name in held)
    return dataclasses.replace(plan, specs=dataclasses.replace(plan.specs, params=params))


def _old_files(update: Any, model: Any, uri: Any, **options: Any) -> Any:
    old = str(model.checkpoint.source)
    return update(update(model, uri, **options), old, **options)


def _other_programs(update: Any, model: Any, uri: Any, **options: Any) -> Any:
    from jax_models.programs import Programs

    updated = update(model, uri, **options)
    return dataclasses.replace(updated, programs=Programs(updated.config, updated.stage, updated.dtype, None))


def _old_deleted(update: Any, model: Any, uri: Any, **options: Any) -> Any:
    import jax

    updated = update(model, uri, **options)
    for leaf in jax.tree.leaves(model.weights):
        leaf.delete()
    return updated


def _head_into_embedding(swap: Any, model: Any, embed: Any = None, head: Any = None) -> Any:
    return swap(model, embed if head is None else head, head)


def _head_left_alone(swap: Any, model: Any, embed: Any = None, head: Any = None) -> Any:
    return swap(model, embed)


def _own_head(head: Any, self: Any, x: Any) -> Any:
    if not hasattr(self, "own_head"):
        self.own_head = self.lm_head.weight.detach().clone()
    return import_module(type(self.lm_head).__module__).project(x, self.own_head)


def _constants() -> list[Patch]:
    """The first weights a program saw are the ones it computes with for ever."""

    def make(original: Any, backend: str) -> Any:
        def build(self: Any, *args: Any) -> None:
            original(self, *args)
            for name in ("forward", "forward_with_taps", "prefill", "decode"):
                setattr(self, name, _Frozen(getattr(self, name)))

        return build

    return [Patch("programs:Programs.__init__", make)]


class _Frozen:
    def __init__(self, run: Any) -> None:
        self.run, self.weights = run, None

    def __call__(self, weights: Any, *args: Any, **kwargs: Any) -> Any:
        self.weights = self.weights or weights
        return self.run(self.weights, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run, name)


def any_version(decode: Any, self: Any, token_ids: Any, cache: Any) -> Any:
    if hasattr(cache, "arrays"):  # the frozen one of JAX
        return decode(self, token_ids, dataclasses.replace(cache, version=self.version, weights_id=self.weights_id))
    cache.stamp = self.weights_stamp()
    return decode(self, token_ids, cache)


def _same_version(publish: Any, self: Any, event: Event) -> None:
    publish(self, event if event.kind != "reload" else dataclasses.replace(event, version=self.version))


def _first_answer() -> list[Patch]:
    known: list[dict[str, str]] = []

    def make(original: Any, backend: str) -> Any:
        def digests(model: Any) -> dict[str, str]:
            if not known:
                known.append(original(model))
            return known[0]

        return digests

    return [Patch("weights:weight_digests", make)]


def _from_files(export: Any, model: Any, directory: Any) -> Any:
    return export_checkpoint(directory, model.checkpoint, model.specs, model.checkpoint.read)


def _aliasing(original: Any, backend: str) -> Any:
    return Instead(original, array=original.asarray)


def _any_id(loader: Any, param: Any, weight: Any, *lost: Any, **ids: Any) -> None:
    loader(param, weight, **ids) if not lost else None


def _of(name: str, source: str, plant: Callable[[], Any], says: str, subject: Subject = DENSE, **more: Any) -> Mutant:
    return Mutant(name, "reload", says, source, plant, subject, life, **more)


LIFE: list[Mutant] = [
    _of(
        "reload_skips_a_tensor",
        "parity 63",
        wrapped("weights:_commit", _skip_in_place),
        "a reload leaves one tensor as it was",
    ),
    _of(
        "reload_skips_a_leaf",
        "parity 63",
        wrapped("model:Model.published", _skip_in_tree),
        "a reload keeps one old leaf",
        backends=_JAX,
    ),
    _of(
        "reload_unverified",
        "law 6",
        wrapped("weights:_commit", _copy_only),
        "a reload is published without being verified",
    ),
    _of(
        "reload_publishes_first",
        "law 6",
        wrapped(_UPDATE, _publish_first),
        "a reload is published before it is checked",
    ),
    _of(
        "reload_writes_as_it_reads",
        "law 6",
        wrapped(_UPDATE, _write_as_it_reads),
        "a reload writes live weights while it still reads",
    ),
    _of("mixture_serves", "law 6", wrapped("weights:_commit", _forgiving), "a model runs on after half an update"),
    _of(
        "reload_rebinds",
        "parity 65",
        wrapped("weights:_commit", _rebind),
        "a reload rebinds storage and does not copy into it",
    ),
    _of(
        "renamed_tensor_swallowed",
        "parity 41",
        wrapped("weights:plan_reload", _lenient),
        "a reload is not strict: what is not found stays old",
    ),
    _of(
        "reload_reads_old_files",
        "law 6",
        wrapped(_UPDATE, _old_files),
        "a reload reads the checkpoint it was loaded from",
        backends=BOTH,
    ),
    _of(
        "weights_as_constants",
        "parity 71",
        _constants,
        "weights are constants of the programs, so a reload is a no-op",
        backends=_JAX,
    ),
    _of(
        "reload_recompiles",
        "law 5",
        wrapped(_UPDATE, _other_programs),
        "every reload compiles its programs again",
        backends=_JAX,
    ),
    _of(
        "old_version_deleted",
        "parity 71",
        wrapped(_UPDATE, _old_deleted),
        "a reload donates buffers that the old version still uses",
        backends=_JAX,
    ),
    _of(
        "stale_cache_taken",
        "parity 19",
        wrapped("decoding:Decoding.decode", any_version),
        "keys and values of the old weights are taken",
        backends=BOTH,
    ),
    _of(
        "version_not_counted",
        "parity 69",
        wrapped("model:Model.publish", _same_version),
        "a reload keeps its version, so that caches stay valid",
    ),
    _of(
        "head_swapped_into_embedding",
        "law 1",
        wrapped("swap:set_embed_and_head", _head_into_embedding),
        "a swap writes the head into the embedding",
        backends=BOTH,
    ),
    _of(
        "head_not_swapped",
        "law 1",
        wrapped("swap:set_embed_and_head", _head_left_alone),
        "a swap leaves the head alone",
        backends=BOTH,
    ),
    _of(
        "swap_aliases_the_caller",
        "law 5",
        lambda: [Patch("swap:np", _aliasing)],
        "a swap shares the caller's buffer, which the caller goes on using",
        backends=_JAX,
    ),
    _of(
        "tied_head_copied",
        "law 10",
        wrapped("qwen3:Qwen3ForCausalLM.head", _own_head),
        "a tied head is a copy and stays behind at a swap",
        TIED,
    ),
    _of(
        "export_writes_old_files",
        "law 6",
        wrapped("weights:export", _from_files),
        "an export repeats the files, not what is live",
        backends=BOTH,
    ),
    _of("digests_remembered", "law 6", _first_answer, "digests are computed once and remembered", backends=BOTH),
    _of(
        "positional_ids_lost",
        "law 3",
        wrapped("loaders.reading.filling:weight_loader", _any_id),
        "a shard_id given by position is swallowed",
    ),
]
