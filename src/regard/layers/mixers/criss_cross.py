"""Criss-cross attention: x + gamma softmax(q k^T) v over the tokens of the query's row and column, repeated.

Two repetitions with the same weights let every token see the whole grid.
Cost: tokens times the sum of the axis lengths. Source: Huang et al., CCNet, arXiv:1811.11721.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...checks import checked
from ...ops import Source
from ...ops import patterns as P
from .base import AttentionMixer
from .registry import register_mixer


@register_mixer("criss_cross", label="criss-cross", calls="sequence")
class CrissCrossAttention(AttentionMixer):
    """Attention along all axes under one softmax, without scale, as a residual whose weight ``gamma`` starts at zero.

    Args:
        dim: channels.
        heads: attention heads; 1 in the paper.
        recurrence: how often the same attention is applied.
        reduction: queries and keys are ``dim / reduction`` wide, all heads together.
        scale: factor on the logits.
        **projections: see :class:`AttentionMixer`; there is no projection of the output.
    """

    settled: ClassVar[tuple[str, ...]] = ("head_dim", "value_dim")

    @checked()
    def __init__(
        self, dim: int, heads: int = 1, *, recurrence: int = 2, reduction: int = 8, scale: float = 1.0, **projections
    ) -> None:
        if recurrence < 1 or reduction < 1:
            raise ValueError(f"recurrence and reduction must be at least 1; got {recurrence} and {reduction}")
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads; got dim={dim}, heads={heads}")
        width = max(dim // (reduction * heads), 1)
        super().__init__(dim, heads, head_dim=width, value_dim=dim // heads, scale=scale, **projections)
        self.recurrence = recurrence
        self.proj = nn.Identity()
        self.gamma = nn.Parameter(torch.zeros(1, **self.factory))

    def sources(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Source]:
        return [Source(k, v, reduce(or_, map(P.Axis, range(x.ndim - 2))))]

    def forward(self, x: Tensor, extra: Tensor | None = None, *, context: Tensor | None = None) -> Any:
        for _ in range(self.recurrence):
            if extra is None:
                x = x + self.gamma * super().forward(x, context=context)
            else:
                y, y_extra = super().forward(x, extra, context=context)
                x, extra = x + self.gamma * y, extra + self.gamma * y_extra
        return x if extra is None else (x, extra)
