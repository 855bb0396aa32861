"""The text form of static patterns."""

from __future__ import annotations

import ast
import itertools
import threading
from collections import OrderedDict

import torch

from ...caches import Cache
from ...checks import SHOWN, check_text, shown
from ...names import check_arguments, nearest
from ...text import read_call, read_expression, read_literal
from ..tracing import constant_in_graphs
from .base import Pattern
from .combined import PerHead
from .static import Axis, Causal, Dense, Grid, Halo, Neighborhood, Window

_CONSTRUCTORS = {c.__name__.lower(): c for c in (Dense, Causal, Window, Neighborhood, Halo, Grid, Axis, PerHead)}
EXAMPLES = {
    "window": "window(7)", "neighborhood": "neighborhood(7)", "halo": "halo(8, 3)", "grid": "grid(7)", "axis": "axis(0)",
}  # fmt: skip
LONGEST = 20_000
"""Letters of a text."""
MOST = 1024
"""Patterns that are kept after reading: texts may come from strangers."""
_PARSED: Cache[Pattern] = Cache("regard.ops.patterns.text.parsed", MOST)


def parse(text: str) -> Pattern:
    """Read a static pattern from text such as ``"neighborhood(7, dilation=2) | axis(0)"``; names in any case.

    Raises ``TypeError`` where it is no text, ``ValueError`` that quotes the text and lists what exists.
    """
    check_text("a pattern's text form", text)
    if torch.compiler.is_compiling():
        return getattr(_TRACED, _place(text))
    return _PARSED.get(text, lambda: _read(text))


class _Traced:
    """Patterns of compiled graphs, as attributes: a graph under trace can follow those, but not the reading itself."""


_TRACED = _Traced()
_PLACES: OrderedDict[str, str] = OrderedDict()
_NUMBERS = itertools.count()
_LOCK = threading.Lock()


@constant_in_graphs
def _place(text: str) -> str:
    """The name of the attribute that holds the pattern of a text; a graph whose attribute is gone is traced again."""
    pattern = _PARSED.get(text, lambda: _read(text))
    with _LOCK:
        if text not in _PLACES:
            while len(_PLACES) >= MOST:
                delattr(_TRACED, _PLACES.popitem(last=False)[1])
            _PLACES[text] = f"pattern_{next(_NUMBERS)}"  # never the name of an earlier one, which a graph may still hold
            setattr(_TRACED, _PLACES[text], pattern)
        return _PLACES[text]


def _read(text: str) -> Pattern:
    if len(text) > LONGEST:
        raise ValueError(f"cannot read a pattern of {len(text)} letters, at most {LONGEST}; got {shown(text)}")
    try:
        return _build(read_expression(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot read pattern {_quoted(text)}: {error}") from None
    except (RecursionError, MemoryError):  # of what was parsed
        raise ValueError(f"cannot read pattern {_quoted(text)}: it is nested too deep") from None


def _quoted(text: str) -> str:
    return repr(text) if len(text) <= 4 * SHOWN else shown(text)


def _build(node: ast.expr) -> Pattern:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitOr, ast.BitAnd)):
        left, right = _build(node.left), _build(node.right)
        return left | right if isinstance(node.op, ast.BitOr) else left & right
    if not isinstance(node, (ast.Name, ast.Call)):
        raise ValueError("expected patterns joined by | and &, such as 'window(7, shift=3) | axis(0)'")
    called, values, options = read_call(node)
    name = called.lower()
    if name not in _CONSTRUCTORS:
        near = nearest(name, _CONSTRUCTORS)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"unknown pattern {called!r}{hint}; static patterns are {', '.join(sorted(_CONSTRUCTORS))}")
    if name == "perhead":
        if len(values) != 1 or options or not isinstance(groups := values[0], ast.Dict) or None in groups.keys:
            raise ValueError("PerHead takes a dict from patterns to numbers of heads")
        members = zip(groups.keys, groups.values, strict=True)
        return PerHead(tuple((_build(k), read_literal(v)) for k, v in members if k))  # type: ignore[misc]  # PerHead checks the numbers
    constructor = _CONSTRUCTORS[name]
    check_arguments("pattern", name, constructor, values, options, EXAMPLES.get(name, ""))
    return constructor(*map(read_literal, values), **{option: read_literal(node) for option, node in options.items()})


def as_pattern(value: Pattern | str) -> Pattern:
    """A pattern, from itself or from its text form.

    Raises:
        TypeError: neither of both.
        ValueError: a text that cannot be read.
    """
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        return parse(value)
    raise TypeError(f"expected a pattern or its text form; got {shown(value)}")
