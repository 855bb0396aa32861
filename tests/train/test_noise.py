"""Reports claim what is beyond noise, and nothing else."""

from __future__ import annotations

import re

import pytest
from torch import nn

from regard.compare import figures
from regard.compare.noise import fastest, frontier, more_accurate, most_accurate, standard_error
from regard.compare.report import _accuracies, _latencies, _over_identity, _table
from regard.compare.study import Outcome


def outcome(name: str, accuracy: float, low: float, middle: float, high: float) -> Outcome:
    times = {"latency_ms": middle, "latency_low_ms": low, "latency_high_ms": high}
    numbers = dict.fromkeys(("parameters", "flops", "training_bytes", "large_flops", "large_inference_bytes"), 1.0)
    numbers |= times | {f"large_{key}": value for key, value in times.items()}
    return Outcome(name, name, accuracy, [{"epoch": 1, "val_accuracy": accuracy}], 1.0, numbers, nn.Identity())


def names(outcomes: list[Outcome]) -> list[str]:
    return [one.name for one in outcomes]


def test_standard_error_is_that_of_a_share_with_one_right_and_one_wrong_more() -> None:
    assert standard_error(0.245, 77) == pytest.approx((19.865 / 79 * 59.135 / 79 / 77) ** 0.5)
    assert standard_error(1.0, 3) > 0.2


@pytest.mark.parametrize(("gap", "differ"), [(0.08, False), (0.16, True)])
def test_accuracies_differ_beyond_two_standard_errors_of_their_difference(gap, differ) -> None:
    # 100 images, one half right: 5 points each, 7.1 of the difference, 14.1 of noise
    one, other = outcome("a", 0.5 + gap / 2, 1, 1, 1), outcome("b", 0.5 - gap / 2, 1, 1, 1)
    assert more_accurate(one, other, 100) is differ
    assert not more_accurate(other, one, 100)
    assert not more_accurate(one, one, 100)


def test_the_demo_of_a_busy_machine_has_no_winner() -> None:
    found = [
        outcome("dense", 0.238, 95, 100, 130), outcome("window", 0.232, 99, 110, 150),
        outcome("neighborhood", 0.176, 200, 210, 220), outcome("bi-level routing", 0.245, 120, 140, 160),
    ]  # fmt: skip
    assert names(most_accurate(found, 77)) == ["bi-level routing", "dense", "window", "neighborhood"]
    assert names(fastest(found)) == ["dense", "window", "bi-level routing"]
    said = _accuracies(found, 77, 16)
    assert "no difference beyond noise between bi-level routing, dense, window and neighborhood (24.5% to 17.6%)" in said
    assert "no difference beyond noise between dense, window and bi-level routing (100.0 to 140.0 ms)" in _latencies(found)
    assert "<b>" not in said + _latencies(found)
    assert names(frontier(found, 77)) == ["dense"]
    assert 'id="frontier"' not in figures.pareto(found, 77)


def test_a_winner_beyond_noise_is_named() -> None:
    found = [outcome("a", 0.9, 1.0, 1.1, 1.2), outcome("b", 0.5, 0.5, 0.6, 0.7), outcome("c", 0.52, 0.8, 0.85, 0.9)]
    assert "<b>a</b> (90.0%)" in _accuracies(found, 1000, 5)
    assert "<b>b</b> (0.6 ms)" in _latencies(found)
    assert names(frontier(found, 1000)) == ["b", "a"]  # c costs more than b and gains nothing that could be told
    assert 'id="frontier"' in figures.pareto(found, 1000)


def test_bold_numbers_are_those_beyond_noise() -> None:
    tied = [outcome("a", 0.6, 1.0, 1.1, 1.2), outcome("b", 0.5, 1.1, 1.2, 1.3)]
    assert "60.0%" not in _bold(tied, 20)
    assert "1.1" not in _bold(tied, 20)
    apart = [outcome("a", 0.9, 1.0, 1.1, 1.15), outcome("b", 0.5, 1.2, 1.3, 1.4)]
    assert {"90.0%", "1.1"} <= _bold(apart, 1000)
    assert "90.0%" not in _bold(apart, 1000, epochs=1)


def _bold(outcomes: list[Outcome], images: int, epochs: int = 5) -> set[str]:
    return set(re.findall(r'class="best">([^<]*)', _table(outcomes, 64, images, epochs)))


def test_one_epoch_says_nothing() -> None:
    found = [outcome("a", 0.9, 1, 1, 1), outcome("b", 0.1, 1, 1, 1)]
    assert _accuracies(found, 1000, 1) == "After one epoch accuracies say nothing about the mixers."


def test_mixing_is_said_to_gain_only_what_is_beyond_noise() -> None:
    without, good, little = outcome("identity", 0.4, 1, 1, 1), outcome("good", 0.6, 1, 1, 1), outcome("little", 0.41, 1, 1, 1)
    assert "All others beat identity, by at least 20.0 points" in _over_identity([without, good], 500)
    assert "Beyond noise, good beats identity" in _over_identity([without, good, little], 500)
    assert "Beyond noise, none beats identity" in _over_identity([without, little], 500)
