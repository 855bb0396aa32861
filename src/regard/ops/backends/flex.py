"""FlexAttention: torch's compiled attention with the pattern as its mask and the bias as its score function.

Cost: the 128 x 128 blocks of row-major tokens that hold a visible pair. On CUDA forward, backward and lse; on CPU forward
only, compiled with the C++ compiler of the machine. The first call of each shape and pattern compiles for seconds, so this
backend runs only where it is asked for.

The mask compares key coordinates with lower and upper bounds read from one small table per axis: masks written with
absolute differences have been miscompiled in the backward on some GPUs.

Source: Dong et al., Flex Attention, arXiv:2412.05496.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask  # importing it takes seconds: it imports dynamo

from ...caches import Cache, cached
from .. import transforms
from ..calls import definition, fused
from ..calls.call import Call
from ..patterns import Pattern
from .base import Backend, Cost, cost_of

BLOCK = 128
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")
COMPILATIONS = 256
"""Variants torch may compile before it would fall back to attention that stores all pairs."""

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Visibility from batch item, head, query index and key index, all scalar tensors."""


class FlexBackend(Backend[Call]):
    """torch's compiled attention."""

    name = "flex"
    passed_over = "compiles for seconds; runs where asked for"

    def available(self) -> str | None:
        if COMPILER is None and not torch.cuda.is_available():
            return "no C++ compiler found to compile for CPU"
        return None

    def supports(self, call: Call) -> str | None:
        return _problem(call)

    def automatic(self, call: Call) -> bool:
        return False

    def cost(self, call: Call) -> Cost:
        pairs = computed_pairs(call)
        return cost_of(call, pairs, tile=(BLOCK, BLOCK), tiles=call.batch * call.heads * pairs // BLOCK**2)

    def run(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return _run(call)


def _problem(call: Call) -> str | None:
    if torch.compiler.is_compiling():
        return "compiles by itself, not inside a compiled graph"
    if call.is_differentiated:
        return transforms.PLAIN_ONLY
    if transforms.active():
        return "compiles by itself, not under torch.vmap"
    if call.dropout:
        return "no attention dropout"
    if _mask_of(call.pattern, call.rank) is None:
        return f"{call.pattern!r} has no mask in terms of indices"
    head_dim, value_dim = call.q.shape[-1], call.v.shape[-1]
    if call.device.type == "cuda":
        if call.q.dtype == torch.float64:
            return "no float64 on CUDA"
        return None if min(head_dim, value_dim) >= 16 else f"head and value dims from 16; got {head_dim} and {value_dim}"
    if call.device.type != "cpu":
        return f"only CUDA and CPU; got {call.device.type}"
    if call.needs_grad:
        return "no backward on CPU"
    if call.need_lse:
        return "no lse on CPU"
    if call.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"on CPU only float32, float16 and bfloat16; got {call.q.dtype}"
    return None if COMPILER else "no C++ compiler found to compile for CPU"


def _run(call: Call) -> tuple[Tensor, Tensor | None]:
    call, careful = definition.guarded(call)
    if careful:
        return definition.run_pairs(call)
    q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in (call.q, call.k, call.v))
    if not call.needs_grad:  # on CPU even the mark is refused
        q, k, v = q.detach(), k.detach(), v.detach()
    block_mask = _block_mask(call)
    with torch._dynamo.config.patch(recompile_limit=COMPILATIONS):
        result = _compiled()(
            q, k, v,
            score_mod=_score(call), block_mask=block_mask, scale=call.scale,
            enable_gqa=q.shape[1] != k.shape[1], return_lse=call.need_lse,
        )  # fmt: skip
    out, lse = result if call.need_lse else (result, None)
    out = out.transpose(1, 2).unflatten(1, call.q_grid)
    return fused.differentiable(call, out), None if lse is None else lse.transpose(1, 2).unflatten(1, call.q_grid)


@cached(1)
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


# --------------------------------------------------------------------------------------------------------------------
# the pattern and the bias as functions of indices


def _mask_of(pattern: Pattern, rank: int) -> Callable[[Call, Pattern], Mask] | None:
    """What turns a pattern into a mask function, None where nothing does."""
    if (joined := pattern.as_joined()) is not None:
        return None if any(_mask_of(member, rank) is None for member in joined[0]) else _joined
    if pattern.ordered:
        return _raster
    if pattern.as_product(rank) is not None:
        return _separable
    if pattern.as_blocks(rank) is not None:
        return _blocks
    return None if pattern.as_labels() is None else _labels


def _make(call: Call, pattern: Pattern) -> Mask:
    return _mask_of(pattern, call.rank)(call, pattern)  # type: ignore[misc]  # supports() checked


def _coordinates(index: Tensor, grid: tuple[int, ...], first: tuple[int, ...]) -> list[Tensor]:
    """Coordinates of a row-major index, counted from ``first``."""
    positions = []
    for n, start in zip(reversed(grid), reversed(first), strict=True):
        positions.append(index % n + start)
        index = index // n
    return positions[::-1]


def _query(call: Call, index: Tensor) -> list[Tensor]:
    return _coordinates(index, call.q_grid, call.q_start)


def _key(call: Call, index: Tensor) -> list[Tensor]:
    return _coordinates(index, call.padded_grid, tuple(-before for before, _ in call.zeros))


def _separable(call: Call, pattern: Any) -> Mask:
    q_grid, q_start, padded = call.q_grid, call.q_start, call.padded_grid
    first = tuple(-before for before, _ in call.zeros)
    starts, stops, steps = [], [], []
    for axis, (n, length) in enumerate(zip(q_grid, call.k_grid, strict=True)):
        position = np.arange(q_start[axis], q_start[axis] + n)
        start, count, step = pattern.axis_window(axis, position, length, call.rank)
        step = int(np.max(step))
        stop = np.broadcast_to(start + count * step, (n,))
        start = np.broadcast_to(start, (n,))
        starts.append(torch.from_numpy(start.astype(np.int32)).to(call.q.device))
        stops.append(torch.from_numpy(stop.astype(np.int32)).to(call.q.device))
        steps.append(step)
    none = (0,) * call.rank

    def mask(b, h, q_idx, kv_idx):
        query, key = _coordinates(q_idx, q_grid, none), _coordinates(kv_idx, padded, first)
        seen = kv_idx >= 0
        for axis, step in enumerate(steps):
            start = starts[axis][query[axis]]
            seen = seen & (key[axis] >= start) & (key[axis] < stops[axis][query[axis]])
            if step > 1:
                seen = seen & ((key[axis] - start) % step == 0)
        return seen

    return mask


def _raster(call: Call, pattern: Pattern) -> Mask:
    q_grid, q_start, grid = call.q_grid, call.q_start, call.k_grid

    def mask(b, h, q_idx, kv_idx):
        index = q_idx * 0
        for n, position in zip(grid, _coordinates(q_idx, q_grid, q_start), strict=True):
            index = index * n + position
        return kv_idx <= index

    return mask


def _joined(call: Call, pattern: Any) -> Mask:
    patterns, operation = pattern.as_joined()
    members = [_make(call, member) for member in patterns]

    def mask(b, h, q_idx, kv_idx):
        seen = members[0](b, h, q_idx, kv_idx)
        for member in members[1:]:
            seen = operation(seen, member(b, h, q_idx, kv_idx))
        return seen

    return mask


def _blocks(call: Call, pattern: Any) -> Mask:
    q_grid, q_start, k_grid, each = call.q_grid, call.q_start, call.k_grid, pattern.as_blocks(call.rank).sizes
    q_blocks, k_blocks = pattern.block_grid(q_grid), pattern.block_grid(k_grid)
    pairs = pattern.pairs(k_grid)
    batch, heads = (int(n > 1) for n in pairs.shape[:2])

    def block_of(position, blocks):
        index = position[0] // each[0]
        for axis in range(1, len(each)):
            index = index * blocks[axis] + position[axis] // each[axis]
        return index

    def mask(b, h, q_idx, kv_idx):
        query, key = _coordinates(q_idx, q_grid, q_start), _coordinates(kv_idx, k_grid, (0,) * len(k_grid))
        return pairs[b * batch, h * heads, block_of(query, q_blocks), block_of(key, k_blocks)]

    return mask


def _labels(call: Call, pattern: Any) -> Mask:
    (q_labels, k_labels), start = pattern.as_labels(), call.q_start[0]
    (q_batch, q_heads), (k_batch, k_heads) = ([int(n > 1) for n in t.shape[:2]] for t in (q_labels, k_labels))

    def mask(b, h, q_idx, kv_idx):
        return q_labels[b * q_batch, h * q_heads, q_idx + start] == k_labels[b * k_batch, h * k_heads, kv_idx]

    return mask


def _score(call: Call):
    """The bias as a score function, None without one."""
    if call.bias is not None:
        bias = call.bias
        batch, heads, queries, keys = (int(n > 1) for n in bias.shape)

        def add_bias(score, b, h, q_idx, kv_idx):
            return score + bias[b * batch, h * heads, q_idx * queries, kv_idx * keys]

        return add_bias
    if call.table is None:
        return None
    table, pattern, sizes = call.table.table.flatten(1), call.table.pattern, tuple(call.table.table.shape[1:])
    q_grid, q_start, padded, k_grid, rank = call.q_grid, call.q_start, call.padded_grid, call.k_grid, call.rank
    first = tuple(-before for before, _ in call.zeros)
    each = int(len(table) > 1)

    def add_table(score, b, h, q_idx, kv_idx):
        query, key = _coordinates(q_idx, q_grid, q_start), _coordinates(kv_idx, padded, first)
        index = q_idx * 0
        for axis, size in enumerate(sizes):
            extent = size // 2
            steps = pattern.offset(axis, query[axis], key[axis], k_grid[axis], rank)
            index = index * size + torch.clamp(steps, -extent, extent) + extent
        return score + table[h * each, index]

    return add_table


# --------------------------------------------------------------------------------------------------------------------
# which blocks hold a visible pair


def _block_mask(call: Call) -> BlockMask | None:
    """The block mask of a call, made from a few rows of the mask at a time."""
    if call.mask(torch.zeros(1, dtype=torch.long, device=call.q.device)) is None:
        return None
    if call.valid is not None or not call.pattern.static:
        return _made(call)
    key = (call.pattern.spec, call.q_grid, call.k_grid, call.q_start, call.zeros, call.q.device)
    return _BLOCK_MASKS.get(key, lambda: _made(call))


_BLOCK_MASKS: Cache[BlockMask] = Cache("regard.ops.backends.flex.block_masks", 128)


def _made(call: Call) -> BlockMask:
    k_blocks = math.ceil(call.keys / BLOCK)
    some, whole = [], []
    for first in range(0, call.queries, BLOCK):
        rows = torch.arange(first, min(first + BLOCK, call.queries), device=call.q.device)
        mask: Tensor = call.mask(rows)  # type: ignore[assignment]  # the caller checked
        mask = mask.expand(*mask.shape[:2], len(rows), call.keys)
        counts = F.pad(mask.sum(2), (0, k_blocks * BLOCK - call.keys)).unflatten(-1, (k_blocks, BLOCK)).sum(-1)
        some.append(counts > 0)
        whole.append(counts == BLOCK * BLOCK)
    seen, full = torch.stack(some, 2), torch.stack(whole, 2)
    visible = _make(call, call.pattern)
    if call.valid is not None:
        valid = call.valid.reshape(len(call.valid), -1)
        each = int(len(valid) > 1)

        def mask_mod(b, h, q_idx, kv_idx):
            return visible(b, h, q_idx, kv_idx) & valid[b * each, kv_idx]
    else:
        mask_mod = visible
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~full), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(call.queries, call.keys),
        compute_q_blocks=call.device.type == "cuda",
    )  # fmt: skip


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block needs, and their indices first."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def computed_pairs(call: Call) -> int:
    """Pairs of query and key computed, the mean over batch items and heads."""
    if call.q.is_meta:  # planning: only shapes count, but the mask is computed
        q, k, v = (torch.zeros((), dtype=t.dtype).expand(t.shape) for t in (call.q, call.k, call.v))
        call = replace(call, q=q, k=k, v=v)
    block_mask = _block_mask(call)
    if block_mask is None:
        return call.queries * call.keys
    blocks = block_mask.kv_num_blocks.sum() + block_mask.full_kv_num_blocks.sum()  # type: ignore[union-attr]  # made above
    return int(blocks) * BLOCK * BLOCK // math.prod(block_mask.kv_num_blocks.shape[:2])
