"""Where tokens lie: from the keys of any source to the cells of a stage's grid, and from there to pixels.

Mass is divided, never copied: what a key gets is shared out among the cells it stands for, what a cell gets among its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.calls.footprint import Footprint


class Places(Protocol):
    """Cells of ``grid`` that tokens stand for."""

    @property
    def grid(self) -> tuple[int, ...]: ...

    def spread(self, weights: Tensor) -> Tensor:
        """Weights of tokens ``(batch, heads, rows, *tokens)`` shared out among cells, ``(batch, heads, rows, *grid)``."""
        ...


@dataclass(frozen=True)
class Cells:
    """Tokens that are the cells themselves; those that pad the grid at its end are no cells."""

    grid: tuple[int, ...]

    def spread(self, weights: Tensor) -> Tensor:
        for axis, n in enumerate(self.grid, start=3):
            weights = weights.narrow(axis, 0, n)
        return weights

    def collect(self, cells: Tensor, tokens: Sequence[int]) -> Tensor:
        """What cells ``(batch, rows, *grid)`` have, by the token that stands for them, ``(batch, rows, *tokens)``."""
        return F.pad(cells, [n for have, want in zip(self.grid[::-1], tokens[::-1], strict=True) for n in (0, want - have)])


@dataclass(frozen=True, eq=False)
class Reduced:
    """Tokens that are left after a reduction; ``place`` ``(batch, cells)`` says which of them stands for a cell, -1 none."""

    grid: tuple[int, ...]
    place: Tensor

    def spread(self, weights: Tensor) -> Tensor:
        known, index = self.place >= 0, self.place.clamp(min=0)
        counts = torch.zeros(len(index), weights.shape[-1], dtype=weights.dtype, device=weights.device)
        counts.scatter_add_(1, index, known.to(weights.dtype))
        each = weights / counts[:, None, None].clamp(min=1.0)
        cells = each.gather(-1, index[:, None, None].expand(*weights.shape[:3], -1)) * known[:, None, None]
        return cells.unflatten(-1, self.grid)

    def collect(self, cells: Tensor, tokens: Sequence[int]) -> Tensor:
        """What cells ``(batch, rows, *grid)`` have, by the token that stands for them, ``(batch, rows, *tokens)``."""
        cells = cells.flatten(2) * (self.place >= 0)[:, None]
        index = self.place.clamp(min=0)[:, None].expand(-1, cells.shape[1], -1)
        return cells.new_zeros(*cells.shape[:2], *tokens).scatter_add(-1, index, cells)


Where = Cells | Reduced | Footprint


def coarser(fine: Sequence[int], coarse: Sequence[int]) -> Footprint:
    """The relation of a stage's cells to those of the stage before: each is a window of them.

    Raises:
        ValueError: no whole number of cells per axis, or more than one, leads from the one grid to the other.
    """
    if len(fine) != len(coarse):
        raise ValueError(f"grids of one stage and the next must have the same rank; got {tuple(fine)} and {tuple(coarse)}")
    ratios = []
    for n, m in zip(fine, coarse, strict=True):
        fitting = [n // m] if n % m == 0 else [r for r in range(1, n + 1) if -(-n // r) == m]
        if len(fitting) != 1:
            raise ValueError(
                f"cells of {tuple(coarse)} are no windows of cells of {tuple(fine)}: {fitting or 'no'} cells of an axis of {n} "
                f"may make one of {m}"
            )
        ratios.append(fitting[0])
    return Footprint(tuple(fine), "windows", tuple(ratios))


def pixel_footprint(grid: Sequence[int], image_size: Sequence[int], reduction: int | None) -> Footprint:
    """Which pixels the cells of a grid lie on: squares of ``reduction`` where these make such a grid, else equal parts.

    The last squares may end before the image does (the rest belongs to no cell) or after it.
    """
    if reduction is not None:
        whole = [-(-side // reduction) for side in image_size]
        floor = [max(side // reduction, 1) for side in image_size]
        if all(low <= n <= high for low, n, high in zip(floor, grid, whole, strict=True)):
            return Footprint(tuple(image_size), "windows", reduction)
    return Footprint(tuple(image_size), "parts")


def cell_centres(grid: Sequence[int], extent: Sequence[float]) -> Tensor:
    """Coordinates ``(*grid, rank)`` of the middles of the cells of a grid that is ``extent`` long on its axes, in float64."""
    axes = [(torch.arange(n, dtype=torch.float64) + 0.5) * (e / n) for n, e in zip(grid, extent, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
