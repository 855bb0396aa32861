"""The C of regard as a library, compiled for the processor at hand: where it comes from and what may be passed to it."""

from ..tracing import constant_in_graphs
from .library import why_not


@constant_in_graphs
def missing() -> str | None:
    """Why there are no compiled kernels here, None where there are. A graph under trace sees the answer."""
    return why_not()


__all__ = ["missing", "why_not"]
