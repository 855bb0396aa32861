"""Sampling a map at fractional positions, and weighted sums of such samples.

    sample_points:  y[p] = sum over the four tokens around p of (1 - |row distance|) (1 - |column distance|) v,  zeros outside
    deform_sample:  y = sum over points of weight * sample

Cost: four tokens per point. Source: Dai et al., Deformable Convolutional Networks, arXiv:1703.06211; Zhu et al.,
arXiv:1811.11168 (weights); Pan et al., LITv2, arXiv:2205.13213.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_tensor


def sample_points(v: Tensor, points: Tensor) -> Tensor:
    """Values at fractional positions, interpolated bilinearly; zeros stand outside the grid.

    Differentiable in the values and in the points, from which the gradient is that of the cell they lie in.

    Args:
        v: ``(batch, rows, columns, heads, dim)``.
        points: ``(batch, *out, heads, points, 2)``, row and column in tokens: ``(0, 0)`` is the centre of the first token.
            One head of points serves all heads of values.

    Returns:
        ``(batch, *out, heads, points, dim)`` in the dtype of ``v``.

    Raises:
        ValueError: shapes that do not go together.
    """
    check_tensor("v", v, what="(batch, rows, columns, heads, dim)")
    check_tensor("points", points, what="(batch, *out, heads, points, 2)", device=v.device)
    if 0 in v.shape[1:]:
        raise ValueError(f"no axis may be empty but the batch; got v {tuple(v.shape)}")
    if v.ndim != 5 or points.ndim < 4 or points.shape[-1] != 2 or points.shape[0] != v.shape[0]:
        raise ValueError(
            f"expected v (batch, rows, columns, heads, dim) and points (batch, *out, heads, points, 2); "
            f"got {tuple(v.shape)} and {tuple(points.shape)}"
        )
    batch, rows, columns, heads, dim = v.shape
    if points.shape[-3] == 1 < heads:  # channels of all heads travel together
        return sample_points(v.flatten(-2).unsqueeze(-2), points).unflatten(-1, (heads, dim)).movedim(-2, -3).squeeze(-4)
    if points.shape[-3] != heads:
        raise ValueError(f"points must have the {heads} heads of the values, or one; got {tuple(points.shape)}")
    kind = torch.float64 if v.dtype == torch.float64 else torch.float32
    extent = torch.tensor([rows, columns], dtype=kind, device=v.device)
    unit = (2 * points.to(kind) + 1) / extent - 1  # -1 and 1 are the outer edges of the first and last token
    out = points.shape[1:-3]
    unit = unit.flip(-1).movedim(-3, 1).reshape(batch * heads, -1, points.shape[-2], 2)
    maps = v.permute(0, 3, 4, 1, 2).reshape(batch * heads, dim, rows, columns).to(kind)
    sampled = F.grid_sample(maps, unit, padding_mode="zeros", align_corners=False)
    sampled = sampled.permute(0, 2, 3, 1).unflatten(0, (batch, heads)).movedim(1, 2)
    return sampled.unflatten(1, out).to(v.dtype)  # (batch, *out, heads, points, dim)


def deform_sample(v: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Sums of the samples of :func:`sample_points`.

    Args:
        v, points: see :func:`sample_points`.
        weights: ``(batch, *out, heads, points)``; batch and ``out`` may be 1.

    Returns:
        ``(batch, *out, heads, dim)`` in the dtype of ``v``.

    Raises:
        ValueError: shapes that do not go together.
    """
    samples = sample_points(v, points)
    check_tensor("weights", weights, what="(batch, *out, heads, points)", device=samples.device)
    if (
        weights.ndim != samples.ndim - 1
        or weights.shape[-2:] != samples.shape[-3:-1]
        or any(n not in (1, m) for n, m in zip(weights.shape, samples.shape[:-1], strict=True))
    ):
        raise ValueError(
            f"weights must be (batch, *out, heads, points) = {tuple(samples.shape[:-1])}; got {tuple(weights.shape)}"
        )
    return (weights.to(samples.dtype).unsqueeze(-2) @ samples).squeeze(-2)
