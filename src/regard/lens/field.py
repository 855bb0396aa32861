"""The effective receptive field: how much each pixel of the input moves a unit of a feature map.

    F[pixel] = mean over images of sum over input channels of |d (sum over channels of y[unit]) / d x[pixel]|

Cost: a forward and a backward pass per image. Source: Luo et al., arXiv:1701.04128; Ding et al., RepLKNet, arXiv:2203.06717
(the side of the square that holds a share of it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """A receptive field.

    Attributes:
        map: ``(height, width)``, sums to one.
        centre: the pixel in whose cell the unit lies, at its middle.
    """

    map: Tensor
    centre: tuple[float, float]

    def share(self, side: int) -> float:
        """How much lies within ``side // 2`` pixels of the centre pixel on both axes, of an odd side."""
        if side < 1 or side % 2 == 0:
            raise ValueError(f"side must be odd and at least 1; got {side}")
        cut = []
        for at, length in zip(self.centre, self.map.shape, strict=True):
            middle = min(int(at), length - 1)
            cut.append(slice(max(middle - side // 2, 0), middle + side // 2 + 1))
        return float(self.map[tuple(cut)].sum())

    def side(self, share: float) -> int:
        """The smallest odd side of a square around the centre that holds this share."""
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must be in (0, 1]; got {share}")
        sides = range(1, 2 * max(self.map.shape), 2)
        return next((side for side in sides if self.share(side) >= share - 1e-9), sides[-1])

    @property
    def spread(self) -> tuple[float, float]:
        """Standard deviation around the centre on each axis, in pixels."""
        found = []
        for axis, (at, length) in enumerate(zip(self.centre, self.map.shape, strict=True)):
            away = torch.arange(length, dtype=self.map.dtype, device=self.map.device) + 0.5 - at
            found.append(float((self.map.sum(1 - axis) * away.square()).sum().sqrt()))
        return found[0], found[1]


def receptive_field(
    features: Callable[[Tensor], Tensor | Sequence[Tensor]],
    images: Tensor,
    unit: Sequence[int] | None = None,
    *,
    output: int = -1,
) -> ReceptiveField:
    """The effective receptive field of a unit of a feature map.

    Args:
        features: images to a map ``(batch, channels, rows, columns)``, or to several; such as a model with ``features_only``,
            or ``lambda x: model.get_intermediate_layers(x, [2], reshape=True)``. Put it in evaluation mode first.
        images: ``(batch, channels, height, width)``; the more, and the more like those it was trained on, the better.
        unit: row and column on the map, its middle by default.
        output: which of several maps.

    Raises:
        ValueError: something else than maps; a unit outside; an output that no pixel moves.
    """
    total = torch.zeros(images.shape[-2:], dtype=torch.float64, device=images.device)
    where: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()
    for image in images.split(1):
        with torch.enable_grad():
            image = image.detach().requires_grad_()
            found = features(image)
            found = found if isinstance(found, Tensor) else found[output]
            if found.ndim != 4:
                raise ValueError(f"expected a feature map (batch, channels, rows, columns); got {tuple(found.shape)}")
            grid = tuple(found.shape[-2:])
            where = tuple(n // 2 for n in grid) if unit is None else tuple(unit)
            if len(where) != 2 or not all(0 <= x < n for x, n in zip(where, grid, strict=True)):
                raise ValueError(f"unit must be a row and a column of the map {grid}; got {unit}")
            (gradient,) = torch.autograd.grad(found[0, :, where[0], where[1]].sum(), image)
        total += gradient[0].abs().sum(0).double()
    mass = total.sum()
    if not mass > 0:
        raise ValueError("no pixel moves this unit: its gradient is 0 everywhere")
    height, width = ((x + 0.5) * side / n for x, side, n in zip(where, images.shape[-2:], grid, strict=True))
    return ReceptiveField(total / mass, (height, width))
