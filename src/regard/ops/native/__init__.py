"""What is compiled for the CPU at hand: attention inside tiles, and causal linear attention, in C."""

from ..tracing import constant_in_graphs
from .library import why_not
from .tiles import Parts, attend_parts, differentiate_parts, routed_parts, static_parts


@constant_in_graphs
def missing() -> str | None:
    """Why there are no compiled kernels here, None where there are. A graph under trace sees the answer."""
    return why_not()


__all__ = ["Parts", "attend_parts", "differentiate_parts", "missing", "routed_parts", "static_parts", "why_not"]
