"""Exponents are those of the costs, and what exceeds the budget is left out and listed."""

from __future__ import annotations

import math
import time

import pytest
import torch

from regard import patterns as P
from regard.bench import count, growth
from regard.layers.mixers import list_mixers, mixer_card


@pytest.mark.parametrize("exponent", [0.0, 1.0, 4 / 3, 2.0])
def test_exponent_of_a_power_is_found_exactly(exponent: float) -> None:
    tokens = [side**2 for side in growth.SIDES]
    assert growth.fitted_exponent(tokens, [3.0 * n**exponent for n in tokens]) == pytest.approx(exponent, abs=1e-12)


def test_exponent_is_that_of_the_larger_half() -> None:
    tokens = [1, 2, 4, 8, 16, 32, 64]
    costs = [100.0, 100.0, 100.0, 64.0, 256.0, 1024.0, 4096.0]  # a floor, then n^2 from the fourth of seven on
    assert growth.fitted_exponent(tokens, costs) == pytest.approx(2.0)
    assert growth.fitted_exponent(tokens[::-1], costs[::-1]) == pytest.approx(2.0)


def test_exponent_is_the_least_squares_slope() -> None:
    tokens, costs = [1.0, 10.0, 100.0, 1000.0, 10000.0], [5.0, 5.0, 10.0, 400.0, 1000.0]
    x, y = torch.tensor(tokens[2:]).double().log(), torch.tensor(costs[2:]).double().log()
    design = torch.stack([x, torch.ones_like(x)], 1)
    slope = torch.linalg.lstsq(design, y[:, None]).solution[0, 0]
    assert growth.fitted_exponent(tokens, costs) == pytest.approx(float(slope))


def test_too_few_sizes_have_no_exponent_and_costs_of_zero_do_not_count() -> None:
    assert growth.fitted_exponent([4, 16], [1.0, 2.0]) is None
    assert growth.fitted_exponent([4, 8, 16, 32], [0.0, 0.0, 2.0, 8.0]) is None
    assert growth.fitted_exponent([1, 2, 4, 8, 16], [0.0, 1.0, 1.0, 2.0, 4.0]) == pytest.approx(1.0)


def test_what_would_exceed_the_budget_is_left_out_with_all_larger_sizes() -> None:
    sides = (2, 4, 8, 16)
    budget = growth.Budget(seconds=0.5, bytes=3e6, timing_seconds=0.0, rounds=2)
    subjects = {
        "quick": lambda side: lambda: torch.empty(side**2, dtype=torch.uint8),
        "slow": lambda side: lambda: time.sleep(0.004 * side),  # from 8 on: 16 times 32 ms is more than half a second
        "large": lambda side: lambda: torch.empty(1000 * side**2, dtype=torch.float32),
        "broken": lambda side: 1 / (side - 8),
    }
    cases = {case["case"].partition(", ")[2]: case for case in list(growth.grow(subjects, sides, budget))[-1]}
    measured = {name: [row["side"] for row in case["rows"]] for name, case in cases.items()}
    assert measured["quick"] == [2, 4, 8, 16]
    assert measured["slow"] == [2, 4, 8]
    assert cases["slow"]["left_out"][0]["why"].startswith("would take up to ")
    assert measured["large"] == [2, 4, 8]  # 256 kB at 8 x 8; 16 times that is 4 MB
    assert cases["large"]["left_out"] == [{"side": 16, "why": "would hold up to 0.0 GB"}]
    assert [entry["side"] for entry in cases["broken"]["left_out"]] == [2, 4, 8, 16]
    assert cases["large"]["memory_exponent"] == pytest.approx(1.0, abs=0.01)
    assert [row["peak_bytes"] for row in cases["large"]["rows"]] == [16000, 64000, 256000]


def test_sizes_come_one_after_the_other_and_all_so_far_are_given() -> None:
    subjects = {"nothing": lambda side: lambda: None}
    sizes = [
        [row["tokens"] for row in cases[0]["rows"]]
        for cases in growth.grow(subjects, (8, 2, 4), growth.Budget(timing_seconds=0.0, rounds=1))
    ]
    assert sizes == [[4], [4, 16], [4, 16, 64]]


def test_every_pattern_and_every_mixer_is_measured() -> None:
    named = growth.subjects()
    missing = [name for name in list_mixers() if f"mixer {name}" not in named and mixer_card(name).computes]
    assert not missing
    q, k, v = torch.randn(3, 1, 14, 14, 4, 32)
    with torch.no_grad(), count() as cost:
        for compute in growth.OPERATORS.values():
            compute(q, k, v)
    seen = " ".join(pattern for layer in cost.layers.values() for pattern in layer.patterns)
    classes = ("Dense", "Causal", "Window", "Neighborhood", "Halo", "Grid", "Axis", "Blocks", "Tokens", "Clusters", "PerHead")
    assert [name for name in classes if f"{name}(" not in seen] == []
    concrete = {name for name in P.__all__ if isinstance(getattr(P, name), type) and issubclass(getattr(P, name), P.Pattern)}
    assert concrete - set(classes) == {"Pattern", "Separable", "Union", "Intersection"}
    assert " | " in seen  # a union; an intersection decomposes in the same way


def test_a_mixer_runs_at_every_size_it_is_measured_at() -> None:
    for name, make in growth.subjects().items():
        for side in (5, 16):
            with torch.no_grad():
                out = make(side)()
            assert torch.is_tensor(out), name
            assert math.prod(out.shape) == side**2 * growth.HEADS * growth.DIM, name
