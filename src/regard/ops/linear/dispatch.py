"""The arithmetic of a linear operator in one of its kernel languages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import native


def run(function: Callable[..., Any], kernel: str, *arguments: Any) -> Any:
    """Run a function of tensor operators, or what has its name in C or Triton, without autocasting.

    Args:
        function: in tensor operators.
        kernel: ``"torch"``, ``"native"`` or ``"triton"``; C serves what it can.
        arguments: of the function; the first is a tensor.
    """
    name = function.__name__
    if kernel == "triton":
        from . import triton

        function = getattr(triton, name)
    elif kernel == "native" and native.serves(name, arguments[0]):
        function = getattr(native, name)
    with torch.autocast(arguments[0].device.type, enabled=False):
        return function(*arguments)
