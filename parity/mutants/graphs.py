"""Mutants of captured graphs, of the census that guards them, and of sleep. Torch alone has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parity.mutants import Mutant, Patch
from parity.mutants.bench import Subject
from parity.mutants.plants import HYBRID, of, wrapped
from parity.mutants.replay import replay


def _other_input(decode: Any, self: Any, token_ids: Any) -> Any:
    graph = self._graph
    captured, graph.token_ids = graph.token_ids, graph.token_ids.clone()
    try:
        return decode(self, token_ids)
    finally:
        graph.token_ids = captured


def _any_batch(decode: Any, self: Any, token_ids: Any) -> Any:
    self._take = self._graph.takes
    return decode(self, token_ids)


def _restamped(decode: Any, self: Any, token_ids: Any) -> Any:
    self._graph.cache.stamp = self._model.weights_stamp()
    return decode(self, token_ids)


def _last_rows(first_rows: Any, self: Any, rows: int) -> Any:
    turned = {name: {key: part.flip(0) for key, part in parts.items()} for name, parts in self.layers.items()}
    found = first_rows(self, rows)
    for name, parts in found.layers.items():
        for key in parts:
            parts[key] = self.layers[name][key][len(turned[name][key]) - rows :]
    return found


def _kept_asleep(drop: Any, self: Any, *args: Any, reason: str = "", **options: Any) -> None:
    if "sleep" not in reason:
        drop(self, *args, **options)


def _anew(update: Any, model: Any, uri: Any, **options: Any) -> Any:
    updated = update(model, uri, **options)
    model.graphs.drop()
    return updated


def _nothing(original: Any, *args: Any, **options: Any) -> Any:
    return iter(())


def _of(name: str, plant: Callable[[], Any], says: str, subject: Subject = HYBRID, **more: Any) -> Mutant:
    more = {"source": "issue graphs"} | more
    return of("graphs", name, more.pop("source"), plant, says, subject, detector=replay, **more)


GRAPH_MUTANTS: list[Mutant] = [
    _of(
        "replay_unchecked",
        lambda: [Patch("graphs:DecodeGraph.check", lambda check, backend: lambda self, **options: None)],
        "a replay reads storage that was rebound",
        source="parity 65",
    ),
    _of(
        "static_input_not_copied",
        wrapped("graphs:Batch.decode", _other_input),
        "the next token is not written where the graph reads it",
        source="parity 67",
    ),
    _of(
        "graph_cache_not_emptied",
        lambda: [Patch("cache:Cache.reset", lambda reset, backend: lambda self: None)],
        "a batch sees what the one before left in the graph's cache",
        source="parity 68",
    ),
    _of(
        "padded_rows_exchanged",
        wrapped("cache:Cache.first_rows", _last_rows),
        "a prompt's states land in padded rows",
        source="parity 68",
    ),
    _of("old_batch_goes_on", wrapped("graphs:Batch.decode", _any_batch), "a batch decodes in a later one's cache"),
    _of(
        "graph_takes_stale_state",
        wrapped("graphs:Batch.decode", _restamped),
        "a graph goes on from a state of old weights",
        source="parity 69",
    ),
    _of("graphs_kept_asleep", wrapped("graphs:DecodeGraphs.drop", _kept_asleep), "sleep keeps captured graphs"),
    _of(
        "reload_captures_anew",
        wrapped("weights:update_weights_from_disk", _anew),
        "every reload captures its graphs again",
        source="law 5",
    ),
    _of(
        "census_of_modules_alone",
        wrapped("census:_Walk._children", _nothing),
        "the census does not see tensors that attributes hold",
        source="vllm 48941",
    ),
    _of(
        "census_without_closures",
        wrapped("census:_of_function", _nothing),
        "the census does not see tensors that closures hold",
        source="vllm 48941",
    ),
    _of(
        "watch_of_first_sight",
        lambda: [Patch("census:Watch.moved", lambda moved, backend: lambda self: [])],
        "what moved after the capture is not looked for",
        source="parity 65",
    ),
]
