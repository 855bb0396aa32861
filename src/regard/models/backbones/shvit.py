"""SHViT: maps of few tokens from the start, and one head of attention among some of the channels.

    x + norm(DW(x)),  x + partial channel attention(x) but in the first stage,  x + FFN(x)
Cost: quadratic in tokens, of which a 16th per axis is left. Source: Yun & Ro, SHViT, arXiv:2401.16456.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from ...layers.conv_norm import NormLinear
from ...layers.mixers.partial_channel import PartialChannelAttention
from ..checkpoints import Layout, Rule
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec
from .conv_norm_trunk import (
    HEAD_RULES,
    ConvNormBlock,
    ConvNormStem,
    DistilledHead,
    SandwichMerging,
    conv_norm_rules,
    merging_rules,
    mlp_rules,
    official_rules,
)

_RENAME = conv_norm_rules("c")


def _block_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        *_RENAME(f"{theirs}.conv.m", f"{ours}.conv"),
        Rule(f"{theirs}.mixer.m.pre_norm.{{name}}", f"{ours}.mixer.op.norm.{{name}}"),
        *_RENAME(f"{theirs}.mixer.m.qkv", f"{ours}.mixer.op.qkv"),
        *_RENAME(f"{theirs}.mixer.m.proj.1", f"{ours}.mixer.op.proj"),
        *mlp_rules(_RENAME, f"{theirs}.ffn", f"{ours}.mlp"),
    )


def _layouts(distilled: bool) -> tuple[Layout, ...]:
    official = Layout("official", official_rules(_block_rules, distilled))
    if distilled:
        return (official,)
    down = "stages.{i}.downsample"
    parts = (f"{down}.0", f"{down}.1", f"{down}.2", f"{down}.3", f"{down}.4")
    timm = Layout(
        "timm",
        (
            *(rule for i in range(4) for rule in _RENAME(f"patch_embed.{2 * i}", f"stem.convs.{i}")),
            *_block_rules("stages.{i}.blocks.{j}", "stages.{i}.blocks.{j}"),
            *merging_rules(_RENAME, parts, down),
            *HEAD_RULES[False],
        ),
    )
    return official, timm


def shvit(
    dims: Sequence[int] = (128, 224, 320),
    depths: Sequence[int] = (2, 4, 5),
    parts: Sequence[int | None] = (None, 48, 68),
    *,
    head_dim: int = 16,
    mlp_ratio: float = 2.0,
    distilled: bool = False,
    drop_path: float = 0.0,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a SHViT.

    Args:
        dims: channels of each stage.
        depths: blocks per stage.
        parts: channels that attend in each stage; None for stages without attention.
        head_dim: width of the queries and keys.
        mlp_ratio: hidden channels of the feed-forward networks over those of the stage.
        distilled: whether the classifier is a :class:`regard.models.backbones.conv_norm_trunk.DistilledHead`.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.

    Raises:
        ValueError: stages of different numbers.
    """
    if not len(dims) == len(depths) == len(parts):
        raise ValueError(f"dims, depths and parts must be as many; got {tuple(dims)}, {tuple(depths)} and {tuple(parts)}")
    stages = []
    for dim, depth, part in zip(dims, depths, parts, strict=True):
        mixer = BlockSpec(None) if part is None else BlockSpec(PartialChannelAttention, {"part": part, "head_dim": head_dim})
        stages.append(StageSpec(dim, 1, depth, (mixer,)))
    return BackboneSpec(
        tuple(stages),
        stem=ConvNormStem,
        downsample=SandwichMerging,
        block=partial(ConvNormBlock, sandwich=False),
        final_norm=nn.Identity,
        mlp_ratio=mlp_ratio,
        drop_path=drop_path,
        head=DistilledHead if distilled else NormLinear,
        num_classes=num_classes,
        layouts=_layouts(distilled),
    )


_PAPER = "2401.16456"
_S2 = partial(shvit, dims=(128, 308, 448), depths=(2, 4, 5), parts=(None, 66, 96))
_S3 = partial(shvit, dims=(192, 352, 448), depths=(3, 5, 5), parts=(None, 75, 96))
_S4 = partial(shvit, dims=(224, 336, 448), depths=(4, 7, 6), parts=(None, 72, 96))

register_models([
    ModelCard("shvit_s1", partial(shvit), _PAPER, 6_330_808, 0.241),
    ModelCard("shvit_s2", _S2, _PAPER, 11_483_072, 0.366),
    ModelCard("shvit_s3", _S3, _PAPER, 14_245_273, 0.601),
    ModelCard("shvit_s4", _S4, _PAPER, 16_588_484, 0.986, 256),
], tiny={"depths": (1, 1, 2), "parts": (None, 8, 8)})  # fmt: skip
