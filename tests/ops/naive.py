"""Attention patterns and attention once more, query by query in plain Python: what the library is compared with.

A pattern is here a function from a query's coordinates to the set of key coordinates it sees; coordinates outside the grid
are zero keys. The formulas follow the papers, not the library.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regard.ops import patterns as P

Slots = set[tuple[int, ...]]


def of_axis(value, axis: int):
    return value[axis] if isinstance(value, tuple) else value


def neighborhood_axis(pattern: P.Neighborhood, axis: int, q: int, length: int) -> list[int]:
    kernel, dilation, stride, causal = (
        of_axis(x, axis) for x in (pattern.kernel_size, pattern.dilation, pattern.stride, pattern.causal)
    )
    group = list(range(q % dilation, length, dilation))
    place = group.index(q)
    members = [u for u in range(len(group)) if u // stride == place // stride]
    if causal:
        leader = members[0] + stride - 1 if members[0] + stride - 1 < len(group) else len(group) - 1
        return [group[u] for u in range(len(group)) if leader - kernel < u <= place]
    leader = min(members[0] + stride // 2, len(group) - 1)
    if pattern.border == "shift":  # the nearest in the group, the earlier of two equally near
        nearest = sorted(range(len(group)), key=lambda u: (abs(u - leader), u))[:kernel]
        return sorted(group[u] for u in nearest)
    window = [leader - kernel // 2 + i for i in range(kernel)]
    if pattern.border == "mask":
        window = [u for u in window if 0 <= u < len(group)]
    return [q % dilation + u * dilation for u in window]


def window_axis(pattern: P.Window, axis: int, q: int, length: int) -> list[int]:
    size, shift = of_axis(pattern.size, axis), of_axis(pattern.shift, axis)
    padded = math.ceil(length / size) * size if pattern.pad == "zero" else length
    if length <= size:
        return list(range(padded))
    return [k for k in range(padded) if (k - shift) // size == (q - shift) // size]


def halo_axis(pattern: P.Halo, axis: int, q: int, length: int) -> list[int]:
    block, halo = of_axis(pattern.block, axis), of_axis(pattern.halo, axis)
    first = q // block * block
    window = list(range(first - halo, first + block + halo))
    if pattern.border == "mask":
        return [k for k in window if 0 <= k < length]
    if pattern.border == "shift":
        if len(window) >= length:
            return list(range(length))
        move = max(0, -window[0]) - max(0, window[-1] - (length - 1))
        return [k + move for k in window]
    return window


def grid_axis(pattern: P.Grid, axis: int, q: int, length: int) -> list[int]:
    spacing = math.ceil(length / of_axis(pattern.size, axis))
    return [k for k in range(length) if k % spacing == q % spacing]


def axis_axis(pattern: P.Axis, axis: int, q: int, length: int, rank: int) -> list[int]:
    if axis != pattern.axis % rank:
        return [q]
    return [k for k in range(length) if k <= q or not pattern.causal]


AXES: dict[type, Callable] = {
    P.Neighborhood: neighborhood_axis, P.Window: window_axis, P.Halo: halo_axis, P.Grid: grid_axis,
}  # fmt: skip


def slots(pattern: P.Pattern, q: tuple[int, ...], q_grid: Sequence[int], k_grid: Sequence[int], item: int, head: int) -> Slots:
    """The key coordinates that the query at ``q`` of a batch item and head sees."""
    everything = set(itertools.product(*map(range, k_grid)))
    if isinstance(pattern, P.Dense):
        return everything
    if isinstance(pattern, P.Causal):
        return {k for k in everything if k <= q}  # tuples compare in raster order
    if isinstance(pattern, P.Union):
        return set().union(*(slots(m, q, q_grid, k_grid, item, head) for m in pattern.members))
    if isinstance(pattern, P.Intersection):
        return set.intersection(*(slots(m, q, q_grid, k_grid, item, head) for m in pattern.members))
    if isinstance(pattern, P.PerHead):
        owners = [member for member, count in pattern.groups for _ in range(count)]
        return slots(owners[head], q, q_grid, k_grid, item, head)
    if isinstance(pattern, P.Blocks):
        table = pattern.table if pattern.table.ndim == 4 else pattern.table[:, None]
        listed = table[item % table.shape[0], head % table.shape[1], number_of(q, pattern.block, q_grid)].tolist()
        return {k for k in everything if number_of(k, pattern.block, k_grid) in listed}
    if isinstance(pattern, P.Clusters):
        mine = label(pattern.labels, q, q_grid, item, head)
        keys = pattern.labels if pattern.key_labels is None else pattern.key_labels
        return {k for k in everything if label(keys, k, k_grid, item, head) == mine}
    if isinstance(pattern, P.Axis):
        return set(itertools.product(*(axis_axis(pattern, a, q[a], n, len(k_grid)) for a, n in enumerate(k_grid))))
    return set(itertools.product(*(AXES[type(pattern)](pattern, a, q[a], n) for a, n in enumerate(k_grid))))


def number_of(position: tuple[int, ...], block, grid: Sequence[int]) -> int:
    """Row-major number of the block that holds a position."""
    blocks = [math.ceil(n / of_axis(block, a)) for a, n in enumerate(grid)]
    number = 0
    for a, n in enumerate(blocks):
        number = number * n + position[a] // of_axis(block, a)
    return number


def label(labels: Tensor, position: tuple[int, ...], grid: Sequence[int], item: int, head: int) -> int:
    labels = labels if labels.ndim == 3 else labels[:, None]
    return int(labels[item % labels.shape[0], head % labels.shape[1], flat(position, grid)])


def flat(position: tuple[int, ...], grid: Sequence[int]) -> int:
    index = 0
    for p, n in zip(position, grid, strict=True):
        index = index * n + p
    return index


def mask(pattern: P.Pattern, q_grid: Sequence[int], k_grid: Sequence[int], batch: int = 1, heads: int = 1) -> Tensor:
    """Visible pairs ``(batch, heads, queries, keys)``; zero keys do not appear."""
    seen = torch.zeros(batch, heads, math.prod(q_grid), math.prod(k_grid), dtype=torch.bool)
    for item, head in itertools.product(range(batch), range(heads)):
        for q in itertools.product(*map(range, q_grid)):
            for k in slots(pattern, q, q_grid, k_grid, item, head):
                if all(0 <= x < n for x, n in zip(k, k_grid, strict=True)):
                    seen[item, head, flat(q, q_grid), flat(k, k_grid)] = True
    return seen


def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: P.Pattern, *, scale: float | None = None, table: Tensor | None = None,
    bias: Tensor | None = None, valid: Tensor | None = None, q_start: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp, one query, head and batch item at a time. ``table`` is a relative bias of the pattern."""
    batch, *q_grid, heads, dim = q.shape
    k_grid, group = tuple(k.shape[1:-2]), heads // k.shape[-2]
    start = q_start or (0,) * len(q_grid)
    scale = dim**-0.5 if scale is None else scale
    outs, lses = [], []
    for item in range(batch):
        for local in itertools.product(*map(range, q_grid)):
            place = tuple(p + s for p, s in zip(local, start, strict=True))
            for head in range(heads):
                logits, values = [], []
                for key in sorted(slots(pattern, place, q_grid, k_grid, item, head)):
                    inside = all(0 <= x < n for x, n in zip(key, k_grid, strict=True))
                    if inside and valid is not None and not valid[(item % len(valid), *key)]:
                        continue
                    at = (item, *key, head // group)
                    logit = scale * torch.dot(q[(item, *local, head)], k[at]) if inside else q.new_zeros(())
                    if table is not None:
                        logit = logit + table[(head % len(table), *offsets(pattern, place, key, k_grid, table.shape[1:]))]
                    if bias is not None:
                        logit = logit + bias[item, head, flat(local, q_grid), flat(key, k_grid)]
                    logits.append(logit)
                    values.append(v[at] if inside else v.new_zeros(v.shape[-1]))
                if logits:
                    row = torch.stack(logits)
                    outs.append(torch.softmax(row, 0) @ torch.stack(values))
                    lses.append(torch.logsumexp(row, 0))
                else:
                    outs.append(v.new_zeros(v.shape[-1]))
                    lses.append(v.new_full((), -torch.inf))
    shape = (batch, *q_grid, heads)
    return torch.stack(outs).view(*shape, -1), torch.stack(lses).view(shape)


def offsets(pattern: P.Pattern, q, k, k_grid, sizes) -> list[int]:
    """Index into a bias table: signed steps from query to key, in the pattern's own steps, offset 0 in the middle."""
    index = []
    for axis, n in enumerate(k_grid):
        step = 1
        if isinstance(pattern, P.Neighborhood):
            step = of_axis(pattern.dilation, axis)
        if isinstance(pattern, P.Grid):
            step = math.ceil(n / of_axis(pattern.size, axis))
        away = k[axis] - q[axis]
        assert away % step == 0
        index.append(away // step + sizes[axis] // 2)
    return index
