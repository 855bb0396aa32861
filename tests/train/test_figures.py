"""Figures keep many names apart."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regard.compare.figures import short_labels, spread


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.floats(0.5, 8))
def test_spread_heights_keep_their_order_their_room_and_their_mean(heights, room):
    heights = sorted(heights)
    moved = spread(heights, room)
    assert all(after - before >= room - 1e-6 for before, after in pairwise(moved))
    assert sum(moved) == pytest.approx(sum(heights), abs=1e-6 * (1 + sum(heights)))


def test_heights_that_are_apart_stay_where_they_are():
    assert spread([1.0, 5.0, 9.0], 2.0) == [1.0, 5.0, 9.0]
    assert spread([1.0, 1.0, 9.0], 2.0) == [0.0, 2.0, 9.0]


def test_labels_lose_their_options_unless_that_makes_them_equal():
    found = short_labels(["halo (block_size=4)", "window (window_size=4)", "window (window_size=8)"])
    assert found == ["halo", "window (window_size=4)", "window (window_size=8)"]
