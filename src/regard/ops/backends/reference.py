"""The definition itself, for tests.

Cost: all pairs of queries and keys; logits and weights are materialised.
"""

from __future__ import annotations

from ..calls.call import Call
from ..calls.definition import run as run


def supports(call: Call) -> str | None:
    return None
