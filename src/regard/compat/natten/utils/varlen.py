"""Lengths of packed sequences, prepared once for many calls of :func:`regard.compat.natten.attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from ....checks import FLOATS, check_tensor

__all__ = ["generate_varlen_parameters"]


def generate_varlen_parameters(
    query: Tensor, key: Tensor, value: Tensor, seqlens_Q: Tensor | None = None, seqlens_KV: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Cumulative and longest lengths of packed sequences.

    Args:
        query, key, value: packed tokens ``(1, tokens, heads, dim)``.
        seqlens_Q, seqlens_KV: tokens of each sequence, int32; both or neither.

    Returns:
        Ends of the sequences of queries and of keys with a 0 before them, int32, and the longest of each; or None, None, 0, 0.

    Raises:
        ValueError: one of the lengths without the other, of different numbers, not int32, or a batch larger than 1.
    """
    if seqlens_Q is None and seqlens_KV is None:
        return None, None, 0, 0
    if seqlens_Q is None or seqlens_KV is None:
        raise ValueError("seqlens_Q and seqlens_KV belong together; got one of them")
    for name, tensor, allowed in (
        ("query", query, FLOATS), ("key", key, FLOATS), ("value", value, FLOATS),
        ("seqlens_Q", seqlens_Q, (torch.int32,)), ("seqlens_KV", seqlens_KV, (torch.int32,)),
    ):  # fmt: skip
        check_tensor(name, tensor, allowed, device=None if name == "query" else query.device)
    kinds = {seqlens_Q.dtype, seqlens_KV.dtype}
    if seqlens_Q.ndim != 1 or seqlens_Q.shape != seqlens_KV.shape or not len(seqlens_Q) or kinds != {torch.int32}:
        raise ValueError(
            "seqlens_Q and seqlens_KV must be int32 and equally long; got "
            f"{seqlens_Q.dtype} {tuple(seqlens_Q.shape)} and {seqlens_KV.dtype} {tuple(seqlens_KV.shape)}"
        )
    if query.shape[0] != 1:
        raise ValueError(f"packed sequences have a batch of 1; got query {tuple(query.shape)}")
    ends = [torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32) for lengths in (seqlens_Q, seqlens_KV)]
    return ends[0], ends[1], int(seqlens_Q.max()), int(seqlens_KV.max())
