"""Bi-level routing attention: each region of queries sees the tokens of the k regions most similar to it, plus DW(v).

    regions: top-k of mean(q) mean(k)^T;  tokens: W_o (softmax(q k^T / sqrt(C)) v + DW(v)) over the routed regions
Cost: (S^2)^2 region scores and k N / S^2 keys per query. Source: Zhu et al., BiFormer, arXiv:2303.08810.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from ...checks import check_per_axis, checked
from ...ops import Source
from ...ops import patterns as P
from ...ops.calls.heads import repeat_heads
from ...ops.tokens import route
from ...ops.tracing import check_fixed, fill
from ..positions import ValueConv
from .base import AttentionMixer
from .registry import register_mixer


@register_mixer(
    "bi_level_routing",
    label="bi-level routing",
    tiny={"regions": 3, "topk": 2},
    compact=({"regions": 4, "topk": 4},),
    # regions as many as the paper's analysis asks for, (topk / 2 tokens^2)^(1/6) per axis, instead of 7 on every map
    varied={"regions growing": lambda grid: {"regions": max(2, round((2 * math.prod(grid) ** 2) ** (1 / 6)))}},
)
class BiLevelRoutingAttention(AttentionMixer):
    """Attention to the most similar regions of the grid. The routing carries no gradient.

    Args:
        dim, heads: channels and attention heads.
        regions: regions per axis.
        topk: regions a query sees; -1 for all.
        kernel_size: of the depthwise convolution of the values.
        pad: where the grid does not divide into regions, ``"mask"`` makes the last regions smaller and ``"token"`` pads the
            input with zeros, whose projections take part in routing and softmax (the official code).
        rank: number of grid axes.
        scale: factor on the logits, by default the whole query width ``^ -0.5``.
        **projections: see :class:`AttentionMixer`.

    Raises:
        ValueError: regions or a kernel below 1; a topk that is neither -1 nor between 1 and the number of regions; a grid of
            another rank; a context on another grid.
    """

    @checked(topk=-1)
    def __init__(
        self,
        dim: int,
        heads: int,
        regions: P.Ints = 7,
        topk: int = 4,
        kernel_size: int = 5,
        *,
        pad: Literal["mask", "token"] = "mask",
        rank: int = 2,
        scale: float | None = None,
        **projections,
    ) -> None:
        super().__init__(dim, heads, **projections)
        self.rank = rank
        self.lepe = ValueConv(self.heads * self.value_dim, kernel_size, rank, **self.factory)
        self.regions = check_per_axis("regions", regions, rank)
        if not isinstance(topk, int) or (topk != -1 and not 1 <= topk <= math.prod(self.regions)):
            raise ValueError(f"topk must be -1 (all) or from 1 to {math.prod(self.regions)} regions; got {topk}")
        self.topk, self.pad = topk, pad
        self.scale = self.widths[0] ** -0.5 if scale is None else scale

    def padding(self, grid: Sequence[int]) -> Sequence[int]:
        if self.pad == "mask":
            return (0,) * len(grid)
        return [fill(n, count) for n, count in zip(grid, self.regions, strict=True)]

    def route(self, q: Tensor, k: Tensor) -> P.Pattern:
        """The regions each region sees, from queries and keys ``(batch, *grid, heads, head_dim)``."""
        if q.shape[1:-2] != k.shape[1:-2]:
            raise ValueError(f"regions are routed on one grid; got queries {tuple(q.shape)} and keys {tuple(k.shape)}")
        check_fixed("bi-level routing", k.shape[1:-2])
        if self.topk == -1:
            return P.Dense()
        block = route.block_sizes(q.shape[1:-2], self.regions)
        k = repeat_heads(k, self.heads)
        scores = route.affinity(*(route.summaries(t.detach().flatten(-2), block) for t in (q, k)))
        return route.top_k(scores, self.topk, block)

    def sources(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Source]:
        return [Source(k, v, self.route(q, k))]

    def finish(self, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return y + self.lepe(repeat_heads(v, self.heads).flatten(-2))
