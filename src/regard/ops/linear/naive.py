"""The definition of linear attention: all weights, in at least float32. Slow, large, and right.

    w_ts = decay_ts f(q_t)^T f(k_s),   y_t = scale sum_s w_ts v_s / norm_t

Cost: queries times keys; weights are materialised, a few rows at a time where only they are asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import LinearCall, LinearState
from .norms import divided
from .spans import existing

WEIGHTS = 1 << 24
"""Weights computed at once by :func:`weights`."""


def weights(call: LinearCall, rows: Tensor) -> Tensor:
    """``(batch, heads, rows, keys)``, a few rows at a time."""
    per_row = call.q.shape[0] * call.k.shape[1:-1].numel() * (1 if call.width == 1 else call.width)
    parts = []
    for chunk in rows.split(max(1, WEIGHTS // max(1, per_row))):
        products = _products(call, chunk)
        parts.append(_weighed(call, products, products.sum(-1), chunk))
    return torch.cat(parts, 2)


def _products(call: LinearCall, rows: Tensor) -> Tensor:
    """Weights before the division, ``(batch, heads, rows, keys)``."""
    q, k = _heads_first(call)
    q = q[:, :, rows]
    if call.decay is None:
        products = q @ k.transpose(-2, -1)
    elif call.width == 1:
        products = (q @ k.transpose(-2, -1)) * _left_over(call, rows).squeeze(-1)
    else:
        products = torch.einsum("bhtd,bhsd,bhtsd->bhts", q, k, _left_over(call, rows).expand(len(q), -1, -1, -1, -1))
    if not call.causal:
        return products
    keys = torch.arange(k.shape[2], device=rows.device)
    return products.masked_fill(keys > rows[:, None], 0.0)


def _heads_first(call: LinearCall) -> tuple[Tensor, Tensor]:
    """Features of queries and keys, zeros for missing keys: ``(batch, heads, tokens, features)`` in the dtype of states."""
    q, k = (t.to(call.wide).transpose(1, 2) for t in call.features())
    return q, k


def _sums(call: LinearCall) -> tuple[Tensor, Tensor]:
    """Logarithms of decays up to each token ``(batch, heads, tokens, width)``, and how many of them are infinite."""
    assert call.decay is not None  # the caller looked
    logs = call.decay.double()
    if logs.ndim <= 2:
        logs = logs.reshape(1, 1, logs.shape[0], -1).expand(-1, call.q.shape[1], -1, -1)
    elif logs.ndim == 3:
        logs = logs.unsqueeze(-1)
    logs = logs.transpose(1, 2)
    infinite = logs == -torch.inf
    return logs.masked_fill(infinite, 0.0).cumsum(2), infinite.cumsum(2)


def _left_over(call: LinearCall, rows: Tensor) -> Tensor:
    """How much the tokens between two leave of the earlier one at the later one ``(batch, heads, rows, keys, width)``."""
    sums, infinite = _sums(call)
    between = sums[:, :, rows, None] - sums[:, :, None]
    keys = torch.arange(sums.shape[2], device=rows.device)
    between = between.where((keys <= rows[:, None])[..., None], -between)
    return between.masked_fill(infinite[:, :, rows, None] != infinite[:, :, None], -torch.inf).exp().to(call.wide)


def _weighed(call: LinearCall, sums: Tensor, mass: Tensor, rows: Tensor) -> Tensor:
    """Sums over weights ``(batch, heads, rows, width)`` of some rows, divided (by ``mass``, their sum) and scaled."""
    if call.norm == "sum":
        if call.state is not None and call.state.total is not None:
            mass = mass + torch.einsum("bhtd,bhd->bht", _entering(call)[:, :, rows], call.state.total)
        sums = divided(sums, mass.unsqueeze(-1), call.floor, call.eps)
    elif call.norm == "count":
        count = call.counted().transpose(1, 2)  # (batch, 1, tokens, 1)
        sums = sums / (count[:, :, rows] if call.causal else count)
    return sums * call.per_head


def _entering(call: LinearCall) -> Tensor:
    """Features of queries as they meet the state ``(batch, heads, tokens, features)``."""
    return _heads_first(call)[0] * _past(call)


def _past(call: LinearCall) -> Tensor:
    """How much is left of the state at each token, ``(1 or batch, 1 or heads, 1 or tokens, 1 or features)``."""
    if call.decay is None:
        return call.q.new_ones(1, 1, 1, 1, dtype=call.wide)
    sums, infinite = _sums(call)
    return sums.masked_fill(infinite > 0, -torch.inf).exp().to(call.wide)


def attend_all(call: LinearCall, v: Tensor) -> tuple[Tensor, LinearState | None]:
    """The definition, all weights at once."""
    rows, wide = torch.arange(call.q.shape[1], device=v.device), existing(v, call.valid).to(call.wide)
    products = _products(call, rows)
    y = torch.einsum("bhts,bshe->bhte", products, wide)
    if call.state is not None:
        y = y + _entering(call) @ call.state.memory
    y = _weighed(call, y, products.sum(-1), rows).transpose(1, 2)
    if call.decay is not None and not call.causal:
        return y, None
    k, past = _heads_first(call)[1], _past(call)[:, :, -1]
    if call.decay is not None:
        k = k * _left_over(call, rows[-1:]).squeeze(2)
    memory, total = torch.einsum("bhsd,bshe->bhde", k, wide), k.sum(2)
    if call.state is not None:
        memory = memory + call.state.memory * past[..., None]
        total = total if call.state.total is None else total + call.state.total * past
    return y, state_after(call, memory, total)


def state_after(call: LinearCall, memory: Tensor, total: Tensor | None) -> LinearState:
    """What all keys so far leave to later queries."""
    count = None
    if call.norm == "count":
        count = call.present.sum(1).expand(call.k.shape[0])
        if call.state is not None and call.state.keys is not None:
            count = count + call.state.keys
    return LinearState(memory, total if call.norm == "sum" else None, count)


def scan_definition(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, valid: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """:func:`regard.ops.linear.chunks.linear_scan` by the definition."""
    before = None if state is None else LinearState(state)
    call = LinearCall(q, k, activation, "none", None, 0.0, True, decay, 1.0, valid, before)
    y, final = attend_all(call, v)
    assert final is not None  # in order there is a state
    return y.to(v.dtype), final.memory
