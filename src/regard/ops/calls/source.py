"""A source: keys and values, the pattern that says which of them a query sees, and a bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..patterns import Pattern
from .footprint import Footprint


@runtime_checkable
class TableBias(Protocol):
    """A learned bias over relative offsets: ``table`` is ``(heads, *offsets)`` indexed by ``pattern.offset``.

    Entry ``extent`` of an axis (its middle) is offset 0, where ``2 * extent + 1`` is the size of that axis.
    """

    @property
    def table(self) -> Tensor: ...

    @property
    def pattern(self) -> Pattern: ...


Bias = Tensor | TableBias


@dataclass(frozen=True, eq=False)
class Source:
    """Keys and values, the pattern that says which of them each query sees, and an optional bias.

    Args:
        k, v: ``(batch, *grid, heads, dim)``; the heads divide the query heads.
        pattern: a pattern, or its text form.
        q: queries used for this source instead of the common ones.
        bias: added to the scaled logits: a tensor that broadcasts to ``(batch, heads, queries, keys)``, tokens in row-major
            order, or a :class:`TableBias`.
        valid: ``(batch, *grid)`` boolean, True where a key exists.
        heads: indices of the query heads that see this source (all by default); ``k`` and ``v`` then serve only those.
        footprint: which cells the keys stand for, where they are not cells themselves (pooled keys); for pictures alone.
    """

    k: Tensor
    v: Tensor
    pattern: Pattern | str = "dense"
    q: Tensor | None = None
    bias: Bias | None = None
    valid: Tensor | None = None
    heads: tuple[int, ...] | None = None
    footprint: Footprint | None = None


@dataclass(frozen=True, eq=False)
class HeadTable:
    """A plain :class:`TableBias`."""

    table: Tensor
    pattern: Pattern
