"""Footprints: which cells of a grid the keys of a source stand for.

A pooled key stands for the cells it was made of. Attention itself has no use for this; whoever draws a map, or follows
attention from layer to layer, cannot do without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import LARGEST, check_choice, check_grid, check_integer, check_sizes, check_tensor, shown

KINDS = ("parts", "windows", "adaptive", "resize", "cells", "list")


@dataclass(frozen=True)
class Footprint:
    """How keys lie on a grid of cells; plain numbers, so that stating it costs nothing.

    Args:
        grid: the cells, rows and columns for images.
        kind: ``"parts"``: the keys cut each axis into equal parts, which may cut through a cell. ``"windows"``: key ``i`` of an
            axis is made of cells ``i * ratio`` to ``(i + 1) * ratio``, as far as they exist. ``"adaptive"``: of cells
            ``floor(i n / m)`` to ``ceil((i + 1) n / m)`` of n cells for m keys. ``"resize"``: m keys interpolated linearly from
            n cells, corners not aligned. ``"cells"``: key ``i`` is cell ``i - start``, where there is one; the others pad the
            grid. ``"list"``: keys on one axis; ``prefix`` of them stand for no cell, the others are
            the cells in row-major order.
        ratio: of windows, a number or one per axis.
        start: of cells, one per axis: how many keys come before the first.
        prefix: of a list.

    Raises:
        ValueError: an unknown kind; windows without a ratio.
    """

    grid: tuple[int, ...]
    kind: str = "parts"
    ratio: int | tuple[int, ...] | None = None
    start: tuple[int, ...] | None = None
    prefix: int = 0

    def __post_init__(self) -> None:
        grid = check_grid("grid", self.grid)
        check_choice("kind", self.kind, KINDS)
        if (self.kind == "windows") != (self.ratio is not None):
            raise ValueError(f"windows, and only they, need a ratio; got kind={self.kind!r}, ratio={shown(self.ratio)}")
        if self.ratio is not None:
            check_sizes("ratio", self.ratio, len(grid))
        if self.start is not None and len(check_grid("start", self.start, -LARGEST)) != len(grid):
            raise ValueError(f"start must have one entry per axis of the grid {grid}; got {shown(self.start)}")
        check_integer("prefix", self.prefix)

    def axis_shares(self, axis: int, keys: int) -> Tensor:
        """How each of the keys on an axis is spread over its cells: ``(keys, cells)`` in float64, rows sum to at most 1."""
        cells = self.grid[axis]
        if self.kind == "resize":
            return F.interpolate(torch.eye(cells, dtype=torch.float64)[None], keys, mode="linear", align_corners=False)[0].T
        key, cell = torch.arange(keys)[:, None], torch.arange(cells)
        if self.kind == "cells":
            return (key - (self.start[axis] if self.start else 0) == cell).double()
        if self.kind == "parts":  # key i covers the interval from i n / m to (i + 1) n / m
            low, high = (key * cells).clamp(min=cell * keys), ((key + 1) * cells).clamp(max=(cell + 1) * keys)
            return (high - low).clamp(min=0).double() / cells
        if self.kind == "adaptive":
            start, stop = key * cells // keys, -(-(key + 1) * cells // keys)
        else:
            ratio = self.ratio[axis] if isinstance(self.ratio, tuple) else self.ratio
            assert ratio is not None  # windows have one
            start, stop = key * ratio, (key + 1) * ratio
        inside = ((cell >= start) & (cell < stop)).double()
        return inside / inside.sum(-1, keepdim=True).clamp(min=1.0)

    def check(self, k_grid: Sequence[int]) -> None:
        """Raise ``ValueError`` where keys on this grid cannot have this footprint."""
        if self.kind == "list":
            if len(k_grid) != 1 or k_grid[0] != self.prefix + math.prod(self.grid):
                raise ValueError(
                    f"{self!r} is for {self.prefix} + {math.prod(self.grid)} keys; got the key grid {tuple(k_grid)}"
                )
        elif len(k_grid) != len(self.grid):
            raise ValueError(f"{self!r} has {len(self.grid)} axes but the key grid is {tuple(k_grid)}")

    def spread(self, weights: Tensor) -> Tensor:
        """Weights of keys ``(batch, heads, rows, *k_grid)`` to weights of cells ``(batch, heads, rows, *grid)``.

        The mass of a key is divided among its cells; what keys without a cell get is left out.
        """
        check_tensor("weights", weights, what="(batch, heads, rows, *k_grid)")
        k_grid = weights.shape[3:]
        self.check(k_grid)
        if self.kind == "list":
            return weights[..., self.prefix :].unflatten(-1, self.grid)
        for axis, keys in enumerate(k_grid):
            shares = self.axis_shares(axis, keys).to(weights)
            weights = (weights.movedim(3 + axis, -1) @ shares).movedim(-1, 3 + axis)
        return weights
