"""Locally enhanced attention: W_o (softmax(q k^T / sqrt(d)) v + DW(x)) over all tokens.

Cost: quadratic in tokens. Source: Zhu et al., BiFormer (last stage), arXiv:2303.08810.
"""

from __future__ import annotations

from torch import Tensor

from ...checks import checked
from ..positions import ValueConv
from .multi_head import MultiHeadAttention
from .registry import register_mixer


@register_mixer("locally_enhanced")
class LocallyEnhancedAttention(MultiHeadAttention):
    """Dense attention plus a depthwise convolution of the mixer's input, not of the values.

    Args:
        dim, heads: channels and attention heads.
        kernel_size: of the convolution.
        rank: number of grid axes.
        qkv_bias: whether queries, keys and values have a bias.
        **projections: see :class:`MultiHeadAttention`.

    Raises:
        ValueError: heads that are not ``dim`` wide together; a kernel below 1; a grid of another rank.
    """

    @checked()
    def __init__(
        self, dim: int, heads: int = 8, kernel_size: int = 5, *, rank: int = 2, qkv_bias: bool = False, **projections
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias, **projections)
        if self.heads * self.value_dim != dim:
            raise ValueError(f"the heads must be dim={dim} wide together; got {self.heads} heads of {self.value_dim}")
        self.rank = rank
        self.lepe = ValueConv(dim, kernel_size, rank, **self.factory)

    def finish(self, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return y + self.lepe(x)
