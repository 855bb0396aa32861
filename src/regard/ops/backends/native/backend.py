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
from ...tiles.calls import planned
from .. import costs
from ..base import Backend, Cost, cost_of, flop
from ..operators import Inputs, define, run, tile_flops, tile_flops_backward
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
        return run(native_attention, call)

    def reason(self, call: Call) -> str:
        return "compiled for this CPU"


def _parts(x: Inputs) -> Parts:
    if x.block:
        return routed_parts(x.blocks, x.block, x.q.shape[1:-2], x.k.shape[1:-2], x.valid)
    return static_parts(planned(x.geometry), x.table, x.valid)


def _forward(x: Inputs, need_lse: bool) -> tuple[Tensor, Tensor]:
    return attend_parts(x.q, x.k, x.v, _parts(x), x.scale, need_lse)


def _backward(
    x: Inputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, need_table: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return differentiate_parts(grad_out, grad_lse, x.q, x.k, x.v, x.table, out, lse, _parts(x), x.scale, need_table)


native_attention, native_attention_backward = define("native_attention", _forward, _backward, tile_flops, tile_flops_backward)
