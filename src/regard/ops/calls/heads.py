"""Heads of keys and values that several heads of queries share."""

from __future__ import annotations

from torch import Tensor


def repeat_heads(tensor: Tensor, heads: int, axis: int = -2) -> Tensor:
    """Each head as often as makes ``heads`` of them, one after another; the tensor itself where it has so many."""
    times = heads // tensor.shape[axis]
    return tensor if times == 1 else tensor.repeat_interleave(times, axis)
