"""A small model of every function that makes tables, found by itself, with random weights."""

from __future__ import annotations

from functools import cache
from inspect import signature

import torch
from contract import randomise
from torch import Tensor, nn

from regard import create_model, list_models
from regard.models import model_card


@cache
def families() -> dict[str, str]:
    """The smallest registered model of each function that makes tables."""
    smallest: dict[str, str] = {}
    for name in sorted(list_models(), key=lambda name: model_card(name).params):
        table = model_card(name).table
        smallest.setdefault(getattr(table, "func", table).__name__, name)
    return dict(sorted(smallest.items()))


SMALL = {  # what a table takes of these makes it tiny
    "dim": 32,
    "dims": (16, 32, 48),
    "head_dim": 8,
    "depth": 2,
    "depths": (1, 1, 1, 1),
    "stem_dim": 8,
    "plain": 1,
    "pretrain_size": 64,
}
SMALL_OTHERWISE = {
    "compact": {"depths": (1, 1)},
    "dependency_vit": {"heads": 4},
    "dualtoken_vit": {"depths": (1, 1, 1), "heads": (2, 2, 2)},
    "efficientvit_msra": {"depths": (1, 1, 2), "heads": (2, 4, 4), "head_dim": 4},
    "halonet": {"ratios": (0.5, 0.5, 0.5, 0.5)},
    "lookup_vit": {"size": (10, 9)},  # mixers work on the compressed tokens
    "moh_transnext": {"shared": (2, 2, 2, 2), "routed": (2, 2, 2, 2)},  # the router of a single routed head decides nothing
    "overlock": {
        "dims": (8, 12, 16, 24),
        "focus_depths": (2, 1),
        "focus_heads": (2, 1),
        "kernel_sizes": (7, 5, 7, 5),
        "features": 32,
    },
    "shvit": {"depths": (1, 1, 2), "parts": (None, 8, 8)},
    "volo": {"grid": (5, 5)},
}


def tiny(family: str, mixer: str | list[str] | None = None, **more) -> nn.Module:
    """A narrow model whose parameters and statistics are numbers that their names decide."""
    name = families()[family]
    taken = signature(model_card(name).table).parameters
    options = {key: value for key, value in SMALL.items() if key in taken} | SMALL_OTHERWISE.get(family, {})
    return randomise(create_model(name, num_classes=5, mixer=mixer, **options | more).eval())


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
