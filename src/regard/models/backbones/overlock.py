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
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers.blocks import DropPath, TokenBatchNorm
from ...layers.context_mixing import (
    Affine,
    DynamicBlock,
    LargeKernel,
    OnTokens,
    ResponseMLP,
    resize_tokens,
    squeeze_gate_on_tokens,
)
from ...layers.conv_norm import ConvNorm
from ...layers.positions import ConvPosition
from ..backbone import Backbone, FeatureBackbone, Staged, stage_indices
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec
from .overlock_names import overlock_layout


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
        self.gate = squeeze_gate_on_tokens(dim, **factory)
        self.mlp = ResponseMLP(dim, int(dim * spec.mlp_ratio), **factory)
        self.scale = Affine(dim, **factory) if options["scaled"] else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.position(x)
        return self.scale(x) + self.drop_path(self.mlp(self.gate(self.large(self.norm(x)))))


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
        context = resize_tokens(context, x.shape[1:3])
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
        layouts=(overlock_layout(kernel_sizes, merged),),
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
