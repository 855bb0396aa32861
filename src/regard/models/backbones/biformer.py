"""BiFormer: bi-level routing attention, with more of the regions routed the coarser the stage, dense at the last.

    x + DW(x),  x + routed attention(LN(x)),  x + MLP(LN(x));  top-k 1, 4, 16, all
Cost: N^(4/3) at the best number of regions. Source: Zhu et al., BiFormer, arXiv:2303.08810.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from ...layers.blocks import TokenBatchNorm
from ...layers.mixers import BiLevelRoutingAttention, LocallyEnhancedAttention
from ...layers.stems import ConvDownsample, ConvStem, PatchEmbed
from ..checkpoints import Layout, Rule, block_rules
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec


def _routed_rules(block: str, fc2: int) -> tuple[Rule, ...]:
    """The names of blocks under ``stages.{i}``; the dense attention of the last stage has names of its own."""
    last, ours_last = f"stages.3{block}", "stages.3.blocks.{j}"
    return (
        Rule(f"{last}.attn.qkv.{{name}}", f"{ours_last}.mixer.op.qkv.{{name}}"),
        Rule(f"{last}.attn.proj.{{name}}", f"{ours_last}.mixer.op.proj.{{name}}"),
        *block_rules(
            f"stages.{{i}}{block}",
            "stages.{i}.blocks.{j}",
            Rule("attn.qkv.qkv.{name}", "mixer.op.qkv.{name}"),
            Rule("attn.wo.{name}", "mixer.op.proj.{name}"),
            Rule("attn.lepe.{name}", "mixer.op.lepe.conv.{name}"),
            Rule("pos_embed.{name}", "position.conv.{name}"),
            Rule("mlp.0.{name}", "mlp.op.fc1.{name}"),
            Rule(f"mlp.{fc2}.{{name}}", "mlp.op.fc2.{name}"),
            attn=None,
            mlp=None,
        ),
    )


_HEAD = (Rule("norm.{name}", "norm.{name}"), Rule("head.{name}", "head.{name}"))

CONVOLUTIONAL = Layout(
    "official",
    (
        Rule("downsample_layers.0.0.{name}", "stem.conv1.{name}"),
        Rule("downsample_layers.0.1.{name}", "stem.norm1.{name}"),
        Rule("downsample_layers.0.3.{name}", "stem.conv2.{name}"),
        Rule("downsample_layers.0.4.{name}", "stem.norm2.{name}"),
        Rule("downsample_layers.{i}.0.{name}", "stages.{i}.downsample.conv.{name}"),
        Rule("downsample_layers.{i}.1.{name}", "stages.{i}.downsample.norm.{name}"),
        *_routed_rules(".{j}", fc2=3),
        *_HEAD,
    ),
    pad="token",
)
SWIN_LIKE = Layout(
    "official",
    (
        Rule("downsample_layers.0.0.{name}", "stem.proj.{name}"),
        Rule("downsample_layers.0.1.{name}", "stem.norm.{name}"),
        Rule("downsample_layers.{i}.0.{name}", "stages.{i}.downsample.norm.{name}"),
        Rule("downsample_layers.{i}.1.{name}", "stages.{i}.downsample.conv.{name}"),
        *_routed_rules(".blocks.{j}", fc2=2),
        *_HEAD,
    ),
    pad="token",
)


def _stages(
    dim: int, depths: Sequence[int], topks: Sequence[int | None], head_dim: int, regions: int, pad: str | None
) -> tuple[StageSpec, ...]:
    if len(topks) != len(depths):
        raise ValueError(f"topks must be given for each of {len(depths)} stages; got {tuple(topks)}")
    stages = []
    for i, (depth, topk) in enumerate(zip(depths, topks, strict=True)):
        width = dim * 2**i
        if topk is None:
            stages.append(StageSpec(width, 8, depth, (BlockSpec(LocallyEnhancedAttention),)))
        else:
            options = {"regions": regions, "topk": topk, "pad": pad or "mask"}
            stages.append(StageSpec(width, width // head_dim, depth, (BlockSpec(BiLevelRoutingAttention, options),)))
    return tuple(stages)


def biformer(
    dim: int = 64,
    depths: Sequence[int] = (2, 2, 8, 2),
    topks: Sequence[int | None] = (1, 4, 16, None),
    *,
    head_dim: int = 32,
    regions: int = 7,
    pad: str | None = None,
    mlp_ratio: float = 3.0,
    drop_path: float = 0.1,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a BiFormer.

    Args:
        dim: channels of the first stage; they double from stage to stage.
        depths: blocks per stage.
        topks: for each stage, how many regions a query sees; None for dense attention with 8 heads.
        head_dim: channels per head of routed stages.
        regions: regions per axis.
        pad: on grids that do not divide into regions, see :class:`regard.layers.mixers.BiLevelRoutingAttention`. None is
            what the checkpoint that is loaded was trained with, and ``"mask"`` without one.
        mlp_ratio: hidden channels of the MLPs over ``dim``.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.
    """
    return BackboneSpec(
        _stages(dim, depths, topks, head_dim, regions, pad),
        stem=ConvStem,
        downsample=partial(ConvDownsample, norm=TokenBatchNorm, bias=True),
        norm=partial(nn.LayerNorm, eps=1e-6),
        final_norm=TokenBatchNorm,
        mlp_ratio=mlp_ratio,
        position_kernel=3,
        drop_path=drop_path,
        num_classes=num_classes,
        layouts=(CONVOLUTIONAL,),
        pad=pad,
    )


def biformer_stl(
    dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    topks: Sequence[int | None] = (1, 4, 16, None),
    *,
    head_dim: int = 32,
    regions: int = 7,
    pad: str | None = None,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.1,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of BiFormer-STL: the layout of Swin with routed attention for windows; arguments as for :func:`biformer`."""
    return BackboneSpec(
        _stages(dim, depths, topks, head_dim, regions, pad),
        stem=partial(PatchEmbed, patch_size=4, norm=TokenBatchNorm),
        downsample=partial(ConvDownsample, kernel_size=2, norm=TokenBatchNorm, norm_first=True, bias=True),
        norm=partial(nn.LayerNorm, eps=1e-6),
        final_norm=TokenBatchNorm,
        mlp_ratio=mlp_ratio,
        drop_path=drop_path,
        num_classes=num_classes,
        layouts=(SWIN_LIKE,),
        pad=pad,
    )


_PAPER = "2303.08810"
_DEEP = (4, 4, 18, 4)

register_models([
    ModelCard("biformer_tiny", partial(biformer), _PAPER, 13_142_760, 2.2),
    ModelCard("biformer_small", partial(biformer, depths=_DEEP, drop_path=0.15), _PAPER, 25_536_232, 4.5),
    ModelCard("biformer_base", partial(biformer, dim=96, depths=_DEEP, drop_path=0.4), _PAPER, 56_804_968, 9.8),
    ModelCard("biformer_stl", partial(biformer_stl), _PAPER, 28_372_552, 4.6),
])  # fmt: skip
