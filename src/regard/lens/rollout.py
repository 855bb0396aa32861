"""Attention rollout: how much of each input token is in a token of the last layer, if attention were all that moves tokens.

    R = A_L' ... A_2' A_1',   A' = (1 - w) I + w A   with A reduced over heads, w = 1/2, rows divided by their sums

What a sink or padding takes of a row is not counted in its sum.

Cost: that of the maps once; linear in tokens in memory for the tokens that are asked about. Source: Abnar & Zuidema,
arXiv:2005.00928.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..checks import check_number, shown
from .captured import Map
from .layered import Shares, Step, beginning, steps_of, walk
from .maps import HEADS, reduce_heads


def rollout(maps: Iterable[Map], start: object = None, *, heads: str = "mean", attention_share: float = 0.5) -> Shares:
    """Follow attention from the last layer to the image.

    The attention of a pyramid is followed through its stages: a cell of the coarser is a window of the finer.

    Args:
        maps: from ``capture(model, lazy=True)``, with all queries.
        start: whose input to look for, see :func:`regard.lens.layered.beginning`: the class token or the mean of all cells
            by default.
        heads: ``"mean"``, ``"max"`` or ``"min"`` over heads.
        attention_share: the weight w of attention, the rest is that of the residual.

    Returns:
        :class:`Shares` ``(batch, 1, *grid)`` of the finest grid; they sum to one with those of the tokens that have no place.

    Raises:
        ValueError: see :func:`regard.lens.layered.steps_of` and :func:`regard.lens.layered.walk`; an unknown reduction; a
            share outside (0, 1].
    """
    steps = steps_of(maps)
    (first, *_) = (*steps[-1].inner, *steps[-1].outer)
    shares = beginning(steps, start, first.batch, *kind_of(first))
    return roll(steps, shares, heads=heads, attention_share=attention_share)


def roll(steps: list[Step], shares: Shares, *, heads: str, attention_share: float) -> Shares:
    """See :func:`rollout`: from shares on the grid of the last step."""
    if not isinstance(heads, str) or heads not in HEADS:
        raise ValueError(f"heads must be one of {HEADS}; got {repr(heads) if isinstance(heads, str) else shown(heads)}")
    if not 0.0 < check_number("attention_share", attention_share) <= 1.0:
        raise ValueError(f"attention_share must be in (0, 1]; got {attention_share}")

    def reduced(weights: Tensor, _: Tensor | None) -> Tensor:
        return reduce_heads(weights, heads)

    return walk(steps, shares, reduced, stay=1.0 - attention_share, move=attention_share, normalise=True)


def kind_of(found: Map) -> tuple[torch.dtype, torch.device]:
    like = next(found.stream(1))[1][0]
    return like.dtype, like.device
