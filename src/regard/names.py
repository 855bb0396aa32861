"""Suggestions for names and options that do not exist."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from difflib import SequenceMatcher
from typing import Any

FEW = 40
"""Names that an error gives in full."""
ALIKE = 0.7
"""The share of letters from which on a name is near."""


def nearest(name: str, known: Iterable[str], most: int = 4) -> list[str]:
    """Names that are alike, or whose beginning is, the most alike first; capitals do not count."""
    wanted = str(name).lower()
    found = []
    for each in known:
        whole = SequenceMatcher(None, wanted, each.lower()).ratio()
        start = SequenceMatcher(None, wanted, each.lower()[: len(wanted)]).ratio()
        if wanted and max(whole, start) >= ALIKE:
            found.append((-max(whole, start), -whole, each))
    return [each for *_, each in sorted(found)[:most]]


def unknown_name(kind: str, name: str, known: Collection[str], listing: str) -> ValueError:
    """The error for an unknown name: the nearest ones, or where none is near all of a few, or how those of many begin.

    Args:
        kind: what it should be the name of.
        name: what was given.
        known: the names there are.
        listing: what lists them.
    """
    near = nearest(name, known)
    lists = f"{listing} lists all {len(known)}"
    if near:
        told = f"did you mean {', '.join(near)}? {lists}"
    elif len(known) <= FEW:
        told = f"there are {', '.join(sorted(known))}"
    else:
        families = sorted({each.partition("_")[0] for each in known})
        told = f"none is like it; names begin with {', '.join(families)}; {lists}"
    return ValueError(f"unknown {kind} {name!r}; {told}")


def check_options(
    kind: str, name: str, given: Iterable[str], known: Collection[str], has: str = "it has", also: Collection[str] = ()
) -> None:
    """Check that something has all the options that are given.

    Args:
        kind: what it is, such as a mixer.
        name: of it.
        given: names of options.
        known: the options that it has.
        has: what comes before their list in the error.
        also: others that may have been meant, which the list leaves out.

    Raises:
        ValueError: the unknown ones, those that are near, and all there are.
    """
    unknown = [option for option in given if option not in known]
    if not unknown:
        return
    near = [each for option in unknown for each in nearest(option, [*known, *also], 2)] or [
        each for option in unknown for each in known if set(option.split("_")) & set(each.split("_"))
    ]
    hint = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
    listed = ", ".join(known) or "none"
    raise ValueError(f"{kind} {name} has no option {', '.join(map(str, unknown))}; {has} {listed}{hint}")


def check_arguments(
    kind: str, name: str, constructor: Callable[..., Any], values: Collection[Any], options: Collection[str], example: str = ""
) -> None:
    """Check that a constructor can be called with these values and options, as Python does, in one sentence.

    Args:
        kind: what it makes, such as a pattern.
        name: of what it makes.
        constructor: the class or function.
        values: given by their places.
        options: names of what is given by name.
        example: of a call, for the error about what is missing.

    Raises:
        ValueError: too many values, an unknown option, one that is given twice or missing.
    """
    parameters = inspect.signature(constructor).parameters
    if len(values) > len(parameters):
        raise ValueError(f"{name} takes {', '.join(parameters) or 'no arguments'}; got {len(values)} values")
    check_options(kind, name, options, parameters)
    placed = list(parameters)[: len(values)]
    if twice := [option for option in options if option in placed]:
        raise ValueError(f"{name} got {', '.join(twice)} twice")
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in (*placed, *options)]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}{f', such as {example!r}' if example else ''}")


def arguments_named(kind: str) -> Callable[[type[Any]], type[Any]]:
    """Class decorator: wrong names of arguments are refused by :func:`check_arguments`, as things of that kind."""

    def decorate(cls: type[Any]) -> type[Any]:
        construct = cls.__init__

        @functools.wraps(construct)
        def __init__(self: Any, *values: Any, **options: Any) -> None:
            try:
                construct(self, *values, **options)
            except TypeError:
                check_arguments(kind, cls.__name__, cls, values, options)
                raise  # a wrong kind of value

        cls.__init__ = __init__
        return cls

    return decorate


def options_of(constructor: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options that a function or class takes by name; of a class also those that it hands on to its bases.

    What a base requires the class gives itself. It may name in ``settled`` what else it does, and in ``hands_to`` the class
    that gets its other options, where that is no base.
    """
    if not isinstance(constructor, type):
        return {k: p for k, p in inspect.signature(constructor).parameters.items() if p.kind is not p.VAR_KEYWORD}
    found: dict[str, inspect.Parameter] = {}
    settled: set[str] = set()
    own = None  # the first class that takes any
    waiting = list(constructor.__mro__)
    while waiting:
        each = waiting.pop(0)
        if "__init__" not in vars(each):
            continue
        parameters = inspect.signature(vars(each)["__init__"]).parameters
        for option, parameter in list(parameters.items())[1:]:
            given = option in settled or (own is not None and parameter.default is parameter.empty)
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and not given:
                found.setdefault(option, parameter)
        own = each if own is None else own
        settled |= set(vars(each).get("settled", ()))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
        if "hands_to" in vars(each):
            waiting = list(vars(each)["hands_to"].__mro__)
    return found
