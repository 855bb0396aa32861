"""The arithmetic of linear attention, a few chunks of tokens at a time; :mod:`regard.ops.linear.attend` is its front door.

    causal:  S_t = diag(exp(g_t)) S_{t-1} + f(k_t) v_t^T,   y_t = f(q_t)^T S_t
             in chunks:  Y = (f(Q) f(K)^T * D) V + enter f(Q) S,   S <- through S + (leave f(K))^T V
    else:    M = sum_s f(k_s) v_s^T,  z = sum_s f(k_s);   y_t = f(q_t)^T M / max(f(q_t)^T z, floor)

Cost: per token and head 2 C (d + e) FLOPs inside a chunk of C and 4 d e across chunks; the floor is 4 d e FLOPs and one
reading of q, k, v and one writing of y. Memory beside inputs and output: a few chunks per thread, or some megabytes per
thread where no order matters; the backward recomputes the states at the borders of chunks (tokens / C matrices d x e per
head) and saves nothing in between. Source: Qin et al., Lightning Attention-2, arXiv:2401.04658; Yang et al., gated linear
attention, arXiv:2312.06635.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...counted import register_flop_formula
from ..transforms import gradients
from .decays import Decay, chunk_scores, chunk_scores_backward, decays_of, entering, leaving, run_states
from .dispatch import run
from .naive import scan_definition
from .spans import (
    Span,
    activated,
    inactivated,
    inputs_of,
    matmul,
    matmul_added,
    product_dtype,
    spans_over,
    values_of,
    wide_dtype,
)


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
        kernel: ``"torch"``, ``"triton"``, or ``"native"``, which is torch's for what is not compiled
            and where there are far fewer heads than threads.

    Returns:
        The output ``(batch, tokens, heads, value_dim)`` and the state after the last token.
    """
    return run(scan, kernel, q, k, v, decay, state, valid, activation, chunk)


def scan(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, valid: Tensor | None, activation: str,
         chunk: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`linear_scan` in tensor operators."""
    kind = product_dtype(q)
    out, final = v.new_empty(*q.shape[:-1], v.shape[-1]), _initial(q, v, state)
    for spans in spans_over(q, chunk, kind):
        for span, decay_of in zip(spans, decays_of(spans, decay, q.shape[2], kind), strict=True):
            x, factors = inputs_of(span, q, k, v, valid, activation, kind), decay_of()
            added = matmul(leaving(x.k, factors).transpose(-2, -1), x.v)
            states = run_states(final[span.items], added, factors, kind)
            y = matmul(entering(x.q, factors), states)
            span.put(out, matmul_added(y, chunk_scores(x.q, x.k, factors), x.v))
    return out, final


def _initial(q: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    if state is not None:
        return state.clone(memory_format=torch.contiguous_format)
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[-1], dtype=wide_dtype(q))


@linear_scan.register_fake
def _(q, k, v, decay, state, valid, activation, chunk, kernel):
    final = q.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[-1], dtype=wide_dtype(q))
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
    return run(scan_backward, kernel, grad, grad_final, q, k, v, decay, state, valid, activation, chunk, need_decay)


def scan_backward(grad: Tensor, grad_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None,
                  state: Tensor | None, valid: Tensor | None, activation: str, chunk: int,
                  need_decay: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`linear_scan_backward` in tensor operators."""
    kind = product_dtype(q)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad_state, running = _initial(q, v, grad_final), _initial(q, v, state)
    grad_decay = torch.zeros_like(decay, dtype=wide_dtype(decay)) if need_decay and decay is not None else None
    for spans in spans_over(q, chunk, kind):
        decays = decays_of(spans, decay, q.shape[2], kind)
        states = []
        for span, decay_of in zip(spans, decays, strict=True):
            factors = decay_of()
            keys, _, missing = activated(span, k, activation, kind, valid)
            added = matmul(leaving(keys, factors).transpose(-2, -1), values_of(span, v, missing, kind))
            states.append(run_states(running[span.items], added, factors, kind))
        for span, decay_of, before in zip(reversed(spans), reversed(decays), reversed(states), strict=True):
            x, y, factors = inputs_of(span, q, k, v, valid, activation, kind), span.take(grad, kind), decay_of()
            queries, keys = entering(x.q, factors), leaving(x.k, factors)
            added = matmul(queries.transpose(-2, -1), y)
            after = run_states(grad_state[span.items], added, factors, kind, reverse=True)
            span.put(grads[2], matmul_added(matmul(keys, after), chunk_scores(x.q, x.k, factors).transpose(-2, -1), y))
            grad_q, grad_k = chunk_scores_backward(matmul(y, x.v.transpose(-2, -1)), x.q, x.k, factors)
            read, written = matmul(y, before.transpose(-2, -1)), matmul(x.v, after.transpose(-2, -1))
            if grad_decay is not None and factors is not None:
                wide = grad_decay.dtype
                local = (x.q * grad_q.to(wide)).sub_(x.k * grad_k.to(wide)).add_(queries * read.to(wide))
                carried = (before * after.to(wide)).sum(-1).unsqueeze(-2) * factors.through.transpose(-2, -1)
                _add_decay(grad_decay, span, local, keys * written.to(wide), carried, factors)
            grad_q += entering(read, factors)
            grad_k += leaving(written, factors)
            span.put(grads[0], inactivated(grad_q, x.raw_q, None, activation))
            span.put(grads[1], inactivated(grad_k, x.raw_k, x.missing, activation))
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
    final = q.new_empty(q.shape[0], q.shape[2], q.shape[3], v.shape[-1], dtype=wide_dtype(q))
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
    if torch.is_grad_enabled():  # the gradient is to be differentiated
        define = partial(scan_definition, activation=ctx.static[0])
        tensors = q, k, v, decay, state, valid
        return *gradients(define, tensors, (*ctx.needs_input_grad[:5], False), (grad, grad_final)), *[None] * 3
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
def _scan_forward_flops(q, k, v, decay, state, valid, activation, chunk, *_, **__) -> int:
    return _scan_flops(q, v, chunk, (1, 1), 2)


@register_flop_formula(torch.ops.regard.linear_scan_backward)
def _scan_backward_flops(grad, grad_final, q, k, v, decay, state, valid, activation, chunk, *_, **__) -> int:
    return _scan_flops(q, v, chunk, (3, 2), 5)
