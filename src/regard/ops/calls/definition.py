"""The definition of softmax attention: explicit logits, softmax and weighted sum, in at least float32. Slow, large, and right.

What a query does not see never reaches it, whatever it is: 0 times NaN is NaN, so where a value is not finite and a pair is
hidden, products are taken pair by pair (:func:`run_pairs`), for some queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import transforms
from ..transforms import is_finite, readable
from .call import Call
from .heads import repeat_heads
from .source import HeadTable

PAIRS = 1 << 24
"""Products of pairs that are held at once."""
SCORES = 1 << 26
"""Scores that are held at once."""


def exactly(device: torch.device):
    """Without autocasting, where it is on."""
    active = torch.is_autocast_enabled(device.type) if device.type != "meta" else False
    return torch.autocast(device.type, enabled=False) if active else nullcontext()


def lse_like(q: Tensor) -> Tensor:
    """An uninitialised log-sum-exp for queries ``(batch, *grid, heads, dim)``."""
    return q.new_empty(q.shape[:-1], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


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


def guarded(call: Call) -> tuple[Call, bool]:
    """What every backend that multiplies hidden pairs asks first: the call, and whether it must be computed pair by pair.

    On a CPU the values are looked at. In graphs, under ``torch.vmap`` and on devices that would have to be waited for they are
    not: there keys and values that do not exist are set to 0, and those that some queries do not see must be finite.
    """
    if call.pattern.sees_all and call.valid is None and call.bias is None:
        return call, False  # nothing is hidden
    if readable(call.q):
        return call, not all(is_finite(t) for t in (call.q, call.k, call.v)) or not _plain_bias(call)
    if call.valid is None:
        return call, False
    missing = ~call.valid[..., None, None]
    return replace(call, k=call.k.masked_fill(missing, 0.0), v=call.v.masked_fill(missing, 0.0)), False


def _plain_bias(call: Call) -> bool:
    """Whether the bias holds neither NaN nor ``inf``; ``-inf`` hides a key."""
    return all(t is None or float(t.detach().sum(dtype=torch.float64)) < torch.inf for t in call.carriers[3:])


def normalise(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax weights and log-sum-exp of each row; a row of ``-inf`` gives weights 0 and lse ``-inf``."""
    hidden = scores == -torch.inf
    empty = hidden.all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    weights = torch.softmax(scores, -1).masked_fill(hidden, 0.0)  # also in a row that saw NaN
    return weights, torch.logsumexp(scores, -1).masked_fill(empty.squeeze(-1), -torch.inf)


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    call, careful = guarded(call)
    if careful:
        return run_pairs(call)
    out, lse = attend_rows(call)
    return out.unflatten(1, call.q_grid), lse.unflatten(1, call.q_grid) if call.need_lse else None


def run_pairs(call: Call) -> tuple[Tensor, Tensor | None]:
    """The definition with every product of a hidden pair left out, not multiplied by 0."""
    out, lse = by_rows(call, PAIRS // max(call.q.shape[-1], call.v.shape[-1]), _attend_pairs)
    return out, lse if call.need_lse else None


def by_rows(call: Call, scores: int, function: Callable[[Call, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp, for as many queries at a time as leave ``scores``; again in the backward."""
    every = torch.arange(call.queries, device=call.q.device)
    parts = []
    for rows in [every] if transforms.fixed() else every.split(_rows(call, scores)):
        if len(rows) < call.queries and call.needs_grad:
            parts.append(checkpoint(function, call, rows, use_reentrant=False))
        else:
            parts.append(function(call, rows))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1).unflatten(1, call.q_grid), torch.cat(lses, 1).unflatten(1, call.q_grid)


def _rows(call: Call, scores: int) -> int:
    return max(1, scores // (call.batch * call.heads * call.keys))


def pair_logits(call: Call, rows: Tensor) -> Tensor:
    """:func:`logits` pair by pair."""
    parts = rows.split(_rows(call, PAIRS // call.q.shape[-1]))
    return torch.cat([_pair_logits(call, part, _seen(call, part)) for part in parts], 2)


def _pair_logits(call: Call, rows: Tensor, seen: Tensor) -> Tensor:
    q, k = _heads_first(call, call.q)[:, :, rows], _heads_first(call, call.k)
    none = q.new_zeros(())
    scores = (torch.where(seen, q.unsqueeze(3), none) * torch.where(seen, k.unsqueeze(2), none)).sum(-1) * call.scale
    bias = call.dense_bias(rows)
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    return scores.masked_fill(~seen.squeeze(-1), -torch.inf)


def _attend_pairs(call: Call, rows: Tensor) -> tuple[Tensor, Tensor]:
    seen = _seen(call, rows)
    weights, lse = normalise(_pair_logits(call, rows, seen))
    weights, v = F.dropout(weights, call.dropout), _heads_first(call, call.v)
    out = (weights.unsqueeze(-1) * torch.where(seen, v.unsqueeze(2), v.new_zeros(()))).sum(3)
    return out.transpose(1, 2).to(call.q.dtype), lse.transpose(1, 2)


def _seen(call: Call, rows: Tensor) -> Tensor:
    """Visible pairs ``(batch, heads, queries, keys, 1)``; a bias of ``-inf`` hides as the pattern does."""
    seen, bias = call.mask(rows), call.dense_bias(rows)
    if bias is not None:
        seen = bias != -torch.inf if seen is None else seen & (bias != -torch.inf)
    shape = (call.batch, call.heads, len(rows), call.keys)
    seen = call.k.new_ones(1, 1, 1, 1, dtype=torch.bool) if seen is None else seen
    return seen.expand(shape).unsqueeze(-1)


def _heads_first(call: Call, tensor: Tensor) -> Tensor:
    """``(batch, heads of the queries, tokens, dim)``, in the type of the statistics."""
    kind = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    return repeat_heads(tensor.flatten(1, -3).to(kind), call.heads).transpose(1, 2)


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
