"""What a tensor, a number, a size and an option may be: the checks of every public door.

Each check returns the value, or raises one sentence that names the argument and quotes what was given and what is allowed:
``TypeError`` for another kind of thing, ``ValueError`` for one that is out of bounds. They read shapes and types, never the
values of a tensor, and they hold while a graph is traced.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .names import nearest

LARGEST = 2**31 - 1
"""The largest size, kernel, dilation, shift or index: what fits 32 bits."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SHOWN = 80
"""Letters of a value that an error quotes."""


def shown(value: object) -> str:
    """A value as an error quotes it: the dtype and shape of a tensor, the beginning of anything else, with its type."""
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        layout = "" if value.layout == torch.strided else f" {str(value.layout).removeprefix('torch.')}"
        return f"a{layout} {str(value.dtype).removeprefix('torch.')} tensor {tuple(value.shape)}{where}"
    try:
        text = " ".join(repr(value).split())  # arrays have line breaks
    except Exception:
        text = "an object without a repr"
    text = text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
    return text if value is None or isinstance(value, (bool, type)) else f"{type(value).__name__} {text}"


def check_tensor(
    name: str, value: Any, kinds: Sequence[torch.dtype] = FLOATS, *, device: torch.device | None = None, what: str = ""
) -> Tensor:
    """Check that a value is a dense tensor of one of some dtypes (and on a device).

    Args:
        name: of the argument.
        value: what was given.
        kinds: dtypes that are allowed.
        device: where it must be, if that matters.
        what: its shape or meaning in words, for the error.

    Raises:
        TypeError: no tensor, or one of another dtype or layout.
        ValueError: a tensor on another device.
    """
    about = f" {what}" if what else ""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor{about}; got {shown(value)}")
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        raise TypeError(f"{name} must be a dense (strided) tensor{about}; got {shown(value)}")
    if value.dtype not in kinds:
        allowed = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
        raise TypeError(f"{name} must be {allowed}{about}; got {shown(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, where the queries are; got {shown(value)}")
    return value


def check_integer(name: str, value: Any, low: int | None = 0, high: int = LARGEST) -> int:
    """Check that a value is a whole number within bounds, no bool; returns it as an int.

    Raises:
        TypeError: no whole number.
        ValueError: out of bounds.
    """
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # stands for an int while a graph is traced
    if isinstance(value, (bool, Tensor)) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name} must be a whole number; got {shown(value)}")
    number = operator.index(value)
    if low is not None and number < low:
        raise ValueError(f"{name} must be at least {low}; got {shown(value)}")
    if number > high:
        raise ValueError(f"{name} must be at most {high}; got {shown(value)}")
    return number


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, below: float | None = None) -> float:
    """Check that a value is a finite real number with ``low <= value <= high`` (and under ``below``), no bool.

    Raises:
        TypeError: no real number.
        ValueError: not finite, or out of bounds.
    """
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]  # stands for a number while a graph is traced
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high or (below is not None and number >= below):
        upper = f" and below {below}" if below is not None else f" and at most {high}" if high != math.inf else ""
        bounds = f" of at least {low}{upper}" if low != -math.inf else upper
        raise ValueError(f"{name} must be a finite number{bounds}; got {shown(value)}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Check that a value is True or False.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {shown(value)}")
    return value


def check_choice(name: str, value: Any, allowed: Collection[str]) -> str:
    """Check that a value is one of some words.

    Raises:
        TypeError: no text.
        ValueError: another word; the error lists the allowed ones, and the nearest where there is one.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(allowed)}; got {shown(value)}")
    if value not in allowed:
        near = nearest(value, allowed)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}{hint}")
    return value


def check_sizes(name: str, value: Any, rank: int | None = None, low: int = 1, high: int = LARGEST) -> int | tuple[int, ...]:
    """Check a whole number for all axes, or one per axis: an int, or a tuple of ``rank`` ints.

    Raises:
        TypeError: no whole numbers.
        ValueError: out of bounds, or another number of axes.
    """
    if isinstance(value, (str, bytes, Tensor)) or not isinstance(value, Sequence):
        return check_integer(name, value, low, high)
    if not value or (rank is not None and len(value) != rank):
        wanted = "one number per axis" if rank is None else f"a number, or {rank} of them, one per axis"
        raise ValueError(f"{name} must be {wanted}; got {shown(value)}")
    return tuple(check_integer(f"{name}[{axis}]", entry, low, high) for axis, entry in enumerate(value))
