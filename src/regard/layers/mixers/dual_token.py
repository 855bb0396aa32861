"""Dual tokens: image tokens look at a small grid of global tokens, which each block makes of both.

    X_ds = downsample(X);  G' = MLP(a Attention(LN(X_ds)) + (1 - a) G);  Y = Attention(LN(X), G')

The global tokens have positions: their grid is that of X_ds, so that a weighted sum, place by place, suffices to update them.
Cost: linear in image tokens, ``size`` squared keys each. Source: Chu et al., DualToken-ViT, arXiv:2309.12424.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...checks import checked
from ..conv import convolve_tokens, depthwise
from ..linear import linear
from ..mlps import MLP, MixerMLP
from ..pools import PoolKV
from .base import SplitMixer, check_tokens
from .multi_head import MultiHeadAttention


class SeparableConv(nn.Module):
    """``x + act(W LN(DW(x)))`` on tokens, with a depthwise convolution.

    Args:
        dim: channels.
        kernel_size: of the convolution.
        norm: class of the norm.
    """

    @checked()
    def __init__(
        self, dim: int, kernel_size: int = 3, *, norm: Callable[..., nn.Module] = nn.LayerNorm, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.conv = depthwise(dim, kernel_size, device=device, dtype=dtype)
        self.norm = norm(dim, device=device, dtype=dtype)
        self.fc = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(linear(self.fc, self.norm(convolve_tokens(self.conv, x))))


class DualTokenAttention(nn.Module):
    """Update the global tokens from a map, and let the map look at them. Not a mixer: it has two sets of tokens.

    Args:
        dim: channels of both.
        heads: attention heads.
        size: rows and columns of the global tokens.
        steps: how often the map is halved, each time after a convolution, before it is averaged to the size of the global
            tokens where it still differs.
        mix: whether the MLP of the global tokens also mixes places (:class:`regard.layers.mlps.MixerMLP`).
        mlp_ratio: hidden channels of that MLP over ``dim``.
        norm: class of the norms.
        attn_drop: dropout on the attention weights.
        backend: see :func:`regard.attend`.

    Attributes:
        alpha: the weight ``a`` of the map in the update, learned, 0.5 at the start.

    Raises:
        ValueError: maps or global tokens of another width or size.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        size: int = 7,
        steps: int = 0,
        mix: bool = False,
        mlp_ratio: float = 4.0,
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        attn_drop: float = 0.0,
        backend: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        attention = {"attn_drop": attn_drop, "backend": backend, **factory}
        self.dim, self.size = dim, size
        halvings = [PoolKV("mean", 2, before=SeparableConv(dim, norm=norm, **factory)) for _ in range(steps)]
        self.downsample = nn.Sequential(*halvings, PoolKV("adaptive", size=size))
        self.norm_map = norm(dim, **factory)
        self.aggregate = MultiHeadAttention(dim, heads, **attention)
        self.alpha = nn.Parameter(torch.full((1,), 0.5, **factory))
        hidden = int(dim * mlp_ratio)
        self.mlp = MixerMLP(dim, hidden, tokens=size * size, **factory) if mix else MLP(dim, hidden, **factory)
        self.norm = norm(dim, **factory)
        self.broadcast = SplitMixer(dim, heads, **attention)

    def update(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The global tokens after this block."""
        gathered = self.aggregate(self.norm_map(self.downsample(x)))
        return self.mlp(self.alpha * gathered + (1 - self.alpha) * tokens)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the map finds in the global tokens, and these.

        Args:
            x: ``(batch, rows, columns, dim)``.
            tokens: ``(batch, size, size, dim)``, of the block before.

        Returns:
            A tensor like each.
        """
        check_tokens(self.dim, None, x, context=tokens)
        if x.ndim != 4 or tokens.shape != (x.shape[0], self.size, self.size, self.dim):
            raise ValueError(
                f"expected x (batch, rows, columns, {self.dim}) and tokens (batch, {self.size}, {self.size}, {self.dim}); "
                f"got {tuple(x.shape)} and {tuple(tokens.shape)}"
            )
        tokens = self.update(x, tokens)
        return self.broadcast(self.norm(x), context=tokens), tokens
