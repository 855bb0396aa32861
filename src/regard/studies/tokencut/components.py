"""Connected parts of a mask: cells that share a side with one another, on a grid of any rank.

Cost: a few passes over the grid, about the logarithm of the longest way inside a part.
"""

from __future__ import annotations

import torch
from torch import Tensor


def connected_components(mask: Tensor) -> Tensor:
    """Number the connected parts of a mask.

    Args:
        mask: ``(*grid,)``, bool; cells that touch only at a corner are not neighbours.

    Returns:
        ``(*grid,)`` of int64: the row-major index of the last cell of the part that a cell belongs to, -1 outside of the mask.
    """
    index = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
    labels = torch.where(mask, index, -1)
    while True:
        grown = labels.clone()
        for axis, length in enumerate(mask.shape):
            low, high = labels.narrow(axis, 0, length - 1), labels.narrow(axis, 1, length - 1)
            for part, other in ((grown.narrow(axis, 0, length - 1), high), (grown.narrow(axis, 1, length - 1), low)):
                part.copy_(torch.maximum(part, other))
        grown = torch.where(mask, grown, -1)
        grown = torch.where(mask, grown.flatten()[grown.clamp(min=0)], -1)  # what the cell that lends its number has learned
        if torch.equal(grown, labels):
            return labels
        labels = grown


def fill_holes(mask: Tensor) -> Tensor:
    """The mask ``(*grid,)`` and every part of its complement that does not reach the border of the grid."""
    outside = connected_components(~mask)
    border = torch.cat([outside.select(axis, end).flatten() for axis in range(mask.ndim) for end in (0, -1)])
    return ~torch.isin(outside, border[border >= 0]) | mask


def largest_component(mask: Tensor) -> Tensor:
    """The largest connected part of a mask ``(*grid,)``, the first of equally large ones; the mask itself where it is empty."""
    labels = connected_components(mask)
    found, counts = labels[mask].unique(return_counts=True)
    return labels == found[counts.argmax()] if len(found) else mask
