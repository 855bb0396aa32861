"""Index tables: what the plans of :mod:`regard.ops.tiles.plan` say in numpy as tensors, once per plan and device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...caches import cached
from .plan import TileGroup, TilePlan


@dataclass
class Index:
    """Rows of tiles ``(n, t)``, relative to row ``base``.

    Where together they are a contiguous range of rows, each once, ``span`` is that range and ``inverse`` the tile row that
    belongs to each of its rows: putting tiles back is then a gather too, which is faster than a scatter. Where row ``(i, j)``
    is ``first + i * across + j * along``, ``steps`` is ``(first, across, along)`` and the tiles are a view.
    """

    rows: Tensor
    base: int
    span: tuple[int, int] | None = None
    inverse: Tensor | None = None
    steps: tuple[int, int, int] | None = None
    flat: Tensor = None  # type: ignore[assignment]  # set below

    def __post_init__(self) -> None:
        if self.flat is None:
            self.flat = self.rows.reshape(-1)

    def covers(self, count: int) -> bool:
        """Whether the tiles are all ``count`` rows of the table, in their order."""
        n, t = self.rows.shape
        return n * t == count and self.steps in ((0, t, 1), (0, 0, 1), (0, 1, 0))

    def put(self, target: Tensor, tiles: Tensor) -> None:
        """Write tile rows ``(n * t, width)`` to the rows of ``target`` they came from."""
        if self.inverse is None or self.span is None:
            self.of(target).index_copy_(0, self.flat, tiles)
        else:
            torch.index_select(tiles, 0, self.inverse, out=self._region(target, self.span))

    def merge(self, out: Tensor, lse: Tensor, tiles: Tensor, tiles_lse: Tensor) -> None:
        """Merge tile rows ``(n * t, heads * dim)`` with lse ``(n * t, heads)`` into rows that saw other keys."""
        if self.inverse is None or self.span is None:
            old_out, old_lse = self.of(out)[self.flat], self.of(lse)[self.flat]
        else:
            old_out, old_lse = self._region(out, self.span), self._region(lse, self.span)
            tiles, tiles_lse = tiles[self.inverse], tiles_lse[self.inverse]
        total = torch.logaddexp(old_lse, tiles_lse)
        base = total.masked_fill(total == -torch.inf, 0.0)
        shape = (*total.shape, -1)
        old_out.view(shape).mul_(torch.exp(old_lse - base).unsqueeze(-1))
        old_out.view(shape).addcmul_(tiles.view(shape), torch.exp(tiles_lse - base).unsqueeze(-1))
        if self.inverse is None or self.span is None:
            self.put(out, old_out)
            self.put(lse, total)
        else:
            old_lse.copy_(total)

    def of(self, table: Tensor) -> Tensor:
        """The part of a table that the rows count from."""
        return table[self.base :] if self.base else table

    def _region(self, target: Tensor, span: tuple[int, int]) -> Tensor:
        return target[self.base + span[0] : self.base + span[1]]

    def take(self, rows: Tensor) -> Tensor:
        """The tiles ``(n, t, width)`` of a table of rows."""
        return self.of(rows)[self.rows]

    def add(self, target: Tensor, tiles: Tensor) -> None:
        """Add tile rows ``(n * t, width)`` to the rows of ``target`` they came from; a row may stand in several tiles."""
        self.of(target).index_add_(0, self.flat, tiles)


class GroupTables:
    """The index tables of a tile group on a device, and what is derived from them, made once."""

    def __init__(self, group: TileGroup, plan: TilePlan, device: torch.device) -> None:
        self.queries = torch.from_numpy(group.queries).to(device)
        self.keys = torch.from_numpy(group.keys).to(device)
        self.kinds = torch.from_numpy(group.kinds).to(device)
        self.kind_names = group.kinds.astype(np.int32)
        self.offsets = None if group.offsets is None else torch.from_numpy(group.offsets).to(device)
        self.visible = None if group.mask is None else torch.from_numpy(group.mask).to(device)
        self.blind = None if group.blind is None else torch.from_numpy(group.blind).to(device)
        self.row = group.row
        self.tokens = (plan.queries, plan.keys)
        self.causal = plan.causal
        self._masks: dict[tuple, Tensor] = {}
        self._indices: dict[tuple, tuple[Index, Index]] = {}

    def mask(self, first: int, last: int, items: int, dtype: torch.dtype) -> Tensor | None:
        """Additive mask ``(items * (last - first), 1, tq, tk)`` of a range of tiles; equal ranges share one tensor."""
        if self.visible is None:
            return None
        key = (self.kind_names[first:last].tobytes(), items, dtype)
        if key not in self._masks:
            if len(self._masks) >= 64:
                self._masks.clear()
            visible = self.visible[self.kinds[first:last]][:, None]
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
            self._masks[key] = mask.repeat(items, 1, 1, 1)
        return self._masks[key]

    def indices(self, first: int, last: int, items: int) -> tuple[Index, Index]:
        """Rows of the queries and keys of a range of tiles in the first ``items`` batch items."""
        key = (first, last, items)
        if key not in self._indices:
            self._indices[key] = tuple(
                _analysed(_over_items(table[first:last], items, tokens))
                for table, tokens in zip((self.queries, self.keys), self.tokens, strict=True)
            )  # type: ignore[assignment]  # two of them
        return self._indices[key]

    def views(self, items: int) -> bool:
        """Whether all tiles of ``items`` batch items are views, so that nothing needs a buffer."""
        tiles = len(self.queries)
        alone = self.visible is None and all(index.steps is not None for index in self.indices(0, tiles, 1))
        return alone and all(index.steps is not None for index in self.indices(0, tiles, items))


def _over_items(table: Tensor, items: int, tokens: int) -> Tensor:
    if items == 1:
        return table
    return (torch.arange(items, device=table.device)[:, None, None] * tokens + table).flatten(0, 1)


def _analysed(rows: Tensor) -> Index:
    steps = _steps(rows)
    flat = rows.reshape(-1)
    first, last = int(flat.min()), int(flat.max()) + 1
    if last - first == len(flat):
        inverse = torch.full((last - first,), -1, dtype=torch.long, device=flat.device)
        inverse[flat - first] = torch.arange(len(flat), device=flat.device)
        if bool((inverse >= 0).all()):
            return Index(rows, 0, (first, last), inverse, steps)
    return Index(rows, 0, steps=steps)


def _steps(rows: Tensor) -> tuple[int, int, int] | None:
    n, t = rows.shape
    first = int(rows[0, 0])
    across = int(rows[1, 0]) - first if n > 1 else 0
    along = int(rows[0, 1]) - first if t > 1 else 0
    if across < 0 or along < 0:
        return None
    line = torch.arange(n, device=rows.device)[:, None] * across + torch.arange(t, device=rows.device) * along
    return (first, across, along) if torch.equal(rows, line + first) else None


@cached(256)
def tables_of(plan: TilePlan, device: torch.device) -> tuple[tuple[GroupTables, ...], ...]:
    """The tables of each part of a plan."""
    return tuple(tuple(GroupTables(group, plan, device) for group in part) for part in plan.parts)


def ranges(tiles: int, row: int, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of about ``limit`` tiles that are whole rows, or whole fractions of one, so that masks repeat."""
    if limit >= row:
        step = min(limit // row * row, tiles)
    else:
        step = math.ceil(row / math.ceil(row / limit))
        for start in range(0, tiles, row):
            for first in range(start, start + row, step):
                yield first, min(first + step, start + row)
        return
    for first in range(0, tiles, step):
        yield first, min(first + step, tiles)


@cached(64)
def block_tokens(grid: tuple[int, ...], block: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat tokens ``(blocks, block_tokens)`` of each block, and which of them lie in the grid (the others repeat one)."""
    tokens, real = np.zeros((1, 1), dtype=np.int64), np.ones((1, 1), dtype=bool)
    for length, size in zip(grid, block, strict=True):
        position = np.arange(-(-length // size) * size).reshape(-1, size)
        inside = position < length
        position = np.minimum(position, length - 1)
        tokens = (tokens[:, None, :, None] * length + position[None, :, None, :]).reshape(len(tokens) * len(position), -1)
        real = (real[:, None, :, None] & inside[None, :, None, :]).reshape(len(tokens), -1)
    return torch.from_numpy(tokens).to(device), torch.from_numpy(real).to(device)
