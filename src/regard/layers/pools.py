"""Fewer tokens of the same map: pooled keys and values, and readouts that turn all tokens into one vector.

    PoolKV:          after(reduce(before(x)))   on (batch, *grid, dim)
    ClassAttention:  W_o softmax(q_class k^T / sqrt(d)) v
    AttentionPool:   sum_n softmax_n(w . x_n) x_n

Cost: linear in tokens. Source: Wang et al., PVT, arXiv:2102.12122; Touvron et al., CaiT, arXiv:2103.17239.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_per_axis, check_tensor, checked
from ..ops import attend
from ..ops.calls.footprint import Footprint
from ..ops.patterns import Ints
from ..ops.tokens.route import summaries
from ..ops.tracing import check_fixed, fill
from .conv import CONVOLUTIONS, convolve_tokens
from .linear import linear

RESIZE_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
ADAPTIVE_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def sizes_of(grid: Sequence[int], size: Ints) -> tuple[int, ...]:
    """A size per axis of a grid that has between 1 and 3 axes."""
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"expected a grid of 1 to 3 axes; got {tuple(grid)}")
    return check_per_axis("size", size, len(grid))


def adaptive_pool(x: Tensor, size: Ints) -> Tensor:
    """The mean over ``size`` equal parts per axis of tokens ``(batch, *grid, dim)``; parts may share a row of tokens."""
    sizes = sizes_of(x.shape[1:-1], size)
    return ADAPTIVE_POOLS[len(sizes)](x.movedim(-1, 1), sizes).movedim(1, -1)  # type: ignore[arg-type]  # a tuple serves all


def resize_tokens(x: Tensor, size: Ints) -> Tensor:
    """Tokens ``(batch, *grid, dim)`` interpolated linearly to ``(batch, *size, dim)``, corners not aligned."""
    sizes = sizes_of(x.shape[1:-1], size)
    return F.interpolate(x.movedim(-1, 1), sizes, mode=RESIZE_MODES[len(sizes)], align_corners=False).movedim(1, -1)


class PoolKV(nn.Module):
    """Pool the tokens that keys and values are made of: ``after(reduce(before(x)))``, ``(batch, *grid, dim)`` in and out.

    The order of projection, activation, norm and pooling is the caller's, as ``before`` and ``after``: pool the input and
    project then (HiLo), or project, activate, pool and normalise (TransNeXt).

    Args:
        kind: ``"mean"`` of windows of ``ratio`` tokens, the last of an axis may be partial and counts its own tokens only;
            ``"adaptive"`` mean to ``size`` tokens per axis, or to ``length // ratio``; ``"resize"`` likewise, by linear
            interpolation; ``"conv"``, a convolution of ``dim`` channels with kernel and stride ``ratio``, zeros appended where
            it does not divide.
        ratio: tokens per pooled token on an axis; 1 leaves them as they are (``"conv"`` still convolves).
        size: tokens per axis after pooling, instead of ``ratio``.
        dim: channels of the convolution.
        groups: of the convolution; ``dim`` makes it depthwise.
        rank: number of grid axes of the convolution.
        before, after: modules on tokens, applied before and after.

    Raises:
        ValueError: an unknown kind; not exactly one of ``ratio`` and ``size``; a kind that lacks what it needs.
    """

    KINDS = ("mean", "adaptive", "resize", "conv")

    @checked()
    def __init__(
        self,
        kind: str,
        ratio: int | None = None,
        *,
        size: Ints | None = None,
        dim: int | None = None,
        groups: int = 1,
        rank: int = 2,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kind not in self.KINDS:
            raise ValueError(f"kind must be one of {', '.join(self.KINDS)}; got {kind!r}")
        if (ratio is None) == (size is None) or (ratio is not None and ratio < 1):
            raise ValueError(f"give either a ratio of at least 1 or a size; got {ratio=}, {size=}")
        if kind in ("mean", "conv") and ratio is None:
            raise ValueError(f"{kind!r} pooling needs a ratio; got {size=}")
        if (kind == "conv") != (dim is not None):
            raise ValueError(f"'conv' pooling, and only that, needs dim; got {kind=}, {dim=}")
        self.kind, self.ratio, self.size = kind, ratio, size
        self.conv = None
        if kind == "conv":
            if rank not in CONVOLUTIONS:
                raise ValueError(f"convolutions exist on grids of 1, 2 or 3 axes; got rank={rank}")
            assert dim is not None  # checked above
            assert ratio is not None
            self.conv = CONVOLUTIONS[rank](dim, dim, ratio, stride=ratio, groups=groups, device=device, dtype=dtype)
        self.before = nn.Identity() if before is None else before
        self.after = nn.Identity() if after is None else after

    def reduce(self, x: Tensor) -> Tensor:
        """The pooling alone."""
        check_tensor("x", x, what="(batch, *grid, dim)")
        if x.ndim < 3 or 0 in x.shape[1:]:
            raise ValueError(f"expected x (batch, *grid, dim), no axis empty but the batch; got {tuple(x.shape)}")
        grid = x.shape[1:-1]
        if self.conv is not None:
            assert self.ratio is not None  # the constructor checked
            pads = [n for length in reversed(grid) for n in (0, fill(length, self.ratio))]
            return convolve_tokens(self.conv, F.pad(x, [0, 0, *pads]) if any(pads) else x)
        if self.ratio == 1:
            return x
        if self.ratio is None:
            assert self.size is not None  # one of both is given
            size = self.size
        elif self.kind == "mean":
            check_fixed("mean pooling", grid)  # whether it divides the grid decides how it is computed
            return summaries(x, (self.ratio,) * len(grid))
        else:
            size = tuple(max(1, n // self.ratio) for n in grid)
        return adaptive_pool(x, size) if self.kind == "adaptive" else resize_tokens(x, size)

    def footprint(self, grid: Sequence[int]) -> Footprint:
        """Which tokens of a grid each pooled token stands for; see :class:`regard.ops.calls.footprint.Footprint`."""
        if self.kind in ("mean", "conv"):
            return Footprint(tuple(grid), "windows", self.ratio)
        return Footprint(tuple(grid), self.kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.reduce(self.before(x)))

    def extra_repr(self) -> str:
        return f"{self.kind!r}, ratio={self.ratio}" if self.size is None else f"{self.kind!r}, size={self.size}"


class ClassAttention(nn.Module):
    """The leading tokens attend to all tokens; only they are queries.

    Args:
        dim: channels.
        heads: attention heads.
        qkv_bias: whether queries, keys and values have a bias.
        prefix: number of leading tokens that ask.
        scale: factor on the logits, ``head_dim ** -0.5`` by default.
        attn_drop: dropout on the attention weights.
        backend: see :func:`regard.attend`.

    Source: Touvron et al., CaiT, arXiv:2103.17239; Yuan et al., VOLO, arXiv:2106.13112.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qkv_bias: bool = False,
        prefix: int = 1,
        scale: float | None = None,
        attn_drop: float = 0.0,
        backend: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim must be a multiple of heads; got dim={dim}, heads={heads}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.heads, self.prefix = dim, heads, prefix
        self.scale, self.attn_drop, self.backend = scale, attn_drop, backend
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, prefix + n, dim)`` to what the leading tokens gathered, ``(batch, prefix, dim)``."""
        if x.ndim != 3 or x.shape[-1] != self.dim or x.shape[1] < self.prefix:
            raise ValueError(f"expected (batch, {self.prefix} + n, {self.dim}); got {tuple(x.shape)}")
        q = linear(self.q, x[:, : self.prefix]).unflatten(-1, (self.heads, -1))
        k, v = linear(self.kv, x).unflatten(-1, (2, self.heads, -1)).unbind(2)
        dropout = self.attn_drop if self.training else 0.0
        y = attend(q, k, v, scale=self.scale, dropout=dropout, backend=self.backend)
        assert isinstance(y, Tensor)  # no lse was asked for
        return linear(self.proj, y.flatten(-2))


def weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    """``sum_n w_n x_n / sum_n w_n`` over all tokens.

    Args:
        x: ``(batch, *grid, dim)``.
        weights: ``(batch, *grid)``, not negative, with a positive sum.

    Returns:
        ``(batch, dim)``.
    """
    weights = weights.flatten(1)
    return torch.einsum("bn,bnc->bc", weights / weights.sum(1, keepdim=True), x.flatten(1, -2))


class AttentionPool(nn.Module):
    """The mean of all tokens, weighted by a softmax of learned scores: ``(batch, *grid, dim) -> (batch, dim)``.

    Args:
        dim: channels.

    Source: Hassani et al., CCT (sequence pooling), arXiv:2104.05704.
    """

    @checked()
    def __init__(self, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return weighted_mean(x, linear(self.score, x).flatten(1).softmax(-1).unflatten(1, x.shape[1:-1]))
