"""Attention inside tiles: queries ``(n, heads, tq, width)`` against the keys ``(n, heads, tk, width)`` of their tile.

On CPU this is torch's fused attention. It has no gradient for its log-sum-exp nor for a bias, and no fallback is promised for
its private name: matrix products serve there, and on every other device, for some queries at a time, so that the memory of a
large tile is that of its operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...caches import cached
from ..calls.definition import SCORES

CACHED_SCORES = 1 << 18
"""Scores of some tiles that a CPU's caches hold."""

_FUSED: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FUSED_BACKWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def _fused(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and _FUSED is not None and _FUSED_BACKWARD is not None


def multiplies(device: torch.device, scores: int, keys: int) -> bool:
    """Whether tiles of so many scores and keys are better multiplied in the open than by the fused operator, going forward.

    The fused operator makes small products, each of which asks anew how many threads there are: on two it is 1.2 to 1.5 times
    as fast as on one, batched products of the same tiles 1.5 to 1.8 times. With many keys the two are level.
    """
    return device.type == "cpu" and torch.get_num_threads() > 1 and scores <= CACHED_SCORES and keys <= 256


def _full_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if mask is None or mask.shape[2:] == (q.shape[2], k.shape[2]):
        return mask
    return mask.expand(-1, -1, q.shape[2], k.shape[2])


def triangle(queries: int, keys: int, dtype: torch.dtype, device: torch.device, first: int = 0) -> Tensor:
    """The mask of causal tiles from query ``first`` on, for where the fused operator cannot make it."""
    return torch.full((1, 1, queries, keys), -torch.inf, dtype=dtype, device=device).triu_(first + 1)


def _drawn(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor | None, bool]:
    """The mask, with the triangle in it where the fused operator would make that wrong: it masks before it scales."""
    if not causal or scale > 0:
        return mask, causal
    return triangle(q.shape[2], k.shape[2], q.dtype, q.device), False


def _slices(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Queries whose scores are held at once, the keys that they may see, and their mask."""
    n, heads, tq, _ = q.shape
    tk = k.shape[2]
    each = max(1, SCORES // (n * heads * tk))
    for first in range(0, tq, each):
        last = min(first + each, tq)
        seen = min(last, tk) if causal else tk
        if causal:
            part: Tensor | None = triangle(last - first, seen, q.dtype, q.device, first)
        else:
            part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, first:last]
        yield slice(first, last), slice(0, seen), part


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, need_lse: bool = True, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """Output ``(n, heads, tq, width)`` and lse ``(n, heads, tq)``, empty if not needed, any where a query sees nothing.

    ``exact`` keeps what is not finite from those who do not see it, see :func:`shown_products`.
    """
    if exact:
        parts = [_exact_products(q[:, :, i], k[:, :, j], v[:, :, j], part, scale) for i, j, part in _slices(q, k, mask, causal)]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 2), torch.cat(lses, 2)
    mask, causal = _drawn(q, k, mask, causal, scale)
    if _fused(q) and not multiplies(q.device, q.shape[1] * q.shape[2] * k.shape[2], k.shape[2]):
        return _FUSED(q, k, v, 0.0, causal, attn_mask=_full_mask(mask, q, k), scale=scale)
    parts = [_products(q[:, :, i], k[:, :, j], v[:, :, j], part, scale, need_lse) for i, j, part in _slices(q, k, mask, causal)]
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, need_lse: bool) -> tuple[Tensor, Tensor]:
    tiles = q.shape[:2]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale).unflatten(0, tiles)
    if mask is not None:
        scores += mask
    weights = torch.softmax(scores, -1)
    lse = scores.amax(-1) - weights.amax(-1).log() if need_lse else q.new_empty(*tiles, 0)
    return torch.bmm(weights.flatten(0, 1), v).unflatten(0, tiles), lse


def shown_products(weights: Tensor, values: Tensor, shown: Tensor) -> Tensor:
    """``weights (n, heads, a, b)`` times ``values (n, heads, b, width)`` over the pairs that are ``shown`` (of one shape).

    A pair that is not shown adds nothing, even where its value is not finite (0 times NaN is NaN). Such values are added one by
    one.
    """
    odd = values.isfinite().all(-1).logical_not_()  # (n, heads, b)
    total = torch.matmul(weights.masked_fill(~shown, 0.0), values.masked_fill(odd.unsqueeze(-1), 0.0))
    for place in odd.flatten(0, 1).any(0).nonzero()[:, 0].tolist():
        counts = shown[..., place] & odd[..., place, None]
        product = weights[..., place, None] * values[..., place, None, :]
        total += product.masked_fill(~counts.unsqueeze(-1), 0.0)
    return total


def _exact_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Scores ``(n, heads, tq, tk)``, -inf where a pair is hidden, and which pairs are shown."""
    scores = torch.matmul(q, k.transpose(-2, -1)).mul_(scale)
    if mask is None:
        return scores, torch.ones_like(scores, dtype=torch.bool)
    shown = (mask != -torch.inf).expand_as(scores)
    return scores.add_(mask).masked_fill_(~shown, -torch.inf), shown


def _exact_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    scores, shown = _exact_scores(q, k, mask, scale)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    return shown_products(weights, v, shown), lse


def narrow_products(q: Tensor) -> bool:
    """Whether tiles of this type are best multiplied as they are, when nobody asks for the log-sum-exp."""
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and _bfloat16_units()


@cached(1)
def _bfloat16_units() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def attend_narrow_tiles(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Output ``(n, heads, tq, width)`` by products in the type of the inputs around a softmax in float32."""
    if causal:
        mask = triangle(q.shape[2], k.shape[2], torch.float32, q.device)
    scores = torch.matmul(q, k.transpose(-2, -1)).float().mul_(scale)
    if mask is not None:
        scores += mask
    return torch.matmul(torch.softmax(scores, -1).to(v.dtype), v)


def attend_tiles_backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
    causal: bool, scale: float, need_scores: bool, exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and, where needed, of the biased scores.

    ``out`` and ``lse`` are those of the whole softmax, of which these keys may be one part. ``exact`` as in
    :func:`attend_tiles`.
    """
    mask, causal = _drawn(q, k, mask, causal, scale)
    if not exact and _fused(q) and grad_lse is None and not need_scores:
        grads = _FUSED_BACKWARD(grad, q, k, v, out, lse, 0.0, causal, attn_mask=_full_mask(mask, q, k), scale=scale)
        return (*grads, None)
    delta = (grad * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    products = _exact_products_backward if exact else _products_backward
    slices = list(_slices(q, k, mask, causal))
    if len(slices) == 1:
        *grads, change = products(grad, delta, q, k, v, lse, slices[0][2], scale)
        return (*grads, change if need_scores else None)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_scores = q.new_zeros(*q.shape[:3], k.shape[2]) if need_scores else None
    for i, j, part in slices:
        grad_q[:, :, i], of_k, of_v, change = products(
            grad[:, :, i], delta[:, :, i], q[:, :, i], k[:, :, j], v[:, :, j], lse[:, :, i], part, scale
        )
        grad_k[:, :, j] += of_k
        grad_v[:, :, j] += of_v
        if grad_scores is not None:
            grad_scores[:, :, i, j] = change
    return grad_q, grad_k, grad_v, grad_scores


def _products_backward(
    grad: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the biased scores."""
    base = -lse.unsqueeze(-1)  # what the products are added to: copying once is cheaper than another pass
    base = base.expand(*q.shape[:3], k.shape[2]) if mask is None else mask + base
    tiles = q.shape[:2]
    base, delta, grad, q, k, v = (t.flatten(0, 1) for t in (base, delta.unsqueeze(-1), grad, q, k, v))
    weights = torch.baddbmm(base, q, k.transpose(1, 2), alpha=scale).exp_()
    change = torch.baddbmm(delta, grad, v.transpose(1, 2), beta=-1).mul_(weights)
    grad_q = torch.bmm(change, k).mul_(scale)
    grad_k = torch.bmm(change.transpose(1, 2), q).mul_(scale)
    grad_v = torch.bmm(weights.transpose(1, 2), grad)
    return grad_q.unflatten(0, tiles), grad_k.unflatten(0, tiles), grad_v.unflatten(0, tiles), change.unflatten(0, tiles)


def _exact_products_backward(
    grad: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`_products_backward` over the pairs that are shown alone."""
    scores, shown = _exact_scores(q, k, mask, scale)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill_(~shown, 0.0)
    change = torch.matmul(grad, v.transpose(-2, -1)).sub_(delta.unsqueeze(-1)).mul_(weights).masked_fill_(~shown, 0.0)
    turned = shown.transpose(-2, -1)
    grad_q = shown_products(change, k, shown).mul_(scale)
    grad_k = shown_products(change.transpose(-2, -1), q, turned).mul_(scale)
    return grad_q, grad_k, shown_products(weights.transpose(-2, -1), grad, turned), change
