"""Attention on tiles by C code compiled for the CPU at hand: static patterns, and routed blocks.

    for each head of each tile, on one thread: gather its rows, multiply, softmax, multiply, put the rows back

Cost: the pairs of the tile plan and O(tokens) memory, in both directions; the operands of a tile stay in the caches of one
core, and whole tiles are shared out over torch's threads. The same plans as the ``tiled`` backend. Needs a C compiler once, see
:mod:`regard.ops.compiled.library`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import transforms
from ...calls.call import Call
from ...compiled import missing
from ...tiles import calls as tile_calls
from ...tiles.calls import (
    arguments,
    flops,
    flops_backward,
    nothing_changes,
    nothing_seen,
    nothing_to_do,
    static_plan,
)
from .. import costs
from ..base import Backend, Cost, cost_of, flop
from ..operators import complete
from .tables import TYPES, Parts, attend_parts, differentiate_parts, routed_parts, static_parts


class NativeBackend(Backend[Call]):
    """Compiled tiles."""

    name = "native"
    passed_over = "no gain: too little to do"

    def available(self) -> str | None:
        return missing()

    def supports(self, call: Call) -> str | None:
        if call.device.type != "cpu":
            return f"compiled for CPUs; got {call.device.type}"
        if call.q.dtype not in TYPES:
            return f"only float32, bfloat16 and float16; got {call.q.dtype}"
        if torch.compiler.is_exporting():
            return "an exported program must run elsewhere too"
        if (why := tile_calls.supports(call)) is not None:
            return why
        if tile_calls.is_triangle(call):
            return "raster order without a grid belongs to dense attention"
        return missing()

    def time(self, call: Call) -> float:
        pairs, dense = tile_calls.computed_pairs(call), call.queries * call.keys
        if tile_calls.gathers_single(call):
            each, worth = costs.SINGLE, costs.SINGLE * pairs <= dense
        elif call.pattern.sees_all and transforms.active():  # torch's operator knows all of them
            each, worth = costs.NATIVE, False
        else:
            each, worth = costs.NATIVE, pairs < dense or flop(call, pairs) >= costs.NATIVE_WORTH
        return (each if worth else each * costs.NATIVE_CALL) * pairs

    def cost(self, call: Call) -> Cost:
        return cost_of(call, tile_calls.computed_pairs(call), 0, *tile_calls.tiles_of(call))

    def run(self, call: Call) -> tuple[Tensor, Tensor | None]:
        out, lse = native_attention(*arguments(call))
        return out, lse if call.need_lse else None

    def reason(self, call: Call) -> str:
        return "compiled for this CPU"


def _parts(q, k, table, valid, blocks, block, spec, bias_spec, q_start, zeros) -> Parts:
    plan = static_plan(q, k, table, block, spec, bias_spec, q_start, zeros)
    if plan is None:
        return routed_parts(blocks, block, q.shape[1:-2], k.shape[1:-2], valid)
    return static_parts(plan, table, valid)


@torch.library.custom_op("regard::native_attention", mutates_args=())
def native_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    valid: Tensor | None,
    blocks: Tensor | None,
    block: list[int],
    spec: str,
    bias_spec: str,
    q_start: list[int],
    zeros: list[int],
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output ``(batch, *q_grid, heads, value_dim)`` and lse ``(batch, *q_grid, heads)`` (empty if not needed) of one call."""
    if nothing_to_do(q, blocks):
        return nothing_seen(q, v, need_lse)
    parts = _parts(q, k, table, valid, blocks, block, spec, bias_spec, q_start, zeros)
    return attend_parts(q, k, v, parts, scale, need_lse)


@torch.library.custom_op("regard::native_attention_backward", mutates_args=())
def native_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    valid: Tensor | None,
    blocks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block: list[int],
    spec: str,
    bias_spec: str,
    q_start: list[int],
    zeros: list[int],
    scale: float,
    need_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the bias table (empty where not needed)."""
    if nothing_to_do(q, blocks):
        return nothing_changes(q, k, v, table, need_table)
    parts = _parts(q, k, table, valid, blocks, block, spec, bias_spec, q_start, zeros)
    dq, dk, dv, change = differentiate_parts(grad_out, grad_lse, q, k, v, table, out, lse, parts, scale, need_table)
    return dq, dk, dv, q.new_empty(0) if change is None else change


complete(native_attention, native_attention_backward, flops, flops_backward)
