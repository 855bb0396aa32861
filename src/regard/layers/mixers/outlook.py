"""Outlook attention: the token in the middle of a window predicts, alone, how the window's values mix among themselves.

    y = W_o fold(softmax(W_a mean(x) / sqrt(d)) unfold(W_v x)),   k^2 x k^2 weights per window, overlapping windows summed
Cost: linear in tokens, k^4 weights per window and head. Source: Yuan et al., VOLO, arXiv:2106.13112.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import checked
from ...ops.calls.observe import WATCHERS, Weighing, tell
from ...ops.local.kernels import fold_windows, unfold_windows
from ...ops.tracing import check_fixed
from ..linear import linear
from ..pools import PoolKV
from .base import TokenMixer
from .registry import register_mixer


@register_mixer("outlook", unseen=("v_bias",))
class OutlookAttention(TokenMixer):
    """Dynamic kernels from single tokens: no queries and keys, so that no pair of tokens is ever compared.

    Zeros stand outside the grid; they take part in the softmax. Each of the ``stride``-spaced windows is weighed by the mean
    of the ``stride`` x ``stride`` tokens at its place. An ``extra`` token is a window of its own: its one value has weight 1.

    Args:
        dim, heads: channels and heads, each with kernels of its own.
        kernel_size: tokens per axis of a window.
        stride: between windows.
        rank: number of grid axes.
        v_bias: whether the projection of values has a bias.
        attn_drop, proj_drop: dropout on the weights and on the output.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads``; input of another width or rank; a context on another grid.
    """

    joins_extra = False
    one_grid = True

    @checked()
    def __init__(
        self,
        dim: int,
        heads: int,
        kernel_size: int = 3,
        stride: int = 2,
        *,
        rank: int = 2,
        v_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, heads)
        if not 1 <= stride <= kernel_size:
            raise ValueError(f"stride must be from 1 to kernel_size; got {stride=}, {kernel_size=}")
        self.kernel_size, self.stride = kernel_size, stride
        self.rank: int = rank
        self.scale = (dim // heads) ** -0.5
        self.v = nn.Linear(dim, dim, bias=v_bias, device=device, dtype=dtype)
        self.pool = PoolKV("mean", stride)
        self.attn = nn.Linear(dim, heads * kernel_size ** (2 * rank), device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def weights(self, x: Tensor) -> Tensor:
        """Of each window, ``(batch, *windows, heads, taps, taps)``: the last axis sums to 1."""
        taps = self.kernel_size**self.rank
        logits = linear(self.attn, self.pool(x)).unflatten(-1, (self.heads, taps, taps))
        return F.softmax(logits * self.scale, -1)

    def forward(self, x: Tensor, extra: Tensor | None = None, *, context: Tensor | None = None) -> Any:
        """Mix tokens.

        Args:
            x: ``(batch, *grid, dim)``, what the weights are made of.
            extra: tokens outside the grid ``(batch, n, dim)``.
            context: like ``x``, what the values are made of; ``x`` by default.

        Returns:
            A tensor like ``x``; with ``extra`` also one like it.
        """
        self.check_tokens(x, extra, context)
        grid = tuple(x.shape[1:-1])
        check_fixed("outlook attention", grid)
        v = linear(self.v, x if context is None else context).unflatten(-1, (self.heads, -1))
        windows = unfold_windows(v, self.kernel_size, self.stride)  # (batch, *windows, heads, taps, head_dim)
        weights = self.weights(x)
        if WATCHERS:
            tell(self._weighing(weights, grid))
        mixed = self.attn_drop(weights) @ windows
        y = self.project_out(fold_windows(mixed, grid, self.kernel_size, self.stride).flatten(-2))
        return y if extra is None else (y, self.project_out(linear(self.v, extra)))

    def _weighing(self, weights: Tensor, grid: tuple[int, ...]) -> Weighing:
        """The weights of all windows together as weights of tokens: folding and unfolding are each other's adjoint."""

        def over_tokens(rows: Tensor) -> Tensor:
            chosen = torch.eye(math.prod(grid), dtype=weights.dtype, device=weights.device)[:, rows]
            ones = chosen.reshape(1, *grid, 1, len(rows)).expand(len(weights), *grid, self.heads, len(rows))
            spread = weights.transpose(-1, -2) @ unfold_windows(ones, self.kernel_size, self.stride)
            return fold_windows(spread, grid, self.kernel_size, self.stride).movedim((-2, -1), (1, 2))

        flops = 2 * weights.numel() * (self.dim // self.heads)
        moved = (weights.numel() + 2 * len(weights) * math.prod(grid) * self.dim) * weights.element_size()
        return Weighing("outlook", len(weights), self.heads, grid, grid, over_tokens, weights.device, flops=flops, bytes=moved)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}, stride={self.stride}"
