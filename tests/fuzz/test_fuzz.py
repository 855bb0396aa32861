"""A short run of the fuzzer; ``make fuzz`` is the long one, docs/reliability.md says what it found."""

from __future__ import annotations

import pytest

from .run import Tally, in_turn, one, shape_of

CASES = 200


@pytest.mark.parametrize("kind", ["calls", "invalid", "files"])
def test_every_case_is_right_or_refused_in_one_clear_sentence(kind):
    tally = Tally(kind)
    for number, how, what in in_turn(kind, 0, CASES, seed=1):
        tally.take(("wrong", number, what) if how == "wrong" else ("tally", number, {f"{how}: {what}": 1}))
    assert not tally.wrong, tally.told()
    assert tally.as_dict()["held"] > CASES / 2


@pytest.mark.parametrize("kind", ["calls", "invalid", "files"])
def test_a_number_makes_the_same_case_again(kind):
    assert [one(kind, number, 3) for number in range(5)] == [one(kind, number, 3) for number in range(5)]


def test_faults_that_differ_in_numbers_alone_count_together():
    assert shape_of("out: differs by 2.9e-01 (may 4e-02) | native") == shape_of("out: differs by 1.0e+00 (may 3e-05) | tiled")
