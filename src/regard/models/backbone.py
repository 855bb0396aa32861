"""Backbones from tables: a stem, stages of repeated blocks with downsampling between them, a norm and a classifier.

The outside is timm's: images ``(batch, channels, height, width)`` of any size in; logits, or the feature maps of stages, out.
Inside, everything is tokens ``(batch, rows, columns, channels)``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checks import INTEGERS, check_integer, check_tensor, shown
from ..layers.blocks import LayerScale, Residual
from ..layers.linear import taken_by
from ..layers.mixers import AttentionMixer, create_mixer
from ..layers.positions import ConvPosition, bias_parameters
from .features import FeatureInfo
from .spec import BackboneSpec, BlockSpec, StageSpec


def make_mixer(block: BlockSpec, dim: int, heads: int, **factory) -> nn.Module:
    """The token mixer of a block that has one."""
    options = {"dim": dim, "heads": heads, **block.options, **factory}
    if block.mixer is None:
        raise ValueError("a block without a token mixer was asked for it")
    return create_mixer(block.mixer, **options) if isinstance(block.mixer, str) else block.mixer(**options)


class Block(nn.Sequential):
    """Token mixer (where the table has one) and MLP as residual branches, and what the table puts before them.

    Args:
        spec, stage, block: the table, and the lines of it that are meant.
        drop_path: rate of stochastic depth.
        dim_in: channels of the tokens that enter; those of the stage by default.
        stride: by how much the block reduces the sides of the grid.

    Raises:
        ValueError: nothing in the block changes the width or the resolution.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        stage: StageSpec,
        block: BlockSpec,
        drop_path: float,
        *,
        dim_in: int | None = None,
        stride: int = 1,
        **factory,
    ) -> None:
        dim = stage.dim
        dim_in = dim_in or dim
        if block.before is None and (dim_in != dim or stride > 1):
            raise ValueError(f"a block with nothing before it keeps {dim} channels and stride 1; got {dim_in} and {stride}")
        ratio = spec.mlp_ratio if stage.mlp_ratio is None else stage.mlp_ratio

        def residual(op: nn.Module) -> Residual:
            scale = None if spec.layer_scale is None else LayerScale(dim, spec.layer_scale, **factory)
            return Residual(spec.norm(dim, **factory), op, scale, drop_path)

        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if block.before is not None:
            parts["before"] = block.before(dim_in, dim, stride, drop_path=drop_path, **factory)
        if spec.position_kernel:
            parts["position"] = ConvPosition(dim, spec.position_kernel, **factory)
        if block.mixer is not None:
            parts["mixer"] = residual(make_mixer(block, dim, stage.heads, **factory))
        if spec.mlp_position_kernel:
            parts["mlp_position"] = ConvPosition(dim, spec.mlp_position_kernel, **factory)
        parts["mlp"] = residual(spec.mlp(dim, int(dim * ratio), **factory))
        super().__init__(parts)


class Stage(nn.Module):
    """Downsampling (of most stages), blocks, and a norm where the table has one."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and self.training:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.norm(x)
        return self.norm(self.blocks(x))


class Staged(nn.Module):
    """What whole and cut backbones share: a stem and stages.

    Attributes:
        feature_info: for each output a dict of ``num_chs``, ``reduction`` (pixels per token side) and ``module``, see
            :class:`FeatureInfo`.
        unused_keys: checkpoint keys that a published model has and this one does without.
    """

    def __init__(self, spec: BackboneSpec, in_chans: int, stem: nn.Module, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.spec, self.in_chans = spec, in_chans
        self.stem, self.stages = stem, nn.ModuleList(stages)
        self.feature_info = FeatureInfo()
        self.unused_keys: frozenset[str] = frozenset()

    def embed(self, image: Tensor) -> Tensor:
        """The tokens ``(batch, rows, columns, dim)`` of the stem."""
        self.check_image(image)
        return self.stem(image)

    def check_image(self, image: Tensor, axes: str = "height, width") -> None:
        """Raise ``TypeError`` or ``ValueError`` for anything but images (or videos) as the model takes them."""
        shape = f"(batch, {self.in_chans}, {axes})"
        if not isinstance(image, Tensor) or image.dtype in INTEGERS:
            raise TypeError(
                f"images must be a floating point tensor {shape}, such as pixels / 255, normalised; got {shown(image)}"
            )
        device, kind = taken_by(self.stem)
        check_tensor("images", image, what=shape)
        if image.ndim != axes.count(",") + 3 or image.shape[1] != self.in_chans or 0 in image.shape[1:]:
            raise ValueError(f"expected images {shape}; got {tuple(image.shape)}")
        if image.device != device:
            raise ValueError(f"images must be on {device}, where the model is; got {shown(image)}")
        if image.dtype != kind and (image.device.type == "meta" or not torch.is_autocast_enabled(image.device.type)):
            raise ValueError(f"images must be {str(kind).removeprefix('torch.')}, as the model is; got {shown(image)}")

    def run_stages(self, image: Tensor) -> list[Tensor]:
        """The tokens ``(batch, rows, columns, dim)`` after each stage."""
        x = self.embed(image)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    @property
    def pad(self) -> str | None:
        """How the mixers pad grids that do not divide: ``"mask"``, ``"token"``, ``"timm"``; None where they differ."""
        found = {module.pad for module in self._padding_mixers()}
        return found.pop() if len(found) == 1 else None

    def set_pad(self, pad: str) -> None:
        """Change how mixers pad grids that do not divide."""
        for module in self._padding_mixers():
            module.pad = pad

    def _padding_mixers(self) -> list[Any]:
        return [module for module in self.stages.modules() if isinstance(getattr(module, "pad", None), str)]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone besides norms and biases: relative bias tables."""
        return bias_parameters(self)

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
        num_features: channels of :meth:`forward_features`.
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
        stem = spec.stem(in_chans, spec.stem_dim or spec.stages[0].dim, **factory)
        drop_path = spec.drop_path if drop_path_rate is None else drop_path_rate
        super().__init__(spec, in_chans, stem, _stages(spec, drop_path, factory))
        reductions = [stem.reduction * (spec.first_stride * 2**i) for i in range(len(spec.stages))]
        self.feature_info = FeatureInfo(
            {"num_chs": stage.dim, "reduction": reduction, "module": f"stages.{index}"}
            for index, (stage, reduction) in enumerate(zip(spec.stages, reductions, strict=True))
        )
        self.num_features = spec.num_features or spec.stages[-1].dim
        self.norm = (spec.final_norm or spec.norm)(spec.stages[-1].dim, **factory)
        self.pre_logits: nn.Module = nn.Identity()
        if spec.pre_logits:
            fc = nn.Linear(self.num_features, spec.pre_logits, **factory)
            self.pre_logits = nn.Sequential(OrderedDict(fc=fc, act=nn.Tanh()))
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(spec.num_classes if num_classes is None else num_classes)
        self.apply(initialise_weights)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one; 0 removes it."""
        check_integer("num_classes", num_classes)
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        pooled = self.spec.pre_logits or self.num_features
        self.unused_keys = frozenset(f"head.{key}" for key in self.spec.head(pooled, 1, device="meta").state_dict())
        if num_classes:
            self.head = self.spec.head(pooled, num_classes, device=like.device, dtype=like.dtype)
            self.head.apply(initialise_weights)
            self.head.train(self.training)
            self.unused_keys = frozenset()

    def get_classifier(self) -> nn.Module:
        """The classifier; an identity where there is none."""
        return self.head

    def forward_features(self, image: Tensor) -> Tensor:
        """The tokens of the last stage, normalised unless they are pooled first: ``(batch, rows, columns, num_features)``."""
        x = self.run_stages(image)[-1]
        return x if self.spec.pool_first else self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the tokens of :meth:`forward_features` and classify them; ``pre_logits`` stops before the classifier."""
        x = x.mean((1, 2))
        if self.spec.pool_first:
            x = self.norm(x)
        x = self.head_drop(self.pre_logits(x))
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
            norm: apply the final norm to the last stage; it is not for single tokens where they are pooled first.
        """
        count = len(self.stages)
        indices = stage_indices(range(-n, 0) if isinstance(n, int) else n, count)
        outputs = self.run_stages(image)
        if norm and not self.spec.pool_first:
            outputs[-1] = self.norm(outputs[-1])
        return [outputs[i].movedim(-1, 1) if reshape else outputs[i].flatten(1, 2) for i in indices]

    def first_stages(self, last: int) -> list[Stage]:
        """What makes the feature maps up to the ``last``."""
        return [stage for stage in self.stages[: last + 1] if isinstance(stage, Stage)]

    def cut(self, out_indices: Sequence[int] | None = None) -> FeatureBackbone:
        """The maps of some stages, see :class:`FeatureBackbone`."""
        return FeatureBackbone(self, out_indices)


def _stages(spec: BackboneSpec, drop_path: float, factory: dict[str, Any]) -> list[Stage]:
    units = sum(stage.depth for stage in spec.stages) // spec.unit
    rates = [drop_path * i / max(units - 1, 1) for i in range(units)]
    stages: list[Stage] = []
    first, dim_in = 0, spec.stem_dim or spec.stages[0].dim
    for index, stage in enumerate(spec.stages):
        stride = 2 if index else spec.first_stride
        downsample: nn.Module = nn.Identity()
        if spec.downsample is not None and stride > 1:
            downsample = spec.downsample(dim_in, stage.dim, **factory)
            dim_in, stride = stage.dim, 1
        blocks = []
        for i in range(stage.depth):
            line, rate = stage.period[i % len(stage.period)], rates[(first + i) // spec.unit]
            blocks.append((spec.block or Block)(spec, stage, line, rate, dim_in=dim_in, stride=stride, **factory))
            dim_in, stride = stage.dim, 1
        first += stage.depth
        last = index == len(spec.stages) - 1
        norm = None if last or spec.stage_norm is None else spec.stage_norm(stage.dim, **factory)
        stages.append(Stage(downsample, blocks, norm))
    return stages


class FeatureBackbone(Staged):
    """A backbone cut to the feature maps of some stages: a list of ``(batch, channels, rows, columns)``, fine to coarse.

    Args:
        backbone: gives its stem and stages; keys of the state dict stay the same.
        out_indices: stages to return; all by default.
    """

    def __init__(self, backbone: Backbone, out_indices: Sequence[int] | None = None) -> None:
        count = len(backbone.feature_info)
        chosen = stage_indices(range(count) if out_indices is None else out_indices, count)
        super().__init__(backbone.spec, backbone.in_chans, backbone.stem, backbone.first_stages(chosen[-1]))
        self.out_indices = chosen
        self.feature_info = FeatureInfo(backbone.feature_info[i] for i in chosen)
        self.unused_keys = frozenset(backbone.state_dict()) | backbone.unused_keys

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


def initialise_weights(module: nn.Module) -> None:
    """Truncated normal linear layers, zero biases; all else keeps its own initialisation. Source: arXiv:2103.14030."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, AttentionMixer):
        module.initialise()  # after its layers: they come before the module that holds them


def count_parameters(model: nn.Module) -> int:
    """Number of learned values."""
    return sum(torch.numel(parameter) for parameter in model.parameters())
