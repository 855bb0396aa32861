"""Neighborhood attention from its definition, one query at a time."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def windows(length: int, kernel: int, dilation: int, stride: int, causal: bool) -> list[list[int]]:
    """The keys of each query on one axis, in order.

    An axis is ``dilation`` interleaved lines. On its line a query stands for its stride group: the window lies around the
    group's leader, moved inward at the ends; a causal one ends at the group's last query, and shows nothing after the query.
    """
    seen = []
    for query in range(length):
        line = list(range(query % dilation, length, dilation))
        at = line.index(query)
        group = line[at // stride * stride : at // stride * stride + stride]
        if causal:
            last = line.index(group[-1])
            keys = [key for key in line[max(0, last - kernel + 1) : last + 1] if key <= query]
        else:
            leader = min(at // stride * stride + stride // 2, len(line) - 1)
            first = min(max(leader - kernel // 2, 0), len(line) - kernel)
            keys = line[first : first + kernel]
        seen.append(keys)
    return seen


def each(value, rank: int) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank


def taps(grid, kernel_size, dilation=1, stride=1, is_causal=False):
    """Yields each query with its keys by tap: ``(query, [(tap, key), ...])``."""
    rank = len(grid)
    arguments = [each(value, rank) for value in (kernel_size, dilation, stride, is_causal)]
    axes = [windows(n, *(argument[axis] for argument in arguments)) for axis, n in enumerate(grid)]
    for query in itertools.product(*map(range, grid)):
        lines = [axes[axis][at] for axis, at in enumerate(query)]
        found = []
        for tap in itertools.product(*map(range, map(len, lines))):
            flat = 0
            for axis, t in enumerate(tap):
                flat = flat * arguments[0][axis] + t
            found.append((flat, tuple(line[t] for line, t in zip(lines, tap, strict=True))))
        yield query, found


def attention(
    q: Tensor, k: Tensor, v: Tensor, kernel_size, dilation=1, stride=1, is_causal=False, scale=None, more=None, rpb=None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of ``(batch, *grid, heads, dim)``; ``more`` are keys and values that every query sees."""
    grid, heads = tuple(q.shape[1:-2]), q.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dilations, kernels = each(dilation, len(grid)), each(kernel_size, len(grid))
    k, v = (t.repeat_interleave(heads // t.shape[-2], -2) for t in (k, v))
    outs, lses = [], []
    for query, found in taps(grid, kernel_size, dilation, stride, is_causal):
        here = q[(slice(None), *query)]  # (batch, heads, dim)
        keys = [k[(slice(None), *key)] for _, key in found]
        values = [v[(slice(None), *key)] for _, key in found]
        logits = [(here * key).sum(-1) * scale for key in keys]
        if rpb is not None:
            for i, (_, key) in enumerate(found):
                offset = [(b - a) // d + n - 1 for a, b, d, n in zip(query, key, dilations, kernels, strict=True)]
                logits[i] = logits[i] + rpb[(slice(None), *offset)]
        if more is not None:
            for i in range(more[0].shape[1]):
                key, value = (t[:, i].repeat_interleave(heads // t.shape[2], 1) for t in more)
                logits.append((here * key).sum(-1) * scale)
                values.append(value)
        scores = torch.stack(logits, -1)
        lses.append(scores.logsumexp(-1))
        outs.append((scores.softmax(-1).unsqueeze(-1) * torch.stack(values, -2)).sum(-2))
    return torch.stack(outs, 1).unflatten(1, grid), torch.stack(lses, 1).unflatten(1, grid)


def scores(q: Tensor, k: Tensor, kernel_size, dilation=1, is_causal=False, rpb=None) -> Tensor:
    """Scores ``(batch, heads, *grid, taps)`` of ``(batch, heads, *grid, dim)``, ``-inf`` at taps without a key."""
    grid = tuple(q.shape[2:-1])
    dilations, kernels = each(dilation, len(grid)), each(kernel_size, len(grid))
    rows = []
    for query, found in taps(grid, kernel_size, dilation, 1, is_causal):
        row = [q.new_full(q.shape[:2], -torch.inf)] * math.prod(kernels)
        for tap, key in found:
            row[tap] = (q[(..., *query, slice(None))] * k[(..., *key, slice(None))]).sum(-1)
            if rpb is not None:
                offset = [(b - a) // d + n - 1 for a, b, d, n in zip(query, key, dilations, kernels, strict=True)]
                row[tap] = row[tap] + rpb[(slice(None), *offset)]
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, 2).unflatten(2, grid)


def sums(weights: Tensor, v: Tensor, kernel_size, dilation=1, is_causal=False) -> Tensor:
    """Sums ``(batch, heads, *grid, dim)`` of values, weights ``(batch, heads, *grid, taps)``."""
    grid = tuple(v.shape[2:-1])
    rows = []
    for query, found in taps(grid, kernel_size, dilation, 1, is_causal):
        here = weights[(slice(None), slice(None), *query)]
        rows.append(sum(here[..., tap, None] * v[(slice(None), slice(None), *key)] for tap, key in found))
    return torch.stack(rows, 2).unflatten(2, grid)
