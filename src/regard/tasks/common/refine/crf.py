"""A fully connected conditional random field: pixels that are near and alike get the same label.

    q_i <- sigmoid(u_i + sum_m w_m sum_j K_m(i, j) (2 q_j - 1)),   K = D^(-1/2) G D^(-1/2)
with G a Gaussian of places, or of places and colours, D the diagonal of its row sums, u how much a pixel speaks for the object.
Cost: quadratic in pixels for each iteration, computed in blocks; exact, where implementations on a lattice approximate. Source:
Kraehenbuehl & Koltun, arXiv:1210.5644.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PAIRS = 1 << 24
"""Pairs of pixels at once."""


def dense_crf(
    image: Tensor,
    mask: Tensor,
    *,
    near: float = 3.0,
    near_weight: float = 7.0,
    spatial: float = 50.0,
    colour: float = 5.0,
    alike_weight: float = 10.0,
    iterations: int = 10,
) -> Tensor:
    """The mask of patches as one of pixels, with the borders of the image.

    The mask is enlarged bilinearly to m; a pixel speaks for the object by u = 2 m - 1. The defaults are those of the published
    videos.

    Args:
        image: ``(3, height, width)``, 0 to 255.
        mask: ``(rows, columns)``, bool or from 0 to 1.
        near: pixels, the deviation of the Gaussian of places alone.
        near_weight: its weight.
        spatial, colour: pixels and grey levels, the deviations of the Gaussian of places and colours.
        alike_weight: its weight.
        iterations: of the mean field.

    Returns:
        How probable the object is at each pixel, ``(height, width)`` in float32; above one half it is there.

    Raises:
        ValueError: an image or a mask of another shape; deviations that are not positive.
    """
    if image.ndim != 3 or image.shape[0] != 3 or mask.ndim != 2:
        raise ValueError(
            f"expected an image (3, height, width) and a mask (rows, columns); got {tuple(image.shape)}, {tuple(mask.shape)}"
        )
    if min(near, spatial, colour) <= 0.0:
        raise ValueError(f"deviations must be positive; got near={near}, spatial={spatial}, colour={colour}")
    height, width = image.shape[1:]
    target = F.interpolate(mask[None, None].float(), (height, width), mode="bilinear", align_corners=False)
    speaks = 2.0 * target.flatten() - 1.0
    rows, columns = torch.meshgrid(*(torch.arange(n, device=image.device) for n in (height, width)), indexing="ij")
    places = torch.stack([rows, columns], -1).flatten(0, 1).float()
    colours = image.float().flatten(1).T
    kernels = [
        (near_weight, _Gaussian(places / near)),
        (alike_weight, _Gaussian(torch.cat([places / spatial, colours / colour], 1))),
    ]
    q = speaks.sigmoid()
    for _ in range(iterations):
        q = (speaks + sum(weight * kernel.filter(2.0 * q - 1.0) for weight, kernel in kernels)).sigmoid()
    return q.view(height, width)


class _Gaussian:
    """D^(-1/2) G D^(-1/2) with G_ij = exp(-|f_i - f_j|^2 / 2), of points ``(n, axes)``."""

    def __init__(self, points: Tensor) -> None:
        self.points = points - points.mean(0)
        self.roots = torch.ones(len(points), device=points.device)
        self.roots = self.filter(self.roots).rsqrt()

    def filter(self, values: Tensor) -> Tensor:
        values = self.roots * values
        found = [
            torch.cdist(part, self.points, compute_mode="donot_use_mm_for_euclid_dist").square_().mul_(-0.5).exp_() @ values
            for part in self.points.split(max(1, _PAIRS // len(self.points)))
        ]
        return self.roots * torch.cat(found)
