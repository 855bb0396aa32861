"""HiLo attention: some heads look closely at a window, the others look far at the pooled map; nothing mixes the two groups.

    concat(W_h attention(x) in windows of s x s,  W_l softmax(q k^T / sqrt(d)) v)   with q = W_q x and k, v = W_kv mean_sxs(x)
Cost: s^2 + N / s^2 keys per query. Source: Pan et al., LITv2, arXiv:2205.13213.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import checked
from ...ops import Source
from ...ops.calls.footprint import Footprint
from ...ops.patterns import Dense
from ...ops.tracing import fill
from ..pools import PoolKV
from .base import AttentionMixer, SplitMixer, TokenMixer
from .registry import register_mixer
from .window import WindowAttention


class PooledAttention(SplitMixer):
    """Attention to a context of windows, each pooled into one token of the same grid.

    Args:
        dim, heads: channels and attention heads.
        window_size: tokens per axis that were pooled into one.
        **projections: see :class:`regard.layers.mixers.AttentionMixer`.
    """

    @checked()
    def __init__(self, dim: int, heads: int, window_size: int, **projections) -> None:
        super().__init__(dim, heads, **projections)
        self.window_size = window_size

    def sources(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Source]:
        return [Source(k, v, Dense(), footprint=Footprint(tuple(q.shape[1:-2]), "windows", self.window_size))]


@register_mixer("hilo", label="HiLo", calls="parallel")
class HiLoAttention(TokenMixer):
    """Heads for high frequencies in windows, heads for low frequencies over pooled tokens.

    Windows of one token leave nothing to pool: all heads are then dense attention.

    Args:
        dim, heads: channels and heads of both groups; ``extra`` tokens see, and are seen by, both.
        window_size: tokens per axis of a window, and of what is pooled into one token.
        alpha: share of the heads, rounded down, that attend to pooled tokens; 0 for windows alone, 1 for pooled tokens alone.
        pad: where the grid does not divide into windows, ``"mask"`` clips the last ones (which average their own tokens only)
            and ``"token"`` pads the input with zeros that take part (the official detection code).
        rank: number of grid axes.
        **projections: see :class:`regard.layers.mixers.AttentionMixer`.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads``; an alpha outside 0 to 1; an unknown pad.
    """

    settled: ClassVar[tuple[str, ...]] = ("head_dim",)
    hands_to: ClassVar[type] = AttentionMixer

    @checked()
    def __init__(
        self,
        dim: int,
        heads: int,
        window_size: int = 2,
        alpha: float = 0.5,
        *,
        pad: Literal["mask", "token"] = "mask",
        rank: int = 2,
        **projections,
    ) -> None:
        super().__init__(dim, heads)
        if not 0.0 <= alpha <= 1.0 or window_size < 1:
            raise ValueError(f"alpha must be from 0 to 1 and window_size at least 1; got {alpha=}, {window_size=}")
        self.window_size, self.rank = window_size, rank
        self.pad = pad
        low = heads if window_size == 1 else int(heads * alpha)
        head_dim = dim // heads
        self.pool = PoolKV("mean", window_size)
        self.high: WindowAttention | None = None
        self.low: PooledAttention | None = None
        if low < heads:
            self.high = WindowAttention(
                dim, heads - low, window_size, relative_bias=False, pad=pad, rank=rank, head_dim=head_dim, **projections
            )
        if low:
            self.low = PooledAttention(dim, low, window_size, head_dim=head_dim, **projections)
        for group in self.groups:  # each keeps its width
            width = group.heads * head_dim
            group.proj = nn.Linear(width, width, bias=projections.get("proj_bias", True), **group.factory)

    @property
    def groups(self) -> list[WindowAttention | PooledAttention]:
        return [group for group in (self.high, self.low) if group is not None]

    @property
    def backend(self) -> str:
        return self.groups[0].backend

    @backend.setter
    def backend(self, name: str) -> None:
        for group in self.groups:
            group.backend = name

    def pooled(self, x: Tensor) -> Tensor:
        """The tokens that keys and values of low frequencies are made of."""
        if self.pad == "token":
            pads = [n for length in reversed(x.shape[1:-1]) for n in (0, fill(length, self.window_size))]
            x = F.pad(x, [0, 0, *pads]) if any(pads) else x
        return self.pool(x)

    def forward(self, x: Tensor, extra: Tensor | None = None, *, context: Tensor | None = None) -> Any:
        """Mix tokens.

        Args:
            x: ``(batch, *grid, dim)``.
            extra: tokens outside the grid ``(batch, n, dim)``.
            context: ``(batch, *grid, dim)``, where keys and values come from; ``x`` by default.

        Returns:
            A tensor like ``x``, high frequencies first; with ``extra`` also one like it.
        """
        self.check_tokens(x, extra, context)
        parts = [] if self.high is None else [self.high(x, extra, context=context)]
        if self.low is not None:
            parts.append(self.low(x, extra, context=self.pooled(x if context is None else context)))
        if extra is None:
            return torch.cat(parts, -1)
        y, y_extra = zip(*parts, strict=True)
        return torch.cat(y, -1), torch.cat(y_extra, -1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window_size={self.window_size}"
