"""NATTEN's functions: fused attention of version 0.21, and the two halves that versions up to 0.17 had.

    na2d(query, key, value, kernel_size, ...) = softmax over the neighbourhood (scale q k^T) v

Tensors of the fused functions are ``(batch, *grid, heads, head_dim)``. Arguments that choose a kernel of NATTEN or its tiles
are accepted and change nothing: :mod:`regard.ops` has its own backends.

Source: Hassani et al., NAT arXiv:2204.07143, FNA arXiv:2403.04690, GNA arXiv:2504.16922.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...checks import INTEGERS, check_flag, check_tensor, shown
from ...ops import Source, attend, merge
from ...ops.patterns import Causal, Dense
from .arguments import Flags, Sizes, check_each, check_scale, named, neighborhood
from .unfused import (
    na1d_av,
    na1d_qk,
    na2d_av,
    na2d_qk,
    na3d_av,
    na3d_qk,
    natten1dav,
    natten1dqk,
    natten1dqkrpb,
    natten2dav,
    natten2dqk,
    natten2dqkrpb,
    natten3dav,
    natten3dqk,
    natten3dqkrpb,
)
from .utils.varlen import generate_varlen_parameters

__all__ = [
    "attention",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
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
    "neighborhood_attention_generic",
]

Output = Tensor | tuple[Tensor, Tensor]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Output:
    """Dense attention of sequences, or of several sequences packed into one.

    The lengths of packed sequences are read, which breaks a compiled graph in two.

    Args:
        query: ``(batch, tokens, heads, head_dim)``.
        key: ``(batch, kv_tokens, kv_heads, head_dim)``; ``kv_heads`` divides ``heads``.
        value: ``(batch, kv_tokens, kv_heads, value_dim)``.
        is_causal: query ``i`` sees the keys ``0 .. i``, also where there are more or fewer keys than queries.
        scale: factor on the logits; None and 0 are ``head_dim ** -0.5``.
        seqlens_Q, seqlens_KV: tokens of each packed sequence (int32); the batch is then 1.
        cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV: the same, summed up beforehand with
            :func:`regard.compat.natten.utils.varlen.generate_varlen_parameters`.
        return_lse: also return the log-sum-exp ``(batch, tokens, heads)``.

    Every other argument changes nothing.

    Returns:
        ``(batch, tokens, heads, value_dim)``.

    Raises:
        ValueError: shapes that do not go together, or lengths that do not add up to the tokens.
    """
    check_each(query=query, key=key, value=value)
    check_flag("is_causal", is_causal)
    check_flag("return_lse", return_lse)
    scale = check_scale("scale", scale)
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError(f"attention takes (batch, tokens, heads, dim); got {_shapes(query, key, value)}")
    if seqlens_Q is not None or seqlens_KV is not None:
        cumulative_seqlen_Q, cumulative_seqlen_KV, _, _ = generate_varlen_parameters(query, key, value, seqlens_Q, seqlens_KV)
    if (cumulative_seqlen_Q is None) != (cumulative_seqlen_KV is None):
        raise ValueError("cumulative_seqlen_Q and cumulative_seqlen_KV belong together; got one of them")
    if cumulative_seqlen_Q is None or cumulative_seqlen_KV is None:
        out, lse = _sequence(query, key, value, is_causal, scale)
    else:
        q_ends, k_ends = _ends("Q", cumulative_seqlen_Q, query), _ends("KV", cumulative_seqlen_KV, key)
        if len(q_ends) != len(k_ends):
            raise ValueError(f"there must be as many sequences of queries as of keys; got ends {q_ends} and {k_ends}")
        parts = [
            _sequence(query[:, a:b], key[:, c:d], value[:, c:d], is_causal, scale)
            for (a, b), (c, d) in zip(pairwise(q_ends), pairwise(k_ends), strict=True)
            if b > a
        ]
        out, lse = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    return (out, lse) if return_lse else out


def _sequence(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one sequence."""
    if not key.shape[1]:
        empty = query.new_full(query.shape[:3], -math.inf, dtype=torch.promote_types(query.dtype, torch.float32))
        return query.new_zeros(*query.shape[:3], value.shape[-1]), empty
    if not is_causal:
        return attend(query, key, value, Dense(), scale=scale, return_lse=True)  # type: ignore[return-value]  # with lse
    tokens = key.shape[1]
    first = attend(query[:, :tokens], key, value, Causal(), scale=scale, return_lse=True)
    if query.shape[1] <= tokens:
        return first  # type: ignore[return-value]  # with lse
    rest = attend(query[:, tokens:], key, value, Dense(), scale=scale, return_lse=True)  # they see every key
    return tuple(torch.cat(each, 1) for each in zip(first, rest, strict=True))  # type: ignore[return-value]  # two of them


def _ends(name: str, cumulative: Tensor, packed: Tensor) -> list[int]:
    check_tensor(f"cumulative_seqlen_{name}", cumulative, INTEGERS)
    if cumulative.ndim != 1 or not len(cumulative) or cumulative.is_meta:
        raise ValueError(f"cumulative_seqlen_{name} must list a 0 and the ends of the sequences; got {shown(cumulative)}")
    ends = cumulative.tolist()
    if packed.shape[0] != 1 or ends[0] != 0 or ends[-1] != packed.shape[1] or any(b < a for a, b in pairwise(ends)):
        raise ValueError(
            f"packed sequences need a batch of 1 and cumulative_seqlen_{name} rising from 0 to the tokens; "
            f"got {ends} for {tuple(packed.shape)}"
        )
    return ends


def merge_attentions(
    outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor], torch_compile: bool = True, use_autograd_fix: bool = True
) -> tuple[Tensor, Tensor]:
    """Put attentions of the same queries to disjoint sets of keys together, exactly, with exact gradients.

    Args:
        outputs: at least two outputs ``(batch, tokens, heads, value_dim)``.
        lse_tensors: their log-sum-exps ``(batch, tokens, heads)``.
        torch_compile, use_autograd_fix: change nothing; the gradient of the log-sum-exp is exact here.

    Returns:
        The merged output and log-sum-exp.

    Raises:
        ValueError: fewer than two, or shapes that do not go together.
    """
    for name, parts in (("outputs", outputs), ("lse_tensors", lse_tensors)):
        if isinstance(parts, (str, bytes, Tensor)) or not isinstance(parts, Sequence):
            raise TypeError(f"{name} must be a list of tensors; got {shown(parts)}")
        for part in parts:
            check_tensor(f"each of {name}", part)
    if len(outputs) < 2 or len(outputs) != len(lse_tensors):
        raise ValueError(f"expected at least two outputs with their lse; got {len(outputs)} and {len(lse_tensors)}")
    shape = outputs[0].shape
    if len(shape) != 4 or any(o.shape != shape or s.shape != shape[:3] for o, s in zip(outputs, lse_tensors, strict=True)):
        given = ", ".join(f"{tuple(o.shape)} with {tuple(s.shape)}" for o, s in zip(outputs, lse_tensors, strict=True))
        raise ValueError(f"outputs must be (batch, tokens, heads, dim) and agree with each other and their lse; got {given}")
    return merge(outputs, lse_tensors)


def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = 1,
    dilation: Sizes | None = 1,
    is_causal: Flags | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    backend: str | None = None,
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    backward_q_tile_shape: Sequence[int] | None = None,
    backward_kv_tile_shape: Sequence[int] | None = None,
    backward_kv_splits: Sequence[int] | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Output:
    """Neighborhood attention on a grid of one to three axes.

    Args:
        query: ``(batch, *grid, heads, head_dim)``.
        key: ``(batch, *grid, kv_heads, head_dim)``; ``kv_heads`` divides ``heads``.
        value: ``(batch, *grid, kv_heads, value_dim)``.
        kernel_size: at least 2, a number or one per axis, as the next three.
        stride: queries that share a window, at most ``kernel_size``.
        dilation: step between keys; ``kernel_size * dilation`` must fit into the grid.
        is_causal: axes on which a query sees only itself and what precedes it.
        scale: factor on the logits; None and 0 are ``head_dim ** -0.5``.
        additional_keys, additional_values: ``(batch, tokens, kv_heads, dim)``, seen by every query under the same softmax.
        return_lse: also return the log-sum-exp ``(batch, *grid, heads)``.

    Every other argument changes nothing.

    Returns:
        ``(batch, *grid, heads, value_dim)``.

    Raises:
        ValueError: shapes that do not go together, or arguments out of range.
    """
    check_each(query=query, key=key, value=value)
    check_flag("return_lse", return_lse)
    scale = check_scale("scale", scale)
    if query.ndim not in (4, 5, 6) or query.shape[1:-2] != key.shape[1:-2] or query.shape[1:-2] != value.shape[1:-2]:
        raise ValueError(
            "query, key and value must be (batch, *grid, heads, dim) on one grid of 1 to 3 axes; "
            f"got {_shapes(query, key, value)}"
        )
    pattern = neighborhood(query.shape[1:-2], kernel_size, dilation, is_causal, stride)
    sources = [Source(key, value, pattern), *additional(additional_keys, additional_values)]
    return attend(query, sources, scale=scale, return_lse=return_lse)


def additional(keys: Tensor | None, values: Tensor | None) -> list[Source]:
    """The source of additional tokens ``(batch, tokens, heads, dim)``, where there are any."""
    if keys is None and values is None:
        return []
    for name, tokens in (("additional_keys", keys), ("additional_values", values)):
        if tokens is not None:
            check_tensor(name, tokens, what="(batch, tokens, heads, dim)")
    if keys is None or values is None or keys.ndim != 4 or values.ndim != 4:
        given = ["None" if t is None else str(tuple(t.shape)) for t in (keys, values)]
        raise ValueError(f"additional keys and values belong together, (batch, tokens, heads, dim); got {' and '.join(given)}")
    return [Source(keys, values)]


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"


def _fused(rank: int) -> Callable[..., Output]:
    def fused(query: Tensor, *others: Any, **options: Any) -> Output:
        """:func:`neighborhood_attention_generic` on a grid of this many axes."""
        check_each(query=query)
        if query.ndim != rank + 3:
            raise ValueError(f"na{rank}d takes tensors with {rank + 3} axes, (batch, *grid, heads, dim); got {query.ndim}")
        return neighborhood_attention_generic(query, *others, **options)

    fused.__signature__ = inspect.signature(neighborhood_attention_generic)  # type: ignore[attr-defined]
    return named(f"na{rank}d", fused)


na1d, na2d, na3d = _fused(1), _fused(2), _fused(3)
