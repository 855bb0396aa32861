"""Rotary position embedding on grids of any rank.

    rotate the pair (x_{2i}, x_{2i+1}) by the angle position * base^(-i / pairs)

Each axis of the grid owns an equal share of the pairs, so that logits depend on relative offsets only.
Source: Su et al., RoFormer, arXiv:2104.09864; axial form for images: Heo et al., arXiv:2403.13298.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import FLOATS, INTEGERS, check_number, check_tensor
from ..patterns import grid_positions


def rope(x: Tensor, positions: Tensor | None = None, *, base: float = 10000.0) -> Tensor:
    """Rotate queries or keys by their positions.

    Args:
        x: ``(batch, *grid, heads, head_dim)``; ``head_dim`` is a multiple of ``2 * rank``.
        positions: coordinates ``(*grid, rank)`` or ``(batch, *grid, rank)``, real numbers allowed; those of the grid by
            default.
        base: the wavelengths, in steps, run from ``2 pi`` to nearly ``2 pi * base``.

    Returns:
        A tensor like ``x``; angles are taken in at least float32.

    Raises:
        ValueError: a head_dim that does not divide, positions that do not fit the grid.
    """
    check_tensor("x", x, what="(batch, *grid, heads, head_dim)")
    if x.ndim < 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be (batch, *grid, heads, head_dim), no axis empty but the batch; got {tuple(x.shape)}")
    if positions is not None:
        check_tensor("positions", positions, (*FLOATS, *INTEGERS), device=x.device, what="([batch,] *grid, rank)")
    base = check_number("base", base)
    if base <= 0.0:
        raise ValueError(f"base must be above 0; got {base}")
    grid = tuple(x.shape[1:-2])
    if positions is None:
        positions = grid_positions(grid, device=x.device).reshape(*grid, len(grid))
    if (
        0 in positions.shape[-1:]
        or tuple(positions.shape[-1 - len(grid) : -1]) != grid
        or positions.ndim - len(grid) not in (1, 2)
    ):
        raise ValueError(f"positions must be ([batch,] *grid, rank) for the grid {grid}; got {tuple(positions.shape)}")
    if positions.ndim > len(grid) + 1 and positions.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"positions must be of 1 or {x.shape[0]} batch items; got {tuple(positions.shape)}")
    rank, width = positions.shape[-1], x.shape[-1]
    if width % (2 * rank):
        raise ValueError(f"head_dim must be a multiple of {2 * rank} to rotate {rank} axes; got {width}")
    kind = torch.promote_types(x.dtype, torch.float32)
    pairs = width // (2 * rank)
    frequencies = base ** (-torch.arange(pairs, device=x.device, dtype=kind) / pairs)
    angles = (positions.to(kind).unsqueeze(-1) * frequencies).flatten(-2).unsqueeze(-2)  # ([batch,] *grid, 1, head_dim / 2)
    even, odd = x.to(kind).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return rotated.flatten(-2).to(x.dtype)
