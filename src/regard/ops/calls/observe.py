"""Observers: what is told about every attention that is computed.

:data:`OBSERVERS` is a plain list: a context variable would break compiled graphs. ``attend`` calls each observer with a
:class:`Record` before it computes, and what an observer returns, if anything, with the output; with none registered this
costs a length check. Observers added after a graph was compiled are not called by that graph.

Operators that weigh values in another way (channels, kernels, transposed attention, mixtures) tell :data:`WATCHERS` with a
:class:`Weighing`, in the same manner.

The lists are the process's, what is told is the thread's: :func:`listening` enters an observer for what happens in the thread
that asks, so that two threads that look at two models, or at one, do not see each other's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .call import Call
    from .source import Source


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


class _Running(threading.local):
    """Operators that are made of attentions and are running in a thread."""

    def __init__(self) -> None:
        self.weighings: list[Weighing] = []


_RUNNING = _Running()


def in_this_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for the thread that asks; called from any other it does nothing and returns None."""
    thread = threading.get_ident()

    @wraps(function)
    def called(*args, **kwargs):
        return function(*args, **kwargs) if threading.get_ident() == thread else None

    return called


@contextmanager
def listening(observers: list, observer: Callable[..., Any]) -> Iterator[None]:
    """Tell an observer what happens in this thread while the context is entered."""
    entry = in_this_thread(observer)
    observers.append(entry)
    try:
        yield
    finally:
        observers.remove(entry)


def tell(weighing: Weighing) -> None:
    """Tell the watchers; the caller checks first whether there are any."""
    for watcher in tuple(WATCHERS):  # other threads come and go meanwhile
        watcher(weighing)


def within() -> bool:
    """Whether an operator that is made of attentions is running in this thread: their records are parts of it."""
    return bool(_RUNNING.weighings)


@contextmanager
def parts_of(weighing: Weighing) -> Iterator[None]:
    """Tell the watchers about an operator, and mark the attentions inside as its parts."""
    tell(weighing)
    _RUNNING.weighings.append(weighing)
    try:
        yield
    finally:
        _RUNNING.weighings.pop()
