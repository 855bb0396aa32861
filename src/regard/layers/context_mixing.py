"""Context mixing: convolution with kernels made of how much each token has to do with each region of a context.

    y[p] = sum_o softmax_o(W q_p K^T + b_o) v[p + o],  q of the tokens, K of 7 x 7 means of the context, v of both
Cost: linear in tokens. Source: Lou & Yu, OverLoCK, arXiv:2502.20087; large kernels: Ding et al., UniRepLKNet, arXiv:2311.15599;
response norm: Woo et al., ConvNeXt V2, arXiv:2301.00808.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import patterns as P
from ..ops.local.kernels import apply_kernel
from .blocks import DropPath, TokenBatchNorm
from .conv import convolve_tokens, depthwise
from .conv_norm import ConvNorm, DilatedConvNorm, fold
from .gates import SqueezeGate
from .linear import linear
from .mlps import MLP
from .positions import ConvPosition, OffsetBias


class OnTokens(nn.Module):
    """A channels-first module, applied to tokens."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return convolve_tokens(self.op, x)


class Affine(nn.Module):
    """A learned factor and shift per channel, at first 1 and 0."""

    def __init__(self, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class ResponseNorm(nn.Module):
    """Channels compete by their norm over the grid: ``(gamma r / mean(r) + 1) x + beta`` with ``r = |x|`` of each channel.

    Source: Woo et al., ConvNeXt V2, arXiv:2301.00808.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        response = response / (response.mean(-1, keepdim=True) + self.eps)
        return (self.gamma * response + 1) * x + self.beta


class ResponseMLP(MLP):
    """An MLP whose hidden tokens, once activated, meet their neighbours and then the response norm."""

    def __init__(self, dim: int, hidden: int, *, device=None, dtype=None) -> None:
        super().__init__(dim, hidden, device=device, dtype=dtype)
        self.position = ConvPosition(hidden, device=device, dtype=dtype)
        self.response = ResponseNorm(hidden, device=device, dtype=dtype)

    def hidden(self, x: Tensor) -> Tensor:
        return self.response(self.position(super().hidden(x)))


class LargeKernel(nn.Module):
    """A large depthwise kernel with dilated ones beside it, and a batch norm of their sum; channels first.

    Args:
        dim: channels.
        kernel_size: of the large kernel.
        merged: whether the dilated kernels are in the large one already, as in checkpoints published for inference.
    """

    def __init__(self, dim: int, kernel_size: int, *, merged: bool, device=None, dtype=None) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        make = depthwise if merged else DilatedConvNorm
        self.kernel: nn.Module = make(dim, kernel_size, **factory)
        self.norm = nn.BatchNorm2d(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.kernel(x))

    def fuse(self) -> nn.Module:
        """The depthwise convolution that this is in eval mode."""
        kernel = self.kernel.fuse() if isinstance(self.kernel, DilatedConvNorm) else self.kernel
        return fold(cast(nn.Conv2d, kernel), self.norm)


def squeeze_gate_on_tokens(dim: int, **factory) -> OnTokens:
    return OnTokens(SqueezeGate(dim, max(16, dim // 8), act=nn.GELU, **factory))


def resize_tokens(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens, interpolated bilinearly."""
    if tuple(x.shape[1:3]) == tuple(grid):
        return x
    return F.interpolate(x.movedim(-1, 1), size=tuple(grid), mode="bilinear", align_corners=False).movedim(1, -1)


class ContextMixing(nn.Module):
    """Convolution with kernels made of how much each token has to do with each region of a context (ContMix).

        a = q_p K^T                            49 affinities per token and group; K of the 7 x 7 means of the context
        w = softmax over taps of W a + b       for a small kernel and for a large one, each with its biases over offsets
        y[p] = sum_o w[p, o] v[p + o]          half of the channels by the small kernel, half by the large one

    At borders the kernels are moved inward. A grid with an axis shorter than the large kernel is enlarged bilinearly until it
    is as long, and the result averaged back.

    Args:
        dim: channels of tokens and values.
        context_dim: channels of the context.
        groups: of the channels of each half, with kernels of their own.
        kernel_size, small_size: of the two kernels, odd.

    Raises:
        ValueError: half of ``dim`` is not a multiple of ``groups``; tensors that do not fit.
    """

    REGIONS = 7

    def __init__(
        self, dim: int, context_dim: int, groups: int, kernel_size: int, small_size: int = 5, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        if dim % (2 * groups):
            raise ValueError(f"dim must be a multiple of twice the groups; got {dim=}, {groups=}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.context_dim, self.groups = dim, context_dim, groups
        self.scale = (dim // groups) ** -0.5
        self.sizes = (small_size, kernel_size)
        self.query = ConvNorm(dim, dim // 2, **factory)
        self.key = ConvNorm(context_dim, dim // 2, **factory)
        self.taps = nn.Linear(self.REGIONS**2, small_size**2 + kernel_size**2, **factory)
        self.bias_small, self.bias_large = (OffsetBias(groups, P.Neighborhood(k), **factory) for k in self.sizes)
        for bias in (self.bias_small, self.bias_large):
            nn.init.zeros_(bias.table)

    def working_grid(self, grid: Sequence[int]) -> tuple[int, int]:
        """The grid that the kernels are applied on: enlarged where they do not fit."""
        rows, columns = grid
        short, size = min(rows, columns), max(self.sizes)
        return (rows, columns) if short >= size else (size * rows // short, size * columns // short)

    def kernels(self, tokens: Tensor, context: Tensor) -> list[Tensor]:
        """The small and the large kernel of each token, ``(batch, rows, columns, groups, taps)``; each sums to 1."""
        pooled = F.adaptive_avg_pool2d(context.movedim(-1, 1), self.REGIONS)
        q = convolve_tokens(self.query, tokens).unflatten(-1, (self.groups, -1)) * self.scale
        k = self.key(pooled).flatten(2).unflatten(1, (self.groups, -1))  # (batch, groups, channels, regions)
        logits = linear(self.taps, torch.einsum("bhwgc,bgcl->bhwgl", q, k)).split([size**2 for size in self.sizes], -1)
        biases = (self.bias_small, self.bias_large)
        grid = tokens.shape[1:3]
        return [(part + tap_bias(bias.table, grid)).softmax(-1) for part, bias in zip(logits, biases, strict=True)]

    def forward(self, tokens: Tensor, context: Tensor, values: Tensor) -> Tensor:
        """Mix values.

        Args:
            tokens: ``(batch, rows, columns, dim)``, what the queries are of.
            context: ``(batch, rows, columns, context_dim)``.
            values: ``(batch, rows, columns, dim)``.

        Returns:
            ``(batch, rows, columns, dim)``.
        """
        shapes = [(*values.shape[:3], width) for width in (self.dim, self.context_dim, self.dim)]
        if values.ndim != 4 or [tuple(t.shape) for t in (tokens, context, values)] != shapes:
            raise ValueError(
                f"expected tokens, context and values (batch, rows, columns, channels) of {self.dim}, {self.context_dim} and "
                f"{self.dim} channels; got {tuple(tokens.shape)}, {tuple(context.shape)} and {tuple(values.shape)}"
            )
        rows, columns = values.shape[1:3]
        grid = self.working_grid((rows, columns))
        tokens, context, values = (resize_tokens(t, grid) for t in (tokens, context, values))
        parts = [
            apply_kernel(half.unflatten(-1, (self.groups, -1)), weights, size, border="shift").flatten(-2)
            for half, weights, size in zip(values.chunk(2, -1), self.kernels(tokens, context), self.sizes, strict=True)
        ]
        y = torch.cat(parts, -1)
        return y if grid == (rows, columns) else F.adaptive_avg_pool2d(y.movedim(-1, 1), (rows, columns)).movedim(1, -1)


def tap_bias(table: Tensor, grid: Sequence[int]) -> Tensor:
    """A table over offsets ``(groups, 2k - 1, 2k - 1)`` read at the taps of each token: ``(rows, columns, groups, k * k)``."""
    size = (table.shape[-1] + 1) // 2
    taps = torch.arange(size, device=table.device)
    indices = []
    for length in grid:
        at = torch.arange(length, device=table.device)
        start = (at - size // 2).clamp(0, length - size)
        indices.append((start - at + size - 1)[:, None] + taps)
    rows, columns = indices
    return table[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(-2).movedim(0, -2)


class DynamicBlock(nn.Module):
    """A block of tokens and a context that travels with them: context mixing, then an MLP on both.

        h <- scale(h) + scale'(context), but in the first block;  z = [x, h] + DW([x, h]);  n = LN(z);  v = fuse(n)
        y = reduce(gate(v) * squeeze(mix(n_x, n_h, v) + large kernel(v)))
        z <- scale(z) + y;  z <- z + DW(z);  [x, h] = scale(z) + MLP(LN(z))

    Args:
        dim, context_dim: channels of the tokens and of the context.
        groups, kernel_size: see :class:`ContextMixing`.
        mlp_ratio: hidden channels of the MLP over ``dim``.
        merged: see :class:`LargeKernel`.
        first: whether the context enters here.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        groups: int,
        kernel_size: int,
        *,
        mlp_ratio: float,
        merged: bool,
        first: bool,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        both = dim + context_dim
        self.widths = (dim, context_dim)
        self.hidden_scale, self.context_scale = (None if first else Affine(context_dim, **factory) for _ in range(2))
        self.position1 = ConvPosition(both, **factory)
        self.norm1 = nn.LayerNorm(both, eps=1e-6, **factory)
        self.fuse_conv = depthwise(both, 3, **factory)
        self.fuse_norm = nn.BatchNorm2d(both, **factory)
        self.fuse_proj = nn.Linear(both, dim, **factory)
        self.response = ResponseNorm(dim, **factory)
        self.gate = OnTokens(ConvNorm(dim, dim, act=nn.SiLU, **factory))
        self.large = OnTokens(LargeKernel(dim, kernel_size, merged=merged, **factory))
        self.mixer = ContextMixing(dim, context_dim, groups, kernel_size, **factory)
        self.mixer_proj = OnTokens(ConvNorm(dim, dim, **factory))
        self.squeeze = squeeze_gate_on_tokens(dim, **factory)
        self.proj_norm = TokenBatchNorm(dim, **factory)
        self.proj = nn.Linear(dim, both, **factory)
        self.scale1 = Affine(both, **factory)
        self.position2 = ConvPosition(both, **factory)
        self.norm2 = nn.LayerNorm(both, eps=1e-6, **factory)
        self.mlp = ResponseMLP(both, int(dim * mlp_ratio), **factory)
        self.scale2 = Affine(both, **factory)
        self.drop_path = DropPath(drop_path)

    def mix(self, normed: Tensor) -> Tensor:
        """The branch of context mixing, of normalised tokens and context side by side."""
        tokens, context = normed.split(self.widths, -1)
        fused = F.gelu(convolve_tokens(self.fuse_norm, convolve_tokens(self.fuse_conv, normed)))
        values = self.response(linear(self.fuse_proj, fused))
        y = self.mixer_proj(self.mixer(tokens, context, values)) + self.large(values)
        return linear(self.proj, self.proj_norm(self.gate(values) * self.squeeze(y)))

    def forward(self, x: Tensor, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, the context that travels with them, and the one that does not, all on one grid; returns the first two."""
        if self.hidden_scale is not None and self.context_scale is not None:
            hidden = self.hidden_scale(hidden) + self.context_scale(context)
        z = self.position1(torch.cat([x, hidden], -1))
        z = self.position2(self.scale1(z) + self.drop_path(self.mix(self.norm1(z))))
        x, hidden = (self.scale2(z) + self.drop_path(self.mlp(self.norm2(z)))).split(self.widths, -1)
        return x, hidden
