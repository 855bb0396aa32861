"""FLOP formulas of operators, for torch's counter.

``torch.utils.flop_counter`` loads Triton, which takes a sixth of the time in which torch itself is loaded, and few programs
count: the formulas wait until somebody imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"

_WAITING: list[tuple[Any, Callable[..., int]]] = []


def register_flop_formula(targets: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator of a function from the shapes of an operator's arguments to its FLOPs: torch's own, at once or later."""

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        counter = sys.modules.get(COUNTER)
        if counter is not None and hasattr(counter, "register_flop_formula"):
            counter.register_flop_formula(targets)(formula)
        else:
            _WAITING.append((targets, formula))
            if _FINDER not in sys.meta_path:
                sys.meta_path.insert(0, _FINDER)
        return formula

    return register


class _Finder(MetaPathFinder):
    """Finds torch's counter as ever, and hands it the formulas that waited for it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:  # fmt: skip
        if fullname != COUNTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            while _WAITING:
                targets, formula = _WAITING.pop(0)
                module.register_flop_formula(targets)(formula)
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this loader, made for this module
        return spec


_FINDER = _Finder()
