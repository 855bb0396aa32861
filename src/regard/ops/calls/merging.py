"""Putting attentions to disjoint sets of keys together.

    out = sum_i exp(lse_i - lse) out_i,   lse = log sum_i exp(lse_i)

Cost: one pass over the outputs. Source: Hassani et al., FNA, arXiv:2403.04690; Milakov & Gimelshein, arXiv:1805.02867.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import check_tensor, shown


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put attentions of the same queries to disjoint sets of keys together, exactly and differentiably.

        out = sum_i exp(lse_i - lse) out_i,   lse = log sum_i exp(lse_i)

    Args:
        outs: outputs ``(..., value_dim)``.
        lses: their log-sum-exps ``(...)``; ``-inf`` marks rows that saw nothing, ``inf`` those that outweigh any other.

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
    shares, lse = shares_of(lses)
    out = outs[0] * shares[0].unsqueeze(-1).to(outs[0].dtype)
    for other, share in zip(outs[1:], shares[1:], strict=True):
        out = out + other * share.unsqueeze(-1).to(other.dtype)
    return out, lse


def shares_of(lses: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Each part's share in a softmax over all of them, and the log-sum-exp of the whole.

    Parts of ``-inf`` have none, also where all are; those of ``inf`` share everything evenly.
    """
    top = lses[0].detach()
    for lse in lses[1:]:
        top = torch.maximum(top, lse.detach())
    endless = top.isinf()
    finite = [torch.exp(lse.masked_fill(endless, 0.0) - top.masked_fill(endless, 0.0)) for lse in lses]
    weights = [torch.where(endless, (lse == torch.inf).to(w.dtype), w) for lse, w in zip(lses, finite, strict=True)]
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    total = total.masked_fill(top == -torch.inf, 1.0)
    return [w / total for w in weights], top + torch.log(total)
