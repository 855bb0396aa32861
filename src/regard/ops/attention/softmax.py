"""The front door: softmax attention of queries to one or several sources.

    attend(q, k, v, pattern) = softmax over visible keys (scale q k^T + bias) v

Source: Vaswani et al., arXiv:1706.03762; every pattern states its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...checks import check_flag, shown
from ..backends.choice import run
from ..calls.lower import Group, break_up, check_sink, check_sources, join_dense, starts
from ..calls.merging import merge, shares_of
from ..calls.observe import OBSERVERS, Record
from ..calls.source import Bias, Source
from ..patterns import Dense, Pattern


def attend(
    q: Tensor,
    k: Tensor | Sequence[Source],
    v: Tensor | None = None,
    pattern: Pattern | str = Dense(),
    *,
    bias: Bias | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    sink: Tensor | float | None = None,
    q_start: int | Sequence[int] = 0,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the keys that ``pattern`` makes visible, or over all keys of a list of sources.

    Args:
        q: queries ``(batch, *grid, heads, head_dim)``; the grid is ``(L,)``, ``(H, W)``, ``(T, H, W)`` or of any rank.
        k: keys ``(batch, *grid, kv_heads, head_dim)``, on their own grid; ``kv_heads`` divides ``heads``. Or a list of
            :class:`Source`, which compete in one softmax as a multiset; ``v``, ``pattern``, ``bias`` and ``valid`` are then
            theirs to give.
        v: values ``(batch, *grid, kv_heads, value_dim)``.
        pattern: which keys each query sees; a pattern or its text form.
        bias: added to the scaled logits, see :class:`Source`. Always gets its gradient.
        valid: ``(batch, *grid)`` boolean, True where a key exists.
        scale: factor on the logits; None is ``head_dim ** -0.5``.
        sink: logit of an extra key with value zero, a number or one per head, ``(heads,)``; ``-inf`` is none, ``inf`` takes
            everything.
        q_start: coordinates of the first query on the key grid (decoding, sharding).
        dropout: probability of dropping an attention weight; the caller passes 0 when not training.
        return_lse: also return the log-sum-exp of each row, ``(batch, *grid, heads)`` in float32 (float64 for float64); it
            carries gradient, see :func:`merge`.
        backend: ``"auto"`` or a name that :func:`regard.backends` lists; a backend that cannot run the call raises.

    Returns:
        ``(batch, *grid, heads, value_dim)`` in the dtype of ``q``. A query that sees no key gives 0, and lse ``-inf``.

    Keys that a query does not see never reach it, even if they are not finite, nor does what a bias holds there; a visible NaN
    makes exactly the queries that see it NaN. ``docs/guide/transforms.md`` has this rule, and which transforms of torch work.

    Raises:
        TypeError: another kind of thing than an argument may be.
        ValueError: shapes, devices, pattern and grids that do not go together, with what was given and what is allowed.
    """
    check_flag("return_lse", return_lse)
    if isinstance(k, Tensor):
        if v is None:
            raise ValueError("attend takes q, k, v and a pattern, or q and a list of sources; v is missing")
        sources: Sequence[Source] = (Source(k, v, pattern, bias=bias, valid=valid),)
    else:
        if isinstance(k, (str, bytes)) or not isinstance(k, Sequence):
            raise TypeError(f"k must be a tensor (batch, *grid, heads, head_dim), or a list of sources; got {shown(k)}")
        sources = tuple(k)
        check_sources(sources)
        if v is not None or bias is not None or valid is not None or pattern != Dense():
            raise ValueError("with a list of sources, v, pattern, bias and valid belong to the sources")
    need_lse = return_lse or sink is not None or len(sources) > 1
    broken = break_up(q, sources, scale=scale, q_start=q_start, dropout=dropout, need_lse=need_lse)
    check_sink(q, sink)
    listeners = _notify(q, sources, broken, sink, starts(q, q_start)) if OBSERVERS else []
    broken = join_dense(broken, sources, return_lse or sink is not None)
    out, lse = _combine(q, broken, sink, return_lse or sink is not None or len(broken) > 1, backend)
    for listener in listeners:
        listener(out)
    if not return_lse:
        return out
    assert lse is not None  # it was asked for
    return out, lse


def _combine(
    q: Tensor, broken: list[Group], sink: Tensor | float | None, need_lse: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    """All sources, and the sink, under one softmax; the log-sum-exp only where it is needed."""
    results = [_assemble(q, group, backend) for group in broken]
    if not need_lse:
        return results[0]
    lses = [lse for _, lse in results if lse is not None]
    out, lse = merge([out for out, _ in results], lses) if len(results) > 1 else (results[0][0], lses[0])
    if sink is not None:
        logit = torch.as_tensor(sink, dtype=lse.dtype, device=lse.device)
        (share, _), lse = shares_of([lse, logit.expand_as(lse)])
        out = out * share.unsqueeze(-1).to(out.dtype)
    return out, lse


def _notify(
    q: Tensor, sources: Sequence[Source], broken: list[Group], sink: Tensor | float | None, start: tuple[int, ...]
) -> list[Callable[[Tensor], object]]:
    """Tell the observers; returns those that want to be told the output."""
    calls = [call for group in broken for _, call in group]
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = None if sink is None else torch.as_tensor(sink, dtype=kind, device=q.device)
    record = Record(q, sources, calls, calls[0].scale, logits, start)
    answers = [observer(record) for observer in tuple(OBSERVERS)]  # other threads come and go meanwhile
    return [answer for answer in answers if answer is not None]


def _assemble(q: Tensor, group: Group, backend: str) -> tuple[Tensor, Tensor | None]:
    """Run the calls of one source and put the heads they cover together."""
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for _, call in group:
        out, lse = run(call, backend)
        outs.append(out.reshape(*q.shape[:-2], *out.shape[-2:]))
        if lse is not None:
            lses.append(lse.reshape(outs[-1].shape[:-1]))
    if len(group) == 1 and group[0][0] is None:
        return outs[0], lses[0] if lses else None
    covered = [head for heads, _ in group for head in heads or ()]
    out, lse = torch.cat(outs, -2), torch.cat(lses, -1) if lses else None
    total = q.shape[-2]
    if covered == list(range(total)):
        return out, lse
    index = torch.tensor(covered, device=q.device)
    full = out.new_zeros(*out.shape[:-2], total, out.shape[-1]).index_copy(-2, index, out)
    if lse is not None:
        lse = lse.new_full((*lse.shape[:-1], total), -torch.inf).index_copy(-1, index, lse)
    return full, lse
