"""The recording that stands for a CUDA graph on the CPU: new values at old addresses, and refusals like its."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torch_models.recording import CannotCapture, Recording


def test_a_replay_reads_new_values_and_old_addresses() -> None:
    held = {"x": torch.arange(4.0), "out": torch.zeros(2)}

    def program() -> None:
        doubled = (held["x"] * 2).view(2, 2).t()  # [[0, 4], [2, 6]]
        doubled[0, 0] += 1  # through a view
        held["out"].copy_(doubled.sum(0))

    recording = Recording(program)
    assert held["out"].tolist() == [0 + 2 + 1, 4 + 6 + 0]
    held["x"].mul_(10)
    recording.replay()
    assert held["out"].tolist() == [0 + 20 + 1, 40 + 60 + 0]
    moves = {
        "a name": lambda: held.update(x=torch.full((4,), -9.0)),
        "a tensor object": lambda: setattr(x, "data", torch.full((4,), -9.0)),
    }
    x = held["x"]
    for what, move in moves.items():
        move()
        held["out"].zero_()
        recording.replay()
        assert held["out"].tolist() == [0 + 20 + 1, 40 + 60 + 0], f"it followed {what} instead of an address"


X, MASKED = torch.arange(4.0), torch.tensor([True, False, True, True])
REFUSED = {
    "item": (lambda: X.sum().item(), r"aten::_local_scalar_dense"),
    "bool": (lambda: 1 if X.sum() > 0 else 0, r"aten::_local_scalar_dense"),
    "equal": (lambda: torch.equal(X, X), r"aten::equal"),
    "nonzero": (lambda: X.nonzero(), r"aten::nonzero"),
    "unique": (lambda: X.unique(), r"aten::_unique2"),
    "mask": (lambda: X[MASKED], r"aten::index by a mask"),
    "masked_select": (lambda: X.masked_select(MASKED), r"aten::masked_select"),
    "tolist": (lambda: X.tolist(), r"Tensor\.tolist\(\)"),
    "numpy": (lambda: X.numpy(), r"Tensor\.numpy\(\)"),
    "cpu": (lambda: X.cpu(), r"Tensor\.cpu\(\)"),
    "random": (lambda: torch.rand(3, device="cpu"), r"aten::rand"),
    "multinomial": (lambda: torch.multinomial(X, 1), r"aten::multinomial"),
    "dropout": (lambda: torch.nn.functional.dropout(X, 0.5), r"bernoulli|native_dropout"),
    "tensor": (lambda: X + torch.tensor([1.0, 2, 3, 4]), r"made of host data"),
    "from_numpy": (lambda: X + torch.from_numpy(np.zeros(4, np.float32)), r"made of host data"),
    "arange": (lambda: X + torch.arange(4), r"torch\.arange\(\) without device="),
    "other device": (lambda: X.to("meta"), r"aten::_to_copy.*copies between cpu and meta"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_graph_can_capture_is_refused_by_name(what: str) -> None:
    program, name = REFUSED[what]
    with pytest.raises(CannotCapture, match=rf"({name}).* cannot be captured in a graph|{name}"):
        Recording(program)


def test_attention_without_dropout_and_integer_indices_are_captured() -> None:
    q, index = torch.randn(1, 2, 3, 8), torch.tensor([2, 0])
    out = torch.zeros(2)
    recording = Recording(
        lambda: out.copy_(torch.nn.functional.scaled_dot_product_attention(q, q, q)[0, 0, :, 0][index])
    )
    q.mul_(2)
    recording.replay()
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(q, q, q)[0, 0, :, 0][index])


def test_a_recording_names_what_it_reads_from_outside() -> None:
    w, out = torch.ones(3), torch.zeros(3)
    outside = Recording(lambda: out.copy_(w * 2 + torch.ones(3, device="cpu"))).outside
    assert {tensor.data_ptr() for tensor in outside} == {w.data_ptr(), out.data_ptr()}
