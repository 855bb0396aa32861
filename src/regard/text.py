"""Text of the form ``name(value, option=value)``, whose values are Python literals.

Nothing is evaluated: what is no name, call or literal is refused.
"""

from __future__ import annotations

import ast
from typing import Any

QUOTED = 80
"""Letters of a value that an error quotes."""


def read_expression(text: str) -> ast.expr:
    """Parse a text as one Python expression.

    Raises:
        ValueError: it is none, or nested too deep.
    """
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(error.msg) from None
    except (RecursionError, MemoryError):  # both of Python's parser
        raise ValueError("it is nested too deep") from None


def read_call(source: str | ast.expr) -> tuple[str, list[ast.expr], dict[str, ast.expr]]:
    """Split a name with or without arguments: the name, the values, and the options by name.

    Raises:
        ValueError: something else, an option given twice, or ``*`` and ``**``.
    """
    node = read_expression(source) if isinstance(source, str) else source
    call = ast.Call(node, [], []) if isinstance(node, ast.Name) else node
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError("expected a name, with or without options, such as name(option=value)")
    name, options = call.func.id, {str(keyword.arg): keyword.value for keyword in call.keywords}
    if any(isinstance(value, ast.Starred) for value in call.args) or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError(f"{name} takes its arguments one by one, without * and **")
    if len(options) < len(call.keywords):
        given = [str(keyword.arg) for keyword in call.keywords]
        raise ValueError(f"{name} got {next(each for each in given if given.count(each) > 1)} twice")
    return name, call.args, options


def read_literal(source: str | ast.expr) -> Any:
    """Read a number, True, False, None, a quoted word, or a tuple of such.

    Raises:
        ValueError: anything else.
    """
    try:
        return ast.literal_eval(source.strip() if isinstance(source, str) else source)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        text = source if isinstance(source, str) else ast.unparse(source)
        raise ValueError(f"expected numbers, True, False, quoted words or tuples of them; got {text[:QUOTED]!r}") from None
