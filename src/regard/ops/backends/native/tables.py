"""Tile plans and routed blocks as the tile sets of the compiled attention, and the attention of a whole call through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....caches import cached
from ...tiles.chunks import check_listed, listed_once
from ...tiles.plan import TilePlan
from ...tiles.tables import block_tokens
from .attention import TileSet, attend, differentiate, padded

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Parts:
    """The tile sets of the disjoint parts of a pattern.

    ``offsets`` says for each set and class ``(classes, tq, tk)`` which entry of the flattened bias table a pair takes.
    """

    sets: list[list[TileSet]]
    offsets: list[list[Tensor | None]]


def static_parts(plan: TilePlan, table: Tensor | None, valid: Tensor | None) -> Parts:
    """The parts of a static pattern.

    Args:
        plan: its tiles.
        table: bias table ``(heads or 1, *offsets)``.
        valid: ``(batch or 1, *grid)``, True where a key exists.
    """
    bare = _bare_parts(plan)
    if table is None and valid is None:
        return bare
    sets = []
    for of_part, offsets in zip(bare.sets, bare.offsets, strict=True):
        sets.append([_with_seen(_with_bias(s, table, o), valid) for s, o in zip(of_part, offsets, strict=True)])
    return Parts(sets, bare.offsets)


@cached(256)
def _bare_parts(plan: TilePlan) -> Parts:
    with torch.inference_mode(False):
        sets, offsets = [], []
        for part in plan.parts:
            keys = sum(group.keys.size for group in part)
            once = len(plan.parts) == 1 and keys == plan.keys == len({int(key) for g in part for key in g.keys.flat})
            sets.append([_bare_set(group, once) for group in part])
            offsets.append([None if g.offsets is None else torch.from_numpy(g.offsets) for g in part])
        return Parts(sets, offsets)


def _bare_set(group, apart: bool) -> TileSet:
    queries, keys, kinds = (torch.from_numpy(t).to(torch.long).contiguous() for t in (group.queries, group.keys, group.kinds))
    bias = None
    if group.mask is not None:
        visible = torch.from_numpy(group.mask)
        bias = padded(torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf))[:, None]
    return TileSet(queries, keys[None, None], kinds, bias, apart=apart)


def _with_bias(tiles: TileSet, table: Tensor | None, offsets: Tensor | None) -> TileSet:
    if table is None or offsets is None:
        return tiles
    flat = table.detach().flatten(1).float().index_select(1, offsets.reshape(-1))
    bias = padded(flat.unflatten(1, offsets.shape).transpose(0, 1))  # (classes, heads, tq, padded tk)
    if tiles.bias is None:
        return replace(tiles, bias=bias)
    return replace(tiles, bias=bias.masked_fill_(tiles.bias == -torch.inf, -torch.inf))  # the bias may be infinite itself


def _with_seen(tiles: TileSet, valid: Tensor | None) -> TileSet:
    if valid is None:
        return tiles
    return replace(tiles, seen=valid.flatten(1)[:, tiles.keys[0, 0]].unsqueeze(1).contiguous())


def routed_parts(
    blocks: Tensor, block: Sequence[int], q_grid: Sequence[int], k_grid: Sequence[int], valid: Tensor | None
) -> Parts:
    """Routed blocks as one part.

    Args:
        blocks: ``(batch or 1, heads or 1, query_blocks, listed)`` of numbers of key blocks, -1 for none.
        block: sizes of a block.
        q_grid, k_grid: the grids.
        valid: ``(batch or 1, *k_grid)``, True where a key exists.

    Raises:
        ValueError: numbers of blocks that are not there.
    """
    q_tokens, q_real = block_tokens(tuple(q_grid), tuple(block), blocks.device)
    k_tokens, k_real = block_tokens(tuple(k_grid), tuple(block), blocks.device)
    check_listed(blocks, len(q_tokens), len(k_tokens))
    listed = listed_once(blocks.long())
    some = listed.clamp(min=0)
    keys = k_tokens[some].flatten(3)  # (batch or 1, heads or 1, query blocks, tk)
    seen = (k_real[some] & (listed >= 0)[..., None]).flatten(3)
    if valid is not None:
        valid = valid.flatten(1)
        keys, seen = (t.expand(max(len(t), len(valid)), -1, -1, -1) for t in (keys, seen))
        items = torch.arange(len(valid))[:, None, None, None]
        seen = seen & valid[items, keys]
    sizes = q_real.sum(1)
    sets = []
    for size in sizes.unique().tolist():
        of = (sizes == size).nonzero()[:, 0]
        queries = q_tokens[of][q_real[of]].view(-1, size)
        mine, there = keys[:, :, of].contiguous(), seen[:, :, of].contiguous()
        sets.append(TileSet(queries, mine, torch.zeros(len(of), dtype=torch.long), seen=None if there.all() else there))
    return Parts([sets], [[None] * len(sets)])


def attend_parts(q: Tensor, k: Tensor, v: Tensor, parts: Parts, scale: float, need_lse: bool) -> tuple[Tensor, Tensor]:
    """Output ``(batch, *q_grid, heads, value_dim)`` and log-sum-exp ``(batch, *q_grid, heads)``, empty if not needed."""
    shape, kind = (*q.shape[:-1], v.shape[-1]), q.dtype
    q, k, v = _flat(q, k, v)
    several = len(parts.sets) > 1
    narrow = kind == torch.bfloat16 and not several
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=torch.bfloat16 if narrow else torch.float32)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if need_lse or several else None
    if not parts.sets:  # a pattern that shows nothing
        out.zero_()
        lse = None if lse is None else lse.fill_(-torch.inf)
    for number, sets in enumerate(parts.sets):
        for tiles in sets:
            attend(q, k, v, tiles, scale, out, lse, merge=number > 0)
    out = out.view(shape).to(kind)
    return out, q.new_empty(0, dtype=torch.float32) if lse is None or not need_lse else lse.view(shape[:-1])


def differentiate_parts(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    parts: Parts,
    scale: float,
    need_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and v, of their shapes and types, and of the bias table where it is needed."""
    shapes, kind = [t.shape for t in (q, k, v)], q.dtype
    q, k, v, grad, out = _flat(q, k, v, grad.to(kind), out)
    lse, grad_lse = lse.flatten(1, -2), None if grad_lse is None else grad_lse.flatten(1, -2)
    units = q.shape[0] * k.shape[2] * sum(len(tiles.queries) for sets in parts.sets for tiles in sets)
    apart = units >= torch.get_num_threads() and all(tiles.apart for sets in parts.sets for tiles in sets)
    dq = torch.empty(q.shape, dtype=torch.float32) if parts.sets else torch.zeros(q.shape, dtype=torch.float32)
    dk, dv = (torch.empty(t.shape, dtype=torch.float32) if apart else torch.zeros(t.shape, dtype=torch.float32) for t in (k, v))
    grads = dq, dk, dv
    grad_table = torch.zeros_like(table.flatten(1), dtype=torch.float32) if need_table and table is not None else None
    for number, (sets, offsets) in enumerate(zip(parts.sets, parts.offsets, strict=True)):
        for tiles, index in zip(sets, offsets, strict=True):
            need = grad_table is not None and index is not None
            sums = differentiate(q, k, v, tiles, scale, out, lse, grad, grad_lse, grads, number > 0, need, apart)
            if sums is not None and grad_table is not None and index is not None:
                of_heads = sums.transpose(0, 1).flatten(1)
                of_heads = of_heads.sum(0, keepdim=True) if len(grad_table) == 1 else of_heads
                grad_table.index_add_(1, index.reshape(-1), of_heads)
    dq, dk, dv = (g.view(shape).to(kind) for g, shape in zip(grads, shapes, strict=True))
    return dq, dk, dv, None if grad_table is None or table is None else grad_table.view(table.shape).to(table.dtype)


def _flat(*tensors: Tensor) -> list[Tensor]:
    """``(batch, tokens, heads, dim)`` of a type that is compiled, the last axis contiguous."""
    flat = []
    for tensor in tensors:
        tensor = tensor.float() if tensor.dtype == torch.float16 else tensor
        tensor = tensor.flatten(1, -3)
        flat.append(tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous())
    return flat
