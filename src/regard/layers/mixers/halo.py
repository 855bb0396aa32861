"""Halo attention: softmax(q k^T / sqrt(d) + q r^T) v, a block of b x b queries sharing the (b + 2h) x (b + 2h) keys around it.

Cost: linear in tokens, (b + 2h)^2 keys per query. Source: Vaswani et al., HaloNet, arXiv:2103.12731.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ...checks import check_per_axis, checked
from ...ops import Source
from ...ops import patterns as P
from ...ops.calls.footprint import Footprint
from ...ops.tracing import fill
from ..positions import OffsetEmbedding
from .base import AttentionMixer
from .registry import register_mixer


@register_mixer("halo", tiny={"block_size": 3, "halo_size": 1})
class HaloAttention(AttentionMixer):
    """Blocked local attention with learned relative embeddings, common to all heads.

    Args:
        dim, heads: channels and attention heads.
        block_size: queries per axis that share their keys.
        halo_size: how far the keys reach beyond the block, on every side.
        stride: only every stride-th token of an axis is a query, so that the result is that much coarser (the paper's attention
            downsampling); a divisor of ``block_size``. Tables then hold offsets from a query's index in its block.
        border: ``"zero"`` lets the halo hang over the grid, where keys and values of zeros take part in the softmax with their
            relative term (the paper), ``"mask"`` clips it, ``"shift"`` moves it inward.
        relative_embedding: whether to learn a term of the logits that depends on query and offset.
        rank: number of grid axes.
        **projections: see :class:`AttentionMixer`.
    """

    @checked(halo_size=0)
    def __init__(
        self,
        dim: int,
        heads: int,
        block_size: P.Ints = 8,
        halo_size: P.Ints = 3,
        *,
        stride: int = 1,
        border: Literal["shift", "mask", "zero"] = "zero",
        relative_embedding: bool = True,
        rank: int = 2,
        **projections,
    ) -> None:
        super().__init__(dim, heads, **projections)
        self.scale = self.head_dim**-0.5 if self.scale is None else self.scale  # the embedding widens the queries
        self.pattern = P.Halo(block_size, halo_size, border, stride)
        self.block = check_per_axis("block_size", block_size, rank)
        self.halo = check_per_axis("halo_size", halo_size, rank, 0)
        spans = tuple(b + 2 * h for b, h in zip(self.block, self.halo, strict=True))
        embedding = OffsetEmbedding(self.head_dim, self.pattern, spans, rank, **self.factory) if relative_embedding else None
        self.embedding = embedding
        self.rank = rank if relative_embedding or stride > 1 else None

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: Sequence[Source]) -> Tensor:
        pattern, start, grid = self.pattern, (0,) * len(self.block), tuple(k.shape[1:-2])
        if pattern.stride > 1:
            q = q[(slice(None), *(slice(None, None, pattern.stride) for _ in self.block))]
        if self.embedding is None:
            return self.attend(q, [Source(k, v, pattern), *extra])
        if pattern.border == "zero":  # zero keys have a relative term, so they have to be real keys here
            pattern = replace(pattern, border="mask")
            start = tuple(-(-h // b) * b for b, h in zip(self.block, self.halo, strict=True))  # keeps blocks aligned
            ends = [fill(n, b) + h for n, b, h in zip(k.shape[1:-2], self.block, self.halo, strict=True)]
            widths = [n for pair in zip(reversed(start), reversed(ends), strict=True) for n in pair]
            k, v = (F.pad(t, [0, 0, 0, 0, *widths]) for t in (k, v))
        footprint = Footprint(grid, "cells", start=start)
        start = tuple(n // pattern.stride for n in start)
        q, k = self.embedding(q, k, start, self.scale)
        width = q.shape[-1] - self.head_dim
        seen = Source(k, v, pattern, footprint=footprint)
        return self.attend(q, [seen, *(replace(s, k=F.pad(s.k, [0, width])) for s in extra)], start)
