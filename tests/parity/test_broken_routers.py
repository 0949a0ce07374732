"""A router that chooses what cannot be replayed is a bug with a verdict, not an error of the command."""

from __future__ import annotations

import numpy as np
import pytest

from loaders import open_checkpoint
from parity.backends import open_backend
from parity.compare import compare
from parity.record import default_inputs, record
from parity.record_oracle import record_oracle
from parity.trace import Trace
from parity.zoo import make_checkpoint

SPARSE = "routing.3"  # of decoder layer 3, model.layers.2


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A checkpoint, inputs and a trace of torch."""
    path = make_checkpoint("qwen3-moe", tmp_path_factory.mktemp("moe"), num_hidden_layers=3)
    checkpoint = open_checkpoint(path)
    inputs = default_inputs(checkpoint)
    return checkpoint, inputs, record(path, open_backend("torch"), inputs)


def judged(recorded, experts):
    """The trace with other experts in one layer, against itself as it was."""
    checkpoint, inputs, trace = recorded
    broken = Trace(trace.tensors | {SPARSE: experts}, trace.meta)
    oracles = [record_oracle(checkpoint, inputs, like=one, probes=0) for one in (broken, trace)]
    return compare(broken, trace, oracles[0], oracle_b=oracles[1])


def test_too_few_experts_are_named_with_their_layer(recorded):
    found = judged(recorded, recorded[2].tensors[SPARSE][..., :1])
    assert (found.verdict, found.exit_code) == ("INVALID", 3)
    assert "shape of routing.3 (experts a token in model.layers.2)" in found.summary
    assert "[3, 96, 1] against [3, 96, 2]" in found.summary


@pytest.mark.parametrize(
    "change", [lambda x: np.repeat(x[..., :1], 2, axis=-1), lambda x: x + 5], ids=["twice", "none"]
)
def test_an_expert_twice_or_one_that_does_not_exist_is_a_bug_of_the_router(recorded, change):
    found = judged(recorded, change(recorded[2].tensors[SPARSE]))
    assert (found.verdict, found.cause) == ("FAIL", "router flip")
    assert found.headline.endswith("chose wrong experts in model.layers.2.mlp.gate")
