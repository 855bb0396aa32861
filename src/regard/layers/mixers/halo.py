"""Halo attention: softmax(q k^T / sqrt(d) + b) v, a block of b x b queries sharing the (b + 2h) x (b + 2h) keys around it.

Cost: linear in tokens, (b + 2h)^2 keys per query. Source: Vaswani et al., HaloNet, arXiv:2103.12731.
"""

from __future__ import annotations

from ...ops import patterns as P
from .base import PatternMixer
from .registry import register_mixer


@register_mixer("halo")
class HaloAttention(PatternMixer):
    """Blocked local attention with a learned relative bias, in place of the paper's embedding that depends on the query.

    Args:
        dim, heads: channels and attention heads.
        block_size: queries per axis that share their keys.
        halo_size: how far the keys reach beyond the block, on every side.
        border: ``"zero"`` lets the halo hang over the grid, where zero keys take part in the softmax (the paper),
            ``"mask"`` clips it, ``"shift"`` moves it inward.
        relative_bias: whether to learn a bias over offsets.
        rank: number of grid axes.
        **projections: see :class:`AttentionMixer`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        block_size: P.Ints = 8,
        halo_size: P.Ints = 3,
        *,
        border: str = "zero",
        relative_bias: bool = True,
        rank: int = 2,
        **projections,
    ) -> None:
        super().__init__(
            dim, heads, P.Halo(block_size, halo_size, border), relative_bias=relative_bias, rank=rank, **projections
        )
