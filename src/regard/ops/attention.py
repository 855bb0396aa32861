"""The front door: softmax attention of queries to one or several sources.

    attend(q, k, v, pattern) = softmax over visible keys (scale q k^T + bias) v

Source: Vaswani et al., arXiv:1706.03762; every pattern states its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import Bias, Call, Source, break_up
from .dispatch import run
from .merging import merge
from .observe import OBSERVERS, Record
from .patterns import Dense, Pattern


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
        sink: logit of an extra key with value zero, a number or one per head.
        q_start: coordinates of the first query on the key grid (decoding, sharding).
        dropout: probability of dropping an attention weight; the caller passes 0 when not training.
        return_lse: also return the log-sum-exp of each row, ``(batch, *grid, heads)`` in float32 (float64 for float64); it
            carries gradient, see :func:`merge`.
        backend: ``"auto"`` or a name that :func:`regard.backends` lists; a backend that cannot run the call raises.

    Returns:
        ``(batch, *grid, heads, value_dim)`` in the dtype of ``q``. A query that sees no key gives 0, and lse ``-inf``.

    Raises:
        ValueError: shapes, dtypes, pattern and grids that do not go together, with what was given and what is allowed.
    """
    if isinstance(k, Tensor):
        if v is None:
            raise ValueError("attend takes q, k, v and a pattern, or q and a list of sources; v is missing")
        sources: Sequence[Source] = (Source(k, v, pattern, bias=bias, valid=valid),)
    else:
        sources = tuple(k)
        if v is not None or bias is not None or valid is not None or pattern != Dense():
            raise ValueError("with a list of sources, v, pattern, bias and valid belong to the sources")
        if not all(isinstance(s, Source) for s in sources):
            raise ValueError(f"expected a list of sources; got {[type(s).__name__ for s in sources]}")
    need_lse = return_lse or sink is not None or len(sources) > 1
    broken = break_up(q, sources, scale=scale, q_start=q_start, dropout=dropout, need_lse=need_lse)
    if OBSERVERS:
        calls = [call for group in broken for _, call in group]
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        sink_logits = None if sink is None else torch.as_tensor(sink, dtype=kind, device=q.device)
        start = tuple(q_start) if isinstance(q_start, (tuple, list)) else (q_start,) + (0,) * (q.ndim - 4)
        record = Record(q, sources, calls, calls[0].scale, sink_logits, start)
        for observer in OBSERVERS:
            observer(record)
    parts = [_assemble(q, group, backend) for group in broken]
    out, lse = parts[0] if len(parts) == 1 else merge([o for o, _ in parts], [s for _, s in parts])
    if sink is not None:
        logit = torch.as_tensor(sink, dtype=lse.dtype, device=lse.device)
        out = out * torch.sigmoid(lse - logit).unsqueeze(-1).to(out.dtype)
        lse = torch.logaddexp(lse, logit.expand_as(lse))
    return (out, lse) if return_lse else out


def _assemble(q: Tensor, group: list[tuple[tuple[int, ...] | None, Call]], backend: str) -> tuple[Tensor, Tensor | None]:
    """Run the calls of one source and put the heads they cover together."""
    results = []
    for heads, call in group:
        out, lse = run(call, backend)
        out = out.reshape(*q.shape[:-2], *out.shape[-2:])
        results.append((heads, out, None if lse is None else lse.reshape(out.shape[:-1])))
    if len(results) == 1 and results[0][0] is None:
        return results[0][1], results[0][2]
    covered = [head for heads, _, _ in results for head in heads or ()]
    out = torch.cat([o for _, o, _ in results], -2)
    lse = None if results[0][2] is None else torch.cat([s for _, _, s in results], -1)
    total = q.shape[-2]
    if covered == list(range(total)):
        return out, lse
    index = torch.tensor(covered, device=q.device)
    full = out.new_zeros(*out.shape[:-2], total, out.shape[-1]).index_copy(-2, index, out)
    if lse is not None:
        lse = lse.new_full((*lse.shape[:-1], total), -torch.inf).index_copy(-1, index, lse)
    return full, lse
