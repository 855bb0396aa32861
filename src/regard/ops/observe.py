"""Observers: what is told about every attention that is computed.

:data:`OBSERVERS` is a plain list: a context variable would break compiled graphs. ``attend`` calls each observer with a
:class:`Record` before it computes, and what an observer returns, if anything, with the output; with none registered this
costs a length check. Observers added after a graph was compiled are not called by that graph.

Operators that weigh values in another way (channels, kernels, transposed attention, mixtures) tell :data:`WATCHERS` with a
:class:`Weighing`, in the same manner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
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


@dataclass(frozen=True)
class Weighing:
    """One use of another operator than ``attend``, as weights of what it adds up.

    Attributes:
        kind: the operator.
        batch, heads: of the weights.
        grid: what the weights belong to: the output tokens, or output channels.
        key_grid: what is weighed.
        weights: of row-major indices of ``grid``, ``(rows,)``, to ``(batch, heads, rows, *key_grid)``; rows need not sum to 1.
        device: of the weights.
        on_grid: whether ``grid`` and ``key_grid`` are places.
        flops, bytes: what the operator costs, where it is counted: multiplications and additions, and everything read and
            written once.
    """

    kind: str
    batch: int
    heads: int
    grid: tuple[int, ...]
    key_grid: tuple[int, ...]
    weights: Callable[[Tensor], Tensor]
    device: torch.device
    on_grid: bool = True
    flops: int = 0
    bytes: int = 0


Observer = Callable[[Record], Callable[["Tensor"], object] | None]

OBSERVERS: list[Observer] = []
WATCHERS: list[Callable[[Weighing], None]] = []
WITHIN: list[Weighing] = []
"""Operators that are made of attentions and are running: the records of those are parts of them."""


def tell(weighing: Weighing) -> None:
    """Tell the watchers; the caller checks first whether there are any."""
    for watcher in WATCHERS:
        watcher(weighing)


@contextmanager
def parts_of(weighing: Weighing) -> Iterator[None]:
    """Tell the watchers about an operator, and mark the attentions inside as its parts."""
    tell(weighing)
    WITHIN.append(weighing)
    try:
        yield
    finally:
        WITHIN.remove(weighing)
