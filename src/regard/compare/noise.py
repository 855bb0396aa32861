"""What a comparison may claim: differences that are beyond its noise.

Two accuracies differ where they are more than two standard errors of their difference apart, both taken as shares of so many
independent images. Two latencies differ where their quartiles do not overlap. One seed is compared: how much another seed
would change is not in these.
"""

from __future__ import annotations

from collections.abc import Sequence

from .study import Outcome

ERRORS = 2.0
"""Standard errors of a difference below which it may be chance."""


def standard_error(accuracy: float, images: int) -> float:
    """Standard error of an accuracy over n independent images, with one right and one wrong more: few images prove little."""
    share = (accuracy * images + 1) / (images + 2)
    return (share * (1 - share) / max(1, images)) ** 0.5


def more_accurate(one: Outcome, other: Outcome, images: int) -> bool:
    """Whether the accuracy of one is above that of the other, beyond noise."""
    errors = standard_error(one.accuracy, images), standard_error(other.accuracy, images)
    return one.accuracy - other.accuracy > ERRORS * (errors[0] ** 2 + errors[1] ** 2) ** 0.5


def faster(one: Outcome, other: Outcome, prefix: str = "") -> bool:
    """Whether the latency of one is below that of the other, beyond noise; ``"large_"`` asks for that on large images."""
    return one.numbers[f"{prefix}latency_high_ms"] < other.numbers[f"{prefix}latency_low_ms"]


def most_accurate(outcomes: Sequence[Outcome], images: int) -> list[Outcome]:
    """The most accurate one, and those that noise does not tell from it, best first."""
    best = max(outcomes, key=lambda o: o.accuracy)
    ordered = sorted(outcomes, key=lambda o: -o.accuracy)
    return [o for o in ordered if not more_accurate(best, o, images)]


def fastest(outcomes: Sequence[Outcome], prefix: str = "") -> list[Outcome]:
    """Likewise of latencies."""
    ordered = sorted(outcomes, key=lambda o: o.numbers[f"{prefix}latency_ms"])
    return [o for o in ordered if not faster(ordered[0], o, prefix)]


def frontier(outcomes: Sequence[Outcome], images: int) -> list[Outcome]:
    """From the fastest on, each that costs more time and gains accuracy, both beyond noise; alone if there is no such."""
    kept: list[Outcome] = []
    for outcome in sorted(outcomes, key=lambda o: (o.numbers["latency_ms"], -o.accuracy)):
        if not kept or (faster(kept[-1], outcome) and more_accurate(outcome, kept[-1], images)):
            kept.append(outcome)
    return kept
