"""What is said about cost is what was computed."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from torch import nn

from regard.compare.measure import flops, latencies, peak_memory, si
from regard.models import create_model


def test_flops_of_a_compact_model_equal_the_sum_written_out() -> None:
    classes, dim, grid = 5, 32, (6, 8)
    model = create_model("compact_nano", num_classes=classes, mixer=("neighborhood", {"kernel_size": 3}))
    found = flops(model, torch.zeros(2, 3, 24, 32))

    def block(tokens: int, width: int) -> int:
        return 2 * tokens * (3 * width * width + width * width + 2 * 2 * width * width)

    tokens = grid[0] * grid[1]
    attention = 2 * (2 * 2 * tokens * 9 * dim) + 2 * (2 * 2 * (tokens // 4) * 9 * 2 * dim)
    embed = 2 * tokens * dim * 3 * 16
    merge = 2 * (tokens // 4) * 4 * dim * 2 * dim
    expected = embed + 2 * block(tokens, dim) + merge + 2 * block(tokens // 4, 2 * dim) + 2 * 2 * dim * classes + attention
    assert found["attention_flops"] == attention
    assert found["flops"] == expected


def test_peak_memory_is_the_most_that_was_held_at_once() -> None:
    megabyte = 2**20

    def work() -> None:
        a = torch.empty(4 * megabyte, dtype=torch.uint8)
        del a
        b = torch.empty(3 * megabyte, dtype=torch.uint8)
        c = torch.empty(2 * megabyte, dtype=torch.uint8)
        del b, c

    assert peak_memory(work, torch.device("cpu")) == 5 * megabyte


def test_dense_attention_holds_no_weights_but_its_training_step_holds_more_than_inference() -> None:
    model = create_model("compact_nano", num_classes=2)
    images = torch.zeros(2, 3, 64, 64)

    def infer() -> None:
        with torch.inference_mode():
            model(images)

    def step() -> None:
        model(images).sum().backward()

    infer()
    step()
    assert peak_memory(step, images.device) > 1.5 * peak_memory(infer, images.device) > 0


def test_latencies_take_turns_and_quartiles_enclose_the_median() -> None:
    order: list[str] = []

    class Watched(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(self.name)
            return x + 1

    found = latencies({"a": Watched("a"), "b": Watched("b")}, torch.zeros(1), seconds=0.01)
    turns = [name for name, _ in groupby(order)]
    assert turns == ["a", "b"] * (len(turns) // 2)
    assert len(turns) >= 2 * 5
    for one in found.values():
        assert one["repeats"] >= 5
        assert one["latency_low_ms"] <= one["latency_ms"] <= one["latency_high_ms"]


@pytest.mark.parametrize(("value", "text"), [(7, "7"), (999, "999"), (12345, "12.3 k"), (3_456_789, "3.46 M")])
def test_numbers_have_three_digits_and_a_prefix(value: float, text: str) -> None:
    assert si(value) == text
