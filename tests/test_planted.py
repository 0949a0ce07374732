"""The bugs of ``benchmarks.planted`` can still be planted: their text is that of today's code."""

import pytest

from benchmarks.planted import BUGS
from benchmarks.planted.plant import planted


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "_"))
def test_the_text_that_a_bug_changes_is_there(bug):
    with planted(bug):
        pass
