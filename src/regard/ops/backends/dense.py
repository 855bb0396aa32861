"""Dense attention with a mask: torch's scaled_dot_product_attention, on any device.

Cost: all pairs of queries and keys, whatever the pattern; the mask and the bias are materialised. Where the log-sum-exp is
asked for, weights are stored as well, see :mod:`regard.ops.calls.fused`.
"""

from __future__ import annotations

from torch import Tensor

from ..calls import fused
from ..calls.call import Call
from ..tiles import calls as tile_calls
from . import costs
from .base import Backend, Cost, cost_of, stored_bytes


class DenseBackend(Backend[Call]):
    """All pairs, hidden ones masked."""

    name = "dense"
    passed_over = "computes all pairs"

    def time(self, call: Call) -> float:
        return (costs.DENSE_LSE if call.need_lse else costs.DENSE) * call.queries * call.keys

    def cost(self, call: Call) -> Cost:
        mask = call.queries * call.keys if call.pattern.spec != "Dense()" else 0
        return cost_of(call, call.queries * call.keys, stored_bytes(call) if call.need_lse else mask)

    def run(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return fused.run(call)

    def reason(self, call: Call) -> str:
        return "the general case" if tile_calls.supports(call) else "most keys are visible"
