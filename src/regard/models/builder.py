"""Backbones from tables: a stem, stages of repeated blocks with downsampling between them, a norm and a classifier.

The outside is timm's: images ``(batch, channels, height, width)`` of any size in; logits, or the feature maps of stages, out.
Inside, everything is tokens ``(batch, rows, columns, channels)``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers.blocks import LayerScale, Residual
from ..layers.mixers import create_mixer
from ..layers.mlps import MLP
from ..layers.positions import ConvPosition, OffsetBias
from ..layers.stems import Norm, PatchEmbed, PatchMerging
from .checkpoints import Layout

MixerChoice = str | tuple[str, Mapping[str, Any]] | list["str | tuple[str, Mapping[str, Any]]"]


# --------------------------------------------------------------------------------------------------------------------
# tables


@dataclass(frozen=True)
class BlockSpec:
    """The token mixer of one block: a registered name or a constructor, and its options besides ``dim`` and ``heads``."""

    mixer: str | Callable[..., nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageSpec:
    """``depth`` blocks at one resolution; their mixers repeat ``period``, so that alternation is data."""

    dim: int
    heads: int
    depth: int
    period: tuple[BlockSpec, ...]


@dataclass(frozen=True)
class BackboneSpec:
    """A hierarchical backbone as a table.

    Args:
        stages: from fine to coarse.
        stem: called with ``(in_chans, dim)``; its ``reduction`` is the number of pixels per token.
        downsample: between stages, called with ``(dim, next_dim)``; halves both sides.
        norm: of the blocks, called with ``dim``.
        final_norm: after the last stage; ``norm`` by default.
        mlp_ratio: hidden channels of the MLPs over ``dim``.
        position_kernel: size of the depthwise convolution that encodes positions at the start of each block; 0 for none.
        layer_scale: initial scale of the residual branches; None for none.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        num_classes: outputs of the classifier.
        layouts: the names of published checkpoints.
    """

    stages: tuple[StageSpec, ...]
    stem: Callable[..., nn.Module] = PatchEmbed
    downsample: Callable[..., nn.Module] = PatchMerging
    norm: Norm = nn.LayerNorm
    final_norm: Norm | None = None
    mlp_ratio: float = 4.0
    position_kernel: int = 0
    layer_scale: float | None = None
    drop_path: float = 0.0
    num_classes: int = 1000
    layouts: tuple[Layout, ...] = ()

    def with_mixer(self, mixer: MixerChoice) -> BackboneSpec:
        """The same table with another token mixer in every block, and without the names of published checkpoints.

        Args:
            mixer: a registered name, or a name and options, ``("window", {"window_size": 4})``; a list of these is a period
                that the blocks of each stage repeat.

        Raises:
            ValueError: anything else.
        """
        choices = mixer if isinstance(mixer, list) else [mixer]
        period = tuple(_block_spec(choice) for choice in choices)
        if not period:
            raise ValueError("mixer must name at least one mixer; got an empty list")
        stages = tuple(replace(stage, period=period) for stage in self.stages)
        return replace(self, stages=stages, layouts=())


def _block_spec(choice: object) -> BlockSpec:
    if isinstance(choice, str):
        return BlockSpec(choice)
    if isinstance(choice, tuple) and len(choice) == 2 and isinstance(choice[0], str) and isinstance(choice[1], Mapping):
        taken = {"dim", "heads"} & choice[1].keys()
        if taken:
            raise ValueError(f"dim and heads are the model's; mixer {choice[0]!r} was given {', '.join(sorted(taken))}")
        return BlockSpec(choice[0], dict(choice[1]))
    raise ValueError(f"mixer must be a name, (name, options) or a list of these; got {choice!r}")


# --------------------------------------------------------------------------------------------------------------------
# modules


class Block(nn.Sequential):
    """Position encoding (where the table has one), token mixer and MLP, the last two as residual branches."""

    def __init__(self, spec: BackboneSpec, stage: StageSpec, block: BlockSpec, drop_path: float, **factory) -> None:
        dim = stage.dim
        options = {"dim": dim, "heads": stage.heads, **block.options, **factory}
        mixer = create_mixer(block.mixer, **options) if isinstance(block.mixer, str) else block.mixer(**options)
        mlp = MLP(dim, int(dim * spec.mlp_ratio), **factory)

        def residual(op: nn.Module) -> Residual:
            scale = None if spec.layer_scale is None else LayerScale(dim, spec.layer_scale, **factory)
            return Residual(spec.norm(dim, **factory), op, scale, drop_path)

        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if spec.position_kernel:
            parts["position"] = ConvPosition(dim, spec.position_kernel, **factory)
        parts["mixer"], parts["mlp"] = residual(mixer), residual(mlp)
        super().__init__(parts)


class Stage(nn.Module):
    """Downsampling (all stages but the first) and blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and self.training:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x
        return self.blocks(x)


class Staged(nn.Module):
    """What whole and cut backbones share: a stem and stages.

    Attributes:
        feature_info: for each output a dict of ``num_chs``, ``reduction`` (pixels per token side) and ``module``.
        unused_keys: checkpoint keys that a published model has and this one does without.
    """

    def __init__(self, spec: BackboneSpec, in_chans: int, stem: nn.Module, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.spec, self.in_chans = spec, in_chans
        self.stem, self.stages = stem, nn.ModuleList(stages)
        self.feature_info: list[dict[str, Any]] = []
        self.unused_keys: frozenset[str] = frozenset()

    def run_stages(self, image: Tensor) -> list[Tensor]:
        """The tokens ``(batch, rows, columns, dim)`` after each stage."""
        if image.ndim != 4 or image.shape[1] != self.in_chans or 0 in image.shape:
            raise ValueError(f"expected images (batch, {self.in_chans}, height, width); got {tuple(image.shape)}")
        x = self.stem(image)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone besides norms and biases: relative bias tables."""
        return {f"{name}.table" for name, module in self.named_modules() if isinstance(module, OffsetBias)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.modules():
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable


class Backbone(Staged):
    """The network that a :class:`BackboneSpec` describes.

    Args:
        spec: the table.
        in_chans: channels of the images.
        num_classes: outputs of the classifier, the table's by default; 0 returns pooled features.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, the table's by default.

    Attributes:
        num_features: channels of the last stage.
        num_prefix_tokens: tokens besides the grid; 0.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        in_chans: int = 3,
        num_classes: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        device=None,
        dtype=None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        stem = spec.stem(in_chans, spec.stages[0].dim, **factory)
        drop_path = spec.drop_path if drop_path_rate is None else drop_path_rate
        super().__init__(spec, in_chans, stem, _stages(spec, drop_path, factory))
        reductions = [stem.reduction * 2**i for i in range(len(spec.stages))]
        self.feature_info = [
            {"num_chs": stage.dim, "reduction": reduction, "module": f"stages.{index}"}
            for index, (stage, reduction) in enumerate(zip(spec.stages, reductions, strict=True))
        ]
        self.num_features = spec.stages[-1].dim
        self.norm = (spec.final_norm or spec.norm)(self.num_features, **factory)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(spec.num_classes if num_classes is None else num_classes)
        self.apply(_init_weights)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one; 0 removes it."""
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0; got {num_classes}")
        like = next(self.norm.parameters())
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        self.unused_keys = frozenset({"head.weight", "head.bias"})
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            self.head.apply(_init_weights)
            self.unused_keys = frozenset()

    def forward_features(self, image: Tensor) -> Tensor:
        """The normalised tokens of the last stage, ``(batch, rows, columns, num_features)``."""
        return self.norm(self.run_stages(image)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the tokens of :meth:`forward_features` and classify them; ``pre_logits`` stops before the classifier."""
        x = self.head_drop(x.mean((1, 2)))
        return x if pre_logits else self.head(x)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` of images ``(batch, in_chans, height, width)``."""
        return self.forward_head(self.forward_features(image))

    def get_intermediate_layers(
        self, image: Tensor, n: int | Sequence[int] = 1, *, reshape: bool = False, norm: bool = False
    ) -> list[Tensor]:
        """Tokens after the last ``n`` stages, or after the listed ones, from fine to coarse.

        Args:
            image: ``(batch, in_chans, height, width)``.
            n: how many stages, or their indices.
            reshape: return maps ``(batch, dim, rows, columns)`` instead of sequences ``(batch, rows * columns, dim)``.
            norm: apply the final norm to the last stage; the others have none.
        """
        count = len(self.stages)
        indices = stage_indices(range(-n, 0) if isinstance(n, int) else n, count)
        outputs = self.run_stages(image)
        if norm:
            outputs[-1] = self.norm(outputs[-1])
        return [outputs[i].movedim(-1, 1) if reshape else outputs[i].flatten(1, 2) for i in indices]


def _stages(spec: BackboneSpec, drop_path: float, factory: dict[str, Any]) -> list[Stage]:
    total = sum(stage.depth for stage in spec.stages)
    rates = [drop_path * i / max(total - 1, 1) for i in range(total)]
    stages: list[Stage] = []
    for index, stage in enumerate(spec.stages):
        first = sum(earlier.depth for earlier in spec.stages[:index])
        mixers = [stage.period[i % len(stage.period)] for i in range(stage.depth)]
        blocks = [Block(spec, stage, mixer, rates[first + i], **factory) for i, mixer in enumerate(mixers)]
        downsample = spec.downsample(spec.stages[index - 1].dim, stage.dim, **factory) if index else nn.Identity()
        stages.append(Stage(downsample, blocks))
    return stages


class FeatureBackbone(Staged):
    """A backbone cut to the feature maps of some stages: a list of ``(batch, channels, rows, columns)``, fine to coarse.

    Args:
        backbone: gives its stem and stages; keys of the state dict stay the same.
        out_indices: stages to return; all by default.
    """

    def __init__(self, backbone: Backbone, out_indices: Sequence[int] | None = None) -> None:
        count = len(backbone.stages)
        chosen = stage_indices(range(count) if out_indices is None else out_indices, count)
        stages = [stage for stage in backbone.stages[: max(chosen) + 1] if isinstance(stage, Stage)]
        super().__init__(backbone.spec, backbone.in_chans, backbone.stem, stages)
        self.out_indices = chosen
        self.feature_info = [backbone.feature_info[i] for i in chosen]
        self.unused_keys = frozenset(backbone.state_dict()) | backbone.unused_keys | {"head.weight", "head.bias"}

    def forward(self, image: Tensor) -> list[Tensor]:
        outputs = self.run_stages(image)
        return [outputs[i].movedim(-1, 1) for i in self.out_indices]


def stage_indices(indices: Sequence[int], count: int) -> list[int]:
    """Stage numbers in ascending order, counted from the end where negative.

    Raises:
        ValueError: none, or one that does not exist.
    """
    wrong = [i for i in indices if not -count <= i < count]
    if wrong or not list(indices):
        raise ValueError(f"stages are 0 to {count - 1}, or -{count} to -1 from the end; got {list(indices)}")
    return sorted({i % count for i in indices})


def _init_weights(module: nn.Module) -> None:
    """Truncated normal linear layers, zero biases; all else keeps its own initialisation. Source: arXiv:2103.14030."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def count_parameters(model: nn.Module) -> int:
    """Number of learned values."""
    return sum(torch.numel(parameter) for parameter in model.parameters())
