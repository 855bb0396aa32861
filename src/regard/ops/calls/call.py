"""A call: one attention of all query heads to one source, with shapes checked and zero keys appended."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...caches import Cache
from .. import transforms
from ..patterns import Pattern, grid_positions
from .geometry import Geometry
from .source import TableBias

KEPT_PAIRS, KEPT_MASKS = 1 << 22, 32
"""What static patterns show is kept for so many pairs of query and key at most, and so many calls: to find out takes longer
than to attend."""
_KEPT: Cache[Tensor] = Cache("regard.ops.calls.call.masks", KEPT_MASKS)


@dataclass(frozen=True, eq=False)
class Call:
    """One attention to one source, ready for a backend.

    ``q`` is ``(batch, *q_grid, heads, dim)``, ``k`` and ``v`` are ``(batch, *grid, kv_heads, dim)`` with ``zeros`` zero keys
    already standing around the true key grid. ``device`` is where it would run (``q`` may be a meta tensor when planning).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Pattern
    scale: float
    bias: Tensor | None = None
    table: TableBias | None = None
    valid: Tensor | None = None
    q_start: tuple[int, ...] = ()
    zeros: tuple[tuple[int, int], ...] = ()
    dropout: float = 0.0
    need_lse: bool = False
    device: torch.device = torch.device("cpu")

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

    @property
    def rank(self) -> int:
        return self.q.ndim - 3

    @property
    def q_grid(self) -> tuple[int, ...]:
        return tuple(self.q.shape[1:-2])

    @property
    def padded_grid(self) -> tuple[int, ...]:
        """The key grid with its zero keys."""
        return tuple(self.k.shape[1:-2])

    @property
    def k_grid(self) -> tuple[int, ...]:
        """The true key grid."""
        return tuple(n - before - after for n, (before, after) in zip(self.padded_grid, self.zeros, strict=True))

    @property
    def geometry(self) -> Geometry:
        """What the tiles of a static pattern depend on, plain numbers: a compiled graph is specialised to its grid."""
        return self._made_geometry() if torch.compiler.is_compiling() else self._kept_geometry

    @cached_property
    def _kept_geometry(self) -> Geometry:
        return self._made_geometry()

    def _made_geometry(self) -> Geometry:
        table = None if self.table is None else (self.table.pattern.spec, _ints(self.table.table.shape[1:]))
        grids = _ints(self.q_grid), _ints(self.k_grid), _ints(self.q_start)
        return Geometry(self.pattern.spec, *grids, tuple((int(a), int(b)) for a, b in self.zeros), table)

    @property
    def queries(self) -> int:
        return math.prod(self.q_grid)

    @property
    def keys(self) -> int:
        return math.prod(self.padded_grid)

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self.carriers)

    @property
    def expects_backward(self) -> bool:
        """Whether a backward may come, which needs the log-sum-exp."""
        return self.needs_grad or (torch.is_grad_enabled() and transforms.active())

    @property
    def carriers(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The tensors that carry derivatives: q, k, v, the bias and the bias table."""
        return self.q, self.k, self.v, self.bias, self.table.table if self.table else None

    @property
    def is_differentiated(self) -> bool:
        """Whether derivatives are being taken that fused operators do not have."""
        return transforms.differentiated(*self.carriers)

    def positions(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates of the queries ``(queries, 1, rank)`` and of the keys ``(1, keys, rank)``."""
        q_pos = grid_positions(self.q_grid, self.q_start, self.q.device)
        k_pos = grid_positions(self.padded_grid, [-before for before, _ in self.zeros], self.q.device)
        return (q_pos if rows is None else q_pos[rows])[:, None], k_pos[None]

    def mask(self, rows: Tensor | None = None) -> Tensor | None:
        """Visible pairs, broadcastable to ``(batch, heads, queries, keys)``; None where all are. ``valid`` included."""
        mask = None
        if not self.pattern.sees_all:
            mask = self._kept_visible() if rows is None and self._keeps_visible() else self._visible(rows)
        if self.valid is not None:
            valid = self.valid.reshape(self.valid.shape[0], 1, 1, -1)
            mask = valid if mask is None else mask & valid
        return mask

    def _visible(self, rows: Tensor | None = None) -> Tensor:
        visible = self.pattern.visible(*self.positions(rows), self.q_grid, self.k_grid)
        return visible if visible.ndim == 4 else visible[None, None]

    def _keeps_visible(self) -> bool:
        """Whether the next call of this kind may find it as it was: plain tensors, and not too many pairs."""
        plain = type(self.q) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling() and not transforms.active()
        return plain and self.pattern.static and self.queries * self.keys <= KEPT_PAIRS

    def _kept_visible(self) -> Tensor:
        key = (self.pattern, self.q_grid, self.padded_grid, self.q_start, self.zeros, self.q.device)
        return _KEPT.get(key, self._outside_inference)

    def _outside_inference(self) -> Tensor:
        with torch.inference_mode(False):
            return self._visible()

    def dense_bias(self, rows: Tensor | None = None) -> Tensor | None:
        """The bias, broadcastable to ``(batch, heads, queries, keys)``."""
        if self.bias is not None:
            return self.bias if rows is None or self.bias.shape[2] == 1 else self.bias[:, :, rows]
        if self.table is None:
            return None
        q_pos, k_pos = self.positions(rows)
        index = 0
        for axis, size in enumerate(self.table.table.shape[1:]):
            extent = size // 2
            steps = self.table.pattern.offset(axis, q_pos[..., axis], k_pos[..., axis], self.k_grid[axis], self.rank)
            index = index * size + steps.clamp(-extent, extent) + extent  # out of range only where invisible
        return self.table.table.flatten(1)[:, index][None]


def _ints(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(operator.index(n) for n in sizes)
