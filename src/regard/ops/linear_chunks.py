"""The arithmetic of linear attention, a few chunks of tokens at a time; :mod:`regard.ops.linear` is its front door.

    causal:  S_t = diag(exp(g_t)) S_{t-1} + f(k_t) v_t^T,   y_t = f(q_t)^T S_t
             in chunks:  Y = (f(Q) f(K)^T * D) V + enter f(Q) S,   S <- through S + (leave f(K))^T V
    else:    M = sum_s f(k_s) v_s^T,  z = sum_s f(k_s);   y_t = f(q_t)^T M / max(f(q_t)^T z, floor)

Decays are products of at most one factor between any two tokens, found by summing logarithms up a binary tree over the
chunk: nothing is subtracted, so any decay, also minus infinity, is exact, and no exponential exceeds 1.

Cost: per token and head 2 C (d + e) FLOPs inside a chunk of C and 4 d e across chunks; the floor is 4 d e FLOPs and one
reading of q, k, v and one writing of y. Memory beside inputs and output: a few chunks; the backward recomputes the states
at the borders of chunks (tokens / C matrices d x e per head) and saves nothing in between. Source: Qin et al., Lightning
Attention-2, arXiv:2401.04658; Yang et al., gated linear attention, arXiv:2312.06635.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def _silu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "none": (lambda x: x, torch.ones_like),
    "relu": (torch.relu, lambda x: (x > 0).to(x.dtype)),
    "elu_plus_one": (lambda x: F.elu(x).add_(1), lambda x: x.clamp(max=0).exp()),
    "silu": (F.silu, _silu_slope),
}
"""Feature maps that are applied value by value, each with its derivative."""

ROWS = 256
"""Tokens taken at once where no order matters."""


# --------------------------------------------------------------------------------------------------------------------
# chunks


@dataclass(frozen=True)
class Span:
    """Some batch items and ``chunks`` consecutive chunks of ``size`` rows from ``start``, of which ``rows`` exist."""

    items: slice
    start: int
    chunks: int
    size: int
    rows: int

    def take(self, x: Tensor, kind: torch.dtype) -> Tensor:
        """``(batch, tokens, heads, width)`` as contiguous ``(chunks, items, heads, size, width)``, zeros after the end."""
        part = x[self.items, self.start : self.start + self.rows]
        if self.rows < self.chunks * self.size:
            part = F.pad(part, (0, 0, 0, 0, 0, self.chunks * self.size - self.rows))
        part = part.unflatten(1, (self.chunks, self.size)).permute(1, 0, 3, 2, 4)
        return torch.empty(part.shape, dtype=kind, device=x.device).copy_(part)

    def put(self, x: Tensor, part: Tensor) -> None:
        """Write chunks back to where :meth:`take` found them."""
        x[self.items, self.start : self.start + self.rows] = part.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : self.rows]


def _spans(q: Tensor, size: int, kind: torch.dtype) -> Iterator[list[Span]]:
    """For some batch items at a time, the spans that cover all tokens in order; an incomplete chunk is a span of its own."""
    batch, tokens, heads = q.shape[:3]
    whole, rest = divmod(tokens, size)
    if torch.compiler.is_exporting():
        matrices = batch * heads * (whole + 1)
    else:  # as many matrix products per call as keep a core busy and its cache warm
        rows = (1024 if kind.itemsize > 2 else 2048) if q.device.type == "cpu" else 1 << 18
        matrices = max(1, rows // size)
    items = max(1, min(batch, matrices // (heads * (whole + 1))))
    step = max(1, matrices // (heads * items))
    for first in range(0, batch, items):
        taken = slice(first, min(first + items, batch))
        spans = []
        for chunk in range(0, whole, step):
            chunks = min(step, whole - chunk)
            spans.append(Span(taken, chunk * size, chunks, size, chunks * size))
        if rest:
            spans.append(Span(taken, whole * size, 1, size, rest))
        yield spans


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of states and of decays."""
    return torch.promote_types(x.dtype, torch.float32)


def _kind(x: Tensor) -> torch.dtype:
    """The dtype of matrix products; sums of float16 may leave its range."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else _wide(x)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Products of contiguous (or transposed) stacks of matrices ``(chunks, items, heads, ., .)``."""
    return torch.bmm(a.flatten(0, 2), b.flatten(0, 2)).unflatten(0, a.shape[:3])


def _matmul_added(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.baddbmm(y.flatten(0, 2), a.flatten(0, 2), b.flatten(0, 2)).unflatten(0, a.shape[:3])


@dataclass(frozen=True)
class Inputs:
    """The inputs of a span, activated and masked."""

    q: Tensor
    k: Tensor
    v: Tensor
    raw_q: Tensor
    raw_k: Tensor
    valid: Tensor | None


def _activated(span: Span, x: Tensor, activation: str, kind: torch.dtype, valid: Tensor | None = None):
    """Features of a span, what they were made of, and the mask that was applied."""
    raw = span.take(x, kind)
    value = raw if activation == "none" else ACTIVATIONS[activation][0](raw)
    mask = None if valid is None else span.take(valid[..., None, None], kind)
    return value if mask is None else value * mask, raw, mask


def _inactivated(grad: Tensor, raw: Tensor, mask: Tensor | None, activation: str) -> Tensor:
    """The gradient of what the features were made of."""
    grad = grad if mask is None else grad * mask
    return grad if activation == "none" else grad * ACTIVATIONS[activation][1](raw)


def _inputs(span: Span, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, activation: str, kind: torch.dtype) -> Inputs:
    queries, raw_q, _ = _activated(span, q, activation, kind)
    keys, raw_k, mask = _activated(span, k, activation, kind, valid)
    return Inputs(queries, keys, span.take(v, kind), raw_q, raw_k, mask)


# --------------------------------------------------------------------------------------------------------------------
# decays


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
    enter, leave, through = logs, torch.zeros_like(logs), logs
    pairs, block = [], 1
    while block < logs.shape[-2]:
        first, second = enter.unflatten(-2, (-1, 2, block)).unbind(-3)
        before, after = leave.unflatten(-2, (-1, 2, block)).unbind(-3)
        left, right = through.unflatten(-2, (-1, 2, 1)).unbind(-3)  # (..., blocks / 2, 1, width)
        pairs.append((before.exp(), second.exp()))
        enter = torch.stack([first, second + left], -3).flatten(-4, -2)
        leave = torch.stack([before + right, after], -3).flatten(-4, -2)
        through = (left + right).squeeze(-2)
        block *= 2
    return Decay(enter.exp(), leave.exp(), through.exp().transpose(-2, -1), pairs, None)


def _decays(spans: list[Span], decay: Tensor | None, heads: int, kind: torch.dtype) -> list[Callable[[], Decay | None]]:
    """For each span, what gives its decays. Those of a head are found once, those of tokens for all chunks at once."""
    if decay is None:
        return [lambda: None] * len(spans)
    wide = _wide(decay)
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


def _scores(q: Tensor, k: Tensor, decay: Decay | None) -> Tensor:
    """What each token adds at each later one of its chunk ``(chunks, items, heads, size, size)``."""
    if decay is None:
        return _matmul(q, k.transpose(-2, -1)).tril_()
    if decay.inner is not None:
        return _matmul(q, k.transpose(-2, -1)).mul_(decay.inner)
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


def _scores_backward(grad: Tensor, q: Tensor, k: Tensor, decay: Decay | None) -> tuple[Tensor, Tensor]:
    """Gradients of q and k from the gradient of the scores."""
    if decay is None or decay.inner is not None:
        grad = grad.tril_() if decay is None else grad.mul_(decay.inner)  # type: ignore[arg-type]  # it is not None
        return _matmul(grad, k), _matmul(grad.transpose(-2, -1), q)
    own = grad.diagonal(0, -2, -1).unsqueeze(-1)
    grad_q, grad_k = own * k, own * q
    for (left, right), q_part, k_part in _halves(q, k, decay):
        block = left.shape[-2]
        left, right = left.to(k.dtype), right.to(q.dtype)
        part = _blocks(grad, block).movedim(-1, -3)
        grad_q.unflatten(-2, (-1, 2, block))[..., 1, :, :] += torch.matmul(part, k_part * left) * right
        grad_k.unflatten(-2, (-1, 2, block))[..., 0, :, :] += torch.matmul(part.transpose(-2, -1), q_part * right) * left
    return grad_q, grad_k


def _entering(q: Tensor, decay: Decay | None) -> Tensor:
    return q if decay is None else q * decay.enter.to(q.dtype)


def _leaving(k: Tensor, decay: Decay | None) -> Tensor:
    return k if decay is None else k * decay.leave.to(k.dtype)


def _run_states(state: Tensor, added: Tensor, decay: Decay | None, kind: torch.dtype, reverse: bool = False) -> Tensor:
    """The state before each chunk (after it in reverse), each adding to the next; ``state`` moves to the other end."""
    chunks = len(added)
    states = torch.empty(added.shape, dtype=kind, device=added.device)
    for i in reversed(range(chunks)) if reverse else range(chunks):
        states[i] = state
        if decay is not None:
            state.mul_(decay.through[min(i, len(decay.through) - 1)])
        state.add_(added[i])
    return states


# --------------------------------------------------------------------------------------------------------------------
# causal


@torch.library.custom_op("regard::linear_scan", mutates_args=())
def linear_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    valid: Tensor | None,
    activation: str,
    chunk: int,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention without a normaliser.

    Args:
        q, k: ``(batch, tokens, heads, dim)``.
        v: ``(batch, tokens, heads, value_dim)``, perhaps wider than q and k: the output is in its dtype.
        decay: its logarithm: ``(heads,)``, ``(heads, dim)``, ``(batch, tokens, heads)`` or ``(batch, tokens, heads, dim)``.
        state: before the first token, ``(batch, heads, dim, value_dim)`` in float32 (float64 for float64).
        valid: ``(batch, tokens)``, True where a key exists.
        activation: of q and k, a key of :data:`ACTIVATIONS`.
        chunk: tokens of a chunk, a power of two.
        kernel: ``"torch"`` or ``"triton"``.

    Returns:
        The output ``(batch, tokens, heads, value_dim)`` and the state after the last token.
    """
    with torch.autocast(q.device.type, enabled=False):
        return scan_of(kernel)[0](q, k, v, decay, state, valid, activation, chunk)


def scan_of(kernel: str) -> tuple[Callable, Callable]:
    """The forward and backward of the causal form in a kernel language."""
    if kernel == "torch":
        return scan, scan_backward
    from .triton import linear

    return linear.scan, linear.scan_backward


def scan(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, valid: Tensor | None, activation: str,
         chunk: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`linear_scan` in tensor operators."""
    kind = _kind(q)
    out, final = v.new_empty(*q.shape[:-1], v.shape[-1]), _initial(q, v, state)
    for spans in _spans(q, chunk, kind):
        for span, decay_of in zip(spans, _decays(spans, decay, q.shape[2], kind), strict=True):
            x, factors = _inputs(span, q, k, v, valid, activation, kind), decay_of()
            added = _matmul(_leaving(x.k, factors).transpose(-2, -1), x.v)
            states = _run_states(final[span.items], added, factors, kind)
            y = _matmul(_entering(x.q, factors), states)
            span.put(out, _matmul_added(y, _scores(x.q, x.k, factors), x.v))
    return out, final


def _initial(q: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    if state is not None:
        return state.clone(memory_format=torch.contiguous_format)
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[-1], dtype=_wide(q))


@linear_scan.register_fake
def _(q, k, v, decay, state, valid, activation, chunk, kernel):
    final = q.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[-1], dtype=_wide(q))
    return v.new_empty(*q.shape[:-1], v.shape[-1]), final


@torch.library.custom_op("regard::linear_scan_backward", mutates_args=())
def linear_scan_backward(
    grad: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    valid: Tensor | None,
    activation: str,
    chunk: int,
    kernel: str,
    need_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, of the decay (empty where not needed) and of the state."""
    with torch.autocast(q.device.type, enabled=False):
        backward = scan_of(kernel)[1]
        return backward(grad, grad_final, q, k, v, decay, state, valid, activation, chunk, need_decay)


def scan_backward(grad: Tensor, grad_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None,
                  state: Tensor | None, valid: Tensor | None, activation: str, chunk: int,
                  need_decay: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`linear_scan_backward` in tensor operators."""
    kind = _kind(q)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad_state, running = _initial(q, v, grad_final), _initial(q, v, state)
    grad_decay = torch.zeros_like(decay, dtype=_wide(decay)) if need_decay and decay is not None else None
    for spans in _spans(q, chunk, kind):
        decays = _decays(spans, decay, q.shape[2], kind)
        states = []
        for span, decay_of in zip(spans, decays, strict=True):
            factors = decay_of()
            keys = _leaving(_activated(span, k, activation, kind, valid)[0], factors)
            added = _matmul(keys.transpose(-2, -1), span.take(v, kind))
            states.append(_run_states(running[span.items], added, factors, kind))
        for span, decay_of, before in zip(reversed(spans), reversed(decays), reversed(states), strict=True):
            x, y, factors = _inputs(span, q, k, v, valid, activation, kind), span.take(grad, kind), decay_of()
            queries, keys = _entering(x.q, factors), _leaving(x.k, factors)
            added = _matmul(queries.transpose(-2, -1), y)
            after = _run_states(grad_state[span.items], added, factors, kind, reverse=True)
            span.put(grads[2], _matmul_added(_matmul(keys, after), _scores(x.q, x.k, factors).transpose(-2, -1), y))
            grad_q, grad_k = _scores_backward(_matmul(y, x.v.transpose(-2, -1)), x.q, x.k, factors)
            read, written = _matmul(y, before.transpose(-2, -1)), _matmul(x.v, after.transpose(-2, -1))
            if grad_decay is not None and factors is not None:
                wide = grad_decay.dtype
                local = (x.q * grad_q.to(wide)).sub_(x.k * grad_k.to(wide)).add_(queries * read.to(wide))
                carried = (before * after.to(wide)).sum(-1).unsqueeze(-2) * factors.through.transpose(-2, -1)
                _add_decay(grad_decay, span, local, keys * written.to(wide), carried, factors)
            grad_q += _entering(read, factors)
            grad_k += _leaving(written, factors)
            span.put(grads[0], _inactivated(grad_q, x.raw_q, None, activation))
            span.put(grads[1], _inactivated(grad_k, x.raw_k, x.valid, activation))
    empty = q.new_empty(0)
    return *grads, empty if grad_decay is None else grad_decay.to(decay.dtype), grad_state  # type: ignore[union-attr]


def _add_decay(grad: Tensor, span: Span, local: Tensor, written: Tensor, carried: Tensor, decay: Decay) -> None:
    """Add the gradient of the logarithms of a span.

    A token's decay acts on what later queries of the chunk take from earlier keys, and from the state before; on what
    earlier keys leave to the state after; and on the state that passes through.

    Args:
        grad: of the decay, in its own shape.
        span: where.
        local: gradient times value of the queries, less that of the keys within the chunk.
        written: gradient times value of the keys as the state takes them.
        carried: gradient times value of the state that passes through, ``(chunks, items, heads, 1, dim)``.
        decay: of the span.
    """
    if decay.enter.shape[-1] == 1:
        local, written, carried = (t.sum(-1, keepdim=True) for t in (local, written, carried))
    later = local.flip(-2).cumsum(-2).flip(-2)
    total = later + (written.cumsum(-2) - written) + carried
    if grad.ndim <= 2:
        grad += total[..., : min(span.rows, span.size), :].sum((0, 1, 3)).reshape(grad.shape)
    else:
        span.put(grad if grad.ndim == 4 else grad[..., None], total)


@linear_scan_backward.register_fake
def _(grad, grad_final, q, k, v, decay, state, valid, activation, chunk, kernel, need_decay):
    final = q.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[-1], dtype=_wide(q))
    grad_decay = torch.empty_like(decay) if need_decay else q.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), grad_decay, final


def _scan_context(ctx, inputs, output):
    *tensors, activation, chunk, kernel = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.static = activation, chunk, kernel


def _scan_autograd(ctx, grad, grad_final):
    q, k, v, decay, state, valid = ctx.saved_tensors
    need_decay = decay is not None and ctx.needs_input_grad[3]
    if grad is None:
        grad = v.new_zeros(*q.shape[:-1], v.shape[-1])
    *grads, grad_decay, grad_state = linear_scan_backward(
        grad, grad_final, q, k, v, decay, state, valid, *ctx.static, need_decay
    )
    return *grads, grad_decay if need_decay else None, None if state is None else grad_state, *[None] * 4


linear_scan.register_autograd(_scan_autograd, setup_context=_scan_context)


def _scan_flops(q, v, chunk: int, inside: tuple[int, int], across: int) -> int:
    batch, tokens, heads, dim = q
    rows = batch * heads * -(-tokens // chunk) * chunk
    return 2 * rows * (chunk * sum(n * m for n, m in zip(inside, (dim, v[-1]), strict=True)) + across * dim * v[-1])


@register_flop_formula(torch.ops.regard.linear_scan)
def _flops(q, k, v, decay, state, valid, activation, chunk, kernel, *, out_shape=None, **_) -> int:
    return _scan_flops(q, v, chunk, (1, 1), 2)


@register_flop_formula(torch.ops.regard.linear_scan_backward)
def _flops_backward(grad, grad_final, q, k, v, decay, state, valid, activation, chunk, kernel, need_decay, *,
                    out_shape=None, **_) -> int:  # fmt: skip
    return _scan_flops(q, v, chunk, (3, 2), 5)


# --------------------------------------------------------------------------------------------------------------------
# all keys


def _rows(x: Tensor, kind: torch.dtype) -> Iterator[Span]:
    """Spans of :data:`ROWS` tokens, where the order does not matter."""
    for spans in _spans(x, ROWS, kind):
        yield from spans


@torch.library.custom_op("regard::linear_memory", mutates_args=())
def linear_memory(k: Tensor, v: Tensor, valid: Tensor | None, activation: str, kernel: str) -> tuple[Tensor, Tensor]:
    """What the keys leave to the queries.

    Args:
        k: ``(batch, tokens, heads, dim)``.
        v: ``(batch, tokens, heads, value_dim)``.
        valid, activation, kernel: as in :func:`linear_scan`.

    Returns:
        The sums of ``f(k) v^T`` ``(batch, heads, dim, value_dim)`` and of ``f(k)`` ``(batch, heads, dim)`` in float32
        (float64 for float64).
    """
    with torch.autocast(k.device.type, enabled=False):
        return (_triton().memory if kernel == "triton" else memory)(k, v, valid, activation)


def _triton():
    from .triton import linear

    return linear


def memory(k: Tensor, v: Tensor, valid: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """:func:`linear_memory` in tensor operators."""
    kind, wide = _kind(k), _wide(k)
    products = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[-1], dtype=wide)
    total = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], dtype=wide)
    for span in _rows(k, kind):
        keys, _, _ = _activated(span, k, activation, kind, valid)
        products[span.items] += _matmul(keys.transpose(-2, -1), span.take(v, kind)).sum(0)
        total[span.items] += keys[..., : min(span.rows, span.size), :].sum((0, 3), dtype=wide)
    return products, total


@linear_memory.register_fake
def _(k, v, valid, activation, kernel):
    shape = k.shape[0], k.shape[2], k.shape[3]
    return k.new_empty(*shape, v.shape[-1], dtype=_wide(k)), k.new_empty(shape, dtype=_wide(k))


@torch.library.custom_op("regard::linear_memory_backward", mutates_args=())
def linear_memory_backward(
    grad: Tensor, grad_total: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, activation: str, kernel: str
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v."""
    with torch.autocast(k.device.type, enabled=False):
        backward = _triton().memory_backward if kernel == "triton" else _memory_backward
        return backward(grad, grad_total, k, v, valid, activation)


def _memory_backward(
    grad: Tensor, grad_total: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    kind = _kind(k)
    grads, memory, total = (torch.empty_like(k), torch.empty_like(v)), grad.to(kind), grad_total.to(kind)
    for span in _rows(k, kind):
        keys, raw, mask = _activated(span, k, activation, kind, valid)
        turned = memory[span.items].expand(span.chunks, -1, -1, -1, -1)
        span.put(grads[1], _matmul(keys, turned))
        grad_k = _matmul(span.take(v, kind), turned.transpose(-2, -1)) + total[span.items].unsqueeze(-2)
        span.put(grads[0], _inactivated(grad_k, raw, mask, activation))
    return grads


@linear_memory_backward.register_fake
def _(grad, grad_total, k, v, valid, activation, kernel):
    return torch.empty_like(k), torch.empty_like(v)


def _memory_context(ctx, inputs, output):
    k, v, valid, *static = inputs
    ctx.save_for_backward(k, v, valid)
    ctx.static = static


def _memory_autograd(ctx, grad, grad_total):
    return *linear_memory_backward(grad, grad_total, *ctx.saved_tensors, *ctx.static), None, None, None


linear_memory.register_autograd(_memory_autograd, setup_context=_memory_context)


@torch.library.custom_op("regard::linear_read", mutates_args=())
def linear_read(
    q: Tensor, memory: Tensor, total: Tensor | None, floor: float | None, eps: float, activation: str, kernel: str
) -> tuple[Tensor, Tensor]:
    """What the queries find in a memory.

    Args:
        q: ``(batch, tokens, heads, dim)``.
        memory: ``(batch, heads, dim, value_dim)`` in the dtype of states.
        total: ``(batch, heads, dim)``; None does not divide.
        floor, eps: of the divisor ``max(f(q) total, floor) + eps``.
        activation, kernel: as in :func:`linear_scan`.

    Returns:
        The output ``(batch, tokens, heads, value_dim)``, 0 where the divisor is 0, and one over the divisor
        ``(batch, tokens, heads)`` (empty without a total), in the dtype of states.
    """
    with torch.autocast(q.device.type, enabled=False):
        return (_triton().read if kernel == "triton" else read)(q, memory, total, floor, eps, activation)


def read(
    q: Tensor, memory: Tensor, total: Tensor | None, floor: float | None, eps: float, activation: str
) -> tuple[Tensor, Tensor]:
    """:func:`linear_read` in tensor operators."""
    kind, wide = _kind(q), _wide(q)
    out = q.new_empty(*q.shape[:-1], memory.shape[-1])
    factors = q.new_empty(q.shape[:-1] if total is not None else (0,), dtype=wide)
    memories = memory.to(kind)
    for span in _rows(q, kind):
        queries, _, _ = _activated(span, q, activation, kind)
        y = _matmul(queries, memories[span.items].expand(span.chunks, -1, -1, -1, -1))
        if total is not None:
            factor = inverse(_summed_over(queries, total[span.items]), floor, eps)
            span.put(factors[..., None], factor)
            y = y.to(wide).mul_(factor)
        span.put(out, y)
    return out, factors


def _summed_over(queries: Tensor, total: Tensor) -> Tensor:
    """The sum of the weights of queries ``(chunks, items, heads, rows, dim)``: ``(..., rows, 1)``."""
    return torch.matmul(queries.to(total.dtype), total.unsqueeze(-1))


def inverse(mass: Tensor, floor: float | None, eps: float) -> Tensor:
    """One over the divisor, 0 where that is 0."""
    divisor = (mass if floor is None else mass.clamp(min=floor)) + eps
    return divisor.masked_fill(divisor == 0, torch.inf).reciprocal()  # so that its gradient is 0 there too


@linear_read.register_fake
def _(q, memory, total, floor, eps, activation, kernel):
    inverse = q.new_empty(q.shape[:-1] if total is not None else (0,), dtype=_wide(q))
    return q.new_empty(*q.shape[:-1], memory.shape[-1]), inverse


@torch.library.custom_op("regard::linear_read_backward", mutates_args=())
def linear_read_backward(
    grad: Tensor, q: Tensor, memory: Tensor, total: Tensor | None, inverse: Tensor, floor: float | None, eps: float,
    activation: str, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, of the memory and of the total (empty without one)."""
    with torch.autocast(q.device.type, enabled=False):
        backward = _triton().read_backward if kernel == "triton" else _read_backward
        return backward(grad, q, memory, total, inverse, floor, eps, activation)


def _read_backward(
    grad: Tensor, q: Tensor, memory: Tensor, total: Tensor | None, inverse: Tensor, floor: float | None, eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kind, wide = _kind(q), _wide(q)
    grad_q, grad_memory = torch.empty_like(q), torch.zeros_like(memory)
    grad_total = q.new_empty(0) if total is None else torch.zeros_like(total)
    memories = memory.to(kind)
    for span in _rows(q, kind):
        queries, raw, _ = _activated(span, q, activation, kind)
        y = span.take(grad, kind)
        turned = memories[span.items].expand(span.chunks, -1, -1, -1, -1)
        if total is None:
            grad_features = _matmul(y, turned.transpose(-2, -1))
        else:
            factor = span.take(inverse[..., None], wide)
            y = (y * factor).to(kind)
            grad_features = _matmul(y, turned.transpose(-2, -1))
            sums = total[span.items]
            grad_mass = -(grad_features * queries).sum(-1, keepdim=True, dtype=wide) * factor
            if floor is not None:
                grad_mass = grad_mass.where(_summed_over(queries, sums) >= floor, 0.0)
            grad_total[span.items] += torch.matmul(queries.to(wide).transpose(-2, -1), grad_mass).squeeze(-1).sum(0)
            grad_features = grad_features + grad_mass * sums.unsqueeze(-2)
        grad_memory[span.items] += _matmul(queries.transpose(-2, -1), y).sum(0)
        span.put(grad_q, _inactivated(grad_features, raw, None, activation))
    return grad_q, grad_memory, grad_total


@linear_read_backward.register_fake
def _(grad, q, memory, total, inverse, floor, eps, activation, kernel):
    grad_total = q.new_empty(0) if total is None else torch.empty_like(total)
    return torch.empty_like(q), torch.empty_like(memory), grad_total


def _read_context(ctx, inputs, output):
    q, memory, total, *static = inputs
    ctx.save_for_backward(q, memory, total, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.static = static


def _read_autograd(ctx, grad, _):
    q, memory, total, inverse = ctx.saved_tensors
    grad_q, grad_memory, grad_total = linear_read_backward(grad, q, memory, total, inverse, *ctx.static)
    return grad_q, grad_memory, None if total is None else grad_total, *[None] * 4


linear_read.register_autograd(_read_autograd, setup_context=_read_context)


def _product(k, v, times: int) -> int:
    return 2 * times * math.prod(k) * v[-1]


@register_flop_formula(torch.ops.regard.linear_memory)
def _memory_flops(k, v, valid, activation, kernel, *, out_shape=None, **_) -> int:
    return _product(k, v, 1)


@register_flop_formula(torch.ops.regard.linear_memory_backward)
def _memory_backward_flops(grad, grad_total, k, v, valid, activation, kernel, *, out_shape=None, **_) -> int:
    return _product(k, v, 2)


@register_flop_formula(torch.ops.regard.linear_read)
def _read_flops(q, memory, total, floor, eps, activation, kernel, *, out_shape=None, **_) -> int:
    return _product(q, memory, 1)


@register_flop_formula(torch.ops.regard.linear_read_backward)
def _read_backward_flops(grad, q, memory, total, inverse, floor, eps, activation, kernel, *, out_shape=None, **_) -> int:
    return _product(q, memory, 2)
