"""A small model of every function that makes tables, with random weights."""

from __future__ import annotations

import torch
from contract import randomise
from torch import Tensor, nn

from regard.models import families, model_card

__all__ = ["families", "image_of_ten_tokens", "mixing", "tiny"]


def tiny(family: str, mixer: str | list[str] | None = None, **more) -> nn.Module:
    """A narrow model whose parameters and statistics are numbers that their names decide."""
    model, _ = model_card(families()[family]).tiny(mixer=mixer, **more)
    return randomise(model.eval())


def mixing(model: nn.Module) -> list[list[int]]:
    """Of each stage, the numbers of heads of its blocks that have a mixer."""
    return [
        [stage.heads for i in range(stage.depth) if stage.period[i % len(stage.period)].mixer is not None]
        for stage in model.spec.stages
    ]


def image_of_ten_tokens(model: nn.Module) -> Tensor:
    """No whole number of patches; where mixing begins it has 10 x 9 tokens, more than windows and neighborhoods hold."""
    first = next((i for i, blocks in enumerate(mixing(model)) if blocks), 2)  # overlock mixes in its last stages
    side = model.feature_info[first]["reduction"]
    return torch.randn(1, 3, 10 * side - 1, 9 * side - 1, generator=torch.Generator().manual_seed(0))
