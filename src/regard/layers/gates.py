"""Gates: factors on channels, positions or tokens, computed from a summary of the input.

All but :class:`TokenGate` take and return ``(batch, channels, *grid)``, channels first, on a grid of any rank. Cost: linear in
the input. Source: each states its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_tensor, checked
from .linear import linear

Activation = Callable[[], nn.Module]


def _check_channels(x: Tensor, dim: int) -> None:
    check_tensor("x", x, what=f"(batch, {dim}, *grid)")
    if x.ndim < 3 or x.shape[1] != dim or 0 in x.shape[2:]:
        raise ValueError(f"expected (batch, {dim}, *grid); got {tuple(x.shape)}")


def _on_channels(factors: Tensor, x: Tensor) -> Tensor:
    """``(batch, channels)`` shaped to multiply ``(batch, channels, *grid)``."""
    return factors.reshape(*factors.shape, *[1] * (x.ndim - 2))


class SqueezeGate(nn.Module):
    """``x * gate(fc2(act(fc1(mean over the grid of x))))``: squeeze and excitation.

    Args:
        dim: channels.
        hidden: channels between the two layers, ``dim // 4`` by default.
        act: class of the activation between them.
        gate: class of the activation that makes factors of the result.

    Source: Hu et al., arXiv:1709.01507.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        act: Activation = nn.ReLU,
        gate: Activation = nn.Sigmoid,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.dim = dim
        hidden = hidden or max(1, dim // 4)
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        _check_channels(x, self.dim)
        return x * _on_channels(self.gate(linear(self.fc2, self.act(linear(self.fc1, x.flatten(2).mean(-1))))), x)


class EfficientChannelGate(nn.Module):
    """``x * sigmoid(conv(mean over the grid of x))`` with a 1-D convolution along the channels.

    Args:
        dim: channels.
        kernel_size: odd; ``(log2(dim) + 1) / 2``, rounded down and to the next odd number, by default.

    Raises:
        ValueError: an even kernel.

    Source: Wang et al., ECA-Net, arXiv:1910.03151. It has ``kernel_size`` parameters.
    """

    @checked()
    def __init__(self, dim: int, kernel_size: int | None = None, *, device=None, dtype=None) -> None:
        super().__init__()
        size = int((math.log2(dim) + 1) / 2) // 2 * 2 + 1 if kernel_size is None else kernel_size
        if size % 2 == 0:
            raise ValueError(f"kernel_size must be odd; got {kernel_size}")
        self.dim = dim
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        _check_channels(x, self.dim)
        return x * _on_channels(self.conv(x.flatten(2).mean(-1).unsqueeze(1)).squeeze(1).sigmoid(), x)


class StatisticsGate(nn.Module):
    """``x * gate(norm(W_mean mean + W_std std))`` of each channel's mean and standard deviation over the grid.

    The deviation is the unbiased one; on a grid of a single position it is 0. The weights of both are full matrices, side by
    side in ``fc``, mean first.

    Args:
        dim: channels.
        gate: class of the activation that makes factors of the result.

    Source: Lee et al., SRM, arXiv:1903.10829; Huang et al., partial channel attention, arXiv:2502.01303.
    """

    @checked()
    def __init__(self, dim: int, *, gate: Activation = nn.Hardsigmoid, device=None, dtype=None) -> None:
        super().__init__()
        self.dim = dim
        self.fc = nn.Linear(2 * dim, dim, bias=False, device=device, dtype=dtype)
        self.norm = nn.BatchNorm1d(dim, device=device, dtype=dtype)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        _check_channels(x, self.dim)
        points = x.flatten(2)
        mean = points.mean(-1)
        # the square root of 0 has no gradient: constant channels take the branch that does not need one
        variance = (points - mean.unsqueeze(-1)).square().sum(-1) / max(1, points.shape[-1] - 1)
        flat = variance == 0
        std = variance.masked_fill(flat, 1.0).sqrt().masked_fill(flat, 0.0)
        return x * _on_channels(self.gate(self.norm(linear(self.fc, torch.cat([mean, std], -1)))), x)


class SubspaceGate(nn.Module):
    """Groups of channels, each with its own map of attention over the positions: ``x_g + A_g x_g``.

        A_g = softmax over positions of relu(norm(w . maxpool(relu(norm(a x_g + b))) + c))

    Args:
        dim: channels.
        groups: a divisor of ``dim``.

    Raises:
        ValueError: ``dim`` is not a multiple of ``groups``.

    Source: Saini et al., ULSAM, arXiv:2006.15102. It has ``5 * dim + 3 * groups`` parameters.
    """

    MOMENTUM = 0.9
    """Of the running statistics, in torch's sense: they follow the last batches closely."""

    @checked()
    def __init__(self, dim: int, groups: int = 4, *, device=None, dtype=None) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"dim must be a multiple of groups; got dim={dim}, groups={groups}")
        self.dim, self.groups = dim, groups
        factory = {"device": device, "dtype": dtype}
        self.depthwise = nn.Conv1d(dim, dim, 1, groups=dim, **factory)
        self.norm1 = nn.BatchNorm1d(dim, momentum=self.MOMENTUM, **factory)
        self.pointwise = nn.Conv1d(dim, groups, 1, groups=groups, **factory)
        self.norm2 = nn.BatchNorm1d(groups, momentum=self.MOMENTUM, **factory)

    def maps(self, x: Tensor) -> Tensor:
        """The attention over positions ``(batch, groups, *grid)``; each sums to one."""
        _check_channels(x, self.dim)
        grid = x.shape[2:]
        hidden = self.norm1(self.depthwise(x.flatten(2))).relu()
        hidden = _max_pool(hidden.unflatten(2, grid)).flatten(2)
        return self.norm2(self.pointwise(hidden)).relu().softmax(-1).unflatten(2, grid)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.maps(x).unsqueeze(2)
        grouped = x.unflatten(1, (self.groups, -1))
        return (grouped + maps * grouped).flatten(1, 2)


def _max_pool(x: Tensor) -> Tensor:
    """The maximum over the 3 positions around each, on every axis of the grid."""
    rank = x.ndim - 2
    if rank > 3:
        raise ValueError(f"expected a grid of 1, 2 or 3 axes; got {tuple(x.shape[2:])}")
    return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1](x, 3, stride=1, padding=1)


class TokenGate(nn.Module):
    """A factor per channel times a factor per token, on tokens ``(batch, *grid, dim)``.

        y = norm(x);  g = act(W_g mean(y)),  l = act(W_l y);  x * gate(W_c g) * gate(W_s [l, g])

    Args:
        dim: channels.
        hidden: channels of ``g`` and of ``l``, ``dim // 4`` by default.
        act, gate: classes of the activations.

    Source: Huang et al., LightViT, arXiv:2207.05557.
    """

    @checked()
    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        act: Activation = nn.GELU,
        gate: Activation = nn.Sigmoid,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.dim = dim
        hidden = hidden or max(1, dim // 4)
        factory = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **factory)
        self.global_reduce = nn.Linear(dim, hidden, **factory)
        self.local_reduce = nn.Linear(dim, hidden, **factory)
        self.channel_select = nn.Linear(hidden, dim, **factory)
        self.token_select = nn.Linear(2 * hidden, 1, **factory)
        self.act, self.gate = act(), gate()

    def forward(self, x: Tensor) -> Tensor:
        check_tensor("x", x, what=f"(batch, *grid, {self.dim})")
        if x.ndim < 3 or x.shape[-1] != self.dim or 0 in x.shape[1:]:
            raise ValueError(f"expected (batch, *grid, {self.dim}); got {tuple(x.shape)}")
        y = self.norm(x)
        local = self.act(linear(self.local_reduce, y))
        overall = self.act(linear(self.global_reduce, y.mean(tuple(range(1, x.ndim - 1)), keepdim=True)))
        tokens = linear(self.token_select, torch.cat([local, overall.expand_as(local)], -1))
        return x * self.gate(linear(self.channel_select, overall)) * self.gate(tokens)
