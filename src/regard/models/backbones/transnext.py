"""TransNeXt: every token sees its neighbours sharply and the pooled map beside them, and gates look around in the MLPs.

    x + aggregated(LN(x)), x + ConvGLU(LN(x));  the last stage sees all tokens;  overlapping convolutions between stages
MoH-ViT is the same with mixtures of heads.
Cost: 9 + N / r^2 keys per query with r = 8, 4, 2, 1. Source: Shi, TransNeXt, arXiv:2311.17132; Jin et al., MoH,
arXiv:2410.11842.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from ...layers.mixers import AggregatedAttention, CosineAttention, MixtureOfAggregatedHeads, MixtureOfCosineHeads
from ...layers.mlps import ConvGLU
from ...layers.stems import ConvDownsample, OverlapPatchEmbed
from ..backbone import Backbone
from ..checkpoints import Layout, Rule, block_rules
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec


def _layout(stages: int) -> Layout:
    return Layout(
        "official",
        (
            Rule("patch_embed1.{name}", "stem.{name}"),
            Rule("patch_embed{i+1}.proj.{name}", "stages.{i}.downsample.conv.{name}"),
            Rule("patch_embed{i+1}.norm.{name}", "stages.{i}.downsample.norm.{name}"),
            *block_rules(
                "block{i+1}.{j}",
                "stages.{i}.blocks.{j}",
                Rule("attn.query_embedding", "mixer.op.length_scale.query_embedding"),
                Rule("attn.temperature", "mixer.op.length_scale.temperature"),
                Rule("attn.relative_pos_bias_local", "mixer.op.local_bias"),
                Rule("attn.learnable_tokens", "mixer.op.positional"),
                Rule("attn.learnable_bias", "mixer.op.positional_bias"),
                Rule("attn.cpb_fc1.{name}", "mixer.op.cpb.fc1.{name}"),
                Rule("attn.cpb_fc2.{name}", "mixer.op.cpb.fc2.{name}"),
                Rule("attn.sr.weight", "mixer.op.pool.before.0.weight", "conv1x1"),
                Rule("attn.sr.bias", "mixer.op.pool.before.0.bias"),
                Rule("attn.norm.{name}", "mixer.op.pool.after.{name}"),
                Rule("attn.wg.{name}", "mixer.op.router.{name}"),
                Rule("attn.wg_0.{name}", "mixer.op.balance.{name}"),
                Rule("attn.wg_1.{name}", "mixer.op.shared_router.{name}"),
                Rule("mlp.dwconv.dwconv.{name}", "mlp.op.conv.{name}"),
            ),
            Rule(f"norm{stages}.{{name}}", "norm.{name}"),
            Rule("norm{i+1}.{name}", "stages.{i}.norm.{name}"),
            Rule("head.{name}", "head.{name}"),
        ),
        (r"^relative_(pos_index|coords_table)\d$", r"\.(seq_length_scale|padding_mask)$"),
    )


class TransNeXt(Backbone):
    """The network of a :func:`transnext` table; says which parameters of its attention weight decay leaves alone."""

    def no_weight_decay(self) -> set[str]:
        kept = ("query_embedding", "temperature", "local_bias", "cpb.")
        return {name for name, _ in self.named_parameters() if any(word in name for word in kept)} | super().no_weight_decay()


def _gated_mlp(dim: int, hidden: int, **factory) -> ConvGLU:
    """As wide as an MLP with so many hidden channels is: the gate and the value share them."""
    return ConvGLU(dim, 2 * hidden // 3, **factory)


def transnext(
    dim: int = 72,
    depths: Sequence[int] = (2, 2, 15, 2),
    *,
    head_dim: int = 24,
    window_size: int = 3,
    ratios: Sequence[int] = (8, 4, 2, 1),
    mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
    pretrain_size: int = 224,
    drop_path: float = 0.25,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a TransNeXt.

    Args:
        dim: channels of the first stage; they double from stage to stage.
        depths: blocks per stage.
        head_dim: channels per head.
        window_size: neighbours per axis.
        ratios: per stage, tokens per pooled token on an axis; 1 for attention to every token.
        mlp_ratios: per stage, hidden channels over ``dim``, of which gating leaves two thirds.
        pretrain_size: pixels per side of the images that the position biases were trained on; they extrapolate to others.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.
    """
    if min(len(ratios), len(mlp_ratios)) < len(depths):
        raise ValueError(f"give ratios and mlp_ratios for each of {len(depths)} stages; got {ratios=}, {mlp_ratios=}")
    stages = []
    for index, (depth, ratio, mlp_ratio) in enumerate(zip(depths, ratios, mlp_ratios, strict=False)):
        grid = {"trained_grid": (pretrain_size // 2 ** (index + 2),) * 2}
        block = BlockSpec(CosineAttention, grid)
        if ratio > 1:
            block = BlockSpec(AggregatedAttention, {"window_size": window_size, "ratio": ratio, **grid})
        width = dim * 2**index
        stages.append(StageSpec(width, width // head_dim, depth, (block,), mlp_ratio))
    norm = partial(nn.LayerNorm, eps=1e-6)
    return BackboneSpec(
        tuple(stages),
        stem=OverlapPatchEmbed,
        downsample=partial(ConvDownsample, bias=True),
        norm=norm,
        stage_norm=norm,
        mlp=_gated_mlp,
        drop_path=drop_path,
        num_classes=num_classes,
        layouts=(_layout(len(depths)),),
        network=TransNeXt,
    )


def moh_transnext(
    dim: int = 96,
    depths: Sequence[int] = (5, 5, 23, 5),
    *,
    shared: Sequence[int] = (4, 8, 4, 5),
    routed: Sequence[int] = (0, 0, 8, 16),
    drop_path: float = 0.6,
    head_dim: int = 24,
    window_size: int = 3,
    ratios: Sequence[int] = (8, 4, 2, 1),
    mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
    pretrain_size: int = 224,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a MoH-ViT: a TransNeXt whose heads are mixtures; other arguments as for :func:`transnext`.

    Args:
        shared: per stage, heads that all tokens use.
        routed: per stage, heads that each token chooses among the others; 0 where all are shared.
    """
    table = transnext(
        dim, depths, head_dim=head_dim, window_size=window_size, ratios=ratios, mlp_ratios=mlp_ratios,
        pretrain_size=pretrain_size, drop_path=drop_path, num_classes=num_classes,
    )  # fmt: skip
    if min(len(shared), len(routed)) < len(depths):
        raise ValueError(f"give shared and routed heads for each of {len(depths)} stages; got {shared=}, {routed=}")
    stages = []
    for stage, always, chosen in zip(table.stages, shared, routed, strict=False):
        (block,) = stage.period
        mixed = MixtureOfCosineHeads if block.mixer is CosineAttention else MixtureOfAggregatedHeads
        block = replace(block, mixer=mixed, options={**block.options, "shared": always, "routed": chosen})
        stages.append(replace(stage, period=(block,)))
    return replace(table, stages=tuple(stages))


_PAPER = "2311.17132"
_MICRO = partial(transnext, dim=48, drop_path=0.15)
_SMALL = partial(transnext, depths=(5, 5, 22, 5), drop_path=0.45)
_BASE = partial(transnext, dim=96, depths=(5, 5, 23, 5), drop_path=0.6)
_AAAA = partial(_MICRO, ratios=(16, 8, 4, 2), pretrain_size=256)

register_models([
    ModelCard("transnext_micro", _MICRO, _PAPER, 12_809_304, 2.7),
    ModelCard("transnext_micro_aaaa", _AAAA, _PAPER, 13_114_008, 3.3, 256),
    ModelCard("transnext_tiny", partial(transnext), _PAPER, 28_258_960, 5.7),
    ModelCard("transnext_small", _SMALL, _PAPER, 49_741_564, 10.3),
    ModelCard("transnext_small_384", partial(_SMALL, drop_path=0.7), _PAPER, 49_741_564, 32.1, 384),
    ModelCard("transnext_base", _BASE, _PAPER, 89_721_496, 18.4),
    ModelCard("transnext_base_384", partial(_BASE, drop_path=0.8), _PAPER, 89_721_496, 56.3, 384),
])  # fmt: skip


_MOH = "2410.11842"
_MOH_SMALL = partial(moh_transnext, dim=72, depths=(5, 5, 22, 5), routed=(0, 0, 6, 12), drop_path=0.45)
_MOH_BASE_50 = partial(moh_transnext, shared=(2, 2, 2, 4), routed=(2, 4, 6, 8))

# multiply-adds of all heads, which the release computes; the router of a single routed head decides nothing
register_models([
    ModelCard("moh_transnext_small_75", partial(_MOH_SMALL, shared=(3, 6, 3, 4)), _MOH, 49_910_548, 10.3),
    ModelCard("moh_transnext_small_80", partial(_MOH_SMALL, shared=(3, 6, 3, 8)), _MOH, 49_910_548, 10.3),
    ModelCard("moh_transnext_base_50", _MOH_BASE_50, _MOH, 90_023_512, 18.4),
    ModelCard("moh_transnext_base_75", partial(moh_transnext), _MOH, 90_020_632, 18.4),
], tiny={"shared": (2, 2, 2, 2), "routed": (2, 2, 2, 2)})  # fmt: skip
