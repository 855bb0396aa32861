"""Mixers by name."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable

from torch import nn

from ...caches import cached
from ...checks import check_integer
from ...names import unknown_name
from .base import AttentionMixer

_MIXERS: dict[str, Callable[..., nn.Module]] = {}


def register_mixer(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator that makes a mixer available as ``create_mixer(name, dim=..., heads=...)``."""

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        if name in _MIXERS:
            raise ValueError(f"mixer {name!r} is registered already")
        _MIXERS[name] = cls
        return cls

    return add


def create_mixer(name: str, **arguments) -> nn.Module:
    """Create a mixer by name.

    Args:
        name: one of :func:`list_mixers`.
        **arguments: its constructor's; all take ``dim`` and ``heads``.

    Tokens outside the grid see its tokens, but for classes whose ``joins_extra`` is False.

    Raises:
        TypeError: ``dim`` or ``heads`` that is no whole number, or missing.
        ValueError: unknown name, with the nearest matches; unknown option, with those there are; values out of bounds.
    """
    make = mixer_class(name)
    for size in ("dim", "heads"):
        if size in arguments:
            check_integer(size, arguments[size], 1)
    allowed = mixer_options(name)
    unknown = [option for option in arguments if option not in (*allowed, "dim", "heads", "device", "dtype")]
    if unknown:
        raise ValueError(f"mixer {name} has no option {', '.join(unknown)}; it has {', '.join(allowed) or 'none'}")
    return make(**arguments)


@cached(256)
def mixer_options(name: str) -> tuple[str, ...]:
    """What a mixer takes besides ``dim``, ``heads``, ``device`` and ``dtype``: its own options, then those of its bases."""
    found: list[str] = []
    of = mixer_class(name)
    for cls in (*inspect.getmro(of), *inspect.getmro(AttentionMixer)):  # type: ignore[arg-type]  # registered mixers are classes
        if "__init__" not in vars(cls) or cls is nn.Module:
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        found += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break  # it hands nothing on
    return tuple(each for each in dict.fromkeys(found) if each not in ("self", "dim", "heads", "pattern", "device", "dtype"))


def mixer_class(name: str) -> Callable[..., nn.Module]:
    """The constructor behind a mixer's name."""
    if name not in _MIXERS:
        raise unknown_name("mixer", name, _MIXERS, "regard.list_mixers() or `regard mixers`")
    return _MIXERS[name]


def list_mixers(pattern: str = "*") -> list[str]:
    """Names of the mixers that match a shell-style pattern."""
    return sorted(fnmatch.filter(_MIXERS, pattern))
