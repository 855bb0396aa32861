"""The decays of linear attention within and between chunks, and the products of queries and keys under them.

Decays are products of at most one factor between any two tokens, found by summing logarithms up a binary tree over the
chunk: nothing is subtracted, so any decay, also minus infinity, is exact, and no exponential exceeds 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .spans import Span, matmul, wide_dtype


@dataclass(frozen=True)
class Decay:
    """How much is left of tokens of chunks ``(chunks, items, heads, size, width)``; the width is 1 or that of the features.

    Attributes:
        enter: of the state before the chunk, at each token.
        leave: of each token, in the state after the chunk.
        through: of the state before the chunk, after it: ``(chunks, items, heads, width, 1)``.
        pairs: for blocks of 1, 2, 4, ... tokens, what is left of the tokens of every first block of two at its end, and of
            that at the tokens of the second block: ``(chunks, items, heads, blocks / 2, block, width)``.
        inner: of each token at each later one of the chunk ``(chunks, items, heads, size, size)``, for width 1.
    """

    enter: Tensor
    leave: Tensor
    through: Tensor
    pairs: list[tuple[Tensor, Tensor]]
    inner: Tensor | None

    def chunk(self, first: int, count: int) -> Decay:
        """Those of some chunks."""

        def cut(x: Tensor) -> Tensor:
            return x[first : first + count]

        pairs = [(cut(a), cut(b)) for a, b in self.pairs]
        return Decay(cut(self.enter), cut(self.leave), cut(self.through), pairs, None)

    def with_inner(self, kind: torch.dtype) -> Decay:
        size = self.enter.shape[-2]
        inner = self.enter.new_zeros(*self.enter.shape[:-1], size, dtype=kind)
        inner.diagonal(0, -2, -1).fill_(1.0)
        for left, right in self.pairs:
            _blocks(inner, left.shape[-2]).copy_((right * left.transpose(-2, -1)).movedim(-3, -1))
        return Decay(self.enter.to(kind), self.leave.to(kind), self.through, self.pairs, inner)


def _blocks(scores: Tensor, block: int) -> Tensor:
    """Of ``(..., size, size)`` the queries of second blocks against the keys of first ones ``(..., b, b, blocks / 2)``."""
    pairs = scores.shape[-1] // (2 * block)
    return scores.unflatten(-1, (pairs, 2, block)).unflatten(-4, (pairs, 2, block))[..., 1, :, :, 0, :].diagonal(0, -4, -2)


def _summed(logs: Tensor) -> Decay:
    """The decays of chunks with logarithms ``(chunks, items, heads, size, width)``, without ``inner``."""
    enter, leave, through = logs.clone(), torch.zeros_like(logs), logs
    pairs, block = [], 1
    while block < logs.shape[-2]:
        second = enter.unflatten(-2, (-1, 2, block))[..., 1, :, :]
        before = leave.unflatten(-2, (-1, 2, block))[..., 0, :, :]
        left, right = through.unflatten(-2, (-1, 2, 1)).unbind(-3)  # (..., blocks / 2, 1, width)
        pairs.append((before.exp(), second.exp()))
        second += left
        before += right
        through = (left + right).squeeze(-2)
        block *= 2
    return Decay(enter.exp(), leave.exp(), through.exp().transpose(-2, -1), pairs, None)


def decays_of(spans: list[Span], decay: Tensor | None, heads: int, kind: torch.dtype) -> list[Callable[[], Decay | None]]:
    """For each span, what gives its decays. Those of a head are found once, those of tokens for all chunks at once."""
    if decay is None:
        return [lambda: None] * len(spans)
    wide = wide_dtype(decay)
    if decay.ndim <= 2:
        logs = decay.to(wide).reshape(1, 1, heads, 1, -1)

        def fixed(rows: int, size: int) -> Decay:
            live = (torch.arange(size, device=decay.device) < rows)[:, None]
            found = _summed(torch.where(live, logs, logs.new_zeros(())))
            return found.with_inner(kind) if logs.shape[-1] == 1 else found

        known = {span.rows == span.chunks * span.size: fixed(min(span.rows, span.size), span.size) for span in spans}
        return [lambda span=span: known[span.rows == span.chunks * span.size] for span in spans]  # type: ignore[misc]
    if decay.ndim == 4:
        return [lambda span=span: _summed(span.take(decay, wide)) for span in spans]  # type: ignore[misc]
    everything = Span(spans[0].items, 0, sum(s.chunks for s in spans), spans[0].size, sum(s.rows for s in spans))
    whole = _summed(everything.take(decay[..., None], wide))
    firsts = [span.start // span.size for span in spans]
    return [lambda f=f, c=s.chunks: whole.chunk(f, c).with_inner(kind) for f, s in zip(firsts, spans, strict=True)]  # type: ignore[misc]


def chunk_scores(q: Tensor, k: Tensor, decay: Decay | None) -> Tensor:
    """What each token adds at each later one of its chunk ``(chunks, items, heads, size, size)``."""
    if decay is None:
        return matmul(q, k.transpose(-2, -1)).tril_()
    if decay.inner is not None:
        return matmul(q, k.transpose(-2, -1)).mul_(decay.inner)
    scores = q.new_zeros(*q.shape[:-1], q.shape[-2])
    scores.diagonal(0, -2, -1).copy_((q * k).sum(-1))
    for (left, right), q_part, k_part in _halves(q, k, decay):
        part = torch.matmul(q_part * right.to(q.dtype), (k_part * left.to(k.dtype)).transpose(-2, -1))
        _blocks(scores, left.shape[-2]).copy_(part.movedim(-3, -1))
    return scores


def _halves(q: Tensor, k: Tensor, decay: Decay) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor, Tensor]]:
    """At each level of the tree its decays, the queries of second blocks and the keys of first ones."""
    for pair in decay.pairs:
        block = pair[0].shape[-2]
        yield pair, q.unflatten(-2, (-1, 2, block))[..., 1, :, :], k.unflatten(-2, (-1, 2, block))[..., 0, :, :]


def chunk_scores_backward(grad: Tensor, q: Tensor, k: Tensor, decay: Decay | None) -> tuple[Tensor, Tensor]:
    """Gradients of q and k from the gradient of the scores."""
    if decay is None or decay.inner is not None:
        grad = grad.tril_() if decay is None else grad.mul_(decay.inner)  # type: ignore[arg-type]  # it is not None
        return matmul(grad, k), matmul(grad.transpose(-2, -1), q)
    own = grad.diagonal(0, -2, -1).unsqueeze(-1)
    grad_q, grad_k = own * k, own * q
    for (left, right), q_part, k_part in _halves(q, k, decay):
        block = left.shape[-2]
        left, right = left.to(k.dtype), right.to(q.dtype)
        part = _blocks(grad, block).movedim(-1, -3)
        grad_q.unflatten(-2, (-1, 2, block))[..., 1, :, :] += torch.matmul(part, k_part * left) * right
        grad_k.unflatten(-2, (-1, 2, block))[..., 0, :, :] += torch.matmul(part.transpose(-2, -1), q_part * right) * left
    return grad_q, grad_k


def entering(q: Tensor, decay: Decay | None) -> Tensor:
    return q if decay is None else q * decay.enter.to(q.dtype)


def leaving(k: Tensor, decay: Decay | None) -> Tensor:
    return k if decay is None else k * decay.leave.to(k.dtype)


def run_states(state: Tensor, added: Tensor, decay: Decay | None, kind: torch.dtype, reverse: bool = False) -> Tensor:
    """The state before each chunk (after it in reverse), each adding to the next; ``state`` moves to the other end."""
    before = torch.empty(len(added) + 1, *state.shape, dtype=state.dtype, device=state.device)
    first, rest = (before[-1], before[:-1]) if reverse else (before[0], before[1:])
    first.copy_(state)
    rest.copy_(added)
    steps, throughs = before.unbind(), None if decay is None else decay.through.expand(len(added), *[-1] * 4).unbind()
    for i in reversed(range(len(added))) if reverse else range(len(added)):
        here, there = (steps[i + 1], steps[i]) if reverse else (steps[i], steps[i + 1])
        if throughs is None:
            there.add_(here)
        else:
            there.addcmul_(here, throughs[i])
    state.copy_(steps[0] if reverse else steps[-1])
    return (before[1:] if reverse else before[:-1]).to(kind)
