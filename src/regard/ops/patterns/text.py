"""The text form of static patterns."""

from __future__ import annotations

import ast
import itertools
import threading
from collections import OrderedDict

import torch

from ...caches import Cache
from ..tracing import constant_in_graphs
from .base import Pattern
from .combined import PerHead
from .static import Axis, Causal, Dense, Grid, Halo, Neighborhood, Window

_CONSTRUCTORS = {c.__name__.lower(): c for c in (Dense, Causal, Window, Neighborhood, Halo, Grid, Axis, PerHead)}
MOST = 1024
"""Patterns that are kept after reading: texts may come from strangers."""
_PARSED: Cache[Pattern] = Cache("regard.ops.patterns.text.parsed", MOST)


def parse(text: str) -> Pattern:
    """Read a static pattern from text such as ``"neighborhood(7, dilation=2) | axis(0)"``; names in any case.

    Raises ``ValueError`` that quotes the text and lists what exists.
    """
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
    try:
        return _build(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"cannot read pattern {text!r}: {reason}") from None


def _build(node: ast.expr) -> Pattern:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitOr, ast.BitAnd)):
        left, right = _build(node.left), _build(node.right)
        return left | right if isinstance(node.op, ast.BitOr) else left & right
    call = ast.Call(node, [], []) if isinstance(node, ast.Name) else node
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError("expected patterns joined by | and &, such as 'window(7, shift=3) | axis(0)'")
    name = call.func.id.lower()
    if name not in _CONSTRUCTORS:
        raise ValueError(f"unknown pattern {call.func.id!r}; static patterns are {', '.join(sorted(_CONSTRUCTORS))}")
    if name == "perhead":
        if len(call.args) != 1 or not isinstance(call.args[0], ast.Dict):
            raise ValueError("PerHead takes a dict from patterns to numbers of heads")
        groups = call.args[0]
        return PerHead(tuple((_build(k), ast.literal_eval(v)) for k, v in zip(groups.keys, groups.values, strict=True) if k))
    arguments = [ast.literal_eval(a) for a in call.args]
    return _CONSTRUCTORS[name](*arguments, **{k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg})


def as_pattern(value: Pattern | str) -> Pattern:
    """A pattern, from itself or from its text form."""
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        return parse(value)
    raise ValueError(f"expected a pattern or its text form; got {type(value).__name__} {value!r}")
