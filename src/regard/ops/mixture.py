"""Mixtures: gates that keep the k best of n experts (heads, modules, kernels) for each token, and the losses that go along.

    p = softmax(logits),   g_i = total * p_i / sum of the kept p   where i is among the k largest, else 0

Cost: n per token. Source: Shazeer et al., arXiv:1701.06538; Jin et al., MoH, arXiv:2410.11842; Zoph et al., ST-MoE,
arXiv:2202.08906.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_integer, check_number, check_tensor, check_tensors
from .calls.lower import check_scale
from .calls.observe import WATCHERS, Weighing, tell
from .transforms import again, differentiated, fixed


class Mixture(NamedTuple):
    """Gates of the experts and what the losses need, all ``(..., experts)``."""

    gates: Tensor
    """Factors on the experts' outputs; 0 where an expert is not chosen."""
    probabilities: Tensor
    """The softmax over all experts, in at least float32."""
    chosen: Tensor
    """Boolean, ``k`` of them True for each token."""


def mixture(logits: Tensor, k: int, *, total: float = 1.0) -> Mixture:
    """Gates of the ``k`` experts with the largest logits.

    Noisy gates are those of noisy logits: add the noise before.

    Args:
        logits: ``(..., experts)``; the gates carry gradient to them, the choice does not.
        k: experts to keep; ``total`` is shared among them in proportion to their probabilities.
        total: sum of the gates of a token: 1 for mixtures of experts, ``k`` for mixtures of heads, where equal logits of all
            experts then give gates of one.

    Raises:
        ValueError: ``k`` below one or above the number of experts.
    """
    check_tensor("logits", logits, what="(..., experts)")
    if logits.ndim < 1:
        raise ValueError("logits must be (..., experts); got a single number")
    experts = logits.shape[-1]
    if not 1 <= check_integer("k", k) <= experts:
        raise ValueError(f"k must be in 1..{experts}, the number of experts; got {k}")
    total = check_number("total", total)
    probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    index = logits.detach().topk(k, -1, sorted=False).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, True)
    kept = logits.masked_fill(~chosen, -torch.inf).softmax(-1, dtype=probabilities.dtype)  # p over the sum of the kept p
    if WATCHERS:
        shares = kept.reshape(len(kept), 1, -1, experts) if kept.ndim > 1 else kept[None, None, None]
        grid = tuple(kept.shape[1:-1]) or (1,)
        tell(Weighing("mixture", len(shares), 1, grid, (experts,), lambda rows: shares[:, :, rows], kept.device, False))
    return Mixture((total * kept).to(logits.dtype), probabilities, chosen)


def chosen_attend(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, *, scale: float | None = None) -> Tensor:
    """Dense attention in which each head attends only for the queries that chose it, and gives 0 to the others.

    Each head gathers as many queries as the most chosen one has, so evenly chosen heads leave out most; all keys are seen.

    Args:
        q: ``(batch, *grid, heads, head_dim)``.
        k, v: ``(batch, *key_grid, heads, head_dim)`` and ``(batch, *key_grid, heads, value_dim)``.
        chosen: boolean ``(batch, *grid, heads)``.
        scale: factor on the logits; None is ``head_dim ** -0.5``.

    Returns:
        ``(batch, *grid, heads, value_dim)``.
    """
    check_tensors(q=q, k=k, v=v)
    check_tensor("chosen", chosen, (torch.bool,), device=q.device, what="(batch, *grid, heads)")
    if (
        min(q.ndim, k.ndim, v.ndim) < 4
        or k.shape[:-1] != v.shape[:-1]
        or q.shape[-2:] != k.shape[-2:]
        or q.shape[0] != k.shape[0]
    ):
        raise ValueError(
            "q, k and v must be (batch, *grid, heads, dim) and go together; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if chosen.shape != q.shape[:-1]:
        raise ValueError(f"chosen must be (batch, *grid, heads) = {tuple(q.shape[:-1])}; got {tuple(chosen.shape)}")
    scale = check_scale(q, scale)
    if 0 in q.shape:
        return q.new_zeros(*q.shape[:-1], v.shape[-1])
    queries, keys, values = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))  # (batch, heads, tokens, width)
    seats = chosen.flatten(1, -2).transpose(1, 2)
    at = seats.to(torch.uint8).topk(int(seats.sum(-1).max()), -1, sorted=False).indices[..., None]
    own = queries.gather(2, at.expand(-1, -1, -1, q.shape[-1]))
    found = _attended(own, keys, values, scale) * seats[..., None].gather(2, at)
    y = found.new_zeros(*q.shape[:-1], v.shape[-1])
    y.flatten(1, -3).transpose(1, 2).scatter_(2, at.expand(-1, -1, -1, v.shape[-1]), found)
    return y


def _attended(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Torch's fused attention, whose own gradient is not differentiable."""
    define = partial(_defined, scale=q.shape[-1] ** -0.5 if scale is None else scale)
    if differentiated(q, k, v):
        return define(q, k, v)[0]
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return again(out, define, q, k, v) if out.requires_grad and not fixed() else out


def _defined(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor]:
    return (torch.softmax(q @ k.transpose(-2, -1) * scale, -1) @ v,)


def balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """``n sum_i P_i f_i``: the mean probability of each of n experts times the share of tokens that chose it.

    ``k`` where both are uniform, and more where the experts that are chosen often are also the probable ones. It is no lower
    bound: only P carries gradient, and tokens that narrowly prefer one expert against few that firmly prefer another give less.

    Args:
        probabilities, chosen: ``(..., experts)``, see :class:`Mixture`.

    Source: Fedus et al., Switch Transformer, arXiv:2101.03961.
    """
    check_tensor("probabilities", probabilities, what="(..., experts)")
    check_tensor("chosen", chosen, (torch.bool,), device=probabilities.device, what="(..., experts)")
    if probabilities.shape != chosen.shape or probabilities.ndim < 2:
        raise ValueError(
            f"probabilities and chosen must be (..., experts) both; got {tuple(probabilities.shape)} and {tuple(chosen.shape)}"
        )
    mean = probabilities.flatten(0, -2).mean(0)
    load = chosen.flatten(0, -2).to(mean.dtype).mean(0)
    return mean.shape[-1] * (mean * load).sum()


def z_loss(logits: Tensor) -> Tensor:
    """The mean squared log-sum-exp over experts, which keeps logits ``(..., experts)`` small."""
    check_tensor("logits", logits, what="(..., experts)")
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., experts) with at least one expert; got {tuple(logits.shape)}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1).square().mean()
