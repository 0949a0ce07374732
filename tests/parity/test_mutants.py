"""Every planted bug is caught, by a detector that finds nothing wrong with the code as it is."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from importlib import import_module

import numpy as np
import pytest

from parity import cli
from parity.commands.mutate import KINDS, render
from parity.mutants import Mutant, MutantResult, Patch, all_mutants, prepare, score, try_mutant
from parity.mutants.bench import BACKENDS, Bench
from parity.mutants.plants import wrapped

pytestmark = pytest.mark.usefixtures("young_heap")

MUTANTS = all_mutants()
TRIALS = [(mutant, backend) for mutant in MUTANTS.values() for backend in mutant.backends]
# what the detectors run on: one clean run each
SETTINGS = list({(m.detector, m.subject, backend): (m, backend) for m, backend in TRIALS}.values())


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("mutants"))


def named(trial) -> str:
    mutant, backend = trial
    return f"{mutant.name}-{backend}"


LONG = {"nvfp4_life", "nvfp4_memory", "nvfp4_forward_bf16", "reload_memory", "speculative"}  # detectors: seconds each


def timed(trials) -> list:
    """In torch, which has nothing to compile, with ``make test``; in JAX, and what lives long, slow."""
    slow = pytest.mark.slow
    return [
        pytest.param((mutant, backend), marks=slow if backend == "jax" or mutant.detector.__name__ in LONG else ())
        for mutant, backend in trials
    ]


@pytest.mark.parametrize(
    "setting", timed(SETTINGS), ids=lambda s: f"{s[0].detector.__name__}-{s[0].subject.model}-{s[1]}"
)
def test_the_clean_code_passes_the_very_same_detector(bench, setting):
    assert prepare(bench, *setting) == []


@pytest.mark.parametrize("trial", timed(t for t in TRIALS if not t[0].equivalent), ids=named)
def test_a_mutant_is_killed(bench, trial):
    result = try_mutant(bench, *trial)
    assert result.killed, f"survived: {result.mutant.says}"


@pytest.mark.parametrize("trial", timed(t for t in TRIALS if t[0].equivalent), ids=named)
def test_a_mutant_said_to_be_equivalent_survives(bench, trial):
    result = try_mutant(bench, *trial)
    assert result.evidence == "", f"not equivalent after all: {result.mutant.equivalent}"


def places(mutant: Mutant, backend: str) -> list[tuple[object, str]]:
    patchers = [one.on(backend) for one in mutant.plant()]
    return [(patcher.getter(), patcher.attribute) for patcher in patchers]


@pytest.mark.parametrize("trial", TRIALS, ids=named)
def test_planting_changes_the_code_and_takes_everything_back(trial):
    mutant, backend = trial
    found = places(mutant, backend)
    before = [vars(owner)[name] for owner, name in found]
    with contextlib.suppress(ZeroDivisionError), mutant.planted(backend):
        during = [vars(owner)[name] for owner, name in found]
        raise ZeroDivisionError
    assert all(planted is not was for planted, was in zip(during, before, strict=True))
    assert all(vars(owner)[name] is was for (owner, name), was in zip(found, before, strict=True))


def test_planting_in_jax_leaves_the_shared_programs_alone():
    loader = import_module("jax_models.load")
    shared = loader.programs_for
    with MUTANTS["theta_wrong"].planted("jax"):
        assert loader.programs_for is not shared
    assert loader.programs_for is shared


def test_there_are_enough_mutants_of_every_kind_and_on_both_backends():
    counted = [mutant for mutant in MUTANTS.values() if not mutant.equivalent]
    kinds = Counter(mutant.kind for mutant in counted)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) >= 5
    assert len(counted) >= 160
    assert sum("jax" in mutant.backends for mutant in counted) >= 80
    origins = ("parity", "law", "issue", "planted", "sglang", "vllm")
    assert all(mutant.source.split()[0] in origins and mutant.says for mutant in MUTANTS.values())
    assert {backend for mutant in counted for backend in mutant.backends} == set(BACKENDS)


def test_a_patch_that_names_nothing_is_an_error():
    with pytest.raises(AttributeError):
        Patch("layers.norm:RMSNorm.no_such_method", lambda original, backend: original).on("torch")


def test_a_prompt_has_the_canaries_and_padding_on_both_sides(bench):
    batch = bench.batch(MUTANTS["eps_zero"].subject)
    mask_BT = batch["attention_mask"]
    assert mask_BT.shape[1] >= 96
    assert (mask_BT[:, 0] == 0).any()
    assert (mask_BT[:, -1] == 0).any()
    assert all(np.isin((11, 13, 16, 17), row).all() for row in batch["input_ids"])


def test_a_change_that_cannot_be_called_as_its_original_is_an_error_when_it_is_planted():
    (one,) = wrapped("model:Model.published", lambda published, self, weights, kind, *args: None)()
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        one.on("jax")


@pytest.mark.parametrize("error", [LookupError, AssertionError])
def test_one_that_cannot_be_tried_does_not_keep_the_others_from_it(error, monkeypatch):
    def other(original, *args, **kwargs):
        raise error("there is none")

    broken = dataclasses.replace(MUTANTS["rope_sign"], plant=wrapped("layers.attention:rotate", other))
    monkeypatch.setattr("parity.mutants.all_mutants", lambda: {"broken": broken, "eps_zero": MUTANTS["eps_zero"]})
    first, second = score()[:: len(broken.backends)][:2]
    assert (first.is_broken, first.is_as_expected, first.evidence) == (True, False, f"{error.__name__}: there is none")
    assert second.killed
    table = render([first, second])
    assert "NOT TRIED" in table
    assert "1 of 1 killed (100%); 0 equivalent, not counted; 1 could not be tried" in table


def test_score_tries_what_it_is_asked_for():
    results = score(["rope_sign", "positions_plus_one"])
    assert [(r.mutant.name, r.backend, r.killed) for r in results] == [
        ("rope_sign", "torch", True),
        ("positions_plus_one", "torch", False),
    ]
    assert all(result.is_as_expected for result in results)
    assert "1 of 1 killed (100%); 1 equivalent" in render(results)


def test_score_refuses_a_name_that_is_no_mutants():
    with pytest.raises(ValueError, match="no mutant is called no_such_bug"):
        score(["no_such_bug"])


def test_the_command_says_what_survived_and_fails(monkeypatch, capsys):
    survivor = MutantResult(MUTANTS["rope_sign"], "torch", False, "", 0.1)
    monkeypatch.setattr("parity.mutants.score", lambda names, kind: [survivor])
    assert cli.main(["mutate", "--only", "rope_sign"]) == 1
    assert "SURVIVED" in capsys.readouterr().out


def test_the_command_lists_every_mutant_without_trying_one(capsys):
    assert cli.main(["mutate", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in MUTANTS)
