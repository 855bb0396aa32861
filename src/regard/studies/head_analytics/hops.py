"""Hop profiles: mean over patches of the attention from a patch to all patches at Chebyshev distance k from it.

Cost: the weights once. Source: Li et al., "How Does
Attention Work in Vision Transformers? A Visual Analytics Attempt", arXiv:2303.13731.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...lens.captured import Map, check_map
from ...lens.places import Cells


@dataclass(frozen=True, eq=False)
class HopProfile:
    """How much attention goes how far.

    Attributes:
        strength: ``(batch, heads, hops)`` in float64: the mean share of a patch's attention at each Chebyshev distance.
        per_neighbour: likewise, what one patch at that distance gets: the share over the number of neighbours that there are,
            averaged over the patches that have any.
        elsewhere: ``(batch, heads)``: the share of class tokens, sinks and whatever else has no place. With ``strength`` summed
            over hops it makes one, wherever a patch attends to anything.
    """

    strength: Tensor
    per_neighbour: Tensor
    elsewhere: Tensor

    @property
    def mean_hop(self) -> Tensor:
        """Distance averaged over the attention to patches, ``(batch, heads)``; 0 where there is none."""
        hops = torch.arange(self.strength.shape[-1], dtype=self.strength.dtype, device=self.strength.device)
        return (self._shares * hops).sum(-1)

    @property
    def entropy(self) -> Tensor:
        """Entropy of the attention to patches over distances, in nats, ``(batch, heads)``."""
        return -torch.xlogy(self._shares, self._shares).sum(-1)

    @property
    def _shares(self) -> Tensor:
        return self.strength / self.strength.sum(-1, keepdim=True).clamp(min=torch.finfo(self.strength.dtype).tiny)


def hop_distance(grid: Sequence[int], device=None) -> Tensor:
    """Chebyshev distances between the cells of a grid, ``(n, n)`` of int64."""
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    places = torch.stack([axis.flatten() for axis in axes], -1)
    return (places[:, None] - places).abs().amax(-1)


def hop_profile(found: Map) -> HopProfile:
    """Attention by distance on the patch grid.

    Args:
        found: from :func:`regard.lens.capture`; of a grid of patches to itself.

    Raises:
        ValueError: queries and keys that are not patches of one grid.
    """
    check_map(found)
    grid = found.grid
    cells = [where if isinstance(where, Cells) and where.grid == grid else None for where in found.places]
    if not isinstance(found.row_places, Cells) or not any(cells):
        raise ValueError(f"a profile needs attention from a grid of patches to itself; got {found!r}")
    hops = max(grid)
    totals: Tensor | float = 0.0
    shares: Tensor | float = 0.0
    existing = torch.zeros(hops, dtype=torch.float64)
    every = hop_distance(grid)[list(found.rows)]
    for part, weights, _ in found.stream():
        mass = sum(where.spread(w.double()).flatten(3) for w, where in zip(weights, cells, strict=True) if where is not None)
        assert isinstance(mass, Tensor)  # there is such a source
        member = F.one_hot(every[part].to(mass.device), hops).double()  # (rows, keys, hops)
        neighbours = member.sum(1)
        gathered = torch.einsum("bhrk,rkn->bhrn", mass, member)
        totals = totals + gathered.sum(2)
        shares = shares + (gathered / neighbours.clamp(min=1.0)).sum(2)
        existing = existing.to(mass.device) + (neighbours > 0).sum(0)
    assert isinstance(totals, Tensor)  # there are rows
    strength = totals / len(found.rows)
    elsewhere = (1.0 - strength.sum(-1)).clamp(min=0.0)
    return HopProfile(strength, shares / existing.clamp(min=1.0), elsewhere)
