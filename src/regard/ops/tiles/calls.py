"""Calls that run on tiles: which they are, their plans, and what they cost."""

from __future__ import annotations

import math

import torch

from ..calls.call import Call
from ..calls.geometry import Geometry
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
    if _plan_pairs(*call.geometry) is None:
        return f"{call.pattern!r} is not a union or intersection of patterns separable by axis"
    return None


def computed_pairs(call: Call) -> int:
    """Pairs of query and key computed per batch item and head."""
    if (blocks := call.pattern.as_blocks(call.rank)) is not None:
        return math.prod(blocks.table.shape[-2:]) * blocks.tokens**2
    pairs = _plan_pairs(*call.geometry)
    return call.queries * call.keys if pairs is None else pairs


def plan_of(call: Call) -> TilePlan | None:
    """The tiles of a call of a static pattern."""
    return tile_plan(call.geometry)


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


@constant_in_graphs
def _plan_pairs(*geometry) -> int | None:
    """Pairs a plan computes, None where there is no plan. A graph under trace sees the number, not the planning."""
    plan = tile_plan(Geometry(*geometry))
    return None if plan is None else plan.computed_pairs


def is_triangle(call: Call) -> bool:
    """Whether a call is one tile of which only the lower triangle is visible."""
    return call.pattern.static and _is_triangle(*call.geometry)


@constant_in_graphs
def _is_triangle(*geometry) -> bool:
    plan = tile_plan(Geometry(*geometry))
    return plan is not None and plan.causal


def planned(geometry: Geometry) -> TilePlan:
    """The tiles of a pattern that has some."""
    plan = tile_plan(geometry)
    if plan is None:
        raise ValueError(f"there is no tile plan for {geometry.spec!r}")
    return plan
