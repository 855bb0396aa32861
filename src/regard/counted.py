"""FLOP formulas of operators, for torch's counter.

``torch.utils.flop_counter`` loads Triton, which takes a sixth of the time in which torch itself is loaded, and few programs
count: the formulas wait until somebody imports it. A counter knows the formulas that are there when it is made, so that its
import loads the operators too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"
OPERATORS = ("regard.ops", "regard.ops.affine", "regard.ops.linear.attend", "regard.ops.local.neighbors")
"""Modules whose import registers all formulas."""

_WAITING: list[tuple[Any, Callable[..., int]]] = []


def register_flop_formula(targets: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator of a function from the shapes of an operator's arguments to its FLOPs: torch's own, at once or later."""

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        _WAITING.append((targets, formula))
        _hand_over()
        return formula

    return register


def _hand_over() -> None:
    """Give torch the formulas that wait, once its counter is there."""
    register = getattr(sys.modules.get(COUNTER), "register_flop_formula", None)
    while register is not None and _WAITING:
        targets, formula = _WAITING.pop(0)
        register(targets)(formula)


class _Finder(MetaPathFinder):
    """Finds torch's counter as ever, and sees to it that it gets the formulas."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == COUNTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            _load()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this loader, made for this module
        return spec


def _load() -> None:
    for name in OPERATORS:
        import_module(name)
    _hand_over()


def wait_for_counter() -> None:
    """Register the formulas as soon as torch's counter is imported, or now where it has been."""
    if COUNTER in sys.modules:
        _load()
    else:
        sys.meta_path.insert(0, _Finder())
