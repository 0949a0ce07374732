"""Values at the ends of float32, and beyond: judged and told without a warning, wherever they are."""

import warnings

import numpy as np
import pytest
from synthetic_traces import trio

from parity import compare
from parity.comparison.outcome import Comparison
from parity.report.page import render_html
from parity.report.results import to_json, to_junit, to_markdown
from parity.wording import share, told_share

LARGE = 3e38  # its square overflows, and so does its share of a limit in float32
TENSORS = ("hidden_states.0", "hidden_states.2", "final_hidden_state", "logits")


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def shown(found: Comparison) -> list[str]:
    named = [("x", found)]
    views = [found, found.table(), found.plot_layers(), *([found.heat(), found.token(1, 3)] if found.case else [])]
    reports = [to_json(named), to_junit(named), to_markdown(named)]
    page = render_html("x", comparisons=named, events=[], facts={})
    return [page, *reports, *map(repr, views), *(view._repr_html_() for view in views)]


@pytest.mark.parametrize("has_oracle", [True, False])
@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("value", [LARGE, -LARGE, np.inf, -np.inf, np.nan, 1e-45])
def test_an_extreme_value_is_its_own_sides_bug(value, tensor, has_oracle):
    for side in (0, 1):
        for where in ((1, 3, 4), (1, 3), ...):  # a channel, a token, everything
            a, b, oracle = trio()
            trace = (a, b)[side]
            trace.tensors[tensor] = trace.tensors[tensor].copy()
            trace.tensors[tensor][where] = value
            found = compare(a, b, oracle if has_oracle else None)
            texts = shown(found)
            if has_oracle and (abs(value) != 1e-45 or where == ...):  # one channel, or one token, may be small
                assert (found.verdict, found.whose) == ("FAIL", "ab"[side])
            if np.isfinite(value):
                assert found.worst_row.nonfinite is None
                assert "not finite" not in texts[0]


def test_what_is_finite_is_not_called_otherwise():
    assert share(1e30) == "over 1,000,000,000x"
    assert told_share(1e30) == "over 1,000,000,000 times its limit"
    assert told_share(float("inf")) == told_share(float("nan")) == share(float("inf")) == "not finite"
    assert told_share(1e9) == "1,000,000,000 times its limit"
