"""Aggregated attention: each token sees its 3 x 3 neighbours and the pooled map under one softmax of cosines.

    q' = (q/|q| + e) softplus(t) log(n),   n keys in all
    y = W_o (softmax([q' k^T / |k| + b, q' p^T / |p| + cpb]) [v, v_p]  +  sum_o (q/|q| T + b_T)[o] v[o])
Cost: 9 + N / r^2 keys per query. Source: Shi, TransNeXt, arXiv:2311.17132.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import checked
from ...ops import Source
from ...ops import patterns as P
from ...ops.calls.source import HeadTable
from ...ops.local.kernels import apply_kernel
from ..linear import Chain
from ..pools import PoolKV
from ..positions import PooledOffsetMLP
from .base import AttentionMixer, SplitMixer
from .registry import register_mixer


class LengthScale(nn.Module):
    """Queries of cosine attention: ``(q + embedding) softplus(temperature) log(keys)``, a sharper softmax over more keys.

    Source: Shi, TransNeXt, arXiv:2311.17132.
    """

    @checked()
    def __init__(self, heads: int, head_dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.query_embedding = nn.Parameter(torch.empty(heads, 1, head_dim, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        start = math.log(math.expm1(1 / 0.24))  # softplus makes it 1 / 0.24
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), start, device=device, dtype=dtype))

    def forward(self, q: Tensor, keys: Tensor | int) -> Tensor:
        """Scale unit queries ``(batch, *grid, heads, head_dim)`` by the ``keys`` they see, a number or ``(*grid)``."""
        kind = torch.promote_types(q.dtype, torch.float32)
        log = math.log(keys) if isinstance(keys, int) else keys.to(kind).log().to(q.dtype)[..., None, None]
        return (q + self.query_embedding.squeeze(1)) * F.softplus(self.temperature).squeeze(1) * log


class CosineAttention(AttentionMixer):
    """Attention of every token to every token by length-scaled cosines, with a continuous bias over offsets.

    Args:
        dim, heads: channels and attention heads.
        trained_grid: rows and columns that the bias was trained on; those of the input by default.
        **projections: see :class:`AttentionMixer`.

    Source: Shi, TransNeXt (last stage), arXiv:2311.17132.
    """

    settled: ClassVar[tuple[str, ...]] = ("scale",)

    @checked()
    def __init__(self, dim: int, heads: int, *, trained_grid: tuple[int, int] | None = None, **projections) -> None:
        super().__init__(dim, heads, scale=1.0, **projections)
        self.trained_grid = trained_grid
        self.length_scale = LengthScale(heads, self.head_dim, **self.factory)
        self.cpb = PooledOffsetMLP(heads, **self.factory)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, context)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v

    def sources(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Source]:
        bias = self.cpb(q.shape[1:3], k.shape[1:3], self.trained_grid)
        return [Source(k, v, P.Dense(), bias=bias[None])]

    def attend(self, q: Tensor, sources: Sequence[Source], q_start: int | Sequence[int] = 0) -> Tensor:
        keys = sum(math.prod(source.k.shape[1:-2]) for source in sources)
        return super().attend(self.length_scale(q, keys), sources, q_start)


@register_mixer("aggregated", unseen=("trained_grid",))
class AggregatedAttention(SplitMixer):
    """Attention to a window around each token and to the pooled map at once, plus a learned local term.

    Keys and values of the window and of pooled tokens come from one layer. The local term is added after the softmax: what a
    neighbour gets in all may be negative or more than 1. ``extra`` tokens are seen beside both, and see every token.

    Args:
        dim, heads: channels and attention heads.
        window_size: neighbours per axis, odd; those outside the grid do not exist.
        ratio: tokens per pooled token on an axis.
        trained_grid: rows and columns that the bias of pooled tokens was trained on; those of the input by default.
        **projections: see :class:`AttentionMixer`.

    Raises:
        ValueError: an even window; input that is not a map of the right width; a context on another grid.
    """

    rank = 2
    one_grid = True
    settled: ClassVar[tuple[str, ...]] = ("scale",)

    @checked()
    def __init__(
        self,
        dim: int,
        heads: int,
        window_size: int = 3,
        ratio: int = 8,
        *,
        trained_grid: tuple[int, int] | None = None,
        **projections,
    ) -> None:
        super().__init__(dim, heads, scale=1.0, **projections)
        if window_size < 1 or window_size % 2 == 0:
            raise ValueError(f"window_size must be odd; got {window_size}")
        factory, taps = self.factory, window_size**2
        self.window_size, self.trained_grid = window_size, trained_grid
        self.pattern = P.Neighborhood(window_size, border="mask")
        before = Chain(nn.Linear(dim, dim, **factory), nn.GELU())
        self.pool = PoolKV("adaptive", ratio, before=before, after=nn.LayerNorm(dim, **factory))
        self.length_scale = LengthScale(heads, self.head_dim, **factory)
        self.cpb = PooledOffsetMLP(heads, **factory)
        self.local_bias = nn.Parameter(torch.empty(heads, taps, **factory))
        self.positional = nn.Parameter(torch.empty(heads, self.head_dim, taps, **factory))
        self.positional_bias = nn.Parameter(torch.zeros(heads, 1, taps, **factory))
        nn.init.trunc_normal_(self.local_bias, std=0.0004)
        nn.init.trunc_normal_(self.positional, std=0.02)

    def project_keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().project_keys(context)
        return F.normalize(k, dim=-1), v

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, context)
        return F.normalize(q, dim=-1), k, v

    def neighbours(self, grid: Sequence[int], device: torch.device) -> Tensor:
        """How many tokens the window of each token holds, ``(*grid)``."""
        side, counts = self.window_size // 2, []
        for length in grid:
            at = torch.arange(length, device=device)
            counts.append((at + side).clamp(max=length - 1) - (at - side).clamp(min=0) + 1)
        return counts[0][:, None] * counts[1]

    def slots(self) -> HeadTable:
        """The bias of each place in the window, as a table over the offsets that the pattern may have."""
        return HeadTable(self.local_bias.unflatten(-1, (self.window_size, self.window_size)), self.pattern)

    def forward(self, x: Tensor, extra: Tensor | None = None, *, context: Tensor | None = None) -> Any:
        self.check_tokens(x, extra, context)
        seen = x if context is None else context
        q, k, v = self.project(x, seen)
        pooled_k, pooled_v = self.project_keys(self.pool(seen))
        bias = self.cpb(q.shape[1:3], pooled_k.shape[1:3], self.trained_grid)
        others = []
        if extra is not None:
            extra_q, extra_k, extra_v = self.project(extra, extra)
            others = [Source(extra_k, extra_v, P.Dense())]
        sources = [
            Source(k, v, self.pattern, bias=self.slots()),
            Source(pooled_k, pooled_v, P.Dense(), bias=bias[None], footprint=self.pool.footprint(k.shape[1:-2])),
        ]
        keys = self.neighbours(q.shape[1:3], x.device) + math.prod(pooled_k.shape[1:3]) + sum(o.k.shape[1] for o in others)
        y = self.attend(self.length_scale(q, keys), sources + others)
        local = torch.einsum("b...hd,hdt->b...ht", q, self.positional) + self.positional_bias.squeeze(1)
        y = self.weigh_heads(y + apply_kernel(v, local, self.window_size), x, q)
        y = self._out(y, x, v, tuple(x.shape[1:-1]))
        if extra is None:
            return y
        scaled = self.length_scale(extra_q, math.prod(k.shape[1:-2]) + extra_k.shape[1])
        y_extra = self.weigh_heads(self.attend(scaled, [Source(k, v, P.Dense()), *others]), extra, extra_q)
        return y, self.project_out(y_extra.flatten(-2))
