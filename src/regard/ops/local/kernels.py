"""Kernels that differ from token to token: a weighted sum of neighbouring values, whatever made the weights.

    apply_kernel:  y[p] = sum_o w[p, o] v[p + o]
    outlook:       y = fold(w unfold(v)),  where unfold lists the values of overlapping windows and fold adds them up again

Cost: kernel volume times tokens times channels. Source: Lou & Yu, OverLoCK, arXiv:2502.20087; Shi, TransNeXt,
arXiv:2311.17132; Yuan et al., VOLO, arXiv:2106.13112.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_grid, check_integer, check_per_axis, check_tensor, check_tensors
from ..calls.observe import WATCHERS, Weighing, tell
from ..patterns import Ints, Neighborhood, grid_positions
from ..tracing import count_steps


def apply_kernel(v: Tensor, weights: Tensor, size: Ints, *, dilation: Ints = 1, border: str = "zero") -> Tensor:
    """Sum the values around each token, each token with its own weights.

    Args:
        v: values ``(batch, *grid, heads, dim)``.
        weights: ``(batch, *grid, heads, taps)``, the taps in row-major order of the kernel; batch and heads may be 1.
        size: of the kernel, a number or one per axis; an even kernel reaches one step further before than after.
        dilation: steps between taps, a number or one per axis.
        border: ``"zero"`` lets taps outside the grid count nothing; ``"shift"`` moves the kernel inward, see
            :class:`regard.patterns.Neighborhood`.

    Returns:
        ``(batch, *grid, heads, dim)`` in the dtype of ``v``.

    Raises:
        ValueError: weights that do not fit the values and the kernel; with ``border="shift"`` an axis shorter than
            ``size * dilation``.
    """
    check_tensors(v=v, weights=weights, mixed=True)
    if v.ndim < 4:
        raise ValueError(f"v must be (batch, *grid, heads, dim); got {tuple(v.shape)}")
    grid = tuple(v.shape[1:-2])
    sizes, dilations = check_per_axis("size", size, len(grid)), check_per_axis("dilation", dilation, len(grid))
    taps = math.prod(sizes)
    if weights.ndim != v.ndim or weights.shape[1:-2] != v.shape[1:-2] or weights.shape[-1] != taps or _spread(v, weights):
        raise ValueError(
            f"weights must be (batch, *grid, heads, taps) = {(v.shape[0], *grid, v.shape[-2], taps)} for values "
            f"{tuple(v.shape)} and a kernel of {sizes}; got {tuple(weights.shape)}"
        )
    check_choice("border", border, ("zero", "shift"))
    short = [n < k * d for n, k, d in zip(grid, sizes, dilations, strict=True)]
    if border == "shift" and any(short):
        raise ValueError(f"border='shift' needs axes of at least size * dilation; got a grid {grid}, {sizes=}, {dilations=}")
    if WATCHERS:
        tell(_weighing(v, weights, sizes, dilations, border))
    rows = _shifted_rows if border == "shift" else _padded_rows
    last = _shifted_last if border == "shift" else _padded_last
    kernels = weights.unflatten(-1, (-1, sizes[-1])).unbind(-2)
    y = None
    for moved, kernel in zip(rows(v, sizes, dilations), kernels, strict=True):
        part = last(moved, kernel, sizes[-1], dilations[-1])
        y = part if y is None else y + part
    assert y is not None  # a kernel has at least one tap
    return y.to(v.dtype)


def _spread(v: Tensor, weights: Tensor) -> bool:
    """Whether batch or heads differ and neither is 1."""
    return any(a != b and 1 not in (a, b) for a, b in ((v.shape[0], weights.shape[0]), (v.shape[-2], weights.shape[-2])))


def _weighing(v: Tensor, weights: Tensor, sizes: Sequence[int], dilations: Sequence[int], border: str) -> Weighing:
    """The kernels as weights of all tokens."""
    grid = tuple(v.shape[1:-2])
    batch, heads = (max(n, m) for n, m in ((v.shape[0], weights.shape[0]), (v.shape[-2], weights.shape[-2])))

    def over_tokens(rows: Tensor) -> Tensor:
        chosen = weights.flatten(1, -3)[:, rows].movedim(2, 1).expand(batch, heads, -1, -1)  # (batch, heads, rows, taps)
        places = grid_positions(grid, None, v.device)[rows]
        index = torch.zeros(len(rows), 1, dtype=torch.long, device=v.device)
        inside = torch.ones_like(index, dtype=torch.bool)
        for axis, (n, k, d) in enumerate(zip(grid, sizes, dilations, strict=True)):
            at = places[:, axis]
            start = Neighborhood(k, d).axis_window(0, at, n, 1).start if border == "shift" else at - k // 2 * d
            key = start[:, None] + d * torch.arange(k, device=v.device)  # (rows, size)
            index = (index[:, :, None] * n + key[:, None]).flatten(1)
            inside = (inside[:, :, None] & ((key >= 0) & (key < n))[:, None]).flatten(1)
        full = chosen.new_zeros(batch, heads, len(rows), math.prod(grid))
        index = index.masked_fill(~inside, 0).expand(batch, heads, -1, -1)
        return full.scatter_add(-1, index, chosen * inside).unflatten(-1, grid)

    products = batch * heads * math.prod(grid) * math.prod(sizes) * v.shape[-1]
    moved = 2 * v.numel() * v.element_size() + weights.numel() * weights.element_size()
    return Weighing("kernel", batch, heads, grid, grid, over_tokens, v.device, flops=2 * products, bytes=moved)


def _padded_rows(v: Tensor, sizes: Sequence[int], dilations: Sequence[int]) -> Iterator[Tensor]:
    """The values moved by each tap of all axes but the last, zeros coming in."""
    grid = v.shape[1:-3]
    pads = [(k // 2 * d, (k - 1 - k // 2) * d) for k, d in zip(sizes[:-1], dilations[:-1], strict=True)]
    padded = F.pad(v, [0, 0] * 3 + [n for pair in reversed(pads) for n in pair])
    for tap in itertools.product(*map(range, sizes[:-1])):
        moved = padded
        for axis, (t, d, n) in enumerate(zip(tap, dilations, grid, strict=False)):
            moved = moved.narrow(1 + axis, t * d, n)
        yield moved


def _shifted_rows(v: Tensor, sizes: Sequence[int], dilations: Sequence[int]) -> Iterator[Tensor]:
    """The values at each tap of all axes but the last, of kernels that are moved inward."""
    grid = v.shape[1:-3]
    starts = []
    for axis, (k, d, n) in enumerate(zip(sizes, dilations, grid, strict=False)):
        window = Neighborhood(k, d).axis_window(0, grid_positions((n,), None, v.device)[:, 0], n, 1)
        starts.append((1 + axis, window.start, d))
    for tap in itertools.product(*map(range, sizes[:-1])):
        moved = v
        for t, (axis, start, d) in zip(tap, starts, strict=True):
            moved = moved.index_select(axis, start + t * d)
        yield moved


def _windows(v: Tensor, size: int, dilation: int) -> Tensor:
    """All windows on the last axis that lie inside it, without a copy: ``(batch, *grid, windows, heads, dim, size)``."""
    return v.unfold(-3, (size - 1) * dilation + 1, 1)[..., ::dilation]


def _weigh(windows: Tensor, kernel: Tensor) -> Tensor:
    return (windows * kernel.unsqueeze(-2)).sum(-1)


def _padded_last(v: Tensor, kernel: Tensor, size: int, dilation: int) -> Tensor:
    padded = F.pad(v, [0, 0, 0, 0, size // 2 * dilation, (size - 1 - size // 2) * dilation])
    return _weigh(_windows(padded, size, dilation), kernel)


def _shifted_last(v: Tensor, kernel: Tensor, size: int, dilation: int) -> Tensor:
    """Queries inside have the windows in order; those near a border share the first or last window of their group."""
    windows = _windows(v, size, dilation)
    before, after = size // 2 * dilation, (size - 1 - size // 2) * dilation
    at = v.ndim - 3  # the last axis of the grid
    left, inside, right = kernel.split([before, windows.shape[at], after], at)

    def shared(of: Tensor, near: Tensor) -> Tensor:
        return _weigh(of.unsqueeze(at), near.unflatten(at, (-1, dilation))).flatten(at, at + 1)

    parts = [_weigh(windows, inside)]
    if before:
        parts.insert(0, shared(windows.narrow(at, 0, dilation), left))
    if after:
        parts.append(shared(windows.narrow(at, windows.shape[at] - dilation, dilation), right))
    return torch.cat(parts, at)


def unfold_windows(v: Tensor, size: int, stride: int = 1) -> Tensor:
    """The values of overlapping windows.

    Args:
        v: ``(batch, *grid, heads, dim)``.
        size: of a window on every axis; window ``i`` starts at ``i * stride - size // 2``, zeros stand outside the grid.
        stride: between windows on every axis.

    Returns:
        ``(batch, *windows, heads, taps, dim)``: ``ceil(length / stride)`` windows per axis, the taps in row-major order.
    """
    check_tensor("v", v, what="(batch, *grid, heads, dim)")
    if v.ndim < 4 or 0 in v.shape[1:]:
        raise ValueError(f"v must be (batch, *grid, heads, dim), no axis empty but the batch; got {tuple(v.shape)}")
    size, stride = check_integer("size", size, 1), check_integer("stride", stride, 1)
    rank = v.ndim - 3
    pads = [n for length in reversed(v.shape[1:-2]) for n in _window_pads(length, size, stride)]
    v = F.pad(v, [0, 0, 0, 0, *pads])
    for axis in range(1, 1 + rank):
        v = v.unfold(axis, size, stride)  # (batch, *windows, heads, dim, size, ..., size)
    return v.flatten(-rank).movedim(-1, -2)


def fold_windows(y: Tensor, grid: Sequence[int], size: int, stride: int = 1) -> Tensor:
    """Add overlapping windows up where they came from; the adjoint of :func:`unfold_windows`.

    Args:
        y: ``(batch, *windows, heads, taps, dim)``.
        grid: of the result.
        size, stride: as they were unfolded.

    Returns:
        ``(batch, *grid, heads, dim)``: sums, not means; what fell outside the grid is dropped.

    Raises:
        ValueError: windows that do not cover this grid.
    """
    check_tensor("y", y, what="(batch, *windows, heads, taps, dim)")
    grid = check_grid("grid", grid)
    size, stride = check_integer("size", size, 1), check_integer("stride", stride, 1)
    rank = len(grid)
    expected = (*(count_steps(n, stride) for n in grid), size**rank)
    if y.ndim != rank + 4 or (*y.shape[1 : 1 + rank], y.shape[-2]) != expected:
        raise ValueError(
            f"a grid {tuple(grid)} has windows {expected[:-1]} of {expected[-1]} taps at {size=}, {stride=}; "
            f"got {tuple(y.shape)}"
        )
    y = y.movedim(-2, -1).unflatten(-1, (size,) * rank)  # (batch, *windows, heads, dim, size, ..., size)
    for axis, length in reversed(list(enumerate(grid, start=1))):
        before, after = _window_pads(length, size, stride)
        y = y.movedim(axis, 0)  # (windows, ..., size)
        total = y.new_zeros(before + length + after, *y.shape[1:-1])
        for tap in range(size):
            total[tap : tap + (len(y) - 1) * stride + 1 : stride] += y[..., tap]
        y = total[before : before + length].movedim(0, axis)
    return y


def _window_pads(length: int, size: int, stride: int) -> tuple[int, int]:
    """Zeros before an axis, and after it so that the last window is whole; never negative."""
    before = size // 2
    return before, max(0, (count_steps(length, stride) - 1) * stride + size - before - length)
