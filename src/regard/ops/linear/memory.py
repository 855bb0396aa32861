"""The arithmetic of linear attention where no order matters: what the keys leave, and what a query reads of it.

    M = sum_s f(k_s) v_s^T,  z = sum_s f(k_s);   y_t = f(q_t)^T M / max(f(q_t)^T z, floor)

Cost: per token and head 4 d e FLOPs, which is the floor, one reading of q, k and v and one writing of y; some megabytes beside
inputs and output. Source: Katharopoulos et al., linear transformers, arXiv:2006.16236.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...counted import register_flop_formula
from ..transforms import gradients
from .dispatch import run
from .norms import divided, inverse, steady
from .spans import (
    ACTIVATIONS,
    blocks_over,
    existing,
    heads_first,
    inactivated,
    product_dtype,
    room_for,
    rows_dot,
    rows_times,
    wide_dtype,
)


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
    return run(memory, kernel, k, v, valid, activation)


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
    return run(memory_backward, kernel, grad, grad_total, k, v, valid, activation)


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
    return run(read, kernel, q, memory, total, floor, eps, activation)


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
    return run(read_backward, kernel, grad, q, memory, total, steady(inverse), floor, eps, activation)


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
