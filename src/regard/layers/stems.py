"""Stems and downsampling: from an image to tokens, and from tokens to fewer, wider tokens.

A stem takes ``(batch, channels, height, width)`` and returns ``(batch, rows, columns, dim)``; a downsampling layer takes and
returns tokens. All take any size: where a patch does not fit, zeros are appended at the bottom and on the right. ``norm`` is
a constructor called with the number of channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.patterns import Ints
from ..ops.tracing import fill
from .blocks import TokenBatchNorm
from .conv import CONVOLUTIONS, convolve_tokens
from .linear import linear

Norm = Callable[..., nn.Module]


def pad_to_even(x: Tensor) -> Tensor:
    """Append zeros to the grid axes of odd length of tokens ``(batch, rows, columns, channels)``."""
    rows, columns = x.shape[1:3]
    return F.pad(x, [0, 0, 0, columns % 2, 0, rows % 2]) if rows % 2 or columns % 2 else x


class PatchEmbed(nn.Module):
    """Patches of ``patch_size`` squared pixels, projected to ``dim`` channels and normalised.

    A size per axis, ``(frames, rows, columns)``, makes it tubelets of videos ``(batch, channels, frames, height, width)``.

    Source: Dosovitskiy et al., ViT, arXiv:2010.11929; Arnab et al., ViViT, arXiv:2103.15691.
    """

    def __init__(
        self, in_chans: int, dim: int, *, patch_size: Ints = 4, norm: Norm | None = nn.LayerNorm, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.sizes = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
        self.reduction = self.sizes[-1]
        conv: Any = CONVOLUTIONS[len(self.sizes)]
        self.proj = conv(in_chans, dim, self.sizes, stride=self.sizes, device=device, dtype=dtype)
        self.norm = nn.Identity() if norm is None else norm(dim, device=device, dtype=dtype)

    def forward(self, image: Tensor) -> Tensor:
        pads = [fill(length, size) for length, size in zip(image.shape[2:], self.sizes, strict=True)]
        if any(pads):
            image = F.pad(image, [n for pad in reversed(pads) for n in (0, pad)])
        return self.norm(self.proj(image).movedim(1, -1))


class OverlapPatchEmbed(nn.Module):
    """Overlapping patches: one strided convolution, then a norm.

    Args:
        in_chans, dim: channels in and out.
        kernel_size: of the convolution, odd.
        stride: pixels per token.
        norm: constructor of the norm.

    Source: Wang et al., PVT v2, arXiv:2106.13797.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        *,
        kernel_size: int = 7,
        stride: int = 4,
        norm: Norm = nn.LayerNorm,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.reduction = stride
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, kernel_size // 2, device=device, dtype=dtype)
        self.norm = norm(dim, device=device, dtype=dtype)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).movedim(1, -1))


class ConvTokenizer(nn.Module):
    """Two overlapping convolutions of stride 2 without an activation between them, then a norm.

    Source: Hassani et al., NAT, arXiv:2204.07143.
    """

    reduction = 4

    def __init__(self, in_chans: int, dim: int, *, norm: Norm = nn.LayerNorm, device=None, dtype=None) -> None:
        super().__init__()
        options = {"stride": 2, "padding": 1, "device": device, "dtype": dtype}
        self.proj = nn.Sequential(nn.Conv2d(in_chans, dim // 2, 3, **options), nn.Conv2d(dim // 2, dim, 3, **options))
        self.norm = norm(dim, device=device, dtype=dtype)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).movedim(1, -1))


class ConvStem(nn.Module):
    """Two convolutions of stride 2, each with a batch norm, and GELU between them.

    Source: Zhu et al., BiFormer, arXiv:2303.08810.
    """

    reduction = 4

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **factory)
        self.norm1 = TokenBatchNorm(dim // 2, **factory)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **factory)
        self.norm2 = TokenBatchNorm(dim, **factory)

    def forward(self, image: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(image).movedim(1, -1)))
        return self.norm2(convolve_tokens(self.conv2, x))


class PatchMerging(nn.Module):
    """Each 2 x 2 square of tokens, side by side in channels, normalised and projected to ``out`` channels.

    The order within a square is (0, 0), (1, 0), (0, 1), (1, 1), row offset first: published weights depend on it.

    Source: Liu et al., Swin Transformer, arXiv:2103.14030.
    """

    def __init__(self, dim: int, out: int, *, norm: Norm = nn.LayerNorm, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = norm(4 * dim, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * dim, out, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_even(x)
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (batch, rows, 2, columns, 2, dim)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return linear(self.reduction, self.norm(x))


class ConvDownsample(nn.Module):
    """A strided convolution with a norm before or after it.

    Args:
        dim, out: channels in and out.
        kernel_size: 3 overlaps with padding 1, 2 does not overlap.
        norm: constructor of the norm.
        norm_first: whether the norm comes before the convolution.
        bias: whether the convolution has one.

    Source: Hassani et al., NAT, arXiv:2204.07143; Zhu et al., BiFormer, arXiv:2303.08810.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        *,
        kernel_size: int = 3,
        norm: Norm = nn.LayerNorm,
        norm_first: bool = False,
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.norm_first = norm_first
        self.norm = norm(dim if norm_first else out, **factory)
        self.conv = nn.Conv2d(dim, out, kernel_size, stride=2, padding=(kernel_size - 1) // 2, bias=bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = self.norm(x)
        if self.conv.kernel_size[0] % 2 == 0:
            x = pad_to_even(x)
        x = convolve_tokens(self.conv, x)
        return x if self.norm_first else self.norm(x)
