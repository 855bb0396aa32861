"""Which tiles and boxes the attention kernels walk: integer tables, made on the host once per pattern and grid.

On every axis a separable pattern shows a query the keys ``start, start + step, ...``. Keys of one residue modulo the step form
a class, in which a window is an interval ``[low, high)`` of indices; queries are put in the order of their classes (a *slot* is
a place in that order) and cut into tiles inside a class. A tile of queries needs the keys from its least ``low`` to its
greatest ``high``: boxes of keys are counted off from there, wherever that is. The boxes between the greatest ``low`` and the
least ``high`` are seen whole by every query: they form an interval on each axis, and the boxes that are full on all axes need
no mask. For the gradients of keys the same is done the other way round: the queries that see any key of a tile of keys, and
those that see them all. Dilation, strides, causal axes, shifts and borders are all in the tables, no token is ever moved.

The tables are one int32 tensor: ``HEADER`` scalars, ``(3, slots)`` low, high and row in the bias table, and
``(FIELDS, columns)``, what the kernels must know of each tile of an axis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ....caches import cached
from ...calls.geometry import Geometry
from ...patterns import Separable

HEADER, FIELDS, RANK = 32, 9, 3
"""Scalars at the head of the tables, fields of a tile, and axes: grids of fewer axes get leading ones."""

BOX, TILE = 1024, 128
"""Cost of a box and of a row of a tile, in pairs of query and key: estimates, not yet fitted on a GPU."""

Three = tuple[int, int, int]
Sizes = tuple[tuple[int, int, int], ...]
"""Tokens in a tile, tokens in a box, and the warps that go with them."""


@dataclass(frozen=True)
class Walk:
    """Tiles of one side of the attention and boxes of the other.

    ``tile`` and ``box`` are their sizes on each axis, powers of two, and ``warps`` share a tile; ``programs`` counts the tiles,
    ``boxes`` the boxes over all tiles and ``full`` those among them that need no mask; ``tables`` are the numbers, as bytes.
    """

    tile: Three
    box: Three
    warps: int
    programs: int
    boxes: int
    full: int
    tables: bytes

    @property
    def computed_pairs(self) -> int:
        """Pairs of query and key computed, per batch item and head."""
        return self.boxes * math.prod(self.tile) * math.prod(self.box)


@cached(256)
def on_device(walk: Walk, device: torch.device) -> Tensor:
    """The tables of a walk as an int32 tensor."""
    return torch.from_numpy(np.frombuffer(walk.tables, dtype=np.int32).copy()).to(device)


@dataclass(frozen=True, eq=False)
class AxisSlots:
    """One axis: the windows of its queries, in the order of their classes.

    ``position``, ``residue``, ``low``, ``high`` and ``row`` have one entry per query; the keys of a slot are
    ``residue + step * j`` for ``low <= j < high`` on an axis of ``length`` padded keys, and entry ``row + slope * j`` of the
    axis of the bias table belongs to them. The queries of a class are ``stride`` apart.
    """

    position: np.ndarray
    residue: np.ndarray
    low: np.ndarray
    high: np.ndarray
    row: np.ndarray
    step: int
    stride: int
    slope: int
    length: int

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First and past-the-last slot of each class that has queries."""
        edges = [0, *(np.nonzero(np.diff(self.residue))[0] + 1).tolist(), len(self.residue)]
        return list(itertools.pairwise(edges))


@cached(256)
def classes_of(geometry: Geometry) -> tuple[AxisSlots, ...] | str:
    """The axes of a separable pattern, padded to three, or the reason why it has none."""
    pattern = geometry.pattern.as_product(geometry.rank)
    if pattern is None:
        if geometry.pattern.ordered:
            return f"raster order is no product of axes; got a grid {geometry.k_grid} that a bias table keeps"
        return f"only patterns separable by axis; got {geometry.pattern!r}"
    if geometry.rank > RANK:
        return f"only grids with 1 to {RANK} axes; got {geometry.k_grid}"
    one = np.zeros(1, dtype=np.int64)
    axes = [AxisSlots(one, one, one, one + 1, one, 1, 1, 0, 1)] * (RANK - geometry.rank)
    for axis in range(geometry.rank):
        made = _axis_slots(pattern, axis, geometry)
        if isinstance(made, str):
            return made
        axes.append(made)
    return tuple(axes)


def _axis_slots(pattern: Separable, axis: int, geometry: Geometry) -> AxisSlots | str:
    classes, padded = geometry.axis(axis, pattern), geometry.padded[axis]
    step, order = classes.step, np.argsort(classes.residue, kind="stable")
    position, residue, low, high = (x[order] for x in (classes.position, classes.residue, classes.low, classes.high))
    low, high = np.maximum(low, 0), np.minimum(high, (padded - 1 - residue) // step + 1)
    apart = np.diff(position)[np.diff(residue) == 0]
    if not classes.even or (apart != apart[:1]).any():
        return f"the queries of {pattern!r} that share keys are unevenly spaced on axis {axis}"
    row, slope = np.zeros_like(low), 0
    if geometry.bias is not None:
        found = _bias_rows(axis, geometry, position, residue, low, high, step)
        if found is None:
            return f"the offsets of {geometry.bias[0]!r} are not linear in the keys of {pattern!r}"
        row, slope = found
    stride = int(apart[0]) if len(apart) else 1
    return AxisSlots(position - geometry.q_start[axis], residue, low, high, row, step, stride, slope, padded)


def _bias_rows(axis: int, geometry: Geometry, position, residue, low, high, step: int) -> tuple[np.ndarray, int] | None:
    """Entry of a flat bias table for key 0 of each slot's class, and the entries from one key to the next."""
    assert geometry.bias is not None
    (pattern, sizes), before = geometry.bias, geometry.zeros[axis][0]

    def offset(j: np.ndarray) -> np.ndarray:
        keys = residue + j * step - before
        return np.asarray(pattern.offset(axis, position, keys, geometry.k_grid[axis], geometry.rank))

    first, count = offset(low), high - low
    several = count > 1
    slope = int((offset(low + 1) - first)[several][0]) if several.any() else 0
    for further in range(1, int(count.max(initial=0))):
        if not (offset(low + further) == first + further * slope)[count > further].all():
            return None
    flat = math.prod(sizes[axis + 1 :])
    return (first - low * slope + sizes[axis] // 2) * flat, slope * flat


# --------------------------------------------------------------------------------------------------------------------
# tiles of one axis: (FIELDS, tiles)


def _cut(axis: AxisSlots, size: int, whole: bool) -> np.ndarray:
    """First slots of tiles of at most ``size`` queries of one class; ``whole`` keeps queries with one window together."""
    firsts: list[int] = []
    for begin, end in axis.bounds:
        if not whole:
            firsts.extend(range(begin, end, size))
            continue
        low, high = axis.low[begin:end], axis.high[begin:end]
        runs = [begin, *(np.nonzero((np.diff(low) != 0) | (np.diff(high) != 0))[0] + 1 + begin).tolist(), end]
        start = begin
        firsts.append(start)
        for left, right in itertools.pairwise(runs):
            if right - start > size and left > start:
                start = left
                firsts.append(start)
            while right - start > size:
                start += size
                firsts.append(start)
    return np.array(firsts)


def _query_tiles(axis: AxisSlots, size: int) -> Callable[[int], np.ndarray]:
    """Tiles of ``size`` queries as a function of the keys of a box, with the fewest boxes.

    Fields: first slot, queries, its coordinate, least low, greatest high, boxes, first full box, full boxes, residue.
    """
    cuts = [_cut(axis, size, whole) for whole in (False, True)]

    def at(box: int) -> np.ndarray:
        made = []
        for first in cuts:
            count = np.diff([*first, len(axis.low)])
            lo, hi = np.minimum.reduceat(axis.low, first), np.maximum.reduceat(axis.high, first)
            inner_lo, inner_hi = np.maximum.reduceat(axis.low, first), np.minimum.reduceat(axis.high, first)
            boxes = _boxes(lo, hi, inner_lo, inner_hi, box)
            made.append(np.stack([first, count, axis.position[first], lo, hi, *boxes, axis.residue[first]]))
        return min(made, key=lambda table: (table[5].sum(), table.shape[1]))

    return at


def _key_tiles(axis: AxisSlots, size: int) -> Callable[[int], np.ndarray]:
    """Tiles of ``size`` keys as a function of the queries of a box.

    Fields: first key, keys, residue, first and past-the-last slot that sees any of them, boxes, first full box, full boxes,
    its coordinate.
    """
    rows = []
    slots = {int(axis.residue[begin]): (begin, end) for begin, end in axis.bounds}
    for residue in range(min(axis.step, axis.length)):
        keys = -(-(axis.length - residue) // axis.step)
        begin, end = slots.get(residue, (0, 0))
        low, high = axis.low[begin:end], axis.high[begin:end]
        for first in range(0, keys, size):
            last = min(first + size, keys)
            some = _interval((low < last) & (high > first), begin)
            full = (low <= first) & (high >= last)
            every = _interval(full, begin)
            if every[1] - every[0] != int(full.sum()):
                every = (some[0], some[0])
            rows.append((first, last - first, residue, *some, *every, axis.position[some[0]]))
    first_, count, residue_, lo, hi, inner_lo, inner_hi, position = (np.array(column) for column in zip(*rows, strict=True))

    def at(box: int) -> np.ndarray:
        return np.stack([first_, count, residue_, lo, hi, *_boxes(lo, hi, inner_lo, inner_hi, box), position])

    return at


def _interval(seen: np.ndarray, first: int) -> tuple[int, int]:
    found = np.nonzero(seen)[0]
    return (int(found[0]) + first, int(found[-1]) + first + 1) if len(found) else (0, 0)


def _boxes(lo, hi, inner_lo, inner_hi, box: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of boxes from ``lo`` to ``hi``, the first of them between ``inner_lo`` and ``inner_hi``, and how many are."""
    begin = -(-(inner_lo - lo) // box)
    full = np.maximum((inner_hi - lo) // box - begin, 0)
    return -(-(hi - lo) // box), np.where(full > 0, begin, 0), full


def _block_tiles(length: int, block: int, size: int) -> np.ndarray:
    """Tiles of at most ``size`` tokens of one block, with the fields that do not speak of windows."""
    first = np.concatenate([np.arange(begin, min(begin + block, length), size) for begin in range(0, length, block)])
    count = np.minimum(np.minimum(first + size, first // block * block + block), length) - first
    none = np.zeros_like(first)
    return np.stack([first, count, none, none, none, none, none, none, none])


# --------------------------------------------------------------------------------------------------------------------
# walks


def _shapes(size: int) -> Iterator[Three]:
    """Powers of two on three axes whose product is ``size``."""
    power = size.bit_length() - 1
    for a in range(power + 1):
        for b in range(power - a + 1):
            yield 1 << a, 1 << b, 1 << (power - a - b)


def _cheapest(
    sizes: Sizes, lengths: Sequence[int], count: Callable[[int, int, int], tuple[int, int]]
) -> tuple[Three, Three, int]:
    """The shapes of tile and box, of one of the ``sizes``, with the least estimated cost, and their warps.

    ``count`` gives the number of tiles and of boxes of an axis.
    """

    def useful(shape: Three) -> bool:
        return all(n == 1 or length > 1 for n, length in zip(shape[:-1], lengths[:-1], strict=True))

    def cost(choice: tuple[Three, Three, int]) -> float:
        tile, box, _ = choice
        tiles, boxes = (math.prod(n) for n in zip(*(count(a, tile[a], box[a]) for a in range(RANK)), strict=True))
        return boxes * (math.prod(tile) * math.prod(box) + BOX) + tiles * math.prod(tile) * TILE

    choices = ((t, b, warps) for n, m, warps in sizes for t in _shapes(n) if useful(t) for b in _shapes(m) if useful(b))
    return min(choices, key=cost)


@cached(256)
def window_walk(geometry: Geometry, sizes: Sizes, by_key: bool, masked: bool) -> Walk:
    """The walk of a separable pattern.

    Args:
        geometry: the pattern on its grids.
        sizes: what a tile and a box may hold.
        by_key: tiles of keys and boxes of queries instead of tiles of queries and boxes of keys.
        masked: whether every box needs a mask.
    """
    axes = classes_of(geometry)
    if isinstance(axes, str):
        raise ValueError(axes)
    make = _key_tiles if by_key else _query_tiles

    @cache
    def tiles(axis: int, tile: int) -> Callable[[int], np.ndarray]:
        return make(axes[axis], tile)

    @cache
    def count(axis: int, tile: int, box: int) -> tuple[int, int]:
        table = tiles(axis, tile)(box)
        return table.shape[1], int(table[5].sum())

    tile, box, warps = _cheapest(sizes, [max(len(axis.low), axis.length) for axis in axes], count)
    tables = [tiles(a, tile[a])(box[a]).copy() for a in range(RANK)]
    for table in tables if masked else ():
        table[6:8] = 0
    grids = three(geometry.q_grid), tuple(axis.length for axis in axes)
    header = np.zeros(HEADER, dtype=np.int64)
    for a, axis in enumerate(axes):
        queries, keys = (math.prod(grid[a + 1 :]) for grid in grids)  # tokens from one coordinate to the next
        header[3 + a], header[6 + a], header[9 + a] = axis.step * keys, axis.stride * queries, axis.slope
        tables[a][[8, 2] if by_key else [2, 8]] *= np.array([[queries], [keys]])
        header[20 + a] = sum(len(before.low) for before in axes[:a])  # where its slots begin
    windows = np.stack([np.concatenate([getattr(axis, name) for axis in axes]) for name in ("low", "high", "row")])
    boxes, full = (math.prod(int(table[field].sum()) for table in tables) for field in (5, 7))
    return _packed((tile, box, warps), header, tables, windows, grids, (boxes, full))


@cached(256)
def block_walk(q_grid: tuple[int, ...], k_grid: tuple[int, ...], block: tuple[int, ...], sizes: Sizes, by_key: bool) -> Walk:
    """The walk of routed blocks: tiles are parts of a block, and boxes are parts of the blocks that a list names.

    Its ``boxes`` are those of one listed block for each tile.
    """
    grids = [three(q_grid), three(k_grid)]
    outer, inner = grids[::-1] if by_key else grids
    size = three(block)

    def count(axis: int, tile: int, box: int) -> tuple[int, int]:
        tiles = _block_tiles(outer[axis], size[axis], tile).shape[1]
        return tiles, tiles * -(-size[axis] // box)

    tile, box, warps = _cheapest(sizes, size, count)
    tables = [_block_tiles(outer[a], size[a], tile[a]) for a in range(RANK)]
    header = np.zeros(HEADER, dtype=np.int64)
    for a in range(RANK):
        header[6 + a], header[3 + a] = (math.prod(grid[a + 1 :]) for grid in grids)
        if not by_key:
            tables[a][2] = tables[a][0] * header[6 + a]
    header[20:23] = size
    header[23:25] = [-(-inner[a] // size[a]) for a in (1, 2)]
    header[25:27] = [-(-outer[a] // size[a]) for a in (1, 2)]
    header[27:30] = inner
    boxes = math.prod(count(a, tile[a], box[a])[1] for a in range(RANK))
    even = all(n % size[a] == 0 == size[a] % box[a] for a, n in enumerate(inner))
    return _packed(
        (tile, box, warps), header, tables, np.zeros((3, 0), dtype=np.int64), (grids[0], grids[1]), (boxes, boxes * even)
    )


def _packed(
    shapes: tuple[Three, Three, int], header: np.ndarray, tables, windows: np.ndarray, grids, boxes: tuple[int, int]
) -> Walk:
    header[0:3] = [table.shape[1] for table in tables]
    header[16], header[17] = windows.shape[1], sum(table.shape[1] for table in tables)
    header[18:20] = [math.prod(grid) for grid in grids]
    numbers = np.concatenate([header, windows.reshape(-1), np.concatenate(tables, 1).reshape(-1)]).astype(np.int32)
    return Walk(*shapes, math.prod(table.shape[1] for table in tables), *boxes, numbers.tobytes())


def three(grid: Sequence[int]) -> Three:
    """A grid or a block with leading ones."""
    return (1,) * (RANK - len(grid)) + tuple(grid)  # type: ignore[return-value]  # three of them
