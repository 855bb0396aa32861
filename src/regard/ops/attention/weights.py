"""Exact attention weights of chosen queries, whatever pattern, sources and backend the attention itself uses.

    weights[query, key] = exp(scale q k^T + bias - lse[query])   where the pattern shows the key, else 0

Cost: rows times all keys, in chunks of rows. Reads only: nothing in :func:`attend` stores or edits weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import INTEGERS, LARGEST, check_choice, check_integer, check_tensor, shown
from ..calls import definition
from ..calls.call import Call
from ..calls.lower import break_up, check_sink
from ..calls.merging import shares_of
from ..calls.observe import Record
from ..calls.source import Source

CHUNK = 1 << 24
"""Weights computed at once."""

REDUCTIONS = ("heads", "rows")


def attend_weights(
    q: Tensor,
    sources: Sequence[Source],
    *,
    rows: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    sink: Tensor | float | None = None,
    q_start: int | Sequence[int] = 0,
    reduce: str | None = None,
) -> list[Tensor]:
    """The attention weights that ``attend(q, sources, ...)`` multiplies the values with; differentiable.

    Args:
        q: queries ``(batch, *grid, heads, head_dim)``.
        sources: as in :func:`regard.attend`; they compete in one softmax.
        rows: row-major indices of the queries to look at; all by default.
        scale, sink, q_start: as in :func:`regard.attend`.
        reduce: ``"heads"`` averages over heads, ``"rows"`` over the chosen queries (how much attention each key gets).

    Returns:
        For each source ``(batch, heads, rows, *k_grid)`` in float32 (float64 for float64), less the axis that was reduced.
        A row sums to one over all sources, the sink and the zero keys of ``border="zero"`` and ``pad="zero"`` (which are
        counted but not shown); a row that sees nothing is 0.

    Raises:
        ValueError: as in :func:`regard.attend`; rows outside the query grid; an unknown reduction.
    """
    if reduce is not None:
        check_choice("reduce", reduce, REDUCTIONS)
    broken = break_up(q, sources, scale=scale, q_start=q_start, dropout=0.0, need_lse=True)
    check_sink(q, sink)
    chosen = _rows(q, rows)
    keys = sum(call.keys for group in broken for _, call in group)
    step = max(1, CHUNK // max(1, q.shape[0] * q.shape[-2] * keys))
    parts = [_reduced(_weights(q, broken, chunk, sink), reduce) for chunk in chosen.split(step)]
    if reduce == "rows":
        totals = [sum(part[1:], part[0]) / len(chosen) for part in zip(*parts, strict=True)]
    else:
        totals = [torch.cat(part, -2) for part in zip(*parts, strict=True)]
    return [t.unflatten(-1, s.k.shape[1:-2]) for t, s in zip(totals, sources, strict=True)]


def weights_of(record: Record, rows: Tensor | Sequence[int] | None = None, reduce: str | None = None) -> list[Tensor]:
    """The weights of an observed attention; see :func:`attend_weights`."""
    return attend_weights(
        record.q, record.sources, rows=rows, scale=record.scale, sink=record.sink, q_start=record.q_start, reduce=reduce
    )


def _rows(q: Tensor, rows: Tensor | Sequence[int] | None) -> Tensor:
    queries = q.shape[1:-2].numel()
    if rows is None:
        return torch.arange(queries, device=q.device)
    if isinstance(rows, Tensor):
        chosen = check_tensor("rows", rows, INTEGERS, what="of indices of queries").to(q.device, torch.long)
    elif isinstance(rows, (str, bytes)) or not isinstance(rows, Sequence):
        raise TypeError(f"rows must be indices of queries; got {shown(rows)}")
    else:
        indices = [check_integer(f"rows[{i}]", row, -LARGEST) for i, row in enumerate(rows)]
        chosen = torch.tensor(indices, dtype=torch.long, device=q.device)
    if chosen.ndim != 1 or not len(chosen) or int(chosen.min()) < 0 or int(chosen.max()) >= queries:
        raise ValueError(f"rows must be indices of queries, at least one, each in 0..{queries - 1}; got {rows!r}")
    return chosen


def _weights(q: Tensor, broken, rows: Tensor, sink: Tensor | float | None) -> list[Tensor]:
    """For each source the weights ``(batch, heads, rows, keys)`` of some rows."""
    within, lses = [], []
    for group in broken:
        results = [(heads, *_within(call, rows)) for heads, call in group]
        heads = [head for covered, *_ in results for head in covered or range(q.shape[-2])]
        index = torch.tensor(heads, device=q.device)
        weights, lse = torch.cat([w for _, w, _ in results], 1), torch.cat([s for *_, s in results], 1)
        shape = (len(weights), q.shape[-2], len(rows))
        within.append(weights.new_zeros(*shape, weights.shape[-1]).index_copy(1, index, weights))
        lses.append(lse.new_full(shape, -torch.inf).index_copy(1, index, lse))
    if sink is not None:
        logit = torch.as_tensor(sink, dtype=lses[0].dtype, device=q.device).reshape(-1, 1)
        lses.append(logit.expand_as(lses[0]))
    shares, _ = shares_of(lses)
    return [w * share.unsqueeze(-1) for w, share in zip(within, shares, strict=False)]  # the sink has no keys


def _within(call: Call, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``(batch, heads, rows, keys)`` among the keys of one call, without its zero keys, and the lse with them."""
    call, careful = definition.guarded(call)
    weights, lse = definition.normalise((definition.pair_logits if careful else definition.logits)(call, rows))
    if any(any(pair) for pair in call.zeros):
        inside = tuple(slice(before, before + n) for (before, _), n in zip(call.zeros, call.k_grid, strict=True))
        weights = weights.unflatten(-1, call.padded_grid)[(..., *inside)].flatten(3)
    return weights, lse


def _reduced(weights: list[Tensor], reduce: str | None) -> list[Tensor]:
    if reduce == "heads":
        return [w.mean(1) for w in weights]
    return [w.sum(2) for w in weights] if reduce == "rows" else weights
