"""DaViT: attention of tokens inside windows, then attention of channels over the whole image, in turn.

    x + DW(x),  x + window(LN(x)),  x + DW(x),  x + MLP(LN(x));  the same with channel groups instead of windows
Cost: linear in tokens. Source: Ding et al., DaViT, arXiv:2204.03645.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ...layers.mixers import ChannelGroupAttention, WindowAttention
from ...layers.stems import ConvDownsample, OverlapPatchEmbed
from ..checkpoints import Layout, Rule, block_rules
from ..registry import ModelCard, register_models
from ..spec import BackboneSpec, BlockSpec, StageSpec


def _dual_rules(block: str, positions: tuple[str, str]) -> tuple[Rule, ...]:
    """The names of a dual block: windows under 0, channels under 1."""
    return tuple(
        rule
        for index, ours in enumerate(("stages.{i}.blocks.{2j}", "stages.{i}.blocks.{2j+1}"))
        for rule in block_rules(
            f"{block}.{index}",
            ours,
            Rule(f"{positions[0]}.proj.{{name}}", "position.conv.{name}"),
            Rule(f"{positions[1]}.proj.{{name}}", "mlp_position.conv.{name}"),
        )
    )


LAYOUTS = (
    Layout(
        "official",
        (
            Rule("patch_embeds.0.{name}", "stem.{name}"),
            Rule("patch_embeds.{i}.proj.{name}", "stages.{i}.downsample.conv.{name}"),
            Rule("patch_embeds.{i}.norm.{name}", "stages.{i}.downsample.norm.{name}"),
            *_dual_rules("main_blocks.{i}.{j}", ("cpe.0", "cpe.1")),
            Rule("norms.{name}", "norm.{name}"),
            Rule("head.{name}", "head.{name}"),
        ),
        pad="token",
    ),
    Layout(
        "timm",
        (
            Rule("stem.conv.{name}", "stem.proj.{name}"),
            Rule("stem.norm.{name}", "stem.norm.{name}"),
            Rule("stages.{i}.downsample.{name}", "stages.{i}.downsample.{name}"),
            *_dual_rules("stages.{i}.blocks.{j}", ("cpe1", "cpe2")),
            Rule("head.norm.{name}", "norm.{name}"),
            Rule("head.fc.{name}", "head.{name}"),
        ),
        pad="token",
    ),
)


def davit(
    dim: int = 96,
    depths: Sequence[int] = (1, 1, 3, 1),
    *,
    head_dim: int = 32,
    window_size: int = 7,
    pad: str | None = None,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.1,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a DaViT. Its published dual blocks are two of ours: windows and MLP; then channels and MLP.

    Args:
        dim: channels of the first stage; they double from stage to stage.
        depths: dual blocks per stage.
        head_dim: channels per head and per group of channels.
        window_size: tokens per axis of a window.
        pad: where a grid does not divide into windows, ``"mask"`` clips the last ones and ``"token"`` pads with zeros that take
            part (the official code). None is what the checkpoint that is loaded was trained with, and ``"mask"`` without one.
        mlp_ratio: hidden channels of the MLPs over ``dim``.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.
    """
    window = BlockSpec(WindowAttention, {"window_size": window_size, "relative_bias": False, "pad": pad or "mask"})
    period = (window, BlockSpec(ChannelGroupAttention))
    widths = [dim * 2**i for i in range(len(depths))]
    return BackboneSpec(
        stages=tuple(StageSpec(w, w // head_dim, 2 * depth, period) for w, depth in zip(widths, depths, strict=True)),
        stem=OverlapPatchEmbed,
        downsample=partial(ConvDownsample, kernel_size=2, norm_first=True, bias=True),
        mlp_ratio=mlp_ratio,
        position_kernel=3,
        mlp_position_kernel=3,
        drop_path=drop_path,
        pool_first=True,
        num_classes=num_classes,
        layouts=LAYOUTS,
        pad=pad,
    )


_PAPER = "2204.03645"
_DEEP = (1, 1, 9, 1)

register_models([
    ModelCard("davit_tiny", partial(davit), _PAPER, 28_360_168, 4.5),
    ModelCard("davit_small", partial(davit, depths=_DEEP, drop_path=0.2), _PAPER, 49_745_896, 8.8),
    ModelCard("davit_base", partial(davit, dim=128, depths=_DEEP, drop_path=0.4), _PAPER, 87_954_408, 15.5),
    ModelCard(
        "davit_large", partial(davit, dim=192, depths=_DEEP, window_size=12, drop_path=0.2), _PAPER, 196_811_752, 103.0, 384
    ),
])  # fmt: skip
