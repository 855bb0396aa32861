"""Position encodings: learned biases over relative offsets, and what is added to tokens, queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.patterns import Pattern, as_pattern


class OffsetBias(nn.Module):
    """A learned bias over the relative offsets of a pattern, any rank; pass it to ``Source(bias=...)``.

    ``table`` is ``(heads, *offsets)``: on each axis ``2 * extent + 1`` entries for the offsets (key minus query, in the
    pattern's own steps) ``-extent .. extent``.

    Args:
        heads: attention heads, each with a table of its own.
        pattern: where the offsets come from; windows, neighborhoods, halos and grids have bounded offsets.
        rank: number of grid axes.
        grid: the largest grid, for patterns that see arbitrarily far (dense, axes).
        std: standard deviation of the initial table.

    Source: Shaw et al., arXiv:1803.02155; Liu et al., Swin Transformer, arXiv:2103.14030.
    """

    def __init__(
        self,
        heads: int,
        pattern: Pattern | str,
        rank: int = 2,
        *,
        grid: Sequence[int] | None = None,
        std: float = 0.02,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.pattern = as_pattern(pattern)
        self.std = std
        extents = [self.pattern.extent(axis, grid[axis] if grid else None, rank) for axis in range(rank)]
        self.table = nn.Parameter(torch.empty(heads, *[2 * e + 1 for e in extents], device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=self.std)

    def extra_repr(self) -> str:
        return f"{tuple(self.table.shape)}, {self.pattern!r}"


def resize_offset_table(table: Tensor, sizes: Sequence[int]) -> Tensor:
    """Resize a 2-D offset table ``(heads, rows, columns)`` bicubically, as fine-tuning at another window size does."""
    if tuple(table.shape[1:]) == tuple(sizes):
        return table
    resized = nn.functional.interpolate(table[None].float(), size=tuple(sizes), mode="bicubic", align_corners=False)
    return resized[0].to(table.dtype)
