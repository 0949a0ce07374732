"""What only a CUDA device can show. Run by make test-gpu."""

import numpy as np
import pytest

import torch_models
from parity.backends import open_backend
from parity.compare import compare
from parity.oracle import oracle_forward
from parity.record import default_inputs, record, record_oracle
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
