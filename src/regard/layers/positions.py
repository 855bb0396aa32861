"""Position encodings: learned biases over relative offsets, and terms added to tokens, queries and keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import checked
from ..ops.calls.source import HeadTable
from ..ops.patterns import Dense, Ints, Pattern, Separable, as_pattern, grid_positions
from ..ops.tokens.rope import rope
from .conv import convolve_tokens, depthwise
from .linear import linear, taken_by
from .pools import RESIZE_MODES, resize_tokens


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

    @checked()
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


class MirroredBias(nn.Module):
    """A learned bias over the absolute values of the relative offsets of a pattern, axis by axis, any rank.

    ``quadrant`` is ``(heads, *offsets)``: on each axis ``extent + 1`` entries for the distances ``0 .. extent``; ``table`` is
    what :class:`OffsetBias` would hold.

    Args:
        heads: attention heads, each with a quadrant of its own.
        pattern: where the offsets come from, of bounded offsets.
        rank: number of grid axes.

    Source: Graham et al., LeViT, arXiv:2104.01136.
    """

    @checked()
    def __init__(self, heads: int, pattern: Pattern | str, rank: int = 2, *, device=None, dtype=None) -> None:
        super().__init__()
        self.pattern = as_pattern(pattern)
        sizes = [self.pattern.extent(axis, None, rank) + 1 for axis in range(rank)]
        self.quadrant: Tensor = nn.Parameter(torch.zeros(heads, *sizes, device=device, dtype=dtype))

    @property
    def table(self) -> Tensor:
        """The bias at every signed offset, ``(heads, *offsets)``."""
        table = self.quadrant
        for axis in range(1, table.ndim):
            others = table.flip(axis).narrow(axis, 0, table.shape[axis] - 1)
            table = torch.cat([others, table], axis)
        return table

    def extra_repr(self) -> str:
        return f"{tuple(self.quadrant.shape)}, {self.pattern!r}"


class DistanceBias(nn.Module):
    """A learned bias over Euclidean distances on the grid, rounded; beyond ``near`` ever more distances share one.

        index(r) = r up to near,  else near + near * log(r / near) / log(8), rounded, at most 2 * near

    ``table`` is ``(heads, 4 * near + 1)``, as released: distances are never negative, and only its second half is read.

    Args:
        heads: attention heads, each with a table of its own.
        near: the last distance that has an entry of its own.

    Source: Wu et al., iRPE, arXiv:2107.14222.
    """

    @checked()
    def __init__(self, heads: int, near: int = 20, *, device=None, dtype=None) -> None:
        super().__init__()
        self.near = near
        self.table: Tensor = nn.Parameter(torch.zeros(heads, 4 * near + 1, device=device, dtype=dtype))

    def over(self, grid: Sequence[int]) -> HeadTable:
        """The bias of a grid, to pass to ``Source(bias=...)``."""
        axes = [torch.arange(1 - n, n, device=self.table.device, dtype=torch.float64).square() for n in grid]
        squares = axes[0]
        for axis in axes[1:]:
            squares = squares.unsqueeze(-1) + axis
        distance = squares.sqrt().round()
        far = self.near * (1 + (distance.clamp(min=1) / self.near).log() / math.log(8))
        index = torch.where(distance <= self.near, distance, far.round().clamp(max=2 * self.near)).long()
        return HeadTable(self.table[:, index + 2 * self.near], Dense())

    def extra_repr(self) -> str:
        return f"heads={self.table.shape[0]}, near={self.near}"


def bias_parameters(model: nn.Module) -> set[str]:
    """The names of the learned tables of relative biases in a model."""
    kinds: dict[type[nn.Module], str] = {OffsetBias: "table", MirroredBias: "quadrant"}
    return {f"{name}.{own}" for name, m in model.named_modules() for kind, own in kinds.items() if isinstance(m, kind)}


class OffsetEmbedding(nn.Module):
    """Relative embeddings: adds ``q . sum_a r_a[offset on axis a]`` to the logits, a bias that depends on the query.

    The sum becomes a part of ``q k^T`` itself, so that any backend computes it: keys get, per axis, ``span`` channels that say
    in which slot (coordinate modulo ``span``) they stand; queries get their products with the embeddings of those slots.

    Args:
        head_dim: width of a head.
        pattern: a separable pattern without dilation, of bounded reach.
        span: the most consecutive keys a query sees on an axis, a number or one per axis.
        rank: number of grid axes.
        spare: entries of a table before those of the offsets that occur; published weights may have them.

    Source: Ramachandran et al., arXiv:1906.05909; Vaswani et al., HaloNet, arXiv:2103.12731.
    """

    @checked()
    def __init__(
        self, head_dim: int, pattern: Separable, span: Ints, rank: int = 2, *, spare: int = 0, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.pattern, self.spare = pattern, spare
        self.spans = span if isinstance(span, tuple) else (span,) * rank
        sizes = [2 * pattern.extent(axis, None, rank) + 1 + spare for axis in range(rank)]
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
            key = start + (torch.arange(span, device=q.device) - start) % span  # (queries, slots)
            offset = self.pattern.offset(axis, at, key, length, rank)
            extent = self.pattern.extent(axis, None, rank)
            embedded = table[offset.clamp(-extent, extent) + extent + self.spare]  # (queries, slots, head_dim)
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


class PooledOffsetMLP(nn.Module):
    """A bias computed from continuous offsets, query minus key, where the keys may be pooled: ``fc2(relu(fc1(c)))``.

    Offsets to the middle of the pooled tokens are divided by the reach of the grid a model was trained on, made 8 at its far
    end and spaced logarithmically, ``c = sign(o) log2(|o| + 1) / 3``. Every offset goes through the MLP once.

    Args:
        heads: attention heads.
        hidden: channels of the MLP.

    Source: Liu et al., Swin Transformer V2, arXiv:2111.09883; Shi, TransNeXt, arXiv:2311.17132.
    """

    @checked()
    def __init__(self, heads: int, hidden: int = 512, *, device=None, dtype=None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, heads, device=device, dtype=dtype)

    def forward(self, q_grid: Sequence[int], k_grid: Sequence[int], trained: Sequence[int] | None = None) -> Tensor:
        """The bias ``(heads, queries, keys)``.

        Args:
            q_grid: rows and columns of the queries.
            k_grid: rows and columns that adaptive pooling of the query grid leaves.
            trained: query grid of the training; ``q_grid`` by default.
        """
        device, dtype = taken_by(self.fc1)
        axes = [
            _spaced_offsets(n, m, length, device, dtype)
            for n, m, length in zip(q_grid, k_grid, q_grid if trained is None else trained, strict=True)
        ]
        (rows, row_index), (columns, column_index) = axes
        table = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).to(dtype)
        table = linear(self.fc2, torch.relu(linear(self.fc1, table)))  # (row offsets, column offsets, heads)
        bias = table[row_index[:, None, :, None], column_index[None, :, None, :]]
        return bias.flatten(2, 3).flatten(0, 1).movedim(-1, 0)


def _spaced_offsets(queries: int, keys: int, trained: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All offsets between an axis and its pooled self, spaced, and the place among them of each query and key."""
    kind = torch.promote_types(dtype, torch.float32)
    ranks = torch.arange(keys, device=device)
    first = (ranks * queries).div(keys, rounding_mode="floor")
    last = ((ranks + 1) * queries + keys - 1).div(keys, rounding_mode="floor") - 1
    twice = 2 * torch.arange(queries, device=device)[:, None] - (first + last)  # pooled tokens may lie between two tokens
    lowest = -((keys - 1) * queries // keys + queries - 1)
    highest = 2 * (queries - 1) - (-(-queries // keys) - 1)
    step = 1 if queries % keys else 2  # pools of one size: all middles are whole, or none
    offsets = torch.arange(lowest, highest + 1, step, device=device).to(kind) / 2
    reach = 8.0 * offsets / max(trained - 1, 1)
    return reach.sign() * torch.log2(reach.abs() + 1) / 3, (twice - lowest) // step


class PositionTable(nn.Module):
    """Adds a learned vector per place to tokens ``(batch, *grid, dim)`` on a grid of 1 to 3 axes.

    On another grid than the table's own the table is resized as fine-tuning at another resolution does: bicubically on two
    axes, linearly on one or three.

    Args:
        dim: channels.
        grid: lengths of the table's axes.
        std: standard deviation of the initial table.

    Source: Dosovitskiy et al., ViT, arXiv:2010.11929.
    """

    @checked()
    def __init__(self, dim: int, grid: Sequence[int], *, std: float = 0.02, device=None, dtype=None) -> None:
        super().__init__()
        if len(grid) not in RESIZE_MODES:
            raise ValueError(f"the grid of a position table has 1 to 3 axes; got {tuple(grid)}")
        self.std = std
        self.table: Tensor = nn.Parameter(torch.empty(1, *grid, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=self.std)

    def forward(self, x: Tensor) -> Tensor:
        table = self.table
        if x.ndim != table.ndim or x.shape[-1] != table.shape[-1]:
            axes = "rows, columns" if table.ndim == 4 else f"{table.ndim - 2} grid axes"
            raise ValueError(f"expected (batch, {axes}, {table.shape[-1]}); got {tuple(x.shape)}")
        if x.shape[1:-1] != table.shape[1:-1]:
            if table.ndim == 4:
                table = resize_offset_table(table.movedim(-1, 1)[0], x.shape[1:3]).movedim(0, -1)
            else:
                table = resize_tokens(table, tuple(x.shape[1:-1]))
        return x + table

    def adapted(self, name: str, table: Tensor) -> Tensor:
        """A checkpoint's table of another grid, resized to this one's.

        Raises:
            ValueError: a table of other axes or channels.
        """
        own = self.table
        if table.ndim != own.ndim or table.shape[0] != 1 or table.shape[-1] != own.shape[-1] or not table.numel():
            raise ValueError(f"expected (1, {', '.join(['grid'] * (own.ndim - 2))}, {own.shape[-1]})")
        if own.ndim == 4:
            return resize_offset_table(table.movedim(-1, 1)[0], own.shape[1:3]).movedim(0, -1)[None]
        kind = torch.promote_types(table.dtype, torch.float32)
        return resize_tokens(table.to(kind), tuple(own.shape[1:-1])).to(table.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.table.shape[1:])}"


class RotaryPositions(nn.Module):
    """Rotates queries and keys by their positions on the grid, see :func:`regard.ops.tokens.rope.rope`; no parameters.

    Source: Su et al., RoFormer, arXiv:2104.09864; axial form for images: Heo et al., arXiv:2403.13298.
    """

    @checked()
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

    @checked()
    def __init__(self, dim: int, kernel_size: int = 5, rank: int = 2, *, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = depthwise(dim, kernel_size, rank, bias=bias, device=device, dtype=dtype)

    def forward(self, v: Tensor) -> Tensor:
        return convolve_tokens(self.conv, v)


class ConvPosition(ValueConv):
    """Conditional position encoding ``x + DW(x)`` of tokens ``(batch, *grid, dim)``.

    Source: Chu et al., CPVT, arXiv:2102.10882.
    """

    @checked()
    def __init__(self, dim: int, kernel_size: int = 3, rank: int = 2, *, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(dim, kernel_size, rank, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)
