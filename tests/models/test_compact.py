"""Compact pyramids: what a token knows of other places, its mixer has told it."""

from __future__ import annotations

import pytest
import torch

from regard import create_model
from regard.models import count_parameters, model_card


@pytest.mark.parametrize("name", ["compact_nano", "compact_small"])
def test_parameters_are_those_of_the_card(name: str) -> None:
    assert count_parameters(create_model(name, device="meta")) == model_card(name).params


@pytest.mark.parametrize(("mixer", "reach"), [("identity", 0), ("multi_head", 64)])
def test_without_mixing_a_token_depends_on_its_own_pixels_only(mixer: str, reach: int) -> None:
    model = create_model("compact_nano", num_classes=2, mixer=mixer).double().eval()
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    model.forward_features(image)[0, 3, 5].square().sum().backward()  # a token of 8 x 8 pixels
    seen = image.grad[0].abs().sum(0) > 0
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[max(24 - reach, 0) : 32 + reach, max(40 - reach, 0) : 48 + reach] = True
    assert torch.equal(seen, expected)


def test_patches_know_where_they_are() -> None:
    model = create_model("compact_nano", num_classes=0, mixer="identity").eval()
    features = model.forward_features(torch.zeros(1, 3, 32, 32))[0].flatten(0, 1)
    assert torch.pdist(features).min() > 1e-3
