"""A pattern seen from the keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Pattern


@dataclass(frozen=True, repr=False)
class Transposed(Pattern):
    """A key sees the queries that see it under ``pattern``; both on one grid. It is evaluated pair by pair, never planned."""

    pattern: Pattern
    static: ClassVar[bool] = False

    def rank(self) -> int | None:
        return self.pattern.rank()

    def check(self, q_grid: Sequence[int], k_grid: Sequence[int]) -> None:
        self.pattern.check(k_grid, q_grid)

    def visible(self, q_pos: Tensor, k_pos: Tensor, q_grid: Sequence[int], k_grid: Sequence[int]) -> Tensor:
        return self.pattern.visible(k_pos, q_pos, k_grid, q_grid)

    def reach(self, axis: int, interval: tuple[int, int], grid: Sequence[int]) -> tuple[int, int]:
        return 0, grid[axis]

    def __repr__(self) -> str:
        return f"Transposed({self.pattern!r})"
