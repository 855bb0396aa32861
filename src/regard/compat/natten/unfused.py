"""Neighborhood attention in two halves, as NATTEN had it up to version 0.17: scores as a tensor, and sums weighted by them.

    na2d_qk: attn[b, h, p, t] = q[b, h, p] . k[b, h, n(p, t)] + rpb[h, n(p, t) - p]
    na2d_av: y[b, h, p] = sum_t attn[b, h, p, t] v[b, h, n(p, t)]

Tensors are ``(batch, heads, *grid, dim)``, the taps ``t`` in row-major order of the window. No scale is applied.

Cost: see :mod:`regard.ops.local.neighbors`. Source: Hassani et al., NAT arXiv:2204.07143, DiNAT arXiv:2209.15001.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...checks import check_tensor, shown
from ...ops.local.neighbors import neighbor_bias, neighbor_scores, neighbor_sum
from .arguments import Flags, Sizes, check_each, named, neighborhood

__all__ = [
    "na1d_av",
    "na1d_qk",
    "na2d_av",
    "na2d_qk",
    "na3d_av",
    "na3d_qk",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
]


def _qk(rank: int) -> Callable[..., Tensor]:
    def qk(
        query: Tensor,
        key: Tensor,
        kernel_size: Sizes,
        dilation: Sizes | None = 1,
        additional_keys: Tensor | None = None,
        is_causal: Flags | None = False,
        rpb: Tensor | None = None,
    ) -> Tensor:
        """Scores of each query with its neighbours, and with additional keys after them.

        Args:
            query: ``(batch, heads, *grid, dim)``, scaled by the caller.
            key: of the same shape.
            kernel_size: at least 2, a number or one per axis, as the next.
            dilation: step between keys; ``kernel_size * dilation`` must fit into the grid.
            additional_keys: ``(batch, heads, tokens, dim)``.
            is_causal: axes on which a query sees only itself and what precedes it; taps without a key score ``-inf``.
            rpb: relative biases ``(heads, *(2 * kernel_size - 1))``.

        Returns:
            ``(batch, heads, *grid, taps + tokens)``.

        Raises:
            ValueError: shapes that do not go together, or arguments out of range.
        """
        check_each(query=query, key=key)
        if query.ndim != rank + 3 or query.shape != key.shape:
            raise ValueError(
                f"query and key must be (batch, heads, *grid, dim) with {rank + 3} axes; "
                f"got {tuple(query.shape)} and {tuple(key.shape)}"
            )
        if rpb is not None and check_tensor("rpb", rpb, device=query.device).shape[:1] != query.shape[1:2]:
            known = rpb.shape[0] if rpb.ndim else "no"
            raise ValueError(f"rpb is for {known} heads; query (batch, heads, *grid, dim) is {tuple(query.shape)}")
        pattern = neighborhood(query.shape[2:-1], kernel_size, dilation, is_causal)
        scores = neighbor_scores(query.movedim(1, -2), key.movedim(1, -2), pattern)
        if rpb is not None:
            scores = scores + neighbor_bias(rpb.to(key.dtype), pattern, query.shape[2:-1])
        scores = scores.movedim(-2, 1)
        if additional_keys is None:
            return scores
        _check_additional(additional_keys, query)
        others = torch.matmul(query.flatten(2, -2), additional_keys.mT).unflatten(2, query.shape[2:-1])
        return torch.cat([scores, others], -1)

    return named(f"na{rank}d_qk", qk)


def _av(rank: int) -> Callable[..., Tensor]:
    def av(
        attn: Tensor,
        value: Tensor,
        kernel_size: Sizes,
        dilation: Sizes | None = 1,
        additional_values: Tensor | None = None,
        is_causal: Flags | None = False,
    ) -> Tensor:
        """Sums of the neighbours' values, and of additional values, weighted by attention.

        Args:
            attn: weights ``(batch, heads, *grid, taps + tokens)``; those of taps without a key do not count.
            value: ``(batch, heads, *grid, dim)``.
            additional_values: ``(batch, heads, tokens, dim)``.
            kernel_size, dilation, is_causal: as they were for the scores.

        Returns:
            ``(batch, heads, *grid, dim)`` in the dtype of ``value``.

        Raises:
            ValueError: shapes that do not go together, or arguments out of range.
        """
        check_each(attn=attn, value=value)
        if value.ndim != rank + 3 or attn.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"attn and value must be (batch, heads, *grid, taps) and (batch, heads, *grid, dim) with {rank + 3} axes; "
                f"got {tuple(attn.shape)} and {tuple(value.shape)}"
            )
        pattern = neighborhood(value.shape[2:-1], kernel_size, dilation, is_causal)
        attn = attn.to(value.dtype)
        others = None
        if additional_values is not None:
            _check_additional(additional_values, value)
            tokens = additional_values.shape[2]
            if attn.shape[-1] < tokens:
                raise ValueError(f"attn must have weights for {tokens} additional tokens; got {shown(attn)}")
            attn, others = attn.split([attn.shape[-1] - tokens, tokens], -1)
        out = neighbor_sum(attn.movedim(1, -2), value.movedim(1, -2), pattern).movedim(-2, 1)
        if others is None or additional_values is None:
            return out
        return out + torch.matmul(others.flatten(2, -2), additional_values).unflatten(2, value.shape[2:-1])

    return named(f"na{rank}d_av", av)


def _check_additional(tokens: Tensor, like: Tensor) -> None:
    check_tensor("additional tokens", tokens, (like.dtype,), device=like.device)
    if tokens.ndim != 4 or tokens.shape[:2] != like.shape[:2] or tokens.shape[-1] != like.shape[-1]:
        raise ValueError(
            f"additional tokens must be (batch, heads, tokens, dim) as (batch, heads, *grid, dim) = {tuple(like.shape)}; "
            f"got {tuple(tokens.shape)}"
        )


na1d_qk, na2d_qk, na3d_qk = _qk(1), _qk(2), _qk(3)
na1d_av, na2d_av, na3d_av = _av(1), _av(2), _av(3)


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """:func:`na1d_qk` in the order of arguments of versions before 0.17, as all ``natten*d`` functions."""
    return na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten3dqkrpb(
    query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> Tensor:
    """The first axis has a kernel and a dilation of its own."""
    return na3d_qk(query, key, (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation), rpb=rpb)


def natten1dqk(query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return na1d_qk(query, key, kernel_size, dilation)


def natten2dqk(query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return na2d_qk(query, key, kernel_size, dilation)


def natten3dqk(query: Tensor, key: Tensor, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int) -> Tensor:
    return natten3dqkrpb(query, key, None, kernel_size_d, kernel_size, dilation_d, dilation)


def natten1dav(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return na1d_av(attn, value, kernel_size, dilation)


def natten2dav(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return na2d_av(attn, value, kernel_size, dilation)


def natten3dav(attn: Tensor, value: Tensor, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int) -> Tensor:
    return na3d_av(attn, value, (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation))
