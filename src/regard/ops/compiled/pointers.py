"""Tensors as C is given them: no pointer is taken before the place, type, shape and steps of its tensor are found right.

C trusts all of it: what fails here would have been read or written out of bounds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import shown

ROWS = (torch.float32, torch.bfloat16)
"""Types of rows that are compiled."""
SINGLE = (torch.float32,)


class RowsOf(ctypes.Structure):
    """A tensor ``(batch, tokens, heads, width)``: its address and steps in elements; rows are contiguous."""

    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "token", "head"))]


NOTHING = RowsOf(None, 0, 0, 0)
"""Rows that are not wanted."""


def rows(name: str, tensor: Tensor, shape: Sequence[int], kinds: Sequence[torch.dtype]) -> RowsOf:
    """A tensor of a shape ``(batch, tokens, heads, width)``, or ``(batch, tokens, heads)`` for rows of one number.

    Raises:
        ValueError: it is not of that shape and one of those types, or its rows are not contiguous.
    """
    steps = tensor.stride()
    _check(name, tensor, shape, kinds, len(shape) < 4 or steps[-1:] == (1,) or shape[3] == 1)
    return RowsOf(tensor.data_ptr(), *steps[:3])


def block(name: str, tensor: Tensor, shape: Sequence[int], kinds: Sequence[torch.dtype]) -> int:
    """The address of a contiguous tensor of a shape.

    Raises:
        ValueError: it is not of that shape and one of those types, or not contiguous.
    """
    _check(name, tensor, shape, kinds, tensor.is_contiguous())
    return tensor.data_ptr()


def _check(name: str, tensor: Tensor, shape: Sequence[int], kinds: Sequence[torch.dtype], contiguous: bool) -> None:
    right = tensor.device.type == "cpu" and tensor.dtype in kinds and tuple(tensor.shape) == tuple(shape) and 0 not in shape
    if not right or not contiguous or tensor.is_neg():
        types = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
        steps = "" if contiguous else f" of steps {tensor.stride()}"
        raise ValueError(
            f"{name} of a compiled kernel must be {types} {tuple(shape)} on a CPU, no axis empty, rows contiguous; "
            f"got {shown(tensor)}{steps}"
        )
