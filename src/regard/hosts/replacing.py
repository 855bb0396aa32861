"""Attributes of modules that are replaced while someone listens, and put back exactly as they were."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

Forward = Callable[..., Any]
_ABSENT = object()
_CHANGING = threading.Lock()


@dataclass(eq=False)
class Change:
    """A replaced attribute: what stood there, and who listens, by thread.

    Attributes:
        own: the value of the instance; a mark where its class has it.
        usual: the value.
        listeners: thread and listener, in the order in which they came.
    """

    own: Any
    usual: Any
    listeners: list[tuple[int, Any]]

    def here(self) -> list[Any]:
        """The listeners of this thread."""
        return [listener for thread, listener in tuple(self.listeners) if thread == threading.get_ident()]


_CHANGES: dict[tuple[nn.Module, str], Change] = {}


def change_of(module: nn.Module, attribute: str) -> Change | None:
    """The change of an attribute, if there is one."""
    return _CHANGES.get((module, attribute))


@contextmanager
def replaced(module: nn.Module, attribute: str, made: Callable[[Change], Any], listener: Any) -> Iterator[None]:
    """Replace an attribute of one module for the listeners of all threads: the first one does it, the last puts it back.

    Args:
        module: whose attribute it is.
        attribute: its name.
        made: makes the new value of the change.
        listener: added to the listeners of this thread.
    """
    entry = (threading.get_ident(), listener)
    with _CHANGING:
        change = _CHANGES.get((module, attribute))
        if change is None:
            change = Change(module.__dict__.get(attribute, _ABSENT), getattr(module, attribute), [])
            _CHANGES[module, attribute] = change
            setattr(module, attribute, made(change))
        change.listeners.append(entry)
    try:
        yield
    finally:
        with _CHANGING:
            change.listeners.remove(entry)
            if not change.listeners:
                if change.own is _ABSENT:
                    del module.__dict__[attribute]
                else:
                    module.__dict__[attribute] = change.own
                del _CHANGES[module, attribute]


def around(module: nn.Module, wrap: Callable[[Forward, list[Any]], Forward], listener: Any) -> AbstractContextManager[None]:
    """Wrap the ``forward`` of one module in the calls of this thread.

    Args:
        module: which.
        wrap: makes the new ``forward`` of the usual one and the listeners of the thread; the first listener's is taken.
        listener: added to the listeners.
    """

    def made(change: Change) -> Forward:
        def run(*args, **kwargs):
            listeners = change.here()
            return (wrap(change.usual, listeners) if listeners else change.usual)(*args, **kwargs)

        return run

    return replaced(module, "forward", made, listener)
