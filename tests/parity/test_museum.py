"""Every exhibit of the museum: caught with its bug, for the right reason; silent without it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from parity.foreign.lifecycle import EVENTS, foreign_lifecycle, missing_interface
from parity.foreign.live import ForeignModel, vllm_style
from parity.museum import render, show
from parity.museum.engine import Engine, checkpoint, subject
from parity.museum.exhibits import BUGS, EXHIBITS
from parity.museum.parts import NormRebound
from parity.mutants import all_mutants

ROOT = Path(__file__).parents[2]
# of facts/weight_lifecycle.md, section 8
SEEDS = {"#22547", "#22673, #26430", "#25107, #25190", "#26798", "#42671, #42716"}


@pytest.mark.slow_unless("True")
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_sound_engine_passes_every_event(is_tied):
    engine = type("Tied", (Engine,), {"is_tied": is_tied})
    results = foreign_lifecycle(subject(engine), *(checkpoint(seed, is_tied=is_tied) for seed in range(2)))
    assert [(one.event, one.detail) for one in results if one.verdict != "pass"] == []
    assert len(results) == len(EVENTS)
    assert results[0].detail == "twice the same, as the reference, recorded"


@pytest.mark.parametrize("name", EXHIBITS)
def test_an_exhibit_is_caught(name):
    exhibit = EXHIBITS[name]
    shown = show(exhibit)
    events = ["load", *(event for event in exhibit.caught_by if event != "load")]
    found = {one.event: one for one in foreign_lifecycle(shown.subject, shown.a, shown.b, events=events)}
    assert [event for event in exhibit.caught_by if found[event].verdict != "fail"] == []
    assert re.search(exhibit.evidence, found[exhibit.caught_by[0]].detail), found[exhibit.caught_by[0]].detail
    assert (found["load"].verdict == "fail") == exhibit.is_wrong_from_the_start, found["load"].detail


def test_every_bug_is_shown_or_says_why_not():
    for bug in BUGS:
        assert bool(bug.exhibits or bug.mutants) != bool(bug.absent), bug
        assert bug.laws or bug.absent, bug
    assert {bug.numbers for bug in BUGS if bug.is_seed} == SEEDS
    assert {name for bug in BUGS for name in bug.exhibits} == EXHIBITS.keys()
    assert {name for bug in BUGS for name in bug.mutants} <= all_mutants().keys()
    assert [name for bug in BUGS for name in bug.mutants if all_mutants()[name].equivalent] == []


def test_the_catalogue_is_up_to_date():
    assert (ROOT / "docs/museum.md").read_text(encoding="utf-8") == render(), "python -m parity.museum > docs/museum.md"


class Plain(torch.nn.Module):
    """A module in the manner of vLLM as one finds it: derives nothing, streams into place, checks nothing."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(7, 4), requires_grad=False)
        self.head = torch.nn.Parameter(torch.zeros(4, 7), requires_grad=False)

    def load_weights(self, weights):
        for name, tensor in weights:
            self.get_parameter(name).data.copy_(tensor)

    def forward(self, ids):
        return self.table[ids] @ self.head


def plain(seed):
    random = torch.Generator().manual_seed(seed)
    return {"table": torch.randn(7, 4, generator=random), "head": torch.randn(4, 7, generator=random)}


def test_a_module_that_offers_little_is_judged_by_what_it_offers():
    results = foreign_lifecycle(vllm_style(Plain, torch.arange(7), name="plain"), plain(0), plain(1))
    verdicts = {one.event: one.verdict for one in results}
    skipped = ["buckets", "write by name", "nap", "swap embed and head", "wrappers"]
    assert [event for event, verdict in verdicts.items() if verdict == "skip"] == skipped
    # it streams into place and asks no questions
    failed = ["missing tensor", "unexpected tensor", "repeated tensor", "misfit tensor"]
    failed += ["partial reload", "reload that breaks off"]
    assert [event for event, verdict in verdicts.items() if verdict == "fail"] == failed
    assert {one.backend for one in results} == {"plain"}


def test_a_model_that_refuses_to_run_until_a_good_load_keeps_the_law():
    class Refusing(Plain):
        is_whole = False

        def load_weights(self, weights):
            self.is_whole = False
            super().load_weights(weights)
            self.is_whole = True

        def forward(self, ids):
            if not self.is_whole:
                raise RuntimeError("half an update")
            return super().forward(ids)

    results = foreign_lifecycle(
        vllm_style(Refusing, torch.arange(7)), plain(0), plain(1), events=["reload that breaks off"]
    )
    assert results[0].verdict == "pass", results[0].detail


def test_what_cannot_be_recorded_is_told_and_the_rest_is_judged():
    class Hosted(Plain):
        def forward(self, ids):
            return super().forward(ids) * float(self.head.sum().item() > -1e9)

    results = foreign_lifecycle(vllm_style(Hosted, torch.arange(7)), plain(0), plain(1), events=["load", "reload B"])
    assert [one.verdict for one in results] == ["pass", "pass"]
    assert "not recorded: " in results[0].detail


@pytest.mark.parametrize(
    ("b", "events", "says"),
    [
        ({"table": plain(1)["table"]}, None, "only one of them has head"),
        (plain(1) | {"head": torch.zeros(4, 8)}, None, "head differ in shape or dtype"),
        (plain(1) | {"head": plain(0)["head"]}, None, "head are the same in both"),
        (plain(1), ["lode"], "no event is called lode, expected among load, "),
    ],
)
def test_checkpoints_that_could_show_nothing_are_refused(b, events, says):
    with pytest.raises(ValueError, match=says):
        foreign_lifecycle(vllm_style(Plain, torch.arange(7)), plain(0), b, events=events)


def test_an_interface_is_compared_by_name():
    shown = EXHIBITS["WrapsWithoutInterface"]
    (wrapper, wrapped), *_ = show(shown).subject.wrappers(Engine())
    assert missing_interface(wrapper, wrapped) == ["num_embeddings"]
    assert missing_interface(wrapped, wrapped) == []


def test_the_fixture_fails_with_the_events_that_broke_a_law(tmp_path):
    from parity.plugin.fixtures import Lifecycle

    told = []
    life = Lifecycle(tmp_path, told.append)
    pair = checkpoint(0), checkpoint(1)
    assert isinstance(subject(), ForeignModel)
    assert [one.verdict for one in life.foreign(subject(), *pair, events=["load", "reload B"])] == ["pass", "pass"]
    with pytest.raises(AssertionError, match=r"(?s)1 of 2 events break a law, 1 pass.*reload B \(engine\): .*moved"):
        life.foreign(subject(Norm=NormRebound), *pair, events=["load", "reload B"])
    assert [len(results) for results in told] == [2, 2]
