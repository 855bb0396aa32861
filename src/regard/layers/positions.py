"""Position encodings: learned biases over relative offsets, and what is added to tokens, queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.patterns import Ints, Pattern, Separable, as_pattern, grid_positions
from ..ops.rope import rope
from .conv import convolve_tokens, depthwise


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
        self.table: Tensor = nn.Parameter(torch.empty(heads, *[2 * e + 1 for e in extents], device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=self.std)

    def extra_repr(self) -> str:
        return f"{tuple(self.table.shape)}, {self.pattern!r}"


class OffsetEmbedding(nn.Module):
    """Relative embeddings: adds ``q . sum_a r_a[offset on axis a]`` to the logits, a bias that depends on the query.

    The sum becomes a part of ``q k^T`` itself, so that any backend computes it: keys get, per axis, ``span`` channels that say
    in which slot (coordinate modulo ``span``) they stand; queries get their products with the embeddings of those slots.

    Args:
        head_dim: width of a head.
        pattern: a separable pattern without dilation, of bounded reach.
        span: the most consecutive keys a query sees on an axis, a number or one per axis.
        rank: number of grid axes.

    Source: Ramachandran et al., arXiv:1906.05909; Vaswani et al., HaloNet, arXiv:2103.12731.
    """

    def __init__(self, head_dim: int, pattern: Separable, span: Ints, rank: int = 2, *, device=None, dtype=None) -> None:
        super().__init__()
        self.pattern = pattern
        self.spans = span if isinstance(span, tuple) else (span,) * rank
        sizes = [2 * pattern.extent(axis, None, rank) + 1 for axis in range(rank)]
        self.tables = nn.ParameterList(torch.empty(size, head_dim, device=device, dtype=dtype) for size in sizes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in self.tables:
            nn.init.trunc_normal_(table, std=table.shape[1] ** -0.5)

    def forward(self, q: Tensor, k: Tensor, q_start: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
        """Queries ``(batch, *grid, heads, head_dim)`` and keys with ``sum(span)`` channels more.

        ``q_start`` places the queries on the key grid; ``scale`` is the factor that ``attend`` will apply.
        """
        rank = len(self.spans)
        queries, keys = [q], [k]
        for axis, (span, table) in enumerate(zip(self.spans, self.tables, strict=True)):
            length = k.shape[1 + axis]
            at = torch.arange(q_start[axis], q_start[axis] + q.shape[1 + axis], device=q.device)[:, None]
            start = self.pattern.axis_window(axis, at, length, rank).start
            offset = start + (torch.arange(span, device=q.device) - start) % span - at  # (queries, slots)
            extent = table.shape[0] // 2
            embedded = table[offset.clamp(-extent, extent) + extent]  # (queries, slots, head_dim)
            products = torch.einsum("bn...d,nsd->bn...s", q.movedim(1 + axis, 1), embedded.to(q.dtype))
            queries.append(products.movedim(1, 1 + axis) / scale)
            slot = torch.nn.functional.one_hot(torch.arange(length, device=k.device) % span, span).to(k.dtype)
            slot = slot.reshape(length, *[1] * (rank - axis), span)
            keys.append(slot.expand(*k.shape[:-1], span))
        return torch.cat(queries, -1), torch.cat(keys, -1)


def resize_offset_table(table: Tensor, sizes: Sequence[int]) -> Tensor:
    """Resize a 2-D offset table ``(heads, rows, columns)`` bicubically, as fine-tuning at another window size does."""
    if tuple(table.shape[1:]) == tuple(sizes):
        return table
    kind = torch.promote_types(table.dtype, torch.float32)
    resized = nn.functional.interpolate(table[None].to(kind), size=tuple(sizes), mode="bicubic", align_corners=False)
    return resized[0].to(table.dtype)


def sincos(grid: Sequence[int], dim: int, *, base: float = 10000.0, device=None, dtype=None) -> Tensor:
    """The fixed table ``(*grid, dim)`` of sines and cosines; each axis owns ``dim / rank`` channels.

    Per axis: ``dim / (2 rank)`` sines, then as many cosines, of ``position * base ** (-i / count)``.

    Raises:
        ValueError: ``dim`` is not a multiple of twice the number of axes.

    Source: Vaswani et al., arXiv:1706.03762; for images: Chen et al., MoCo v3, arXiv:2104.02057.
    """
    rank = len(grid)
    if dim % (2 * rank):
        raise ValueError(f"dim must be a multiple of {2 * rank} on a grid of {rank} axes; got {dim}")
    count = dim // (2 * rank)
    frequencies = base ** (-torch.arange(count, device=device, dtype=torch.float64) / count)
    angles = grid_positions(grid, device=device)[..., None] * frequencies  # (tokens, rank, count)
    table = torch.cat((angles.sin(), angles.cos()), -1).reshape(*grid, dim)
    return table.to(dtype or torch.get_default_dtype())


class RotaryPositions(nn.Module):
    """Rotates queries and keys by their positions on the grid, see :func:`regard.ops.rope.rope`; no parameters.

    Source: Su et al., RoFormer, arXiv:2104.09864; axial form for images: Heo et al., arXiv:2403.13298.
    """

    def __init__(self, base: float = 10000.0) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return rope(x, positions, base=self.base)

    def extra_repr(self) -> str:
        return f"base={self.base:g}"


class ValueConv(nn.Module):
    """A depthwise convolution of tokens ``(batch, *grid, dim)``: the local term ``DW(v)`` that mixers add to attention.

    Args:
        dim: channels.
        kernel_size: extent on every axis.
        rank: number of grid axes.

    Source: Dong et al., CSWin Transformer (LePE), arXiv:2107.00652.
    """

    def __init__(self, dim: int, kernel_size: int = 5, rank: int = 2, *, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = depthwise(dim, kernel_size, rank, bias=bias, device=device, dtype=dtype)

    def forward(self, v: Tensor) -> Tensor:
        return convolve_tokens(self.conv, v)


class ConvPosition(ValueConv):
    """Conditional position encoding ``x + DW(x)`` of tokens ``(batch, *grid, dim)``.

    Source: Chu et al., CPVT, arXiv:2102.10882.
    """

    def __init__(self, dim: int, kernel_size: int = 3, rank: int = 2, *, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(dim, kernel_size, rank, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)
