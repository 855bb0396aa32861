"""Channel attention: every channel attends to the channels of its head, over all tokens.

    A = normalise(scale q^T k)  (d x d),   y_n = A v_n

Cost: tokens times channels times head width, linear in tokens. Source: Ali et al., XCiT, arXiv:2106.09681; Ding et al., DaViT,
arXiv:2204.03645 (its affinity is of k and v, applied to q: call it with those three in that order).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_flag, check_integer, check_number, check_tensor, check_tensors, shown
from .calls.observe import WATCHERS, Weighing, tell


def _softmax_plus_one(scores: Tensor, dim: int) -> Tensor:
    top = scores.amax(dim, keepdim=True).clamp(min=0.0)
    weights = torch.exp(scores - top)
    return weights / (weights.sum(dim, keepdim=True) + torch.exp(-top))


NORMALISERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": lambda scores, dim: scores.softmax(dim),
    "softmax_plus_one": _softmax_plus_one,  # a further channel of logit and value 0
    "reversed_softmax": lambda scores, dim: (-scores).softmax(dim),  # of the maximum minus the score
    "relu": lambda scores, dim: scores.relu(),
    "none": lambda scores, dim: scores,
}


def channel_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normaliser: str = "softmax",
    l2: bool = False,
    temperature: Tensor | None = None,
    scale: float | None = None,
    dim: int = -1,
) -> Tensor:
    """Attention between channels, head by head.

    Args:
        q: ``(batch, *grid, heads, q_dim)``.
        k: ``(batch, *grid, heads, dim)``; the tokens of ``q`` and ``k`` are summed over, so they share the grid.
        v: ``(batch, *value_grid, heads, dim)``; the affinity is between channels, so its grid may be another one.
        normaliser: what turns scores into weights, a key of :data:`NORMALISERS`.
        l2: whether each channel of ``q`` and ``k`` is first divided by its norm over the tokens.
        temperature: factor on the scores, one per head.
        scale: factor on the scores; None is ``q_dim ** -0.5``, or 1 with ``l2``.
        dim: what is normalised over: -1 the channels of ``k``, -2 those of ``q``.

    Returns:
        ``(batch, *value_grid, heads, q_dim)`` in the dtype of ``q``.

    Raises:
        ValueError: shapes that do not go together; an unknown normaliser; another ``dim``.
    """
    check_tensors(q=q, k=k, v=v, mixed=True)
    alike = k.shape[-2:] == v.shape[-2:] and k.shape[0] == v.shape[0]
    if min(q.ndim, v.ndim) < 4 or q.shape[:-1] != k.shape[:-1] or not alike:
        raise ValueError(
            "q, k and v must be (batch, *grid, heads, dim), q and k on one grid, k and v of one width; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if any(0 in t.shape[1:] for t in (q, k, v)):
        raise ValueError(f"no axis may be empty but the batch; got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    check_choice("normaliser", normaliser, NORMALISERS)
    check_flag("l2", l2)
    check_integer("dim", dim, -2, -1)
    if scale is not None:
        scale = check_number("scale", scale)
    if temperature is not None and check_tensor("temperature", temperature, device=q.device).numel() not in (1, q.shape[-2]):
        raise ValueError(f"temperature must be one number per head, {q.shape[-2]} of them; got {shown(temperature)}")
    kind = torch.promote_types(q.dtype, torch.float32)
    queries, keys = (t.flatten(1, -3).to(kind) for t in (q, k))  # (batch, tokens, heads, channels)
    if l2:
        queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    if scale is None:
        scale = 1.0 if l2 else q.shape[-1] ** -0.5
    scores = torch.einsum("bnhi,bnhj->bhij", queries, keys) * scale
    if temperature is not None:
        scores = scores * temperature.reshape(-1, 1, 1)
    weights = NORMALISERS[normaliser](scores, dim).to(v.dtype)
    if WATCHERS:
        batch, heads, asking, asked = tuple(weights.shape)
        flops = 2 * weights.numel() * (queries.shape[1] + v.shape[1:-2].numel())
        moved = (q.numel() + k.numel() + v.numel()) * q.element_size() + v.shape[:-1].numel() * asking * v.element_size()
        tell(Weighing("channel", batch, heads, (asking,), (asked,), lambda rows: weights[:, :, rows], weights.device, False,
                      flops, moved))  # fmt: skip
    return torch.einsum("bhij,b...hj->b...hi", weights, v).to(q.dtype)
