"""Routing: which blocks of keys a block of queries should see.

    summaries(q), summaries(k) -> scores (batch, [heads,] query_blocks, key_blocks) -> top_k -> Blocks

Routers score summaries of blocks, never tokens: the cost is quadratic in the number of blocks only.
Source: Zhu et al., BiFormer, arXiv:2303.08810.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import check_grid, check_integer, check_sizes, check_tensor, check_tensors
from ..patterns import Blocks, Ints
from ..tracing import count_steps


def block_sizes(grid: Sequence[int], blocks: Ints) -> tuple[int, ...]:
    """The block size per axis that divides a grid into (at most) ``blocks`` blocks per axis.

    Raises:
        TypeError, ValueError: no grid, or numbers of blocks that are not at least 1.
    """
    grid, blocks = check_grid("grid", grid), check_sizes("blocks", blocks)
    counts = blocks if isinstance(blocks, tuple) else (blocks,) * len(grid)
    if len(counts) != len(grid):
        raise ValueError(f"expected one number of blocks per axis of the grid {tuple(grid)}; got {blocks!r}")
    return tuple(count_steps(n, count) for n, count in zip(grid, counts, strict=True))


def summaries(x: Tensor, block: Sequence[int]) -> Tensor:
    """The mean of each block of tokens; the last block of an axis may be partial and counts its own tokens only.

    Args:
        x: ``(batch, *grid, *features)``, with one axis of the grid per entry of ``block``.
        block: tokens per block and axis.

    Returns:
        ``(batch, *block_grid, *features)`` with ``ceil(length / block)`` blocks per axis.

    Raises:
        TypeError, ValueError: no floating tensor, or one of fewer axes; blocks that are not at least 1.
    """
    check_tensor("x", x, what="(batch, *grid, *features)")
    block = check_grid("block", block)
    if x.ndim < 1 + len(block) or 0 in x.shape[1 : 1 + len(block)]:
        raise ValueError(f"x must be (batch, *grid, *features) with {len(block)} grid axes, none empty; got {tuple(x.shape)}")
    rank = len(block)
    grid = x.shape[1 : 1 + rank]
    for axis, (n, size) in enumerate(zip(grid, block, strict=True)):
        if n % size == 0:
            x = x.unflatten(1 + axis, (-1, size)).mean(2 + axis)
            continue
        whole, tail = x.split([n - n % size, n % size], 1 + axis)
        means = [tail.mean(1 + axis, keepdim=True)]
        if n > size:
            means.insert(0, whole.unflatten(1 + axis, (-1, size)).mean(2 + axis))
        x = torch.cat(means, 1 + axis)
    return x


def top_k(scores: Tensor, count: int, block: Sequence[int]) -> Blocks:
    """Route each block of queries to the ``count`` blocks of keys with the highest scores (all where there are fewer).

    Args:
        scores: ``(batch, query_blocks, key_blocks)`` or ``(batch, heads, query_blocks, key_blocks)``; the choice carries no
            gradient.
        count: blocks to see.
        block: tokens per block and axis.

    Raises:
        ValueError: a count below one.
    """
    check_tensor("scores", scores, what="(batch, [heads,] query_blocks, key_blocks)")
    if scores.ndim not in (3, 4):
        raise ValueError(f"scores must be (batch, [heads,] query_blocks, key_blocks); got {tuple(scores.shape)}")
    count, block = check_integer("count", count, 1), check_grid("block", block)
    table = scores.detach().topk(min(count, scores.shape[-1]), sorted=False).indices
    return Blocks(table, tuple(block))


def affinity(q: Tensor, k: Tensor) -> Tensor:
    """Dot products of block summaries ``(batch, *block_grid, features)``: ``(batch, query_blocks, key_blocks)``.

    Taken in at least float32, so that close scores keep their order.

    Raises:
        TypeError, ValueError: no floating tensors, or of shapes that do not go together.
    """
    check_tensors(q=q, k=k, mixed=True)
    if min(q.ndim, k.ndim) < 3 or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q and k must be (batch, *block_grid, features) of one batch and width; got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    kind = torch.promote_types(q.dtype, torch.float32)
    q, k = (t.reshape(t.shape[0], math.prod(t.shape[1:-1]), t.shape[-1]).to(kind) for t in (q, k))
    return q @ k.transpose(-2, -1)
