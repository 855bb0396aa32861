"""Patterns: which keys each query of a grid may see.

A pattern is a small immutable value. It is defined by :meth:`Pattern.visible` on global coordinates; everything else (the
mask, the number of keys of a query, the halo a tile of queries needs) follows from that.

Most static patterns are *separable*: on every axis a query sees an arithmetic progression of keys, and a key is visible
when it is on all axes. Such a pattern states one thing, :meth:`Separable.axis_window`. Unions and intersections of
separable patterns decompose into disjoint separable parts (:func:`disjoint_parts`), so fast backends need to know only that
case. Routed patterns (:class:`Blocks`, :class:`Clusters`) hold tensors and may differ per batch item and head.

``True`` means visible, everywhere.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Ints = int | tuple[int, ...]


# --------------------------------------------------------------------------------------------------------------------
# arithmetic that reads the same for numpy arrays (plans) and tensors (masks)


def _minimum(a, b):
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    return np.minimum(a, b)


def _maximum(a, b):
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))
    return np.maximum(a, b)


def _per_axis(value, axis: int):
    return value[axis] if isinstance(value, tuple) else value


def _normalise(name: str, value, kind: type, low: int | None = None):
    """A scalar, or a tuple with one entry per axis, checked."""
    entries = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for entry in entries:
        if (kind is bool) != isinstance(entry, bool) or not isinstance(entry, kind):
            raise ValueError(f"{name} must be {kind.__name__} or a tuple of them, one per axis; got {value!r}")
        if low is not None and entry < low:
            raise ValueError(f"{name} must be at least {low}; got {value!r}")
    return entries if isinstance(value, (tuple, list)) else value


class AxisWindow(NamedTuple):
    """Keys ``start, start + step, ...`` (``count`` of them) seen on one axis; arrays broadcast over queries."""

    start: Any
    count: Any
    step: Any


# --------------------------------------------------------------------------------------------------------------------
# the base and its algebra


class Pattern:
    """Which keys each query sees; a frozen value.

    Combine patterns with ``|`` (a set union: a key both see counts once) and ``&``.
    """

    source: ClassVar[str] = ""
    static: ClassVar[bool] = True
    flat: ClassVar[bool] = False
    """Whether only the row-major index of a token counts, so that the grids may be flattened and differ in rank."""

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
        ranks = {len(v) for f in fields(self) if isinstance(v := getattr(self, f.name), tuple) and f.metadata.get("axes", True)}
        if len(ranks) > 1:
            raise ValueError(f"{self!r} mixes per-axis arguments of different lengths")
        return ranks.pop() if ranks else None

    def check(self, q_grid: Sequence[int], k_grid: Sequence[int]) -> None:
        """Raise ``ValueError`` where the pattern cannot be applied to these grids."""
        rank = self.rank()
        if rank is not None and rank != len(k_grid):
            raise ValueError(f"{self!r} has {rank} axes but the key grid is {tuple(k_grid)}")

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
        q_grid, k_grid = tuple(q_grid), tuple(k_grid or q_grid)
        self.check(q_grid, k_grid)
        q_pos = grid_positions(q_grid, q_start, device)[:, None]
        k_pos = grid_positions(k_grid, None, device)[None, :]
        return self.visible(q_pos, k_pos, q_grid, k_grid)

    def degree(self, q_grid: Sequence[int], k_grid: Sequence[int] | None = None) -> Tensor:
        """Number of keys each query sees: ``(*q_grid)``, or ``(batch, heads, *q_grid)`` for routed patterns."""
        q_grid, k_grid = tuple(q_grid), tuple(k_grid or q_grid)
        self.check(q_grid, k_grid)
        k_pos = grid_positions(k_grid)[None]
        rows = max(1, (1 << 26) // len(k_pos[0]))  # the whole mask may be larger than the memory
        chunks = [self.visible(q[:, None], k_pos, q_grid, k_grid).sum(-1) for q in grid_positions(q_grid).split(rows)]
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

    def __or__(self, other: Pattern) -> Pattern:
        return Union((*_members(self, Union), *_members(other, Union)))

    def __and__(self, other: Pattern) -> Pattern:
        return Intersection((*_members(self, Intersection), *_members(other, Intersection)))

    def __repr__(self) -> str:
        shown = []
        for f in fields(self):  # type: ignore[arg-type]  # every concrete pattern is a dataclass
            value = getattr(self, f.name)
            if f.metadata.get("positional"):
                shown.append(repr(value))
            elif value != f.default:
                shown.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _members(pattern: Pattern, kind: type) -> tuple[Pattern, ...]:
    return pattern.members if isinstance(pattern, kind) else (pattern,)  # type: ignore[attr-defined]


def grid_positions(grid: Sequence[int], start: Sequence[int] | None = None, device=None) -> Tensor:
    """Coordinates ``(tokens, rank)`` of a grid in row-major order, shifted by ``start``."""
    start = start or (0,) * len(grid)
    axes = [torch.arange(s, s + n, device=device) for s, n in zip(start, grid, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(grid))


def _inside(pos: Tensor, grid: Sequence[int]) -> Tensor:
    """Whether coordinates ``(..., rank)`` lie on the grid: the zero keys of another member of a union do not."""
    return _fold(torch.logical_and, [(pos[..., axis] >= 0) & (pos[..., axis] < n) for axis, n in enumerate(grid)])


def _positional():
    return field(metadata={"positional": True})


class Separable(Pattern):
    """A pattern that is a product of one arithmetic progression per axis."""

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

    def degree(self, q_grid, k_grid=None):
        k_grid = tuple(k_grid or q_grid)
        self.check(q_grid, k_grid)
        total = torch.ones(tuple(q_grid), dtype=torch.long)
        for axis, (n, length) in enumerate(zip(q_grid, k_grid, strict=True)):
            start, count, step = self.axis_window(axis, np.arange(n), length, len(k_grid))
            first = np.maximum(0, -(start // step))  # zero keys outside the grid are no keys
            last = np.minimum(count, (length - 1 - start) // step + 1)
            counts = np.broadcast_to(np.maximum(last - first, 0), (n,)).astype(np.int64)
            total *= torch.from_numpy(counts).reshape(-1, *[1] * (len(q_grid) - axis - 1))
        return total

    def reach(self, axis, interval, grid):
        start, count, step = self.axis_window(axis, np.arange(*interval), grid[axis], len(grid))
        stop = start + (count - 1) * step + 1
        return max(int(np.min(start)), 0), min(int(np.max(stop)), grid[axis])


# --------------------------------------------------------------------------------------------------------------------
# static patterns


@dataclass(frozen=True, repr=False)
class Dense(Separable):
    """Every query sees every key; the grids may differ in shape and rank.

    Source: Vaswani et al., arXiv:1706.03762.
    """

    source: ClassVar[str] = "arXiv:1706.03762"

    flat: ClassVar[bool] = True

    def axis_window(self, axis, q, length, rank):
        return AxisWindow(q * 0, length, 1)

    def visible(self, q_pos, k_pos, q_grid, k_grid):
        shape = torch.broadcast_shapes(q_pos.shape[:-1], k_pos.shape[:-1])
        return _inside(k_pos, k_grid).expand(shape)

    def degree(self, q_grid, k_grid=None):
        return torch.full(tuple(q_grid), math.prod(k_grid or q_grid))


@dataclass(frozen=True, repr=False)
class Causal(Separable):
    """A query sees itself and what precedes it in row-major (raster) order.

    Source: Vaswani et al., arXiv:1706.03762; raster order over images: Parmar et al., arXiv:1802.05751.
    """

    source: ClassVar[str] = "arXiv:1706.03762"
    flat: ClassVar[bool] = True

    def axis_window(self, axis, q, length, rank):
        if rank != 1:
            raise ValueError("Causal is raster order: apply it to the flattened grid")
        return AxisWindow(q * 0, _minimum(q + 1, length), 1)

    def visible(self, q_pos, k_pos, q_grid, k_grid):
        def raster(pos):
            index = pos[..., 0]
            for axis in range(1, len(k_grid)):
                index = index * k_grid[axis] + pos[..., axis]
            return index

        return (raster(k_pos) <= raster(q_pos)) & _inside(k_pos, k_grid)

    def degree(self, q_grid, k_grid=None):
        return Pattern.degree(self, q_grid, k_grid)

    def reach(self, axis, interval, grid):
        return (0, interval[1]) if axis == 0 else (0, grid[axis])


@dataclass(frozen=True, repr=False)
class Window(Separable):
    """Non-overlapping windows of ``size`` tokens, moved by ``shift``: a query sees its own window.

    Windows are clipped where the grid ends, so a shifted window never joins tokens of opposite borders. On an axis no longer
    than the window everything is visible and the shift is void. ``pad="zero"`` keeps the window full with zero keys after
    the last token, which take part in the softmax; a mixer offers ``pad="token"`` (padding before projection) itself.

    Source: Liu et al., Swin Transformer, arXiv:2103.14030.
    """

    size: Ints = _positional()
    shift: Ints = 0
    pad: str = field(default="mask", metadata={"axes": False})
    source: ClassVar[str] = "arXiv:2103.14030"

    def __post_init__(self):
        object.__setattr__(self, "size", _normalise("size", self.size, int, 1))
        object.__setattr__(self, "shift", _normalise("shift", self.shift, int, 0))
        if self.pad not in ("mask", "zero"):
            raise ValueError(f"pad must be 'mask' or 'zero'; got {self.pad!r}")

    def axis_window(self, axis, q, length, rank):
        size, shift = _per_axis(self.size, axis), _per_axis(self.shift, axis) % _per_axis(self.size, axis)
        padded = length + self.zero_keys(axis, length, rank)[1]
        if length <= size:
            return AxisWindow(q * 0, padded, 1)
        first = (q - shift) // size * size + shift
        start = _maximum(first, 0)
        return AxisWindow(start, _minimum(first + size, padded) - start, 1)

    def zero_keys(self, axis, length, rank):
        size = _per_axis(self.size, axis)
        return (0, -length % size if self.pad == "zero" else 0)

    def extent(self, axis, length, rank):
        return _per_axis(self.size, axis) - 1


@dataclass(frozen=True, repr=False)
class Neighborhood(Separable):
    """The ``kernel_size`` nearest keys of each query on every axis, optionally dilated, strided and causal.

    An axis falls into ``dilation`` interleaved groups; a query sees only its own group, where the window starts
    ``kernel_size // 2`` steps before the query. At borders the window is shifted inward (``border="shift"``), so every query
    sees exactly ``kernel_size`` keys per axis; ``border="mask"`` clips it and ``border="zero"`` fills it with zero keys that
    take part in the softmax. With ``stride``, the queries of a stride group share the window of their leader. A causal axis
    sees the last ``kernel_size`` keys up to the query and never shifts. A group with fewer than ``kernel_size`` points is
    seen whole. All arguments are a number, or one per axis, counted in steps of the dilated group.

    Source: Hassani et al., NAT arXiv:2204.07143, DiNAT arXiv:2209.15001, GNA arXiv:2504.16922.
    """

    kernel_size: Ints = _positional()
    dilation: Ints = 1
    stride: Ints = 1
    causal: bool | tuple[bool, ...] = False
    border: str = field(default="shift", metadata={"axes": False})
    source: ClassVar[str] = "arXiv:2209.15001"

    def __post_init__(self):
        for name, kind, low in (("kernel_size", int, 1), ("dilation", int, 1), ("stride", int, 1), ("causal", bool, None)):
            object.__setattr__(self, name, _normalise(name, getattr(self, name), kind, low))
        if self.border not in ("shift", "mask", "zero"):
            raise ValueError(f"border must be 'shift', 'mask' or 'zero'; got {self.border!r}")
        for axis in range(self.rank() or 1):
            kernel, stride = _per_axis(self.kernel_size, axis), _per_axis(self.stride, axis)
            if stride > kernel:
                raise ValueError(f"stride must not exceed kernel_size; got stride {stride}, kernel_size {kernel}")
            if self.border == "zero" and (stride > 1 or _per_axis(self.causal, axis)):
                raise ValueError(f"border='zero' goes with stride 1 and no causal axis; got {self!r}")

    def axis_window(self, axis, q, length, rank):
        kernel, dilation = _per_axis(self.kernel_size, axis), _per_axis(self.dilation, axis)
        stride = _per_axis(self.stride, axis)
        group, inner = q % dilation, q // dilation
        points = (length - group + dilation - 1) // dilation
        if _per_axis(self.causal, axis):
            leader = _minimum(inner // stride * stride + stride - 1, points - 1)
            start = _maximum(leader - kernel + 1, 0)
            stop = inner + 1
        else:
            leader = _minimum(inner // stride * stride + stride // 2, points - 1)
            start = leader - kernel // 2
            if self.border == "shift":
                start = _minimum(_maximum(start, 0), _maximum(points - kernel, 0))
                stop = _minimum(start + kernel, points)
            elif self.border == "mask":
                start, stop = _maximum(start, 0), _minimum(start + kernel, points)
            else:
                stop = start + kernel
        return AxisWindow(start * dilation + group, stop - start, dilation)

    def zero_keys(self, axis, length, rank):
        if self.border != "zero":
            return (0, 0)
        kernel, dilation = _per_axis(self.kernel_size, axis), _per_axis(self.dilation, axis)
        return (kernel // 2 * dilation, (kernel - 1 - kernel // 2) * dilation)

    def offset(self, axis, q, k, length, rank):
        return (k - q) // _per_axis(self.dilation, axis)

    def extent(self, axis, length, rank):
        return _per_axis(self.kernel_size, axis) - 1


@dataclass(frozen=True, repr=False)
class Halo(Separable):
    """Blocks of ``block`` queries that share the keys of their block and of ``halo`` tokens around it.

    ``border="zero"`` (the paper) lets the halo hang over the grid: the zero keys there take part in the softmax;
    ``"mask"`` clips it, ``"shift"`` moves it inward (generalised neighborhood attention with stride ``block``).

    Source: Vaswani et al., HaloNet, arXiv:2103.12731.
    """

    block: Ints = _positional()
    halo: Ints = _positional()
    border: str = field(default="zero", metadata={"axes": False})
    source: ClassVar[str] = "arXiv:2103.12731"

    def __post_init__(self):
        object.__setattr__(self, "block", _normalise("block", self.block, int, 1))
        object.__setattr__(self, "halo", _normalise("halo", self.halo, int, 0))
        if self.border not in ("shift", "mask", "zero"):
            raise ValueError(f"border must be 'shift', 'mask' or 'zero'; got {self.border!r}")

    def axis_window(self, axis, q, length, rank):
        block, halo = _per_axis(self.block, axis), _per_axis(self.halo, axis)
        start = q // block * block - halo
        stop = start + block + 2 * halo
        if self.border == "mask":
            start, stop = _maximum(start, 0), _minimum(stop, length)
        elif self.border == "shift":
            start = _minimum(_maximum(start, 0), max(length - block - 2 * halo, 0))
            stop = _minimum(start + block + 2 * halo, length)
        return AxisWindow(start, stop - start, 1)

    def zero_keys(self, axis, length, rank):
        if self.border != "zero":
            return (0, 0)
        block, halo = _per_axis(self.block, axis), _per_axis(self.halo, axis)
        return (halo, -length % block + halo)

    def extent(self, axis, length, rank):
        reach = _per_axis(self.block, axis) - 1 + _per_axis(self.halo, axis)
        return reach + _per_axis(self.halo, axis) if self.border == "shift" else reach


@dataclass(frozen=True, repr=False)
class Grid(Separable):
    """A dilated global grid: on each axis a query sees (at most) ``size`` keys, evenly spread over the whole axis.

    The spacing is ``ceil(length / size)``; a query sees the keys that share its position within the spacing.

    Source: Tu et al., MaxViT, arXiv:2204.01697.
    """

    size: Ints = _positional()
    source: ClassVar[str] = "arXiv:2204.01697"

    def __post_init__(self):
        object.__setattr__(self, "size", _normalise("size", self.size, int, 1))

    def _spacing(self, axis: int, length: int) -> int:
        return -(-length // _per_axis(self.size, axis))

    def axis_window(self, axis, q, length, rank):
        spacing = self._spacing(axis, length)
        start = q % spacing
        return AxisWindow(start, (length - start + spacing - 1) // spacing, spacing)

    def offset(self, axis, q, k, length, rank):
        return (k - q) // self._spacing(axis, length)

    def extent(self, axis, length, rank):
        return _per_axis(self.size, axis) - 1


@dataclass(frozen=True, repr=False)
class Axis(Separable):
    """A query sees the keys that differ from it only along one axis: ``Axis(0) | Axis(1)`` is criss-cross attention.

    Source: Ho et al., Axial Transformer, arXiv:1912.12180; Huang et al., CCNet, arXiv:1811.11721.
    """

    axis: int = _positional()
    source: ClassVar[str] = "arXiv:1912.12180"

    def __post_init__(self):
        if isinstance(self.axis, bool) or not isinstance(self.axis, int):
            raise ValueError(f"axis must be an int; got {self.axis!r}")

    def check(self, q_grid, k_grid):
        if not -len(k_grid) <= self.axis < len(k_grid):
            raise ValueError(f"{self!r} does not exist on a grid with {len(k_grid)} axes: {tuple(k_grid)}")

    def axis_window(self, axis, q, length, rank):
        if axis == self.axis % rank:
            return AxisWindow(q * 0, length, 1)
        return AxisWindow(q, 1, 1)

    def extent(self, axis, length, rank):
        return super().extent(axis, length, rank) if axis == self.axis % rank else 0


# --------------------------------------------------------------------------------------------------------------------
# algebra


class _Combined(Pattern):
    members: tuple[Pattern, ...]
    sign: ClassVar[str]

    @property
    def static(self) -> bool:  # type: ignore[override]  # a combination is as static as its members
        return all(m.static for m in self.members)

    def rank(self):
        return next((r for m in self.members if (r := m.rank()) is not None), None)

    def check(self, q_grid, k_grid):
        for member in self.members:
            member.check(q_grid, k_grid)
        if not self.static and any(any(self.zero_keys(i, n, len(k_grid))) for i, n in enumerate(k_grid)):
            raise ValueError(f"zero keys cannot be combined with routed patterns: {self!r}")

    def degree(self, q_grid, k_grid=None):
        k_grid = tuple(k_grid or q_grid)
        parts = disjoint_parts(self, len(k_grid))
        if parts is None:
            return super().degree(q_grid, k_grid)
        self.check(q_grid, k_grid)
        total = torch.zeros(tuple(q_grid), dtype=torch.long)
        for part in parts:
            counts = torch.ones(tuple(q_grid), dtype=torch.long)
            for axis, (n, length) in enumerate(zip(q_grid, k_grid, strict=True)):
                q, k = np.arange(n)[:, None], np.arange(length)[None]
                seen = np.ones((n, length), dtype=bool)
                for pattern, positive in part[axis]:
                    seen &= np.asarray(pattern.axis_visible(axis, q, k, length, len(k_grid))) == positive
                counts *= torch.from_numpy(seen.sum(1)).reshape(-1, *[1] * (len(q_grid) - axis - 1))
            total += counts
        return total

    def zero_keys(self, axis, length, rank):
        pairs = [m.zero_keys(axis, length, rank) for m in self.members]
        return (max(p[0] for p in pairs), max(p[1] for p in pairs))

    def extent(self, axis, length, rank):
        return max(m.extent(axis, length, rank) for m in self.members)

    def __repr__(self):
        return f" {self.sign} ".join(f"({m!r})" if isinstance(m, _Combined) else repr(m) for m in self.members)


@dataclass(frozen=True, repr=False)
class Union(_Combined):
    """Keys that any member sees, each counted once."""

    members: tuple[Pattern, ...] = _positional()
    sign: ClassVar[str] = "|"

    def visible(self, q_pos, k_pos, q_grid, k_grid):
        seen = [m.visible(q_pos, k_pos, q_grid, k_grid) for m in self.members]
        return _fold(torch.logical_or, seen)

    def reach(self, axis, interval, grid):
        reaches = [m.reach(axis, interval, grid) for m in self.members]
        return min(r[0] for r in reaches), max(r[1] for r in reaches)


@dataclass(frozen=True, repr=False)
class Intersection(_Combined):
    """Keys that all members see."""

    members: tuple[Pattern, ...] = _positional()
    sign: ClassVar[str] = "&"

    def visible(self, q_pos, k_pos, q_grid, k_grid):
        seen = [m.visible(q_pos, k_pos, q_grid, k_grid) for m in self.members]
        return _fold(torch.logical_and, seen)

    def reach(self, axis, interval, grid):
        reaches = [m.reach(axis, interval, grid) for m in self.members]
        start, stop = max(r[0] for r in reaches), min(r[1] for r in reaches)
        return start, max(start, stop)


def _fold(operation, masks: list[Tensor]) -> Tensor:
    """Combine masks of static ``(queries, keys)`` and routed ``(batch, heads, queries, keys)`` patterns."""
    result = masks[0]
    for mask in masks[1:]:
        result = operation(result, mask)
    return result


@dataclass(frozen=True, repr=False)
class PerHead(Pattern):
    """Different patterns for consecutive groups of heads: ``PerHead({Window(7): 2, Dense(): 2})``.

    The keys and values are common to all groups.
    """

    groups: tuple[tuple[Pattern, int], ...] = _positional()

    def __post_init__(self):
        groups = self.groups.items() if isinstance(self.groups, dict) else self.groups
        groups = tuple((p, n) for p, n in groups)
        for pattern, heads in groups:
            if not isinstance(pattern, Pattern) or isinstance(pattern, PerHead) or heads < 1:
                raise ValueError(f"PerHead maps patterns to numbers of heads; got {pattern!r}: {heads!r}")
        object.__setattr__(self, "groups", groups)

    @property
    def static(self) -> bool:  # type: ignore[override]  # as static as its groups
        return all(p.static for p, _ in self.groups)

    @property
    def heads(self) -> int:
        return sum(n for _, n in self.groups)

    def rank(self):
        return next((r for p, _ in self.groups if (r := p.rank()) is not None), None)

    def check(self, q_grid, k_grid):
        for pattern, _ in self.groups:
            pattern.check(q_grid, k_grid)

    def visible(self, q_pos, k_pos, q_grid, k_grid):
        masks = []
        for pattern, heads in self.groups:
            seen = pattern.visible(q_pos, k_pos, q_grid, k_grid)
            seen = seen if seen.ndim > 3 else seen[None, None]
            masks.append(seen.expand(-1, heads, *seen.shape[2:]))
        batch = max(m.shape[0] for m in masks)
        return torch.cat([m.expand(batch, *m.shape[1:]) for m in masks], 1)

    def degree(self, q_grid, k_grid=None):
        counts = []
        for pattern, heads in self.groups:
            each = pattern.degree(q_grid, k_grid)
            each = each if each.ndim > len(q_grid) else each[None, None]
            counts.append(each.expand(-1, heads, *q_grid))
        batch = max(c.shape[0] for c in counts)
        return torch.cat([c.expand(batch, *c.shape[1:]) for c in counts], 1)

    def reach(self, axis, interval, grid):
        reaches = [p.reach(axis, interval, grid) for p, _ in self.groups]
        return min(r[0] for r in reaches), max(r[1] for r in reaches)

    def extent(self, axis, length, rank):
        return max(p.extent(axis, length, rank) for p, _ in self.groups)

    def __repr__(self):
        return "PerHead({" + ", ".join(f"{p!r}: {n}" for p, n in self.groups) + "})"


# --------------------------------------------------------------------------------------------------------------------
# routed patterns


class _Routed(Pattern):
    """A pattern decided at run time by a tensor; a pytree node, so it may cross compiled regions."""

    static: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()

        def flatten(pattern):
            names = [f.name for f in fields(pattern)]
            tensors = [n for n in names if isinstance(getattr(pattern, n), Tensor)]
            rest = {n: getattr(pattern, n) for n in names if n not in tensors}
            return [getattr(pattern, n) for n in tensors], (tensors, rest)

        def unflatten(values, context):
            names, rest = context
            pattern = object.__new__(cls)
            for name, value in {**rest, **dict(zip(names, values, strict=True))}.items():
                object.__setattr__(pattern, name, value)
            return pattern

        pytree.register_pytree_node(cls, flatten, unflatten)


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(_Routed):
    """Routed blocks: the queries of a block see the keys of the blocks that ``table`` lists.

    ``table`` is ``(batch, query_blocks, listed)`` or ``(batch, heads, query_blocks, listed)`` of key block indices in
    row-major order of the block grid (``ceil(length / block)`` per axis; the last block of an axis may be partial). -1 lists
    nothing; a block listed twice counts once; batch and heads may be 1. ``block`` is one size, or one per axis.

    Source: Zhu et al., BiFormer, arXiv:2303.08810.
    """

    table: Tensor = _positional()
    block: Ints = _positional()
    source: ClassVar[str] = "arXiv:2303.08810"

    def __post_init__(self):
        if self.table.ndim not in (3, 4) or self.table.is_floating_point():
            raise ValueError(
                "table must be integers (batch, [heads,] query_blocks, listed); "
                f"got {self.table.dtype} {tuple(self.table.shape)}"
            )
        object.__setattr__(self, "block", _normalise("block", self.block, int, 1))

    def rank(self):
        return len(self.block) if isinstance(self.block, tuple) else None

    def block_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-n // _per_axis(self.block, axis)) for axis, n in enumerate(grid))

    def check(self, q_grid, k_grid):
        super().check(q_grid, k_grid)
        if len(q_grid) != len(k_grid):
            raise ValueError(f"{self!r} needs grids of one rank; got queries {tuple(q_grid)}, keys {tuple(k_grid)}")
        blocks = math.prod(self.block_grid(q_grid))
        if self.table.shape[-2] != blocks:
            raise ValueError(
                f"table lists {self.table.shape[-2]} query blocks, but grid {tuple(q_grid)} in blocks of "
                f"{self.block} has {blocks}"
            )

    def table4(self) -> Tensor:
        """The table as ``(batch, heads, query_blocks, listed)``."""
        return self.table if self.table.ndim == 4 else self.table[:, None]

    def visible(self, q_pos, k_pos, q_grid, k_grid):
        q_block = _flat_block(q_pos, self.block, self.block_grid(q_grid))
        k_block = _flat_block(k_pos, self.block, self.block_grid(k_grid))
        return self.pairs(k_grid)[:, :, q_block, k_block]

    def pairs(self, k_grid: Sequence[int]) -> Tensor:
        """Which key blocks each query block lists: ``(batch, heads, query_blocks, key_blocks)`` boolean."""
        table = self.table4()
        pairs = torch.zeros(*table.shape[:3], math.prod(self.block_grid(k_grid)) + 1, dtype=torch.bool, device=table.device)
        return pairs.scatter(-1, table + 1, True)[..., 1:]  # column 0 took the entries that list nothing

    def degree(self, q_grid, k_grid=None):
        k_grid = tuple(k_grid or q_grid)
        self.check(q_grid, k_grid)
        k_block = _flat_block(grid_positions(k_grid, None, self.table.device), self.block, self.block_grid(k_grid))
        sizes = torch.bincount(k_block, minlength=math.prod(self.block_grid(k_grid)))
        counts = (self.pairs(k_grid) * sizes).sum(-1)
        q_block = _flat_block(grid_positions(q_grid, None, self.table.device), self.block, self.block_grid(q_grid))
        return counts[..., q_block].unflatten(-1, tuple(q_grid))

    def __repr__(self):
        return f"Blocks(table{tuple(self.table.shape)}, block={self.block!r})"


def _flat_block(pos: Tensor, block: Ints, block_grid: tuple[int, ...]) -> Tensor:
    index = pos[..., 0] // _per_axis(block, 0)
    for axis in range(1, len(block_grid)):
        index = index * block_grid[axis] + pos[..., axis] // _per_axis(block, axis)
    return index


@dataclass(frozen=True, eq=False, repr=False)
class Clusters(_Routed):
    """A query sees the keys that carry its label.

    ``labels`` are integers ``(batch, *q_grid)`` or ``(batch, heads, *q_grid)`` flattened over the grid:
    ``(batch, queries)`` or ``(batch, heads, queries)``; ``key_labels`` likewise, by default the same.

    Source: Roy et al., Routing Transformer, arXiv:2003.05997.
    """

    labels: Tensor = _positional()
    key_labels: Tensor | None = None
    source: ClassVar[str] = "arXiv:2003.05997"
    flat: ClassVar[bool] = True

    def __post_init__(self):
        for labels in (self.labels, self.key_labels):
            if labels is not None and (labels.ndim not in (2, 3) or labels.is_floating_point()):
                raise ValueError(f"labels must be integers (batch, [heads,] tokens); got {labels.dtype} {tuple(labels.shape)}")

    def rank(self):
        return None

    def check(self, q_grid, k_grid):
        keys = self.labels if self.key_labels is None else self.key_labels
        for name, labels, grid in (("query", self.labels, q_grid), ("key", keys, k_grid)):
            if labels.shape[-1] != math.prod(grid):
                raise ValueError(f"{labels.shape[-1]} {name} labels for a grid {tuple(grid)} of {math.prod(grid)} tokens")

    def visible(self, q_pos, k_pos, q_grid, k_grid):
        def at(labels, pos, grid):
            labels = labels if labels.ndim == 3 else labels[:, None]
            return labels[..., _flat_block(pos, 1, tuple(grid))]

        keys = self.labels if self.key_labels is None else self.key_labels
        return at(self.labels, q_pos, q_grid) == at(keys, k_pos, k_grid)

    def __repr__(self):
        return f"Clusters(labels{tuple(self.labels.shape)})"


# --------------------------------------------------------------------------------------------------------------------
# decomposition


class Literal(NamedTuple):
    """A separable pattern that must hold on an axis (or must not)."""

    pattern: Separable
    positive: bool


Part = tuple[frozenset[Literal], ...]
"""A product of one condition per axis: all literals of an axis hold there."""


def disjoint_parts(pattern: Pattern, rank: int) -> list[Part] | None:
    """Disjoint products whose union is ``pattern``, or None for patterns that are not built from separable ones."""
    if isinstance(pattern, Causal) and rank > 1:
        return None
    if isinstance(pattern, Separable):
        return [(frozenset({Literal(pattern, True)}),) * rank]
    if not isinstance(pattern, _Combined):
        return None
    members = [disjoint_parts(m, rank) for m in pattern.members]
    if any(m is None for m in members):
        return None
    result: list[Part] = members[0]  # type: ignore[assignment]  # checked above
    for parts in members[1:]:
        if isinstance(pattern, Intersection):
            result = [tuple(a | b for a, b in zip(p, q, strict=True)) for p in result for q in parts]  # type: ignore[union-attr]
        else:
            fresh = list(parts)  # type: ignore[arg-type]
            for taken in result:
                fresh = [piece for part in fresh for piece in _without(part, taken)]
            result = result + fresh
    return result


def _without(part: Part, taken: Part) -> list[Part]:
    """``part`` minus ``taken`` as disjoint products: the first axis on which a literal of ``taken`` fails tells which."""
    pieces: list[Part] = []
    prefix = list(part)
    for axis, literals in enumerate(taken):
        for literal in sorted(literals, key=repr):
            failed = Literal(literal.pattern, not literal.positive)
            if literal not in prefix[axis]:
                if failed in prefix[axis]:  # disjoint already
                    return [*pieces, tuple(prefix)]
                pieces.append((*prefix[:axis], prefix[axis] | {failed}, *prefix[axis + 1 :]))
            prefix[axis] = prefix[axis] | {literal}
    return pieces


# --------------------------------------------------------------------------------------------------------------------
# text form

_CONSTRUCTORS = {c.__name__.lower(): c for c in (Dense, Causal, Window, Neighborhood, Halo, Grid, Axis, PerHead)}


def parse(text: str) -> Pattern:
    """Read a static pattern from text such as ``"neighborhood(7, dilation=2) | axis(0)"``; names in any case.

    Raises ``ValueError`` that quotes the text and lists what exists.
    """
    return getattr(_PARSED, _place(text))


class _Parsed:
    """What was read, as attributes: a graph under trace can follow those, but not the reading itself."""


_PARSED = _Parsed()


@torch.compiler.assume_constant_result
def _place(text: str) -> str:
    """The name of the attribute that holds the pattern of a text."""
    return _read(text)


@cache
def _read(text: str) -> str:
    try:
        pattern = _build(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"cannot read pattern {text!r}: {reason}") from None
    name = f"pattern_{len(vars(_PARSED))}"
    setattr(_PARSED, name, pattern)
    return name


def _build(node: ast.expr) -> Pattern:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitOr, ast.BitAnd)):
        left, right = _build(node.left), _build(node.right)
        return left | right if isinstance(node.op, ast.BitOr) else left & right
    call = ast.Call(node, [], []) if isinstance(node, ast.Name) else node
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError("expected patterns joined by | and &, such as 'window(7, shift=3) | axis(0)'")
    name = call.func.id.lower()
    if name not in _CONSTRUCTORS:
        raise ValueError(f"unknown pattern {call.func.id!r}; static patterns are {', '.join(sorted(_CONSTRUCTORS))}")
    if name == "perhead":
        if len(call.args) != 1 or not isinstance(call.args[0], ast.Dict):
            raise ValueError("PerHead takes a dict from patterns to numbers of heads")
        groups = call.args[0]
        return PerHead(tuple((_build(k), ast.literal_eval(v)) for k, v in zip(groups.keys, groups.values, strict=True) if k))
    arguments = [ast.literal_eval(a) for a in call.args]
    return _CONSTRUCTORS[name](*arguments, **{k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg})


def as_pattern(value: Pattern | str) -> Pattern:
    """A pattern, from itself or from its text form."""
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        return parse(value)
    raise ValueError(f"expected a pattern or its text form; got {type(value).__name__} {value!r}")


def tensors_of(pattern: Pattern) -> Iterable[Tensor]:
    """The tensors a routed pattern holds."""
    return (leaf for leaf in pytree.tree_leaves(pattern) if isinstance(leaf, Tensor))
