"""What is compiled for the CPU at hand: attention inside tiles, in C."""

from .library import why_not
from .tiles import Parts, attend_parts, differentiate_parts, routed_parts, static_parts

__all__ = ["Parts", "attend_parts", "differentiate_parts", "routed_parts", "static_parts", "why_not"]
