"""Partial channel attention: global attention among some of the channels; the others join them in the projection.

    x = [x1, x2];  y = W relu([softmax(q k^T / sqrt(d)) v, x2]),  q, k, v of norm(x1)
Cost: quadratic in tokens, with ``part`` of the channels. Source: Yun & Ro, SHViT, arXiv:2401.16456.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...checks import checked
from ...ops import attend
from ..conv_norm import ConvNorm
from .base import check_tokens


class PartialChannelAttention(nn.Module):
    """Attention of the first ``part`` channels, of one head as published.

    Its projections are normalised over the batch, and tokens outside the grid are not defined: it is no mixer for any
    backbone, and has no name.

    Args:
        dim: channels.
        heads: attention heads that share the part.
        part: channels that attend, a multiple of ``heads``; a quarter by default.
        head_dim: width of the queries and keys of a head.
        backend: see :func:`regard.attend`.

    Raises:
        ValueError: a part that the heads do not divide, or larger than ``dim``.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        part: int | None = None,
        head_dim: int = 16,
        backend: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        part = dim // 4 if part is None else part
        if heads < 1 or part % heads or not 0 < part <= dim:
            raise ValueError(f"part must be a multiple of heads, 1 to dim; got part={part}, heads={heads}, dim={dim}")
        self.dim, self.heads, self.part, self.head_dim, self.backend = dim, heads, part, head_dim, backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.GroupNorm(1, part, **factory)
        self.qkv = ConvNorm(part, 2 * heads * head_dim + part, **factory)
        self.proj = ConvNorm(dim, dim, gamma=0.0, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens ``(batch, rows, columns, dim)``."""
        check_tokens(self.dim, None, x)
        if x.ndim != 4:
            raise ValueError(f"expected x (batch, rows, columns, {self.dim}); got {tuple(x.shape)}")
        mixed, rest = x.movedim(-1, 1).split((self.part, self.dim - self.part), 1)
        width = self.heads * self.head_dim
        projected = self.qkv(self.norm(mixed)).movedim(1, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in projected.split((width, width, self.part), -1))
        attended = attend(q, k, v, backend=self.backend)
        assert isinstance(attended, Tensor)  # no lse was asked for
        return self.proj(torch.cat([attended.flatten(-2).movedim(-1, 1), rest], 1).relu()).movedim(1, -1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, part={self.part}"
