"""A static pattern on its grids, as plain numbers: what all tiles, boxes and walks of it start from.

On every axis a separable pattern shows a query the keys ``start, start + step, ...``. Keys of one residue modulo the step form
a class, in which the window of a query is an interval ``[low, high)``: dilation, strides, shifts and borders end here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..patterns import Pattern, Separable, parse

Ints = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AxisClasses:
    """The windows of the queries of one axis: query ``i``, at ``position[i]``, sees ``residue[i] + step * j`` for
    ``low[i] <= j < high[i]``. Windows may reach beyond the axis. ``even`` tells that all queries have this step."""

    position: np.ndarray
    residue: np.ndarray
    low: np.ndarray
    high: np.ndarray
    step: int
    even: bool

    def members(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each residue that has queries, and their indices."""
        for residue in np.unique(self.residue):
            yield int(residue), np.nonzero(self.residue == residue)[0]

    def visible(self, length: int) -> np.ndarray:
        """Visible pairs ``(queries, keys)`` on an axis of some length."""
        index, residue = np.divmod(np.arange(length), self.step)
        low, high = self.low[:, None], self.high[:, None]
        return (residue == self.residue[:, None]) & (index >= low) & (index < high)


class Geometry(NamedTuple):
    """What the tiles of a call depend on.

    Attributes:
        spec: text form of the pattern.
        q_grid, k_grid: query grid and true key grid.
        q_start: coordinates of the first query on the key grid.
        zeros: zero keys before and after each axis of the key grid.
        table: text form of the bias table's pattern and the table's sizes, None without one.
    """

    spec: str
    q_grid: Ints
    k_grid: Ints
    q_start: Ints
    zeros: tuple[tuple[int, int], ...]
    table: tuple[str, Ints] | None = None

    @classmethod
    def on(cls, spec: str, grid: Sequence[int], k_grid: Sequence[int] | None = None) -> Geometry:
        """Queries that start at the origin, and the zero keys that the pattern asks for."""
        k_grid = tuple(grid if k_grid is None else k_grid)
        zeros = tuple(parse(spec).zero_keys(axis, n, len(k_grid)) for axis, n in enumerate(k_grid))
        return cls(spec, tuple(grid), k_grid, (0,) * len(k_grid), zeros)

    @property
    def rank(self) -> int:
        return len(self.k_grid)

    @property
    def padded(self) -> Ints:
        """The key grid with its zero keys."""
        return tuple(n + before + after for n, (before, after) in zip(self.k_grid, self.zeros, strict=True))

    @property
    def pattern(self) -> Pattern:
        return parse(self.spec)

    @property
    def bias(self) -> tuple[Pattern, Ints] | None:
        """The pattern of the bias table, and the table's sizes."""
        return None if self.table is None else (parse(self.table[0]), self.table[1])

    def positions(self, axis: int) -> np.ndarray:
        """Coordinates of the queries on an axis of the key grid."""
        return np.arange(self.q_start[axis], self.q_start[axis] + self.q_grid[axis])

    def axis(self, axis: int, pattern: Separable, padded: bool = True) -> AxisClasses:
        """The classes of an axis under a pattern; keys are counted from the first zero key, or else from the first true one."""
        position = self.positions(axis)
        window = pattern.axis_window(axis, position, self.k_grid[axis], self.rank)
        start, count, steps = (np.broadcast_to(np.asarray(x), position.shape).astype(np.int64) for x in window)
        step = int(steps[0])
        low, residue = np.divmod(start + self.zeros[axis][0] * padded, step)
        return AxisClasses(position, residue, low, low + count, step, bool((steps == step).all()))
