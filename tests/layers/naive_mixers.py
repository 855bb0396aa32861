"""Mixers written as loops over queries and keys, from their papers: what the tests compare with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def positions(grid: Sequence[int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, grid)))


def split_heads(mixer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(*grid, heads, width)`` of one image, straight from the fused weights."""
    weight, bias = mixer.qkv.weight, mixer.qkv.bias
    y = x @ weight.T + (0 if bias is None else bias)
    widths = [mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim, mixer.kv_heads * mixer.value_dim]
    first, second = widths[0], widths[0] + widths[1]
    q, k, v = y[..., :first], y[..., first:second], y[..., second:]
    shape = x.shape[:-1]
    return q.reshape(*shape, mixer.heads, -1), k.reshape(*shape, mixer.kv_heads, -1), v.reshape(*shape, mixer.kv_heads, -1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    sees: Callable[[tuple[int, ...], tuple[int, ...]], bool],
    bias: Callable[[int, tuple[int, ...], tuple[int, ...]], Tensor] | None = None,
    zero_keys: Callable[[tuple[int, ...]], list[tuple[int, ...]]] | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax attention of one image, one query and head at a time: ``(*grid, heads * value_dim)``.

    ``zero_keys(query)`` lists positions outside the grid that take part with key and value zero; ``extra`` are keys and values
    ``(n, heads, width)`` that every query sees, without bias.
    """
    grid, heads = q.shape[:-2], q.shape[-2]
    group = heads // k.shape[-2]
    out = q.new_zeros(*grid, heads, v.shape[-1])
    for at in positions(grid):
        for head in range(heads):
            logits, values = [], []
            for key in positions(k.shape[:-2]):
                if sees(at, key):
                    logit = scale * (q[at][head] @ k[key][head // group])
                    logits.append(logit + (bias(head, at, key) if bias else 0))
                    values.append(v[key][head // group])
            for key in zero_keys(at) if zero_keys else []:
                logits.append(bias(head, at, key) if bias else q.new_zeros(()))
                values.append(torch.zeros_like(values[0]))
            for key, value in zip(*extra, strict=True) if extra else []:
                logits.append(scale * (q[at][head] @ key[head // group]))
                values.append(value[head // group])
            weights = torch.softmax(torch.stack(logits), 0)
            out[at][head] = (weights[:, None] * torch.stack(values)).sum(0)
    return out.flatten(-2)


def offset_bias(mixer: nn.Module, step: Callable[[int, int, int], int] = lambda q, k, axis: k - q):
    """Reads the mixer's table at an offset of zero in the middle of every axis."""

    def read(head: int, at: tuple[int, ...], key: tuple[int, ...]) -> Tensor:
        table = mixer.bias.table
        index = [step(q, k, axis) + table.shape[1 + axis] // 2 for axis, (q, k) in enumerate(zip(at, key, strict=True))]
        assert all(0 <= i < n for i, n in zip(index, table.shape[1:], strict=True))
        return table[(head, *index)]

    return read


def project_out(mixer: nn.Module, y: Tensor) -> Tensor:
    return y @ mixer.proj.weight.T + (0 if mixer.proj.bias is None else mixer.proj.bias)


def depthwise(x: Tensor, conv: nn.Module) -> Tensor:
    """A depthwise convolution of ``(H, W, channels)`` with zero padding, tap by tap."""
    weight, (height, width) = conv.weight[:, 0], x.shape[:2]
    reach = weight.shape[-1] // 2
    out = torch.zeros_like(x) + conv.bias
    for y, col in positions((height, width)):
        for dy, dx in positions(weight.shape[-2:]):
            at = (y + dy - reach, col + dx - reach)
            if 0 <= at[0] < height and 0 <= at[1] < width:
                out[y, col] += weight[:, dy, dx] * x[at]
    return out


def region_means(x: Tensor, regions: int) -> tuple[Tensor, Callable[[tuple[int, ...]], int]]:
    """Mean of the tokens ``(H, W, channels)`` of each region, and the region of a position."""
    size = [math.ceil(n / regions) for n in x.shape[:2]]
    columns = math.ceil(x.shape[1] / size[1])
    rows = math.ceil(x.shape[0] / size[0])

    def region(at: tuple[int, ...]) -> int:
        return at[0] // size[0] * columns + at[1] // size[1]

    members: list[list[Tensor]] = [[] for _ in range(rows * columns)]
    for at in positions(x.shape[:2]):
        members[region(at)].append(x[at])
    return torch.stack([torch.stack(m).mean(0) for m in members]), region
