"""Convolutions with batch norm that become one convolution for inference, and the blocks built of them.

    BN(W x) = (s W) x + (b - s m),   s = gamma / sqrt(variance + eps)

Everything here is channels first, ``(batch, channels, height, width)``; on tokens use
:func:`regard.layers.conv.convolve_tokens`, which costs no copy. A module that has a simpler equal for inference returns it
from ``fuse()``; :func:`fuse` replaces all of them in a model.

Source: Ioffe & Szegedy, arXiv:1502.03167; Ding et al., RepVGG, arXiv:2101.03697.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.tracing import count_steps
from .blocks import DropPath
from .gates import SqueezeGate
from .linear import linear

Activation = Callable[[], nn.Module]


@runtime_checkable
class Fusable(Protocol):
    """A module with a simpler equal for inference."""

    def fuse(self) -> nn.Module: ...


def fuse(module: nn.Module) -> nn.Module:
    """Replace, in place, every module that has a simpler equal for inference; outputs in eval mode stay as they are.

    Returns:
        The module, or what replaces it where it is fusable itself.

    Raises:
        ValueError: a model in training mode: batch statistics cannot be folded.
    """
    if module.training:
        raise ValueError("fuse folds running statistics: call eval() first")
    done: dict[nn.Module, nn.Module] = {}  # a module that is used twice stays shared
    return _fused(module, done)


def _fused(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in done:
        if isinstance(module, Fusable):
            done[module] = module.fuse().eval()
        else:
            done[module] = module
            for name, child in module._modules.items():  # named_children names a shared module once
                if child is not None:
                    setattr(module, name, _fused(child, done))
    return done[module]


def same_padding(length: int, kernel_size: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Zeros before and after an axis so that the result has ``ceil(length / stride)`` entries; an odd one comes after.

    With a stride this is not symmetric, and depends on the length: networks trained in TensorFlow need it.
    """
    total = max(0, (count_steps(length, stride) - 1) * stride + (kernel_size - 1) * dilation + 1 - length)
    return total // 2, total - total // 2


class SameConv2d(nn.Conv2d):
    """A convolution of any stride with the padding of :func:`same_padding`."""

    def forward(self, x: Tensor) -> Tensor:
        pads = [
            n
            for axis in (1, 0)
            for n in same_padding(x.shape[2 + axis], self.kernel_size[axis], self.stride[axis], self.dilation[axis])
        ]
        return super().forward(F.pad(x, pads))


class ConvNorm(nn.Module):
    """``act(norm(conv(x)))``: a convolution without bias, batch norm, and perhaps an activation.

    Args:
        dim, out: channels in and out.
        kernel_size, stride, dilation, groups: of the convolution.
        padding: zeros on each side, such that stride 1 keeps the size of odd kernels by default; ``"same"`` for the asymmetric
            padding of :class:`SameConv2d`.
        act: class of the activation; none by default.
        gamma: initial scale of the norm; 0 lets a residual branch start as nothing.
        eps: of the norm.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | str | None = None,
        *,
        dilation: int = 1,
        groups: int = 1,
        act: Activation | None = None,
        gamma: float = 1.0,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = convolution(dim, out, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=False, **factory)
        self.norm = nn.BatchNorm2d(out, eps=eps, **factory)
        nn.init.constant_(self.norm.weight, gamma)
        self.act = nn.Identity() if act is None else act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    def fuse(self) -> nn.Module:
        """The convolution with a bias that this is in eval mode, followed by the activation."""
        conv = fold(self.conv, self.norm)
        return conv if isinstance(self.act, nn.Identity) else nn.Sequential(conv, self.act)


def convolution(
    dim: int,
    out: int,
    kernel_size: int,
    stride: int = 1,
    padding: int | str | None = None,
    *,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = True,
    device=None,
    dtype=None,
) -> nn.Conv2d:
    """A 2-D convolution with the padding rule of :class:`ConvNorm`."""
    if isinstance(padding, str) and padding != "same":
        raise ValueError(f"padding must be a number or 'same'; got {padding!r}")
    kind, pad = (SameConv2d, 0) if padding == "same" else (nn.Conv2d, padding)
    pad = (kernel_size - 1) * dilation // 2 if pad is None else pad
    return kind(dim, out, kernel_size, stride, pad, dilation=dilation, groups=groups, bias=bias, device=device, dtype=dtype)  # type: ignore[arg-type]  # pad is a number by now


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that ``norm(conv(x))`` is in eval mode."""
    scale, shift = _affine(norm)
    bias = shift if conv.bias is None else shift + conv.bias * scale
    return conv.weight * scale[:, None, None, None], bias


def _affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Factor and shift per channel of a batch norm in eval mode."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    scale = torch.rsqrt(norm.running_var + norm.eps) * norm.weight
    return scale, norm.bias - norm.running_mean * scale


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """The convolution that ``norm(conv(x))`` is in eval mode."""
    return _like(conv, *folded(conv, norm))


def _like(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A convolution of the same kind with another weight and bias."""
    made = type(conv)(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,  # type: ignore[arg-type]  # its own
        device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    made.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    return made


class ResidualConvNorm(ConvNorm):
    """``x + norm(conv(x))`` with a convolution that keeps channels and size; one convolution after fusing.

    Args:
        dim: channels.
        kernel_size: odd.
        groups: of the convolution; ``dim`` (depthwise) by default.
        **options: ``gamma``, ``eps``, ``dilation``, ``device`` and ``dtype`` of :class:`ConvNorm`.
    """

    def __init__(self, dim: int, kernel_size: int = 3, *, groups: int | None = None, **options) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"a residual convolution needs an odd kernel_size; got {kernel_size}")
        super().__init__(dim, dim, kernel_size, groups=groups or dim, **options)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)

    def fuse(self) -> nn.Module:
        """The convolution that this is in eval mode: the identity is not normalised, so it joins after folding."""
        weight, bias = folded(self.conv, self.norm)
        weight = nn.init.dirac_(torch.empty_like(weight), self.conv.groups) + weight
        return _like(self.conv, weight, bias)


class ConvNormMLP(nn.Module):
    """``reduce(act(expand(x)))``: two 1 x 1 convolutions with batch norm, of which the last starts as nothing.

    Args:
        dim, hidden: channels in and out, and between.
        act: class of the activation.
    """

    def __init__(self, dim: int, hidden: int, *, act: Activation = nn.ReLU, device=None, dtype=None) -> None:
        super().__init__()
        self.expand = ConvNorm(dim, hidden, act=act, device=device, dtype=dtype)
        self.reduce = ConvNorm(hidden, dim, gamma=0.0, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.expand(x))


class NormLinear(nn.Module):
    """``linear(norm(x))`` of vectors ``(batch, dim)`` with batch norm: a classifier that is one linear layer after fusing.

    Args:
        dim, out: features in and out.
        eps: of the norm.
    """

    def __init__(self, dim: int, out: int, *, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, eps=eps, device=device, dtype=dtype)
        self.linear = nn.Linear(dim, out, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.linear, self.norm(x))

    def fuse(self) -> nn.Linear:
        """The linear layer that this is in eval mode."""
        norm, linear = self.norm, self.linear
        scale, shift = _affine(norm)
        made = nn.Linear(linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype)
        bias = linear.bias + linear.weight @ shift
        made.load_state_dict({"weight": (linear.weight * scale).detach(), "bias": bias.detach()})
        return made


DILATED_BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""The (kernel size, dilation) of the small branches of each large kernel, as OverLoCK has them."""


class DilatedConvNorm(nn.Module):
    """A large depthwise kernel and smaller dilated ones, each with its batch norm, summed.

        y = norm(large(x)) + sum_i norm_i(dilated_i(x))

    For inference, the dilated kernels are spread out, centred in the large one, and the whole is one convolution.

    Args:
        dim: channels.
        kernel_size: of the large kernel, odd.
        branches: (kernel size, dilation) of each smaller kernel; those of :data:`DILATED_BRANCHES` by default.

    Source: Ding et al., UniRepLKNet, arXiv:2311.15599; Lou & Yu, OverLoCK, arXiv:2502.20087.
    """

    def __init__(
        self, dim: int, kernel_size: int, branches: Sequence[tuple[int, int]] | None = None, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        if branches is None:
            if kernel_size not in DILATED_BRANCHES:
                raise ValueError(f"kernel_size must be one of {list(DILATED_BRANCHES)}, or give branches; got {kernel_size}")
            branches = DILATED_BRANCHES[kernel_size]
        wide = [(k, d) for k, d in branches if k % 2 == 0 or (k - 1) * d >= kernel_size]
        if kernel_size % 2 == 0 or wide:
            raise ValueError(f"branches must be odd and fit into the odd kernel_size {kernel_size}; got {wide or branches}")
        options: dict[str, Any] = {"groups": dim, "device": device, "dtype": dtype}
        self.large = ConvNorm(dim, dim, kernel_size, **options)
        self.dilated = nn.ModuleList(ConvNorm(dim, dim, k, dilation=d, **options) for k, d in branches)

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x)
        for branch in self.dilated:
            y = y + branch(x)
        return y

    def fuse(self) -> nn.Module:
        """The depthwise convolution that this is in eval mode."""
        weight, bias = folded(self.large.conv, self.large.norm)
        weight, size = weight.clone(), weight.shape[-1]
        for branch in self.dilated:
            small, its_bias = folded(branch.conv, branch.norm)  # type: ignore[arg-type]  # each is a ConvNorm
            step = branch.conv.dilation[0]  # type: ignore[union-attr, index]
            first = (size - 1 - (small.shape[-1] - 1) * step) // 2
            at = slice(first, size - first, step)
            weight[..., at, at] += small
            bias = bias + its_bias
        return _like(self.large.conv, weight, bias)


class MBConv(nn.Module):
    """An inverted residual block with a squeeze gate, normalised before.

        shortcut(x) + reduce(gate(depthwise(expand(norm(x)))))

    The shortcut is ``x``, or with stride 2 its mean over 2 x 2 squares, projected where the widths differ.

    Args:
        dim, out: channels in and out; they may differ with stride 2 only.
        stride: of the depthwise convolution, 1 or 2.
        expansion: hidden channels per channel out.
        squeeze: hidden channels of the gate per channel out.
        kernel_size: of the depthwise convolution.
        padding: see :class:`ConvNorm`; with ``"same"`` squares over the edge count zeros.
        act, gate_act: classes of the activations in the block and inside the gate.
        eps: of the norms.
        drop_path: rate of stochastic depth.

    Source: Sandler et al., arXiv:1801.04381; Tu et al., MaxViT, arXiv:2204.01697.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        stride: int = 1,
        *,
        expansion: float = 4.0,
        squeeze: float = 0.25,
        kernel_size: int = 3,
        padding: int | str | None = None,
        act: Activation = nn.GELU,
        gate_act: Activation = nn.SiLU,
        eps: float = 1e-5,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if stride not in (1, 2) or (stride == 1 and dim != out):
            raise ValueError(f"MBConv has stride 1 with equal widths, or stride 2; got {stride=}, {dim=}, {out=}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(expansion * out)
        self.stride, self.same = stride, padding == "same"
        self.expand_shortcut = nn.Conv2d(dim, out, 1, **factory) if dim != out else nn.Identity()
        self.norm = nn.BatchNorm2d(dim, eps=eps, **factory)
        self.expand = ConvNorm(dim, hidden, act=act, eps=eps, **factory)
        self.depthwise = ConvNorm(hidden, hidden, kernel_size, stride, padding, groups=hidden, act=act, eps=eps, **factory)
        self.gate = SqueezeGate(hidden, int(squeeze * out), act=gate_act, **factory)
        self.reduce = nn.Conv2d(hidden, out, 1, **factory)
        self.drop_path = DropPath(drop_path)

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        if self.same:
            height, width = x.shape[-2:]
            x = F.pad(x, [0, width % 2, 0, height % 2])
            pooled = F.avg_pool2d(x, 2)
        else:  # as the strided convolution, this rounds odd sizes up
            pooled = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        return self.expand_shortcut(pooled)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.depthwise(self.expand(self.norm(x))))
        return self.shortcut(x) + self.drop_path(self.reduce(y))


def round_channels(channels: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to a number of channels, at least one of it; halves round up."""
    return max(divisor, int(channels + divisor / 2) // divisor * divisor)


class SqueezeMerging(nn.Module):
    """An inverted block that halves the grid, with a squeeze gate and without a shortcut.

        reduce(gate(act(depthwise(act(expand(x))))))

    Args:
        dim, out: channels in and out.
        expansion: hidden channels per channel in.
        act: class of the activations.

    Source: Liu et al., EfficientViT, arXiv:2305.07027; Yun & Ro, SHViT, arXiv:2401.16456.
    """

    def __init__(self, dim: int, out: int, *, expansion: int = 4, act: Activation = nn.ReLU, device=None, dtype=None) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = expansion * dim
        self.expand = ConvNorm(dim, hidden, act=act, **factory)
        self.depthwise = ConvNorm(hidden, hidden, 3, 2, groups=hidden, act=act, **factory)
        self.gate = SqueezeGate(hidden, round_channels(hidden / 4), **factory)
        self.reduce = ConvNorm(hidden, out, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.gate(self.depthwise(self.expand(x))))
