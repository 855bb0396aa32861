"""What a pattern is: the interface, and the case on which everything fast rests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...checks import check_device, check_grid, check_sizes, shown

if TYPE_CHECKING:
    from .static import Neighborhood

Ints = int | tuple[int, ...]


def minimum(a, b):
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):  # as_tensor would fix a size that an export leaves open
        return a.clamp(max=b) if isinstance(a, Tensor) else b.clamp(max=a)
    return np.minimum(a, b)


def maximum(a, b):
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a.clamp(min=b) if isinstance(a, Tensor) else b.clamp(min=a)
    return np.maximum(a, b)


def per_axis(value, axis: int):
    return value[axis] if isinstance(value, tuple) else value


def settle_sizes(pattern: Pattern, **lowest: int) -> None:
    """Check the whole numbers of a pattern, each one number or one per axis, from their lowest value on."""
    for name, low in lowest.items():
        object.__setattr__(pattern, name, check_sizes(name, getattr(pattern, name), low=low))


class AxisWindow(NamedTuple):
    """Keys ``start, start + step, ...`` (``count`` of them) seen on one axis; arrays broadcast over queries."""

    start: Any
    count: Any
    step: Any


class ListedBlocks(NamedTuple):
    """Queries of a block see the keys of the blocks listed for it.

    ``table`` is ``(batch, heads, query_blocks, listed)``, ``sizes`` those of a block, one per axis; ``single`` ones are single
    tokens.
    """

    table: Tensor
    sizes: tuple[int, ...]
    single: bool

    @property
    def tokens(self) -> int:
        """Tokens of a whole block."""
        return math.prod(self.sizes)


class Pattern:
    """Which keys each query sees; a frozen value.

    Combine patterns with ``|`` (a set union: a key both see counts once) and ``&``.
    """

    source: ClassVar[str] = ""
    static: ClassVar[bool] = True
    flat: ClassVar[bool] = False
    """Whether only the row-major index of a token counts, so that the grids may be flattened and differ in rank."""
    ordered: ClassVar[bool] = False
    """Whether what is visible depends on which of two tokens comes first in raster order."""
    sees_all: ClassVar[bool] = False
    """Whether every query sees every key."""
    places_queries: ClassVar[bool] = True
    """Whether queries stand on the key grid, which they may then not leave."""
    across_grids: ClassVar[bool] = False
    """Whether keys can be asked for their queries on another grid, see :meth:`transposed`."""

    @property
    def spec(self) -> str:
        """The text form that :func:`parse` reads back."""
        return repr(self)

    def visible(self, q_pos: Tensor, k_pos: Tensor, q_grid: Sequence[int], k_grid: Sequence[int]) -> Tensor:
        """Whether keys at ``k_pos`` are visible to queries at ``q_pos``.

        ``q_pos`` and ``k_pos`` are integer coordinates ``(..., rank)`` on the key grid that broadcast against each other.
        Routed patterns return ``(batch, heads, ...)``, with 1 where they do not differ.
        """
        raise NotImplementedError

    def rank(self) -> int | None:
        """The grid rank the pattern is made for, or None for any."""
        declared = fields(self)  # type: ignore[arg-type]  # every concrete pattern is a dataclass
        ranks = {len(v) for f in declared if isinstance(v := getattr(self, f.name), tuple) and f.metadata.get("axes", True)}
        if len(ranks) > 1:
            raise ValueError(f"{self!r} mixes per-axis arguments of different lengths")
        return ranks.pop() if ranks else None

    def check(self, q_grid: Sequence[int], k_grid: Sequence[int]) -> None:
        """Raise ``ValueError`` where the pattern cannot be applied to these grids."""
        rank = self.rank()
        if rank is not None and rank != len(k_grid):
            raise ValueError(f"{self!r} has {rank} axes but the key grid is {tuple(k_grid)}")

    def check_ranks(self, q_grid: Sequence[int], k_grid: Sequence[int]) -> None:
        """Raise ``ValueError`` where the pattern needs grids of one rank and these are not."""
        members = [pattern for pattern, _ in self.head_groups() or ((self, 0),)]
        if len(q_grid) != len(k_grid) and not all(member.flat for member in members):
            raise ValueError(f"{self!r} needs grids of one rank; got queries {tuple(q_grid)}, keys {tuple(k_grid)}")

    def zero_keys(self, axis: int, length: int, rank: int) -> tuple[int, int]:
        """How many zero keys stand before and after an axis (only for ``border="zero"`` and ``pad="zero"``)."""
        return (0, 0)

    def mask(
        self,
        q_grid: Sequence[int],
        k_grid: Sequence[int] | None = None,
        *,
        q_start: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The pattern as a boolean tensor ``(queries, keys)``, or ``(batch, heads, queries, keys)`` for routed ones.

        Slow and large: the oracle of every test. Tokens are in row-major order. Zero keys outside the grid do not appear.
        """
        q_grid, k_grid, q_start = check_grids(q_grid, k_grid, q_start)
        device = check_device("device", device)
        self.check_ranks(q_grid, k_grid)
        self.check(q_grid, k_grid)
        q_pos = grid_positions(q_grid, q_start, device)[:, None]
        k_pos = grid_positions(k_grid, None, device)[None, :]
        return self.visible(q_pos, k_pos, q_grid, k_grid)

    def degree(
        self, q_grid: Sequence[int], k_grid: Sequence[int] | None = None, q_start: Sequence[int] | None = None
    ) -> Tensor:
        """Number of keys each query sees: ``(*q_grid)``, or ``(batch, heads, *q_grid)`` where they may differ."""
        q_grid, k_grid, q_start = check_grids(q_grid, k_grid, q_start)
        self.check_ranks(q_grid, k_grid)
        self.check(q_grid, k_grid)
        k_pos = grid_positions(k_grid)[None]
        rows = max(1, (1 << 26) // len(k_pos[0]))  # the whole mask may be larger than the memory
        positions = grid_positions(q_grid, q_start)
        chunks = [self.visible(q[:, None], k_pos, q_grid, k_grid).sum(-1) for q in positions.split(rows)]
        return torch.cat(chunks, -1).unflatten(-1, q_grid)

    def reach(self, axis: int, interval: tuple[int, int], grid: Sequence[int]) -> tuple[int, int]:
        """Half-open key interval on ``axis`` that the queries of the half-open ``interval`` need."""
        return (0, grid[axis])

    def offset(self, axis: int, q, k, length: int, rank: int):
        """Signed distance from query to key in the pattern's own steps; the index of a relative bias."""
        return k - q

    def extent(self, axis: int, length: int | None, rank: int) -> int:
        """Largest absolute :meth:`offset` on ``axis``; a bias table has ``2 * extent + 1`` entries there."""
        if length is None:
            raise ValueError(f"{self!r} sees arbitrarily far: a relative bias over it needs the grid")
        return length - 1

    def place(self, q: int) -> int:
        """The coordinate, on the key grid, of the key that the query at coordinate ``q`` of an axis stands on."""
        return q

    # what else it may be seen as: backends ask these, none asks for a class

    def as_product(self, rank: int) -> Separable | None:
        """The pattern as a product of one window per axis of a grid with ``rank`` axes, None where it is none."""
        return None

    def as_blocks(self, rank: int) -> ListedBlocks | None:
        """The pattern as listed blocks of a grid with ``rank`` axes, None where it is none."""
        return None

    def as_neighborhood(self) -> Neighborhood | None:
        """The pattern as a neighborhood, None where it is none."""
        return None

    def as_labels(self) -> tuple[Tensor, Tensor] | None:
        """Labels of queries and of keys, ``(batch, heads, tokens)``: equal ones see each other. None where there are none."""
        return None

    def as_joined(self) -> tuple[tuple[Pattern, ...], Callable[[Any, Any], Any]] | None:
        """Patterns and the operation that joins their masks, None where it is not made of others."""
        return None

    def head_groups(self) -> tuple[tuple[Pattern, int], ...] | None:
        """Patterns of consecutive groups of heads and how many heads each has, None where all heads share one."""
        return None

    def batch_shapes(self) -> list[tuple[int, ...]]:
        """What the tensors of a routed pattern broadcast to: ``(batch,)`` or ``(batch, heads)`` of each."""
        return []

    def pairs_by_size(self, q_grid: Sequence[int], k_grid: Sequence[int]) -> int | None:
        """Pairs per batch item and head where the tensors of a routed pattern have no content; None where they have."""
        return None

    def transposed(self) -> Pattern:
        """The pattern under which each key sees the queries that saw it."""
        from .transposed import Transposed

        return Transposed(self)

    def __or__(self, other: Pattern) -> Pattern:
        from .combined import Union

        return Union((*_members(self, Union), *_members(_other("|", self, other), Union)))

    def __and__(self, other: Pattern) -> Pattern:
        from .combined import Intersection

        return Intersection((*_members(self, Intersection), *_members(_other("&", self, other), Intersection)))

    def __ror__(self, other: object) -> Pattern:
        return _other("|", self, other)  # another pattern would have answered itself: this raises

    def __rand__(self, other: object) -> Pattern:
        return _other("&", self, other)

    def __repr__(self) -> str:
        shown = []
        for f in fields(self):  # type: ignore[arg-type]  # every concrete pattern is a dataclass
            value = getattr(self, f.name)
            if f.metadata.get("positional"):
                shown.append(repr(value))
            elif value != f.default:
                shown.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _other(sign: str, pattern: Pattern, other: object) -> Pattern:
    if not isinstance(other, Pattern):
        raise TypeError(f"{sign} joins patterns; got {pattern!r} and {shown(other)}")
    return other


def check_grids(q_grid, k_grid, q_start) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
    """The grids of queries and keys, by default the same, and where the queries start, as tuples."""
    q_grid = check_grid("q_grid", q_grid)
    k_grid = q_grid if k_grid is None else check_grid("k_grid", k_grid)
    if q_start is not None:
        q_start = check_grid("q_start", q_start, low=0)
        if len(q_start) != len(q_grid):
            raise ValueError(f"q_start must have one entry per axis of the query grid {q_grid}; got {q_start}")
    return q_grid, k_grid, q_start


def _members(pattern: Pattern, kind: type) -> tuple[Pattern, ...]:
    return pattern.members if isinstance(pattern, kind) else (pattern,)  # type: ignore[attr-defined]


def grid_positions(grid: Sequence[int], start: Sequence[int] | None = None, device=None) -> Tensor:
    """Coordinates ``(tokens, rank)`` of a grid in row-major order, shifted by ``start``."""
    start = start or (0,) * len(grid)
    axes = [torch.arange(s, s + n, device=device) for s, n in zip(start, grid, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(grid))


def raster(pos: Tensor, grid: Sequence[int]) -> Tensor:
    """Row-major indices of coordinates ``(..., rank)``."""
    index = pos[..., 0]
    for axis in range(1, len(grid)):
        index = index * grid[axis] + pos[..., axis]
    return index


def inside(pos: Tensor, grid: Sequence[int]) -> Tensor:
    """Whether coordinates ``(..., rank)`` lie on the grid: the zero keys of another member of a union do not."""
    return fold(torch.logical_and, [(pos[..., axis] >= 0) & (pos[..., axis] < n) for axis, n in enumerate(grid)])


def fold(operation, masks: list[Tensor]) -> Tensor:
    """Combine masks of static ``(queries, keys)`` and routed ``(batch, heads, queries, keys)`` patterns."""
    result = masks[0]
    for mask in masks[1:]:
        result = operation(result, mask)
    return result


def along_axis(counts: np.ndarray, axis: int, rank: int) -> Tensor:
    """Counts per point of an axis, shaped to broadcast over a grid."""
    return torch.from_numpy(counts.astype(np.int64)).reshape(-1, *[1] * (rank - axis - 1))


def positional():
    return field(metadata={"positional": True})


class Separable(Pattern):
    """A pattern that is a product of one arithmetic progression per axis."""

    def as_product(self, rank: int) -> Separable | None:
        return self

    def axis_window(self, axis: int, q, length: int, rank: int) -> AxisWindow:
        """The keys that queries at coordinates ``q`` see on ``axis`` of a key grid with ``length`` points there."""
        raise NotImplementedError

    def axis_visible(self, axis: int, q, k, length: int, rank: int):
        start, count, step = self.axis_window(axis, q, length, rank)
        away = k - start
        return (away >= 0) & (away < count * step) & (away % step == 0)

    def visible(self, q_pos, k_pos, q_grid, k_grid):
        rank = len(k_grid)
        seen = self.axis_visible(0, q_pos[..., 0], k_pos[..., 0], k_grid[0], rank)
        for axis in range(1, rank):
            seen = seen & self.axis_visible(axis, q_pos[..., axis], k_pos[..., axis], k_grid[axis], rank)
        return seen

    def degree(self, q_grid, k_grid=None, q_start=None):
        q_grid, k_grid, q_start = check_grids(q_grid, k_grid, q_start)
        q_start = q_start or (0,) * len(q_grid)
        self.check(q_grid, k_grid)
        total = torch.ones(q_grid, dtype=torch.long)
        for axis, (n, length) in enumerate(zip(q_grid, k_grid, strict=True)):
            q = np.arange(q_start[axis], q_start[axis] + n)
            start, count, step = self.axis_window(axis, q, length, len(k_grid))
            first = np.maximum(0, -(start // step))  # zero keys outside the grid are no keys
            last = np.minimum(count, (length - 1 - start) // step + 1)
            total *= along_axis(np.broadcast_to(np.maximum(last - first, 0), (n,)), axis, len(q_grid))
        return total

    def reach(self, axis, interval, grid):
        start, count, step = self.axis_window(axis, np.arange(*interval), grid[axis], len(grid))
        stop = start + (count - 1) * step + 1
        return max(int(np.min(start)), 0), min(int(np.max(stop)), grid[axis])
