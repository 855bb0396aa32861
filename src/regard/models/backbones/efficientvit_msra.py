"""EfficientViT of Microsoft: one attention between two feed-forward networks on either side, its heads in a cascade.

    x + norm(DW(x)),  x + FFN(x),  x + cascaded group attention(x),  x + norm(DW(x)),  x + FFN(x)
Cost: linear in tokens. Source: Liu et al., EfficientViT, arXiv:2305.07027.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from ...layers.conv_norm import NormLinear
from ...layers.mixers.cascaded_group import CascadedGroupAttention
from ..checkpoints import Layout, Rule
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec
from .conv_norm_trunk import (
    ConvNormBlock,
    ConvNormStem,
    DistilledHead,
    Rename,
    SandwichMerging,
    conv_norm_rules,
    merging_rules,
    mlp_rules,
    official_rules,
)


def _block_rules(rename: Rename, theirs: str, ours: str) -> tuple[Rule, ...]:
    attention, mixer = f"{theirs}.mixer.m.attn", f"{ours}.mixer.op"
    return (
        *rename(f"{theirs}.dw0.m", f"{ours}.conv"),
        *mlp_rules(rename, f"{theirs}.ffn0", f"{ours}.mlp"),
        *rename(f"{attention}.qkvs.{{head}}", f"{mixer}.qkv.{{head}}"),
        *rename(f"{attention}.dws.{{head}}", f"{mixer}.query_conv.{{head}}"),
        *rename(f"{attention}.proj.1", f"{mixer}.proj"),
        Rule(f"{attention}.attention_biases", f"{mixer}.bias.quadrant", "flat_quadrant"),
        *rename(f"{theirs}.dw1.m", f"{ours}.conv2"),
        *mlp_rules(rename, f"{theirs}.ffn1", f"{ours}.mlp2"),
    )


_BUFFERS = (r"\.attention_bias_idxs$", r"\.ab$")
_OFFICIAL = partial(official_rules, partial(_block_rules, conv_norm_rules("c")))
_TIMM_CONV = conv_norm_rules("conv")
_DOWN = "stages.{i}.downsample"
_TIMM = Layout(
    "timm",
    (
        *_TIMM_CONV("patch_embed.conv{i+1}", "stem.convs.{i}"),
        *_block_rules(_TIMM_CONV, "stages.{i}.blocks.{j}", "stages.{i}.blocks.{j}"),
        *merging_rules(
            _TIMM_CONV,
            (f"{_DOWN}.res1.0", f"{_DOWN}.res1.1", f"{_DOWN}.patchmerge", f"{_DOWN}.res2.0", f"{_DOWN}.res2.1"),
            _DOWN,
        ),
        Rule("head.bn.{name}", "head.norm.{name}"),
        Rule("head.linear.{name}", "head.linear.{name}"),
    ),
    _BUFFERS,
)


def efficientvit_msra(
    dims: Sequence[int] = (64, 128, 192),
    depths: Sequence[int] = (1, 2, 3),
    heads: Sequence[int] = (4, 4, 4),
    *,
    query_kernels: Sequence[int] = (5, 5, 5, 5),
    window_sizes: Sequence[int] = (7, 7, 4),
    head_dim: int = 16,
    mlp_ratio: float = 2.0,
    distilled: bool = False,
    drop_path: float = 0.0,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of an EfficientViT.

    Args:
        dims: channels of each stage.
        depths: blocks per stage.
        heads: attention heads of each stage.
        query_kernels: sizes of the convolutions of the queries, head by head.
        window_sizes: tokens per axis of the windows of each stage. The published ones are 7, or the whole map of an image of
            224 pixels where that is smaller; with other sizes, published biases are resized.
        head_dim: width of the queries and keys of a head.
        mlp_ratio: hidden channels of the feed-forward networks over those of the stage.
        distilled: whether the classifier is a :class:`regard.models.backbones.conv_norm_trunk.DistilledHead`.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.

    Raises:
        ValueError: stages of different numbers.
    """
    if len({len(dims), len(depths), len(heads), len(window_sizes)}) > 1:
        raise ValueError(
            "dims, depths, heads and window_sizes must be as many; got "
            f"{tuple(dims)}, {tuple(depths)}, {tuple(heads)} and {tuple(window_sizes)}"
        )
    stages = []
    for dim, depth, count, size in zip(dims, depths, heads, window_sizes, strict=True):
        options = {"window_size": size, "query_kernels": tuple(query_kernels), "head_dim": head_dim}
        stages.append(StageSpec(dim, count, depth, (BlockSpec(CascadedGroupAttention, options),)))
    official = Layout("official", _OFFICIAL(distilled), _BUFFERS)
    return BackboneSpec(
        tuple(stages),
        stem=ConvNormStem,
        downsample=SandwichMerging,
        block=partial(ConvNormBlock, sandwich=True),
        final_norm=nn.Identity,
        mlp_ratio=mlp_ratio,
        drop_path=drop_path,
        head=DistilledHead if distilled else NormLinear,
        num_classes=num_classes,
        layouts=(official,) if distilled else (official, _TIMM),
    )


_PAPER = "2305.07027"
_FINE = (7, 5, 3, 3)
_M1 = partial(efficientvit_msra, dims=(128, 144, 192), heads=(2, 3, 3), query_kernels=_FINE)
_M2 = partial(efficientvit_msra, dims=(128, 192, 224), heads=(4, 3, 2), query_kernels=_FINE)
_M3 = partial(efficientvit_msra, dims=(128, 240, 320), heads=(4, 3, 4))
_M4 = partial(efficientvit_msra, dims=(128, 256, 384), query_kernels=_FINE)
_M5 = partial(efficientvit_msra, dims=(192, 288, 384), depths=(1, 3, 4), heads=(3, 3, 4), query_kernels=_FINE)

register_models([
    ModelCard("efficientvit_m0", partial(efficientvit_msra), _PAPER, 2_349_436, 0.079),
    ModelCard("efficientvit_m1", _M1, _PAPER, 2_980_560, 0.167),
    ModelCard("efficientvit_m2", _M2, _PAPER, 4_187_554, 0.201),
    ModelCard("efficientvit_m3", _M3, _PAPER, 6_900_722, 0.263),
    ModelCard("efficientvit_m4", _M4, _PAPER, 8_804_228, 0.299),
    ModelCard("efficientvit_m5", _M5, _PAPER, 12_473_772, 0.522),
], tiny={"depths": (1, 1, 2), "heads": (2, 4, 4), "head_dim": 4})  # fmt: skip
