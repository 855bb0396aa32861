"""Axial attention: sum over axes a of softmax(q k_a^T / sqrt(d)) v_a, the keys being the tokens on the query's line along a.

Every axis has a softmax of its own: with one joint softmax it would be criss-cross attention.
Cost: tokens times the sum of the axis lengths. Source: Ho et al., Axial Transformer, arXiv:1912.12180.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...ops import Source
from ...ops import patterns as P
from .base import AttentionMixer
from .registry import register_mixer


@register_mixer("axial")
class AxialAttention(AttentionMixer):
    """Attention along axes, one softmax an axis, on common projections.

    The paper stacks layers of one axis each: give ``axes=(0,)`` and ``axes=(1,)`` in turn. With several axes their outputs are
    summed, so that a single layer looks along all of them. ``extra`` tokens are seen in the softmax of every axis.

    Args:
        dim, heads: channels and attention heads.
        axes: the axes to look along, all of the grid by default.
        **projections: see :class:`AttentionMixer`.
    """

    def __init__(self, dim: int, heads: int, axes: Sequence[int] | None = None, **projections) -> None:
        super().__init__(dim, heads, **projections)
        if axes is not None and (not axes or len(set(axes)) != len(axes)):
            raise ValueError(f"axes must be distinct, at least one; got {axes}")
        self.axes = None if axes is None else tuple(axes)

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: Sequence[Source]) -> Tensor:
        first, *rest = range(x.ndim - 2) if self.axes is None else self.axes
        y = self.attend(q, [Source(k, v, P.Axis(first)), *extra])
        for axis in rest:
            y = y + self.attend(q, [Source(k, v, P.Axis(axis)), *extra])
        return y
