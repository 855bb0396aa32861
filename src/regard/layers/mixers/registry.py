"""Mixers by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

from torch import nn

from ...checks import check_text, shown
from ...names import check_options, options_of, unknown_name

_MIXERS: dict[str, Callable[..., nn.Module]] = {}


def register_mixer(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator that makes a mixer available as ``create_mixer(name, dim=..., heads=...)``."""

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        if name in _MIXERS:
            raise ValueError(f"mixer {name!r} is registered already")
        _MIXERS[name] = cls
        return cls

    return add


def create_mixer(name: str, *values, **arguments) -> nn.Module:
    """Create a mixer by name.

    Args:
        name: one of :func:`list_mixers`.
        **arguments: its constructor's; all take ``dim`` and ``heads``.

    Tokens outside the grid see its tokens, but for classes whose ``joins_extra`` is False.

    Raises:
        ValueError: unknown name or option, with the nearest matches; an option that is missing or out of bounds.
        TypeError: an option of another kind, or without its name.
    """
    constructor = mixer_class(name)
    if values:
        given = ", ".join(map(shown, values))
        raise TypeError(f"options of a mixer are named, such as create_mixer({name!r}, dim=64, heads=4); got {given}")
    options = options_of(constructor)
    last = [option for option in ("dim", "heads", "device", "dtype") if option in options]
    check_options("mixer", name, arguments, [*(option for option in options if option not in last), *last])
    missing = [o for o, p in options.items() if p.default is p.empty and o not in arguments]
    if missing:
        raise ValueError(f"mixer {name} needs {', '.join(missing)}; got {', '.join(arguments) or 'no options'}")
    return constructor(**arguments)


def mixer_class(name: str) -> Callable[..., nn.Module]:
    """The constructor behind a mixer's name."""
    check_text("name", name)
    if name not in _MIXERS:
        if (bare := name.partition("(")[0].strip()) in _MIXERS:
            raise ValueError(
                f"options stand beside a mixer's name, create_mixer({bare!r}, ...) or mixer=({bare!r}, {{...}}); got {name!r}"
            )
        raise unknown_name("mixer", name, _MIXERS, "regard.list_mixers() or `regard mixers`")
    return _MIXERS[name]


def list_mixers(pattern: str = "*") -> list[str]:
    """Names of the mixers that match a shell-style pattern."""
    return sorted(fnmatch.filter(_MIXERS, check_text("pattern", pattern)))
