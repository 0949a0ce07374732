"""What only a CUDA device can show. Run by make test-gpu."""

import numpy as np
import pytest
import torch

import torch_models
from parity.backends import open_backend
from parity.compare import compare
from parity.oracle import oracle_forward
from parity.record import default_inputs, record
from parity.record_oracle import record_oracle
from parity.zoo import make_checkpoint

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["qwen3", "qwen3-moe"])
def checkpoints(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    return [make_checkpoint(request.param, root / str(seed), seed=seed, dtype="BF16") for seed in range(2)]


def test_float32_on_cuda_is_as_near_to_the_oracle_as_on_the_cpu(checkpoints):
    model = torch_models.load(checkpoints[0], dtype="float32", device="cuda")
    inputs = default_inputs(model.checkpoint)
    found, expected = model(**inputs).cpu().numpy(), oracle_forward(model.checkpoint, **inputs)["logits"]
    real = inputs["attention_mask"].astype(bool)
    assert np.linalg.norm((found - expected)[real]) <= 2e-5 * np.linalg.norm(expected[real])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_and_cpu_agree_to_within_rounding_after_a_reload(checkpoints, dtype):
    first, second = checkpoints
    traces = [
        record(first, open_backend("torch", device), dtype=dtype, reload=second, max_new_tokens=8)
        for device in ("cuda", "cpu")
    ]
    opened = torch_models.load(second).checkpoint
    ours, theirs = (record_oracle(opened, default_inputs(opened), like=trace) for trace in traces)
    verdict = compare(*traces, ours, oracle_b=theirs)
    assert verdict.verdict in ("PASS", "INCONCLUSIVE"), verdict.summary


def test_reloading_on_cuda_moves_no_pointer_and_returns_to_the_first_bits(checkpoints):
    first, second = checkpoints
    model = torch_models.load(first, device="cuda")
    inputs = default_inputs(model.checkpoint)
    before, census = model(**inputs), torch_models.pointer_census(model)
    for checkpoint in (second, first) * 3:
        model = model.update_weights_from_disk(checkpoint)
    assert torch_models.pointer_census(model) == census
    assert (model(**inputs) == before).all()
    assert model.digests() == torch_models.load(first).digests()


# graphs: what tests/torch_models/test_graphs.py shows by recorded replay, with real ones

IDS = np.random.default_rng(0).integers(0, 200, (3, 9))
MASK = np.arange(9) >= np.array([[0], [2], [5]])
FAMILIES = ["qwen3", "qwen3-tied", "qwen3-sliding", "qwen3-yarn", "qwen3-moe", "qwen3_5", "qwen3_5-moe", "gemma3"]


def both_steps(model, steps=4):
    """Logits of every step, [N, B, V]: replayed, and eager on the same padded bucket."""
    logits_BV, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=7)
    cache = model.empty_cache(4, 16)
    want_BV = model.prefill_into(model.checked_prompt(IDS, MASK), cache.first_rows(3))
    replayed, eager = [logits_BV], [want_BV]
    for _ in range(steps):
        token_B = want_BV.argmax(-1)
        replayed.append(batch.decode(token_B))
        want_BV = model.decode(torch.nn.functional.pad(token_B, (0, 1)), cache)[0][:3]
        eager.append(want_BV)
    return torch.stack(replayed), torch.stack(eager)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cuda_graph_gives_the_bits_of_eager_code(name, dtype, tmp_path):
    path = make_checkpoint(name, tmp_path / "a", dtype="BF16")
    model = torch_models.load(path, dtype=dtype, device="cuda")
    model.graphs.capture((1, 8, 4), 16)
    assert isinstance(model.graphs[4, 16].program, torch.cuda.CUDAGraph)
    replayed, eager = both_steps(model)
    assert torch.equal(replayed, eager)
    tokens = [model.generate(IDS, MASK, 6, ignore_eos=True, graphs=graphs) for graphs in (False, True, True)]
    assert torch.equal(tokens[1], tokens[2])
    assert model.graphs.num_captures == 3


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5", "gemma3"])
def test_a_cuda_graph_after_a_reload_equals_a_cold_load(name, tmp_path):
    pair = [make_checkpoint(name, tmp_path / str(seed), seed=seed) for seed in range(2)]
    model = torch_models.load(pair[0], device="cuda")
    census = torch_models.pointer_census(model)
    want = [both_steps(torch_models.load(path, device="cuda"))[0] for path in pair]
    assert torch.equal(both_steps(model)[0], want[0])
    for turn in range(1, 20):
        model.update_weights_from_disk(pair[turn % 2])
        assert torch.equal(both_steps(model)[0], want[turn % 2])
    for name_, value in torch_models.load(pair[0]).named_parameters():
        model.get_parameter(name_).data.copy_(value)
    assert torch.equal(both_steps(model)[0], want[0])
    assert torch_models.pointer_census(model) == census
    assert model.graphs.num_captures == 1


def test_padded_rows_of_a_cuda_graph_do_not_leak(tmp_path):
    model = torch_models.load(make_checkpoint("qwen3-moe", tmp_path / "a"), device="cuda")
    seen = []
    for is_poisoned in (False, True):
        _, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=7)
        if is_poisoned:
            graph = model.graphs[4, 16]
            for part in (part for parts in graph.cache.layers.values() for part in parts.values()):
                part[3:] = float("nan")
            graph.cache.key_mask[3:] = True
        seen.append(batch.decode([1, 2, 3]))
    assert torch.equal(*seen)
    assert torch.isfinite(seen[0]).all()


def test_a_rebound_parameter_under_a_cuda_graph_is_stale_and_named(tmp_path):
    model = torch_models.load(make_checkpoint("qwen3", tmp_path / "a"), device="cuda")
    _, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=7)
    graph, fresh = model.graphs[4, 16], batch.decode([1, 2, 3])
    model.model.norm.weight.data = 2 * model.model.norm.weight.data
    graph.cache.slot -= 1
    graph.cache.position -= 1
    graph.program.replay()
    assert torch.equal(graph.logits[:3], fresh)
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        batch.decode([1, 2, 3])


def test_sleep_gives_device_memory_back_and_wake_returns_every_bit(tmp_path):
    model = torch_models.load(make_checkpoint("qwen3-tied", tmp_path / "a", hidden_size=512), device="cuda")
    _, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=7)
    digests, before = model.digests(), model(IDS)
    held = torch.cuda.memory_allocated()
    weights = sum(param.untyped_storage().nbytes() for param in model.parameters())
    model.sleep()
    assert held - torch.cuda.memory_allocated() >= weights
    with pytest.raises(RuntimeError, match="the model was put to sleep"):
        batch.decode([1, 2, 3])
    model.wake()
    assert model.digests() == digests
    assert torch.equal(model(IDS), before)
    assert torch.equal(*both_steps(model))
