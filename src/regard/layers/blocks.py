"""What a block is made of: residual branches with their norm, scale and stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the whole branch of a sample with probability ``p`` and rescale the others.

    Source: Huang et al., arXiv:1603.09382.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"the drop path rate must be in [0, 1); got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * (kept.to(x.dtype) / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"{self.p:.3g}"


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch, ``init`` at the start.

    Source: Touvron et al., CaiT, arXiv:2103.17239.
    """

    def __init__(self, dim: int, init: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((dim,), init, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma

    def extra_repr(self) -> str:
        return f"{self.gamma.shape[0]}, init={self.init:g}"


class Residual(nn.Module):
    """``x + drop_path(scale(op(norm(x))))``, tokens in and out.

    Args:
        norm: applied before ``op``.
        op: the branch, keeps the shape of its input.
        scale: applied after ``op``, such as :class:`LayerScale`; none by default.
        drop_path: rate of stochastic depth.
    """

    def __init__(self, norm: nn.Module, op: nn.Module, scale: nn.Module | None = None, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm, self.op = norm, op
        self.scale = nn.Identity() if scale is None else scale
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        """What is added to ``x``."""
        return self.drop_path(self.scale(self.op(self.norm(x))))


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of the channels of tokens ``(batch, *grid, channels)``, over the batch and the grid.

    Source: Ioffe & Szegedy, arXiv:1502.03167.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
