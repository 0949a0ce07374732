"""The lifecycle of two tied checkpoints of which only one ships the redundant head."""

import pytest

from parity.lifecycle.run import run_lifecycle
from parity.zoo import make_checkpoint


@pytest.mark.parametrize("shipping", ["A", "B"])
def test_every_event_passes_when_one_of_two_tied_checkpoints_ships_its_head(shipping, tmp_path):
    a, b = (
        make_checkpoint(
            "qwen3-tied",
            tmp_path / letter,
            seed=ord(letter),
            num_hidden_layers=1,
            ship_tied_head=letter == shipping,
        )
        for letter in "AB"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    events = run_lifecycle(a, b, backends=("torch",), scratch=scratch)
    assert [(event.event, event.detail) for event in events if event.verdict == "fail"] == []
    assert len(events) > 20
