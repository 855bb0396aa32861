"""The definition: explicit logits, softmax and weighted sum, in at least float32. Slow, large, and right."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call, HeadTable
from ..heads import repeat_heads


def supports(call: Call) -> str | None:
    return None


def exactly(device: torch.device):
    """Without autocasting, where it is on."""
    active = torch.is_autocast_enabled(device.type) if device.type != "meta" else False
    return torch.autocast(device.type, enabled=False) if active else nullcontext()


def logits(call: Call, rows: Tensor | None = None) -> Tensor:
    """Scaled and biased logits ``(batch, heads, queries, keys)``, ``-inf`` where a key is not visible."""
    kind = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    q = call.q.flatten(1, -3)
    q = (q if rows is None else q[:, rows]).to(kind)
    k = repeat_heads(call.k.flatten(1, -3).to(kind), call.heads)
    with exactly(q.device):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * call.scale
    bias = call.dense_bias(rows)
    if bias is not None:
        scores = scores + bias.to(kind)
    mask = call.mask(rows)
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def normalise(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax weights and log-sum-exp of each row; a row of ``-inf`` gives weights 0 and lse ``-inf``."""
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(empty, 0.0), -1, keepdim=True)
    weights = torch.exp(scores.masked_fill(empty, -torch.inf) - lse)
    return weights, lse.masked_fill(empty, -torch.inf).squeeze(-1)


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    out, lse = attend_rows(call)
    return out.unflatten(1, call.q_grid), lse.unflatten(1, call.q_grid) if call.need_lse else None


def of_tensors(
    call: Call, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The definition as a function of the tensors that carry gradients."""
    offsets = None if table is None or call.table is None else HeadTable(table, call.table.pattern)
    return run(replace(call, q=q, k=k, v=v, bias=bias, table=offsets))


def attend_rows(call: Call, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output ``(batch, rows, heads, value_dim)`` and log-sum-exp ``(batch, rows, heads)`` of some queries, by default all."""
    weights, lse = normalise(logits(call, rows))
    weights = F.dropout(weights, call.dropout)
    v = repeat_heads(call.v.flatten(1, -3).to(weights.dtype), call.heads)
    with exactly(v.device):
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v).to(call.q.dtype)
    return out, lse.transpose(1, 2)
