"""Attention the other way round: queries send values to the keys they see, with the weights of softmax attention.

    y[key] = sum_query P[query, key] v[query],   P = softmax over keys (scale q k^T)

A key may receive any mass; what each query sends sums to one. With lse the log-sum-exp of each query's row, the column of a
key is exp(scale q k - lse), so that y is an attention of keys over queries, with -lse added to the logits, times its own
exp(lse): two attentions, on any backend, with exact gradients; one where the lse is known from gathering along the same rows.

Cost: twice that of the attention, once with a known lse. Source: Ding et al., DependencyViT, arXiv:2304.03282.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_number, check_tensor, check_tensors
from ..calls.definition import exactly
from ..calls.lower import check_scale
from ..calls.observe import WATCHERS, Weighing, parts_of
from ..calls.source import Source
from ..patterns import Dense, Pattern, as_pattern
from .softmax import attend
from .weights import CHUNK, attend_weights


def attend_transposed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | str = Dense(),
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Send the values of queries to the keys they see: the transposed attention matrix times ``v``.

    A weight per sender is a factor on its value.

    Args:
        q: queries ``(batch, *q_grid, heads, head_dim)``.
        k: keys ``(batch, *k_grid, heads, head_dim)``.
        v: what each query sends, ``(batch, *q_grid, heads, value_dim)``.
        pattern: which keys each query sees. :class:`Dense` and :class:`Clusters` take any two grids, others one grid.
        scale: factor on the logits; None is ``head_dim ** -0.5``.
        lse: ``(batch, *q_grid, heads)``, the log-sum-exp of each query's row, where :func:`regard.attend` has returned it for
            the same queries, keys, pattern and scale; it is computed otherwise.
        dropout: probability of dropping a weight, after the softmax.
        backend: of both attentions, see :func:`regard.attend`.

    Returns:
        ``(batch, *k_grid, heads, value_dim)`` in the dtype of ``v``; a key that no query sees gets 0.

    Raises:
        ValueError: shapes that do not go together; a pattern on two different grids; an lse of another shape.
    """
    check_tensors(q=q, k=k, v=v, mixed=True)
    if q.ndim < 4 or k.ndim < 4 or q.shape[:-1] != v.shape[:-1] or q.shape[-2:] != k.shape[-2:] or q.shape[0] != k.shape[0]:
        raise ValueError(
            "v must stand on the queries and k must have the heads of q; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    pattern = as_pattern(pattern)
    if (groups := pattern.head_groups()) and (heads := sum(n for _, n in groups)) != q.shape[-2]:
        raise ValueError(f"{pattern!r} is for {heads} heads; q has {q.shape[-2]}")
    q_grid, k_grid = tuple(q.shape[1:-2]), tuple(k.shape[1:-2])
    if q_grid != k_grid and not pattern.across_grids:
        raise ValueError(f"{pattern!r} sends values within one grid; got queries {q_grid}, keys {k_grid}")
    scale = check_scale(q, scale)
    check_number("dropout", dropout, 0.0, below=1.0)
    if lse is not None and check_tensor("lse", lse, device=q.device).shape != q.shape[:-1]:
        raise ValueError(f"lse must be one number per query and head, {tuple(q.shape[:-1])}; got {tuple(lse.shape)}")
    if not WATCHERS:
        return _send(q, k, v, pattern, scale, lse, dropout, backend)
    with parts_of(_weighing(q, k, pattern, scale)):
        return _send(q, k, v, pattern, scale, lse, dropout, backend)


def _send(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, lse: Tensor | None, dropout: float, backend: str
) -> Tensor:
    if lse is None:
        _, lse = attend(q, k, k[..., :1], pattern, scale=scale, return_lse=True, backend=backend)
    lse = lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)  # a query that sees nothing is seen by nothing
    with exactly(q.device):  # the lse is one more channel: half precision would round it
        senders = torch.cat([q.to(lse.dtype), -lse], -1)
        receivers = torch.cat([k.to(lse.dtype) * scale, torch.ones_like(k[..., :1], dtype=lse.dtype)], -1)
        turned = pattern.transposed()
        y, mass = attend(
            receivers, senders, v.to(lse.dtype), turned, scale=1.0, dropout=dropout, return_lse=True, backend=backend
        )
    return (y * mass.exp().unsqueeze(-1)).to(v.dtype)


def _weighing(q: Tensor, k: Tensor, pattern: Pattern, scale: float) -> Weighing:
    """What each key gets of what each query sends."""

    def weights(rows: Tensor) -> Tensor:
        every = torch.arange(q.shape[1:-2].numel(), device=q.device)
        step = max(1, CHUNK // max(1, q.shape[0] * q.shape[-2] * k.shape[1:-2].numel()))
        sent = [
            attend_weights(q, [Source(k, k, pattern)], rows=chunk, scale=scale)[0].flatten(3)[..., rows]
            for chunk in every.split(step)
        ]
        return torch.cat(sent, 2).transpose(2, 3).unflatten(-1, q.shape[1:-2])

    grids = tuple(k.shape[1:-2]), tuple(q.shape[1:-2])
    return Weighing("transposed", q.shape[0], q.shape[-2], *grids, weights, q.device)
