"""Decoding as captured graphs: static tensors, one program for each bucket of rows and capacity, replayed.

On CUDA a real graph; elsewhere a recorded replay (``torch_models.recording``), which is stale exactly where a graph
would be. It runs as fast as eager code, but for experts: what is captured cannot ask which were hit, as eager code on a
CPU does (``torch_models.capturing``).

    logits_BV, batch = model.graphs.prefill(input_ids, max_new_tokens=64)
    logits_BV = batch.decode(logits_BV.argmax(-1))
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from loaders.adapters.roster import AdapterOfRows
from loaders.host.inputs import bucket
from loaders.host.sampling import check_room
from torch_models import adapters as lora
from torch_models.cache import Cache
from torch_models.capturing import capturing
from torch_models.census import Watch
from torch_models.one_version import of_one_version
from torch_models.precision import in_own_precision
from torch_models.recording import Recording

if TYPE_CHECKING:
    from torch_models.model import Model

WARM_UPS = 2  # libraries choose kernels and take their workspaces before the capture
_FEW = (1, 2, 4, 8, 12)
_STEPS = ((256, 8), (512, 16))  # up to so many rows, buckets so far apart; beyond them 32
_NAMED = 5  # moved tensors that an error lists


def row_bucket(rows: int) -> int:
    """Rows of the graph that serves ``rows``: 1, 2, 4, 8, 12, 16, 24, ... 256, 272, ... 512, 544, ..."""
    few = next((size for size in _FEW if rows <= size), None)
    step = next((step for most, step in _STEPS if rows <= most), 32)
    return few or -(-rows // step) * step


class _Replayable(Protocol):
    def replay(self) -> None: ...


class DecodeGraph:
    """One captured decode step, and the tensors it reads and writes. They live as long as it does, and never move.

    Attributes:
        rows: of the batch, padding included.
        capacity: slots of the cache.
        cache: keys, values and states; padded rows have no real token in it.
        token_ids: int64 [B, 1], of the next step.
        logits: float32 [B, V], of the last one.
        refusal: why it must not replay any more; None while it may.
        takes: how many batches have used it.
    """

    def __init__(self, model: Model, rows: int, capacity: int, pool: Any) -> None:
        self.rows, self.capacity = rows, capacity
        self.refusal: str | None = None
        self.takes = 0
        with torch.inference_mode(False):
            self.cache = model.empty_cache(rows, capacity)
            self.token_ids = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
            self.logits = torch.zeros(rows, model.config.vocab_size, dtype=torch.float32, device=model.device)
        self.program, self._outside = self._capture(model, pool)
        own = {"cache": self.cache, "token_ids": self.token_ids, "logits": self.logits}
        self.watches = (Watch(model), Watch(own, f"graph {rows}x{capacity}"))

    def moved(self, *, also_new: bool = False) -> list[str]:
        """Names of the tensors that are not where they were at the capture."""
        return [name for watch in self.watches for name in (watch.moved_or_new() if also_new else watch.moved())]

    def check(self, *, also_new: bool = False) -> None:
        """Raises RuntimeError if a replay would compute something else than the model."""
        if self.refusal is not None:
            raise RuntimeError(f"the graph of {self.rows} rows and {self.capacity} slots is gone: {self.refusal}.")
        names = self.moved(also_new=also_new)
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            raise RuntimeError(
                f"the graph of {self.rows} rows and {self.capacity} slots must not replay: {len(names)} tensors are not"
                f" where they were when it was captured: {', '.join(names[:_NAMED])}{more}. Write tensors in place, or"
                f" capture again after model.graphs.drop()."
            )

    def give_up(self, reason: str) -> None:
        """Let go of all memory; never replay again."""
        self.refusal = reason
        self.watches, self._outside = (), []
        del self.program, self.cache, self.token_ids, self.logits

    def _capture(self, model: Model, pool: Any) -> tuple[_Replayable, list[torch.Tensor]]:
        def step() -> None:
            self.logits.copy_(model.decode_step(self.token_ids, self.cache))

        with torch.inference_mode(False), torch.no_grad(), capturing():
            step()  # constants are made at their first use, outside of any graph
            self.cache.reset()
            recording = Recording(step)
            self.cache.reset()
            program = recording if model.device.type != "cuda" else _capture_cuda(step, self.cache, model.device, pool)
        # also what a graph reads must live as long as it: whoever rebinds a tensor gets stale values, never a crash
        return program, recording.outside


def _capture_cuda(step: Callable[[], None], cache: Cache, device: torch.device, pool: Any) -> _Replayable:
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
                cache.reset()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side):
            step()
    cache.reset()
    return graph


class Batch:
    """Rows that decode through a graph, from one prefill to the next that takes the same graph."""

    def __init__(self, model: Model, graph: DecodeGraph, rows: int) -> None:
        self._model, self._graph, self._take = model, graph, graph.takes
        self.rows = rows

    @of_one_version
    @in_own_precision
    def decode(self, token_ids: Any) -> torch.Tensor:
        """Append one token a row: logits, float32 [B, V], of the real rows.

        Raises:
            RuntimeError: a replay would compute something else: tensors moved, the graph was dropped or the model put
                to sleep since, a later prefill took its cache, or the weights are a mixture.
            ValueError: the cache was computed with other weights, is full, or has other rows.
        """
        graph = self._graph
        graph.check()  # nothing moved, so nothing sleeps
        self._model.check_refusal()
        if graph.takes != self._take:
            raise RuntimeError("a later prefill took the graph and its cache. One batch at a time, or graphs=False.")
        ids_B1 = self._model.next_ids(token_ids, graph.cache, rows=self.rows)
        with torch.inference_mode(False), torch.no_grad():
            with graph.cache.written():
                graph.token_ids.zero_()[: self.rows].copy_(self._model.long(ids_B1))
                graph.program.replay()
                graph.cache.length += 1
            return graph.logits[: self.rows].clone()


class KeptGraphs:
    """What a model keeps of its graphs. A copy of the model has none: they are of the memory of one."""

    is_outside_census = True  # each graph watches its own

    def __init__(self) -> None:
        self.graphs: dict[tuple[int, int], DecodeGraph] = {}
        self.pool: Any = None
        self.num_captures = 0

    def __reduce__(self) -> tuple[type[KeptGraphs], tuple[()]]:
        return KeptGraphs, ()


class DecodeGraphs:
    """The graphs of a model, by rows and capacity; captured when first needed, kept until dropped.

    They share one memory pool on CUDA, so one replay must end before the next begins, as on one stream it does. Each
    has a cache of its own: ``drop`` what is no longer used. Weights may change in place as often as they like.
    """

    def __init__(self, model: Model, kept: KeptGraphs) -> None:
        self._model, self._kept = model, kept

    def __len__(self) -> int:
        return len(self._kept.graphs)

    def __getitem__(self, key: tuple[int, int]) -> DecodeGraph:
        return self._kept.graphs[key]

    @property
    def num_captures(self) -> int:
        """Since the model was loaded."""
        return self._kept.num_captures

    def __delitem__(self, key: tuple[int, int]) -> None:
        self.drop(*key)

    def capture(self, rows: int | Iterable[int], capacity: int) -> list[DecodeGraph]:
        """Make ready for batches of ``rows`` (several: the largest first, whose memory the others use again).

        Args:
            rows: rounded up to a bucket, see ``row_bucket``.
            capacity: slots, prompt and new tokens; rounded up, see ``loaders.host.inputs.bucket``.
        Raises:
            CannotCapture: the model's step does what no graph can.
            ValueError: rows or capacity below 1, or a pipeline stage.
        """
        self._model.check_alone("captured graphs")
        sizes = [rows] if isinstance(rows, int) else list(rows)
        if capacity < 1 or not sizes or min(sizes) < 1:
            raise ValueError(f"rows={sizes}, capacity={capacity}, expected at least 1 of each")
        wanted = sorted({row_bucket(size) for size in sizes}, reverse=True)
        return [self._ready(size, bucket(capacity)) for size in wanted]

    @of_one_version
    @in_own_precision
    def prefill(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 16,
        adapter: AdapterOfRows = None,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, Batch]:
        """As ``Model.prefill``, into the cache of a graph: logits, float32 [B, V], and the batch to decode with."""
        model = self._model
        prompt = model.checked_prompt(input_ids, attention_mask, **multimodal)
        check_room(max_new_tokens)
        rows, length = prompt.input_ids.shape
        slot_B = lora.slots_of(model, adapter, rows)
        (graph,) = self.capture(rows, length + max_new_tokens)
        graph.check(also_new=True)
        graph.takes += 1
        graph.cache.reset()
        graph.cache.version, graph.cache.stamp = model.version, model.weights_stamp()
        graph.cache.adapter[:rows].copy_(slot_B)
        logits_BV = model.prefill_into(prompt, graph.cache.first_rows(rows))
        return logits_BV, Batch(model, graph, rows)

    def drop(self, rows: int | None = None, capacity: int | None = None, *, reason: str = "it was dropped") -> None:
        """Free graphs and their caches, all or those of some rows or capacity. A batch that used one is refused."""
        for key in list(self._kept.graphs):
            if rows in (None, key[0]) and capacity in (None, key[1]):
                self._kept.graphs.pop(key).give_up(reason)

    def _ready(self, rows: int, capacity: int) -> DecodeGraph:
        kept = self._kept
        if (rows, capacity) not in kept.graphs:
            self._model.check_runnable()
            self._model.check_whole()
            if not kept.num_captures:  # graphs hold weights: when the model goes, they go
                weakref.finalize(self._model, kept.graphs.clear).atexit = False
            if kept.pool is None and self._model.device.type == "cuda":
                kept.pool = torch.cuda.graph_pool_handle()
            kept.graphs[rows, capacity] = DecodeGraph(self._model, rows, capacity, kept.pool)
            kept.num_captures += 1
        return kept.graphs[rows, capacity]
