"""Cascaded group attention: each head sees its own channels plus what the head before it has found.

    z_j = x_j + y_(j-1);  y_j = softmax(DW(q) k^T / sqrt(d) + b_j) v,  q, k, v of z_j;  y = W relu([y_1 .. y_h])
Cost: linear in tokens, M^2 keys per query; heads run one after another. Source: Liu et al., EfficientViT, arXiv:2305.07027.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import checked
from ...ops import attend
from ...ops import patterns as P
from ...ops.calls.source import HeadTable
from ...ops.tracing import fill
from ..conv_norm import ConvNorm
from ..positions import MirroredBias
from .base import check_tokens


class CascadedGroupAttention(nn.Module):
    """A cascade of single heads inside windows, with a bias over distances per axis and a convolution of the queries.

    An axis longer than a window is padded with zeros to whole windows, and these take part in the softmax; a shorter one is
    one window. The queries are convolved within their window. Its projections are normalised over the batch, and tokens
    outside the grid are not defined: it is no mixer for any backbone, and has no name.

    Args:
        dim: channels.
        heads: attention heads, a divisor of ``dim``.
        window_size: tokens per axis.
        query_kernels: sizes of the depthwise convolutions of the queries, at least one per head; the first ones are used.
        head_dim: width of the queries and keys of a head; values have ``dim // heads``.
        backend: see :func:`regard.attend`.

    Raises:
        ValueError: heads that do not divide ``dim``, or too few kernels.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        heads: int,
        window_size: int = 7,
        *,
        query_kernels: Sequence[int] = (5, 5, 5, 5),
        head_dim: int = 16,
        backend: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads or len(query_kernels) < heads:
            raise ValueError(
                f"heads must divide dim and have a query kernel each; got dim={dim}, heads={heads}, {query_kernels=}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.heads, self.head_dim, self.backend = dim, heads, head_dim, backend
        self.window_size = window_size
        self.pattern = P.Window(window_size)
        value_dim = dim // heads
        self.qkv = nn.ModuleList(ConvNorm(value_dim, 2 * head_dim + value_dim, **factory) for _ in range(heads))
        self.query_conv = nn.ModuleList(
            ConvNorm(head_dim, head_dim, kernel, groups=head_dim, **factory) for kernel in query_kernels[:heads]
        )
        self.bias = MirroredBias(heads, self.pattern, **factory)
        self.act = nn.ReLU()
        self.proj = ConvNorm(dim, dim, gamma=0.0, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens ``(batch, rows, columns, dim)``."""
        check_tokens(self.dim, None, x)
        if x.ndim != 4:
            raise ValueError(f"expected x (batch, rows, columns, {self.dim}); got {tuple(x.shape)}")
        rows, columns = x.shape[1:3]
        bottom, right = (fill(n, min(self.window_size, n)) for n in (rows, columns))
        x = F.pad(x.movedim(-1, 1), [0, right, 0, bottom])
        widths = (self.head_dim, self.head_dim, self.dim // self.heads)
        table = self.bias.table
        found: list[Tensor] = []
        for head, (own, qkv, conv) in enumerate(zip(x.chunk(self.heads, 1), self.qkv, self.query_conv, strict=True)):
            seen = own + found[-1] if found else own
            q, k, v = qkv(seen).split(widths, 1)
            q = self._in_windows(conv, q)
            # each as the one head of (batch, rows, columns, 1, width)
            q, k, v = (t.movedim(1, -1).unsqueeze(-2) for t in (q, k, v))
            bias = HeadTable(table[head : head + 1], self.pattern)
            attended = attend(q, k, v, self.pattern, bias=bias, backend=self.backend)
            assert isinstance(attended, Tensor)  # no lse was asked for
            found.append(attended.squeeze(-2).movedim(-1, 1))
        y = self.proj(self.act(torch.cat(found, 1)))
        return y[..., :rows, :columns].movedim(1, -1)

    def _in_windows(self, conv: nn.Module, x: Tensor) -> Tensor:
        """Apply a convolution to each window of ``(batch, channels, rows, columns)`` alone."""
        height, width = (min(self.window_size, n) for n in x.shape[-2:])
        if x.shape[-2:] == (height, width):
            return conv(x)
        cut = x.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)
        done = conv(cut.flatten(0, 2)).unflatten(0, cut.shape[:3])  # (batch, down, across, channels, height, width)
        return done.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, window_size={self.window_size}"
