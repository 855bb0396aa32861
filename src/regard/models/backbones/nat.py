"""NAT, DiNAT and DiNAT_s: neighborhood attention, dilated in every other block.

    x + gamma neighborhood(LN(x)),  x + gamma MLP(LN(x));  dilations per stage such as 1, 8, 1, 8, ...
Cost: linear in tokens. Source: Hassani et al., NAT arXiv:2204.07143; Hassani & Shi, DiNAT arXiv:2209.15001.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from ...layers.mixers import NeighborhoodAttention
from ...layers.stems import ConvDownsample, ConvTokenizer, PatchEmbed, PatchMerging
from ..checkpoints import Layout, Rule, block_rules
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec

Dilations = tuple[tuple[int, ...], ...]

PLAIN: Dilations = ((1,), (1,), (1,), (1,))
DILATED_224: Dilations = ((1, 8), (1, 4), (1, 2), (1,))
DILATED_384: Dilations = ((1, 13), (1, 6), (1, 3), (1,))


_INSIDE = (
    Rule("attn.rpb", "mixer.op.bias.table"),
    Rule("gamma1", "mixer.scale.gamma"),
    Rule("gamma2", "mlp.scale.gamma"),
)
_OUTSIDE = (
    Rule("patch_embed.{name}", "stem.{name}"),
    Rule("norm.{name}", "norm.{name}"),
    Rule("head.{name}", "head.{name}"),
)

HIERARCHICAL = Layout(
    "official",
    (
        *block_rules("levels.{i}.blocks.{j}", "stages.{i}.blocks.{j}", *_INSIDE),
        Rule("levels.{i}.downsample.reduction.{name}", "stages.{i+1}.downsample.conv.{name}"),
        Rule("levels.{i}.downsample.norm.{name}", "stages.{i+1}.downsample.norm.{name}"),
        *_OUTSIDE,
    ),
    pad="token",
)
SWIN_LIKE = Layout(
    "official",
    (
        *block_rules("layers.{i}.blocks.{j}", "stages.{i}.blocks.{j}", *_INSIDE),
        Rule("layers.{i}.downsample.{name}", "stages.{i+1}.downsample.{name}"),
        *_OUTSIDE,
    ),
    pad="token",
)
ISOTROPIC = Layout("official", (*block_rules("layers.{j}", "stages.0.blocks.{j}", *_INSIDE), *_OUTSIDE), pad="token")


def _table(
    dims: Sequence[int],
    depths: Sequence[int],
    dilations: Dilations,
    head_dim: int,
    kernel_size: int,
    pad: str | None,
    stem: Callable[..., nn.Module],
    downsample: Callable[..., nn.Module],
    layout: Layout,
    **rest,
) -> BackboneSpec:
    if len(dilations) < len(depths):
        raise ValueError(f"dilations must be given for each of {len(depths)} stages; got {dilations}")
    stages = []
    for dim, depth, steps in zip(dims, depths, dilations, strict=False):
        options = [{"kernel_size": kernel_size, "dilation": step, "pad": pad or "mask"} for step in steps]
        stages.append(StageSpec(dim, dim // head_dim, depth, tuple(BlockSpec(NeighborhoodAttention, o) for o in options)))
    return BackboneSpec(tuple(stages), stem=stem, downsample=downsample, layouts=(layout,), pad=pad, **rest)


def nat(
    dim: int = 64,
    depths: Sequence[int] = (3, 4, 6, 5),
    dilations: Dilations = PLAIN,
    *,
    head_dim: int = 32,
    kernel_size: int = 7,
    pad: str | None = None,
    mlp_ratio: float = 3.0,
    layer_scale: float | None = None,
    drop_path: float = 0.2,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a NAT, or with dilations of a DiNAT: overlapping convolutions tokenize and downsample.

    Args:
        dim: channels of the first stage; they double from stage to stage.
        depths: blocks per stage.
        dilations: for each stage, the dilations that its blocks repeat.
        head_dim: channels per head.
        kernel_size: neighbours per axis.
        pad: on grids smaller than ``kernel_size * dilation``, see :class:`regard.layers.mixers.NeighborhoodAttention`.
            None is what the checkpoint that is loaded was trained with, and ``"mask"`` without one.
        mlp_ratio: hidden channels of the MLPs over ``dim``.
        layer_scale: initial scale of the residual branches; None for none.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.
    """
    dims = [dim * 2**i for i in range(len(depths))]
    return _table(
        dims, depths, dilations, head_dim, kernel_size, pad, ConvTokenizer, ConvDownsample, HIERARCHICAL,
        mlp_ratio=mlp_ratio, layer_scale=layer_scale, drop_path=drop_path, num_classes=num_classes,
    )  # fmt: skip


def dinat_s(
    dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    dilations: Dilations = DILATED_224,
    *,
    head_dim: int = 32,
    kernel_size: int = 7,
    pad: str | None = None,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.2,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a DiNAT_s: the layout of Swin with neighborhoods for windows; arguments as for :func:`nat`."""
    dims = [dim * 2**i for i in range(len(depths))]
    return _table(
        dims, depths, dilations, head_dim, kernel_size, pad, partial(PatchEmbed, patch_size=4), PatchMerging, SWIN_LIKE,
        mlp_ratio=mlp_ratio, drop_path=drop_path, num_classes=num_classes,
    )  # fmt: skip


def nat_isotropic(
    dim: int = 384,
    depth: int = 12,
    dilations: tuple[int, ...] = (1,),
    *,
    head_dim: int = 32,
    kernel_size: int = 7,
    patch_size: int = 16,
    pad: str | None = None,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.1,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of an isotropic NAT or DiNAT: the layout of ViT without a class token, all blocks at one resolution.

    Args:
        dim, depth: channels and blocks.
        dilations: repeated by the blocks.
        patch_size: pixels per token.
        head_dim, kernel_size, pad, mlp_ratio, drop_path, num_classes: see :func:`nat`.
    """
    return _table(
        [dim], [depth], (dilations,), head_dim, kernel_size, pad,
        partial(PatchEmbed, patch_size=patch_size), PatchMerging, ISOTROPIC,
        mlp_ratio=mlp_ratio, drop_path=drop_path, num_classes=num_classes,
    )  # fmt: skip


_DEEP = (3, 4, 18, 5)
_SWIN_DEEP = (2, 2, 18, 2)
_22K = 21841
_MINI, _TINY = partial(nat), partial(nat, depths=_DEEP)
_SMALL = partial(nat, dim=96, depths=_DEEP, mlp_ratio=2.0, drop_path=0.3)
_BASE = partial(nat, dim=128, depths=_DEEP, mlp_ratio=2.0, drop_path=0.5, layer_scale=1e-5)
_LARGE = partial(nat, dim=192, depths=_DEEP, dilations=DILATED_224, mlp_ratio=2.0, drop_path=0.35)
_LARGE_22K = partial(_LARGE, drop_path=0.2, num_classes=_22K)
_S_LARGE = partial(dinat_s, dim=192, depths=_SWIN_DEEP, drop_path=0.35)
_ISO_BASE = partial(nat_isotropic, dim=768, drop_path=0.4)


def _nat(name: str, table: partial[BackboneSpec], params: int, gmacs: float) -> ModelCard:
    return ModelCard(name, table, "2204.07143", params, gmacs)


def _dinat(name: str, table: partial[BackboneSpec], params: int, gmacs: float, input_size: int = 224) -> ModelCard:
    return ModelCard(name, table, "2209.15001", params, gmacs, input_size)


register_models([
    _nat("nat_mini", _MINI, 19_984_174, 2.7),
    _nat("nat_tiny", _TINY, 27_901_582, 4.3),
    _nat("nat_small", partial(_SMALL, layer_scale=1e-5), 50_743_297, 7.8),
    _nat("nat_base", _BASE, 89_769_652, 13.7),
    _dinat("dinat_mini", partial(_MINI, dilations=DILATED_224), 19_984_174, 2.7),
    _dinat("dinat_tiny", partial(_TINY, dilations=DILATED_224), 27_901_582, 4.3),
    _dinat("dinat_small", partial(_SMALL, dilations=DILATED_224), 50_719_681, 7.8),
    _dinat("dinat_base", partial(_BASE, dilations=DILATED_224), 89_769_652, 13.7),
    _dinat("dinat_large", _LARGE, 200_943_514, 30.6),
    _dinat("dinat_large_384", partial(_LARGE, dilations=DILATED_384), 200_943_514, 89.7, 384),
    _dinat("dinat_large_384_11x11", partial(_LARGE, kernel_size=11), 201_144_250, 92.4, 384),
    _dinat("dinat_large_21k", _LARGE_22K, 232_976_131, 30.6),
    _dinat("dinat_large_21k_11x11", partial(_LARGE_22K, kernel_size=11), 233_176_867, 92.4, 384),
    _dinat("dinat_s_tiny", partial(dinat_s), 28_288_354, 4.5),
    _dinat("dinat_s_small", partial(dinat_s, depths=_SWIN_DEEP, drop_path=0.3), 49_606_258, 8.7),
    _dinat("dinat_s_base", partial(dinat_s, dim=128, depths=_SWIN_DEEP, drop_path=0.5), 87_768_224, 15.4),
    _dinat("dinat_s_large", _S_LARGE, 196_532_476, 34.5),
    _dinat("dinat_s_large_384", partial(_S_LARGE, dilations=DILATED_384), 196_532_476, 101.5, 384),
    _dinat("dinat_s_large_21k", partial(_S_LARGE, drop_path=0.2, num_classes=_22K), 228_565_093, 34.5),
    _dinat("nat_isotropic_small", partial(nat_isotropic), 21_999_736, 4.3),
    _dinat("nat_isotropic_base", _ISO_BASE, 86_465_800, 16.9),
    _dinat("dinat_isotropic_small", partial(nat_isotropic, dilations=(1, 2)), 21_999_736, 4.3),
    _dinat("dinat_isotropic_base", partial(_ISO_BASE, dilations=(1, 2)), 86_465_800, 16.9),
])  # fmt: skip
