"""Mixture of heads: every token weighs the outputs of its heads, some always, of the others only the k best.

    y = W_o concat_i g_i o_i,   a = 2 softmax(W_a x);  the gates of equal logits are all 1
    s shared heads: g = a_1 s softmax(W_s x);  routed heads: g = a_2 k softmax(W_r x) over the k largest, else 0
Cost: that of all heads and one linear layer; at inference, where it pays, routed heads attend for the tokens that chose them
alone (their keys and values serve whichever tokens do). Source: Jin et al., MoH, arXiv:2410.11842.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...checks import check_choice, checked
from ...ops import Source
from ...ops.calls.observe import OBSERVERS
from ...ops.mixture import Mixture, balance_loss, chosen_attend, mixture
from ..linear import linear
from .aggregated import AggregatedAttention, CosineAttention
from .base import AttentionMixer
from .multi_head import MultiHeadAttention
from .registry import register_mixer

WORTHWHILE = 10_000_000
"""Multiply-adds of a head's logits that must be left out, and half of them at least, for gathering to pay.

Measured on a CPU, one thread, float32, whole mixers against themselves with all heads: 1024 tokens that choose one head of four
are 1.5 times as fast, half of the heads 1.07; 576 tokens and half of the heads 1.1; two heads of three 0.9; 256 and 196
tokens 0.9 to 1.05. Nothing is gathered there, nor in aggregated attention, whose tokens see 58 keys.
"""


class HeadMixture(AttentionMixer):
    """What is added to an attention to make its heads a mixture: routers, gates and the load balance loss.

    Args:
        dim, heads: channels and attention heads.
        shared: heads that all tokens use; half of them by default.
        routed: heads that each token chooses among the others; a quarter of all by default, at least one.
        router: ``"linear"`` learns to choose. ``"query_norm"`` has no parameters: it chooses the heads with the longest
            queries, which stay as they are, and passes gradients straight through to the lengths (the continued training of
            language models).
        **attention: see the attention.

    Attributes:
        losses: a list that a training step adds its load balance loss to; None for none, see :func:`collect_balance`.

    Raises:
        ValueError: numbers of heads that leave some unused, or more than there are; query norms of a single routed head, or
            where all queries have one length.
    """

    unit_queries: ClassVar[bool] = False

    @checked(shared=0, routed=0)
    def __init__(
        self,
        dim: int,
        heads: int,
        shared: int | None = None,
        routed: int | None = None,
        *,
        router: Literal["linear", "query_norm"] = "linear",
        **attention,
    ) -> None:
        super().__init__(dim, heads, **attention)
        self.shared = heads // 2 if shared is None else shared
        others = heads - self.shared
        self.routed = min(others, max(1, heads // 4)) if routed is None else routed
        if not 0 <= self.shared <= heads or not min(1, others) <= self.routed <= others:
            raise ValueError(
                f"of {heads} heads 0 to {heads} may be shared, and 1 to all of the others routed; "
                f"got shared={self.shared}, routed={self.routed}"
            )
        self.kind = check_choice("router", router, ("linear",)) if self.unit_queries else router
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
            return mixture(linear(self.router, x), self.routed, total=self.routed)
        lengths = q[..., self.shared :, :].norm(dim=-1)
        spread = lengths.std(-1, keepdim=True).clamp(min=torch.finfo(lengths.dtype).eps)
        choice = mixture(lengths / spread, self.routed)
        soft = choice.probabilities.to(q.dtype)
        return choice._replace(gates=choice.chosen.to(q.dtype) + (soft - soft.detach()))

    def gates(self, x: Tensor, choice: Mixture | None) -> Tensor:
        """The factors on the heads' outputs, ``(..., heads)``: shared heads first."""
        shared = x.new_ones(*x.shape[:-1], self.shared)
        if self.shared_router is not None:
            shared = self.shared * linear(self.shared_router, x).softmax(-1)
        if choice is None:
            return shared
        routed = choice.gates
        if self.balance is not None:
            first, second = (2 * linear(self.balance, x).softmax(-1)).split(1, -1)
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


# a single routed head always has the gate 1, whatever its router says
@register_mixer("mixture_of_heads", tiny={"shared": 1, "routed": 2})
class MixtureOfHeadsAttention(HeadMixture, MultiHeadAttention):
    """Attention of every token to every token, whose first ``shared`` heads are always on and ``routed`` of the others.

    Args:
        dim, heads, shared, routed, router: see :class:`HeadMixture`.
        **attention: see :class:`MultiHeadAttention`.
    """

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: Sequence[Source]) -> Tensor:
        if not self.gathers(q, k):
            return super().mix(x, q, k, v, extra)
        choice = self.route(x, q)
        assert choice is not None  # there are routed heads
        s, sources = self.shared, [*self.sources(x, q, k, v), *extra]
        k, v = (torch.cat([t.flatten(1, -3) for t in kind], 1) for kind in zip(*[(o.k, o.v) for o in sources], strict=True))
        y = chosen_attend(q[..., s:, :], k[..., s:, :], v[..., s:, :], choice.chosen, scale=self.scale)
        if s:
            y = torch.cat([self.attend(q[..., :s, :], [Source(k[..., :s, :], v[..., :s, :])]), y], -2)
        return y

    def gathers(self, q: Tensor, k: Tensor) -> bool:
        """Whether routed heads attend only for the tokens that chose them: at inference on a CPU, where that is faster."""
        others = self.heads - self.shared
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or OBSERVERS or not others:
            return False
        plain = self.bias is None and self.kv_heads == self.heads and self.backend == "auto"
        measured = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)
        products = math.prod(q.shape[1:-2]) * math.prod(k.shape[1:-2]) * q.shape[-1]
        enough = 2 * self.routed <= others and products * (others - self.routed) >= WORTHWHILE * others
        return plain and measured and enough and not (self.training and self.attn_drop)


class MixtureOfCosineHeads(HeadMixture, CosineAttention):
    """Attention by length-scaled cosines whose heads are a mixture.

    Args:
        dim, heads, shared, routed: see :class:`HeadMixture`; the router is linear.
        **attention: see :class:`CosineAttention`.
    """

    unit_queries = True


class MixtureOfAggregatedHeads(HeadMixture, AggregatedAttention):
    """Aggregated attention whose heads, with their local terms, are a mixture.

    Args:
        dim, heads, shared, routed: see :class:`HeadMixture`; the router is linear.
        **attention: see :class:`AggregatedAttention`.
    """

    unit_queries = True


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
    mixers = [module for module in model.modules() if isinstance(module, HeadMixture)]
    for mixer in mixers:
        mixer.losses = losses
    try:
        yield losses
    finally:
        for mixer in mixers:
            mixer.losses = None
