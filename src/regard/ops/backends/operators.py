"""One definition of an attention operator: its schema, and what torch needs to trace, differentiate and count it.

The operators of all backends take the same arguments, of which a backend's two functions see one value, :class:`Inputs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from ...counted import register_flop_formula
from ..calls import definition
from ..calls.call import Call
from ..calls.definition import lse_like
from ..calls.geometry import Geometry
from ..calls.source import HeadTable
from ..patterns import Blocks, parse
from ..tiles.calls import planned
from ..transforms import gradients

TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? valid, Tensor? blocks"
STATIC = "SymInt[] block, str spec, str bias_spec, SymInt[] q_start, SymInt[] zeros, float scale"
SCHEMA = f"({TENSORS}, {STATIC}, bool need_lse) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"(Tensor grad_out, Tensor? grad_lse, {TENSORS}, Tensor out, Tensor lse, {STATIC}, bool need_table) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What an operator is given.

    Attributes:
        q, k, v: as in a :class:`regard.ops.calls.call.Call`; only they and the table carry gradients.
        table: bias table ``(heads or 1, *offsets)``; ``bias_spec`` is the text form of its pattern.
        valid: ``(batch or 1, *grid)``, True where a key exists.
        blocks: listed blocks ``(batch or 1, heads or 1, query_blocks, listed)``, of size ``block``; ``spec`` is the text form
            of a static pattern in their place.
        q_start, zeros: coordinates of the first query; zero keys before and after each axis, one after another.
        scale: of the logits.
    """

    q: Any
    k: Any
    v: Any
    table: Any
    valid: Any
    blocks: Any
    block: list[int]
    spec: str
    bias_spec: str
    q_start: list[int]
    zeros: list[int]
    scale: float

    @property
    def geometry(self) -> Geometry:
        """Of a static pattern. Also of inputs that are the shapes of tensors."""
        q, k, table = (t.shape if isinstance(t, Tensor) else t for t in (self.q, self.k, self.table))
        pairs = tuple(zip(self.zeros[::2], self.zeros[1::2], strict=True))
        k_grid = tuple(n - before - after for n, (before, after) in zip(k[1:-2], pairs, strict=True))
        about = None if table is None else (self.bias_spec, tuple(table[1:]))
        return Geometry(self.spec, tuple(q[1:-2]), k_grid, tuple(self.q_start), pairs, about)

    @property
    def shows_nothing(self) -> bool:
        """Whether the batch is empty, or the table of blocks lists nothing: no kernel need ever see a size of 0."""
        return self.q.shape[0] == 0 or (self.blocks is not None and self.blocks.shape[-1] == 0)

    def shapes(self) -> Inputs:
        """The same with shapes in place of tensors."""
        tensors: dict[str, Any] = {name: getattr(self, name) for name in ("q", "k", "v", "table", "valid", "blocks")}
        shapes: dict[str, Any] = {name: None if t is None else t.shape for name, t in tensors.items()}
        return replace(self, **shapes)

    def call(self) -> Call:
        """What the operator was asked for, as it was put to the backend."""
        return Call(
            self.q, self.k, self.v,
            Blocks(self.blocks, tuple(self.block)) if self.block else parse(self.spec),
            self.scale,
            table=None if self.table is None else HeadTable(self.table, parse(self.bias_spec)),
            valid=self.valid,
            q_start=tuple(self.q_start),
            zeros=tuple(zip(self.zeros[::2], self.zeros[1::2], strict=True)),
            need_lse=True,
            device=self.q.device,
        )  # fmt: skip


Forward = Callable[[Inputs, bool], tuple[Tensor, Tensor]]
Backward = Callable[[Inputs, Tensor, Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor, Tensor, Tensor | None]]


def arguments(call: Call) -> tuple:
    """The arguments of an operator for a call."""
    routed = call.pattern.as_blocks(call.rank)
    return (
        call.q, call.k, call.v,
        call.table.table if call.table else None,
        call.valid,
        routed.table if routed else None,
        list(routed.sizes) if routed else [],
        "" if routed else call.pattern.spec,
        call.table.pattern.spec if call.table else "",
        list(call.q_start),
        [n for pair in call.zeros for n in pair],
        call.scale,
        call.need_lse or call.expects_backward,
    )  # fmt: skip


def run(operator: CustomOpDef, call: Call) -> tuple[Tensor, Tensor | None]:
    """What an operator gives for a call."""
    out, lse = operator(*arguments(call))
    return out, lse if call.need_lse else None


def define(
    name: str,
    forward: Forward,
    backward: Backward,
    flops: Callable[[Inputs], int],
    backward_flops: Callable[[Inputs], int],
) -> tuple[CustomOpDef, CustomOpDef]:
    """Make two functions into the operators ``regard::<name>`` and ``regard::<name>_backward``.

    Args:
        name: of the forward operator.
        forward: from inputs that show something, and whether the log-sum-exp is needed, to the output
            ``(batch, *q_grid, heads, value_dim)`` and the log-sum-exp ``(batch, *q_grid, heads)``, empty if not needed.
        backward: from such inputs, the output, its log-sum-exp, their gradients (the second may be None), and whether that of
            the table is needed, to the gradients of q, k, v and of the table (None if not needed).
        flops, backward_flops: from inputs with shapes in place of tensors.
    """

    def attention(*given):
        x, need_lse = Inputs(*given[:-1]), given[-1]
        if not x.shows_nothing:
            return forward(x, need_lse)
        lse = lse_like(x.q).fill_(-torch.inf)
        return x.q.new_zeros((*x.q.shape[:-1], x.v.shape[-1])), lse if need_lse else lse.new_empty(0)

    def attention_backward(grad_out, grad_lse, *given):
        x, out, lse, need_table = Inputs(*given[:6], *given[8:-1]), given[6], given[7], given[-1]
        if x.shows_nothing:
            dq, dk, dv = (t.new_zeros(t.shape) for t in (x.q, x.k, x.v))
            dtable = None if x.table is None or not need_table else x.table.new_zeros(x.table.shape)
        else:
            dq, dk, dv, dtable = backward(x, out, lse, grad_out, grad_lse, need_table)
        return dq, dk, dv, x.q.new_empty(0) if dtable is None else dtable

    operator = torch.library.custom_op(f"regard::{name}", attention, mutates_args=(), schema=SCHEMA)
    operator_backward = torch.library.custom_op(
        f"regard::{name}_backward", attention_backward, mutates_args=(), schema=BACKWARD_SCHEMA
    )

    @operator.register_fake
    def _(q, k, v, *others):
        lse = lse_like(q)
        return q.new_empty((*q.shape[:-1], v.shape[-1])), lse if others[-1] else lse.new_empty(0)

    @operator_backward.register_fake
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
            define_call = partial(definition.of_tensors, Inputs(*tensors, *ctx.static).call())
            needed = (*ctx.needs_input_grad[:3], False, ctx.needs_input_grad[3])
            dq, dk, dv, _, dtable = gradients(define_call, (*tensors[:3], None, tensors[3]), needed, (grad_out, grad_lse))
            return dq, dk, dv, dtable, *[None] * (3 + len(ctx.static))
        need_table = tensors[3] is not None and ctx.needs_input_grad[3]
        dq, dk, dv, dtable = operator_backward(grad_out, grad_lse, *tensors, out, lse, *ctx.static, need_table)
        return dq, dk, dv, dtable if need_table else None, *[None] * (3 + len(ctx.static))

    operator.register_autograd(autograd, setup_context=setup_context)

    @register_flop_formula(operator._opoverload.overloadpacket)
    def _(*given, **_):
        return flops(Inputs(*given[:12]))

    @register_flop_formula(operator_backward._opoverload.overloadpacket)
    def _(*given, **_):
        return backward_flops(Inputs(*given[2:8], *given[10:16]))

    return operator, operator_backward


def tile_flops(x: Inputs) -> int:
    """FLOPs of a forward on tiles, from shapes."""
    return 2 * x.q[0] * x.q[-2] * _tile_pairs(x) * (x.q[-1] + x.v[-1])


def tile_flops_backward(x: Inputs) -> int:
    """FLOPs of a backward on tiles, from shapes."""
    return 2 * x.q[0] * x.q[-2] * _tile_pairs(x) * (3 * x.q[-1] + 2 * x.v[-1])


def _tile_pairs(x: Inputs) -> int:
    if x.block:
        return x.blocks[2] * x.blocks[3] * math.prod(x.block) ** 2
    return planned(x.geometry._replace(table=None)).computed_pairs
