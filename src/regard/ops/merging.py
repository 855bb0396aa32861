"""Putting attentions to disjoint sets of keys together.

    out = sum_i exp(lse_i - lse) out_i,   lse = log sum_i exp(lse_i)

Cost: one pass over the outputs. Source: Hassani et al., FNA, arXiv:2403.04690; Milakov & Gimelshein, arXiv:1805.02867.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_tensor, shown


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put attentions of the same queries to disjoint sets of keys together, exactly and differentiably.

        out = sum_i exp(lse_i - lse) out_i,   lse = log sum_i exp(lse_i)

    Args:
        outs: outputs ``(..., value_dim)``.
        lses: their log-sum-exps ``(...)``; ``-inf`` marks rows that saw nothing.

    Returns:
        The merged output and log-sum-exp.

    Raises:
        TypeError: no lists of tensors.
        ValueError: lists of different lengths, or empty; tensors of other shapes, dtypes or devices.
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        if isinstance(parts, (str, bytes, Tensor)) or not isinstance(parts, Sequence):
            raise TypeError(f"{name} must be a list of tensors; got {shown(parts)}")
    if len(outs) != len(lses) or not outs:
        raise ValueError(f"merge needs as many lses as outs, at least one; got {len(outs)} outs, {len(lses)} lses")
    for name, parts in (("outs", outs), ("lses", lses)):
        for part in parts:
            check_tensor(f"each of {name}", part)
        if len({(part.dtype, part.device) for part in parts}) > 1:
            raise ValueError(f"{name} must share a dtype and a device; got {', '.join(map(shown, parts))}")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != outs[0].shape[:-1] or lse.device != outs[0].device:
            raise ValueError(
                "outs must share one shape, and lses that shape less its last axis; "
                f"got {', '.join(map(shown, outs))} and {', '.join(map(shown, lses))}"
            )
    top = lses[0].detach()
    for lse in lses[1:]:
        top = torch.maximum(top, lse.detach())
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = [torch.exp(lse - top) for lse in lses]
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    empty = total == 0
    share = 1.0 / total.masked_fill(empty, 1.0)
    out = sum((o * (w * share).unsqueeze(-1).to(o.dtype) for o, w in zip(outs[1:], weights[1:], strict=True)),
              outs[0] * (weights[0] * share).unsqueeze(-1).to(outs[0].dtype))  # fmt: skip
    lse = top + torch.log(total.masked_fill(empty, 1.0))
    return out, lse.masked_fill(empty, -torch.inf)
