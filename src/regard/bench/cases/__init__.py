"""Operators against their peers, by group."""

from __future__ import annotations

from collections.abc import Callable

from . import linear, natten_interface, neighborhoods, routed, windows
from .scope import Case, Scope

CASES: dict[str, Callable[[Scope], list[Case]]] = {
    "neighborhood": neighborhoods.cases,
    "window": windows.window_cases,
    "axes": windows.axis_cases,
    "routed": routed.cases,
    "linear": linear.cases,
    "natten": natten_interface.cases,
}

__all__ = ["CASES", "Case", "Scope"]
