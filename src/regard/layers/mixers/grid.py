"""Grid attention: softmax(q k^T / sqrt(d) + b) v over G x G tokens spread evenly over the whole grid.

Cost: linear in tokens, G^2 keys per query. Source: Tu et al., MaxViT, arXiv:2204.01697.
"""

from __future__ import annotations

from ...checks import checked
from ...ops import patterns as P
from .base import PatternMixer
from .registry import register_mixer


@register_mixer("grid", tiny={"grid_size": 3})
class GridAttention(PatternMixer):
    """Attention over a dilated global grid, with a learned bias over offsets counted in its steps.

    Args:
        dim, heads: channels and attention heads.
        grid_size: tokens per axis that see each other.
        relative_bias: whether to learn a bias over offsets.
        rank: number of grid axes.
        **projections: see :class:`AttentionMixer`.
    """

    @checked()
    def __init__(
        self, dim: int, heads: int, grid_size: P.Ints = 7, *, relative_bias: bool = True, rank: int = 2, **projections
    ) -> None:
        super().__init__(dim, heads, P.Grid(grid_size), relative_bias=relative_bias, rank=rank, **projections)
