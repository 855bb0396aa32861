"""NATTEN's interface before version 0.20, where it is another one under the same names.

Version 0.17: fused functions without strides but with relative biases, and modules that have them on request. Version 0.14:
modules that have them by default, and fill maps smaller than their window up with zeros before the projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_tensor, checked
from ...layers.linear import linear
from ...ops import Source, attend
from ...ops.calls.source import HeadTable
from . import arguments, context, unfused
from .arguments import Flags, Sizes, check_dropouts, check_each, check_scale, check_tokens, named, neighborhood
from .functional import additional


def check_all_args(
    na_dim: int, kernel_size: Sizes, dilation: Sizes | None, is_causal: Flags | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """:func:`regard.compat.natten.arguments.check_all_args` without strides."""
    kernels, _, dilations, causal = arguments.check_all_args(na_dim, kernel_size, None, dilation, is_causal)
    return kernels, dilations, causal


def _fused(rank: int) -> Callable[..., Tensor]:
    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Sizes,
        dilation: Sizes | None = 1,
        is_causal: Flags | None = False,
        rpb: Tensor | None = None,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        xformers_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Neighborhood attention with relative biases.

        Args:
            query, key, value: ``(batch, *grid, heads, dim)``.
            kernel_size, dilation, is_causal, scale, additional_keys, additional_values: see
                :func:`regard.compat.natten.functional.neighborhood_attention_generic`.
            rpb: relative biases ``(heads, *(2 * kernel_size - 1))``; they get their gradient.
            xformers_kwargs: changes nothing.

        Returns:
            ``(batch, *grid, heads, value_dim)``.

        Raises:
            ValueError: shapes that do not go together, or arguments out of range.
        """
        check_each(query=query, key=key, value=value)
        scale = check_scale("scale", scale)
        if rpb is not None:
            check_tensor("rpb", rpb, device=query.device, what="(heads, *(2 * kernel_size - 1))")
        if query.ndim != rank + 3 or query.shape[:-1] != key.shape[:-1]:
            raise ValueError(
                f"query and key must be (batch, *grid, heads, dim) with {rank + 3} axes; "
                f"got {tuple(query.shape)} and {tuple(key.shape)}"
            )
        pattern = neighborhood(query.shape[1:-2], kernel_size, dilation, is_causal)
        bias = None if rpb is None else HeadTable(rpb, pattern)
        sources = [Source(key, value, pattern, bias=bias), *additional(additional_keys, additional_values)]
        out = attend(query, sources, scale=scale)
        assert isinstance(out, Tensor)  # no lse was asked for
        return out

    return named(f"na{rank}d", fused)


na1d, na2d, na3d = _fused(1), _fused(2), _fused(3)
_FUSED = (na1d, na2d, na3d)


class _Biased(nn.Module):
    """Neighborhood attention on tokens ``(batch, *grid, dim)``, with relative biases ``rpb`` or without (None)."""

    na_dim: ClassVar[int]

    @checked()
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Sizes,
        dilation: Sizes | None,
        is_causal: Flags | None,
        biased: bool,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
    ) -> None:
        super().__init__()
        check_dropouts(attn_drop=attn_drop, proj_drop=proj_drop)
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim; got {num_heads} and {dim}")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.scale = check_scale("qk_scale", qk_scale) or self.head_dim**-0.5
        self.kernel_size, self.dilation, self.is_causal = check_all_args(self.na_dim, kernel_size, dilation, is_causal)
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.rpb: nn.Parameter | None = None
        if biased:
            table = self.qkv.weight.new_empty(num_heads, *(2 * k - 1 for k in self.kernel_size))
            self.rpb = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self.attn_drop_rate = attn_drop
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        check_tokens(x, self.na_dim, self.dim)
        q, k, v = linear(self.qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        if self.training and self.attn_drop_rate and not context.is_fused_na_enabled():
            y = self._halves(*(t.movedim(-2, 1) for t in (q, k, v))).movedim(1, -2)
        else:
            y = _FUSED[self.na_dim - 1](
                q, k, v, self.kernel_size, self.dilation, self.is_causal, rpb=self.rpb, scale=self.scale
            )
        return self.proj_drop(linear(self.proj, y.flatten(-2)))

    def _halves(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """With dropout of the weights in between."""
        qk, av = (getattr(unfused, f"na{self.na_dim}d_{half}") for half in ("qk", "av"))
        how = {"kernel_size": self.kernel_size, "dilation": self.dilation, "is_causal": self.is_causal}
        weights = qk(q * self.scale, k, rpb=self.rpb, **how).softmax(-1)
        return av(self.attn_drop(weights), v, **how)

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"dilation={self.dilation}, is_causal={self.is_causal}, has_bias={self.rpb is not None}"
        )


class _Version17(_Biased):
    """The module of version 0.17.

    Args:
        dim: channels.
        num_heads: attention heads; divides ``dim``.
        kernel_size, dilation, is_causal: see :func:`regard.compat.natten.functional.neighborhood_attention_generic`.
        rel_pos_bias: whether there are relative biases, ``rpb``.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        qk_scale: factor on the logits; None and 0 are ``head_dim ** -0.5``.
        attn_drop: dropout of the attention weights, in training and without
            :func:`regard.compat.natten.context.use_fused_na`, as in NATTEN.
        proj_drop: dropout after the output projection.
        use_experimental_ops: changes nothing.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or arguments out of range.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Sizes,
        dilation: Sizes | None = 1,
        is_causal: Flags | None = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
    ) -> None:
        super().__init__(
            dim, num_heads, kernel_size, dilation, is_causal, rel_pos_bias, qkv_bias, qk_scale, attn_drop, proj_drop
        )


class NeighborhoodAttention1D(_Version17):
    __doc__ = _Version17.__doc__
    na_dim = 1


class NeighborhoodAttention2D(_Version17):
    __doc__ = _Version17.__doc__
    na_dim = 2


class NeighborhoodAttention3D(_Version17):
    __doc__ = _Version17.__doc__
    na_dim = 3


class _Version14(_Biased):
    """The module of version 0.14: maps smaller than ``kernel_size * dilation`` are filled up with zeros and cut afterwards.

    Args:
        bias: whether there are relative biases, ``rpb``.

    The others are those of version 0.17.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Sizes,
        dilation: Sizes | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, kernel_size, dilation, False, bias, qkv_bias, qk_scale, attn_drop, proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        check_tokens(x, self.na_dim, self.dim)
        grid = x.shape[1:-1]
        short = [max(0, k * d - n) for k, d, n in zip(self.kernel_size, self.dilation, grid, strict=True)]
        y = super().forward(F.pad(x, [0, 0, *(n for missing in reversed(short) for n in (0, missing))]))
        return y[(slice(None), *(slice(n) for n in grid))]


class PaddedNeighborhoodAttention1D(_Version14):
    __doc__ = _Version14.__doc__
    na_dim = 1


class PaddedNeighborhoodAttention2D(_Version14):
    __doc__ = _Version14.__doc__
    na_dim = 2
