"""The tile walk: how many key tiles each query tile of a fused attention kernel visits, before any kernel is written.

    visited(query tile) = product over axes of ceil(stop(last query) / T_k) - floor(start(first query) / T_k)

Windows at coordinates inside their dilation group, tiles likewise: every group is tiled by itself. A tile of one number on a
grid of several axes stands for consecutive row-major tokens instead, which visit every key tile that holds a visible pair.

Everything here is numpy on plain integers. Cost: linear in the length of the axes; for row-major tiles, tiles times tokens.
Source: Hassani et al., GNA, arXiv:2504.16922; the walk: Hassani et al., FNA, arXiv:2403.04690.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ...checks import check_grid, check_sizes
from ..calls.geometry import AxisClasses, Geometry
from ..patterns import Pattern, as_pattern

Tile = int | Sequence[int]


@dataclass(frozen=True)
class TileWalk:
    """What a kernel with these tiles computes of one attention, per batch item and head.

    Attributes:
        q_tile, k_tile: tokens of a tile on each axis; one number on a grid of several axes means row-major tiles.
        q_tiles, k_tiles: tiles of dense attention: those that cover the query grid and the key grid.
        visited: pairs of a query tile and a key tile that are computed.
        most: key tiles of the query tile that visits the most.
        attended_pairs, computed_pairs, dense_pairs: pairs of tokens that are visible, that are computed (whole tiles, padding
            included), and all.
        mask_free: whether every pair of tokens in a visited tile is visible, so that a kernel needs no mask but for padding.
    """

    q_tile: tuple[int, ...]
    k_tile: tuple[int, ...]
    q_tiles: int
    k_tiles: int
    visited: int
    most: int
    attended_pairs: int
    computed_pairs: int
    dense_pairs: int
    mask_free: bool

    @property
    def bound(self) -> float:
        """Dense over attended pairs: the speed-up over dense attention if no tile were wasted."""
        return self.dense_pairs / self.attended_pairs if self.attended_pairs else math.inf

    @property
    def tile_bound(self) -> float:
        """Tiles of dense attention over visited tiles: the speed-up if all query tiles share the machine evenly."""
        return self.q_tiles * self.k_tiles / self.visited if self.visited else math.inf

    @property
    def worst_bound(self) -> float:
        """The speed-up if every query tile took as long as the slowest."""
        return self.k_tiles / self.most if self.most else math.inf

    @property
    def wasted(self) -> float:
        """Share of the computed pairs that is not attended."""
        return 1 - self.attended_pairs / self.computed_pairs if self.computed_pairs else 0.0

    def as_dict(self) -> dict[str, object]:
        """All fields and ratios as plain data."""
        ratios = {name: getattr(self, name) for name in ("bound", "tile_bound", "worst_bound", "wasted")}
        return {**asdict(self), **ratios}


def walk_tiles(
    pattern: Pattern | str, grid: Sequence[int], q_tile: Tile, k_tile: Tile, *, k_grid: Sequence[int] | None = None
) -> TileWalk:
    """Walk the tiles of a pattern that is a product of one window per axis.

    Args:
        pattern: such as ``Neighborhood``, ``Window``, ``Halo`` or ``Grid``, or its text form.
        grid, k_grid: query grid and key grid (the same by default).
        q_tile, k_tile: tokens per axis of the query and key tiles; one number on several axes means row-major tiles.

    Raises:
        ValueError: a pattern of another kind; tiles that are not positive, or not of one number or one per axis.
    """
    pattern, grid = as_pattern(pattern), check_grid("grid", grid)
    k_grid = grid if k_grid is None else check_grid("k_grid", k_grid)
    product = pattern.as_product(len(k_grid))
    if product is None or (pattern.flat and len(grid) != len(k_grid)):
        raise ValueError(f"expected a pattern of one window per axis, such as Neighborhood(7); got {pattern!r}")
    pattern.check(grid, k_grid)
    q_sizes, k_sizes = _sizes("q_tile", q_tile, len(grid)), _sizes("k_tile", k_tile, len(grid))
    if len(q_sizes) != len(k_sizes):
        raise ValueError(f"both tiles must be row-major or have {len(grid)} axes; got {q_sizes} and {k_sizes}")
    geometry = Geometry.on(pattern.spec, grid, k_grid)
    axes, padded = [geometry.axis(axis, product) for axis in range(geometry.rank)], geometry.padded
    attended = int(pattern.degree(grid, k_grid).sum())
    if len(q_sizes) == len(grid):
        each = [_walk_axis(axis, *sizes) for axis, *sizes in zip(axes, q_sizes, k_sizes, padded, strict=True)]
        visited, most = (math.prod(counts) for counts in zip(*((int(v.sum()), int(v.max())) for v, _ in each), strict=True))
        mask_free = all(free for _, free in each)
        q_tiles, k_tiles = (math.prod(map(_cover, *pair)) for pair in ((grid, q_sizes), (k_grid, k_sizes)))
    else:
        visits, mask_free = _walk_raster(axes, grid, padded, q_sizes[0], k_sizes[0])
        visited, most = int(visits.sum()), int(visits.max())
        q_tiles, k_tiles = _cover(math.prod(grid), q_sizes[0]), _cover(math.prod(k_grid), k_sizes[0])
    return TileWalk(
        q_sizes, k_sizes, q_tiles, k_tiles, visited, most, attended,
        visited * math.prod(q_sizes) * math.prod(k_sizes), math.prod(grid) * math.prod(k_grid), mask_free,
    )  # fmt: skip


def _sizes(name: str, tile: Tile, rank: int) -> tuple[int, ...]:
    checked = check_sizes(name, tile)
    sizes = checked if isinstance(checked, tuple) else (checked,)
    if len(sizes) not in (1, rank):
        raise ValueError(f"{name} must be one positive number, or one per axis of {rank}; got {tile!r}")
    return sizes


def _cover(length: int, size: int) -> int:
    return -(-length // size)


def _walk_axis(axis: AxisClasses, q_size: int, k_size: int, length: int):
    """Key tiles that each query tile of an axis visits, over all residue classes, and whether none needs a mask."""
    visits, free = [], True
    for residue, members in axis.members():
        low, high = axis.low[members], axis.high[members]
        points = (length - residue + axis.step - 1) // axis.step
        for first in range(0, len(low), q_size):
            a, b = low[first : first + q_size], high[first : first + q_size]
            some = b > a
            if not some.any():
                visits.append(0)
                continue
            begin, end = int(a[some].min()) // k_size, _cover(int(b[some].max()), k_size)
            visits.append(end - begin)
            free &= bool((a == begin * k_size).all() and (b == min(end * k_size, points)).all())
    return np.array(visits), free


def _walk_raster(axes: Sequence[AxisClasses], q_grid: tuple[int, ...], k_grid: tuple[int, ...], q_size: int, k_size: int):
    """The same for tiles of consecutive row-major tokens: the key tiles that hold a visible pair."""
    seen = [axis.visible(n) for axis, n in zip(axes, k_grid, strict=True)]
    keys, last = math.prod(k_grid), q_grid[-1]
    rows = list(itertools.product(*map(range, q_grid[:-1])))
    lines = [_outer([s[i] for s, i in zip(seen[:-1], row, strict=True)]) for row in rows]  # of the leading key axes
    filled = np.full(_cover(keys, k_size), k_size)
    filled[-1] = keys - (len(filled) - 1) * k_size
    visits, free = [], True
    for first in range(0, math.prod(q_grid), q_size):
        stop = min(first + q_size, math.prod(q_grid))
        some, every = np.zeros((len(lines[0]), k_grid[-1]), bool), np.ones((len(lines[0]), k_grid[-1]), bool)
        for row in range(first // last, (stop - 1) // last + 1):
            inner = seen[-1][max(first - row * last, 0) : min(stop - row * last, last)]
            some[lines[row]] |= inner.any(0)
            every &= lines[row][:, None] & inner.all(0)
        pad = (0, len(filled) * k_size - keys)
        visited = np.pad(some.ravel(), pad).reshape(-1, k_size).any(1)
        whole = np.pad(every.ravel(), pad).reshape(-1, k_size).sum(1) == filled
        visits.append(int(visited.sum()))
        free &= bool(whole[visited].all())
    return np.array(visits), free


def _outer(visible: Sequence[np.ndarray]) -> np.ndarray:
    """Row-major product of what is visible on each axis."""
    product = np.ones(1, bool)
    for axis in visible:
        product = (product[:, None] & axis).reshape(-1)
    return product
