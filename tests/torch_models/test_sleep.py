"""Sleep: the weights' memory is free, every bit comes back, and nothing runs meanwhile."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupts import interrupt_at, interrupting
from padded_prompt import IDS, MASK, STEPS

import torch_models
from parity.zoo import make_checkpoint


@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied", "qwen3_5"])
def test_sleep_frees_the_weights_and_wake_brings_back_every_bit(name: str, tmp_path: Path) -> None:
    model = torch_models.load(make_checkpoint(name, tmp_path / "a", num_hidden_layers=4))
    digests, before = model.digests(), model.generate(IDS, MASK, STEPS, ignore_eos=True)
    params, embed_and_head = dict(model.named_parameters()), model.get_embed_and_head()
    assert model.sleep() is model.sleep() is model  # twice is once
    assert {param.untyped_storage().nbytes() for param in model.parameters()} == {0}
    assert model.wake() is model.wake() is model
    assert {key: id(param) for key, param in model.named_parameters()} == {k: id(p) for k, p in params.items()}
    assert all(a is b for a, b in zip(model.get_embed_and_head(), embed_and_head, strict=True))
    assert (model.digests(), model.version, len(model.events)) == (digests, 1, 1)
    for graphs in (False, True):
        assert torch.equal(model.generate(IDS, MASK, STEPS, ignore_eos=True, graphs=graphs), before)


def test_a_sleeping_model_refuses_everything(model: torch_models.Model, pair: list[Path], tmp_path: Path) -> None:
    _, cache = model.prefill(IDS, MASK)
    model.sleep()
    refused = {
        "forward": lambda: model(IDS),
        "prefill": lambda: model.prefill(IDS),
        "decode": lambda: model.decode([1, 2, 3], cache),
        "generate": lambda: model.generate(IDS, graphs=True),
        "swap": lambda: model.set_embed_and_head(embed=torch.zeros(211, 40)),
        "reload": lambda: model.update_weights_from_disk(pair[1]),
        "export": lambda: model.export(tmp_path / "out"),
        "digests": model.digests,
        "halves": model.get_embed_and_head,
        "a copy": lambda: copy.deepcopy(model),
        "a pickle": lambda: pickle.dumps(model),
        "a dict of its state": model.state_dict,
        "another state": lambda: model.load_state_dict({}),
        "another dtype": model.half,
    }
    for what, call in refused.items():
        with pytest.raises(RuntimeError, match=r"the model sleeps, .*: call wake\(\) first"):
            pytest.fail(f"{what} gave {call()}")
    model.wake()
    with pytest.raises(ValueError, match="Run prefill again"):
        model.decode([1, 2, 3], cache)
    embed, head = model.get_embed_and_head()
    model.sleep()
    other = torch_models.load(pair[1])
    before = other.digests()
    with pytest.raises(ValueError, match="embed has no values: the model it is of sleeps.*head has no values"):
        other.set_embed_and_head(embed, head)
    assert other.digests() == before


def test_a_step_sees_storage_that_somebody_else_gave_back(model: torch_models.Model) -> None:
    """No write tells of it, and whoever reads it is ended by the system."""
    param = model.get_parameter("model.norm.weight")
    param.data = param.data.clone()  # memory of torch's own, which it resizes
    _, cache = model.prefill(IDS, MASK)
    param.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="the model sleeps, or one that it shares parameters with"):
        model.decode([1, 2, 3], cache)


def test_sleep_invalidates_every_graph_that_saw_the_storage(model: torch_models.Model) -> None:
    _, batch = model.graphs.prefill(IDS, MASK, max_new_tokens=STEPS)
    model.sleep()
    assert len(model.graphs) == 0
    for call in (lambda: None, model.wake):
        call()
        with pytest.raises(RuntimeError, match="is gone: the model was put to sleep"):
            batch.decode([1, 2, 3])


def test_a_model_that_shares_a_sleeping_parameter_refuses_too(model: torch_models.Model, pair: list[Path]) -> None:
    other = torch_models.load(pair[0])
    other.model.embed_tokens.weight = model.model.embed_tokens.weight
    _, cache = other.prefill(IDS, MASK)
    _, batch = other.graphs.prefill(IDS, MASK)
    model.sleep()
    for call in (lambda: other(IDS), lambda: other.decode([1, 2, 3], cache)):
        with pytest.raises(RuntimeError, match="or one that it shares parameters with"):
            call()
    with pytest.raises(RuntimeError, match=r"model\.embed_tokens\.weight"):
        batch.decode([1, 2, 3])
    model.wake()
    with pytest.raises(ValueError, match="Run prefill again"):
        other.decode([1, 2, 3], cache)


def test_a_mixture_is_not_put_to_sleep(model: torch_models.Model) -> None:
    model.refusal = "an update broke"
    with pytest.raises(RuntimeError, match="refuses to run"):
        model.sleep()
    assert all(param.data_ptr() for param in model.parameters())


def test_wrong_bytes_at_waking_are_seen(model: torch_models.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model.sleep()
    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: copy_(self, other).bitwise_xor_(1))
    with pytest.raises(RuntimeError, match=r"storages woke with other bytes\. The model sleeps on"):
        model.wake()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="the model sleeps"):
        model(IDS)
    model.wake()(IDS)


def test_an_interrupt_on_the_way_to_sleep_or_back_leaves_every_bit_or_a_refusal(fast_pair: list[Path]) -> None:
    """At whatever line it comes: the model serves what it did, or sleeps and wakes to that."""
    model = torch_models.load(fast_pair[0])
    expected, digests = model(IDS).clone(), model.digests()
    with interrupting("torch_models/sleep.py", lambda number: None) as lines:
        model.sleep().wake()
    asleep = 0
    for line in range(1, lines[0]):
        try:
            with interrupting("torch_models/sleep.py", interrupt_at(line)):
                model.sleep().wake()
        except KeyboardInterrupt:
            pass
        if model.asleep is not None:
            asleep += 1
            with pytest.raises(RuntimeError, match="sleeps"):
                model(IDS)
            model.wake()
        assert torch.equal(model(IDS), expected), line
        assert model.digests() == digests
    assert asleep > 5


def test_memory_that_runs_out_on_the_way_to_sleep_changes_nothing(fast_pair: list[Path], monkeypatch: Any) -> None:
    model = torch_models.load(fast_pair[0])
    expected, empty, calls = model(IDS).clone(), torch.empty, []

    def scarce(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 4:
            raise MemoryError
        return empty(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", scarce)
        with pytest.raises(MemoryError):
            model.sleep()
    assert model.asleep is None
    assert torch.equal(model(IDS), expected)
    assert torch.equal(model.sleep().wake()(IDS), expected)
