"""Compact: pyramids of three stages for small images and small machines, made to compare token mixers on.

    patches of p x p pixels, then blocks x + mixer(LN(x)), x + MLP(LN(x));  2 x 2 merging between stages
Cost: that of the mixer. Not a published model; the pyramid is that of Swin, arXiv:2103.14030, with half the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..layers.mixers import MultiHeadAttention
from ..layers.stems import PatchEmbed, PatchMerging
from .builder import BackboneSpec, BlockSpec, StageSpec
from .registry import ModelCard, register_models


def compact(
    dim: int = 32,
    depths: Sequence[int] = (1, 2, 1),
    *,
    head_dim: int = 16,
    patch_size: int = 4,
    mlp_ratio: float = 2.0,
    position_kernel: int = 3,
    drop_path: float = 0.0,
    num_classes: int = 1000,
) -> BackboneSpec:
    """The table of a compact pyramid; its mixer is dense attention, to be swapped by ``mixer=``.

    Args:
        dim: channels of the first stage; they double from stage to stage.
        depths: blocks per stage.
        head_dim: channels per head.
        patch_size: pixels of a token's side; 2 for images of about 32 x 32, 4 for larger ones.
        mlp_ratio: hidden channels of the MLPs over ``dim``.
        position_kernel: size of the depthwise convolution that encodes positions; 0 leaves positions to the mixers.
        drop_path: stochastic depth of the last block.
        num_classes: outputs of the classifier.
    """
    period = (BlockSpec(MultiHeadAttention),)
    widths = [dim * 2**i for i in range(len(depths))]
    return BackboneSpec(
        stages=tuple(StageSpec(w, w // head_dim, depth, period) for w, depth in zip(widths, depths, strict=True)),
        stem=partial(PatchEmbed, patch_size=patch_size),
        downsample=PatchMerging,
        mlp_ratio=mlp_ratio,
        position_kernel=position_kernel,
        drop_path=drop_path,
        num_classes=num_classes,
    )


_PAPER = "2103.14030"
_SMALL = partial(compact, dim=64, depths=(2, 4, 2), head_dim=32, drop_path=0.1)

register_models([
    ModelCard("compact_nano", partial(compact), _PAPER, 383_464, 0.0154, 64),
    ModelCard("compact_small", _SMALL, _PAPER, 2_088_744, 0.0942, 64),
])  # fmt: skip
