"""Axial attention: sum over axes a of softmax(q k_a^T / sqrt(d)) v_a, the keys being the tokens on the query's line along a.

Every axis has a softmax of its own: with one joint softmax it would be criss-cross attention.
Cost: tokens times the sum of the axis lengths. Source: Ho et al., Axial Transformer, arXiv:1912.12180.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import LARGEST, checked
from ...ops import Source
from ...ops import patterns as P
from ...ops.patterns import grid_positions
from ..linear import linear
from .base import AttentionMixer
from .registry import register_mixer


@register_mixer("axial", unseen=("axes",))
class AxialAttention(AttentionMixer):
    """Attention along axes, one softmax an axis, on common projections.

    The paper stacks layers of one axis each: give ``axes=(0,)`` and ``axes=(1,)`` in turn. With several axes their outputs are
    summed, so that a single layer looks along all of them. ``extra`` tokens are seen in the softmax of every axis.

    Args:
        dim, heads: channels and attention heads.
        axes: the axes to look along, all of the grid by default.
        causal: whether a token sees only itself and what precedes it on the axis.
        **projections: see :class:`AttentionMixer`.
    """

    @checked(axes=-LARGEST)
    def __init__(self, dim: int, heads: int, axes: Sequence[int] | None = None, *, causal: bool = False, **projections) -> None:
        super().__init__(dim, heads, **projections)
        if axes is not None and (not axes or len(set(axes)) != len(axes)):
            raise ValueError(f"axes must be distinct, at least one; got {axes}")
        self.axes = None if axes is None else tuple(axes)
        self.causal = causal

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: Sequence[Source]) -> Tensor:
        first, *rest = range(x.ndim - 2) if self.axes is None else self.axes
        y = self.attend(q, [Source(k, v, P.Axis(first, self.causal)), *extra])
        for axis in rest:
            y = y + self.attend(q, [Source(k, v, P.Axis(axis, self.causal)), *extra])
        return y

    def extend(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        """Mix the next tokens of a causal layer's axis, with the keys and values of those before in ``cache``.

        Args:
            x: ``(batch, *grid, dim)``, the next tokens on the axis.
            cache: empty at the start of the axis; what comes is appended to it.
        """
        if not self.causal or self.axes is None or len(self.axes) > 1:
            raise ValueError(f"only a causal layer of one axis can be continued; got causal={self.causal}, axes={self.axes}")
        axis = self.axes[0] % (x.ndim - 2)
        q, k, v = self.project(x, x)
        start = [0] * (x.ndim - 2)
        start[axis] = cache[0].shape[1 + axis] if cache else 0
        if self.rope is not None:
            positions = grid_positions(x.shape[1:-1], start, x.device).reshape(*x.shape[1:-1], -1)
            q, k = self.rope(q, positions), self.rope(k, positions)
        if cache:
            k, v = (torch.cat(pair, 1 + axis) for pair in zip(cache, (k, v), strict=True))
        cache[:] = k, v
        y = self.attend(q, [Source(k, v, P.Axis(axis, causal=True))], start)
        return self.proj_drop(linear(self.proj, y.flatten(-2)))
