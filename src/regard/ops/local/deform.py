"""Sampling a map at fractional positions, and weighted sums of such samples.

    sample_points:  y[p] = sum over the four tokens around p of (1 - |row distance|) (1 - |column distance|) v,  zeros outside
    deform_sample:  y = sum over points of weight * sample

Cost: four tokens per point. Source: Dai et al., Deformable Convolutional Networks, arXiv:1703.06211; Zhu et al.,
arXiv:1811.11168 (weights); Pan et al., LITv2, arXiv:2205.13213.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_tensor
from ..transforms import again, differentiated, fixed


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
    sampled = _sample(maps, unit)
    sampled = sampled.permute(0, 2, 3, 1).unflatten(0, (batch, heads)).movedim(1, 2)
    return sampled.unflatten(1, out).to(v.dtype)  # (batch, *out, heads, points, dim)


def _sample(maps: Tensor, unit: Tensor) -> Tensor:
    """``torch.nn.functional.grid_sample``, whose own gradient is not differentiable."""
    if differentiated(maps, unit):
        return _interpolated(maps, unit)[0]
    sampled = F.grid_sample(maps, unit, padding_mode="zeros", align_corners=False)
    needed = torch.is_grad_enabled() and (maps.requires_grad or unit.requires_grad)
    return again(sampled, _interpolated, maps, unit) if needed and not fixed() else sampled


def _interpolated(maps: Tensor, unit: Tensor) -> tuple[Tensor]:
    """Samples ``(items, dim, out, points)`` of ``maps (items, dim, rows, columns)`` at ``unit (items, out, points, 2)``."""
    rows, columns = maps.shape[-2:]
    places = [((unit[..., 1 - axis] + 1) * n - 1) / 2 for axis, n in enumerate((rows, columns))]
    cells = [p.detach().floor() for p in places]
    y = maps.new_zeros(())
    for step in itertools.product((0, 1), (0, 1)):
        at = [c + s for c, s in zip(cells, step, strict=True)]
        near = [1 - (p - a).abs() for p, a in zip(places, at, strict=True)]
        inside = (at[0] >= 0) & (at[0] < rows) & (at[1] >= 0) & (at[1] < columns)
        index = (at[0].clamp(0, rows - 1) * columns + at[1].clamp(0, columns - 1)).long()
        found = (
            maps.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, maps.shape[1], -1)).unflatten(-1, index.shape[1:])
        )
        y = y + found * (near[0] * near[1] * inside).unsqueeze(1)
    return (y,)


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
