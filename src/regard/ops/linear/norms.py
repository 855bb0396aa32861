"""The divisor of linear attention, ``max(sum of weights, floor) + eps``, where it may be 0 or nearly so.

A divisor below the smallest normal number of its dtype (float32; float64 for float64) counts as 0: its query gives 0. From
there up to 2^24 times that number the output is divided as ever, but carries no gradient: what is multiplied with so large a
reciprocal may leave the range of the dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spans import readable

STEEP = 2.0**24
"""How many times the smallest normal number a divisor must be for a gradient: so much larger may the products with its
reciprocal become, sums of gradients times values, before they overflow."""


def inverse(mass: Tensor, floor: float | None, eps: float) -> Tensor:
    """One over the divisor, 0 where that counts as 0."""
    divisor = (mass if floor is None else mass.clamp(min=floor)) + eps
    return divisor.masked_fill(divisor.abs() < torch.finfo(mass.dtype).tiny, torch.inf).reciprocal()


def steady(inverse: Tensor) -> Tensor:
    """One over the divisor as the gradient takes it: 0 where it is too large for one."""
    return inverse.masked_fill(inverse.abs() > 1 / (STEEP * torch.finfo(inverse.dtype).tiny), 0.0)


def divided(y: Tensor, mass: Tensor, floor: float | None, eps: float) -> Tensor:
    """``y`` over the divisor, differentiable."""
    divisor = (mass if floor is None else mass.clamp(min=floor)) + eps
    smallest = torch.finfo(mass.dtype).tiny
    size = divisor.detach().abs()
    steep = size < STEEP * smallest
    if not readable(steep) or bool(steep.any()):
        y, divisor = y.where(~steep, y.detach()), divisor.where(~steep, divisor.detach())
        divisor = divisor.masked_fill(size < smallest, torch.inf)
    return y / divisor
