"""What makes two functions, an attention and its gradients, into operators that torch can trace, differentiate and count."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ...counted import register_flop_formula
from ..calls import definition
from ..calls.call import Call
from ..calls.definition import lse_like
from ..calls.source import HeadTable
from ..patterns import Blocks, parse
from ..transforms import gradients


def _call(q, k, v, table, valid, blocks, block, spec, bias_spec, q_start, zeros, scale) -> Call:
    """What an operator was asked for, as it was put to the backend."""
    return Call(
        q, k, v,
        Blocks(blocks, tuple(block)) if block else parse(spec),
        scale,
        table=None if table is None else HeadTable(table, parse(bias_spec)),
        valid=valid,
        q_start=tuple(q_start),
        zeros=tuple(zip(zeros[::2], zeros[1::2], strict=True)),
        need_lse=True,
        device=q.device,
    )  # fmt: skip


def complete(forward, backward, flops: Callable[..., int], backward_flops: Callable[..., int]) -> None:
    """Give a custom operator its fake kernel, its autograd formula and its count of FLOPs.

    Args:
        forward: custom operator from ``(q, k, v, table, valid, blocks, *static, need_lse)`` to output and log-sum-exp, which is
            empty where it is not needed; ``table`` is a bias table, ``valid`` and ``blocks`` carry no gradient, and nor do the
            static arguments.
        backward: custom operator from ``(grad_out, grad_lse, q, k, v, table, valid, blocks, out, lse, *static, need_table)``
            to the gradients of q, k, v and of the table (empty where not needed).
        flops: from the shapes of the arguments of ``forward`` to FLOPs.
        backward_flops: the same of ``backward``.
    """

    @forward.register_fake
    def _(q, k, v, *others):
        lse = lse_like(q)
        return q.new_empty((*q.shape[:-1], v.shape[-1])), lse if others[-1] else lse.new_empty(0)

    @backward.register_fake
    def _(grad_out, grad_lse, q, k, v, table, *others):
        table_grad = torch.empty_like(table) if others[-1] else q.new_empty(0)
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), table_grad

    def setup_context(ctx, inputs, output):
        tensors, ctx.static = inputs[:6], inputs[6:-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    def autograd(ctx, grad_out, grad_lse):
        *tensors, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            define = partial(definition.of_tensors, _call(*tensors, *ctx.static))
            needed = (*ctx.needs_input_grad[:3], False, ctx.needs_input_grad[3])
            dq, dk, dv, _, dtable = gradients(define, (*tensors[:3], None, tensors[3]), needed, (grad_out, grad_lse))
            return dq, dk, dv, dtable, *[None] * (3 + len(ctx.static))
        need_table = tensors[3] is not None and ctx.needs_input_grad[3]
        dq, dk, dv, dtable = backward(grad_out, grad_lse, *tensors, out, lse, *ctx.static, need_table)
        return dq, dk, dv, dtable if need_table else None, *[None] * (3 + len(ctx.static))

    forward.register_autograd(autograd, setup_context=setup_context)
    for operator, count in ((forward, flops), (backward, backward_flops)):
        register_flop_formula(operator._opoverload.overloadpacket)(count)
