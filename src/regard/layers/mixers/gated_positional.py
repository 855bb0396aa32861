"""Gated positional self-attention: content and position each attend, and every head learns how much it trusts which.

    y = (1 - s) softmax(q k^T / sqrt(d)) v + s softmax(w . [offset, |offset|^2]) v,   s = sigmoid(gate of the head)
Cost: quadratic in tokens, twice. Source: d'Ascoli et al., ConViT, arXiv:2103.10697.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import checked
from ...ops import Source
from ...ops.calls.source import HeadTable
from ...ops.patterns import Dense, grid_positions
from ..linear import is_plain, linear, linear_part, taken_by
from .base import AttentionMixer
from .registry import register_mixer


@register_mixer("gated_positional")
class GatedPositionalAttention(AttentionMixer):
    """Attention that starts as a convolution and may learn to look elsewhere.

    The position logits of a head are a quadratic form of the offset (key minus query); ``initialise`` makes them
    ``-strength |offset - centre|^2`` with the centres of the heads on a square of ``floor(sqrt(heads))`` tokens a side around
    the query. Heads beyond a full square get no centre. Extra tokens have no place: content alone weighs them.

    Args:
        dim, heads: channels and attention heads.
        strength: how sharply a head attends to its centre at the start.
        rank: number of grid axes.
        qkv_bias: whether queries, keys and values have a bias.
        **projections: see :class:`AttentionMixer`.

    Raises:
        ValueError: keys on another grid than the queries; a grid of another rank.
    """

    @checked()
    def __init__(
        self, dim: int, heads: int, *, strength: float = 1.0, rank: int = 2, qkv_bias: bool = False, **projections
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias, **projections)
        self.strength = strength
        self.rank: int = rank
        factory = self.factory
        self.position = nn.Linear(rank + 1, heads, **factory)  # of the offsets, last axis first, and their squared length
        self.gate = nn.Parameter(torch.ones(heads, **factory))
        self.initialise()

    def add_projections(self, bias: bool, factory: dict[str, Any]) -> None:
        self.qk = nn.Linear(self.dim, sum(self.widths[:2]), bias=bias, **factory)
        self.v = nn.Linear(self.dim, self.widths[2], bias=bias, **factory)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cut, total = self.widths[0], sum(self.widths[:2])
        if context is x:
            q, k = linear(self.qk, x).split(self.widths[:2], -1)
        else:
            q, k = linear_part(self.qk, x, 0, cut), linear_part(self.qk, context, cut, total)
        return (
            q.unflatten(-1, (self.heads, self.head_dim)),
            k.unflatten(-1, (self.kv_heads, self.head_dim)),
            linear(self.v, context).unflatten(-1, (self.kv_heads, self.value_dim)),
        )

    def initialise(self) -> None:
        """Values as the input, and each head at its centre."""
        with torch.no_grad():
            nn.init.eye_(self.v.weight)
            side = round_down_root(self.heads, self.rank)
            for head in range(side**self.rank):
                centre = [head // side**axis % side - (side - 1) / 2 for axis in range(self.rank)]
                weights = [*(2 * c for c in reversed(centre)), -1.0]
                self.position.weight[head] = self.strength * torch.tensor(weights).to(self.position.weight)
            nn.init.zeros_(self.position.bias)

    def position_table(self, grid: Sequence[int]) -> Tensor:
        """The position logits of all offsets between tokens of a grid: ``(heads, 2 rows - 1, 2 columns - 1)``."""
        spans = [2 * n - 1 for n in grid]
        layer = self.position
        device, dtype = taken_by(layer)
        kind = torch.promote_types(dtype, torch.float32)
        offsets = grid_positions(spans, [1 - n for n in grid], device).to(kind)
        features = torch.cat([offsets.flip(-1), offsets.square().sum(-1, keepdim=True)], -1)
        if is_plain(layer):  # in full precision, whatever that of the weights
            logits = (layer.weight[:, None].to(kind) * features).sum(-1) + layer.bias[:, None].to(kind)
        else:
            logits = layer(features.to(dtype)).to(kind).T
        return logits.unflatten(1, spans)

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: Sequence[Source]) -> Tensor:
        grid = tuple(q.shape[1:-2])
        if len(grid) != self.rank or tuple(k.shape[1:-2]) != grid:
            raise ValueError(f"positions are those of one grid of {self.rank} axes; got {grid} and {tuple(k.shape[1:-2])}")
        content = self.attend(q, [Source(k, v, Dense()), *extra])
        bias = HeadTable(self.position_table(grid), Dense())
        nothing_q, nothing_k = q.new_zeros(*q.shape[:-1], 1), k.new_zeros(*k.shape[:-1], 1)
        position = self.attend(nothing_q, [Source(nothing_k, v, Dense(), bias=bias)])
        trust = self.gate.sigmoid().unsqueeze(-1).to(content.dtype)
        return content + trust * (position - content)


def round_down_root(n: int, rank: int) -> int:
    """The largest integer whose ``rank``-th power is at most ``n``."""
    side = 1
    while (side + 1) ** rank <= n:
        side += 1
    return side
