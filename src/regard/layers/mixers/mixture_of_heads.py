"""Mixture of heads: every token weighs the outputs of its heads, some always, of the others only the k best.

    y = W_o concat_i g_i o_i,   a = 2 softmax(W_a x);  the gates of equal logits are all 1
    s shared heads: g = a_1 s softmax(W_s x);  routed heads: g = a_2 k softmax(W_r x) over the k largest, else 0
Cost: that of all heads (a head's keys and values serve whichever tokens choose it) and one linear layer. Source: Jin et al.,
MoH, arXiv:2410.11842.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.mixture import Mixture, balance_loss, mixture
from .base import check_choice
from .multi_head import MultiHeadAttention
from .registry import register_mixer


@register_mixer("mixture_of_heads")
class MixtureOfHeadsAttention(MultiHeadAttention):
    """Attention of every token to every token, whose first ``shared`` heads are always on and ``routed`` of the others.

    Args:
        dim, heads: channels and attention heads.
        shared: heads that all tokens use; half of them by default.
        routed: heads that each token chooses among the others; a quarter of all by default, at least one.
        router: ``"linear"`` learns to choose. ``"query_norm"`` has no parameters: it chooses the heads with the longest
            queries, which stay as they are, and passes gradients straight through to the lengths (the continued training of
            language models).
        **projections: see :class:`MultiHeadAttention`.

    Attributes:
        losses: a list that a training step adds its load balance loss to; None for none, see :func:`collect_balance`.

    Raises:
        ValueError: numbers of heads that leave some unused, or more than there are; query norms of a single routed head.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        shared: int | None = None,
        routed: int | None = None,
        *,
        router: str = "linear",
        **projections,
    ) -> None:
        super().__init__(dim, heads, **projections)
        self.shared = heads // 2 if shared is None else shared
        others = heads - self.shared
        self.routed = min(others, max(1, heads // 4)) if routed is None else routed
        if not 0 <= self.shared <= heads or not min(1, others) <= self.routed <= others:
            raise ValueError(
                f"of {heads} heads 0 to {heads} may be shared, and 1 to all of the others routed; "
                f"got shared={self.shared}, routed={self.routed}"
            )
        self.kind = check_choice("router", router, ("linear", "query_norm"))
        if self.kind == "query_norm" and others == 1:
            raise ValueError("a single routed head has no other whose query norm to compare with")
        self.losses: list[Tensor] | None = None
        self.choices: list[Mixture] = []  # of the tokens of the grid and of those outside it, while losses are collected
        learned = self.kind == "linear"

        def logits_of(count: int, needed: bool) -> nn.Linear | None:
            return nn.Linear(dim, count, bias=False, **self.factory) if learned and needed else None

        self.router = logits_of(others, others > 0)
        self.shared_router = logits_of(self.shared, self.shared > 1)
        self.balance = logits_of(2, self.shared > 0 and others > 0)

    def route(self, x: Tensor, q: Tensor) -> Mixture | None:
        """The choice among the routed heads, for tokens ``(..., dim)`` with queries ``(..., heads, head_dim)``."""
        if self.shared == self.heads:
            return None
        if self.router is not None:
            return mixture(self.router(x), self.routed, total=self.routed)
        lengths = q[..., self.shared :, :].norm(dim=-1)
        spread = lengths.std(-1, keepdim=True).clamp(min=torch.finfo(lengths.dtype).eps)
        choice = mixture(lengths / spread, self.routed)
        soft = choice.probabilities.to(q.dtype)
        return choice._replace(gates=choice.chosen.to(q.dtype) + (soft - soft.detach()))

    def gates(self, x: Tensor, choice: Mixture | None) -> Tensor:
        """The factors on the heads' outputs, ``(..., heads)``: shared heads first."""
        shared = x.new_ones(*x.shape[:-1], self.shared)
        if self.shared_router is not None:
            shared = self.shared * self.shared_router(x).softmax(-1)
        if choice is None:
            return shared
        routed = choice.gates
        if self.balance is not None:
            first, second = (2 * self.balance(x).softmax(-1)).split(1, -1)
            shared, routed = first * shared, second * routed
        return torch.cat([shared.to(routed.dtype), routed], -1)

    def weigh_heads(self, y: Tensor, x: Tensor, q: Tensor) -> Tensor:
        choice = self.route(x, q)
        if choice is not None and self.losses is not None:
            self.choices.append(choice)
        return y * self.gates(x, choice).unsqueeze(-1).to(y.dtype)

    def forward(self, x: Tensor, extra: Tensor | None = None, *, context: Tensor | None = None) -> Any:
        y = super().forward(x, extra, context=context)
        if self.choices:
            parts = [torch.cat([t.flatten(0, -2) for t in each]) for each in zip(*[c[1:] for c in self.choices], strict=True)]
            self.choices.clear()
            if self.losses is not None and self.training:
                self.losses.append(balance_loss(*parts))
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shared={self.shared}, routed={self.routed}, router={self.kind!r}"


@contextmanager
def collect_balance(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, each mixture of heads of the model adds its load balance loss to the list, in training mode.

        with collect_balance(model) as losses:
            loss = criterion(model(images), labels)
            (loss + 0.01 * torch.stack(losses).mean()).backward()

    A loss is ``routed`` where heads are chosen evenly, see :func:`regard.ops.mixture.balance_loss`; the weight 0.01 is
    the published one. The backward pass belongs inside too where blocks are recomputed in it.
    """
    losses: list[Tensor] = []
    mixers = [module for module in model.modules() if isinstance(module, MixtureOfHeadsAttention)]
    for mixer in mixers:
        mixer.losses = losses
    try:
        yield losses
    finally:
        for mixer in mixers:
            mixer.losses = None
