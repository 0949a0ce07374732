"""What several processes do alike, without any: each is a call that is told what the others say."""

from __future__ import annotations

import pytest

from loaders.host.agreement import agreed


def one_of_two(other: str, work, say=str):
    """Process 0, beside a second one that says ``other``."""
    return agreed(lambda text: {0: text, 1: other}, "the prompt", work, say, words=("rank", "ranks"))


def test_what_all_make_alike_is_returned():
    assert one_of_two("=the prompt=seven", lambda: 7, lambda found: "seven") == 7


def test_an_error_of_ones_own_is_raised_as_it_is():
    with pytest.raises(ZeroDivisionError):
        one_of_two("=the prompt=7", lambda: 1 // 0)
    with pytest.raises(KeyError):  # also where it cannot be said
        one_of_two("=the prompt=7", lambda: 7, lambda found: {}[found])


def test_an_error_of_another_one_names_it():
    with pytest.raises(RuntimeError, match=r"1 of 2 ranks failed, so none goes on\. rank 1: ValueError: no room"):
        one_of_two("ValueError: no room", lambda: 7)


def test_what_is_not_alike_is_said_by_all():
    told = r"the prompt is not the same on all ranks: 7 on rank 0; 8 on rank 1\. Nothing was changed"
    with pytest.raises(ValueError, match=told):
        one_of_two("=the prompt=8", lambda: 7)


def test_who_does_something_else_is_told_what():
    told = r"what is called is not the same on all ranks: the prompt on rank 0; what is read on rank 1\. Nothing was"
    with pytest.raises(ValueError, match=told):
        one_of_two("=what is read=7", lambda: 7)
