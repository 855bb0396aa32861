"""Multi-head attention: softmax(q k^T / sqrt(d) + b) v over all tokens.

Cost: quadratic in tokens. Source: Vaswani et al., arXiv:1706.03762; Dosovitskiy et al., ViT, arXiv:2010.11929.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...checks import checked
from ...ops import patterns as P
from .base import PatternMixer
from .registry import register_mixer


@register_mixer("multi_head", label="dense", tiny={"grid": (6, 7)})
class MultiHeadAttention(PatternMixer):
    """Attention of every token to every token.

    Args:
        dim, heads: channels and attention heads.
        grid: the largest grid, to learn a relative bias over its offsets; None for no bias.
        **projections: see :class:`AttentionMixer`.
    """

    @checked()
    def __init__(self, dim: int, heads: int, *, grid: Sequence[int] | None = None, **projections) -> None:
        relative = grid is not None
        super().__init__(dim, heads, P.Dense(), relative_bias=relative, rank=len(grid or ()), grid=grid, **projections)
