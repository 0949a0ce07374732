"""Sizes that programs are made for."""

import pytest

from loaders.host.inputs import bucket


@pytest.mark.parametrize(
    ("tokens", "slots"),
    [(1, 16), (17, 32), (33, 64), (65, 128), (129, 256), (257, 384), (549, 640), (640, 640), (641, 768), (1025, 1152)],
)
def test_a_cache_has_few_slots_more_than_it_needs(tokens, slots):
    assert bucket(tokens) == slots


def test_caches_come_in_few_sizes_of_which_the_larger_ones_are_multiples_of_128():
    sizes = [bucket(tokens) for tokens in range(1, 40_000)]
    assert all(tokens <= slots for tokens, slots in enumerate(sizes, 1))
    assert all(slots - tokens < max(128, tokens / 8) for tokens, slots in enumerate(sizes, 1))
    assert all(slots % 128 == 0 for slots in sizes if slots > 64)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4 + 15 + 4 * 8 + 2  # to 128, to 2048 by 128, eight for every doubling to 32768, two more
    assert [bucket(slots) for slots in sizes] == sizes  # what is rounded up stays
