"""Window attention: softmax(q k^T / sqrt(d) + b) v inside windows of M x M tokens, shifted in every other block.

Cost: linear in tokens, M^2 keys per query. Source: Liu et al., Swin Transformer, arXiv:2103.14030.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ...checks import check_per_axis, checked
from ...ops import patterns as P
from ...ops.tracing import fill
from .base import PatternMixer
from .registry import register_mixer


@register_mixer(
    "window",
    tiny={"window_size": 4, "shift": 2},
    compact=({"window_size": 8}, {"window_size": 8, "shift": 4}),
)
class WindowAttention(PatternMixer):
    """Attention inside (shifted) windows with a learned relative bias.

    Args:
        dim, heads: channels and attention heads.
        window_size: tokens per axis, a number or one per axis.
        shift: how far the windows are moved.
        relative_bias: whether to learn a bias over offsets.
        pad: where the grid does not divide into windows, ``"mask"`` clips the last windows and ``"token"`` pads the input
            with zeros, whose projections take part in the softmax (the official dense-task version).
        rank: number of grid axes.
        **projections: see :class:`AttentionMixer`.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        heads: int,
        window_size: P.Ints = 7,
        shift: P.Ints = 0,
        *,
        relative_bias: bool = True,
        pad: Literal["mask", "token"] = "mask",
        rank: int = 2,
        **projections,
    ) -> None:
        super().__init__(dim, heads, P.Window(window_size, shift), relative_bias=relative_bias, rank=rank, **projections)
        self.window_size = window_size
        self.pad: str = pad

    def padding(self, grid: Sequence[int]) -> Sequence[int]:
        if self.pad == "mask":
            return (0,) * len(grid)
        return [fill(n, size) for n, size in zip(grid, check_per_axis("window_size", self.window_size, len(grid)), strict=True)]
