"""The text form of static patterns."""

from __future__ import annotations

import ast
import inspect
import itertools
import threading
from collections import OrderedDict
from typing import Any

import torch

from ...caches import Cache
from ...checks import SHOWN, check_text, shown
from ...names import check_options, nearest
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
        return _build(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"cannot read pattern {_quoted(text)}: {reason}") from None
    except (RecursionError, MemoryError):  # both of Python's parser, and of what it made
        raise ValueError(f"cannot read pattern {_quoted(text)}: it is nested too deep") from None


def _quoted(text: str) -> str:
    return repr(text) if len(text) <= 4 * SHOWN else shown(text)


def _build(node: ast.expr) -> Pattern:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitOr, ast.BitAnd)):
        left, right = _build(node.left), _build(node.right)
        return left | right if isinstance(node.op, ast.BitOr) else left & right
    call = ast.Call(node, [], []) if isinstance(node, ast.Name) else node
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError("expected patterns joined by | and &, such as 'window(7, shift=3) | axis(0)'")
    name = call.func.id.lower()
    if name not in _CONSTRUCTORS:
        near = nearest(name, _CONSTRUCTORS)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"unknown pattern {call.func.id!r}{hint}; static patterns are {', '.join(sorted(_CONSTRUCTORS))}")
    if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
        raise ValueError(f"{name} takes its arguments one by one, without * and **")
    if name == "perhead":
        if len(call.args) != 1 or call.keywords or not isinstance(call.args[0], ast.Dict) or None in call.args[0].keys:
            raise ValueError("PerHead takes a dict from patterns to numbers of heads")
        groups = call.args[0]
        members = zip(groups.keys, groups.values, strict=True)
        return PerHead(tuple((_build(k), _value(v)) for k, v in members if k))  # type: ignore[misc]  # PerHead checks the numbers
    return _make(_CONSTRUCTORS[name], name, call)


def _make(constructor: type[Pattern], name: str, call: ast.Call) -> Pattern:
    """A pattern from what stands between its parentheses."""
    parameters = inspect.signature(constructor).parameters
    if len(call.args) > len(parameters):
        raise ValueError(f"{name} takes {', '.join(parameters) or 'no arguments'}; got {len(call.args)} values")
    check_options("pattern", name, [str(k.arg) for k in call.keywords], parameters)
    given: dict[str, object] = {}
    for option, node in (*zip(parameters, call.args, strict=False), *((str(k.arg), k.value) for k in call.keywords)):
        if option in given:
            raise ValueError(f"{name} got {option} twice")
        given[option] = _value(node)
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in given]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}, such as {EXAMPLES[name]!r}")
    return constructor(**given)


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"expected numbers, True, False, quoted words or tuples of them; got {ast.unparse(node)!r}") from None


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
