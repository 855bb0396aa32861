"""The fast bilateral solver: a map that stays near a target and is smooth wherever the image is.

    min_y  lambda / 2  sum_ij W_ij (y_i - y_j)^2  +  sum_i c_i (y_i - t_i)^2
with W the bilateral affinity of pixels in place, brightness and colour, made bistochastic. It is solved for the occupied cells
of a grid in these five coordinates: pixels are added up in their cell, blurred from cell to cell by 1 2 1, and read back.
Cost: linear in pixels. Source: Barron & Poole, arXiv:1511.03296.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TO_YUV = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_LEAST_DIAGONAL, _TOLERANCE, _NORMALISATIONS = 1e-5, 1e-5, 10


class BilateralGrid:
    """The occupied cells of place, brightness and colour of an image.

    Args:
        image: ``(3, height, width)``, 0 to 255.
        spatial: pixels per cell.
        luma, chroma: grey levels per cell.

    Attributes:
        cell: ``(height * width,)``, which cell a pixel lies in.
        count: cells.
    """

    def __init__(self, image: Tensor, spatial: float, luma: float, chroma: float) -> None:
        pixels = image.double()
        y, u, v = torch.einsum("ij,jhw->ihw", pixels.new_tensor(_TO_YUV), pixels)
        rows, columns = torch.meshgrid(*(torch.arange(n, device=image.device) for n in image.shape[1:]), indexing="ij")
        parts = [rows / spatial, columns / spatial, y / luma, (u + 128) / chroma, (v + 128) / chroma]
        places = torch.stack([part.floor().long().flatten() for part in parts], 1) + 1  # so that there is a cell before
        sizes = (places.amax(0) + 2).tolist()
        steps = [1]
        for size in sizes[:0:-1]:
            steps.insert(0, steps[0] * size)
        codes = (places * places.new_tensor(steps)).sum(1)
        occupied, self.cell = codes.unique(return_inverse=True)
        self.count = len(occupied)
        self.neighbours = []  # pairs of (cells, the next cell of each along one axis)
        for step in steps:
            at = torch.searchsorted(occupied, occupied + step).clamp(max=self.count - 1)
            here = (occupied[at] == occupied + step).nonzero().squeeze(1)
            self.neighbours.append((here, at[here]))

    def splat(self, values: Tensor) -> Tensor:
        """The sums of pixels ``(pixels,)`` over each cell, ``(count,)``."""
        return values.new_zeros(self.count).index_add_(0, self.cell, values)

    def slice(self, values: Tensor) -> Tensor:
        """The value of its cell for each pixel."""
        return values[self.cell]

    def blur(self, values: Tensor) -> Tensor:
        """The sum over the axes of 1 2 1, along each of them, of values ``(count,)``; empty cells count as zero."""
        total = 2 * len(self.neighbours) * values
        for here, after in self.neighbours:
            total = total.index_add(0, here, values[after]).index_add(0, after, values[here])
        return total

    def bistochastic(self) -> tuple[Tensor, Tensor]:
        """Factors n and masses m such that the rows of diag(n) blur diag(n) sum to m."""
        mass = self.splat(torch.ones(len(self.cell), dtype=torch.float64, device=self.cell.device))
        factor = torch.ones_like(mass)
        for _ in range(_NORMALISATIONS):
            factor = (factor * mass / self.blur(factor)).sqrt()
        return factor, factor * self.blur(factor)  # exact for these factors, however far they have converged


def bilateral_solver(
    image: Tensor,
    target: Tensor,
    confidence: float | Tensor = 0.999,
    *,
    spatial: float = 24.0,
    luma: float = 4.0,
    chroma: float = 4.0,
    smoothness: float = 256.0,
    iterations: int = 25,
) -> Tensor:
    """Smooth a map along an image.

    Args:
        image: ``(3, height, width)``, 0 to 255.
        target: ``(height, width)``.
        confidence: in the target, one number or ``(height, width)``, positive.
        spatial, luma, chroma: see :class:`BilateralGrid`.
        smoothness: lambda.
        iterations: of conjugate gradients at most.

    Returns:
        ``(height, width)`` in float64.

    Raises:
        ValueError: an image or a target of another shape.
    """
    if image.ndim != 3 or image.shape[0] != 3 or target.shape != image.shape[1:]:
        raise ValueError(
            f"expected an image (3, height, width) and a target of its size; got {tuple(image.shape)}, {tuple(target.shape)}"
        )
    grid = BilateralGrid(image, spatial, luma, chroma)
    factor, mass = grid.bistochastic()
    goal = target.double().flatten()
    trust = torch.as_tensor(confidence, dtype=torch.float64, device=goal.device).expand(target.shape).flatten()
    weight, wanted = grid.splat(trust), grid.splat(trust * goal)

    def apply(y: Tensor) -> Tensor:
        return smoothness * (mass * y - factor * grid.blur(factor * y)) + weight * y

    own = 2 * len(grid.neighbours)
    diagonal = (smoothness * (mass - own * factor.square()) + weight).clamp(min=_LEAST_DIAGONAL)
    y = wanted / weight
    rest = wanted - apply(y)
    step = direction = rest / diagonal
    size = rest @ step
    for _ in range(iterations):
        if rest.norm() <= _TOLERANCE * wanted.norm():
            break
        moved = apply(direction)
        length = size / (direction @ moved)
        y, rest = y + length * direction, rest - length * moved
        step = rest / diagonal
        size, before = rest @ step, size
        direction = step + size / before * direction
    return grid.slice(y).view(target.shape)
