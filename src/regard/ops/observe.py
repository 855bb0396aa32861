"""Observers: what is told about every attention that is computed.

:data:`OBSERVERS` is a plain list: a context variable would break compiled graphs. ``attend`` calls each observer with a
:class:`Record` before it computes; with none registered this costs a length check. Observers added after a graph was
compiled are not called by that graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .call import Call, Source


@dataclass(frozen=True)
class Record:
    """One ``attend``: its query, its sources, and the calls it was broken into."""

    q: Tensor
    sources: Sequence[Source]
    calls: Sequence[Call]
    scale: float
    sink: Tensor | None
    q_start: tuple[int, ...]


OBSERVERS: list[Callable[[Record], None]] = []
