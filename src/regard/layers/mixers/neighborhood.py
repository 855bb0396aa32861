"""Neighborhood attention: softmax(q k^T / sqrt(d) + b) v over the k nearest keys of each query on the grid.

Cost: linear in tokens, kernel volume keys per query. Source: Hassani et al., NAT arXiv:2204.07143, DiNAT arXiv:2209.15001.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ...checks import check_per_axis, checked
from ...ops import patterns as P
from .base import PatternMixer
from .registry import register_mixer


@register_mixer("neighborhood", tiny={"kernel_size": 3})
class NeighborhoodAttention(PatternMixer):
    """Attention to the nearest tokens, optionally dilated, strided and causal, with a learned relative bias.

    Args:
        dim, heads: channels and attention heads.
        kernel_size, dilation, stride, causal, border: see :class:`regard.patterns.Neighborhood`.
        relative_bias: whether to learn a bias over offsets, counted in steps of the dilated group.
        pad: on an axis shorter than ``kernel_size * dilation``, ``"mask"`` sees the tokens that exist and ``"token"`` pads the
            input with zeros up to it, whose projections take part in the softmax (the published NAT and DiNAT).
        rank: number of grid axes.
        **projections: see :class:`AttentionMixer`.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        heads: int,
        kernel_size: P.Ints = 7,
        dilation: P.Ints = 1,
        stride: P.Ints = 1,
        causal: bool | tuple[bool, ...] = False,
        *,
        border: Literal["shift", "mask", "zero"] = "shift",
        relative_bias: bool = True,
        pad: Literal["mask", "token"] = "mask",
        rank: int = 2,
        **projections,
    ) -> None:
        super().__init__(
            dim,
            heads,
            P.Neighborhood(kernel_size, dilation, stride, causal, border),
            relative_bias=relative_bias,
            rank=rank,
            **projections,
        )
        self.kernel_size, self.dilation = kernel_size, dilation
        self.pad = pad

    def padding(self, grid: Sequence[int]) -> Sequence[int]:
        if self.pad == "mask":
            return (0,) * len(grid)
        kernels = check_per_axis("kernel_size", self.kernel_size, len(grid))
        dilations = check_per_axis("dilation", self.dilation, len(grid))
        return [max(kernel * dilation - n, 0) for n, kernel, dilation in zip(grid, kernels, dilations, strict=True)]
