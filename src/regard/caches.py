"""Caches of the whole package: each has a bound, a lock, and a name under which it can be looked at and emptied.

Results that depend on sizes alone (tile plans, index tables, masks, parsed patterns) are kept between calls, some of them as
tensors on a device. :func:`cache_info` says what is held and :func:`clear_caches` gives it back; the next call makes it again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

Value = TypeVar("Value")
Function = TypeVar("Function", bound=Callable[..., Any])


class CacheInfo(NamedTuple):
    """Entries that a cache holds, and the most it may hold."""

    size: int
    most: int


_REGISTERED: dict[str, tuple[Callable[[], object], Callable[[], CacheInfo]]] = {}


def cached(most: int) -> Callable[[Function], Function]:
    """Keep the last ``most`` results of a function: ``functools.lru_cache`` that :func:`clear_caches` knows."""

    def decorate(function: Function) -> Function:
        kept = lru_cache(maxsize=most)(function)
        name = f"{function.__module__}.{function.__qualname__}"
        _REGISTERED[name] = kept.cache_clear, lambda: CacheInfo(kept.cache_info().currsize, most)
        return kept  # type: ignore[return-value]  # called like the function

    return decorate


class Cache(Generic[Value]):
    """A dictionary of the last ``most`` values that were used, safe to use from several threads."""

    def __init__(self, name: str, most: int) -> None:
        self.most = most
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()
        _REGISTERED[name] = self.clear, self.info

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key; two threads that ask for a new one at once both make it, and get the same."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        made = make()
        with self._lock:
            value = self._values.setdefault(key, made)
            self._values.move_to_end(key)
            while len(self._values) > self.most:
                self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        with self._lock:
            self._values.clear()

    def info(self) -> CacheInfo:
        with self._lock:
            return CacheInfo(len(self._values), self.most)


def clear_caches() -> None:
    """Empty every cache of regard; what is needed again is made again."""
    for clear, _ in list(_REGISTERED.values()):
        clear()


def cache_info() -> dict[str, CacheInfo]:
    """What every cache of regard holds, by the name of the function or table."""
    return {name: info() for name, (_, info) in sorted(_REGISTERED.items())}
