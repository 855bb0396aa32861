"""Static patterns: what they show depends on the grids alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ...checks import LARGEST, check_choice, check_flag, check_integer
from ...names import arguments_named
from ..tracing import count_steps, fill
from .base import (
    AxisWindow,
    Ints,
    Separable,
    check_grids,
    grid_positions,
    inside,
    maximum,
    minimum,
    per_axis,
    positional,
    raster,
    settle_sizes,
)

BORDERS = ("shift", "mask", "zero")


@arguments_named("pattern")
@dataclass(frozen=True, repr=False)
class Dense(Separable):
    """Every query sees every key; the grids may differ in shape and rank.

    Source: Vaswani et al., arXiv:1706.03762.
    """

    source: ClassVar[str] = "arXiv:1706.03762"

    flat: ClassVar[bool] = True
    sees_all: ClassVar[bool] = True
    places_queries: ClassVar[bool] = False
    across_grids: ClassVar[bool] = True

    def axis_window(self, axis, q, length, rank):
        return AxisWindow(q * 0, length, 1)

    def transposed(self):
        return self

    def visible(self, q_pos, k_pos, q_grid, k_grid):
        shape = torch.broadcast_shapes(q_pos.shape[:-1], k_pos.shape[:-1])
        return inside(k_pos, k_grid).expand(shape)

    def degree(self, q_grid, k_grid=None, q_start=None):
        q_grid, k_grid, _ = check_grids(q_grid, k_grid, q_start)
        return torch.full(q_grid, math.prod(k_grid))


@arguments_named("pattern")
@dataclass(frozen=True, repr=False)
class Causal(Separable):
    """A query sees itself and what precedes it in row-major (raster) order of the key grid.

    Where one of the grids is a sequence and the other is not, queries and keys are counted, each in their own raster order.

    Source: Vaswani et al., arXiv:1706.03762; raster order over images: Parmar et al., arXiv:1802.05751.
    """

    source: ClassVar[str] = "arXiv:1706.03762"
    flat: ClassVar[bool] = True
    ordered: ClassVar[bool] = True

    def as_product(self, rank):
        return self if rank == 1 else None

    def axis_window(self, axis, q, length, rank):
        if rank != 1:
            raise ValueError("Causal is raster order: apply it to the flattened grid")
        return AxisWindow(q * 0, minimum(q + 1, length), 1)

    def visible(self, q_pos, k_pos, q_grid, k_grid):
        index = raster(q_pos, k_grid if len(q_grid) == len(k_grid) else q_grid)
        return (raster(k_pos, k_grid) <= index) & inside(k_pos, k_grid)

    def check(self, q_grid, k_grid):
        if len(q_grid) != len(k_grid) and 1 not in (len(q_grid), len(k_grid)):
            raise ValueError(
                f"{self!r} needs grids of one rank, or a sequence; got queries {tuple(q_grid)}, keys {tuple(k_grid)}"
            )

    def degree(self, q_grid, k_grid=None, q_start=None):
        q_grid, k_grid, q_start = check_grids(q_grid, k_grid, q_start)
        self.check(q_grid, k_grid)
        seen = raster(grid_positions(q_grid, q_start), k_grid if len(q_grid) == len(k_grid) else q_grid) + 1
        return seen.clamp(max=math.prod(k_grid)).unflatten(0, q_grid)

    def reach(self, axis, interval, grid):
        return (0, interval[1]) if axis == 0 else (0, grid[axis])


@arguments_named("pattern")
@dataclass(frozen=True, repr=False)
class Window(Separable):
    """Non-overlapping windows of ``size`` tokens, moved by ``shift``: a query sees its own window.

    Windows are clipped where the grid ends, so a shifted window never joins tokens of opposite borders. On an axis no longer
    than the window everything is visible and the shift is void. ``pad="zero"`` keeps the window full with zero keys after
    the last token, which take part in the softmax; a mixer offers ``pad="token"`` (padding before projection) itself.

    Source: Liu et al., Swin Transformer, arXiv:2103.14030.
    """

    size: Ints = positional()
    shift: Ints = 0
    pad: str = field(default="mask", metadata={"axes": False})
    source: ClassVar[str] = "arXiv:2103.14030"

    def __post_init__(self):
        settle_sizes(self, size=1, shift=0)
        check_choice("pad", self.pad, ("mask", "zero"))
        self.rank()

    def axis_window(self, axis, q, length, rank):
        size, shift = per_axis(self.size, axis), per_axis(self.shift, axis) % per_axis(self.size, axis)
        padded = length + self.zero_keys(axis, length, rank)[1]
        if length <= size:
            return AxisWindow(q * 0, padded, 1)
        first = (q - shift) // size * size + shift
        start = maximum(first, 0)
        return AxisWindow(start, minimum(first + size, padded) - start, 1)

    def zero_keys(self, axis, length, rank):
        size = per_axis(self.size, axis)
        return (0, fill(length, size) if self.pad == "zero" else 0)

    def extent(self, axis, length, rank):
        return per_axis(self.size, axis) - 1

    def transposed(self):
        return self  # the zero keys of a padded window send zeros, and their mass cancels


@arguments_named("pattern")
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

    kernel_size: Ints = positional()
    dilation: Ints = 1
    stride: Ints = 1
    causal: bool | tuple[bool, ...] = False
    border: str = field(default="shift", metadata={"axes": False})
    source: ClassVar[str] = "arXiv:2209.15001"

    def __post_init__(self):
        settle_sizes(self, kernel_size=1, dilation=1, stride=1)
        if isinstance(self.causal, (tuple, list)):
            flags = tuple(check_flag(f"causal[{axis}]", flag) for axis, flag in enumerate(self.causal))
            object.__setattr__(self, "causal", flags)
        else:
            check_flag("causal", self.causal)
        check_choice("border", self.border, BORDERS)
        for axis in range(self.rank() or 1):
            kernel, stride = per_axis(self.kernel_size, axis), per_axis(self.stride, axis)
            if stride > kernel:
                raise ValueError(f"stride must not exceed kernel_size; got stride {stride}, kernel_size {kernel}")
            if self.border == "zero" and (stride > 1 or per_axis(self.causal, axis)):
                raise ValueError(f"border='zero' goes with stride 1 and no causal axis; got {self!r}")

    def as_neighborhood(self):
        return self

    def axis_window(self, axis, q, length, rank):
        kernel, dilation = per_axis(self.kernel_size, axis), per_axis(self.dilation, axis)
        stride = per_axis(self.stride, axis)
        group, inner = q % dilation, q // dilation
        points = (length - group + dilation - 1) // dilation
        if per_axis(self.causal, axis):
            leader = minimum(inner // stride * stride + stride - 1, points - 1)
            start = maximum(leader - kernel + 1, 0)
            stop = inner + 1
        else:
            leader = minimum(inner // stride * stride + stride // 2, points - 1)
            start = leader - kernel // 2
            if self.border == "shift":
                start = minimum(maximum(start, 0), maximum(points - kernel, 0))
                stop = minimum(start + kernel, points)
            elif self.border == "mask":
                start, stop = maximum(start, 0), minimum(start + kernel, points)
            else:
                stop = start + kernel
        return AxisWindow(start * dilation + group, stop - start, dilation)

    def zero_keys(self, axis, length, rank):
        if self.border != "zero":
            return (0, 0)
        kernel, dilation = per_axis(self.kernel_size, axis), per_axis(self.dilation, axis)
        return (kernel // 2 * dilation, (kernel - 1 - kernel // 2) * dilation)

    def offset(self, axis, q, k, length, rank):
        return (k - q) // per_axis(self.dilation, axis)

    def extent(self, axis, length, rank):
        kernel, stride = per_axis(self.kernel_size, axis), per_axis(self.stride, axis)
        if self.border == "shift" or per_axis(self.causal, axis):
            return kernel - 1
        before, after = kernel // 2, kernel - 1 - kernel // 2  # of the leader, which stands so far from its group's ends:
        return max(before + stride - 1 - stride // 2, after + stride // 2)


@arguments_named("pattern")
@dataclass(frozen=True, repr=False)
class Halo(Separable):
    """Blocks of ``block`` queries that share the keys of their block and of ``halo`` tokens around it.

    ``border="zero"`` (the paper) lets the halo hang over the grid: the zero keys there take part in the softmax;
    ``"mask"`` clips it, ``"shift"`` moves it inward (generalised neighborhood attention with stride ``block``).

    With ``stride`` there are fewer queries than keys: the query at ``i`` stands on the key at ``i * stride``, and a block holds
    ``block / stride`` of them. Offsets then count a query by its index in the block.

    Source: Vaswani et al., HaloNet, arXiv:2103.12731.
    """

    block: Ints = positional()
    halo: Ints = positional()
    border: str = field(default="zero", metadata={"axes": False})
    stride: int = field(default=1, metadata={"axes": False})
    source: ClassVar[str] = "arXiv:2103.12731"

    def __post_init__(self):
        settle_sizes(self, block=1, halo=0)
        object.__setattr__(self, "stride", check_integer("stride", self.stride, 1))
        self.rank()
        blocks = self.block if isinstance(self.block, tuple) else (self.block,)
        if any(block % self.stride for block in blocks):
            raise ValueError(f"stride must divide block; got stride={self.stride}, block={self.block!r}")
        check_choice("border", self.border, BORDERS)

    def check(self, q_grid, k_grid):
        super().check(q_grid, k_grid)
        if len(q_grid) == len(k_grid) and any(self.place(n - 1) >= m for n, m in zip(q_grid, k_grid, strict=True)):
            raise ValueError(
                f"{self!r} places the query at i on the key at i * {self.stride}: a query grid {tuple(q_grid)} leaves the key "
                f"grid {tuple(k_grid)}"
            )

    def place(self, q):
        return q * self.stride

    def axis_window(self, axis, q, length, rank):
        block, halo = per_axis(self.block, axis), per_axis(self.halo, axis)
        start = q * self.stride // block * block - halo
        stop = start + block + 2 * halo
        if self.border == "mask":
            start, stop = maximum(start, 0), minimum(stop, length)
        elif self.border == "shift":
            start = minimum(maximum(start, 0), max(length - block - 2 * halo, 0))
            stop = minimum(start + block + 2 * halo, length)
        return AxisWindow(start, stop - start, 1)

    def zero_keys(self, axis, length, rank):
        if self.border != "zero":
            return (0, 0)
        block, halo = per_axis(self.block, axis), per_axis(self.halo, axis)
        return (halo, fill(length, block) + halo)

    def offset(self, axis, q, k, length, rank):
        block = per_axis(self.block, axis) // self.stride  # in queries
        return k - q // block * block * self.stride - q % block

    def extent(self, axis, length, rank):
        reach = per_axis(self.block, axis) - 1 + per_axis(self.halo, axis)
        return reach + per_axis(self.halo, axis) if self.border == "shift" else reach


@arguments_named("pattern")
@dataclass(frozen=True, repr=False)
class Grid(Separable):
    """A dilated global grid: on each axis a query sees (at most) ``size`` keys, evenly spread over the whole axis.

    The spacing is ``ceil(length / size)``; a query sees the keys that share its position within the spacing.

    Source: Tu et al., MaxViT, arXiv:2204.01697.
    """

    size: Ints = positional()
    source: ClassVar[str] = "arXiv:2204.01697"

    def __post_init__(self):
        settle_sizes(self, size=1)

    def _spacing(self, axis: int, length: int) -> int:
        return count_steps(length, per_axis(self.size, axis))

    def axis_window(self, axis, q, length, rank):
        spacing = self._spacing(axis, length)
        start = q % spacing
        return AxisWindow(start, (length - start + spacing - 1) // spacing, spacing)

    def offset(self, axis, q, k, length, rank):
        return (k - q) // self._spacing(axis, length)

    def extent(self, axis, length, rank):
        return per_axis(self.size, axis) - 1

    def transposed(self):
        return self


@arguments_named("pattern")
@dataclass(frozen=True, repr=False)
class Axis(Separable):
    """A query sees the keys that differ from it only along one axis: ``Axis(0) | Axis(1)`` is criss-cross attention.

    With ``causal`` it sees itself and those before it.

    Source: Ho et al., Axial Transformer, arXiv:1912.12180; Huang et al., CCNet, arXiv:1811.11721.
    """

    axis: int = positional()
    causal: bool = False
    source: ClassVar[str] = "arXiv:1912.12180"

    def __post_init__(self):
        object.__setattr__(self, "axis", check_integer("axis", self.axis, -LARGEST))
        check_flag("causal", self.causal)

    def check(self, q_grid, k_grid):
        if not -len(k_grid) <= self.axis < len(k_grid):
            raise ValueError(f"{self!r} does not exist on a grid with {len(k_grid)} axes: {tuple(k_grid)}")

    def axis_window(self, axis, q, length, rank):
        if axis == self.axis % rank:
            return AxisWindow(q * 0, minimum(q + 1, length) if self.causal else length, 1)
        return AxisWindow(q, 1, 1)

    def extent(self, axis, length, rank):
        return super().extent(axis, length, rank) if axis == self.axis % rank else 0

    def transposed(self):
        return super().transposed() if self.causal else self
