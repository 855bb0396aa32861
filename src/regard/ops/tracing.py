"""What a graph under trace should see of a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Let ``torch.compile`` call the function while tracing and keep its result as a constant, instead of tracing inside.

    The same mark as ``torch.compiler.assume_constant_result``, which imports all of dynamo to set it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # the attribute that dynamo looks for
    return function


def fill(length: int, step: int) -> int:
    """How much is missing to the next multiple of ``step``.

    Not ``-length % step``: ONNX divides negative numbers another way, and a program whose sizes are open computes this itself.
    """
    return (step - length % step) % step


def count_steps(length: int, step: int) -> int:
    """How many steps cover a length, the last one perhaps in part; not ``-(-length // step)``, see :func:`fill`."""
    return (length + step - 1) // step


def check_fixed(what: str, grid: Sequence[int]) -> None:
    """Raise ``ValueError`` where an export leaves the sizes of a grid open that the mechanism computes with as numbers."""
    if torch.compiler.is_exporting() and any(isinstance(n, torch.SymInt) for n in grid):
        raise ValueError(f"{what} needs the numbers of its grid: export it with fixed sizes; the batch may be left open")
