"""Attention inside tiles: queries ``(n, heads, tq, width)`` against the keys ``(n, heads, tk, width)`` of their tile.

On CPU this is torch's fused attention. It has no gradient for its log-sum-exp nor for a bias, and no fallback is promised for
its private name: matrix products serve there, and on every other device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_FUSED: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FUSED_BACKWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def _fused(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and _FUSED is not None and _FUSED_BACKWARD is not None


def _full_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if mask is None or mask.shape[2:] == (q.shape[2], k.shape[2]):
        return mask
    return mask.expand(-1, -1, q.shape[2], k.shape[2])


def triangle(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mask of causal tiles, for where the fused operator cannot make it."""
    return torch.full((1, 1, queries, keys), -torch.inf, dtype=dtype, device=device).triu_(1)


def attend_tiles(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``(n, heads, tq, width)`` and lse ``(n, heads, tq)`` (any value where a query sees nothing)."""
    if causal and not _fused(q):
        mask = triangle(q.shape[2], k.shape[2], q.dtype, q.device)
    if _fused(q):
        return _FUSED(q, k, v, 0.0, causal, attn_mask=_full_mask(mask, q, k), scale=scale)
    scores = torch.matmul(q, k.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, -1)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    return torch.matmul(torch.exp(scores - lse.unsqueeze(-1)), v), lse


def narrow_products(q: Tensor) -> bool:
    """Whether tiles of this type are best multiplied as they are, when nobody asks for the log-sum-exp."""
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and _bfloat16_units()


@lru_cache(maxsize=1)
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
    causal: bool, scale: float, need_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and, where needed, of the biased scores.

    ``out`` and ``lse`` are those of the whole softmax, of which these keys may be one part.
    """
    fused = _fused(q) and grad_lse is None and not need_scores
    if causal and not fused:
        mask = triangle(q.shape[2], k.shape[2], q.dtype, q.device)
    if fused:
        grads = _FUSED_BACKWARD(grad, q, k, v, out, lse, 0.0, causal, attn_mask=_full_mask(mask, q, k), scale=scale)
        return (*grads, None)
    scores = torch.matmul(q, k.transpose(-2, -1)).mul_(scale)
    if mask is not None:
        scores += mask
    weights = scores.sub_(lse.unsqueeze(-1)).exp_()
    delta = (grad * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.unsqueeze(-1)
    grad_scores = torch.matmul(grad, v.transpose(-2, -1)).sub_(delta).mul_(weights)
    grad_v = torch.matmul(weights.transpose(-2, -1), grad)
    grad_q = torch.matmul(grad_scores, k).mul_(scale)
    grad_k = torch.matmul(grad_scores.transpose(-2, -1), q).mul_(scale)
    return grad_q, grad_k, grad_v, grad_scores if need_scores else None
