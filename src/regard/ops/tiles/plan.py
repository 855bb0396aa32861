"""Tiles of queries and the keys they need: the plan behind the tiled backend, the cost model and the simulator.

On every axis the queries are partitioned into tiles; a tile needs the union of the keys its queries see. Products of the
axis tiles cover the grid exactly once, so nothing can count twice. Tiles are grouped by shape, so that a group is a
rectangular index table: dilation, strides, shifts and borders are all in the tables, no tensor is ever permuted.
Which pairs of a tile are visible is the same for most tiles: masks are stored once per class of tiles.

Everything here is numpy on plain integers, so it can run while a graph is being traced.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

from ...caches import cached
from ..calls.geometry import Geometry
from ..patterns import Dense, Separable, disjoint_parts

PAIR, ROW, TILE = 1.0, 15.0, 60.0
"""Cost of a pair of query and key, of a gathered row and of a tile: fitted to float32 on one CPU core."""


@dataclass(frozen=True, eq=False)
class AxisTiles:
    """Tiles of one shape on one axis: ``queries (tiles, tq)``, ``keys (tiles, tk)`` and per class of tiles the ``mask``.

    Queries index the query grid and keys the padded key grid. ``kinds (tiles)`` is the class of each tile; ``mask`` is
    ``(classes, tq, tk)``, True where visible, and ``offsets`` likewise, the index into a bias table's axis. Where all pairs are
    visible, and where there is no table, they are ``(classes, 1, 1)``.
    """

    queries: np.ndarray
    keys: np.ndarray
    kinds: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True, eq=False)
class TileGroup:
    """Tiles of one shape on the whole grid: flat indices ``queries (tiles, tq)`` and ``keys (tiles, tk)``.

    ``mask (classes, tq, tk)``, of all pairs, is None where everything is visible; ``offsets (classes, tq, tk)``, of all pairs
    too, index the flattened bias table (None without one); ``row`` is how many consecutive tiles share a position on the
    leading axes.
    """

    queries: np.ndarray
    keys: np.ndarray
    kinds: np.ndarray
    mask: np.ndarray | None
    offsets: np.ndarray | None
    row: int

    @property
    def pairs(self) -> int:
        return self.queries.size * self.keys.shape[1]

    @cached_property
    def blind(self) -> np.ndarray | None:
        """Classes by queries ``(classes, tq)``: True where a query sees nothing; None where none does."""
        if self.mask is None:
            return None
        blind = np.logical_not(self.mask.any(-1))
        return np.asarray(blind) if blind.any() else None


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The disjoint parts of a pattern, each a list of tile groups that covers every query exactly once.

    ``tile`` is the tile size asked for on each axis of the first part; ``queries`` and ``keys`` count the tokens of the query
    grid and of the padded key grid. ``causal`` plans have one tile, of which only the lower triangle is visible.
    """

    parts: tuple[tuple[TileGroup, ...], ...]
    tile: tuple[int, ...]
    queries: int
    keys: int
    causal: bool = False

    @property
    def computed_pairs(self) -> int:
        """Pairs of query and key that are computed, per batch item and head."""
        if self.causal:
            return self.queries * (self.queries + 1) // 2
        return sum(group.pairs for part in self.parts for group in part)

    @property
    def tiles(self) -> int:
        return sum(len(group.queries) for part in self.parts for group in part)


@cached(512)
def tile_plan(geometry: Geometry, tile: tuple[int, ...] | None = None) -> TilePlan | None:
    """Plan the tiles of a static pattern, or None where it is not built from separable ones.

    Args:
        geometry: the pattern on its grids.
        tile: queries per tile and axis; by default the cheapest under the cost model.
    """
    rank, pattern = geometry.rank, geometry.pattern
    if pattern.ordered and geometry.q_grid == geometry.k_grid and geometry.table is None and rank == 1:
        whole = tile_plan(geometry._replace(spec=Dense().spec))
        return None if whole is None else replace(whole, causal=True)
    parts = disjoint_parts(pattern, rank)
    if parts is None:
        return None
    chosen: list[tuple[int, ...]] = []
    plans = []
    for part in parts:
        cuts = [_axis_cuts(part[a], a, geometry) for a in range(rank)]
        size = tile or _cheapest(cuts)
        groups = [cuts[a].tiles(size[a]) for a in range(rank)]
        if all(groups):  # an axis on which nothing is visible empties the part
            plans.append(tuple(_product(combination, geometry) for combination in itertools.product(*groups)))
            chosen.append(size)
    return TilePlan(tuple(plans), chosen[0] if chosen else (), math.prod(geometry.q_grid), math.prod(geometry.padded))


@dataclass(frozen=True, eq=False)
class AxisCuts:
    """How an axis can be cut: ``shapes`` gives the ``(tiles, tq, tk)`` of every group of tiles of a size, ``tiles`` the groups.

    ``tiles`` is empty where nothing is visible.
    """

    shapes: Callable[[int], list[tuple[int, int, int]]]
    tiles: Callable[[int], list[AxisTiles]]


def _axis_cuts(literals, axis: int, geometry: Geometry) -> AxisCuts:
    classes = geometry.axis(axis, _narrowest(literals, axis, geometry), padded=False)

    @cache
    def cut(size: int) -> list[list[tuple[np.ndarray, int, int, int, bool]]]:
        """Groups of tiles: query indices, first key, past the last key, residue, whether all queries see the same keys."""
        tiles = []
        for residue, members in classes.members():
            low, high = classes.low[members], classes.high[members]
            chunks = _split(low, high, size)
            firsts = [chunk[0] for chunk in chunks]
            begins, ends = np.minimum.reduceat(low, firsts), np.maximum.reduceat(high, firsts)
            even = (begins == np.maximum.reduceat(low, firsts)) & (ends == np.minimum.reduceat(high, firsts))
            for chunk, begin, end, same in zip(chunks, begins.tolist(), ends.tolist(), even.tolist(), strict=True):
                tiles.append((members[chunk], begin, end, residue, same))
        ragged = _ragged(tiles)
        groups: dict[tuple[int, int], list] = {}
        for tile in tiles:
            band = math.ceil(2 * math.log2(max(tile[2] - tile[1], 1))) if ragged else 0
            groups.setdefault((len(tile[0]), band), []).append(tile)
        return list(groups.values())

    def shapes(size: int) -> list[tuple[int, int, int]]:
        return [(len(some), len(some[0][0]), max(high - low for _, low, high, *_ in some)) for some in cut(size)]

    def build(size: int) -> list[AxisTiles]:
        groups = []
        for some in cut(size):
            spans = {high - low for _, low, high, *_ in some}
            full = len(literals) == 1 and len(spans) == 1 and all(even for *_, even in some)
            groups.append(_axis_tiles(some, classes.step, full, literals, axis, geometry))
        return groups if any(group.mask.any() for group in groups) else []

    return AxisCuts(shapes, build)


def _ragged(tiles) -> bool:
    spans = [high - low for _, low, high, *_ in tiles]
    return max(spans) > 2 * max(min(spans), 1)


def _narrowest(literals, axis: int, geometry: Geometry) -> Separable:
    """The positive condition with the fewest keys: tiles follow its windows."""
    position, length, rank = geometry.positions(axis), geometry.k_grid[axis], geometry.rank
    best, fewest = Dense(), math.inf
    for literal in sorted(literals, key=repr):
        if literal.positive:
            total = float(np.mean(literal.pattern.axis_window(axis, position, length, rank).count))
            if total < fewest:
                best, fewest = literal.pattern, total
    return best  # type: ignore[return-value]  # Dense is Separable


def _split(low: np.ndarray, high: np.ndarray, size: int) -> list[np.ndarray]:
    """Partition consecutive queries with key intervals ``[low, high)`` into tiles of about ``size``."""
    changes = np.nonzero((np.diff(low) != 0) | (np.diff(high) != 0))[0] + 1
    starts = np.concatenate([[0], changes, [len(low)]])  # of runs that see the same keys
    if len(starts) == 2:
        return [np.arange(len(low))]
    apart = bool((high[starts[:-2]] <= low[starts[1:-1]]).all())
    each = int(np.median(np.diff(starts)))  # at borders that shift inward the first and last runs are longer
    if apart or 2 * each > size:
        bounds = starts
    else:
        number = math.ceil(len(low) / size)
        bounds = np.unique(np.linspace(0, len(low), number + 1) / each + 0.5).astype(int) * each
        bounds[-1] = len(low)
    return [np.arange(a, b) for a, b in itertools.pairwise(bounds)]


def _axis_tiles(tiles, step: int, full: bool, literals, axis: int, geometry: Geometry) -> AxisTiles:
    """Tiles of one number of queries; ``full`` says that every query sees all keys of its tile."""
    (before, after), length, rank, bias = geometry.zeros[axis], geometry.k_grid[axis], geometry.rank, geometry.bias
    queries = np.stack([members for members, *_ in tiles])
    width = max(high - low for _, low, high, *_ in tiles)
    residue = np.array([r for _, _, _, r, _ in tiles])
    lowest = -((before + residue) // step)  # first and past-the-end key of each residue class
    highest = (length + after - 1 - residue) // step + 1
    begin = np.maximum(np.minimum([low for _, low, *_ in tiles], highest - width), lowest)
    slots = begin[:, None] + np.arange(width)
    real = slots < highest[:, None]
    slots = np.minimum(slots, highest[:, None] - 1)
    k_pos = slots * step + residue[:, None]
    q_pos = queries + geometry.q_start[axis]
    alike, kind_of = _alike(q_pos, k_pos[:, 0], real.sum(1), literals, axis, geometry)
    keys, q_pos, k_pos, real = k_pos + before, q_pos[alike, :, None], k_pos[alike, None, :], real[alike]
    shape = (len(alike), queries.shape[1], width)
    if full and real.all():
        mask = np.ones((len(alike), 1, 1), dtype=bool)
    else:
        mask = np.broadcast_to(real[:, None, :], shape).copy()
        for pattern, positive in sorted(literals, key=repr):
            seen = pattern.axis_visible(axis, q_pos, k_pos, length, rank)
            mask &= np.broadcast_to(seen, shape) == positive
    offsets = np.zeros((len(alike), 1, 1), dtype=np.int64)
    if bias is not None:
        pattern, sizes = bias
        extent = sizes[axis] // 2
        steps = pattern.offset(axis, q_pos, k_pos, length, rank)
        offsets = np.broadcast_to(np.where(mask, np.clip(steps, -extent, extent) + extent, 0), shape)
    classes: dict[bytes, int] = {}
    kinds = np.array([classes.setdefault(m.tobytes() + o.tobytes(), len(classes)) for m, o in zip(mask, offsets, strict=True)])
    index = np.unique(kinds, return_index=True)[1]
    return AxisTiles(queries, keys, kinds[kind_of], mask[index], offsets[index])


def _alike(
    q_pos: np.ndarray, first_key: np.ndarray, real: np.ndarray, literals, axis: int, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray]:
    """One tile of each kind of tiles ``(tiles, tq)`` that must look alike, and which of them every tile is like.

    Seen from the first key of the tile, the windows of alike tiles begin and end at the same places, as many keys exist, and
    the offsets begin with the same one.
    """
    base, length, rank, bias = first_key[:, None], geometry.k_grid[axis], geometry.rank, geometry.bias
    told = [real[:, None]]
    for pattern, _ in sorted(literals, key=repr):
        start, count, step = pattern.axis_window(axis, q_pos, length, rank)
        told += [np.broadcast_to(np.asarray(x), q_pos.shape) for x in (start - base, count, step)]
    if bias is not None:
        told += [q_pos - base, np.broadcast_to(np.asarray(bias[0].offset(axis, q_pos, base, length, rank)), q_pos.shape)]
    kinds: dict[bytes, int] = {}
    kind_of = np.array([kinds.setdefault(tile.tobytes(), len(kinds)) for tile in np.concatenate(told, 1).astype(np.int64)])
    return np.unique(kind_of, return_index=True)[1], kind_of


def _product(tiles: Sequence[AxisTiles], geometry: Geometry) -> TileGroup:
    """Combine the tiles of all axes into tiles of the grid."""
    q_grid, padded, bias = geometry.q_grid, geometry.padded, geometry.bias
    sizes = bias[1] if bias is not None else (1,) * geometry.rank
    queries, keys, kinds, mask, offsets = (
        tiles[0].queries, tiles[0].keys, tiles[0].kinds, tiles[0].mask, tiles[0].offsets,
    )  # fmt: skip
    for axis in range(1, len(tiles)):
        t = tiles[axis]
        before, inner = (queries.shape[1], keys.shape[1]), (t.queries.shape[1], t.keys.shape[1])
        mask = _outer_pairs(np.logical_and, mask, before, t.mask, inner)
        offsets = _outer_pairs(np.add, offsets * sizes[axis], before, t.offsets, inner)
        queries = _outer(queries * q_grid[axis], t.queries)
        keys = _outer(keys * padded[axis], t.keys)
        kinds = (kinds[:, None] * len(t.mask) + t.kinds).reshape(-1)
    pairs = (queries.shape[1], keys.shape[1])
    return TileGroup(
        queries, keys, kinds,
        None if mask.all() else _of_pairs(mask, pairs),
        None if bias is None else _of_pairs(offsets, pairs),
        len(tiles[-1].queries),
    )  # fmt: skip


def _outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``(m, p)`` and ``(n, q)`` to sums ``(m * n, p * q)``."""
    return (a[:, None, :, None] + b[None, :, None, :]).reshape(len(a) * len(b), -1)


def _outer_pairs(operation, a: np.ndarray, a_tile, b: np.ndarray, b_tile) -> np.ndarray:
    """Combine what two axes say of the pairs of their tiles; ``(classes, 1, 1)`` stands for the same at all pairs."""
    if a.shape[1:] != (1, 1) or b.shape[1:] != (1, 1):
        a, b = np.broadcast_to(a, (len(a), *a_tile)), np.broadcast_to(b, (len(b), *b_tile))
    both = operation(a[:, None, :, None, :, None], b[None, :, None, :, None, :])
    return both.reshape(len(a) * len(b), a.shape[1] * b.shape[1], a.shape[2] * b.shape[2])


def _of_pairs(what: np.ndarray, pairs: tuple[int, int]) -> np.ndarray:
    """``(classes, tq, tk)``, also of what is the same at all pairs ``(classes, 1, 1)``."""
    return what if what.shape[1:] == pairs else np.broadcast_to(what, (len(what), *pairs)).copy()


def _cheapest(cuts: Sequence[AxisCuts]) -> tuple[int, ...]:
    """The tile sizes of least estimated cost."""
    sizes = {1: (8, 16, 32, 64, 128), 2: (2, 4, 7, 8, 14, 16), 3: (1, 2, 4, 8)}.get(len(cuts), (1, 2, 4))
    shapes = [{size: axis.shapes(size) for size in sizes} for axis in cuts]

    def cost(choice: tuple[int, ...]) -> float:
        total = 0.0
        for combination in itertools.product(*(shapes[a][s] for a, s in enumerate(choice))):
            tiles, tq, tk = (math.prod(c[i] for c in combination) for i in range(3))
            total += tiles * (tq * tk * PAIR + (tq + tk) * ROW + TILE)
        return total

    return min(itertools.product(sizes, repeat=len(cuts)), key=cost)
