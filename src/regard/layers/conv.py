"""Convolutions on tokens ``(batch, *grid, channels)``."""

from __future__ import annotations

from torch import Tensor, nn

from .linear import check_kinds

CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def convolve_tokens(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a channels-first convolution to ``(batch, *grid, channels)`` tokens.

    On a 2-D grid the transposed view is torch's channels-last memory format: the convolution takes and returns it as it is.
    """
    if isinstance(conv, tuple(CONVOLUTIONS.values())):
        check_kinds(x, conv.weight)  # type: ignore[arg-type]  # a convolution has one
    return conv(x.movedim(-1, 1)).movedim(1, -1)


def depthwise(dim: int, kernel_size: int, rank: int = 2, *, bias: bool = True, device=None, dtype=None) -> nn.Module:
    """A depthwise convolution that keeps the grid; an even kernel reaches one step further after than before.

    Raises:
        ValueError: a rank without convolutions; a kernel without an extent.
    """
    if rank not in CONVOLUTIONS:
        raise ValueError(f"convolutions exist on grids of 1, 2 or 3 axes; got rank={rank}")
    if not isinstance(kernel_size, int) or kernel_size < 1:
        raise ValueError(f"kernel_size must be an integer, at least 1; got {kernel_size!r}")
    padding = kernel_size // 2 if kernel_size % 2 else "same"
    return CONVOLUTIONS[rank](dim, dim, kernel_size, padding=padding, groups=dim, bias=bias, device=device, dtype=dtype)
