"""Backbones of convolutions with batch norm around one attention per block: what SHViT and EfficientViT share.

    stem: four convolutions of stride 2
    block: [x + norm(DW(x)), x + FFN(x),] x + mixer(x), x + norm(DW(x)), x + FFN(x)
    between stages: x + norm(DW(x)), x + FFN(x), squeeze merging, x + norm(DW(x)), x + FFN(x)

Tokens go in and out, as everywhere; inside they are viewed channels first, which copies nothing: the maps of these networks
lie in memory as their stem left them. :func:`regard.layers.conv_norm.fuse` folds every norm but those of an attention's input.

Source: Liu et al., EfficientViT, arXiv:2305.07027; Yun & Ro, SHViT, arXiv:2401.16456.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.blocks import Residual
from ...layers.conv import convolve_tokens
from ...layers.conv_norm import ConvNorm, ConvNormMLP, NormLinear, ResidualConvNorm, SqueezeMerging
from ..backbone import make_mixer
from ..checkpoints import Rule
from ..spec import BackboneSpec, BlockSpec, StageSpec


class ConvNormStem(nn.Module):
    """Four overlapping convolutions of stride 2 with ReLU between them: an eighth, a quarter, half, all of the channels."""

    reduction = 16

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        widths = [in_chans, dim // 8, dim // 4, dim // 2, dim]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.convs = nn.Sequential(
            *(ConvNorm(a, b, 3, 2, act=None if b == dim else nn.ReLU, **factory) for a, b in pairwise(widths))
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.convs(image).movedim(1, -1)


class ConvNormBlock(nn.Sequential):
    """A depthwise convolution, a token mixer and a feed-forward network, each a residual branch.

    A registered mixer gets the table's norm before it; those that a family brings itself normalise what they project.

    Args:
        spec, stage, block, drop_path: as for :class:`regard.models.backbone.Block`.
        sandwich: whether the mixer stands between two such convolutions and networks, or between the two of one.
        gamma: initial scale of the norm of the convolutions.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        stage: StageSpec,
        block: BlockSpec,
        drop_path: float,
        *,
        sandwich: bool,
        gamma: float = 0.0,
        dim_in: int | None = None,
        stride: int = 1,
        **factory,
    ) -> None:
        dim = stage.dim
        if dim_in not in (None, dim) or stride != 1:
            raise ValueError(f"a block of convolutions keeps {dim} channels and stride 1; got {dim_in} and {stride}")
        hidden = int(dim * spec.mlp_ratio)

        def feed_forward() -> Residual:
            return Residual(nn.Identity(), ConvNormMLP(dim, hidden, **factory), drop_path=drop_path)

        parts: OrderedDict[str, nn.Module] = OrderedDict(conv=ResidualConvNorm(dim, gamma=gamma, **factory))
        if sandwich:
            parts["mlp"] = feed_forward()
        if block.mixer is not None:
            norm = spec.norm(dim, **factory) if isinstance(block.mixer, str) else nn.Identity()
            parts["mixer"] = Residual(norm, make_mixer(block, dim, stage.heads, **factory), drop_path=drop_path)
        if sandwich:
            parts["conv2"] = ResidualConvNorm(dim, gamma=gamma, **factory)
        parts["mlp2" if sandwich else "mlp"] = feed_forward()
        super().__init__(parts)

    def forward(self, x: Tensor) -> Tensor:
        for name, part in self.named_children():
            x = part(x) if name == "mixer" else convolve_tokens(part, x)
        return x


class SandwichMerging(nn.Sequential):
    """:class:`regard.layers.conv_norm.SqueezeMerging` between two depthwise convolutions and feed-forward networks."""

    def __init__(self, dim: int, out: int, *, device=None, dtype=None) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def sides(name: str, width: int) -> dict[str, nn.Module]:
            mlp = Residual(nn.Identity(), ConvNormMLP(width, 2 * width, **factory))
            return {f"conv_{name}": ResidualConvNorm(width, **factory), f"mlp_{name}": mlp}

        merge = SqueezeMerging(dim, out, **factory)
        super().__init__(OrderedDict(**sides("before", dim), merge=merge, **sides("after", out)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class DistilledHead(nn.Module):
    """Two classifiers of one vector, of which one learns from labels and the other from a teacher.

    In training it returns both logits, ``(labels, teacher)``; otherwise their mean, which is one linear layer after fusing.

    Source: Touvron et al., DeiT, arXiv:2012.12877.
    """

    def __init__(self, dim: int, num_classes: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.labels = NormLinear(dim, num_classes, device=device, dtype=dtype)
        self.teacher = NormLinear(dim, num_classes, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        labels, teacher = self.labels(x), self.teacher(x)
        return (labels, teacher) if self.training else (labels + teacher) / 2

    def fuse(self) -> nn.Module:
        """The linear layer that this is in eval mode."""
        first, second = self.labels.fuse(), self.teacher.fuse()
        with torch.no_grad():
            first.weight.add_(second.weight).div_(2)
            first.bias.add_(second.bias).div_(2)
        return first


Rename = Callable[[str, str], tuple[Rule, ...]]
"""Makes the rules of one module of an implementation out of its foreign name and ours."""


def conv_norm_rules(conv: str) -> Rename:
    """How an implementation names a convolution with its batch norm, given the name of the convolution."""

    def rules(theirs: str, ours: str) -> tuple[Rule, ...]:
        return (
            Rule(f"{theirs}.{conv}.weight", f"{ours}.conv.weight", "convolution"),
            Rule(f"{theirs}.bn.{{name}}", f"{ours}.norm.{{name}}"),
        )

    return rules


def mlp_rules(rename: Rename, theirs: str, ours: str) -> tuple[Rule, ...]:
    """The two convolutions of a feed-forward network inside a residual branch."""
    return (*rename(f"{theirs}.m.pw1", f"{ours}.op.expand"), *rename(f"{theirs}.m.pw2", f"{ours}.op.reduce"))


def merging_rules(rename: Rename, theirs: tuple[str, str, str, str, str], ours: str) -> tuple[Rule, ...]:
    """:class:`SandwichMerging`, given the foreign names of its five parts in order."""
    conv_before, mlp_before, merge, conv_after, mlp_after = theirs
    convs = zip(("conv1", "conv2", "conv3"), ("expand", "depthwise", "reduce"), strict=True)
    return (
        *rename(f"{conv_before}.m", f"{ours}.conv_before"),
        *mlp_rules(rename, mlp_before, f"{ours}.mlp_before"),
        *(rule for their, our in convs for rule in rename(f"{merge}.{their}", f"{ours}.merge.{our}")),
        Rule(f"{merge}.se.fc{{j}}.weight", f"{ours}.merge.gate.fc{{j}}.weight", "conv1x1"),
        Rule(f"{merge}.se.fc{{j}}.bias", f"{ours}.merge.gate.fc{{j}}.bias"),
        *rename(f"{conv_after}.m", f"{ours}.conv_after"),
        *mlp_rules(rename, mlp_after, f"{ours}.mlp_after"),
    )


def _head_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    return Rule(f"{theirs}.bn.{{name}}", f"{ours}.norm.{{name}}"), Rule(f"{theirs}.l.{{name}}", f"{ours}.linear.{{name}}")


HEAD_RULES = {
    False: _head_rules("head", "head"),
    True: (*_head_rules("head", "head.labels"), *_head_rules("head_dist", "head.teacher")),
}
"""The official names of the classifier, by whether it is distilled."""


def official_rules(block: Callable[[str, str], tuple[Rule, ...]], distilled: bool) -> tuple[Rule, ...]:
    """The official names: stages are ``blocks1`` to ``blocks3``, and the last two begin with the three parts of a merging.

    Args:
        block: makes the rules of a block out of its foreign name and ours.
        distilled: whether the classifier is a :class:`DistilledHead`.
    """
    rename = conv_norm_rules("c")
    later = "blocks{i+1}"
    merging = (f"{later}.0.0", f"{later}.0.1", f"{later}.1", f"{later}.2.0", f"{later}.2.1")
    return (
        *(rule for i in range(4) for rule in rename(f"patch_embed.{2 * i}", f"stem.convs.{i}")),
        *block("blocks1.{j}", "stages.0.blocks.{j}"),
        *block(f"{later}.{{j+3}}", "stages.{i}.blocks.{j}"),
        *merging_rules(rename, merging, "stages.{i}.downsample"),
        *HEAD_RULES[distilled],
    )
