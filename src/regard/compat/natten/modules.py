"""NATTEN's modules of version 0.21: projections around neighborhood attention, the same names in the state dict."""

from __future__ import annotations

from functools import partialmethod

from torch import Tensor, nn

from ...checks import checked
from ...layers.linear import linear
from .arguments import Flags, Sizes, check_all_args, check_dropouts, check_scale, check_tokens
from .functional import neighborhood_attention_generic

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D", "NeighborhoodAttentionGeneric"]


class NeighborhoodAttentionGeneric(nn.Module):
    """Neighborhood attention with its projections on tokens ``(batch, *grid, embed_dim)``.

    Args:
        na_dim: axes of the grid, 1 to 3; the modules named after it do not take it.
        embed_dim: channels.
        num_heads: attention heads; divides ``embed_dim``.
        kernel_size, stride, dilation, is_causal: see :func:`regard.compat.natten.functional.neighborhood_attention_generic`.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        qk_scale: factor on the logits; None and 0 are ``head_dim ** -0.5``.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: ``num_heads`` does not divide ``embed_dim``, or arguments out of range.
    """

    @checked()
    def __init__(
        self,
        na_dim: int,
        embed_dim: int,
        num_heads: int,
        kernel_size: Sizes,
        stride: Sizes | None = 1,
        dilation: Sizes | None = 1,
        is_causal: Flags | None = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_dropouts(proj_drop=proj_drop)
        if na_dim > 3:
            raise ValueError(f"na_dim must be 1 to 3; got {na_dim}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim; got {num_heads} and {embed_dim}")
        self.na_dim, self.embed_dim, self.num_heads, self.head_dim = na_dim, embed_dim, num_heads, embed_dim // num_heads
        self.scale = check_scale("qk_scale", qk_scale) or self.head_dim**-0.5
        arguments = check_all_args(na_dim, kernel_size, stride, dilation, is_causal)
        self.kernel_size, self.stride, self.dilation, self.is_causal = arguments
        self.qkv = nn.Linear(embed_dim, embed_dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        check_tokens(x, self.na_dim, self.embed_dim)
        q, k, v = linear(self.qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        y = neighborhood_attention_generic(q, k, v, self.kernel_size, self.stride, self.dilation, self.is_causal, self.scale)
        assert isinstance(y, Tensor)  # no lse was asked for
        return self.proj_drop(linear(self.proj, y.flatten(-2)))

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, dilation={self.dilation}, is_causal={self.is_causal}"
        )


class NeighborhoodAttention1D(NeighborhoodAttentionGeneric):
    __doc__ = NeighborhoodAttentionGeneric.__doc__
    __init__ = partialmethod(NeighborhoodAttentionGeneric.__init__, 1)


class NeighborhoodAttention2D(NeighborhoodAttentionGeneric):
    __doc__ = NeighborhoodAttentionGeneric.__doc__
    __init__ = partialmethod(NeighborhoodAttentionGeneric.__init__, 2)


class NeighborhoodAttention3D(NeighborhoodAttentionGeneric):
    __doc__ = NeighborhoodAttentionGeneric.__doc__
    __init__ = partialmethod(NeighborhoodAttentionGeneric.__init__, 3)
