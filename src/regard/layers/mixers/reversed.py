"""Reversed attention: every token sends its value to the others, as much of it as it cares to, by the head it chooses.

    y_r = W_o concat_h sum_s A_h[s, r] P_h[s] M[s] v_h[s],   A_h[s] = softmax over receivers r of q_s k_r / sqrt(d)
    P[s] = softmax over heads of W_p x_s / t,   M[s] = product over this layer and all before of sigmoid(MLP(x_s))

What a token sends sums to M, over all heads and receivers; what it receives is not bounded.
Cost: two attentions, of all tokens to all. Source: Ding et al., DependencyViT, arXiv:2304.03282.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import checked
from ...ops import Source
from ...ops import patterns as P
from ...ops.attention.transposed import attend_transposed
from ...ops.attention.weights import attend_weights
from ...ops.calls.heads import repeat_heads
from ..linear import linear
from ..mlps import MLP
from .base import AttentionMixer
from .registry import register_mixer


class Sent(NamedTuple):
    """What one layer of reversed attention gives."""

    y: Tensor
    """``(batch, n, dim)``: the message that each token received."""
    messages: Tensor
    """``(batch, n)``: the logarithm of the rest of each token's message after this layer; it never grows."""
    dependencies: Tensor | None
    """``(batch, senders, receivers)``: how much each token sends to each, without gradient; rows sum to the message."""


@register_mixer("reversed", unseen=("hidden",))
class ReversedAttention(AttentionMixer):
    """Attention that sends instead of gathering, all tokens to all, those outside the grid like the others.

    A head stands for a kind of relation, and with a small temperature a token has about one. In a stack, :meth:`send` hands
    the messages on from layer to layer, so that a token that fell silent stays so; called on its own, a layer starts anew.

    Args:
        dim, heads: channels and attention heads.
        temperature: divides the logits of the heads.
        hidden: channels between the two layers that control the message, ``dim // 2`` by default.
        **projections: see :class:`AttentionMixer`. With ``context``, its tokens send and those of ``x`` receive.

    Attributes:
        maps: a list that the dependencies of each :meth:`send` go to; None otherwise.

    Raises:
        ValueError: a temperature that is not positive.
    """

    @checked()
    def __init__(self, dim: int, heads: int, *, temperature: float = 0.1, hidden: int | None = None, **projections) -> None:
        super().__init__(dim, heads, **projections)
        if not temperature > 0.0:
            raise ValueError(f"temperature must be positive; got {temperature}")
        self.temperature = temperature
        self.selector = nn.Linear(dim, heads, bias=False, **self.factory)
        self.controller = MLP(dim, hidden or max(1, dim // 2), 1, bias=False, **self.factory)
        self.maps: list[Tensor] | None = None

    def message(self, x: Tensor) -> Tensor:
        """The logarithm of the share of its value that each token ``(batch, *n, dim)`` sends in this layer, ``(batch, *n)``."""
        logits = self.controller(x).squeeze(-1)
        return F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def relations(self, x: Tensor) -> Tensor:
        """The share of each head in what each token ``(batch, *n, dim)`` sends, ``(batch, *n, heads)``."""
        logits = linear(self.selector, x)
        return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature).softmax(-1)

    def gates(self, x: Tensor, messages: Tensor) -> Tensor:
        """The factors on the values of the senders, ``(batch, *n, heads)``."""
        return self.relations(x) * messages.exp().unsqueeze(-1)

    def distribute(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        """Send the values, times the gates, and project what arrives: ``(batch, *receivers, dim)``."""
        dropout = self.attn_drop if self.training else 0.0
        v = v * gates.unsqueeze(-1).to(v.dtype)
        y = attend_transposed(q, k, v, P.Dense(), scale=self.scale, dropout=dropout, backend=self.backend)
        return self.proj_drop(linear(self.proj, y.flatten(-2)))

    def send(self, x: Tensor, messages: Tensor | None = None, *, need_dependencies: bool = False) -> Sent:
        """One layer of a stack.

        Args:
            x: tokens ``(batch, n, dim)``.
            messages: those of the layer before; none before the first.
            need_dependencies: whether the matrix of dependencies is wanted.
        """
        self.check_tokens(x)
        messages = self.message(x) if messages is None else messages + self.message(x)
        q, k, v = self.sequences(x)
        gates = self.gates(x, messages)
        dependencies = None
        if need_dependencies or self.maps is not None:
            with torch.no_grad():
                (weights,) = attend_weights(q, [Source(k, v, P.Dense())], scale=self.scale)
                dependencies = torch.einsum("bhsr,bsh->bsr", weights, gates.to(weights.dtype))
            if self.maps is not None:
                self.maps.append(dependencies)
        return Sent(self.distribute(q, k, v, gates), messages, dependencies)

    def sequences(self, x: Tensor, extra: Tensor | None = None) -> list[Tensor]:
        """Queries, keys and values ``(batch, *grid, heads, width)`` of tokens; with those beside the grid all in one row."""
        q, k, v = self.project(x, x)
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        if extra is not None:
            parts = zip((q, k, v), self.project(extra, extra), strict=True)
            q, k, v = (torch.cat([inner.flatten(1, -3), outer], 1) for inner, outer in parts)
        return [q, repeat_heads(k, self.heads), repeat_heads(v, self.heads)]

    def forward(self, x: Tensor, extra: Tensor | None = None, *, context: Tensor | None = None) -> Any:
        self.check_tokens(x, extra, context)
        q, k, v = self.sequences(x, extra)
        if context is not None:
            q, _, v = self.sequences(context, extra)
        senders = x if context is None else context
        senders = senders if extra is None else torch.cat([senders.flatten(1, -2), extra], 1)
        y = self.distribute(q, k, v, self.gates(senders, self.message(senders)))
        if extra is None:
            return y
        grid = x.shape[1:-1]
        return y[:, : grid.numel()].unflatten(1, grid), y[:, grid.numel() :]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature:g}"
