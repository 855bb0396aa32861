"""OverLoCK: an overview of the image first, then a closer look with kernels that the overview helps to make.

    base: four convolutions, then large-kernel blocks at 1/4, 1/8 and 1/16;  overview = large-kernel blocks at 1/32
    context = PW(overview);  focus: (x, h) = dynamic block(x, h, context) at 1/16 and again at 1/32, h = context at first
    dynamic block: y[p] = sum_o softmax_o(W q_p K^T + b_o) v[p + o],  q of x, K of 7 x 7 means of h, v of both
Cost: linear in tokens. Source: Lou & Yu, OverLoCK, arXiv:2502.20087; large kernels: Ding et al., UniRepLKNet, arXiv:2311.15599;
response norm: Woo et al., ConvNeXt V2, arXiv:2301.00808.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers.blocks import DropPath, TokenBatchNorm
from ...layers.conv import convolve_tokens, depthwise
from ...layers.conv_norm import DILATED_BRANCHES, ConvNorm, DilatedConvNorm, fold
from ...layers.gates import SqueezeGate
from ...layers.linear import linear
from ...layers.mlps import MLP
from ...layers.positions import ConvPosition, OffsetBias
from ...ops import patterns as P
from ...ops.local.kernels import apply_kernel
from ..backbone import Backbone, FeatureBackbone, Staged, stage_indices
from ..checkpoints import Layout, Rule
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec

# --------------------------------------------------------------------------------------------------------------------
# pieces of blocks; tokens (batch, rows, columns, channels)


class OnTokens(nn.Module):
    """A channels-first module, applied to tokens."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return convolve_tokens(self.op, x)


class Affine(nn.Module):
    """A learned factor and shift per channel, at first 1 and 0."""

    def __init__(self, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class ResponseNorm(nn.Module):
    """Channels compete by their norm over the grid: ``(gamma r / mean(r) + 1) x + beta`` with ``r = |x|`` of each channel.

    Source: Woo et al., ConvNeXt V2, arXiv:2301.00808.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        response = response / (response.mean(-1, keepdim=True) + self.eps)
        return (self.gamma * response + 1) * x + self.beta


class ResponseMLP(MLP):
    """An MLP whose hidden tokens, once activated, meet their neighbours and then the response norm."""

    def __init__(self, dim: int, hidden: int, *, device=None, dtype=None) -> None:
        super().__init__(dim, hidden, device=device, dtype=dtype)
        self.position = ConvPosition(hidden, device=device, dtype=dtype)
        self.response = ResponseNorm(hidden, device=device, dtype=dtype)

    def hidden(self, x: Tensor) -> Tensor:
        return self.response(self.position(super().hidden(x)))


class LargeKernel(nn.Module):
    """A large depthwise kernel with dilated ones beside it, and a batch norm of their sum; channels first.

    Args:
        dim: channels.
        kernel_size: of the large kernel.
        merged: whether the dilated kernels are in the large one already, as in checkpoints published for inference.
    """

    def __init__(self, dim: int, kernel_size: int, *, merged: bool, device=None, dtype=None) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        make = depthwise if merged else DilatedConvNorm
        self.kernel: nn.Module = make(dim, kernel_size, **factory)
        self.norm = nn.BatchNorm2d(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.kernel(x))

    def fuse(self) -> nn.Module:
        """The depthwise convolution that this is in eval mode."""
        kernel = self.kernel.fuse() if isinstance(self.kernel, DilatedConvNorm) else self.kernel
        return fold(cast(nn.Conv2d, kernel), self.norm)


def _squeeze_gate(dim: int, **factory) -> OnTokens:
    return OnTokens(SqueezeGate(dim, max(16, dim // 8), act=nn.GELU, **factory))


class LargeKernelBlock(nn.Module):
    """``x <- x + DW(x)``, then ``scale(x) + MLP(gate(large kernel(LN(x))))``.

    Args:
        spec, stage, block, drop_path: as for :class:`regard.models.backbone.Block`; the block's options are ``kernel_size``,
            ``merged`` (see :class:`LargeKernel`) and whether the shortcut is ``scaled``.
    """

    def __init__(
        self, spec: BackboneSpec, stage: StageSpec, block: BlockSpec, drop_path: float, *, dim_in: int, stride: int, **factory
    ) -> None:
        super().__init__()
        dim, options = stage.dim, block.options
        if dim_in != dim or stride != 1:
            raise ValueError(f"a large-kernel block keeps {dim} channels and stride 1; got {dim_in} and {stride}")
        self.position = ConvPosition(dim, **factory)
        self.norm = spec.norm(dim, **factory)
        self.large = OnTokens(LargeKernel(dim, options["kernel_size"], merged=options["merged"], **factory))
        self.gate = _squeeze_gate(dim, **factory)
        self.mlp = ResponseMLP(dim, int(dim * spec.mlp_ratio), **factory)
        self.scale = Affine(dim, **factory) if options["scaled"] else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.position(x)
        return self.scale(x) + self.drop_path(self.mlp(self.gate(self.large(self.norm(x)))))


# --------------------------------------------------------------------------------------------------------------------
# mechanism


def _resize(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens, interpolated bilinearly."""
    if tuple(x.shape[1:3]) == tuple(grid):
        return x
    return F.interpolate(x.movedim(-1, 1), size=tuple(grid), mode="bilinear", align_corners=False).movedim(1, -1)


class ContextMixing(nn.Module):
    """Convolution with kernels made of how much each token has to do with each region of a context (ContMix).

        a = q_p K^T                            49 affinities per token and group; K of the 7 x 7 means of the context
        w = softmax over taps of W a + b       for a small kernel and for a large one, each with its biases over offsets
        y[p] = sum_o w[p, o] v[p + o]          half of the channels by the small kernel, half by the large one

    At borders the kernels are moved inward. A grid with an axis shorter than the large kernel is enlarged bilinearly until it
    is as long, and the result averaged back.

    Args:
        dim: channels of tokens and values.
        context_dim: channels of the context.
        groups: of the channels of each half, with kernels of their own.
        kernel_size, small_size: of the two kernels, odd.

    Raises:
        ValueError: half of ``dim`` is not a multiple of ``groups``; tensors that do not fit.
    """

    REGIONS = 7

    def __init__(
        self, dim: int, context_dim: int, groups: int, kernel_size: int, small_size: int = 5, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        if dim % (2 * groups):
            raise ValueError(f"dim must be a multiple of twice the groups; got {dim=}, {groups=}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.context_dim, self.groups = dim, context_dim, groups
        self.scale = (dim // groups) ** -0.5
        self.sizes = (small_size, kernel_size)
        self.query = ConvNorm(dim, dim // 2, **factory)
        self.key = ConvNorm(context_dim, dim // 2, **factory)
        self.taps = nn.Linear(self.REGIONS**2, small_size**2 + kernel_size**2, **factory)
        self.bias_small, self.bias_large = (OffsetBias(groups, P.Neighborhood(k), **factory) for k in self.sizes)
        for bias in (self.bias_small, self.bias_large):
            nn.init.zeros_(bias.table)

    def working_grid(self, grid: Sequence[int]) -> tuple[int, int]:
        """The grid that the kernels are applied on: enlarged where they do not fit."""
        rows, columns = grid
        short, size = min(rows, columns), max(self.sizes)
        return (rows, columns) if short >= size else (size * rows // short, size * columns // short)

    def kernels(self, tokens: Tensor, context: Tensor) -> list[Tensor]:
        """The small and the large kernel of each token, ``(batch, rows, columns, groups, taps)``; each sums to 1."""
        pooled = F.adaptive_avg_pool2d(context.movedim(-1, 1), self.REGIONS)
        q = convolve_tokens(self.query, tokens).unflatten(-1, (self.groups, -1)) * self.scale
        k = self.key(pooled).flatten(2).unflatten(1, (self.groups, -1))  # (batch, groups, channels, regions)
        logits = linear(self.taps, torch.einsum("bhwgc,bgcl->bhwgl", q, k)).split([size**2 for size in self.sizes], -1)
        biases = (self.bias_small, self.bias_large)
        grid = tokens.shape[1:3]
        return [(part + _tap_bias(bias.table, grid)).softmax(-1) for part, bias in zip(logits, biases, strict=True)]

    def forward(self, tokens: Tensor, context: Tensor, values: Tensor) -> Tensor:
        """Mix values.

        Args:
            tokens: ``(batch, rows, columns, dim)``, what the queries are of.
            context: ``(batch, rows, columns, context_dim)``.
            values: ``(batch, rows, columns, dim)``.

        Returns:
            ``(batch, rows, columns, dim)``.
        """
        shapes = [(*values.shape[:3], width) for width in (self.dim, self.context_dim, self.dim)]
        if values.ndim != 4 or [tuple(t.shape) for t in (tokens, context, values)] != shapes:
            raise ValueError(
                f"expected tokens, context and values (batch, rows, columns, channels) of {self.dim}, {self.context_dim} and "
                f"{self.dim} channels; got {tuple(tokens.shape)}, {tuple(context.shape)} and {tuple(values.shape)}"
            )
        rows, columns = values.shape[1:3]
        grid = self.working_grid((rows, columns))
        tokens, context, values = (_resize(t, grid) for t in (tokens, context, values))
        parts = [
            apply_kernel(half.unflatten(-1, (self.groups, -1)), weights, size, border="shift").flatten(-2)
            for half, weights, size in zip(values.chunk(2, -1), self.kernels(tokens, context), self.sizes, strict=True)
        ]
        y = torch.cat(parts, -1)
        return y if grid == (rows, columns) else F.adaptive_avg_pool2d(y.movedim(-1, 1), (rows, columns)).movedim(1, -1)


def _tap_bias(table: Tensor, grid: Sequence[int]) -> Tensor:
    """A table over offsets ``(groups, 2k - 1, 2k - 1)`` read at the taps of each token: ``(rows, columns, groups, k * k)``."""
    size = (table.shape[-1] + 1) // 2
    taps = torch.arange(size, device=table.device)
    indices = []
    for length in grid:
        at = torch.arange(length, device=table.device)
        start = (at - size // 2).clamp(0, length - size)
        indices.append((start - at + size - 1)[:, None] + taps)
    rows, columns = indices
    return table[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(-2).movedim(0, -2)


class DynamicBlock(nn.Module):
    """A block of tokens and a context that travels with them: context mixing, then an MLP on both.

        h <- scale(h) + scale'(context), but in the first block;  z = [x, h] + DW([x, h]);  n = LN(z);  v = fuse(n)
        y = reduce(gate(v) * squeeze(mix(n_x, n_h, v) + large kernel(v)))
        z <- scale(z) + y;  z <- z + DW(z);  [x, h] = scale(z) + MLP(LN(z))

    Args:
        dim, context_dim: channels of the tokens and of the context.
        groups, kernel_size: see :class:`ContextMixing`.
        mlp_ratio: hidden channels of the MLP over ``dim``.
        merged: see :class:`LargeKernel`.
        first: whether the context enters here.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        groups: int,
        kernel_size: int,
        *,
        mlp_ratio: float,
        merged: bool,
        first: bool,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        both = dim + context_dim
        self.widths = (dim, context_dim)
        self.hidden_scale, self.context_scale = (None if first else Affine(context_dim, **factory) for _ in range(2))
        self.position1 = ConvPosition(both, **factory)
        self.norm1 = nn.LayerNorm(both, eps=1e-6, **factory)
        self.fuse_conv = depthwise(both, 3, **factory)
        self.fuse_norm = nn.BatchNorm2d(both, **factory)
        self.fuse_proj = nn.Linear(both, dim, **factory)
        self.response = ResponseNorm(dim, **factory)
        self.gate = OnTokens(ConvNorm(dim, dim, act=nn.SiLU, **factory))
        self.large = OnTokens(LargeKernel(dim, kernel_size, merged=merged, **factory))
        self.mixer = ContextMixing(dim, context_dim, groups, kernel_size, **factory)
        self.mixer_proj = OnTokens(ConvNorm(dim, dim, **factory))
        self.squeeze = _squeeze_gate(dim, **factory)
        self.proj_norm = TokenBatchNorm(dim, **factory)
        self.proj = nn.Linear(dim, both, **factory)
        self.scale1 = Affine(both, **factory)
        self.position2 = ConvPosition(both, **factory)
        self.norm2 = nn.LayerNorm(both, eps=1e-6, **factory)
        self.mlp = ResponseMLP(both, int(dim * mlp_ratio), **factory)
        self.scale2 = Affine(both, **factory)
        self.drop_path = DropPath(drop_path)

    def mix(self, normed: Tensor) -> Tensor:
        """The branch of context mixing, of normalised tokens and context side by side."""
        tokens, context = normed.split(self.widths, -1)
        fused = F.gelu(convolve_tokens(self.fuse_norm, convolve_tokens(self.fuse_conv, normed)))
        values = self.response(linear(self.fuse_proj, fused))
        y = self.mixer_proj(self.mixer(tokens, context, values)) + self.large(values)
        return linear(self.proj, self.proj_norm(self.gate(values) * self.squeeze(y)))

    def forward(self, x: Tensor, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, the context that travels with them, and the one that does not, all on one grid; returns the first two."""
        if self.hidden_scale is not None and self.context_scale is not None:
            hidden = self.hidden_scale(hidden) + self.context_scale(context)
        z = self.position1(torch.cat([x, hidden], -1))
        z = self.position2(self.scale1(z) + self.drop_path(self.mix(self.norm1(z))))
        x, hidden = (self.scale2(z) + self.drop_path(self.mlp(self.norm2(z)))).split(self.widths, -1)
        return x, hidden


class FocusStage(nn.Module):
    """Dynamic blocks at one resolution, after downsampling tokens and context where they come from a finer one."""

    def __init__(self, blocks: Sequence[DynamicBlock], downsample: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.downsample = nn.ModuleList(downsample)
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, hidden: Tensor | None, context: Tensor) -> tuple[Tensor, Tensor]:
        """``hidden`` is None where the context enters; ``context`` is interpolated to the grid of the tokens."""
        if self.downsample and hidden is not None:
            x, hidden = (down(t) for down, t in zip(self.downsample, (x, hidden), strict=True))
        context = _resize(context, x.shape[1:3])
        hidden = context if hidden is None else hidden
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x, hidden = checkpoint(block, x, hidden, context, use_reentrant=False)
            else:
                x, hidden = block(x, hidden, context)
        return x, hidden


class FocusNet(nn.Module):
    """What looks at the base's map again, knowing the overview: ``context`` and one or two :class:`FocusStage`.

    Args:
        context: makes the context of the overview's tokens.
        stages: from fine to coarse.
    """

    def __init__(self, context: nn.Module, stages: Sequence[FocusStage]) -> None:
        super().__init__()
        self.context = context
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor, overview: Tensor) -> list[Tensor]:
        """Tokens and context side by side after each stage, of the base's and of the overview's tokens."""
        context = self.context(overview)
        hidden: Tensor | None = None
        outputs = []
        for stage in self.stages:
            x, hidden = stage(x, hidden, context)
            outputs.append(torch.cat([x, hidden], -1))
        return outputs


# --------------------------------------------------------------------------------------------------------------------
# network


@dataclass(frozen=True)
class OverLoCKSpec(BackboneSpec):
    """The stages are those of the base and, last, the overview's; what the focus has besides stands here.

    Args:
        focus_depths, focus_heads: blocks and heads of each stage of the focus; there are twice as many groups of kernels.
        focus_ratio: hidden channels of its MLPs over the width.
        merged: see :class:`LargeKernel`.
        auxiliary: whether the overview has a classifier of its own.
    """

    focus_depths: tuple[int, ...] = ()
    focus_heads: tuple[int, ...] = ()
    focus_ratio: float = 3.0
    merged: bool = False
    auxiliary: bool = True


class OverviewHead(nn.Module):
    """Batch norm of tokens, their mean, and a linear classifier of it."""

    def __init__(self, dim: int, num_classes: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = TokenBatchNorm(dim, device=device, dtype=dtype)
        self.linear = nn.Linear(dim, num_classes, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).mean((1, 2)))


class _ThreeNets(Staged):
    """What whole and cut networks share: base, overview and focus instead of a chain of stages."""

    focus: FocusNet | None

    def run_base(self, image: Tensor) -> list[Tensor]:
        """The tokens after each stage of the base, and those of the overview."""
        return super().run_stages(image)

    def run_stages(self, image: Tensor) -> list[Tensor]:
        """The tokens after the first two stages of the base, and with their context after the stages of the focus."""
        outputs = self.run_base(image)
        return outputs if self.focus is None else [*outputs[:-2], *self.focus(*outputs[-2:])]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        for stage in self.modules():
            if isinstance(stage, FocusStage):
                stage.grad_checkpointing = enable


class OverLoCK(_ThreeNets, Backbone):
    """The network of an :class:`OverLoCKSpec`: ``stages`` are base and overview, ``focus`` the rest.

    Its last two feature maps are those of the focus, with the context behind the channels of the tokens.

    Args:
        spec, **options: see :class:`Backbone`.
    """

    spec: OverLoCKSpec

    def __init__(self, spec: OverLoCKSpec, *, drop_path_rate: float | None = None, device=None, dtype=None, **options) -> None:
        super().__init__(spec, drop_path_rate=drop_path_rate, device=device, dtype=dtype, **options)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = spec.stages[-1].dim
        context_dim = wide // 4
        self.focus = FocusNet(nn.Linear(wide, context_dim, **factory), _focus_stages(spec, context_dim, factory))
        for info, stage, name in zip(self.feature_info[-2:], spec.stages[-2:], ("0", "1"), strict=True):
            info.update(num_chs=stage.dim + context_dim, module=f"focus.stages.{name}")
        self.apply(_init_convolutions)
        rate = spec.drop_path if drop_path_rate is None else drop_path_rate
        drops = [module for module in self.modules() if isinstance(module, DropPath)]  # in the order they are run
        for i, drop in enumerate(drops):
            drop.p = rate * i / max(len(drops) - 1, 1)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifiers, of the focus and of the overview, by new ones; 0 removes them."""
        super().reset_classifier(num_classes)
        like = next(self.parameters())
        wide = self.spec.stages[-1].dim
        self.aux_head: OverviewHead | None = None
        if num_classes and self.spec.auxiliary:
            self.aux_head = OverviewHead(wide, num_classes, device=like.device, dtype=like.dtype).train(self.training)
            self.aux_head.apply(_init_convolutions)
        else:
            keys = OverviewHead(wide, 1, device="meta").state_dict()
            self.unused_keys |= {f"aux_head.{key}" for key in keys}

    def forward_both(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the focus and of the overview, for training: the loss of the latter counts 0.4 in the paper.

        Raises:
            ValueError: a model without a classifier of the overview.
        """
        if self.aux_head is None or self.focus is None:
            raise ValueError("forward_both needs auxiliary=True and a classifier; this model lacks the overview's")
        outputs = self.run_base(image)
        x = self.focus(*outputs[-2:])[-1]
        return self.forward_head(self.norm(x)), self.aux_head(outputs[-1])

    def cut(self, out_indices: Sequence[int] | None = None) -> FeatureBackbone:
        """The maps of some stages, see :class:`OverLoCKFeatures`."""
        return OverLoCKFeatures(self, out_indices)


class OverLoCKFeatures(_ThreeNets, FeatureBackbone):
    """An OverLoCK cut to some of its feature maps, see :class:`FeatureBackbone`; the focus needs the whole overview."""

    def __init__(self, backbone: OverLoCK, out_indices: Sequence[int] | None = None) -> None:
        count = len(backbone.stages)
        deepest = max(stage_indices(range(count) if out_indices is None else out_indices, count))
        super().__init__(backbone, out_indices)
        self.focus = None
        if deepest >= count - 2:
            self.stages = nn.ModuleList(backbone.stages)
            assert backbone.focus is not None  # only cut networks do without
            kept = [stage for stage in backbone.focus.stages if isinstance(stage, FocusStage)]
            self.focus = FocusNet(backbone.focus.context, kept[: deepest - count + 3])


def _focus_stages(spec: OverLoCKSpec, context_dim: int, factory: dict[str, Any]) -> list[FocusStage]:
    stages: list[FocusStage] = []
    dim_in = spec.stages[-2].dim
    for stage, depth, heads in zip(spec.stages[-2:], spec.focus_depths, spec.focus_heads, strict=True):
        size = stage.period[0].options["kernel_size"]
        blocks = [
            DynamicBlock(
                stage.dim, context_dim, 2 * heads, size,
                mlp_ratio=spec.focus_ratio, merged=spec.merged, first=not stages and i == 0, **factory,
            )
            for i in range(depth)
        ]  # fmt: skip
        widths = [(dim_in, stage.dim), (context_dim, context_dim)] if stages else []
        stages.append(FocusStage(blocks, [_downsample(a, b, **factory) for a, b in widths]))
    return stages


def _init_convolutions(module: nn.Module) -> None:
    """Truncated normal weights and zero biases of all convolutions and linear layers, as published."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class OverLoCKStem(nn.Module):
    """Four convolutions with batch norm and GELU between them, the first and the third of stride 2."""

    reduction = 4

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        half = dim // 2
        self.convs = nn.Sequential(
            ConvNorm(in_chans, half, 3, 2, act=nn.GELU, **factory),
            ConvNorm(half, half, 3, act=nn.GELU, **factory),
            ConvNorm(half, dim, 3, 2, act=nn.GELU, **factory),
            ConvNorm(dim, dim, 3, **factory),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.convs(image).movedim(1, -1)


def _downsample(dim: int, out: int, **factory) -> OnTokens:
    return OnTokens(ConvNorm(dim, out, 3, 2, **factory))


def _projection(dim: int, *, out: int, **factory) -> OnTokens:
    """Before pooling: tokens and their context, a quarter as wide, to the features that are classified."""
    return OnTokens(ConvNorm(dim + dim // 4, out, act=nn.SiLU, **factory))


# --------------------------------------------------------------------------------------------------------------------
# checkpoints


def _conv_rules(theirs: str, ours: str, conv: int = 0) -> tuple[Rule, ...]:
    """A convolution and its norm, which stand one behind the other in a sequence."""
    return (
        Rule(f"{theirs}.{conv}.weight", f"{ours}.conv.weight"),
        Rule(f"{theirs}.{conv + 1}.{{name}}", f"{ours}.norm.{{name}}"),
    )


def _linear_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    return Rule(f"{theirs}.weight", f"{ours}.weight", "conv1x1"), Rule(f"{theirs}.bias", f"{ours}.bias")


def _affine_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    return Rule(f"{theirs}.weight", f"{ours}.weight", "depthwise1x1"), Rule(f"{theirs}.bias", f"{ours}.bias")


def _gate_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        *_linear_rules(f"{theirs}.proj.1", f"{ours}.op.fc1"),
        *_linear_rules(f"{theirs}.proj.3", f"{ours}.op.fc2"),
    )


def _mlp_rules(theirs: str, ours: str, first: int = 0) -> tuple[Rule, ...]:
    return (
        *_linear_rules(f"{theirs}.{first}", f"{ours}.fc1"),
        Rule(f"{theirs}.{first + 2}.{{name}}", f"{ours}.position.conv.{{name}}"),
        Rule(f"{theirs}.{first + 3}.{{name}}", f"{ours}.response.{{name}}", "channel_map"),
        *_linear_rules(f"{theirs}.{first + 4}", f"{ours}.fc2"),
    )


def _kernel_rules(theirs: str, ours: str, kernel_size: int, merged: bool) -> tuple[Rule, ...]:
    if merged:
        return (Rule(f"{theirs}.lk_origin.{{name}}", f"{ours}.{{name}}"),)
    return (
        Rule(f"{theirs}.lk_origin.weight", f"{ours}.large.conv.weight"),
        Rule(f"{theirs}.origin_bn.{{name}}", f"{ours}.large.norm.{{name}}"),
        *(
            rule
            for n, (size, dilation) in enumerate(DILATED_BRANCHES[kernel_size])
            for rule in (
                Rule(f"{theirs}.dil_conv_k{size}_{dilation}.weight", f"{ours}.dilated.{n}.conv.weight"),
                Rule(f"{theirs}.dil_bn_k{size}_{dilation}.{{name}}", f"{ours}.dilated.{n}.norm.{{name}}"),
            )
        ),
    )


def _block_rules(theirs: str, ours: str, kernel_size: int, merged: bool) -> tuple[Rule, ...]:
    return (
        Rule(f"{theirs}.dwconv.{{name}}", f"{ours}.position.conv.{{name}}"),
        Rule(f"{theirs}.proj.0.{{name}}", f"{ours}.norm.{{name}}"),
        *_kernel_rules(f"{theirs}.proj.1", f"{ours}.large.op.kernel", kernel_size, merged),
        Rule(f"{theirs}.proj.2.{{name}}", f"{ours}.large.op.norm.{{name}}"),
        *_gate_rules(f"{theirs}.proj.3", f"{ours}.gate"),
        *_mlp_rules(f"{theirs}.proj", f"{ours}.mlp", 4),
        *_affine_rules(f"{theirs}.ls", f"{ours}.scale"),
    )


def _dynamic_rules(theirs: str, ours: str, kernel_size: int, merged: bool) -> tuple[Rule, ...]:
    return (
        *_affine_rules(f"{theirs}.x_scale", f"{ours}.hidden_scale"),
        *_affine_rules(f"{theirs}.h_scale", f"{ours}.context_scale"),
        Rule(f"{theirs}.dwconv{{i}}.{{name}}", f"{ours}.position{{i}}.conv.{{name}}"),
        Rule(f"{theirs}.norm{{i}}.{{name}}", f"{ours}.norm{{i}}.{{name}}"),
        Rule(f"{theirs}.fusion.0.{{name}}", f"{ours}.fuse_conv.{{name}}"),
        Rule(f"{theirs}.fusion.1.{{name}}", f"{ours}.fuse_norm.{{name}}"),
        *_linear_rules(f"{theirs}.fusion.3", f"{ours}.fuse_proj"),
        Rule(f"{theirs}.fusion.4.{{name}}", f"{ours}.response.{{name}}", "channel_map"),
        *_conv_rules(f"{theirs}.weight_query", f"{ours}.mixer.query"),
        *_conv_rules(f"{theirs}.weight_key", f"{ours}.mixer.key", 1),
        *_linear_rules(f"{theirs}.weight_proj", f"{ours}.mixer.taps"),
        Rule(f"{theirs}.rpb1", f"{ours}.mixer.bias_small.table"),
        Rule(f"{theirs}.rpb2", f"{ours}.mixer.bias_large.table"),
        *_conv_rules(f"{theirs}.dyconv_proj", f"{ours}.mixer_proj.op"),
        *_kernel_rules(f"{theirs}.lepe.0", f"{ours}.large.op.kernel", kernel_size, merged),
        Rule(f"{theirs}.lepe.1.{{name}}", f"{ours}.large.op.norm.{{name}}"),
        *_gate_rules(f"{theirs}.se_layer", f"{ours}.squeeze"),
        *_conv_rules(f"{theirs}.gate", f"{ours}.gate.op"),
        Rule(f"{theirs}.proj.0.{{name}}", f"{ours}.proj_norm.{{name}}"),
        *_linear_rules(f"{theirs}.proj.1", f"{ours}.proj"),
        *_mlp_rules(f"{theirs}.mlp", f"{ours}.mlp"),
        *_affine_rules(f"{theirs}.ls{{i}}", f"{ours}.scale{{i}}"),
    )


def _layout(kernel_sizes: Sequence[int], merged: bool) -> Layout:
    blocks = (
        _block_rules(f"blocks{n + 1}.{{j}}", f"stages.{n}.blocks.{{j}}", size, merged) for n, size in enumerate(kernel_sizes)
    )
    dynamic = (
        _dynamic_rules(f"sub_blocks{n + 3}.{{j}}", f"focus.stages.{n}.blocks.{{j}}", size, merged)
        for n, size in enumerate(kernel_sizes[-2:])
    )
    rules = (
        *(rule for n in range(4) for rule in _conv_rules("patch_embed1", f"stem.convs.{n}", 3 * n)),
        *(rule for n in (1, 2, 3) for rule in _conv_rules(f"patch_embed{n + 1}", f"stages.{n}.downsample.op")),
        *(rule for each in blocks for rule in each),
        *_linear_rules("high_level_proj", "focus.context"),
        *_conv_rules("patch_embedx.x_proj", "focus.stages.1.downsample.0.op"),
        *_conv_rules("patch_embedx.h_proj", "focus.stages.1.downsample.1.op"),
        *(rule for each in dynamic for rule in each),
        *_conv_rules("head", "norm.op"),
        *_linear_rules("head.4", "head"),
        Rule("aux_head.0.{name}", "aux_head.norm.{name}"),
        *_linear_rules("aux_head.2", "aux_head.linear"),
    )
    return Layout("official", rules)


# --------------------------------------------------------------------------------------------------------------------
# tables


def overlock(
    dims: Sequence[int] = (56, 112, 256, 336),
    depths: Sequence[int] = (2, 2, 3, 2),
    focus_depths: Sequence[int] = (6, 2),
    focus_heads: Sequence[int] = (4, 6),
    *,
    kernel_sizes: Sequence[int] = (17, 15, 13, 7),
    mlp_ratio: float = 4.0,
    focus_ratio: float = 3.0,
    features: int = 1024,
    merged: bool = False,
    auxiliary: bool = False,
    drop_path: float = 0.1,
    num_classes: int = 1000,
) -> OverLoCKSpec:
    """The table of an OverLoCK.

    Args:
        dims: channels of the three stages of the base and of the overview; the focus has the last two.
        depths: blocks of the same.
        focus_depths, focus_heads: blocks and heads of the two stages of the focus.
        kernel_sizes: large kernels of each resolution.
        mlp_ratio, focus_ratio: hidden channels of the MLPs over the width, in base and overview, and in the focus.
        features: channels that are pooled and classified.
        merged: whether dilated kernels are merged into the large ones already.
        auxiliary: whether the overview has a classifier of its own, as published. It is for training with
            :meth:`OverLoCK.forward_both`; in a plain step it would get no gradient, which distributed training refuses.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifiers.

    Raises:
        ValueError: other than four resolutions, two of them with a focus.
    """
    if not (len(dims) == len(depths) == len(kernel_sizes) == 4 and len(focus_depths) == len(focus_heads) == 2):
        raise ValueError(
            f"dims, depths and kernel_sizes must be four, focus_depths and focus_heads two; got {tuple(dims)}, "
            f"{tuple(depths)}, {tuple(kernel_sizes)}, {tuple(focus_depths)} and {tuple(focus_heads)}"
        )
    stages = []
    for n, (dim, depth, size) in enumerate(zip(dims, depths, kernel_sizes, strict=True)):
        options = {"kernel_size": size, "merged": merged, "scaled": n >= 2}
        stages.append(StageSpec(dim, 1, depth, (BlockSpec(None, options),)))
    return OverLoCKSpec(
        tuple(stages),
        stem=OverLoCKStem,
        downsample=_downsample,
        block=LargeKernelBlock,
        norm=partial(nn.LayerNorm, eps=1e-6),
        final_norm=partial(_projection, out=features),
        num_features=features,
        mlp_ratio=mlp_ratio,
        drop_path=drop_path,
        num_classes=num_classes,
        layouts=(_layout(kernel_sizes, merged),),
        fixed="OverLoCK mixes tokens by large kernels and by kernels made of a context that travels beside them",
        network=OverLoCK,
        focus_depths=tuple(focus_depths),
        focus_heads=tuple(focus_heads),
        focus_ratio=focus_ratio,
        merged=merged,
        auxiliary=auxiliary,
    )


_PAPER = "2502.20087"
_XT = partial(overlock)
_T = partial(overlock, (64, 128, 256, 512), (4, 4, 6, 2), (12, 2), (4, 8), drop_path=0.15)
_S = partial(overlock, (64, 128, 320, 512), (6, 6, 8, 3), (16, 3), (8, 16), drop_path=0.4)
_B = partial(overlock, (80, 160, 384, 576), (8, 8, 10, 4), (20, 4), (6, 9), drop_path=0.5)

register_models([
    ModelCard("overlock_xt", _XT, _PAPER, 16_969_600, 2.6),
    ModelCard("overlock_t", _T, _PAPER, 34_476_448, 5.5),
    ModelCard("overlock_s", _S, _PAPER, 57_795_748, 9.7),
    ModelCard("overlock_b", _B, _PAPER, 97_434_816, 16.7),
    # published a second time with the dilated kernels merged
    ModelCard("overlock_xt_reparam", partial(_XT, merged=True), _PAPER, 16_453_712, 2.6),
    ModelCard("overlock_t_reparam", partial(_T, merged=True), _PAPER, 33_467_040, 5.5),
    ModelCard("overlock_s_reparam", partial(_S, merged=True), _PAPER, 56_156_452, 9.7),
    ModelCard("overlock_b_reparam", partial(_B, merged=True), _PAPER, 94_942_528, 16.7),
], tiny={
    "dims": (8, 12, 16, 24),
    "focus_depths": (2, 1),
    "focus_heads": (2, 1),
    "kernel_sizes": (7, 5, 7, 5),
    "features": 32,
})  # fmt: skip
