"""Attention of all pairs by torch's own operator, scaled_dot_product_attention, with the pattern as its mask.

Cost: all pairs of queries and keys, whatever the pattern; the mask and the bias are materialised. That operator does not give
its log-sum-exp: where it is asked for, some queries at a time run by the definition, and again in the backward.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import transforms
from . import definition
from .call import Call
from .definition import SCORES
from .lower import saturated
from .source import HeadTable


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    if call.is_differentiated:
        return definition.run(call)
    call, careful = definition.guarded(call)
    if careful:
        return definition.run_pairs(call)
    if call.need_lse:
        return _run_rows(call)
    q, k, v = (t.flatten(1, -3) for t in (call.q, call.k, call.v))
    width = v.shape[-1]
    if q.device.type == "cpu" and q.shape[-1] != width:
        # the fused kernel takes one width; more zeros change no logit, and no value that is kept
        q, k, v = (F.pad(t, [0, max(width, q.shape[-1]) - t.shape[-1]]) for t in (q, k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    tiny = torch.finfo(torch.promote_types(q.dtype, torch.float32)).tiny  # what is less may be 0 there
    plain = call.bias is None and call.valid is None and call.scale >= tiny  # torch's kernels mask before they scale
    causal = call.pattern.ordered and call.queries == call.keys and plain
    mask = None if causal else call.mask()
    bias = call.dense_bias()
    if bias is not None:
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf)
        bias = saturated(bias, q.dtype)
    out = fused_attention(
        q, k, v,
        attn_mask=_full(mask if bias is None else bias, call),
        dropout_p=call.dropout, is_causal=causal, scale=call.scale, enable_gqa=operator.index(q.shape[1] // k.shape[1]) > 1,
    )  # fmt: skip
    out = out[..., :width]
    if mask is not None and may_be_empty(call):
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    out = out.transpose(1, 2).unflatten(1, call.q_grid)
    return differentiable(call, out), None


def fused_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's operator on ``(batch, heads, tokens, width)``; in exported programs its output lies in memory in that order.

    Its fused and its decomposed form leave other strides, and a view that was recorded of one does not fit the other.
    """
    out = F.scaled_dot_product_attention(q, k, v, **options)
    return out.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else out


def _run_rows(call: Call) -> tuple[Tensor, Tensor | None]:
    """The definition for as many queries at a time as leave ``SCORES`` scores; a graph under trace or transform takes all."""
    if call.batch * call.heads * call.queries * call.keys <= SCORES or transforms.fixed():
        out, lse = definition.attend_rows(call)
        return out.unflatten(1, call.q_grid), lse.unflatten(1, call.q_grid)
    return definition.by_rows(call, SCORES, definition.attend_rows)


def differentiable(call: Call, out: Tensor) -> Tensor:
    """The output of an operator of torch, whose gradient can be differentiated by way of the definition.

    With dropout the definition would drop other weights: torch's formula stays, on a CPU one that can be differentiated.
    """
    if not call.needs_grad or call.dropout or transforms.fixed():
        return out
    none = call.q.new_empty(0)  # the tensors themselves are kept by autograd
    table = None if call.table is None else HeadTable(none, call.table.pattern)
    bare = replace(call, q=none, k=none, v=none, bias=None, table=table)
    return transforms.again(out, partial(_output, bare), *call.carriers)


def _output(call: Call, *tensors: Tensor) -> tuple[Tensor]:
    return (definition.of_tensors(call, *tensors)[0],)


def may_be_empty(call: Call) -> bool:
    """Whether a query may see no key at all: every static separable pattern shows a query at least one."""
    return call.valid is not None or not call.pattern.static or call.pattern.as_joined() is not None


def _full(mask: Tensor | None, call: Call) -> Tensor | None:
    """The fused kernels take masks whose last two axes are full."""
    return None if mask is None else mask.expand(*mask.shape[:2], call.queries, call.keys)
