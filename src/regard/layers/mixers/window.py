"""Window attention: softmax(q k^T / sqrt(d) + b) v inside windows of M x M tokens, shifted in every other block.

Cost: linear in tokens, M^2 keys per query. Source: Liu et al., Swin Transformer, arXiv:2103.14030.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...ops import Source
from ...ops import patterns as P
from ..positions import OffsetBias
from .base import AttentionMixer
from .registry import register_mixer


@register_mixer("window")
class WindowAttention(AttentionMixer):
    """Attention inside (shifted) windows with a learned relative bias.

    Args:
        dim, heads: channels and attention heads.
        window_size: tokens per axis, a number or one per axis.
        shift: how far the windows are moved.
        relative_bias: whether to learn a bias over offsets.
        pad: where the grid does not divide into windows, ``"mask"`` clips the last windows and ``"token"`` pads the input
            with zeros, whose projections take part in the softmax (the official dense-task version).
        rank: number of grid axes.
        **projections: see :class:`AttentionMixer`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window_size: P.Ints = 7,
        shift: P.Ints = 0,
        *,
        relative_bias: bool = True,
        pad: str = "mask",
        rank: int = 2,
        **projections,
    ) -> None:
        super().__init__(dim, heads, **projections)
        if pad not in ("mask", "token"):
            raise ValueError(f"pad must be 'mask' or 'token'; got {pad!r}")
        self.pattern = P.Window(window_size, shift)
        self.pad = pad
        factory = {"device": self.qkv.weight.device, "dtype": self.qkv.weight.dtype}
        self.bias = OffsetBias(heads, self.pattern, rank, **factory) if relative_bias else None

    def padding(self, grid: Sequence[int]) -> Sequence[int]:
        if self.pad == "mask":
            return (0,) * len(grid)
        size = self.pattern.size
        return [-n % (size[axis] if isinstance(size, tuple) else size) for axis, n in enumerate(grid)]

    def sources(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Source]:
        return [Source(k, v, self.pattern, bias=self.bias)]
