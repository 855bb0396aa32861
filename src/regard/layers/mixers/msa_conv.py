"""MSA-Conv: a convolution whose first half is attention, softmax over the places of a kernel, and whose second half is plain.

    y[p] = relu(conv(x + sum_j softmax_j(q_p . k[p + r j] / sqrt(dim)) v[p + r j])),   r the dilation
Cost: linear in tokens, kernel volume keys per query. Source: Zhang et al., TiC, arXiv:2310.04134.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...checks import LARGEST, checked
from ...ops import Source
from ...ops import patterns as P
from ..blocks import DropPath
from ..conv import CONVOLUTIONS, convolve_tokens
from .base import AttentionMixer
from .registry import register_mixer


class TokenConv(nn.Module):
    """A convolution of the grid; a token outside the grid has no neighbours, and meets the middle of the kernel alone.

    Args:
        dim, out: channels in and out.
        kernel_size: odd.
        stride: by how much it reduces every axis.
        rank: number of grid axes.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        out: int,
        kernel_size: int,
        stride: int = 1,
        rank: int = 2,
        *,
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.rank = rank
        kind = CONVOLUTIONS[rank]
        self.conv = kind(dim, out, kernel_size, stride, kernel_size // 2, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == self.rank + 2:
            return convolve_tokens(self.conv, x)
        alone = x.reshape(-1, *[1] * self.rank, x.shape[-1])  # each token is a grid of its own
        return convolve_tokens(self.conv, alone).reshape(*x.shape[:-1], -1)


@register_mixer("msa_conv", label="MSA-Conv", unseen=("out", "drop_path"))
class MSAConv(AttentionMixer):
    """Attention within a kernel, the residual, a convolution and ReLU: a whole layer, which may halve the grid.

    Heads may look elsewhere: with ``shift`` each sees the map rolled by as many steps, down or up one axis after the other,
    and is rolled back after.

    Args:
        dim, heads: channels and attention heads; the release has one head.
        kernel_size: of the attention, odd.
        dilation: steps between its taps.
        shift: steps by which the map is rolled; 0 for none.
        mask_padding: whether the places outside the grid are left out. As published they are not: keys of zeros have logit 0
            and take their share of the softmax.
        conv_size: of the convolution, odd.
        out: channels of the result; ``dim`` by default.
        stride: of the convolution.
        rank: number of grid axes, 2 or 3.
        drop_path: stochastic depth of the attention.
        **projections: see :class:`AttentionMixer`; ``scale`` is ``dim ** -0.5`` for any number of heads.

    Raises:
        ValueError: an even kernel; sizes below 1; heads that are not ``dim`` wide together; another rank.
    """

    @checked(shift=-LARGEST)
    def __init__(
        self,
        dim: int,
        heads: int = 1,
        kernel_size: int = 7,
        dilation: int = 1,
        shift: int = 0,
        *,
        mask_padding: bool = False,
        conv_size: int = 3,
        out: int | None = None,
        stride: int = 1,
        rank: int = 2,
        drop_path: float = 0.0,
        scale: float | None = None,
        proj_bias: bool = False,
        **projections,
    ) -> None:
        super().__init__(dim, heads, **projections)
        self.scale = dim**-0.5 if scale is None else scale
        out = dim if out is None else out
        sizes = (kernel_size, conv_size, dilation, stride, out)
        if not all(isinstance(n, int) for n in (*sizes, shift)) or min(sizes) < 1 or not (kernel_size % 2 and conv_size % 2):
            raise ValueError(
                "kernel_size, conv_size, dilation, stride and out must be integers, at least 1, the first two odd, and shift "
                f"an integer; got {kernel_size=}, {conv_size=}, {dilation=}, {stride=}, {out=}, {shift=}"
            )
        if self.heads * self.value_dim != dim:
            raise ValueError(f"the heads must be dim={dim} wide together; got {self.heads} heads of {self.value_dim}")
        if rank not in (2, 3):
            raise ValueError(f"rank must be 2 or 3; got {rank}")
        self.pattern = P.Neighborhood(kernel_size, dilation, border="mask" if mask_padding else "zero")
        self.shift = shift
        self.rank: int = rank
        self.drop_path = DropPath(drop_path)
        conv = TokenConv(dim, out, conv_size, stride, rank, bias=proj_bias, **self.factory)
        self.proj = nn.Sequential(conv, nn.ReLU())

    def roll(self, x: Tensor, sign: int) -> Tensor:
        """Roll the heads ``(batch, *grid, heads, head_dim)``, each its own way: down and up each axis in turn."""
        heads = []
        for index, head in enumerate(x.unbind(-2)):
            axis, back = index // 2 % self.rank, index % 2
            heads.append(torch.roll(head, sign * (-self.shift if back else self.shift), 1 + axis))
        return torch.stack(heads, -2)

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: Sequence[Source]) -> Tensor:
        if not self.shift:
            return self.attend(q, [Source(k, v, self.pattern), *extra])
        q, k, v = (self.roll(t, 1) for t in (q, k, v))
        return self.roll(self.attend(q, [Source(k, v, self.pattern), *extra]), -1)

    def weigh_heads(self, y: Tensor, x: Tensor, q: Tensor) -> Tensor:
        """The residual: it is added before the convolution."""
        return x.unflatten(-1, (self.heads, -1)) + self.drop_path(y)
