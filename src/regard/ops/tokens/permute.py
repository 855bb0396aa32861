"""Token permutation: every tile of a grid becomes a run of consecutive tokens, so that a 1-D kernel walks n-D tiles.

    pad each axis to a multiple of T * dilation, view it as (tiles, T, dilation), order all axes as (dilation, tiles, T)

Dilation groups go beside the batch, where tiles of one group hold neighbours again. Cost: one copy each way, to be paid once
for a whole network where its layers share tile and dilation. Source: Hassani et al., GNA, arXiv:2504.16922.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import FLOATS, INTEGERS, check_grid, check_tensor, check_tensors, shown
from ..calls.lower import check_scale
from ..patterns import Pattern, Separable, as_pattern


def to_tiles(x: Tensor, tile: Sequence[int], dilation: Sequence[int] | None = None) -> Tensor:
    """Order tokens ``(batch, *grid, ...)`` by tiles: ``(batch, groups, tiles, tokens, ...)``.

    Args:
        x: tokens on a grid of as many axes as ``tile``; axes that do not divide are filled with zeros.
        tile: tokens per axis, counted inside a dilation group.
        dilation: groups per axis, interleaved; one by default.

    Raises:
        ValueError: tile and dilation do not have one positive number per axis, or the grid has fewer axes.
    """
    check_tensor("x", x, (*FLOATS, *INTEGERS, torch.bool), what="(batch, *grid, ...)")
    tile, dilation = _checked(tile, dilation)
    rank = len(tile)
    if x.ndim <= rank:
        raise ValueError(f"expected x (batch, *grid, ...) with {rank} axes in the grid; got {tuple(x.shape)}")
    fill = [-n % (t * d) for n, t, d in zip(x.shape[1 : rank + 1], tile, dilation, strict=True)]
    x = F.pad(x, [0] * 2 * (x.ndim - rank - 1) + [n for f in reversed(fill) for n in (0, f)])
    for axis in reversed(range(rank)):
        x = x.unflatten(1 + axis, (-1, tile[axis], dilation[axis]))  # (batch, tiles, tile, dilation, tiles, ...)
    order = [1 + 3 * axis + part for part in (2, 0, 1) for axis in range(rank)]
    x = x.permute(0, *order, *range(1 + 3 * rank, x.ndim))
    return x.flatten(1 + 2 * rank, 3 * rank).flatten(1 + rank, 2 * rank).flatten(1, rank)


def from_tiles(x: Tensor, grid: Sequence[int], tile: Sequence[int], dilation: Sequence[int] | None = None) -> Tensor:
    """The inverse of :func:`to_tiles`: ``(batch, groups, tiles, tokens, ...)`` to ``(batch, *grid, ...)``."""
    check_tensor("x", x, (*FLOATS, *INTEGERS, torch.bool), what="(batch, groups, tiles, tokens, ...)")
    tile, dilation = _checked(tile, dilation)
    grid, rank = check_grid("grid", grid), len(tile)
    if len(grid) != rank:
        raise ValueError(f"tile must have one number per axis of the grid {grid}; got {tile}")
    tiles = [-(-n // (t * d)) for n, t, d in zip(grid, tile, dilation, strict=True)]
    shape = (math.prod(dilation), math.prod(tiles), math.prod(tile))
    if tuple(x.shape[1:4]) != shape:
        raise ValueError(f"expected x (batch, {shape[0]}, {shape[1]}, {shape[2]}, ...); got {tuple(x.shape)}")
    x = x.unflatten(3, tile).unflatten(2, tiles).unflatten(1, dilation)
    order = [1 + part * rank + axis for axis in range(rank) for part in (1, 2, 0)]
    x = x.permute(0, *order, *range(1 + 3 * rank, x.ndim))
    for axis in range(rank):
        x = x.flatten(1 + axis, 3 + axis)
    return x[(slice(None), *(slice(n) for n in grid))]


def attend_permuted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | str,
    q_tile: Sequence[int],
    k_tile: Sequence[int],
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as a block-sparse kernel computes it on permuted tokens: what such kernels are compared with.

    Every query tile attends to the key tiles that :func:`regard.ops.tiles.simulator.walk_tiles` counts, and masks inside them.

    Args:
        q, k, v: ``(batch, *grid, heads, dim)`` on one grid; the heads of ``k`` and ``v`` divide those of ``q``.
        pattern: one window per axis without zero keys, such as ``Neighborhood``.
        q_tile, k_tile: tokens per axis, counted inside a dilation group.
        scale: factor on the logits; None is ``head_dim ** -0.5``.

    Returns:
        The output ``(batch, *grid, heads, value_dim)`` and the log-sum-exp ``(batch, *grid, heads)``.

    Raises:
        ValueError: another pattern, or key grid; tiles that do not have one positive number per axis.
    """
    check_tensors(q=q, k=k, v=v)
    if min(q.ndim, k.ndim) < 4 or k.shape[:-1] != v.shape[:-1] or k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            "q, k and v must be (batch, *grid, heads, dim) and go together; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if 0 in (*q.shape[1:], *k.shape[1:], *v.shape[1:]) or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"the heads of q must be a multiple of those of k, and no axis empty; got {shown(q)}, {shown(k)}")
    scale = check_scale(q, scale)
    q_tile, k_tile = check_grid("q_tile", q_tile), check_grid("k_tile", k_tile)
    pattern, grid = as_pattern(pattern), tuple(q.shape[1:-2])
    rank = len(grid)
    if len(q_tile) != rank or len(k_tile) != rank:
        raise ValueError(f"tiles must have one number per axis of the grid {grid}; got {q_tile} and {k_tile}")
    product = pattern.as_product(rank)
    if product is None or any(any(pattern.zero_keys(a, n, rank)) for a, n in enumerate(grid)):
        raise ValueError(f"expected a pattern of one window per axis without zero keys; got {pattern!r}")
    if tuple(k.shape[1:-2]) != grid:
        raise ValueError(f"queries and keys must lie on one grid; got {grid} and {tuple(k.shape[1:-2])}")
    pattern.check(grid, grid)
    axes = [_walk(product, a, n, rank, q_tile[a], k_tile[a]) for a, n in enumerate(grid)]
    dilation = [step for step, _, _ in axes]
    counts = [-(-n // (t * d)) for n, t, d in zip(grid, k_tile, dilation, strict=True)]
    table, seen = axes[0][1:]
    for (_, index, pairs), count in zip(axes[1:], counts[1:], strict=True):
        table, seen = _outer(np.add, table * count, index), _outer(np.logical_and, seen, pairs)
    visited = torch.from_numpy(table).to(q.device)  # (groups, query tiles, visited)
    mask = torch.from_numpy(seen).to(q.device).flatten(-2)[:, :, None, None]  # (groups, query tiles, 1, 1, queries, keys)
    groups = torch.arange(visited.shape[0], device=q.device)[:, None, None]
    q_tiles = to_tiles(q, q_tile, dilation).unflatten(-2, (k.shape[-2], -1))
    k_tiles, v_tiles = (to_tiles(x, k_tile, dilation)[:, groups, visited].flatten(3, 4) for x in (k, v))
    kind = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("bgtqhrd,bgtkhd->bgthrqk", q_tiles, k_tiles).to(kind) * scale
    logits = logits.masked_fill(~mask, -torch.inf)
    lse = logits.logsumexp(-1)
    out = torch.einsum("bgthrqk,bgtkhd->bgtqhrd", (logits - lse[..., None]).exp().to(v.dtype), v_tiles)
    lse = lse.movedim(-1, 3)  # (batch, groups, query tiles, queries, kv_heads, heads per kv head)
    return tuple(from_tiles(x, grid, q_tile, dilation) for x in (out.flatten(4, 5), lse.flatten(4, 5)))  # type: ignore[return-value]


def _checked(tile: Sequence[int], dilation: Sequence[int] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    tile = check_grid("tile", tile)
    dilation = (1,) * len(tile) if dilation is None else check_grid("dilation", dilation)
    if len(tile) != len(dilation):
        raise ValueError(f"tile and dilation must have one positive number per axis; got {tile} and {dilation}")
    return tile, dilation


def _walk(
    pattern: Separable, axis: int, length: int, rank: int, q_size: int, k_size: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """The dilation of an axis, the key tiles ``(groups, query tiles, visited)`` of each of its query tiles, and which of
    their keys are visible ``(groups, query tiles, queries, visited, keys)``. Queries that only fill a tile see one key.
    """
    start, count, step = (
        np.broadcast_to(np.asarray(x), (length,)).astype(np.int64)
        for x in pattern.axis_window(axis, np.arange(length), length, rank)
    )
    dilation = int(step[0])
    tiles = [-(-length // (size * dilation)) for size in (q_size, k_size)]
    position = np.arange(tiles[0] * q_size * dilation).reshape(tiles[0], q_size, dilation).transpose(2, 0, 1)
    real, index = position < length, np.minimum(position, length - 1)
    low, high = start[index] // dilation, (start + count * dilation)[index] // dilation
    begin = np.where(real, low, length).min(-1) // k_size
    end = -(-np.where(real, high, 0).max(-1) // k_size)
    width = max(int((end - begin).max()), 1)
    begin = np.clip(begin, 0, tiles[1] - width)
    visited = begin[..., None] + np.arange(width)  # (groups, query tiles, visited)
    low, high = np.where(real, low, begin[..., None] * k_size), np.where(real, high, begin[..., None] * k_size + 1)
    key = visited[:, :, None, :, None] * k_size + np.arange(k_size)
    return dilation, visited, (key >= low[..., None, None]) & (key < high[..., None, None])


def _outer(operation, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Combine, on every axis, each entry of ``a`` with each entry of ``b``, in row-major order."""
    left = a.reshape([size for n in a.shape for size in (n, 1)])
    right = b.reshape([size for n in b.shape for size in (1, n)])
    return operation(left, right).reshape([m * n for m, n in zip(a.shape, b.shape, strict=True)])
