"""What all attention mixers share: project, ask the mechanism for its sources, attend, project back."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import Source, attend
from ...ops.patterns import Dense


class AttentionMixer(nn.Module):
    """Token mixer ``(batch, *grid, dim) -> (batch, *grid, dim)`` by softmax attention.

    A mechanism overrides :meth:`sources`. Tokens outside the grid (class, register, prompt) come as ``extra`` and see, and
    are seen by, everything. With ``context`` the keys and values come from another grid.

    Args:
        dim: channels.
        heads: attention heads.
        kv_heads: key and value heads, a divisor of ``heads``; all by default.
        head_dim: width of a head, ``dim // heads`` by default.
        qkv_bias, proj_bias: whether the projections have a bias.
        scale: factor on the logits, ``head_dim ** -0.5`` by default.
        attn_drop, proj_drop: dropout on the attention weights and on the output.
        backend: see :func:`regard.attend`.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads`` and no ``head_dim`` is given; input of another width.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if head_dim is None and dim % heads:
            raise ValueError(f"dim must be a multiple of heads, or give head_dim; got dim={dim}, heads={heads}")
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads or heads
        if heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads; got heads={heads}, kv_heads={self.kv_heads}")
        self.head_dim = head_dim or dim // heads
        self.scale, self.attn_drop, self.backend = scale, attn_drop, backend
        factory = {"device": device, "dtype": dtype}
        width = (heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(dim, width, bias=qkv_bias, **factory)
        self.proj = nn.Linear(heads * self.head_dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def sources(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Source]:
        """The sources that grid queries see: ``k`` and ``v`` are ``(batch, *grid, kv_heads, head_dim)``."""
        raise NotImplementedError

    def padding(self, grid: Sequence[int]) -> Sequence[int]:
        """Tokens of zeros appended to each axis before projection, for mechanisms whose numbers depend on it."""
        return (0,) * len(grid)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of ``x``, keys and values of ``context``: ``(batch, *grid, heads, head_dim)``."""
        q_width = self.heads * self.head_dim
        if context is x:
            q, kv = self.qkv(x).split([q_width, self.qkv.out_features - q_width], -1)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(x, weight[:q_width], None if bias is None else bias[:q_width])
            kv = F.linear(context, weight[q_width:], None if bias is None else bias[q_width:])
        k, v = kv.unflatten(-1, (2 * self.kv_heads, self.head_dim)).chunk(2, -2)
        return q.unflatten(-1, (self.heads, self.head_dim)), k, v

    def finish(self, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
        """What is done to the heads' joint output ``(batch, *grid, heads * head_dim)`` before the projection."""
        return y

    def forward(
        self, x: Tensor, extra: Tensor | None = None, *, context: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mix the tokens of ``x (batch, *grid, dim)``; with ``extra (batch, n, dim)`` returns both."""
        if x.shape[-1] != self.dim or x.ndim < 3:
            raise ValueError(f"expected (batch, *grid, {self.dim}); got {tuple(x.shape)}")
        grid = tuple(x.shape[1:-1])
        pads = self.padding(grid)
        if any(pads):
            x = F.pad(x, [0, 0, *(n for pad in reversed(pads) for n in (0, pad))])
        q, k, v = self.project(x, x if context is None else context)
        sources = list(self.sources(x, q, k, v))
        options = {"scale": self.scale, "dropout": self.attn_drop if self.training else 0.0, "backend": self.backend}
        if extra is None:
            y = attend(q, sources, **options)
            return self._out(y, x, v, grid)
        extra_q, extra_k, extra_v = self.project(extra, extra)
        everything = [Source(k, v, Dense()), Source(extra_k, extra_v, Dense())]
        y = attend(q, [*sources, Source(extra_k, extra_v, Dense())], **options)
        y_extra = attend(extra_q, everything, **options).flatten(-2)
        return self._out(y, x, v, grid), self.proj_drop(self.proj(y_extra))

    def _out(self, y: Tensor, x: Tensor, v: Tensor, grid: tuple[int, ...]) -> Tensor:
        y = self.finish(y.flatten(-2), x, v)
        if y.shape[1:-1] != grid:
            y = y[(slice(None), *(slice(n) for n in grid))]
        return self.proj_drop(self.proj(y))

    def extra_repr(self) -> str:
        kv = f", kv_heads={self.kv_heads}" if self.kv_heads != self.heads else ""
        return f"dim={self.dim}, heads={self.heads}{kv}"
