"""Decoding through graphs, on the CPU by recorded replay: the same bits as eager code, stale where a graph would be.

The same on CUDA, with real graphs: tests/models/test_gpu.py.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch
from padded_prompt import IDS, MASK, STEPS, T

import torch_models
from parity.zoo import ZOO, make_checkpoint
from torch_models.cache import Cache
from torch_models.capturing import capturing
from torch_models.graphs import DecodeGraphs, row_bucket
from torch_models.recording import CannotCapture
from torch_models.storage import same_bits


def eager_twin(model: torch_models.Model, rows: int, capacity: int, ids=IDS, mask=MASK) -> tuple[torch.Tensor, Cache]:
    """Prefill as graphs do it, into the first rows of a cache of the bucket's size."""
    cache = model.empty_cache(rows, capacity)
    prompt = model.checked_prompt(ids, mask)
    logits_BV = model.prefill_into(prompt, cache.first_rows(len(ids)))
    return logits_BV, cache


def assert_replay_is_eager(model: torch_models.Model, steps: int = STEPS) -> None:
    """Every step's logits, bit for bit, on the same padded bucket."""
    rows, capacity = row_bucket(len(IDS)), 16
    got_BV, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=capacity - T)
    want_BV, cache = eager_twin(model, rows, capacity)
    assert same_bits(got_BV, want_BV)
    for step in range(steps):
        token_B = want_BV.argmax(-1)
        got_BV = batch.decode(token_B)
        with capturing():  # which goes another way through experts than a CPU may otherwise
            want_BV = model.decode(torch.nn.functional.pad(token_B, (0, rows - len(IDS))), cache)[0][: len(IDS)]
        assert same_bits(got_BV, want_BV), step


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 12), (13, 16), (17, 24), (250, 256)])
def test_rows_are_padded_to_buckets(rows: int, bucket: int) -> None:
    assert row_bucket(rows) == row_bucket(bucket) == bucket


def test_buckets_widen_with_the_batch() -> None:
    buckets = sorted({row_bucket(rows) for rows in range(1, 600)})
    assert buckets[:8] == [1, 2, 4, 8, 12, 16, 24, 32]
    assert buckets[-6:] == [480, 496, 512, 544, 576, 608]


# replay is eager


@pytest.mark.parametrize("name", ZOO)
def test_a_replay_gives_the_bits_of_eager_code(name: str, tmp_path: Path) -> None:
    assert_replay_is_eager(torch_models.load(make_checkpoint(name, tmp_path / "a")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_so_it_does_in_either_dtype_whatever_is_stored(dtype: str, tmp_path: Path) -> None:
    for name in ("qwen3", "qwen3-moe"):
        path = make_checkpoint(name, tmp_path / name, dtype="BF16", num_hidden_layers=2)
        assert_replay_is_eager(torch_models.load(path, dtype=dtype))


def test_a_rope_that_grows_with_the_length_is_captured(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 50000.0, "factor": 2.0}
    options = {"max_position_embeddings": 11, "rope_parameters": rope}  # decoding crosses the longest length
    assert_replay_is_eager(torch_models.load(make_checkpoint("qwen3", tmp_path / "a", num_hidden_layers=1, **options)))


@pytest.mark.parametrize("experts", [2, 6, 40])
def test_experts_are_captured_however_few_or_many(experts: int, tmp_path: Path) -> None:
    options = {"num_experts": experts, "num_hidden_layers": 2}
    assert_replay_is_eager(torch_models.load(make_checkpoint("qwen3-moe", tmp_path / "a", **options)))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 4}, {"temperature": 0.9, "top_k": 5}])
def test_generation_gives_the_same_tokens_and_captures_once(model: torch_models.Model, options: dict) -> None:
    want = model.generate(IDS, MASK, STEPS, ignore_eos=True, **options)
    for _ in range(2):
        assert torch.equal(model.generate(IDS, MASK, STEPS, ignore_eos=True, graphs=True, **options), want)
    assert model.graphs.num_captures == len(model.graphs) == 1
    model.generate(IDS[:2], MASK[:2], STEPS, graphs=True)
    model.generate(IDS, MASK, 40, graphs=True)
    assert model.graphs.num_captures == 3


def test_inference_mode_of_the_caller_changes_nothing(model: torch_models.Model) -> None:
    want = model.generate(IDS, MASK, STEPS, ignore_eos=True)
    with torch.inference_mode():
        assert torch.equal(model.generate(IDS, MASK, STEPS, ignore_eos=True, graphs=True), want)
    assert torch.equal(model.generate(IDS, MASK, STEPS, ignore_eos=True, graphs=True), want)
    model.update_weights_from_disk(model.checkpoint.source.path)


def test_several_buckets_are_captured_largest_first(model: torch_models.Model) -> None:
    graphs = model.graphs.capture((1, 3, 8), 20)
    assert [(graph.rows, graph.capacity) for graph in graphs] == [(8, 32), (4, 32), (1, 32)]
    with pytest.raises(ValueError, match=r"rows=\[0\], capacity=20, expected at least 1"):
        model.graphs.capture(0, 20)


# padding


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe", "qwen3_5", "qwen3_5-moe"])
def test_padded_rows_do_not_leak_whatever_they_hold(name: str, tmp_path: Path) -> None:
    model = torch_models.load(make_checkpoint(name, tmp_path / "a", num_hidden_layers=4))
    seen = []
    for is_poisoned in (False, True):
        logits_BV, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)
        graph = model.graphs[4, 16]
        rows = [logits_BV]
        for _ in range(STEPS):
            if is_poisoned:
                for part in (part for parts in graph.cache.layers.values() for part in parts.values()):
                    part[3:] = float("nan")
                graph.cache.key_mask[3:] = True
                graph.cache.position[3:] = 7
                graph.token_ids[3:] = 13
            rows.append(batch.decode(rows[-1].argmax(-1)))
        assert all(torch.isfinite(logits).all() for logits in rows)
        seen.append(torch.stack(rows))
    assert same_bits(*seen)


def test_what_an_earlier_batch_left_in_the_cache_is_gone(model: torch_models.Model) -> None:
    want = model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)[1].decode([1, 2, 3])
    for part in (part for parts in model.graphs[4, 16].cache.layers.values() for part in parts.values()):
        part.fill_(float("nan"))  # under a mask still not nothing: 0 times NaN is NaN
    assert same_bits(model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)[1].decode([1, 2, 3]), want)


# what is refused


def test_a_rebound_parameter_gives_stale_logits_and_is_named(model: torch_models.Model) -> None:
    _, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)
    graph, norm = model.graphs[4, 16], model.model.norm
    saved = {key: part.clone() for key, part in graph.cache.layers["1"].items()}
    fresh = batch.decode([1, 2, 3])

    def again() -> torch.Tensor:
        """The same step, unchecked."""
        for key, part in saved.items():
            graph.cache.layers["1"][key].copy_(part)
        graph.cache.slot -= 1
        graph.cache.position -= 1
        graph.program.replay()
        return graph.logits[:3].clone()

    assert same_bits(again(), fresh)
    norm.weight = torch.nn.Parameter(2 * norm.weight, requires_grad=False)
    assert same_bits(again(), fresh), "a graph reads the address it was captured with"
    with pytest.raises(RuntimeError, match=r"1 tensors are not where they were .*: model\.norm\.weight\. Write"):
        batch.decode([1, 2, 3])
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        model.generate(IDS, MASK, STEPS, graphs=True)
    model.graphs.drop()
    want = model.generate(IDS, MASK, STEPS, ignore_eos=True)
    assert torch.equal(model.generate(IDS, MASK, STEPS, ignore_eos=True, graphs=True), want)


def test_param_data_assigned_is_stale_and_named_too(model: torch_models.Model) -> None:
    _, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)
    batch.decode([1, 2, 3])
    proj = model.model.layers["1"].mlp.down_proj
    proj.weight.data = proj.weight.data.clone()
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        batch.decode([1, 2, 3])


def test_a_moved_cache_is_named(model: torch_models.Model) -> None:
    _, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)
    layer = model.graphs[4, 16].cache.layers["1"]
    layer["key"] = layer["key"].clone()
    with pytest.raises(RuntimeError, match=r"graph 4x16\['cache'\]\.layers\['1'\]\['key'\]"):
        batch.decode([1, 2, 3])


def test_many_moved_tensors_are_counted(model: torch_models.Model) -> None:
    _, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)
    for param in list(model.parameters()):
        param.data = param.data.clone()
    with pytest.raises(RuntimeError, match=rf"{len(list(model.parameters()))} tensors .* and \d+ more"):
        batch.decode([1, 2, 3])


def test_a_tensor_that_came_new_is_refused_at_the_next_prefill(model: torch_models.Model) -> None:
    model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)
    model.model.norm.lora = torch.zeros(3)  # the graph was captured without it
    with pytest.raises(RuntimeError, match=r"model\.norm\.lora"):
        model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)


def test_a_dropped_graph_is_refused(model: torch_models.Model) -> None:
    _, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)
    del model.graphs[4, 16]
    with pytest.raises(RuntimeError, match="the graph of 4 rows and 16 slots is gone: it was dropped"):
        batch.decode([1, 2, 3])
    assert len(model.graphs) == 0


def test_dropping_frees_the_cache_and_so_does_the_end_of_the_model(model: torch_models.Model, pair: list[Path]) -> None:
    model.graphs.capture((1, 4), 16)
    caches = {key: weakref.ref(model.graphs[key, 16].cache.layers["0"]["key"]) for key in (1, 4)}
    gc.disable()
    try:
        model.graphs.drop(4)
        assert (caches[4](), len(model.graphs)) == (None, 1)
        other = torch_models.load(pair[1])
        other.extra = torch.zeros(2)  # so the graph watches the model's own dictionary, which holds the graph
        kept = weakref.ref(other.graphs.capture(1, 16)[0].cache.layers["0"]["key"])
        del other
        assert kept() is None, "a graph outlives its model until the garbage collector comes"
    finally:
        gc.enable()


def test_a_later_prefill_takes_the_cache(model: torch_models.Model) -> None:
    _, first = model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)
    _, second = model.graphs.prefill(IDS[:, 1:], MASK[:, 1:], max_new_tokens=STEPS)
    with pytest.raises(RuntimeError, match="a later prefill took the graph and its cache"):
        first.decode([1, 2, 3])
    second.decode([1, 2, 3])


def test_tokens_are_checked_as_eager_code_checks_them(model: torch_models.Model) -> None:
    _, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)
    with pytest.raises(ValueError, match="2 tokens for a cache of 3 rows"):
        batch.decode([1, 2])
    with pytest.raises(ValueError, match="outside"):
        batch.decode([1, 2, 211])
    for _ in range(16 - T):
        batch.decode([1, 2, 3])
    with pytest.raises(ValueError, match="the cache is full at 16 tokens"):
        batch.decode([1, 2, 3])


def test_a_stage_and_a_model_of_two_versions_capture_nothing(model: torch_models.Model, pair: list[Path]) -> None:
    with pytest.raises(ValueError, match="this is stage 0 of 2"):
        torch_models.load(pair[0], stage=(0, 2)).graphs.capture(1, 16)
    _, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)
    model.refusal = "an update broke"
    for refused in (lambda: batch.decode([1, 2, 3]), lambda: model.graphs.capture(1, 16)):
        with pytest.raises(RuntimeError, match="refuses to run: an update broke"):
            refused()


# weights change under a graph


def test_after_a_reload_a_graph_computes_what_a_cold_load_does(model: torch_models.Model, pair: list[Path]) -> None:
    _, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)
    old = batch.decode([1, 2, 3])
    model.update_weights_from_disk(pair[1])
    with pytest.raises(ValueError, match="keys and values of other weights .* Run prefill again"):
        batch.decode([1, 2, 3])
    _, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)
    new = batch.decode([1, 2, 3])
    _, cache = eager_twin(torch_models.load(pair[1]), 4, 16)
    assert same_bits(new, torch_models.load(pair[1]).decode_step(torch.tensor([[1], [2], [3], [0]]), cache)[:3])
    assert (new - old).abs().max() > 1
    assert model.graphs.num_captures == 1


def reload_and_replay(model: torch_models.Model, pair: list[Path], times: int) -> None:
    """A and B in turn under one graph: always a cold load's logits, no pointer moves, no memory is lost."""

    def logits() -> torch.Tensor:
        return model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)[1].decode([1, 2, 3])

    want = [logits(), None]
    want[1] = logits() if model.update_weights_from_disk(pair[1]) else None
    census = torch_models.pointer_census(model)
    process, resident = psutil.Process(), []
    for turn in range(times):
        model.update_weights_from_disk(pair[turn % 2])
        assert same_bits(logits(), want[turn % 2]), turn
        assert torch_models.pointer_census(model) == census, turn
        resident.append(process.memory_info().rss)
    assert model.graphs.num_captures == 1
    # the second half stays within 2 MB: one lost copy of this model's weights at each reload would be 20 MB
    assert max(resident[times // 2 :]) - resident[times // 2] < 2 * 2**20


def test_200_reloads_under_one_graph(fast_pair: list[Path]) -> None:
    reload_and_replay(torch_models.load(fast_pair[0]), fast_pair, 200)


@pytest.mark.slow
def test_1000_reloads_under_one_graph(pair: list[Path]) -> None:
    reload_and_replay(torch_models.load(pair[0]), pair, 1000)


def test_a_failed_capture_leaves_no_graph_behind(model: torch_models.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    step = type(model).decode_step
    monkeypatch.setattr(type(model), "decode_step", lambda *args: step(*args) * (1 if step(*args).sum() > 0 else 2))
    with pytest.raises(CannotCapture, match="_local_scalar_dense"):
        model.graphs.capture(1, 16)
    monkeypatch.undo()
    assert isinstance(model.graphs, DecodeGraphs)
    assert len(model.graphs) == model.graphs.num_captures == 0
    assert_replay_is_eager(model)


def test_a_copy_of_a_model_captures_graphs_of_its_own(fast_pair: list[Path]) -> None:
    model = torch_models.load(fast_pair[0])
    options = {"max_new_tokens": 6, "ignore_eos": True}
    before = model.generate(IDS, graphs=True, **options)
    other = copy.deepcopy(model)
    assert len(other.graphs) == 0
    other.update_weights_from_disk(fast_pair[1])
    expected = torch_models.load(fast_pair[1]).generate(IDS, **options)
    assert not torch.equal(expected, before)
    assert torch.equal(other.generate(IDS, graphs=True, **options), expected)
    assert torch.equal(model.generate(IDS, graphs=True, **options), before)
    assert len(pickle.loads(pickle.dumps(model)).graphs) == 0


@pytest.mark.parametrize("graphs", [False, True])
def test_a_cache_that_was_written_in_part_is_read_no_more(graphs: bool, tmp_path: Path) -> None:
    """States of a gated delta net are advanced in place, layer by layer."""
    model = torch_models.load(make_checkpoint("qwen3_5", tmp_path / "it"))
    logits_BV, state = model.graphs.prefill(IDS) if graphs else model.prefill(IDS)
    step = (lambda: state.decode([7] * 3)) if graphs else (lambda: model.decode([7] * 3, state)[0])
    expected = step().clone()
    logits_BV, state = model.graphs.prefill(IDS) if graphs else model.prefill(IDS)
    replays = "torch_models.recording.Recording.replay"
    broken = patch(replays, side_effect=MemoryError) if graphs else broken_layer(model)
    with broken, pytest.raises(MemoryError):
        step()
    with pytest.raises(ValueError, match="Run prefill again"):
        step()
    logits_BV, state = model.graphs.prefill(IDS) if graphs else model.prefill(IDS)
    assert torch.equal(step(), expected)


@contextmanager
def broken_layer(model: torch_models.Model) -> Iterator[None]:
    def fails(*_: object) -> None:
        raise MemoryError

    last = list(model.model.layers.children())[-1]
    handle = last.register_forward_pre_hook(fails)
    try:
        yield
    finally:
        handle.remove()
