"""Strip attention: queries and keys of one channel per head, keys and values of a map made smaller by a strided convolution.

    p = LN(DW_rxr,r(x));  y = W_o softmax(q k^T / sqrt(s)) v    q of x, k and v of p;  q, k: s channels per head, v: C / heads
Cost: N^2 (s heads + C) / r^2 multiply-adds. Source: Xu et al., S2AFormer, arXiv:2505.22195.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ...checks import check_integer, checked
from ...ops import Source
from ...ops.calls.footprint import Footprint
from ...ops.patterns import Dense
from ...ops.tracing import count_steps
from ..pools import PoolKV
from .base import SplitMixer, check_sizes_of
from .registry import register_mixer


@register_mixer("strip")
class StripAttention(SplitMixer):
    """Attention compressed twice: fewer keys, and queries and keys far thinner than values.

    Args:
        dim, heads: channels and attention heads; values have ``dim // heads`` channels per head.
        ratio: tokens per key on an axis; 1 pools nothing. Where it does not divide a grid, zeros are appended.
        strip: channels per head of queries and keys, ``dim // heads`` for ordinary attention.
        pool: what makes the smaller map, ``"conv"``, a depthwise convolution, or the ``"mean"``; a norm follows either.
        rank: number of grid axes.
        **projections: see :class:`AttentionMixer`.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads``; a strip or a ratio below 1; an unknown pool.
    """

    settled: ClassVar[tuple[str, ...]] = ("head_dim", "value_dim")

    @checked()
    def __init__(
        self,
        dim: int,
        heads: int,
        ratio: int = 2,
        *,
        strip: int = 1,
        pool: Literal["conv", "mean"] = "conv",
        rank: int = 2,
        **projections,
    ) -> None:
        check_sizes_of(dim, heads)
        check_integer("strip", strip, 1)
        check_integer("ratio", ratio, 1)
        super().__init__(dim, heads, head_dim=strip, value_dim=dim // heads, **projections)
        self.ratio = ratio
        self.pool: nn.Module = nn.Identity()
        if ratio > 1:
            self.rank = rank if pool == "conv" else None
            conv: dict[str, Any] = {"dim": dim, "groups": dim, "rank": rank} if pool == "conv" else {}
            self.pool = PoolKV(pool, ratio, after=nn.LayerNorm(dim, **self.factory), **conv, **self.factory)

    def sources(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Source]:
        grid = tuple(q.shape[1:-2])
        own = tuple(k.shape[1:-2]) == tuple(count_steps(n, self.ratio) for n in grid)  # a context may lie on a grid of its own
        return [Source(k, v, Dense(), footprint=Footprint(grid, "windows", self.ratio) if own else None)]

    def forward(self, x: Tensor, extra: Tensor | None = None, *, context: Tensor | None = None) -> Any:
        """Mix tokens, see :meth:`AttentionMixer.forward`; keys and values come from the pooled context, or the pooled ``x``."""
        self.check_tokens(x, extra, context)
        return super().forward(x, extra, context=self.pool(x if context is None else context))
