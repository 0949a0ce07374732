"""A hybrid model reloaded again and again while it decodes: nothing moves, nothing compiles, nothing is left behind."""

from __future__ import annotations

import gc

import jax
import psutil
import pytest
import torch
from lives import BACKENDS, Benches

from parity.lifecycle.live_model import LiveModel, differing, same_bits

pytestmark = pytest.mark.usefixtures("young_heap")

MIB = 2**20
LONG = pytest.param("qwen3_5", 1000, marks=pytest.mark.slow)
QUANTIZED = pytest.param("qwen3_5-moe nvfp4", 100, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    return Benches(tmp_path_factory.mktemp("reloads"))


def num_arrays(backend):
    """Arrays that anybody holds."""
    gc.collect()
    if backend == "jax":
        return len(jax.live_arrays())
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


@pytest.mark.parametrize(("zoo", "count"), [("qwen3_5", 40), LONG, ("qwen3_5-moe nvfp4", 20), QUANTIZED])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow_unless("*-qwen3_5-40")
def test_every_reload_of_many_is_a_cold_load(backend, zoo, count, benches):
    """A, B, A, ...: between reloads the prompt is prefilled and decoded, in torch by a graph captured once."""
    bench = benches.bench(backend, zoo)
    live, process = bench.live, psutil.Process()
    model = bench.load(bench.path("A"))
    cold = {letter: bench.witness(letter, dict.fromkeys(bench.tensors[letter], letter)) for letter in "AB"}
    warm_up = max(6, count // 10)
    fixed, compiled = {}, {}
    arrays = resident = 0
    for reload in range(count + warm_up):
        letter = "BA"[reload % 2]
        model = model.update_weights_from_disk(bench.path(letter))
        steps = live.replayed(model, bench.prompt)
        assert all(map(same_bits, steps, cold[letter].steps)), (reload, "decoded logits differ from a cold load's")
        assert same_bits(bench.drafted(model), cold[letter].drafted), (reload, "the draft differs from a cold load's")
        if reload == warm_up - 1:  # everything is captured, compiled and allocated by now
            fixed, compiled = live.fixed(model), live.compiled(model)
            arrays, resident = num_arrays(backend), process.memory_info().rss
    assert differing(fixed, live.fixed(model)) == []
    assert live.compiled(model) == compiled
    assert (
        num_arrays(backend) == arrays
    )  # before digests: JAX keeps an array over the same buffer for each that it reads
    assert model.version == count + warm_up + 1
    assert model.digests() == cold["BA"[(count + warm_up - 1) % 2]].digests
    if live.captures:
        assert model.graphs.num_captures == 1
    # A checkpoint kept at each reload would be count times as much. Up to 24 MiB is an allocator's: short runs are told
    # apart by the count of arrays, long ones by this too.
    grown = process.memory_info().rss - resident
    print(f"{backend}: {count} reloads grew the process by {grown / MIB:.1f} MiB")
    assert grown <= max(24 * MIB, 0.02 * count * bench.checkpoints["A"].num_bytes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reload_that_leaves_something_behind_would_be_seen(backend, benches):
    """The counts above do count: one array kept is one more."""
    bench = benches.bench(backend, "qwen3_5")
    model = bench.load(bench.path("A"))
    before = num_arrays(backend)
    kept = torch.zeros(3) if backend == "torch" else jax.numpy.zeros(3)
    assert num_arrays(backend) == before + 1
    del kept, model
    assert num_arrays(backend) < before


def test_a_life_of_many_events_ends_as_it_began(benches):
    life = LiveModel(benches.bench("torch", "qwen3_5"), "A")
    for _ in range(3):
        life.reload("B")
        life.replay()
        life.nap()
        life.swap("A")
        life.replay()
        life.reload("A")
