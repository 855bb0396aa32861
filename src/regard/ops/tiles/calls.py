"""Calls that run on tiles: which they are, their plans, the arguments of their operators, and what they cost.

The operators of the backends on tiles take the same arguments, so that one count of FLOPs serves them:
``(q, k, v, table, valid, blocks, block, spec, bias_spec, q_start, zeros, scale, need_lse)``, a bias table and the text form of
its pattern, routed ``blocks`` of size ``block`` or the text form of a static pattern, and zero keys around the grid.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..calls.call import Call
from ..calls.definition import lse_like
from ..tracing import constant_in_graphs
from ..transforms import PLAIN_ONLY
from .plan import TileGroup, TilePlan, tile_plan


def supports(call: Call) -> str | None:
    """Why a call cannot run on tiles, None where it can."""
    if call.is_differentiated:
        return PLAIN_ONLY
    if call.bias is not None:
        return "a dense bias belongs to dense attention"
    if call.dropout:
        return "no attention dropout"
    if call.pattern.as_blocks(call.rank) is not None:
        return "no relative bias over routed blocks" if call.table is not None else None
    if not call.pattern.static:
        return f"{call.pattern!r} is routed but not in blocks"
    if torch.compiler.is_exporting() and any(isinstance(n, torch.SymInt) for n in (*call.q_grid, *call.k_grid)):
        return "the exported program leaves the grid open: there is nothing to plan for"
    if _plan_pairs(*_plan_key(call)) is None:
        return f"{call.pattern!r} is not a union or intersection of patterns separable by axis"
    return None


def computed_pairs(call: Call) -> int:
    """Pairs of query and key computed per batch item and head."""
    if (blocks := call.pattern.as_blocks(call.rank)) is not None:
        return math.prod(blocks.table.shape[-2:]) * blocks.tokens**2
    pairs = _plan_pairs(*_plan_key(call))
    return call.queries * call.keys if pairs is None else pairs


def plan_of(call: Call) -> TilePlan | None:
    """The tiles of a call of a static pattern."""
    return tile_plan(*_plan_key(call))


def gathers_single(call: Call) -> bool:
    """Whether keys are gathered for single queries."""
    blocks = call.pattern.as_blocks(call.rank)
    return blocks is not None and blocks.single


def tiles_of(call: Call) -> tuple[tuple[int, ...], int]:
    """Queries and keys of the most common tile, and the number of tiles over batch and heads."""
    each = call.batch * call.heads
    if (blocks := call.pattern.as_blocks(call.rank)) is not None:
        number, listed = blocks.table.shape[-2:]
        return (blocks.tokens, listed * blocks.tokens), each * number
    groups = _groups(call)
    common = max(groups, key=lambda group: len(group.queries), default=None)
    if common is None:
        return (), 0
    return (common.queries.shape[1], common.keys.shape[1]), each * sum(len(g.queries) for g in groups)


def gathered_bytes(call: Call) -> int:
    """Bytes of the rows of q, k and v that are gathered into tiles, written and read."""
    widths = call.k.shape[-2] * (call.k.shape[-1] + call.v.shape[-1])
    if (blocks := call.pattern.as_blocks(call.rank)) is not None:
        keys, queries = math.prod(blocks.table.shape[-2:]) * blocks.tokens, call.queries
    else:
        groups = _groups(call)
        keys, queries = sum(g.keys.size for g in groups), sum(g.queries.size for g in groups)
    return call.q.element_size() * 2 * call.batch * (keys * widths + queries * call.heads * call.q.shape[-1])


def _groups(call: Call) -> list[TileGroup]:
    plan = plan_of(call)
    return [group for part in plan.parts for group in part] if plan else []


def _plan_key(call: Call) -> tuple:
    table = None if call.table is None else (call.table.pattern.spec, _ints(call.table.table.shape[1:]))
    return call.pattern.spec, _ints(call.q_grid), _ints(call.k_grid), _ints(call.q_start), tuple(map(_ints, call.zeros)), table


def _ints(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes as plain numbers: a compiled graph is specialised to its grid."""
    return tuple(operator.index(n) for n in sizes)


@constant_in_graphs
def _plan_pairs(spec: str, q_grid, k_grid, q_start, zeros, table) -> int | None:
    """Pairs a plan computes, None where there is no plan. A graph under trace sees the number, not the planning."""
    plan = tile_plan(spec, q_grid, k_grid, q_start, zeros, table)
    return None if plan is None else plan.computed_pairs


def is_triangle(call: Call) -> bool:
    """Whether a call is one tile of which only the lower triangle is visible."""
    return call.pattern.static and _is_triangle(*_plan_key(call))


@constant_in_graphs
def _is_triangle(*key) -> bool:
    plan = tile_plan(*key)
    return plan is not None and plan.causal


def arguments(call: Call) -> tuple:
    """The arguments of an operator on tiles."""
    routed = call.pattern.as_blocks(call.rank)
    return (
        call.q, call.k, call.v,
        call.table.table if call.table else None,
        call.valid,
        routed.table if routed else None,
        list(routed.sizes) if routed else [],
        "" if routed else call.pattern.spec,
        call.table.pattern.spec if call.table else "",
        list(call.q_start),
        [n for pair in call.zeros for n in pair],
        call.scale,
        call.need_lse or call.expects_backward,
    )  # fmt: skip


def nothing_to_do(q: Tensor, blocks: Tensor | None) -> bool:
    """Whether the batch is empty, or the table of blocks lists nothing: no kernel need ever see a size of 0."""
    return q.shape[0] == 0 or (blocks is not None and blocks.shape[-1] == 0)


def nothing_seen(q: Tensor, v: Tensor, need_lse: bool) -> tuple[Tensor, Tensor]:
    """What an operator on tiles returns where nothing is seen: output 0, log-sum-exp -inf (empty if not needed)."""
    lse = lse_like(q).fill_(-torch.inf)
    return q.new_zeros((*q.shape[:-1], v.shape[-1])), lse if need_lse else lse.new_empty(0)


def nothing_changes(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, need_table: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients that belong to :func:`nothing_seen`: zeros (of a bias table: empty if not needed)."""
    grad_table = q.new_empty(0) if table is None or not need_table else table.new_zeros(table.shape)
    return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), grad_table


def static_plan(q: Tensor, k: Tensor, table: Tensor | None, block, spec, bias_spec, q_start, zeros) -> TilePlan | None:
    """The tiles of a static pattern, from the arguments of an operator; None for routed blocks."""
    if block:
        return None
    about = None if table is None else (bias_spec, tuple(table.shape[1:]))
    return plan_from(spec, tuple(q.shape[1:-2]), tuple(k.shape[1:-2]), q_start, zeros, about)


def plan_from(spec: str, q_grid, padded, q_start, zeros, table=None) -> TilePlan:
    """The tiles of a static pattern whose key grid is padded."""
    pairs = tuple(zip(zeros[::2], zeros[1::2], strict=True))
    k_grid = tuple(n - before - after for n, (before, after) in zip(padded, pairs, strict=True))
    plan = tile_plan(spec, q_grid, k_grid, tuple(q_start), pairs, table)
    if plan is None:
        raise ValueError(f"there is no tile plan for {spec!r}")
    return plan


def _pairs(q_shape, k_shape, block, blocks_shape, spec, q_start, zeros) -> int:
    if block:
        return blocks_shape[2] * blocks_shape[3] * math.prod(block) ** 2
    return plan_from(spec, tuple(q_shape[1:-2]), tuple(k_shape[1:-2]), q_start, zeros).computed_pairs


def flops(q, k, v, table, valid, blocks, block, spec, bias_spec, q_start, zeros, *_, **__) -> int:
    """FLOPs of a forward, from the shapes of its arguments."""
    pairs = _pairs(q, k, block, blocks, spec, q_start, zeros)
    return 2 * q[0] * q[-2] * pairs * (q[-1] + v[-1])


def flops_backward(grad, grad_lse, q, k, v, table, valid, blocks, out, lse, block, spec, bias_spec, q_start, zeros, scale,
                    need_table, *, out_shape=None, **_) -> int:  # fmt: skip
    """FLOPs of a backward."""
    pairs = _pairs(q, k, block, blocks, spec, q_start, zeros)
    return 2 * q[0] * q[-2] * pairs * (3 * q[-1] + 2 * v[-1])
