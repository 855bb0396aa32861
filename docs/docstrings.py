"""Docstrings as markdown: formulas become blocks, roles and arXiv ids become links."""

from __future__ import annotations

import re
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

from griffe import Extension, Object

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`]+)`")
ARXIV = re.compile(r"(?<![\w/])arXiv:(\d{4}\.\d{5})")


def to_markdown(text: str) -> str:
    """A docstring, its first line not indented, as markdown."""
    lines: list[str] = []
    in_section = was_formula = False
    for line in text.splitlines():
        indented = line.startswith("    ")
        if line and not indented:
            in_section = SECTION.match(line) is not None
        is_formula = indented and not in_section
        if line and lines and lines[-1] and is_formula != was_formula:
            lines.append("")  # a block stands between blank lines
        if line:
            was_formula = is_formula
        lines.append(ROLE.sub(r"\1", line) if is_formula else _linked(line))
    return "\n".join(lines)


def _linked(text: str) -> str:
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", ROLE.sub(_role, text))


def _role(found: re.Match[str]) -> str:
    path = found.group(1)
    name = f"`{path.rpartition('.')[2]}`"
    if not path.startswith("regard."):
        return f"`{path}`"
    place = defined_at(path)
    return name if place is None else f"[{name}][{place}]"


def defined_at(path: str) -> str | None:
    """The dotted path where a class, a function or a module is defined; None for other objects, which have no anchor."""
    try:
        subject = resolve_name(path)
    except (AttributeError, ImportError):
        return path  # an extra that is missing; or a mistake, which the build then reports
    if isinstance(subject, ModuleType):
        return subject.__name__
    home, name = getattr(subject, "__module__", None), getattr(subject, "__qualname__", None)
    return f"{home}.{name}" if home and name else None


class Markdown(Extension):
    """Hands the docstrings of the reference to mkdocstrings as markdown."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
