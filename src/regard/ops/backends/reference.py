"""The definition itself, for tests.

Cost: all pairs of queries and keys; logits and weights are materialised.
"""

from __future__ import annotations

from torch import Tensor

from ..calls import definition
from ..calls.call import Call
from .base import Backend, Cost, cost_of, stored_bytes


class ReferenceBackend(Backend[Call]):
    """Explicit logits, softmax and weighted sum."""

    name = "reference"
    passed_over = "the definition, for tests"

    def automatic(self, call: Call) -> bool:
        return False

    def cost(self, call: Call) -> Cost:
        return cost_of(call, call.queries * call.keys, stored_bytes(call))

    def run(self, call: Call) -> tuple[Tensor, Tensor | None]:
        return definition.run(call)
