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

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...counted import register_flop_formula
from ..transforms import gradients
from . import native as native_linear
from .decays import Decay, chunk_scores, chunk_scores_backward, decays_of, entering, leaving, run_states
from .naive import scan_definition
from .norms import divided, inverse, steady
from .spans import (
    ACTIVATIONS,
    Span,
    activated,
    blocks_over,
    existing,
    heads_first,
    inactivated,
    inputs_of,
    matmul,
    matmul_added,
    product_dtype,
    room_for,
    rows_dot,
    rows_times,
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
    return _run("scan", kernel, q, k, v, decay, state, valid, activation, chunk)


def _run(name: str, kernel: str, *arguments):
    """What a function gives in a kernel language, out of autocast's reach."""
    if kernel == "triton":
        from . import triton as triton_linear

        function = getattr(triton_linear, name)
    else:
        compiled = kernel == "native" and native_linear.serves(name, arguments[0])
        function = getattr(native_linear, name) if compiled else globals()[name]
    with torch.autocast(arguments[0].device.type, enabled=False):
        return function(*arguments)


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
    return _run("scan_backward", kernel, grad, grad_final, q, k, v, decay, state, valid, activation, chunk, need_decay)


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


@dataclass(frozen=True)
class _Block:
    """Features of some tokens ``(items, rows, heads, dim)``, what they were made of, and which tokens are missing: 0.

    Features that are made here stay wide, so that sums of theirs are exact.
    """

    value: Tensor
    raw: Tensor
    missing: Tensor | None


def _block(x: Tensor, part: tuple[slice, slice], activation: str, room: Tensor | None, valid: Tensor | None = None) -> _Block:
    raw = x[part] if valid is None else existing(x[part], valid[part])
    if activation != "none":
        raw = raw.to(wide_dtype(x))
    value = ACTIVATIONS[activation][0](raw, room)
    if valid is None:
        return _Block(value, raw, None)
    missing = ~valid[part][..., None, None]
    return _Block(value if activation == "none" else value.masked_fill(missing, 0.0), raw, missing)


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
    return _run("memory", kernel, k, v, valid, activation)


def memory(k: Tensor, v: Tensor, valid: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """:func:`linear_memory` in tensor operators."""
    kind, wide = product_dtype(k), wide_dtype(k)
    products = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[-1], dtype=wide)
    total = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], dtype=wide)
    room = room_for(k, activation)
    for part in blocks_over(k):
        keys = _block(k, part, activation, room, valid).value
        products[part[0]] += _over_rows(keys, v[part] if valid is None else existing(v[part], valid[part]), kind)
        total[part[0]] += keys.sum(1, dtype=wide)
    return products, total


def _over_rows(x: Tensor, y: Tensor, kind: torch.dtype) -> Tensor:
    """Sums of ``x y^T`` over the rows of ``(items, rows, heads, n or m)``: ``(items, heads, n, m)``."""
    return torch.bmm(heads_first(x, kind).transpose(1, 2), heads_first(y, kind)).unflatten(0, (-1, x.shape[2]))


@linear_memory.register_fake
def _(k, v, valid, activation, kernel):
    shape = k.shape[0], k.shape[2], k.shape[3]
    return k.new_empty(*shape, v.shape[-1], dtype=wide_dtype(k)), k.new_empty(shape, dtype=wide_dtype(k))


@torch.library.custom_op("regard::linear_memory_backward", mutates_args=())
def linear_memory_backward(
    grad: Tensor, grad_total: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, activation: str, kernel: str
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v."""
    return _run("memory_backward", kernel, grad, grad_total, k, v, valid, activation)


def memory_backward(
    grad: Tensor, grad_total: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    kind = product_dtype(k)
    grads, memory = (torch.empty_like(k), torch.empty_like(v)), grad.to(kind)
    room = room_for(k, activation)
    for part in blocks_over(k):
        keys, turned = _block(k, part, activation, room, valid), memory[part[0]]
        rows_times(keys.value, turned, grads[1][part])
        grad_k = rows_times(v[part], turned.transpose(-2, -1), torch.empty_like(keys.value, dtype=wide_dtype(k)))
        grad_k += grad_total[part[0]].unsqueeze(1)
        grads[0][part] = inactivated(grad_k, keys.raw, keys.missing, activation)
    return grads


@linear_memory_backward.register_fake
def _(grad, grad_total, k, v, valid, activation, kernel):
    return torch.empty_like(k), torch.empty_like(v)


def _memory_context(ctx, inputs, output):
    k, v, valid, *static = inputs
    ctx.save_for_backward(k, v, valid)
    ctx.static = static


def _memory_definition(k: Tensor, v: Tensor, valid: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    keys = ACTIVATIONS[activation][0](k.to(wide_dtype(k)))
    if valid is not None:
        keys = keys.masked_fill(~valid[..., None, None], 0.0)
        v = v.masked_fill(~valid[..., None, None], 0.0)
    return torch.einsum("bthd,bthe->bhde", keys, v.to(keys.dtype)), keys.sum(1)


def _memory_autograd(ctx, grad, grad_total):
    if torch.is_grad_enabled():  # the gradient is to be differentiated
        define = partial(_memory_definition, activation=ctx.static[0])
        needed = (*ctx.needs_input_grad[:2], False)
        return *gradients(define, ctx.saved_tensors, needed, (grad, grad_total)), None, None
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
        The output ``(batch, tokens, heads, value_dim)``, 0 where the divisor counts as 0, and one over the divisor
        ``(batch, tokens, heads)`` (empty without a total), in the dtype of states.
    """
    return _run("read", kernel, q, memory, total, floor, eps, activation)


def read(
    q: Tensor, memory: Tensor, total: Tensor | None, floor: float | None, eps: float, activation: str
) -> tuple[Tensor, Tensor]:
    """:func:`linear_read` in tensor operators."""
    kind, wide = product_dtype(q), wide_dtype(q)
    out = q.new_empty(*q.shape[:-1], memory.shape[-1])
    factors = q.new_empty(q.shape[:-1] if total is not None else (0,), dtype=wide)
    memories = memory.to(kind)
    room = room_for(q, activation)
    fits = room is not None and out.shape == q.shape and out.dtype == wide  # features lie where the output replaces them
    for part in blocks_over(q):
        queries = _block(q, part, activation, out[part].flatten() if fits else room).value
        if total is not None:
            factors[part] = inverse(_summed_over(queries, total[part[0]]), floor, eps)
        rows_times(queries, memories[part[0]], out[part], None if total is None else factors[part].unsqueeze(-1))
    return out, factors


def _summed_over(queries: Tensor, total: Tensor) -> Tensor:
    """The sum of the weights of queries ``(items, rows, heads, dim)``: ``(items, rows, heads)``."""
    return rows_dot(queries.to(total.dtype), total)


@linear_read.register_fake
def _(q, memory, total, floor, eps, activation, kernel):
    inverse = q.new_empty(q.shape[:-1] if total is not None else (0,), dtype=wide_dtype(q))
    return q.new_empty(*q.shape[:-1], memory.shape[-1]), inverse


@torch.library.custom_op("regard::linear_read_backward", mutates_args=())
def linear_read_backward(
    grad: Tensor, q: Tensor, memory: Tensor, total: Tensor | None, inverse: Tensor, floor: float | None, eps: float,
    activation: str, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, of the memory and of the total (empty without one)."""
    return _run("read_backward", kernel, grad, q, memory, total, steady(inverse), floor, eps, activation)


def read_backward(
    grad: Tensor, q: Tensor, memory: Tensor, total: Tensor | None, inverse: Tensor, floor: float | None, eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kind, wide = product_dtype(q), wide_dtype(q)
    grad_q, grad_memory = torch.empty_like(q), torch.zeros_like(memory)
    grad_total = q.new_empty(0) if total is None else torch.zeros_like(total)
    memories = memory.to(kind)
    room = room_for(q, activation)
    for part in blocks_over(q):
        queries, y, turned = _block(q, part, activation, room), grad[part], memories[part[0]].transpose(-2, -1)
        if total is None:
            grad_features = rows_times(y, turned, torch.empty_like(queries.value))
        else:
            factor, sums = inverse[part].unsqueeze(-1), total[part[0]]
            y = y * factor
            grad_features = rows_times(y, turned, torch.empty_like(queries.value, dtype=wide))
            grad_mass = (grad_features * queries.value).sum(-1, keepdim=True).mul_(factor).neg_()
            if floor is not None:
                grad_mass = grad_mass.where(_summed_over(queries.value, sums).unsqueeze(-1) >= floor, 0.0)
            grad_total[part[0]] += _over_rows(queries.value, grad_mass, wide).squeeze(-1)
            grad_features.addcmul_(grad_mass, sums.unsqueeze(1))
        grad_memory[part[0]] += _over_rows(queries.value, y, kind)
        grad_q[part] = inactivated(grad_features, queries.raw, None, activation)
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


def _read_definition(
    q: Tensor, memory: Tensor, total: Tensor | None, floor: float | None, eps: float, activation: str
) -> tuple[Tensor]:
    queries = ACTIVATIONS[activation][0](q.to(wide_dtype(q)))
    y = torch.einsum("bthd,bhde->bthe", queries, memory)
    if total is not None:
        y = divided(y, torch.einsum("bthd,bhd->bth", queries, total).unsqueeze(-1), floor, eps)
    return (y.to(q.dtype),)


def _read_autograd(ctx, grad, _):
    q, memory, total, inverse = ctx.saved_tensors
    if torch.is_grad_enabled():  # the gradient is to be differentiated
        floor, eps, activation, _ = ctx.static
        define = partial(_read_definition, floor=floor, eps=eps, activation=activation)
        return *gradients(define, (q, memory, total), ctx.needs_input_grad[:3], (grad,)), *[None] * 4
    grad_q, grad_memory, grad_total = linear_read_backward(grad, q, memory, total, inverse, *ctx.static)
    return grad_q, grad_memory, None if total is None else grad_total, *[None] * 4


linear_read.register_autograd(_read_autograd, setup_context=_read_context)


def _product(k, v, times: int) -> int:
    return 2 * times * math.prod(k) * v[-1]


@register_flop_formula(torch.ops.regard.linear_memory)
def _memory_flops(k, v, *_, **__) -> int:
    return _product(k, v, 1)


@register_flop_formula(torch.ops.regard.linear_memory_backward)
def _memory_backward_flops(grad, grad_total, k, v, *_, **__) -> int:
    return _product(k, v, 2)


@register_flop_formula(torch.ops.regard.linear_read)
def _read_flops(q, memory, *_, **__) -> int:
    return _product(q, memory, 1)


@register_flop_formula(torch.ops.regard.linear_read_backward)
def _read_backward_flops(grad, q, memory, *_, **__) -> int:
    return _product(q, memory, 2)
